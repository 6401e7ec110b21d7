/* Channels: items from thread to thread, through room and through none; without waiting; and select. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

#define CAPACITY 1024

static ctx_t *server;
static ctx_chan_t *chan;

static ctx_chan_t *channel_of(size_t capacity) {
    ctx_chan_t *made = ctx_chan_new(sizeof(uint64_t), capacity);
    bench_check(made != NULL, "no channel");
    return made;
}

static uint64_t sent, received; /* [atomic] sums of the items */

static void send_many(size_t n) {
    ctx_chan_t *mine = chan;
    ctx_t *ctx = server;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        bench_check(ctx_chan_send(mine, ctx, &i) == 0, "an item was not sent");
        sum += i;
    }
    __atomic_add_fetch(&sent, sum, __ATOMIC_RELAXED);
}

static void receive_many(size_t n) {
    ctx_chan_t *mine = chan;
    ctx_t *ctx = server;
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t item;
        bench_check(ctx_chan_recv(mine, ctx, &item) == 0, "no item was received");
        sum += item;
    }
    __atomic_add_fetch(&received, sum, __ATOMIC_RELAXED);
}

static uint64_t pass(size_t pairs, size_t n, bool apart) {
    chan = channel_of(CAPACITY);
    uint64_t spent = bench_queue(send_many, receive_many, pairs, n, apart);
    bench_check(sent == received && ctx_chan_len(chan) == 0, "items were lost");
    ctx_chan_free(chan);
    return spent;
}

static uint64_t one_to_one(size_t n) { return pass(1, n, false); }
static uint64_t one_to_one_apart(size_t n) { return pass(1, n, true); }
static uint64_t four_to_four(size_t n) { return pass(4, n, false); }

/* There and back: two channels without room and a thread that sends back what it gets. */
static ctx_chan_t *back;

static void *echo_main(void *arg) {
    for (size_t n = *(const size_t *)arg; n > 0; n--) {
        uint64_t item;
        bench_check(ctx_chan_recv(chan, server, &item) == 0, "no item came");
        bench_check(ctx_chan_send(back, server, &item) == 0, "an item did not go back");
    }
    return NULL;
}

static uint64_t pingpong(size_t n) {
    pthread_t echo;
    chan = channel_of(0);
    back = channel_of(0);
    bench_check(pthread_create(&echo, NULL, echo_main, &n) == 0, "no thread");
    uint64_t began = bench_now();
    for (uint64_t i = 0; i < n; i++) {
        uint64_t item = 0;
        bench_check(ctx_chan_send(chan, server, &i) == 0, "an item did not go");
        bench_check(ctx_chan_recv(back, server, &item) == 0 && item == i, "an item did not come back");
    }
    uint64_t spent = bench_now() - began;
    pthread_join(echo, NULL);
    ctx_chan_free(chan);
    ctx_chan_free(back);
    return spent;
}

/* The floor where both sides sleep: each has a futex of its own. */
static uint32_t there_word, back_word; /* [atomic] the round that is asked for, and that is answered */

static void await_round(uint32_t *word, uint32_t round) {
    uint32_t now;
    while ((now = __atomic_load_n(word, __ATOMIC_ACQUIRE)) != round) bench_futex_wait(word, now);
}

static void announce_round(uint32_t *word, uint32_t round) {
    __atomic_store_n(word, round, __ATOMIC_RELEASE);
    bench_futex_wake(word);
}

static void *bare_main(void *arg) {
    size_t n = *(const size_t *)arg;
    for (uint32_t round = 1; round <= n; round++) {
        await_round(&there_word, round);
        announce_round(&back_word, round);
    }
    return NULL;
}

static uint64_t pingpong_futex(size_t n) {
    pthread_t bare;
    there_word = back_word = 0;
    bench_check(pthread_create(&bare, NULL, bare_main, &n) == 0, "no thread");
    uint64_t began = bench_now();
    for (uint32_t round = 1; round <= n; round++) {
        announce_round(&there_word, round);
        await_round(&back_word, round);
    }
    uint64_t spent = bench_now() - began;
    pthread_join(bare, NULL);
    return spent;
}

static uint64_t try_pair(size_t n) {
    chan = channel_of(CAPACITY);
    uint64_t began = bench_now();
    for (uint64_t i = 0; i < n; i++) {
        uint64_t item;
        bench_check(ctx_chan_try_send(chan, &i) == 0, "no room");
        bench_check(ctx_chan_try_recv(chan, &item) == 0, "nothing there");
    }
    uint64_t spent = bench_now() - began;
    ctx_chan_free(chan);
    return spent;
}

/* All of the channels have items at every select, for CAPACITY selects cannot empty one; filling them up does not
   count. */
static uint64_t select_ready(size_t channels, size_t n) {
    ctx_case_t cases[8];
    uint64_t spent = 0, item = 1;
    for (size_t c = 0; c < channels; c++) {
        ctx_case_t receive = {channel_of(CAPACITY), CTX_RECV, &item, 0};
        cases[c] = receive;
    }
    for (size_t left = n; left > 0;) {
        size_t some = left < CAPACITY ? left : CAPACITY;
        for (size_t c = 0; c < channels; c++)
            while (ctx_chan_try_send(cases[c].chan, &item) == 0) continue;
        uint64_t began = bench_now();
        for (size_t i = 0; i < some; i++) bench_check(ctx_select(server, cases, channels) >= 0, "a select failed");
        spent += bench_now() - began;
        left -= some;
    }
    for (size_t c = 0; c < channels; c++) ctx_chan_free(cases[c].chan);
    return spent;
}

static uint64_t select_2(size_t n) { return select_ready(2, n); }
static uint64_t select_8(size_t n) { return select_ready(8, n); }

int main(void) {
    static const bench_figure_t rendezvous[] = {{"chan_pingpong", pingpong}, {"chan_pingpong_futex", pingpong_futex}};
    server = ctx_with_cancel(ctx_background());
    bench_every_run("chan_1_1", one_to_one, 2000000);
    bench_every_run("chan_1_1_apart", one_to_one_apart, 1000000);
    bench_every_run("chan_4_4", four_to_four, 1000000);
    bench_together(rendezvous, 2, 100000);
    bench_run("chan_try", try_pair, 2000000);
    bench_run("select_2", select_2, 500000);
    bench_run("select_8", select_8, 500000);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
