/* event_loop_glib.c: a main loop of GLib that waits for a context and for the results of work on other threads.
   Recipe: docs/event_loops.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <glib-unix.h>
#include <stdio.h>

typedef struct {
    GMainLoop *main;
    ctx_t *ctx;
    ctx_chan_t *results;
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

static gboolean done(gint fd, GIOCondition condition, gpointer data) {
    (void)fd, (void)condition;
    g_main_loop_quit(((loop_t *)data)->main);
    return G_SOURCE_CONTINUE;
}

/* Two results are enough: the cancel stops the third job, and the loop. */
static gboolean result(gint fd, GIOCondition condition, gpointer data) {
    loop_t *loop = (loop_t *)data;
    int number;
    (void)fd, (void)condition;
    while (ctx_chan_try_recv(loop->results, &number) == 0) { /* never the receive that waits */
        printf("result %d\n", number);
        if (++loop->got == 2) ctx_cancel(loop->ctx);
    }
    return G_SOURCE_CONTINUE;
}

int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
    loop_t loop = {.main = g_main_loop_new(NULL, FALSE), .ctx = ctx, .results = ctx_chan_new(sizeof(int), 8)};
    ctx_group_t *group = ctx_group_new(ctx, NULL);
    if (!loop.results || !group) return perror("event_loop_glib"), 1;
    int done_fd = ctx_done_fd(ctx), result_fd = ctx_chan_fd(loop.results);
    if (done_fd < 0 || result_fd < 0) return fprintf(stderr, "no descriptor to watch\n"), 1;
    guint on_done = g_unix_fd_add(done_fd, G_IO_IN, done, &loop);
    guint on_result = g_unix_fd_add(result_fd, G_IO_IN, result, &loop);

    job_t jobs[] = {{1, CTX_MS(10), loop.results}, {2, CTX_MS(20), loop.results}, {3, CTX_S(3600), loop.results}};
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) ctx_group_go(group, work, &jobs[i]);
    g_main_loop_run(loop.main);
    printf("%d results, then %s\n", loop.got, ctx_strerror(ctx_err(ctx)));

    g_source_remove(on_done); /* before the descriptors that they watch */
    g_source_remove(on_result);
    g_main_loop_unref(loop.main);
    int rc = ctx_group_wait(group);
    ctx_chan_free(loop.results);
    ctx_end(ctx);
    ctx_runtime_stop();
    return loop.got == 2 && rc == CTX_CANCELED ? 0 : 1;
}
