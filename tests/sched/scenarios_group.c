/* Groups and runners: each accepted task runs exactly once and each refused one never, a task that waits for others
   gets them, nobody waits for a turn that will not come, and a group leaves nothing behind. */
#include <limits.h>
#include <pthread.h>
#include <stdint.h>

/* Runners note who they are. An idle runner that sleeps until a time would hide that nobody wakes it. */
int sched_thread(void);
static void sleeps(uint32_t *word, uint32_t expected, int64_t until);
#define pthread_self() ((pthread_t)sched_thread())
#define ctx__sched_sleep sleeps
#include "sched.h"
#undef ctx__sched_sleep
void ctx__sched_sleep(uint32_t *word, uint32_t expected, int64_t until);

static sched_flag_t times_come; /* some sleep until a time; else for good */
static uint32_t *asleep_on[SCHED_THREADS];

static void sleeps(uint32_t *word, uint32_t expected, int64_t until) {
    CTX__STORE(&asleep_on[sched_thread()], word, SEQ_CST);
    ctx__sched_sleep(word, expected, sched_is_set(&times_come) ? until : CTX_NO_DEADLINE);
}

/* For the end of a setup: runners that are idle may end. */
static void let_times_come(void) {
    int i;
    sched_set(&times_come);
    for (i = 0; i < SCHED_THREADS; i++) {
        uint32_t *word = CTX__LOAD(&asleep_on[i], SEQ_CST);
        if (word) ctx__sched_wake(word, 1);
    }
}

static ctx_t *life;
static ctx_pool_t *pool;
static ctx_group_t *group;

/* -- tasks -- */

enum { A, B, C, D, TASKS };

/* How often a task ran, and what became of adding it: `rc` is 1 until somebody has tried. */
static struct {
    int ran, rc;
    sched_flag_t has_run, added;
} tasks[TASKS] = { { 0, 1, 0, 0 }, { 0, 1, 0, 0 }, { 0, 1, 0, 0 }, { 0, 1, 0, 0 } };

static int runs(ctx_t *ctx, void *arg) {
    int i = (int)(intptr_t)arg;
    (void)ctx;
    tasks[i].ran++;
    sched_set(&tasks[i].has_run);
    return 0;
}

static int fails(ctx_t *ctx, void *arg) { /* by its own code */
    runs(ctx, arg);
    return -7 - (int)(intptr_t)arg;
}

static void add_fn(int i, ctx_task_fn fn) {
    tasks[i].rc = ctx_group_go(group, fn, (void *)(intptr_t)i);
    sched_set(&tasks[i].added);
}
static void add(int i) { add_fn(i, runs); }

static void try_add(int i) { tasks[i].rc = ctx_group_try_go(group, runs, (void *)(intptr_t)i); }

static int adds_b(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add(B);
    return 0;
}
static int adds_b_c(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add(B);
    add(C);
    return 0;
}
static int adds_d(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add(D);
    return 0;
}
static int adds_c_d(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add(C);
    add(D);
    return 0;
}
static int adds_b_c_by_waiting(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add_fn(B, adds_c_d);
    return 0;
}

static sched_flag_t hold, begun, told;

static int holds(ctx_t *ctx, void *arg) {
    (void)ctx;
    (void)arg;
    sched_set(&begun);
    sched_await(&hold);
    return 0;
}
static int waits_for_b(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    sched_await(&told);
    return 0;
}
static int tells(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    sched_set(&told);
    return 0;
}
static int holds_b(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    sched_await(&hold);
    return 0;
}
static int adds_b_waits_for_it(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add_fn(B, tells);
    sched_await(&told);
    return 0;
}
static int nothing(ctx_t *ctx, void *arg) {
    (void)ctx;
    (void)arg;
    return 0;
}

/* -- setup -- */

static void pool_of(int workers, size_t queue, ctx_when_full_t when_full) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = queue;
    desc.when_full = when_full;
    life = ctx_with_cancel(ctx_background());
    pool = ctx_pool_new(life, &desc);
    SCHED_CHECK(pool != NULL);
}

static void group_of(int limit) {
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.pool = pool;
    desc.limit = limit;
    group = ctx_group_new(ctx_background(), &desc);
    SCHED_CHECK(group != NULL);
}

/* The worker exists and sleeps. */
static void warm(void) {
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "warms", nothing, NULL) == 0);
    ctx__sched_relax();
}

/* The worker runs a task of somebody else until `hold` is set. */
static void busy(void) {
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "holds", holds, NULL) == 0);
    sched_await(&begun);
}

static void setup_limit(int limit) {
    pool_of(1, 8, CTX_REJECT);
    warm();
    group_of(limit);
}
static void setup_pool(void) { setup_limit(0); }
static void setup_limit_1(void) { setup_limit(1); }
static void setup_limit_2(void) { setup_limit(2); }
static void setup_threads_1(void) {
    life = ctx_with_cancel(ctx_background());
    group_of(1);
}
static void setup_threads_2(void) {
    life = ctx_with_cancel(ctx_background());
    group_of(2);
}
static void setup_busy(ctx_when_full_t when_full, int limit) {
    pool_of(1, 1, when_full);
    busy();
    group_of(limit);
}
static void setup_busy_drops(void) { setup_busy(CTX_DROP_OLDEST, 4); }
static void setup_busy_rejects(void) { setup_busy(CTX_REJECT, 4); }
static void setup_no_thread(void) {
    pool_of(1, 8, CTX_REJECT);
    sched_starts_fail = INT_MAX;
    group_of(1);
}
static void setup_no_thread_2(void) {
    setup_no_thread();
    group->limit = 2;
}

/* -- what the threads do -- */

static int rc_wait;
static void wait_group(void) {
    rc_wait = ctx_group_wait(group);
    group = NULL;
}
static void add_a(void) { add(A); }
static void add_b(void) { add(B); }
static void add_c(void) { add(C); }
static void see(int i) { /* without helping; the schedules end with the last of a scenario's own threads */
    sched_await(&tasks[i].has_run);
}
static void add_a_see(void) {
    add(A);
    see(A);
}
static void add_b_see(void) {
    add(B);
    see(B);
}
static void add_a_wait(void) {
    add(A);
    wait_group();
}
static void add_a_b_wait(void) {
    add(A);
    add(B);
    wait_group();
}
static void add_parent_wait(void) {
    add_fn(A, adds_b_c);
    wait_group();
}
static void add_grandparent_wait(void) {
    add_fn(A, adds_b_c_by_waiting);
    wait_group();
}
static void add_two_parents_wait(void) {
    add_fn(A, adds_b);
    add_fn(C, adds_d);
    wait_group();
}
static void add_needy_wait(void) {
    add_fn(A, adds_b_waits_for_it);
    wait_group();
}
/* Once a task has added another it counts against the limit again. */
static int adds_b_holds(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    add_fn(B, holds_b);
    sched_set(&told);
    sched_await(&hold);
    return 0;
}
static void add_child_try(void) {
    add_fn(A, adds_b_holds);
    sched_await(&told);
    try_add(C);
    SCHED_CHECK(tasks[C].rc == CTX_QUEUE_FULL);
    sched_set(&hold);
}
/* The only worker uses a group and then drains its pool: no turn is left that only this worker could take. */
static int uses_a_group_drains(ctx_t *ctx, void *arg) {
    (void)ctx;
    (void)arg;
    group_of(4);
    add(A);
    wait_group();
    SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0);
    sched_set(&told);
    return 0;
}
static void setup_no_group(void) {
    pool_of(1, 8, CTX_REJECT);
    warm();
}
static void submit_drains(void) {
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "drains", uses_a_group_drains, NULL) == 0);
    sched_await(&told);
}
static void cancel_life(void) { ctx_cancel(life); }
static void drain_cut(void) { ctx_pool_drain(pool, 0, NULL); }
static void drain_all(void) { SCHED_CHECK(ctx_pool_drain(pool, CTX_FOREVER, NULL) == 0); }

/* -- checks -- */

/* Each accepted task has run once and no other: the group is over. */
static void check_tasks(void) {
    int i;
    for (i = 0; i < TASKS; i++) SCHED_CHECK(tasks[i].ran == (tasks[i].rc == 0));
}

/* The library's threads that nobody joins end by themselves. */
static void let_end(void) {
    int i;
    ctx_runtime_stop();
    for (i = 0; i < SCHED_THREADS; i++) ctx__sched_relax();
}

static void check_result(int rc) {
    if (group) wait_group();
    check_tasks();
    SCHED_CHECK(rc_wait == rc);
    sched_set(&hold);
    if (pool) ctx_pool_drain(pool, CTX_FOREVER, NULL);
    ctx_pool_free(pool);
    ctx_end(life);
    let_end();
}
/* Nothing has failed: the result is 0, or the error of a task that was refused. */
static void check(void) {
    bool refused = false, known = false;
    int i;
    if (group) wait_group();
    for (i = 0; i < TASKS; i++) {
        if (tasks[i].rc == 0 || tasks[i].rc == 1 || tasks[i].rc == CTX_QUEUE_FULL) continue;
        refused = true;
        known = known || tasks[i].rc == rc_wait;
    }
    SCHED_CHECK(refused ? known : rc_wait == 0);
    check_result(rc_wait);
}
static void check_failed(void) { check_result(-7); }

/* The first `n` were accepted. */
static void check_all(int n) {
    int i;
    if (group) wait_group();
    for (i = 0; i < n; i++) SCHED_CHECK(tasks[i].rc == 0);
    check();
}
/* ... and nobody has to wait for the group to have them run. */
static void check_unaided(void) {
    int i;
    for (i = 0; i < SCHED_THREADS; i++) ctx__sched_relax();
    check_tasks();
    check();
}
static void check_unaided_2(void) {
    SCHED_CHECK(tasks[A].rc == 0 && tasks[B].rc == 0);
    check_unaided();
}
static void check_1(void) { check_all(1); }
static void check_2(void) { check_all(2); }
static void check_3(void) { check_all(3); }
static void check_4(void) { check_all(4); }

/* -- a pool that does not come, or comes late -- */

/* Like flow_g8: a full pool that pushes out its oldest task runs the group's tasks without help. */
static void add_push_await(void) {
    add(A);
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "pushes", nothing, NULL) == 0);
    sched_set(&hold);
    see(A);
}

/* Like flow_g7: two workers, both come free after the tasks were added to a full pool, and each runs one. */
static void setup_busy_2(void) {
    pool_of(2, 1, CTX_REJECT);
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "holds", holds, NULL) == 0);
    sched_await(&begun);
    begun = 0;
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "holds", holds, NULL) == 0);
    sched_await(&begun);
    group_of(4);
}
static void add_meeting(void) {
    add_fn(A, waits_for_b);
    add_fn(B, tells);
    sched_set(&hold);
    sched_await(&told);
}

/* Like api_stale_turns: groups that are over leave the queue of a pool free, whose worker is still busy. */
static void add_wait_submit(void) {
    add_a_wait();
    SCHED_CHECK(ctx_pool_submit(pool, ctx_background(), "has room", nothing, NULL) == 0);
    sched_set(&hold);
}

/* Like api_trygo_stale: and a new group has room. */
static void add_wait_try(void) {
    add_a_wait();
    group_of(4);
    try_add(B);
    SCHED_CHECK(tasks[B].rc == 0);
}

/* Like api_go_inline: a task does not run inside ctx_group_go() below the limit. */
static void add_wait_add(void) {
    add_a_wait();
    group_of(4);
    add_fn(B, waits_for_b);
    sched_set(&told);
    SCHED_CHECK(tasks[B].rc == 0);
}
static void release_hold(void) { sched_set(&hold); }

/* The pool goes before the group does, as it may while a task of the group runs that the pool has left behind. */
static void setup_stuck(void) {
    setup_pool();
    add_fn(A, waits_for_b);
    ctx__sched_relax();
}
static void setup_stuck_other(void) { /* ... or a task of somebody else, and a turn of the group is lost */
    setup_busy_rejects();
    add(A);
}
static void free_pool_release_wait(void) {
    ctx_pool_free(pool);
    pool = NULL;
    sched_set(&hold);
    wait_group();
}
static void free_pool_tell(void) {
    ctx_pool_free(pool);
    pool = NULL;
    sched_set(&told);
}

/* Two tasks wait to add others while a thread outside waits for room. */
static void add_c_outside(void) { add(C); }
static void wait_after_c(void) {
    sched_await(&tasks[A].added);
    sched_await(&tasks[C].added);
    wait_group();
}
static void add_parent(void) { add_fn(A, adds_b); }

/* The first failure is the result and the cause, whoever adds or fails at the same time. */
static ctx_t *failed;
static void setup_failure(void) {
    setup_limit_2();
    failed = ctx_retain(ctx_group_ctx(group));
}
static void add_fails(void) { add_fn(A, fails); }
static void add_b_fails(void) { add_fn(B, fails); }
static void check_cause(void) {
    int rc;
    wait_group();
    rc = rc_wait;
    SCHED_CHECK(rc == (tasks[A].rc || ctx_cause(failed).code == -8 ? -8 : -7));
    SCHED_CHECK(ctx_cause(failed).code == rc);
    ctx_release(failed);
    check_result(rc);
}

/* A task that fails makes no room: it cancels first. */
static int tells_fails(ctx_t *ctx, void *arg) {
    runs(ctx, arg);
    sched_set(&told);
    return -7;
}
static void add_fails_told(void) { add_fn(A, tells_fails); }
static void try_after_failure(void) {
    sched_await(&told);
    try_add(B);
    SCHED_CHECK(tasks[B].rc == CTX_QUEUE_FULL || tasks[B].rc == CTX_CANCELED);
}

/* on_error hears of all, one call at a time, before the wait returns. */
static sched_flag_t in_call;
static int heard;
static void hears(void *arg, int rc, void *user) {
    (void)arg;
    (void)rc;
    (void)user;
    SCHED_CHECK(!sched_is_set(&in_call));
    sched_set(&in_call);
    heard++;
    CTX__STORE(&in_call, 0u, SEQ_CST);
}
static void listen_with(void (*on_error)(void *arg, int rc, void *user)) {
    group->keep_going = true;
    group->on_error = on_error;
}
static void setup_hears(void) {
    setup_limit_2();
    listen_with(hears);
}
static void setup_hears_threads(void) {
    setup_threads_2();
    listen_with(hears);
}
static void check_heard(void) {
    wait_group();
    SCHED_CHECK(heard == 2);
    check_result(rc_wait);
}
/* The same without memory for a queue of errors. */
static void hears_without_memory(void *arg, int rc, void *user) {
    sched_malloc_most = 0;
    hears(arg, rc, user);
    sched_malloc_most = SIZE_MAX;
}
static void setup_hears_without_memory(void) {
    setup_limit_2();
    listen_with(hears_without_memory);
}
static void add_nothing(void) { SCHED_CHECK(ctx_group_go(group, NULL, NULL) == CTX_INVALID); }
/* ... while on_error waits for the room of the task that fails. */
static int holds_b_fails(ctx_t *ctx, void *arg) {
    holds_b(ctx, arg);
    return -8;
}
static void hears_waits_for_room(void *arg, int rc, void *user) {
    sched_malloc_most = 0;
    hears(arg, rc, user);
    sched_set(&hold);
    if (rc == CTX_INVALID) add(A);
    sched_malloc_most = SIZE_MAX;
}
static void setup_waits_for_room(void) {
    setup_limit_1();
    listen_with(hears_waits_for_room);
    add_fn(B, holds_b_fails);
    sched_await(&tasks[B].has_run);
}

/* A turn has run all but one of the tasks after which it queues up again: the rest happens in the scenario. */
static int long_ran; /* [atomic] */
static int runs_of_many(ctx_t *ctx, void *arg) {
    (void)ctx;
    (void)arg;
    if (CTX__ADD(&long_ran, 1, RELAXED) + 1 != CTX__TURN_TASKS - 1) return 0;
    sched_set(&begun);
    sched_await(&hold);
    return 0;
}
static void setup_turn(void) {
    int i;
    pool_of(1, 64, CTX_REJECT);
    warm();
    group_of(0);
    for (i = 0; i < CTX__TURN_TASKS + 1; i++) SCHED_CHECK(ctx_group_go(group, runs_of_many, NULL) == 0);
    add(A);
    sched_await(&begun);
    SCHED_CHECK(long_ran == CTX__TURN_TASKS - 1);
}
static void check_turn(void) {
    check_1();
    SCHED_CHECK(long_ran == CTX__TURN_TASKS + 1);
}
static void release_wait(void) {
    sched_set(&hold);
    wait_group();
}
static void release_see(void) { /* the turn goes on without the owner */
    sched_set(&hold);
    see(A);
}

/* -- tasks that wait for each other -- */

static ctx_chan_t *first_chan, *last_chan;
static int items;
static int passes_on(ctx_t *ctx, const void *in, void *out, void *user) {
    (void)ctx;
    (void)user;
    if (out) memcpy(out, in, sizeof(int));
    else items++;
    return 0;
}
static int first_stage(ctx_t *ctx, void *arg) {
    ctx_stage_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.in = first_chan;
    desc.out = last_chan;
    desc.fn = passes_on;
    runs(ctx, arg);
    return ctx_stage_run(ctx, &desc);
}
static int last_stage(ctx_t *ctx, void *arg) {
    ctx_stage_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.in = last_chan;
    desc.fn = passes_on;
    runs(ctx, arg);
    return ctx_stage_run(ctx, &desc);
}
static int source(ctx_t *ctx, void *arg) {
    int item = 1, rc = ctx_chan_send(first_chan, ctx, &item);
    runs(ctx, arg);
    ctx_chan_close(first_chan);
    return rc;
}
static void setup_stages(void) {
    setup_pool();
    first_chan = ctx_chan_new(sizeof(int), 0);
    last_chan = ctx_chan_new(sizeof(int), 0);
}
static void add_pipeline_wait(void) { /* the worker and this thread get the stages, and nobody is left for the source */
    add_fn(A, last_stage);
    add_fn(B, first_stage);
    add_fn(C, source);
    wait_group();
}
static void add_pipeline_late(void) { /* the last stage waits already */
    add_fn(A, last_stage);
    see(A);
    add_fn(B, first_stage);
    add_fn(C, source);
    wait_group();
}
static void check_stages(void) {
    check_3();
    SCHED_CHECK(items == 1);
    ctx_chan_free(first_chan);
    ctx_chan_free(last_chan);
}

/* -- runners -- */

static int works[3];
static sched_flag_t work_begun[2], work_through[2];

static int work(ctx_t *ctx, void *arg) {
    (void)ctx;
    works[(int)(intptr_t)arg]++;
    return 0;
}
static int meets(ctx_t *ctx, void *arg) { /* two jobs that wait for each other */
    int i = (int)(intptr_t)arg;
    work(ctx, arg);
    sched_set(&work_begun[i]);
    sched_await(&work_begun[1 - i]);
    return 0;
}
static int waits_for_all(ctx_t *ctx, void *arg) {
    work(ctx, arg);
    SCHED_CHECK(ctx_go_wait(ctx) == 0);
    return 0;
}
static int waits_then_meets(ctx_t *ctx, void *arg) { /* both get through, though neither has returned */
    int i = (int)(intptr_t)arg;
    meets(ctx, arg);
    SCHED_CHECK(ctx_go_wait(ctx) == 0);
    sched_set(&work_through[i]);
    sched_await(&work_through[1 - i]);
    return 0;
}
static void go_fn(int i, ctx_task_fn fn) {
    SCHED_CHECK(ctx_go(ctx_background(), "work", fn, (void *)(intptr_t)i) == 0);
}
static void wait_work(void) { SCHED_CHECK(ctx_go_wait(ctx_background()) == 0); }

/* These wait for the work: so the schedules go on until it is done. */
static void go_0(void) {
    go_fn(0, work);
    wait_work();
}
static void go_1(void) {
    go_fn(1, work);
    wait_work();
}
static void go_twice(void) {
    go_fn(0, work);
    go_fn(1, work);
    wait_work();
}
static void meet_0(void) {
    go_fn(0, meets);
    wait_work();
}
static void meet_1(void) {
    go_fn(1, meets);
    wait_work();
}
static void meet_both(void) {
    go_fn(0, meets);
    go_fn(1, meets);
    wait_work();
}
static void wait_inside_0(void) {
    go_fn(0, waits_for_all);
    wait_work();
}
static void wait_inside_1(void) {
    go_fn(1, waits_for_all);
    wait_work();
}
static void wait_meet_both(void) {
    go_fn(0, waits_then_meets);
    go_fn(1, waits_then_meets);
    sched_await(&work_through[0]);
    wait_work();
}
static void go_wait_see(void) {
    go_0();
    SCHED_CHECK(works[0] == 1);
}
static void stop_runtime(void) { ctx_runtime_stop(); }
static void go_release(void) {
    go_fn(0, work);
    sched_set(&hold);
    wait_work();
}
static void go_release_stop(void) {
    go_fn(0, work);
    sched_set(&hold);
    ctx_runtime_stop();
}
static void check_work(int n) {
    int i;
    SCHED_CHECK(ctx_go_wait(ctx_background()) == 0);
    for (i = 0; i < n; i++) SCHED_CHECK(works[i] == 1);
    while (ctx_go_count()) ctx__sched_relax(); /* work that waits itself */
    let_end();
}
static void check_work_0(void) { check_work(0); }
static void check_work_1(void) { check_work(1); }
static void check_work_2(void) { check_work(2); }

/* One or two runners that are idle and sleep. */
static void setup_idle(void) {
    /* With the name of an idle runner, so that each sleeps once and not first for a moment: fewer steps. */
    SCHED_CHECK(ctx_go(ctx_background(), ctx__runner_name, nothing, NULL) == 0);
    ctx__sched_relax();
}
static void setup_idle_ends(void) {
    setup_idle();
    let_times_come();
}

static void check_work_later(void) { /* the runners are as good as new */
    SCHED_CHECK(ctx_go_wait(ctx_background()) == 0);
    setup_idle();
    go_fn(1, work);
    check_work(2);
}

/* One is at work until `hold` is set, one is idle. */
static void setup_busy_idle(void) {
    SCHED_CHECK(ctx_go(ctx_background(), ctx__runner_name, holds, NULL) == 0);
    sched_await(&begun);
    setup_idle();
}
static void setup_idle_2(void) {
    go_fn(0, meets);
    go_fn(1, meets);
    ctx__sched_relax();
    ctx__sched_relax();
    SCHED_CHECK(ctx_go_wait(ctx_background()) == 0);
    ctx__sched_relax();
    works[0] = works[1] = 0;
    work_begun[0] = work_begun[1] = 0;
}
static void setup_idle_2_ends(void) {
    setup_idle_2();
    let_times_come();
}

static const sched_scenario_t scenarios[] = {
    { "group: nested adds, one worker", setup_limit_1, { T(add_parent_wait) }, check_3, false },
    { "group: add below the limit, nested", setup_limit_2, { T(add_child_try) }, check_2, false },
    { "group: nested adds, two levels", setup_limit_1, { T(add_grandparent_wait) }, check_4, false },
    { "group: all tasks wait to add", setup_limit_2, { T(add_two_parents_wait) }, check_4, false },
    { "group: nested adds / add", setup_limit_1, { T(add_parent), T(add_c) }, check_3, false },
    { "group: nested adds / add / wait", setup_limit_1,
      { T(add_parent), T(add_c_outside), T(wait_after_c) }, check_3, false },
    { "group: nested adds, threads", setup_threads_1, { T(add_parent_wait) }, check_3, false },
    { "group: all tasks wait to add, threads", setup_threads_2, { T(add_two_parents_wait) }, check_4, false },
    { "group: nested adds, threads / add", setup_threads_1, { T(add_parent), T(add_c) }, check_3, false },
    { "group: add, threads / add", setup_threads_1, { T(add_a), T(add_b) }, check_2, false },
    { "group: add / add", setup_limit_2, { T(add_a_see), T(add_b_see) }, check_unaided_2, false },
    { "group: adds at the limit", setup_limit_1, { T(add_a_see), T(add_b_see) }, check_unaided_2, false },
    { "group: adds at the limit / drain", setup_limit_1, { T(add_a), T(add_b), T(drain_all) }, check, false },
    { "group: nested adds / drain", setup_limit_1, { T(add_parent_wait), T(drain_all) }, check, false },
    { "group: no thread", setup_no_thread, { T(add_a), T(add_b) }, check_unaided, false },
    { "group: no thread, two at once", setup_no_thread_2, { T(add_a), T(add_b) }, check_unaided, false },
    { "group: no thread / three", setup_no_thread_2, { T(add_a), T(add_b), T(add_c) }, check_unaided, false },
    { "group: full pool, pushed out", setup_busy_drops, { T(add_push_await) }, check_1, false },
    { "group: full pool, two workers come free", setup_busy_2, { T(add_meeting) }, check_2, false },
    { "group: full pool / worker comes free", setup_busy_rejects,
      { T(add_a_b_wait), T(release_hold) }, check_2, false },
    { "group: over, pool has room", setup_busy_rejects, { T(add_wait_submit) }, check_1, false },
    { "group: over, drain inside", setup_no_group, { T(submit_drains) }, check_1, false },
    { "group: over, next has room", setup_busy_rejects, { T(add_wait_try) }, check_2, false },
    { "group: over, next does not run here", setup_busy_rejects, { T(add_wait_add) }, check_2, false },
    { "group: lost turn, lifetime ends / wait", setup_pool, { T(add_a_wait), T(cancel_life) }, check, false },
    { "group: lost turn, lifetime ends / add / wait", setup_busy_rejects,
      { T(add_a_wait), T(cancel_life), T(release_hold) }, check, false },
    { "group: lost turn, drain cuts / wait", setup_busy_rejects,
      { T(add_a_wait), T(drain_cut), T(release_hold) }, check, false },
    { "group: lost turn, lifetime ends / adds at the limit", setup_limit_1,
      { T(add_a), T(add_b), T(cancel_life) }, check, false },
    { "group: wait / task that needs another", setup_pool, { T(add_needy_wait) }, check_2, false },
    { "group: wait / last task", setup_pool, { T(add_a_wait) }, check_1, false },
    { "group: wait / last of two", setup_limit_2, { T(add_a_b_wait) }, check_2, false },
    { "group: wait / last task, threads", setup_threads_2, { T(add_a_b_wait) }, check_2, false },
    { "group: late turn / free", setup_busy_rejects, { T(add_a_wait), T(release_hold) }, check_1, false },
    { "group: pool freed, task left behind / wait", setup_stuck, { T(wait_group), T(free_pool_tell) }, check_1, false },
    { "group: pool freed, turn lost / wait", setup_stuck_other, { T(free_pool_release_wait) }, check_1, false },
    { "group: requeue / wait", setup_turn, { T(release_wait) }, check_turn, false },
    { "group: requeue / drain", setup_turn, { T(release_see), T(drain_all) }, check_turn, false },
    { "group: requeue / lifetime ends", setup_turn, { T(release_wait), T(cancel_life) }, check_turn, false },
    { "group: stages on one worker", setup_stages, { T(add_pipeline_wait) }, check_stages, false },
    { "group: stages on one worker, added late", setup_stages, { T(add_pipeline_late) }, check_stages, false },
    { "group: failure / add", setup_limit_2, { T(add_fails), T(add_c) }, check_failed, false },
    { "group: failure / failure", setup_failure, { T(add_fails), T(add_b_fails) }, check_cause, false },
    { "group: failure makes no room", setup_limit_1, { T(add_fails_told), T(try_after_failure) }, check_failed, false },
    { "group: failure makes no room, threads", setup_threads_1, { T(add_fails_told), T(try_after_failure) },
      check_failed, false },
    { "group: error / error", setup_hears, { T(add_fails), T(add_b_fails) }, check_heard, false },
    { "group: error / error, threads", setup_hears_threads, { T(add_fails), T(add_b_fails) }, check_heard, false },
    { "group: error / refusal", setup_hears, { T(add_fails), T(add_nothing) }, check_heard, false },
    { "group: error / refusal, no memory", setup_hears_without_memory, { T(add_fails), T(add_nothing) },
      check_heard, false },
    { "group: error, on_error waits for its room, no memory", setup_waits_for_room, { T(add_nothing) },
      check_heard, false },
    { "group: runner, go / go", NULL, { T(go_0), T(go_1) }, check_work_2, false },
    { "group: runner, idle / go", setup_idle, { T(go_0) }, check_work_1, false },
    { "group: runner, idle ends / go", setup_idle_ends, { T(go_0) }, check_work_1, false },
    { "group: runner, idle ends / go, go", setup_idle_ends, { T(go_twice) }, check_work_2, false },
    { "group: runner, one comes free / go", setup_busy_idle, { T(go_release) }, check_work_later, false },
    { "group: runner, one comes free / go, stop", setup_busy_idle, { T(go_release_stop) }, check_work_later, false },
    { "group: runner, two idle end / go", setup_idle_2_ends, { T(go_0) }, check_work_1, false },
    { "group: runner, idle / go / go", setup_idle, { T(go_0), T(go_1) }, check_work_2, false },
    { "group: runner, idle / go, go", setup_idle, { T(go_twice) }, check_work_2, false },
    { "group: runner, two idle / jobs that meet", setup_idle_2, { T(meet_both) }, check_work_2, false },
    { "group: runner, two idle / job / job that meet", setup_idle_2, { T(meet_0), T(meet_1) }, check_work_2, false },
    { "group: runner, idle / jobs that meet", setup_idle, { T(meet_both) }, check_work_2, false },
    { "group: runner, go, wait", setup_idle, { T(go_wait_see) }, check_work_1, false },
    { "group: runner, two wait inside", NULL, { T(wait_inside_0), T(wait_inside_1) }, check_work_2, false },
    { "group: runner, two wait inside, then meet", NULL, { T(wait_meet_both) }, check_work_2, false },
    { "group: runner, one waits inside / wait", NULL, { T(wait_inside_0), T(wait_work) }, check_work_1, false },
    { "group: runner, stop / go", setup_idle, { T(stop_runtime), T(go_0) }, check_work_1, false },
    { "group: runner, two idle / stop / jobs that meet", setup_idle_2,
      { T(stop_runtime), T(meet_both) }, check_work_2, false },
    { "group: runner, stop / stop", setup_idle, { T(stop_runtime), T(stop_runtime) }, check_work_0, false },
};
SCHED_MAIN(scenarios)
