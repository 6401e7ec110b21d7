/* bulkhead.c: two pools share the limit of the one database behind both, and neither can flood it.
   Recipe: docs/bulkhead.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

enum { CONNECTIONS = 3, TASKS = 40 };

static int open_now, open_at_most; /* [atomic] */

static int query(ctx_t *ctx, void *arg) {
    (void)arg;
    int open = __atomic_add_fetch(&open_now, 1, __ATOMIC_SEQ_CST);
    int seen = __atomic_load_n(&open_at_most, __ATOMIC_SEQ_CST);
    while (open > seen &&
           !__atomic_compare_exchange_n(&open_at_most, &seen, open, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    int rc = ctx_sleep(ctx, CTX_MS(1));
    __atomic_sub_fetch(&open_now, 1, __ATOMIC_SEQ_CST);
    return rc;
}

int main(void) {
    ctx_sem_t connections;
    if (ctx_sem_init(&connections, CONNECTIONS) != 0) return 1;

    ctx_t *life = ctx_with_cancel(ctx_background());
    ctx_pool_t *web = ctx_pool_new(
        life, &(ctx_pool_desc_t){.name = "web", .workers = 8, .permits = &connections, .when_full = CTX_REJECT});
    ctx_pool_t *nightly = ctx_pool_new(
        life, &(ctx_pool_desc_t){
                  .name = "nightly", .workers = 8, .queue = 4, .permits = &connections, .when_full = CTX_BLOCK});
    if (!web || !nightly) return perror("pool"), 1;

    for (int i = 0; i < TASKS; i++) {
        int rc = ctx_pool_submit(web, life, "page", query, NULL);
        if (rc != 0) printf("web: %s\n", ctx_strerror(rc));
        rc = ctx_pool_submit(nightly, life, "report", query, NULL); /* waits for room: nobody is in a hurry */
        if (rc != 0) printf("nightly: %s\n", ctx_strerror(rc));
    }

    int rc = ctx_pool_drain(web, CTX_S(10), NULL);
    if (rc == 0) rc = ctx_pool_drain(nightly, CTX_S(10), NULL);
    ctx_pool_free(web);
    ctx_pool_free(nightly);
    ctx_end(life);
    ctx_sem_destroy(&connections);
    ctx_runtime_stop();
    printf("%d queries, never more than %d at once\n", 2 * TASKS, open_at_most);
    return rc == 0 && open_at_most <= CONNECTIONS ? 0 : 1;
}
