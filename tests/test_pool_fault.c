/* Section 9 when threads cannot be had at the moment that matters: what is accepted has somebody to run it. */
#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif
#include <errno.h>
#include <pthread.h>

/* Each start of a thread goes through here while `start_hook` is set. It returns an error, or 0 to have the thread. */
static int (*start_hook)(void);
static int hooked_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg) {
    int (*hook)(void) = __atomic_load_n(&start_hook, __ATOMIC_ACQUIRE);
    int rc = hook ? hook() : 0;
    return rc ? rc : pthread_create(thread, attr, fn, arg);
}
#define pthread_create hooked_create
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#undef pthread_create
#include "test.h"
#include "gates.h"

static void hook_starts(int (*hook)(void)) { __atomic_store_n(&start_hook, hook, __ATOMIC_RELEASE); }

static ctx_pool_t *pool_of(int workers, ctx_dur_t task_timeout) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = 16;
    desc.task_timeout = task_timeout;
    return ctx_pool_new(ctx_background(), &desc);
}

static int counts(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 0;
}

static int no_thread(void) { return EAGAIN; }

/* The threads that are asked for stop at this gate, and then are not there. */
static gate_t at_start;
static int no_thread_after_the_gate(void) {
    gate_pass(&at_start);
    return EAGAIN;
}
/* The same, but only the first. */
static int starts; /* [atomic] */
static int no_first_thread(void) { return add(&starts, 1) == 1 ? no_thread_after_the_gate() : 0; }

typedef struct {
    ctx_pool_t *pool;
    int *ran;
    int tid, rc;
    bool wait;
} submitter_t;

static void *submits(void *arg) {
    submitter_t *s = (submitter_t *)arg;
    store(&s->tid, thread_id());
    s->rc = s->wait ? ctx_pool_submit_wait(s->pool, ctx_background(), "task", counts, s->ran)
                    : ctx_pool_submit(s->pool, ctx_background(), "task", counts, s->ran);
    return NULL;
}

/* The second submitter comes while the first still asks for the pool's only thread. */
static void two_submitters(int (*hook)(void), bool wait, submitter_t *s, int *ran, ctx_pool_t *pool) {
    pthread_t threads[2];
    gate_init(&at_start);
    store(&starts, 0);
    for (int i = 0; i < 2; i++) {
        memset(&s[i], 0, sizeof s[i]);
        s[i].pool = pool;
        s[i].ran = ran;
        s[i].wait = wait;
    }
    hook_starts(hook);
    threads[0] = thread_start(submits, &s[0]);
    gate_await(&at_start, 1);
    threads[1] = thread_start(submits, &s[1]);
    until_asleep(&s[1].tid);
    gate_open(&at_start);
    for (int i = 0; i < 2; i++) thread_join(threads[i]);
    hook_starts(NULL);
    gate_destroy(&at_start);
}

TEST(two_submitters_without_a_thread_are_both_told) {
    for (int wait = 0; wait < 2; wait++) {
        int ran = 0;
        submitter_t s[2];
        ctx_pool_t *pool = pool_of(2, 0);
        two_submitters(no_thread_after_the_gate, wait != 0, s, &ran, pool);
        for (int i = 0; i < 2; i++) EXPECT_EQ(s[i].rc, CTX_NO_MEMORY);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "later", counts, &ran), 0);
        ctx_drain_report_t report;
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
        EXPECT_EQ(report.completed, 1); /* nothing else had been accepted */
        EXPECT_EQ(report.dropped + report.stuck, 0);
        EXPECT_EQ(ran, 1);
        ctx_pool_free(pool);
    }
}

TEST(a_submitter_that_waited_for_anothers_thread_gets_its_own) {
    int ran = 0;
    submitter_t s[2];
    ctx_pool_t *pool = pool_of(2, 0);
    two_submitters(no_first_thread, false, s, &ran, pool);
    EXPECT_EQ(s[0].rc, CTX_NO_MEMORY);
    EXPECT_EQ(s[1].rc, 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 1);
    ctx_pool_free(pool);
}

/* A pool that has no thread is not full. */
TEST(without_a_thread_no_submit_says_that_the_queue_is_full) {
    for (int timed = 0; timed < 2; timed++) {
        ctx_runtime_stop(); /* so that a task timeout needs a thread, too */
        int ran = 0;
        void *args[3] = {&ran, &ran, &ran};
        size_t taken = 9;
        ctx_pool_t *pool = pool_of(2, timed ? CTX_S(3600) : 0);
        hook_starts(no_thread);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "task", counts, &ran), CTX_NO_MEMORY);
        EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "task", counts, &ran), CTX_NO_MEMORY);
        EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "task", counts, args, 3, &taken), CTX_NO_MEMORY);
        EXPECT_EQ(taken, 0);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        hook_starts(NULL);
        ctx_pool_free(pool);
        EXPECT_EQ(ran, 0);
    }
}

/* -- a later thread ---------------------------------------------------------------------------------------------- */

typedef struct {
    gate_t gate;
    int tid;
} post_t;

static int stands_at_post(ctx_t *ctx, void *arg) {
    post_t *post = (post_t *)arg;
    (void)ctx;
    store(&post->tid, thread_id());
    gate_pass(&post->gate);
    return 0;
}

/* One worker stands at its post. A submit asks for a second thread. Meanwhile the first worker runs what was submitted
   and goes to sleep, and another submit leaves its task to the thread that is being made. That is not to be had, so
   the first worker has to be woken. */
TEST(when_a_later_thread_is_not_to_be_had_the_idle_worker_is_woken) {
    int ran = 0;
    post_t post;
    gate_init(&post.gate);
    post.tid = 0;
    ctx_pool_t *pool = pool_of(2, 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "post", stands_at_post, &post), 0);
    gate_await(&post.gate, 1);
    gate_init(&at_start);
    hook_starts(no_thread_after_the_gate);
    submitter_t s;
    memset(&s, 0, sizeof s);
    s.pool = pool;
    s.ran = &ran;
    pthread_t thread = thread_start(submits, &s);
    gate_await(&at_start, 1); /* its task is accepted, and the thread is asked for */
    gate_open(&post.gate);
    UNTIL(load(&ran) == 1);
    until_asleep(&post.tid);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "next", counts, &ran), 0);
    gate_open(&at_start);
    thread_join(thread);
    EXPECT_EQ(s.rc, 0);
    UNTIL(load(&ran) == 2);
    hook_starts(NULL);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "last", counts, &ran), 0);
    UNTIL(load(&ran) == 3); /* nobody is taken to be on the way */
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    gate_destroy(&at_start);
    gate_destroy(&post.gate);
}

TEST(the_runtime_stops_clean) { ctx_runtime_stop(); }

TEST_MAIN
