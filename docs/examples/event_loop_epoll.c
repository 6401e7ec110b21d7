/* event_loop_epoll.c: a loop of epoll that waits for a context and for the results of work on other threads.
   Recipe: docs/event_loops.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

typedef struct {
    int number;
    ctx_dur_t takes;
    ctx_chan_t *results;
} job_t;

/* On a thread of the group. It may block, and ends early when the context is done. */
static int work(ctx_t *ctx, void *arg) {
    const job_t *job = (const job_t *)arg;
    int rc = ctx_sleep(ctx, job->takes);
    return rc ? rc : ctx_chan_send(job->results, ctx, &job->number);
}

static bool watch(int loop, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    return fd >= 0 && epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event) == 0;
}

/* Until `ctx` is done: two results are enough. Returns how many there were. The loop's thread makes no call that waits,
   but for epoll_wait(). */
static int run_loop(int loop, ctx_t *ctx, ctx_chan_t *results) {
    int got = 0, number;
    while (ctx_err(ctx) == 0) {
        struct epoll_event events[8];
        int n = epoll_wait(loop, events, 8, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd != ctx_chan_fd(results)) continue; /* the context's: the loop looks at it above */
            while (ctx_chan_try_recv(results, &number) == 0) {
                printf("result %d\n", number);
                if (++got == 2) ctx_cancel(ctx);
            }
        }
    }
    return got;
}

int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30)); /* or ctx_notify_signals() */
    ctx_chan_t *results = ctx_chan_new(sizeof(int), 8);
    ctx_group_t *group = ctx_group_new(ctx, NULL);
    int loop = epoll_create1(EPOLL_CLOEXEC);
    if (!results || !group || loop < 0) return perror("event_loop_epoll"), 1;
    if (!watch(loop, ctx_done_fd(ctx)) || !watch(loop, ctx_chan_fd(results))) return perror("watch"), 1;

    job_t jobs[] = {{1, CTX_MS(10), results}, {2, CTX_MS(20), results}, {3, CTX_S(3600), results}};
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) ctx_group_go(group, work, &jobs[i]);
    int got = run_loop(loop, ctx, results);
    printf("%d results, then %s\n", got, ctx_strerror(ctx_err(ctx)));

    close(loop); /* before the descriptors that it watches */
    int rc = ctx_group_wait(group);
    ctx_chan_free(results);
    ctx_end(ctx);
    ctx_runtime_stop();
    return got == 2 && rc == CTX_CANCELED ? 0 : 1;
}
