/* Channels and select: no item is lost or doubled, no waiter is left behind, a call that cannot be done says so only if
   it cannot, and a channel may be freed by the thread that has seen the last of it. */
#include "sched.h"

static ctx_chan_t *a, *b;
static ctx_t *ctx;
static sched_flag_t told, said; /* between threads of a scenario */
static bool nothing_left;       /* a thread has seen that no item can be in `a` any more */
static struct {
    int sent, taken;     /* sums of the items of calls that succeeded */
    int n_sent, n_taken; /* ... and how many */
} of[SCHED_THREADS];     /* each thread's own */

static void setup_capacity(size_t capacity) {
    a = ctx_chan_new(sizeof(int), capacity);
    b = ctx_chan_new(sizeof(int), capacity);
    SCHED_CHECK(a && b);
    ctx = ctx_with_cancel(ctx_background());
}
static void setup_0(void) { setup_capacity(0); }
static void setup_1(void) { setup_capacity(1); }
static void setup_2(void) { setup_capacity(2); }

static void note_sent(int item) {
    of[sched_thread()].sent += item;
    of[sched_thread()].n_sent++;
}
static void note_taken(int item) {
    of[sched_thread()].taken += item;
    of[sched_thread()].n_taken++;
}
static void setup_1_full(void) {
    int item = 100;
    setup_1();
    SCHED_CHECK(ctx_chan_try_send(a, &item) == 0);
    note_sent(item);
}

/* Whatever was sent and not taken is still there, and nobody who has gone is queued. */
static void check(void) {
    ctx_chan_t *chans[2] = { a, b };
    int i, item, sum = 0, n = 0;
    if (nothing_left) SCHED_CHECK(ctx_chan_len(a) == 0);
    for (i = 0; i < 2; i++) {
        while (ctx_chan_try_recv(chans[i], &item) == 0) note_taken(item);
        ctx_chan_free(chans[i]);
    }
    for (i = 0; i < SCHED_THREADS; i++) {
        sum += of[i].sent - of[i].taken;
        n += of[i].n_sent - of[i].n_taken;
    }
    SCHED_CHECK(sum == 0 && n == 0);
    ctx_end(ctx);
}

static void send_with(ctx_chan_t *chan, ctx_t *with, int item) {
    int rc = ctx_chan_send(chan, with, &item);
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
    if (rc == 0) note_sent(item);
}
static int recv_with(ctx_chan_t *chan, ctx_t *with) {
    int item = -1, rc = ctx_chan_recv(chan, with, &item);
    SCHED_CHECK(rc == 0 || rc == CTX_CLOSED || rc == CTX_CANCELED);
    SCHED_CHECK(rc == 0 || item == -1);
    if (rc == 0) note_taken(item);
    return rc;
}
static void must_send(ctx_chan_t *chan, int item) {
    SCHED_CHECK(ctx_chan_send(chan, ctx_background(), &item) == 0);
    note_sent(item);
}
static void must_recv(ctx_chan_t *chan) { SCHED_CHECK(recv_with(chan, ctx_background()) == 0); }

/* -- send and receive -- */

static void send_1(void) { must_send(a, 1); }
static void send_2(void) { must_send(a, 2); }
static void send_twice(void) {
    must_send(a, 10);
    must_send(a, 20);
}
static void recv(void) { must_recv(a); }
static void recv_twice(void) {
    must_recv(a);
    must_recv(a);
}
static void recv_in_order(void) {
    int item = 0;
    SCHED_CHECK(ctx_chan_recv(a, ctx_background(), &item) == 0 && item == 10);
    SCHED_CHECK(ctx_chan_recv(a, ctx_background(), &item) == 0 && item == 20);
    note_taken(10);
    note_taken(20);
}

/* -- cancel and close -- */

static void cancel(void) { ctx_cancel(ctx); }
static void close_a(void) { SCHED_CHECK(ctx_chan_close(a) == 0); }
static void send_canceled(void) { send_with(a, ctx, 4); }
static void recv_canceled(void) { recv_with(a, ctx); }
static void recv_until_closed(void) {
    while (recv_with(a, ctx_background()) == 0) {}
    nothing_left = true;
}
static void send_or_closed(void) { send_with(a, ctx_background(), 8); }
static void send_twice_close(void) {
    send_twice();
    close_a();
}

/* A receive whose context was done before the item came takes nothing. */
static void recv_of_done(void) {
    int item = -1;
    SCHED_CHECK(ctx_chan_recv(a, ctx, &item) == CTX_CANCELED && item == -1);
}
static void cancel_send(void) {
    int item = 16;
    ctx_cancel(ctx);
    if (ctx_chan_try_send(a, &item) == 0) note_sent(item);
}
static void send_of_done(void) {
    int item = 32;
    SCHED_CHECK(ctx_chan_send(a, ctx, &item) == CTX_CANCELED);
}
static void cancel_recv(void) {
    int item;
    ctx_cancel(ctx);
    if (ctx_chan_try_recv(a, &item) == 0) note_taken(item);
}

/* Nothing is sent with a context that was seen to be done while the channel was empty. */
static void cancel_empty(void) {
    int item;
    ctx_cancel(ctx);
    if (ctx_chan_try_recv(a, &item) == 0) note_taken(item);
    nothing_left = true;
}

/* -- select -- */

static int select_of(ctx_t *with, ctx_chan_t *x, int x_op, ctx_chan_t *y, int y_op, int item) {
    int got[2] = { item, item }, at;
    ctx_case_t cases[2] = { { x, x_op, &got[0], 77 }, { y, y_op, &got[1], 77 } };
    at = with ? ctx_select(with, cases, 2) : ctx_try_select(cases, 2);
    if (at < 0) return at;
    SCHED_CHECK(at < 2 && cases[1 - at].rc == 77);
    if (cases[at].rc == CTX_CLOSED) return at;
    SCHED_CHECK(cases[at].rc == 0);
    if (cases[at].op == CTX_SEND) note_sent(item);
    else note_taken(got[at]);
    return at;
}
static void select_send_a_recv_b(void) {
    SCHED_CHECK(select_of(ctx_background(), a, CTX_SEND, b, CTX_RECV, 3) >= 0);
}
static void select_send_b_recv_a(void) {
    SCHED_CHECK(select_of(ctx_background(), b, CTX_SEND, a, CTX_RECV, 5) >= 0);
}
static void select_send_a_recv_b_canceled(void) { select_of(ctx, a, CTX_SEND, b, CTX_RECV, 3); }
static void select_send_b_recv_a_canceled(void) { select_of(ctx, b, CTX_SEND, a, CTX_RECV, 5); }
static void select_recv_canceled(void) { select_of(ctx, b, CTX_RECV, a, CTX_RECV, -1); }
static void select_recv_canceled_twice(void) { select_of(ctx, a, CTX_RECV, a, CTX_RECV, -1); }
static void try_send_b(void) {
    int item = 6;
    if (ctx_chan_try_send(b, &item) == 0) note_sent(item);
}

/* Like api_try_select_one: a channel of capacity 1 always can do one of the two. */
static void try_both_ways(void) { SCHED_CHECK(select_of(NULL, a, CTX_RECV, a, CTX_SEND, 7) >= 0); }
static void try_send_try_recv(void) {
    int item = 9;
    if (ctx_chan_try_send(a, &item) == 0) note_sent(item);
    if (ctx_chan_try_recv(a, &item) == 0) note_taken(item);
}
/* `a` is full and `b` is empty, then the other way round, then as before: one of them has room at every moment. */
static void try_send_either(void) { SCHED_CHECK(select_of(NULL, a, CTX_SEND, b, CTX_SEND, 7) >= 0); }
static void change_over(ctx_chan_t *full, ctx_chan_t *empty) {
    int item;
    if (ctx_chan_try_recv(full, &item) == 0) note_taken(item);
    item = 11;
    if (ctx_chan_try_send(empty, &item) == 0) note_sent(item);
}
static void change_rooms(void) {
    change_over(a, b);
    change_over(b, a);
}

/* -- free -- */

/* Like flow_c5: the thread that received the last item frees the channel at once. */
static void recv_free(void) {
    must_recv(a);
    ctx_chan_free(a);
}
static void recv_all_free(void) {
    recv_until_closed();
    ctx_chan_free(a);
}
static void send_free(void) {
    must_send(a, 1);
    ctx_chan_free(a);
}
static void select_recv_free(void) {
    int at = select_of(ctx_background(), a, CTX_RECV, b, CTX_RECV, -1);
    SCHED_CHECK(at == 0);
    ctx_chan_free(a);
}
static void select_send_twice(void) {
    SCHED_CHECK(select_of(ctx_background(), a, CTX_SEND, a, CTX_SEND, 12) >= 0);
}
static void recv_told_free(void) {
    must_recv(a);
    sched_set(&told);
    sched_await(&said);
    ctx_chan_free(a);
}
static void recv_tell(void) {
    sched_await(&told);
    must_recv(a);
    sched_set(&said);
}
static void check_freed(void) {
    a = ctx_chan_new(sizeof(int), 0);
    check();
}

/* -- the descriptor -- */

static int fd_before, kept_fd[SCHED_THREADS];

static bool readable(int fd) {
    struct pollfd p = { fd, POLLIN, 0 };
    return poll(&p, 1, 0) == 1 && p.revents == POLLIN;
}
static void note_free_fd(void) {
    fd_before = dup(0);
    close(fd_before);
}
static void setup_0_late_fd(void) {
    setup_0();
    note_free_fd();
}
static void setup_1_late_fd(void) {
    setup_1();
    note_free_fd();
}
static void make_fd(void) {
    int fd = ctx_chan_fd(a);
    SCHED_CHECK(fd >= 0);
    kept_fd[sched_thread()] = fd;
}
static void setup_0_fd(void) {
    setup_0_late_fd();
    make_fd();
}
static void setup_1_fd(void) {
    setup_1_late_fd();
    make_fd();
}
static void setup_1_full_fd(void) {
    setup_1_full();
    note_free_fd();
    make_fd();
}

/* Nobody is at work: it is readable exactly if a receive would not wait. All threads got the same, which goes with the
   channel. */
static void check_no_fd_left(void) {
    int was = fd_before;
    note_free_fd();
    SCHED_CHECK(fd_before == was);
}
static void check_fd(void) {
    int fd = 0, rc, item, i;
    for (i = 0; i < SCHED_THREADS; i++) {
        if (!kept_fd[i]) continue;
        SCHED_CHECK(!fd || fd == kept_fd[i]);
        fd = kept_fd[i]; /* as it was left: each call of the library would put it right */
    }
    do {
        bool shown = readable(fd);
        rc = ctx_chan_try_recv(a, &item);
        if (rc == 0) note_taken(item);
        SCHED_CHECK(shown == (rc != CTX_NOT_READY));
    } while (rc == 0);
    SCHED_CHECK(readable(fd) == (rc == CTX_CLOSED));
    SCHED_CHECK(ctx_chan_fd(a) == fd);
    check();
    check_no_fd_left();
}
static void check_fd_freed(void) {
    check_freed();
    check_no_fd_left();
}

/* An event loop: it sleeps until the descriptor is readable. Returns CTX_CLOSED, or 0 when it has taken `n` items. */
static int loop_recv(int n) {
    int fd, item, rc = 0;
    make_fd();
    fd = kept_fd[sched_thread()];
    while (n > 0 && rc != CTX_CLOSED) {
        while (!readable(fd)) ctx__sched_relax();
        rc = ctx_chan_try_recv(a, &item);
        if (rc == 0) note_taken(item), n--;
    }
    return rc;
}
static void loop_once(void) { SCHED_CHECK(loop_recv(1) == 0); }
static void loop_twice(void) { SCHED_CHECK(loop_recv(2) == 0); }
static void loop_until_closed(void) { SCHED_CHECK(loop_recv(100) == CTX_CLOSED); }

static const sched_scenario_t scenarios[] = {
    { "channel: send / recv, capacity 0", setup_0, { T(send_1), T(recv) }, check, false },
    { "channel: send / recv, capacity 1", setup_1, { T(send_twice), T(recv_in_order) }, check, false },
    { "channel: send / recv, capacity 2", setup_2, { T(send_twice), T(recv_in_order) }, check, false },
    { "channel: two senders, one receiver, capacity 0", setup_0,
      { T(send_1), T(send_2), T(recv_twice) }, check, false },
    { "channel: two senders, one receiver, capacity 1", setup_1,
      { T(send_1), T(send_2), T(recv_twice) }, check, false },
    { "channel: full, send / recv", setup_1_full, { T(send_1), T(recv) }, check, false },
    { "channel: one sender, two receivers", setup_1, { T(send_twice), T(recv), T(recv) }, check, false },
    { "channel: hand-over against cancel of the receive", setup_0,
      { T(recv_canceled), T(send_canceled), T(cancel) }, check, false },
    { "channel: hand-over against cancel, capacity 1", setup_1_full,
      { T(send_canceled), T(recv_canceled), T(cancel) }, check, false },
    { "channel: receive of a done context", setup_0, { T(recv_of_done), T(cancel_send) }, check, false },
    { "channel: send of a done context", setup_0, { T(send_of_done), T(cancel_recv) }, check, false },
    { "channel: send / cancel and empty", setup_1, { T(send_canceled), T(cancel_empty) }, check, false },
    { "channel: close / receive", setup_1, { T(recv_until_closed), T(close_a) }, check, false },
    { "channel: close / send", setup_1_full, { T(send_or_closed), T(close_a) }, check, false },
    { "channel: close / send / receive", setup_1,
      { T(send_or_closed), T(recv_until_closed), T(close_a) }, check, false },
    { "channel: close / send / receive, capacity 0", setup_0,
      { T(send_or_closed), T(recv_until_closed), T(close_a) }, check, false },
    { "channel: select / select, capacity 0", setup_0,
      { T(select_send_a_recv_b), T(select_send_b_recv_a) }, check, false },
    { "channel: select / select, capacity 1", setup_1,
      { T(select_send_a_recv_b), T(select_send_b_recv_a) }, check, false },
    { "channel: three selects", setup_0,
      { T(select_send_a_recv_b_canceled), T(select_send_b_recv_a_canceled), T(select_recv_canceled), T(cancel) },
      check, false },
    { "channel: select / send / send / cancel", setup_0,
      { T(select_recv_canceled), T(send_canceled), T(try_send_b), T(cancel) }, check, false },
    { "channel: select twice / send / cancel", setup_0,
      { T(select_recv_canceled_twice), T(send_canceled), T(cancel) }, check, false },
    { "channel: try_select both ways", setup_1, { T(try_both_ways), T(try_send_try_recv) }, check, false },
    { "channel: try_select both ways, full", setup_1_full, { T(try_both_ways), T(cancel_recv) }, check, false },
    { "channel: try_select on two", setup_1_full, { T(try_send_either), T(change_rooms) }, check, false },
    { "channel: receive and free", setup_1, { T(send_1), T(recv_free) }, check_freed, false },
    { "channel: receive and free, capacity 0", setup_0, { T(send_1), T(recv_free) }, check_freed, false },
    { "channel: receive and free, full", setup_1_full,
      { T(send_1), T(recv_told_free), T(recv_tell) }, check_freed, false },
    { "channel: close, receive and free", setup_1, { T(send_twice_close), T(recv_all_free) }, check_freed, false },
    { "channel: close, receive and free, capacity 0", setup_0,
      { T(send_twice_close), T(recv_all_free) }, check_freed, false },
    { "channel: send and free, capacity 0", setup_0, { T(recv), T(send_free) }, check_freed, false },
    { "channel: select, receive and free", setup_0, { T(send_1), T(select_recv_free) }, check_freed, false },
    { "channel: select sends twice, receive and free", setup_0,
      { T(select_send_twice), T(recv_free) }, check_freed, false },
    { "channel: descriptor / send", setup_1_late_fd, { T(make_fd), T(send_1) }, check_fd, false },
    { "channel: descriptor / send / receive", setup_1_late_fd, { T(make_fd), T(send_1), T(recv) }, check_fd, false },
    { "channel: descriptor / descriptor / send", setup_1_late_fd,
      { T(make_fd), T(make_fd), T(send_1) }, check_fd, false },
    { "channel: descriptor / close", setup_1_late_fd, { T(make_fd), T(close_a) }, check_fd, false },
    { "channel: descriptor / close / send", setup_1_full_fd, { T(send_or_closed), T(close_a) }, check_fd, false },
    { "channel: descriptor, loop / send", setup_1_late_fd, { T(loop_twice), T(send_twice) }, check_fd, false },
    { "channel: descriptor, loop / send, capacity 0", setup_0_late_fd, { T(loop_once), T(send_1) }, check_fd, false },
    { "channel: descriptor, loop / close", setup_1_late_fd,
      { T(loop_until_closed), T(send_twice_close) }, check_fd, false },
    { "channel: descriptor, loop / close, capacity 0", setup_0_late_fd,
      { T(loop_until_closed), T(send_twice_close) }, check_fd, false },
    { "channel: descriptor, two loops / send, close", setup_1_late_fd,
      { T(loop_until_closed), T(loop_until_closed), T(send_twice_close) }, check_fd, false },
    { "channel: descriptor, two senders, one receiver", setup_1_fd,
      { T(send_1), T(send_2), T(recv_twice) }, check_fd, false },
    { "channel: descriptor, two senders, one receiver, capacity 0", setup_0_fd,
      { T(send_1), T(send_2), T(recv_twice) }, check_fd, false },
    { "channel: descriptor, send gives up, capacity 0", setup_0_fd, { T(send_canceled), T(cancel) }, check_fd, false },
    { "channel: descriptor, hand-over against cancel", setup_0_fd,
      { T(recv_canceled), T(send_canceled), T(cancel) }, check_fd, false },
    { "channel: descriptor, select / select, capacity 0", setup_0_fd,
      { T(select_send_a_recv_b_canceled), T(select_send_b_recv_a_canceled), T(cancel) }, check_fd, false },
    { "channel: descriptor, receive and free", setup_1_fd, { T(send_1), T(recv_free) }, check_fd_freed, false },
    { "channel: descriptor, receive and free, capacity 0", setup_0_fd,
      { T(send_1), T(recv_free) }, check_fd_freed, false },
};
SCHED_MAIN(scenarios)
