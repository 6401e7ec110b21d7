/* GLib: GCancellable, whose child is one connected to its parent by a handler; GThreadPool, whose tasks have no
   context; and GAsyncQueue, which has no bound and cannot be canceled. */
#include "../bench.h"
#include <gio/gio.h>
#include <semaphore.h>

static GCancellable *server;

static void fresh_server(void) {
    if (server) g_object_unref(server);
    server = g_cancellable_new();
}

static void cancel_it(GCancellable *parent, gpointer child) {
    (void)parent;
    g_cancellable_cancel((GCancellable *)child);
}

static gulong child_of(GCancellable *parent, GCancellable **child) {
    *child = g_cancellable_new();
    return g_cancellable_connect(parent, G_CALLBACK(cancel_it), *child, NULL);
}

static uint64_t cancel_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        GCancellable *child;
        gulong handler = child_of(server, &child);
        BENCH_KEEP(child);
        g_cancellable_disconnect(server, handler);
        g_object_unref(child);
    }
    return bench_now() - began;
}

static uint64_t cancel_alone(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        GCancellable *child = g_cancellable_new();
        BENCH_KEEP(child);
        g_object_unref(child);
    }
    return bench_now() - began;
}

static uint64_t cancel_many(size_t n, size_t times) {
    GCancellable **child = (GCancellable **)malloc(n * sizeof *child);
    uint64_t spent = 0;
    bench_check(child != NULL, "no memory");
    for (size_t t = 0; t < times; t++) {
        GCancellable *parent = g_cancellable_new();
        for (size_t i = 0; i < n; i++) child_of(parent, &child[i]);
        uint64_t began = bench_now();
        g_cancellable_cancel(parent);
        spent += bench_now() - began;
        bench_check(g_cancellable_is_cancelled(child[0]) && g_cancellable_is_cancelled(child[n - 1]), "not canceled");
        g_object_unref(parent);
        for (size_t i = 0; i < n; i++) g_object_unref(child[i]);
    }
    free(child);
    return spent;
}

static uint64_t cancel_100(size_t n) { return cancel_many(100, n / 100 + 1); }
static uint64_t cancel_10k(size_t n) { return cancel_many(10000, n / 10000 + 1); }

static void on_done(GCancellable *cancellable, gpointer arg) {
    (void)cancellable;
    BENCH_KEEP(arg);
}

static uint64_t after_stop(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        gulong handler = g_cancellable_connect(server, G_CALLBACK(on_done), server, NULL);
        BENCH_KEEP(handler);
        g_cancellable_disconnect(server, handler);
    }
    return bench_now() - began;
}

static uint64_t err_loop(size_t n) {
    GCancellable *mine = server;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (g_cancellable_is_cancelled(mine)) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

/* A task is the address of this, or the semaphore that says that the last one ran. */
static char no_op;

static void run_task(gpointer task, gpointer user) {
    (void)user;
    if (task != &no_op) sem_post((sem_t *)task);
}

static uint64_t flood(GThreadPool *pool, size_t n) {
    sem_t done;
    sem_init(&done, 0, 0);
    uint64_t began = bench_now();
    for (size_t i = 1; i < n; i++) g_thread_pool_push(pool, &no_op, NULL);
    g_thread_pool_push(pool, &done, NULL);
    while (sem_wait(&done) != 0) {
    }
    uint64_t spent = bench_now() - began;
    sem_destroy(&done);
    return spent;
}

static void flood_figure(const char *figure, int workers) {
    size_t n = bench_scaled(100000);
    if (!bench_wants(figure)) return;
    GThreadPool *pool = g_thread_pool_new(run_task, NULL, workers, FALSE, NULL);
    flood(pool, n / 2 + 1);
    for (int run = 0; run < 5; run++) bench_print(figure, (double)flood(pool, n) / (double)n, "ns");
    g_thread_pool_free(pool, FALSE, TRUE);
}

static void burst(void *arg) {
    for (int i = 0; i < BENCH_BURST; i++) g_thread_pool_push((GThreadPool *)arg, &no_op, NULL);
}

static GAsyncQueue *queue;
static uint64_t sent, received; /* [atomic] sums of the items, which are pointers */

static void send_many(size_t n) {
    uint64_t sum = 0;
    for (size_t i = 1; i <= n; i++) {
        g_async_queue_push(queue, GSIZE_TO_POINTER(i));
        sum += i;
    }
    __atomic_add_fetch(&sent, sum, __ATOMIC_RELAXED);
}

static void receive_many(size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += GPOINTER_TO_SIZE(g_async_queue_pop(queue));
    __atomic_add_fetch(&received, sum, __ATOMIC_RELAXED);
}

static uint64_t pass(size_t pairs, size_t n, bool apart) {
    queue = g_async_queue_new();
    uint64_t spent = bench_queue(send_many, receive_many, pairs, n, apart);
    bench_check(sent == received && g_async_queue_length(queue) == 0, "items were lost");
    g_async_queue_unref(queue);
    return spent;
}

static uint64_t one_to_one(size_t n) { return pass(1, n, false); }
static uint64_t one_to_one_apart(size_t n) { return pass(1, n, true); }
static uint64_t four_to_four(size_t n) { return pass(4, n, false); }

static uint64_t try_pair(size_t n) {
    queue = g_async_queue_new();
    uint64_t began = bench_now();
    for (size_t i = 1; i <= n; i++) {
        g_async_queue_push(queue, GSIZE_TO_POINTER(i));
        bench_check(g_async_queue_try_pop(queue) != NULL, "nothing there");
    }
    uint64_t spent = bench_now() - began;
    g_async_queue_unref(queue);
    return spent;
}

/* Hand-over: a queue of each side. */
static GAsyncQueue *turn[2];

static void turn_fresh(void) { turn[0] = g_async_queue_new(), turn[1] = g_async_queue_new(); }
static void turn_give(unsigned side) { g_async_queue_push(turn[side], turn); }
static void turn_take(unsigned side) { g_async_queue_pop(turn[!side]); }
static void turn_over(void) {
    g_async_queue_unref(turn[0]);
    g_async_queue_unref(turn[1]);
}

int main(int argc, char **argv) {
    static const bench_hand_t hand = {"channel", turn_fresh, turn_give, turn_take, turn_over, false};
    fresh_server();
    if (bench_section(argc, argv, "context")) {
        bench_run("cancel_child", cancel_child, 200000);
        bench_run("cancel_child_alone", cancel_alone, 500000);
        bench_run("cancel_each_100", cancel_100, 100000);
        bench_run("cancel_each_10k", cancel_10k, 20000);
        bench_run("after_stop", after_stop, 500000);
        bench_two_threads("cancel_child_2t", cancel_child, 100000, fresh_server);
    }
    if (bench_section(argc, argv, "polling")) bench_run("err_loop", err_loop, 20000000);
    if (bench_section(argc, argv, "pool")) {
        flood_figure("pool_plain_2", 2);
        flood_figure("pool_plain_8", 8);
        if (bench_wants("detached")) {
            GThreadPool *pool = g_thread_pool_new(run_task, NULL, 2, FALSE, NULL);
            flood(pool, 10000);
            bench_print_paced("detached", burst, pool);
            g_thread_pool_free(pool, FALSE, TRUE);
        }
    }
    if (bench_section(argc, argv, "channel")) {
        bench_every_run("chan_1_1", one_to_one, 1000000);
        bench_every_run("chan_1_1_apart", one_to_one_apart, 1000000);
        bench_every_run("chan_4_4", four_to_four, 1000000);
        bench_run("chan_try", try_pair, 1000000);
    }
    if (bench_section(argc, argv, "handover")) bench_all_hands(argv[0], &hand, 1, false, 0);
    g_object_unref(server);
    return 0;
}
