/* Section 11: stages and pipelines. Every item goes on, is skipped or becomes a dead letter, once, or stays where it
   was, however the stage ends. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

#include <errno.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

static ctx_chan_t *chan_of(size_t item_size, size_t capacity) {
    ctx_chan_t *chan = ctx_chan_new(item_size, capacity);
    if (!chan) {
        fprintf(stderr, "no channel for the test: %s\n", strerror(errno));
        abort();
    }
    return chan;
}

static ctx_chan_t *ints(size_t capacity) { return chan_of(sizeof(int), capacity); }

enum { MOST = 6000, FAILURE = -9999 };

/* One stage with its channels, and what became of each item; items are 0, 1, 2 and so on, results twice that. */
typedef struct {
    ctx_stage_desc_t desc;
    ctx_chan_t *in, *out;
    ctx_t *ctx;
    int n; /* items put in */

    pthread_t thread, caller;
    int tid, done; /* [atomic] of the thread that runs the stage */
    int rc;

    gate_t gate;                     /* for functions that stop there */
    int fail_at;                     /* the item that some functions fail at; -1: none */
    int inside, most_inside, called; /* [atomic] calls of fn: now, at most, in all */
    int in_letter;                   /* [atomic] */
    int done_inside;                 /* [atomic] calls that found their context done */
    int skipped[MOST];               /* [atomic] */

    int letters;      /* plain, since dead_letter comes one call at a time */
    int dead[MOST];   /* ... and so is this */
    int reason[MOST]; /* ... and this */
    int results, sent[MOST], left[MOST];
} scene_t;

static int enter(scene_t *s, const ctx_t *ctx) {
    int now = add(&s->inside, 1), most = load(&s->most_inside);
    while (now > most &&
           !__atomic_compare_exchange_n(&s->most_inside, &most, now, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    if (ctx_err(ctx)) add(&s->done_inside, 1);
    return add(&s->called, 1);
}

static int leave(scene_t *s, int item, void *out, int rc) {
    if (rc == 0 && s->out) *(int *)out = 2 * item;
    if (rc > 0) add(&s->skipped[item], 1);
    add(&s->inside, -1);
    return rc;
}

static int doubles(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    enter(s, ctx);
    return leave(s, *(const int *)in, out, 0);
}

/* A third of them is skipped, with various positive numbers. */
static int skips_some(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    int item = *(const int *)in;
    enter(s, ctx);
    return leave(s, item, out, item % 3 ? 0 : item + 1);
}

/* Takes its time, skips some, and may fail at one. */
static int dawdles(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    int item = *(const int *)in;
    uint64_t random = (uint64_t)item;
    enter(s, ctx);
    race_dither(race_random(&random));
    if (race_below(&random, 30) == 0) sched_yield();
    return leave(s, item, out, item == s->fail_at ? FAILURE : item % 5 == 1);
}

static int fails(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    int item = *(const int *)in;
    enter(s, ctx);
    return leave(s, item, out, item == s->fail_at ? FAILURE : 0);
}

static int stops_at_gate(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    enter(s, ctx);
    gate_pass(&s->gate);
    return leave(s, *(const int *)in, out, 0);
}

/* Only item 0 does. */
static int first_stops_at_gate(ctx_t *ctx, const void *in, void *out, void *user) {
    if (*(const int *)in == 0) return stops_at_gate(ctx, in, out, user);
    return doubles(ctx, in, out, user);
}

/* Returns when its context is done, with the err of that; but one item fails at once. */
static int waits_for_its_end(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    int item = *(const int *)in;
    enter(s, ctx);
    if (item != s->fail_at) return leave(s, item, out, ctx_wait(ctx, CTX_FOREVER));
    UNTIL(load(&s->inside) == s->desc.workers); /* the others wait */
    return leave(s, item, out, FAILURE);
}

static void writes_letter(const void *item, int reason, void *user) {
    scene_t *s = (scene_t *)user;
    int i = *(const int *)item;
    EXPECT_EQ(add(&s->in_letter, 1), 1);
    EXPECT(reason < 0);
    s->letters++;
    s->dead[i]++;
    s->reason[i] = reason;
    if (i % 4 == 0) sched_yield();
    add(&s->in_letter, -1);
}

/* Items 0 to n - 1 are in `.in`, which is left open. */
static void scene_open(scene_t *s, int n, size_t room_out, int (*fn)(ctx_t *, const void *, void *, void *)) {
    memset(s, 0, sizeof *s);
    s->n = n;
    s->in = ints((size_t)n + 10);
    s->out = ints(room_out);
    s->ctx = ctx_with_cancel(ctx_background());
    s->fail_at = -1;
    gate_init(&s->gate);
    for (int i = 0; i < n; i++) EXPECT_EQ(ctx_chan_try_send(s->in, &i), 0);
    s->desc.in = s->in;
    s->desc.out = s->out;
    s->desc.fn = fn;
    s->desc.dead_letter = writes_letter;
    s->desc.user = s;
}

static void *runs(void *arg) {
    scene_t *s = (scene_t *)arg;
    s->caller = pthread_self();
    store(&s->tid, thread_id());
    s->rc = ctx_stage_run(s->ctx, &s->desc);
    EXPECT_EQ(load(&s->inside), 0); /* every worker has returned */
    store(&s->done, 1);
    return NULL;
}

static void scene_start(scene_t *s) { s->thread = thread_start(runs, s); }

static int scene_rc(scene_t *s) {
    thread_join(s->thread);
    return s->rc;
}

static void note_result(scene_t *s, int result) {
    EXPECT_EQ(result % 2, 0);
    s->sent[result / 2]++;
    s->results++;
}

/* After its end: `.out` is closed, and each item is in exactly one place. Fills in `left`. */
static void scene_accounts(scene_t *s) {
    int item, rc = CTX_CLOSED;
    if (s->out)
        while ((rc = ctx_chan_try_recv(s->out, &item)) == 0) note_result(s, item);
    EXPECT_EQ(rc, CTX_CLOSED);
    while (ctx_chan_try_recv(s->in, &item) == 0) s->left[item]++;
    for (int i = 0; i < s->n; i++) EXPECT_EQ(s->sent[i] + s->skipped[i] + s->dead[i] + s->left[i], 1);
}

/* Items from this one on are where they were, those before are not. */
static void scene_left_from(const scene_t *s, int first) {
    for (int i = 0; i < s->n; i++) EXPECT_EQ(s->left[i], i >= first);
}

/* Items from this one on are dead letters, those before are not; for one reason. */
static void scene_dead_from(const scene_t *s, int first, int reason) {
    for (int i = 0; i < s->n; i++) {
        EXPECT_EQ(s->dead[i], i >= first);
        if (i >= first) EXPECT_EQ(s->reason[i], reason);
    }
}

static void scene_close(scene_t *s) {
    gate_open(&s->gate);
    gate_destroy(&s->gate);
    ctx_chan_free(s->in);
    ctx_chan_free(s->out);
    ctx_end(s->ctx);
}

static const ctx_on_cancel_t policies[] = {CTX_CANCEL_DROP, CTX_CANCEL_DEAD_LETTER, CTX_CANCEL_FINISH};

/* -- a stage that comes to its end ------------------------------------------------------------------------------ */

/* With `.in` closed, so that it ends by itself. */
static void run_to_the_end(scene_t *s) {
    ctx_chan_close(s->in);
    scene_start(s);
    EXPECT_EQ(scene_rc(s), 0);
    EXPECT_EQ(s->called, s->n);
    EXPECT_EQ(s->letters, 0);
    scene_accounts(s);
    scene_left_from(s, s->n);
}

TEST(every_item_goes_through_and_out_is_closed) {
    scene_t s;
    for (int k = 0; k < 12; k++) {
        scene_open(&s, 100, 100, doubles);
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = k / 3; /* none said: one */
        s.desc.ordered = k % 2 == 1;
        run_to_the_end(&s);
        EXPECT_EQ(s.results, 100);
        EXPECT(s.most_inside <= (k / 3 ? k / 3 : 1));
        scene_close(&s);
    }
}

TEST(a_stage_with_nothing_to_do_closes_out) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 0, 1, doubles);
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = k;
        run_to_the_end(&s);
        scene_close(&s);
    }
}

TEST(without_out_results_go_nowhere) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 50, 1, skips_some);
        ctx_chan_free(s.out);
        s.out = s.desc.out = NULL;
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = k / 3 * 3;
        ctx_chan_close(s.in);
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), 0);
        EXPECT_EQ(s.called, 50);
        EXPECT_EQ(s.letters, 0);
        EXPECT_EQ(ctx_chan_len(s.in), 0);
        scene_close(&s);
    }
}

TEST(positive_results_skip_the_item) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 99, 99, skips_some);
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = 2;
        s.desc.ordered = k >= 3;
        run_to_the_end(&s);
        EXPECT_EQ(s.results, 66);
        scene_close(&s);
    }
}

typedef struct {
    char text[21];
} label_t;

static int labels(ctx_t *ctx, const void *in, void *out, void *user) {
    label_t label;
    (void)ctx;
    (void)user;
    snprintf(label.text, sizeof label.text, "item %d", *(const int *)in);
    memcpy(out, &label, sizeof label);
    return 0;
}

static int initial(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)user;
    *(char *)out = ((const label_t *)in)->text[5];
    return 0;
}

static int counts(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)in;
    (void)out;
    add((int *)user, 1);
    return 0;
}

TEST(items_may_change_their_size_on_the_way) {
    ctx_chan_t *chans[4] = {ints(10), chan_of(sizeof(label_t), 10), chan_of(1, 10), chan_of(0, 10)};
    int counted = 0;
    ctx_stage_desc_t desc;
    memset(&desc, 0, sizeof desc);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_chan_try_send(chans[0], &i), 0);
    ctx_chan_close(chans[0]);
    int (*const fns[])(ctx_t *, const void *, void *, void *) = {labels, initial, counts};
    for (int k = 0; k < 3; k++) {
        desc.in = chans[k];
        desc.out = chans[k + 1];
        desc.fn = fns[k];
        desc.user = &counted;
        desc.ordered = true;
        desc.workers = 1 + k;
        EXPECT_EQ(ctx_stage_run(ctx_background(), &desc), 0);
        EXPECT_EQ(ctx_chan_len(chans[k + 1]), 10);
    }
    desc.in = chans[3];
    desc.out = NULL;
    desc.fn = counts;
    EXPECT_EQ(ctx_stage_run(ctx_background(), &desc), 0);
    EXPECT_EQ(counted, 20);
    for (int k = 0; k < 4; k++) ctx_chan_free(chans[k]);
}

typedef struct {
    double number; /* so that it must be aligned */
    char text[92];
} form_t;

static bool form_is(const form_t *form, double number, int letter) {
    size_t k = 0;
    while (k < sizeof form->text && form->text[k] == letter) k++;
    return k == sizeof form->text && form->number == number;
}

/* Item i is full of the ith letter, and so is its result, in upper case. Writes all of that before it reads. */
static int copies_form(ctx_t *ctx, const void *in, void *out, void *user) {
    const form_t *from = (const form_t *)in;
    form_t *to = (form_t *)out;
    int i = (int)from->number;
    (void)ctx;
    (void)user;
    memset(to, 'A' + i, sizeof *to);
    to->number = -i;
    EXPECT(form_is(from, i, 'a' + i));
    return i == 7 ? FAILURE : 0;
}

static void reads_form(const void *item, int reason, void *user) {
    const form_t *form = (const form_t *)item;
    EXPECT(form_is(form, form->number, 'a' + (int)form->number));
    if (form->number < 7) return; /* another worker had that one in hand */
    EXPECT_EQ(reason, FAILURE);
    *(int *)user += 1;
}

TEST(fn_has_whole_items_and_dead_letters_are_what_came_in) {
    int letters = 0;
    for (int workers = 1; workers <= 5; workers++) {
        ctx_chan_t *in = chan_of(sizeof(form_t), 8), *out = chan_of(sizeof(form_t), 8);
        ctx_stage_desc_t desc;
        form_t form;
        memset(&desc, 0, sizeof desc);
        for (int i = 0; i < 8; i++) {
            memset(&form, 'a' + i, sizeof form);
            form.number = i;
            EXPECT_EQ(ctx_chan_try_send(in, &form), 0);
        }
        desc.in = in;
        desc.out = out;
        desc.workers = workers;
        desc.ordered = true;
        desc.fn = copies_form;
        desc.dead_letter = reads_form;
        desc.user = &letters;
        EXPECT_EQ(ctx_stage_run(ctx_background(), &desc), FAILURE);
        EXPECT_EQ(letters, workers);
        for (int i = 0; ctx_chan_try_recv(out, &form) == 0; i++) EXPECT(form_is(&form, -i, 'A' + i));
        ctx_chan_free(in);
        ctx_chan_free(out);
    }
}

static int notes_its_thread(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    EXPECT(pthread_equal(pthread_self(), s->caller));
    return doubles(ctx, in, out, user);
}

TEST(the_caller_is_one_of_the_workers) {
    scene_t s;
    for (int k = 0; k < 4; k++) {
        scene_open(&s, 20, 20, notes_its_thread);
        s.desc.on_cancel = policies[k % 2];
        s.desc.workers = k / 2;
        run_to_the_end(&s);
        scene_close(&s);
    }
}

TEST(workers_run_side_by_side) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 8, 8, stops_at_gate);
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        s.desc.workers = 8;
        ctx_chan_close(s.in);
        scene_start(&s);
        gate_await(&s.gate, 8); /* all of them inside at once */
        EXPECT_EQ(load(&s.inside), 8);
        gate_open(&s.gate);
        EXPECT_EQ(scene_rc(&s), 0);
        scene_accounts(&s);
        EXPECT_EQ(s.results, 8);
        scene_close(&s);
    }
}

TEST(no_more_workers_run_than_were_asked_for) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 3000, 3000, dawdles);
        s.desc.on_cancel = policies[k];
        s.desc.workers = 3;
        run_to_the_end(&s);
        EXPECT(s.most_inside <= 3);
        scene_close(&s);
    }
}

TEST(more_workers_than_items_all_return) {
    scene_t s;
    scene_open(&s, 3, 3, doubles);
    s.desc.workers = 40;
    run_to_the_end(&s);
    EXPECT_EQ(s.results, 3);
    scene_close(&s);
}

TEST(bad_arguments_are_invalid) {
    scene_t s;
    scene_open(&s, 1, 1, doubles);
    EXPECT_EQ(ctx_stage_run(s.ctx, NULL), CTX_INVALID);
    EXPECT_EQ(ctx_stage_run(NULL, &s.desc), CTX_INVALID);
    for (int k = 0; k < 5; k++) {
        ctx_stage_desc_t desc = s.desc;
        if (k == 0) desc.in = NULL;
        if (k == 1) desc.fn = NULL;
        if (k == 2) desc.workers = -1;
        if (k == 3) desc.on_cancel = (ctx_on_cancel_t)7;
        if (k == 4) desc.out = desc.in;
        EXPECT_EQ(ctx_stage_run(s.ctx, &desc), CTX_INVALID);
    }
    EXPECT_EQ(ctx_chan_len(s.in), 1);
    EXPECT_EQ(s.called + s.letters, 0);
    scene_close(&s);
}

/* The last item takes the context with it. */
static int cancels_at_last(ctx_t *ctx, const void *in, void *out, void *user) {
    scene_t *s = (scene_t *)user;
    int item = *(const int *)in;
    enter(s, ctx);
    if (item == s->n - 1) ctx_cancel(s->ctx);
    return leave(s, item, out, 1);
}

TEST(a_stage_whose_items_all_went_through_returns_0_though_the_last_was_canceled_meanwhile) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 5, 5, cancels_at_last);
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        run_to_the_end(&s);
        scene_close(&s);
    }
}

TEST(a_stage_whose_workers_need_more_memory_than_there_are_addresses_says_so) {
    ctx_chan_t *in = chan_of((size_t)-1 / 8, 0), *out = ints(1);
    ctx_stage_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.in = in;
    desc.out = out;
    desc.fn = counts;
    for (desc.workers = 8; desc.workers <= 1024; desc.workers *= 2) {
        EXPECT_EQ(ctx_stage_run(ctx_background(), &desc), CTX_NO_MEMORY);
        EXPECT_EQ(ctx_chan_try_recv(out, NULL), CTX_CLOSED);
    }
    ctx_chan_free(in);
    ctx_chan_free(out);
}

/* -- order ------------------------------------------------------------------------------------------------------ */

typedef struct {
    ctx_chan_t *chan;
    int n;
} feeder_t;

static void *feeds(void *arg) {
    feeder_t *feeder = (feeder_t *)arg;
    for (int i = 0; i < feeder->n; i++) EXPECT_EQ(ctx_chan_send(feeder->chan, ctx_background(), &i), 0);
    EXPECT_EQ(ctx_chan_close(feeder->chan), 0);
    return NULL;
}

static void run_in_order(size_t room_in, size_t room_out, int workers, ctx_on_cancel_t policy) {
    scene_t s;
    feeder_t feeder;
    scene_open(&s, 0, room_out, dawdles);
    ctx_chan_free(s.in);
    s.in = s.desc.in = feeder.chan = ints(room_in);
    s.n = feeder.n = test_scale(MOST);
    s.desc.workers = workers;
    s.desc.ordered = true;
    s.desc.on_cancel = policy;
    pthread_t feeding = thread_start(feeds, &feeder);
    scene_start(&s);
    int before = -1, item;
    while (ctx_chan_recv(s.out, ctx_background(), &item) == 0) {
        EXPECT(item > before);
        before = item;
        note_result(&s, item);
    }
    EXPECT_EQ(scene_rc(&s), 0);
    thread_join(feeding);
    scene_accounts(&s);
    EXPECT_EQ(s.letters, 0);
    scene_close(&s);
}

TEST(ordered_results_leave_in_the_order_of_their_items) {
    run_in_order(1024, 1024, 8, CTX_CANCEL_DROP);
    run_in_order(64, 4, 8, CTX_CANCEL_DEAD_LETTER);
    run_in_order(1, 1, 8, CTX_CANCEL_FINISH);
    run_in_order(0, 0, 8, CTX_CANCEL_DROP);
    run_in_order(16, 0, 3, CTX_CANCEL_FINISH);
    run_in_order(0, 16, 1, CTX_CANCEL_DEAD_LETTER);
}

TEST(in_an_ordered_stage_nobody_overtakes_a_slow_item) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 20, 20, first_stops_at_gate);
        s.desc.workers = 8;
        s.desc.ordered = true;
        s.desc.on_cancel = policies[k];
        ctx_chan_close(s.in);
        scene_start(&s);
        gate_await(&s.gate, 1);
        UNTIL(load(&s.called) == 8); /* the others have one item each, and are done with it or soon will be */
        EXPECT_EQ(ctx_chan_len(s.out), 0);
        gate_open(&s.gate);
        EXPECT_EQ(scene_rc(&s), 0);
        for (int i = 0; i < 20; i++) {
            int item = -1;
            EXPECT_EQ(ctx_chan_try_recv(s.out, &item), 0);
            EXPECT_EQ(item, 2 * i);
            note_result(&s, item);
        }
        scene_accounts(&s);
        scene_close(&s);
    }
}

TEST(without_order_a_slow_item_holds_nobody_up) {
    scene_t s;
    scene_open(&s, 20, 20, first_stops_at_gate);
    s.desc.workers = 2;
    ctx_chan_close(s.in);
    scene_start(&s);
    UNTIL(ctx_chan_len(s.out) == 19);
    EXPECT_EQ(load(&s.done), 0);
    gate_open(&s.gate);
    EXPECT_EQ(scene_rc(&s), 0);
    scene_accounts(&s);
    EXPECT_EQ(s.results, 20);
    scene_close(&s);
}

/* -- canceled -------------------------------------------------------------------------------------------------- */

/* One worker, which has item 0 in hand and cannot send it on, since nobody receives. */
static void with_one_in_hand(scene_t *s, ctx_on_cancel_t policy, bool ordered) {
    scene_open(s, 10, 0, doubles);
    s->desc.on_cancel = policy;
    s->desc.ordered = ordered;
    scene_start(s);
    UNTIL(load(&s->called) == 1);
    until_asleep(&s->tid);
    EXPECT_EQ(load(&s->done), 0);
}

TEST(a_drop_leaves_in_what_was_not_received) {
    scene_t s;
    for (int ordered = 0; ordered < 2; ordered++) {
        with_one_in_hand(&s, CTX_CANCEL_DROP, ordered);
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        EXPECT_EQ(ctx_chan_len(s.in), 9);
        scene_accounts(&s);
        scene_left_from(&s, 1);
        EXPECT_EQ(s.dead[0], 1); /* what was received is accounted for all the same */
        EXPECT_EQ(s.reason[0], CTX_CANCELED);
        scene_close(&s);
    }
}

TEST(a_drain_hands_everything_to_the_dead_letters) {
    scene_t s;
    for (int ordered = 0; ordered < 2; ordered++) {
        with_one_in_hand(&s, CTX_CANCEL_DEAD_LETTER, ordered);
        ctx_cancel_cause(s.ctx, -7, "enough");
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        scene_dead_from(&s, 0, CTX_CANCELED);
        scene_close(&s);
    }
}

typedef struct {
    ctx_chan_t *chan;
    int called, letters; /* [atomic] */
    int sent;            /* written before it ends */
} stream_t;

static int counts_item(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)in;
    (void)out;
    add(&((stream_t *)user)->called, 1);
    return 0;
}

static void counts_letter(const void *item, int reason, void *user) {
    (void)item;
    EXPECT_EQ(reason, CTX_CANCELED);
    add(&((stream_t *)user)->letters, 1);
    test_sleep_ms(1); /* so that the sender is always ahead */
}

static void *sends_until_closed(void *arg) {
    stream_t *stream = (stream_t *)arg;
    while (ctx_chan_send(stream->chan, ctx_background(), &stream->sent) == 0) stream->sent++;
    return NULL;
}

/* What is in the channel is not what will ever be sent to it. */
TEST(a_drain_ends_although_somebody_goes_on_sending) {
    stream_t stream;
    scene_t s;
    memset(&stream, 0, sizeof stream);
    scene_open(&s, 0, 1, counts_item);
    stream.chan = s.in;
    s.desc.out = NULL;
    s.desc.on_cancel = CTX_CANCEL_DEAD_LETTER;
    s.desc.dead_letter = counts_letter;
    s.desc.user = &stream;
    pthread_t sender = thread_start(sends_until_closed, &stream);
    scene_start(&s);
    UNTIL(load(&stream.called) > 100);
    ctx_cancel(s.ctx);
    for (int i = 0; i < 3000 && !load(&s.done); i++) test_sleep_ms(1);
    EXPECT(load(&s.done));
    ctx_chan_close(s.in);
    thread_join(sender);
    EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
    int left = 0;
    while (ctx_chan_try_recv(s.in, NULL) == 0) left++;
    EXPECT_EQ(stream.called + stream.letters + left, stream.sent);
    scene_close(&s);
}

TEST(an_emit_without_a_budget_is_a_drain) {
    scene_t s;
    for (int ordered = 0; ordered < 2; ordered++) {
        with_one_in_hand(&s, CTX_CANCEL_FINISH, ordered);
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.letters, 10);
        scene_close(&s);
    }
}

TEST(a_stage_that_waits_for_items_ends_when_canceled) {
    scene_t s;
    for (int k = 0; k < 12; k++) {
        scene_open(&s, 0, 1, doubles);
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = 1 + k / 6 * 3;
        s.desc.ordered = k / 3 % 2;
        scene_start(&s);
        until_asleep(&s.tid);
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.called + s.letters, 0);
        scene_close(&s);
    }
}

TEST(the_deadline_of_the_context_ends_it_too) {
    scene_t s;
    for (int k = 0; k < 2; k++) {
        ctx_clock_fake(0);
        scene_open(&s, 5, 0, doubles);
        ctx_end(s.ctx);
        s.ctx = ctx_with_timeout(ctx_background(), CTX_S(60));
        s.desc.on_cancel = policies[k];
        scene_start(&s);
        until_asleep(&s.tid);
        ctx_clock_advance(CTX_S(60) - 1);
        until_asleep(&s.tid);
        EXPECT_EQ(load(&s.done), 0);
        ctx_clock_advance(1);
        EXPECT_EQ(scene_rc(&s), CTX_DEADLINE_EXCEEDED);
        scene_accounts(&s);
        EXPECT_EQ(s.letters, k ? 5 : 1);
        EXPECT_EQ(s.reason[0], CTX_DEADLINE_EXCEEDED);
        scene_close(&s);
        ctx_clock_real();
    }
}

TEST(a_context_that_is_done_already_lets_nothing_run) {
    scene_t s;
    for (int k = 0; k < 12; k++) {
        scene_open(&s, 10, 10, doubles);
        s.desc.on_cancel = policies[k % 3];
        s.desc.workers = 1 + k / 6 * 3;
        s.desc.ordered = k / 3 % 2;
        ctx_cancel(s.ctx);
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.called, 0);
        if (k % 3 == 0) scene_left_from(&s, 0);
        if (k % 3 != 0) scene_dead_from(&s, 0, CTX_CANCELED); /* an emit without a budget is a drain */
        scene_close(&s);
    }
}

TEST(a_failed_context_says_why_and_out_is_closed) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 10, 10, doubles);
        ctx_end(s.ctx);
        s.ctx = ctx_with_cancel(NULL);
        s.desc.on_cancel = policies[k];
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), CTX_INVALID);
        scene_accounts(&s);
        scene_close(&s);
    }
}

TEST(what_the_workers_have_in_hand_is_accounted_for) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 30, 0, doubles);
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        s.desc.workers = 8;
        scene_start(&s);
        UNTIL(load(&s.called) == 8); /* all have one, and nobody receives */
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.called, 8);
        if (k % 3 == 0) scene_left_from(&s, 8);
        EXPECT_EQ(s.letters, k % 3 == 0 ? 8 : 30);
        scene_close(&s);
    }
}

TEST(it_returns_only_when_every_worker_has) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 8, 8, stops_at_gate);
        s.desc.on_cancel = policies[k];
        s.desc.workers = 4;
        scene_start(&s);
        gate_await(&s.gate, 4);
        ctx_cancel(s.ctx);
        until_asleep(&s.tid);
        EXPECT_EQ(load(&s.done), 0);
        EXPECT_EQ(load(&s.inside), 4);
        gate_open(&s.gate);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        scene_close(&s);
    }
}

TEST(fn_sees_the_cancel) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 10, 10, waits_for_its_end);
        s.desc.on_cancel = policies[k];
        s.desc.workers = 3;
        scene_start(&s);
        UNTIL(load(&s.inside) == 3);
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.called, 3);
        EXPECT_EQ(s.letters, k == 0 ? 3 : 10);
        scene_close(&s);
    }
}

static const ctx_key_t place_key = CTX_KEY(int);

static int reads_its_value(ctx_t *ctx, const void *in, void *out, void *user) {
    const int *place = (const int *)ctx_value(ctx, &place_key);
    EXPECT(place && *place == 42);
    return doubles(ctx, in, out, user);
}

TEST(fn_has_the_values_of_the_context) {
    scene_t s;
    int place = 42;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 10, 10, reads_its_value);
        ctx_end(s.ctx);
        s.ctx = ctx_with_value(ctx_background(), &place_key, &place);
        s.desc.on_cancel = policies[k];
        s.desc.workers = 2;
        run_to_the_end(&s);
        scene_close(&s);
    }
}

TEST(a_stage_without_dead_letters_ends_all_the_same) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 10, 0, doubles);
        s.desc.on_cancel = policies[k];
        s.desc.dead_letter = NULL;
        scene_start(&s);
        UNTIL(load(&s.called) == 1);
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        EXPECT_EQ(ctx_chan_try_recv(s.out, NULL), CTX_CLOSED);
        if (k == 0) EXPECT_EQ(ctx_chan_len(s.in), 9);
        scene_close(&s);
    }
}

/* -- emitting --------------------------------------------------------------------------------------------------- */

/* Item 0 is held at the gate while the context is canceled. */
static void canceled_while_emitting(scene_t *s, ctx_dur_t budget, int workers, bool ordered) {
    scene_open(s, 10, 20, first_stops_at_gate);
    s->desc.on_cancel = CTX_CANCEL_FINISH;
    s->desc.finish_budget = budget;
    s->desc.workers = workers;
    s->desc.ordered = ordered;
    scene_start(s);
    gate_await(&s->gate, 1);
    until_asleep(&s->tid);
    ctx_cancel(s->ctx);
    until_asleep(&s->tid); /* it has seen that, and waits for the rest */
    gate_open(&s->gate);
}

TEST(an_emit_goes_on_until_in_is_closed_and_empty) {
    scene_t s;
    for (int k = 0; k < 4; k++) {
        canceled_while_emitting(&s, CTX_S(1000), 1 + k, k % 2);
        UNTIL(ctx_chan_len(s.out) == 10);
        EXPECT_EQ(load(&s.done), 0);
        int late = s.n++; /* one that comes only now goes through as well */
        EXPECT_EQ(ctx_chan_try_send(s.in, &late), 0);
        UNTIL(ctx_chan_len(s.out) == 11);
        EXPECT_EQ(load(&s.done), 0);
        ctx_chan_close(s.in);
        EXPECT_EQ(scene_rc(&s), 0); /* since all items went through */
        scene_accounts(&s);
        EXPECT_EQ(s.results, 11);
        EXPECT_EQ(s.done_inside, 0); /* to fn the budget is time like any other */
        scene_close(&s);
    }
}

TEST(an_emit_has_its_budget_also_if_the_context_is_done_already) {
    scene_t s;
    for (int k = 0; k < 4; k++) {
        scene_open(&s, 10, 10, doubles);
        s.desc.on_cancel = CTX_CANCEL_FINISH;
        s.desc.finish_budget = CTX_S(1000);
        s.desc.workers = 1 + k;
        ctx_cancel(s.ctx);
        run_to_the_end(&s);
        EXPECT_EQ(s.results, 10);
        scene_close(&s);
    }
}

TEST(an_emit_goes_on_until_its_budget_is_over) {
    scene_t s;
    for (int k = 0; k < 4; k++) {
        ctx_clock_fake(0);
        canceled_while_emitting(&s, CTX_S(10), 1 + k, k % 2);
        UNTIL(ctx_chan_len(s.out) == 10);
        ctx_clock_advance(CTX_S(10) - 1);
        until_asleep(&s.tid);
        EXPECT_EQ(load(&s.done), 0);
        int late = s.n++;
        EXPECT_EQ(ctx_chan_try_send(s.in, &late), 0);
        UNTIL(ctx_chan_len(s.out) == 11);
        ctx_clock_advance(1);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.results, 11);
        EXPECT_EQ(s.letters, 0);
        EXPECT_EQ(s.done_inside, 0);
        scene_close(&s);
        ctx_clock_real();
    }
}

TEST(an_emit_counts_its_budget_from_the_end_of_the_context) {
    scene_t s;
    ctx_clock_fake(0);
    scene_open(&s, 10, 10, doubles);
    ctx_end(s.ctx);
    s.ctx = ctx_with_timeout(ctx_background(), CTX_S(60));
    s.desc.on_cancel = CTX_CANCEL_FINISH;
    s.desc.finish_budget = CTX_S(10);
    scene_start(&s);
    until_asleep(&s.tid);
    ctx_clock_advance(CTX_S(60));
    until_asleep(&s.tid);
    ctx_clock_advance(CTX_S(10) - 1);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&s.done), 0);
    ctx_clock_advance(1);
    EXPECT_EQ(scene_rc(&s), CTX_DEADLINE_EXCEEDED);
    scene_accounts(&s);
    EXPECT_EQ(s.results, 10);
    scene_close(&s);
    ctx_clock_real();
}

TEST(what_the_budget_of_an_emit_did_not_suffice_for_becomes_dead_letters) {
    scene_t s;
    for (int k = 0; k < 4; k++) {
        ctx_clock_fake(0);
        scene_open(&s, 20, 5, doubles); /* nobody receives: five go out, and each worker has one in hand */
        s.desc.on_cancel = CTX_CANCEL_FINISH;
        s.desc.finish_budget = CTX_S(10);
        s.desc.workers = 1 + k;
        s.desc.ordered = k % 2;
        scene_start(&s);
        until_asleep(&s.tid);
        ctx_cancel(s.ctx);
        until_asleep(&s.tid);
        UNTIL(load(&s.called) == 6 + k);
        EXPECT_EQ(load(&s.done), 0);
        ctx_clock_advance(CTX_S(10));
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        scene_accounts(&s);
        EXPECT_EQ(s.results, 5);
        EXPECT_EQ(s.letters, 15);
        scene_close(&s);
        ctx_clock_real();
    }
}

TEST(the_end_of_the_budget_reaches_fn) {
    scene_t s;
    ctx_clock_fake(0);
    scene_open(&s, 10, 10, waits_for_its_end);
    s.desc.on_cancel = CTX_CANCEL_FINISH;
    s.desc.finish_budget = CTX_S(10);
    s.desc.workers = 2;
    scene_start(&s);
    UNTIL(load(&s.inside) == 2);
    until_asleep(&s.tid);
    ctx_cancel(s.ctx);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&s.inside), 2);
    ctx_clock_advance(CTX_S(10));
    EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
    scene_accounts(&s);
    EXPECT_EQ(s.called, 2);
    EXPECT_EQ(s.letters, 10);
    scene_close(&s);
    ctx_clock_real();
}

TEST(an_emit_on_the_real_clock_ends_after_its_budget_and_never_early) {
    scene_t s;
    for (int k = 0; k < 3; k++) {
        scene_open(&s, 10, 10, doubles);
        s.desc.on_cancel = CTX_CANCEL_FINISH;
        s.desc.finish_budget = CTX_MS(10) * (k + 1);
        scene_start(&s);
        UNTIL(ctx_chan_len(s.out) == 10);
        ctx_time_t from = ctx_now();
        ctx_cancel(s.ctx);
        EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
        EXPECT(ctx_now() - from >= CTX_MS(10) * (k + 1));
        scene_accounts(&s);
        EXPECT_EQ(s.results, 10);
        scene_close(&s);
    }
}

/* -- stopped by an error ---------------------------------------------------------------------------------------- */

TEST(a_negative_result_stops_the_stage_with_that_error) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 20, 20, fails);
        s.fail_at = 7;
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        s.desc.finish_budget = CTX_S(1000); /* an error is no time to emit */
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), FAILURE);
        scene_accounts(&s);
        EXPECT_EQ(s.called, 8);
        EXPECT_EQ(s.results, 7);
        EXPECT_EQ(s.dead[7], 1);
        EXPECT_EQ(s.reason[7], FAILURE);
        EXPECT_EQ(s.letters, k % 3 == 0 ? 1 : 13);
        if (k % 3 == 0) scene_left_from(&s, 8);
        scene_close(&s);
    }
}

TEST(an_error_ends_what_the_other_workers_do) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 20, 20, waits_for_its_end);
        s.fail_at = 2;
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        s.desc.finish_budget = CTX_S(1000);
        s.desc.workers = 4;
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), FAILURE);
        scene_accounts(&s);
        EXPECT_EQ(s.called, 4);
        EXPECT_EQ(s.letters, k % 3 == 0 ? 4 : 20);
        scene_close(&s);
    }
}

TEST(an_error_ends_workers_that_wait_for_items) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        scene_open(&s, 1, 1, fails);
        s.fail_at = 0;
        s.desc.on_cancel = policies[k % 3];
        s.desc.ordered = k >= 3;
        s.desc.finish_budget = CTX_S(1000);
        s.desc.workers = 4;
        scene_start(&s);
        EXPECT_EQ(scene_rc(&s), FAILURE);
        scene_accounts(&s);
        EXPECT_EQ(s.letters, 1);
        scene_close(&s);
    }
}

TEST(somebody_else_who_closes_out_stops_the_stage) {
    scene_t s;
    for (int k = 0; k < 6; k++) {
        with_one_in_hand(&s, policies[k % 3], k >= 3);
        EXPECT_EQ(ctx_chan_close(s.out), 0);
        EXPECT_EQ(scene_rc(&s), CTX_CLOSED);
        scene_accounts(&s);
        EXPECT_EQ(s.dead[0], 1);
        EXPECT_EQ(s.reason[0], CTX_CLOSED);
        EXPECT_EQ(s.letters, k % 3 == 0 ? 1 : 10);
        if (k % 3 == 0) scene_left_from(&s, 1);
        scene_close(&s);
    }
}

TEST(dead_letters_come_one_at_a_time) {
    scene_t s;
    int n = test_scale(3000);
    for (int k = 0; k < 3; k++) {
        scene_open(&s, n, 0, doubles);
        s.desc.on_cancel = policies[k];
        s.desc.workers = 8;
        scene_start(&s);
        UNTIL(load(&s.called) >= 8);
        ctx_chan_close(s.out); /* all have one that cannot leave, at the same moment */
        EXPECT_EQ(scene_rc(&s), CTX_CLOSED);
        scene_accounts(&s);
        EXPECT_EQ(s.letters, k ? n : 8);
        scene_close(&s);
    }
}

/* -- at random -------------------------------------------------------------------------------------------------- */

/* Take what comes out until a moment at random, then end the stage in one of several ways and take the rest. */
static void end_at_random(uint64_t *seed) {
    enum { ITEMS = 120 };
    scene_t s;
    scene_open(&s, ITEMS, (size_t)(race_below(seed, 3) * race_below(seed, 20)), dawdles);
    s.desc.on_cancel = policies[race_below(seed, 3)];
    s.desc.ordered = race_below(seed, 2);
    s.desc.workers = 1 + race_below(seed, 8);
    s.desc.finish_budget = CTX_US(race_below(seed, 300));
    int how = race_below(seed, 4), takes = race_below(seed, ITEMS / 2), item, before = -1;
    if (how == 0) s.fail_at = race_below(seed, ITEMS);
    if (how == 1) ctx_chan_close(s.in);
    scene_start(&s);
    while (takes-- > 0 && ctx_chan_recv(s.out, ctx_background(), &item) == 0) {
        EXPECT(!s.desc.ordered || item > before);
        note_result(&s, before = item);
    }
    if (how == 2) ctx_chan_close(s.out);
    race_dither(race_random(seed));
    ctx_cancel(s.ctx);
    while (ctx_chan_recv(s.out, ctx_background(), &item) == 0) {
        EXPECT(!s.desc.ordered || item > before);
        note_result(&s, before = item);
    }
    int rc = scene_rc(&s);
    EXPECT(rc == 0 || rc == CTX_CANCELED || rc == FAILURE || rc == CTX_CLOSED);
    scene_accounts(&s);
    if (rc == 0) EXPECT_EQ(s.letters, 0);
    scene_close(&s);
}

TEST(however_and_whenever_a_stage_ends_every_item_is_in_one_place) {
    uint64_t seed = 3;
    for (int i = 0; i < test_scale(1500); i++) end_at_random(&seed);
}

/* -- pipelines -------------------------------------------------------------------------------------------------- */

enum { STAGES = 3 };

/* For a group: runs the stage of a scene. */
static int runs_in_group(ctx_t *ctx, void *arg) {
    scene_t *s = (scene_t *)arg;
    store(&s->tid, thread_id());
    return s->rc = ctx_stage_run(ctx, &s->desc);
}

/* Three scenes in a row, each with the next one's `.in` as its `.out`. */
static void connect(scene_t *s, size_t room) {
    for (int k = 0; k + 1 < STAGES; k++) {
        ctx_chan_free(s[k + 1].in);
        ctx_chan_free(s[k].out);
        s[k].out = s[k].desc.out = s[k + 1].in = s[k + 1].desc.in = ints(room);
    }
}

static void disconnect(scene_t *s) {
    for (int k = 0; k + 1 < STAGES; k++) s[k].out = NULL; /* it is the next one's */
    for (int k = 0; k < STAGES; k++) scene_close(&s[k]);
}

TEST(a_close_at_the_source_runs_through_the_whole_pipeline) {
    for (size_t room = 0; room <= 2; room++) {
        scene_t s[STAGES];
        for (int k = 0; k < STAGES; k++) scene_open(&s[k], k ? 0 : 50, 50, doubles);
        connect(s, room);
        ctx_chan_close(s[0].in);
        ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
        for (int k = 0; k < STAGES; k++) EXPECT_EQ(ctx_group_go(group, runs_in_group, &s[k]), 0);
        EXPECT_EQ(ctx_group_wait(group), 0);
        int sum = 0, item;
        while (ctx_chan_try_recv(s[2].out, &item) == 0) sum += item;
        EXPECT_EQ(ctx_chan_try_recv(s[2].out, NULL), CTX_CLOSED);
        EXPECT_EQ(sum, 8 * (50 * 49 / 2));
        disconnect(s);
    }
}

/* The stages wait for each other, and the pool has too few workers for all of them. Nobody runs one by waiting. */
static int feeds_the_first(ctx_t *ctx, void *arg) {
    scene_t *s = (scene_t *)arg;
    for (int i = 0; i < s->n; i++) {
        int rc = ctx_chan_send(s->in, ctx, &i);
        if (rc) return rc;
    }
    return ctx_chan_close(s->in);
}

TEST(stages_of_one_group_run_on_a_pool_with_too_few_workers_for_them) {
    for (int workers = 1; workers <= 2; workers++) {
        for (int late = 0; late < 2; late++) { /* the source comes before the stages, or when all of them wait */
            enum { FED = 50 };
            scene_t s[STAGES];
            ctx_pool_desc_t desc;
            ctx_group_desc_t below;
            memset(&desc, 0, sizeof desc);
            memset(&below, 0, sizeof below);
            desc.workers = workers;
            below.pool = ctx_pool_new(ctx_background(), &desc);
            for (int k = 0; k < STAGES; k++) scene_open(&s[k], 0, FED, doubles);
            connect(s, 1);
            ctx_chan_free(s[0].in);
            s[0].in = s[0].desc.in = ints(FED);
            s[0].n = FED;
            ctx_group_t *group = ctx_group_new(ctx_background(), &below);
            if (!late) EXPECT_EQ(ctx_group_go(group, feeds_the_first, &s[0]), 0);
            for (int k = STAGES - 1; k >= 0; k--) EXPECT_EQ(ctx_group_go(group, runs_in_group, &s[k]), 0);
            if (late) EXPECT_EQ(ctx_group_go(group, feeds_the_first, &s[0]), 0);
            int sum = 0, item;
            while (ctx_chan_recv(s[STAGES - 1].out, ctx_background(), &item) == 0) sum += item;
            EXPECT_EQ(sum, 8 * (FED * (FED - 1) / 2));
            EXPECT_EQ(ctx_group_wait(group), 0);
            ctx_pool_drain(below.pool, CTX_FOREVER, NULL);
            ctx_pool_free(below.pool);
            disconnect(s);
        }
    }
}

TEST(in_a_group_the_first_stage_that_fails_stops_the_others) {
    for (int at = 0; at < STAGES; at++) {
        scene_t s[STAGES];
        for (int k = 0; k < STAGES; k++) scene_open(&s[k], k ? 0 : 50, 0, doubles);
        connect(s, 2);
        s[at].desc.fn = fails;
        s[at].fail_at = 0; /* at once; what comes before it stands at full channels, what comes after at empty ones */
        ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
        for (int k = 0; k < STAGES; k++)
            if (k != at) EXPECT_EQ(ctx_group_go(group, runs_in_group, &s[k]), 0);
        for (int k = 0; k < STAGES; k++)
            if (k != at) until_asleep(&s[k].tid);
        EXPECT_EQ(ctx_group_go(group, runs_in_group, &s[at]), 0);
        EXPECT_EQ(ctx_group_wait(group), FAILURE);
        EXPECT_EQ(s[at].rc, FAILURE);
        for (int k = 0; k < STAGES; k++) EXPECT(s[k].rc < 0 || k > at); /* one after it may find its input closed */
        disconnect(s);
    }
}

/* A million items, in runs that are cut off at random, each with new channels and a new context on what is left. */
typedef struct {
    int id, place; /* in the run */
    int steps;     /* stages that it has gone through */
} parcel_t;

enum { BY_COUNT, BY_ERROR, BY_CLOSE, BY_TIME, CUTS };

typedef struct flood flood_t;

typedef struct {
    flood_t *flood;
    ctx_stage_desc_t desc;
    int number;
} flood_stage_t;

struct flood {
    int n, at; /* todo[at] to todo[n - 1] are to be fed */
    int *todo;
    int *ended;  /* [atomic] for each item, how often it came to an end */
    int outputs; /* of all runs */
    int skipped; /* [atomic] */
    int letters; /* [atomic] */

    ctx_chan_t *chans[STAGES + 1];
    flood_stage_t stages[STAGES];
    ctx_t *ctx;
    int cut, cut_stage, cut_at;
    int calls;   /* [atomic] of the stage that cuts */
    bool closes; /* the feeder closes its end */
    bool ordered;
    uint64_t seed;
};

static bool to_be_skipped(int id, int stage) { return id % 51 == stage * 17; }

/* What ends the run when the time has come; the result of fn. */
static int cut_off(flood_t *flood) {
    if (flood->cut == BY_COUNT) ctx_cancel(flood->ctx);
    if (flood->cut == BY_CLOSE) ctx_chan_close(flood->chans[flood->cut_stage + 1]);
    return flood->cut == BY_ERROR ? FAILURE : 0;
}

static int one_step(ctx_t *ctx, const void *in, void *out, void *user) {
    const flood_stage_t *stage = (const flood_stage_t *)user;
    flood_t *flood = stage->flood;
    parcel_t parcel = *(const parcel_t *)in;
    (void)ctx;
    EXPECT_EQ(parcel.steps, stage->number);
    parcel.steps++;
    *(parcel_t *)out = parcel;
    if (stage->number == flood->cut_stage && add(&flood->calls, 1) == flood->cut_at) {
        int rc = cut_off(flood);
        if (rc) return rc;
    }
    if (!to_be_skipped(parcel.id, stage->number)) return 0;
    add(&flood->skipped, 1);
    add(&flood->ended[parcel.id], 1);
    return 1;
}

static void one_letter(const void *item, int reason, void *user) {
    const flood_stage_t *stage = (const flood_stage_t *)user;
    const parcel_t *parcel = (const parcel_t *)item;
    EXPECT(reason < 0);
    EXPECT_EQ(parcel->steps, stage->number); /* as it came in */
    add(&stage->flood->letters, 1);
    add(&stage->flood->ended[parcel->id], 1);
}

static int flood_stage_runs(ctx_t *ctx, void *arg) { return ctx_stage_run(ctx, &((flood_stage_t *)arg)->desc); }

static int flood_feeds(ctx_t *ctx, void *arg) {
    flood_t *flood = (flood_t *)arg;
    int rc = 0;
    for (int i = 0; flood->at < flood->n; i++, flood->at++) {
        parcel_t parcel;
        parcel.id = flood->todo[flood->at];
        parcel.place = i;
        parcel.steps = 0;
        rc = ctx_chan_send(flood->chans[0], ctx, &parcel);
        if (rc) break;
    }
    if (rc == 0 || flood->closes) ctx_chan_close(flood->chans[0]);
    return rc;
}

/* Some runs are wide and long, most are narrow and short. */
static void flood_draw(flood_t *flood) {
    static const size_t rooms[] = {1024, 16, 1, 0};
    uint64_t *seed = &flood->seed;
    bool wide = race_below(seed, 5) == 0;
    flood->cut = race_below(seed, CUTS);
    flood->cut_stage = flood->cut == BY_TIME ? -1 : race_below(seed, STAGES);
    flood->cut_at = 1 + race_below(seed, flood->n / (wide ? 25 : 1000) + 1);
    flood->calls = 0;
    flood->closes = race_below(seed, 2) == 0;
    flood->ordered = race_below(seed, 4) == 0;
    flood->ctx = flood->cut == BY_TIME ? ctx_with_timeout(ctx_background(), CTX_US(1 + race_below(seed, 20000)))
                                       : ctx_with_cancel(ctx_background());
    for (int k = 0; k <= STAGES; k++)
        flood->chans[k] = chan_of(sizeof(parcel_t), rooms[race_below(seed, wide ? 2 : 4)]);
    for (int k = 0; k < STAGES; k++) {
        flood_stage_t *stage = &flood->stages[k];
        memset(stage, 0, sizeof *stage);
        stage->flood = flood;
        stage->number = k;
        stage->desc.in = flood->chans[k];
        stage->desc.out = flood->chans[k + 1];
        stage->desc.fn = one_step;
        stage->desc.dead_letter = one_letter;
        stage->desc.user = stage;
        stage->desc.workers = 1 + race_below(seed, 4);
        stage->desc.ordered = flood->ordered || race_below(seed, 4) == 0;
        stage->desc.on_cancel = policies[race_below(seed, 3)];
        stage->desc.finish_budget = CTX_US(race_below(seed, 2000));
    }
}

static void flood_takes(flood_t *flood) {
    parcel_t parcel;
    int before = -1;
    while (ctx_chan_recv(flood->chans[STAGES], ctx_background(), &parcel) == 0) {
        EXPECT_EQ(parcel.steps, STAGES);
        EXPECT(!flood->ordered || parcel.place > before);
        before = parcel.place;
        flood->outputs++;
        add(&flood->ended[parcel.id], 1);
    }
}

/* What was not received goes back to what is to be fed. */
static void flood_collects(flood_t *flood) {
    parcel_t parcel;
    for (int k = 0; k <= STAGES; k++) {
        while (ctx_chan_try_recv(flood->chans[k], &parcel) == 0) {
            EXPECT_EQ(parcel.steps, k);
            EXPECT(flood->at > 0);
            if (flood->at > 0) flood->todo[--flood->at] = parcel.id;
        }
        ctx_chan_free(flood->chans[k]);
    }
    ctx_end(flood->ctx);
}

static void flood_run(flood_t *flood) {
    flood_draw(flood);
    ctx_group_t *group = ctx_group_new(flood->ctx, NULL);
    bool fed = ctx_group_go(group, flood_feeds, flood) == 0;
    if (!fed) ctx_chan_close(flood->chans[0]);
    for (int k = 0; k < STAGES; k++) /* one that is refused cannot close its end */
        if (ctx_group_go(group, flood_stage_runs, &flood->stages[k]) != 0) ctx_chan_close(flood->chans[k + 1]);
    flood_takes(flood);
    int rc = ctx_group_wait(group);
    EXPECT(rc == 0 || rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED || rc == FAILURE || rc == CTX_CLOSED);
    flood_collects(flood);
    EXPECT_EQ(flood->outputs + load(&flood->skipped) + load(&flood->letters) + flood->n - flood->at, flood->n);
}

TEST(a_million_items_go_through_three_stages_exactly_once_however_often_these_are_cut_off) {
    flood_t flood;
    memset(&flood, 0, sizeof flood);
    flood.n = test_scale(1000000);
    flood.todo = (int *)calloc((size_t)flood.n, sizeof(int));
    flood.ended = (int *)calloc((size_t)flood.n, sizeof(int));
    flood.seed = 11;
    for (int i = 0; i < flood.n; i++) flood.todo[i] = i;
    while (flood.at < flood.n && load(&test_state.failures) == 0) flood_run(&flood);
    int once = 0;
    for (int i = 0; i < flood.n; i++) once += flood.ended[i] == 1;
    EXPECT_EQ(once, flood.n);
    EXPECT_EQ(flood.outputs + flood.skipped + flood.letters, flood.n);
    EXPECT(flood.outputs > 0 && flood.skipped > 0 && flood.letters > 0);
    free(flood.todo);
    free(flood.ended);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
