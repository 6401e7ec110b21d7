/* What `.grace` promises: a context that goes on for so long after its parent, and then has the parent's cause. And who
   canceled: ctx_cause_t.site. */
#define FAULT_THREADS
#include "fault.h"
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "gates.h"

#include <sys/wait.h>

#define LONG_WAIT CTX_S(60)

static ctx_t *graced(ctx_t *parent, ctx_dur_t grace) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.grace = grace;
    return ctx_derive(parent, &desc);
}

static bool same(const char *a, const char *b) { return strcmp(a, b) == 0; }

/* -- grace ------------------------------------------------------------------------------------------------------- */

TEST(it_goes_on_for_so_long_and_then_has_its_parents_cause) {
    ctx_clock_fake(CTX_S(1));
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_S(2));
    ctx_t *child = ctx_with_cancel(ctx), *plain = ctx_with_cancel(parent);
    EXPECT_EQ(ctx_deadline(ctx), CTX_NO_DEADLINE);
    ctx_cancel_cause_at(parent, -7, "stop it", "here:1");
    EXPECT_EQ(ctx_err(plain), CTX_CANCELED);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_err(child), 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(3));
    EXPECT_EQ(ctx_remaining(ctx), CTX_S(2));
    ctx_clock_advance(CTX_S(2) - 1);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT(!ctx_cause(ctx).site && !ctx_cause(ctx).what);
    ctx_clock_advance(1);
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    EXPECT_EQ(ctx_err(child), CTX_CANCELED);
    EXPECT_EQ(ctx_cause(child).code, -7);
    EXPECT(same(ctx_cause(child).what, "stop it"));
    EXPECT(same(ctx_cause(child).site, "here:1"));
    ctx_end(plain);
    ctx_end(child);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(its_own_deadline_still_holds) {
    ctx_clock_fake(CTX_S(1));
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.grace = CTX_S(5);
    desc.timeout = CTX_S(3);
    desc.deadline_cause = "mine";
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = ctx_derive(parent, &desc);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(4));
    ctx_cancel(parent);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(4));
    ctx_clock_advance(CTX_S(3));
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    EXPECT(same(ctx_cause(ctx).what, "mine"));
    ctx_end(ctx);

    desc.timeout = CTX_S(100); /* later than the end of the grace period, which is earlier then */
    ctx = ctx_derive(parent, &desc);
    EXPECT_EQ(ctx_remaining(ctx), CTX_S(5));
    ctx_clock_advance(CTX_S(5));
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    ctx_end(ctx);

    desc.timeout = -1; /* expired at birth */
    ctx = ctx_derive(parent, &desc);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(a_deadline_of_the_parent_begins_it_too) {
    ctx_clock_fake(CTX_S(1));
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.timeout = CTX_S(10);
    desc.deadline_cause = "the request's time";
    ctx_t *parent = ctx_derive(ctx_background(), &desc), *ctx = graced(parent, CTX_S(2));
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(13));
    ctx_t *child = ctx_with_timeout(ctx, CTX_S(50));
    EXPECT_EQ(ctx_deadline(child), CTX_S(13));
    ctx_clock_advance(CTX_S(10));
    EXPECT_EQ(ctx_err(parent), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_remaining(child), CTX_S(2));
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(child), CTX_DEADLINE_EXCEEDED);
    EXPECT(same(ctx_cause(child).what, "the request's time"));
    EXPECT(same(ctx_cause(child).site, ctx_site(parent)));
    ctx_end(child);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(a_cancel_before_the_parents_deadline_makes_the_deadline_earlier) {
    ctx_clock_fake(CTX_S(1));
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(10)), *ctx = graced(parent, CTX_S(2));
    ctx_clock_advance(CTX_S(1));
    ctx_cancel(parent);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(4));
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(ctx), CTX_CANCELED);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
}

TEST(below_a_parent_that_is_done_it_starts_anew) {
    ctx_clock_fake(CTX_S(1));
    ctx_t *parent = ctx_with_timeout(ctx_background(), CTX_S(1));
    ctx_clock_advance(CTX_S(9));
    EXPECT_EQ(ctx_err(parent), CTX_DEADLINE_EXCEEDED);
    ctx_t *ctx = graced(parent, CTX_S(2)), *below = graced(ctx, CTX_S(3));
    EXPECT_EQ(ctx_err(ctx), 0);
    EXPECT_EQ(ctx_deadline(ctx), CTX_S(12));
    EXPECT_EQ(ctx_deadline(below), CTX_S(15)); /* they add up */
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_err(below), 0);
    ctx_clock_advance(CTX_S(3));
    EXPECT_EQ(ctx_err(below), CTX_DEADLINE_EXCEEDED);
    ctx_end(below);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

CTX_VALUE(int, number);

TEST(it_has_the_values_and_the_name_of_its_parent_and_outlives_it) {
    const int seven = 7;
    ctx_clock_fake(CTX_S(1));
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = "request";
    ctx_t *top = ctx_derive(ctx_background(), &desc), *parent = ctx_with_number(top, &seven);
    ctx_t *ctx = graced(parent, CTX_S(2)), *other = ctx_with_cancel(ctx_background());
    ctx_t *merged = ctx_merge(ctx, other), *swapped = ctx_merge(other, ctx);
    ctx_end(top);
    ctx_end(parent);
    EXPECT_EQ(*number_from(ctx), 7);
    EXPECT(same(ctx_name(ctx), "request"));
    EXPECT_EQ(ctx_err(merged), 0);
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(merged), CTX_CANCELED);
    EXPECT_EQ(ctx_err(swapped), CTX_CANCELED);
    EXPECT_EQ(*number_from(merged), 7);
    ctx_end(swapped);
    ctx_end(merged);
    ctx_end(other);
    ctx_end(ctx);
    ctx_clock_real();
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(what_is_below_it_knows_the_end_of_its_grace_period) {
    ctx_clock_fake(CTX_S(1));
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_S(2));
    ctx_t *child = ctx_with_cancel(ctx), *other = ctx_with_cancel(ctx_background());
    ctx_t *merged = ctx_merge(other, child), *below = ctx_with_timeout(merged, CTX_S(100));
    EXPECT_EQ(ctx_deadline(child), CTX_NO_DEADLINE);
    ctx_cancel(parent);
    ctx_t *later = ctx_with_timeout(below, CTX_S(50)), *anew = graced(child, CTX_S(3));
    EXPECT_EQ(ctx_deadline(child), CTX_S(3));
    EXPECT_EQ(ctx_deadline(merged), CTX_S(3));
    EXPECT_EQ(ctx_deadline(below), CTX_S(3));
    EXPECT_EQ(ctx_deadline(later), CTX_S(3));
    EXPECT_EQ(ctx_deadline(anew), CTX_S(6));
    ctx_clock_advance(CTX_S(2));
    EXPECT_EQ(ctx_err(later), CTX_CANCELED);
    EXPECT_EQ(ctx_err(anew), 0);
    ctx_end(anew);
    ctx_end(later);
    ctx_end(below);
    ctx_end(merged);
    ctx_end(other);
    ctx_end(child);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

/* It must not leave a timer of the past in the wheels, which would hold the clock. */
TEST(one_that_has_expired_below_a_parent_that_is_done_has_no_timer) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.grace = CTX_S(1);
    desc.timeout = CTX_EXPIRED;
    ctx_clock_auto(CTX_S(10));
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_cancel(parent);
    ctx_t *ctx = ctx_derive(parent, &desc);
    EXPECT_EQ(ctx_err(ctx), CTX_DEADLINE_EXCEEDED);
    EXPECT_EQ(ctx_sleep(ctx_background(), CTX_S(5)), 0);
    EXPECT_EQ(ctx_now(), CTX_S(15));
    ctx_end(ctx);
    ctx_end(parent);
    ctx_clock_real();
}

static void takes_long(void *arg) {
    (void)arg;
    test_sleep_ms(60);
}

TEST(it_has_its_parents_cause_though_both_were_due_at_once) {
    ctx_desc_t desc;
    ctx_on_done_t reg;
    memset(&desc, 0, sizeof desc);
    desc.timeout = CTX_MS(20);
    desc.deadline_cause = "the parent's";
    ctx_t *busy = ctx_with_timeout(ctx_background(), CTX_MS(5)), *parent = ctx_derive(ctx_background(), &desc);
    ctx_t *ctx = graced(parent, CTX_MS(10));
    ctx_on_done(&reg, busy, takes_long, NULL);
    UNTIL(ctx_err(ctx));
    EXPECT(same(ctx_cause(ctx).what, "the parent's"));
    ctx_on_done_stop(&reg);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_end(busy);
}

TEST(it_may_be_canceled_or_ended_before_and_in_its_grace_period) {
    ctx_clock_fake(CTX_S(1));
    for (int i = 0; i < 8; i++) {
        ctx_t *parent = ctx_with_timeout(ctx_background(), i & 1 ? CTX_S(9) : CTX_S(900)),
              *ctx = graced(parent, CTX_S(2));
        if (i & 2) {
            ctx_cancel(parent);
            ctx_clock_advance(CTX_S(1));
        }
        if (i & 4) {
            EXPECT(ctx_cancel_cause(ctx, -8, "enough"));
            EXPECT_EQ(ctx_cause(ctx).code, -8);
        }
        ctx_end(ctx);
        ctx_end(parent);
        ctx_clock_advance(CTX_S(20));
    }
    ctx_clock_real();
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(without_a_parent_that_ends_it_is_an_ordinary_context) {
    ctx_desc_t desc;
    memset(&desc, 0, sizeof desc);
    ctx_t *parent = ctx_with_cancel(ctx_background()), *top = graced(ctx_background(), CTX_S(1));
    ctx_t *none = graced(parent, -1), *for_ever = graced(parent, CTX_FOREVER);
    desc.detach = true;
    desc.grace = 1;
    ctx_t *detached = ctx_derive(parent, &desc), *bad = graced(NULL, CTX_S(1));
    ctx_cancel(parent);
    EXPECT_EQ(ctx_err(top), 0);
    EXPECT_EQ(ctx_err(none), CTX_CANCELED);
    EXPECT_EQ(ctx_err(for_ever), 0);
    EXPECT_EQ(ctx_deadline(for_ever), CTX_NO_DEADLINE);
    EXPECT_EQ(ctx_err(detached), 0);
    EXPECT_EQ(ctx_err(bad), CTX_INVALID);
    ctx_end(bad);
    ctx_end(detached);
    ctx_end(for_ever);
    ctx_end(none);
    ctx_end(top);
    ctx_end(parent);
}

TEST(the_cancel_needs_neither_memory_nor_a_thread) {
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_MS(20));
    fault_after(0);
    fault_threads_after(0);
    ctx_cancel(parent);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    EXPECT(!fault_off());
    fault_threads_off();
    ctx_end(ctx);
    ctx_end(parent);
}

TEST(without_memory_or_a_thread_it_is_a_failed_context) {
    for (long n = 0;; n++) {
        ctx_runtime_stop();
        ctx_t *parent = ctx_with_cancel(ctx_background());
        fault_after(n);
        ctx_t *ctx = graced(parent, CTX_S(1));
        bool failed = fault_off();
        EXPECT(failed ? ctx_err(ctx) == CTX_NO_MEMORY : ctx_err(ctx) == 0);
        ctx_end(ctx);
        ctx_end(parent);
        if (!failed) break;
    }
    ctx_runtime_stop();
    fault_threads_after(0);
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_S(1));
    fault_threads_off();
    EXPECT_EQ(ctx_err(ctx), CTX_NO_MEMORY);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(its_waiters_wake_at_the_end_and_not_before) {
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_MS(30)), *below = ctx_with_cancel(ctx);
    int64_t begin = test_now_ns();
    ctx_cancel(parent);
    EXPECT_EQ(ctx_wait(below, CTX_MS(1)), CTX_NOT_READY);
    EXPECT_EQ(ctx_wait(below, LONG_WAIT), CTX_CANCELED);
    EXPECT(test_now_ns() - begin >= CTX_MS(30));
    ctx_end(below);
    ctx_end(ctx);
    ctx_end(parent);
}

TEST(it_ends_although_the_runtime_was_stopped) {
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_MS(5));
    ctx_runtime_stop();
    ctx_cancel(parent);
    ctx_runtime_stop();
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    ctx_end(ctx);
    ctx_end(parent);
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

TEST(the_child_of_a_fork_has_it_too) {
    if (CTX__TSAN) SKIP("no threads in the child of a threaded process");
    ctx_t *parent = ctx_with_cancel(ctx_background()), *ctx = graced(parent, CTX_MS(20));
    ctx_cancel(parent);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(60);
        _exit(ctx_wait(ctx, LONG_WAIT) == CTX_CANCELED ? 0 : 1);
    }
    int status = -1;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
    ctx_end(ctx);
    ctx_end(parent);
}

typedef struct {
    ctx_t *parent;
    gate_t gate;
} storm_t;

static void *storms(void *arg) {
    storm_t *storm = (storm_t *)arg;
    gate_pass(&storm->gate);
    for (int i = 0; i < 20; i++) {
        ctx_t *ctx = graced(storm->parent, CTX_US(20 * i)), *below = ctx_with_timeout(ctx, CTX_MS(1));
        if (i & 1) ctx_wait(below, CTX_US(50));
        if (i & 2) EXPECT(ctx_deadline(ctx) != 0);
        ctx_end(ctx);
        if (i & 4) EXPECT(ctx_wait(below, LONG_WAIT) != 0);
        ctx_end(below);
    }
    return NULL;
}

TEST(contexts_come_and_go_while_their_parent_is_canceled) {
    for (int i = 0; i < test_scale(500); i++) {
        storm_t storm;
        storm.parent = ctx_with_timeout(ctx_background(), i & 1 ? CTX_S(1000) : CTX_US(100));
        gate_init(&storm.gate);
        pthread_t threads[2] = {thread_start(storms, &storm), thread_start(storms, &storm)};
        gate_open(&storm.gate);
        ctx_cancel(storm.parent);
        for (int t = 0; t < 2; t++) pthread_join(threads[t], NULL);
        ctx_end(storm.parent);
        gate_destroy(&storm.gate);
    }
    ctx_runtime_stop();
    EXPECT_EQ(fault_live(), 0);
}

/* -- who canceled ------------------------------------------------------------------------------------------------- */

static bool is_line(const char *site, int line) {
#ifdef CTXCANCEL_NO_SITES
    return line && !site[0];
#else
    const char *colon = strrchr(site, ':');
    return strstr(site, "test_grace.c") && colon && atoi(colon + 1) == line;
#endif
}

TEST(a_cause_names_the_place_of_the_cancel) {
    ctx_t *parent = ctx_with_cancel(ctx_background()), *child = ctx_with_cancel(parent);
    int line = __LINE__ + 1;
    ctx_cancel(parent);
    EXPECT(is_line(ctx_cause(parent).site, line));
    EXPECT(is_line(ctx_cause(child).site, line));
    ctx_end(child);
    ctx_end(parent);
    parent = ctx_with_cancel(ctx_background()), child = ctx_with_cancel(parent);
    line = __LINE__ + 1;
    ctx_cancel_cause(parent, 1, "x");
    EXPECT(is_line(ctx_cause(child).site, line));
    ctx_end(child);
    ctx_end(parent);
    parent = ctx_with_cancel(ctx_background()), child = ctx_with_cancel(parent);
    line = __LINE__ + 1;
    ctx_end(parent);
    EXPECT(is_line(ctx_cause(child).site, line));
    ctx_end(child);
}

TEST(a_deadlines_place_is_where_it_was_set) {
    int line = __LINE__ + 1;
    ctx_t *parent = ctx_with_timeout(ctx_background(), 0);
    ctx_t *child = ctx_with_cancel(parent);
    EXPECT(is_line(ctx_cause(child).site, line));
    ctx_end(child);
    ctx_end(parent);
    line = __LINE__ + 1;
    parent = ctx_with_timeout(ctx_background(), CTX_MS(1));
    child = ctx_with_cancel(parent);
    EXPECT_EQ(ctx_wait(child, LONG_WAIT), CTX_DEADLINE_EXCEEDED);
    EXPECT(is_line(ctx_cause(child).site, line));
    ctx_end(child);
    ctx_end(parent);
}

TEST(a_merged_context_has_the_place_of_the_first) {
    ctx_t *a = ctx_with_cancel(ctx_background()), *b = ctx_with_cancel(ctx_background());
    int line = __LINE__ + 1;
    ctx_cancel(b);
    ctx_t *merged = ctx_merge(a, b);
    EXPECT(is_line(ctx_cause(merged).site, line));
    ctx_end(merged);
    ctx_end(a);
    ctx_end(b);
}

TEST(a_signals_place_is_the_signal) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_notify_signals(ctx_background(), &sig, 1);
    kill(getpid(), sig);
    EXPECT_EQ(ctx_wait(ctx, LONG_WAIT), CTX_CANCELED);
    EXPECT(same(ctx_cause(ctx).what, "SIGUSR1"));
    EXPECT(same(ctx_cause(ctx).site, "signal SIGUSR1"));
    ctx_end(ctx);
}

static void call(void (*fn)(ctx_t *), ctx_t *ctx) { fn(ctx); }

TEST(a_cancel_by_address_names_the_maker) {
    int line = __LINE__ + 1;
    ctx_t *parent = ctx_with_cancel(ctx_background());
    ctx_t *child = ctx_with_cancel(parent);
    bool (*cancel)(ctx_t *) = ctx_cancel;
    EXPECT(cancel(parent));
    EXPECT(!(ctx_cancel_cause)(parent, 1, "late"));
    EXPECT(is_line(ctx_cause(child).site, line));
    call(ctx_end, child);
    call(ctx_end, parent);
    int scope = __LINE__ + 2;
    {
        CTX_SCOPED ctx_t *scoped = ctx_with_cancel(ctx_background());
        child = ctx_with_cancel(scoped);
    }
    EXPECT(is_line(ctx_cause(child).site, scope));
    ctx_end(child);
    EXPECT(same(ctx_cause(ctx_with_cancel(NULL)).site, ""));
}

TEST_MAIN
