/* Services, apps and cleanups: their stops against starts, failures, frees, second signals, and against each other. */
#include <pthread.h>

/* The library's own threads are joined by their numbers, also those that it detaches. */
static pthread_t self(void);
#undef pthread_self
#undef pthread_detach
#define pthread_self() self()
#define pthread_detach(thread) ((void)(thread))
#include "sched.h"

static bool own[SCHED_THREADS]; /* has that thread been in the library's main function of a runner? */
static pthread_t self(void) {
    own[sched_thread()] = true;
    return (pthread_t)sched_thread();
}

/* -- a service that checks the order of its callbacks -- */

static ctx_service_t *service, *sibling;
static uint32_t started, ran, refused, drained, forced, undrained; /* [atomic] how often; drains that have not ended */

/* Threads wait for each other asleep, for where a thread spins no time passes. */
typedef struct {
    ctx_t *opened;
} gate_t;
static gate_t let_go, inside, done;
static void gates(void) {
    let_go.opened = ctx_with_cancel(ctx_background());
    inside.opened = ctx_with_cancel(ctx_background());
    done.opened = ctx_with_cancel(ctx_background());
}
static void open_gate(gate_t *gate) { ctx_cancel(gate->opened); }
static void pass(gate_t *gate) { ctx_wait(gate->opened, CTX_FOREVER); }

static bool stuck_run, stuck_drain, fails, run_stops, drain_stops;
static int start_rc, stop_rc[2];

static void end_runtime(void) {
    int i;
    ctx_runtime_stop();
    for (i = 0; i < SCHED_THREADS; i++)
        if (own[i]) ctx__sched_join((pthread_t)i);
    ctx_end(let_go.opened);
    ctx_end(inside.opened);
    ctx_end(done.opened);
}

static uint32_t count(uint32_t *n) { return CTX__ADD(n, 1u, SEQ_CST); }
static uint32_t times(uint32_t *n) { return CTX__LOAD(n, SEQ_CST); }

static int start(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    SCHED_CHECK(count(&started) == 0);
    return 0;
}
static int run(ctx_t *ctx, void *user) {
    (void)user;
    SCHED_CHECK(count(&ran) == 0);
    if (fails) return -EIO;
    if (run_stops) SCHED_CHECK(ctx_service_stop(service, CTX_FOREVER, NULL) == 0);
    open_gate(&inside);
    if (stuck_run) pass(&let_go);
    return ctx_wait(ctx, CTX_FOREVER);
}
static void refuse(void *user) {
    (void)user;
    SCHED_CHECK(count(&refused) == 0 && times(&started) == 1);
    SCHED_CHECK(times(&drained) == 0);
}
static int drain(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    SCHED_CHECK(count(&drained) == 0 && times(&refused) == 1);
    count(&undrained);
    if (drain_stops) SCHED_CHECK(ctx_service_stop(service, CTX_FOREVER, NULL) == 0);
    if (stuck_drain) pass(&let_go);
    CTX__SUB(&undrained, 1u, SEQ_CST);
    return 0;
}
static void force(void *user) {
    (void)user;
    SCHED_CHECK(count(&forced) == 0 && ctx_err(service->ctx) != 0);
    open_gate(&let_go);
}

static ctx_service_desc_t only_run(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.start = start;
    desc.run = run;
    desc.grace = CTX_MS(1);
    return desc;
}
static ctx_service_desc_t only_drain(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.start = start;
    desc.refuse = refuse;
    desc.drain = drain;
    desc.grace = CTX_MS(1);
    return desc;
}

static void make(const ctx_service_desc_t *desc) {
    gates();
    service = ctx_service_new(ctx_background(), desc);
}
static void setup_run(void) {
    ctx_service_desc_t desc = only_run();
    make(&desc);
}
static void setup_drain(void) {
    ctx_service_desc_t desc = only_drain();
    make(&desc);
}
static void setup_forced(void) {
    ctx_service_desc_t desc = only_drain();
    desc.force = force;
    stuck_drain = true;
    make(&desc);
    ctx_service_start(service);
}
static void setup_running(void) {
    setup_run();
    ctx_service_start(service);
}
static void setup_draining(void) {
    setup_drain();
    ctx_service_start(service);
}

static void start_service(void) {
    start_rc = ctx_service_start(service);
    SCHED_CHECK(start_rc == 0 || start_rc == CTX_CLOSED || start_rc == CTX_CANCELED);
}
static void stop(int i) {
    stop_rc[i] = ctx_service_stop(service, CTX_FOREVER, NULL);
    SCHED_CHECK(drain_stops || times(&undrained) == 0);
}
static void stop_first(void) { stop(0); }
static void stop_second(void) { stop(1); }
static void stop_inside(void) {
    pass(&inside);
    stop(0);
}
static void stop_short(void) {
    ctx_shutdown_report_t report;
    int rc = ctx_service_stop(service, CTX_MS(2), &report);
    SCHED_CHECK(rc == (report.within_budget ? 0 : CTX_DEADLINE_EXCEEDED));
}
static void stop_start(void) {
    stop_first();
    SCHED_CHECK(ctx_service_start(service) == CTX_CLOSED);
}

/* Nothing is called after this, and what was begun has ended. */
static void end_service(void) {
    ctx_service_free(service);
    end_runtime();
}
static void check_drained(void) {
    SCHED_CHECK(stop_rc[0] == 0 && stop_rc[1] == 0);
    SCHED_CHECK(times(&drained) == times(&started) && times(&refused) == times(&started));
    if (start_rc == 0) SCHED_CHECK(times(&started) == 1);
    end_service();
}
static void check_ran(void) {
    SCHED_CHECK(stop_rc[0] == 0 && stop_rc[1] == 0);
    SCHED_CHECK(times(&ran) == (start_rc == 0 ? 1 : 0));
    end_service();
}
static void check_forced(void) {
    open_gate(&let_go);
    end_service();
    SCHED_CHECK(times(&forced) <= 1 && times(&refused) <= 1 && times(&drained) <= 1);
}

/* -- a run that fails -- */

static void setup_fails(void) {
    ctx_service_desc_t desc = only_run();
    fails = true;
    desc.start = NULL;
    make(&desc);
    memset(&desc, 0, sizeof desc);
    sibling = ctx_service_new(ctx_background(), &desc);
}
static void start_fails(void) { SCHED_CHECK(ctx_service_start(service) == 0); }
static void stop_failed(void) {
    int rc = ctx_service_stop(service, CTX_FOREVER, NULL);
    SCHED_CHECK(rc == 0 || rc == -EIO);
    stop_rc[1] = rc;
}
static void stop_sibling(void) { SCHED_CHECK(ctx_service_stop(sibling, CTX_FOREVER, NULL) == 0); }
static void check_failed(void) {
    SCHED_CHECK(ctx_service_stop(service, CTX_FOREVER, NULL) == (times(&ran) ? -EIO : 0));
    ctx_service_free(sibling);
    end_service();
}
static void start_stop_failed(void) {
    start_fails();
    stop_failed();
    SCHED_CHECK(stop_rc[1] == -EIO);
}

/* The parent is done, so no start goes well. */
static void setup_done(void) {
    ctx_service_desc_t desc = only_run();
    ctx_t *below = ctx_with_cancel(ctx_background());
    gates();
    service = ctx_service_new(below, &desc);
    ctx_end(below);
}

/* -- a stop from inside -- */

static void setup_self(void) {
    ctx_service_desc_t desc = only_drain();
    run_stops = true;
    desc.run = run;
    make(&desc);
}
static void setup_self_drain(void) {
    drain_stops = true;
    setup_draining();
}

/* -- left behind -- */

static void setup_stuck(void) {
    stuck_run = true;
    setup_run();
    ctx_service_start(service);
}
static void free_stuck(void) {
    pass(&inside);
    ctx_service_free(service);
    open_gate(&done);
}
static void lets_go(void) { open_gate(&let_go); }
static void lets_go_later(void) {
    pass(&done);
    open_gate(&let_go);
}
static void check_nothing(void) { end_runtime(); }

/* -- without memory for threads -- */

static void no_threads(void) { sched_malloc_most = 0; }
static void stop_without(void) {
    no_threads();
    stop_first();
}
static void check_without(void) {
    sched_malloc_most = SIZE_MAX;
    check_drained();
}
static void stop_forced_without(void) {
    no_threads();
    stop_short();
}
static void check_forced_without(void) {
    sched_malloc_most = SIZE_MAX;
    check_forced();
}

/* -- apps -- */

static ctx_app_t *app;
static ctx_t *first, *second, *parent;
static uint32_t hooked; /* [atomic] */
static int app_rc;
static const int no_signals[] = { 0 };
static ctx_shutdown_report_t app_report;

static int app_start(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    first = ctx_retain(app->first);
    second = ctx_retain(app->second);
    open_gate(&inside);
    return 0;
}
static int app_run(ctx_t *ctx, void *user) {
    (void)user;
    return ctx_wait(ctx, CTX_FOREVER);
}
static int app_drain(ctx_t *ctx, void *user) {
    (void)user;
    SCHED_CHECK(ctx_err(ctx_app_ctx(app)) == CTX_CANCELED);
    SCHED_CHECK(count(&drained) == 0);
    if (!stuck_drain) return 0;
    pass(&let_go);
    return ctx_err(ctx);
}
static void app_force(void *user) {
    (void)user;
    SCHED_CHECK(count(&forced) == 0 && times(&hooked) == 1);
    open_gate(&let_go);
}
static void on_force(void *user) {
    (void)user;
    SCHED_CHECK(count(&hooked) == 0 && times(&forced) == 0);
}
static void setup_app_of(ctx_service_desc_t desc) {
    gates();
    app = ctx_app_new(ctx_background());
    desc.name = "a";
    desc.start = app_start;
    ctx_app_add(app, &desc);
}
static void setup_app(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.run = app_run;
    setup_app_of(desc);
}
static void setup_app_forced(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    stuck_drain = true;
    desc.drain = app_drain;
    desc.force = app_force;
    desc.grace = CTX_FOREVER; /* so only on_force lets it be forced */
    setup_app_of(desc);
}
static void run_app(void) {
    ctx_app_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.signals = no_signals;
    desc.budget = CTX_FOREVER;
    desc.on_force = on_force;
    desc.report = &app_report;
    app_rc = ctx_app_run(app, &desc);
}
static void signal_twice(void) {
    pass(&inside);
    ctx_cancel(first);
    ctx_cancel(second);
}
static void signal_first(void) {
    pass(&inside);
    ctx_cancel(first);
}
static void signal_second(void) {
    pass(&inside);
    ctx_cancel(second);
}
static void check_app(void) {
    SCHED_CHECK(app_rc == 0 || app_rc == CTX_DEADLINE_EXCEEDED);
    ctx_release(first);
    ctx_release(second);
    end_runtime();
    SCHED_CHECK(times(&hooked) <= 1);
}
static void check_app_forced(void) {
    check_app();
    SCHED_CHECK(times(&hooked) == 1 && times(&drained) <= times(&forced));
}

/* One of its services goes on, and asks. */
static int asks(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    SCHED_CHECK(!ctx_app_ready(app));
    pass(&done);
    SCHED_CHECK(!ctx_app_ready(app));
    SCHED_CHECK(ctx_err(ctx_app_ctx(app)) == CTX_CANCELED); /* the app may be freed by now */
    return 0;
}
static void setup_asks(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    parent = ctx_with_cancel(ctx_background());
    gates();
    app = ctx_app_new(parent);
    desc.name = "health";
    desc.start = asks;
    desc.grace = -1;
    ctx_app_add(app, &desc);
}
static void run_asked(void) {
    ctx_app_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.signals = no_signals;
    desc.budget = 1;
    ctx_app_run(app, &desc);
    open_gate(&done);
}
static void cancel_parent(void) { ctx_cancel(parent); }
static void check_asked(void) {
    ctx_end(parent);
    end_runtime();
}

/* What start wrote is visible where the app is ready: with races.c. */
static int data;
static int writes(ctx_t *ctx, void *user) {
    (void)ctx;
    (void)user;
    data = 1;
    return 0;
}
static void setup_ready(void) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    gates();
    parent = ctx_with_cancel(ctx_background());
    app = ctx_app_new(parent);
    desc.name = "a";
    desc.start = writes;
    ctx_app_add(app, &desc);
    CTX__ADD(&app->refs, 1u, RELAXED); /* so that another thread may ask until the end */
}
static void run_ready(void) {
    ctx_app_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.signals = no_signals;
    desc.budget = CTX_FOREVER;
    app_rc = ctx_app_run(app, &desc);
    SCHED_CHECK(app_rc == 0 || app_rc == CTX_DEADLINE_EXCEEDED); /* start may take longer than its grace period */
}
static void asks_then_cancels(void) {
    if (ctx_app_ready(app)) SCHED_CHECK(data == 1);
    ctx_cancel(parent);
}
static void check_ready(void) {
    SCHED_CHECK(!ctx_app_ready(app));
    ctx__app_unref(app);
    check_asked();
}

/* -- cleanups -- */

static ctx_cleanup_t cleanup;
static uint32_t cleaned[3], lates; /* [atomic] */
static ctx_shutdown_report_t reports[2];
static int cleaned_rc[2];

static int cleans(ctx_t *ctx, void *n) {
    (void)ctx;
    SCHED_CHECK(count((uint32_t *)n) == 0);
    return 0;
}
static int cleans_after(ctx_t *ctx, void *n) {
    SCHED_CHECK(times(&cleaned[0]) == 1);
    return cleans(ctx, n);
}
static int cleans_stuck(ctx_t *ctx, void *n) {
    pass(&let_go);
    return cleans(ctx, n);
}
static void late(const char *name, int rc, ctx_dur_t took, void *n) {
    (void)name;
    SCHED_CHECK(rc == 0 && took >= 0 && times((uint32_t *)n) == 1);
    SCHED_CHECK(count(&lates) == 0);
}
static void add_cleanup(int i, ctx_task_fn fn, bool critical) {
    ctx_cleanup_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.fn = fn;
    desc.arg = &cleaned[i];
    desc.critical = critical;
    desc.on_late = late;
    SCHED_CHECK(ctx_cleanup_add(&cleanup, &desc) == 0);
}
static int cleans_and_adds(ctx_t *ctx, void *n) {
    add_cleanup(1, cleans, false);
    return cleans(ctx, n);
}
static void setup_cleanup(void) {
    gates();
    add_cleanup(0, cleans, false);
}
static void setup_adds(void) {
    gates();
    add_cleanup(0, cleans_and_adds, false);
}
static void setup_critical(void) {
    gates();
    add_cleanup(1, cleans_after, false);
    add_cleanup(0, cleans, true);
}
/* The first waits for the one that is added. */
static int cleans_and_opens(ctx_t *ctx, void *n) {
    open_gate(&let_go);
    return cleans(ctx, n);
}
static void add_opener(void) { add_cleanup(1, cleans_and_opens, false); }
static void setup_late(void) {
    gates();
    add_cleanup(0, cleans_stuck, false);
}
static void add_second(void) { add_cleanup(1, cleans, false); }
static void clean(int i, ctx_dur_t budget) { cleaned_rc[i] = ctx_cleanup_run(&cleanup, budget, &reports[i]); }
static void clean_first(void) { clean(0, CTX_FOREVER); }
static void clean_second(void) { clean(1, CTX_FOREVER); }
static void clean_short(void) { clean(0, CTX_MS(1)); }
static void add_clean(void) {
    add_second();
    clean_second();
}
static void clean_add_clean(void) {
    clean_second();
    add_clean();
}
static void check_cleaned(void) {
    SCHED_CHECK(cleaned_rc[0] == 0 && cleaned_rc[1] == 0);
    SCHED_CHECK(ctx_cleanup_run(&cleanup, CTX_FOREVER, NULL) == 0);
    SCHED_CHECK(times(&cleaned[0]) == 1 && times(&lates) == 0);
    end_runtime();
}
static void check_both_cleaned(void) {
    check_cleaned();
    SCHED_CHECK(times(&cleaned[1]) == 1);
}
static void check_added_ran(void) {
    SCHED_CHECK(times(&cleaned[1]) == 1 && reports[0].total == 2); /* in the same run */
    check_cleaned();
}
static void check_late(void) {
    uint32_t expected = reports[0].late ? 1 : 0;
    SCHED_CHECK(cleaned_rc[0] == (expected ? CTX_DEADLINE_EXCEEDED : 0));
    end_runtime();
    SCHED_CHECK(times(&cleaned[0]) == 1 && times(&lates) == expected);
}

static const sched_scenario_t scenarios[] = {
    { "service: start / stop", setup_drain, { T(start_service), T(stop_first) }, check_drained, false },
    { "service: start / stop / stop", setup_drain,
      { T(start_service), T(stop_first), T(stop_second) }, check_drained, false },
    { "service: start with a run / stop", setup_run, { T(start_service), T(stop_first) }, check_ran, false },
    { "service: start with a run / stop of that", setup_run, { T(start_service), T(stop_inside) }, check_ran, false },
    { "service: start / stop, start", setup_drain, { T(start_service), T(stop_start) }, check_drained, false },
    { "service: stop / stop", setup_draining, { T(stop_first), T(stop_second) }, check_drained, false },
    { "service: run, stop / stop", setup_running, { T(stop_first), T(stop_second) }, check_ran, false },
    { "service: drain, force / short stop", setup_forced, { T(stop_short), T(stop_short) }, check_forced, false },
    { "service: start that fails / stop", setup_fails, { T(start_fails), T(stop_sibling) }, check_failed, false },
    { "service: start below a done parent / stop", setup_done, { T(start_service), T(stop_first) }, check_ran, false },
    { "service: run that fails / stop", setup_fails, { T(start_stop_failed), T(stop_sibling) }, check_failed, false },
    { "service: stop from run / stop", setup_self, { T(start_service), T(stop_first) }, check_ran, false },
    { "service: stop from drain / stop", setup_self_drain, { T(stop_first), T(stop_second) }, check_drained, false },
    { "service: free / stuck run", setup_stuck, { T(free_stuck), T(lets_go_later) }, check_nothing, false },
    { "service: free / run that ends", setup_stuck, { T(free_stuck), T(lets_go) }, check_nothing, false },
    { "service: stop without threads", setup_draining, { T(stop_without), T(stop_second) }, check_without, false },
    { "service: force without threads", setup_forced, { T(stop_forced_without) }, check_forced_without, false },
    { "service: app / signal", setup_app, { T(run_app), T(signal_first) }, check_app, false },
    { "service: app / signals", setup_app, { T(run_app), T(signal_twice) }, check_app, false },
    { "service: app / signal / second signal", setup_app,
      { T(run_app), T(signal_first), T(signal_second) }, check_app, false },
    { "service: app to force / signals", setup_app_forced, { T(run_app), T(signal_twice) }, check_app_forced, false },
    { "service: app asked late / cancel", setup_asks, { T(run_asked), T(cancel_parent) }, check_asked, false },
    { "service: app ready / read", setup_ready, { T(run_ready), T(asks_then_cancels) }, check_ready, false },
    { "service: cleanup / add", setup_cleanup, { T(clean_first), T(add_clean) }, check_both_cleaned, false },
    { "service: cleanup / cleanup, add", setup_cleanup,
      { T(clean_first), T(clean_add_clean) }, check_both_cleaned, false },
    { "service: cleanup that waits / add", setup_late, { T(clean_first), T(add_opener) }, check_both_cleaned, false },
    { "service: cleanup / cleanup", setup_critical, { T(clean_first), T(clean_second) }, check_both_cleaned, false },
    { "service: cleanup that adds", setup_adds, { T(clean_first) }, check_added_ran, false },
    { "service: cleanup that is late", setup_late, { T(clean_short), T(lets_go) }, check_late, false },
};
SCHED_MAIN(scenarios)
