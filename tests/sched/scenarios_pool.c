/* Pools: work and an idle worker never stay apart, every accepted task runs once or is dropped once, a drain returns
   when all is done and not before. Scenarios of what version 0.1 has too compile there. */
#include "sched.h"

#ifdef CTX__LOOK /* version 0.1 has no such thing, and no turns */
#define POOL_NOW 1
#define POOL_IN(pool) (&(pool)->ring.in)
#define POOL_BLOCKED(pool) ((pool)->blocked.first != NULL)
#else
#define POOL_NOW 0
#define POOL_IN(pool) (&(pool)->in)
#define POOL_BLOCKED(pool) ((pool)->blocked != NULL)
#endif

/* -- what the scenarios share -- */

static ctx_pool_t *pool, *other;
static ctx_t *lifetime, *parent;
static ctx_sem_t permits;
static int64_t permits_total;
static int forever; /* the drain of check may have to be cut: then it is not 0 */
static bool drains_inside; /* a is a task that drains the pool */
static bool timers; /* the scenario may start the runtime thread */

/* One task. A flag lets another thread sleep until it is set. */
typedef struct piece {
    sched_flag_t began, over, go; /* `go`: what a task that holds waits for */
    int rc, ran, dropped, place;
    bool given;             /* written by the submitter, plain: the task sees it */
    bool asked; /* rc is set */
    struct piece *meets;
} piece_t;
static piece_t a, b, c, d;
static sched_flag_t gate, tried, drained;
static int placed; /* [atomic] tasks that have begun */
static int inside, inside_most; /* under the one permit */

static void await(sched_flag_t *flag) {
    while (!sched_is_set(flag)) ctx__sched_block(flag, 0);
}

/* The sentence of the section. Any thread may ask it at any moment. */
static void invariant(void) {
#if POOL_NOW
    ctx__lock(&pool->ring.in);
    if (pool->idle && ctx__pool_has_work(pool))
        SCHED_CHECK(pool->looking || (pool->promised && !pool->closed && !ctx__pool_past_half(pool)));
    ctx__unlock(&pool->ring.in);
#endif
}
static void watch(void) { invariant(); }

static int drained_for_good; /* a drain has returned 0: no task begins any more */
static void drain_over(void) { __atomic_store_n(&drained_for_good, 1, __ATOMIC_RELAXED); }

static void piece_begin(piece_t *piece) {
    SCHED_CHECK(!__atomic_load_n(&drained_for_good, __ATOMIC_RELAXED));
    SCHED_CHECK(piece->given);
    piece->ran++;
    piece->place = __atomic_add_fetch(&placed, 1, __ATOMIC_RELAXED);
    sched_set(&piece->began);
}
static int piece_end(piece_t *piece, int rc) {
    sched_set(&piece->over);
    return rc;
}

/* Kinds of tasks. */
static int runs(ctx_t *ctx, void *arg) {
    SCHED_CHECK(ctx != NULL);
    piece_begin((piece_t *)arg);
    return piece_end((piece_t *)arg, 0);
}
static int meets(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    SCHED_CHECK(ctx != NULL);
    piece_begin(piece);
    await(&piece->meets->began);
    return piece_end(piece, 0);
}
static int holds(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    SCHED_CHECK(ctx != NULL);
    piece_begin(piece);
    await(&piece->go);
    return piece_end(piece, 0);
}
static int passes_gate(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    SCHED_CHECK(ctx != NULL);
    piece_begin(piece);
    await(&gate);
    return piece_end(piece, 0);
}
static int waits_for_end(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    piece_begin(piece);
    return piece_end(piece, ctx_wait(ctx, CTX_FOREVER));
}
static int counts_inside(ctx_t *ctx, void *arg) {
    SCHED_CHECK(ctx != NULL);
    piece_begin((piece_t *)arg);
    if (++inside > inside_most) inside_most = inside;
    ctx__sched_relax();
    inside--;
    return piece_end((piece_t *)arg, 0);
}

static piece_t *drop_awaits; /* on_drop returns when this one has begun */
static bool drop_drains;
static void on_drop(const char *op, void *arg, int reason, void *user) {
    piece_t *piece = (piece_t *)arg;
    SCHED_CHECK(op && reason < 0 && user == &pool);
    if (drop_awaits) await(&drop_awaits->began);
    piece->dropped++;
    if (drop_drains) SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    sched_set(&piece->over);
}

static int submit(piece_t *piece, const char *op, ctx_task_fn fn) {
    piece->given = true;
    piece->rc = ctx_pool_submit(pool, ctx_background(), op, fn, piece);
    piece->asked = true;
    return piece->rc;
}
static int submit_wait(piece_t *piece, ctx_t *below, ctx_task_fn fn) {
    piece->given = true;
    piece->rc = ctx_pool_submit_wait(pool, below, "wait", fn, piece);
    piece->asked = true;
    return piece->rc;
}
static void submit_both(ctx_task_fn fn) {
    void *args[2];
    size_t taken = 0;
    a.given = b.given = true;
    args[0] = &a;
    args[1] = &b;
    SCHED_CHECK(ctx_pool_submit_batch(pool, ctx_background(), "batch", fn, args, 2, &taken) == 0 && taken == 2);
    a.asked = b.asked = true;
}

static unsigned idle_now(void) {
    unsigned n;
    ctx__lock(POOL_IN(pool));
    n = pool->idle_count;
    ctx__unlock(POOL_IN(pool));
    return n;
}
static bool blocked_now(void) {
    bool any;
    ctx__lock(POOL_IN(pool));
    any = POOL_BLOCKED(pool);
    ctx__unlock(POOL_IN(pool));
    return any;
}
/* Until a submitter waits for room, or has waited. */
static void await_blocked(void) {
    while (!blocked_now() && !sched_is_set(&tried)) ctx__sched_relax();
}
static void await_idle(unsigned n) {
    while (idle_now() < n) ctx__sched_relax();
}

static ctx_pool_desc_t describe(int workers, size_t queue) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    desc.on_drop = on_drop;
    desc.user = &pool;
    desc.grace = CTX_FOREVER; /* a wake-up that is lost shall show */
    a.meets = &b;
    b.meets = &a;
    return desc;
}
static void make(const ctx_pool_desc_t *desc) {
    lifetime = ctx_with_cancel(ctx_background());
    parent = ctx_with_cancel(ctx_background());
    pool = ctx_pool_new(lifetime, desc);
    SCHED_CHECK(pool != NULL);
}
static void have_permits(int64_t total, int64_t held) {
    SCHED_CHECK(ctx_sem_init(&permits, total) == 0);
    if (held) SCHED_CHECK(ctx_sem_try_acquire(&permits, held));
    permits_total = total;
}

/* Start all workers that the pool may have, and let them go to sleep. */
static piece_t warm_up[3];
static sched_flag_t warm;
static int warms(ctx_t *ctx, void *arg) {
    sched_set(&((piece_t *)arg)->began);
    while (!sched_is_set(&warm)) ctx__sched_block(&warm, 0);
    return ctx_err(ctx);
}
static uint64_t warmed; /* tasks of setup */
static void have_idle(int n) {
    int i;
    for (i = 0; i < n; i++) {
        SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "warm", warms, &warm_up[i]) == 0);
        await(&warm_up[i].began);
    }
    warmed += (uint64_t)n;
    sched_set(&warm);
    await_idle((unsigned)n);
}
/* A task stands in a worker until `gate` is set. */
static void have_busy(piece_t *piece) {
    SCHED_CHECK(submit(piece, "busy", passes_gate) == 0);
    await(&piece->began);
}

/* It ran once or was dropped once, if it was accepted; else neither. Returns 1 if it was accepted. */
static unsigned piece_check(const piece_t *piece) {
    SCHED_CHECK(piece->ran + piece->dropped == (piece->asked && piece->rc == 0));
    return piece->asked && piece->rc == 0;
}
static void let_end(void) { /* threads that nobody joins */
    int i;
    for (i = 0; i < 20; i++) ctx__sched_relax();
}
static void check_pieces(void) {
    piece_check(&a);
    piece_check(&b);
    piece_check(&c);
    piece_check(&d);
}
static void check_permits(void) {
    if (!permits_total) return;
    let_end();
    SCHED_CHECK(ctx_sem_try_acquire(&permits, permits_total)); /* a pool with nothing to run keeps none */
    ctx_sem_release(&permits, permits_total);
}
static void check_end(void) {
    ctx_end(lifetime);
    ctx_end(parent);
    if (timers) ctx_runtime_stop();
}
static void check(void) {
    ctx_drain_report_t report;
    uint64_t accepted;
    int rc;
    invariant();
    if (drains_inside) await(&a.over), let_end(); /* a drain does not wait for a task that drains */
    rc = ctx_pool_drain(pool, CTX_FOREVER, &report);
    SCHED_CHECK(rc == 0 || forever);
    check_pieces();
    accepted = piece_check(&a) + piece_check(&b) + piece_check(&c) + piece_check(&d) + warmed;
    SCHED_CHECK(report.completed + report.failed + report.canceled + report.dropped == accepted);
    SCHED_CHECK(report.stuck == 0);
    check_permits();
    ctx_pool_free(pool);
    check_permits();
    check_end();
}

/* -- sleep and wake -- */

static void setup_cold(int workers) {
    ctx_pool_desc_t desc = describe(workers, 4);
    make(&desc);
}
static void setup_1_cold(void) { setup_cold(1); }
static void setup_2_cold(void) { setup_cold(2); }
static void setup_idle(int workers) {
    setup_cold(workers);
    have_idle(workers);
}
static void setup_1(void) { setup_idle(1); }
static void setup_2(void) { setup_idle(2); }
static void setup_3(void) { setup_idle(3); }

static void submit_a(void) {
    SCHED_CHECK(submit(&a, "a", runs) == 0);
    await(&a.over);
}
static void submit_b(void) {
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    await(&b.over);
}
static void submit_a_then_b(void) {
    submit_a();
    submit_b();
}
static void submit_c(void) {
    SCHED_CHECK(submit(&c, "c", runs) == 0);
    await(&c.over);
}
static void batch_meet(void) {
    submit_both(meets);
    await(&a.over);
    await(&b.over);
}
static void batch(void) {
    submit_both(runs);
    await(&a.over);
    await(&b.over);
}
static void meet_a(void) {
    SCHED_CHECK(submit(&a, "a", meets) == 0);
    await(&a.over);
}
static void meet_b(void) {
    SCHED_CHECK(submit(&b, "b", meets) == 0);
    await(&b.over);
}
/* A task whose submitter has already seen it at work. */
static void meet_behind(void) {
    SCHED_CHECK(submit(&a, "a", meets) == 0);
    await(&a.began);
    meet_b();
}

/* Like flow_p9: tasks that were over at once came before, now one waits for the next. */
static int tiny(ctx_t *ctx, void *arg) {
    (void)arg;
    return ctx_err(ctx);
}
static void have_quick(uint64_t n) {
    uint64_t i;
    for (i = 0; i < n; i++)
        SCHED_CHECK(ctx_pool_submit_wait(pool, ctx_background(), "tiny", tiny, &pool) == 0);
    warmed += n;
}
static void setup_quick_busy(void) {
    ctx_pool_desc_t desc = describe(2, 256);
    make(&desc);
    have_busy(&c);
    have_quick(200);
    await_idle(1);
    SCHED_CHECK(submit(&a, "a", meets) == 0);
    await(&a.began);
}
static void open_gate(void) {
    sched_set(&gate);
    await(&c.over);
    await_idle(1);
    meet_b();
}
/* Like flow_p9m: both workers had such tasks, one of them has one more while the other begins to wait. */
static void setup_quick(void) {
    ctx_pool_desc_t desc = describe(2, 256);
    make(&desc);
    have_idle(2);
    have_quick(400);
    await_idle(2);
}
static void slow_then_next(void) {
    SCHED_CHECK(submit(&a, "a", meets) == 0);
    await(&c.over);
    await_idle(1);
    meet_b();
}

/* -- threads that are unavailable -- */

static void setup_no_thread(int workers, int fail) {
    setup_cold(workers);
    sched_starts_fail = fail;
}
static void setup_no_thread_1(void) { setup_no_thread(2, 1); }
static void setup_no_thread_2(void) { setup_no_thread(2, 2); }
static void try_piece(piece_t *piece) {
    int rc = submit(piece, "try", runs);
    SCHED_CHECK(rc == 0 || rc == CTX_NO_MEMORY);
    if (rc == 0) await(&piece->over);
}
static void try_a(void) { try_piece(&a); }
static void try_b(void) { try_piece(&b); }
static void try_c(void) { try_piece(&c); }
static void check_none(void) {
    SCHED_CHECK(a.rc == CTX_NO_MEMORY && b.rc == CTX_NO_MEMORY);
    check();
}
/* One worker stands at the gate, and the thread of the other will be unavailable. */
static void setup_later_thread(void) {
    setup_cold(2);
    have_busy(&c);
    sched_starts_fail = 1;
}
static void gate_set(void) { sched_set(&gate); }

/* Like flow_qf: the thread of the timers is unavailable. */
static void setup_no_timers(void) {
    ctx_pool_desc_t desc = describe(2, 4);
    desc.task_timeout = CTX_S(1);
    make(&desc);
    sched_starts_fail = 1000;
    timers = true;
}
static void refused_a(void) { SCHED_CHECK(submit(&a, "a", runs) == CTX_NO_MEMORY); }
static void refused_b(void) { SCHED_CHECK(submit_wait(&b, ctx_background(), runs) == CTX_NO_MEMORY); }

/* -- tasks that gather -- */

static void setup_gather(int workers, size_t queue) {
    ctx_pool_desc_t desc = describe(workers, queue);
    desc.coalesce = CTX_MS(1);
    make(&desc);
    have_idle(workers);
}
static void setup_gather_1(void) { setup_gather(1, 8); }
static void setup_gather_2(void) { setup_gather(2, 8); }
static void setup_gather_half(void) {
    ctx_pool_desc_t desc = describe(1, 2);
    desc.coalesce = CTX_FOREVER; /* so a nap ends only because it must */
    make(&desc);
    have_idle(1);
}
static void submit_a_drain(void) {
    SCHED_CHECK(submit(&a, "a", runs) == 0);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    SCHED_CHECK(a.ran == 1);
}

static void setup_gather_of_2(void) { setup_gather(1, 2); }
static void batch_then_c(void) { /* too many to gather, then one that may */
    batch();
    submit_c();
}

/* -- turns -- */

#if POOL_NOW
typedef struct {
    ctx__turns_t turns;
    int came, lost, wanted, back;
    sched_flag_t some;
    piece_t *meets;
} visit_t;
static visit_t visit;
static void visited(ctx__turns_t *turns, bool lost) {
    visit_t *v = (visit_t *)(void *)turns;
    if (lost) CTX__ADD(&v->lost, 1, RELAXED);
    else CTX__ADD(&v->came, 1, RELAXED);
    sched_set(&v->some);
    if (v->meets && !lost) await(&v->meets->began);
}
static int want(void) {
    int rc;
    visit.turns.come = visited;
    visit.turns.op = "turn";
    rc = ctx__pool_want(pool, &visit.turns);
    if (!rc) visit.wanted++;
    return rc;
}
static void want_1(void) {
    SCHED_CHECK(want() == 0);
    await(&visit.some);
}
static void want_then_submit(void) {
    want_1();
    submit_a();
}
static void want_or_refused(void) {
    int rc = want();
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
}
static void want_back(void) {
    want_or_refused();
    visit.back += ctx__pool_unwant(pool, &visit.turns);
}
static void check_turns(void) {
    check();
    SCHED_CHECK(visit.came + visit.lost + visit.back == visit.wanted);
}
static void want_meet_a(void) {
    visit.meets = &a;
    want_1();
}
static int meets_turn(ctx_t *ctx, void *arg) {
    piece_begin((piece_t *)arg);
    await(&visit.some);
    return piece_end((piece_t *)arg, ctx_err(ctx));
}
static void submit_meet_turn(void) {
    SCHED_CHECK(submit(&a, "a", meets_turn) == 0);
    await(&a.over);
}
static void want_twice(void) {
    SCHED_CHECK(want() == 0);
    SCHED_CHECK(want() == 0);
    await(&visit.some);
}
static void setup_turn_permit(void) { /* a worker waits for a permit, and then there is no work */
    ctx_pool_desc_t desc = describe(1, 4);
    have_permits(1, 1);
    desc.permits = &permits;
    make(&desc);
    SCHED_CHECK(want() == 0);
}
static void take_back(void) { visit.back += ctx__pool_unwant(pool, &visit.turns); }
static void check_turn_permit(void) {
    ctx_sem_release(&permits, 1);
    check_turns();
}
#endif

/* -- permits -- */

static void setup_permits(int workers, int64_t total, int64_t held) {
    ctx_pool_desc_t desc = describe(workers, 4);
    have_permits(total, held);
    desc.permits = &permits;
    make(&desc);
}
static void setup_permit_held(void) { setup_permits(2, 1, 1); }
static void release_1(void) { ctx_sem_release(&permits, 1); }

/* Like flow_p7: all permits are elsewhere, then come back at once. */
static void setup_permits_2_held(void) {
    setup_permits(2, 2, 2);
    submit_both(meets);
}
static void release_2(void) {
    ctx_sem_release(&permits, 2);
    await(&a.over);
    await(&b.over);
}

/* Like flow_p31: a worker waits for a permit that another program part has, when all work is done. */
static void setup_permit_busy(void) {
    setup_permits(2, 1, 0);
    have_busy(&a);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
}
static void hold_permit(void) {
    await(&b.began);
    SCHED_CHECK(ctx_sem_acquire(&permits, ctx_background(), 1) == 0);
    await(&drained);
    ctx_sem_release(&permits, 1);
}
static void open_and_drain(void) {
    sched_set(&gate);
    await(&a.over);
    await(&b.over);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    sched_set(&drained);
}
static void submit_1_permit(piece_t *piece) {
    SCHED_CHECK(submit(piece, "limited", counts_inside) == 0);
    await(&piece->over);
}
static void permit_a(void) { submit_1_permit(&a); }
static void permit_b(void) { submit_1_permit(&b); }
static void permit_batch(void) {
    submit_both(counts_inside);
    await(&a.over);
    await(&b.over);
}
static void setup_permit(void) { setup_permits(2, 1, 0); }
static void check_inside(void) {
    SCHED_CHECK(inside_most <= 1);
    check();
}

/* Two pools of one worker share one permit. */
static void setup_two_pools(void) {
    ctx_pool_desc_t desc = describe(1, 4);
    setup_permits(1, 1, 0);
    desc.permits = &permits;
    other = ctx_pool_new(lifetime, &desc);
    SCHED_CHECK(other != NULL);
}
static void submit_other(void) {
    d.given = true;
    SCHED_CHECK(ctx_pool_submit(other, ctx_background(), "other", counts_inside, &d) == 0);
    await(&d.over);
}
static void check_two_pools(void) {
    ctx_drain_report_t report;
    SCHED_CHECK(ctx_pool_drain(other, CTX_FOREVER, &report) == 0);
    SCHED_CHECK(report.completed == 1 && d.ran == 1);
    d.ran = 0; /* not one of the first pool's */
    ctx_pool_free(other);
    check_inside();
}

/* -- caller runs -- */

static void setup_caller(bool limited) {
    ctx_pool_desc_t desc = describe(1, 1);
    if (limited) have_permits(1, 0);
    if (limited) desc.permits = &permits;
    desc.when_full = CTX_CALLER_RUNS;
    make(&desc);
}
static void setup_caller_runs(void) { setup_caller(false); }
static void setup_caller_limited(void) { setup_caller(true); }
static void setup_caller_full(void) { /* d is in the worker, c in the queue */
    setup_caller(false);
    have_busy(&d);
    SCHED_CHECK(submit(&c, "queued", runs) == 0);
}
static void limited_a(void) { SCHED_CHECK(submit(&a, "a", counts_inside) == 0); }
static void limited_b(void) { SCHED_CHECK(submit(&b, "b", counts_inside) == 0); }
static void limited_c(void) { SCHED_CHECK(submit(&c, "c", counts_inside) == 0); }

static int drain_rc;
static int drains_pool(ctx_t *ctx, void *arg) {
    piece_begin((piece_t *)arg);
    drain_rc = ctx_pool_drain(pool, CTX_FOREVER, NULL);
    return piece_end((piece_t *)arg, ctx_err(ctx));
}
static void caller_drains(void) {
    drains_inside = true;
    SCHED_CHECK(submit(&a, "drains", drains_pool) == 0);
    await(&a.over); /* there may have been room */
    SCHED_CHECK(drain_rc == 0);
}
static void submit_or_closed(piece_t *piece) {
    int rc = submit(piece, "late", runs);
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
}
static void late_b(void) { submit_or_closed(&b); }
static void gate_then_late_b(void) {
    sched_set(&gate);
    submit_or_closed(&b);
}
static void hold_a(void) { SCHED_CHECK(submit(&a, "caller's", holds) == 0); }
static void report_caller(void) {
    ctx_drain_report_t report;
    int i, found = 0;
    await(&a.began);
    SCHED_CHECK(ctx_pool_drain(pool, 0, &report) == CTX_DEADLINE_EXCEEDED);
    SCHED_CHECK(report.stuck == 2);
    for (i = 0; i < 2; i++) found += report.running[i] && !strcmp(report.running[i], "caller's");
    SCHED_CHECK(found == 1);
    sched_set(&a.go);
    sched_set(&gate);
    forever = 1;
}
static void setup_caller_no_grace(void) {
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_CALLER_RUNS;
    desc.grace = -1;
    make(&desc);
    have_busy(&d);
    SCHED_CHECK(submit(&c, "queued", runs) == 0);
}
/* A drain waits for the task that a caller runs. */
static void drain_behind_caller(void) {
    await(&a.began);
    sched_set(&gate);
    sched_set(&a.go);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    SCHED_CHECK(sched_is_set(&a.over));
}

/* A task that has the only permit submits more than the queue takes: it runs that itself, under the same permit. */
static int submits_more(ctx_t *ctx, void *arg) {
    piece_begin((piece_t *)arg);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    SCHED_CHECK(submit(&c, "c", runs) == 0);
    return piece_end((piece_t *)arg, ctx_err(ctx));
}
static void permit_from_task(void) {
    SCHED_CHECK(submit(&a, "a", submits_more) == 0);
    await(&b.over);
    await(&c.over);
}

static void setup_caller_waits(void) { /* d holds the only permit, c is queued */
    ctx_pool_desc_t desc = describe(1, 1);
    have_permits(1, 0);
    desc.permits = &permits;
    desc.when_full = CTX_CALLER_RUNS;
    make(&desc);
    have_busy(&d);
    SCHED_CHECK(submit(&c, "queued", runs) == 0);
}

/* Like flow_p13: one call with more tasks than there is room, and a worker asleep. */
static void setup_batch(ctx_when_full_t when_full) {
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = when_full;
    make(&desc);
    have_idle(1);
}
static void setup_batch_caller(void) { setup_batch(CTX_CALLER_RUNS); }
static void setup_batch_oldest(void) {
    setup_batch(CTX_DROP_OLDEST);
    drop_awaits = &b;
}
static void push_batch(void) {
    void *args[3];
    a.given = b.given = c.given = true;
    args[0] = &a;
    args[1] = &b;
    args[2] = &c;
    SCHED_CHECK(ctx_pool_submit_batch(pool, ctx_background(), "batch", runs, args, 3, NULL) == 0);
    a.asked = b.asked = c.asked = true;
    await(&c.over);
}
static void setup_batch_block(void) { setup_batch(CTX_BLOCK); }
static void batch_of_three(void) { /* a is for the worker, and the others wait until it has begun */
    void *args[3];
    a.given = b.given = c.given = true;
    args[0] = a.meets = b.meets = c.meets = &a;
    args[1] = &b;
    args[2] = &c;
    SCHED_CHECK(ctx_pool_submit_batch(pool, ctx_background(), "batch", meets, args, 3, NULL) == 0);
    a.asked = b.asked = c.asked = true;
    await(&a.over);
    await(&b.over);
    await(&c.over);
}

/* -- drop oldest -- */

static void setup_oldest(void) {
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = CTX_DROP_OLDEST;
    make(&desc);
    have_busy(&d);
}
static void oldest_two(void) {
    SCHED_CHECK(submit(&a, "a", runs) == 0);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    await(&b.over);
}
static void oldest_one(void) {
    SCHED_CHECK(submit(&c, "c", runs) == 0);
    await(&c.over);
}
static void check_order(void) {
    check();
    if (a.ran && b.ran) SCHED_CHECK(a.place < b.place);
}

/* -- room -- */

static void setup_room_of(ctx_when_full_t when_full) { /* d is in the worker, c in the queue */
    ctx_pool_desc_t desc = describe(1, 1);
    desc.when_full = when_full;
    make(&desc);
    have_busy(&d);
    SCHED_CHECK(submit(&c, "queued", runs) == 0);
}
static void setup_room(void) { setup_room_of(CTX_REJECT); }
static void setup_room_oldest(void) { setup_room_of(CTX_DROP_OLDEST); }
static void wait_a(void) {
    SCHED_CHECK(submit_wait(&a, ctx_background(), runs) == 0);
    sched_set(&tried);
    await(&a.over);
}
/* Room comes when the worker takes c, not when it is free again. */
static void setup_room_then_held(void) {
    ctx_pool_desc_t desc = describe(1, 1);
    make(&desc);
    have_busy(&d);
    SCHED_CHECK(submit(&c, "queued", holds) == 0);
}
static void wait_a_release_c(void) {
    SCHED_CHECK(submit_wait(&a, ctx_background(), runs) == 0);
    sched_set(&c.go);
    await(&a.over);
}
static void wait_a_below(void) {
    int rc = submit_wait(&a, parent, runs);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
}
static void wait_a_or_closed(void) {
    int rc = submit_wait(&a, ctx_background(), runs);
    sched_set(&tried);
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
}
static void wait_b(void) {
    SCHED_CHECK(submit_wait(&b, ctx_background(), runs) == 0);
    await(&b.over);
}
static void wait_b_second(void) {
    await_blocked();
    wait_b();
}
static void end_parent(void) { ctx_cancel(parent); }
static void end_lifetime(void) { ctx_cancel(lifetime); }
static void gate_when_blocked(void) {
    await_blocked();
    sched_set(&gate);
}
/* Like flow_p47: somebody waits for room, and others come that do not wait. */
static void overtake(void) {
    int i;
    await_blocked();
    sched_set(&gate);
    for (i = 0; i < 4; i++) {
        if (submit(&b, "passing", runs) == 0) return;
        ctx__sched_relax();
    }
}
static void setup_room_2(void) { /* with a queue of two, so that half of it comes free first */
    ctx_pool_desc_t desc = describe(1, 2);
    make(&desc);
    have_busy(&d);
    have_quick(2);
}
static void check_no_overtaking(void) {
    check();
    if (b.ran) SCHED_CHECK(a.ran && a.place < b.place);
}
/* One that pushes the oldest out does not take room that came for a waiter: unless it pushed c out, a is first. */
static void push_in(void) {
    await_blocked();
    sched_set(&gate);
    SCHED_CHECK(submit(&b, "passing", runs) == 0);
    await(&b.over);
}
static void push_late(void) {
    await_blocked();
    sched_set(&gate);
    submit_or_closed(&b);
}
static void check_push(void) {
    check();
    if (a.ran && b.ran && c.ran) SCHED_CHECK(a.place < b.place);
}

/* What a free worker can take, or one that has no thread yet, takes no room. */
static void setup_room_idle(void) {
    ctx_pool_desc_t desc = describe(2, 1);
    make(&desc);
    have_idle(2);
}
static void setup_room_cold(void) {
    ctx_pool_desc_t desc = describe(2, 1);
    make(&desc);
}
/* With no queue one task at most is accepted while the only worker has one. */
static void setup_no_queue(void) {
    ctx_pool_desc_t desc = describe(1, CTX_NO_QUEUE);
    make(&desc);
    have_idle(1);
}
static void try_hold_a(void) {
    int rc = submit(&a, "a", passes_gate);
    SCHED_CHECK(rc == 0 || rc == CTX_QUEUE_FULL);
}
static void try_hold_b(void) {
    int rc = submit(&b, "b", passes_gate);
    SCHED_CHECK(rc == 0 || rc == CTX_QUEUE_FULL);
}
static void check_one_held(void) {
    SCHED_CHECK((a.rc == 0) + (b.rc == 0) == 1);
    sched_set(&gate);
    check();
}
static void setup_no_queue_busy(void) {
    ctx_pool_desc_t desc = describe(1, CTX_NO_QUEUE);
    make(&desc);
    have_busy(&d);
}
static void three_hold(void) {
    SCHED_CHECK(submit(&a, "a", passes_gate) == 0);
    SCHED_CHECK(submit(&b, "b", passes_gate) == 0);
    SCHED_CHECK(submit(&c, "c", passes_gate) == 0);
    await(&a.began);
    await(&b.began);
    SCHED_CHECK(submit(&d, "d", passes_gate) == CTX_QUEUE_FULL);
    sched_set(&gate);
}

/* -- drain, the end of the lifetime, free -- */

static void drain(void) {
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    drain_over();
    SCHED_CHECK(!a.ran || sched_is_set(&a.over));
}
static void late_a(void) { submit_or_closed(&a); }
static void submit_hold(void) { SCHED_CHECK(submit(&a, "a", holds) == 0); }
static void drain_opens(void) {
    sched_set(&a.go);
    drain();
}
static void setup_drainer(void) {
    setup_cold(2);
    have_busy(&c);
    SCHED_CHECK(submit(&a, "drains", drains_pool) == 0);
}
static void gate_await_drain(void) {
    drains_inside = true;
    sched_set(&gate);
    await(&a.over);
    SCHED_CHECK(drain_rc == 0);
}
static void setup_cut(void) { /* a runs until it is canceled, b is queued */
    setup_cold(1);
    SCHED_CHECK(submit(&a, "a", waits_for_end) == 0);
    await(&a.began);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    forever = 1;
}
static void drain_cut(void) {
    ctx_drain_report_t report;
    SCHED_CHECK(ctx_pool_drain(pool, CTX_US(1), &report) == CTX_DEADLINE_EXCEEDED);
    SCHED_CHECK(report.canceled + report.dropped + report.stuck == 2);
}
static void drain_waits(void) { ctx_pool_drain(pool, CTX_FOREVER, NULL); }
static void end_drop_drains(void) {
    drop_drains = true;
    ctx_cancel(lifetime);
}
static void check_cut(void) {
    check();
    SCHED_CHECK(a.ran == 1 && b.dropped == 1);
}

/* The worker is stuck: what is queued is dropped by the thread that ends the lifetime, or never was accepted. */
static void setup_stuck(void) {
    setup_cold(1);
    have_busy(&c);
}
static void check_stuck(void) {
    SCHED_CHECK(a.ran == 0 && a.dropped == (a.rc == 0));
    sched_set(&gate);
    check();
}

/* The pool's lifetime ends: a drain does not wait for its budget, but for the grace period, of which there is none. */
static void setup_stuck_no_grace(void) {
    ctx_pool_desc_t desc = describe(1, 4);
    desc.grace = -1;
    make(&desc);
    have_busy(&c);
    forever = 1;
}
static void check_ended(void) {
    pool->desc.grace = CTX_FOREVER;
    sched_set(&gate);
    check();
}
static void drain_ends(void) { SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == CTX_DEADLINE_EXCEEDED); }

/* Waits, by threads and by tasks. */
static void submit_a_wait(void) {
    SCHED_CHECK(submit(&a, "a", runs) == 0);
    SCHED_CHECK(ctx_pool_wait(pool, ctx_background()) == 0);
    SCHED_CHECK(a.ran == 1 && sched_is_set(&a.over));
    SCHED_CHECK(submit(&b, "b", runs) == 0); /* it is still open */
}
static int waits_for_pool(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    piece_begin(piece);
    SCHED_CHECK(ctx_pool_wait(pool, ctx) == 0);
    ctx__sched_relax();
    return piece_end(piece, 0);
}
static void setup_waiter(void) {
    setup_cold(2);
    have_busy(&c);
    SCHED_CHECK(submit(&a, "waits", waits_for_pool) == 0);
}
static void gate_await_a(void) {
    sched_set(&gate);
    await(&a.over);
}
static void wait_outside(void) {
    SCHED_CHECK(ctx_pool_wait(pool, ctx_background()) == 0);
    SCHED_CHECK(sched_is_set(&a.over));
}
/* A wait that is over does not excuse its task any more. */
static int waits_then_goes_on(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    piece_begin(piece);
    SCHED_CHECK(ctx_pool_wait(pool, ctx) == 0);
    sched_set(&tried);
    await(&b.began);
    return piece_end(piece, 0);
}
static int waits_for_a(ctx_t *ctx, void *arg) {
    piece_begin((piece_t *)arg);
    SCHED_CHECK(ctx_pool_wait(pool, ctx) == 0);
    SCHED_CHECK(sched_is_set(&a.over));
    return piece_end((piece_t *)arg, 0);
}
static void wait_then_wait(void) {
    SCHED_CHECK(submit(&a, "goes on", waits_then_goes_on) == 0);
    await(&tried);
    SCHED_CHECK(submit(&b, "waits", waits_for_a) == 0);
    await(&b.over);
}
static void setup_two_waiters(void) {
    setup_waiter();
    SCHED_CHECK(submit(&b, "waits too", waits_for_pool) == 0);
}
static void wait_below(void) {
    int rc = ctx_pool_wait(pool, parent);
    SCHED_CHECK(rc == 0 || rc == CTX_CANCELED);
}
static int drains_with_a(ctx_t *ctx, void *arg) {
    piece_t *piece = (piece_t *)arg;
    SCHED_CHECK(ctx != NULL);
    piece_begin(piece);
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    SCHED_CHECK(sched_is_set(&a.over)); /* a drain waits for waits */
    return piece_end(piece, 0);
}
static void setup_waiter_and_drainer(void) {
    setup_waiter();
    SCHED_CHECK(submit(&b, "drains", drains_with_a) == 0);
}
static void gate_await_both(void) {
    sched_set(&gate);
    await(&a.over);
    await(&b.over);
    let_end();
}

/* Each copy is its task's own until that has returned, and then another's. */
static int copies_seen;
static int sees_copy(ctx_t *ctx, void *arg) {
    int number = *(int *)arg;
    SCHED_CHECK(ctx != NULL && (number == 1 || number == 2));
    ctx__sched_relax();
    SCHED_CHECK(*(int *)arg == number); /* nobody else has it */
    *(int *)arg = 0;
    __atomic_add_fetch(&copies_seen, number, __ATOMIC_RELAXED);
    return 0;
}
static void submit_copy(int number) {
    SCHED_CHECK(ctx_pool_submit_copy(pool, ctx_background(), "copy", sees_copy, &number, sizeof number) == 0);
    number = 9;
}
static void setup_copies(void) { /* with one block, which has come back */
    setup_2();
    submit_copy(1);
    SCHED_CHECK(ctx_pool_wait(pool, ctx_background()) == 0);
    while (pool->copies) pool->copies = pool->copies->next;
    warmed++;
    copies_seen = 0;
}
static void copy_1(void) { submit_copy(1); }
static void copy_2(void) {
    submit_copy(2);
    submit_copy(2);
}
static void check_copies(void) {
    warmed += 3;
    check();
    SCHED_CHECK(copies_seen == 5);
}

static void setup_free_permit(void) {
    ctx_pool_desc_t desc = describe(2, 4);
    have_permits(1, 0);
    desc.permits = &permits;
    make(&desc);
}
static void free_stuck(void) {
    SCHED_CHECK(submit(&a, "a", holds) == 0);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    await(&a.began);
    ctx_pool_free(pool);
    if (permits_total) SCHED_CHECK(ctx_sem_try_acquire(&permits, 1)); /* which the stuck one has given back */
    sched_set(&a.go);
    await(&a.over);
}
static void check_freed(void) {
    let_end();
    if (a.asked && a.rc == 0) await(&a.over);
    if (b.asked && b.rc == 0) await(&b.over);
    check_pieces();
    if (permits_total) SCHED_CHECK(!ctx_sem_try_acquire(&permits, 1)); /* given back once */
    check_end();
}
static void free_at_once(void) {
    SCHED_CHECK(submit(&a, "a", runs) == 0);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    ctx_pool_free(pool);
}
static void free_idle(void) {
    submit_a();
    ctx_pool_free(pool);
}
static int frees_pool(ctx_t *ctx, void *arg) {
    piece_begin((piece_t *)arg);
    await(&gate);
    ctx_pool_free(pool);
    return piece_end((piece_t *)arg, ctx_err(ctx));
}
static void free_from_task(void) {
    SCHED_CHECK(submit(&a, "a", frees_pool) == 0);
    SCHED_CHECK(submit(&b, "b", runs) == 0);
    sched_set(&gate);
    await(&a.over);
}
static void nothing(void) {}

static const sched_scenario_t scenarios[] = {
    { "pool: submit / sleep", setup_1, { T(submit_a_then_b), T(watch) }, check, false },
    { "pool: submit / submit / sleep", setup_1, { T(submit_a), T(submit_b) }, check, false },
    { "pool: first submits", setup_2_cold, { T(submit_a), T(submit_b) }, check, false },
    { "pool: batch / submit", setup_2, { T(batch), T(submit_c) }, check, false },
    { "pool: two that meet, batch", setup_2, { T(batch_meet), T(watch) }, check, false },
    { "pool: two that meet, one each", setup_2, { T(meet_a), T(meet_b) }, check, false },
    { "pool: two that meet, cold", setup_2_cold, { T(batch_meet), T(watch) }, check, false },
    { "pool: two that meet, one each, cold", setup_2_cold, { T(meet_a), T(meet_b) }, check, false },
    { "pool: two that meet, one behind the other", setup_2, { T(meet_behind), T(submit_c) }, check, false },
    { "pool: two that meet, of three workers", setup_3, { T(meet_a), T(meet_b), T(submit_c) }, check, false },
    { "pool: flow_p9, quick tasks before", setup_quick_busy, { T(open_gate), T(watch) }, check, false },
    { "pool: flow_p9m, quick tasks before", setup_quick, { T(slow_then_next), T(submit_c) }, check, false },

    { "pool: no thread, two submitters", setup_no_thread_2, { T(try_a), T(try_b) }, check_none, false },
    { "pool: no thread, then one", setup_no_thread_1, { T(try_a), T(try_b) }, check, false },
    { "pool: no thread, three submitters", setup_no_thread_2, { T(try_a), T(try_b), T(try_c) }, check, false },
    { "pool: no later thread", setup_later_thread, { T(submit_a_then_b), T(gate_set), T(watch) }, check, false },
    { "pool: no later thread, two submitters", setup_later_thread,
      { T(submit_a), T(submit_b), T(gate_set) }, check, false },
    { "pool: no thread for timers", setup_no_timers, { T(refused_a), T(refused_b) }, check, false },

    { "pool: gather, submit / nap", setup_gather_1, { T(submit_a_then_b), T(watch) }, check, false },
    { "pool: gather, two submitters / nap", setup_gather_1, { T(submit_a), T(submit_b) }, check, false },
    { "pool: gather, two workers", setup_gather_2, { T(submit_a_then_b), T(submit_c), T(watch) }, check, false },
    { "pool: gather, two that meet", setup_gather_2, { T(batch_meet), T(watch) }, check, false },
    { "pool: gather, half full", setup_gather_half, { T(batch), T(watch) }, check, false },
    { "pool: gather, half full, then one", setup_gather_of_2, { T(batch_then_c), T(watch) }, check, false },
    { "pool: gather, drain", setup_gather_half, { T(submit_a_drain), T(watch) }, check, false },
    { "pool: gather, free", setup_gather_1, { T(free_idle), T(nothing) }, check_freed, false },

#if POOL_NOW
    { "pool: turn / sleep", setup_1, { T(want_then_submit), T(watch) }, check_turns, false },
    { "pool: turn, cold", setup_1_cold, { T(want_1), T(submit_a) }, check_turns, false },
    { "pool: turn / task", setup_1, { T(want_1), T(submit_a), T(watch) }, check_turns, false },
    { "pool: turn and task that meet", setup_2, { T(want_meet_a), T(submit_meet_turn) }, check_turns, false },
    { "pool: two turns", setup_2, { T(want_twice), T(submit_a) }, check_turns, false },
    { "pool: turn / taken back", setup_1, { T(want_back), T(watch) }, check_turns, false },
    { "pool: turn / taken back / drain", setup_1, { T(want_back), T(drain) }, check_turns, false },
    { "pool: turn taken back behind a permit / drain", setup_turn_permit,
      { T(take_back), T(drain) }, check_turn_permit, false },
    { "pool: turn / drain", setup_1, { T(want_or_refused), T(drain) }, check_turns, false },
    { "pool: turn / end", setup_1, { T(want_or_refused), T(end_lifetime) }, check_turns, false },
#endif

    { "pool: permit, release / submit", setup_permit_held, { T(submit_a), T(release_1), T(watch) }, check, false },
    { "pool: permit, flow_p7", setup_permits_2_held, { T(release_2), T(watch) }, check, false },
    { "pool: permit, flow_p31", setup_permit_busy, { T(open_and_drain), T(hold_permit) }, check, false },
    { "pool: permit, one at a time", setup_permit, { T(permit_a), T(permit_b) }, check_inside, false },
    { "pool: permit, batch", setup_permit, { T(permit_batch), T(watch) }, check_inside, false },
    { "pool: permit, two pools", setup_two_pools, { T(permit_batch), T(submit_other) }, check_two_pools, false },
    { "pool: permit / end", setup_permit_held, { T(late_a), T(end_lifetime), T(release_1) }, check, false },

    { "pool: caller runs, limit", setup_caller_limited,
      { T(limited_a), T(limited_b), T(limited_c) }, check_inside, false },
    { "pool: caller runs, from a task", setup_caller_limited, { T(permit_from_task), T(watch) }, check, false },
    { "pool: caller runs, drain from inside", setup_caller_full, { T(caller_drains), T(gate_set) }, check, false },
    { "pool: caller runs, report", setup_caller_no_grace, { T(hold_a), T(report_caller) }, check, false },
    { "pool: caller runs / drain", setup_caller_full, { T(hold_a), T(drain_behind_caller) }, check, false },
    { "pool: caller runs / drain / late", setup_caller_full, { T(gate_then_late_b), T(drain) }, check, false },
    { "pool: caller waits for a permit / drain", setup_caller_waits,
      { T(late_a), T(gate_set), T(drain) }, check, false },
    { "pool: caller runs / end", setup_caller_full, { T(late_a), T(gate_set), T(end_lifetime) }, check, false },
    { "pool: flow_p13, caller runs", setup_batch_caller, { T(batch_of_three), T(watch) }, check, false },
    { "pool: flow_p13, drop oldest", setup_batch_oldest, { T(push_batch), T(watch) }, check_order, false },
    { "pool: flow_p13, block", setup_batch_block, { T(batch_of_three), T(watch) }, check_order, false },

    { "pool: drop oldest / worker", setup_oldest, { T(oldest_two), T(gate_set) }, check_order, false },
    { "pool: drop oldest / drop oldest", setup_oldest, { T(oldest_two), T(oldest_one), T(gate_set) }, check_order,
      false },
    { "pool: drop oldest / drain", setup_oldest, { T(late_a), T(late_b), T(drain), T(gate_set) }, check, false },

    { "pool: room / worker", setup_room, { T(wait_a), T(gate_set) }, check, false },
    { "pool: room / worker that is held", setup_room_then_held, { T(wait_a_release_c), T(gate_set) }, check, false },
    { "pool: room, two in order", setup_room,
      { T(wait_a), T(wait_b_second), T(gate_set) }, check_no_overtaking, false },
    { "pool: room, one leaves", setup_room, { T(wait_a_below), T(wait_b), T(gate_set), T(end_parent) }, check, false },
    { "pool: room / drain", setup_room, { T(wait_a_or_closed), T(gate_when_blocked), T(drain) }, check, false },
    { "pool: room / end", setup_room, { T(wait_a_or_closed), T(gate_set), T(end_lifetime) }, check, false },
    { "pool: room, flow_p47", setup_room, { T(wait_a), T(overtake) }, check_no_overtaking, false },
    { "pool: room, flow_p47, half free", setup_room_2, { T(wait_a), T(overtake) }, check_no_overtaking, false },
    { "pool: room / drop oldest", setup_room_oldest, { T(wait_a), T(push_in) }, check_push, false },
    { "pool: room / drop oldest / end", setup_room_oldest,
      { T(wait_a_or_closed), T(push_late), T(end_lifetime) }, check, false },
    { "pool: room for idle workers", setup_room_idle, { T(three_hold), T(watch) }, check, false },
    { "pool: no queue, submit / submit", setup_no_queue, { T(try_hold_a), T(try_hold_b) }, check_one_held, false },
    { "pool: no queue, room / worker", setup_no_queue_busy, { T(wait_a), T(gate_set) }, check, false },
    { "pool: room for workers without a thread", setup_room_cold, { T(three_hold), T(watch) }, check, false },

    { "pool: drain / submit", setup_1, { T(late_a), T(drain) }, check, false },
    { "pool: drain / first submit", setup_1_cold, { T(late_a), T(drain) }, check, false },
    { "pool: drain after submit", setup_1, { T(submit_a_drain), T(nothing) }, check, false },
    { "pool: drain / queued", setup_room, { T(gate_set), T(drain) }, check, false },
    { "pool: two drains", setup_1, { T(late_a), T(drain_waits), T(drain_waits) }, check, false },
    { "pool: drain from a task", setup_drainer, { T(gate_await_drain), T(drain_waits) }, check, false },
    { "pool: drain that cuts", setup_cut, { T(drain_cut), T(drain_waits) }, check_cut, false },
    { "pool: two drains that cut", setup_cut, { T(drain_cut), T(drain_cut) }, check_cut, false },
    { "pool: end / submit", setup_1, { T(late_a), T(end_lifetime) }, check, false },
    { "pool: end / submit behind a stuck task", setup_stuck, { T(late_a), T(end_lifetime) }, check_stuck, false },
    { "pool: end / first submit", setup_1_cold, { T(late_a), T(end_lifetime) }, check, false },
    { "pool: end / drain / submit", setup_1, { T(late_a), T(end_lifetime), T(drain_waits) }, check, false },
    { "pool: end, on_drop drains", setup_cut, { T(end_drop_drains), T(drain_waits) }, check_cut, false },
    { "pool: end / drain, stuck", setup_stuck_no_grace, { T(drain_ends), T(end_lifetime) }, check_ended, false },
    { "pool: wait after submit", setup_1, { T(submit_a_wait), T(nothing) }, check, false },
    { "pool: wait / submit", setup_1, { T(wait_below), T(submit_a) }, check, false },
    { "pool: wait / end of its context", setup_stuck, { T(wait_below), T(end_parent), T(gate_set) }, check, false },
    { "pool: wait from a task", setup_waiter, { T(gate_await_a) }, check, false },
    { "pool: wait from a task / wait", setup_waiter, { T(gate_set), T(wait_outside) }, check, false },
    { "pool: wait from a task / drain", setup_waiter, { T(gate_set), T(drain) }, check, false },
    { "pool: wait from a task, and then from another", setup_2, { T(wait_then_wait) }, check, false },
    { "pool: waits from two tasks", setup_two_waiters, { T(gate_set), T(wait_outside) }, check, false },
    { "pool: wait from a task, drain from a task", setup_waiter_and_drainer, { T(gate_await_both) }, check, false },
    { "pool: copies", setup_copies, { T(copy_1), T(copy_2) }, check_copies, false },
    { "pool: free, stuck", setup_2_cold, { T(free_stuck), T(nothing) }, check_freed, false },
    { "pool: free, stuck with a permit", setup_free_permit, { T(free_stuck), T(nothing) }, check_freed, false },
    { "pool: free at once", setup_2_cold, { T(free_at_once), T(nothing) }, check_freed, false },
    { "pool: free, idle", setup_2, { T(free_idle), T(nothing) }, check_freed, false },
    { "pool: free from a task", setup_2_cold, { T(free_from_task), T(nothing) }, check_freed, false },
};
SCHED_MAIN(scenarios)
