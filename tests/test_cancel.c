/* Whoever comes back from a cancel or an end, first or not, finds everything below done; and so does a descriptor's
   reader. Each of these runs with one thread stopped at each of its steps in turn (ctx__sched_step). */
#define CTXCANCEL_TEST_SCHED
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "steps.h"
#include "child.h"

#include <poll.h>

/* -- a tree with everything that can stand below a context ------------------------------------------------------- */

enum { BELOW_MOST = 16 };

typedef struct {
    ctx_t *top, *middle, *elsewhere;
    ctx_t *below[BELOW_MOST]; /* of top, parents first; middle is below[0] and those from `deep` on are below it */
    int n, deep;
    int fd;   /* of top */
    int live; /* [atomic] seen by any side after its own cancel had returned */
    int second, first;
} tree_t;

static ctx_t *put(tree_t *tree, ctx_t *ctx) {
    tree->below[tree->n++] = ctx;
    return ctx;
}

static void tree_make(tree_t *tree, ctx_t *top) {
    memset(tree, 0, sizeof *tree);
    tree->top = top;
    tree->elsewhere = ctx_with_cancel(ctx_background());
    tree->middle = put(tree, ctx_with_cancel(top));
    put(tree, ctx_with_cancel(top));
    ctx_t *merged = put(tree, ctx_merge(top, tree->elsewhere));
    put(tree, ctx_with_cancel(merged));
    tree->deep = tree->n;
    put(tree, ctx_with_cancel(tree->middle));
    merged = put(tree, ctx_merge(tree->elsewhere, tree->middle));
    ctx_t *below = put(tree, ctx_with_cancel(merged));
    put(tree, ctx_with_cancel(below));
    merged = put(tree, ctx_merge(tree->elsewhere, below));
    put(tree, ctx_with_cancel(merged));
}

static void tree_end(tree_t *tree) {
    for (int i = tree->n - 1; i >= 0; i--) ctx_end(tree->below[i]);
    ctx_end(tree->elsewhere);
    ctx_end(tree->top);
}

/* Whatever lives below, from below[from] on, is a broken promise. */
static void look_below(tree_t *tree, int from) {
    for (int i = from; i < tree->n; i++)
        if (ctx_err(tree->below[i]) == 0) add(&tree->live, 1);
}

enum { BY_CANCEL, BY_CAUSE, BY_END, BY_DEADLINE, WAYS };

static void go(ctx_t *ctx, int way) {
    if (way == BY_CANCEL) ctx_cancel(ctx);
    if (way == BY_CAUSE) ctx_cancel_cause(ctx, -EIO, "input/output error");
    if (way == BY_END) ctx_end(ctx_retain(ctx));
    if (way == BY_DEADLINE) ctx_clock_advance(CTX_S(1));
}

static void first_cancels(void *shared) {
    tree_t *tree = (tree_t *)shared;
    go(tree->top, tree->first);
    look_below(tree, 0);
}

static void second_cancels(void *shared) {
    tree_t *tree = (tree_t *)shared;
    go(tree->top, tree->second);
    look_below(tree, 0);
}

static void second_cancels_the_middle(void *shared) {
    tree_t *tree = (tree_t *)shared;
    go(tree->middle, tree->second);
    look_below(tree, tree->deep);
}

static void second_cancels_elsewhere(void *shared) {
    tree_t *tree = (tree_t *)shared;
    go(tree->elsewhere, tree->second);
    if (ctx_err(tree->below[2]) == 0 || ctx_err(tree->below[3]) == 0) add(&tree->live, 1);
    look_below(tree, tree->deep + 1);
}

/* Each way to come first against each way to come second, with the first one stopped at each step. */
static void check_second(steps_fn second) {
    const steps_fn sides[] = {first_cancels, second};
    ctx_clock_fake(CTX_S(100));
    for (int way = 0; way < WAYS * 3; way++) {
        if (TEST_QUICK && way % 4 != 1) continue;
        int bad = 0, runs = 0;
        bool more = true;
        for (int at = 0; more; at += steps_stride(), runs++) {
            tree_t tree;
            tree_make(&tree, way / 3 == BY_DEADLINE ? ctx_with_timeout(ctx_background(), CTX_MS(1))
                                                    : ctx_with_cancel(ctx_background()));
            tree.first = way / 3;
            tree.second = way % 3;
            more = steps_run(sides, 2, 0, &tree, at);
            bad += load(&tree.live) > 0;
            tree_end(&tree);
        }
        EXPECT_EQ(bad, 0);
        EXPECT(runs > 10 || TEST_QUICK);
    }
    ctx_clock_real();
}

TEST(a_cancel_that_comes_second_returns_when_all_below_is_done) { check_second(second_cancels); }

TEST(a_cancel_in_the_middle_of_another_ones_tree_returns_when_all_below_is_done) {
    check_second(second_cancels_the_middle);
}

TEST(a_cancel_of_the_other_side_of_merges_returns_when_all_below_is_done) { check_second(second_cancels_elsewhere); }

/* -- merges: three cancels that meet ------------------------------------------------------------------------------ */

/* a and b are merged; b, and sometimes a, stands below `over`. Below the merge there is a chain and a second merge. */
typedef struct {
    ctx_t *over, *a, *b, *other;
    ctx_t *below[6];
    int live; /* [atomic] */
} meet_t;

static void meet_make(meet_t *meet, bool both) {
    memset(meet, 0, sizeof *meet);
    meet->over = ctx_with_cancel(ctx_background());
    meet->a = ctx_with_cancel(both ? meet->over : ctx_background());
    meet->b = ctx_with_cancel(meet->over);
    meet->other = ctx_with_cancel(ctx_background());
    meet->below[0] = ctx_merge(meet->a, meet->b);
    meet->below[1] = ctx_with_cancel(meet->below[0]);
    meet->below[2] = ctx_with_cancel(meet->below[1]);
    meet->below[3] = ctx_merge(meet->other, meet->below[1]);
    meet->below[4] = ctx_with_cancel(meet->below[3]);
    meet->below[5] = ctx_with_cancel(meet->below[1]);
}

static void meet_end(meet_t *meet) {
    for (int i = 5; i >= 0; i--) ctx_end(meet->below[i]);
    ctx_end(meet->other);
    ctx_end(meet->a);
    ctx_end(meet->b);
    ctx_end(meet->over);
}

static void cancel_and_look(meet_t *meet, ctx_t *ctx) {
    ctx_cancel(ctx);
    for (int i = 0; i < 6; i++)
        if (ctx_err(meet->below[i]) == 0) add(&meet->live, 1);
}

static void cancels_a(void *shared) { cancel_and_look((meet_t *)shared, ((meet_t *)shared)->a); }
static void cancels_b(void *shared) { cancel_and_look((meet_t *)shared, ((meet_t *)shared)->b); }
static void cancels_over(void *shared) { cancel_and_look((meet_t *)shared, ((meet_t *)shared)->over); }

static void check_meet(const steps_fn *sides, int n, int stop, bool both) {
    int bad = 0;
    bool more = true;
    for (int at = 0; more; at += steps_stride()) {
        meet_t meet;
        meet_make(&meet, both);
        more = steps_run(sides, n, stop, &meet, at);
        bad += load(&meet.live) > 0;
        meet_end(&meet);
    }
    EXPECT_EQ(bad, 0);
}

TEST(a_cancel_is_complete_below_a_merge_that_two_others_are_busy_with) {
    const steps_fn abo[] = {cancels_a, cancels_b, cancels_over}, bao[] = {cancels_b, cancels_a, cancels_over};
    const steps_fn aob[] = {cancels_a, cancels_over, cancels_b}, oab[] = {cancels_over, cancels_a, cancels_b};
    for (int both = 0; both < 2; both++) {
        check_meet(abo, 3, 0, both);
        check_meet(bao, 3, 0, both);
        check_meet(aob, 3, 0, both);
        check_meet(oab, 3, 0, both);
    }
}

TEST(both_sides_of_a_merge_canceled_at_any_step_of_each_other_leave_nothing_live) {
    const steps_fn ab[] = {cancels_a, cancels_b}, ba[] = {cancels_b, cancels_a};
    for (int both = 0; both < 2; both++) {
        check_meet(ab, 2, 0, both);
        check_meet(ba, 2, 0, both);
    }
}

/* -- a newcomer during a cancel ----------------------------------------------------------------------------------- */

typedef struct {
    ctx_t *top, *child, *born;
    int live, runs; /* [atomic] */
    ctx_on_done_t reg;
    int kind;
} newcomer_t;

static void count(void *arg) { add((int *)arg, 1); }

static void cancels_top(void *shared) { ctx_cancel(((newcomer_t *)shared)->top); }

enum { DERIVES, MERGES, MERGES_AS_SECOND, REGISTERS, NEWCOMERS };

static void comes(void *shared) {
    newcomer_t *newcomer = (newcomer_t *)shared;
    if (newcomer->kind == DERIVES) newcomer->born = ctx_with_cancel(newcomer->child);
    if (newcomer->kind == MERGES) newcomer->born = ctx_merge(newcomer->child, ctx_background());
    if (newcomer->kind == MERGES_AS_SECOND) newcomer->born = ctx_merge(ctx_background(), newcomer->child);
    if (newcomer->kind == REGISTERS) ctx_on_done(&newcomer->reg, newcomer->child, count, &newcomer->runs);
}

TEST(what_attaches_at_any_step_of_a_cancel_is_done_when_both_have_returned) {
    for (int kind = 0; kind < NEWCOMERS * 2; kind++) {
        const steps_fn sides[] = {cancels_top, comes}, swapped[] = {comes, cancels_top};
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            newcomer_t newcomer;
            memset(&newcomer, 0, sizeof newcomer);
            newcomer.kind = kind / 2;
            newcomer.top = ctx_with_cancel(ctx_background());
            newcomer.child = ctx_with_cancel(newcomer.top);
            more = steps_run(kind % 2 ? swapped : sides, 2, 0, &newcomer, at);
            if (newcomer.kind == REGISTERS)
                EXPECT_EQ(load(&newcomer.runs), 1);
            else
                EXPECT_EQ(ctx_err(newcomer.born), CTX_CANCELED);
            ctx_end(newcomer.born);
            ctx_end(newcomer.child);
            ctx_end(newcomer.top);
        }
    }
}

/* -- callbacks that cancel ---------------------------------------------------------------------------------------- */

typedef struct {
    ctx_t *mine, *others, *below;
    ctx_on_done_t reg;
    gate_t *both;
    int bad; /* [atomic] */
} mutual_t;

static void cancels_the_other(void *arg) {
    mutual_t *mutual = (mutual_t *)arg;
    gate_pass(mutual->both);
    if (ctx_cancel(mutual->others)) add(&mutual->bad, 1);
    if (ctx_cancel(mutual->mine)) add(&mutual->bad, 1);
    if (ctx_err(mutual->below) == 0) add(&mutual->bad, 1);
}

static void *cancels_mine(void *arg) {
    ctx_cancel(((mutual_t *)arg)->mine);
    return NULL;
}

TEST(callbacks_of_two_cancels_that_cancel_each_others_context_do_not_wait_for_each_other) {
    gate_t both;
    mutual_t side[2];
    pthread_t threads[2];
    gate_init(&both);
    memset(side, 0, sizeof side);
    for (int i = 0; i < 2; i++) side[i].mine = ctx_with_cancel(ctx_background());
    for (int i = 0; i < 2; i++) {
        side[i].others = side[1 - i].mine;
        side[i].below = ctx_with_cancel(side[1 - i].mine);
        side[i].both = &both;
        EXPECT(ctx_on_done(&side[i].reg, side[i].mine, cancels_the_other, &side[i]));
        threads[i] = thread_start(cancels_mine, &side[i]);
    }
    gate_await(&both, 2); /* both callbacks run */
    gate_open(&both);
    for (int i = 0; i < 2; i++) {
        thread_join(threads[i]);
        EXPECT_EQ(load(&side[i].bad), 0);
    }
    for (int i = 0; i < 2; i++) ctx_end(side[i].below);
    for (int i = 0; i < 2; i++) ctx_end(side[i].mine);
    gate_destroy(&both);
}

/* -- the descriptor ----------------------------------------------------------------------------------------------- */

typedef struct {
    ctx_t *top, *child;
    int fd, child_fd;
    int first;
    int err_before_readable, readable_before_err, unreadable_after_cancel; /* [atomic] */
} fds_t;

static void first_cancels_with_fds(void *shared) {
    fds_t *fds = (fds_t *)shared;
    go(fds->top, fds->first);
}

static void look_at(fds_t *fds, ctx_t *ctx, int fd) {
    if (readable(fd) && ctx_err(ctx) == 0) add(&fds->readable_before_err, 1);
    if (ctx_err(ctx) != 0 && !readable(ctx_done_fd(ctx))) add(&fds->err_before_readable, 1);
}

static void looks_at_fds(void *shared) {
    fds_t *fds = (fds_t *)shared;
    look_at(fds, fds->top, fds->fd);
    look_at(fds, fds->child, fds->child_fd);
}

static void cancels_second_with_fds(void *shared) {
    fds_t *fds = (fds_t *)shared;
    if (ctx_cancel(fds->top) && !readable(fds->fd)) add(&fds->unreadable_after_cancel, 1);
}

static void asks_for_fds_late(void *shared) {
    fds_t *fds = (fds_t *)shared;
    int fd = ctx_done_fd(fds->top);
    if (ctx_err(fds->top) != 0 && !readable(ctx_done_fd(fds->top))) add(&fds->err_before_readable, 1);
    if (readable(fd) && ctx_err(fds->top) == 0) add(&fds->readable_before_err, 1);
    fds->fd = fd;
}

static fds_t check_fds(steps_fn second, bool early, bool stop_second) {
    const steps_fn sides[] = {first_cancels_with_fds, second}, swapped[] = {second, first_cancels_with_fds};
    fds_t sum;
    memset(&sum, 0, sizeof sum);
    ctx_clock_fake(CTX_S(100));
    for (int way = 0; way < WAYS; way++) {
        bool more = true;
        for (int at = 0; more; at += steps_stride()) {
            fds_t fds;
            memset(&fds, 0, sizeof fds);
            fds.first = way;
            fds.top =
                way == BY_DEADLINE ? ctx_with_timeout(ctx_background(), CTX_MS(1)) : ctx_with_cancel(ctx_background());
            fds.child = ctx_with_cancel(fds.top);
            fds.fd = early ? ctx_done_fd(fds.top) : -1;
            fds.child_fd = ctx_done_fd(fds.child);
            more = steps_run(stop_second ? swapped : sides, 2, 0, &fds, at);
            if (!readable(fds.fd)) add(&fds.unreadable_after_cancel, 1);
            sum.err_before_readable += fds.err_before_readable > 0;
            sum.readable_before_err += fds.readable_before_err > 0;
            sum.unreadable_after_cancel += fds.unreadable_after_cancel > 0;
            ctx_end(fds.child);
            ctx_end(fds.top);
        }
    }
    ctx_clock_real();
    ctx_runtime_stop();
    return sum;
}

TEST(a_readable_descriptor_says_that_the_context_is_done) {
    EXPECT_EQ(check_fds(looks_at_fds, true, false).readable_before_err, 0);
}

TEST(a_descriptor_asked_for_once_the_context_is_done_is_readable) {
    EXPECT_EQ(check_fds(looks_at_fds, true, false).err_before_readable, 0);
}

TEST(the_descriptor_is_readable_when_the_cancel_that_won_has_returned) {
    for (int stop_second = 0; stop_second < 2; stop_second++)
        EXPECT_EQ(check_fds(cancels_second_with_fds, true, stop_second).unreadable_after_cancel, 0);
}

TEST(a_descriptor_first_asked_for_at_any_step_of_a_cancel_becomes_readable) {
    for (int stop_second = 0; stop_second < 2; stop_second++) {
        fds_t sum = check_fds(asks_for_fds_late, false, stop_second);
        EXPECT_EQ(sum.readable_before_err, 0);
        EXPECT_EQ(sum.err_before_readable, 0);
    }
}

/* Only the last test may stop what the others share. */
TEST(cancels_leave_nothing_running) {
    ctx_runtime_stop();
    EXPECT_EQ(ctx_err(ctx_background()), 0);
}

TEST_MAIN
