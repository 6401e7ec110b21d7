/* Section 12, the batcher without memory, without threads: what was added still reaches one of flush and on_drop.
   And retries whose attempts get no context. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

/* -- what the tests share --------------------------------------------------------------------------------------- */

enum { ITEMS = 200 };
typedef struct {
    ctx_batch_desc_t desc;
    ctx_t *lifetime;
    ctx_batch_t *batch;
    int added;
    int fails;            /* [atomic] so many calls of flush fail */
    int flushed, dropped; /* [atomic] */
    int fate[ITEMS];      /* [atomic] how often it was flushed or dropped */
} rig_t;

static void meet_fate(rig_t *rig, const void *items, size_t n) {
    for (size_t i = 0; i < n; i++) add(&rig->fate[((const int *)items)[i]], 1);
}

static int flushes(ctx_t *ctx, const void *items, size_t n, void *user) {
    rig_t *rig = (rig_t *)user;
    (void)ctx;
    if (add(&rig->fails, -1) >= 0) return -5;
    meet_fate(rig, items, n);
    add(&rig->flushed, (int)n);
    return 0;
}

static void drops(const void *items, size_t n, int reason, void *user) {
    rig_t *rig = (rig_t *)user;
    EXPECT(reason < 0);
    meet_fate(rig, items, n);
    add(&rig->dropped, (int)n);
}

static void rig_init(rig_t *rig, size_t max_items, ctx_dur_t max_delay) {
    memset(rig, 0, sizeof *rig);
    rig->lifetime = ctx_with_cancel(ctx_background());
    rig->desc.item_size = sizeof(int);
    rig->desc.max_items = max_items;
    rig->desc.max_delay = max_delay;
    rig->desc.queue = ITEMS;
    rig->desc.flush = flushes;
    rig->desc.on_drop = drops;
    rig->desc.user = rig;
}

static bool rig_start(rig_t *rig) {
    rig->batch = ctx_batch_new(rig->lifetime, &rig->desc);
    return rig->batch != NULL;
}

/* Add n items, those that are refused for want of memory or threads left out. */
static void put(rig_t *rig, int n) {
    for (int i = 0; i < n; i++) {
        int rc = ctx_batch_add(rig->batch, &rig->added);
        EXPECT(rc <= 0);
        EXPECT(rc != CTX_INVALID && rc != CTX_CLOSED);
        if (rc == 0) rig->added++;
    }
}

static void rig_end(rig_t *rig) {
    for (int i = 0; i < rig->added; i++) EXPECT_EQ(load(&rig->fate[i]), 1);
    for (int i = rig->added; i < ITEMS; i++) EXPECT_EQ(load(&rig->fate[i]), 0);
    ctx_end(rig->lifetime);
}

/* Close with all the time there is. */
static void rig_close_and_end(rig_t *rig) {
    EXPECT_EQ(batch_close(rig->batch, CTX_FOREVER), 0);
    rig_end(rig);
}

/* The threads that a test before has left idle are no test of there being none. */
static void without_any_thread(void) { ctx_runtime_stop(); }

/* -- memory ----------------------------------------------------------------------------------------------------- */

TEST(a_batcher_that_cannot_be_had_is_null_and_leaks_nothing) {
    ctx_runtime_stop();
    long live = fault_live();
    for (long n = 0;; n++) {
        rig_t rig;
        rig_init(&rig, 3, CTX_S(3600));
        errno = 0;
        fault_after(n);
        bool made = rig_start(&rig);
        int err = errno;
        bool failed = fault_off();
        if (!failed) EXPECT(made);
        if (!made) EXPECT_EQ(err, ENOMEM);
        if (made) EXPECT_EQ(batch_close(rig.batch, 0), 0);
        ctx_end(rig.lifetime);
        if (!failed) break;
    }
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), live);
}

/* Memory fails at each allocation in turn, once or from then on, while items are added and flushed. */
static void expect_nothing_lost_without_memory(long n, bool all, ctx_dur_t max_delay, ctx_pool_t *pool) {
    rig_t rig;
    without_any_thread();
    rig_init(&rig, 3, max_delay);
    rig.desc.pool = pool;
    rig.fails = 1;
    if (!rig_start(&rig)) abort();
    if (all)
        fault_all_after(n);
    else
        fault_after(n);
    put(&rig, 10);
    ctx_batch_flush(rig.batch);
    put(&rig, 10);
    rig_close_and_end(&rig);
    fault_off();
}

TEST(without_memory_every_added_item_is_flushed_or_dropped) {
    for (int all = 0; all < 2; all++)
        for (long n = 0; n < 8; n++) {
            expect_nothing_lost_without_memory(n, all, 0, NULL);
            expect_nothing_lost_without_memory(n, all, CTX_MS(1), NULL);
        }
}

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

TEST(without_memory_on_a_pool_every_added_item_is_flushed_or_dropped) {
    for (int all = 0; all < 2; all++)
        for (long n = 0; n < 6; n++) {
            ctx_pool_t *pool = pool_of(1, 4);
            expect_nothing_lost_without_memory(n, all, CTX_MS(1), pool);
            pool_end(pool);
        }
}

TEST(without_memory_the_end_of_the_lifetime_drops_every_item) {
    for (int delay = 0; delay < 2; delay++) {
        rig_t rig;
        without_any_thread();
        rig_init(&rig, 100, delay ? CTX_S(3600) : 0);
        CHECK(rig_start(&rig));
        put(&rig, 7);
        fault_all_after(0);
        ctx_cancel(rig.lifetime);
        rig_close_and_end(&rig);
        fault_off();
        EXPECT_EQ(rig.dropped, rig.added);
    }
}

/* -- threads ---------------------------------------------------------------------------------------------------- */

static void expect_nothing_lost_without_threads(long n, bool all, ctx_dur_t max_delay, ctx_dur_t budget) {
    rig_t rig;
    without_any_thread();
    rig_init(&rig, 3, max_delay);
    if (!rig_start(&rig)) abort();
    if (all)
        fault_threads_all_after(n);
    else
        fault_threads_after(n);
    put(&rig, 10);
    ctx_batch_flush(rig.batch);
    put(&rig, 10);
    int rc = batch_close(rig.batch, budget);
    fault_threads_off();
    EXPECT(rc == 0 || (rc == CTX_DEADLINE_EXCEEDED && budget < CTX_FOREVER));
    rig_end(&rig);
}

TEST(without_threads_every_added_item_is_flushed_or_dropped) {
    for (int all = 0; all < 2; all++)
        for (long n = 0; n < 4; n++)
            for (int delay = 0; delay < 2; delay++) {
                expect_nothing_lost_without_threads(n, all, delay ? CTX_MS(1) : 0, CTX_FOREVER);
                expect_nothing_lost_without_threads(n, all, delay ? CTX_MS(1) : 0, CTX_MS(20));
                expect_nothing_lost_without_threads(n, all, delay ? CTX_MS(1) : 0, 0);
            }
}

TEST(without_threads_the_end_of_the_lifetime_drops_every_item) {
    rig_t rig;
    without_any_thread();
    rig_init(&rig, 100, 0);
    CHECK(rig_start(&rig));
    put(&rig, 7);
    fault_threads_all_after(0);
    ctx_cancel(rig.lifetime);
    rig_close_and_end(&rig);
    fault_threads_off();
    EXPECT_EQ(rig.dropped, 7);
}

TEST(a_batcher_recovers_when_threads_can_be_had_again) {
    for (int on_pool = 0; on_pool < 2; on_pool++) {
        rig_t rig;
        without_any_thread();
        ctx_pool_t *pool = on_pool ? pool_of(1, 4) : NULL;
        rig_init(&rig, 3, 0);
        rig.desc.pool = pool;
        CHECK(rig_start(&rig));
        fault_threads_all_after(0);
        put(&rig, 4);
        fault_threads_off();
        int before = rig.added;
        put(&rig, 3);
        EXPECT_EQ(rig.added, before + 3);
        EXPECT_EQ(ctx_batch_flush(rig.batch), 0);
        UNTIL(load(&rig.flushed) + load(&rig.dropped) == rig.added);
        rig_close_and_end(&rig);
        if (pool) pool_end(pool);
    }
}

/* The timer thread is there, and tries again: nobody has to add for it. */
TEST(a_flush_that_found_no_thread_comes_when_there_is_one) {
    rig_t rig;
    without_any_thread();
    ctx_t *timer = ctx_with_timeout(ctx_background(), CTX_S(3600));
    rig_init(&rig, 3, 0);
    CHECK(rig_start(&rig));
    fault_threads_all_after(0);
    put(&rig, 3);
    EXPECT_EQ(load(&rig.flushed), 0);
    fault_threads_off();
    UNTIL(load(&rig.flushed) == 3);
    rig_close_and_end(&rig);
    ctx_end(timer);
}

TEST(an_item_is_not_added_when_nothing_can_watch_its_delay) {
    rig_t rig;
    without_any_thread();
    rig_init(&rig, 100, CTX_MS(1));
    CHECK(rig_start(&rig));
    fault_threads_all_after(0);
    put(&rig, 1);
    fault_threads_off();
    UNTIL(load(&rig.flushed) == rig.added);
    put(&rig, 1);
    UNTIL(load(&rig.flushed) == rig.added);
    EXPECT(rig.added > 0);
    rig_close_and_end(&rig);
}

TEST(on_a_pool_without_threads_every_added_item_is_flushed_or_dropped) {
    for (int close_without = 0; close_without < 2; close_without++) {
        rig_t rig;
        without_any_thread();
        ctx_pool_t *pool = pool_of(1, 4);
        rig_init(&rig, 3, 0);
        rig.desc.pool = pool;
        CHECK(rig_start(&rig));
        fault_threads_all_after(0);
        put(&rig, 10);
        if (!close_without) fault_threads_off();
        rig_close_and_end(&rig);
        fault_threads_off();
        pool_end(pool);
    }
}

static int obeys(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)items, (void)n, (void)user;
    return ctx_wait(ctx, CTX_FOREVER);
}

/* flush runs in the drain, and nobody else could cancel it. */
TEST(without_threads_a_drain_keeps_to_its_budget) {
    for (int on_pool = 0; on_pool < 2; on_pool++) {
        rig_t rig;
        without_any_thread();
        ctx_pool_t *pool = on_pool ? pool_of(1, 4) : NULL;
        rig_init(&rig, 2, 0);
        rig.desc.flush = obeys;
        rig.desc.pool = pool;
        CHECK(rig_start(&rig));
        fault_threads_all_after(0);
        put(&rig, 5);
        EXPECT_EQ(ctx_batch_drain(rig.batch, CTX_MS(20), NULL), CTX_DEADLINE_EXCEEDED);
        fault_threads_off();
        EXPECT_EQ(load(&rig.dropped), 5);
        rig_close_and_end(&rig);
        if (pool) pool_end(pool);
    }
}

/* -- retries ---------------------------------------------------------------------------------------------------- */

static int succeeds(ctx_t *ctx, void *calls) {
    EXPECT_EQ(ctx_err(ctx), 0);
    add((int *)calls, 1);
    return 0;
}

/* The first attempt gets no context; from the second on there is memory. */
static int ends_the_shortage(int attempt, int rc, ctx_dur_t *wait, void *calls) {
    fault_off();
    EXPECT_EQ(attempt, 1);
    EXPECT_EQ(rc, CTX_NO_MEMORY);
    EXPECT_EQ(load((int *)calls), 0); /* it was not called with a context that has failed */
    *wait = 0;
    return 0;
}

TEST(an_attempt_without_memory_for_its_context_has_failed) {
    ctx_retry_desc_t desc;
    int calls = 0;
    memset(&desc, 0, sizeof desc);
    desc.attempt_timeout = CTX_S(3600);
    desc.on_retry = ends_the_shortage;
    ctx_runtime_stop(); /* empties the caches */
    fault_all_after(0);
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, succeeds, &calls), 0);
    EXPECT_EQ(calls, 1);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST_MAIN
