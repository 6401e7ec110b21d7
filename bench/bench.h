/* bench.h: what every benchmark program shares, ours and the peers' (C99 and C++11).

   A program prints one line a sample, `figure<TAB>value<TAB>unit`; run.sh collects them. A figure may have several
   lines: they are samples of the same thing.

       BENCH_ONLY=name ./bench_context      only figures whose name contains `name`
       BENCH_SCALE=0.1 ./bench_context      a tenth of the work, for a quick look
       BENCH_BEST=1 ./bench_context         the best of many short runs instead of a median, for tuning on a machine
                                            that is not idle; of single-threaded figures only */
#ifndef BENCH_H
#define BENCH_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BENCH_UNUSED __attribute__((unused))

/* The compiler must have this value ready, and must assume that all memory changes. */
#define BENCH_KEEP(x) __asm__ volatile("" : : "r"(x) : "memory")

/* The compiler must assume that all memory changes here. */
#define BENCH_BARRIER() __asm__ volatile("" : : : "memory")

static inline BENCH_UNUSED uint64_t bench_clock(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* Nanoseconds: of the day, and of all processors that this process used. */
static inline BENCH_UNUSED uint64_t bench_now(void) { return bench_clock(CLOCK_MONOTONIC); }
static inline BENCH_UNUSED uint64_t bench_cpu(void) { return bench_clock(CLOCK_PROCESS_CPUTIME_ID); }

static inline BENCH_UNUSED int bench_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts `values`. */
static inline BENCH_UNUSED double bench_median(double *values, size_t n) {
    qsort(values, n, sizeof *values, bench_compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static inline BENCH_UNUSED bool bench_wants(const char *figure) {
    const char *only = getenv("BENCH_ONLY");
    return !only || !*only || strstr(figure, only);
}

/* `n`, scaled by BENCH_SCALE; 1 at least. */
static inline BENCH_UNUSED size_t bench_scaled(size_t n) {
    const char *scale = getenv("BENCH_SCALE");
    double scaled = scale && *scale ? (double)n * atof(scale) : (double)n;
    return scaled < 1 ? 1 : (size_t)scaled;
}

/* Whether `section` stands among the arguments; without arguments, all do. */
static inline BENCH_UNUSED bool bench_section(int argc, char **argv, const char *section) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], section)) return true;
    return argc < 2;
}

static inline BENCH_UNUSED void bench_print(const char *figure, double value, const char *unit) {
    printf("%s\t%.4g\t%s\n", figure, value, unit);
    fflush(stdout);
}

static inline BENCH_UNUSED void bench_check(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

/* Do something `n` times; return the nanoseconds of what counts. */
typedef uint64_t (*bench_fn)(size_t n);

/* How many fit into 40 ms, as far as a tenth of `n` tells; `n` at most. Warms up, too. */
static inline BENCH_UNUSED size_t bench_fit(bench_fn fn, size_t n) {
    size_t few = n / 10 + 1;
    uint64_t began = bench_now();
    fn(few);
    double fits = 40e6 * (double)few / (double)(bench_now() - began + 1);
    return fits < (double)n ? (size_t)fits + 1 : n;
}

typedef struct {
    const char *figure;
    bench_fn fn;
} bench_figure_t;

/* The best of many short runs. */
static inline BENCH_UNUSED void bench_best(const bench_figure_t *figure, size_t n) {
    double best = 1e9;
    for (int i = 0; i < 400; i++) {
        double each = (double)figure->fn(n) / (double)n;
        if (each < best) best = each;
    }
    bench_print(figure->figure, best, "ns");
}

#define BENCH_TOGETHER 4

/* For each figure, print the nanoseconds that its `fn` needs each time: the median of five, after a warm-up. The
   figures, up to four, take turns, so that they can be compared. */
static inline BENCH_UNUSED void bench_together(const bench_figure_t *figures, size_t n_figures, size_t n) {
    double each[BENCH_TOGETHER][5];
    size_t fits[BENCH_TOGETHER];
    bool wanted = false;
    bench_check(n_figures <= BENCH_TOGETHER, "too many figures together");
    for (size_t f = 0; f < n_figures; f++) wanted = wanted || bench_wants(figures[f].figure);
    if (!wanted) return;
    for (size_t f = 0; f < n_figures; f++) fits[f] = bench_fit(figures[f].fn, bench_scaled(n));
    if (getenv("BENCH_BEST")) {
        for (size_t f = 0; f < n_figures; f++) bench_best(&figures[f], fits[f] / 20 + 1);
        return;
    }
    for (size_t i = 0; i < 5; i++)
        for (size_t f = 0; f < n_figures; f++) each[f][i] = (double)figures[f].fn(fits[f]) / (double)fits[f];
    for (size_t f = 0; f < n_figures; f++) bench_print(figures[f].figure, bench_median(each[f], 5), "ns");
}

static inline BENCH_UNUSED void bench_run(const char *figure, bench_fn fn, size_t n) {
    const bench_figure_t alone = {figure, fn};
    bench_together(&alone, 1, n);
}

/* Print the nanoseconds that `fn` needs each time, every run a sample, so that a bad one shows. For figures that depend
   on how the system places threads. */
static inline BENCH_UNUSED void bench_every_run(const char *figure, bench_fn fn, size_t n) {
    if (!bench_wants(figure)) return;
    n = bench_fit(fn, bench_scaled(n));
    for (size_t i = 0; i < 5; i++) bench_print(figure, (double)fn(n) / (double)n, "ns");
}

typedef struct {
    bench_fn fn;
    size_t n;
    pthread_barrier_t *start;
    uint64_t began, ended;
} bench_thread_t;

static inline BENCH_UNUSED void *bench_thread_main(void *arg) {
    bench_thread_t *self = (bench_thread_t *)arg;
    self->fn(self->n / 10 + 1);
    pthread_barrier_wait(self->start);
    self->began = bench_now();
    self->fn(self->n);
    self->ended = bench_now();
    return NULL;
}

/* Nanoseconds from the first start to the last end of `threads` (1 or 2) threads that each do `fn(n)`. */
static inline BENCH_UNUSED uint64_t bench_threads(bench_fn fn, size_t n, unsigned threads) {
    bench_thread_t t[2];
    pthread_t id[2];
    pthread_barrier_t start;
    uint64_t began = UINT64_MAX, ended = 0;
    pthread_barrier_init(&start, NULL, threads);
    for (unsigned i = 0; i < threads; i++) {
        t[i].fn = fn;
        t[i].n = n;
        t[i].start = &start;
        t[i].began = t[i].ended = 0;
        bench_check(pthread_create(&id[i], NULL, bench_thread_main, &t[i]) == 0, "no thread");
    }
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(id[i], NULL);
        if (t[i].began < began) began = t[i].began;
        if (t[i].ended > ended) ended = t[i].ended;
    }
    pthread_barrier_destroy(&start);
    return ended - began;
}

/* Print how many times the work of one thread two threads do in the same time, the median of five, and what one
   operation then costs each of the two. `fresh` (may be NULL) runs before each measurement. */
static inline BENCH_UNUSED void bench_two_threads(const char *figure, bench_fn fn, size_t n, void (*fresh)(void)) {
    double ratio[5], each[5];
    char name[64];
    if (!bench_wants(figure)) return;
    n = bench_scaled(n);
    for (size_t i = 0; i < 5; i++) {
        if (fresh) fresh();
        uint64_t one = bench_threads(fn, n, 1);
        if (fresh) fresh();
        uint64_t two = bench_threads(fn, n, 2);
        ratio[i] = 2 * (double)one / (double)two;
        each[i] = (double)two / (double)n;
    }
    bench_print(figure, bench_median(ratio, 5), "x");
    snprintf(name, sizeof name, "%s_each", figure);
    bench_print(name, bench_median(each, 5), "ns");
}

/* == tasks that compute =========================================== */

/* Steps that take a microsecond when nothing disturbs them. */
static size_t bench_steps_per_us BENCH_UNUSED;

/* Each step waits for the one before. */
static inline BENCH_UNUSED void bench_steps(size_t n) {
    uint64_t x = n;
    for (size_t i = 0; i < n; i++) x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    BENCH_KEEP(x);
}

/* Compute for `us` microseconds. The number of steps is fixed, so a task that loses its processor is not shorter. */
static inline BENCH_UNUSED void bench_compute(size_t us) { bench_steps(us * bench_steps_per_us); }

/* The best of many tries counts, since whatever disturbs one makes it longer. */
static inline BENCH_UNUSED void bench_calibrate(void) {
    const size_t steps = 20000;
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 2000; i++) {
        uint64_t began = bench_now();
        bench_steps(steps);
        uint64_t spent = bench_now() - began;
        if (spent < best) best = spent;
    }
    bench_steps_per_us = (size_t)((double)steps * 1e3 / (double)best);
}

/* == senders and receivers ======================================== */

/* One side of a queue: put `n` items in, or take `n` out. */
typedef void (*bench_side_fn)(size_t n);

typedef struct {
    bench_side_fn side;
    size_t n;
    int core; /* which one to stay on, counted from 0; negative: as the system likes */
    pthread_barrier_t *start;
    uint64_t began, ended;
} bench_side_t;

#define BENCH_MAX_PAIRS 4

/* Keep this thread on the `which`-th of the cores that the process may use, if there are so many. */
static inline BENCH_UNUSED void bench_stay_on_core(int which) {
#ifdef __linux__
    cpu_set_t usable, one;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0) return;
    for (size_t core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, &usable) || which-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        sched_setaffinity(0, sizeof one, &one);
        return;
    }
#else
    (void)which;
#endif
}

static inline BENCH_UNUSED void *bench_side_main(void *arg) {
    bench_side_t *self = (bench_side_t *)arg;
    if (self->core >= 0) bench_stay_on_core(self->core);
    pthread_barrier_wait(self->start);
    self->began = bench_now();
    self->side(self->n);
    self->ended = bench_now();
    return NULL;
}

/* Nanoseconds from the first start to the last end of so many `pairs` of a sender and a receiver, which pass `n` items
   in all. `apart`: senders stay on one core and receivers on another. */
static inline BENCH_UNUSED uint64_t bench_queue(bench_side_fn send, bench_side_fn receive, size_t pairs, size_t n,
                                                bool apart) {
    bench_side_t t[2 * BENCH_MAX_PAIRS];
    pthread_t id[2 * BENCH_MAX_PAIRS];
    pthread_barrier_t start;
    uint64_t began = UINT64_MAX, ended = 0;
    bench_check(pairs <= BENCH_MAX_PAIRS, "too many senders");
    pthread_barrier_init(&start, NULL, (unsigned)(2 * pairs));
    for (size_t i = 0; i < 2 * pairs; i++) {
        t[i].side = i % 2 ? send : receive;
        t[i].core = apart ? (int)(i % 2) : -1;
        t[i].n = (n + pairs - 1) / pairs;
        t[i].start = &start;
        t[i].began = t[i].ended = 0;
        bench_check(pthread_create(&id[i], NULL, bench_side_main, &t[i]) == 0, "no thread");
    }
    for (size_t i = 0; i < 2 * pairs; i++) {
        pthread_join(id[i], NULL);
        if (t[i].began < began) began = t[i].began;
        if (t[i].ended > ended) ended = t[i].ended;
    }
    pthread_barrier_destroy(&start);
    return ended - began;
}

/* == two threads, two ways ======================================== */

/* Two threads, each on its own core, do the same work in two ways, in turns. `work` does `n` operations in that way as
   that thread, 0 or 1; `fresh` runs before each round. */
typedef struct {
    const char *figure;
    void (*work)(unsigned way, unsigned thread, size_t n);
    void (*fresh)(void);
} bench_ways_t;

#define BENCH_WAYS_ROUNDS 5
#define BENCH_WAYS_PAIRS 41

typedef struct {
    uint64_t began, ended;
} bench_burst_t;

static struct {
    const bench_ways_t *ways;
    size_t n;
    unsigned arrived; /* [atomic] counts the arrivals of both threads */
    bench_burst_t burst[2][2 * BENCH_WAYS_PAIRS];
} bench_ways_shared BENCH_UNUSED;

/* Both threads start a burst together: a futex would wake one of them later. */
static inline BENCH_UNUSED void bench_ways_meet(unsigned meeting) {
    __atomic_add_fetch(&bench_ways_shared.arrived, 1, __ATOMIC_ACQ_REL);
    for (unsigned spins = 1; __atomic_load_n(&bench_ways_shared.arrived, __ATOMIC_ACQUIRE) < 2 * meeting; spins++)
        if (spins % 10000 == 0) sched_yield();
}

static inline BENCH_UNUSED void *bench_ways_main(void *arg) {
    bench_burst_t *burst = (bench_burst_t *)arg;
    unsigned thread = burst != bench_ways_shared.burst[0];
    const bench_ways_t *ways = bench_ways_shared.ways;
    bench_stay_on_core((int)thread);
    for (unsigned way = 0; way < 2; way++) ways->work(way, thread, bench_ways_shared.n);
    for (unsigned i = 0; i < 2 * BENCH_WAYS_PAIRS; i++) {
        bench_ways_meet(i + 1);
        burst[i].began = bench_now();
        ways->work(i % 2, thread, bench_ways_shared.n);
        burst[i].ended = bench_now();
    }
    return NULL;
}

/* The nanoseconds of an operation in the `i`-th burst; 0 if the two threads did not run side by side for nine tenths of
   it, since then they could not slow each other down. */
static inline BENCH_UNUSED double bench_ways_each(size_t i) {
    const bench_burst_t *a = &bench_ways_shared.burst[0][i], *b = &bench_ways_shared.burst[1][i];
    uint64_t began = a->began < b->began ? a->began : b->began, ended = a->ended > b->ended ? a->ended : b->ended;
    double all = (double)(ended - began), both = (double)(a->ended - a->began + b->ended - b->began);
    return both < 1.9 * all ? 0 : both / (2 * (double)bench_ways_shared.n);
}

/* Print the time of way 0 over that of way 1, the median of all pairs of bursts, and the nanoseconds of an operation
   in each way. `n` operations should take about half a millisecond, so that both bursts of a pair meet the same
   machine. */
static inline BENCH_UNUSED void bench_two_ways(const bench_ways_t *ways, size_t n, const char *each_0,
                                               const char *each_1) {
    enum { PAIRS = BENCH_WAYS_ROUNDS * BENCH_WAYS_PAIRS };
    double ratio[PAIRS], each[2][PAIRS];
    size_t pairs = 0;
    if (!bench_wants(ways->figure) && !bench_wants(each_0) && !bench_wants(each_1)) return;
    bench_ways_shared.ways = ways;
    bench_ways_shared.n = bench_scaled(n);
    for (unsigned round = 0; round < BENCH_WAYS_ROUNDS; round++) {
        pthread_t id[2];
        ways->fresh();
        bench_ways_shared.arrived = 0;
        for (unsigned i = 0; i < 2; i++)
            bench_check(pthread_create(&id[i], NULL, bench_ways_main, bench_ways_shared.burst[i]) == 0, "no thread");
        for (unsigned i = 0; i < 2; i++) pthread_join(id[i], NULL);
        for (size_t pair = 0; pair < BENCH_WAYS_PAIRS; pair++) {
            each[0][pairs] = bench_ways_each(2 * pair);
            each[1][pairs] = bench_ways_each(2 * pair + 1);
            if (each[0][pairs] == 0 || each[1][pairs] == 0) continue;
            ratio[pairs] = each[0][pairs] / each[1][pairs];
            pairs++;
        }
    }
    if (pairs < PAIRS / 10) {
        fprintf(stderr, "bench: no %s: the machine never gave it two cores\n", ways->figure);
        return;
    }
    bench_print(ways->figure, bench_median(ratio, pairs), "");
    bench_print(each_0, bench_median(each[0], pairs), "ns");
    bench_print(each_1, bench_median(each[1], pairs), "ns");
}

/* == a bare futex, the floor of everything that sleeps ============ */

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline BENCH_UNUSED void bench_futex_wait(uint32_t *word, uint32_t while_it_is) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, while_it_is, NULL, NULL, 0);
}

static inline BENCH_UNUSED void bench_futex_wake(uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Return when thread `tid` of this process sleeps in the kernel. */
static inline BENCH_UNUSED void bench_until_asleep(long tid) {
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/self/task/%ld/stat", tid);
    for (;;) {
        FILE *file = fopen(path, "r");
        bench_check(file != NULL, "no /proc");
        size_t got = fread(text, 1, sizeof text - 1, file);
        fclose(file);
        text[got] = 0;
        const char *state = strrchr(text, ')');
        if (state && state[1] == ' ' && state[2] == 'S') return;
    }
}

/* A way to sleep and to be woken. `prepare` and `finish` (may be NULL) run before and after each turn. */
typedef struct {
    const char *figure;
    void (*prepare)(void);
    void (*park)(void); /* returns only when woken */
    void (*wake)(void);
    void (*finish)(void);
} bench_wake_t;

#define BENCH_MAX_WAYS 4
#define BENCH_OVER UINT32_MAX

static struct {
    const bench_wake_t *ways;
    uint32_t n_ways;
    uint32_t turn;  /* [atomic] counts the waits asked for; at last BENCH_OVER */
    uint32_t began; /* [atomic] counts the waits about to park */
    uint32_t woken; /* [atomic] counts the waits that are over */
    uint64_t at;    /* when the waiter ran again */
    long tid;       /* [atomic] of the waiter */
} bench_wakes_shared BENCH_UNUSED;

static inline BENCH_UNUSED void *bench_wakes_main(void *arg) {
    __atomic_store_n(&bench_wakes_shared.tid, (long)syscall(SYS_gettid), __ATOMIC_RELEASE);
    for (uint32_t turn = 1;; turn++) {
        uint32_t asked;
        while ((asked = __atomic_load_n(&bench_wakes_shared.turn, __ATOMIC_ACQUIRE)) != turn)
            if (asked == BENCH_OVER) return arg;
        __atomic_store_n(&bench_wakes_shared.began, turn, __ATOMIC_RELEASE);
        bench_wakes_shared.ways[turn % bench_wakes_shared.n_ways].park();
        bench_wakes_shared.at = bench_now();
        __atomic_store_n(&bench_wakes_shared.woken, turn, __ATOMIC_RELEASE);
    }
}

/* Print, for each way, the median time from the wake until the waiter runs, the waiter being certainly asleep before.
   The ways take turns, so that all meet the same machine. */
static inline BENCH_UNUSED void bench_wakes(const bench_wake_t *ways, uint32_t n_ways, size_t times) {
    double *took[BENCH_MAX_WAYS];
    size_t n[BENCH_MAX_WAYS];
    pthread_t waiter;
    times = bench_scaled(times);
    bench_check(n_ways <= BENCH_MAX_WAYS, "too many ways to wait");
    for (uint32_t way = 0; way < n_ways; way++) {
        took[way] = (double *)malloc(times * sizeof *took[way]);
        n[way] = 0;
        bench_check(took[way] != NULL, "no memory");
    }
    bench_wakes_shared.ways = ways;
    bench_wakes_shared.n_ways = n_ways;
    bench_check(pthread_create(&waiter, NULL, bench_wakes_main, NULL) == 0, "no thread");
    while (!__atomic_load_n(&bench_wakes_shared.tid, __ATOMIC_ACQUIRE)) {
    }
    for (uint32_t turn = 1; turn <= times * n_ways; turn++) {
        uint32_t way = turn % n_ways;
        if (ways[way].prepare) ways[way].prepare();
        __atomic_store_n(&bench_wakes_shared.turn, turn, __ATOMIC_RELEASE);
        while (__atomic_load_n(&bench_wakes_shared.began, __ATOMIC_ACQUIRE) != turn) {
        }
        bench_until_asleep(bench_wakes_shared.tid);
        for (uint64_t until = bench_now() + 20000; bench_now() < until;) {
        }
        uint64_t began = bench_now();
        ways[way].wake();
        while (__atomic_load_n(&bench_wakes_shared.woken, __ATOMIC_ACQUIRE) != turn) {
        }
        took[way][n[way]++] = (double)(bench_wakes_shared.at - began);
        if (ways[way].finish) ways[way].finish();
    }
    __atomic_store_n(&bench_wakes_shared.turn, BENCH_OVER, __ATOMIC_RELEASE);
    pthread_join(waiter, NULL);
    for (uint32_t way = 0; way < n_ways; way++) {
        bench_print(ways[way].figure, bench_median(took[way], n[way]), "ns");
        free(took[way]);
    }
}

/* == a crowd of parked threads ==================================== */

/* The floor of waking many: each thread sleeps on a futex of its own. */
#define BENCH_MAX_CROWD 1000

typedef struct {
    uint32_t turn; /* [atomic] counts the wakes; at last BENCH_OVER */
    char own_line[60];
} bench_sleeper_t;

static struct {
    bench_sleeper_t sleeper[BENCH_MAX_CROWD];
    pthread_t thread[BENCH_MAX_CROWD];
    uint32_t n, turn;
    uint32_t left; /* [atomic] threads that have not run in this turn */
} bench_crowd BENCH_UNUSED;

/* The last one to run wakes who waits for all. */
static inline BENCH_UNUSED void bench_crowd_ran(void) {
    if (__atomic_sub_fetch(&bench_crowd.left, 1, __ATOMIC_ACQ_REL) == 0) bench_futex_wake(&bench_crowd.left);
}

static inline BENCH_UNUSED void *bench_crowd_main(void *arg) {
    uint32_t *turn = &((bench_sleeper_t *)arg)->turn, seen = 0;
    bench_crowd_ran();
    for (;;) {
        uint32_t now = __atomic_load_n(turn, __ATOMIC_ACQUIRE);
        if (now == seen) {
            bench_futex_wait(turn, seen);
            continue;
        }
        if (now == BENCH_OVER) return NULL;
        seen = now;
        bench_crowd_ran();
    }
}

static inline BENCH_UNUSED void bench_crowd_wait(void) {
    uint32_t left;
    while ((left = __atomic_load_n(&bench_crowd.left, __ATOMIC_ACQUIRE)) != 0)
        bench_futex_wait(&bench_crowd.left, left);
}

static inline BENCH_UNUSED void bench_crowd_announce(uint32_t turn) {
    bench_crowd.turn = turn;
    for (uint32_t i = 0; i < bench_crowd.n; i++) {
        __atomic_store_n(&bench_crowd.sleeper[i].turn, turn, __ATOMIC_RELEASE);
        bench_futex_wake(&bench_crowd.sleeper[i].turn);
    }
}

static inline BENCH_UNUSED void bench_crowd_start(uint32_t n) {
    bench_check(n <= BENCH_MAX_CROWD, "too many threads");
    memset(&bench_crowd, 0, sizeof bench_crowd);
    bench_crowd.n = bench_crowd.left = n;
    for (uint32_t i = 0; i < n; i++)
        bench_check(pthread_create(&bench_crowd.thread[i], NULL, bench_crowd_main, &bench_crowd.sleeper[i]) == 0,
                    "no thread");
    bench_crowd_wait();
}

/* Wake each, and return when all have run. */
static inline BENCH_UNUSED void bench_crowd_wake(void) {
    __atomic_store_n(&bench_crowd.left, bench_crowd.n, __ATOMIC_RELAXED);
    bench_crowd_announce(bench_crowd.turn + 1);
    bench_crowd_wait();
}

static inline BENCH_UNUSED void bench_crowd_stop(void) {
    bench_crowd_announce(BENCH_OVER);
    for (uint32_t i = 0; i < bench_crowd.n; i++) pthread_join(bench_crowd.thread[i], NULL);
}

/* == a trickle of small bursts ==================================== */

#define BENCH_BURST 3
#define BENCH_BURSTS 5000
#define BENCH_BURST_EVERY UINT64_C(100000) /* nanoseconds: 10,000 bursts a second */

typedef enum {
    BENCH_SPIN, /* the submitter watches the clock: what the bursts cost can be told from what the pacing costs */
    BENCH_SLEEP /* the submitter sleeps from burst to burst, as one that serves requests does */
} bench_pace_t;

/* Call `burst` at that pace; nanoseconds of processor for one operation. With BENCH_SPIN: of all other threads, and of
   this one inside `burst`. With BENCH_SLEEP: of the whole process. */
static inline BENCH_UNUSED double bench_paced(bench_pace_t pace, void (*burst)(void *arg), void *arg) {
    size_t bursts = bench_scaled(BENCH_BURSTS);
    double used = 0;
    uint64_t next = bench_now(), all = bench_cpu(), own = bench_clock(CLOCK_THREAD_CPUTIME_ID);
    for (size_t i = 0; i < bursts; i++) {
        next += BENCH_BURST_EVERY;
        if (pace == BENCH_SPIN) {
            uint64_t began, spent;
            while ((began = bench_now()) < next) {
            }
            burst(arg);
            spent = bench_now() - began;
            /* More than a whole period means that somebody else had the processor. */
            used += (double)(spent < BENCH_BURST_EVERY ? spent : BENCH_BURST_EVERY);
        } else {
            struct timespec until;
            until.tv_sec = (time_t)(next / UINT64_C(1000000000));
            until.tv_nsec = (long)(next % UINT64_C(1000000000));
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
            burst(arg);
        }
    }
    own = bench_clock(CLOCK_THREAD_CPUTIME_ID) - own;
    all = bench_cpu() - all;
    used += pace == BENCH_SPIN ? (double)all - (double)own : (double)all;
    return used / (double)(bursts * BENCH_BURST);
}

static inline BENCH_UNUSED void bench_burst_nothing(void *arg) { BENCH_KEEP(arg); }

/* Print what the bursts cost: beyond an empty burst with a spinning submitter, and in all with a sleeping one. */
static inline BENCH_UNUSED void bench_print_paced(const char *figure, void (*burst)(void *arg), void *arg) {
    double nothing = bench_paced(BENCH_SPIN, bench_burst_nothing, NULL);
    char name[64];
    bench_print(figure, bench_paced(BENCH_SPIN, burst, arg) - nothing, "ns");
    snprintf(name, sizeof name, "%s_sleeping", figure);
    bench_print(name, bench_paced(BENCH_SLEEP, burst, arg), "ns");
}
/* == hand-over: two threads that take turns ======================= */

#include <sys/wait.h>

/* A way to hand over. Side 0 is the thread that counts, side 1 its partner: a round is give(0), take(1), give(1),
   take(0). `give` wakes the other side, `take` waits for it. With `alone` there is no partner: give(0) starts something
   that calls bench_hand_pause() on another thread, and take(0) waits for it. `fresh` and `over` run before and after
   each run (`over` may be NULL). */
typedef struct {
    const char *name;
    void (*fresh)(void);
    void (*give)(unsigned side);
    void (*take)(unsigned side);
    void (*over)(void);
    bool alone;
} bench_hand_t;

#define BENCH_HAND_RUNS 5
#define BENCH_HAND_WARM 100                /* rounds that do not count: the library learns how long waits are */
#define BENCH_HAND_WARM_PAUSED 10          /* the same, with pauses */
#define BENCH_HAND_SPAN 40000000           /* nanoseconds of a run without pauses */
#define BENCH_HAND_PAUSE UINT64_C(200000)  /* nanoseconds of computing on each side, where waits are not short */
#define BENCH_HAND_PAUSED 150              /* rounds of a run with pauses */
#define BENCH_HAND_EVERY UINT64_C(1000000) /* nanoseconds from wake to wake */
#define BENCH_HAND_WAKES 200               /* wakes of a run in each of two ways, one each millisecond */

static struct {
    const bench_hand_t *hand;
    uint64_t pause;                 /* nanoseconds */
    bool over;                      /* [whose turn it is] the partner shall end */
    double took[BENCH_HAND_PAUSED]; /* by each round with pauses */
    size_t wakes;
    /* Nanoseconds of processor of each wake: of the process, of the waiter; of each way. */
    double used[2][2][BENCH_HAND_WAKES];
} bench_hand_shared BENCH_UNUSED;

/* What a side does between two waits: compute for the span that was asked for. */
static inline BENCH_UNUSED void bench_hand_pause(void) {
    if (!bench_hand_shared.pause) return;
    for (uint64_t until = bench_now() + bench_hand_shared.pause; bench_now() < until;) {
    }
}

static inline BENCH_UNUSED void *bench_hand_partner(void *arg) {
    const bench_hand_t *hand = bench_hand_shared.hand;
    for (;;) {
        hand->take(1);
        if (bench_hand_shared.over) return arg;
        bench_hand_pause();
        hand->give(1);
    }
}

static inline BENCH_UNUSED void bench_hand_rounds(const bench_hand_t *hand, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bench_hand_pause();
        hand->give(0);
        hand->take(0);
    }
}

/* Nanoseconds of a round without a pause: as many rounds as fit, since where the system places the threads decides how
   many do. */
static inline BENCH_UNUSED double bench_hand_short(const bench_hand_t *hand) {
    size_t rounds = 0;
    uint64_t span = (uint64_t)bench_scaled(BENCH_HAND_SPAN), began, spent;
    bench_hand_rounds(hand, BENCH_HAND_WARM);
    began = bench_now();
    do {
        bench_hand_rounds(hand, 20);
        rounds += 20;
    } while ((spent = bench_now() - began) < span);
    return (double)spent / (double)rounds;
}

/* Nanoseconds of a round with two pauses, without them: the median. */
static inline BENCH_UNUSED double bench_hand_long(const bench_hand_t *hand) {
    size_t n = bench_scaled(BENCH_HAND_PAUSED);
    if (n > BENCH_HAND_PAUSED) n = BENCH_HAND_PAUSED;
    bench_hand_rounds(hand, BENCH_HAND_WARM_PAUSED);
    for (size_t i = 0; i < n; i++) {
        uint64_t began = bench_now();
        bench_hand_rounds(hand, 1);
        bench_hand_shared.took[i] = (double)(bench_now() - began) - 2 * (double)bench_hand_shared.pause;
    }
    return bench_median(bench_hand_shared.took, n);
}

static inline BENCH_UNUSED double bench_hand_run(const bench_hand_t *hand, uint64_t pause) {
    pthread_t partner;
    double each;
    bench_hand_shared.hand = hand;
    bench_hand_shared.pause = pause;
    bench_hand_shared.over = false;
    hand->fresh();
    bench_check(hand->alone || pthread_create(&partner, NULL, bench_hand_partner, NULL) == 0, "no thread");
    each = pause ? bench_hand_long(hand) : bench_hand_short(hand);
    if (!hand->alone) {
        bench_hand_shared.over = true;
        hand->give(0);
        pthread_join(partner, NULL);
    }
    if (hand->over) hand->over();
    return each;
}

#define BENCH_MAX_HANDS 10

/* Print `hand_<kind>_<name>` of each way, every run a sample: microseconds there and back. The ways take turns, so that
   all meet the same machine. With `yardstick` the first way is that of the others, and runs if one of them does. */
static inline BENCH_UNUSED void bench_hands(const char *kind, const bench_hand_t *hands, size_t n_hands, uint64_t pause,
                                            bool yardstick) {
    char figure[BENCH_MAX_HANDS][64];
    bool wanted[BENCH_MAX_HANDS], any = false;
    bench_check(n_hands <= BENCH_MAX_HANDS, "too many ways to hand over");
    for (size_t h = n_hands; h-- > 0;) {
        snprintf(figure[h], sizeof figure[h], "hand_%s_%s", kind, hands[h].name);
        wanted[h] = bench_wants(figure[h]) || (yardstick && h == 0 && any);
        any = any || wanted[h];
    }
    for (size_t i = 0; i < BENCH_HAND_RUNS; i++)
        for (size_t h = 0; h < n_hands; h++)
            if (wanted[h]) bench_print(figure[h], bench_hand_run(&hands[h], pause) / 1e3, "us");
}

/* Nanoseconds of processor that `clock` counted since `*last`, which is set to now. */
static inline BENCH_UNUSED double bench_hand_used(clockid_t clock, uint64_t *last) {
    uint64_t now = bench_clock(clock), before = *last;
    *last = now;
    return (double)(now - before);
}

/* Wakes go to the yardstick and to the way that is measured in turns, so that both meet the same machine. */
static inline BENCH_UNUSED void *bench_hand_waiter(void *arg) {
    const bench_hand_t *const *ways = (const bench_hand_t *const *)arg;
    uint64_t last;
    bench_stay_on_core(1);
    last = bench_clock(CLOCK_THREAD_CPUTIME_ID);
    for (size_t i = 0; i < bench_hand_shared.wakes; i++) {
        ways[i % 2]->take(1);
        bench_hand_shared.used[1][i % 2][i / 2] = bench_hand_used(CLOCK_THREAD_CPUTIME_ID, &last);
    }
    return NULL;
}

static inline BENCH_UNUSED void *bench_hand_waker(void *arg) {
    const bench_hand_t *const *ways = (const bench_hand_t *const *)arg;
    uint64_t next = bench_now(), last;
    bench_stay_on_core(0);
    last = bench_cpu();
    for (size_t i = 0; i < bench_hand_shared.wakes; i++) {
        struct timespec until;
        ways[i % 2]->give(0);
        next += BENCH_HAND_EVERY;
        until.tv_sec = (time_t)(next / UINT64_C(1000000000));
        until.tv_nsec = (long)(next % UINT64_C(1000000000));
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        bench_hand_shared.used[0][i % 2][i / 2] = bench_hand_used(CLOCK_PROCESS_CPUTIME_ID, &last);
    }
    return NULL;
}

/* Wakes a waiter 2 * `n` times, and notes what each wake used. The two threads stay on different cores, because a wake
   on the same core is far cheaper. */
static inline BENCH_UNUSED void bench_hand_each_ms(const bench_hand_t *yardstick, const bench_hand_t *hand, size_t n) {
    const bench_hand_t *ways[2] = {yardstick, hand};
    pthread_t waiter, waker;
    bench_hand_shared.wakes = 2 * n;
    for (size_t way = 0; way < 2; way++) ways[way]->fresh();
    bench_check(pthread_create(&waiter, NULL, bench_hand_waiter, (void *)ways) == 0, "no thread");
    bench_check(pthread_create(&waker, NULL, bench_hand_waker, (void *)ways) == 0, "no thread");
    pthread_join(waker, NULL);
    pthread_join(waiter, NULL);
    for (size_t way = 0; way < 2; way++)
        if (ways[way]->over) ways[way]->over();
}

/* Prints, of what the process or the waiter used, both ways and their ratio. */
static inline BENCH_UNUSED void bench_hand_print_used(const char *prefix, const bench_hand_t *yardstick,
                                                      const bench_hand_t *hand, unsigned of, size_t n) {
    char figure[64];
    double floor_us = bench_median(bench_hand_shared.used[of][0], n) / 1e3;
    double us = bench_median(bench_hand_shared.used[of][1], n) / 1e3;
    snprintf(figure, sizeof figure, "%s_%s", prefix, yardstick->name);
    bench_print(figure, floor_us, "us");
    snprintf(figure, sizeof figure, "%s_%s", prefix, hand->name);
    bench_print(figure, us, "us");
    snprintf(figure, sizeof figure, "%s_%s_ratio", prefix, hand->name);
    bench_print(figure, us / floor_us, "");
}

/* Print `hand_ms_<name>` and `hand_ms_waiter_<name>`: the microseconds of processor that a wait of a millisecond costs
   the process, which sleeps, wakes and waits, and the waiter alone. The first way is the yardstick of the others, and
   what they cost is also printed as a ratio to it. */
static inline BENCH_UNUSED void bench_hands_each_ms(const bench_hand_t *hands, size_t n_hands) {
    size_t n = bench_scaled(BENCH_HAND_WAKES);
    if (n > BENCH_HAND_WAKES) n = BENCH_HAND_WAKES;
    for (size_t i = 0; i < BENCH_HAND_RUNS; i++)
        for (size_t h = 1; h < n_hands; h++) {
            char all[64], waiter[64];
            snprintf(all, sizeof all, "hand_ms_%s_ratio", hands[h].name);
            snprintf(waiter, sizeof waiter, "hand_ms_waiter_%s_ratio", hands[h].name);
            if (!bench_wants(all) && !bench_wants(waiter)) continue;
            bench_hand_each_ms(&hands[0], &hands[h], n);
            bench_hand_print_used("hand_ms", &hands[0], &hands[h], 0, n);
            bench_hand_print_used("hand_ms_waiter", &hands[0], &hands[h], 1, n);
        }
}

/* Runs the section `handover` of this program once more, from its start, with one core, and waits for its end, because
   a library counts cores when it starts. Returns true in that second process. */
static inline BENCH_UNUSED bool bench_one_core(char *program) {
    static char section[] = "handover";
    int status;
    if (getenv("BENCH_ONE_CORE")) return true;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        char *argv[] = {program, section, NULL};
        bench_stay_on_core(0);
        setenv("BENCH_ONE_CORE", "1", 1);
        execv("/proc/self/exe", argv);
        _exit(127);
    }
    bench_check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "the process with one core failed");
    return false;
}

/* All that take turns: `hand_1_` on one core, `hand_2_` on all, `hand_long_` with pauses. With `yardstick` also
   `hand_ms_`, of the first `n_each_ms` ways, in which a side may give again before the other has taken. */
static inline BENCH_UNUSED void bench_all_hands(char *program, const bench_hand_t *hands, size_t n_hands,
                                                bool yardstick, size_t n_each_ms) {
    if (bench_one_core(program)) {
        bench_hands("1", hands, n_hands, 0, yardstick);
        return;
    }
    bench_hands("2", hands, n_hands, 0, yardstick);
    bench_hands("long", hands, n_hands, BENCH_HAND_PAUSE, yardstick);
    if (yardstick) bench_hands_each_ms(hands, n_each_ms);
}
#endif /* __linux__ */

#endif /* BENCH_H */
