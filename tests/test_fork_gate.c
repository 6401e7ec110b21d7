/* Fork while other threads are in the middle of callbacks, stops and waits; with handlers of the program's own; and
   where descriptors, threads or the real clock are not to be had. tests/test_fork_steps.c does it step by step. */
#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif
#include <errno.h>
#include <pthread.h>

static int
    no_threads; /* [atomic] pthread_create() fails for the library: CTXCANCEL_MALLOC and the like stay as they are */
static inline int gate_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg) {
    return __atomic_load_n(&no_threads, __ATOMIC_ACQUIRE) ? EAGAIN : pthread_create(thread, attr, fn, arg);
}
#define pthread_create gate_create
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#undef pthread_create
#include "test.h"
#include "race.h"
#include "child.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif

#ifdef TEST_THREAD_SANITIZER
#ifdef __cplusplus
extern "C"
#endif
    const char *
    __tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0"; }
#define NEEDS_THREADS_IN_CHILDREN SKIP("the thread sanitizer knows no threads in children")
#else
#define NEEDS_THREADS_IN_CHILDREN ((void)0)
#endif

enum { CHILD_SECONDS = 30 };

static void count(void *arg) { add((int *)arg, 1); }

static void child_begins(void) {
    signal(SIGALRM, SIG_DFL);
    signal(SIGABRT, SIG_DFL);
#ifndef TEST_SANITIZED
    signal(SIGSEGV, SIG_DFL);
    signal(SIGBUS, SIG_DFL);
#endif
    sigset_t one; /* in a callback a thread of the library may be all there is */
    sigemptyset(&one);
    sigaddset(&one, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    alarm(CHILD_SECONDS);
}

static void child_ends(int line) {
    char text[80];
    int n = snprintf(text, sizeof text, "  in the child, line %d of %s\n", line, __FILE__);
    if (line && write(STDERR_FILENO, text, (size_t)n) < 0) _exit(2);
    _exit(line ? 1 : 0);
}

static int end_of(pid_t pid) {
    int status = 0;
    pid_t ended = 0;
    int64_t end = test_now_ns() + CTX_S(CHILD_SECONDS + 60);
    if (pid < 0) return -1;
    while ((ended = waitpid(pid, &status, WNOHANG)) == 0 && test_now_ns() < end) test_sleep_ms(1);
    if (ended == 0) { /* deaf to the alarm */
        kill(pid, SIGKILL);
        ended = waitpid(pid, &status, 0);
    }
    if (ended < 0) return -2;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status); /* 1014: it hung */
}

/* Run fn(arg) in a child: 0 if all is well. fn returns the line of what was not. */
static int in_child(int (*fn)(void *arg), void *arg) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        child_begins();
        child_ends(fn(arg));
    }
    return end_of(pid);
}

static int use_afresh(void) {
    ctx_on_done_t reg;
    int runs = 0;
    ctx_t *a = ctx_with_cancel(ctx_background()), *b = ctx_merge(ctx_background(), a);
    REQUIRE(ctx_on_done(&reg, b, count, &runs));
    int fd = ctx_done_fd(b);
    REQUIRE(fd >= 0 && !readable(fd));
    REQUIRE(ctx_cancel(a));
    REQUIRE(runs == 1 && readable(fd));
    ctx_end(b);
    ctx_end(a);
#ifndef TEST_THREAD_SANITIZER
    a = ctx_with_timeout(ctx_background(), CTX_MS(1));
    REQUIRE(ctx_wait(a, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(a);
#endif
    return 0;
}

/* -- handlers of the program's own, registered before the library's ------------------------------------------------ */

static void (*at_prepare)(void), (*at_parent)(void), (*at_child)(void);
static void run_prepare(void) {
    if (at_prepare) at_prepare();
}
static void run_parent(void) {
    if (at_parent) at_parent();
}
static void run_child(void) {
    if (at_child) at_child();
}

/* Before any call of the library: so `prepare` runs after the library's and `child` before the library's. */
__attribute__((constructor)) static void register_handlers(void) { pthread_atfork(run_prepare, run_parent, run_child); }

static ctx_t *in_handler;
static int handler_runs; /* [atomic] */

static void use_in_handler(void) {
    ctx_on_done_t reg;
    if (getpid() != test_state.pid) child_begins();
    ctx_t *ctx = ctx_with_cancel(in_handler);
    if (ctx_err(ctx) != 0 || ctx_err(in_handler) != 0) abort();
    ctx_on_done(&reg, ctx, count, &handler_runs);
    ctx_cancel(ctx);
    ctx_end(ctx);
}

static int in_handler_is_live(void *arg) {
    (void)arg;
    REQUIRE(ctx_err(in_handler) == 0);
    REQUIRE(ctx_cancel(in_handler));
    return use_afresh();
}

/* The whole of it in a child that may hang, but under the thread sanitizer. */
static int check_handler(void *arg) {
    void (**handler)(void) = (void (**)(void))arg;
    test_state.pid = getpid();
    in_handler = ctx_with_cancel(ctx_background());
    *handler = use_in_handler;
    int rc = in_child(in_handler_is_live, NULL);
    *handler = NULL;
    REQUIRE(rc == 0);
    REQUIRE(use_afresh() == 0);
    REQUIRE(ctx_err(in_handler) == 0);
    ctx_end(in_handler);
    return 0;
}

static int in_child_unless_tsan(int (*fn)(void *arg), void *arg) {
#ifdef TEST_THREAD_SANITIZER
    return fn(arg);
#else
    return in_child(fn, arg);
#endif
}

TEST(the_programs_child_handler_may_use_the_library) { EXPECT_EQ(in_child_unless_tsan(check_handler, &at_child), 0); }
TEST(the_programs_parent_handler_may_use_the_library) { EXPECT_EQ(in_child_unless_tsan(check_handler, &at_parent), 0); }
TEST(the_programs_prepare_handler_may_use_the_library) {
    EXPECT_EQ(in_child_unless_tsan(check_handler, &at_prepare), 0);
}

/* -- another thread in a stop, let in by the program's handler ----------------------------------------------------- */

static struct {
    ctx_on_done_t reg;
    ctx_t *ctx;
    gate_t gate;
    int tid, runs, returned, stopped; /* [atomic] */
} stop_at_fork;

static void *stops_when_told(void *arg) {
    (void)arg;
    gate_pass(&stop_at_fork.gate);
    store(&stop_at_fork.tid, thread_id());
    store(&stop_at_fork.stopped, ctx_on_done_stop(&stop_at_fork.reg));
    store(&stop_at_fork.returned, 1);
    return NULL;
}

static void let_it_stop(void) {
    gate_open(&stop_at_fork.gate);
    until_asleep(&stop_at_fork.tid); /* or it has ended */
}

static int stop_in_child(void *arg) {
    (void)arg;
    bool returned = load(&stop_at_fork.returned) != 0;
    bool stopped = ctx_on_done_stop(&stop_at_fork.reg); /* or an alarm */
    REQUIRE(stopped || returned);
    REQUIRE(ctx_cancel(stop_at_fork.ctx));
    REQUIRE(load(&stop_at_fork.runs) == 0);
    return use_afresh();
}

TEST(a_child_stops_a_callback_that_another_thread_was_stopping_at_the_fork) {
    memset(&stop_at_fork, 0, sizeof stop_at_fork);
    gate_init(&stop_at_fork.gate);
    stop_at_fork.ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&stop_at_fork.reg, stop_at_fork.ctx, count, &stop_at_fork.runs));
    pthread_t thread = thread_start(stops_when_told, NULL);
    gate_await(&stop_at_fork.gate, 1);
    at_prepare = let_it_stop;
    EXPECT_EQ(in_child(stop_in_child, NULL), 0);
    at_prepare = NULL;
    thread_join(thread);
    EXPECT(load(&stop_at_fork.stopped));
    ctx_end(stop_at_fork.ctx);
    gate_destroy(&stop_at_fork.gate);
}

/* -- a cascade in the middle of its callbacks ---------------------------------------------------------------------- */

typedef struct {
    ctx_t *top, *child, *live;
    ctx_on_done_t first, second, of_child, foreign, foreign_live;
    gate_t gate;
    pid_t forker;
    int second_runs, child_runs, foreign_runs; /* [atomic] */
} middle_t;

static void held_in_parent(void *arg) { gate_pass(&((middle_t *)arg)->gate); }

static int look_at_the_middle(void *arg) {
    middle_t *m = (middle_t *)arg;
    REQUIRE(ctx_err(m->top) != 0 && ctx_err(m->child) != 0);
    UNTIL(load(&m->second_runs) && load(&m->child_runs)); /* nothing is called for that */
    REQUIRE(load(&m->second_runs) == 1 && load(&m->child_runs) == 1);
    REQUIRE(!ctx_on_done_stop(&m->first)); /* it ran in a thread that is gone */
    REQUIRE(!ctx_on_done_stop(&m->second) && !ctx_on_done_stop(&m->of_child));
    ctx_end(m->child);
    ctx_end(m->top);
    REQUIRE(load(&m->second_runs) == 1 && load(&m->child_runs) == 1);
    /* What the other thread registered is forgotten. */
    REQUIRE(ctx_cancel(m->live));
    REQUIRE(load(&m->foreign_runs) == 0);
    ctx_end(m->live);
    return use_afresh();
}

static void *registers_and_cancels(void *arg) {
    middle_t *m = (middle_t *)arg;
    ctx_on_done(&m->foreign, m->child, count, &m->foreign_runs);
    ctx_on_done(&m->foreign_live, m->live, count, &m->foreign_runs);
    ctx_cancel(m->top);
    return NULL;
}

TEST(callbacks_of_the_forking_thread_run_in_the_child_of_a_fork_amid_a_cascade) {
    NEEDS_THREADS_IN_CHILDREN;
    middle_t m;
    memset(&m, 0, sizeof m);
    gate_init(&m.gate);
    m.top = ctx_with_cancel(ctx_background());
    m.child = ctx_with_cancel(m.top);
    m.live = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&m.first, m.top, held_in_parent, &m));
    EXPECT(ctx_on_done(&m.second, m.top, count, &m.second_runs));
    EXPECT(ctx_on_done(&m.of_child, m.child, count, &m.child_runs));
    pthread_t thread = thread_start(registers_and_cancels, &m);
    gate_await(&m.gate, 1);
    EXPECT_EQ(in_child(look_at_the_middle, &m), 0);
    EXPECT_EQ(load(&m.second_runs), 0);
    gate_open(&m.gate);
    thread_join(thread);
    EXPECT_EQ(load(&m.second_runs), 1);
    EXPECT_EQ(load(&m.child_runs), 1);
    EXPECT_EQ(load(&m.foreign_runs), 1);
    EXPECT(ctx_on_done_stop(&m.foreign_live));
    ctx_end(m.child);
    ctx_end(m.top);
    ctx_end(m.live);
    gate_destroy(&m.gate);
}

/* -- waits of threads that are gone stand on stacks that are gone -------------------------------------------------- */

enum { SLEEPERS = 4, STACK = 256 * 1024 };
static UNUSED_OK char stacks[SLEEPERS][STACK] __attribute__((aligned(4096)));

/* Threads of the child would get these stacks; here they are overwritten by hand. */
static void overwrite_stacks(void) {
#ifndef TEST_SANITIZED
    memset(stacks, 0xa5, sizeof stacks);
#endif
}

static pthread_t start_on(int i, void *(*fn)(void *), void *arg) {
    pthread_attr_t attr;
    pthread_t thread;
    pthread_attr_init(&attr);
#ifdef TEST_THREAD_SANITIZER
    pthread_attr_setstacksize(&attr, 4 * STACK); /* it needs more, and nothing is overwritten */
    (void)i;
#else
    if (pthread_attr_setstack(&attr, stacks[i], STACK) != 0) abort();
#endif
    if (pthread_create(&thread, &attr, fn, arg) != 0) abort();
    pthread_attr_destroy(&attr);
    return thread;
}

typedef struct {
    int tid; /* [atomic] */
    int id;
    ctx_t *ctx;
    ctx_sem_t sem;
    pthread_mutex_t mutex;
    pthread_cond_t cond;
} sleeper_t;

static void *sleeps_somehow(void *arg) {
    sleeper_t *s = (sleeper_t *)arg;
    store(&s->tid, thread_id());
    if (s->id == 0) ctx_sleep(ctx_background(), CTX_S(10));
    if (s->id == 1) ctx_wait(s->ctx, CTX_S(10));
    if (s->id == 2) ctx_sem_acquire(&s->sem, s->ctx, 1);
    if (s->id == 3) {
        pthread_mutex_lock(&s->mutex);
        while (ctx_cond_wait(s->ctx, &s->cond, &s->mutex) == 0) {
        }
        pthread_mutex_unlock(&s->mutex);
    }
    return NULL;
}

static int advance_past_all(void *arg) {
    sleeper_t *s = (sleeper_t *)arg;
    overwrite_stacks();
    ctx_t *mine = ctx_with_timeout(ctx_background(), CTX_S(15));
    ctx_clock_advance(CTX_S(20));
    REQUIRE(ctx_err(mine) == CTX_DEADLINE_EXCEEDED);
    for (int i = 1; i < SLEEPERS; i++) REQUIRE(ctx_err(s[i].ctx) == CTX_DEADLINE_EXCEEDED);
    ctx_end(mine);
    for (int i = 1; i < SLEEPERS; i++) ctx_end(s[i].ctx);
    ctx_clock_real();
    return use_afresh();
}

static int cancel_all(void *arg) {
    sleeper_t *s = (sleeper_t *)arg;
    overwrite_stacks();
    for (int i = 1; i < SLEEPERS; i++) {
        REQUIRE(ctx_cancel(s[i].ctx));
        ctx_end(s[i].ctx);
    }
    ctx_clock_real();
    return use_afresh();
}

TEST(sleepers_by_the_fake_clock_are_forgotten_in_the_child) {
    static sleeper_t s[SLEEPERS];
    pthread_t threads[SLEEPERS];
    ctx_clock_fake(CTX_S(100));
    memset(s, 0, sizeof s);
    for (int i = 0; i < SLEEPERS; i++) {
        s[i].id = i;
        s[i].ctx = ctx_with_timeout(ctx_background(), CTX_S(11));
        ctx_sem_init(&s[i].sem, 1);
        EXPECT(ctx_sem_try_acquire(&s[i].sem, 1));
        pthread_mutex_init(&s[i].mutex, NULL);
        pthread_cond_init(&s[i].cond, NULL);
        threads[i] = start_on(i, sleeps_somehow, &s[i]);
        until_asleep(&s[i].tid);
    }
    EXPECT_EQ(in_child(advance_past_all, s), 0);
    EXPECT_EQ(in_child(cancel_all, s), 0);
    ctx_clock_advance(CTX_S(20)); /* the parent's are all there */
    for (int i = 0; i < SLEEPERS; i++) {
        thread_join(threads[i]);
        ctx_end(s[i].ctx);
    }
    ctx_clock_real();
}

/* -- a callback forks ---------------------------------------------------------------------------------------------- */

typedef struct {
    ctx_on_done_t reg, next_reg;
    ctx_t *ctx, *next;
    gate_t gate;
    int tid;         /* [atomic] */
    pid_t child;     /* 0 in the child */
    int child_known; /* [atomic] */
} forking_t;

static void forks_with_a_stopper(void *arg) {
    forking_t *f = (forking_t *)arg;
    gate_pass(&f->gate);
    fflush(NULL);
    f->child = fork();
    if (f->child == 0) {
        child_begins();
        overwrite_stacks();
    }
}

static void *stops_the_forking_one(void *arg) {
    forking_t *f = (forking_t *)arg;
    gate_await(&f->gate, 1); /* the callback runs */
    store(&f->tid, thread_id());
    ctx_on_done_stop(&f->reg);
    return NULL;
}

static void *opens_when_the_stopper_sleeps(void *arg) {
    forking_t *f = (forking_t *)arg;
    until_asleep(&f->tid);
    gate_open(&f->gate);
    return NULL;
}

TEST(a_callback_that_is_being_stopped_may_fork_and_return_in_both) {
    forking_t f;
    memset(&f, 0, sizeof f);
    gate_init(&f.gate);
    f.ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&f.reg, f.ctx, forks_with_a_stopper, &f));
    pthread_t stopping = start_on(0, stops_the_forking_one, &f);
    pthread_t opening = thread_start(opens_when_the_stopper_sleeps, &f);
    EXPECT(ctx_cancel(f.ctx)); /* its callback waits for the other two, then forks */
    if (f.child == 0) child_ends(ctx_on_done_stop(&f.reg) ? __LINE__ : use_afresh());
    thread_join(opening);
    thread_join(stopping);
    EXPECT_EQ(end_of(f.child), 0);
    ctx_end(f.ctx);
    gate_destroy(&f.gate);
}

/* -- the runtime thread forks -------------------------------------------------------------------------------------- */

static void leave_well(void *arg) {
    forking_t *f = (forking_t *)arg;
    if (getpid() != test_state.pid) _exit(ctx_err(f->next) == CTX_DEADLINE_EXCEEDED ? 0 : 3);
}

static void forks_and_goes_on(void *arg) {
    forking_t *f = (forking_t *)arg;
    fflush(NULL);
    f->child = fork();
    if (f->child == 0) {
        child_begins();
        f->next = ctx_with_timeout(ctx_background(), CTX_MS(20));
        ctx_on_done(&f->next_reg, f->next, leave_well, f);
        return;
    }
    store(&f->child_known, 1);
}

static void forks_and_returns(void *arg) {
    forking_t *f = (forking_t *)arg;
    fflush(NULL);
    f->child = fork();
    if (f->child == 0)
        child_begins();
    else
        store(&f->child_known, 1);
}

static int check_runtime_fork(void (*fn)(void *arg)) {
    static forking_t f;
    memset(&f, 0, sizeof f);
    f.ctx = ctx_with_timeout(ctx_background(), CTX_MS(30));
    ctx_t *top = ctx_with_cancel(ctx_background());
    if (!ctx_on_done(&f.reg, f.ctx, fn, &f)) { /* it ran here: in the child this is main, then */
        if (f.child == 0) _exit(0);
    }
    UNTIL(load(&f.child_known));
    int rc = end_of(f.child);
    ctx_on_done_stop(&f.reg);
    ctx_end(f.ctx);
    ctx_end(top);
    return rc;
}

TEST(deadlines_fire_in_the_child_of_a_deadline_callback) {
    NEEDS_THREADS_IN_CHILDREN;
    EXPECT_EQ(check_runtime_fork(forks_and_goes_on), 0);
}

/* Its only thread is the runtime's copy: when that has nothing left to do, no thread is left. */
TEST(a_child_of_a_deadline_callback_ends_when_the_callback_returns_and_nothing_is_armed) {
    NEEDS_THREADS_IN_CHILDREN;
    EXPECT_EQ(check_runtime_fork(forks_and_returns), 0);
}

/* -- no thread, no descriptor -------------------------------------------------------------------------------------- */

static int wait_without_a_thread(void *arg) {
    ctx_t **ctx = (ctx_t **)arg;
    store(&no_threads, 1);
    REQUIRE(ctx_wait(ctx[0], CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    REQUIRE(ctx_sleep(ctx[1], CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    return 0;
}

static void no_more_threads(void) { store(&no_threads, 1); }

TEST(a_wait_ends_at_its_deadline_in_a_child_that_can_have_no_thread) {
    ctx_t *ctx[2];
    ctx[0] = ctx_with_timeout(ctx_background(), CTX_MS(300));
    ctx[1] = ctx_with_timeout(ctx_background(), CTX_MS(320));
    EXPECT(ctx_err(ctx[0]) != CTX_NO_MEMORY && ctx_err(ctx[1]) != CTX_NO_MEMORY);
    at_child = no_more_threads; /* before the library's own handler */
    EXPECT_EQ(in_child(wait_without_a_thread, ctx), 0);
    at_child = NULL;
    store(&no_threads, 0);
    ctx_end(ctx[0]);
    ctx_end(ctx[1]);
}

typedef struct {
    ctx_t *ctx, *done;
    int fd, epoll;
} fd_t;

static int cancel_with_no_descriptor(void *arg) {
    fd_t *f = (fd_t *)arg;
    REQUIRE(ctx_cancel(f->ctx));
    int fd = ctx_done_fd(f->ctx); /* the system's error, or one that is readable: never the parent's */
    REQUIRE(fd < 0 || readable(fd));
    ctx_end(f->ctx);
    return 0;
}

TEST(at_the_descriptor_limit_a_child_makes_nothing_readable_for_its_parent) {
    fd_t f;
    struct rlimit before, low;
    memset(&f, 0, sizeof f);
    f.ctx = ctx_with_cancel(ctx_background());
    f.fd = ctx_done_fd(f.ctx);
    CHECK(f.fd >= 0);
    getrlimit(RLIMIT_NOFILE, &before);
    low = before;
    low.rlim_cur = (rlim_t)f.fd + 1;
    static int fillers[4096];
    int filled = 0;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    for (int fd; filled < 4096 && (fd = dup(0)) >= 0;) fillers[filled++] = fd;
    int rc = in_child(cancel_with_no_descriptor, &f);
    bool parents = readable(f.fd);
    for (int i = 0; i < filled; i++) close(fillers[i]);
    setrlimit(RLIMIT_NOFILE, &before);
    EXPECT_EQ(rc, 0);
    EXPECT(!parents);
    EXPECT_EQ(ctx_err(f.ctx), 0);
    EXPECT(ctx_cancel(f.ctx));
    EXPECT(readable(f.fd));
    ctx_end(f.ctx);
}

#ifdef __linux__
static int cancel_beside_an_epoll_set(void *arg) {
    fd_t *f = (fd_t *)arg;
    struct epoll_event event;
    REQUIRE(ctx_cancel(f->ctx));
    int fd = ctx_done_fd(f->ctx), own = epoll_create1(0);
    REQUIRE(fd >= 0 && readable(fd) && own >= 0);
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    REQUIRE(epoll_ctl(own, EPOLL_CTL_ADD, fd, &event) == 0);
    REQUIRE(epoll_wait(own, &event, 1, 0) == 1);
    return 0;
}

TEST(an_epoll_set_shared_with_a_child_shows_only_the_parents_cancel) {
    fd_t f;
    struct epoll_event event;
    memset(&f, 0, sizeof f);
    f.ctx = ctx_with_cancel(ctx_background());
    f.fd = ctx_done_fd(f.ctx);
    f.epoll = epoll_create1(0);
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    CHECK(epoll_ctl(f.epoll, EPOLL_CTL_ADD, f.fd, &event) == 0);
    EXPECT_EQ(in_child(cancel_beside_an_epoll_set, &f), 0);
    EXPECT_EQ(epoll_wait(f.epoll, &event, 1, 0), 0);
    EXPECT(ctx_cancel(f.ctx));
    EXPECT_EQ(epoll_wait(f.epoll, &event, 1, 0), 1);
    close(f.epoll);
    ctx_end(f.ctx);
}
#endif

/* -- many threads at work ------------------------------------------------------------------------------------------ */

static int over, at_work; /* [atomic] */
static ctx_t *shared_parent;

/* One of them cancels a thousand at a time, all others make and end one. */
static void *derives_and_ends(void *arg) {
    static ctx_t *below[1000];
    race_side_t *side = (race_side_t *)arg;
    for (bool first = true; !load(&over); first = false) {
        ctx_t *ctx = ctx_with_cancel(shared_parent);
        if (first) add(&at_work, 1);
        if (side->id == 0) {
            for (int i = 0; i < 1000; i++) below[i] = ctx_with_cancel(ctx);
            ctx_cancel(ctx);
            for (int i = 0; i < 1000; i++) ctx_end(below[i]);
        }
        ctx_end(ctx);
    }
    return NULL;
}

static int look_amid_many(void *arg) {
    (void)arg;
    ctx_t *child = ctx_with_cancel(shared_parent);
    REQUIRE(ctx_err(child) == 0);
    REQUIRE(ctx_cancel(shared_parent));
    REQUIRE(ctx_err(child) != 0);
    ctx_end(child);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    REQUIRE(ctx_cancel(ctx));
    ctx_end(ctx);
    return 0;
}

static int fork_amid_many(void *arg) {
    enum { MANY = 300 };
    static race_side_t sides[MANY];
    static pthread_t threads[MANY];
    int n = TEST_QUICK ? 60 : MANY;
    int slow = 0;
    pthread_attr_t attr;
    (void)arg;
#ifndef TEST_THREAD_SANITIZER
    alarm(100);
#endif
    shared_parent = ctx_with_cancel(ctx_background());
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 128 * 1024);
    for (int i = 0; i < n; i++) {
        sides[i].id = i;
        if (pthread_create(&threads[i], &attr, derives_and_ends, &sides[i]) != 0) return __LINE__;
    }
    while (load(&at_work) < n) test_sleep_ms(1);
    for (int i = 0; i < 5; i++) {
        int64_t from = test_now_ns();
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            child_begins();
#ifdef __SANITIZE_ADDRESS__
            _exit(0); /* locks of its own malloc stay taken in the child */
#endif
            child_ends(look_amid_many(NULL));
        }
        if (test_now_ns() - from > CTX_S(2)) slow++;
        REQUIRE(end_of(pid) == 0);
    }
    store(&over, 1);
    for (int i = 0; i < n; i++) thread_join(threads[i]);
    ctx_end(shared_parent);
    if (slow) fprintf(stderr, "  %d of 5 forks took more than 2 s\n", slow);
    REQUIRE(slow == 0); /* of some 10 ms: no wait for a moment at which all happen to be outside */
    return 0;
}

TEST(a_fork_amid_three_hundred_busy_threads_is_not_held_up) {
#ifdef TEST_SANITIZED
    EXPECT_EQ(fork_amid_many(NULL), 0);
#else
    EXPECT_EQ(in_child(fork_amid_many, NULL), 0);
#endif
}

TEST(the_parent_ends_clean) {
    EXPECT_EQ(use_afresh(), 0);
    ctx_runtime_stop();
}

TEST_MAIN
