/* Section 11 when memory or threads cannot be had: channels, selects and stages fail safely, and lose no item. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

/* -- channels --------------------------------------------------------------------------------------------------- */

TEST(a_channel_that_memory_does_not_suffice_for_is_null_with_errno) {
    for (int n = 0;; n++) {
        errno = 0;
        fault_after(n);
        ctx_chan_t *chan = ctx_chan_new(sizeof(int), 10);
        if (!fault_off()) {
            EXPECT(chan != NULL);
            ctx_chan_free(chan);
            break;
        }
        EXPECT(chan == NULL);
        EXPECT_EQ(errno, ENOMEM);
    }
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

typedef struct {
    ctx_chan_t *chan, *beside;
    ctx_t *ctx;
    int op, item;
    int tid; /* [atomic] */
    int rc;
} actor_t;

/* By a select of 16 cases if there is something beside. */
static int act(actor_t *a) {
    if (!a->beside)
        return a->op == CTX_SEND ? ctx_chan_send(a->chan, a->ctx, &a->item) : ctx_chan_recv(a->chan, a->ctx, &a->item);
    ctx_case_t cases[16];
    memset(cases, 0, sizeof cases);
    for (int i = 0; i < 16; i++) {
        cases[i].chan = i == 9 ? a->chan : a->beside;
        cases[i].op = i == 9 ? a->op : CTX_RECV;
        cases[i].item = i == 9 ? &a->item : NULL;
    }
    int at = ctx_select(a->ctx, cases, 16);
    return at < 0 ? at : cases[at].rc;
}

static void *acts(void *arg) {
    actor_t *a = (actor_t *)arg;
    store(&a->tid, thread_id());
    a->rc = act(a);
    return NULL;
}

static pthread_t act_parked(actor_t *a, ctx_chan_t *chan, ctx_chan_t *beside, ctx_t *ctx, int op) {
    memset(a, 0, sizeof *a);
    a->chan = chan;
    a->beside = beside;
    a->ctx = ctx;
    a->op = op;
    a->item = op == CTX_SEND ? 5 : -1;
    pthread_t thread = thread_start(acts, a);
    until_asleep(&a->tid);
    return thread;
}

/* One of two that wait is canceled, the other served; then one more is ended by the close. */
static void wait_in_each_way(ctx_chan_t *chan, ctx_chan_t *beside, int op) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    actor_t leaves, stays, last;
    int item = 5;
    fault_all_after(0);
    pthread_t a = act_parked(&leaves, chan, beside, ctx, op);
    pthread_t b = act_parked(&stays, chan, beside, ctx_background(), op);
    ctx_cancel(ctx);
    thread_join(a);
    EXPECT_EQ(op == CTX_SEND ? ctx_chan_try_recv(chan, &item) : ctx_chan_try_send(chan, &item), 0);
    thread_join(b);
    pthread_t c = act_parked(&last, chan, beside, ctx_background(), op);
    EXPECT_EQ(ctx_chan_close(chan), 0);
    thread_join(c);
    EXPECT(!fault_off());
    EXPECT_EQ(leaves.rc, CTX_CANCELED);
    EXPECT_EQ(stays.rc, 0);
    EXPECT_EQ(item, 5);
    EXPECT_EQ(last.rc, CTX_CLOSED);
    ctx_end(ctx);
}

TEST(sending_receiving_selecting_and_canceling_allocate_nothing) {
    for (int k = 0; k < 4; k++) {
        ctx_chan_t *chan = ctx_chan_new(sizeof(int), 0), *beside = ctx_chan_new(sizeof(int), 1);
        wait_in_each_way(chan, k / 2 ? beside : NULL, k % 2 ? CTX_SEND : CTX_RECV);
        ctx_chan_free(chan);
        ctx_chan_free(beside);
    }
}

TEST(a_large_select_without_memory_does_nothing) {
    enum { MANY = 17 };
    ctx_chan_t *chan = ctx_chan_new(sizeof(int), MANY);
    ctx_case_t cases[MANY];
    int item = 5;
    memset(cases, 0, sizeof cases);
    for (int i = 0; i < MANY; i++) {
        cases[i].chan = chan;
        cases[i].op = CTX_SEND;
        cases[i].item = &item;
    }
    fault_all_after(0);
    EXPECT_EQ(ctx_select(ctx_background(), cases, MANY), CTX_NO_MEMORY);
    EXPECT_EQ(ctx_try_select(cases, MANY), CTX_NO_MEMORY);
    EXPECT_EQ(ctx_chan_len(chan), 0);
    EXPECT(ctx_select(ctx_background(), cases, MANY - 1) >= 0); /* so many need none */
    EXPECT_EQ(ctx_chan_len(chan), 1);
    EXPECT(fault_off());
    EXPECT(ctx_select(ctx_background(), cases, MANY) >= 0);
    EXPECT_EQ(ctx_chan_len(chan), 2);
    ctx_chan_free(chan);
}

/* -- stages ----------------------------------------------------------------------------------------------------- */

enum { ITEMS = 40 };

typedef struct {
    ctx_chan_t *in, *out;
    ctx_stage_desc_t desc;
    int dead[ITEMS];
    int letters;
    gate_t gate;
} scene_t;

static int passes(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)user;
    *(int *)out = *(const int *)in;
    return 0;
}

static int stops_at_gate(ctx_t *ctx, const void *in, void *out, void *user) {
    gate_pass(&((scene_t *)user)->gate);
    return passes(ctx, in, out, user);
}

static void writes_letter(const void *item, int reason, void *user) {
    scene_t *s = (scene_t *)user;
    EXPECT(reason < 0);
    s->dead[*(const int *)item]++;
    s->letters++;
}

static void scene_open(scene_t *s, ctx_on_cancel_t policy, int workers, bool ordered) {
    memset(s, 0, sizeof *s);
    s->in = ctx_chan_new(sizeof(int), ITEMS);
    s->out = ctx_chan_new(sizeof(int), ITEMS);
    for (int i = 0; i < ITEMS; i++) EXPECT_EQ(ctx_chan_try_send(s->in, &i), 0);
    gate_init(&s->gate);
    s->desc.in = s->in;
    s->desc.out = s->out;
    s->desc.fn = passes;
    s->desc.dead_letter = writes_letter;
    s->desc.on_cancel = policy;
    s->desc.workers = workers;
    s->desc.ordered = ordered;
    s->desc.user = s;
}

/* Each item is in one place, and `.out` is closed. */
static void scene_accounts(scene_t *s) {
    int item, rc;
    while ((rc = ctx_chan_try_recv(s->out, &item)) == 0) s->dead[item]++;
    EXPECT_EQ(rc, CTX_CLOSED);
    while (ctx_chan_try_recv(s->in, &item) == 0) s->dead[item]++;
    for (int i = 0; i < ITEMS; i++) EXPECT_EQ(s->dead[i], 1);
}

static void scene_close(scene_t *s) {
    gate_open(&s->gate);
    gate_destroy(&s->gate);
    ctx_chan_free(s->in);
    ctx_chan_free(s->out);
}

static const ctx_on_cancel_t policies[] = {CTX_CANCEL_DROP, CTX_CANCEL_DEAD_LETTER, CTX_CANCEL_FINISH};

/* Runs it to its end while something cannot be had: either it does without, or says so and loses nothing. */
static bool runs_short(scene_t *s, bool (*off)(void)) {
    ctx_chan_close(s->in);
    int rc = ctx_stage_run(ctx_background(), &s->desc);
    bool was_short = off();
    EXPECT(rc == 0 || (was_short && rc == CTX_NO_MEMORY));
    if (rc == 0) EXPECT_EQ(ctx_chan_len(s->out), ITEMS);
    scene_accounts(s);
    scene_close(s);
    return was_short;
}

TEST(a_stage_that_memory_does_not_suffice_for_loses_nothing) {
    for (int k = 0; k < 6; k++)
        for (int n = 0;; n++) {
            scene_t s;
            ctx_runtime_stop();
            scene_open(&s, policies[k % 3], 4, k >= 3);
            fault_after(n);
            if (!runs_short(&s, fault_off)) break;
        }
}

TEST(a_stage_without_any_memory_loses_nothing) {
    for (int k = 0; k < 6; k++) {
        scene_t s;
        ctx_runtime_stop();
        scene_open(&s, policies[k % 3], 1 + k / 3 * 3, false);
        fault_all_after(0);
        runs_short(&s, fault_off);
    }
}

TEST(a_stage_with_fewer_threads_than_workers_loses_nothing) {
    for (int k = 0; k < 6; k++)
        for (int n = 0; n < 4; n++) {
            scene_t s;
            ctx_runtime_stop(); /* no idle threads */
            scene_open(&s, policies[k % 3], 4, k >= 3);
            fault_threads_all_after(n);
            runs_short(&s, fault_threads_off);
        }
}

/* The one worker that there is comes to its end just before the stage learns that there is no thread for the next. */
static int worker_tid; /* [atomic] */
static gate_t *worker_gate;

static int says_who(ctx_t *ctx, const void *in, void *out, void *user) {
    int rc = stops_at_gate(ctx, in, out, user); /* nobody is idle until the next thread is asked for */
    store(&worker_tid, thread_id());
    return rc;
}

static void until_worker_is_idle(void) {
    gate_open(worker_gate);
    until_asleep(&worker_tid);
}

TEST(a_stage_whose_only_worker_is_done_when_no_other_thread_can_be_had_succeeds) {
    for (int ordered = 0; ordered < 2; ordered++) {
        scene_t s;
        ctx_runtime_stop(); /* no idle threads */
        scene_open(&s, CTX_CANCEL_FINISH, 2, ordered);
        s.desc.fn = says_who;
        s.desc.finish_budget = CTX_S(60);
        ctx_chan_close(s.in);
        store(&worker_tid, 0);
        worker_gate = &s.gate;
        fault_threads_before = until_worker_is_idle;
        fault_threads_all_after(1);
        EXPECT_EQ(ctx_stage_run(ctx_background(), &s.desc), 0);
        EXPECT(fault_threads_off());
        fault_threads_before = NULL;
        EXPECT_EQ(ctx_chan_len(s.out), ITEMS);
        EXPECT_EQ(s.letters, 0);
        scene_accounts(&s);
        scene_close(&s);
    }
}

typedef struct {
    scene_t scene;
    ctx_t *ctx;
    int rc;
} run_t;

static void *runs(void *arg) {
    run_t *run = (run_t *)arg;
    run->rc = ctx_stage_run(run->ctx, &run->scene.desc);
    return NULL;
}

TEST(canceling_a_stage_needs_no_memory_and_no_thread) {
    for (int k = 0; k < 6; k++) {
        run_t run;
        scene_open(&run.scene, policies[k % 3], 4, k >= 3);
        run.scene.desc.fn = stops_at_gate;
        run.ctx = ctx_with_cancel(ctx_background());
        pthread_t thread = thread_start(runs, &run);
        gate_await(&run.scene.gate, 4);
        fault_all_after(0);
        fault_threads_all_after(0);
        ctx_cancel(run.ctx);
        gate_open(&run.scene.gate);
        thread_join(thread);
        EXPECT(!fault_off());
        EXPECT(!fault_threads_off());
        EXPECT_EQ(run.rc, CTX_CANCELED);
        EXPECT_EQ(run.scene.letters, k % 3 ? ITEMS : 4);
        scene_accounts(&run.scene);
        scene_close(&run.scene);
        ctx_end(run.ctx);
    }
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST_MAIN
