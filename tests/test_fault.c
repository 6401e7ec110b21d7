/* Nothing hurts when memory or threads cannot be had: makers fail safely, and all that comes after needs neither. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

#include <poll.h>

static long settled_blocks(void) {
    ctx_runtime_stop();
    return fault_live();
}

static const char *const words[] = {"zero", "one", "two", "three"};
static const ctx_key_t parents_key = CTX_KEY(int), own_key = CTX_KEY(long);

static void count(void *arg) { __atomic_add_fetch((int *)arg, 1, __ATOMIC_RELEASE); }

/* == makers ====================================================================================================== */

typedef ctx_t *maker_t(ctx_t *parent, ctx_t *other);

static ctx_t *make_cancel(ctx_t *parent, ctx_t *other) {
    (void)other;
    return ctx_with_cancel(parent);
}

static ctx_t *make_deadline(ctx_t *parent, ctx_t *other) {
    (void)other;
    return ctx_with_deadline(parent, ctx_time_add(ctx_now(), CTX_S(100)));
}

static ctx_t *make_timeout(ctx_t *parent, ctx_t *other) {
    (void)other;
    return ctx_with_timeout(parent, CTX_S(100));
}

static ctx_t *make_value(ctx_t *parent, ctx_t *other) {
    long value = 5;
    (void)other;
    return ctx_with_value(parent, &own_key, &value);
}

static ctx_t *make_shadow(ctx_t *parent, ctx_t *other) {
    int value = 6;
    (void)other;
    return ctx_with_value(parent, &parents_key, &value);
}

static ctx_t *make_detached(ctx_t *parent, ctx_t *other) {
    (void)other;
    return ctx_without_cancel(parent);
}

static ctx_t *make_merge(ctx_t *parent, ctx_t *other) { return ctx_merge(parent, other); }

static ctx_t *make_merge_of_deadlines(ctx_t *parent, ctx_t *other) {
    ctx_t *a = ctx_with_timeout(parent, CTX_S(100));
    ctx_t *b = ctx_with_timeout(other, CTX_S(90));
    ctx_t *merged = ctx_merge(a, b);
    ctx_release(a);
    ctx_release(b);
    return merged;
}

static ctx_t *make_everything(ctx_t *parent, ctx_t *other) {
    long value = 5;
    ctx_desc_t desc;
    (void)other;
    memset(&desc, 0, sizeof desc);
    desc.name = "everything";
    desc.timeout = CTX_S(100);
    desc.key = &own_key;
    desc.value = &value;
    return ctx_derive(parent, &desc);
}

static ctx_t *make_everything_detached(ctx_t *parent, ctx_t *other) {
    long value = 5;
    ctx_desc_t desc;
    (void)other;
    memset(&desc, 0, sizeof desc);
    desc.timeout = CTX_S(100);
    desc.key = &own_key;
    desc.value = &value;
    desc.detach = true;
    return ctx_derive(parent, &desc);
}

static ctx_t *make_signals(ctx_t *parent, ctx_t *other) {
    static const int signals[] = {SIGUSR1, SIGUSR2};
    (void)other;
    return ctx_notify_signals(parent, signals, 2);
}

static const struct {
    const char *name;
    maker_t *make;
} makers[] = {
    {"cancel", make_cancel},         {"deadline", make_deadline},
    {"timeout", make_timeout},       {"value", make_value},
    {"shadow", make_shadow},         {"detached", make_detached},
    {"merge", make_merge},           {"merge of deadlines", make_merge_of_deadlines},
    {"everything", make_everything}, {"everything detached", make_everything_detached},
    {"signals", make_signals},
};
enum { MAKERS = sizeof makers / sizeof makers[0] };

/* A failed context is safe for everything that a live one is used for. */
static void check_failed(ctx_t *ctx, int err) {
    EXPECT_EQ(ctx_err(ctx), err);
    EXPECT_EQ(ctx_cause(ctx).code, err);
    EXPECT(ctx_cause(ctx).what != NULL);
    EXPECT(ctx_name(ctx) != NULL);
    EXPECT(ctx_site(ctx) != NULL);
    EXPECT(ctx_remaining(ctx) >= 0);
    EXPECT(!ctx_cancel(ctx));
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), err);
    EXPECT_EQ(ctx_sleep(ctx, CTX_S(100)), err);
    int runs = 0;
    ctx_on_done_t reg;
    EXPECT(!ctx_on_done(&reg, ctx, count, &runs));
    EXPECT_EQ(runs, 1);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_t *child = ctx_with_timeout(ctx, CTX_S(5));
    ctx_t *merged = ctx_merge(ctx_background(), ctx);
    EXPECT_EQ(ctx_err(child), err);
    EXPECT_EQ(ctx_err(merged), err);
    ctx_end(merged);
    ctx_end(child);
    EXPECT(ctx_retain(ctx) == ctx);
    ctx_end(ctx);
    EXPECT_EQ(ctx_err(ctx), err);
}

/* It works like one that no failure came near. */
static void check_live(ctx_t *ctx, ctx_t *parent, bool detached) {
    ctx_t *child = ctx_with_cancel(ctx);
    EXPECT_EQ(ctx_err(child), 0);
    EXPECT(ctx_value(child, &parents_key) != NULL);
    if (!detached)
        EXPECT(ctx_cancel_cause(parent, -EIO, words[1]));
    else
        EXPECT(ctx_cancel_cause(ctx, -EIO, words[1]));
    EXPECT(ctx_err(child) == CTX_CANCELED && ctx_cause(child).what == words[1]);
    ctx_end(child);
}

TEST(every_maker_fails_safely_at_each_of_its_allocations) {
    for (int m = 0; m < MAKERS; m++) {
        int failed = 0;
        for (int n = 0;; n++) {
            int seven = 7;
            ctx_t *parent = ctx_with_value(ctx_background(), &parents_key, &seven);
            ctx_t *other = ctx_with_cancel(ctx_background());
            EXPECT_EQ(ctx_err(parent), 0);
            ctx_runtime_stop(); /* empties the caches, so that each node is an allocation */
            fault_after(n);
            ctx_t *ctx = makers[m].make(parent, other);
            bool injected = fault_off();
            CHECK(ctx != NULL);
            EXPECT(injected || ctx_err(ctx) == 0);
            EXPECT_EQ(ctx_err(parent), 0);
            EXPECT_EQ(ctx_err(other), 0);
            if (ctx_err(ctx) != 0) {
                failed++;
                check_failed(ctx, CTX_NO_MEMORY);
                ctx_t *again = makers[m].make(parent, other); /* nothing of the failure stays */
                EXPECT_EQ(ctx_err(again), 0);
                ctx_end(again);
            } else {
                check_live(ctx, parent, makers[m].make == make_detached || makers[m].make == make_everything_detached);
            }
            ctx_end(ctx);
            ctx_end(other);
            ctx_end(parent);
            EXPECT_EQ(settled_blocks(), 0);
            if (!injected) break;
            CHECK(n < 100);
        }
        if (failed == 0) printf("  no allocation of \"%s\" failed\n", makers[m].name);
        EXPECT(failed > 0);
    }
}

TEST(makers_go_on_failing_safely_when_all_memory_is_gone) {
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(100));
    ctx_t *other = ctx_with_cancel(ctx_background());
    ctx_runtime_stop();
    fault_all_after(0);
    for (int i = 0; i < 100; i++) {
        for (int m = 0; m < MAKERS; m++) {
            ctx_t *ctx = makers[m].make(parent, other);
            EXPECT_EQ(ctx_err(ctx), CTX_NO_MEMORY);
            ctx_t *below = makers[m].make(ctx, other);
            EXPECT_EQ(ctx_err(below), CTX_NO_MEMORY);
            ctx_end(below);
            ctx_end(ctx);
        }
    }
    EXPECT(fault_off());
    EXPECT_EQ(ctx_err(parent), 0);
    EXPECT_EQ(ctx_err(other), 0);
    ctx_end(other);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == what comes after needs no memory and no thread ============================================================== */

enum { CROWD = 500 };

typedef struct {
    ctx_t *top, *nodes[CROWD], *extra[CROWD];
    ctx_on_done_t regs[CROWD];
    int runs; /* [atomic] */
} crowd_t;

static void crowd_make(crowd_t *crowd) {
    uint64_t seed = 3;
    crowd->runs = 0;
    crowd->top = ctx_with_timeout(ctx_background(), CTX_S(50));
    for (int i = 0; i < CROWD; i++) {
        ctx_t *parent = i ? crowd->nodes[race_below(&seed, i)] : crowd->top;
        if (i % 3 == 0)
            crowd->nodes[i] = ctx_with_timeout(parent, CTX_S(30) + i);
        else if (i % 3 == 1)
            crowd->nodes[i] = ctx_merge(parent, ctx_background());
        else
            crowd->nodes[i] = make_value(parent, NULL);
        EXPECT_EQ(ctx_err(crowd->nodes[i]), 0);
    }
}

TEST(canceling_stopping_and_ending_need_no_memory_and_no_thread) {
    static crowd_t crowd;
    crowd_make(&crowd);
    ctx_runtime_stop();
    fault_all_after(0);
    fault_threads_all_after(0);
    for (int i = 0; i < CROWD; i++) EXPECT(ctx_on_done(&crowd.regs[i], crowd.nodes[i], count, &crowd.runs));
    for (int i = 0; i < CROWD; i += 5) EXPECT(ctx_on_done_stop(&crowd.regs[i]));
    EXPECT(ctx_cancel_cause(crowd.top, -EIO, words[2]));
    EXPECT_EQ(load(&crowd.runs), CROWD - CROWD / 5);
    for (int i = 0; i < CROWD; i++) {
        EXPECT(ctx_cause(crowd.nodes[i]).what == words[2]);
        EXPECT_EQ(ctx_wait(crowd.nodes[i], CTX_FOREVER), CTX_CANCELED);
        ctx_end(crowd.nodes[i]);
    }
    ctx_end(crowd.top);
    EXPECT_EQ(fault_calls(), 0);
    fault_off();
    fault_threads_off();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(expiring_needs_no_memory_and_no_thread_on_the_fake_clock) {
    static crowd_t crowd;
    ctx_clock_fake(0);
    crowd_make(&crowd);
    for (int i = 0; i < CROWD; i++) EXPECT(ctx_on_done(&crowd.regs[i], crowd.nodes[i], count, &crowd.runs));
    fault_all_after(0);
    fault_threads_all_after(0);
    ctx_clock_advance(CTX_S(60));
    EXPECT_EQ(load(&crowd.runs), CROWD);
    for (int i = 0; i < CROWD; i++) EXPECT_EQ(ctx_err(crowd.nodes[i]), CTX_DEADLINE_EXCEEDED);
    for (int i = 0; i < CROWD; i++) ctx_end(crowd.nodes[i]);
    ctx_end(crowd.top);
    EXPECT_EQ(fault_calls(), 0);
    fault_off();
    fault_threads_off();
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_registered_deadline_comes_while_memory_is_gone) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(20));
    int runs = 0;
    ctx_on_done_t reg;
    ctx_on_done(&reg, ctx, count, &runs);
    fault_all_after(0);
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    race_await(&runs, 1);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
    fault_off();
    EXPECT_EQ(settled_blocks(), 0);
}

static void *cancel_soon(void *arg) {
    test_sleep_ms(2);
    ctx_cancel((ctx_t *)arg);
    return NULL;
}

TEST(waiting_and_sleeping_need_no_memory_and_no_thread) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_runtime_stop();
    pthread_t canceler;
    ctx_time_t from = ctx_now();
    fault_all_after(0);
    EXPECT_EQ(ctx_wait(ctx, CTX_MS(2)), CTX_NOT_READY);
    EXPECT(ctx_now() >= from + CTX_MS(2));
    EXPECT_EQ(ctx_sleep(ctx, CTX_MS(2)), 0);
    EXPECT(ctx_now() >= from + CTX_MS(4));
    canceler = thread_start(cancel_soon, ctx);
    fault_threads_all_after(0);
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_CANCELED);
    EXPECT_EQ(ctx_sleep(ctx, CTX_S(100)), CTX_CANCELED);
    fault_off();
    fault_threads_off();
    thread_join(canceler);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_leaf_needs_no_memory) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    fault_all_after(0);
    ctx_leaf_t leaf;
    ctx_leaf_init(&leaf, parent, ctx_now() + CTX_S(100));
    EXPECT_EQ(ctx_leaf_err(&leaf), 0);
    ctx_cancel(parent);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_CANCELED);
    EXPECT_EQ(fault_calls(), 0);
    fault_off();
    ctx_end(parent);
}

/* == threads ===================================================================================================== */

TEST(a_deadline_without_a_thread_to_serve_it_gives_a_failed_context) {
    for (int i = 0; i < 3; i++) {
        ctx_t *parent = ctx_with_cancel(ctx_background());
        ctx_runtime_stop();
        fault_threads_all_after(0);
        ctx_t *ctx = ctx_with_timeout(parent, CTX_S(100));
        ctx_t *plain = ctx_with_cancel(parent);
        ctx_t *expired = ctx_with_timeout(parent, 0); /* needs no timer */
        EXPECT(fault_threads_off());
        int err = ctx_err(ctx);
        EXPECT(err == -EAGAIN || err == CTX_NO_MEMORY);
        check_failed(ctx, err);
        ctx_end(ctx);
        EXPECT_EQ(ctx_err(plain), 0);
        EXPECT_EQ(ctx_err(expired), CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_err(parent), 0);
        ctx_end(expired);

        ctx_t *again = ctx_with_timeout(parent, CTX_MS(1)); /* and the next try has its thread */
        EXPECT_EQ(ctx_wait(again, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
        ctx_end(again);
        EXPECT(ctx_cancel(parent));
        EXPECT_EQ(ctx_err(plain), CTX_CANCELED);
        ctx_end(plain);
        ctx_end(parent);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

TEST(every_maker_fails_safely_when_no_thread_starts) {
    for (int m = 0; m < MAKERS; m++) {
        int seven = 7;
        ctx_t *parent = ctx_with_value(ctx_background(), &parents_key, &seven);
        ctx_t *other = ctx_with_cancel(ctx_background());
        ctx_runtime_stop();
        fault_threads_all_after(0);
        ctx_t *ctx = makers[m].make(parent, other);
        bool injected = fault_threads_off();
        EXPECT((ctx_err(ctx) != 0) == injected);
        if (ctx_err(ctx)) check_failed(ctx, ctx_err(ctx));
        ctx_t *again = makers[m].make(parent, other);
        EXPECT_EQ(ctx_err(again), 0);
        ctx_end(again);
        ctx_end(ctx);
        ctx_end(other);
        ctx_end(parent);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

/* Without a runtime thread a timer cannot be registered: who is born live here has none. */
TEST(a_child_whose_deadline_is_not_earlier_registers_no_timer) {
    ctx_t *parent = ctx_with_deadline(ctx_background(), ctx_now() + CTX_S(100));
    ctx_t *plain = ctx_with_cancel(parent);
    ctx_runtime_stop();
    fault_threads_all_after(0);
    ctx_t *same = ctx_with_deadline(parent, ctx_deadline(parent));
    ctx_t *later = ctx_with_timeout(plain, CTX_S(200));
    ctx_t *below = ctx_with_timeout(later, CTX_S(300));
    ctx_t *never = ctx_with_deadline(ctx_background(), CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_err(same), 0);
    EXPECT_EQ(ctx_err(later), 0);
    EXPECT_EQ(ctx_err(below), 0);
    EXPECT_EQ(ctx_err(never), 0);
    EXPECT_EQ(ctx_deadline(below), ctx_deadline(parent));
    ctx_t *earlier = ctx_with_timeout(plain, CTX_S(20));
    EXPECT(ctx_err(earlier) != 0);
    EXPECT(fault_threads_off());
    ctx_end(earlier);
    ctx_end(never);
    ctx_end(below);
    ctx_end(later);
    ctx_end(same);
    ctx_end(plain);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_merge_of_deadlines_needs_no_timer_of_its_own) {
    ctx_t *a = ctx_with_timeout(ctx_background(), CTX_S(100));
    ctx_t *b = ctx_with_timeout(ctx_background(), CTX_S(50));
    ctx_runtime_stop();
    fault_threads_all_after(0);
    ctx_t *merged = ctx_merge(a, b);
    EXPECT_EQ(ctx_err(merged), 0);
    EXPECT_EQ(ctx_deadline(merged), ctx_deadline(b));
    EXPECT(!fault_threads_off());
    ctx_end(merged);
    ctx_end(b);
    ctx_end(a);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == failures in the crowd ======================================================================================= */

typedef struct {
    start_line_t line;
    ctx_t *parent;
    int over, failures; /* [atomic] */
} famine_t;

static void *derive_in_famine(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    famine_t *famine = (famine_t *)side->shared;
    ctx_t *kept[16];
    uint64_t seed = (uint64_t)side->id;
    int wrong = 0, failures = 0, n = test_scale(40000);
    for (int i = 0; i < 16; i++) kept[i] = NULL;
    start_line(&famine->line);
    for (int i = 0; i < n; i++) {
        ctx_t *child;
        switch (race_below(&seed, 8)) {
            case 0: child = make_value(famine->parent, NULL); break;
            case 1: child = make_timeout(famine->parent, NULL); break;
            case 2: child = ctx_merge(famine->parent, ctx_background()); break;
            default: child = ctx_with_cancel(famine->parent);
        }
        int err = ctx_err(child);
        wrong += err != 0 && err != CTX_NO_MEMORY;
        failures += err != 0;
        if (kept[i % 16]) ctx_end(kept[i % 16]);
        kept[i % 16] = child;
    }
    __atomic_add_fetch(&famine->failures, failures, __ATOMIC_RELAXED);
    start_line(&famine->line);
    start_line(&famine->line); /* canceled between */
    for (int i = 0; i < 16; i++) {
        if (!kept[i]) continue;
        wrong += ctx_err(kept[i]) == 0;
        ctx_end(kept[i]);
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

static void *withhold_memory(void *arg) {
    famine_t *famine = (famine_t *)arg;
    uint64_t seed = 77;
    while (!load(&famine->over)) {
        fault_after(race_below(&seed, 20));
        if (race_below(&seed, 8) == 0) fault_all_after(0);
        for (int i = 0; i < 20; i++) sched_yield();
    }
    fault_off();
    return NULL;
}

TEST(random_failures_under_contention_lose_no_child_and_no_memory) {
    famine_t famine;
    memset(&famine, 0, sizeof famine);
    start_line_init(&famine.line, 5);
    famine.parent = ctx_with_cancel(ctx_background());
    race_side_t sides[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        sides[i].id = i;
        sides[i].shared = &famine;
        threads[i] = thread_start(derive_in_famine, &sides[i]);
    }
    pthread_t withholder = thread_start(withhold_memory, &famine);
    start_line(&famine.line);
    start_line(&famine.line);
    store(&famine.over, 1);
    thread_join(withholder);
    EXPECT(ctx_cancel(famine.parent));
    start_line(&famine.line);
    for (int i = 0; i < 4; i++) thread_join(threads[i]);
    ctx_end(famine.parent);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST_MAIN
