/* gates.h: put threads in an order, where a test would else sleep and hope. Include it after ctxcancel.h and test.h.

   gate_t        closed at first: threads stop in gate_pass() until gate_open(); gate_await() waits for them to come
   start_line_t  all threads leave at the same moment, round after round
   UNTIL         waits for an expression to hold, and is a failure when it does not
   until_asleep  waits until a thread sleeps in the kernel: it has queued and parked */
#ifndef GATES_H
#define GATES_H

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <sys/types.h>
#if defined(__linux__) || defined(__gnu_linux__) /* -U__linux__ is for the header alone */
#include <sys/syscall.h>
#endif

#define UNUSED_OK __attribute__((unused))

/* Long enough for any loaded machine; only a broken promise gets there. */
#ifndef PATIENCE_NS
#define PATIENCE_NS (INT64_C(60) * 1000000000)
#endif

#define UNTIL(expr)                                                     \
    do {                                                                \
        int64_t until_end_ = test_now_ns() + PATIENCE_NS;               \
        while (!(expr) && test_now_ns() < until_end_) test_sleep_ms(1); \
        EXPECT(expr);                                                   \
    } while (0)

static inline int load(const int *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static inline void store(int *at, int value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
static inline int add(int *at, int value) { return __atomic_add_fetch(at, value, __ATOMIC_ACQ_REL); }

/* A generator of one's own, so that a run can be repeated. */
static inline uint32_t random_next(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 33);
}

/* Work that the compiler cannot remove. */
static inline void spin(unsigned turns) {
    for (volatile unsigned i = 0; i < turns; i = i + 1) {
    }
}

/* -- gates ------------------------------------------------------------------------------------------------------ */

typedef struct {
    pthread_mutex_t mu;
    pthread_cond_t cond;
    bool open;      /* [mu] */
    int came, left; /* [mu] threads that reached the gate, and that went through */
} gate_t;

static inline void gate_init(gate_t *gate) {
    pthread_mutex_init(&gate->mu, NULL);
    pthread_cond_init(&gate->cond, NULL);
    gate->open = false;
    gate->came = gate->left = 0;
}

/* Waits for those inside to be through: open it first. */
static inline void gate_destroy(gate_t *gate) {
    pthread_mutex_lock(&gate->mu);
    while (gate->left < gate->came) pthread_cond_wait(&gate->cond, &gate->mu);
    pthread_mutex_unlock(&gate->mu);
    pthread_cond_destroy(&gate->cond);
    pthread_mutex_destroy(&gate->mu);
}

static inline void gate_pass(gate_t *gate) {
    pthread_mutex_lock(&gate->mu);
    gate->came++;
    pthread_cond_broadcast(&gate->cond);
    while (!gate->open) pthread_cond_wait(&gate->cond, &gate->mu);
    gate->left++;
    pthread_cond_broadcast(&gate->cond);
    pthread_mutex_unlock(&gate->mu);
}

static inline void gate_open(gate_t *gate) {
    pthread_mutex_lock(&gate->mu);
    gate->open = true;
    pthread_cond_broadcast(&gate->cond);
    pthread_mutex_unlock(&gate->mu);
}

static inline int gate_came(gate_t *gate) {
    pthread_mutex_lock(&gate->mu);
    int came = gate->came;
    pthread_mutex_unlock(&gate->mu);
    return came;
}

/* Wait until n threads have come to the gate. */
static inline void gate_await(gate_t *gate, int n) {
    pthread_mutex_lock(&gate->mu);
    while (gate->came < n) pthread_cond_wait(&gate->cond, &gate->mu);
    pthread_mutex_unlock(&gate->mu);
}

/* -- start lines ------------------------------------------------------------------------------------------------ */

typedef struct {
    int runners;
    int here;  /* [atomic] */
    int round; /* [atomic] */
} start_line_t;

static inline void start_line_init(start_line_t *line, int runners) {
    line->runners = runners;
    line->here = 0;
    line->round = 0;
}

/* Spins, so that all leave within a fraction of a microsecond where there are cores for them. */
static inline void start_line(start_line_t *line) {
    int round = load(&line->round);
    if (add(&line->here, 1) == line->runners) {
        store(&line->here, 0);
        store(&line->round, round + 1);
        return;
    }
    for (int spins = 0; load(&line->round) == round; spins++)
        if (spins > 100) sched_yield();
}

/* -- threads and what the kernel says of them ------------------------------------------------------------------- */

static inline pthread_t thread_start(void *(*fn)(void *), void *arg) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, fn, arg) != 0) {
        fprintf(stderr, "no thread for the test\n");
        abort();
    }
    return thread;
}

static inline void thread_join(pthread_t thread) { pthread_join(thread, NULL); }

static inline int thread_id(void) {
#if defined(__linux__) || defined(__gnu_linux__) /* -U__linux__ is for the header alone */
    return (int)syscall(SYS_gettid);
#else
    return 1;
#endif
}

/* `slot` is 0 until the thread has put its thread_id() there. The thread must be about to park and nothing else. */
static inline UNUSED_OK void until_asleep(const int *slot) {
    while (load(slot) == 0) sched_yield();
#if defined(__linux__) || defined(__gnu_linux__) /* -U__linux__ is for the header alone */
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", load(slot));
    int64_t end = test_now_ns() + PATIENCE_NS;
    for (int seen = 0; seen < 3;) {
        char line[256] = "";
        FILE *file = fopen(path, "r");
        if (!file) break; /* it has ended: the caller will see what it did */
        if (!fgets(line, (int)sizeof line, file)) line[0] = '\0';
        fclose(file);
        const char *state = strrchr(line, ')');
        seen = state && state[1] == ' ' && state[2] == 'S' ? seen + 1 : 0;
        if (test_now_ns() > end) break;
        test_sleep_ms(1);
    }
#else
    test_sleep_ms(100);
#endif
}

/* Entries of a directory; -1 where there is no such thing. */
static inline int entries(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) return -1;
    int n = 0;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        if (entry->d_name[0] != '.') n++;
    closedir(dir);
    return n;
}

static inline UNUSED_OK int thread_count(void) { return entries("/proc/self/task"); }

/* thread_count() once threads that are about to end have ended. */
static inline UNUSED_OK int threads_settled(void) {
    int n = thread_count();
    for (int same = 0; same < 30; same++) {
        test_sleep_ms(1);
        int now = thread_count();
        if (now != n) same = 0;
        n = now;
    }
    return n;
}

static inline UNUSED_OK int fd_count(void) { return entries("/proc/self/fd"); }

/* Drain a batcher and free it: the result of the drain, 0 for none. */
static inline int batch_close(ctx_batch_t *batch, ctx_dur_t budget) {
    int rc = batch ? ctx_batch_drain(batch, budget, NULL) : 0;
    ctx_batch_free(batch);
    return rc;
}

#endif /* GATES_H */
