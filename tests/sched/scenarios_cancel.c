/* Cancel, derive, end and merge on one tree by several threads. A thread that returns from ctx_cancel() or ctx_end(),
   first or not, finds everything done that was attached below before its call, and the cause is one of those given. */
#include "sched.h"

/*  background -> top -> mid -> kid
    background -> other -> m (merged with mid) -> m_kid         A thread that ends top or mid has a reference for it. */
static ctx_t *top, *mid, *kid, *other, *m, *m_kid;
static ctx_t *made[2]; /* by the threads, while the tree is being canceled */
static sched_flag_t is_made[2];
static bool canceled_top[4], canceled_mid[4]; /* by that thread; these arrays are not shared, so they do not race */
static int top_ended[4], mid_ended[4];        /* references that it has given back */

static void setup(void) {
    int i;
    top = ctx_with_cancel(ctx_background());
    mid = ctx_with_cancel(top);
    kid = ctx_retain(ctx_with_cancel(mid));
    other = ctx_with_cancel(ctx_background());
    m = ctx_merge(other, mid);
    m_kid = ctx_with_cancel(m);
    for (i = 0; i < 3; i++) {
        ctx_retain(top);
        ctx_retain(mid);
    }
}

static void check_cause(const ctx_t *ctx) {
    ctx_cause_t cause = ctx_cause(ctx);
    SCHED_CHECK(ctx_err(ctx) == CTX_CANCELED);
    SCHED_CHECK((cause.code == CTX_CANCELED && !strcmp(cause.what, "context canceled")) ||
                (cause.code == 7 && !strcmp(cause.what, "seven")) || (cause.code == 8 && !strcmp(cause.what, "eight")));
}

/* What the threads had made before this one began to cancel. */
static int made_before(void) { return (int)sched_is_set(&is_made[0]) + 2 * (int)sched_is_set(&is_made[1]); }

static void check_below_mid(int before) {
    check_cause(mid);
    check_cause(kid);
    SCHED_CHECK(ctx_err(m));
    SCHED_CHECK(ctx_err(m_kid));
    if (before & 1) SCHED_CHECK(ctx_err(made[0]));
    if (before & 2) SCHED_CHECK(ctx_err(made[1]));
    check_cause(m_kid);
}

static void cancel_top(void) {
    int before = made_before();
    canceled_top[sched_thread()] = true;
    ctx_cancel(top);
    check_cause(top);
    check_below_mid(before);
}
static void cause_top(void) {
    int before = made_before();
    canceled_top[sched_thread()] = true;
    ctx_cancel_cause(top, 7, "seven");
    check_cause(top);
    check_below_mid(before);
}
static void end_top(void) {
    int before = made_before();
    canceled_top[sched_thread()] = true;
    top_ended[sched_thread()]++;
    ctx_end(top);
    check_cause(top);
    check_below_mid(before);
}
static void cancel_mid(void) {
    int before = made_before();
    canceled_mid[sched_thread()] = true;
    ctx_cancel(mid);
    check_below_mid(before);
}
static void cause_mid(void) {
    int before = made_before();
    canceled_mid[sched_thread()] = true;
    ctx_cancel_cause(mid, 8, "eight");
    check_below_mid(before);
}
static void end_mid(void) {
    int before = made_before();
    canceled_mid[sched_thread()] = true;
    mid_ended[sched_thread()]++;
    ctx_end(mid);
    check_below_mid(before);
}
static void end_kid(void) { ctx_end(kid); }

static void keep_made(ctx_t *ctx) {
    int i = sched_thread() == 2;
    made[i] = ctx;
    sched_set(&is_made[i]);
}
static void derive(void) { keep_made(ctx_with_cancel(mid)); }
static void merge_b(void) { keep_made(ctx_merge(ctx_background(), mid)); }
static void merge_a(void) { keep_made(ctx_merge(mid, other)); }

static void check(void) {
    int i, top_refs = 4, mid_refs = 4;
    bool by_top = false, by_mid = false;
    for (i = 0; i < 4; i++) {
        by_top = by_top || canceled_top[i];
        by_mid = by_mid || canceled_mid[i];
        top_refs -= top_ended[i];
        mid_refs -= mid_ended[i];
    }
    if (by_top) SCHED_CHECK(ctx_err(top));
    if (by_top || by_mid) check_below_mid((made[0] != NULL) + 2 * (made[1] != NULL));
    SCHED_CHECK(!ctx_err(other));
    ctx_end(m_kid);
    ctx_end(m);
    ctx_end(other);
    ctx_release(kid);
    for (i = 0; i < 2; i++) ctx_end(made[i]);
    while (mid_refs-- > 0) ctx_end(mid);
    while (top_refs-- > 0) ctx_end(top);
}
/* The same if no thread has ended kid. */
static void check_kid(void) {
    ctx_retain(kid);
    check();
    ctx_release(kid);
    ctx_end(kid);
}

/* Nothing is kept: who is last frees. The tree is a -> b -> c. */
static ctx_t *a, *b, *c;
static void setup_chain(void) {
    a = ctx_with_cancel(ctx_background());
    b = ctx_with_cancel(a);
    c = ctx_with_cancel(b);
}
static void chain_end_a(void) { ctx_end(a); }
static void chain_end_b(void) { ctx_end(b); }
static void chain_end_c(void) { ctx_end(c); }
static void chain_release_a(void) { ctx_release(a); }
static void chain_release_b(void) { ctx_release(b); }

/* Nothing is attached to mid when the threads begin: an attach meets a walk that may think mid bare. */
static void setup_bare(void) {
    top = ctx_with_cancel(ctx_background());
    mid = ctx_with_cancel(top);
    other = ctx_with_cancel(ctx_background());
}
static void bare_check(int before) {
    SCHED_CHECK(ctx_err(mid));
    if (before & 1) SCHED_CHECK(ctx_err(made[0]));
    if (before & 2) SCHED_CHECK(ctx_err(made[1]));
}
static void bare_cancel_top(void) {
    int before = made_before();
    ctx_cancel(top);
    bare_check(before);
}
static void bare_cancel_mid(void) {
    int before = made_before();
    ctx_cancel(mid);
    bare_check(before);
}
static void bare_end_mid(void) {
    int before = made_before();
    ctx_end(ctx_retain(mid));
    bare_check(before);
}
/* A child that is made and ended: its parent's list shrinks under the walk. */
static void make_end(void) { ctx_end(ctx_with_cancel(mid)); }
static void make_grandchild(void) {
    ctx_t *child = ctx_with_cancel(mid);
    keep_made(ctx_with_cancel(child));
    ctx_end(child);
    SCHED_CHECK(ctx_err(made[sched_thread() == 2]));
}
static void check_bare(void) {
    if (ctx_err(mid)) bare_check((made[0] != NULL) + 2 * (made[1] != NULL));
    ctx_end(made[0]);
    ctx_end(made[1]);
    ctx_end(mid);
    ctx_end(top);
    ctx_end(other);
}

/* One parent in each of two subtrees of one top. */
static ctx_t *left, *right;
static void setup_merge(void) {
    top = ctx_with_cancel(ctx_background());
    left = ctx_with_cancel(top);
    right = ctx_with_cancel(top);
    m = ctx_merge(left, right);
    m_kid = ctx_with_cancel(m);
    kid = ctx_with_cancel(m_kid);
}
static void merge_check(void) {
    SCHED_CHECK(ctx_err(m));
    SCHED_CHECK(ctx_err(m_kid));
    SCHED_CHECK(ctx_err(kid));
    SCHED_CHECK(ctx_cause(kid).code == CTX_CANCELED || ctx_cause(kid).code == 7);
}
static void merge_cancel_left(void) {
    ctx_cancel(left);
    merge_check();
}
static void merge_cancel_right(void) {
    ctx_cancel_cause(right, 7, "seven");
    merge_check();
}
static void merge_cancel_top(void) {
    ctx_cancel(top);
    merge_check();
    SCHED_CHECK(ctx_err(left) && ctx_err(right));
}
/* Checks the promise to the thread that won, alone. */
static void merge_cancel_top_if_won(void) {
    if (ctx_cancel(top)) merge_check();
}
static void merge_cancel_top_apart(void) {
    ctx_cancel(top);
    merge_check();
}
static void merge_cancel_left_quietly(void) { ctx_cancel(left); }
static void merge_cancel_right_quietly(void) { ctx_cancel(right); }
static void merge_end_m(void) {
    ctx_retain(m);
    ctx_end(m);
    SCHED_CHECK(ctx_err(m_kid) && ctx_err(kid));
}
static void check_merge(void) {
    ctx_end(kid);
    ctx_end(m_kid);
    ctx_end(m);
    ctx_end(left);
    ctx_end(right);
    ctx_end(top);
}

/* core_m: left is a tree of its own. */
static void setup_core_m(void) {
    top = ctx_with_cancel(ctx_background());
    right = ctx_with_cancel(top);
    left = ctx_with_cancel(ctx_background());
    m = ctx_merge(left, right);
    m_kid = ctx_with_cancel(m);
    kid = ctx_with_cancel(m_kid);
}

/* Merged contexts in a row, and a ring of two parents: m = merge(left, right), other = merge(right, m). */
static void setup_merge_row(void) {
    setup_merge();
    other = ctx_merge(right, m);
    made[0] = ctx_with_cancel(other);
}
static void row_cancel_left(void) {
    ctx_cancel(left);
    merge_check();
    SCHED_CHECK(ctx_err(other) && ctx_err(made[0]));
}
static void row_cancel_right(void) {
    ctx_cancel(right);
    merge_check();
    SCHED_CHECK(ctx_err(other) && ctx_err(made[0]));
}
static void check_merge_row(void) {
    ctx_end(made[0]);
    ctx_end(other);
    check_merge();
}

/* A merged context that ends while its second parent is canceled and freed. */
static void merge_end_all(void) {
    ctx_end(kid);
    ctx_end(m_kid);
    ctx_end(m);
}
static void merge_end_right(void) { ctx_end(right); }
static void check_merge_ends(void) {
    ctx_end(left);
    ctx_end(top);
}

/* api_second_cancel: only the promise to the second. */
static void setup_second(void) {
    top = ctx_with_cancel(ctx_background());
    kid = ctx_with_cancel(top);
}
static void second_cancel(void) {
    ctx_cancel(top);
    SCHED_CHECK(ctx_err(kid));
}
static void second_end(void) {
    ctx_end(ctx_retain(top));
    SCHED_CHECK(ctx_err(kid));
}
static void check_second(void) {
    ctx_end(kid);
    ctx_end(top);
}

/* A context whose err is set has a cause. */
static void err_cause(void) {
    if (ctx_err(mid)) SCHED_CHECK(ctx_cause(mid).code == CTX_CANCELED);
}

/* A walk relies on a second one, which relies on a third that began later. The tree is a -> b -> c -> kid. */
static void setup_three(void) {
    setup_chain();
    kid = ctx_with_cancel(c);
}
static void three_cancel_a(void) {
    ctx_cancel(a);
    SCHED_CHECK(ctx_err(kid));
}
static void three_cancel_b(void) { ctx_cancel(b); }
static void three_cancel_c(void) { ctx_cancel(c); }
static void check_three(void) {
    ctx_end(kid);
    ctx_end(c);
    ctx_end(b);
    ctx_end(a);
}

#define BARE(x, y) { "cancel: bare, " #x " / " #y, setup_bare, { T(x), T(y) }, check_bare, false }
#define BARE_TRIO(x, y, z) \
    { "cancel: bare, " #x " / " #y " / " #z, setup_bare, { T(x), T(y), T(z) }, check_bare, false }
#define TRIO(x, y, z) { "cancel: " #x " / " #y " / " #z, setup, { T(x), T(y), T(z) }, check_kid, false }
#define PAIR(x, y) { "cancel: " #x " / " #y, setup, { T(x), T(y) }, check_kid, false }
#define PAIR_KID(x) { "cancel: " #x " / end_kid", setup, { T(x), T(end_kid) }, check, false }
#define ROW(x) \
    PAIR(x, cancel_top), PAIR(x, cause_top), PAIR(x, end_top), PAIR(x, cancel_mid), PAIR(x, cause_mid), \
    PAIR(x, end_mid)
static const sched_scenario_t scenarios[] = {
    { "cancel: second cancel", setup_second, { T(second_cancel), T(second_cancel) }, check_second, false },
    { "cancel: second end", setup_second, { T(second_cancel), T(second_end) }, check_second, false },
    { "cancel: core_m, top if won", setup_core_m,
      { T(merge_cancel_top_if_won), T(merge_cancel_left_quietly), T(merge_cancel_right_quietly) }, check_merge, false },
    { "cancel: core_m, all", setup_core_m,
      { T(merge_cancel_top_apart), T(merge_cancel_left), T(merge_cancel_right) }, check_merge, false },
    { "cancel: merge, left / right", setup_merge, { T(merge_cancel_left), T(merge_cancel_right) }, check_merge, false },
    { "cancel: merge, top / left", setup_merge, { T(merge_cancel_top), T(merge_cancel_left) }, check_merge, false },
    { "cancel: merge, top / right", setup_merge, { T(merge_cancel_top), T(merge_cancel_right) }, check_merge, false },
    { "cancel: merge, top / top", setup_merge, { T(merge_cancel_top), T(merge_cancel_top) }, check_merge, false },
    { "cancel: merge, top / left / right", setup_merge,
      { T(merge_cancel_top), T(merge_cancel_left), T(merge_cancel_right) }, check_merge, false },
    { "cancel: merge, top / end m", setup_merge, { T(merge_cancel_top), T(merge_end_m) }, check_merge, false },
    { "cancel: merge, right / end m", setup_merge, { T(merge_cancel_right), T(merge_end_m) }, check_merge, false },
    { "cancel: merge, end right / end all", setup_merge,
      { T(merge_end_right), T(merge_end_all) }, check_merge_ends, false },
    { "cancel: merge row, left / right", setup_merge_row,
      { T(row_cancel_left), T(row_cancel_right) }, check_merge_row, false },
    { "cancel: err then cause", setup_bare, { T(err_cause), T(bare_cancel_mid) }, check_bare, false },
    { "cancel: three walks", setup_three, { T(three_cancel_b), T(three_cancel_a), T(three_cancel_c) }, check_three,
      false },
    { "cancel: chain, ends", setup_chain, { T(chain_end_a), T(chain_end_b), T(chain_end_c) }, NULL, false },
    { "cancel: chain, releases and end", setup_chain,
      { T(chain_release_a), T(chain_release_b), T(chain_end_c) }, NULL, false },
    BARE(derive, bare_cancel_top), BARE(derive, bare_cancel_mid), BARE(derive, bare_end_mid),
    BARE(merge_a, bare_cancel_top), BARE(merge_b, bare_cancel_top), BARE(merge_b, bare_cancel_mid),
    BARE(merge_b, bare_end_mid), BARE(make_end, bare_cancel_top), BARE(make_end, bare_cancel_mid),
    BARE(make_grandchild, bare_cancel_top), BARE(bare_cancel_mid, bare_cancel_top),
    BARE(bare_cancel_mid, bare_cancel_mid),
    BARE_TRIO(derive, derive, bare_cancel_top), BARE_TRIO(derive, bare_cancel_mid, bare_cancel_top),
    BARE_TRIO(derive, bare_end_mid, bare_cancel_top), BARE_TRIO(merge_b, bare_cancel_mid, bare_cancel_top),
    BARE_TRIO(make_end, make_end, bare_cancel_top), BARE_TRIO(make_end, merge_b, bare_cancel_top),
    TRIO(derive, cancel_top, cancel_mid), TRIO(merge_b, cancel_top, cancel_mid), TRIO(derive, end_top, end_mid),
    TRIO(cancel_top, cancel_top, cancel_mid), TRIO(cancel_top, cause_top, end_mid), TRIO(cancel_top, end_mid, end_mid),
    ROW(cancel_top), ROW(cause_top), PAIR(end_top, end_top), ROW(cancel_mid), PAIR(end_mid, end_mid),
    PAIR(end_mid, end_top),
    ROW(derive), ROW(merge_a), ROW(merge_b), PAIR(derive, derive), PAIR(derive, merge_a), PAIR(derive, merge_b),
    PAIR(merge_a, merge_b), PAIR(merge_b, merge_b),
    PAIR_KID(cancel_top), PAIR_KID(end_top), PAIR_KID(cancel_mid), PAIR_KID(end_mid), PAIR_KID(derive),
    PAIR_KID(merge_b),
};
SCHED_MAIN(scenarios)
