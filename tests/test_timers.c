/* Timers: never early, in order, at any distance, and through stops of the runtime. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"

static long settled_blocks(void) {
    ctx_runtime_stop();
    return blocks_live();
}

#define YEAR (CTX_S(86400) * 365)

static const char *const words[] = {"zero", "one", "two", "three"};

static void count(void *arg) { __atomic_add_fetch((int *)arg, 1, __ATOMIC_RELEASE); }

/* A context with a deadline and a callback that writes down when it ran. */
typedef struct {
    ctx_t *ctx;
    ctx_time_t deadline;
    ctx_time_t ran_at;
    ctx_on_done_t reg;
    int runs;               /* [atomic] */
    int *order_next, order; /* the place in which it ran */
} one_timer_t;

static void note(void *arg) {
    one_timer_t *timer = (one_timer_t *)arg;
    timer->ran_at = ctx_now();
    if (timer->order_next) timer->order = (*timer->order_next)++;
    __atomic_add_fetch(&timer->runs, 1, __ATOMIC_RELEASE);
}

static one_timer_t *many_timers(int n) {
    one_timer_t *timers = (one_timer_t *)calloc((size_t)n, sizeof *timers);
    if (!timers) abort();
    return timers;
}

/* == the real clock ============================================================================================== */

typedef struct {
    one_timer_t *timers;
    int n;
    int over;  /* [atomic] */
    int early; /* [atomic] */
} watch_t;

/* Polls all of them: an err that is seen before its deadline is early, whatever the callbacks say. */
static void *watch_errs(void *arg) {
    watch_t *watch = (watch_t *)arg;
    unsigned char *seen = (unsigned char *)calloc((size_t)watch->n, 1);
    int early = 0;
    while (!load(&watch->over)) {
        for (int i = 0; i < watch->n; i++) {
            if (seen[i] || ctx_err(watch->timers[i].ctx) == 0) continue;
            seen[i] = 1;
            early += test_now_ns() < watch->timers[i].deadline;
        }
        sched_yield();
    }
    free(seen);
    store(&watch->early, early);
    return NULL;
}

TEST(ten_thousand_random_deadlines_are_never_early_and_all_come) {
    int n = test_scale(10000), early = 0, wrong = 0;
    uint64_t seed = 1;
    one_timer_t *timers = many_timers(n);
    for (int i = 0; i < n; i++) {
        int reach = i % 4 == 0 ? 300000 : i % 4 == 1 ? 5000000 : 1000000000;
        timers[i].deadline = ctx_now() + 1 + race_below(&seed, reach);
        timers[i].ctx = ctx_with_deadline(ctx_background(), timers[i].deadline);
        ctx_on_done(&timers[i].reg, timers[i].ctx, note, &timers[i]);
    }
    watch_t watch = {timers, n, 0, 0};
    pthread_t watcher = thread_start(watch_errs, &watch);
    for (int i = 0; i < n; i++) {
        wrong += ctx_wait(timers[i].ctx, CTX_FOREVER) != CTX_DEADLINE_EXCEEDED;
        early += test_now_ns() < timers[i].deadline;
    }
    store(&watch.over, 1);
    thread_join(watcher);
    for (int i = 0; i < n; i++) {
        bool stopped = ctx_on_done_stop(&timers[i].reg); /* its waiter may be back before the callback has begun */
        wrong += timers[i].runs != (stopped ? 0 : 1);
        early += !stopped && timers[i].ran_at < timers[i].deadline;
        ctx_end(timers[i].ctx);
    }
    EXPECT_EQ(early, 0);
    EXPECT_EQ(load(&watch.early), 0);
    EXPECT_EQ(wrong, 0);
    free(timers);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_parked_waiter_and_a_poller_both_notice) {
    for (int i = 0, n = test_scale(200) + 4; i < n; i++) {
        ctx_time_t deadline = ctx_now() + CTX_US(100 + 37 * (i % 50));
        ctx_t *ctx = ctx_with_deadline(ctx_background(), deadline);
        if (i % 2) {
            EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        } else {
            int turns = 0;
            while (ctx_err(ctx) == 0) race_pause(&turns);
        }
        EXPECT(ctx_now() >= deadline);
        ctx_end(ctx);
    }
}

/* Each new one is earlier than what the runtime sleeps for, so each must wake it: else the last fires in an hour. */
TEST(an_earlier_deadline_wakes_the_runtime_from_a_long_sleep) {
    enum { N = 200 };
    ctx_t *late[N];
    for (int i = 0; i < N; i++) late[i] = ctx_with_timeout(ctx_background(), CTX_S(7200 - 30 * i));
    for (int round = 0; round < 20; round++) {
        ctx_t *soon = ctx_with_timeout(ctx_background(), CTX_MS(1 + round % 3));
        EXPECT_EQ(ctx_wait(soon, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        ctx_end(soon);
    }
    for (int i = 0; i < N; i++) {
        EXPECT_EQ(ctx_err(late[i]), 0);
        ctx_end(late[i]);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

static void *expire_many(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    uint64_t seed = 10 + (uint64_t)side->id;
    int wrong = 0;
    for (int i = 0, n = test_scale(3000); i < n; i++) {
        ctx_t *batch[8];
        ctx_time_t deadlines[8];
        for (int k = 0; k < 8; k++) {
            deadlines[k] = ctx_now() + race_below(&seed, 400000);
            batch[k] = ctx_with_deadline(ctx_background(), deadlines[k]);
        }
        for (int k = 0; k < 8; k++) {
            if (race_below(&seed, 2)) {
                wrong += ctx_wait(batch[k], CTX_FOREVER) != CTX_DEADLINE_EXCEEDED;
                wrong += ctx_now() < deadlines[k];
            }
            ctx_end(batch[k]);
        }
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(four_threads_make_end_and_await_timers) {
    race_run(4, expire_many, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

/* A deadline against everything that a thread may do to the context at that moment. */
static void *meet_deadlines(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    uint64_t seed = 20 + (uint64_t)side->id;
    int wrong = 0;
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.deadline_cause = words[1];
    for (int i = 0, n = test_scale(15000); i < n; i++) {
        int runs = 0;
        ctx_on_done_t reg;
        desc.deadline = ctx_now() + 20000 + race_below(&seed, 60000);
        ctx_t *ctx = ctx_derive(ctx_background(), &desc);
        ctx_t *below = ctx_with_cancel(ctx);
        ctx_on_done(&reg, below, count, &runs);
        ctx_time_t until = desc.deadline - 10000 + race_below(&seed, 40000);
        while (ctx_now() < until) continue;
        switch (race_below(&seed, 4)) {
            case 0: {
                bool won = ctx_cancel_cause(ctx, -EIO, words[2]);
                wrong += ctx_cause(ctx).what != (won ? words[2] : words[1]);
                wrong += won && ctx_err(below) == 0; /* a child that the runtime is canceling must be done as well */
                wrong += !won && ctx_now() < desc.deadline;
                ctx_end(ctx);
                break;
            }
            case 1: ctx_end(ctx); break;
            case 2: ctx_release(ctx); break;
            default: wrong += ctx_wait(ctx, CTX_FOREVER) != CTX_DEADLINE_EXCEEDED; ctx_end(ctx);
        }
        bool stopped = ctx_on_done_stop(&reg);
        wrong += load(&runs) != (stopped ? 0 : 1);
        memset(&reg, 0xa5, sizeof reg);
        ctx_end(below);
        wrong += load(&runs) != (stopped ? 0 : 1);
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(a_deadline_against_cancel_end_release_and_stop) {
    race_run(3, meet_deadlines, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

/* A callback on the runtime thread that uses timers itself. */
typedef struct {
    ctx_t *ctx;
    ctx_on_done_t reg;
    ctx_time_t deadline;
    int left;
    int early;
    int over; /* [atomic] */
} relay_t;

static void pass_on(void *arg) {
    relay_t *relay = (relay_t *)arg;
    relay->early += ctx_now() < relay->deadline;
    ctx_end(relay->ctx);
    if (--relay->left == 0) {
        store(&relay->over, 1);
        return;
    }
    relay->deadline = ctx_now() + CTX_US(50);
    relay->ctx = ctx_with_deadline(ctx_background(), relay->deadline);
    ctx_on_done(&relay->reg, relay->ctx, pass_on, relay);
}

TEST(a_deadline_callback_may_end_its_context_and_start_the_next_timer) {
    relay_t relay;
    memset(&relay, 0, sizeof relay);
    relay.left = test_scale(500);
    relay.deadline = ctx_now() + CTX_MS(1);
    relay.ctx = ctx_with_deadline(ctx_background(), relay.deadline);
    ctx_on_done(&relay.reg, relay.ctx, pass_on, &relay);
    race_await(&relay.over, 1);
    EXPECT_EQ(relay.early, 0);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == the runtime stops and starts ================================================================================ */

TEST(stopping_a_runtime_that_never_ran_is_fine) {
    ctx_runtime_stop();
    ctx_runtime_stop();
}

TEST(timers_work_after_the_runtime_was_stopped) {
    for (int i = 0; i < 20; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
        EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
        ctx_runtime_stop();
        if (i % 3 == 0) ctx_runtime_stop();
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(timers_that_live_through_a_stop_fire_once_it_runs_again) {
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_t *ended = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_runtime_stop();
    bool fired = ctx_err(live) != 0; /* before the stop, on a busy machine */
    test_sleep_ms(20);
    EXPECT(fired || ctx_err(live) == 0); /* nobody is there to fire it */
    ctx_end(ended);
    ctx_t *starter = ctx_with_timeout(ctx_background(), CTX_MS(2));
    EXPECT_EQ(ctx_wait(starter, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_wait(live, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    ctx_end(starter);
    ctx_end(live);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(waiting_for_a_deadline_is_a_use_that_starts_the_runtime_again) {
    ctx_t *live = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_runtime_stop();
    EXPECT_EQ(ctx_wait(live, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    ctx_end(live);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == the fake clock ============================================================================================== */

TEST(a_deadline_fires_at_its_nanosecond_at_any_distance) {
    static const ctx_time_t starts[] = {0, 1, 12345678901, (INT64_C(1) << 40) - 1, INT64_C(1) << 50};
    enum { BITS = 62, N = 3 * BITS };
    for (size_t s = 0; s < sizeof starts / sizeof starts[0]; s++) {
        ctx_clock_fake(starts[s]);
        one_timer_t timers[N];
        memset(timers, 0, sizeof timers);
        for (int i = 0; i < N; i++) {
            ctx_dur_t distance = (INT64_C(1) << (i / 3)) + i % 3 - 1; /* about each power of two */
            timers[i].deadline = starts[s] + distance;
            timers[i].ctx = ctx_with_deadline(ctx_background(), timers[i].deadline);
            ctx_on_done(&timers[i].reg, timers[i].ctx, note, &timers[i]);
        }
        int early = 0, late = 0;
        for (int i = 0; i < N; i++) {
            ctx_time_t deadline = timers[i].deadline;
            if (deadline > ctx_now() + 1) ctx_clock_advance(deadline - 1 - ctx_now());
            for (int k = 0; k < N; k++) early += timers[k].deadline > ctx_now() && ctx_err(timers[k].ctx) != 0;
            if (deadline > ctx_now()) ctx_clock_advance(deadline - ctx_now());
            for (int k = 0; k < N; k++)
                late += timers[k].deadline <= ctx_now() && ctx_err(timers[k].ctx) != CTX_DEADLINE_EXCEEDED;
        }
        for (int i = 0; i < N; i++) {
            late += timers[i].runs != 1;
            if (timers[i].deadline > starts[s]) early += timers[i].ran_at != timers[i].deadline;
            ctx_end(timers[i].ctx);
        }
        EXPECT_EQ(early, 0);
        EXPECT_EQ(late, 0);
    }
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(deadlines_of_years_come_in_one_advance) {
    static const int years[] = {100, 1, 30, 3, 10};
    ctx_clock_fake(CTX_S(1));
    one_timer_t timers[5];
    memset(timers, 0, sizeof timers);
    for (int i = 0; i < 5; i++) {
        timers[i].deadline = CTX_S(1) + years[i] * YEAR;
        timers[i].ctx = ctx_with_timeout(ctx_background(), years[i] * YEAR);
        EXPECT_EQ(ctx_deadline(timers[i].ctx), timers[i].deadline);
        ctx_on_done(&timers[i].reg, timers[i].ctx, note, &timers[i]);
    }
    ctx_clock_advance(100 * YEAR);
    for (int i = 0; i < 5; i++) {
        EXPECT_EQ(timers[i].ran_at, timers[i].deadline);
        ctx_end(timers[i].ctx);
    }
    ctx_clock_real();
}

static int by_place(const void *a, const void *b) {
    return ((const one_timer_t *)a)->order - ((const one_timer_t *)b)->order;
}

TEST(ten_thousand_random_timers_fire_in_the_order_of_their_deadlines) {
    int n = test_scale(10000);
    for (int spread = 8; spread <= 56; spread += 12) { /* from many at one moment to years apart */
        ctx_clock_fake(CTX_S(spread));
        uint64_t seed = (uint64_t)spread;
        int next = 0, wrong = 0;
        one_timer_t *timers = many_timers(n);
        for (int i = 0; i < n; i++) {
            timers[i].order_next = &next;
            timers[i].deadline = ctx_now() + 1 + (ctx_dur_t)(race_random(&seed) >> (64 - spread));
            timers[i].ctx = ctx_with_deadline(ctx_background(), timers[i].deadline);
            wrong += !ctx_on_done(&timers[i].reg, timers[i].ctx, note, &timers[i]);
        }
        ctx_clock_advance((INT64_C(1) << spread) + 1);
        for (int i = 0; i < n; i++) {
            wrong += timers[i].runs != 1 || timers[i].ran_at != timers[i].deadline;
            ctx_end(timers[i].ctx);
        }
        qsort(timers, (size_t)n, sizeof *timers, by_place);
        for (int i = 1; i < n; i++) wrong += timers[i].deadline < timers[i - 1].deadline;
        EXPECT_EQ(next, n);
        EXPECT_EQ(wrong, 0);
        free(timers);
    }
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

/* The wheel against the plainest model: a timer has fired if and only if its deadline is not after now. */
TEST(random_adding_ending_and_advancing_agrees_with_a_model) {
    enum { SLOTS = 400 };
    for (int run = 0; run < 6; run++) {
        static const ctx_time_t starts[] = {0, 4095, INT64_C(1) << 33, (INT64_C(1) << 45) + 17, INT64_C(1) << 61, 99};
        uint64_t seed = 70 + (uint64_t)run;
        one_timer_t timers[SLOTS];
        memset(timers, 0, sizeof timers);
        ctx_clock_fake(starts[run]);
        int wrong = 0;
        for (int step = 0, steps = test_scale(10000); step < steps; step++) {
            for (int k = race_below(&seed, 4); k > 0; k--) {
                one_timer_t *timer = &timers[race_below(&seed, SLOTS)];
                if (timer->ctx) ctx_end(timer->ctx);
                int bits = 1 + race_below(&seed, run == 4 ? 50 : 36);
                timer->deadline = ctx_now() + 1 + (ctx_dur_t)(race_random(&seed) >> (64 - bits));
                timer->ctx = ctx_with_deadline(ctx_background(), timer->deadline);
            }
            int bits = 1 + race_below(&seed, 30);
            ctx_clock_advance((ctx_dur_t)(race_random(&seed) >> (64 - bits)));
            if (step % 4 != 0) continue;
            for (int i = 0; i < SLOTS; i++)
                if (timers[i].ctx) wrong += (ctx_err(timers[i].ctx) != 0) != (timers[i].deadline <= ctx_now());
        }
        EXPECT_EQ(wrong, 0);
        for (int i = 0; i < SLOTS; i++) ctx_end(timers[i].ctx);
    }
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(one_long_advance_is_as_many_short_ones) {
    enum { N = 1000 };
    static one_timer_t timers[2][N];
    for (int way = 0; way < 2; way++) {
        uint64_t seed = 5;
        int next = 0;
        ctx_clock_fake(1000);
        memset(timers[way], 0, sizeof timers[way]);
        for (int i = 0; i < N; i++) {
            one_timer_t *timer = &timers[way][i];
            timer->order_next = &next;
            timer->deadline = 1001 + race_below(&seed, 1000000000);
            timer->ctx = ctx_with_deadline(ctx_background(), timer->deadline);
            ctx_on_done(&timer->reg, timer->ctx, note, timer);
        }
        if (way == 0)
            ctx_clock_advance(CTX_S(1) + 1000);
        else
            for (int i = 0; i < 1000; i++) ctx_clock_advance(CTX_US(1000) + 1);
        for (int i = 0; i < N; i++) ctx_end(timers[way][i].ctx);
    }
    int wrong = 0;
    for (int i = 0; i < N; i++) {
        wrong += timers[0][i].runs != 1 || timers[1][i].runs != 1;
        wrong += timers[0][i].ran_at != timers[1][i].ran_at;
    }
    EXPECT_EQ(wrong, 0);
    ctx_clock_real();
}

/* -- timers added and taken away by callbacks ------------------------------------------------------------------- */

typedef struct {
    ctx_t *ctx[200];
    ctx_on_done_t regs[200];
    ctx_time_t deadlines[200], ran_at[200];
    int made, ran;
    uint64_t seed;
} growth_t;

typedef struct {
    growth_t *growth;
    int at;
} growth_node_t;

static growth_node_t growth_nodes[200];

static void grow_timers(void *arg);

static void growth_add(growth_t *growth, ctx_dur_t timeout) {
    int at = growth->made++;
    growth_nodes[at].growth = growth;
    growth_nodes[at].at = at;
    growth->deadlines[at] = ctx_now() + timeout;
    growth->ctx[at] = ctx_with_timeout(ctx_background(), timeout);
    ctx_on_done(&growth->regs[at], growth->ctx[at], grow_timers, &growth_nodes[at]);
}

static void grow_timers(void *arg) {
    growth_node_t *node = (growth_node_t *)arg;
    growth_t *growth = node->growth;
    growth->ran_at[growth->ran++] = growth->deadlines[node->at];
    EXPECT_EQ(ctx_now(), growth->deadlines[node->at]);
    for (int i = 0; i < 3 && growth->made < 200; i++) growth_add(growth, 1 + race_below(&growth->seed, 1000000));
}

TEST(timers_that_callbacks_add_fire_in_order_in_the_same_advance) {
    for (int run = 0; run < 20; run++) {
        static growth_t growth;
        memset(&growth, 0, sizeof growth);
        growth.seed = (uint64_t)run;
        ctx_clock_fake(CTX_S(run));
        for (int i = 0; i < 20; i++) growth_add(&growth, CTX_US(150 * i) + 1);
        ctx_clock_advance(CTX_S(10));
        EXPECT_EQ(growth.made, 200);
        EXPECT_EQ(growth.ran, 200);
        for (int i = 1; i < growth.ran; i++) EXPECT(growth.ran_at[i] >= growth.ran_at[i - 1]);
        for (int i = 0; i < growth.made; i++) ctx_end(growth.ctx[i]);
    }
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

/* Callbacks that start timers wake the runtime thread, if it runs. It must leave the fake clock's work alone. */
typedef struct {
    pthread_t thread;
    int elsewhere, inside, runs; /* [atomic] */
} firing_t;

static void fire_and_start_more(void *arg) {
    firing_t *firing = (firing_t *)arg;
    if (!pthread_equal(firing->thread, pthread_self()) || add(&firing->inside, 1) != 1) add(&firing->elsewhere, 1);
    for (int i = 0; i < 4; i++) ctx_end(ctx_with_timeout(ctx_background(), CTX_S(4 - i)));
    sched_yield();
    add(&firing->inside, -1);
    add(&firing->runs, 1);
}

TEST(the_fake_clock_fires_all_that_is_due_in_the_advancing_thread) {
    enum { N = 50 };
    static ctx_on_done_t regs[N];
    ctx_t *timers[N];
    ctx_t *started = ctx_with_timeout(ctx_background(), CTX_S(500)); /* now the runtime runs */
    for (int round = 0; round < 20; round++) {
        firing_t firing;
        memset(&firing, 0, sizeof firing);
        firing.thread = pthread_self();
        ctx_clock_fake(CTX_S(10));
        for (int i = 0; i < N; i++) {
            timers[i] = ctx_with_timeout(ctx_background(), CTX_S(5));
            EXPECT(ctx_on_done(&regs[i], timers[i], fire_and_start_more, &firing));
        }
        ctx_clock_advance(CTX_S(5));
        EXPECT_EQ(load(&firing.runs), N);
        for (int i = 0; i < N; i++) EXPECT(!ctx_on_done_stop(&regs[i]));
        EXPECT_EQ(load(&firing.elsewhere), 0);
        for (int i = 0; i < N; i++) ctx_end(timers[i]);
        ctx_clock_real();
    }
    EXPECT_EQ(ctx_err(started), 0);
    ctx_end(started);
    EXPECT_EQ(settled_blocks(), 0);
}

static void end_arg(void *arg) { ctx_end((ctx_t *)arg); }

TEST(a_callback_may_end_timers_that_are_due_with_it) {
    ctx_clock_fake(0);
    for (int same = 0; same < 2; same++) { /* at the same moment, or later in the same advance */
        ctx_t *first = ctx_with_timeout(ctx_background(), CTX_MS(5));
        ctx_t *second = ctx_with_timeout(ctx_background(), CTX_MS(5) + (same ? 0 : 1));
        ctx_retain(first);
        ctx_retain(second);
        ctx_on_done_t a, b;
        EXPECT(ctx_on_done(&a, first, end_arg, second));
        EXPECT(ctx_on_done(&b, second, end_arg, first));
        ctx_clock_advance(CTX_MS(10));
        EXPECT(ctx_err(first) == CTX_DEADLINE_EXCEEDED || ctx_err(second) == CTX_DEADLINE_EXCEEDED);
        if (!same) EXPECT_EQ(ctx_err(second), CTX_CANCELED);
        ctx_release(first);
        ctx_release(second);
    }
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_timer_that_was_ended_never_fires) {
    ctx_clock_fake(0);
    int runs = 0;
    for (int i = 0; i < 1000; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), 1 + i * 77);
        ctx_on_done_t reg;
        EXPECT(ctx_on_done(&reg, ctx, count, &runs));
        EXPECT(ctx_on_done_stop(&reg));
        ctx_retain(ctx);
        if (i % 2) ctx_cancel(ctx);
        ctx_end(ctx);
        if (i % 16 == 0) ctx_clock_advance(50);
        EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
        ctx_release(ctx);
    }
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(runs, 0);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

/* -- completeness of an expiry ---------------------------------------------------------------------------------- */

enum { BELOW = 128 };

typedef struct {
    start_line_t line;
    ctx_t *top, *middle, *below[BELOW];
    int rounds;
} expiry_t;

static void *cancel_the_middle(void *arg) {
    expiry_t *race = (expiry_t *)arg;
    uint64_t seed = 4;
    int live = 0;
    for (int round = 0; round < race->rounds; round++) {
        start_line(&race->line);
        race_dither(race_random(&seed));
        if (ctx_cancel(race->middle))
            for (int i = 0; i < BELOW; i++) live += ctx_err(race->below[i]) == 0;
        start_line(&race->line);
    }
    EXPECT_EQ(live, 0);
    return NULL;
}

TEST(an_expiry_is_complete_while_another_thread_cancels_below) {
    static expiry_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(10000);
    ctx_clock_fake(0);
    pthread_t thread = thread_start(cancel_the_middle, &race);
    uint64_t seed = 3;
    int live = 0;
    for (int round = 0; round < race.rounds; round++) {
        race.top = ctx_with_timeout(ctx_background(), CTX_S(1));
        race.middle = ctx_with_cancel(race.top);
        for (int i = 0; i < BELOW; i++) race.below[i] = ctx_with_cancel(i % 5 == 0 ? race.middle : race.below[i - 1]);
        start_line(&race.line);
        race_dither(race_random(&seed));
        ctx_clock_advance(CTX_S(1));
        live += ctx_err(race.top) == 0 || ctx_err(race.middle) == 0;
        for (int i = 0; i < BELOW; i++) live += ctx_err(race.below[i]) == 0;
        start_line(&race.line);
        for (int i = 0; i < BELOW; i++) ctx_end(race.below[i]);
        ctx_end(race.middle);
        ctx_end(race.top);
    }
    thread_join(thread);
    EXPECT_EQ(live, 0);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

/* == a million =================================================================================================== */

#ifdef TEST_SANITIZED
enum { MILLION = 200000 };
#else
enum { MILLION = 1000000 };
#endif

TEST(a_million_timers_fire_or_are_ended) {
    int n = test_scale(MILLION), wrong = 0, live = 0;
    uint64_t seed = 9;
    ctx_t **timers = (ctx_t **)calloc((size_t)n, sizeof *timers);
    CHECK(timers != NULL);
    ctx_clock_fake(CTX_S(1000));
    for (int i = 0; i < n; i++)
        timers[i] = ctx_with_timeout(ctx_background(), 1 + (ctx_dur_t)(race_random(&seed) % (uint64_t)CTX_S(3600)));
    for (int i = 0; i < n; i += 2) {
        ctx_end(timers[i]);
        timers[i] = NULL;
    }
    for (int minute = 1; minute <= 60; minute++) {
        ctx_clock_advance(CTX_S(60));
        for (int i = 1; i < n; i += 2 * 29)
            wrong += (ctx_err(timers[i]) != 0) != (ctx_deadline(timers[i]) <= ctx_now());
    }
    for (int i = 1; i < n; i += 2) {
        live += ctx_err(timers[i]) == 0;
        ctx_end(timers[i]);
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(live, 0);
    free(timers);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_million_real_timers_come_and_go) {
    int n = test_scale(MILLION), wrong = 0;
    uint64_t seed = 8;
    ctx_t **timers = (ctx_t **)calloc((size_t)n, sizeof *timers);
    CHECK(timers != NULL);
    for (int i = 0; i < n; i++)
        timers[i] = ctx_with_timeout(ctx_background(), CTX_S(600) + (ctx_dur_t)(race_random(&seed) >> 24));
    for (int i = 0; i < n; i++) {
        wrong += ctx_err(timers[i]) != 0;
        ctx_end(timers[i]);
    }
    EXPECT_EQ(wrong, 0);
    free(timers);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_timeout_that_is_ended_leaves_no_memory_behind) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    for (int i = 0, n = test_scale(200000); i < n; i++) ctx_end(ctx_with_timeout(parent, CTX_S(3600) + i));
    EXPECT(blocks_live() < 1000); /* a hundred thousand dead timers would wait for their hour */
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

/* The runtime thread comes late to many deadlines at once: it still fires them in their order. */
enum { LATE = 40 };
typedef struct {
    pthread_t owner;    /* of the test */
    int held, go;       /* [atomic] */
    int fired[LATE], n; /* [the runtime thread], n [atomic] */
} late_t;
typedef struct {
    late_t *late;
    int place;
} late_one_t;

static void hold_until_told(void *arg) {
    late_t *late = (late_t *)arg;
    if (pthread_equal(late->owner, pthread_self())) return; /* the deadline came before the callback was registered */
    __atomic_store_n(&late->held, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&late->go, __ATOMIC_ACQUIRE)) test_sleep_ms(1);
}

static void note_place(void *arg) {
    late_one_t *one = (late_one_t *)arg;
    one->late->fired[one->late->n] = one->place;
    __atomic_add_fetch(&one->late->n, 1, __ATOMIC_RELEASE);
}

TEST(deadlines_that_are_late_together_fire_in_their_order) {
    late_t late;
    late_one_t ones[LATE];
    ctx_on_done_t regs[LATE], hold;
    ctx_t *ctxs[LATE], *first;
    memset(&late, 0, sizeof late);
    late.owner = pthread_self();
    while (!ctx_on_done(&hold, first = ctx_with_timeout(ctx_background(), CTX_MS(1)), hold_until_told, &late))
        ctx_end(first);
    while (!__atomic_load_n(&late.held, __ATOMIC_ACQUIRE)) test_sleep_ms(1);
    ctx_time_t base = ctx_now() + CTX_MS(30);
    for (int i = 0; i < LATE; i++) {
        ones[i].late = &late;
        ones[i].place = i * 17 % LATE; /* in no order of making */
        ctxs[i] = ctx_with_deadline(ctx_background(), base + CTX_US(100) * ones[i].place);
        ctx_on_done(&regs[i], ctxs[i], note_place, &ones[i]);
    }
    while (ctx_now() < base + CTX_US(100) * LATE) test_sleep_ms(1);
    __atomic_store_n(&late.go, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&late.n, __ATOMIC_ACQUIRE) < LATE) test_sleep_ms(1);
    int wrong = 0;
    for (int i = 0; i < LATE; i++) wrong += late.fired[i] != i;
    EXPECT_EQ(wrong, 0);
    for (int i = 0; i < LATE; i++) ctx_on_done_stop(&regs[i]);
    for (int i = 0; i < LATE; i++) ctx_end(ctxs[i]);
    ctx_on_done_stop(&hold);
    ctx_end(first);
}

TEST_MAIN
