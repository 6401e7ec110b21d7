/* An allocator of the program's own may use the library: it is called under none of its locks. */
#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif
#include <stdlib.h>

static void in_allocator(void);
static inline void *hooked_malloc(size_t size) {
    in_allocator();
    return malloc(size);
}
static inline void *hooked_realloc(void *old, size_t size) {
    in_allocator();
    return realloc(old, size);
}
static inline void hooked_free(void *p) {
    in_allocator();
    free(p);
}
#define CTXCANCEL_MALLOC(size) hooked_malloc(size)
#define CTXCANCEL_REALLOC(old, size) hooked_realloc((old), (size))
#define CTXCANCEL_FREE(p) hooked_free(p)
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

#include <sys/wait.h>

static void (*hook)(void);        /* what the allocator does; NULL: nothing */
static __thread int inside;       /* it is doing so in this thread: what it allocates itself is plain */
static int hooked;                /* [atomic] how often it was called */
static ctx_t *shared_ctx, *other; /* what the hook uses */

static void in_allocator(void) {
    if (!hook || inside) return;
    inside = 1;
    add(&hooked, 1);
    hook();
    inside = 0;
}

/* -- what an allocator may do -------------------------------------------------------------------------------------- */

static void do_nothing(void *arg) { (void)arg; }

static void use_the_library_on(ctx_t *ctx) {
    ctx_on_done_t reg;
    (void)ctx_now();
    if (ctx_err(ctx)) return;
    ctx_t *child = ctx_with_cancel(ctx);
    ctx_on_done(&reg, child, do_nothing, NULL);
    ctx_on_done_stop(&reg);
    ctx_cancel(child);
    ctx_end(child);
}

static void use_another_context(void) { use_the_library_on(other); }
static void use_the_same_context(void) { use_the_library_on(shared_ctx); }
static void cancel_over_budget(void) { ctx_cancel_cause(shared_ctx, CTX_NO_MEMORY, "over budget"); }

static void use_all_of_it(void) {
    static const ctx_key_t key = CTX_KEY(int);
    int one = 1;
    ctx_t *timed = ctx_with_timeout(other, CTX_S(100)), *value = ctx_with_value(timed, &key, &one);
    ctx_t *merged = ctx_merge(value, other);
    (void)ctx_done_fd(merged);
    ctx_end(merged);
    ctx_end(value);
    ctx_end(timed);
}

/* A helper that uses the library while the allocator waits for it. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    int asked, served; /* [mutex] */
    bool over;         /* [mutex] */
} helper = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, false};

static void *helps(void *arg) {
    (void)arg;
    inside = 1;
    pthread_mutex_lock(&helper.mutex);
    while (!helper.over) {
        if (helper.served == helper.asked) {
            pthread_cond_wait(&helper.cond, &helper.mutex);
            continue;
        }
        int asked = helper.asked;
        pthread_mutex_unlock(&helper.mutex);
        use_the_library_on(shared_ctx);
        use_the_library_on(other);
        use_the_library_on(ctx_background());
        pthread_mutex_lock(&helper.mutex);
        helper.served = asked;
        pthread_cond_broadcast(&helper.cond);
    }
    pthread_mutex_unlock(&helper.mutex);
    return NULL;
}

static void wait_for_the_helper(void) {
    pthread_mutex_lock(&helper.mutex);
    int mine = ++helper.asked;
    pthread_cond_broadcast(&helper.cond);
    while (helper.served < mine) pthread_cond_wait(&helper.cond, &helper.mutex);
    pthread_mutex_unlock(&helper.mutex);
}

/* -- all that may allocate or free --------------------------------------------------------------------------------- */

static int nothing(ctx_t *ctx, void *arg) {
    (void)ctx, (void)arg;
    return 0;
}

enum { MANY = 100 }; /* more than any cache holds */

/* The first thing that is done with it, while it is still live. */
static int use_a_descriptor(void) {
    (void)ctx_done_fd(shared_ctx);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    (void)ctx_done_fd(ctx);
    ctx_end(ctx);
    return 0;
}

static int use_contexts(void) {
    static const ctx_key_t key = CTX_KEY(int), more = CTX_KEY(int);
    static ctx_t *all[MANY];
    int one = 1;
    ctx_on_done_t reg;
    for (int i = 0; i < MANY; i++) all[i] = ctx_with_cancel(shared_ctx);
    for (int i = 0; i < MANY; i++) ctx_end(all[i]);
    ctx_t *value = ctx_with_value(shared_ctx, &key, &one), *both = ctx_with_value(value, &more, &one);
    ctx_t *merged = ctx_merge(both, other), *detached = ctx_without_cancel(both);
    (void)ctx_on_done(&reg, merged, do_nothing, NULL);
    (void)ctx_done_fd(merged);
    (void)ctx_done_fd(shared_ctx);
    (void)ctx_done_fd(value);
    ctx_cancel(both);
    ctx_on_done_stop(&reg);
    (void)ctx_done_fd(detached);
    ctx_end(detached);
    ctx_end(merged);
    ctx_end(both);
    ctx_end(value);
    return 0;
}

static int use_timers(void) {
    ctx_t *timed = ctx_with_timeout(shared_ctx, CTX_MS(1));
    (void)ctx_wait(timed, CTX_FOREVER);
    ctx_end(timed);
    return 0;
}

static int use_signals(void) {
    const int sigs[] = {SIGUSR1, SIGUSR2};
    ctx_t *a = ctx_notify_signals(shared_ctx, sigs, 2), *b = ctx_notify_signals(shared_ctx, sigs, 1);
    if (ctx_err(a) == 0) {
        kill(getpid(), SIGUSR1);
        (void)ctx_wait(a, CTX_FOREVER);
    }
    ctx_end(a);
    ctx_end(b);
    return 0;
}

static int use_go_and_groups(void) {
    for (int i = 0; i < 10; i++)
        if (ctx_go(shared_ctx, "go", nothing, NULL) == CTX_INVALID) return CTX_INVALID;
    (void)ctx_go_wait(ctx_background());
    return 0;
}

static void *derives_many(void *arg) {
    static ctx_t *kept[2][MANY];
    for (int round = 0; round < 20; round++) {
        ctx_t **all = kept[*(int *)arg];
        for (int i = 0; i < MANY; i++) all[i] = ctx_with_cancel(shared_ctx);
        for (int i = 0; i < MANY; i++) ctx_end(all[i]);
    }
    return NULL; /* and what the library has cached for this thread is freed */
}

static int use_threads(void) {
    int ids[2] = {0, 1};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) threads[i] = thread_start(derives_many, &ids[i]);
    for (int i = 0; i < 2; i++) thread_join(threads[i]);
    return 0;
}

static int use_fork(void) {
    ctx_on_done_t reg;
    ctx_t *ctx = ctx_with_cancel(shared_ctx);
    (void)ctx_done_fd(ctx);
    (void)ctx_on_done(&reg, ctx, do_nothing, NULL);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(20);
        if (hook == wait_for_the_helper) hook = NULL; /* there is no helper in the child */
        ctx_on_done_stop(&reg);
        ctx_end(ctx);
        _exit(0);
    }
    int status = 1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) return __LINE__;
    ctx_on_done_stop(&reg);
    ctx_end(ctx);
    return 0;
}

static int use_the_end(void) {
    ctx_runtime_stop();
    return 0;
}

static int (*const uses[])(void) = {use_a_descriptor,  use_contexts, use_timers, use_signals,
                                    use_go_and_groups, use_threads,  use_fork,   use_the_end};
enum { USES = sizeof uses / sizeof uses[0] };

/* One kind of use with one kind of allocator, in a child that may hang; under the thread sanitizer, which knows no
   threads there, in this process. */
static int run_one(int use, void (*with)(void)) {
    pthread_t thread = pthread_self();
    bool helped = with == wait_for_the_helper;
    shared_ctx = ctx_with_cancel(ctx_background());
    other = ctx_with_cancel(ctx_background());
    helper.over = false;
    if (helped) thread = thread_start(helps, NULL);
    hook = with;
    int rc = uses[use]();
    if (!rc && uses[use] != use_the_end) rc = use_contexts();
    hook = NULL;
    if (helped) {
        pthread_mutex_lock(&helper.mutex);
        helper.over = true;
        pthread_cond_broadcast(&helper.cond);
        pthread_mutex_unlock(&helper.mutex);
        thread_join(thread);
    }
    ctx_end(shared_ctx);
    ctx_end(other);
    ctx_runtime_stop();
    return rc ? 1 : 0;
}

static int run_apart(int use, void (*with)(void)) {
#ifdef TEST_THREAD_SANITIZER
    /* Where threads end it has taken itself apart before the last of their destructors has freed what was cached. */
    if (uses[use] != use_a_descriptor && uses[use] != use_contexts) return 0;
    return run_one(use, with);
#else
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        signal(SIGABRT, SIG_DFL);
        alarm(30);
        _exit(run_one(use, with));
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status); /* 1014: it hung */
#endif
}

static void check(void (*with)(void)) {
    for (int use = 0; use < USES; use++) {
        int rc = run_apart(use, with);
        if (rc) fprintf(stderr, "  use number %d\n", use);
        EXPECT_EQ(rc, 0);
    }
}

TEST(an_allocator_may_use_an_unrelated_context) { check(use_another_context); }
TEST(an_allocator_may_use_the_context_that_it_allocates_for) { check(use_the_same_context); }
TEST(an_allocator_may_cancel_the_context_that_it_allocates_for) { check(cancel_over_budget); }
TEST(an_allocator_may_use_timers_values_and_descriptors) { check(use_all_of_it); }
TEST(an_allocator_may_wait_for_a_thread_that_uses_the_library) { check(wait_for_the_helper); }

TEST(the_hook_was_called) {
#ifndef TEST_THREAD_SANITIZER
    EXPECT_EQ(run_one(0, use_another_context), 0);
#endif
    EXPECT(load(&hooked) > 0);
}

TEST_MAIN
