/* ctx_wait(), ctx_sleep(), ctx_done_fd(), ctx_poll_fd(), ctx_cond_wait() against what ends them. */
#define _GNU_SOURCE
#include <unistd.h>

/* The library writes to descriptors that are open, and only to those. */
static ssize_t checked_write(int fd, const void *data, size_t size);
#define write(fd, data, size) checked_write((fd), (data), (size))
#include "sched.h"
#undef write

static ssize_t checked_write(int fd, const void *data, size_t size) {
    ssize_t n = write(fd, data, size);
    SCHED_CHECK(n == (ssize_t)size);
    return n;
}

static ctx_t *ctx, *kid;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static bool ready; /* [mutex] */
static int fd_before;

static void setup(void) {
    ctx = ctx_with_cancel(ctx_background());
    kid = ctx_with_cancel(ctx);
}
static void check(void) {
    ctx_end(kid);
    ctx_end(ctx);
}
static void cancel(void) { ctx_cancel(ctx); }
static void cancel_kid(void) { ctx_cancel(kid); }
static void end(void) { ctx_end(ctx_retain(ctx)); }

static void wait_forever(void) { SCHED_CHECK(ctx_wait(kid, CTX_FOREVER) == CTX_CANCELED); }
static void wait_ctx_forever(void) { SCHED_CHECK(ctx_wait(ctx, CTX_FOREVER) == CTX_CANCELED); }
static void wait_a_while(void) {
    int rc = ctx_wait(kid, CTX_MS(1));
    SCHED_CHECK(rc == CTX_CANCELED || rc == CTX_NOT_READY);
}
static void wait_short(void) {
    ctx_time_t start = ctx_now();
    SCHED_CHECK(ctx_wait(kid, CTX_MS(1)) == CTX_NOT_READY);
    SCHED_CHECK(ctx_now() - start >= CTX_MS(1));
}
static void sleep_a_while(void) {
    ctx_time_t start = ctx_now();
    int rc = ctx_sleep(kid, CTX_MS(1));
    SCHED_CHECK(rc == CTX_CANCELED || rc == 0);
    if (rc == 0) SCHED_CHECK(ctx_now() - start >= CTX_MS(1));
}
static void nothing(void) {}

/* A waiter with a reference of its own, which is the last. */
static void setup_refs(void) {
    ctx = ctx_with_cancel(ctx_background());
    ctx_retain(ctx);
}
static void wait_release(void) {
    SCHED_CHECK(ctx_wait(ctx, CTX_FOREVER) == CTX_CANCELED);
    ctx_release(ctx);
}
static void end_own(void) { ctx_end(ctx); }

/* What the canceler wrote before is visible to who sees the context done: with races.c. */
static int data;
static void write_cancel(void) {
    data = 1;
    ctx_cancel(ctx);
}
static void wait_read(void) {
    SCHED_CHECK(ctx_wait(kid, CTX_FOREVER) == CTX_CANCELED);
    SCHED_CHECK(data == 1);
}
static void err_read(void) {
    if (ctx_err(kid)) SCHED_CHECK(data == 1);
}
static void cause_read(void) {
    if (ctx_cause(kid).code) SCHED_CHECK(data == 1);
}
static void derive_read(void) {
    ctx_t *own = ctx_with_cancel(kid);
    if (ctx_err(own)) SCHED_CHECK(data == 1);
    ctx_end(own);
}

/* -- descriptors -- */

static bool readable(int fd) {
    struct pollfd p = { fd, POLLIN, 0 };
    return poll(&p, 1, 0) == 1 && p.revents == POLLIN; /* not POLLNVAL: it is open */
}
static void setup_fd(void) {
    setup();
    fd_before = dup(0);
    close(fd_before);
}
static void check_fd(void) {
    int fd;
    SCHED_CHECK(readable(ctx_done_fd(kid)));
    check();
    ctx_runtime_stop();
    fd = dup(0);
    close(fd);
    SCHED_CHECK(fd == fd_before); /* no descriptor is left open */
}
static void fd_readable(void) {
    int fd = ctx_done_fd(kid);
    SCHED_CHECK(fd >= 0);
    if (readable(fd)) SCHED_CHECK(ctx_err(kid));
}
static void done_fd(void) {
    int fd = ctx_done_fd(kid);
    SCHED_CHECK(fd >= 0);
    if (readable(fd)) SCHED_CHECK(ctx_err(kid));
    if (ctx_err(kid)) SCHED_CHECK(readable(ctx_done_fd(kid)));
}
static void err_then_fd(void) {
    if (ctx_err(kid)) SCHED_CHECK(readable(ctx_done_fd(kid)));
}
static void cancel_then_fd(void) {
    ctx_cancel(ctx);
    SCHED_CHECK(readable(ctx_done_fd(kid)));
}

/* The descriptor itself, without asking the library again. */
static int kept_fd;
static void fd_keep(void) { kept_fd = ctx_done_fd(kid); }
static void check_fd_kept(void) {
    SCHED_CHECK(readable(kept_fd));
    check_fd();
}

static void fd_end(void) {
    ctx_done_fd(ctx);
    ctx_end(ctx);
}
static void check_fd_ended(void) {
    int fd;
    ctx_runtime_stop();
    fd = dup(0);
    close(fd);
    SCHED_CHECK(fd == fd_before);
}
static void setup_fd_refs(void) {
    setup_refs();
    fd_before = dup(0);
    close(fd_before);
}

/* The only owner ends a context whose descriptor a walk may be about to set. */
static void setup_fd_kid(void) {
    setup_fd();
    kept_fd = ctx_done_fd(kid);
}
static void end_kid(void) { ctx_end(kid); }
static void check_fd_kid_ended(void) {
    ctx_end(ctx);
    check_fd_ended();
}

/* One of two owners does: the other sees it. */
static void setup_fd_kept(void) {
    setup_fd_refs();
    kept_fd = ctx_done_fd(ctx);
}
static void check_fd_owner_left(void) {
    SCHED_CHECK(readable(kept_fd));
    ctx_release(ctx);
    check_fd_ended();
}

/* -- a wait for a descriptor of the program's -- */

static int silent[2];
static void setup_poll(void) {
    setup_fd();
    SCHED_CHECK(pipe(silent) == 0);
}
static void setup_poll_refs(void) {
    setup_fd_refs();
    SCHED_CHECK(pipe(silent) == 0);
}
static void check_poll_ended(void) {
    close(silent[0]);
    close(silent[1]);
    check_fd_ended();
}
static void check_poll(void) {
    check();
    check_poll_ended();
}

/* Between waits a thread's own descriptor is not readable: else it would end no wait, but make all of them spin. */
static int poll_fd(ctx_t *with) {
    int rc = ctx_poll_fd(with, silent[0], POLLIN);
    SCHED_CHECK(rc == POLLIN || rc == CTX_CANCELED);
    SCHED_CHECK(!ctx__self.poller || !readable(ctx__self.poller->event.fd));
    return rc;
}
static void poll_silent(void) { SCHED_CHECK(poll_fd(kid) == CTX_CANCELED); }
static void poll_both(void) {
    SCHED_CHECK(poll_fd(kid) == CTX_CANCELED);
    SCHED_CHECK(poll_fd(ctx) == CTX_CANCELED);
}
static void poll_any(void) {
    if (poll_fd(kid) == POLLIN) SCHED_CHECK(readable(silent[0]));
}
static void poll_release(void) {
    SCHED_CHECK(poll_fd(ctx) == CTX_CANCELED);
    ctx_release(ctx);
}
static void write_byte(void) { SCHED_CHECK(write(silent[1], "x", 1) == 1); }

/* -- condition variables -- */

static void check_cond(void) {
    check();
    ctx_runtime_stop();
}
static void cond_wait(void) {
    int rc = 0;
    pthread_mutex_lock(&mutex);
    while (!ready && rc == 0) rc = ctx_cond_wait(ctx, &cond, &mutex);
    SCHED_CHECK(ready || rc == CTX_CANCELED);
    pthread_mutex_unlock(&mutex);
}
static void cond_signal(void) {
    pthread_mutex_lock(&mutex);
    ready = true;
    pthread_cond_signal(&cond);
    pthread_mutex_unlock(&mutex);
}
static void cancel_locked(void) {
    pthread_mutex_lock(&mutex);
    ctx_cancel(ctx);
    pthread_mutex_unlock(&mutex);
}

static const sched_scenario_t scenarios[] = {
    { "wait: forever / cancel", setup, { T(wait_forever), T(cancel) }, check, false },
    { "wait: forever / end", setup, { T(wait_forever), T(end) }, check, false },
    { "wait: forever / cancel / cancel kid", setup, { T(wait_forever), T(cancel), T(cancel_kid) }, check, false },
    { "wait: two waiters / cancel", setup, { T(wait_forever), T(wait_ctx_forever), T(cancel) }, check, false },
    { "wait: a while / cancel", setup, { T(wait_a_while), T(cancel) }, check, false },
    { "wait: a while, twice / cancel", setup, { T(wait_a_while), T(wait_a_while), T(cancel) }, check, false },
    { "wait: short", setup, { T(wait_short), T(nothing) }, check, false },
    { "wait: sleep / cancel", setup, { T(sleep_a_while), T(cancel) }, check, false },
    { "wait: last reference / end", setup_refs, { T(wait_release), T(end_own) }, NULL, false },
    { "wait: write, cancel / wait, read", setup, { T(write_cancel), T(wait_read) }, check, false },
    { "wait: write, cancel / err, read", setup, { T(write_cancel), T(err_read) }, check, false },
    { "wait: write, cancel / cause, read", setup, { T(write_cancel), T(cause_read) }, check, false },
    { "wait: write, cancel / derive, read", setup, { T(write_cancel), T(derive_read) }, check, false },
    { "wait: done_fd readable / cancel", setup_fd, { T(fd_readable), T(cancel_then_fd) }, check_fd, false },
    { "wait: done_fd readable, twice / cancel", setup_fd,
      { T(fd_readable), T(fd_readable), T(cancel_then_fd) }, check_fd, false },
    { "wait: done_fd kept / cancel", setup_fd, { T(fd_keep), T(cancel) }, check_fd_kept, false },
    { "wait: done_fd / cancel", setup_fd, { T(done_fd), T(cancel_then_fd) }, check_fd, false },
    { "wait: done_fd / err, done_fd / cancel", setup_fd,
      { T(done_fd), T(err_then_fd), T(cancel_then_fd) }, check_fd, false },
    { "wait: done_fd twice / cancel", setup_fd, { T(done_fd), T(done_fd), T(cancel_then_fd) }, check_fd, false },
    { "wait: done_fd, end / done_fd, end", setup_fd_refs, { T(fd_end), T(fd_end) }, check_fd_ended, false },
    { "wait: done_fd, end / cancel the parent", setup_fd_kid, { T(end_kid), T(cancel) }, check_fd_kid_ended, false },
    { "wait: done_fd, end / owner left", setup_fd_kept, { T(end_own), T(nothing) }, check_fd_owner_left, false },
    { "wait: poll_fd / cancel", setup_poll, { T(poll_silent), T(cancel) }, check_poll, false },
    { "wait: poll_fd / write / cancel", setup_poll, { T(poll_any), T(write_byte), T(cancel) }, check_poll, false },
    { "wait: poll_fd, two contexts / cancel / cancel kid", setup_poll,
      { T(poll_both), T(cancel), T(cancel_kid) }, check_poll, false },
    { "wait: poll_fd, twice / cancel", setup_poll, { T(poll_silent), T(poll_silent), T(cancel) }, check_poll, false },
    { "wait: poll_fd, last reference / end", setup_poll_refs, { T(poll_release), T(end_own) }, check_poll_ended,
      false },
    { "wait: cond / cancel", setup, { T(cond_wait), T(cancel) }, check_cond, false },
    { "wait: cond / cancel with the mutex", setup, { T(cond_wait), T(cancel_locked) }, check_cond, false },
    { "wait: cond / signal / cancel", setup, { T(cond_wait), T(cond_signal), T(cancel) }, check_cond, false },
};
SCHED_MAIN(scenarios)
