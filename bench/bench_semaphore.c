/* The semaphore when nobody else wants it. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_sem_t sem;
static ctx_t *ctx;

static uint64_t acquire_release(size_t n) {
    ctx_t *mine = ctx;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        int rc = ctx_sem_acquire(&sem, mine, 1);
        BENCH_KEEP(rc);
        ctx_sem_release(&sem, 1);
    }
    return bench_now() - began;
}

int main(void) {
    ctx = ctx_with_cancel(ctx_background());
    bench_check(ctx_sem_init(&sem, 8) == 0, "no semaphore");
    bench_run("sem_pair", acquire_release, 10000000);
    ctx_sem_destroy(&sem);
    ctx_end(ctx);
    ctx_runtime_stop();
    return 0;
}
