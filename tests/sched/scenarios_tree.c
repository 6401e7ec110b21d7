/* Values and detached contexts, leaves, contended parents, the gate of a fork. */
#include "sched.h"

static ctx_t *top, *mid, *made[4];
static const int64_t request = 42;
static const ctx_key_t key = CTX_KEY(int64_t);

/* -- values -- */

static void check_value(const ctx_t *ctx) {
    const int64_t *value = (const int64_t *)ctx_value(ctx, &key);
    SCHED_CHECK(value && *value == 42);
}
/* The detaching thread has a reference to mid. */
static void setup_values(void) {
    top = ctx_with_value(ctx_background(), &key, &request);
    mid = ctx_retain(ctx_with_cancel(top));
}
static void detach(void) {
    ctx_t *detached = ctx_without_cancel(mid);
    ctx_release(mid);
    SCHED_CHECK(!ctx_err(detached));
    check_value(detached);
    made[0] = detached;
}
static void derive_value(void) {
    ctx_t *own = ctx_with_value(mid, &key, &request);
    ctx_release(mid);
    check_value(own);
    ctx_end(own);
}
static void end_mid(void) { ctx_end(mid); }
static void end_top(void) { ctx_end(top); }
static void cancel_top(void) { ctx_cancel(top); }
static void check_values(void) {
    if (!made[0]) return;
    SCHED_CHECK(!ctx_err(made[0]));
    check_value(made[0]);
    ctx_end(made[0]);
}

static void check_values_top(void) {
    check_values();
    ctx_end(top);
}

/* -- leaves -- */

static ctx_leaf_t leaf;
static void setup_leaf(void) {
    top = ctx_with_cancel(ctx_background());
    ctx_leaf_init(&leaf, top, CTX_NO_DEADLINE);
}
static void setup_leaf_deadline(void) {
    top = ctx_with_cancel(ctx_background());
    ctx_leaf_init(&leaf, top, ctx_now() + 5000); /* passes while it is looked at */
}
static void leaf_look(void) {
    int i, first = 0;
    for (i = 0; i < 4; i++) {
        int err = ctx_leaf_err(&leaf);
        SCHED_CHECK(!first || err == first); /* the first reason stays */
        first = err;
    }
}
static void leaf_cancel(void) {
    ctx_leaf_cancel(&leaf);
    SCHED_CHECK(ctx_leaf_err(&leaf));
}
static void cancel_leaf_parent(void) {
    ctx_cancel(top);
    SCHED_CHECK(ctx_leaf_err(&leaf));
}
static int data;
static void leaf_write_cancel(void) {
    data = 1;
    ctx_leaf_cancel(&leaf);
}
static void leaf_read(void) {
    if (ctx_leaf_err(&leaf)) SCHED_CHECK(data == 1);
}
static void check_leaf(void) {
    SCHED_CHECK(ctx_leaf_err(&leaf));
    ctx_end(top);
}

/* -- contention -- */

/* The next contended attach gives the parent shards. */
static void setup_contended(void) {
    top = ctx_with_cancel(ctx_background());
    mid = ctx_retain(top);
    top->list.contended = CTX__CONTENDED - 1;
}
static void make_two(void) {
    ctx_t *one = ctx_with_cancel(top), *two = ctx_with_cancel(top);
    ctx_end(one);
    ctx_end(two);
}
static void make_keep(void) {
    int i = sched_thread() == 1 ? 2 : 0;
    made[i] = ctx_with_cancel(top);
    made[i + 1] = ctx_with_cancel(top);
}
static void cancel_contended(void) {
    ctx_cancel(top);
    SCHED_CHECK(ctx_err(top));
}
static void make_contended_end(void) {
    ctx_t *own = ctx_with_cancel(top);
    ctx_end(own);
    ctx_end(top);
}
static void check_contended(void) {
    ctx_release(mid);
    ctx_end(top);
}
static void check_kept(void) {
    int i;
    for (i = 0; i < 4; i++) {
        SCHED_CHECK(ctx_err(made[i]));
        ctx_end(made[i]);
    }
    check_contended();
}

/* Many children, for the random strategy. There is no memory for shards. */
static void setup_many(void) {
    top = ctx_with_cancel(ctx_background());
    sched_malloc_most = sizeof(ctx_t);
}
static void make_many(void) {
    int i;
    for (i = 0; i < 180; i++) ctx_end(ctx_with_cancel(top));
}
static void check_many(void) { ctx_end(top); }

/* -- the gate of a fork: ctx__fork_prepare() closes it, ctx__fork_parent() opens it -- */

static bool lock_is_free(const ctx_t *node) { return !node->list.mu; }
static void gate(void) {
    ctx__fork_prepare();
    SCHED_CHECK(lock_is_free(&ctx__root) && lock_is_free(top) && lock_is_free(mid));
    ctx__fork_parent();
}
/* No thread is inside while the gate is closed. */
static sched_flag_t closed;
static void gate_closed(void) {
    ctx__fork_prepare();
    sched_set(&closed);
    CTX__STORE(&closed, 0u, SEQ_CST);
    ctx__fork_parent();
}
static void inside(void) {
    ctx__thread_t *me = ctx__inside();
    SCHED_CHECK(!sched_is_set(&closed));
    ctx__outside(me);
}
/* A fork handler of the program's own, which runs while the gate is closed. */
static void gate_handler(void) {
    ctx__fork_prepare();
    ctx_cancel(top);
    SCHED_CHECK(ctx_err(mid));
    ctx__fork_parent();
}
static void setup_gate(void) {
    top = ctx_with_cancel(ctx_background());
    mid = ctx_with_cancel(top);
}
static void gate_make_end(void) { ctx_end(ctx_with_cancel(mid)); }
static void gate_cancel(void) {
    ctx_cancel(top);
    SCHED_CHECK(ctx_err(mid));
}
static ctx_on_done_t reg;
static void gate_callback(void *arg) {
    (void)arg;
    ctx_end(ctx_with_cancel(mid));
}
static void setup_gate_callback(void) {
    setup_gate();
    ctx_on_done(&reg, mid, gate_callback, NULL);
}
static void gate_stop(void) { ctx_on_done_stop(&reg); }
static void gate_wait(void) { SCHED_CHECK(ctx_wait(mid, CTX_FOREVER) == CTX_CANCELED); }
static void check_gate(void) {
    ctx_end(mid);
    ctx_end(top);
}

static const sched_scenario_t scenarios[] = {
    { "tree: detach / end of both", setup_values, { T(detach), T(end_mid), T(end_top) }, check_values, false },
    { "tree: detach / cancel", setup_values, { T(detach), T(cancel_top), T(end_mid) }, check_values_top, false },
    { "tree: value / end of both", setup_values, { T(derive_value), T(end_mid), T(end_top) }, NULL, false },
    { "tree: leaf / cancel leaf / cancel parent", setup_leaf,
      { T(leaf_look), T(leaf_cancel), T(cancel_leaf_parent) }, check_leaf, false },
    { "tree: leaf, write, cancel / read", setup_leaf, { T(leaf_write_cancel), T(leaf_read) }, check_leaf, false },
    { "tree: leaf with a deadline / cancel parent", setup_leaf_deadline,
      { T(leaf_look), T(cancel_leaf_parent) }, check_leaf, false },
    { "tree: contended, two makers", setup_contended, { T(make_two), T(make_two) }, check_contended, false },
    { "tree: contended, two makers / cancel", setup_contended,
      { T(make_keep), T(make_keep), T(cancel_contended) }, check_kept, false },
    { "tree: contended, makers / end", setup_contended, { T(make_contended_end), T(make_contended_end) }, NULL, false },
    { "tree: contended, make and end / cancel", setup_contended,
      { T(make_two), T(make_two), T(cancel_contended) }, check_contended, false },
    { "tree: many, no memory for shards", setup_many, { T(make_many), T(make_many), T(make_many) }, check_many, true },
    { "tree: gate / inside", setup_gate, { T(gate_closed), T(inside) }, check_gate, false },
    { "tree: gate / gate / inside", setup_gate, { T(gate_closed), T(gate_closed), T(inside) }, check_gate, false },
    { "tree: gate / make and end", setup_gate, { T(gate), T(gate_make_end) }, check_gate, false },
    { "tree: gate / cancel", setup_gate, { T(gate), T(gate_cancel) }, check_gate, false },
    { "tree: gate / make and end / cancel", setup_gate,
      { T(gate), T(gate_make_end), T(gate_cancel) }, check_gate, false },
    { "tree: gate / callback", setup_gate_callback, { T(gate), T(gate_cancel) }, check_gate, false },
    { "tree: gate / callback / stop", setup_gate_callback,
      { T(gate), T(gate_cancel), T(gate_stop) }, check_gate, false },
    { "tree: gate / wait / cancel", setup_gate, { T(gate), T(gate_wait), T(gate_cancel) }, check_gate, false },
    { "tree: gate, handler / cancel", setup_gate, { T(gate_handler), T(gate_cancel) }, check_gate, false },
    { "tree: gate / gate / cancel", setup_gate, { T(gate), T(gate), T(gate_cancel) }, check_gate, false },
};
SCHED_MAIN(scenarios)
