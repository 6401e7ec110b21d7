/* Section 3, sampling: decided once on the way from the root, the same for everything that is done below. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"

/* -- what the tests share --------------------------------------------------------------------------------------- */

typedef enum { NONE, YES, NO } kind_t; /* nobody has decided yet; or what was decided */

static ctx_desc_t desc_of_nothing(void) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    return desc;
}

static ctx_t *with_one_in(ctx_t *parent, uint32_t n) {
    ctx_desc_t desc = desc_of_nothing();
    desc.sample_one_in = n;
    return ctx_derive(parent, &desc);
}

static ctx_t *context_of(kind_t kind) {
    if (kind == NONE) return ctx_with_cancel(ctx_background());
    if (kind == YES) return with_one_in(ctx_background(), 1);
    for (;;) {
        ctx_t *ctx = with_one_in(ctx_background(), UINT32_MAX);
        if (!ctx_sampled(ctx)) return ctx;
        ctx_end(ctx);
    }
}

/* Where nobody has decided, a child that asks for one in one gets it; below a decision it changes nothing. */
static kind_t kind_of(ctx_t *ctx) {
    if (ctx_sampled(ctx)) return YES;
    ctx_t *child = with_one_in(ctx, 1);
    kind_t kind = ctx_sampled(child) ? NONE : NO;
    ctx_end(child);
    return kind;
}

/* Expect a new context to be of this kind, and end it. */
static void expect_kind(ctx_t *ctx, kind_t kind) {
    EXPECT_EQ(ctx_sampled(ctx), kind == YES);
    EXPECT_EQ(kind_of(ctx), kind);
    ctx_end(ctx);
}

static const ctx_key_t number_key = CTX_KEY(int);
static const int seven = 7;

/* -- deciding --------------------------------------------------------------------------------------------------- */

TEST(the_background_is_not_sampled) {
    CHECK(!ctx_sampled(ctx_background()));
    CHECK_EQ(kind_of(ctx_background()), NONE);
}

TEST(where_nobody_decides_nothing_is_sampled) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_desc_t desc = desc_of_nothing();
    expect_kind(ctx_derive(ctx, &desc), NONE);
    expect_kind(ctx_derive(ctx, NULL), NONE);
    expect_kind(ctx_with_timeout(ctx, CTX_S(3600)), NONE);
    expect_kind(ctx_with_value(ctx, &number_key, &seven), NONE);
    expect_kind(ctx_without_cancel(ctx), NONE);
    expect_kind(ctx, NONE);
}

TEST(one_in_one_is_always_sampled) {
    for (int i = 0; i < 1000; i++) expect_kind(with_one_in(ctx_background(), 1), YES);
}

static int decided_for(uint32_t one_in, int tries) {
    int sampled = 0;
    for (int i = 0; i < tries; i++) {
        ctx_t *ctx = with_one_in(ctx_background(), one_in);
        sampled += ctx_sampled(ctx);
        ctx_end(ctx);
    }
    return sampled;
}

/* The bounds are six standard deviations wide. */
TEST(one_in_n_is_sampled_about_once_in_n) {
    int in_2 = decided_for(2, 10000), in_10 = decided_for(10, 10000), in_100 = decided_for(100, 10000);
    EXPECT(in_2 > 4700 && in_2 < 5300);
    EXPECT(in_10 > 820 && in_10 < 1180);
    EXPECT(in_100 > 40 && in_100 < 160);
    EXPECT(decided_for(UINT32_MAX, 1000) < 2);
}

typedef struct {
    int sampled[RACE_MOST];
} votes_t;

static void *votes_once(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    ((votes_t *)side->shared)->sampled[side->id] = decided_for(2, 1);
    return NULL;
}

/* A generator for each thread, all of the same seed, would give all or nothing here. */
TEST(threads_that_decide_once_decide_differently) {
    enum { ROUNDS = 25 };
    int sampled = 0;
    for (int round = 0; round < ROUNDS; round++) {
        votes_t votes;
        race_run(RACE_MOST, votes_once, &votes);
        for (int i = 0; i < RACE_MOST; i++) sampled += votes.sampled[i];
    }
    EXPECT(sampled > 140 && sampled < 260); /* of 400 */
}

TEST(a_context_in_the_memory_of_another_decides_afresh) {
    for (int i = 0; i < 100; i++)
        for (int kind = NONE; kind <= NO; kind++) {
            ctx_end(context_of((kind_t)kind));
            expect_kind(ctx_with_cancel(ctx_background()), NONE);
        }
}

TEST(a_failed_context_is_not_sampled) {
    ctx_t *failed = with_one_in(NULL, 1);
    CHECK_EQ(ctx_err(failed), CTX_INVALID);
    EXPECT(!ctx_sampled(failed));
    ctx_end(failed);
}

/* -- inheriting ------------------------------------------------------------------------------------------------- */

TEST(every_kind_of_child_inherits_the_decision) {
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *ctx = context_of((kind_t)kind);
        ctx_desc_t desc = desc_of_nothing();
        desc.name = "all of it";
        desc.timeout = CTX_S(3600);
        desc.key = &number_key;
        desc.value = &seven;
        expect_kind(ctx_derive(ctx, &desc), (kind_t)kind);
        expect_kind(ctx_derive(ctx, NULL), (kind_t)kind);
        expect_kind(ctx_with_cancel(ctx), (kind_t)kind);
        expect_kind(ctx_with_timeout(ctx, CTX_S(3600)), (kind_t)kind);
        expect_kind(ctx_with_timeout(ctx, 0), (kind_t)kind);
        expect_kind(ctx_with_deadline(ctx, ctx_now() + CTX_S(3600)), (kind_t)kind);
        expect_kind(ctx_with_value(ctx, &number_key, &seven), (kind_t)kind);
        ctx_end(ctx);
    }
}

TEST(a_signal_context_inherits_the_decision) {
    static const int signals[] = {SIGUSR1};
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *ctx = context_of((kind_t)kind);
        expect_kind(ctx_notify_signals(ctx, signals, 1), (kind_t)kind);
        ctx_end(ctx);
    }
}

TEST(the_decision_goes_down_a_hundred_generations) {
    enum { DEPTH = 100 };
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *line[DEPTH];
        for (int i = 0; i < DEPTH; i++) line[i] = i ? ctx_with_cancel(line[i - 1]) : context_of((kind_t)kind);
        EXPECT_EQ(kind_of(line[DEPTH - 1]), kind);
        for (int i = 0; i < DEPTH; i++) ctx_end(line[i]);
    }
}

TEST(a_child_born_done_inherits_the_decision) {
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *ctx = context_of((kind_t)kind);
        ctx_cancel(ctx);
        EXPECT_EQ(kind_of(ctx), kind);
        expect_kind(ctx_with_cancel(ctx), (kind_t)kind);
        ctx_end(ctx);
    }
}

TEST(a_later_sample_one_in_is_ignored) {
    ctx_t *yes = context_of(YES), *no = context_of(NO);
    for (int i = 0; i < 100; i++) {
        expect_kind(with_one_in(yes, UINT32_MAX), YES);
        expect_kind(with_one_in(no, 1), NO);
    }
    ctx_end(yes);
    ctx_end(no);
}

TEST(the_first_to_decide_may_stand_far_from_the_root) {
    ctx_t *root = ctx_with_cancel(ctx_background());
    ctx_t *request = with_one_in(root, 1);
    expect_kind(ctx_with_cancel(request), YES);
    expect_kind(ctx_with_cancel(root), NONE); /* nothing goes up, nor to a sibling */
    ctx_end(request);
    ctx_end(root);
}

/* -- detaching and merging -------------------------------------------------------------------------------------- */

TEST(detached_work_keeps_the_decision) {
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *ctx = context_of((kind_t)kind);
        ctx_t *with_values = ctx_with_value(ctx, &number_key, &seven);
        ctx_desc_t desc = desc_of_nothing();
        desc.detach = true;
        expect_kind(ctx_without_cancel(ctx), (kind_t)kind);
        expect_kind(ctx_without_cancel(with_values), (kind_t)kind);
        expect_kind(ctx_derive(ctx, &desc), (kind_t)kind);
        desc.timeout = CTX_S(3600);
        expect_kind(ctx_derive(with_values, &desc), (kind_t)kind);
        ctx_end(with_values);
        ctx_end(ctx);
    }
}

TEST(detaching_is_no_way_round_a_decision) {
    ctx_desc_t desc = desc_of_nothing();
    desc.detach = true;
    desc.sample_one_in = 1;
    ctx_t *no = context_of(NO), *none = context_of(NONE);
    expect_kind(ctx_derive(no, &desc), NO);
    expect_kind(ctx_derive(none, &desc), YES);
    ctx_end(no);
    ctx_end(none);
}

TEST(detached_work_keeps_the_decision_when_its_parent_is_gone) {
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *ctx = context_of((kind_t)kind);
        ctx_t *detached = ctx_without_cancel(ctx);
        ctx_end(ctx);
        expect_kind(detached, (kind_t)kind);
    }
}

TEST(a_merged_context_has_the_decision_of_the_first) {
    for (int of_a = NONE; of_a <= NO; of_a++)
        for (int of_b = NONE; of_b <= NO; of_b++) {
            ctx_t *a = context_of((kind_t)of_a), *b = context_of((kind_t)of_b);
            ctx_t *once = ctx_merge(a, b);
            expect_kind(ctx_merge(once, b), (kind_t)of_a);
            expect_kind(ctx_merge(b, once), (kind_t)of_b);
            expect_kind(ctx_merge(a, ctx_background()), (kind_t)of_a);
            expect_kind(ctx_merge(ctx_background(), b), NONE);
            expect_kind(once, (kind_t)of_a);
            ctx_end(a);
            ctx_end(b);
        }
}

/* -- other threads ---------------------------------------------------------------------------------------------- */

/* A task that looks at its own context. */
typedef struct {
    kind_t want;
    int seen; /* [atomic] kind_of() + 1 */
} look_t;

static int looks(ctx_t *ctx, void *arg) {
    look_t *look = (look_t *)arg;
    store(&look->seen, (int)kind_of(ctx) + 1);
    return 0;
}

static look_t look_for(kind_t want) {
    look_t look = {want, 0};
    return look;
}

enum { TASKS = 300 };

static void looks_of_all_kinds(look_t *look, uint64_t seed, void **args) {
    for (int i = 0; i < TASKS; i++) {
        look[i] = look_for((kind_t)race_below(&seed, 3));
        args[i] = &look[i];
    }
}

static ctx_pool_t *pool_of(int workers, ctx_when_full_t when_full, ctx_dur_t task_timeout) {
    ctx_pool_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.workers = workers;
    desc.queue = 8;
    desc.when_full = when_full;
    desc.task_timeout = task_timeout;
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &desc);
    if (!pool) abort();
    return pool;
}

/* Workers use their contexts again: a decision of one task must not stick to the next, whose parent has none. */
static void expect_tasks_to_have_the_decision_of_their_parents(ctx_pool_t *pool, bool with_values, uint64_t seed) {
    ctx_t *roots[3], *parents[3];
    look_t look[TASKS];
    void *args[TASKS];
    looks_of_all_kinds(look, seed, args);
    for (int kind = NONE; kind <= NO; kind++) {
        roots[kind] = context_of((kind_t)kind);
        parents[kind] = with_values ? ctx_with_value(roots[kind], &number_key, &seven) : ctx_with_cancel(roots[kind]);
    }
    for (int i = 0; i < TASKS; i++)
        EXPECT_EQ(ctx_pool_submit_wait(pool, parents[look[i].want], "look", looks, args[i]), 0);
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    for (int i = 0; i < TASKS; i++) EXPECT_EQ(load(&look[i].seen), (int)look[i].want + 1);
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_end(parents[kind]);
        ctx_end(roots[kind]);
    }
}

TEST(a_task_of_a_pool_has_the_decision_of_its_parent_alone) {
    for (int values = 0; values < 2; values++) {
        expect_tasks_to_have_the_decision_of_their_parents(pool_of(1, CTX_REJECT, 0), values, 1);
        expect_tasks_to_have_the_decision_of_their_parents(pool_of(4, CTX_REJECT, 0), values, 2);
        expect_tasks_to_have_the_decision_of_their_parents(pool_of(2, CTX_REJECT, CTX_S(3600)), values, 3);
    }
}

TEST(a_task_that_its_submitter_runs_has_the_decision_too) {
    ctx_pool_t *pool = pool_of(1, CTX_CALLER_RUNS, 0);
    look_t look[TASKS];
    void *args[TASKS];
    looks_of_all_kinds(look, 4, args);
    for (int i = 0; i < TASKS; i++) {
        ctx_t *parent = context_of(look[i].want);
        EXPECT_EQ(ctx_pool_submit(pool, parent, "look", looks, args[i]), 0);
        ctx_end(parent);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    for (int i = 0; i < TASKS; i++) EXPECT_EQ(load(&look[i].seen), (int)look[i].want + 1);
}

TEST(a_batch_of_tasks_has_the_decision_of_its_parent) {
    ctx_pool_t *pool = pool_of(2, CTX_BLOCK, 0);
    look_t look[30];
    void *args[30];
    for (int i = 0; i < 30; i++) {
        look[i] = look_for((kind_t)(i / 10));
        args[i] = &look[i];
    }
    for (int kind = NONE; kind <= NO; kind++) {
        ctx_t *parent = context_of((kind_t)kind);
        EXPECT_EQ(ctx_pool_submit_batch(pool, parent, "look", looks, args + kind * 10, 10, NULL), 0);
        ctx_end(parent);
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
    for (int i = 0; i < 30; i++) EXPECT_EQ(load(&look[i].seen), (int)look[i].want + 1);
}

TEST(named_work_has_the_decision_of_its_parent) {
    for (int i = 0; i < 30; i++) { /* idle threads are used again */
        look_t look = look_for((kind_t)(i % 3));
        ctx_t *parent = context_of(look.want);
        EXPECT_EQ(ctx_go(parent, "look", looks, &look), 0);
        EXPECT_EQ(ctx_go_wait(ctx_background()), 0);
        EXPECT_EQ(load(&look.seen), (int)look.want + 1);
        ctx_end(parent);
    }
}

static void expect_group_to_have_the_decision(ctx_pool_t *pool, kind_t kind) {
    ctx_group_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.pool = pool;
    ctx_t *parent = context_of(kind);
    ctx_group_t *group = ctx_group_new(parent, &desc);
    EXPECT(group != NULL);
    look_t look[5];
    EXPECT_EQ(kind_of(ctx_group_ctx(group)), kind);
    for (int i = 0; i < 5; i++) {
        look[i] = look_for(kind);
        EXPECT_EQ(ctx_group_go(group, looks, &look[i]), 0);
    }
    EXPECT_EQ(ctx_group_wait(group), 0);
    for (int i = 0; i < 5; i++) EXPECT_EQ(load(&look[i].seen), (int)kind + 1);
    ctx_end(parent);
}

TEST(the_tasks_of_a_group_have_the_decision_of_its_parent) {
    ctx_pool_t *pool = pool_of(1, CTX_REJECT, 0);
    for (int i = 0; i < 9; i++) {
        expect_group_to_have_the_decision(NULL, (kind_t)(i % 3));
        expect_group_to_have_the_decision(pool, (kind_t)(i % 3));
    }
    EXPECT_EQ(ctx_pool_drain(pool, CTX_FOREVER, NULL), 0);
    ctx_pool_free(pool);
}

TEST(a_race_has_the_decision_of_the_first_context) {
    for (int of_a = NONE; of_a <= NO; of_a++)
        for (int of_b = NONE; of_b <= NO; of_b++) {
            look_t look = look_for((kind_t)of_a);
            ctx_t *a = context_of((kind_t)of_a), *b = context_of((kind_t)of_b);
            EXPECT_EQ(ctx_run_either(a, b, looks, &look), 0);
            EXPECT_EQ(load(&look.seen), of_a + 1);
            ctx_end(a);
            ctx_end(b);
        }
}

static int looks_while_flushing(ctx_t *ctx, const void *items, size_t n, void *user) {
    (void)items;
    (void)n;
    return looks(ctx, user);
}

TEST(a_flush_has_the_decision_of_the_batchers_lifetime) {
    for (int kind = NONE; kind <= NO; kind++) {
        look_t look = look_for((kind_t)kind);
        ctx_batch_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.item_size = sizeof(int);
        desc.flush = looks_while_flushing;
        desc.user = &look;
        ctx_t *lifetime = context_of((kind_t)kind);
        ctx_batch_t *batch = ctx_batch_new(lifetime, &desc);
        CHECK(batch != NULL);
        EXPECT_EQ(ctx_batch_add(batch, &seven), 0);
        EXPECT_EQ(batch_close(batch, CTX_FOREVER), 0);
        EXPECT_EQ(load(&look.seen), kind + 1);
        ctx_end(lifetime);
    }
}

TEST(the_runtime_stops_clean) {
    ctx_runtime_stop();
    EXPECT_EQ(blocks_live(), 0);
}

TEST_MAIN
