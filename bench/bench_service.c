/* Services: from SIGTERM until ctx_app_run() has returned, with a thousand idle services and with three. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"
#include <signal.h>

#define MANY 1000
#define FEW 3
/* Microseconds for the threads to fall asleep. */
#define SETTLE_MANY 20000
#define SETTLE_FEW 1000
/* On a machine with other work a thread may take longer than the usual notice to run at all: that makes a bad sample,
   not a failed stop. */
#define NOTICE CTX_S(10)

static ctx_t *server;

static void sleep_us(long us) {
    struct timespec span = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&span, NULL);
}

static uint32_t running; /* [atomic] services in `run` */

static int run_parked(ctx_t *ctx, void *user) {
    (void)user;
    __atomic_add_fetch(&running, 1, __ATOMIC_RELEASE);
    ctx_wait(ctx, CTX_FOREVER);
    return 0;
}

static void refuse_nothing(void *user) { BENCH_KEEP(user); }

static int drain_nothing(ctx_t *ctx, void *user) {
    (void)ctx;
    BENCH_KEEP(user);
    return 0;
}

/* What to stop. */
typedef struct {
    ctx_app_t *app;
    uint32_t runs;  /* services with a thread in `run` */
    long settle_us; /* before the signal */
    uint64_t began; /* when the signal was sent */
} stop_t;

/* Sends the signal when everything runs and has had time to park. */
static void *stopper_main(void *arg) {
    stop_t *stop = (stop_t *)arg;
    while (!ctx_app_ready(stop->app) || __atomic_load_n(&running, __ATOMIC_ACQUIRE) != stop->runs) sleep_us(100);
    sleep_us(stop->settle_us);
    stop->began = bench_now();
    kill(getpid(), SIGTERM);
    return NULL;
}

/* Runs the app to its end; nanoseconds from the signal to that. */
static uint64_t run_and_stop(ctx_app_t *app, uint32_t runs, long settle_us) {
    stop_t stop = {app, runs, settle_us, 0};
    pthread_t stopper;
    running = 0;
    bench_check(pthread_create(&stopper, NULL, stopper_main, &stop) == 0, "no thread");
    int rc = ctx_app_run(app, NULL);
    uint64_t ended = bench_now();
    bench_check(rc == 0, "the app did not end well");
    pthread_join(stopper, NULL);
    return ended - stop.began;
}

/* A program stops once, so each app starts without idle threads and caches. */
static ctx_app_t *new_app(void) {
    ctx_runtime_stop();
    ctx_app_t *app = ctx_app_new(server);
    bench_check(app != NULL, "no app");
    return app;
}

static uint64_t stop_many(const ctx_service_desc_t *kind) {
    static char name[MANY][16];
    ctx_app_t *app = new_app();
    ctx_service_desc_t desc = *kind;
    for (int i = 0; i < MANY; i++) {
        snprintf(name[i], sizeof name[i], "service %d", i);
        desc.name = name[i];
        bench_check(ctx_app_add(app, &desc) == 0, "no service");
    }
    return run_and_stop(app, kind->run ? MANY : 0, SETTLE_MANY);
}

static void stop_many_figure(const char *figure, const ctx_service_desc_t *kind) {
    if (!bench_wants(figure)) return;
    for (int i = 0; i < 3; i++) bench_print(figure, (double)stop_many(kind) / 1e6, "ms");
}

/* An app of three that have nothing left to do: `chain` says that each needs the one before it. */
static uint64_t stop_few(bool chain) {
    static const char *const name[FEW] = {"store", "workers", "listener"};
    static const char *const after[FEW][2] = {{NULL, NULL}, {"store", NULL}, {"workers", NULL}};
    ctx_app_t *app = new_app();
    for (int i = 0; i < FEW; i++) {
        ctx_service_desc_t desc = {
            .name = name[i], .run = run_parked, .refuse = refuse_nothing, .drain = drain_nothing, .grace = NOTICE};
        if (chain) desc.needs = after[i];
        bench_check(ctx_app_add(app, &desc) == 0, "no service");
    }
    return run_and_stop(app, FEW, SETTLE_FEW);
}

#define APPS 50

static void app_figure(const char *figure, bool chain) {
    double took[APPS];
    size_t apps = bench_scaled(APPS);
    if (!bench_wants(figure)) return;
    if (apps > APPS) apps = APPS;
    for (size_t i = 0; i < apps; i++) took[i] = (double)stop_few(chain) / 1e3;
    bench_print(figure, bench_median(took, apps), "us");
}

static void stop_many_bare(void) {
    if (!bench_wants("stop_1000_futex")) return;
    bench_crowd_start(MANY);
    for (int i = 0; i < 3; i++) {
        sleep_us(SETTLE_MANY);
        uint64_t began = bench_now();
        bench_crowd_wake();
        bench_print("stop_1000_futex", (double)(bench_now() - began) / 1e6, "ms");
    }
    bench_crowd_stop();
}

int main(void) {
    static const ctx_service_desc_t only_drain = {.drain = drain_nothing, .grace = NOTICE};
    static const ctx_service_desc_t only_run = {.run = run_parked, .grace = NOTICE};
    server = ctx_with_cancel(ctx_background());
    app_figure("app_shutdown", true);
    app_figure("app_shutdown_flat", false);
    stop_many_figure("stop_1000_drain", &only_drain);
    stop_many_figure("stop_1000_run", &only_run);
    stop_many_bare();
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
