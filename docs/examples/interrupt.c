/* interrupt.c: Ctrl-C wakes a program out of whatever it waits for.
   Run it with an argument to try it by hand; without one it sends itself the signal. Recipe: docs/interrupt.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

/* Anything that can be polled is waited for together with the context. The other descriptor here is a pipe that stays
   silent; in a server it is a socket. */
static int wait_for_input(ctx_t *ctx, int fd) {
    struct pollfd fds[] = {{.fd = fd, .events = POLLIN}, {.fd = ctx_done_fd(ctx), .events = POLLIN}};
    if (fds[1].fd < 0) return fds[1].fd;
    while (ctx_err(ctx) == 0) {
        if (poll(fds, 2, -1) > 0 && fds[0].revents) return 0;
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
    int silent[2];
    if (ctx_err(ctx) != 0 || pipe(silent) != 0) return 1;

    ctx_pool_t *pool = ctx_pool_new(ctx, &(ctx_pool_desc_t){.workers = 1});
    if (!pool) return perror("pool"), 1;
    if (argc == 1) ctx_pool_submit(pool, ctx, "send SIGINT", send_ourselves_sigint, NULL);

    printf("waiting; Ctrl-C stops me, a second one would kill me\n");
    int rc = wait_for_input(ctx, silent[0]);
    ctx_cause_t cause = ctx_cause(ctx);
    printf("%s: %s\n", ctx_strerror(rc), cause.what);

    ctx_pool_free(pool);
    close(silent[0]);
    close(silent[1]);
    ctx_end(ctx); /* the action for SIGINT is as it was before */
    ctx_runtime_stop();
    return rc == CTX_CANCELED && cause.code == SIGINT ? 0 : 1;
}
