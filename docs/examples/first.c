/* first.c: the program of README.md. */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include <stdio.h>

static int work(ctx_t *ctx) {
    for (int step = 1; ctx_err(ctx) == 0; step++) {
        printf("step %d, %d ms left\n", step, (int)(ctx_remaining(ctx) / CTX_MS(1)));
        ctx_sleep(ctx, CTX_MS(30)); /* wakes early if the context is done */
    }
    return ctx_err(ctx);
}

int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(100));
    if (work(ctx) != 0) printf("%s\n", ctx_cause(ctx).what); /* deadline exceeded */
    ctx_end(ctx);
    return 0;
}
