/* Section 12, the batcher: many small adds become few large flushes, and each item reaches one of flush and on_drop. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"

#include <signal.h>
#include <sys/wait.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

/* Items are the numbers 0, 1, 2, ... in the order of their adding. A batcher with what flush and on_drop saw. */
enum { ITEMS = 4096, CALLS = 1024 };
typedef struct {
    ctx_batch_desc_t desc;
    ctx_t *lifetime;
    ctx_batch_t *batch;
    int added; /* by put() */

    gate_t *gate;  /* flush stops here, if there is one */
    bool obeys;    /* flush waits for its context to be done, and returns its err */
    int fails;     /* [atomic] so many calls of flush fail, with -1, -2, ... */
    int inside;    /* [atomic] flush and on_drop running */
    int tid;       /* [atomic] who flushed last */
    int flush_err; /* [atomic] the err of its context when it returned */

    pthread_mutex_t mu;
    int failed;                               /* [mu] */
    int calls;                                /* [mu] of flush */
    int sizes[CALLS];                         /* [mu] */
    ctx_time_t at[CALLS];                     /* [mu] */
    int flushed;                              /* [mu] */
    int items[ITEMS];                         /* [mu] those flushed */
    int drop_calls;                           /* [mu] */
    int dropped;                              /* [mu] */
    int dropped_items[ITEMS], reasons[ITEMS]; /* [mu] */
} rig_t;

static void note_call(rig_t *rig, size_t n) {
    pthread_mutex_lock(&rig->mu);
    if (rig->calls < CALLS) {
        rig->sizes[rig->calls] = (int)n;
        rig->at[rig->calls] = ctx_now();
    }
    rig->calls++;
    pthread_mutex_unlock(&rig->mu);
}

static int note_failure(rig_t *rig) {
    pthread_mutex_lock(&rig->mu);
    int failed = ++rig->failed;
    pthread_mutex_unlock(&rig->mu);
    return -failed;
}

static void note_flushed(rig_t *rig, const int *items, size_t n) {
    pthread_mutex_lock(&rig->mu);
    for (size_t i = 0; i < n; i++, rig->flushed++)
        if (rig->flushed < ITEMS) rig->items[rig->flushed] = items[i];
    pthread_mutex_unlock(&rig->mu);
}

static int flushes(ctx_t *ctx, const void *items, size_t n, void *user) {
    rig_t *rig = (rig_t *)user;
    int rc = 0;
    EXPECT_EQ(add(&rig->inside, 1), 1);
    EXPECT(n > 0 && n <= (rig->desc.max_items ? rig->desc.max_items : 100));
    store(&rig->tid, thread_id());
    note_call(rig, n);
    if (rig->gate) gate_pass(rig->gate);
    if (rig->obeys) rc = ctx_wait(ctx, CTX_FOREVER);
    if (load(&rig->fails) > 0) {
        add(&rig->fails, -1);
        rc = note_failure(rig);
    }
    if (rc == 0) note_flushed(rig, (const int *)items, n);
    store(&rig->flush_err, ctx_err(ctx));
    add(&rig->inside, -1);
    return rc;
}

static void drops(const void *items, size_t n, int reason, void *user) {
    rig_t *rig = (rig_t *)user;
    EXPECT_EQ(add(&rig->inside, 1), 1);
    EXPECT(n > 0);
    pthread_mutex_lock(&rig->mu);
    for (size_t i = 0; i < n; i++, rig->dropped++) {
        if (rig->dropped >= ITEMS) continue;
        rig->dropped_items[rig->dropped] = ((const int *)items)[i];
        rig->reasons[rig->dropped] = reason;
    }
    rig->drop_calls++;
    pthread_mutex_unlock(&rig->mu);
    add(&rig->inside, -1);
}

static void rig_init(rig_t *rig, size_t max_items, ctx_dur_t max_delay, size_t queue) {
    memset(rig, 0, sizeof *rig);
    pthread_mutex_init(&rig->mu, NULL);
    rig->lifetime = ctx_with_cancel(ctx_background());
    rig->desc.item_size = sizeof(int);
    rig->desc.max_items = max_items;
    rig->desc.max_delay = max_delay;
    rig->desc.queue = queue;
    rig->desc.flush = flushes;
    rig->desc.on_drop = drops;
    rig->desc.user = rig;
}

static void rig_start(rig_t *rig) {
    rig->batch = ctx_batch_new(rig->lifetime, &rig->desc);
    if (!rig->batch) {
        fprintf(stderr, "no batcher for the test: %s\n", strerror(errno));
        abort();
    }
}

static int count_of(rig_t *rig, const int *what) {
    pthread_mutex_lock(&rig->mu);
    int n = *what;
    pthread_mutex_unlock(&rig->mu);
    return n;
}

static int calls(rig_t *rig) { return count_of(rig, &rig->calls); }
static int flushed(rig_t *rig) { return count_of(rig, &rig->flushed); }
static int dropped(rig_t *rig) { return count_of(rig, &rig->dropped); }

/* Add the next n items. */
static void put(rig_t *rig, int n) {
    for (int i = 0; i < n; i++) {
        int rc = ctx_batch_add(rig->batch, &rig->added);
        EXPECT_EQ(rc, 0);
        if (rc == 0) rig->added++;
    }
}

static int put_one(rig_t *rig) {
    int rc = ctx_batch_add(rig->batch, &rig->added);
    if (rc == 0) rig->added++;
    return rc;
}

/* What should not happen gets a moment to happen. */
static int calls_after_a_moment(rig_t *rig) {
    test_sleep_ms(3);
    return calls(rig);
}

static bool ascend(const int *items, int n) {
    for (int i = 1; i < n; i++)
        if (items[i - 1] >= items[i]) return false;
    return true;
}

/* After the close: every item went to one of the two, each of them in order. */
static void rig_end(rig_t *rig) {
    int seen[ITEMS] = {0};
    EXPECT_EQ(load(&rig->inside), 0);
    EXPECT_EQ(rig->flushed + rig->dropped, rig->added);
    EXPECT(ascend(rig->items, rig->flushed));
    EXPECT(ascend(rig->dropped_items, rig->dropped));
    for (int i = 0; i < rig->flushed; i++) seen[rig->items[i]]++;
    for (int i = 0; i < rig->dropped; i++) seen[rig->dropped_items[i]]++;
    for (int i = 0; i < rig->added; i++) EXPECT_EQ(seen[i], 1);
    ctx_end(rig->lifetime);
    pthread_mutex_destroy(&rig->mu);
}

static void expect_reason(rig_t *rig, int reason) {
    for (int i = 0; i < rig->dropped; i++) EXPECT_EQ(rig->reasons[i], reason);
}

/* Close with all the time there is, expecting everything to be flushed. */
static void rig_flush_and_end(rig_t *rig) {
    EXPECT_EQ(batch_close(rig->batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig->dropped, 0);
    rig_end(rig);
}

/* A rig of which the first flush, of max_items, is held at the gate. */
static void rig_start_held(rig_t *rig, gate_t *gate) {
    gate_init(gate);
    rig->gate = gate;
    rig_start(rig);
    put(rig, (int)rig->desc.max_items);
    gate_await(gate, 1);
}

/* A close in a thread of its own. */
typedef struct {
    ctx_batch_t *batch;
    ctx_dur_t budget;
    int tid, done; /* [atomic] */
    int rc;
    ctx_time_t at;
} closer_t;

static void *closes(void *arg) {
    closer_t *c = (closer_t *)arg;
    store(&c->tid, thread_id());
    c->rc = batch_close(c->batch, c->budget);
    c->at = ctx_now();
    store(&c->done, 1);
    return NULL;
}

/* Returns when it waits, or has closed. */
static pthread_t close_apart(closer_t *c, ctx_batch_t *batch, ctx_dur_t budget) {
    memset(c, 0, sizeof *c);
    c->batch = batch;
    c->budget = budget;
    pthread_t thread = thread_start(closes, c);
    until_asleep(&c->tid);
    return thread;
}

static bool still_closing(closer_t *c) {
    until_asleep(&c->tid);
    return load(&c->done) == 0;
}

/* A ctx_batch_add_wait() in a thread of its own. */
typedef struct {
    ctx_batch_t *batch;
    ctx_t *ctx;
    int item;
    int tid, done; /* [atomic] */
    int rc;
} adder_t;

static void *adds_waiting(void *arg) {
    adder_t *a = (adder_t *)arg;
    store(&a->tid, thread_id());
    a->rc = ctx_batch_add_wait(a->batch, a->ctx, &a->item);
    store(&a->done, 1);
    return NULL;
}

/* Returns when it waits for room. */
static pthread_t add_apart(adder_t *a, rig_t *rig, ctx_t *ctx, int item) {
    memset(a, 0, sizeof *a);
    a->batch = rig->batch;
    a->ctx = ctx;
    a->item = item;
    pthread_t thread = thread_start(adds_waiting, a);
    until_asleep(&a->tid);
    EXPECT_EQ(load(&a->done), 0);
    return thread;
}

/* -- when it flushes -------------------------------------------------------------------------------------------- */

TEST(a_batch_is_flushed_when_max_items_have_come) {
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig_start(&rig);
    put(&rig, 2);
    EXPECT_EQ(calls_after_a_moment(&rig), 0);
    put(&rig, 1);
    UNTIL(flushed(&rig) == 3);
    put(&rig, 2);
    EXPECT_EQ(calls_after_a_moment(&rig), 1);
    put(&rig, 1);
    UNTIL(flushed(&rig) == 6);
    EXPECT_EQ(rig.sizes[0], 3);
    EXPECT_EQ(rig.sizes[1], 3);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.calls, 2); /* a close with nothing left calls nothing */
}

TEST(the_delay_counts_from_the_first_item) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 100, CTX_MS(10), 0);
    rig_start(&rig);
    put(&rig, 1);
    ctx_clock_advance(CTX_MS(6));
    put(&rig, 1);
    ctx_clock_advance(CTX_MS(4) - 1);
    EXPECT_EQ(calls_after_a_moment(&rig), 0);
    put(&rig, 1);
    ctx_clock_advance(1);
    UNTIL(flushed(&rig) == 3);
    EXPECT_EQ(rig.calls, 1);
    rig_flush_and_end(&rig);
    ctx_clock_real();
}

TEST(the_delay_begins_again_with_the_first_item_after_a_flush) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 100, CTX_MS(10), 0);
    rig_start(&rig);
    for (int i = 0; i < 5; i++) {
        put(&rig, 1);
        ctx_clock_advance(CTX_MS(10) - 1);
        EXPECT_EQ(calls_after_a_moment(&rig), i);
        ctx_clock_advance(1);
        UNTIL(flushed(&rig) == i + 1);
        ctx_clock_advance(CTX_MS(7));
    }
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(calls_after_a_moment(&rig), 5); /* never for nothing */
    rig_flush_and_end(&rig);
    ctx_clock_real();
}

TEST(the_delay_of_items_already_flushed_hurries_nobody) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, CTX_MS(10), 0);
    rig_start(&rig);
    put(&rig, 1);
    ctx_clock_advance(CTX_MS(4));
    put(&rig, 1);
    UNTIL(flushed(&rig) == 2);
    ctx_clock_advance(CTX_MS(1));
    put(&rig, 1); /* at 5: due at 15 */
    ctx_clock_advance(CTX_MS(10) - 1);
    EXPECT_EQ(calls_after_a_moment(&rig), 1);
    ctx_clock_advance(1);
    UNTIL(flushed(&rig) == 3);
    rig_flush_and_end(&rig);
    ctx_clock_real();
}

TEST(without_a_delay_a_few_items_wait_for_ever) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 100, 0, 0);
    rig_start(&rig);
    put(&rig, 99);
    ctx_clock_advance(CTX_S(86400));
    EXPECT_EQ(calls_after_a_moment(&rig), 0);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.sizes[0], 99);
    ctx_clock_real();
}

TEST(a_request_flushes_what_was_added_so_far) {
    rig_t rig;
    rig_init(&rig, 100, 0, 0);
    rig_start(&rig);
    EXPECT_EQ(ctx_batch_flush(rig.batch), 0);
    EXPECT_EQ(calls_after_a_moment(&rig), 0); /* nothing to flush */
    put(&rig, 2);
    EXPECT_EQ(ctx_batch_flush(rig.batch), 0);
    UNTIL(flushed(&rig) == 2);
    put(&rig, 1);
    EXPECT_EQ(calls_after_a_moment(&rig), 1); /* nobody asked for this one */
    rig_flush_and_end(&rig);
}

TEST(a_request_during_a_flush_is_remembered) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 3, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 4);
    EXPECT_EQ(ctx_batch_flush(rig.batch), 0); /* without waiting */
    EXPECT_EQ(calls(&rig), 1);
    gate_open(&gate);
    UNTIL(flushed(&rig) == 7);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(a_request_is_not_for_items_that_come_later) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 3, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 1);
    EXPECT_EQ(ctx_batch_flush(rig.batch), 0);
    put(&rig, 3); /* two of them share its batch */
    gate_open(&gate);
    UNTIL(flushed(&rig) == 6);
    EXPECT_EQ(calls_after_a_moment(&rig), 2);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(what_came_due_during_a_flush_is_flushed_after_it) {
    rig_t rig;
    gate_t gate;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 3, CTX_MS(10), 100);
    rig_start_held(&rig, &gate);
    put(&rig, 1);
    ctx_clock_advance(CTX_MS(10));
    gate_open(&gate);
    UNTIL(flushed(&rig) == 4);
    put(&rig, 7);
    UNTIL(flushed(&rig) == 10); /* two full ones, and the last waits for its delay */
    ctx_clock_advance(CTX_MS(10));
    UNTIL(flushed(&rig) == 11);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
    ctx_clock_real();
}

TEST(full_batches_that_came_during_a_flush_are_flushed_after_it) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 3, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 7);
    gate_open(&gate);
    UNTIL(flushed(&rig) >= 9);
    EXPECT(calls_after_a_moment(&rig) >= 3);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(a_close_flushes_what_is_left) {
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig_start(&rig);
    put(&rig, 50);
    rig_flush_and_end(&rig);
}

TEST(items_are_flushed_in_the_order_of_their_adding) {
    rig_t rig;
    rig_init(&rig, 7, CTX_US(50), 20);
    rig_start(&rig);
    for (int n = test_scale(4000); rig.added < n; rig.added++)
        EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx_background(), &rig.added), 0);
    rig_flush_and_end(&rig); /* looks at the order */
}

typedef struct {
    unsigned char bytes[1000];
} wide_t;

typedef struct {
    size_t size;
    int seen;
} sizes_t;

static int compares_bytes(ctx_t *ctx, const void *items, size_t n, void *user) {
    sizes_t *sizes = (sizes_t *)user;
    const unsigned char *at = (const unsigned char *)items;
    (void)ctx;
    for (size_t i = 0; i < n; i++, sizes->seen++)
        for (size_t k = 0; k < sizes->size; k++, at++) EXPECT_EQ(*at, (unsigned char)((size_t)sizes->seen + k));
    return 0;
}

TEST(items_of_any_size_are_copied) {
    static const size_t item_sizes[] = {1, 3, 8, 24, 1000};
    for (size_t i = 0; i < sizeof item_sizes / sizeof item_sizes[0]; i++) {
        sizes_t sizes = {item_sizes[i], 0};
        ctx_batch_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.item_size = sizes.size;
        desc.max_items = 7;
        desc.queue = 50;
        desc.flush = compares_bytes;
        desc.user = &sizes;
        ctx_batch_t *batch = ctx_batch_new(ctx_background(), &desc);
        CHECK(batch != NULL);
        for (int n = 0; n < 50; n++) {
            wide_t wide;
            for (size_t k = 0; k < sizeof wide.bytes; k++) wide.bytes[k] = (unsigned char)((size_t)n + k);
            EXPECT_EQ(ctx_batch_add_wait(batch, ctx_background(), &wide), 0);
            memset(&wide, 0xee, sizeof wide);
        }
        EXPECT_EQ(batch_close(batch, CTX_FOREVER), 0);
        EXPECT_EQ(sizes.seen, 50);
    }
}

/* -- one flush at a time ---------------------------------------------------------------------------------------- */

typedef struct {
    ctx_batch_t *batch;
    int each;
    int inside;  /* [atomic] */
    int flushed; /* written by flush alone: the next one must see what the one before wrote */
    int calls;
} crowd_t;

static int counts_alone(ctx_t *ctx, const void *items, size_t n, void *user) {
    crowd_t *crowd = (crowd_t *)user;
    (void)ctx;
    (void)items;
    EXPECT_EQ(__atomic_add_fetch(&crowd->inside, 1, __ATOMIC_RELAXED), 1);
    crowd->flushed += (int)n;
    crowd->calls++;
    if (crowd->calls % 8 == 0) sched_yield();
    __atomic_sub_fetch(&crowd->inside, 1, __ATOMIC_RELAXED);
    return 0;
}

static void *adds_and_requests(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    for (int i = 0; i < crowd->each; i++) {
        EXPECT_EQ(ctx_batch_add_wait(crowd->batch, ctx_background(), &i), 0);
        if (race_below(&seed, 8) == 0) EXPECT_EQ(ctx_batch_flush(crowd->batch), 0);
    }
    return NULL;
}

TEST(one_flush_runs_at_a_time_under_eight_adders) {
    crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    crowd.each = test_scale(5000);
    ctx_batch_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof(int);
    desc.max_items = 16;
    desc.max_delay = CTX_US(20);
    desc.flush = counts_alone;
    desc.user = &crowd;
    crowd.batch = ctx_batch_new(ctx_background(), &desc);
    CHECK(crowd.batch != NULL);
    race_run(8, adds_and_requests, &crowd);
    EXPECT_EQ(batch_close(crowd.batch, CTX_FOREVER), 0);
    EXPECT_EQ(crowd.flushed, 8 * crowd.each);
}

/* -- room ------------------------------------------------------------------------------------------------------- */

TEST(as_many_items_wait_as_the_queue_holds_and_no_add_blocks) {
    rig_t rig;
    gate_t gate;
    for (size_t queue = 4; queue < 12; queue++) {
        rig_init(&rig, 4, 0, queue);
        rig_start_held(&rig, &gate);
        put(&rig, (int)queue); /* those at the gate do not count */
        for (int i = 0; i < 3; i++) EXPECT_EQ(put_one(&rig), CTX_QUEUE_FULL);
        gate_open(&gate);
        UNTIL(flushed(&rig) >= 4);
        UNTIL(put_one(&rig) == 0); /* there is room again */
        rig_flush_and_end(&rig);
        gate_destroy(&gate);
    }
}

TEST(by_default_a_hundred_make_a_batch_and_four_batches_a_queue) {
    rig_t rig;
    gate_t gate;
    gate_init(&gate);
    rig_init(&rig, 0, 0, 0);
    rig.gate = &gate;
    rig_start(&rig);
    put(&rig, 99);
    EXPECT_EQ(calls_after_a_moment(&rig), 0);
    put(&rig, 1);
    gate_await(&gate, 1);
    EXPECT_EQ(rig.sizes[0], 100);
    put(&rig, 400);
    EXPECT_EQ(put_one(&rig), CTX_QUEUE_FULL);
    gate_open(&gate);
    UNTIL(flushed(&rig) == 500);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(the_default_queue_is_four_times_max_items) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 5, 0, 0);
    rig_start_held(&rig, &gate);
    put(&rig, 20);
    EXPECT_EQ(put_one(&rig), CTX_QUEUE_FULL);
    gate_open(&gate);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(batches_of_one_are_flushed_one_by_one) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 1, 0, 1);
    rig_start_held(&rig, &gate);
    put(&rig, 1);
    EXPECT_EQ(put_one(&rig), CTX_QUEUE_FULL);
    gate_open(&gate);
    UNTIL(flushed(&rig) == 2);
    for (int n = 50; rig.added < n; rig.added++)
        EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx_background(), &rig.added), 0);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(an_add_that_waits_goes_on_when_there_is_room) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adder;
    pthread_t thread = add_apart(&adder, &rig, ctx_background(), rig.added);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(adder.rc, 0);
    rig.added++;
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(all_adds_that_wait_go_on_when_there_is_room) {
    enum { ADDERS = 8 };
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adders[ADDERS];
    pthread_t threads[ADDERS];
    for (int i = 0; i < ADDERS; i++) threads[i] = add_apart(&adders[i], &rig, ctx_background(), 4);
    gate_open(&gate);
    for (int i = 0; i < ADDERS; i++) thread_join(threads[i]);
    for (int i = 0; i < ADDERS; i++) EXPECT_EQ(adders[i].rc, 0);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.flushed, 4 + ADDERS);
    rig.added = rig.flushed = 4; /* the others all have one number */
    rig_end(&rig);
    gate_destroy(&gate);
}

TEST(an_add_that_waits_can_be_canceled_and_adds_nothing) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adders[2];
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *late = ctx_with_cancel(ctx_background());
    pthread_t first = add_apart(&adders[0], &rig, ctx, rig.added);
    pthread_t second = add_apart(&adders[1], &rig, late, rig.added);
    ctx_cancel(ctx);
    thread_join(first);
    EXPECT_EQ(adders[0].rc, CTX_CANCELED);
    ctx_cancel_cause(late, CTX_DEADLINE_EXCEEDED, "late");
    thread_join(second);
    EXPECT_EQ(adders[1].rc, CTX_DEADLINE_EXCEEDED);
    gate_open(&gate);
    ctx_end(ctx);
    ctx_end(late);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
}

TEST(an_add_that_waits_has_the_deadline_of_its_context) {
    rig_t rig;
    gate_t gate;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adder;
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(5));
    pthread_t thread = add_apart(&adder, &rig, ctx, rig.added);
    ctx_clock_advance(CTX_MS(5));
    thread_join(thread);
    EXPECT_EQ(adder.rc, CTX_DEADLINE_EXCEEDED);
    gate_open(&gate);
    ctx_end(ctx);
    rig_flush_and_end(&rig);
    gate_destroy(&gate);
    ctx_clock_real();
}

TEST(an_add_by_a_context_that_is_done_adds_nothing) {
    rig_t rig;
    rig_init(&rig, 2, 0, 2);
    rig_start(&rig);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx, &rig.added), CTX_CANCELED);
    ctx_end(ctx);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.flushed, 0);
}

/* -- failures --------------------------------------------------------------------------------------------------- */

TEST(a_failed_flush_is_tried_again) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.desc.retries = 2;
    rig.fails = 2;
    rig_start(&rig);
    put(&rig, 3);
    UNTIL(flushed(&rig) == 3);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.calls, 3);
    for (int i = 0; i < 3; i++) EXPECT_EQ(rig.sizes[i], 3);
}

TEST(after_the_last_retry_the_items_are_dropped_with_the_last_error) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.desc.retries = 2;
    rig.fails = 3;
    rig_start(&rig);
    put(&rig, 3);
    UNTIL(dropped(&rig) == 3);
    EXPECT_EQ(calls_after_a_moment(&rig), 3);
    put(&rig, 3); /* a failure is no end */
    UNTIL(flushed(&rig) == 3);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.drop_calls, 1);
    expect_reason(&rig, -3);
    EXPECT_EQ(rig.calls, 4);
    rig_end(&rig);
}

TEST(by_default_a_failed_flush_is_not_tried_again) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.fails = 2;
    rig_start(&rig);
    put(&rig, 3);
    UNTIL(dropped(&rig) == 3);
    put(&rig, 3);
    UNTIL(dropped(&rig) == 6);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.calls, 2);
    EXPECT_EQ(rig.reasons[0], -1);
    EXPECT_EQ(rig.reasons[3], -2);
    rig_end(&rig);
}

TEST(a_flush_may_fail_in_the_close_too) {
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig.fails = 1;
    rig_start(&rig);
    put(&rig, 2);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0); /* the budget held */
    EXPECT_EQ(rig.dropped, 2);
    expect_reason(&rig, -1);
    rig_end(&rig);
}

TEST(nobody_need_take_what_is_dropped) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.desc.on_drop = NULL;
    rig.fails = 1;
    rig_start(&rig);
    put(&rig, 6);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.calls, 2);
    EXPECT_EQ(rig.flushed, 3);
    ctx_end(rig.lifetime);
    pthread_mutex_destroy(&rig.mu);
}

static int gives_seven(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)ctx;
    (void)items;
    note_call((rig_t *)user, n);
    return 7;
}

TEST(anything_but_zero_is_a_failure) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.desc.flush = gives_seven;
    rig.desc.retries = 1;
    rig_start(&rig);
    put(&rig, 3);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.calls, 2);
    EXPECT_EQ(rig.dropped, 3);
    expect_reason(&rig, 7);
    rig_end(&rig);
}

/* -- closing ---------------------------------------------------------------------------------------------------- */

TEST(a_batcher_never_used_starts_no_thread_and_closes) {
    int before = threads_settled();
    rig_t rig;
    rig_init(&rig, 3, CTX_MS(10), 0);
    rig_start(&rig);
    EXPECT_EQ(thread_count(), before);
    EXPECT_EQ(batch_close(rig.batch, 0), 0);
    EXPECT_EQ(thread_count(), before);
    rig_end(&rig);
    EXPECT_EQ(rig.calls + rig.drop_calls, 0);
}

TEST(a_drain_reports_every_item_and_may_be_repeated) {
    rig_t rig;
    ctx_batch_report_t report;
    rig_init(&rig, 4, 0, 100);
    rig_start(&rig);
    put(&rig, 10);
    EXPECT_EQ(ctx_batch_drain(rig.batch, CTX_FOREVER, &report), 0);
    EXPECT(report.flushed == 10 && report.dropped == 0 && report.stuck == 0 && report.took >= 0);
    int item = 10;
    EXPECT_EQ(ctx_batch_add(rig.batch, &item), CTX_CLOSED); /* between drain and free adds are refused, not undefined */
    EXPECT_EQ(ctx_batch_flush(rig.batch), CTX_CLOSED);
    EXPECT_EQ(ctx_batch_drain(rig.batch, 0, &report), 0);
    EXPECT_EQ(report.flushed, 10);
    ctx_batch_free(rig.batch);
    rig_end(&rig);
}

TEST(closing_nothing_is_fine) {
    EXPECT_EQ(batch_close(NULL, 0), 0);
    EXPECT_EQ(batch_close(NULL, CTX_FOREVER), 0);
}

TEST(a_closing_batcher_takes_no_more) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 3);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_FOREVER);
    EXPECT_EQ(put_one(&rig), CTX_CLOSED);
    EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx_background(), &rig.added), CTX_CLOSED);
    EXPECT_EQ(ctx_batch_flush(rig.batch), CTX_CLOSED);
    EXPECT_EQ(load(&closer.done), 0);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 5);
    rig_end(&rig);
    gate_destroy(&gate);
}

TEST(an_add_that_waits_is_refused_when_closing_begins) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adders[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) threads[i] = add_apart(&adders[i], &rig, ctx_background(), 99);
    closer_t closer;
    pthread_t closing = close_apart(&closer, rig.batch, CTX_FOREVER);
    for (int i = 0; i < 4; i++) thread_join(threads[i]); /* while the flush is still held */
    for (int i = 0; i < 4; i++) EXPECT_EQ(adders[i].rc, CTX_CLOSED);
    gate_open(&gate);
    thread_join(closing);
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 4);
    rig_end(&rig);
    gate_destroy(&gate);
}

static int handler_holds, handler_came; /* [atomic] */

static void holds_its_thread(int sig) {
    (void)sig;
    store(&handler_came, 1);
    while (load(&handler_holds)) continue;
}

/* A signal handler keeps the adder from leaving, though the close has woken it. */
TEST(a_batcher_is_not_freed_under_an_add_that_waits) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("handlers do not run in a parked thread here");
#endif
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 1, 0, 1);
    rig_start_held(&rig, &gate);
    put(&rig, 1);
    adder_t adder;
    closer_t closer;
    pthread_t thread = add_apart(&adder, &rig, ctx_background(), 99);
    store(&handler_holds, 1);
    signal(SIGUSR2, holds_its_thread);
    pthread_kill(thread, SIGUSR2);
    UNTIL(load(&handler_came));
    gate_open(&gate);
    pthread_t closing = close_apart(&closer, rig.batch, CTX_FOREVER); /* it may wait for the adder, or not */
    store(&handler_holds, 0);
    thread_join(thread);
    thread_join(closing);
    EXPECT(adder.rc == CTX_CLOSED || adder.rc == 0);
    EXPECT_EQ(rig.flushed, adder.rc ? 2 : 3);
    ctx_end(rig.lifetime);
    pthread_mutex_destroy(&rig.mu);
    gate_destroy(&gate);
    signal(SIGUSR2, SIG_DFL);
}

TEST(within_the_budget_everything_is_flushed) {
    rig_t rig;
    gate_t gate;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 9);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_MS(10));
    ctx_clock_advance(CTX_MS(10) - 1);
    EXPECT(still_closing(&closer));
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 11);
    EXPECT_EQ(load(&rig.flush_err), 0);
    rig_end(&rig);
    gate_destroy(&gate);
    ctx_clock_real();
}

TEST(when_the_budget_is_over_the_flush_is_canceled_and_the_rest_dropped) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 100);
    rig.obeys = true;
    rig_start(&rig);
    put(&rig, 2);
    UNTIL(calls(&rig) == 1);
    put(&rig, 5);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_MS(10));
    ctx_clock_advance(CTX_MS(10) - 1);
    EXPECT(still_closing(&closer));
    EXPECT_EQ(dropped(&rig), 0);
    ctx_clock_advance(1);
    thread_join(thread); /* no grace period passes */
    EXPECT_EQ(closer.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(rig.calls, 1);
    EXPECT(load(&rig.flush_err) != 0);
    EXPECT_EQ(rig.dropped, 7);
    for (int i = 0; i < 7; i++) EXPECT_EQ(rig.reasons[i], i < 2 ? load(&rig.flush_err) : CTX_DEADLINE_EXCEEDED);
    rig_end(&rig);
    ctx_clock_real();
}

TEST(a_canceled_flush_is_not_tried_again) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 100);
    rig.obeys = true;
    rig.desc.retries = 1000;
    rig_start(&rig);
    put(&rig, 4);
    UNTIL(calls(&rig) == 1);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_MS(10));
    ctx_clock_advance(CTX_MS(10));
    thread_join(thread);
    EXPECT_EQ(closer.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(rig.calls, 1);
    EXPECT_EQ(rig.dropped, 4);
    rig_end(&rig);
    ctx_clock_real();
}

TEST(a_flush_that_succeeds_in_the_notice_time_counts) {
    rig_t rig;
    gate_t gate;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 100);
    rig.desc.grace = CTX_MS(50);
    rig_start_held(&rig, &gate);
    put(&rig, 3);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_MS(10));
    ctx_clock_advance(CTX_MS(10));
    EXPECT(still_closing(&closer));
    ctx_clock_advance(CTX_MS(50) - 1);
    EXPECT(still_closing(&closer));
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(closer.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(rig.flushed, 2);
    EXPECT(load(&rig.flush_err) != 0);
    EXPECT_EQ(rig.dropped, 3);
    expect_reason(&rig, CTX_DEADLINE_EXCEEDED);
    rig_end(&rig);
    gate_destroy(&gate);
    ctx_clock_real();
}

/* A flush that is quick enough may still get them. */
static void expect_close_without_time(ctx_dur_t budget) {
    rig_t rig;
    rig_init(&rig, 100, 0, 0);
    rig.desc.grace = PATIENCE_NS;
    rig_start(&rig);
    put(&rig, 5);
    int rc = batch_close(rig.batch, budget);
    EXPECT(rc == CTX_DEADLINE_EXCEEDED || rig.dropped == 0);
    expect_reason(&rig, CTX_DEADLINE_EXCEEDED);
    rig_end(&rig);
}

TEST(without_a_budget_the_items_are_dropped_or_flushed_at_once) {
    for (int i = 0; i < 20; i++) {
        expect_close_without_time(0);
        expect_close_without_time(-1);
        expect_close_without_time(INT64_MIN);
    }
}

/* Where the flush is stuck the items that it has are its own: neither dropped nor tried again. */
static void expect_close_to_leave_a_stuck_flush(ctx_pool_t *pool, ctx_dur_t notice, ctx_dur_t noticed, int fails) {
    rig_t rig;
    gate_t gate;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 2, 0, 100);
    rig.desc.grace = notice;
    rig.desc.pool = pool;
    rig.desc.retries = 3;
    rig.desc.on_drop = NULL; /* rig.inside is the stuck one's */
    rig_start_held(&rig, &gate);
    put(&rig, 3);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_MS(10));
    ctx_clock_advance(CTX_MS(10));
    if (noticed > 0) {
        EXPECT(still_closing(&closer)); /* and it is in its next wait, before the clock goes on */
        ctx_clock_advance(noticed - 1);
        EXPECT(still_closing(&closer));
        ctx_clock_advance(1);
    }
    thread_join(thread);
    EXPECT_EQ(closer.rc, CTX_DEADLINE_EXCEEDED);
    ctx_end(rig.lifetime);
    store(&rig.fails, fails);
    EXPECT_EQ(load(&rig.inside), 1);
    gate_open(&gate);
    gate_destroy(&gate);
    UNTIL(load(&rig.inside) == 0);
    EXPECT_EQ(flushed(&rig), fails ? 0 : 2);
    EXPECT_EQ(calls_after_a_moment(&rig), 1);
    pthread_mutex_destroy(&rig.mu);
    ctx_clock_real();
}

TEST(a_stuck_flush_is_left_behind_after_the_notice_time) {
    expect_close_to_leave_a_stuck_flush(NULL, CTX_MS(50), CTX_MS(50), 0);
    expect_close_to_leave_a_stuck_flush(NULL, 0, CTX_MS(100), 0);
    expect_close_to_leave_a_stuck_flush(NULL, -1, 0, 0);
}

TEST(a_stuck_flush_that_fails_at_last_is_left_alone) {
    expect_close_to_leave_a_stuck_flush(NULL, CTX_MS(50), CTX_MS(50), 1);
    expect_close_to_leave_a_stuck_flush(NULL, -1, 0, 1);
}

typedef struct {
    gate_t gate;
    int ended, dropped, reason; /* [atomic] */
} stuck_t;

static int sticks(ctx_t *ctx, const void *items, size_t n, void *user) {
    stuck_t *stuck = (stuck_t *)user;
    gate_pass(&stuck->gate);
    EXPECT(ctx_err(ctx) != 0);
    for (size_t i = 0; i < n; i++) EXPECT_EQ(((const int *)items)[i], (int)i); /* readable to the end */
    store(&stuck->ended, 1);
    return 0;
}

static void counts_drops(const void *items, size_t n, int reason, void *user) {
    stuck_t *stuck = (stuck_t *)user;
    EXPECT_EQ(((const int *)items)[0], 2 + load(&stuck->dropped));
    store(&stuck->reason, reason);
    add(&stuck->dropped, (int)n);
}

TEST(what_waits_behind_a_stuck_flush_is_dropped_and_its_memory_outlives_the_close) {
    stuck_t stuck;
    memset(&stuck, 0, sizeof stuck);
    gate_init(&stuck.gate);
    ctx_batch_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof(int);
    desc.max_items = 2;
    desc.grace = -1;
    desc.flush = sticks;
    desc.on_drop = counts_drops;
    desc.user = &stuck;
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_batch_t *batch = ctx_batch_new(lifetime, &desc);
    CHECK(batch != NULL);
    for (int i = 0; i < 2; i++) EXPECT_EQ(ctx_batch_add(batch, &i), 0);
    gate_await(&stuck.gate, 1);
    for (int i = 2; i < 5; i++) EXPECT_EQ(ctx_batch_add(batch, &i), 0);
    EXPECT_EQ(batch_close(batch, 0), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(load(&stuck.dropped), 3);
    ctx_end(lifetime);
    gate_open(&stuck.gate);
    UNTIL(load(&stuck.ended));
    EXPECT_EQ(load(&stuck.dropped), 3);
    EXPECT_EQ(load(&stuck.reason), CTX_DEADLINE_EXCEEDED);
    gate_destroy(&stuck.gate);
}

/* -- the lifetime ----------------------------------------------------------------------------------------------- */

TEST(when_the_lifetime_ends_adds_are_refused_and_what_waits_is_dropped) {
    rig_t rig;
    rig_init(&rig, 100, 0, 0);
    rig_start(&rig);
    put(&rig, 7);
    ctx_cancel(rig.lifetime);
    EXPECT_EQ(put_one(&rig), CTX_CANCELED);
    EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx_background(), &rig.added), CTX_CANCELED);
    EXPECT_EQ(ctx_batch_flush(rig.batch), CTX_CANCELED);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.calls, 0);
    EXPECT_EQ(rig.dropped, 7);
    expect_reason(&rig, CTX_CANCELED);
    rig_end(&rig);
}

TEST(when_the_lifetime_ends_what_waits_is_dropped_without_a_close) {
    rig_t rig;
    rig_init(&rig, 100, 0, 0);
    rig_start(&rig);
    put(&rig, 7);
    ctx_cancel(rig.lifetime);
    UNTIL(dropped(&rig) == 7);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    expect_reason(&rig, CTX_CANCELED);
    rig_end(&rig);
}

TEST(a_lifetime_may_end_by_its_deadline) {
    rig_t rig;
    ctx_clock_fake(CTX_S(1000));
    rig_init(&rig, 100, 0, 0);
    ctx_end(rig.lifetime);
    rig.lifetime = ctx_with_timeout(ctx_background(), CTX_S(1));
    rig_start(&rig);
    put(&rig, 7);
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(put_one(&rig), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_batch_flush(rig.batch), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.dropped, 7);
    expect_reason(&rig, CTX_DEADLINE_EXCEEDED); /* the err of the lifetime */
    rig_end(&rig);
    ctx_clock_real();
}

TEST(when_the_lifetime_ends_the_running_flush_is_canceled) {
    rig_t rig;
    rig_init(&rig, 2, 0, 100);
    rig.obeys = true;
    rig_start(&rig);
    put(&rig, 2);
    UNTIL(calls(&rig) == 1);
    put(&rig, 5);
    ctx_cancel(rig.lifetime);
    UNTIL(dropped(&rig) == 7);
    EXPECT_EQ(load(&rig.flush_err), CTX_CANCELED);
    EXPECT_EQ(batch_close(rig.batch, 0), 0);
    EXPECT_EQ(rig.calls, 1);
    expect_reason(&rig, CTX_CANCELED);
    rig_end(&rig);
}

TEST(a_flush_that_succeeds_after_the_lifetime_ended_counts) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 100);
    rig_start_held(&rig, &gate);
    put(&rig, 3);
    ctx_cancel(rig.lifetime);
    gate_open(&gate);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.flushed, 2);
    EXPECT_EQ(rig.dropped, 3);
    expect_reason(&rig, CTX_CANCELED);
    rig_end(&rig);
    gate_destroy(&gate);
}

TEST(the_end_of_the_lifetime_ends_an_add_that_waits) {
    rig_t rig;
    gate_t gate;
    rig_init(&rig, 2, 0, 2);
    rig_start_held(&rig, &gate);
    put(&rig, 2);
    adder_t adder;
    pthread_t thread = add_apart(&adder, &rig, ctx_background(), rig.added);
    ctx_cancel(rig.lifetime);
    thread_join(thread);
    EXPECT_EQ(adder.rc, CTX_CANCELED);
    gate_open(&gate);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    rig_end(&rig);
    gate_destroy(&gate);
}

TEST(below_a_lifetime_that_is_over_nothing_is_taken) {
    rig_t rig;
    rig_init(&rig, 2, CTX_MS(1), 2);
    ctx_cancel(rig.lifetime);
    rig_start(&rig);
    EXPECT_EQ(put_one(&rig), CTX_CANCELED);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    rig_end(&rig);
}

TEST(the_lifetime_may_be_ended_before_the_close) {
    rig_t rig;
    rig_init(&rig, 100, CTX_S(3600), 0);
    rig_start(&rig);
    put(&rig, 5);
    ctx_end(rig.lifetime);
    rig.lifetime = NULL;
    EXPECT_EQ(put_one(&rig), CTX_CANCELED);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.dropped, 5);
    rig_end(&rig);
}

/* -- on a pool -------------------------------------------------------------------------------------------------- */

static ctx_pool_t *pool_of(int workers, size_t queue) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
    if (!pool) abort();
    return pool;
}

static void pool_end(ctx_pool_t *pool) {
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

static int notes_its_tid(ctx_t *ctx, void *arg) {
    (void)ctx;
    store((int *)arg, thread_id());
    return 0;
}

static int passes_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

TEST(flush_runs_on_the_thread_of_the_pool) {
    ctx_pool_t *pool = pool_of(1, 16);
    int worker = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "tid", notes_its_tid, &worker), 0);
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 3);
    UNTIL(flushed(&rig) == 3);
    EXPECT_EQ(load(&rig.tid), load(&worker));
    put(&rig, 1);
    rig_flush_and_end(&rig);
    EXPECT_EQ(load(&rig.tid), load(&worker)); /* in the close too */
    pool_end(pool);
}

TEST(a_flush_waits_for_a_busy_pool) {
    ctx_pool_t *pool = pool_of(1, 16);
    gate_t gate;
    gate_init(&gate);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "busy", passes_gate, &gate), 0);
    gate_await(&gate, 1);
    rig_t rig;
    rig_init(&rig, 3, 0, 6);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 6);
    gate_open(&gate);
    UNTIL(flushed(&rig) == 6);
    rig_flush_and_end(&rig);
    pool_end(pool);
    gate_destroy(&gate);
}

/* A pool whose only worker stands at the gate and whose queue is full. */
static ctx_pool_t *full_pool(gate_t *gate) {
    ctx_pool_t *pool = pool_of(1, 1);
    gate_init(gate);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "busy", passes_gate, gate), 0);
    gate_await(gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", passes_gate, gate), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "refused", passes_gate, gate), CTX_QUEUE_FULL);
    return pool;
}

TEST(a_full_pool_loses_nothing) {
    for (int delay = 0; delay < 2; delay++) {
        gate_t gate;
        ctx_pool_t *pool = full_pool(&gate);
        rig_t rig;
        rig_init(&rig, 3, delay ? CTX_MS(1) : 0, 100);
        rig.desc.pool = pool;
        rig_start(&rig);
        put(&rig, 7);
        EXPECT_EQ(ctx_batch_flush(rig.batch), 0);
        gate_open(&gate);
        UNTIL(flushed(&rig) == 7);
        rig_flush_and_end(&rig);
        pool_end(pool);
        gate_destroy(&gate);
    }
}

TEST(a_full_pool_keeps_no_close_beyond_its_budget) {
    gate_t gate;
    ctx_pool_t *pool = full_pool(&gate);
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 7);
    int rc = batch_close(rig.batch, CTX_MS(5));
    EXPECT_EQ(rc, rig.dropped ? CTX_DEADLINE_EXCEEDED : 0);
    rig_end(&rig);
    gate_open(&gate);
    pool_end(pool);
    gate_destroy(&gate);
}

TEST(a_pool_drained_before_the_close_loses_nothing) {
    for (int full = 0; full < 2; full++) {
        ctx_pool_t *pool = pool_of(1, 4);
        rig_t rig;
        rig_init(&rig, full ? 3 : 100, 0, 100);
        rig.desc.pool = pool;
        rig_start(&rig);
        put(&rig, 2);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        while (rig.added < 50 && put_one(&rig) == 0) continue;
        EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
        rig_end(&rig);
        ctx_pool_free(pool);
    }
}

TEST(a_flush_dropped_by_its_pool_loses_nothing) {
    ctx_pool_t *pool = pool_of(1, 4);
    gate_t gate;
    gate_init(&gate);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "busy", passes_gate, &gate), 0);
    gate_await(&gate, 1);
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 3);                  /* its task waits behind the one at the gate, */
    ctx_pool_drain(pool, 0, NULL); /* and is dropped */
    gate_open(&gate);
    put(&rig, 2);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    rig_end(&rig);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(a_canceled_flush_on_a_pool_stops) {
    ctx_pool_t *pool = pool_of(2, 4);
    rig_t rig;
    rig_init(&rig, 2, 0, 100);
    rig.desc.pool = pool;
    rig.obeys = true;
    rig_start(&rig);
    put(&rig, 2);
    UNTIL(calls(&rig) == 1);
    put(&rig, 3);
    EXPECT_EQ(batch_close(rig.batch, CTX_MS(1)), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(rig.dropped, 5);
    rig_end(&rig);
    pool_end(pool);
}

TEST(a_stuck_flush_on_a_pool_is_left_behind) {
    ctx_pool_t *pool = pool_of(2, 4);
    expect_close_to_leave_a_stuck_flush(pool, CTX_MS(50), CTX_MS(50), 0);
    expect_close_to_leave_a_stuck_flush(pool, -1, 0, 1);
    pool_end(pool);
}

TEST(many_batchers_share_one_worker) {
    enum { RIGS = 20 };
    static rig_t rigs[RIGS];
    ctx_pool_t *pool = pool_of(1, 4); /* fewer places than batchers */
    for (int i = 0; i < RIGS; i++) {
        rig_init(&rigs[i], 3, CTX_MS(1), 30);
        rigs[i].desc.pool = pool;
        rig_start(&rigs[i]);
    }
    for (int round = 0; round < 10; round++)
        for (int i = 0; i < RIGS; i++) put(&rigs[i], 3);
    for (int i = 0; i < RIGS; i++) UNTIL(flushed(&rigs[i]) == 30);
    for (int i = 0; i < RIGS; i++) put(&rigs[i], 1 + i % 3);
    for (int i = 0; i < RIGS; i++) rig_flush_and_end(&rigs[i]);
    pool_end(pool);
}

static int closes_in_a_task(ctx_t *ctx, void *arg) {
    (void)ctx;
    closes(arg);
    return 0;
}

/* The close stands on the only thread of the pool that could flush. */
TEST(a_task_of_a_pool_of_one_may_close_a_batcher_on_it) {
    ctx_pool_t *pool = pool_of(1, 4);
    rig_t rig;
    closer_t closer;
    rig_init(&rig, 3, 0, 100);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 2);
    memset(&closer, 0, sizeof closer);
    closer.batch = rig.batch;
    closer.budget = CTX_S(20);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "close", closes_in_a_task, &closer), 0);
    UNTIL(load(&closer.done));
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 2);
    rig_end(&rig);
    pool_end(pool);
}

static int waits_in_a_task(ctx_t *ctx, void *arg) {
    rig_t *rig = (rig_t *)arg;
    for (int i = 0; i < 6; i++, rig->added++) EXPECT_EQ(ctx_batch_add_wait(rig->batch, ctx, &rig->added), 0);
    return 0;
}

/* The task waits for room that only a flush makes. */
TEST(a_task_of_a_pool_of_one_may_wait_for_room_in_a_batcher_on_it) {
    ctx_pool_t *pool = pool_of(1, 4);
    rig_t rig;
    rig_init(&rig, 2, 0, 2);
    rig.desc.pool = pool;
    rig_start(&rig);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "adds", waits_in_a_task, &rig), 0);
    UNTIL(flushed(&rig) == 6);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    rig_flush_and_end(&rig);
    ctx_pool_free(pool);
}

static int flush_closes_another(ctx_t *ctx, const void *items, size_t n, void *user) {
    closer_t *closer = (closer_t *)user;
    (void)ctx, (void)items, (void)n;
    closes(closer);
    return 0;
}

TEST(a_flush_on_a_pool_of_one_may_close_another_batcher_on_it) {
    ctx_pool_t *pool = pool_of(1, 4);
    rig_t rig;
    closer_t closer;
    ctx_batch_desc_t desc;
    rig_init(&rig, 3, 0, 100);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 2);
    memset(&closer, 0, sizeof closer);
    closer.batch = rig.batch;
    closer.budget = CTX_FOREVER;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof(int);
    desc.max_items = 1;
    desc.flush = flush_closes_another;
    desc.user = &closer;
    desc.pool = pool;
    ctx_batch_t *outer = ctx_batch_new(ctx_background(), &desc);
    CHECK(outer != NULL);
    EXPECT_EQ(ctx_batch_add(outer, &closer.rc), 0);
    UNTIL(load(&closer.done));
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 2);
    rig_end(&rig);
    EXPECT_EQ(batch_close(outer, CTX_FOREVER), 0);
    pool_end(pool);
}

/* A turn takes no place in the queue: nothing refuses it, and its worker does the flush, without a delay that asks
   again. */
TEST(a_full_pool_refuses_no_turn) {
    gate_t gate;
    int worker = 0;
    ctx_pool_t *pool = full_pool(&gate);
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig.desc.pool = pool;
    rig_start(&rig);
    put(&rig, 3);
    EXPECT_EQ(calls_after_a_moment(&rig), 0);
    gate_open(&gate);
    UNTIL(flushed(&rig) == 3);
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "tid", notes_its_tid, &worker), 0);
    UNTIL(load(&worker) != 0);
    EXPECT_EQ(load(&rig.tid), load(&worker));
    rig_flush_and_end(&rig);
    pool_end(pool);
    gate_destroy(&gate);
}

/* The worker never comes, and still nothing is left with the pool. */
TEST(a_freed_batcher_leaves_nothing_with_its_pool) {
    ctx_pool_t *pool = pool_of(1, 4);
    gate_t gate;
    gate_init(&gate);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "busy", passes_gate, &gate), 0);
    gate_await(&gate, 1);
    rig_t rig;
    rig_init(&rig, 1, 0, 100);
    rig.desc.pool = pool;
    long live = blocks_live();
    rig_start(&rig);
    put(&rig, 2);
    EXPECT_EQ(batch_close(rig.batch, 0), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(rig.dropped, 2);
    if (blocks_counted()) EXPECT_EQ(blocks_live(), live);
    rig_end(&rig);
    gate_open(&gate);
    pool_end(pool);
    gate_destroy(&gate);
}

/* -- adding from within ----------------------------------------------------------------------------------------- */

static int adds_the_next(ctx_t *ctx, const void *items, size_t n, void *user) {
    rig_t *rig = (rig_t *)user;
    int rc = flushes(ctx, items, n, user);
    if (rig->added < 50) put(rig, 1);
    return rc;
}

TEST(a_flush_may_add) {
    rig_t rig;
    rig_init(&rig, 1, 0, 10);
    rig.desc.flush = adds_the_next;
    rig_start(&rig);
    EXPECT_EQ(ctx_batch_add(rig.batch, &rig.added), 0); /* the number 0 twice: then the flush owns the count */
    UNTIL(flushed(&rig) == 51);
    EXPECT_EQ(batch_close(rig.batch, CTX_FOREVER), 0);
    EXPECT_EQ(rig.calls, 51);
    EXPECT_EQ(rig.items[50], 49);
    ctx_end(rig.lifetime);
    pthread_mutex_destroy(&rig.mu);
}

/* A full queue, a closing batcher and an ended lifetime answer it like anybody. */
typedef struct {
    ctx_batch_t *batch;
    gate_t gate;
    int rc; /* [atomic] of the last add from within */
} within_t;

static int adds_after_the_gate(ctx_t *ctx, const void *items, size_t n, void *user) {
    within_t *w = (within_t *)user;
    int rc = 0;
    (void)ctx;
    (void)items;
    (void)n;
    gate_pass(&w->gate);
    store(&w->rc, ctx_batch_add(w->batch, &rc));
    return -9;
}

static void adds_what_is_dropped(const void *items, size_t n, int reason, void *user) {
    within_t *w = (within_t *)user;
    EXPECT(n > 0 && reason < 0);
    store(&w->rc, ctx_batch_add(w->batch, items));
}

static void within_start(within_t *w, ctx_t *lifetime, size_t max_items) {
    ctx_batch_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof(int);
    desc.max_items = max_items;
    desc.flush = adds_after_the_gate;
    desc.on_drop = adds_what_is_dropped;
    desc.user = w;
    memset(w, 0, sizeof *w);
    gate_init(&w->gate);
    w->rc = 99;
    w->batch = ctx_batch_new(lifetime, &desc);
    if (!w->batch) abort();
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_batch_add(w->batch, &i), 0);
}

TEST(an_add_from_flush_or_on_drop_is_refused_when_closing) {
    within_t w;
    within_start(&w, ctx_background(), 2);
    gate_await(&w.gate, 1);
    closer_t closer;
    pthread_t thread = close_apart(&closer, w.batch, CTX_FOREVER);
    gate_open(&w.gate);
    thread_join(thread);
    EXPECT_EQ(load(&w.rc), CTX_CLOSED);
    gate_destroy(&w.gate);
}

TEST(an_add_from_on_drop_is_refused_when_the_lifetime_has_ended) {
    within_t w;
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    within_start(&w, lifetime, 100);
    ctx_cancel(lifetime);
    UNTIL(load(&w.rc) != 99);
    EXPECT_EQ(load(&w.rc), CTX_CANCELED);
    EXPECT_EQ(batch_close(w.batch, CTX_FOREVER), 0);
    gate_destroy(&w.gate);
    ctx_end(lifetime);
}

static void adds_back(const void *items, size_t n, int reason, void *user) {
    rig_t *rig = (rig_t *)user;
    EXPECT_EQ(reason, -rig->failed);
    for (size_t i = 0; i < n; i++) EXPECT_EQ(ctx_batch_add(rig->batch, (const int *)items + i), 0);
}

TEST(on_drop_may_add_back_what_failed) {
    rig_t rig;
    rig_init(&rig, 3, 0, 100);
    rig.desc.on_drop = adds_back;
    rig.fails = 5;
    rig_start(&rig);
    put(&rig, 3);
    UNTIL(flushed(&rig) == 3);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.calls, 6);
}

/* -- draining from within --------------------------------------------------------------------------------------- */

/* A batcher of blocks of one whose flush or on_drop drains it, with all the time there is unless `budget` says else. */
typedef struct {
    ctx_batch_t *batch;
    gate_t gate;        /* the first call stops here, until everything is added */
    gate_t after;       /* calls that have drained stop here */
    gate_t *second;     /* the second call stops here, if it is set */
    bool fails;         /* flush fails, so that on_drop is called */
    bool frees;         /* and free */
    int drains;         /* [atomic] so many calls drain */
    ctx_dur_t budget;   /* 0: CTX_FOREVER */
    int calls, drained; /* [atomic] */
    int rc;             /* [atomic] the worst of the drains */
    int fate[8];        /* [atomic] */
    int tid;            /* [atomic] of the first call */
    ctx_batch_report_t report;
} inner_t;

static void drains_within(inner_t *in) {
    int call = add(&in->calls, 1);
    if (call == 1) store(&in->tid, thread_id());
    if (call == 1) gate_pass(&in->gate);
    if (call == 2 && in->second) gate_pass(in->second);
    if (add(&in->drains, -1) < 0) return;
    int rc = ctx_batch_drain(in->batch, in->budget ? in->budget : CTX_FOREVER, call == 1 ? &in->report : NULL);
    if (rc) store(&in->rc, rc);
    if (in->frees) ctx_batch_free(in->batch);
    add(&in->drained, 1);
    gate_pass(&in->after);
}

static int flush_drains(ctx_t *ctx, const void *items, size_t n, void *user) {
    inner_t *in = (inner_t *)user;
    (void)ctx;
    if (in->fails && *(const int *)items == 0) return -7;
    if (!in->fails) drains_within(in);
    for (size_t i = 0; i < n; i++) add(&in->fate[((const int *)items)[i]], 1);
    return 0;
}

static void drop_drains(const void *items, size_t n, int reason, void *user) {
    inner_t *in = (inner_t *)user;
    EXPECT(reason < 0);
    drains_within(in);
    for (size_t i = 0; i < n; i++) add(&in->fate[((const int *)items)[i]], 1);
}

/* With `n` items added, of which the first is out. */
static void inner_start(inner_t *in, ctx_pool_t *pool, ctx_t *lifetime, bool in_flush, int drains, int n) {
    ctx_batch_desc_t desc;
    memset(in, 0, sizeof *in);
    memset(&desc, 0, sizeof desc);
    gate_init(&in->gate);
    gate_init(&in->after);
    in->fails = !in_flush;
    in->drains = drains;
    desc.item_size = sizeof(int);
    desc.max_items = 1;
    desc.queue = 8;
    desc.flush = flush_drains;
    desc.on_drop = drop_drains;
    desc.user = in;
    desc.pool = pool;
    in->batch = ctx_batch_new(lifetime, &desc);
    if (!in->batch) abort();
    for (int i = 0; i < n; i++) EXPECT_EQ(ctx_batch_add(in->batch, &i), 0);
    gate_await(&in->gate, 1);
}

static void inner_end(inner_t *in, int n) {
    gate_open(&in->after);
    for (int i = 0; i < n; i++) UNTIL(load(&in->fate[i]) == 1);
    gate_destroy(&in->gate);
    gate_destroy(&in->after);
}

TEST(a_drain_from_on_drop_or_flush_does_not_wait_for_its_own_call) {
    for (int in_flush = 0; in_flush < 2; in_flush++)
        for (int frees = 0; frees < 2; frees++) {
            inner_t in;
            inner_start(&in, NULL, ctx_background(), in_flush, 1, 1);
            in.frees = frees;
            gate_open(&in.gate);
            UNTIL(load(&in.drained));
            EXPECT_EQ(load(&in.rc), 0);
            EXPECT_EQ(in.report.dropped, in_flush ? 0 : 1);
            EXPECT_EQ(in.report.stuck, in_flush ? 1 : 0);
            EXPECT_EQ(load(&in.fate[0]), 0); /* its item is its own until it returns */
            inner_end(&in, 1);
            if (!frees) EXPECT_EQ(batch_close(in.batch, CTX_FOREVER), 0);
        }
}

TEST(a_drain_from_within_flushes_what_waits_behind_its_call) {
    for (int in_flush = 0; in_flush < 2; in_flush++) {
        inner_t in;
        inner_start(&in, NULL, ctx_background(), in_flush, 1, 4);
        in.frees = true;
        gate_open(&in.gate);
        UNTIL(load(&in.drained));
        EXPECT_EQ(load(&in.rc), 0);
        for (int i = 1; i < 4; i++) EXPECT_EQ(load(&in.fate[i]), 1); /* before it returned */
        EXPECT_EQ(in.report.flushed, 3);
        inner_end(&in, 4);
    }
}

/* The call stands on the only worker, so what waits behind it is flushed elsewhere. */
TEST(a_drain_from_within_on_a_pool_of_one_flushes_what_waits) {
    for (int in_flush = 0; in_flush < 2; in_flush++) {
        ctx_pool_t *pool = pool_of(1, 4);
        inner_t in;
        inner_start(&in, pool, ctx_background(), in_flush, 1, 4);
        gate_open(&in.gate);
        UNTIL(load(&in.drained));
        EXPECT_EQ(load(&in.rc), 0);
        inner_end(&in, 4);
        EXPECT_EQ(batch_close(in.batch, CTX_FOREVER), 0);
        pool_end(pool);
    }
}

TEST(calls_that_drain_do_not_wait_for_each_other) {
    inner_t in;
    inner_start(&in, NULL, ctx_background(), true, 3, 3);
    gate_open(&in.after);
    gate_open(&in.gate);
    UNTIL(load(&in.drained) == 3);
    EXPECT_EQ(load(&in.rc), 0);
    inner_end(&in, 3);
    EXPECT_EQ(batch_close(in.batch, CTX_FOREVER), 0);
}

TEST(a_drain_elsewhere_waits_for_a_call_that_has_drained) {
    inner_t in;
    inner_start(&in, NULL, ctx_background(), true, 1, 1);
    gate_open(&in.gate);
    UNTIL(load(&in.drained));
    closer_t closer;
    pthread_t thread = close_apart(&closer, in.batch, CTX_FOREVER);
    EXPECT_EQ(load(&closer.done), 0);
    gate_open(&in.after);
    thread_join(thread);
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(load(&in.fate[0]), 1); /* flush had returned */
    inner_end(&in, 1);
}

/* The drain of the first call waits for the second, which is stuck, and drops the third. */
TEST(a_drain_from_within_keeps_to_its_budget) {
    ctx_clock_fake(CTX_S(1000));
    inner_t in;
    gate_t second;
    gate_init(&second);
    inner_start(&in, NULL, ctx_background(), true, 1, 3);
    in.second = &second;
    in.budget = CTX_MS(10);
    gate_open(&in.gate);
    gate_await(&second, 1);
    until_asleep(&in.tid);
    ctx_clock_advance(CTX_MS(10));
    until_asleep(&in.tid);
    EXPECT_EQ(load(&in.drained), 0);
    ctx_clock_advance(CTX_MS(100)); /* the grace period */
    UNTIL(load(&in.drained));
    EXPECT_EQ(load(&in.rc), CTX_DEADLINE_EXCEEDED);
    EXPECT(in.report.stuck == 2 && in.report.dropped == 1);
    EXPECT_EQ(load(&in.fate[2]), 1);
    gate_open(&second);
    inner_end(&in, 3);
    EXPECT_EQ(batch_close(in.batch, CTX_FOREVER), 0);
    gate_destroy(&second);
    ctx_clock_real();
}

/* on_drop is called by the thread that ends the lifetime, and frees the batcher there. */
TEST(on_drop_may_free_the_batcher_when_the_lifetime_ends) {
    inner_t in;
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_batch_desc_t desc;
    memset(&in, 0, sizeof in);
    memset(&desc, 0, sizeof desc);
    gate_init(&in.gate);
    gate_init(&in.after);
    gate_open(&in.gate);
    gate_open(&in.after);
    in.drains = 1;
    in.frees = true;
    desc.item_size = sizeof(int);
    desc.max_items = 2;
    desc.flush = flush_drains;
    desc.on_drop = drop_drains;
    desc.user = &in;
    in.batch = ctx_batch_new(lifetime, &desc);
    CHECK(in.batch != NULL);
    EXPECT_EQ(ctx_batch_add(in.batch, &in.calls), 0);
    ctx_cancel(lifetime);
    EXPECT_EQ(load(&in.drained), 1);
    EXPECT_EQ(load(&in.rc), 0);
    inner_end(&in, 1);
    ctx_end(lifetime);
}

typedef struct {
    ctx_t *lifetime;
    int done; /* [atomic] */
} canceler_t;

static void *cancels(void *arg) {
    canceler_t *c = (canceler_t *)arg;
    ctx_cancel(c->lifetime);
    store(&c->done, 1);
    return NULL;
}

/* The thread that ends the lifetime is stuck in on_drop: neither drain nor free waits for that for ever. */
TEST(an_on_drop_that_is_stuck_holds_up_no_free) {
    inner_t in;
    canceler_t canceler = {ctx_with_cancel(ctx_background()), 0};
    ctx_batch_desc_t desc;
    memset(&in, 0, sizeof in);
    memset(&desc, 0, sizeof desc);
    gate_init(&in.gate);
    gate_init(&in.after);
    desc.item_size = sizeof(int);
    desc.max_items = 1;
    desc.flush = flush_drains;
    desc.on_drop = drop_drains;
    desc.user = &in;
    desc.grace = -1;
    gate_t busy;
    gate_init(&busy);
    ctx_pool_t *pool = pool_of(1, 4);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "busy", passes_gate, &busy), 0);
    gate_await(&busy, 1);
    desc.pool = pool;
    in.batch = ctx_batch_new(canceler.lifetime, &desc);
    CHECK(in.batch != NULL);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_batch_add(in.batch, &i), 0); /* no worker for them */
    pthread_t thread = thread_start(cancels, &canceler);
    gate_await(&in.gate, 1); /* in on_drop, by the canceler */
    EXPECT_EQ(ctx_batch_drain(in.batch, 0, &in.report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(in.report.dropped, 3);
    EXPECT_EQ(load(&in.fate[1]) + load(&in.fate[2]), 2); /* the drain has taken them over */
    ctx_batch_free(in.batch);
    EXPECT_EQ(load(&canceler.done), 0);
    gate_open(&in.gate);
    thread_join(thread);
    inner_end(&in, 3);
    ctx_end(canceler.lifetime);
    gate_open(&busy);
    pool_end(pool);
    gate_destroy(&busy);
}

/* An add that waits for room, in flush or on_drop, would wait for the end of that very call. */
static int waits_for_room(ctx_t *ctx, const void *items, size_t n, void *user) {
    within_t *w = (within_t *)user;
    (void)ctx, (void)n;
    gate_pass(&w->gate);
    int expected = 99;
    int rc = ctx_batch_add_wait(w->batch, ctx_background(), items);
    __atomic_compare_exchange_n(&w->rc, &expected, rc, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return 0;
}

TEST(an_add_that_would_wait_for_its_own_flush_is_refused) {
    within_t w;
    ctx_batch_desc_t desc;
    memset(&desc, 0, sizeof desc);
    memset(&w, 0, sizeof w);
    gate_init(&w.gate);
    w.rc = 99;
    desc.item_size = sizeof(int);
    desc.max_items = 1;
    desc.queue = 1;
    desc.flush = waits_for_room;
    desc.user = &w;
    w.batch = ctx_batch_new(ctx_background(), &desc);
    CHECK(w.batch != NULL);
    EXPECT_EQ(ctx_batch_add(w.batch, &w.rc), 0);
    gate_await(&w.gate, 1);
    EXPECT_EQ(ctx_batch_add(w.batch, &w.rc), 0); /* the queue is full again */
    gate_open(&w.gate);
    UNTIL(load(&w.rc) != 99);
    EXPECT_EQ(load(&w.rc), CTX_QUEUE_FULL);
    EXPECT_EQ(batch_close(w.batch, CTX_FOREVER), 0);
    gate_destroy(&w.gate);
}

TEST(a_later_drain_waits_for_a_flush_that_was_stuck) {
    rig_t rig;
    gate_t gate;
    ctx_batch_report_t report;
    rig_init(&rig, 2, 0, 100);
    rig.desc.grace = -1;
    rig.desc.on_drop = NULL;
    rig_start_held(&rig, &gate);
    put(&rig, 1);
    EXPECT_EQ(ctx_batch_drain(rig.batch, 0, &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(report.stuck == 2 && report.dropped == 1 && report.flushed == 0);
    closer_t closer;
    pthread_t thread = close_apart(&closer, rig.batch, CTX_FOREVER);
    EXPECT_EQ(load(&closer.done), 0);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(closer.rc, 0);
    EXPECT_EQ(rig.flushed, 2);
    ctx_end(rig.lifetime);
    pthread_mutex_destroy(&rig.mu);
    gate_destroy(&gate);
}

/* -- in the child of a fork ------------------------------------------------------------------------------------- */

typedef struct {
    ctx_batch_t *batch;
    gate_t gate;
    int child; /* [atomic] its pid */
    int calls; /* [atomic] */
} forker_t;

static int flush_forks(ctx_t *ctx, const void *items, size_t n, void *user) {
    forker_t *f = (forker_t *)user;
    (void)ctx, (void)items, (void)n;
    if (add(&f->calls, 1) > 1) {
        if (load(&f->child) < 0) _exit(1); /* the child flushes items of its parent */
        return 0;
    }
    gate_pass(&f->gate);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(1); /* ends it, by the signal: what the other threads of the parent held at the fork is no leak */
        store(&f->child, -1);
        if (ctx_batch_drain(f->batch, CTX_FOREVER, NULL) != CTX_CLOSED) _exit(2);
    } else {
        store(&f->child, (int)pid);
    }
    return 0;
}

TEST(the_child_of_a_flush_that_forks_flushes_nothing) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("the thread sanitizer knows no threads in children");
#endif
    forker_t f;
    ctx_batch_desc_t desc;
    int status = 0;
    memset(&f, 0, sizeof f);
    memset(&desc, 0, sizeof desc);
    gate_init(&f.gate);
    desc.item_size = sizeof(int);
    desc.max_items = 1;
    desc.flush = flush_forks;
    desc.user = &f;
    f.batch = ctx_batch_new(ctx_background(), &desc);
    CHECK(f.batch != NULL);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_batch_add(f.batch, &i), 0);
    gate_await(&f.gate, 1);
    gate_open(&f.gate);
    EXPECT_EQ(batch_close(f.batch, CTX_FOREVER), 0);
    EXPECT_EQ(load(&f.calls), 3);
    EXPECT_EQ(waitpid((pid_t)load(&f.child), &status, 0), (pid_t)load(&f.child));
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM);
    gate_destroy(&f.gate);
}

/* -- bad arguments ---------------------------------------------------------------------------------------------- */

static void expect_refused(ctx_t *lifetime, const ctx_batch_desc_t *desc, int err) {
    errno = 0;
    EXPECT(ctx_batch_new(lifetime, desc) == NULL);
    EXPECT_EQ(errno, err);
}

TEST(bad_arguments_make_no_batcher) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    expect_refused(NULL, &rig.desc, EINVAL);
    expect_refused(rig.lifetime, NULL, EINVAL);
    ctx_batch_desc_t desc = rig.desc;
    desc.item_size = 0;
    expect_refused(rig.lifetime, &desc, EINVAL);
    desc = rig.desc;
    desc.flush = NULL;
    expect_refused(rig.lifetime, &desc, EINVAL);
    desc = rig.desc;
    desc.max_delay = -1;
    expect_refused(rig.lifetime, &desc, EINVAL);
    desc = rig.desc;
    desc.retries = -1;
    expect_refused(rig.lifetime, &desc, EINVAL);
    rig_end(&rig);
}

TEST(sizes_past_all_memory_make_no_batcher) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    ctx_batch_desc_t desc = rig.desc;
    desc.item_size = SIZE_MAX / 2;
    EXPECT(ctx_batch_new(rig.lifetime, &desc) == NULL);
    desc = rig.desc;
    desc.max_items = SIZE_MAX / 4 + 2; /* four times that is small again */
    EXPECT(ctx_batch_new(rig.lifetime, &desc) == NULL);
    desc = rig.desc;
    desc.queue = SIZE_MAX;
    EXPECT(ctx_batch_new(rig.lifetime, &desc) == NULL);
    desc.queue = SIZE_MAX / sizeof(int) + 2;
    EXPECT(ctx_batch_new(rig.lifetime, &desc) == NULL);
    desc.item_size = 200; /* where rounding up to whole blocks passes SIZE_MAX */
    for (desc.max_items = 1; desc.max_items < 5; desc.max_items++)
        for (size_t less = 0; less < 5; less++) {
            desc.queue = SIZE_MAX - less;
            expect_refused(rig.lifetime, &desc, ENOMEM);
        }
    rig_end(&rig);
}

TEST(bad_arguments_add_nothing) {
    rig_t rig;
    rig_init(&rig, 3, 0, 0);
    rig_start(&rig);
    EXPECT_EQ(ctx_batch_add(NULL, &rig.added), CTX_INVALID);
    EXPECT_EQ(ctx_batch_add(rig.batch, NULL), CTX_INVALID);
    EXPECT_EQ(ctx_batch_add_wait(NULL, ctx_background(), &rig.added), CTX_INVALID);
    EXPECT_EQ(ctx_batch_add_wait(rig.batch, NULL, &rig.added), CTX_INVALID);
    EXPECT_EQ(ctx_batch_add_wait(rig.batch, ctx_background(), NULL), CTX_INVALID);
    EXPECT_EQ(ctx_batch_flush(NULL), CTX_INVALID);
    rig_flush_and_end(&rig);
    EXPECT_EQ(rig.flushed, 0);
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

/* Rounds in which eight threads add while something ends the batcher. Nobody may use it once the close has returned, so
   where the close races with the adders a last item, the sentinel, holds flush or on_drop until they have left. */
enum { ADDERS = 8, EACH = 60, SENTINEL = -1 };
typedef enum { JOIN_THEN_CLOSE, CLOSE, CLOSE_SOON, END_LIFETIME, WAYS } way_t;

typedef struct {
    int adder, place;
} entry_t;

typedef struct {
    ctx_batch_t *batch;
    way_t way;
    int tried;                        /* [atomic] adds */
    int adding;                       /* [atomic] adders not yet gone */
    unsigned char fate[ADDERS][EACH]; /* [atomic] how often it was flushed, dropped or refused */
    uint64_t seed;
    /* Written by flush and on_drop, which never run at the same time: without a lock, so that a race would show. */
    uint64_t flush_seed;
    int last[ADDERS];
    int flushed, dropped;
    int accepted; /* [atomic] */
} storm_t;

static void meet_fate(storm_t *s, int adder, int place) {
    __atomic_add_fetch(&s->fate[adder][place], 1, __ATOMIC_RELAXED);
}

static void hold_for_the_sentinel(storm_t *s, const entry_t *entries, size_t n) {
    for (size_t i = 0; i < n; i++)
        while (entries[i].adder == SENTINEL && load(&s->adding) > 0) sched_yield();
}

static int flushes_some(ctx_t *ctx, const void *items, size_t n, void *user) {
    storm_t *s = (storm_t *)user;
    const entry_t *entries = (const entry_t *)items;
    hold_for_the_sentinel(s, entries, n);
    int chance = race_below(&s->flush_seed, 16);
    if (chance == 0) ctx_wait(ctx, CTX_US(50));
    if (chance < 3) return -5;
    for (size_t i = 0; i < n; i++) {
        if (entries[i].adder == SENTINEL) continue;
        EXPECT(s->last[entries[i].adder] < entries[i].place);
        s->last[entries[i].adder] = entries[i].place;
        s->flushed++;
        meet_fate(s, entries[i].adder, entries[i].place);
    }
    return 0;
}

static void drops_some(const void *items, size_t n, int reason, void *user) {
    storm_t *s = (storm_t *)user;
    const entry_t *entries = (const entry_t *)items;
    EXPECT(reason == -5 || reason == CTX_CANCELED || reason == CTX_DEADLINE_EXCEEDED);
    hold_for_the_sentinel(s, entries, n);
    for (size_t i = 0; i < n; i++) {
        if (entries[i].adder == SENTINEL) continue;
        s->dropped++;
        meet_fate(s, entries[i].adder, entries[i].place);
    }
}

static int add_somehow(storm_t *s, const entry_t *entry, uint64_t *seed) {
    int way = race_below(seed, 8);
    if (way < 4) return ctx_batch_add(s->batch, entry);
    if (way < 7) return ctx_batch_add_wait(s->batch, ctx_background(), entry);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(race_below(seed, 60)));
    int rc = ctx_batch_add_wait(s->batch, ctx, entry);
    if (rc == CTX_DEADLINE_EXCEEDED) rc = CTX_QUEUE_FULL;
    ctx_end(ctx);
    return rc;
}

static void *adds_in_a_storm(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    storm_t *s = (storm_t *)side->shared;
    uint64_t seed = s->seed + (uint64_t)side->id;
    int rc = 0;
    for (int i = 0; i < EACH; i++) {
        entry_t entry = {side->id, i};
        if (rc == 0 || rc == CTX_QUEUE_FULL) rc = add_somehow(s, &entry, &seed);
        if (rc == 0)
            add(&s->accepted, 1);
        else
            meet_fate(s, side->id, i);
        if ((rc == 0 || rc == CTX_QUEUE_FULL) && race_below(&seed, 16) == 0) rc = ctx_batch_flush(s->batch);
        add(&s->tried, 1);
    }
    EXPECT(rc == 0 || rc == CTX_QUEUE_FULL || rc == CTX_CLOSED || rc == CTX_CANCELED);
    add(&s->adding, -1);
    return NULL;
}

typedef struct {
    storm_t *storm;
    ctx_t *lifetime;
    int after; /* adds */
} ender_t;

static void *ends_the_storm(void *arg) {
    ender_t *ender = (ender_t *)arg;
    storm_t *s = ender->storm;
    while (load(&s->tried) < ender->after) sched_yield();
    if (s->way == END_LIFETIME) ctx_cancel(ender->lifetime);
    if (s->way != CLOSE && s->way != CLOSE_SOON) return NULL;
    entry_t sentinel = {SENTINEL, 0};
    EXPECT_EQ(ctx_batch_add_wait(s->batch, ctx_background(), &sentinel), 0);
    int rc = batch_close(s->batch, s->way == CLOSE ? CTX_FOREVER : CTX_US(s->seed % 300));
    EXPECT(rc == 0 || (rc == CTX_DEADLINE_EXCEEDED && s->way == CLOSE_SOON));
    return NULL;
}

static void one_storm(int number, ctx_pool_t *pool) {
    static storm_t storm;
    memset(&storm, 0, sizeof storm);
    uint64_t seed = (uint64_t)number * 977;
    storm.way = (way_t)(number % WAYS);
    storm.seed = race_random(&seed);
    storm.adding = ADDERS;
    for (int i = 0; i < ADDERS; i++) storm.last[i] = -1;
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_batch_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof(entry_t);
    desc.max_items = (size_t)(1 + race_below(&seed, 20));
    desc.queue = desc.max_items + (size_t)race_below(&seed, 30);
    desc.max_delay = number / 4 % 2 ? CTX_US(20) : 0;
    desc.retries = number / 8 % 2;
    desc.flush = flushes_some;
    desc.on_drop = drops_some;
    desc.user = &storm;
    desc.pool = number / 16 % 2 ? pool : NULL;
    desc.grace = PATIENCE_NS; /* no flush here is stuck, however slow the machine */
    storm.batch = ctx_batch_new(lifetime, &desc);
    if (!storm.batch) abort();
    ender_t ender = {&storm, lifetime, race_below(&seed, ADDERS * EACH)};
    pthread_t ending = thread_start(ends_the_storm, &ender);
    race_run(ADDERS, adds_in_a_storm, &storm);
    thread_join(ending);
    if (storm.way == JOIN_THEN_CLOSE || storm.way == END_LIFETIME) EXPECT_EQ(batch_close(storm.batch, CTX_FOREVER), 0);
    EXPECT_EQ(storm.flushed + storm.dropped, storm.accepted);
    for (int i = 0; i < ADDERS; i++)
        for (int k = 0; k < EACH; k++) EXPECT_EQ(storm.fate[i][k], 1);
    ctx_end(lifetime);
}

TEST(in_a_storm_every_item_reaches_exactly_one_of_flush_and_on_drop) {
    ctx_pool_t *pool = pool_of(2, 4);
    for (int number = 0, n = TEST_QUICK ? 64 : 640; number < n; number++) one_storm(number, pool);
    pool_end(pool);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
