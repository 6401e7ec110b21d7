/* sched.c: the explorer. sched.h says what it does. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The types of sched.h, without the library: this file is compiled once. */
#define SCHED_ENGINE
#include "sched.h"

/* What ctxcancel.h declares. */
void ctx__sched_step(const char *op, const volatile void *word, const char *file, int line);
void ctx__sched_relax(void);
void ctx__sched_block(uint32_t *word, uint32_t is);
void ctx__sched_sleep(uint32_t *word, uint32_t expected, int64_t until);
void ctx__sched_wake(uint32_t *word, int n);
int64_t ctx__sched_now(void);
int ctx__sched_start(pthread_t *thread, void *(*fn)(void *), void *arg);
int ctx__sched_join(pthread_t thread);

/* races.c, if it is linked in. */
__attribute__((weak)) void sched_races_begin(void);
__attribute__((weak)) void sched_races_edge(int from, int to);
__attribute__((weak)) void sched_races_acquire(const volatile void *word);
__attribute__((weak)) void sched_races_release(const volatile void *word);
__attribute__((weak)) void sched_races_free(const void *block, size_t size, void *caller);
extern char *const sched_memory;
extern const size_t sched_memory_size;
void sched_access_check(const volatile void *word, const char *op, const char *file, int line);
int sched_thread_or_none(void);
const char *sched_program(void);

/* == state ======================================================== */

enum {
    SCHED_STEPS = 20000,   /* in one schedule */
    SCHED_ARENA = 1 << 20, /* bytes of blocks for each thread */
    SCHED_STACK = 256 << 10,
    SCHED_WORDS = 1 << 14, /* in the table of shared words */
    SCHED_UNFAIR = 3       /* a spinning thread lets each other one run after so many turns */
};
#define SCHED_BASE ((char *)0x200000000000) /* arenas, then stacks */
#define SCHED_NEVER INT64_MAX

typedef enum {
    SCHED_ABSENT,
    SCHED_READY,
    SCHED_RELAX,
    SCHED_BLOCK,
    SCHED_SLEEP,
    SCHED_JOIN,
    SCHED_BODIES,
    SCHED_DONE
} sched_state_t;

typedef struct {
    const char *op, *file;
    int line;
    const volatile void *word;
} sched_place_t;

typedef struct {
    const char *name;
    void (*run)(void);   /* a scenario's thread, ... */
    void *(*fn)(void *); /* ... or the library's */
    void *arg;
    uint32_t turn; /* the futex on which its real thread waits for the baton */
    sched_state_t state;
    sched_place_t at;        /* where it stands: the step it takes next */
    uintptr_t sp;            /* its stack below this is not in use */
    volatile uint32_t *word; /* SCHED_BLOCK: until *word != is */
    uint32_t is;
    const volatile void *asleep_on; /* SCHED_SLEEP */
    int64_t until;
    uint64_t since;                /* when it fell asleep: the first is woken first */
    int joins;                     /* SCHED_JOIN */
    uint64_t priority;             /* pct */
    unsigned turns[SCHED_THREADS]; /* its turns of spinning since that thread ran */
    char *used;                    /* the end of its blocks */
} sched_thread_t;

typedef struct {
    uint64_t size;
    uint64_t live; /* SCHED_LIVE or SCHED_FREED */
} sched_block_t;
enum { SCHED_LIVE = 0x11fe, SCHED_FREED = 0xdead };

typedef struct {
    uint8_t thread, timed_out;
    sched_place_t place;
} sched_step_t;

typedef struct {
    uint8_t chosen, count;
} sched_choice_t;

typedef struct {
    int thread;
    bool timed_out;
    int cost;
} sched_option_t;

typedef enum { SCHED_DFS, SCHED_PCT, SCHED_RANDOM, SCHED_REPLAY } sched_strategy_t;
static const char *const sched_strategies[] = {"dfs", "pct", "random", "replay"};

/* All that must outlive the restoring of static data. */
static struct sched {
    /* options */
    sched_strategy_t strategy;
    int bound;
    double seconds;
    uint64_t schedules_max, seed;
    bool full, quiet, trace, list;
    const char *program;
    void (*enter)(void), (*leave)(void); /* the library's, for the calling thread */

    const sched_scenario_t *scenario;
    sched_thread_t threads[SCHED_THREADS];
    int count; /* of threads in use */
    int current;
    bool exploring; /* false in setup and check: there the running thread continues */
    int64_t clock;
    uint64_t sleeps;
    unsigned alone;    /* turns of a thread that spins while nothing else can run */
    unsigned relaxing; /* threads in SCHED_RELAX */
    uint64_t moves;    /* for the watchdog */

    sched_step_t steps[SCHED_STEPS]; /* of this schedule */
    unsigned step_count;
    sched_choice_t choices[SCHED_STEPS]; /* dfs: of the next schedule, as far as `depth_max` */
    unsigned depth, depth_max;
    int bound_now, spent;
    sched_step_t replay[SCHED_STEPS];
    unsigned replay_count;
    uint64_t random;
    unsigned change_points[8], length; /* pct; the length of the longest schedule */

    struct {
        uintptr_t word;
        uint32_t threads; /* that have used it */
        bool branch;      /* it was shared when this pass began */
    } words[SCHED_WORDS];
    bool grew; /* a word was newly found to be shared */
    unsigned shared;

    uint64_t schedules, longest;
    double began;
    char *snapshot;
} * S;

static __thread sched_thread_t *sched_self; /* NULL outside of schedules */

extern char __data_start[], _end[];

size_t sched_malloc_most = SIZE_MAX;
int sched_starts_fail;
char *const sched_memory = SCHED_BASE;
const size_t sched_memory_size = (size_t)SCHED_THREADS * (SCHED_ARENA + SCHED_STACK);
int sched_thread_or_none(void) { return sched_self ? (int)(sched_self - S->threads) : -1; }
const char *sched_program(void) { return S->program; }
int sched_thread(void) { return (int)(sched_self - S->threads); }

static double sched_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t sched_random(void) { /* splitmix64 */
    uint64_t z = S->random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* == reports ====================================================== */

static const char *sched_file(const char *file) {
    const char *slash = file ? strrchr(file, '/') : NULL;
    return slash ? slash + 1 : file ? file : "-";
}

static void sched_print_place(const sched_place_t *at) {
    printf("%s", at->op ? at->op : "start");
    if (at->file) printf(" at %s:%d", sched_file(at->file), at->line);
}

static void sched_print_threads(void) {
    static const char *const states[] = {
        "not started", "can run", "spins", "waits for a lock", "sleeps", "joins", "waits for the others", "has ended"};
    int i;
    printf("  threads:\n");
    for (i = 0; i < S->count; i++) {
        const sched_thread_t *t = &S->threads[i];
        printf("    %d %-18s %s", i, t->name, states[t->state]);
        if (t->state != SCHED_DONE && t->state != SCHED_BODIES) {
            printf(", next: ");
            sched_print_place(&t->at);
            if (t->state == SCHED_SLEEP && t->until != SCHED_NEVER) printf(" with a time-out");
        }
        printf("\n");
    }
}

/* One line for each spell of a thread; with --trace one for each step. */
static void sched_print_path(void) {
    unsigned i, n;
    printf("  path:\n");
    for (i = 0; i < S->step_count; i += n) {
        const sched_step_t *first = &S->steps[i], *last = first;
        for (n = 1; i + n < S->step_count && !S->trace; n++) {
            if (S->steps[i + n].thread != first->thread || S->steps[i + n].timed_out) break;
            last = &S->steps[i + n];
        }
        printf("    %d %-18s %s%u step%s, ", first->thread, S->threads[first->thread].name,
               first->timed_out ? "times out, " : "", n, n > 1 ? "s" : "");
        sched_print_place(&first->place);
        if (n > 1) {
            printf(" to ");
            sched_print_place(&last->place);
        }
        printf("\n");
    }
}

static void sched_print_replay(void) {
    unsigned i, n;
    printf("  replay: CTX_SCHED=");
    for (i = 0; i < S->step_count; i += n) {
        const sched_step_t *first = &S->steps[i];
        for (n = 1; i + n < S->step_count; n++)
            if (S->steps[i + n].thread != first->thread || S->steps[i + n].timed_out) break;
        printf("%s%s%dx%u", i ? "," : "", first->timed_out ? "t" : "", first->thread, n);
    }
    printf(" %s '%s'\n", S->program, S->scenario->name);
}

/* Print everything and end the process of this scenario. */
void sched_fail(const char *file, int line, const char *format, ...) {
    static bool failing;
    va_list args;
    if (failing) _exit(1);
    failing = true;
    printf("%s: FAILED after %" PRIu64 " schedules, %.1f s (%s", S->scenario->name, S->schedules + 1,
           sched_seconds() - S->began, sched_strategies[S->strategy]);
    if (S->strategy == SCHED_DFS)
        printf(", bound %d", S->bound_now);
    else
        printf(", seed %" PRIu64, S->seed);
    printf("): ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    if (file) printf(" (%s:%d)", sched_file(file), line);
    if (sched_self) printf(" in thread %d %s", (int)(sched_self - S->threads), sched_self->name);
    printf("\n");
    sched_print_threads();
    sched_print_path();
    sched_print_replay();
    fflush(stdout);
    _exit(1);
}

/* == blocks ======================================================= */

static char *sched_arena(int thread) { return SCHED_BASE + (size_t)thread * SCHED_ARENA; }

void *sched_malloc(size_t size) {
    sched_thread_t *me = sched_self ? sched_self : &S->threads[0];
    sched_block_t *block = (sched_block_t *)(void *)me->used;
    size_t room = (size + 15) / 16 * 16;
    if (me->used + sizeof *block + room > sched_arena((int)(me - S->threads)) + SCHED_ARENA)
        sched_fail(NULL, 0, "the arena is too small");
    me->used += sizeof *block + room;
    block->size = room;
    block->live = SCHED_LIVE;
    memset(block + 1, 0xa5, room);
    return block + 1;
}

void sched_free(void *memory) {
    sched_block_t *block = (sched_block_t *)memory - 1;
    if (!memory) return;
    ctx__sched_step("free", memory, NULL, 0);
    if (block->live != SCHED_LIVE) sched_fail(NULL, 0, "freed twice, or never allocated");
    if (sched_races_free) sched_races_free(memory, block->size, __builtin_return_address(0));
    block->live = SCHED_FREED;
    memset(memory, 0xdd, block->size);
}

void *sched_malloc_limited(size_t size) { return size > sched_malloc_most ? NULL : sched_malloc(size); }

void *sched_realloc(void *old, size_t size) {
    void *grown = sched_malloc(size);
    if (old) {
        size_t before = ((sched_block_t *)old - 1)->size;
        memcpy(grown, old, before < size ? before : size);
        sched_free(old);
    }
    return grown;
}

/* The block around a word of the arenas, or NULL. */
static const sched_block_t *sched_block_of(uintptr_t word, int thread) {
    const char *at = sched_arena(thread);
    while (at < S->threads[thread].used) {
        const sched_block_t *block = (const sched_block_t *)(const void *)at;
        const char *next = (const char *)(block + 1) + block->size;
        if (word < (uintptr_t)next) return block;
        at = next;
    }
    return NULL;
}

static void sched_blocks_check(void) {
    int i;
    for (i = 0; i < SCHED_THREADS; i++) {
        char *at = sched_arena(i);
        while (at < S->threads[i].used) {
            sched_block_t *block = (sched_block_t *)(void *)at;
            const unsigned char *byte = (const unsigned char *)(block + 1), *end = byte + block->size;
            if (block->live == SCHED_LIVE)
                sched_fail(NULL, 0, "leak: a block of %d bytes, allocated by thread %d", (int)block->size, i);
            for (; byte < end; byte++)
                if (*byte != 0xdd)
                    sched_fail(NULL, 0, "byte %d of a freed block of %d was written to",
                               (int)(byte - (unsigned char *)(block + 1)), (int)block->size);
            at = (char *)(block + 1) + block->size;
        }
    }
}

/* An access that is about to happen: is the memory still somebody's? */
void sched_access_check(const volatile void *word, const char *op, const char *file, int line) {
    uintptr_t at = (uintptr_t)word, arenas = (uintptr_t)SCHED_BASE,
              stacks = arenas + (uintptr_t)SCHED_THREADS * SCHED_ARENA;
    if (at < arenas || at >= stacks + (uintptr_t)SCHED_THREADS * SCHED_STACK) return;
    if (at < stacks) {
        const sched_block_t *block = sched_block_of(at, (int)((at - arenas) / SCHED_ARENA));
        if (!block || block->live != SCHED_LIVE) sched_fail(file, line, "%s: freed memory", op);
    } else {
        sched_thread_t *owner = &S->threads[(at - stacks) / SCHED_STACK];
        if (owner != sched_self && at < owner->sp)
            sched_fail(file, line, "%s: memory on a stack that thread %d has left", op, (int)(owner - S->threads));
    }
}

/* == the choice =================================================== */

static bool sched_bodies_done(void) {
    int i;
    for (i = 1; i < S->count; i++)
        if (S->threads[i].run && S->threads[i].state != SCHED_DONE) return false;
    return true;
}

static bool sched_can_run(const sched_thread_t *t) {
    switch (t->state) {
        case SCHED_READY: return true;
        case SCHED_BLOCK: return *t->word != t->is;
        case SCHED_JOIN: return S->threads[t->joins].state == SCHED_DONE;
        case SCHED_BODIES: return sched_bodies_done();
        default: return false;
    }
}

/* Has it spun on and on while another that can run was passed over? */
static bool sched_unfair(const sched_thread_t *t) {
    int i;
    for (i = 0; i < S->count; i++)
        if (t->turns[i] >= SCHED_UNFAIR && t != &S->threads[i] && sched_can_run(&S->threads[i])) return true;
    return false;
}

/* Who may take the next step. The first option is to continue the running thread if it can. `branch`: list more than
   one. */
static int sched_options(sched_option_t *options, bool branch) {
    int i, n = 0, current = S->current;
    bool stays = sched_can_run(&S->threads[current]) && !sched_unfair(&S->threads[current]);
    if (S->threads[0].state == SCHED_BODIES && sched_bodies_done()) {
        options[0] = (sched_option_t){0, false, 0};
        return 1;
    }
    if (stays) options[n++] = (sched_option_t){current, false, 0};
    if (stays && !branch) return n;
    for (i = 0; i < S->count; i++)
        if (i != current && sched_can_run(&S->threads[i]) && !sched_unfair(&S->threads[i]))
            options[n++] = (sched_option_t){i, false, stays};
    for (i = 0; i < S->count; i++)
        if (S->threads[i].state == SCHED_SLEEP && S->threads[i].until != SCHED_NEVER)
            options[n++] = (sched_option_t){i, true, 0};
    if (n && !options[0].timed_out) {
        for (i = 0; i < n; i++)
            if (options[i].timed_out) options[i].cost = 1;
    }
    if (n) return n;
    /* Nothing but threads that spin, perhaps until a time: let one, and let time pass. */
    for (i = 0; i < S->count; i++)
        if (S->threads[i].state == SCHED_RELAX) options[n++] = (sched_option_t){i, false, 0};
    if (n) {
        S->clock += 1000000;
        if (++S->alone > 1000) sched_fail(NULL, 0, "livelock: every thread that is left spins");
    }
    return n;
}

/* Note who uses the word of a step. True if it was known to be shared when this pass began. */
static bool sched_shared(const volatile void *word, int thread) {
    uintptr_t key = (uintptr_t)word;
    unsigned i = (unsigned)(key * 0x9e3779b97f4a7c15u >> 50) & (SCHED_WORDS - 1);
    uint32_t bit = 1u << thread;
    while (S->words[i].word && S->words[i].word != key) i = (i + 1) & (SCHED_WORDS - 1);
    if (!S->words[i].word) S->words[i].word = key;
    if (!(S->words[i].threads & bit)) {
        if (S->words[i].threads && !(S->words[i].threads & (S->words[i].threads - 1))) {
            S->grew = true;
            if (++S->shared > SCHED_WORDS / 2) sched_fail(NULL, 0, "too many shared words");
        }
        S->words[i].threads |= bit;
    }
    return S->full || S->words[i].branch;
}

static int sched_choose_dfs(const sched_option_t *options, int n) {
    sched_choice_t *choice = &S->choices[S->depth];
    int i, m = 0, legal[2 * SCHED_THREADS];
    for (i = 0; i < n; i++)
        if (S->spent + options[i].cost <= S->bound_now) legal[m++] = i;
    if (m <= 1) return m ? legal[0] : 0;
    if (S->depth++ >= S->depth_max) {
        choice->chosen = 0;
        choice->count = (uint8_t)m;
        S->depth_max = S->depth;
    }
    if (choice->count != m) sched_fail(NULL, 0, "nondeterministic: %d choices here, %d before", m, choice->count);
    S->spent += options[legal[choice->chosen]].cost;
    return legal[choice->chosen];
}

static int sched_choose_pct(const sched_option_t *options, int n) {
    int i, best = 0;
    for (i = 0; i < 3; i++)
        if (S->step_count == S->change_points[i]) S->threads[S->current].priority = (uint64_t)(3 - i);
    for (i = 1; i < n; i++) {
        if (options[i].timed_out && !options[0].timed_out) break;
        if (S->threads[options[i].thread].priority > S->threads[options[best].thread].priority) best = i;
    }
    if (i < n && sched_random() % 64 == 0) return i + (int)(sched_random() % (uint64_t)(n - i));
    return best;
}

static int sched_choose_replay(const sched_option_t *options, int n) {
    int i;
    if (S->step_count >= S->replay_count) return 0;
    for (i = 0; i < n; i++)
        if (options[i].thread == S->replay[S->step_count].thread &&
            options[i].timed_out == S->replay[S->step_count].timed_out)
            return i;
    sched_fail(NULL, 0, "%s at step %u", S->replay[0].place.op ? "nondeterministic" : "the replay string does not fit",
               S->step_count);
}

static int sched_choose(const sched_option_t *options, int n) {
    switch (S->strategy) {
        case SCHED_DFS: return sched_choose_dfs(options, n);
        case SCHED_PCT: return sched_choose_pct(options, n);
        case SCHED_RANDOM: return (int)(sched_random() % (uint64_t)n);
        default: return sched_choose_replay(options, n);
    }
}

/* Choose who takes the next step, and note it. */
static int sched_pick(bool may_branch) {
    sched_option_t options[2 * SCHED_THREADS + 1];
    bool branch = S->strategy != SCHED_DFS || (may_branch && S->spent < S->bound_now);
    int n = sched_options(options, branch && S->exploring), chosen = 0, i;
    sched_thread_t *t;
    if (!n) sched_fail(NULL, 0, "deadlock: no thread can run");
    if (S->exploring && (n > 1 || S->strategy == SCHED_REPLAY || S->strategy == SCHED_PCT))
        chosen = sched_choose(options, n);
    t = &S->threads[options[chosen].thread];
    if (S->exploring) {
        if (S->step_count == SCHED_STEPS) sched_fail(NULL, 0, "livelock: %d steps and no end", SCHED_STEPS);
        S->steps[S->step_count++] = (sched_step_t){(uint8_t)options[chosen].thread, options[chosen].timed_out, t->at};
    }
    if (options[chosen].timed_out && S->clock < t->until) S->clock = t->until;
    if (options[chosen].thread != S->current) {
        S->alone = 0;
        for (i = 0; i < S->count; i++) S->threads[i].turns[options[chosen].thread] = 0;
    }
    if (t->state == SCHED_RELAX) S->relaxing--;
    t->state = SCHED_READY;
    return options[chosen].thread;
}

/* == the baton ==================================================== */

static void sched_baton_pass(int to) {
    S->current = to;
    __atomic_store_n(&S->threads[to].turn, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &S->threads[to].turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void sched_baton_wait(sched_thread_t *me) {
    while (!__atomic_load_n(&me->turn, __ATOMIC_ACQUIRE))
        syscall(SYS_futex, &me->turn, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    me->turn = 0;
}

/* A point of the running thread, which is in `state` from here on: returns when it is chosen again. */
static __attribute__((noinline)) void sched_point(sched_state_t state, bool may_branch) {
    sched_thread_t *me = sched_self;
    int next, i;
    if (S->relaxing) {
        for (i = 0; i < S->count; i++)
            if (S->threads[i].state == SCHED_RELAX && &S->threads[i] != me) S->threads[i].state = SCHED_READY;
        S->relaxing = 0;
    }
    if (state == SCHED_RELAX) {
        S->relaxing++;
        for (i = 0; i < S->count; i++) me->turns[i]++;
    }
    me->state = state;
    me->sp = (uintptr_t)__builtin_frame_address(0);
    S->moves++;
    next = sched_pick(may_branch);
    if (next == S->current) return;
    sched_baton_pass(next);
    sched_baton_wait(me);
}

static void sched_place(const char *op, const volatile void *word, const char *file, int line) {
    sched_self->at = (sched_place_t){op, file, line, word};
}

/* == what the header calls ======================================== */

void ctx__sched_step(const char *op, const volatile void *word, const char *file, int line) {
    if (!sched_self) return;
    if (S->exploring) {
        sched_place(op, word, file, line);
        sched_point(SCHED_READY, sched_shared(word, S->current));
    }
    sched_access_check(word, op, file, line);
}

/* The macros do not pass the place here; the step before tells it well enough. */
void ctx__sched_relax(void) {
    if (!sched_self) return;
    sched_self->at.op = "relax";
    sched_point(SCHED_RELAX, true);
}

void ctx__sched_block(uint32_t *word, uint32_t is) {
    if (!sched_self) return;
    sched_self->at.op = "lock";
    sched_self->word = word;
    sched_self->is = is;
    if (*sched_self->word == is) sched_point(SCHED_BLOCK, true);
}

static void sched_sleep(const volatile void *word, int64_t until) {
    sched_self->asleep_on = word;
    sched_self->until = until;
    sched_self->since = S->sleeps++;
    sched_self->at.op = "sleep";
    sched_point(SCHED_SLEEP, true);
    sched_self->asleep_on = NULL;
}

void ctx__sched_sleep(uint32_t *word, uint32_t expected, int64_t until) {
    if (!sched_self) return;
    ctx__sched_step("to sleep", word, sched_self->at.file, sched_self->at.line);
    if (*(volatile uint32_t *)word == expected) sched_sleep(word, until);
}

static void sched_wake(const volatile void *word, int n) {
    while (n-- > 0) {
        sched_thread_t *first = NULL;
        int i;
        for (i = 0; i < S->count; i++) {
            sched_thread_t *t = &S->threads[i];
            if (t->state == SCHED_SLEEP && t->asleep_on == word && (!first || t->since < first->since)) first = t;
        }
        if (!first) return;
        first->state = SCHED_READY;
    }
}

/* Not an access: the memory may be gone. */
void ctx__sched_wake(uint32_t *word, int n) {
    if (!sched_self) return;
    if (S->exploring) {
        sched_place("wake", word, sched_self->at.file, sched_self->at.line);
        sched_point(SCHED_READY, true);
    }
    sched_wake(word, n);
    if (!S->exploring) return;
    sched_place("woken", word, sched_self->at.file, sched_self->at.line); /* here who was woken may be faster */
    sched_point(SCHED_READY, true);
}

int64_t ctx__sched_now(void) { return S->clock += 1000; }

int ctx__sched_start(pthread_t *thread, void *(*fn)(void *), void *arg) {
    sched_thread_t *t;
    if (S->exploring) {
        sched_place("start a thread", &S->threads[S->count], __FILE__, __LINE__);
        sched_point(SCHED_READY, true); /* where another thread may start one, too */
    }
    if (sched_starts_fail) {
        sched_starts_fail--;
        return EAGAIN;
    }
    if (S->count == SCHED_THREADS) sched_fail(NULL, 0, "too many threads");
    t = &S->threads[S->count];
    t->name = "library";
    t->run = NULL;
    t->fn = fn;
    t->arg = arg;
    t->state = SCHED_READY;
    if (sched_races_edge) sched_races_edge(S->current, S->count);
    *thread = (pthread_t)S->count++;
    return 0;
}

int ctx__sched_join(pthread_t thread) {
    sched_self->joins = (int)thread;
    sched_self->at.op = "join";
    if (S->threads[thread].state != SCHED_DONE) sched_point(SCHED_JOIN, true);
    if (sched_races_edge) sched_races_edge((int)thread, S->current);
    return 0;
}

/* Mutexes and condition variables of the system: the first word of a mutex is 1 while it is locked. */
int sched_mutex_lock(pthread_mutex_t *mutex) {
    uint32_t *word = (uint32_t *)(void *)mutex;
    ctx__sched_step("mutex lock", mutex, sched_self->at.file, sched_self->at.line);
    while (*(volatile uint32_t *)word) ctx__sched_block(word, 1);
    *(volatile uint32_t *)word = 1;
    if (sched_races_acquire) sched_races_acquire(mutex);
    return 0;
}

int sched_mutex_trylock(pthread_mutex_t *mutex) {
    volatile uint32_t *word = (uint32_t *)(void *)mutex;
    ctx__sched_step("mutex trylock", mutex, sched_self->at.file, sched_self->at.line);
    if (*word) return EBUSY;
    *word = 1;
    if (sched_races_acquire) sched_races_acquire(mutex);
    return 0;
}

int sched_mutex_unlock(pthread_mutex_t *mutex) {
    ctx__sched_step("mutex unlock", mutex, sched_self->at.file, sched_self->at.line);
    if (sched_races_release) sched_races_release(mutex);
    *(volatile uint32_t *)(void *)mutex = 0;
    return 0;
}

int sched_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex) {
    ctx__sched_step("cond wait", cond, sched_self->at.file, sched_self->at.line);
    if (sched_races_release) sched_races_release(mutex);
    *(volatile uint32_t *)(void *)mutex = 0;
    sched_sleep(cond, SCHED_NEVER);
    return sched_mutex_lock(mutex);
}

int sched_cond_wake(pthread_cond_t *cond, int n) {
    ctx__sched_step("cond wake", cond, sched_self->at.file, sched_self->at.line);
    sched_wake(cond, n);
    return 0;
}

/* == one schedule ================================================= */

static void sched_thread_leave(void) { S->leave(); }

/* Overwrite the stack that the thread has left, so that who still reads there finds nonsense. */
static __attribute__((noinline)) void sched_stack_spoil(void) {
    char spoil[8192];
    memset(spoil, 0xee, sizeof spoil);
    __asm__ volatile("" : : "r"(spoil) : "memory");
}

static void *sched_worker(void *arg) {
    sched_thread_t *me = (sched_thread_t *)arg;
    stack_t alternate = {.ss_sp = malloc(65536), .ss_size = 65536, .ss_flags = 0};
    sigaltstack(&alternate, NULL);
    sched_self = me;
    for (;;) {
        sched_baton_wait(me);
        if (me->run)
            me->run();
        else
            me->fn(me->arg);
        sched_thread_leave();
        sched_stack_spoil();
        me->at.op = "end";
        me->state = SCHED_DONE;
        me->sp = (uintptr_t)__builtin_frame_address(0);
        sched_baton_pass(sched_pick(true));
    }
    return NULL;
}

/* Page by page, since most have not changed. */
static void sched_restore(void) {
    char *at = (char *)((uintptr_t)__data_start & ~(uintptr_t)15), *end = _end, *from = S->snapshot;
    for (; at < end; at += 4096, from += 4096) {
        size_t n = end - at < 4096 ? (size_t)(end - at) : 4096;
        if (memcmp(at, from, n)) memcpy(at, from, n);
    }
}

static void sched_run(void) {
    const sched_scenario_t *scenario = S->scenario;
    int i, j;
    sched_restore();
    S->step_count = S->depth = 0;
    S->spent = 0;
    S->clock = INT64_C(1000000000000);
    S->sleeps = 0;
    S->alone = S->relaxing = 0;
    S->current = 0;
    S->exploring = false;
    S->count = 1;
    S->leave(); /* thread 0: it has entered before the first schedule */
    for (i = 0; i < SCHED_THREADS; i++) {
        sched_thread_t *t = &S->threads[i];
        t->used = sched_arena(i);
        t->state = i ? SCHED_ABSENT : SCHED_READY;
        t->at = (sched_place_t){"start", NULL, 0, NULL};
        t->asleep_on = NULL;
        t->sp = 0;
        if (S->strategy == SCHED_PCT) t->priority = 4 + sched_random() % 1000000;
        memset(t->turns, 0, sizeof t->turns);
    }
    if (S->strategy == SCHED_PCT)
        for (i = 0; i < 3; i++) S->change_points[i] = (unsigned)(sched_random() % (S->length ? S->length : 100));
    S->threads[0].name = "main";
    if (sched_races_begin) sched_races_begin();
    if (scenario->setup) scenario->setup();
    /* Threads that setup started through the library come first: the bodies get the numbers after them. */
    for (j = 0; j < 4 && scenario->threads[j].run; j++) {
        sched_thread_t *t = &S->threads[S->count++];
        t->name = scenario->threads[j].name;
        t->run = scenario->threads[j].run;
        t->state = SCHED_READY;
        if (sched_races_edge) sched_races_edge(0, S->count - 1);
    }
    S->exploring = true;
    sched_point(SCHED_BODIES, true);
    S->exploring = false;
    for (i = 1; i < S->count && sched_races_edge; i++)
        if (S->threads[i].run) sched_races_edge(i, 0);
    if (scenario->check) scenario->check();
    sched_thread_leave();
    for (i = 1; i < S->count; i++)
        if (S->threads[i].state != SCHED_DONE) sched_fail(NULL, 0, "thread %d is alive at the end", i);
    sched_blocks_check();
    if (S->step_count > S->length) S->length = S->step_count;
}

static uint64_t sched_hash(void) {
    uint64_t hash = 14695981039346656037u;
    unsigned i;
    for (i = 0; i < S->step_count; i++) {
        const sched_step_t *step = &S->steps[i];
        hash = (hash ^ step->thread) * 1099511628211u;
        hash = (hash ^ (uintptr_t)step->place.op) * 1099511628211u;
        hash = (hash ^ (uint64_t)step->place.line) * 1099511628211u;
    }
    return hash;
}

/* Run the schedule that has just run once more. */
static void sched_run_twice(void) {
    sched_strategy_t strategy = S->strategy;
    uint64_t hash = sched_hash();
    memcpy(S->replay, S->steps, S->step_count * sizeof *S->steps);
    S->replay_count = S->step_count;
    S->strategy = SCHED_REPLAY;
    sched_run();
    S->strategy = strategy;
    if (sched_hash() != hash) sched_fail(NULL, 0, "nondeterministic: the same schedule, other steps");
}

/* Run and count. False when time is up. */
static bool sched_run_next(void) {
    if (S->schedules % 16 == 0 && sched_seconds() - S->began > S->seconds) return false;
    sched_run();
    if (++S->schedules % 100 == 0) sched_run_twice();
    return true;
}

/* The next schedule in depth-first order: false if there is none. */
static bool sched_dfs_next(void) {
    while (S->depth_max > 0) {
        sched_choice_t *choice = &S->choices[S->depth_max - 1];
        if (++choice->chosen < choice->count) return true;
        S->depth_max--;
    }
    return false;
}

static void sched_pass_begin(void) {
    unsigned i;
    for (i = 0; i < SCHED_WORDS; i++) S->words[i].branch = (S->words[i].threads & (S->words[i].threads - 1)) != 0;
    S->grew = false;
    S->depth_max = 0;
}

static bool sched_dfs(void) {
    for (S->bound_now = 0; S->bound_now <= S->bound; S->bound_now++) {
        do {
            sched_pass_begin();
            do {
                if (!sched_run_next()) return false;
            } while ((!S->grew || S->full) && sched_dfs_next());
        } while (S->grew && !S->full);
    }
    return true;
}

static void sched_replay_parse(const char *at) {
    S->replay_count = 0;
    while (*at) {
        bool timed_out = *at == 't';
        char *end;
        long thread = strtol(at + timed_out, &end, 10), n = *end == 'x' ? strtol(end + 1, &end, 10) : 0;
        while (n-- > 0 && S->replay_count < SCHED_STEPS) {
            S->replay[S->replay_count++] = (sched_step_t){(uint8_t)thread, timed_out, {NULL, NULL, 0, NULL}};
            timed_out = false;
        }
        at = *end == ',' ? end + 1 : "";
    }
}

/* == one scenario ================================================= */

static void sched_on_signal(int signal) { sched_fail(NULL, 0, "signal %d, %s", signal, strsignal(signal)); }

static void sched_on_alarm(int signal) {
    static uint64_t before = UINT64_MAX;
    (void)signal;
    if (S->moves == before) sched_fail(NULL, 0, "stuck in a call that the explorer does not see");
    before = S->moves;
}

static void sched_start_worker(int i, void *(*fn)(void *), pthread_t *thread) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstack(&attr, SCHED_BASE + (size_t)SCHED_THREADS * SCHED_ARENA + (size_t)i * SCHED_STACK,
                          SCHED_STACK);
    if (pthread_create(thread, &attr, fn, &S->threads[i])) perror("pthread_create"), _exit(2);
    pthread_attr_destroy(&attr);
}

static void *sched_scenario(void *arg) {
    const char *replay = getenv("CTX_SCHED");
    size_t size = (size_t)((uintptr_t)_end - ((uintptr_t)__data_start & ~(uintptr_t)15));
    pthread_t thread;
    stack_t alternate = {.ss_sp = malloc(65536), .ss_size = 65536, .ss_flags = 0};
    bool all = true;
    int i;
    (void)arg;
    sigaltstack(&alternate, NULL);
    for (i = 1; i < SCHED_THREADS; i++) sched_start_worker(i, sched_worker, &thread);
    S->random = S->seed;
    if (S->scenario->long_run) {
        S->strategy = SCHED_RANDOM;
        S->schedules_max = 200;
    }
    S->began = sched_seconds();
    for (i = 0; i < SCHED_THREADS; i++) S->threads[i].used = sched_arena(i);
    sched_self = &S->threads[0];
    S->count = 1;
    if (sched_races_begin) sched_races_begin(); /* before the snapshot: it allocates */
    S->enter();                                 /* what is set up once */
    S->leave();
    S->snapshot = (char *)malloc(size);
    memcpy(S->snapshot, (char *)((uintptr_t)__data_start & ~(uintptr_t)15), size);
    if (replay) {
        S->trace = true;
        S->strategy = SCHED_REPLAY;
        sched_replay_parse(replay);
        sched_run();
        sched_print_path();
    } else if (S->strategy == SCHED_DFS) {
        all = sched_dfs();
    } else {
        while (S->schedules < S->schedules_max && sched_run_next()) {
        }
    }
    if (!S->quiet) {
        printf("%s: %" PRIu64 " schedules, ", S->scenario->name, S->schedules);
        if (S->strategy != SCHED_DFS)
            printf("%s, seed %" PRIu64, sched_strategies[S->strategy], S->seed);
        else if (all)
            printf("bound %d, all", S->bound);
        else
            printf("bound %d cut by time", S->bound_now);
        printf(" (%u steps at most, %u shared words, %.1f s)\n", S->length, S->shared, sched_seconds() - S->began);
    }
    fflush(stdout);
    _exit(0);
}

/* In a process of its own. True: passed. */
static bool sched_scenario_run(const sched_scenario_t *scenario) {
    int status;
    pid_t child;
    S->scenario = scenario;
    fflush(stdout);
    child = fork();
    if (child == 0) {
        struct sigaction action;
        struct itimerval every = {{20, 0}, {20, 0}};
        pthread_t thread;
        memset(&action, 0, sizeof action);
        action.sa_handler = sched_on_signal;
        action.sa_flags = SA_ONSTACK;
        sigaction(SIGSEGV, &action, NULL);
        sigaction(SIGBUS, &action, NULL);
        sigaction(SIGFPE, &action, NULL);
        sigaction(SIGILL, &action, NULL);
        action.sa_handler = sched_on_alarm;
        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &every, NULL);
        sched_start_worker(0, sched_scenario, &thread);
        pthread_join(thread, NULL);
        _exit(2);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0) perror("fork"), exit(2);
    if (!WIFEXITED(status)) printf("%s: FAILED: signal %d\n", scenario->name, WTERMSIG(status));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static int sched_usage(void) {
    fprintf(stderr,
            "usage: %s [--strategy dfs|pct|random] [--bound N] [--time SECONDS] [--schedules N] [--seed N]\n"
            "       [--full] [--trace] [--quiet] [--list] [NAME...]   runs the scenarios whose name contains a NAME\n",
            S->program);
    return 2;
}

int sched_main(int argc, char **argv, const sched_scenario_t *scenarios, size_t n, void (*enter)(void),
               void (*leave)(void)) {
    int i, names = argc, passed = 0, failed = 0;
    size_t k;
    cpu_set_t cpus;
    S = (struct sched *)mmap(NULL, sizeof *S, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (S == MAP_FAILED || mmap(SCHED_BASE, (size_t)SCHED_THREADS * (SCHED_ARENA + SCHED_STACK), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != SCHED_BASE)
        return perror("mmap"), 2;
    S->program = argv[0];
    S->enter = enter;
    S->leave = leave;
    S->bound = 2;
    S->seconds = 60;
    S->schedules_max = 10000;
    S->seed = 1;
    for (i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (argv[i][0] != '-') {
            names = i;
            break;
        }
        if (!strcmp(argv[i], "--quiet"))
            S->quiet = true;
        else if (!strcmp(argv[i], "--full"))
            S->full = true;
        else if (!strcmp(argv[i], "--trace"))
            S->trace = true;
        else if (!strcmp(argv[i], "--list"))
            S->list = true;
        else if (!strcmp(argv[i], "--bound"))
            S->bound = atoi(value), i++;
        else if (!strcmp(argv[i], "--time"))
            S->seconds = atof(value), i++;
        else if (!strcmp(argv[i], "--schedules"))
            S->schedules_max = strtoull(value, NULL, 10), i++;
        else if (!strcmp(argv[i], "--seed"))
            S->seed = strtoull(value, NULL, 10), i++;
        else if (!strcmp(argv[i], "--strategy") && !strcmp(value, "dfs"))
            S->strategy = SCHED_DFS, i++;
        else if (!strcmp(argv[i], "--strategy") && !strcmp(value, "pct"))
            S->strategy = SCHED_PCT, i++;
        else if (!strcmp(argv[i], "--strategy") && !strcmp(value, "random"))
            S->strategy = SCHED_RANDOM, i++;
        else
            return sched_usage();
    }
    CPU_ZERO(&cpus);
    CPU_SET((size_t)sched_getcpu(), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    for (k = 0; k < n; k++) {
        bool wanted = names == argc;
        for (i = names; i < argc; i++) wanted = wanted || strstr(scenarios[k].name, argv[i]);
        if (!wanted) continue;
        if (S->list)
            puts(scenarios[k].name);
        else if (sched_scenario_run(&scenarios[k]))
            passed++;
        else
            failed++;
    }
    if (!S->list) printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
