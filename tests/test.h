/* test.h: a small test harness. Needs a POSIX libc; C99 and C++11.

       #define CTXCANCEL_IMPLEMENTATION
       #include "ctxcancel.h"
       #include "test.h"

       TEST(a_canceled_child_leaves_its_parent_alone) {
           ...
           CHECK(ctx_err(parent) == 0);
       }

       TEST_MAIN

   CHECK, CHECK_EQ    record a failure and return: only in the body of a TEST
   EXPECT, EXPECT_EQ  record a failure and go on: from any function and any thread
   SKIP(why)          leave this test uncounted, with a reason: only in the body of a TEST
   TEST_QUICK         true under slow tools (environment TEST_QUICK=1)
   test_scale(n)      n rounds of a storm; n / 50 if TEST_QUICK, else n / TEST_SHARE (environment, 1 if unset)

   A program runs its tests in source order, or only those whose name contains argv[1], prints one line for each and
   `N passed, N failed` at the end. A test that takes longer than TEST_TIMEOUT seconds (environment, 120 if unset) is
   a failure and ends the program: a lost wake-up then has a name, where it would else be a silent hang. */
#ifndef TEST_H
#define TEST_H

#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1 /* has effect only where no system header came before */
#endif

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct test_case {
    const char *name;
    void (*body)(void);
    int line;
    struct test_case *next;
} test_case_t;

static struct {
    test_case_t *first;
    const test_case_t *current;
    bool quick;
    int share; /* a storm does this part of its rounds */
    unsigned timeout_s;
    pid_t pid;
    int selected, passed, failed, skipped;
    int failures;         /* [atomic] of the current test */
    char first_text[400]; /* written by whoever made `failures` 1 */
    const char *skip_why;
} test_state;

#define TEST_QUICK (test_state.quick)

static inline int test_scale(int n) {
    int scaled = n / (test_state.quick ? 50 : test_state.share);
    return scaled > 0 ? scaled : 1;
}

static inline int64_t test_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void test_sleep_ms(int ms) {
    int64_t end = test_now_ns() + (int64_t)ms * 1000000;
    int64_t left;
    while ((left = end - test_now_ns()) > 0) {
        struct timespec t;
        t.tv_sec = (time_t)(left / 1000000000);
        t.tv_nsec = (long)(left % 1000000000);
        nanosleep(&t, NULL);
    }
}

/* -- recording ------------------------------------------------------------------------------------------------- */

static inline void test_fail(const char *file, int line, const char *text) {
    if (__atomic_fetch_add(&test_state.failures, 1, __ATOMIC_ACQ_REL) == 0)
        snprintf(test_state.first_text, sizeof test_state.first_text, "%s:%d: %s", file, line, text);
    else
        fprintf(stderr, "  also %s:%d: %s\n", file, line, text);
}

static inline bool test_check(bool ok, const char *file, int line, const char *text) {
    if (!ok) test_fail(file, line, text);
    return ok;
}

static inline bool test_check_eq(long long a, long long b, const char *file, int line, const char *text) {
    if (a == b) return true;
    char full[360];
    snprintf(full, sizeof full, "%s: %lld is not %lld", text, a, b);
    test_fail(file, line, full);
    return false;
}

#define EXPECT(expr) ((void)test_check((expr) ? true : false, __FILE__, __LINE__, #expr))
#define EXPECT_EQ(a, b) ((void)test_check_eq((long long)(a), (long long)(b), __FILE__, __LINE__, #a " == " #b))
#define CHECK(expr)                                                                \
    do {                                                                           \
        if (!test_check((expr) ? true : false, __FILE__, __LINE__, #expr)) return; \
    } while (0)
#define CHECK_EQ(a, b)                                                                                \
    do {                                                                                              \
        if (!test_check_eq((long long)(a), (long long)(b), __FILE__, __LINE__, #a " == " #b)) return; \
    } while (0)
#define SKIP(why)                    \
    do {                             \
        test_state.skip_why = (why); \
        return;                      \
    } while (0)

/* -- registering ----------------------------------------------------------------------------------------------- */

/* Sorted by line, since the order of constructors is the compiler's affair. */
static inline void test_register(test_case_t *test) {
    test_case_t **at = &test_state.first;
    while (*at && (*at)->line < test->line) at = &(*at)->next;
    test->next = *at;
    *at = test;
}

#define TEST(name)                                                                                            \
    static void test_body_##name(void);                                                                       \
    static test_case_t test_case_##name = {#name, test_body_##name, __LINE__, NULL};                          \
    __attribute__((constructor)) static void test_register_##name(void) { test_register(&test_case_##name); } \
    static void test_body_##name(void)

/* -- the end of a program that cannot go on -------------------------------------------------------------------- */

static inline void test_put(const char *text) {
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t n = write(STDOUT_FILENO, text, left);
        if (n <= 0) return;
        text += n;
        left -= (size_t)n;
    }
}

static inline void test_put_number(int n) {
    char digits[12];
    size_t at = sizeof digits - 1;
    digits[at] = '\0';
    do {
        digits[--at] = (char)('0' + n % 10);
        n /= 10;
    } while (n > 0 && at > 0);
    test_put(digits + at);
}

/* Tests that were not reached count as failed: a cut run must never look like a smaller complete one. */
static inline void test_cut(const char *why) {
    int lost = test_state.selected - test_state.passed - test_state.failed - test_state.skipped;
    test_put("FAIL ");
    test_put(test_state.current ? test_state.current->name : "?");
    test_put(" (");
    test_put(why);
    if (__atomic_load_n(&test_state.failures, __ATOMIC_ACQUIRE) > 0) {
        test_put("; before that ");
        test_put(test_state.first_text);
    }
    test_put(lost > 1 ? "; later tests not run)\n" : ")\n");
    test_put_number(test_state.passed);
    test_put(" passed, ");
    test_put_number(test_state.failed + lost);
    test_put(" failed\n");
}

static inline void test_on_alarm(int sig) {
    (void)sig;
    test_cut("timed out");
    _exit(1);
}

static inline void test_on_crash(int sig) {
    if (getpid() == test_state.pid)
        test_cut(sig == SIGABRT ? "aborted" : sig == SIGSEGV ? "segmentation fault" : "crashed");
    signal(sig, SIG_DFL);
    raise(sig);
}

#if defined(__SANITIZE_THREAD__)
#define TEST_SANITIZED 1
#define TEST_THREAD_SANITIZER 1
#elif defined(__SANITIZE_ADDRESS__)
#define TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TEST_SANITIZED 1
#define TEST_THREAD_SANITIZER 1
#elif __has_feature(address_sanitizer) || __has_feature(memory_sanitizer)
#define TEST_SANITIZED 1
#endif
#endif

static inline void test_catch(void) {
    signal(SIGALRM, test_on_alarm);
    signal(SIGABRT, test_on_crash);
#ifndef TEST_SANITIZED /* a sanitizer has better handlers of its own for these */
    signal(SIGSEGV, test_on_crash);
    signal(SIGBUS, test_on_crash);
    signal(SIGFPE, test_on_crash);
    signal(SIGILL, test_on_crash);
#endif
}

/* The thread sanitizer holds signals back until the next call that it knows, which a thread parked in a bare futex
   never makes; so there a thread watches. */
#ifdef TEST_THREAD_SANITIZER
#include <pthread.h>
static int64_t test_deadline_ns; /* [atomic] 0: none */

static inline void *test_watch(void *arg) {
    for (;;) {
        int64_t deadline = __atomic_load_n(&test_deadline_ns, __ATOMIC_ACQUIRE);
        if (deadline != 0 && test_now_ns() > deadline) test_on_alarm(SIGALRM);
        test_sleep_ms(100);
    }
    return arg;
}

static inline void test_watch_start(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, test_watch, NULL) == 0) pthread_detach(thread);
}

static inline void test_watch_for(unsigned seconds) {
    int64_t deadline = seconds ? test_now_ns() + (int64_t)seconds * 1000000000 : 0;
    __atomic_store_n(&test_deadline_ns, deadline, __ATOMIC_RELEASE);
}
#else
static inline void test_watch_start(void) {}
static inline void test_watch_for(unsigned seconds) { alarm(seconds); }
#endif

/* -- running --------------------------------------------------------------------------------------------------- */

static inline void test_run(const test_case_t *test) {
    test_state.current = test;
    test_state.skip_why = NULL;
    __atomic_store_n(&test_state.failures, 0, __ATOMIC_RELEASE);
    test_watch_for(test_state.timeout_s);
    test->body();
    test_watch_for(0);
    if (__atomic_load_n(&test_state.failures, __ATOMIC_ACQUIRE) > 0) {
        test_state.failed++;
        printf("FAIL %s (%s)\n", test->name, test_state.first_text);
    } else if (test_state.skip_why) {
        test_state.skipped++;
        printf("skip %s (%s)\n", test->name, test_state.skip_why);
    } else {
        test_state.passed++;
        printf("ok %s\n", test->name);
    }
}

static inline bool test_selected(const test_case_t *test, const char *filter) {
    return !filter || strstr(test->name, filter) != NULL;
}

static inline int test_main(int argc, char **argv) {
    const char *filter = argc > 1 ? argv[1] : NULL;
    const char *quick = getenv("TEST_QUICK");
    const char *share = getenv("TEST_SHARE");
    const char *timeout = getenv("TEST_TIMEOUT");
    test_state.quick = quick && *quick && strcmp(quick, "0") != 0;
    test_state.share = share && atoi(share) > 0 ? atoi(share) : 1;
    test_state.timeout_s = timeout && atoi(timeout) > 0 ? (unsigned)atoi(timeout) : 120;
    test_state.pid = getpid();
    setvbuf(stdout, NULL, _IOLBF, 0); /* so that a forked child never repeats our lines */
    test_catch();
    test_watch_start();
    for (const test_case_t *t = test_state.first; t; t = t->next)
        if (test_selected(t, filter)) test_state.selected++;
    for (const test_case_t *t = test_state.first; t; t = t->next)
        if (test_selected(t, filter)) test_run(t);
    printf("%d passed, %d failed\n", test_state.passed, test_state.failed);
    return test_state.failed > 0 ? 1 : 0;
}

#define TEST_MAIN \
    int main(int argc, char **argv) { return test_main(argc, argv); }

#endif /* TEST_H */
