/* The context: one way, downward and complete, causes, references, callbacks, merge, leaf, no recursion, contention. */

#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "race.h"
#include "child.h"

#include <limits.h>
#include <poll.h>

/* Blocks that live once the caches are emptied: none at the end of every test. */
static long settled_blocks(void) {
    ctx_runtime_stop();
    return blocks_live();
}

static ctx_desc_t desc_of_nothing(void) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    return desc;
}

static ctx_desc_t desc_named(const char *name) {
    ctx_desc_t desc = desc_of_nothing();
    desc.name = name;
    return desc;
}

/* What a callback saw. */
typedef struct {
    ctx_t *ctx;
    int ran; /* [atomic] */
    int err;
    ctx_cause_t cause;
    pthread_t thread;
} seen_t;

static seen_t seen_of(ctx_t *ctx) {
    seen_t seen;
    memset(&seen, 0, sizeof seen);
    seen.ctx = ctx;
    return seen;
}

static void see(void *arg) {
    seen_t *seen = (seen_t *)arg;
    seen->thread = pthread_self();
    seen->err = ctx_err(seen->ctx);
    seen->cause = ctx_cause(seen->ctx);
    __atomic_add_fetch(&seen->ran, 1, __ATOMIC_RELEASE);
}

static int ran(const seen_t *seen) { return __atomic_load_n(&seen->ran, __ATOMIC_ACQUIRE); }

static void count(void *arg) { __atomic_add_fetch((int *)arg, 1, __ATOMIC_RELEASE); }

static const char *const words[] = {"zero", "one", "two", "three", "four", "five", "six", "seven"};

static bool cause_is(ctx_t *ctx, int code, const char *what) {
    ctx_cause_t cause = ctx_cause(ctx);
    return cause.code == code && cause.what == what;
}

/* == the background ============================================================================================== */

TEST(the_background_is_never_canceled_and_never_freed) {
    ctx_t *root = ctx_background();
    CHECK(root != NULL);
    for (int i = 0; i < 3; i++) {
        CHECK(!ctx_cancel(root));
        CHECK(!ctx_cancel_cause(root, -EIO, "no"));
        ctx_end(root);
        ctx_release(root);
        CHECK(ctx_background() == root);
        CHECK_EQ(ctx_err(root), 0);
    }
    CHECK(ctx_retain(root) == root);
    ctx_release(root);
    CHECK(cause_is(root, 0, NULL));
    CHECK_EQ(ctx_deadline(root), CTX_NO_DEADLINE);
    CHECK_EQ(ctx_remaining(root), CTX_FOREVER);
    CHECK(ctx_name(root) != NULL);
    CHECK(ctx_site(root) != NULL);
    ctx_t *child = ctx_with_cancel(root);
    CHECK_EQ(ctx_err(child), 0);
    ctx_end(child);
}

TEST(ending_and_releasing_null_is_fine) {
    ctx_end(NULL);
    ctx_release(NULL);
}

/* == one way ===================================================================================================== */

TEST(only_the_first_cancel_does_it) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT(cause_is(ctx, 0, NULL));
    EXPECT(ctx_cancel(ctx));
    EXPECT(!ctx_cancel(ctx));
    EXPECT(!ctx_cancel_cause(ctx, -EIO, "later"));
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(ctx).code, CTX_CANCELED);
    EXPECT(ctx_cause(ctx).what != NULL);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_cause_is_kept_as_it_was_given) {
    static const char what[] = "the disk is gone";
    static const int codes[] = {-EIO, CTX_CANCELED, -77777, 15, INT_MIN, INT_MAX};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        EXPECT(ctx_cancel_cause(ctx, codes[i], what));
        EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
        EXPECT(cause_is(ctx, codes[i], what));
        ctx_end(ctx);
    }
}

TEST(a_cause_of_deadline_exceeded_is_that_err_too) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_cancel_cause(ctx, CTX_DEADLINE_EXCEEDED, "too slow upstream"));
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
}

TEST(a_cause_without_code_or_text_gets_the_default) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_cancel_cause(ctx, 0, "no code"));
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(ctx).code, CTX_CANCELED);
    EXPECT(strcmp(ctx_cause(ctx).what, "no code") == 0);
    ctx_end(ctx);

    ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_cancel_cause(ctx, CTX_CLOSED, NULL));
    EXPECT_EQ(ctx_cause(ctx).code, CTX_CLOSED);
    CHECK(ctx_cause(ctx).what != NULL);
    EXPECT(strcmp(ctx_cause(ctx).what, ctx_strerror(CTX_CLOSED)) == 0);
    ctx_end(ctx);
}

typedef struct {
    start_line_t barrier;
    ctx_t *ctx, *child;
    int winners; /* [atomic] */
    int winner;
    int rounds;
} contest_t;

/* Everyone cancels. Each must see the winner's code and text at once, in the context and in its child's child. */
static void *cancel_at_once(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    contest_t *contest = (contest_t *)side->shared;
    int wrong = 0;
    for (int round = 0; round < contest->rounds; round++) {
        ctx_t *mine = NULL;
        if (side->id == 0) {
            contest->ctx = ctx_with_cancel(ctx_background());
            mine = ctx_with_cancel(contest->ctx);
            contest->child = ctx_with_cancel(mine);
            contest->winners = 0;
        }
        start_line(&contest->barrier);
        bool won = ctx_cancel_cause(contest->ctx, 100 + side->id, words[side->id]);
        wrong += ctx_err(contest->ctx) != CTX_CANCELED;
        ctx_cause_t at_once = ctx_cause(contest->ctx);
        if (won) {
            __atomic_add_fetch(&contest->winners, 1, __ATOMIC_RELAXED);
            contest->winner = side->id; /* two winners are a data race too */
            wrong += at_once.code != 100 + side->id;
            wrong += ctx_err(contest->child) != CTX_CANCELED;
        }
        start_line(&contest->barrier);
        wrong += __atomic_load_n(&contest->winners, __ATOMIC_RELAXED) != 1;
        wrong += at_once.code != 100 + contest->winner || at_once.what != words[contest->winner];
        wrong += !cause_is(contest->child, 100 + contest->winner, words[contest->winner]);
        start_line(&contest->barrier);
        if (side->id == 0) {
            ctx_end(contest->child);
            ctx_end(mine);
            ctx_end(contest->ctx);
        }
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(of_eight_cancels_at_once_one_wins_and_all_see_its_cause) {
    contest_t contest;
    memset(&contest, 0, sizeof contest);
    start_line_init(&contest.barrier, 8);
    contest.rounds = test_scale(4000);
    race_run(8, cancel_at_once, &contest);
    EXPECT_EQ(settled_blocks(), 0);
}

/* Sides 0 and 1 cancel with different causes, the others read err and cause all the while. */
static void *read_causes_at_once(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    contest_t *contest = (contest_t *)side->shared;
    int torn = 0, early = 0, changed = 0;
    for (int round = 0; round < contest->rounds; round++) {
        if (side->id == 0) {
            contest->ctx = ctx_with_cancel(ctx_background());
            contest->child = ctx_with_cancel(contest->ctx);
        }
        start_line(&contest->barrier);
        ctx_t *ctx = side->id % 2 ? contest->ctx : contest->child;
        if (side->id < 2) {
            ctx_cancel_cause(contest->ctx, 100 + side->id, words[side->id]);
        } else {
            int turns = 0;
            ctx_cause_t cause;
            do {
                int err = ctx_err(ctx);
                cause = ctx_cause(ctx);
                early += err != 0 && cause.code == 0; /* an err has its cause from the first moment */
                torn += (cause.code == 0) != (cause.what == NULL);
                torn += cause.code != 0 && cause.code != 100 && cause.code != 101;
                torn += cause.code == 100 && cause.what != words[0];
                torn += cause.code == 101 && cause.what != words[1];
                early += cause.code != 0 && ctx_err(ctx) == 0;
                race_pause(&turns);
            } while (cause.code == 0);
            changed += ctx_cause(ctx).code != cause.code;
        }
        start_line(&contest->barrier);
        if (side->id == 0) {
            ctx_end(contest->child);
            ctx_end(contest->ctx);
        }
    }
    EXPECT_EQ(torn, 0);
    EXPECT_EQ(early, 0);
    EXPECT_EQ(changed, 0);
    return NULL;
}

TEST(a_cause_is_never_torn_and_never_changes) {
    contest_t contest;
    memset(&contest, 0, sizeof contest);
    start_line_init(&contest.barrier, 4);
    contest.rounds = test_scale(20000);
    race_run(4, read_causes_at_once, &contest);
}

typedef struct {
    start_line_t barrier;
    ctx_t *top, *middle, *bottom, *merged;
    ctx_leaf_t leaf;
    int rounds;
    int letter; /* plain: only the library's order makes it visible */
} mail_t;

static bool letter_box_is_open(mail_t *mail, int how) {
    switch (how) {
        case 0: return ctx_err(mail->top) != 0;
        case 1: return ctx_err(mail->bottom) != 0;
        case 2: return ctx_err(mail->merged) != 0;
        case 3: return ctx_leaf_err(&mail->leaf) != 0;
        case 4: return ctx_cause(mail->bottom).code != 0 && ctx_err(mail->bottom) != 0;
        default: return ctx_wait(mail->bottom, CTX_FOREVER) != 0;
    }
}

static void *write_then_cancel(void *arg) {
    mail_t *mail = (mail_t *)arg;
    for (int round = 1; round <= mail->rounds; round++) {
        mail->top = ctx_with_cancel(ctx_background());
        mail->middle = ctx_with_cancel(mail->top);
        mail->bottom = ctx_with_cancel(mail->middle);
        mail->merged = ctx_merge(ctx_background(), mail->middle);
        ctx_leaf_init(&mail->leaf, mail->bottom, CTX_NO_DEADLINE);
        start_line(&mail->barrier);
        mail->letter = round;
        ctx_cancel(mail->top);
        start_line(&mail->barrier);
        ctx_end(mail->merged);
        ctx_end(mail->bottom);
        ctx_end(mail->middle);
        ctx_end(mail->top);
    }
    return NULL;
}

TEST(what_was_written_before_a_cancel_is_visible_after_err) {
    mail_t mail;
    memset(&mail, 0, sizeof mail);
    start_line_init(&mail.barrier, 2);
    mail.rounds = test_scale(30000);
    pthread_t writer = thread_start(write_then_cancel, &mail);
    int stale = 0;
    for (int round = 1; round <= mail.rounds; round++) {
        start_line(&mail.barrier);
        int turns = 0;
        while (!letter_box_is_open(&mail, round % 6)) race_pause(&turns);
        stale += mail.letter != round;
        start_line(&mail.barrier);
    }
    pthread_join(writer, NULL);
    EXPECT_EQ(stale, 0);
}

/* == downward and complete ======================================================================================= */

enum { TREE_MOST = 512 };

/* A random tree, deep as well as wide, with a reference to each node. */
typedef struct {
    int n;
    ctx_t *nodes[TREE_MOST];
    int above[TREE_MOST];
} tree_t;

static void tree_grow(tree_t *tree, int n, ctx_t *root, uint64_t *seed) {
    tree->n = n;
    tree->above[0] = -1;
    tree->nodes[0] = ctx_with_cancel(root);
    for (int i = 1; i < n; i++) {
        tree->above[i] = race_below(seed, 2) ? i - 1 : race_below(seed, i);
        tree->nodes[i] = ctx_with_cancel(tree->nodes[tree->above[i]]);
    }
}

static bool tree_is_below(const tree_t *tree, int node, int top) {
    while (node > top) node = tree->above[node];
    return node == top;
}

static int tree_live_below(const tree_t *tree, int top) {
    int live = 0;
    for (int i = top; i < tree->n; i++)
        if (ctx_err(tree->nodes[i]) == 0 && tree_is_below(tree, i, top)) live++;
    return live;
}

static void tree_end(tree_t *tree) {
    for (int i = 0; i < tree->n; i++) ctx_end(tree->nodes[i]);
}

TEST(a_cancel_reaches_every_descendant_and_nobody_else) {
    uint64_t seed = 1;
    static tree_t tree;
    for (int round = 0; round < test_scale(500); round++) {
        tree_grow(&tree, TREE_MOST, ctx_background(), &seed);
        int top = 1 + race_below(&seed, TREE_MOST - 1);
        EXPECT(ctx_cancel_cause(tree.nodes[top], -EIO, words[1]));
        int wrong = 0;
        for (int i = 0; i < TREE_MOST; i++) {
            bool below = tree_is_below(&tree, i, top);
            wrong += (ctx_err(tree.nodes[i]) != 0) != below;
            wrong += below && !cause_is(tree.nodes[i], -EIO, words[1]);
        }
        CHECK_EQ(wrong, 0);
        tree_end(&tree);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(canceling_a_child_never_touches_parent_or_siblings) {
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(1000));
    ctx_t *a = ctx_with_cancel(parent);
    ctx_t *b = ctx_with_cancel(parent);
    EXPECT(ctx_cancel(a));
    EXPECT_EQ(ctx_err(parent), 0);
    EXPECT_EQ(ctx_err(b), 0);
    ctx_end(a);
    EXPECT_EQ(ctx_err(parent), 0);
    EXPECT_EQ(ctx_err(b), 0);
    EXPECT(ctx_cancel(parent));
    EXPECT_EQ(ctx_err(b), CTX_CANCELED);
    ctx_end(b);
    ctx_end(parent);
}

/* Threads at work on one tree at the same moment. Side 0 builds it and works at the root. */
typedef enum { OVERLAP_CANCEL, OVERLAP_END, OVERLAP_RELEASE } overlap_t;

typedef struct {
    start_line_t barrier;
    tree_t tree;
    overlap_t what; /* that the sides other than 0 do */
    int sides;
    int rounds;
    int target[RACE_MOST];
} overlap_race_t;

static void *overlap(void *arg) {
    static const int sizes[] = {6, 40, TREE_MOST};
    race_side_t *side = (race_side_t *)arg;
    overlap_race_t *race = (overlap_race_t *)side->shared;
    tree_t *tree = &race->tree;
    uint64_t seed = 7 + (uint64_t)side->id;
    int incomplete = 0;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            tree_grow(tree, sizes[round % 3], ctx_background(), &seed);
            race->target[0] = 0;
            for (int i = 1; i < race->sides; i++) race->target[i] = 1 + race_below(&seed, tree->n - 1);
            if (race->what == OVERLAP_END)
                for (int i = 0; i < tree->n; i++) ctx_retain(tree->nodes[i]);
        }
        start_line(&race->barrier);
        int target = race->target[side->id];
        ctx_t *ctx = tree->nodes[target];
        bool first = true; /* of the sides with this target: a reference is dropped once */
        for (int i = 1; i < side->id; i++) first = first && race->target[i] != target;
        race_dither(race_random(&seed) >> (side->id == 0 ? 0 : 3));
        if (side->id == 0 || race->what == OVERLAP_CANCEL) {
            bool won = ctx_cancel_cause(ctx, 100 + side->id, words[side->id]);
            if (race->what == OVERLAP_RELEASE) {
                for (int i = 1; i < tree->n; i++) { /* released nodes may be gone: look at the others */
                    bool gone = false;
                    for (int k = 1; k < race->sides; k++) gone = gone || race->target[k] == i;
                    incomplete += won && !gone && ctx_err(tree->nodes[i]) == 0;
                }
            } else if (won) {
                incomplete += tree_live_below(tree, target);
            }
            if (side->id == 0 && race->what != OVERLAP_CANCEL) incomplete += !won;
        } else if (first && race->what == OVERLAP_END) {
            ctx_end(ctx);
            incomplete += ctx_err(ctx) == 0; /* held by the second reference */
        } else if (first) {
            ctx_release(ctx);
        }
        start_line(&race->barrier);
        if (side->id != 0) continue;
        for (int i = 0; i < tree->n; i++) {
            bool dropped = false;
            for (int k = 1; k < race->sides; k++) dropped = dropped || race->target[k] == i;
            if (!dropped || race->what == OVERLAP_CANCEL) ctx_end(tree->nodes[i]);
            if (race->what == OVERLAP_END) ctx_release(tree->nodes[i]);
        }
    }
    EXPECT_EQ(incomplete, 0);
    return NULL;
}

static void check_overlap(overlap_t what, int sides, int rounds) {
    static overlap_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, sides);
    race.what = what;
    race.sides = sides;
    race.rounds = test_scale(rounds);
    race_run(sides, overlap, &race);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(two_overlapping_cancels_are_each_complete_when_they_return) { check_overlap(OVERLAP_CANCEL, 2, 10000); }

TEST(four_overlapping_cancels_are_each_complete_when_they_return) { check_overlap(OVERLAP_CANCEL, 4, 4000); }

TEST(a_cancel_is_complete_while_nodes_below_it_are_ended) { check_overlap(OVERLAP_END, 3, 5000); }

TEST(a_cancel_is_complete_while_nodes_below_it_are_released) { check_overlap(OVERLAP_RELEASE, 3, 5000); }

TEST(a_child_of_a_done_context_is_born_done_with_its_cause) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_t *parent = ctx_with_value(ctx_background(), &key, &seven);
    EXPECT(ctx_cancel_cause(parent, -EIO, words[3]));
    ctx_t *children[6];
    children[0] = ctx_with_cancel(parent);
    children[1] = ctx_with_timeout(parent, CTX_S(10));
    children[2] = ctx_with_timeout(parent, -1); /* the parent was first */
    children[3] = ctx_with_value(parent, &key, &seven);
    children[4] = ctx_merge(parent, ctx_background());
    children[5] = ctx_merge(ctx_background(), parent);
    for (int i = 0; i < 6; i++) {
        EXPECT_EQ(ctx_err(children[i]), CTX_CANCELED);
        EXPECT(cause_is(children[i], -EIO, words[3]));
        EXPECT(!ctx_cancel(children[i]));
        if (i < 5) {
            const int *value = (const int *)ctx_value(children[i], &key);
            EXPECT(value != NULL && *value == 7);
        }
        ctx_t *grandchild = ctx_with_cancel(children[i]);
        EXPECT(cause_is(grandchild, -EIO, words[3]));
        ctx_end(grandchild);
        ctx_end(children[i]);
    }
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

/* Threads derive from a parent and end what they derived until it is canceled under their hands. */
enum { STORM_SIDES = 8, STORM_KEPT = 16 };

typedef struct {
    start_line_t barrier;
    ctx_t *parent, *other;
    int canceled;   /* [atomic] ctx_cancel() has returned */
    long derived;   /* [atomic] */
    long wanted;    /* children in all */
    int over;       /* no further round */
    int live, late; /* [atomic] failures */
} storm_t;

static ctx_t *storm_derive(storm_t *storm, uint64_t random) {
    static const ctx_key_t key = CTX_KEY(uint64_t);
    switch (random % 16) {
        case 0: return ctx_merge(storm->parent, storm->other);
        case 1: return ctx_merge(storm->other, storm->parent);
        case 2: return ctx_with_value(storm->parent, &key, &random);
        case 3: return ctx_with_timeout(storm->parent, CTX_S(3600) + (ctx_dur_t)(random >> 40));
        case 4: {
            ctx_t *between = ctx_with_cancel(storm->parent);
            ctx_t *below = ctx_with_cancel(between);
            ctx_release(between);
            return below;
        }
        default: return ctx_with_cancel(storm->parent);
    }
}

static void *derive_in_storm(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    storm_t *storm = (storm_t *)side->shared;
    uint64_t seed = (uint64_t)side->id;
    ctx_t *kept[STORM_KEPT];
    memset(kept, 0, sizeof kept);
    for (;;) {
        start_line(&storm->barrier);
        if (storm->over) return NULL;
        for (unsigned at = 0;; at = (at + 1) % STORM_KEPT) {
            bool canceled = load(&storm->canceled);
            ctx_t *child = storm_derive(storm, race_random(&seed));
            int err = ctx_err(child);
            if (canceled && err == 0) __atomic_add_fetch(&storm->late, 1, __ATOMIC_RELAXED);
            if (kept[at]) ctx_end(kept[at]);
            kept[at] = child;
            __atomic_add_fetch(&storm->derived, 1, __ATOMIC_RELAXED);
            if (err) break;
        }
        start_line(&storm->barrier); /* the cancel has returned, too */
        for (int i = 0; i < STORM_KEPT; i++) {
            if (!kept[i]) continue;
            if (!cause_is(kept[i], -EIO, words[5])) __atomic_add_fetch(&storm->live, 1, __ATOMIC_RELAXED);
            ctx_end(kept[i]);
            kept[i] = NULL;
        }
        start_line(&storm->barrier);
    }
}

TEST(a_parent_canceled_while_eight_threads_derive_leaves_no_child_live) {
    storm_t storm;
    memset(&storm, 0, sizeof storm);
    start_line_init(&storm.barrier, STORM_SIDES + 1);
    storm.wanted = test_scale(1000000);
    pthread_t threads[STORM_SIDES];
    race_side_t sides[STORM_SIDES];
    for (int i = 0; i < STORM_SIDES; i++) {
        sides[i].id = i;
        sides[i].shared = &storm;
        threads[i] = thread_start(derive_in_storm, &sides[i]);
    }
    uint64_t seed = 99;
    while (__atomic_load_n(&storm.derived, __ATOMIC_RELAXED) < storm.wanted) {
        storm.parent = ctx_with_cancel(ctx_background());
        storm.other = ctx_with_cancel(ctx_background());
        storm.canceled = 0;
        long until = __atomic_load_n(&storm.derived, __ATOMIC_RELAXED) + race_below(&seed, 10000);
        start_line(&storm.barrier);
        int turns = 0;
        while (__atomic_load_n(&storm.derived, __ATOMIC_RELAXED) < until) race_pause(&turns);
        EXPECT(ctx_cancel_cause(storm.parent, -EIO, words[5]));
        store(&storm.canceled, 1);
        start_line(&storm.barrier);
        start_line(&storm.barrier);
        EXPECT_EQ(ctx_err(storm.other), 0);
        ctx_end(storm.parent);
        ctx_end(storm.other);
    }
    storm.over = 1;
    start_line(&storm.barrier);
    for (int i = 0; i < STORM_SIDES; i++) pthread_join(threads[i], NULL);
    EXPECT_EQ(storm.live, 0);
    EXPECT_EQ(storm.late, 0);
    EXPECT_EQ(settled_blocks(), 0);
}

/* The first thing that is attached to a context, against a cancel from above that finds nothing attached yet. */
typedef struct {
    start_line_t line;
    ctx_t *top, *middle;
    int rounds;
} newcomer_t;

static void *cancel_above(void *arg) {
    newcomer_t *race = (newcomer_t *)arg;
    uint64_t seed = 12;
    for (int round = 0; round < race->rounds; round++) {
        start_line(&race->line);
        race_dither(race_random(&seed));
        ctx_cancel(race->top);
        start_line(&race->line);
    }
    return NULL;
}

TEST(the_first_to_attach_during_a_cancel_is_not_overlooked) {
    newcomer_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(200000);
    pthread_t thread = thread_start(cancel_above, &race);
    uint64_t seed = 13;
    int overlooked = 0;
    for (int round = 0; round < race.rounds; round++) {
        ctx_t *child = NULL;
        ctx_on_done_t reg;
        int runs = 0, fd = -1, kind = round % 16;
        race.top = ctx_with_cancel(ctx_background());
        race.middle = ctx_with_cancel(race.top);
        start_line(&race.line);
        race_dither(race_random(&seed));
        if (kind < 8)
            child = ctx_with_cancel(race.middle);
        else if (kind < 14)
            ctx_on_done(&reg, race.middle, count, &runs);
        else if (kind == 14)
            fd = ctx_done_fd(race.middle);
        else
            ctx_wait(race.middle, CTX_FOREVER);
        start_line(&race.line);
        if (child)
            overlooked += ctx_err(child) == 0;
        else if (kind < 14)
            overlooked += load(&runs) != 1;
        else if (kind == 14)
            overlooked += fd < 0 || !readable(fd);
        ctx_end(child);
        ctx_end(race.middle);
        ctx_end(race.top);
    }
    thread_join(thread);
    EXPECT_EQ(overlooked, 0);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == cause and deadline of the chain ============================================================================= */

TEST(a_child_whose_own_deadline_passed_first_keeps_its_own_cause) {
    ctx_clock_fake(CTX_S(1));
    ctx_desc_t desc = desc_of_nothing();
    desc.timeout = CTX_MS(5);
    desc.deadline_cause = words[2];
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_derive(parent, &desc);
    ctx_t *below = ctx_with_cancel(child);
    ctx_clock_advance(CTX_MS(5));
    EXPECT(ctx_cancel_cause(parent, -EIO, words[1]));
    EXPECT_EQ(ctx_err(child), CTX_DEADLINE_EXCEEDED);
    EXPECT(cause_is(child, CTX_DEADLINE_EXCEEDED, words[2]));
    EXPECT(cause_is(below, CTX_DEADLINE_EXCEEDED, words[2]));
    EXPECT(cause_is(parent, -EIO, words[1]));
    ctx_end(below);
    ctx_end(child);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(a_descendant_inherits_the_err_and_cause_of_a_passed_deadline) {
    ctx_clock_fake(CTX_S(1));
    ctx_desc_t desc = desc_of_nothing();
    desc.timeout = CTX_MS(5);
    desc.deadline_cause = words[2];
    ctx_t *parent = ctx_derive(ctx_background(), &desc);
    ctx_t *child = ctx_with_cancel(parent);
    ctx_t *plain = ctx_with_timeout(ctx_background(), CTX_MS(5));
    ctx_clock_advance(CTX_MS(5));
    EXPECT_EQ(ctx_err(child), CTX_DEADLINE_EXCEEDED);
    EXPECT(cause_is(child, CTX_DEADLINE_EXCEEDED, words[2]));
    EXPECT_EQ(ctx_cause(plain).code, CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_cause(plain).what != NULL && strcmp(ctx_cause(plain).what, "deadline exceeded") == 0);
    ctx_end(plain);
    ctx_end(child);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(the_deadline_is_the_earliest_of_the_chain) {
    ctx_clock_fake(CTX_S(100));
    ctx_t *none = ctx_with_cancel(ctx_background());
    EXPECT_EQ(ctx_deadline(none), CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_remaining(none), CTX_FOREVER);
    ctx_t *ten = ctx_with_timeout(none, CTX_S(10));
    ctx_t *longer = ctx_with_timeout(ten, CTX_S(20));
    ctx_t *shorter = ctx_with_deadline(longer, CTX_S(103));
    ctx_t *below = ctx_with_cancel(shorter);
    EXPECT_EQ(ctx_deadline(ten), CTX_S(110));
    EXPECT_EQ(ctx_deadline(longer), CTX_S(110));
    EXPECT_EQ(ctx_deadline(below), CTX_S(103));
    EXPECT_EQ(ctx_remaining(longer), CTX_S(10));
    EXPECT_EQ(ctx_remaining(below), CTX_S(3));
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_remaining(below), CTX_S(1));
    ctx_t *part = ctx_with_timeout(ten, ctx_remaining(ten) / 4);
    EXPECT_EQ(ctx_deadline(part), CTX_S(104));
    ctx_clock_advance(CTX_S(50));
    EXPECT_EQ(ctx_remaining(below), 0);
    EXPECT_EQ(ctx_remaining(ten), 0);
    EXPECT_EQ(ctx_err(longer), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(none), 0);
    ctx_end(part);
    ctx_end(below);
    ctx_end(shorter);
    ctx_end(longer);
    ctx_end(ten);
    ctx_end(none);
    ctx_clock_real();
}

/* Seen from outside: a timer of its own would give its own cause, at its own time. */
TEST(a_child_whose_deadline_is_not_earlier_is_ended_by_its_parents) {
    ctx_clock_fake(0);
    ctx_desc_t desc = desc_of_nothing();
    desc.deadline = CTX_S(10);
    desc.deadline_cause = words[1];
    ctx_t *parent = ctx_derive(ctx_background(), &desc);
    desc.deadline_cause = words[2];
    ctx_t *same = ctx_derive(parent, &desc);
    desc.deadline = CTX_S(11);
    ctx_t *later = ctx_derive(parent, &desc);
    ctx_clock_advance(CTX_S(30));
    EXPECT(cause_is(same, CTX_DEADLINE_EXCEEDED, words[1]));
    EXPECT(cause_is(later, CTX_DEADLINE_EXCEEDED, words[1]));
    ctx_end(later);
    ctx_end(same);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(a_timeout_of_zero_or_less_has_expired) {
    static const ctx_dur_t timeouts[] = {0, -1, -CTX_S(5), INT64_MIN};
    for (size_t i = 0; i < sizeof timeouts / sizeof timeouts[0]; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), timeouts[i]);
        EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_cause(ctx).code, CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_remaining(ctx), 0);
        EXPECT(!ctx_cancel(ctx));
        ctx_t *child = ctx_with_timeout(ctx, CTX_S(5));
        EXPECT_EQ(ctx_err(child), CTX_DEADLINE_EXCEEDED);
        ctx_end(child);
        ctx_end(ctx);
    }
}

TEST(a_budget_of_zero_or_less_has_expired_and_not_vanished) {
    EXPECT(CTX_EXPIRED < 0);
    EXPECT_EQ(ctx_budget(CTX_MS(3)), CTX_MS(3));
    EXPECT_EQ(ctx_budget(1), 1);
    EXPECT_EQ(ctx_budget(CTX_FOREVER), CTX_FOREVER);
    static const ctx_dur_t used_up[] = {0, -1, -CTX_S(5), INT64_MIN, CTX_EXPIRED};
    for (size_t i = 0; i < sizeof used_up / sizeof used_up[0]; i++) {
        EXPECT_EQ(ctx_budget(used_up[i]), CTX_EXPIRED);
        ctx_desc_t desc;
        memset(&desc, 0, sizeof desc);
        desc.timeout = ctx_budget(used_up[i]);
        ctx_t *ctx = ctx_derive(ctx_background(), &desc);
        EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
    }
    ctx_desc_t none; /* what it is for */
    memset(&none, 0, sizeof none);
    ctx_t *ctx = ctx_derive(ctx_background(), &none);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_NO_DEADLINE);
    ctx_end(ctx);
}

TEST(the_remaining_milliseconds_are_what_poll_wants) {
    static const struct {
        ctx_dur_t timeout;
        int ms;
    } cases[] = {
        {1, 1},
        {CTX_US(999), 1},
        {CTX_MS(1) - 1, 1},
        {CTX_MS(1), 1},
        {CTX_MS(1) + 1, 2}, /* one less would return before the deadline */
        {CTX_MS(1500), 1500},
        {CTX_MS(INT32_MAX) - 1, INT32_MAX},
        {CTX_MS(INT32_MAX), INT32_MAX},
        {CTX_MS(INT32_MAX) + 1, INT32_MAX},
        {CTX_FOREVER - CTX_S(200), INT32_MAX},
        {CTX_FOREVER, -1},
        {0, 0},
        {-CTX_S(1), 0},
        {INT64_MIN, 0},
    };
    EXPECT_EQ(ctx_remaining_ms(ctx_background()), -1);
    ctx_clock_fake(CTX_S(100));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), cases[i].timeout);
        EXPECT_EQ(ctx_remaining_ms(ctx), cases[i].ms);
        ctx_end(ctx);
    }
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(3));
    ctx_t *below = ctx_with_cancel(ctx);
    ctx_clock_advance(CTX_US(2500));
    EXPECT_EQ(ctx_remaining_ms(below), 1);
    ctx_clock_advance(CTX_US(500));
    EXPECT_EQ(ctx_remaining_ms(below), 0);
    ctx_clock_advance(CTX_S(5));
    EXPECT_EQ(ctx_remaining_ms(below), 0);
    ctx_end(below);
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_deadline_in_the_past_has_expired) {
    const ctx_time_t deadlines[] = {ctx_now(), ctx_now() - 1, 0, 1, -1, INT64_MIN};
    for (size_t i = 0; i < sizeof deadlines / sizeof deadlines[0]; i++) {
        ctx_t *ctx = ctx_with_deadline(ctx_background(), deadlines[i]);
        EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
        EXPECT_EQ(ctx_remaining(ctx), 0);
        ctx_end(ctx);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_timeout_of_forever_is_no_deadline) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_FOREVER);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_remaining(ctx), CTX_FOREVER);
    ctx_end(ctx);
}

/* == descriptions ================================================================================================ */

TEST(an_empty_description_is_a_plain_child) {
    ctx_desc_t empty = desc_of_nothing();
    for (int i = 0; i < 2; i++) {
        ctx_t *parent = ctx_with_cancel(ctx_background());
        ctx_t *child = ctx_derive(parent, i ? &empty : NULL);
        EXPECT_EQ(ctx_err(child), 0);
        EXPECT_EQ(ctx_deadline(child), CTX_NO_DEADLINE);
        ctx_cancel(parent);
        EXPECT_EQ(ctx_err(child), CTX_CANCELED);
        ctx_end(child);
        ctx_end(parent);
    }
}

TEST(of_a_deadline_and_a_timeout_the_earlier_holds) {
    ctx_clock_fake(CTX_S(100));
    ctx_desc_t desc = desc_of_nothing();
    desc.deadline = CTX_S(105);
    desc.timeout = CTX_S(3);
    ctx_t *a = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_deadline(a), CTX_S(103));
    desc.timeout = CTX_S(7);
    ctx_t *b = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_deadline(b), CTX_S(105));
    desc.timeout = -1;
    ctx_t *c = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_err(c), CTX_DEADLINE_EXCEEDED);
    desc.timeout = CTX_S(7);
    desc.deadline = CTX_S(99);
    desc.deadline_cause = words[4];
    ctx_t *d = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_err(d), CTX_DEADLINE_EXCEEDED);
    EXPECT(cause_is(d, CTX_DEADLINE_EXCEEDED, words[4]));
    ctx_t *e = ctx_derive(a, &desc);
    EXPECT_EQ(ctx_err(a), 0);
    EXPECT_EQ(ctx_err(e), CTX_DEADLINE_EXCEEDED);
    ctx_clock_advance(CTX_S(4));
    EXPECT_EQ(ctx_err(a), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(b), 0);
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(ctx_err(b), CTX_DEADLINE_EXCEEDED);
    ctx_end(e);
    ctx_end(d);
    ctx_end(c);
    ctx_end(b);
    ctx_end(a);
    ctx_clock_real();
}

TEST(one_node_has_name_deadline_cause_and_value) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_clock_fake(0);
    ctx_desc_t desc = desc_named("fetch");
    desc.timeout = CTX_S(1);
    desc.deadline_cause = words[6];
    desc.key = &key;
    desc.value = &seven;
    ctx_t *ctx = ctx_derive(ctx_background(), &desc);
    seven = 8;
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT(strcmp(ctx_name(ctx), "fetch") == 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(1));
    EXPECT(ctx_value(ctx, &key) && *(const int *)ctx_value(ctx, &key) == 7);
    ctx_clock_advance(CTX_S(1));
    EXPECT(cause_is(ctx, CTX_DEADLINE_EXCEEDED, words[6]));
    ctx_end(ctx);
    ctx_clock_real();
}

TEST(a_name_is_inherited) {
    ctx_desc_t desc = desc_named("server");
    ctx_t *named = ctx_derive(ctx_background(), &desc);
    ctx_t *child = ctx_with_cancel(named);
    ctx_t *detached = ctx_without_cancel(child);
    ctx_t *merged = ctx_merge(child, ctx_background());
    desc.name = "request";
    ctx_t *renamed = ctx_derive(child, &desc);
    EXPECT(strcmp(ctx_name(child), "server") == 0);
    EXPECT(strcmp(ctx_name(merged), "server") == 0);
    EXPECT(strcmp(ctx_name(renamed), "request") == 0);
    ctx_end(renamed);
    ctx_end(merged);
    ctx_end(child);
    ctx_end(named);
    EXPECT(strcmp(ctx_name(detached), "server") == 0);
    ctx_end(detached);
}

TEST(a_context_knows_the_line_that_made_it) {
    ctx_t *made[8];
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_t *root = ctx_background();
    int line = __LINE__ + 1;
    made[0] = ctx_with_cancel(root);
    made[1] = ctx_with_deadline(root, CTX_NO_DEADLINE);
    made[2] = ctx_with_timeout(root, CTX_S(5));
    made[3] = ctx_with_value(root, &key, &seven);
    made[4] = ctx_without_cancel(root);
    made[5] = ctx_merge(root, root);
    made[6] = ctx_derive(root, NULL);
    made[7] = ctx_with_cancel_at(root, __FILE__ ":1");
    for (int i = 0; i < 8; i++) {
        char expected[300];
        snprintf(expected, sizeof expected, "%s:%d", __FILE__, i == 7 ? 1 : line + i);
#ifdef CTXCANCEL_NO_SITES
        expected[0] = '\0';
#endif
        EXPECT(strcmp(ctx_site(made[i]), expected) == 0);
        ctx_end(made[i]);
    }
}

TEST(the_derivers_are_functions_by_their_at_names) {
    ctx_t *(*cancel)(ctx_t *, const char *) = ctx_with_cancel_at;
    ctx_t *(*timeout)(ctx_t *, ctx_dur_t, const char *) = ctx_with_timeout_at;
    ctx_t *(*deadline)(ctx_t *, ctx_time_t, const char *) = ctx_with_deadline_at;
    ctx_t *(*value)(ctx_t *, const ctx_key_t *, const void *, const char *) = ctx_with_value_at;
    ctx_t *(*derive)(ctx_t *, const ctx_desc_t *, const char *) = ctx_derive_at;
    ctx_t *(*without)(ctx_t *, const char *) = ctx_without_cancel_at;
    ctx_t *(*merge)(ctx_t *, ctx_t *, const char *) = ctx_merge_at;
    CHECK(cancel && timeout && deadline && value && derive && without && merge);
    ctx_t *a = cancel(ctx_background(), NULL); /* a maker without a site */
    EXPECT(ctx_site(a) != NULL);
    ctx_t *b = merge(a, ctx_background(), NULL);
    EXPECT_EQ(ctx_err(b), 0);
    ctx_end(b);
    ctx_end(a);
}

/* == detaching =================================================================================================== */

TEST(a_detached_context_keeps_values_and_nothing_else) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_clock_fake(0);
    ctx_t *top = ctx_with_timeout(ctx_background(), CTX_S(1));
    ctx_t *parent = ctx_with_value(top, &key, &seven);
    ctx_t *detached = ctx_without_cancel(parent);
    ctx_t *below = ctx_with_cancel(detached);
    EXPECT_EQ(ctx_deadline(detached), CTX_NO_DEADLINE);
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(parent), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(detached), 0);
    EXPECT_EQ(ctx_err(below), 0);
    ctx_t *second = ctx_without_cancel(parent); /* of one that is done already */
    EXPECT_EQ(ctx_err(second), 0);
    ctx_end(parent);
    ctx_end(top);
    EXPECT(ctx_value(below, &key) && *(const int *)ctx_value(below, &key) == 7);
    EXPECT(ctx_value(second, &key) && *(const int *)ctx_value(second, &key) == 7);
    EXPECT(ctx_cancel(detached));
    EXPECT_EQ(ctx_err(below), CTX_CANCELED);
    EXPECT_EQ(ctx_err(second), 0);
    ctx_end(second);
    ctx_end(below);
    ctx_end(detached);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_description_may_detach_and_have_a_deadline_and_a_value_of_its_own) {
    static const ctx_key_t old_key = CTX_KEY(int), new_key = CTX_KEY(int);
    int seven = 7, eight = 8;
    ctx_clock_fake(0);
    ctx_t *parent = ctx_with_value(ctx_background(), &old_key, &seven);
    ctx_t *hurried = ctx_with_timeout(parent, CTX_S(1));
    ctx_desc_t desc = desc_named("audit");
    desc.detach = true;
    desc.timeout = CTX_S(5);
    desc.deadline_cause = words[7];
    desc.key = &new_key;
    desc.value = &eight;
    ctx_t *ctx = ctx_derive(hurried, &desc);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(5));
    EXPECT(ctx_cancel(hurried));
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(hurried);
    ctx_end(parent);
    EXPECT(strcmp(ctx_name(ctx), "audit") == 0);
    EXPECT(ctx_value(ctx, &old_key) && *(const int *)ctx_value(ctx, &old_key) == 7);
    EXPECT(ctx_value(ctx, &new_key) && *(const int *)ctx_value(ctx, &new_key) == 8);
    ctx_clock_advance(CTX_S(5));
    EXPECT(cause_is(ctx, CTX_DEADLINE_EXCEEDED, words[7]));
    ctx_end(ctx);
    desc.timeout = -1;
    ctx = ctx_derive(ctx_background(), &desc);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(detaching_drops_the_memory_of_the_ancestors) {
    static const ctx_key_t key = CTX_KEY(int);
    enum { DEPTH = 1000 };
    int seven = 7;
    ctx_t *chain[DEPTH];
    chain[0] = ctx_with_value(ctx_background(), &key, &seven);
    for (int i = 1; i < DEPTH; i++)
        chain[i] = i % 2 ? ctx_with_cancel(chain[i - 1]) : ctx_with_timeout(chain[i - 1], CTX_S(5000 - i));
    ctx_t *detached = ctx_without_cancel(chain[DEPTH - 1]);
    long with_chain = settled_blocks();
    for (int i = 0; i < DEPTH; i++) ctx_end(chain[i]);
    long alone = settled_blocks();
    EXPECT(alone < with_chain || !blocks_counted());
    EXPECT(alone <= 4); /* the node, its value record and room for how these are packed; not a thousand */
    EXPECT(ctx_value(detached, &key) && *(const int *)ctx_value(detached, &key) == 7);
    ctx_end(detached);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == references ================================================================================================== */

TEST(release_does_not_cancel_and_end_does) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_with_cancel(parent);
    ctx_release(parent);
    EXPECT_EQ(ctx_err(child), 0);
    ctx_end(child);

    parent = ctx_with_cancel(ctx_background());
    child = ctx_with_cancel(parent);
    ctx_end(parent);
    EXPECT_EQ(ctx_err(child), CTX_CANCELED);
    ctx_end(child);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(descendants_of_a_released_context_are_canceled_from_above) {
    enum { DEPTH = 1000 };
    ctx_t *top = ctx_with_cancel(ctx_background());
    ctx_t *bottom = ctx_retain(top);
    for (int i = 0; i < DEPTH; i++) { /* each but the last is held by its child alone */
        ctx_t *next = ctx_with_cancel(bottom);
        ctx_release(bottom);
        bottom = next;
    }
    EXPECT_EQ(ctx_err(bottom), 0);
    EXPECT(ctx_cancel_cause(top, -EIO, words[1]));
    EXPECT(cause_is(bottom, -EIO, words[1]));
    ctx_end(top);
    EXPECT(cause_is(bottom, -EIO, words[1]));
    ctx_release(bottom);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_released_context_still_ends_its_descendants_at_its_deadline) {
    ctx_clock_fake(0);
    ctx_t *hurried = ctx_with_timeout(ctx_background(), CTX_S(1));
    ctx_t *child = ctx_with_cancel(hurried);
    ctx_release(hurried);
    EXPECT_EQ(ctx_deadline(child), CTX_S(1));
    ctx_clock_advance(CTX_S(1));
    EXPECT_EQ(ctx_err(child), CTX_DEADLINE_EXCEEDED);
    ctx_end(child);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(children_keep_what_they_need_of_their_parents) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_desc_t desc = desc_named("named above");
    desc.timeout = CTX_S(500);
    desc.key = &key;
    desc.value = &seven;
    for (int end = 0; end < 2; end++) {
        ctx_t *parent = ctx_derive(ctx_background(), &desc);
        ctx_t *middle = ctx_with_cancel(parent);
        ctx_t *child = ctx_with_cancel(middle);
        ctx_time_t deadline = ctx_deadline(parent);
        if (end) {
            ctx_cancel_cause(parent, -EIO, words[4]);
            ctx_end(parent);
            ctx_end(middle);
        } else {
            ctx_release(parent);
            ctx_release(middle);
        }
        EXPECT_EQ(ctx_err(child), end ? CTX_CANCELED : 0);
        EXPECT(cause_is(child, end ? -EIO : 0, end ? words[4] : NULL));
        EXPECT_EQ(ctx_deadline(child), deadline);
        EXPECT(strcmp(ctx_name(child), "named above") == 0);
        EXPECT(ctx_value(child, &key) && *(const int *)ctx_value(child, &key) == 7);
        ctx_t *born = ctx_with_cancel(child);
        EXPECT_EQ(ctx_err(born), ctx_err(child));
        ctx_end(born);
        ctx_end(child);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_retained_context_is_whole_after_its_end) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_desc_t desc = desc_named("kept");
    desc.key = &key;
    desc.value = &seven;
    desc.timeout = CTX_S(100);
    ctx_t *ctx = ctx_derive(ctx_background(), &desc);
    EXPECT(ctx_retain(ctx) == ctx);
    EXPECT(ctx_retain(ctx) == ctx);
    ctx_time_t deadline = ctx_deadline(ctx);
    ctx_end(ctx);
    ctx_end(ctx); /* an end for each reference is no error */
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(ctx).code, CTX_CANCELED);
    EXPECT_EQ(ctx_deadline(ctx), deadline);
    EXPECT(strcmp(ctx_name(ctx), "kept") == 0);
    EXPECT(ctx_site(ctx) != NULL);
    EXPECT(ctx_value(ctx, &key) && *(const int *)ctx_value(ctx, &key) == 7);
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_CANCELED);
    ctx_t *child = ctx_with_cancel(ctx);
    EXPECT_EQ(ctx_err(child), CTX_CANCELED);
    ctx_end(child);
    ctx_release(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(the_last_release_leaves_tree_and_wheel) {
    ctx_clock_fake(0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 1000; i++) {
        ctx_release(ctx_with_cancel(parent));
        ctx_release(ctx_with_timeout(parent, CTX_S(1) + i));
    }
    long before = settled_blocks();
    EXPECT(before <= 2);
    ctx_clock_advance(CTX_S(10)); /* a timer left behind would fire into freed memory */
    EXPECT(ctx_cancel(parent));
    ctx_end(parent);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(ends_in_any_order_free_everything) {
    uint64_t seed = 5;
    static tree_t tree;
    for (int round = 0; round < test_scale(300); round++) {
        tree_grow(&tree, 100, ctx_background(), &seed);
        for (int i = 99; i > 0; i--) { /* shuffle */
            int j = race_below(&seed, i + 1);
            ctx_t *moved = tree.nodes[i];
            tree.nodes[i] = tree.nodes[j];
            tree.nodes[j] = moved;
        }
        for (int i = 0; i < 100; i++) {
            if (race_below(&seed, 2))
                ctx_end(tree.nodes[i]);
            else
                ctx_release(tree.nodes[i]);
        }
    }
    EXPECT_EQ(settled_blocks(), 0);
}

typedef struct {
    start_line_t barrier;
    ctx_t *ctx;
    int rounds;
} refs_t;

static void *drop_a_reference(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    refs_t *refs = (refs_t *)side->shared;
    for (int round = 0; round < refs->rounds; round++) {
        if (side->id == 0) {
            refs->ctx = ctx_with_timeout(ctx_background(), CTX_S(100));
            for (int i = 1; i < refs->barrier.runners; i++) ctx_retain(refs->ctx);
        }
        start_line(&refs->barrier);
        ctx_t *mine = refs->ctx;
        ctx_t *child = ctx_with_cancel(mine);
        if ((round + side->id) % 3 == 0)
            ctx_release(mine);
        else
            ctx_end(mine);
        ctx_end(child);
        start_line(&refs->barrier);
    }
    return NULL;
}

TEST(the_last_of_several_threads_to_drop_a_reference_frees_it) {
    refs_t refs;
    memset(&refs, 0, sizeof refs);
    start_line_init(&refs.barrier, 4);
    refs.rounds = test_scale(6000);
    race_run(4, drop_a_reference, &refs);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == failed contexts ============================================================================================= */

static void check_failed(ctx_t *ctx) {
    EXPECT(ctx != NULL);
    if (!ctx) return;
    EXPECT_EQ(ctx_err(ctx), CTX_INVALID);
    EXPECT_EQ(ctx_cause(ctx).code, CTX_INVALID);
    EXPECT(ctx_cause(ctx).what != NULL);
    EXPECT(ctx_name(ctx) != NULL);
    EXPECT(ctx_site(ctx) != NULL);
    EXPECT(!ctx_cancel(ctx));
    EXPECT_EQ(ctx_err(ctx), CTX_INVALID);
    EXPECT(ctx_remaining(ctx) >= 0);
    EXPECT_EQ(ctx_wait(ctx, CTX_FOREVER), CTX_INVALID);
    EXPECT_EQ(ctx_sleep(ctx, CTX_S(100)), CTX_INVALID);
    seen_t seen = seen_of(ctx);
    ctx_on_done_t reg;
    EXPECT(!ctx_on_done(&reg, ctx, see, &seen));
    EXPECT_EQ(ran(&seen), 1);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_leaf_t leaf;
    ctx_leaf_init(&leaf, ctx, CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_INVALID);
    struct pollfd fd;
    fd.fd = ctx_done_fd(ctx);
    fd.events = POLLIN;
    EXPECT(fd.fd >= 0 && poll(&fd, 1, 0) == 1);
    ctx_t *child = ctx_with_timeout(ctx, CTX_S(5));
    ctx_t *merged = ctx_merge(ctx_background(), ctx);
    ctx_t *detached = ctx_without_cancel(ctx);
    EXPECT_EQ(ctx_err(child), CTX_INVALID);
    EXPECT_EQ(ctx_err(merged), CTX_INVALID);
    EXPECT(detached != NULL);
    ctx_end(detached);
    ctx_end(merged);
    ctx_end(child);
    EXPECT(ctx_retain(ctx) == ctx);
    ctx_release(ctx);
    ctx_end(ctx);
}

TEST(a_null_parent_gives_a_failed_context_that_is_safe_to_use) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    for (int i = 0; i < 3; i++) { /* it is shared: using it up is not possible */
        check_failed(ctx_derive(NULL, NULL));
        check_failed(ctx_with_cancel(NULL));
        check_failed(ctx_with_deadline(NULL, CTX_NO_DEADLINE));
        check_failed(ctx_with_timeout(NULL, CTX_S(1)));
        check_failed(ctx_with_value(NULL, &key, &seven));
        check_failed(ctx_without_cancel(NULL));
        check_failed(ctx_merge(NULL, NULL));
        check_failed(ctx_merge(ctx_background(), NULL));
        check_failed(ctx_merge(NULL, ctx_background()));
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_key_without_a_value_gives_a_failed_context) {
    static const ctx_key_t key = CTX_KEY(int);
    int seven = 7;
    ctx_desc_t desc = desc_of_nothing();
    desc.key = &key;
    check_failed(ctx_with_value(ctx_background(), &key, NULL));
    check_failed(ctx_derive(ctx_background(), &desc));
    check_failed(ctx_with_value(ctx_background(), NULL, &seven));
    EXPECT_EQ(settled_blocks(), 0);
}

/* == after-callbacks ============================================================================================= */

TEST(a_callback_runs_once_on_the_canceling_thread) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    seen_t seen = seen_of(ctx);
    ctx_on_done_t reg;
    memset(&reg, 0xa5, sizeof reg); /* it need not be initialised */
    EXPECT(ctx_on_done(&reg, ctx, see, &seen));
    EXPECT_EQ(ran(&seen), 0);
    EXPECT(ctx_cancel_cause(ctx, -EIO, words[1]));
    EXPECT_EQ(ran(&seen), 1);
    EXPECT(pthread_equal(seen.thread, pthread_self()));
    EXPECT_EQ(seen.err, CTX_CANCELED);
    EXPECT(seen.cause.code == -EIO && seen.cause.what == words[1]);
    EXPECT(!ctx_cancel(ctx));
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
    EXPECT_EQ(ran(&seen), 1);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_callback_on_a_done_context_runs_at_once_in_the_caller) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_cancel(ctx);
    seen_t seen = seen_of(ctx);
    ctx_on_done_t reg;
    memset(&reg, 0xa5, sizeof reg);
    EXPECT(!ctx_on_done(&reg, ctx, see, &seen));
    EXPECT_EQ(ran(&seen), 1);
    EXPECT(pthread_equal(seen.thread, pthread_self()));
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
    EXPECT_EQ(ran(&seen), 1);
}

TEST(callbacks_of_all_descendants_have_run_when_cancel_returns) {
    uint64_t seed = 3;
    static tree_t tree;
    static ctx_on_done_t regs[TREE_MOST];
    int ran_in_all = 0;
    tree_grow(&tree, TREE_MOST, ctx_background(), &seed);
    for (int i = 0; i < TREE_MOST; i++) EXPECT(ctx_on_done(&regs[i], tree.nodes[i], count, &ran_in_all));
    EXPECT(ctx_cancel(tree.nodes[0]));
    EXPECT_EQ(ran_in_all, TREE_MOST);
    tree_end(&tree);
    EXPECT_EQ(ran_in_all, TREE_MOST);
}

TEST(ending_runs_callbacks_and_releasing_does_not) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *ended = ctx_with_cancel(parent);
    ctx_t *released = ctx_with_cancel(parent);
    int of_ended = 0, of_released = 0;
    ctx_on_done_t a, b;
    EXPECT(ctx_on_done(&a, ended, count, &of_ended));
    EXPECT(ctx_on_done(&b, released, count, &of_released));
    ctx_end(ended);
    ctx_release(released);
    EXPECT_EQ(of_ended, 1);
    EXPECT_EQ(of_released, 0);
    EXPECT(ctx_cancel(parent)); /* the registration holds the released one in the tree */
    EXPECT_EQ(of_released, 1);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_hundred_thousand_callbacks_on_one_context_run_once_each) {
    int n = test_scale(100000), wrong = 0;
    ctx_on_done_t *regs = (ctx_on_done_t *)malloc((size_t)n * sizeof *regs);
    int *runs = (int *)calloc((size_t)n, sizeof *runs);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    for (int i = 0; i < n; i++) wrong += !ctx_on_done(&regs[i], ctx, count, &runs[i]);
    for (int i = 0; i < n; i += 3) wrong += !ctx_on_done_stop(&regs[i]);
    ctx_cancel(ctx);
    for (int i = 0; i < n; i++) wrong += runs[i] != (i % 3 != 0);
    for (int i = 0; i < n; i++) wrong += i % 3 != 0 && ctx_on_done_stop(&regs[i]);
    EXPECT_EQ(wrong, 0);
    ctx_end(ctx);
    free(runs);
    free(regs);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_stopped_callback_never_runs) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    int runs = 0;
    ctx_on_done_t reg;
    EXPECT(ctx_on_done(&reg, ctx, count, &runs));
    EXPECT(ctx_on_done_stop(&reg));
    ctx_end(ctx);
    EXPECT_EQ(runs, 0);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(stopping_a_zeroed_registration_is_true) {
    ctx_on_done_t reg;
    memset(&reg, 0, sizeof reg);
    EXPECT(ctx_on_done_stop(&reg));
    EXPECT(ctx_on_done_stop(&reg));
}

TEST(a_registration_may_be_used_again) {
    ctx_on_done_t reg;
    int runs = 0;
    for (int i = 0; i < 1000; i++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        EXPECT(ctx_on_done(&reg, ctx, count, &runs));
        if (i % 2) EXPECT(ctx_on_done_stop(&reg));
        EXPECT(i % 2 == 0 || ctx_on_done(&reg, ctx, count, &runs));
        ctx_cancel(ctx);
        EXPECT_EQ(runs, 2 * i + 1);
        EXPECT(!ctx_on_done(&reg, ctx, count, &runs)); /* at once */
        EXPECT_EQ(runs, 2 * i + 2);
        ctx_end(ctx);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_registration_holds_its_context) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *ctx = ctx_with_cancel(parent);
    seen_t seen = seen_of(ctx);
    ctx_on_done_t reg;
    EXPECT(ctx_on_done(&reg, ctx, see, &seen));
    ctx_release(ctx); /* the last reference but the registration's */
    EXPECT(ctx_cancel_cause(parent, -EIO, words[2]));
    EXPECT_EQ(ran(&seen), 1);
    EXPECT(seen.cause.code == -EIO && seen.cause.what == words[2]);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);

    ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&reg, ctx, see, &seen));
    ctx_release(ctx);
    EXPECT(ctx_on_done_stop(&reg));
    EXPECT_EQ(settled_blocks(), 0);
}

/* -- what a callback may do ------------------------------------------------------------------------------------ */

typedef struct {
    ctx_t *parent, *self, *sibling;
    ctx_on_done_t reg, pending, at_once;
    seen_t seen;
    int steps, pending_runs, at_once_runs, reused_runs;
} busy_t;

static void do_everything(void *arg) {
    busy_t *busy = (busy_t *)arg;
    EXPECT_EQ(ctx_err(busy->self), CTX_CANCELED);
    EXPECT(!ctx_cancel(busy->self));
    ctx_t *born = ctx_with_timeout(busy->self, CTX_S(5));
    EXPECT_EQ(ctx_err(born), CTX_CANCELED);
    ctx_end(born);
    ctx_t *merged = ctx_merge(busy->sibling, busy->self);
    EXPECT_EQ(ctx_err(merged), CTX_CANCELED);
    ctx_end(merged);
    ctx_t *detached = ctx_without_cancel(busy->self);
    EXPECT_EQ(ctx_err(detached), 0);
    ctx_end(detached);
    EXPECT_EQ(ctx_wait(busy->self, CTX_FOREVER), CTX_CANCELED);
    EXPECT(ctx_done_fd(busy->self) >= 0);
    EXPECT(!ctx_on_done_stop(&busy->reg));                                        /* from inside it */
    EXPECT(ctx_on_done_stop(&busy->pending));                                     /* another's */
    EXPECT(!ctx_on_done(&busy->at_once, busy->self, count, &busy->at_once_runs)); /* on itself */
    EXPECT_EQ(busy->at_once_runs, 1);
    EXPECT(ctx_on_done(&busy->reg, busy->sibling, count, &busy->reused_runs)); /* its own, again */
    EXPECT(ctx_cancel(busy->sibling));
    EXPECT_EQ(busy->reused_runs, 1);
    EXPECT(ctx_cancel(busy->parent));
    ctx_end(busy->self);
    busy->steps++;
}

TEST(a_callback_may_call_anything) {
    busy_t busy;
    memset(&busy, 0, sizeof busy);
    busy.parent = ctx_with_cancel(ctx_background());
    busy.self = ctx_with_cancel(busy.parent);
    busy.sibling = ctx_with_cancel(busy.parent);
    EXPECT(ctx_on_done(&busy.reg, busy.self, do_everything, &busy));
    EXPECT(ctx_on_done(&busy.pending, busy.sibling, count, &busy.pending_runs));
    EXPECT(ctx_cancel(busy.self)); /* ended by its own callback on the way */
    EXPECT_EQ(busy.steps, 1);
    EXPECT_EQ(busy.pending_runs, 0);
    EXPECT_EQ(busy.reused_runs, 1);
    ctx_end(busy.sibling);
    ctx_end(busy.parent);
    EXPECT_EQ(settled_blocks(), 0);
}

static void end_it(void *arg) { ctx_end((ctx_t *)arg); }

TEST(a_callback_may_end_the_context_that_is_being_canceled) {
    for (int how = 0; how < 3; how++) {
        ctx_t *parent = ctx_with_cancel(ctx_background());
        ctx_t *ctx = ctx_with_cancel(parent);
        ctx_t *below = ctx_with_cancel(ctx);
        ctx_on_done_t on_self, on_below;
        seen_t seen = seen_of(below);
        EXPECT(ctx_on_done(&on_self, ctx, end_it, ctx));
        EXPECT(ctx_on_done(&on_below, below, see, &seen));
        if (how == 0) EXPECT(ctx_cancel(ctx));
        if (how == 1) EXPECT(ctx_cancel(parent));
        if (how == 2) ctx_end(ctx_retain(ctx));
        EXPECT_EQ(ran(&seen), 1);
        ctx_end(below);
        ctx_end(parent);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

enum { RING = 100 };

typedef struct {
    ctx_t *ctx;
    ctx_on_done_t reg;
    struct ring *ring;
    int at, runs;
} ring_node_t;

typedef struct ring {
    ring_node_t nodes[RING];
    ctx_t *parent;
    int step;
} ring_t;

/* Ends a neighbour, which the cascade that runs this may not have reached yet, may be at, or may have left. */
static void end_a_neighbour(void *arg) {
    ring_node_t *node = (ring_node_t *)arg;
    ring_t *ring = node->ring;
    node->runs++;
    ctx_end(ring->nodes[(node->at + ring->step + RING) % RING].ctx);
    if (node->at == RING / 2) ctx_end(ring->parent);
}

TEST(callbacks_may_end_siblings_and_the_parent_during_the_cascade) {
    static ring_t ring;
    for (int step = -3; step <= 3; step++) {
        memset(&ring, 0, sizeof ring);
        ring.step = step;
        ring.parent = ctx_with_cancel(ctx_background());
        for (int i = 0; i < RING; i++) {
            ring.nodes[i].ring = &ring;
            ring.nodes[i].at = i;
            ring.nodes[i].ctx = ctx_with_cancel(ring.parent);
        }
        for (int i = 0; i < RING; i++)
            EXPECT(ctx_on_done(&ring.nodes[i].reg, ring.nodes[i].ctx, end_a_neighbour, &ring.nodes[i]));
        EXPECT(ctx_cancel(ring.parent));
        for (int i = 0; i < RING; i++) EXPECT_EQ(ring.nodes[i].runs, 1);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

typedef struct {
    ctx_on_done_t reg;
    int *runs;
    char padding[64];
} freed_t;

static void free_own_memory(void *arg) {
    freed_t *own = (freed_t *)arg;
    ++*own->runs;
    memset(own, 0x5a, sizeof *own);
    free(own);
}

TEST(a_callback_may_free_the_memory_of_its_own_registration) {
    int runs = 0;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 100; i++) {
        freed_t *own = (freed_t *)malloc(sizeof *own);
        own->runs = &runs;
        EXPECT(ctx_on_done(&own->reg, ctx, free_own_memory, own));
    }
    EXPECT(ctx_cancel(ctx));
    EXPECT_EQ(runs, 100);
    freed_t *own = (freed_t *)malloc(sizeof *own);
    own->runs = &runs;
    EXPECT(!ctx_on_done(&own->reg, ctx, free_own_memory, own));
    EXPECT_EQ(runs, 101);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

typedef struct {
    ctx_on_done_t regs[10];
    int runs, stopped, refused;
} rivals_t;

static void stop_all_rivals(void *arg) {
    rivals_t *rivals = (rivals_t *)arg;
    rivals->runs++;
    for (int i = 0; i < 10; i++) {
        if (ctx_on_done_stop(&rivals->regs[i]))
            rivals->stopped++;
        else
            rivals->refused++;
    }
}

TEST(a_callback_may_stop_those_that_have_not_run_yet) {
    rivals_t rivals;
    memset(&rivals, 0, sizeof rivals);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_with_cancel(parent);
    for (int i = 0; i < 10; i++) EXPECT(ctx_on_done(&rivals.regs[i], i % 2 ? parent : child, stop_all_rivals, &rivals));
    EXPECT(ctx_cancel(parent));
    EXPECT_EQ(rivals.runs, 1); /* a stop that said true while it ran later, or false while it never ran, shows here */
    EXPECT_EQ(rivals.stopped, 9);
    EXPECT_EQ(rivals.refused, 1);
    ctx_end(child);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

typedef struct {
    ctx_t *ctx;
    ctx_on_done_t regs[3];
    int depth;
} nest_t;

static void register_more(void *arg) {
    nest_t *nest = (nest_t *)arg;
    if (++nest->depth == 1000) return;
    EXPECT(!ctx_on_done(&nest->regs[nest->depth % 3], nest->ctx, register_more, nest));
}

TEST(a_callback_may_register_on_the_context_that_it_is_called_for) {
    nest_t nest;
    memset(&nest, 0, sizeof nest);
    nest.ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&nest.regs[0], nest.ctx, register_more, &nest));
    EXPECT(ctx_cancel(nest.ctx));
    EXPECT_EQ(nest.depth, 1000);
    ctx_end(nest.ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_deadline_callback_runs_on_another_thread) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(20));
    seen_t seen = seen_of(ctx);
    ctx_on_done_t reg;
    if (ctx_on_done(&reg, ctx, see, &seen)) { /* false if this thread slept through the deadline */
        int turns = 0;
        while (!ran(&seen)) race_pause(&turns);
        EXPECT(!pthread_equal(seen.thread, pthread_self()));
    }
    EXPECT_EQ(seen.err, CTX_DEADLINE_EXCEEDED);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
}

/* -- stop against fire ----------------------------------------------------------------------------------------- */

typedef struct {
    ctx_t *ctx;
    ctx_on_done_t reg;
    int entered, stopping, left; /* [atomic] */
    pthread_t owner;             /* on this thread the callback must not wait for what this thread will do */
} slow_t;

static void run_slowly(void *arg) {
    slow_t *slow = (slow_t *)arg;
    if (pthread_equal(slow->owner, pthread_self())) return;
    store(&slow->entered, 1);
    race_await(&slow->stopping, 1);
    int64_t until = test_now_ns() + 500000; /* time in which a stop that does not wait comes back */
    while (test_now_ns() < until) sched_yield();
    store(&slow->left, 1);
}

static void *cancel_slow(void *arg) {
    ctx_cancel(((slow_t *)arg)->ctx);
    return NULL;
}

static void *wait_slow(void *arg) {
    EXPECT_EQ(ctx_wait(((slow_t *)arg)->ctx, CTX_FOREVER), CTX_DEADLINE_EXCEEDED);
    return NULL;
}

TEST(stop_waits_for_a_callback_that_runs_on_another_thread) {
    for (int i = 0, n = test_scale(500); i < n; i++) {
        slow_t slow;
        memset(&slow, 0, sizeof slow);
        slow.ctx = ctx_with_cancel(ctx_background());
        EXPECT(ctx_on_done(&slow.reg, slow.ctx, run_slowly, &slow));
        pthread_t thread = thread_start(cancel_slow, &slow);
        race_await(&slow.entered, 1);
        store(&slow.stopping, 1);
        bool stopped = ctx_on_done_stop(&slow.reg);
        EXPECT_EQ(load(&slow.left), 1);
        EXPECT(!stopped);
        memset(&slow.reg, 0xa5, sizeof slow.reg); /* ours again */
        pthread_join(thread, NULL);
        ctx_end(slow.ctx);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_losing_cancel_need_not_wait_but_its_context_is_done) {
    slow_t slow;
    memset(&slow, 0, sizeof slow);
    slow.ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&slow.reg, slow.ctx, run_slowly, &slow));
    pthread_t thread = thread_start(cancel_slow, &slow);
    race_await(&slow.entered, 1);
    EXPECT(!ctx_cancel(slow.ctx)); /* returns although the callback runs until the next line */
    store(&slow.stopping, 1);
    EXPECT_EQ(ctx_err(slow.ctx), CTX_CANCELED);
    pthread_join(thread, NULL);
    ctx_end(slow.ctx);
}

/* While a callback of a child runs elsewhere, canceling the parent is complete for everybody else. */
TEST(a_cancel_is_complete_past_a_descendant_whose_callback_runs_elsewhere) {
    slow_t slow;
    memset(&slow, 0, sizeof slow);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *before = ctx_with_cancel(parent);
    slow.ctx = ctx_with_cancel(parent);
    ctx_t *after = ctx_with_cancel(parent);
    ctx_t *below = ctx_with_cancel(slow.ctx);
    int runs = 0;
    ctx_on_done_t reg_before, reg_after;
    EXPECT(ctx_on_done(&slow.reg, slow.ctx, run_slowly, &slow));
    EXPECT(ctx_on_done(&reg_before, before, count, &runs));
    EXPECT(ctx_on_done(&reg_after, after, count, &runs));
    pthread_t thread = thread_start(cancel_slow, &slow);
    race_await(&slow.entered, 1);
    EXPECT(ctx_cancel(parent));
    EXPECT_EQ(ctx_err(before), CTX_CANCELED);
    EXPECT_EQ(ctx_err(after), CTX_CANCELED);
    EXPECT_EQ(ctx_err(below), CTX_CANCELED);
    EXPECT_EQ(runs, 2);
    store(&slow.stopping, 1);
    pthread_join(thread, NULL);
    ctx_end(below);
    ctx_end(after);
    ctx_end(before);
    ctx_end(slow.ctx);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

/* While the callback runs, on this thread's behalf or the runtime's, everybody else does what they like. */
static void use_around(ctx_t *parent, ctx_t *ctx) {
    int runs = 0;
    ctx_on_done_t reg;
    for (int i = 0; i < 20; i++) {
        ctx_t *below = ctx_with_timeout(ctx, CTX_S(5));
        EXPECT(ctx_err(below) != 0);
        ctx_end(below);
        ctx_t *sibling = ctx_with_timeout(parent, CTX_S(5) + i);
        EXPECT_EQ(ctx_err(sibling), 0);
        EXPECT(ctx_on_done(&reg, sibling, count, &runs));
        ctx_end(sibling);
        EXPECT_EQ(runs, 2 * i + 1);
        EXPECT(!ctx_on_done(&reg, ctx, count, &runs));
        EXPECT(ctx_cause(ctx).code != 0);
        EXPECT(ctx_wait(ctx, CTX_FOREVER) != 0);
        ctx_t *merged = ctx_merge(parent, ctx);
        EXPECT(ctx_err(merged) != 0);
        ctx_end(merged);
    }
}

TEST(a_running_callback_holds_up_nobody) {
    for (int by_deadline = 0; by_deadline < 2; by_deadline++) {
        slow_t slow;
        memset(&slow, 0, sizeof slow);
        ctx_t *parent = ctx_with_cancel(ctx_background());
        slow.ctx = ctx_with_timeout(parent, by_deadline ? CTX_MS(30) : CTX_S(500));
        slow.owner = pthread_self();
        if (!ctx_on_done(&slow.reg, slow.ctx, run_slowly, &slow)) { /* this thread slept through the deadline: again */
            ctx_end(slow.ctx);
            ctx_end(parent);
            by_deadline--;
            continue;
        }
        pthread_t thread = thread_start(by_deadline ? wait_slow : cancel_slow, &slow);
        race_await(&slow.entered, 1);
        use_around(parent, slow.ctx);
        store(&slow.stopping, 1);
        EXPECT(!ctx_on_done_stop(&slow.reg));
        thread_join(thread);
        ctx_end(slow.ctx);
        ctx_end(parent);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

typedef struct {
    start_line_t barrier;
    ctx_t *ctx;
    int rounds;
    int runs; /* plain: stop must order it */
    int cancel_parent;
} stop_race_t;

static void run_in_race(void *arg) { ++*(int *)arg; }

static void *cancel_in_race(void *arg) {
    stop_race_t *race = (stop_race_t *)arg;
    uint64_t seed = 1;
    for (int round = 0; round < race->rounds; round++) {
        start_line(&race->barrier);
        race_dither(race_random(&seed));
        ctx_cancel(race->ctx);
        start_line(&race->barrier);
    }
    return NULL;
}

TEST(stop_against_fire_a_hundred_thousand_times) {
    stop_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, 2);
    race.rounds = test_scale(100000);
    pthread_t thread = thread_start(cancel_in_race, &race);
    uint64_t seed = 2;
    int wrong = 0, stops = 0;
    for (int round = 0; round < race.rounds; round++) {
        ctx_on_done_t reg; /* on this stack frame, given up as soon as stop returns */
        race.ctx = ctx_with_cancel(ctx_background());
        ctx_t *below = round % 2 ? ctx_with_cancel(race.ctx) : ctx_retain(race.ctx);
        race.runs = 0;
        wrong += !ctx_on_done(&reg, below, run_in_race, &race.runs);
        start_line(&race.barrier);
        race_dither(race_random(&seed));
        bool stopped = ctx_on_done_stop(&reg);
        wrong += race.runs != (stopped ? 0 : 1);
        memset(&reg, 0xa5, sizeof reg);
        stops += stopped;
        start_line(&race.barrier);
        wrong += race.runs != (stopped ? 0 : 1); /* not after a true, not twice after a false */
        ctx_end(below);
        ctx_end(race.ctx);
    }
    pthread_join(thread, NULL);
    EXPECT_EQ(wrong, 0);
    printf("  stopped %d, ran %d\n", stops, race.rounds - stops);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(registering_against_cancel_runs_exactly_once) {
    stop_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, 2);
    race.rounds = test_scale(100000);
    pthread_t thread = thread_start(cancel_in_race, &race);
    uint64_t seed = 2;
    int wrong = 0;
    for (int round = 0; round < race.rounds; round++) {
        ctx_on_done_t reg;
        race.ctx = ctx_with_cancel(ctx_background());
        race.runs = 0;
        start_line(&race.barrier);
        race_dither(race_random(&seed));
        bool registered = ctx_on_done(&reg, race.ctx, run_in_race, &race.runs);
        if (!registered) wrong += race.runs != 1; /* it ran here, before the return */
        start_line(&race.barrier);
        wrong += race.runs != 1;
        wrong += ctx_on_done_stop(&reg);
        ctx_end(race.ctx);
    }
    pthread_join(thread, NULL);
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(settled_blocks(), 0);
}

typedef struct {
    start_line_t barrier;
    ctx_t *shared;
    int per_side;
    int runs;  /* [atomic] */
    int wrong; /* [atomic] */
} crowd_t;

static void *register_in_crowd(void *arg) {
    crowd_t *crowd = (crowd_t *)((race_side_t *)arg)->shared;
    enum { KEPT = 16 };
    ctx_on_done_t regs[KEPT];
    int wrong = 0;
    memset(regs, 0, sizeof regs);
    for (int i = 0; i < crowd->per_side; i++) {
        wrong += !ctx_on_done_stop(&regs[i % KEPT]);
        wrong += !ctx_on_done(&regs[i % KEPT], crowd->shared, count, &crowd->runs);
    }
    for (int i = crowd->per_side; i < KEPT; i++) wrong += !ctx_on_done(&regs[i], crowd->shared, count, &crowd->runs);
    start_line(&crowd->barrier);
    start_line(&crowd->barrier); /* canceled between */
    for (int i = 0; i < KEPT; i++) wrong += ctx_on_done_stop(&regs[i]);
    EXPECT_EQ(wrong, 0);
    return NULL;
}

static void *cancel_the_crowd(void *arg) {
    crowd_t *crowd = (crowd_t *)arg;
    start_line(&crowd->barrier);
    EXPECT_EQ(load(&crowd->runs), 0);
    EXPECT(ctx_cancel(crowd->shared));
    EXPECT_EQ(load(&crowd->runs), 8 * 16);
    start_line(&crowd->barrier);
    return NULL;
}

TEST(eight_threads_register_and_stop_on_one_context) {
    crowd_t crowd;
    memset(&crowd, 0, sizeof crowd);
    start_line_init(&crowd.barrier, 9);
    crowd.per_side = test_scale(50000);
    crowd.shared = ctx_with_cancel(ctx_background());
    pthread_t canceler = thread_start(cancel_the_crowd, &crowd);
    race_run(8, register_in_crowd, &crowd);
    pthread_join(canceler, NULL);
    ctx_end(crowd.shared);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == no recursion ================================================================================================ */

#ifdef TEST_SANITIZED
enum { MILLION = 200000 }; /* the sanitizers' own records of a million take gigabytes */
#else
enum { MILLION = 1000000 };
#endif

/* Run on a thread with 64 KB of stack, or the least that the system allows: a recursion of a few thousand frames would
   overflow it. */
static void on_small_stack(void *(*fn)(void *), void *arg) {
    pthread_attr_t attr;
    pthread_t thread;
    size_t size = 64 * 1024;
    if (size < (size_t)PTHREAD_STACK_MIN) size = (size_t)PTHREAD_STACK_MIN;
    pthread_attr_init(&attr);
    EXPECT_EQ(pthread_attr_setstacksize(&attr, size), 0);
    int rc = pthread_create(&thread, &attr, fn, arg);
    pthread_attr_destroy(&attr);
    EXPECT_EQ(rc, 0);
    if (rc == 0) pthread_join(thread, NULL);
}

static ctx_t **many(int n) {
    ctx_t **nodes = (ctx_t **)malloc((size_t)n * sizeof *nodes);
    if (!nodes) abort();
    return nodes;
}

static void *cancel_a_deep_chain(void *arg) {
    int n = test_scale(MILLION), wrong = 0;
    ctx_t **nodes = many(n);
    (void)arg;
    for (int way = 0; way < 2; way++) {
        for (int i = 0; i < n; i++) nodes[i] = ctx_with_cancel(i ? nodes[i - 1] : ctx_background());
        wrong += !ctx_cancel_cause(nodes[0], -EIO, words[1]);
        for (int i = 0; i < n; i++) wrong += !cause_is(nodes[i], -EIO, words[1]);
        for (int i = 0; i < n; i++) ctx_end(nodes[way ? i : n - 1 - i]);
    }
    EXPECT_EQ(wrong, 0);
    free(nodes);
    return NULL;
}

TEST(a_chain_a_million_deep_is_canceled_and_ended_on_a_small_stack) {
    on_small_stack(cancel_a_deep_chain, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

static void *free_a_deep_chain(void *arg) {
    static const ctx_key_t key = CTX_KEY(int);
    int n = test_scale(MILLION);
    (void)arg;
    for (int way = 0; way < 3; way++) {
        ctx_t *top = ctx_with_cancel(ctx_background());
        ctx_t *bottom = ctx_retain(top);
        int runs = 0;
        ctx_on_done_t reg;
        for (int i = 0; i < n; i++) {
            ctx_t *next = i % 1000 == 999 ? ctx_with_value(bottom, &key, &i) : ctx_with_cancel(bottom);
            ctx_release(bottom);
            bottom = next;
        }
        EXPECT(ctx_on_done(&reg, bottom, count, &runs));
        if (way == 0) ctx_release(bottom); /* nobody holds any but the top; the callback holds the bottom */
        ctx_end(top);                      /* cancels a million, and way 0 frees them */
        EXPECT_EQ(runs, 1);
        if (way == 1) ctx_end(bottom); /* frees a million */
        if (way == 2) ctx_release(bottom);
    }
    return NULL;
}

TEST(a_chain_a_million_deep_is_freed_by_its_last_reference_on_a_small_stack) {
    on_small_stack(free_a_deep_chain, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

static void *cancel_a_wide_family(void *arg) {
    int n = test_scale(MILLION), wrong = 0;
    ctx_t **nodes = many(n);
    (void)arg;
    ctx_t *parent = ctx_with_cancel(ctx_background());
    for (int i = 0; i < n; i++) nodes[i] = ctx_with_cancel(parent);
    wrong += !ctx_cancel_cause(parent, -EIO, words[1]);
    for (int i = 0; i < n; i++) wrong += !cause_is(nodes[i], -EIO, words[1]);
    ctx_end(parent);
    for (int i = 0; i < n; i++) ctx_end(nodes[i]);
    EXPECT_EQ(wrong, 0);
    free(nodes);
    return NULL;
}

TEST(a_million_children_are_canceled_and_ended_on_a_small_stack) {
    on_small_stack(cancel_a_wide_family, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

static void *cancel_deep_merges(void *arg) {
    int n = test_scale(MILLION / 4);
    ctx_t *other = ctx_with_cancel(ctx_background());
    (void)arg;
    for (int way = 0; way < 2; way++) { /* canceled from the top, or never canceled and freed from the bottom */
        ctx_t *top = ctx_with_cancel(ctx_background());
        ctx_t *bottom = ctx_retain(top);
        for (int i = 0; i < n; i++) {
            ctx_t *next = i % 2 ? ctx_merge(bottom, other) : ctx_merge(other, bottom);
            ctx_release(bottom);
            bottom = next;
        }
        EXPECT_EQ(ctx_err(bottom), 0);
        if (way == 0) {
            EXPECT(ctx_cancel_cause(top, -EIO, words[1]));
            EXPECT(cause_is(bottom, -EIO, words[1]));
        }
        ctx_release(bottom);
        ctx_release(top);
        EXPECT_EQ(ctx_err(other), 0);
    }
    ctx_end(other);
    return NULL;
}

TEST(a_chain_of_merges_is_canceled_and_freed_on_a_small_stack) {
    on_small_stack(cancel_deep_merges, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == merge ======================================================================================================= */

TEST(a_merge_is_done_when_either_is_with_the_cause_of_the_first) {
    for (int which = 0; which < 2; which++) {
        ctx_t *a = ctx_with_cancel(ctx_background());
        ctx_t *b = ctx_with_cancel(ctx_background());
        ctx_t *merged = ctx_merge(a, b);
        ctx_t *below = ctx_with_cancel(merged);
        EXPECT_EQ(ctx_err(merged), 0);
        EXPECT(ctx_cancel_cause(which ? b : a, -EIO, words[which]));
        EXPECT_EQ(ctx_err(merged), CTX_CANCELED);
        EXPECT(cause_is(merged, -EIO, words[which]));
        EXPECT(cause_is(below, -EIO, words[which]));
        EXPECT_EQ(ctx_err(which ? a : b), 0);
        EXPECT(ctx_cancel_cause(which ? a : b, -EPERM, "second"));
        EXPECT(cause_is(merged, -EIO, words[which]));
        ctx_end(below);
        ctx_end(merged);
        ctx_end(b);
        ctx_end(a);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

TEST(canceling_a_merge_touches_neither_side) {
    ctx_t *a = ctx_with_cancel(ctx_background());
    ctx_t *b = ctx_with_cancel(ctx_background());
    ctx_t *merged = ctx_merge(a, b);
    EXPECT(ctx_cancel(merged));
    EXPECT_EQ(ctx_err(a), 0);
    EXPECT_EQ(ctx_err(b), 0);
    ctx_end(merged);
    EXPECT_EQ(ctx_err(a), 0);
    EXPECT_EQ(ctx_err(b), 0);
    EXPECT(ctx_cancel(a));
    EXPECT(ctx_cancel(b));
    ctx_end(a);
    ctx_end(b);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_merge_has_the_values_of_a_and_the_earlier_deadline) {
    static const ctx_key_t key = CTX_KEY(int), only_b = CTX_KEY(int);
    int seven = 7, eight = 8;
    ctx_clock_fake(0);
    ctx_t *va = ctx_with_value(ctx_background(), &key, &seven);
    ctx_t *vb = ctx_with_value(ctx_background(), &key, &eight);
    ctx_t *vb2 = ctx_with_value(vb, &only_b, &eight);
    for (int which = 0; which < 2; which++) {
        ctx_time_t from = ctx_now();
        ctx_desc_t desc = desc_of_nothing();
        desc.timeout = CTX_S(which ? 9 : 5);
        desc.deadline_cause = words[0];
        ctx_t *a = ctx_derive(va, &desc);
        desc.timeout = CTX_S(which ? 5 : 9);
        desc.deadline_cause = words[1];
        ctx_t *b = ctx_derive(vb2, &desc);
        ctx_t *merged = ctx_merge(a, b);
        EXPECT(ctx_value(merged, &key) && *(const int *)ctx_value(merged, &key) == 7);
        EXPECT(ctx_value(merged, &only_b) == NULL);
        EXPECT_EQ(ctx_deadline(merged), from + CTX_S(5));
        EXPECT_EQ(ctx_remaining(merged), CTX_S(5));
        ctx_t *below = ctx_with_timeout(merged, CTX_S(7));
        EXPECT_EQ(ctx_deadline(below), from + CTX_S(5));
        ctx_clock_advance(CTX_S(5) - 1);
        EXPECT_EQ(ctx_err(merged), 0);
        ctx_clock_advance(1);
        EXPECT(cause_is(merged, CTX_DEADLINE_EXCEEDED, words[which]));
        EXPECT(cause_is(below, CTX_DEADLINE_EXCEEDED, words[which]));
        ctx_end(below);
        ctx_end(merged);
        ctx_end(b);
        ctx_end(a);
    }
    ctx_end(vb2);
    ctx_end(vb);
    ctx_end(va);
    ctx_clock_real();
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_merge_of_a_done_context_is_born_done) {
    for (int which = 0; which < 2; which++) {
        ctx_t *done = ctx_with_cancel(ctx_background());
        ctx_cancel_cause(done, -EIO, words[2]);
        ctx_t *live = ctx_with_cancel(ctx_background());
        ctx_t *merged = which ? ctx_merge(live, done) : ctx_merge(done, live);
        EXPECT(cause_is(merged, -EIO, words[2]));
        EXPECT_EQ(ctx_err(live), 0);
        ctx_end(merged);
        ctx_end(live);
        ctx_end(done);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_merge_may_join_relatives) {
    ctx_t *top = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_with_cancel(top);
    ctx_t *both[6];
    both[0] = ctx_merge(top, top);
    both[1] = ctx_merge(top, child);
    both[2] = ctx_merge(child, top);
    both[3] = ctx_merge(ctx_background(), top);
    both[4] = ctx_merge(top, ctx_background());
    both[5] = ctx_merge(ctx_background(), ctx_background());
    for (int i = 0; i < 6; i++) EXPECT_EQ(ctx_err(both[i]), 0);
    EXPECT(ctx_cancel(child));
    for (int i = 0; i < 6; i++) EXPECT_EQ(ctx_err(both[i]), i == 1 || i == 2 ? CTX_CANCELED : 0);
    EXPECT(ctx_cancel(top));
    for (int i = 0; i < 6; i++) EXPECT_EQ(ctx_err(both[i]), i < 5 ? CTX_CANCELED : 0);
    for (int i = 0; i < 6; i++) ctx_end(both[i]);
    ctx_end(child);
    ctx_end(top);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_merge_of_merges_is_done_when_any_of_them_is) {
    enum { N = 16 };
    for (int which = 0; which < N; which++) {
        ctx_t *sources[N], *level[N], *merges[N];
        int made = 0, width = N;
        for (int i = 0; i < N; i++) level[i] = sources[i] = ctx_with_cancel(ctx_background());
        for (; width > 1; width /= 2)
            for (int i = 0; i < width / 2; i++) merges[made++] = level[i] = ctx_merge(level[2 * i], level[2 * i + 1]);
        EXPECT_EQ(ctx_err(level[0]), 0);
        EXPECT(ctx_cancel_cause(sources[which], -EIO, words[1]));
        EXPECT(cause_is(level[0], -EIO, words[1]));
        for (int i = 0; i < N; i++) EXPECT_EQ(ctx_err(sources[i]), i == which ? CTX_CANCELED : 0);
        for (int i = 0; i < made; i++) ctx_end(merges[i]);
        for (int i = 0; i < N; i++) ctx_end(sources[i]);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(the_sides_of_a_merge_may_be_dropped_in_any_order) {
    for (int way = 0; way < 6; way++) {
        ctx_t *top_a = ctx_with_cancel(ctx_background());
        ctx_t *top_b = ctx_with_cancel(ctx_background());
        ctx_t *a = ctx_with_cancel(top_a);
        ctx_t *b = ctx_with_cancel(top_b);
        ctx_t *merged = ctx_merge(a, b);
        ctx_t *below = ctx_with_cancel(merged);
        switch (way) {
            case 0: /* ended: done */
                ctx_end(a);
                EXPECT_EQ(ctx_err(below), CTX_CANCELED);
                ctx_end(b);
                break;
            case 1:
                ctx_end(b);
                EXPECT_EQ(ctx_err(below), CTX_CANCELED);
                ctx_end(a);
                break;
            case 2: /* released: still reached from above */
            case 3:
                ctx_release(a);
                ctx_release(b);
                EXPECT_EQ(ctx_err(below), 0);
                EXPECT(ctx_cancel_cause(way == 2 ? top_a : top_b, -EIO, words[way]));
                EXPECT(cause_is(below, -EIO, words[way]));
                break;
            case 4: /* nothing is ever canceled */
                ctx_release(b);
                ctx_release(a);
                break;
            default: /* the merge goes first */
                ctx_release(below);
                ctx_release(merged);
                EXPECT_EQ(ctx_err(a), 0);
                EXPECT(ctx_cancel(b));
                ctx_end(b);
                ctx_end(a);
                below = merged = NULL;
        }
        ctx_release(below);
        ctx_release(merged);
        ctx_release(top_b);
        ctx_release(top_a);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

TEST(merges_under_a_long_lived_context_leave_nothing_behind) {
    ctx_t *server = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 1000; i++) {
        ctx_t *request = ctx_with_cancel(ctx_background());
        ctx_t *merged = i % 2 ? ctx_merge(request, server) : ctx_merge(server, request);
        if (i % 3 == 0) ctx_cancel(request);
        if (i % 5 == 0)
            ctx_release(merged);
        else
            ctx_end(merged);
        ctx_end(request);
    }
    EXPECT(settled_blocks() <= 2);
    EXPECT_EQ(ctx_err(server), 0);
    ctx_end(server);
    EXPECT_EQ(settled_blocks(), 0);
}

enum { MERGE_BELOW = 64 };

typedef struct {
    start_line_t barrier;
    ctx_t *a, *b, *merged, *below[MERGE_BELOW];
    int rounds;
    int third;  /* what side 2 does to the merge at the same moment: 1 ends it, 2 cancels it */
    int winner; /* of direct cancels of the merge: 2 if it was side 2 */
} merge_race_t;

static void *cancel_both_sides(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    merge_race_t *race = (merge_race_t *)side->shared;
    uint64_t seed = 40 + (uint64_t)side->id;
    int incomplete = 0, mixed = 0;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            race->a = ctx_with_cancel(ctx_background());
            race->b = ctx_with_cancel(ctx_background());
            race->merged = ctx_merge(race->a, race->b);
            if (race->third == 1) ctx_retain(race->merged);
            race->winner = -1;
            for (int i = 0; i < MERGE_BELOW; i++)
                race->below[i] = ctx_with_cancel(i % 3 == 0 ? race->merged : race->below[i - 1]);
        }
        start_line(&race->barrier);
        race_dither(race_random(&seed));
        if (side->id == 2 && race->third == 1) {
            ctx_end(race->merged);
        } else if (side->id == 2) {
            if (ctx_cancel_cause(race->merged, 102, words[2])) {
                race->winner = 2;
                mixed += !cause_is(race->merged, 102, words[2]);
                for (int i = 0; i < MERGE_BELOW; i++) incomplete += ctx_err(race->below[i]) == 0;
            }
        } else {
            bool won = ctx_cancel_cause(side->id ? race->b : race->a, 100 + side->id, words[side->id]);
            incomplete += !won || ctx_err(race->merged) == 0;
            for (int i = 0; i < MERGE_BELOW; i++) incomplete += ctx_err(race->below[i]) == 0;
        }
        start_line(&race->barrier);
        if (side->id != 0) continue;
        ctx_cause_t cause = ctx_cause(race->merged);
        if (race->winner == 2)
            mixed += cause.code != 102 || cause.what != words[2];
        else if (race->third != 1)
            mixed += cause.code != 100 && cause.code != 101;
        for (int i = 0; i < MERGE_BELOW; i++) {
            mixed += !cause_is(race->below[i], cause.code, cause.what);
            ctx_end(race->below[i]);
        }
        ctx_end(race->merged);
        ctx_end(race->b);
        ctx_end(race->a);
    }
    EXPECT_EQ(incomplete, 0);
    EXPECT_EQ(mixed, 0);
    return NULL;
}

static void check_merge_race(int sides, int third) {
    static merge_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, sides);
    race.rounds = test_scale(15000);
    race.third = third;
    race_run(sides, cancel_both_sides, &race);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(both_sides_of_a_merge_canceled_at_once_leave_nothing_below_live) { check_merge_race(2, 0); }

TEST(both_sides_canceled_while_the_merge_is_ended_leave_nothing_below_live) { check_merge_race(3, 1); }

TEST(a_merge_canceled_at_once_with_both_sides_keeps_the_cause_of_the_first) { check_merge_race(3, 2); }

/* The same with nothing else in the way: the canceler of the merge against the canceler of b. */
static void *cancel_merge_or_b(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    merge_race_t *race = (merge_race_t *)side->shared;
    uint64_t seed = 45 + (uint64_t)side->id;
    int mixed = 0;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            race->b = ctx_with_cancel(ctx_background());
            race->merged = ctx_merge(ctx_background(), race->b);
        }
        start_line(&race->barrier);
        if (side->id == 0) race_dither(race_random(&seed));
        ctx_t *mine = side->id ? race->b : race->merged;
        bool won = ctx_cancel_cause(mine, 100 + side->id, words[side->id]);
        ctx_cause_t at_once = ctx_cause(race->merged);
        mixed += side->id == 0 && at_once.code != (won ? 100 : 101);
        start_line(&race->barrier);
        mixed += !cause_is(race->merged, at_once.code, at_once.what);
        start_line(&race->barrier);
        if (side->id != 0) continue;
        ctx_end(race->merged);
        ctx_end(race->b);
    }
    EXPECT_EQ(mixed, 0);
    return NULL;
}

TEST(the_cause_of_a_merge_is_set_once) {
    static merge_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, 2);
    race.rounds = test_scale(200000);
    race_run(2, cancel_merge_or_b, &race);
    EXPECT_EQ(settled_blocks(), 0);
}

static void *drop_a_third(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    merge_race_t *race = (merge_race_t *)side->shared;
    uint64_t seed = 50 + (uint64_t)side->id;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            race->a = ctx_with_cancel(ctx_background());
            race->b = ctx_with_cancel(ctx_background());
            race->merged = ctx_merge(race->a, race->b);
        }
        start_line(&race->barrier);
        race_dither(race_random(&seed));
        ctx_t *mine = side->id == 0 ? race->a : side->id == 1 ? race->b : race->merged;
        if (race_below(&seed, 2))
            ctx_end(mine);
        else
            ctx_release(mine);
        start_line(&race->barrier);
    }
    return NULL;
}

TEST(three_threads_drop_a_merge_and_its_sides_at_once) {
    static merge_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, 3);
    race.rounds = test_scale(20000);
    race_run(3, drop_a_third, &race);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == leaf ======================================================================================================== */

TEST(a_leaf_sees_its_parents_end) {
    ctx_t *top = ctx_with_cancel(ctx_background());
    ctx_t *parent = ctx_with_cancel(top);
    ctx_leaf_t leaf;
    memset(&leaf, 0xa5, sizeof leaf);
    ctx_leaf_init(&leaf, parent, CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_leaf_err(&leaf), 0);
    ctx_cancel_cause(top, CTX_DEADLINE_EXCEEDED, words[1]);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    EXPECT(!ctx_leaf_cancel(&leaf));
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    ctx_end(parent);
    ctx_end(top);
}

TEST(a_leaf_ends_at_its_deadline_and_not_before) {
    ctx_clock_fake(CTX_S(1));
    ctx_leaf_t leaf;
    ctx_leaf_init(&leaf, ctx_background(), CTX_S(2));
    ctx_clock_advance(CTX_S(1) - 1);
    EXPECT_EQ(ctx_leaf_err(&leaf), 0);
    ctx_clock_advance(1);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    EXPECT(!ctx_leaf_cancel(&leaf));
    ctx_leaf_init(&leaf, ctx_background(), 0);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    ctx_clock_real();
}

TEST(the_first_reason_that_a_leaf_sees_stays) {
    ctx_clock_fake(0);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_leaf_t leaf;
    ctx_leaf_init(&leaf, parent, CTX_S(1));
    EXPECT(ctx_leaf_cancel(&leaf));
    EXPECT(!ctx_leaf_cancel(&leaf));
    ctx_clock_advance(CTX_S(5));
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_CANCELED);
    EXPECT_EQ(ctx_err(parent), 0);
    ctx_leaf_init(&leaf, parent, CTX_S(5)); /* past: seen before the parent is canceled */
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    ctx_cancel(parent);
    EXPECT_EQ(ctx_leaf_err(&leaf), CTX_DEADLINE_EXCEEDED);
    ctx_end(parent);
    ctx_clock_real();
}

typedef struct {
    start_line_t barrier;
    ctx_leaf_t leaf;
    ctx_t *parent;
    int rounds;
    int winners; /* [atomic] */
} leaf_race_t;

static void *cancel_a_leaf(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    leaf_race_t *race = (leaf_race_t *)side->shared;
    int wrong = 0;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            race->parent = ctx_with_cancel(ctx_background());
            ctx_leaf_init(&race->leaf, race->parent, CTX_NO_DEADLINE);
            race->winners = 0;
        }
        start_line(&race->barrier);
        if (side->id == 0) {
            int turns = 0;
            while (ctx_leaf_err(&race->leaf) == 0) race_pause(&turns);
        } else if (side->id == 1) {
            ctx_cancel_cause(race->parent, CTX_DEADLINE_EXCEEDED, NULL);
        } else if (ctx_leaf_cancel(&race->leaf)) {
            __atomic_add_fetch(&race->winners, 1, __ATOMIC_RELAXED);
        }
        start_line(&race->barrier);
        if (side->id != 0) continue;
        /* Either one leaf-cancel won and that is what it says, or none and it says what the parent says. */
        wrong += ctx_leaf_err(&race->leaf) != (race->winners ? CTX_CANCELED : CTX_DEADLINE_EXCEEDED);
        wrong += race->winners > 1;
        ctx_end(race->parent);
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(a_leaf_is_canceled_from_any_thread_by_one_winner) {
    leaf_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.barrier, 4);
    race.rounds = test_scale(10000);
    race_run(4, cancel_a_leaf, &race);
}

/* == scope ======================================================================================================= */

static int leave_early(int when, int *runs, ctx_on_done_t *reg) {
    CTX_SCOPED ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(50));
    EXPECT(ctx_on_done(reg, ctx, count, runs));
    if (when == 0) return 0;
    EXPECT_EQ(ctx_err(ctx), 0);
    return 1;
}

TEST(a_scoped_context_ends_however_its_scope_is_left) {
    int runs = 0;
    ctx_on_done_t reg;
    leave_early(0, &runs, &reg);
    EXPECT_EQ(runs, 1);
    leave_early(1, &runs, &reg);
    EXPECT_EQ(runs, 2);
    for (int i = 0; i < 10; i++) {
        CTX_SCOPED ctx_t *ctx = ctx_with_cancel(ctx_background());
        EXPECT(ctx_on_done(&reg, ctx, count, &runs));
        if (i == 3) continue;
        if (i == 5) break;
        EXPECT_EQ(runs, 2 + i);
    }
    EXPECT_EQ(runs, 8);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == contention ================================================================================================== */

enum { FAIR_STALLS = 64, FAIR_KEPT = 64 };

/* Children of one parent change hands, so that most are ended by another thread than derived them. */
typedef struct {
    start_line_t barrier;
    ctx_t *parent;
    ctx_t *stalls[FAIR_STALLS]; /* [atomic] */
    ctx_t *kept[RACE_MOST][FAIR_KEPT];
    int sides, per_side;
} fair_t;

static void *trade_children(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    fair_t *fair = (fair_t *)side->shared;
    uint64_t seed = 60 + (uint64_t)side->id;
    int live = 0;
    start_line(&fair->barrier);
    for (int i = 0; i < fair->per_side; i++) {
        uint64_t random = race_random(&seed);
        ctx_t *child = random % 8 == 0 ? ctx_with_timeout(fair->parent, CTX_S(600)) : ctx_with_cancel(fair->parent);
        ctx_t *old = __atomic_exchange_n(&fair->stalls[(random >> 8) % FAIR_STALLS], child, __ATOMIC_ACQ_REL);
        if (!old) continue;
        live += ctx_err(old) != 0;
        if (random % 3 == 0)
            ctx_release(old);
        else
            ctx_end(old);
    }
    EXPECT_EQ(live, 0); /* none is done before the parent is canceled */
    for (int i = 0; i < FAIR_KEPT; i++) fair->kept[side->id][i] = ctx_with_cancel(fair->parent);
    start_line(&fair->barrier);
    start_line(&fair->barrier); /* canceled between */
    int next = (side->id + 1) % fair->sides;
    for (int i = 0; i < FAIR_KEPT; i++) {
        live += ctx_err(fair->kept[next][i]) == 0;
        ctx_end(fair->kept[next][i]);
    }
    EXPECT_EQ(live, 0);
    return NULL;
}

static void *cancel_the_fair(void *arg) {
    fair_t *fair = (fair_t *)arg;
    start_line(&fair->barrier);
    start_line(&fair->barrier);
    EXPECT(ctx_cancel(fair->parent));
    for (int i = 0; i < FAIR_STALLS; i++) {
        if (!fair->stalls[i]) continue;
        EXPECT_EQ(ctx_err(fair->stalls[i]), CTX_CANCELED);
        ctx_end(fair->stalls[i]);
    }
    start_line(&fair->barrier);
    return NULL;
}

TEST(many_threads_on_one_parent_lose_no_child) {
    static fair_t fair;
    for (int sides = 2; sides <= 8; sides++) {
        memset(&fair, 0, sizeof fair);
        fair.sides = sides;
        fair.per_side = test_scale(200000) / sides;
        start_line_init(&fair.barrier, sides + 1);
        fair.parent = ctx_with_cancel(ctx_background());
        pthread_t canceler = thread_start(cancel_the_fair, &fair);
        race_run(sides, trade_children, &fair);
        pthread_join(canceler, NULL);
        ctx_t *born = ctx_with_cancel(fair.parent);
        EXPECT_EQ(ctx_err(born), CTX_CANCELED);
        ctx_end(born);
        ctx_end(fair.parent);
        EXPECT_EQ(settled_blocks(), 0);
    }
}

TEST(many_threads_on_the_background_leave_it_clean) {
    static fair_t fair;
    memset(&fair, 0, sizeof fair);
    fair.sides = 4;
    fair.per_side = test_scale(100000);
    start_line_init(&fair.barrier, 5);
    ctx_t *parent = ctx_with_cancel(ctx_background());
    fair.parent = ctx_background();
    race_side_t sides[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        sides[i].id = i;
        sides[i].shared = &fair;
        threads[i] = thread_start(trade_children, &sides[i]);
    }
    start_line(&fair.barrier);
    start_line(&fair.barrier);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < FAIR_KEPT; k++) ctx_cancel(fair.kept[i][k]);
    start_line(&fair.barrier);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < FAIR_STALLS; i++) ctx_end(fair.stalls[i]);
    EXPECT_EQ(ctx_err(parent), 0);
    ctx_end(parent);
    EXPECT_EQ(settled_blocks(), 0);
}

/* == signals ===================================================================================================== */

static ctx_t *signalled_ctx;        /* [atomic] */
static int signals_seen, errs_seen; /* [atomic] */

static void look_in_handler(int sig) {
    (void)sig;
    ctx_t *ctx = __atomic_load_n(&signalled_ctx, __ATOMIC_ACQUIRE);
    if (ctx && ctx_err(ctx) != 0) __atomic_add_fetch(&errs_seen, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&signals_seen, 1, __ATOMIC_RELEASE);
}

static void *work_under_signals(void *arg) {
    int *over = (int *)arg;
    int wrong = 0;
    while (!load(over)) {
        ctx_t *parent = ctx_with_cancel(ctx_background());
        ctx_t *child = ctx_with_timeout(parent, CTX_S(50));
        __atomic_store_n(&signalled_ctx, child, __ATOMIC_RELEASE);
        wrong += ctx_err(child) != 0;
        ctx_cancel(parent);
        wrong += ctx_err(child) != CTX_CANCELED;
        __atomic_store_n(&signalled_ctx, (ctx_t *)NULL, __ATOMIC_RELEASE);
        ctx_end(child);
        ctx_end(parent);
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(err_may_be_read_in_a_signal_handler) {
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = look_in_handler;
    sigaction(SIGUSR1, &action, &old);
    int over = 0;
    pthread_t worker = thread_start(work_under_signals, &over);
    for (int i = 1, n = test_scale(2000); i <= n; i++) {
        pthread_kill(worker, SIGUSR1);
        race_await(&signals_seen, i);
    }
    store(&over, 1);
    pthread_join(worker, NULL);
    sigaction(SIGUSR1, &old, NULL);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST_MAIN
