/* What the library asks of its process: any function may be the first, keys may be short, threads may be canceled, and
   signal masks are the program's. */
#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif
#include <errno.h>
#include <pthread.h>

/* How pthread_create() fails; 0: it does not. CTXCANCEL_MALLOC and the like are the default ones. */
static int create_fails; /* [atomic] */
static inline int platform_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg) {
    int rc = __atomic_load_n(&create_fails, __ATOMIC_ACQUIRE);
    return rc ? rc : pthread_create(thread, attr, fn, arg);
}
#define pthread_create platform_create
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#undef pthread_create
#include "test.h"
#include "gates.h"
#include "child.h"

#include <limits.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* -- a process that has not used the library yet ----------------------------------------------------------------------

   A scenario returns 0, or the line of what was not. This process never calls the library before it runs scenarios: it
   forks for each. The thread sanitizer knows no threads in such a child, so there the child runs this program anew. */

enum { CHILD_SECONDS = 30 };

typedef int (*scenario_fn)(void);
typedef struct {
    const char *name;
    scenario_fn fn;
} scenario_t;
static const scenario_t *scenario_named(const char *name);
static const char *program;

static int run_scenario(const scenario_t *scenario) {
    signal(SIGALRM, SIG_DFL);
    signal(SIGABRT, SIG_DFL);
#ifndef TEST_SANITIZED
    signal(SIGSEGV, SIG_DFL);
    signal(SIGBUS, SIG_DFL);
#endif
    alarm(CHILD_SECONDS);
    int line = scenario->fn();
    if (line) fprintf(stderr, "  in the child: line %d of %s\n", line, __FILE__);
    return line ? 1 : 0;
}

/* 0 if all went well; 1000 + the signal that ended it, 1014: it hung. */
static int fresh(const char *name) {
    const scenario_t *scenario = scenario_named(name);
    if (!scenario) return -3;
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0) return -1;
    if (pid == 0) {
#ifdef TEST_THREAD_SANITIZER
        execl(program, program, "--scenario", name, (char *)NULL);
        _exit(99);
#else
        _exit(run_scenario(scenario));
#endif
    }
    return end_of_child(pid);
}

#define FRESH(scenario) EXPECT_EQ(fresh(#scenario), 0)

static int64_t cpu_ns(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return ((int64_t)use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000000 +
           ((int64_t)use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1000;
}

/* -- any function may be the first --------------------------------------------------------------------------------- */

static int first_is_a_sleep(void) {
    int64_t before = cpu_ns();
    REQUIRE(ctx_sleep(ctx_background(), CTX_MS(600)) == 0);
    REQUIRE(cpu_ns() - before < 300000000); /* it slept, however loaded the machine */
    return 0;
}

static int first_is_a_wait(void) {
    int64_t before = cpu_ns();
    REQUIRE(ctx_wait(ctx_background(), CTX_MS(600)) == CTX_NOT_READY);
    REQUIRE(cpu_ns() - before < 300000000);
    return 0;
}

typedef struct {
    ctx_sem_t sem;
    int tid, returned, rc; /* [atomic] */
} acquirer_t;

static void *acquires(void *arg) {
    acquirer_t *a = (acquirer_t *)arg;
    store(&a->tid, thread_id());
    store(&a->rc, ctx_sem_acquire(&a->sem, ctx_background(), 1));
    store(&a->returned, 1);
    return NULL;
}

static void do_nothing(void *arg) { (void)arg; }

enum { THEN_DERIVE, THEN_TIMEOUT, THEN_ON_DONE, THEN_DONE_FD, THEN_SIGNALS, THEN_STOP, THEN_GO_COUNT, THENS };

/* The first to use the library waits for a permit; then something else in it is used for the first time; then the
   permit comes. */
static int first_is_an_acquire(void) {
    for (int then = 0; then < THENS; then++) {
        pid_t pid = 0;
#ifndef TEST_THREAD_SANITIZER
        pid = fork(); /* each of them first in its process */
        if (pid > 0) {
            int status = 0;
            REQUIRE(waitpid(pid, &status, 0) == pid);
            if (WIFSIGNALED(status) || WEXITSTATUS(status)) return 10000 + then;
            continue;
        }
        alarm(CHILD_SECONDS / 3);
#endif
        static acquirer_t a;
        static ctx_on_done_t reg;
        const int sig = SIGUSR1;
        memset(&a, 0, sizeof a);
        ctx_sem_init(&a.sem, 1);
        REQUIRE(ctx_sem_try_acquire(&a.sem, 1));
        pthread_t thread = thread_start(acquires, &a);
        until_asleep(&a.tid);
        ctx_t *ctx = NULL;
        if (then == THEN_DERIVE) ctx = ctx_with_cancel(ctx_background());
        if (then == THEN_TIMEOUT) ctx = ctx_with_timeout(ctx_background(), CTX_S(100));
        if (then == THEN_ON_DONE) ctx_on_done(&reg, ctx_background(), do_nothing, NULL);
        if (then == THEN_DONE_FD) REQUIRE(ctx_done_fd(ctx_background()) >= 0);
        if (then == THEN_SIGNALS) ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        if (then == THEN_STOP) ctx_runtime_stop();
        if (then == THEN_GO_COUNT) REQUIRE(ctx_go_count() == 0);
        if (ctx) REQUIRE(ctx_err(ctx) == 0);
        ctx_sem_release(&a.sem, 1);
        thread_join(thread); /* or an alarm */
        REQUIRE(load(&a.rc) == 0);
        if (then == THEN_ON_DONE) REQUIRE(ctx_on_done_stop(&reg));
        ctx_end(ctx);
#ifndef TEST_THREAD_SANITIZER
        _exit(0);
#endif
        (void)pid;
    }
    return 0;
}

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    int tid, rc; /* [atomic] */
    ctx_t *ctx;
} cond_waiter_t;

static void *waits_on_cond(void *arg) {
    cond_waiter_t *w = (cond_waiter_t *)arg;
    store(&w->tid, thread_id());
    pthread_mutex_lock(&w->mutex);
    store(&w->rc, ctx_cond_wait(w->ctx, &w->cond, &w->mutex));
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

static void cond_waiter_make(cond_waiter_t *w, ctx_t *ctx) {
    memset(w, 0, sizeof *w);
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->cond, NULL);
    store(&w->rc, 1);
    w->ctx = ctx;
}

static int first_is_a_cond_wait(void) {
    static cond_waiter_t w;
    cond_waiter_make(&w, ctx_background());
    pthread_t thread = thread_start(waits_on_cond, &w);
    until_asleep(&w.tid);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    REQUIRE(ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    pthread_mutex_lock(&w.mutex);
    pthread_cond_signal(&w.cond);
    pthread_mutex_unlock(&w.mutex);
    thread_join(thread);
    REQUIRE(load(&w.rc) == 0);
    ctx_end(ctx);
    return 0;
}

static int first_is_the_fake_clock(void) {
    ctx_clock_fake(5);
    REQUIRE(ctx_now() == 5);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), 10);
    ctx_clock_advance(10);
    REQUIRE(ctx_err(ctx) == CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_real();
    return 0;
}

static int first_is_a_stop(void) {
    ctx_runtime_stop();
    ctx_runtime_stop();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    REQUIRE(ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_runtime_stop();
    return 0;
}

TEST(a_sleep_may_be_the_first_call_and_takes_no_processor_time) {
    FRESH(first_is_a_sleep);
    FRESH(first_is_a_wait);
}

TEST(a_wait_that_is_the_first_call_is_woken_after_any_other_first_use) {
    FRESH(first_is_an_acquire);
    FRESH(first_is_a_cond_wait);
}

TEST(the_clock_and_the_end_may_be_the_first_call) {
    FRESH(first_is_the_fake_clock);
    FRESH(first_is_a_stop);
}

/* -- no thread key is to be had ------------------------------------------------------------------------------------ */

static int strange_values; /* [atomic] that a destructor of the program's got */
static char mine;
static pthread_key_t taken[PTHREAD_KEYS_MAX + 1];
static int taken_n;

static void check_value(void *value) {
    if (value != (void *)&mine) add(&strange_values, 1);
}

static void take_all_keys(void) {
    while (taken_n <= PTHREAD_KEYS_MAX && pthread_key_create(&taken[taken_n], check_value) == 0) taken_n++;
}

static bool keys_are_mine(void) {
    for (int i = 0; i < taken_n; i++)
        if (pthread_getspecific(taken[i]) != (void *)&mine) return false;
    return true;
}

static void complain(int *bad, int number) {
    if (!*bad) *bad = number;
}

static void *uses_all_without_keys(void *arg) {
    int *bad = (int *)arg, one = 1;
    const int sig = SIGUSR1;
    static const ctx_key_t key = CTX_KEY(int);
    ctx_on_done_t reg;
    ctx_sem_t sem;
    for (int i = 0; i < taken_n; i++) pthread_setspecific(taken[i], &mine);
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "no key";
    desc.timeout = CTX_S(10);
    ctx_t *all[] = {ctx_with_cancel(ctx_background()),
                    ctx_with_timeout(ctx_background(), CTX_S(10)),
                    ctx_with_deadline(ctx_background(), ctx_now() + CTX_S(10)),
                    ctx_with_value(ctx_background(), &key, &one),
                    ctx_without_cancel(ctx_background()),
                    ctx_merge(ctx_background(), ctx_background()),
                    ctx_derive(ctx_background(), &desc),
                    ctx_derive(ctx_background(), NULL),
                    ctx_notify_signals(ctx_background(), &sig, 1)};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (ctx_err(all[i]) != CTX_NO_MEMORY) complain(bad, (int)i + 1);
        if (ctx_cause(all[i]).code != CTX_NO_MEMORY) complain(bad, 100);
        if (ctx_cancel(all[i])) complain(bad, 101);
        ctx_t *child = ctx_with_cancel(all[i]);
        if (ctx_err(child) != CTX_NO_MEMORY) complain(bad, 102);
        ctx_end(child);
        ctx_end(all[i]);
    }
    /* What makes nothing works, or says why it does not. */
    ctx_sem_init(&sem, 2);
    int rc = ctx_sem_acquire(&sem, ctx_background(), 1);
    if (rc == 0)
        ctx_sem_release(&sem, 1);
    else if (rc != CTX_NO_MEMORY)
        complain(bad, 103);
    rc = ctx_sleep(ctx_background(), CTX_MS(1));
    if (rc != 0 && rc != CTX_NO_MEMORY) complain(bad, 104);
    ctx_on_done(&reg, ctx_background(), do_nothing, NULL);
    ctx_on_done_stop(&reg);
    if (!keys_are_mine()) complain(bad, 105);
    return NULL;
}

static int all_keys_are_taken(void) {
    int bad = 0;
    take_all_keys();
    REQUIRE(taken_n > 0);
    for (int i = 0; i < 3; i++) {
        thread_join(thread_start(uses_all_without_keys, &bad));
        if (bad) fprintf(stderr, "  number %d\n", bad);
        REQUIRE(bad == 0);
        REQUIRE(load(&strange_values) == 0);
    }
    (void)uses_all_without_keys(&bad);
    REQUIRE(bad == 0);
    ctx_runtime_stop();
    REQUIRE(keys_are_mine());
    return 0;
}

TEST(without_a_thread_key_makers_give_a_failed_context_and_no_key_is_touched) { FRESH(all_keys_are_taken); }

static int keys_stay_the_programs(void) {
    int bad = 0;
    ctx_t *ctx = ctx_with_cancel(ctx_background()); /* the library has what it needs, and leaves the others alone */
    take_all_keys();
    for (int i = 0; i < taken_n; i++) pthread_setspecific(taken[i], &mine);
    ctx_t *timed = ctx_with_timeout(ctx, CTX_MS(1));
    REQUIRE(ctx_wait(timed, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(timed);
    ctx_end(ctx);
    ctx_runtime_stop();
    REQUIRE(keys_are_mine());
    (void)bad;
    return 0;
}

TEST(keys_taken_after_the_first_use_stay_the_programs) { FRESH(keys_stay_the_programs); }

/* -- no thread is to be had ---------------------------------------------------------------------------------------- */

static int task(ctx_t *ctx, void *arg) {
    (void)ctx, (void)arg;
    return 0;
}

static int no_thread(int code) {
    const int sig = SIGUSR1;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    ctx_t *live = ctx_with_cancel(ctx_background());
    store(&create_fails, code);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(10));
    REQUIRE(ctx_err(ctx) == CTX_NO_MEMORY);
    ctx_end(ctx);
    ctx = ctx_with_deadline(ctx_background(), ctx_now() + CTX_S(10));
    REQUIRE(ctx_err(ctx) == CTX_NO_MEMORY);
    ctx_end(ctx);
    ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    REQUIRE(ctx_err(ctx) == CTX_NO_MEMORY);
    ctx_end(ctx);
    pthread_mutex_lock(&mutex);
    int rc = ctx_cond_wait(live, &cond, &mutex);
    REQUIRE(rc == CTX_NO_MEMORY);
    pthread_mutex_unlock(&mutex);
    REQUIRE(ctx_go(live, "go", task, NULL) == CTX_NO_MEMORY);
    ctx_pool_t *pool = ctx_pool_new(live, NULL);
    REQUIRE(pool && ctx_pool_submit(pool, live, "task", task, NULL) == CTX_NO_MEMORY);
    ctx_pool_free(pool);
    store(&create_fails, 0);
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(1)); /* and then there is one */
    REQUIRE(ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    REQUIRE(ctx_go(live, "go", task, NULL) == 0);
    REQUIRE(ctx_go_wait(ctx_background()) == 0);
    ctx_end(live);
    ctx_runtime_stop();
    return 0;
}

static int no_thread_again(void) { return no_thread(EAGAIN); }
static int no_thread_memory(void) { return no_thread(ENOMEM); }
static int no_thread_allowed(void) { return no_thread(EPERM); }
static int no_thread_invalid(void) { return no_thread(EINVAL); }

TEST(a_thread_that_cannot_be_created_is_no_memory_whatever_the_system_calls_it) {
    FRESH(no_thread_again);
    FRESH(no_thread_memory);
    FRESH(no_thread_allowed);
    FRESH(no_thread_invalid);
}

/* Who waits for a deadline needs no thread for it, though to make one does. */
static int no_thread_to_wait(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(50));
    REQUIRE(ctx_err(ctx) == 0 || ctx_err(ctx) == CTX_DEADLINE_EXCEEDED);
    store(&create_fails, EAGAIN);
    ctx_runtime_stop(); /* the next wait would start the thread anew */
    REQUIRE(ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    return 0;
}

TEST(a_wait_ends_at_its_deadline_though_no_thread_can_be_created) { FRESH(no_thread_to_wait); }

/* -- a robust mutex whose owner has died --------------------------------------------------------------------------- */

typedef struct {
    cond_waiter_t waiter;
    int held_by_waiter, consistent; /* [atomic] results of the system, 0 */
    gate_t die;
    int locked; /* [atomic] */
} robust_t;

static void *waits_robustly(void *arg) {
    robust_t *robust = (robust_t *)arg;
    cond_waiter_t *w = &robust->waiter;
    store(&w->tid, thread_id());
    if (pthread_mutex_lock(&w->mutex) != 0) return NULL;
    int rc = 0;
    while (rc == 0) rc = ctx_cond_wait(w->ctx, &w->cond, &w->mutex);
    store(&w->rc, rc);
    if (rc == -EOWNERDEAD) store(&robust->consistent, pthread_mutex_consistent(&w->mutex));
    store(&robust->held_by_waiter, pthread_mutex_unlock(&w->mutex)); /* EPERM if it is not this thread's */
    return NULL;
}

static void *locks_and_dies(void *arg) {
    robust_t *robust = (robust_t *)arg;
    store(&robust->locked, pthread_mutex_lock(&robust->waiter.mutex) == 0);
    gate_pass(&robust->die);
    return NULL;
}

enum { DIES_THEN_SIGNAL, DIES_THEN_CANCEL, CANCEL_THEN_DIES, DEADLINE_THEN_DIES };

static int check_robust(int how) {
    static robust_t robust;
    pthread_mutexattr_t attr;
    memset(&robust, 0, sizeof robust);
    pthread_mutexattr_init(&attr);
    REQUIRE(pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST) == 0);
    ctx_clock_fake(CTX_S(1));
    cond_waiter_make(&robust.waiter, ctx_with_timeout(ctx_background(), CTX_S(1)));
    REQUIRE(pthread_mutex_init(&robust.waiter.mutex, &attr) == 0);
    gate_init(&robust.die);
    store(&robust.consistent, -1);
    store(&robust.held_by_waiter, -1);
    pthread_t waiting = thread_start(waits_robustly, &robust);
    until_asleep(&robust.waiter.tid);
    pthread_t dying = thread_start(locks_and_dies, &robust);
    gate_await(&robust.die, 1);
    REQUIRE(load(&robust.locked));
    if (how == CANCEL_THEN_DIES) ctx_cancel(robust.waiter.ctx);
    if (how == DEADLINE_THEN_DIES) ctx_clock_advance(CTX_S(1));
    gate_open(&robust.die);
    thread_join(dying);
    if (how == DIES_THEN_CANCEL) ctx_cancel(robust.waiter.ctx);
    if (how == DIES_THEN_SIGNAL) pthread_cond_broadcast(&robust.waiter.cond);
    thread_join(waiting); /* or an alarm */
    REQUIRE(load(&robust.waiter.rc) == -EOWNERDEAD);
    REQUIRE(load(&robust.consistent) == 0);
    REQUIRE(load(&robust.held_by_waiter) == 0);
    REQUIRE(pthread_mutex_lock(&robust.waiter.mutex) == 0);
    pthread_mutex_unlock(&robust.waiter.mutex);
    ctx_end(robust.waiter.ctx);
    ctx_runtime_stop();
    return 0;
}

static int owner_dies_then_signal(void) { return check_robust(DIES_THEN_SIGNAL); }
static int owner_dies_then_cancel(void) { return check_robust(DIES_THEN_CANCEL); }
static int cancel_then_owner_dies(void) { return check_robust(CANCEL_THEN_DIES); }
static int deadline_then_owner_dies(void) { return check_robust(DEADLINE_THEN_DIES); }

TEST(cond_wait_tells_that_the_owner_of_its_mutex_died_and_holds_it) { FRESH(owner_dies_then_signal); }
TEST(a_canceled_cond_wait_tells_that_the_owner_of_its_mutex_died_and_holds_it) {
    FRESH(owner_dies_then_cancel);
    FRESH(cancel_then_owner_dies);
    FRESH(deadline_then_owner_dies);
}

/* -- pthread_cancel: never inside the library ---------------------------------------------------------------------- */

typedef struct {
    ctx_t *ctx;
    ctx_sem_t sem;
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    int (*wait)(void *arg);
    int tid, returned, rc; /* [atomic] */
} canceled_t;

static int in_wait(void *arg) { return ctx_wait(((canceled_t *)arg)->ctx, CTX_FOREVER); }
static int in_sleep(void *arg) { return ctx_sleep(((canceled_t *)arg)->ctx, CTX_S(100000)); }
static int in_acquire(void *arg) { return ctx_sem_acquire(&((canceled_t *)arg)->sem, ((canceled_t *)arg)->ctx, 1); }
static int in_go_wait(void *arg) { return ctx_go_wait(((canceled_t *)arg)->ctx); }

static void *waits_to_be_canceled(void *arg) {
    canceled_t *c = (canceled_t *)arg;
    store(&c->tid, thread_id());
    store(&c->rc, c->wait(c));
    store(&c->returned, 1);
    for (;;) pthread_testcancel();
    return NULL;
}

static int until_done(ctx_t *ctx, void *arg) {
    (void)arg;
    return ctx_wait(ctx, CTX_FOREVER);
}

/* Where the library cannot put its work aside the memory of the lost thread is kept, so that the test goes on. */
static int check_canceled(int (*wait)(void *arg)) {
    static canceled_t c;
    memset(&c, 0, sizeof c);
    pthread_mutex_init(&c.mutex, NULL);
    pthread_cond_init(&c.cond, NULL);
    ctx_sem_init(&c.sem, 1);
    REQUIRE(ctx_sem_try_acquire(&c.sem, 1));
    c.ctx = ctx_with_cancel(ctx_background());
    c.wait = wait;
    ctx_t *held = ctx_with_cancel(ctx_background());
    if (wait == in_go_wait) REQUIRE(ctx_go(held, "held", until_done, NULL) == 0);
    pthread_t thread = thread_start(waits_to_be_canceled, &c);
    until_asleep(&c.tid);
    REQUIRE(pthread_cancel(thread) == 0);
    until_asleep(&c.tid); /* still there, and asleep: else it has ended */
    ctx_cancel(c.ctx);
    void *how = NULL;
    REQUIRE(pthread_join(thread, &how) == 0);
    REQUIRE(how == PTHREAD_CANCELED);
    REQUIRE(load(&c.returned)); /* the wait has returned before */
    REQUIRE(load(&c.rc) == CTX_CANCELED);
    REQUIRE(pthread_mutex_trylock(&c.mutex) == 0);
    pthread_mutex_unlock(&c.mutex);
    ctx_sem_release(&c.sem, 1);
    REQUIRE(ctx_sem_try_acquire(&c.sem, 1));
    ctx_end(held);
    REQUIRE(ctx_go_wait(ctx_background()) == 0);
    ctx_end(c.ctx);
    ctx_runtime_stop();
    return 0;
}

static int canceled_in_wait(void) { return check_canceled(in_wait); }
static int canceled_in_sleep(void) { return check_canceled(in_sleep); }
static int canceled_in_acquire(void) { return check_canceled(in_acquire); }
static int canceled_in_go_wait(void) { return check_canceled(in_go_wait); }

TEST(a_thread_canceled_in_a_wait_ends_when_the_wait_has_returned) {
    FRESH(canceled_in_wait);
    FRESH(canceled_in_sleep);
    FRESH(canceled_in_acquire);
    FRESH(canceled_in_go_wait);
}

/* As pthread_cond_wait() itself: the handlers of the thread run with the mutex held, and nothing of the library is left
   on its stack. */
static void unlocks(void *mutex) { pthread_mutex_unlock((pthread_mutex_t *)mutex); }
static int in_cond_wait_with_handler(void *arg) {
    canceled_t *c = (canceled_t *)arg;
    volatile int rc = 0; /* for what stands for longjmp in pthread_cleanup_push() */
    pthread_mutex_lock(&c->mutex);
    pthread_cleanup_push(unlocks, &c->mutex);
    while (rc == 0) rc = ctx_cond_wait(c->ctx, &c->cond, &c->mutex);
    pthread_cleanup_pop(1);
    return rc;
}

static int canceled_in_cond_wait(void) {
    static canceled_t c;
    void *how = NULL;
    memset(&c, 0, sizeof c);
    pthread_mutex_init(&c.mutex, NULL);
    pthread_cond_init(&c.cond, NULL);
    c.ctx = ctx_with_cancel(ctx_background());
    c.wait = in_cond_wait_with_handler;
    pthread_t thread = thread_start(waits_to_be_canceled, &c);
    until_asleep(&c.tid);
    REQUIRE(pthread_cancel(thread) == 0);
    REQUIRE(pthread_join(thread, &how) == 0);
    REQUIRE(how == PTHREAD_CANCELED);
    REQUIRE(!load(&c.returned));
    REQUIRE(ctx_err(c.ctx) == 0);
    REQUIRE(c.ctx->on_done == NULL); /* its callback was taken back */
    REQUIRE(ctx_cancel(c.ctx));
    REQUIRE(pthread_mutex_trylock(&c.mutex) == 0);
    pthread_mutex_unlock(&c.mutex);
    ctx_end(c.ctx);
    ctx_runtime_stop();
    return 0;
}

TEST(a_thread_canceled_in_a_cond_wait_ends_there_and_leaves_nothing_behind) { FRESH(canceled_in_cond_wait); }

/* A cancelation is pending all the time, and every call comes back. */
typedef struct {
    ctx_t *ctx, *other;
    gate_t *gate;
    int reached; /* [atomic] how many calls have returned */
} pending_t;

static void *calls_all_with_one_pending(void *arg) {
    pending_t *p = (pending_t *)arg;
    const int sig = SIGUSR1;
    ctx_on_done_t reg;
    ctx_sem_t sem;
    int runs = 0;
    ctx_sem_init(&sem, 1);
    pthread_cancel(pthread_self()); /* from here on each point of cancelation would end the thread */
    ctx_t *ctx = ctx_with_timeout(p->other, CTX_S(100));
    add(&p->reached, 1); /* 1 */
    EXPECT(ctx_done_fd(ctx) >= 0);
    add(&p->reached, 1); /* 2 */
    ctx_on_done(&reg, ctx, do_nothing, &runs);
    ctx_on_done_stop(&reg);
    add(&p->reached, 1); /* 3 */
    EXPECT_EQ(ctx_sem_acquire(&sem, ctx, 1), 0);
    ctx_sem_release(&sem, 1);
    add(&p->reached, 1); /* 4 */
    EXPECT_EQ(ctx_sleep(ctx, CTX_MS(1)), 0);
    add(&p->reached, 1);        /* 5 */
    EXPECT(ctx_cancel(p->ctx)); /* has a descriptor: the write that makes it readable */
    add(&p->reached, 1);        /* 6 */
    ctx_end(ctx);               /* closes one */
    add(&p->reached, 1);        /* 7 */
    ctx_t *notified = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_end(notified);
    add(&p->reached, 1); /* 8 */
    EXPECT_EQ(ctx_go(p->other, "go", task, NULL), 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    add(&p->reached, 1); /* 9 */
    ctx_runtime_stop();
    add(&p->reached, 1); /* 10 */
    pthread_testcancel();
    return NULL;
}

static int one_is_pending(void) {
    pending_t p;
    void *how = NULL;
    memset(&p, 0, sizeof p);
    p.ctx = ctx_with_cancel(ctx_background());
    p.other = ctx_with_cancel(ctx_background());
    int fd = ctx_done_fd(p.ctx);
    pthread_t thread = thread_start(calls_all_with_one_pending, &p);
    REQUIRE(pthread_join(thread, &how) == 0);
    REQUIRE(how == PTHREAD_CANCELED);
    if (load(&p.reached) != 10) fprintf(stderr, "  ended after call %d of 10\n", load(&p.reached));
    REQUIRE(load(&p.reached) == 10);
    struct pollfd poller;
    poller.fd = fd;
    poller.events = POLLIN;
    REQUIRE(poll(&poller, 1, 0) == 1);
    ctx_end(p.ctx); /* no lock stayed taken */
    ctx_end(p.other);
    ctx_runtime_stop();
    return __atomic_load_n(&test_state.failures, __ATOMIC_ACQUIRE) ? __LINE__ : 0;
}

TEST(a_pending_cancelation_of_the_thread_ends_no_call_of_the_library) {
#if defined(TEST_SANITIZED) && !defined(TEST_THREAD_SANITIZER)
    SKIP("the address sanitizer takes the stack that a canceled thread has unwound for one in use");
#endif
    FRESH(one_is_pending);
}

/* -- signal masks -------------------------------------------------------------------------------------------------- */

typedef struct {
    sigset_t mask;
    int status; /* of a child that kills itself by SIGTERM, which is to work there */
    int done;   /* [atomic] */
} masked_t;

static void note_mask(masked_t *masked) {
    pthread_sigmask(SIG_SETMASK, NULL, &masked->mask);
    masked->status = system("kill -TERM $$; exit 7");
    store(&masked->done, 1);
}

static void note_mask_in_callback(void *arg) { note_mask((masked_t *)arg); }

static int note_mask_in_task(ctx_t *ctx, void *arg) {
    (void)ctx;
    note_mask((masked_t *)arg);
    return 0;
}

static bool same_mask(const sigset_t *a, const sigset_t *b) {
    for (int sig = 1; sig < 32; sig++)
        if (sigismember(a, sig) != sigismember(b, sig)) {
            fprintf(stderr, "  signal %d is %sblocked\n", sig, sigismember(b, sig) == 1 ? "" : "not ");
            return false;
        }
    return true;
}

/* Threads of the library as this thread, which starts all of them, with SIGUSR2 blocked. */
static int check_mask(masked_t *masked) {
    sigset_t own;
    pthread_sigmask(SIG_SETMASK, NULL, &own);
    int64_t end = test_now_ns() + CTX_S(CHILD_SECONDS);
    while (!load(&masked->done) && test_now_ns() < end) test_sleep_ms(1);
    REQUIRE(load(&masked->done));
    REQUIRE(same_mask(&own, &masked->mask));
    REQUIRE(masked->status != -1);
    REQUIRE(WIFSIGNALED(masked->status) && WTERMSIG(masked->status) == SIGTERM);
    return 0;
}

static void block_one(void) {
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &one, NULL);
}

static int mask_of_deadline_callbacks(void) {
    static masked_t masked;
    static ctx_on_done_t reg;
    block_one();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_on_done(&reg, ctx, note_mask_in_callback, &masked);
    int line = check_mask(&masked);
    ctx_on_done_stop(&reg);
    ctx_end(ctx);
    ctx_runtime_stop();
    return line;
}

static int mask_of_signal_callbacks(void) {
    static masked_t masked;
    static ctx_on_done_t reg;
    const int sig = SIGUSR1;
    block_one();
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_on_done(&reg, ctx, note_mask_in_callback, &masked);
    kill(getpid(), sig);
    int line = check_mask(&masked);
    ctx_on_done_stop(&reg);
    ctx_end(ctx);
    ctx_runtime_stop();
    return line;
}

static int mask_of_tasks(void) {
    static masked_t masked;
    block_one();
    REQUIRE(ctx_go(ctx_background(), "mask", note_mask_in_task, &masked) == 0);
    int line = check_mask(&masked);
    REQUIRE(ctx_go_wait(ctx_background()) == 0);
    ctx_runtime_stop();
    return line;
}

static int mask_of_pool_tasks(void) {
    static masked_t masked;
    block_one();
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), NULL);
    REQUIRE(pool && ctx_pool_submit(pool, ctx_background(), "mask", note_mask_in_task, &masked) == 0);
    int line = check_mask(&masked);
    ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
    ctx_runtime_stop();
    return line;
}

TEST(a_deadline_callback_and_its_children_have_the_mask_of_the_program) { FRESH(mask_of_deadline_callbacks); }
TEST(a_callback_of_a_signal_and_its_children_have_the_mask_of_the_program) { FRESH(mask_of_signal_callbacks); }
TEST(a_task_and_its_children_have_the_mask_of_the_program) {
    FRESH(mask_of_tasks);
    FRESH(mask_of_pool_tasks);
}

/* A signal for the process that only the library's threads do not block is still handled as the program says. */
static int handled; /* [atomic] */
static void handle(int sig) {
    (void)sig;
    store(&handled, 1);
}

static int a_signal_meets_library_threads(void) {
    sigset_t one;
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(100)); /* the runtime thread */
    signal(SIGUSR1, handle);
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &one, NULL);
    for (int i = 0; i < 20; i++) {
        kill(getpid(), SIGUSR1);
        ctx_t *timed = ctx_with_timeout(ctx, CTX_MS(1)); /* no wait of the library's is cut short by it */
        ctx_time_t deadline = ctx_deadline(timed);
        REQUIRE(ctx_wait(timed, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED);
        REQUIRE(ctx_now() >= deadline);
        ctx_end(timed);
    }
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    REQUIRE(load(&handled));
    ctx_end(ctx);
    ctx_runtime_stop();
    return 0;
}

TEST(a_signal_that_only_threads_of_the_library_take_ends_no_wait_early) { FRESH(a_signal_meets_library_threads); }

/* From here on this process uses the library itself: no scenarios after this. */

/* -- texts, spans, values ------------------------------------------------------------------------------------------ */

typedef struct {
    ctx_t *ctx;
    int code;
    const char *what, *systems;
    char copy[200];
} text_t;

static void *cancels_with_a_code(void *arg) {
    text_t *text = (text_t *)arg;
    ctx_cancel_cause(text->ctx, text->code, NULL);
    text->what = ctx_cause(text->ctx).what;
    snprintf(text->copy, sizeof text->copy, "%s", text->what);
    text->systems = strerror((int)((unsigned)text->code ^ 40000u)); /* this thread's buffer, if there is one */
    return NULL;
}

TEST(the_text_of_a_cause_is_static_whatever_the_code) {
    static const int codes[] = {-5000, -70000, 7, 5000, -EIO, -ENOENT, CTX_CANCELED, CTX_CLOSED, INT_MIN, INT_MAX, 0};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        text_t text;
        memset(&text, 0, sizeof text);
        text.ctx = ctx_with_cancel(ctx_background());
        text.code = codes[i];
        thread_join(thread_start(cancels_with_a_code, &text));
        EXPECT(text.what != NULL && text.what != text.systems);
        if (text.what == text.systems) continue; /* the thread has ended, and its buffer with it */
        EXPECT(ctx_cause(text.ctx).what == text.what);
        EXPECT(strcmp(text.what, text.copy) == 0);
        EXPECT(ctx_cause(text.ctx).code == (codes[i] ? codes[i] : CTX_CANCELED));
        ctx_end(text.ctx);
    }
    ctx_runtime_stop();
}

static ctx_dur_t span(ctx_time_t from, ctx_time_t to) {
    uint64_t d = (uint64_t)to - (uint64_t)from;
    if (to <= from) return 0;
    return d > (uint64_t)INT64_MAX ? INT64_MAX : (ctx_dur_t)d;
}

TEST(what_remains_is_never_negative_and_never_overflows) {
    static const ctx_time_t starts[] = {-CTX_S(5), INT64_MIN, INT64_MIN + 1, -1, 0, 1, INT64_MAX - 2};
    static const ctx_time_t deadlines[] = {INT64_MAX - 1, INT64_MAX / 2, CTX_S(1), 0, -1, -CTX_S(4), INT64_MIN};
    for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        for (size_t j = 0; j < sizeof deadlines / sizeof deadlines[0]; j++) {
            ctx_clock_fake(starts[i]);
            ctx_t *ctx = ctx_with_deadline(ctx_background(), deadlines[j]);
            volatile ctx_dur_t left =
                ctx_remaining(ctx); /* or a compiler that knows of no overflow assumes it is right */
            EXPECT(left >= 0);
            EXPECT_EQ(left, span(starts[i], deadlines[j]));
            ctx_end(ctx);
        }
    }
    ctx_clock_real();
}

TEST(a_timeout_of_zero_has_expired_and_a_description_of_zero_has_none) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), 0);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_NO_DEADLINE);
    ctx_end(ctx);
    desc.timeout = -1;
    ctx = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_fake(0);
    ctx = ctx_with_deadline(ctx_background(), ctx_now());
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_real();
}

/* 16 bytes on 64-bit systems. */
TEST(values_are_aligned_like_what_malloc_returns) {
    const size_t alignment = 2 * sizeof(void *);
    enum { KEYS = 12 };
    static ctx_key_t keys[KEYS];
    static const char bytes[200] = {1, 2, 3};
    for (int round = 0; round < 20; round++) {
        ctx_t *chain[KEYS];
        ctx_t *top = ctx_background();
        for (int i = 0; i < KEYS; i++) {
            keys[i].name = "bytes";
            keys[i].size = (size_t)((i * 37 + round * 13) % 150 + 1);
            top = chain[i] = ctx_with_value(top, &keys[i], bytes);
            for (int j = 0; j <= i; j++) {
                const void *value = ctx_value(top, &keys[j]);
                EXPECT(value != NULL && (uintptr_t)value % alignment == 0);
                if (value) EXPECT(memcmp(value, bytes, keys[j].size) == 0);
            }
        }
        for (int i = KEYS - 1; i >= 0; i--) ctx_end(chain[i]);
    }
}

/* -- main ---------------------------------------------------------------------------------------------------------- */

static const scenario_t scenarios[] = {
#define SCENARIO(fn) \
    { #fn, fn }
    SCENARIO(first_is_a_sleep),         SCENARIO(first_is_a_wait),
    SCENARIO(first_is_an_acquire),      SCENARIO(first_is_a_cond_wait),
    SCENARIO(first_is_the_fake_clock),  SCENARIO(first_is_a_stop),
    SCENARIO(all_keys_are_taken),       SCENARIO(keys_stay_the_programs),
    SCENARIO(no_thread_again),          SCENARIO(no_thread_memory),
    SCENARIO(no_thread_allowed),        SCENARIO(no_thread_invalid),
    SCENARIO(no_thread_to_wait),        SCENARIO(owner_dies_then_signal),
    SCENARIO(owner_dies_then_cancel),   SCENARIO(cancel_then_owner_dies),
    SCENARIO(deadline_then_owner_dies), SCENARIO(canceled_in_wait),
    SCENARIO(canceled_in_sleep),        SCENARIO(canceled_in_acquire),
    SCENARIO(canceled_in_cond_wait),    SCENARIO(canceled_in_go_wait),
    SCENARIO(one_is_pending),           SCENARIO(mask_of_deadline_callbacks),
    SCENARIO(mask_of_signal_callbacks), SCENARIO(mask_of_tasks),
    SCENARIO(mask_of_pool_tasks),       SCENARIO(a_signal_meets_library_threads),
};

static const scenario_t *scenario_named(const char *name) {
    for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++)
        if (strcmp(scenarios[i].name, name) == 0) return &scenarios[i];
    return NULL;
}

int main(int argc, char **argv) {
    program = argv[0];
    if (argc == 3 && strcmp(argv[1], "--scenario") == 0) {
        const scenario_t *scenario = scenario_named(argv[2]);
        return scenario ? run_scenario(scenario) : 98;
    }
    return test_main(argc, argv);
}
