/* fault.h: make the nth allocation or thread creation fail. Include it before ctxcancel.h, in one file of a program.

       #define FAULT_THREADS            // only if thread creation is to fail too
       #include "fault.h"
       #define CTXCANCEL_IMPLEMENTATION
       #include "ctxcancel.h"

       for (int n = 0;; n++) {
           fault_after(n);                               // n allocations succeed, the next one fails
           ... what is under test ...
           if (!fault_off()) break;                      // it needed no more than n allocations
       }
       EXPECT_EQ(fault_live(), 0);                       // after ctx_runtime_stop(): nothing leaked

   All of it may be used while threads run. */
#ifndef FAULT_H
#define FAULT_H

#ifdef CTXCANCEL_H
#error "include fault.h before ctxcancel.h: it defines CTXCANCEL_MALLOC and the like"
#endif

#if defined(__STRICT_ANSI__) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

/* A countdown: each call takes one; at zero and below calls fail, once or for good. */
typedef struct {
    long left;     /* [atomic] calls that still succeed, when armed */
    int mode;      /* [atomic] FAULT_NEVER, FAULT_ONCE or FAULT_ALWAYS */
    long injected; /* [atomic] failures since it was armed */
    long calls;    /* [atomic] calls since it was armed */
} fault_count_t;

enum { FAULT_NEVER, FAULT_ONCE, FAULT_ALWAYS };

static fault_count_t fault_memory;
static long fault_live_blocks;

static inline void fault_arm(fault_count_t *count, long n, int mode) {
    __atomic_store_n(&count->mode, FAULT_NEVER, __ATOMIC_SEQ_CST);
    __atomic_store_n(&count->left, n, __ATOMIC_SEQ_CST);
    __atomic_store_n(&count->injected, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&count->calls, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&count->mode, mode, __ATOMIC_SEQ_CST);
}

static inline bool fault_disarm(fault_count_t *count) {
    __atomic_store_n(&count->mode, FAULT_NEVER, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&count->injected, __ATOMIC_SEQ_CST) > 0;
}

/* True if this call is to fail. */
static inline bool fault_now(fault_count_t *count) {
    __atomic_fetch_add(&count->calls, 1, __ATOMIC_SEQ_CST);
    int mode = __atomic_load_n(&count->mode, __ATOMIC_SEQ_CST);
    if (mode == FAULT_NEVER) return false;
    long left = __atomic_fetch_sub(&count->left, 1, __ATOMIC_SEQ_CST);
    if (left > 0 || (left < 0 && mode == FAULT_ONCE)) return false;
    __atomic_fetch_add(&count->injected, 1, __ATOMIC_SEQ_CST);
    return true;
}

/* Let n allocations succeed, then fail one; or all. */
static inline void fault_after(long n) { fault_arm(&fault_memory, n, FAULT_ONCE); }
static inline void fault_all_after(long n) { fault_arm(&fault_memory, n, FAULT_ALWAYS); }

/* No more failures. True if there was one since fault_after(). */
static inline bool fault_off(void) { return fault_disarm(&fault_memory); }

/* Allocations tried since fault_after() or fault_all_after(); since the start of the program if neither was called. */
static inline long fault_calls(void) { return __atomic_load_n(&fault_memory.calls, __ATOMIC_SEQ_CST); }

/* Blocks allocated and not freed. */
static inline long fault_live(void) { return __atomic_load_n(&fault_live_blocks, __ATOMIC_SEQ_CST); }

static inline void *fault_malloc(size_t size) {
    if (fault_now(&fault_memory)) {
        errno = ENOMEM;
        return NULL;
    }
    void *p = malloc(size);
    if (p) __atomic_fetch_add(&fault_live_blocks, 1, __ATOMIC_SEQ_CST);
    return p;
}

static inline void fault_free(void *p) {
    if (!p) return;
    __atomic_fetch_sub(&fault_live_blocks, 1, __ATOMIC_SEQ_CST);
    free(p);
}

static inline void *fault_realloc(void *old, size_t size) {
    if (!old) return fault_malloc(size);
    if (size == 0) {
        fault_free(old);
        return NULL;
    }
    if (fault_now(&fault_memory)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(old, size);
}

#define CTXCANCEL_MALLOC(size) fault_malloc(size)
#define CTXCANCEL_REALLOC(old, size) fault_realloc((old), (size))
#define CTXCANCEL_FREE(p) fault_free(p)

/* A macro does here what the linker's --wrap would, without a flag that each build would have to know. */
#ifdef FAULT_THREADS
static fault_count_t fault_thread;

/* Let n threads start, then fail one with EAGAIN; or all. */
static inline void fault_threads_after(long n) { fault_arm(&fault_thread, n, FAULT_ONCE); }
static inline void fault_threads_all_after(long n) { fault_arm(&fault_thread, n, FAULT_ALWAYS); }
static inline bool fault_threads_off(void) { return fault_disarm(&fault_thread); }

/* Called before a thread creation fails (default: nothing). */
static void (*fault_threads_before)(void);

static inline int fault_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg) {
    if (fault_now(&fault_thread)) {
        if (fault_threads_before) fault_threads_before();
        return EAGAIN;
    }
    return pthread_create(thread, attr, fn, arg);
}
#define pthread_create fault_pthread_create
#endif

#endif /* FAULT_H */
