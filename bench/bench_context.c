/* Contexts: make and end, alone and on a shared parent; a request's whole budget; canceling many; callbacks and
   leaves. */
#ifdef BENCH_COUNT
#include "count.h"
#endif
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server; /* the parent of everything here; cancellable, as a server's root is */

static void fresh_server(void) {
    ctx_end(server);
    server = ctx_with_cancel(ctx_background());
}

/* What a request carries. */
typedef struct {
    uint64_t id, user;
    const char *path, *trace;
} request_t;

static const ctx_key_t request_key = CTX_KEY(request_t);

static ctx_t *request_begin(uint64_t id) {
    request_t request = {id, id + 1, "/index", "b7ad6b71"};
    ctx_desc_t desc = {.timeout = CTX_S(30), .key = &request_key, .value = &request};
    return ctx_derive(server, &desc);
}

#ifndef BENCH_COUNT

static uint64_t cancel_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_cancel(server);
        BENCH_KEEP(ctx);
        ctx_end(ctx);
    }
    return bench_now() - began;
}

static uint64_t timeout_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_timeout(server, CTX_S(30));
        BENCH_KEEP(ctx);
        ctx_end(ctx);
    }
    return bench_now() - began;
}

/* Two threads with children below one parent (way 0), or each below its own (way 1). */
static ctx_t *parents[3];

static void fresh_parents(void) {
    for (size_t i = 0; i < 3; i++) {
        ctx_end(parents[i]);
        parents[i] = ctx_with_cancel(ctx_background());
    }
}

static ctx_t *parent_of(unsigned way, unsigned thread) { return parents[way == 0 ? 0 : 1 + thread]; }

static void cancel_children(unsigned way, unsigned thread, size_t n) {
    ctx_t *parent = parent_of(way, thread);
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_cancel(parent);
        BENCH_KEEP(ctx);
        ctx_end(ctx);
    }
}

static void timeout_children(unsigned way, unsigned thread, size_t n) {
    ctx_t *parent = parent_of(way, thread);
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_timeout(parent, CTX_S(30));
        BENCH_KEEP(ctx);
        ctx_end(ctx);
    }
}

static uint64_t request(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = request_begin(i);
        for (int step = 0; step < 5; step++) {
            const request_t *mine = (const request_t *)ctx_value(ctx, &request_key);
            BENCH_KEEP(mine);
            for (int look = 0; look < 2; look++) {
                int err = ctx_err(ctx);
                BENCH_KEEP(err);
            }
        }
        ctx_end(ctx);
    }
    return bench_now() - began;
}

static uint64_t monotonic_clock(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_time_t now = ctx_now();
        BENCH_KEEP(now);
    }
    return bench_now() - began;
}

/* `n` children below one parent, canceled by it `times` times: nanoseconds of the canceling alone. */
static uint64_t cancel_many(size_t n, size_t times) {
    ctx_t **child = (ctx_t **)malloc(n * sizeof *child);
    uint64_t spent = 0;
    bench_check(child != NULL, "no memory");
    for (size_t t = 0; t < times; t++) {
        ctx_t *parent = ctx_with_cancel(server);
        for (size_t i = 0; i < n; i++) child[i] = ctx_with_cancel(parent);
        uint64_t began = bench_now();
        ctx_cancel(parent);
        spent += bench_now() - began;
        bench_check(ctx_err(child[0]) && ctx_err(child[n - 1]), "a child was not canceled");
        for (size_t i = 0; i < n; i++) ctx_end(child[i]);
        ctx_end(parent);
    }
    free(child);
    return spent;
}

static uint64_t cancel_100(size_t n) { return cancel_many(100, n / 100 + 1); }
static uint64_t cancel_10k(size_t n) { return cancel_many(10000, n / 10000 + 1); }

static void on_done(void *arg) { BENCH_KEEP(arg); }

static uint64_t after_stop(size_t n) {
    ctx_on_done_t after;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_on_done(&after, server, on_done, &after);
        BENCH_BARRIER();
        bool stopped = ctx_on_done_stop(&after);
        BENCH_KEEP((int)stopped);
    }
    return bench_now() - began;
}

static uint64_t leaf(size_t n) {
    ctx_leaf_t leaf_;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        ctx_leaf_init(&leaf_, server, CTX_NO_DEADLINE);
        BENCH_KEEP(&leaf_);
        int err = ctx_leaf_err(&leaf_);
        BENCH_KEEP(err);
    }
    return bench_now() - began;
}

int main(void) {
    static const bench_ways_t cancel_ways = {"cancel_child_shared", cancel_children, fresh_parents};
    static const bench_ways_t timeout_ways = {"timeout_child_shared", timeout_children, fresh_parents};
    fresh_server();
    bench_run("cancel_child", cancel_child, 2000000);
    bench_run("timeout_child", timeout_child, 1000000);
    bench_run("request", request, 1000000);
    bench_run("clock", monotonic_clock, 1000000);
    bench_run("cancel_each_100", cancel_100, 500000);
    bench_run("cancel_each_10k", cancel_10k, 500000);
    if (bench_wants("cancel_each_1m")) {
        size_t n = bench_scaled(1000000);
        cancel_many(n, 1);
        bench_print("cancel_each_1m", (double)cancel_many(n, 2) / (double)n / 2, "ns");
    }
    bench_run("after_stop", after_stop, 2000000);
    bench_run("leaf", leaf, 5000000);
    bench_two_threads("cancel_child_2t", cancel_child, 1000000, fresh_server);
    bench_two_threads("timeout_child_2t", timeout_child, 500000, fresh_server);
    bench_two_ways(&cancel_ways, 20000, "cancel_child_shared_each", "cancel_child_apart_each");
    bench_two_ways(&timeout_ways, 8000, "timeout_child_shared_each", "timeout_child_apart_each");
    for (size_t i = 0; i < 3; i++) ctx_end(parents[i]);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}

#else /* BENCH_COUNT */

#define LIVE 10000

/* Allocations and bytes asked for while LIVE contexts are made and all stay, so that nothing comes from a cache. */
static void count_live(const char *figure, ctx_t *(*make)(uint64_t id)) {
    static ctx_t *live[LIVE];
    char name[64];
    uint64_t allocations, bytes;
    fresh_server();
    ctx_end(make(0));
    ctx_runtime_stop(); /* drops the caches */
    ctx_end(make(0));   /* brings back what is there once for all */
    allocations = count_allocations_now();
    bytes = count_bytes_now();
    for (size_t i = 0; i < LIVE; i++) live[i] = make(i);
    allocations = count_allocations_now() - allocations;
    bytes = count_bytes_now() - bytes;
    for (size_t i = 0; i < LIVE; i++) ctx_end(live[i]);
    snprintf(name, sizeof name, "%s_allocs", figure);
    bench_print(name, (double)allocations / LIVE, "");
    snprintf(name, sizeof name, "%s_bytes", figure);
    bench_print(name, (double)bytes / LIVE, "B");

    for (size_t i = 0; i < LIVE; i++) ctx_end(make(i));
    allocations = count_allocations_now();
    for (size_t i = 0; i < LIVE; i++) ctx_end(make(i));
    snprintf(name, sizeof name, "%s_allocs_warm", figure);
    bench_print(name, (double)(count_allocations_now() - allocations) / LIVE, "");
}

static ctx_t *cancel_begin(uint64_t id) {
    (void)id;
    return ctx_with_cancel(server);
}

static ctx_t *timeout_begin(uint64_t id) {
    (void)id;
    return ctx_with_timeout(server, CTX_S(30));
}

int main(void) {
    count_live("cancel_child", cancel_begin);
    count_live("timeout_child", timeout_begin);
    count_live("request", request_begin);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}

#endif
