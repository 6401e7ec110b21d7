/* Values: looking one up from far below where it was set, and among many. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

typedef struct {
    uint64_t id;
    const char *user;
} value_t;

#define KEYS 12
#define DEEPEST 1000

static const ctx_key_t key[KEYS] = {CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t),
                                    CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t),
                                    CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t), CTX_KEY(value_t)};

static const ctx_key_t absent = CTX_KEY(value_t);

static const ctx_t *from;
static const ctx_key_t *wanted;

static uint64_t look_up(size_t n) {
    const ctx_t *ctx = from;
    const ctx_key_t *which = wanted;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        const void *value = ctx_value(ctx, which);
        BENCH_KEEP(value);
    }
    return bench_now() - began;
}

static ctx_t *chain[DEEPEST]; /* chain[d - 1] is d contexts deep; the value was set by the first */

static uint64_t look_up_from(const ctx_t *ctx, size_t n) {
    from = ctx;
    return look_up(n);
}

static uint64_t depth_1(size_t n) { return look_up_from(chain[0], n); }
static uint64_t depth_12(size_t n) { return look_up_from(chain[11], n); }
static uint64_t depth_1000(size_t n) { return look_up_from(chain[DEEPEST - 1], n); }

static uint64_t attach(size_t n) {
    value_t value = {1, "anna"};
    ctx_t *parent = ctx_background();
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_value(parent, &key[0], &value);
        BENCH_KEEP(ctx);
        ctx_end(ctx);
    }
    return bench_now() - began;
}

int main(void) {
    static const bench_figure_t depths[] = {
        {"value_depth_1", depth_1}, {"value_depth_12", depth_12}, {"value_depth_1000", depth_1000}};
    static ctx_t *with_keys[KEYS];
    value_t value = {1, "anna"};

    chain[0] = ctx_with_value(ctx_background(), &key[0], &value);
    for (size_t i = 1; i < DEEPEST; i++) chain[i] = ctx_with_cancel(chain[i - 1]);
    wanted = &key[0];
    bench_together(depths, 3, 10000000);
    for (size_t i = DEEPEST; i-- > 0;) ctx_end(chain[i]);

    /* Twelve values, one a context; the one wanted was set first. */
    for (size_t i = 0; i < KEYS; i++) {
        value.id = i;
        with_keys[i] = ctx_with_value(i ? with_keys[i - 1] : ctx_background(), &key[i], &value);
    }
    from = with_keys[KEYS - 1];
    bench_check(((const value_t *)ctx_value(from, wanted))->id == 0, "the wrong value");
    bench_run("value_keys_12", look_up, 10000000);
    wanted = &absent;
    bench_check(ctx_value(from, wanted) == NULL, "a value from nowhere");
    bench_run("value_keys_12_absent", look_up, 10000000);
    for (size_t i = KEYS; i-- > 0;) ctx_end(with_keys[i]);

    bench_run("value_attach", attach, 1000000);
    ctx_runtime_stop();
    return 0;
}
