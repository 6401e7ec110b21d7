/* Callbacks: a stop concerns the latest registration, waits for its run and for no other, and never in a circle. */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

#include <sys/wait.h>

/* A callback that says when it runs and stays until its gate opens. */
typedef struct {
    ctx_on_done_t reg;
    ctx_t *ctx;
    gate_t gate;
    int finished;              /* [atomic] */
    void (*inside)(void *arg); /* called once the gate is open (NULL: nothing) */
    void *arg;
} held_t;

static void hold(void *arg) {
    held_t *held = (held_t *)arg;
    gate_pass(&held->gate);
    if (held->inside) held->inside(held->arg);
    store(&held->finished, 1);
}

static void held_make(held_t *held, void (*inside)(void *arg), void *arg) {
    memset(held, 0, sizeof *held);
    gate_init(&held->gate);
    held->ctx = ctx_with_cancel(ctx_background());
    held->inside = inside;
    held->arg = arg;
}

static void held_end(held_t *held) {
    ctx_end(held->ctx);
    gate_destroy(&held->gate);
}

static void *cancels(void *ctx) {
    ctx_cancel((ctx_t *)ctx);
    return NULL;
}

/* A thread that stops a callback and says what came of it. */
typedef struct {
    ctx_on_done_t *reg;
    int tid, returned, result; /* [atomic] */
    int *seen_finished;        /* what is to be finished by then; may be NULL */
    int finished;              /* [atomic] whether it was */
} stopper_t;

static void stop_now(void *arg) {
    stopper_t *stopper = (stopper_t *)arg;
    bool stopped = ctx_on_done_stop(stopper->reg);
    store(&stopper->result, stopped);
    if (stopper->seen_finished) store(&stopper->finished, load(stopper->seen_finished));
    store(&stopper->returned, 1);
}

static void *stops(void *arg) {
    stopper_t *stopper = (stopper_t *)arg;
    store(&stopper->tid, thread_id());
    stop_now(stopper);
    return NULL;
}

static void stopper_make(stopper_t *stopper, ctx_on_done_t *reg, int *seen_finished) {
    memset(stopper, 0, sizeof *stopper);
    stopper->reg = reg;
    stopper->seen_finished = seen_finished;
}

static void count(void *arg) { add((int *)arg, 1); }

/* -- a registration used again inside its own callback ------------------------------------------------------------- */

/* The older callback registers `reg` anew on `next`, then stays; the newer one stays too. */
typedef struct {
    ctx_on_done_t reg;
    ctx_t *first, *next;
    gate_t older, newer;
    int newer_finished; /* [atomic] */
    int runs;           /* [atomic] of the newer */
    bool stop_inside;
    stopper_t inside;
} again_t;

static void newer(void *arg) {
    again_t *again = (again_t *)arg;
    add(&again->runs, 1);
    gate_pass(&again->newer);
    store(&again->newer_finished, 1);
}

static void older(void *arg) {
    again_t *again = (again_t *)arg;
    ctx_on_done(&again->reg, again->next, newer, again);
    gate_pass(&again->older);
    if (again->stop_inside) (void)stops(&again->inside);
}

static pthread_t again_start(again_t *again, bool stop_inside) {
    memset(again, 0, sizeof *again);
    gate_init(&again->older);
    gate_init(&again->newer);
    again->first = ctx_with_cancel(ctx_background());
    again->next = ctx_with_cancel(ctx_background());
    again->stop_inside = stop_inside;
    stopper_make(&again->inside, &again->reg, &again->newer_finished);
    EXPECT(ctx_on_done(&again->reg, again->first, older, again));
    pthread_t thread = thread_start(cancels, again->first);
    gate_await(&again->older, 1);
    return thread;
}

static void again_end(again_t *again) {
    ctx_end(again->first);
    ctx_end(again->next);
    gate_destroy(&again->older);
    gate_destroy(&again->newer);
}

TEST(stop_waits_for_the_run_of_the_latest_registration) {
    again_t again;
    stopper_t stopper;
    pthread_t first = again_start(&again, false), next = thread_start(cancels, again.next);
    gate_await(&again.newer, 1); /* both run */
    stopper_make(&stopper, &again.reg, &again.newer_finished);
    pthread_t stopping = thread_start(stops, &stopper);
    until_asleep(&stopper.tid);
    EXPECT(!load(&stopper.returned));
    gate_open(&again.newer);
    UNTIL(load(&stopper.returned)); /* the older one still runs */
    gate_open(&again.older);
    thread_join(stopping);
    thread_join(first);
    thread_join(next);
    EXPECT_EQ(load(&stopper.result), false);
    EXPECT(load(&stopper.finished));
    again_end(&again);
}

TEST(stop_waits_for_no_older_run_when_the_latest_one_has_finished) {
    again_t again;
    stopper_t stopper;
    pthread_t first = again_start(&again, false);
    gate_open(&again.newer);
    EXPECT(ctx_cancel(again.next)); /* the newer runs here, to its end */
    EXPECT(load(&again.newer_finished));
    stopper_make(&stopper, &again.reg, NULL);
    pthread_t stopping = thread_start(stops, &stopper);
    UNTIL(load(&stopper.returned));
    EXPECT_EQ(load(&stopper.result), false);
    gate_open(&again.older);
    thread_join(stopping);
    thread_join(first);
    again_end(&again);
}

TEST(a_latest_registration_that_has_not_run_is_stopped_while_the_older_runs) {
    again_t again;
    stopper_t stopper;
    pthread_t first = again_start(&again, false);
    stopper_make(&stopper, &again.reg, NULL);
    pthread_t stopping = thread_start(stops, &stopper);
    UNTIL(load(&stopper.returned));
    EXPECT_EQ(load(&stopper.result), true);
    gate_open(&again.older);
    gate_open(&again.newer);
    thread_join(stopping);
    thread_join(first);
    EXPECT(ctx_cancel(again.next));
    EXPECT_EQ(load(&again.runs), 0);
    again_end(&again);
}

TEST(a_stop_inside_an_older_run_waits_for_the_latest_on_another_thread) {
    again_t again;
    pthread_t first = again_start(&again, true), next = thread_start(cancels, again.next);
    gate_await(&again.newer, 1);
    gate_open(&again.older); /* it stops `reg` now */
    until_asleep(&again.inside.tid);
    EXPECT(!load(&again.inside.returned));
    gate_open(&again.newer);
    UNTIL(load(&again.inside.returned));
    thread_join(first);
    thread_join(next);
    EXPECT_EQ(load(&again.inside.result), false);
    EXPECT(load(&again.inside.finished));
    again_end(&again);
}

TEST(a_stop_inside_an_older_run_takes_the_latest_back) {
    again_t again;
    pthread_t first = again_start(&again, true);
    gate_open(&again.older);
    UNTIL(load(&again.inside.returned));
    EXPECT_EQ(load(&again.inside.result), true);
    gate_open(&again.newer);
    thread_join(first);
    EXPECT(ctx_cancel(again.next));
    EXPECT_EQ(load(&again.runs), 0);
    again_end(&again);
}

/* A registration that goes on from context to context, each time inside its own callback. */
typedef struct {
    ctx_on_done_t reg;
    ctx_t *chain[20];
    int at;   /* by the callback */
    int runs; /* [atomic] */
} hop_t;

static void hops(void *arg) {
    hop_t *hop = (hop_t *)arg;
    add(&hop->runs, 1);
    if (hop->at < 20) ctx_on_done(&hop->reg, hop->chain[hop->at++], hops, hop);
}

TEST(a_registration_used_again_in_each_of_its_runs_runs_once_per_context) {
    hop_t hop;
    memset(&hop, 0, sizeof hop);
    for (int i = 0; i < 20; i++) hop.chain[i] = ctx_with_cancel(ctx_background());
    hop.at = 1;
    EXPECT(ctx_on_done(&hop.reg, hop.chain[0], hops, &hop));
    for (int i = 0; i < 10; i++) {
        EXPECT(ctx_cancel(hop.chain[i]));
        EXPECT_EQ(load(&hop.runs), i + 1);
    }
    for (int i = 11; i < 20; i++) ctx_cancel(hop.chain[i]); /* so that the next run goes on from run to run */
    EXPECT(ctx_cancel(hop.chain[10]));
    EXPECT_EQ(load(&hop.runs), 20);
    EXPECT(!ctx_on_done_stop(&hop.reg));
    for (int i = 0; i < 20; i++) ctx_end(hop.chain[i]);
}

/* -- inside a callback --------------------------------------------------------------------------------------------- */

TEST(a_stop_inside_its_own_callback_returns_false_at_once) {
    held_t held;
    stopper_t stopper;
    held_make(&held, stop_now, &stopper);
    stopper_make(&stopper, &held.reg, NULL);
    gate_open(&held.gate);
    EXPECT(ctx_on_done(&held.reg, held.ctx, hold, &held));
    EXPECT(ctx_cancel(held.ctx));
    EXPECT(load(&stopper.returned));
    EXPECT_EQ(load(&stopper.result), false);
    EXPECT(!ctx_on_done(&held.reg, held.ctx, hold, &held)); /* and where it runs in the call that registers it */
    EXPECT_EQ(load(&stopper.result), false);
    held_end(&held);
}

/* A child of fork() keeps a hang to itself; the thread sanitizer knows no threads there. */
static int apart(void (*fn)(void)) {
#ifdef TEST_THREAD_SANITIZER
    fn();
    return 0;
#else
    ctx_runtime_stop();
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm((unsigned)(PATIENCE_NS / 1000000000) * 2 + 1);
        fn();
        if (test_state.failures > 0) fprintf(stderr, "  in the child: %s\n", test_state.first_text);
        _exit(test_state.failures > 0);
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
#endif
}

/* Callbacks wait for each other: nothing can be taken apart any more. */
static void give_up(void) {
    if (getpid() == test_state.pid)
        test_cut("callbacks wait for each other");
    else
        fprintf(stderr, "  in the child: %s\n", test_state.first_text);
    _exit(1);
}

/* N callbacks, each on a thread of its own, each of which stops the next one's, the last the first's. */
enum { CIRCLE = 5 };

static void check_circle(int n, bool with_outsider) {
    held_t held[CIRCLE];
    stopper_t stoppers[CIRCLE], outsider;
    pthread_t threads[CIRCLE], outside = pthread_self();
    for (int i = 0; i < n; i++) held_make(&held[i], stop_now, &stoppers[i]);
    for (int i = 0; i < n; i++) stopper_make(&stoppers[i], &held[(i + 1) % n].reg, NULL);
    for (int i = 0; i < n; i++) {
        EXPECT(ctx_on_done(&held[i].reg, held[i].ctx, hold, &held[i]));
        threads[i] = thread_start(cancels, held[i].ctx);
        gate_await(&held[i].gate, 1);
    }
    stopper_make(&outsider, &held[0].reg, &held[0].finished);
    if (with_outsider) { /* waits for one of them, and nobody for it */
        outside = thread_start(stops, &outsider);
        until_asleep(&outsider.tid);
        EXPECT(!load(&outsider.returned));
    }
    for (int i = 0; i < n; i++) gate_open(&held[i].gate);
    for (int i = 0; i < n; i++) UNTIL(load(&held[i].finished));
    bool all = true;
    for (int i = 0; i < n; i++) all = all && load(&held[i].finished);
    if (!all) { /* nothing can be taken apart any more */
        give_up();
    }
    for (int i = 0; i < n; i++) thread_join(threads[i]);
    for (int i = 0; i < n; i++) EXPECT_EQ(load(&stoppers[i].result), false);
    if (with_outsider) {
        thread_join(outside);
        EXPECT_EQ(load(&outsider.result), false);
        EXPECT(load(&outsider.finished));
    }
    for (int i = 0; i < n; i++) held_end(&held[i]);
}

static void circle_of_two(void) { check_circle(2, false); }
static void circle_of_three(void) { check_circle(3, false); }
static void circle_of_five(void) { check_circle(5, true); }

TEST(two_callbacks_that_stop_each_other_do_not_wait_for_each_other) { EXPECT_EQ(apart(circle_of_two), 0); }

TEST(three_callbacks_that_stop_each_other_in_a_circle_do_not_wait) { EXPECT_EQ(apart(circle_of_three), 0); }

TEST(a_stop_from_outside_waits_for_a_callback_that_is_in_a_circle) { EXPECT_EQ(apart(circle_of_five), 0); }

/* outer runs on thread 1 and cancels another context, whose callback inner runs nested in it and stops `elsewhere`'s,
   which runs on thread 2 and stops outer's. */
typedef struct {
    held_t outer, elsewhere;
    ctx_on_done_t inner_reg;
    ctx_t *inner_ctx;
    stopper_t by_inner, by_elsewhere;
} nested_t;

static void inner(void *arg) { stop_now(&((nested_t *)arg)->by_inner); }
static void cancel_inner(void *arg) { ctx_cancel(((nested_t *)arg)->inner_ctx); }
static void stop_outer(void *arg) { (void)stops(&((nested_t *)arg)->by_elsewhere); }

static void check_nested(void) {
    nested_t nested;
    held_make(&nested.outer, cancel_inner, &nested);
    held_make(&nested.elsewhere, stop_outer, &nested);
    nested.inner_ctx = ctx_with_cancel(ctx_background());
    stopper_make(&nested.by_inner, &nested.elsewhere.reg, NULL);
    stopper_make(&nested.by_elsewhere, &nested.outer.reg, &nested.outer.finished);
    EXPECT(ctx_on_done(&nested.outer.reg, nested.outer.ctx, hold, &nested.outer));
    EXPECT(ctx_on_done(&nested.elsewhere.reg, nested.elsewhere.ctx, hold, &nested.elsewhere));
    EXPECT(ctx_on_done(&nested.inner_reg, nested.inner_ctx, inner, &nested));
    pthread_t one = thread_start(cancels, nested.outer.ctx), two = thread_start(cancels, nested.elsewhere.ctx);
    gate_await(&nested.outer.gate, 1);
    gate_await(&nested.elsewhere.gate, 1);
    gate_open(&nested.elsewhere.gate); /* waits for outer */
    until_asleep(&nested.by_elsewhere.tid);
    EXPECT(!load(&nested.by_elsewhere.returned));
    gate_open(&nested.outer.gate);
    UNTIL(load(&nested.outer.finished) && load(&nested.elsewhere.finished));
    if (!load(&nested.outer.finished) || !load(&nested.elsewhere.finished)) {
        give_up();
    }
    thread_join(one);
    thread_join(two);
    EXPECT_EQ(load(&nested.by_inner.result), false);
    EXPECT_EQ(load(&nested.by_elsewhere.result), false);
    EXPECT(load(&nested.by_elsewhere.finished)); /* that one was in no circle yet: it has waited */
    ctx_end(nested.inner_ctx);
    held_end(&nested.outer);
    held_end(&nested.elsewhere);
}

TEST(a_stop_in_a_callback_nested_in_one_that_is_waited_for_does_not_wait) { EXPECT_EQ(apart(check_nested), 0); }

/* -- try_stop: never waits ----------------------------------------------------------------------------------------- */

TEST(try_stop_takes_a_callback_back_that_has_not_run) {
    ctx_on_done_t reg;
    int runs = 0;
    memset(&reg, 0, sizeof reg);
    EXPECT_EQ((int)ctx_on_done_try_stop(&reg), CTX_ON_DONE_STOPPED); /* never registered */
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&reg, ctx, count, &runs));
    EXPECT_EQ((int)ctx_on_done_try_stop(&reg), CTX_ON_DONE_STOPPED);
    EXPECT_EQ((int)ctx_on_done_try_stop(&reg), CTX_ON_DONE_STOPPED);
    EXPECT(ctx_on_done_stop(&reg));
    EXPECT(ctx_cancel(ctx));
    EXPECT_EQ(runs, 0);
    ctx_end(ctx);
}

TEST(try_stop_says_that_a_callback_has_run) {
    ctx_on_done_t reg;
    int runs = 0;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&reg, ctx, count, &runs));
    EXPECT(ctx_cancel(ctx));
    EXPECT_EQ((int)ctx_on_done_try_stop(&reg), CTX_ON_DONE_RAN);
    EXPECT(!ctx_on_done(&reg, ctx, count, &runs));
    EXPECT_EQ((int)ctx_on_done_try_stop(&reg), CTX_ON_DONE_RAN);
    EXPECT_EQ(runs, 2);
    ctx_end(ctx);
}

typedef struct {
    ctx_on_done_t *reg;
    int returned, result; /* [atomic] */
} trier_t;

static void try_now(void *arg) {
    trier_t *trier = (trier_t *)arg;
    store(&trier->result, (int)ctx_on_done_try_stop(trier->reg));
    store(&trier->returned, 1);
}

static void *tries(void *arg) {
    try_now(arg);
    return NULL;
}

TEST(try_stop_says_that_a_callback_is_running_and_does_not_wait) {
    held_t held;
    trier_t trier;
    memset(&trier, 0, sizeof trier);
    held_make(&held, NULL, NULL);
    trier.reg = &held.reg;
    EXPECT(ctx_on_done(&held.reg, held.ctx, hold, &held));
    pthread_t thread = thread_start(cancels, held.ctx);
    gate_await(&held.gate, 1);
    pthread_t trying = thread_start(tries, &trier);
    UNTIL(load(&trier.returned));
    EXPECT_EQ(load(&trier.result), CTX_ON_DONE_RUNNING);
    gate_open(&held.gate);
    thread_join(trying);
    thread_join(thread);
    EXPECT_EQ((int)ctx_on_done_try_stop(&held.reg), CTX_ON_DONE_RAN);
    held_end(&held);
}

TEST(try_stop_inside_its_own_callback_says_that_it_is_running) {
    held_t held;
    trier_t trier;
    memset(&trier, 0, sizeof trier);
    held_make(&held, try_now, &trier);
    trier.reg = &held.reg;
    gate_open(&held.gate);
    EXPECT(ctx_on_done(&held.reg, held.ctx, hold, &held));
    EXPECT(ctx_cancel(held.ctx));
    EXPECT_EQ(load(&trier.result), CTX_ON_DONE_RUNNING);
    held_end(&held);
}

TEST(try_stop_concerns_the_latest_registration) {
    again_t again;
    trier_t trier;
    memset(&trier, 0, sizeof trier);
    pthread_t first = again_start(&again, false);
    trier.reg = &again.reg;
    gate_open(&again.newer);
    EXPECT(ctx_cancel(again.next)); /* the latest has run; the older one still runs */
    pthread_t trying = thread_start(tries, &trier);
    UNTIL(load(&trier.returned));
    EXPECT_EQ(load(&trier.result), CTX_ON_DONE_RAN);
    gate_open(&again.older);
    thread_join(trying);
    thread_join(first);
    again_end(&again);
}

/* -- against each other: whatever wins, once ----------------------------------------------------------------------- */

typedef struct {
    start_line_t line;
    ctx_on_done_t reg;
    ctx_t *ctx;
    int rounds;
    int runs;   /* plain: a stop must order it */
    int result; /* of the try */
} try_race_t;

static void run_plainly(void *arg) { ++*(int *)arg; }

static void *races(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    try_race_t *race = (try_race_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    for (int i = 0; i < race->rounds; i++) {
        if (side->id == 0) {
            race->ctx = ctx_with_cancel(ctx_background());
            race->runs = 0;
            EXPECT(ctx_on_done(&race->reg, race->ctx, run_plainly, &race->runs));
        }
        start_line(&race->line);
        race_dither(race_random(&seed));
        if (side->id == 0) {
            ctx_cancel(race->ctx);
        } else {
            int result = CTX_ON_DONE_RUNNING;
            for (int turns = 0; result == CTX_ON_DONE_RUNNING; race_pause(&turns))
                result = (int)ctx_on_done_try_stop(&race->reg);
            EXPECT_EQ(race->runs, result == CTX_ON_DONE_RAN);
        }
        start_line(&race->line);
        if (side->id == 0) ctx_end(race->ctx);
    }
    return NULL;
}

TEST(try_stop_against_a_cancel_tells_the_truth) {
    try_race_t race;
    memset(&race, 0, sizeof race);
    race.rounds = test_scale(20000);
    start_line_init(&race.line, 2);
    race_run(2, races, &race);
}

/* -- deadlines: the runtime thread calls, and those who wait do not need it ---------------------------------------- */

/* A callback that keeps the runtime thread, but not the thread that registers it too late. */
typedef struct {
    ctx_on_done_t reg;
    ctx_t *ctx;
    pthread_t maker;
    gate_t gate;
} busy_t;

static void keep_the_runtime(void *arg) {
    busy_t *busy = (busy_t *)arg;
    if (!pthread_equal(busy->maker, pthread_self())) gate_pass(&busy->gate);
}

static void busy_make(busy_t *busy) {
    memset(busy, 0, sizeof *busy);
    gate_init(&busy->gate);
    busy->maker = pthread_self();
    for (;;) {
        busy->ctx = ctx_with_timeout(ctx_background(), CTX_MS(20));
        if (ctx_on_done(&busy->reg, busy->ctx, keep_the_runtime, busy)) break;
        ctx_end(busy->ctx); /* this thread slept through the deadline: again */
    }
    gate_await(&busy->gate, 1);
}

static void busy_end(busy_t *busy) {
    gate_open(&busy->gate);
    EXPECT(!ctx_on_done_stop(&busy->reg));
    ctx_end(busy->ctx);
    gate_destroy(&busy->gate);
}

typedef struct {
    ctx_t *ctx;
    int (*wait)(ctx_t *ctx);
    int returned, result, err; /* [atomic] */
} waits_t;

static void *waits(void *arg) {
    waits_t *w = (waits_t *)arg;
    store(&w->result, w->wait(w->ctx));
    store(&w->err, ctx_err(w->ctx));
    store(&w->returned, 1);
    return NULL;
}

static int wait_for_it(ctx_t *ctx) { return ctx_wait(ctx, CTX_FOREVER); }
static int sleep_on_it(ctx_t *ctx) { return ctx_sleep(ctx, CTX_S(100000)); }
static int acquire_with_it(ctx_t *ctx) {
    ctx_sem_t sem;
    ctx_sem_init(&sem, 1);
    EXPECT(ctx_sem_try_acquire(&sem, 1));
    int rc = ctx_sem_acquire(&sem, ctx, 1);
    ctx_sem_release(&sem, 1);
    return rc;
}
static int cond_wait_with_it(ctx_t *ctx) {
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    int rc = 0;
    pthread_mutex_lock(&mutex);
    while (rc == 0) rc = ctx_cond_wait(ctx, &cond, &mutex);
    pthread_mutex_unlock(&mutex);
    return rc;
}

/* The wait ends although the runtime thread is in a callback; `below`: on a child of the one that has the deadline. */
static void check_wait(int (*wait)(ctx_t *ctx), bool below) {
    busy_t busy;
    busy_make(&busy);
    waits_t w;
    memset(&w, 0, sizeof w);
    ctx_t *timed = ctx_with_timeout(ctx_background(), CTX_MS(10));
    ctx_t *child = ctx_with_cancel(timed);
    w.ctx = below ? child : timed;
    w.wait = wait;
    pthread_t waiting = thread_start(waits, &w);
    UNTIL(load(&w.returned));
    gate_open(&busy.gate);
    thread_join(waiting);
    EXPECT_EQ(load(&w.result), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(load(&w.err), CTX_DEADLINE_EXCEEDED);
    busy_end(&busy);
    ctx_end(child);
    ctx_end(timed);
}

TEST(a_wait_ends_at_its_deadline_while_the_runtime_thread_is_in_a_callback) { check_wait(wait_for_it, false); }
TEST(a_wait_below_a_deadline_ends_then_while_the_runtime_thread_is_in_a_callback) { check_wait(wait_for_it, true); }
TEST(a_sleep_ends_at_its_deadline_while_the_runtime_thread_is_in_a_callback) { check_wait(sleep_on_it, false); }
TEST(an_acquire_ends_at_its_deadline_while_the_runtime_thread_is_in_a_callback) { check_wait(acquire_with_it, true); }
TEST(a_cond_wait_ends_at_its_deadline_while_the_runtime_thread_is_in_a_callback) {
#if !defined(__GLIBC__) || defined(TEST_THREAD_SANITIZER) || __GLIBC__ == 2 && __GLIBC_MINOR__ < 30
    SKIP("a wait on a condition variable by the monotonic clock is glibc's");
#endif

    check_wait(cond_wait_with_it, false);
}

/* One thread calls the callbacks of all deadlines, also of those that a thread waits for itself. */
typedef struct {
    ctx_on_done_t reg;
    pthread_t thread;
    int ran; /* [atomic] */
} where_t;

static void note_where(void *arg) {
    where_t *where = (where_t *)arg;
    where->thread = pthread_self();
    store(&where->ran, 1);
}

TEST(callbacks_of_deadlines_run_on_one_thread_and_not_on_one_that_waits) {
    enum { N = 20 };
    where_t where[N];
    ctx_t *ctx[N];
    int counted = 0, first = -1;
    memset(where, 0, sizeof where);
    for (int i = 0; i < N; i++) {
        ctx[i] = ctx_with_timeout(ctx_background(), CTX_MS(3 + i % 5));
        bool registered = ctx_on_done(&where[i].reg, ctx[i], note_where, &where[i]);
        EXPECT_EQ(ctx_wait(ctx[i], CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        UNTIL(load(&where[i].ran));
        if (!registered) continue; /* this thread slept through it: it ran in the call */
        counted++;
        EXPECT(!pthread_equal(where[i].thread, pthread_self()));
        if (first < 0)
            first = i;
        else
            EXPECT(pthread_equal(where[i].thread, where[first].thread));
    }
    EXPECT(counted > 0);
    for (int i = 0; i < N; i++) {
        EXPECT(!ctx_on_done_stop(&where[i].reg));
        ctx_end(ctx[i]);
    }
    ctx_runtime_stop();
}

TEST_MAIN
