/* event_loop_uv.c: a loop of libuv that waits for a context and for the results of work on other threads.
   Recipe: docs/event_loops.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>
#include <uv.h>

typedef struct {
    ctx_t *ctx;
    ctx_chan_t *results;
    uv_poll_t on_done, on_result;
    int got;
} loop_t;

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

/* uv_run() returns when no handle is left. The descriptors stay open until the handles are closed. */
static void done(uv_poll_t *handle, int status, int events) {
    loop_t *loop = (loop_t *)handle->data;
    (void)status, (void)events;
    uv_close((uv_handle_t *)&loop->on_done, NULL);
    uv_close((uv_handle_t *)&loop->on_result, NULL);
}

/* Two results are enough: the cancel stops the third job, and the loop. */
static void result(uv_poll_t *handle, int status, int events) {
    loop_t *loop = (loop_t *)handle->data;
    int number;
    (void)status, (void)events;
    while (ctx_chan_try_recv(loop->results, &number) == 0) { /* never the receive that waits */
        printf("result %d\n", number);
        if (++loop->got == 2) ctx_cancel(loop->ctx);
    }
}

static bool watch(loop_t *loop, uv_poll_t *handle, int fd, uv_poll_cb fn) {
    handle->data = loop;
    return fd >= 0 && uv_poll_init(uv_default_loop(), handle, fd) == 0 && uv_poll_start(handle, UV_READABLE, fn) == 0;
}

int main(void) {
    loop_t loop = {.ctx = ctx_with_timeout(ctx_background(), CTX_S(30)), .results = ctx_chan_new(sizeof(int), 8)};
    ctx_group_t *group = ctx_group_new(loop.ctx, NULL);
    if (!loop.results || !group) return perror("event_loop_uv"), 1;
    if (!watch(&loop, &loop.on_done, ctx_done_fd(loop.ctx), done) ||
        !watch(&loop, &loop.on_result, ctx_chan_fd(loop.results), result))
        return fprintf(stderr, "no descriptor to watch\n"), 1;

    job_t jobs[] = {{1, CTX_MS(10), loop.results}, {2, CTX_MS(20), loop.results}, {3, CTX_S(3600), loop.results}};
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) ctx_group_go(group, work, &jobs[i]);
    uv_run(uv_default_loop(), UV_RUN_DEFAULT);
    printf("%d results, then %s\n", loop.got, ctx_strerror(ctx_err(loop.ctx)));

    int rc = ctx_group_wait(group);
    uv_loop_close(uv_default_loop());
    ctx_chan_free(loop.results);
    ctx_end(loop.ctx);
    ctx_runtime_stop();
    return loop.got == 2 && rc == CTX_CANCELED ? 0 : 1;
}
