/* interrupt.c: Ctrl-C wakes a program out of whatever it waits for.
   Run it with an argument to try it by hand; without one it sends itself the signal. Recipe: docs/interrupt.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

/* One descriptor and the context, on a thread of the pool. Here it is a pipe that stays silent; in a server it is a
   socket. */
static int wait_for_one(ctx_t *ctx, void *arg) {
    int ready = ctx_poll_fd(ctx, *(int *)arg, POLLIN);
    printf("one: %s\n", ready > 0 ? "ready" : ctx_strerror(ready));
    return ready > 0 ? 0 : ready;
}

/* Several descriptors, of which the context's is one. A signal that comes before poll() is not lost: the descriptor
   stays readable. */
static int wait_for_any(ctx_t *ctx, int first, int second) {
    struct pollfd fds[] = {
        {.fd = ctx_done_fd(ctx), .events = POLLIN}, {.fd = first, .events = POLLIN}, {.fd = second, .events = POLLIN}};
    if (fds[0].fd < 0) return fds[0].fd;
    while (ctx_err(ctx) == 0) {
        if (poll(fds, 3, ctx_remaining_ms(ctx)) > 0 && (fds[1].revents || fds[2].revents)) return 0;
    }
    return ctx_err(ctx);
}

static int send_ourselves_sigint(ctx_t *ctx, void *arg) {
    (void)arg;
    int rc = ctx_sleep(ctx, CTX_MS(50));
    if (rc == 0) kill(getpid(), SIGINT);
    return rc;
}

int main(int argc, char **argv) {
    (void)argv;
    const int signals[] = {SIGINT, SIGTERM};
    ctx_t *ctx = ctx_notify_signals(ctx_background(), signals, 2);
    int silent[2][2];
    if (ctx_err(ctx) != 0 || pipe(silent[0]) != 0 || pipe(silent[1]) != 0) return 1;

    ctx_pool_t *pool = ctx_pool_new(ctx, &(ctx_pool_desc_t){.workers = 2});
    if (!pool) return perror("pool"), 1;
    if (argc == 1 && ctx_pool_submit(pool, ctx, "send SIGINT", send_ourselves_sigint, NULL) != 0) return 1;

    printf("waiting; Ctrl-C stops me, a second one would kill me\n");
    if (ctx_pool_submit(pool, ctx, "wait for one", wait_for_one, &silent[0][0]) != 0) return 1;
    int rc = wait_for_any(ctx, silent[0][0], silent[1][0]);
    ctx_cause_t cause = ctx_cause(ctx);
    printf("%s: %s\n", ctx_strerror(rc), cause.what);

    ctx_pool_drain(pool, CTX_S(1), NULL);
    ctx_pool_free(pool);
    for (int i = 0; i < 4; i++) close(silent[i / 2][i % 2]);
    ctx_end(ctx); /* the action for SIGINT is as it was before */
    ctx_runtime_stop();
    return rc == CTX_CANCELED && cause.code == SIGINT ? 0 : 1;
}
