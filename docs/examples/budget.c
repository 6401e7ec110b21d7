/* budget.c: what a request carries is one struct under one key, and its time is split among the calls it makes.
   Recipe: docs/budget.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

typedef struct {
    char user[16];
    unsigned trace;
} request_t;

CTX_VALUE(request_t, request); /* defines ctx_with_request() and request_from() */

/* Anywhere below: one look-up finds all of it. */
static void log_line(const ctx_t *ctx, const char *text) {
    const request_t *request = request_from(ctx);
    printf("[%s %04x] %s: %s\n", request ? request->user : "-", request ? request->trace : 0, ctx_name(ctx), text);
}

/* Stands for a call to another system that takes `cost`. */
static int call(ctx_t *ctx, ctx_dur_t cost) {
    int rc = ctx_sleep(ctx, cost);
    log_line(ctx, ctx_strerror(rc));
    return rc;
}

/* A third of what is left for the cache; what then remains is for the database. */
static int handle(ctx_t *ctx) {
    ctx_t *cache = ctx_derive(ctx, &(ctx_desc_t){.name = "cache", .timeout = ctx_budget(ctx_remaining(ctx) / 3)});
    int rc = call(cache, CTX_S(10)); /* it hangs */
    ctx_end(cache);
    if (rc == 0) return 0;

    ctx_t *database = ctx_derive(ctx, &(ctx_desc_t){.name = "database"});
    rc = call(database, CTX_MS(5));
    ctx_end(database);
    return rc;
}

int main(void) {
    request_t request = {"ada", 0x51f};
    ctx_t *ctx = ctx_derive(
        ctx_background(),
        &(ctx_desc_t){.name = "request", .timeout = CTX_MS(300), .key = &ctx_key_request, .value = &request});
    int rc = handle(ctx);
    log_line(ctx, rc == 0 ? "answered in time" : "too late");
    ctx_end(ctx);
    ctx_runtime_stop();
    return rc == 0 ? 0 : 1;
}
