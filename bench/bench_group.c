/* Groups and spawning: a flood of no-ops in a group, with a pool and without; ctx_go() onto idle threads; a race. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server;

static int no_op(ctx_t *ctx, void *arg) {
    (void)arg;
    return ctx_err(ctx);
}

/* A task of a microsecond or so, whose steps wait for each other. */
static uint64_t compute(uint64_t x) {
    for (int i = 0; i < 1000; i++) x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return x;
}

static int some_op(ctx_t *ctx, void *arg) {
    (void)arg;
    BENCH_KEEP(compute((uint64_t)(uintptr_t)ctx));
    return ctx_err(ctx);
}

static uint64_t alone(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) some_op(server, NULL);
    return bench_now() - began;
}

static ctx_group_desc_t kind; /* of the group to measure */
static ctx_task_fn task;      /* what it runs */

/* A group of `n` tasks, from its making until it is over. */
static uint64_t group_of(size_t n) {
    uint64_t began = bench_now();
    ctx_group_t *group = ctx_group_new(server, &kind);
    bench_check(group != NULL, "no group");
    for (size_t i = 0; i < n; i++) bench_check(ctx_group_go(group, task, NULL) == 0, "a task was not taken");
    bench_check(ctx_group_wait(group) == 0, "a task failed");
    return bench_now() - began;
}

static void group_figure(const char *figure, int workers, ctx_task_fn fn) {
    ctx_pool_desc_t desc = {.workers = workers, .queue = 1024};
    if (!bench_wants(figure)) return;
    task = fn;
    kind.limit = 16;
    kind.pool = workers ? ctx_pool_new(server, &desc) : NULL;
    bench_check(!workers || kind.pool, "no pool");
    bench_every_run(figure, group_of, 300000);
    if (!workers) return;
    bench_check(ctx_pool_drain(kind.pool, CTX_S(5), NULL) == 0, "the pool did not drain");
    ctx_pool_free(kind.pool);
}

#define BURST 64

static pthread_barrier_t all_here;

/* Holds its thread until BURST threads run one. */
static int meet(ctx_t *ctx, void *arg) {
    (void)arg;
    pthread_barrier_wait(&all_here);
    return ctx_err(ctx);
}

static void spawn_burst(ctx_task_fn fn) {
    for (int i = 0; i < BURST; i++) bench_check(ctx_go(server, "no-op", fn, NULL) == 0, "a spawn failed");
}

static void until_none_left(void) { bench_check(ctx_go_wait(server) == 0, "work is left"); }

/* So many threads that a burst finds enough of them idle. */
static void have_idle_threads(void) {
    pthread_barrier_init(&all_here, NULL, BURST);
    spawn_burst(meet);
    until_none_left();
    pthread_barrier_destroy(&all_here);
}

/* Bursts of spawns, each waited for: the whole time, or only that inside ctx_go(). */
static uint64_t spawn_bursts(size_t n, bool only_calls) {
    size_t bursts = n / BURST + 1;
    uint64_t calls = 0, all = bench_now();
    for (size_t i = 0; i < bursts; i++) {
        uint64_t began = bench_now();
        spawn_burst(no_op);
        calls += bench_now() - began;
        until_none_left();
    }
    all = bench_now() - all;
    return (only_calls ? calls : all) * n / (bursts * BURST);
}

static uint64_t spawn_to_end(size_t n) { return spawn_bursts(n, false); }
static uint64_t spawn_calls(size_t n) { return spawn_bursts(n, true); }

/* The floor: the same bursts of wakes, with a bare futex a thread. */
static uint64_t spawn_futex(size_t n) {
    size_t bursts = n / BURST + 1;
    bench_crowd_start(BURST);
    uint64_t began = bench_now();
    for (size_t i = 0; i < bursts; i++) bench_crowd_wake();
    uint64_t spent = bench_now() - began;
    bench_crowd_stop();
    return spent * n / (bursts * BURST);
}

static uint64_t spawn_one(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        bench_check(ctx_go(server, "no-op", no_op, NULL) == 0, "a spawn failed");
        until_none_left();
    }
    return bench_now() - began;
}

static ctx_t *other;

static uint64_t race(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        int rc = ctx_run_either(server, other, no_op, NULL);
        BENCH_KEEP(rc);
    }
    return bench_now() - began;
}

int main(void) {
    server = ctx_with_cancel(ctx_background());
    other = ctx_with_cancel(ctx_background());
    group_figure("group_pool", 16, no_op);
    group_figure("group_pool_2", 2, no_op);
    group_figure("group_work", 16, some_op);
    group_figure("group_work_2", 2, some_op);
    bench_run("group_work_alone", alone, 100000);
    group_figure("group_threads", 0, no_op);
    if (bench_wants("go_spawn") || bench_wants("go_call") || bench_wants("go_each")) have_idle_threads();
    bench_every_run("go_spawn", spawn_to_end, 100000);
    bench_every_run("go_spawn_futex", spawn_futex, 100000);
    bench_every_run("go_call", spawn_calls, 100000);
    bench_every_run("go_each", spawn_one, 10000);
    bench_run("race", race, 500000);
    ctx_end(other);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
