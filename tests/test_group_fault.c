/* Section 10 when memory or threads cannot be had: what is accepted runs, what is refused never does, nothing leaks. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_STACK_SIZE ((1 << 20) + 1)
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

/* -- what the tests share --------------------------------------------------------------------------------------- */

static long settled_blocks(void) {
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    for (int i = 0; i < 2000; i++) { /* threads of groups are idle a moment after their group has ended */
        ctx_runtime_stop();
        if (fault_live() == 0) break;
        test_sleep_ms(1);
    }
    return fault_live();
}

static int counts(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 0;
}

static int passes_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

/* Workers of the pool that a group is on; 0 is threads. */
static const int venues[] = {0, 1, 3};
enum { VENUES = sizeof venues / sizeof venues[0] };

static ctx_pool_t *pool_of(int workers, size_t queue) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    return workers ? ctx_pool_new(ctx_background(), &desc) : NULL;
}

static ctx_group_t *group_on(ctx_t *parent, ctx_pool_t *pool, int limit) {
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.pool = pool;
    desc.limit = limit;
    return ctx_group_new(parent, &desc);
}

static void pool_end(ctx_pool_t *pool) {
    if (pool) ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
}

/* 1 if it was accepted, 0 if there was nothing to run it with. */
static int accepts(ctx_group_t *group, ctx_task_fn fn, void *arg, bool wait) {
    int rc = wait ? ctx_group_go(group, fn, arg) : ctx_group_try_go(group, fn, arg);
    EXPECT(rc == 0 || rc == CTX_NO_MEMORY || (!wait && rc == CTX_QUEUE_FULL));
    return rc == 0;
}

/* -- work on threads of its own --------------------------------------------------------------------------------- */

TEST(work_is_refused_at_each_allocation_that_fails) {
    int refused = 0;
    for (long n = 0;; n++) {
        int ran = 0;
        ctx_t *parent = ctx_with_cancel(ctx_background());
        ctx_runtime_stop(); /* no idle thread, no cache */
        fault_after(n);
        int rc = ctx_go(parent, "work", counts, &ran);
        bool injected = fault_off();
        EXPECT(rc == 0 || (injected && rc == CTX_NO_MEMORY));
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        EXPECT_EQ(ctx_go_count(), 0);
        EXPECT_EQ(ran, rc == 0 ? 1 : 0);
        refused += rc != 0;
        EXPECT_EQ(ctx_err(parent), 0);
        ctx_end(parent);
        EXPECT_EQ(settled_blocks(), 0);
        if (!injected) break;
        CHECK(n < 100);
    }
    EXPECT(refused > 0);
}

TEST(without_a_new_thread_work_runs_on_an_idle_one_or_not_at_all) {
    int ran = 0;
    gate_t gate;
    gate_init(&gate);
    EXPECT_EQ(settled_blocks(), 0);
    fault_threads_all_after(0);
    EXPECT_EQ(ctx_go(ctx_background(), "work", counts, &ran), CTX_NO_MEMORY);
    EXPECT_EQ(ctx_go_count(), 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    EXPECT_EQ(ran, 0);
    EXPECT(fault_threads_off());
    EXPECT_EQ(ctx_go(ctx_background(), "work", counts, &ran), 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    fault_threads_all_after(0);
    EXPECT_EQ(ctx_go(ctx_background(), "work", passes_gate, &gate), 0);
    EXPECT_EQ(ctx_go(ctx_background(), "work", counts, &ran), CTX_NO_MEMORY); /* the only thread is busy */
    EXPECT_EQ(ctx_go_count(), 1);
    gate_open(&gate);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    EXPECT_EQ(ran, 1);
    EXPECT(fault_threads_off());
    EXPECT_EQ(settled_blocks(), 0);
    gate_destroy(&gate);
}

#if defined(__linux__) && defined(__GLIBC__)
#ifndef _GNU_SOURCE
extern int pthread_getattr_np(pthread_t thread, pthread_attr_t *attr);
#endif

static int notes_stack(ctx_t *ctx, void *arg) {
    pthread_attr_t attr;
    void *low = NULL;
    (void)ctx;
    EXPECT_EQ(pthread_getattr_np(pthread_self(), &attr), 0);
    EXPECT_EQ(pthread_attr_getstack(&attr, &low, (size_t *)arg), 0);
    pthread_attr_destroy(&attr);
    return 0;
}

TEST(threads_have_the_stack_that_is_configured) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = 0;
    ctx_runtime_stop(); /* no idle thread */
    EXPECT_EQ(ctx_go(ctx_background(), "notes", notes_stack, &size), 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    EXPECT_EQ(size, (1 << 20) + page);
    ctx_pool_t *pool = pool_of(1, 4); /* says nothing of its own */
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "notes", notes_stack, &size), 0);
    pool_end(pool);
    EXPECT_EQ(size, (1 << 20) + page);
    EXPECT_EQ(settled_blocks(), 0);
}
#endif

/* -- groups ----------------------------------------------------------------------------------------------------- */

TEST(a_group_that_cannot_be_had_is_null_and_leaks_nothing) {
    for (int v = 0; v < VENUES; v++) {
        int failed = 0;
        for (long n = 0;; n++) {
            ctx_t *parent = ctx_with_cancel(ctx_background());
            ctx_pool_t *pool = pool_of(venues[v], 8);
            ctx_runtime_stop();
            errno = 0;
            fault_after(n);
            ctx_group_t *group = group_on(parent, pool, 0);
            int err = errno;
            bool injected = fault_off();
            EXPECT(group || (injected && err == ENOMEM));
            failed += !group;
            if (group) EXPECT_EQ(ctx_group_wait(group), 0);
            EXPECT_EQ(ctx_err(parent), 0);
            pool_end(pool);
            ctx_end(parent);
            EXPECT_EQ(settled_blocks(), 0);
            if (!injected) break;
            CHECK(n < 100);
        }
        EXPECT(failed > 0);
    }
}

static void counts_errors(void *arg, int rc, void *user) {
    (void)arg;
    EXPECT_EQ(rc, CTX_NO_MEMORY);
    ++*(int *)user;
}

/* Ten tasks while memory or threads run out; the others go on. */
static bool ten_tasks(int workers, void (*arm)(long n), bool (*disarm)(void), long n) {
    int ran = 0, accepted = 0, refused = 0, told = 0;
    ctx_pool_t *pool = pool_of(workers, 4);
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.pool = pool;
    desc.limit = 3;
    desc.on_error = counts_errors;
    desc.user = &told;
    ctx_group_t *group = ctx_group_new(ctx_background(), &desc);
    ctx_runtime_stop();
    arm(n);
    for (int i = 0; i < 10; i++) {
        int rc = i % 3 ? ctx_group_go(group, counts, &ran) : ctx_group_try_go(group, counts, &ran);
        EXPECT(rc == 0 || rc == CTX_NO_MEMORY || (i % 3 == 0 && rc == CTX_QUEUE_FULL));
        accepted += rc == 0;
        refused += rc == CTX_NO_MEMORY;
    }
    EXPECT_EQ(ctx_err(ctx_group_ctx(group)), 0);
    EXPECT_EQ(ctx_group_wait(group), refused ? CTX_NO_MEMORY : 0);
    EXPECT_EQ(told, refused);
    bool injected = disarm();
    EXPECT_EQ(ran, accepted);
    pool_end(pool);
    EXPECT_EQ(settled_blocks(), 0);
    return injected;
}

TEST(accepted_tasks_run_whichever_allocation_fails) {
    for (int v = 0; v < VENUES; v++) {
        for (long n = 0; ten_tasks(venues[v], fault_after, fault_off, n); n++) CHECK(n < 200);
        for (long n = 0; n < 12; n++) ten_tasks(venues[v], fault_all_after, fault_off, n);
    }
}

TEST(accepted_tasks_run_whichever_thread_does_not_start) {
    for (int v = 0; v < VENUES; v++) {
        for (long n = 0; ten_tasks(venues[v], fault_threads_after, fault_threads_off, n); n++) CHECK(n < 200);
        for (long n = 0; n < 4; n++) ten_tasks(venues[v], fault_threads_all_after, fault_threads_off, n);
    }
}

TEST(a_refusal_for_want_of_memory_cancels_nobody) {
    for (int v = 0; v < VENUES; v++) {
        int ran = 0;
        ctx_pool_t *pool = pool_of(venues[v], 8);
        ctx_group_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.pool = pool;
        ctx_group_t *group = ctx_group_new(ctx_background(), &desc);
        settled_blocks();
        fault_all_after(0);
        EXPECT_EQ(ctx_group_go(group, counts, &ran), CTX_NO_MEMORY);
        fault_off();
        EXPECT_EQ(ctx_err(ctx_group_ctx(group)), 0);
        EXPECT_EQ(ctx_group_go(group, counts, &ran), 0);
        EXPECT_EQ(ctx_group_wait(group), CTX_NO_MEMORY);
        EXPECT_EQ(ran, 1);
        pool_end(pool);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

/* on_error is in a call, and there is no memory for a place in its queue. */
typedef struct {
    ctx_group_t *group;
    gate_t in_task, in_call;
    int waits; /* the call adds a task: its cell is that of the one that failed, so it needs no memory */
    int n;     /* [atomic] calls */
    int ran, tid, rc;
} short_t;

static void hears_without_memory(void *arg, int rc, void *user) {
    short_t *s = (short_t *)user;
    (void)arg;
    (void)rc;
    if (add(&s->n, 1) != 1) return;
    gate_pass(&s->in_call);
    EXPECT_EQ(ctx_group_go(s->group, NULL, NULL), CTX_INVALID); /* this is told by its result alone */
    if (s->waits) EXPECT_EQ(ctx_group_go(s->group, counts, &s->ran), 0);
}

static int fails_after_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return -5;
}

static void *is_refused(void *arg) {
    short_t *s = (short_t *)arg;
    store(&s->tid, thread_id());
    s->rc = ctx_group_go(s->group, NULL, NULL);
    return NULL;
}

static bool asleep_for_on_error(ctx_group_t *group) {
    ctx__lock(&group->mu);
    bool asleep = group->at_told.first != NULL;
    ctx__unlock(&group->mu);
    return asleep;
}

TEST(errors_that_find_no_memory_wait_for_on_error_and_make_room_for_it) {
    for (int waits = 0; waits < 2; waits++) {
        static short_t s;
        ctx_group_desc_t desc;
        memset(&s, 0, sizeof s);
        memset(&desc, 0, sizeof desc);
        gate_init(&s.in_task);
        gate_init(&s.in_call);
        ctx_pool_t *pool = pool_of(1, 8);
        desc.pool = pool;
        desc.limit = 1;
        desc.keep_going = true;
        desc.on_error = hears_without_memory;
        desc.user = &s;
        s.group = ctx_group_new(ctx_background(), &desc);
        s.waits = waits;
        EXPECT_EQ(ctx_group_go(s.group, fails_after_gate, &s.in_task), 0);
        gate_await(&s.in_task, 1);
        pthread_t refused = thread_start(is_refused, &s);
        gate_await(&s.in_call, 1);
        fault_all_after(0);
        gate_open(&s.in_task);
        UNTIL(asleep_for_on_error(s.group));
        EXPECT_EQ(load(&s.n), 1);
        gate_open(&s.in_call);
        thread_join(refused);
        fault_off();
        EXPECT_EQ(s.rc, CTX_INVALID);
        EXPECT_EQ(ctx_group_wait(s.group), CTX_INVALID);
        EXPECT_EQ(s.ran, waits);
        EXPECT_EQ(load(&s.n), 2);
        pool_end(pool);
        EXPECT_EQ(settled_blocks(), 0);
        gate_destroy(&s.in_task);
        gate_destroy(&s.in_call);
    }
}

static int waits_then_fails(ctx_t *ctx, void *arg) {
    gate_pass((gate_t *)arg);
    ctx_wait(ctx, CTX_FOREVER);
    return -5;
}

TEST(canceling_failing_and_waiting_need_no_memory_and_no_thread) {
    for (int v = 0; v < VENUES; v++) {
        int n = venues[v] ? venues[v] : 4;
        gate_t gate;
        gate_init(&gate);
        ctx_pool_t *pool = pool_of(venues[v], 8);
        ctx_group_t *group = group_on(ctx_background(), pool, 0);
        for (int i = 0; i < n; i++) {
            EXPECT_EQ(ctx_group_go(group, waits_then_fails, &gate), 0);
            gate_await(&gate, i + 1);
        }
        fault_all_after(0);
        fault_threads_all_after(0);
        gate_open(&gate);
        EXPECT(ctx_cancel(ctx_group_ctx(group)));
        EXPECT_EQ(ctx_group_wait(group), -5);
        EXPECT_EQ(fault_calls(), 0);
        fault_off();
        EXPECT(!fault_threads_off());
        pool_end(pool);
        EXPECT_EQ(settled_blocks(), 0);
        gate_destroy(&gate);
    }
}

typedef struct {
    ctx_group_t *group;
    int ran;           /* [atomic] */
    int tid, accepted; /* [atomic] */
} adder_t;

static void *adds(void *arg) {
    adder_t *adder = (adder_t *)arg;
    store(&adder->tid, thread_id());
    adder->accepted = accepts(adder->group, counts, &adder->ran, true);
    return NULL;
}

TEST(go_that_waits_at_the_limit_returns_also_without_memory_and_threads) {
    for (int v = 0; v < VENUES; v++) {
        gate_t gate;
        adder_t adder;
        gate_init(&gate);
        memset(&adder, 0, sizeof adder);
        ctx_pool_t *pool = pool_of(venues[v], 8);
        adder.group = group_on(ctx_background(), pool, 1);
        EXPECT_EQ(ctx_group_go(adder.group, passes_gate, &gate), 0);
        gate_await(&gate, 1);
        pthread_t thread = thread_start(adds, &adder);
        until_asleep(&adder.tid);
        fault_all_after(0);
        fault_threads_all_after(0);
        gate_open(&gate);
        thread_join(thread);
        EXPECT_EQ(ctx_group_wait(adder.group), adder.accepted ? 0 : CTX_NO_MEMORY);
        fault_off();
        fault_threads_off();
        EXPECT_EQ(adder.ran, adder.accepted);
        pool_end(pool);
        EXPECT_EQ(settled_blocks(), 0);
        gate_destroy(&gate);
    }
}

/* A pool that never had a thread accepts nothing, whether or not somebody would run it. */
TEST(a_group_on_a_pool_without_a_thread_accepts_nothing) {
    int ran = 0;
    ctx_pool_t *pool = pool_of(2, 8);
    ctx_group_t *group = group_on(ctx_background(), pool, 1);
    fault_threads_all_after(0);
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(ctx_group_go(group, counts, &ran), CTX_NO_MEMORY);
        EXPECT_EQ(ctx_group_try_go(group, counts, &ran), CTX_NO_MEMORY);
    }
    EXPECT(fault_threads_off());
    EXPECT_EQ(ctx_err(ctx_group_ctx(group)), 0); /* it goes on */
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(ctx_group_go(group, counts, &ran), 0);
    EXPECT_EQ(ctx_group_wait(group), CTX_NO_MEMORY);
    EXPECT_EQ(ran, 1);
    pool_end(pool);
    EXPECT_EQ(settled_blocks(), 0);
}

/* A stage asks for threads beside the pool. Without them its group's tasks wait for a worker, and are not lost. */
typedef struct {
    ctx_chan_t *chan;
    int items; /* [atomic] */
} pipe_t;

static int takes_an_item(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)in;
    (void)out;
    add(&((pipe_t *)user)->items, 1);
    return 0;
}

static int ends_the_pipe(ctx_t *ctx, void *arg) {
    pipe_t *pipe = (pipe_t *)arg;
    ctx_stage_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.in = pipe->chan;
    desc.fn = takes_an_item;
    desc.user = pipe;
    return ctx_stage_run(ctx, &desc);
}

static int feeds_the_pipe(ctx_t *ctx, void *arg) {
    pipe_t *pipe = (pipe_t *)arg;
    for (int i = 0; i < 10; i++) {
        int rc = ctx_chan_send(pipe->chan, ctx, &i);
        if (rc) return rc;
    }
    return ctx_chan_close(pipe->chan);
}

TEST(tasks_that_get_no_thread_beside_the_pool_wait_for_a_worker) {
    pipe_t pipe;
    gate_t hold;
    memset(&pipe, 0, sizeof pipe);
    gate_init(&hold);
    pipe.chan = ctx_chan_new(sizeof(int), 1);
    ctx_pool_t *pool = pool_of(2, 8);
    ctx_runtime_stop(); /* no idle thread is left */
    for (int i = 0; i < 2; i++) {
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "holds", passes_gate, &hold), 0);
        gate_await(&hold, i + 1); /* both threads of the pool exist */
    }
    ctx_group_t *group = group_on(ctx_background(), pool, 0);
    fault_threads_all_after(0);
    EXPECT_EQ(ctx_group_go(group, ends_the_pipe, &pipe), 0);
    EXPECT_EQ(ctx_group_go(group, feeds_the_pipe, &pipe), 0);
    gate_open(&hold);
    UNTIL(load(&pipe.items) == 10);
    EXPECT_EQ(ctx_group_wait(group), 0);
    fault_threads_off();
    pool_end(pool);
    ctx_chan_free(pipe.chan);
    EXPECT_EQ(settled_blocks(), 0);
    gate_destroy(&hold);
}

TEST(a_race_without_memory_runs_nothing) {
    for (long n = 0;; n++) {
        int ran = 0;
        ctx_t *a = ctx_with_timeout(ctx_background(), CTX_S(100));
        ctx_t *b = ctx_with_timeout(ctx_background(), CTX_S(50));
        ctx_runtime_stop();
        fault_after(n);
        int rc = ctx_run_either(a, b, counts, &ran);
        bool injected = fault_off();
        EXPECT_EQ(rc, injected ? CTX_NO_MEMORY : 0);
        EXPECT_EQ(ran, injected ? 0 : 1);
        EXPECT_EQ(ctx_err(a), 0);
        EXPECT_EQ(ctx_err(b), 0);
        ctx_end(a);
        ctx_end(b);
        EXPECT_EQ(settled_blocks(), 0);
        if (!injected) break;
        CHECK(n < 100);
    }
}

/* -- failures in the crowd -------------------------------------------------------------------------------------- */

enum { ADDERS = 8 };

typedef struct {
    ctx_pool_t *pool;
    ctx_group_t *group;
    int each;
    int over;          /* [atomic] */
    int accepted, ran; /* [atomic] tasks */
    int went, work;    /* [atomic] work of ctx_go() accepted and run */
    int subgroups;     /* [atomic] that could be had */
    int refused;       /* [atomic] tasks of the group, for want of memory or a thread */
} famine_t;

/* A task with a group of its own below, if there is memory for one. */
static int runs_in_famine(ctx_t *ctx, void *arg) {
    famine_t *famine = (famine_t *)arg;
    if (add(&famine->ran, 1) % 8) return 0;
    ctx_group_t *group = group_on(ctx, famine->pool, 2);
    if (!group) return 0;
    int accepted = 0, ran = 0;
    add(&famine->subgroups, 1);
    for (int i = 0; i < 4; i++) accepted += accepts(group, counts, &ran, i % 2 != 0);
    int rc = ctx_group_wait(group);
    EXPECT(rc == 0 || (rc == CTX_NO_MEMORY && accepted < 4));
    EXPECT_EQ(ran, accepted);
    return 0;
}

static void *adds_in_famine(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    famine_t *famine = (famine_t *)side->shared;
    if (side->id == ADDERS) {
        uint64_t seed = 77;
        while (load(&famine->over) < ADDERS) {
            fault_after(race_below(&seed, 20));
            if (race_below(&seed, 8) == 0) fault_all_after(0);
            fault_threads_after(race_below(&seed, 3));
            for (int i = 0; i < 20; i++) sched_yield();
        }
        fault_off();
        fault_threads_off();
        return NULL;
    }
    for (int i = 0; i < famine->each; i++) {
        bool wait = i % 3 != 0;
        int rc = wait ? ctx_group_go(famine->group, runs_in_famine, famine)
                      : ctx_group_try_go(famine->group, runs_in_famine, famine);
        EXPECT(rc == 0 || rc == CTX_NO_MEMORY || (!wait && rc == CTX_QUEUE_FULL));
        add(&famine->accepted, rc == 0);
        add(&famine->refused, rc == CTX_NO_MEMORY);
        if (i % 4) continue;
        rc = ctx_go(ctx_background(), "work", counts, &famine->work);
        EXPECT(rc == 0 || rc == CTX_NO_MEMORY);
        add(&famine->went, rc == 0);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    }
    add(&famine->over, 1);
    return NULL;
}

TEST(random_failures_under_contention_lose_no_task_and_no_memory) {
    for (int v = 0; v < VENUES; v++) {
        famine_t famine;
        memset(&famine, 0, sizeof famine);
        famine.each = test_scale(3000);
        famine.pool = pool_of(venues[v], 4);
        famine.group = group_on(ctx_background(), famine.pool, 12);
        race_run(ADDERS + 1, adds_in_famine, &famine);
        EXPECT_EQ(ctx_group_wait(famine.group), famine.refused ? CTX_NO_MEMORY : 0);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        EXPECT_EQ(famine.ran, famine.accepted);
        EXPECT_EQ(famine.work, famine.went);
        EXPECT(famine.ran > 0 && famine.went > 0);
        pool_end(famine.pool);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

TEST_MAIN
