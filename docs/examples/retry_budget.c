/* retry_budget.c: retries that help when one server hiccups, and do not finish off a server that is down.
   Recipe: docs/retry_budget.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

enum { CALLS = 300, BURST = 20 };

/* One for each server that is called: shared by all threads that call it. */
typedef struct {
    const char *name;
    ctx_limiter_t retries; /* the budget: a token for each retry, none for first attempts */
    int fails_one_in;      /* how ill it is */
    int attempts;          /* what it had to bear */
} server_t;

typedef struct {
    server_t *server;
    int number;
    int attempt;
} call_t;

static int attempt(ctx_t *ctx, void *arg) {
    call_t *call = arg;
    call->server->attempts++;
    int rc = ctx_sleep(ctx, CTX_US(100)); /* the network; a real call gets its deadline from ctx */
    if (rc != 0) return rc;
    bool fails = (call->number + call->attempt++) % call->server->fails_one_in == 0;
    return fails ? -ECONNREFUSED : 0;
}

/* Three questions before a retry: may the next attempt end differently, may we burden the server with one, and (that
   one ctx_retry() asks by itself) is there time for it. */
static bool worth_a_retry(int rc, void *arg) {
    call_t *call = arg;
    return rc == -ECONNREFUSED && ctx_limiter_allow(&call->server->retries, 1);
}

static int call_server(ctx_t *ctx, server_t *server, int number) {
    call_t call = {.server = server, .number = number};
    return ctx_retry(ctx,
                     &(ctx_retry_desc_t){.attempts = 3,
                                         .base = CTX_US(500),
                                         .cap = CTX_MS(5),
                                         .jitter = 0.5, /* else all that failed together come back together */
                                         .retryable = worth_a_retry},
                     attempt, &call);
}

/* How many calls failed. */
static int load(server_t *server) {
    int failed = 0;
    for (int i = 0; i < CALLS; i++) {
        ctx_t *request = ctx_with_timeout(ctx_background(), CTX_MS(200));
        failed += call_server(request, server, i) != 0;
        ctx_end(request);
    }
    printf("%s: %d calls, %d attempts, %d failed\n", server->name, CALLS, server->attempts, failed);
    return failed;
}

int main(void) {
    server_t shaky = {.name = "one in 20 attempts fails", .fails_one_in = 20};
    server_t down = {.name = "every attempt fails     ", .fails_one_in = 1};
    /* Ten retries a second, and twenty at once: more than hiccups need, and far less than the load. */
    if (ctx_limiter_init(&shaky.retries, 10, BURST) != 0 || ctx_limiter_init(&down.retries, 10, BURST) != 0) return 1;

    ctx_time_t start = ctx_now();
    int failed_shaky = load(&shaky), failed_down = load(&down);
    int allowed = BURST + (int)((ctx_now() - start) / CTX_MS(100)) + 1;

    /* And the deadline: a wait of ten seconds cannot fit into 50 ms, so there is none; the caller hears of it now. */
    server_t slow = {.name = "slow", .fails_one_in = 1};
    if (ctx_limiter_init(&slow.retries, 10, BURST) != 0) return 1;
    call_t call = {.server = &slow};
    ctx_t *request = ctx_with_timeout(ctx_background(), CTX_MS(50));
    start = ctx_now();
    int rc = ctx_retry(request, &(ctx_retry_desc_t){.base = CTX_S(10)}, attempt, &call);
    ctx_dur_t took = ctx_now() - start;
    ctx_end(request);
    ctx_runtime_stop();
    printf("a wait that cannot fit: %s after %d us\n", ctx_strerror(rc), (int)(took / CTX_US(1)));
    return failed_shaky == 0 && failed_down == CALLS && down.attempts <= CALLS + allowed && rc == -ECONNREFUSED ? 0 : 1;
}
