/* A million timeouts that live at the same time: make each, end each, the bytes of each. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"
#include <limits.h>
#include <malloc.h>

#define WARM_ROUNDS 3

/* Bytes that malloc has handed out, its own headers included. */
static double heap(void) {
    struct mallinfo2 info = mallinfo2();
    return (double)info.uordblks + (double)info.hblkhd;
}

int main(void) {
    size_t n = bench_scaled(1000000);
    ctx_t **live = (ctx_t **)malloc(n * sizeof *live);
    ctx_t *server = ctx_with_cancel(ctx_background());
    double make[WARM_ROUNDS], end[WARM_ROUNDS];
    if (!bench_wants("timers")) return 0;
    mallopt(M_TRIM_THRESHOLD, INT_MAX); /* what a round has freed stays with the process: a warm round is warm */
    bench_check(live != NULL, "no memory");
    for (size_t i = 0; i < n; i++) live[i] = NULL; /* the pages are ours from here on */
    ctx_end(ctx_with_timeout(server, CTX_S(30)));
    for (int round = 0; round <= WARM_ROUNDS; round++) {
        double before = heap();
        uint64_t began = bench_now();
        /* Thirty to sixty seconds, in no order. */
        for (size_t i = 0; i < n; i++)
            live[i] = ctx_with_timeout(server, CTX_S(30) + CTX_MS((int64_t)(i * 7919 % 30000)));
        uint64_t made = bench_now();
        double bytes = (heap() - before) / (double)n;
        bench_check(!ctx_err(live[0]) && !ctx_err(live[n - 1]), "a timeout is over too early");
        uint64_t ending = bench_now();
        for (size_t i = 0; i < n; i++) ctx_end(live[i]);
        uint64_t ended = bench_now();
        double make_each = (double)(made - began) / (double)n, end_each = (double)(ended - ending) / (double)n;
        if (round == 0) {
            bench_print("timers_make_cold", make_each, "ns");
            bench_print("timers_end_cold", end_each, "ns");
            bench_print("timers_bytes", bytes, "B");
        } else {
            make[round - 1] = make_each;
            end[round - 1] = end_each;
        }
    }
    bench_print("timers_make", bench_median(make, WARM_ROUNDS), "ns");
    bench_print("timers_end", bench_median(end, WARM_ROUNDS), "ns");
    ctx_end(server);
    free(live);
    ctx_runtime_stop();
    return 0;
}
