/* The batcher: what is ready is flushed, each item reaches one of flush and on_drop, drains wait for what they must and
   never for themselves, and after a free nobody touches the pool. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
/* Runners know their threads by pthread_self(), which is a number to the explorer, and the library detaches some. The
   check joins them. */
static pthread_t note_thread(void);
static void note_detached(pthread_t thread);
#define pthread_self() note_thread()
#define pthread_detach(thread) note_detached(thread)
#include "sched.h"

static uint32_t noted[SCHED_THREADS]; /* [atomic] by thread */

static void note_detached(pthread_t thread) { CTX__STORE(&noted[thread], 1u, RELEASE); }
static pthread_t note_thread(void) {
    note_detached((pthread_t)sched_thread());
    return (pthread_t)sched_thread();
}
static bool runners_idle(void) {
    bool idle;
    ctx__enter(&ctx__runners.mu);
    idle = ctx__runners.threads == ctx__runners.idlers;
    ctx__leave(&ctx__runners.mu);
    return idle;
}
static void stop_library(void) {
    int i;
    while (!runners_idle()) ctx__sched_relax();
    ctx_runtime_stop();
    for (i = 0; i < SCHED_THREADS; i++)
        if (CTX__LOAD(&noted[i], ACQUIRE)) ctx__sched_join((pthread_t)i);
}

enum { ITEMS = 4 };
static ctx_batch_t *batch;
static ctx_pool_t *pool;
static ctx_t *lifetime, *pool_lifetime, *settled;
static uint32_t tried;         /* [atomic] adds */
static uint32_t seen;          /* [atomic] items that flush or on_drop had */
static uint32_t expected;      /* [atomic] so many items seen end `settled` */
static uint32_t inside;        /* [atomic] calls of flush that do not drain and are not stuck */
static uint32_t freed;         /* [atomic] */
static bool taken[ITEMS];      /* added; the rest is written in turns, without a lock, so that a race would show */
static int flushed[ITEMS], drops[ITEMS]; /* how often each was */
static int fails;              /* so many flushes fail */
static int drains;             /* so many flushes drain */
static int drops_drain;        /* so many calls of on_drop drain and free */
static bool sticks;            /* the next flush is stuck */
static sched_flag_t stuck, unstick, added;

static void see(int *fate, const void *items, size_t n) {
    uint32_t all;
    size_t i;
    for (i = 0; i < n; i++) fate[((const int *)items)[i]]++;
    all = CTX__ADD(&seen, (uint32_t)n, ACQ_REL) + (uint32_t)n;
    if (settled && all == CTX__LOAD(&expected, ACQUIRE)) ctx_cancel(settled);
}

static int flush(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)ctx, (void)user;
    if (sticks) {
        sticks = false;
        sched_set(&stuck);
        sched_await(&unstick);
        see(flushed, items, n);
        return 0;
    }
    SCHED_CHECK(CTX__ADD(&inside, 1u, RELAXED) == 0);
    if (drains > 0) {
        drains--;
        CTX__SUB(&inside, 1u, RELAXED);
        SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, NULL) == 0);
    } else {
        CTX__SUB(&inside, 1u, RELAXED);
    }
    if (fails > 0) {
        fails--;
        return -5;
    }
    see(flushed, items, n);
    return 0;
}

static void on_drop(const void *items, size_t n, int reason, void *user) {
    (void)user;
    SCHED_CHECK(reason < 0);
    if (drops_drain > 0) {
        drops_drain--;
        sched_await(&added); /* nobody adds to a batcher that is freed */
        SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, NULL) == 0);
        ctx_batch_free(batch);
        CTX__STORE(&freed, 1u, RELEASE);
    }
    see(drops, items, n);
}

static void setup_of(size_t max_items, size_t queue, ctx_dur_t max_delay) {
    ctx_batch_desc_t desc = { 0 };
    lifetime = ctx_with_cancel(ctx_background());
    desc.item_size = sizeof(int);
    desc.max_items = max_items;
    desc.queue = queue;
    desc.max_delay = max_delay;
    desc.flush = flush;
    desc.on_drop = on_drop;
    desc.pool = pool;
    desc.grace = -1;
    batch = ctx_batch_new(lifetime, &desc);
    SCHED_CHECK(batch != NULL);
}
static void setup_settled(int items) {
    CTX__STORE(&expected, (uint32_t)items, RELAXED);
    settled = ctx_with_cancel(ctx_background());
}
static void setup_pool(void) {
    ctx_pool_desc_t desc = { 0 };
    desc.workers = 1;
    desc.queue = 2;
    pool_lifetime = ctx_with_cancel(ctx_background());
    pool = ctx_pool_new(pool_lifetime, &desc);
    SCHED_CHECK(pool != NULL);
}

static void check_fates(void) {
    int i;
    if (!CTX__LOAD(&freed, ACQUIRE)) {
        SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, NULL) == 0);
        ctx_batch_free(batch);
    }
    if (pool) ctx_pool_free(pool);
    stop_library();
    for (i = 0; i < ITEMS; i++) SCHED_CHECK(flushed[i] + drops[i] == taken[i]);
    SCHED_CHECK(inside == 0);
    ctx_end(lifetime);
    if (pool_lifetime) ctx_end(pool_lifetime);
    if (settled) ctx_end(settled);
}

static int add_one(void) {
    int item = (int)CTX__ADD(&tried, 1u, RELAXED), rc = ctx_batch_add(batch, &item);
    taken[item] = rc == 0;
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
    return rc;
}
static int add_one_wait(ctx_t *ctx) {
    int item = (int)CTX__ADD(&tried, 1u, RELAXED), rc = ctx_batch_add_wait(batch, ctx, &item);
    taken[item] = rc == 0;
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
    return rc;
}
static void add_any(void) { (void)add_one(); }
static void until_settled(void) { SCHED_CHECK(ctx_wait(settled, CTX_FOREVER) == CTX_CANCELED); }
static void nothing(void) {}

/* -- turns -- */

/* Two threads make something ready, while the turn of the first may just end. */
static void setup_turns(void) {
    setup_of(1, 4, 0);
    setup_settled(2);
}
static void add(void) { SCHED_CHECK(add_one() != CTX_CLOSED); }
static void add_settled(void) {
    add();
    until_settled();
}

/* A request for part of a block. */
static void setup_part(void) {
    setup_of(4, 4, 0);
    setup_settled(1);
}
static void add_request(void) {
    add();
    SCHED_CHECK(ctx_batch_flush(batch) == 0);
    until_settled();
}
static void request(void) { SCHED_CHECK(ctx_batch_flush(batch) == 0); }

/* -- ticks -- */

static void setup_tick(void) {
    ctx_clock_fake(CTX_S(1));
    setup_of(3, 4, CTX_MS(10));
    add();
}
static void setup_tick_settled(void) {
    setup_tick();
    setup_settled(1);
}
static void advance(void) { ctx_clock_advance(CTX_MS(10)); }
static void advance_settled(void) {
    advance();
    until_settled();
}
static void drain(void) { SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, NULL) == 0); }

/* The first item has gone when the timer of its delay comes: the next has its own. */
static void setup_tick_later(void) {
    ctx_clock_fake(CTX_S(1));
    setup_of(2, 4, CTX_MS(10));
    add();
    setup_settled(3);
}
static void add_two(void) {
    add();
    add();
}
static void advance_late(void) {
    advance();
    while (!sched_is_set(&stuck)) {
        ctx_clock_advance(CTX_MS(10));
        ctx__sched_relax();
    }
}
static void two_settled(void) {
    add_two();
    until_settled();
    sched_set(&stuck);
}

/* -- drains -- */

static void setup_plain(void) { setup_of(1, 4, 0); }
static void drain_all(void) {
    ctx_batch_report_t report;
    SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, &report) == 0);
    SCHED_CHECK(inside == 0 && report.stuck == 0 && report.flushed == seen);
}
static void drain_free(void) {
    drain();
    ctx_batch_free(batch);
    CTX__STORE(&freed, 1u, RELEASE);
}
static void drain_now(void) {
    int rc = ctx_batch_drain(batch, 0, NULL);
    SCHED_CHECK(rc == 0 || rc == CTX_DEADLINE_EXCEEDED);
}
static void drain_any(void) { SCHED_CHECK(ctx_batch_drain(batch, CTX_FOREVER, NULL) == 0); }

/* One that waits for room, while the batcher is drained and freed. */
static sched_flag_t adder_left;
static void setup_room(void) {
    setup_of(1, 1, 0);
    sticks = true;
    add();
}
static void add_wait(void) {
    sched_await(&stuck);
    add();
    (void)add_one_wait(ctx_background());
    sched_set(&adder_left);
}
static bool adder_waits(void) {
    bool waits;
    ctx__lock(&batch->mu);
    waits = batch->at_room.first != NULL;
    ctx__unlock(&batch->mu);
    return waits;
}
static void drain_waiter(void) {
    while (!adder_waits() && !sched_is_set(&unstick)) ctx__sched_relax();
    drain();
}
static void drain_free_waiter(void) {
    while (!adder_waits() && !sched_is_set(&adder_left)) ctx__sched_relax();
    sched_set(&unstick);
    drain_now();
    ctx_batch_free(batch);
    CTX__STORE(&freed, 1u, RELEASE);
}
static void add_wait_goes_on(void) {
    sched_await(&stuck);
    add();
    SCHED_CHECK(add_one_wait(ctx_background()) == 0);
}
static void add_wait_for_ever(void) {
    sched_await(&stuck);
    add();
    (void)add_one_wait(ctx_background());
    sched_set(&unstick);
}
static void unstick_it(void) { sched_set(&unstick); }

/* A flush that is stuck until the batcher is freed: the rest is dropped, its own items are its own. */
static void setup_stuck(void) {
    setup_of(1, 4, 0);
    sticks = true;
    add();
}
static void add_behind_drain_free(void) {
    ctx_batch_report_t report;
    sched_await(&stuck);
    add();
    SCHED_CHECK(ctx_batch_drain(batch, 0, &report) == CTX_DEADLINE_EXCEEDED);
    SCHED_CHECK(report.stuck == 1 && report.dropped == 1 && drops[1] == 1 && !flushed[1]);
    ctx_batch_free(batch);
    CTX__STORE(&freed, 1u, RELEASE);
    sched_set(&unstick);
}

/* -- drains from inside -- */

static void setup_on_drop(void) {
    setup_of(1, 4, 0);
    fails = drops_drain = 1;
}
static void setup_in_flush(void) {
    setup_of(1, 4, 0);
    drains = 1;
}
/* Both calls drain: neither waits for the other. */
static void setup_in_flushes(void) {
    setup_of(1, 4, 0);
    drains = 2;
}
static void add_two_settled(void) {
    uint32_t n = 0;
    n += add_one() == 0;
    n += add_one() == 0;
    CTX__STORE(&expected, n, RELEASE);
    sched_set(&added);
    if (CTX__LOAD(&seen, ACQUIRE) < n) until_settled();
}
static void setup_on_drop_settled(void) {
    setup_on_drop();
    settled = ctx_with_cancel(ctx_background());
    CTX__STORE(&expected, 99u, RELAXED);
}
static void setup_in_flush_settled(void) {
    setup_in_flush();
    settled = ctx_with_cancel(ctx_background());
    CTX__STORE(&expected, 99u, RELAXED);
}
static void setup_in_flushes_settled(void) {
    setup_in_flushes();
    settled = ctx_with_cancel(ctx_background());
    CTX__STORE(&expected, 99u, RELAXED);
}

/* -- the lifetime -- */

static void setup_life(void) {
    setup_of(2, 4, 0);
    setup_settled(99);
}
static void setup_life_part_settled(void) {
    setup_of(3, 4, 0);
    add();
    add();
    setup_settled(2);
}
static void end_life_stuck(void) {
    sched_await(&stuck);
    ctx_cancel(lifetime);
}
static void setup_life_part(void) {
    setup_of(3, 4, 0);
    add();
    add();
}
static void end_life(void) { ctx_cancel(lifetime); }

/* -- no thread -- */

/* No block as large as a runner can be had. */
static void setup_no_thread(void) {
    setup_of(1, 4, 0);
    ctx_clock_fake(CTX_S(1)); /* and no runtime thread is needed */
    sched_malloc_most = sizeof(ctx__runner_t) - 1;
}

/* -- pools -- */

static void setup_on_pool(void) {
    setup_pool();
    setup_of(1, 4, 0);
    setup_settled(2);
}
static void setup_on_pool_1(void) {
    setup_pool();
    setup_of(1, 4, 0);
    setup_settled(1);
}
static void end_pool(void) { ctx_cancel(pool_lifetime); }
static void drain_pool(void) { (void)ctx_pool_drain(pool, 0, NULL); }

/* The tick asks the pool, which is freed right after the batcher. */
static void setup_pool_tick(void) {
    setup_pool();
    setup_tick();
}
static void drain_free_pool(void) {
    drain_now();
    ctx_batch_free(batch);
    CTX__STORE(&freed, 1u, RELEASE);
    ctx__lock(&pool->ring.in);
    SCHED_CHECK(!pool->agenda.first);
    ctx__unlock(&pool->ring.in);
    ctx_pool_free(pool);
    pool = NULL;
}

/* The only worker drains, or waits for room. */
static int drains_task(ctx_t *ctx, void *arg) {
    (void)ctx, (void)arg;
    drain();
    return 0;
}
static int waits_task(ctx_t *ctx, void *arg) {
    (void)arg;
    SCHED_CHECK(add_one_wait(ctx) == 0);
    SCHED_CHECK(add_one_wait(ctx) == 0);
    return 0;
}
static void setup_own_worker(void) {
    setup_pool();
    setup_of(1, 1, 0);
}
static void submit_drain(void) {
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "drains", drains_task, NULL) == 0);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
}
static void submit_wait(void) {
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "waits", waits_task, NULL) == 0);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
}
/* The worker works at a turn that the drain of the pool waits for. */
static void drain_pool_gently(void) { SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0); }

static const sched_scenario_t scenarios[] = {
    { "batch: add / add, turn ends", setup_turns, { T(add_settled), T(add) }, check_fates, false },
    { "batch: add, request / request", setup_part, { T(add_request), T(request) }, check_fates, false },
    { "batch: tick", setup_tick_settled, { T(advance_settled), T(nothing) }, check_fates, false },
    { "batch: tick / add / drain", setup_tick, { T(advance), T(add_any), T(drain) }, check_fates, false },
    { "batch: tick / drain, free", setup_tick, { T(advance), T(drain_free) }, check_fates, false },
    { "batch: tick for items already flushed", setup_tick_later,
      { T(two_settled), T(advance_late) }, check_fates, false },
    { "batch: add / drain", setup_plain, { T(add_any), T(drain_all) }, check_fates, false },
    { "batch: add / two drains", setup_plain, { T(add_any), T(drain), T(drain) }, check_fates, false },
    { "batch: add / drain, one with no budget", setup_plain,
      { T(add_any), T(drain_any), T(drain_now) }, check_fates, false },
    { "batch: add_wait / drain, free", setup_room, { T(add_wait), T(drain_free_waiter) }, check_fates, false },
    { "batch: add_wait / drain", setup_room, { T(add_wait_for_ever), T(drain_waiter) }, check_fates, false },
    { "batch: add_wait / room", setup_room, { T(add_wait_goes_on), T(unstick_it) }, check_fates, false },
    { "batch: stuck flush / drain, free", setup_stuck, { T(add_behind_drain_free), T(nothing) }, check_fates, false },
    { "batch: drain and free from on_drop", setup_on_drop_settled,
      { T(add_two_settled), T(nothing) }, check_fates, false },
    { "batch: drain from flush", setup_in_flush_settled, { T(add_two_settled), T(nothing) }, check_fates, false },
    { "batch: drain from flush / drain", setup_in_flush, { T(add_any), T(drain) }, check_fates, false },
    { "batch: drain from two flushes", setup_in_flushes_settled,
      { T(add_two_settled), T(nothing) }, check_fates, false },
    { "batch: lifetime ends / add, flush", setup_life, { T(add_two_settled), T(end_life) }, check_fates, false },
    { "batch: lifetime ends, part of a block", setup_life_part_settled,
      { T(end_life), T(until_settled) }, check_fates, false },
    { "batch: lifetime ends / drain", setup_life_part, { T(end_life), T(drain) }, check_fates, false },
    { "batch: lifetime ends / add_wait", setup_room,
      { T(end_life_stuck), T(add_wait_for_ever) }, check_fates, false },
    { "batch: no thread / drain", setup_no_thread, { T(add_any), T(drain) }, check_fates, false },
    { "batch: pool, add / add", setup_on_pool, { T(add_settled), T(add) }, check_fates, false },
    { "batch: pool lost / add", setup_on_pool_1, { T(add_settled), T(end_pool) }, check_fates, false },
    { "batch: pool drained / add", setup_on_pool_1, { T(add_settled), T(drain_pool) }, check_fates, false },
    { "batch: pool drained gently / add", setup_on_pool_1,
      { T(add_settled), T(drain_pool_gently) }, check_fates, false },
    { "batch: pool, tick / drain, free, free pool", setup_pool_tick,
      { T(advance), T(drain_free_pool) }, check_fates, false },
    { "batch: pool, drain by its worker / add", setup_own_worker,
      { T(submit_drain), T(add_any) }, check_fates, false },
    { "batch: pool, add_wait by its worker", setup_own_worker, { T(submit_wait), T(nothing) }, check_fates, false },
};
SCHED_MAIN(scenarios)
