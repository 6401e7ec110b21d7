/* shutdown.c: five services stop in four phases and in the order of their dependencies, with the times of a pod in
   Kubernetes, twenty times as fast. It sends itself the SIGTERM. Recipe: docs/shutdown.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

#define SECONDS(n) CTX_MS(50 * (n))

/* What the description of the pod says. */
#define PROBE_PERIOD SECONDS(2)  /* readinessProbe.periodSeconds, with failureThreshold 1 */
#define PRE_STOP SECONDS(0)      /* the preStop hook: none */
#define GRACE_PERIOD SECONDS(30) /* terminationGracePeriodSeconds */

/* What follows for the program. */
#define LAME_DUCK SECONDS(5) /* two probes and a moment for the news to travel */
#define BUDGET SECONDS(25)   /* includes LAME_DUCK; PRE_STOP + BUDGET + NOTICE must stay below GRACE_PERIOD */
#define NOTICE SECONDS(1)

typedef struct {
    ctx_app_t *app;
    ctx_time_t start;
    ctx_t *listening; /* done when no more connections are accepted */
    ctx_pool_t *handlers;
    int in_rotation; /* [atomic] whether the balancer sends requests here */
    int requests;    /* the listener's */
    int answered;    /* [atomic] */
} server_t;

static void say(const server_t *server, const char *what) {
    printf("%5.1f s  %s\n", (double)(ctx_now() - server->start) / (double)SECONDS(1), what);
}

/* What deletes the pod, after a while. */
static int kubelet(ctx_t *ctx, void *arg) {
    ctx_sleep(ctx, SECONDS(3));
    say(arg, "SIGTERM");
    return kill(getpid(), SIGTERM);
}

/* -- health: what the readiness probe asks, and here also the balancer that draws the conclusion ------------------- */

static int health_run(ctx_t *ctx, void *user) {
    server_t *server = user;
    while (ctx_sleep(ctx, PROBE_PERIOD) == 0) {
        int ready = ctx_app_ready(server->app);
        if (ready == __atomic_exchange_n(&server->in_rotation, ready, __ATOMIC_ACQ_REL)) continue;
        say(server, ready ? "probe: ready, requests are sent here" : "probe: not ready, requests go elsewhere");
        if (ready && ctx_go(ctx_background(), "kubelet", kubelet, server) != 0) return CTX_NO_MEMORY;
    }
    return 0;
}

/* -- listener: takes requests until it is told to refuse ----------------------------------------------------------- */

static int handle(ctx_t *ctx, void *arg) {
    server_t *server = arg;
    int rc = ctx_sleep(ctx, SECONDS(5));
    if (rc == 0) __atomic_add_fetch(&server->answered, 1, __ATOMIC_RELAXED);
    return rc;
}

static int listener_run(ctx_t *ctx, void *user) {
    (void)ctx;
    server_t *server = user;
    while (ctx_sleep(server->listening, SECONDS(1) / 5) == 0) {
        if (!__atomic_load_n(&server->in_rotation, __ATOMIC_ACQUIRE)) continue;
        if (ctx_pool_submit(server->handlers, ctx, "request", handle, server) == 0) server->requests++;
    }
    return 0;
}

static void listener_refuse(void *user) {
    server_t *server = user;
    say(server, "listener: refuses");
    ctx_cancel(server->listening);
}

/* -- handlers: finish the requests that were accepted -------------------------------------------------------------- */

static int handlers_start(ctx_t *ctx, void *user) {
    (void)ctx; /* the pool must outlive the first cancel, so it does not live below this */
    server_t *server = user;
    server->handlers = ctx_pool_new(ctx_background(), &(ctx_pool_desc_t){.name = "handlers", .workers = 32});
    return server->handlers ? 0 : -errno;
}

static int handlers_drain(ctx_t *ctx, void *user) {
    server_t *server = user;
    int rc = ctx_pool_drain(server->handlers, ctx_remaining(ctx), NULL);
    say(server, "handlers: drained");
    return rc;
}

/* -- report: long work that can be taken up again later, so it is not waited for to the end ------------------------ */

static int report_run(ctx_t *ctx, void *user) {
    ctx_wait(ctx, CTX_FOREVER); /* a page at a time, in truth */
    say(user, "report: canceled, saves the page it is at");
    return 0;
}

static int report_drain(ctx_t *ctx, void *user) {
    (void)user;
    ctx_wait(ctx, CTX_FOREVER); /* until drain_budget is used up */
    return 0;
}

/* -- database: the last, since the others need it ------------------------------------------------------------------ */

static int database_drain(ctx_t *ctx, void *user) {
    int rc = ctx_sleep(ctx, SECONDS(1));
    say(user, rc == 0 ? "database: closed" : "database: not closed in time");
    return rc;
}

/* -- program ------------------------------------------------------------------------------------------------------- */

int main(void) {
    static server_t server;
    static ctx_shutdown_report_t report;
    static const char *const database[] = {"database", NULL}, *const front[] = {"handlers", "health", NULL};
    const ctx_service_desc_t services[] = {
        {.name = "listener", .run = listener_run, .refuse = listener_refuse, .needs = front, .user = &server},
        {.name = "handlers",
         .start = handlers_start,
         .drain = handlers_drain,
         .drain_budget = SECONDS(12),
         .grace = NOTICE,
         .needs = database,
         .user = &server},
        {.name = "report",
         .run = report_run,
         .drain = report_drain,
         .drain_budget = SECONDS(3),
         .grace = NOTICE,
         .needs = database,
         .user = &server},
        {.name = "health", .run = health_run, .user = &server},
        {.name = "database", .drain = database_drain, .drain_budget = SECONDS(3), .grace = NOTICE, .user = &server}};

    server.start = ctx_now();
    server.listening = ctx_with_cancel(ctx_background());
    server.app = ctx_app_new(ctx_background());
    if (!server.app) return perror("app"), 1;
    for (size_t i = 0; i < sizeof services / sizeof services[0]; i++)
        if (ctx_app_add(server.app, &services[i]) != 0) return 1;

    int rc = ctx_app_run(server.app, &(ctx_app_desc_t){.lame_duck = LAME_DUCK, .budget = BUDGET, .report = &report});
    say(&server, "out of ctx_app_run()");
    ctx_pool_free(server.handlers); /* drained, unless there was no time for it */
    ctx_shutdown_print(&report, stdout);
    int answered = __atomic_load_n(&server.answered, __ATOMIC_RELAXED);
    printf("%d requests, %d answered; %s\n", server.requests, answered, ctx_strerror(rc));

    ctx_go_wait(ctx_background());
    ctx_end(server.listening);
    ctx_runtime_stop();
    bool in_grace = PRE_STOP + report.took < GRACE_PERIOD;
    return rc == 0 && in_grace && server.requests > 0 && server.requests == answered ? 0 : 1;
}
