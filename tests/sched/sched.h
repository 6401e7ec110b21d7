/* sched.h: run the real code of ctxcancel.h under every schedule up to a bound.

   A scenario is a setup, two to four threads and a check. The explorer runs it again and again, each time with another
   schedule: real threads of which exactly one runs at a time. With CTXCANCEL_TEST_SCHED the header calls the explorer
   before each atomic access, and instead of the system to sleep, wake, read the clock, start and join threads. Each of
   these calls is a point at which another thread may be chosen.

       #include "sched.h"                     // includes HDR (default: "ctxcancel.h") with its implementation

       static ctx_t *top;
       static void setup(void) { top = ctx_with_cancel(ctx_background()); }
       static void cancel(void) { ctx_cancel(top); SCHED_CHECK(ctx_err(top)); }
       static void check(void) { ctx_end(top); }
       static const sched_scenario_t scenarios[] = {
           { "cancel twice", setup, { T(cancel), T(cancel) }, check, false },
       };
       SCHED_MAIN(scenarios)

   Strategies
     dfs     every schedule with at most `bound` preemptions, first all with 0, then with 1, and so on. To continue the
             running thread is free, and so is the choice of the next when it cannot run. To switch away from a thread
             that can run costs 1; so does a time-out that is chosen while some thread can run.
     pct     random priorities, lowered at a few random steps.
     random  any thread that can run, at each step.

   Failures: a failed SCHED_CHECK or CTXCANCEL_ASSERT; no thread can run (deadlock or lost wake-up); more than
   SCHED_STEPS steps (livelock); a signal such as SIGSEGV; a block not freed at the end; an atomic access to a freed
   block, or to a part of another thread's stack that this thread has left; a freed block that was written to; a thread
   still alive at the end. One schedule in a hundred runs twice and must take the same steps.

   Each failure prints the path, the place of each thread and a replay string: `CTX_SCHED=1x12,2x3 program scenario`
   runs that schedule again and lists each step. `1x12`: thread 1 takes twelve steps; `t2x5`: the wait of thread 2 times
   out, then it takes five.

   How it works. Setup and check run in thread 0 without a choice. Between schedules the static data of the program is
   copied back from a snapshot, and blocks come from an arena with fixed addresses, so each schedule begins in the same
   state: static variables of a scenario need no resetting. Therefore build with -no-pie. Each scenario runs in a
   process of its own.

   A preemption before an access to a word that only one thread ever uses is the same as one before its next access to a
   shared word. So the explorer learns which words are shared, preempts only there, and repeats a bound until no word
   was newly found to be shared.

   sched.c is the explorer, compiled once. races.c, linked to a scenario that was compiled with -fsanitize=thread, also
   finds data races in these schedules, by the memory orders that the code asks for: see there.

   Not seen: the reorderings that weak memory orders allow (races.c finds those that leave plain data unordered); an
   interleaving inside plain accesses without races.c; spurious wake-ups of a futex or condition variable; signals;
   system calls that fail; allocations and starts of threads that fail, unless the scenario sets sched_malloc_most or
   sched_starts_fail. */
#ifndef SCHED_H
#define SCHED_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the header is given instead of the C library. */
enum { SCHED_THREADS = 8 };
void *sched_malloc(size_t size);
void *sched_malloc_limited(size_t size);
void *sched_realloc(void *old, size_t size);
void sched_free(void *block);
int sched_mutex_lock(pthread_mutex_t *mutex);
int sched_mutex_trylock(pthread_mutex_t *mutex);
int sched_mutex_unlock(pthread_mutex_t *mutex);
int sched_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex);
int sched_cond_wake(pthread_cond_t *cond, int n);
void sched_fail(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4), noreturn));

#define SCHED_CHECK(x) ((x) ? (void)0 : sched_fail(__FILE__, __LINE__, "%s", #x))

#ifndef SCHED_ENGINE
#ifndef HDR
#define HDR "ctxcancel.h"
#endif
#ifndef SCHED_CPUS
#define SCHED_CPUS 1 /* as many as the library sees: few timing wheels and shards, so few steps */
#endif
#ifndef SCHED_KEEP_CACHE
#define CTX__ASAN 1 /* a freed node is freed, not kept by its thread: so a late access to it is seen */
#endif

#ifndef CTXCANCEL_TEST_SCHED
#define CTXCANCEL_TEST_SCHED
#endif
#define CTXCANCEL_IMPLEMENTATION
#define CTXCANCEL_STATIC
#define CTXCANCEL_MALLOC(size) sched_malloc_limited(size)
#define CTXCANCEL_REALLOC(old, size) sched_realloc((old), (size))
#define CTXCANCEL_FREE(block) sched_free(block)
#define CTXCANCEL_ASSERT(x) ((x) ? (void)0 : sched_fail(__FILE__, __LINE__, "assertion: %s", #x))
#define pthread_mutex_lock(mutex) sched_mutex_lock(mutex)
#define pthread_mutex_trylock(mutex) sched_mutex_trylock(mutex)
#define pthread_mutex_unlock(mutex) sched_mutex_unlock(mutex)
#define pthread_cond_wait(cond, mutex) sched_cond_wait((cond), (mutex))
#define pthread_cond_broadcast(cond) sched_cond_wake((cond), SCHED_THREADS)
#define pthread_cond_signal(cond) sched_cond_wake((cond), 1)
#ifndef pthread_detach /* a scenario may note who is left */
#define pthread_detach(thread) ((void)(thread))
#endif
#define sysconf(name) ((void)(name), (long)SCHED_CPUS)
#include HDR
#endif

/* == what a scenario uses ========================================= */

typedef struct {
    const char *name;
    void (*run)(void);
} sched_body_t;
#define T(fn) { #fn, fn }

typedef struct {
    const char *name;
    void (*setup)(void);
    sched_body_t threads[4]; /* 1 to 4 */
    void (*check)(void);
    bool long_run;           /* too long for depth first: 200 random schedules instead */
} sched_scenario_t;

extern size_t sched_malloc_most; /* larger blocks of the library's cannot be had (default: SIZE_MAX) */
extern int sched_starts_fail;    /* the next N threads that the library starts are unavailable (default: 0) */
int sched_thread(void);          /* the number of the calling thread: the first of a scenario is 1 */

/* A flag of the scenario that threads share: each use is a point to switch. */
typedef uint32_t sched_flag_t;
#define sched_set(flag) CTX__STORE((flag), 1u, SEQ_CST)
#define sched_is_set(flag) (CTX__LOAD((flag), SEQ_CST) != 0)
#define sched_await(flag)                                \
    do {                                                 \
        while (!sched_is_set(flag)) ctx__sched_relax(); \
    } while (0)

#ifndef SCHED_ENGINE
/* What the explorer does to the library in each thread: its first entry, and its end. */
static void sched_library_enter(void) { ctx__me(); }
static void sched_library_leave(void) {
    ctx__thread_leave(&ctx__self);
    memset(&ctx__self, 0, sizeof ctx__self);
}

#endif

int sched_main(int argc, char **argv, const sched_scenario_t *scenarios, size_t n, void (*enter)(void),
               void (*leave)(void));
#define SCHED_MAIN(scenarios)                                                                                     \
    int main(int argc, char **argv) {                                                                             \
        return sched_main(argc, argv, (scenarios), sizeof(scenarios) / sizeof *(scenarios), sched_library_enter,  \
                          sched_library_leave);                                                                   \
    }

#endif /* SCHED_H */
