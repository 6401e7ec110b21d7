/* ctx_on_done() against ctx_on_done_stop(): after true the callback never runs, after false it has finished. */
#include "sched.h"

static ctx_on_done_t reg, reg_b, *heap;
static ctx_t *c1, *c2;
static int began, ended, began_b, ended_b; /* how often */
static int stopped = -1;                   /* what the last stop returned */
static sched_flag_t step, again, go, b_began;

static void fn(void *arg) {
    (void)arg;
    began++;
    sched_set(&step); /* a point inside the callback */
    ended++;
}
static void fn_b(void *arg) {
    (void)arg;
    began_b++;
    sched_set(&b_began);
    sched_set(&step); /* a point inside the callback */
    ended_b++;
}

static void cancel_1(void) { ctx_cancel(c1); }
static void cancel_2(void) { ctx_cancel(c2); }
static void make_both(void) {
    c1 = ctx_with_cancel(ctx_background());
    c2 = ctx_with_cancel(ctx_background());
}
static void end_both(void) {
    ctx_end(c1);
    ctx_end(c2);
}

/* -- a callback and its stop -- */

static void setup(void) {
    make_both();
    SCHED_CHECK(ctx_on_done(&reg, c1, fn, NULL));
}
static void stop(void) {
    bool taken = ctx_on_done_stop(&reg);
    SCHED_CHECK(began == ended);
    SCHED_CHECK(began == !taken);
    stopped = taken;
}
/* Of two stops that find it linked one takes it back; the other may say so too. */
static void stop_any(void) {
    ctx_on_done_stop(&reg);
    SCHED_CHECK(began == ended);
    memset(&reg, 0, sizeof reg); /* free for any use */
}
static void stop_of_two(void) {
    bool taken = ctx_on_done_stop(&reg);
    SCHED_CHECK(began == ended);
    if (taken) SCHED_CHECK(began == 0);
}
static void check(void) {
    SCHED_CHECK(began == ended && began <= 1);
    if (stopped == 1) SCHED_CHECK(began == 0);
    end_both();
    SCHED_CHECK(began <= 1);
}
static void check_ran(void) {
    SCHED_CHECK(began == 1 && ended == 1);
    end_both();
}

/* Registered while the context is canceled: runs once, and before the return if that is false. */
static void setup_plain(void) { make_both(); }
static void on_done(void) {
    if (!ctx_on_done(&reg, c1, fn, NULL)) SCHED_CHECK(ended == 1);
}
static void on_done_stop(void) {
    bool linked = ctx_on_done(&reg, c1, fn, NULL);
    bool taken;
    if (!linked) SCHED_CHECK(ended == 1);
    taken = ctx_on_done_stop(&reg);
    SCHED_CHECK(began == ended && began == !taken);
}

/* The same on a bare child whose parent is canceled. */
static void setup_bare_child(void) {
    c2 = ctx_with_cancel(ctx_background());
    c1 = ctx_with_cancel(c2);
}
/* Two callbacks: the first to be stopped is not the one to run. */
static void setup_two(void) {
    make_both();
    SCHED_CHECK(ctx_on_done(&reg, c1, fn, NULL));
    SCHED_CHECK(ctx_on_done(&reg_b, c1, fn_b, NULL));
}
static void stop_b(void) {
    bool taken = ctx_on_done_stop(&reg_b);
    SCHED_CHECK(began_b == ended_b && began_b == !taken);
}
/* The call that canceled returns when its callbacks have run. */
static void cancel_1_ran(void) {
    if (ctx_cancel(c1)) SCHED_CHECK(began == ended);
}
static void check_two(void) {
    SCHED_CHECK(began == ended && began_b == ended_b);
    end_both();
}

/* Each thread stops the callback of the other one, one after the other: whom the first stop waited for is over. */
static void setup_each(void) {
    make_both();
    ctx_on_done(&reg, c1, fn, NULL);
    ctx_on_done(&reg_b, c2, fn_b, NULL);
}
static void stop_cancel_2(void) {
    ctx_on_done_stop(&reg);
    SCHED_CHECK(began == ended);
    ctx_cancel(c2);
}
static void cancel_1_stop_b(void) {
    ctx_cancel(c1);
    sched_await(&b_began);
    stop_b();
}

/* -- stop from inside -- */

static void fn_stops_itself(void *arg) {
    (void)arg;
    SCHED_CHECK(!ctx_on_done_stop(&reg));
    fn(NULL);
}
static void setup_stops_itself(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_stops_itself, NULL);
}

/* -- callbacks that stop each other -- */

static void fn_stops_b(void *arg) {
    fn(arg);
    ctx_on_done_stop(&reg_b);
}
static void fn_stops_a(void *arg) {
    fn_b(arg);
    ctx_on_done_stop(&reg);
}
static void setup_mutual(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_stops_b, NULL);
    ctx_on_done(&reg_b, c2, fn_stops_a, NULL);
}
static void setup_mutual_same(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_stops_b, NULL);
    ctx_on_done(&reg_b, c1, fn_stops_a, NULL);
}
static void check_mutual(void) {
    SCHED_CHECK(began == ended && began_b == ended_b && began + began_b >= 1);
    end_both();
}

/* -- a reg that is re-used inside its own callback -- */

static void fn_again(void *arg) {
    fn(arg);
    ctx_on_done(&reg, c2, fn_b, NULL);
    sched_set(&again);
}
static void setup_again(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_again, NULL);
}
/* Once it is registered anew, a stop is about the new callback, wherever the old one is. */
static void stop_again(void) {
    bool taken;
    sched_await(&again);
    taken = ctx_on_done_stop(&reg);
    SCHED_CHECK(began_b == ended_b);
    SCHED_CHECK(began_b == !taken);
    stopped = taken;
}
static void check_again(void) {
    if (stopped == 1) SCHED_CHECK(began_b == 0);
    SCHED_CHECK(began_b == ended_b);
    end_both();
}
/* At any time: a callback that had begun before the stop has finished after it. */
static void stop_any_time(void) {
    bool before = sched_is_set(&b_began);
    if (!ctx_on_done_stop(&reg) && before) SCHED_CHECK(ended_b == 1);
}

/* After the stop neither the callback nor the one that it registered touches the reg, which may be freed. */
static void fn_again_heap(void *arg) {
    (void)arg;
    ctx_on_done(heap, c2, fn_b, NULL);
}
static void setup_again_heap(void) {
    make_both();
    heap = (ctx_on_done_t *)sched_malloc(sizeof *heap);
    ctx_on_done(heap, c1, fn_again_heap, NULL);
}
static void stop_free(void) {
    ctx_on_done_stop(heap);
    SCHED_CHECK(began_b == ended_b);
    sched_free(heap);
}

static bool freed;
static void try_stop_free(void) {
    if (ctx_on_done_try_stop(heap) == CTX_ON_DONE_RUNNING) return;
    SCHED_CHECK(began_b == ended_b);
    sched_free(heap);
    freed = true;
}
static void check_try_stop_free(void) {
    end_both();
    if (!freed) sched_free(heap);
}

/* core_c2, first half: the new callback has finished, the old one waits for the stopper. */
static void fn_again_wait(void *arg) {
    (void)arg;
    ctx_on_done(&reg, c2, fn_b, NULL);
    sched_set(&again);
    sched_await(&go);
}
static void setup_again_wait(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_again_wait, NULL);
}
static void cancel_stop_go(void) {
    sched_await(&again);
    ctx_cancel(c2);
    SCHED_CHECK(ended_b == 1);
    SCHED_CHECK(!ctx_on_done_stop(&reg));
    sched_set(&go);
}
/* core_c2, second half: inside the old callback a stop waits for the new one on another thread. */
static void fn_again_stop(void *arg) {
    bool taken;
    (void)arg;
    ctx_on_done(&reg, c2, fn_b, NULL);
    taken = ctx_on_done_stop(&reg);
    SCHED_CHECK(began_b == ended_b);
    SCHED_CHECK(began_b == !taken);
    stopped = taken;
}
static void setup_again_stop(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_again_stop, NULL);
}

/* -- memory -- */

static void fn_frees(void *arg) {
    fn(arg);
    sched_free(heap);
}
static void setup_frees(void) {
    make_both();
    heap = (ctx_on_done_t *)sched_malloc(sizeof *heap);
    ctx_on_done(heap, c1, fn_frees, NULL);
}
static void fn_ends(void *arg) {
    fn(arg);
    ctx_end(c1);
}
static void setup_ends(void) {
    make_both();
    ctx_retain(c1);
    ctx_on_done(&reg, c1, fn_ends, NULL);
}
static void check_ends(void) {
    SCHED_CHECK(began == 1 && ended == 1);
    ctx_release(c1);
    ctx_end(c2);
}

/* The last reference is dropped while the callback is taken back. */
static void release_1(void) { ctx_release(c1); }
static void end_1(void) { ctx_end(c1); }
static void check_released(void) {
    SCHED_CHECK(began == ended);
    ctx_end(c2);
}
/* The context is a child: its parent's cancel meets its release and the stop. */
static void setup_child(void) {
    c2 = ctx_with_cancel(ctx_background());
    c1 = ctx_with_cancel(c2);
    SCHED_CHECK(ctx_on_done(&reg, c1, fn, NULL));
}

static void try_stop(void) {
    int rc = (int)ctx_on_done_try_stop(&reg);
    if (rc == CTX_ON_DONE_STOPPED) {
        SCHED_CHECK(began == 0);
        stopped = 1;
    } else if (rc == CTX_ON_DONE_RAN) {
        SCHED_CHECK(began == 1 && ended == 1);
    } else {
        SCHED_CHECK(rc == CTX_ON_DONE_RUNNING);
    }
}
static void fn_try_stops_itself(void *arg) {
    SCHED_CHECK(ctx_on_done_try_stop(&reg) == CTX_ON_DONE_RUNNING);
    fn(arg);
}
static void setup_try_stops_itself(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_try_stops_itself, NULL);
}
/* The callback waits for who tries: so the try may not wait for it. */
static void fn_waits(void *arg) {
    sched_set(&again);
    sched_await(&go);
    fn(arg);
}
static void setup_waits(void) {
    make_both();
    ctx_on_done(&reg, c1, fn_waits, NULL);
}
static void try_stop_go(void) {
    sched_await(&again);
    SCHED_CHECK(ctx_on_done_try_stop(&reg) == CTX_ON_DONE_RUNNING);
    sched_set(&go);
}

static const sched_scenario_t scenarios[] = {
    { "callback: stop / cancel", setup, { T(stop), T(cancel_1) }, check, false },
    { "callback: stop and re-use / cancel", setup, { T(stop_any), T(cancel_1) }, check, false },
    { "callback: two stops / cancel", setup, { T(stop_of_two), T(stop_of_two), T(cancel_1) }, check, false },
    { "callback: stop / cancel / cancel", setup, { T(stop), T(cancel_1), T(cancel_1) }, check, false },
    { "callback: on_done / cancel", setup_plain, { T(on_done), T(cancel_1) }, check_ran, false },
    { "callback: on_done, stop / cancel", setup_plain, { T(on_done_stop), T(cancel_1) }, check, false },
    { "callback: on_done on a child / cancel", setup_bare_child, { T(on_done), T(cancel_2) }, check_ran, false },
    { "callback: on_done, stop on a child / cancel", setup_bare_child, { T(on_done_stop), T(cancel_2) }, check, false },
    { "callback: on_done on a child / cancel / cancel parent", setup_bare_child,
      { T(on_done), T(cancel_1), T(cancel_2) }, check_ran, false },
    { "callback: two, each stopped / cancel", setup_two, { T(stop), T(stop_b), T(cancel_1) }, check_two, false },
    { "callback: two, one stopped / cancel / cancel", setup_two,
      { T(stop_b), T(cancel_1_ran), T(cancel_1_ran) }, check_two, false },
    { "callback: stop, cancel / cancel, stop", setup_each, { T(stop_cancel_2), T(cancel_1_stop_b) }, check_two, false },
    { "callback: stop from inside", setup_stops_itself, { T(cancel_1), T(cancel_1) }, check_ran, false },
    { "callback: stop from inside / stop", setup_stops_itself, { T(cancel_1), T(stop_of_two) }, check, false },
    { "callback: mutual stops", setup_mutual, { T(cancel_1), T(cancel_2) }, check_mutual, false },
    { "callback: mutual stops, same context", setup_mutual_same, { T(cancel_1), T(cancel_1) }, check_mutual, false },
    { "callback: reg re-used, core_c", setup_again, { T(cancel_1), T(cancel_2), T(stop_again) }, check_again, false },
    { "callback: reg re-used, stop at any time", setup_again,
      { T(cancel_1), T(cancel_2), T(stop_any_time) }, check_again, false },
    { "callback: reg re-used, stop and free / cancel", setup_again_heap, { T(cancel_1), T(stop_free) }, end_both,
      false },
    { "callback: reg re-used, stop and free / cancel both", setup_again_heap,
      { T(cancel_1), T(cancel_2), T(stop_free) }, end_both, false },
    { "callback: reg re-used, try_stop and free", setup_again_heap, { T(cancel_1), T(cancel_2), T(try_stop_free) },
      check_try_stop_free, false },
    { "callback: reg re-used, core_c2 finished", setup_again_wait,
      { T(cancel_1), T(cancel_stop_go) }, check_again, false },
    { "callback: reg re-used, core_c2 from inside", setup_again_stop,
      { T(cancel_1), T(cancel_2) }, check_again, false },
    { "callback: frees its reg", setup_frees, { T(cancel_1), T(cancel_1) }, check_ran, false },
    { "callback: ends its context", setup_ends, { T(cancel_1), T(cancel_1) }, check_ends, false },
    { "callback: release / stop", setup, { T(release_1), T(stop) }, check_released, false },
    { "callback: end / stop", setup, { T(end_1), T(stop) }, check_released, false },
    { "callback: child, release / stop / cancel", setup_child,
      { T(release_1), T(stop), T(cancel_2) }, check_released, false },
    { "callback: child, end / stop / cancel", setup_child, { T(end_1), T(stop), T(cancel_2) }, check_released, false },
    { "callback: try_stop / cancel", setup, { T(try_stop), T(cancel_1) }, check, false },
    { "callback: try_stop / stop / cancel", setup, { T(try_stop), T(stop_of_two), T(cancel_1) }, check, false },
    { "callback: try_stop from inside", setup_try_stops_itself, { T(cancel_1), T(try_stop) }, check, false },
    { "callback: try_stop does not wait", setup_waits, { T(cancel_1), T(try_stop_go) }, check_ran, false },
};
SCHED_MAIN(scenarios)
