/* Flow: the limiter and retry when nothing has to wait, the batcher's add alone and with its flushes, sampling. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server;

/* As fast as it may be, with a bucket that cannot run dry here. */
static ctx_limiter_t limiter;

static void fill_limiter(void) { bench_check(ctx_limiter_init(&limiter, 1e7, 1000000000) == 0, "no limiter"); }

static uint64_t limiter_allow(size_t n) {
    fill_limiter();
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) bench_check(ctx_limiter_allow(&limiter, 1), "no token");
    return bench_now() - began;
}

static uint64_t limiter_wait(size_t n) {
    fill_limiter();
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) bench_check(ctx_limiter_wait(&limiter, server, 1) == 0, "no token");
    return bench_now() - began;
}

static uint64_t clock_alone(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_time_t now = ctx_now();
        BENCH_KEEP(now);
    }
    return bench_now() - began;
}

/* What is batched, and a flush that only counts: what the batcher costs is wanted, not what writing does. */
typedef struct {
    uint64_t id;
    double value;
} row_t;

static uint64_t written; /* [atomic] rows */

static int count_rows(ctx_t *ctx, const void *rows, size_t n, void *user) {
    (void)ctx, (void)rows, (void)user;
    __atomic_add_fetch(&written, n, __ATOMIC_RELEASE);
    return 0;
}

static void lost_rows(const void *rows, size_t n, int reason, void *user) {
    (void)rows, (void)n, (void)reason, (void)user;
    bench_check(false, "rows were dropped");
}

static ctx_batch_t *batcher_of(size_t max_items) {
    ctx_batch_desc_t desc = {.item_size = sizeof(row_t),
                             .max_items = max_items,
                             .max_delay = CTX_S(1),
                             .flush = count_rows,
                             .on_drop = lost_rows};
    ctx_batch_t *made = ctx_batch_new(server, &desc);
    bench_check(made != NULL, "no batcher");
    written = 0;
    return made;
}

#define BATCH 1000

static void add_row(ctx_batch_t *batch, uint64_t id) {
    row_t row = {id, 0.5};
    bench_check(ctx_batch_add(batch, &row) == 0, "a row was not taken");
}

/* Adds that are not the last of their batch. The last, which has the batch flushed, and the flush do not count. */
static uint64_t batch_add(size_t n) {
    size_t batches = n / (BATCH - 1) + 1;
    uint64_t spent = 0;
    ctx_batch_t *batch = batcher_of(BATCH);
    for (size_t b = 1; b <= batches; b++) {
        uint64_t began = bench_now();
        for (uint64_t i = 1; i < BATCH; i++) add_row(batch, i);
        spent += bench_now() - began;
        add_row(batch, 0);
        while (__atomic_load_n(&written, __ATOMIC_ACQUIRE) != b * BATCH) sched_yield();
    }
    bench_check(ctx_batch_drain(batch, CTX_S(5), NULL) == 0, "the batcher did not drain");
    ctx_batch_free(batch);
    return spent * n / (batches * (BATCH - 1));
}

/* From the first add until all are flushed and the batcher is closed, in batches of 100. */
static uint64_t batch_flush(size_t n) {
    ctx_batch_t *batch = batcher_of(100);
    uint64_t began = bench_now();
    for (uint64_t i = 0; i < n; i++) {
        row_t row = {i, 0.5};
        bench_check(ctx_batch_add_wait(batch, server, &row) == 0, "a row was not taken");
    }
    bench_check(ctx_batch_drain(batch, CTX_S(5), NULL) == 0, "the batcher did not drain");
    ctx_batch_free(batch);
    uint64_t spent = bench_now() - began;
    bench_check(written == n, "rows were lost");
    return spent;
}

static int succeed(ctx_t *ctx, void *arg) {
    (void)arg;
    return ctx_err(ctx);
}

static uint64_t retry(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        int rc = ctx_retry(server, NULL, succeed, NULL);
        BENCH_KEEP(rc);
    }
    return bench_now() - began;
}

static uint64_t sampled(size_t n) {
    ctx_desc_t desc = {.sample_one_in = 1};
    ctx_t *root = ctx_derive(server, &desc);
    ctx_t *ctx = ctx_with_cancel(root);
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        bench_check(ctx_sampled(ctx), "not sampled");
        BENCH_BARRIER();
    }
    uint64_t spent = bench_now() - began;
    ctx_end(ctx);
    ctx_end(root);
    return spent;
}

int main(void) {
    static const bench_figure_t allow[] = {{"limiter_allow", limiter_allow}, {"limiter_clock", clock_alone}};
    server = ctx_with_cancel(ctx_background());
    bench_together(allow, 2, 2000000);
    bench_run("limiter_wait", limiter_wait, 2000000);
    bench_run("batch_add", batch_add, 1000000);
    bench_every_run("batch_flush", batch_flush, 1000000);
    bench_run("retry", retry, 5000000);
    bench_run("sampled", sampled, 10000000);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
