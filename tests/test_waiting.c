/* Section 7: parking until a context is done, by itself, in poll() and the like, or on a condition variable. */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/select.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif

/* -- wait and sleep --------------------------------------------------------------------------------------------- */

TEST(wait_on_a_done_context_returns_its_err_at_once) {
    ctx_t *canceled = ctx_with_cancel(ctx_background());
    ctx_t *expired = ctx_with_timeout(ctx_background(), 0);
    ctx_cancel(canceled);
    const ctx_dur_t max[] = {CTX_FOREVER, CTX_S(3600), 1, 0, -1, INT64_MIN};
    for (size_t i = 0; i < sizeof max / sizeof max[0]; i++) {
        EXPECT_EQ(ctx_wait(canceled, max[i]), CTX_CANCELED);
        EXPECT_EQ(ctx_wait(expired, max[i]), CTX_DEADLINE_EXCEEDED);
    }
    ctx_end(canceled);
    ctx_end(expired);
}

TEST(wait_says_busy_when_its_time_passed_first) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT_EQ(ctx_wait(ctx, 0), CTX_NOT_READY);
    EXPECT_EQ(ctx_wait(ctx, -1), CTX_NOT_READY);
    EXPECT_EQ(ctx_wait(ctx, INT64_MIN), CTX_NOT_READY);
    EXPECT_EQ(ctx_wait(ctx_background(), 0), CTX_NOT_READY);
    for (int i = 0; i < 20; i++) {
        ctx_time_t from = ctx_now();
        EXPECT_EQ(ctx_wait(ctx, CTX_US(500)), CTX_NOT_READY);
        EXPECT(ctx_now() - from >= CTX_US(500));
    }
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
}

TEST(wait_says_busy_in_the_background_too) {
    ctx_time_t from = ctx_now();
    EXPECT_EQ(ctx_wait(ctx_background(), CTX_MS(3)), CTX_NOT_READY);
    EXPECT(ctx_now() - from >= CTX_MS(3));
}

TEST(a_deadline_ends_a_wait_and_never_early) {
    for (int i = 1; i <= 20; i++) {
        ctx_time_t from = ctx_now();
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(300) * i);
        EXPECT_EQ(ctx_wait(ctx, i % 2 ? CTX_FOREVER : CTX_S(3600)), CTX_DEADLINE_EXCEEDED);
        EXPECT(ctx_now() - from >= CTX_US(300) * i);
        EXPECT(ctx_now() - from < CTX_S(20));
        ctx_end(ctx);
    }
}

TEST(sleep_lasts_as_long_as_asked) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 20; i++) {
        ctx_time_t from = ctx_now();
        EXPECT_EQ(ctx_sleep(i % 2 ? ctx : ctx_background(), CTX_US(700)), 0);
        EXPECT(ctx_now() - from >= CTX_US(700));
    }
    EXPECT_EQ(ctx_sleep(ctx, 0), 0);
    EXPECT_EQ(ctx_sleep(ctx, -1), 0);
    EXPECT_EQ(ctx_sleep(ctx, INT64_MIN), 0);
    ctx_end(ctx);
}

TEST(sleep_is_cut_short_by_a_done_context) {
    ctx_time_t from = ctx_now();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    EXPECT_EQ(ctx_sleep(ctx, CTX_S(3600)), CTX_CANCELED);
    EXPECT_EQ(ctx_sleep(ctx, CTX_FOREVER), CTX_CANCELED);
    ctx_end(ctx);
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(5));
    EXPECT_EQ(ctx_sleep(ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from >= CTX_MS(5));
    EXPECT(ctx_now() - from < CTX_S(20));
    ctx_end(ctx);
}

TEST(a_sleep_ends_by_itself_before_a_later_deadline) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    EXPECT_EQ(ctx_sleep(ctx, CTX_MS(2)), 0);
    EXPECT_EQ(ctx_wait(ctx, CTX_MS(2)), CTX_NOT_READY);
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
}

typedef struct {
    ctx_t *ctx;
    ctx_dur_t dur;
    bool sleeps; /* ctx_sleep(), else ctx_wait() */
    int tid;     /* [atomic] set just before it parks */
    int done;    /* [atomic] */
    int rc;      /* written before done */
    ctx_time_t from, until;
} parked_t;

static void *parks(void *arg) {
    parked_t *p = (parked_t *)arg;
    p->from = ctx_now();
    store(&p->tid, thread_id());
    p->rc = p->sleeps ? ctx_sleep(p->ctx, p->dur) : ctx_wait(p->ctx, p->dur);
    p->until = ctx_now();
    store(&p->done, 1);
    return NULL;
}

static pthread_t park(parked_t *p, ctx_t *ctx, bool sleeps, ctx_dur_t dur) {
    memset(p, 0, sizeof *p);
    p->ctx = ctx;
    p->sleeps = sleeps;
    p->dur = dur;
    return thread_start(parks, p);
}

TEST(a_cancel_wakes_a_parked_thread_at_once) {
    for (int sleeps = 0; sleeps < 2; sleeps++) {
        for (int forever = 0; forever < 2; forever++) {
            ctx_t *ctx = ctx_with_cancel(ctx_background());
            parked_t p;
            pthread_t thread = park(&p, ctx, sleeps != 0, forever ? CTX_FOREVER : CTX_S(3600));
            until_asleep(&p.tid);
            EXPECT_EQ(load(&p.done), 0);
            ctx_time_t from = ctx_now();
            ctx_cancel(ctx);
            thread_join(thread);
            EXPECT(ctx_now() - from < CTX_S(20));
            EXPECT_EQ(p.rc, CTX_CANCELED);
            ctx_end(ctx);
        }
    }
}

TEST(a_cancel_of_an_ancestor_wakes_too) {
    ctx_t *root = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_with_cancel(root);
    ctx_t *grandchild = ctx_with_timeout(child, CTX_S(3600));
    parked_t p;
    pthread_t thread = park(&p, grandchild, false, CTX_FOREVER);
    until_asleep(&p.tid);
    ctx_cancel_cause(root, -1000, "enough");
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    EXPECT_EQ(ctx_cause(grandchild).code, -1000);
    ctx_end(grandchild);
    ctx_end(child);
    ctx_end(root);
}

typedef struct {
    start_line_t line;
    ctx_t *ctx;
    int rounds, waits_over, cancels;
} race_t;

static void *waits_without_end(void *arg) {
    race_t *race = (race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        int rc = i % 2 ? ctx_wait(race->ctx, CTX_FOREVER) : ctx_sleep(race->ctx, CTX_S(3600));
        EXPECT_EQ(rc, CTX_CANCELED);
        start_line(&race->line);
    }
    return NULL;
}

/* No wake-up may fall between the look and the parking: the cancel comes at every distance from the wait. */
TEST(no_wake_up_is_lost_between_look_and_park) {
    race_t race;
    start_line_init(&race.line, 2);
    race.rounds = test_scale(30000);
    pthread_t thread = thread_start(waits_without_end, &race);
    for (int i = 0; i < race.rounds; i++) {
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        spin((unsigned)(i % 300) * 4);
        ctx_cancel(race.ctx);
        start_line(&race.line);
        ctx_end(race.ctx);
    }
    thread_join(thread);
}

static void *waits_each_round(void *arg) {
    race_t *race = (race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        int rc = ctx_wait(race->ctx, CTX_US(i % 120));
        EXPECT(rc == CTX_NOT_READY || rc == CTX_CANCELED);
        if (rc == CTX_NOT_READY)
            race->waits_over++;
        else
            race->cancels++;
        EXPECT_EQ(ctx_wait(race->ctx, CTX_FOREVER), CTX_CANCELED);
        start_line(&race->line);
    }
    return NULL;
}

TEST(a_wait_that_times_out_as_the_cancel_comes_is_either) {
    race_t race;
    start_line_init(&race.line, 2);
    race.rounds = test_scale(10000);
    race.waits_over = race.cancels = 0;
    pthread_t thread = thread_start(waits_each_round, &race);
    for (int i = 0; i < race.rounds; i++) {
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        spin((unsigned)(i % 97) * 300);
        ctx_cancel(race.ctx);
        start_line(&race.line);
        ctx_end(race.ctx);
    }
    thread_join(thread);
    EXPECT_EQ(race.waits_over + race.cancels, race.rounds);
}

enum { MANY = 32 };

TEST(many_threads_wait_on_one_context) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    parked_t p[MANY];
    pthread_t threads[MANY];
    for (int i = 0; i < MANY; i++) threads[i] = park(&p[i], ctx, i % 2 == 0, i % 3 == 0 ? CTX_FOREVER : CTX_S(3600));
    for (int i = 0; i < MANY; i++) until_asleep(&p[i].tid);
    for (int i = 0; i < MANY; i++) EXPECT_EQ(load(&p[i].done), 0);
    ctx_cancel(ctx);
    for (int i = 0; i < MANY; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(p[i].rc, CTX_CANCELED);
    }
    ctx_end(ctx);
}

TEST(waiters_that_gave_up_leave_the_others_waiting) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    parked_t p[MANY];
    pthread_t threads[MANY];
    for (int i = 0; i < MANY; i++) threads[i] = park(&p[i], ctx, false, i % 2 ? CTX_US(200) * i : CTX_FOREVER);
    for (int i = 1; i < MANY; i += 2) {
        thread_join(threads[i]);
        EXPECT_EQ(p[i].rc, CTX_NOT_READY);
        EXPECT(p[i].until - p[i].from >= CTX_US(200) * i);
    }
    for (int i = 0; i < MANY; i += 2) EXPECT_EQ(load(&p[i].done), 0);
    ctx_cancel(ctx);
    for (int i = 0; i < MANY; i += 2) {
        thread_join(threads[i]);
        EXPECT_EQ(p[i].rc, CTX_CANCELED);
    }
    ctx_end(ctx);
}

TEST(hours_of_sleep_pass_in_no_time_under_the_fake_clock) {
    int64_t from = test_now_ns();
    ctx_clock_fake(CTX_S(1000));
    parked_t p;
    pthread_t thread = park(&p, ctx_background(), true, CTX_S(5 * 3600));
    until_asleep(&p.tid);
    ctx_clock_advance(CTX_S(5 * 3600) - 1);
    until_asleep(&p.tid);
    EXPECT_EQ(load(&p.done), 0);
    while (!load(&p.done)) { /* more than once only if it had not parked at first */
        ctx_clock_advance(1);
        sched_yield();
    }
    thread_join(thread);
    EXPECT_EQ(p.rc, 0);
    EXPECT(p.until - p.from >= CTX_S(5 * 3600));
    ctx_clock_real();
    EXPECT(test_now_ns() - from < CTX_S(60));
}

typedef struct {
    ctx_t *ctx;
    ctx_time_t until, woke;
    int tid, rc, done; /* [atomic] */
} late_sleeper_t;

static late_sleeper_t late_sleeper(ctx_t *ctx, ctx_time_t until) {
    late_sleeper_t p;
    memset(&p, 0, sizeof p);
    p.ctx = ctx;
    p.until = until;
    return p;
}

static void *sleeps_until(void *arg) {
    late_sleeper_t *p = (late_sleeper_t *)arg;
    store(&p->tid, thread_id());
    p->rc = ctx_sleep_until(p->ctx, p->until);
    p->woke = ctx_now();
    store(&p->done, 1);
    return NULL;
}

TEST(sleep_until_ends_at_that_time_of_the_clock) {
    ctx_clock_fake(CTX_S(1000));
    late_sleeper_t p = late_sleeper(ctx_background(), CTX_S(4600));
    pthread_t thread = thread_start(sleeps_until, &p);
    until_asleep(&p.tid);
    ctx_clock_advance(CTX_S(3600) - 1);
    until_asleep(&p.tid);
    EXPECT_EQ(load(&p.done), 0);
    while (!load(&p.done)) { /* more than once only if it had not parked at first */
        ctx_clock_advance(1);
        sched_yield();
    }
    thread_join(thread);
    EXPECT_EQ(p.rc, 0);
    EXPECT(p.woke >= CTX_S(4600));
    EXPECT_EQ(ctx_sleep_until(ctx_background(), ctx_now()), 0); /* nobody moves the clock: these would hang */
    EXPECT_EQ(ctx_sleep_until(ctx_background(), 0), 0);
    EXPECT_EQ(ctx_sleep_until(ctx_background(), INT64_MIN), 0);
    ctx_clock_real();
}

TEST(sleep_until_is_cut_short_by_its_context) {
    ctx_clock_fake(CTX_S(1000));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(60));
    for (int canceled = 0; canceled < 2; canceled++) {
        late_sleeper_t p = late_sleeper(canceled ? ctx_with_cancel(ctx_background()) : ctx, CTX_NO_DEADLINE);
        pthread_t thread = thread_start(sleeps_until, &p);
        until_asleep(&p.tid);
        if (canceled)
            ctx_cancel(p.ctx);
        else
            ctx_clock_advance(CTX_S(60));
        thread_join(thread);
        EXPECT_EQ(p.rc, canceled ? CTX_CANCELED : CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_sleep_until(p.ctx, 0), p.rc); /* a done context is told of even if the time has passed */
        EXPECT_EQ(ctx_sleep_until(p.ctx, CTX_NO_DEADLINE), p.rc);
        if (canceled) ctx_end(p.ctx);
    }
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(the_fake_clock_ends_waits_at_their_max_and_at_deadlines) {
    ctx_clock_fake(0);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(7200));
    parked_t brief, lasting, cut;
    pthread_t t1 = park(&brief, ctx, false, CTX_S(3600));
    pthread_t t2 = park(&lasting, ctx, false, CTX_FOREVER);
    pthread_t t3 = park(&cut, ctx, true, CTX_S(100000));
    until_asleep(&brief.tid);
    until_asleep(&lasting.tid);
    until_asleep(&cut.tid);
    ctx_clock_advance(CTX_S(3600));
    thread_join(t1);
    EXPECT_EQ(brief.rc, CTX_NOT_READY);
    EXPECT_EQ(load(&lasting.done), 0);
    EXPECT_EQ(load(&cut.done), 0);
    ctx_clock_advance(CTX_S(3600));
    thread_join(t2);
    thread_join(t3);
    EXPECT_EQ(lasting.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(cut.rc, CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_cancel_wakes_under_the_fake_clock_without_time_passing) {
    ctx_clock_fake(0);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    parked_t p;
    pthread_t thread = park(&p, ctx, true, CTX_S(3600));
    until_asleep(&p.tid);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    EXPECT_EQ(p.until - p.from, 0);
    ctx_end(ctx);
    ctx_clock_real();
}

typedef struct {
    int stop;
    pthread_t target;
} storm_t;

static int interruptions; /* [atomic] */

static void interrupts(int sig) {
    (void)sig;
    add(&interruptions, 1);
}

static void *storms(void *arg) {
    storm_t *storm = (storm_t *)arg;
    while (!load(&storm->stop)) {
        pthread_kill(storm->target, SIGUSR1);
        spin(1000);
    }
    return NULL;
}

TEST(signals_do_not_end_a_wait) {
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = interrupts; /* without SA_RESTART */
    sigemptyset(&action.sa_mask);
    sigaction(SIGUSR1, &action, &before);
    storm_t storm;
    storm.stop = 0;
    storm.target = pthread_self();
    store(&interruptions, 0);
    pthread_t thread = thread_start(storms, &storm);
    for (int i = 0; i < 20 || load(&interruptions) < 20; i++) {
        ctx_time_t from = ctx_now();
        EXPECT_EQ(ctx_sleep(ctx_background(), CTX_MS(2)), 0);
        EXPECT_EQ(ctx_wait(ctx_background(), CTX_MS(2)), CTX_NOT_READY);
        EXPECT(ctx_now() - from >= CTX_MS(4));
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(2));
        EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
    }
    store(&storm.stop, 1);
    thread_join(thread);
    sigaction(SIGUSR1, &before, NULL);
}

TEST(waits_on_failed_contexts_return_why_they_failed) {
    ctx_t *failed = ctx_with_cancel(NULL);
    EXPECT_EQ(ctx_wait(failed, CTX_FOREVER), CTX_INVALID);
    EXPECT_EQ(ctx_wait(failed, 0), CTX_INVALID);
    EXPECT_EQ(ctx_sleep(failed, CTX_FOREVER), CTX_INVALID);
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    pthread_mutex_lock(&mutex);
    EXPECT_EQ(ctx_cond_wait(failed, &cond, &mutex), CTX_INVALID);
    EXPECT_EQ(pthread_mutex_unlock(&mutex), 0);
    pthread_cond_destroy(&cond);
    pthread_mutex_destroy(&mutex);
    ctx_end(failed);
}

/* -- the done fd ------------------------------------------------------------------------------------------------ */

static bool readable(int fd, int timeout_ms) {
    struct pollfd p;
    p.fd = fd;
    p.events = POLLIN;
    p.revents = 0;
    int n;
    do n = poll(&p, 1, timeout_ms);
    while (n < 0 && errno == EINTR);
    return n == 1 && (p.revents & POLLIN);
}

/* The shared fd of contexts already done, and what the runtime keeps, are made once: here, so that counts are exact. */
static void warm_up_fds(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), -1);
    EXPECT(ctx_done_fd(ctx) >= 0);
    ctx_end(ctx);
    ctx = ctx_with_timeout(ctx_background(), 1);
    ctx_wait(ctx, CTX_FOREVER);
    ctx_end(ctx);
    ctx = ctx_with_cancel(ctx_background());
    ctx_done_fd(ctx);
    ctx_cancel(ctx);
    ctx_end(ctx);
}

TEST(done_fd_is_readable_once_done_and_not_before) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *ctx = ctx_with_cancel(parent);
    int fd = ctx_done_fd(ctx);
    CHECK(fd >= 0);
    EXPECT(!readable(fd, 0));
    EXPECT(!readable(fd, 5));
    ctx_cancel(parent);
    EXPECT(readable(fd, 0));  /* at once: it is part of the cancel */
    EXPECT(readable(fd, -1)); /* and stays so */
    EXPECT_EQ(ctx_done_fd(ctx), fd);
    ctx_end(ctx);
    ctx_end(parent);
}

TEST(done_fd_is_made_by_the_first_call_and_closed_with_the_context) {
    warm_up_fds();
    int before = fd_count();
    if (before < 0) SKIP("nothing lists the open files here");
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT_EQ(fd_count(), before);
    int fd = ctx_done_fd(ctx);
    EXPECT(fd >= 0);
    int with_one = fd_count();
    EXPECT(with_one > before);
    EXPECT_EQ(ctx_done_fd(ctx), fd);
    EXPECT_EQ(ctx_done_fd(ctx), fd);
    EXPECT_EQ(fd_count(), with_one);
    ctx_retain(ctx);
    ctx_end(ctx);
    EXPECT(readable(fd, 0)); /* a reference is left, so the context and its fd are */
    EXPECT_EQ(fd_count(), with_one);
    ctx_release(ctx);
    EXPECT_EQ(fd_count(), before);
    EXPECT(fcntl(fd, F_GETFD) < 0);
}

TEST(a_thousand_done_fds_leave_none_behind) {
    warm_up_fds();
    int before = fd_count();
    if (before < 0) SKIP("nothing lists the open files here");
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    int n = limit.rlim_cur > 600 ? 200 : 20;
    for (int round = 0; round < 5; round++) {
        ctx_t *ctx[200];
        for (int i = 0; i < n; i++) {
            ctx[i] = ctx_with_cancel(ctx_background());
            EXPECT(ctx_done_fd(ctx[i]) >= 0);
        }
        EXPECT(fd_count() >= before + n);
        for (int i = 0; i < n; i++) {
            if (i % 3 == 0) ctx_cancel(ctx[i]);
            if (i % 3 == 1)
                ctx_release(ctx[i]);
            else
                ctx_end(ctx[i]);
        }
        EXPECT_EQ(fd_count(), before);
    }
}

TEST(contexts_done_before_they_are_asked_share_one_fd) {
    warm_up_fds();
    int before = fd_count();
    ctx_t *a = ctx_with_cancel(ctx_background());
    ctx_t *b = ctx_with_timeout(ctx_background(), -1);
    ctx_t *failed = ctx_with_cancel(NULL);
    ctx_cancel(a);
    int fd = ctx_done_fd(a);
    CHECK(fd >= 0);
    EXPECT_EQ(ctx_done_fd(b), fd);
    EXPECT_EQ(ctx_done_fd(failed), fd);
    EXPECT(readable(fd, 0));
    EXPECT_EQ(fd_count(), before);
    ctx_end(a);
    EXPECT(readable(ctx_done_fd(b), 0)); /* still open for the others */
    ctx_end(b);
    EXPECT(readable(ctx_done_fd(failed), 0));
    ctx_end(failed);
    EXPECT_EQ(fd_count(), before);
}

TEST(the_background_has_a_done_fd_that_never_is) {
    int fd = ctx_done_fd(ctx_background());
    CHECK(fd >= 0);
    EXPECT(!readable(fd, 1));
    EXPECT_EQ(ctx_done_fd(ctx_background()), fd);
}

TEST(done_fd_is_not_inherited_by_exec) {
    ctx_t *live = ctx_with_cancel(ctx_background());
    ctx_t *done = ctx_with_timeout(ctx_background(), 0);
    EXPECT(fcntl(ctx_done_fd(live), F_GETFD) & FD_CLOEXEC);
    EXPECT(fcntl(ctx_done_fd(done), F_GETFD) & FD_CLOEXEC);
    ctx_end(live);
    ctx_end(done);
}

enum { RACERS = 8 };

typedef struct {
    start_line_t line;
    ctx_t *ctx;
    int rounds;
    int fd[RACERS];
    int next; /* [atomic] gives each racer its number */
} fd_race_t;

static void *asks_for_the_fd(void *arg) {
    fd_race_t *race = (fd_race_t *)arg;
    int me = add(&race->next, 1) - 1;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        race->fd[me] = ctx_done_fd(race->ctx);
        start_line(&race->line);
    }
    return NULL;
}

TEST(done_fd_is_made_at_most_once_by_eight_threads) {
    warm_up_fds();
    fd_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, RACERS + 1);
    race.rounds = test_scale(1000);
    pthread_t threads[RACERS];
    for (int i = 0; i < RACERS; i++) threads[i] = thread_start(asks_for_the_fd, &race);
    int before = fd_count(), with_one = -1;
    for (int i = 0; i < race.rounds; i++) {
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        start_line(&race.line);
        EXPECT(race.fd[0] >= 0);
        for (int r = 1; r < RACERS; r++) EXPECT_EQ(race.fd[r], race.fd[0]);
        if (with_one < 0) with_one = fd_count();
        EXPECT_EQ(fd_count(), with_one);
        EXPECT(!readable(race.fd[0], 0));
        ctx_cancel(race.ctx);
        EXPECT(readable(race.fd[0], 0));
        ctx_end(race.ctx);
        EXPECT_EQ(fd_count(), before);
    }
    for (int i = 0; i < RACERS; i++) thread_join(threads[i]);
}

TEST(a_done_fd_made_as_the_cancel_comes_is_readable) {
    warm_up_fds();
    fd_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(10000);
    pthread_t thread = thread_start(asks_for_the_fd, &race);
    int before = fd_count();
    for (int i = 0; i < race.rounds; i++) {
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        spin((unsigned)(i % 50) * 10);
        ctx_cancel(race.ctx);
        start_line(&race.line);
        EXPECT(race.fd[0] >= 0);
        EXPECT(readable(race.fd[0], 0));
        EXPECT_EQ(ctx_done_fd(race.ctx), race.fd[0]);
        ctx_end(race.ctx);
    }
    thread_join(thread);
    EXPECT_EQ(fd_count(), before);
}

typedef struct {
    int fd, tid;
    int (*block)(int fd);
    int result;
} fd_waiter_t;

static int blocks_in_poll(int fd) { return readable(fd, -1); }

static int blocks_in_select(int fd) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    int n = select(fd + 1, &set, NULL, NULL, NULL);
    return n == 1 && FD_ISSET(fd, &set);
}

#ifdef __linux__
static int epoll_with(int fd, uint32_t events) {
    int ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = events;
    event.data.u32 = 7;
    if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event) != 0) return 0;
    memset(&event, 0, sizeof event);
    int n;
    do n = epoll_wait(ep, &event, 1, -1);
    while (n < 0 && errno == EINTR);
    close(ep);
    return n == 1 && event.data.u32 == 7 && (event.events & EPOLLIN) != 0;
}
static int blocks_in_epoll(int fd) { return epoll_with(fd, EPOLLIN); }
static int blocks_in_edge_epoll(int fd) { return epoll_with(fd, (uint32_t)EPOLLIN | (uint32_t)EPOLLET); }
#endif

static void *blocks(void *arg) {
    fd_waiter_t *w = (fd_waiter_t *)arg;
    store(&w->tid, thread_id());
    w->result = w->block(w->fd);
    return NULL;
}

TEST(done_fd_wakes_poll_select_and_epoll) {
    int (*const ways[])(int) = {
        blocks_in_poll,
        blocks_in_select,
#ifdef __linux__
        blocks_in_epoll,
        blocks_in_edge_epoll,
#endif
    };
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        fd_waiter_t w;
        w.fd = ctx_done_fd(ctx);
        w.tid = 0;
        w.block = ways[i];
        w.result = 0;
        pthread_t thread = thread_start(blocks, &w);
        until_asleep(&w.tid);
        ctx_cancel(ctx);
        thread_join(thread);
        EXPECT(w.result == 1);
        EXPECT(ways[i](ctx_done_fd(ctx)) == 1); /* and one who comes late need not block */
        ctx_end(ctx);
    }
}

TEST(a_deadline_makes_the_done_fd_readable) {
    ctx_time_t from = ctx_now();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(10));
    int fd = ctx_done_fd(ctx);
    EXPECT(readable(fd, 30000));
    EXPECT(ctx_now() - from >= CTX_MS(10));
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
}

TEST(without_a_free_fd_the_result_is_the_systems_error) {
    warm_up_fds();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    struct rlimit old, low;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
    int lowest_free = fcntl(0, F_DUPFD, 0);
    CHECK(lowest_free >= 0);
    close(lowest_free);
    low = old;
    low.rlim_cur = (rlim_t)lowest_free;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
    int first = ctx_done_fd(ctx), second = ctx_done_fd(ctx);
    setrlimit(RLIMIT_NOFILE, &old);
    EXPECT_EQ(first, -EMFILE);
    EXPECT_EQ(second, -EMFILE);
    EXPECT_EQ(ctx_err(ctx), 0); /* no harm done to the context */
    int fd = ctx_done_fd(ctx);
    EXPECT(fd >= 0);
    EXPECT(!readable(fd, 0));
    ctx_cancel(ctx);
    EXPECT(readable(fd, 0));
    ctx_end(ctx);
}

TEST(a_context_that_could_get_no_fd_still_cancels) {
    warm_up_fds();
    int before = fd_count();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    struct rlimit old, low;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
    low = old;
    low.rlim_cur = 0;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
    EXPECT_EQ(ctx_done_fd(ctx), -EMFILE);
    EXPECT(ctx_cancel(ctx));
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_CANCELED);
    ctx_end(ctx);
    setrlimit(RLIMIT_NOFILE, &old);
    EXPECT_EQ(fd_count(), before);
}

/* -- condition variables ---------------------------------------------------------------------------------------- */

typedef struct {
    pthread_mutex_t mutex; /* checks its owner */
    pthread_cond_t cond;
    bool ready; /* [mutex] what is waited for */
} box_t;

static void box_init(box_t *box) {
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&box->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    pthread_cond_init(&box->cond, NULL);
    box->ready = false;
}

static void box_destroy(box_t *box) {
    EXPECT_EQ(pthread_cond_destroy(&box->cond), 0);
    EXPECT_EQ(pthread_mutex_destroy(&box->mutex), 0);
}

/* Wait as users do: until it is ready (0) or the context is done (its err). */
static int box_wait(box_t *box, ctx_t *ctx) {
    int rc = 0;
    EXPECT_EQ(pthread_mutex_lock(&box->mutex), 0);
    while (!box->ready && rc == 0) rc = ctx_cond_wait(ctx, &box->cond, &box->mutex);
    EXPECT_EQ(pthread_mutex_unlock(&box->mutex), 0); /* an error if it did not come back held */
    return rc;
}

typedef struct {
    box_t *box;
    ctx_t *ctx;
    int tid, rc, done;
} box_waiter_t;

static void *waits_at_box(void *arg) {
    box_waiter_t *w = (box_waiter_t *)arg;
    store(&w->tid, thread_id());
    w->rc = box_wait(w->box, w->ctx);
    store(&w->done, 1);
    return NULL;
}

static pthread_t wait_at_box(box_waiter_t *w, box_t *box, ctx_t *ctx) {
    memset(w, 0, sizeof *w);
    w->box = box;
    w->ctx = ctx;
    return thread_start(waits_at_box, w);
}

TEST(a_signal_wakes_a_cond_wait_as_ever) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    for (int with = 0; with < 3; with++) { /* signal with the mutex held, then not, then for the background */
        box_t box;
        box_init(&box);
        box_waiter_t w;
        pthread_t thread = wait_at_box(&w, &box, with == 2 ? ctx_background() : ctx);
        until_asleep(&w.tid);
        EXPECT_EQ(load(&w.done), 0);
        pthread_mutex_lock(&box.mutex);
        box.ready = true;
        if (with == 0) pthread_cond_signal(&box.cond);
        pthread_mutex_unlock(&box.mutex);
        if (with != 0) pthread_cond_signal(&box.cond);
        thread_join(thread);
        EXPECT_EQ(w.rc, 0);
        box_destroy(&box);
    }
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
}

TEST(cond_wait_on_a_done_context_returns_its_err_with_the_mutex_held) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    box_t box;
    box_init(&box);
    pthread_mutex_lock(&box.mutex);
    EXPECT_EQ(ctx_cond_wait(ctx, &box.cond, &box.mutex), CTX_CANCELED);
    EXPECT_EQ(ctx_cond_wait(ctx, &box.cond, &box.mutex), CTX_CANCELED);
    EXPECT_EQ(pthread_mutex_unlock(&box.mutex), 0);
    box_destroy(&box);
    ctx_end(ctx);
}

TEST(a_cancel_wakes_a_cond_wait) {
    for (int holds = 0; holds < 2; holds++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        box_t box;
        box_init(&box);
        box_waiter_t w;
        pthread_t thread = wait_at_box(&w, &box, ctx);
        until_asleep(&w.tid);
        if (holds) pthread_mutex_lock(&box.mutex);
        ctx_cancel(ctx);
        if (holds) {
            EXPECT_EQ(load(&w.done), 0); /* it needs the mutex to come back */
            pthread_mutex_unlock(&box.mutex);
        }
        thread_join(thread);
        EXPECT_EQ(w.rc, CTX_CANCELED);
        box_destroy(&box);
        ctx_end(ctx);
    }
}

TEST(a_deadline_ends_a_cond_wait_and_never_early) {
    for (int i = 1; i <= 20; i++) {
        ctx_time_t from = ctx_now();
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(200) * i);
        box_t box;
        box_init(&box);
        EXPECT_EQ(box_wait(&box, ctx), CTX_DEADLINE_EXCEEDED);
        EXPECT(ctx_now() - from >= CTX_US(200) * i);
        box_destroy(&box);
        ctx_end(ctx);
    }
}

TEST(the_clock_may_be_advanced_by_a_thread_that_holds_the_mutex) {
    ctx_clock_fake(0);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    box_t box;
    box_init(&box);
    box_waiter_t w;
    pthread_t thread = wait_at_box(&w, &box, ctx);
    until_asleep(&w.tid);
    pthread_mutex_lock(&box.mutex);
    ctx_clock_advance(CTX_S(3600));
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    pthread_mutex_unlock(&box.mutex);
    thread_join(thread);
    EXPECT_EQ(w.rc, CTX_DEADLINE_EXCEEDED);
    box_destroy(&box);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(waiters_on_one_condition_are_canceled_one_by_one) {
    enum { WAITERS = 8 };
    box_t box;
    box_init(&box);
    box_waiter_t w[WAITERS];
    pthread_t threads[WAITERS];
    ctx_t *ctx[WAITERS];
    for (int i = 0; i < WAITERS; i++) {
        ctx[i] = ctx_with_cancel(ctx_background());
        threads[i] = wait_at_box(&w[i], &box, ctx[i]);
    }
    for (int i = 0; i < WAITERS; i++) until_asleep(&w[i].tid);
    for (int i = 0; i < WAITERS; i += 2) {
        ctx_cancel(ctx[i]);
        thread_join(threads[i]);
        EXPECT_EQ(w[i].rc, CTX_CANCELED);
    }
    for (int i = 1; i < WAITERS; i += 2) EXPECT_EQ(load(&w[i].done), 0);
    pthread_mutex_lock(&box.mutex);
    box.ready = true;
    pthread_cond_broadcast(&box.cond);
    pthread_mutex_unlock(&box.mutex);
    for (int i = 1; i < WAITERS; i += 2) {
        thread_join(threads[i]);
        EXPECT_EQ(w[i].rc, 0);
    }
    for (int i = 0; i < WAITERS; i++) ctx_end(ctx[i]);
    box_destroy(&box);
}

TEST(many_cond_waits_on_one_context_all_end) {
    enum { WAITERS = 16, BOXES = 4 };
    box_t boxes[BOXES];
    for (int b = 0; b < BOXES; b++) box_init(&boxes[b]);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    box_waiter_t w[WAITERS];
    pthread_t threads[WAITERS];
    for (int i = 0; i < WAITERS; i++) threads[i] = wait_at_box(&w[i], &boxes[i % BOXES], ctx);
    for (int i = 0; i < WAITERS; i++) until_asleep(&w[i].tid);
    for (int b = 0; b < BOXES; b++) pthread_mutex_lock(&boxes[b].mutex);
    ctx_cancel(ctx);
    for (int b = 0; b < BOXES; b++) pthread_mutex_unlock(&boxes[b].mutex);
    for (int i = 0; i < WAITERS; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(w[i].rc, CTX_CANCELED);
    }
    for (int b = 0; b < BOXES; b++) box_destroy(&boxes[b]);
    ctx_end(ctx);
}

typedef struct {
    start_line_t line;
    ctx_t *ctx;
    box_t *box;
    int rounds, tid;
} cond_race_t;

/* Each round's mutex and condition are freed the moment that the wait has returned: nothing may touch them later. */
static void *waits_and_frees_the_box(void *arg) {
    cond_race_t *race = (cond_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        EXPECT_EQ(box_wait(race->box, race->ctx), CTX_CANCELED);
        if (i % 4 < 2) {
            box_destroy(race->box);
            free(race->box);
        }
        start_line(&race->line);
    }
    return NULL;
}

/* The window is between the look at the context and the parking on the condition: the cancel comes at every distance
   from it, from a thread that holds the mutex and from one that does not. A lost wake-up would hang. */
TEST(no_cancel_is_lost_on_the_way_into_a_cond_wait) {
    cond_race_t race;
    start_line_init(&race.line, 2);
    race.rounds = test_scale(20000);
    race.tid = 0;
    pthread_t thread = thread_start(waits_and_frees_the_box, &race);
    for (int i = 0; i < race.rounds; i++) {
        box_t *box = (box_t *)malloc(sizeof *box);
        CHECK(box != NULL);
        box_init(box);
        race.box = box;
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        spin((unsigned)(i % 251) * 3);
        if (i % 4 >= 2) { /* here the box outlives the round, since this side uses it */
            pthread_mutex_lock(&box->mutex);
            ctx_cancel(race.ctx);
            pthread_mutex_unlock(&box->mutex);
        } else {
            ctx_cancel(race.ctx);
        }
        start_line(&race.line);
        if (i % 4 >= 2) {
            box_destroy(box);
            free(box);
        }
        ctx_end(race.ctx);
    }
    thread_join(thread);
}

typedef struct {
    start_line_t line;
    ctx_t *ctx;
    box_t *box;
    int rounds, ready_first, canceled_first;
} signal_race_t;

static void *waits_for_either(void *arg) {
    signal_race_t *race = (signal_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        int rc = box_wait(race->box, race->ctx);
        EXPECT(rc == 0 || rc == CTX_CANCELED);
        if (rc == 0)
            race->ready_first++;
        else
            race->canceled_first++;
        start_line(&race->line);
    }
    return NULL;
}

static void *makes_ready(void *arg) {
    signal_race_t *race = (signal_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        spin((unsigned)(i % 13) * 40);
        pthread_mutex_lock(&race->box->mutex);
        race->box->ready = true;
        pthread_cond_signal(&race->box->cond);
        pthread_mutex_unlock(&race->box->mutex);
        start_line(&race->line);
    }
    return NULL;
}

TEST(a_cond_wait_ends_when_signal_and_cancel_come_together) {
    signal_race_t race;
    box_t box;
    start_line_init(&race.line, 3);
    race.rounds = test_scale(5000);
    race.ready_first = race.canceled_first = 0;
    race.box = &box;
    pthread_t waiter = thread_start(waits_for_either, &race);
    pthread_t maker = thread_start(makes_ready, &race);
    for (int i = 0; i < race.rounds; i++) {
        box_init(&box);
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        spin((unsigned)(i % 17) * 40);
        ctx_cancel(race.ctx);
        start_line(&race.line);
        ctx_end(race.ctx);
        box_destroy(&box);
    }
    thread_join(waiter);
    thread_join(maker);
    EXPECT_EQ(race.ready_first + race.canceled_first, race.rounds);
}

TEST(the_runtime_stops_clean) { ctx_runtime_stop(); }

TEST_MAIN
