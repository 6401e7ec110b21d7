/* Program errors trip CTXCANCEL_ASSERT, each in a child of fork() that ends there. */
#define ASSERTED 77
static void assertion_failed(void);
#define CTXCANCEL_ASSERT(x) ((x) ? (void)0 : assertion_failed())
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"

#include <sys/wait.h>

static void assertion_failed(void) { _exit(ASSERTED); }

/* How a child ends that does this: 0, or ASSERTED. */
static int status_of(void (*act)(void)) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        act();
        _exit(0);
    }
    int status = -1;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void end_once(void) { ctx_end(ctx_with_cancel(ctx_background())); }

static void end_twice(void) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    ctx_end(ctx);
    ctx_end(ctx);
}

static void end_more_than_retained(void) {
    ctx_t *ctx = ctx_retain(ctx_with_cancel(ctx_background()));
    ctx_end(ctx);
    ctx_release(ctx);
    ctx_release(ctx);
}

TEST(ending_twice_trips_the_assertion) {
#ifdef TEST_SANITIZED
    SKIP("nothing is recycled under the address sanitizer: it reports the second end by itself");
#endif
    EXPECT_EQ(status_of(end_once), 0);
    EXPECT_EQ(status_of(end_twice), ASSERTED);
    EXPECT_EQ(status_of(end_more_than_retained), ASSERTED);
}

static void nothing(void *arg) { (void)arg; }
static void err_of_null(void) { ctx_err(NULL); }
static void after_null(void) {
    ctx_on_done_t reg;
    ctx_on_done(&reg, NULL, nothing, NULL);
}
static void after_without_a_callback(void) {
    ctx_on_done_t reg;
    ctx_on_done(&reg, ctx_background(), NULL, NULL);
}
static int waits_for_its_group(ctx_t *ctx, void *group) {
    (void)ctx;
    return ctx_group_wait(*(ctx_group_t **)group);
}

static void wait_in_a_task_of_the_group(void) {
    ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
    ctx_group_go(group, waits_for_its_group, &group);
    ctx_group_wait(group);
}
static void wait_outside_of_the_group(void) { ctx_group_wait(ctx_group_new(ctx_background(), NULL)); }

static void advance_the_real_clock(void) { ctx_clock_advance(1); }

TEST(null_contexts_and_missing_callbacks_trip_the_assertion) {
    EXPECT_EQ(status_of(err_of_null), ASSERTED);
    EXPECT_EQ(status_of(after_null), ASSERTED);
    EXPECT_EQ(status_of(after_without_a_callback), ASSERTED);
}

TEST(a_task_that_waits_for_its_own_group_trips_the_assertion) {
#ifdef TEST_THREAD_SANITIZER
    SKIP("the thread sanitizer allows no thread in the child of a fork");
#endif
    EXPECT_EQ(status_of(wait_outside_of_the_group), 0);
    EXPECT_EQ(status_of(wait_in_a_task_of_the_group), ASSERTED);
}

TEST(advancing_the_real_clock_trips_the_assertion) { EXPECT_EQ(status_of(advance_the_real_clock), ASSERTED); }

TEST_MAIN
