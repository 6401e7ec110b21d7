/* Descriptors: when those of contexts (ctx_done_fd) and channels (ctx_chan_fd) are readable, how a thread waits for one
   of the program's (ctx_poll_fd), and what each of these costs in system calls. */
#define CTXCANCEL_STATIC
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/eventfd.h>
#endif

/* The system calls of the library. */
static int calls_made, calls_written, calls_polled; /* [atomic] */
static inline int count_call(int *counter) { return __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED); }
#if defined(__linux__)
#define eventfd(count, flags) (count_call(&calls_made), eventfd((count), (flags)))
#else
#define pipe(ends) (count_call(&calls_made), pipe(ends))
#endif
#define write(fd, data, size) (count_call(&calls_written), write((fd), (data), (size)))
#define poll(fds, n, timeout) (count_call(&calls_polled), poll((fds), (n), (timeout)))
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#undef eventfd
#undef pipe
#undef write
#undef poll
#include "race.h"
#include "child.h"

static void reset_calls(void) {
    store(&calls_made, 0);
    store(&calls_written, 0);
    store(&calls_polled, 0);
}

static void nothing(void *arg) { (void)arg; }

static int pending(int fd) {
    struct pollfd p;
    p.fd = fd, p.events = POLLIN, p.revents = 0;
    int n = poll(&p, 1, 0);
    return n < 0 ? -errno : p.revents;
}

/* -- contexts --------------------------------------------------------------------------------------------------- */

TEST(ending_a_context_that_nobody_canceled_writes_nothing) {
    enum { CANCEL, TIMEOUT, VALUE, MERGED, HAD_CHILD, HAD_CALLBACK, HAS_CHILD, KINDS };
    static const ctx_key_t key = CTX_KEY(int);
    int value = 5, before = fd_count();
    for (int kind = CANCEL; kind < KINDS; kind++) {
        ctx_t *parent = ctx_with_cancel(ctx_background()), *child = NULL, *ctx;
        if (kind == TIMEOUT)
            ctx = ctx_with_timeout(parent, CTX_S(3600));
        else if (kind == VALUE)
            ctx = ctx_with_value(parent, &key, &value);
        else if (kind == MERGED)
            ctx = ctx_merge(parent, ctx_background());
        else
            ctx = ctx_with_cancel(parent);
        reset_calls();
        EXPECT(ctx_done_fd(ctx) >= 0);
        EXPECT_EQ(load(&calls_made), 1);
        if (kind == HAD_CHILD) ctx_end(ctx_with_cancel(ctx));
        if (kind == HAS_CHILD) child = ctx_with_cancel(ctx);
        if (kind == HAD_CALLBACK) {
            ctx_on_done_t reg;
            ctx_on_done(&reg, ctx, nothing, NULL);
            EXPECT(ctx_on_done_stop(&reg));
        }
        ctx_end(ctx);
        EXPECT_EQ(load(&calls_written), 0);
        if (child) EXPECT_EQ(ctx_err(child), CTX_CANCELED); /* it was ended all the same */
        ctx_end(child);
        ctx_end(parent);
    }
    EXPECT_EQ(fd_count(), before);
}

TEST(a_cancel_writes_once_and_the_end_after_it_never) {
    int before = fd_count();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    int fd = ctx_done_fd(ctx);
    reset_calls();
    ctx_cancel(ctx);
    EXPECT_EQ(load(&calls_written), 1);
    EXPECT_EQ(pending(fd), POLLIN);
    reset_calls();
    ctx_end(ctx);
    EXPECT_EQ(load(&calls_written), 0);
    EXPECT_EQ(fd_count(), before);
}

TEST(an_end_with_another_reference_left_makes_the_descriptor_readable) {
    int before = fd_count();
    ctx_t *ctx = ctx_retain(ctx_with_cancel(ctx_background()));
    int fd = ctx_done_fd(ctx);
    ctx_end(ctx);
    EXPECT_EQ(pending(fd), POLLIN);
    EXPECT_EQ(ctx_done_fd(ctx), fd);
    ctx_release(ctx);
    EXPECT_EQ(fd_count(), before);
}

static ctx_t *asked_ctx;
static int asked_fd;
static void asks_inside(void *arg) {
    (void)arg;
    EXPECT_EQ(ctx_err(asked_ctx), CTX_CANCELED);
    asked_fd = ctx_done_fd(asked_ctx);
    EXPECT_EQ(pending(asked_fd), POLLIN);
}

TEST(a_callback_of_the_end_gets_a_readable_descriptor) {
    asked_fd = -1;
    asked_ctx = ctx_with_cancel(ctx_background());
    ctx_on_done_t reg;
    EXPECT(ctx_done_fd(asked_ctx) >= 0);
    ctx_on_done(&reg, asked_ctx, asks_inside, NULL);
    ctx_end(asked_ctx);
    EXPECT(asked_fd >= 0);
}

typedef struct {
    start_line_t line;
    ctx_t *parent, *ctx;
    int rounds;
} end_race_t;

static void *cancels_the_parent(void *arg) {
    end_race_t *race = (end_race_t *)arg;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        ctx_cancel(race->parent);
        start_line(&race->line);
    }
    return NULL;
}

/* A write to a descriptor that was closed would go to the next one with that number: a pipe of which this thread has
   the reading end. */
TEST(an_end_as_the_parent_is_canceled_writes_to_no_stranger) {
    end_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(5000);
    pthread_t thread = thread_start(cancels_the_parent, &race);
    int strangers = 0, before = fd_count();
    for (int i = 0; i < race.rounds; i++) {
        int ends[2], taken;
        race.parent = ctx_with_cancel(ctx_background());
        race.ctx = ctx_with_cancel(race.parent);
        EXPECT_EQ(pipe(ends), 0);
        int fd = ctx_done_fd(race.ctx);
        start_line(&race.line);
        spin((unsigned)(i % 50) * 10);
        ctx_end(race.ctx);
        taken = fcntl(ends[1], F_DUPFD_CLOEXEC, fd);
        start_line(&race.line);
        strangers += pending(ends[0]) != 0;
        close(taken);
        close(ends[0]);
        close(ends[1]);
        ctx_end(race.parent);
    }
    thread_join(thread);
    EXPECT_EQ(strangers, 0);
    EXPECT_EQ(fd_count(), before);
}

/* -- waiting for a descriptor of the program's ------------------------------------------------------------------ */

typedef struct {
    ctx_t *ctx;
    int fd;
    short events;
    int tid, rc, done; /* [atomic] */
} poller_t;

static void *polls(void *arg) {
    poller_t *p = (poller_t *)arg;
    store(&p->tid, thread_id());
    int rc = ctx_poll_fd(p->ctx, p->fd, p->events);
    store(&p->rc, rc);
    store(&p->done, 1);
    pthread_testcancel();
    return NULL;
}

static pthread_t start_polling(poller_t *p, ctx_t *ctx, int fd) {
    memset(p, 0, sizeof *p);
    p->ctx = ctx;
    p->fd = fd;
    p->events = POLLIN;
    pthread_t thread = thread_start(polls, p);
    until_asleep(&p->tid);
    return thread;
}

typedef struct {
    int in, out;
} pipe_t;

static pipe_t silent_pipe(void) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(pipe(ends), 0);
    pipe_t made = {ends[0], ends[1]};
    return made;
}

static void close_pipe(pipe_t ends) {
    close(ends.in);
    close(ends.out);
}

static void put_byte(pipe_t ends) { EXPECT_EQ(write(ends.out, "x", 1), 1); }

TEST(poll_fd_tells_of_a_ready_descriptor_with_one_call_and_no_descriptor) {
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    ctx_runtime_stop(); /* this thread has none */
    put_byte(ends);
    reset_calls();
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), POLLIN);
    EXPECT_EQ(ctx_poll_fd(ctx, ends.out, POLLOUT), POLLOUT);
    EXPECT_EQ(ctx_poll_fd(ctx_background(), ends.in, POLLIN), POLLIN);
    EXPECT_EQ(load(&calls_polled), 3);
    EXPECT_EQ(load(&calls_made), 0);
    ctx_end(ctx);
    close_pipe(ends);
}

TEST(poll_fd_starts_nothing_with_a_done_context) {
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *failed = ctx_with_cancel(NULL);
    ctx_cancel(ctx);
    put_byte(ends);
    reset_calls();
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), CTX_CANCELED);
    EXPECT_EQ(ctx_poll_fd(failed, ends.in, POLLIN), CTX_INVALID);
    EXPECT_EQ(load(&calls_polled), 0);
    EXPECT_EQ(load(&calls_made), 0);
    ctx_end(failed);
    ctx_end(ctx);
    close_pipe(ends);
}

TEST(poll_fd_is_woken_by_the_descriptor_the_cancel_and_the_deadline) {
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    EXPECT_EQ(load(&p.done), 0);
    put_byte(ends);
    thread_join(thread);
    EXPECT_EQ(p.rc, POLLIN);
    EXPECT_EQ(ctx_err(ctx), 0);
    close_pipe(ends);
    ends = silent_pipe();
    thread = start_polling(&p, ctx, ends.in);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    ctx_end(ctx);
    ctx_time_t from = ctx_now();
    ctx = ctx_with_timeout(ctx_background(), CTX_MS(10));
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), CTX_DEADLINE_EXCEEDED);
    EXPECT(ctx_now() - from >= CTX_MS(10));
    ctx_end(ctx);
    thread = start_polling(&p, ctx_background(), ends.in); /* which is never done */
    put_byte(ends);
    thread_join(thread);
    EXPECT_EQ(p.rc, POLLIN);
    close_pipe(ends);
}

TEST(poll_fd_tells_of_a_hang_up_and_of_what_is_no_descriptor) {
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    close(ends.out);
    thread_join(thread);
    EXPECT_EQ(p.rc, POLLHUP);
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, 0), POLLHUP);
    close(ends.in);
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), POLLNVAL);
    EXPECT_EQ(ctx_poll_fd(ctx, -1, POLLIN), -EBADF);
    ctx_end(ctx);
}

TEST(poll_fd_waits_by_the_fake_clock) {
    ctx_clock_fake(CTX_S(1000));
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(3600));
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    ctx_clock_advance(CTX_S(3600) - 1);
    EXPECT_EQ(load(&p.done), 0);
    ctx_clock_advance(1);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    close_pipe(ends);
    ctx_clock_real();
}

TEST(poll_fd_goes_on_for_the_grace_period) {
    pipe_t ends = silent_pipe();
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.grace = CTX_MS(20);
    ctx_t *ctx = ctx_derive(parent, &desc);
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    ctx_time_t from = ctx_now();
    ctx_cancel(parent);
    thread_join(thread);
    EXPECT(ctx_now() - from >= CTX_MS(20));
    EXPECT_EQ(p.rc, CTX_CANCELED);
    ctx_end(ctx);
    ctx_end(parent);
    close_pipe(ends);
}

TEST(a_thread_that_polls_with_many_contexts_makes_one_descriptor) {
    pipe_t ends = silent_pipe();
    ctx_runtime_stop();
    int before = fd_count();
    reset_calls();
    for (int i = 0; i < 100; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_US(300));
        EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
    }
    EXPECT_EQ(load(&calls_made), 1);
    EXPECT(fd_count() > before || before < 0);
    ctx_runtime_stop();
    EXPECT_EQ(fd_count(), before); /* given back */
    close_pipe(ends);
}

TEST(the_descriptor_of_a_thread_goes_with_it) {
    pipe_t ends = silent_pipe();
    int before = fd_count();
    for (int i = 0; i < 20; i++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        poller_t p;
        pthread_t thread = start_polling(&p, ctx, ends.in);
        UNTIL(fd_count() > before || before < 0);
        ctx_cancel(ctx);
        thread_join(thread);
        EXPECT_EQ(fd_count(), before);
        ctx_end(ctx);
    }
    close_pipe(ends);
}

/* What is left readable by the wake-up of one wait would make the next spin. */
TEST(a_wait_after_a_canceled_one_sleeps) {
    pipe_t ends = silent_pipe();
    for (int i = 0; i < 20; i++) {
        ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
        EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), CTX_DEADLINE_EXCEEDED);
        ctx_end(ctx);
    }
    reset_calls();
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(30));
    EXPECT_EQ(ctx_poll_fd(ctx, ends.in, POLLIN), CTX_DEADLINE_EXCEEDED);
    EXPECT(load(&calls_polled) <= 5);
    ctx_end(ctx);
    close_pipe(ends);
}

TEST(without_a_free_descriptor_poll_fd_works_all_the_same) {
    pipe_t ends = silent_pipe();
    ctx_runtime_stop();
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *timed = ctx_with_timeout(ctx_background(), CTX_MS(20));
    struct rlimit old, low;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
    low = old;
    int free_fd = fcntl(0, F_DUPFD, 0);
    CHECK(free_fd >= 0);
    close(free_fd);
    low.rlim_cur = (rlim_t)free_fd;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
    reset_calls();
    EXPECT_EQ(ctx_poll_fd(timed, ends.in, POLLIN), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(load(&calls_written), 0);
    poller_t p;
    memset(&p, 0, sizeof p);
    p.ctx = ctx, p.fd = ends.in, p.events = POLLIN;
    pthread_t thread = thread_start(polls, &p);
    UNTIL(load(&p.tid) != 0);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    setrlimit(RLIMIT_NOFILE, &old);
    ctx_end(timed);
    ctx_end(ctx);
    close_pipe(ends);
}

static void on_usr1(int sig) { (void)sig; }

TEST(signals_do_not_end_poll_fd) {
    struct sigaction act, old;
    memset(&act, 0, sizeof act);
    act.sa_handler = on_usr1; /* without SA_RESTART, which poll() would ignore anyway */
    sigaction(SIGUSR1, &act, &old);
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    for (int i = 0; i < 100; i++) {
        pthread_kill(thread, SIGUSR1);
        sched_yield();
    }
    until_asleep(&p.tid);
    EXPECT_EQ(load(&p.done), 0);
    ctx_cancel(ctx);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    ctx_end(ctx);
    close_pipe(ends);
    sigaction(SIGUSR1, &old, NULL);
}

TEST(pthread_cancel_takes_effect_after_poll_fd) {
#ifndef __ANDROID__
    pipe_t ends = silent_pipe();
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    poller_t p;
    pthread_t thread = start_polling(&p, ctx, ends.in);
    pthread_cancel(thread);
    until_asleep(&p.tid);
    EXPECT_EQ(load(&p.done), 0);
    ctx_cancel(ctx);
    void *result = NULL;
    pthread_join(thread, &result);
    EXPECT_EQ(load(&p.done), 1);
    EXPECT(result == PTHREAD_CANCELED);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    ctx_end(ctx);
    close_pipe(ends);
#endif
}

typedef struct {
    ctx_t *ctx;
    pipe_t ends;
    int fds[8], n; /* of the threads that have waited */
} forked_t;

static int note_pollers(forked_t *f) {
    f->n = 0;
    ctx__enter(&ctx__pollers.mu);
    for (const ctx__link_t *link = ctx__pollers.first; link && f->n < 8; link = link->next)
        f->fds[f->n++] = CTX__CONTAINER(link, const ctx__poller_t, link)->event.fd;
    ctx__leave(&ctx__pollers.mu);
    return f->n;
}

static int polls_in_the_child(const forked_t *f) {
    for (int i = 0; i < f->n; i++) REQUIRE(fcntl(f->fds[i], F_GETFD) < 0);
    ctx_t *timed = ctx_with_timeout(f->ctx, -1);
    REQUIRE(ctx_poll_fd(timed, f->ends.in, POLLIN) == CTX_DEADLINE_EXCEEDED);
    ctx_end(timed);
    REQUIRE(ctx_cancel(f->ctx)); /* wakes nobody in the parent */
    REQUIRE(ctx_poll_fd(f->ctx, f->ends.in, POLLIN) == CTX_CANCELED);
    REQUIRE(ctx_poll_fd(ctx_background(), f->ends.out, POLLOUT) == POLLOUT);
    return 0;
}

TEST(the_child_of_a_fork_has_none_of_its_parents_descriptors) {
    forked_t f;
    f.ends = silent_pipe();
    f.ctx = ctx_with_cancel(ctx_background());
    ctx_t *timed = ctx_with_timeout(ctx_background(), CTX_MS(1));
    EXPECT_EQ(ctx_poll_fd(timed, f.ends.in, POLLIN), CTX_DEADLINE_EXCEEDED); /* now this thread has one */
    ctx_end(timed);
    poller_t p;
    pthread_t thread = start_polling(&p, f.ctx, f.ends.in);
    UNTIL(note_pollers(&f) == 2); /* this thread's, and that of the other */
    pid_t pid = fork();
    if (pid == 0) {
        alarm(30);
        _exit(polls_in_the_child(&f) ? 1 : 0);
    }
    EXPECT_EQ(end_of_child(pid), 0);
    until_asleep(&p.tid);
    EXPECT_EQ(load(&p.done), 0);
    ctx_cancel(f.ctx);
    thread_join(thread);
    EXPECT_EQ(p.rc, CTX_CANCELED);
    ctx_end(f.ctx);
    close_pipe(f.ends);
}

typedef struct {
    start_line_t line;
    ctx_t *ctx;
    pipe_t ends;
    int rounds, writes; /* the writer's */
} poll_race_t;

static void *cancels_or_writes(void *arg) {
    poll_race_t *race = (poll_race_t *)arg;
    uint64_t seed = 7;
    for (int i = 0; i < race->rounds; i++) {
        start_line(&race->line);
        race_dither(race_random(&seed));
        if (i % 3) ctx_cancel(race->ctx);
        if (i % 3 != 1) put_byte(race->ends);
        start_line(&race->line);
    }
    return NULL;
}

/* It ends, and tells the truth. */
TEST(poll_fd_against_bytes_and_cancels) {
    poll_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(20000);
    race.ends = silent_pipe();
    pthread_t thread = thread_start(cancels_or_writes, &race);
    uint64_t seed = 3;
    for (int i = 0; i < race.rounds; i++) {
        char byte;
        race.ctx = ctx_with_cancel(ctx_background());
        start_line(&race.line);
        race_dither(race_random(&seed));
        int rc = ctx_poll_fd(race.ctx, race.ends.in, POLLIN);
        if (rc == POLLIN)
            EXPECT(i % 3 != 1);
        else
            EXPECT(rc == CTX_CANCELED && i % 3);
        start_line(&race.line);
        if (i % 3 != 1) EXPECT_EQ(read(race.ends.in, &byte, 1), 1);
        ctx_end(race.ctx);
    }
    thread_join(thread);
    close_pipe(race.ends);
}

/* -- channels --------------------------------------------------------------------------------------------------- */

static ctx_chan_t *ints(size_t capacity) {
    ctx_chan_t *chan = ctx_chan_new(sizeof(int), capacity);
    if (!chan) abort();
    return chan;
}

static int shown(ctx_chan_t *chan) {
    int seen = pending(ctx_chan_fd(chan));
    EXPECT(seen == 0 || seen == POLLIN);
    return seen == POLLIN;
}

/* Looks at the number that was got before, without a call of the library. */
#define EXPECT_SHOWN(fd, is) EXPECT_EQ(pending(fd), (is) ? POLLIN : 0)

TEST(a_channels_descriptor_is_readable_while_there_is_something) {
    for (size_t capacity = 1; capacity < 4; capacity++) {
        ctx_chan_t *chan = ints(capacity);
        int fd = ctx_chan_fd(chan), item = 0;
        CHECK(fd >= 0);
        EXPECT(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        EXPECT_SHOWN(fd, false);
        for (int round = 0; round < 10; round++) {
            for (size_t i = 0; i < capacity; i++) {
                EXPECT_EQ(i % 2 ? ctx_chan_send(chan, ctx_background(), &item) : ctx_chan_try_send(chan, &item), 0);
                EXPECT_SHOWN(fd, true);
            }
            EXPECT_EQ(ctx_chan_try_send(chan, &item), CTX_QUEUE_FULL);
            EXPECT_SHOWN(fd, true);
            for (size_t i = 0; i < capacity; i++) {
                EXPECT_SHOWN(fd, true);
                EXPECT_EQ(i % 2 ? ctx_chan_recv(chan, ctx_background(), &item) : ctx_chan_try_recv(chan, &item), 0);
            }
            EXPECT_SHOWN(fd, false);
            EXPECT_EQ(ctx_chan_try_recv(chan, &item), CTX_NOT_READY);
            EXPECT_SHOWN(fd, false);
        }
        EXPECT_EQ(ctx_chan_fd(chan), fd);
        ctx_chan_free(chan);
        EXPECT(fcntl(fd, F_GETFD) < 0);
    }
}

TEST(a_channels_descriptor_shows_what_was_there_before_it) {
    for (int closed = 0; closed < 2; closed++) {
        for (int items = 0; items < 2; items++) {
            ctx_chan_t *chan = ints(1);
            int item = 1;
            if (items) EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
            if (closed) EXPECT_EQ(ctx_chan_close(chan), 0);
            int fd = ctx_chan_fd(chan);
            EXPECT_SHOWN(fd, closed || items);
            if (items) EXPECT_EQ(ctx_chan_try_recv(chan, &item), 0);
            EXPECT_SHOWN(fd, closed);
            EXPECT_EQ(ctx_chan_try_recv(chan, &item), closed ? CTX_CLOSED : CTX_NOT_READY);
            EXPECT_SHOWN(fd, closed);
            if (!closed) {
                EXPECT_EQ(ctx_chan_close(chan), 0);
                EXPECT_SHOWN(fd, true);
            }
            ctx_chan_free(chan);
        }
    }
}

typedef struct {
    ctx_chan_t *chan, *beside;
    ctx_t *ctx;
    int op, item;
    int tid, rc; /* [atomic] */
} side_t;

static void *does(void *arg) {
    side_t *side = (side_t *)arg;
    ctx_case_t cases[2];
    memset(cases, 0, sizeof cases);
    cases[0].chan = side->chan, cases[0].op = side->op, cases[0].item = &side->item;
    cases[1].chan = side->beside, cases[1].op = side->op, cases[1].item = &side->item;
    store(&side->tid, thread_id());
    int at = ctx_select(side->ctx, cases, 2);
    store(&side->rc, at < 0 ? at : cases[at].rc);
    return NULL;
}

static pthread_t start_side(side_t *side, ctx_chan_t *chan, ctx_chan_t *beside, ctx_t *ctx, int op) {
    memset(side, 0, sizeof *side);
    side->chan = chan, side->beside = beside, side->ctx = ctx, side->op = op, side->item = 5;
    pthread_t thread = thread_start(does, side);
    until_asleep(&side->tid);
    return thread;
}

TEST(a_waiting_sender_shows_until_it_is_served_or_gives_up) {
    ctx_chan_t *chan = ints(0), *beside = ints(0);
    int fd = ctx_chan_fd(chan), beside_fd = ctx_chan_fd(beside), item = 0;
    for (int how = 0; how < 4; how++) {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        side_t sender;
        EXPECT_SHOWN(fd, false);
        pthread_t thread = start_side(&sender, chan, beside, ctx, CTX_SEND);
        UNTIL(pending(fd) == POLLIN);
        UNTIL(pending(beside_fd) == POLLIN);
        if (how == 0) EXPECT_EQ(ctx_chan_try_recv(chan, &item), 0);
        if (how == 1) EXPECT_EQ(ctx_chan_try_recv(beside, &item), 0);
        if (how == 2) ctx_cancel(ctx);
        if (how == 3) EXPECT_EQ(ctx_chan_recv(chan, ctx, &item), 0);
        if (how == 0 || how == 3) EXPECT_SHOWN(fd, false); /* at once: nothing can be received there */
        thread_join(thread);
        EXPECT_EQ(sender.rc, how == 2 ? CTX_CANCELED : 0);
        EXPECT_SHOWN(fd, false);
        EXPECT_SHOWN(beside_fd, false);
        ctx_end(ctx);
    }
    ctx_chan_free(chan);
    ctx_chan_free(beside);
}

TEST(an_item_handed_to_a_waiting_receiver_does_not_show) {
    for (size_t capacity = 0; capacity < 2; capacity++) {
        ctx_chan_t *chan = ints(capacity), *beside = ints(capacity);
        int fd = ctx_chan_fd(chan), item = 9;
        side_t receiver;
        pthread_t thread = start_side(&receiver, chan, beside, ctx_background(), CTX_RECV);
        EXPECT_SHOWN(fd, false);
        EXPECT_EQ(ctx_chan_send(chan, ctx_background(), &item), 0);
        thread_join(thread);
        EXPECT_EQ(receiver.rc, 0);
        EXPECT_EQ(receiver.item, 9);
        EXPECT_SHOWN(fd, false);
        thread = start_side(&receiver, chan, beside, ctx_background(), CTX_RECV);
        EXPECT_EQ(ctx_chan_close(chan), 0);
        thread_join(thread);
        EXPECT_EQ(receiver.rc, CTX_CLOSED);
        EXPECT_SHOWN(fd, true);
        EXPECT_EQ(shown(beside), 0);
        ctx_chan_free(chan);
        ctx_chan_free(beside);
    }
}

/* The calls are made only when it changes, and none in a channel that has no descriptor. */
TEST(a_channel_pays_for_its_descriptor_when_it_changes) {
    ctx_chan_t *chan = ints(16);
    int item = 0;
    reset_calls();
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_chan_try_recv(chan, &item), 0);
    EXPECT_EQ(load(&calls_made) + load(&calls_written), 0);
    EXPECT(ctx_chan_fd(chan) >= 0);
    EXPECT_EQ(load(&calls_made), 1);
    for (int i = 0; i < 10; i++) EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
    for (int i = 0; i < 9; i++) EXPECT_EQ(ctx_chan_try_recv(chan, &item), 0);
    EXPECT_EQ(ctx_chan_close(chan), 0);
    EXPECT_EQ(load(&calls_written), 1);
    ctx_chan_free(chan);
}

TEST(without_a_free_descriptor_the_channel_works_on) {
    ctx_chan_t *chan = ints(2);
    int item = 3;
    struct rlimit old, low;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
    low = old;
    int free_fd = fcntl(0, F_DUPFD, 0);
    CHECK(free_fd >= 0);
    close(free_fd);
    low.rlim_cur = (rlim_t)free_fd;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
    EXPECT_EQ(ctx_chan_fd(chan), -EMFILE);
    setrlimit(RLIMIT_NOFILE, &old);
    EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
    EXPECT_EQ(shown(chan), 1);
    EXPECT_EQ(ctx_chan_fd(NULL), CTX_INVALID);
    ctx_chan_free(chan);
}

static int frees_in_the_child(ctx_chan_t *chan, int fd) {
    ctx_chan_free(chan);
    REQUIRE(fcntl(fd, F_GETFD) < 0);
    return 0;
}

TEST(a_child_that_frees_the_channel_closes_its_own_copy) {
    ctx_chan_t *chan = ints(2);
    int fd = ctx_chan_fd(chan), item = 3;
    pid_t pid = fork();
    if (pid == 0) _exit(frees_in_the_child(chan, fd) ? 1 : 0);
    EXPECT_EQ(end_of_child(pid), 0);
    EXPECT_EQ(ctx_chan_try_send(chan, &item), 0);
    EXPECT_SHOWN(fd, true);
    ctx_chan_free(chan);
}

enum { LOOPS = 3, SENDERS = 3 };

typedef struct {
    start_line_t line;
    ctx_chan_t *chan;
    int per_sender, sent, got; /* [atomic] sums */
    int senders_left;          /* [atomic] */
    int fd[LOOPS], next;       /* [atomic] */
} storm_t;

static void *storm_sends(void *arg) {
    storm_t *storm = (storm_t *)arg;
    start_line(&storm->line);
    for (int i = 1; i <= storm->per_sender; i++) {
        EXPECT_EQ(ctx_chan_send(storm->chan, ctx_background(), &i), 0);
        add(&storm->sent, i % 1000);
    }
    if (add(&storm->senders_left, -1) == 0) ctx_chan_close(storm->chan);
    return NULL;
}

/* An event loop: asleep in poll() unless the descriptor is readable. A wake-up that is lost keeps it there. */
static void *storm_loops(void *arg) {
    storm_t *storm = (storm_t *)arg;
    int me = add(&storm->next, 1) - 1, rc, item;
    start_line(&storm->line);
    storm->fd[me] = ctx_chan_fd(storm->chan);
    do {
        struct pollfd p;
        p.fd = storm->fd[me], p.events = POLLIN, p.revents = 0;
        EXPECT_EQ(poll(&p, 1, -1), 1);
        rc = ctx_chan_try_recv(storm->chan, &item);
        if (rc == 0) add(&storm->got, item % 1000);
    } while (rc != CTX_CLOSED);
    return NULL;
}

TEST(event_loops_and_senders_lose_nothing) {
    static const size_t capacities[] = {0, 1, 16};
    int before = fd_count();
    for (size_t c = 0; c < 3; c++) {
        for (int round = 0; round < 3; round++) {
            storm_t storm;
            memset(&storm, 0, sizeof storm);
            start_line_init(&storm.line, LOOPS + SENDERS);
            storm.chan = ints(capacities[c]);
            storm.per_sender = test_scale(6000);
            storm.senders_left = SENDERS;
            pthread_t threads[LOOPS + SENDERS];
            for (int i = 0; i < LOOPS + SENDERS; i++)
                threads[i] = thread_start(i < LOOPS ? storm_loops : storm_sends, &storm);
            for (int i = 0; i < LOOPS + SENDERS; i++) thread_join(threads[i]);
            EXPECT_EQ(storm.got, storm.sent);
            for (int i = 1; i < LOOPS; i++) EXPECT_EQ(storm.fd[i], storm.fd[0]);
            ctx_chan_free(storm.chan);
            EXPECT_EQ(fd_count(), before);
        }
    }
}

TEST_MAIN
