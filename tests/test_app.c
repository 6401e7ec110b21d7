/* Section 14: apps: services that start and stop together, and the report drawn as text. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "services.h"

#include <sys/wait.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

/* Threads that have just become idle may hold a block for a moment longer. */
static void nothing_is_left(void) {
    ctx_clock_real();
    UNTIL((ctx_runtime_stop(), blocks_live() == 0));
}

static ctx_app_t *app_below(ctx_t *parent) {
    ctx_app_t *app = ctx_app_new(parent);
    if (!app) {
        fprintf(stderr, "no app for the test: %s\n", strerror(errno));
        abort();
    }
    return app;
}

/* At the beginning of a test on the fake clock. */
static ctx_app_t *new_app(void) {
    ctx_clock_fake(T0);
    return app_below(ctx_background());
}

static void join(ctx_app_t *app, actor_t *a, const char *const *after) {
    ctx_service_desc_t desc = describe(a);
    desc.needs = after;
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
}

/* ctx_app_run() on a thread of its own. Set what is wanted in `desc` between prepare() and run_apart(). */
typedef struct {
    ctx_app_t *app;
    ctx_app_desc_t desc;
    ctx_shutdown_report_t report;
    int rc, done;
    int forces;           /* [atomic] calls of on_force */
    int force_place;      /* the first of them among the events of actors */
    ctx_time_t forced_at; /* and when */
    pthread_t thread;
} runner_t;

static void counts_forces(void *user) {
    runner_t *runner = (runner_t *)user;
    if (load(&runner->forces) == 0) {
        runner->force_place = add(&events_so_far, 1);
        runner->forced_at = ctx_now() - T0;
    }
    add(&runner->forces, 1);
}

static void prepare(runner_t *runner, ctx_app_t *app) {
    memset(runner, 0, sizeof *runner);
    runner->app = app;
    runner->desc.on_force = counts_forces;
    runner->desc.user = runner;
    runner->desc.report = &runner->report;
}

static void *runs_the_app(void *arg) {
    runner_t *runner = (runner_t *)arg;
    runner->rc = ctx_app_run(runner->app, &runner->desc);
    store(&runner->done, 1);
    return NULL;
}

static void run_apart(runner_t *runner) { runner->thread = thread_start(runs_the_app, runner); }

/* The same, and wait until everything has started. */
static void run_until_ready(runner_t *runner) {
    run_apart(runner);
    UNTIL(ctx_app_ready(runner->app));
    until_quiet();
}

/* Move the clock until the app has returned. */
static int await_end(runner_t *runner) {
    drive(&runner->done);
    thread_join(runner->thread);
    EXPECT_EQ(runner->report.rc, runner->rc);
    EXPECT(runner->report.cause != NULL);
    return runner->rc;
}

static void send_self(int sig) {
    raise(sig);
    until_quiet();
}

/* From the start to the end by a SIGTERM; nothing special in the description. */
static int run_and_terminate(runner_t *runner, ctx_app_t *app) {
    prepare(runner, app);
    run_until_ready(runner);
    send_self(SIGTERM);
    return await_end(runner);
}

static bool caused_by(const runner_t *runner, const char *cause) {
    return runner->report.cause && strcmp(runner->report.cause, cause) == 0;
}

static const ctx_shutdown_part_t *part_of(const ctx_shutdown_report_t *report, const char *name) {
    static ctx_shutdown_part_t none;
    for (size_t i = 0; i < report->n; i++)
        if (strcmp(report->parts[i].name, name) == 0) return &report->parts[i];
    test_fail(__FILE__, __LINE__, "no part of this name");
    return &none;
}

static struct sigaction action_of(int sig) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigaction(sig, NULL, &action);
    return action;
}

static bool is_default(int sig) { return action_of(sig).sa_handler == SIG_DFL; }

static const char *const after_a[] = {"a", NULL};
static const char *const after_b[] = {"b", NULL};
static const char *const after_c[] = {"c", NULL};
static const char *const after_b_and_c[] = {"b", "c", NULL};
static const char *const after_itself[] = {"itself", NULL};
static const char *const after_nobody_known[] = {"a", "nobody", NULL};
static const char *const after_nothing[] = {NULL};

/* -- order ------------------------------------------------------------------------------------------------------ */

/* The second needs the first. */
static void expect_in_order(const actor_t *first, const actor_t *second) {
    EXPECT(before(first, STARTED, second, STARTS));
    EXPECT(before(second, RETURNED, first, REFUSES));
    EXPECT(before(second, RETURNED, first, CANCELED));
}

TEST(a_diamond_starts_from_its_bottom_and_stops_from_its_top) {
    for (int turn = 0; turn < 4; turn++) { /* whatever the order in which they were added */
        actor_t all[] = {actor("a"), actor("b"), actor("c"), actor("d")};
        const char *const *after[] = {NULL, after_a, after_a, after_b_and_c};
        ctx_app_t *app = new_app();
        for (int i = 0; i < 4; i++) join(app, &all[(i * 3 + turn) % 4], after[(i * 3 + turn) % 4]);
        runner_t runner;
        EXPECT_EQ(run_and_terminate(&runner, app), 0);
        for (int i = 0; i < 4; i++) expect_stopped(&all[i]);
        expect_in_order(&all[0], &all[1]);
        expect_in_order(&all[0], &all[2]);
        expect_in_order(&all[1], &all[3]);
        expect_in_order(&all[2], &all[3]);
        EXPECT_EQ(runner.forces, 0);
    }
    nothing_is_left();
}

TEST(those_that_do_not_need_each_other_stop_in_parallel) {
    enum { N = 5 };
    static const char *const names[N] = {"a", "b", "c", "d", "e"};
    gate_t gate;
    gate_init(&gate);
    actor_t all[N];
    ctx_app_t *app = new_app();
    for (int i = 0; i < N; i++) {
        all[i] = actor(names[i]);
        all[i].drain_gate = &gate;
        join(app, &all[i], i == 1 ? after_nothing : NULL);
    }
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    send_self(SIGTERM);
    gate_await(&gate, N); /* all are inside: one after the other would hang here */
    gate_open(&gate);
    EXPECT_EQ(await_end(&runner), 0);
    for (int i = 0; i < N; i++) expect_stopped(&all[i]);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(one_is_told_to_stop_as_soon_as_those_that_need_it_have) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c"), d = actor("d");
    b.drain_takes = CTX_S(1); /* needs a */
    d.drain_takes = CTX_S(3); /* needs c */
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, NULL);
    join(app, &d, after_c);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT_EQ(a.at[REFUSES], CTX_S(1));
    EXPECT_EQ(c.at[REFUSES], CTX_S(3));
    EXPECT_EQ(runner.report.took, CTX_S(3));
    EXPECT_EQ(part_of(&runner.report, "a")->began_at, CTX_S(1));
    EXPECT_EQ(part_of(&runner.report, "b")->began_at, 0);
    EXPECT_EQ(part_of(&runner.report, "c")->began_at, CTX_S(3));
    nothing_is_left();
}

TEST(a_need_that_no_service_has_is_invalid) {
    actor_t a = actor("a"), b = actor("b");
    ctx_app_t *app = app_below(ctx_background());
    join(app, &a, NULL);
    join(app, &b, after_nobody_known);
    EXPECT_EQ(ctx_app_run(app, NULL), CTX_INVALID);
    expect_untouched(&a);
    expect_untouched(&b);
    nothing_is_left();
}

TEST(a_circle_is_invalid) {
    actor_t a = actor("a"), b = actor("b"), c = actor("c"), outside = actor("outside");
    ctx_app_t *app = app_below(ctx_background());
    join(app, &outside, NULL);
    join(app, &a, after_c);
    join(app, &b, after_a);
    join(app, &c, after_b);
    EXPECT_EQ(ctx_app_run(app, NULL), CTX_INVALID);
    expect_untouched(&a);
    expect_untouched(&outside);
    actor_t itself = actor("itself");
    app = app_below(ctx_background());
    join(app, &itself, after_itself);
    EXPECT_EQ(ctx_app_run(app, NULL), CTX_INVALID);
    expect_untouched(&itself);
    EXPECT(is_default(SIGTERM) && is_default(SIGINT));
    nothing_is_left();
}

TEST(names_are_needed_and_unique) {
    ctx_app_t *app = new_app();
    char same[] = "a"; /* equal, though not the same string */
    actor_t a = actor("a"), twin = actor(same), nameless = actor(NULL);
    ctx_service_desc_t desc[] = {describe(&a), describe(&twin), describe(&nameless)};
    EXPECT_EQ(ctx_app_add(app, &desc[0]), 0);
    EXPECT_EQ(ctx_app_add(app, &desc[1]), CTX_INVALID);
    EXPECT_EQ(ctx_app_add(app, &desc[2]), CTX_INVALID);
    runner_t runner; /* what was refused is no part of it */
    prepare(&runner, app);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(runner.report.total, 1);
    expect_stopped(&a);
    expect_untouched(&twin);
    expect_untouched(&nameless);
    nothing_is_left();
}

TEST(an_app_below_nothing_is_invalid) {
    errno = 0;
    EXPECT(ctx_app_new(NULL) == NULL);
    EXPECT_EQ(errno, EINVAL);
}

/* -- failures --------------------------------------------------------------------------------------------------- */

TEST(a_failed_start_stops_what_was_started_in_reverse_order) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c"), d = actor("d");
    c.start_rc = -EIO;
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, after_b);
    join(app, &d, after_c);
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    EXPECT_EQ(await_end(&runner), -EIO);
    EXPECT(caused_by(&runner, "c"));
    expect_orderly(&a);
    expect_orderly(&b);
    expect_in_order(&a, &b);
    EXPECT(before(&b, REFUSES, &b, DRAINS) && before(&a, REFUSES, &a, DRAINS));
    EXPECT_EQ(times(&c, STARTS), 1);
    for (int event = RUNS; event < EVENTS; event++) EXPECT_EQ(times(&c, (event_t)event), 0);
    expect_untouched(&d);
    EXPECT(is_default(SIGTERM));
    nothing_is_left();
}

TEST(a_failed_run_ends_the_app_in_order_and_is_returned) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c");
    c.run_gate = &gate;
    c.run_rc = -ENOSPC;
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, NULL);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    gate_open(&gate);
    EXPECT_EQ(await_end(&runner), -ENOSPC);
    EXPECT(caused_by(&runner, "c"));
    expect_stopped(&a); /* drained before it was canceled: the failure was another's */
    expect_stopped(&b);
    expect_in_order(&a, &b);
    expect_orderly(&c);
    EXPECT_EQ(part_of(&runner.report, "c")->rc, -ENOSPC);
    EXPECT_EQ(part_of(&runner.report, "a")->rc, 0);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(the_first_of_two_failures_is_returned) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    a.run_gate = &gate;
    a.run_rc = -ENOSPC;
    b.run_lingers = CTX_MS(100);
    b.run_rc = -EIO;
    b.drain_rc = -EPERM;
    join(app, &b, NULL);
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    gate_open(&gate);
    EXPECT_EQ(await_end(&runner), -ENOSPC);
    EXPECT(caused_by(&runner, "a"));
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_failure_during_the_shutdown_is_returned) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    a.drain_rc = -EPERM;
    join(app, &a, NULL);
    join(app, &b, after_a);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), -EPERM);
    EXPECT(caused_by(&runner, "SIGTERM"));
    EXPECT(runner.report.within_budget);
    EXPECT_EQ(part_of(&runner.report, "a")->rc, -EPERM);
    nothing_is_left();
}

TEST(the_first_of_two_failures_in_the_shutdown_is_returned) {
    for (int first = 0; first < 2; first++) { /* whatever the order in which they were added */
        ctx_app_t *app = new_app();
        actor_t a = actor("a"), b = actor("b");
        a.drain_takes = first ? CTX_S(1) : CTX_S(2);
        b.drain_takes = first ? CTX_S(2) : CTX_S(1);
        a.drain_rc = -EPERM;
        b.drain_rc = -ENOSPC;
        join(app, &a, NULL);
        join(app, &b, NULL);
        runner_t runner;
        EXPECT_EQ(run_and_terminate(&runner, app), first ? -EPERM : -ENOSPC);
    }
    nothing_is_left();
}

TEST(a_run_that_returns_0_does_not_end_the_app) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    a.run_ends = b.run_ends = true;
    join(app, &a, NULL);
    join(app, &b, after_a);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    UNTIL(times(&a, RETURNED) == 1 && times(&b, RETURNED) == 1);
    pass(CTX_S(1));
    EXPECT(ctx_app_ready(app));
    EXPECT_EQ(load(&runner.done), 0);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(times(&a, DRAINS), 1);
    nothing_is_left();
}

/* -- signals ---------------------------------------------------------------------------------------------------- */

TEST(by_default_sigterm_and_sigint_end_the_app) {
    const struct {
        int sig;
        const char *name;
    } all[] = {{SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}};
    for (int i = 0; i < 2; i++) {
        ctx_app_t *app = new_app();
        actor_t a = actor("a");
        join(app, &a, NULL);
        runner_t runner;
        prepare(&runner, app);
        run_until_ready(&runner);
        EXPECT(!is_default(SIGTERM) && !is_default(SIGINT));
        EXPECT(is_default(SIGHUP) && is_default(SIGUSR1));
        send_self(all[i].sig);
        EXPECT_EQ(await_end(&runner), 0);
        EXPECT(caused_by(&runner, all[i].name));
        EXPECT(!runner.report.forced && runner.report.within_budget);
        EXPECT(is_default(SIGTERM) && is_default(SIGINT));
        expect_stopped(&a);
    }
    nothing_is_left();
}

TEST(the_signals_that_end_the_app_can_be_named) {
    static const int signals[] = {SIGUSR1, SIGHUP, 0};
    ctx_app_t *app = new_app();
    runner_t runner;
    prepare(&runner, app);
    runner.desc.signals = signals;
    run_until_ready(&runner);
    EXPECT(is_default(SIGTERM) && is_default(SIGINT));
    EXPECT(!is_default(SIGUSR1) && !is_default(SIGHUP));
    send_self(SIGHUP);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(caused_by(&runner, "SIGHUP"));
    EXPECT(is_default(SIGUSR1) && is_default(SIGHUP));
    nothing_is_left();
}

TEST(an_app_without_signals_ends_with_its_parent) {
    static const int none[] = {0};
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_app_t *app = app_below(parent);
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.signals = none;
    run_until_ready(&runner);
    EXPECT(is_default(SIGTERM) && is_default(SIGINT));
    ctx_cancel_cause(parent, -EPERM, "enough");
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(caused_by(&runner, "enough"));
    expect_stopped(&a);
    ctx_end(parent);
    nothing_is_left();
}

TEST(a_signal_that_cannot_be_caught_is_invalid) {
    static const int bad[] = {SIGTERM, SIGKILL, 0};
    actor_t a = actor("a");
    ctx_app_t *app = app_below(ctx_background());
    join(app, &a, NULL);
    ctx_app_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.signals = bad;
    EXPECT_EQ(ctx_app_run(app, &desc), CTX_INVALID);
    expect_orderly(&a);
    EXPECT(is_default(SIGTERM));
    nothing_is_left();
}

static int own_handler_runs; /* [atomic] */
static void own_handler(int sig) {
    (void)sig;
    add(&own_handler_runs, 1);
}

TEST(the_actions_of_signals_come_back) {
    for (int twice = 0; twice < 2; twice++) {
        signal(SIGTERM, own_handler);
        signal(SIGINT, SIG_IGN);
        store(&own_handler_runs, 0);
        ctx_app_t *app = new_app();
        actor_t a = actor("a");
        a.drain_takes = CTX_S(1);
        join(app, &a, NULL);
        runner_t runner;
        prepare(&runner, app);
        run_until_ready(&runner);
        send_self(SIGTERM);
        if (twice) send_self(SIGTERM);
        await_end(&runner);
        EXPECT_EQ(load(&own_handler_runs), 0);
        EXPECT(action_of(SIGTERM).sa_handler == own_handler);
        EXPECT(action_of(SIGINT).sa_handler == SIG_IGN);
        raise(SIGTERM);
        EXPECT_EQ(load(&own_handler_runs), 1);
        signal(SIGTERM, SIG_DFL);
        signal(SIGINT, SIG_DFL);
    }
    nothing_is_left();
}

TEST(a_signal_while_it_starts_stops_what_was_started) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c");
    b.start_gate = &gate;
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, after_b);
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    gate_await(&gate, 1);
    EXPECT(!ctx_app_ready(app));
    send_self(SIGTERM);
    EXPECT(!ctx_app_ready(app));
    gate_open(&gate);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(caused_by(&runner, "SIGTERM"));
    expect_orderly(&a);
    expect_orderly(&b);
    EXPECT_EQ(times(&a, DRAINS), 1);
    expect_untouched(&c);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_second_signal_skips_to_force) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    b.drain_takes = CTX_S(20); /* heeds its context */
    join(app, &a, NULL);
    join(app, &b, after_a);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    send_self(SIGTERM);
    pass(CTX_S(1));
    EXPECT_EQ(times(&b, DRAINS), 1);
    EXPECT_EQ(times(&b, CANCELED), 0);
    send_self(SIGINT);                /* any of them */
    EXPECT_EQ(await_end(&runner), 0); /* everything stopped inside the budget */
    EXPECT_EQ(b.at[DRAINED], CTX_S(1));
    EXPECT_EQ(b.at[CANCELED], CTX_S(1));
    EXPECT_EQ(a.at[CANCELED], CTX_S(1));
    EXPECT(runner.report.forced && runner.report.within_budget);
    EXPECT(caused_by(&runner, "SIGTERM"));
    EXPECT_EQ(runner.report.took, CTX_S(1));
    EXPECT_EQ(runner.forces, 1);
    EXPECT_EQ(runner.forced_at, CTX_S(1));
    expect_orderly(&a);
    expect_orderly(&b);
    nothing_is_left();
}

TEST(after_a_second_signal_a_stuck_component_does_not_hold_the_app) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t stuck = actor("stuck"), a = actor("a");
    stuck.run_gate = &gate;
    join(app, &a, NULL);
    join(app, &stuck, after_a);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    send_self(SIGTERM);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), CTX_DEADLINE_EXCEEDED);
    EXPECT(runner.report.took <= CTX_MS(200));
    EXPECT_EQ(times(&stuck, FORCES), 1);
    EXPECT(runner.force_place < stuck.place[FORCES]);
    EXPECT_EQ(runner.forces, 1);
    EXPECT(runner.report.forced && !runner.report.within_budget && runner.report.late == 1);
    EXPECT(part_of(&runner.report, "stuck")->late && !part_of(&runner.report, "a")->late);
    EXPECT_EQ(times(&a, RETURNED), 1);
    gate_open(&gate);
    UNTIL(times(&stuck, RETURNED) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_third_signal_changes_nothing_more) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    a.drain_takes = CTX_S(20);
    a.run_lingers = CTX_MS(100);
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    for (int i = 0; i < 3; i++) send_self(SIGTERM);
    await_end(&runner);
    EXPECT_EQ(runner.forces, 1);
    EXPECT(times(&a, FORCES) <= 1);
    nothing_is_left();
}

/* In the child of a fork(): what the real process of a program does. */
static int app_in_a_child(bool stuck, bool twice) {
    static actor_t a;
    static gate_t gate;
    static runner_t runner;
    a = actor("a");
    gate_init(&gate);
    if (stuck) a.drain_gate = &gate;
    ctx_app_t *app = app_below(ctx_background());
    join(app, &a, NULL);
    prepare(&runner, app);
    run_apart(&runner);
    UNTIL(ctx_app_ready(app));
    kill(getpid(), SIGTERM);
    if (stuck) gate_await(&gate, 1);
    if (twice) kill(getpid(), SIGTERM);
    thread_join(runner.thread);
    if (runner.report.forced != twice) return 1;
    if (runner.report.late != (stuck ? 1 : 0)) return 2;
    return runner.rc == (stuck ? CTX_DEADLINE_EXCEEDED : 0) ? 0 : 3;
}

static int ends_orderly(void) { return app_in_a_child(false, false); }
static int ends_forced(void) { return app_in_a_child(true, true); }

static int status_of(int (*act)(void)) {
    ctx_runtime_stop();
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        _exit(act());
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

TEST(a_process_that_is_signalled_ends_by_itself) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    if (getenv("TEST_NO_CHILD_THREADS")) SKIP("no new thread may start in a fork here");
    EXPECT_EQ(status_of(ends_orderly), 0);
    EXPECT_EQ(status_of(ends_forced), 0);
}

/* -- what on_force may do --------------------------------------------------------------------------------------- */

typedef struct {
    gate_t gate;
    int calls; /* [atomic] */
} slow_force_t;

static void forces_slowly(void *user) {
    slow_force_t *slow = (slow_force_t *)user;
    add(&slow->calls, 1);
    gate_pass(&slow->gate);
}

/* It does not return before the app has. */
TEST(a_slow_on_force_does_not_hold_the_app) {
    for (int twice = 0; twice < 2; twice++) { /* by a second signal, or by the end of the budget */
        static slow_force_t slow;
        gate_t gate;
        memset(&slow, 0, sizeof slow);
        gate_init(&slow.gate);
        gate_init(&gate);
        ctx_app_t *app = new_app();
        actor_t stuck = actor("stuck"), other = actor("other");
        stuck.run_gate = &gate;
        join(app, &stuck, NULL);
        join(app, &other, NULL);
        runner_t runner;
        prepare(&runner, app);
        runner.desc.budget = CTX_S(2);
        runner.desc.on_force = forces_slowly;
        runner.desc.user = &slow;
        run_until_ready(&runner);
        send_self(SIGTERM);
        if (twice) send_self(SIGTERM);
        EXPECT_EQ(await_end(&runner), CTX_DEADLINE_EXCEEDED);
        EXPECT(runner.report.took <= (twice ? CTX_MS(200) : CTX_MS(2100))); /* a grace period for each */
        UNTIL(times(&stuck, FORCES) == 1); /* the last moment is late enough for that */
        EXPECT_EQ(load(&slow.calls), 1);
        EXPECT(!part_of(&runner.report, "other")->late);
        gate_open(&gate);
        gate_open(&slow.gate);
        UNTIL(times(&stuck, RETURNED) == 1);
        nothing_is_left();
        gate_destroy(&gate);
        gate_destroy(&slow.gate);
    }
}

TEST(components_are_forced_when_on_force_has_returned) {
    slow_force_t slow;
    gate_t gate;
    memset(&slow, 0, sizeof slow);
    gate_init(&slow.gate);
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    a.run_gate = a.force_opens = &gate;
    ctx_service_desc_t service = describe(&a);
    service.grace = CTX_S(10);
    EXPECT_EQ(ctx_app_add(app, &service), 0);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.on_force = forces_slowly;
    runner.desc.user = &slow;
    run_until_ready(&runner);
    send_self(SIGTERM);
    send_self(SIGTERM);
    gate_await(&slow.gate, 1);
    pass(CTX_S(1));
    EXPECT_EQ(times(&a, FORCES), 0);
    gate_open(&slow.gate);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(a.at[FORCES], CTX_S(1));
    EXPECT_EQ(load(&slow.calls), 1);
    gate_destroy(&gate);
    gate_destroy(&slow.gate);
    nothing_is_left();
}

/* -- what outlives an app --------------------------------------------------------------------------------------- */

typedef struct {
    ctx_app_t *app;
    gate_t gate;
    int ready, err, done; /* [atomic] */
} health_t;

static int asks_after_the_end(ctx_t *ctx, void *user) {
    health_t *health = (health_t *)user;
    (void)ctx;
    gate_pass(&health->gate);
    store(&health->ready, ctx_app_ready(health->app) ? 1 : 0);
    store(&health->err, ctx_err(ctx_app_ctx(health->app)));
    store(&health->done, 1);
    return 0;
}

TEST(in_a_late_service_the_app_is_not_ready) {
    health_t health;
    memset(&health, 0, sizeof health);
    gate_init(&health.gate);
    health.ready = -1;
    health.app = new_app();
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "health";
    desc.run = asks_after_the_end;
    desc.user = &health;
    EXPECT_EQ(ctx_app_add(health.app, &desc), 0);
    runner_t runner;
    prepare(&runner, health.app);
    runner.desc.budget = CTX_S(1);
    run_until_ready(&runner);
    gate_await(&health.gate, 1);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), CTX_DEADLINE_EXCEEDED);
    gate_open(&health.gate);
    UNTIL(load(&health.done));
    EXPECT_EQ(load(&health.ready), 0);
    EXPECT_EQ(load(&health.err), CTX_CANCELED);
    gate_destroy(&health.gate);
    nothing_is_left();
}

static void run_an_app_with_sigint(void) {
    static const int signals[] = {SIGINT, 0};
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.signals = signals;
    run_until_ready(&runner);
    send_self(SIGINT);
    EXPECT_EQ(await_end(&runner), 0);
}

/* A context that waited for it too has had its signal; for one made later the next is the first. In both cases the one
   after that ends the process. */
TEST(after_an_app_a_signal_has_its_former_action) {
    static const int signals[] = {SIGINT};
    ctx_t *waits = ctx_notify_signals(ctx_background(), signals, 1);
    EXPECT((action_of(SIGINT).sa_flags & (int)SA_RESETHAND) != 0);
    run_an_app_with_sigint();
    EXPECT_EQ(ctx_err(waits), CTX_CANCELED);
    EXPECT(is_default(SIGINT));
    ctx_end(waits);
    EXPECT(is_default(SIGINT));
    nothing_is_left();
}

TEST(after_an_app_a_context_waits_for_its_signal_as_before) {
    static const int signals[] = {SIGTERM};
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *waits = ctx_notify_signals(ctx_background(), signals, 1);
    ctx_clock_fake(T0);
    ctx_app_t *app = app_below(parent);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    EXPECT((action_of(SIGTERM).sa_flags & (int)SA_RESETHAND) == 0); /* the second one is for the app */
    ctx_cancel(parent);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(!is_default(SIGTERM) && (action_of(SIGTERM).sa_flags & (int)SA_RESETHAND) != 0);
    raise(SIGTERM);
    EXPECT_EQ(ctx_wait(waits, CTX_FOREVER), CTX_CANCELED);
    EXPECT(is_default(SIGTERM)); /* a second one ends the process */
    ctx_end(waits);
    ctx_end(parent);
    nothing_is_left();
}

/* -- readiness and lame duck ------------------------------------------------------------------------------------ */

TEST(it_is_ready_from_the_last_start_to_the_first_signal) {
    gate_t first, last, draining;
    gate_init(&first);
    gate_init(&last);
    gate_init(&draining);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    a.start_gate = &first;
    b.start_gate = &last;
    b.drain_gate = &draining;
    join(app, &a, NULL);
    join(app, &b, after_a);
    EXPECT(!ctx_app_ready(app));
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    gate_await(&first, 1);
    EXPECT(!ctx_app_ready(app));
    gate_open(&first);
    gate_await(&last, 1);
    until_quiet();
    EXPECT(!ctx_app_ready(app));
    gate_open(&last);
    UNTIL(ctx_app_ready(app));
    pass(CTX_S(1));
    EXPECT(ctx_app_ready(app));
    send_self(SIGTERM);
    gate_await(&draining, 1);
    EXPECT(!ctx_app_ready(app));
    gate_open(&draining);
    EXPECT_EQ(await_end(&runner), 0);
    gate_destroy(&first);
    gate_destroy(&last);
    gate_destroy(&draining);
    nothing_is_left();
}

TEST(a_lame_duck_works_on_with_the_readiness_off) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.lame_duck = CTX_S(3);
    runner.desc.budget = CTX_S(10);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT(!ctx_app_ready(app));
    pass(CTX_MS(2900));
    EXPECT(!ctx_app_ready(app));
    EXPECT_EQ(times(&a, REFUSES), 0);
    EXPECT_EQ(times(&a, CANCELED), 0);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(a.at[REFUSES], CTX_S(3));
    EXPECT_EQ(a.drain_deadline - T0, CTX_MS(9900)); /* it is a part of the budget */
    EXPECT_EQ(runner.report.lame_duck, CTX_S(3));
    EXPECT_EQ(runner.report.budget, CTX_S(10));
    EXPECT_EQ(runner.report.took, CTX_S(3));
    EXPECT_EQ(part_of(&runner.report, "a")->began_at, CTX_S(3));
    expect_stopped(&a);
    nothing_is_left();
}

TEST(a_second_signal_cuts_the_lame_duck_short) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.lame_duck = CTX_S(20);
    run_until_ready(&runner);
    send_self(SIGTERM);
    pass(CTX_S(2));
    EXPECT_EQ(times(&a, CANCELED), 0);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(a.at[CANCELED], CTX_S(2));
    EXPECT_EQ(runner.report.took, CTX_S(2));
    EXPECT_EQ(runner.report.lame_duck, CTX_S(2));
    EXPECT(runner.report.forced);
    EXPECT_EQ(runner.forces, 1);
    nothing_is_left();
}

TEST(a_lame_duck_is_not_longer_than_the_budget) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.lame_duck = CTX_S(20);
    runner.desc.budget = CTX_S(2);
    run_until_ready(&runner);
    send_self(SIGTERM);
    await_end(&runner);
    EXPECT(a.at[CANCELED] <= CTX_S(2));
    EXPECT(runner.report.took <= CTX_MS(2100));
    EXPECT_EQ(times(&a, RETURNED), 1);
    nothing_is_left();
}

/* A failure is no reason to keep load balancers waiting less. */
TEST(after_a_failure_there_is_a_lame_duck_too) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), fails = actor("fails");
    fails.run_gate = &gate;
    fails.run_rc = -EIO;
    join(app, &a, NULL);
    join(app, &fails, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.lame_duck = CTX_S(3);
    run_until_ready(&runner);
    gate_open(&gate);
    until_quiet();
    EXPECT(!ctx_app_ready(app));
    EXPECT_EQ(await_end(&runner), -EIO);
    EXPECT_EQ(a.at[REFUSES], CTX_S(3));
    expect_stopped(&a);
    gate_destroy(&gate);
    nothing_is_left();
}

/* -- the app's context ------------------------------------------------------------------------------------------ */

static const ctx_key_t color_key = CTX_KEY(int);

TEST(the_apps_context_is_done_when_the_shutdown_begins) {
    const int color = 3;
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_value(ctx_background(), &color_key, &color);
    ctx_app_t *app = app_below(parent);
    ctx_t *ctx = ctx_app_ctx(app);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT(ctx_value(ctx, &color_key) && *(const int *)ctx_value(ctx, &color_key) == 3);
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.lame_duck = CTX_S(3);
    run_until_ready(&runner);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT(ctx_app_ctx(app) == ctx);
    ctx_retain(ctx);
    send_self(SIGTERM);
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED); /* the lame duck has hardly begun */
    EXPECT_EQ(ctx_cause(ctx).code, SIGTERM);
    EXPECT(strcmp(ctx_cause(ctx).what, "SIGTERM") == 0);
    EXPECT(strcmp(ctx_cause(ctx).site, "signal SIGTERM") == 0);
    EXPECT_EQ(times(&a, REFUSES), 0);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(ctx_cause(ctx).code, SIGTERM);
    ctx_release(ctx);
    ctx_end(parent);
    nothing_is_left();
}

TEST(the_apps_context_outlives_the_parent_until_the_shutdown) {
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_app_t *app = app_below(parent);
    ctx_t *ctx = ctx_retain(ctx_app_ctx(app));
    ctx_cancel_cause(parent, CTX_DEADLINE_EXCEEDED, "enough");
    EXPECT_EQ(ctx_err(ctx), 0);
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    EXPECT(strcmp(ctx_cause(ctx).what, "enough") == 0);
    ctx_release(ctx);
    ctx_end(parent);
    nothing_is_left();
}

TEST(the_apps_context_names_the_service_that_failed) {
    ctx_app_t *app = new_app();
    ctx_t *ctx = ctx_retain(ctx_app_ctx(app));
    actor_t a = actor("a"), b = actor("b");
    b.start_rc = -EIO;
    join(app, &a, NULL);
    join(app, &b, after_a);
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    EXPECT_EQ(await_end(&runner), -EIO);
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(ctx).code, -EIO);
    EXPECT(strcmp(ctx_cause(ctx).what, "b") == 0);
    ctx_release(ctx);
    nothing_is_left();
}

TEST(an_app_that_is_freed_unused_cancels_its_context) {
    ctx_app_t *app = new_app();
    ctx_t *ctx = ctx_retain(ctx_app_ctx(app));
    ctx_app_free(app);
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    ctx_release(ctx);
    EXPECT_EQ(ctx_err(ctx_app_ctx(NULL)), CTX_INVALID);
    nothing_is_left();
}

typedef struct {
    ctx_app_t *app;
    pthread_t thread;
    int ready, calls; /* [atomic] */
} watcher_t;

/* Whatever it calls, no lock of the services is held. */
static void watches_the_app(void *arg) {
    watcher_t *watcher = (watcher_t *)arg;
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    watcher->thread = pthread_self();
    store(&watcher->ready, ctx_app_ready(watcher->app));
    ctx_service_free(ctx_service_new(ctx_background(), &desc));
    add(&watcher->calls, 1);
}

TEST(a_callback_of_the_apps_context_runs_in_ctx_app_run) {
    ctx_app_t *app = new_app();
    watcher_t watcher;
    memset(&watcher, 0, sizeof watcher);
    watcher.app = app;
    ctx_on_done_t reg;
    EXPECT(ctx_on_done(&reg, ctx_app_ctx(app), watches_the_app, &watcher));
    actor_t a = actor("a");
    join(app, &a, NULL);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT(!ctx_on_done_stop(&reg));
    EXPECT_EQ(load(&watcher.calls), 1);
    EXPECT_EQ(load(&watcher.ready), 0);
    EXPECT(pthread_equal(watcher.thread, runner.thread));
    nothing_is_left();
}

/* -- the budget ------------------------------------------------------------------------------------------------- */

TEST(the_default_budget_is_25_seconds) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a");
    a.drain_gate = a.force_opens = &gate;
    join(app, &a, NULL);
    runner_t runner;
    run_and_terminate(&runner, app);
    EXPECT_EQ(runner.report.budget, CTX_S(25));
    EXPECT_EQ(a.drain_deadline - T0, CTX_MS(24900));
    EXPECT_EQ(a.at[CANCELED], CTX_MS(24900));
    EXPECT_EQ(a.at[FORCES], CTX_S(25));
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(one_that_ignores_its_cancellation_is_named_and_holds_nobody) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t stuck = actor("stuck"), needed = actor("a"), other = actor("other");
    stuck.run_gate = &gate;
    join(app, &needed, NULL);
    join(app, &stuck, after_a);
    join(app, &other, NULL);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.budget = CTX_S(2);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), CTX_DEADLINE_EXCEEDED);
    EXPECT(runner.report.took <= CTX_MS(2100));
    EXPECT(!runner.report.within_budget && !runner.report.forced);
    EXPECT_EQ(runner.report.total, 3);
    EXPECT_EQ(runner.report.late, 1);
    EXPECT(part_of(&runner.report, "stuck")->late);
    EXPECT(part_of(&runner.report, "stuck")->finished_at < 0);
    EXPECT(!part_of(&runner.report, "a")->late && !part_of(&runner.report, "other")->late);
    EXPECT_EQ(times(&stuck, FORCES), 1);
    EXPECT_EQ(stuck.at[FORCES], CTX_MS(100));
    expect_stopped(&other);
    EXPECT_EQ(other.at[RETURNED], 0);
    expect_orderly(&needed); /* its turn did not come, yet it was canceled */
    EXPECT(needed.at[CANCELED] <= CTX_S(2));
    EXPECT_EQ(times(&needed, RETURNED), 1);
    gate_open(&gate);
    UNTIL(times(&stuck, RETURNED) == 1);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(all_are_forced_when_the_budget_has_passed) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c");
    a.drain_gate = b.drain_gate = c.drain_gate = &gate;
    a.run_gate = b.run_gate = c.run_gate = &gate;
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, after_b);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.budget = CTX_S(2);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), CTX_DEADLINE_EXCEEDED);
    EXPECT(runner.report.took <= CTX_MS(2100));
    EXPECT_EQ(runner.report.late, 3);
    const actor_t *all[] = {&a, &b, &c};
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(times(all[i], CANCELED), 1);
        EXPECT_EQ(times(all[i], FORCES), 1);
    }
    EXPECT_EQ(runner.forces, 1); /* once for all of them */
    EXPECT_EQ(runner.forced_at, CTX_S(2));
    EXPECT(runner.force_place < a.place[FORCES]);
    EXPECT(runner.force_place < b.place[FORCES]);
    gate_open(&gate);
    for (int i = 0; i < 3; i++) UNTIL(times(all[i], RETURNED) == 1 && times(all[i], DRAINS) == times(all[i], DRAINED));
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_chain_of_slow_drains_shares_one_budget) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c");
    a.drain_takes = b.drain_takes = c.drain_takes = CTX_S(2);
    join(app, &a, NULL);
    join(app, &b, after_a);
    join(app, &c, after_b);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.budget = CTX_S(5);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(c.at[DRAINED], CTX_S(2));
    EXPECT_EQ(b.at[DRAINED], CTX_S(4));
    EXPECT_EQ(a.at[DRAINED], CTX_MS(4900)); /* cut short, the grace period before the end */
    EXPECT_EQ(a.drain_deadline - T0, CTX_MS(4900));
    EXPECT(runner.report.took <= CTX_S(5));
    EXPECT(runner.report.within_budget);
    nothing_is_left();
}

TEST(each_drain_has_a_budget_of_its_own_within_that) {
    gate_t gate;
    gate_init(&gate);
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    b.drain_takes = CTX_S(3600);
    join(app, &a, NULL);
    ctx_service_desc_t desc = describe(&b);
    desc.needs = after_a;
    desc.drain_budget = CTX_S(1);
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.budget = CTX_S(5);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(b.at[DRAINED], CTX_S(1));
    EXPECT_EQ(a.at[REFUSES], CTX_S(1));
    EXPECT_EQ(runner.report.took, CTX_S(1));
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(an_orderly_shutdown_forces_nothing) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b");
    a.drain_takes = CTX_S(1);
    join(app, &a, NULL);
    join(app, &b, NULL);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT_EQ(runner.forces, 0);
    expect_stopped(&a);
    expect_stopped(&b);
    nothing_is_left();
}

/* -- the parent ------------------------------------------------------------------------------------------------- */

TEST(the_end_of_the_parent_is_a_shutdown_in_order) {
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_app_t *app = app_below(parent);
    actor_t a = actor("a"), b = actor("b");
    b.drain_takes = CTX_S(1);
    join(app, &a, NULL);
    join(app, &b, after_a);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    ctx_cancel_cause(parent, -EPERM, "enough");
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(caused_by(&runner, "enough"));
    expect_stopped(&a); /* drained first, canceled then: though the parent was canceled before */
    expect_stopped(&b);
    expect_in_order(&a, &b);
    EXPECT_EQ(a.drain_err, 0);
    EXPECT_EQ(b.at[DRAINED], CTX_S(1));
    EXPECT_EQ(runner.forces, 0);
    ctx_end(parent);
    nothing_is_left();
}

TEST(the_deadline_of_the_parent_ends_the_app) {
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(3));
    ctx_app_t *app = app_below(parent);
    actor_t a = actor("a");
    a.drain_takes = CTX_S(1);
    join(app, &a, NULL);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(a.at[REFUSES], CTX_S(3));
    EXPECT_EQ(a.at[DRAINED], CTX_S(4));
    EXPECT(caused_by(&runner, "deadline exceeded"));
    expect_stopped(&a);
    ctx_end(parent);
    nothing_is_left();
}

TEST(an_app_whose_parent_is_done_already_ends_clean) {
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_app_t *app = app_below(parent);
    actor_t a = actor("a");
    join(app, &a, NULL);
    ctx_cancel(parent);
    runner_t runner;
    prepare(&runner, app);
    run_apart(&runner);
    await_end(&runner);
    expect_orderly(&a);
    EXPECT(is_default(SIGTERM));
    ctx_end(parent);
    nothing_is_left();
}

static const ctx_key_t tenant_key = CTX_KEY(int);

static int sees_the_tenant(ctx_t *ctx, void *user) {
    const int *tenant = (const int *)ctx_value(ctx, &tenant_key);
    add((int *)user, tenant ? *tenant : 1000);
    return 0;
}

TEST(services_see_the_values_of_the_parent) {
    const int tenant = 7;
    int sum = 0;
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_value(ctx_background(), &tenant_key, &tenant);
    ctx_app_t *app = app_below(parent);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "a";
    desc.start = desc.run = desc.drain = sees_the_tenant;
    desc.user = &sum;
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT_EQ(load(&sum), 21);
    ctx_end(parent);
    nothing_is_left();
}

/* -- many and none ---------------------------------------------------------------------------------------------- */

TEST(an_app_without_services_waits_for_its_signal) {
    ctx_app_t *app = new_app();
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    pass(CTX_S(1));
    EXPECT_EQ(load(&runner.done), 0);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT(runner.report.total == 0 && runner.report.n == 0 && runner.report.within_budget);
    EXPECT_EQ(runner.report.took, 0);
    nothing_is_left();
}

TEST(nothing_in_the_description_is_needed) {
    ctx_clock_fake(T0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_cancel(parent);
    EXPECT_EQ(ctx_app_run(app_below(parent), NULL), 0);
    ctx_end(parent);
    nothing_is_left();
}

enum { MANY = 200 };

static char many_names[MANY][16];
static actor_t many[MANY];

static void make_many(void) {
    for (int i = 0; i < MANY; i++) {
        snprintf(many_names[i], sizeof many_names[i], "s%d", i);
        many[i] = actor(many_names[i]);
    }
}

TEST(two_hundred_services_stop_together) {
    gate_t gate;
    gate_init(&gate);
    make_many();
    ctx_app_t *app = new_app();
    many[77].run_gate = &gate;
    for (int i = 0; i < MANY; i++) join(app, &many[i], NULL);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(runner.report.total, MANY);
    EXPECT_EQ(runner.report.n, CTX_SHUTDOWN_PARTS);
    EXPECT_EQ(runner.report.late, 1);
    EXPECT(part_of(&runner.report, "s77")->late); /* the late ones are always named */
    gate_open(&gate);
    UNTIL(times(&many[77], RETURNED) == 1);
    for (int i = 0; i < MANY; i++)
        if (i != 77) expect_stopped(&many[i]);
    gate_destroy(&gate);
    nothing_is_left();
}

TEST(a_chain_of_two_hundred_services_keeps_its_order) {
    static const char *after[MANY][2];
    make_many();
    ctx_app_t *app = new_app();
    for (int i = MANY - 1; i >= 0; i--) {
        after[i][0] = i ? many_names[i - 1] : NULL;
        join(app, &many[i], after[i]);
    }
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    for (int i = 0; i < MANY; i++) {
        expect_stopped(&many[i]);
        if (i) expect_in_order(&many[i - 1], &many[i]);
    }
    nothing_is_left();
}

TEST(an_app_may_run_after_another) {
    for (int i = 0; i < 5; i++) {
        ctx_app_t *app = new_app();
        actor_t a = actor("a");
        join(app, &a, NULL);
        runner_t runner;
        prepare(&runner, app);
        run_until_ready(&runner);
        send_self(i % 2 ? SIGINT : SIGTERM);
        EXPECT_EQ(await_end(&runner), 0);
        EXPECT(caused_by(&runner, i % 2 ? "SIGINT" : "SIGTERM"));
    }
    nothing_is_left();
}

/* -- the report ------------------------------------------------------------------------------------------------- */

TEST(the_parts_are_in_the_order_of_their_turns) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a"), b = actor("b"), c = actor("c");
    a.drain_takes = b.drain_takes = c.drain_takes = CTX_MS(500);
    join(app, &b, after_a);
    join(app, &a, NULL);
    join(app, &c, after_b);
    runner_t runner;
    prepare(&runner, app);
    run_until_ready(&runner);
    pass(CTX_S(1)); /* times count from the beginning of the shutdown */
    ctx_time_t from = ctx_now();
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    const char *const names[] = {"c", "b", "a"};
    EXPECT_EQ(runner.report.n, 3);
    for (int i = 0; i < 3; i++) {
        const ctx_shutdown_part_t *part = &runner.report.parts[i];
        EXPECT(strcmp(part->name, names[i]) == 0);
        EXPECT_EQ(part->began_at, CTX_MS(500) * i);
        EXPECT_EQ(part->noticed_at, CTX_MS(500) * i);
        EXPECT_EQ(part->drained_at, CTX_MS(500) * (i + 1));
        EXPECT_EQ(part->canceled_at, CTX_MS(500) * (i + 1));
        EXPECT_EQ(part->finished_at, CTX_MS(500) * (i + 1));
        EXPECT(part->forced_at < 0 && part->rc == 0 && !part->late);
    }
    EXPECT_EQ(runner.report.took, CTX_MS(1500));
    EXPECT_EQ(a.at[REFUSES], from - T0 + CTX_S(1));
    nothing_is_left();
}

TEST(the_slowest_parts_are_kept) {
    make_many();
    ctx_app_t *app = new_app();
    for (int i = 0; i < 100; i++) {
        if (i % 2) many[i].drain_takes = CTX_MS(200);
        join(app, &many[i], NULL);
    }
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT_EQ(runner.report.total, 100);
    EXPECT_EQ(runner.report.n, CTX_SHUTDOWN_PARTS);
    for (int i = 1; i < 100; i += 2) part_of(&runner.report, many_names[i]);
    nothing_is_left();
}

static int says_what_it_dropped(ctx_t *ctx, void *user) {
    (void)ctx;
    ctx_shutdown_dropped((uint64_t)(uintptr_t)user);
    return 0;
}

TEST(what_was_dropped_is_summed_up) {
    ctx_app_t *app = new_app();
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.drain = says_what_it_dropped;
    desc.name = "a";
    desc.user = (void *)(uintptr_t)5;
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
    desc.name = "b";
    desc.user = (void *)(uintptr_t)70;
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    EXPECT_EQ(runner.report.dropped, 75);
    EXPECT_EQ(part_of(&runner.report, "a")->dropped, 5);
    EXPECT_EQ(part_of(&runner.report, "b")->dropped, 70);
    nothing_is_left();
}

typedef struct {
    ctx_pool_t *pool;
    gate_t gate;
} cargo_t;

static int stands_at_the_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

static int drains_a_pool(ctx_t *ctx, void *user) {
    ctx_pool_drain(((cargo_t *)user)->pool, ctx_remaining(ctx), NULL);
    return 0;
}

TEST(what_a_drained_pool_drops_shows_in_the_report) {
    cargo_t cargo;
    gate_init(&cargo.gate);
    ctx_app_t *app = new_app();
    ctx_pool_desc_t pool;
    memset(&pool, 0, sizeof pool);
    pool.workers = 1;
    pool.grace = -1;
    cargo.pool = ctx_pool_new(ctx_background(), &pool);
    if (!cargo.pool) abort();
    for (int i = 0; i < 4; i++)
        EXPECT_EQ(ctx_pool_submit(cargo.pool, ctx_background(), "cargo", stands_at_the_gate, &cargo.gate), 0);
    gate_await(&cargo.gate, 1);
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "hold";
    desc.drain = drains_a_pool;
    desc.user = &cargo;
    EXPECT_EQ(ctx_app_add(app, &desc), 0);
    runner_t runner;
    prepare(&runner, app);
    runner.desc.budget = CTX_S(2);
    run_until_ready(&runner);
    send_self(SIGTERM);
    EXPECT_EQ(await_end(&runner), 0);
    EXPECT_EQ(runner.report.took, CTX_MS(1900)); /* so long the pool had */
    EXPECT_EQ(runner.report.dropped, 3);
    EXPECT_EQ(part_of(&runner.report, "hold")->dropped, 3);
    EXPECT_EQ(part_of(&runner.report, "hold")->stuck, 1);
    EXPECT_EQ(runner.report.stuck, 1);
    EXPECT(!runner.report.within_budget);
    gate_open(&cargo.gate);
    ctx_pool_free(cargo.pool);
    gate_destroy(&cargo.gate);
    nothing_is_left();
}

/* -- printing --------------------------------------------------------------------------------------------------- */

/* The text of a report; to be freed. */
static char *drawn(const ctx_shutdown_report_t *report) {
    char *text = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&text, &size);
    if (!file) abort();
    EXPECT_EQ(ctx_shutdown_print(report, file), 0);
    fclose(file);
    return text;
}

static int lines_of(const char *text) {
    int n = 0;
    for (; *text; text++) n += *text == '\n';
    return n;
}

static int widest(const char *text) {
    int most = 0, width = 0;
    for (; *text; text++) {
        width = *text == '\n' ? 0 : width + ((*text & 0xc0) != 0x80); /* a character in UTF-8 is one column */
        if (width > most) most = width;
    }
    return most;
}

/* A copy of the line that begins with the name, after blanks; "" if there is none. */
static const char *line_of(const char *text, const char *name) {
    static char line[512];
    while (*text) {
        const char *end = strchr(text, '\n'), *at = text;
        size_t size = end ? (size_t)(end - text) : strlen(text);
        while (*at == ' ') at++;
        if (strncmp(at, name, strlen(name)) == 0 && at[strlen(name)] == ' ') {
            if (size >= sizeof line) size = sizeof line - 1;
            memcpy(line, text, size);
            line[size] = '\0';
            return line;
        }
        text += size + (end ? 1 : 0);
    }
    line[0] = '\0';
    return line;
}

static void expect_plain(const char *text) {
    EXPECT(text[0] && text[strlen(text) - 1] == '\n');
    EXPECT(strstr(text, "(null)") == NULL && strstr(text, "nan") == NULL && strstr(text, "inf") == NULL);
}

/* The columns that the bar of a part covers: the last is one after its end. */
static void bar_of(const char *text, const char *name, int *first, int *last) {
    const char *line = line_of(text, name), *left = strchr(line, '|'), *right = strrchr(line, '|');
    *first = *last = -1;
    EXPECT(left && right && left < right);
    for (const char *at = left; at && at < right; at++) {
        if (*at == ' ' || *at == '|') continue;
        if (*first < 0) *first = (int)(at - left);
        *last = (int)(at - left) + 1;
    }
}

static ctx_shutdown_part_t drawn_part(const char *name, ctx_dur_t began, ctx_dur_t drained, ctx_dur_t finished) {
    ctx_shutdown_part_t p;
    memset(&p, 0, sizeof p);
    p.name = name;
    p.began_at = p.noticed_at = began;
    p.drained_at = p.canceled_at = drained;
    p.forced_at = -1;
    p.finished_at = finished;
    return p;
}

static ctx_shutdown_report_t report_of(size_t n) {
    ctx_shutdown_report_t report;
    memset(&report, 0, sizeof report);
    report.cause = "SIGTERM";
    report.budget = CTX_S(25);
    report.took = CTX_S(4);
    report.within_budget = true;
    report.total = report.n = n;
    return report;
}

TEST(a_drawn_report_has_a_line_of_facts_and_one_for_each_component) {
    ctx_shutdown_report_t report = report_of(3);
    report.dropped = 1234;
    report.parts[0] = drawn_part("http", 0, CTX_S(1), CTX_S(1));
    report.parts[1] = drawn_part("writer", CTX_S(1), CTX_S(2), CTX_S(3));
    report.parts[2] = drawn_part("database", CTX_S(3), CTX_S(4), CTX_S(4));
    char *text = drawn(&report);
    expect_plain(text);
    EXPECT(lines_of(text) >= 4);
    EXPECT(strstr(text, "SIGTERM") && strstr(text, "SIGTERM") < strchr(text, '\n'));
    EXPECT(strstr(text, "1234"));
    EXPECT(line_of(text, "http")[0] && line_of(text, "writer")[0] && line_of(text, "database")[0]);
    EXPECT(strstr(text, "http") < strstr(text, "writer") && strstr(text, "writer") < strstr(text, "database"));
    free(text);
}

TEST(the_bars_lie_where_their_times_are) {
    ctx_shutdown_report_t report = report_of(4);
    report.parts[0] = drawn_part("http", 0, CTX_S(1), CTX_S(1));
    report.parts[1] = drawn_part("writer", CTX_S(1), CTX_S(2), CTX_S(3));
    report.parts[2] = drawn_part("database", CTX_S(3), CTX_S(4), CTX_S(4));
    report.parts[3] = drawn_part("whole", 0, CTX_S(4), CTX_S(4));
    char *text = drawn(&report);
    int from[4], to[4];
    bar_of(text, "http", &from[0], &to[0]);
    bar_of(text, "writer", &from[1], &to[1]);
    bar_of(text, "database", &from[2], &to[2]);
    bar_of(text, "whole", &from[3], &to[3]);
    for (int i = 0; i < 2; i++) EXPECT(to[i] <= from[i + 1] + 1); /* one began when the other had ended */
    EXPECT(to[1] - from[1] > to[0] - from[0] && to[1] - from[1] > to[2] - from[2]);
    EXPECT(from[3] == from[0] && to[3] == to[2]);
    free(text);
}

TEST(a_drawn_report_says_that_something_is_stuck) {
    ctx_shutdown_report_t report = report_of(1);
    report.parts[0] = drawn_part("writer", 0, CTX_S(1), CTX_S(1));
    char *text = drawn(&report);
    EXPECT(strstr(text, "inside the budget") && strstr(text, "stuck: 0"));
    free(text);
    report.stuck = report.parts[0].stuck = 17;
    report.within_budget = false;
    text = drawn(&report);
    EXPECT(strstr(text, "something is stuck") && strstr(text, "something is stuck") < strchr(text, '\n'));
    EXPECT(strstr(text, "stuck: 17"));
    EXPECT(strstr(line_of(text, "writer"), "17 stuck"));
    free(text);
}

TEST(no_line_of_a_drawn_report_is_wider_than_100_columns) {
    ctx_shutdown_report_t report = report_of(2);
    report.parts[0] = drawn_part("a-component-with-a-name-of-more-than-forty-characters", 0, CTX_S(1), CTX_S(12));
    report.parts[1] = drawn_part("stubborn", 0, CTX_S(1), -1);
    report.parts[1].late = true;
    for (int i = 0; i < 2; i++) {
        report.parts[i].rc = CTX_DEADLINE_EXCEEDED;
        report.parts[i].dropped = 1234567;
        report.parts[i].stuck = 123;
    }
    report.total = 12;
    report.late = 1;
    report.dropped = 2469134;
    report.took = CTX_S(25);
    report.lame_duck = CTX_S(10);
    report.forced = true;
    report.within_budget = false;
    report.rc = CTX_DEADLINE_EXCEEDED;
    char *text = drawn(&report);
    expect_plain(text);
    EXPECT(widest(text) <= 100);
    free(text);
}

TEST(a_drawn_report_shows_who_is_late) {
    ctx_shutdown_report_t report = report_of(2);
    report.parts[0] = drawn_part("prompt", 0, CTX_S(1), CTX_S(1));
    report.parts[1] = drawn_part("stubborn", 0, CTX_S(1), -1);
    report.parts[1].forced_at = CTX_S(2);
    report.parts[1].late = true;
    report.late = 1;
    report.within_budget = false;
    report.rc = CTX_DEADLINE_EXCEEDED;
    char *text = drawn(&report);
    expect_plain(text);
    EXPECT(strstr(line_of(text, "stubborn"), "LATE") != NULL);
    EXPECT(strstr(line_of(text, "prompt"), "LATE") == NULL);
    free(text);
}

TEST(a_report_of_nothing_can_be_drawn) {
    ctx_shutdown_report_t report = report_of(0);
    report.took = 0;
    char *text = drawn(&report);
    expect_plain(text);
    free(text);
    memset(&report, 0, sizeof report);
    text = drawn(&report);
    expect_plain(text);
    free(text);
}

TEST(a_report_of_more_than_it_holds_says_how_many) {
    static char names[CTX_SHUTDOWN_PARTS][16];
    ctx_shutdown_report_t report = report_of(CTX_SHUTDOWN_PARTS);
    report.total = 100;
    for (int i = 0; i < CTX_SHUTDOWN_PARTS; i++) {
        snprintf(names[i], sizeof names[i], "part%d", i);
        report.parts[i] = drawn_part(names[i], 0, CTX_MS(i), CTX_MS(i));
    }
    char *text = drawn(&report);
    expect_plain(text);
    for (int i = 0; i < CTX_SHUTDOWN_PARTS; i++) EXPECT(line_of(text, names[i])[0]);
    EXPECT(strstr(text, "100") || strstr(text, "36"));
    free(text);
}

TEST(odd_times_and_names_are_drawn_all_the_same) {
    static char endless[5000];
    static const ctx_dur_t odd[] = {INT64_MIN, -1, 0, 1, CTX_S(3600) * 24 * 365, INT64_MAX};
    enum { ODD = sizeof odd / sizeof odd[0] };
    memset(endless, 'x', sizeof endless - 1);
    const char *const names[] = {endless, "", NULL, "\xc3\xa9t\xc3\xa9", "line\nbreak"};
    for (int i = 0; i < ODD * ODD; i++) {
        ctx_shutdown_report_t report = report_of(5);
        report.took = odd[i % ODD];
        report.budget = odd[i / ODD];
        report.lame_duck = odd[(i / 2) % ODD];
        report.dropped = UINT64_MAX;
        report.late = SIZE_MAX;
        report.rc = i % 2 ? INT_MIN : -EIO;
        if (i % 3 == 0) report.cause = endless;
        for (int k = 0; k < 5; k++) {
            ctx_shutdown_part_t *p = &report.parts[k];
            *p = drawn_part(names[k], odd[(i + k) % ODD], odd[(i / ODD + k) % ODD], odd[(i * 5 + k) % ODD]);
            p->canceled_at = odd[(i + 2 * k) % ODD];
            p->forced_at = odd[(i * 7 + k) % ODD];
            p->noticed_at = odd[(i * 3 + k) % ODD];
            p->dropped = p->stuck = UINT64_MAX;
            p->late = (i + k) % 2 != 0;
            p->rc = INT_MIN;
        }
        char *text = drawn(&report);
        expect_plain(text);
        free(text);
    }
}

TEST(the_report_of_a_real_shutdown_is_drawn_within_100_columns) {
    ctx_app_t *app = new_app();
    actor_t a = actor("a-component-with-a-name-of-more-than-forty-characters"), b = actor("b");
    a.drain_takes = CTX_S(1);
    join(app, &a, NULL);
    join(app, &b, NULL);
    runner_t runner;
    EXPECT_EQ(run_and_terminate(&runner, app), 0);
    char *text = drawn(&runner.report);
    expect_plain(text);
    EXPECT(widest(text) <= 100);
    EXPECT(lines_of(text) >= 3);
    free(text);
    nothing_is_left();
}

TEST(a_file_that_cannot_be_written_is_an_error) {
    ctx_shutdown_report_t report = report_of(2);
    report.parts[0] = drawn_part("a", 0, CTX_S(1), CTX_S(1));
    report.parts[1] = drawn_part("b", 0, CTX_S(1), CTX_S(1));
    FILE *file = fopen("/dev/full", "w");
    if (!file) SKIP("there is no /dev/full here");
    EXPECT_EQ(ctx_shutdown_print(&report, file), -ENOSPC);
    fclose(file);
    file = fopen("/dev/full", "w");
    if (file) setvbuf(file, NULL, _IONBF, 0);
    if (file) EXPECT_EQ(ctx_shutdown_print(&report, file), -ENOSPC);
    if (file) fclose(file);
}

TEST(a_print_without_report_or_file_is_invalid) {
    ctx_shutdown_report_t report = report_of(0);
    EXPECT_EQ(ctx_shutdown_print(NULL, stderr), CTX_INVALID);
    EXPECT_EQ(ctx_shutdown_print(&report, NULL), CTX_INVALID);
}

TEST_MAIN
