/* Channels at each step of the threads that use them (ctx__sched_step): who has seen the last of a channel may free it,
   a select says that nothing can be done only if nothing can, and an item that meets a cancel is neither lost nor
   doubled. */
#define CTXCANCEL_TEST_SCHED
#include "test.h"

#include <stdlib.h>

/* What was a channel is not given back, so that a step which touches it is seen. A sanitizer sees it by itself. */
static void *made_last, *watched;
static size_t made_size, watched_size;
static void *note_malloc(size_t size);
static void watch_free(void *p);
#define CTXCANCEL_MALLOC(size) note_malloc(size)
#define CTXCANCEL_REALLOC(old, size) realloc((old), (size))
#define CTXCANCEL_FREE(p) watch_free(p)

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "steps.h"

static void *note_malloc(size_t size) {
    void *p = malloc(size);
    made_last = p;
    made_size = size;
    return p;
}

static void watch_free(void *p) {
    if (p && p == watched) {
        steps_forbid(p, watched_size);
#ifdef TEST_SANITIZED
        free(p);
        watched = NULL;
#endif
        return;
    }
    free(p);
}

enum { PLAIN, BY_SELECT, TWICE_BY_SELECT }; /* how a side sends or receives */

typedef struct {
    ctx_chan_t *chan, *beside;
    ctx_t *ctx;
    int how;
    int sent, got;    /* sums of what the calls said they had sent, and received */
    int rc, other_rc; /* of the first side, and of the second */
    bool freed;
} scene_t;

static void scene_open(scene_t *s, size_t capacity, int how) {
    memset(s, 0, sizeof *s);
    s->chan = ctx_chan_new(sizeof(int), capacity);
    watched = made_last;
    watched_size = made_size;
    s->beside = ctx_chan_new(sizeof(int), 0);
    s->ctx = ctx_with_cancel(ctx_background());
    s->how = how;
    CHECK(s->chan != NULL && s->beside != NULL);
}

/* How many steps touched what was freed; nothing is left in a channel that was not. */
static int scene_close(scene_t *s) {
    int item, bad = steps_trespasses();
    if (!s->freed) {
        while (ctx_chan_try_recv(s->chan, &item) == 0) s->got += item;
        watched = NULL;
        ctx_chan_free(s->chan);
    } else {
        free(watched);
        watched = NULL;
    }
    ctx_chan_free(s->beside);
    ctx_end(s->ctx);
    return bad;
}

static int act(scene_t *s, ctx_t *ctx, int op, int *item) {
    ctx_case_t cases[2];
    if (s->how == PLAIN) return op == CTX_SEND ? ctx_chan_send(s->chan, ctx, item) : ctx_chan_recv(s->chan, ctx, item);
    for (int i = 0; i < 2; i++) {
        cases[i].chan = i == 0 || s->how == TWICE_BY_SELECT ? s->chan : s->beside;
        cases[i].op = i == 0 || s->how == TWICE_BY_SELECT ? op : CTX_RECV;
        cases[i].item = item;
        cases[i].rc = 0;
    }
    int at = ctx_select(ctx, cases, 2);
    return at < 0 ? at : cases[at].rc;
}

static void sends_with(scene_t *s, ctx_t *ctx, int item) {
    s->rc = act(s, ctx, CTX_SEND, &item);
    if (s->rc == 0) s->sent += item;
}

static int receives_with(scene_t *s, ctx_t *ctx) {
    int item = 0, rc = act(s, ctx, CTX_RECV, &item);
    if (rc == 0) s->got += item;
    return rc;
}

static void sends(void *shared) { sends_with((scene_t *)shared, ctx_background(), 5); }
static void receives(void *shared) { EXPECT_EQ(receives_with((scene_t *)shared, ctx_background()), 0); }

static void frees(scene_t *s) {
    s->freed = true;
    ctx_chan_free(s->chan);
}

/* Each side stops at each of its steps, the other then runs: which of them waits for the other comes out both ways. */
static void check_freeing(const steps_fn *sides, size_t capacity, int how, int got) {
    int bad = 0;
    for (int stop = 0; stop < 2; stop++) {
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            scene_t s;
            scene_open(&s, capacity, how);
            more = steps_run(sides, 2, stop, &s, at);
            EXPECT(s.freed);
            EXPECT_EQ(s.got, got);
            EXPECT_EQ(s.sent, got);
            bad += scene_close(&s) > 0;
        }
    }
    EXPECT_EQ(bad, 0);
}

static void check_freeing_each(const steps_fn *sides, const size_t *capacities, int n, int got) {
    for (int c = 0; c < n; c++)
        for (int how = PLAIN; how <= TWICE_BY_SELECT; how++) check_freeing(sides, capacities[c], how, got);
}

/* -- freed by the thread that has seen the last of it ------------------------------------------------------------ */

static void receives_and_frees(void *shared) {
    receives(shared);
    frees((scene_t *)shared);
}

TEST(a_receiver_of_the_last_item_may_free_the_channel_at_any_step_of_the_send) {
    static const steps_fn sides[] = {sends, receives_and_frees}, other[] = {receives_and_frees, sends};
    static const size_t capacities[] = {0, 1, 2};
    check_freeing_each(sides, capacities, 3, 5);
    check_freeing_each(other, capacities, 3, 5);
}

static void tries_until_received_and_frees(void *shared) {
    scene_t *s = (scene_t *)shared;
    int item = 0;
    while (ctx_chan_try_recv(s->chan, &item) != 0) steps_yield();
    s->got += item;
    frees(s);
}

TEST(a_try_recv_of_the_last_item_may_free_the_channel_at_any_step_of_the_send) {
    static const steps_fn sides[] = {sends, tries_until_received_and_frees};
    static const size_t capacities[] = {0, 1};
    check_freeing_each(sides, capacities, 2, 5);
}

static void sends_and_closes(void *shared) {
    sends(shared);
    EXPECT_EQ(ctx_chan_close(((scene_t *)shared)->chan), 0);
}

static void receives_all_and_frees(void *shared) {
    scene_t *s = (scene_t *)shared;
    int rc;
    while ((rc = receives_with(s, ctx_background())) == 0) continue;
    EXPECT_EQ(rc, CTX_CLOSED);
    frees(s);
}

TEST(a_receiver_that_found_it_closed_may_free_the_channel_at_any_step_of_the_close) {
    static const steps_fn sides[] = {sends_and_closes, receives_all_and_frees};
    static const size_t capacities[] = {0, 1, 2};
    check_freeing_each(sides, capacities, 3, 5);
}

static void sends_and_frees(void *shared) {
    sends(shared);
    frees((scene_t *)shared);
}

TEST(a_sender_whose_item_was_taken_may_free_a_channel_without_capacity_at_any_step_of_the_receive) {
    static const steps_fn sides[] = {sends_and_frees, receives}, other[] = {receives, sends_and_frees};
    static const size_t capacities[] = {0};
    check_freeing_each(sides, capacities, 1, 5);
    check_freeing_each(other, capacities, 1, 5);
}

/* -- a select without waiting ------------------------------------------------------------------------------------ */

/* A channel of capacity 1 is empty or full: a select that would send or receive can always do one. */
static void selects_either(void *shared) {
    scene_t *s = (scene_t *)shared;
    int in = 0, out = 7;
    ctx_case_t cases[2];
    cases[0].chan = cases[1].chan = s->chan;
    cases[0].op = CTX_RECV;
    cases[0].item = &in;
    cases[1].op = CTX_SEND;
    cases[1].item = &out;
    s->rc = ctx_try_select(cases, 2);
    s->got += in;
    if (s->rc == 1) s->sent += out;
}

static void fills_it(void *shared) {
    scene_t *s = (scene_t *)shared;
    int item = 9;
    if (ctx_chan_try_send(s->chan, &item) == 0) s->sent += item;
}

static void empties_it(void *shared) {
    scene_t *s = (scene_t *)shared;
    int item = 0;
    if (ctx_chan_try_recv(s->chan, &item) == 0) s->got += item;
}

static void check_either(steps_fn other, bool full) {
    const steps_fn sides[] = {selects_either, other};
    for (int again = 0; again < 8; again++) { /* the cases are tried in either order */
        bool more = true;
        for (int at = 0; more; at++) {
            scene_t s;
            scene_open(&s, 1, PLAIN);
            if (full) fills_it(&s);
            more = steps_run(sides, 2, 0, &s, at);
            EXPECT(s.rc == 0 || s.rc == 1);
            scene_close(&s);
            EXPECT_EQ(s.got, s.sent);
        }
    }
}

TEST(a_try_select_that_can_do_one_of_its_cases_at_every_moment_does_one) {
    check_either(fills_it, false);
    check_either(empties_it, true);
}

/* -- canceled ---------------------------------------------------------------------------------------------------- */

static void receives_below(void *shared) {
    scene_t *s = (scene_t *)shared;
    s->other_rc = receives_with(s, s->ctx);
}
static void sends_below(void *shared) {
    scene_t *s = (scene_t *)shared;
    sends_with(s, s->ctx, 5);
}
static void cancels(void *shared) { ctx_cancel(((scene_t *)shared)->ctx); }

TEST(an_item_that_meets_a_cancel_is_neither_lost_nor_doubled) {
    static const steps_fn sides[] = {receives_below, sends_below, cancels};
    for (int k = 0; k < 18; k++) { /* both are cut off: so nobody waits for ever */
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            scene_t s;
            scene_open(&s, (size_t)(k % 2), k / 6);
            more = steps_run(sides, 3, k % 3, &s, at);
            EXPECT(s.rc == 0 || s.rc == CTX_CANCELED);
            EXPECT(s.other_rc == 0 || s.other_rc == CTX_CANCELED);
            if (s.other_rc == 0) EXPECT_EQ(s.rc, 0);
            EXPECT_EQ(scene_close(&s), 0);
            EXPECT_EQ(s.got, s.sent);
        }
    }
}

/* The item comes when ctx_cancel() has returned, and nobody else receives. */
static void cancels_then_sends(void *shared) {
    scene_t *s = (scene_t *)shared;
    int item = 9;
    ctx_cancel(s->ctx);
    if (ctx_chan_try_send(s->chan, &item) == 0) s->sent += item;
}
static void cancels_then_receives(void *shared) {
    scene_t *s = (scene_t *)shared;
    int item = 0;
    ctx_cancel(s->ctx);
    if (ctx_chan_try_recv(s->chan, &item) == 0) s->got += item;
}

static void check_after_cancel(steps_fn waits, steps_fn other) {
    const steps_fn sides[] = {waits, other};
    for (int k = 0; k < 6; k++) {
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            scene_t s;
            scene_open(&s, 0, k / 2);
            more = steps_run(sides, 2, k % 2, &s, at);
            EXPECT_EQ(waits == sends_below ? s.rc : s.other_rc, CTX_CANCELED);
            scene_close(&s);
            EXPECT_EQ(s.got + s.sent, 0);
        }
    }
}

TEST(a_wait_whose_context_was_canceled_before_its_partner_came_does_nothing) {
    check_after_cancel(receives_below, cancels_then_sends);
    check_after_cancel(sends_below, cancels_then_receives);
}

TEST(the_runtime_stops_clean) { ctx_runtime_stop(); }

TEST_MAIN
