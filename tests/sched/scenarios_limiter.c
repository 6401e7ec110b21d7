/* The limiter: no token is acted on before it has come, threads that wait are served in order, and those behind one
   that gave up move up. The bucket holds 5, a token comes every 100 ms, and it is empty at first. */
#include "sched.h"

enum { BURST = 5 };
#define TOKEN CTX_MS(100)
#define SLACK CTX_MS(1) /* each look at the explorer's clock moves it a little */

static ctx_limiter_t limiter;
static ctx_t *ctx;
static ctx_time_t empty_at;
static int64_t served, reserved, given_back; /* [atomic] tokens */
static ctx_time_t gone_at;     /* [gone] when the wait that was canceled had returned; 0: it was served */
static ctx_time_t reserved_at; /* [queued] */
static sched_flag_t queued, gone;

static void setup(void) {
    SCHED_CHECK(ctx_limiter_init(&limiter, 10, BURST) == 0);
    ctx = ctx_with_cancel(ctx_background());
    empty_at = ctx_now();
    SCHED_CHECK(ctx_limiter_allow(&limiter, BURST));
}

/* Places do not overlap, stand in order, and the word is behind them. */
static void look(void) {
    const ctx__limiter_waiter_t *waiter;
    int64_t reach = INT64_MIN;
    ctx__limiter_enter(&limiter);
    for (waiter = ctx__limiter_waiter(limiter.waiters.first); waiter;
         waiter = ctx__limiter_waiter(waiter->wait.link.next)) {
        SCHED_CHECK(waiter->full_at - waiter->span >= reach);
        reach = waiter->full_at;
    }
    SCHED_CHECK(CTX__LOAD(&limiter.full_at, SEQ_CST) >= reach);
    ctx__leave(&limiter.mu);
}

static void note_served(int64_t n) {
    int64_t sum = CTX__ADD(&served, n, SEQ_CST) + n - CTX__LOAD(&given_back, SEQ_CST);
    SCHED_CHECK(sum * TOKEN <= ctx_now() - empty_at);
}

/* Nothing is lost, unless one gave up so late that others were served meanwhile, or with a reservation behind. */
static void check(void) {
    int64_t full_at = empty_at + (BURST + served + reserved - given_back) * TOKEN;
    bool exact = !gone_at || (gone_at < empty_at + TOKEN && !reserved);
    SCHED_CHECK(!limiter.waiters.first);
    SCHED_CHECK(limiter.full_at >= full_at);
    if (exact && ctx_now() < empty_at + BURST * TOKEN) SCHED_CHECK(limiter.full_at <= full_at + SLACK);
    ctx_end(ctx);
}

static ctx_time_t wait_for(int64_t n) {
    SCHED_CHECK(ctx_limiter_wait(&limiter, ctx_background(), n) == 0);
    note_served(n);
    return ctx_now();
}

static void wait_3_canceled(void) {
    int rc = ctx_limiter_wait(&limiter, ctx, 3);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
    if (rc == 0) note_served(3);
    else gone_at = ctx_now();
    sched_set(&gone);
}
static void cancel(void) { ctx_cancel(ctx); }

/* Where it was behind the one that gave up, it has moved up. */
static void wait_1_promptly(void) {
    ctx_time_t due = ctx_now() > empty_at + TOKEN ? ctx_now() : empty_at + TOKEN, at = wait_for(1);
    if (!sched_is_set(&gone) || !gone_at) return;
    SCHED_CHECK(at <= (gone_at > due ? gone_at : due) + SLACK);
}
static void wait_1(void) { wait_for(1); }
static void wait_2(void) { wait_for(2); }
static void allow_1(void) {
    if (ctx_limiter_allow(&limiter, 1)) note_served(1);
}

/* What stands behind a reservation stays there. */
static void reserve_1(void) {
    ctx_time_t now = ctx_now();
    reserved_at = now + ctx_limiter_reserve(&limiter, 1);
    CTX__ADD(&reserved, 1, SEQ_CST);
    sched_set(&queued);
}
static void wait_behind(void) {
    sched_await(&queued);
    SCHED_CHECK(wait_for(1) >= reserved_at);
}

static void refund_1(void) {
    CTX__ADD(&given_back, 1, SEQ_CST); /* before it can be taken */
    ctx_limiter_refund(&limiter, 1);
}

static const sched_scenario_t scenarios[] = {
    { "limiter: two waits and a cancel", setup, { T(wait_3_canceled), T(wait_1_promptly), T(cancel) }, check, false },
    { "limiter: two waits, a cancel and a look", setup,
      { T(wait_3_canceled), T(wait_2), T(cancel), T(look) }, check, false },
    { "limiter: three waits and a cancel", setup,
      { T(wait_1), T(wait_3_canceled), T(wait_2), T(cancel) }, check, false },
    { "limiter: wait, reservation, wait and a cancel", setup,
      { T(wait_3_canceled), T(reserve_1), T(wait_behind), T(cancel) }, check, false },
    { "limiter: two waits and a refund", setup, { T(wait_1), T(wait_2), T(refund_1) }, check, false },
    { "limiter: reserve, allow and a refund", setup, { T(reserve_1), T(allow_1), T(refund_1) }, check, false },
    { "limiter: wait, allow and a refund", setup, { T(wait_1), T(allow_1), T(refund_1), T(look) }, check, false },
};
SCHED_MAIN(scenarios)
