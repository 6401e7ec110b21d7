/* Section 13: a context that the first of some signals cancels, and functions that each of them calls. */
#define FAULT_THREADS
#include "fault.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

#include <sys/wait.h>

/* Only a broken promise takes this long. */
#define LONG_WAIT CTX_S(60)

static void send_self(int sig) { kill(getpid(), sig); }

/* What stands for a signal now. */
static struct sigaction action_of(int sig) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigaction(sig, NULL, &action);
    return action;
}

static bool is_default(int sig) { return action_of(sig).sa_handler == SIG_DFL; }

static void set_action(int sig, void (*handler)(int), int flags) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = flags;
    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGWINCH);
    sigaction(sig, &action, NULL);
}

static int own_handler_runs; /* [atomic] */
static void own_handler(int sig) {
    (void)sig;
    add(&own_handler_runs, 1);
}

/* Run `act` in a child of fork() and return its wait status. The runtime's threads are stopped first, so that the
   child is a copy of a process with one thread. */
static int status_of(int (*act)(void)) {
    ctx_runtime_stop();
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        _exit(act());
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return status;
}

/* One number for how a process ended: its status, or minus the signal that ended it. */
static int end_of(int status) {
    if (WIFSIGNALED(status)) return -WTERMSIG(status);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
}

/* -- the first signal ------------------------------------------------------------------------------------------- */

TEST(the_first_signal_cancels_and_the_cause_names_it) {
    const struct {
        int sig;
        const char *name;
    } all[] = {{SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"},   {SIGHUP, "SIGHUP"},
               {SIGUSR1, "SIGUSR1"}, {SIGUSR2, "SIGUSR2"}, {SIGQUIT, "SIGQUIT"}};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &all[i].sig, 1);
        EXPECT_EQ(ctx_err(ctx), 0);
        EXPECT_EQ(ctx_cause(ctx).code, 0);
        send_self(all[i].sig);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, all[i].sig);
        EXPECT(ctx_cause(ctx).what && strcmp(ctx_cause(ctx).what, all[i].name) == 0);
        ctx_end(ctx);
        EXPECT(is_default(all[i].sig));
    }
}

TEST(any_of_several_signals_cancels) {
    const int set[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
    for (size_t i = 0; i < sizeof set / sizeof set[0]; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), set, sizeof set / sizeof set[0]);
        EXPECT_EQ(ctx_err(ctx), 0);
        send_self(set[i]);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, set[i]);
        ctx_end(ctx);
        for (size_t k = 0; k < sizeof set / sizeof set[0]; k++) EXPECT(is_default(set[k]));
    }
}

TEST(the_first_of_two_signals_is_the_cause) {
    const int set[] = {SIGUSR1, SIGUSR2};
    for (int first = 0; first < 2; first++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 2);
        send_self(set[first]);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, set[first]);
        ctx_end(ctx);
    }
}

TEST(children_are_canceled_with_the_cause) {
    const int sig = SIGTERM;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_t *child = ctx_with_timeout(ctx, CTX_S(3600));
    ctx_t *merged = ctx_merge(child, ctx_background());
    send_self(sig);
    EXPECT_EQ(ctx_wait(merged, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_wait(child, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(child).code, SIGTERM);
    EXPECT_EQ(ctx_cause(merged).code, SIGTERM);
    ctx_end(merged);
    ctx_end(child);
    ctx_end(ctx);
}

TEST(values_and_deadline_of_the_parent_are_there) {
    static const ctx_key_t key = CTX_KEY(int);
    const int sig = SIGTERM, value = 17;
    ctx_t *with_value = ctx_with_value(ctx_background(), &key, &value);
    ctx_t *parent = ctx_with_deadline(with_value, ctx_now() + CTX_S(3600));
    ctx_t *ctx = ctx_notify_signals(parent, &sig, 1);
    EXPECT_EQ(ctx_deadline(ctx), ctx_deadline(parent));
    EXPECT(ctx_value(ctx, &key) && *(const int *)ctx_value(ctx, &key) == 17);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_end(with_value);
}

TEST(no_signal_is_lost_round_after_round) {
    const int set[] = {SIGUSR1, SIGUSR2};
    int fds = -1;
    int rounds = test_scale(500) < 20 ? 20 : test_scale(500);
    for (int i = 0; i < rounds; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 2);
        send_self(set[i % 2]); /* the moment that the call has returned */
        CHECK_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, set[i % 2]);
        ctx_end(ctx);
        if (i == 3) fds = fd_count();
    }
    EXPECT_EQ(fd_count(), fds);
}

static void *raises_in_its_own_thread(void *arg) {
    pthread_kill(pthread_self(), *(const int *)arg);
    return NULL;
}

static void *sends_to_the_process(void *arg) {
    send_self(*(const int *)arg);
    return NULL;
}

TEST(it_does_not_matter_which_thread_the_signal_goes_to) {
    void *(*const ways[])(void *) = {raises_in_its_own_thread, sends_to_the_process};
    for (int i = 0; i < 10; i++) {
        int sig = i % 3 ? SIGUSR1 : SIGTERM;
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        pthread_t thread = thread_start(ways[i % 2], &sig);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, sig);
        thread_join(thread);
        ctx_end(ctx);
    }
}

TEST(errno_survives_the_signal) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    errno = 12345;
    raise(sig); /* handled here, before raise() returns */
    EXPECT_EQ(errno, 12345);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
}

typedef struct {
    pthread_mutex_t mutex;
    pthread_t thread;
    int runs;
} guarded_t;

static void takes_the_mutex(void *arg) {
    guarded_t *guarded = (guarded_t *)arg;
    pthread_mutex_lock(&guarded->mutex);
    guarded->thread = pthread_self();
    free(malloc(100));
    pthread_mutex_unlock(&guarded->mutex);
    add(&guarded->runs, 1);
}

/* A callback in the handler itself would lock a mutex which its own thread holds. */
TEST(callbacks_run_on_a_thread_and_not_in_the_handler) {
    const int sig = SIGTERM;
    guarded_t guarded;
    pthread_mutex_init(&guarded.mutex, NULL);
    guarded.runs = 0;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_on_done_t reg;
    EXPECT(ctx_on_done(&reg, ctx, takes_the_mutex, &guarded));
    pthread_mutex_lock(&guarded.mutex);
    raise(sig);
    EXPECT_EQ(load(&guarded.runs), 0);
    pthread_mutex_unlock(&guarded.mutex);
    UNTIL(load(&guarded.runs) == 1);
    EXPECT(!pthread_equal(guarded.thread, pthread_self()));
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
    pthread_mutex_destroy(&guarded.mutex);
}

TEST(a_callback_may_end_the_context) {
    const int sig = SIGTERM;
    guarded_t guarded;
    pthread_mutex_init(&guarded.mutex, NULL);
    guarded.runs = 0;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_on_done_t ends, notes;
    EXPECT(ctx_on_done(&ends, ctx, (void (*)(void *))ctx_end, ctx_retain(ctx)));
    EXPECT(ctx_on_done(&notes, ctx, takes_the_mutex, &guarded));
    send_self(sig);
    UNTIL(load(&guarded.runs) == 1);
    ctx_on_done_stop(&ends);
    ctx_on_done_stop(&notes);
    EXPECT_EQ(ctx_cause(ctx).code, SIGTERM);
    ctx_end(ctx);
    EXPECT(is_default(sig));
    pthread_mutex_destroy(&guarded.mutex);
}

/* -- the second signal ------------------------------------------------------------------------------------------ */

static int signalled_twice(void) {
    const int set[] = {SIGTERM, SIGINT};
    ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 2);
    send_self(SIGTERM);
    if (ctx_wait(ctx, LONG_WAIT) != CTX_CANCELED) return 1;
    send_self(SIGTERM); /* the end */
    return 2;
}

static int signalled_once(void) {
    const int set[] = {SIGTERM, SIGINT};
    ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 2);
    send_self(SIGTERM);
    if (ctx_wait(ctx, LONG_WAIT) != CTX_CANCELED) return 1;
    ctx_end(ctx);
    return 0;
}

static int signalled_after_the_end(void) {
    const int sig = SIGTERM;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_end(ctx);
    send_self(sig); /* as if nothing had ever been asked for */
    return 2;
}

static int signalled_twice_over_a_handler(void) {
    const int sig = SIGTERM;
    set_action(sig, own_handler, 0);
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    send_self(sig);
    if (ctx_wait(ctx, LONG_WAIT) != CTX_CANCELED) return 1;
    send_self(sig); /* the default action, whatever stood before */
    return 2;
}

static int signalled_twice_by_two_contexts(void) {
    const int sig = SIGINT;
    ctx_t *a = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_t *b = ctx_notify_signals(ctx_background(), &sig, 1);
    send_self(sig);
    if (ctx_wait(a, LONG_WAIT) != CTX_CANCELED || ctx_wait(b, LONG_WAIT) != CTX_CANCELED) return 1;
    ctx_end(a);
    send_self(sig); /* the other one is live, but has had its signal */
    return 2;
}

static int asked_again_after_the_first(void) {
    const int sig = SIGINT;
    ctx_t *first = ctx_notify_signals(ctx_background(), &sig, 1);
    send_self(sig);
    if (ctx_wait(first, LONG_WAIT) != CTX_CANCELED) return 1;
    ctx_t *second = ctx_notify_signals(ctx_background(), &sig, 1);
    send_self(sig);
    if (ctx_wait(second, LONG_WAIT) != CTX_CANCELED) return 3;
    ctx_end(first);
    ctx_end(second);
    return is_default(sig) ? 0 : 4;
}

TEST(a_second_signal_ends_the_process) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    EXPECT_EQ(end_of(status_of(signalled_once)), 0);
    EXPECT_EQ(end_of(status_of(signalled_twice)), -SIGTERM);
    EXPECT_EQ(end_of(status_of(signalled_twice_by_two_contexts)), -SIGINT);
    EXPECT_EQ(end_of(status_of(signalled_twice_over_a_handler)), -SIGTERM);
}

TEST(after_the_end_a_signal_does_what_it_always_did) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    EXPECT_EQ(end_of(status_of(signalled_after_the_end)), -SIGTERM);
}

TEST(a_context_made_after_the_first_signal_gets_the_next) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    EXPECT_EQ(end_of(status_of(asked_again_after_the_first)), 0);
}

/* -- several contexts ------------------------------------------------------------------------------------------- */

TEST(every_context_that_asked_for_the_signal_is_canceled) {
    const int term[] = {SIGTERM}, both[] = {SIGUSR1, SIGTERM}, usr[] = {SIGUSR1};
    ctx_t *a = ctx_notify_signals(ctx_background(), term, 1);
    ctx_t *b = ctx_notify_signals(ctx_background(), both, 2);
    ctx_t *c = ctx_notify_signals(ctx_background(), usr, 1);
    ctx_t *below = ctx_notify_signals(a, term, 1);
    send_self(SIGTERM);
    EXPECT_EQ(ctx_wait(a, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_wait(b, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_wait(below, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(b).code, SIGTERM);
    EXPECT_EQ(ctx_wait(c, CTX_MS(20)), CTX_NOT_READY);
    send_self(SIGUSR1);
    EXPECT_EQ(ctx_wait(c, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(c).code, SIGUSR1);
    EXPECT_EQ(ctx_cause(b).code, SIGTERM);
    ctx_end(a);
    ctx_end(b);
    ctx_end(c);
    ctx_end(below);
    EXPECT(is_default(SIGTERM));
    EXPECT(is_default(SIGUSR1));
}

TEST(the_action_comes_back_with_the_last_context_only) {
    const int sig = SIGUSR1;
    ctx_t *ctx[3];
    for (int end_first = 0; end_first < 3; end_first++) {
        for (int i = 0; i < 3; i++) ctx[i] = ctx_notify_signals(ctx_background(), &sig, 1);
        for (int k = 0; k < 2; k++) ctx_end(ctx[(end_first + k) % 3]);
        EXPECT(!is_default(sig));
        ctx_t *last = ctx[(end_first + 2) % 3];
        send_self(sig);
        EXPECT_EQ(ctx_wait(last, LONG_WAIT), CTX_CANCELED);
        ctx_end(last);
        EXPECT(is_default(sig));
    }
}

TEST(a_set_that_names_a_signal_twice_is_fine) {
    const int set[] = {SIGUSR1, SIGUSR1, SIGUSR1};
    ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 3);
    send_self(SIGUSR1);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
    EXPECT(is_default(SIGUSR1));
    ctx = ctx_notify_signals(ctx_background(), set, 3);
    ctx_end(ctx);
    EXPECT(is_default(SIGUSR1));
}

/* -- what stood before ------------------------------------------------------------------------------------------ */

/* Ended before any signal (0), after one (1), or with its parent canceled (2). */
static void notify_and_end(int sig, int how) {
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *ctx = ctx_notify_signals(parent, &sig, 1);
    EXPECT_EQ(ctx_err(ctx), 0);
    if (how == 1) {
        send_self(sig);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, sig);
    }
    if (how == 2) ctx_cancel(parent);
    ctx_end(ctx);
    ctx_end(parent);
}

TEST(earlier_handlers_come_back_as_they_were) {
    for (int how = 0; how < 3; how++) {
        set_action(SIGUSR1, own_handler, SA_RESTART | SA_NODEFER);
        store(&own_handler_runs, 0);
        notify_and_end(SIGUSR1, how);
        EXPECT_EQ(load(&own_handler_runs), 0); /* not called while it was replaced */
        struct sigaction action = action_of(SIGUSR1);
        EXPECT(action.sa_handler == own_handler);
        EXPECT((action.sa_flags & (SA_RESTART | SA_NODEFER)) == (SA_RESTART | SA_NODEFER));
        EXPECT(sigismember(&action.sa_mask, SIGWINCH) == 1);
        raise(SIGUSR1);
        EXPECT_EQ(load(&own_handler_runs), 1);
        signal(SIGUSR1, SIG_DFL);
    }
}

TEST(an_ignored_signal_is_noticed_and_ignored_again_afterwards) {
    for (int how = 0; how < 3; how++) {
        signal(SIGUSR2, SIG_IGN);
        notify_and_end(SIGUSR2, how);
        EXPECT(action_of(SIGUSR2).sa_handler == SIG_IGN);
        raise(SIGUSR2);
        signal(SIGUSR2, SIG_DFL);
    }
}

TEST(the_default_action_comes_back) {
    for (int how = 0; how < 3; how++) {
        notify_and_end(SIGTERM, how);
        EXPECT(is_default(SIGTERM));
    }
}

TEST(signals_that_were_not_asked_for_are_left_alone) {
    const int sig = SIGUSR1;
    set_action(SIGUSR2, own_handler, 0);
    store(&own_handler_runs, 0);
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    raise(SIGUSR2);
    EXPECT_EQ(load(&own_handler_runs), 1);
    EXPECT_EQ(ctx_wait(ctx, CTX_MS(20)), CTX_NOT_READY);
    ctx_end(ctx);
    EXPECT(action_of(SIGUSR2).sa_handler == own_handler);
    signal(SIGUSR2, SIG_DFL);
}

TEST(a_canceled_parent_cancels_with_its_own_cause) {
    const int sig = SIGUSR1;
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *ctx = ctx_notify_signals(parent, &sig, 1);
    ctx_cancel_cause(parent, -1234, "over");
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(ctx).code, -1234);
    ctx_t *late = ctx_notify_signals(parent, &sig, 1); /* born done */
    EXPECT_EQ(ctx_err(late), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(late).code, -1234);
    ctx_end(ctx);
    ctx_end(late);
    ctx_end(parent);
    EXPECT(is_default(sig));
}

TEST(a_retained_context_gives_its_signal_back_when_it_is_ended) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_t *kept = ctx_retain(ctx);
    ctx_end(ctx);
    EXPECT_EQ(ctx_err(kept), CTX_CANCELED);
    EXPECT(is_default(sig));
    ctx_release(kept);
}

TEST(a_context_released_without_an_end_is_not_touched_by_a_later_signal) {
    set_action(SIGUSR1, own_handler, 0);
    const int sig = SIGUSR1;
    ctx_release(ctx_notify_signals(ctx_background(), &sig, 1)); /* its last reference */
    raise(SIGUSR1);
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    raise(SIGUSR1);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
    EXPECT(action_of(SIGUSR1).sa_handler == own_handler);
    signal(SIGUSR1, SIG_DFL);
}

/* -- signals that do not stop ----------------------------------------------------------------------------------- */

typedef struct {
    ctx_on_signals_t reg;
    int usr1, usr2, hup, other; /* [atomic] calls */
    int running;                /* [atomic] calls that have not returned */
    int tid, entered;           /* [atomic] where and how often fn was called */
    gate_t *gate;               /* fn stands here (may be NULL) */
    ctx_t *cancels;             /* ... then cancels this (may be NULL) */
    ctx_on_signals_t *stops;    /* ... and stops this (may be NULL) */
    ctx_on_done_t *stops_reg;   /* ... and this (may be NULL) */
} hears_t;

static void hears(int sig, void *user) {
    hears_t *h = (hears_t *)user;
    add(&h->running, 1);
    store(&h->tid, thread_id());
    add(&h->entered, 1);
    if (h->gate) gate_pass(h->gate);
    if (h->cancels) ctx_cancel(h->cancels);
    if (h->stops) ctx_on_signals_stop(h->stops);
    if (h->stops_reg) ctx_on_done_stop(h->stops_reg);
    add(sig == SIGUSR1 ? &h->usr1 : sig == SIGUSR2 ? &h->usr2 : sig == SIGHUP ? &h->hup : &h->other, 1);
    add(&h->running, -1);
}

static int calls_of(hears_t *h) { return load(&h->usr1) + load(&h->usr2) + load(&h->hup) + load(&h->other); }

/* A registration for one signal below the background. */
static void hear(hears_t *h, int sig) {
    memset(h, 0, sizeof *h);
    EXPECT_EQ(ctx_on_signals(&h->reg, ctx_background(), &sig, 1, hears, h), 0);
}

/* A signal whose delivery is over when this returns: the signal thread has gone through all before it. `sig` must have
   no other listener. */
static void after_delivery_of(int last) {
    hears_t probe;
    hear(&probe, last);
    send_self(last);
    UNTIL(calls_of(&probe) == 1);
    ctx_on_signals_stop(&probe.reg);
}

TEST(each_signal_is_told_and_none_ends_the_process) {
    hears_t h;
    hear(&h, SIGHUP);
    EXPECT((action_of(SIGHUP).sa_flags & (int)SA_RESETHAND) == 0);
    for (int i = 1; i <= 50; i++) {
        send_self(SIGHUP);
        UNTIL(load(&h.hup) == i);
    }
    ctx_on_signals_stop(&h.reg);
    EXPECT(is_default(SIGHUP));
    EXPECT_EQ(calls_of(&h), 50);
    EXPECT(load(&h.tid) != thread_id());
}

TEST(signals_that_come_during_a_call_are_remembered_once_each) {
    const int set[] = {SIGUSR1, SIGUSR2, SIGUSR1};
    hears_t h;
    gate_t gate;
    gate_init(&gate);
    memset(&h, 0, sizeof h);
    h.gate = &gate;
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), set, 3, hears, &h), 0);
    send_self(SIGUSR1);
    gate_await(&gate, 1);
    for (int i = 0; i < 5; i++) raise(SIGUSR1);
    for (int i = 0; i < 5; i++) raise(SIGUSR2);
    gate_open(&gate);
    UNTIL(calls_of(&h) == 3);
    after_delivery_of(SIGHUP);
    EXPECT_EQ(load(&h.usr1), 2);
    EXPECT_EQ(load(&h.usr2), 1);
    ctx_on_signals_stop(&h.reg);
    EXPECT(is_default(SIGUSR1) && is_default(SIGUSR2));
    gate_destroy(&gate);
}

/* The context has had its signal; the registration keeps the process from dying of the next one. */
TEST(contexts_and_registrations_are_told_of_the_same_signal) {
    const int sig = SIGUSR1;
    for (int first = 0; first < 2; first++) {
        hears_t h;
        ctx_t *ctx = first ? ctx_notify_signals(ctx_background(), &sig, 1) : NULL;
        hear(&h, sig);
        if (!first) ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        send_self(sig);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        EXPECT_EQ(ctx_cause(ctx).code, sig);
        EXPECT_EQ(load(&h.usr1), 1); /* registrations are told first */
        send_self(sig);
        UNTIL(load(&h.usr1) == 2);
        ctx_on_signals_stop(&h.reg);
        EXPECT(is_default(sig)); /* now the next one ends the process */
        ctx_end(ctx);
        EXPECT(is_default(sig));
    }
}

TEST(a_registration_below_a_context_of_the_same_signal_is_told_too) {
    const int sig = SIGUSR1;
    hears_t h;
    memset(&h, 0, sizeof h);
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx, &sig, 1, hears, &h), 0);
    send_self(sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(load(&h.usr1), 1);
    ctx_on_signals_stop(&h.reg);
    ctx_end(ctx);
    EXPECT(is_default(sig));
}

TEST(a_context_waits_for_its_signal_as_before_when_a_registration_has_gone) {
    const int sig = SIGUSR1;
    hears_t h;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    hear(&h, sig);
    ctx_on_signals_stop(&h.reg);
    EXPECT((action_of(sig).sa_flags & (int)SA_RESETHAND) != 0);
    send_self(sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    EXPECT_EQ(calls_of(&h), 0);
    ctx_end(ctx);
    EXPECT(is_default(sig));
}

TEST(the_action_comes_back_with_the_last_registration) {
    hears_t a, b;
    set_action(SIGUSR1, own_handler, SA_NODEFER);
    hear(&a, SIGUSR1);
    hear(&b, SIGUSR1);
    ctx_on_signals_stop(&a.reg);
    send_self(SIGUSR1);
    UNTIL(load(&b.usr1) == 1);
    ctx_on_signals_stop(&b.reg);
    EXPECT(action_of(SIGUSR1).sa_handler == own_handler);
    EXPECT_EQ(calls_of(&a), 0);
    signal(SIGUSR1, SIG_DFL);
}

TEST(nothing_is_told_once_the_context_is_done) {
    const int sig = SIGUSR1;
    hears_t h;
    memset(&h, 0, sizeof h);
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx, &sig, 1, hears, &h), 0);
    ctx_end(ctx);             /* the registration holds its memory */
    EXPECT(!is_default(sig)); /* and still keeps the process alive, ... */
    send_self(sig);
    after_delivery_of(SIGUSR2);
    EXPECT_EQ(calls_of(&h), 0);
    ctx_on_signals_stop(&h.reg);
    EXPECT(is_default(sig));                                                    /* ... until it is stopped */
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, hears, &h), 0); /* the storage is as new */
    send_self(sig);
    UNTIL(load(&h.usr1) == 1);
    ctx_on_signals_stop(&h.reg);
}

TEST(a_call_may_cancel_its_own_context) {
    const int sig = SIGUSR1;
    hears_t h, later;
    memset(&h, 0, sizeof h);
    memset(&later, 0, sizeof later);
    h.cancels = ctx_with_cancel(ctx_background());
    EXPECT_EQ(ctx_on_signals(&h.reg, h.cancels, &sig, 1, hears, &h), 0);
    EXPECT_EQ(ctx_on_signals(&later.reg, h.cancels, &sig, 1, hears, &later), 0);
    send_self(sig);
    UNTIL(load(&h.usr1) == 1);
    send_self(sig);
    after_delivery_of(SIGUSR2);
    EXPECT_EQ(calls_of(&h), 1);
    EXPECT_EQ(calls_of(&later), 0); /* its context was done when its turn came */
    ctx_on_signals_stop(&h.reg);
    ctx_on_signals_stop(&later.reg);
    ctx_end(h.cancels);
}

/* -- stopping a registration -- */

typedef struct {
    ctx_on_signals_t *reg;
    int tid, done; /* [atomic] */
} stops_t;

static void *stops_a_registration(void *arg) {
    stops_t *s = (stops_t *)arg;
    store(&s->tid, thread_id());
    ctx_on_signals_stop(s->reg);
    store(&s->done, 1);
    return NULL;
}

TEST(a_stop_waits_for_the_call_that_runs) {
    hears_t h;
    gate_t gate;
    stops_t s[2];
    pthread_t threads[2];
    gate_init(&gate);
    hear(&h, SIGUSR1);
    h.gate = &gate;
    send_self(SIGUSR1);
    gate_await(&gate, 1);
    send_self(SIGUSR1); /* it is due, but will not be told */
    memset(s, 0, sizeof s);
    for (int i = 0; i < 2; i++) s[i].reg = &h.reg;
    for (int i = 0; i < 2; i++) threads[i] = thread_start(stops_a_registration, &s[i]);
    for (int i = 0; i < 2; i++) until_asleep(&s[i].tid);
    EXPECT(load(&s[0].done) == 0 && load(&s[1].done) == 0);
    EXPECT(is_default(SIGUSR1)); /* it hears no more */
    gate_open(&gate);
    for (int i = 0; i < 2; i++) thread_join(threads[i]);
    EXPECT_EQ(load(&h.running), 0);
    after_delivery_of(SIGUSR2);
    EXPECT_EQ(calls_of(&h), 1);
    gate_destroy(&gate);
}

static int freed; /* [atomic] */

static void frees_itself(int sig, void *user) {
    hears_t *h = (hears_t *)user;
    EXPECT_EQ(sig, SIGUSR1);
    ctx_on_signals_stop(&h->reg);
    EXPECT(is_default(SIGUSR1));
    free(h);
    store(&freed, 1);
}

TEST(a_call_may_stop_and_free_its_own_registration) {
    const int sig = SIGUSR1;
    hears_t *h = (hears_t *)calloc(1, sizeof *h);
    if (!h) abort();
    EXPECT_EQ(ctx_on_signals(&h->reg, ctx_background(), &sig, 1, frees_itself, h), 0);
    send_self(sig);
    UNTIL(load(&freed));
    after_delivery_of(SIGUSR2);
}

TEST(a_registration_that_another_call_stops_first_is_not_told) {
    hears_t first, second;
    hear(&first, SIGUSR1);
    hear(&second, SIGUSR1);
    first.stops = &second.reg;
    send_self(SIGUSR1);
    UNTIL(load(&first.usr1) == 1);
    after_delivery_of(SIGUSR2);
    EXPECT_EQ(calls_of(&second), 0);
    ctx_on_signals_stop(&first.reg);
}

/* fn waits for a callback on another thread, and that stops the registration. */
typedef struct {
    hears_t h;
    ctx_on_done_t reg;
    gate_t gate;
    ctx_t *ctx;
    int stopped; /* [atomic] */
} circle_t;

static void stops_when_fn_waits(void *arg) {
    circle_t *circle = (circle_t *)arg;
    gate_pass(&circle->gate);
    until_asleep(&circle->h.tid); /* in ctx_on_done_stop() */
    ctx_on_signals_stop(&circle->h.reg);
    store(&circle->stopped, 1);
}

static void *cancels_the_circle(void *arg) {
    ctx_cancel(((circle_t *)arg)->ctx);
    return NULL;
}

TEST(a_callback_that_the_call_waits_for_may_stop_it) {
    circle_t circle;
    memset(&circle, 0, sizeof circle);
    gate_init(&circle.gate);
    circle.ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_on_done(&circle.reg, circle.ctx, stops_when_fn_waits, &circle));
    hear(&circle.h, SIGUSR1);
    circle.h.stops_reg = &circle.reg;
    pthread_t thread = thread_start(cancels_the_circle, &circle);
    gate_await(&circle.gate, 1);
    send_self(SIGUSR1);
    UNTIL(load(&circle.h.entered) == 1);
    gate_open(&circle.gate);
    UNTIL(load(&circle.stopped));
    thread_join(thread);
    UNTIL(load(&circle.h.usr1) == 1);
    after_delivery_of(SIGUSR2);
    EXPECT_EQ(calls_of(&circle.h), 1);
    ctx_end(circle.ctx);
    gate_destroy(&circle.gate);
}

/* fn cancels a context, and a callback of that, on the same thread, stops the registration. */
static void stops_by_callback(void *arg) { ctx_on_signals_stop((ctx_on_signals_t *)arg); }

TEST(a_callback_that_the_call_runs_may_stop_it) {
    hears_t h;
    ctx_on_done_t reg;
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    hear(&h, SIGUSR1);
    h.cancels = ctx;
    EXPECT(ctx_on_done(&reg, ctx, stops_by_callback, &h.reg));
    send_self(SIGUSR1);
    UNTIL(load(&h.usr1) == 1);
    EXPECT(is_default(SIGUSR1));
    EXPECT(!ctx_on_done_stop(&reg));
    ctx_end(ctx);
}

TEST(stopping_what_is_not_registered_does_nothing) {
    const int kill_sig = SIGKILL, sig = SIGUSR1;
    hears_t h;
    memset(&h, 0, sizeof h);
    ctx_on_signals_stop(&h.reg);
    memset(&h.reg, 0xa5, sizeof h.reg); /* storage need not be initialised */
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &kill_sig, 1, hears, &h), CTX_INVALID);
    ctx_on_signals_stop(&h.reg);
    memset(&h.reg, 0xa5, sizeof h.reg);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, hears, &h), 0);
    ctx_on_signals_stop(&h.reg);
    ctx_on_signals_stop(&h.reg);
    EXPECT(is_default(sig));
}

TEST(a_registration_that_cannot_be_made_says_why) {
    const int bad[] = {SIGUSR1, SIGSTOP}, zero = 0, sig = SIGUSR1;
    static int another_copy;
    hears_t h;
    memset(&h, 0, sizeof h);
    ctx_t *done = ctx_with_cancel(ctx_background()), *late = ctx_with_timeout(ctx_background(), -1);
    ctx_cancel(done);
    EXPECT_EQ(ctx_on_signals(NULL, ctx_background(), &sig, 1, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, NULL, &sig, 1, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), NULL, 1, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 0, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &zero, 1, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, NULL, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), bad, 2, hears, &h), CTX_INVALID);
    EXPECT_EQ(ctx_on_signals(&h.reg, done, &sig, 1, hears, &h), CTX_CANCELED);
    EXPECT_EQ(ctx_on_signals(&h.reg, late, &sig, 1, hears, &h), CTX_DEADLINE_EXCEEDED);
    CTX__STORE(&ctx__signals_owner, (void *)&another_copy, RELAXED);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, hears, &h), CTX_ALREADY);
    ctx_on_signals_stop(&h.reg);
    CTX__STORE(&ctx__signals_owner, (void *)NULL, RELAXED);
    EXPECT(is_default(SIGUSR1));
    ctx_end(done);
    ctx_end(late);
}

/* The copy that handles signals lets go of them with its last registration. */
TEST(a_registration_holds_the_signals_for_its_copy) {
    hears_t h;
    hear(&h, SIGUSR1);
    EXPECT(CTX__LOAD(&ctx__signals_owner, RELAXED) != NULL);
    ctx_on_signals_stop(&h.reg);
    EXPECT(CTX__LOAD(&ctx__signals_owner, RELAXED) == NULL);
}

TEST(registrations_need_no_memory_but_a_thread) {
    const int sig = SIGUSR1;
    hears_t h;
    memset(&h, 0, sizeof h);
    ctx_runtime_stop();
    fault_threads_all_after(0);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, hears, &h), CTX_NO_MEMORY);
    EXPECT(fault_threads_off());
    EXPECT(is_default(sig));
    ctx_on_signals_stop(&h.reg);
    fault_all_after(0);
    EXPECT_EQ(ctx_on_signals(&h.reg, ctx_background(), &sig, 1, hears, &h), 0);
    EXPECT(!fault_off());
    send_self(sig);
    UNTIL(load(&h.usr1) == 1);
    ctx_on_signals_stop(&h.reg);
    EXPECT(is_default(sig));
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(a_registration_hears_signals_after_the_end_of_the_runtime) {
    hears_t h;
    hear(&h, SIGUSR1);
    for (int i = 1; i <= 3; i++) {
        ctx_runtime_stop();
        send_self(SIGUSR1);
        UNTIL(load(&h.usr1) == i);
    }
    ctx_on_signals_stop(&h.reg);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

/* -- ending while signals come ---------------------------------------------------------------------------------- */

typedef struct {
    int stop;
    pthread_t target;
} storm_t;

/* The first signal restores the default action, so that only one which is ignored by default may come at any moment. */
#define storm_signal SIGURG

static void *storms(void *arg) {
    storm_t *storm = (storm_t *)arg;
    while (!load(&storm->stop)) {
        pthread_kill(storm->target, storm_signal);
        spin(1000);
    }
    return NULL;
}

TEST(contexts_may_be_made_and_ended_while_signals_rain) {
    const int sig = storm_signal;
    storm_t storm;
    storm.stop = 0;
    storm.target = pthread_self();
    pthread_t thread = thread_start(storms, &storm);
    int rounds = test_scale(2000);
    for (int i = 0; i < rounds; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        if (i % 2) EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        if (i % 2) EXPECT_EQ(ctx_cause(ctx).code, sig);
        ctx_end(ctx);
    }
    store(&storm.stop, 1);
    thread_join(thread);
    EXPECT(is_default(sig));
}

static void counts_storms(int sig, void *user) {
    EXPECT_EQ(sig, storm_signal);
    EXPECT_EQ(add((int *)user, 1) & 1, 1); /* one call at a time */
    spin(50);
    add((int *)user, 1);
}

TEST(registrations_may_come_and_go_while_signals_rain) {
    const int sig = storm_signal;
    storm_t storm;
    storm.stop = 0;
    storm.target = pthread_self();
    pthread_t thread = thread_start(storms, &storm);
    int rounds = test_scale(2000);
    for (int i = 0; i < rounds; i++) {
        ctx_on_signals_t reg;
        int count = 0;
        EXPECT_EQ(ctx_on_signals(&reg, ctx_background(), &sig, 1, counts_storms, &count), 0);
        if (i % 2) UNTIL(load(&count) > 0);
        ctx_on_signals_stop(&reg);
        EXPECT_EQ(load(&count) & 1, 0); /* not inside a call */
        memset(&reg, 0xa5, sizeof reg);
    }
    store(&storm.stop, 1);
    thread_join(thread);
    EXPECT(is_default(sig));
}

/* -- fork ------------------------------------------------------------------------------------------------------- */

/* A child of fork() inherits the handler. Its signals are none of its parent's business. */
TEST(a_signal_to_a_forked_child_does_not_cancel_the_parents_context) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(60);
        send_self(sig);
        test_sleep_ms(20);
        _exit(0);
    }
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(ctx_wait(ctx, CTX_MS(50)), CTX_NOT_READY);
    send_self(sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
}

TEST(a_forked_child_may_ask_for_signals_afresh) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    if (getenv("TEST_NO_CHILD_THREADS")) SKIP("no new thread may start in a fork here");
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        ctx_end(ctx);
        ctx_t *own = ctx_notify_signals(ctx_background(), &sig, 1);
        send_self(sig);
        if (ctx_wait(own, LONG_WAIT) != CTX_CANCELED) _exit(1);
        if (ctx_cause(own).code != sig) _exit(2);
        ctx_end(own);
        _exit(is_default(sig) ? 0 : 3);
    }
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(end_of(status), 0);
    EXPECT_EQ(ctx_err(ctx), 0);
    send_self(sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
}

static void *hears_usr2_apart(void *arg) {
    hear((hears_t *)arg, SIGUSR2);
    return NULL;
}

/* The registration of another thread may be on a stack that is gone. */
TEST(a_forked_child_keeps_the_registrations_of_the_thread_that_forked) {
    hears_t mine, others;
    hear(&mine, SIGUSR1);
    pthread_t thread = thread_start(hears_usr2_apart, &others);
    thread_join(thread);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        if (is_default(SIGUSR1)) _exit(1);
        if (!is_default(SIGUSR2)) _exit(2);
        ctx_on_signals_stop(&others.reg); /* does nothing */
#ifndef TEST_THREAD_SANITIZER
        if (!getenv("TEST_NO_CHILD_THREADS")) {
            for (int i = 1; i <= 3; i++) {
                send_self(SIGUSR1);
                UNTIL(load(&mine.usr1) == i);
            }
            if (load(&mine.usr1) != 3) _exit(3);
        }
#endif
        ctx_on_signals_stop(&mine.reg);
        _exit(is_default(SIGUSR1) ? 0 : 4);
    }
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(end_of(status), 0);
    EXPECT_EQ(calls_of(&mine), 0);
    send_self(SIGUSR2);
    UNTIL(load(&others.usr2) == 1);
    ctx_on_signals_stop(&others.reg);
    ctx_on_signals_stop(&mine.reg);
    EXPECT(is_default(SIGUSR1) && is_default(SIGUSR2));
}

static int forked_status; /* [atomic] */

static void forks(int sig, void *user) {
    int *calls = (int *)user;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        _exit(is_default(sig) ? 0 : 1); /* the registration is the main thread's */
    }
    int status = -1;
    if (waitpid(pid, &status, 0) == pid) store(&forked_status, status);
    add(calls, 1);
}

TEST(a_call_may_fork) {
    const int sig = SIGUSR1;
    ctx_on_signals_t reg;
    int calls = 0;
    store(&forked_status, -1);
    EXPECT_EQ(ctx_on_signals(&reg, ctx_background(), &sig, 1, forks, &calls), 0);
    send_self(sig);
    UNTIL(load(&calls) == 1);
    EXPECT_EQ(end_of(load(&forked_status)), 0);
    ctx_on_signals_stop(&reg);
}

/* A registration of the signal thread's own lives in the child, whose own signal thread is another one. */
static ctx_on_signals_t inner;
static hears_t inner_hears;

static void registers_and_forks(int sig, void *user) {
    int *calls = (int *)user;
    const int second = SIGUSR2;
    (void)sig;
    memset(&inner_hears, 0, sizeof inner_hears);
    EXPECT_EQ(ctx_on_signals(&inner, ctx_background(), &second, 1, hears, &inner_hears), 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(100);
        send_self(second);
        UNTIL(load(&inner_hears.usr2) == 1);
        ctx_on_signals_stop(&inner);
        _exit(load(&inner_hears.usr2) == 1 && is_default(second) ? 0 : 1);
    }
    int status = -1;
    if (waitpid(pid, &status, 0) == pid) store(&forked_status, status);
    ctx_on_signals_stop(&inner);
    add(calls, 1);
}

TEST(a_call_that_forks_hears_signals_in_the_child) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("no new thread may start in a fork of a threaded process here");
#endif
    if (getenv("TEST_NO_CHILD_THREADS")) SKIP("no new thread may start in a fork here");
    const int sig = SIGUSR1;
    ctx_on_signals_t reg;
    int calls = 0;
    store(&forked_status, -1);
    EXPECT_EQ(ctx_on_signals(&reg, ctx_background(), &sig, 1, registers_and_forks, &calls), 0);
    send_self(sig);
    UNTIL(load(&calls) == 1);
    EXPECT_EQ(end_of(load(&forked_status)), 0);
    ctx_on_signals_stop(&reg);
}

/* -- bad arguments and short supplies --------------------------------------------------------------------------- */

TEST(what_cannot_be_caught_is_invalid) {
    const int bad[] = {SIGKILL, SIGSTOP, 0, -1, 9999, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &bad[i], 1);
        EXPECT_EQ(ctx_err(ctx), CTX_INVALID);
        ctx_end(ctx);
        const int mixed[] = {SIGUSR1, bad[i], SIGUSR2};
        ctx = ctx_notify_signals(ctx_background(), mixed, 3);
        EXPECT_EQ(ctx_err(ctx), CTX_INVALID);
        EXPECT(is_default(SIGUSR1)); /* nothing was left half done */
        EXPECT(is_default(SIGUSR2));
        ctx_end(ctx);
        EXPECT(is_default(SIGUSR1));
        EXPECT(is_default(SIGUSR2));
    }
}

TEST(no_signals_at_all_are_invalid) {
    const int sig = SIGTERM;
    ctx_t *none = ctx_notify_signals(ctx_background(), &sig, 0);
    ctx_t *null = ctx_notify_signals(ctx_background(), NULL, 0);
    ctx_t *null_set = ctx_notify_signals(ctx_background(), NULL, 1);
    ctx_t *orphan = ctx_notify_signals(NULL, &sig, 1);
    EXPECT_EQ(ctx_err(none), CTX_INVALID);
    EXPECT_EQ(ctx_err(null), CTX_INVALID);
    EXPECT_EQ(ctx_err(null_set), CTX_INVALID);
    EXPECT_EQ(ctx_err(orphan), CTX_INVALID);
    EXPECT(is_default(SIGTERM));
    ctx_end(none);
    ctx_end(null);
    ctx_end(null_set);
    ctx_end(orphan);
}

TEST(without_memory_it_is_a_failed_context_and_no_handler_stays) {
    const int set[] = {SIGUSR1, SIGUSR2};
    ctx_runtime_stop();
    for (long n = 0;; n++) {
        fault_after(n);
        ctx_t *ctx = ctx_notify_signals(ctx_background(), set, 2);
        bool failed = fault_off();
        int err = ctx_err(ctx);
        EXPECT(failed ? err == 0 || err == CTX_NO_MEMORY : err == 0);
        if (err) EXPECT(is_default(SIGUSR1) && is_default(SIGUSR2));
        ctx_end(ctx);
        EXPECT(is_default(SIGUSR1) && is_default(SIGUSR2));
        ctx_runtime_stop();
        if (!failed) break;
    }
    EXPECT_EQ(fault_live(), 0);
}

TEST(the_runtime_stops_while_a_signal_comes_in) {
    const int sig = SIGUSR1;
    for (int i = 0; i < 50; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        send_self(sig);
        spin((unsigned)i * 200);
        ctx_runtime_stop();
        ctx_end(ctx);
        EXPECT(is_default(sig));
    }
}

typedef struct {
    gate_t gate;
    int done;
} ender_t;

static void asks_for_a_signal(void *arg) {
    ender_t *ender = (ender_t *)arg;
    const int sig = SIGUSR2;
    gate_pass(&ender->gate);
    test_sleep_ms(20); /* the other thread is inside ctx_runtime_stop() by now, most likely */
    ctx_end(ctx_notify_signals(ctx_background(), &sig, 1));
    store(&ender->done, 1);
}

TEST(the_runtime_stops_while_a_callback_uses_the_library) {
    ender_t ender;
    gate_init(&ender.gate);
    ender.done = 0;
    gate_open(&ender.gate);
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    ctx_on_done_t reg;
    ctx_on_done(&reg, ctx, asks_for_a_signal, &ender);
    gate_await(&ender.gate, 1);
    ctx_runtime_stop();
    UNTIL(load(&ender.done));
    ctx_on_done_stop(&reg);
    ctx_end(ctx);
    EXPECT(is_default(SIGUSR2));
    gate_destroy(&ender.gate);
    ctx_runtime_stop();
}

static void *makes_contexts(void *arg) {
    ender_t *ender = (ender_t *)arg;
    const int sig = SIGUSR2;
    gate_pass(&ender->gate);
    while (!load(&ender->done)) ctx_end(ctx_notify_signals(ctx_background(), &sig, 1));
    return NULL;
}

/* A successor that took the post which was meant for the signal thread would leave that one waiting for ever. */
TEST(a_stop_ends_the_signal_thread_though_another_is_started) {
    const int sig = SIGUSR1;
    ender_t ender;
    gate_init(&ender.gate);
    ender.done = 0;
    pthread_t thread = thread_start(makes_contexts, &ender);
    gate_await(&ender.gate, 1);
    gate_open(&ender.gate);
    for (int i = 0; i < test_scale(20000); i++) {
        ctx_end(ctx_notify_signals(ctx_background(), &sig, 1));
        ctx_runtime_stop();
    }
    store(&ender.done, 1);
    pthread_join(thread, NULL);
    ctx_runtime_stop();
    EXPECT(is_default(SIGUSR1) && is_default(SIGUSR2));
    gate_destroy(&ender.gate);
    EXPECT_EQ(fault_live(), 0);
}

TEST(a_signal_after_the_end_of_the_runtime_cancels_what_lives) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    ctx_runtime_stop();
    send_self(sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

/* Its handler has noted it, and the signal thread comes to it when that context has ended and another is there. */
TEST(a_signal_that_came_before_a_context_was_made_does_not_cancel_it) {
    const int first = SIGUSR1, second = SIGUSR2;
    CTX__STORE(&ctx__signals.pending[first], 1, RELAXED);
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &first, 1);
    ctx_t *other = ctx_notify_signals(ctx_background(), &second, 1);
    send_self(second);
    EXPECT_EQ(ctx_wait(other, LONG_WAIT), CTX_CANCELED); /* the thread has looked at the first by now */
    EXPECT_EQ(ctx_err(ctx), 0);
    ctx_end(ctx);
    ctx_end(other);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(the_runtime_stops_clean_and_starts_again) {
    const int sig = SIGUSR1;
    for (int i = 0; i < 5; i++) {
        ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
        send_self(sig);
        EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
        ctx_end(ctx);
        ctx_runtime_stop();
        EXPECT_EQ(fault_live(), 0);
    }
}

TEST_MAIN
