/* In the child of a fork the library works afresh: timers fire, no lock stays taken, done fds are its own. */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"
#include "child.h"

#include <poll.h>
#include <sys/wait.h>

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#elif __has_feature(address_sanitizer)
#define UNDER_ASAN 1
#endif
#endif

/* The thread sanitizer knows no threads in the child of a threaded process: it takes one in the place of a thread
   that is gone for a duplicate. So there children start none, and what needs one is skipped. */
#ifdef UNDER_TSAN
#define NO_THREADS_IN_CHILDREN 1
#ifdef __cplusplus
extern "C"
#endif
    const char *
    __tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0"; }
#else
#define NO_THREADS_IN_CHILDREN 0
#endif
#define NEEDS_THREADS_IN_CHILDREN                                                              \
    do {                                                                                       \
        if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children"); \
    } while (0)

enum { CHILD_SECONDS = 40 };

/* Run fn(arg) in a child: 0 if all is well. It returns the line of what was not; a child that hangs gets an alarm. */
static int in_child(int (*fn)(void *arg), void *arg) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0) return -1;
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        signal(SIGABRT, SIG_DFL);
        signal(SIGSEGV, SIG_DFL);
        alarm(CHILD_SECONDS);
        int line = fn(arg);
        if (line) {
            char text[80];
            int n = snprintf(text, sizeof text, "  in the child, line %d of %s\n", line, __FILE__);
            if (write(STDERR_FILENO, text, (size_t)n) < 0) _exit(2);
        }
        _exit(line ? 1 : 0);
    }
    return end_of_child(pid);
}

static void count(void *arg) { __atomic_add_fetch((int *)arg, 1, __ATOMIC_RELEASE); }

static const ctx_key_t key = CTX_KEY(int);

/* Everything but timers, under any parent. */
static int use_contexts(ctx_t *parent) {
    int seven = 7, runs = 0;
    ctx_on_done_t reg;
    for (int i = 0; i < 100; i++) {
        ctx_t *top = ctx_with_cancel(parent);
        REQUIRE(ctx_err(top) == 0);
        ctx_t *child = ctx_with_value(top, &key, &seven);
        ctx_t *merged = ctx_merge(child, ctx_background());
        REQUIRE(ctx_value(merged, &key) != NULL);
        REQUIRE(ctx_on_done(&reg, merged, count, &runs));
        REQUIRE(ctx_cancel(top));
        REQUIRE(ctx_err(merged) == CTX_CANCELED);
        REQUIRE(runs == i + 1);
        ctx_end(merged);
        ctx_end(child);
        ctx_end(top);
    }
    return 0;
}

static int use_timers(ctx_t *parent) {
    if (NO_THREADS_IN_CHILDREN) return 0;
    for (int i = 0; i < 5; i++) {
        ctx_time_t deadline = ctx_now() + CTX_MS(2);
        ctx_t *ctx = ctx_with_deadline(parent, deadline);
        REQUIRE(ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
        REQUIRE(ctx_now() >= deadline);
        ctx_end(ctx);
    }
    return 0;
}

static int use_all(void *arg) {
    ctx_t *parent = (ctx_t *)arg;
    int line = use_contexts(parent);
    return line ? line : use_timers(parent);
}

TEST(a_child_of_a_fresh_process_uses_the_library) {
    EXPECT_EQ(in_child(use_all, ctx_background()), 0);
    EXPECT_EQ(use_all(ctx_background()), 0);
}

TEST(a_child_uses_the_library_while_the_parents_runtime_runs) {
    NEEDS_THREADS_IN_CHILDREN;
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_S(500));
    for (int i = 0; i < 10; i++) EXPECT_EQ(in_child(use_all, live), 0);
    EXPECT_EQ(ctx_err(live), 0);
    EXPECT_EQ(use_all(live), 0);
    ctx_end(live);
}

static int fork_again(void *arg) {
    int line = use_all(arg);
    if (line) return line;
    REQUIRE(in_child(use_all, arg) == 0);
    return use_all(arg);
}

TEST(a_child_of_a_child_uses_the_library) { EXPECT_EQ(in_child(fork_again, ctx_background()), 0); }

static int stop_runtime_and_go_on(void *arg) {
    ctx_runtime_stop(); /* there is no thread to join here */
    int line = use_all(arg);
    if (line) return line;
    ctx_runtime_stop();
    ctx_runtime_stop();
    return use_all(arg);
}

TEST(a_child_may_stop_and_restart_its_runtime) {
    NEEDS_THREADS_IN_CHILDREN;
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_S(500));
    EXPECT_EQ(in_child(stop_runtime_and_go_on, live), 0);
    EXPECT_EQ(use_all(live), 0);
    ctx_end(live);
}

/* -- deadlines that were there before -------------------------------------------------------------------------- */

typedef struct {
    ctx_t *ctx, *below;
    ctx_on_done_t reg;
    int runs; /* [atomic] */
} before_t;

static before_t *deadline_before(ctx_dur_t timeout) {
    static before_t before;
    memset(&before, 0, sizeof before);
    before.ctx = ctx_with_timeout(ctx_background(), timeout);
    before.below = ctx_with_cancel(before.ctx);
    ctx_on_done(&before.reg, before.below, count, &before.runs);
    return &before;
}

static int wait_for_deadline(void *arg) {
    before_t *before = (before_t *)arg;
    REQUIRE(ctx_wait(before->below, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    REQUIRE(ctx_now() >= ctx_deadline(before->ctx));
    bool stopped = ctx_on_done_stop(&before->reg); /* a waiter may be back before the callback has begun */
    REQUIRE(load(&before->runs) == (stopped ? 0 : 1));
    ctx_end(before->below);
    ctx_end(before->ctx);
    return 0;
}

TEST(a_deadline_of_the_parent_fires_in_both_for_waiters) {
    NEEDS_THREADS_IN_CHILDREN;
    before_t *before = deadline_before(CTX_MS(100));
    EXPECT_EQ(in_child(wait_for_deadline, before), 0);
    EXPECT_EQ(wait_for_deadline(before), 0);
}

static int poll_for_deadline(void *arg) {
    before_t *before = (before_t *)arg;
    int turns = 0;
    while (ctx_err(before->below) == 0) race_pause(&turns);
    REQUIRE(ctx_err(before->below) == CTX_DEADLINE_EXCEEDED);
    REQUIRE(ctx_now() >= ctx_deadline(before->ctx));
    return wait_for_deadline(arg);
}

TEST(a_deadline_of_the_parent_fires_in_a_child_that_only_polls) {
    NEEDS_THREADS_IN_CHILDREN;
    before_t *before = deadline_before(CTX_MS(100));
    EXPECT_EQ(in_child(poll_for_deadline, before), 0);
    EXPECT_EQ(poll_for_deadline(before), 0);
}

static int run_callback_at_deadline(void *arg) {
    before_t *before = (before_t *)arg;
    int turns = 0;
    while (load(&before->runs) == 0) race_pause(&turns);
    REQUIRE(!ctx_on_done_stop(&before->reg));
    return wait_for_deadline(arg);
}

TEST(a_callback_of_the_parent_runs_in_a_child_that_does_nothing) {
    NEEDS_THREADS_IN_CHILDREN;
    before_t *before = deadline_before(CTX_MS(100));
    EXPECT_EQ(in_child(run_callback_at_deadline, before), 0);
    EXPECT_EQ(run_callback_at_deadline(before), 0);
}

static int poll_a_new_deadline(void *arg) {
    for (int i = 0; i < 5; i++) {
        ctx_t *ctx = ctx_with_timeout((ctx_t *)arg, CTX_MS(3));
        int turns = 0;
        while (ctx_err(ctx) == 0) race_pause(&turns);
        REQUIRE(ctx_err(ctx) == CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
    }
    return 0;
}

TEST(a_deadline_of_the_child_fires_while_it_polls) {
    NEEDS_THREADS_IN_CHILDREN;
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_S(500));
    EXPECT_EQ(in_child(poll_a_new_deadline, live), 0);
    ctx_end(live);
}

TEST(a_deadline_that_passes_in_the_parent_alone_is_nothing_to_the_child) {
    NEEDS_THREADS_IN_CHILDREN;
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_S(500));
    int ready[2];
    CHECK(pipe(ready) == 0);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        char byte;
        alarm(CHILD_SECONDS);
        signal(SIGALRM, SIG_DFL);
        close(ready[1]);
        if (read(ready[0], &byte, 1) != 1) _exit(2);
        _exit(ctx_err(live) == 0 && use_all(live) == 0 ? 0 : 1);
    }
    EXPECT(ctx_cancel(live));
    EXPECT(write(ready[1], "x", 1) == 1);
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
    close(ready[0]);
    close(ready[1]);
    ctx_end(live);
}

TEST(the_fake_clock_goes_on_in_the_child_by_itself) {
    ctx_clock_fake(CTX_S(5));
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(CHILD_SECONDS);
        signal(SIGALRM, SIG_DFL);
        if (ctx_now() != CTX_S(5)) _exit(2);
        ctx_clock_advance(CTX_S(30) - 1);
        if (ctx_err(ctx) != 0) _exit(3);
        ctx_clock_advance(1);
        _exit(ctx_err(ctx) == CTX_DEADLINE_EXCEEDED ? 0 : 4);
    }
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
    EXPECT_EQ(ctx_now(), CTX_S(5));
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
    ctx_clock_real();
}

/* A runtime thread that is busy with one deadline has others in hand that are due as well. They are the child's too. */
typedef struct {
    ctx_t *slow, *due[8];
    ctx_on_done_t reg;
    int entered, leave; /* [atomic] */
    pthread_t forker;
} in_hand_t;

static void hold_the_runtime(void *arg) {
    in_hand_t *hand = (in_hand_t *)arg;
    store(&hand->entered, 1);
    if (!pthread_equal(hand->forker, pthread_self())) race_await(&hand->leave, 1);
}

static int wait_for_all_due(void *arg) {
    in_hand_t *hand = (in_hand_t *)arg;
    REQUIRE(!ctx_on_done_stop(&hand->reg)); /* it ran in a thread that is gone */
    for (int i = 0; i < 8; i++) REQUIRE(ctx_wait(hand->due[i], CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    return use_timers(ctx_background());
}

TEST(deadlines_that_were_due_at_the_fork_fire_in_the_child) {
    NEEDS_THREADS_IN_CHILDREN;
    in_hand_t hand;
    memset(&hand, 0, sizeof hand);
    ctx_time_t deadline = ctx_now() + CTX_MS(50);
    hand.slow = ctx_with_deadline(ctx_background(), deadline);
    for (int i = 0; i < 8; i++) hand.due[i] = ctx_with_deadline(ctx_background(), deadline + i);
    hand.forker = pthread_self();
    ctx_on_done(&hand.reg, hand.slow, hold_the_runtime, &hand);
    race_await(&hand.entered, 1);
    EXPECT_EQ(in_child(wait_for_all_due, &hand), 0);
    store(&hand.leave, 1);
    for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_wait(hand.due[i], CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    ctx_on_done_stop(&hand.reg);
    for (int i = 0; i < 8; i++) ctx_end(hand.due[i]);
    ctx_end(hand.slow);
}

/* -- done fds -------------------------------------------------------------------------------------------------- */

typedef struct {
    ctx_t *ctx, *other;
    int fd;
    int to_child[2], to_parent[2];
} fds_t;

static int cancel_in_the_child(void *arg) {
    fds_t *fds = (fds_t *)arg;
    int fd = ctx_done_fd(fds->ctx);
    REQUIRE(fd >= 0 && !readable(fd));
    REQUIRE(ctx_cancel(fds->ctx));
    REQUIRE(readable(fd));
    REQUIRE(readable(ctx_done_fd(fds->ctx)));
    REQUIRE(!readable(ctx_done_fd(fds->other)));
    ctx_end(fds->ctx);
    return 0;
}

TEST(a_cancel_in_the_child_does_not_show_on_the_parents_done_fd) {
    for (int i = 0; i < 5; i++) {
        fds_t fds;
        fds.ctx = ctx_with_cancel(ctx_background());
        fds.other = ctx_with_cancel(ctx_background());
        fds.fd = ctx_done_fd(fds.ctx);
        EXPECT(fds.fd >= 0);
        EXPECT_EQ(in_child(cancel_in_the_child, &fds), 0);
        EXPECT(!readable(fds.fd));
        EXPECT(ctx_done_fd(fds.ctx) == fds.fd);
        EXPECT_EQ(ctx_err(fds.ctx), 0);
        EXPECT(ctx_cancel(fds.ctx));
        EXPECT(readable(fds.fd));
        ctx_end(fds.ctx);
        ctx_end(fds.other);
    }
}

static int watch_while_the_parent_cancels(void *arg) {
    fds_t *fds = (fds_t *)arg;
    char byte;
    REQUIRE(write(fds->to_parent[1], "x", 1) == 1);
    REQUIRE(read(fds->to_child[0], &byte, 1) == 1);
    REQUIRE(ctx_err(fds->ctx) == 0);
    int fd = ctx_done_fd(fds->ctx);
    REQUIRE(fd >= 0 && !readable(fd));
    REQUIRE(ctx_cancel(fds->ctx));
    REQUIRE(readable(fd));
    return 0;
}

static void *cancel_when_told(void *arg) {
    fds_t *fds = (fds_t *)arg;
    char byte;
    EXPECT(read(fds->to_parent[0], &byte, 1) == 1);
    EXPECT(ctx_cancel(fds->ctx));
    EXPECT(readable(fds->fd));
    EXPECT(write(fds->to_child[1], "x", 1) == 1);
    return NULL;
}

TEST(a_cancel_in_the_parent_does_not_show_on_the_childs_done_fd) {
    fds_t fds;
    fds.ctx = ctx_with_cancel(ctx_background());
    fds.other = NULL;
    fds.fd = ctx_done_fd(fds.ctx);
    EXPECT(fds.fd >= 0);
    CHECK(pipe(fds.to_child) == 0 && pipe(fds.to_parent) == 0);
    pthread_t canceler = thread_start(cancel_when_told, &fds);
    EXPECT_EQ(in_child(watch_while_the_parent_cancels, &fds), 0);
    thread_join(canceler);
    for (int i = 0; i < 2; i++) {
        close(fds.to_child[i]);
        close(fds.to_parent[i]);
    }
    ctx_end(fds.ctx);
}

static int look_at_a_done_one(void *arg) {
    fds_t *fds = (fds_t *)arg;
    REQUIRE(readable(ctx_done_fd(fds->ctx))); /* done before the fork */
    REQUIRE(!readable(ctx_done_fd(fds->other)));
    REQUIRE(ctx_cancel(fds->other));
    REQUIRE(readable(ctx_done_fd(fds->other)));
    return 0;
}

TEST(a_done_context_is_readable_in_the_child) {
    fds_t fds;
    fds.ctx = ctx_with_cancel(ctx_background());
    fds.other = ctx_with_cancel(ctx_background());
    fds.fd = ctx_done_fd(fds.ctx);
    ctx_cancel(fds.ctx);
    EXPECT_EQ(in_child(look_at_a_done_one, &fds), 0);
    EXPECT(!readable(ctx_done_fd(fds.other)));
    ctx_end(fds.ctx);
    ctx_end(fds.other);
}

/* -- fork while threads are at work ---------------------------------------------------------------------------- */

typedef struct {
    ctx_t *shared;
    int over;   /* [atomic] */
    int tid[2]; /* [atomic] of those that wait */
} busy_t;

static void *hammer(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    busy_t *busy = (busy_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    int runs = 0, seven = 7;
    ctx_t *kept[8];
    memset(kept, 0, sizeof kept);
    for (unsigned i = 0; !load(&busy->over); i++) {
        ctx_t *parent = race_below(&seed, 2) ? busy->shared : ctx_background();
        ctx_t *child = i % 4 == 0   ? ctx_with_timeout(parent, CTX_US(race_below(&seed, 300)))
                       : i % 4 == 1 ? ctx_with_value(parent, &key, &seven)
                       : i % 4 == 2 ? ctx_merge(busy->shared, ctx_background())
                                    : ctx_with_cancel(parent);
        ctx_t *below = ctx_with_cancel(child);
        ctx_on_done_t reg;
        ctx_on_done(&reg, below, count, &runs);
        if (i % 3 == 0) ctx_cancel(child);
        ctx_on_done_stop(&reg);
        ctx_end(below);
        if (kept[i % 8]) ctx_end(kept[i % 8]);
        kept[i % 8] = child;
    }
    for (int i = 0; i < 8; i++) ctx_end(kept[i]);
    return NULL;
}

static int use_what_was_hammered(void *arg) {
    busy_t *busy = (busy_t *)arg;
    int line = use_all(ctx_background());
    if (line) return line;
    REQUIRE(ctx_err(busy->shared) == 0);
    line = use_all(busy->shared);
    if (line) return line;
    ctx_t *children[20];
    for (int i = 0; i < 20; i++) children[i] = ctx_with_cancel(busy->shared);
    REQUIRE(ctx_cancel(busy->shared));
    for (int i = 0; i < 20; i++) {
        REQUIRE(ctx_err(children[i]) == CTX_CANCELED);
        ctx_end(children[i]);
    }
    ctx_t *born = ctx_with_cancel(busy->shared);
    REQUIRE(ctx_err(born) == CTX_CANCELED);
    ctx_end(born);
    ctx_runtime_stop();
    return use_timers(ctx_background());
}

TEST(no_lock_stays_taken_when_four_threads_were_at_work) {
#ifdef UNDER_ASAN
    SKIP("locks of the address sanitizer's own malloc stay taken in the child");
#endif
    busy_t busy;
    memset(&busy, 0, sizeof busy);
    busy.shared = ctx_with_cancel(ctx_background());
    race_side_t sides[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        sides[i].id = i;
        sides[i].shared = &busy;
        threads[i] = thread_start(hammer, &sides[i]);
    }
    int bad = 0;
    for (int i = 0, n = test_scale(100); i < n && !bad; i++) bad = in_child(use_what_was_hammered, &busy);
    EXPECT_EQ(bad, 0);
    store(&busy.over, 1);
    for (int i = 0; i < 4; i++) thread_join(threads[i]);
    EXPECT_EQ(use_all(busy.shared), 0);
    ctx_end(busy.shared);
}

static void *wait_for_cancel(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    busy_t *busy = (busy_t *)side->shared;
    store(&busy->tid[side->id], thread_id());
    EXPECT_EQ(side->id ? ctx_wait(busy->shared, CTX_S(500)) : ctx_sleep(busy->shared, CTX_S(500)), CTX_CANCELED);
    return NULL;
}

static void *fill_a_stack(void *arg) {
    volatile unsigned char bytes[32768];
    (void)arg;
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = 0xa5;
    return NULL;
}

static int cancel_what_others_wait_for(void *arg) {
    busy_t *busy = (busy_t *)arg;
    pthread_t threads[4];
    /* The stacks of the threads that are gone get new owners, and with them whatever their waits kept there. */
    for (int i = 0; i < 4 && !NO_THREADS_IN_CHILDREN; i++) threads[i] = thread_start(fill_a_stack, NULL);
    for (int i = 0; i < 4 && !NO_THREADS_IN_CHILDREN; i++) thread_join(threads[i]);
    int line = use_timers(ctx_background());
    if (line) return line;
    REQUIRE(ctx_cancel(busy->shared));
    REQUIRE(ctx_wait(busy->shared, CTX_FOREVER) == CTX_CANCELED);
    ctx_end(busy->shared);
    return use_all(ctx_background());
}

TEST(a_child_cancels_what_threads_of_the_parent_wait_for) {
    busy_t busy;
    memset(&busy, 0, sizeof busy);
    busy.shared = ctx_with_cancel(ctx_background());
    race_side_t sides[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        sides[i].id = i;
        sides[i].shared = &busy;
        threads[i] = thread_start(wait_for_cancel, &sides[i]);
    }
    for (int i = 0; i < 2; i++) until_asleep(&busy.tid[i]);
    EXPECT_EQ(in_child(cancel_what_others_wait_for, &busy), 0);
    EXPECT_EQ(ctx_err(busy.shared), 0);
    EXPECT(ctx_cancel(busy.shared));
    for (int i = 0; i < 2; i++) thread_join(threads[i]);
    ctx_end(busy.shared);
}

static void fork_here(void *arg) {
    busy_t *busy = (busy_t *)arg;
    EXPECT_EQ(in_child(use_all, ctx_background()), 0);
    add(&busy->over, 1);
}

TEST(a_callback_may_fork) {
    busy_t busy;
    ctx_on_done_t reg;
    memset(&busy, 0, sizeof busy);
    busy.shared = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&reg, busy.shared, fork_here, &busy));
    EXPECT(ctx_cancel(busy.shared));
    EXPECT_EQ(load(&busy.over), 1);
    ctx_end(busy.shared);

    busy.shared = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_on_done(&reg, busy.shared, fork_here, &busy);
    race_await(&busy.over, 2);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(busy.shared);
}

TEST(the_parent_ends_clean) {
    EXPECT_EQ(use_all(ctx_background()), 0);
    ctx_runtime_stop();
}

TEST_MAIN
