/* Section 11: channels and select. What was sent is received once, whoever waits, closes or is canceled meanwhile. */
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

static void put(ctx_chan_t *chan, int item) { EXPECT_EQ(ctx_chan_send(chan, ctx_background(), &item), 0); }

static int take(ctx_chan_t *chan) {
    int item = -1;
    EXPECT_EQ(ctx_chan_recv(chan, ctx_background(), &item), 0);
    return item;
}

/* Fill a channel with 1, 2, 3 and so on. */
static void fill(ctx_chan_t *chan, size_t capacity) {
    int item = 0;
    for (size_t i = 0; i < capacity; i++) {
        item++;
        EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
    }
    EXPECT_EQ(ctx_chan_try_send(chan, &item), CTX_QUEUE_FULL);
    EXPECT_EQ(ctx_chan_len(chan), capacity);
}

/* What can be taken is `first` and so on, `n` of them, and `then` is the answer. */
static void holds(ctx_chan_t *chan, int first, size_t n, int then) {
    for (size_t i = 0; i < n; i++) {
        int item = -1;
        EXPECT_EQ(ctx_chan_try_recv(chan, &item), 0);
        EXPECT_EQ(item, first + (int)i);
    }
    EXPECT_EQ(ctx_chan_try_recv(chan, NULL), then);
    EXPECT_EQ(ctx_chan_len(chan), 0);
}

enum { UNSET = 77 }; /* an rc that no case gets */

static ctx_case_t case_of(ctx_chan_t *chan, int op, void *item) {
    ctx_case_t one;
    one.chan = chan;
    one.op = op;
    one.item = item;
    one.rc = UNSET;
    return one;
}

/* One send or receive; with `beside`, by a select that also waits in vain on that channel. */
static int act(ctx_chan_t *chan, ctx_t *ctx, int op, int *item, ctx_chan_t *beside) {
    if (!beside) return op == CTX_SEND ? ctx_chan_send(chan, ctx, item) : ctx_chan_recv(chan, ctx, item);
    int nothing = -1;
    ctx_case_t cases[3];
    cases[0] = case_of(NULL, op, NULL);
    cases[1] = case_of(chan, op, item);
    cases[2] = case_of(beside, CTX_RECV, &nothing);
    int at = ctx_select(ctx, cases, 3);
    EXPECT_EQ(nothing, -1);
    if (at < 0) return at;
    EXPECT_EQ(at, 1);
    return cases[1].rc;
}

/* A thread that does one of these. */
typedef struct {
    ctx_chan_t *chan, *beside;
    ctx_t *ctx;
    int op, item;
    int tid;  /* [atomic] */
    int done; /* [atomic] */
    int rc;   /* written before done */
} actor_t;

static void *acts(void *arg) {
    actor_t *a = (actor_t *)arg;
    store(&a->tid, thread_id());
    a->rc = act(a->chan, a->ctx, a->op, &a->item, a->beside);
    store(&a->done, 1);
    return NULL;
}

/* Returns when it has queued and parked. */
static pthread_t act_parked(actor_t *a, ctx_chan_t *chan, ctx_t *ctx, int op, int item, ctx_chan_t *beside) {
    memset(a, 0, sizeof *a);
    a->chan = chan;
    a->beside = beside;
    a->ctx = ctx;
    a->op = op;
    a->item = item;
    pthread_t thread = thread_start(acts, a);
    until_asleep(&a->tid);
    EXPECT_EQ(load(&a->done), 0);
    return thread;
}

/* An open and empty channel works as a new one does: nobody is queued there who has gone. */
static void works_as_new(ctx_chan_t *chan, size_t capacity) {
    EXPECT_EQ(ctx_chan_try_recv(chan, NULL), CTX_NOT_READY);
    fill(chan, capacity);
    holds(chan, 1, capacity, CTX_NOT_READY);
    actor_t receiver;
    pthread_t thread = act_parked(&receiver, chan, ctx_background(), CTX_RECV, -1, NULL);
    put(chan, 5);
    thread_join(thread);
    EXPECT_EQ(receiver.rc, 0);
    EXPECT_EQ(receiver.item, 5);
}

static int by_value(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static bool same_items(int *a, size_t n, int *b, size_t m) {
    if (n != m) return false;
    qsort(a, n, sizeof *a, by_value);
    qsort(b, m, sizeof *b, by_value);
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* A context that is done for this reason: canceled, expired, or failed from the start. */
static ctx_t *done_context(int err) {
    if (err == CTX_DEADLINE_EXCEEDED) return ctx_with_timeout(ctx_background(), 0);
    if (err == CTX_INVALID) return ctx_with_cancel(NULL);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    return ctx;
}

/* -- one thread ------------------------------------------------------------------------------------------------- */

TEST(items_come_out_in_the_order_they_went_in) {
    const int capacities[] = {1, 2, 3, 7, 64};
    uint64_t random = 1;
    for (int c = 0; c < 5; c++) {
        ctx_chan_t *chan = ints((size_t)capacities[c]);
        int in = 0, out = 0;
        while (out < 1000) {
            bool more = random_next(&random) % 2 == 0;
            if (more && in - out < capacities[c]) put(chan, in++);
            if (!more && in > out) EXPECT_EQ(take(chan), out++);
            EXPECT_EQ(ctx_chan_len(chan), in - out);
        }
        ctx_chan_free(chan);
    }
}

enum { LARGEST = 5000, MARGIN = 8 };

typedef struct {
    ctx_chan_t *chan;
    size_t size;
    int n;
} parcels_t;

static unsigned char byte_of(int parcel, size_t at) { return (unsigned char)(parcel * 31 + (int)(at % 251)); }

/* Uses one buffer for all, so that what arrives must be a copy. */
static void *sends_parcels(void *arg) {
    parcels_t *p = (parcels_t *)arg;
    unsigned char item[LARGEST];
    for (int i = 0; i < p->n; i++) {
        for (size_t k = 0; k < p->size; k++) item[k] = byte_of(i, k);
        EXPECT_EQ(ctx_chan_send(p->chan, ctx_background(), item), 0);
        memset(item, 0xEE, sizeof item);
    }
    return NULL;
}

static void receive_parcel(const parcels_t *p, int i) {
    unsigned char item[LARGEST + MARGIN];
    memset(item, 0xAA, sizeof item);
    EXPECT_EQ(ctx_chan_recv(p->chan, ctx_background(), item), 0);
    size_t k = 0;
    while (k < p->size && item[k] == byte_of(i, k)) k++;
    EXPECT_EQ(k, p->size);
    while (k < p->size + MARGIN && item[k] == 0xAA) k++;
    EXPECT_EQ(k, p->size + MARGIN);
}

TEST(items_of_every_size_are_copied_in_and_out) {
    const size_t sizes[] = {0, 1, 3, 8, 100, LARGEST}, capacities[] = {0, 1, 3};
    for (int s = 0; s < 6; s++)
        for (int c = 0; c < 3; c++) {
            parcels_t p;
            p.chan = chan_of(sizes[s], capacities[c]);
            p.size = sizes[s];
            p.n = 20;
            pthread_t sender = thread_start(sends_parcels, &p);
            for (int i = 0; i < p.n; i++) receive_parcel(&p, i);
            thread_join(sender);
            ctx_chan_free(p.chan);
        }
}

TEST(an_item_whose_bytes_do_not_matter_is_taken_all_the_same) {
    ctx_chan_t *chan = ints(4);
    fill(chan, 4);
    EXPECT_EQ(ctx_chan_recv(chan, ctx_background(), NULL), 0);
    EXPECT_EQ(ctx_chan_try_recv(chan, NULL), 0);
    ctx_case_t one = case_of(chan, CTX_RECV, NULL);
    EXPECT_EQ(ctx_select(ctx_background(), &one, 1), 0);
    EXPECT_EQ(one.rc, 0);
    holds(chan, 4, 1, CTX_NOT_READY);
    ctx_chan_free(chan);
}

TEST(a_channel_too_large_for_memory_is_refused) {
    const size_t most = (size_t)-1;
    const size_t wants[][2] = {{most, 1},         {1, most}, {most / 2 + 2, 2}, {most / 8 + 2, 8},
                               {2, most / 2 + 2}, {most, 0}}; /* of which a stage needs one in hand */
    for (int i = 0; i < 6; i++) {
        errno = 0;
        EXPECT(ctx_chan_new(wants[i][0], wants[i][1]) == NULL);
        EXPECT_EQ(errno, ENOMEM);
    }
}

TEST(bad_arguments_are_invalid) {
    ctx_chan_t *chan = ints(1);
    int item = 1;
    ctx_case_t bad = case_of(chan, 7, &item);
    EXPECT_EQ(ctx_chan_send(NULL, ctx_background(), &item), CTX_INVALID);
    EXPECT_EQ(ctx_chan_recv(NULL, ctx_background(), &item), CTX_INVALID);
    EXPECT_EQ(ctx_chan_send(chan, ctx_background(), NULL), CTX_INVALID);
    EXPECT_EQ(ctx_chan_try_send(NULL, &item), CTX_INVALID);
    EXPECT_EQ(ctx_chan_try_recv(NULL, &item), CTX_INVALID);
    EXPECT_EQ(ctx_chan_try_send(chan, NULL), CTX_INVALID);
    EXPECT_EQ(ctx_chan_close(NULL), CTX_INVALID);
    EXPECT_EQ(ctx_select(ctx_background(), &bad, 1), CTX_INVALID);
    EXPECT_EQ(ctx_try_select(&bad, 1), CTX_INVALID);
    EXPECT_EQ(ctx_try_select(NULL, 1), CTX_INVALID);
    EXPECT_EQ(ctx_try_select(&bad, (size_t)INT32_MAX + 1), CTX_INVALID);
    EXPECT_EQ(ctx_select(ctx_background(), &bad, (size_t)-1), CTX_INVALID);
    EXPECT_EQ(ctx_chan_len(chan), 0);
    ctx_chan_free(chan);
}

TEST(try_forms_tell_full_from_empty) {
    for (size_t capacity = 0; capacity <= 3; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        int item = -1;
        EXPECT_EQ(ctx_chan_try_recv(chan, &item), CTX_NOT_READY);
        EXPECT_EQ(item, -1);
        fill(chan, capacity);
        holds(chan, 1, capacity, CTX_NOT_READY);
        ctx_chan_free(chan);
    }
}

TEST(a_closed_channel_takes_nothing_and_gives_what_it_has) {
    for (size_t capacity = 0; capacity <= 3; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        fill(chan, capacity);
        EXPECT_EQ(ctx_chan_close(chan), 0);
        int item = 9;
        EXPECT_EQ(ctx_chan_send(chan, ctx_background(), &item), CTX_CLOSED);
        EXPECT_EQ(ctx_chan_try_send(chan, &item), CTX_CLOSED);
        EXPECT_EQ(ctx_chan_len(chan), capacity);
        for (size_t i = 1; i <= capacity; i++) EXPECT_EQ(take(chan), i);
        EXPECT_EQ(ctx_chan_recv(chan, ctx_background(), &item), CTX_CLOSED);
        EXPECT_EQ(ctx_chan_try_recv(chan, &item), CTX_CLOSED);
        EXPECT_EQ(ctx_chan_send(chan, ctx_background(), &item), CTX_CLOSED); /* also when there is room again */
        EXPECT_EQ(item, 9);
        ctx_chan_free(chan);
    }
}

TEST(closing_again_is_closed) {
    ctx_chan_t *chan = ints(1);
    fill(chan, 1);
    EXPECT_EQ(ctx_chan_close(chan), 0);
    EXPECT_EQ(ctx_chan_close(chan), CTX_CLOSED);
    holds(chan, 1, 1, CTX_CLOSED);
    EXPECT_EQ(ctx_chan_close(chan), CTX_CLOSED);
    ctx_chan_free(chan);
}

/* Both could be done at once, and neither is. */
static void with_a_done_context(ctx_t *ctx, int err) {
    ctx_chan_t *chan = ints(2);
    put(chan, 1);
    int item = 8;
    ctx_case_t cases[2];
    cases[0] = case_of(chan, CTX_SEND, &item);
    cases[1] = case_of(chan, CTX_RECV, &item);
    for (int closed = 0; closed < 2; closed++) {
        EXPECT_EQ(ctx_chan_send(chan, ctx, &item), err);
        EXPECT_EQ(ctx_chan_recv(chan, ctx, &item), err);
        EXPECT_EQ(ctx_select(ctx, cases, 2), err);
        EXPECT_EQ(item, 8);
        if (!closed) ctx_chan_close(chan);
    }
    EXPECT_EQ(ctx_select(ctx, NULL, 0), err);
    holds(chan, 1, 1, CTX_CLOSED);
    ctx_chan_free(chan);
}

TEST(a_done_context_is_looked_at_first) {
    const int errs[] = {CTX_CANCELED, CTX_DEADLINE_EXCEEDED, CTX_INVALID};
    for (int i = 0; i < 3; i++) {
        ctx_t *ctx = done_context(errs[i]);
        with_a_done_context(ctx, errs[i]);
        ctx_end(ctx);
    }
}

TEST(a_done_context_takes_no_partner_either) {
    ctx_t *ctx = done_context(CTX_CANCELED);
    ctx_chan_t *chan = ints(0);
    actor_t receiver, sender;
    int item = 3;
    pthread_t thread = act_parked(&receiver, chan, ctx_background(), CTX_RECV, -1, NULL);
    EXPECT_EQ(ctx_chan_send(chan, ctx, &item), CTX_CANCELED);
    EXPECT_EQ(load(&receiver.done), 0);
    put(chan, 4);
    thread_join(thread);
    EXPECT_EQ(receiver.item, 4);
    thread = act_parked(&sender, chan, ctx_background(), CTX_SEND, 5, NULL);
    EXPECT_EQ(ctx_chan_recv(chan, ctx, &item), CTX_CANCELED);
    EXPECT_EQ(item, 3);
    EXPECT_EQ(take(chan), 5);
    thread_join(thread);
    ctx_chan_free(chan);
    ctx_end(ctx);
}

TEST(freeing_forgets_what_is_in_the_channel) {
    long before = blocks_live();
    for (size_t capacity = 0; capacity <= 100; capacity += 50) {
        ctx_chan_t *chan = ints(capacity);
        fill(chan, capacity);
        if (capacity == 100) ctx_chan_close(chan);
        ctx_chan_free(chan);
    }
    ctx_chan_free(NULL);
    EXPECT_EQ(blocks_live(), before);
}

/* -- one that waits --------------------------------------------------------------------------------------------- */

/* A sender that waits at a full channel, or a receiver that waits at an empty one. */
typedef struct {
    ctx_chan_t *chan, *beside;
    size_t capacity;
    ctx_t *ctx;
    actor_t actor;
    pthread_t thread;
} scene_t;

/* The sender's item is the one after those in the channel. Takes over `ctx`. */
static void scene_open(scene_t *s, int op, size_t capacity, bool by_select, ctx_t *ctx) {
    s->chan = ints(capacity);
    s->beside = by_select ? ints(1) : NULL;
    s->capacity = capacity;
    s->ctx = ctx;
    if (op == CTX_SEND) fill(s->chan, capacity);
    int item = op == CTX_SEND ? (int)capacity + 1 : -1;
    s->thread = act_parked(&s->actor, s->chan, ctx, op, item, s->beside);
    EXPECT_EQ(ctx_chan_len(s->chan), op == CTX_SEND ? capacity : 0);
}

/* What its call gave. */
static int scene_rc(scene_t *s) {
    thread_join(s->thread);
    return s->actor.rc;
}

static void scene_close(scene_t *s) {
    if (s->beside) works_as_new(s->beside, 1);
    ctx_chan_free(s->beside);
    ctx_chan_free(s->chan);
    ctx_end(s->ctx);
}

/* With the capacities 0, 1 and 4, by a call of its own and by a select. */
static void in_each_form(void (*body)(size_t capacity, bool by_select)) {
    const size_t capacities[] = {0, 1, 4};
    for (int c = 0; c < 3; c++) {
        body(capacities[c], false);
        body(capacities[c], true);
    }
}

static void send_wakes_receive(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_RECV, capacity, by_select, ctx_background());
    put(s.chan, 5);
    EXPECT_EQ(scene_rc(&s), 0);
    EXPECT_EQ(s.actor.item, 5);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_receive_is_woken_by_a_send) { in_each_form(send_wakes_receive); }

static void try_send_wakes_receive(size_t capacity, bool by_select) {
    scene_t s;
    int item = 6;
    scene_open(&s, CTX_RECV, capacity, by_select, ctx_background());
    EXPECT_EQ(ctx_chan_try_send(s.chan, &item), 0);
    EXPECT_EQ(scene_rc(&s), 0);
    EXPECT_EQ(s.actor.item, 6);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_receive_is_woken_by_a_try_send) { in_each_form(try_send_wakes_receive); }

static void receive_wakes_send(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_SEND, capacity, by_select, ctx_background());
    EXPECT_EQ(take(s.chan), 1);
    EXPECT_EQ(scene_rc(&s), 0);
    EXPECT_EQ(ctx_chan_len(s.chan), capacity);
    holds(s.chan, 2, capacity, CTX_NOT_READY);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_send_is_woken_by_a_receive) { in_each_form(receive_wakes_send); }

static void try_receive_wakes_send(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_SEND, capacity, by_select, ctx_background());
    EXPECT_EQ(ctx_chan_try_recv(s.chan, NULL), 0);
    EXPECT_EQ(scene_rc(&s), 0);
    holds(s.chan, 2, capacity, CTX_NOT_READY);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_send_is_woken_by_a_try_receive) { in_each_form(try_receive_wakes_send); }

static void close_wakes_receive(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_RECV, capacity, by_select, ctx_background());
    EXPECT_EQ(ctx_chan_close(s.chan), 0);
    EXPECT_EQ(scene_rc(&s), CTX_CLOSED);
    EXPECT_EQ(s.actor.item, -1);
    scene_close(&s);
}

TEST(a_waiting_receive_is_woken_by_a_close) { in_each_form(close_wakes_receive); }

static void close_wakes_send(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_SEND, capacity, by_select, ctx_background());
    EXPECT_EQ(ctx_chan_close(s.chan), 0);
    EXPECT_EQ(scene_rc(&s), CTX_CLOSED);
    holds(s.chan, 1, capacity, CTX_CLOSED); /* and not what waited outside */
    scene_close(&s);
}

TEST(a_waiting_send_is_woken_by_a_close) { in_each_form(close_wakes_send); }

static void cancel_wakes_receive(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_RECV, capacity, by_select, ctx_with_cancel(ctx_background()));
    ctx_cancel_cause(s.ctx, -7, "enough");
    EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
    EXPECT_EQ(s.actor.item, -1);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_receive_is_woken_by_a_cancel) { in_each_form(cancel_wakes_receive); }

static void cancel_wakes_send(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_SEND, capacity, by_select, ctx_with_cancel(ctx_background()));
    ctx_cancel_cause(s.ctx, -7, "enough");
    EXPECT_EQ(scene_rc(&s), CTX_CANCELED);
    holds(s.chan, 1, capacity, CTX_NOT_READY);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_send_is_woken_by_a_cancel) { in_each_form(cancel_wakes_send); }

static void deadline_wakes_receive(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_RECV, capacity, by_select, ctx_with_timeout(ctx_background(), CTX_S(3600)));
    ctx_clock_advance(CTX_S(3600) - 1);
    until_asleep(&s.actor.tid);
    EXPECT_EQ(load(&s.actor.done), 0);
    ctx_clock_advance(1);
    EXPECT_EQ(scene_rc(&s), CTX_DEADLINE_EXCEEDED);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_receive_is_woken_by_its_deadline) {
    ctx_clock_fake(0);
    in_each_form(deadline_wakes_receive);
    ctx_clock_real();
}

static void deadline_wakes_send(size_t capacity, bool by_select) {
    scene_t s;
    scene_open(&s, CTX_SEND, capacity, by_select, ctx_with_timeout(ctx_background(), CTX_S(3600)));
    ctx_clock_advance(CTX_S(3600) - 1);
    until_asleep(&s.actor.tid);
    EXPECT_EQ(load(&s.actor.done), 0);
    ctx_clock_advance(1);
    EXPECT_EQ(scene_rc(&s), CTX_DEADLINE_EXCEEDED);
    holds(s.chan, 1, capacity, CTX_NOT_READY);
    works_as_new(s.chan, capacity);
    scene_close(&s);
}

TEST(a_waiting_send_is_woken_by_its_deadline) {
    ctx_clock_fake(0);
    in_each_form(deadline_wakes_send);
    ctx_clock_real();
}

TEST(a_deadline_ends_the_wait_and_never_early) {
    ctx_chan_t *chan = ints(0);
    for (int i = 1; i <= 20; i++) {
        ctx_time_t from = ctx_now();
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(200) * i);
        int rc = i % 2 ? ctx_chan_send(chan, ctx, &i) : ctx_chan_recv(chan, ctx, NULL);
        EXPECT_EQ(rc, CTX_DEADLINE_EXCEEDED);
        EXPECT(ctx_now() - from >= CTX_US(200) * i);
        ctx_end(ctx);
    }
    ctx_chan_free(chan);
}

TEST(without_capacity_a_send_returns_only_when_it_was_received) {
    scene_t s;
    scene_open(&s, CTX_SEND, 0, false, ctx_background());
    int item = 9;
    EXPECT_EQ(ctx_chan_try_send(s.chan, &item), CTX_QUEUE_FULL);
    EXPECT_EQ(ctx_chan_len(s.chan), 0);
    until_asleep(&s.actor.tid);
    EXPECT_EQ(load(&s.actor.done), 0);
    EXPECT_EQ(take(s.chan), 1);
    EXPECT_EQ(scene_rc(&s), 0);
    scene_close(&s);
}

/* -- several that wait ------------------------------------------------------------------------------------------ */

enum { LINE = 6 };

typedef struct {
    actor_t actors[LINE];
    pthread_t threads[LINE];
    ctx_t *ctx[LINE];
} queue_t;

/* They come one after the other, and their items go on from the capacity. */
static void queue_up(queue_t *q, ctx_chan_t *chan, int op, size_t capacity) {
    for (int i = 0; i < LINE; i++) {
        q->ctx[i] = ctx_with_cancel(ctx_background());
        q->threads[i] = act_parked(&q->actors[i], chan, q->ctx[i], op, (int)capacity + 1 + i, NULL);
    }
}

static void queue_leave(queue_t *q, int i) {
    ctx_cancel(q->ctx[i]);
    thread_join(q->threads[i]);
    EXPECT_EQ(q->actors[i].rc, CTX_CANCELED);
    ctx_end(q->ctx[i]);
    q->ctx[i] = NULL;
}

/* Those who have not left all get this. */
static void queue_end(queue_t *q, int rc) {
    for (int i = 0; i < LINE; i++)
        if (q->ctx[i]) {
            thread_join(q->threads[i]);
            EXPECT_EQ(q->actors[i].rc, rc);
            ctx_end(q->ctx[i]);
        }
}

TEST(senders_that_wait_are_served_in_order) {
    for (size_t capacity = 0; capacity <= 3; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        queue_t q;
        fill(chan, capacity);
        queue_up(&q, chan, CTX_SEND, capacity);
        EXPECT_EQ(ctx_chan_len(chan), capacity); /* those who wait do not count */
        holds(chan, 1, capacity + LINE, CTX_NOT_READY);
        queue_end(&q, 0);
        ctx_chan_free(chan);
    }
}

TEST(a_new_sender_does_not_overtake_those_who_wait) {
    ctx_chan_t *chan = ints(1);
    fill(chan, 1);
    queue_t q;
    queue_up(&q, chan, CTX_SEND, 1);
    int item = 99;
    EXPECT_EQ(take(chan), 1); /* the room goes to the first of them, at once */
    EXPECT_EQ(ctx_chan_try_send(chan, &item), CTX_QUEUE_FULL);
    holds(chan, 2, LINE, CTX_NOT_READY);
    queue_end(&q, 0);
    ctx_chan_free(chan);
}

TEST(senders_that_stay_keep_their_order_when_others_leave) {
    const unsigned leaves[] = {1u, 1u << (LINE - 1), 6u, 21u, 42u, (1u << LINE) - 1};
    for (int round = 0; round < 12; round++) {
        size_t capacity = (size_t)round % 2;
        unsigned leave = leaves[round / 2];
        ctx_chan_t *chan = ints(capacity);
        queue_t q;
        fill(chan, capacity);
        queue_up(&q, chan, CTX_SEND, capacity);
        for (int i = 0; i < LINE; i++)
            if (leave >> i & 1) queue_leave(&q, i);
        if (capacity) EXPECT_EQ(take(chan), 1);
        for (int i = 0; i < LINE; i++)
            if (!(leave >> i & 1)) EXPECT_EQ(take(chan), (int)capacity + 1 + i);
        queue_end(&q, 0);
        works_as_new(chan, capacity);
        ctx_chan_free(chan);
    }
}

TEST(a_close_wakes_everybody) {
    for (size_t capacity = 0; capacity <= 2; capacity++)
        for (int op = CTX_RECV; op <= CTX_SEND; op++) {
            ctx_chan_t *chan = ints(capacity);
            queue_t q;
            size_t inside = op == CTX_SEND ? capacity : 0;
            if (op == CTX_SEND) fill(chan, capacity);
            queue_up(&q, chan, op, capacity);
            EXPECT_EQ(ctx_chan_close(chan), 0);
            queue_end(&q, CTX_CLOSED);
            holds(chan, 1, inside, CTX_CLOSED);
            ctx_chan_free(chan);
        }
}

TEST(each_of_the_receivers_that_wait_gets_one_item) {
    for (size_t capacity = 0; capacity <= 2; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        queue_t q;
        queue_up(&q, chan, CTX_RECV, capacity);
        queue_leave(&q, 0);
        queue_leave(&q, 3);
        int sum = 0;
        for (int i = 0; i < LINE - 2; i++) put(chan, 1 << i);
        queue_end(&q, 0);
        for (int i = 0; i < LINE; i++)
            if (i != 0 && i != 3) sum += q.actors[i].item;
        EXPECT_EQ(sum, (1 << (LINE - 2)) - 1);
        works_as_new(chan, capacity);
        ctx_chan_free(chan);
    }
}

/* -- at the same instant ---------------------------------------------------------------------------------------- */

/* Senders and receivers in pairs, each by a context that is canceled, or runs out, about when its partner comes. Who
   was cut off tries again with a context that lasts: so all get through in the end, and every item that a call said it
   sent must be found exactly once, and no other. */
enum { PAIRS = 2, SIDES = 2 * PAIRS, DEPTH = 4, CUT_SENDS = 1, CUT_RECEIVES = 2 };

typedef struct {
    start_line_t line;
    ctx_chan_t *chan, *beside;
    ctx_t *ctx[SIDES];
    int items[SIDES]; /* what each sent or received in the end */
    int rounds, sides;
    int cut; /* [atomic] how often a first try was ended by its context */
} cut_race_t;

static int side_op(int id) { return id % 2 ? CTX_RECV : CTX_SEND; }

static void go_through(cut_race_t *race, int id, int round, ctx_chan_t *beside) {
    int op = side_op(id);
    int item = op == CTX_SEND ? 100 + round * 100 + id * 2 : -1;
    int rc = act(race->chan, race->ctx[id], op, &item, beside);
    if (rc != 0) {
        EXPECT(rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED);
        EXPECT(op == CTX_SEND || item == -1);
        if (op == CTX_SEND) item++; /* another item: the first must never be seen */
        add(&race->cut, 1);
        EXPECT_EQ(act(race->chan, ctx_background(), op, &item, beside), 0);
    }
    race->items[id] = item;
}

static void *goes_through(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    cut_race_t *race = (cut_race_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        race_dither(race_random(&seed));
        go_through(race, side->id, i, race_below(&seed, 2) ? race->beside : NULL);
        start_line(&race->line);
    }
    return NULL;
}

static void make_contexts(cut_race_t *race, int cuts, uint64_t *seed) {
    bool shared = race_below(seed, 3) == 0;
    for (int i = 0; i < race->sides; i++) {
        bool cut = cuts & (side_op(i) == CTX_SEND ? CUT_SENDS : CUT_RECEIVES);
        race->ctx[i] = ctx_background();
        if (!cut) continue;
        if (shared && i >= 2 && race->ctx[i - 2] != ctx_background())
            race->ctx[i] = ctx_retain(race->ctx[i - 2]);
        else if (race_below(seed, 4) == 0)
            race->ctx[i] = ctx_with_timeout(ctx_background(), CTX_NS(1 + race_below(seed, 20000)));
        else
            race->ctx[i] = ctx_with_cancel(ctx_background());
    }
}

/* Ends in the channel what the round left, and compares. */
static void account(cut_race_t *race, int inside) {
    int in[DEPTH + PAIRS], out[DEPTH + PAIRS];
    size_t n = 0, m = 0;
    for (int i = 1; i <= inside; i++) in[n++] = i;
    for (int i = 0; i < race->sides; i++)
        if (side_op(i) == CTX_SEND) in[n++] = race->items[i];
    for (int i = 0; i < race->sides; i++)
        if (side_op(i) == CTX_RECV) out[m++] = race->items[i];
    while (m < n && ctx_chan_try_recv(race->chan, &out[m]) == 0) m++;
    EXPECT_EQ(ctx_chan_try_recv(race->chan, NULL), CTX_NOT_READY);
    EXPECT(same_items(in, n, out, m));
}

/* `full`: the channel is full at the start of each round, so that a send waits for a receive. */
static void race_against_cuts(size_t capacity, bool full, int cuts, int pairs) {
    cut_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2 * pairs + 1);
    race.chan = ints(capacity);
    race.beside = ints(1);
    race.sides = 2 * pairs;
    race.rounds = test_scale(2000);
    pthread_t threads[SIDES];
    race_side_t sides[SIDES];
    for (int i = 0; i < race.sides; i++) {
        sides[i].id = i;
        sides[i].shared = &race;
        threads[i] = thread_start(goes_through, &sides[i]);
    }
    uint64_t seed = 7;
    for (int i = 0; i < race.rounds; i++) {
        if (full) fill(race.chan, capacity);
        make_contexts(&race, cuts, &seed);
        start_line(&race.line);
        race_dither(race_random(&seed));
        for (int k = 0; k < race.sides; k++)
            if (race.ctx[k] != ctx_background()) ctx_cancel(race.ctx[k]);
        start_line(&race.line);
        account(&race, full ? (int)capacity : 0);
        for (int k = 0; k < race.sides; k++) ctx_end(race.ctx[k]);
    }
    for (int i = 0; i < race.sides; i++) thread_join(threads[i]);
    if (!TEST_QUICK) EXPECT(race.cut > 0);
    works_as_new(race.chan, capacity);
    works_as_new(race.beside, 1);
    ctx_chan_free(race.chan);
    ctx_chan_free(race.beside);
}

static void race_each_capacity(int cuts, int pairs) {
    const size_t capacities[] = {0, 1, DEPTH};
    for (int c = 0; c < 3; c++) {
        race_against_cuts(capacities[c], false, cuts, pairs);
        if (capacities[c]) race_against_cuts(capacities[c], true, cuts, pairs);
    }
}

TEST(a_receive_that_is_canceled_as_an_item_comes_has_it_or_leaves_it) {
    race_each_capacity(CUT_RECEIVES, 1);
    race_each_capacity(CUT_RECEIVES, 2);
}

TEST(a_send_that_is_canceled_as_a_receiver_comes_was_done_or_was_not) {
    race_each_capacity(CUT_SENDS, 1);
    race_each_capacity(CUT_SENDS, 2);
}

TEST(a_send_and_a_receive_that_are_both_canceled_as_they_meet_agree) {
    race_each_capacity(CUT_SENDS | CUT_RECEIVES, 1);
    race_each_capacity(CUT_SENDS | CUT_RECEIVES, 2);
}

enum { CLOSE_SENDERS = 3, CLOSE_RECEIVER = CLOSE_SENDERS, CLOSE_SIDES };

typedef struct {
    start_line_t line;
    ctx_chan_t *chan, *beside;
    int rounds;
    int sent[CLOSE_SENDERS]; /* 0, or the item */
    int got[CLOSE_SENDERS + 1], n;
    int closed; /* [atomic] who closed it in this round */
} close_race_t;

static void close_it(close_race_t *race) {
    int rc = ctx_chan_close(race->chan);
    EXPECT(rc == 0 || rc == CTX_CLOSED);
    if (rc == 0) add(&race->closed, 1);
}

static void *meets_a_close(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    close_race_t *race = (close_race_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        race_dither(race_random(&seed));
        ctx_chan_t *beside = race_below(&seed, 2) ? race->beside : NULL;
        if (side->id == CLOSE_RECEIVER) {
            int n = 0;
            while (n <= CLOSE_SENDERS && act(race->chan, ctx_background(), CTX_RECV, &race->got[n], beside) == 0) n++;
            race->n = n;
            close_it(race);
        } else {
            int item = i * 10 + side->id + 1;
            int rc = act(race->chan, ctx_background(), CTX_SEND, &item, beside);
            EXPECT(rc == 0 || rc == CTX_CLOSED);
            race->sent[side->id] = rc == 0 ? item : 0;
        }
        start_line(&race->line);
    }
    return NULL;
}

/* One that is sent before the close is received, and one that is refused is not, however close the two are. */
static void race_a_close(size_t capacity) {
    close_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, CLOSE_SIDES + 1);
    race.beside = ints(0);
    race.rounds = test_scale(3000);
    pthread_t threads[CLOSE_SIDES];
    race_side_t sides[CLOSE_SIDES];
    for (int i = 0; i < CLOSE_SIDES; i++) {
        sides[i].id = i;
        sides[i].shared = &race;
        threads[i] = thread_start(meets_a_close, &sides[i]);
    }
    uint64_t seed = 5;
    for (int i = 0; i < race.rounds; i++) {
        race.chan = ints(capacity);
        race.closed = 0;
        start_line(&race.line);
        race_dither(race_random(&seed));
        close_it(&race);
        start_line(&race.line);
        int sent[CLOSE_SENDERS];
        size_t n = 0;
        for (int k = 0; k < CLOSE_SENDERS; k++)
            if (race.sent[k]) sent[n++] = race.sent[k];
        EXPECT(same_items(sent, n, race.got, (size_t)race.n));
        EXPECT_EQ(race.closed, 1);
        ctx_chan_free(race.chan);
    }
    for (int i = 0; i < CLOSE_SIDES; i++) thread_join(threads[i]);
    works_as_new(race.beside, 0);
    ctx_chan_free(race.beside);
}

TEST(a_send_that_meets_a_close_was_done_or_was_not) {
    race_a_close(0);
    race_a_close(1);
    race_a_close(4);
}

/* -- select ----------------------------------------------------------------------------------------------------- */

TEST(select_does_the_one_that_can_be_done) {
    ctx_chan_t *full = ints(1), *empty = ints(1), *none = ints(0);
    int got = -1, other = -1, give = 6;
    ctx_case_t cases[4];
    cases[0] = case_of(none, CTX_SEND, &give);
    cases[1] = case_of(none, CTX_RECV, &other);
    for (int i = 0; i < 20; i++) {
        fill(full, 1);
        cases[2] = case_of(full, CTX_RECV, &got);
        cases[3] = case_of(full, CTX_SEND, &give);
        EXPECT_EQ(i % 2 ? ctx_try_select(cases, 4) : ctx_select(ctx_background(), cases, 4), 2);
        EXPECT_EQ(cases[2].rc, 0);
        EXPECT_EQ(got, 1);
        cases[2] = case_of(empty, CTX_RECV, &other);
        cases[3] = case_of(empty, CTX_SEND, &give);
        EXPECT_EQ(i % 2 ? ctx_try_select(cases, 4) : ctx_select(ctx_background(), cases, 4), 3);
        EXPECT_EQ(cases[3].rc, 0);
        holds(empty, 6, 1, CTX_NOT_READY);
    }
    EXPECT_EQ(other, -1);
    ctx_chan_free(full);
    ctx_chan_free(empty);
    ctx_chan_free(none);
}

TEST(select_finds_a_partner_that_waits) {
    for (int op = CTX_RECV; op <= CTX_SEND; op++) {
        ctx_chan_t *chan = ints(0), *other = ints(0);
        actor_t partner;
        int item = 8;
        pthread_t thread = act_parked(&partner, chan, ctx_background(), op, op == CTX_SEND ? 9 : -1, NULL);
        ctx_case_t cases[2];
        cases[0] = case_of(other, CTX_RECV, NULL);
        cases[1] = case_of(chan, op == CTX_SEND ? CTX_RECV : CTX_SEND, &item);
        EXPECT_EQ(op == CTX_SEND ? ctx_try_select(cases, 2) : ctx_select(ctx_background(), cases, 2), 1);
        EXPECT_EQ(cases[1].rc, 0);
        thread_join(thread);
        EXPECT_EQ(partner.rc, 0);
        EXPECT_EQ(item, partner.item);
        works_as_new(chan, 0);
        works_as_new(other, 0);
        ctx_chan_free(chan);
        ctx_chan_free(other);
    }
}

TEST(a_closed_channel_can_be_selected) {
    ctx_chan_t *closed = ints(2), *idle = ints(0);
    int item = 4;
    put(closed, 1);
    ctx_chan_close(closed);
    ctx_case_t cases[2];
    cases[0] = case_of(idle, CTX_RECV, NULL);
    cases[1] = case_of(closed, CTX_SEND, &item);
    EXPECT_EQ(ctx_select(ctx_background(), cases, 2), 1);
    EXPECT_EQ(cases[1].rc, CTX_CLOSED);
    cases[1] = case_of(closed, CTX_RECV, &item);
    EXPECT_EQ(ctx_select(ctx_background(), cases, 2), 1); /* what is left comes first */
    EXPECT_EQ(cases[1].rc, 0);
    EXPECT_EQ(item, 1);
    for (int i = 0; i < 3; i++) {
        cases[1].rc = UNSET;
        EXPECT_EQ(i ? ctx_select(ctx_background(), cases, 2) : ctx_try_select(cases, 2), 1);
        EXPECT_EQ(cases[1].rc, CTX_CLOSED);
    }
    EXPECT_EQ(item, 1);
    ctx_chan_free(closed);
    ctx_chan_free(idle);
}

TEST(a_null_channel_never_happens) {
    ctx_chan_t *chan = ints(1);
    int item = 3;
    ctx_case_t cases[3];
    cases[0] = case_of(NULL, CTX_SEND, &item);
    cases[1] = case_of(chan, CTX_SEND, &item);
    cases[2] = case_of(NULL, CTX_RECV, NULL);
    for (int i = 0; i < 50; i++) {
        EXPECT_EQ(i % 2 ? ctx_try_select(cases, 3) : ctx_select(ctx_background(), cases, 3), 1);
        holds(chan, 3, 1, CTX_NOT_READY);
    }
    cases[1].chan = NULL;
    EXPECT_EQ(ctx_try_select(cases, 3), CTX_NOT_READY);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(2));
    EXPECT_EQ(ctx_select(ctx, cases, 3), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_chan_free(chan);
}

/* A thread in a select over cases of its own. */
typedef struct {
    ctx_t *ctx;
    ctx_case_t *cases;
    size_t n;
    int tid;  /* [atomic] */
    int done; /* [atomic] */
    int at;   /* written before done */
} selector_t;

static void *selects(void *arg) {
    selector_t *s = (selector_t *)arg;
    store(&s->tid, thread_id());
    s->at = ctx_select(s->ctx, s->cases, s->n);
    store(&s->done, 1);
    return NULL;
}

static pthread_t select_parked(selector_t *s, ctx_t *ctx, ctx_case_t *cases, size_t n) {
    memset(s, 0, sizeof *s);
    s->ctx = ctx;
    s->cases = cases;
    s->n = n;
    pthread_t thread = thread_start(selects, s);
    until_asleep(&s->tid);
    EXPECT_EQ(load(&s->done), 0);
    return thread;
}

TEST(a_select_of_nothing_waits_for_its_context) {
    EXPECT_EQ(ctx_try_select(NULL, 0), CTX_NOT_READY);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    selector_t s;
    pthread_t thread = select_parked(&s, ctx, NULL, 0);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(s.at, CTX_CANCELED);
    ctx_end(ctx);
    ctx_clock_fake(0);
    ctx = ctx_with_timeout(ctx_background(), CTX_S(10));
    thread = select_parked(&s, ctx, NULL, 0);
    ctx_clock_advance(CTX_S(10));
    thread_join(thread);
    EXPECT_EQ(s.at, CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_real();
}

enum { THREE = 3 };

/* A select that waits on three channels, empty ones to receive or full ones to send. */
typedef struct {
    ctx_chan_t *chans[THREE];
    ctx_case_t cases[THREE];
    int items[THREE];
    int op;
    size_t capacity;
    ctx_t *ctx;
    selector_t selector;
    pthread_t thread;
} triple_t;

static void triple_open(triple_t *t, int op, size_t capacity) {
    t->op = op;
    t->capacity = capacity;
    t->ctx = ctx_with_cancel(ctx_background());
    for (int i = 0; i < THREE; i++) {
        t->chans[i] = ints(capacity);
        if (op == CTX_SEND) fill(t->chans[i], capacity);
        t->items[i] = op == CTX_SEND ? (int)capacity + 1 : -1;
        t->cases[i] = case_of(t->chans[i], op, &t->items[i]);
    }
    t->thread = select_parked(&t->selector, t->ctx, t->cases, THREE);
}

/* Case `at` happened with this rc, and the others left no trace: their channels work on. */
static void triple_close(triple_t *t, int at, int rc) {
    thread_join(t->thread);
    EXPECT_EQ(t->selector.at, at);
    for (int i = 0; i < THREE; i++) {
        if (i == at) EXPECT_EQ(t->cases[i].rc, rc);
        if (i != at && t->op == CTX_RECV) EXPECT_EQ(t->items[i], -1);
        if (i != at && t->op == CTX_SEND) holds(t->chans[i], 1, t->capacity, CTX_NOT_READY);
        if (i != at) works_as_new(t->chans[i], t->capacity);
    }
    if (rc == 0) works_as_new(t->chans[at], t->capacity);
    for (int i = 0; i < THREE; i++) ctx_chan_free(t->chans[i]);
    ctx_end(t->ctx);
}

TEST(a_select_that_received_leaves_nothing_behind_in_the_others) {
    for (size_t capacity = 0; capacity <= 1; capacity++)
        for (int at = 0; at < THREE; at++) {
            triple_t t;
            triple_open(&t, CTX_RECV, capacity);
            put(t.chans[at], 40 + at);
            triple_close(&t, at, 0);
            EXPECT_EQ(t.items[at], 40 + at);
        }
}

TEST(a_select_that_sent_leaves_nothing_behind_in_the_others) {
    for (size_t capacity = 0; capacity <= 1; capacity++)
        for (int at = 0; at < THREE; at++) {
            triple_t t;
            triple_open(&t, CTX_SEND, capacity);
            for (size_t i = 0; i <= capacity; i++) EXPECT_EQ(take(t.chans[at]), i + 1);
            triple_close(&t, at, 0);
        }
}

TEST(a_select_that_met_a_close_leaves_nothing_behind_in_the_others) {
    for (size_t capacity = 0; capacity <= 1; capacity++)
        for (int op = CTX_RECV; op <= CTX_SEND; op++) {
            triple_t t;
            triple_open(&t, op, capacity);
            ctx_chan_close(t.chans[1]);
            triple_close(&t, 1, CTX_CLOSED);
        }
}

TEST(a_select_that_was_canceled_leaves_nothing_behind) {
    for (size_t capacity = 0; capacity <= 1; capacity++)
        for (int op = CTX_RECV; op <= CTX_SEND; op++) {
            triple_t t;
            triple_open(&t, op, capacity);
            ctx_cancel(t.ctx);
            triple_close(&t, CTX_CANCELED, UNSET);
        }
}

TEST(two_waiting_selects_get_one_item_once) {
    for (size_t capacity = 0; capacity <= 1; capacity++) {
        ctx_chan_t *chan = ints(capacity), *other = ints(capacity);
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        int items[2] = {-1, -1};
        ctx_case_t cases[2][2];
        selector_t s[2];
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) { /* in opposite orders */
            cases[i][i] = case_of(chan, CTX_RECV, &items[i]);
            cases[i][1 - i] = case_of(other, CTX_RECV, &items[i]);
            threads[i] = select_parked(&s[i], ctx, cases[i], 2);
        }
        put(chan, 5);
        UNTIL(load(&s[0].done) + load(&s[1].done) == 1);
        int winner = load(&s[0].done) ? 0 : 1;
        until_asleep(&s[1 - winner].tid);
        EXPECT_EQ(load(&s[1 - winner].done), 0);
        ctx_cancel(ctx);
        for (int i = 0; i < 2; i++) thread_join(threads[i]);
        EXPECT_EQ(s[winner].at, winner);
        EXPECT_EQ(items[winner], 5);
        EXPECT_EQ(s[1 - winner].at, CTX_CANCELED);
        EXPECT_EQ(items[1 - winner], -1);
        works_as_new(chan, capacity);
        works_as_new(other, capacity);
        ctx_chan_free(chan);
        ctx_chan_free(other);
        ctx_end(ctx);
    }
}

TEST(the_rc_of_a_case_is_set_only_if_it_happened) {
    ctx_chan_t *full = ints(1), *idle = ints(0);
    int item = 5;
    ctx_case_t cases[3];
    for (int i = 0; i < 20; i++) {
        cases[0] = case_of(idle, CTX_SEND, &item);
        cases[1] = case_of(full, CTX_RECV, NULL);
        cases[2] = case_of(idle, CTX_RECV, NULL);
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(50));
        EXPECT_EQ(i % 2 ? ctx_try_select(cases, 3) : ctx_select(ctx, cases, 3),
                  i % 2 ? CTX_NOT_READY : CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(cases[1].rc, UNSET);
        fill(full, 1);
        EXPECT_EQ(i % 2 ? ctx_try_select(cases, 3) : ctx_select(ctx_background(), cases, 3), 1);
        EXPECT_EQ(cases[0].rc, UNSET);
        EXPECT_EQ(cases[1].rc, 0);
        EXPECT_EQ(cases[2].rc, UNSET);
        ctx_end(ctx);
    }
    ctx_chan_free(full);
    ctx_chan_free(idle);
}

/* Does `rounds` selects and undoes what each did: how often did each happen? */
static void count_shares(ctx_case_t *cases, size_t n, int rounds, int *shares) {
    for (size_t i = 0; i < n; i++) shares[i] = 0;
    for (int r = 0; r < rounds; r++) {
        int at = r % 2 ? ctx_try_select(cases, n) : ctx_select(ctx_background(), cases, n);
        if (at < 0 || at >= (int)n) {
            EXPECT(at >= 0 && at < (int)n);
            return;
        }
        shares[at]++;
        if (cases[at].rc == CTX_CLOSED) continue;
        if (cases[at].op == CTX_RECV)
            put(cases[at].chan, 1);
        else
            take(cases[at].chan);
    }
}

enum { DRAWS = 10000 };

static bool share_is_fair(int share, int ready) {
    int fair = DRAWS / ready;
    return share > fair * 7 / 10 && share < fair * 13 / 10;
}

TEST(two_that_can_be_done_are_done_equally_often) {
    const int ops[][2] = {{CTX_RECV, CTX_RECV}, {CTX_SEND, CTX_SEND}, {CTX_SEND, CTX_RECV}};
    for (int k = 0; k < 3; k++) {
        ctx_chan_t *chans[2];
        ctx_case_t cases[2];
        int item = 1, shares[2];
        for (int i = 0; i < 2; i++) {
            chans[i] = ints(1);
            if (ops[k][i] == CTX_RECV) fill(chans[i], 1);
            cases[i] = case_of(chans[i], ops[k][i], &item);
        }
        count_shares(cases, 2, DRAWS, shares);
        for (int i = 0; i < 2; i++) {
            EXPECT(share_is_fair(shares[i], 2));
            ctx_chan_free(chans[i]);
        }
    }
}

/* A choice that begins anywhere and takes the next that is ready would favour those after a gap. */
TEST(three_of_five_that_can_be_done_are_done_equally_often) {
    for (unsigned ready = 0; ready < 32; ready++) {
        if (__builtin_popcount(ready) != 3) continue;
        ctx_chan_t *chans[5];
        ctx_case_t cases[5];
        int item = 1, shares[5];
        for (int i = 0; i < 5; i++) {
            bool can = ready >> i & 1, receives = i % 2 == 0;
            chans[i] = ints(1);
            if (can == receives) fill(chans[i], 1);
            cases[i] = case_of(chans[i], receives ? CTX_RECV : CTX_SEND, &item);
        }
        count_shares(cases, 5, DRAWS, shares);
        for (int i = 0; i < 5; i++) {
            EXPECT(ready >> i & 1 ? share_is_fair(shares[i], 3) : shares[i] == 0);
            ctx_chan_free(chans[i]);
        }
    }
}

TEST(closed_channels_are_chosen_as_often_as_others) {
    ctx_chan_t *closed = ints(1), *full = ints(1);
    ctx_chan_close(closed);
    fill(full, 1);
    int item = 1, shares[3];
    ctx_case_t cases[3];
    cases[0] = case_of(closed, CTX_RECV, &item);
    cases[1] = case_of(closed, CTX_SEND, &item);
    cases[2] = case_of(full, CTX_RECV, &item);
    count_shares(cases, 3, DRAWS, shares);
    for (int i = 0; i < 3; i++) EXPECT(share_is_fair(shares[i], 3));
    ctx_chan_free(closed);
    ctx_chan_free(full);
}

TEST(a_channel_may_be_in_a_select_twice) {
    ctx_chan_t *chan = ints(2);
    int items[2], give = 1, shares[4];
    ctx_case_t cases[4];
    cases[0] = case_of(chan, CTX_RECV, &items[0]);
    cases[1] = case_of(chan, CTX_SEND, &give);
    cases[2] = case_of(chan, CTX_RECV, &items[1]);
    cases[3] = case_of(chan, CTX_SEND, &give);
    put(chan, 1);
    count_shares(cases, 4, DRAWS, shares);
    for (int i = 0; i < 4; i++) EXPECT(share_is_fair(shares[i], 4));
    holds(chan, 1, 1, CTX_NOT_READY);
    ctx_chan_free(chan);
}

TEST(a_waiting_select_with_a_channel_twice_takes_one_item) {
    for (size_t capacity = 0; capacity <= 1; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        int items[2] = {-1, -1};
        ctx_case_t cases[2];
        for (int i = 0; i < 2; i++) cases[i] = case_of(chan, CTX_RECV, &items[i]);
        selector_t s;
        pthread_t thread = select_parked(&s, ctx_background(), cases, 2);
        put(chan, 5);
        thread_join(thread);
        if (s.at == 0 || s.at == 1) {
            EXPECT_EQ(items[s.at], 5);
            EXPECT_EQ(items[1 - s.at], -1);
            EXPECT_EQ(cases[s.at].rc, 0);
        } else {
            EXPECT(s.at == 0 || s.at == 1);
        }
        works_as_new(chan, capacity);
        ctx_chan_free(chan);
    }
}

TEST(a_select_never_meets_itself) {
    ctx_chan_t *chan = ints(0);
    int give = 1, got = -1;
    ctx_case_t cases[2];
    cases[0] = case_of(chan, CTX_SEND, &give);
    cases[1] = case_of(chan, CTX_RECV, &got);
    EXPECT_EQ(ctx_try_select(cases, 2), CTX_NOT_READY);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    selector_t s;
    pthread_t thread = select_parked(&s, ctx, cases, 2);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(s.at, CTX_CANCELED);
    EXPECT_EQ(got, -1);
    works_as_new(chan, 0);
    ctx_chan_free(chan);
    ctx_end(ctx);
}

/* More cases than a select has room for on its stack. */
enum { MANY = 40 };

typedef struct {
    ctx_chan_t *chans[MANY];
    ctx_case_t cases[MANY];
    int item;
} many_t;

static void many_open(many_t *m) {
    m->item = -1;
    for (int i = 0; i < MANY; i++) {
        m->chans[i] = ints(1);
        m->cases[i] = case_of(m->chans[i], CTX_RECV, &m->item);
    }
}

static void many_close(many_t *m) {
    for (int i = 0; i < MANY; i++) {
        EXPECT_EQ(ctx_chan_try_recv(m->chans[i], NULL), CTX_NOT_READY);
        fill(m->chans[i], 1); /* nobody takes it who has gone */
        holds(m->chans[i], 1, 1, CTX_NOT_READY);
        ctx_chan_free(m->chans[i]);
    }
}

TEST(forty_cases_are_no_different) {
    many_t m;
    many_open(&m);
    EXPECT_EQ(ctx_try_select(m.cases, MANY), CTX_NOT_READY);
    for (int i = 0; i < MANY; i++) {
        put(m.chans[i], i);
        EXPECT_EQ(i % 2 ? ctx_try_select(m.cases, MANY) : ctx_select(ctx_background(), m.cases, MANY), i);
        EXPECT_EQ(m.cases[i].rc, 0);
        EXPECT_EQ(m.item, i);
    }
    for (int i = 0; i < MANY; i += 13) {
        selector_t s;
        pthread_t thread = select_parked(&s, ctx_background(), m.cases, MANY);
        put(m.chans[i], 100 + i);
        thread_join(thread);
        EXPECT_EQ(s.at, i);
        EXPECT_EQ(m.item, 100 + i);
    }
    many_close(&m);
}

TEST(forty_cases_are_chosen_equally_often_and_canceled_clean) {
    many_t m;
    int shares[MANY];
    many_open(&m);
    for (int i = 0; i < MANY; i += 4) fill(m.chans[i], 1);
    count_shares(m.cases, MANY, DRAWS, shares);
    for (int i = 0; i < MANY; i++) EXPECT(i % 4 ? shares[i] == 0 : share_is_fair(shares[i], MANY / 4));
    for (int i = 0; i < MANY; i += 4) take(m.chans[i]);
    long before = blocks_live();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    selector_t s;
    pthread_t thread = select_parked(&s, ctx, m.cases, MANY);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(s.at, CTX_CANCELED);
    ctx_end(ctx);
    EXPECT(blocks_live() <= before + 1); /* the context may be kept for the next */
    many_close(&m);
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

typedef struct {
    int producer, seq;
    const int *cell; /* plain memory of the producer, written before the send */
} parcel_t;

typedef struct {
    ctx_chan_t *chan, *beside;
    int producers, each;
    int left;           /* [atomic] producers that still send */
    int *cells;         /* `each` for each producer */
    int64_t count, sum; /* [atomic] what was received */
} crowd_t;

static int crowd_act(crowd_t *crowd, int op, parcel_t *parcel, bool by_select) {
    if (!by_select)
        return op == CTX_SEND ? ctx_chan_send(crowd->chan, ctx_background(), parcel)
                              : ctx_chan_recv(crowd->chan, ctx_background(), parcel);
    ctx_case_t cases[2];
    cases[0] = case_of(crowd->chan, op, parcel);
    cases[1] = case_of(crowd->beside, CTX_RECV, NULL);
    int at = ctx_select(ctx_background(), cases, 2);
    EXPECT_EQ(at, 0);
    return at == 0 ? cases[0].rc : at;
}

static void produce(crowd_t *crowd, int id) {
    for (int i = 0; i < crowd->each; i++) {
        parcel_t parcel;
        parcel.producer = id;
        parcel.seq = i;
        int *cell = &crowd->cells[id * crowd->each + i];
        *cell = id + i;
        parcel.cell = cell;
        EXPECT_EQ(crowd_act(crowd, CTX_SEND, &parcel, id % 2), 0);
    }
    if (add(&crowd->left, -1) == 0) EXPECT_EQ(ctx_chan_close(crowd->chan), 0);
}

static void consume(crowd_t *crowd, int id) {
    int next[RACE_MOST] = {0};
    int64_t count = 0, sum = 0;
    parcel_t parcel;
    int rc;
    while ((rc = crowd_act(crowd, CTX_RECV, &parcel, id % 2)) == 0) {
        EXPECT(parcel.seq >= next[parcel.producer]); /* those of one producer come in its order */
        next[parcel.producer] = parcel.seq + 1;
        EXPECT_EQ(*parcel.cell, parcel.producer + parcel.seq);
        count++;
        sum += (int64_t)parcel.producer * crowd->each + parcel.seq;
    }
    EXPECT_EQ(rc, CTX_CLOSED);
    __atomic_add_fetch(&crowd->count, count, __ATOMIC_RELAXED);
    __atomic_add_fetch(&crowd->sum, sum, __ATOMIC_RELAXED);
}

static void *produces_or_consumes(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    if (side->id < crowd->producers)
        produce(crowd, side->id);
    else
        consume(crowd, side->id);
    return NULL;
}

static void run_crowd(size_t capacity, int producers, int consumers, int each) {
    crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    crowd.chan = chan_of(sizeof(parcel_t), capacity);
    crowd.beside = ints(0);
    crowd.producers = crowd.left = producers;
    crowd.each = each;
    crowd.cells = (int *)calloc((size_t)(producers * each), sizeof(int));
    race_run(producers + consumers, produces_or_consumes, &crowd);
    int64_t n = (int64_t)producers * each;
    EXPECT_EQ(crowd.count, n);
    EXPECT_EQ(crowd.sum, n * (n - 1) / 2);
    works_as_new(crowd.beside, 0);
    free(crowd.cells);
    ctx_chan_free(crowd.chan);
    ctx_chan_free(crowd.beside);
}

TEST(one_to_one_everything_arrives_once_and_in_order) {
    run_crowd(0, 1, 1, test_scale(20000));
    run_crowd(1, 1, 1, test_scale(20000));
    run_crowd(1024, 1, 1, test_scale(400000));
}

TEST(four_to_four_everything_arrives_once_and_in_order) {
    run_crowd(0, 4, 4, test_scale(5000));
    run_crowd(1, 4, 4, test_scale(5000));
    run_crowd(1024, 4, 4, test_scale(100000));
}

TEST(eight_to_eight_everything_arrives_once_and_in_order) {
    run_crowd(0, 8, 8, test_scale(2500));
    run_crowd(1, 8, 8, test_scale(2500));
    run_crowd(1024, 8, 8, test_scale(50000));
}

TEST(eight_to_one_and_one_to_eight_everything_arrives_once) {
    for (size_t capacity = 0; capacity <= 3; capacity++) {
        run_crowd(capacity, 8, 1, test_scale(1000));
        run_crowd(capacity, 1, 8, test_scale(8000));
    }
}

enum { SELECTERS = 8 };

typedef struct {
    ctx_chan_t *chans[THREE];
    int each;
    int left;    /* [atomic] senders at work */
    int *seen;   /* [atomic] for each item, how often it came */
    int64_t sum; /* [atomic] */
} web_t;

static void select_sends(web_t *web, int id, uint64_t *seed) {
    for (int i = 0; i < web->each; i++) {
        int item = id * web->each + i;
        int turn = race_below(seed, THREE);
        ctx_case_t cases[THREE];
        for (int k = 0; k < THREE; k++) cases[k] = case_of(web->chans[(k + turn) % THREE], CTX_SEND, &item);
        int at = ctx_select(ctx_background(), cases, THREE);
        EXPECT(at >= 0 && cases[at].rc == 0);
    }
    if (add(&web->left, -1) > 0) return;
    for (int k = 0; k < THREE; k++) EXPECT_EQ(ctx_chan_close(web->chans[k]), 0);
}

/* Goes on until all are closed: one that is becomes a case that never happens. */
static void select_receives(web_t *web, uint64_t *seed) {
    int item, open = THREE;
    ctx_chan_t *chans[THREE];
    int64_t sum = 0;
    memcpy(chans, web->chans, sizeof chans);
    while (open > 0) {
        int turn = race_below(seed, THREE);
        ctx_case_t cases[THREE];
        for (int k = 0; k < THREE; k++) cases[k] = case_of(chans[(k + turn) % THREE], CTX_RECV, &item);
        int at = ctx_select(ctx_background(), cases, THREE);
        if (at < 0) {
            EXPECT_EQ(at, 0);
            return;
        }
        if (cases[at].rc == CTX_CLOSED) {
            chans[(at + turn) % THREE] = NULL;
            open--;
            continue;
        }
        EXPECT_EQ(add(&web->seen[item], 1), 1);
        sum += item;
    }
    __atomic_add_fetch(&web->sum, sum, __ATOMIC_RELAXED);
}

static void *selects_each_round(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    web_t *web = (web_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    if (side->id % 2)
        select_receives(web, &seed);
    else
        select_sends(web, side->id / 2, &seed);
    return NULL;
}

static void run_web(size_t capacity, int each) {
    web_t web;
    int64_t n = SELECTERS / 2 * each;
    for (int k = 0; k < THREE; k++) web.chans[k] = ints(capacity);
    web.each = each;
    web.left = SELECTERS / 2;
    web.seen = (int *)calloc((size_t)n, sizeof(int));
    web.sum = 0;
    race_run(SELECTERS, selects_each_round, &web);
    EXPECT_EQ(web.sum, n * (n - 1) / 2);
    for (int64_t i = 0; i < n; i++) EXPECT_EQ(web.seen[i], 1);
    free(web.seen);
    for (int k = 0; k < THREE; k++) ctx_chan_free(web.chans[k]);
}

TEST(selects_that_send_and_selects_that_receive_meet_exactly_once) {
    run_web(0, test_scale(5000));
    run_web(1, test_scale(5000));
    run_web(4, test_scale(10000));
}

/* Everybody offers and asks on the same channel, where each can be the partner of each. */
typedef struct {
    ctx_chan_t *chan, *back;
    ctx_t *ctx;
    int enough;
    int meetings;                    /* [atomic] */
    int64_t sent, received, in, out; /* [atomic] counts and sums */
} bazaar_t;

static void *trades(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    bazaar_t *b = (bazaar_t *)side->shared;
    int64_t sent = 0, received = 0, in = 0, out = 0;
    for (int i = 0;; i++) {
        int give = i * RACE_MOST + side->id, got = -1;
        ctx_case_t cases[4];
        cases[0] = case_of(b->chan, CTX_SEND, &give);
        cases[1] = case_of(b->back, CTX_RECV, &got);
        cases[2] = case_of(b->chan, CTX_RECV, &got);
        cases[3] = case_of(b->back, CTX_SEND, &give);
        int at = ctx_select(b->ctx, cases, 4);
        if (at < 0) break;
        EXPECT_EQ(cases[at].rc, 0);
        if (cases[at].op == CTX_SEND) {
            sent++;
            in += give;
            if (add(&b->meetings, 1) == b->enough) ctx_cancel(b->ctx);
        } else {
            EXPECT(got >= 0 && got % RACE_MOST != side->id);
            received++;
            out += got;
        }
    }
    __atomic_add_fetch(&b->sent, sent, __ATOMIC_RELAXED);
    __atomic_add_fetch(&b->received, received, __ATOMIC_RELAXED);
    __atomic_add_fetch(&b->in, in, __ATOMIC_RELAXED);
    __atomic_add_fetch(&b->out, out, __ATOMIC_RELAXED);
    return NULL;
}

TEST(whoever_selects_both_ways_meets_another_and_never_itself) {
    bazaar_t b;
    memset(&b, 0, sizeof b);
    b.chan = ints(0);
    b.back = ints(0);
    b.ctx = ctx_with_cancel(ctx_background());
    b.enough = test_scale(20000);
    race_run(SELECTERS, trades, &b);
    EXPECT(b.sent >= b.enough);
    EXPECT_EQ(b.sent, b.received);
    EXPECT_EQ(b.in, b.out);
    works_as_new(b.chan, 0);
    works_as_new(b.back, 0);
    ctx_chan_free(b.chan);
    ctx_chan_free(b.back);
    ctx_end(b.ctx);
}

/* Tokens go round a ring of threads, each of which selects between taking from its left and giving to its right, until
   each token has made its steps. */
enum { RING = 8, TOKENS = 4, RING_TOKENS = RING * TOKENS };

typedef struct {
    int id, steps;
} token_t;

typedef struct {
    ctx_chan_t *chans[RING];
    ctx_t *ctx;
    int steps;
    int ended;             /* [atomic] tokens */
    int64_t moves, sum;    /* [atomic] */
    int seen[RING_TOKENS]; /* [atomic] how often each came to its end */
} ring_t;

typedef struct {
    token_t held[RING_TOKENS];
    int n;
    int64_t moves;
} hand_t;

/* One step of a token: at its last it stays here, else it is to be passed on. */
static void token_came(ring_t *ring, hand_t *hand, token_t token) {
    hand->moves++;
    if (++token.steps < ring->steps) {
        hand->held[hand->n++] = token;
        return;
    }
    add(&ring->seen[token.id], 1);
    __atomic_add_fetch(&ring->sum, token.id, __ATOMIC_RELAXED);
    if (add(&ring->ended, 1) == RING_TOKENS) ctx_cancel(ring->ctx);
}

static void *passes_tokens(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    ring_t *ring = (ring_t *)side->shared;
    hand_t hand;
    memset(&hand, 0, sizeof hand);
    for (int i = 0; i < TOKENS; i++) hand.held[hand.n++].id = side->id * TOKENS + i;
    for (;;) {
        token_t token;
        ctx_case_t cases[2];
        cases[0] = case_of(ring->chans[side->id], CTX_RECV, &token);
        cases[1] = case_of(NULL, CTX_SEND, NULL);
        if (hand.n > 0) cases[1] = case_of(ring->chans[(side->id + 1) % RING], CTX_SEND, &hand.held[hand.n - 1]);
        int at = ctx_select(ring->ctx, cases, 2);
        if (at < 0) break;
        EXPECT_EQ(cases[at].rc, 0);
        if (at == 1)
            hand.n--;
        else
            token_came(ring, &hand, token);
    }
    EXPECT_EQ(hand.n, 0);
    __atomic_add_fetch(&ring->moves, hand.moves, __ATOMIC_RELAXED);
    return NULL;
}

static void run_ring(size_t capacity, int steps) {
    ring_t ring;
    memset(&ring, 0, sizeof ring);
    ring.ctx = ctx_with_cancel(ctx_background());
    ring.steps = steps;
    for (int i = 0; i < RING; i++) ring.chans[i] = chan_of(sizeof(token_t), capacity);
    race_run(RING, passes_tokens, &ring);
    EXPECT_EQ(ring.ended, RING_TOKENS);
    EXPECT_EQ(ring.moves, (int64_t)RING_TOKENS * steps);
    EXPECT_EQ(ring.sum, RING_TOKENS * (RING_TOKENS - 1) / 2);
    for (int i = 0; i < RING_TOKENS; i++) EXPECT_EQ(ring.seen[i], 1);
    for (int i = 0; i < RING; i++) {
        EXPECT_EQ(ctx_chan_len(ring.chans[i]), 0);
        ctx_chan_free(ring.chans[i]);
    }
    ctx_end(ring.ctx);
}

TEST(tokens_go_round_a_ring_of_selects_and_none_is_lost_or_doubled) {
    run_ring(0, test_scale(1000));
    run_ring(1, test_scale(1000));
    run_ring(3, test_scale(1000));
}

/* -- short lives ------------------------------------------------------------------------------------------------ */

enum { STORM_SIDES = 8 };

typedef struct {
    ctx_chan_t *chan, *beside;
    size_t capacity;
    int each;
    ctx_t *slots[STORM_SIDES]; /* [atomic] what each may be canceled by: a reference for whoever takes it out */
    int *seen;                 /* [atomic] for each item, how often it came */
    int left;                  /* [atomic] producers at work */
    int at_work;               /* [atomic] both kinds */
    int cut;                   /* [atomic] calls that a context ended */
} storm_t;

static ctx_t *swap_slot(ctx_t **slot, ctx_t *ctx) { return __atomic_exchange_n(slot, ctx, __ATOMIC_ACQ_REL); }

/* One try with a context of its own, which ends as soon as the call has. */
static int storm_act(storm_t *storm, int id, int op, int *item, uint64_t *seed) {
    bool timed = race_below(seed, 4) == 0;
    ctx_t *ctx = timed ? ctx_with_timeout(ctx_background(), CTX_NS(1 + race_below(seed, 60000)))
                       : ctx_with_cancel(ctx_background());
    swap_slot(&storm->slots[id], ctx_retain(ctx));
    int rc = act(storm->chan, ctx, op, item, race_below(seed, 3) == 0 ? storm->beside : NULL);
    ctx_release(swap_slot(&storm->slots[id], NULL));
    ctx_end(ctx);
    if (rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED)
        add(&storm->cut, 1);
    else
        EXPECT(rc == 0 || rc == CTX_CLOSED);
    return rc;
}

static void *weathers(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    storm_t *storm = (storm_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    int item, rc;
    if (side->id % 2) {
        while ((rc = storm_act(storm, side->id, CTX_RECV, &item, &seed)) != CTX_CLOSED)
            if (rc == 0) EXPECT_EQ(add(&storm->seen[item], 1), 1);
    } else {
        for (int i = 0; i < storm->each; i++) {
            item = side->id / 2 * storm->each + i;
            while (storm_act(storm, side->id, CTX_SEND, &item, &seed) != 0) {
            }
        }
        if (add(&storm->left, -1) == 0) ctx_chan_close(storm->chan);
    }
    add(&storm->at_work, -1);
    return NULL;
}

static void *cancels_at_random(void *arg) {
    storm_t *storm = (storm_t *)arg;
    uint64_t seed = 99;
    while (load(&storm->at_work) > 0) {
        ctx_t *ctx = swap_slot(&storm->slots[race_below(&seed, STORM_SIDES)], NULL);
        if (ctx) ctx_end(ctx);
        EXPECT(ctx_chan_len(storm->chan) <= storm->capacity);
        spin((unsigned)race_below(&seed, 3000));
    }
    return NULL;
}

static void run_storm(size_t capacity, int each) {
    storm_t storm;
    memset(&storm, 0, sizeof storm);
    storm.chan = ints(capacity);
    storm.beside = ints(1);
    storm.capacity = capacity;
    storm.each = each;
    storm.left = STORM_SIDES / 2;
    storm.at_work = STORM_SIDES;
    int n = STORM_SIDES / 2 * each;
    storm.seen = (int *)calloc((size_t)n, sizeof(int));
    pthread_t hunter = thread_start(cancels_at_random, &storm);
    race_run(STORM_SIDES, weathers, &storm);
    thread_join(hunter);
    for (int i = 0; i < n; i++) EXPECT_EQ(storm.seen[i], 1);
    if (!TEST_QUICK) EXPECT(storm.cut > 0);
    EXPECT_EQ(ctx_chan_len(storm.chan), 0);
    works_as_new(storm.beside, 1);
    free(storm.seen);
    ctx_chan_free(storm.chan);
    ctx_chan_free(storm.beside);
}

TEST(every_item_is_accounted_for_under_thousands_of_contexts_canceled_at_random) {
    run_storm(0, test_scale(4000));
    run_storm(1, test_scale(4000));
    run_storm(16, test_scale(10000));
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
