/* race.h: several threads in the same race, round after round. Include it after ctxcancel.h and test.h.

   start_line() and the flags of gates.h order memory, so a test may hand plain data across them; inside a race, where
   it is the library that must order memory, use nothing of these files but race_random() and race_dither(). */
#ifndef RACE_H
#define RACE_H

#include "gates.h"

static inline uint64_t race_random(uint64_t *seed) {
    uint64_t x = (*seed += UINT64_C(0x9e3779b97f4a7c15));
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static inline int race_below(uint64_t *seed, int n) { return (int)(race_random(seed) % (uint64_t)n); }

/* From nothing to a few microseconds, short ones more often, to shift one side of a race against the other. */
static inline void race_dither(uint64_t random) { spin((unsigned)((random >> 8) % (UINT64_C(1) << random % 12))); }

/* For the body of a loop that polls: give the processor away from time to time. */
static inline void race_pause(int *turns) {
    if (++*turns % 128 == 0) sched_yield();
}

/* Wait until `flag` is `value` or more. */
static inline void race_await(const int *flag, int value) {
    int turns = 0;
    while (load(flag) < value) race_pause(&turns);
}

enum { RACE_MOST = 16 };

/* What each of several threads running the same function gets. */
typedef struct {
    int id;
    void *shared;
} race_side_t;

/* Run fn(&side) on `n` threads, side.id from 0, and join them. */
static inline void race_run(int n, void *(*fn)(void *), void *shared) {
    pthread_t threads[RACE_MOST];
    race_side_t sides[RACE_MOST];
    for (int i = 0; i < n; i++) {
        sides[i].id = i;
        sides[i].shared = shared;
        threads[i] = thread_start(fn, &sides[i]);
    }
    for (int i = 0; i < n; i++) thread_join(threads[i]);
}

#endif /* RACE_H */
