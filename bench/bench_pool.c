/* The pool: a flood of no-ops or of tasks that compute from one submitter, and a trickle of small bursts. */
#ifdef BENCH_COUNT
#include "count.h"
#endif
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"
#include <errno.h>
#include <semaphore.h>

static ctx_t *server, *request;

static int no_op(ctx_t *ctx, void *arg) {
    (void)arg;
    return ctx_err(ctx);
}

static int last_op(ctx_t *ctx, void *arg) {
    sem_post((sem_t *)arg);
    return ctx_err(ctx);
}

/* `n` tasks through the pool: nanoseconds from the first submit until the last one has run. The few that other workers
   still run then are not waited for. */
static uint64_t flood(ctx_pool_t *pool, ctx_task_fn fn, size_t n) {
    sem_t done;
    sem_init(&done, 0, 0);
    uint64_t began = bench_now();
    for (size_t i = 1; i < n; i++)
        bench_check(ctx_pool_submit_wait(pool, request, "task", fn, NULL) == 0, "a submit failed");
    bench_check(ctx_pool_submit_wait(pool, request, "last", last_op, &done) == 0, "a submit failed");
    while (sem_wait(&done) != 0 && errno == EINTR) {
    }
    uint64_t spent = bench_now() - began;
    sem_destroy(&done);
    return spent;
}

#ifndef BENCH_COUNT

#define RUNS 9

/* Each run is a sample: a bad one must show. */
static void flood_of(const char *figure, int workers, ctx_dur_t task_timeout, ctx_task_fn fn, size_t n) {
    ctx_pool_desc_t desc = {.workers = workers, .queue = 1024, .task_timeout = task_timeout};
    if (!bench_wants(figure)) return;
    n = bench_scaled(n);
    ctx_pool_t *pool = ctx_pool_new(server, &desc);
    bench_check(pool != NULL, "no pool");
    flood(pool, fn, n / 2 + 1);
    for (int run = 0; run < RUNS; run++) bench_print(figure, (double)flood(pool, fn, n) / (double)n, "ns");
    bench_check(ctx_pool_drain(pool, CTX_S(5), NULL) == 0, "the pool did not drain");
    ctx_pool_free(pool);
}

static void flood_figure(const char *figure, int workers, ctx_dur_t task_timeout) {
    flood_of(figure, workers, task_timeout, no_op, 300000);
}

/* Small tasks with data of their own: 48 bytes by copy, or in a block for each task. */
typedef struct {
    uint64_t words[6];
} small_t;

static int op_copy(ctx_t *ctx, void *arg) {
    BENCH_KEEP(((const small_t *)arg)->words[5]);
    return ctx_err(ctx);
}

static int op_block(ctx_t *ctx, void *arg) {
    int rc = op_copy(ctx, arg);
    free(arg);
    return rc;
}

static uint64_t flood_small(ctx_pool_t *pool, bool copy, size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        small_t small = {{i, i, i, i, i, i}}, *block;
        int rc;
        if (copy) {
            rc = ctx_pool_submit_copy(pool, request, "small", op_copy, &small, sizeof small);
        } else {
            block = malloc(sizeof *block);
            bench_check(block != NULL, "no memory");
            *block = small;
            rc = ctx_pool_submit(pool, request, "small", op_block, block);
        }
        bench_check(rc == 0, "a submit failed");
    }
    bench_check(ctx_pool_wait(pool, ctx_background()) == 0, "a wait failed");
    return bench_now() - began;
}

static void small_figure(const char *figure, int workers, bool copy) {
    ctx_pool_desc_t desc = {.workers = workers, .queue = 1024, .when_full = CTX_BLOCK};
    if (!bench_wants(figure)) return;
    size_t n = bench_scaled(300000);
    ctx_pool_t *pool = ctx_pool_new(server, &desc);
    bench_check(pool != NULL, "no pool");
    flood_small(pool, copy, n / 2 + 1);
    for (int run = 0; run < RUNS; run++) bench_print(figure, (double)flood_small(pool, copy, n) / (double)n, "ns");
    bench_check(ctx_pool_drain(pool, CTX_S(5), NULL) == 0, "the pool did not drain");
    ctx_pool_free(pool);
}

static int op_1us(ctx_t *ctx, void *arg) {
    (void)arg;
    bench_compute(1);
    return ctx_err(ctx);
}

static int op_10us(ctx_t *ctx, void *arg) {
    (void)arg;
    bench_compute(10);
    return ctx_err(ctx);
}

static int op_100us(ctx_t *ctx, void *arg) {
    (void)arg;
    bench_compute(100);
    return ctx_err(ctx);
}

static uint64_t alone(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) op_1us(server, NULL);
    return bench_now() - began;
}

/* So many tasks of each size that a run takes 50 to 200 ms. */
static void work_figures(void) {
    bench_calibrate();
    bench_run("pool_1us_alone", alone, 40000);
    flood_of("pool_1us_2", 2, CTX_S(30), op_1us, 100000);
    flood_of("pool_1us_8", 8, CTX_S(30), op_1us, 100000);
    flood_of("pool_10us_2", 2, CTX_S(30), op_10us, 20000);
    flood_of("pool_10us_8", 8, CTX_S(30), op_10us, 20000);
    flood_of("pool_100us_2", 2, CTX_S(30), op_100us, 2000);
    flood_of("pool_100us_8", 8, CTX_S(30), op_100us, 2000);
}

static void burst_pool(void *arg) {
    ctx_pool_t *pool = (ctx_pool_t *)arg;
    for (int i = 0; i < BENCH_BURST; i++)
        bench_check(ctx_pool_submit(pool, request, "detached", no_op, NULL) == 0, "a submit failed");
}

/* The floor: one futex wake a burst for a thread that does the three no-ops and sleeps again. */
static struct { uint32_t bursts, over; } bare;

static void *bare_main(void *arg) {
    uint32_t seen = 0;
    (void)arg;
    while (!__atomic_load_n(&bare.over, __ATOMIC_ACQUIRE)) {
        uint32_t now = __atomic_load_n(&bare.bursts, __ATOMIC_ACQUIRE);
        if (now == seen) {
            bench_futex_wait(&bare.bursts, now);
            continue;
        }
        for (uint32_t i = 0; i < (now - seen) * BENCH_BURST; i++) no_op(request, NULL);
        seen = now;
    }
    return NULL;
}

static void burst_bare(void *arg) {
    (void)arg;
    __atomic_add_fetch(&bare.bursts, 1, __ATOMIC_RELEASE);
    bench_futex_wake(&bare.bursts);
}

static void detached_pool(const char *figure, ctx_dur_t coalesce) {
    ctx_pool_desc_t desc = {.workers = 2, .queue = 1024, .when_full = CTX_BLOCK, .coalesce = coalesce};
    ctx_pool_t *pool = ctx_pool_new(server, &desc);
    bench_check(pool != NULL, "no pool");
    flood(pool, no_op, 10000);
    bench_print_paced(figure, burst_pool, pool);
    bench_check(ctx_pool_drain(pool, CTX_S(5), NULL) == 0, "the pool did not drain");
    ctx_pool_free(pool);
}

static void detached_figures(void) {
    pthread_t thread;
    if (!bench_wants("detached")) return;
    detached_pool("detached", 0);
    detached_pool("detached_coalesce", CTX_MS(1));
    bench_check(pthread_create(&thread, NULL, bare_main, NULL) == 0, "no thread");
    bench_print_paced("detached_futex", burst_bare, NULL);
    __atomic_store_n(&bare.over, 1, __ATOMIC_RELEASE);
    burst_bare(NULL);
    pthread_join(thread, NULL);
    bench_print("detached_nothing_sleeping", bench_paced(BENCH_SLEEP, bench_burst_nothing, NULL), "ns");
}

int main(void) {
    server = ctx_with_cancel(ctx_background());
    request = ctx_with_timeout(server, CTX_S(3600));
    flood_figure("pool_2", 2, CTX_S(30));
    flood_figure("pool_8", 8, CTX_S(30));
    flood_figure("pool_100", 100, CTX_S(30));
    flood_figure("pool_plain_2", 2, 0);
    flood_figure("pool_plain_8", 8, 0);
    small_figure("pool_copy_2", 2, true);
    small_figure("pool_malloc_2", 2, false);
    work_figures();
    detached_figures();
    ctx_end(request);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}

#else /* BENCH_COUNT */

#define WORKERS 8

static pthread_barrier_t all_here;

/* Holds its worker until every worker runs one. */
static int meet(ctx_t *ctx, void *arg) {
    (void)arg;
    pthread_barrier_wait(&all_here);
    return ctx_err(ctx);
}

int main(void) {
    ctx_pool_desc_t desc = {.workers = WORKERS, .queue = 1024, .task_timeout = CTX_S(30)};
    size_t n = 100000;
    server = ctx_with_cancel(ctx_background());
    request = ctx_with_timeout(server, CTX_S(3600));
    ctx_pool_t *pool = ctx_pool_new(server, &desc);
    bench_check(pool != NULL, "no pool");
    pthread_barrier_init(&all_here, NULL, WORKERS);
    for (int i = 0; i < WORKERS; i++)
        bench_check(ctx_pool_submit_wait(pool, request, "meet", meet, NULL) == 0, "a submit failed");
    flood(pool, no_op, n);
    uint64_t before = count_allocations_now();
    flood(pool, no_op, n);
    bench_print("pool_allocs", (double)(count_allocations_now() - before) / (double)n, "");
    bench_check(ctx_pool_drain(pool, CTX_S(5), NULL) == 0, "the pool did not drain");
    ctx_pool_free(pool);
    pthread_barrier_destroy(&all_here);
    ctx_end(request);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}

#endif
