/* Section 14: cleanups: the critical ones first, none waited for longer than the budget, each run once. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"
#include "services.h"

/* Only a broken promise takes this long. */
#define LONG_WAIT CTX_S(60)

/* -- what the tests share --------------------------------------------------------------------------------------- */

static void nothing_is_left(void) {
    ctx_clock_real();
    UNTIL((ctx_runtime_stop(), blocks_live() == 0));
}

/* One cleanup: a script and what happened. */
typedef struct job {
    gate_t *gate;    /* it stands here, whatever its context says */
    ctx_dur_t takes; /* how long it takes unless its context ends before */
    int rc;
    bool gives_err;      /* it returns the err of its context instead */
    ctx_cleanup_t *adds; /* it adds `added` here */
    struct job *added;

    int began, ended; /* [atomic] how often */
    int begin_place, end_place;
    ctx_time_t began_at, ended_at; /* since T0 */
    ctx_time_t deadline;
    int err_before, err_after;
    pthread_t thread;
    int lates; /* [atomic] calls of on_late */
    const char *late_name;
    int late_rc;
    ctx_dur_t late_took;
    bool late_thread_is_that_of_fn;
} job_t;

static int job_events; /* [atomic] */

static int does_the_job(ctx_t *ctx, void *arg);

static job_t job(void) {
    job_t j;
    memset(&j, 0, sizeof j);
    return j;
}

static void notes_late(const char *name, int rc, ctx_dur_t took, void *arg) {
    job_t *j = (job_t *)arg;
    j->late_name = name;
    j->late_rc = rc;
    j->late_took = took;
    j->late_thread_is_that_of_fn = pthread_equal(j->thread, pthread_self()) != 0;
    add(&j->lates, 1);
}

static ctx_cleanup_desc_t describe_job(job_t *j, const char *name, bool critical) {
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = name;
    desc.fn = does_the_job;
    desc.arg = j;
    desc.critical = critical;
    desc.on_late = notes_late;
    return desc;
}

static void add_job(ctx_cleanup_t *cleanup, job_t *j, const char *name, bool critical, ctx_dur_t deadline) {
    ctx_cleanup_desc_t desc = describe_job(j, name, critical);
    desc.timeout = deadline;
    EXPECT_EQ(ctx_cleanup_add(cleanup, &desc), 0);
}

static int does_the_job(ctx_t *ctx, void *arg) {
    job_t *j = (job_t *)arg;
    j->began_at = ctx_now() - T0;
    j->begin_place = add(&job_events, 1);
    j->deadline = ctx_deadline(ctx);
    j->err_before = ctx_err(ctx);
    j->thread = pthread_self();
    add(&j->began, 1);
    if (j->adds) add_job(j->adds, j->added, "added", true, 0);
    if (j->gate) gate_pass(j->gate);
    if (j->takes) ctx_sleep(ctx, j->takes);
    j->err_after = ctx_err(ctx);
    j->ended_at = ctx_now() - T0;
    j->end_place = add(&job_events, 1);
    int rc = j->gives_err ? j->err_after : j->rc;
    add(&j->ended, 1);
    return rc;
}

/* ctx_cleanup_run() on a thread of its own. */
typedef struct {
    ctx_cleanup_t *cleanup;
    ctx_dur_t budget;
    ctx_shutdown_report_t report;
    int rc, done;
    pthread_t thread;
} cleaner_t;

static void *cleans(void *arg) {
    cleaner_t *c = (cleaner_t *)arg;
    c->rc = ctx_cleanup_run(c->cleanup, c->budget, &c->report);
    store(&c->done, 1);
    return NULL;
}

static void clean_apart(cleaner_t *c, ctx_cleanup_t *cleanup, ctx_dur_t budget) {
    memset(c, 0, sizeof *c);
    c->cleanup = cleanup;
    c->budget = budget;
    c->thread = thread_start(cleans, c);
}

static int cleaned(cleaner_t *c) {
    drive(&c->done);
    thread_join(c->thread);
    EXPECT_EQ(c->rc, c->report.rc);
    return c->rc;
}

static int clean_driven(ctx_cleanup_t *cleanup, ctx_dur_t budget, ctx_shutdown_report_t *report) {
    cleaner_t c;
    clean_apart(&c, cleanup, budget);
    int rc = cleaned(&c);
    if (report) *report = c.report;
    return rc;
}

static const ctx_shutdown_part_t *part_of(const ctx_shutdown_report_t *report, const char *name) {
    static ctx_shutdown_part_t none;
    for (size_t i = 0; i < report->n; i++)
        if (strcmp(report->parts[i].name, name) == 0) return &report->parts[i];
    test_fail(__FILE__, __LINE__, "no part of this name");
    return &none;
}

/* -- order ------------------------------------------------------------------------------------------------------ */

TEST(the_critical_ones_run_first_and_side_by_side_and_the_others_after_them_side_by_side) {
    enum { N = 5 };
    gate_t first, second;
    gate_init(&first);
    gate_init(&second);
    job_t critical[N], other[N];
    ctx_cleanup_t cleanup = {0};
    for (int i = 0; i < N; i++) { /* mixed, whatever the order in which they were added */
        critical[i] = other[i] = job();
        critical[i].gate = &first;
        other[i].gate = &second;
        add_job(&cleanup, &other[i], "other", false, 0);
        add_job(&cleanup, &critical[i], "critical", true, 0);
    }
    cleaner_t c;
    clean_apart(&c, &cleanup, LONG_WAIT);
    gate_await(&first, N); /* all are inside: one after the other would hang here */
    until_quiet();
    EXPECT_EQ(gate_came(&second), 0);
    gate_open(&first);
    gate_await(&second, N);
    EXPECT_EQ(load(&c.done), 0);
    gate_open(&second);
    thread_join(c.thread);
    EXPECT_EQ(c.rc, 0);
    for (int i = 0; i < N; i++) {
        EXPECT(load(&critical[i].ended) == 1 && load(&other[i].ended) == 1);
        for (int k = 0; k < N; k++) EXPECT(critical[i].end_place < other[k].begin_place);
    }
    gate_destroy(&first);
    gate_destroy(&second);
    nothing_is_left();
}

TEST(the_others_do_not_wait_longer_than_the_deadline_of_the_critical_ones) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    job_t stuck = job(), quick = job(), other = job();
    ctx_cleanup_t cleanup = {0};
    stuck.gate = &gate;
    add_job(&cleanup, &stuck, "stuck", true, CTX_S(2));
    add_job(&cleanup, &quick, "quick", true, CTX_S(1));
    add_job(&cleanup, &other, "other", false, 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(other.began_at, CTX_S(2));
    EXPECT_EQ(load(&other.ended), 1);
    EXPECT(part_of(&report, "stuck")->late && !part_of(&report, "other")->late);
    EXPECT_EQ(load(&stuck.lates), 0);
    gate_open(&gate);
    UNTIL(load(&stuck.lates) == 1);
    EXPECT_EQ(load(&other.lates), 0);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_critical_one_that_is_stuck_for_the_whole_budget_keeps_no_other_from_running) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    job_t stuck = job(), other = job();
    ctx_cleanup_t cleanup = {0};
    stuck.gate = &gate;
    add_job(&cleanup, &stuck, "stuck", true, 0);
    add_job(&cleanup, &other, "other", false, 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(report.took, CTX_S(1));
    UNTIL(load(&other.ended) == 1);
    gate_open(&gate);
    UNTIL(load(&stuck.lates) == 1);
    EXPECT_EQ(load(&other.began), 1);
    EXPECT_EQ(load(&stuck.began), 1);
    UNTIL((until_quiet(), load(&other.lates) <= 1));
    gate_destroy(&gate);
    nothing_is_left();
}

/* -- contexts and deadlines ------------------------------------------------------------------------------------- */

TEST(each_has_its_deadline_and_by_default_the_budget) {
    ctx_clock_fake(T0);
    const struct {
        ctx_dur_t deadline, expected;
    } all[] = {{0, CTX_S(10)}, {CTX_S(3), CTX_S(3)}, {CTX_S(10), CTX_S(10)}, {1, 1}};
    enum { N = sizeof all / sizeof all[0] };
    job_t critical[N], other[N];
    ctx_cleanup_t cleanup = {0};
    for (int i = 0; i < N; i++) {
        critical[i] = other[i] = job();
        add_job(&cleanup, &critical[i], "critical", true, all[i].deadline);
        add_job(&cleanup, &other[i], "other", false, all[i].deadline);
    }
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), NULL), 0);
    for (int i = 0; i < N; i++) {
        EXPECT_EQ(critical[i].deadline - T0, all[i].expected);
        EXPECT_EQ(other[i].deadline - T0, all[i].expected);
        EXPECT_EQ(critical[i].err_before, 0);
        EXPECT_EQ(other[i].err_before, 0);
    }
    nothing_is_left();
}

TEST(a_deadline_counts_from_the_beginning_of_its_own_cleanup) {
    ctx_clock_fake(T0);
    job_t critical = job(), other = job();
    critical.takes = CTX_S(2);
    other.takes = CTX_S(100);
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &critical, "critical", true, 0);
    add_job(&cleanup, &other, "other", false, CTX_S(3));
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), NULL), 0);
    EXPECT_EQ(other.began_at, CTX_S(2));
    EXPECT_EQ(other.ended_at, CTX_S(5));
    EXPECT_EQ(other.err_after, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(critical.err_after, 0);
    nothing_is_left();
}

TEST(only_its_own_deadline_cancels_a_cleanup) {
    ctx_clock_fake(T0);
    job_t fails = job(), slow = job();
    fails.rc = -EIO;
    slow.takes = CTX_S(30);
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &slow, "slow", false, CTX_S(40)); /* longer than the budget */
    add_job(&cleanup, &fails, "fails", false, 0);
    EXPECT(clean_driven(&cleanup, CTX_S(2), NULL) != 0);
    EXPECT_EQ(ctx_now() - T0, CTX_S(2));
    drive(&slow.lates);
    EXPECT_EQ(slow.err_after, 0); /* neither the failure nor the end of the budget */
    EXPECT_EQ(slow.ended_at, CTX_S(30));
    nothing_is_left();
}

TEST(without_end_there_is_no_deadline) {
    job_t a = job();
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &a, "a", false, 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(a.deadline, CTX_NO_DEADLINE);
    nothing_is_left();
}

/* -- slow ones -------------------------------------------------------------------------------------------------- */

TEST(a_slow_one_goes_to_the_background_and_says_when_it_returns) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    job_t slow = job(), quick = job();
    slow.gate = &gate;
    slow.rc = -EIO;
    ctx_shutdown_report_t report;
    {
        ctx_cleanup_t cleanup = {0};
        add_job(&cleanup, &slow, "slow", false, 0);
        add_job(&cleanup, &quick, "quick", false, 0);
        EXPECT_EQ(clean_driven(&cleanup, CTX_S(2), &report), CTX_DEADLINE_EXCEEDED);
        memset(&cleanup, 0xff, sizeof cleanup); /* the storage may go */
    }
    EXPECT_EQ(report.took, CTX_S(2));
    EXPECT(!report.within_budget && report.late == 1 && report.total == 2);
    EXPECT(part_of(&report, "slow")->late && part_of(&report, "slow")->finished_at < 0);
    EXPECT(!part_of(&report, "quick")->late);
    EXPECT_EQ(load(&slow.lates), 0);
    pass(CTX_S(3));
    gate_open(&gate);
    UNTIL(load(&slow.lates) == 1);
    EXPECT(strcmp(slow.late_name, "slow") == 0);
    EXPECT_EQ(slow.late_rc, -EIO);
    EXPECT_EQ(slow.late_took, CTX_S(5));
    EXPECT(slow.late_thread_is_that_of_fn);
    until_quiet();
    EXPECT_EQ(load(&slow.lates), 1);
    EXPECT_EQ(load(&quick.lates), 0);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_slow_one_without_on_late_is_fine) {
    gate_t gate;
    gate_init(&gate);
    ctx_clock_fake(T0);
    job_t slow = job();
    slow.gate = &gate;
    ctx_cleanup_desc_t desc = describe_job(&slow, NULL, false);
    desc.on_late = NULL;
    ctx_cleanup_t cleanup = {0};
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(strcmp(report.parts[0].name, "cleanup") == 0);
    gate_open(&gate);
    UNTIL(load(&slow.ended) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_run_returns_at_its_budget_in_real_time_too) {
    gate_t gate;
    gate_init(&gate);
    job_t critical = job(), other = job();
    critical.gate = other.gate = &gate;
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &critical, "critical", true, CTX_MS(20));
    add_job(&cleanup, &other, "other", false, 0);
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_cleanup_run(&cleanup, CTX_MS(100), NULL), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from >= CTX_MS(100));
    EXPECT(ctx_now() - from < CTX_S(20));
    gate_open(&gate);
    UNTIL(load(&critical.lates) == 1 && load(&other.lates) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(with_no_budget_everything_runs_in_the_background) {
    gate_t gate;
    gate_init(&gate);
    job_t critical = job(), other = job();
    critical.gate = other.gate = &gate;
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &critical, "critical", true, 0);
    add_job(&cleanup, &other, "other", false, 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, 0, NULL), CTX_DEADLINE_EXCEEDED);
    gate_open(&gate);
    UNTIL(load(&critical.lates) == 1 && load(&other.lates) == 1);
    EXPECT(load(&critical.began) == 1 && load(&other.began) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

static void *opens_the_gate(void *arg) {
    gate_open((gate_t *)arg);
    return NULL;
}

/* Ends at the very moment in which the run gives it up: it is late and says so, or it is not. */
TEST(on_late_is_called_exactly_for_those_that_the_report_calls_late) {
    for (int i = 0, rounds = test_scale(200); i < rounds; i++) {
        gate_t gate;
        gate_init(&gate);
        static job_t slow;
        slow = job();
        slow.gate = &gate;
        ctx_cleanup_t cleanup = {0};
        add_job(&cleanup, &slow, "slow", i % 2 != 0, 0);
        uint64_t seed = (uint64_t)i;
        cleaner_t c;
        clean_apart(&c, &cleanup, CTX_US(200));
        gate_await(&gate, 1);
        int64_t end = test_now_ns() + race_below(&seed, 300000);
        while (test_now_ns() < end) spin(10);
        pthread_t opener = thread_start(opens_the_gate, &gate);
        thread_join(opener);
        thread_join(c.thread);
        int late = c.report.parts[0].late ? 1 : 0;
        EXPECT_EQ(c.rc, late ? CTX_DEADLINE_EXCEEDED : 0);
        if (late) UNTIL(load(&slow.lates) == 1);
        UNTIL(load(&slow.ended) == 1);
        EXPECT_EQ(load(&slow.lates), late);
        gate_destroy(&gate);
    }
    nothing_is_left();
}

/* -- results ---------------------------------------------------------------------------------------------------- */

TEST(the_first_error_is_the_result) {
    ctx_clock_fake(T0);
    job_t all[4];
    ctx_cleanup_t cleanup = {0};
    for (int i = 0; i < 4; i++) {
        all[i] = job();
        all[i].takes = CTX_S(4 - i);
        all[i].rc = i == 3 ? 0 : -100 - i;
        add_job(&cleanup, &all[i], "a", false, 0);
    }
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), NULL), -102); /* the first in time, not the first that was added */
    for (int i = 0; i < 4; i++) EXPECT_EQ(load(&all[i].ended), 1);
    nothing_is_left();
}

TEST(an_error_keeps_no_other_from_running) {
    job_t critical = job(), other = job(), third = job();
    critical.rc = -EIO;
    other.rc = -EPERM;
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &other, "other", false, 0);
    add_job(&cleanup, &critical, "critical", true, 0);
    add_job(&cleanup, &third, "third", false, 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, NULL), -EIO);
    EXPECT(load(&critical.ended) == 1 && load(&other.ended) == 1 && load(&third.ended) == 1);
    nothing_is_left();
}

static int drops(ctx_t *ctx, void *arg) {
    (void)ctx;
    ctx_shutdown_dropped((uint64_t)(uintptr_t)arg);
    return -EIO;
}

TEST(the_report_says_what_became_of_each) {
    ctx_clock_fake(T0);
    job_t critical = job(), other = job();
    critical.takes = CTX_S(1);
    other.takes = CTX_S(2);
    ctx_cleanup_t cleanup = {0};
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "drops";
    desc.fn = drops;
    desc.arg = (void *)(uintptr_t)11;
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), 0);
    add_job(&cleanup, &other, "other", false, 0);
    add_job(&cleanup, &critical, "critical", true, 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), &report), -EIO);
    EXPECT(report.total == 3 && report.n == 3 && report.late == 0);
    EXPECT_EQ(report.budget, CTX_S(10));
    EXPECT_EQ(report.took, CTX_S(3));
    EXPECT(report.within_budget && report.cause != NULL);
    EXPECT_EQ(report.dropped, 11);
    EXPECT(strcmp(report.parts[0].name, "critical") == 0); /* in the order of their turns */
    EXPECT_EQ(part_of(&report, "critical")->began_at, 0);
    EXPECT_EQ(part_of(&report, "critical")->finished_at, CTX_S(1));
    EXPECT_EQ(part_of(&report, "other")->began_at, CTX_S(1));
    EXPECT_EQ(part_of(&report, "other")->finished_at, CTX_S(3));
    EXPECT_EQ(part_of(&report, "other")->rc, 0);
    EXPECT_EQ(part_of(&report, "drops")->rc, -EIO);
    EXPECT_EQ(part_of(&report, "drops")->dropped, 11);
    nothing_is_left();
}

TEST(a_clock_that_shows_0_is_a_clock) {
    ctx_clock_fake(0);
    job_t a = job(), b = job();
    ctx_cleanup_t cleanup = {0};
    add_job(&cleanup, &a, "a", true, 0);
    add_job(&cleanup, &b, "b", false, 0);
    ctx_shutdown_report_t report;
    EXPECT_EQ(clean_driven(&cleanup, CTX_S(10), &report), 0);
    EXPECT(report.late == 0 && report.took == 0);
    EXPECT_EQ(report.parts[0].finished_at, 0);
    UNTIL(load(&a.ended) == 1 && load(&b.ended) == 1);
    nothing_is_left();
}

/* -- storage ---------------------------------------------------------------------------------------------------- */

TEST(a_run_of_nothing_is_fine) {
    ctx_cleanup_t cleanup = {0};
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_cleanup_run(&cleanup, CTX_S(1), NULL), 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, 0, &report), 0);
    EXPECT(report.total == 0 && report.n == 0 && report.rc == 0 && report.within_budget);
    nothing_is_left();
}

TEST(the_storage_can_be_used_again) {
    ctx_cleanup_t cleanup = {0};
    for (int i = 0; i < 3; i++) {
        job_t a = job(), b = job();
        add_job(&cleanup, &a, "a", false, 0);
        add_job(&cleanup, &b, "b", true, 0);
        ctx_shutdown_report_t report;
        EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, &report), 0);
        EXPECT_EQ(report.total, 2);
        EXPECT(load(&a.ended) == 1 && load(&b.ended) == 1);
        EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, &report), 0);
        EXPECT_EQ(report.total, 0);
        EXPECT(load(&a.ended) == 1 && load(&b.ended) == 1);
    }
    nothing_is_left();
}

enum { ADDERS = 8, EACH = 25 };

typedef struct {
    ctx_cleanup_t cleanup;
    start_line_t line;
    job_t jobs[ADDERS * EACH];
} crowd_t;

static void *adds_many(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    start_line(&crowd->line);
    for (int i = side->id; i < ADDERS * EACH; i += ADDERS)
        add_job(&crowd->cleanup, &crowd->jobs[i], "one of many", i % 3 == 0, 0);
    return NULL;
}

TEST(eight_threads_may_add) {
    static crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    start_line_init(&crowd.line, ADDERS);
    race_run(ADDERS, adds_many, &crowd);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_cleanup_run(&crowd.cleanup, LONG_WAIT, &report), 0);
    EXPECT_EQ(report.total, ADDERS * EACH);
    EXPECT_EQ(report.n, CTX_SHUTDOWN_PARTS);
    for (int i = 0; i < ADDERS * EACH; i++) EXPECT(load(&crowd.jobs[i].began) == 1 && load(&crowd.jobs[i].ended) == 1);
    nothing_is_left();
}

static void *adds_or_runs(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    if (side->id >= 2) return adds_many(arg);
    start_line(&crowd->line);
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_cleanup_run(&crowd->cleanup, LONG_WAIT, NULL), 0);
    return NULL;
}

TEST(each_runs_once_when_runs_and_adds_race) {
    static crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    start_line_init(&crowd.line, ADDERS);
    race_run(ADDERS, adds_or_runs, &crowd);
    EXPECT_EQ(ctx_cleanup_run(&crowd.cleanup, LONG_WAIT, NULL), 0); /* those that came after the last run */
    for (int i = 0; i < ADDERS * EACH; i++) {
        int expected = i % ADDERS >= 2 ? 1 : 0;
        EXPECT(load(&crowd.jobs[i].began) == expected && load(&crowd.jobs[i].ended) == expected);
    }
    nothing_is_left();
}

TEST(a_cleanup_may_add_another) {
    ctx_cleanup_t cleanup = {0};
    job_t first = job(), second = job();
    first.adds = &cleanup;
    first.added = &second;
    add_job(&cleanup, &first, "first", false, 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, NULL), 0);
    EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, NULL), 0);
    EXPECT(load(&first.began) == 1 && load(&second.began) == 1);
    nothing_is_left();
}

/* The first stands at the gate until the added one has run, so they are in the same run and in parallel. */
TEST(one_that_is_added_while_they_run_joins_them) {
    for (int critical = 0; critical < 2; critical++) {
        gate_t gate;
        gate_init(&gate);
        ctx_cleanup_t cleanup = {0};
        job_t first = job(), second = job();
        first.adds = &cleanup;
        first.added = &second;
        first.gate = &gate;
        add_job(&cleanup, &first, "first", critical != 0, 0);
        cleaner_t c;
        clean_apart(&c, &cleanup, LONG_WAIT);
        UNTIL(load(&second.ended) == 1);
        EXPECT_EQ(load(&first.ended), 0);
        gate_open(&gate);
        thread_join(c.thread);
        EXPECT_EQ(c.rc, 0);
        EXPECT_EQ(c.report.total, 2);
        EXPECT(load(&first.ended) == 1 && load(&second.ended) == 1);
        ctx_shutdown_report_t report;
        EXPECT_EQ(ctx_cleanup_run(&cleanup, LONG_WAIT, &report), 0);
        EXPECT_EQ(report.total, 0);
        gate_destroy(&gate);
    }
    nothing_is_left();
}

TEST(bad_arguments_are_invalid) {
    ctx_cleanup_t cleanup = {0};
    job_t a = job();
    ctx_cleanup_desc_t desc = describe_job(&a, "a", false);
    EXPECT_EQ(ctx_cleanup_add(NULL, &desc), CTX_INVALID);
    EXPECT_EQ(ctx_cleanup_add(&cleanup, NULL), CTX_INVALID);
    desc.fn = NULL;
    EXPECT_EQ(ctx_cleanup_add(&cleanup, &desc), CTX_INVALID);
    EXPECT_EQ(ctx_cleanup_run(NULL, CTX_S(1), NULL), CTX_INVALID);
    ctx_shutdown_report_t report;
    EXPECT_EQ(ctx_cleanup_run(&cleanup, CTX_S(1), &report), 0);
    EXPECT_EQ(report.total, 0);
    nothing_is_left();
}

TEST_MAIN
