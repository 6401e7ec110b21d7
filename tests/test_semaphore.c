/* Section 8: permits, taken in the order of arrival, and never lost to a cancel. */
#include "fault.h"

/* A failed assertion ends a child of fork() with a status of its own, NDEBUG or not. */
#define ASSERTED 77
static int asserts_expected;
static void assertion_failed(const char *what);
#define CTXCANCEL_ASSERT(x) ((x) ? (void)0 : assertion_failed(#x))

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

#include <sys/wait.h>

static void assertion_failed(const char *what) {
    if (asserts_expected) _exit(ASSERTED);
    fprintf(stderr, "assertion failed: %s\n", what);
    abort();
}

/* True if all `n` permits are free. */
static bool all_free(ctx_sem_t *sem, int64_t n) {
    if (!ctx_sem_try_acquire(sem, n)) return false;
    ctx_sem_release(sem, n);
    return true;
}

/* A thread that takes n permits, says in which place it got them, holds them until its gate opens, gives them back. */
typedef struct {
    ctx_sem_t *sem;
    ctx_t *ctx;
    int64_t n;
    gate_t *hold;   /* NULL: give back at once */
    int *tickets;   /* [atomic] shared: how many got in so far */
    int tid;        /* [atomic] */
    int in;         /* [atomic] it has its permits */
    int done;       /* [atomic] */
    int rc, ticket; /* written before in or done */
} taker_t;

static void *takes(void *arg) {
    taker_t *t = (taker_t *)arg;
    store(&t->tid, thread_id());
    t->rc = ctx_sem_acquire(t->sem, t->ctx, t->n);
    if (t->rc == 0) {
        t->ticket = add(t->tickets, 1);
        store(&t->in, 1);
        if (t->hold) gate_pass(t->hold);
        ctx_sem_release(t->sem, t->n);
    }
    store(&t->done, 1);
    return NULL;
}

static int tickets;

static pthread_t take(taker_t *t, ctx_sem_t *sem, ctx_t *ctx, int64_t n, gate_t *hold) {
    memset(t, 0, sizeof *t);
    t->sem = sem;
    t->ctx = ctx;
    t->n = n;
    t->hold = hold;
    t->tickets = &tickets;
    return thread_start(takes, t);
}

/* The same, returning when it has queued and parked, so that the next to come is behind it. */
static pthread_t take_parked(taker_t *t, ctx_sem_t *sem, ctx_t *ctx, int64_t n, gate_t *hold) {
    pthread_t thread = take(t, sem, ctx, n, hold);
    until_asleep(&t->tid);
    EXPECT_EQ(load(&t->in), 0);
    return thread;
}

/* -- one thread ------------------------------------------------------------------------------------------------- */

TEST(init_refuses_numbers_that_make_no_sense) {
    ctx_sem_t sem;
    EXPECT_EQ(ctx_sem_init(&sem, 0), CTX_INVALID);
    EXPECT_EQ(ctx_sem_init(&sem, -1), CTX_INVALID);
    EXPECT_EQ(ctx_sem_init(&sem, INT64_MIN), CTX_INVALID);
    EXPECT_EQ(ctx_sem_init(&sem, INT64_MAX), CTX_INVALID);
    EXPECT_EQ(ctx_sem_init(&sem, (INT64_C(1) << 61) + 1), CTX_INVALID);
    EXPECT_EQ(ctx_sem_init(&sem, 1), 0);
    ctx_sem_destroy(&sem);
    EXPECT_EQ(ctx_sem_init(&sem, INT64_C(1) << 61), 0);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), INT64_C(1) << 61), 0);
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, INT64_C(1) << 61);
    EXPECT(all_free(&sem, INT64_C(1) << 61));
    ctx_sem_destroy(&sem);
}

TEST(as_many_permits_as_there_are_can_be_taken) {
    ctx_sem_t sem;
    EXPECT_EQ(ctx_sem_init(&sem, 5), 0);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 2), 0);
    EXPECT(!ctx_sem_try_acquire(&sem, 4));
    EXPECT(ctx_sem_try_acquire(&sem, 3));
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, 5);
    EXPECT(all_free(&sem, 5));
    ctx_sem_destroy(&sem);
}

TEST(more_than_there_are_is_invalid_at_once) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 3);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 4), CTX_INVALID);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), INT64_MAX), CTX_INVALID);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), -1), CTX_INVALID);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), INT64_MIN), CTX_INVALID);
    EXPECT(!ctx_sem_try_acquire(&sem, 4));
    EXPECT(!ctx_sem_try_acquire(&sem, INT64_MAX));
    EXPECT(!ctx_sem_try_acquire(&sem, -1));
    EXPECT(!ctx_sem_try_acquire(&sem, INT64_MIN));
    EXPECT(all_free(&sem, 3));
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 3), 0);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 4), CTX_INVALID); /* not: after a wait */
    ctx_sem_release(&sem, 3);
    ctx_sem_destroy(&sem);
}

TEST(no_permits_is_a_request_like_any_other) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 2);
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 0), 0);
    EXPECT(ctx_sem_try_acquire(&sem, 0));
    EXPECT(ctx_sem_try_acquire(&sem, 2));
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), 0), 0); /* there are always that many free */
    EXPECT(ctx_sem_try_acquire(&sem, 0));
    ctx_sem_release(&sem, 0);
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, 2);
    EXPECT(all_free(&sem, 2));
    ctx_sem_destroy(&sem);
}

TEST(a_done_context_takes_nothing_from_an_empty_semaphore) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 2);
    ctx_t *canceled = ctx_with_cancel(ctx_background());
    ctx_t *expired = ctx_with_timeout(ctx_background(), 0);
    ctx_t *failed = ctx_with_cancel(NULL);
    ctx_cancel(canceled);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    EXPECT_EQ(ctx_sem_acquire(&sem, canceled, 2), CTX_CANCELED);
    EXPECT_EQ(ctx_sem_acquire(&sem, expired, 2), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_sem_acquire(&sem, failed, 2), CTX_INVALID);
    EXPECT(ctx_sem_try_acquire(&sem, 1)); /* and stands in nobody's way */
    ctx_sem_release(&sem, 2);
    EXPECT(all_free(&sem, 2));
    ctx_end(canceled);
    ctx_end(expired);
    ctx_end(failed);
    ctx_sem_destroy(&sem);
}

TEST(an_acquire_with_a_done_context_tells_the_truth_about_its_permits) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 2);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    int rc = ctx_sem_acquire(&sem, ctx, 1); /* one is free: either answer keeps the contract */
    EXPECT(rc == 0 || rc == CTX_CANCELED);
    EXPECT(ctx_sem_try_acquire(&sem, rc == 0 ? 1 : 2));
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, 2);
    ctx_end(ctx);
    ctx_sem_destroy(&sem);
}

static void over_release_a_fresh_one(ctx_sem_t *sem) { ctx_sem_release(sem, 1); }

static void over_release_by_one(ctx_sem_t *sem) {
    if (ctx_sem_try_acquire(sem, 2)) ctx_sem_release(sem, 3);
}

static void over_release_by_far(ctx_sem_t *sem) {
    if (ctx_sem_try_acquire(sem, 3)) ctx_sem_release(sem, INT64_MAX);
}

static void release_in_order(ctx_sem_t *sem) {
    if (ctx_sem_try_acquire(sem, 3)) ctx_sem_release(sem, 3);
    ctx_sem_destroy(sem);
}

static void just_destroy(ctx_sem_t *sem) { ctx_sem_destroy(sem); }

/* How a child ends that does this: 0, or ASSERTED. */
static int status_of(void (*act)(ctx_sem_t *sem), ctx_sem_t *sem) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(60);
        asserts_expected = 1;
        act(sem);
        _exit(0);
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(giving_back_too_many_trips_the_assertion) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 3);
    EXPECT_EQ(status_of(release_in_order, &sem), 0);
    EXPECT_EQ(status_of(over_release_a_fresh_one, &sem), ASSERTED);
    EXPECT_EQ(status_of(over_release_by_one, &sem), ASSERTED);
    EXPECT_EQ(status_of(over_release_by_far, &sem), ASSERTED);
    ctx_sem_destroy(&sem);
}

TEST(destroying_a_semaphore_that_is_waited_for_trips_the_assertion) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    taker_t t;
    pthread_t thread = take_parked(&t, &sem, ctx_background(), 1, NULL);
    EXPECT_EQ(status_of(just_destroy, &sem), ASSERTED);
    ctx_sem_release(&sem, 1);
    thread_join(thread);
    EXPECT_EQ(t.rc, 0);
    EXPECT_EQ(status_of(just_destroy, &sem), 0);
    ctx_sem_destroy(&sem);
}

/* -- the queue -------------------------------------------------------------------------------------------------- */

TEST(waiters_are_served_in_the_order_of_arrival) {
    enum { N = 10 };
    ctx_sem_t sem;
    ctx_sem_init(&sem, 4);
    EXPECT(ctx_sem_try_acquire(&sem, 4));
    tickets = 0;
    taker_t t[N];
    pthread_t threads[N];
    for (int i = 0; i < N; i++) threads[i] = take_parked(&t[i], &sem, ctx_background(), 3 + i % 2, NULL);
    ctx_sem_release(&sem, 4); /* each needs more than half, so one is in at a time */
    for (int i = 0; i < N; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(t[i].rc, 0);
        EXPECT_EQ(t[i].ticket, i + 1);
    }
    EXPECT(all_free(&sem, 4));
    ctx_sem_destroy(&sem);
}

TEST(one_release_lets_in_all_whom_it_suffices_for) {
    enum { N = 4 };
    ctx_sem_t sem;
    ctx_sem_init(&sem, 6);
    EXPECT(ctx_sem_try_acquire(&sem, 6));
    tickets = 0;
    gate_t hold;
    gate_init(&hold);
    taker_t t[N];
    pthread_t threads[N];
    const int64_t n[N] = {1, 2, 1, 2};
    for (int i = 0; i < N; i++) threads[i] = take_parked(&t[i], &sem, ctx_background(), n[i], &hold);
    ctx_sem_release(&sem, 6);
    gate_await(&hold, N); /* all inside at once */
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    gate_open(&hold);
    for (int i = 0; i < N; i++) thread_join(threads[i]);
    EXPECT(all_free(&sem, 6));
    gate_destroy(&hold);
    ctx_sem_destroy(&sem);
}

TEST(a_release_that_does_not_suffice_lets_nobody_in) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 4);
    EXPECT(ctx_sem_try_acquire(&sem, 4));
    tickets = 0;
    gate_t hold;
    gate_init(&hold);
    taker_t three, one;
    pthread_t a = take_parked(&three, &sem, ctx_background(), 3, &hold);
    pthread_t b = take_parked(&one, &sem, ctx_background(), 1, &hold);
    for (int i = 0; i < 2; i++) {
        ctx_sem_release(&sem, 1);
        until_asleep(&three.tid);
        until_asleep(&one.tid);
        EXPECT_EQ(load(&three.in), 0);
        EXPECT_EQ(load(&one.in), 0); /* would fit, but is behind */
    }
    ctx_sem_release(&sem, 1);
    UNTIL(load(&three.in));
    EXPECT_EQ(load(&one.in), 0);
    ctx_sem_release(&sem, 1);
    UNTIL(load(&one.in));
    gate_open(&hold);
    thread_join(a);
    thread_join(b);
    EXPECT(all_free(&sem, 4));
    gate_destroy(&hold);
    ctx_sem_destroy(&sem);
}

TEST(try_acquire_does_not_barge_past_waiters) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 4);
    EXPECT(ctx_sem_try_acquire(&sem, 2));
    tickets = 0;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    taker_t big;
    pthread_t thread = take_parked(&big, &sem, ctx, 4, NULL);
    EXPECT(!ctx_sem_try_acquire(&sem, 1)); /* two are free, and spoken for */
    EXPECT(!ctx_sem_try_acquire(&sem, 2));
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(big.rc, CTX_CANCELED);
    EXPECT(ctx_sem_try_acquire(&sem, 2));
    ctx_sem_release(&sem, 4);
    EXPECT(all_free(&sem, 4));
    ctx_end(ctx);
    ctx_sem_destroy(&sem);
}

typedef struct {
    ctx_sem_t *sem;
    int stop;
    long turns;
} churn_t;

static void *takes_small_ones(void *arg) {
    churn_t *churn = (churn_t *)arg;
    while (!load(&churn->stop)) {
        if (ctx_sem_acquire(churn->sem, ctx_background(), 1) != 0) break;
        churn->turns++;
        ctx_sem_release(churn->sem, 1);
    }
    return NULL;
}

/* Small ones come without end, so that all permits are hardly ever free at once: a big one must still get its turn. */
TEST(a_big_acquire_is_not_starved_by_small_ones) {
    enum { SMALL = 6, TOTAL = 4 };
    ctx_sem_t sem;
    ctx_sem_init(&sem, TOTAL);
    churn_t churn[SMALL];
    pthread_t threads[SMALL];
    for (int i = 0; i < SMALL; i++) {
        churn[i].sem = &sem;
        churn[i].stop = 0;
        churn[i].turns = 0;
        threads[i] = thread_start(takes_small_ones, &churn[i]);
    }
    int rounds = test_scale(1000);
    for (int i = 0; i < rounds; i++) {
        EXPECT_EQ(ctx_sem_acquire(&sem, ctx_background(), TOTAL), 0);
        EXPECT(!ctx_sem_try_acquire(&sem, 1));
        ctx_sem_release(&sem, TOTAL);
    }
    for (int i = 0; i < SMALL; i++) store(&churn[i].stop, 1);
    for (int i = 0; i < SMALL; i++) thread_join(threads[i]);
    EXPECT(all_free(&sem, TOTAL));
    ctx_sem_destroy(&sem);
}

TEST(a_small_acquire_does_not_overtake_a_big_one) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 4);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    tickets = 0;
    gate_t hold;
    gate_init(&hold);
    taker_t big, small;
    pthread_t a = take_parked(&big, &sem, ctx_background(), 4, &hold);
    pthread_t b = take_parked(&small, &sem, ctx_background(), 1, NULL); /* three are free */
    ctx_sem_release(&sem, 1);
    UNTIL(load(&big.in));
    EXPECT_EQ(load(&small.in), 0);
    gate_open(&hold);
    thread_join(a);
    thread_join(b);
    EXPECT_EQ(big.ticket, 1);
    EXPECT_EQ(small.ticket, 2);
    gate_destroy(&hold);
    ctx_sem_destroy(&sem);
}

/* -- canceling ------------------------------------------------------------------------------------------------- */

TEST(canceled_waiter_loses_no_permit) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 3);
    EXPECT(ctx_sem_try_acquire(&sem, 3));
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    taker_t t[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) threads[i] = take_parked(&t[i], &sem, ctx, i + 1, NULL);
    ctx_cancel_cause(ctx, -7, "enough");
    for (int i = 0; i < 3; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(t[i].rc, CTX_CANCELED);
        EXPECT_EQ(t[i].in, 0);
    }
    EXPECT(!ctx_sem_try_acquire(&sem, 1));
    ctx_sem_release(&sem, 3);
    EXPECT(all_free(&sem, 3));
    ctx_end(ctx);
    ctx_sem_destroy(&sem);
}

typedef struct {
    start_line_t line;
    ctx_sem_t sem;
    ctx_t *ctx;
    int rounds, granted, canceled;
} grant_race_t;

static void *takes_each_round(void *arg) {
    grant_race_t *race = (grant_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        int rc = ctx_sem_acquire(&race->sem, race->ctx, 2);
        if (rc == 0) {
            race->granted++;
            EXPECT(!ctx_sem_try_acquire(&race->sem, 1));
            ctx_sem_release(&race->sem, 2);
        } else {
            EXPECT_EQ(rc, CTX_CANCELED);
            race->canceled++;
        }
        start_line(&race->line);
        start_line(&race->line);
    }
    return NULL;
}

static void *cancels_each_round(void *arg) {
    grant_race_t *race = (grant_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        spin((unsigned)(i % 31) * 20);
        ctx_cancel(race->ctx);
        start_line(&race->line);
        start_line(&race->line);
    }
    return NULL;
}

/* The grant and the cancel come at the same moment: whoever wins, both permits are there afterwards. */
TEST(canceled_waiter_loses_no_permit_that_is_granted_at_that_moment) {
    grant_race_t race;
    ctx_sem_init(&race.sem, 2);
    start_line_init(&race.line, 3);
    race.rounds = test_scale(20000);
    race.granted = race.canceled = 0;
    pthread_t taker = thread_start(takes_each_round, &race);
    pthread_t canceler = thread_start(cancels_each_round, &race);
    for (int i = 0; i < race.rounds; i++) {
        race.ctx = ctx_with_cancel(ctx_background());
        EXPECT(ctx_sem_try_acquire(&race.sem, 2));
        start_line(&race.line);
        spin((unsigned)(i % 29) * 20);
        ctx_sem_release(&race.sem, 2);
        start_line(&race.line);
        EXPECT(all_free(&race.sem, 2));
        ctx_end(race.ctx);
        start_line(&race.line);
    }
    thread_join(taker);
    thread_join(canceler);
    EXPECT_EQ(race.granted + race.canceled, race.rounds);
    ctx_sem_destroy(&race.sem);
}

/* The head is granted, and canceled before it can run: whichever it makes of that, the one behind it gets its turn. */
TEST(a_grant_that_a_cancel_overtakes_reaches_the_next) {
    for (int round = 0; round < 30; round++) {
        ctx_sem_t sem;
        ctx_sem_init(&sem, 2);
        EXPECT(ctx_sem_try_acquire(&sem, 2));
        tickets = 0;
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        taker_t head, next;
        pthread_t a = take_parked(&head, &sem, ctx, 2, NULL);
        pthread_t b = take_parked(&next, &sem, ctx_background(), 2, NULL);
        if (round % 3 == 0) ctx_cancel(ctx);
        ctx_sem_release(&sem, 2);
        ctx_cancel(ctx);
        thread_join(a);
        thread_join(b); /* hangs if the permits stay with nobody */
        EXPECT(head.rc == 0 || head.rc == CTX_CANCELED);
        EXPECT_EQ(next.rc, 0);
        EXPECT(all_free(&sem, 2));
        ctx_end(ctx);
        ctx_sem_destroy(&sem);
    }
}

TEST(a_canceled_head_lets_the_next_ones_in) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 4);
    EXPECT(ctx_sem_try_acquire(&sem, 2));
    tickets = 0;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    gate_t hold;
    gate_init(&hold);
    taker_t head, second, third, fourth;
    pthread_t a = take_parked(&head, &sem, ctx, 3, NULL);
    pthread_t b = take_parked(&second, &sem, ctx_background(), 1, &hold);
    pthread_t c = take_parked(&third, &sem, ctx_background(), 1, &hold);
    pthread_t d = take_parked(&fourth, &sem, ctx_background(), 1, &hold);
    ctx_cancel(ctx);
    gate_await(&hold, 2); /* nothing was released: the two free ones were only held up */
    EXPECT_EQ(load(&second.in) + load(&third.in), 2);
    EXPECT_EQ(load(&fourth.in), 0);
    ctx_sem_release(&sem, 2);
    gate_await(&hold, 3);
    gate_open(&hold);
    thread_join(a);
    thread_join(b);
    thread_join(c);
    thread_join(d);
    EXPECT_EQ(head.rc, CTX_CANCELED);
    EXPECT(all_free(&sem, 4));
    ctx_end(ctx);
    gate_destroy(&hold);
    ctx_sem_destroy(&sem);
}

TEST(those_who_stay_keep_their_order_when_others_are_canceled) {
    enum { N = 10 };
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    for (unsigned leave = 1; leave < 1u << N;
         leave = leave * 5 + 3) { /* head, tail, neighbours, all patterns of them */
        EXPECT(ctx_sem_try_acquire(&sem, 1));
        tickets = 0;
        taker_t t[N];
        pthread_t threads[N];
        ctx_t *ctx[N];
        for (int i = 0; i < N; i++) {
            ctx[i] = ctx_with_cancel(ctx_background());
            threads[i] = take_parked(&t[i], &sem, ctx[i], 1, NULL);
        }
        for (int i = 0; i < N; i++)
            if (leave >> i & 1) {
                ctx_cancel(ctx[i]);
                thread_join(threads[i]);
                EXPECT_EQ(t[i].rc, CTX_CANCELED);
            }
        ctx_sem_release(&sem, 1);
        int place = 0;
        for (int i = 0; i < N; i++)
            if (!(leave >> i & 1)) {
                thread_join(threads[i]);
                EXPECT_EQ(t[i].rc, 0);
                EXPECT_EQ(t[i].ticket, ++place);
            }
        EXPECT(all_free(&sem, 1));
        for (int i = 0; i < N; i++) ctx_end(ctx[i]);
    }
    ctx_sem_destroy(&sem);
}

TEST(a_deadline_ends_the_wait_and_never_early) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    for (int i = 1; i <= 20; i++) {
        ctx_time_t from = ctx_now();
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(200) * i);
        EXPECT_EQ(ctx_sem_acquire(&sem, ctx, 1), CTX_DEADLINE_EXCEEDED);
        EXPECT(ctx_now() - from >= CTX_US(200) * i);
        ctx_end(ctx);
    }
    ctx_sem_release(&sem, 1);
    EXPECT(all_free(&sem, 1));
    ctx_sem_destroy(&sem);
}

TEST(a_deadline_ends_the_wait_under_the_fake_clock) {
    ctx_clock_fake(0);
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    taker_t brief, patient;
    tickets = 0;
    pthread_t a = take_parked(&brief, &sem, ctx, 1, NULL);
    pthread_t b = take_parked(&patient, &sem, ctx_background(), 1, NULL);
    ctx_clock_advance(CTX_S(3600) - 1);
    until_asleep(&brief.tid);
    EXPECT_EQ(load(&brief.done), 0);
    ctx_clock_advance(1);
    thread_join(a);
    EXPECT_EQ(brief.rc, CTX_DEADLINE_EXCEEDED);
    ctx_sem_release(&sem, 1);
    thread_join(b);
    EXPECT_EQ(patient.rc, 0);
    EXPECT(all_free(&sem, 1));
    ctx_end(ctx);
    ctx_sem_destroy(&sem);
    ctx_clock_real();
}

TEST(waiting_and_canceling_allocate_nothing) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    taker_t stays, leaves;
    tickets = 0;
    fault_all_after(0);
    pthread_t a = take_parked(&leaves, &sem, ctx, 1, NULL);
    pthread_t b = take_parked(&stays, &sem, ctx_background(), 1, NULL);
    ctx_cancel(ctx);
    thread_join(a);
    ctx_sem_release(&sem, 1);
    thread_join(b);
    EXPECT(!fault_off());
    EXPECT_EQ(leaves.rc, CTX_CANCELED);
    EXPECT_EQ(stays.rc, 0);
    EXPECT(all_free(&sem, 1));
    ctx_end(ctx);
    ctx_sem_destroy(&sem);
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

enum { CROWD = 8, CROWD_PERMITS = 8, CROWD_ROUNDS = 5000 };

typedef struct {
    ctx_sem_t *sem;
    ctx_t **slots; /* [atomic] what each has open to be canceled: one reference for whoever takes it out */
    int *taken;    /* [atomic] permits held by all */
    int me, rounds;
    int granted, canceled, refused;
} crowd_t;

static ctx_t *swap_slot(ctx_t **slot, ctx_t *ctx) { return __atomic_exchange_n(slot, ctx, __ATOMIC_ACQ_REL); }

static void *acquires_at_random(void *arg) {
    crowd_t *c = (crowd_t *)arg;
    uint64_t random = (uint64_t)c->me + 1;
    for (int i = 0; i < c->rounds; i++) {
        int64_t n = (int64_t)(random_next(&random) % (CROWD_PERMITS + 1));
        bool timed = random_next(&random) % 4 == 0;
        ctx_t *ctx = timed ? ctx_with_timeout(ctx_background(), CTX_NS(random_next(&random) % 60000))
                           : ctx_with_cancel(ctx_background());
        swap_slot(&c->slots[c->me], ctx_retain(ctx));
        if (random_next(&random) % 8 == 0) {
            if (ctx_sem_try_acquire(c->sem, n)) {
                EXPECT(add(c->taken, (int)n) <= CROWD_PERMITS);
                add(c->taken, (int)-n);
                ctx_sem_release(c->sem, n);
            } else {
                c->refused++;
            }
        }
        int rc = ctx_sem_acquire(c->sem, ctx, n);
        if (rc == 0) {
            EXPECT(add(c->taken, (int)n) <= CROWD_PERMITS);
            spin(random_next(&random) % 200);
            if (random_next(&random) % 16 == 0) sched_yield();
            add(c->taken, (int)-n);
            ctx_sem_release(c->sem, n);
            c->granted++;
        } else {
            EXPECT(rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED);
            c->canceled++;
        }
        ctx_release(swap_slot(&c->slots[c->me], NULL));
        ctx_end(ctx);
    }
    return NULL;
}

typedef struct {
    ctx_t **slots;
    int stop;
} hunter_t;

static void *cancels_at_random(void *arg) {
    hunter_t *hunter = (hunter_t *)arg;
    uint64_t random = 99;
    while (!load(&hunter->stop)) {
        ctx_t *ctx = swap_slot(&hunter->slots[random_next(&random) % CROWD], NULL);
        if (ctx) ctx_end(ctx);
        spin(random_next(&random) % 3000);
    }
    return NULL;
}

TEST(eight_threads_with_random_cancels_leave_every_permit_free) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, CROWD_PERMITS);
    ctx_t *slots[CROWD];
    memset(slots, 0, sizeof slots);
    int taken = 0;
    crowd_t crowd[CROWD];
    memset(crowd, 0, sizeof crowd);
    pthread_t threads[CROWD];
    hunter_t hunter;
    hunter.slots = slots;
    hunter.stop = 0;
    for (int i = 0; i < CROWD; i++) {
        crowd[i].sem = &sem;
        crowd[i].slots = slots;
        crowd[i].taken = &taken;
        crowd[i].me = i;
        crowd[i].rounds = test_scale(CROWD_ROUNDS);
        threads[i] = thread_start(acquires_at_random, &crowd[i]);
    }
    pthread_t hunting = thread_start(cancels_at_random, &hunter);
    int granted = 0, canceled = 0;
    for (int i = 0; i < CROWD; i++) {
        thread_join(threads[i]);
        granted += crowd[i].granted;
        canceled += crowd[i].canceled;
    }
    store(&hunter.stop, 1);
    thread_join(hunting);
    EXPECT_EQ(granted + canceled, CROWD * test_scale(CROWD_ROUNDS));
    EXPECT(granted > 0);
    if (!TEST_QUICK) EXPECT(canceled > 0);
    EXPECT_EQ(taken, 0);
    EXPECT(all_free(&sem, CROWD_PERMITS));
    ctx_sem_destroy(&sem);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST_MAIN
