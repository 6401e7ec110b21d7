/* ctx_on_signals() against ctx_on_signals_stop(): after the stop no call runs, and none begins. A thread of the
   scenario stands for the signal thread, which waits at a semaphore that the explorer does not know. */
#include "sched.h"

#include <signal.h>

static const int usr1[] = { SIGUSR1 }, both[] = { SIGUSR1, SIGUSR2 };
static ctx_on_signals_t reg, reg_b, *heap;
static ctx_on_done_t on_done;
static ctx_t *ctx;
static int began, ended, began_b; /* how often */
static int stopped_b;              /* by the call of the first */
static uint32_t sent, heard[2];    /* [atomic] signals of each kind; how many there had been when the last call began */
static sched_flag_t step, more;

static bool is_default(int sig) {
    struct sigaction action;
    return sigaction(sig, NULL, &action) == 0 && action.sa_handler == SIG_DFL;
}

/* What the handler does, but for the post. */
static void come(int sig) {
    CTX__ADD(&sent, 1u, RELEASE);
    CTX__STORE(&ctx__signals.pending[sig], 1, RELEASE);
}

/* A turn of the signal thread. */
static void turn(void) {
    int sig;
    for (sig = 1; sig < CTX__SIGNALS; sig++)
        if (__atomic_load_n(&ctx__signals.pending[sig], __ATOMIC_RELAXED)) ctx__signal_deliver(sig);
}

static void fn(int sig, void *user) {
    (void)user;
    heard[sig == SIGUSR2] = CTX__LOAD(&sent, ACQUIRE);
    began++;
    sched_set(&step); /* a point inside the call */
    ended++;
}
static void fn_b(int sig, void *user) {
    (void)sig;
    (void)user;
    began_b++;
}

/* There is a signal thread: this one. */
static void setup_thread(void) {
    ctx__signals.running = true;
    ctx = ctx_with_cancel(ctx_background());
}
static void listen_with(ctx_on_signals_t *at, void (*call)(int sig, void *user)) {
    SCHED_CHECK(ctx_on_signals(at, ctx, usr1, 1, call, at) == 0);
}

/* -- a call and its stop -- */

static void setup(void) {
    setup_thread();
    listen_with(&reg, fn);
    come(SIGUSR1);
}
static void stop(void) {
    ctx_on_signals_stop(&reg);
    SCHED_CHECK(began == ended);
}
static void stop_and_reuse(void) {
    int before;
    ctx_on_signals_stop(&reg);
    before = began;
    SCHED_CHECK(began == ended);
    memset(&reg, 0xff, sizeof reg);
    sched_set(&step);
    SCHED_CHECK(began == before);
}
static void cancel(void) { ctx_cancel(ctx); }
static void finish(void) {
    SCHED_CHECK(began == ended);
    SCHED_CHECK(!ctx__signals.regs.first && is_default(SIGUSR1) && is_default(SIGUSR2));
    ctx__signals.running = false;
    ctx_end(ctx);
}
static void check(void) {
    SCHED_CHECK(began <= 1);
    finish();
}
static void stop_check(void) {
    ctx_on_signals_stop(&reg);
    check();
}
static void check_none(void) {
    SCHED_CHECK(began == 0);
    stop_check();
}
static void cancel_then_turn(void) {
    ctx_cancel(ctx);
    turn();
}

/* Two kinds, and a signal that comes at any time, a second time too: the last call began after it. */
static void setup_both(void) {
    setup_thread();
    SCHED_CHECK(ctx_on_signals(&reg, ctx, both, 2, fn, NULL) == 0);
    come(SIGUSR1);
}
static void signals_come(void) {
    come(SIGUSR2);
    come(SIGUSR1);
    sched_set(&more); /* the post */
}
static void two_turns(void) {
    turn();
    sched_await(&more);
    turn();
}
static void check_both(void) {
    ctx_on_signals_stop(&reg);
    SCHED_CHECK(heard[0] == 3 && heard[1] >= 2);
    SCHED_CHECK(began == 2 || began == 3);
    finish();
}

/* -- stop from inside -- */

static void fn_frees(int sig, void *user) {
    fn(sig, user);
    ctx_on_signals_stop((ctx_on_signals_t *)user);
    sched_free(user);
}
static void setup_frees(void) {
    setup_thread();
    heap = (ctx_on_signals_t *)sched_malloc(sizeof *heap);
    listen_with(heap, fn_frees);
    come(SIGUSR1);
}
static void check_frees(void) {
    turn();
    SCHED_CHECK(began == 1);
    finish();
}

/* The first call stops the second registration, which is not told then, whoever else stops it. */
static void fn_stops_b(int sig, void *user) {
    fn(sig, user);
    ctx_on_signals_stop(&reg_b);
    stopped_b = 1;
    SCHED_CHECK(began_b == 0);
}
static void setup_stops_b(void) {
    setup_thread();
    listen_with(&reg, fn_stops_b);
    listen_with(&reg_b, fn_b);
    come(SIGUSR1);
}
static void stop_b(void) {
    int before;
    ctx_on_signals_stop(&reg_b);
    before = began_b;
    sched_set(&step);
    SCHED_CHECK(began_b == before);
}
static void check_stops_b(void) {
    SCHED_CHECK(stopped_b && began_b == 0);
    stop_check();
}
static void setup_two(void) {
    setup_thread();
    listen_with(&reg, fn);
    listen_with(&reg_b, fn_b);
    come(SIGUSR1);
}
static void check_two(void) {
    SCHED_CHECK(began_b == 1);
    ctx_on_signals_stop(&reg_b);
    check();
}

/* A call that registers its storage anew: the stop takes that registration. */
static void fn_again_once(int sig, void *user);
static void fn_again(int sig, void *user) {
    fn(sig, user);
    ctx_on_signals_stop(&reg);
    listen_with(&reg, fn_again_once);
}
static void setup_again(void) {
    setup_thread();
    listen_with(&reg, fn_again);
    come(SIGUSR1);
}
/* The call on the new registration is over when the stop looks for one. */
static void fn_again_once(int sig, void *user) {
    if (began) fn(sig, user);
    else fn_again(sig, user);
}
static void setup_again_once(void) {
    setup_thread();
    listen_with(&reg, fn_again_once);
    come(SIGUSR1);
}
static void turn_again(void) {
    turn();
    come(SIGUSR1);
    turn();
}
static void stop_in_call(void) {
    sched_await(&step); /* the call has begun, so there is a registration to be stopped or to come */
    ctx_on_signals_stop(&reg);
    SCHED_CHECK(began == ended && reg.link.pprev == NULL);
}

/* The call waits for a callback of another thread, which stops its registration. */
static void fn_waits(int sig, void *user) {
    fn(sig, user);
    ctx_on_done_stop(&on_done);
}
static void stops_the_call(void *arg) {
    (void)arg;
    ctx_on_signals_stop(&reg);
}
static void setup_circle(void) {
    setup_thread();
    ctx_end(ctx);
    ctx = ctx_background();
    listen_with(&reg, fn_waits);
    ctx = ctx_with_cancel(ctx_background());
    ctx_on_done(&on_done, ctx, stops_the_call, NULL);
    come(SIGUSR1);
}

/* -- with a context for the same signal -- */

static ctx_t *notified;
static void setup_notified(void) {
    setup_thread();
    notified = ctx_notify_signals(ctx_background(), usr1, 1);
    listen_with(&reg, fn);
    come(SIGUSR1);
}
static void end_notified(void) { ctx_end(notified); }
static void check_notified(void) {
    ctx_end(notified);
    check();
}

static const sched_scenario_t scenarios[] = {
    { "signal: turn / stop", setup, { T(turn), T(stop) }, check, false },
    { "signal: turn / stop and re-use", setup, { T(turn), T(stop_and_reuse) }, check, false },
    { "signal: turn / stop / stop", setup, { T(turn), T(stop), T(stop) }, check, false },
    { "signal: turn / cancel", setup, { T(turn), T(cancel) }, stop_check, false },
    { "signal: turn / cancel / stop and re-use", setup, { T(turn), T(cancel), T(stop_and_reuse) }, check, false },
    { "signal: turn after a cancel", setup, { T(cancel_then_turn) }, check_none, false },
    { "signal: two registrations, turn / stop", setup_two, { T(turn), T(stop) }, check_two, false },
    { "signal: two turns / signals", setup_both, { T(two_turns), T(signals_come) }, check_both, false },
    { "signal: frees its registration", setup_frees, { T(turn) }, check_frees, false },
    { "signal: stops another", setup_stops_b, { T(turn) }, check_stops_b, false },
    { "signal: stops another / stop of that", setup_stops_b, { T(turn), T(stop_b) }, check_stops_b, false },
    { "signal: registers anew / stop", setup_again, { T(turn), T(stop_in_call) }, check, false },
    { "signal: registers anew, turn / stop", setup_again_once, { T(turn_again), T(stop_in_call) }, finish, false },
    { "signal: waits for a callback that stops it", setup_circle, { T(turn), T(cancel) }, stop_check, false },
    { "signal: turn / end / stop", setup_notified, { T(turn), T(end_notified), T(stop) }, check, false },
    { "signal: context too, turn / stop", setup_notified, { T(turn), T(stop) }, check_notified, false },
};
SCHED_MAIN(scenarios)
