/* Section 14: one service: its phases, its budget, its report. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"
#include "services.h"

/* Only a broken promise takes this long. */
#define LONG_WAIT CTX_S(60)

/* The end of a test on the fake clock. Threads that have just become idle may hold a block for a moment longer. */
static void nothing_is_left(void) {
    ctx_clock_real();
    UNTIL((ctx_runtime_stop(), blocks_live() == 0));
}

static void wait_returned(const actor_t *a) { UNTIL(times(a, RETURNED) == 1); }

/* -- phases ----------------------------------------------------------------------------------------------------- */

TEST(refuse_drain_and_cancel_come_in_this_order) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    expect_stopped(&a);
    EXPECT_EQ(a.cause.code, CTX_CANCELED);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(force_comes_last_and_after_the_notice) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.run_gate = &gate;
    a.force_opens = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(300);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0); /* what was forced in time has stopped in time */
    expect_orderly(&a);
    EXPECT(before(&a, REFUSES, &a, DRAINS));
    EXPECT(before(&a, DRAINED, &a, CANCELED));
    EXPECT(before(&a, CANCELED, &a, FORCES));
    EXPECT(before(&a, FORCES, &a, RETURNED));
    EXPECT_EQ(a.at[CANCELED], 0);
    EXPECT_EQ(a.at[FORCES], CTX_MS(300));
    EXPECT(report.within_budget && report.late == 0);
    EXPECT_EQ(report.parts[0].forced_at, CTX_MS(300));
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

/* The notice says when it is forced, the budget when it is late. */
TEST(run_that_stops_after_its_notice_and_inside_the_budget_is_not_late) {
    for (int forces = 0; forces < 2; forces++) {
        ctx_clock_fake(T0);
        actor_t a = actor("slow");
        a.run_lingers = CTX_S(1);
        ctx_service_desc_t desc = describe(&a);
        if (!forces) desc.force = NULL;
        ctx_service_t *service = started(ctx_background(), &desc);
        ctx_shutdown_report_t report;
        EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0);
        EXPECT_EQ(report.took, CTX_S(1));
        EXPECT(report.within_budget && report.late == 0);
        EXPECT_EQ(report.parts[0].finished_at, CTX_S(1));
        EXPECT_EQ(times(&a, FORCES), forces);
        drive(&a.n[RETURNED]);
        ctx_service_free(service);
    }
    nothing_is_left();
}

TEST(run_that_stops_when_it_is_told_needs_no_notice) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    desc.grace = -1;
    desc.force = NULL;
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT_EQ(times(&a, RETURNED), 1);
    wait_returned(&a);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_negative_notice_is_none) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.run_gate = &gate;
    a.force_opens = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.grace = -1;
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(stop_driven(service, CTX_S(10), NULL), 0);
    EXPECT(before(&a, CANCELED, &a, FORCES));
    EXPECT_EQ(a.at[FORCES], 0);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(the_drain_gets_the_earlier_of_its_budget_and_what_the_stop_has_less_the_notice) {
    const struct {
        ctx_dur_t drain_budget, grace, budget, expected;
    } all[] = {
        {CTX_S(3), 0, CTX_S(10), CTX_S(3)},        {0, 0, CTX_S(10), CTX_MS(9900)},
        {CTX_S(20), 0, CTX_S(10), CTX_MS(9900)},   {0, CTX_S(2), CTX_S(10), CTX_S(8)},
        {CTX_S(9), CTX_S(2), CTX_S(10), CTX_S(8)}, {0, -1, CTX_S(10), CTX_S(10)},
        {CTX_S(20), -1, CTX_S(10), CTX_S(10)},     {CTX_S(8), CTX_S(2), CTX_S(10), CTX_S(8)},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        ctx_clock_fake(T0);
        actor_t a = actor("a");
        ctx_service_desc_t desc = describe(&a);
        desc.drain_budget = all[i].drain_budget;
        desc.grace = all[i].grace;
        ctx_service_t *service = started(ctx_background(), &desc);
        ctx_service_stop(service, all[i].budget, NULL);
        EXPECT_EQ(a.drain_err, 0);
        EXPECT_EQ(a.drain_deadline - T0, all[i].expected);
        ctx_service_free(service);
        until_quiet();
        expect_orderly(&a);
    }
    nothing_is_left();
}

TEST(a_drain_without_end_has_no_deadline) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_stop(service, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(a.drain_deadline, CTX_NO_DEADLINE);
    expect_stopped(&a);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(the_work_goes_on_while_it_drains) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.drain_takes = CTX_S(5);
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    stopper_t s;
    stop_apart(&s, service, CTX_S(10));
    pass(CTX_MS(4900));
    EXPECT_EQ(times(&a, DRAINS), 1);
    EXPECT_EQ(times(&a, CANCELED), 0);
    EXPECT_EQ(load(&s.done), 0);
    drive(&s.done);
    thread_join(s.thread);
    EXPECT_EQ(s.rc, 0);
    EXPECT_EQ(a.at[CANCELED], CTX_S(5)); /* as soon as it was drained */
    expect_stopped(&a);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_drain_that_heeds_its_context_is_ended_by_its_budget) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.drain_takes = CTX_S(3600);
    ctx_service_desc_t desc = describe(&a);
    desc.drain_budget = CTX_S(2);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0);
    EXPECT_EQ(a.at[DRAINED], CTX_S(2));
    EXPECT_EQ(a.at[CANCELED], CTX_S(2));
    EXPECT_EQ(report.took, CTX_S(2));
    EXPECT_EQ(times(&a, FORCES), 0);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_drain_that_ignores_its_context_is_forced_and_named_late) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.drain_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(200);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(a.at[CANCELED], CTX_MS(800));
    EXPECT_EQ(a.at[FORCES], CTX_S(1));
    EXPECT_EQ(times(&a, RETURNED), 1);
    EXPECT_EQ(times(&a, DRAINED), 0);
    EXPECT(report.took >= CTX_S(1) && report.took <= CTX_MS(1200));
    EXPECT(!report.within_budget && report.late == 1 && report.parts[0].late);
    EXPECT(report.parts[0].drained_at < 0 && report.parts[0].finished_at < 0);
    ctx_service_free(service);
    gate_open(&gate);
    UNTIL(times(&a, DRAINED) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_drain_that_force_ends_within_the_budget_is_not_late) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.drain_gate = &gate;
    a.force_opens = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.drain_budget = CTX_S(2);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0);
    EXPECT_EQ(a.at[FORCES], CTX_MS(2100));
    EXPECT_EQ(times(&a, DRAINED), 1);
    EXPECT(report.within_budget && report.late == 0);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(each_callback_has_a_thread_of_its_own) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT(pthread_equal(a.starter, pthread_self())); /* that one is called by whoever starts it */
    EXPECT(!pthread_equal(a.runner, pthread_self()));
    EXPECT(!pthread_equal(a.drainer, pthread_self()));
    ctx_service_free(service);
    nothing_is_left();
}

/* -- nothing holds the stop up ---------------------------------------------------------------------------------- */

TEST(run_that_ignores_its_cancellation_is_forced_then_named_late) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("stubborn");
    a.run_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(a.at[FORCES], CTX_MS(100));
    EXPECT_EQ(times(&a, FORCES), 1);
    EXPECT(report.took <= CTX_MS(1100));
    EXPECT_EQ(report.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT(!report.within_budget && report.late == 1);
    EXPECT(report.parts[0].late && strcmp(report.parts[0].name, "stubborn") == 0);
    EXPECT_EQ(report.parts[0].forced_at, CTX_MS(100));
    EXPECT(report.parts[0].finished_at < 0);
    gate_open(&gate);
    wait_returned(&a);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

/* In real time: `callback` stands still for good. */
static void expect_bounded(actor_t *a, gate_t *gate) {
    ctx_service_desc_t desc = describe(a);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_service_stop(service, CTX_MS(200), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT(report.late == 1 && report.parts[0].late);
    gate_open(gate);
    ctx_service_free(service);
    gate_destroy(gate);
    UNTIL(times(a, RUNS) == times(a, RETURNED) && times(a, DRAINS) == times(a, DRAINED));
    nothing_is_left();
}

TEST(a_stuck_run_does_not_hold_the_stop_past_budget_and_notice) {
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.run_gate = &gate;
    expect_bounded(&a, &gate);
}

TEST(a_stuck_drain_does_not_hold_the_stop_past_budget_and_notice) {
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.drain_gate = &gate;
    expect_bounded(&a, &gate);
}

TEST(a_stuck_refuse_does_not_hold_the_stop_past_budget_and_notice) {
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.refuse_gate = &gate;
    expect_bounded(&a, &gate);
}

TEST(a_stuck_force_does_not_hold_the_stop_past_budget_and_notice) {
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.run_gate = a.force_gate = &gate;
    expect_bounded(&a, &gate);
}

TEST(a_stop_with_no_budget_cancels_at_once) {
    ctx_clock_fake(T0);
    for (int stuck = 0; stuck < 2; stuck++) {
        gate_t gate;
        gate_init(&gate);
        actor_t a = actor("a");
        if (stuck) a.run_gate = &gate;
        ctx_service_desc_t desc = describe(&a);
        ctx_service_t *service = started(ctx_background(), &desc);
        ctx_time_t from = ctx_now();
        ctx_shutdown_report_t report;
        int rc = stop_driven(service, 0, &report);
        EXPECT_EQ(times(&a, CANCELED), 1);
        EXPECT_EQ(a.at[CANCELED], from - T0);
        EXPECT(report.took <= CTX_MS(100));
        EXPECT(ctx_now() - from <= CTX_MS(200));
        EXPECT_EQ(rc, report.rc);
        if (stuck) EXPECT_EQ(rc, CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(times(&a, FORCES), stuck);
        gate_open(&gate);
        wait_returned(&a);
        ctx_service_free(service);
        gate_destroy(&gate);
    }
    nothing_is_left();
}

TEST(a_negative_budget_is_none) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    ctx_service_stop(service, INT64_MIN, &report);
    EXPECT_EQ(times(&a, RETURNED), 1);
    EXPECT_EQ(report.late, 0);
    ctx_service_free(service);
    nothing_is_left();
}

typedef struct {
    gate_t gate;
    int err_before, err_after; /* of its context */
    ctx_cause_t cause;
    int done; /* [atomic] */
} stuck_t;

static int uses_its_context_after_the_end(ctx_t *ctx, void *user) {
    stuck_t *stuck = (stuck_t *)user;
    stuck->err_before = ctx_err(ctx);
    gate_pass(&stuck->gate);
    ctx_t *child = ctx_with_cancel(ctx);
    stuck->err_after = ctx_err(child);
    stuck->cause = ctx_cause(child);
    ctx_end(child);
    ctx_shutdown_dropped(3); /* for a report that was made long ago */
    store(&stuck->done, 1);
    return 0;
}

TEST(what_a_stuck_run_touches_lives_until_it_ends) {
    stuck_t stuck;
    memset(&stuck, 0, sizeof stuck);
    gate_init(&stuck.gate);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.run = uses_its_context_after_the_end;
    desc.user = &stuck;
    desc.grace = CTX_MS(1);
    ctx_service_t *service = started(parent, &desc);
    gate_await(&stuck.gate, 1);
    ctx_time_t from = ctx_now();
    ctx_service_free(service);
    ctx_end(parent);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT_EQ(load(&stuck.done), 0);
    gate_open(&stuck.gate);
    UNTIL(load(&stuck.done));
    EXPECT_EQ(stuck.err_before, 0);
    EXPECT_EQ(stuck.err_after, CTX_CANCELED);
    EXPECT(stuck.cause.what != NULL);
    gate_destroy(&stuck.gate);
    nothing_is_left();
}

/* -- starting --------------------------------------------------------------------------------------------------- */

TEST(start_is_over_before_run_begins) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT(before(&a, STARTED, &a, RUNS));
    EXPECT_EQ(a.start_err, 0);
    ctx_service_free(service);
    nothing_is_left();
}

static const ctx_key_t tenant_key = CTX_KEY(int);

static int sees_the_tenant(ctx_t *ctx, void *user) {
    const int *tenant = (const int *)ctx_value(ctx, &tenant_key);
    add((int *)user, tenant ? *tenant : 1000);
    return 0;
}

TEST(start_and_run_see_the_values_of_the_parent) {
    const int tenant = 7;
    int sum = 0;
    ctx_t *parent = ctx_with_value(ctx_background(), &tenant_key, &tenant);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.start = desc.run = sees_the_tenant;
    desc.user = &sum;
    ctx_service_t *service = started(parent, &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT_EQ(load(&sum), 14);
    ctx_service_free(service);
    ctx_end(parent);
    nothing_is_left();
}

TEST(after_a_failed_start_the_rest_is_never_called) {
    actor_t a = actor("a");
    a.start_rc = -EIO;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_start(service), -EIO);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    ctx_service_free(service);
    EXPECT_EQ(times(&a, STARTS), 1);
    for (int event = RUNS; event < EVENTS; event++) EXPECT_EQ(times(&a, (event_t)event), 0);
    nothing_is_left();
}

TEST(after_a_failed_start_it_may_be_started_again) {
    actor_t a = actor("a");
    a.start_rc = -EIO;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_start(service), -EIO);
    EXPECT_EQ(ctx_service_start(service), -EIO);
    a.start_rc = 0;
    EXPECT_EQ(ctx_service_start(service), 0);
    UNTIL(times(&a, RUNS) == 1);
    EXPECT_EQ(times(&a, STARTS), 3);
    EXPECT_EQ(a.start_err, 0);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT_EQ(times(&a, RETURNED), 1);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(it_starts_once) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_start(service), CTX_ALREADY);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT_EQ(ctx_service_start(service), CTX_CLOSED);
    expect_stopped(&a);
    EXPECT_EQ(times(&a, STARTS), 1);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(below_a_parent_that_is_done_it_does_not_start) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_t *parent = ctx_with_timeout(ctx_background(), 0);
    ctx_service_t *service = service_of(parent, &desc);
    EXPECT_EQ(ctx_service_start(service), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    expect_untouched(&a);
    ctx_service_free(service);
    ctx_end(parent);
    nothing_is_left();
}

TEST(bad_arguments_make_no_service) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    errno = 0;
    EXPECT(ctx_service_new(NULL, &desc) == NULL);
    EXPECT_EQ(errno, EINVAL);
}

/* -- stopping --------------------------------------------------------------------------------------------------- */

TEST(one_that_was_never_started_is_stopped_at_once) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, CTX_S(10), &report), 0);
    EXPECT_EQ(report.rc, 0);
    EXPECT(report.within_budget && report.took == 0 && report.late == 0);
    EXPECT_EQ(ctx_service_start(service), CTX_CLOSED);
    ctx_service_free(service);
    expect_untouched(&a);
    nothing_is_left();
}

TEST(a_service_without_callbacks_starts_and_stops) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_start(service), 0);
    EXPECT_EQ(ctx_service_start(service), CTX_ALREADY);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), 0);
    EXPECT(report.parts[0].name && strcmp(report.parts[0].name, "service") == 0);
    EXPECT(report.parts[0].drained_at < 0 && report.parts[0].forced_at < 0);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_second_stop_gets_the_result_of_the_first) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.drain_takes = CTX_S(2);
    a.drain_rc = -EIO;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t first, second;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &first), -EIO);
    EXPECT_EQ(ctx_service_stop(service, 0, &second), -EIO); /* its own budget does not matter any more */
    expect_stopped(&a);
    EXPECT_EQ(first.took, CTX_S(2));
    EXPECT_EQ(second.took, first.took);
    EXPECT_EQ(second.rc, first.rc);
    EXPECT_EQ(second.budget, first.budget);
    EXPECT_EQ(second.n, first.n);
    EXPECT_EQ(second.parts[0].finished_at, first.parts[0].finished_at);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(eight_stops_at_once_are_one) {
    enum { STOPPERS = 8 };
    static stopper_t s[STOPPERS];
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.drain_gate = &gate;
    a.run_rc = -EIO;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    for (int i = 0; i < STOPPERS; i++) stop_apart(&s[i], service, LONG_WAIT);
    gate_await(&gate, 1);
    for (int i = 0; i < STOPPERS; i++) until_asleep(&s[i].tid);
    for (int i = 0; i < STOPPERS; i++) EXPECT_EQ(load(&s[i].done), 0);
    gate_open(&gate);
    for (int i = 0; i < STOPPERS; i++) {
        thread_join(s[i].thread);
        EXPECT_EQ(s[i].rc, -EIO);
        EXPECT_EQ(s[i].report.rc, -EIO);
        EXPECT_EQ(s[i].report.took, s[0].report.took);
    }
    expect_stopped(&a);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

typedef struct {
    ctx_service_t *service;
    int tid, done, rc;
} starter_t;

static void *starts(void *arg) {
    starter_t *s = (starter_t *)arg;
    store(&s->tid, thread_id());
    s->rc = ctx_service_start(s->service);
    store(&s->done, 1);
    return NULL;
}

TEST(a_stop_while_it_is_starting_stops_it) {
    gate_t gate;
    gate_init(&gate);
    actor_t a = actor("a");
    a.start_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    starter_t starter = {service, 0, 0, 0};
    stopper_t s;
    pthread_t thread = thread_start(starts, &starter);
    gate_await(&gate, 1);
    EXPECT_EQ(ctx_service_start(service), CTX_ALREADY); /* it is being started */
    stop_apart(&s, service, LONG_WAIT);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&s.done), 0);
    gate_open(&gate);
    thread_join(thread);
    thread_join(s.thread);
    EXPECT(starter.rc == 0 || starter.rc == CTX_CLOSED);
    EXPECT_EQ(s.rc, 0);
    EXPECT_EQ(s.report.late, 0);
    expect_orderly(&a);
    EXPECT_EQ(ctx_service_start(service), CTX_CLOSED);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_start_that_is_stuck_does_not_hold_the_stop) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.start_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    starter_t starter = {service, 0, 0, 0};
    pthread_t thread = thread_start(starts, &starter);
    gate_await(&gate, 1);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(report.took <= CTX_MS(1100));
    EXPECT(report.late == 1 && report.parts[0].late);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(times(&a, RUNS), 0); /* too late for that */
    EXPECT_EQ(starter.rc, CTX_CLOSED);
    EXPECT_EQ(ctx_service_start(service), CTX_CLOSED);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), CTX_DEADLINE_EXCEEDED); /* there is one stop */
    ctx_service_free(service);
    EXPECT(times(&a, REFUSES) == 0 && times(&a, DRAINS) == 0);
    gate_destroy(&gate);
    nothing_is_left();
}

/* The grace period of its start counts nothing: what it made is refused and drained, and forced only after that. */
TEST(a_start_under_way_is_drained_before_it_is_forced_and_each_once) {
    gate_t starting, draining;
    gate_init(&starting);
    gate_init(&draining);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.start_gate = &starting;
    a.drain_gate = &draining;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    starter_t starter = {service, 0, 0, 0};
    stopper_t s;
    pthread_t thread = thread_start(starts, &starter);
    gate_await(&starting, 1);
    stop_apart(&s, service, CTX_S(10));
    pass(CTX_S(3));
    EXPECT(times(&a, REFUSES) == 0 && times(&a, FORCES) == 0);
    gate_open(&starting);
    thread_join(thread);
    gate_await(&draining, 1);
    EXPECT_EQ(starter.rc, CTX_CLOSED);
    EXPECT_EQ(times(&a, FORCES), 0);
    drive(&s.done);
    thread_join(s.thread);
    EXPECT_EQ(s.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT(before(&a, STARTED, &a, REFUSES));
    EXPECT(before(&a, REFUSES, &a, DRAINS));
    EXPECT(before(&a, DRAINS, &a, FORCES));
    EXPECT_EQ(a.at[FORCES], CTX_S(10));
    EXPECT(times(&a, REFUSES) == 1 && times(&a, DRAINS) == 1 && times(&a, FORCES) == 1);
    EXPECT_EQ(times(&a, RUNS), 0);
    gate_open(&draining);
    UNTIL(times(&a, DRAINED) == 1);
    ctx_service_free(service);
    gate_destroy(&starting);
    gate_destroy(&draining);
    nothing_is_left();
}

TEST(a_start_that_goes_well_after_the_stop_is_neither_drained_nor_forced) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.start_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = service_of(ctx_background(), &desc);
    starter_t starter = {service, 0, 0, 0};
    pthread_t thread = thread_start(starts, &starter);
    gate_await(&gate, 1);
    EXPECT_EQ(stop_driven(service, CTX_S(1), NULL), CTX_DEADLINE_EXCEEDED);
    gate_open(&gate);
    thread_join(thread);
    until_quiet();
    EXPECT_EQ(starter.rc, CTX_CLOSED);
    EXPECT(times(&a, REFUSES) == 0 && times(&a, DRAINS) == 0 && times(&a, FORCES) == 0 && times(&a, RUNS) == 0);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

static int waits_in_start(ctx_t *ctx, void *user) {
    add((int *)user, 1);
    return ctx_wait(ctx, CTX_FOREVER);
}

TEST(a_stop_cancels_the_context_of_start) {
    int inside = 0;
    ctx_clock_fake(T0);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.start = waits_in_start;
    desc.user = &inside;
    ctx_service_t *service = service_of(ctx_background(), &desc);
    starter_t starter = {service, 0, 0, 0};
    pthread_t thread = thread_start(starts, &starter);
    UNTIL(load(&inside) == 1);
    ctx_shutdown_report_t report;
    stop_driven(service, CTX_S(1), &report);
    thread_join(thread);
    EXPECT(starter.rc == CTX_CANCELED || starter.rc == CTX_CLOSED);
    EXPECT_EQ(report.late, 0);
    ctx_service_free(service);
    nothing_is_left();
}

/* Stops itself, which it cannot wait for. */
typedef struct {
    ctx_service_t *service;
    gate_t gate;
    int refused, rc, done; /* [atomic] */
} self_t;

static int stops_itself(ctx_t *ctx, void *user) {
    self_t *self = (self_t *)user;
    (void)ctx;
    gate_pass(&self->gate);
    store(&self->rc, ctx_service_stop(self->service, CTX_S(1), NULL));
    add(&self->done, 1);
    return 0;
}

static int returns_when_it_is_told(ctx_t *ctx, void *user) {
    (void)user;
    return ctx_wait(ctx, CTX_FOREVER);
}

static void counts_refusals(void *user) { add(&((self_t *)user)->refused, 1); }

TEST(run_may_stop_its_own_service) {
    for (int another = 0; another < 2; another++) {
        self_t self;
        memset(&self, 0, sizeof self);
        gate_init(&self.gate);
        ctx_clock_fake(T0);
        ctx_service_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.run = stops_itself;
        desc.refuse = counts_refusals;
        desc.user = &self;
        self.service = started(ctx_background(), &desc);
        gate_await(&self.gate, 1);
        gate_open(&self.gate);
        stopper_t s;
        if (another) stop_apart(&s, self.service, CTX_S(1)); /* at the same time */
        drive(&self.done);
        EXPECT(ctx_now() - T0 <= CTX_MS(1200));
        if (another) drive(&s.done);
        if (another) thread_join(s.thread);
        if (another) EXPECT_EQ(s.rc, load(&self.rc));
        EXPECT_EQ(ctx_service_stop(self.service, 0, NULL), load(&self.rc));
        EXPECT_EQ(load(&self.refused), 1);
        ctx_service_free(self.service);
        gate_destroy(&self.gate);
    }
    nothing_is_left();
}

/* Without end, so waiting for itself would be for ever. */
static int stops_itself_for_ever(ctx_t *ctx, void *user) {
    self_t *self = (self_t *)user;
    (void)ctx;
    store(&self->rc, ctx_service_stop(self->service, CTX_FOREVER, NULL));
    add(&self->done, 1);
    return 0;
}

TEST(start_and_drain_may_stop_their_own_service) {
    for (int drains = 0; drains < 2; drains++) {
        self_t self;
        memset(&self, 0, sizeof self);
        ctx_service_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.run = returns_when_it_is_told;
        if (drains)
            desc.drain = stops_itself_for_ever;
        else
            desc.start = stops_itself_for_ever;
        desc.user = &self;
        self.service = service_of(ctx_background(), &desc);
        EXPECT_EQ(ctx_service_start(self.service), drains ? 0 : CTX_CLOSED);
        EXPECT_EQ(ctx_service_stop(self.service, CTX_FOREVER, NULL), 0);
        UNTIL(load(&self.done) == 1);
        EXPECT_EQ(load(&self.rc), 0);
        ctx_service_free(self.service);
    }
    nothing_is_left();
}

TEST(run_that_has_ended_before_still_drains) {
    actor_t a = actor("a");
    a.run_ends = true;
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    wait_returned(&a);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    expect_orderly(&a);
    EXPECT(before(&a, REFUSES, &a, DRAINS));
    EXPECT_EQ(times(&a, FORCES), 0);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(the_result_is_the_first_error_of_run_or_drain) {
    for (int which = 0; which < 4; which++) { /* bit 0: run fails before the stop; bit 1: drain fails */
        actor_t a = actor("a");
        a.run_ends = true;
        if (which & 1) a.run_rc = -EIO;
        if (which & 2) a.drain_rc = -ENOSPC;
        ctx_service_desc_t desc = describe(&a);
        ctx_service_t *service = started(ctx_background(), &desc);
        wait_returned(&a);
        ctx_shutdown_report_t report;
        int expected = which & 1 ? -EIO : which & 2 ? -ENOSPC : 0;
        EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), expected);
        EXPECT_EQ(report.rc, expected);
        EXPECT(report.within_budget);
        EXPECT_EQ(report.parts[0].rc, a.run_rc ? a.run_rc : a.drain_rc);
        ctx_service_free(service);
    }
    nothing_is_left();
}

static int returns_the_err(ctx_t *ctx, void *user) {
    (void)user;
    return ctx_wait(ctx, CTX_FOREVER);
}

/* The habit of all work in this library: it returns ctx_err() when that says so. */
TEST(run_that_returns_the_err_of_its_context_has_not_failed) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.run = returns_the_err;
    ctx_service_t *service = started(ctx_background(), &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(free_without_a_stop_stops) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_free(started(ctx_background(), &desc));
    expect_orderly(&a);
    EXPECT_EQ(times(&a, RETURNED), 1);
    EXPECT_EQ(times(&a, CANCELED), 1);
    EXPECT_EQ(times(&a, FORCES), 0); /* it did not go on after the notice */
    nothing_is_left();
}

TEST(free_of_one_that_was_never_started_calls_nothing) {
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_free(service_of(ctx_background(), &desc));
    expect_untouched(&a);
    nothing_is_left();
}

TEST(free_of_null_does_nothing) { ctx_service_free(NULL); }

/* -- siblings and parents --------------------------------------------------------------------------------------- */

TEST(an_error_of_run_cancels_the_services_below_the_same_parent) {
    gate_t gate;
    gate_init(&gate);
    actor_t fails = actor("fails"), sibling = actor("sibling"), stranger = actor("stranger");
    fails.run_gate = &gate;
    fails.run_rc = -EIO;
    ctx_t *parent = ctx_with_cancel(ctx_background()), *elsewhere = ctx_with_cancel(ctx_background());
    ctx_service_desc_t desc[] = {describe(&fails), describe(&sibling), describe(&stranger)};
    ctx_service_t *a = started(parent, &desc[0]), *b = started(parent, &desc[1]), *c = started(elsewhere, &desc[2]);
    EXPECT_EQ(times(&sibling, CANCELED), 0);
    gate_open(&gate);
    wait_returned(&sibling);
    EXPECT_EQ(sibling.cause.code, -EIO);
    EXPECT(sibling.cause.what != NULL);
    EXPECT_EQ(ctx_err(parent), 0);
    EXPECT_EQ(times(&stranger, CANCELED), 0);
    EXPECT_EQ(ctx_service_stop(a, LONG_WAIT, NULL), -EIO);
    EXPECT_EQ(ctx_service_stop(b, LONG_WAIT, NULL), 0);
    EXPECT_EQ(ctx_service_stop(c, LONG_WAIT, NULL), 0);
    expect_stopped(&stranger);
    ctx_service_free(a);
    ctx_service_free(b);
    ctx_service_free(c);
    ctx_end(parent);
    ctx_end(elsewhere);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(an_error_of_run_at_once_cancels_the_siblings_too) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    for (int i = 0, rounds = TEST_QUICK ? 200 : 2000; i < rounds; i++) {
        actor_t fails = actor("fails"), sibling = actor("sibling");
        fails.run_ends = true;
        fails.run_rc = -EIO;
        ctx_service_desc_t desc[] = {describe(&fails), describe(&sibling)};
        ctx_service_t *b = service_of(parent, &desc[1]), *a = service_of(parent, &desc[0]);
        CHECK_EQ(ctx_service_start(b), 0);
        CHECK_EQ(ctx_service_start(a), 0);
        int64_t end = test_now_ns() + CTX_S(10);
        while (!times(&sibling, RETURNED) && test_now_ns() < end) sched_yield();
        EXPECT_EQ(times(&sibling, CANCELED), 1);
        ctx_service_free(a);
        ctx_service_free(b);
        CHECK_EQ(times(&sibling, RETURNED), 1);
        EXPECT_EQ(sibling.cause.code, -EIO);
        if (sibling.cause.code != -EIO) break;
    }
    ctx_end(parent);
    nothing_is_left();
}

TEST(services_below_the_background_are_siblings_too) {
    gate_t gate;
    gate_init(&gate);
    actor_t fails = actor("fails"), sibling = actor("sibling");
    fails.run_gate = &gate;
    fails.run_rc = -EIO;
    ctx_service_desc_t desc[] = {describe(&fails), describe(&sibling)};
    ctx_service_t *a = started(ctx_background(), &desc[0]), *b = started(ctx_background(), &desc[1]);
    gate_open(&gate);
    wait_returned(&sibling);
    EXPECT_EQ(sibling.cause.code, -EIO);
    ctx_service_free(a);
    ctx_service_free(b);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(run_that_returns_0_leaves_its_siblings_alone) {
    ctx_clock_fake(T0);
    actor_t ends = actor("ends"), sibling = actor("sibling");
    ends.run_ends = true;
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_service_desc_t desc[] = {describe(&sibling), describe(&ends)};
    ctx_service_t *a = started(parent, &desc[0]), *b = started(parent, &desc[1]);
    wait_returned(&ends);
    pass(CTX_S(1));
    EXPECT_EQ(times(&sibling, CANCELED), 0);
    EXPECT_EQ(ctx_service_stop(b, CTX_S(1), NULL), 0);
    EXPECT_EQ(times(&sibling, CANCELED), 0);
    EXPECT_EQ(ctx_service_stop(a, CTX_S(1), NULL), 0);
    expect_stopped(&sibling);
    ctx_service_free(a);
    ctx_service_free(b);
    ctx_end(parent);
    nothing_is_left();
}

TEST(a_stop_leaves_the_siblings_alone) {
    gate_t gate;
    gate_init(&gate);
    actor_t stopped = actor("stopped"), sibling = actor("sibling");
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_service_desc_t desc[] = {describe(&stopped), describe(&sibling)};
    ctx_service_t *a = started(parent, &desc[0]), *b = started(parent, &desc[1]);
    EXPECT_EQ(ctx_service_stop(a, LONG_WAIT, NULL), 0);
    ctx_service_free(a);
    until_quiet();
    EXPECT_EQ(times(&sibling, CANCELED), 0);
    EXPECT_EQ(ctx_service_stop(b, LONG_WAIT, NULL), 0);
    ctx_service_free(b);
    ctx_end(parent);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(when_the_parent_is_done_so_is_the_context_of_run) {
    actor_t a = actor("a");
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(parent, &desc);
    ctx_cancel_cause(parent, -EPERM, "over");
    EXPECT_EQ(times(&a, CANCELED), 1);
    wait_returned(&a);
    EXPECT_EQ(a.cause.code, -EPERM);
    EXPECT(a.cause.what && strcmp(a.cause.what, "over") == 0);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT(before(&a, REFUSES, &a, DRAINS));
    EXPECT_EQ(a.drain_err, 0); /* what was accepted may still be finished */
    expect_orderly(&a);
    ctx_service_free(service);
    ctx_end(parent);
    nothing_is_left();
}

TEST(the_deadline_of_the_parent_is_that_of_run) {
    actor_t a = actor("a");
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(3600));
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(parent, &desc);
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
    EXPECT_EQ(a.run_deadline, ctx_deadline(parent));
    ctx_service_free(service);
    ctx_end(parent);
    nothing_is_left();
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

typedef struct {
    ctx_t *parent;
    ctx_service_t *service;
    start_line_t line;
    int rc[4];
} crowd_t;

static void *in_the_crowd(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    uint64_t seed = (uint64_t)(uintptr_t)side + (uint64_t)ctx_now();
    start_line(&crowd->line);
    race_dither(race_random(&seed));
    if (side->id == 0) crowd->rc[0] = ctx_service_start(crowd->service);
    if (side->id == 1 || side->id == 2) crowd->rc[side->id] = ctx_service_stop(crowd->service, LONG_WAIT, NULL);
    if (side->id == 3) ctx_cancel(crowd->parent);
    return NULL;
}

TEST(start_stop_stop_and_the_cancel_of_the_parent_may_race) {
    for (int i = 0, rounds = test_scale(400); i < rounds; i++) {
        static actor_t a;
        crowd_t crowd;
        memset(&crowd, 0, sizeof crowd);
        a = actor("a");
        ctx_service_desc_t desc = describe(&a);
        crowd.parent = ctx_with_cancel(ctx_background());
        crowd.service = service_of(crowd.parent, &desc);
        start_line_init(&crowd.line, 4);
        race_run(4, in_the_crowd, &crowd);
        EXPECT(crowd.rc[0] == 0 || crowd.rc[0] == CTX_CLOSED || crowd.rc[0] == CTX_CANCELED);
        EXPECT_EQ(crowd.rc[1], crowd.rc[2]);
        EXPECT_EQ(crowd.rc[1], 0);
        ctx_service_free(crowd.service);
        expect_orderly(&a);
        if (crowd.rc[0] == 0) EXPECT_EQ(times(&a, STARTED), 1);
        ctx_end(crowd.parent);
    }
    nothing_is_left();
}

/* -- the report ------------------------------------------------------------------------------------------------- */

TEST(the_report_says_when_what_happened) {
    ctx_clock_fake(T0);
    actor_t a = actor("clock");
    a.drain_takes = CTX_MS(300);
    a.run_lingers = CTX_MS(200);
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(500);
    ctx_service_t *service = started(ctx_background(), &desc);
    pass(CTX_S(5)); /* times count from the stop */
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0);
    const ctx_shutdown_part_t *part = &report.parts[0];
    EXPECT(report.cause != NULL);
    EXPECT_EQ(report.rc, 0);
    EXPECT_EQ(report.budget, CTX_S(10));
    EXPECT_EQ(report.took, CTX_MS(500));
    EXPECT(report.within_budget && !report.forced);
    EXPECT_EQ(report.lame_duck, 0);
    EXPECT(report.total == 1 && report.n == 1 && report.late == 0 && report.dropped == 0);
    EXPECT(strcmp(part->name, "clock") == 0);
    EXPECT_EQ(part->began_at, 0);
    EXPECT_EQ(part->noticed_at, 0);
    EXPECT_EQ(part->drained_at, CTX_MS(300));
    EXPECT_EQ(part->canceled_at, CTX_MS(300));
    EXPECT(part->forced_at < 0);
    EXPECT_EQ(part->finished_at, CTX_MS(500));
    EXPECT(part->rc == 0 && part->dropped == 0 && part->stuck == 0 && !part->late);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_clock_that_shows_0_is_a_clock) {
    ctx_clock_fake(0);
    actor_t a = actor("a");
    ctx_service_desc_t desc = describe(&a);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), 0);
    EXPECT_EQ(report.parts[0].began_at, 0);
    EXPECT_EQ(report.parts[0].noticed_at, 0);
    EXPECT_EQ(report.parts[0].drained_at, 0);
    EXPECT_EQ(report.parts[0].canceled_at, 0);
    EXPECT_EQ(report.parts[0].finished_at, 0);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(what_did_not_happen_is_negative_in_the_report) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.run_lingers = CTX_MS(100);
    a.run_rc = -EIO;
    ctx_service_desc_t desc = describe(&a);
    desc.refuse = NULL;
    desc.drain = NULL;
    desc.force = NULL;
    desc.grace = CTX_S(1);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(10), &report), -EIO);
    EXPECT(report.parts[0].drained_at < 0 && report.parts[0].forced_at < 0);
    EXPECT_EQ(report.parts[0].canceled_at, 0);
    EXPECT_EQ(report.parts[0].noticed_at, CTX_MS(100)); /* nothing of it reacted before */
    EXPECT_EQ(report.parts[0].finished_at, CTX_MS(100));
    EXPECT_EQ(report.parts[0].rc, -EIO);
    ctx_service_free(service);
    nothing_is_left();
}

TEST(a_report_with_a_late_part_says_so_after_the_budget) {
    ctx_clock_fake(T0);
    actor_t a = actor("a");
    a.run_lingers = CTX_MS(1050); /* ends after the budget, but before the stop must return */
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(200);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(stop_driven(service, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(!report.within_budget);
    EXPECT(report.took <= CTX_MS(1200));
    drive(&a.n[RETURNED]);
    ctx_service_free(service);
    nothing_is_left();
}

/* -- dropped work ----------------------------------------------------------------------------------------------- */

typedef struct {
    ctx_pool_t *pool;
    ctx_batch_t *batch;
    gate_t gate;
    uint64_t says; /* what the callbacks tell by themselves */
} cargo_t;

static int stands_at_the_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

/* A pool whose worker is stuck, and three tasks that wait for it. */
static ctx_pool_t *blocked_pool(gate_t *gate) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = 1;
    desc.grace = -1;
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
    if (!pool) abort();
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "stuck", stands_at_the_gate, gate), 0);
    gate_await(gate, 1);
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", stands_at_the_gate, gate), 0);
    return pool;
}

static int drains_a_pool(ctx_t *ctx, void *user) {
    (void)ctx;
    ctx_pool_drain(((cargo_t *)user)->pool, 0, NULL);
    return 0;
}

TEST(what_a_drained_pool_drops_and_leaves_running_is_in_the_report) {
    cargo_t cargo;
    memset(&cargo, 0, sizeof cargo);
    gate_init(&cargo.gate);
    cargo.pool = blocked_pool(&cargo.gate);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = drains_a_pool;
    desc.user = &cargo;
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.dropped, 3);
    EXPECT_EQ(report.parts[0].dropped, 3);
    EXPECT_EQ(report.parts[0].stuck, 1);
    EXPECT_EQ(report.stuck, 1);
    EXPECT(!report.within_budget); /* though the service itself has stopped */
    EXPECT_EQ(report.late, 0);
    gate_open(&cargo.gate);
    ctx_pool_free(cargo.pool);
    ctx_service_free(service);
    gate_destroy(&cargo.gate);
    nothing_is_left();
}

static int never_flushes(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)ctx;
    (void)items;
    (void)n;
    (void)user;
    return -EIO;
}

static int closes_a_batcher(ctx_t *ctx, void *user) {
    (void)ctx;
    batch_close(((cargo_t *)user)->batch, LONG_WAIT);
    return 0;
}

TEST(what_a_closed_batcher_drops_is_in_the_report) {
    cargo_t cargo;
    memset(&cargo, 0, sizeof cargo);
    ctx_batch_desc_t batch;
    memset(&batch, 0, sizeof batch);
    batch.item_size = sizeof(int);
    batch.flush = never_flushes;
    cargo.batch = ctx_batch_new(ctx_background(), &batch);
    if (!cargo.batch) abort();
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_batch_add(cargo.batch, &i), 0);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = closes_a_batcher;
    desc.user = &cargo;
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.dropped, 5);
    EXPECT_EQ(report.parts[0].dropped, 5);
    ctx_service_free(service);
    nothing_is_left();
}

static int flush_at_the_gate(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)ctx;
    (void)items;
    (void)n;
    gate_pass(&((cargo_t *)user)->gate);
    return 0;
}

/* A second drain while the flush is still stuck tells nothing new. */
static int drains_a_batcher(ctx_t *ctx, void *user) {
    (void)ctx;
    EXPECT_EQ(ctx_batch_drain(((cargo_t *)user)->batch, 0, NULL), CTX_DEADLINE_EXCEEDED);
    ctx_batch_drain(((cargo_t *)user)->batch, 0, NULL);
    return 0;
}

TEST(what_a_stuck_flush_has_is_in_the_report) {
    cargo_t cargo;
    memset(&cargo, 0, sizeof cargo);
    gate_init(&cargo.gate);
    ctx_batch_desc_t batch;
    memset(&batch, 0, sizeof batch);
    batch.item_size = sizeof(int);
    batch.max_items = 4;
    batch.flush = flush_at_the_gate;
    batch.user = &cargo;
    batch.grace = -1;
    cargo.batch = ctx_batch_new(ctx_background(), &batch);
    if (!cargo.batch) abort();
    for (int i = 0; i < 4; i++) EXPECT_EQ(ctx_batch_add(cargo.batch, &i), 0);
    gate_await(&cargo.gate, 1);
    int last = 4;
    EXPECT_EQ(ctx_batch_add(cargo.batch, &last), 0);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = drains_a_batcher;
    desc.user = &cargo;
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.stuck, 4);
    EXPECT_EQ(report.parts[0].stuck, 4);
    EXPECT_EQ(report.dropped, 1);
    EXPECT(!report.within_budget);
    gate_open(&cargo.gate);
    ctx_batch_free(cargo.batch);
    ctx_service_free(service);
    gate_destroy(&cargo.gate);
    nothing_is_left();
}

static int drains_the_pool_as_cleanup(ctx_t *ctx, void *arg) {
    (void)ctx;
    ctx_pool_drain(((cargo_t *)arg)->pool, 0, NULL);
    return 0;
}

TEST(what_a_cleanup_leaves_running_is_in_the_report) {
    cargo_t cargo;
    memset(&cargo, 0, sizeof cargo);
    gate_init(&cargo.gate);
    cargo.pool = blocked_pool(&cargo.gate);
    ctx_cleanup_t cleanup = {0};
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.fn = drains_the_pool_as_cleanup;
    desc.arg = &cargo;
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.stuck, 1);
    EXPECT(!report.within_budget);
    gate_open(&cargo.gate);
    ctx_pool_free(cargo.pool);
    gate_destroy(&cargo.gate);
    nothing_is_left();
}

static int drops_in_run(ctx_t *ctx, void *user) {
    (void)user;
    ctx_wait(ctx, CTX_FOREVER);
    ctx_shutdown_dropped(1);
    return 0;
}
static void drops_in_refuse(void *user) {
    (void)user;
    ctx_shutdown_dropped(20);
}
static int drops_in_drain(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    ctx_shutdown_dropped(100);
    ctx_shutdown_dropped(200);
    return 0;
}

TEST(each_callback_may_say_what_it_dropped) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.run = drops_in_run;
    desc.refuse = drops_in_refuse;
    desc.drain = drops_in_drain;
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_shutdown_dropped(5000); /* here it does nothing */
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.parts[0].dropped, 321);
    EXPECT_EQ(report.dropped, 321);
    ctx_service_free(service);
    nothing_is_left();
}

static int drops_in_the_background(ctx_t *ctx, void *arg) {
    (void)ctx;
    ctx_shutdown_dropped(1000);
    store((int *)arg, 1);
    return 0;
}

static int stops_another(ctx_t *ctx, void *user) {
    (void)ctx;
    ctx_shutdown_dropped(1);
    ctx_service_t *inner = (ctx_service_t *)user;
    EXPECT_EQ(ctx_service_stop(inner, LONG_WAIT, NULL), 0);
    ctx_shutdown_dropped(2);
    return 0;
}

/* A thread is not in the callback for which it worked before. */
TEST(what_is_dropped_elsewhere_does_not_count) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = drops_in_drain;
    ctx_service_t *inner = started(ctx_background(), &desc);
    desc.drain = stops_another;
    desc.user = inner;
    ctx_service_t *outer = started(ctx_background(), &desc);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(outer, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.dropped, 3);
    int done = 0;
    EXPECT_EQ(ctx_go(ctx_background(), "elsewhere", drops_in_the_background, &done), 0);
    UNTIL(load(&done));
    EXPECT_EQ(ctx_service_stop(outer, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.dropped, 3);
    EXPECT_EQ(ctx_service_stop(inner, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.dropped, 300);
    ctx_service_free(outer);
    ctx_service_free(inner);
    nothing_is_left();
}

TEST_MAIN
