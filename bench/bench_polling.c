/* Polling: what looking at a context costs in a loop. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *ctx;

static uint64_t empty_loop(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) BENCH_BARRIER();
    return bench_now() - began;
}

static uint64_t err_loop(size_t n) {
    ctx_t *mine = ctx;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (ctx_err(mine)) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

static uint64_t flag_loop(size_t n) {
    const volatile int *flag = ctx_flag(ctx);
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (*flag) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

static uint64_t poll_loop(ctx_poll_t poll, size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (ctx_poll(&poll)) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

static uint64_t poll_every(size_t n) { return poll_loop(ctx_poll_every(ctx, 1000), n); }
static uint64_t poll_within(size_t n) { return poll_loop(ctx_poll_within(ctx, CTX_MS(1)), n); }

int main(void) {
    ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    bench_run("empty_loop", empty_loop, 50000000);
    bench_run("err_loop", err_loop, 50000000);
    bench_run("flag_loop", flag_loop, 50000000);
    bench_run("poll_every", poll_every, 50000000);
    bench_run("poll_within", poll_within, 50000000);
    ctx_end(ctx);
    ctx_runtime_stop();
    return 0;
}
