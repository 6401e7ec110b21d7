/* Section 10: work on threads of its own, groups that begin and end together, a race between two contexts. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

#include <sys/wait.h>

/* -- what the tests share --------------------------------------------------------------------------------------- */

static const ctx_key_t user_key = CTX_KEY(int);

static ctx_t *with_user(ctx_t *parent, int user) { return ctx_with_value(parent, &user_key, &user); }

static int user_of(const ctx_t *ctx) {
    const int *user = (const int *)ctx_value(ctx, &user_key);
    return user ? *user : -1;
}

static int counts(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 0;
}

/* Work that does as it is told, and what it saw: to be read once `ran` is set or the group has ended. */
typedef struct {
    gate_t *gate;    /* stop here first (NULL: do not) */
    bool until_done; /* then wait until the context is done */
    int rc;          /* then return this */
    int tid;         /* [atomic] set when it begins */
    int ran;         /* [atomic] how often it was about to return */
    ctx_t *ctx;
    const char *name;
    pthread_t thread;
    int user, err_before, err_after;
    ctx_cause_t cause;
} task_t;

static task_t *tasks_clear(task_t *tasks, int n) {
    memset(tasks, 0, sizeof *tasks * (size_t)n);
    return tasks;
}

static int does_as_told(ctx_t *ctx, void *arg) {
    task_t *task = (task_t *)arg;
    task->ctx = ctx;
    task->name = ctx_name(ctx);
    task->thread = pthread_self();
    task->user = user_of(ctx);
    task->err_before = ctx_err(ctx);
    store(&task->tid, thread_id());
    if (task->gate) gate_pass(task->gate);
    if (task->until_done) ctx_wait(ctx, CTX_FOREVER);
    task->err_after = ctx_err(ctx);
    task->cause = ctx_cause(ctx);
    int rc = task->rc;
    add(&task->ran, 1);
    return rc;
}

static int tasks_ran(const task_t *tasks, int n) {
    int ran = 0;
    for (int i = 0; i < n; i++) ran += load(&tasks[i].ran);
    return ran;
}

/* A call that may block, in a thread of its own. */
typedef struct {
    int (*call)(void *arg);
    void *arg;
    pthread_t thread;
    int tid, done; /* [atomic] */
    int rc;
} apart_t;

static void *calls_apart(void *arg) {
    apart_t *apart = (apart_t *)arg;
    store(&apart->tid, thread_id());
    apart->rc = apart->call(apart->arg);
    store(&apart->done, 1);
    return NULL;
}

static void apart_start(apart_t *apart, int (*call)(void *arg), void *arg) {
    memset(apart, 0, sizeof *apart);
    apart->call = call;
    apart->arg = arg;
    apart->thread = thread_start(calls_apart, apart);
}

static int apart_end(apart_t *apart) {
    thread_join(apart->thread);
    return apart->rc;
}

/* == work on threads of its own ================================================================================== */

/* Wait for all work, and for the work that waits itself. */
static void settle(void) {
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    UNTIL(ctx_go_count() == 0);
}

static void go(ctx_t *ctx, const char *name, task_t *task) { EXPECT_EQ(ctx_go(ctx, name, does_as_told, task), 0); }

TEST(work_runs_on_a_thread_of_its_own) {
    task_t task;
    go(ctx_background(), "work", tasks_clear(&task, 1));
    settle();
    EXPECT_EQ(task.ran, 1);
    EXPECT(!pthread_equal(task.thread, pthread_self()));
}

TEST(work_gets_a_child_of_the_context_with_its_name_and_the_values) {
    ctx_t *parent = with_user(ctx_background(), 42);
    task_t tasks[2];
    tasks_clear(tasks, 2);
    go(parent, "fetch", &tasks[0]);
    go(parent, "store", &tasks[1]);
    settle();
    EXPECT(strcmp(tasks[0].name, "fetch") == 0);
    EXPECT(strcmp(tasks[1].name, "store") == 0);
    for (int i = 0; i < 2; i++) {
        EXPECT(tasks[i].ctx != parent);
        EXPECT_EQ(tasks[i].user, 42);
        EXPECT_EQ(tasks[i].err_before, 0);
    }
    EXPECT_EQ(ctx_err(parent), 0);
    ctx_end(parent);
}

TEST(a_cancel_of_the_context_reaches_its_work_alone) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    gate_t gate;
    gate_init(&gate);
    task_t inside, outside;
    tasks_clear(&inside, 1)->until_done = true;
    tasks_clear(&outside, 1)->gate = &gate;
    go(parent, "inside", &inside);
    go(ctx_background(), "outside", &outside);
    until_asleep(&inside.tid);
    ctx_cancel_cause(parent, -5, "enough");
    UNTIL(load(&inside.ran));
    gate_open(&gate);
    settle();
    EXPECT_EQ(inside.err_after, CTX_CANCELED);
    EXPECT_EQ(inside.cause.code, -5);
    EXPECT_EQ(outside.err_after, 0);
    ctx_end(parent);
    gate_destroy(&gate);
}

static int cancels_itself(ctx_t *ctx, void *arg) {
    (void)arg;
    EXPECT(ctx_cancel(ctx));
    return -7;
}

TEST(work_that_fails_or_cancels_itself_harms_nobody) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    gate_t gate;
    gate_init(&gate);
    task_t sibling;
    tasks_clear(&sibling, 1)->gate = &gate;
    go(parent, "sibling", &sibling);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_go(parent, "bad", cancels_itself, NULL), 0);
    UNTIL(ctx_go_count() == 1);
    gate_open(&gate);
    settle();
    EXPECT_EQ(sibling.err_after, 0);
    EXPECT_EQ(ctx_err(parent), 0);
    ctx_end(parent);
    gate_destroy(&gate);
}

TEST(the_context_may_be_released_once_the_work_is_accepted) {
    gate_t gate;
    gate_init(&gate);
    task_t tasks[20];
    tasks_clear(tasks, 20);
    for (int i = 0; i < 20; i++) {
        ctx_t *parent = with_user(ctx_background(), i);
        tasks[i].gate = &gate;
        go(parent, "work", &tasks[i]);
        ctx_release(parent);
    }
    gate_open(&gate);
    settle();
    for (int i = 0; i < 20; i++) {
        EXPECT_EQ(tasks[i].user, i);
        EXPECT_EQ(tasks[i].err_after, 0);
    }
    gate_destroy(&gate);
}

static int leaves_a_child(ctx_t *ctx, void *arg) {
    *(ctx_t **)arg = ctx_with_cancel(ctx);
    return 0;
}

TEST(what_work_leaves_below_its_context_is_canceled_when_it_returns) {
    ctx_t *left = NULL;
    EXPECT_EQ(ctx_go(ctx_background(), "leaves", leaves_a_child, &left), 0);
    settle();
    EXPECT_EQ(ctx_wait(left, CTX_S(60)), CTX_CANCELED);
    ctx_end(left);
}

TEST(work_that_waits_for_other_work_never_waits_for_a_thread) {
    enum { N = 40 };
    gate_t gate;
    gate_init(&gate);
    task_t tasks[N];
    tasks_clear(tasks, N);
    for (int i = 0; i < N; i++) {
        tasks[i].gate = &gate;
        go(ctx_background(), "meets", &tasks[i]);
    }
    gate_await(&gate, N); /* all inside at once: fewer threads hang here */
    EXPECT_EQ(ctx_go_count(), N);
    gate_open(&gate);
    settle();
    EXPECT_EQ(tasks_ran(tasks, N), N);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < i; k++) EXPECT(!pthread_equal(tasks[i].thread, tasks[k].thread));
    gate_destroy(&gate);
}

TEST(idle_threads_are_used_again) {
    ctx_runtime_stop();
    int before = threads_settled(), most = 0, ran = 0;
    if (before < 0) SKIP("nothing lists the threads here");
    for (int i = 0; i < 1000; i++) {
        EXPECT_EQ(ctx_go(ctx_background(), "short", counts, &ran), 0);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        int now = thread_count();
        if (now > most) most = now;
    }
    EXPECT_EQ(ran, 1000);
    EXPECT(most <= before + 4); /* one, and those that had run but were not yet idle */
    task_t tasks[30];
    tasks_clear(tasks, 30);
    int settled = threads_settled();
    for (int i = 0; i < 30; i++) {
        go(ctx_background(), "short", &tasks[i]);
        settle();
        until_asleep(&tasks[i].tid); /* idle without a doubt */
    }
    EXPECT_EQ(thread_count(), settled);
}

TEST(the_count_is_of_work_that_has_not_returned) {
    gate_t gate;
    gate_init(&gate);
    EXPECT_EQ(ctx_go_count(), 0);
    task_t tasks[5];
    tasks_clear(tasks, 5);
    for (int i = 0; i < 5; i++) {
        tasks[i].gate = &gate;
        go(ctx_background(), "counted", &tasks[i]);
        EXPECT_EQ(ctx_go_count(), i + 1); /* from the moment it is accepted */
    }
    gate_open(&gate);
    settle();
    EXPECT_EQ(ctx_go_count(), 0);
    gate_destroy(&gate);
}

static int waits_for_work(void *arg) { return ctx_go_wait((ctx_t *)arg); }

/* Each link is accepted before the one before it returns, so that there is always work left until the last. */
typedef struct {
    int left;
    gate_t *gate;
} chain_t;

static int goes_on(ctx_t *ctx, void *arg) {
    chain_t *chain = (chain_t *)arg;
    if (chain->gate) gate_pass(chain->gate);
    if (--chain->left > 0) EXPECT_EQ(ctx_go(ctx_background(), ctx_name(ctx), goes_on, chain), 0);
    return 0;
}

TEST(go_wait_returns_when_no_work_is_left) {
    gate_t gate;
    gate_init(&gate);
    chain_t chain = {50, &gate};
    apart_t waiters[4];
    EXPECT_EQ(ctx_go(ctx_background(), "chain", goes_on, &chain), 0);
    for (int i = 0; i < 4; i++) apart_start(&waiters[i], waits_for_work, ctx_background());
    for (int i = 0; i < 4; i++) until_asleep(&waiters[i].tid);
    for (int i = 0; i < 4; i++) EXPECT_EQ(load(&waiters[i].done), 0);
    gate_open(&gate);
    for (int i = 0; i < 4; i++) EXPECT_EQ(apart_end(&waiters[i]), 0);
    EXPECT_EQ(chain.left, 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0); /* nor does it wait for anything now */
    gate_destroy(&gate);
}

TEST(go_wait_ends_with_its_context) {
    ctx_clock_fake(CTX_S(1));
    gate_t gate;
    gate_init(&gate);
    task_t task;
    tasks_clear(&task, 1)->gate = &gate;
    go(ctx_background(), "held", &task);
    for (int expires = 0; expires < 2; expires++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(30));
        int err = expires ? CTX_DEADLINE_EXCEEDED : CTX_CANCELED;
        apart_t waiter;
        apart_start(&waiter, waits_for_work, ctx);
        until_asleep(&waiter.tid);
        EXPECT_EQ(load(&waiter.done), 0);
        if (expires)
            ctx_clock_advance(CTX_S(30));
        else
            ctx_cancel(ctx);
        EXPECT_EQ(apart_end(&waiter), err);
        EXPECT_EQ(ctx_go_wait(ctx), err); /* done already: at once */
        ctx_end(ctx);
    }
    EXPECT_EQ(load(&task.ran), 0);
    EXPECT_EQ(ctx_go_count(), 1);
    gate_open(&gate);
    settle();
    gate_destroy(&gate);
    ctx_clock_real();
}

/* All three come to wait, for a sibling that is held and then for nobody but each other. */
typedef struct {
    gate_t ready;
    int waited; /* [atomic] */
} inner_t;

static int waits_inside(ctx_t *ctx, void *arg) {
    inner_t *inner = (inner_t *)arg;
    gate_pass(&inner->ready);
    EXPECT_EQ(ctx_go_wait(ctx), 0);
    add(&inner->waited, 1);
    return 0;
}

TEST(work_that_waits_for_the_others_is_not_waited_for) {
    inner_t inner;
    gate_t gate;
    inner.waited = 0;
    gate_init(&inner.ready);
    gate_init(&gate);
    task_t held;
    tasks_clear(&held, 1)->gate = &gate;
    go(ctx_background(), "held", &held);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_go(ctx_background(), "waits", waits_inside, &inner), 0);
    gate_open(&inner.ready);
    gate_await(&inner.ready, 3);
    EXPECT_EQ(load(&inner.waited), 0);
    gate_open(&gate);
    UNTIL(load(&inner.waited) == 3);
    settle();
    EXPECT_EQ(held.ran, 1);
    gate_destroy(&gate);
    gate_destroy(&inner.ready);
}

/* Each is work again once it is through, but by then nobody else may be left behind in the wait. */
static int waits_and_meets(ctx_t *ctx, void *arg) {
    inner_t *inner = (inner_t *)arg;
    waits_inside(ctx, arg);
    UNTIL(load(&inner->waited) == 3);
    return 0;
}

TEST(all_who_wait_for_each_other_get_through_at_once) {
    for (int round = 0, n = test_scale(1000); round < n; round++) {
        inner_t inner;
        inner.waited = 0;
        gate_init(&inner.ready);
        for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_go(ctx_background(), "meets", waits_and_meets, &inner), 0);
        gate_open(&inner.ready);
        settle();
        EXPECT_EQ(inner.waited, 3);
        gate_destroy(&inner.ready);
    }
}

TEST(a_context_that_is_done_or_missing_gets_no_work) {
    int ran = 0;
    ctx_t *canceled = ctx_with_cancel(ctx_background());
    ctx_t *expired = ctx_with_timeout(ctx_background(), 0);
    ctx_t *failed = ctx_with_cancel(NULL);
    ctx_cancel_cause(canceled, -5, "over");
    EXPECT_EQ(ctx_go(canceled, "late", counts, &ran), CTX_CANCELED);
    EXPECT_EQ(ctx_go(expired, "late", counts, &ran), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_go(failed, "late", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_go(NULL, "nowhere", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_go(ctx_background(), "nothing", NULL, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_go_wait(NULL), CTX_INVALID);
    EXPECT_EQ(ctx_go_count(), 0);
    settle();
    EXPECT_EQ(ran, 0);
    ctx_end(canceled);
    ctx_end(expired);
    ctx_end(failed);
}

/* Starts work all the time, more than a few threads at once can do. */
typedef struct {
    int over, given, ran; /* [atomic] */
} flood_t;

static void *floods(void *arg) {
    flood_t *flood = (flood_t *)arg;
    while (!load(&flood->over)) {
        for (int i = 0; i < 16; i++) {
            EXPECT_EQ(ctx_go(ctx_background(), "short", counts, &flood->ran), 0);
            add(&flood->given, 1);
        }
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    }
    return NULL;
}

/* Threads that are told to end find work that has not begun, and must leave it to those that it was given to. */
TEST(the_runtime_may_stop_while_others_start_work) {
    flood_t flood = {0, 0, 0};
    pthread_t thread = thread_start(floods, &flood);
    for (int i = 0, n = test_scale(1000); i < n; i++) ctx_runtime_stop();
    store(&flood.over, 1);
    thread_join(thread);
    EXPECT_EQ(load(&flood.ran), load(&flood.given));
}

#ifndef TEST_SANITIZED
static int threads_at_start; /* an emulator has some of its own */
__attribute__((constructor)) static void count_threads_at_start(void) { threads_at_start = thread_count(); }
#endif

TEST(the_runtime_stops_with_its_idle_threads_and_may_be_used_again) {
    ctx_runtime_stop();
    int alone = threads_settled();
    if (alone < 0) SKIP("nothing lists the threads here");
#ifndef TEST_SANITIZED
    EXPECT_EQ(alone, threads_at_start);
#endif
    for (int round = 0; round < 5; round++) {
        gate_t gate;
        gate_init(&gate);
        task_t tasks[8];
        tasks_clear(tasks, 8);
        for (int i = 0; i < 8; i++) {
            tasks[i].gate = &gate;
            go(ctx_background(), "work", &tasks[i]);
        }
        gate_open(&gate);
        settle();
        EXPECT_EQ(tasks_ran(tasks, 8), 8);
        ctx_runtime_stop(); /* right after: some may not be idle yet */
        EXPECT_EQ(threads_settled(), alone);
        gate_destroy(&gate);
    }
}

TEST(work_that_runs_while_the_runtime_stops_goes_on) {
    gate_t gate;
    gate_init(&gate);
    task_t task;
    tasks_clear(&task, 1)->gate = &gate;
    go(ctx_background(), "held", &task);
    gate_await(&gate, 1);
    ctx_runtime_stop();
    EXPECT_EQ(ctx_go_count(), 1);
    gate_open(&gate);
    settle();
    EXPECT_EQ(task.err_after, 0);
    gate_destroy(&gate);
}

/* Eight threads start work under one context, which one of them cancels. */
enum { SPAWNERS = 8, BURST = 6 };
typedef struct {
    start_line_t line;
    ctx_t *parent;
    int accepted, refused, ran; /* [atomic] */
} spawn_t;

static void *spawns(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    spawn_t *spawn = (spawn_t *)side->shared;
    uint64_t seed = (uint64_t)side->id + 1;
    start_line(&spawn->line);
    for (int burst = 0; burst < 4; burst++) {
        for (int i = 0; i < BURST; i++) {
            race_dither(race_random(&seed));
            int rc = ctx_go(spawn->parent, "spawned", counts, &spawn->ran);
            EXPECT(rc == 0 || rc == CTX_CANCELED);
            add(rc == 0 ? &spawn->accepted : &spawn->refused, 1);
        }
        if (side->id == 0 && burst == 2) ctx_cancel(spawn->parent);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    }
    return NULL;
}

TEST(accepted_work_runs_exactly_once_while_eight_threads_start_it) {
    int refused = 0;
    for (int round = 0, n = test_scale(100); round < n; round++) {
        spawn_t spawn;
        memset(&spawn, 0, sizeof spawn);
        start_line_init(&spawn.line, SPAWNERS);
        spawn.parent = ctx_with_cancel(ctx_background());
        race_run(SPAWNERS, spawns, &spawn);
        settle();
        EXPECT_EQ(spawn.ran, spawn.accepted);
        EXPECT_EQ(spawn.accepted + spawn.refused, SPAWNERS * 4 * BURST);
        refused += spawn.refused;
        ctx_end(spawn.parent);
    }
    EXPECT(refused > 0);
}

/* -- fork ------------------------------------------------------------------------------------------------------- */

/* Run fn() in a child of fork(): what it returned, or 1014 if it hung. */
static int in_child(int (*fn)(void)) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        signal(SIGABRT, SIG_DFL);
        alarm(20);
        _exit(fn());
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

#define REQUIRE(expr)                                                          \
    do {                                                                       \
        if (!(expr)) {                                                         \
            fprintf(stderr, "  in the child, line %d: %s\n", __LINE__, #expr); \
            return 1;                                                          \
        }                                                                      \
    } while (0)

static int child_uses_threads(void) {
    int ran = 0;
    REQUIRE(ctx_go_count() == 0); /* what ran in other threads of the parent does not run here */
    REQUIRE(ctx_go_wait(ctx_background()) == 0);
    for (int i = 0; i < 20; i++) REQUIRE(ctx_go(ctx_background(), "child's", counts, &ran) == 0);
    REQUIRE(ctx_go_wait(ctx_background()) == 0);
    REQUIRE(ran == 20);
    ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
    REQUIRE(group != NULL);
    for (int i = 0; i < 20; i++) REQUIRE(ctx_group_go(group, counts, &ran) == 0);
    REQUIRE(ctx_group_wait(group) == 0);
    REQUIRE(ran == 40);
    ctx_runtime_stop();
    return 0;
}

TEST(the_child_of_a_fork_starts_work_on_threads_of_its_own) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    if (getenv("TEST_NO_CHILD_THREADS")) SKIP("no new thread may start in a fork here");
    gate_t gate;
    gate_init(&gate);
    task_t tasks[4];
    tasks_clear(tasks, 4);
    for (int i = 0; i < 4; i++) {
        tasks[i].gate = &gate;
        go(ctx_background(), "parent's", &tasks[i]);
    }
    gate_await(&gate, 4);
    EXPECT_EQ(in_child(child_uses_threads), 0); /* while there is work */
    EXPECT_EQ(ctx_go_count(), 4);
    gate_open(&gate);
    settle();
    for (int i = 0; i < 4; i++) until_asleep(&tasks[i].tid);
    EXPECT_EQ(in_child(child_uses_threads), 0); /* while there are idle threads */
    EXPECT_EQ(child_uses_threads(), 0);
    gate_destroy(&gate);
}

/* == groups ====================================================================================================== */

/* A group below a parent of its own, on threads or on a pool of its own, and gates to stop at. */
typedef struct {
    ctx_t *lifetime, *parent;
    ctx_pool_t *pool; /* NULL: on threads */
    ctx_group_t *group;
    gate_t gate; /* for tasks of the group */
    gate_t hold; /* for what occupies workers */
    int dropped; /* [atomic] calls of on_drop */
} scene_t;

/* Where each promise that does not depend on it is tested: workers of the pool; 0 is threads. */
static const int venues[] = {0, 1, 4};
enum { VENUES = sizeof venues / sizeof venues[0] };

static void note_drop(const char *op, void *arg, int reason, void *user) {
    (void)op;
    (void)arg;
    (void)reason;
    add(&((scene_t *)user)->dropped, 1);
}

static ctx_pool_desc_t describe(int workers, size_t queue) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    desc.grace = -1;
    return desc;
}

static ctx_group_t *group_below(ctx_t *parent, ctx_pool_t *pool, int limit) {
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "group";
    desc.pool = pool;
    desc.limit = limit;
    ctx_group_t *group = ctx_group_new(parent, &desc);
    if (!group) {
        fprintf(stderr, "no group for the test: %s\n", strerror(errno));
        abort();
    }
    return group;
}

static void scene_on(scene_t *s, ctx_pool_desc_t *desc, int limit) {
    memset(s, 0, sizeof *s);
    gate_init(&s->gate);
    gate_init(&s->hold);
    s->lifetime = ctx_with_cancel(ctx_background());
    s->parent = with_user(ctx_background(), 42);
    if (desc) {
        desc->on_drop = note_drop;
        desc->user = s;
        s->pool = ctx_pool_new(s->lifetime, desc);
        EXPECT(s->pool != NULL);
    }
    s->group = group_below(s->parent, s->pool, limit);
}

static void scene_begin(scene_t *s, int workers, int limit) {
    ctx_pool_desc_t desc = describe(workers, 1024);
    scene_on(s, workers ? &desc : NULL, limit);
}

static int holds(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

/* The same on a pool whose only worker is held by a task of the user. */
static void scene_held(scene_t *s, size_t queue, int limit) {
    ctx_pool_desc_t desc = describe(1, queue);
    scene_on(s, &desc, limit);
    EXPECT_EQ(ctx_pool_submit(s->pool, ctx_background(), "holds", holds, &s->hold), 0);
    gate_await(&s->hold, 1);
}

/* Wait for the group, unless it was waited for, and clear away the rest. The group's result. */
static int scene_end(scene_t *s) {
    int rc = 0;
    gate_open(&s->gate);
    if (s->group) rc = ctx_group_wait(s->group);
    gate_open(&s->hold);
    if (s->pool) ctx_pool_drain(s->pool, CTX_FOREVER, NULL);
    ctx_pool_free(s->pool);
    EXPECT_EQ(load(&s->dropped), 0);
    ctx_end(s->parent);
    ctx_end(s->lifetime);
    gate_destroy(&s->gate);
    gate_destroy(&s->hold);
    return rc;
}

static void add_task(scene_t *s, task_t *task) { EXPECT_EQ(ctx_group_go(s->group, does_as_told, task), 0); }

/* Have tasks[0..n) stop at the gate of the scene, all at once. */
static void fill(scene_t *s, task_t *tasks, int n) {
    tasks_clear(tasks, n);
    for (int i = 0; i < n; i++) {
        tasks[i].gate = &s->gate;
        add_task(s, &tasks[i]);
        gate_await(&s->gate, i + 1);
    }
}

/* A go in a thread of its own. */
typedef struct {
    ctx_group_t *group;
    task_t task;
    apart_t apart;
} adder_t;

static int adds(void *arg) {
    adder_t *adder = (adder_t *)arg;
    return ctx_group_go(adder->group, does_as_told, &adder->task);
}

static void adder_start(adder_t *adder, scene_t *s) {
    adder->group = s->group;
    tasks_clear(&adder->task, 1);
    apart_start(&adder->apart, adds, adder);
}

/* ... when it is to block. */
static void adder_blocks(adder_t *adder, scene_t *s) {
    adder_start(adder, s);
    until_asleep(&adder->apart.tid);
    EXPECT_EQ(load(&adder->apart.done), 0);
}

/* -- what a group is -------------------------------------------------------------------------------------------- */

TEST(a_group_of_nothing_ends_well) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        scene_begin(&s, venues[v], 0);
        EXPECT_EQ(ctx_err(ctx_group_ctx(s.group)), 0);
        EXPECT_EQ(scene_end(&s), 0);
    }
}

TEST(each_task_runs_once_and_a_wait_waits_for_all) {
    enum { N = 200 };
    static task_t tasks[N];
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        scene_begin(&s, venues[v], venues[v] ? 0 : 8);
        tasks_clear(tasks, N);
        for (int i = 0; i < N; i++) add_task(&s, &tasks[i]);
        EXPECT_EQ(ctx_group_wait(s.group), 0);
        for (int i = 0; i < N; i++) EXPECT_EQ(tasks[i].ran, 1);
        s.group = NULL;
        scene_end(&s);
    }
}

static int waits_for_the_group(void *arg) { return ctx_group_wait((ctx_group_t *)arg); }

TEST(a_wait_does_not_return_before_the_last_task_has) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        task_t task;
        apart_t waiter;
        scene_begin(&s, venues[v], 0);
        fill(&s, &task, 1);
        apart_start(&waiter, waits_for_the_group, s.group); /* not only its maker may wait */
        until_asleep(&waiter.tid);
        EXPECT_EQ(load(&waiter.done), 0);
        gate_open(&s.gate);
        EXPECT_EQ(apart_end(&waiter), 0);
        EXPECT_EQ(load(&task.ran), 1);
        s.group = NULL;
        scene_end(&s);
    }
}

TEST(the_tasks_share_one_context_with_the_name_of_the_group_and_the_values_of_the_parent) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        task_t tasks[3];
        scene_begin(&s, venues[v], 0);
        ctx_t *shared = ctx_group_ctx(s.group);
        EXPECT(shared != s.parent);
        EXPECT(strcmp(ctx_name(shared), "group") == 0);
        tasks_clear(tasks, 3);
        for (int i = 0; i < 3; i++) add_task(&s, &tasks[i]);
        EXPECT_EQ(scene_end(&s), 0);
        for (int i = 0; i < 3; i++) {
            EXPECT(tasks[i].ctx == shared);
            EXPECT(strcmp(tasks[i].name, "group") == 0);
            EXPECT_EQ(tasks[i].user, 42);
        }
    }
}

TEST(a_group_without_a_description_has_the_name_of_its_parent_and_no_limit) {
    enum { N = 30 };
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "request";
    ctx_t *parent = ctx_derive(ctx_background(), &desc);
    ctx_group_t *group = ctx_group_new(parent, NULL);
    CHECK(group != NULL);
    EXPECT(strcmp(ctx_name(ctx_group_ctx(group)), "request") == 0);
    gate_t gate;
    gate_init(&gate);
    for (int i = 0; i < N; i++) EXPECT_EQ(ctx_group_go(group, holds, &gate), 0);
    gate_await(&gate, N); /* each on a thread of its own */
    gate_open(&gate);
    EXPECT_EQ(ctx_group_wait(group), 0);
    EXPECT_EQ(ctx_err(parent), 0);
    ctx_end(parent);
    gate_destroy(&gate);
}

TEST(groups_on_threads_use_idle_threads_again_and_are_not_counted_as_work) {
    ctx_runtime_stop();
    int before = threads_settled();
    if (before < 0) SKIP("nothing lists the threads here");
    for (int round = 0; round < 100; round++) {
        scene_t s;
        task_t tasks[4];
        scene_begin(&s, 0, 0);
        fill(&s, tasks, 4);
        EXPECT_EQ(ctx_go_count(), 0);
        EXPECT_EQ(scene_end(&s), 0);
    }
    EXPECT(threads_settled() <= before + 16); /* four, and some that were on their way to be idle */
    ctx_runtime_stop();
    EXPECT_EQ(threads_settled(), before);
}

/* -- failure and cancel ----------------------------------------------------------------------------------------- */

TEST(the_first_failure_is_the_result_and_cancels_the_siblings_with_that_code) {
    const int codes[] = {-5, 7, CTX_DEADLINE_EXCEEDED, CTX_CANCELED};
    for (int v = 0; v < VENUES; v++) {
        for (int c = 0; c < 4; c++) {
            int siblings = venues[v] == 1 ? 0 : 3;
            bool expired = codes[c] == CTX_DEADLINE_EXCEEDED;
            scene_t s;
            task_t tasks[4], *bad = &tasks[3];
            scene_begin(&s, venues[v], 0);
            ctx_t *shared = ctx_retain(ctx_group_ctx(s.group));
            fill(&s, tasks, siblings);
            for (int i = 0; i < siblings; i++) {
                tasks[i].until_done = true;
                tasks[i].rc = -100 - i; /* an error of their own, later */
            }
            gate_open(&s.gate);
            tasks_clear(bad, 1)->rc = codes[c];
            add_task(&s, bad);
            EXPECT_EQ(scene_end(&s), codes[c]);
            for (int i = 0; i < siblings; i++) {
                EXPECT_EQ(tasks[i].err_after, expired ? CTX_DEADLINE_EXCEEDED : CTX_CANCELED);
                EXPECT_EQ(tasks[i].cause.code, codes[c]);
                EXPECT(tasks[i].cause.what != NULL);
            }
            EXPECT_EQ(ctx_cause(shared).code, codes[c]);
            ctx_release(shared);
        }
    }
}

TEST(a_failure_leaves_the_parent_and_other_groups_alone) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        task_t bad, good;
        scene_begin(&s, venues[v], 0);
        ctx_group_t *other = group_below(s.parent, s.pool, 0);
        tasks_clear(&bad, 1)->rc = -5;
        add_task(&s, &bad);
        EXPECT_EQ(ctx_wait(ctx_group_ctx(s.group), CTX_S(60)), CTX_CANCELED); /* no wait is needed for it */
        EXPECT_EQ(ctx_group_go(other, does_as_told, tasks_clear(&good, 1)), 0);
        EXPECT_EQ(ctx_group_wait(other), 0);
        EXPECT_EQ(good.err_after, 0);
        EXPECT_EQ(ctx_err(s.parent), 0);
        EXPECT_EQ(scene_end(&s), -5);
    }
}

/* What was accepted before a failure is waited for like all else, and runs to see that its context is done. */
TEST(tasks_accepted_before_a_failure_run_after_it) {
    scene_t s;
    task_t tasks[6];
    scene_held(&s, 64, 0);
    tasks_clear(tasks, 6);
    for (int i = 0; i < 6; i++) {
        tasks[i].rc = -10 - i;
        add_task(&s, &tasks[i]);
    }
    EXPECT_EQ(tasks_ran(tasks, 6), 0);
    int rc = scene_end(&s), live = 0;
    EXPECT(rc <= -10 && rc > -16);
    for (int i = 0; i < 6; i++) {
        EXPECT_EQ(tasks[i].ran, 1);
        if (tasks[i].err_before == 0) {
            live++;
            EXPECT_EQ(tasks[i].rc, rc); /* the one that ran first */
        }
    }
    EXPECT_EQ(live, 1);
}

/* Who ends the context of a group. */
enum { BY_GROUP, BY_PARENT, BY_DEADLINE, BY_FAILURE, WAYS };

/* The group has a deadline in 30 s of the fake clock, and its gate holds `tasks`, of which the first is to fail. */
static void scene_ends(scene_t *s, int workers, int limit, task_t *tasks, int n) {
    ctx_clock_fake(CTX_S(1));
    scene_begin(s, workers, limit);
    ctx_group_wait(s->group);
    ctx_t *parent = ctx_with_timeout(s->parent, CTX_S(30));
    s->group = group_below(parent, s->pool, limit);
    ctx_release(s->parent);
    s->parent = parent;
    fill(s, tasks, n);
}

/* Ends it, and says which err that gives. */
static int end_group(scene_t *s, int way, task_t *first) {
    switch (way) {
        case BY_GROUP: ctx_cancel_cause(ctx_group_ctx(s->group), -9, "enough"); break;
        case BY_PARENT: ctx_cancel(s->parent); break;
        case BY_DEADLINE: ctx_clock_advance(CTX_S(30)); break;
        default: first->rc = -5; gate_open(&s->gate);
    }
    return way == BY_DEADLINE ? CTX_DEADLINE_EXCEEDED : CTX_CANCELED;
}

TEST(the_end_of_the_context_stops_the_tasks_and_is_no_failure) {
    for (int v = 0; v < VENUES; v++) {
        for (int way = 0; way < BY_FAILURE; way++) {
            scene_t s;
            task_t task;
            scene_ends(&s, venues[v], 0, &task, 1);
            task.until_done = true;
            gate_open(&s.gate);
            int err = end_group(&s, way, &task);
            EXPECT_EQ(scene_end(&s), 0); /* the task made the best of it */
            EXPECT_EQ(task.err_after, err);
            if (way == BY_GROUP) EXPECT_EQ(task.cause.code, -9);
            ctx_clock_real();
        }
    }
}

TEST(what_comes_after_the_end_of_the_context_is_refused_and_never_runs) {
    for (int v = 0; v < VENUES; v++) {
        for (int way = 0; way < WAYS; way++) {
            scene_t s;
            task_t task, late;
            scene_ends(&s, venues[v], 0, &task, 1);
            tasks_clear(&late, 1);
            int err = end_group(&s, way, &task);
            if (way == BY_FAILURE) ctx_wait(ctx_group_ctx(s.group), CTX_FOREVER);
            EXPECT_EQ(ctx_group_go(s.group, does_as_told, &late), err);
            EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &late), err);
            EXPECT_EQ(scene_end(&s), way == BY_FAILURE ? -5 : err);
            EXPECT_EQ(late.ran, 0);
            ctx_clock_real();
        }
    }
}

TEST(a_group_below_a_done_context_refuses_all_work) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        task_t late;
        scene_begin(&s, venues[v], 0);
        EXPECT_EQ(ctx_group_wait(s.group), 0);
        ctx_cancel_cause(s.parent, -5, "over");
        s.group = group_below(s.parent, s.pool, 0);
        EXPECT_EQ(ctx_cause(ctx_group_ctx(s.group)).code, -5);
        EXPECT_EQ(ctx_group_go(s.group, does_as_told, tasks_clear(&late, 1)), CTX_CANCELED);
        EXPECT_EQ(scene_end(&s), CTX_CANCELED);
        EXPECT_EQ(late.ran, 0);
    }
}

/* -- the whole result ------------------------------------------------------------------------------------------- */

/* The loop that anybody writes. */
static int runs_all(ctx_group_t *group, int n, int *ran) {
    for (int i = 0; i < n; i++) ctx_group_go(group, counts, ran);
    return ctx_group_wait(group);
}

TEST(a_wait_is_zero_only_if_all_that_was_asked_for_ran) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        int ran = 0;
        scene_begin(&s, venues[v], 0);
        EXPECT_EQ(runs_all(s.group, 5, &ran), 0);
        EXPECT_EQ(ran, 5);
        ctx_t *over = ctx_with_cancel(s.parent);
        s.group = group_below(over, s.pool, 0);
        EXPECT_EQ(ctx_group_go(s.group, counts, &ran), 0);
        UNTIL(load(&ran) == 6);
        ctx_cancel(over);
        EXPECT_EQ(runs_all(s.group, 5, &ran), CTX_CANCELED);
        EXPECT_EQ(ran, 6);
        ctx_end(over);
        s.group = NULL;
        scene_end(&s);
    }
}

TEST(the_first_of_all_errors_is_the_result) {
    for (int v = 0; v < VENUES; v++) {
        for (int refused_first = 0; refused_first < 2; refused_first++) {
            scene_t s;
            task_t bad;
            int ran = 0;
            scene_begin(&s, venues[v], 0);
            tasks_clear(&bad, 1)->rc = -5;
            bad.gate = &s.gate;
            add_task(&s, &bad);
            gate_await(&s.gate, 1);
            if (refused_first) EXPECT_EQ(ctx_group_go(s.group, NULL, NULL), CTX_INVALID);
            EXPECT_EQ(ctx_err(ctx_group_ctx(s.group)), 0); /* the others go on */
            gate_open(&s.gate);
            EXPECT_EQ(ctx_wait(ctx_group_ctx(s.group), CTX_S(60)), CTX_CANCELED); /* a failure cancels, though later */
            EXPECT_EQ(ctx_cause(ctx_group_ctx(s.group)).code, -5);
            EXPECT_EQ(ctx_group_go(s.group, counts, &ran), CTX_CANCELED);
            EXPECT_EQ(scene_end(&s), refused_first ? CTX_INVALID : -5);
            EXPECT_EQ(ran, 0);
        }
    }
}

/* A try that finds the group full is an answer, not an error; all else counts. */
TEST(a_try_that_finds_no_room_does_not_count) {
    for (int v = 0; v < VENUES; v++) {
        for (int closed = 0; closed < 2; closed++) {
            scene_t s;
            task_t task, late;
            scene_begin(&s, venues[v], 1);
            fill(&s, &task, 1);
            EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, tasks_clear(&late, 1)), CTX_QUEUE_FULL);
            if (closed) ctx_cancel(s.parent);
            if (closed) EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &late), CTX_CANCELED);
            EXPECT_EQ(scene_end(&s), closed ? CTX_CANCELED : 0);
        }
    }
}

/* What on_error heard, in order: read after the wait. */
typedef struct {
    ctx_group_t *group;
    gate_t *gate;                                       /* stop here in the first call (NULL: do not) */
    int (*more)(ctx_group_t *group, void *arg, int rc); /* what it does itself (NULL: nothing) */
    int inside;                                         /* calls at once, or within each other */
    int n;                                              /* [atomic] */
    struct {
        void *arg;
        int rc;
    } heard[16];
} ear_t;

static void hears(void *arg, int rc, void *user) {
    ear_t *ear = (ear_t *)user;
    int n = load(&ear->n);
    EXPECT_EQ(ear->inside, 0);
    ear->inside++;
    if (n < 16) ear->heard[n].arg = arg, ear->heard[n].rc = rc;
    store(&ear->n, n + 1);
    if (ear->gate && n == 0) gate_pass(ear->gate);
    if (ear->more) ear->more(ear->group, arg, rc);
    ear->inside--;
}

static void scene_listens(scene_t *s, ear_t *ear, int workers, int limit, bool keep_going) {
    ctx_group_desc_t desc;
    scene_begin(s, workers, 0);
    ctx_group_wait(s->group);
    memset(ear, 0, sizeof *ear);
    memset(&desc, 0, sizeof desc);
    desc.pool = s->pool;
    desc.limit = limit;
    desc.keep_going = keep_going;
    desc.on_error = hears;
    desc.user = ear;
    s->group = ear->group = ctx_group_new(s->parent, &desc);
    EXPECT(s->group != NULL);
}

TEST(with_keep_going_a_failure_cancels_nobody_and_is_the_result) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        ear_t ear;
        task_t tasks[6];
        int heard = 0;
        scene_listens(&s, &ear, venues[v], 1, true); /* one after the other */
        tasks_clear(tasks, 6);
        for (int i = 0; i < 6; i++) {
            tasks[i].rc = i % 2 ? -10 - i : 0;
            add_task(&s, &tasks[i]);
        }
        EXPECT_EQ(ctx_err(ctx_group_ctx(s.group)), 0);
        int rc = scene_end(&s);
        EXPECT_EQ(rc, -11);
        for (int i = 0; i < 6; i++) {
            EXPECT_EQ(tasks[i].ran, 1);
            EXPECT_EQ(tasks[i].err_after, 0);
        }
        EXPECT_EQ(ear.n, 3);
        for (int i = 0; i < 3; i++) heard += ear.heard[i].arg == &tasks[2 * i + 1] && ear.heard[i].rc == -11 - 2 * i;
        EXPECT_EQ(heard, 3);
    }
}

TEST(on_error_hears_of_failures_and_refusals_before_the_wait_returns) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        ear_t ear;
        task_t bad, late;
        scene_listens(&s, &ear, venues[v], 0, false);
        tasks_clear(&late, 1);
        tasks_clear(&bad, 1)->rc = -5;
        add_task(&s, &bad);
        UNTIL(load(&ear.n) == 1);
        EXPECT_EQ(ctx_group_go(s.group, does_as_told, &late), CTX_CANCELED);
        EXPECT_EQ(load(&ear.n), 2);
        EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &late), CTX_CANCELED);
        EXPECT_EQ(scene_end(&s), -5);
        EXPECT_EQ(ear.n, 3);
        EXPECT(ear.heard[0].arg == &bad && ear.heard[0].rc == -5);
        EXPECT(ear.heard[1].arg == &late && ear.heard[1].rc == CTX_CANCELED);
        EXPECT(ear.heard[2].arg == &late && ear.heard[2].rc == CTX_CANCELED);
    }
}

/* While on_error is busy elsewhere a task that fails leaves word and goes: nobody waits for on_error but the wait. */
TEST(what_fails_during_a_call_of_on_error_is_told_after_it) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        ear_t ear;
        task_t tasks[4];
        apart_t waiter;
        if (venues[v] == 1) continue;
        scene_listens(&s, &ear, venues[v], 0, true);
        ear.gate = &s.gate;
        tasks_clear(tasks, 4);
        for (int i = 0; i < 4; i++) tasks[i].rc = -10 - i;
        add_task(&s, &tasks[0]);
        gate_await(&s.gate, 1);
        for (int i = 1; i < 4; i++) add_task(&s, &tasks[i]);
        UNTIL(tasks_ran(tasks, 4) == 4);
        EXPECT_EQ(ctx_group_go(s.group, NULL, &s), CTX_INVALID); /* nor does this */
        EXPECT_EQ(load(&ear.n), 1);
        apart_start(&waiter, waits_for_the_group, s.group);
        s.group = NULL;
        until_asleep(&waiter.tid);
        EXPECT_EQ(load(&waiter.done), 0);
        gate_open(&s.gate);
        EXPECT_EQ(apart_end(&waiter), -10);
        EXPECT_EQ(ear.n, 5);
        scene_end(&s);
    }
}

static int retries(ctx_group_t *group, void *arg, int rc) {
    task_t *task = (task_t *)arg;
    if (rc != -5) return 0;
    task->rc = task->ran == 3 ? 0 : -5;
    return ctx_group_go(group, does_as_told, task);
}

TEST(on_error_may_add_the_task_again) {
    for (int v = 0; v < VENUES; v++) {
        for (int limit = 0; limit < 2; limit++) { /* at the limit too: its task makes room for it */
            scene_t s;
            ear_t ear;
            task_t task;
            scene_listens(&s, &ear, venues[v], limit, true);
            ear.more = retries;
            tasks_clear(&task, 1)->rc = -5;
            add_task(&s, &task);
            EXPECT_EQ(scene_end(&s), -5);
            EXPECT_EQ(task.ran, 4);
            EXPECT_EQ(ear.n, 3);
        }
    }
}

/* It hears of what it is refused itself, after the call and not within it. */
static int adds_three_times(ctx_group_t *group, void *arg, int rc) {
    int times = rc == -5 ? 3 : 0;
    for (int i = 0; i < times; i++) EXPECT_EQ(ctx_group_go(group, does_as_told, arg), CTX_CANCELED);
    ctx_cancel(ctx_group_ctx(group)); /* no lock is held */
    return 0;
}

TEST(on_error_that_is_refused_hears_of_it_after_the_call) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        ear_t ear;
        task_t task;
        scene_listens(&s, &ear, venues[v], 0, false);
        ear.more = adds_three_times;
        tasks_clear(&task, 1)->rc = -5;
        add_task(&s, &task);
        EXPECT_EQ(scene_end(&s), -5);
        EXPECT_EQ(task.ran, 1);
        EXPECT_EQ(ear.n, 4);
        for (int i = 1; i < 4; i++) EXPECT(ear.heard[i].arg == &task && ear.heard[i].rc == CTX_CANCELED);
    }
}

/* on_error waits for room, which a task has that fails meanwhile. */
static int adds_one_more(ctx_group_t *group, void *arg, int rc) {
    return rc == CTX_INVALID ? ctx_group_go(group, counts, arg) : 0;
}

typedef struct {
    ctx_group_t *group;
    int *ran;
} refused_t;

static int is_refused(void *arg) {
    const refused_t *call = (const refused_t *)arg;
    return ctx_group_go(call->group, NULL, call->ran);
}

TEST(on_error_may_wait_for_the_room_of_a_task_that_fails) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        ear_t ear;
        task_t bad;
        int ran = 0;
        scene_listens(&s, &ear, venues[v], 1, true);
        ear.more = adds_one_more;
        tasks_clear(&bad, 1)->rc = -5;
        bad.gate = &s.gate;
        add_task(&s, &bad);
        gate_await(&s.gate, 1);
        refused_t call = {s.group, &ran};
        apart_t refused;
        apart_start(&refused, is_refused, &call);
        until_asleep(&refused.tid);
        gate_open(&s.gate);
        EXPECT_EQ(apart_end(&refused), CTX_INVALID);
        EXPECT_EQ(scene_end(&s), CTX_INVALID);
        EXPECT_EQ(ran, 1);
        EXPECT_EQ(ear.n, 2);
        EXPECT_EQ(ear.heard[0].rc, CTX_INVALID);
        EXPECT_EQ(ear.heard[1].rc, -5);
    }
}

/* -- the limit -------------------------------------------------------------------------------------------------- */

typedef struct {
    scene_t scene;
    int n;                           /* for each thread */
    int inside, most, accepted, ran; /* [atomic] */
} bottleneck_t;

static int squeezes_through(ctx_t *ctx, void *arg) {
    bottleneck_t *b = (bottleneck_t *)arg;
    (void)ctx;
    int inside = add(&b->inside, 1);
    int most = load(&b->most);
    while (inside > most &&
           !__atomic_compare_exchange_n(&b->most, &most, inside, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    if (inside % 2)
        sched_yield();
    else
        spin(300);
    add(&b->inside, -1);
    add(&b->ran, 1);
    return 0;
}

static void *squeezes_in(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    bottleneck_t *b = (bottleneck_t *)side->shared;
    for (int i = 0; i < b->n; i++) {
        bool wait = (i + side->id) % 3 != 0;
        int rc = wait ? ctx_group_go(b->scene.group, squeezes_through, b)
                      : ctx_group_try_go(b->scene.group, squeezes_through, b);
        EXPECT(rc == 0 || (!wait && rc == CTX_QUEUE_FULL));
        if (rc == 0) add(&b->accepted, 1);
    }
    return NULL;
}

TEST(never_more_tasks_run_at_once_than_the_limit) {
    const int limits[] = {1, 3, 16};
    for (int v = 0; v < VENUES; v++) {
        for (int l = 0; l < 3; l++) {
            bottleneck_t b;
            memset(&b, 0, sizeof b);
            b.n = test_scale(2000);
            scene_begin(&b.scene, venues[v], limits[l]);
            race_run(8, squeezes_in, &b);
            EXPECT_EQ(scene_end(&b.scene), 0);
            EXPECT(b.most <= limits[l]);
            EXPECT_EQ(b.ran, b.accepted);
        }
    }
}

TEST(all_of_the_limit_is_used_and_no_more) {
    for (int v = 0; v < VENUES; v++) {
        int limit = venues[v] ? venues[v] : 4;
        scene_t s;
        task_t tasks[4], extra;
        scene_begin(&s, venues[v], limit);
        fill(&s, tasks, limit);
        tasks_clear(&extra, 1);
        for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &extra), CTX_QUEUE_FULL);
        EXPECT_EQ(load(&extra.tid), 0);
        gate_open(&s.gate);
        UNTIL(tasks_ran(tasks, limit) == limit);
        while (ctx_group_try_go(s.group, does_as_told, &extra) == CTX_QUEUE_FULL) sched_yield(); /* about to return */
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT_EQ(extra.ran, 1);
    }
}

TEST(the_limit_counts_tasks_that_have_not_begun) {
    scene_t s;
    task_t tasks[4];
    scene_held(&s, 64, 3);
    tasks_clear(tasks, 4);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &tasks[i]), 0);
    EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &tasks[3]), CTX_QUEUE_FULL);
    EXPECT_EQ(tasks_ran(tasks, 4), 0);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(tasks_ran(tasks, 3), 3);
    EXPECT_EQ(tasks[3].ran, 0);
}

TEST(the_limit_on_a_pool_is_its_queue_if_none_is_given) {
    scene_t s;
    task_t tasks[9];
    scene_held(&s, 8, 0);
    tasks_clear(tasks, 9);
    for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &tasks[i]), 0);
    EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &tasks[8]), CTX_QUEUE_FULL);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(tasks_ran(tasks, 8), 8);
    EXPECT_EQ(tasks[8].ran, 0);
}

TEST(the_limit_on_a_pool_without_a_queue_is_its_workers) {
    scene_t s;
    task_t tasks[4];
    ctx_pool_desc_t desc = describe(3, CTX_NO_QUEUE);
    scene_on(&s, &desc, 0);
    fill(&s, tasks, 3);
    EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, tasks_clear(&tasks[3], 1)), CTX_QUEUE_FULL);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(tasks_ran(tasks, 4), 3);
}

TEST(go_waits_at_the_limit_until_a_task_has_returned) {
    for (int v = 0; v < VENUES; v++) {
        int limit = venues[v] ? venues[v] : 2;
        scene_t s;
        task_t tasks[4];
        adder_t adders[3];
        scene_begin(&s, venues[v], limit);
        fill(&s, tasks, limit);
        for (int i = 0; i < 3; i++) adder_blocks(&adders[i], &s);
        gate_open(&s.gate);
        for (int i = 0; i < 3; i++) EXPECT_EQ(apart_end(&adders[i].apart), 0);
        EXPECT_EQ(scene_end(&s), 0);
        for (int i = 0; i < 3; i++) EXPECT_EQ(adders[i].task.ran, 1);
    }
}

TEST(go_that_waits_at_the_limit_ends_with_the_context) {
    for (int v = 0; v < VENUES; v++) {
        for (int way = 0; way < WAYS; way++) {
            scene_t s;
            task_t task;
            adder_t adders[3];
            scene_ends(&s, venues[v], 1, &task, 1);
            for (int i = 0; i < 3; i++) adder_blocks(&adders[i], &s);
            int err = end_group(&s, way, &task);
            for (int i = 0; i < 3; i++) EXPECT_EQ(apart_end(&adders[i].apart), err);
            EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &adders[0].task), err); /* before "full" */
            EXPECT_EQ(scene_end(&s), way == BY_FAILURE ? -5 : err);
            for (int i = 0; i < 3; i++) EXPECT_EQ(adders[i].task.ran, 0);
            ctx_clock_real();
        }
    }
}

static int fails_when_told(ctx_t *ctx, void *arg) {
    (void)ctx;
    race_await((int *)arg, 1);
    return -5;
}

/* It gives its place back only after it has canceled: who gets there next must see that. */
TEST(a_task_that_fails_makes_no_room_for_another) {
    for (int round = 0, n = test_scale(5000); round < n; round++) {
        scene_t s;
        int told = 0, ran = 0, rc;
        scene_begin(&s, venues[round % 2], 1);
        EXPECT_EQ(ctx_group_go(s.group, fails_when_told, &told), 0);
        EXPECT_EQ(ctx_group_try_go(s.group, counts, &ran), CTX_QUEUE_FULL);
        store(&told, 1);
        while ((rc = ctx_group_try_go(s.group, counts, &ran)) == CTX_QUEUE_FULL) sched_yield();
        EXPECT_EQ(rc, CTX_CANCELED);
        EXPECT_EQ(scene_end(&s), -5);
        EXPECT_EQ(ran, 0);
    }
}

/* -- helping out on a pool -------------------------------------------------------------------------------------- */

TEST(a_wait_runs_what_no_thread_has_begun) {
    scene_t s;
    task_t tasks[5];
    scene_held(&s, 64, 0);
    tasks_clear(tasks, 5);
    for (int i = 0; i < 5; i++) add_task(&s, &tasks[i]);
    EXPECT_EQ(ctx_group_wait(s.group), 0); /* the pool's only worker is held all the while */
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(tasks[i].ran, 1);
        EXPECT(pthread_equal(tasks[i].thread, pthread_self()));
        EXPECT_EQ(tasks[i].user, 42);
    }
    s.group = NULL;
    scene_end(&s);
}

TEST(go_at_the_limit_runs_a_task_of_the_group_itself) {
    scene_t s;
    task_t tasks[6];
    scene_held(&s, 64, 2);
    tasks_clear(tasks, 6);
    for (int i = 0; i < 6; i++) {
        add_task(&s, &tasks[i]); /* nobody else makes room */
        EXPECT_EQ(tasks_ran(tasks, 6), i < 2 ? 0 : i - 1);
    }
    for (int i = 0; i < 6; i++)
        if (load(&tasks[i].ran)) EXPECT(pthread_equal(tasks[i].thread, pthread_self()));
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(tasks_ran(tasks, 6), 6);
}

TEST(go_on_a_full_pool_returns_when_there_is_room) {
    scene_t s;
    int others = 0;
    adder_t adder;
    scene_held(&s, 1, 0);
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fills", counts, &others), 0);
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fills", counts, &others), CTX_QUEUE_FULL);
    adder_start(&adder, &s);
    until_asleep(&adder.apart.tid); /* it waits, or has ended: a group may have room of its own */
    gate_open(&s.hold);
    EXPECT_EQ(apart_end(&adder.apart), 0);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(adder.task.ran, 1);
    EXPECT_EQ(others, 1);
}

TEST(try_go_never_waits_for_room_whatever_the_pool_does_when_full) {
    const ctx_when_full_t policies[] = {CTX_REJECT, CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};
    for (int p = 0; p < 4; p++) {
        scene_t s;
        int others = 0, accepted = 0;
        task_t tasks[4];
        ctx_pool_desc_t desc = describe(1, 2);
        desc.when_full = policies[p];
        scene_on(&s, &desc, 0);
        EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "holds", holds, &s.hold), 0);
        gate_await(&s.hold, 1);
        for (int i = 0; i < 2; i++) EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fills", counts, &others), 0);
        tasks_clear(tasks, 4);
        for (int i = 0; i < 4; i++) {
            int rc = ctx_group_try_go(s.group, does_as_told, &tasks[i]);
            EXPECT(rc == 0 || rc == CTX_QUEUE_FULL);
            if (rc == 0) accepted++;
        }
        EXPECT(accepted <= 2); /* the limit is the queue */
        EXPECT_EQ(tasks_ran(tasks, 4), 0);
        EXPECT_EQ(scene_end(&s), 0); /* and no task of the user was pushed out */
        EXPECT_EQ(tasks_ran(tasks, 4), accepted);
        EXPECT_EQ(others, 2);
    }
}

/* The user's own tasks may push the group's out of such a queue. That is no affair of on_drop, and nothing is lost. */
TEST(tasks_that_are_pushed_out_of_the_pool_still_run) {
    scene_t s;
    int pushed = 0;
    task_t tasks[4], later;
    ctx_pool_desc_t desc = describe(1, 4);
    desc.when_full = CTX_DROP_OLDEST;
    scene_on(&s, &desc, 0);
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "holds", holds, &s.hold), 0);
    gate_await(&s.hold, 1);
    tasks_clear(tasks, 4);
    for (int i = 0; i < 4; i++) add_task(&s, &tasks[i]);
    for (int i = 0; i < 4; i++) EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "pushes", counts, &pushed), 0);
    EXPECT_EQ(load(&s.dropped), 0);
    EXPECT_EQ(tasks_ran(tasks, 4), 0);
    gate_open(&s.hold);
    UNTIL(load(&pushed) == 4);
    add_task(&s, tasks_clear(&later, 1));
    UNTIL(load(&later.ran)); /* the pool is as good as new: nobody needs to wait for the group */
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(tasks_ran(tasks, 4), 4);
}

/* Occupy all workers of the pool with tasks of the user, and fill its queue. Returns how many tasks fill it. */
static int occupy(scene_t *s, int workers, size_t queue, int *others) {
    int filling = 0;
    for (int i = 0; i < workers; i++) {
        EXPECT_EQ(ctx_pool_submit(s->pool, ctx_background(), "holds", holds, &s->hold), 0);
        gate_await(&s->hold, i + 1);
    }
    for (size_t i = 0; i < queue; i++)
        filling += ctx_pool_submit(s->pool, ctx_background(), "fills", counts, others) == 0;
    return filling;
}

/* Nobody waits for the group. The queue is full when the tasks are added, and has room when the workers come free. */
TEST(each_worker_that_comes_free_takes_a_task_of_a_group_whatever_the_queue_was) {
    enum { WORKERS = 3 };
    for (size_t queue = 1; queue <= 8; queue *= 8) {
        scene_t s;
        int others = 0;
        task_t tasks[WORKERS];
        ctx_pool_desc_t desc = describe(WORKERS, queue);
        scene_on(&s, &desc, 100);
        EXPECT_EQ(occupy(&s, WORKERS, queue, &others), (int)queue);
        tasks_clear(tasks, WORKERS);
        for (int i = 0; i < WORKERS; i++) {
            tasks[i].gate = &s.gate;
            add_task(&s, &tasks[i]);
        }
        gate_open(&s.hold);
        gate_await(&s.gate, WORKERS); /* all inside at once: one after the other hangs here */
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT_EQ(tasks_ran(tasks, WORKERS), WORKERS);
        EXPECT_EQ(others, (int)queue);
    }
}

TEST(tasks_on_a_pool_that_drops_its_oldest_run_though_nobody_waits_for_them) {
    scene_t s;
    int pushed = 0;
    task_t tasks[5];
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_DROP_OLDEST;
    scene_on(&s, &desc, 10);
    occupy(&s, 1, 0, NULL);
    tasks_clear(tasks, 5);
    for (int i = 0; i < 5; i++) add_task(&s, &tasks[i]);
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "pushes", counts, &pushed), 0);
    gate_open(&s.hold);
    UNTIL(tasks_ran(tasks, 5) == 5);
    UNTIL(load(&pushed) == 1);
    EXPECT_EQ(scene_end(&s), 0);
}

/* While the only worker is held, groups are run by their waits. What they wanted of the pool is gone with them. */
TEST(groups_that_are_over_leave_the_pool_all_its_room) {
    enum { QUEUE = 4 };
    scene_t s;
    int ran = 0, others = 0;
    task_t task;
    scene_held(&s, QUEUE, 0);
    for (int i = 0; i < 3 * QUEUE; i++) {
        ctx_group_t *group = group_below(s.parent, s.pool, 0);
        EXPECT_EQ(ctx_group_try_go(group, counts, &ran), 0);
        EXPECT_EQ(ctx_group_wait(group), 0);
        EXPECT_EQ(ran, i + 1);
    }
    EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, tasks_clear(&task, 1)), 0);
    for (int i = 0; i < QUEUE; i++) EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fits", counts, &others), 0);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(task.ran, 1);
    EXPECT_EQ(others, QUEUE);
}

/* The task needs its adder to go on: it would wait for good inside ctx_group_go(). */
TEST(below_the_limit_no_task_runs_inside_go_however_full_the_pool_is) {
    scene_t s;
    int ran = 0, others = 0;
    task_t consumer;
    ctx_pool_desc_t desc = describe(1, 2);
    scene_on(&s, &desc, 4);
    EXPECT_EQ(occupy(&s, 1, 2, &others), 2);
    for (int i = 0; i < 4; i++) {
        ctx_group_t *group = group_below(s.parent, s.pool, 0);
        EXPECT_EQ(ctx_group_go(group, counts, &ran), 0);
        EXPECT_EQ(ctx_group_wait(group), 0);
    }
    tasks_clear(&consumer, 1)->gate = &s.gate;
    add_task(&s, &consumer);
    EXPECT_EQ(gate_came(&s.gate), 0);
    gate_open(&s.hold);
    gate_await(&s.gate, 1);
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(consumer.ran, 1);
    EXPECT(!pthread_equal(consumer.thread, pthread_self()));
    EXPECT_EQ(others, 2);
}

/* A tree of groups: each task has a group of its own for the level below it. */
enum { FAN = 3, LEVELS = 3 };
typedef struct {
    ctx_pool_t *pool;
    int limit;
    int *leaves; /* [atomic] */
    int level;
} level_t;

static int groups_below(ctx_t *ctx, void *arg) {
    const level_t *level = (const level_t *)arg;
    level_t below = *level;
    if (level->level == 0) {
        EXPECT_EQ(user_of(ctx), 42);
        add(level->leaves, 1);
        return 0;
    }
    below.level--;
    ctx_group_t *group = group_below(ctx, level->pool, level->limit);
    for (int i = 0; i < FAN; i++) EXPECT_EQ(ctx_group_go(group, groups_below, &below), 0);
    return ctx_group_wait(group);
}

static void grow_groups(int workers, size_t queue, int limit, ctx_when_full_t when_full) {
    scene_t s;
    int leaves = 0;
    ctx_pool_desc_t desc = describe(workers, queue);
    desc.when_full = when_full;
    scene_on(&s, workers ? &desc : NULL, limit);
    level_t top;
    top.pool = s.pool;
    top.limit = limit;
    top.leaves = &leaves;
    top.level = LEVELS;
    EXPECT_EQ(ctx_group_go(s.group, groups_below, &top), 0);
    EXPECT_EQ(groups_below(s.parent, &top), 0); /* outside of the pool at the same time */
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(leaves, 2 * FAN * FAN * FAN);
}

TEST(groups_of_groups_of_groups_on_one_worker_do_not_deadlock) {
    const ctx_when_full_t policies[] = {CTX_REJECT, CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};
    for (int round = 0, n = test_scale(100); round < n; round++)
        for (int limit = 0; limit < 3; limit++)
            for (size_t queue = 1; queue <= 64; queue *= 8)
                for (int p = 0; p < 4; p++) grow_groups(1, queue, limit, policies[p]);
}

TEST(groups_of_groups_of_groups_on_many_workers_or_threads_do_not_deadlock) {
    for (int round = 0, n = test_scale(100); round < n; round++) {
        for (int limit = 0; limit < 3; limit++) {
            grow_groups(4, 2, limit, CTX_REJECT);
            grow_groups(0, 0, limit, CTX_REJECT);
        }
    }
}

/* The only worker runs a task that uses a group, and the user's own tasks leave the group no room behind it. */
typedef struct {
    ctx_pool_t *pool;
    gate_t *hold;
    task_t tasks[5];
    int rc, done; /* [atomic] */
} cramped_t;

static int groups_without_room(ctx_t *ctx, void *arg) {
    cramped_t *c = (cramped_t *)arg;
    gate_pass(c->hold);
    ctx_group_t *group = group_below(ctx, c->pool, 0);
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_group_go(group, does_as_told, &c->tasks[i]), 0);
    c->rc = ctx_group_wait(group);
    store(&c->done, 1);
    return 0;
}

TEST(a_task_uses_a_group_on_its_own_pool_when_that_has_no_room) {
    scene_t s;
    int others = 0;
    cramped_t c;
    scene_begin(&s, 0, 0);
    ctx_pool_desc_t desc = describe(1, 2);
    s.pool = ctx_pool_new(s.lifetime, &desc);
    memset(&c, 0, sizeof c);
    c.pool = s.pool;
    c.hold = &s.hold;
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "groups", groups_without_room, &c), 0);
    gate_await(&s.hold, 1);
    for (int i = 0; i < 2; i++) EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fills", counts, &others), 0);
    gate_open(&s.hold);
    UNTIL(load(&c.done));
    EXPECT_EQ(scene_end(&s), 0);
    EXPECT_EQ(c.rc, 0);
    EXPECT_EQ(tasks_ran(c.tasks, 5), 5);
    EXPECT_EQ(others, 2);
}

/* -- tasks that add to their own group -------------------------------------------------------------------------- */

typedef struct {
    ctx_group_t *group;
    int left; /* [atomic] */
    int ran;  /* [atomic] */
} family_t;

static int adds_two_more(ctx_t *ctx, void *arg) {
    family_t *family = (family_t *)arg;
    (void)ctx;
    add(&family->ran, 1);
    for (int i = 0; i < 2; i++)
        if (add(&family->left, -1) >= 0) EXPECT_EQ(ctx_group_go(family->group, adds_two_more, family), 0);
    return 0;
}

TEST(tasks_may_add_to_their_own_group_while_it_is_waited_for) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        family_t family;
        scene_begin(&s, venues[v], 0);
        family.group = s.group;
        family.left = 300;
        family.ran = 0;
        EXPECT_EQ(ctx_group_go(s.group, adds_two_more, &family), 0);
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT_EQ(family.ran, 301);
    }
}

typedef struct {
    ctx_group_t *group;
    int n;
    int ran; /* [atomic] */
} feeder_t;

static int feeds(ctx_t *ctx, void *arg) {
    feeder_t *feeder = (feeder_t *)arg;
    (void)ctx;
    for (int i = 0; i < feeder->n; i++) EXPECT_EQ(ctx_group_go(feeder->group, counts, &feeder->ran), 0);
    return 0;
}

TEST(a_task_feeds_its_own_group_through_a_limit_of_two) {
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        feeder_t feeder;
        scene_begin(&s, venues[v], 2);
        feeder.group = s.group;
        feeder.n = 200;
        feeder.ran = 0;
        EXPECT_EQ(ctx_group_go(s.group, feeds, &feeder), 0);
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT_EQ(feeder.ran, 200);
    }
}

/* A task that adds another to its group and does not return before that one has run. */
typedef struct {
    ctx_group_t *group;
    gate_t *gate;
    int ran; /* [atomic] */
} needy_t;

static int needs_another(ctx_t *ctx, void *arg) {
    needy_t *needy = (needy_t *)arg;
    (void)ctx;
    gate_pass(needy->gate);
    EXPECT_EQ(ctx_group_go(needy->group, counts, &needy->ran), 0);
    UNTIL(load(&needy->ran));
    return 0;
}

TEST(a_wait_runs_also_what_is_added_while_it_waits) {
    scene_t s;
    needy_t needy;
    apart_t waiter;
    scene_begin(&s, 1, 0);
    needy.group = s.group;
    needy.gate = &s.gate;
    needy.ran = 0;
    EXPECT_EQ(ctx_group_go(s.group, needs_another, &needy), 0);
    gate_await(&s.gate, 1);
    apart_start(&waiter, waits_for_the_group, s.group);
    until_asleep(&waiter.tid);
    gate_open(&s.gate);
    EXPECT_EQ(apart_end(&waiter), 0);
    s.group = NULL;
    scene_end(&s);
}

/* As many tasks as the limit allows, all past the gate and none about to return, each with more to add. */
typedef struct {
    ctx_group_t *group;
    gate_t *gate; /* of the first level alone */
    int levels;
    int *ran; /* [atomic] */
} branch_t;

static int branches_out(ctx_t *ctx, void *arg) {
    const branch_t *branch = (const branch_t *)arg;
    branch_t *below = NULL;
    (void)ctx;
    add(branch->ran, 1);
    if (branch->gate) gate_pass(branch->gate);
    for (int i = 0; i < 2 && branch->levels > 0; i++) {
        below = (branch_t *)malloc(sizeof *below);
        *below = *branch;
        below->gate = NULL;
        below->levels--;
        EXPECT_EQ(ctx_group_go(branch->group, branches_out, below), 0);
    }
    if (!branch->gate) free(arg);
    return 0;
}

TEST(all_tasks_of_a_full_group_may_wait_to_add_others) {
    for (int v = 0; v < VENUES; v++) {
        for (int limit = 1; limit <= 4; limit++) {
            scene_t s;
            int ran = 0, first = venues[v] && limit > venues[v] ? venues[v] : limit;
            branch_t top;
            scene_begin(&s, venues[v], limit);
            top.group = s.group;
            top.gate = &s.gate;
            top.levels = 4;
            top.ran = &ran;
            for (int i = 0; i < first; i++) {
                EXPECT_EQ(ctx_group_go(s.group, branches_out, &top), 0);
                gate_await(&s.gate, i + 1);
            }
            gate_open(&s.gate);
            UNTIL(load(&ran) == first * 31); /* though nobody helps by waiting for the group */
            EXPECT_EQ(scene_end(&s), 0);
        }
    }
}

/* A thread that waits to add runs other tasks on its stack, which may wait to add as well. */
typedef struct {
    ctx_group_t *group;
    int ran;     /* [atomic] */
    int deepest; /* [atomic] tasks inside of each other */
} nesting_t;

enum { HIGH = 11 };
static nesting_t stack_of_tasks;
static __thread int stack_depth;

static int grows_a_tree(ctx_t *ctx, void *arg) {
    nesting_t *stack = &stack_of_tasks;
    intptr_t level = (intptr_t)arg;
    (void)ctx;
    int depth = ++stack_depth, deepest = load(&stack->deepest);
    while (depth > deepest &&
           !__atomic_compare_exchange_n(&stack->deepest, &deepest, depth, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    for (int i = 0; i < 2 && level < HIGH; i++)
        EXPECT_EQ(ctx_group_go(stack->group, grows_a_tree, (void *)(level + 1)), 0);
    stack_depth--;
    add(&stack->ran, 1);
    return 0;
}

TEST(tasks_run_inside_of_each_other_no_deeper_than_their_tree_is_high) {
    for (int limit = 1; limit <= 256; limit *= 16) {
        scene_t s;
        scene_begin(&s, 1, limit);
        memset(&stack_of_tasks, 0, sizeof stack_of_tasks);
        stack_of_tasks.group = s.group;
        EXPECT_EQ(ctx_group_go(s.group, grows_a_tree, (void *)(intptr_t)0), 0);
        UNTIL(load(&stack_of_tasks.ran) == (2 << HIGH) - 1);
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT(stack_of_tasks.deepest <= HIGH + 1);
    }
}

static int goes_on_in_the_group(ctx_t *ctx, void *arg) {
    feeder_t *chain = (feeder_t *)arg;
    (void)ctx;
    if (++chain->ran < chain->n) EXPECT_EQ(ctx_group_go(chain->group, goes_on_in_the_group, chain), 0);
    return 0;
}

/* Each task adds the next and returns, so that two at most are live. The pool has no room for any of them: whoever runs
   them must do so one after the other, not one inside the other, where each would keep its place and its stack. */
TEST(a_chain_of_tasks_on_a_full_pool_needs_two_places_and_no_deeper_stack) {
    for (int limit = 2; limit <= 1000000; limit += 999998) {
        scene_t s;
        feeder_t chain;
        int others = 0;
        scene_held(&s, 1, limit);
        EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "fills", counts, &others), 0);
        chain.group = s.group;
        chain.n = 200000;
        chain.ran = 0;
        EXPECT_EQ(ctx_group_go(s.group, goes_on_in_the_group, &chain), 0);
        EXPECT_EQ(scene_end(&s), 0);
        EXPECT_EQ(chain.ran, chain.n);
    }
}

/* A group that feeds itself would hold up a drain until its budget ends, if it were not told. */
static int feeds_until_refused(ctx_t *ctx, void *arg) {
    feeder_t *feeder = (feeder_t *)arg;
    add(&feeder->ran, 1);
    int rc = ctx_group_go(feeder->group, feeds_until_refused, feeder);
    if (rc == 0) return 0;
    EXPECT_EQ(rc, CTX_CLOSED);
    EXPECT_EQ(ctx_err(ctx), 0);
    return 0;
}

TEST(a_group_that_feeds_itself_does_not_hold_up_a_drain) {
    for (int workers = 1; workers <= 4; workers += 3) {
        scene_t s;
        feeder_t feeder;
        scene_begin(&s, workers, 0);
        feeder.group = s.group;
        feeder.ran = 0;
        EXPECT_EQ(ctx_group_go(s.group, feeds_until_refused, &feeder), 0);
        UNTIL(load(&feeder.ran) > 1000);
        EXPECT_EQ(ctx_pool_drain(s.pool, CTX_S(30), NULL), 0);
        EXPECT_EQ(scene_end(&s), CTX_CLOSED); /* what it would have added */
    }
}

/* -- the end of the pool ---------------------------------------------------------------------------------------- */

/* The pool ends while a group is on it, and what of it has not begun runs in the wait, or in who ends the pool. */
enum { DRAIN_WITHOUT_BUDGET, END_OF_LIFETIME, FREE, POOL_ENDS };

static int end_pool(scene_t *s, int how) {
    switch (how) {
        case DRAIN_WITHOUT_BUDGET: return ctx_pool_drain(s->pool, 0, NULL);
        case END_OF_LIFETIME: return ctx_cancel(s->lifetime) ? 0 : -1;
        default:
            ctx_pool_free(s->pool);
            s->pool = NULL;
            return 0;
    }
}

TEST(tasks_accepted_before_the_pool_ended_run_with_their_context_done) {
    for (int how = 0; how < POOL_ENDS; how++) {
        for (int running = 0; running < 2; running++) { /* the worker is held by the user, or by one of them */
            scene_t s;
            task_t tasks[5], late;
            if (running)
                scene_begin(&s, 1, 0);
            else
                scene_held(&s, 1024, 0);
            tasks_clear(tasks, 5);
            fill(&s, tasks, running);
            for (int i = running; i < 5; i++) {
                tasks[i].until_done = true;
                add_task(&s, &tasks[i]);
            }
            int err = 0;
            end_pool(&s, how);
            if (how != FREE) {
                err = ctx_err(ctx_group_ctx(s.group));
                EXPECT(err != 0);
                EXPECT_EQ(ctx_group_go(s.group, does_as_told, tasks_clear(&late, 1)), err);
                EXPECT_EQ(late.ran, 0);
            }
            EXPECT_EQ(scene_end(&s), err);
            for (int i = 0; i < 5; i++) {
                EXPECT_EQ(tasks[i].ran, 1);
                EXPECT(tasks[i].err_after != 0);
            }
        }
    }
}

typedef struct {
    ctx_pool_t *pool;
    ctx_dur_t budget;
    ctx_drain_report_t report;
    apart_t apart;
} drainer_t;

static int drains(void *arg) {
    drainer_t *drainer = (drainer_t *)arg;
    return ctx_pool_drain(drainer->pool, drainer->budget, &drainer->report);
}

TEST(a_pool_that_drains_takes_no_more_and_finishes_what_it_took) {
    scene_t s;
    task_t tasks[5], late;
    drainer_t drainer;
    scene_held(&s, 64, 0);
    tasks_clear(tasks, 5);
    for (int i = 0; i < 5; i++) add_task(&s, &tasks[i]);
    drainer.pool = s.pool;
    drainer.budget = CTX_S(3600);
    apart_start(&drainer.apart, drains, &drainer);
    until_asleep(&drainer.apart.tid);
    tasks_clear(&late, 1);
    EXPECT_EQ(ctx_group_go(s.group, does_as_told, &late), CTX_CLOSED);
    EXPECT_EQ(ctx_group_try_go(s.group, does_as_told, &late), CTX_CLOSED);
    EXPECT_EQ(tasks_ran(tasks, 5), 0);
    gate_open(&s.hold);
    EXPECT_EQ(apart_end(&drainer.apart), 0);
    EXPECT_EQ(drainer.report.dropped, 0);
    EXPECT_EQ(scene_end(&s), CTX_CLOSED);
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(tasks[i].ran, 1);
        EXPECT_EQ(tasks[i].err_after, 0);
    }
    EXPECT_EQ(late.ran, 0);
}

/* A task that was accepted before the drain uses a group on its own pool after it: that takes no new work. */
typedef struct {
    ctx_pool_t *pool;
    gate_t *gate;
    int rc_go, rc_wait, ran;
} closing_t;

static int uses_a_group_late(ctx_t *ctx, void *arg) {
    closing_t *closing = (closing_t *)arg;
    gate_pass(closing->gate);
    ctx_group_t *group = group_below(ctx, closing->pool, 0);
    closing->rc_go = ctx_group_go(group, counts, &closing->ran);
    closing->rc_wait = ctx_group_wait(group);
    return 0;
}

TEST(a_task_of_a_pool_that_drains_gets_no_group_work_there_and_ends) {
    scene_t s;
    closing_t closing;
    drainer_t drainer;
    scene_begin(&s, 2, 0);
    memset(&closing, 0, sizeof closing);
    closing.pool = s.pool;
    closing.gate = &s.hold;
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "closes", uses_a_group_late, &closing), 0);
    gate_await(&s.hold, 1);
    drainer.pool = s.pool;
    drainer.budget = CTX_S(3600);
    apart_start(&drainer.apart, drains, &drainer);
    until_asleep(&drainer.apart.tid);
    gate_open(&s.hold);
    EXPECT_EQ(apart_end(&drainer.apart), 0);
    EXPECT_EQ(closing.rc_go, CTX_CLOSED);
    EXPECT_EQ(closing.rc_wait, CTX_CLOSED);
    EXPECT_EQ(closing.ran, 0);
    EXPECT_EQ(drainer.report.completed, 1);
    EXPECT_EQ(scene_end(&s), 0);
}

/* A drain reports the pool's own tasks: what it ran for groups is theirs to tell. */
TEST(a_drain_does_not_report_what_the_pool_ran_for_groups) {
    scene_t s;
    task_t tasks[5];
    int others = 0;
    ctx_drain_report_t report;
    scene_begin(&s, 1, 0);
    tasks_clear(tasks, 5);
    for (int i = 0; i < 5; i++) add_task(&s, &tasks[i]);
    UNTIL(tasks_ran(tasks, 5) == 5);
    EXPECT_EQ(ctx_pool_submit(s.pool, ctx_background(), "own", counts, &others), 0);
    EXPECT_EQ(ctx_pool_drain(s.pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(report.completed, 1);
    EXPECT_EQ(report.failed + report.canceled + report.dropped + report.stuck, 0);
    EXPECT_EQ(scene_end(&s), 0);
}

TEST(go_that_waits_at_the_limit_ends_with_the_pool) {
    for (int how = 0; how < FREE; how++) {
        scene_t s;
        task_t task;
        adder_t adder;
        scene_begin(&s, 1, 1);
        fill(&s, &task, 1);
        adder_blocks(&adder, &s);
        end_pool(&s, how);
        int rc = apart_end(&adder.apart);
        EXPECT(rc == CTX_CANCELED || rc == CTX_DEADLINE_EXCEEDED || rc == CTX_CLOSED);
        EXPECT_EQ(scene_end(&s), rc);
        EXPECT_EQ(adder.task.ran, 0);
    }
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

enum { ADDERS = 8, EACH = 60, TROUBLES = 6 };

/* What goes wrong while eight threads add. */
enum { NOTHING, FAILURES, A_CANCEL, A_DRAIN, A_LIFETIME, OTHERS_TASKS };

typedef struct crowd crowd_t;

/* A task, and the one that it may add itself. */
typedef struct slot {
    crowd_t *crowd;
    int place;
    int runs;     /* [atomic] */
    int accepted; /* by who added it */
    struct slot *more;
} slot_t;

struct crowd {
    scene_t scene;
    start_line_t line;
    int trouble;
    uint64_t seed;
    int others; /* [atomic] tasks of the user accepted and not yet run or dropped */
    int wrong;  /* [atomic] tasks that failed or were refused */
    int told;   /* by on_error: its calls are one at a time */
    slot_t slots[ADDERS * EACH], more[ADDERS * EACH];
};

static int ends_in_the_crowd(ctx_t *ctx, void *arg) {
    slot_t *slot = (slot_t *)arg;
    crowd_t *crowd = slot->crowd;
    uint64_t seed = crowd->seed + (uint64_t)slot->place;
    (void)ctx;
    add(&slot->runs, 1);
    race_dither(race_random(&seed));
    if (slot->more && race_below(&seed, 4) == 0) {
        int rc = ctx_group_try_go(crowd->scene.group, ends_in_the_crowd, slot->more);
        slot->more->accepted = rc == 0;
        add(&crowd->wrong, rc != 0 && rc != CTX_QUEUE_FULL);
    }
    bool fails = crowd->trouble == FAILURES && race_below(&seed, ADDERS * EACH / 2) == 0;
    add(&crowd->wrong, fails);
    return fails ? -5 : 0;
}

static void hears_of_the_crowd(void *arg, int rc, void *user) {
    crowd_t *crowd = (crowd_t *)user;
    EXPECT(((slot_t *)arg)->crowd == crowd);
    EXPECT(rc != 0 && rc != CTX_QUEUE_FULL);
    crowd->told++;
}

static int runs_among_them(ctx_t *ctx, void *arg) {
    (void)ctx;
    add(&((crowd_t *)arg)->others, -1);
    return 0;
}

static void makes_trouble(crowd_t *crowd) {
    switch (crowd->trouble) {
        case A_CANCEL: ctx_cancel(ctx_group_ctx(crowd->scene.group)); break;
        case A_LIFETIME: ctx_cancel(crowd->scene.lifetime); break;
        case A_DRAIN:
            if (crowd->scene.pool) ctx_pool_drain(crowd->scene.pool, CTX_US(50), NULL);
            break;
        default: break;
    }
}

static void *joins_the_crowd(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    crowd_t *crowd = (crowd_t *)side->shared;
    scene_t *s = &crowd->scene;
    uint64_t seed = crowd->seed ^ (uint64_t)side->id;
    int moment = race_below(&seed, EACH);
    start_line(&crowd->line);
    for (int i = 0; i < EACH; i++) {
        slot_t *slot = &crowd->slots[side->id * EACH + i];
        bool wait = race_below(&seed, 3) != 0;
        if (side->id == 0 && i == moment) makes_trouble(crowd);
        int rc = wait ? ctx_group_go(s->group, ends_in_the_crowd, slot)
                      : ctx_group_try_go(s->group, ends_in_the_crowd, slot);
        EXPECT(rc == 0 || rc == CTX_QUEUE_FULL || rc == CTX_CANCELED || rc == CTX_CLOSED ||
               rc == CTX_DEADLINE_EXCEEDED);
        EXPECT(!wait || rc != CTX_QUEUE_FULL);
        EXPECT(crowd->trouble != NOTHING || rc == 0 || !wait);
        slot->accepted = rc == 0;
        add(&crowd->wrong, rc != 0 && rc != CTX_QUEUE_FULL);
        if (crowd->trouble != OTHERS_TASKS || !s->pool || race_below(&seed, 3)) continue;
        add(&crowd->others, 1);
        if (ctx_pool_submit(s->pool, ctx_background(), "other", runs_among_them, crowd)) add(&crowd->others, -1);
    }
    return NULL;
}

static void gather_crowd(int round, int workers, int trouble) {
    static crowd_t crowd;
    static const size_t queues[] = {1, 4, 64};
    static const int limits[] = {1, 3, 16};
    memset(&crowd, 0, sizeof crowd);
    crowd.trouble = trouble;
    crowd.seed = (uint64_t)round * 1000 + (uint64_t)(workers * 10 + trouble);
    for (int i = 0; i < ADDERS * EACH; i++) {
        crowd.slots[i].crowd = crowd.more[i].crowd = &crowd;
        crowd.slots[i].more = &crowd.more[i];
        crowd.slots[i].place = i;
        crowd.more[i].place = ADDERS * EACH + i;
    }
    start_line_init(&crowd.line, ADDERS);
    ctx_pool_desc_t desc = describe(workers, queues[round % 3]);
    desc.when_full = trouble == OTHERS_TASKS ? CTX_DROP_OLDEST : CTX_REJECT;
    scene_on(&crowd.scene, workers ? &desc : NULL, 0);
    ctx_group_wait(crowd.scene.group);
    ctx_group_desc_t group;
    memset(&group, 0, sizeof group);
    group.pool = crowd.scene.pool;
    group.limit = round % 4 && workers ? 0 : limits[round % 3];
    group.keep_going = round % 5 == 0;
    group.on_error = hears_of_the_crowd;
    group.user = &crowd;
    crowd.scene.group = ctx_group_new(crowd.scene.parent, &group);
    race_run(ADDERS, joins_the_crowd, &crowd);
    int rc = ctx_group_wait(crowd.scene.group);
    crowd.scene.group = NULL;
    EXPECT_EQ(crowd.told, crowd.wrong);
    EXPECT(rc == 0 ? crowd.wrong == 0 : crowd.wrong > 0);
    if (trouble == FAILURES) EXPECT(rc == 0 || rc == -5);
    if (trouble == NOTHING || trouble == OTHERS_TASKS) EXPECT_EQ(rc, 0);
    int wrong = 0, ran = 0;
    for (int i = 0; i < ADDERS * EACH; i++) {
        wrong += load(&crowd.slots[i].runs) != crowd.slots[i].accepted;
        wrong += load(&crowd.more[i].runs) != crowd.more[i].accepted;
        ran += load(&crowd.slots[i].runs) + load(&crowd.more[i].runs);
    }
    EXPECT_EQ(wrong, 0);
    EXPECT(ran > 0 || trouble != NOTHING);
    if (crowd.scene.pool) ctx_pool_drain(crowd.scene.pool, CTX_FOREVER, NULL);
    if (trouble == OTHERS_TASKS)
        EXPECT_EQ(load(&crowd.others), load(&crowd.scene.dropped)); /* only those were dropped */
    if (trouble == OTHERS_TASKS) store(&crowd.scene.dropped, 0);
    scene_end(&crowd.scene);
}

TEST(accepted_tasks_run_exactly_once_while_eight_threads_add_and_all_goes_wrong) {
    for (int round = 0, n = test_scale(200); round < n; round++)
        for (int v = 0; v < VENUES; v++)
            for (int trouble = 0; trouble < TROUBLES; trouble++) gather_crowd(round, venues[v], trouble);
}

TEST(bad_arguments_give_no_group_and_no_task) {
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    errno = 0;
    EXPECT(ctx_group_new(NULL, &desc) == NULL);
    EXPECT_EQ(errno, EINVAL);
    desc.limit = -1;
    errno = 0;
    EXPECT(ctx_group_new(ctx_background(), &desc) == NULL);
    EXPECT_EQ(errno, EINVAL);
    for (int v = 0; v < VENUES; v++) {
        scene_t s;
        scene_begin(&s, venues[v], 0);
        EXPECT_EQ(ctx_group_go(s.group, NULL, NULL), CTX_INVALID);
        EXPECT_EQ(ctx_group_try_go(s.group, NULL, NULL), CTX_INVALID);
        EXPECT_EQ(ctx_group_go(NULL, does_as_told, NULL), CTX_INVALID);
        EXPECT_EQ(ctx_group_try_go(NULL, does_as_told, NULL), CTX_INVALID);
        EXPECT_EQ(ctx_err(ctx_group_ctx(s.group)), 0);
        EXPECT_EQ(scene_end(&s), CTX_INVALID);
    }
    EXPECT_EQ(ctx_group_wait(NULL), CTX_INVALID);
}

/* == a race ====================================================================================================== */

/* The two contexts, and what the work does to them. */
typedef struct {
    ctx_t *a, *b;
    ctx_t *victim;     /* to cancel (NULL: none) */
    ctx_dur_t advance; /* of the fake clock */
    task_t task;
} rivals_t;

static void rivals_begin(rivals_t *r) {
    ctx_clock_fake(CTX_S(1));
    memset(r, 0, sizeof *r);
    ctx_t *a = with_user(ctx_background(), 1), *b = with_user(ctx_background(), 2);
    r->a = ctx_with_timeout(a, CTX_S(40));
    r->b = ctx_with_timeout(b, CTX_S(30));
    ctx_release(a);
    ctx_release(b);
}

static void rivals_end(rivals_t *r) {
    ctx_end(r->a);
    ctx_end(r->b);
    ctx_clock_real();
}

static int ends_a_rival(ctx_t *ctx, void *arg) {
    rivals_t *r = (rivals_t *)arg;
    EXPECT_EQ(ctx_remaining(ctx), CTX_S(30)); /* the earlier deadline */
    if (r->victim) EXPECT(ctx_cancel_cause(r->victim, -5, "lost"));
    if (r->advance) ctx_clock_advance(r->advance);
    return does_as_told(ctx, &r->task);
}

TEST(a_race_that_no_context_ends_gives_the_result_of_the_work) {
    const int results[] = {0, -5, 7, CTX_CANCELED};
    for (int i = 0; i < 4; i++) {
        rivals_t r;
        rivals_begin(&r);
        r.task.rc = results[i];
        EXPECT_EQ(ctx_run_either(r.a, r.b, ends_a_rival, &r), results[i]);
        EXPECT_EQ(r.task.ran, 1);
        EXPECT(pthread_equal(r.task.thread, pthread_self()));
        EXPECT_EQ(r.task.user, 1); /* the values of the first */
        EXPECT_EQ(r.task.err_after, 0);
        EXPECT_EQ(ctx_err(r.a), 0);
        EXPECT_EQ(ctx_err(r.b), 0);
        rivals_end(&r);
    }
}

TEST(a_race_that_a_context_ends_gives_its_err_whatever_the_work_returned) {
    for (int second = 0; second < 2; second++) {
        for (int result = -5; result <= 0; result += 5) {
            rivals_t r;
            rivals_begin(&r);
            r.victim = second ? r.b : r.a;
            r.task.until_done = true;
            r.task.rc = result;
            EXPECT_EQ(ctx_run_either(r.a, r.b, ends_a_rival, &r), CTX_CANCELED);
            EXPECT_EQ(r.task.ran, 1);
            EXPECT_EQ(r.task.err_after, CTX_CANCELED);
            EXPECT_EQ(r.task.cause.code, -5);
            EXPECT_EQ(ctx_err(second ? r.a : r.b), 0); /* the other is none the worse */
            rivals_end(&r);
        }
    }
}

TEST(a_race_ends_at_the_earlier_deadline) {
    rivals_t r;
    rivals_begin(&r);
    r.advance = CTX_S(30);
    r.task.until_done = true;
    EXPECT_EQ(ctx_run_either(r.a, r.b, ends_a_rival, &r), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(r.task.err_after, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(r.a), 0);
    rivals_end(&r);
}

static int races(void *arg) {
    rivals_t *r = (rivals_t *)arg;
    return ctx_run_either(r->a, r->b, does_as_told, &r->task);
}

TEST(a_race_waits_for_work_that_a_context_has_ended) {
    rivals_t r;
    apart_t apart;
    gate_t gate;
    gate_init(&gate);
    rivals_begin(&r);
    r.task.gate = &gate;
    apart_start(&apart, races, &r);
    gate_await(&gate, 1);
    ctx_cancel(r.b);
    until_asleep(&apart.tid);
    EXPECT_EQ(load(&apart.done), 0);
    gate_open(&gate);
    EXPECT_EQ(apart_end(&apart), CTX_CANCELED);
    EXPECT_EQ(r.task.err_after, CTX_CANCELED);
    rivals_end(&r);
    gate_destroy(&gate);
}

TEST(a_race_that_is_over_before_it_begins_runs_nothing) {
    for (int which = 1; which <= 3; which++) {
        rivals_t r;
        rivals_begin(&r);
        if (which & 1) ctx_cancel(r.a);
        if (which & 2) ctx_clock_advance(CTX_S(30));
        int rc = ctx_run_either(r.a, r.b, does_as_told, &r.task);
        EXPECT(which == 2 ? rc == CTX_DEADLINE_EXCEEDED : rc == CTX_CANCELED || (which == 3 && rc == ctx_err(r.b)));
        EXPECT_EQ(r.task.ran, 0);
        rivals_end(&r);
    }
}

TEST(work_that_cancels_its_own_context_ends_neither_of_both) {
    rivals_t r;
    rivals_begin(&r);
    EXPECT_EQ(ctx_run_either(r.a, r.b, cancels_itself, NULL), -7);
    EXPECT_EQ(ctx_err(r.a), 0);
    EXPECT_EQ(ctx_err(r.b), 0);
    rivals_end(&r);
}

TEST(a_race_with_bad_arguments_runs_nothing) {
    rivals_t r;
    rivals_begin(&r);
    EXPECT_EQ(ctx_run_either(NULL, r.b, does_as_told, &r.task), CTX_INVALID);
    EXPECT_EQ(ctx_run_either(r.a, NULL, does_as_told, &r.task), CTX_INVALID);
    EXPECT_EQ(ctx_run_either(r.a, r.b, NULL, &r.task), CTX_INVALID);
    EXPECT_EQ(r.task.ran, 0);
    rivals_end(&r);
}

TEST(the_runtime_stops_clean) {
    settle();
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
