/* Waiting: from the cancel until a thread parked in ctx_wait() runs, next to a bare futex in the same program. And how
   late threads run that wait for a deadline, next to clock_nanosleep(). */
#define CTXCANCEL_IMPLEMENTATION
#include "../ctxcancel.h"
#include "bench.h"

static ctx_t *server, *ctx;

static void context_prepare(void) { ctx = ctx_with_cancel(server); }
static void context_park(void) { ctx_wait(ctx, CTX_FOREVER); }
static void context_wake(void) { ctx_cancel(ctx); }
static void context_finish(void) { ctx_end(ctx); }

static uint32_t word; /* [atomic] */

static void futex_prepare(void) { __atomic_store_n(&word, 0, __ATOMIC_RELAXED); }
static void futex_park(void) {
    while (!__atomic_load_n(&word, __ATOMIC_ACQUIRE)) bench_futex_wait(&word, 0);
}
static void futex_wake(void) {
    __atomic_store_n(&word, 1, __ATOMIC_RELEASE);
    bench_futex_wake(&word);
}

/* == deadlines ==================================================== */

/* SLEEPERS threads wait for deadlines of 1 to 10 ms, WAITS of them each in a turn, TURNS turns; beside them, threads
   that never sleep. */
#define SLEEPERS 16
#define WAITS 20
#define TURNS 5
#define MAX_BUSY 8

typedef void (*sleep_fn)(uint64_t until);

static void context_sleep(uint64_t until) {
    ctx_t *deadline = ctx_with_timeout(server, (ctx_dur_t)(until - bench_now()));
    ctx_wait(deadline, CTX_FOREVER);
    ctx_end(deadline);
}

static void clock_sleep(uint64_t until) {
    struct timespec t;
    t.tv_sec = (time_t)(until / UINT64_C(1000000000));
    t.tv_nsec = (long)(until % UINT64_C(1000000000));
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0) {
    }
}

typedef struct {
    pthread_t thread;
    sleep_fn sleep;
    uint32_t seed;
    double late[WAITS]; /* microseconds */
} sleeper_t;

static void *sleeper_main(void *arg) {
    sleeper_t *self = (sleeper_t *)arg;
    for (size_t i = 0; i < WAITS; i++) {
        self->seed = self->seed * 1664525 + 1013904223;
        uint64_t until = bench_now() + 1000000 + (self->seed >> 8) % 9000000;
        self->sleep(until);
        uint64_t now = bench_now();
        bench_check(now >= until, "a wait for a deadline was over too early");
        self->late[i] = (double)(now - until) / 1000;
    }
    return NULL;
}

static int busy_over; /* [atomic] nonzero: end */

static void *busy_main(void *arg) {
    while (!__atomic_load_n(&busy_over, __ATOMIC_RELAXED)) BENCH_BARRIER();
    return arg;
}

/* Adds SLEEPERS * WAITS samples at `late`. */
static void sleep_turn(sleep_fn sleep, uint32_t turn, double *late) {
    static sleeper_t sleeper[SLEEPERS];
    for (uint32_t i = 0; i < SLEEPERS; i++) {
        sleeper[i].sleep = sleep;
        sleeper[i].seed = turn * SLEEPERS + i;
        bench_check(pthread_create(&sleeper[i].thread, NULL, sleeper_main, &sleeper[i]) == 0, "no thread");
    }
    for (uint32_t i = 0; i < SLEEPERS; i++) {
        pthread_join(sleeper[i].thread, NULL);
        memcpy(late + i * WAITS, sleeper[i].late, sizeof sleeper[i].late);
    }
}

static void print_late(const char *who, const char *beside, double *late, size_t n) {
    char name[64];
    snprintf(name, sizeof name, "%s_%s_p50", who, beside);
    bench_print(name, bench_median(late, n), "us"); /* sorts */
    snprintf(name, sizeof name, "%s_%s_p99", who, beside);
    bench_print(name, late[n * 99 / 100], "us");
}

/* The two take turns, so that both meet the same machine. */
static void deadlines(const char *beside, unsigned n_busy) {
    static double by_context[TURNS * SLEEPERS * WAITS], by_clock[TURNS * SLEEPERS * WAITS];
    pthread_t busy[MAX_BUSY];
    uint32_t turns = (uint32_t)bench_scaled(TURNS);
    size_t each = SLEEPERS * WAITS;
    if (turns > TURNS) turns = TURNS;
    __atomic_store_n(&busy_over, 0, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < n_busy; i++)
        bench_check(pthread_create(&busy[i], NULL, busy_main, NULL) == 0, "no thread");
    for (uint32_t turn = 0; turn < turns; turn++) {
        sleep_turn(context_sleep, turn, by_context + turn * each);
        sleep_turn(clock_sleep, turn, by_clock + turn * each);
    }
    __atomic_store_n(&busy_over, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < n_busy; i++) pthread_join(busy[i], NULL);
    print_late("deadline", beside, by_context, turns * each);
    print_late("nanosleep", beside, by_clock, turns * each);
}

int main(void) {
    static const bench_wake_t ways[] = {
        {"wait_wake", context_prepare, context_park, context_wake, context_finish},
        {"wait_futex", futex_prepare, futex_park, futex_wake, NULL},
    };
    server = ctx_with_cancel(ctx_background());
    if (bench_wants("wait_wake") || bench_wants("wait_futex")) bench_wakes(ways, 2, 2000);
    if (bench_wants("deadline_idle_p50") || bench_wants("deadline_idle_p99")) deadlines("idle", 0);
    if (bench_wants("deadline_busy_2_p50") || bench_wants("deadline_busy_2_p99")) deadlines("busy_2", 2);
    if (bench_wants("deadline_busy_8_p50") || bench_wants("deadline_busy_8_p99")) deadlines("busy_8", 8);
    ctx_end(server);
    ctx_runtime_stop();
    return 0;
}
