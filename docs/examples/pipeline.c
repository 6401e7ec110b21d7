/* pipeline.c: three stages connected by bounded channels, run to the end, and then stopped in the middle in each of the
   ways there are. Every item is accounted for. Recipe: docs/pipeline.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

enum { ITEMS = 2000, STOP_AFTER = 200, CAPACITY = 32 };

typedef struct {
    ctx_t *ctx; /* of the whole pipeline */
    ctx_chan_t *numbers, *squares;
    ctx_on_cancel_t on_cancel;
    int stop_after; /* the sink stops everything when so many have arrived; 0: never */
    int sent;       /* the source's */
    int skipped;    /* [atomic] */
    int arrived;    /* the sink's, which has one worker */
    int dead[2];    /* letters of the stages; each stage has one call at a time */
} pipeline_t;

/* What could not be sent is still the source's. */
static int source(ctx_t *ctx, void *arg) {
    pipeline_t *pipeline = arg;
    int rc = 0;
    for (int i = 0; i < ITEMS && rc == 0; i++) {
        rc = ctx_chan_send(pipeline->numbers, ctx, &i);
        if (rc == 0) pipeline->sent++;
    }
    ctx_chan_close(pipeline->numbers); /* so the next stage knows that this was all */
    return rc;
}

static int square(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    pipeline_t *pipeline = user;
    int n = *(const int *)in;
    if (n % 10 == 0) { /* positive: leave it out */
        __atomic_add_fetch(&pipeline->skipped, 1, __ATOMIC_RELAXED);
        return 1;
    }
    *(int64_t *)out = (int64_t)n * n;
    return 0;
}

static int arrive(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx, (void)in, (void)out;
    pipeline_t *pipeline = user;
    if (++pipeline->arrived == pipeline->stop_after) ctx_cancel_cause(pipeline->ctx, -EINTR, "enough");
    return 0;
}

/* Received, but neither sent on nor left out: write it down, send it back, try again later. */
static void dead_number(const void *item, int reason, void *user) {
    (void)item, (void)reason;
    ((pipeline_t *)user)->dead[0]++;
}

static void dead_square(const void *item, int reason, void *user) {
    (void)item, (void)reason;
    ((pipeline_t *)user)->dead[1]++;
}

static int middle(ctx_t *ctx, void *arg) {
    pipeline_t *pipeline = arg;
    return ctx_stage_run(ctx, &(ctx_stage_desc_t){.in = pipeline->numbers,
                                                  .out = pipeline->squares,
                                                  .workers = 3,
                                                  .ordered = true,
                                                  .fn = square,
                                                  .on_cancel = pipeline->on_cancel,
                                                  .finish_budget = CTX_S(1),
                                                  .dead_letter = dead_number,
                                                  .user = pipeline});
}

static int sink(ctx_t *ctx, void *arg) {
    pipeline_t *pipeline = arg;
    return ctx_stage_run(ctx, &(ctx_stage_desc_t){.in = pipeline->squares,
                                                  .fn = arrive,
                                                  .on_cancel = pipeline->on_cancel,
                                                  .finish_budget = CTX_S(1),
                                                  .dead_letter = dead_square,
                                                  .user = pipeline});
}

static bool run(const char *title, ctx_on_cancel_t on_cancel, int stop_after) {
    pipeline_t pipeline = {.ctx = ctx_with_cancel(ctx_background()),
                           .numbers = ctx_chan_new(sizeof(int), CAPACITY),
                           .squares = ctx_chan_new(sizeof(int64_t), CAPACITY),
                           .on_cancel = on_cancel,
                           .stop_after = stop_after};
    ctx_group_t *group = ctx_group_new(pipeline.ctx, NULL);
    if (!pipeline.numbers || !pipeline.squares || !group) return perror("pipeline"), false;

    /* From the end to the beginning: whoever sends finds somebody who takes. */
    const ctx_task_fn steps[] = {sink, middle, source};
    for (int i = 0; i < 3; i++) ctx_group_go(group, steps[i], &pipeline);
    int failed = ctx_group_wait(group);

    int left = (int)(ctx_chan_len(pipeline.numbers) + ctx_chan_len(pipeline.squares));
    int dead = pipeline.dead[0] + pipeline.dead[1];
    printf("%-12s %4d sent = %4d arrived + %3d skipped + %2d dead letters + %2d left; %s\n", title, pipeline.sent,
           pipeline.arrived, pipeline.skipped, dead, left, ctx_strerror(failed));
    ctx_chan_free(pipeline.numbers);
    ctx_chan_free(pipeline.squares);
    ctx_end(pipeline.ctx);
    bool whole = stop_after > 0 ? failed == CTX_CANCELED : failed == 0 && pipeline.sent == ITEMS && dead + left == 0;
    return whole && pipeline.sent == pipeline.arrived + pipeline.skipped + dead + left;
}

int main(void) {
    bool ok = run("to the end:", CTX_CANCEL_DROP, 0);
    ok &= run("drop:", CTX_CANCEL_DROP, STOP_AFTER);
    ok &= run("drain:", CTX_CANCEL_DEAD_LETTER, STOP_AFTER);
    ok &= run("emit:", CTX_CANCEL_FINISH, STOP_AFTER);
    ctx_runtime_stop();
    return ok ? 0 : 1;
}
