/* One path of one thread, `n` times, for instructions.sh to count: `bench_instructions FIGURE N`; without arguments,
   the names. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server;

typedef struct {
    uint64_t id, user;
    const char *path, *trace;
} request_t;

static const ctx_key_t request_key = CTX_KEY(request_t);

static void cancel_child(size_t n) {
    for (size_t i = 0; i < n; i++) ctx_end(ctx_with_cancel(server));
}

static void timeout_child(size_t n) {
    for (size_t i = 0; i < n; i++) ctx_end(ctx_with_timeout(server, CTX_S(30)));
}

static void request(size_t n) {
    for (size_t i = 0; i < n; i++) {
        request_t mine = {i, i, "/index", "b7ad6b71"};
        ctx_desc_t desc = {.timeout = CTX_S(30), .key = &request_key, .value = &mine};
        ctx_t *ctx = ctx_derive(server, &desc);
        for (int look = 0; look < 5; look++) {
            BENCH_KEEP(ctx_value(ctx, &request_key));
            BENCH_KEEP(ctx_err(ctx));
            BENCH_KEEP(ctx_err(ctx));
        }
        ctx_end(ctx);
    }
}

/* All made, canceled at once, and ended: what is made and ended is in the count. */
static void cancel_each(size_t n) {
    ctx_t **child = (ctx_t **)malloc(n * sizeof *child);
    ctx_t *parent = ctx_with_cancel(server);
    bench_check(child != NULL, "no memory");
    for (size_t i = 0; i < n; i++) child[i] = ctx_with_cancel(parent);
    ctx_cancel(parent);
    for (size_t i = 0; i < n; i++) ctx_end(child[i]);
    ctx_end(parent);
    free(child);
}

static void on_done(void *arg) { BENCH_KEEP(arg); }

static void after_stop(size_t n) {
    ctx_on_done_t after;
    for (size_t i = 0; i < n; i++) {
        ctx_on_done(&after, server, on_done, NULL);
        ctx_on_done_stop(&after);
    }
}

static void leaf(size_t n) {
    for (size_t i = 0; i < n; i++) {
        ctx_leaf_t leaf_;
        ctx_leaf_init(&leaf_, server, CTX_NO_DEADLINE);
        BENCH_KEEP(ctx_leaf_err(&leaf_));
    }
}

static void value(size_t n) {
    request_t mine = {1, 2, "", ""};
    ctx_t *ctx = ctx_with_value(server, &request_key, &mine);
    for (size_t i = 0; i < n; i++) BENCH_KEEP(ctx_value(ctx, &request_key));
    ctx_end(ctx);
}

static void err(size_t n) {
    for (size_t i = 0; i < n; i++) BENCH_KEEP(ctx_err(server));
}

static void poll_every(size_t n) {
    ctx_poll_t poll = ctx_poll_every(server, 1000);
    for (size_t i = 0; i < n; i++) BENCH_KEEP(ctx_poll(&poll));
}

static void semaphore(size_t n) {
    ctx_sem_t sem;
    bench_check(ctx_sem_init(&sem, 8) == 0, "no semaphore");
    for (size_t i = 0; i < n; i++) {
        BENCH_KEEP(ctx_sem_acquire(&sem, server, 1));
        ctx_sem_release(&sem, 1);
    }
    ctx_sem_destroy(&sem);
}

static const struct {
    const char *name;
    void (*run)(size_t n);
} figures[] = {
    {"err", err},
    {"poll_every", poll_every},
    {"leaf", leaf},
    {"value", value},
    {"cancel_child", cancel_child},
    {"timeout_child", timeout_child},
    {"request", request},
    {"cancel_each", cancel_each},
    {"after_stop", after_stop},
    {"semaphore", semaphore},
};

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        if (argc == 3 && !strcmp(argv[1], figures[i].name)) {
            server = ctx_with_cancel(ctx_background());
            figures[i].run((size_t)strtoul(argv[2], NULL, 10));
            ctx_end(server);
            ctx_runtime_stop();
            return 0;
        }
        if (argc == 1) puts(figures[i].name);
    }
    return argc != 1;
}
