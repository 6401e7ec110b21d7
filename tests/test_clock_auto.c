/* The fake clock that moves by itself: ctx_clock_auto(). */
#include "fault.h"
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"
#include "child.h"

static int zero(ctx_t *ctx, void *arg) {
    (void)ctx, (void)arg;
    return 0;
}

TEST(a_sleep_takes_no_time) {
    int64_t begin = test_now_ns();
    ctx_clock_auto(CTX_S(1));
    for (int i = 0; i < 1000; i++) EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(3600)), 0);
    EXPECT_EQ(ctx_now(), CTX_S(3600001));
    ctx_clock_real();
    EXPECT(test_now_ns() - begin < CTX_S(60));
}

TEST(a_deadline_comes_to_the_nanosecond) {
    ctx_clock_auto(0);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(1800) + 7), *child = ctx_with_timeout(ctx, CTX_S(1801));
    EXPECT_EQ(ctx_wait(child, CTX_S(1800)), CTX_NOT_READY);
    EXPECT_EQ(ctx_now(), CTX_S(1800));
    EXPECT_EQ(ctx_wait(child, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_now(), CTX_S(1800) + 7);
    ctx_end(child);
    ctx_end(ctx);
    ctx_clock_real();
}

/* -- a storm of retries ------------------------------------------------------------------------------------------- */

enum { TASKS = 1000, WORKERS = 50 };

typedef struct {
    int calls;
    ctx_time_t ended;
} client_t;

static int fails(ctx_t *ctx, void *arg) {
    client_t *client = (client_t *)arg;
    (void)ctx;
    return ++client->calls < 12 ? -EIO : 0;
}

static int client_runs(ctx_t *ctx, void *arg) {
    client_t *client = (client_t *)arg;
    ctx_retry_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.attempts = 20;
    desc.base = CTX_MS(100);
    desc.cap = CTX_S(10);
    int rc = ctx_retry(ctx, &desc, fails, client);
    client->ended = ctx_now();
    return rc;
}

static ctx_time_t retry_storm(uint64_t *sum) {
    static client_t clients[TASKS];
    ctx_pool_desc_t desc;
    ctx_drain_report_t report;
    memset(clients, 0, sizeof clients);
    memset(&desc, 0, sizeof desc);
    desc.workers = WORKERS;
    desc.queue = TASKS;
    ctx_clock_auto(0);
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
    for (int i = 0; i < TASKS; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "client", client_runs, &clients[i]), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_S(3600), &report), 0);
    EXPECT_EQ(report.completed, TASKS);
    ctx_time_t end = ctx_now();
    *sum = 0;
    for (int i = 0; i < TASKS; i++) *sum += (uint64_t)clients[i].ended;
    ctx_pool_free(pool);
    ctx_clock_real();
    return end;
}

TEST(a_storm_of_retries_is_the_same_each_time) {
    uint64_t sum, again;
    ctx_time_t end = retry_storm(&sum);
    EXPECT(end > CTX_S(600));
    for (int i = 0; i < 2; i++) {
        EXPECT_EQ(retry_storm(&again), end);
        EXPECT_EQ(again, sum);
    }
}

/* -- threads of the library ---------------------------------------------------------------------------------------- */

static int sleeps(ctx_t *ctx, void *arg) { return ctx_sleep(ctx, *(const ctx_dur_t *)arg); }

TEST(the_clock_waits_for_every_thread_that_runs) {
    ctx_dur_t spans[8];
    for (int round = 0; round < test_scale(200); round++) {
        ctx_clock_auto(CTX_S(5));
        ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
        for (int i = 0; i < 8; i++) {
            spans[i] = CTX_S(i + 1);
            EXPECT_EQ(ctx_group_go(group, sleeps, &spans[i]), 0);
        }
        EXPECT_EQ(ctx_now(), CTX_S(5)); /* this thread runs */
        EXPECT_EQ(ctx_group_wait(group), 0);
        EXPECT_EQ(ctx_now(), CTX_S(13));
        ctx_clock_real();
    }
}

typedef struct {
    ctx_chan_t *chan;
    int got;
} pipe_t;

static int produces(ctx_t *ctx, void *arg) {
    pipe_t *pipe = (pipe_t *)arg;
    for (int i = 0; i < 100; i++) {
        if (ctx_sleep(ctx, CTX_MS(10)) || ctx_chan_send(pipe->chan, ctx, &i)) return -EIO;
    }
    return ctx_chan_close(pipe->chan);
}

static int consumes(ctx_t *ctx, void *arg) {
    pipe_t *pipe = (pipe_t *)arg;
    int item;
    while (ctx_chan_recv(pipe->chan, ctx, &item) == 0) {
        pipe->got++;
        if (ctx_now() != CTX_MS(10) * (item + 1)) return -EIO; /* handed over at that very moment */
    }
    return 0;
}

TEST(a_hand_over_takes_no_time) {
    for (size_t capacity = 0; capacity < 3; capacity++) {
        pipe_t pipe;
        ctx_clock_auto(0);
        memset(&pipe, 0, sizeof pipe);
        pipe.chan = ctx_chan_new(sizeof(int), capacity);
        ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
        EXPECT_EQ(ctx_group_go(group, produces, &pipe), 0);
        EXPECT_EQ(ctx_group_go(group, consumes, &pipe), 0);
        EXPECT_EQ(ctx_group_wait(group), 0);
        EXPECT_EQ(pipe.got, 100);
        EXPECT_EQ(ctx_now(), CTX_S(1));
        ctx_chan_free(pipe.chan);
        ctx_clock_real();
    }
}

/* A worker naps, and the next task waits for it, when the clock begins. */
TEST(a_nap_that_began_before_does_not_let_the_clock_run_ahead) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = 1;
    desc.coalesce = CTX_S(1);
    for (int i = 0; i < 3; i++) {
        ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "zero", zero, NULL), 0);
        test_sleep_ms(5);
        ctx_clock_auto(0);
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(100));
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "zero", zero, NULL), 0);
        EXPECT_EQ(ctx_pool_wait(pool, ctx), 0);
        EXPECT_EQ(ctx_now(), 0);
        ctx_end(ctx);
        ctx_pool_free(pool);
        ctx_clock_real();
    }
}

TEST(tasks_that_gather_do_not_let_the_clock_run_ahead) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = 2;
    desc.coalesce = CTX_MS(5);
    ctx_clock_auto(0);
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
    for (int i = 0; i < 200; i++) {
        ctx_time_t now = ctx_now();
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "zero", zero, NULL), 0);
        EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(1)), 0);
        EXPECT_EQ(ctx_now(), now + CTX_S(1));
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_S(1), NULL), 0);
    EXPECT_EQ(ctx_now(), CTX_S(200));
    ctx_pool_free(pool);
    ctx_clock_real();
}

static int batches; /* [atomic] */
static int counts(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)ctx, (void)items, (void)n, (void)user;
    return add(&batches, 1), 0;
}

TEST(timers_that_call_and_limiters_move_it_too) {
    ctx_batch_desc_t desc;
    ctx_limiter_t limiter;
    int item = 1;
    memset(&desc, 0, sizeof desc);
    desc.item_size = sizeof item;
    desc.max_delay = CTX_S(30);
    desc.flush = counts;
    ctx_clock_auto(0);
    ctx_batch_t *batch = ctx_batch_new(ctx_background(), &desc);
    EXPECT_EQ(ctx_batch_add(batch, &item), 0);
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(29)), 0);
    EXPECT_EQ(load(&batches), 0);
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(2)), 0);
    EXPECT_EQ(load(&batches), 1);
    EXPECT_EQ(ctx_batch_drain(batch, CTX_S(1), NULL), 0);
    ctx_batch_free(batch);
    EXPECT_EQ(ctx_limiter_init(&limiter, 1, 1), 0);
    for (int i = 0; i < 61; i++) EXPECT_EQ(ctx_limiter_wait(&limiter, ctx_background(), 1), 0);
    EXPECT_EQ(ctx_now(), CTX_S(91));
    ctx_clock_real();
}

/* -- threads of the program ---------------------------------------------------------------------------------------- */

typedef struct {
    gate_t joined;
    int seen; /* [atomic] */
    bool leaves;
} joiner_t;

static void *joins(void *arg) {
    joiner_t *joiner = (joiner_t *)arg;
    ctx_clock_join();
    gate_pass(&joiner->joined);
    test_sleep_ms(30); /* the clock waits for it */
    store(&joiner->seen, ctx_now() == 0);
    if (joiner->leaves) ctx_clock_leave();
    return NULL;
}

TEST(the_clock_waits_for_threads_that_joined) {
    for (int i = 0; i < 2; i++) {
        joiner_t joiner;
        memset(&joiner, 0, sizeof joiner);
        gate_init(&joiner.joined);
        joiner.leaves = i;
        ctx_clock_auto(0);
        pthread_t thread = thread_start(joins, &joiner);
        gate_await(&joiner.joined, 1);
        gate_open(&joiner.joined);
        EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(1)), 0);
        EXPECT_EQ(load(&joiner.seen), 1);
        pthread_join(thread, NULL);
        EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(1)), 0); /* it has left */
        EXPECT_EQ(ctx_now(), CTX_S(2));
        ctx_clock_real();
        gate_destroy(&joiner.joined);
    }
}

static void *sleeps_alone(void *arg) {
    (void)arg;
    ctx_clock_join();
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(5)), 0);
    return NULL;
}

TEST(a_thread_that_left_may_block) {
    ctx_clock_auto(0);
    pthread_t thread = thread_start(sleeps_alone, NULL);
    ctx_clock_leave();
    pthread_join(thread, NULL);
    ctx_clock_join();
    EXPECT_EQ(ctx_now(), CTX_S(5));
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(5)), 0);
    ctx_clock_join(); /* twice is once */
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(5)), 0);
    ctx_clock_real();
    ctx_clock_join(); /* nothing to join */
    ctx_clock_leave();
}

/* -- the end ------------------------------------------------------------------------------------------------------ */

static int receives(ctx_t *ctx, void *arg) { return ctx_chan_recv((ctx_chan_t *)arg, ctx, NULL); }

static int waits_for_ever(void) {
    ctx_clock_auto(0);
    ctx_chan_t *chan = ctx_chan_new(1, 1);
    ctx_t *ctx = ctx_derive_at(ctx_background(), NULL, "here:1");
    ctx_group_t *group = ctx_group_new(ctx, NULL);
    if (ctx_group_go(group, receives, chan)) return 2;
    ctx_group_wait(group);
    return 3;
}

TEST(when_all_wait_and_no_deadline_is_left_it_lists_the_waits) {
    if (CTX__TSAN) SKIP("no threads in the child of a threaded process");
    int fds[2];
    char text[2000];
    CHECK_EQ(pipe(fds), 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(60);
        dup2(fds[1], STDERR_FILENO);
        _exit(waits_for_ever());
    }
    close(fds[1]);
    size_t n = 0;
    while (n < sizeof text - 1) {
        ssize_t got = read(fds[0], text + n, sizeof text - 1 - n);
        if (got <= 0) break;
        n += (size_t)got;
    }
    text[n] = 0;
    close(fds[0]);
    EXPECT_EQ(end_of_child(pid), 1000 + SIGABRT);
    EXPECT(strstr(text, "no deadline is left") != NULL);
    EXPECT(strstr(text, "ctx_group_wait") != NULL);
    EXPECT(strstr(text, "ctx_chan_recv") != NULL || strstr(text, "select") != NULL);
}

static int sends_a_signal(ctx_t *ctx, void *arg) {
    int rc = ctx_sleep(ctx, CTX_S(30));
    (void)arg;
    return rc ? rc : kill(getpid(), SIGUSR1);
}

TEST(a_signal_that_is_awaited_is_no_deadlock) {
    const int sig = SIGUSR1;
    for (int i = 0; i < test_scale(500); i++) {
        ctx_clock_auto(0);
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        EXPECT_EQ(ctx_go(ctx_background(), "sends", sends_a_signal, NULL), 0);
        EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_CANCELED);
        EXPECT_EQ(ctx_now(), CTX_S(30));
        ctx_end(ctx);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        ctx_clock_real();
    }
}

TEST(idle_threads_are_no_deadlock) {
    ctx_clock_auto(0);
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), NULL);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "zero", zero, NULL), 0);
    ctx_clock_leave();
    test_sleep_ms(20);
    ctx_clock_join();
    EXPECT_EQ(ctx_pool_drain(pool, CTX_S(1), NULL), 0);
    ctx_pool_free(pool);
    EXPECT_EQ(ctx_now(), 0);
    ctx_clock_real();
}

TEST(it_may_follow_a_clock_that_was_advanced_and_be_followed_by_one) {
    for (int i = 0; i < test_scale(200); i++) {
        ctx_clock_fake(0);
        ctx_clock_advance(CTX_S(5));
        ctx_clock_auto(CTX_S(1));
        EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(1)), 0);
        ctx_clock_fake(0);
        EXPECT_EQ(ctx_now(), 0);
        ctx_clock_real();
        ctx_dur_t span = 1;
        ctx_group_t *group = ctx_group_new(ctx_background(), NULL); /* the idle thread of it is there the next time */
        EXPECT_EQ(ctx_group_go(group, sleeps, &span), 0);
        EXPECT_EQ(ctx_group_wait(group), 0);
        if (i % 8 == 0) ctx_runtime_stop();
    }
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST_MAIN
