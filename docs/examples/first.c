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
    int rc = work(ctx);
    printf("%s\n", ctx_strerror(rc)); /* deadline exceeded */
    ctx_end(ctx);
    return 0;
}
