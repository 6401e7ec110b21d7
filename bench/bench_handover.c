/* Hand-over: two threads that take turns, through everything that a thread can wait for, beside a bare futex each:
   on all cores, on one, and where each side computes for a while between its turns. And what a wait costs that is over
   once a millisecond. */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server;

/* == bare futexes ================================================= */

static struct {
    uint32_t count; /* [atomic] counts what this side has given */
    uint32_t taken; /* [owner thread] what the other side has taken of it */
    char own_line[56];
} word[2];

static void futex_fresh(void) { memset(word, 0, sizeof word); }

static void futex_give(unsigned side) {
    __atomic_add_fetch(&word[side].count, 1, __ATOMIC_RELEASE);
    bench_futex_wake(&word[side].count);
}

static void futex_take(unsigned side) {
    uint32_t seen = word[!side].taken++;
    while (__atomic_load_n(&word[!side].count, __ATOMIC_ACQUIRE) == seen) bench_futex_wait(&word[!side].count, seen);
}

/* == channels ===================================================== */

/* `chan[side]` is the one that this side sends to. Nothing is ever sent to `quiet`. */
static ctx_chan_t *chan[2], *quiet;

static ctx_chan_t *channel_of(size_t capacity) {
    ctx_chan_t *made = ctx_chan_new(sizeof(uint64_t), capacity);
    bench_check(made != NULL, "no channel");
    return made;
}

static void rendezvous_fresh(void) { chan[0] = channel_of(0), chan[1] = channel_of(0); }
static void channel_fresh(void) { chan[0] = channel_of(1), chan[1] = channel_of(1); }

static void channel_give(unsigned side) {
    uint64_t item = side;
    bench_check(ctx_chan_send(chan[side], server, &item) == 0, "an item was not sent");
}

static void channel_take(unsigned side) {
    uint64_t item;
    bench_check(ctx_chan_recv(chan[!side], server, &item) == 0, "no item was received");
    bench_check(item == !side, "a wrong item was received");
}

static void channel_over(void) {
    ctx_chan_free(chan[0]);
    ctx_chan_free(chan[1]);
}

static void select_fresh(void) {
    channel_fresh();
    quiet = channel_of(1);
}

static void select_take(unsigned side) {
    uint64_t item;
    ctx_case_t cases[2] = {{chan[!side], CTX_RECV, &item, 0}, {quiet, CTX_RECV, &item, 0}};
    bench_check(ctx_select(server, cases, 2) == 0 && cases[0].rc == 0, "a select failed");
}

static void select_over(void) {
    channel_over();
    ctx_chan_free(quiet);
}

/* == semaphores =================================================== */

static ctx_sem_t sem[2];

static void semaphore_take(unsigned side) {
    bench_check(ctx_sem_acquire(&sem[!side], server, 1) == 0, "no permit came");
}

static void semaphore_give(unsigned side) { ctx_sem_release(&sem[side], 1); }

/* All permits begin taken, and end taken. There are many, since a giver may be ahead of a taker that is late. */
#define PERMITS 1000

static void semaphore_fresh(void) {
    for (unsigned side = 0; side < 2; side++) {
        bench_check(ctx_sem_init(&sem[side], PERMITS) == 0, "no semaphore");
        bench_check(ctx_sem_acquire(&sem[side], server, PERMITS) == 0, "no permits");
    }
}

static void semaphore_over(void) {
    for (unsigned side = 0; side < 2; side++) {
        ctx_sem_release(&sem[side], PERMITS);
        ctx_sem_destroy(&sem[side]);
    }
}

/* == tasks ======================================================== */

static int paused_op(ctx_t *ctx, void *arg) {
    (void)arg;
    bench_hand_pause();
    return ctx_err(ctx);
}

static ctx_group_t *group;

static void group_give(unsigned side) {
    (void)side;
    group = ctx_group_new(server, NULL);
    bench_check(group != NULL, "no group");
    bench_check(ctx_group_go(group, paused_op, NULL) == 0, "a task was not taken");
}

static void group_take(unsigned side) {
    (void)side;
    bench_check(ctx_group_wait(group) == 0, "a task failed");
}

static int sending_op(ctx_t *ctx, void *arg) {
    uint64_t item = 1;
    (void)arg;
    bench_hand_pause();
    return ctx_chan_send(chan[1], ctx, &item);
}

static void go_give(unsigned side) {
    (void)side;
    bench_check(ctx_go(server, "send", sending_op, NULL) == 0, "a spawn failed");
}

static void go_over(void) {
    bench_check(ctx_go_wait(server) == 0, "work is left");
    channel_over();
}

static void go_wait_give(unsigned side) {
    (void)side;
    bench_check(ctx_go(server, "no-op", paused_op, NULL) == 0, "a spawn failed");
}

static void go_wait_take(unsigned side) {
    (void)side;
    bench_check(ctx_go_wait(server) == 0, "work is left");
}

/* Leaves the idle threads of the runs before. */
static void tasks_fresh(void) {}

/* == contexts ===================================================== */

/* A side gives by canceling its context of this round, and makes that of the next round before. It ends the one of the
   round before, which the other side no longer uses: that one has given since. */
static struct {
    ctx_t *ctx[3]; /* of rounds in turn; the other side reads that of its round */
    size_t given;  /* [owner thread] rounds */
    size_t taken;  /* [the other thread] rounds */
} turn[2];

static void cancel_fresh(void) {
    memset(turn, 0, sizeof turn);
    for (unsigned side = 0; side < 2; side++) turn[side].ctx[0] = ctx_with_cancel(server);
}

static void cancel_give(unsigned side) {
    size_t round = turn[side].given++;
    ctx_end(turn[side].ctx[(round + 2) % 3]); /* NULL in the first round */
    turn[side].ctx[(round + 1) % 3] = ctx_with_cancel(server);
    ctx_cancel(turn[side].ctx[round % 3]);
}

static void cancel_take(unsigned side) {
    size_t round = turn[!side].taken++;
    bench_check(ctx_wait(turn[!side].ctx[round % 3], CTX_FOREVER) == CTX_CANCELED, "a wait failed");
}

static void cancel_over(void) {
    for (unsigned side = 0; side < 2; side++) {
        ctx_end(turn[side].ctx[(turn[side].given + 2) % 3]);
        ctx_end(turn[side].ctx[turn[side].given % 3]);
    }
}

int main(int argc, char **argv) {
    static const bench_hand_t hands[] = {
        {"futex", futex_fresh, futex_give, futex_take, NULL, false},
        {"rendezvous", rendezvous_fresh, channel_give, channel_take, channel_over, false},
        {"channel", channel_fresh, channel_give, channel_take, channel_over, false},
        {"select", select_fresh, channel_give, select_take, select_over, false},
        {"semaphore", semaphore_fresh, semaphore_give, semaphore_take, semaphore_over, false},
        {"cancel", cancel_fresh, cancel_give, cancel_take, cancel_over, false},
        {"group", tasks_fresh, group_give, group_take, NULL, true},
        {"go", channel_fresh, go_give, channel_take, go_over, true},
        {"go_wait", tasks_fresh, go_wait_give, go_wait_take, NULL, true},
    };
    (void)argc;
    server = ctx_with_cancel(ctx_background());
    bench_all_hands(argv[0], hands, sizeof hands / sizeof *hands, true, 5);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
