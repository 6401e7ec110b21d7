/* Semaphores: no permit is lost or made, no waiter is left behind, a semaphore may be freed by the thread that took the
   last permit. */
#include "sched.h"

static ctx_sem_t *sem;
static ctx_t *ctx;
static int64_t taken; /* permits that somebody holds */

static void setup_permits(int64_t total, int64_t held) {
    sem = (ctx_sem_t *)sched_malloc(sizeof *sem);
    SCHED_CHECK(ctx_sem_init(sem, total) == 0);
    if (held) SCHED_CHECK(ctx_sem_try_acquire(sem, held));
    taken = held;
    ctx = ctx_with_cancel(ctx_background());
}
static void setup_1_held(void) { setup_permits(1, 1); }
static void setup_2_held_1(void) { setup_permits(2, 1); }
static void setup_2(void) { setup_permits(2, 0); }

/* All permits that nobody holds can be had, and no more. */
static void check(void) {
    int64_t free_now = sem->total - taken;
    if (free_now) SCHED_CHECK(ctx_sem_try_acquire(sem, free_now));
    SCHED_CHECK(!ctx_sem_try_acquire(sem, 1));
    ctx_sem_destroy(sem);
    sched_free(sem);
    ctx_end(ctx);
}

static void acquire_1(void) {
    int rc = ctx_sem_acquire(sem, ctx, 1);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
    if (rc == 0) taken++;
}
static void acquire_1_release(void) {
    int rc = ctx_sem_acquire(sem, ctx, 1);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
    if (rc == 0) ctx_sem_release(sem, 1);
}
static void acquire_2(void) {
    int rc = ctx_sem_acquire(sem, ctx, 2);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
    if (rc == 0) taken += 2;
}
static void acquire_release(void) {
    SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 1) == 0);
    ctx_sem_release(sem, 1);
}
static void acquire_2_release(void) {
    SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 2) == 0);
    ctx_sem_release(sem, 2);
}
static void acquire_forever(void) {
    SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 1) == 0);
    taken++;
}
static void try_acquire(void) {
    if (ctx_sem_try_acquire(sem, 1)) taken++;
}
static void release_1(void) {
    taken--;
    ctx_sem_release(sem, 1);
}
static void cancel(void) { ctx_cancel(ctx); }

/* The permit is a lock: races.c sees whether one holder's writes come before the next one's. */
static int guarded;
static void setup_1(void) { setup_permits(1, 0); }
static void guard(void) {
    SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 1) == 0);
    guarded++;
    ctx_sem_release(sem, 1);
}
static void guard_try(void) {
    if (!ctx_sem_try_acquire(sem, 1)) return;
    guarded++;
    ctx_sem_release(sem, 1);
}

/* Like core_k: the thread that took the last permit frees the semaphore at once. */
static void acquire_free(void) {
    SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 1) == 0);
    ctx_sem_destroy(sem);
    sched_free(sem);
}
static void check_freed(void) { ctx_end(ctx); }

/* Like api_sem_after_cancel: the permits come after ctx_cancel() has returned. */
static int rc_after;
static void acquire_2_of_canceled(void) { rc_after = ctx_sem_acquire(sem, ctx, 2); }
static void cancel_release(void) {
    ctx_cancel(ctx);
    release_1();
}
static void check_after_cancel(void) {
    SCHED_CHECK(rc_after == CTX_CANCELED);
    check();
}

/* While one waits, nobody who comes later takes what is free. */
static sched_flag_t tried;
static void try_overtake(void) {
    bool waits = (CTX__LOAD(&sem->state, RELAXED) & CTX__SEM_WAIT) != 0;
    if (ctx_sem_try_acquire(sem, 1)) {
        SCHED_CHECK(!waits);
        ctx_sem_release(sem, 1);
    }
    sched_set(&tried);
}
static void cancel_tried(void) {
    sched_await(&tried);
    ctx_cancel(ctx);
}

/* Zero permits: never an error but the context's. */
static void acquire_0(void) {
    int rc = ctx_sem_acquire(sem, ctx, 0);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
    ctx_sem_release(sem, 0);
}

/* The last waiter gives up just when the release has seen that somebody waits; then it takes the permit and frees. */
static void wait_then_free(void) {
    int rc = ctx_sem_acquire(sem, ctx, 1);
    if (rc) SCHED_CHECK(ctx_sem_acquire(sem, ctx_background(), 1) == 0);
    ctx_sem_destroy(sem);
    sched_free(sem);
}
static void cancel_late(void) { ctx_cancel(ctx); }
static void check_late_free(void) { ctx_end(ctx); }

static const sched_scenario_t scenarios[] = {
    { "semaphore: hand-over", setup_1_held, { T(acquire_forever), T(release_1) }, check, false },
    { "semaphore: hand-over against cancel", setup_1_held, { T(acquire_1), T(release_1), T(cancel) }, check, false },
    { "semaphore: two waiters, one canceled", setup_1_held,
      { T(acquire_1_release), T(acquire_release), T(cancel), T(release_1) }, check, false },
    { "semaphore: big waiter gives way when canceled", setup_2_held_1,
      { T(acquire_2), T(acquire_release), T(cancel) }, check, false },
    { "semaphore: release against free", setup_1_held, { T(release_1), T(acquire_free) }, check_freed, false },
    { "semaphore: permits after cancel", setup_2_held_1,
      { T(acquire_2_of_canceled), T(cancel_release) }, check_after_cancel, false },
    { "semaphore: big against small", setup_2,
      { T(acquire_2_release), T(acquire_release), T(acquire_release) }, check, false },
    { "semaphore: guards data", setup_1, { T(guard), T(guard) }, check, false },
    { "semaphore: guards data, try", setup_1, { T(guard), T(guard), T(guard_try) }, check, false },
    { "semaphore: try against hand-over", setup_1_held,
      { T(try_acquire), T(acquire_1), T(release_1), T(cancel) }, check, false },
    { "semaphore: no overtaking", setup_2_held_1, { T(acquire_2), T(try_overtake), T(cancel_tried) }, check, false },
    { "semaphore: zero permits", setup_2_held_1, { T(acquire_0), T(acquire_2), T(cancel) }, check, false },
    { "semaphore: late free", setup_1_held,
      { T(wait_then_free), T(release_1), T(cancel_late) }, check_late_free, false },
};
SCHED_MAIN(scenarios)
