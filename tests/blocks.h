/* blocks.h: count the blocks that the library holds. Include it before ctxcancel.h, in one file of a program.

   Unlike fault.h it is made for races: its counter is relaxed, since a stronger one would order what the library must.
   In a program whose implementation is compiled elsewhere it counts nothing: blocks_counted() says so. */
#ifndef BLOCKS_H
#define BLOCKS_H

#ifdef CTXCANCEL_H
#error "include blocks.h before ctxcancel.h: it defines CTXCANCEL_MALLOC and the like"
#endif

#include "test.h"

static long blocks_now, blocks_ever;

static inline void *blocks_malloc(size_t size) {
    void *p = malloc(size);
    if (!p) return NULL;
    __atomic_fetch_add(&blocks_now, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&blocks_ever, 1, __ATOMIC_RELAXED);
    return p;
}

static inline void blocks_free(void *p) {
    if (p) __atomic_fetch_sub(&blocks_now, 1, __ATOMIC_RELAXED);
    free(p);
}

static inline void *blocks_realloc(void *old, size_t size) { return old ? realloc(old, size) : blocks_malloc(size); }

#define CTXCANCEL_MALLOC(size) blocks_malloc(size)
#define CTXCANCEL_REALLOC(old, size) blocks_realloc((old), (size))
#define CTXCANCEL_FREE(p) blocks_free(p)

static inline long blocks_live(void) { return __atomic_load_n(&blocks_now, __ATOMIC_RELAXED); }
static inline bool blocks_counted(void) { return __atomic_load_n(&blocks_ever, __ATOMIC_RELAXED) > 0; }

#endif /* BLOCKS_H */
