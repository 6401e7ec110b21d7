/* count.h: count allocations. Include before ctxcancel.h, in programs built for counting only (-DBENCH_COUNT): their
   times are not used. */
#ifndef BENCH_COUNT_H
#define BENCH_COUNT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static uint64_t count_allocations, count_bytes;

static inline void *count_malloc(size_t size) {
    __atomic_add_fetch(&count_allocations, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&count_bytes, size, __ATOMIC_RELAXED);
    return malloc(size);
}

static inline void *count_realloc(void *old, size_t size) {
    __atomic_add_fetch(&count_allocations, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&count_bytes, size, __ATOMIC_RELAXED);
    return realloc(old, size);
}

static inline uint64_t count_allocations_now(void) { return __atomic_load_n(&count_allocations, __ATOMIC_RELAXED); }
static inline uint64_t count_bytes_now(void) { return __atomic_load_n(&count_bytes, __ATOMIC_RELAXED); }

#define CTXCANCEL_MALLOC count_malloc
#define CTXCANCEL_REALLOC count_realloc
#define CTXCANCEL_FREE free

#endif /* BENCH_COUNT_H */
