/* A semaphore at each step of the threads that use it (ctx__sched_step): one whose context is done takes nothing, one
   that has the last permit may free it, and no permit is lost. */
#define CTXCANCEL_TEST_SCHED
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "steps.h"

typedef struct {
    ctx_sem_t *sem;
    ctx_t *ctx, *next_ctx;
    int64_t n;
    int rc, next_rc;
    int place, first_place, next_place; /* [atomic] order of those who got in */
    bool by_deadline, in_use;
} permits_t;

static bool all_free(ctx_sem_t *sem, int64_t n) {
    if (!ctx_sem_try_acquire(sem, n)) return false;
    ctx_sem_release(sem, n);
    return true;
}

/* -- freed by whoever has the last permit -------------------------------------------------------------------------- */

static void releases_one(void *shared) { ctx_sem_release(((permits_t *)shared)->sem, 1); }

/* No step may touch what is gone; where freed memory is watched it really goes. */
static void take_apart(permits_t *permits) {
    ctx_sem_destroy(permits->sem);
    memset(permits->sem, 0, sizeof *permits->sem);
    steps_forbid(permits->sem, sizeof *permits->sem);
#ifdef TEST_SANITIZED
    free(permits->sem);
    permits->sem = NULL;
#endif
}

static void acquires_and_frees(void *shared) {
    permits_t *permits = (permits_t *)shared;
    permits->rc = ctx_sem_acquire(permits->sem, permits->ctx, 1);
    if (permits->rc == 0) take_apart(permits);
}

static void tries_and_frees(void *shared) {
    permits_t *permits = (permits_t *)shared;
    while (!ctx_sem_try_acquire(permits->sem, 1)) steps_yield();
    take_apart(permits);
}

/* Side 1, which gives the permit back, stops at each step; `stop` 0: the one that takes it. */
static void check_freeing(steps_fn taker, int stop) {
    const steps_fn sides[] = {taker, releases_one};
    int bad = 0;
    bool more = true;
    for (int at = 0; more; at += steps_stride()) {
        permits_t permits;
        memset(&permits, 0, sizeof permits);
        permits.sem = (ctx_sem_t *)malloc(sizeof *permits.sem);
        CHECK(permits.sem != NULL);
        ctx_sem_init(permits.sem, 1);
        EXPECT(ctx_sem_try_acquire(permits.sem, 1));
        permits.ctx = ctx_with_cancel(ctx_background());
        more = steps_run(sides, 2, stop, &permits, at);
        EXPECT_EQ(permits.rc, 0);
        bad += steps_trespasses() > 0;
        free(permits.sem);
        ctx_end(permits.ctx);
    }
    EXPECT_EQ(bad, 0);
}

TEST(a_waiter_that_got_the_last_permit_may_free_the_semaphore_at_any_step_of_the_release) {
    check_freeing(acquires_and_frees, 1);
    check_freeing(acquires_and_frees, 0);
}

TEST(a_try_acquire_that_got_the_last_permit_may_free_the_semaphore_at_any_step_of_the_release) {
    check_freeing(tries_and_frees, 1);
    check_freeing(tries_and_frees, 0);
}

/* -- done before the permits came ---------------------------------------------------------------------------------- */

static void acquires(void *shared) {
    permits_t *permits = (permits_t *)shared;
    permits->rc = ctx_sem_acquire(permits->sem, permits->ctx, permits->n);
}

static void ends_it_then_releases(void *shared) {
    permits_t *permits = (permits_t *)shared;
    if (permits->by_deadline)
        ctx_clock_advance(CTX_S(1));
    else
        ctx_cancel(permits->ctx);
    ctx_sem_release(permits->sem, 1);
}

static void releases_then_ends_it(void *shared) {
    permits_t *permits = (permits_t *)shared;
    ctx_sem_release(permits->sem, 1);
    if (permits->by_deadline)
        ctx_clock_advance(CTX_S(1));
    else
        ctx_cancel(permits->ctx);
}

static void check_done(steps_fn other, int stop, bool by_deadline, bool strict) {
    const steps_fn sides[] = {acquires, other};
    int took = 0;
    bool more = true;
    if (by_deadline) ctx_clock_fake(CTX_S(100));
    for (int at = 0; more; at += steps_stride()) {
        permits_t permits;
        ctx_sem_t sem;
        memset(&permits, 0, sizeof permits);
        ctx_sem_init(&sem, 3);
        EXPECT(ctx_sem_try_acquire(&sem, 2));
        permits.sem = &sem;
        permits.n = 2;
        permits.by_deadline = by_deadline;
        permits.ctx = by_deadline ? ctx_with_timeout(ctx_background(), CTX_MS(1)) : ctx_with_cancel(ctx_background());
        more = steps_run(sides, 2, stop, &permits, at);
        took += permits.rc == 0;
        if (permits.rc != 0)
            EXPECT_EQ(permits.rc, by_deadline ? CTX_DEADLINE_EXCEEDED : CTX_CANCELED);
        else
            ctx_sem_release(&sem, 2);
        ctx_sem_release(&sem, 1);
        EXPECT(all_free(&sem, 3)); /* whoever won, no permit is lost */
        ctx_end(permits.ctx);
        ctx_sem_destroy(&sem);
    }
    if (strict)
        EXPECT_EQ(took, 0);
    else
        EXPECT(took > 0);
    if (by_deadline) ctx_clock_real();
}

TEST(an_acquire_whose_context_was_canceled_before_its_permits_came_takes_none) {
    check_done(ends_it_then_releases, 0, false, true);
    check_done(ends_it_then_releases, 1, false, true);
}

TEST(an_acquire_whose_deadline_passed_before_its_permits_came_takes_none) {
    check_done(ends_it_then_releases, 0, true, true);
    check_done(ends_it_then_releases, 1, true, true);
}

TEST(an_acquire_whose_permits_came_first_may_keep_them) {
    check_done(releases_then_ends_it, 0, false, false);
    check_done(releases_then_ends_it, 1, true, false);
}

/* -- who gives up stands in nobody's way --------------------------------------------------------------------------- */

static void acquires_next(void *shared) {
    permits_t *permits = (permits_t *)shared;
    permits->next_rc = ctx_sem_acquire(permits->sem, permits->next_ctx, 1);
}

static void cancels_the_first(void *shared) { ctx_cancel(((permits_t *)shared)->ctx); }

TEST(a_head_that_gives_up_at_any_step_lets_the_next_one_in) {
    const steps_fn sides[] = {acquires, acquires_next, cancels_the_first};
    for (int stop = 0; stop < 3; stop++) {
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            permits_t permits;
            ctx_sem_t sem;
            memset(&permits, 0, sizeof permits);
            ctx_sem_init(&sem, 2);
            EXPECT(ctx_sem_try_acquire(&sem, 1));
            permits.sem = &sem;
            permits.n = 2;
            permits.ctx = ctx_with_cancel(ctx_background());
            permits.next_ctx = ctx_with_cancel(ctx_background());
            more = steps_run(sides, 3, stop, &permits, at);
            EXPECT_EQ(permits.rc, CTX_CANCELED);
            EXPECT_EQ(permits.next_rc, 0);
            ctx_sem_release(&sem, 2);
            EXPECT(all_free(&sem, 2));
            ctx_end(permits.ctx);
            ctx_end(permits.next_ctx);
        }
    }
}

/* -- no permits at all --------------------------------------------------------------------------------------------- */

static void takes_a_place(void *shared) {
    permits_t *permits = (permits_t *)shared;
    permits->rc = ctx_sem_acquire(permits->sem, permits->ctx, permits->n);
    permits->first_place = add(&permits->place, 1);
}

static void takes_none(void *shared) {
    permits_t *permits = (permits_t *)shared;
    permits->in_use = ctx_sem_try_acquire(permits->sem, 0);
    permits->next_rc = ctx_sem_acquire(permits->sem, permits->next_ctx, 0);
    permits->next_place = add(&permits->place, 1);
}

static void cancels_the_next(void *shared) { ctx_cancel(((permits_t *)shared)->next_ctx); }

static permits_t none_behind(steps_fn other, ctx_sem_t *sem) {
    const steps_fn sides[] = {takes_a_place, takes_none, other};
    permits_t permits;
    memset(&permits, 0, sizeof permits);
    ctx_sem_init(sem, 2);
    EXPECT(ctx_sem_try_acquire(sem, 1));
    permits.sem = sem;
    permits.n = 2;
    permits.ctx = ctx_with_cancel(ctx_background());
    permits.next_ctx = ctx_with_cancel(ctx_background());
    steps_run(sides, 3, -1, &permits, -1); /* in this order, each until it waits */
    ctx_end(permits.ctx);
    ctx_end(permits.next_ctx);
    return permits;
}

TEST(an_acquire_of_no_permits_waits_behind_those_who_came_before) {
    ctx_sem_t sem;
    permits_t permits = none_behind(releases_one, &sem);
    EXPECT(!permits.in_use); /* try_acquire(0) while somebody waits */
    EXPECT_EQ(permits.rc, 0);
    EXPECT_EQ(permits.next_rc, 0);
    EXPECT_EQ(permits.first_place, 1);
    EXPECT_EQ(permits.next_place, 2);
    ctx_sem_release(&sem, 2);
    EXPECT(all_free(&sem, 2));
}

static void cancels_the_next_then_releases(void *shared) {
    cancels_the_next(shared);
    steps_yield();
    releases_one(shared);
}

TEST(an_acquire_of_no_permits_that_waits_can_be_canceled) {
    ctx_sem_t sem;
    permits_t permits = none_behind(cancels_the_next_then_releases, &sem);
    EXPECT_EQ(permits.next_rc, CTX_CANCELED);
    EXPECT_EQ(permits.rc, 0);
    ctx_sem_release(&sem, 2);
    EXPECT(all_free(&sem, 2));
}

TEST(an_acquire_of_no_permits_gets_in_when_the_one_before_gives_up) {
    ctx_sem_t sem;
    permits_t permits = none_behind(cancels_the_first, &sem);
    EXPECT_EQ(permits.rc, CTX_CANCELED);
    EXPECT_EQ(permits.next_rc, 0);
    ctx_sem_release(&sem, 1);
    EXPECT(all_free(&sem, 2));
}

TEST(an_acquire_of_no_permits_that_nobody_is_before_is_in_at_once) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    EXPECT(ctx_sem_try_acquire(&sem, 0));
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 0), 0);
    ctx_t *done = ctx_with_timeout(ctx_background(), 0);
    EXPECT_EQ(ctx_sem_acquire(&sem, done, 0), CTX_DEADLINE_EXCEEDED);
    ctx_end(done);
    ctx_sem_release(&sem, 1);
    ctx_runtime_stop();
}

TEST_MAIN
