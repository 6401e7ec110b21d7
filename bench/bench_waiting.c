/* Waiting: from the cancel until a thread parked in ctx_wait() runs, next to a bare futex in the same program. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server, *ctx;

static void context_prepare(void) { ctx = ctx_with_cancel(server); }
static void context_park(void) { ctx_wait(ctx, CTX_FOREVER); }
static void context_wake(void) { ctx_cancel(ctx); }
static void context_finish(void) { ctx_end(ctx); }

static uint32_t word; /* [atomic] */

static void futex_prepare(void) { __atomic_store_n(&word, 0, __ATOMIC_RELAXED); }
static void futex_park(void) {
    while (!__atomic_load_n(&word, __ATOMIC_ACQUIRE)) bench_futex_wait(&word, 0);
}
static void futex_wake(void) {
    __atomic_store_n(&word, 1, __ATOMIC_RELEASE);
    bench_futex_wake(&word);
}

int main(void) {
    static const bench_wake_t ways[] = {
        {"wait_wake", context_prepare, context_park, context_wake, context_finish},
        {"wait_futex", futex_prepare, futex_park, futex_wake, NULL},
    };
    if (!bench_wants("wait_wake") && !bench_wants("wait_futex")) return 0;
    server = ctx_with_cancel(ctx_background());
    bench_wakes(ways, 2, 2000);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
