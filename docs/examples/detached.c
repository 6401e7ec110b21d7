/* detached.c: work that outlives the request which started it, on a bounded pool that is drained at the end.
   Recipe: docs/detached.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <inttypes.h>
#include <stdio.h>

enum { REQUESTS = 200 };

typedef struct {
    int id;
} request_t;

CTX_VALUE(request_t, request);

static int written; /* [atomic] */
static int lost;    /* [atomic] */

/* Its context has the request's value, but not its cancellation. */
static int write_audit(ctx_t *ctx, void *arg) {
    (void)arg;
    if (!request_from(ctx)) return CTX_INVALID;
    int rc = ctx_sleep(ctx, CTX_US(100)); /* the disk */
    if (rc == 0) __atomic_add_fetch(&written, 1, __ATOMIC_RELAXED);
    return rc;
}

/* Each task that was accepted and will not run comes here, once. */
static void audit_lost(const char *op, void *arg, int reason, void *user) {
    (void)op, (void)arg, (void)reason, (void)user;
    __atomic_add_fetch(&lost, 1, __ATOMIC_RELAXED);
}

static void handle(ctx_pool_t *audits, int id) {
    request_t request = {id};
    ctx_t *ctx = ctx_with_request(ctx_background(), &request);
    int rc = ctx_pool_submit(audits, ctx, "audit", write_audit, NULL);
    if (rc != 0) audit_lost("audit", NULL, rc, NULL); /* never accepted, so still ours to account for */
    ctx_end(ctx);                                     /* the audit goes on */
}

int main(void) {
    ctx_pool_t *audits = ctx_pool_new(
        ctx_background(),
        &(ctx_pool_desc_t){
            .name = "audits", .workers = 2, .queue = REQUESTS, .task_timeout = CTX_S(5), .on_drop = audit_lost});
    if (!audits) return perror("pool"), 1;
    for (int id = 0; id < REQUESTS; id++) handle(audits, id);

    ctx_drain_report_t report;
    int rc = ctx_pool_drain(audits, CTX_S(10), &report);
    printf("%s: %" PRIu64 " completed, %" PRIu64 " failed, %" PRIu64 " canceled, %" PRIu64 " dropped, %" PRIu64
           " stuck\n",
           rc == 0 ? "drained" : ctx_strerror(rc), report.completed, report.failed, report.canceled, report.dropped,
           report.stuck);
    ctx_pool_free(audits);
    ctx_runtime_stop();
    return written + lost == REQUESTS ? 0 : 1;
}
