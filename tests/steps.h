/* steps.h: stop a thread at each of its steps in turn, and let others run there. A step is one access of the library to
   shared memory. The interleavings with one preemption are walked through, each once, the same ones in every run:

       #define CTXCANCEL_TEST_SCHED               // the library calls the functions ctx__sched_...() of this file
       #define CTXCANCEL_IMPLEMENTATION
       #include "ctxcancel.h"
       #include "test.h"
       #include "steps.h"

       static const steps_fn sides[] = {cancels, looks};
       bool more = true;
       for (int at = 0; more; at += steps_stride()) {
           ... set up ...
           more = steps_run(sides, 2, 0, &shared, at);   // side 0 stops before its step `at`; then side 1 runs
           ... check ...
       }

   One side runs at a time: the first begins, and each goes on until it ends or waits for another. The side to stop runs
   to its step `at`, then waits until no other can go on. steps_run() returns false when that side ended before.
   Threads that are not sides run freely. Where no side can go on the program ends: a hang then has a name. */
#ifndef STEPS_H
#define STEPS_H

#ifndef CTXCANCEL_TEST_SCHED
#error "define CTXCANCEL_TEST_SCHED before ctxcancel.h: the steps are its"
#endif

#include "gates.h"

#ifdef __cplusplus
#define STEPS_C extern "C"
#else
#define STEPS_C
#endif

typedef void (*steps_fn)(void *shared);

enum { STEPS_MOST = 6, STEPS_RELAXES = 40 };

/* READY: may run. HELD: at its step. RELAXING: asked for others to run. WORD, TIMED: until a word changes, or a time.
   OUTSIDE: in the kernel, for a reason that is not the library's. */
enum { STEPS_READY, STEPS_HELD, STEPS_RELAXING, STEPS_WORD, STEPS_TIMED, STEPS_OUTSIDE, STEPS_DONE };

typedef struct steps_side {
    steps_fn fn;
    void *(*adopted)(void *arg); /* a thread of the library that became a side */
    void *shared;
    pthread_t thread;
    int tid;                 /* [atomic] */
    int state;               /* [mu] */
    uint32_t *word;          /* [mu] */
    uint32_t was;            /* [mu] */
    ctx_time_t until;        /* [mu] */
    int count;               /* [atomic] steps so far */
    int stop_at;             /* [const] -1: nowhere */
    bool stopped;            /* [mu] it has been at its step */
    bool runs;               /* [mu] it has seen that it has the turn */
    bool free;               /* [mu] no longer a side */
    int id;                  /* [const] */
    struct steps_side *next; /* [mu] */
} steps_side_t;

static struct {
    pthread_mutex_t mu;
    pthread_cond_t cond;
    steps_side_t *sides[STEPS_MOST];
    steps_side_t *left; /* [mu] library threads that were sides, and may still look at it */
    int n;              /* [mu] */
    int running;        /* [mu] who has the turn; -1: nobody */
    int relaxes;        /* [mu] left while a side is held */
    int last;           /* [mu] who relaxed last */
    int adopt_at;       /* [mu] stop the next thread that the library starts there; -1: do not adopt it */
    int pid;            /* in the child of a fork nobody is a side */
    const char *forbidden, *forbidden_end; /* [atomic] */
    int trespasses;                        /* [atomic] */
} steps = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, {NULL}, NULL, 0, -1, 0, 0, -1, 0, NULL, NULL, 0};

static __thread steps_side_t *steps_me;

static inline int steps_stride(void) { return TEST_QUICK ? 7 : 1; }

static inline steps_side_t *steps_side(void) {
    steps_side_t *me = steps_me;
    return me && steps.pid == (int)getpid() ? me : NULL;
}

/* -- what a side does ------------------------------------------------------------------------------------------- */

/* Give the turn back in this state, and wait for the next one. */
static inline void steps_pause(steps_side_t *me, int state) {
    pthread_mutex_lock(&steps.mu);
    store(&me->state, state);
    if (state == STEPS_HELD) me->stopped = true;
    if (!me->free && steps.running == me->id) steps.running = -1;
    pthread_cond_broadcast(&steps.cond);
    while (!me->free && steps.running != me->id) pthread_cond_wait(&steps.cond, &steps.mu);
    me->runs = true;
    if (me->free) steps_me = NULL;
    pthread_mutex_unlock(&steps.mu);
}

/* Let the others run until they end or wait: in a side. */
static inline UNUSED_OK void steps_yield(void) {
    steps_side_t *me = steps_side();
    if (me)
        steps_pause(me, STEPS_RELAXING);
    else
        sched_yield();
}

/* True while the side that is to stop is stopped: in another side. */
static inline UNUSED_OK bool steps_holding(void) {
    bool held = false;
    pthread_mutex_lock(&steps.mu);
    for (int i = 0; i < steps.n; i++) held = held || steps.sides[i]->state == STEPS_HELD;
    pthread_mutex_unlock(&steps.mu);
    return held;
}

/* From now on no step may touch these bytes. */
static inline UNUSED_OK void steps_forbid(const void *at, size_t size) {
    __atomic_store_n(&steps.forbidden_end, (const char *)at + size, __ATOMIC_RELEASE);
    __atomic_store_n(&steps.forbidden, (const char *)at, __ATOMIC_RELEASE);
}

/* How many did since then. */
static inline UNUSED_OK int steps_trespasses(void) {
    __atomic_store_n(&steps.forbidden, (const char *)NULL, __ATOMIC_RELEASE);
    return __atomic_exchange_n(&steps.trespasses, 0, __ATOMIC_ACQ_REL);
}

/* -- what the library calls ------------------------------------------------------------------------------------- */

STEPS_C void ctx__sched_step(const char *op, const volatile void *word, const char *file, int line) {
    steps_side_t *me = steps_me;
    const char *forbidden = __atomic_load_n(&steps.forbidden, __ATOMIC_ACQUIRE), *at = (const char *)(uintptr_t)word;
    (void)op;
    if (forbidden && at >= forbidden && at < __atomic_load_n(&steps.forbidden_end, __ATOMIC_ACQUIRE)) {
        if (add(&steps.trespasses, 1) == 1) fprintf(stderr, "  touched by %s:%d\n", file, line);
    }
    if (!me) return;
    me = steps_side();
    if (!me) return;
    if (load(&me->state) == STEPS_OUTSIDE) steps_pause(me, STEPS_READY);
    if (me->stop_at >= 0 && load(&me->count) == me->stop_at && !me->stopped) steps_pause(me, STEPS_HELD);
    add(&me->count, 1);
}

STEPS_C void ctx__sched_relax(void) { steps_yield(); }

STEPS_C void ctx__sched_sleep(uint32_t *word, uint32_t expected, ctx_time_t until);
STEPS_C ctx_time_t ctx__sched_now(void) { return test_now_ns(); }

static inline bool steps_word_is(uint32_t *word, uint32_t is) { return __atomic_load_n(word, __ATOMIC_ACQUIRE) == is; }

static inline void steps_wait(uint32_t *word, uint32_t is, ctx_time_t until) {
    steps_side_t *me = steps_side();
    if (!me) {
        while (steps_word_is(word, is) && test_now_ns() < until) {
            struct timespec nap;
            nap.tv_sec = 0;
            nap.tv_nsec = 100000;
            nanosleep(&nap, NULL);
        }
        return;
    }
    if (!steps_word_is(word, is)) return;
    me->word = word;
    me->was = is;
    me->until = until;
    steps_pause(me, until == CTX_NO_DEADLINE ? STEPS_WORD : STEPS_TIMED);
}

STEPS_C void ctx__sched_block(uint32_t *word, uint32_t is) { steps_wait(word, is, CTX_NO_DEADLINE); }
STEPS_C void ctx__sched_sleep(uint32_t *word, uint32_t expected, ctx_time_t until) {
    steps_wait(word, expected, until);
}
STEPS_C void ctx__sched_wake(uint32_t *word, int n) { (void)word, (void)n; }

/* -- who runs --------------------------------------------------------------------------------------------------- */

static inline void *steps_thread(void *arg) {
    steps_side_t *me = (steps_side_t *)arg;
    steps_me = me;
    store(&me->tid, thread_id());
    steps_pause(me, STEPS_READY);
    if (me->adopted)
        (void)me->adopted(me->shared);
    else
        me->fn(me->shared);
    steps_me = NULL;
    pthread_mutex_lock(&steps.mu);
    store(&me->state, STEPS_DONE);
    if (!me->free && steps.running == me->id) steps.running = -1;
    pthread_cond_broadcast(&steps.cond);
    pthread_mutex_unlock(&steps.mu);
    return NULL;
}

/* [mu] */
static inline steps_side_t *steps_add(steps_fn fn, void *(*adopted)(void *arg), void *shared, int stop_at) {
    steps_side_t *side = (steps_side_t *)calloc(1, sizeof *side);
    if (!side) abort();
    steps.sides[steps.n] = side;
    side->id = steps.n;
    side->fn = fn;
    side->adopted = adopted;
    side->shared = shared;
    side->stop_at = stop_at;
    side->state = STEPS_READY;
    return side;
}

STEPS_C int ctx__sched_start(pthread_t *thread, void *(*fn)(void *), void *arg) {
    int rc;
    if (!steps_side()) { /* also in the child of a fork, where the lock may have been taken by another */
        rc = pthread_create(thread, NULL, fn, arg);
        return rc == EAGAIN ? CTX_NO_MEMORY : -rc;
    }
    pthread_mutex_lock(&steps.mu);
    if (steps.adopt_at >= 0 && steps.n < STEPS_MOST) {
        steps_side_t *side = steps_add(NULL, fn, arg, steps.adopt_at);
        steps.adopt_at = -1;
        rc = pthread_create(thread, NULL, steps_thread, side);
        if (rc == 0) steps.n++;
    } else {
        rc = pthread_create(thread, NULL, fn, arg);
    }
    pthread_mutex_unlock(&steps.mu);
    return rc == EAGAIN ? CTX_NO_MEMORY : -rc;
}

STEPS_C int ctx__sched_join(pthread_t thread) { return pthread_join(thread, NULL); }

/* [mu] The next to run; -1: nobody can just now. */
static inline int steps_choose(void) {
    int held = -1;
    for (int i = 0; i < steps.n; i++) {
        if (steps.sides[i]->state == STEPS_READY) return i;
        if (steps.sides[i]->state == STEPS_HELD) held = i;
    }
    for (int i = 0; i < steps.n; i++) {
        steps_side_t *side = steps.sides[i];
        if (side->state != STEPS_WORD && side->state != STEPS_TIMED) continue;
        if (!steps_word_is(side->word, side->was)) return i;
        if (side->state == STEPS_TIMED && test_now_ns() >= side->until) return i;
    }
    for (int i = 1; i <= steps.n && (held < 0 || steps.relaxes > 0); i++) {
        int at = (steps.last + i) % steps.n;
        if (steps.sides[at]->state != STEPS_RELAXING) continue;
        steps.last = at;
        if (held >= 0) steps.relaxes--;
        return at;
    }
    return held;
}

/* [mu] Has every side that is to end ended? */
static inline bool steps_over(void) {
    for (int i = 0; i < steps.n; i++)
        if (!steps.sides[i]->adopted && steps.sides[i]->state != STEPS_DONE) return false;
    return true;
}

static inline bool steps_in_kernel(int tid) {
#if defined(__linux__) || defined(__gnu_linux__) /* -U__linux__ is for the header alone */
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    FILE *file = fopen(path, "r");
    if (!file) return false;
    if (!fgets(line, (int)sizeof line, file)) line[0] = '\0';
    fclose(file);
    const char *state = strrchr(line, ')');
    return state && state[1] == ' ' && state[2] == 'S';
#else
    (void)tid;
    return true;
#endif
}

/* [mu] Wait until the running side gives its turn back, or sleeps in the kernel for a reason of the test's. */
static inline void steps_await_turn(void) {
    int asleep = 0, count = -1;
    while (steps.running >= 0) {
        steps_side_t *side = steps.sides[steps.running];
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += 2000000;
        if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
        if (pthread_cond_timedwait(&steps.cond, &steps.mu, &t) == 0 || steps.running < 0) continue;
        bool waits = side->runs && steps_in_kernel(load(&side->tid));
        asleep = waits && load(&side->count) == count ? asleep + 1 : 0;
        count = load(&side->count);
        if (asleep < 3) continue;
        store(&side->state, STEPS_OUTSIDE);
        steps.running = -1;
    }
}

static inline bool steps_run_adopting(const steps_fn *fns, int n, int stop, void *shared, int at, int adopt_at) {
    bool stopped = false;
    pthread_mutex_lock(&steps.mu);
    steps.pid = (int)getpid();
    steps.n = 0;
    steps.running = -1;
    steps.relaxes = STEPS_RELAXES;
    steps.last = 0;
    steps.adopt_at = adopt_at;
    for (; steps.n < n; steps.n++) {
        steps_side_t *side = steps_add(fns[steps.n], NULL, shared, steps.n == stop ? at : -1);
        side->thread = thread_start(steps_thread, side);
    }
    for (int64_t since = test_now_ns(); !steps_over();) {
        int next = steps_choose();
        if (next < 0) { /* all sleep: for a thread that is no side, or for a time */
            if (test_now_ns() - since > PATIENCE_NS) {
                test_cut("no side can go on");
                _exit(1);
            }
            pthread_mutex_unlock(&steps.mu);
            test_sleep_ms(1);
            pthread_mutex_lock(&steps.mu);
            continue;
        }
        int state = steps.sides[next]->state;
        if (state != STEPS_RELAXING && state != STEPS_TIMED) since = test_now_ns();
        if (test_now_ns() - since > PATIENCE_NS) {
            test_cut("the sides wait for each other");
            _exit(1);
        }
        store(&steps.sides[next]->state, STEPS_READY);
        steps.sides[next]->runs = false;
        steps.running = next;
        pthread_cond_broadcast(&steps.cond);
        steps_await_turn();
    }
    steps_side_t *sides[STEPS_MOST];
    memcpy(sides, steps.sides, sizeof sides);
    for (int i = 0; i < steps.n; i++) {
        stopped = stopped || sides[i]->stopped;
        sides[i]->free = true;
        if (i < n) continue;
        sides[i]->next = steps.left;
        steps.left = sides[i];
    }
    steps.n = 0;
    pthread_cond_broadcast(&steps.cond);
    pthread_mutex_unlock(&steps.mu);
    for (int i = 0; i < n; i++) {
        thread_join(sides[i]->thread);
        free(sides[i]);
    }
    return stopped;
}

/* Run fns[0..n-1] as sides, fns[stop] stopping before its step `at`. False: it ended before. */
static inline UNUSED_OK bool steps_run(const steps_fn *fns, int n, int stop, void *shared, int at) {
    return steps_run_adopting(fns, n, stop, shared, at, -1);
}

/* The same, but what stops is the next thread that the library starts. It is left running. */
static inline UNUSED_OK bool steps_run_library(const steps_fn *fns, int n, void *shared, int at) {
    return steps_run_adopting(fns, n, -1, shared, -1, at);
}

#endif /* STEPS_H */
