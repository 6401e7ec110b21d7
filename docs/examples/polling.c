/* polling.c: a tight loop that stops on time and does not feel it. Recipe: docs/polling.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <inttypes.h>
#include <stdio.h>

/* One turn takes a nanosecond or so, so even one load a turn would show. The poll looks at the context about every
   half millisecond of work. */
static int count_collatz(ctx_t *ctx, uint64_t *steps) {
    ctx_poll_t poll = ctx_poll_within(ctx, CTX_US(500));
    *steps = 0;
    for (uint64_t start = 1;; start++) {
        for (uint64_t n = start; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) {
            ++*steps;
            if (ctx_poll(&poll)) return ctx_err(ctx);
        }
    }
}

/* Stands for a library that knows nothing of contexts and polls a flag of its caller's. */
static void spin_until(const volatile int *stop) {
    while (!*stop) {
    }
}

int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(100));
    uint64_t steps;
    int rc = count_collatz(ctx, &steps);
    ctx_dur_t late = ctx_now() - ctx_deadline(ctx);
    printf("%" PRIu64 " steps, then %s, noticed after %" PRId64 " us\n", steps, ctx_strerror(rc), late / 1000);
    ctx_end(ctx);

    ctx = ctx_with_timeout(ctx_background(), CTX_MS(20));
    spin_until(ctx_flag(ctx));
    printf("the flag said: %s\n", ctx_strerror(ctx_err(ctx)));
    ctx_end(ctx);

    ctx_runtime_stop();
    return rc == CTX_DEADLINE_EXCEEDED ? 0 : 1;
}
