/* A fork at each step of another thread (ctx__sched_step): whatever that one was doing, the child is whole. */
#define CTXCANCEL_TEST_SCHED
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "steps.h"
#include "child.h"

#include <poll.h>
#include <sys/wait.h>

#ifdef TEST_THREAD_SANITIZER
#ifdef __cplusplus
extern "C"
#endif
    const char *
    __tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0"; }
#define NO_THREADS_IN_CHILDREN 1
#else
#define NO_THREADS_IN_CHILDREN 0
#endif

enum { CHILD_SECONDS = 20 };

static void count(void *arg) { add((int *)arg, 1); }

/* What stands at the time of the fork. `own` are callbacks of the thread that forks, `foreign` of the other one. */
typedef struct {
    ctx_t *top, *busy, *below, *merged, *other;
    ctx_on_done_t own_top, own_busy, own_below, foreign;
    int top_runs, busy_runs, below_runs, foreign_runs; /* [atomic] */
    int fd, busy_fd;
    int (*check)(void *shared);
    void (*work)(void *shared); /* of the other thread */
    ctx_t *timed[12];
    int timed_runs; /* [atomic] */
    ctx_on_done_t timed_regs[12];
    pid_t child;
    bool begun;
    int after; /* a line of the parent */
} fork_t;

static void fork_make(fork_t *f) {
    memset(f, 0, sizeof *f);
    f->top = ctx_with_cancel(ctx_background());
    f->busy = ctx_with_cancel(f->top);
    f->below = ctx_with_cancel(f->busy);
    f->other = ctx_with_cancel(ctx_background());
    f->merged = ctx_merge(f->other, f->busy);
    f->fd = ctx_done_fd(f->top);
    f->busy_fd = ctx_done_fd(f->busy);
}

static void fork_end(fork_t *f) {
    for (int i = 0; i < 12; i++) {
        ctx_on_done_stop(&f->timed_regs[i]);
        ctx_end(f->timed[i]);
    }
    ctx_end(f->merged);
    ctx_end(f->other);
    ctx_end(f->below);
    ctx_end(f->busy);
    ctx_end(f->top);
}

/* Fork, and let the child check. */
static void fork_and_check(fork_t *f) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        signal(SIGABRT, SIG_DFL);
#ifndef TEST_SANITIZED
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
#endif
        alarm(CHILD_SECONDS);
        int line = f->check(f);
        if (line) {
            char text[80];
            int n = snprintf(text, sizeof text, "  in the child, line %d of %s\n", line, __FILE__);
            if (write(STDERR_FILENO, text, (size_t)n) < 0) _exit(2);
        }
        _exit(line ? 1 : 0);
    }
    f->child = pid;
}

static void forks(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_on_done(&f->own_top, f->top, count, &f->top_runs);
    ctx_on_done(&f->own_busy, f->busy, count, &f->busy_runs);
    ctx_on_done(&f->own_below, f->below, count, &f->below_runs);
    f->begun = true;
    steps_yield(); /* the other one runs to its step */
    fork_and_check(f);
}

static void works(void *shared) {
    fork_t *f = (fork_t *)shared;
    while (!f->begun) steps_yield();
    f->work(f);
}

/* Children after each other: at most one is alive, and at the first bad one it stops. */
static void check_forks(void (*work)(void *shared), int (*check)(void *shared)) {
    const steps_fn sides[] = {forks, works};
    bool more = true;
    int bad = 0;
    for (int at = 0; more && !bad; at += steps_stride()) {
        static fork_t f;
        fork_make(&f);
        f.work = work;
        f.check = check;
        more = steps_run(sides, 2, 1, &f, at);
        bad = end_of_child(f.child);
        if (bad) fprintf(stderr, "  forked at step %d\n", at);
        if (ctx_err(f.top) == 0 && readable(f.fd)) bad = -10;
        if (ctx_err(f.busy) == 0 && readable(f.busy_fd)) bad = -11;
        ctx_cancel(f.top); /* the parent is whole, too */
        if (ctx_err(f.below) == 0 || ctx_err(f.merged) == 0 || !readable(f.fd)) bad = -12;
        ctx_on_done_stop(&f.own_top);
        ctx_on_done_stop(&f.own_busy);
        ctx_on_done_stop(&f.own_below);
        if (f.top_runs != 1 || f.busy_runs != 1 || f.below_runs != 1) bad = -13;
        fork_end(&f);
    }
    EXPECT_EQ(bad, 0);
}

/* -- what every child must be able to do --------------------------------------------------------------------------- */

static int use_afresh(ctx_t *parent) {
    static const ctx_key_t key = CTX_KEY(int);
    ctx_on_done_t reg;
    int runs = 0, one = 1;
    ctx_t *a = ctx_with_cancel(parent), *b = ctx_with_value(a, &key, &one), *m = ctx_merge(b, ctx_background());
    REQUIRE(ctx_err(m) == 0 && ctx_value(m, &key) != NULL);
    REQUIRE(ctx_on_done(&reg, m, count, &runs));
    REQUIRE(ctx_on_done_stop(&reg));
    REQUIRE(ctx_on_done(&reg, m, count, &runs));
    int fd = ctx_done_fd(m);
    REQUIRE(fd >= 0 && !readable(fd));
    REQUIRE(ctx_cancel(a));
    REQUIRE(ctx_err(m) == CTX_CANCELED && runs == 1 && readable(fd));
    REQUIRE(!ctx_on_done_stop(&reg));
    ctx_end(m);
    ctx_end(b);
    ctx_end(a);
    return 0;
}

static int check_child(void *shared) {
    fork_t *f = (fork_t *)shared;
    int line = use_afresh(ctx_background());
    if (line) return line;
    /* A cancel of `busy` that another thread had begun is finished in the child as well. */
    if (ctx_err(f->busy) != 0 || ctx_err(f->below) != 0 || ctx_err(f->merged) != 0) {
        REQUIRE(ctx_err(f->top) != 0 || ctx_err(f->busy) != 0);
        UNTIL(load(&f->busy_runs) == 1 && load(&f->below_runs) == 1);
        REQUIRE(ctx_err(f->busy) != 0 && ctx_err(f->below) != 0 && ctx_err(f->merged) != 0);
    }
    if (ctx_err(f->top) == 0) {
        REQUIRE(!readable(ctx_done_fd(f->top)));
        line = use_afresh(f->top);
        if (line) return line;
        REQUIRE(ctx_cancel(f->top));
    }
    REQUIRE(ctx_err(f->busy) != 0 && ctx_err(f->below) != 0 && ctx_err(f->merged) != 0);
    UNTIL(load(&f->top_runs) == 1 && load(&f->busy_runs) == 1 && load(&f->below_runs) == 1);
    REQUIRE(load(&f->top_runs) == 1 && load(&f->busy_runs) == 1 && load(&f->below_runs) == 1);
    REQUIRE(!ctx_on_done_stop(&f->own_top) && !ctx_on_done_stop(&f->own_busy) && !ctx_on_done_stop(&f->own_below));
    REQUIRE(readable(ctx_done_fd(f->top)) && readable(ctx_done_fd(f->busy)));
    REQUIRE(load(&f->foreign_runs) == 0); /* callbacks of the other thread are forgotten */
    ctx_t *born = ctx_with_cancel(f->busy);
    REQUIRE(ctx_err(born) != 0);
    ctx_end(born);
    fork_end(f);
    return use_afresh(ctx_background());
}

/* -- what the other thread is doing -------------------------------------------------------------------------------- */

static void derives(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_t *ctx = ctx_with_cancel(f->busy), *merged = ctx_merge(ctx, f->top);
    ctx_end(merged);
    ctx_end(ctx);
}

static void cancels_busy(void *shared) { ctx_cancel(((fork_t *)shared)->busy); }
static void cancels_top(void *shared) { ctx_cancel(((fork_t *)shared)->top); }

static void ends_children(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_t *ctx = ctx_with_cancel(f->busy), *below = ctx_with_cancel(ctx);
    ctx_end(ctx);
    ctx_end(below);
}

static void registers(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_on_done_t reg;
    ctx_on_done(&reg, f->busy, count, &f->foreign_runs);
    ctx_on_done_stop(&reg);
}

static void stops_a_callback(void *shared) {
    fork_t *f = (fork_t *)shared;
    if (ctx_on_done_stop(&f->own_busy)) add(&f->busy_runs, 1); /* as if it had run, for the check */
}

static void asks_for_a_descriptor(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_t *ctx = ctx_with_cancel(f->busy);
    ctx_done_fd(ctx);
    ctx_done_fd(f->below);
    ctx_end(ctx);
}

static void sleeps_a_little(void *shared) { ctx_sleep(((fork_t *)shared)->busy, CTX_US(50)); }

static void has_deadlines(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_t *ctx = ctx_with_timeout(f->busy, CTX_S(100)), *sooner = ctx_with_timeout(f->busy, CTX_S(50));
    ctx_end(ctx);
    ctx_end(sooner);
}

static void stops_the_runtime(void *shared) {
    (void)shared;
    ctx_runtime_stop();
}

TEST(a_child_forked_at_any_step_of_a_derive_is_whole) { check_forks(derives, check_child); }
TEST(a_child_forked_at_any_step_of_an_end_is_whole) { check_forks(ends_children, check_child); }
TEST(a_child_forked_at_any_step_of_a_cancel_finishes_it) {
    if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children");
    check_forks(cancels_busy, check_child);
}
TEST(a_child_forked_at_any_step_of_a_cancel_from_above_finishes_it) {
    if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children");
    check_forks(cancels_top, check_child);
}
TEST(a_child_forked_at_any_step_of_a_registration_is_whole) { check_forks(registers, check_child); }
TEST(a_child_forked_at_any_step_of_a_descriptor_is_whole) { check_forks(asks_for_a_descriptor, check_child); }
TEST(a_child_forked_at_any_step_of_a_sleep_is_whole) { check_forks(sleeps_a_little, check_child); }

TEST(a_child_forked_at_any_step_of_a_deadline_is_whole) {
    if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children");
    check_forks(has_deadlines, check_child);
    ctx_runtime_stop();
}

TEST(a_child_forked_at_any_step_of_the_end_of_the_runtime_is_whole) {
    if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children");
    check_forks(stops_the_runtime, check_child);
}

/* The callback was the forking thread's, and another thread was stopping it: it is stopped in the child, or it runs
   there; and the child can stop it itself. */
static int check_stop_in_child(void *shared) {
    fork_t *f = (fork_t *)shared;
    bool stopped = ctx_on_done_stop(&f->own_busy);
    REQUIRE(stopped);
    REQUIRE(ctx_cancel(f->top));
    REQUIRE(load(&f->top_runs) == 1 && load(&f->below_runs) == 1);
    return use_afresh(ctx_background());
}

TEST(a_child_forked_at_any_step_of_a_stop_can_stop_that_callback_itself) {
    check_forks(stops_a_callback, check_stop_in_child);
}

/* -- contention: many derive on one parent, and memory for more than one list is short ----------------------------- */

typedef struct {
    ctx_t *parent;
    ctx_t *first, *second;
    pid_t child;
} contended_t;

static void derives_first(void *shared) {
    contended_t *c = (contended_t *)shared;
    c->first = ctx_with_cancel(c->parent);
}
static void derives_second(void *shared) {
    contended_t *c = (contended_t *)shared;
    c->second = ctx_with_cancel(c->parent);
}

static int check_contended(contended_t *c, ctx_t **all, int n) {
    for (int i = 0; i < n; i++) REQUIRE(ctx_err(all[i]) == 0);
    REQUIRE(ctx_cancel(c->parent));
    for (int i = 0; i < n; i++) REQUIRE(ctx_err(all[i]) == CTX_CANCELED);
    return use_afresh(ctx_background());
}

/* Each meeting counts as contention once: far more of them than any counter of eight bits holds, no fork among them. */
TEST(a_parent_that_was_contended_many_times_is_whole_in_a_child) {
    enum { ROUNDS = 300 };
    static ctx_t *all[ROUNDS * 2];
    const steps_fn sides[] = {derives_first, derives_second};
    contended_t c;
    memset(&c, 0, sizeof c);
    c.parent = ctx_with_cancel(ctx_background());
    for (int i = 0; i < ROUNDS; i++) {
        steps_run(sides, 2, 0, &c, 3 + i % 12);
        all[2 * i] = c.first;
        all[2 * i + 1] = c.second;
        if (i % 30 != 29) continue;
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            signal(SIGALRM, SIG_DFL);
            alarm(CHILD_SECONDS);
            _exit(check_contended(&c, all, 2 * i + 2) ? 1 : 0);
        }
        EXPECT_EQ(end_of_child(pid), 0);
    }
    EXPECT_EQ(check_contended(&c, all, ROUNDS * 2), 0);
    for (int i = 0; i < ROUNDS * 2; i++) ctx_end(all[i]);
    ctx_end(c.parent);
}

/* -- deadlines that are due ---------------------------------------------------------------------------------------- */

static void advances(void *shared) {
    (void)shared;
    ctx_clock_advance(CTX_S(1));
}

static int check_due(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_clock_advance(CTX_S(2)); /* whoever was advancing it is gone */
    for (int i = 0; i < 12; i++) REQUIRE(ctx_err(f->timed[i]) == CTX_DEADLINE_EXCEEDED);
    REQUIRE(load(&f->timed_runs) == 12);
    return use_afresh(ctx_background());
}

static void forks_with_deadlines(void *shared) {
    fork_t *f = (fork_t *)shared;
    for (int i = 0; i < 12; i++) {
        f->timed[i] = ctx_with_timeout(ctx_background(), CTX_MS(10) + i / 3 * CTX_MS(20));
        ctx_on_done(&f->timed_regs[i], f->timed[i], count, &f->timed_runs);
    }
    forks(shared);
}

TEST(deadlines_that_fire_on_the_fake_clock_at_the_fork_fire_in_the_child) {
    const steps_fn sides[] = {forks_with_deadlines, works};
    bool more = true;
    int bad = 0;
    ctx_clock_fake(CTX_S(100));
    for (int at = 0; more && !bad; at += 2 * steps_stride()) {
        static fork_t f;
        fork_make(&f);
        f.work = advances;
        f.check = check_due;
        more = steps_run(sides, 2, 1, &f, at);
        bad = end_of_child(f.child);
        if (bad) fprintf(stderr, "  forked at step %d\n", at);
        EXPECT_EQ(load(&f.timed_runs), 12);
        ctx_cancel(f.top);
        fork_end(&f);
    }
    EXPECT_EQ(bad, 0);
    ctx_clock_real();
}

/* The same with the runtime thread, which is stopped at each of its own steps. */
static int check_due_for_real(void *shared) {
    fork_t *f = (fork_t *)shared;
    UNTIL(load(&f->timed_runs) == 12); /* nothing is called: the child's own runtime does it */
    for (int i = 0; i < 12; i++) REQUIRE(ctx_err(f->timed[i]) == CTX_DEADLINE_EXCEEDED);
    REQUIRE(load(&f->timed_runs) == 12);
    for (int i = 0; i < 12; i++) REQUIRE(!ctx_on_done_stop(&f->timed_regs[i]));
    ctx_t *timed = ctx_with_timeout(ctx_background(), CTX_MS(1));
    REQUIRE(ctx_wait(timed, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(timed);
    return use_afresh(ctx_background());
}

static void forks_when_due(void *shared) {
    fork_t *f = (fork_t *)shared;
    ctx_time_t at = ctx_now() + CTX_MS(3);
    for (int i = 0; i < 12; i++) {
        f->timed[i] = ctx_with_deadline(ctx_background(), at + i / 3 * 10000);
        ctx_on_done(&f->timed_regs[i], f->timed[i], count, &f->timed_runs);
    }
    while (!steps_holding() && load(&f->timed_runs) < 12) steps_yield();
    fork_and_check(f);
}

TEST(deadlines_that_the_runtime_has_in_hand_at_the_fork_fire_in_the_child) {
    if (NO_THREADS_IN_CHILDREN) SKIP("the thread sanitizer knows no threads in children");
    const steps_fn sides[] = {forks_when_due};
    bool more = true;
    int bad = 0;
    for (int at = 0; more && !bad; at += TEST_QUICK ? 25 : 3) {
        static fork_t f;
        memset(&f, 0, sizeof f);
        f.check = check_due_for_real;
        more = steps_run_library(sides, 1, &f, at);
        bad = end_of_child(f.child);
        if (bad) fprintf(stderr, "  forked at step %d\n", at);
        UNTIL(load(&f.timed_runs) == 12);
        fork_end(&f);
        ctx_runtime_stop();
    }
    EXPECT_EQ(bad, 0);
}

TEST_MAIN
