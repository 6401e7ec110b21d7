/* Section 14 when memory and threads cannot be had: starting may fail, stopping does not. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "services.h"

#define LONG_WAIT CTX_S(60)

enum { N = 3 };

static void nothing_is_left(void) { UNTIL((ctx_runtime_stop(), fault_live() == 0)); }

/* Let idle threads end, so that each new one is a creation which can fail. */
static void fresh(void) { nothing_is_left(); }

static void all_supplies_end(void) {
    fault_all_after(0);
    fault_threads_all_after(0);
}

static void supplies_are_back(void) {
    fault_off();
    fault_threads_off();
}

/* The nth allocation (`threads` 0) or thread (1) fails. */
static void fail_the(int n, int threads) {
    if (threads)
        fault_threads_after(n);
    else
        fault_after(n);
}

static bool was_failed(int threads) { return threads ? fault_threads_off() : fault_off(); }

/* -- one service ------------------------------------------------------------------------------------------------ */

TEST(a_service_that_cannot_be_had_is_an_error_and_is_never_half_started) {
    for (int threads = 0; threads < 2; threads++) {
        int failures = 0;
        for (int n = 0; n < 100; n++) {
            actor_t a = actor("a");
            ctx_service_desc_t desc = describe(&a);
            fresh();
            fail_the(n, threads);
            errno = 0;
            ctx_service_t *service = ctx_service_new(ctx_background(), &desc);
            if (!service) EXPECT_EQ(errno, ENOMEM);
            int rc = service ? ctx_service_start(service) : CTX_NO_MEMORY;
            bool failed = was_failed(threads);
            EXPECT(rc == 0 || (failed && rc == CTX_NO_MEMORY));
            if (rc) EXPECT_EQ(times(&a, STARTS), 0); /* else there would be nobody to undo what it did */
            if (rc) failures++;
            if (rc && service) EXPECT_EQ(ctx_service_start(service), 0); /* nothing of the failure stays */
            if (service) UNTIL(times(&a, RUNS) == 1);
            if (service) EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, NULL), 0);
            if (service) expect_stopped(&a);
            ctx_service_free(service);
            nothing_is_left();
            if (!failed) break;
        }
        EXPECT(failures > 0);
    }
}

TEST(a_stop_needs_neither_memory_nor_threads) {
    actor_t all[N];
    ctx_service_t *service[N];
    fresh();
    for (int i = 0; i < N; i++) {
        all[i] = actor("a");
        ctx_service_desc_t desc = describe(&all[i]);
        service[i] = started(ctx_background(), &desc);
    }
    all_supplies_end();
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service[0], LONG_WAIT, &report), 0);
    EXPECT_EQ(report.late, 0);
    EXPECT_EQ(ctx_service_stop(service[1], CTX_FOREVER, NULL), 0);
    ctx_service_free(service[2]);
    supplies_are_back();
    expect_stopped(&all[0]);
    expect_stopped(&all[1]);
    expect_orderly(&all[2]);
    EXPECT_EQ(times(&all[2], RETURNED), 1);
    ctx_service_free(service[0]);
    ctx_service_free(service[1]);
    nothing_is_left();
}

TEST(force_needs_neither_memory_nor_threads) {
    gate_t gate;
    gate_init(&gate);
    fresh();
    actor_t a = actor("a");
    a.run_gate = a.force_opens = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(1);
    ctx_service_t *service = started(ctx_background(), &desc);
    all_supplies_end();
    EXPECT_EQ(ctx_service_stop(service, CTX_S(5), NULL), 0);
    supplies_are_back();
    EXPECT_EQ(times(&a, FORCES), 1);
    gate_open(&gate);
    UNTIL(times(&a, RETURNED) == 1);
    ctx_service_free(service);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_stuck_run_does_not_hold_a_stop_without_supplies) {
    gate_t gate;
    gate_init(&gate);
    fresh();
    actor_t a = actor("a");
    a.run_gate = &gate;
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(20);
    ctx_service_t *service = started(ctx_background(), &desc);
    all_supplies_end();
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_service_stop(service, CTX_MS(100), NULL), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT_EQ(times(&a, FORCES), 1);
    ctx_service_free(service);
    supplies_are_back();
    gate_open(&gate);
    UNTIL(times(&a, RETURNED) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

/* Nobody but the thread that was there before runs them, and one of them stands still. */
TEST(a_stuck_drain_does_not_hold_a_stop_without_supplies) {
    gate_t gate;
    gate_init(&gate);
    fresh();
    actor_t a = actor("a");
    a.drain_gate = a.run_gate = &gate; /* whose thread would serve too */
    ctx_service_desc_t desc = describe(&a);
    desc.grace = CTX_MS(20);
    ctx_service_t *service = started(ctx_background(), &desc);
    all_supplies_end();
    ctx_shutdown_report_t report;
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_service_stop(service, CTX_MS(100), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT_EQ(report.late, 1);
    EXPECT(times(&a, DRAINS) == 1 && times(&a, FORCES) == 0); /* that is behind the drain */
    gate_open(&gate);
    UNTIL(times(&a, FORCES) == 1);
    EXPECT(before(&a, DRAINED, &a, FORCES));
    UNTIL(times(&a, RETURNED) == 1);
    ctx_service_free(service);
    supplies_are_back();
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(refuse_and_drain_do_not_begin_after_force) {
    gate_t gate;
    gate_init(&gate);
    fresh();
    actor_t stuck = actor("stuck"), behind = actor("behind");
    stuck.drain_gate = stuck.run_gate = behind.run_gate = &gate; /* whose threads would serve too */
    ctx_service_desc_t desc[] = {describe(&stuck), describe(&behind)};
    ctx_service_t *first = started(ctx_background(), &desc[0]), *second = started(ctx_background(), &desc[1]);
    all_supplies_end();
    EXPECT_EQ(ctx_service_stop(first, CTX_MS(20), NULL), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_service_stop(second, CTX_MS(20), NULL), CTX_DEADLINE_EXCEEDED);
    EXPECT(times(&behind, REFUSES) == 0 && times(&behind, FORCES) == 0); /* behind the other's drain */
    gate_open(&gate);
    UNTIL(times(&behind, FORCES) == 1 && times(&behind, RETURNED) == 1 && times(&stuck, RETURNED) == 1);
    EXPECT(times(&behind, REFUSES) == 0 && times(&behind, DRAINS) == 0);
    ctx_service_free(first);
    ctx_service_free(second);
    supplies_are_back();
    gate_destroy(&gate);
    nothing_is_left();
}

static int waits_for_the_end(ctx_t *ctx, void *user) {
    (void)user;
    return ctx_wait(ctx, CTX_FOREVER);
}

/* The thread that fires deadlines cannot be had either. */
TEST(a_drain_that_waits_ends_at_its_deadline_without_supplies) {
    fresh();
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = waits_for_the_end;
    desc.drain_budget = CTX_MS(20);
    ctx_service_t *service = started(ctx_background(), &desc);
    ctx_runtime_stop();
    all_supplies_end();
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_service_stop(service, LONG_WAIT, &report), CTX_DEADLINE_EXCEEDED); /* what the drain returned */
    EXPECT(report.late == 0 && report.within_budget);
    supplies_are_back();
    ctx_service_free(service);
    nothing_is_left();
}

/* -- apps ------------------------------------------------------------------------------------------------------- */

/* An app of three, made and run on a thread that was there before the supplies ended. */
typedef struct {
    ctx_t *parent;
    gate_t gate;
    actor_t all[N];
    ctx_shutdown_report_t report;
    int rc, done;
    pthread_t thread;
} runner_t;

static const char *const after_a[] = {"a", NULL};

static bool is_default(int sig) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigaction(sig, NULL, &action);
    return action.sa_handler == SIG_DFL;
}

static ctx_app_t *app_of(ctx_t *parent, actor_t *all) {
    ctx_app_t *app = ctx_app_new(parent);
    if (!app) EXPECT_EQ(errno, ENOMEM);
    for (int i = 0; app && i < N; i++) {
        ctx_service_desc_t desc = describe(&all[i]);
        desc.needs = i ? after_a : NULL;
        int rc = ctx_app_add(app, &desc);
        EXPECT(rc == 0 || rc == CTX_NO_MEMORY);
        if (rc) EXPECT_EQ(ctx_app_add(app, &desc), 0); /* only one fails */
    }
    return app;
}

static void *runs_the_app(void *arg) {
    runner_t *runner = (runner_t *)arg;
    ctx_app_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.report = &runner->report;
    gate_pass(&runner->gate);
    ctx_app_t *app = app_of(runner->parent, runner->all);
    runner->rc = app ? ctx_app_run(app, &desc) : CTX_NO_MEMORY;
    store(&runner->done, 1);
    return NULL;
}

static void run_apart(runner_t *runner) {
    static const char *const names[N] = {"a", "b", "c"};
    memset(runner, 0, sizeof *runner);
    for (int i = 0; i < N; i++) runner->all[i] = actor(names[i]);
    fresh();
    runner->parent = ctx_with_cancel(ctx_background());
    gate_init(&runner->gate);
    runner->thread = thread_start(runs_the_app, runner);
    gate_await(&runner->gate, 1);
}

static bool all_run(const runner_t *runner) {
    for (int i = 0; i < N; i++)
        if (!times(&runner->all[i], RUNS)) return false;
    return true;
}

static void end_runner(runner_t *runner) {
    thread_join(runner->thread);
    gate_destroy(&runner->gate);
    EXPECT(is_default(SIGTERM) && is_default(SIGINT));
    ctx_end(runner->parent);
    nothing_is_left();
}

TEST(an_app_that_cannot_start_stops_what_it_has_started) {
    for (int threads = 0; threads < 2; threads++) {
        int failures = 0;
        bool failed = true;
        for (int n = 0; failed && n < 200; n++) {
            static runner_t runner;
            run_apart(&runner);
            fail_the(n, threads);
            gate_open(&runner.gate);
            UNTIL(all_run(&runner) || load(&runner.done));
            ctx_cancel(runner.parent);
            UNTIL(load(&runner.done));
            failed = was_failed(threads);
            EXPECT(runner.rc == 0 || (failed && (runner.rc == CTX_NO_MEMORY || runner.rc == -EAGAIN)));
            for (int i = 0; i < N; i++) {
                const actor_t *a = &runner.all[i];
                expect_orderly(a);
                EXPECT_EQ(times(a, STARTS), times(a, RUNS));
                EXPECT_EQ(times(a, STARTS), times(a, DRAINS));
            }
            if (runner.rc) failures++;
            end_runner(&runner);
        }
        EXPECT(failures > 0);
    }
}

TEST(the_shutdown_of_an_app_needs_neither_memory_nor_threads) {
    static runner_t runner;
    run_apart(&runner);
    gate_open(&runner.gate);
    UNTIL(all_run(&runner));
    until_quiet(); /* it waits for its signal now */
    all_supplies_end();
    raise(SIGTERM);
    UNTIL(load(&runner.done));
    supplies_are_back();
    EXPECT_EQ(runner.rc, 0);
    EXPECT(runner.report.within_budget && runner.report.late == 0);
    for (int i = 0; i < N; i++) expect_stopped(&runner.all[i]);
    for (int i = 1; i < N; i++) EXPECT(before(&runner.all[i], RETURNED, &runner.all[0], REFUSES));
    end_runner(&runner);
}

/* -- cleanups --------------------------------------------------------------------------------------------------- */

static int counts(ctx_t *ctx, void *arg) {
    EXPECT_EQ(ctx_err(ctx), 0);
    add((int *)arg, 1);
    return 0;
}

static int counts_whatever_its_context(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 0;
}

static int add_count(ctx_cleanup_t *cleanup, int *count, bool critical) {
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.fn = counts;
    desc.arg = count;
    desc.critical = critical;
    return ctx_cleanup_add(cleanup, &desc);
}

TEST(a_cleanup_that_was_added_runs_once_whatever_fails) {
    for (int threads = 0; threads < 2; threads++) {
        for (int n = 0; n < 100; n++) {
            int runs[4] = {0, 0, 0, 0}, added[4];
            ctx_cleanup_t cleanup = {0};
            fresh();
            fail_the(n, threads);
            for (int i = 0; i < 4; i++) {
                int rc = add_count(&cleanup, &runs[i], i % 2 != 0);
                EXPECT(rc == 0 || rc == CTX_NO_MEMORY);
                added[i] = rc == 0;
            }
            EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, NULL), 0);
            for (int i = 0; i < 4; i++) EXPECT_EQ(load(&runs[i]), added[i]);
            bool failed = was_failed(threads);
            nothing_is_left();
            if (!failed) break;
        }
    }
}

typedef struct {
    gate_t gate;
    int ended, lates; /* [atomic] */
} stuck_cleanup_t;

static int stands_still(ctx_t *ctx, void *arg) {
    stuck_cleanup_t *stuck = (stuck_cleanup_t *)arg;
    (void)ctx;
    gate_pass(&stuck->gate);
    add(&stuck->ended, 1);
    return 0;
}

static void counts_lates(const char *name, int rc, ctx_dur_t took, void *arg) {
    (void)name;
    (void)rc;
    (void)took;
    add(&((stuck_cleanup_t *)arg)->lates, 1);
}

TEST(a_stuck_cleanup_does_not_hold_a_run_without_supplies) {
    stuck_cleanup_t stuck;
    int behind = 0;
    memset(&stuck, 0, sizeof stuck);
    gate_init(&stuck.gate);
    ctx_cleanup_t cleanup = {0};
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.fn = stands_still;
    desc.arg = &stuck;
    desc.critical = true;
    desc.on_late = counts_lates;
    fresh();
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), 0);
    desc.fn = counts_whatever_its_context;
    desc.arg = &behind;
    desc.critical = false;
    desc.on_late = NULL;
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), 0);
    all_supplies_end();
    ctx_shutdown_report_t report;
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_cleanup_run(&cleanup, CTX_MS(50), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT_EQ(report.late, 2);
    EXPECT_EQ(load(&behind), 0);
    gate_open(&stuck.gate);
    UNTIL(load(&stuck.lates) == 1 && load(&behind) == 1); /* each runs all the same, and once */
    EXPECT_EQ(load(&stuck.ended), 1);
    supplies_are_back();
    gate_destroy(&stuck.gate);
    nothing_is_left();
}

TEST(cleanups_run_without_memory_and_threads) {
    enum { MANY = 20 };
    int runs[MANY];
    ctx_cleanup_t cleanup = {0};
    fresh();
    for (int i = 0; i < MANY; i++) {
        runs[i] = 0;
        EXPECT_EQ(add_count(&cleanup, &runs[i], i % 3 == 0), 0);
    }
    all_supplies_end();
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, &report), 0);
    supplies_are_back();
    EXPECT_EQ(report.late, 0);
    for (int i = 0; i < MANY; i++) EXPECT_EQ(load(&runs[i]), 1);
    nothing_is_left();
}

TEST_MAIN
