/* Section 12, the limiter: never more than the rate and the burst allow, never a token lost, no wait in vain. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"

#include <float.h>
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

static ctx_limiter_t limiter_of(double per_second, int64_t burst) {
    ctx_limiter_t limiter;
    EXPECT_EQ(ctx_limiter_init(&limiter, per_second, burst), 0);
    return limiter;
}

static ctx_limiter_t empty_limiter(double per_second, int64_t burst) {
    ctx_limiter_t limiter = limiter_of(per_second, burst);
    EXPECT(ctx_limiter_allow(&limiter, burst));
    return limiter;
}

/* How many tokens can be taken now, one by one. */
static int64_t drink(ctx_limiter_t *limiter) {
    int64_t n = 0;
    while (ctx_limiter_allow(limiter, 1)) n++;
    return n;
}

/* How long the next token would take, taking none. */
static ctx_dur_t until_next(ctx_limiter_t *limiter) {
    ctx_dur_t wait = ctx_limiter_reserve(limiter, 1);
    ctx_limiter_refund(limiter, 1);
    return wait;
}

/* A ctx_limiter_wait() in a thread of its own. */
typedef struct {
    ctx_limiter_t *limiter;
    ctx_t *ctx;
    int64_t n;
    int tid, done; /* [atomic] */
    int rc;
    ctx_time_t at;
} waiter_t;

static void *waits(void *arg) {
    waiter_t *w = (waiter_t *)arg;
    store(&w->tid, thread_id());
    w->rc = ctx_limiter_wait(w->limiter, w->ctx, w->n);
    w->at = ctx_now();
    store(&w->done, 1);
    return NULL;
}

/* Returns when it has parked. */
static pthread_t wait_apart(waiter_t *w, ctx_limiter_t *limiter, ctx_t *ctx, int64_t n) {
    memset(w, 0, sizeof *w);
    w->limiter = limiter;
    w->ctx = ctx;
    w->n = n;
    pthread_t thread = thread_start(waits, w);
    until_asleep(&w->tid);
    return thread;
}

static bool still_waits(waiter_t *w) {
    until_asleep(&w->tid);
    return load(&w->done) == 0;
}

/* -- taking at once --------------------------------------------------------------------------------------------- */

TEST(a_new_bucket_is_full) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT_EQ(drink(&limiter), 5);
    limiter = limiter_of(10, 5);
    EXPECT(ctx_limiter_allow(&limiter, 5));
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    ctx_clock_real();
}

TEST(a_bucket_never_holds_more_than_its_burst) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    ctx_clock_advance(CTX_S(3600));
    EXPECT_EQ(drink(&limiter), 5);
    ctx_clock_advance(CTX_S(3600));
    EXPECT_EQ(drink(&limiter), 5);
    ctx_clock_real();
}

TEST(a_token_comes_at_its_time_and_not_before) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    for (int i = 0; i < 10; i++) {
        ctx_clock_advance(CTX_MS(100) - 1);
        EXPECT(!ctx_limiter_allow(&limiter, 1));
        ctx_clock_advance(1);
        EXPECT(ctx_limiter_allow(&limiter, 1));
        EXPECT(!ctx_limiter_allow(&limiter, 1));
    }
    ctx_clock_real();
}

TEST(what_is_refused_takes_nothing) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT(ctx_limiter_allow(&limiter, 3));
    for (int i = 0; i < 100; i++) EXPECT(!ctx_limiter_allow(&limiter, 3));
    EXPECT(ctx_limiter_allow(&limiter, 2));
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_clock_real();
}

TEST(no_tokens_can_be_taken_of_a_full_bucket) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT(ctx_limiter_allow(&limiter, 0));
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 0), 0);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), 0), 0);
    ctx_limiter_refund(&limiter, 0);
    EXPECT_EQ(drink(&limiter), 5);
    ctx_clock_real();
}

TEST(a_full_bucket_gives_each_token_of_its_burst) {
    static const double rates[] = {1.5, 3, 7, 30, 600, 700, 1.0 / 7, 9999999, 1e7};
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++)
        for (int64_t burst = 1; burst <= 1000; burst = burst * 3 + 1) {
            ctx_clock_fake(CTX_S(1000));
            ctx_limiter_t limiter = limiter_of(rates[i], burst);
            EXPECT_EQ(drink(&limiter), burst);
            ctx_clock_real();
        }
}

/* Of a rate whose tokens take no whole number of nanoseconds up to one is lost for each token, but none is won. */
static void expect_rate_over(double per_second, int64_t burst, ctx_dur_t step, int steps) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(per_second, burst);
    int64_t taken = 0;
    for (int i = 0; i < steps; i++) {
        ctx_clock_advance(step);
        taken += drink(&limiter);
    }
    double due = per_second * ((double)step * steps / 1e9);
    EXPECT((double)taken <= due + 0.001);
    EXPECT((double)taken >= due * (1 - per_second * 1e-9) - 1.001);
    ctx_clock_real();
}

TEST(the_rate_is_exact_over_long_time) {
    expect_rate_over(10, 5, CTX_MS(100), 36000);
    expect_rate_over(3, 5, CTX_MS(500), 200000); /* more than a day */
    expect_rate_over(0.7, 2, CTX_S(1), 100000);
    expect_rate_over(1.0 / 3600, 1, CTX_S(600), 60000); /* more than a year */
    expect_rate_over(1000, 100, CTX_MS(7), 20000);
    expect_rate_over(600, 100, CTX_MS(7), 20000);
}

TEST(the_rate_is_not_exceeded_when_a_token_takes_but_nanoseconds) {
    expect_rate_over(1e7, 100000, CTX_MS(1), 50);
    expect_rate_over(7e6, 100000, CTX_MS(1), 50);
    expect_rate_over(3e6, 100000, CTX_MS(1), 100);
    expect_rate_over(999999, 100000, CTX_MS(3), 100);
}

TEST(big_and_small_requests_cost_the_same) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t one = empty_limiter(3, 700), many = empty_limiter(3, 700);
    ctx_clock_advance(CTX_S(233) + CTX_US(1)); /* 699 tokens */
    EXPECT(ctx_limiter_allow(&many, 699));
    EXPECT(!ctx_limiter_allow(&many, 1));
    EXPECT_EQ(drink(&one), 699);
    ctx_clock_real();
}

/* -- credit ----------------------------------------------------------------------------------------------------- */

TEST(a_reservation_says_how_long_to_wait) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 5), 0);
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 1), CTX_MS(100));
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 1), CTX_MS(200));
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 5), CTX_MS(700));
    ctx_clock_advance(CTX_MS(50));
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 1), CTX_MS(750));
    ctx_clock_real();
}

TEST(what_is_reserved_is_taken) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 3), CTX_MS(300));
    ctx_clock_advance(CTX_MS(399));
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    ctx_clock_advance(CTX_MS(1));
    EXPECT(ctx_limiter_allow(&limiter, 1));
    ctx_clock_real();
}

TEST(what_is_given_back_can_be_taken_again) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_limiter_refund(&limiter, 2);
    EXPECT_EQ(drink(&limiter), 2);
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 4), CTX_MS(400));
    ctx_limiter_refund(&limiter, 4);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_clock_real();
}

TEST(giving_back_fills_no_bucket_over_its_burst) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT(ctx_limiter_allow(&limiter, 3));
    ctx_clock_advance(CTX_S(1));
    ctx_limiter_refund(&limiter, 3); /* it was full again already */
    EXPECT_EQ(drink(&limiter), 5);
    ctx_limiter_refund(&limiter, 5);
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(drink(&limiter), 5);
    ctx_clock_real();
}

TEST(giving_back_more_than_was_taken_opens_no_flood) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    ctx_limiter_refund(&limiter, 1000000);
    ctx_limiter_refund(&limiter, INT64_MAX);
    EXPECT_EQ(drink(&limiter), 5);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_clock_real();
}

/* -- waiting ---------------------------------------------------------------------------------------------------- */

TEST(tokens_that_are_there_are_not_waited_for) {
    ctx_clock_fake(CTX_S(1000)); /* a wait would never end */
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), 2), 0);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), 3), 0);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_clock_real();
}

TEST(a_wait_ends_when_the_tokens_come_and_not_before) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx_background(), 3);
    ctx_clock_advance(CTX_MS(300) - 1);
    EXPECT(still_waits(&w));
    ctx_clock_advance(1);
    thread_join(thread);
    EXPECT_EQ(w.rc, 0);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100)); /* it took what it waited for */
    ctx_clock_real();
}

TEST(nobody_takes_what_another_waits_for) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx_background(), 5);
    for (int i = 0; i < 4; i++) {
        ctx_clock_advance(CTX_MS(100));
        EXPECT(!ctx_limiter_allow(&limiter, 1));
    }
    EXPECT(still_waits(&w));
    ctx_clock_advance(CTX_MS(100));
    thread_join(thread);
    EXPECT_EQ(w.rc, 0);
    ctx_clock_real();
}

TEST(who_waits_is_served_in_order) {
    enum { WAITERS = 4 };
    static const int64_t wants[WAITERS] = {2, 5, 1, 1};
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    waiter_t w[WAITERS];
    pthread_t threads[WAITERS];
    for (int i = 0; i < WAITERS; i++) threads[i] = wait_apart(&w[i], &limiter, ctx_background(), wants[i]);
    for (int i = 0; i < WAITERS; i++) {
        ctx_clock_advance(CTX_MS(100 * wants[i]) - 1);
        for (int k = i; k < WAITERS; k++) EXPECT(still_waits(&w[k]));
        ctx_clock_advance(1);
        UNTIL(load(&w[i].done));
    }
    for (int i = 0; i < WAITERS; i++) thread_join(threads[i]);
    for (int i = 0; i < WAITERS; i++) EXPECT_EQ(w[i].rc, 0);
    ctx_clock_real();
}

TEST(a_canceled_wait_gives_its_tokens_back) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx, 5);
    ctx_clock_advance(CTX_MS(100));
    EXPECT(still_waits(&w));
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(w.rc, CTX_CANCELED);
    EXPECT(ctx_limiter_allow(&limiter, 1)); /* which came while it waited */
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_end(ctx);
    ctx_clock_real();
}

/* What is left when some of several waiters give up is what the others wait for, or less: nothing is won by it. */
TEST(canceled_waits_give_back_no_more_than_they_took) {
    static const int64_t wants[3] = {1, 3, 1};
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx[3];
    waiter_t w[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        ctx[i] = ctx_with_cancel(ctx_background());
        threads[i] = wait_apart(&w[i], &limiter, ctx[i], wants[i]);
    }
    for (int i = 1; i < 3; i++) {
        ctx_cancel(ctx[i]);
        thread_join(threads[i]);
        EXPECT_EQ(w[i].rc, CTX_CANCELED);
    }
    EXPECT(until_next(&limiter) >= CTX_MS(200)); /* the first has the token that comes after 100 ms */
    ctx_clock_advance(CTX_MS(100));
    thread_join(threads[0]);
    EXPECT_EQ(w[0].rc, 0);
    for (int i = 0; i < 3; i++) ctx_end(ctx[i]);
    ctx_clock_real();
}

TEST(a_canceled_wait_gives_back_no_more_than_it_took_when_others_gave_back_too) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx, 2);
    ctx_limiter_refund(&limiter, 1); /* one of the five */
    EXPECT(still_waits(&w));
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(w.rc, CTX_CANCELED);
    EXPECT_EQ(drink(&limiter), 1);
    ctx_end(ctx);
    ctx_clock_real();
}

/* -- those behind move up --------------------------------------------------------------------------------------- */

/* Three that wait, in this order, for these tokens; the middle one can be canceled. */
typedef struct {
    ctx_limiter_t limiter;
    ctx_t *ctx;
    waiter_t w[3];
    pthread_t threads[3];
} three_t;

static void three_open(three_t *t, int64_t first, int64_t second, int64_t third) {
    const int64_t wants[3] = {first, second, third};
    ctx_clock_fake(CTX_S(1000));
    t->limiter = empty_limiter(10, 5);
    t->ctx = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 3; i++)
        t->threads[i] = wait_apart(&t->w[i], &t->limiter, i == 1 ? t->ctx : ctx_background(), wants[i]);
}

/* It is served this much later and not before; those behind it still wait. */
static void three_served(three_t *t, int i, ctx_dur_t later) {
    ctx_clock_advance(later - 1);
    for (int k = i; k < 3; k++) EXPECT(still_waits(&t->w[k]) || (k == 1 && ctx_err(t->ctx)));
    ctx_clock_advance(1);
    thread_join(t->threads[i]);
    EXPECT_EQ(t->w[i].rc, 0);
}

static void three_cancel(three_t *t) {
    ctx_cancel(t->ctx);
    thread_join(t->threads[1]);
    EXPECT_EQ(t->w[1].rc, CTX_CANCELED);
}

static void three_close(three_t *t, ctx_dur_t next) {
    EXPECT_EQ(until_next(&t->limiter), next);
    ctx_end(t->ctx);
    ctx_clock_real();
}

TEST(those_behind_a_wait_that_was_canceled_move_up) {
    three_t t;
    three_open(&t, 1, 3, 2);
    three_cancel(&t);
    three_served(&t, 0, CTX_MS(100));
    three_served(&t, 2, CTX_MS(200));
    three_close(&t, CTX_MS(100));
}

TEST(those_behind_move_up_only_as_far_as_tokens_have_come) {
    three_t t;
    three_open(&t, 1, 5, 1);
    three_served(&t, 0, CTX_MS(100));
    ctx_clock_advance(CTX_MS(250)); /* of the 300 that the third needs, were it alone, 250 have passed in its favour */
    three_cancel(&t);
    thread_join(t.threads[2]);
    EXPECT_EQ(t.w[2].rc, 0);
    EXPECT_EQ(drink(&t.limiter), 1);
    three_close(&t, CTX_MS(50));
}

/* A late one must not be served before an early one, whatever was canceled before it came. */
TEST(who_comes_after_a_cancel_is_served_after_those_who_came_before) {
    three_t t;
    three_open(&t, 1, 3, 1);
    three_cancel(&t);
    waiter_t late;
    pthread_t thread = wait_apart(&late, &t.limiter, ctx_background(), 1);
    three_served(&t, 0, CTX_MS(100));
    EXPECT(still_waits(&late));
    three_served(&t, 2, CTX_MS(100));
    EXPECT(still_waits(&late));
    ctx_clock_advance(CTX_MS(100));
    thread_join(thread);
    EXPECT_EQ(late.rc, 0);
    three_close(&t, CTX_MS(100));
}

TEST(tokens_given_back_go_to_those_who_wait_and_not_to_a_newcomer) {
    three_t t;
    three_open(&t, 1, 1, 5);
    ctx_limiter_refund(&t.limiter, 2); /* two of the five */
    EXPECT(!ctx_limiter_allow(&t.limiter, 1));
    for (int i = 0; i < 2; i++) {
        thread_join(t.threads[i]);
        EXPECT_EQ(t.w[i].rc, 0);
    }
    three_served(&t, 2, CTX_MS(500));
    three_close(&t, CTX_MS(100));
}

TEST(more_given_back_than_was_taken_opens_no_flood_behind_those_who_wait) {
    three_t t;
    three_open(&t, 2, 2, 2);
    ctx_limiter_refund(&t.limiter, 1000000);
    for (int i = 0; i < 2; i++) {
        thread_join(t.threads[i]);
        EXPECT_EQ(t.w[i].rc, 0);
    }
    three_served(&t, 2, CTX_MS(100)); /* the bucket holds five, and they want six */
    three_close(&t, CTX_MS(100));
}

/* A reservation is a promise of a time, so nobody behind it may come nearer to it. */
TEST(those_behind_a_reservation_stay_where_they_are) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    waiter_t first, second;
    pthread_t threads[2];
    threads[0] = wait_apart(&first, &limiter, ctx, 3);
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 2), CTX_MS(500));
    threads[1] = wait_apart(&second, &limiter, ctx_background(), 1);
    ctx_cancel(ctx);
    thread_join(threads[0]);
    EXPECT_EQ(first.rc, CTX_CANCELED);
    ctx_clock_advance(CTX_MS(600) - 1);
    EXPECT(still_waits(&second));
    ctx_clock_advance(1);
    thread_join(threads[1]);
    EXPECT_EQ(second.rc, 0);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_reservation_that_is_given_back_hurries_nobody_before_it) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx_background(), 1);
    for (int i = 0; i < 3; i++) { /* asks how long it would take, and finds it too long */
        EXPECT_EQ(ctx_limiter_reserve(&limiter, 5), CTX_MS(600));
        ctx_limiter_refund(&limiter, 5);
    }
    ctx_clock_advance(CTX_MS(100) - 1);
    EXPECT(still_waits(&w));
    ctx_clock_advance(1);
    thread_join(thread);
    EXPECT_EQ(w.rc, 0);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_clock_real();
}

/* In the child of a fork nobody waits any more, though the tokens that were waited for are taken. */
TEST(a_limiter_works_on_in_the_child_of_a_fork) {
    three_t t;
    three_open(&t, 1, 1, 1);
    pid_t child = fork();
    if (child == 0) {
        ctx_limiter_refund(&t.limiter, 3);
        bool empty = ctx_limiter_reserve(&t.limiter, 0) == 0 && !ctx_limiter_allow(&t.limiter, 1);
        ctx_limiter_refund(&t.limiter, 5);
        _exit(empty && drink(&t.limiter) == 5 ? 0 : 1);
    }
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    for (int i = 0; i < 3; i++) three_served(&t, i, CTX_MS(100));
    three_close(&t, CTX_MS(100));
}

/* -- waits that end otherwise ----------------------------------------------------------------------------------- */

TEST(the_last_of_those_who_wait_gives_all_its_tokens_back) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    waiter_t first, last;
    pthread_t threads[2];
    threads[0] = wait_apart(&first, &limiter, ctx_background(), 2);
    threads[1] = wait_apart(&last, &limiter, ctx, 4);
    ctx_cancel(ctx);
    thread_join(threads[1]);
    EXPECT_EQ(until_next(&limiter), CTX_MS(300));
    ctx_clock_advance(CTX_MS(200));
    thread_join(threads[0]);
    EXPECT_EQ(first.rc, 0);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_deadline_set_above_ends_a_wait_with_its_err) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx, 1);
    ctx_cancel_cause(ctx, CTX_DEADLINE_EXCEEDED, "a deadline of its own");
    thread_join(thread);
    EXPECT_EQ(w.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_context_that_is_done_takes_nothing) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *late = ctx_with_timeout(ctx_background(), 0);
    ctx_cancel(ctx);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 1), CTX_CANCELED);
    EXPECT_EQ(ctx_limiter_wait(&limiter, late, 1), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(drink(&limiter), 5);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 1), CTX_CANCELED);
    ctx_end(ctx);
    ctx_end(late);
    ctx_clock_real();
}

/* The clock stands, so that a refusal which waited would never return. */
TEST(a_deadline_before_the_tokens_is_refused_at_once_and_takes_nothing) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300) - 1);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 3), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 5), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_end(ctx);
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(300)); /* at the same moment is not before it */
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 3), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(until_next(&limiter), CTX_MS(100));
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_deadline_after_the_tokens_is_waited_for) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(10, 5);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300) + 1);
    waiter_t w;
    pthread_t thread = wait_apart(&w, &limiter, ctx, 3);
    EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 1), CTX_DEADLINE_EXCEEDED); /* behind the other it is too late */
    ctx_clock_advance(CTX_MS(300));
    thread_join(thread);
    EXPECT_EQ(w.rc, 0);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_real_wait_takes_real_time) {
    ctx_limiter_t limiter = empty_limiter(1000, 1);
    int64_t before = test_now_ns();
    for (int i = 0; i < 20; i++) EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), 1), 0);
    EXPECT(test_now_ns() - before >= 19 * 1000000);
}

/* -- bad arguments and extreme rates ---------------------------------------------------------------------------- */

TEST(more_than_the_bucket_holds_is_invalid_at_once) {
    static const int64_t wrong[] = {6, 1000, INT64_MAX, -1, INT64_MIN};
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(10, 5);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        EXPECT(!ctx_limiter_allow(&limiter, wrong[i]));
        EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), wrong[i]), CTX_INVALID);
        EXPECT_EQ(ctx_limiter_reserve(&limiter, wrong[i]), CTX_INVALID);
    }
    EXPECT_EQ(drink(&limiter), 5);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), wrong[i]), CTX_INVALID); /* not: after a wait */
    ctx_clock_real();
}

TEST(init_refuses_rates_that_make_no_sense) {
    static const double rates[] = {0, -1, -DBL_MIN, 1e7 + 1, 1e300, INFINITY, -INFINITY, NAN};
    ctx_limiter_t limiter;
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++)
        EXPECT_EQ(ctx_limiter_init(&limiter, rates[i], 1), CTX_INVALID);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, 0), CTX_INVALID);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, -1), CTX_INVALID);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, INT64_MIN), CTX_INVALID);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, INT64_C(1000000001)), CTX_INVALID);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, INT64_MAX), CTX_INVALID);
}

TEST(a_wait_without_a_context_is_invalid) {
    ctx_limiter_t limiter = limiter_of(10, 5);
    EXPECT_EQ(ctx_limiter_wait(&limiter, NULL, 1), CTX_INVALID);
    EXPECT_EQ(drink(&limiter), 5);
}

TEST(the_fastest_rate_and_the_biggest_burst_are_served) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(1e7, 1000000000);
    EXPECT(ctx_limiter_allow(&limiter, 1000000000));
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    EXPECT_EQ(ctx_limiter_reserve(&limiter, 1000000000), CTX_S(100));
    ctx_clock_advance(CTX_S(200));
    EXPECT(ctx_limiter_allow(&limiter, 1000000000));
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    ctx_clock_real();
}

/* A token that would take ages of the universe to come back: all arithmetic saturates. */
TEST(the_slowest_rates_give_their_burst_and_then_nothing) {
    static const double rates[] = {1e-6, 1e-9, 1e-12, 1e-100, DBL_MIN};
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++) {
        ctx_clock_fake(CTX_S(1000));
        ctx_limiter_t limiter = limiter_of(rates[i], 1);
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
        EXPECT(ctx_limiter_allow(&limiter, 1));
        EXPECT(!ctx_limiter_allow(&limiter, 1));
        EXPECT_EQ(ctx_limiter_wait(&limiter, ctx, 1), CTX_DEADLINE_EXCEEDED);
        EXPECT(until_next(&limiter) > CTX_S(3600));
        ctx_clock_advance(CTX_S(3600));
        EXPECT(!ctx_limiter_allow(&limiter, 1));
        ctx_end(ctx);
        ctx_clock_real();
    }
}

TEST(a_bucket_that_takes_a_century_to_fill_gives_its_burst_and_then_nothing) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = limiter_of(1.0 / 3, 1000000000);
    EXPECT(ctx_limiter_allow(&limiter, 400000000));
    EXPECT(ctx_limiter_allow(&limiter, 600000000));
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    EXPECT(ctx_limiter_reserve(&limiter, 1000000000) > 0);
    EXPECT(ctx_limiter_reserve(&limiter, 1000000000) > 0);
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    ctx_clock_real();
}

TEST(credit_without_end_saturates) {
    ctx_clock_fake(CTX_S(1000));
    ctx_limiter_t limiter = empty_limiter(1e-3, 1000000);
    ctx_dur_t before = 0;
    for (int i = 0; i < 100; i++) { /* 10^18 ns each */
        ctx_dur_t wait = ctx_limiter_reserve(&limiter, 1000000);
        EXPECT(wait >= before && wait > 0);
        before = wait;
    }
    EXPECT(!ctx_limiter_allow(&limiter, 1));
    ctx_clock_real();
}

TEST(the_clock_may_start_anywhere) {
    static const ctx_time_t starts[] = {0, 1, CTX_S(-1000), INT64_MAX / 2};
    for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        ctx_clock_fake(starts[i]);
        ctx_limiter_t limiter = limiter_of(10, 5);
        EXPECT_EQ(drink(&limiter), 5);
        ctx_clock_advance(CTX_MS(100));
        EXPECT_EQ(drink(&limiter), 1);
        EXPECT_EQ(until_next(&limiter), CTX_MS(100));
        ctx_clock_real();
    }
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

typedef struct {
    ctx_limiter_t limiter;
    int over;    /* [atomic] the clock stands again */
    int64_t got; /* [atomic] */
} crowd_t;

static void *takes_what_it_can(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    int64_t got = 0;
    for (int turns = 0; !load(&crowd->over); race_pause(&turns)) {
        int64_t n = 1 + race_below(&seed, 3);
        if (!ctx_limiter_allow(&crowd->limiter, n)) continue;
        if (race_below(&seed, 8) == 0)
            ctx_limiter_refund(&crowd->limiter, n);
        else
            got += n;
    }
    __atomic_add_fetch(&crowd->got, got, __ATOMIC_RELAXED);
    return NULL;
}

static void *turns_the_clock(void *arg) {
    crowd_t *crowd = (crowd_t *)arg;
    for (int i = 0; i < 1000; i++) {
        ctx_clock_advance(CTX_MS(1));
        if (i % 8 == 0) sched_yield();
    }
    store(&crowd->over, 1);
    return NULL;
}

/* Beginning empty, the bucket is too wide to run over, so the sum is exact: what was not taken is still in it. */
TEST(eight_threads_get_what_is_due_and_no_more) {
    ctx_clock_fake(CTX_S(1000));
    crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    crowd.limiter = empty_limiter(10000, 20000);
    pthread_t clock = thread_start(turns_the_clock, &crowd);
    race_run(8, takes_what_it_can, &crowd);
    thread_join(clock);
    EXPECT(crowd.got <= 10000);
    crowd.got += drink(&crowd.limiter);
    EXPECT_EQ(crowd.got, 10000);
    ctx_clock_real();
}

static void *drinks(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    __atomic_add_fetch(&crowd->got, drink(&crowd->limiter), __ATOMIC_RELAXED);
    return NULL;
}

TEST(eight_threads_share_a_burst_to_the_last_token) {
    for (int i = 0; i < 5; i++) {
        int64_t burst = TEST_QUICK ? 100000 : 500000;
        crowd_t crowd;
        memset(&crowd, 0, sizeof crowd);
        ctx_clock_fake(CTX_S(1000));
        crowd.limiter = limiter_of(1, burst);
        race_run(8, drinks, &crowd);
        EXPECT_EQ(crowd.got, burst);
        ctx_clock_real();
    }
}

static void *waits_again_and_again(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    int64_t got = 0;
    for (int i = 0; i < test_scale(300); i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(race_below(&seed, 2000)));
        int64_t n = 1 + race_below(&seed, 4);
        if (ctx_limiter_wait(&crowd->limiter, ctx, n) == 0) got += n;
        ctx_end(ctx);
    }
    __atomic_add_fetch(&crowd->got, got, __ATOMIC_RELAXED);
    return NULL;
}

/* Waits that succeed and waits that give up, on the real clock. */
TEST(eight_threads_that_wait_get_no_more_than_is_due) {
    crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    int64_t before = test_now_ns();
    crowd.limiter = limiter_of(20000, 10);
    race_run(8, waits_again_and_again, &crowd);
    double seconds = (double)(test_now_ns() - before) / 1e9;
    EXPECT(crowd.got > 0);
    EXPECT((double)crowd.got <= 20000 * seconds + 10);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
