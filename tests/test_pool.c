/* Section 9: bounded work: what is accepted runs once or is dropped once, whatever happens to the pool. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

/* -- what the tests share --------------------------------------------------------------------------------------- */

static ctx_pool_desc_t describe(int workers, size_t queue) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    return desc;
}

static ctx_pool_t *pool_below(ctx_t *lifetime, const ctx_pool_desc_t *desc) {
    ctx_pool_t *pool = ctx_pool_new(lifetime, desc);
    if (!pool) {
        fprintf(stderr, "no pool for the test: %s\n", strerror(errno));
        abort();
    }
    return pool;
}

static ctx_pool_t *pool_of(int workers, size_t queue) {
    ctx_pool_desc_t desc = describe(workers, queue);
    return pool_below(ctx_background(), &desc);
}

/* What went to on_drop. */
enum { DROPS = 64 };
typedef struct {
    pthread_mutex_t mu;
    int n; /* [mu] */
    struct {
        const char *op;
        void *arg;
        int reason;
    } at[DROPS];
} drops_t;

static void drops_init(drops_t *drops) {
    memset(drops, 0, sizeof *drops);
    pthread_mutex_init(&drops->mu, NULL);
}

static void note_drop(const char *op, void *arg, int reason, void *user) {
    drops_t *drops = (drops_t *)user;
    pthread_mutex_lock(&drops->mu);
    if (drops->n < DROPS) {
        drops->at[drops->n].op = op;
        drops->at[drops->n].arg = arg;
        drops->at[drops->n].reason = reason;
    }
    drops->n++;
    pthread_mutex_unlock(&drops->mu);
}

static int drops_count(drops_t *drops) {
    pthread_mutex_lock(&drops->mu);
    int n = drops->n;
    pthread_mutex_unlock(&drops->mu);
    return n;
}

static uint64_t total(const ctx_drain_report_t *report) {
    return report->completed + report->failed + report->canceled + report->dropped + report->stuck;
}

static bool says_running(const ctx_drain_report_t *report, const char *op) {
    for (uint64_t i = 0; i < report->stuck && i < CTX_DRAIN_OPS; i++)
        if (report->running[i] && strcmp(report->running[i], op) == 0) return true;
    return false;
}

static int passes_gate(ctx_t *ctx, void *arg) {
    (void)ctx;
    gate_pass((gate_t *)arg);
    return 0;
}

static int waits_for_cancel(ctx_t *ctx, void *arg) {
    if (arg) add((int *)arg, 1);
    return ctx_wait(ctx, CTX_FOREVER);
}

static int counts(ctx_t *ctx, void *arg) {
    (void)ctx;
    add((int *)arg, 1);
    return 0;
}

static int fails(ctx_t *ctx, void *arg) {
    (void)ctx;
    (void)arg;
    return -5;
}

/* Make all of the pool's workers stop at a gate, with nothing queued. */
static void occupy(ctx_pool_t *pool, gate_t *gate, int workers) {
    for (int i = 0; i < workers; i++) {
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "occupied", passes_gate, gate), 0);
        gate_await(gate, i + 1);
    }
}

/* Workers that can take a task at once. */
static int free_workers(ctx_pool_t *pool) {
    ctx__lock(&pool->ring.in);
    int n = pool->desc.workers - (int)pool->workers + (int)(pool->idle_count + pool->looking);
    ctx__unlock(&pool->ring.in);
    return n;
}

/* The threads there are with no pool at work. Those of stuck tasks end by themselves, after their pool is gone. */
static int quiet_threads(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), 1); /* the timer thread stays once it has started */
    ctx_wait(ctx, CTX_FOREVER);
    ctx_end(ctx);
    return threads_settled();
}

static bool all_free(ctx_sem_t *sem, int64_t n) {
    if (!ctx_sem_try_acquire(sem, n)) return false;
    ctx_sem_release(sem, n);
    return true;
}

/* A submit in a thread of its own, for those that block. */
typedef struct {
    ctx_pool_t *pool;
    ctx_t *parent;
    bool wait;
    ctx_task_fn fn;
    void *arg;
    int tid, done, rc;
} submitter_t;

static void *submits(void *arg) {
    submitter_t *s = (submitter_t *)arg;
    store(&s->tid, thread_id());
    s->rc = s->wait ? ctx_pool_submit_wait(s->pool, s->parent, "blocked", s->fn, s->arg)
                    : ctx_pool_submit(s->pool, s->parent, "blocked", s->fn, s->arg);
    store(&s->done, 1);
    return NULL;
}

static pthread_t submit_apart(submitter_t *s, ctx_pool_t *pool, ctx_t *parent, bool wait, ctx_task_fn fn, void *arg) {
    memset(s, 0, sizeof *s);
    s->pool = pool;
    s->parent = parent;
    s->wait = wait;
    s->fn = fn;
    s->arg = arg;
    return thread_start(submits, s);
}

/* A drain in a thread of its own. */
typedef struct {
    ctx_pool_t *pool;
    ctx_dur_t budget;
    ctx_drain_report_t report;
    int tid, done, rc;
} drainer_t;

static void *drains(void *arg) {
    drainer_t *d = (drainer_t *)arg;
    store(&d->tid, thread_id());
    d->rc = ctx_pool_drain(d->pool, d->budget, &d->report);
    store(&d->done, 1);
    return NULL;
}

static pthread_t drain_apart(drainer_t *d, ctx_pool_t *pool, ctx_dur_t budget) {
    memset(d, 0, sizeof *d);
    d->pool = pool;
    d->budget = budget;
    return thread_start(drains, d);
}

/* -- running ---------------------------------------------------------------------------------------------------- */

TEST(no_thread_starts_before_the_first_submit) {
    int before = threads_settled();
    if (before < 0) SKIP("nothing lists the threads here");
    ctx_pool_t *pool = pool_of(8, 16);
    EXPECT_EQ(thread_count(), before);
    int ran = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "first", counts, &ran), 0);
    EXPECT(thread_count() < before + 8); /* as work comes, not all at once */
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 1);
    ctx_pool_free(pool);
    UNTIL(thread_count() <= before + 1);
}

TEST(as_many_tasks_run_at_once_as_there_are_workers) {
    enum { WORKERS = 6 };
    ctx_pool_t *pool = pool_of(WORKERS, 16);
    gate_t gate;
    gate_init(&gate);
    for (int i = 0; i < WORKERS + 2; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "gate", passes_gate, &gate), 0);
    gate_await(&gate, WORKERS); /* all six are inside: a pool with fewer hangs here */
    EXPECT_EQ(gate_came(&gate), WORKERS);
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(gate_came(&gate), WORKERS + 2);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(a_pool_with_defaults_runs_work) {
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), NULL);
    CHECK(pool != NULL);
    int ran = 0;
    for (int i = 0; i < 1024; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 1024);
    ctx_pool_free(pool);
}

typedef struct {
    int next;
    int out_of_order;
} order_t;

typedef struct {
    order_t *order;
    int place;
} placed_t;

static int checks_its_place(ctx_t *ctx, void *arg) {
    placed_t *placed = (placed_t *)arg;
    (void)ctx;
    if (placed->order->next++ != placed->place) placed->order->out_of_order++;
    return 0;
}

TEST(one_worker_runs_tasks_in_the_order_of_submission) {
    enum { N = 2000 };
    static placed_t placed[N];
    order_t order = {0, 0};
    ctx_pool_t *pool = pool_of(1, 64);
    void *args[10];
    for (int i = 0; i < N; i++) {
        placed[i].order = &order;
        placed[i].place = i;
    }
    for (int i = 0; i < N;) {
        if (i % 20 == 0) { /* batches keep it too */
            size_t taken = 0;
            for (int k = 0; k < 10; k++) args[k] = &placed[i + k];
            ctx_pool_submit_batch(pool, ctx_background(), "place", checks_its_place, args, 10, &taken);
            i += (int)taken;
            if (taken == 10) continue;
        }
        EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "place", checks_its_place, &placed[i++]), 0);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(order.next, N);
    EXPECT_EQ(order.out_of_order, 0);
    ctx_pool_free(pool);
}

typedef struct {
    ctx_pool_t *pool;
    int *ran;
    int depth;
} branch_t;

static branch_t branches[1 << 12];
static int branches_made;

static int branches_out(ctx_t *ctx, void *arg) {
    branch_t *branch = (branch_t *)arg;
    add(branch->ran, 1);
    if (branch->depth == 0) return 0;
    for (int i = 0; i < 2; i++) {
        branch_t *next = &branches[add(&branches_made, 1)];
        *next = *branch;
        next->depth--;
        EXPECT_EQ(ctx_pool_submit(branch->pool, ctx, "branch", branches_out, next), 0);
    }
    return 0;
}

TEST(tasks_may_submit_tasks) {
    int ran = 0;
    ctx_pool_t *pool = pool_of(4, 4096);
    branches_made = 0;
    branches[0].pool = pool;
    branches[0].ran = &ran;
    branches[0].depth = 10;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "branch", branches_out, &branches[0]), 0);
    UNTIL(load(&ran) == 2047);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

/* Where a worker can note its thread_id(), and a gate to stand at. */
typedef struct {
    gate_t *gate;
    int tid;
} post_t;

static int stands_at_post(ctx_t *ctx, void *arg) {
    post_t *post = (post_t *)arg;
    (void)ctx;
    store(&post->tid, thread_id());
    gate_pass(post->gate);
    return 0;
}

static void run_many_quick_tasks(ctx_pool_t *pool) {
    enum { N = 3000 };
    void *args[N];
    int ran = 0;
    for (int i = 0; i < N; i++) args[i] = &ran;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "quick", counts, args, N, NULL), 0);
    UNTIL(load(&ran) == N);
}

/* One worker stands at a gate, the other has run quick tasks and now has a slow one. The first becomes idle: it takes
   what comes next, though the other was quick a moment ago. */
TEST(an_idle_worker_takes_the_next_task_while_the_other_is_slow) {
    gate_t first, slow, next;
    gate_init(&first), gate_init(&slow), gate_init(&next);
    ctx_pool_t *pool = pool_of(2, 4096);
    post_t post = {&first, 0};
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "first", stands_at_post, &post), 0);
    gate_await(&first, 1);
    run_many_quick_tasks(pool);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "slow", passes_gate, &slow), 0);
    gate_await(&slow, 1);
    gate_open(&first);
    until_asleep(&post.tid);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "next", passes_gate, &next), 0);
    gate_await(&next, 1); /* while the slow one is still at its gate */
    gate_open(&next), gate_open(&slow);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    gate_destroy(&first), gate_destroy(&slow), gate_destroy(&next);
}

/* Both workers have run quick tasks. One is slow now, the other runs one task more and goes to sleep. */
TEST(work_and_an_idle_worker_do_not_stay_apart) {
    for (int round = 0; round < test_scale(100); round++) {
        gate_t both, slow, last, next;
        gate_init(&both), gate_init(&slow), gate_init(&last), gate_init(&next);
        ctx_pool_t *pool = pool_of(2, 4096);
        occupy(pool, &both, 2);
        gate_open(&both);
        run_many_quick_tasks(pool);
        post_t post = {&last, 0};
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "last", stands_at_post, &post), 0);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "slow", passes_gate, &slow), 0);
        gate_await(&last, 1);
        gate_await(&slow, 1);
        gate_open(&last);
        until_asleep(&post.tid);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "next", passes_gate, &next), 0);
        gate_await(&next, 1);
        gate_open(&next), gate_open(&slow);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        ctx_pool_free(pool);
        gate_destroy(&both), gate_destroy(&slow), gate_destroy(&last), gate_destroy(&next);
    }
}

TEST(idle_workers_sleep) {
    for (int coalesced = 0; coalesced < 2; coalesced++) {
        ctx_pool_desc_t desc = describe(4, 64);
        desc.coalesce = coalesced ? CTX_MS(1) : 0;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        int ran = 0;
        for (int i = 0; i < 32; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        UNTIL(load(&ran) == 32);
        test_sleep_ms(50);
        clock_t from = clock();
        test_sleep_ms(400);
        double used = (double)(clock() - from) / CLOCKS_PER_SEC;
        EXPECT(used < 0.2);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        ctx_pool_free(pool);
    }
}

/* -- the task's context ----------------------------------------------------------------------------------------- */

typedef struct {
    int user;
    char path[40];
} request_t;

static const ctx_key_t request_key = CTX_KEY(request_t);

typedef struct {
    gate_t *gate;
    int err_before, err_after, user;
    int done; /* [atomic] */
    ctx_time_t deadline;
    ctx_dur_t remaining;
    ctx_t *kept;
} seen_t;

static int looks_around(ctx_t *ctx, void *arg) {
    seen_t *seen = (seen_t *)arg;
    const request_t *request = (const request_t *)ctx_value(ctx, &request_key);
    seen->err_before = ctx_err(ctx);
    seen->deadline = ctx_deadline(ctx);
    seen->remaining = ctx_remaining(ctx);
    seen->user = request ? request->user : -1;
    if (seen->gate) gate_pass(seen->gate);
    seen->err_after = ctx_err(ctx);
    store(&seen->done, 1);
    return 0;
}

static ctx_t *with_request(ctx_t *parent, int user) {
    request_t request;
    memset(&request, 0, sizeof request);
    request.user = user;
    return ctx_with_value(parent, &request_key, &request);
}

TEST(values_travel_and_the_parents_cancel_does_not) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(1, 8);
    ctx_t *root = ctx_with_timeout(ctx_background(), CTX_S(3600));
    ctx_t *parent = with_request(root, 42);
    seen_t running, queued, late;
    memset(&running, 0, sizeof running);
    memset(&queued, 0, sizeof queued);
    memset(&late, 0, sizeof late);
    running.gate = &gate;
    EXPECT_EQ(ctx_pool_submit(pool, parent, "running", looks_around, &running), 0);
    gate_await(&gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, parent, "queued", looks_around, &queued), 0);
    ctx_cancel(root);
    EXPECT_EQ(ctx_pool_submit(pool, parent, "late", looks_around, &late), 0); /* for a request that is over */
    ctx_end(parent);
    ctx_end(root);
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    const seen_t *all[] = {&running, &queued, &late};
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(all[i]->err_before, 0);
        EXPECT_EQ(all[i]->err_after, 0);
        EXPECT_EQ(all[i]->user, 42);
        EXPECT_EQ(all[i]->deadline, CTX_NO_DEADLINE);
    }
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(each_task_sees_the_values_of_its_own_parent) {
    enum { N = 500 };
    static seen_t seen[N];
    ctx_pool_t *pool = pool_of(1, 1024);
    for (int i = 0; i < N; i++) {
        memset(&seen[i], 0, sizeof seen[i]);
        ctx_t *parent = i % 3 == 0 ? ctx_with_cancel(ctx_background()) : with_request(ctx_background(), i);
        EXPECT_EQ(ctx_pool_submit(pool, parent, "look", looks_around, &seen[i]), 0);
        ctx_end(parent);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    for (int i = 0; i < N; i++) EXPECT_EQ(seen[i].user, i % 3 == 0 ? -1 : i);
    ctx_pool_free(pool);
}

TEST(a_task_timeout_cancels_the_task) {
    ctx_pool_desc_t desc = describe(2, 8);
    desc.task_timeout = CTX_MS(5);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    for (int i = 0; i < 4; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, NULL), 0);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(report.canceled, 4);
    EXPECT_EQ(total(&report), 4);
    ctx_pool_free(pool);
}

TEST(a_task_timeout_counts_from_the_start_of_the_task) {
    ctx_clock_fake(CTX_S(1));
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 8);
    desc.task_timeout = CTX_S(30);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    seen_t first, queued;
    memset(&first, 0, sizeof first);
    memset(&queued, 0, sizeof queued);
    first.gate = &gate;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "first", looks_around, &first), 0);
    gate_await(&gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", looks_around, &queued), 0);
    ctx_clock_advance(CTX_S(3600)); /* an hour in the queue */
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(first.err_before, 0);
    EXPECT_EQ(first.remaining, CTX_S(30));
    EXPECT_EQ(first.err_after, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(queued.err_before, 0);
    EXPECT_EQ(queued.remaining, CTX_S(30));
    EXPECT_EQ(queued.deadline, CTX_S(3631));
    ctx_pool_free(pool);
    gate_destroy(&gate);
    ctx_clock_real();
}

static int keeps_its_context(ctx_t *ctx, void *arg) {
    seen_t *seen = (seen_t *)arg;
    seen->kept = ctx_retain(ctx);
    return 0;
}

static int notes_its_context(ctx_t *ctx, void *arg) {
    const ctx_t *kept = *(ctx_t **)arg;
    EXPECT(kept && kept != ctx);
    EXPECT_EQ(ctx_err(ctx), 0);
    return 0;
}

TEST(a_context_that_a_task_retained_stays_its_own) {
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(1, 1024);
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    seen_t seen;
    memset(&seen, 0, sizeof seen);
    ctx_t *parent = with_request(ctx_background(), 7);
    ctx_t *other = with_request(ctx_background(), 8);
    EXPECT_EQ(ctx_pool_submit(pool, parent, "keeps", keeps_its_context, &seen), 0);
    for (int i = 0; i < 500; i++) EXPECT_EQ(ctx_pool_submit(pool, other, "other", notes_its_context, &seen.kept), 0);
    ctx_end(parent);
    ctx_end(other);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    const request_t *request = (const request_t *)ctx_value(seen.kept, &request_key);
    EXPECT(request && request->user == 7);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    EXPECT(ctx_err(seen.kept) != 0);
    request = (const request_t *)ctx_value(seen.kept, &request_key);
    EXPECT(request && request->user == 7);
    ctx_release(seen.kept);
}

typedef struct {
    ctx_on_done_t reg;
    ctx_t *child;
    int fired;
} leftover_t;

static void fires(void *arg) { add((int *)arg, 1); }

static int leaves_things_behind(ctx_t *ctx, void *arg) {
    leftover_t *left = (leftover_t *)arg;
    ctx_on_done(&left->reg, ctx, fires, &left->fired);
    left->child = ctx_with_cancel(ctx);
    return 0;
}

TEST(callbacks_and_children_that_a_task_left_behind_are_not_lost) {
    enum { N = 50 };
    static leftover_t left[N];
    memset(left, 0, sizeof left);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 1024);
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    ctx_t *parent = with_request(ctx_background(), 9);
    for (int i = 0; i < N; i++) EXPECT_EQ(ctx_pool_submit(pool, parent, "leaves", leaves_things_behind, &left[i]), 0);
    ctx_end(parent);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    for (int i = 0; i < N; i++) {
        EXPECT(ctx_err(left[i].child) != 0);
        const request_t *request = (const request_t *)ctx_value(left[i].child, &request_key);
        EXPECT(request && request->user == 9);
        ctx_end(left[i].child);
        bool taken_back = ctx_on_done_stop(&left[i].reg);
        EXPECT_EQ(load(&left[i].fired), taken_back ? 0 : 1);
    }
}

TEST(steady_state_allocates_nothing) {
    for (int timed = 0; timed < 2; timed++) {
        ctx_pool_desc_t desc = describe(2, 64);
        desc.task_timeout = timed ? CTX_S(3600) : 0;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        ctx_t *parent = with_request(ctx_background(), 1);
        gate_t gate;
        gate_init(&gate);
        occupy(pool, &gate, 2); /* both workers have come up, and have a context */
        gate_open(&gate);
        int ran = 0, n = test_scale(50000);
        for (int i = 0; i < 1000; i++) EXPECT_EQ(ctx_pool_submit_wait(pool, parent, "warm", counts, &ran), 0);
        UNTIL(load(&ran) == 1000);
        fault_after(INT32_MAX);
        for (int i = 0; i < n; i++) EXPECT_EQ(ctx_pool_submit_wait(pool, parent, "steady", counts, &ran), 0);
        UNTIL(load(&ran) == 1000 + n);
        EXPECT_EQ(fault_calls(), 0);
        fault_off();
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        ctx_pool_free(pool);
        ctx_end(parent);
        gate_destroy(&gate);
    }
}

/* -- a full queue ----------------------------------------------------------------------------------------------- */

TEST(reject_answers_queue_full_at_once) {
    const size_t sizes[] = {1, 2, 3, 5, 8};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        gate_t gate;
        gate_init(&gate);
        drops_t drops;
        drops_init(&drops);
        ctx_pool_desc_t desc = describe(1, sizes[s]);
        desc.on_drop = note_drop;
        desc.user = &drops;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        occupy(pool, &gate, 1);
        int ran = 0;
        for (size_t i = 0; i < sizes[s]; i++)
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fits", counts, &ran), 0);
        ctx_time_t from = ctx_now();
        for (int i = 0; i < 100; i++)
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "too many", counts, &ran), CTX_QUEUE_FULL);
        EXPECT(ctx_now() - from < CTX_S(20));
        EXPECT_EQ(load(&ran), 0);
        gate_open(&gate);
        ctx_drain_report_t report;
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
        EXPECT_EQ(ran, sizes[s]);
        EXPECT_EQ(report.completed, sizes[s] + 1);
        EXPECT_EQ(total(&report), sizes[s] + 1); /* what was rejected was never accepted */
        EXPECT_EQ(drops_count(&drops), 0);
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(block_waits_for_room) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_BLOCK;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    int ran = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fits", counts, &ran), 0);
    submitter_t s[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        threads[i] = submit_apart(&s[i], pool, ctx_background(), false, counts, &ran);
        until_asleep(&s[i].tid);
    }
    for (int i = 0; i < 4; i++) EXPECT_EQ(load(&s[i].done), 0);
    gate_open(&gate);
    for (int i = 0; i < 4; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(s[i].rc, 0);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 5);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

/* Both ways to block, and each of the things that end it. */
TEST(a_blocked_submit_ends_with_its_parent) {
    for (int wait = 0; wait < 2; wait++) {
        gate_t gate;
        gate_init(&gate);
        ctx_pool_desc_t desc = describe(1, 1);
        desc.when_full = wait ? CTX_REJECT : CTX_BLOCK;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        occupy(pool, &gate, 1);
        int ran = 0, never = 0;
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fits", counts, &ran), 0);
        ctx_t *parent = ctx_with_cancel(ctx_background());
        submitter_t s;
        pthread_t thread = submit_apart(&s, pool, parent, wait != 0, counts, &never);
        until_asleep(&s.tid);
        ctx_cancel(parent);
        thread_join(thread);
        EXPECT_EQ(s.rc, CTX_CANCELED);
        ctx_end(parent);
        ctx_time_t from = ctx_now();
        parent = ctx_with_timeout(ctx_background(), CTX_MS(5));
        thread = submit_apart(&s, pool, parent, wait != 0, counts, &never);
        thread_join(thread);
        EXPECT_EQ(s.rc, CTX_DEADLINE_EXCEEDED);
        EXPECT(ctx_now() - from >= CTX_MS(5));
        ctx_end(parent);
        gate_open(&gate);
        ctx_drain_report_t report;
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
        EXPECT_EQ(ran, 1);
        EXPECT_EQ(never, 0);
        EXPECT_EQ(report.completed, 2);
        EXPECT_EQ(total(&report), 2);
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(a_blocked_submit_ends_with_the_pool) {
    for (int wait = 0; wait < 2; wait++) {
        for (int by_lifetime = 0; by_lifetime < 2; by_lifetime++) {
            gate_t gate;
            gate_init(&gate);
            ctx_t *lifetime = ctx_with_cancel(ctx_background());
            ctx_pool_desc_t desc = describe(1, 1);
            desc.when_full = wait ? CTX_REJECT : CTX_BLOCK;
            desc.grace = CTX_MS(1);
            ctx_pool_t *pool = pool_below(lifetime, &desc);
            occupy(pool, &gate, 1);
            int ran = 0, never = 0;
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fits", counts, &ran), 0);
            submitter_t s;
            pthread_t thread = submit_apart(&s, pool, ctx_background(), wait != 0, counts, &never);
            until_asleep(&s.tid);
            EXPECT_EQ(load(&s.done), 0);
            if (by_lifetime)
                ctx_cancel(lifetime);
            else
                ctx_pool_drain(pool, 0, NULL);
            thread_join(thread);
            EXPECT_EQ(s.rc, by_lifetime ? CTX_CANCELED : CTX_CLOSED);
            gate_open(&gate);
            ctx_pool_drain(pool, CTX_FOREVER, NULL);
            EXPECT_EQ(never, 0);
            ctx_pool_free(pool);
            ctx_end(lifetime);
            gate_destroy(&gate);
        }
    }
}

/* How a task stands among those that have begun. */
typedef struct {
    int *begun;
    int place;
    gate_t *gate;
} begin_t;

static int notes_its_place(ctx_t *ctx, void *arg) {
    begin_t *begin = (begin_t *)arg;
    (void)ctx;
    begin->place = add(begin->begun, 1);
    if (begin->gate) gate_pass(begin->gate);
    return 0;
}

/* The worker makes room while somebody waits for it: that is taken already when another comes. */
TEST(who_waits_for_room_is_served_before_submits_that_come_later) {
    gate_t first, second;
    gate_init(&first), gate_init(&second);
    ctx_pool_t *pool = pool_of(1, 4);
    int begun = 0;
    begin_t queued[4], waited[3], late = {&begun, 0, NULL};
    occupy(pool, &first, 1);
    for (int i = 0; i < 4; i++) {
        queued[i].begun = &begun;
        queued[i].place = 0;
        queued[i].gate = i == 0 ? &second : NULL;
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", notes_its_place, &queued[i]), 0);
    }
    submitter_t s[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        waited[i].begun = &begun;
        waited[i].place = 0;
        waited[i].gate = NULL;
        threads[i] = submit_apart(&s[i], pool, ctx_background(), true, notes_its_place, &waited[i]);
        until_asleep(&s[i].tid);
    }
    gate_open(&first);
    gate_await(&second, 1); /* the worker has taken one */
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", notes_its_place, &late), CTX_QUEUE_FULL);
    thread_join(threads[0]); /* that room was the first waiter's */
    EXPECT_EQ(s[0].rc, 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", notes_its_place, &late), CTX_QUEUE_FULL);
    EXPECT_EQ(load(&s[1].done) + load(&s[2].done), 0);
    gate_open(&second);
    for (int i = 1; i < 3; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(s[i].rc, 0);
    }
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "late", notes_its_place, &late), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    for (int i = 0; i < 4; i++) EXPECT_EQ(queued[i].place, i + 1);
    for (int i = 0; i < 3; i++) EXPECT_EQ(waited[i].place, i + 5);
    EXPECT_EQ(late.place, 8);
    ctx_pool_free(pool);
    gate_destroy(&first), gate_destroy(&second);
}

/* The first waiter gives up: the second has its room. */
TEST(a_waiter_that_leaves_holds_up_nobody) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(1, 1);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    int ran = 0, never = 0;
    occupy(pool, &gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    submitter_t leaves, stays;
    pthread_t first = submit_apart(&leaves, pool, parent, true, counts, &never);
    until_asleep(&leaves.tid);
    pthread_t second = submit_apart(&stays, pool, ctx_background(), true, counts, &ran);
    until_asleep(&stays.tid);
    ctx_cancel(parent);
    thread_join(first);
    EXPECT_EQ(leaves.rc, CTX_CANCELED);
    EXPECT_EQ(load(&stays.done), 0);
    gate_open(&gate);
    thread_join(second);
    EXPECT_EQ(stays.rc, 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 2);
    EXPECT_EQ(never, 0);
    ctx_pool_free(pool);
    ctx_end(parent);
    gate_destroy(&gate);
}

/* One call, so that no worker can come in between. */
TEST(a_task_that_a_free_worker_can_take_needs_no_room) {
    enum { WORKERS = 3, QUEUE = 2 };
    for (int warm = 0; warm < 2; warm++) {
        gate_t gate, before;
        gate_init(&gate), gate_init(&before);
        ctx_pool_t *pool = pool_of(WORKERS, QUEUE);
        post_t posts[WORKERS];
        for (int i = 0; i < WORKERS && warm; i++) {
            posts[i].gate = &before;
            posts[i].tid = 0;
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "warm", stands_at_post, &posts[i]), 0);
            gate_await(&before, i + 1);
        }
        gate_open(&before);
        for (int i = 0; i < WORKERS && warm; i++) until_asleep(&posts[i].tid);
        void *args[WORKERS + QUEUE];
        for (int i = 0; i < WORKERS + QUEUE; i++) args[i] = &gate;
        size_t taken = 0;
        int rc = ctx_pool_submit_batch(pool, ctx_background(), "burst", passes_gate, args, WORKERS + QUEUE, &taken);
        EXPECT_EQ(rc, 0);
        EXPECT_EQ(taken, WORKERS + QUEUE);
        gate_await(&gate, WORKERS);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", passes_gate, &gate), CTX_QUEUE_FULL);
        gate_open(&gate);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        ctx_pool_free(pool);
        gate_destroy(&gate), gate_destroy(&before);
    }
}

static const ctx_when_full_t when_full[] = {CTX_REJECT, CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};

/* A burst that idle workers, or some not made yet, can take needs no queue, whatever is done when that is full. */
TEST(a_burst_for_free_workers_is_accepted_whatever_the_queue_is) {
    enum { WORKERS = 256, BURST = 100 };
    for (int w = 0; w < 4; w++) {
        for (int round = 0; round < 4; round++) {
            bool warm = round & 1;
            gate_t gate, before;
            drops_t drops;
            gate_init(&gate), gate_init(&before);
            drops_init(&drops);
            ctx_pool_desc_t desc = describe(WORKERS, round & 2 ? CTX_NO_QUEUE : 64);
            desc.when_full = when_full[w];
            desc.on_drop = note_drop;
            desc.user = &drops;
            ctx_pool_t *pool = pool_below(ctx_background(), &desc);
            if (warm) occupy(pool, &before, BURST);
            gate_open(&before);
            UNTIL(!warm || free_workers(pool) == WORKERS);
            for (int i = 0; i < BURST; i++)
                EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "burst", passes_gate, &gate), 0);
            gate_await(&gate, BURST); /* each has a worker */
            gate_open(&gate);
            EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
            EXPECT_EQ(drops_count(&drops), 0);
            ctx_pool_free(pool);
            gate_destroy(&gate), gate_destroy(&before);
        }
    }
}

TEST(without_a_queue_no_task_waits) {
    for (int w = 0; w < 4; w++) {
        for (int permits = 0; permits < 2; permits++) { /* a worker that waits for a permit has its task */
            gate_t gate;
            drops_t drops;
            submitter_t s;
            pthread_t thread;
            ctx_sem_t sem;
            int ran = 0;
            gate_init(&gate);
            drops_init(&drops);
            ctx_sem_init(&sem, 1);
            ctx_pool_desc_t desc = describe(2, CTX_NO_QUEUE);
            desc.when_full = when_full[w];
            desc.on_drop = note_drop;
            desc.user = &drops;
            if (permits) desc.permits = &sem;
            ctx_pool_t *pool = pool_below(ctx_background(), &desc);
            for (int i = 0; i < 2; i++)
                EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "holds", passes_gate, &gate), 0);
            gate_await(&gate, permits ? 1 : 2);
            if (w == 0 || w == 3) {
                EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), CTX_QUEUE_FULL);
            } else if (w == 2 && !permits) {
                EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), 0);
                EXPECT_EQ(ran, 1); /* here */
            }
            thread = submit_apart(&s, pool, ctx_background(), true, counts, &ran);
            until_asleep(&s.tid);
            EXPECT_EQ(load(&s.done), 0);
            gate_open(&gate);
            thread_join(thread);
            EXPECT_EQ(s.rc, 0);
            UNTIL(free_workers(pool) == 2);
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "again", counts, &ran), 0);
            EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
            EXPECT_EQ(ran, w == 2 && !permits ? 3 : 2);
            EXPECT_EQ(drops_count(&drops), 0);
            ctx_pool_free(pool);
            gate_destroy(&gate);
            ctx_sem_destroy(&sem);
        }
    }
}

TEST(submit_wait_takes_room_that_is_there) {
    ctx_pool_t *pool = pool_of(1, 4);
    int ran = 0;
    for (int i = 0; i < 200; i++) EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "count", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 200);
    ctx_pool_free(pool);
}

typedef struct {
    pthread_t thread;
    int user, err, runs, rc;
    ctx_time_t deadline;
} in_caller_t;

static int notes_its_thread(ctx_t *ctx, void *arg) {
    in_caller_t *c = (in_caller_t *)arg;
    const request_t *request = (const request_t *)ctx_value(ctx, &request_key);
    c->thread = pthread_self();
    c->user = request ? request->user : -1;
    c->err = ctx_err(ctx);
    c->deadline = ctx_deadline(ctx);
    c->runs++;
    return c->rc;
}

TEST(caller_runs_runs_in_the_submitting_thread) {
    gate_t gate;
    gate_init(&gate);
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_CALLER_RUNS;
    desc.task_timeout = CTX_S(3600);
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    int ran = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fits", counts, &ran), 0);
    ctx_t *parent = with_request(ctx_background(), 5);
    ctx_cancel(parent);
    in_caller_t c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < 3; i++) {
        c.rc = i == 1 ? -5 : 0; /* an error of the task is not one of the submit */
        EXPECT_EQ(ctx_pool_submit(pool, parent, "here", notes_its_thread, &c), 0);
        EXPECT_EQ(c.runs, i + 1); /* before submit returned */
        EXPECT(pthread_equal(c.thread, pthread_self()));
        EXPECT_EQ(c.user, 5);
        EXPECT_EQ(c.err, 0); /* detached all the same */
        EXPECT(c.deadline != CTX_NO_DEADLINE);
    }
    ctx_end(parent);
    EXPECT_EQ(load(&ran), 0);
    gate_open(&gate);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(report.completed, 4);
    EXPECT_EQ(report.failed, 1);
    EXPECT_EQ(total(&report), 5);
    EXPECT_EQ(drops_count(&drops), 0);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

/* A pool of one worker, which stands at `gate`; the queue of one is taken too. */
static ctx_pool_t *full_caller_runs_pool(gate_t *gate, ctx_sem_t *permits, int *ran) {
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_CALLER_RUNS;
    desc.permits = permits;
    desc.grace = CTX_MS(1);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, ran), 0);
    return pool;
}

TEST(a_task_that_its_submitter_runs_waits_for_a_permit) {
    ctx_sem_t permits;
    ctx_sem_init(&permits, 1);
    gate_t gate;
    gate_init(&gate);
    int ran = 0, here = 0;
    ctx_pool_t *pool = full_caller_runs_pool(&gate, &permits, &ran);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    submitter_t s;
    pthread_t thread = submit_apart(&s, pool, parent, false, counts, &here);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&here), 0); /* the worker has the only one */
    ctx_cancel(parent);
    thread_join(thread);
    EXPECT_EQ(s.rc, CTX_CANCELED);
    thread = submit_apart(&s, pool, ctx_background(), false, counts, &here);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&here), 0);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(s.rc, 0);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(here, 1);
    EXPECT_EQ(report.completed, 3); /* the one that was canceled had not been accepted */
    EXPECT_EQ(total(&report), 3);
    ctx_pool_free(pool);
    EXPECT(all_free(&permits, 1));
    ctx_end(parent);
    gate_destroy(&gate);
    ctx_sem_destroy(&permits);
}

typedef struct {
    ctx_pool_t *pool;
    int *ran;
    int submitted;
} more_t;

static int submits_three(ctx_t *ctx, void *arg) {
    more_t *more = (more_t *)arg;
    for (int i = 0; i < 3; i++)
        if (ctx_pool_submit(more->pool, ctx, "more", counts, more->ran) == 0) more->submitted++;
    return 0;
}

/* Its submitter is a task that holds the only permit. */
TEST(a_task_runs_another_under_its_own_permit) {
    ctx_sem_t permits;
    ctx_sem_init(&permits, 1);
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_CALLER_RUNS;
    desc.permits = &permits;
    int ran = 0;
    more_t more;
    memset(&more, 0, sizeof more);
    more.ran = &ran;
    more.pool = pool_below(ctx_background(), &desc);
    EXPECT_EQ(ctx_pool_submit(more.pool, ctx_background(), "submits", submits_three, &more), 0);
    UNTIL(load(&ran) == 3);
    EXPECT_EQ(ctx_pool_drain(more.pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(more.submitted, 3);
    ctx_pool_free(more.pool);
    EXPECT(all_free(&permits, 1));
    ctx_sem_destroy(&permits);
}

typedef struct {
    ctx_pool_t *pool;
    gate_t *gate;
    int rc;
    ctx_drain_report_t report;
} from_caller_t;

static int drains_for_its_submitter(ctx_t *ctx, void *arg) {
    from_caller_t *from = (from_caller_t *)arg;
    gate_open(from->gate);
    from->rc = ctx_pool_drain(from->pool, CTX_FOREVER, &from->report);
    return ctx_err(ctx);
}

TEST(a_task_that_its_submitter_runs_may_drain_the_pool) {
    gate_t gate;
    gate_init(&gate);
    int ran = 0;
    from_caller_t from;
    memset(&from, 0, sizeof from);
    from.pool = full_caller_runs_pool(&gate, NULL, &ran);
    from.gate = &gate;
    from.rc = -1;
    EXPECT_EQ(ctx_pool_submit(from.pool, ctx_background(), "drains", drains_for_its_submitter, &from), 0);
    EXPECT_EQ(from.rc, 0);
    EXPECT_EQ(ran, 1);
    EXPECT_EQ(from.report.completed, 2);
    EXPECT_EQ(from.report.stuck, 1);
    EXPECT(says_running(&from.report, "drains"));
    ctx_pool_free(from.pool);
    gate_destroy(&gate);
}

TEST(a_stuck_task_that_its_submitter_runs_is_named_and_waited_for) {
    gate_t gate, caller;
    gate_init(&gate), gate_init(&caller);
    int ran = 0;
    ctx_pool_t *pool = full_caller_runs_pool(&gate, NULL, &ran);
    submitter_t s;
    pthread_t thread = submit_apart(&s, pool, ctx_background(), false, passes_gate, &caller);
    gate_await(&caller, 1);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(report.stuck, 2);
    EXPECT_EQ(report.dropped, 1);
    EXPECT(says_running(&report, "occupied"));
    EXPECT(says_running(&report, "blocked")); /* as submit_apart() calls it */
    drainer_t d;
    gate_open(&gate);
    pthread_t drainer = drain_apart(&d, pool, CTX_FOREVER);
    until_asleep(&d.tid);
    EXPECT_EQ(load(&d.done), 0); /* for the submitter's task is at its gate */
    gate_open(&caller);
    thread_join(thread);
    thread_join(drainer);
    EXPECT_EQ(d.report.stuck, 0);
    EXPECT_EQ(total(&d.report), 3);
    ctx_pool_free(pool);
    gate_destroy(&gate), gate_destroy(&caller);
}

TEST(drop_oldest_makes_room_with_the_oldest) {
    gate_t gate;
    gate_init(&gate);
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(1, 3);
    desc.when_full = CTX_DROP_OLDEST;
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    int ran[8];
    memset(ran, 0, sizeof ran);
    for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "piece", counts, &ran[i]), 0);
    EXPECT_EQ(drops_count(&drops), 5); /* by now, not at the end */
    for (int i = 0; i < 5; i++) {
        EXPECT(drops.at[i].arg == &ran[i]);
        EXPECT_EQ(drops.at[i].reason, CTX_QUEUE_FULL);
        EXPECT(strcmp(drops.at[i].op, "piece") == 0);
    }
    gate_open(&gate);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    for (int i = 0; i < 8; i++) EXPECT_EQ(ran[i], i < 5 ? 0 : 1);
    EXPECT_EQ(report.completed, 4);
    EXPECT_EQ(report.dropped, 5);
    EXPECT_EQ(total(&report), 9);
    ctx_pool_free(pool);
    EXPECT_EQ(drops_count(&drops), 5);
    gate_destroy(&gate);
}

/* -- batches ---------------------------------------------------------------------------------------------------- */

TEST(a_batch_that_does_not_fit_is_taken_in_part) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(1, 4);
    occupy(pool, &gate, 1);
    int ran[10];
    void *args[10];
    memset(ran, 0, sizeof ran);
    for (int i = 0; i < 10; i++) args[i] = &ran[i];
    size_t taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args, 10, &taken), CTX_QUEUE_FULL);
    EXPECT_EQ(taken, 4);
    taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args + 4, 6, &taken), CTX_QUEUE_FULL);
    EXPECT_EQ(taken, 0);
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args + 4, 6, NULL), CTX_QUEUE_FULL);
    gate_open(&gate);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ran[i], i < 4 ? 1 : 0); /* the first four, in order */
    EXPECT_EQ(total(&report), 5);
    taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args, 10, &taken), CTX_CLOSED);
    EXPECT_EQ(taken, 0);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(a_batch_that_fits_is_taken_whole) {
    ctx_pool_t *pool = pool_of(4, 512);
    int ran = 0;
    void *args[500];
    for (int i = 0; i < 500; i++) args[i] = &ran;
    size_t taken = 0;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args, 500, &taken), 0);
    EXPECT_EQ(taken, 500);
    taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args, 0, &taken), 0);
    EXPECT_EQ(taken, 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 500);
    ctx_pool_free(pool);
}

TEST(a_batch_wakes_as_many_workers_as_it_needs) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(4, 16);
    void *args[4];
    for (int i = 0; i < 4; i++) args[i] = &gate;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", passes_gate, args, 4, NULL), 0);
    gate_await(&gate, 4); /* at the same time */
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

/* The tasks of a batch that is larger than the room: the first is for the worker, which sleeps, and those that the
   submitter runs or pushes out wait until that has begun. */
typedef struct {
    pthread_t submitter;
    int by_worker, by_submitter, dropped; /* [atomic] */
} sleepy_t;

static int waits_for_the_worker(ctx_t *ctx, void *arg) {
    sleepy_t *sleepy = (sleepy_t *)arg;
    (void)ctx;
    if (!pthread_equal(pthread_self(), sleepy->submitter)) {
        add(&sleepy->by_worker, 1);
        return 0;
    }
    UNTIL(load(&sleepy->by_worker) > 0);
    add(&sleepy->by_submitter, 1);
    return 0;
}

static void drop_waits_for_the_worker(const char *op, void *arg, int reason, void *user) {
    sleepy_t *sleepy = (sleepy_t *)arg;
    (void)op;
    (void)user;
    EXPECT_EQ(reason, CTX_QUEUE_FULL);
    UNTIL(load(&sleepy->by_worker) > 0);
    add(&sleepy->dropped, 1);
}

TEST(a_batch_wakes_a_worker_before_its_submitter_does_anything_else) {
    enum { N = 6 };
    const ctx_when_full_t policies[] = {CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};
    for (int p = 0; p < 3; p++) {
        ctx_pool_desc_t desc = describe(1, 1);
        desc.when_full = policies[p];
        desc.on_drop = drop_waits_for_the_worker;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        gate_t gate;
        gate_init(&gate);
        post_t post = {&gate, 0};
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "warm", stands_at_post, &post), 0);
        gate_await(&gate, 1);
        gate_open(&gate);
        until_asleep(&post.tid);
        sleepy_t sleepy;
        memset(&sleepy, 0, sizeof sleepy);
        sleepy.submitter = pthread_self();
        void *args[N];
        for (int i = 0; i < N; i++) args[i] = &sleepy;
        size_t taken = 0;
        EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", waits_for_the_worker, args, N, &taken), 0);
        EXPECT_EQ(taken, N);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        EXPECT_EQ(sleepy.by_worker + sleepy.by_submitter + sleepy.dropped, N);
        EXPECT(sleepy.by_worker > 0);
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(each_policy_holds_for_each_task_of_a_batch) {
    const ctx_when_full_t policies[] = {CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};
    for (int p = 0; p < 3; p++) {
        gate_t gate;
        gate_init(&gate);
        drops_t drops;
        drops_init(&drops);
        ctx_pool_desc_t desc = describe(1, 4);
        desc.when_full = policies[p];
        desc.on_drop = note_drop;
        desc.user = &drops;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        if (policies[p] != CTX_BLOCK) occupy(pool, &gate, 1);
        int ran[20];
        void *args[20];
        memset(ran, 0, sizeof ran);
        for (int i = 0; i < 20; i++) args[i] = &ran[i];
        size_t taken = 0;
        EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "batch", counts, args, 20, &taken), 0);
        EXPECT_EQ(taken, 20);
        gate_open(&gate);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        EXPECT_EQ(drops_count(&drops), policies[p] == CTX_DROP_OLDEST ? 16 : 0);
        for (int i = 0; i < 20; i++) EXPECT_EQ(ran[i], policies[p] == CTX_DROP_OLDEST && i < 16 ? 0 : 1);
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(a_blocked_batch_says_how_far_it_came) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 4);
    desc.when_full = CTX_BLOCK;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    int ran[10];
    void *args[10];
    memset(ran, 0, sizeof ran);
    for (int i = 0; i < 10; i++) args[i] = &ran[i];
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_MS(10));
    size_t taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, parent, "batch", counts, args, 10, &taken), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(taken, 4);
    ctx_end(parent);
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ran[i], i < 4 ? 1 : 0);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

/* -- permits --------------------------------------------------------------------------------------------------- */

typedef struct {
    int inside, most, ran;
} bottleneck_t;

static int squeezes_through(ctx_t *ctx, void *arg) {
    bottleneck_t *b = (bottleneck_t *)arg;
    (void)ctx;
    int inside = add(&b->inside, 1);
    int most = load(&b->most);
    while (inside > most &&
           !__atomic_compare_exchange_n(&b->most, &most, inside, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    spin(300);
    if (inside % 2) sched_yield();
    add(&b->inside, -1);
    add(&b->ran, 1);
    return 0;
}

TEST(permits_shared_by_two_pools_are_never_exceeded) {
    ctx_sem_t limit;
    ctx_sem_init(&limit, 3);
    bottleneck_t b;
    memset(&b, 0, sizeof b);
    ctx_pool_desc_t desc = describe(4, 64);
    desc.permits = &limit;
    ctx_pool_t *one = pool_below(ctx_background(), &desc), *two = pool_below(ctx_background(), &desc);
    int n = test_scale(10000);
    for (int i = 0; i < n; i++) {
        EXPECT_EQ(ctx_pool_submit_wait(one, ctx_background(), "one", squeezes_through, &b), 0);
        EXPECT_EQ(ctx_pool_submit_wait(two, ctx_background(), "two", squeezes_through, &b), 0);
    }
    EXPECT_EQ(ctx_pool_drain(one, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ctx_pool_drain(two, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(b.ran, 2 * n);
    EXPECT(b.most <= 3);
    EXPECT(b.most >= 2);
    UNTIL(all_free(&limit, 3)); /* a pool with nothing to run keeps none: a worker may still be given its turn */
    ctx_pool_free(one);
    ctx_pool_free(two);
    EXPECT(all_free(&limit, 3));
    ctx_sem_destroy(&limit);
}

TEST(all_permits_are_used) {
    ctx_sem_t limit;
    ctx_sem_init(&limit, 3);
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(4, 64);
    desc.permits = &limit;
    ctx_pool_t *one = pool_below(ctx_background(), &desc), *two = pool_below(ctx_background(), &desc);
    for (int i = 0; i < 2; i++) {
        EXPECT_EQ(ctx_pool_submit(one, ctx_background(), "one", passes_gate, &gate), 0);
        EXPECT_EQ(ctx_pool_submit(two, ctx_background(), "two", passes_gate, &gate), 0);
    }
    gate_await(&gate, 3);
    EXPECT(!ctx_sem_try_acquire(&limit, 1));
    EXPECT_EQ(gate_came(&gate), 3);
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(one, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ctx_pool_drain(two, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(gate_came(&gate), 4);
    ctx_pool_free(one);
    ctx_pool_free(two);
    gate_destroy(&gate);
    ctx_sem_destroy(&limit);
}

/* All workers but one sleep: nobody could run anything. */
TEST(permits_that_come_back_together_are_all_used) {
    enum { N = 4 };
    ctx_sem_t permits;
    ctx_sem_init(&permits, N);
    gate_t before, gate;
    gate_init(&before), gate_init(&gate);
    ctx_pool_desc_t desc = describe(N, 16);
    desc.permits = &permits;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    post_t posts[N];
    for (int i = 0; i < N; i++) {
        posts[i].gate = &before;
        posts[i].tid = 0;
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "warm", stands_at_post, &posts[i]), 0);
        gate_await(&before, i + 1);
    }
    gate_open(&before);
    for (int i = 0; i < N; i++) until_asleep(&posts[i].tid);
    EXPECT(ctx_sem_try_acquire(&permits, N)); /* another part of the program has them */
    void *args[2 * N];
    for (int i = 0; i < 2 * N; i++) args[i] = &gate;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "task", passes_gate, args, 2 * N, NULL), 0);
    for (int i = 0; i < N; i++) until_asleep(&posts[i].tid);
    EXPECT_EQ(gate_came(&gate), 0);
    ctx_sem_release(&permits, N);
    gate_await(&gate, N); /* all at once */
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(gate_came(&gate), 2 * N);
    ctx_pool_free(pool);
    EXPECT(all_free(&permits, N));
    gate_destroy(&before), gate_destroy(&gate);
    ctx_sem_destroy(&permits);
}

typedef struct {
    ctx_sem_t *permits;
    gate_t *gate;
    int tid;
} holder_t;

static void *holds_a_permit(void *arg) {
    holder_t *holder = (holder_t *)arg;
    store(&holder->tid, thread_id());
    EXPECT_EQ(ctx_sem_acquire(holder->permits, ctx_background(), 1), 0);
    gate_pass(holder->gate);
    ctx_sem_release(holder->permits, 1);
    return NULL;
}

/* The first worker sees the second task in the queue when its own is over, and stands behind another part of the
   program for the permit. The second worker runs that task. */
TEST(a_drain_does_not_wait_for_a_permit_that_no_task_needs) {
    for (int round = 0; round < test_scale(50); round++) {
        ctx_sem_t permits;
        ctx_sem_init(&permits, 1);
        gate_t gate, held;
        gate_init(&gate), gate_init(&held);
        ctx_pool_desc_t desc = describe(2, 16);
        desc.permits = &permits;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        int ran = 0;
        occupy(pool, &gate, 1);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "second", counts, &ran), 0);
        ctx__lock(&permits.mu);
        while (!permits.waiters.first) { /* until the second worker stands in the queue */
            ctx__unlock(&permits.mu);
            sched_yield();
            ctx__lock(&permits.mu);
        }
        ctx__unlock(&permits.mu);
        holder_t holder = {&permits, &held, 0};
        pthread_t thread = thread_start(holds_a_permit, &holder);
        until_asleep(&holder.tid);
        gate_open(&gate);
        UNTIL(load(&ran) == 1);
        gate_await(&held, 1);
        ctx_drain_report_t report;
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
        EXPECT_EQ(report.completed, 2);
        EXPECT_EQ(total(&report), 2);
        gate_open(&held);
        thread_join(thread);
        ctx_pool_free(pool);
        EXPECT(all_free(&permits, 1));
        gate_destroy(&gate), gate_destroy(&held);
        ctx_sem_destroy(&permits);
    }
}

typedef struct {
    ctx_pool_t *pool;
    int *calm_ran;
    int turns, refused;
} surge_t;

static int surges_on(ctx_t *ctx, void *arg) {
    surge_t *surge = (surge_t *)arg;
    add(&surge->turns, 1);
    if (load(surge->calm_ran) >= 20) return 0;
    if (ctx_pool_submit(surge->pool, ctx, "surge", surges_on, surge) != 0) add(&surge->refused, 1);
    return 0;
}

/* One pool keeps its queue full until the other has got its tasks through the same bottleneck. */
TEST(a_surge_in_one_pool_does_not_starve_the_other) {
    ctx_sem_t limit;
    ctx_sem_init(&limit, 1);
    ctx_pool_desc_t desc = describe(4, 256);
    desc.permits = &limit;
    ctx_pool_t *surging = pool_below(ctx_background(), &desc), *calm = pool_below(ctx_background(), &desc);
    int ran = 0;
    surge_t surge;
    memset(&surge, 0, sizeof surge);
    surge.pool = surging;
    surge.calm_ran = &ran;
    for (int i = 0; i < 200; i++) EXPECT_EQ(ctx_pool_submit(surging, ctx_background(), "surge", surges_on, &surge), 0);
    for (int i = 0; i < 20; i++) {
        EXPECT_EQ(ctx_pool_submit(calm, ctx_background(), "calm", counts, &ran), 0);
        UNTIL(load(&ran) > i);
    }
    EXPECT_EQ(ctx_pool_drain(surging, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ctx_pool_drain(calm, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(surge.refused, 0);
    ctx_pool_free(surging);
    ctx_pool_free(calm);
    EXPECT(all_free(&limit, 1));
    ctx_sem_destroy(&limit);
}

TEST(tasks_that_wait_for_a_permit_are_dropped_when_the_budget_ends) {
    ctx_sem_t limit;
    ctx_sem_init(&limit, 2);
    EXPECT(ctx_sem_try_acquire(&limit, 2)); /* somebody else has them */
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(3, 16);
    desc.permits = &limit;
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int ran = 0;
    for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "held up", counts, &ran), 0);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(20), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(report.dropped, 8);
    EXPECT_EQ(total(&report), 8);
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(drops_count(&drops), 8);
    for (int i = 0; i < 8; i++) EXPECT_EQ(drops.at[i].reason, CTX_DEADLINE_EXCEEDED);
    ctx_pool_free(pool);
    ctx_sem_release(&limit, 2);
    EXPECT(all_free(&limit, 2));
    ctx_sem_destroy(&limit);
}

/* -- drain ------------------------------------------------------------------------------------------------------ */

TEST(a_drain_within_its_budget_returns_0_and_leaves_the_pool_closed) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(2, 64);
    occupy(pool, &gate, 2);
    int ran = 0;
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "fail", fails, NULL), 0);
    drainer_t d;
    pthread_t thread = drain_apart(&d, pool, CTX_S(3600));
    until_asleep(&d.tid);
    EXPECT_EQ(load(&d.done), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), CTX_CLOSED);
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "late", counts, &ran), CTX_CLOSED);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(d.rc, 0);
    EXPECT_EQ(ran, 10);
    EXPECT_EQ(d.report.completed, 12);
    EXPECT_EQ(d.report.failed, 3);
    EXPECT_EQ(total(&d.report), 15);
    EXPECT(d.report.wait_time > 0);
    EXPECT_EQ(d.report.grace_time, 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), CTX_CLOSED);
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "late", counts, &ran), CTX_CLOSED);
    ctx_pool_free(pool);
    EXPECT_EQ(ran, 10);
    gate_destroy(&gate);
}

TEST(an_empty_pool_drains_at_once) {
    const ctx_dur_t budgets[] = {0, -1, INT64_MIN, CTX_MS(1), CTX_FOREVER};
    for (size_t i = 0; i < sizeof budgets / sizeof budgets[0]; i++) {
        ctx_pool_t *pool = pool_of(2, 4);
        ctx_drain_report_t report;
        memset(&report, 0xff, sizeof report);
        EXPECT_EQ(ctx_pool_drain(pool, budgets[i], &report), 0);
        EXPECT_EQ(total(&report), 0);
        EXPECT_EQ(report.completed + report.stuck, 0);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", fails, NULL), CTX_CLOSED);
        ctx_pool_free(pool);
    }
}

TEST(over_budget_the_queue_is_dropped_and_running_tasks_are_canceled) {
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(2, 16);
    desc.on_drop = note_drop;
    desc.user = &drops;
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int started = 0, ran = 0;
    for (int i = 0; i < 2; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 2);
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    ctx_time_t from = ctx_now();
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(20), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from >= CTX_MS(20));
    EXPECT(ctx_now() - from < CTX_S(30)); /* not the whole of the notice: they stopped */
    EXPECT_EQ(report.canceled, 2);
    EXPECT_EQ(report.dropped, 5);
    EXPECT_EQ(report.stuck, 0);
    EXPECT_EQ(total(&report), 7);
    EXPECT(report.wait_time >= CTX_MS(20));
    EXPECT(report.grace_time >= 0);
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(drops_count(&drops), 5);
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(drops.at[i].reason, CTX_DEADLINE_EXCEEDED);
        EXPECT(strcmp(drops.at[i].op, "queued") == 0);
        EXPECT(drops.at[i].arg == &ran);
    }
    ctx_pool_free(pool);
    EXPECT_EQ(drops_count(&drops), 5);
}

static int fails_once_canceled(ctx_t *ctx, void *arg) {
    if (arg) add((int *)arg, 1);
    ctx_wait(ctx, CTX_FOREVER);
    return -5;
}

static int succeeds_once_canceled(ctx_t *ctx, void *arg) {
    if (arg) add((int *)arg, 1);
    ctx_wait(ctx, CTX_FOREVER);
    return 0;
}

TEST(the_report_tells_completed_failed_and_canceled_apart) {
    ctx_pool_desc_t desc = describe(5, 16);
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int started = 0, ran = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "ok", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "bad", fails, NULL), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "bad", fails, NULL), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "canceled", waits_for_cancel, &started), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "canceled", fails_once_canceled, &started), 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "done after all", succeeds_once_canceled, &started), 0);
    UNTIL(load(&started) == 3 && load(&ran) == 1);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(30), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(total(&report), 6);
    EXPECT_EQ(report.completed, 2);
    EXPECT_EQ(report.canceled, 2);
    EXPECT_EQ(report.failed, 2);
    ctx_pool_free(pool);
}

TEST(a_stuck_task_is_named_and_not_waited_for) {
    gate_t gate;
    gate_init(&gate);
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(2, 16);
    desc.grace = CTX_MS(10);
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int started = 0, ran = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "resize image", passes_gate, &gate), 0);
    gate_await(&gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "polite", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 1);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    ctx_time_t from = ctx_now();
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(10), &report), CTX_DEADLINE_EXCEEDED);
    ctx_dur_t took = ctx_now() - from;
    EXPECT(took >= CTX_MS(20)); /* it had all of its budget and grace period, ... */
    EXPECT(took < CTX_S(20));   /* ... and no more */
    EXPECT_EQ(report.stuck, 1);
    EXPECT_EQ(report.canceled, 1);
    EXPECT_EQ(report.dropped, 3);
    EXPECT_EQ(total(&report), 5);
    EXPECT(says_running(&report, "resize image"));
    EXPECT(!says_running(&report, "polite"));
    EXPECT(report.grace_time >= CTX_MS(10));
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report),
              CTX_DEADLINE_EXCEEDED); /* it did not finish inside a budget */
    EXPECT_EQ(report.stuck, 0);       /* but is not stuck any more */
    EXPECT_EQ(report.dropped, 3);
    EXPECT_EQ(report.completed, 1);
    EXPECT_EQ(total(&report), 5);
    EXPECT_EQ(drops_count(&drops), 3);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(the_first_sixteen_of_many_stuck_tasks_are_named) {
    enum { STUCK = CTX_DRAIN_OPS + 4 };
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(STUCK, 4);
    desc.grace = -1;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    for (int i = 0; i < STUCK; i++) {
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "stuck here", passes_gate, &gate), 0);
        gate_await(&gate, i + 1);
    }
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, 0, &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(report.stuck, STUCK);
    EXPECT_EQ(total(&report), STUCK);
    for (int i = 0; i < CTX_DRAIN_OPS; i++) EXPECT(report.running[i] && strcmp(report.running[i], "stuck here") == 0);
    gate_open(&gate);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(the_report_may_be_null) {
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 4);
    desc.grace = -1;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(1), NULL), CTX_DEADLINE_EXCEEDED);
    gate_open(&gate);
    ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

TEST(a_drain_may_be_repeated) {
    ctx_pool_t *pool = pool_of(2, 64);
    int ran = 0;
    for (int i = 0; i < 30; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    ctx_drain_report_t report;
    for (int i = 0; i < 3; i++) {
        memset(&report, 0xff, sizeof report);
        EXPECT_EQ(ctx_pool_drain(pool, i == 1 ? 0 : CTX_FOREVER, &report), 0);
        EXPECT_EQ(report.completed, 30);
        EXPECT_EQ(total(&report), 30);
    }
    ctx_pool_free(pool);
}

TEST(a_second_drain_with_less_budget_cuts_the_first_short) {
    drops_t drops;
    drops_init(&drops);
    ctx_pool_desc_t desc = describe(1, 16);
    desc.on_drop = note_drop;
    desc.user = &drops;
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int started = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", waits_for_cancel, NULL), 0);
    drainer_t d;
    pthread_t thread = drain_apart(&d, pool, CTX_S(3600));
    until_asleep(&d.tid);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(5), &report), CTX_DEADLINE_EXCEEDED);
    thread_join(thread); /* nothing is left to wait an hour for */
    EXPECT_EQ(d.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(total(&report), 2);
    EXPECT_EQ(total(&d.report), 2);
    EXPECT_EQ(report.canceled, 1);
    EXPECT_EQ(drops_count(&drops), 1);
    ctx_pool_free(pool);
}

static void drop_passes_gate(const char *op, void *arg, int reason, void *user) {
    (void)op;
    (void)reason;
    (void)user;
    gate_pass((gate_t *)arg);
}

static void *cancels(void *arg) {
    ctx_cancel((ctx_t *)arg);
    return NULL;
}

/* Here on_drop runs in the thread that ended the lifetime. */
TEST(a_drain_waits_until_on_drop_has_returned) {
    gate_t gate, drop;
    gate_init(&gate), gate_init(&drop);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(1, 4);
    desc.on_drop = drop_passes_gate;
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    occupy(pool, &gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "dropped", passes_gate, &drop), 0);
    pthread_t canceler = thread_start(cancels, lifetime);
    gate_await(&drop, 1);
    gate_open(&gate);
    drainer_t d;
    pthread_t drainer = drain_apart(&d, pool, CTX_FOREVER);
    until_asleep(&d.tid);
    EXPECT_EQ(load(&d.done), 0);
    gate_open(&drop);
    thread_join(drainer);
    thread_join(canceler);
    EXPECT_EQ(d.rc, 0);
    EXPECT_EQ(d.report.dropped, 1);
    EXPECT_EQ(d.report.stuck, 0);
    EXPECT_EQ(total(&d.report), 2);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    gate_destroy(&gate), gate_destroy(&drop);
}

static int drop_drained;
static void drop_drains_the_pool(const char *op, void *arg, int reason, void *user) {
    (void)op;
    (void)reason;
    (void)user;
    EXPECT_EQ(ctx_pool_drain((ctx_pool_t *)arg, CTX_FOREVER, NULL), 0);
    drop_drained++;
}

TEST(on_drop_may_drain_its_pool) {
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(1, 4);
    desc.on_drop = drop_drains_the_pool;
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    int started = 0;
    drop_drained = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "dropped", passes_gate, pool), 0);
    ctx_cancel(lifetime);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(drop_drained, 1);
    ctx_pool_free(pool);
    ctx_end(lifetime);
}

TEST(several_threads_may_drain_at_once) {
    enum { N = 6 };
    for (int round = 0; round < test_scale(100); round++) {
        gate_t gate;
        gate_init(&gate);
        ctx_pool_t *pool = pool_of(2, 64);
        occupy(pool, &gate, 2);
        int ran = 0;
        for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        drainer_t d[N];
        pthread_t threads[N];
        for (int i = 0; i < N; i++) threads[i] = drain_apart(&d[i], pool, i % 2 ? CTX_FOREVER : CTX_S(3600));
        gate_open(&gate);
        for (int i = 0; i < N; i++) {
            thread_join(threads[i]);
            EXPECT_EQ(d[i].rc, 0);
            EXPECT_EQ(d[i].report.completed, 12);
            EXPECT_EQ(total(&d[i].report), 12);
        }
        EXPECT_EQ(ran, 10);
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(a_drain_keeps_its_budget_by_the_fake_clock) {
    ctx_clock_fake(CTX_S(1));
    ctx_pool_desc_t desc = describe(1, 4);
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int started = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 1);
    drainer_t d;
    pthread_t thread = drain_apart(&d, pool, CTX_S(3600));
    until_asleep(&d.tid);
    ctx_clock_advance(CTX_S(3600) - 1);
    until_asleep(&d.tid);
    EXPECT_EQ(load(&d.done), 0);
    ctx_clock_advance(1);
    thread_join(thread); /* canceled, it stops: none of the notice passes */
    EXPECT_EQ(d.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(d.report.canceled, 1);
    EXPECT_EQ(total(&d.report), 1);
    EXPECT_EQ(d.report.wait_time, CTX_S(3600));
    EXPECT_EQ(d.report.grace_time, 0);
    ctx_pool_free(pool);
    ctx_clock_real();
}

TEST(a_drain_keeps_its_grace_period_by_the_fake_clock) {
    ctx_clock_fake(CTX_S(1));
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 4);
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    drainer_t d;
    pthread_t thread = drain_apart(&d, pool, CTX_S(3600));
    until_asleep(&d.tid);
    ctx_clock_advance(CTX_S(3600));
    until_asleep(&d.tid);
    EXPECT_EQ(load(&d.done), 0);
    while (!load(&d.done)) {
        ctx_clock_advance(CTX_S(1));
        test_sleep_ms(1);
    }
    thread_join(thread);
    EXPECT_EQ(d.rc, CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(d.report.stuck, 1);
    EXPECT(d.report.grace_time >= CTX_S(60));
    gate_open(&gate);
    ctx_pool_free(pool);
    gate_destroy(&gate);
    ctx_clock_real();
}

typedef struct {
    ctx_pool_t *pool;
    ctx_drain_report_t report;
    int rc, done, err_before, err_after;
    ctx_dur_t took;
    gate_t *gate;
} inner_t;

static int drains_its_own_pool(ctx_t *ctx, void *arg) {
    inner_t *inner = (inner_t *)arg;
    ctx_time_t from = ctx_now();
    inner->rc = ctx_pool_drain(inner->pool, CTX_FOREVER, &inner->report);
    inner->took = ctx_now() - from;
    inner->err_after = ctx_err(ctx);
    store(&inner->done, 1);
    return 0;
}

/* It cannot wait for itself: it waits for all the others, and reports itself as running. */
TEST(a_task_may_drain_its_own_pool) {
    for (int workers = 1; workers <= 3; workers++) {
        ctx_pool_t *pool = pool_of(workers, 16);
        int ran = 0;
        inner_t inner;
        memset(&inner, 0, sizeof inner);
        inner.pool = pool;
        for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "drains", drains_its_own_pool, &inner), 0);
        UNTIL(load(&inner.done));
        EXPECT_EQ(inner.rc, 0);
        EXPECT_EQ(inner.report.completed, 5);
        EXPECT_EQ(inner.report.stuck, 1);
        EXPECT_EQ(total(&inner.report), 6);
        EXPECT(says_running(&inner.report, "drains"));
        EXPECT_EQ(inner.err_after, 0);
        EXPECT(inner.took < CTX_S(20));
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), CTX_CLOSED);
        ctx_drain_report_t report;
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
        EXPECT_EQ(report.completed, 6);
        EXPECT_EQ(report.stuck, 0);
        ctx_pool_free(pool);
        EXPECT_EQ(ran, 5);
    }
}

/* -- copies ----------------------------------------------------------------------------------------------------- */

/* What a task gets by copy, and what became of it: each number is seen once. */
enum { COPIES = 3000 };
typedef struct {
    int *seen; /* [atomic] by a task 1, by on_drop 1000 */
    int number;
    unsigned char fill[40];
} copied_t;

static void copied_make(copied_t *copied, int *seen, int number) {
    copied->seen = seen;
    copied->number = number;
    memset(copied->fill, number & 255, sizeof copied->fill);
}

static void copied_check(const copied_t *copied, int what) {
    int wrong = (uintptr_t)copied % 16 != 0;
    for (size_t i = 0; i < sizeof copied->fill; i++) wrong += copied->fill[i] != (copied->number & 255);
    EXPECT_EQ(wrong, 0);
    add(&copied->seen[copied->number], what);
}

static int sees_copy(ctx_t *ctx, void *arg) {
    copied_t *copied = (copied_t *)arg;
    (void)ctx;
    copied_check(copied, 1);
    memset(copied->fill, 0xEE, sizeof copied->fill); /* it is the task's own */
    return 0;
}

static void drops_copy(const char *op, void *arg, int reason, void *user) {
    (void)op;
    (void)user;
    EXPECT(reason < 0);
    copied_check((const copied_t *)arg, 1000);
}

typedef struct {
    ctx_pool_t *pool;
    int id; /* [atomic] the next submitter's */
    int seen[COPIES];
    int accepted[COPIES];
} copies_t;

static void *submits_copies(void *arg) {
    copies_t *c = (copies_t *)arg;
    for (int i = add(&c->id, 1) - 1; i < COPIES; i += 3) {
        copied_t copied;
        copied_make(&copied, c->seen, i);
        int rc = ctx_pool_submit_copy(c->pool, ctx_background(), "copy", sees_copy, &copied, sizeof copied);
        memset(&copied, 0, sizeof copied); /* it was the caller's again */
        c->accepted[i] = rc == 0;
        EXPECT(rc == 0 || rc == CTX_QUEUE_FULL);
    }
    return NULL;
}

TEST(each_copy_is_seen_by_its_task_or_its_on_drop_once) {
    static copies_t c;
    for (int w = 0; w < 4; w++) {
        for (int workers = 1; workers <= 3; workers++) {
            memset(&c, 0, sizeof c);
            ctx_pool_desc_t desc = describe(workers, 4);
            desc.when_full = when_full[w];
            desc.on_drop = drops_copy;
            c.pool = pool_below(ctx_background(), &desc);
            pthread_t threads[3];
            for (int i = 0; i < 3; i++) threads[i] = thread_start(submits_copies, &c);
            for (int i = 0; i < 3; i++) thread_join(threads[i]);
            ctx_pool_drain(c.pool, workers == 1 ? 0 : CTX_FOREVER, NULL);
            ctx_pool_free(c.pool);
            int wrong = 0;
            for (int i = 0; i < COPIES; i++)
                wrong += c.accepted[i] ? c.seen[i] != 1 && c.seen[i] != 1000 : c.seen[i] != 0;
            EXPECT_EQ(wrong, 0);
        }
    }
}

TEST(copies_need_no_memory_of_their_own) {
    ctx_pool_t *pool = pool_of(2, 16);
    copied_t copied;
    int seen = 0;
    gate_t gate;
    gate_init(&gate);
    occupy(pool, &gate, 2); /* both workers have come up, and have a context */
    gate_open(&gate);
    copied_make(&copied, &seen, 0);
    for (int i = 0; i < 2000; i++) {
        if (i == 1000) fault_after(INT32_MAX);
        EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "copy", sees_copy, &copied, sizeof copied), 0);
        if (i % 10 == 9) EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0);
    }
    EXPECT_EQ(fault_calls(), 0);
    fault_off();
    gate_destroy(&gate);
    EXPECT_EQ(seen, 2000);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

TEST(without_memory_for_a_copy_nothing_is_accepted) {
    ctx_pool_t *pool = pool_of(1, 4);
    copied_t copied;
    int ran = 0, seen = 0;
    copied_make(&copied, &seen, 0);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0);
    fault_all_after(0);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "copy", sees_copy, &copied, sizeof copied), CTX_NO_MEMORY);
    fault_off();
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "copy", sees_copy, &copied, sizeof copied), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(seen, 1);
    ctx_pool_free(pool);
}

static int notes_size(ctx_t *ctx, void *arg) {
    static unsigned char want[200];
    (void)ctx;
    memset(want, 7, sizeof want);
    EXPECT(memcmp(arg, want, sizeof want) == 0);
    return 0;
}

static int needs_an_address(ctx_t *ctx, void *arg) { return ctx_err(ctx) || !arg ? -1 : 0; }

TEST(copies_are_as_large_as_the_description_says) {
    unsigned char bytes[201];
    ctx_drain_report_t report;
    memset(bytes, 7, sizeof bytes);
    ctx_pool_t *pool = pool_of(1, 4);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "large", notes_size, bytes, 65), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "fits", needs_an_address, bytes, 64), 0);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "none", needs_an_address, NULL, 0), 0);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "bad", needs_an_address, NULL, 1), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_copy(pool, NULL, "bad", needs_an_address, bytes, 1), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "bad", NULL, bytes, 1), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_copy(NULL, ctx_background(), "bad", needs_an_address, bytes, 1), CTX_INVALID);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(report.completed, 2);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "late", needs_an_address, bytes, 1), CTX_CLOSED);
    ctx_pool_free(pool);
    ctx_pool_desc_t desc = describe(1, 4);
    desc.copy_max = 200;
    pool = pool_below(ctx_background(), &desc);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "fits", notes_size, bytes, 200), 0);
    EXPECT_EQ(ctx_pool_submit_copy(pool, ctx_background(), "large", notes_size, bytes, 201), CTX_INVALID);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(report.completed, 1);
    ctx_pool_free(pool);
    desc.copy_max = SIZE_MAX;
    errno = 0;
    EXPECT(ctx_pool_new(ctx_background(), &desc) == NULL);
    EXPECT_EQ(errno, ENOMEM);
}

/* -- threads ---------------------------------------------------------------------------------------------------- */

#if defined(__linux__) && defined(__GLIBC__)
#include <sys/prctl.h>
#include <sys/wait.h>

#ifndef _GNU_SOURCE
extern int pthread_getattr_np(pthread_t thread, pthread_attr_t *attr);
#endif

static size_t stack_size_here(void) {
    pthread_attr_t attr;
    void *low = NULL;
    size_t size = 0;
    EXPECT_EQ(pthread_getattr_np(pthread_self(), &attr), 0);
    EXPECT_EQ(pthread_attr_getstack(&attr, &low, &size), 0);
    pthread_attr_destroy(&attr);
    return size;
}

static int notes_stack(ctx_t *ctx, void *arg) {
    (void)ctx;
    *(size_t *)arg = stack_size_here();
    return 0;
}

static size_t stack_of_worker(size_t stack_size) {
    size_t size = 0;
    ctx_pool_desc_t desc = describe(1, 4);
    desc.stack_size = stack_size;
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "notes", notes_stack, &size), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    return size;
}

TEST(workers_have_the_stack_that_the_description_says) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), usual = stack_of_worker(0);
    EXPECT_EQ(stack_of_worker(1 << 20), 1 << 20);
    EXPECT_EQ(stack_of_worker((1 << 20) + 1), (1 << 20) + page);
    EXPECT(stack_of_worker(1) >= page); /* what the system needs at the least */
    EXPECT(stack_of_worker(1) <= usual);
    EXPECT(stack_of_worker(4 * usual) > usual);
}

/* The lines of /proc/self/status that say how a program is to be signalled, as a child of this thread sees them. */
typedef struct {
    char child[512];
    int rc; /* [atomic] 1 when it is there */
} status_t;

static int asks_child(ctx_t *ctx, void *arg) {
    status_t *status = (status_t *)arg;
    (void)ctx;
    size_t n = 0;
    FILE *child = popen("grep -E '^Sig(Blk|Ign)' /proc/self/status", "r");
    EXPECT(child != NULL);
    if (child) {
        n = fread(status->child, 1, sizeof status->child - 1, child);
        pclose(child);
    }
    EXPECT(n > 0);
    store(&status->rc, 1);
    return 0;
}

/* A child that a task starts has the mask that the thread had which called the library, and SIGPIPE as it was. */
TEST(children_of_tasks_have_the_mask_of_the_caller) {
    sigset_t set, before;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    for (int masked = 0; masked < 2; masked++) {
        static status_t here, task, work;
        memset(&here, 0, sizeof here), memset(&task, 0, sizeof task), memset(&work, 0, sizeof work);
        if (masked) pthread_sigmask(SIG_BLOCK, &set, &before);
        ctx_runtime_stop(); /* no idle thread is left */
        asks_child(ctx_background(), &here);
        ctx_pool_t *pool = pool_of(1, 4);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "asks", asks_child, &task), 0);
        EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
        ctx_pool_free(pool);
        EXPECT_EQ(ctx_go(ctx_background(), "asks", asks_child, &work), 0);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        EXPECT_EQ(strcmp(here.child, task.child), 0);
        EXPECT_EQ(strcmp(here.child, work.child), 0);
        if (masked) pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    ctx_runtime_stop();
}

static int notes_name(ctx_t *ctx, void *arg) {
    (void)ctx;
    prctl(PR_GET_NAME, (unsigned long)(uintptr_t)arg, 0, 0, 0);
    return 0;
}

static bool a_thread_is_called(const char *name) {
    DIR *dir = opendir("/proc/self/task");
    bool found = false;
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        char path[300], line[32] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        if (fgets(line, (int)sizeof line, file)) line[strcspn(line, "\n")] = '\0';
        fclose(file);
        found = found || strcmp(line, name) == 0;
    }
    if (dir) closedir(dir);
    return found;
}

TEST(threads_bear_the_name_of_their_work) {
    char name[16] = "";
    gate_t gate;
    gate_init(&gate);
    ctx_pool_desc_t desc = describe(1, 4);
    desc.name = "resize-pool";
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "notes", notes_name, name), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    EXPECT_EQ(strcmp(name, "resize-pool"), 0);
    EXPECT_EQ(ctx_go(ctx_background(), "refresh-of-all-caches", notes_name, name), 0);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    EXPECT_EQ(strcmp(name, "refresh-of-all-"), 0);
    UNTIL(!a_thread_is_called("refresh-of-all-")); /* an idle one has a name of its own */
    EXPECT(a_thread_is_called("ctx-runner"));
    ctx_group_desc_t in;
    memset(&in, 0, sizeof in);
    in.name = "fetch-all";
    ctx_group_t *group = ctx_group_new(ctx_background(), &in);
    EXPECT_EQ(ctx_group_go(group, notes_name, name), 0);
    EXPECT_EQ(ctx_group_wait(group), 0);
    EXPECT_EQ(strcmp(name, "fetch-all"), 0);
    EXPECT_EQ(ctx_go(ctx_background(), "holds", passes_gate, &gate), 0);
    gate_await(&gate, 1);
    EXPECT(a_thread_is_called("holds"));
    gate_open(&gate);
    EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
    gate_destroy(&gate);
    ctx_runtime_stop();
}
#endif

/* -- the end of the lifetime, and waits --------------------------------------------------------------------------- */

/* The budget of a drain ends with the lifetime, whether that ends before the drain or during it. */
TEST(once_the_lifetime_is_done_a_drain_waits_for_the_grace_period_only) {
    for (int before = 0; before < 2; before++) {
        ctx_clock_fake(CTX_S(1));
        gate_t gate;
        drainer_t d;
        gate_init(&gate);
        ctx_t *lifetime = ctx_with_cancel(ctx_background());
        ctx_pool_desc_t desc = describe(1, 4);
        desc.grace = CTX_S(60);
        ctx_pool_t *pool = pool_below(lifetime, &desc);
        occupy(pool, &gate, 1);
        if (before) ctx_cancel(lifetime);
        pthread_t thread = drain_apart(&d, pool, CTX_FOREVER);
        until_asleep(&d.tid);
        if (!before) {
            ctx_clock_advance(CTX_S(3600));
            EXPECT_EQ(load(&d.done), 0);
            ctx_cancel(lifetime);
            until_asleep(&d.tid);
        }
        EXPECT_EQ(load(&d.done), 0);
        while (!load(&d.done)) {
            ctx_clock_advance(CTX_S(1));
            test_sleep_ms(1);
        }
        thread_join(thread);
        EXPECT_EQ(d.rc, CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(d.report.stuck, 1);
        EXPECT(d.report.wait_time >= (before ? 0 : CTX_S(3600)));
        EXPECT(d.report.grace_time >= CTX_S(60));
        gate_open(&gate);
        ctx_pool_free(pool);
        ctx_end(lifetime);
        gate_destroy(&gate);
        ctx_clock_real();
    }
}

TEST(tasks_that_heed_the_end_of_the_lifetime_end_the_drain_at_once) {
    ctx_clock_fake(CTX_S(1));
    drainer_t d;
    int started = 0;
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 4);
    desc.grace = CTX_S(60);
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    for (int i = 0; i < 2; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 2);
    pthread_t thread = drain_apart(&d, pool, CTX_FOREVER);
    until_asleep(&d.tid);
    ctx_cancel(lifetime);
    thread_join(thread); /* the fake clock stands still */
    EXPECT_EQ(d.rc, 0);
    EXPECT_EQ(d.report.canceled, 2);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    ctx_clock_real();
}

/* A wait in a thread of its own. */
typedef struct {
    ctx_pool_t *pool;
    ctx_t *ctx;
    int tid, done, rc;
} waiter_t;

static void *waits(void *arg) {
    waiter_t *w = (waiter_t *)arg;
    store(&w->tid, thread_id());
    w->rc = ctx_pool_wait(w->pool, w->ctx);
    store(&w->done, 1);
    return NULL;
}

static pthread_t wait_apart(waiter_t *w, ctx_pool_t *pool, ctx_t *ctx) {
    memset(w, 0, sizeof *w);
    w->pool = pool;
    w->ctx = ctx;
    return thread_start(waits, w);
}

TEST(a_wait_returns_when_nothing_accepted_is_left_and_the_pool_stays_open) {
    for (int workers = 1; workers <= 3; workers++) {
        gate_t gate;
        waiter_t w;
        int ran = 0;
        gate_init(&gate);
        ctx_pool_t *pool = pool_of(workers, 16);
        EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0); /* there is nothing */
        occupy(pool, &gate, workers);
        for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        pthread_t thread = wait_apart(&w, pool, ctx_background());
        until_asleep(&w.tid);
        for (int i = 0; i < 8; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        EXPECT_EQ(load(&w.done), 0);
        gate_open(&gate);
        thread_join(thread);
        EXPECT_EQ(w.rc, 0);
        EXPECT_EQ(load(&ran), 16);
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0);
        EXPECT_EQ(load(&ran), 17);
        EXPECT_EQ(ctx_pool_drain(pool, 0, NULL), 0);
        EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0); /* a closed one has nothing left */
        ctx_pool_free(pool);
        gate_destroy(&gate);
    }
}

TEST(a_wait_ends_with_its_context) {
    gate_t gate;
    waiter_t w;
    gate_init(&gate);
    ctx_pool_t *pool = pool_of(1, 4);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    occupy(pool, &gate, 1);
    pthread_t thread = wait_apart(&w, pool, ctx);
    until_asleep(&w.tid);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(w.rc, CTX_CANCELED);
    EXPECT_EQ(ctx_pool_wait(pool, ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_pool_wait(NULL, ctx_background()), CTX_INVALID);
    EXPECT_EQ(ctx_pool_wait(pool, NULL), CTX_INVALID);
    ctx_end(ctx);
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    EXPECT_EQ(ctx_pool_wait(pool, ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    gate_open(&gate);
    EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

typedef struct {
    ctx_pool_t *pool;
    int waited; /* [atomic] waits that have returned 0 */
    int ran;    /* [atomic] others */
} among_t;

static int waits_among_others(ctx_t *ctx, void *arg) {
    among_t *among = (among_t *)arg;
    if (ctx_pool_wait(among->pool, ctx) == 0 && load(&among->ran) == 4) add(&among->waited, 1);
    return 0;
}

static int counts_slowly(ctx_t *ctx, void *arg) {
    (void)ctx;
    test_sleep_ms(1);
    add(&((among_t *)arg)->ran, 1);
    return 0;
}

static void waits_in_on_drop(const char *op, void *arg, int reason, void *user) {
    among_t *among = (among_t *)user;
    (void)op;
    (void)arg;
    (void)reason;
    EXPECT_EQ(ctx_pool_wait(among->pool, ctx_background()), 0);
    add(&among->waited, 1);
}

/* Tasks that wait do not wait for themselves or each other; who waits outside waits for them too. */
TEST(tasks_may_wait_for_all_others) {
    for (int waiters = 1; waiters <= 3; waiters++) {
        among_t among;
        memset(&among, 0, sizeof among);
        ctx_pool_t *pool = among.pool = pool_of(4, 16);
        for (int i = 0; i < 4; i++)
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "slow", counts_slowly, &among), 0);
        for (int i = 0; i < waiters; i++)
            EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_among_others, &among), 0);
        EXPECT_EQ(ctx_pool_wait(pool, ctx_background()), 0);
        EXPECT_EQ(load(&among.waited), waiters);
        EXPECT_EQ(ctx_pool_drain(pool, 0, NULL), 0);
        ctx_pool_free(pool);
    }
}

TEST(on_drop_may_wait_for_its_pool) {
    gate_t gate;
    among_t among;
    gate_init(&gate);
    memset(&among, 0, sizeof among);
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_DROP_OLDEST;
    desc.on_drop = waits_in_on_drop;
    desc.user = &among;
    ctx_pool_t *pool = among.pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "oldest", counts, &among.ran), 0);
    submitter_t s;
    pthread_t thread = submit_apart(&s, pool, ctx_background(), false, counts, &among.ran);
    until_asleep(&s.tid);
    EXPECT_EQ(load(&among.waited), 0);
    gate_open(&gate);
    thread_join(thread);
    EXPECT_EQ(among.waited, 1);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(among.ran, 1);
    ctx_pool_free(pool);
    gate_destroy(&gate);
}

/* -- free ------------------------------------------------------------------------------------------------------- */

TEST(freeing_an_undrained_pool_drops_its_queue_and_leaves_stuck_tasks_alone) {
    int threads = quiet_threads();
    gate_t gate;
    gate_init(&gate);
    drops_t drops;
    drops_init(&drops);
    ctx_sem_t *limit = (ctx_sem_t *)malloc(sizeof *limit);
    CHECK(limit != NULL);
    ctx_sem_init(limit, 2);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 16);
    desc.on_drop = note_drop;
    desc.user = &drops;
    desc.permits = limit;
    desc.task_timeout = CTX_S(3600);
    desc.grace = CTX_S(3600); /* free gives none */
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    seen_t seen[2];
    memset(seen, 0, sizeof seen);
    ctx_t *parent = with_request(ctx_background(), 3);
    for (int i = 0; i < 2; i++) {
        seen[i].gate = &gate;
        EXPECT_EQ(ctx_pool_submit(pool, parent, "stuck", looks_around, &seen[i]), 0);
        gate_await(&gate, i + 1);
    }
    ctx_end(parent);
    int ran = 0;
    for (int i = 0; i < 6; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    ctx_time_t from = ctx_now();
    ctx_pool_free(pool);
    EXPECT(ctx_now() - from < CTX_S(20));
    EXPECT_EQ(drops_count(&drops), 6);
    EXPECT(all_free(limit, 2)); /* the stuck ones have given theirs back */
    ctx_sem_destroy(limit);
    free(limit); /* and nobody comes back to it */
    ctx_end(lifetime);
    gate_open(&gate);
    UNTIL(load(&seen[0].done) && load(&seen[1].done));
    UNTIL(thread_count() <= threads);
    for (int i = 0; i < 2; i++) {
        EXPECT_EQ(seen[i].user, 3);
        EXPECT_EQ(seen[i].err_before, 0);
        EXPECT_EQ(seen[i].err_after, CTX_CANCELED);
    }
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(drops_count(&drops), 6);
    gate_destroy(&gate);
}

TEST(freeing_a_drained_pool_with_a_stuck_task_returns_at_once_too) {
    int threads = quiet_threads();
    gate_t gate;
    gate_init(&gate);
    ctx_sem_t *limit = (ctx_sem_t *)malloc(sizeof *limit);
    CHECK(limit != NULL);
    ctx_sem_init(limit, 1);
    ctx_pool_desc_t desc = describe(1, 16);
    desc.permits = limit;
    desc.grace = CTX_MS(1);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    occupy(pool, &gate, 1);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_MS(1), &report), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(report.stuck, 1);
    ctx_pool_free(pool);
    EXPECT(all_free(limit, 1));
    ctx_sem_destroy(limit);
    free(limit);
    gate_open(&gate);
    UNTIL(thread_count() <= threads);
    gate_destroy(&gate);
}

TEST(free_cancels_what_runs) {
    int threads = quiet_threads(), started = 0;
    ctx_pool_t *pool = pool_of(3, 16);
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 3);
    ctx_pool_free(pool);
    UNTIL(thread_count() <= threads); /* all have stopped */
}

TEST(a_pool_never_used_can_be_freed) {
    ctx_pool_free(pool_of(4, 16));
    ctx_pool_free(NULL);
}

static int frees_its_own_pool(ctx_t *ctx, void *arg) {
    inner_t *inner = (inner_t *)arg;
    gate_pass(inner->gate);
    inner->err_before = ctx_err(ctx);
    ctx_pool_free(inner->pool);
    inner->err_after = ctx_err(ctx); /* its context lives until it returns */
    const request_t *request = (const request_t *)ctx_value(ctx, &request_key);
    inner->rc = request ? request->user : -1;
    store(&inner->done, 1);
    return 0;
}

TEST(a_task_may_free_its_own_pool) {
    for (int limited = 0; limited < 2; limited++) {
        int threads = quiet_threads();
        gate_t gate;
        gate_init(&gate);
        drops_t drops;
        drops_init(&drops);
        ctx_sem_t limit;
        ctx_sem_init(&limit, 1);
        ctx_pool_desc_t desc = describe(limited ? 1 : 2, 16);
        desc.on_drop = note_drop;
        desc.user = &drops;
        desc.permits = limited ? &limit : NULL;
        ctx_pool_t *pool = pool_below(ctx_background(), &desc);
        inner_t inner;
        memset(&inner, 0, sizeof inner);
        inner.pool = pool;
        inner.gate = &gate;
        ctx_t *parent = with_request(ctx_background(), 11);
        EXPECT_EQ(ctx_pool_submit(pool, parent, "frees", frees_its_own_pool, &inner), 0);
        gate_await(&gate, 1);
        ctx_end(parent);
        int ran = 0, accepted = 0;
        for (int i = 0; i < 10; i++)
            if (ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran) == 0) accepted++;
        gate_open(&gate);
        UNTIL(load(&inner.done));
        UNTIL(thread_count() <= threads);
        EXPECT_EQ(inner.err_before, 0);
        EXPECT_EQ(inner.err_after, CTX_CANCELED);
        EXPECT_EQ(inner.rc, 11);
        UNTIL(load(&ran) + drops_count(&drops) == accepted);
        EXPECT_EQ(load(&ran) + drops_count(&drops), accepted);
        EXPECT(all_free(&limit, 1));
        gate_destroy(&gate);
    }
}

/* -- the lifetime ----------------------------------------------------------------------------------------------- */

TEST(the_end_of_the_lifetime_cancels_drops_and_refuses) {
    drops_t drops;
    drops_init(&drops);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 16);
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    int started = 0, ran = 0;
    for (int i = 0; i < 2; i++)
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 2);
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    ctx_cancel(lifetime);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", counts, &ran), CTX_CANCELED);
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "late", counts, &ran), CTX_CANCELED);
    void *args[2] = {&ran, &ran};
    size_t taken = 99;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "late", counts, args, 2, &taken), CTX_CANCELED);
    EXPECT_EQ(taken, 0);
    UNTIL(drops_count(&drops) == 5); /* no drain or free is needed for it */
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(drops.at[i].reason, CTX_CANCELED);
        EXPECT(strcmp(drops.at[i].op, "queued") == 0);
    }
    ctx_drain_report_t report;
    ctx_pool_drain(pool, CTX_FOREVER, &report);
    EXPECT_EQ(report.canceled, 2);
    EXPECT_EQ(report.dropped, 5);
    EXPECT_EQ(total(&report), 7);
    EXPECT_EQ(ran, 0);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    EXPECT_EQ(drops_count(&drops), 5);
}

TEST(the_end_of_the_lifetime_drops_the_queue_behind_a_stuck_task) {
    gate_t gate;
    gate_init(&gate);
    drops_t drops;
    drops_init(&drops);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(1, 16);
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    occupy(pool, &gate, 1);
    int ran = 0;
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "queued", counts, &ran), 0);
    ctx_cancel(lifetime);
    UNTIL(drops_count(&drops) == 5);
    gate_open(&gate);
    ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
    ctx_end(lifetime);
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(drops_count(&drops), 5);
    gate_destroy(&gate);
}

TEST(a_lifetime_that_expires_ends_the_pool) {
    ctx_t *lifetime = ctx_with_timeout(ctx_background(), CTX_MS(10));
    ctx_pool_desc_t desc = describe(1, 4);
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, NULL), 0);
    ctx_wait(lifetime, CTX_FOREVER);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", fails, NULL), CTX_DEADLINE_EXCEEDED);
    ctx_drain_report_t report;
    ctx_pool_drain(pool, CTX_FOREVER, &report);
    EXPECT_EQ(total(&report), 1);
    EXPECT_EQ(report.completed, 0);
    ctx_pool_free(pool);
    ctx_end(lifetime);
}

TEST(a_pool_below_a_done_lifetime_refuses_work) {
    ctx_t *done = ctx_with_cancel(ctx_background());
    ctx_t *failed = ctx_with_cancel(NULL);
    ctx_cancel(done);
    ctx_pool_desc_t desc = describe(1, 4);
    ctx_pool_t *pool = pool_below(done, &desc);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", fails, NULL), CTX_CANCELED);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    errno = 0;
    EXPECT(ctx_pool_new(failed, &desc) == NULL); /* a lifetime that never began is a bad argument */
    EXPECT_EQ(errno, EINVAL);
    ctx_end(done);
    ctx_end(failed);
}

TEST(the_caller_may_end_the_lifetime_before_the_pool_is_freed) {
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 16);
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    int started = 0;
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "waits", waits_for_cancel, &started), 0);
    UNTIL(load(&started) == 1);
    ctx_end(lifetime);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "late", fails, NULL), CTX_CANCELED);
    ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
}

/* -- coalescing ------------------------------------------------------------------------------------------------- */

TEST(gathered_tasks_run_in_time) {
    ctx_pool_desc_t desc = describe(1, 1024);
    desc.coalesce = CTX_MS(5);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int ran = 0, n = 0;
    for (int burst = 0; burst < 20; burst++) {
        for (int i = 0; i < 3; i++, n++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        test_sleep_ms(burst % 4);
    }
    UNTIL(load(&ran) == n); /* with no further submit to wake anybody */
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

TEST(after_a_quiet_while_the_next_submit_wakes) {
    ctx_pool_desc_t desc = describe(2, 1024);
    desc.coalesce = CTX_MS(2);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int ran = 0;
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
        UNTIL(load(&ran) == i + 1);
        test_sleep_ms(i * 40);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

static int notes_its_tid(ctx_t *ctx, void *arg) {
    (void)ctx;
    store((int *)arg, thread_id());
    return 0;
}

/* A worker that was busy just now naps, and submitters leave it alone; a drain does not. */
TEST(tasks_gather_while_a_worker_naps_and_a_drain_does_not_wait_for_it) {
    ctx_pool_desc_t desc = describe(1, 64);
    desc.coalesce = CTX_S(3600);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int tid = 0, ran = 0;
    void *args[40]; /* more than half a queue: these are not left to lie */
    for (int i = 0; i < 40; i++) args[i] = &tid;
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "first", notes_its_tid, args, 40, NULL), 0);
    until_asleep(&tid);
    for (int i = 0; i < 3; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    until_asleep(&tid);
    EXPECT_EQ(load(&ran), 0);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_S(100), &report), 0);
    EXPECT_EQ(load(&ran), 3);
    EXPECT_EQ(report.completed, 43);
    EXPECT_EQ(total(&report), 43);
    ctx_pool_free(pool);
}

TEST(a_queue_over_half_full_is_not_left_to_gather) {
    enum { QUEUE = 8, N = 8 };
    ctx_pool_desc_t desc = describe(1, QUEUE);
    desc.coalesce = CTX_S(3600);
    ctx_pool_t *pool = pool_below(ctx_background(), &desc);
    int ran = 0;
    for (int i = 0; i < N; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    UNTIL(load(&ran) >= N - QUEUE / 2); /* half a queue may lie there for the hour, more may not */
    for (int i = 0; i < 20 * N; i++) EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "count", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT_EQ(ran, 21 * N);
    ctx_pool_free(pool);
}

TEST(the_end_of_the_lifetime_wakes_a_gathering_pool) {
    drops_t drops;
    drops_init(&drops);
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(1, 64);
    desc.coalesce = CTX_S(3600);
    desc.on_drop = note_drop;
    desc.user = &drops;
    ctx_pool_t *pool = pool_below(lifetime, &desc);
    int ran = 0;
    for (int i = 0; i < 5; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    ctx_cancel(lifetime);
    UNTIL(load(&ran) + drops_count(&drops) == 5);
    ctx_pool_free(pool);
    ctx_end(lifetime);
}

/* -- bad arguments and short supplies --------------------------------------------------------------------------- */

TEST(a_queue_for_a_burst_holds_what_comes_too_fast) {
    EXPECT_EQ(ctx_pool_queue_for_burst(1000, 200, 2), 1600);
    EXPECT_EQ(ctx_pool_queue_for_burst(1000.5, 1000, 1), 1); /* rounded up */
    EXPECT_EQ(ctx_pool_queue_for_burst(3, 1, 1.25), 3);
    EXPECT_EQ(ctx_pool_queue_for_burst(100, 100, 10), 1);
    EXPECT_EQ(ctx_pool_queue_for_burst(100, 300, 10), 1);
    EXPECT_EQ(ctx_pool_queue_for_burst(0, 0, 0), 1);
    EXPECT_EQ(ctx_pool_queue_for_burst(1000, 0, -1), 1);
    EXPECT(ctx_pool_queue_for_burst(1e300, 0, 1e300) >= 1);
    volatile double zero = 0;
    EXPECT_EQ(ctx_pool_queue_for_burst(zero / zero, 0, 1), 1);
}

TEST(bad_arguments_are_invalid) {
    ctx_pool_desc_t desc = describe(1, 4);
    errno = 0;
    EXPECT(ctx_pool_new(NULL, &desc) == NULL);
    EXPECT_EQ(errno, EINVAL);
    desc.workers = -1;
    errno = 0;
    EXPECT(ctx_pool_new(ctx_background(), &desc) == NULL);
    EXPECT_EQ(errno, EINVAL);
    ctx_pool_t *pool = pool_of(1, 4);
    int ran = 0;
    void *args[1] = {&ran};
    size_t taken = 99;
    EXPECT_EQ(ctx_pool_submit(NULL, ctx_background(), "op", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit(pool, NULL, "op", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "op", NULL, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_wait(NULL, ctx_background(), "op", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_wait(pool, NULL, "op", counts, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_wait(pool, ctx_background(), "op", NULL, &ran), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_batch(pool, NULL, "op", counts, args, 1, &taken), CTX_INVALID);
    EXPECT_EQ(taken, 0);
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "op", NULL, args, 1, NULL), CTX_INVALID);
    EXPECT_EQ(ctx_pool_submit_batch(pool, ctx_background(), "op", counts, NULL, 1, NULL), CTX_INVALID);
    EXPECT_EQ(ctx_pool_drain(NULL, 0, NULL), CTX_INVALID);
    ctx_drain_report_t report;
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
    EXPECT_EQ(total(&report), 0);
    EXPECT_EQ(ran, 0);
    ctx_pool_free(pool);
}

TEST(a_pool_that_cannot_be_had_is_null_and_leaks_nothing) {
    ctx_runtime_stop();
    long live = fault_live();
    ctx_t *lifetime = ctx_with_cancel(ctx_background());
    ctx_pool_desc_t desc = describe(2, 16);
    desc.task_timeout = CTX_S(1);
    for (long n = 0;; n++) {
        errno = 0;
        fault_after(n);
        ctx_pool_t *pool = ctx_pool_new(lifetime, &desc);
        int err = errno;
        bool failed = fault_off();
        if (!failed) CHECK(pool != NULL);
        if (!pool) EXPECT_EQ(err, ENOMEM);
        ctx_pool_free(pool);
        if (!failed) break;
    }
    ctx_end(lifetime);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), live);
}

/* Memory fails at each allocation in turn while tasks are submitted and run: each that was accepted still runs or is
   dropped, once. */
TEST(without_memory_each_accepted_task_still_runs_or_is_dropped) {
    for (int all = 0; all < 2; all++) {
        for (long n = 0; n < 6; n++) {
            drops_t drops;
            drops_init(&drops);
            ctx_pool_desc_t desc = describe(2, 16);
            desc.task_timeout = CTX_S(3600);
            desc.on_drop = note_drop;
            desc.user = &drops;
            ctx_pool_t *pool = pool_below(ctx_background(), &desc);
            int ran = 0, accepted = 0;
            if (all)
                fault_all_after(n);
            else
                fault_after(n);
            for (int i = 0; i < 10; i++)
                if (ctx_pool_submit(pool, ctx_background(), "count", counts, &ran) == 0) accepted++;
            ctx_drain_report_t report;
            EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, &report), 0);
            fault_off();
            EXPECT_EQ(total(&report), accepted);
            EXPECT_EQ(report.dropped, drops_count(&drops));
            EXPECT_EQ(load(&ran) + drops_count(&drops), accepted);
            for (int i = 0; i < drops_count(&drops); i++) EXPECT_EQ(drops.at[i].reason, CTX_NO_MEMORY);
            ctx_pool_free(pool);
        }
    }
}

TEST(without_threads_each_accepted_task_still_runs_or_is_dropped) {
    for (int all = 0; all < 2; all++) {
        for (long n = 0; n < 5; n++) {
            ctx_runtime_stop(); /* so that the timer thread is wanted again as well */
            drops_t drops;
            drops_init(&drops);
            ctx_pool_desc_t desc = describe(3, 16);
            desc.task_timeout = CTX_S(3600);
            desc.on_drop = note_drop;
            desc.user = &drops;
            desc.grace = CTX_MS(10);
            ctx_pool_t *pool = pool_below(ctx_background(), &desc);
            int ran = 0, accepted = 0;
            if (all)
                fault_threads_all_after(n);
            else
                fault_threads_after(n);
            for (int i = 0; i < 10; i++) {
                int rc = ctx_pool_submit(pool, ctx_background(), "count", counts, &ran);
                EXPECT(rc <= 0);
                if (rc == 0) accepted++;
            }
            ctx_drain_report_t report;
            ctx_pool_drain(pool, CTX_S(2), &report);
            fault_threads_off();
            EXPECT_EQ(report.stuck, 0);
            EXPECT_EQ(total(&report), accepted);
            EXPECT_EQ(report.dropped, drops_count(&drops));
            ctx_pool_free(pool);
            EXPECT_EQ(load(&ran) + drops_count(&drops), accepted);
        }
    }
}

TEST(a_pool_recovers_when_threads_can_be_had_again) {
    ctx_pool_t *pool = pool_of(2, 16);
    int ran = 0, accepted = 0;
    fault_threads_all_after(0);
    for (int i = 0; i < 3; i++)
        if (ctx_pool_submit(pool, ctx_background(), "early", counts, &ran) == 0) accepted++;
    fault_threads_off();
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "later", counts, &ran), 0);
        accepted++;
    }
    UNTIL(load(&ran) == accepted);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

TEST(with_fewer_threads_than_workers_all_work_is_done) {
    ctx_pool_t *pool = pool_of(4, 64);
    int ran = 0;
    fault_threads_all_after(1);
    for (int i = 0; i < 50; i++) EXPECT_EQ(ctx_pool_submit(pool, ctx_background(), "count", counts, &ran), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    EXPECT(fault_threads_off());
    EXPECT_EQ(ran, 50);
    ctx_pool_free(pool);
}

/* -- all at once ------------------------------------------------------------------------------------------------ */

enum { POOL_TASKS = 5000, SUBMITTERS = 2, ENDERS = 2, BATCH = 16 };

typedef struct million million_t;

typedef struct {
    million_t *million;
    unsigned char fate; /* [atomic] how often it ran or was dropped; or was refused, by its submitter */
} slot_t;

struct million {
    ctx_pool_t *pool;
    ctx_t *lifetime;
    slot_t *slots;
    int n, kind;
    int next_half;   /* [atomic] */
    int accepted;    /* [atomic] */
    int runs, drops; /* [atomic] */
};

static void meet_fate(void *arg) { __atomic_add_fetch(&((slot_t *)arg)->fate, 1, __ATOMIC_ACQ_REL); }

static int runs_one_of_a_million(ctx_t *ctx, void *arg) {
    slot_t *slot = (slot_t *)arg;
    size_t place = (size_t)slot & 0xfff;
    meet_fate(slot);
    if (place % 512 == 0) return ctx_sleep(ctx, CTX_US(50));
    if (place % 64 == 0) sched_yield();
    return place % 32 == 0 ? -5 : 0;
}

static void drops_one_of_a_million(const char *op, void *arg, int reason, void *user) {
    (void)op;
    (void)user;
    EXPECT(reason < 0);
    meet_fate(arg);
}

static void *submits_half_of_them(void *arg) {
    million_t *m = (million_t *)arg;
    int half = add(&m->next_half, 1) - 1;
    int from = m->n * half / SUBMITTERS, until = m->n * (half + 1) / SUBMITTERS;
    for (int i = from; i < until;) {
        if (i % 3 == 0 && until - i >= BATCH) {
            void *args[BATCH];
            for (int k = 0; k < BATCH; k++) args[k] = &m->slots[i + k];
            size_t taken = 0;
            int rc =
                ctx_pool_submit_batch(m->pool, ctx_background(), "batch", runs_one_of_a_million, args, BATCH, &taken);
            EXPECT((rc == 0) == (taken == BATCH));
            add(&m->accepted, (int)taken);
            for (int k = (int)taken; k < BATCH; k++) meet_fate(&m->slots[i + k]);
            i += BATCH;
            continue;
        }
        int rc = i % 3 == 1
                     ? ctx_pool_submit_wait(m->pool, ctx_background(), "wait", runs_one_of_a_million, &m->slots[i])
                     : ctx_pool_submit(m->pool, ctx_background(), "one", runs_one_of_a_million, &m->slots[i]);
        if (rc == 0)
            add(&m->accepted, 1);
        else
            meet_fate(&m->slots[i]);
        i++;
    }
    return NULL;
}

static void *ends_the_pool(void *arg) {
    million_t *m = (million_t *)arg;
    for (int turns = 0; load(&m->accepted) < m->n / 4 && turns < 20000; turns++) sched_yield();
    switch (m->kind) {
        case 0: ctx_pool_drain(m->pool, CTX_FOREVER, NULL); break;
        case 1: ctx_pool_drain(m->pool, CTX_US(200), NULL); break;
        case 2: ctx_cancel(m->lifetime); break;
        default: break; /* freed as it is */
    }
    return NULL;
}

static void one_pool_of_the_million(int number, slot_t *slots, int n, ctx_sem_t *limit) {
    static const ctx_when_full_t policies[] = {CTX_REJECT, CTX_BLOCK, CTX_CALLER_RUNS, CTX_DROP_OLDEST};
    million_t m;
    memset(&m, 0, sizeof m);
    m.lifetime = ctx_with_cancel(ctx_background());
    m.slots = slots;
    m.n = n;
    m.kind = number / 4 % 4;
    ctx_pool_desc_t desc = describe(1 + number % 4, 16u << number % 5);
    desc.when_full = policies[number % 4];
    desc.on_drop = drops_one_of_a_million;
    desc.permits = number % 3 == 0 ? limit : NULL;
    desc.task_timeout = number % 2 ? CTX_S(1) : 0;
    desc.coalesce = number % 5 == 0 ? CTX_US(100) : 0;
    desc.grace = CTX_MS(number % 7);
    m.pool = pool_below(m.lifetime, &desc);
    pthread_t submitters[SUBMITTERS], enders[ENDERS];
    for (int i = 0; i < SUBMITTERS; i++) submitters[i] = thread_start(submits_half_of_them, &m);
    for (int i = 0; i < ENDERS; i++) enders[i] = thread_start(ends_the_pool, &m);
    for (int i = 0; i < SUBMITTERS; i++) thread_join(submitters[i]);
    for (int i = 0; i < ENDERS; i++) thread_join(enders[i]);
    if (m.kind < 3) {
        ctx_drain_report_t report;
        ctx_pool_drain(m.pool, CTX_FOREVER, &report);
        EXPECT_EQ(total(&report), m.accepted);
        EXPECT_EQ(report.stuck, 0);
    }
    ctx_pool_free(m.pool);
    ctx_end(m.lifetime);
}

TEST(million_tasks_run_or_drop_exactly_once) {
    int threads = quiet_threads();
    int n = test_scale(1000000);
    slot_t *slots = (slot_t *)calloc((size_t)n, sizeof *slots);
    CHECK(slots != NULL);
    ctx_sem_t limit;
    ctx_sem_init(&limit, 2);
    for (int from = 0, number = 0; from < n; from += POOL_TASKS, number++)
        one_pool_of_the_million(number, slots + from, n - from < POOL_TASKS ? n - from : POOL_TASKS, &limit);
    UNTIL(thread_count() <= threads); /* what was freed while it ran has ended */
    int once = 0, lost = 0, doubled = 0;
    for (int i = 0; i < n; i++) {
        int fate = __atomic_load_n(&slots[i].fate, __ATOMIC_ACQUIRE);
        if (fate == 1)
            once++;
        else if (fate == 0)
            lost++;
        else
            doubled++;
    }
    EXPECT_EQ(lost, 0);
    EXPECT_EQ(doubled, 0);
    EXPECT_EQ(once, n);
    EXPECT(all_free(&limit, 2));
    ctx_sem_destroy(&limit);
    free(slots);
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST_MAIN
