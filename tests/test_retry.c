/* Section 12, retry: how often, how long between, and when to give up. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"

#include <float.h>
#include <math.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

static ctx_retry_desc_t describe(int attempts, ctx_dur_t base) {
    ctx_retry_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.attempts = attempts;
    desc.base = base;
    return desc;
}

/* Work that fails with -1, -2, -3 ..., until the call that is to succeed, or is one too many for any test. */
enum { CALLS = 64, RUNAWAY = 100000 };
typedef struct {
    ctx_t *ctx;
    const ctx_retry_desc_t *desc;
    int succeeds_at; /* 0: never */
    int cancels_at;  /* the call that cancels the context */
    int calls;       /* [atomic] */
    ctx_time_t at[CALLS];
    int tid, done; /* [atomic] of retry_apart() */
    int rc;
    ctx_time_t end;
} work_t;

static work_t work_below(ctx_t *ctx, const ctx_retry_desc_t *desc) {
    work_t work;
    memset(&work, 0, sizeof work);
    work.ctx = ctx;
    work.desc = desc;
    return work;
}

static int tries(ctx_t *ctx, void *arg) {
    work_t *work = (work_t *)arg;
    int call = load(&work->calls) + 1;
    EXPECT(ctx == work->ctx);
    if (call <= CALLS) work->at[call - 1] = ctx_now();
    if (call == work->cancels_at) ctx_cancel(ctx);
    store(&work->calls, call);
    return call == work->succeeds_at || call > RUNAWAY ? 0 : -call;
}

static void *retries(void *arg) {
    work_t *work = (work_t *)arg;
    store(&work->tid, thread_id());
    work->rc = ctx_retry(work->ctx, work->desc, tries, work);
    work->end = ctx_now();
    store(&work->done, 1);
    return NULL;
}

static pthread_t retry_apart(work_t *work) { return thread_start(retries, work); }

/* The calls made so far, once the work waits for the next or has ended. */
static int settled_calls(work_t *work) {
    until_asleep(&work->tid);
    return load(&work->calls);
}

/* Expect the next call of the work after this wait exactly. */
static void expect_wait(work_t *work, ctx_dur_t wait) {
    int calls = settled_calls(work);
    ctx_clock_advance(wait - 1);
    EXPECT_EQ(settled_calls(work), calls);
    ctx_clock_advance(1);
    UNTIL(load(&work->calls) == calls + 1);
}

/* Run the work on a fake clock, expecting these waits between its calls and none after. */
static void expect_waits_by(work_t *work, const ctx_dur_t *waits, int n, int rc) {
    pthread_t thread = retry_apart(work);
    for (int i = 0; i < n; i++) expect_wait(work, waits[i]);
    thread_join(thread);
    EXPECT_EQ(work->rc, rc);
    EXPECT_EQ(load(&work->calls), n + 1);
    for (int i = 0; i < n; i++) EXPECT_EQ(work->at[i + 1] - work->at[i], waits[i]);
    EXPECT_EQ(work->end, work->at[n]); /* gone without waiting again */
}

static void expect_waits(work_t *work, const ctx_dur_t *waits, int n, int rc) {
    ctx_clock_fake(CTX_S(1000));
    expect_waits_by(work, waits, n, rc);
    ctx_clock_real();
}

/* -- attempts --------------------------------------------------------------------------------------------------- */

TEST(what_succeeds_at_first_is_called_once) {
    ctx_retry_desc_t desc = describe(5, CTX_S(3600));
    work_t work = work_below(ctx_background(), &desc);
    work.succeeds_at = 1;
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, tries, &work), 0);
    EXPECT_EQ(work.calls, 1);
}

TEST(what_succeeds_at_the_third_call_is_a_success) {
    static const ctx_dur_t waits[] = {CTX_MS(10), CTX_MS(20)};
    ctx_retry_desc_t desc = describe(5, CTX_MS(10));
    work_t work = work_below(ctx_background(), &desc);
    work.succeeds_at = 3;
    expect_waits(&work, waits, 2, 0);
}

TEST(the_error_of_the_last_attempt_is_the_result) {
    static const ctx_dur_t waits[] = {CTX_MS(10), CTX_MS(20), CTX_MS(40)};
    for (int attempts = 1; attempts <= 4; attempts++) {
        ctx_retry_desc_t desc = describe(attempts, CTX_MS(10));
        work_t work = work_below(ctx_background(), &desc);
        expect_waits(&work, waits, attempts - 1, -attempts);
    }
}

TEST(a_single_attempt_never_waits) {
    ctx_retry_desc_t desc = describe(1, CTX_S(3600));
    work_t work = work_below(ctx_background(), &desc);
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, tries, &work), -1);
    EXPECT_EQ(work.calls, 1);
}

static int gives_seven(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 7;
}

TEST(anything_but_zero_is_a_failure) {
    int calls = 0;
    ctx_retry_desc_t desc = describe(4, 1);
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, gives_seven, &calls), 7);
    EXPECT_EQ(calls, 4);
}

TEST(negative_attempts_go_on_until_the_context_is_done) {
    ctx_retry_desc_t desc = describe(-1, 1);
    desc.cap = 1;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    work_t work = work_below(ctx, &desc);
    work.cancels_at = 500;
    EXPECT_EQ(ctx_retry(ctx, &desc, tries, &work), CTX_CANCELED);
    EXPECT_EQ(work.calls, 500);
    ctx_end(ctx);
}

static bool below_four(int rc, void *arg) {
    work_t *work = (work_t *)arg;
    EXPECT_EQ(rc, -load(&work->calls)); /* asked about each error, by the thread that got it */
    return rc > -4;
}

TEST(an_error_that_is_not_retryable_is_the_result) {
    static const ctx_dur_t waits[] = {CTX_MS(10), CTX_MS(20), CTX_MS(40)};
    ctx_retry_desc_t desc = describe(9, CTX_MS(10));
    desc.retryable = below_four;
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 3, -4);
}

/* -- the waits between ------------------------------------------------------------------------------------------ */

TEST(without_a_description_there_are_three_attempts_100_and_200_ms_apart) {
    static const ctx_dur_t waits[] = {CTX_MS(100), CTX_MS(200)};
    work_t work = work_below(ctx_background(), NULL);
    expect_waits(&work, waits, 2, -3);
}

TEST(by_default_waits_double_up_to_ten_seconds) {
    static const ctx_dur_t waits[] = {CTX_MS(100),  CTX_MS(200),  CTX_MS(400), CTX_MS(800), CTX_MS(1600),
                                      CTX_MS(3200), CTX_MS(6400), CTX_S(10),   CTX_S(10),   CTX_S(10)};
    ctx_retry_desc_t desc = describe(11, 0);
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 10, -11);
}

TEST(each_wait_is_the_factor_times_the_one_before) {
    static const ctx_dur_t waits[] = {CTX_MS(1000), CTX_MS(1500), CTX_MS(2250), CTX_MS(3375)};
    ctx_retry_desc_t desc = describe(5, CTX_S(1));
    desc.factor = 1.5;
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 4, -5);
}

TEST(a_factor_of_one_keeps_the_waits_equal) {
    static const ctx_dur_t waits[] = {CTX_MS(7), CTX_MS(7), CTX_MS(7)};
    ctx_retry_desc_t desc = describe(4, CTX_MS(7));
    desc.factor = 1;
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 3, -4);
}

TEST(no_wait_is_longer_than_the_cap) {
    static const ctx_dur_t waits[] = {CTX_MS(10), CTX_MS(25), CTX_MS(25)};
    ctx_retry_desc_t desc = describe(4, CTX_MS(10));
    desc.factor = 3;
    desc.cap = CTX_MS(25);
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 3, -4);
}

TEST(a_cap_below_the_base_holds_from_the_first_wait) {
    static const ctx_dur_t waits[] = {CTX_MS(4), CTX_MS(4)};
    ctx_retry_desc_t desc = describe(3, CTX_MS(10));
    desc.cap = CTX_MS(4);
    work_t work = work_below(ctx_background(), &desc);
    expect_waits(&work, waits, 2, -3);
}

/* Waits that no 64 bits hold are as long as the cap. */
TEST(a_wait_past_all_numbers_is_the_cap) {
    static const ctx_dur_t waits[] = {CTX_S(1), CTX_S(86400), CTX_S(86400), CTX_S(86400)};
    static const double factors[] = {1e30, DBL_MAX};
    for (int i = 0; i < 2; i++) {
        ctx_retry_desc_t desc = describe(5, CTX_S(1));
        desc.factor = factors[i];
        desc.cap = CTX_S(86400);
        work_t work = work_below(ctx_background(), &desc);
        expect_waits(&work, waits, 4, -5);
    }
}

TEST(a_wait_for_ever_is_given_up_at_once_where_there_is_a_deadline) {
    static const ctx_dur_t waits[] = {CTX_S(1)};
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(-1, CTX_S(1));
    desc.factor = DBL_MAX;
    desc.cap = CTX_FOREVER;
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(1000000));
    work_t work = work_below(ctx, &desc);
    expect_waits_by(&work, waits, 1, -2);
    ctx_end(ctx);
    ctx_clock_real();
}

/* Advance to the earliest, the middle and the latest moment of each wait; count the halves in which they ended. */
static void expect_random_waits(double jitter, ctx_dur_t least, int *early, int *late) {
    enum { WAITS = 40 };
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(WAITS + 1, CTX_MS(100));
    desc.factor = 1;
    desc.jitter = jitter;
    work_t work = work_below(ctx_background(), &desc);
    pthread_t thread = retry_apart(&work);
    for (int i = 1; i <= WAITS; i++) {
        EXPECT_EQ(settled_calls(&work), i);
        ctx_clock_advance(least > 0 ? least - 1 : 0);
        EXPECT_EQ(settled_calls(&work), i);
        ctx_clock_advance((CTX_MS(100) - least) / 2);
        if (settled_calls(&work) == i + 1) {
            *early += 1;
            continue; /* and the next wait begins here */
        }
        ctx_clock_advance(CTX_MS(100));
        UNTIL(load(&work.calls) >= i + 1);
        *late += 1;
    }
    thread_join(thread);
    EXPECT_EQ(work.rc, -WAITS - 1);
    ctx_clock_real();
}

TEST(half_a_jitter_waits_between_half_and_all) {
    int early = 0, late = 0;
    expect_random_waits(0.5, CTX_MS(50), &early, &late);
    EXPECT(early > 3 && late > 3); /* of 40, and each as likely */
}

TEST(a_tenth_of_jitter_waits_between_nine_tenths_and_all) {
    int early = 0, late = 0;
    expect_random_waits(0.1, CTX_MS(90), &early, &late);
    EXPECT(early > 3 && late > 3);
}

TEST(full_jitter_waits_between_nothing_and_all) {
    int early = 0, late = 0;
    expect_random_waits(1, 1, &early, &late);
    EXPECT(early > 3 && late > 3);
}

/* The waits of 40 retries that begin together: with jitter they come back at many different times. */
TEST(no_jitter_waits_longer_than_the_whole) {
    enum { N = 40 };
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(2, CTX_MS(100));
    desc.jitter = 0.5;
    static work_t work[N];
    pthread_t threads[N];
    for (int i = 0; i < N; i++) {
        work[i] = work_below(ctx_background(), &desc);
        threads[i] = retry_apart(&work[i]);
    }
    for (int i = 0; i < N; i++) EXPECT_EQ(settled_calls(&work[i]), 1);
    ctx_clock_advance(CTX_MS(100));
    for (int i = 0; i < N; i++) UNTIL(load(&work[i].done));
    for (int i = 0; i < N; i++) thread_join(threads[i]);
    ctx_clock_real();
}

TEST(a_real_wait_takes_real_time) {
    ctx_retry_desc_t desc = describe(3, CTX_MS(5));
    work_t work = work_below(ctx_background(), &desc);
    int64_t before = test_now_ns();
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, tries, &work), -3);
    EXPECT(test_now_ns() - before >= 15 * 1000000);
}

/* -- giving up -------------------------------------------------------------------------------------------------- */

TEST(nothing_is_called_when_the_context_is_done_already) {
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *late = ctx_with_timeout(ctx_background(), 0);
    ctx_cancel(ctx);
    work_t work = work_below(ctx, NULL);
    EXPECT_EQ(ctx_retry(ctx, NULL, tries, &work), CTX_CANCELED);
    EXPECT_EQ(ctx_retry(late, NULL, tries, &work), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(work.calls, 0);
    ctx_end(ctx);
    ctx_end(late);
}

TEST(a_cancel_ends_a_wait_at_once_with_the_err) {
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(5, CTX_S(3600));
    desc.cap = CTX_S(3600);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    work_t work = work_below(ctx, &desc);
    pthread_t thread = retry_apart(&work);
    EXPECT_EQ(settled_calls(&work), 1);
    ctx_cancel(ctx); /* the clock stands: only this can end it */
    thread_join(thread);
    EXPECT_EQ(work.rc, CTX_CANCELED);
    EXPECT_EQ(work.calls, 1);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_context_that_ends_during_an_attempt_is_the_end_of_all) {
    ctx_retry_desc_t desc = describe(5, CTX_S(3600));
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    work_t work = work_below(ctx, &desc);
    work.cancels_at = 1;
    EXPECT(ctx_retry(ctx, &desc, tries, &work) < 0);
    EXPECT_EQ(work.calls, 1);
    ctx_end(ctx);
}

TEST(a_success_counts_though_the_context_ended_during_it) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    work_t work = work_below(ctx, NULL);
    work.cancels_at = work.succeeds_at = 1;
    EXPECT_EQ(ctx_retry(ctx, NULL, tries, &work), 0);
    EXPECT_EQ(work.calls, 1);
    ctx_end(ctx);
}

TEST(a_wait_that_does_not_fit_before_the_deadline_is_not_begun) {
    static const ctx_dur_t waits[] = {CTX_MS(100)};
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(5, CTX_MS(100));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300) - 1);
    work_t work = work_below(ctx, &desc);
    expect_waits_by(&work, waits, 1, -2); /* which looks that it ended at the time of the second call */
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_wait_that_ends_just_at_the_deadline_is_not_begun) {
    static const ctx_dur_t waits[] = {CTX_MS(100)};
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(5, CTX_MS(100));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300));
    work_t work = work_below(ctx, &desc);
    expect_waits_by(&work, waits, 1, -2);
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
    ctx_clock_real();
}

static int takes_until_the_deadline(ctx_t *ctx, void *arg) {
    (void)ctx;
    ctx_clock_advance(*(const ctx_dur_t *)arg);
    return -9;
}

/* Whether the runtime has already noticed it or not: the error of the attempt says more. */
TEST(an_attempt_that_lasts_until_the_deadline_or_longer_has_the_last_word) {
    for (int longer = 0; longer < 2; longer++) {
        ctx_clock_fake(CTX_S(1000));
        ctx_dur_t takes = CTX_MS(300) + longer;
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300));
        EXPECT_EQ(ctx_retry(ctx, NULL, takes_until_the_deadline, &takes), -9);
        ctx_end(ctx);
        ctx_clock_real();
    }
}

TEST(a_wait_that_just_fits_before_the_deadline_is_made) {
    static const ctx_dur_t waits[] = {CTX_MS(100), CTX_MS(200)};
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(5, CTX_MS(100));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(300) + 1);
    work_t work = work_below(ctx, &desc);
    expect_waits_by(&work, waits, 2, -3);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(negative_attempts_end_before_the_deadline_too) {
    static const ctx_dur_t waits[] = {CTX_MS(100), CTX_MS(100), CTX_MS(100)};
    ctx_clock_fake(CTX_S(1000));
    ctx_retry_desc_t desc = describe(-1, CTX_MS(100));
    desc.factor = 1;
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(350));
    work_t work = work_below(ctx, &desc);
    expect_waits_by(&work, waits, 3, -4);
    ctx_end(ctx);
    ctx_clock_real();
}

/* Eight that fail and wait, for real, until one context ends. */
typedef struct {
    ctx_t *ctx;
    int calls[8]; /* [atomic] */
} eight_t;

static void *retries_until_canceled(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    eight_t *eight = (eight_t *)side->shared;
    ctx_retry_desc_t desc = describe(-1, CTX_US(20));
    desc.cap = CTX_US(100);
    desc.jitter = 1;
    EXPECT_EQ(ctx_retry(eight->ctx, &desc, gives_seven, &eight->calls[side->id]), CTX_CANCELED);
    return NULL;
}

static void *cancels_when_all_are_at_it(void *arg) {
    eight_t *eight = (eight_t *)arg;
    for (int i = 0; i < 8; i++) UNTIL(load(&eight->calls[i]) > 2);
    ctx_cancel(eight->ctx);
    return NULL;
}

TEST(eight_retries_below_one_context_end_with_it) {
    eight_t eight;
    memset(&eight, 0, sizeof eight);
    eight.ctx = ctx_with_cancel(ctx_background());
    pthread_t canceler = thread_start(cancels_when_all_are_at_it, &eight);
    race_run(8, retries_until_canceled, &eight);
    thread_join(canceler);
    ctx_end(eight.ctx);
}

/* -- a timeout for each attempt --------------------------------------------------------------------------------- */

static const ctx_key_t number_key = CTX_KEY(int);

/* What attempts shall do, and what they saw. */
typedef struct {
    ctx_t *ctx; /* of ctx_retry() */
    ctx_dur_t timeout;
    int run_out;        /* so many attempts go on until their contexts are done */
    int calls;          /* [atomic] */
    int tid;            /* [atomic] of the thread in ctx_retry() */
    ctx_t *last;        /* the context of the last one */
    int succeeds_at;    /* 0: never */
    ctx_dur_t waits[8]; /* what on_retry writes; -2: leaves it */
    ctx_dur_t seen[8];  /* what it finds */
    int seen_rc[8];
    int retries;    /* [atomic] calls of on_retry */
    int refuses_at; /* the call that refuses */
    bool cancels;   /* on_retry cancels the context */
} attempts_t;

static int no_wait(int attempt, int rc, ctx_dur_t *wait, void *arg) {
    (void)attempt;
    (void)rc;
    (void)arg;
    *wait = 0;
    return 0;
}

static int attempt_below(ctx_t *ctx, void *arg) {
    attempts_t *a = (attempts_t *)arg;
    a->calls++;
    EXPECT(ctx != a->ctx);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_deadline(ctx), ctx_now() + a->timeout); /* the clock is fake */
    EXPECT(ctx_value(ctx, &number_key) && *(const int *)ctx_value(ctx, &number_key) == 7);
    if (a->last) EXPECT(ctx != a->last && ctx_err(a->last) != 0); /* the one before has ended */
    ctx_release(a->last);
    a->last = ctx_retain(ctx);
    if (a->calls > a->run_out) return 0;
    ctx_clock_advance(a->timeout);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(a->ctx), 0);
    return ctx_err(ctx);
}

TEST(each_attempt_has_a_child_with_its_own_timeout) {
    const int seven = 7;
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_with_value(ctx_background(), &number_key, &seven);
    a.timeout = CTX_MS(30);
    a.run_out = 2;
    ctx_retry_desc_t desc = describe(5, 0);
    desc.attempt_timeout = a.timeout;
    desc.on_retry = no_wait;
    EXPECT_EQ(ctx_retry(a.ctx, &desc, attempt_below, &a), 0);
    EXPECT_EQ(a.calls, 3);
    EXPECT(ctx_err(a.last) != 0); /* ended, though it had succeeded */
    EXPECT_EQ(ctx_err(a.ctx), 0);
    a.calls = 0;
    a.run_out = 9;
    EXPECT_EQ(ctx_retry(a.ctx, &desc, attempt_below, &a), CTX_DEADLINE_EXCEEDED); /* of the last attempt */
    EXPECT_EQ(a.calls, 5);
    ctx_release(a.last);
    ctx_end(a.ctx);
    ctx_clock_real();
}

static int gives_its_err(ctx_t *ctx, void *arg) {
    add((int *)arg, 1);
    return ctx_err(ctx);
}

TEST(a_negative_attempt_timeout_has_expired) {
    int calls = 0;
    ctx_retry_desc_t desc = describe(3, 1);
    desc.attempt_timeout = -1;
    EXPECT_EQ(ctx_retry(ctx_background(), &desc, gives_its_err, &calls), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(calls, 3);
}

static int is_the_context(ctx_t *ctx, void *arg) { return ctx == (ctx_t *)arg ? 0 : -1; }

TEST(without_an_attempt_timeout_no_context_is_made) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_retry_desc_t desc = describe(1, 0);
    EXPECT_EQ(ctx_retry(ctx, &desc, is_the_context, ctx), 0);
    ctx_end(ctx);
}

/* -- on_retry --------------------------------------------------------------------------------------------------- */

static int fails_by_number(ctx_t *ctx, void *arg) {
    attempts_t *a = (attempts_t *)arg;
    int call = add(&a->calls, 1);
    EXPECT(ctx == a->ctx);
    return call == a->succeeds_at ? 0 : -call;
}

static int decides(int attempt, int rc, ctx_dur_t *wait, void *arg) {
    attempts_t *a = (attempts_t *)arg;
    int i = load(&a->retries);
    EXPECT_EQ(attempt, load(&a->calls));
    a->seen[i] = *wait;
    a->seen_rc[i] = rc;
    if (a->waits[i] != -2) *wait = a->waits[i];
    if (a->cancels) ctx_cancel(a->ctx);
    store(&a->retries, i + 1);
    return i + 1 == a->refuses_at ? 77 : 0;
}

static void *retries_and_is_asked(void *arg) {
    attempts_t *a = (attempts_t *)arg;
    ctx_retry_desc_t desc = describe(4, CTX_MS(10));
    desc.cap = CTX_MS(100);
    desc.on_retry = decides;
    store(&a->tid, thread_id());
    EXPECT_EQ(ctx_retry(a->ctx, &desc, fails_by_number, a), -4);
    return NULL;
}

/* The second wait is changed, beyond the cap; the third is what it would have been. */
TEST(on_retry_changes_the_wait_that_comes) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_background();
    a.waits[0] = a.waits[2] = -2;
    a.waits[1] = CTX_S(30);
    pthread_t thread = thread_start(retries_and_is_asked, &a);
    const ctx_dur_t waits[] = {CTX_MS(10), CTX_S(30), CTX_MS(40)};
    for (int i = 0; i < 3; i++) {
        UNTIL(load(&a.retries) == i + 1);
        until_asleep(&a.tid);
        ctx_clock_advance(waits[i] - 1);
        until_asleep(&a.tid);
        EXPECT_EQ(load(&a.calls), i + 1);
        ctx_clock_advance(1);
        UNTIL(load(&a.calls) == i + 2);
    }
    thread_join(thread);
    EXPECT_EQ(a.retries, 3); /* none after the last attempt */
    for (int i = 0; i < 3; i++) EXPECT_EQ(a.seen[i], CTX_MS(10) << i);
    for (int i = 0; i < 3; i++) EXPECT_EQ(a.seen_rc[i], -1 - i);
    ctx_clock_real();
}

/* ctx_retry() on the fake clock, which nobody moves: it must not wait. */
static int retry_at_once(attempts_t *a, int attempts, bool (*retryable)(int rc, void *arg)) {
    ctx_retry_desc_t desc = describe(attempts, CTX_S(3600));
    desc.on_retry = decides;
    desc.retryable = retryable;
    a->calls = a->retries = 0;
    return ctx_retry(a->ctx, &desc, fails_by_number, a);
}

TEST(a_negative_wait_is_none) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_background();
    a.waits[0] = -1;
    a.waits[1] = INT64_MIN;
    a.succeeds_at = 4;
    EXPECT_EQ(retry_at_once(&a, 5, NULL), 0);
    EXPECT_EQ(a.calls, 4);
    ctx_clock_real();
}

static bool never_again(int rc, void *arg) {
    (void)rc;
    (void)arg;
    return false;
}

TEST(on_retry_may_refuse_and_the_result_is_that_of_the_attempt) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_background();
    a.refuses_at = 3;
    EXPECT_EQ(retry_at_once(&a, 9, NULL), -3);
    EXPECT_EQ(a.calls, 3);
    EXPECT_EQ(a.retries, 3);
    EXPECT_EQ(retry_at_once(&a, 9, never_again), -1); /* nobody is asked about an error that is final */
    EXPECT_EQ(a.retries, 0);
    EXPECT_EQ(retry_at_once(&a, 1, NULL), -1); /* nor after the last attempt */
    EXPECT_EQ(a.retries, 0);
    ctx_clock_real();
}

TEST(a_wait_that_was_changed_obeys_the_deadline) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_with_timeout(ctx_background(), CTX_S(1));
    a.waits[0] = CTX_S(1);
    EXPECT_EQ(retry_at_once(&a, 9, NULL), -1);
    EXPECT_EQ(a.calls, 1);
    a.waits[0] = 0; /* shortened: an hour would not fit */
    a.waits[1] = CTX_FOREVER;
    EXPECT_EQ(retry_at_once(&a, 9, NULL), -2);
    EXPECT_EQ(ctx_now(), CTX_S(1000));
    ctx_end(a.ctx);
    ctx_clock_real();
}

TEST(a_cancel_in_on_retry_ends_the_retry) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    ctx_clock_fake(CTX_S(1000));
    a.ctx = ctx_with_cancel(ctx_background());
    a.waits[0] = -2;
    a.cancels = true;
    EXPECT_EQ(retry_at_once(&a, 9, NULL), CTX_CANCELED);
    EXPECT_EQ(a.calls, 1);
    ctx_end(a.ctx);
    ctx_clock_real();
}

static int cancels_and_fails(ctx_t *ctx, void *arg) {
    ((attempts_t *)arg)->calls++;
    ctx_cancel(ctx);
    return -5;
}

TEST(on_retry_is_not_asked_once_the_context_is_done) {
    attempts_t a;
    memset(&a, 0, sizeof a);
    a.ctx = ctx_with_cancel(ctx_background());
    ctx_retry_desc_t desc = describe(9, CTX_S(3600));
    desc.on_retry = decides;
    EXPECT_EQ(ctx_retry(a.ctx, &desc, cancels_and_fails, &a), CTX_CANCELED);
    EXPECT_EQ(a.calls, 1);
    EXPECT_EQ(a.retries, 0);
    ctx_end(a.ctx);
}

/* -- bad arguments ---------------------------------------------------------------------------------------------- */

TEST(bad_arguments_are_invalid_and_nothing_is_called) {
    enum { WRONG = 9 };
    ctx_retry_desc_t desc[WRONG];
    work_t work = work_below(ctx_background(), NULL);
    for (int i = 0; i < WRONG; i++) desc[i] = describe(2, CTX_MS(1));
    desc[0].base = -1;
    desc[1].cap = -1;
    desc[2].factor = 0.5;
    desc[3].factor = -1;
    desc[4].factor = NAN;
    desc[5].jitter = -0.1;
    desc[6].jitter = 1.1;
    desc[7].jitter = NAN;
    desc[8].base = INT64_MIN;
    for (int i = 0; i < WRONG; i++) EXPECT_EQ(ctx_retry(ctx_background(), &desc[i], tries, &work), CTX_INVALID);
    EXPECT_EQ(ctx_retry(NULL, NULL, tries, &work), CTX_INVALID);
    EXPECT_EQ(ctx_retry(ctx_background(), NULL, NULL, &work), CTX_INVALID);
    EXPECT_EQ(work.calls, 0);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
