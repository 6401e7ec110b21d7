/* nsync: nsync_note, which is a tree of cancellations with deadlines, and nsync_mu. */
#include "../bench.h"
#include <nsync.h>

static nsync_note server;

static void fresh_server(void) {
    if (server) nsync_note_free(server);
    server = nsync_note_new(NULL, nsync_time_no_deadline);
}

static uint64_t cancel_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        nsync_note note = nsync_note_new(server, nsync_time_no_deadline);
        BENCH_KEEP(note);
        nsync_note_free(note);
    }
    return bench_now() - began;
}

static uint64_t timeout_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        nsync_note note = nsync_note_new(server, nsync_time_add(nsync_time_now(), nsync_time_s_ns(30, 0)));
        BENCH_KEEP(note);
        nsync_note_free(note);
    }
    return bench_now() - began;
}

static uint64_t cancel_many(size_t n, size_t times) {
    nsync_note *child = (nsync_note *)malloc(n * sizeof *child);
    uint64_t spent = 0;
    bench_check(child != NULL, "no memory");
    for (size_t t = 0; t < times; t++) {
        nsync_note parent = nsync_note_new(server, nsync_time_no_deadline);
        for (size_t i = 0; i < n; i++) child[i] = nsync_note_new(parent, nsync_time_no_deadline);
        uint64_t began = bench_now();
        nsync_note_notify(parent);
        spent += bench_now() - began;
        bench_check(nsync_note_is_notified(child[0]) && nsync_note_is_notified(child[n - 1]), "not canceled");
        for (size_t i = 0; i < n; i++) nsync_note_free(child[i]);
        nsync_note_free(parent);
    }
    free(child);
    return spent;
}

static uint64_t cancel_100(size_t n) { return cancel_many(100, n / 100 + 1); }
static uint64_t cancel_10k(size_t n) { return cancel_many(10000, n / 10000 + 1); }

static uint64_t err_loop(size_t n) {
    nsync_note mine = server;
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (nsync_note_is_notified(mine)) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

static nsync_mu mu = NSYNC_MU_INIT;

static uint64_t mutex_pair(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        nsync_mu_lock(&mu);
        BENCH_BARRIER();
        nsync_mu_unlock(&mu);
    }
    return bench_now() - began;
}

static nsync_note waited;

static void note_prepare(void) { waited = nsync_note_new(server, nsync_time_no_deadline); }
static void note_park(void) { nsync_note_wait(waited, nsync_time_no_deadline); }
static void note_wake(void) { nsync_note_notify(waited); }
static void note_finish(void) { nsync_note_free(waited); }

/* Hand-over: a new note of each round, which the other side waits for, as ctx_wait() does for a context. */
static struct {
    nsync_note note[3]; /* of rounds in turn */
    size_t given, taken;
} turn[2];

static void turn_fresh(void) {
    memset(turn, 0, sizeof turn);
    for (unsigned side = 0; side < 2; side++) turn[side].note[0] = nsync_note_new(server, nsync_time_no_deadline);
}
static void turn_give(unsigned side) {
    size_t round = turn[side].given++;
    if (round > 0) nsync_note_free(turn[side].note[(round + 2) % 3]);
    turn[side].note[(round + 1) % 3] = nsync_note_new(server, nsync_time_no_deadline);
    nsync_note_notify(turn[side].note[round % 3]);
}
static void turn_take(unsigned side) {
    nsync_note_wait(turn[!side].note[turn[!side].taken++ % 3], nsync_time_no_deadline);
}
static void turn_over(void) {
    for (unsigned side = 0; side < 2; side++) {
        if (turn[side].given > 0) nsync_note_free(turn[side].note[(turn[side].given + 2) % 3]);
        nsync_note_free(turn[side].note[turn[side].given % 3]);
    }
}

int main(int argc, char **argv) {
    static const bench_wake_t way = {"wait_wake", note_prepare, note_park, note_wake, note_finish};
    static const bench_hand_t hand = {"cancel", turn_fresh, turn_give, turn_take, turn_over, false};
    fresh_server();
    if (bench_section(argc, argv, "context")) {
        bench_run("cancel_child", cancel_child, 1000000);
        bench_run("timeout_child", timeout_child, 1000000);
        bench_run("cancel_each_100", cancel_100, 500000);
        bench_run("cancel_each_10k", cancel_10k, 500000);
        if (bench_wants("cancel_each_1m")) {
            size_t n = bench_scaled(1000000);
            bench_print("cancel_each_1m", (double)cancel_many(n, 1) / (double)n, "ns");
        }
        bench_two_threads("cancel_child_2t", cancel_child, 500000, fresh_server);
        bench_two_threads("timeout_child_2t", timeout_child, 500000, fresh_server);
    }
    if (bench_section(argc, argv, "polling")) bench_run("err_loop", err_loop, 5000000);
    if (bench_section(argc, argv, "semaphore")) bench_run("mutex_pair", mutex_pair, 10000000);
    if (bench_section(argc, argv, "handover")) bench_all_hands(argv[0], &hand, 1, false, 0);
    if (bench_section(argc, argv, "waiting") && bench_wants("wait_wake")) bench_wakes(&way, 1, 1000);
    nsync_note_free(server);
    return 0;
}
