/* Errors and time: error codes, durations, the clock and the fake clock. */

static void on_assert(void);
#define CTXCANCEL_ASSERT(x) ((x) ? (void)0 : on_assert())
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

#include <limits.h>
#include <sys/wait.h>

enum { EXIT_ASSERTED = 42 };
static int asserting; /* in a child that is to trip an assertion */

static void on_assert(void) {
    if (asserting) _exit(EXIT_ASSERTED);
    fprintf(stderr, "assertion in the library\n");
    abort();
}

/* -- errors ---------------------------------------------------------------------------------------------------- */

TEST(errors_have_the_numbers_of_errno) {
    CHECK_EQ(CTX_CANCELED, -ECANCELED);
    CHECK_EQ(CTX_DEADLINE_EXCEEDED, -ETIMEDOUT);
    CHECK_EQ(CTX_QUEUE_FULL, -ENOBUFS);
    CHECK_EQ(CTX_CLOSED, -EPIPE);
    CHECK_EQ(CTX_NO_MEMORY, -ENOMEM);
    CHECK_EQ(CTX_INVALID, -EINVAL);
    CHECK_EQ(CTX_NOT_READY, -EAGAIN);
    CHECK_EQ(CTX_ALREADY, -EALREADY);
}

TEST(strerror_names_each_of_our_errors_differently) {
    static const int codes[] = {0,          CTX_CANCELED,  CTX_DEADLINE_EXCEEDED, CTX_QUEUE_FULL,
                                CTX_CLOSED, CTX_NO_MEMORY, CTX_INVALID,           CTX_NOT_READY};
    enum { N = sizeof codes / sizeof codes[0] };
    for (int i = 0; i < N; i++) {
        const char *text = ctx_strerror(codes[i]);
        CHECK(text != NULL && text[0] != '\0');
        CHECK(text == ctx_strerror(codes[i])); /* static */
        for (int j = 0; j < i; j++) CHECK(strcmp(text, ctx_strerror(codes[j])) != 0);
    }
}

TEST(strerror_passes_the_systems_errors_through) {
    CHECK(strcmp(ctx_strerror(-EIO), strerror(EIO)) == 0);
    CHECK(strcmp(ctx_strerror(-ENOENT), strerror(ENOENT)) == 0);
}

/* A reader of an errno must not be misled by what the number means here. */
TEST(strerror_of_shared_numbers_fits_the_systems_meaning_too) {
    CHECK(strstr(ctx_strerror(-EPIPE), "closed") && strstr(ctx_strerror(-EPIPE), "broken pipe"));
    CHECK(strstr(ctx_strerror(-ETIMEDOUT), "deadline exceeded") && strstr(ctx_strerror(-ETIMEDOUT), "timed out"));
    CHECK(strstr(ctx_strerror(-EAGAIN), "not ready") && strstr(ctx_strerror(-EAGAIN), "temporarily unavailable"));
}

TEST(strerror_is_never_null) {
    for (int code = -300; code <= 300; code++) CHECK(ctx_strerror(code) != NULL);
    CHECK(ctx_strerror(INT_MIN) != NULL);
    CHECK(ctx_strerror(INT_MAX) != NULL);
}

/* -- durations ------------------------------------------------------------------------------------------------- */

TEST(durations_are_nanoseconds_in_64_bits) {
    CHECK_EQ(CTX_NS(7), 7);
    CHECK_EQ(CTX_US(7), 7000);
    CHECK_EQ(CTX_MS(7), 7000000);
    CHECK_EQ(CTX_S(7), INT64_C(7000000000));
    int minute = 60; /* an int of the program must not overflow one */
    CHECK_EQ(CTX_S(minute * 60), INT64_C(3600000000000));
    CHECK_EQ(CTX_MS(minute * 1000), INT64_C(60000000000));
    CHECK_EQ(CTX_US(minute * 1000000), INT64_C(60000000000));
    CHECK_EQ(CTX_MS(-3), -3000000);
    CHECK_EQ(sizeof(ctx_time_t), 8);
    CHECK_EQ(sizeof(ctx_dur_t), 8);
    CHECK(CTX_NO_DEADLINE == INT64_MAX && CTX_FOREVER == INT64_MAX);
}

TEST(adding_saturates_at_both_ends) {
    CHECK_EQ(ctx_time_add(5, 7), 12);
    CHECK_EQ(ctx_time_add(5, -7), -2);
    CHECK_EQ(ctx_time_add(0, 0), 0);
    CHECK_EQ(ctx_time_add(1, CTX_FOREVER), CTX_NO_DEADLINE);
    CHECK_EQ(ctx_time_add(CTX_NO_DEADLINE, 1), CTX_NO_DEADLINE);
    CHECK_EQ(ctx_time_add(CTX_NO_DEADLINE, CTX_FOREVER), CTX_NO_DEADLINE);
    CHECK_EQ(ctx_time_add(INT64_MAX - 5, 5), INT64_MAX);
    CHECK_EQ(ctx_time_add(INT64_MAX - 5, 6), INT64_MAX);
    CHECK_EQ(ctx_time_add(INT64_MAX - 5, 4), INT64_MAX - 1);
    CHECK_EQ(ctx_time_add(-1, INT64_MIN), INT64_MIN);
    CHECK_EQ(ctx_time_add(INT64_MIN, -1), INT64_MIN);
    CHECK_EQ(ctx_time_add(INT64_MIN, INT64_MIN), INT64_MIN);
    CHECK_EQ(ctx_time_add(INT64_MIN, INT64_MAX), -1);
    CHECK_EQ(ctx_time_add(INT64_MAX, INT64_MIN), -1);
    CHECK_EQ(ctx_time_add(INT64_MIN + 5, -5), INT64_MIN);
}

/* -- the real clock -------------------------------------------------------------------------------------------- */

TEST(now_is_the_monotonic_clock) {
    for (int i = 0; i < 1000; i++) {
        int64_t before = test_now_ns();
        ctx_time_t now = ctx_now();
        int64_t after = test_now_ns();
        CHECK(before <= now && now <= after);
    }
}

static void *read_the_clock(void *arg) {
    static int64_t latest;
    race_side_t *side = (race_side_t *)arg;
    int back = 0;
    (void)side;
    for (int i = 0, n = test_scale(200000); i < n; i++) {
        int64_t seen = __atomic_load_n(&latest, __ATOMIC_ACQUIRE);
        ctx_time_t now = ctx_now();
        back += now < seen;
        if (now > seen) __atomic_compare_exchange_n(&latest, &seen, now, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
    EXPECT_EQ(back, 0);
    return NULL;
}

TEST(now_never_goes_back_between_threads) { race_run(4, read_the_clock, NULL); }

/* -- the fake clock -------------------------------------------------------------------------------------------- */

TEST(the_fake_clock_shows_its_start_and_stands_still) {
    static const ctx_time_t starts[] = {0, 1, 999999999, INT64_C(1) << 40, INT64_C(1) << 62};
    for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        ctx_clock_fake(starts[i]);
        EXPECT_EQ(ctx_now(), starts[i]);
        test_sleep_ms(2);
        EXPECT_EQ(ctx_now(), starts[i]);
    }
    ctx_clock_real();
}

TEST(the_fake_clock_moves_by_what_it_is_advanced) {
    ctx_clock_fake(CTX_S(5));
    ctx_clock_advance(0);
    EXPECT_EQ(ctx_now(), CTX_S(5));
    ctx_clock_advance(1);
    EXPECT_EQ(ctx_now(), CTX_S(5) + 1);
    ctx_clock_advance(CTX_S(86400) * 365 * 50);
    EXPECT_EQ(ctx_now(), CTX_S(5) + 1 + CTX_S(86400) * 365 * 50);
    ctx_clock_real();
}

TEST(the_fake_clock_saturates_and_no_deadline_never_comes) {
    ctx_clock_fake(INT64_MAX - 10);
    ctx_t *never = ctx_with_deadline(ctx_background(), CTX_NO_DEADLINE);
    ctx_t *last = ctx_with_deadline(ctx_background(), INT64_MAX - 1);
    ctx_t *forever = ctx_with_timeout(ctx_background(), CTX_S(30)); /* saturates: no deadline */
    EXPECT_EQ(ctx_deadline(forever), CTX_NO_DEADLINE);
    ctx_clock_advance(8);
    EXPECT_EQ(ctx_err(last), 0);
    ctx_clock_advance(CTX_FOREVER);
    EXPECT_EQ(ctx_now(), INT64_MAX);
    EXPECT_EQ(ctx_err(last), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(never), 0);
    EXPECT_EQ(ctx_err(forever), 0);
    ctx_end(never);
    ctx_end(last);
    ctx_end(forever);
    ctx_clock_real();
}

TEST(thirty_seconds_pass_in_microseconds) {
    ctx_clock_fake(CTX_S(1000));
    for (int i = 0; i < 1000; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
        ctx_clock_advance(CTX_S(30) - 1);
        CHECK_EQ(ctx_err(ctx), 0);
        CHECK_EQ(ctx_remaining(ctx), 1);
        ctx_clock_advance(1);
        CHECK_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
        CHECK_EQ(ctx_remaining(ctx), 0);
        ctx_end(ctx);
    }
    ctx_clock_real();
}

static ctx_time_t read_at; /* what the last note_time() saw */
static pthread_t read_by;

static void note_time(void *arg) {
    (void)arg;
    read_at = ctx_now();
    read_by = pthread_self();
}

TEST(a_callback_reads_its_own_deadline_and_runs_in_the_advancing_thread) {
    ctx_clock_fake(CTX_S(1));
    for (int i = 1; i <= 100; i++) {
        ctx_time_t deadline = ctx_now() + CTX_MS(i) + i;
        ctx_t *ctx = ctx_with_deadline(ctx_background(), deadline);
        ctx_on_done_t reg;
        EXPECT(ctx_on_done(&reg, ctx, note_time, NULL));
        ctx_clock_advance(CTX_S(10));
        EXPECT_EQ(read_at, deadline);
        EXPECT(pthread_equal(read_by, pthread_self()));
        ctx_end(ctx);
    }
    ctx_clock_real();
}

/* Waiters on the fake clock: each measures in fake time how long it was away. */
typedef struct {
    ctx_t *ctx;
    ctx_dur_t dur;
    ctx_dur_t away;
    int rc;
    int done; /* [atomic] */
} sleeper_t;

static void *sleep_on_fake_clock(void *arg) {
    sleeper_t *sleeper = (sleeper_t *)arg;
    ctx_time_t from = ctx_now();
    sleeper->rc = ctx_sleep(sleeper->ctx, sleeper->dur);
    sleeper->away = ctx_now() - from;
    store(&sleeper->done, 1);
    return NULL;
}

static void *wait_on_fake_clock(void *arg) {
    sleeper_t *sleeper = (sleeper_t *)arg;
    ctx_time_t from = ctx_now();
    sleeper->rc = ctx_wait(sleeper->ctx, sleeper->dur);
    sleeper->away = ctx_now() - from;
    store(&sleeper->done, 1);
    return NULL;
}

/* Advance until all of them are back. A sleeper may take its time from now whenever it gets to it, so how far the
   clock gets is not known, but none may be back early, and all must come back. */
static void advance_until_back(sleeper_t *sleepers, int n, ctx_dur_t step) {
    for (int i = 0; i < n; i++) {
        while (!load(&sleepers[i].done)) {
            ctx_clock_advance(step);
            sched_yield();
        }
    }
}

static void check_sleepers(void *(*fn)(void *), int expected) {
    enum { N = 8 };
    sleeper_t sleepers[N];
    pthread_t threads[N];
    ctx_clock_fake(CTX_S(1));
    for (int i = 0; i < N; i++) {
        memset(&sleepers[i], 0, sizeof sleepers[i]);
        sleepers[i].ctx = ctx_background();
        sleepers[i].dur = CTX_S(30) + CTX_MS(i);
        threads[i] = thread_start(fn, &sleepers[i]);
    }
    advance_until_back(sleepers, N, CTX_MS(300));
    for (int i = 0; i < N; i++) {
        pthread_join(threads[i], NULL);
        EXPECT_EQ(sleepers[i].rc, expected);
        EXPECT(sleepers[i].away >= sleepers[i].dur);
    }
    ctx_clock_real();
}

TEST(sleepers_wake_when_the_fake_clock_gets_there) { check_sleepers(sleep_on_fake_clock, 0); }

TEST(a_bounded_wait_gives_up_when_the_fake_clock_gets_there) { check_sleepers(wait_on_fake_clock, CTX_NOT_READY); }

TEST(a_waiter_is_unparked_by_the_advance_that_expires_its_context) {
    for (int round = 0, rounds = test_scale(500); round < rounds; round++) {
        ctx_clock_fake(CTX_S(round));
        sleeper_t sleeper;
        memset(&sleeper, 0, sizeof sleeper);
        sleeper.ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
        sleeper.dur = CTX_FOREVER;
        pthread_t thread = thread_start(wait_on_fake_clock, &sleeper);
        for (int i = 0; i < round % 8; i++) sched_yield(); /* so that some are parked by then and some are not */
        ctx_clock_advance(CTX_S(30) - 1);
        EXPECT_EQ(load(&sleeper.done), 0);
        ctx_clock_advance(1);
        EXPECT_EQ(ctx_err(sleeper.ctx), CTX_DEADLINE_EXCEEDED);
        pthread_join(thread, NULL); /* no further advance: a lost wake-up hangs here */
        EXPECT_EQ(sleeper.rc, CTX_DEADLINE_EXCEEDED);
        ctx_end(sleeper.ctx);
    }
    ctx_clock_real();
}

TEST(a_cancel_wakes_a_sleeper_while_the_fake_clock_stands) {
    ctx_clock_fake(0);
    sleeper_t sleeper;
    memset(&sleeper, 0, sizeof sleeper);
    sleeper.ctx = ctx_with_cancel(ctx_background());
    sleeper.dur = CTX_S(30);
    pthread_t thread = thread_start(sleep_on_fake_clock, &sleeper);
    ctx_cancel(sleeper.ctx);
    pthread_join(thread, NULL);
    EXPECT_EQ(sleeper.rc, CTX_CANCELED);
    EXPECT_EQ(sleeper.away, 0);
    ctx_end(sleeper.ctx);
    ctx_clock_real();
}

/* The wheel has to follow the clock to wherever it is set, back as well as forth. */
TEST(each_clock_may_start_before_or_after_the_last_one) {
    static const ctx_time_t starts[] = {CTX_S(1000000), 5, INT64_C(1) << 61, CTX_S(3), 0, CTX_S(77)};
    for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        ctx_clock_fake(starts[i]);
        ctx_t *soon = ctx_with_timeout(ctx_background(), 1000);
        ctx_t *late = ctx_with_timeout(ctx_background(), CTX_S(100));
        ctx_clock_advance(999);
        EXPECT_EQ(ctx_err(soon), 0);
        ctx_clock_advance(1);
        EXPECT_EQ(ctx_err(soon), CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_err(late), 0);
        ctx_clock_advance(CTX_S(100) - 1001);
        EXPECT_EQ(ctx_err(late), 0);
        ctx_clock_advance(1);
        EXPECT_EQ(ctx_err(late), CTX_DEADLINE_EXCEEDED);
        ctx_end(soon);
        ctx_end(late);

        ctx_clock_real();
        ctx_time_t from = ctx_now();
        ctx_t *real = ctx_with_timeout(ctx_background(), CTX_MS(2));
        EXPECT_EQ(ctx_wait(real, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        EXPECT(test_now_ns() >= from + CTX_MS(2));
        ctx_end(real);
    }
}

TEST(the_real_clock_comes_back) {
    ctx_clock_fake(0);
    ctx_clock_real();
    int64_t before = test_now_ns();
    ctx_time_t now = ctx_now();
    CHECK(before <= now && now <= test_now_ns());
}

TEST(advancing_the_real_clock_trips_an_assertion) {
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        asserting = 1;
        ctx_clock_advance(CTX_S(1));
        _exit(0);
    }
    int status = 0;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), EXIT_ASSERTED);
}

TEST(the_runtime_ends_clean) { ctx_runtime_stop(); }

/* The runtime thread may be about to turn the wheels by the real time when the clock is replaced. */
TEST(the_runtime_thread_leaves_the_wheels_to_the_fake_clock) {
    int missed = 0;
    for (int round = 0, n = test_scale(3000); round < n; round++) {
        ctx_t *real = ctx_with_timeout(ctx_background(), CTX_US(1 + round % 60));
        for (volatile int spin = 0; spin < round % 400; spin = spin + 1) {
        }
        ctx_clock_fake(CTX_S(1));
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
        missed += ctx_err(ctx) != 0;
        ctx_clock_advance(CTX_S(30));
        missed += ctx_err(ctx) != CTX_DEADLINE_EXCEEDED;
        ctx_end(ctx);
        ctx_clock_real();
        ctx_end(real);
    }
    EXPECT_EQ(missed, 0);
}

TEST_MAIN
