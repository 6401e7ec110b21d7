/* Deadlines: with the fake clock, and with the library's own thread under the explorer. */
#include "sched.h"

static ctx_t *ctx, *kid;

static void check_cause(void) {
    ctx_cause_t cause = ctx_cause(ctx);
    SCHED_CHECK(ctx_err(kid));
    SCHED_CHECK((cause.code == CTX_CANCELED && !strcmp(cause.what, "context canceled")) ||
                (cause.code == CTX_DEADLINE_EXCEEDED && !strcmp(cause.what, "deadline exceeded")));
}
static void make(void) {
    ctx = ctx_retain(ctx_with_timeout(ctx_background(), CTX_MS(10)));
    kid = ctx_retain(ctx_with_cancel(ctx));
}
static void unmake(void) {
    check_cause();
    ctx_end(kid);
    ctx_release(kid);
    ctx_release(ctx);
}
static void end(void) {
    ctx_end(ctx);
    check_cause();
}
static void cancel(void) {
    ctx_cancel(ctx);
    check_cause();
}
static void end_kid(void) { ctx_end(ctx_retain(kid)); }

/* -- the fake clock -- */

static void setup_fake(void) {
    ctx_clock_fake(CTX_S(1));
    make();
}
static void advance(void) {
    ctx_clock_advance(CTX_MS(10));
    check_cause();
}
static void advance_nearly(void) { ctx_clock_advance(CTX_MS(10) - 1); }
static void check(void) { unmake(); }
static void check_unended(void) {
    ctx_release(ctx);
    check();
}
/* All references are the threads' own. */
static void setup_fake_alone(void) {
    ctx_clock_fake(CTX_S(1));
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(10));
}
static void advance_alone(void) { ctx_clock_advance(CTX_MS(10)); }
static void end_alone(void) { ctx_end(ctx); }

static void setup_clock(void) { ctx_clock_fake(CTX_S(1)); }
static void make_wait_end(void) {
    ctx_t *c = ctx_with_timeout(ctx_background(), CTX_MS(5));
    SCHED_CHECK(ctx_wait(c, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(c);
}
static void make_end(void) {
    ctx_t *c = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_end(c);
}
/* Time goes on until nobody needs it. */
static sched_flag_t slept;
static void sleeper(void) {
    SCHED_CHECK(ctx_sleep(ctx_background(), CTX_MS(5)) == 0);
    sched_set(&slept);
}
static void waiter(void) {
    make_wait_end();
    sched_set(&slept);
}
static void advance_until(void) {
    while (!sched_is_set(&slept)) {
        ctx_clock_advance(CTX_MS(5));
        ctx__sched_relax();
    }
}

/* Two deadlines, one below the other, and a semaphore that is waited for until a deadline. */
static void setup_fake_two(void) {
    ctx_clock_fake(CTX_S(1));
    ctx = ctx_retain(ctx_with_timeout(ctx_background(), CTX_MS(10)));
    kid = ctx_retain(ctx_with_timeout(ctx, CTX_MS(10) - 1));
}
static ctx_sem_t sem;
static bool taken;
static void setup_fake_sem(void) {
    setup_fake();
    ctx_sem_init(&sem, 1);
    ctx_sem_try_acquire(&sem, 1);
}
static void acquire(void) {
    int rc = ctx_sem_acquire(&sem, kid, 1);
    SCHED_CHECK(rc == 0 || rc == CTX_DEADLINE_EXCEEDED);
    taken = rc == 0;
}
static void release(void) { ctx_sem_release(&sem, 1); }
static void check_sem(void) {
    SCHED_CHECK(ctx_sem_try_acquire(&sem, 1) == !taken);
    check_unended();
}

/* -- the library's thread -- */

static void setup_real(void) { make(); }
static void check_real(void) {
    unmake();
    ctx_runtime_stop();
}
static void wait_deadline(void) {
    int rc = ctx_wait(kid, CTX_FOREVER);
    SCHED_CHECK(rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED);
    SCHED_CHECK(rc != CTX_DEADLINE_EXCEEDED || ctx_now() >= ctx_deadline(ctx));
}
static void check_real_unended(void) {
    ctx_release(ctx);
    check_real();
}
static void stop(void) { ctx_runtime_stop(); }
static void check_stop(void) { ctx_runtime_stop(); }
static void maker(void) { make_wait_end(); }
static void maker_only(void) { make_end(); }
static void check_unended_stop(void) { check_real_unended(); }
static void setup_nothing(void) {}

/* Callbacks of a deadline. `other` is canceled by one, so that a wait for it depends on the library's thread. */
static ctx_t *other, *ctx_b;
static ctx_on_done_t reg, reg_b;
static int called;
static void cancel_other(void *arg) {
    (void)arg;
    called++;
    ctx_cancel(other);
}
static void setup_other(void) { other = ctx_with_cancel(ctx_background()); }
static void setup_callback(void) {
    setup_other();
    setup_real();
    ctx_on_done(&reg, ctx, cancel_other, NULL);
}
static void setup_two_callbacks(void) {
    setup_callback();
    ctx_b = ctx_with_timeout(ctx_background(), CTX_MS(10));
    ctx_on_done(&reg_b, ctx_b, cancel_other, NULL);
}
static void make_wait_called(void) {
    ctx_t *c = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_on_done(&reg, c, cancel_other, NULL);
    SCHED_CHECK(ctx_wait(other, CTX_FOREVER) == CTX_CANCELED);
    ctx_end(c);
}
static void wait_called(void) { SCHED_CHECK(ctx_wait(other, CTX_FOREVER) == CTX_CANCELED); }
static void wait_b(void) { SCHED_CHECK(ctx_wait(ctx_b, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED); }
static void check_other(void) {
    ctx_runtime_stop();
    ctx_end(other);
}
static void check_called(void) {
    ctx_runtime_stop();
    SCHED_CHECK(called == 1);
    ctx_end(other);
    ctx_release(ctx);
    unmake();
}
static void check_called_twice(void) {
    ctx_runtime_stop();
    SCHED_CHECK(called == 2);
    called = 1;
    ctx_end(ctx_b);
    check_called();
}

/* -- grace -- */

static ctx_t *graced; /* below ctx, with 10 ms */
static ctx_t *derive_graced(void) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.grace = CTX_MS(10);
    return ctx_derive(ctx, &desc);
}
static void setup_grace_timed(ctx_dur_t timeout) {
    ctx_clock_fake(CTX_S(1));
    ctx = ctx_with_timeout(ctx_background(), timeout);
    graced = ctx_retain(derive_graced());
    kid = ctx_with_cancel(graced);
}
static void setup_grace(void) { setup_grace_timed(CTX_FOREVER); }
static void setup_grace_alone(ctx_dur_t timeout) {
    ctx_clock_fake(CTX_S(1));
    ctx = ctx_with_timeout(ctx_background(), timeout);
    graced = derive_graced();
}
static void setup_grace_last(void) { setup_grace_alone(CTX_FOREVER); }
static void setup_grace_last_timed(void) { setup_grace_alone(CTX_S(10)); }
static void check_grace_last(void) {
    ctx_clock_advance(CTX_S(20));
    ctx_end(ctx);
}
static void setup_grace_deadline(void) { setup_grace_timed(CTX_MS(10)); }
static void setup_grace_none(void) {
    ctx_clock_fake(CTX_S(1));
    ctx = ctx_with_cancel(ctx_background());
    kid = ctx_retain(ctx);
}
static void cancel_graced(void) { ctx_cancel_cause(ctx, -7, "over"); }
static void end_graced(void) { ctx_end(graced); }
static void end_ctx(void) { ctx_end(ctx_retain(ctx)); }
static void make_graced(void) {
    graced = ctx_retain(derive_graced());
    SCHED_CHECK(!ctx_err(graced) || ctx_now() > CTX_S(1));
}
static void advance_short(void) {
    ctx_clock_advance(CTX_MS(10) - 1);
    SCHED_CHECK(!ctx_err(graced));
}
static void wait_graced(void) { SCHED_CHECK(ctx_wait(graced, CTX_FOREVER) == CTX_CANCELED); }
static void unmake_graced(void) {
    ctx_release(graced);
    ctx_release(graced);
    ctx_release(kid);
    ctx_release(ctx);
}
/* Whatever came first, it has ended, and has the cause of what ended it. */
static void check_graced(void) {
    ctx_cause_t cause;
    ctx_clock_advance(CTX_MS(25));
    cause = ctx_cause(graced);
    SCHED_CHECK(ctx_err(graced) && ctx_err(kid));
    SCHED_CHECK(cause.code == ctx_cause(ctx).code);
    unmake_graced();
}
static void check_graced_ended(void) {
    ctx_clock_advance(CTX_S(20));
    SCHED_CHECK(ctx_err(graced) && ctx_err(kid));
    ctx_release(graced);
    ctx_release(kid);
    ctx_release(ctx);
}
static void setup_grace_real(void) {
    ctx = ctx_with_cancel(ctx_background());
    graced = ctx_retain(derive_graced());
    kid = ctx_with_cancel(graced);
}
static void check_grace_real(void) {
    ctx_runtime_stop();
    SCHED_CHECK(ctx_err(kid) && ctx_cause(graced).code == -7);
    unmake_graced();
}

/* -- the clock that moves by itself -- */

static void setup_auto(void) {
    ctx_clock_auto(0);
    ctx_clock_leave(); /* the explorer's main thread does not wait in the library */
    ctx_sem_init(&sem, 1);
    SCHED_CHECK(ctx_sem_try_acquire(&sem, 1));
}
static void auto_sleeps(ctx_dur_t span, ctx_time_t end) {
    SCHED_CHECK(ctx_sleep(ctx_background(), span) == 0);
    SCHED_CHECK(ctx_now() == end);
}
static void auto_sleeper(void) {
    ctx_clock_join();
    auto_sleeps(CTX_MS(5), CTX_MS(5));
    auto_sleeps(CTX_MS(5), CTX_MS(10));
}
/* The two begin together: each waits, in its own way, until the other has joined. */
static sched_flag_t joined[2];
static void auto_meet(int me) {
    ctx_clock_join();
    sched_set(&joined[me]);
    while (!sched_is_set(&joined[!me])) ctx__sched_relax();
}
static void auto_releases(void) {
    auto_meet(0);
    auto_sleeps(CTX_MS(5), CTX_MS(5));
    ctx_sem_release(&sem, 1);
    auto_sleeps(CTX_MS(5), CTX_MS(10));
}
static void auto_acquires(void) {
    auto_meet(1);
    SCHED_CHECK(ctx_sem_acquire(&sem, ctx_background(), 1) == 0);
    SCHED_CHECK(ctx_now() == CTX_MS(5));
    auto_sleeps(CTX_MS(2), CTX_MS(7));
}
static int auto_task(ctx_t *c, void *arg) {
    (void)arg;
    SCHED_CHECK(ctx_sleep(c, CTX_MS(5)) == 0);
    SCHED_CHECK(ctx_now() == CTX_MS(5));
    return 0;
}
static void auto_pool(void) {
    ctx_pool_desc_t desc;
    ctx_pool_t *pool;
    ctx_clock_join();
    memset(&desc, 0, sizeof desc);
    desc.workers = 1;
    pool = ctx_pool_new(ctx_background(), &desc);
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "task", auto_task, NULL) == 0);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_S(1), NULL) == 0);
    SCHED_CHECK(ctx_now() == CTX_MS(5));
    ctx_pool_free(pool);
}
/* A thread that is unparked may run, and park again, before the one that woke it goes on. */
static int nothing(ctx_t *c, void *arg) {
    (void)c, (void)arg;
    return 0;
}
static void auto_submits(void) {
    ctx_pool_desc_t desc;
    ctx_pool_t *pool;
    ctx_t *c;
    ctx_clock_join();
    memset(&desc, 0, sizeof desc);
    desc.workers = 1;
    c = ctx_with_timeout(ctx_background(), CTX_S(1));
    pool = ctx_pool_new(ctx_background(), &desc);
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "task", nothing, NULL) == 0);
    SCHED_CHECK(ctx_pool_wait(pool, ctx_background()) == 0);
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "task", nothing, NULL) == 0);
    SCHED_CHECK(ctx_now() == 0);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_S(1), NULL) == 0);
    ctx_pool_free(pool);
    ctx_end(c);
}
static void check_auto(void) {
    ctx_runtime_stop();
    ctx_clock_real();
    ctx_runtime_stop();
}

static const sched_scenario_t scenarios[] = {
    { "timer: auto, sleeper", setup_auto, { T(auto_sleeper) }, check_auto, false },
    { "timer: auto, release / acquire", setup_auto, { T(auto_releases), T(auto_acquires) }, check_auto, false },
    { "timer: auto, pool", setup_auto, { T(auto_pool) }, check_auto, false },
    { "timer: auto, submitter runs on", setup_auto, { T(auto_submits) }, check_auto, false },

    { "timer: grace, cancel / advance", setup_grace, { T(cancel_graced), T(advance_short) }, check_graced, false },
    { "timer: grace, deadline / cancel", setup_grace_deadline,
      { T(advance_alone), T(cancel_graced) }, check_graced, false },
    { "timer: grace, cancel / end", setup_grace, { T(cancel_graced), T(end_graced) }, check_graced_ended, false },
    { "timer: grace, cancel / end of the last", setup_grace_last,
      { T(cancel_graced), T(end_graced) }, check_grace_last, false },
    { "timer: grace, cancel / end of the last, timed", setup_grace_last_timed,
      { T(cancel_graced), T(end_graced) }, check_grace_last, false },
    { "timer: grace, cancel / end / advance", setup_grace,
      { T(cancel_graced), T(end_graced), T(advance_alone) }, check_graced_ended, false },
    { "timer: grace, cancel / end of the parent", setup_grace, { T(cancel_graced), T(end_ctx) }, check_graced, false },
    { "timer: grace, derive / cancel", setup_grace_none, { T(make_graced), T(cancel_graced) }, check_graced, false },
    { "timer: grace, cancel / wait", setup_grace_real, { T(cancel_graced), T(wait_graced) }, check_grace_real, false },

    { "timer: fake, advance / end", setup_fake, { T(advance), T(end) }, check, false },
    { "timer: fake, advance / cancel", setup_fake, { T(advance), T(cancel) }, check_unended, false },
    { "timer: fake, advance / end kid", setup_fake, { T(advance), T(end_kid) }, check_unended, false },
    { "timer: fake, advance / end / cancel", setup_fake, { T(advance), T(end), T(cancel) }, check, false },
    { "timer: fake, two deadlines, advance / cancel", setup_fake_two, { T(advance), T(cancel) }, check_unended, false },
    { "timer: fake, two deadlines, advance / end kid", setup_fake_two,
      { T(advance), T(end_kid) }, check_unended, false },
    { "timer: fake, acquire / advance / release", setup_fake_sem,
      { T(acquire), T(advance), T(release) }, check_sem, false },
    { "timer: fake, nearly / end", setup_fake, { T(advance_nearly), T(end) }, check, false },
    { "timer: fake, advance / end of the last", setup_fake_alone, { T(advance_alone), T(end_alone) }, NULL, false },
    { "timer: fake, advance / make and end", setup_clock, { T(advance_alone), T(make_end) }, NULL, false },
    { "timer: fake, two make and end / advance", setup_clock,
      { T(make_end), T(make_end), T(advance_alone) }, NULL, false },
    { "timer: fake, sleep / advance", setup_clock, { T(sleeper), T(advance_until) }, NULL, false },
    { "timer: fake, wait / advance", setup_clock, { T(waiter), T(advance_until) }, NULL, false },
    { "timer: real, deadline / wait", setup_real, { T(wait_deadline) }, check_real_unended, false },
    { "timer: real, deadline / wait / end", setup_real, { T(wait_deadline), T(end) }, check_real, false },
    { "timer: real, deadline / cancel", setup_real, { T(cancel) }, check_real_unended, false },
    { "timer: real, make, wait", setup_nothing, { T(maker) }, check_stop, false },
    { "timer: real, two make, wait", setup_nothing, { T(maker), T(maker) }, check_stop, false },
    { "timer: real, stop / make and end", setup_nothing, { T(stop), T(maker_only) }, check_stop, false },
    { "timer: real, stop / make, wait", setup_nothing, { T(stop), T(maker) }, check_stop, false },
    { "timer: real, stop / wait", setup_real, { T(stop), T(wait_deadline) }, check_unended_stop, false },
    { "timer: real, stop / end", setup_real, { T(stop), T(end) }, check_real, false },
    { "timer: real, stop / stop", setup_real, { T(stop), T(stop), T(end) }, check_real, false },
    { "timer: real, stop / stop / make, wait", setup_nothing, { T(stop), T(stop), T(maker) }, check_stop, false },
    { "timer: real, make and wait for a callback", setup_other, { T(make_wait_called) }, check_other, false },
    { "timer: real, wait and callback", setup_callback, { T(wait_deadline), T(wait_called) }, check_called, false },
    { "timer: real, two waits and callbacks", setup_two_callbacks, { T(wait_deadline), T(wait_b) }, check_called_twice,
      false },
    { "timer: real, stop / wait and callback", setup_callback, { T(stop), T(wait_deadline) }, check_called, false },
};
SCHED_MAIN(scenarios)
