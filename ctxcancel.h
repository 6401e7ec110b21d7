/* ctxcancel.h: cancellation, deadlines, request values and bounded work for C.

   What Go programmers have in `context`, `errgroup`, `semaphore`, channels and worker pools, as one header for C99 and
   C++11: a tree of contexts that can be canceled, time out and carry values; polling that costs one load; a weighted
   semaphore; a bounded pool that rejects early and drains on a budget; groups, channels, pipelines, batching, rate
   limits and retries; signals that cancel a context or call a function; services that start in order and stop inside a
   budget.

       #define CTXCANCEL_IMPLEMENTATION           // in exactly one file; in strict -std=c11, the first include
       #include "ctxcancel.h"

       int work(ctx_t *ctx) {
           while (more_to_do()) {
               if (ctx_err(ctx)) return ctx_err(ctx);      // CTX_CANCELED or CTX_DEADLINE_EXCEEDED
               do_a_little();
           }
           return 0;
       }

       int main(void) {
           ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(2));
           int rc = work(ctx);
           ctx_end(ctx);                                   // every context that you make, you end
           printf("%s\n", ctx_strerror(rc));
       }

   Build with `-pthread`. The file with the implementation needs stb_ds.h (Debian: libstb-dev); the others do not.

   Rules that hold throughout
     - `int` results are 0 or a negative error with errno's number: strerror(-rc) and ctx_strerror(rc) both work.
     - A function that makes a context never returns NULL. When it cannot do its work it returns a context that has
       already failed, and ctx_err() says why. So errors need looking at once, where the work would start.
     - A ctx_t * in a parameter is borrowed for the call. Who made it ends it.
     - Every function may be called from any thread, unless its comment says otherwise. ctx_err() and ctx_poll() are
       async-signal-safe; nothing else is.
     - A bad argument is CTX_INVALID where a caller can act on it. A program error (ending twice, releasing permits that
       nobody holds, no callback, asking about a NULL context) trips CTXCANCEL_ASSERT.
     - After fork() the child keeps all contexts, and their deadlines still fire. Existing pools are closed in the
       child; callbacks and registrations for signals that other threads made, and their waits, are discarded. Other
       shared objects (semaphores, groups, channels, batchers, services) belong to the parent: create new ones in the
       child. A done descriptor keeps its number but is the child's own; an epoll set that the child inherits still
       watches the parent's. fork() waits until no thread is inside the library, so do not fork inside CTXCANCEL_MALLOC
       and the like. vfork(), posix_spawn() and clone() need no care: their child only executes another program.
     - pthread_cancel() takes effect after a wait of this library, except in ctx_cond_wait(), which it ends. A thread
       that is canceled asynchronously (PTHREAD_CANCEL_ASYNCHRONOUS) must not call this library.
     - A callback or task returns: it must not leave by longjmp(), pthread_exit() or a C++ exception. Compiled as C++
       the implementation calls std::terminate() when an exception leaves a callback of ctx_on_done().
     - The threads of this library have the signal mask of the thread whose call started them.
     - Before dlclose() of an object that holds the implementation, end its contexts, stop its registrations, and call
       ctx_runtime_stop(). The texts of any object go with it, and file:line is one of them. So end the contexts that it
       made or canceled, and their descendants, before its dlclose().
     - Where the machine has no 64-bit atomics of its own (i486, ARMv5, MIPS 32), link with `-latomic`.
     - Descriptions (`ctx_desc_t` and the like) are structs where zero means the default: name what you need,
       `&(ctx_desc_t){ .name = "fetch", .timeout = CTX_MS(50) }`; in C++ `ctx_desc_t d = {}; d.name = "fetch";`.

   Configuration, defined before the include
     CTXCANCEL_IMPLEMENTATION            compile the implementation here
     CTXCANCEL_STATIC                    everything static: this file has a runtime of its own and shares no contexts
     CTXCANCEL_API                       linkage of the functions (default: extern)
     CTXCANCEL_MALLOC/REALLOC/FREE       all three or none (default: malloc, realloc, free)
     CTXCANCEL_ASSERT(x)                 (default: assert(x))
     CTXCANCEL_NO_FUTEX                  park on mutexes and condition variables, on Linux too
     CTXCANCEL_STACK_SIZE                bytes for the stacks of the library's threads, but those of pools with a
                                         `.stack_size` (default: 0, the system's)
     CTXCANCEL_NO_SITES                  do not keep the file:line that made each context
     CTXCANCEL_NO_STB_DS_IMPLEMENTATION  the program instantiates stb_ds.h elsewhere

   Sections, each found twice under the same banner, declarations first
     == 1. platform     == 2. time     == 3. context     == 4. values     == 5. timers     == 6. polling
     == 7. waiting      == 8. semaphore     == 9. pool     == 10. group     == 11. channel     == 12. flow
     == 13. system      == 14. service

   Licence: MIT, see the end of the file. */
#ifndef CTXCANCEL_H
#define CTXCANCEL_H

#define CTXCANCEL_VERSION 100 /* major * 10000 + minor * 100 + patch */
#define CTXCANCEL_VERSION_STRING "0.1.0"

/* In strict ISO mode, and where the program asks for an older POSIX, the C library hides POSIX of 2008 unless asked
   before the first system header. */
#if defined(CTXCANCEL_IMPLEMENTATION) && !defined(__cplusplus) && \
    !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) && \
    (defined(__STRICT_ANSI__) || defined(_POSIX_SOURCE) || defined(_POSIX_C_SOURCE) || defined(_XOPEN_SOURCE))
#define _DEFAULT_SOURCE 1
#define CTX__DEFAULT_SOURCE 1
#endif

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

/* == 1. platform ================================================== */

#ifndef CTXCANCEL_ASSERT
#define CTXCANCEL_ASSERT(x) assert(x)
#endif

#ifndef CTXCANCEL_API
#ifdef CTXCANCEL_STATIC
#define CTXCANCEL_API static __attribute__((unused))
#else
#define CTXCANCEL_API extern
#endif
#endif

/* What macros expand to in the files of a program: casts that no warning of C++ minds. */
#ifdef __cplusplus
#define CTX__CAST(type, value) static_cast<type>(value)
#define CTX__DUR(n) ctx__dur((n)*INT64_C(1))
extern "C++" {
constexpr int64_t ctx__dur(int64_t n) { return n; }
template <class N> constexpr int64_t ctx__dur(N n) { return static_cast<int64_t>(n); }
}
#else
#define CTX__CAST(type, value) ((type)(value))
#define CTX__DUR(n) ((ctx_dur_t)(n))
#endif

/* Compile-time help: a result that must not be ignored, because what was made would leak or what was refused would
   be lost, and arguments that must not be NULL. The implementation checks the latter at run time. */
#define CTX__MUST_USE __attribute__((warn_unused_result))
#ifdef CTXCANCEL_IMPLEMENTATION
#define CTX__NONNULL(...)
#else
#define CTX__NONNULL(...) __attribute__((nonnull(__VA_ARGS__)))
#endif

/* The place in the program that made a context, as "file:line". */
#define CTX__STRING_(x) #x
#define CTX__STRING(x) CTX__STRING_(x)
#ifdef CTXCANCEL_NO_SITES
#define CTX__SITE CTX__CAST(const char *, NULL)
#else
#define CTX__SITE __FILE__ ":" CTX__STRING(__LINE__)
#endif

/* The part of the vocabulary for memory that threads share which inline functions need; the implementation has the
   rest, and says what it is for. CAS is true if `*word` was `*seen` and is `value` now; else `*seen` becomes what it
   was. */
#ifdef CTXCANCEL_TEST_SCHED
#ifdef __cplusplus
extern "C"
#endif
void ctx__sched_step(const char *op, const volatile void *word, const char *file, int line);
#define CTX__STEP(op, word) ctx__sched_step(op, (const volatile void *)(word), __FILE__, __LINE__),
#else
#define CTX__STEP(op, word)
#endif
#define CTX__LOAD(word, order) (CTX__STEP("load", word) __atomic_load_n(word, __ATOMIC_##order))
#define CTX__CAS(word, seen, value, won, lost)                                                                        \
    (CTX__STEP("cas", word)                                                                                           \
         __atomic_compare_exchange_n(word, seen, value, false, __ATOMIC_##won, __ATOMIC_##lost))

/* The one intrusive list: see the implementation. */
typedef struct ctx__link {
    struct ctx__link *next, **pprev;
} ctx__link_t;
typedef struct {
    ctx__link_t *first, **end;
} ctx__queue_t;

#define CTX_CANCELED (-ECANCELED)          /* somebody canceled */
#define CTX_DEADLINE_EXCEEDED (-ETIMEDOUT) /* the deadline passed */
#define CTX_QUEUE_FULL (-ENOBUFS)          /* no room now: drop, push back or try later */
#define CTX_CLOSED (-EPIPE)                /* takes no more */
#define CTX_NO_MEMORY (-ENOMEM)
#define CTX_INVALID (-EINVAL)              /* a bad argument */
#define CTX_NOT_READY (-EAGAIN)            /* not yet: nothing to take, or the wait ended before the event */
#define CTX_ALREADY (-EALREADY)            /* it was started before, or belongs to another */

/* Names an error in English, 0 and errno's numbers included. A number that both this library and the system use has a
   text that fits either. Never NULL; static, except that codes of the system which
   this library does not define come from strerror(). */
CTXCANCEL_API const char *ctx_strerror(int code);

/* Join the runtime thread, the signal thread (unless a context of ctx_notify_signals() or a registration of
   ctx_on_signals() lives) and the idle threads of groups, run callbacks that are still pending, and free every byte
   that the library has cached for the calling thread and for threads that have ended. For the last line of main(), so
   that leak checkers end clean. Later use starts what it needs again. Timers do not fire between. Not to be called from
   a callback. */
CTXCANCEL_API void ctx_runtime_stop(void);

/* == 2. time ====================================================== */

typedef int64_t ctx_time_t; /* a point in time: nanoseconds on the monotonic clock */
typedef int64_t ctx_dur_t;  /* a span: nanoseconds */

#define CTX_NS(n) CTX__DUR(n)
#define CTX_US(n) CTX__DUR((n)*INT64_C(1000))
#define CTX_MS(n) CTX__DUR((n)*INT64_C(1000000))
#define CTX_S(n) CTX__DUR((n)*INT64_C(1000000000))
#define CTX_NO_DEADLINE INT64_MAX /* a ctx_time_t that never comes */
#define CTX_FOREVER INT64_MAX     /* a ctx_dur_t that never ends */
#define CTX_EXPIRED CTX__CAST(ctx_dur_t, -1) /* a timeout that has passed */

/* Turn a computed span into a timeout. Returns CTX_EXPIRED if `dur` is 0 or negative, else `dur`. For `.timeout` of
   ctx_desc_t, where a zero means none. */
static inline ctx_dur_t ctx_budget(ctx_dur_t dur) { return dur > 0 ? dur : CTX_EXPIRED; }

/* The time now: CLOCK_MONOTONIC, or the fake clock. About 20 ns. */
CTXCANCEL_API ctx_time_t ctx_now(void);

/* `t + d`, saturating at both ends: adding CTX_FOREVER to anything is CTX_NO_DEADLINE. */
static inline ctx_time_t ctx_time_add(ctx_time_t t, ctx_dur_t d) {
    if (d > 0) return t > INT64_MAX - d ? INT64_MAX : t + d;
    return t < INT64_MIN - d ? INT64_MIN : t + d;
}

/* For tests: replace the clock of the whole process by one that shows `start` and moves only when advanced.
   Call while nothing but idle threads of the library waits. A program built with CTXCANCEL_STATIC has a clock per
   file. */
CTXCANCEL_API void ctx_clock_fake(ctx_time_t start);

/* Move the fake clock forward, stopping at each deadline on the way: timers fire in the order of their deadlines, in
   this thread, and a callback reads its own deadline from ctx_now(). Returns when every waiter whose time has come has
   been unparked. A thread that sleeps in a loop may not have come to its next sleep by then, so one long way does not
   drive a chain of sleeps (it does drive a chain of callbacks); and who advances the clock must not sleep by it.
   Negative spans are none. CTXCANCEL_ASSERT if the clock is not fake. */
CTXCANCEL_API void ctx_clock_advance(ctx_dur_t dur);

/* For tests: a fake clock that moves by itself. Whenever every thread that takes part is parked in a wait of this
   library, it moves to the next deadline, and the runtime thread fires what is due. So half an hour of retries takes
   milliseconds, and without random numbers (`.jitter`) the times in it are the same in every run. (Go's
   testing/synctest.)
   These threads take part: the calling one; the library's threads that run tasks and callbacks of services, from before
   they begin; and each thread between ctx_clock_join() and ctx_clock_leave(). If none does, the clock moves as long as
   there are deadlines, also those of other threads. All waits of this library count, except ctx_cond_wait() and
   ctx_poll_fd(). A thread that takes part and sleeps in any other way, such as on a mutex, in pthread_join() or in a
   call of the system, counts as running, and the clock stands still. Let it leave before and join after, in a task too:
   `ctx_clock_leave(); rc = ctx_poll_fd(ctx, fd, POLLIN); ctx_clock_join();`. A callback that the runtime thread runs
   counts as running, so it must not wait. Signals are told by a thread that takes no part: the clock may move before.
   If all threads that take part are parked, no deadline is left and no context or registration awaits a signal, this
   prints the waits to stderr and is a CTXCANCEL_ASSERT; with NDEBUG it goes on to wait. A worker does not nap for
   `.coalesce`. ctx_clock_advance() may be called too.
   Call it while nothing but idle threads of the library waits. ctx_clock_real() ends it. CTXCANCEL_ASSERT if the
   runtime thread is unavailable. */
CTXCANCEL_API void ctx_clock_auto(ctx_time_t start);

/* Have the calling thread take part in ctx_clock_auto(), or no longer. A thread that ends has left. The clock does not
   wait for a thread that has not joined yet: let the thread that starts it wait, on a pthread_barrier_t for example,
   until it has. Neither does anything with another clock. */
CTXCANCEL_API void ctx_clock_join(void);
CTXCANCEL_API void ctx_clock_leave(void);

/* Back to CLOCK_MONOTONIC. */
CTXCANCEL_API void ctx_clock_real(void);

/* == 3. context =================================================== */

typedef struct ctx__node ctx_t;

/* What a value is found by: see section 4. */
typedef struct {
    const char *name; /* for people */
    size_t size;      /* bytes of a value */
} ctx_key_t;

/* Why a context is done. {0, NULL, NULL} while it is not. */
typedef struct {
    int code;         /* what the canceler gave; CTX_CANCELED or CTX_DEADLINE_EXCEEDED if it gave nothing */
    const char *what; /* a static string; never NULL once done */
    const char *site; /* the place that canceled, as "file:line"; after a deadline the place that set it; of a signal
                         "signal SIGTERM"; of a cancel by this library its function, such as "ctx_group_go". Where the
                         canceler gave none, the place that made the context it canceled. "" of a failed context, and
                         with CTXCANCEL_NO_SITES; never NULL once done */
} ctx_cause_t;

typedef struct {
    const char *name;           /* shown in reports; static or outliving the context (default: the parent's name) */
    ctx_time_t deadline;        /* when to cancel (default: 0, none) */
    ctx_dur_t timeout;          /* cancel this long from now; negative: already expired. A zero means none here, unlike
                                   in ctx_with_timeout(), so a computed rest that has come down to 0 would be no limit
                                   at all: pass ctx_budget(rest) (default: 0, none) */
    const char *deadline_cause; /* what ctx_cause() says after the deadline; static (default: "deadline exceeded") */
    const ctx_key_t *key;       /* set this value, ... (default: none) */
    const void *value;          /* ... copied from here: key->size bytes */
    bool detach;                /* keep the parent's values, drop its cancellation and deadline (default: false) */
    uint32_t sample_one_in;     /* decide ctx_sampled(): true for one in so many (default: as the parent) */
    ctx_dur_t grace;            /* when the parent is done, this context goes on for this long at most, and then has the
                                   parent's cause: to commit, then stop. It starts anew below a parent that is done
                                   already. Its own deadline still holds; ctx_deadline() knows both. Ignored in a
                                   detached context, which has no parent (default: 0, none; negative: none) */
} ctx_desc_t;

/* The root of every tree: never canceled, never freed. Ending it does nothing. */
CTXCANCEL_API ctx_t *ctx_background(void);

/* Make a child of `parent`: one node with everything `desc` asks for. (A macro, as all that follow: the function behind
   it takes a `site` too, a static string for ctx_site(); NULL is none.) `desc` may be NULL. If both a deadline and a
   timeout are given the earlier holds, and the parent's own always does if it is earlier still. A child of a context
   that is done is done from the start, with its parent's cause. Except for both: `.grace`.
   The caller owns one reference and drops it with ctx_end(). Never NULL: if memory or the runtime thread is
   unavailable, returns a shared context that is already done with CTX_NO_MEMORY, or with CTX_INVALID if `parent` is
   NULL or a key has no value. It may be used, derived from and ended like any other. */
#define ctx_derive(parent, ...) ctx_derive_at((parent), __VA_ARGS__, CTX__SITE)
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_derive_at(ctx_t *parent, const ctx_desc_t *desc, const char *site);

/* The short forms of ctx_derive(). A timeout that is zero or negative has already expired. */
#define ctx_with_cancel(parent) ctx_with_cancel_at((parent), CTX__SITE)
#define ctx_with_deadline(parent, deadline) ctx_with_deadline_at((parent), (deadline), CTX__SITE)
#define ctx_with_timeout(parent, timeout) ctx_with_timeout_at((parent), (timeout), CTX__SITE)
#define ctx_with_value(parent, ...) ctx_with_value_at((parent), __VA_ARGS__, CTX__SITE)
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_with_cancel_at(ctx_t *parent, const char *site);
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_with_deadline_at(ctx_t *parent, ctx_time_t deadline, const char *site);
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_with_timeout_at(ctx_t *parent, ctx_dur_t timeout, const char *site);
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_with_value_at(ctx_t *parent, const ctx_key_t *key, const void *value, const char *site);

/* Make a context that keeps the parent's values but not its cancellation, deadline or memory: for work that outlives
   the request which started it. (Go's WithoutCancel, without holding the chain.) */
#define ctx_without_cancel(parent) ctx_without_cancel_at((parent), CTX__SITE)
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_without_cancel_at(ctx_t *parent, const char *site);

/* Make a context that is done as soon as `a` or `b` is. It has the values of `a`, the earlier deadline of both, and the
   cause of the first that is done. No thread is used. One allocation. */
#define ctx_merge(a, b) ctx_merge_at((a), (b), CTX__SITE)
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_merge_at(ctx_t *a, ctx_t *b, const char *site);

/* Cancel a context and everything below it. Returns true if this call canceled it, false if it was already done. Either
   way, ctx_err() is set on return in every descendant that was attached before the call, merged contexts included, even
   if other threads are canceling parts of the same subtree. On true, the callbacks of every descendant that this call
   canceled have run; those of a descendant that another thread canceled first run on that thread, or after a deadline
   on the runtime thread. Uses constant stack and allocates nothing.
   Callbacks run inside this call: do not hold a lock that one of them takes.
   A macro that passes on its place, for ctx_cause(). ctx_cancel, ctx_cancel_cause and ctx_end are functions too, so
   their address may be taken; then no place is known. */
CTXCANCEL_API bool ctx_cancel(ctx_t *ctx);
CTXCANCEL_API bool ctx_cancel_at(ctx_t *ctx, const char *site);
#define ctx_cancel(ctx) ctx_cancel_at((ctx), CTX__SITE)

/* Like ctx_cancel(), with a reason. `what` is a static string. ctx_err() returns CTX_DEADLINE_EXCEEDED if that is the
   code, else CTX_CANCELED. ctx_cause() returns both unchanged, except that a zero `code` reads as CTX_CANCELED, and a
   NULL `what` as the text of a code of this library, else as "context canceled". */
CTXCANCEL_API bool ctx_cancel_cause(ctx_t *ctx, int code, const char *what);
CTXCANCEL_API bool ctx_cancel_cause_at(ctx_t *ctx, int code, const char *what, const char *site);
#define ctx_cancel_cause(ctx, code, what) ctx_cancel_cause_at((ctx), (code), (what), CTX__SITE)

/* End a context that you made: cancel it as ctx_cancel() does, release its timer, drop your reference. Children keep
   the memory that they need. NULL is fine. */
CTXCANCEL_API void ctx_end(ctx_t *ctx);
CTXCANCEL_API void ctx_end_at(ctx_t *ctx, const char *site);
#define ctx_end(ctx) ctx_end_at((ctx), CTX__SITE)

/* One more reference, to be dropped by ctx_end() or ctx_release(). Returns its argument. */
CTXCANCEL_API ctx_t *ctx_retain(ctx_t *ctx);

/* Drop a reference without canceling. The context's descendants can still be canceled from above. NULL is fine. */
CTXCANCEL_API void ctx_release(ctx_t *ctx);

/* The one public field: the first member of every context. Read it with ctx_err(). */
struct ctx__head {
    int err;
};

/* 0 while work may go on; then, for good, CTX_CANCELED or CTX_DEADLINE_EXCEEDED (or what a failed context failed with).
   One load. What the canceler wrote before canceling is visible once this is not 0. Async-signal-safe. */
static inline int ctx_err(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx != NULL);
    return CTX__LOAD(&CTX__CAST(const struct ctx__head *, CTX__CAST(const void *, ctx))->err, ACQUIRE);
}

/* Why it is done: code, text and place of the first canceler, never torn. */
CTXCANCEL_API ctx_cause_t ctx_cause(const ctx_t *ctx);

/* The earliest deadline of the chain, or CTX_NO_DEADLINE. */
CTX__NONNULL(1)
CTXCANCEL_API ctx_time_t ctx_deadline(const ctx_t *ctx);

/* What is left until ctx_deadline(): never negative, CTX_FOREVER without one. To split a budget, give a child a part:
   `ctx_with_timeout(ctx, ctx_remaining(ctx) / 3)`. */
CTXCANCEL_API ctx_dur_t ctx_remaining(const ctx_t *ctx);

/* The same in milliseconds, as poll() and epoll_wait() want it: rounded up, so that a call which waits this long does
   not return before the deadline; at most INT_MAX; -1 without a deadline; 0 once it has passed. It does not tell
   whether `ctx` was canceled. */
CTXCANCEL_API int ctx_remaining_ms(const ctx_t *ctx);

/* The name given in the description, else the parent's. Never NULL. */
CTX__NONNULL(1)
CTXCANCEL_API const char *ctx_name(const ctx_t *ctx);

/* The "file:line" that made it, or the function of this library that did, such as "ctx_group_new"; "" with
   CTXCANCEL_NO_SITES. Never NULL. */
CTX__NONNULL(1)
CTXCANCEL_API const char *ctx_site(const ctx_t *ctx);

/* Whether this is one of the few whose work is to be traced, say. Decided once, by the first context on the way from
   the root that has a `.sample_one_in`, and the same for everything below it, detached work included; false if none
   has. */
CTX__NONNULL(1)
CTXCANCEL_API bool ctx_sampled(const ctx_t *ctx);

/* Storage for one callback: yours, on the stack or inside your own struct. The fields are private. */
typedef struct ctx__on_done {
    void (*fn)(void *arg);
    void *arg;
    ctx_t *ctx;
    struct ctx__on_done *next, *prev; /* [ctx->mu] */
    int state;                     /* [atomic] */
    int flags;                     /* [const] */
} ctx_on_done_t;

/* Call `fn(arg)` when `ctx` is done: once, on the thread that cancels it, or for a deadline on the library's runtime
   thread (with the fake clock in ctx_clock_advance()). No lock is held. The callback may call any function here, even
   end `ctx` or stop and reuse `reg`, but must be short. If `ctx` is already done, `fn` runs in this call, which then
   returns false; else returns true. `reg` need not be initialised. Keep it alive until the callback has run or been
   stopped. While registered it holds the memory of `ctx`. */
CTX__NONNULL(1, 2)
CTXCANCEL_API bool ctx_on_done(ctx_on_done_t *reg, ctx_t *ctx, void (*fn)(void *arg), void *arg);

/* Unregister a callback. Returns true if it has not run and never will, false if it has run. If it is running on
   another thread, waits for it to finish; afterwards `reg` and `arg` may be reused or freed. Called from inside the
   callback, or from a callback that this one waits for, returns false at once. If the callback has registered `reg`
   anew, that registration is the one that is stopped. Returns true for a zeroed `reg` that was never registered.
   Do not hold a lock across this call that the callback takes: then each waits for the other. */
CTX__NONNULL(1)
CTXCANCEL_API bool ctx_on_done_stop(ctx_on_done_t *reg);

typedef enum {
    CTX_ON_DONE_STOPPED, /* the callback will never run */
    CTX_ON_DONE_RAN,     /* it has run and returned */
    CTX_ON_DONE_RUNNING  /* it is running, maybe in this very thread */
} ctx_on_done_state_t;

/* Unregister a callback like ctx_on_done_stop(), but never wait for one that is running. Returns what became of it:
   CTX_ON_DONE_STOPPED for a zeroed `reg` that was never registered, too. */
CTXCANCEL_API ctx_on_done_state_t ctx_on_done_try_stop(ctx_on_done_t *reg);

/* End a context when its variable leaves scope (gcc, clang):
       CTX_SCOPED ctx_t *c = ctx_with_timeout(parent, CTX_MS(50));  */
#define CTX_SCOPED __attribute__((cleanup(ctx__scoped_end)))
static inline void ctx__scoped_end(ctx_t **ctx) { ctx_end_at(*ctx, NULL); }

/* A leaf is a context for the very hottest path: on your stack, no allocation, no lock, no place in the tree. It
   watches one parent and an optional deadline. It has no children, callbacks or waiters, and needs no ending. The
   parent must outlive it. Any thread may cancel it; the other fields are the owner's. */
typedef struct {
    const ctx_t *parent;
    ctx_time_t deadline;
    int err; /* [atomic] */
} ctx_leaf_t;

/* Make a leaf. `deadline` is CTX_NO_DEADLINE, or when it ends: then each ctx_leaf_err() reads the clock. */
static inline void ctx_leaf_init(ctx_leaf_t *leaf, const ctx_t *parent, ctx_time_t deadline) {
    CTXCANCEL_ASSERT(parent != NULL);
    leaf->parent = parent;
    leaf->deadline = deadline;
    leaf->err = 0;
}

/* 0, or why the leaf is done: the first reason seen stays. */
CTXCANCEL_API int ctx__leaf_settle(ctx_leaf_t *leaf, int err);
static inline int ctx_leaf_err(ctx_leaf_t *leaf) {
    int err = CTX__LOAD(&leaf->err, ACQUIRE);
    if (err) return err;
    err = ctx_err(leaf->parent);
    if (err) return ctx__leaf_settle(leaf, err);
    if (leaf->deadline == CTX_NO_DEADLINE || ctx_now() < leaf->deadline) return 0;
    return ctx__leaf_settle(leaf, CTX_DEADLINE_EXCEEDED);
}

/* Cancel a leaf alone. True for the call that did it. */
static inline bool ctx_leaf_cancel(ctx_leaf_t *leaf) {
    int live = 0;
    return CTX__CAS(&leaf->err, &live, CTX_CANCELED, RELEASE, RELAXED);
}

/* == 4. values ==================================================== */

/* Put what a request carries into one struct under one key, not into many keys: one copy, one look-up.

   The address of a key is its identity, so a key must be one object in the program. In one file:
       static const ctx_key_t user_key = CTX_KEY(user_t);
   To share it, declare it `extern` in your header and define it once, or use CTX_VALUE() below. A `static const` key in
   a header would be a different key in every file that includes it. */
#define CTX_KEY(T) { #T, sizeof(T) }

/* The value of `key` in this context or the nearest ancestor that set it; NULL when absent. It is a copy, aligned
   like what malloc() returns (16 bytes on 64-bit systems) and readable as long as the context. Costs the same at any
   depth. */
CTX__NONNULL(1)
CTXCANCEL_API const void *ctx_value(const ctx_t *ctx, const ctx_key_t *key);

/* A typed pair for one struct: `CTX_VALUE(request_t, request);` defines

       ctx_t *ctx_with_request(ctx_t *parent, const request_t *value);
       const request_t *request_from(const ctx_t *ctx);                   // NULL when absent

   It may stand in a header that many files include, C and C++: the key is one weak symbol in the program. The symbol is
   visible even under -fvisibility=hidden, so a program that is linked with -rdynamic shares the key with the plugins
   that it loads. */
#define CTX_VALUE(T, name)                                                                              \
    extern ctx_key_t ctx_key_##name;                                                                    \
    __attribute__((weak, visibility("default"))) ctx_key_t ctx_key_##name = CTX_KEY(T);                 \
    CTX__MUST_USE                                                                                       \
    static inline __attribute__((unused)) ctx_t *ctx_with_##name(ctx_t *parent, const T *value) {       \
        return ctx_with_value_at(parent, &ctx_key_##name, value, CTX__SITE);                            \
    }                                                                                                   \
    static inline __attribute__((unused)) const T *name##_from(const ctx_t *ctx) {                      \
        return CTX__CAST(const T *, ctx_value(ctx, &ctx_key_##name));                                   \
    }                                                                                                   \
    struct ctx__value_##name /* takes the semicolon */

/* == 5. timers ==================================================== */

/* Nothing to call: deadlines register themselves. One thread, started by the first of them, serves all. A deadline
   never fires early; on an idle machine it fires within 100 us. */

/* == 6. polling =================================================== */

/* For loops so tight that even one load an iteration shows. Owned by one thread; the fields are private. */
typedef struct {
    const ctx_t *ctx;
    uint32_t left;    /* calls until the next look */
    uint32_t stride;  /* calls between looks */
    uint32_t looks;   /* looks until the next tuning */
    ctx_dur_t within; /* the latency to tune for; 0: a fixed stride */
    ctx_time_t last;  /* when the stride was last tuned */
} ctx_poll_t;

/* Look at `ctx` every `stride`-th call (0 counts as 1). The context must outlive the poll. */
CTX__NONNULL(1)
CTXCANCEL_API ctx_poll_t ctx_poll_every(const ctx_t *ctx, uint32_t stride);

/* Look often enough to notice within about `within` of work, however long one turn of the loop takes: the stride tunes
   itself by the clock, and is kept so far below the budget that turns which suddenly take a thousand times longer are
   met within a few times `within`, once. */
CTXCANCEL_API ctx_poll_t ctx_poll_within(const ctx_t *ctx, ctx_dur_t within);

CTXCANCEL_API int ctx__poll_look(ctx_poll_t *poll);

/* 0 to go on, else ctx_err(). A decrement and a branch; a look when it is time. Once done, every call says so. */
static inline int ctx_poll(ctx_poll_t *poll) {
    if (--poll->left != 0) return 0;
    return ctx__poll_look(poll);
}

/* A flag for C code that polls one: non-zero once `ctx` is done. Valid as long as the context. */
CTX__NONNULL(1)
CTXCANCEL_API const volatile int *ctx_flag(const ctx_t *ctx);

/* == 7. waiting =================================================== */

/* Park until `ctx` is done, at most for `max`. Returns its err, or CTX_NOT_READY if `max` passed first. This and
   all waits below tell at once of a context that is done already. */
CTXCANCEL_API int ctx_wait(ctx_t *ctx, ctx_dur_t max);

/* Sleep for `dur`. 0, or the err of the context that cut it short. */
CTXCANCEL_API int ctx_sleep(ctx_t *ctx, ctx_dur_t dur);

/* Sleep until ctx_now() is `time`, which may be past. Returns 0, or the err of the context that cut it short. A loop
   that adds its period to the last `time` does not drift. */
CTXCANCEL_API int ctx_sleep_until(ctx_t *ctx, ctx_time_t time);

/* A file descriptor that becomes readable when `ctx` is done, for poll, epoll and select: do not read it. Made by the
   first call, owned by the context and closed with it; it is inherited by no exec. Contexts that are already done when
   first asked share one.
   The order: once the descriptor is readable, ctx_err() is set. ctx_err() is set first, and the descriptor is readable
   when the call that canceled `ctx` itself returns; once ctx_err() is set, what a later call of ctx_done_fd() returns
   is readable.
   Ending a context that nobody canceled, by its only reference, closes the descriptor and does not make it readable
   before. So a thread that polls it holds a reference.
   Returns a negative error of the system, or CTX_NO_MEMORY, if there is none to be had. To wait for one descriptor of
   your own, ctx_poll_fd() needs no descriptor of the context's. */
CTX__NONNULL(1)
CTXCANCEL_API int ctx_done_fd(ctx_t *ctx);

/* Like pthread_cond_wait(), but a canceled `ctx` also ends the wait. The caller must hold `mutex`, and holds it on
   return. Returns 0 after a wake-up, which may be spurious (check your condition), or ctx_err(ctx); or the error of
   pthread_cond_wait(), such as -EOWNERDEAD with the mutex held. `ctx` may be canceled by a thread that holds `mutex`.
   Waking for a cancellation broadcasts `cond`. Returns CTX_INVALID if `cond` or `mutex` is NULL, CTX_NO_MEMORY if the
   runtime thread, which it needs in any case, is unavailable. */
CTXCANCEL_API int ctx_cond_wait(ctx_t *ctx, pthread_cond_t *cond, pthread_mutex_t *mutex);

/* == 8. semaphore ================================================= */

/* Storage for a semaphore; the fields are private. */
typedef struct {
    int64_t state;       /* [atomic] free permits * 2 + (somebody waits) */
    int64_t total;       /* [const] */
    ctx__queue_t waiters; /* [mu] in the order of arrival */
    uint32_t mu;
} ctx_sem_t;

/* Make a semaphore of `permits`, all free. 0, or CTX_INVALID if there are less than 1 or more than 2^61. */
CTX__NONNULL(1)
CTXCANCEL_API int ctx_sem_init(ctx_sem_t *sem, int64_t permits);

/* Take `n` permits, waiting for them until `ctx` is done. First come, first served: a big request is not starved by
   small ones, and one for 0 permits queues like others. Returns 0, or the error of the context, and then nothing is
   taken: an acquire whose context is done before its permits come takes none. Returns CTX_INVALID at once if `n` is
   negative or more than there are in all. Uncontended: one atomic operation. */
CTX__NONNULL(1)
CTXCANCEL_API int ctx_sem_acquire(ctx_sem_t *sem, ctx_t *ctx, int64_t n);

/* Take `n` permits if they are free and nobody waits. Returns whether it did. */
CTX__NONNULL(1)
CTXCANCEL_API bool ctx_sem_try_acquire(ctx_sem_t *sem, int64_t n);

/* Give `n` permits back. Giving back more than are taken trips CTXCANCEL_ASSERT. Touches nothing once another thread
   can have the permits, so a thread that has taken all of them may free the storage at once. */
CTX__NONNULL(1)
CTXCANCEL_API void ctx_sem_release(ctx_sem_t *sem, int64_t n);

/* The end of a semaphore that nobody waits for; else CTXCANCEL_ASSERT. Holds no memory. */
CTXCANCEL_API void ctx_sem_destroy(ctx_sem_t *sem);

/* == 9. pool ====================================================== */

typedef struct ctx_pool ctx_pool_t;

/* A piece of work. `ctx` is the task's own: retain it to keep it. 0 is success. */
typedef int (*ctx_task_fn)(ctx_t *ctx, void *arg);

/* What submit does when the queue is full. */
typedef enum {
    CTX_REJECT,      /* return CTX_QUEUE_FULL at once */
    CTX_BLOCK,       /* wait for room until `parent` is done, like ctx_pool_submit_wait() */
    CTX_CALLER_RUNS, /* run the task in the submitting thread, which is a worker of the pool meanwhile: it first waits
                        for one of `.permits` until `parent` is done, and the drain's report names the task */
    CTX_DROP_OLDEST  /* hand the oldest queued task to on_drop and take this one */
} ctx_when_full_t;

#define CTX_NO_QUEUE SIZE_MAX /* for `.queue`: no task may wait for a worker */

typedef struct {
    const char *name;          /* for people; static (default: "pool") */
    int workers;               /* threads at most, started as work comes (default: one per core) */
    size_t queue;              /* tasks that may wait, besides one for each worker that is free to take it: idle or
                                  with no thread yet. With `.permits` such a worker has its task while it waits for a
                                  permit. With CTX_NO_QUEUE a task is accepted only if a worker is free, and
                                  CTX_DROP_OLDEST rejects (default: 1024) */
    ctx_sem_t *permits;        /* run only while holding one permit of this; may be shared between pools, and must
                                  outlive them (default: none, the workers are the limit) */
    ctx_dur_t task_timeout;    /* the deadline of each task, counted from its start; not negative (default: none) */
    ctx_when_full_t when_full; /* (default: CTX_REJECT) */
    void (*on_drop)(const char *op, void *arg, int reason, void *user); /* takes each accepted task that will not run;
                                  reason: CTX_QUEUE_FULL (pushed out), CTX_DEADLINE_EXCEEDED (the drain's budget),
                                  CTX_CANCELED (the lifetime ended) or CTX_NO_MEMORY. Called by the thread that pushes
                                  it out, drains, or cancels the lifetime, inside that call, so hold no lock there that
                                  it takes; calls may overlap (default: nothing is called) */
    void *user;                /* for on_drop */
    ctx_dur_t grace;           /* how long canceled tasks get to stop in a drain (default: 100 ms; negative: none) */
    ctx_dur_t coalesce;        /* a worker that has nothing more to do looks again after so long, and until then no
                                  other is woken, unless more than half of the queue is taken: so many small tasks cost
                                  few wake-ups (default: 0, off) */
    size_t copy_max;           /* bytes that ctx_pool_submit_copy() takes at most (default: 64) */
    size_t stack_size;         /* bytes of each worker's stack, raised to what the system needs and rounded up to whole
                                  pages (default: CTXCANCEL_STACK_SIZE, or the system's) */
} ctx_pool_desc_t;

#define CTX_DRAIN_OPS 16

/* What became of all the tasks that the pool accepted in its life. Their sum is that number, but that each worker which
   still does what a group or a batcher has counts as one stuck. */
typedef struct {
    uint64_t completed;                /* returned 0 */
    uint64_t failed;                   /* returned an error of their own */
    uint64_t canceled;                 /* returned an error after the task's own context was done, not a child of it */
    uint64_t dropped;                  /* went to on_drop */
    uint64_t stuck;                    /* still running */
    ctx_dur_t wait_time;               /* how long accepted work was let finish */
    ctx_dur_t grace_time;             /* how long the canceled got to stop */
    const char *running[CTX_DRAIN_OPS]; /* the operations still running: the first min(stuck, CTX_DRAIN_OPS) */
} ctx_drain_report_t;

/* Make a pool below `lifetime`: when that is done, running tasks are canceled, queued ones dropped and new ones
   refused. A pool whose work must outlive a Ctrl-C lives below the background, and is drained after it. No thread
   starts before the first submit. NULL with errno set if memory is short or an argument is bad.
   `desc` may be NULL. */
CTX__MUST_USE
CTXCANCEL_API ctx_pool_t *ctx_pool_new(ctx_t *lifetime, const ctx_pool_desc_t *desc);

/* Accept `fn(ctx, arg)` to run detached: its context has the values of `parent`, but neither its cancellation nor its
   deadline, ends with the pool, and has the pool's task timeout. It runs even if `parent` is done. `op` names the
   operation in reports; a static string. Nothing is allocated.
   Returns 0 if accepted: it will run or go to on_drop exactly once. Otherwise CTX_QUEUE_FULL, at once; CTX_CLOSED if
   the pool is draining; CTX_NO_MEMORY if the pool has no thread and none can be made; or the error of the lifetime once
   that is done. `parent` is not touched once the task may run. Blocks only if `.when_full` says so. */
CTX__MUST_USE
CTXCANCEL_API int ctx_pool_submit(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn, void *arg);

/* The same, but waits for room until `parent` is done, then returns its err. Those who wait are served in order; while
   one waits the queue is full for all others. */
CTX__MUST_USE
CTXCANCEL_API int ctx_pool_submit_wait(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn, void *arg);

/* The same as ctx_pool_submit(), but `arg` of the task is a copy of the `size` bytes at `data`, aligned for any type.
   The copy is the task's own until `fn` or on_drop returns. The pool keeps the memory of copies and uses it again, so a
   small task needs no malloc; a pool that is never asked for copies has none. Also returns CTX_INVALID if `size` is
   more than `.copy_max`, and CTX_NO_MEMORY if memory for one more copy than ever before is unavailable. */
CTX__MUST_USE
CTXCANCEL_API int ctx_pool_submit_copy(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn,
                                       const void *data, size_t size);

/* Submit `n` tasks of one operation, in order: `*taken` (may be NULL) says how many were accepted. 0 when all were,
   else the error of the first that was not. One wake-up for all, while there is room. `.when_full` holds for each. */
CTXCANCEL_API int ctx_pool_submit_batch(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn,
                                        void *const *args, size_t n, size_t *taken);

/* Wait until nothing that the pool has accepted is left: each task has returned, or on_drop has. The pool stays open,
   and a task that is accepted meanwhile is waited for too, so this may take as long as new tasks keep coming. A call
   from a task of the pool, or from its on_drop, waits neither for that one nor for others that wait or drain here.
   Returns 0, or ctx_err(ctx) if `ctx` is done first. */
CTXCANCEL_API int ctx_pool_wait(ctx_pool_t *pool, ctx_t *ctx);

/* Bring the pool to its end: refuse new work; let what was accepted finish for `budget`; then drop what is queued,
   cancel what runs and give it the grace period; then report. Once the lifetime is done, the budget is over: a drain
   then waits for the grace period at most. 0 when no drain had to cut anything off or left anything behind, else
   CTX_DEADLINE_EXCEEDED; what the end of the lifetime dropped or canceled is in the report. Never blocks past
   budget and grace period. May be called again, from several threads, and from a task, which does not wait for itself.
   `report` may be NULL. */
CTXCANCEL_API int ctx_pool_drain(ctx_pool_t *pool, ctx_dur_t budget, ctx_drain_report_t *report);

/* Free a pool; one that was not drained is drained with no budget and no grace period. Returns at once even if a task
   is stuck: what that one touches of the pool lives until it ends, and its permit is given back here. No other
   thread may use the pool any more. May be called from one of its tasks. NULL is fine. */
CTXCANCEL_API void ctx_pool_free(ctx_pool_t *pool);

/* The queue that a burst needs: (peak - drain) * seconds, rounded up; 1 at least. */
CTXCANCEL_API size_t ctx_pool_queue_for_burst(double peak_per_s, double drain_per_s, double seconds);

/* == 10. group ==================================================== */

/* Run `fn(child, arg)` as named work on a thread of its own, an idle one or else a new one. `child` is a child of `ctx`
   and has the name `name`, a static string. The result of `fn` is not kept: for results use a group.
   Returns 0 if started. Otherwise nothing runs: returns ctx_err(ctx) if `ctx` is done, CTX_NO_MEMORY if memory or a
   thread is unavailable, or CTX_INVALID. */
CTX__MUST_USE
CTXCANCEL_API int ctx_go(ctx_t *ctx, const char *name, ctx_task_fn fn, void *arg);

/* Returns how much work of ctx_go() has not returned yet. */
CTXCANCEL_API size_t ctx_go_count(void);

/* Wait until no work of ctx_go() is left. Returns 0, or ctx_err(ctx) if `ctx` is done first. Work that waits here
   itself is not waited for. */
CTXCANCEL_API int ctx_go_wait(ctx_t *ctx);

typedef struct ctx_group ctx_group_t;

typedef struct {
    const char *name; /* of the group's context; static (default: the parent's name) */
    ctx_pool_t *pool; /* its workers run the tasks, in turns with the pool's own; must outlive the group. The pool's
                         `.queue`, `.when_full` and `.task_timeout` are not for the group's tasks, and its drain
                         reports do not count them. Tasks that wait for each other need a worker each, except for
                         stages: see ctx_stage_run() (default: they run on idle threads, created as needed) */
    int limit;        /* accepted tasks that have not returned, at most; a task that waits in ctx_group_go() is not
                         counted (default: none; on a pool the size of its queue, or with CTX_NO_QUEUE its workers) */
    bool keep_going;  /* a failure cancels nobody; it is the result all the same (default: the first failure cancels) */
    void (*on_error)(void *arg, int rc, void *user); /* hears of each task that failed, with its result, and of each
                         that was refused, with the error: see ctx_group_go(). After a failure these are mostly
                         CTX_CANCELED, of those that it canceled (default: nothing is called) */
    void *user;       /* for on_error */
} ctx_group_desc_t;

/* Make a group: tasks that are waited for together, and of which the first to fail cancels the others. They share one
   context, a child of `parent`, which is also canceled when the pool's tasks are. Returns NULL with errno set if memory
   is unavailable or an argument is bad. `desc` may be NULL. Must be ended by ctx_group_wait().

   `on_error` runs on a thread that runs or adds a task, one call at a time, and has returned from all calls before
   ctx_group_wait() returns. It may use the group, all but ctx_group_wait(). What fails during a call is told after
   that call, even if the call itself caused it. So an on_error that adds a task again must stop once the context is
   done. When memory is short, on_error does not hear of errors inside its own call. */
CTX__MUST_USE
CTXCANCEL_API ctx_group_t *ctx_group_new(ctx_t *parent, const ctx_group_desc_t *desc);

/* Returns the context of the tasks, valid until ctx_group_wait() returns. Cancel it to stop them. */
CTX__NONNULL(1)
CTXCANCEL_API ctx_t *ctx_group_ctx(ctx_group_t *group);

/* Have `fn(ctx, arg)` run in the group; any result but 0 is a failure. May be called from any thread, and from tasks of
   the group. Waits only while the group is at its limit, and on a pool it runs tasks of the group itself meanwhile. How
   full the pool's queue is does not matter.
   A task of the group that waits here does not count against the limit, so all of them may add tasks without a
   deadlock. The group then has more tasks than its limit, by as many as add at the same time; without a pool each has
   a thread.
   Returns 0 if accepted, and `fn` runs exactly once. Otherwise it never runs: returns the error of the group's context
   once that is done, CTX_CLOSED if the pool drains, CTX_NO_MEMORY if memory or a thread is unavailable, or
   CTX_INVALID. ctx_group_wait() returns that error unless another came first, so the result here may be ignored. A
   refusal cancels nobody. */
CTXCANCEL_API int ctx_group_go(ctx_group_t *group, ctx_task_fn fn, void *arg);

/* The same, but returns CTX_QUEUE_FULL where ctx_group_go() waits. The caller then decides what becomes of the task:
   ctx_group_wait() and `.on_error` do not hear of it. Each other error counts as that of ctx_group_go(). */
CTX__MUST_USE
CTXCANCEL_API int ctx_group_try_go(ctx_group_t *group, ctx_task_fn fn, void *arg);

/* Wait until every task has returned, running those that no thread has begun, and free the group. Returns 0 only if
   each ctx_group_go() on the group was accepted and each task returned 0. Otherwise returns the first error: the result
   of a task, or the error with which one was refused. If a task failed first, that is also the code of the context's
   cause. CTXCANCEL_ASSERT if called from a task of the group or its `.on_error`. Other threads must have returned from
   ctx_group_go() before. (Go's errgroup; unlike there, a task that is added after a failure does not run.) So this is
   right:
       for (i = 0; i < n; i++) ctx_group_go(group, fetch, &urls[i]);
       return ctx_group_wait(group); */
CTXCANCEL_API int ctx_group_wait(ctx_group_t *group);

/* Run `fn(ctx, arg)` here, with a context that is done as soon as `a` or `b` is and has the values of `a`. What it
   returned; or, if a context was done first, that one's err, once `fn` has returned. Nothing runs if one is done
   already. */
CTXCANCEL_API int ctx_run_either(ctx_t *a, ctx_t *b, ctx_task_fn fn, void *arg);

/* == 11. channel ================================================== */

typedef struct ctx_chan ctx_chan_t;

/* Make a queue of up to `capacity` items of `item_size` bytes, copied in and out. With capacity 0 a send waits for its
   receive. Any number of threads may send and receive. NULL with errno set if memory is short. */
CTX__MUST_USE
CTXCANCEL_API ctx_chan_t *ctx_chan_new(size_t item_size, size_t capacity);

/* Put a copy of `*item` in, waiting for room until `ctx` is done; senders that wait are served in order. Returns 0,
   CTX_CLOSED, or the error of `ctx`, which is checked first. On any error the item was not sent. */
CTXCANCEL_API int ctx_chan_send(ctx_chan_t *chan, ctx_t *ctx, const void *item);

/* Take the oldest item out into `*item`, waiting for one until `ctx` is done. Returns 0, CTX_CLOSED once the channel
   is closed and empty, or the error of `ctx`, which is checked first. On any error nothing was taken: an item is
   received exactly once or is still in the channel. `item` may be NULL if its bytes do not matter. A thread that has
   received the last item, or CTX_CLOSED, may free the channel: see ctx_chan_free(). */
CTXCANCEL_API int ctx_chan_recv(ctx_chan_t *chan, ctx_t *ctx, void *item);

/* The same without waiting: CTX_QUEUE_FULL when there is no room, CTX_NOT_READY when there is nothing to take. */
CTXCANCEL_API int ctx_chan_try_send(ctx_chan_t *chan, const void *item);
CTXCANCEL_API int ctx_chan_try_recv(ctx_chan_t *chan, void *item);

/* Say that nothing more will be sent. Whoever waits to send gets CTX_CLOSED, and so does whoever receives, once what
   is in the channel has been taken. Closing again is CTX_CLOSED. */
CTXCANCEL_API int ctx_chan_close(ctx_chan_t *chan);

/* How many items are in the channel; those of senders that wait do not count. */
CTX__NONNULL(1)
CTXCANCEL_API size_t ctx_chan_len(const ctx_chan_t *chan);

/* A file descriptor that is readable while a receive would not wait: there is an item, a thread waits to send (with
   capacity 0), or the channel is closed. For poll, epoll, select and event loops: when it is readable, call
   ctx_chan_try_recv(), and do not read the descriptor itself. It is level-triggered: with EPOLLET receive until
   CTX_NOT_READY. Other receivers may be faster, so the receive may find nothing all the same.
   When no call is under way it is readable exactly if a receive would not wait.
   Made by the first call, owned by the channel and closed by ctx_chan_free(), and inherited by no exec. In the child of
   a fork it is the parent's, as the channel is. From then on the channel costs a system call each time it becomes
   empty or stops being empty; channels without a descriptor cost what they did.
   Returns CTX_INVALID if `chan` is NULL, or a negative error of the system, CTX_NO_MEMORY included, if there is none to
   be had. */
CTXCANCEL_API int ctx_chan_fd(ctx_chan_t *chan);

/* Free a channel; items in it are discarded. No other thread may use it any more. But calls whose effect the caller has
   seen need not have returned: the send whose item it received, the receive that took its item in a channel of capacity
   0, and the close after which a call gave CTX_CLOSED. They touch the channel no more. NULL is fine. */
CTXCANCEL_API void ctx_chan_free(ctx_chan_t *chan);

enum { CTX_RECV, CTX_SEND };

/* One of the things that a select may do. */
typedef struct {
    ctx_chan_t *chan; /* NULL: never happens */
    int op;           /* CTX_RECV or CTX_SEND */
    void *item;       /* where to receive, or what to send */
    int rc;           /* set if this one happened: 0 or CTX_CLOSED */
} ctx_case_t;

/* Do exactly one of `n` sends and receives, waiting until one can be done or `ctx` is done. Returns the index of the
   one that happened, or the error of `ctx`, which is checked first. If several can be done, each is as likely. A
   closed channel can: see `rc`. CTX_NO_MEMORY is possible with more than 16 cases. */
CTXCANCEL_API int ctx_select(ctx_t *ctx, ctx_case_t *cases, size_t n);

/* The same without waiting: returns CTX_NOT_READY if, at some moment of the call, none could be done. */
CTXCANCEL_API int ctx_try_select(ctx_case_t *cases, size_t n);

/* What a stage does when its context is done. */
typedef enum {
    CTX_CANCEL_DROP,  /* stop: what was not received stays in `.in` */
    CTX_CANCEL_DEAD_LETTER, /* stop, and hand what is in `.in`, or waits to be sent there, to `.dead_letter` */
    CTX_CANCEL_FINISH       /* go on until `.in` is closed and empty, for `.finish_budget` at most; then as
                               CTX_CANCEL_DEAD_LETTER */
} ctx_on_cancel_t;

typedef struct {
    ctx_chan_t *in;            /* where items come from */
    ctx_chan_t *out;           /* where results go; closed when the stage ends (default: nowhere) */
    int workers;               /* threads that run `fn` (default: 1) */
    bool ordered;              /* results leave in the order in which their items came (default: false) */
    int (*fn)(ctx_t *ctx, const void *in, void *out, void *user); /* 0: send `*out` on (NULL without `.out`); positive:
                                  skip this item; negative: stop the stage with this error. `ctx` is done when the stage
                                  shall stop: with CTX_CANCEL_FINISH only after the budget */
    ctx_on_cancel_t on_cancel; /* (default: CTX_CANCEL_DROP) */
    void (*dead_letter)(const void *item, int reason, void *user); /* takes each item that was received, but neither
                                  sent on nor skipped, one call at a time; `item` is what came in (default: none) */
    ctx_dur_t finish_budget;   /* how long CTX_CANCEL_FINISH goes on (default: 0, not at all) */
    void *user;                /* for fn and dead_letter */
} ctx_stage_desc_t;

/* Run one step of a pipeline: receive items, call `fn`, send results, until `.in` is closed and empty; close `.out`;
   return when every worker has. The caller is one of them, save with CTX_CANCEL_FINISH; if threads cannot be had there
   are fewer. `fn` runs in several threads if there are several workers.
   Returns 0 if `.in` is closed and all items went through, even if `ctx` was done meanwhile; else the error of `fn`;
   CTX_CLOSED if another thread closed `.out`; the error of `ctx`; CTX_NO_MEMORY; CTX_INVALID, which leaves `.out` open.
   Each item goes on, is skipped or becomes a dead letter, exactly once; or it stays in `.in`. A dead letter's reason is
   what stopped the stage, for items in hand what stopped their own worker. After an error of `fn` CTX_CANCEL_DROP and
   CTX_CANCEL_DEAD_LETTER mean the same as after a cancel, and CTX_CANCEL_FINISH is like CTX_CANCEL_DEAD_LETTER.
   For a pipeline run each stage as a task of one group: the first that fails stops the others. All should have the same
   `.on_cancel`, and with CTX_CANCEL_FINISH later ones a longer budget. If the group is on a pool, the first stage that
   begins has threads beside the pool run the group's other tasks, because they wait for each other; if no thread can be
   created they wait for a worker. So add the stages before the tasks that feed them. */
CTXCANCEL_API int ctx_stage_run(ctx_t *ctx, const ctx_stage_desc_t *desc);

/* == 12. flow ===================================================== */

typedef struct ctx_batch ctx_batch_t;

typedef struct {
    const char *name;    /* for people; static (default: "batch") */
    size_t item_size;    /* bytes of an item */
    size_t max_items;    /* flush when so many have come (default: 100) */
    ctx_dur_t max_delay; /* flush so long after the first came (default: 0, never: only at max_items,
                            on request and in a drain) */
    size_t queue;        /* items that may wait, those being flushed not counted; max_items at least (default:
                            4 * max_items) */
    int (*flush)(ctx_t *ctx, const void *items, size_t n, void *user); /* write `n` items, 1 to max_items, in the order
                            of their adding; 0 is success. One call at a time, but a call that drains the batcher does
                            not count. `ctx` is done when the lifetime is, when the budget of a drain has passed, and
                            when a drain returns */
    int retries;         /* how often a failed flush is tried again, at once and with the same items (default: 0; for
                            waits between use ctx_retry() in flush) */
    void (*on_drop)(const void *items, size_t n, int reason, void *user); /* takes what will not be flushed; reason: the
                            last error of flush, CTX_DEADLINE_EXCEEDED (the budget of the drain), or the err of the
                            lifetime, which then calls it from whoever ended that. Not at the same time as flush, unless
                            that is stuck or drains (default: nothing is called) */
    void *user;          /* for flush and on_drop; must live until a stuck flush has returned */
    ctx_pool_t *pool;    /* flush runs here; must outlive the batcher (default: on an idle thread, made as needed) */
    ctx_dur_t grace;     /* how long a canceled flush gets to stop in a drain (default: 100 ms; negative: none) */
} ctx_batch_desc_t;

/* Make a batcher below `lifetime`: many small adds become few large flushes. Every item that was added reaches exactly
   one of flush and on_drop. A batcher whose items must survive a Ctrl-C lives below the background, and is drained
   after it. No thread starts before there is something to flush. NULL with errno set if memory is short or an argument
   is bad: `item_size` and `flush` are needed. */
CTX__MUST_USE
CTXCANCEL_API ctx_batch_t *ctx_batch_new(ctx_t *lifetime, const ctx_batch_desc_t *desc);

/* Add a copy of `*item`. Never waits. 0, CTX_QUEUE_FULL, CTX_CLOSED when the batcher is draining, the err of the
   lifetime, or CTX_NO_MEMORY if a delay is wanted and the runtime thread is unavailable. */
CTX__MUST_USE
CTXCANCEL_API int ctx_batch_add(ctx_batch_t *batch, const void *item);

/* The same, but waits for room until `ctx` is done, then returns its err. In flush and on_drop, which would wait for
   themselves, it returns CTX_QUEUE_FULL instead of waiting. */
CTX__MUST_USE
CTXCANCEL_API int ctx_batch_add_wait(ctx_batch_t *batch, ctx_t *ctx, const void *item);

/* Have everything that was added so far flushed soon. Does not wait. 0, or as for ctx_batch_add(). */
CTXCANCEL_API int ctx_batch_flush(ctx_batch_t *batch);

/* What became of the items that a batcher took in its life. Their sum is that number. */
typedef struct {
    uint64_t flushed; /* a flush that returned 0 had them */
    uint64_t dropped; /* went to on_drop */
    uint64_t stuck;   /* in a flush that still runs */
    ctx_dur_t took;   /* how long the drain took */
} ctx_batch_report_t;

/* Refuse new items, and flush those that are left. Items that are not flushed within `budget` go to on_drop. A flush
   that still runs then is canceled and given the grace period. If it is stuck it is abandoned with its items, which go
   to on_drop if it later fails. Returns 0 if the budget was met, even if flushes failed, else CTX_DEADLINE_EXCEEDED.
   From its beginning on, adds get CTX_CLOSED. If no thread is available, flush runs in this call, with a context whose
   deadline is the end of the budget; then only a flush that ignores its context holds the drain up. May be called from
   flush and on_drop. Such a drain does not wait for that call, whose items are in the report as stuck or dropped. The
   items that wait behind it are flushed by another thread before the drain returns, or dropped. May be called again,
   from several threads. `report` may be NULL. */
CTXCANCEL_API int ctx_batch_drain(ctx_batch_t *batch, ctx_dur_t budget, ctx_batch_report_t *report);

/* Free a batcher. If it was not drained it is drained first, with no budget. Does not wait for a flush that is stuck,
   nor for the call of flush or on_drop that it is called from: their items stay valid until they return. No other
   thread may be using the batcher, except those that wait in ctx_batch_add_wait(), which get CTX_CLOSED. NULL is
   fine. */
CTXCANCEL_API void ctx_batch_free(ctx_batch_t *batch);

/* Storage for a rate limiter: a token bucket. It never holds more than its burst, whoever gives up or gives back. The
   fields are private. */
typedef struct {
    int64_t full_at; /* [atomic] when the bucket would be full if nothing more were taken */
    int64_t cost;    /* [const] nanoseconds for one token */
    int64_t burst;   /* [const] */
    int64_t bucket;  /* [const] the cost of a burst */
    uint32_t mu;
    unsigned forks;        /* [mu] as for pools */
    ctx__queue_t waiters;  /* [mu] in the order of their places */
} ctx_limiter_t;

/* Make a limiter of `per_second` tokens a second (each costs a whole number of nanoseconds), whose bucket holds `burst`
   and is full at first. 0; CTX_INVALID unless 0 < per_second <= 1e7 and 1 <= burst <= 1e9. A bucket that would take
   more than a century to fill fills in a century. Holds no memory. */
CTX__NONNULL(1)
CTXCANCEL_API int ctx_limiter_init(ctx_limiter_t *limiter, double per_second, int64_t burst);

/* Take `n` tokens if they are there now. One look at the clock and one atomic operation. */
CTX__NONNULL(1)
CTXCANCEL_API bool ctx_limiter_allow(ctx_limiter_t *limiter, int64_t n);

/* Take `n` tokens, waiting for them until `ctx` is done. Threads that wait are served in order. Returns 0. On an error
   no tokens are taken, and the waits behind this one move up, except behind a reservation: returns ctx_err(ctx) if
   `ctx` is done; or, without waiting, CTX_DEADLINE_EXCEEDED unless the tokens come before its deadline, CTX_INVALID if
   `n` is negative or exceeds the burst. */
CTX__NONNULL(1)
CTXCANCEL_API int ctx_limiter_wait(ctx_limiter_t *limiter, ctx_t *ctx, int64_t n);

/* Take `n` tokens on credit, behind the threads that wait, and return how long to wait before acting on them: 0 or
   more; CTX_INVALID as above. */
CTX__NONNULL(1)
CTXCANCEL_API ctx_dur_t ctx_limiter_reserve(ctx_limiter_t *limiter, int64_t n);

/* Give back `n` tokens that were taken or reserved, but not acted on. They count as the ones taken last, and as free
   from now on, so give them back soon: they move up the threads that wait, and what the bucket cannot hold is lost. */
CTX__NONNULL(1)
CTXCANCEL_API void ctx_limiter_refund(ctx_limiter_t *limiter, int64_t n);

typedef struct {
    int attempts;   /* how often to try at most (default: 3; negative: until `ctx` is done) */
    ctx_dur_t base; /* the wait after the first failure (default: 100 ms) */
    ctx_dur_t cap;  /* the longest wait (default: 10 s) */
    double factor;  /* each wait is so many times the one before; 1 at least (default: 2) */
    double jitter;  /* which part of each wait is random, 0 to 1: 0.5 waits between half and all (default: 0) */
    bool (*retryable)(int rc, void *arg); /* whether to try again after this error (default: after every one) */
    ctx_dur_t attempt_timeout; /* each attempt gets a child of `ctx` that is canceled so long after the attempt began,
                     and ended when it returns; negative: already expired (default: 0, none; then `fn` gets `ctx`
                     itself) */
    int (*on_retry)(int attempt, int rc, ctx_dur_t *wait, void *arg); /* called after `.retryable`, before each wait
                     and before giving up one that would not end before the deadline: attempt number `attempt`, counted
                     from 1, has returned `rc`. May change `*wait`, also beyond `.cap`, as a
                     Retry-After asks; negative is 0, and the waits after it are not changed. Not 0: do not try again
                     (default: none) */
} ctx_retry_desc_t;

/* Call `fn(ctx, arg)` until it returns 0, with exponential backoff between. Returns the last result of `fn`: it stops
   after 0, after an error that is not retryable, after the last attempt, if on_retry returns other than 0, and if the
   next wait, which on_retry may have changed, would not end before the deadline of `ctx`. Returns ctx_err(ctx) if `ctx`
   is done before the first attempt, or canceled before or during a wait, which it cuts short.
   An attempt that runs into its own `.attempt_timeout` is retried like any other: what `fn` returns then, such as
   CTX_DEADLINE_EXCEEDED, is an error as any. An attempt whose context cannot be made counts as one that has returned
   CTX_NO_MEMORY. `desc` may be NULL. */
CTXCANCEL_API int ctx_retry(ctx_t *ctx, const ctx_retry_desc_t *desc, ctx_task_fn fn, void *arg);

/* == 13. system =================================================== */

/* Make a child of `parent` that the first of these signals cancels: ctx_cause() has the signal's number as code and its
   name, "SIGTERM", as text. That first one also restores the default action, so that a second one ends the process.
   The signal is handled on a thread of its own. Several such contexts may be live, for the same signals or others:
   each is canceled. When the last one for a signal has ended, the action that stood before comes back.
   A signal that every thread blocks cancels nothing.
   Returns a failed context with CTX_INVALID if `n` is 0 or one of them cannot be caught, CTX_NO_MEMORY if memory or the
   signal thread is unavailable, or CTX_ALREADY if another copy of this library in the process (CTXCANCEL_STATIC, or a
   plugin's own) has such contexts or registrations of ctx_on_signals() at the moment. */
#define ctx_notify_signals(parent, ...) ctx_notify_signals_at((parent), __VA_ARGS__, CTX__SITE)
CTX__MUST_USE
CTXCANCEL_API ctx_t *ctx_notify_signals_at(ctx_t *parent, const int *signals, size_t n, const char *site);

/* Storage for one registration: yours, on the stack or inside your own struct. The fields are private. */
typedef struct {
    void (*fn)(int signal, void *user);
    uint64_t wants[2];  /* [const] a bit per signal */
    uint64_t due[2];    /* [ctx__life] the signals that it has yet to be told of */
    ctx__link_t link;   /* [ctx__life] pprev NULL: not registered */
    ctx_on_done_t call; /* in no list: its address stands for a call of fn. Has `user`, the context and the thread */
} ctx_on_signals_t;

/* Call `fn(signal, user)` for each of these signals that comes, until `ctx` is done or ctx_on_signals_stop(). For what
   a signal asks for again and again, such as a reload on SIGHUP. A signal that comes while `fn` runs is remembered,
   each kind once, as the system itself does. One `fn` runs at a time, on the signal thread, with no lock held. It may
   call any function here, even stop `reg` or cancel `ctx`, but must be short: other signals wait for it, and so do the
   cancels of ctx_notify_signals() for the same one, which follow.
   Until it is stopped, not merely until `ctx` is done, the signal never ends the process, even if contexts wait for it
   too. The action that stood before comes back with the last registration and context that asked for the signal. A
   registration also lives on after ctx_runtime_stop(). After fork() the child keeps those that the forking thread made.
   `reg` need not be initialised, but must not be registered. Stop it with ctx_on_signals_stop() before its storage
   goes, even if `ctx` is done. It
   holds the memory of `ctx` until then.
   Returns 0. On an error nothing is registered: returns CTX_INVALID if `n` is 0, a signal cannot be caught or an
   argument is NULL; ctx_err(ctx) if `ctx` is done; CTX_NO_MEMORY or CTX_ALREADY as ctx_notify_signals(). */
CTXCANCEL_API int ctx_on_signals(ctx_on_signals_t *reg, ctx_t *ctx, const int *signals, size_t n,
                                 void (*fn)(int signal, void *user), void *user);

/* Unregister. If `fn` is running on the signal thread, waits for it to finish; afterwards `reg` and `user` may be
   reused or freed. Called from inside `fn`, or from a callback that `fn` waits for, returns at once. If `fn` registers
   `reg` anew meanwhile, that registration is the one that is stopped. Does nothing for a `reg` that is zeroed, was
   stopped before, or could not be registered. Do not hold a lock across this call that `fn` takes: then each waits for
   the other. */
CTXCANCEL_API void ctx_on_signals_stop(ctx_on_signals_t *reg);

/* Wait until `fd` is ready for one of `events` (POLLIN, POLLOUT and so on, as for poll()) or `ctx` is done. Returns the
   events that are ready, more than 0: POLLERR, POLLHUP and POLLNVAL may be among them, asked for or not. Otherwise
   returns the error of `ctx`, which is checked first; -EBADF if `fd` is negative; or a negative error of poll(). Never
   -EINTR.
   A descriptor that is ready costs one system call. No context gets a descriptor for this, unlike with ctx_done_fd():
   each thread that waits has one, made at its first wait and closed when the thread ends or calls ctx_runtime_stop();
   it is inherited by no exec.
   If none is to be had the wait looks at `ctx` every millisecond. */
CTXCANCEL_API int ctx_poll_fd(ctx_t *ctx, int fd, short events);

/* == 14. service ================================================== */

/* What became of one component in a shutdown. Times count from its beginning; negative: it did not happen. */
typedef struct {
    const char *name;
    ctx_dur_t began_at;    /* its turn came: what depends on it had stopped */
    ctx_dur_t noticed_at;  /* it first reacted: a callback of its own had returned, or `run` had */
    ctx_dur_t drained_at;  /* `drain` returned */
    ctx_dur_t canceled_at; /* its context was canceled */
    ctx_dur_t forced_at;   /* `force` was called */
    ctx_dur_t finished_at; /* everything of it had returned */
    int rc;                /* of a service the first error of its callbacks, of a cleanup what `fn` returned */
    uint64_t dropped;      /* by pools and batchers that its callbacks drained, and what they said themselves */
    uint64_t stuck;        /* tasks of pools that its callbacks drained, and items of batchers, that still ran then */
    bool not_started;      /* or its start has failed */
    bool late;             /* it was not finished when the report was made: it is stuck, or goes on in the background */
} ctx_shutdown_part_t;

#define CTX_SHUTDOWN_PARTS 64

/* How a shutdown went. */
typedef struct {
    const char *cause;  /* "SIGTERM", the text of another cancel, or the name of the component that failed; "request" of
                           ctx_service_stop(), "cleanup" of ctx_cleanup_run() */
    int rc;             /* what the call returned */
    ctx_dur_t budget;
    ctx_dur_t took;
    bool within_budget; /* everything stopped inside the budget: no component is late, and what components drained has
                           left no task and no flush running. The latter does not change `rc` */
    bool forced;        /* a second signal came */
    ctx_dur_t lame_duck; /* how long the readiness was off before the first component was told */
    size_t total;       /* components */
    size_t late;        /* of these, not finished */
    uint64_t dropped;   /* in all */
    uint64_t stuck;     /* in all: tasks and items, as in the parts */
    size_t n;           /* parts that follow: min(total, CTX_SHUTDOWN_PARTS), the late and the slowest of them, in the
                           order in which their turn came */
    ctx_shutdown_part_t parts[CTX_SHUTDOWN_PARTS];
} ctx_shutdown_report_t;

/* Draw a report as text: a line of facts, then a time line for each component. 0, or the system's error. */
CTXCANCEL_API int ctx_shutdown_print(const ctx_shutdown_report_t *report, FILE *file);

/* In a callback of a service or a cleanup: say that `n` pieces of accepted work were dropped, for the report. What
   ctx_pool_drain() and ctx_batch_drain() drop there is counted by itself. Elsewhere it does nothing. */
CTXCANCEL_API void ctx_shutdown_dropped(uint64_t n);

typedef struct ctx_service ctx_service_t;

/* A component: what it is called, what runs in it, how it stops. All callbacks may be NULL. */
typedef struct {
    const char *name;                         /* static; unique within an app (default: "service") */
    int (*start)(ctx_t *ctx, void *user);     /* make it ready; 0, or an error: then the rest is never called */
    int (*run)(ctx_t *ctx, void *user);       /* its work, on a thread of its own, until `ctx` is done; an error
                                                 (not the err of `ctx`) cancels its siblings, the services below the
                                                 same parent; an app shuts down in order instead */
    void (*refuse)(void *user);               /* accept no more; returns at once. Without a `drain`, the context of
                                                 `run` is canceled right after it */
    int (*drain)(ctx_t *ctx, void *user);     /* finish what was accepted; `ctx` has the deadline, and is not
                                                 done before that unless a second signal comes. Also called if a
                                                 stop came before `run` */
    void (*force)(void *user);                /* the last resort, if `run` or `drain` goes on after the grace period */
    void *user;                               /* for all callbacks; must live until they have returned */
    ctx_dur_t drain_budget;                   /* how long `drain` may take (default: what the stop has) */
    ctx_dur_t grace;                          /* how long it gets to stop once canceled (default: 100 ms; negative:
                                                 none) */
    const char *const *needs;                 /* names of the services that it needs, ended by NULL: it starts after
                                                 them and stops before them; but when it is stuck they stop although it
                                                 may still call them. For apps (default: none) */
} ctx_service_desc_t;

/* Make a service below `parent`; when that is done, so is the context of `run`. NULL with errno set if memory is short
   or an argument is bad. */
CTX__MUST_USE
CTXCANCEL_API ctx_service_t *ctx_service_new(ctx_t *parent, const ctx_service_desc_t *desc);

/* Call `start` here, then `run` on its thread. Returns 0, the error of `start`, the err of the parent, or CTX_NO_MEMORY
   if memory or a thread is unavailable; CTX_ALREADY if it was started before, CTX_CLOSED if it was stopped. After an
   error it may be started again. */
CTXCANCEL_API int ctx_service_start(ctx_service_t *service);

/* Stop in phases: refuse; drain, for `.drain_budget` and at most until the grace period (but not more than half the
   budget) before the end; cancel; and if it still goes on after the grace period, force. Each callback is called at
   most once, and in this order. Each runs on a thread of its own, so none can hold this up: it returns when all have,
   after budget + grace at the latest. A stop needs neither memory nor threads: when no thread can be had the callbacks
   of all services run one after the other on one that is there since the start, where a stuck one makes those behind it
   late. Returns CTX_DEADLINE_EXCEEDED if it was not finished inside the budget, else the first error of `run` or
   `drain`, else 0. Any number of callers, at any time, wait for the one stop and get its result; a callback of the
   service's own may be one of them, and is not waited for then. One that was never started is stopped at once. A start
   that is under way has its context canceled and, if it goes well before the stop is over, is refused and drained; it
   is never forced before. `report` may be NULL. */
CTXCANCEL_API int ctx_service_stop(ctx_service_t *service, ctx_dur_t budget, ctx_shutdown_report_t *report);

/* Stop with no budget unless that is done, and free. What a stuck `run` touches of it lives until that ends. NULL is
   fine. */
CTXCANCEL_API void ctx_service_free(ctx_service_t *service);

typedef struct ctx_app ctx_app_t;

typedef struct {
    const int *signals;           /* what ends the app; ends with 0 (default: SIGTERM and SIGINT) */
    ctx_dur_t lame_duck;          /* how long to work on with the readiness off, until load balancers have noticed; part
                                     of the budget (default: 0) */
    ctx_dur_t budget;             /* for the whole shutdown, lame_duck included (default: 25 s) */
    void (*on_force)(void *user); /* called when a second signal comes or the budget has passed, on a thread of its own.
                                     Components are forced when it has returned, or when the longest of their grace
                                     periods is over (default: none) */
    void *user;                   /* for on_force; must live until that has returned */
    ctx_shutdown_report_t *report;       /* filled in (default: none) */
} ctx_app_desc_t;

/* Make an app: services that start and stop together. It takes over values of `parent`, and shuts down in order when
   that is done. NULL with errno set if memory is short. */
CTX__MUST_USE
CTXCANCEL_API ctx_app_t *ctx_app_new(ctx_t *parent);

/* Add a service, before ctx_app_run(). 0, CTX_NO_MEMORY; CTX_INVALID if the name is missing or taken. */
CTXCANCEL_API int ctx_app_add(ctx_app_t *app, const ctx_service_desc_t *desc);

/* Start the services, each after those that it needs; wait for a signal, the end of the parent, or the first failure of
   a component (one whose `run` returns 0 is merely done); then turn the readiness off, wait for `.lame_duck`, and stop
   them, each as ctx_service_stop() does, all inside one budget: a service stops when those that need it have stopped or
   are overdue after their grace periods, or when it must begin to be in time. Once the budget has passed, or a second
   signal came, all that are left are canceled and forced, without refuse and drain if their turn had not come: what
   must be written belongs into a cleanup. Further signals change nothing; afterwards their old actions are back.
   Returns after the budget and the longest grace period at the latest, and frees the app. The first failure of a
   component (of its start, run or drain, also of a drain that was cut off); else CTX_DEADLINE_EXCEEDED if something
   did not stop inside the budget; else 0. At once CTX_INVALID if an `.needs` names no service or goes in a circle, or a
   signal cannot be caught, or CTX_NO_MEMORY. `desc` may be NULL. */
CTXCANCEL_API int ctx_app_run(ctx_app_t *app, const ctx_app_desc_t *desc);

/* A context that is done when the shutdown begins, before the wait as a lame duck: for work outside its services, such
   as watches, or a registration of ctx_on_signals(). Has the values of the app's parent, and then the cause of the
   shutdown, as the report. Live before ctx_app_run(); canceled by ctx_app_free(). Its callbacks run on the thread of
   ctx_app_run(), inside the budget, so they must be short. Borrowed: valid until the app is freed, and for services of
   the app until they have returned; ctx_retain() keeps it for longer. */
CTXCANCEL_API ctx_t *ctx_app_ctx(ctx_app_t *app);

/* For a health check in one of its services: everything has started and no shutdown has begun. False in a service that
   goes on after the app was freed. Other threads must not call it once ctx_app_run() may have returned. */
CTXCANCEL_API bool ctx_app_ready(const ctx_app_t *app);

/* Free an app that is not to be run. NULL is fine. */
CTXCANCEL_API void ctx_app_free(ctx_app_t *app);

/* Work for the end of a program. Storage for it must be zeroed at first: `ctx_cleanup_t c = { 0 };`. The fields are
   private. */
typedef struct {
    struct ctx__stop *run; /* under way, which takes what is added meanwhile */
    ctx__queue_t items;
} ctx_cleanup_t;

typedef struct {
    const char *name;   /* for people; static (default: "cleanup") */
    ctx_task_fn fn;     /* gets a context of its own, which nothing else cancels */
    void *arg;
    ctx_dur_t timeout;  /* how long it may take before its context is done (default: the budget of the run) */
    bool critical;      /* locks, leases and the like: runs before the others (default: false) */
    void (*on_late)(const char *name, int rc, ctx_dur_t took, void *arg); /* called when it returns after
                           ctx_cleanup_run() has: in the background, on the thread of `fn` (default: none) */
} ctx_cleanup_desc_t;

/* Register one. One that is added while they run, by a cleanup for example, joins them. Returns 0, CTX_INVALID, or
   CTX_NO_MEMORY if memory is short or the thread for those that get none of their own cannot be had. From any
   thread. */
CTXCANCEL_API int ctx_cleanup_add(ctx_cleanup_t *cleanup, const ctx_cleanup_desc_t *desc);

/* Run all that were added: the critical ones at once and side by side, the others side by side when those have returned
   or have had their deadline. Returns when all have, but after `budget` at the latest: the rest finishes in the
   background. When no thread can be had they run one after the other on one that is there since they were added.
   Returns 0, the first error, or CTX_DEADLINE_EXCEEDED if some are late. Each runs exactly once; afterwards the storage
   is as new. `report` may be NULL. */
CTXCANCEL_API int ctx_cleanup_run(ctx_cleanup_t *cleanup, ctx_dur_t budget, ctx_shutdown_report_t *report);

#ifdef __cplusplus
}
#endif

#endif /* CTXCANCEL_H */

#ifdef CTXCANCEL_IMPLEMENTATION
#ifndef CTX__IMPLEMENTED
#define CTX__IMPLEMENTED

#ifdef __cplusplus /* what follows is C, whose casts C++ can be asked to mind */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuseless-cast"
#endif
#endif

#if defined(__linux__) && defined(__GLIBC__) && !defined(__USE_XOPEN2K8)
#error "ctxcancel.h: include the implementation before any system header, or compile with -D_DEFAULT_SOURCE"
#endif

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#if !defined(__USE_MISC) && \
    (defined(__GLIBC__) || !(defined(_GNU_SOURCE) || defined(_BSD_SOURCE) || defined(__ANDROID__)))
/* A system header was included before with only POSIX asked for, and POSIX has no system calls. */
long syscall(long number, ...);
#endif
#endif

#if defined(CTXCANCEL_MALLOC) && defined(CTXCANCEL_REALLOC) && defined(CTXCANCEL_FREE)
#elif !defined(CTXCANCEL_MALLOC) && !defined(CTXCANCEL_REALLOC) && !defined(CTXCANCEL_FREE)
#define CTXCANCEL_MALLOC(size) malloc(size)
#define CTXCANCEL_REALLOC(ptr, size) realloc(ptr, size)
#define CTXCANCEL_FREE(ptr) free(ptr)
#else
#error "ctxcancel.h: define all of CTXCANCEL_MALLOC, CTXCANCEL_REALLOC and CTXCANCEL_FREE, or none"
#endif

/* stb_ds.h, instantiated here unless the program has done so: elsewhere (CTXCANCEL_NO_STB_DS_IMPLEMENTATION) or above
   in this file, which its private macro tells. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wundef"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wpedantic"
#if !defined(CTXCANCEL_NO_STB_DS_IMPLEMENTATION) && !defined(STBDS_BUCKET_LENGTH) && \
    !(defined(INCLUDE_STB_DS_H) && defined(STB_DS_IMPLEMENTATION))
#ifndef STB_DS_IMPLEMENTATION
#define STB_DS_IMPLEMENTATION
#define CTX__STB_DS_IMPLEMENTATION
#if !defined(STBDS_REALLOC) && !defined(INCLUDE_STB_DS_H)
#define STBDS_REALLOC(context, ptr, size) CTXCANCEL_REALLOC(ptr, size)
#define STBDS_FREE(context, ptr) CTXCANCEL_FREE(ptr)
#endif
#endif
#endif
#if !defined(INCLUDE_STB_DS_H) || defined(CTX__STB_DS_IMPLEMENTATION)
#if defined(CTXCANCEL_STATIC) && defined(CTX__STB_DS_IMPLEMENTATION) && !defined(INCLUDE_STB_DS_H)
/* Declared static first, its functions stay private to this file, so that several such files link together. */
#ifdef __cplusplus
extern "C" {
#endif
struct stbds_string_arena;
static char *stbds_stralloc(struct stbds_string_arena *a, char *str);
static void stbds_strreset(struct stbds_string_arena *a);
static void *stbds_arrgrowf(void *a, size_t elemsize, size_t addlen, size_t min_cap);
static void stbds_arrfreef(void *a);
static void stbds_hmfree_func(void *p, size_t elemsize);
static void *stbds_hmget_key(void *a, size_t elemsize, void *key, size_t keysize, int mode);
static void *stbds_hmget_key_ts(void *a, size_t elemsize, void *key, size_t keysize, ptrdiff_t *temp, int mode);
static void *stbds_hmput_default(void *a, size_t elemsize);
static void *stbds_hmput_key(void *a, size_t elemsize, void *key, size_t keysize, int mode);
static void *stbds_hmdel_key(void *a, size_t elemsize, void *key, size_t keysize, size_t keyoffset, int mode);
static void *stbds_shmode_func(size_t elemsize, int mode);
static void stbds_rand_seed(size_t seed);
static size_t stbds_hash_bytes(void *p, size_t len, size_t seed);
static size_t stbds_hash_string(char *str, size_t seed);
#ifdef __cplusplus
}
#endif
#endif
#if defined(__has_include)
#if __has_include("stb_ds.h")
#include "stb_ds.h"
#elif __has_include(<stb/stb_ds.h>)
#include <stb/stb_ds.h>
#else
#error "ctxcancel.h: stb_ds.h not found: install libstb-dev, or put the file beside this one"
#endif
#else
#include "stb_ds.h"
#endif
#endif
#ifdef CTX__STB_DS_IMPLEMENTATION
#undef STB_DS_IMPLEMENTATION
#endif
#pragma GCC diagnostic pop

#ifdef __cplusplus
extern "C" {
#endif

/* == 1. platform ================================================== */

/* Everything that knows the compiler and the operating system: atomics, the lock, the parker, threads, the clock, file
   descriptors to poll.

   Threads share memory through one vocabulary and no other way: the macros below and, built on them, the lock, the
   parker, the clock, the start and the join of a thread. In a normal build each is the builtin or the call that it
   names. With CTXCANCEL_TEST_SCHED each calls a scheduler first, which lets one thread run at a time and so walks
   through the interleavings of the real code: tests/sched/ has it.

   The one lock is a word that is taken by an exchange and given back by a plain store. It guards a few pointers at a
   time, never a system call that may block and never foreign code, so a waiter spins a little, then yields, then naps:
   half the price of a lock that knows its waiters, and no wake-up that could be lost. The exchange is sequentially
   consistent because some readers look at the lock word instead of taking it: see section 3.

   The one parker is a word too: EMPTY, PARKED (its owner sleeps on it) or SET. unpark() sets it and pays for a system
   call only if it was PARKED; the system call uses the word's address but not its memory, which may be gone by then.
   COUNTED is PARKED for a thread that ctx_clock_auto() counts: section 2. The upper bits say in which era of that clock
   the word was last changed by another thread.
   Below it is futex on Linux, else a small table of mutexes and condition variables picked by address.

   The one mutex, for what is held over a call of the system, is such a word again: its waiters sleep. They are inside,
   so a fork waits for its holder too.

   Each thread has a record in thread-local storage: a number that spreads threads over shards, a few free nodes and
   value records, and what other threads must know of it: whether it is inside the library, and whether it walks. The
   records of all threads are linked, and a key's destructor unlinks that of a thread that ends.

   No thread is inside the library while the process forks. A thread is inside between ctx__enter() and ctx__leave(),
   which are the lock and the unlock of all that outlives a fork: it raises `inside` in its record, looks whether the
   gate is closed, and only then takes the lock; a fork closes the gate, and waits until no thread is inside. One of the
   two sees the other, for a fence stands between the two accesses of each: on Linux the fork has the system run one on
   every processor that is at this program, so that nobody else pays for it; elsewhere each thread brings its own. A
   thread that finds the gate closed goes back out and sleeps until the fork is over. Callbacks, the allocator and
   everything else that is not the library's run outside. */

#if defined(__SANITIZE_ADDRESS__)
#define CTX__ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CTX__ASAN 1
#endif
#endif
#ifndef CTX__ASAN
#define CTX__ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#define CTX__TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CTX__TSAN 1
#endif
#endif
#ifndef CTX__TSAN
#define CTX__TSAN 0
#endif

#define CTX__UNUSED __attribute__((unused))
#ifdef __cplusplus
#define CTX__NOEXCEPT noexcept
#else
#define CTX__NOEXCEPT
#endif
#define CTX__COLD __attribute__((cold, noinline))
#define CTX__INLINE inline __attribute__((always_inline))
#define CTX__LINE 64 /* bytes of a cache line */
#define CTX__ALIGNED __attribute__((aligned(CTX__LINE)))
#define CTX__UNLIKELY(x) __builtin_expect(!!(x), 0)
#define CTX__LIKELY(x) __builtin_expect(!!(x), 1)
#define CTX__CONTAINER(ptr, type, field) ((type *)(void *)((char *)(ptr)-offsetof(type, field)))

#define CTX__STORE(word, value, order) (CTX__STEP("store", word) __atomic_store_n(word, value, __ATOMIC_##order))
#define CTX__EXCHANGE(word, value, order) \
    (CTX__STEP("exchange", word) __atomic_exchange_n(word, value, __ATOMIC_##order))
#define CTX__ADD(word, value, order) (CTX__STEP("add", word) __atomic_fetch_add(word, value, __ATOMIC_##order))
#define CTX__SUB(word, value, order) (CTX__STEP("sub", word) __atomic_fetch_sub(word, value, __ATOMIC_##order))
#define CTX__OR(word, value, order) (CTX__STEP("or", word) __atomic_fetch_or(word, value, __ATOMIC_##order))
#define CTX__AND(word, value, order) (CTX__STEP("and", word) __atomic_fetch_and(word, value, __ATOMIC_##order))

/* As CTX__CAS, but it may fail for nothing, so it stands in a loop. */
#define CTX__CAS_WEAK(word, seen, value, won, lost)                                                                   \
    (CTX__STEP("cas", word) __atomic_compare_exchange_n(word, seen, value, CTX__WEAK, __ATOMIC_##won, __ATOMIC_##lost))

#ifdef CTXCANCEL_TEST_SCHED
#define CTX__SCHED 1
#define CTX__COMPILER_FENCE() ((void)0)
#define CTX__WEAK false /* a schedule must be the same each time */
void ctx__sched_relax(void);                         /* let another thread take a step */
void ctx__sched_block(uint32_t *word, uint32_t is);  /* until `*word` is something else */
void ctx__sched_sleep(uint32_t *word, uint32_t expected, ctx_time_t until); /* the futex */
void ctx__sched_wake(uint32_t *word, int n);
ctx_time_t ctx__sched_now(void);
int ctx__sched_start(pthread_t *thread, void *(*fn)(void *), void *arg);
int ctx__sched_join(pthread_t thread);
#else
#define CTX__SCHED 0
#define CTX__COMPILER_FENCE() __atomic_signal_fence(__ATOMIC_SEQ_CST) /* the processor may still move accesses */
#define CTX__WEAK true
#define ctx__sched_relax() ((void)0)
#define ctx__sched_block(word, is) ((void)0)
#define ctx__sched_now() 0
#define ctx__sched_start(thread, fn, arg) 0
#define ctx__sched_join(thread) 0
#endif

/* Not NULL. In a file that included the declarations before, with their CTX__NONNULL, the compiler would take a plain
   comparison out. */
static CTX__INLINE CTX__UNUSED bool ctx__set(const void *ptr) {
    __asm__("" : "+r"(ptr));
    return ptr != NULL;
}

static void ctx__cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__ARM_ARCH) && __ARM_ARCH >= 7)
    __asm__ volatile("yield" ::: "memory");
#else
    __asm__ volatile("" ::: "memory");
#endif
}

static void ctx__cpu_yield(void) {
    if (CTX__SCHED) ctx__sched_relax();
    else sched_yield();
}

static ctx_time_t ctx__clock_read(void) {
    struct timespec t;
    if (CTX__SCHED) return ctx__sched_now();
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (ctx_time_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* pthread_cancel() takes effect outside: a thread that is canceled with a lock would keep it for good. */
static int ctx__cancel_defer(void) {
    int before = PTHREAD_CANCEL_ENABLE;
#ifndef __ANDROID__
    if (pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before)) before = PTHREAD_CANCEL_ENABLE;
#endif
    return before;
}

static void ctx__cancel_restore(int before) {
#ifndef __ANDROID__
    int now;
    (void)pthread_setcancelstate(before, &now);
#else
    (void)before;
#endif
}

/* One turn of a wait that another thread will end: spin, then yield, then nap up to a millisecond. So a thread that
   waits for long, such as for the lock of a list whose million children are being marked, leaves the core to others. */
static void ctx__relax(unsigned *turn) {
    unsigned n = (*turn)++;
    if (CTX__SCHED) {
        ctx__sched_relax();
    } else if (n < 64) {
        ctx__cpu_pause();
    } else if (n < 96) {
        ctx__cpu_yield();
    } else {
        struct timespec nap;
        int before = ctx__cancel_defer();
        nap.tv_sec = 0;
        nap.tv_nsec = n < 128 ? 50000 : 1000000;
        nanosleep(&nap, NULL);
        ctx__cancel_restore(before);
    }
}

static CTX__COLD void ctx__lock_contended(uint32_t *mu) {
    unsigned turn = 0;
    do {
        if (CTX__SCHED) ctx__sched_block(mu, 1);
        while (CTX__LOAD(mu, RELAXED)) ctx__relax(&turn);
    } while (CTX__EXCHANGE(mu, 1u, SEQ_CST));
}

/* True if somebody else held it first. Pairs with the release in ctx__unlock. */
static inline bool ctx__lock(uint32_t *mu) {
    if (!CTX__UNLIKELY(CTX__EXCHANGE(mu, 1u, SEQ_CST))) return false;
    ctx__lock_contended(mu);
    return true;
}

static inline void ctx__unlock(uint32_t *mu) { CTX__STORE(mu, 0u, RELEASE); }

/* Sleep while `*word` is `expected`, until `until` on the real clock at the latest. May return early. */
static void ctx__futex_wait(uint32_t *word, uint32_t expected, ctx_time_t until);

/* Wake up to `n` threads that sleep on `word`. */
static void ctx__futex_wake(uint32_t *word, int n);

/* The thread sanitizer holds signals back while a thread is in a system call that it does not know, such as futex. */
#if CTX__SCHED
static void ctx__futex_wait(uint32_t *word, uint32_t expected, ctx_time_t until) {
    ctx__sched_sleep(word, expected, until);
}
static void ctx__futex_wake(uint32_t *word, int n) { ctx__sched_wake(word, n); }
static void ctx__futex_init(void) {}
#elif defined(__linux__) && !defined(CTXCANCEL_NO_FUTEX) && (!CTX__TSAN || defined(CTX__TSAN_FUTEX))

#define CTX__FUTEX_WAKE_PRIVATE (1 | 128)
#define CTX__FUTEX_WAIT_BITSET_PRIVATE (9 | 128) /* absolute, monotonic */

static void ctx__futex_wait(uint32_t *word, uint32_t expected, ctx_time_t until) {
    int saved = errno;
    int64_t s = until / 1000000000, ns = until % 1000000000;
    if (ns < 0) s--, ns += 1000000000;
    if (s < 0) s = ns = 0;
#ifdef SYS_futex_time64 /* 32-bit: the old call would misread a 64-bit time */
    {
        struct {
            int64_t s, ns;
        } t;
        t.s = s, t.ns = ns;
        if (syscall(SYS_futex_time64, word, CTX__FUTEX_WAIT_BITSET_PRIVATE, expected,
                    until == CTX_NO_DEADLINE ? NULL : (void *)&t, NULL, ~0u) == 0 || errno != ENOSYS) {
            errno = saved;
            return;
        }
    }
#endif
#ifdef SYS_futex
    {
        struct {
            long s, ns;
        } t;
        t.s = (long)s, t.ns = (long)ns;
        syscall(SYS_futex, word, CTX__FUTEX_WAIT_BITSET_PRIVATE, expected,
                until == CTX_NO_DEADLINE ? NULL : (void *)&t, NULL, ~0u);
    }
#endif
    errno = saved;
}

static void ctx__futex_wake(uint32_t *word, int n) {
    int saved = errno;
#ifdef SYS_futex
    syscall(SYS_futex, word, CTX__FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
#else
    syscall(SYS_futex_time64, word, CTX__FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
#endif
    errno = saved;
}

static void ctx__futex_init(void) {}

#else

/* Waiters whose words hash alike share a condition variable and wake together: the word says who was meant. */
#define CTX__BUCKETS 64
static struct {
    pthread_mutex_t mu;
    pthread_cond_t cond;
} ctx__buckets[CTX__BUCKETS];
static pthread_once_t ctx__buckets_once = PTHREAD_ONCE_INIT; /* any call may be the program's first */

static unsigned ctx__bucket_of(const uint32_t *word) {
    return (unsigned)(((uintptr_t)word >> 4 ^ (uintptr_t)word >> 12) % CTX__BUCKETS);
}

static void ctx__futex_init(void);

static void ctx__futex_wait(uint32_t *word, uint32_t expected, ctx_time_t until) {
    unsigned i = ctx__bucket_of(word);
    int before = ctx__cancel_defer(), rc = pthread_once(&ctx__buckets_once, ctx__futex_init);
    rc = rc ? rc : pthread_mutex_lock(&ctx__buckets[i].mu);
    CTXCANCEL_ASSERT(rc == 0);
    if (CTX__LOAD(word, SEQ_CST) != expected) {
        /* changed before we slept */
    } else if (until == CTX_NO_DEADLINE) {
        pthread_cond_wait(&ctx__buckets[i].cond, &ctx__buckets[i].mu);
    } else {
        struct timespec t;
#ifdef __APPLE__
        ctx_dur_t left = until - ctx__clock_read();
        if (left < 0) left = 0;
        t.tv_sec = (time_t)(left / 1000000000), t.tv_nsec = (long)(left % 1000000000);
        pthread_cond_timedwait_relative_np(&ctx__buckets[i].cond, &ctx__buckets[i].mu, &t);
#else
        if (until < 0) until = 0;
        t.tv_sec = (time_t)(until / 1000000000), t.tv_nsec = (long)(until % 1000000000);
        pthread_cond_timedwait(&ctx__buckets[i].cond, &ctx__buckets[i].mu, &t);
#endif
    }
    pthread_mutex_unlock(&ctx__buckets[i].mu);
    ctx__cancel_restore(before);
    (void)rc;
}

static void ctx__futex_wake(uint32_t *word, int n) {
    unsigned i = ctx__bucket_of(word);
    int rc = pthread_once(&ctx__buckets_once, ctx__futex_init);
    (void)n;
    rc = rc ? rc : pthread_mutex_lock(&ctx__buckets[i].mu);
    CTXCANCEL_ASSERT(rc == 0);
    pthread_cond_broadcast(&ctx__buckets[i].cond);
    pthread_mutex_unlock(&ctx__buckets[i].mu);
    (void)rc;
}

/* Also run in the child of a fork, where a bucket may have been left locked. */
static void ctx__futex_init(void) {
    unsigned i;
    int rc = 0;
    for (i = 0; i < CTX__BUCKETS; i++) {
        pthread_condattr_t attr;
        rc |= pthread_condattr_init(&attr);
#ifndef __APPLE__
        rc |= pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
#endif
        rc |= pthread_mutex_init(&ctx__buckets[i].mu, NULL);
        rc |= pthread_cond_init(&ctx__buckets[i].cond, &attr);
        pthread_condattr_destroy(&attr);
    }
    CTXCANCEL_ASSERT(rc == 0); /* none of these can fail where a wait can work */
    (void)rc;
}

#endif

typedef struct {
    uint32_t state; /* [atomic] */
    ctx_t *expires; /* [owner thread] the context whose deadline ends the wait: set by ctx__watch(), section 7 */
    ctx_t *with;    /* [owner thread] the context that it waits with, NULL while idle; and the function that waits */
    const char *op;
} ctx__parker_t;
enum { CTX__EMPTY, CTX__PARKED, CTX__SET, CTX__COUNTED = CTX__PARKED | 4, CTX__PARK_ERA = 8 };

static bool ctx__park_is(uint32_t state, uint32_t kind) { return state % CTX__PARK_ERA == kind; }

static void ctx__parker_init(ctx__parker_t *parker) {
    parker->state = CTX__EMPTY;
    parker->expires = parker->with = NULL;
    parker->op = NULL;
}

static uint32_t ctx__parked_state(void); /* section 2: what the calling thread is when parked */
static void ctx__count_out(const ctx__parker_t *parker);
static void ctx__count_in(uint32_t era);
static void ctx__count_less(uint32_t era);
static void ctx__count_note(uint32_t state);
static uint32_t ctx__clock_era(void);

/* Set the state of a parker. Returns true if its owner sleeps there, and is to be woken. That one is counted in before,
   for it may run at once. */
static inline bool ctx__parker_set(ctx__parker_t *parker) {
    uint32_t era = ctx__clock_era(), was;
    if (CTX__UNLIKELY(era)) ctx__count_in(era);
    was = CTX__EXCHANGE(&parker->state, CTX__SET + era * CTX__PARK_ERA, ACQ_REL);
    if (CTX__UNLIKELY(era) && !ctx__park_is(was, CTX__COUNTED)) ctx__count_less(era);
    return (was & CTX__PARKED) != 0;
}

/* From parked to EMPTY, likewise. Returns false if it was not parked. */
static bool ctx__parker_empty(ctx__parker_t *parker) {
    uint32_t era = ctx__clock_era(), state = CTX__LOAD(&parker->state, SEQ_CST);
    bool counts = CTX__UNLIKELY(era) && ctx__park_is(state, CTX__COUNTED), emptied = false;
    if (counts) ctx__count_in(era);
    while ((state & CTX__PARKED) && !emptied)
        emptied = CTX__CAS(&parker->state, &state, CTX__EMPTY + era * CTX__PARK_ERA, SEQ_CST, SEQ_CST);
    if (counts && !emptied) ctx__count_less(era);
    return emptied;
}

/* Let the owner of the parker go on: now, or when it next parks. */
static void ctx__unpark(ctx__parker_t *parker) {
    if (ctx__parker_set(parker)) ctx__futex_wake(&parker->state, 1);
}

/* Become parked, unless it is SET. Returns the state that the word to sleep on has. The swap is sequentially consistent
   for the fake clock. */
static uint32_t ctx__parker_park(ctx__parker_t *parker) {
    uint32_t parked = ctx__parked_state(), state = CTX__LOAD(&parker->state, ACQUIRE);
    while (ctx__park_is(state, CTX__EMPTY)) {
        if (!CTX__CAS(&parker->state, &state, parked, SEQ_CST, ACQUIRE)) continue;
        if (parked == CTX__COUNTED) ctx__count_out(parker);
        return parked;
    }
    return state;
}

/* After a sleep, maybe for no reason. True: unparked. */
static bool ctx__parker_woken(const ctx__parker_t *parker) {
    uint32_t state = CTX__LOAD(&parker->state, ACQUIRE);
    if (!(state & CTX__PARKED)) ctx__count_note(state);
    return ctx__park_is(state, CTX__SET);
}

/* Awake without having been unparked. False: it has been meanwhile. */
static bool ctx__parker_rise(ctx__parker_t *parker) {
    ctx__parker_empty(parker);
    return !ctx__parker_woken(parker);
}

/* Park until unparked (true) or until `until` on the real clock (false). For waits that pace the library, not the
   program; those of the program use ctx__park() of section 5, which knows the fake clock. Pairs with ctx__unpark. */
static bool ctx__park_real(ctx__parker_t *parker, ctx_time_t until) {
    for (;;) {
        uint32_t state = ctx__parker_park(parker);
        if (!ctx__park_is(state, CTX__SET)) ctx__futex_wait(&parker->state, state, until);
        if (ctx__parker_woken(parker)) return true;
        if (until == CTX_NO_DEADLINE || ctx__clock_read() < until) continue;
        if (ctx__parker_rise(parker)) return false;
    }
}

/* Make a parker that was SET ready to be used again. Its owner does. */
static void ctx__parker_reset(ctx__parker_t *parker) {
    CTX__STORE(&parker->state, (uint32_t)CTX__EMPTY, RELEASE);
}

/* Make the owner look at the clock again, without setting it. Pairs with the exchange in ctx__park. */
static void ctx__parker_nudge(ctx__parker_t *parker) {
    if (ctx__parker_empty(parker)) ctx__futex_wake(&parker->state, 1);
}

/* A wait on a condition variable of the program's, until `until` on the real clock where the system can do that on the
   clock of this library whatever the variable's own is. */
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 30) && !CTX__TSAN && !CTX__SCHED
#ifdef __cplusplus
extern "C"
#endif
int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until);

static int ctx__cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, ctx_time_t until) {
    struct timespec t;
    if (until == CTX_NO_DEADLINE) return pthread_cond_wait(cond, mutex);
    if (until < 0) until = 0;
    t.tv_sec = (time_t)(until / 1000000000), t.tv_nsec = (long)(until % 1000000000);
    return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &t);
}
#else
static int ctx__cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, ctx_time_t until) {
    (void)until;
    return pthread_cond_wait(cond, mutex);
}
#endif

/* The mutex: 0 free, 1 taken, 2 taken and waited for. */
static void ctx__mutex_lock(uint32_t *mutex) {
    uint32_t seen = 0;
    if (CTX__CAS(mutex, &seen, 1u, ACQUIRE, RELAXED)) return;
    while (CTX__EXCHANGE(mutex, 2u, ACQUIRE)) ctx__futex_wait(mutex, 2, CTX_NO_DEADLINE);
}

static void ctx__mutex_unlock(uint32_t *mutex) {
    if (CTX__EXCHANGE(mutex, 0u, RELEASE) == 2) ctx__futex_wake(mutex, 1);
}

#ifndef CTXCANCEL_STACK_SIZE
#define CTXCANCEL_STACK_SIZE 0
#endif

/* pthread_create(), with a stack of at least `stack` bytes. How much the system needs at the least depends on the
   program's thread-local data, so a stack that is too small for it is doubled. */
static int ctx__thread_create(pthread_t *thread, void *(*fn)(void *), void *arg, size_t stack) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = stack;
    pthread_attr_t attr;
    int rc = pthread_attr_init(&attr);
    if (rc) return rc;
    do {
        if (bytes > SIZE_MAX / 2 - page) bytes = SIZE_MAX / 2 - page;
        bytes = (bytes + page - 1) / page * page;
        rc = pthread_attr_setstacksize(&attr, bytes);
        if (!rc) rc = pthread_create(thread, &attr, fn, arg);
        bytes *= 2;
    } while (rc == EINVAL && bytes <= ((size_t)64 << 20));
    pthread_attr_destroy(&attr);
    return rc;
}

/* One of the library's own threads. It has the signal mask of the calling thread, as every thread of a program has, so
   that processes which its callbacks and tasks start have an ordinary one too. `stack` is 0 for the system's default.
   Returns 0, or CTX_NO_MEMORY if there is no thread to be had, whatever the system calls it. */
static int ctx__thread_start_sized(pthread_t *thread, void *(*fn)(void *), void *arg, size_t stack) {
    int rc;
    if (CTX__SCHED) rc = ctx__sched_start(thread, fn, arg);
    else if (stack) rc = ctx__thread_create(thread, fn, arg, stack);
    else rc = pthread_create(thread, NULL, fn, arg);
    return rc ? CTX_NO_MEMORY : 0;
}

static int ctx__thread_start(pthread_t *thread, void *(*fn)(void *), void *arg) {
    return ctx__thread_start_sized(thread, fn, arg, CTXCANCEL_STACK_SIZE);
}

static void ctx__thread_join(pthread_t thread) {
    int before = ctx__cancel_defer(), rc = CTX__SCHED ? ctx__sched_join(thread) : pthread_join(thread, NULL);
    ctx__cancel_restore(before);
    CTXCANCEL_ASSERT(rc == 0);
    (void)rc;
}

static void ctx__thread_name(const char *name) {
#ifdef __linux__
    prctl(PR_SET_NAME, (unsigned long)(uintptr_t)name, 0, 0, 0);
#else
    (void)name;
#endif
}

/* Wake on the microsecond: the default slack of a thread's timers is 50 us. */
static void ctx__thread_sharp_timers(void) {
#if defined(__linux__) && defined(PR_SET_TIMERSLACK)
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
#endif
}

/* Fences on all processors that run threads of this process, made by the one thread that needs them. The first call may
   take milliseconds. */
#if defined(__linux__) && defined(SYS_membarrier) && !CTX__TSAN && !CTX__SCHED
enum { CTX__MEMBARRIER_QUERY = 0, CTX__MEMBARRIER_EXPEDITED = 8, CTX__MEMBARRIER_REGISTER = 16 };

static bool ctx__fences_available(void) {
    long can = syscall(SYS_membarrier, CTX__MEMBARRIER_QUERY, 0, 0);
    return can > 0 && (can & CTX__MEMBARRIER_EXPEDITED) && (can & CTX__MEMBARRIER_REGISTER);
}

static bool ctx__fences(void) {
    return syscall(SYS_membarrier, CTX__MEMBARRIER_REGISTER, 0, 0) == 0 &&
           syscall(SYS_membarrier, CTX__MEMBARRIER_EXPEDITED, 0, 0) == 0;
}
#else
static bool ctx__fences_available(void) { return CTX__SCHED != 0; }
static bool ctx__fences(void) { return true; }
#endif

/* How many processors this process may use: those of the calling thread, where the system tells. */
static unsigned ctx__cpu_count(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__) && defined(SYS_sched_getaffinity)
    unsigned long mask[1024 / (8 * sizeof(long))];
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask), i;
    if (bytes > 0) n = 0;
    for (i = 0; i < bytes / (long)sizeof(long); i++) n += __builtin_popcountl(mask[i]);
#endif
    return n < 1 ? 1 : n > 1024 ? 1024 : (unsigned)n;
}

/* A descriptor that can be made readable: on Linux an eventfd, elsewhere the reading end of a pipe. */
typedef struct {
    int fd, writer;
} ctx__event_t;

static int ctx__event_open(ctx__event_t *event) {
    event->writer = -1;
#ifdef __linux__
    event->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return event->fd < 0 ? -errno : 0;
#else
    {
        int ends[2], i;
        if (pipe(ends) < 0) return -errno;
        for (i = 0; i < 2; i++) {
            fcntl(ends[i], F_SETFD, FD_CLOEXEC);
            fcntl(ends[i], F_SETFL, O_NONBLOCK);
        }
        event->fd = ends[0], event->writer = ends[1];
        return 0;
    }
#endif
}

/* Setting it again changes nothing, unless it is to be cleared. */
static void ctx__event_set(const ctx__event_t *event) {
    int saved = errno, before = ctx__cancel_defer();
    uint64_t one = 1;
    ssize_t n = write(event->writer >= 0 ? event->writer : event->fd, &one, sizeof one);
    (void)n;
    ctx__cancel_restore(before);
    errno = saved;
}

/* Make it unreadable again, after it was set once. */
static void ctx__event_clear(const ctx__event_t *event) {
    int saved = errno, before = ctx__cancel_defer();
    uint64_t count;
    ssize_t n = read(event->fd, &count, sizeof count);
    (void)n;
    ctx__cancel_restore(before);
    errno = saved;
}

static void ctx__event_close(ctx__event_t *event) {
    int before = ctx__cancel_defer();
    if (event->fd >= 0) close(event->fd);
    if (event->writer >= 0) close(event->writer);
    event->fd = event->writer = -1;
    ctx__cancel_restore(before);
}

/* In the child of a fork: the same number, but an event of its own. The parent's is closed first, which makes room for
   the new one where the process may have no more descriptors. */
static void ctx__event_unshare(ctx__event_t *event) {
    int fd = event->fd;
    ctx__event_close(event);
    if (ctx__event_open(event) < 0 || event->fd == fd) return;
    if (event->writer == fd) { /* it must not be closed by what follows */
        int moved = dup(fd);
        if (moved >= 0) fcntl(moved, F_SETFD, FD_CLOEXEC);
        event->writer = moved;
    }
    if (dup2(event->fd, fd) < 0) return;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    close(event->fd);
    event->fd = fd;
}

/* poll(), but returns the negative error, and 0 for EINTR too. In the explorer other threads run meanwhile. */
static int ctx__poll(struct pollfd *fds, nfds_t n, int timeout) {
    int saved = errno, before = ctx__cancel_defer(), rc;
    while ((rc = poll(fds, n, CTX__SCHED ? 0 : timeout)) == 0 && CTX__SCHED && timeout < 0) ctx__sched_relax();
    if (rc < 0) rc = errno == EINTR ? 0 : -errno;
    ctx__cancel_restore(before);
    errno = saved;
    return rc;
}

/* The one intrusive list. A link knows what points to it, so it can leave by itself; its `pprev` is NULL while it is in
   none. A plain pointer to the first link is a stack; with the end it is a queue. Zeroed, both are empty. */
static inline void ctx__link_in(ctx__link_t **stack, ctx__link_t *link) {
    link->next = *stack;
    link->pprev = stack;
    if (link->next) link->next->pprev = &link->next;
    *stack = link;
}

static inline void ctx__link_out(ctx__link_t *link) {
    *link->pprev = link->next;
    if (link->next) link->next->pprev = link->pprev;
    link->pprev = NULL;
}

/* At the end of a queue. */
static inline void ctx__queue_add(ctx__queue_t *queue, ctx__link_t *link) {
    ctx__link_t **end = queue->first ? queue->end : &queue->first;
    link->next = NULL;
    link->pprev = end;
    *end = link;
    queue->end = &link->next;
}

/* Out of a queue, if it is in it. */
static inline void ctx__queue_out(ctx__queue_t *queue, ctx__link_t *link) {
    if (!link->pprev) return;
    if (!link->next) queue->end = link->pprev;
    ctx__link_out(link);
}

/* The one ring: items of one size with a lock at each end, so that threads that put and threads that take do not meet.
   `in` guards the tail, `out` the head, and each end keeps what it last saw of the other and looks again only when that
   says full or empty. Where both locks are needed, `in` is taken first. */
typedef struct {
    size_t size, capacity; /* [const] bytes of an item; how many fit */
    char *cells;           /* [const] */
    CTX__ALIGNED uint32_t in;
    size_t tail_slot;      /* [in] */
    uint64_t tail;         /* [atomic, set under in] items ever put */
    uint64_t head_seen;    /* [in] */
    CTX__ALIGNED uint32_t out;
    size_t head_slot;      /* [out] */
    uint64_t head;         /* [atomic, set under out] items ever taken */
    uint64_t tail_seen;    /* [out] */
} ctx__ring_t;

/* [in] The free cell at the tail, NULL if the ring is full. */
static inline char *ctx__ring_room(ctx__ring_t *ring) {
    if (ring->tail - ring->head_seen >= ring->capacity) {
        ring->head_seen = CTX__LOAD(&ring->head, ACQUIRE);
        if (ring->tail - ring->head_seen >= ring->capacity) return NULL;
    }
    return ring->cells + ring->tail_slot * ring->size;
}

/* [in] What was written there is an item now. Pairs with the load in ctx__ring_first(). */
static inline void ctx__ring_put(ctx__ring_t *ring) {
    if (++ring->tail_slot == ring->capacity) ring->tail_slot = 0;
    CTX__STORE(&ring->tail, ring->tail + 1, RELEASE);
}

/* [out] The oldest item, NULL if the ring is empty. */
static inline char *ctx__ring_first(ctx__ring_t *ring) {
    if (ring->head == ring->tail_seen) {
        ring->tail_seen = CTX__LOAD(&ring->tail, ACQUIRE);
        if (ring->head == ring->tail_seen) return NULL;
    }
    return ring->cells + ring->head_slot * ring->size;
}

/* [out] Its cell is free now. Pairs with the load in ctx__ring_room(). */
static inline void ctx__ring_take(ctx__ring_t *ring) {
    if (++ring->head_slot == ring->capacity) ring->head_slot = 0;
    CTX__STORE(&ring->head, ring->head + 1, RELEASE);
}

/* How many items there are; under both locks, else a hint. */
static inline uint64_t ctx__ring_count(const ctx__ring_t *ring) {
    uint64_t head = CTX__LOAD(&ring->head, ACQUIRE);
    return CTX__LOAD(&ring->tail, ACQUIRE) - head;
}

static size_t ctx__round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static void *ctx__alloc(size_t size) {
    void *p = CTXCANCEL_MALLOC(size);
    if (p) memset(p, 0, size);
    return p;
}

/* `zeroed` bytes of zeros and then `more` bytes, on a cache line of their own; `*raw` is what to free. */
static void *ctx__alloc_lines(size_t zeroed, size_t more, void **raw) {
    void *p = NULL;
    if (zeroed < SIZE_MAX / 2 && more < SIZE_MAX / 2 - zeroed) p = CTXCANCEL_MALLOC(zeroed + more + CTX__LINE);
    *raw = p;
    if (!p) return NULL;
    p = (void *)(((uintptr_t)p + CTX__LINE - 1) & ~(uintptr_t)(CTX__LINE - 1));
    memset(p, 0, zeroed);
    return p;
}

/* Room for `n` more elements in an array of stb_ds.h, so that what follows cannot fail: stb_ds writes through a failed
   realloc. False when memory is short; the array is as before. */
static bool ctx__array_reserve(void **array, size_t elem_size, size_t n) {
    stbds_array_header *head = *array ? stbds_header(*array) : NULL, *grown;
    size_t length = head ? head->length : 0, capacity = head ? head->capacity : 0;
    if (n <= capacity - length) return true;
    if (n > SIZE_MAX / 4 / elem_size - sizeof *head - length || capacity > SIZE_MAX / 4 / elem_size - sizeof *head)
        return false;
    capacity = capacity * 2 > length + n ? capacity * 2 : length + n + 4;
    grown = (stbds_array_header *)STBDS_REALLOC(NULL, head, sizeof *head + capacity * elem_size);
    if (!grown) return false;
    if (!head) memset(grown, 0, sizeof *grown);
    grown->capacity = capacity;
    *array = grown + 1;
    return true;
}

enum { CTX__CACHE_NODES, CTX__CACHE_RECORDS, CTX__CACHES, CTX__CACHE_MAX = CTX__ASAN ? 0 : 32 };

typedef struct ctx__thread {
    struct {
        void *first;   /* free blocks of one size, linked by their third word */
        unsigned n;
    } cache[CTX__CACHES];
    unsigned index;    /* counts threads from 1, through forks; 0: not seen yet */
    uint32_t inside;   /* [atomic, set by its thread] how many ctx__enter() lack their ctx__leave(), plus
                          CTX__STRANGER */
    uint32_t walk;     /* [atomic, set by its thread] when its walk began: section 3; 0: it does not walk */
    bool linked;       /* stands in the gate's list */
    bool runtime;      /* it is the runtime thread: section 5 */
    uint64_t random;   /* the state of ctx__random() */
    void *runner;      /* the ctx__runner_t that this thread is: section 10 */
    struct ctx__poller *poller;          /* what wakes it out of poll(); NULL before its first wait of that kind */
    const struct ctx__thread *waits_for; /* [ctx__stops] whose callback it waits for: section 3 */
    bool library;        /* [atomic] one of the library's that runs tasks: it takes part in every ctx_clock_auto() */
    bool rests;          /* [atomic, set by its thread] it is parked, and may be counted */
    uint32_t counted;    /* [atomic] the era of that clock which counts it: section 2 */
    const char *op, *name, *site; /* [atomic, set by its thread] the wait it is in, with that clock */
    struct ctx__scope *scope;            /* what it is inside of, innermost first */
    unsigned look_skip, look_back;       /* ctx__look_out(): waits to skip, and how many it was last */
    ctx__link_t link;                    /* [gate.mu] */
} ctx__thread_t;
static __thread ctx__thread_t ctx__self; /* its address stands for the thread */

static struct {
    uint32_t mu;
    uint32_t word;            /* [atomic] CTX__GATE_... */
    ctx__thread_t *forking;   /* [atomic] which may pass, for the program's own handlers of the fork */
    ctx__link_t *threads;     /* [mu] */
} ctx__gate;

enum { CTX__GATE_CLOSED = 1, CTX__GATE_SLEPT_ON = 2, CTX__GATE_FENCES = 4 /* [const after ctx__once] */ };

static pthread_once_t ctx__once = PTHREAD_ONCE_INIT;
static pthread_key_t ctx__thread_key;
static bool ctx__thread_keyed;     /* [atomic] there is a key */
static unsigned ctx__threads_seen; /* [atomic] */
static unsigned ctx__cpus = 1;     /* [const] after ctx__once */
static unsigned ctx__forks;        /* how many forks this process is away from the first */

static void ctx__setup(void);              /* below all sections: it wires them together */

/* A thread of no key, of whose end nobody would be told, is linked for as long as it is inside. Its `inside` counts
   from here, so that it takes the slow ways in and out. */
#define CTX__STRANGER 0x80000000u

static void ctx__thread_link(ctx__thread_t *me) {
    ctx__lock(&ctx__gate.mu);
    me->linked = true;
    ctx__link_in(&ctx__gate.threads, &me->link);
    ctx__unlock(&ctx__gate.mu);
}

static void ctx__thread_unlink(ctx__thread_t *me) {
    ctx__lock(&ctx__gate.mu);
    ctx__link_out(&me->link);
    me->linked = false;
    ctx__unlock(&ctx__gate.mu);
}

static CTX__COLD void ctx__thread_enter(void) {
    ctx__thread_t *me = &ctx__self;
    pthread_once(&ctx__once, ctx__setup);
    if (!me->index) {
        me->index = CTX__ADD(&ctx__threads_seen, 1u, RELAXED) + 1;
        me->random = ((uint64_t)ctx__clock_read() ^ (uint64_t)me->index << 40) | 1;
    }
    if (me->inside & ~CTX__STRANGER) return; /* it is a stranger that forks */
    me->inside = CTX__STRANGER;
    if (!CTX__LOAD(&ctx__thread_keyed, ACQUIRE) || pthread_setspecific(ctx__thread_key, me) != 0) return;
    me->inside = 0;
    ctx__thread_link(me);
}

/* The record of the calling thread. */
static inline ctx__thread_t *ctx__me(void) {
    ctx__thread_t *me = &ctx__self;
    if (CTX__UNLIKELY(!me->linked)) ctx__thread_enter();
    return me;
}

/* A block with nothing set. A few free ones wait with each thread (not under the address sanitizer, which should see
   each as freed). A thread whose end nobody would notice gets none. */
static inline void *ctx__cache_take(int which, size_t size) {
    ctx__thread_t *me = ctx__me();
    void **block = (void **)me->cache[which].first;
    if (!block) return me->linked ? CTXCANCEL_MALLOC(size) : NULL;
    me->cache[which].first = block[2];
    me->cache[which].n--;
    return block;
}

static inline void ctx__cache_give(int which, void *block) {
    ctx__thread_t *me = ctx__me();
    if ((int)me->cache[which].n >= CTX__CACHE_MAX || !me->linked) {
        CTXCANCEL_FREE(block);
        return;
    }
    ((void **)block)[2] = me->cache[which].first;
    me->cache[which].first = block;
    me->cache[which].n++;
}

static void ctx__cache_flush(ctx__thread_t *me) {
    int which;
    for (which = 0; which < CTX__CACHES; which++) {
        while (me->cache[which].first) {
            void **block = (void **)me->cache[which].first;
            me->cache[which].first = block[2];
            CTXCANCEL_FREE(block);
        }
        me->cache[which].n = 0;
    }
}

static void ctx__poller_close(ctx__thread_t *me);
static void ctx__clock_quit(ctx__thread_t *me); /* section 2 */

/* The destructor of the thread's key. Another destructor may still call the library, which then enters anew. */
static void ctx__thread_leave(void *thread) {
    ctx__thread_t *me = (ctx__thread_t *)thread;
    ctx__poller_close(me);
    if (me->linked) ctx__thread_unlink(me);
    ctx__clock_quit(me); /* now ctx_clock_auto() does not find it */
    ctx__cache_flush(me);
}

/* Call the program. Its exceptions end the process, for they would take the caller of ctx_cancel() out of its work. */
static void ctx__call_out(void (*fn)(void *arg), void *arg) CTX__NOEXCEPT { fn(arg); }

/* Outside, however the thread counts. */
static inline uint32_t ctx__outermost(const ctx__thread_t *me) { return me->inside & CTX__STRANGER; }

/* The gate is closed, or a thread has to bring its own fence. Come in when it is open. */
static CTX__COLD void ctx__gate_pass(ctx__thread_t *me) {
    for (;;) {
        uint32_t word;
        if (CTX__LOAD(&ctx__gate.word, RELAXED) & CTX__GATE_FENCES) CTX__EXCHANGE(&me->inside, me->inside, SEQ_CST);
        word = CTX__LOAD(&ctx__gate.word, SEQ_CST);
        if (!(word & CTX__GATE_CLOSED) || CTX__LOAD(&ctx__gate.forking, ACQUIRE) == me) return;
        CTX__STORE(&me->inside, ctx__outermost(me), RELEASE);
        while ((word = CTX__LOAD(&ctx__gate.word, ACQUIRE)) & CTX__GATE_CLOSED)
            if ((word & CTX__GATE_SLEPT_ON) || CTX__CAS(&ctx__gate.word, &word, word | CTX__GATE_SLEPT_ON, ACQ_REL,
            ACQUIRE))
                ctx__futex_wait(&ctx__gate.word, word | CTX__GATE_SLEPT_ON, CTX_NO_DEADLINE);
        CTX__STORE(&me->inside, ctx__outermost(me) + 1, RELAXED);
        CTX__COMPILER_FENCE();
    }
}

/* Inside already, or a stranger. */
static CTX__COLD void ctx__come_in_slowly(ctx__thread_t *me) {
    bool outside = me->inside == CTX__STRANGER;
    if (outside && CTX__LOAD(&ctx__gate.forking, ACQUIRE) != me) ctx__thread_link(me);
    CTX__STORE(&me->inside, me->inside + 1, SEQ_CST);
    if (outside) ctx__gate_pass(me);
}

static CTX__COLD void ctx__outside_slowly(ctx__thread_t *me) {
    CTX__STORE(&me->inside, me->inside - 1, RELEASE);
    if (me->inside == CTX__STRANGER && me->linked) ctx__thread_unlink(me);
}

/* Go inside. May be nested: only the outermost looks at the gate. */
static inline ctx__thread_t *ctx__inside(void) {
    ctx__thread_t *me = ctx__me();
    if (CTX__UNLIKELY(me->inside != 0)) {
        ctx__come_in_slowly(me);
        return me;
    }
    CTX__STORE(&me->inside, 1u, RELAXED);
    CTX__COMPILER_FENCE();
    if (CTX__UNLIKELY(CTX__LOAD(&ctx__gate.word, ACQUIRE))) ctx__gate_pass(me);
    return me;
}

static inline void ctx__outside(ctx__thread_t *me) {
    if (CTX__UNLIKELY(me->inside != 1)) ctx__outside_slowly(me);
    else CTX__STORE(&me->inside, 0u, RELEASE); /* pairs with the load in ctx__fork_prepare() */
}

/* Another thread has the lock. A thread waits for it outside, so that a fork waits for none but those at work. */
static CTX__COLD void ctx__enter_contended(ctx__thread_t *me, uint32_t *mu) {
    unsigned turn = 0;
    do {
        ctx__outside(me);
        while (CTX__LOAD(mu, RELAXED)) {
            if (CTX__SCHED) ctx__sched_block(mu, 1);
            else ctx__relax(&turn);
        }
        ctx__inside();
    } while (CTX__EXCHANGE(mu, 1u, SEQ_CST));
}

/* Go inside and take `mu`. True if another thread held the lock first. */
static inline bool ctx__enter(uint32_t *mu) {
    ctx__thread_t *me = ctx__inside();
    if (!CTX__UNLIKELY(CTX__EXCHANGE(mu, 1u, SEQ_CST))) return false;
    ctx__enter_contended(me, mu);
    return true;
}

static inline void ctx__leave(uint32_t *mu) {
    ctx__unlock(mu);
    ctx__outside(&ctx__self);
}

/* What wakes a thread out of poll(): one for each thread, whatever number of contexts it waits for. It is set at most
   once in a wait, and clear between waits. Not in the thread's record, so that the child of a fork can close those of
   the threads that it has not. */
typedef struct ctx__poller {
    ctx__link_t link;    /* [ctx__pollers.mu] */
    ctx__event_t event;  /* [const] */
} ctx__poller_t;

static struct {
    uint32_t mu;
    ctx__link_t *first; /* [mu] */
} ctx__pollers;

/* The poller of the calling thread, or NULL if memory or a descriptor is unavailable. */
static ctx__poller_t *ctx__poller_get(void) {
    ctx__thread_t *me = ctx__me();
    ctx__poller_t *poller = me->poller;
    int rc;
    if (poller) return poller;
    poller = (ctx__poller_t *)CTXCANCEL_MALLOC(sizeof *poller);
    if (!poller) return NULL;
    ctx__enter(&ctx__pollers.mu);
    rc = ctx__event_open(&poller->event); /* inside, so that the child of a fork finds it in the list */
    if (!rc) ctx__link_in(&ctx__pollers.first, &poller->link);
    ctx__leave(&ctx__pollers.mu);
    if (rc) CTXCANCEL_FREE(poller);
    else me->poller = poller;
    return me->poller;
}

static void ctx__poller_close(ctx__thread_t *me) {
    ctx__poller_t *poller = me->poller;
    if (!poller) return;
    me->poller = NULL;
    ctx__enter(&ctx__pollers.mu);
    ctx__link_out(&poller->link);
    ctx__event_close(&poller->event);
    ctx__leave(&ctx__pollers.mu);
    CTXCANCEL_FREE(poller);
}

/* In the child of a fork, which shares them with its parent. This thread makes itself a new one. */
static void ctx__pollers_forget(void) {
    ctx__link_t *link, *next;
    for (link = ctx__pollers.first; link; link = next) {
        ctx__poller_t *poller = CTX__CONTAINER(link, ctx__poller_t, link);
        next = link->next;
        ctx__event_close(&poller->event);
        CTXCANCEL_FREE(poller);
    }
    ctx__pollers.first = NULL;
    ctx__self.poller = NULL;
}

/* What the child of a fork has to go through: the nodes with callbacks or a descriptor, in lists by address. */
enum { CTX__STRIPES = 16 };
static struct {
    CTX__ALIGNED uint32_t mu;
    ctx__link_t *first; /* [mu] */
} ctx__watched[CTX__STRIPES];

static size_t ctx__stripe_index(const void *p) { return ((uintptr_t)p >> 6 ^ (uintptr_t)p >> 11) % CTX__STRIPES; }

/* [inside] Returns true. */
static CTX__COLD bool ctx__watched_add(ctx__link_t *link) {
    size_t i = ctx__stripe_index(link);
    ctx__lock(&ctx__watched[i].mu);
    ctx__link_in(&ctx__watched[i].first, link);
    ctx__unlock(&ctx__watched[i].mu);
    return true;
}

static void ctx__watched_remove(ctx__link_t *link) {
    size_t i = ctx__stripe_index(link);
    ctx__enter(&ctx__watched[i].mu);
    ctx__link_out(link);
    ctx__leave(&ctx__watched[i].mu);
}

/* What a thread is inside of: a stack of records on its own stack. By it the calls that would wait for themselves know
   that they would. */
enum { CTX__IN_CALLBACK, CTX__IN_TASK, CTX__IN_GROUP, CTX__IN_GO, CTX__IN_DROP, CTX__IN_FLUSH, CTX__IN_SERVICE };
typedef struct ctx__scope {
    struct ctx__scope *outer;
    const void *owner; /* the pool, group, batcher or service */
    int kind;          /* CTX__IN_... */
} ctx__scope_t;

static inline void ctx__scope_enter(ctx__scope_t *scope, int kind, const void *owner) {
    scope->outer = ctx__self.scope;
    scope->owner = owner;
    scope->kind = kind;
    /* cppcheck-suppress autoVariables ; ctx__scope_leave() takes it back */
    ctx__self.scope = scope;
}

static inline void ctx__scope_leave(const ctx__scope_t *scope) { ctx__self.scope = scope->outer; }

/* The innermost scope of that kind and owner (NULL: any), or NULL. */
static ctx__scope_t *ctx__scope_of(int kind, const void *owner) {
    ctx__scope_t *scope = ctx__self.scope;
    while (scope && (scope->kind != kind || (owner && scope->owner != owner))) scope = scope->outer;
    return scope;
}

/* What the drains of a component lose is added up for the report of its shutdown: section 14 sets where. */
typedef struct {
    uint64_t dropped, stuck; /* [atomic] */
} ctx__tally_t;

/* A thread in a callback of a component. */
typedef struct {
    ctx__scope_t scope; /* CTX__IN_SERVICE */
    ctx__tally_t *tally;
    bool drains;        /* in refuse or drain */
    bool excused;       /* [ctx__services.mu] it stops that component itself, so nobody waits for it */
} ctx__serving_t;

/* Where what is drained here is counted, or NULL. */
static ctx__tally_t *ctx__tally(void) {
    ctx__scope_t *scope = ctx__scope_of(CTX__IN_SERVICE, NULL);
    return scope ? CTX__CONTAINER(scope, ctx__serving_t, scope)->tally : NULL;
}

static void ctx__tally_add(uint64_t dropped, uint64_t stuck) {
    ctx__tally_t *tally = ctx__tally();
    if (!tally) return;
    CTX__ADD(&tally->dropped, dropped, RELAXED);
    CTX__ADD(&tally->stuck, stuck, RELAXED);
}

/* A thread that has to wait looks for a moment before it sleeps, if that has paid lately: two threads that take turns
   then hand over without a system call. At most one looks for each processor but one. A thread looks at one wait, then
   sleeps at once at so many: twice as many after a look in vain, half as many after one that paid. So it looks always
   where most looks pay, and hardly ever where few do. A look takes as long as it takes a sleeping partner to wake up
   and answer, so two threads whose looks have missed each other meet again. On one processor a look is to let the
   others run once. */
#define CTX__LOOK CTX_US(32)
enum { CTX__LOOK_PAUSES = 64, CTX__LOOK_BACK = 63 };
static uint32_t ctx__lookers; /* [atomic] */

static bool ctx__looker_enter(void) {
    uint32_t n = CTX__LOAD(&ctx__lookers, RELAXED);
    while (n + 1 < ctx__cpus)
        if (CTX__CAS_WEAK(&ctx__lookers, &n, n + 1, RELAXED, RELAXED)) return true;
    return false;
}

/* True: `there(what)`. False: sleep; also once `until` on the real clock has come. */
static bool ctx__look_out(bool (*there)(const void *what), const void *what, ctx_time_t until) {
    ctx__thread_t *me;
    bool found = false;
    int i;
    if (CTX__SCHED) return false;
    me = ctx__me();
    if (me->look_skip) {
        me->look_skip--;
        return false;
    }
    if (ctx__cpus == 1) {
        ctx__cpu_yield();
        found = there(what);
    } else {
        bool looker = false;
        ctx_time_t end = 0;
        for (i = 0; i < CTX__LOOK_PAUSES && !found && !(looker = ctx__looker_enter()); i++) {
            ctx__cpu_pause(); /* the partner has answered, and is about to stop looking */
            found = there(what);
        }
        if (!looker) return found;
        while (!found) {
            ctx_time_t now = ctx__clock_read();
            if (!end) end = now + CTX__LOOK;
            if (now >= end || now >= until) break;
            ctx__cpu_yield(); /* the partner may be waiting for this very core */
            for (i = 0; i < CTX__LOOK_PAUSES && !(found = there(what)); i++) ctx__cpu_pause();
        }
        CTX__SUB(&ctx__lookers, 1u, RELAXED);
    }
    me->look_back = found ? me->look_back / 2 : 2 * me->look_back + 1;
    if (me->look_back > CTX__LOOK_BACK) me->look_back = CTX__LOOK_BACK;
    me->look_skip = me->look_back;
    return found;
}

/* Numbers to spread things with: xorshift, of each thread its own. */
static uint32_t ctx__random(void) {
    ctx__thread_t *me = ctx__me();
    me->random ^= me->random << 13;
    me->random ^= me->random >> 7;
    me->random ^= me->random << 17;
    return (uint32_t)(me->random >> 32);
}

/* The text of a code that this library defines, NULL for others. */
static const char *ctx__own_text(int code) {
    switch (code) {
    case 0: return "success";
    case CTX_CANCELED: return "context canceled";
    case CTX_DEADLINE_EXCEEDED: return "deadline exceeded or timed out";
    case CTX_QUEUE_FULL: return "queue full";
    case CTX_CLOSED: return "closed or broken pipe";
    case CTX_NO_MEMORY: return "out of memory";
    case CTX_INVALID: return "invalid argument";
    case CTX_NOT_READY: return "not ready or temporarily unavailable";
    case CTX_ALREADY: return "already started";
    default: return NULL;
    }
}

CTXCANCEL_API const char *ctx_strerror(int code) {
    const char *own = ctx__own_text(code);
    if (own) return own;
    return code < 0 && code >= -INT32_MAX ? strerror(-code) : "unknown error";
}

/* == 2. time ====================================================== */

/* Everything reads one clock: CLOCK_MONOTONIC, or while `fake` is set a number that only ctx_clock_advance() moves, and
   with ctx_clock_auto() the runtime thread. A thread that sleeps until a time does so through ctx__park() of section 5,
   which knows all.

   ctx_clock_auto(): `running` counts the threads that take part and are not parked, and the clock moves only while it
   is 0. A thread that parks counts itself out, after its parker says COUNTED. Whoever ends that state counts it in,
   before it can run. A thread of the library is counted in by the one that starts it, or by ctx_clock_auto() if it does
   not rest then. Who counts the last one out kicks the runtime thread, which counts itself in while it moves the clock
   and fires what is due. A deadline that a thread waits for is in a wheel before it is counted out, and until it is
   counted in. */

static struct {
    int fake;         /* [atomic] */
    ctx_time_t now;   /* [atomic] */
    uint32_t era;     /* [atomic] which ctx_clock_auto() this is; 0: none */
    uint32_t eras;    /* how many there have been */
    uint32_t starting; /* [atomic] threads of the library that have not begun */
    uint64_t running; /* [atomic] CTX__CLOCK_RUNNING(), below how often one was counted in, below the era */
} ctx__clock;

enum { CTX__CLOCK_BITS = 20, CTX__CLOCK_MASK = (1 << CTX__CLOCK_BITS) - 1, CTX__CLOCK_ERAS = (1 << 24) - 1 };
#define CTX__CLOCK_RUNNING(word) ((uint32_t)((word) & CTX__CLOCK_MASK))

static inline bool ctx__clock_is_fake(void) { return CTX__LOAD(&ctx__clock.fake, ACQUIRE) != 0; }

CTXCANCEL_API ctx_time_t ctx_now(void) {
    if (CTX__UNLIKELY(ctx__clock_is_fake())) return CTX__LOAD(&ctx__clock.now, SEQ_CST);
    return ctx__clock_read();
}

static ctx_time_t ctx__min(ctx_time_t a, ctx_time_t b) { return a < b ? a : b; }

static void ctx__clock_wake(void); /* section 5: have the runtime thread look whether all are parked */

static uint32_t ctx__clock_era(void) { return CTX__LOAD(&ctx__clock.era, ACQUIRE); }

static uint32_t ctx__parked_state(void) {
    const ctx__thread_t *me = &ctx__self;
    if (me->library || (me->counted && me->counted == ctx__clock_era())) return CTX__COUNTED; /* its own to read */
    return CTX__PARKED;
}

static uint64_t ctx__clock_word(uint32_t era, uint64_t ins, uint32_t running) {
    return (uint64_t)era << 2 * CTX__CLOCK_BITS | (ins & CTX__CLOCK_MASK) << CTX__CLOCK_BITS | running;
}

/* One thread more runs, or one less: a late call, of an era that is over, changes nothing. True: none runs now. */
static bool ctx__clock_change(uint32_t era, int by) {
    uint64_t word = CTX__LOAD(&ctx__clock.running, ACQUIRE), changed;
    do {
        if (word >> 2 * CTX__CLOCK_BITS != era) return false;
        changed = ctx__clock_word(era, (word >> CTX__CLOCK_BITS) + (by > 0), CTX__CLOCK_RUNNING(word) + (uint32_t)by);
    } while (!CTX__CAS_WEAK(&ctx__clock.running, &word, changed, ACQ_REL, ACQUIRE));
    return !CTX__CLOCK_RUNNING(changed);
}

static void ctx__count_less(uint32_t era) {
    if (ctx__clock_change(era, -1)) ctx__clock_wake();
}

/* A thread that takes part will run. */
static CTX__COLD void ctx__count_in(uint32_t era) { ctx__clock_change(era, 1); }

/* The calling thread is parked. If the clock did not know it, it does from now on. */
static void ctx__count_out(const ctx__parker_t *parker) {
    ctx__thread_t *me = &ctx__self;
    uint32_t era;
    CTX__STORE(&me->rests, true, SEQ_CST); /* one of this thread and ctx_clock_auto() sees the other */
    era = CTX__LOAD(&ctx__clock.era, SEQ_CST);
    if (CTX__LIKELY(!era)) return;
    CTX__STORE(&me->op, parker->with ? parker->op : NULL, RELAXED);
    CTX__STORE(&me->name, parker->with ? ctx_name(parker->with) : NULL, RELAXED);
    CTX__STORE(&me->site, parker->with ? ctx_site(parker->with) : NULL, RELAXED);
    if (CTX__EXCHANGE(&me->counted, era, ACQ_REL) == era) ctx__count_less(era);
}

/* The calling thread was parked, and `state` ended that: who set it has counted this thread in, in that era. If the
   clock began just then, the thread counts itself in. */
static void ctx__count_note(uint32_t state) {
    ctx__thread_t *me = &ctx__self;
    uint32_t era = state / CTX__PARK_ERA, now;
    if (CTX__LIKELY(!me->rests)) return;
    if (era) CTX__STORE(&me->counted, era, RELAXED);
    CTX__STORE(&me->rests, false, SEQ_CST); /* pairs with the load in ctx__clock_count() */
    now = CTX__LOAD(&ctx__clock.era, SEQ_CST);
    if (me->library && now && now != era && CTX__EXCHANGE(&me->counted, now, ACQ_REL) != now) ctx__count_in(now);
}

/* Threads of the library that run as the clock begins. */
static void ctx__clock_count(uint32_t era) {
    const ctx__link_t *link;
    ctx__lock(&ctx__gate.mu);
    for (link = ctx__gate.threads; link; link = link->next) {
        ctx__thread_t *thread = CTX__CONTAINER(link, ctx__thread_t, link);
        uint32_t counted = CTX__LOAD(&thread->counted, ACQUIRE);
        if (!CTX__LOAD(&thread->library, ACQUIRE) || CTX__LOAD(&thread->rests, SEQ_CST) || counted == era) continue;
        if (CTX__CAS(&thread->counted, &counted, era, ACQ_REL, RELAXED)) ctx__count_in(era);
    }
    ctx__unlock(&ctx__gate.mu);
}

static void ctx__clock_quit(ctx__thread_t *me) {
    uint32_t era = ctx__clock_era();
    if (CTX__EXCHANGE(&me->counted, 0u, ACQ_REL) == era && era) ctx__count_less(era);
}

CTXCANCEL_API void ctx_clock_join(void) {
    ctx__thread_t *me = ctx__me();
    uint32_t era = ctx__clock_era();
    if (!era || CTX__LOAD(&me->counted, RELAXED) == era) return;
    ctx__count_in(era);
    CTX__STORE(&me->counted, era, RELEASE);
}

CTXCANCEL_API void ctx_clock_leave(void) { ctx__clock_quit(ctx__me()); }

/* Start a thread of the library that takes part. It begins by ctx__member_begin(). */
static int ctx__member_start(pthread_t *thread, void *(*fn)(void *), void *arg, size_t stack) {
    uint32_t era = ctx__clock_era();
    int rc;
    CTX__ADD(&ctx__clock.starting, 1u, RELAXED);
    if (era) ctx__count_in(era);
    rc = ctx__thread_start_sized(thread, fn, arg, stack);
    if (rc) CTX__SUB(&ctx__clock.starting, 1u, RELAXED);
    if (rc && era) ctx__count_less(era);
    return rc;
}

static ctx__thread_t *ctx__member_begin(void) {
    ctx__thread_t *me = ctx__me();
    CTX__STORE(&me->counted, ctx__clock_era(), RELAXED);
    CTX__STORE(&me->library, true, RELEASE);
    CTX__SUB(&ctx__clock.starting, 1u, RELEASE); /* pairs with the load in ctx_clock_auto() */
    return me;
}

/* An entry of a timing wheel, inside of what has the deadline: see section 5. */
typedef struct ctx__timer {
    struct ctx__timer *next, **pprev; /* [wheel->mu] */
    ctx_time_t deadline;              /* [wheel->mu] while armed */
    uint8_t armed;                    /* [atomic, set under wheel->mu] */
    uint8_t kind;                     /* [const] CTX__TIMER_...: what it is inside of */
    uint8_t wheel, level, slot;       /* [wheel->mu] where it is */
} ctx__timer_t;

enum { CTX__TIMER_ALARM, CTX__TIMER_NODE, CTX__TIMER_CALL };

/* == 3. context =================================================== */

/* Whoever returns from ctx_cancel(), ctx_cancel_cause() or ctx_end(), having won or not, finds everything done that was
   attached below before the call.

   The tree. A node sits in its parent's child list from its making until it is freed, so everything alive can be
   reached from the background. Two counts hold it:
     refs   what the program holds: ctx_end() and ctx_release() give back.
     pins   what keeps the memory: one for all refs together; one for having children or callbacks, taken with the first
            of them and given back when there are neither refs nor any of them left (then the node is an `orphan`:
            nobody can attach to it any more); one per shard, likewise; and one for each thread that works on the node
            without a ref, such as a walk or the runtime thread.
   A child needs no count in its parent: standing in the list is what holds it. A merged node has two parents: its own
   entry stands in the list of `a`, and a proxy, a second entry inside the same allocation, in the list of `b`. Whatever
   marks the proxy marks the node.

   Grace. A node with a grace period is a merged one too: it stands in the background's list, where nobody marks it, and
   its proxy in the list of its parent. Whatever marks the proxy arms the node's timer for the end of the grace period,
   at the end of the same walk; when that comes the node gets the record of the proxy.

   Done. Done-ness is one pointer, `why`, to an immutable record of err, code, text and place: NULL, then set once. A
   node that was canceled itself points to its own record, its descendants point to the same one, which their parents
   keep alive.
   `err` repeats why->err for ctx_err() and follows at once; a thread that finds `why` set and needs `err` stores it
   itself.

   Walks. The thread that sets the record of a node marks everything below in a walk, list by list; the nodes that have
   something attached queue up through `work`, so depth costs no stack. Attaching takes the list's lock and then reads
   `why`; marking sets `why` and then looks at the lock; all of it sequentially consistent, so one of the two sees the
   other: either the newcomer is born done, or the walk finds it in the list.
     A walk skips what is below a node that another walk has marked, and relies on that walk. So a walk announces itself
   in its thread's record before it marks anything, until everything is marked; and a thread that lost a node, at the
   top or on the way, waits at its end, holding nothing, for the walks that were announced by then. A walk that has met
   another counts in `met`; a waiter that sees the count move waits anew, for the walks that those relied on. No thread
   waits while it is announced, so none waits in a cycle. `walked` in a record says that all this is over.

     unmarked --won--> marked, its walk announced --all marked, waited--> walked
                         \--lost by another thread: waits for the announced walks

   Locks: one in each list of children. The list inside the node also guards its callbacks. No thread holds two lists. A
   stripe or the list of watched nodes is taken inside a list; a stripe also inside `ctx__stops`.

   Shards. A parent whose lock is often found taken gets child lists with a lock and a cache line each, picked by
   thread. The list inside the node keeps the children that it has.

   Callbacks run when the walk is over and nothing is held: wakers first, which only unpark a thread, then the others.
   The state of a registration goes LINKED to FIRED by the thread that cancels, or LINKED to STOPPING to IDLE by one
   that stops it; the first compare-and-swap wins. A thread that calls a callback does not touch `reg` from then on, so
   a callback may free or re-use it; a frame on that thread's stack, in a stripe picked by reg's address, stands for the
   run. Registering `reg` anew takes it out of older frames, so the frame that has it is the run of its latest
   registration. A thread that would wait for a frame first follows who waits for whom, and does not if that leads to
   itself. Wakers need no frame: they end in state DONE, for which their waiter looks.

   Nodes with callbacks or a descriptor stand in `ctx__watched` too, for the child of a fork to go through. */

typedef struct {
    int code;
    int16_t err;
    uint8_t walked; /* [atomic] everything that this record's walk had to mark is marked */
    const char *what, *site;
} ctx__why_t;

typedef struct {
    uint32_t mu;
    uint8_t orphan;    /* [mu] nobody holds a reference: the last to leave unpins */
    uint8_t contended; /* [mu] how often the lock was found taken, up to CTX__CONTENDED */
    uint8_t attached;  /* [atomic, set under mu] has ever had a child, callback, descriptor or shards */
    uint8_t shard;     /* [const] 0: inside the node */
    ctx_t *first;      /* [mu] children */
} ctx__list_t;

typedef struct {
    CTX__ALIGNED ctx__list_t list;
} ctx__shard_t;

typedef struct ctx__record ctx__record_t;

struct ctx__node {
    struct ctx__head head;  /* [atomic] err */
    uint8_t flags;          /* [const] CTX__F_... */
    uint8_t shard;          /* [const] which of the parent's lists it is in */
    uint8_t watched;        /* [list.mu] stands in ctx__watched; after a fork also CTX__WATCHED_CALLING */
    uint8_t graced;         /* [const] CTX__GRACED: the node or the proxy of a ctx__merged_t with a grace period;
                               CTX__GRACED_ABOVE: below such a node, whose deadline may become earlier */
    const ctx__why_t *why;  /* [atomic] */
    ctx_t *next;            /* [parent's list mu] */
    ctx__list_t list;       /* children, callbacks. A walk over leaves reads no further than this */
    ctx_t **pprev;          /* [parent's list mu] */
    ctx__shard_t *shards;   /* [atomic, set once under list.mu] NULL or ctx__shard_count of them */
    ctx_t *parent;          /* [const] */
    uint32_t refs, pins;    /* [atomic] */
    ctx_on_done_t *on_done; /* [list.mu] circular; wakers before others */
    ctx__timer_t timer;     /* timer.deadline is the effective one, even if it belongs to an ancestor */
    ctx__why_t own;         /* [list.mu] until why points to it; own.what is the deadline's cause before that */
    ctx__record_t *values;  /* [const] */
    const char *name, *site; /* [const] */
    ctx_t *work;            /* [the thread that marked the node] the next of a walk, or among the dead */
    ctx__event_t *event;    /* [list.mu] what ctx_done_fd() made */
    ctx__link_t watch;      /* [ctx__watched's mu] */
};

enum {
    CTX__F_STATIC = 1,  /* never freed: the background, failed contexts */
    CTX__F_FAILED = 2,  /* takes no children: deriving gives itself */
    CTX__F_VALUES = 4,  /* holds a reference to its record, if it has one */
    CTX__F_MERGED = 8,  /* the node of a ctx__merged_t */
    CTX__F_NOTIFY = 16, /* a ctx__notify_t: section 13 */
    CTX__F_DECIDED = 32, /* ctx_sampled() was decided here or above: ... */
    CTX__F_SAMPLED = 64, /* ... it says yes */
    CTX__F_PROXY = 128, /* the proxy of a ctx__merged_t */
    CTX__F_SAMPLING = CTX__F_DECIDED | CTX__F_SAMPLED, CTX__F_BIG = CTX__F_MERGED | CTX__F_NOTIFY
};

typedef struct {
    ctx_t node;
    ctx_t proxy; /* in b's list; only why, list.attached and the links mean anything */
    ctx_dur_t grace; /* [const] */
    ctx_time_t own;  /* [const] its own deadline: an earlier one is the end of the grace period */
    bool begun;      /* [atomic] the grace period; by the thread that marked the proxy or the one that attached it */
} ctx__merged_t;

static void ctx__record_release(ctx__record_t *record); /* section 4 */
static int ctx__timer_ready(void);                      /* section 5 */
static bool ctx__timer_arm(ctx__timer_t *timer, ctx_time_t deadline);
static bool ctx__timer_disarm(ctx__timer_t *timer);
static bool ctx__timer_shift(ctx__timer_t *timer, ctx_time_t deadline, bool *armed);
static void ctx__runtime_kick(void);
static bool ctx__timer_remove(ctx__timer_t *timer);
static void ctx__timer_revive(const ctx_t *ctx);
static void ctx__runtime_hand_over(ctx_t *first, ctx_t *last);
static void ctx__notify_ended(ctx_t *node); /* section 13 */

/* The nodes that are never freed. Written out by position, for C++. */
#define CTX__STATIC_TIMER { NULL, NULL, CTX_NO_DEADLINE, 0, 1, 0, 0, 0 }
#define CTX__STATIC_NODE(err, flags, why, name)                                                                     \
    { { err }, CTX__F_STATIC | (flags), 0, 0, 0, why, NULL, { 0, 0, 0, 0, 0, NULL }, NULL, NULL, NULL, 1, 1, NULL,     \
      CTX__STATIC_TIMER, { 0, 0, 0, NULL, NULL }, NULL, name, "", NULL, NULL, { NULL, NULL } }

static ctx_t ctx__root = CTX__STATIC_NODE(0, 0, NULL, "background");

/* The shared contexts that have failed. */
#define CTX__FAILURES(entry)                        \
    entry(0, CTX_NO_MEMORY, "out of memory")        \
    entry(1, CTX_INVALID, "invalid argument")       \
    entry(2, CTX_ALREADY, "signals belong to another copy of the library")
#define CTX__FAILURE_RECORD(i, err, what) { err, (int16_t)(err), 1, what, "" },
#define CTX__FAILURE_NODE(i, err, what) CTX__STATIC_NODE(err, CTX__F_FAILED, &ctx__failures[i], "failed"),
static const ctx__why_t ctx__failures[] = { CTX__FAILURES(CTX__FAILURE_RECORD) };
static ctx_t ctx__failed_nodes[] = { CTX__FAILURES(CTX__FAILURE_NODE) };

/* The shared context that failed with `err`. */
static ctx_t *ctx__failed(int err) {
    size_t i;
    for (i = sizeof ctx__failures / sizeof *ctx__failures - 1; i > 0 && ctx__failures[i].err != err; i--) {}
    return &ctx__failed_nodes[i]; /* the first by default */
}

static unsigned ctx__shard_count = 4; /* [const] after ctx__once; a power of two */

enum { CTX__SHARDS_MAX = 64, CTX__CONTENDED = 16 };

enum { CTX__GRACED = 1, CTX__GRACED_ABOVE = 2 };

/* As the node knows it. A grace period that begins makes it earlier; nothing makes that of a node later, except what a
   pool's worker does to its own. */
static inline ctx_time_t ctx__deadline(const ctx_t *ctx) { return CTX__LOAD(&ctx->timer.deadline, RELAXED); }

static ctx__merged_t *ctx__merged_of(const ctx_t *node) { return CTX__CONTAINER(node, ctx__merged_t, node); }

/* The parent that a merged context has besides. */
static const ctx_t *ctx__second_parent(const ctx_t *node) {
    return (node->flags & CTX__F_MERGED) && !(node->graced & CTX__GRACED) ? ctx__merged_of(node)->proxy.parent : NULL;
}

static CTX__COLD ctx_time_t ctx__deadline_climb(const ctx_t *node) {
    ctx_time_t deadline = CTX_NO_DEADLINE;
    for (; node; node = node->parent) {
        const ctx_t *b = ctx__second_parent(node);
        deadline = ctx__min(deadline, ctx__deadline(node));
        for (; b; b = b->parent) deadline = ctx__min(deadline, ctx__deadline(b));
    }
    return deadline;
}

/* With grace periods above that have begun since the node was made. */
static inline ctx_time_t ctx__deadline_now(const ctx_t *ctx) {
    return CTX__UNLIKELY(ctx->graced & CTX__GRACED_ABOVE) ? ctx__deadline_climb(ctx) : ctx__deadline(ctx);
}

static const ctx__why_t *ctx__why(const ctx_t *ctx) { return CTX__LOAD(&ctx->why, SEQ_CST); }

/* Done? If so `err` says it too on return: the thread that set `why` may be just about to store it. */
static bool ctx__done(ctx_t *ctx) {
    const ctx__why_t *why = ctx__why(ctx);
    if (why) CTX__STORE(&ctx->head.err, (int)why->err, RELEASE);
    return why != NULL;
}

static inline void ctx__node_dealloc(ctx_t *node) {
    node->refs = 0; /* so that ending it again is noticed while it waits in the cache */
    if (node->flags & CTX__F_BIG) CTXCANCEL_FREE(node);
    else ctx__cache_give(CTX__CACHE_NODES, node);
}

static ctx__list_t *ctx__list_of(ctx_t *parent, unsigned shard) {
    return shard ? &parent->shards[shard - 1].list : &parent->list;
}

/* [list.mu] What keeps the pin of a list. */
static bool ctx__list_idle(const ctx_t *node, const ctx__list_t *list) {
    return !list->first && (list->shard || !node->on_done);
}

/* [list.mu] The first attachment takes the pin for all. */
static inline void ctx__list_attach(ctx_t *node, ctx__list_t *list) {
    if (list->attached) return;
    CTX__STORE(&list->attached, 1, RELEASE);
    if (!list->shard) CTX__ADD(&node->pins, 1u, RELAXED);
}

static ctx__shard_t ctx__root_shards[CTX__SHARDS_MAX]; /* the background's, which is never freed */

static ctx__shard_t *ctx__shards_alloc(const ctx_t *node) {
    ctx__shard_t *head; /* a line before the shards: what to free */
    void *raw;
    if (node == &ctx__root) return ctx__root_shards;
    head = (ctx__shard_t *)ctx__alloc_lines((ctx__shard_count + 1) * sizeof *head, 0, &raw);
    if (head) *(void **)(void *)head = raw;
    return head ? head + 1 : NULL;
}

static void ctx__shards_free(ctx__shard_t *shards) {
    if (shards && shards != ctx__root_shards) CTXCANCEL_FREE(*(void **)(void *)(shards - 1));
}

/* Give a contended parent shards. Without memory it stays as it is. */
static CTX__COLD void ctx__shards_make(ctx_t *node) {
    unsigned i, n = ctx__shard_count;
    ctx__shard_t *shards = ctx__shards_alloc(node);
    if (!shards) return;
    ctx__enter(&node->list.mu);
    if (!node->shards && !node->list.orphan) {
        for (i = 0; i < n; i++) {
            shards[i].list.shard = (uint8_t)(i + 1);
            shards[i].list.attached = 1;
        }
        ctx__list_attach(node, &node->list);
        CTX__ADD(&node->pins, n, RELAXED);
        CTX__STORE(&node->shards, shards, RELEASE);
        shards = NULL;
    }
    ctx__leave(&node->list.mu);
    ctx__shards_free(shards);
}

/* Put a new node into its parent's list, done if the parent is. Stays inside. True: the parent needs shards. */
static CTX__INLINE bool ctx__attach(ctx_t *parent, ctx_t *node) {
    ctx__shard_t *shards = CTX__LOAD(&parent->shards, ACQUIRE);
    ctx__list_t *list = &parent->list;
    const ctx__why_t *why;
    bool contended;
    if (shards) list = &shards[ctx__me()->index & (ctx__shard_count - 1)].list;
    contended = ctx__enter(&list->mu) && !shards;
    if (CTX__UNLIKELY(contended)) contended = list->contended == CTX__CONTENDED || ++list->contended == CTX__CONTENDED;
    why = ctx__why(parent);
    CTX__STORE(&node->why, why, RELAXED);
    if (CTX__UNLIKELY(why != NULL)) node->head.err = why->err;
    ctx__list_attach(parent, list);
    node->shard = list->shard;
    node->next = list->first;
    node->pprev = &list->first;
    if (node->next) node->next->pprev = &node->next;
    list->first = node;
    ctx__unlock(&list->mu);
    return contended;
}

/* [list->mu] */
static inline void ctx__unlink_locked(ctx_t *node) {
    *node->pprev = node->next;
    if (node->next) node->next->pprev = node->pprev;
}

/* Take a pin that does not rest on a reference. False: the node is being freed. */
static bool ctx__pin(ctx_t *node) {
    uint32_t pins = CTX__LOAD(&node->pins, RELAXED);
    while (pins)
        if (CTX__CAS_WEAK(&node->pins, &pins, pins + 1, ACQUIRE, RELAXED)) return true;
    return false;
}

/* Give a pin back; the node that it was the last of goes onto the list of the dead. */
static void ctx__pin_drop(ctx_t *node, ctx_t **dead) {
    uint32_t before = CTX__SUB(&node->pins, 1u, ACQ_REL);
    CTXCANCEL_ASSERT(before != 0);
    if (before != 1) return;
    node->work = *dead;
    *dead = node;
}

/* Take an entry out of its parent's list. The parent may die of it. */
static void ctx__detach(ctx_t *node, ctx_t **dead) {
    ctx_t *parent = node->parent;
    ctx__list_t *list = ctx__list_of(parent, node->shard);
    bool last;
    ctx__enter(&list->mu);
    ctx__unlink_locked(node);
    last = list->orphan && ctx__list_idle(parent, list);
    ctx__leave(&list->mu);
    if (last) ctx__pin_drop(parent, dead);
}

/* Free a node that nothing holds. Its parents may die of it. */
static void ctx__node_free(ctx_t *node, ctx_t **dead) {
    if (CTX__LOAD(&node->timer.armed, ACQUIRE)) ctx__timer_remove(&node->timer);
    if (node->watched) ctx__watched_remove(&node->watch);
    if (node->flags & CTX__F_MERGED) ctx__detach(&((ctx__merged_t *)(void *)node)->proxy, dead);
    ctx__detach(node, dead);
    if ((node->flags & CTX__F_VALUES) && node->values) ctx__record_release(node->values);
    if (node->event) {
        ctx__event_close(node->event);
        CTXCANCEL_FREE(node->event);
    }
    ctx__shards_free(node->shards);
    ctx__node_dealloc(node);
}

static void ctx__bury(ctx_t *dead) {
    while (dead) {
        ctx_t *node = dead;
        dead = node->work;
        ctx__node_free(node, &dead);
    }
}

static void ctx__unpin(ctx_t *node) {
    ctx_t *dead = NULL;
    ctx__pin_drop(node, &dead);
    ctx__bury(dead);
}

static void ctx__list_orphan(ctx_t *node, ctx__list_t *list, ctx_t **dead) {
    bool idle;
    ctx__enter(&list->mu);
    list->orphan = 1;
    idle = ctx__list_idle(node, list);
    ctx__leave(&list->mu);
    if (idle) ctx__pin_drop(node, dead);
}

/* The last reference is gone: nobody can attach any more. What is attached keeps the node until it leaves. */
static CTX__COLD void ctx__unowned(ctx_t *node) {
    ctx_t *dead = NULL;
    unsigned i;
    if (node->flags & CTX__F_NOTIFY) ctx__notify_ended(node);
    if (CTX__LOAD(&node->list.attached, ACQUIRE)) {
        ctx__shard_t *shards = CTX__LOAD(&node->shards, ACQUIRE);
        for (i = 0; shards && i < ctx__shard_count; i++) ctx__list_orphan(node, &shards[i].list, &dead);
        ctx__list_orphan(node, &node->list, &dead);
    }
    ctx__pin_drop(node, &dead);
    ctx__bury(dead);
}

/* -- walks -- */

typedef struct {
    ctx_t *first, *last; /* nodes marked here that have something attached, linked by work, pinned */
    ctx_t *graced;       /* nodes whose proxy was marked here, linked by the proxy's work, pinned */
    bool announced;
    bool kick;           /* an armed timer wants the runtime thread */
    bool met;            /* came to a node that another walk had marked, and may not be over */
} ctx__walk_t;

static struct {
    uint32_t epoch; /* [atomic] odd; counted on by those that wait, so that later walks are told from earlier ones */
    uint32_t met;   /* [atomic] walks that have met another */
} ctx__walks = { 1, 0 };

/* Before anything is marked: the store is released by the compare-and-swap that marks. */
static void ctx__walk_announce(ctx__walk_t *walk) {
    if (!walk->announced) CTX__STORE(&ctx__self.walk, CTX__LOAD(&ctx__walks.epoch, ACQUIRE), RELAXED);
    walk->announced = true;
}

static void ctx__walk_push(ctx__walk_t *walk, ctx_t *node) {
    node->work = NULL;
    if (walk->last) walk->last->work = node;
    else walk->first = node;
    walk->last = node;
}

/* Anything attached, or being attached? Comes after `why` was set. */
static inline bool ctx__attached(ctx_t *node) {
    return CTX__LOAD(&node->list.mu, SEQ_CST) || CTX__LOAD(&node->list.attached, ACQUIRE);
}

/* Set `why` if nothing did before. Returns NULL, or what another thread has set. `err` is set on return either way. */
static inline const ctx__why_t *ctx__mark(ctx_t *node, const ctx__why_t *why) {
    const ctx__why_t *seen = NULL;
    if (CTX__CAS(&node->why, &seen, why, SEQ_CST, SEQ_CST)) seen = NULL;
    CTX__STORE(&node->head.err, (int)(seen ? seen : why)->err, RELEASE);
    return seen;
}

/* [list mu of the proxy's parent] */
static void ctx__walk_grace(ctx__walk_t *walk, ctx__merged_t *merged) {
    if (!ctx__pin(&merged->node)) return;
    merged->proxy.work = walk->graced;
    walk->graced = &merged->node;
}

/* [inside] The parent is done: now the grace period runs. True: the runtime thread is to be kicked. */
static bool ctx__grace_begin(ctx__merged_t *merged) {
    ctx_t *node = &merged->node;
    ctx_time_t end = ctx_time_add(ctx_now(), merged->grace), deadline = ctx__deadline(node);
    bool armed;
    if (CTX__EXCHANGE(&merged->begun, true, ACQ_REL) || end >= deadline || ctx__done(node)) return false;
    if (deadline == CTX_NO_DEADLINE) return ctx__timer_arm(&node->timer, end);
    return ctx__timer_shift(&node->timer, end, &armed); /* if not armed any more it is due already */
}

/* [list mu of child's parent] */
static void ctx__mark_child(ctx__walk_t *walk, ctx_t *child, const ctx__why_t *why) {
    const ctx__why_t *seen = ctx__mark(child, why);
    if (!ctx__attached(child)) return;
    if (!seen && (child->flags & CTX__F_PROXY)) {
        ctx__merged_t *merged = CTX__CONTAINER(child, ctx__merged_t, proxy);
        if (child->graced & CTX__GRACED) {
            ctx__walk_grace(walk, merged);
            return;
        }
        child = &merged->node;
        seen = ctx__mark(child, why);
    }
    if (seen) walk->met = walk->met || !CTX__LOAD(&seen->walked, ACQUIRE);
    else if (ctx__pin(child)) ctx__walk_push(walk, child);
}

static void ctx__mark_list(ctx__walk_t *walk, ctx__list_t *list, const ctx__why_t *why) {
    ctx_t *child;
    ctx__lock(&list->mu);
    for (child = list->first; child; child = child->next) {
        if (child->next) __builtin_prefetch(child->next);
        ctx__mark_child(walk, child, why);
    }
    ctx__unlock(&list->mu);
}

/* [inside] Mark everything below the nodes of the walk. Then nobody needs to wait for it. */
static void ctx__walk_below(ctx__walk_t *walk) {
    ctx_t *node;
    if (!walk->announced) return;
    for (node = walk->first; node; node = node->work) {
        const ctx__why_t *why = ctx__why(node);
        ctx__shard_t *shards;
        unsigned i;
        ctx__mark_list(walk, &node->list, why);
        shards = CTX__LOAD(&node->shards, ACQUIRE);
        for (i = 0; shards && i < ctx__shard_count; i++) ctx__mark_list(walk, &shards[i].list, why);
    }
    for (node = walk->graced; node; node = ctx__merged_of(node)->proxy.work)
        if (ctx__grace_begin(ctx__merged_of(node))) walk->kick = true;
    if (walk->met) CTX__ADD(&ctx__walks.met, 1u, ACQ_REL);
    CTX__STORE(&ctx__self.walk, 0u, RELEASE); /* pairs with the load in ctx__walks_busy() */
}

/* Nothing is held. */
static CTX__COLD void ctx__walk_graced(ctx__walk_t *walk) {
    ctx_t *node, *next, *dead = NULL;
    for (node = walk->graced; node; node = next) {
        next = ctx__merged_of(node)->proxy.work;
        ctx__pin_drop(node, &dead);
    }
    ctx__bury(dead);
    ctx__timer_ready(); /* if there is no thread now, a later use of a deadline starts one */
    if (walk->kick) ctx__runtime_kick();
}

/* Is a walk of epoch `last` or before under way? */
static bool ctx__walks_busy(uint32_t last) {
    const ctx__link_t *link;
    bool busy = false, forks = CTX__LOAD(&ctx__gate.forking, ACQUIRE) == &ctx__self; /* and so has the lock */
    if (!forks) ctx__lock(&ctx__gate.mu);
    for (link = ctx__gate.threads; link && !busy; link = link->next) {
        uint32_t walk = CTX__LOAD(&CTX__CONTAINER(link, ctx__thread_t, link)->walk, ACQUIRE);
        busy = walk && (int32_t)(walk - last) <= 0;
    }
    if (!forks) ctx__unlock(&ctx__gate.mu);
    return busy;
}

/* Wait for the walks that are announced now, and for those which they rely on. Nothing is held. */
static CTX__COLD void ctx__walks_wait(void) {
    unsigned turn = 0;
    uint32_t met, last;
    do {
        met = CTX__LOAD(&ctx__walks.met, ACQUIRE);
        last = CTX__ADD(&ctx__walks.epoch, 2u, ACQ_REL);
        while (ctx__walks_busy(last)) ctx__relax(&turn);
    } while (CTX__LOAD(&ctx__walks.met, ACQUIRE) != met);
}

/* -- callbacks -- */

enum { CTX__REG_IDLE, CTX__REG_LINKED, CTX__REG_STOPPING, CTX__REG_FIRED, CTX__REG_DONE };
enum { CTX__REG_WAKER = 1, CTX__REG_OWN = 2, CTX__REG_THREAD = 4 }; /* flags; OWN: the library's, on the heap */

typedef struct ctx__stopper {
    struct ctx__stopper *next;
    ctx__thread_t *thread;
    ctx__parker_t parker;
} ctx__stopper_t;

/* A callback that is running. */
typedef struct ctx__frame {
    struct ctx__frame *next;    /* [stripe] */
    const ctx_on_done_t *reg;   /* [stripe] NULL once that is registered anew */
    const ctx__thread_t *thread; /* [const] */
    ctx__stopper_t *stoppers;   /* [stripe] who waits for the end */
} ctx__frame_t;

typedef struct {
    CTX__ALIGNED uint32_t mu;
    ctx__frame_t *frames; /* [mu; atomic for the look in ctx__reg_add()] */
} ctx__stripe_t;
static ctx__stripe_t ctx__stripes[CTX__STRIPES];
static uint32_t ctx__stops; /* the lock of who waits for whom; before a stripe's */

static ctx__stripe_t *ctx__stripe_of(const ctx_on_done_t *reg) { return &ctx__stripes[ctx__stripe_index(reg)]; }

/* [ctx->list.mu] */
static void ctx__reg_link(ctx_t *ctx, ctx_on_done_t *reg) {
    ctx_on_done_t *head = ctx->on_done;
    if (!ctx->watched) ctx->watched = ctx__watched_add(&ctx->watch);
    if (!head) {
        reg->next = reg->prev = reg;
        ctx->on_done = reg;
        return;
    }
    reg->next = head;
    reg->prev = head->prev;
    reg->prev->next = reg->next->prev = reg;
    if (reg->flags & CTX__REG_WAKER) ctx->on_done = reg;
}

/* [ctx->list.mu] */
static void ctx__reg_unlink_locked(ctx_t *ctx, ctx_on_done_t *reg) {
    if (ctx->on_done == reg) ctx->on_done = reg->next == reg ? NULL : reg->next;
    reg->next->prev = reg->prev;
    reg->prev->next = reg->next;
}

/* [stripe] */
static bool ctx__reg_is_linked(const ctx_on_done_t *reg) {
    int state = CTX__LOAD(&reg->state, ACQUIRE);
    return state == CTX__REG_LINKED || state == CTX__REG_STOPPING;
}

/* The frame whose run is that of reg's latest registration. [stripe] */
static ctx__frame_t *ctx__frame_find(const ctx__stripe_t *stripe, const ctx_on_done_t *reg) {
    ctx__frame_t *frame = stripe->frames;
    while (frame && frame->reg != reg) frame = frame->next;
    return frame;
}

/* [stripe] `reg` is registered anew, or runs at once: an older run, this thread's own, is not found any more. */
static void ctx__frame_forget(ctx__stripe_t *stripe, ctx_on_done_t *reg, int state) {
    ctx__frame_t *frame = ctx__frame_find(stripe, reg);
    if (frame) frame->reg = NULL;
    CTX__STORE(&reg->state, state, RELEASE);
}

/* From LINKED to FIRED, or with `unlinked` from any state, with the frame in place: a thread that sees FIRED finds it
   until the run is over. False: a thread that stops it was first. */
static bool ctx__frame_enter(ctx__frame_t *frame, ctx_on_done_t *reg, bool unlinked) {
    ctx__stripe_t *stripe = ctx__stripe_of(reg);
    int state = CTX__REG_LINKED;
    bool won = true;
    frame->reg = reg;
    frame->thread = &ctx__self;
    frame->stoppers = NULL;
    ctx__enter(&stripe->mu);
    if (unlinked) ctx__frame_forget(stripe, reg, CTX__REG_FIRED);
    else won = CTX__CAS(&reg->state, &state, CTX__REG_FIRED, ACQ_REL, RELAXED);
    if (won) {
        frame->next = stripe->frames;
        CTX__STORE(&stripe->frames, frame, RELAXED);
    }
    ctx__leave(&stripe->mu);
    return won;
}

/* `reg` may be gone: its address picks the stripe. */
static void ctx__frame_leave(ctx__frame_t *frame, const ctx_on_done_t *reg) {
    ctx__stripe_t *stripe = ctx__stripe_of(reg);
    ctx__frame_t **at;
    ctx__stopper_t *stopper, *next;
    ctx__enter(&stripe->mu);
    for (at = &stripe->frames; *at != frame; at = &(*at)->next) {}
    CTX__STORE(at, frame->next, RELAXED);
    stopper = frame->stoppers;
    ctx__leave(&stripe->mu);
    if (!stopper) return;
    ctx__enter(&ctx__stops);
    for (; stopper; stopper = next) {
        next = stopper->next; /* the thread that is unparked takes its stopper along */
        stopper->thread->waits_for = NULL;
        ctx__unpark(&stopper->parker);
    }
    ctx__leave(&ctx__stops);
}

/* Wait until the run of `reg` that has begun is over. True: look again, for it has waited, or `reg` is linked anew.
   False: there is nothing to wait for, or the run is this thread's own, or waits for it. */
static bool ctx__frame_wait(const ctx_on_done_t *reg) {
    ctx__stripe_t *stripe = ctx__stripe_of(reg);
    ctx__thread_t *me = ctx__me();
    const ctx__thread_t *thread;
    ctx__stopper_t stopper;
    ctx__frame_t *frame;
    bool linked;
    stopper.thread = me;
    ctx__parker_init(&stopper.parker);
    ctx__enter(&ctx__stops);
    ctx__lock(&stripe->mu);
    frame = ctx__frame_find(stripe, reg);
    linked = !frame && ctx__reg_is_linked(reg);
    for (thread = frame ? frame->thread : NULL; thread && thread != me; thread = thread->waits_for) {}
    if (frame && !thread) {
        me->waits_for = frame->thread;
        stopper.next = frame->stoppers;
        frame->stoppers = &stopper;
    }
    ctx__unlock(&stripe->mu);
    ctx__leave(&ctx__stops);
    if (frame && !thread) ctx__park_real(&stopper.parker, CTX_NO_DEADLINE);
    return linked || (frame && !thread);
}

/* Take the next callback that nobody is stopping. With `wakers`, only those. [list.mu] */
static ctx_on_done_t *ctx__reg_claim(ctx_t *node, bool wakers, ctx__frame_t *frame) {
    ctx_on_done_t *reg = node->on_done;
    if (!reg) return NULL;
    do {
        bool waker = (reg->flags & CTX__REG_WAKER) != 0;
        int linked = CTX__REG_LINKED;
        if (wakers && !waker) return NULL;
        if (waker ? CTX__CAS(&reg->state, &linked, CTX__REG_FIRED, ACQ_REL, RELAXED)
                  : ctx__frame_enter(frame, reg, false)) {
            ctx__reg_unlink_locked(node, reg);
            return reg;
        }
        reg = reg->next;
    } while (reg != node->on_done);
    return NULL;
}

/* Run the callbacks of a pinned node that is done. Returns whether any are left. */
static bool ctx__reg_run(ctx_t *node, bool wakers, ctx_t **dead) {
    for (;;) {
        ctx__frame_t frame;
        ctx_on_done_t *reg;
        ctx__event_t *event;
        bool last, left;
        ctx__enter(&node->list.mu);
        reg = ctx__reg_claim(node, wakers, &frame);
        last = reg && node->list.orphan && ctx__list_idle(node, &node->list);
        left = node->on_done != NULL;
        event = wakers ? node->event : NULL;
        ctx__leave(&node->list.mu);
        if (!reg && event) ctx__event_set(event);
        if (!reg) return left;
        if (reg->flags & CTX__REG_WAKER) {
            reg->fn(reg->arg);
            CTX__STORE(&reg->state, CTX__REG_DONE, RELEASE);
        } else {
            ctx__call_out(reg->fn, reg->arg);
            ctx__frame_leave(&frame, reg);
        }
        if (last) ctx__pin_drop(node, dead);
    }
}

/* -- canceling -- */

/* A thread that runs the callbacks of a walk. */
typedef struct {
    ctx__scope_t scope; /* CTX__IN_CALLBACK */
    ctx_t *first;       /* linked by work */
} ctx__calling_t;

/* Run the callbacks of nodes that are done, and give their pins back. A callback may fork, and the child go on here. */
static void ctx__walk_call(ctx_t *first) {
    ctx_t *node, *next, *dead = NULL;
    ctx__calling_t calling;
    calling.first = first;
    ctx__scope_enter(&calling.scope, CTX__IN_CALLBACK, NULL);
    for (node = first; node; node = node->work) ctx__reg_run(node, false, &dead);
    ctx__scope_leave(&calling.scope);
    for (node = first; node; node = next) {
        next = node->work;
        ctx__pin_drop(node, &dead);
    }
    ctx__bury(dead);
}

/* What cancels a node. Without a `what` its deadline does. */
typedef struct {
    int err, code;
    const char *what, *site;
} ctx__reason_t;

static const ctx__reason_t ctx__deadline_passed = { CTX_DEADLINE_EXCEEDED, CTX_DEADLINE_EXCEEDED, NULL, NULL };

/* Of a cancel whose err is CTX_CANCELED whatever the code is. */
static ctx__reason_t ctx__reason(int code, const char *what, const char *site) {
    ctx__reason_t reason = { CTX_CANCELED, code ? code : CTX_CANCELED, what, site };
    return reason;
}

static ctx__reason_t ctx__reason_of(const ctx__why_t *why) {
    ctx__reason_t reason = { why->err, why->code, why->what, why->site };
    return reason;
}

/* What the passing of its deadline means for a node: that its grace period is over, or what the deadline was given. */
static ctx__reason_t ctx__deadline_reason(const ctx_t *node) {
    const ctx__merged_t *merged = ctx__merged_of(node);
    bool over = (node->graced & CTX__GRACED) && ctx__deadline(node) < merged->own;
    const ctx__why_t *why = over ? ctx__why(&merged->proxy) : NULL;
    const ctx_t *above = over ? merged->proxy.parent : NULL;
    ctx__reason_t reason = ctx__deadline_passed;
    for (; above && !why; above = above->parent) why = ctx__why(above); /* due in the same turn, and not walked yet */
    if (why) return ctx__reason_of(why);
    reason.what = node->own.what ? node->own.what : "deadline exceeded";
    return reason;
}

/* [top->list.mu] Mark the node at the top of a walk. False: it was done before. */
static bool ctx__walk_top(ctx__walk_t *walk, ctx_t *top, ctx__reason_t reason) {
    if (ctx__done(top)) return false;
    if (!reason.what) reason = ctx__deadline_reason(top);
    if (top->list.attached) ctx__walk_announce(walk);
    top->own.err = (int16_t)reason.err;
    top->own.code = reason.code;
    top->own.walked = !top->list.attached;
    top->own.what = reason.what;
    top->own.site = reason.site ? reason.site : top->site;
    if (ctx__mark(top, &top->own)) return false;
    if (top->list.attached && ctx__pin(top)) ctx__walk_push(walk, top);
    return true;
}

/* Everything below is marked: now it is told. */
static void ctx__walk_tell(ctx__walk_t *walk, bool later) {
    ctx_t *node, *dead = NULL;
    bool left = false;
    if (CTX__UNLIKELY(walk->graced != NULL)) ctx__walk_graced(walk);
    if (!walk->first) return;
    for (node = walk->first; node; node = node->work) left = ctx__reg_run(node, true, &dead) || left;
    ctx__bury(dead);
    if (left && later) ctx__runtime_hand_over(walk->first, walk->last);
    else ctx__walk_call(walk->first);
}

/* Nothing is held. After that everything below `node` is done. */
static void ctx__walk_settle(const ctx__walk_t *walk, ctx_t *node, bool won) {
    const ctx__why_t *why = ctx__why(node);
    if (won ? walk->met : !CTX__LOAD(&why->walked, ACQUIRE)) ctx__walks_wait();
    if (won && walk->announced) CTX__STORE(&node->own.walked, 1, RELEASE);
}

/* `later`: leave the callbacks to the runtime thread. True: this call did it. */
static bool ctx__cancel(ctx_t *node, ctx__reason_t reason, bool later) {
    const ctx__why_t *why = ctx__why(node);
    ctx__walk_t walk;
    bool won;
    if ((why && CTX__LOAD(&why->walked, ACQUIRE) && ctx__done(node)) || (node->flags & CTX__F_STATIC)) return false;
    memset(&walk, 0, sizeof walk);
    ctx__enter(&node->list.mu);
    won = ctx__walk_top(&walk, node, reason);
    ctx__unlock(&node->list.mu);
    ctx__walk_below(&walk);
    ctx__outside(&ctx__self);
    ctx__walk_settle(&walk, node, won);
    ctx__walk_tell(&walk, later);
    return won;
}

/* -- makers -- */

static inline ctx_t *ctx__node_init(ctx_t *node, ctx_t *parent, ctx_time_t deadline, const char *name,
                                    const char *site) {
    node->head.err = 0;
    node->flags = node->watched = node->graced = 0;
    node->list.mu = 0;
    node->list.orphan = node->list.contended = node->list.attached = node->list.shard = 0;
    node->list.first = NULL;
    node->shards = NULL;
    node->parent = parent;
    node->refs = node->pins = 1;
    node->on_done = NULL;
    node->timer.deadline = deadline;
    node->timer.armed = 0;
    node->timer.kind = CTX__TIMER_NODE;
    node->own.what = NULL;
    node->values = NULL;
    node->name = name;
    node->site = site;
    node->event = NULL;
    return node;
}

/* What a maker asks for. `record` is handed over. */
typedef struct {
    ctx_time_t deadline; /* CTX_NO_DEADLINE: none of its own */
    bool detach;
    uint8_t graced;
    uint8_t flags;
    ctx__record_t *record;
    const char *name, *deadline_cause, *site;
} ctx__make_t;

static void ctx__record_retain(ctx__record_t *record);

static CTX__COLD ctx_t *ctx__make_failed(const ctx__make_t *make, int err) {
    if (make->record) ctx__record_release(make->record);
    return ctx__failed(err);
}

/* The one maker. `node` is storage from the caller's own allocation, or NULL. Inlined where what is asked for is mostly
   constant. */
static CTX__INLINE ctx_t *ctx__make_inline(ctx_t *parent, ctx_t *node, const ctx__make_t *make) {
    ctx_t *tree = make->detach ? &ctx__root : parent;
    ctx_time_t limit = ctx__deadline_now(tree);
    bool timed = make->deadline < limit, kick = false, contended;
    if (timed) {
        int rc = ctx__timer_ready();
        if (CTX__UNLIKELY(rc)) return ctx__make_failed(make, rc);
    }
    if (!node) node = (ctx_t *)ctx__cache_take(CTX__CACHE_NODES, sizeof *node);
    if (CTX__UNLIKELY(!node)) return ctx__make_failed(make, CTX_NO_MEMORY);
    ctx__node_init(node, tree, timed ? make->deadline : limit, make->name ? make->name : parent->name, make->site);
    node->own.what = make->deadline_cause;
    node->graced = (uint8_t)(make->graced | (CTX__UNLIKELY(tree->graced) ? CTX__GRACED_ABOVE : 0));
    node->flags = (uint8_t)(make->flags | (parent->flags & CTX__F_SAMPLING));
    if (make->record) {
        node->values = make->record;
        node->flags |= CTX__F_VALUES;
    } else if (parent->values && !(make->flags & CTX__F_VALUES)) {
        node->values = parent->values; /* the parent, which outlives the child, holds it; a detached one must itself */
        if (make->detach) {
            ctx__record_retain(node->values);
            node->flags |= CTX__F_VALUES;
        }
    }
    contended = ctx__attach(tree, node);
    if (timed && !ctx_err(node)) kick = ctx__timer_arm(&node->timer, make->deadline);
    ctx__outside(&ctx__self);
    if (CTX__UNLIKELY(kick)) ctx__runtime_kick();
    if (CTX__UNLIKELY(contended)) ctx__shards_make(tree);
    return node;
}

static ctx_t *ctx__make(ctx_t *parent, ctx_t *node, const ctx__make_t *make) {
    return ctx__make_inline(parent, node, make);
}

/* A deadline that has passed needs no timer. */
static CTX__INLINE ctx_t *ctx__make_timed(ctx_t *parent, ctx__make_t *make, ctx_time_t now) {
    ctx_time_t deadline = make->deadline;
    ctx_t *node;
    if (CTX__UNLIKELY(deadline <= now)) make->deadline = CTX_NO_DEADLINE;
    node = ctx__make_inline(parent, NULL, make);
    if (CTX__UNLIKELY(deadline <= now && !(node->flags & CTX__F_STATIC))) {
        if (deadline < ctx__deadline(node)) CTX__STORE(&node->timer.deadline, deadline, RELAXED);
        ctx__cancel(node, ctx__deadline_passed, false);
    }
    return node;
}

static const ctx__make_t ctx__make_plain = { CTX_NO_DEADLINE, false, 0, 0, NULL, NULL, NULL, NULL };

/* NULL, or what a maker gives for a parent that cannot have children. */
static inline ctx_t *ctx__bad_parent(ctx_t *parent) {
    if (CTX__UNLIKELY(!parent)) return ctx__failed(CTX_INVALID);
    return CTX__UNLIKELY(parent->flags & CTX__F_FAILED) ? parent : NULL;
}

static ctx__record_t *ctx__record_with(const ctx__record_t *base, const ctx_key_t *key, const void *value);

CTXCANCEL_API ctx_t *ctx_background(void) { return &ctx__root; }

/* Storage for a node with two parents. Its proxy is to be attached to `b`. */
static ctx__merged_t *ctx__merged_alloc(ctx_t *b) {
    ctx__merged_t *merged = ctx__me()->linked ? (ctx__merged_t *)CTXCANCEL_MALLOC(sizeof *merged) : NULL;
    if (!merged) return NULL;
    ctx__node_init(&merged->proxy, b, CTX_NO_DEADLINE, NULL, NULL);
    merged->proxy.flags = CTX__F_PROXY;
    merged->proxy.why = NULL; /* a graced node may look before it is attached */
    merged->proxy.list.attached = 1; /* so that a walk looks closer */
    return merged;
}

static void ctx__proxy_attach(ctx__merged_t *merged, ctx_t *b) {
    bool contended = ctx__attach(b, &merged->proxy);
    ctx__outside(&ctx__self);
    if (contended) ctx__shards_make(b);
}

/* The parent was done when its graced child was attached, or soon after. */
static void ctx__grace_begin_late(ctx__merged_t *merged) {
    ctx__thread_t *me = ctx__inside();
    bool kick = ctx__grace_begin(merged);
    ctx__outside(me);
    if (kick) ctx__runtime_kick();
}

/* A child that goes on for `grace` when its parent is done. `make` has what else it is to be. */
static ctx_t *ctx__make_graced(ctx_t *parent, ctx__make_t *make, ctx_dur_t grace, ctx_time_t now) {
    ctx__merged_t *merged = ctx__merged_alloc(parent);
    ctx_time_t ends = ctx__why(parent) ? CTX_NO_DEADLINE : ctx__deadline_now(parent);
    ctx_time_t own = make->deadline;
    ctx_t *node;
    if (!merged) return ctx__make_failed(make, CTX_NO_MEMORY);
    if (ends != CTX_NO_DEADLINE) ends = ctx_time_add(ends > now ? ends : now, grace);
    make->deadline = own <= now ? CTX_NO_DEADLINE : ctx__min(own, ends);
    make->flags |= CTX__F_MERGED;
    make->detach = true;
    make->graced = CTX__GRACED;
    merged->own = own;
    merged->begun = false;
    merged->grace = grace;
    merged->proxy.graced = CTX__GRACED;
    node = ctx__timer_ready() ? ctx__make_failed(make, CTX_NO_MEMORY) : ctx__make(parent, &merged->node, make);
    if (node != &merged->node) {
        CTXCANCEL_FREE(merged);
        return node;
    }
    if (own <= now) { /* its timer is not armed, nor will it be */
        CTX__STORE(&node->timer.deadline, own, RELAXED);
        ctx__cancel(node, ctx__deadline_passed, false);
    }
    ctx__proxy_attach(merged, parent);
    if (ctx__why(&merged->proxy)) ctx__grace_begin_late(merged);
    return node;
}

CTXCANCEL_API ctx_t *ctx_derive_at(ctx_t *parent, const ctx_desc_t *desc, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx__make_t make = ctx__make_plain;
    ctx_time_t now;
    bool graced;
    if (bad) return bad;
    make.site = site;
    if (!desc) return ctx__make(parent, NULL, &make);
    make.name = desc->name;
    make.detach = desc->detach;
    make.deadline_cause = desc->deadline_cause;
    if (desc->sample_one_in && !(parent->flags & CTX__F_DECIDED))
        make.flags = ctx__random() % desc->sample_one_in ? CTX__F_DECIDED : CTX__F_SAMPLING;
    if (desc->key || desc->value) {
        if (!desc->key || (!desc->value && desc->key->size)) return ctx__failed(CTX_INVALID);
        make.record = ctx__record_with(parent->values, desc->key, desc->value);
        if (!make.record) return ctx__failed(CTX_NO_MEMORY);
    }
    graced = desc->grace > 0 && !desc->detach && parent != &ctx__root;
    if (!desc->deadline && !desc->timeout && !graced) return ctx__make(parent, NULL, &make);
    now = ctx_now();
    if (desc->deadline) make.deadline = desc->deadline;
    if (desc->timeout) make.deadline = ctx__min(make.deadline, ctx_time_add(now, desc->timeout));
    return graced ? ctx__make_graced(parent, &make, desc->grace, now) : ctx__make_timed(parent, &make, now);
}

CTXCANCEL_API ctx_t *ctx_with_cancel_at(ctx_t *parent, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx__make_t make = ctx__make_plain;
    make.site = site;
    return bad ? bad : ctx__make_inline(parent, NULL, &make);
}

static CTX__INLINE ctx_t *ctx__with_deadline(ctx_t *parent, ctx_time_t deadline, ctx_time_t now, const char *site) {
    ctx__make_t make = ctx__make_plain;
    make.site = site;
    make.deadline = deadline;
    return ctx__make_timed(parent, &make, now);
}

CTXCANCEL_API ctx_t *ctx_with_deadline_at(ctx_t *parent, ctx_time_t deadline, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    return bad ? bad : ctx__with_deadline(parent, deadline, ctx_now(), site);
}

CTXCANCEL_API ctx_t *ctx_with_timeout_at(ctx_t *parent, ctx_dur_t timeout, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx_time_t now = ctx_now();
    return bad ? bad : ctx__with_deadline(parent, ctx_time_add(now, timeout), now, site);
}

CTXCANCEL_API ctx_t *ctx_with_value_at(ctx_t *parent, const ctx_key_t *key, const void *value, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx__make_t make = ctx__make_plain;
    if (bad) return bad;
    if (!key || (!value && key->size)) return ctx__failed(CTX_INVALID);
    make.site = site;
    make.record = ctx__record_with(parent->values, key, value);
    return make.record ? ctx__make(parent, NULL, &make) : ctx__failed(CTX_NO_MEMORY);
}

CTXCANCEL_API ctx_t *ctx_without_cancel_at(ctx_t *parent, const char *site) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx__make_t make = ctx__make_plain;
    make.site = site;
    make.detach = true;
    return bad ? bad : ctx__make(parent, NULL, &make);
}

CTXCANCEL_API ctx_t *ctx_merge_at(ctx_t *a, ctx_t *b, const char *site) {
    ctx_t *bad = ctx__bad_parent(a), *node;
    const ctx__why_t *why;
    ctx__make_t make = ctx__make_plain;
    ctx__merged_t *merged;
    if (!bad) bad = ctx__bad_parent(b);
    if (bad) return bad;
    merged = ctx__merged_alloc(b);
    if (!merged) return ctx__failed(CTX_NO_MEMORY);
    make.site = site;
    make.flags = CTX__F_MERGED;
    node = ctx__make(a, &merged->node, &make);
    if (b->graced) node->graced |= CTX__GRACED_ABOVE;
    if (ctx__deadline_now(b) < node->timer.deadline) CTX__STORE(&node->timer.deadline, ctx__deadline_now(b), RELAXED);
    ctx__proxy_attach(merged, b);
    why = ctx__why(&merged->proxy);
    if (why) ctx__cancel(node, ctx__reason_of(why), false);
    return node;
}

CTXCANCEL_API bool ctx_cancel_cause_at(ctx_t *ctx, int code, const char *what, const char *site) {
    ctx__reason_t reason;
    CTXCANCEL_ASSERT(ctx__set(ctx));
    if (!ctx) return false;
    if (!what) what = ctx__own_text(code ? code : CTX_CANCELED);
    reason = ctx__reason(code, what ? what : ctx__own_text(CTX_CANCELED), site);
    if (code == CTX_DEADLINE_EXCEEDED) reason.err = code;
    return ctx__cancel(ctx, reason, false);
}

CTXCANCEL_API bool ctx_cancel_at(ctx_t *ctx, const char *site) { return ctx_cancel_cause_at(ctx, 0, NULL, site); }

CTXCANCEL_API bool(ctx_cancel)(ctx_t *ctx) { return ctx_cancel_at(ctx, NULL); }

CTXCANCEL_API bool(ctx_cancel_cause)(ctx_t *ctx, int code, const char *what) {
    return ctx_cancel_cause_at(ctx, code, what, NULL);
}

/* The way out of nearly every context: the owner ends the only reference and nothing is attached. Then nobody can see
   the node but through its parent's list, so under that list's lock it is simply taken out: no canceling, no counts. */
static inline bool ctx__end_alone(ctx_t *node) {
    ctx_t *parent = node->parent;
    ctx__list_t *list;
    bool alone, last = false;
    if (CTX__LOAD(&node->refs, ACQUIRE) != 1 || CTX__LOAD(&node->pins, ACQUIRE) != 1 || (node->flags & CTX__F_BIG) ||
        node->event)
        return false;
    list = ctx__list_of(parent, node->shard);
    ctx__enter(&list->mu);
    if (CTX__LOAD(&node->timer.armed, ACQUIRE)) ctx__timer_disarm(&node->timer);
    alone = CTX__LOAD(&node->pins, ACQUIRE) == 1; /* a walk pins under this lock, the runtime thread until disarmed */
    if (alone) {
        ctx__unlink_locked(node);
        last = CTX__UNLIKELY(list->orphan) && ctx__list_idle(parent, list);
    }
    ctx__leave(&list->mu);
    if (!alone) return false;
    if ((node->flags & CTX__F_VALUES) && node->values) ctx__record_release(node->values);
    ctx__node_dealloc(node);
    if (CTX__UNLIKELY(last)) ctx__unpin(parent);
    return true;
}

/* A descriptor that goes with the only reference is closed without being made readable: nobody can wait for it any
   more. A walk reads `event` under the lock, after it has marked the node. So while the node is not marked no walk has
   the descriptor in hand; once it is, the descriptor goes with the node. */
static CTX__COLD void ctx__end_event(ctx_t *node) {
    ctx__event_t *event = NULL;
    ctx__enter(&node->list.mu);
    if (!ctx__why(node)) {
        event = node->event;
        node->event = NULL;
    }
    ctx__leave(&node->list.mu);
    if (!event) return;
    ctx__event_close(event);
    CTXCANCEL_FREE(event);
}

CTXCANCEL_API void ctx_end_at(ctx_t *ctx, const char *site) {
    if (!ctx || (ctx->flags & CTX__F_STATIC)) return;
    CTXCANCEL_ASSERT(CTX__LOAD(&ctx->refs, RELAXED) != 0); /* ended before */
    if (ctx__end_alone(ctx)) return;
    if (ctx->event && CTX__LOAD(&ctx->refs, ACQUIRE) == 1) ctx__end_event(ctx);
    if (ctx->flags & CTX__F_NOTIFY) ctx__notify_ended(ctx);
    ctx_cancel_at(ctx, site);
    if (CTX__LOAD(&ctx->timer.armed, ACQUIRE)) ctx__timer_remove(&ctx->timer);
    ctx_release(ctx);
}

CTXCANCEL_API void(ctx_end)(ctx_t *ctx) { ctx_end_at(ctx, NULL); }

CTXCANCEL_API ctx_t *ctx_retain(ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    if (ctx && !(ctx->flags & CTX__F_STATIC)) {
        uint32_t before = CTX__ADD(&ctx->refs, 1u, RELAXED);
        CTXCANCEL_ASSERT(before != 0);
        (void)before;
    }
    return ctx;
}

CTXCANCEL_API void ctx_release(ctx_t *ctx) {
    uint32_t before;
    if (!ctx || (ctx->flags & CTX__F_STATIC)) return;
    before = CTX__SUB(&ctx->refs, 1u, ACQ_REL);
    CTXCANCEL_ASSERT(before != 0);
    if (before == 1) ctx__unowned(ctx);
}

CTXCANCEL_API ctx_cause_t ctx_cause(const ctx_t *ctx) {
    const ctx__why_t *why = ctx_err(ctx) ? ctx__why(ctx) : NULL;
    ctx_cause_t cause = { why ? why->code : 0, why ? why->what : NULL, why ? why->site : NULL };
    if (why && !cause.site) cause.site = "";
    return cause;
}

CTXCANCEL_API ctx_time_t ctx_deadline(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    return ctx__deadline_now(ctx);
}

CTXCANCEL_API ctx_dur_t ctx_remaining(const ctx_t *ctx) {
    ctx_time_t deadline = ctx_deadline(ctx), now;
    if (deadline == CTX_NO_DEADLINE) return CTX_FOREVER;
    now = ctx_now();
    return deadline <= now ? 0 : now < 0 && deadline > INT64_MAX + now ? INT64_MAX : deadline - now;
}

CTXCANCEL_API int ctx_remaining_ms(const ctx_t *ctx) {
    ctx_dur_t left = ctx_remaining(ctx), ms = left / 1000000 + (left % 1000000 != 0);
    if (ctx_deadline(ctx) == CTX_NO_DEADLINE) return -1;
    return ms < INT32_MAX ? (int)ms : INT32_MAX;
}

CTXCANCEL_API const char *ctx_name(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    return ctx->name;
}

CTXCANCEL_API const char *ctx_site(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    return ctx->site ? ctx->site : "";
}

CTXCANCEL_API bool ctx_sampled(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    return (ctx->flags & CTX__F_SAMPLED) != 0;
}

/* -- registering and stopping -- */

/* False if the context is done already; then `reg` is not linked, and its state is what it was. */
static inline bool ctx__reg_add(ctx_on_done_t *reg, ctx_t *ctx, void (*fn)(void *arg), void *arg, int flags) {
    ctx__stripe_t *stripe = ctx__stripe_of(reg);
    bool older = CTX__LOAD(&stripe->frames, RELAXED) != NULL, live; /* if there is one of `reg` it is this thread's */
    reg->fn = fn;
    reg->arg = arg;
    reg->ctx = ctx;
    reg->flags = flags + (int)(ctx__me()->index * CTX__REG_THREAD);
    if (ctx->flags & CTX__F_FAILED) return false;
    ctx__enter(&ctx->list.mu);
    live = !ctx__done(ctx);
    if (live) {
        ctx__list_attach(ctx, &ctx->list);
        ctx__reg_link(ctx, reg);
        if (CTX__UNLIKELY(older)) {
            ctx__lock(&stripe->mu);
            ctx__frame_forget(stripe, reg, CTX__REG_LINKED);
            ctx__unlock(&stripe->mu);
        } else {
            CTX__STORE(&reg->state, CTX__REG_LINKED, RELEASE);
        }
    }
    ctx__leave(&ctx->list.mu);
    return live;
}

/* The context was done already: the callback runs here. */
static CTX__COLD void ctx__reg_run_now(ctx_on_done_t *reg, void (*fn)(void *arg), void *arg) {
    ctx__frame_t frame;
    ctx__frame_enter(&frame, reg, true);
    ctx__call_out(fn, arg);
    ctx__frame_leave(&frame, reg);
}

/* ctx_on_done() without a look at the timers. */
static bool ctx__reg_or_run(ctx_on_done_t *reg, ctx_t *ctx, void (*fn)(void *arg), void *arg, int flags) {
    if (ctx__reg_add(reg, ctx, fn, arg, flags)) return true;
    ctx__reg_run_now(reg, fn, arg);
    return false;
}

CTXCANCEL_API bool ctx_on_done(ctx_on_done_t *reg, ctx_t *ctx, void (*fn)(void *arg), void *arg) {
    CTXCANCEL_ASSERT(ctx__set(reg) && ctx__set(ctx) && fn != NULL);
    ctx__timer_revive(ctx);
    return ctx__reg_or_run(reg, ctx, fn, arg, 0);
}

/* Another thread has taken it, and is about to unlink it: wait for that. The state that follows. */
static CTX__COLD int ctx__reg_settled(const ctx_on_done_t *reg) {
    unsigned turn = 0;
    while (CTX__LOAD(&reg->state, ACQUIRE) == CTX__REG_STOPPING) ctx__relax(&turn);
    return CTX__LOAD(&reg->state, ACQUIRE);
}

/* Take a registration out unless its run has begun. Does not wait for a run. True: it will never run. */
static inline bool ctx__reg_stop(ctx_on_done_t *reg, ctx_t **dead) {
    int state = CTX__REG_LINKED;
    ctx_t *ctx = NULL;
    bool last;
    while (CTX__UNLIKELY(!CTX__CAS(&reg->state, &state, CTX__REG_STOPPING, ACQ_REL, ACQUIRE))) {
        state = ctx__reg_settled(reg);
        if (state == CTX__REG_STOPPING) state = CTX__REG_LINKED; /* taken again: try again */
        if (state != CTX__REG_LINKED) return state == CTX__REG_IDLE;
    }
    ctx = reg->ctx;
    ctx__enter(&ctx->list.mu);
    ctx__reg_unlink_locked(ctx, reg);
    last = ctx->list.orphan && ctx__list_idle(ctx, &ctx->list);
    CTX__STORE(&reg->state, CTX__REG_IDLE, RELEASE); /* under the lock: a fork finds it linked or idle */
    ctx__leave(&ctx->list.mu);
    if (last) ctx__pin_drop(ctx, dead);
    return true;
}

/* It has run or is running: wait for that. If the callback has registered `reg` anew, it is stopped then. */
static CTX__COLD bool ctx__reg_wait(ctx_on_done_t *reg) {
    ctx_t *dead = NULL;
    bool stopped = false;
    while (!stopped && ctx__frame_wait(reg)) stopped = ctx__reg_stop(reg, &dead);
    ctx__bury(dead);
    return stopped;
}

CTXCANCEL_API bool ctx_on_done_stop(ctx_on_done_t *reg) {
    ctx_t *dead = NULL;
    CTXCANCEL_ASSERT(ctx__set(reg));
    if (CTX__UNLIKELY(!ctx__reg_stop(reg, &dead))) return ctx__reg_wait(reg);
    if (CTX__UNLIKELY(dead != NULL)) ctx__bury(dead);
    return true;
}

CTXCANCEL_API ctx_on_done_state_t ctx_on_done_try_stop(ctx_on_done_t *reg) {
    ctx__stripe_t *stripe = ctx__stripe_of(reg);
    ctx_t *dead = NULL;
    bool stopped, running = false, linked = true;
    while (!(stopped = ctx__reg_stop(reg, &dead)) && linked) {
        ctx__enter(&stripe->mu);
        running = ctx__frame_find(stripe, reg) != NULL;
        linked = !running && ctx__reg_is_linked(reg); /* by its callback, just now */
        ctx__leave(&stripe->mu);
    }
    ctx__bury(dead);
    return stopped ? CTX_ON_DONE_STOPPED : running ? CTX_ON_DONE_RUNNING : CTX_ON_DONE_RAN;
}

/* == 4. values ==================================================== */

/* A record of values never changes once a context shows it, and lives as long as a context that does.

   A context points to one record that holds every value in sight: a counted table, so a look-up costs the same wherever
   it is asked and a child inherits by pointer. Setting a value copies the record and adds to it; contexts
   are read far more often than they get values. The table is open-addressed by the key's address, at most half full,
   except for the single value of the usual case, whose table has one slot. Values follow the table, each aligned. */

typedef struct {
    const ctx_key_t *key; /* NULL: free */
    const void *value;    /* in this record */
} ctx__slot_t;

struct ctx__record {
    uint32_t refs;  /* [atomic] */
    uint32_t mask;  /* [const] slots - 1; slots are a power of two */
    uint32_t count; /* [const] */
    uint32_t bytes; /* [const] of values, padding included; less than 2^31 */
};

#define CTX__RECORD_SMALL 80
#define CTX__VALUE_ALIGN (2 * sizeof(void *) > 16 ? 2 * sizeof(void *) : 16)

static inline size_t ctx__value_room(size_t size) {
    return (size + CTX__VALUE_ALIGN - 1) & ~(size_t)(CTX__VALUE_ALIGN - 1);
}

static size_t ctx__record_head(uint32_t slots) {
    return ctx__value_room(sizeof(ctx__record_t)) + ctx__value_room(slots * sizeof(ctx__slot_t));
}

static ctx__slot_t *ctx__record_slots(const ctx__record_t *record) {
    return (ctx__slot_t *)(uintptr_t)((const char *)record + ctx__value_room(sizeof *record));
}

/* Most records hold one struct: those of up to CTX__RECORD_SMALL bytes are recycled by each thread like nodes. */
static void *ctx__record_alloc(size_t size) {
    return size > CTX__RECORD_SMALL ? CTXCANCEL_MALLOC(size) : ctx__cache_take(CTX__CACHE_RECORDS, CTX__RECORD_SMALL);
}

static void ctx__record_free(ctx__record_t *record) {
    if (ctx__record_head(record->mask + 1) + record->bytes > CTX__RECORD_SMALL) CTXCANCEL_FREE(record);
    else ctx__cache_give(CTX__CACHE_RECORDS, record);
}

/* The slot of `key`, or the free one where it would go, or NULL when the table is full without it. */
static inline ctx__slot_t *ctx__record_find(const ctx__record_t *record, const ctx_key_t *key) {
    ctx__slot_t *slots = ctx__record_slots(record);
    uint32_t hash = (uint32_t)((uintptr_t)key >> 3) * 2654435761u, i, n;
    hash ^= hash >> 15;
    for (n = 0, i = hash & record->mask; n <= record->mask; n++, i = (i + 1) & record->mask)
        if (slots[i].key == key || !slots[i].key) return &slots[i];
    return NULL;
}

static inline char *ctx__record_put(ctx__record_t *record, char *at, const ctx_key_t *key, const void *value) {
    ctx__slot_t *slot = ctx__record_find(record, key);
    if (!slot) __builtin_unreachable(); /* each record is made with a slot for every key */
    slot->key = key;
    slot->value = at;
    if (key->size) memcpy(at, value, key->size);
    return at + ctx__value_room(key->size);
}

/* `base` (or NULL) with one value set. NULL when memory is short. */
static ctx__record_t *ctx__record_with(const ctx__record_t *base, const ctx_key_t *key, const void *value) {
    const ctx__slot_t *old = base ? ctx__record_find(base, key) : NULL;
    bool shadows = old && old->key;
    uint32_t count = (base ? base->count : 0) + !shadows, slots = 1, i;
    size_t bytes = base ? base->bytes : 0;
    ctx__record_t *record;
    char *at;
    while (count > 1 && slots < count * 2) slots *= 2;
    if (!shadows) {
        if (key->size > INT32_MAX / 2 || bytes > INT32_MAX / 2) return NULL;
        bytes += ctx__value_room(key->size);
    }
    record = (ctx__record_t *)ctx__record_alloc(ctx__record_head(slots) + bytes);
    if (!record) return NULL;
    record->refs = 1;
    record->mask = slots - 1;
    record->count = count;
    record->bytes = (uint32_t)bytes;
    for (i = 0; i < slots; i++) ctx__record_slots(record)[i].key = NULL, ctx__record_slots(record)[i].value = NULL;
    at = (char *)record + ctx__record_head(slots);
    for (i = 0; base && i <= base->mask; i++) {
        const ctx__slot_t *slot = &ctx__record_slots(base)[i];
        if (slot->key && slot->key != key) at = ctx__record_put(record, at, slot->key, slot->value);
    }
    ctx__record_put(record, at, key, value);
    return record;
}

static void ctx__record_retain(ctx__record_t *record) { CTX__ADD(&record->refs, 1u, RELAXED); }

static void ctx__record_release(ctx__record_t *record) {
    /* Alone in holding it, nobody else can take a reference: no need for the atomic subtraction. */
    if (CTX__LOAD(&record->refs, ACQUIRE) == 1 ||
        CTX__SUB(&record->refs, 1u, ACQ_REL) == 1)
        ctx__record_free(record);
}

CTXCANCEL_API const void *ctx_value(const ctx_t *ctx, const ctx_key_t *key) {
    const ctx__slot_t *slot;
    CTXCANCEL_ASSERT(ctx__set(ctx));
    if (!ctx->values || !key) return NULL;
    slot = ctx__record_find(ctx->values, key);
    return slot ? slot->value : NULL;
}

/* == 5. timers ==================================================== */

/* Until its node is done a deadline is in a wheel, or in the hands of one thread that is inside the gate.

   Hierarchical timing wheels with intrusive links: adding and removing are constant time and touch no memory but the
   timer's. A wheel has 8 levels of 64 slots; a slot of level n spans 64^n ticks of 2^16 ns. A timer stands at the
   level of the highest group of 6 bits in which its tick differs from the wheel's own, so within a level slots are in
   order of time and below a higher level everything is sooner. When the wheel's tick enters a slot of a higher level
   its timers move down. At level 0 the exact deadline decides: never early, and as late as the thread wakes.

   A thread that waits does not depend on the runtime thread for its own deadline, which would cost a second turn of the
   scheduler: it sleeps until the deadline and then ends the context that has expired.

   There are a few wheels, picked by thread, so that threads do not meet at one lock, and one for the sleepers of the
   fake clock, whose alarms are on their own stacks: the child of a fork empties it. Each remembers in `wake_at` when
   the runtime thread means to look at it again. A thread that adds an earlier deadline lowers `wake_at` and kicks. The
   runtime thread reads the count of kicks, checks every wheel, then sleeps only if the count has not moved. Removing
   never wakes it. A long callback on the runtime thread delays the deadlines of contexts that nobody waits for.

   A timer may be pushed later while armed without moving (`deadline` says the truth, the slot is a lower bound),
   which is what a pool's worker does for each task. A due timer is taken out and its node pinned under the wheel's
   lock; then one walk marks all nodes that are due, in the order of their deadlines. All of this happens inside the
   gate, so a fork finds a timer in its wheel or its node done. With the fake clock nobody sleeps: the same wheels are
   turned by ctx_clock_advance(). */

#define CTX__TICK_BITS 16
#define CTX__SLOT_BITS 6
#define CTX__SLOTS 64
#define CTX__LEVELS 8
#define CTX__WHEELS 16

typedef struct {
    CTX__ALIGNED uint32_t mu;
    uint32_t started;    /* [mu] wake_at holds something */
    uint64_t tick;       /* [mu] everything before it has been handled */
    ctx_time_t wake_at;  /* [mu] when the runtime thread looks again */
    uint64_t armed;      /* [mu] how many timers */
    uint64_t used[CTX__LEVELS]; /* [mu] a bit per slot that is not empty */
    ctx__timer_t *slots[CTX__LEVELS][CTX__SLOTS]; /* [mu] */
} ctx__wheel_t;

static ctx__wheel_t ctx__wheels[CTX__WHEELS + 1]; /* the last is for sleepers */
static unsigned ctx__wheel_count = 1; /* [const] after ctx__once; a power of two */

/* A sleeper's timer: only the fake clock needs it, real sleepers leave it to the system. */
typedef struct {
    ctx__timer_t timer;
    ctx__parker_t *parker;
} ctx__alarm_t;

/* A timer that calls `fn` on the runtime thread, inside its owner. The owner holds itself for an armed one: `fn` gives
   that back, or who has removed it. */
typedef struct {
    ctx__timer_t timer;
    void (*fn)(void *owner);
    void *owner;
} ctx__call_t;

typedef struct ctx__nag ctx__nag_t;

/* Guards the start and the end of the library's own threads, and what section 13 keeps: a mutex, since it is held over
   system calls. Outermost, and inside the gate. */
static uint32_t ctx__life;

static void ctx__life_lock(void) {
    ctx__inside();
    ctx__mutex_lock(&ctx__life);
}

static void ctx__life_unlock(void) {
    ctx__mutex_unlock(&ctx__life);
    ctx__outside(&ctx__self);
}

static struct {
    uint32_t kicks;    /* [atomic] the word that the thread sleeps on */
    uint32_t running;  /* [atomic, set under ctx__life] */
    uint32_t era;      /* [atomic, set under ctx__life] a thread of an earlier one ends */
    uint32_t mu;       /* pending; nags; the shared done descriptor */
    pthread_t thread;  /* [ctx__life] */
    ctx_t *pending, *pending_last; /* [mu] nodes whose callbacks it has to run, linked by work, pinned */
    ctx__nag_t *nags;  /* [mu] section 7 */
} ctx__runtime;

static uint64_t ctx__tick_of(ctx_time_t t) { return t < 0 ? 0 : (uint64_t)t >> CTX__TICK_BITS; }

/* [wheel->mu] */
static inline void ctx__wheel_place(ctx__wheel_t *wheel, ctx__timer_t *timer) {
    uint64_t tick = ctx__tick_of(timer->deadline), differs;
    unsigned level = 0, slot;
    if (tick < wheel->tick) tick = wheel->tick;
    differs = tick ^ wheel->tick;
    if (differs) level = (63 - (unsigned)__builtin_clzll(differs)) / CTX__SLOT_BITS;
    slot = (unsigned)(tick >> (CTX__SLOT_BITS * level)) & (CTX__SLOTS - 1);
    timer->level = (uint8_t)level;
    timer->slot = (uint8_t)slot;
    timer->next = wheel->slots[level][slot];
    timer->pprev = &wheel->slots[level][slot];
    if (timer->next) timer->next->pprev = &timer->next;
    wheel->slots[level][slot] = timer;
    wheel->used[level] |= (uint64_t)1 << slot;
}

/* [wheel->mu] */
static void ctx__wheel_unlink(ctx__wheel_t *wheel, ctx__timer_t *timer) {
    *timer->pprev = timer->next;
    if (timer->next) timer->next->pprev = timer->pprev;
    if (!wheel->slots[timer->level][timer->slot]) wheel->used[timer->level] &= ~((uint64_t)1 << timer->slot);
}

/* [wheel->mu] Where the earliest slot in use begins; level CTX__LEVELS when there is none. */
static uint64_t ctx__wheel_first(const ctx__wheel_t *wheel, unsigned *level, unsigned *slot) {
    uint64_t above;
    for (*level = 0; *level < CTX__LEVELS && !wheel->used[*level]; ++*level) {}
    if (*level == CTX__LEVELS) return UINT64_MAX;
    *slot = (unsigned)__builtin_ctzll(wheel->used[*level]);
    above = *level + 1 == CTX__LEVELS ? 0 : wheel->tick >> (CTX__SLOT_BITS * (*level + 1)) << CTX__SLOT_BITS;
    return (above | *slot) << (CTX__SLOT_BITS * *level);
}

/* [wheel->mu] When the wheel must be looked at next: a deadline, or the time to move timers down. */
static ctx_time_t ctx__wheel_next(const ctx__wheel_t *wheel) {
    unsigned level, slot;
    uint64_t tick = ctx__wheel_first(wheel, &level, &slot);
    const ctx__timer_t *timer;
    ctx_time_t next = CTX_NO_DEADLINE;
    if (level == CTX__LEVELS) return CTX_NO_DEADLINE;
    if (level > 0) return (ctx_time_t)(tick << CTX__TICK_BITS);
    for (timer = wheel->slots[0][slot]; timer; timer = timer->next) next = ctx__min(next, timer->deadline);
    return ctx__tick_of(next) > tick ? (ctx_time_t)(tick << CTX__TICK_BITS) : next;
}

/* [wheel->mu] Take a due timer out: a node goes pinned onto `due`, a sleeper is made to look at the clock. The pin
   comes before `armed`: who reads armed == 0 sees the pin. */
static void ctx__timer_expire(ctx__wheel_t *wheel, ctx__timer_t *timer, ctx__timer_t **due) {
    wheel->armed--;
    if (timer->kind != CTX__TIMER_ALARM) {
        if (timer->kind == CTX__TIMER_CALL || ctx__pin(CTX__CONTAINER(timer, ctx_t, timer))) {
            timer->next = *due;
            *due = timer;
        }
        CTX__STORE(&timer->armed, 0, RELEASE);
    } else {
        ctx__parker_t *parker = CTX__CONTAINER(timer, ctx__alarm_t, timer)->parker;
        CTX__STORE(&timer->armed, 0, RELEASE);
        ctx__parker_nudge(parker);
    }
}

/* [wheel->mu] Turn the wheel to `now`. */
static void ctx__wheel_turn(ctx__wheel_t *wheel, ctx_time_t now, ctx__timer_t **due) {
    uint64_t target = ctx__tick_of(now);
    for (;;) {
        unsigned level, slot = 0;
        uint64_t tick = ctx__wheel_first(wheel, &level, &slot);
        ctx__timer_t *timer, *next;
        bool early = false;
        if (level == CTX__LEVELS || tick > target) break;
        timer = wheel->slots[level][slot];
        wheel->slots[level][slot] = NULL;
        wheel->used[level] &= ~((uint64_t)1 << slot);
        wheel->tick = tick;
        for (; timer; timer = next) {
            next = timer->next;
            if (level == 0 && timer->deadline <= now) {
                ctx__timer_expire(wheel, timer, due);
            } else {
                ctx__wheel_place(wheel, timer);
                early = early || (level == 0 && ctx__tick_of(timer->deadline) <= tick);
            }
        }
        if (early) break; /* later in this very tick */
    }
    if (wheel->tick < target) wheel->tick = target;
}

static ctx__timer_t *ctx__due_merge(ctx__timer_t *a, ctx__timer_t *b) {
    ctx__timer_t *first = NULL, **end = &first;
    while (a && b) {
        ctx__timer_t **from = b->deadline < a->deadline ? &b : &a;
        *end = *from;
        end = &(*from)->next;
        *from = *end;
    }
    *end = a ? a : b;
    return first;
}

/* Sort by deadline: a bottom-up merge sort, bins[i] holding 2^i timers. */
static ctx__timer_t *ctx__due_sort(ctx__timer_t *due) {
    ctx__timer_t *bins[48], *all = NULL;
    unsigned i;
    memset(bins, 0, sizeof bins);
    while (due) {
        ctx__timer_t *run = due;
        due = due->next;
        run->next = NULL;
        for (i = 0; bins[i]; i++) {
            run = ctx__due_merge(bins[i], run);
            bins[i] = NULL;
        }
        bins[i] = run;
    }
    for (i = 0; i < 48; i++) all = ctx__due_merge(bins[i], all);
    return all;
}

/* The wheels in use, one after the other; the sleepers' comes last. */
static unsigned ctx__wheel_after(unsigned i) { return i + 1 == ctx__wheel_count ? CTX__WHEELS : i + 1; }

/* [inside] Turn all wheels to `now`. What is due, and when to look again. `fake` is the clock that `now` was read from:
   a wheel that has been given to the other one meanwhile is left alone. */
static ctx_time_t ctx__wheels_turn(ctx_time_t now, bool fake, ctx__timer_t **due) {
    ctx_time_t next = CTX_NO_DEADLINE;
    unsigned i;
    for (i = 0; i <= CTX__WHEELS; i = ctx__wheel_after(i)) {
        ctx__wheel_t *wheel = &ctx__wheels[i];
        ctx__lock(&wheel->mu);
        if (ctx__clock_is_fake() == fake) {
            ctx__wheel_turn(wheel, now, due);
            wheel->wake_at = ctx__wheel_next(wheel);
            wheel->started = 1;
            next = ctx__min(next, wheel->wake_at);
        }
        ctx__unlock(&wheel->mu);
    }
    return next;
}

/* [inside] Mark the nodes that are due, and everything below them, in one walk. Takes the calls out of `due`. */
static ctx__timer_t *ctx__due_mark(ctx__timer_t **due, ctx__walk_t *walk) {
    ctx__timer_t *calls = NULL, **last_call = &calls, **last_node = due, *timer, *next;
    for (timer = *due; timer; timer = next) {
        next = timer->next;
        if (timer->kind == CTX__TIMER_CALL) {
            *last_call = timer;
            last_call = &timer->next;
        } else {
            ctx_t *node = CTX__CONTAINER(timer, ctx_t, timer);
            ctx__lock(&node->list.mu);
            timer->level = ctx__walk_top(walk, node, ctx__deadline_passed);
            ctx__unlock(&node->list.mu);
            *last_node = timer;
            last_node = &timer->next;
        }
    }
    *last_call = *last_node = NULL;
    ctx__walk_below(walk);
    return calls;
}

/* Turn the wheels to `now`, and do what is due: cancel nodes, then make the calls, soonest first. True if anything was;
   `*look` says when to look again. */
static bool ctx__timers_fire(ctx_time_t now, bool fake, ctx_time_t *look) {
    ctx__thread_t *me = ctx__inside();
    ctx__timer_t *due = NULL, *calls, *timer, *next;
    ctx__walk_t walk;
    memset(&walk, 0, sizeof walk);
    *look = ctx__wheels_turn(now, fake, &due);
    if (!due) {
        ctx__outside(me);
        return false;
    }
    due = ctx__due_sort(due);
    calls = ctx__due_mark(&due, &walk);
    ctx__outside(me);
    for (timer = due; timer; timer = timer->next)
        ctx__walk_settle(&walk, CTX__CONTAINER(timer, ctx_t, timer), timer->level != 0);
    ctx__walk_tell(&walk, false);
    for (timer = calls; timer; timer = next) {
        ctx__call_t *call = CTX__CONTAINER(timer, ctx__call_t, timer);
        next = timer->next; /* the call may arm it again */
        call->fn(call->owner);
    }
    for (timer = due; timer; timer = next) {
        next = timer->next;
        ctx__unpin(CTX__CONTAINER(timer, ctx_t, timer));
    }
    return true;
}

static void ctx__runtime_kick(void) {
    CTX__ADD(&ctx__runtime.kicks, 1u, RELEASE);
    ctx__futex_wake(&ctx__runtime.kicks, INT32_MAX); /* a thread that is to end may sleep beside its successor */
}

static bool ctx__nag_all(void); /* section 7 */
static bool ctx__timers_armed(void);

/* Leave the callbacks of nodes that are done to the runtime thread. */
static void ctx__runtime_hand_over(ctx_t *first, ctx_t *last) {
    ctx__enter(&ctx__runtime.mu);
    if (ctx__runtime.pending) ctx__runtime.pending_last->work = first;
    else CTX__STORE(&ctx__runtime.pending, first, RELAXED);
    ctx__runtime.pending_last = last;
    ctx__leave(&ctx__runtime.mu);
    ctx__timer_ready(); /* if there is no thread now, a later use of a deadline starts one */
    ctx__runtime_kick();
}

static void ctx__runtime_call_pending(void) {
    ctx_t *first;
    ctx__enter(&ctx__runtime.mu);
    first = ctx__runtime.pending;
    CTX__STORE(&ctx__runtime.pending, (ctx_t *)NULL, RELAXED);
    ctx__leave(&ctx__runtime.mu);
    ctx__walk_call(first);
}

/* In a process that one of its callbacks has forked this thread may be the only one. When it has nothing left to do it
   ends, and the process with it. A thread that comes later starts another. */
static bool ctx__runtime_retires(ctx__thread_t *me) {
    bool alone = !ctx__timers_armed() && !CTX__LOAD(&ctx__runtime.pending, RELAXED);
    ctx__lock(&ctx__gate.mu);
    alone = alone && ctx__gate.threads == &me->link && !me->link.next;
    if (alone) CTX__STORE(&ctx__runtime.running, 0u, RELEASE);
    ctx__unlock(&ctx__gate.mu);
    return alone;
}

/* -- the clock that moves by itself -- */

/* The public name of the function whose wait this is; NULL if the thread is merely idle. */
static const char *ctx__wait_title(const char *op) {
    static const char *const titles[][2] = {
        { "ctx__sem_wait", "ctx_sem_acquire" },
        { "ctx__pool_first_worker", "ctx_pool_submit" },
        { "ctx__pool_wait_room", "ctx_pool_submit_wait" },
        { "ctx__pool_cut", "ctx_pool_drain" },
        { "ctx__pool_drain", "ctx_pool_drain" },
        { "ctx__group_tell_waiting", "ctx_group_go" },
        { "ctx__group_enter", "ctx_group_go" },
        { "ctx__select_block", "ctx_select, or a send or receive of a channel" },
        { "ctx__stage_await_turn", "ctx_stage_run" },
        { "ctx__stage_await", "ctx_stage_run" },
        { "ctx__batch_finish", "ctx_batch_drain" },
        { "ctx__batch_cut", "ctx_batch_drain" },
        { "ctx__limiter_wait", "ctx_limiter_wait" },
        { "ctx__spare_job", NULL },
        { "ctx__service_run_job", "ctx_service_start" },
        { "ctx__service_do_start", "ctx_service_start" },
        { "ctx__stop_run", "ctx_service_stop" },
        { "ctx__app_live", "ctx_app_run" },
    };
    size_t i;
    for (i = 0; op && i < sizeof titles / sizeof *titles; i++)
        if (!strcmp(op, titles[i][0])) return titles[i][1];
    return op;
}

/* Whether a thread that takes part waits for something, other than for work. `show`: print the waits. */
static CTX__COLD bool ctx__clock_waits(uint32_t era, bool show) {
    const ctx__link_t *link;
    bool any = false;
    ctx__lock(&ctx__gate.mu);
    for (link = ctx__gate.threads; link; link = link->next) {
        const ctx__thread_t *thread = CTX__CONTAINER(link, const ctx__thread_t, link);
        const char *op = ctx__wait_title(CTX__LOAD(&thread->op, RELAXED)), *site;
        if (!op || !CTX__LOAD(&thread->rests, ACQUIRE) || CTX__LOAD(&thread->counted, RELAXED) != era) continue;
        any = true;
        if (!show) continue;
        site = CTX__LOAD(&thread->site, RELAXED);
        fprintf(stderr, "  thread %u waits in %s, with the context \"%s\"%s%s\n", thread->index, op,
                CTX__LOAD(&thread->name, RELAXED), *site ? " of " : "", site);
    }
    ctx__unlock(&ctx__gate.mu);
    return any;
}

static bool ctx__signals_awaited(void); /* section 13: one may come */

/* Nobody can run, no deadline is left, and somebody waits. */
static CTX__COLD void ctx__clock_stuck(uint32_t era) {
    bool somebody_can_run = false;
    fprintf(stderr, "ctx_clock_auto: every thread waits, and no deadline is left (threads in the order of their first "
                    "use of this library):\n");
    ctx__clock_waits(era, true);
    CTXCANCEL_ASSERT(somebody_can_run);
    (void)somebody_can_run;
}

/* Fire what is due, moving the clock from deadline to deadline until something was or a thread can run. A thread that
   has run since the wheels were looked at may have brought an earlier deadline. False: no deadline is left, and nobody
   can run. */
static bool ctx__clock_move(void) {
    ctx_time_t now = ctx_now(), next;
    for (;;) {
        uint64_t word = CTX__LOAD(&ctx__clock.running, ACQUIRE);
        if (CTX__CLOCK_RUNNING(word) > 1 || ctx__timers_fire(now, true, &next)) return true;
        if (CTX__LOAD(&ctx__clock.running, ACQUIRE) != word) continue;
        if (next == CTX_NO_DEADLINE) return false;
        now = next;
        CTX__STORE(&ctx__clock.now, now, SEQ_CST);
    }
}

/* By the runtime thread. If every thread that takes part is parked, move the clock. True: look again, for they may all
   be parked by now. */
static bool ctx__clock_step(void) {
    uint32_t era = ctx__clock_era();
    uint64_t seen, mine;
    bool moved, waits, alone;
    if (CTX__LIKELY(!era)) return false;
    seen = CTX__LOAD(&ctx__clock.running, ACQUIRE);
    if (CTX__CLOCK_RUNNING(seen)) return false;
    if (seen >> 2 * CTX__CLOCK_BITS != era) return true; /* it has just begun */
    mine = ctx__clock_word(era, (seen >> CTX__CLOCK_BITS) + 1, 1);
    if (!CTX__CAS(&ctx__clock.running, &seen, mine, ACQ_REL, RELAXED)) return true;
    moved = ctx__clock_move();
    waits = !moved && !ctx__signals_awaited() && ctx__clock_waits(era, false);
    alone = CTX__LOAD(&ctx__clock.running, ACQUIRE) == mine; /* nobody has run since */
    if (waits && alone) ctx__clock_stuck(era);
    return ctx__clock_change(era, -1) && (moved || !alone);
}

static void *ctx__runtime_main(void *arg) {
    uint32_t era = (uint32_t)(uintptr_t)arg;
    ctx__thread_t *me = ctx__me();
    unsigned forks = ctx__forks;
    ctx__thread_name("ctx-runtime");
    ctx__thread_sharp_timers();
    me->runtime = true;
    for (;;) {
        uint32_t kicks = CTX__LOAD(&ctx__runtime.kicks, ACQUIRE);
        ctx_time_t next = CTX_NO_DEADLINE, now = ctx__clock_read();
        if (CTX__LOAD(&ctx__runtime.era, ACQUIRE) != era) return NULL;
        if (CTX__LOAD(&ctx__runtime.pending, RELAXED)) ctx__runtime_call_pending(); /* and look again when kicked */
        if (!ctx__clock_is_fake() && ctx__timers_fire(now, false, &next)) continue;
        if (ctx__clock_step()) continue;
        if (ctx__nag_all()) next = ctx__min(next, now + CTX_MS(1));
        if (ctx__forks != forks && ctx__runtime_retires(me)) return NULL;
        if (next > now) ctx__futex_wait(&ctx__runtime.kicks, kicks, next);
    }
}

/* Make sure that the runtime thread runs. Returns 0, or CTX_NO_MEMORY. */
static CTX__COLD int ctx__runtime_start(void) {
    int rc = 0;
    ctx__life_lock();
    if (!ctx__runtime.running) {
        rc = ctx__thread_start(&ctx__runtime.thread, ctx__runtime_main, (void *)(uintptr_t)ctx__runtime.era);
        if (!rc) CTX__STORE(&ctx__runtime.running, 1u, RELEASE);
    }
    ctx__life_unlock();
    return rc;
}

static void ctx__clock_wake(void) {
    if (!CTX__LOAD(&ctx__runtime.running, ACQUIRE)) ctx__runtime_start();
    ctx__runtime_kick();
}

/* After ctx_runtime_stop(): threads that are parked by a clock that moves by itself rely on the runtime thread. */
static void ctx__clock_resume(void) {
    uint32_t era = ctx__clock_era();
    if (era && !CTX__CLOCK_RUNNING(CTX__LOAD(&ctx__clock.running, ACQUIRE)) && ctx__clock_waits(era, false))
        ctx__clock_wake();
}

static int ctx__timer_ready(void) {
    if (CTX__LOAD(&ctx__runtime.running, ACQUIRE) || ctx__clock_is_fake()) return 0;
    return ctx__runtime_start();
}

/* After ctx_runtime_stop(), or in the child of a fork: whoever comes to wait for a deadline starts the thread again. */
static void ctx__timer_revive(const ctx_t *ctx) {
    if (ctx__deadline_now(ctx) != CTX_NO_DEADLINE) ctx__timer_ready();
}

/* [wheel->mu] Put a timer in its place. True: the runtime thread is to be kicked. */
static inline bool ctx__wheel_put(ctx__wheel_t *wheel, ctx__timer_t *timer, ctx_time_t deadline) {
    CTX__STORE(&timer->deadline, deadline, RELAXED);
    ctx__wheel_place(wheel, timer);
    if (wheel->started && deadline >= wheel->wake_at) return false;
    wheel->wake_at = deadline;
    wheel->started = 1;
    return true;
}

/* [inside] Arm a timer that is not armed. True: the runtime thread is to be kicked. A thread that has seen `armed` may
   look which wheel it is. */
static bool ctx__timer_arm(ctx__timer_t *timer, ctx_time_t deadline) {
    unsigned i = timer->kind == CTX__TIMER_ALARM ? CTX__WHEELS : ctx__self.index & (ctx__wheel_count - 1);
    ctx__wheel_t *wheel = &ctx__wheels[i];
    bool kick;
    ctx__lock(&wheel->mu);
    timer->wheel = (uint8_t)i;
    kick = ctx__wheel_put(wheel, timer, deadline);
    wheel->armed++;
    CTX__STORE(&timer->armed, 1, RELEASE);
    ctx__unlock(&wheel->mu);
    return kick;
}

static void ctx__timer_add(ctx__timer_t *timer, ctx_time_t deadline) {
    ctx__thread_t *me = ctx__inside();
    bool kick = ctx__timer_arm(timer, deadline);
    ctx__outside(me);
    if (CTX__UNLIKELY(kick)) ctx__runtime_kick();
}

/* [inside] False: it was not armed, or has just been taken out to fire. */
static bool ctx__timer_disarm(ctx__timer_t *timer) {
    ctx__wheel_t *wheel = &ctx__wheels[timer->wheel];
    bool was;
    ctx__lock(&wheel->mu);
    was = timer->armed;
    if (was) {
        ctx__wheel_unlink(wheel, timer);
        wheel->armed--;
        CTX__STORE(&timer->armed, 0, RELAXED);
    }
    ctx__unlock(&wheel->mu);
    return was;
}

static bool ctx__timer_remove(ctx__timer_t *timer) {
    ctx__thread_t *me = ctx__inside();
    bool was = ctx__timer_disarm(timer);
    ctx__outside(me);
    return was;
}

/* [inside] Give a timer another deadline if it is armed: in the same wheel, and a later one needs no move. True: the
   runtime thread is to be kicked. */
static bool ctx__timer_shift(ctx__timer_t *timer, ctx_time_t deadline, bool *armed) {
    ctx__wheel_t *wheel = &ctx__wheels[timer->wheel];
    bool kick = false;
    ctx__lock(&wheel->mu);
    *armed = timer->armed;
    if (*armed && deadline < timer->deadline) {
        ctx__wheel_unlink(wheel, timer);
        kick = ctx__wheel_put(wheel, timer, deadline);
    } else if (*armed) {
        CTX__STORE(&timer->deadline, deadline, RELAXED);
    }
    ctx__unlock(&wheel->mu);
    return kick;
}

/* False: it has been taken out to fire. */
static bool ctx__timer_move(ctx__timer_t *timer, ctx_time_t deadline) {
    ctx__thread_t *me = ctx__inside();
    bool armed, kick = ctx__timer_shift(timer, deadline, &armed);
    ctx__outside(me);
    if (kick) ctx__runtime_kick();
    return armed;
}

/* The one whose deadline it is that a context has from its ancestors. The context keeps all of them. */
static ctx_t *ctx__deadline_owner(ctx_t *ctx) {
    ctx_time_t deadline = ctx__deadline(ctx);
    for (;;) {
        ctx_t *b = (ctx_t *)(uintptr_t)ctx__second_parent(ctx);
        if (ctx->parent && ctx__deadline(ctx->parent) == deadline) ctx = ctx->parent;
        else if (b && ctx__deadline(b) == deadline) ctx = b;
        else return ctx;
    }
}

/* End the context that has expired, by a thread that waits below it. Callbacks are not for that thread, which may hold
   anything: the runtime thread calls them. */
static CTX__COLD void ctx__expire(ctx_t *ctx) {
    ctx__cancel(ctx__deadline_owner(ctx), ctx__deadline_passed, true);
}

/* Sleep once, until unparked, or until `until` on the library's clock, or without a reason. */
static void ctx__park_once(ctx__parker_t *parker, ctx_time_t until) {
    uint32_t state;
    ctx__alarm_t alarm;
    bool fake = until != CTX_NO_DEADLINE && ctx__clock_is_fake();
    if (fake) { /* before PARKED: an alarm that goes off early finds the clock moved already */
        memset(&alarm, 0, sizeof alarm);
        alarm.parker = parker;
        ctx__timer_add(&alarm.timer, until);
    }
    state = ctx__parker_park(parker);
    if (!ctx__park_is(state, CTX__SET) && (until == CTX_NO_DEADLINE || ctx_now() < until))
        ctx__futex_wait(&parker->state, state, fake ? CTX_NO_DEADLINE : until);
    if (!fake) return;
    ctx__parker_empty(parker); /* it runs, before its alarm goes: else the clock could move past that */
    ctx__timer_remove(&alarm.timer);
}

/* Park until unparked (true) or until `until` on the library's clock (false). When the context that is waited with
   expires, end it: that unparks. With the fake clock ctx_clock_advance() does so, in the order of the deadlines. */
static bool ctx__park(ctx__parker_t *parker, ctx_time_t until) {
    for (;;) {
        ctx_t *expires = ctx__clock_is_fake() ? NULL : parker->expires;
        ctx_time_t deadline = expires ? ctx__deadline(expires) : CTX_NO_DEADLINE, now;
        ctx__park_once(parker, ctx__min(until, deadline));
        if (ctx__parker_woken(parker)) return true;
        if (until == CTX_NO_DEADLINE && deadline == CTX_NO_DEADLINE) continue;
        now = ctx_now();
        if (now < until && now < deadline) continue;
        /* Awake, so nobody needs to pay for waking this thread; unless somebody has just done so. */
        if (!ctx__parker_rise(parker)) return true;
        if (now >= until) return false;
        parker->expires = NULL;
        ctx__expire(expires);
    }
}

/* After a change of clock: every timer takes its place anew, every sleeper looks again. */
static void ctx__wheels_rebase(ctx_time_t now) {
    unsigned i, level, slot;
    ctx__me();
    for (i = 0; i <= CTX__WHEELS; i = ctx__wheel_after(i)) {
        ctx__wheel_t *wheel = &ctx__wheels[i];
        ctx__timer_t *all = NULL, *timer, *none = NULL;
        ctx__enter(&wheel->mu);
        for (level = 0; level < CTX__LEVELS; level++) {
            for (slot = 0; slot < CTX__SLOTS; slot++) {
                while ((timer = wheel->slots[level][slot]) != NULL) {
                    ctx__wheel_unlink(wheel, timer);
                    timer->next = all;
                    all = timer;
                }
            }
        }
        wheel->tick = ctx__tick_of(now);
        wheel->started = 0;
        while ((timer = all) != NULL) {
            all = timer->next;
            if (timer->kind != CTX__TIMER_ALARM) ctx__wheel_place(wheel, timer);
            else ctx__timer_expire(wheel, timer, &none);
        }
        ctx__leave(&wheel->mu);
    }
}

static bool ctx__timers_armed(void) {
    unsigned i;
    bool any = false;
    for (i = 0; i < ctx__wheel_count; i++) {
        ctx__enter(&ctx__wheels[i].mu);
        any = any || ctx__wheels[i].armed;
        ctx__leave(&ctx__wheels[i].mu);
    }
    return any;
}

CTXCANCEL_API void ctx_clock_fake(ctx_time_t start) {
    CTX__STORE(&ctx__clock.era, 0u, RELEASE);
    CTX__STORE(&ctx__clock.now, start, SEQ_CST);
    CTX__STORE(&ctx__clock.fake, 1, RELEASE);
    ctx__wheels_rebase(start);
}

CTXCANCEL_API void ctx_clock_auto(ctx_time_t start) {
    ctx__thread_t *me = ctx__me();
    unsigned turn = 0;
    int rc;
    ctx_clock_fake(start);
    while (CTX__LOAD(&ctx__clock.starting, ACQUIRE)) ctx__relax(&turn); /* they are counted when they have begun */
    rc = ctx__runtime_start();
    CTXCANCEL_ASSERT(rc == 0);
    (void)rc;
    ctx__clock.eras = ctx__clock.eras % CTX__CLOCK_ERAS + 1;
    CTX__STORE(&me->counted, ctx__clock.eras, RELAXED);
    CTX__STORE(&ctx__clock.running, ctx__clock_word(ctx__clock.eras, 0, 1), RELAXED);
    CTX__STORE(&ctx__clock.era, ctx__clock.eras, SEQ_CST);
    ctx__clock_count(ctx__clock.eras);
}

CTXCANCEL_API void ctx_clock_real(void) {
    CTX__STORE(&ctx__clock.era, 0u, RELEASE);
    CTX__STORE(&ctx__clock.fake, 0, RELEASE);
    ctx__wheels_rebase(ctx__clock_read());
    if (ctx__timers_armed()) ctx__runtime_start();
    ctx__runtime_kick();
}

CTXCANCEL_API void ctx_clock_advance(ctx_dur_t dur) {
    bool fake = ctx__clock_is_fake();
    ctx_time_t now = ctx_now(), target = ctx_time_add(now, dur < 0 ? 0 : dur);
    CTXCANCEL_ASSERT(fake);
    if (!fake) return;
    ctx__runtime_call_pending(); /* of a thread that advanced it when this process was forked */
    for (;;) {
        ctx_time_t next;
        if (ctx__timers_fire(now, true, &next)) continue;
        if (now == target) return;
        now = next > now ? ctx__min(next, target) : target;
        CTX__STORE(&ctx__clock.now, now, SEQ_CST);
    }
}

/* == 6. polling =================================================== */

/* Between two looks at its context a poll costs a decrement and a branch; once it has seen an error it looks each time.

   A poll counts calls and looks when the count is out. A tuned one aims at a look every 1/256 of the latency wanted and
   reads the clock at every 32nd look, so that a turn of the loop which suddenly takes 1000 times longer is still
   noticed within a few times the budget; a look that is not a tuning costs one load. */

#define CTX__LOOKS_PER_TUNING 32
#define CTX__LOOKS_PER_BUDGET 256

CTXCANCEL_API ctx_poll_t ctx_poll_every(const ctx_t *ctx, uint32_t stride) {
    ctx_poll_t poll;
    CTXCANCEL_ASSERT(ctx__set(ctx));
    memset(&poll, 0, sizeof poll);
    poll.ctx = ctx;
    poll.stride = poll.left = stride ? stride : 1;
    return poll;
}

CTXCANCEL_API ctx_poll_t ctx_poll_within(const ctx_t *ctx, ctx_dur_t within) {
    ctx_poll_t poll = ctx_poll_every(ctx, 1);
    poll.within = within > 0 ? within : 0;
    poll.looks = CTX__LOOKS_PER_TUNING;
    poll.last = ctx_now();
    return poll;
}

/* The stride for the speed that the loop has shown since the last tuning. It grows 16-fold at most, for the measure of
   a few turns is coarse; it shrinks at once, and stays while a fake clock stands still. */
static void ctx__poll_tune(ctx_poll_t *poll) {
    ctx_time_t now = ctx_now();
    double aim = (double)poll->within / CTX__LOOKS_PER_BUDGET;
    double look = (double)(now - poll->last) / CTX__LOOKS_PER_TUNING;
    double growth = look > 0 ? aim / look : 1, stride = poll->stride * (growth > 16 ? 16 : growth);
    poll->stride = stride < 1 ? 1 : stride > 1e9 ? 1000000000u : (uint32_t)stride;
    poll->looks = CTX__LOOKS_PER_TUNING;
    poll->last = now;
}

CTXCANCEL_API int ctx__poll_look(ctx_poll_t *poll) {
    int err = ctx_err(poll->ctx);
    if (err) {
        poll->left = 1;
        return err;
    }
    if (poll->within && --poll->looks == 0) ctx__poll_tune(poll);
    poll->left = poll->stride;
    return 0;
}

CTXCANCEL_API int ctx__leaf_settle(ctx_leaf_t *leaf, int err) {
    int before = 0;
    CTX__CAS(&leaf->err, &before, err, ACQ_REL, ACQUIRE);
    return before ? before : err;
}

CTXCANCEL_API const volatile int *ctx_flag(const ctx_t *ctx) {
    CTXCANCEL_ASSERT(ctx__set(ctx));
    return &ctx->head.err;
}

/* == 7. waiting =================================================== */

/* A waiter leaves only when no other thread will touch its parker any more.

   A thread that waits for a context registers a waker: a callback that unparks it. Wakers run before other callbacks
   and under the rules of section 3. A waiter leaves by ctx__unwatch(), after which nobody will touch its parker for the
   context's sake: either the waker was taken out, or it has run to its last store (DONE), which follows the wake-up
   closely. */

typedef struct {
    ctx_on_done_t reg;
    ctx__parker_t *parker;
} ctx__watch_t;

static void ctx__watch_fire(void *parker) { ctx__unpark((ctx__parker_t *)parker); }

/* Unpark `parker` when `ctx` is done; a thread that parks on it ends `ctx` itself when that expires. False: it is done,
   and nothing was registered. */
static bool ctx__watch(ctx__watch_t *watch, ctx_t *ctx, ctx__parker_t *parker) {
    ctx_t *other = parker->expires;
    watch->reg.state = CTX__REG_IDLE;
    watch->reg.arg = parker;
    if (ctx == &ctx__root) return true; /* it never is */
    if (ctx__deadline(ctx) < (other ? ctx__deadline(other) : CTX_NO_DEADLINE)) parker->expires = ctx;
    ctx__timer_revive(ctx);
    return ctx__reg_add(&watch->reg, ctx, ctx__watch_fire, parker, CTX__REG_WAKER);
}

/* Take a waker out. Returns false if it has run instead, to its last store. */
static bool ctx__waker_stop(ctx_on_done_t *reg) {
    int state;
    unsigned turn = 0;
    if (CTX__LOAD(&reg->state, ACQUIRE) == CTX__REG_LINKED && ctx_on_done_stop(reg)) return true;
    do {
        state = CTX__LOAD(&reg->state, ACQUIRE);
        if (state == CTX__REG_FIRED) ctx__relax(&turn);
    } while (state == CTX__REG_FIRED);
    return false;
}

static void ctx__unwatch(ctx__watch_t *watch) {
    ((ctx__parker_t *)watch->reg.arg)->expires = NULL;
    ctx__waker_stop(&watch->reg);
}

static bool ctx__parker_is_set(const void *parker) {
    return ctx__park_is(CTX__LOAD(&((const ctx__parker_t *)parker)->state, ACQUIRE), CTX__SET);
}

/* Look for a moment, before parking. True: unparked. */
static bool ctx__park_looks(const ctx__parker_t *parker, ctx_time_t until) {
    const ctx_t *expires = parker->expires;
    if (ctx__clock_is_fake()) until = CTX_NO_DEADLINE;
    else if (expires) until = ctx__min(until, ctx__deadline(expires));
    return ctx__look_out(ctx__parker_is_set, parker, until);
}

/* Somebody who waits, on its own stack. */
typedef struct {
    ctx__link_t link; /* [the lock of the queue] */
    ctx__parker_t parker;
} ctx__wait_t;

static void ctx__wait_init(ctx__wait_t *wait) {
    wait->link.next = NULL;
    wait->link.pprev = NULL;
    ctx__parker_init(&wait->parker);
}

/* Under the lock of the queue. */
static void ctx__wake_first(ctx__queue_t *queue) {
    ctx__wait_t *wait = CTX__CONTAINER(queue->first, ctx__wait_t, link);
    ctx__queue_out(queue, &wait->link);
    ctx__unpark(&wait->parker);
}

static void ctx__wake_all(ctx__queue_t *queue) {
    while (queue->first) ctx__wake_first(queue);
}

static void ctx__wait_lock(uint32_t *mu, bool inside) {
    if (mu && inside) ctx__enter(mu);
    else if (mu) ctx__lock(mu);
}

static void ctx__wait_unlock(uint32_t *mu, bool inside) {
    if (mu) ctx__unlock(mu);
    if (mu && inside) ctx__outside(&ctx__self);
}

/* The one wait: until `holds(what)`, `ctx` is done or `until` has come. Returns 0, the err of `ctx` or CTX_NOT_READY.
   `mu` guards what `holds` looks at; the caller has it, and has it again on return. A thread that makes it hold wakes
   `queue` under `mu`, where this one stands meanwhile; or, with no queue, unparks `wait`, which the caller has queued.
   With no `mu` nothing is locked, and with no `holds` nobody makes it hold: the thread sleeps. */
static int ctx__wait_for(ctx__wait_t *wait, uint32_t *mu, ctx__queue_t *queue, bool (*holds)(void *what), void *what,
                         ctx_t *ctx, ctx_time_t until, const char *op) {
    bool inside = (ctx__self.inside & ~CTX__STRANGER) != 0, held = false, live, in_time = true;
    ctx__parker_t *parker = &wait->parker;
    ctx__watch_t watch;
    int err;
    parker->with = ctx;
    parker->op = op;
    do {
        ctx__wait_unlock(mu, inside);
        live = ctx__watch(&watch, ctx, parker);
        ctx__wait_lock(mu, inside);
        while (!(holds && holds(what)) && live && in_time && !ctx_err(ctx)) {
            if (queue) ctx__queue_add(queue, &wait->link);
            ctx__wait_unlock(mu, inside);
            in_time = (holds && ctx__park_looks(parker, until)) || ctx__park(parker, until);
            if (in_time) ctx__parker_reset(parker);
            ctx__wait_lock(mu, inside);
            if (queue) ctx__queue_out(queue, &wait->link);
        }
        ctx__wait_unlock(mu, inside);
        if (live) ctx__unwatch(&watch);
        ctx__wait_lock(mu, inside);
        err = ctx_err(ctx);
        if (!err && !in_time) err = CTX_NOT_READY;
    } while (!(held = holds && holds(what)) && !err);
    return held ? 0 : err;
}

/* The same for a thread that stands in no queue. */
static int ctx__await_for(uint32_t *mu, ctx__queue_t *queue, bool (*holds)(void *what), void *what, ctx_t *ctx,
                          ctx_time_t until, const char *op) {
    ctx__wait_t wait;
    if (holds && holds(what)) return 0;
    ctx__wait_init(&wait);
    return ctx__wait_for(&wait, mu, queue, holds, what, ctx, until, op);
}

/* With the name of the function that waits. */
#define ctx__wait_on(wait, mu, queue, holds, what, ctx, until) \
    ctx__wait_for(wait, mu, queue, holds, what, ctx, until, __func__)
#define ctx__await(mu, queue, holds, what, ctx, until) ctx__await_for(mu, queue, holds, what, ctx, until, __func__)

static ctx_time_t ctx__from_now(ctx_dur_t dur) {
    return dur == CTX_FOREVER ? CTX_NO_DEADLINE : ctx_time_add(ctx_now(), dur);
}

/* Sleep until `ctx` is done (its err) or until `until` (0). */
static int ctx__sleep_until(ctx_t *ctx, ctx_time_t until) {
    int rc = ctx__await_for(NULL, NULL, NULL, NULL, ctx, until, "ctx_sleep");
    return rc == CTX_NOT_READY ? 0 : rc;
}

static bool ctx__never(void *what) { return what != NULL; }

CTXCANCEL_API int ctx_wait(ctx_t *ctx, ctx_dur_t max) {
    int err = ctx_err(ctx);
    if (err) return err;
    return max > 0 ? ctx__await(NULL, NULL, ctx__never, NULL, ctx, ctx__from_now(max)) : CTX_NOT_READY;
}

CTXCANCEL_API int ctx_sleep(ctx_t *ctx, ctx_dur_t dur) {
    int err = ctx_err(ctx);
    return err || dur <= 0 ? err : ctx__sleep_until(ctx, ctx__from_now(dur));
}

CTXCANCEL_API int ctx_sleep_until(ctx_t *ctx, ctx_time_t time) {
    int err = ctx_err(ctx);
    return err || time <= ctx_now() ? err : ctx__sleep_until(ctx, time);
}

static ctx__event_t ctx__event_done = { -1, -1 }; /* [ctx__runtime.mu] for contexts that are done when first asked */

static int ctx__done_fd_shared(void) {
    ctx__event_t event;
    int rc = 0;
    ctx__enter(&ctx__runtime.mu);
    if (ctx__event_done.fd < 0) {
        rc = ctx__event_open(&event);
        if (!rc) {
            ctx__event_set(&event);
            ctx__event_done = event;
        }
    }
    if (!rc) rc = ctx__event_done.fd;
    ctx__leave(&ctx__runtime.mu);
    return rc;
}

/* The descriptor of a context, if it has one: readable on return if the context is done. With `offer` it gets that one,
   if it has none and is not done; `*taken` says whether it did. Else -1. */
static int ctx__done_fd_get(ctx_t *ctx, ctx__event_t *offer, bool *taken) {
    const ctx__event_t *event;
    bool done;
    ctx__enter(&ctx->list.mu);
    done = ctx__done(ctx);
    if (!ctx->event && !done && offer) {
        ctx__list_attach(ctx, &ctx->list);
        if (!ctx->watched) ctx->watched = ctx__watched_add(&ctx->watch);
        ctx->event = offer;
        *taken = true;
    }
    event = ctx->event;
    ctx__leave(&ctx->list.mu);
    if (event && done) ctx__event_set(event); /* the thread that cancels may not have come to it */
    return event ? event->fd : -1;
}

CTXCANCEL_API int ctx_done_fd(ctx_t *ctx) {
    ctx__event_t *event;
    bool taken = false;
    int fd, rc;
    CTXCANCEL_ASSERT(ctx__set(ctx));
    if (ctx->flags & CTX__F_FAILED) return ctx__done_fd_shared();
    ctx__timer_revive(ctx);
    fd = ctx__done_fd_get(ctx, NULL, NULL);
    if (fd >= 0) return fd;
    if (ctx__done(ctx)) return ctx__done_fd_shared();
    event = (ctx__event_t *)CTXCANCEL_MALLOC(sizeof *event);
    if (!event) return CTX_NO_MEMORY;
    rc = ctx__event_open(event);
    if (!rc) fd = ctx__done_fd_get(ctx, event, &taken);
    if (taken) return fd;
    if (!rc) ctx__event_close(event);
    CTXCANCEL_FREE(event);
    if (rc) return rc;
    return fd >= 0 ? fd : ctx__done_fd_shared(); /* it has got another one meanwhile, or is done */
}

static void ctx__poller_fire(void *poller) { ctx__event_set(&((ctx__poller_t *)poller)->event); }

/* How long to poll at most. A thread that nothing wakes looks at its context every millisecond. With the fake clock a
   deadline cancels the context in ctx_clock_advance(). */
static int ctx__wait_fd_timeout(const ctx_t *ctx, bool woken) {
    if (!woken) return 1;
    return ctx__clock_is_fake() ? -1 : ctx_remaining_ms(ctx);
}

/* The deadline of a context whose runtime thread is busy. */
static void ctx__wait_fd_expire(ctx_t *ctx) {
    if (!ctx__clock_is_fake() && ctx__deadline(ctx) <= ctx_now()) ctx__expire(ctx);
}

/* Wait until fds[0] is ready or `ctx` is done; fds[1] is for the wake-up. Returns what is ready, the err of `ctx` or a
   negative error of the system. Without a poller it works all the same, but looks often. */
static int ctx__wait_fd(ctx_t *ctx, struct pollfd fds[2]) {
    ctx__poller_t *poller = ctx == &ctx__root ? NULL : ctx__poller_get();
    bool live = true;
    ctx_on_done_t reg;
    int rc = 0;
    if (poller) {
        fds[1].fd = poller->event.fd, fds[1].events = POLLIN, fds[1].revents = 0;
        reg.state = CTX__REG_IDLE;
        ctx__timer_revive(ctx);
        live = ctx__reg_add(&reg, ctx, ctx__poller_fire, poller, CTX__REG_WAKER);
    }
    while (live && rc >= 0 && !fds[0].revents && !ctx_err(ctx)) {
        rc = ctx__poll(fds, poller ? 2 : 1, ctx__wait_fd_timeout(ctx, poller || ctx == &ctx__root));
        if (rc == 0) ctx__wait_fd_expire(ctx);
    }
    if (poller && live && !ctx__waker_stop(&reg)) ctx__event_clear(&poller->event);
    if (poller && !ctx__self.linked) ctx__poller_close(&ctx__self); /* nobody would be told of the end of this thread */
    return rc < 0 ? rc : fds[0].revents ? fds[0].revents : ctx_err(ctx);
}

/* A waiter on a condition variable cannot be woken reliably without its mutex, which the thread that cancels may hold
   itself: the waiter may be just before its wait. So it is woken again every millisecond by the runtime thread, until
   it has gone. */
struct ctx__nag {
    ctx__nag_t *next;
    pthread_cond_t *cond;
    bool linked; /* [ctx__runtime.mu] */
    ctx_on_done_t reg;
};

/* By the runtime thread. True while there is somebody left to nag. */
static bool ctx__nag_all(void) {
    const ctx__nag_t *nag;
    bool any;
    ctx__enter(&ctx__runtime.mu);
    for (nag = ctx__runtime.nags; nag; nag = nag->next) pthread_cond_broadcast(nag->cond);
    any = ctx__runtime.nags != NULL;
    ctx__leave(&ctx__runtime.mu);
    return any;
}

static void ctx__nag_fire(void *arg) {
    ctx__nag_t *nag = (ctx__nag_t *)arg;
    ctx__enter(&ctx__runtime.mu);
    nag->linked = true;
    nag->next = ctx__runtime.nags;
    ctx__runtime.nags = nag;
    pthread_cond_broadcast(nag->cond);
    ctx__leave(&ctx__runtime.mu);
    ctx__runtime_kick();
}

/* Also when the waiting thread is canceled. */
static void ctx__nag_end(void *arg) {
    ctx__nag_t *nag = (ctx__nag_t *)arg, **at;
    ctx_on_done_stop(&nag->reg);
    ctx__enter(&ctx__runtime.mu);
    if (nag->linked) {
        for (at = &ctx__runtime.nags; *at != nag; at = &(*at)->next) {}
        *at = nag->next;
    }
    ctx__leave(&ctx__runtime.mu);
}

CTXCANCEL_API int ctx_cond_wait(ctx_t *ctx, pthread_cond_t *cond, pthread_mutex_t *mutex) {
    ctx__nag_t nag;
    int err = ctx_err(ctx), rc;
    if (err) return err;
    if (!cond || !mutex) return CTX_INVALID;
    if (!CTX__LOAD(&ctx__runtime.running, ACQUIRE) && (rc = ctx__runtime_start()) != 0) return rc;
    memset(&nag, 0, sizeof nag);
    nag.cond = cond;
    if (!ctx__reg_add(&nag.reg, ctx, ctx__nag_fire, &nag, 0)) return ctx_err(ctx);
    pthread_cleanup_push(ctx__nag_end, &nag);
    rc = -ctx__cond_wait(cond, mutex, ctx__clock_is_fake() ? CTX_NO_DEADLINE : ctx__deadline(ctx));
    pthread_cleanup_pop(1);
    if (rc == -ETIMEDOUT) {
        rc = 0;
        if (ctx_now() >= ctx__deadline(ctx)) ctx__expire(ctx);
    }
    err = ctx_err(ctx);
    return rc ? rc : err;
}

/* == 8. semaphore ================================================= */

/* While somebody waits, permits go from release to the first waiter and to nobody else.

   One word holds the free permits, doubled, and a bit that says somebody waits. While the bit is clear, acquire and
   release are a compare-and-swap each. While it is set both go through `mu`, and only its holder takes permits out of
   the word, on behalf of the first waiter: that is what makes it first come, first served, and why try_acquire fails
   then. Waiters stand on their own stacks in the order of arrival. A waiter whose context is done when its turn comes
   is passed over. One that gives up leaves under `mu`: either it has been granted by then, and keeps what it got, or it
   never will be. A newcomer sets the bit before it looks at the permits for the last time, and a release adds to the
   word in the same step in which it finds the bit clear, or under `mu` while somebody waits: one of the two sees the
   other.

     free: word = 2 * permits    --acquire finds too few-->    queued: word | 1, first .. last
          ^------------------------the last waiter leaves-------------------------/

   A release touches nothing once its permits are in the word or with a waiter and `mu` is free; a waiter takes `mu`
   before it returns. So the thread that took the last permit may free the semaphore at once. */

typedef struct {
    ctx__wait_t wait; /* its link: [mu]; unparked under mu, so never after its owner has looked at `granted` */
    ctx_t *ctx;       /* [const] */
    int64_t n;        /* [const] */
    bool granted;     /* [mu] */
} ctx__sem_waiter_t;

enum { CTX__SEM_WAIT = 1 };

CTXCANCEL_API int ctx_sem_init(ctx_sem_t *sem, int64_t permits) {
    CTXCANCEL_ASSERT(ctx__set(sem));
    memset(sem, 0, sizeof *sem);
    if (permits < 1 || permits > INT64_C(1) << 61) return CTX_INVALID;
    sem->state = permits * 2;
    sem->total = permits;
    return 0;
}

/* Take `n` from the word. False: too few, or the waiting bit is not `bit`. */
static inline bool ctx__sem_take(ctx_sem_t *sem, int64_t n, int64_t bit) {
    int64_t state = CTX__LOAD(&sem->state, ACQUIRE);
    while ((state & CTX__SEM_WAIT) == bit && state >= n * 2)
        if (n == 0 || CTX__CAS_WEAK(&sem->state, &state, state - n * 2, ACQUIRE, ACQUIRE)) return true;
    return false;
}

/* [mu] Serve the queue from its head as far as the permits go. */
static void ctx__sem_hand_out(ctx_sem_t *sem) {
    while (sem->waiters.first) {
        ctx__sem_waiter_t *waiter = CTX__CONTAINER(sem->waiters.first, ctx__sem_waiter_t, wait.link);
        bool took = ctx__sem_take(sem, waiter->n, CTX__SEM_WAIT);
        bool done = ctx_err(waiter->ctx) != 0; /* after the permits have come; it has been woken, or will be */
        if (!took && !done) break;
        ctx__queue_out(&sem->waiters, &waiter->wait.link);
        if (!done) {
            waiter->granted = true;
            ctx__unpark(&waiter->wait.parker);
        } else if (took) {
            CTX__ADD(&sem->state, waiter->n * 2, ACQ_REL);
        }
    }
    if (!sem->waiters.first) CTX__AND(&sem->state, ~(int64_t)CTX__SEM_WAIT, RELEASE);
}

static bool ctx__sem_granted(void *waiter) { return ((ctx__sem_waiter_t *)waiter)->granted; }

static CTX__COLD int ctx__sem_wait(ctx_sem_t *sem, ctx_t *ctx, int64_t n) {
    ctx__sem_waiter_t waiter;
    ctx__wait_init(&waiter.wait);
    waiter.ctx = ctx;
    waiter.n = n;
    waiter.granted = false;
    ctx__lock(&sem->mu);
    ctx__queue_add(&sem->waiters, &waiter.wait.link);
    CTX__OR(&sem->state, (int64_t)CTX__SEM_WAIT, ACQ_REL);
    ctx__sem_hand_out(sem);
    ctx__wait_on(&waiter.wait, &sem->mu, NULL, ctx__sem_granted, &waiter, ctx, CTX_NO_DEADLINE);
    if (waiter.wait.link.pprev) { /* the next in the queue may fit where this one did not */
        ctx__queue_out(&sem->waiters, &waiter.wait.link);
        ctx__sem_hand_out(sem);
    }
    ctx__unlock(&sem->mu);
    return waiter.granted ? 0 : ctx_err(ctx);
}

CTXCANCEL_API int ctx_sem_acquire(ctx_sem_t *sem, ctx_t *ctx, int64_t n) {
    int err;
    CTXCANCEL_ASSERT(ctx__set(sem));
    if (!ctx || n < 0 || n > sem->total) return CTX_INVALID;
    err = ctx_err(ctx);
    if (err) return err;
    if (!ctx__sem_take(sem, n, 0)) return ctx__sem_wait(sem, ctx, n);
    err = ctx_err(ctx);
    if (CTX__UNLIKELY(err)) ctx_sem_release(sem, n); /* it was done before the permits had come */
    return err;
}

CTXCANCEL_API bool ctx_sem_try_acquire(ctx_sem_t *sem, int64_t n) {
    CTXCANCEL_ASSERT(ctx__set(sem));
    return n >= 0 && n <= sem->total && ctx__sem_take(sem, n, 0);
}

CTXCANCEL_API void ctx_sem_release(ctx_sem_t *sem, int64_t n) {
    int64_t state, most;
    CTXCANCEL_ASSERT(ctx__set(sem) && n >= 0 && n <= sem->total);
    if (n <= 0 || n > sem->total) return;
    most = sem->total - n;
    state = most * 2; /* what it is if nobody else holds any; the first try tells if not */
    for (;;) {
        while (!(state & CTX__SEM_WAIT)) {
            CTXCANCEL_ASSERT(state / 2 <= most); /* more than was taken */
            if (CTX__CAS_WEAK(&sem->state, &state, state + n * 2, RELEASE, RELAXED)) return;
        }
        ctx__lock(&sem->mu);
        if (sem->waiters.first) break;
        ctx__unlock(&sem->mu); /* the last waiter has given up, and cleared the bit */
        state = CTX__LOAD(&sem->state, RELAXED);
    }
    state = CTX__ADD(&sem->state, n * 2, ACQ_REL);
    CTXCANCEL_ASSERT(state / 2 <= most);
    ctx__sem_hand_out(sem);
    ctx__unlock(&sem->mu);
}

CTXCANCEL_API void ctx_sem_destroy(ctx_sem_t *sem) {
    CTXCANCEL_ASSERT(sem == NULL || !sem->waiters.first);
    (void)sem;
}

/* == 9. pool ====================================================== */

/* While there is work and a worker is idle, somebody is on the way to it.

   Work is a task in the ring, or a turn on the agenda: see below. On the way is a worker that was roused and has not
   taken anything yet, counted in `looking`; or, in a pool that lets tasks gather, one whose nap will end, counted in
   `promised`. All of it is guarded by the submit lock, the `in` of the ring, and ctx__pool_leave() is the only way to
   give that lock back where there may be work: it rouses a worker if nobody is on the way. So whoever stops looking,
   because it has taken something or because a thread could not be made, passes on by leaving.

     idle --roused, made, or its nap is over--> looking --takes something--> busy --finds nothing more--> looking
       ^--finds nothing for a moment; naps if tasks gather--/

   Nothing is lost: a task changes hands only under a lock. A submit puts it into the ring under `in` unless `closed` is
   set or the pool's context is done; whoever takes it out under `out` runs it or gives it to on_drop. No foreign code
   runs under either lock.

   Submitters that wait for room stand in a queue, and the worker that makes room, because it takes a task or is free
   again, puts their tasks into the ring for them, in order; while one waits the ring counts as full for all others. A
   submitter that runs its task itself is a worker whose record is on its stack: it takes a permit, drains do not wait
   for it if it drains itself, and reports name it.

   The agenda has the turns that groups and batchers want: a worker shall come and do what they have. A turn takes no
   place in the ring. It comes, or it is lost when the pool ends, or its owner takes it back. Workers take a task and a
   turn by turns.

   A worker owns a node below the pool's context and uses it for task after task, as long as nobody kept or canceled
   it: only the values, name and deadline change. Its timer stays armed and is merely pushed later.

   The bytes of a copied task are in a block of the pool's, which is the task's until it has run or is dropped; then it
   goes onto `copies_back`, without a lock. A submit takes from `copies`, and fetches what has come back when that is
   empty. Blocks are made in chunks, each as large as all before it together.

   The pool is counted: its owner, each thread and each submitter that runs a task hold it. So freeing need not wait for
   a stuck task. */

typedef struct {
    ctx_task_fn fn;
    void *arg;
    const char *op;
    uintptr_t from;        /* what it has of its parent: a reference to the values; in the low bits CTX__F_SAMPLING, and
                              CTX__TASK_COPY if `arg` is a block of the pool's */
} ctx__task_t;

enum { CTX__TASK_COPY = 4, CTX__TASK_BITS = 7 };

typedef union ctx__copy {
    union ctx__copy *next; /* while no task has it: the rest of the list */
    char bytes[16];        /* the first of copy_max, else */
} ctx__copy_t;

static uintptr_t ctx__task_from(const ctx_t *parent) {
    if (parent->values) ctx__record_retain(parent->values);
    return (uintptr_t)parent->values | (uintptr_t)(parent->flags / CTX__F_DECIDED);
}

static ctx__record_t *ctx__task_values(uintptr_t from) {
    return (ctx__record_t *)(from & ~(uintptr_t)CTX__TASK_BITS);
}
static uint8_t ctx__task_sampling(uintptr_t from) { return (uint8_t)((from & 3) * CTX__F_DECIDED); }

/* What a group or a batcher has workers come for. */
typedef struct ctx__turns {
    ctx__link_t link; /* [in] on the agenda while `wanted` is not 0 */
    int wanted;       /* [in] workers that shall come */
    void (*come)(struct ctx__turns *turns, bool lost); /* [const] called once for each, with no lock held: by the
                                                          worker, or with `lost` by the thread that ends the pool */
    const char *op;   /* [const] for reports */
} ctx__turns_t;

enum { CTX__WORKER_NONE, CTX__WORKER_STARTING, CTX__WORKER_STARTED };

typedef struct ctx__worker {
    CTX__ALIGNED ctx_pool_t *pool; /* [const] */
    ctx__scope_t scope;            /* [owner thread] */
    ctx_t *node;                   /* [owner thread] NULL: to be made */
    bool timed;                    /* [owner thread] node's timer is armed */
    bool ran;                      /* [owner thread] something since its last nap */
    bool turn_next;                /* [owner thread] took a task last */
    uint64_t done[3];              /* [atomic, written by the owner thread] completed, failed, canceled */
    const char *op;                /* [atomic] what it runs; NULL: nothing */
    uint32_t turns;                /* [atomic] that is a turn */
    uint32_t permit;               /* [atomic] holds a permit of desc.permits */
    ctx__link_t link;              /* [in] among the idle, or the callers */
    bool looking, idle, naps;      /* [in] */
    unsigned calls[2];             /* [in] drains of this pool, and waits for it, that its task is in */
    uint8_t state;                 /* [in] CTX__WORKER_... */
    bool begun;                    /* [who reserved it, then const] its thread has been asked for */
    pthread_t thread;
    ctx__parker_t parker;
} ctx__worker_t;

struct ctx_pool {
    /* [const] */
    ctx_pool_desc_t desc; /* defaults resolved */
    ctx_t *ctx;           /* of all tasks, below the lifetime */
    ctx_on_done_t on_end; /* on ctx: drops what is queued */
    ctx__worker_t *all;   /* desc.workers of them */
    void *raw;            /* what to free */
    unsigned forks;       /* ctx__forks when it was made: in a child of fork it has no threads */
    uint32_t refs;        /* [atomic] */

    ctx__ring_t ring;     /* of ctx__task_t; with cells for ctx__pool_most() of them */
    bool want_room;       /* [out] somebody waits for room */
    uint32_t turns;       /* [atomic, set under in] wanted in all */

    CTX__ALIGNED bool closed; /* [in] */
    bool quit;            /* [in] workers shall end */
    bool cut;             /* [in] a drain ran out of budget */
    unsigned looking;     /* [in] workers on the way */
    unsigned promised;    /* [in] workers that nap */
    unsigned workers;     /* [in] threads that there are or are being made, ... */
    unsigned starting;    /* ... and that are being made */
    unsigned idle_count;  /* [in] */
    ctx__link_t *idle;    /* [in] workers, the last to come first */
    ctx__link_t *callers; /* [in] submitters that run a task */
    ctx__queue_t agenda;  /* [in] of ctx__turns_t */
    ctx__queue_t blocked; /* [in] submitters that wait for room */
    ctx__queue_t waiters; /* [in] for tasks to end, or for threads to be made */
    uint64_t by_callers;  /* [in] tasks that callers took, ... */
    uint64_t done[3];     /* ... and what became of them */
    uint64_t dropped;     /* [atomic] */
    uint32_t dropping;    /* [atomic] tasks that are on their way to on_drop, or in it */
    unsigned drop_calls[2]; /* [in] drains of this pool, and waits for it, that an on_drop of it is in */
    uint64_t tallied;     /* [in] of dropped, what a component's report has */
    ctx__copy_t *copies;  /* [in] blocks for copied tasks, ... */
    void *chunks;         /* [in] ... and what they are parts of; each begins with the next one */
    size_t copies_made;   /* [in] */
    CTX__ALIGNED ctx__copy_t *copies_back; /* [atomic] blocks that tasks have given back */
};

static bool ctx__pool_forked(const ctx_pool_t *pool) { return pool->forks != ctx__forks; }

static bool ctx__pool_has_work(const void *pool) {
    return CTX__LOAD(&((const ctx_pool_t *)pool)->turns, RELAXED) || ctx__ring_count(&((const ctx_pool_t *)pool)->ring);
}

static void ctx__pool_free_memory(ctx_pool_t *pool) {
    void *chunk, *next;
    for (chunk = pool->chunks; chunk; chunk = next) {
        memcpy(&next, chunk, sizeof next);
        CTXCANCEL_FREE(chunk);
    }
    CTXCANCEL_FREE(pool->raw);
}

static void ctx__pool_unref(ctx_pool_t *pool) {
    if (CTX__SUB(&pool->refs, 1u, ACQ_REL) != 1) return;
    ctx_release(pool->ctx);
    ctx__pool_free_memory(pool);
}

/* -- who looks -- */

static int ctx__worker_start(ctx__worker_t *worker);
static void *ctx__worker_main(void *worker);

/* [in] */
static void ctx__worker_look(ctx__worker_t *worker) {
    worker->pool->looking += !worker->looking;
    worker->looking = true;
}

/* [in] To be followed by ctx__pool_leave(), which passes on. */
static void ctx__worker_unlook(ctx__worker_t *worker) {
    worker->pool->looking -= worker->looking;
    worker->looking = false;
}

/* [in] */
static void ctx__worker_nap_end(ctx__worker_t *worker) {
    worker->pool->promised -= worker->naps;
    worker->naps = false;
}

/* [in] Off the idle stack, and on the way. */
static ctx__worker_t *ctx__worker_rise(ctx__worker_t *worker) {
    ctx__link_out(&worker->link);
    worker->idle = false;
    worker->pool->idle_count--;
    ctx__worker_nap_end(worker);
    ctx__worker_look(worker);
    return worker;
}

/* [in] A place for one more thread, which is on the way from now on; NULL if there is none. */
static ctx__worker_t *ctx__worker_reserve(ctx_pool_t *pool) {
    ctx__worker_t *worker = pool->all;
    if (pool->workers >= (unsigned)pool->desc.workers || pool->quit) return NULL;
    while (worker->state != CTX__WORKER_NONE) worker++;
    worker->state = CTX__WORKER_STARTING;
    worker->begun = false;
    pool->workers++;
    pool->starting++;
    ctx__worker_look(worker);
    return worker;
}

/* [in] Is more than half the queue taken? The head's cache line is the workers': it is looked at only when what was
   last seen of it says yes. */
static bool ctx__pool_past_half(ctx_pool_t *pool) {
    if (pool->ring.tail - pool->ring.head_seen <= pool->desc.queue / 2) return false;
    pool->ring.head_seen = CTX__LOAD(&pool->ring.head, ACQUIRE);
    return pool->ring.tail - pool->ring.head_seen > pool->desc.queue / 2;
}

/* [in] Nobody is on the way: who shall be? An idle worker, or one to be started; NULL if nobody can or needs to. */
static ctx__worker_t *ctx__pool_rouse(ctx_pool_t *pool, bool may_start) {
    if (!pool->idle && (!may_start || pool->workers >= (unsigned)pool->desc.workers)) return NULL;
    if (!ctx__pool_has_work(pool)) return NULL;
    if (pool->promised && !pool->closed && !ctx__pool_past_half(pool) && !ctx__clock_era())
        return NULL; /* tasks may gather */
    if (pool->idle) return ctx__worker_rise(CTX__CONTAINER(pool->idle, ctx__worker_t, link));
    return ctx__worker_reserve(pool);
}

static CTX__COLD void ctx__worker_wake(ctx__worker_t *worker) {
    if (worker->begun) ctx__unpark(&worker->parker);
    else ctx__worker_start(worker);
}

/* [in], released here. Wakes what is due. */
static inline void ctx__pool_leave(ctx_pool_t *pool) {
    ctx__worker_t *worker = pool->looking ? NULL : ctx__pool_rouse(pool, true);
    ctx__unlock(&pool->ring.in);
    if (CTX__UNLIKELY(worker != NULL)) ctx__worker_wake(worker);
}

/* 0, or CTX_NO_MEMORY: then an idle worker is roused in its stead, if there is one. */
static CTX__COLD int ctx__worker_start(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    ctx__worker_t *other = NULL;
    int rc;
    worker->begun = true;
    CTX__ADD(&pool->refs, 1u, RELAXED);
    rc = ctx__member_start(&worker->thread, ctx__worker_main, worker, pool->desc.stack_size);
    ctx__lock(&pool->ring.in);
    pool->starting--;
    worker->state = rc ? CTX__WORKER_NONE : CTX__WORKER_STARTED;
    if (rc) {
        pool->workers--;
        ctx__worker_unlook(worker);
        if (!pool->looking) other = ctx__pool_rouse(pool, false);
    }
    ctx__wake_all(&pool->waiters);
    ctx__unlock(&pool->ring.in);
    if (other) ctx__worker_wake(other);
    if (rc) ctx__pool_unref(pool);
    return rc;
}

/* -- room, and what is dropped -- */

typedef struct {
    ctx__wait_t wait;
    ctx_pool_t *pool;
    ctx__task_t *task;
    ctx_t *parent;
    bool served; /* [in] */
} ctx__submitter_t;

/* [in] How many tasks the ring may hold: as many as may wait, and one for each worker that is free to take it: that
   looks, is idle or has no thread yet. The ring has cells for all. A worker that looks takes a task under `in` and
   looks no more, so no task is counted together with the worker that has taken it. */
static inline uint64_t ctx__pool_most(const ctx_pool_t *pool) {
    return pool->desc.queue + (unsigned)pool->desc.workers - pool->workers + pool->idle_count + pool->looking;
}

/* [in] The cell of the next task, NULL if the queue is full. */
static inline char *ctx__pool_room(ctx_pool_t *pool) {
    ctx__ring_t *ring = &pool->ring;
    if (ring->tail - ring->head_seen >= pool->desc.queue) {
        ring->head_seen = CTX__LOAD(&ring->head, ACQUIRE);
        if (ring->tail - ring->head_seen >= ctx__pool_most(pool)) return NULL;
    }
    return ctx__ring_room(ring);
}

/* [in, out] */
static bool ctx__pool_full(const ctx_pool_t *pool) {
    return pool->ring.tail - pool->ring.head >= ctx__pool_most(pool);
}

/* [in] There is room. */
static inline void ctx__pool_put(ctx_pool_t *pool, char *cell, ctx__task_t *task, const ctx_t *parent) {
    task->from = ctx__task_from(parent) | (task->from & CTX__TASK_COPY);
    memcpy(cell, task, sizeof *task);
    ctx__ring_put(&pool->ring);
}

/* [in] */
static int ctx__pool_refuses(const ctx_pool_t *pool) { return pool->closed ? CTX_CLOSED : ctx_err(pool->ctx); }

/* [in] Have the worker that makes room serve those who wait for it. False: there is room now. */
static bool ctx__pool_want_room(ctx_pool_t *pool) {
    bool full;
    ctx__lock(&pool->ring.out);
    full = pool->want_room = ctx__pool_full(pool);
    ctx__unlock(&pool->ring.out);
    return full;
}

/* [in] Put the tasks of those who wait for room into the ring, in order. */
static CTX__COLD void ctx__pool_serve(ctx_pool_t *pool) {
    while (pool->blocked.first && !ctx__pool_refuses(pool)) {
        char *cell = ctx__pool_room(pool);
        if (cell) {
            ctx__submitter_t *first = CTX__CONTAINER(pool->blocked.first, ctx__submitter_t, wait.link);
            ctx__pool_put(pool, cell, first->task, first->parent);
            first->served = true;
            ctx__wake_first(&pool->blocked);
        } else if (ctx__pool_want_room(pool)) {
            return;
        }
    }
}

/* Take the oldest task, and note its name in `op`; with no `op`, to drop it. `*serve`: submitters wait for room. */
static inline bool ctx__pool_take(ctx_pool_t *pool, ctx__task_t *task, const char **op, bool *serve) {
    const char *cell;
    ctx__lock(&pool->ring.out);
    cell = ctx__ring_first(&pool->ring);
    if (cell) {
        memcpy(task, cell, sizeof *task);
        if (op) CTX__STORE(op, task->op, RELEASE); /* before the head moves: a drain sees no task nowhere */
        else CTX__ADD(&pool->dropping, 1u, RELAXED);
        ctx__ring_take(&pool->ring);
        *serve = pool->want_room;
        pool->want_room = false;
    }
    ctx__unlock(&pool->ring.out);
    return cell != NULL;
}

/* The task is over: its copy, if it has one, is for another. */
static inline void ctx__copy_back(ctx_pool_t *pool, const ctx__task_t *task) {
    ctx__copy_t *copy = (ctx__copy_t *)task->arg, *seen;
    if (!(task->from & CTX__TASK_COPY)) return;
    seen = CTX__LOAD(&pool->copies_back, RELAXED);
    do {
        copy->next = seen;
    } while (!CTX__CAS(&pool->copies_back, &seen, copy, RELEASE, RELAXED));
}

/* Hand a task to on_drop. It is counted in `dropping` by now: a drain waits until on_drop has returned. */
static void ctx__pool_drop(ctx_pool_t *pool, const ctx__task_t *task, int reason) {
    ctx__scope_t scope;
    if (ctx__task_values(task->from)) ctx__record_release(ctx__task_values(task->from));
    CTX__ADD(&pool->dropped, 1u, RELAXED);
    if (pool->desc.on_drop) {
        ctx__scope_enter(&scope, CTX__IN_DROP, pool);
        pool->desc.on_drop(task->op, task->arg, reason, pool->desc.user);
        ctx__scope_leave(&scope);
    }
    ctx__copy_back(pool, task);
    CTX__SUB(&pool->dropping, 1u, RELEASE);
}

static int ctx__pool_drop_reason(const ctx_pool_t *pool) {
    ctx_cause_t cause = ctx_cause(pool->ctx);
    return cause.code == CTX_DEADLINE_EXCEEDED ? cause.code : ctx_err(pool->ctx);
}

/* [in] Take one turn off the agenda; NULL if there is none. */
static ctx__turns_t *ctx__pool_take_turn(ctx_pool_t *pool) {
    ctx__turns_t *turns;
    if (!pool->agenda.first) return NULL;
    turns = CTX__CONTAINER(pool->agenda.first, ctx__turns_t, link);
    ctx__queue_out(&pool->agenda, &turns->link);
    if (--turns->wanted) ctx__queue_add(&pool->agenda, &turns->link); /* behind the others */
    CTX__STORE(&pool->turns, pool->turns - 1, RELAXED);
    return turns;
}

/* Drop what is queued; the pool's context is done. Submitters look at that under `in`: after one turn of the lock none
   is left that did not see it. */
static void ctx__pool_empty_out(ctx_pool_t *pool) {
    ctx__turns_t *turns;
    ctx__task_t task;
    bool serve;
    do {
        ctx__lock(&pool->ring.in);
        turns = ctx__pool_take_turn(pool);
        ctx__wake_all(&pool->blocked);
        ctx__unlock(&pool->ring.in);
        if (turns) turns->come(turns, true);
    } while (turns);
    while (ctx__pool_take(pool, &task, NULL, &serve)) ctx__pool_drop(pool, &task, ctx__pool_drop_reason(pool));
    ctx__lock(&pool->ring.in);
    ctx__wake_all(&pool->waiters);
    ctx__unlock(&pool->ring.in);
}

/* Runs when the pool's context is done. on_drop may free the pool. */
static void ctx__pool_ended(void *arg) {
    ctx_pool_t *pool = (ctx_pool_t *)arg;
    if (ctx__pool_forked(pool)) return;
    CTX__ADD(&pool->refs, 1u, RELAXED);
    ctx__pool_empty_out(pool);
    ctx__pool_unref(pool);
}

/* -- what a worker does with a task -- */

static void ctx__worker_node_end(ctx__worker_t *worker) {
    ctx_end_at(worker->node, NULL);
    worker->node = NULL;
    worker->timed = false;
}

/* Stop the node's timer; a node whose timer has just fired is of no more use. */
static void ctx__worker_untime(ctx__worker_t *worker) {
    if (!worker->timed) return;
    CTXCANCEL_ASSERT(worker->node != NULL);
    worker->timed = false;
    if (!ctx__timer_remove(&worker->node->timer)) ctx__worker_node_end(worker);
}

/* The node of the next task, with `deadline` as its own if it has one. NULL: no memory. */
static ctx_t *ctx__worker_node(ctx__worker_t *worker, const ctx__task_t *task, ctx_time_t deadline) {
    ctx_time_t limit = ctx__deadline(worker->pool->ctx);
    bool timed = deadline < limit;
    CTXCANCEL_ASSERT(worker->node || !worker->timed);
    if (worker->node && ctx__why(worker->node)) ctx__worker_node_end(worker);
    if (!timed) ctx__worker_untime(worker);
    else if (worker->timed && !ctx__timer_move(&worker->node->timer, deadline)) ctx__worker_node_end(worker);
    if (!worker->node) {
        ctx__make_t make = ctx__make_plain;
        ctx_t *node;
        make.flags = CTX__F_VALUES;
        make.site = "ctx_pool_submit";
        node = ctx__make(worker->pool->ctx, NULL, &make);
        if (node->flags & CTX__F_STATIC) return NULL;
        worker->node = node;
    }
    worker->node->values = ctx__task_values(task->from);
    worker->node->flags = (uint8_t)(CTX__F_VALUES | ctx__task_sampling(task->from));
    worker->node->name = task->op;
    if (timed && !worker->timed) {
        worker->timed = true;
        ctx__timer_add(&worker->node->timer, deadline);
    } else if (!timed) {
        CTX__STORE(&worker->node->timer.deadline, limit, RELAXED);
    }
    return worker->node;
}

/* Keep the node for the next task if nobody else has a part in it. */
static void ctx__worker_node_done(ctx__worker_t *worker) {
    ctx_t *node = worker->node;
    if (CTX__LOAD(&node->refs, ACQUIRE) == 1 && CTX__LOAD(&node->pins, ACQUIRE) == 1 &&
        !ctx__why(node) && !node->event) {
        ctx__record_t *values = node->values;
        node->values = NULL;
        if (values) ctx__record_release(values);
    } else {
        ctx__worker_node_end(worker);
    }
}

/* It runs nothing then: ctx_pool_free() waits for on_drop to return, as it does not for a task. */
static void ctx__worker_drop(ctx__worker_t *worker, const ctx__task_t *task, int reason) {
    CTX__ADD(&worker->pool->dropping, 1u, RELAXED);
    CTX__STORE(&worker->op, (const char *)NULL, RELEASE);
    ctx__pool_drop(worker->pool, task, reason);
}

static void ctx__worker_run(ctx__worker_t *worker, const ctx__task_t *task) {
    ctx_pool_t *pool = worker->pool;
    ctx_time_t deadline = CTX_NO_DEADLINE;
    ctx_t *node;
    if (CTX__UNLIKELY(ctx_err(pool->ctx))) {
        ctx__worker_drop(worker, task, ctx__pool_drop_reason(pool));
        return;
    }
    if (pool->desc.task_timeout) {
        ctx__timer_ready(); /* it was when the pool began, but ctx_runtime_stop() may have been called since */
        deadline = ctx_time_add(ctx_now(), pool->desc.task_timeout);
    }
    node = ctx__worker_node(worker, task, deadline);
    if (CTX__UNLIKELY(!node)) {
        ctx__worker_drop(worker, task, CTX_NO_MEMORY);
    } else {
        int rc = task->fn(node, task->arg);
        uint64_t *done = &worker->done[rc == 0 ? 0 : ctx_err(node) ? 2 : 1];
        CTX__STORE(done, *done + 1, RELEASE);
        ctx__worker_node_done(worker);
        ctx__copy_back(pool, task);
    }
}

/* -- how a worker finds work -- */

static void ctx__worker_permit_return(ctx__worker_t *worker) {
    if (CTX__EXCHANGE(&worker->permit, 0u, ACQ_REL)) ctx_sem_release(worker->pool->desc.permits, 1);
}

/* Get a permit of the shared limit; a worker that waits for one is still on the way. Once the pool's context is done it
   needs none: tasks are then only dropped. */
static void ctx__worker_permit(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    if (ctx_sem_try_acquire(pool->desc.permits, 1) || ctx_sem_acquire(pool->desc.permits, pool->ctx, 1) == 0)
        CTX__STORE(&worker->permit, 1u, RELEASE);
}

static bool ctx__worker_do_task(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    bool locked = worker->looking, serve = false, took;
    ctx__task_t task;
    if (locked) ctx__lock(&pool->ring.in);
    took = ctx__pool_take(pool, &task, &worker->op, &serve);
    if (CTX__UNLIKELY(serve && !locked)) ctx__lock(&pool->ring.in);
    if (CTX__UNLIKELY(serve || locked)) {
        if (took) ctx__worker_unlook(worker); /* no longer on the way, nor free for another */
        if (serve) ctx__pool_serve(pool);
        ctx__pool_leave(pool);
    }
    if (!took) return false;
    worker->ran = true;
    ctx__worker_run(worker, &task);
    return true;
}

static bool ctx__worker_do_turn(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    ctx__turns_t *turns;
    if (!CTX__LOAD(&pool->turns, RELAXED)) return false;
    ctx__lock(&pool->ring.in);
    turns = ctx__pool_take_turn(pool);
    if (turns) {
        CTX__STORE(&worker->turns, 1u, RELAXED);
        CTX__STORE(&worker->op, turns->op, RELEASE);
        ctx__worker_unlook(worker);
    }
    ctx__pool_leave(pool);
    if (!turns) return false;
    worker->ran = true;
    turns->come(turns, false);
    return true;
}

/* False: there is nothing to do. */
static bool ctx__worker_work(ctx__worker_t *worker) {
    bool turn, found;
    if (worker->pool->desc.permits) {
        if (!ctx__pool_has_work(worker->pool)) return false;
        ctx__worker_permit(worker);
    }
    turn = worker->turn_next && ctx__worker_do_turn(worker);
    found = turn || ctx__worker_do_task(worker) || (turn = ctx__worker_do_turn(worker));
    worker->turn_next = !turn;
    if (worker->pool->desc.permits) ctx__worker_permit_return(worker);
    if (found) CTX__STORE(&worker->op, (const char *)NULL, RELEASE); /* it holds nothing: a drain may be over */
    if (turn) CTX__STORE(&worker->turns, 0u, RELAXED);
    return found;
}

/* [in] Onto the idle stack. Where tasks gather, one that has been at work naps, if no other does. */
static void ctx__worker_lie_down(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    ctx__worker_unlook(worker);
    ctx__link_in(&pool->idle, &worker->link);
    worker->idle = true;
    pool->idle_count++;
    worker->naps = pool->desc.coalesce && worker->ran && !pool->promised && !ctx__clock_era();
    worker->ran = false;
    pool->promised += worker->naps;
}

/* [in], released meanwhile. Sleep until it is roused, the nap is over and there is work, or the pool ends. */
static void ctx__worker_sleep(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    while (worker->idle && !pool->quit) {
        ctx_time_t until = worker->naps ? ctx_time_add(ctx__clock_read(), pool->desc.coalesce) : CTX_NO_DEADLINE;
        bool woken;
        ctx__unlock(&pool->ring.in);
        woken = ctx__park_real(&worker->parker, until);
        if (woken) ctx__parker_reset(&worker->parker);
        ctx__lock(&pool->ring.in);
        if (woken || !worker->naps) continue;
        ctx__worker_nap_end(worker);
        if (ctx__pool_has_work(pool)) ctx__worker_rise(worker);
    }
}

/* It found nothing: look for a moment, then lie down. False: the pool ends. */
static bool ctx__worker_rest(ctx__worker_t *worker) {
    ctx_pool_t *pool = worker->pool;
    bool on;
    ctx__lock(&pool->ring.in);
    ctx__worker_look(worker);
    ctx__pool_serve(pool); /* with no queue this is when room comes */
    ctx__wake_all(&pool->waiters);
    ctx__unlock(&pool->ring.in);
    if (ctx__look_out(ctx__pool_has_work, pool, CTX_NO_DEADLINE)) return true;
    ctx__worker_untime(worker);
    ctx__lock(&pool->ring.in);
    if (!ctx__pool_has_work(pool)) {
        ctx__worker_lie_down(worker);
        ctx__worker_sleep(worker);
    }
    on = !worker->idle;
    if (!on) ctx__worker_unlook(ctx__worker_rise(worker));
    ctx__pool_leave(pool);
    return on;
}

static void *ctx__worker_main(void *arg) {
    ctx__worker_t *worker = (ctx__worker_t *)arg;
    ctx__member_begin();
    ctx__thread_name(worker->pool->desc.name);
    ctx__scope_enter(&worker->scope, CTX__IN_TASK, worker->pool);
    do {
        while (ctx__worker_work(worker)) {}
    } while (ctx__worker_rest(worker));
    ctx__worker_untime(worker);
    if (worker->node) ctx__worker_node_end(worker);
    ctx__scope_leave(&worker->scope);
    ctx__pool_unref(worker->pool);
    return NULL;
}

/* -- how tasks and turns come in -- */

static bool ctx__pool_none_starts(void *pool) { return !((ctx_pool_t *)pool)->starting; }

/* The pool has no thread: have one before anything is accepted, for then the error can still be told.
   [in], released meanwhile. */
static CTX__COLD int ctx__pool_first_worker(ctx_pool_t *pool) {
    ctx__worker_t *worker;
    int rc;
    ctx__unlock(&pool->ring.in);
    rc = pool->desc.task_timeout ? ctx__timer_ready() : 0;
    ctx__lock(&pool->ring.in);
    if (rc) return rc;
    worker = pool->workers ? NULL : ctx__worker_reserve(pool);
    if (!worker) { /* another thread is at it, or was */
        ctx__await(&pool->ring.in, &pool->waiters, ctx__pool_none_starts, pool, &ctx__root, CTX_NO_DEADLINE);
        return 0;
    }
    ctx__unlock(&pool->ring.in);
    rc = ctx__worker_start(worker);
    ctx__lock(&pool->ring.in);
    return rc;
}

/* Is there a thread, and is the pool open? [in], released meanwhile. */
static inline int ctx__pool_ready(ctx_pool_t *pool) {
    for (;;) {
        int rc = ctx__pool_refuses(pool);
        if (CTX__UNLIKELY(rc)) return rc;
        if (!CTX__UNLIKELY(pool->workers == pool->starting)) return 0;
        rc = ctx__pool_first_worker(pool);
        if (rc) return rc;
    }
}

static bool ctx__submitter_over(void *submitter) {
    const ctx__submitter_t *self = (const ctx__submitter_t *)submitter;
    return self->served || ctx__pool_refuses(self->pool);
}

/* Wait for room until `parent` is done. [in], released meanwhile. */
static CTX__COLD int ctx__pool_wait_room(ctx_pool_t *pool, ctx_t *parent, ctx__task_t *task) {
    ctx__submitter_t self;
    int rc;
    ctx__wait_init(&self.wait);
    self.pool = pool;
    self.task = task;
    self.parent = parent;
    self.served = false;
    ctx__queue_add(&pool->blocked, &self.wait.link);
    ctx__pool_serve(pool);
    ctx__pool_leave(pool);
    ctx__lock(&pool->ring.in);
    rc = ctx__wait_on(&self.wait, &pool->ring.in, NULL, ctx__submitter_over, &self, parent, CTX_NO_DEADLINE);
    if (self.served) return 0;
    ctx__queue_out(&pool->blocked, &self.wait.link);
    return rc ? rc : ctx__pool_refuses(pool);
}

/* [in] Put a task into a full ring, in the place of the oldest, which has a name then: not if there was room now.
   CTX_QUEUE_FULL if there is no queue, and so none that is older. */
static CTX__COLD int ctx__pool_replace(ctx_pool_t *pool, ctx_t *parent, ctx__task_t *task, ctx__task_t *oldest) {
    bool full;
    if (!pool->desc.queue) return CTX_QUEUE_FULL;
    do {
        ctx__pool_serve(pool); /* room that has come is first for those who wait */
        ctx__lock(&pool->ring.out);
        full = ctx__pool_full(pool);
        if (full) {
            memcpy(oldest, ctx__ring_first(&pool->ring), sizeof *oldest);
            CTX__ADD(&pool->dropping, 1u, RELAXED);
            ctx__ring_take(&pool->ring);
        }
        ctx__unlock(&pool->ring.out);
    } while (!full && pool->blocked.first && !ctx__pool_refuses(pool));
    ctx__pool_put(pool, ctx__ring_room(&pool->ring), task, parent);
    return 0;
}

/* Does a task that the calling thread is in hold a permit of `permits`? What it runs meanwhile is run under that. */
static bool ctx__caller_permitted(const ctx_sem_t *permits) {
    const ctx__scope_t *scope;
    for (scope = ctx__self.scope; scope; scope = scope->outer) {
        const ctx__worker_t *worker = CTX__CONTAINER(scope, const ctx__worker_t, scope);
        if (scope->kind != CTX__IN_TASK || worker->pool->desc.permits != permits) continue;
        if (CTX__LOAD(&worker->permit, RELAXED)) return true;
    }
    return false;
}

/* The permit of a task that its submitter runs. */
static int ctx__caller_permit(ctx__worker_t *self, ctx_t *parent) {
    ctx_sem_t *permits = self->pool->desc.permits;
    ctx_t *both;
    int rc;
    if (!permits || ctx__caller_permitted(permits)) return 0;
    both = ctx_merge_at(parent, self->pool->ctx, "ctx_pool_submit");
    rc = ctx_sem_acquire(permits, both, 1);
    ctx_end_at(both, NULL);
    if (!rc) CTX__STORE(&self->permit, 1u, RELEASE);
    return rc;
}

/* Run a task here, as a worker. [in], released meanwhile. */
static CTX__COLD int ctx__pool_caller_runs(ctx_pool_t *pool, ctx_t *parent, ctx__task_t *task) {
    ctx__worker_t self;
    int rc, i;
    memset(&self, 0, sizeof self);
    self.pool = pool;
    ctx__pool_leave(pool);
    rc = ctx__caller_permit(&self, parent);
    ctx__lock(&pool->ring.in);
    if (!rc) rc = ctx__pool_refuses(pool);
    if (!rc) {
        pool->by_callers++;
        self.op = task->op;
        ctx__link_in(&pool->callers, &self.link);
        ctx__unlock(&pool->ring.in);
        task->from = ctx__task_from(parent) | (task->from & CTX__TASK_COPY);
        ctx__scope_enter(&self.scope, CTX__IN_TASK, pool);
        ctx__worker_run(&self, task);
        ctx__scope_leave(&self.scope);
        ctx__worker_untime(&self);
        if (self.node) ctx__worker_node_end(&self);
        ctx__worker_permit_return(&self);
        ctx__lock(&pool->ring.in);
        ctx__link_out(&self.link);
        for (i = 0; i < 3; i++) pool->done[i] += self.done[i];
        ctx__wake_all(&pool->waiters);
    }
    ctx__unlock(&pool->ring.in);
    ctx__worker_permit_return(&self);
    ctx__lock(&pool->ring.in);
    return rc;
}

/* [in], released meanwhile. */
static inline int ctx__pool_add(ctx_pool_t *pool, ctx_t *parent, ctx__task_t *task, ctx_when_full_t when_full) {
    ctx__task_t oldest;
    char *cell;
    int rc = ctx__pool_ready(pool);
    if (CTX__UNLIKELY(rc)) return rc;
    cell = pool->blocked.first ? NULL : ctx__pool_room(pool);
    if (cell) {
        ctx__pool_put(pool, cell, task, parent);
        return 0;
    }
    if (when_full == CTX_REJECT) return CTX_QUEUE_FULL;
    if (when_full == CTX_BLOCK) return ctx__pool_wait_room(pool, parent, task);
    if (when_full == CTX_CALLER_RUNS) return ctx__pool_caller_runs(pool, parent, task);
    oldest.op = NULL;
    rc = ctx__pool_replace(pool, parent, task, &oldest);
    if (!oldest.op) return rc;
    ctx__pool_leave(pool);
    ctx__pool_drop(pool, &oldest, CTX_QUEUE_FULL);
    ctx__lock(&pool->ring.in);
    ctx__wake_all(&pool->waiters);
    return 0;
}

static int ctx__pool_submit(ctx_pool_t *pool, ctx_t *parent, ctx__task_t *task, void *const *args, size_t n,
                            size_t *taken, ctx_when_full_t when_full) {
    bool held = when_full == CTX_CALLER_RUNS;
    size_t done = 0;
    int rc = 0;
    if (taken) *taken = 0;
    if (!pool || !parent || !task->fn || (n && !args)) return CTX_INVALID;
    if (ctx__pool_forked(pool)) return CTX_CLOSED;
    if (!task->op) task->op = "task";
    if (held) CTX__ADD(&pool->refs, 1u, RELAXED);
    ctx__lock(&pool->ring.in);
    for (; done < n && !rc; done += !rc) {
        task->arg = args[done];
        rc = ctx__pool_add(pool, parent, task, when_full);
    }
    ctx__pool_leave(pool);
    if (held) ctx__pool_unref(pool);
    if (taken) *taken = done;
    return rc;
}

CTXCANCEL_API int ctx_pool_submit(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn, void *arg) {
    ctx__task_t task = { fn, arg, op, 0 };
    return ctx__pool_submit(pool, parent, &task, &arg, 1, NULL, pool ? pool->desc.when_full : CTX_REJECT);
}

CTXCANCEL_API int ctx_pool_submit_wait(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn, void *arg) {
    ctx__task_t task = { fn, arg, op, 0 };
    return ctx__pool_submit(pool, parent, &task, &arg, 1, NULL, CTX_BLOCK);
}

CTXCANCEL_API int ctx_pool_submit_batch(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn,
                                        void *const *args, size_t n, size_t *taken) {
    ctx__task_t task = { fn, NULL, op, 0 };
    return ctx__pool_submit(pool, parent, &task, args, n, taken, pool ? pool->desc.when_full : CTX_REJECT);
}

/* Room for more copies: as much again as there is. [in], released meanwhile. */
static CTX__COLD int ctx__copies_make(ctx_pool_t *pool) {
    size_t size = ctx__round_up(pool->desc.copy_max, sizeof(ctx__copy_t)), i;
    size_t n = pool->copies_made ? pool->copies_made : 1 + 2047 / size;
    void *chunk = NULL;
    char *blocks;
    ctx__unlock(&pool->ring.in);
    blocks = (char *)ctx__alloc_lines(CTX__LINE, n * size, &chunk);
    ctx__lock(&pool->ring.in);
    if (!chunk) return CTX_NO_MEMORY;
    memcpy(chunk, &pool->chunks, sizeof pool->chunks);
    pool->chunks = chunk;
    pool->copies_made += n;
    for (i = 0; i < n; i++) {
        ctx__copy_t *copy = (ctx__copy_t *)(void *)(blocks + CTX__LINE + i * size);
        copy->next = pool->copies;
        pool->copies = copy;
    }
    return 0;
}

/* [in], released meanwhile. */
static int ctx__copy_take(ctx_pool_t *pool, ctx__copy_t **copy) {
    while ((*copy = pool->copies) == NULL) {
        int rc;
        pool->copies = CTX__EXCHANGE(&pool->copies_back, (ctx__copy_t *)NULL, ACQUIRE);
        if (pool->copies) continue;
        rc = ctx__copies_make(pool);
        if (rc) return rc;
    }
    pool->copies = (*copy)->next;
    return 0;
}

CTXCANCEL_API int ctx_pool_submit_copy(ctx_pool_t *pool, ctx_t *parent, const char *op, ctx_task_fn fn,
                                       const void *data, size_t size) {
    ctx__task_t task = { fn, NULL, op ? op : "task", CTX__TASK_COPY };
    ctx__copy_t *copy;
    bool held;
    int rc;
    if (!pool || !parent || !fn || size > pool->desc.copy_max || (size && !data)) return CTX_INVALID;
    if (ctx__pool_forked(pool)) return CTX_CLOSED;
    held = pool->desc.when_full == CTX_CALLER_RUNS;
    if (held) CTX__ADD(&pool->refs, 1u, RELAXED);
    ctx__lock(&pool->ring.in);
    rc = ctx__copy_take(pool, &copy);
    if (!rc) {
        task.arg = copy;
        if (size) memcpy(copy, data, size);
        rc = ctx__pool_add(pool, parent, &task, pool->desc.when_full);
        if (rc) {
            copy->next = pool->copies;
            pool->copies = copy;
        }
    }
    ctx__pool_leave(pool);
    if (held) ctx__pool_unref(pool);
    return rc;
}

/* One more worker shall come for what `turns` has. 0, or why none will. */
static int ctx__pool_want(ctx_pool_t *pool, ctx__turns_t *turns) {
    int rc;
    if (ctx__pool_forked(pool)) return CTX_CLOSED;
    ctx__lock(&pool->ring.in);
    rc = ctx__pool_ready(pool);
    if (!rc) {
        if (!turns->wanted++) ctx__queue_add(&pool->agenda, &turns->link);
        CTX__STORE(&pool->turns, pool->turns + 1, RELAXED);
    }
    ctx__pool_leave(pool);
    return rc;
}

/* Take back the turns that have not come. How many will not come any more. */
static int ctx__pool_unwant(ctx_pool_t *pool, ctx__turns_t *turns) {
    int n;
    if (ctx__pool_forked(pool)) return 0;
    ctx__lock(&pool->ring.in);
    n = turns->wanted;
    turns->wanted = 0;
    if (n) ctx__queue_out(&pool->agenda, &turns->link);
    CTX__STORE(&pool->turns, pool->turns - (uint32_t)n, RELAXED);
    if (!ctx__pool_has_work(pool)) ctx__wake_all(&pool->waiters);
    ctx__unlock(&pool->ring.in);
    return n;
}

/* -- a pool's life -- */

/* 0, or the errno of what is wrong. */
static int ctx__pool_defaults(ctx_pool_desc_t *d) {
    ctx__me();
    if (!d->name) d->name = "pool";
    if (!d->workers) d->workers = (int)ctx__cpus;
    if (!d->queue) d->queue = 1024;
    if (d->queue == CTX_NO_QUEUE) d->queue = 0;
    if (!d->grace) d->grace = CTX_MS(100);
    if (!d->copy_max) d->copy_max = 64;
    if (!d->stack_size) d->stack_size = CTXCANCEL_STACK_SIZE;
    if (d->workers < 0 || d->coalesce < 0 || d->task_timeout < 0 || (int)d->when_full < 0 ||
        d->when_full > CTX_DROP_OLDEST)
        return EINVAL;
    if (d->copy_max > SIZE_MAX / 4096) return ENOMEM;
    return d->workers > 1 << 20 || d->queue > SIZE_MAX / 4 / sizeof(ctx__task_t) ? ENOMEM : 0;
}

/* A pool that is not in the tree yet; NULL: no memory. */
static ctx_pool_t *ctx__pool_make(const ctx_pool_desc_t *desc) {
    size_t head = ctx__round_up(sizeof(ctx_pool_t), CTX__LINE);
    size_t workers = ctx__round_up((size_t)desc->workers * sizeof(ctx__worker_t), CTX__LINE);
    size_t capacity = desc->queue + (size_t)desc->workers;
    ctx_pool_t *pool;
    void *raw;
    int i;
    pool = (ctx_pool_t *)ctx__alloc_lines(head + workers, capacity * sizeof(ctx__task_t), &raw);
    if (!pool) return NULL;
    pool->raw = raw;
    pool->all = (ctx__worker_t *)(void *)((char *)pool + head);
    pool->ring.cells = (char *)pool + head + workers;
    pool->ring.size = sizeof(ctx__task_t);
    pool->ring.capacity = capacity;
    pool->desc = *desc;
    pool->forks = ctx__forks;
    pool->refs = 1;
    for (i = 0; i < desc->workers; i++) pool->all[i].pool = pool;
    return pool;
}

CTXCANCEL_API ctx_pool_t *ctx_pool_new(ctx_t *lifetime, const ctx_pool_desc_t *desc) {
    ctx_pool_desc_t d;
    ctx_desc_t node;
    ctx_pool_t *pool;
    memset(&d, 0, sizeof d);
    memset(&node, 0, sizeof node);
    if (desc) d = *desc;
    errno = lifetime ? ctx__pool_defaults(&d) : EINVAL;
    if (errno) return NULL;
    pool = ctx__pool_make(&d);
    errno = ENOMEM;
    if (!pool) return NULL;
    node.name = d.name;
    pool->ctx = ctx_derive_at(lifetime, &node, "ctx_pool_new");
    if (pool->ctx->flags & CTX__F_FAILED) {
        errno = -ctx_err(pool->ctx);
        CTXCANCEL_FREE(pool->raw);
        return NULL;
    }
    ctx__reg_or_run(&pool->on_end, pool->ctx, ctx__pool_ended, pool, CTX__REG_OWN);
    return pool;
}

/* Calls that wait for the pool to settle, and the calls inside tasks that they do not wait for: a drain for no other
   drain, a wait from inside for none of both. A drain waits for waits, which end by themselves; a wait from outside
   waits for all. */
enum { CTX__DRAINS, CTX__WAITS, CTX__CALLS };

typedef struct {
    ctx_pool_t *pool;
    int but; /* calls that are not waited for: those below this number */
} ctx__settle_t;

/* [in] Something runs, and is not in one of those calls. */
static bool ctx__worker_busy(const ctx__worker_t *worker, int but) {
    int i;
    for (i = 0; i < but; i++)
        if (worker->calls[i]) return false;
    return CTX__LOAD(&worker->op, ACQUIRE) || CTX__LOAD(&worker->permit, ACQUIRE);
}

/* [in] Nothing is queued, and nothing runs or is dropped but by those calls. */
static bool ctx__pool_settled(void *arg) {
    const ctx__settle_t *settle = (const ctx__settle_t *)arg;
    const ctx_pool_t *pool = settle->pool;
    const ctx__link_t *link;
    unsigned drops = 0;
    int i;
    if (ctx__pool_has_work(pool)) return false;
    for (i = 0; i < pool->desc.workers; i++)
        if (ctx__worker_busy(&pool->all[i], settle->but)) return false;
    for (link = pool->callers; link; link = link->next)
        if (ctx__worker_busy(CTX__CONTAINER(link, const ctx__worker_t, link), settle->but)) return false;
    for (i = 0; i < settle->but; i++) drops += pool->drop_calls[i];
    return CTX__LOAD(&pool->dropping, ACQUIRE) <= drops;
}

/* [in] The tasks and on_drops of this pool that the calling thread is in begin (1) or end (-1) such a call. Returns
   whether there is one. */
static bool ctx__pool_note_call(ctx_pool_t *pool, int call, int change) {
    ctx__scope_t *scope;
    bool inside = false;
    for (scope = ctx__self.scope; scope; scope = scope->outer) {
        if (scope->owner != pool || (scope->kind != CTX__IN_TASK && scope->kind != CTX__IN_DROP)) continue;
        if (scope->kind == CTX__IN_DROP) pool->drop_calls[call] += (unsigned)change;
        else CTX__CONTAINER(scope, ctx__worker_t, scope)->calls[call] += (unsigned)change;
        inside = true;
    }
    return inside;
}

CTXCANCEL_API int ctx_pool_wait(ctx_pool_t *pool, ctx_t *ctx) {
    ctx__settle_t settle;
    int rc;
    if (!pool || !ctx) return CTX_INVALID;
    if (ctx__pool_forked(pool)) return CTX_CLOSED;
    rc = ctx_err(ctx);
    if (rc) return rc;
    settle.pool = pool;
    ctx__lock(&pool->ring.in);
    settle.but = ctx__pool_note_call(pool, CTX__WAITS, 1) ? CTX__CALLS : 0;
    rc = ctx__await(&pool->ring.in, &pool->waiters, ctx__pool_settled, &settle, ctx, CTX_NO_DEADLINE);
    ctx__pool_note_call(pool, CTX__WAITS, -1);
    ctx__unlock(&pool->ring.in);
    return rc;
}

/* [in] */
static void ctx__worker_report(const ctx__worker_t *worker, ctx_drain_report_t *report, size_t *names) {
    const char *op = CTX__LOAD(&worker->op, ACQUIRE);
    report->completed += CTX__LOAD(&worker->done[0], ACQUIRE);
    report->failed += CTX__LOAD(&worker->done[1], ACQUIRE);
    report->canceled += CTX__LOAD(&worker->done[2], ACQUIRE);
    if (op && *names < CTX_DRAIN_OPS) report->running[(*names)++] = op;
    if (op && CTX__LOAD(&worker->turns, RELAXED)) report->stuck++;
}

/* [in] */
static void ctx__pool_report(ctx_pool_t *pool, ctx_drain_report_t *report) {
    const ctx__link_t *link;
    size_t names = 0;
    int i;
    report->completed = pool->done[0];
    report->failed = pool->done[1];
    report->canceled = pool->done[2];
    for (i = 0; i < pool->desc.workers; i++) ctx__worker_report(&pool->all[i], report, &names);
    for (link = pool->callers; link; link = link->next)
        ctx__worker_report(CTX__CONTAINER(link, const ctx__worker_t, link), report, &names);
    report->dropped = CTX__LOAD(&pool->dropped, ACQUIRE);
    report->stuck += pool->ring.tail + pool->by_callers - report->completed - report->failed - report->canceled -
                     report->dropped;
    while (names > report->stuck) report->running[--names] = NULL; /* ended between the two looks */
}

/* [in], released meanwhile. The budget has passed, or the lifetime has ended: cancel what is left, and give it the
   grace period. */
static CTX__COLD void ctx__pool_cut(ctx__settle_t *settle, ctx_time_t cut_at, ctx_dur_t grace) {
    ctx_pool_t *pool = settle->pool;
    bool ended = ctx_err(pool->ctx->parent) != 0;
    pool->cut = pool->cut || !ended;
    ctx__unlock(&pool->ring.in);
    ctx__cancel(pool->ctx, ctx__reason(CTX_DEADLINE_EXCEEDED, "pool drained", "ctx_pool_drain"), false);
    ctx__pool_empty_out(pool);
    ctx__lock(&pool->ring.in);
    if (ctx__await(&pool->ring.in, &pool->waiters, ctx__pool_settled, settle, &ctx__root,
                   ctx_time_add(cut_at, grace > 0 ? grace : 0)))
        pool->cut = true;
}

static int ctx__pool_drain(ctx_pool_t *pool, ctx_dur_t budget, ctx_dur_t grace, ctx_drain_report_t *report) {
    ctx_time_t start = ctx_now(), cut_at;
    ctx__settle_t settle;
    ctx_drain_report_t r;
    int rc;
    memset(&r, 0, sizeof r);
    settle.pool = pool;
    settle.but = CTX__DRAINS + 1;
    ctx__lock(&pool->ring.in);
    CTX__STORE(&pool->closed, true, RELEASE);
    ctx__pool_note_call(pool, CTX__DRAINS, 1);
    ctx__wake_all(&pool->blocked);
    ctx__wake_all(&pool->waiters);
    ctx__pool_leave(pool); /* tasks gather no longer */
    ctx__lock(&pool->ring.in);
    rc = ctx__await(&pool->ring.in, &pool->waiters, ctx__pool_settled, &settle, pool->ctx->parent,
                    ctx_time_add(start, budget > 0 ? budget : 0));
    cut_at = ctx_now();
    r.wait_time = cut_at - start;
    if (rc) ctx__pool_cut(&settle, cut_at, grace);
    if (rc) r.grace_time = ctx_now() - cut_at;
    if (report || ctx__tally()) ctx__pool_report(pool, &r);
    ctx__tally_add(r.dropped - pool->tallied, r.stuck);
    if (ctx__tally()) pool->tallied = r.dropped;
    ctx__pool_note_call(pool, CTX__DRAINS, -1);
    rc = pool->cut ? CTX_DEADLINE_EXCEEDED : 0;
    ctx__pool_leave(pool);
    if (report) *report = r;
    return rc;
}

CTXCANCEL_API int ctx_pool_drain(ctx_pool_t *pool, ctx_dur_t budget, ctx_drain_report_t *report) {
    if (report) memset(report, 0, sizeof *report);
    if (!pool) return CTX_INVALID;
    if (ctx__pool_forked(pool)) return CTX_CLOSED;
    return ctx__pool_drain(pool, budget, pool->desc.grace, report);
}

/* Let go of a worker's thread: one that still runs a task is left behind, without its permit. */
static void ctx__worker_dismiss(ctx__worker_t *worker) {
    const ctx__scope_t *scope = ctx__self.scope;
    if (worker->state != CTX__WORKER_STARTED) return;
    while (scope && scope != &worker->scope) scope = scope->outer;
    if (scope || CTX__LOAD(&worker->op, ACQUIRE)) {
        ctx__worker_permit_return(worker);
        pthread_detach(worker->thread);
    } else {
        ctx__thread_join(worker->thread);
    }
}

CTXCANCEL_API void ctx_pool_free(ctx_pool_t *pool) {
    ctx__link_t *link;
    int i;
    if (!pool) return;
    if (ctx__pool_forked(pool)) { /* its threads and its tasks are the parent process's */
        ctx_on_done_stop(&pool->on_end);
        ctx_end_at(pool->ctx, NULL);
        ctx__pool_free_memory(pool);
        return;
    }
    ctx__pool_drain(pool, 0, 0, NULL);
    ctx_cancel_at(pool->ctx, NULL);
    ctx_on_done_stop(&pool->on_end);
    ctx__lock(&pool->ring.in);
    pool->quit = true;
    ctx__await(&pool->ring.in, &pool->waiters, ctx__pool_none_starts, pool, &ctx__root, CTX_NO_DEADLINE);
    for (link = pool->idle; link; link = link->next) ctx__unpark(&CTX__CONTAINER(link, ctx__worker_t, link)->parker);
    for (link = pool->callers; link; link = link->next)
        ctx__worker_permit_return(CTX__CONTAINER(link, ctx__worker_t, link));
    ctx__unlock(&pool->ring.in);
    for (i = 0; i < pool->desc.workers; i++) ctx__worker_dismiss(&pool->all[i]);
    ctx__pool_unref(pool);
}

CTXCANCEL_API size_t ctx_pool_queue_for_burst(double peak_per_s, double drain_per_s, double seconds) {
    double n = (peak_per_s - drain_per_s) * seconds;
    size_t whole;
    if (!(n > 1)) return 1;
    if (n >= (double)(SIZE_MAX / 2)) return SIZE_MAX / 2;
    whole = (size_t)n;
    return (double)whole < n ? whole + 1 : whole;
}

/* == 10. group ==================================================== */

/* Runners are threads that are used again. A job is put into an idle runner, the last that became idle; without one a
   new thread is made. So each job has a thread of its own, and jobs may wait for each other. But a runner that is done
   with its job takes the next one out of whatever runner has it and has not begun, which is idle again then: where jobs
   are over sooner than a wake-up takes, few threads do all the work and the others sleep on.

   While a job has not begun, somebody is on the way: `woken` counts the runners that were woken and have not looked
   yet, and is not 0 while there is a loaded one. Who puts the first job in wakes its runner; who takes one out and
   leaves others, with nobody on the way, wakes the next before it runs its own. So no job waits for another to end. An
   idle runner looks for a moment before it sleeps, and ends after CTX__RUNNER_IDLE. Work of ctx_go() is counted under
   the same lock.

   A group on threads hands each task to a runner. A group on a pool keeps its tasks in a queue of its own, and wants
   turns of the pool (section 9), at most as many as can run at once; a turn runs the group's tasks one after the other
   until there are none. While a task is queued, a turn is wanted or at work, or the owner waits and runs it itself: a
   turn finds the queue empty, and stops being one, under the lock under which tasks are queued. A thread that waits,
   for room or for the end, takes tasks from that queue too: so groups of groups never lock up, however small the pool.

   One thread at a time calls on_error: `telling` is that thread. What fails meanwhile is queued in `untold`, and the
   thread that tells takes it out under `mu` before it stops. It is a thread that runs or adds a task, so all is told
   before the last task has returned. No other thread waits for on_error, unless it has no memory for its place in that
   queue; then its task does not count against the limit, as on_error may wait for room.

   A task that waits in ctx_group_go() does not count against the limit: while all tasks wait to add others, one of them
   can. The group lives until its owner has waited and its last turn has come back or was taken back. */

#define CTX__RUNNER_IDLE CTX_S(10)    /* of real time */
#define CTX__RUNNER_SETTLE CTX_MS(20) /* how long the end of the runtime waits for one to become idle */

static const char ctx__runner_name[] = "ctx-runner"; /* of one that is idle, or whose work has no name */

enum { CTX__TURN_TASKS = 32 }; /* that a turn runs before it queues up again behind the pool's other work */

typedef struct ctx__job {
    void (*run)(const struct ctx__job *job);
    void *owner; /* for run; the rest likewise */
    ctx_t *ctx;
    ctx_task_fn fn;
    void *arg;
    const char *name; /* of the work, which the thread bears meanwhile; static (NULL: none) */
} ctx__job_t;

typedef struct ctx__runner {
    ctx__link_t link; /* [mu] among the idle or the loaded */
    ctx__job_t job;   /* [mu while idle or loaded, else owner thread] */
    bool idle;        /* [mu] */
    bool loaded;      /* [mu] has a job that nobody has begun */
    bool woken;       /* [mu] was woken and has not looked */
    bool ends;        /* [mu] has been told to end */
    const char *name; /* [owner thread] the thread's */
    pthread_t thread; /* [const] before it is first idle */
    ctx__parker_t parker;
} ctx__runner_t;

static struct {
    uint32_t mu;
    ctx__link_t *idle;    /* [mu] the last to come first */
    ctx__queue_t loaded;  /* [mu] the first to come first */
    unsigned threads;     /* [mu] how many there are, ... */
    unsigned idlers;      /* [mu] ... how many of them are idle, ... */
    unsigned woken;       /* [mu] ... and how many on the way */
    size_t going;         /* [mu] work of ctx_go() */
    size_t waiting;       /* [mu] of that, inside ctx_go_wait() */
    uint64_t emptied;     /* [mu] how often no other work was left */
    ctx__queue_t waiters; /* [mu] in ctx_go_wait() */
} ctx__runners;

/* Work of ctx_go(), on the stack of the runner that does it. */
typedef struct {
    ctx__scope_t scope;
    bool waits; /* [mu of the runners] it is inside ctx_go_wait() */
} ctx__work_t;

static void ctx__go_work(const ctx__job_t *job) {
    ctx__work_t work;
    work.waits = false;
    ctx__scope_enter(&work.scope, CTX__IN_GO, NULL);
    job->fn(job->ctx, job->arg);
    ctx__scope_leave(&work.scope);
    ctx_end_at(job->ctx, NULL);
}

static ctx__work_t *ctx__work_here(void) {
    ctx__scope_t *scope = ctx__scope_of(CTX__IN_GO, NULL);
    return scope ? CTX__CONTAINER(scope, ctx__work_t, scope) : NULL;
}

/* [mu] `n` have returned. If none is left, the threads that wait are through, also if there is work again when they
   have come to see. */
static void ctx__go_left(size_t n) {
    ctx__runners.going -= n;
    if (ctx__runners.going > ctx__runners.waiting) return;
    ctx__runners.emptied++;
    ctx__wake_all(&ctx__runners.waiters);
}

/* [mu] Out of where it stands. */
static void ctx__runner_unlink(ctx__runner_t *runner) {
    if (runner->loaded) ctx__queue_out(&ctx__runners.loaded, &runner->link);
    else ctx__link_out(&runner->link);
    ctx__runners.idlers -= runner->idle;
    runner->idle = runner->loaded = false;
}

/* [mu] */
static void ctx__runner_set_idle(ctx__runner_t *runner) {
    ctx__runners.idlers++;
    runner->job.run = NULL;
    runner->idle = true;
    ctx__link_in(&ctx__runners.idle, &runner->link);
}

/* [mu] To be unparked once `mu` is free: NULL if it is on the way already. */
static ctx__runner_t *ctx__runner_wake(ctx__runner_t *runner) {
    if (runner->woken) return NULL;
    runner->woken = true;
    ctx__runners.woken++;
    return runner;
}

/* [mu] If there is a job that nobody has begun and nobody is on the way, somebody who is to be unparked for it. */
static ctx__runner_t *ctx__runner_pass_on(void) {
    if (!ctx__runners.loaded.first || ctx__runners.woken) return NULL;
    return ctx__runner_wake(CTX__CONTAINER(ctx__runners.loaded.first, ctx__runner_t, link));
}

/* [mu] Take a job that nobody has begun, its own or else the first. True: there was one. */
static bool ctx__runner_take(ctx__runner_t *runner) {
    ctx__runner_t *from = runner;
    if (!runner->loaded && !ctx__runners.loaded.first) return false;
    if (!runner->loaded) from = CTX__CONTAINER(ctx__runners.loaded.first, ctx__runner_t, link);
    ctx__runner_unlink(from);
    if (runner->idle) ctx__runner_unlink(runner);
    if (from == runner) return true;
    runner->job = from->job;
    ctx__runner_set_idle(from);
    return true;
}

/* [mu] A look after sleeping. True: it goes on, to a job or to its end. */
static bool ctx__runner_look(ctx__runner_t *runner) {
    ctx__runners.woken -= runner->woken;
    runner->woken = false;
    return runner->ends || ctx__runner_take(runner);
}

/* A thread bears the name of its work. Each change is a call of the system, so an idle one gets back its own name only
   when it has slept for a moment: a stream of work of one name changes nothing. */
static void ctx__runner_named(ctx__runner_t *runner, const char *name) {
    if (runner->name == name) return;
    runner->name = name;
    ctx__thread_name(name);
}

/* Sleep until it is unparked. False: it has been idle for long. */
static bool ctx__runner_park(ctx__runner_t *runner) {
    if (runner->name != ctx__runner_name) {
        if (ctx__park_real(&runner->parker, ctx__clock_read() + CTX__RUNNER_SETTLE)) return true;
        ctx__runner_named(runner, ctx__runner_name);
    }
    return ctx__park_real(&runner->parker, ctx__clock_read() + CTX__RUNNER_IDLE);
}

/* Idle: sleep until there is a job for this runner. False: it has been idle for long, and ends. */
static bool ctx__runner_rest(ctx__runner_t *runner) {
    bool told = ctx__look_out(ctx__parker_is_set, &runner->parker, CTX_NO_DEADLINE), on, retire;
    do {
        ctx__runner_t *wake;
        told = told || ctx__runner_park(runner);
        ctx__enter(&ctx__runners.mu);
        if (!told && runner->woken) { /* just now */
            ctx__leave(&ctx__runners.mu);
            told = ctx__park_real(&runner->parker, CTX_NO_DEADLINE);
            ctx__enter(&ctx__runners.mu);
        }
        if (told) ctx__parker_reset(&runner->parker);
        on = ctx__runner_look(runner);
        wake = ctx__runner_pass_on();
        retire = !on && !told;
        ctx__runners.threads -= retire;
        if (retire) ctx__runner_unlink(runner);
        ctx__leave(&ctx__runners.mu);
        if (wake) ctx__unpark(&wake->parker);
        told = false;
    } while (!on && !retire);
    if (retire) pthread_detach(runner->thread);
    return on;
}

/* The job is done: the next, or become idle. False: end, and nobody will join the thread. */
static bool ctx__runner_next(ctx__runner_t *runner) {
    ctx__runner_t *wake;
    bool took;
    ctx__enter(&ctx__runners.mu);
    if (runner->job.run == ctx__go_work) ctx__go_left(1);
    took = ctx__runner_take(runner);
    if (!took) ctx__runner_set_idle(runner);
    wake = ctx__runner_pass_on();
    ctx__leave(&ctx__runners.mu);
    if (wake) ctx__unpark(&wake->parker);
    return took || ctx__runner_rest(runner);
}

static void *ctx__runner_main(void *arg) {
    ctx__runner_t *runner = (ctx__runner_t *)arg;
    ctx__member_begin()->runner = runner;
    runner->thread = pthread_self();
    do {
        const char *name = runner->job.name;
        ctx__runner_named(runner, name && name != ctx__root.name ? name : ctx__runner_name);
        runner->job.run(&runner->job);
        if (!ctx__runner_next(runner)) {
            CTXCANCEL_FREE(runner);
            return NULL;
        }
    } while (!runner->ends);
    return NULL; /* told to end: who did so joins the thread and frees the runner */
}

static CTX__COLD int ctx__runner_start(const ctx__job_t *job) {
    ctx__runner_t *runner = (ctx__runner_t *)ctx__alloc(sizeof *runner);
    pthread_t thread;
    if (!runner) return CTX_NO_MEMORY;
    runner->job = *job;
    if (!ctx__member_start(&thread, ctx__runner_main, runner, CTXCANCEL_STACK_SIZE)) return 0;
    CTXCANCEL_FREE(runner);
    return CTX_NO_MEMORY;
}

/* Run a job on a thread of its own. 0, or CTX_NO_MEMORY. */
static int ctx__run(const ctx__job_t *job) {
    bool counted = job->run == ctx__go_work;
    ctx__runner_t *runner = NULL, *wake = NULL;
    int rc;
    ctx__me();
    ctx__enter(&ctx__runners.mu);
    ctx__runners.going += counted;
    if (ctx__runners.idle) {
        runner = CTX__CONTAINER(ctx__runners.idle, ctx__runner_t, link);
        ctx__runner_unlink(runner);
        runner->job = *job;
        runner->loaded = true;
        ctx__queue_add(&ctx__runners.loaded, &runner->link);
    }
    ctx__runners.threads += !runner;
    /* One that has not gone to sleep yet is woken for nothing. */
    if (runner && (!ctx__runners.woken || !(CTX__LOAD(&runner->parker.state, RELAXED) & CTX__PARKED)))
        wake = ctx__runner_wake(runner);
    ctx__leave(&ctx__runners.mu);
    if (wake) ctx__unpark(&wake->parker);
    if (runner) return 0;
    rc = ctx__runner_start(job);
    if (!rc) return 0;
    ctx__enter(&ctx__runners.mu);
    ctx__runners.threads--;
    if (counted) ctx__go_left(1);
    ctx__leave(&ctx__runners.mu);
    return rc;
}

/* End the idle threads. By ctx_runtime_stop(). Those whose job is over are idle in a moment; whether one is still at
   work cannot be told, so the wait for them is short. */
static void ctx__runners_stop(void) {
    ctx_time_t until = ctx__clock_read() + CTX__RUNNER_SETTLE;
    ctx__link_t *link, *all, *next;
    unsigned turn = 0;
    ctx__enter(&ctx__runners.mu);
    while (ctx__runners.threads > ctx__runners.idlers && ctx__clock_read() < until) {
        ctx__leave(&ctx__runners.mu);
        ctx__relax(&turn);
        ctx__enter(&ctx__runners.mu);
    }
    all = ctx__runners.idle;
    ctx__runners.idle = NULL;
    ctx__runners.idlers = 0;
    for (link = all; link; link = link->next) {
        ctx__runner_t *runner = CTX__CONTAINER(link, ctx__runner_t, link);
        runner->idle = false;
        runner->ends = true;
        ctx__runners.threads--;
        ctx__runner_wake(runner);
    }
    ctx__leave(&ctx__runners.mu);
    for (link = all; link; link = next) {
        ctx__runner_t *runner = CTX__CONTAINER(link, ctx__runner_t, link);
        next = link->next;
        ctx__unpark(&runner->parker);
        ctx__thread_join(runner->thread);
        CTXCANCEL_FREE(runner);
    }
}

static void ctx__runners_free(ctx__link_t *link) {
    while (link) {
        ctx__runner_t *runner = CTX__CONTAINER(link, ctx__runner_t, link);
        link = link->next;
        CTXCANCEL_FREE(runner);
    }
}

/* In the child of a fork: the threads are the parent's, and so are their jobs; this one may be a runner itself. */
static void ctx__runners_forget(void) {
    ctx__runner_t *self = (ctx__runner_t *)ctx__self.runner;
    ctx__work_t *work = ctx__work_here();
    ctx__runners_free(ctx__runners.idle);
    ctx__runners_free(ctx__runners.loaded.first);
    ctx__runners.idle = ctx__runners.loaded.first = NULL;
    ctx__runners.idlers = ctx__runners.woken = 0;
    ctx__runners.threads = self != NULL;
    ctx__runners.going = work != NULL;
    ctx__runners.waiting = work && work->waits;
    ctx__runners.waiters.first = NULL;
}

CTXCANCEL_API int ctx_go(ctx_t *ctx, const char *name, ctx_task_fn fn, void *arg) {
    ctx__make_t make = ctx__make_plain;
    ctx__job_t job = { ctx__go_work, NULL, NULL, fn, arg, name };
    int rc;
    if (!ctx || !fn) return CTX_INVALID;
    rc = ctx_err(ctx);
    if (rc) return rc;
    make.name = name;
    make.site = "ctx_go";
    job.ctx = ctx__make(ctx, NULL, &make);
    if (job.ctx->flags & CTX__F_FAILED) return ctx_err(job.ctx);
    rc = ctx__run(&job);
    if (rc) ctx_end_at(job.ctx, NULL);
    return rc;
}

CTXCANCEL_API size_t ctx_go_count(void) {
    size_t n;
    ctx__enter(&ctx__runners.mu);
    n = ctx__runners.going;
    ctx__leave(&ctx__runners.mu);
    return n;
}

static bool ctx__go_over(void *emptied) {
    return ctx__runners.going <= ctx__runners.waiting || ctx__runners.emptied != *(uint64_t *)emptied;
}

CTXCANCEL_API int ctx_go_wait(ctx_t *ctx) {
    ctx__work_t *work = ctx__work_here();
    uint64_t emptied;
    int rc;
    if (!ctx) return CTX_INVALID;
    rc = ctx_err(ctx);
    if (rc) return rc;
    if (work && work->waits) work = NULL;
    ctx__enter(&ctx__runners.mu);
    if (work) {
        work->waits = true;
        ctx__runners.waiting++;
        ctx__go_left(0);
    }
    emptied = ctx__runners.emptied;
    rc = ctx__await(&ctx__runners.mu, &ctx__runners.waiters, ctx__go_over, &emptied, ctx, CTX_NO_DEADLINE);
    if (work) {
        work->waits = false;
        ctx__runners.waiting--;
    }
    ctx__leave(&ctx__runners.mu);
    return rc;
}

/* -- groups -- */

typedef struct {
    ctx__link_t link; /* [mu] in the queue, or among the spare */
    uint64_t number;  /* [mu] which task it holds; 0: none that is queued */
    ctx_task_fn fn;
    void *arg;
} ctx__cell_t;

struct ctx_group {
    ctx_t *ctx;           /* [const] */
    ctx_pool_t *pool;     /* [const] */
    size_t limit;         /* [const] */
    int most_turns;       /* [const] */
    bool keep_going;      /* [const] */
    void (*on_error)(void *arg, int rc, void *user); /* [const] */
    void *user;           /* [const] */
    uint32_t refs;        /* [atomic] its owner, each turn that is wanted or at work */
    uint32_t mu;
    int rc;               /* [mu] of the first task that failed or was refused */
    bool failed;          /* [mu] a failure has canceled the others */
    size_t live;          /* [mu] tasks taken that have not returned, ... */
    size_t adding;        /* [mu] ... and of these, in ctx_group_go() or waiting for on_error */
    bool awaited;         /* [mu] its owner waits, and runs what is queued */
    bool spread;          /* [mu] tasks wait for each other: each that is queued gets a thread */
    int active;           /* [mu] turns wanted or at work; less for a moment, never more */
    uint64_t taken;       /* [mu] tasks ever queued */
    ctx__turns_t turns;   /* what the pool comes for */
    ctx__queue_t queue;   /* [mu] tasks that no thread has begun */
    ctx__link_t *spare;   /* [mu] */
    ctx__queue_t at_limit, at_end; /* [mu] */
    const void *telling;  /* [mu] the thread that calls on_error; NULL: none */
    ctx__queue_t untold;  /* [mu] of ctx__error_t */
    ctx__queue_t at_told; /* [mu] */
};

/* What on_error has not heard of. */
typedef struct {
    ctx__link_t link; /* [mu] */
    void *arg;        /* [const] */
    int rc;           /* [const] */
    bool kept;        /* [const] it is a block of its own; else its thread waits until it is told */
    bool told;        /* [mu] */
} ctx__error_t;

static void ctx__group_unref(ctx_group_t *group, int n) {
    ctx__link_t *link, *next;
    if (CTX__SUB(&group->refs, (uint32_t)n, ACQ_REL) != (uint32_t)n) return;
    for (link = group->spare; link; link = next) {
        next = link->next;
        CTXCANCEL_FREE(CTX__CONTAINER(link, ctx__cell_t, link));
    }
    CTXCANCEL_FREE(group);
}

/* [mu] Whoever waits has something to do, or to see. */
static void ctx__group_wake(ctx_group_t *group) {
    ctx__wake_all(&group->at_limit);
    ctx__wake_all(&group->at_end);
}

/* [mu] */
static void ctx__group_left(ctx_group_t *group) {
    group->live--;
    ctx__wake_all(&group->at_limit);
    if (!group->live) ctx__wake_all(&group->at_end);
}

/* [mu], released meanwhile. Call on_error for `error`, and then for all that was queued by the time it returned. */
static void ctx__group_tell_all(ctx_group_t *group, ctx__error_t *error) {
    group->telling = &ctx__self;
    for (;;) {
        bool kept = error->kept;
        ctx__unlock(&group->mu);
        group->on_error(error->arg, error->rc, group->user);
        if (kept) CTXCANCEL_FREE(error);
        ctx__lock(&group->mu);
        if (!kept) error->told = true;
        ctx__wake_all(&group->at_told);
        if (!group->untold.first) break;
        error = CTX__CONTAINER(group->untold.first, ctx__error_t, link);
        ctx__queue_out(&group->untold, &error->link);
    }
    group->telling = NULL;
}

static bool ctx__group_told(void *error) { return ((const ctx__error_t *)error)->told; }

/* [mu], released meanwhile. Without memory: wait until the thread that calls on_error has told it. A call waits for
   nothing that it causes itself. */
static void ctx__group_tell_waiting(ctx_group_t *group, ctx__error_t *error) {
    bool task = ctx__scope_of(CTX__IN_GROUP, group) != NULL;
    if (group->telling == &ctx__self) return;
    group->adding += task;
    ctx__queue_add(&group->untold, &error->link);
    ctx__wake_all(&group->at_limit);
    ctx__await(&group->mu, &group->at_told, ctx__group_told, error, &ctx__root, CTX_NO_DEADLINE);
    group->adding -= task;
}

/* [mu], released meanwhile. Have on_error hear of an error. */
static void ctx__group_tell(ctx_group_t *group, void *arg, int rc) {
    ctx__error_t here, *kept = NULL;
    memset(&here, 0, sizeof here);
    here.arg = arg;
    here.rc = rc;
    if (group->telling) {
        ctx__unlock(&group->mu);
        kept = (ctx__error_t *)CTXCANCEL_MALLOC(sizeof *kept);
        if (kept) *kept = here;
        if (kept) kept->kept = true;
        ctx__lock(&group->mu);
    }
    if (!group->telling) ctx__group_tell_all(group, kept ? kept : &here);
    else if (kept) ctx__queue_add(&group->untold, &kept->link);
    else ctx__group_tell_waiting(group, &here);
}

/* A task has failed, or was refused: the first is the result. A failure stops the others. After a refusal those that
   were accepted go on: the caller has heard of it, and may stop them. */
static CTX__COLD void ctx__group_failed(ctx_group_t *group, void *arg, int rc, bool refused) {
    bool first, stop = !group->keep_going && !refused;
    ctx__lock(&group->mu);
    first = group->rc == 0;
    if (first) group->rc = rc;
    stop = stop && !group->failed;
    if (stop) group->failed = true;
    ctx__unlock(&group->mu);
    if (stop) ctx_cancel_cause_at(group->ctx, rc, NULL, "ctx_group_go");
    if (!group->on_error) return;
    ctx__lock(&group->mu);
    ctx__group_tell(group, arg, rc);
    ctx__unlock(&group->mu);
}

/* Run a task. [mu], released meanwhile. */
static void ctx__group_run(ctx_group_t *group, ctx_task_fn fn, void *arg) {
    ctx__scope_t scope;
    int rc;
    ctx__unlock(&group->mu);
    ctx__scope_enter(&scope, CTX__IN_GROUP, group);
    rc = fn(group->ctx, arg);
    if (CTX__UNLIKELY(rc)) ctx__group_failed(group, arg, rc, false);
    ctx__scope_leave(&scope);
    ctx__lock(&group->mu);
    ctx__group_left(group);
}

/* [mu] Its cell may be used again at once. */
static void ctx__group_unqueue(ctx_group_t *group, ctx__cell_t *cell) {
    ctx__queue_out(&group->queue, &cell->link);
    ctx__link_in(&group->spare, &cell->link);
    cell->number = 0;
}

/* [mu], released meanwhile. Run the task that was queued first, or last. True if there was one. */
static bool ctx__group_run_one(ctx_group_t *group, bool last) {
    ctx__link_t *link = group->queue.first;
    ctx__cell_t *cell;
    if (!link) return false;
    if (last) link = CTX__CONTAINER(group->queue.end, ctx__link_t, next);
    cell = CTX__CONTAINER(link, ctx__cell_t, link);
    ctx__group_unqueue(group, cell);
    ctx__group_run(group, cell->fn, cell->arg);
    return true;
}

static bool ctx__group_run_next(ctx_group_t *group) { return ctx__group_run_one(group, false); }

/* For a thread that waits to add: what it runs may have to wait to add too, and runs others on the same stack. The
   newest task is the lowest in a tree of tasks, so the stack gets as deep as that tree; with the oldest it would get as
   deep as the queue is long. */
static bool ctx__group_run_last(ctx_group_t *group) { return ctx__group_run_one(group, true); }

/* A turn. */
static void ctx__group_come(ctx__turns_t *turns, bool lost) {
    ctx_group_t *group = CTX__CONTAINER(turns, ctx_group_t, turns);
    int ran = 0;
    ctx__lock(&group->mu);
    while (!lost && ctx__group_run_next(group)) {
        if (++ran % CTX__TURN_TASKS || !group->queue.first) continue;
        ctx__unlock(&group->mu);
        if (!ctx__pool_want(group->pool, turns)) return; /* that one goes on in the place of this */
        ctx__lock(&group->mu);
    }
    group->active--;
    ctx__unlock(&group->mu);
    ctx__group_unref(group, 1);
}

static void ctx__group_thread_run(const ctx__job_t *job) {
    ctx_group_t *group = (ctx_group_t *)job->owner;
    ctx__lock(&group->mu);
    ctx__group_run(group, job->fn, job->arg);
    ctx__unlock(&group->mu);
}

/* A queued task of a group whose tasks wait for each other. */
static void ctx__group_spread_run(const ctx__job_t *job) {
    ctx_group_t *group = (ctx_group_t *)job->owner;
    ctx__lock(&group->mu);
    ctx__group_run_next(group);
    ctx__unlock(&group->mu);
    ctx__group_unref(group, 1);
}

static void ctx__group_spread_one(ctx_group_t *group) {
    const ctx__job_t job = { ctx__group_spread_run, group, NULL, NULL, NULL, group->ctx->name };
    CTX__ADD(&group->refs, 1u, RELAXED);
    if (ctx__run(&job)) CTX__SUB(&group->refs, 1u, RELAXED); /* no thread: a turn will come. The caller's is left */
}

/* The calling task is one that waits for other tasks of its group, such as a stage. If that is on a pool, which may
   have too few workers for all of them, give those that are queued, now or later, threads beside the pool. */
static void ctx__group_spread(void) {
    ctx__scope_t *scope = ctx__scope_of(CTX__IN_GROUP, NULL);
    ctx_group_t *group = scope ? (ctx_group_t *)(uintptr_t)scope->owner : NULL;
    const ctx__link_t *link;
    size_t n = 0;
    if (!group || !group->pool) return;
    ctx__lock(&group->mu);
    if (!group->spread)
        for (link = group->queue.first; link; link = link->next) n++;
    group->spread = true;
    ctx__unlock(&group->mu);
    while (n-- > 0) ctx__group_spread_one(group);
}

CTXCANCEL_API ctx_group_t *ctx_group_new(ctx_t *parent, const ctx_group_desc_t *desc) {
    static const ctx_group_desc_t plain = { NULL, NULL, 0, false, NULL, NULL };
    ctx__make_t make = ctx__make_plain;
    ctx_group_t *group;
    if (!desc) desc = &plain;
    errno = EINVAL;
    if (!parent || desc->limit < 0 || (desc->pool && ctx__pool_forked(desc->pool))) return NULL;
    errno = ENOMEM;
    group = (ctx_group_t *)ctx__alloc(sizeof *group);
    if (!group) return NULL;
    make.name = desc->name;
    make.site = "ctx_group_new";
    group->ctx = desc->pool ? ctx_merge_at(parent, desc->pool->ctx, make.site) : ctx__make(parent, NULL, &make);
    if (group->ctx->flags & CTX__F_FAILED) {
        errno = -ctx_err(group->ctx);
        CTXCANCEL_FREE(group);
        return NULL;
    }
    if (desc->name) group->ctx->name = desc->name;
    group->pool = desc->pool;
    group->keep_going = desc->keep_going;
    group->on_error = desc->on_error;
    group->user = desc->user;
    group->limit = desc->limit ? (size_t)desc->limit : SIZE_MAX;
    if (group->pool) group->most_turns = group->pool->desc.workers;
    if (group->pool && !desc->limit) group->limit = group->pool->desc.queue;
    if (!group->limit) group->limit = (size_t)group->most_turns; /* the pool has no queue */
    if ((size_t)group->most_turns > group->limit) group->most_turns = (int)group->limit;
    group->turns.come = ctx__group_come;
    group->turns.op = desc->name ? desc->name : "group";
    group->refs = 1;
    return group;
}

CTXCANCEL_API ctx_t *ctx_group_ctx(ctx_group_t *group) {
    CTXCANCEL_ASSERT(ctx__set(group));
    return group->ctx;
}

/* [mu] */
static int ctx__group_refuses(const ctx_group_t *group) {
    int err = ctx_err(group->ctx);
    return !err && group->pool && CTX__LOAD(&group->pool->closed, ACQUIRE) ? CTX_CLOSED : err;
}

/* [mu] */
static bool ctx__group_has_room(const ctx_group_t *group) { return group->live - group->adding < group->limit; }

static bool ctx__group_may_go(void *arg) {
    const ctx_group_t *group = (const ctx_group_t *)arg;
    return ctx__group_has_room(group) || group->queue.first || ctx__group_refuses(group);
}

/* Get a place below the limit, helping out while there is none. [mu], released meanwhile. 0, or why there is none. */
static int ctx__group_enter(ctx_group_t *group, bool wait) {
    bool task = wait && ctx__scope_of(CTX__IN_GROUP, group);
    int rc;
    group->adding += task; /* the room that this makes it takes itself */
    while ((rc = ctx__group_refuses(group)) == 0 && !ctx__group_has_room(group)) {
        if (!wait) return CTX_QUEUE_FULL;
        if (!ctx__group_run_last(group))
            ctx__await(&group->mu, &group->at_limit, ctx__group_may_go, group, group->ctx, CTX_NO_DEADLINE);
    }
    group->adding -= task;
    if (!rc) group->live++;
    return rc;
}

static int ctx__group_go_thread(ctx_group_t *group, ctx_task_fn fn, void *arg) {
    const ctx__job_t job = { ctx__group_thread_run, group, NULL, fn, arg, group->ctx->name };
    int rc = ctx__run(&job);
    if (!rc) return 0;
    ctx__lock(&group->mu);
    ctx__group_left(group);
    ctx__unlock(&group->mu);
    return rc;
}

/* Queue a task, for which there is a place, and see to it that somebody comes for it. [mu], released here. */
static int ctx__group_go_pool(ctx_group_t *group, ctx__cell_t *cell) {
    bool want = group->active < group->most_turns, spread = group->spread;
    uint64_t number = ++group->taken;
    int rc;
    cell->number = number;
    ctx__queue_add(&group->queue, &cell->link);
    ctx__group_wake(group);
    if (want) CTX__ADD(&group->refs, 1u, RELAXED);
    ctx__unlock(&group->mu);
    if (spread) ctx__group_spread_one(group);
    if (!want) return 0;
    rc = ctx__pool_want(group->pool, &group->turns);
    ctx__lock(&group->mu);
    group->active += !rc;
    if (rc && (group->active > 0 || group->awaited || cell->number != number)) {
        rc = 0; /* somebody has come, or will */
    } else if (rc) {
        ctx__group_unqueue(group, cell);
        ctx__group_left(group);
    } else {
        want = false; /* the turn has the reference */
    }
    ctx__unlock(&group->mu);
    if (want) ctx__group_unref(group, 1);
    return rc;
}

static int ctx__group_add(ctx_group_t *group, ctx_task_fn fn, void *arg, bool wait) {
    ctx__cell_t *cell = NULL;
    int rc;
    if (!group || !fn) return CTX_INVALID;
    ctx__lock(&group->mu);
    rc = ctx__group_enter(group, wait);
    if (!rc && group->spare) {
        cell = CTX__CONTAINER(group->spare, ctx__cell_t, link);
        ctx__link_out(&cell->link);
    } else {
        ctx__unlock(&group->mu);
        if (rc) return rc;
        if (!group->pool) return ctx__group_go_thread(group, fn, arg);
        cell = (ctx__cell_t *)CTXCANCEL_MALLOC(sizeof *cell);
        ctx__lock(&group->mu);
    }
    if (!cell) {
        ctx__group_left(group);
        ctx__unlock(&group->mu);
        return CTX_NO_MEMORY;
    }
    cell->fn = fn;
    cell->arg = arg;
    return ctx__group_go_pool(group, cell);
}

CTXCANCEL_API int ctx_group_go(ctx_group_t *group, ctx_task_fn fn, void *arg) {
    int rc = ctx__group_add(group, fn, arg, true);
    if (CTX__UNLIKELY(rc != 0) && group) ctx__group_failed(group, arg, rc, true);
    return rc;
}

CTXCANCEL_API int ctx_group_try_go(ctx_group_t *group, ctx_task_fn fn, void *arg) {
    int rc = ctx__group_add(group, fn, arg, false);
    if (CTX__UNLIKELY(rc != 0) && rc != CTX_QUEUE_FULL && group) ctx__group_failed(group, arg, rc, true);
    return rc;
}

static bool ctx__group_may_end(void *arg) {
    const ctx_group_t *group = (const ctx_group_t *)arg;
    return !group->live || group->queue.first;
}

CTXCANCEL_API int ctx_group_wait(ctx_group_t *group) {
    int rc, turns = 0;
    bool turn;
    if (!group) return CTX_INVALID;
    CTXCANCEL_ASSERT(!ctx__scope_of(CTX__IN_GROUP, group)); /* a task that waits for itself */
    ctx__lock(&group->mu);
    CTXCANCEL_ASSERT(group->telling != &ctx__self); /* on_error that waits for itself */
    group->awaited = true;
    while (group->live)
        if (!ctx__group_run_next(group))
            ctx__await(&group->mu, &group->at_end, ctx__group_may_end, group, &ctx__root, CTX_NO_DEADLINE);
    rc = group->rc;
    turn = group->active > 0; /* if there is none, the pool may be freed already: its last worker left with a task */
    ctx__unlock(&group->mu);
    if (turn) turns = ctx__pool_unwant(group->pool, &group->turns);
    ctx_end_at(group->ctx, NULL);
    ctx__group_unref(group, 1 + turns);
    return rc;
}

CTXCANCEL_API int ctx_run_either(ctx_t *a, ctx_t *b, ctx_task_fn fn, void *arg) {
    ctx_t *both;
    int rc, err;
    if (!a || !b || !fn) return CTX_INVALID;
    both = ctx_merge_at(a, b, "ctx_run_either");
    rc = ctx_err(both);
    if (!rc) {
        rc = fn(both, arg);
        err = ctx_err(both);
        if (err && (ctx_err(a) || ctx_err(b))) rc = err;
    }
    ctx_end_at(both, NULL);
    return rc;
}

/* == 11. channel ================================================== */

/* Nobody waits while there is something to do, and the thread that finds a waiter does what that one waits for.

   So receivers wait only if the ring is empty, senders only if it is full; a sender gives its item to the receiver that
   has waited longest, and a receiver moves the item of the sender that has waited longest into the ring. With capacity
   0 the ring is always empty and full.

   The ring is that of section 9, with a lock at each end. A send or receive that need not wait takes one of the two,
   and does not meet the other end. Everything else takes both, `in` first; several channels in the order of their
   addresses. The queues of waiters are read and changed under both. A thread that lets go of both says in `both`
   whether a send or receive that takes one lock would miss something: a waiter, the close or a descriptor. So a sender,
   under `in`, sees that a receiver waits, and no wake-up is lost.

     waiting --claimed, under both locks--> claimed --item moved, unparked--> done
             \--the waiter gives up--> claimed, by itself

   The descriptor of a channel is readable exactly if a receive would not wait: whenever a thread lets go of both locks.
   Once there is one, every send and receive takes both, so all that changes what it shows happens under both.

   A thread waits for one of the cases of a select; a single send or receive is a select of one. It queues one op for
   each case while it holds the locks of all, and after it has found that none can be done. The thread that claims it
   takes all its ops out of that channel, moves the item, and stores `done`, which is its last access to the waiter. The
   waiter takes its ops out of the other channels. It does not touch the channel in which it was served: the other side
   may have freed that. For the same reason the last access of each call to a channel is the unlock of `in` or, if it
   took only that, of `out`, and ctx_chan_free() passes through both locks. */

enum {
    CTX__CASES = 16,      /* of a select that needs no allocation */
    CTX__GATHER_MAX = 16, /* turns of 4 pauses that gathering takes at most */
    CTX__GATHER_TRY = 64  /* how seldom it is tried again where it has not paid */
};
enum { CTX__CHAN_WAITING, CTX__CHAN_CLAIMED, CTX__CHAN_DONE };

struct ctx_chan {
    void *raw;               /* [const] what to free */
    unsigned forks;          /* [const] as for pools */
    bool both[2];            /* [in or out; set under both] by CTX_RECV and CTX_SEND: such a call takes both locks */
    bool closed;             /* [in and out] */
    bool has_fd;             /* [atomic; set once under both] */
    bool shown;              /* [in and out] the descriptor is readable */
    int gather[2];           /* [atomic] how much waiting for more than one has paid lately, by CTX_RECV and CTX_SEND */
    ctx__queue_t queue[2];   /* [in and out] ops that wait */
    ctx__event_t event;      /* [in and out; set once] the descriptor of ctx_chan_fd(), if has_fd */
    ctx__ring_t ring;
};

typedef struct {
    ctx__link_t link;           /* [in and out] */
    struct ctx__select *select; /* [const] */
    int index;                  /* [const while it is queued] of its case */
} ctx__chan_op_t;

typedef struct ctx__select {
    ctx_case_t *cases;   /* rc: [set by the thread that claims it] */
    size_t n;            /* [const] */
    ctx_t *ctx;          /* [const] NULL: does not wait */
    ctx__chan_op_t *ops; /* one for each case, in no order */
    ctx__wait_t wait;    /* stands in no queue: its ops do */
    uint32_t state;      /* [atomic] CTX__CHAN_... */
    int index;           /* [set by the thread that claims it] the case that was done */
} ctx__select_t;

static void ctx__chan_lock(ctx_chan_t *chan) {
    ctx__lock(&chan->ring.in);
    ctx__lock(&chan->ring.out);
}

/* [in and out] Make the descriptor show what there is now. */
static CTX__COLD void ctx__chan_show(ctx_chan_t *chan) {
    bool ready = chan->closed || ctx__ring_count(&chan->ring) || chan->queue[CTX_SEND].first;
    if (ready == chan->shown) return;
    chan->shown = ready;
    if (ready) ctx__event_set(&chan->event);
    else ctx__event_clear(&chan->event);
}

/* What the calls that take one lock, and the descriptor, are to know of a change is said here, by whoever made it. */
static void ctx__chan_unlock(ctx_chan_t *chan) {
    chan->both[CTX_RECV] = chan->has_fd || chan->queue[CTX_SEND].first;
    chan->both[CTX_SEND] = chan->has_fd || chan->closed || chan->queue[CTX_RECV].first;
    if (CTX__UNLIKELY(chan->has_fd)) ctx__chan_show(chan);
    ctx__unlock(&chan->ring.out);
    ctx__unlock(&chan->ring.in);
}

static inline void ctx__chan_copy(const ctx_chan_t *chan, void *to, const void *from) {
    size_t size = chan->ring.size;
    __asm__("" : "+r"(to), "+r"(from)); /* else gcc warns of 8 bytes where it sees that an item is smaller */
    if (size == sizeof(uint64_t) && to) memcpy(to, from, sizeof(uint64_t));
    else if (size && to) memcpy(to, from, size);
}

/* [in and out] Claim the waiter that has waited longest, and take its ops out; ctx__chan_finish() is to follow. NULL if
   there is none: waiters whose context is done, and those that were claimed elsewhere, are passed over. */
static ctx__chan_op_t *ctx__chan_claim(ctx_chan_t *chan, int which) {
    while (chan->queue[which].first) {
        ctx__chan_op_t *op = CTX__CONTAINER(chan->queue[which].first, ctx__chan_op_t, link);
        ctx__select_t *select = op->select;
        uint32_t state = CTX__CHAN_WAITING;
        size_t i;
        ctx__queue_out(&chan->queue[which], &op->link);
        if (ctx_err(select->ctx) || !CTX__CAS(&select->state, &state, CTX__CHAN_CLAIMED, ACQ_REL, RELAXED)) continue;
        for (i = 0; i < select->n; i++) {
            const ctx_case_t *c = &select->cases[select->ops[i].index];
            if (c->chan == chan) ctx__queue_out(&chan->queue[c->op], &select->ops[i].link);
        }
        return op;
    }
    return NULL;
}

static void *ctx__chan_item(const ctx__chan_op_t *op) { return op->select->cases[op->index].item; }

/* [in and out] Returns the address to wake once the locks are free, so that the waiter does not run into them, or NULL.
   It may be gone by then: see section 1. */
static uint32_t *ctx__chan_finish(const ctx__chan_op_t *op, int rc) {
    ctx__select_t *select = op->select;
    uint32_t *parker = &select->wait.parker.state;
    bool parked;
    select->cases[op->index].rc = rc;
    select->index = op->index;
    parked = ctx__parker_set(&select->wait.parker);
    CTX__STORE(&select->state, CTX__CHAN_DONE, RELEASE); /* the waiter may leave: pairs with ctx__select_done() */
    return parked ? parker : NULL;
}

static void ctx__chan_wake(uint32_t *parker) {
    if (parker) ctx__futex_wake(parker, 1);
}

/* [in and out] */
static int ctx__chan_send_locked(ctx_chan_t *chan, const void *item, uint32_t **wake) {
    ctx__chan_op_t *receiver;
    void *cell;
    if (chan->closed) return CTX_CLOSED;
    receiver = ctx__chan_claim(chan, CTX_RECV);
    cell = receiver ? ctx__chan_item(receiver) : ctx__ring_room(&chan->ring);
    if (!receiver && !cell) return CTX_QUEUE_FULL;
    ctx__chan_copy(chan, cell, item);
    if (receiver) *wake = ctx__chan_finish(receiver, 0);
    else ctx__ring_put(&chan->ring);
    return 0;
}

/* [in and out] */
static int ctx__chan_recv_locked(ctx_chan_t *chan, void *item, uint32_t **wake) {
    const void *first = ctx__ring_first(&chan->ring);
    ctx__chan_op_t *sender;
    if (first) {
        ctx__chan_copy(chan, item, first);
        ctx__ring_take(&chan->ring);
    }
    sender = ctx__chan_claim(chan, CTX_SEND);
    if (sender) {
        ctx__chan_copy(chan, first ? ctx__ring_room(&chan->ring) : item, ctx__chan_item(sender));
        if (first) ctx__ring_put(&chan->ring);
        *wake = ctx__chan_finish(sender, 0);
    }
    return first || sender ? 0 : chan->closed ? CTX_CLOSED : CTX_NOT_READY;
}

/* [in and out] `ctx` (may be NULL) is looked at under the locks, and in the usual send too, so that a thread which has
   seen it done and the channel empty after that will not find an item sent with it later. `*wake`: see
   ctx__chan_finish(). */
static int ctx__chan_do_locked(const ctx_case_t *c, const ctx_t *ctx, uint32_t **wake) {
    if (ctx && ctx_err(ctx)) return CTX_NOT_READY;
    return c->op == CTX_SEND ? ctx__chan_send_locked(c->chan, c->item, wake)
                             : ctx__chan_recv_locked(c->chan, c->item, wake);
}

static bool ctx__chan_blocked(int rc) { return rc == CTX_QUEUE_FULL || rc == CTX_NOT_READY; }

/* The usual send: one lock. False: it takes more than this. */
static inline bool ctx__chan_send_fast(ctx_chan_t *chan, const ctx_t *ctx, const void *item) {
    void *cell = NULL;
    ctx__lock(&chan->ring.in);
    if (!chan->both[CTX_SEND] && (!ctx || !ctx_err(ctx))) cell = ctx__ring_room(&chan->ring);
    if (cell) {
        ctx__chan_copy(chan, cell, item);
        ctx__ring_put(&chan->ring);
    }
    ctx__unlock(&chan->ring.in);
    return cell != NULL;
}

static inline bool ctx__chan_recv_fast(ctx_chan_t *chan, void *item) {
    const void *first = NULL;
    ctx__lock(&chan->ring.out);
    if (!chan->both[CTX_RECV]) first = ctx__ring_first(&chan->ring);
    if (first) {
        ctx__chan_copy(chan, item, first);
        ctx__ring_take(&chan->ring);
    }
    ctx__unlock(&chan->ring.out);
    return first != NULL;
}

static inline bool ctx__chan_do_fast(ctx_chan_t *chan, int op, const ctx_t *ctx, void *item) {
    return op == CTX_SEND ? ctx__chan_send_fast(chan, ctx, item) : ctx__chan_recv_fast(chan, item);
}

static int ctx__chan_try_locked(const ctx_case_t *c, const ctx_t *ctx) {
    uint32_t *wake = NULL;
    int rc;
    ctx__chan_lock(c->chan);
    rc = ctx__chan_do_locked(c, ctx, &wake);
    ctx__chan_unlock(c->chan);
    ctx__chan_wake(wake);
    return rc;
}

/* -- select -- */

static void ctx__select_init(ctx__select_t *select, ctx_t *ctx, ctx_case_t *cases, size_t n, ctx__chan_op_t *ops) {
    size_t i;
    select->cases = cases;
    select->n = n;
    select->ctx = ctx;
    select->ops = ops;
    select->state = CTX__CHAN_WAITING;
    ctx__wait_init(&select->wait);
    for (i = 0; i < n; i++) ops[i].index = (int)i;
}

/* Try the cases in a random order: so each that can be done is as likely. With the locks of all if there is a `wake`.
   The index, or CTX_NOT_READY. */
static int ctx__select_try(ctx__select_t *select, uint32_t **wake) {
    size_t left;
    for (left = select->n; left > 0; left--) {
        /* The places of the ops serve to shuffle: those of the first `left` are still to be tried. */
        size_t pick = left > 1 ? ctx__random() % left : 0;
        int i = select->ops[pick].index, rc;
        ctx_case_t *c = &select->cases[i];
        select->ops[pick].index = select->ops[left - 1].index;
        select->ops[left - 1].index = i;
        if (!c->chan) continue;
        if (wake) rc = ctx__chan_do_locked(c, select->ctx, wake);
        else if (ctx__chan_do_fast(c->chan, c->op, select->ctx, c->item)) rc = 0;
        else rc = ctx__chan_try_locked(c, select->ctx);
        if (ctx__chan_blocked(rc)) continue;
        c->rc = rc;
        return i;
    }
    return CTX_NOT_READY;
}

/* Lock or unlock all channels, each once, in the order of their addresses. */
static void ctx__select_each(const ctx__select_t *select, void (*fn)(ctx_chan_t *chan)) {
    uintptr_t last = 0, next;
    do {
        size_t i;
        for (i = 0, next = UINTPTR_MAX; i < select->n; i++) {
            uintptr_t chan = (uintptr_t)select->cases[i].chan;
            if (chan > last && chan < next) next = chan;
        }
        last = next;
        if (next != UINTPTR_MAX) fn((ctx_chan_t *)next);
    } while (next != UINTPTR_MAX);
}

/* [in and out of all] */
static void ctx__select_queue(ctx__select_t *select) {
    size_t i;
    for (i = 0; i < select->n; i++) {
        ctx__chan_op_t *op = &select->ops[i];
        const ctx_case_t *c = &select->cases[op->index];
        op->select = select;
        if (c->chan) ctx__queue_add(&c->chan->queue[c->op], &op->link);
    }
}

/* Take the ops out of the channels other than `served`, which the thread that claimed has done. */
static void ctx__select_leave(ctx__select_t *select, const ctx_chan_t *served) {
    size_t i;
    for (i = 0; i < select->n; i++) {
        const ctx_case_t *c = &select->cases[select->ops[i].index];
        if (!c->chan || c->chan == served) continue;
        ctx__chan_lock(c->chan);
        ctx__queue_out(&c->chan->queue[c->op], &select->ops[i].link);
        ctx__chan_unlock(c->chan);
    }
}

/* Pairs with ctx__chan_finish(), whose thread is about to store `done` when it has claimed. */
static bool ctx__select_done(void *arg) {
    const ctx__select_t *select = (const ctx__select_t *)arg;
    unsigned turn = 0;
    uint32_t state;
    while ((state = CTX__LOAD(&select->state, ACQUIRE)) == CTX__CHAN_CLAIMED) ctx__relax(&turn);
    return state == CTX__CHAN_DONE;
}

/* With the locks of all channels: do one of the cases, or queue up and wait. */
static int ctx__select_block(ctx__select_t *select) {
    const ctx_chan_t *served = NULL;
    uint32_t *wake = NULL, state = CTX__CHAN_WAITING;
    int index;
    ctx__select_each(select, ctx__chan_lock);
    index = ctx__select_try(select, &wake);
    if (index < 0 && select->ctx) ctx__select_queue(select);
    ctx__select_each(select, ctx__chan_unlock);
    ctx__chan_wake(wake);
    if (index >= 0 || !select->ctx) return index;
    index = ctx__wait_on(&select->wait, NULL, NULL, ctx__select_done, select, select->ctx, CTX_NO_DEADLINE);
    if (!index || !CTX__CAS(&select->state, &state, CTX__CHAN_CLAIMED, ACQ_REL, RELAXED)) {
        ctx__select_done(select); /* it was claimed as it gave up */
        index = select->index;
        served = select->cases[index].chan;
    }
    ctx__select_leave(select, served);
    return index;
}

/* Returns CTX_INVALID if a case makes no sense. */
static int ctx__select_check(const ctx_case_t *cases, size_t n) {
    size_t i;
    if (n > INT32_MAX || (n && !cases)) return CTX_INVALID;
    for (i = 0; i < n; i++) {
        const ctx_case_t *c = &cases[i];
        if (c->op != CTX_RECV && c->op != CTX_SEND) return CTX_INVALID;
        if (c->chan && c->op == CTX_SEND && !c->item && c->chan->ring.size) return CTX_INVALID;
    }
    return 0;
}

/* `ctx` NULL: do not wait. */
static int ctx__select_run(ctx_t *ctx, ctx_case_t *cases, size_t n) {
    ctx__chan_op_t few[CTX__CASES], *ops = few;
    ctx__select_t select;
    int index = ctx__select_check(cases, n);
    if (index) return index;
    if (n > CTX__CASES) ops = n <= SIZE_MAX / sizeof *ops ? (ctx__chan_op_t *)CTXCANCEL_MALLOC(n * sizeof *ops) : NULL;
    if (!ops) return CTX_NO_MEMORY;
    ctx__select_init(&select, ctx, cases, n, ops);
    index = ctx__select_try(&select, NULL);
    if (index < 0) index = ctx__select_block(&select); /* between its tries a case may have become ready that was not */
    if (ops != few) CTXCANCEL_FREE(ops);
    return index;
}

CTXCANCEL_API int ctx_select(ctx_t *ctx, ctx_case_t *cases, size_t n) {
    int err;
    if (!ctx) return CTX_INVALID;
    err = ctx_err(ctx);
    return err ? err : ctx__select_run(ctx, cases, n);
}

CTXCANCEL_API int ctx_try_select(ctx_case_t *cases, size_t n) { return ctx__select_run(NULL, cases, n); }

/* -- one send or receive -- */

/* How often could it be done now? Only a hint. */
static uint64_t ctx__chan_room(const ctx_case_t *c) {
    uint64_t n = ctx__ring_count(&c->chan->ring);
    return c->op == CTX_SEND ? c->chan->ring.capacity - n : n;
}

static bool ctx__chan_ready(const void *c) { return ctx__chan_room((const ctx_case_t *)c) != 0; }

/* There is something, but little. Where items stream in, let a few gather, for under a microsecond and without looking,
   since each look at the other end costs both ends the exchange of a cache line. Where they come one by one, do not. */
static void ctx__chan_gather(const ctx_case_t *c) {
    int *gather = &c->chan->gather[c->op], turns = CTX__LOAD(gather, RELAXED), i;
    if (turns == 0 && ctx__random() % CTX__GATHER_TRY == 0) turns = 1;
    if (turns == 0 || ctx__chan_room(c) > CTX__GATHER_MAX) return;
    for (i = turns * 4; i > 0; i--) ctx__cpu_pause();
    turns = ctx__chan_room(c) > 1 ? CTX__GATHER_MAX : turns / 2;
    CTX__STORE(gather, turns, RELAXED);
}

/* Look at the ring for a moment, and let others run once, before queueing up: a hand-over to a thread that is queued
   costs more. True: there may be something. */
static bool ctx__chan_look(const ctx_case_t *c, ctx_time_t until) {
    if (!c->chan->ring.capacity) return false;
    if (ctx__look_out(ctx__chan_ready, c, until)) {
        ctx__chan_gather(c);
        return true;
    }
    ctx__cpu_yield();
    return ctx__chan_ready(c);
}

static CTX__COLD int ctx__chan_slow(ctx_chan_t *chan, int op, ctx_t *ctx, void *item) {
    ctx__chan_op_t self;
    ctx__select_t select;
    ctx_case_t c;
    int index;
    c.chan = chan, c.op = op, c.item = item, c.rc = 0;
    if (!ctx || CTX__LOAD(&chan->has_fd, RELAXED)) {
        int rc = ctx__chan_try_locked(&c, ctx);
        if (!ctx || !ctx__chan_blocked(rc)) return rc;
    }
    if (ctx__chan_look(&c, ctx__deadline(ctx)) && ctx__chan_do_fast(chan, op, ctx, item)) return 0;
    ctx__select_init(&select, ctx, &c, 1, &self);
    index = ctx__select_block(&select);
    return index < 0 ? index : c.rc;
}

/* `ctx` NULL: do not wait. */
static inline int ctx__chan_do(ctx_chan_t *chan, int op, ctx_t *ctx, void *item) {
    int err = ctx ? ctx_err(ctx) : 0;
    if (!chan || (op == CTX_SEND && !item && chan->ring.size)) return CTX_INVALID;
    if (err) return err;
    return ctx__chan_do_fast(chan, op, ctx, item) ? 0 : ctx__chan_slow(chan, op, ctx, item);
}

CTXCANCEL_API ctx_chan_t *ctx_chan_new(size_t item_size, size_t capacity) {
    size_t head = ctx__round_up(sizeof(ctx_chan_t), CTX__LINE);
    ctx_chan_t *chan;
    void *raw;
    ctx__me();
    errno = ENOMEM;
    if (item_size > SIZE_MAX / 4 / (capacity ? capacity : 1)) return NULL;
    chan = (ctx_chan_t *)ctx__alloc_lines(head, item_size * capacity, &raw);
    if (!chan) return NULL;
    chan->raw = raw;
    chan->forks = ctx__forks;
    chan->ring.size = item_size;
    chan->ring.capacity = capacity;
    chan->ring.cells = (char *)chan + head;
    chan->gather[CTX_RECV] = chan->gather[CTX_SEND] = CTX__GATHER_MAX;
    return chan;
}

CTXCANCEL_API int ctx_chan_send(ctx_chan_t *chan, ctx_t *ctx, const void *item) {
    return ctx ? ctx__chan_do(chan, CTX_SEND, ctx, (void *)(uintptr_t)item) : CTX_INVALID;
}

CTXCANCEL_API int ctx_chan_recv(ctx_chan_t *chan, ctx_t *ctx, void *item) {
    return ctx ? ctx__chan_do(chan, CTX_RECV, ctx, item) : CTX_INVALID;
}

CTXCANCEL_API int ctx_chan_try_send(ctx_chan_t *chan, const void *item) {
    return ctx__chan_do(chan, CTX_SEND, NULL, (void *)(uintptr_t)item);
}

CTXCANCEL_API int ctx_chan_try_recv(ctx_chan_t *chan, void *item) { return ctx__chan_do(chan, CTX_RECV, NULL, item); }

CTXCANCEL_API int ctx_chan_close(ctx_chan_t *chan) {
    const ctx__chan_op_t *op;
    int rc, which;
    if (!chan) return CTX_INVALID;
    ctx__chan_lock(chan);
    rc = chan->closed ? CTX_CLOSED : 0;
    chan->closed = true;
    for (which = CTX_RECV; which <= CTX_SEND; which++)
        while ((op = ctx__chan_claim(chan, which)) != NULL) ctx__chan_wake(ctx__chan_finish(op, CTX_CLOSED));
    ctx__chan_unlock(chan);
    return rc;
}

CTXCANCEL_API size_t ctx_chan_len(const ctx_chan_t *chan) {
    uint64_t n;
    CTXCANCEL_ASSERT(ctx__set(chan));
    n = ctx__ring_count(&chan->ring);
    return n < chan->ring.capacity ? (size_t)n : chan->ring.capacity;
}

/* Sets `has_fd` under both locks: so a send or receive that came before is over, and what it left is shown. */
CTXCANCEL_API int ctx_chan_fd(ctx_chan_t *chan) {
    ctx__event_t event;
    int rc, fd = -1;
    if (!chan) return CTX_INVALID;
    ctx__chan_lock(chan);
    if (chan->has_fd) fd = chan->event.fd;
    ctx__chan_unlock(chan);
    if (fd >= 0) return fd;
    rc = ctx__event_open(&event);
    if (rc) return rc;
    ctx__chan_lock(chan);
    if (!chan->has_fd) {
        chan->event = event;
        CTX__STORE(&chan->has_fd, true, RELAXED);
        event.fd = event.writer = -1;
    }
    fd = chan->event.fd;
    ctx__chan_unlock(chan);
    ctx__event_close(&event); /* another thread was first */
    return fd;
}

/* What is in the channel or waits to get in. `*over`: that is nothing, and it is closed. */
static uint64_t ctx__chan_pending(ctx_chan_t *chan, bool *over) {
    const ctx__link_t *link;
    uint64_t n;
    ctx__chan_lock(chan);
    n = ctx__ring_count(&chan->ring);
    for (link = chan->queue[CTX_SEND].first; link; link = link->next) n++;
    *over = chan->closed && n == 0;
    ctx__chan_unlock(chan);
    return n;
}

CTXCANCEL_API void ctx_chan_free(ctx_chan_t *chan) {
    if (!chan) return;
    if (chan->forks == ctx__forks) { /* else the locks are the parent process's */
        ctx__chan_lock(chan);        /* until the calls that have had their effect are out */
        CTXCANCEL_ASSERT(!chan->queue[CTX_RECV].first && !chan->queue[CTX_SEND].first);
        ctx__chan_unlock(chan);
    }
    if (chan->has_fd) ctx__event_close(&chan->event);
    CTXCANCEL_FREE(chan->raw);
}

/* -- stages --

   Every item that a worker has received is sent on, skipped or a dead letter before the worker returns.

   The caller is the first worker; others run on idle threads. With CTX_CANCEL_FINISH it works on none: it watches the
   context, from which that of the workers is detached, and cancels theirs when the budget is over. In an ordered stage
   one worker at a time receives, which numbers the items, and the results leave by number: each worker has at most one
   item, so a worker that waits for its number waits only for items that others are working on. */

typedef struct {
    ctx_stage_desc_t desc;  /* [const] defaults resolved */
    ctx_t *work;            /* [const] the context of fn */
    char *items;            /* [const] of each worker what came in and what goes out */
    size_t in_room, room;   /* [const] bytes of these */
    ctx_sem_t letters;      /* one call of dead_letter at a time */
    ctx_sem_t receiving;    /* ordered: one receives at a time */
    uint64_t received;      /* [receiving] */
    uint32_t mu;
    uint64_t sent;          /* [mu] ordered: the number that may leave */
    int left;               /* [mu] workers that have not returned */
    int rc;                 /* [mu] what stopped it */
    ctx__queue_t turns;     /* [mu] ordered: workers that wait for their number */
    ctx__queue_t at_end;    /* [mu] the caller */
} ctx__stage_t;

typedef struct {
    ctx__stage_t *stage;
    char *in, *out;
    uint64_t number; /* ordered: of the item in hand */
} ctx__stage_worker_t;

static void ctx__stage_stop(ctx__stage_t *stage, int rc) {
    ctx__lock(&stage->mu);
    if (!stage->rc) stage->rc = rc;
    ctx__unlock(&stage->mu);
    ctx_cancel_cause_at(stage->work, rc, "stage stopped", "ctx_stage_run");
}

static void ctx__stage_letter(ctx__stage_t *stage, const void *item, int reason) {
    if (!stage->desc.dead_letter) return;
    ctx_sem_acquire(&stage->letters, &ctx__root, 1);
    stage->desc.dead_letter(item, reason, stage->desc.user);
    ctx_sem_release(&stage->letters, 1);
}

static int ctx__stage_recv(ctx__stage_worker_t *worker) {
    ctx__stage_t *stage = worker->stage;
    int rc;
    if (!stage->desc.ordered) return ctx_chan_recv(stage->desc.in, stage->work, worker->in);
    rc = ctx_sem_acquire(&stage->receiving, stage->work, 1);
    if (rc) return rc;
    rc = ctx_chan_recv(stage->desc.in, stage->work, worker->in);
    if (!rc) worker->number = stage->received++;
    ctx_sem_release(&stage->receiving, 1);
    return rc;
}

static bool ctx__stage_is_turn(void *arg) {
    const ctx__stage_worker_t *worker = (const ctx__stage_worker_t *)arg;
    return worker->stage->sent == worker->number;
}

static void ctx__stage_await_turn(ctx__stage_worker_t *worker) {
    ctx__stage_t *stage = worker->stage;
    ctx__lock(&stage->mu);
    ctx__await(&stage->mu, &stage->turns, ctx__stage_is_turn, worker, &ctx__root, CTX_NO_DEADLINE);
    ctx__unlock(&stage->mu);
}

static void ctx__stage_pass_turn(ctx__stage_t *stage) {
    ctx__lock(&stage->mu);
    stage->sent++;
    ctx__wake_all(&stage->turns);
    ctx__unlock(&stage->mu);
}

/* One item. 0, or what stops the stage. */
static int ctx__stage_item(ctx__stage_worker_t *worker) {
    ctx__stage_t *stage = worker->stage;
    ctx_chan_t *out = stage->desc.out;
    int rc = stage->desc.fn(stage->work, worker->in, out ? worker->out : NULL, stage->desc.user);
    if (rc < 0) ctx__stage_stop(stage, rc); /* before its turn: those before it may need to know */
    if (stage->desc.ordered) ctx__stage_await_turn(worker);
    if (rc == 0 && out) rc = ctx_chan_send(out, stage->work, worker->out);
    if (rc < 0) ctx__stage_letter(stage, worker->in, rc);
    if (stage->desc.ordered) ctx__stage_pass_turn(stage);
    if (rc < 0) ctx__stage_stop(stage, rc);
    return rc < 0 ? rc : 0;
}

static void ctx__stage_worker(ctx__stage_t *stage, char *in) {
    ctx__stage_worker_t worker;
    worker.stage = stage;
    worker.in = in;
    worker.out = in + stage->in_room;
    worker.number = 0;
    while (ctx__stage_recv(&worker) == 0 && ctx__stage_item(&worker) == 0) {}
    ctx__lock(&stage->mu);
    if (--stage->left == 0) ctx__wake_all(&stage->at_end);
    ctx__unlock(&stage->mu);
}

static void ctx__stage_job(const ctx__job_t *job) { ctx__stage_worker((ctx__stage_t *)job->owner, (char *)job->arg); }

static bool ctx__stage_is_over(void *stage) { return ((ctx__stage_t *)stage)->left == 0; }

/* Wait until no worker is left, until `until`, or until `ctx` is done. */
static void ctx__stage_await(ctx__stage_t *stage, ctx_t *ctx, ctx_time_t until) {
    ctx__lock(&stage->mu);
    ctx__await(&stage->mu, &stage->at_end, ctx__stage_is_over, stage, ctx, until);
    ctx__unlock(&stage->mu);
}

/* Start workers from number `first` on: fewer if threads cannot be had. Without any it fails. */
static void ctx__stage_start(ctx__stage_t *stage, int first) {
    int i;
    for (i = first; i < stage->desc.workers; i++) {
        const ctx__job_t job = { ctx__stage_job, stage, NULL, NULL, stage->items + (size_t)i * stage->room,
                                 stage->work->name };
        if (!ctx__run(&job)) continue;
        ctx__lock(&stage->mu);
        stage->left -= stage->desc.workers - i;
        if (i == 0) stage->rc = CTX_NO_MEMORY;
        ctx__unlock(&stage->mu);
        return;
    }
}

static void ctx__stage_work(ctx__stage_t *stage, ctx_t *ctx) {
    bool emit = stage->desc.on_cancel == CTX_CANCEL_FINISH;
    ctx__stage_start(stage, emit ? 0 : 1);
    if (emit) {
        ctx__stage_await(stage, ctx, CTX_NO_DEADLINE);
        ctx__stage_await(stage, &ctx__root, ctx__from_now(stage->desc.finish_budget));
        ctx_cancel_cause_at(stage->work, CTX_DEADLINE_EXCEEDED, "finish budget", "ctx_stage_run");
    } else {
        ctx__stage_worker(stage, stage->items);
    }
    ctx__stage_await(stage, &ctx__root, CTX_NO_DEADLINE);
}

/* All workers have returned: what becomes of the rest, and what the result is. */
static int ctx__stage_finish(ctx__stage_t *stage, ctx_t *ctx) {
    bool over, letters = stage->desc.on_cancel != CTX_CANCEL_DROP && stage->desc.dead_letter;
    uint64_t rest = ctx__chan_pending(stage->desc.in, &over);
    int err = ctx_err(ctx), rc = stage->rc ? stage->rc : over ? 0 : err;
    while (rc && letters && rest-- > 0 && ctx_chan_try_recv(stage->desc.in, stage->items) == 0)
        ctx__stage_letter(stage, stage->items, rc);
    if (stage->desc.on_cancel == CTX_CANCEL_FINISH && rc == CTX_DEADLINE_EXCEEDED && err) rc = err;
    if (stage->desc.out) ctx_chan_close(stage->desc.out);
    return rc;
}

/* Memory for the items in hand, or NULL. */
static char *ctx__stage_items(ctx__stage_t *stage) {
    const ctx_chan_t *in = stage->desc.in, *out = stage->desc.out;
    stage->in_room = ctx__round_up(in->ring.size + 1, 2 * sizeof(void *));
    stage->room = stage->in_room + ctx__round_up(out ? out->ring.size : 0, 2 * sizeof(void *));
    if ((size_t)stage->desc.workers > SIZE_MAX / 2 / stage->room) return NULL;
    return (char *)CTXCANCEL_MALLOC((size_t)stage->desc.workers * stage->room);
}

CTXCANCEL_API int ctx_stage_run(ctx_t *ctx, const ctx_stage_desc_t *desc) {
    ctx__stage_t stage;
    int rc;
    if (!ctx || !desc || !desc->in || !desc->fn || desc->workers < 0 || desc->in == desc->out ||
        (int)desc->on_cancel < 0 || desc->on_cancel > CTX_CANCEL_FINISH)
        return CTX_INVALID;
    memset(&stage, 0, sizeof stage);
    stage.desc = *desc;
    if (!stage.desc.workers) stage.desc.workers = 1;
    if (desc->on_cancel == CTX_CANCEL_FINISH && desc->finish_budget <= 0) stage.desc.on_cancel = CTX_CANCEL_DEAD_LETTER;
    stage.left = stage.desc.workers;
    ctx_sem_init(&stage.letters, 1);
    ctx_sem_init(&stage.receiving, 1);
    ctx__group_spread(); /* stages wait for each other */
    stage.work = stage.desc.on_cancel == CTX_CANCEL_FINISH ? ctx_without_cancel_at(ctx, "ctx_stage_run")
                                                          : ctx_with_cancel_at(ctx, "ctx_stage_run");
    stage.items = ctx__stage_items(&stage);
    if ((stage.work->flags & CTX__F_FAILED) || !stage.items) {
        rc = stage.items ? ctx_err(stage.work) : CTX_NO_MEMORY;
        if (desc->out) ctx_chan_close(desc->out);
    } else {
        ctx__stage_work(&stage, ctx);
        rc = ctx__stage_finish(&stage, ctx);
    }
    CTXCANCEL_FREE(stage.items);
    ctx_end_at(stage.work, NULL);
    return rc;
}

/* == 12. flow ===================================================== */

/* While something is ready to be flushed, a thread is at work on it or has been asked to come; and a thread at work
   can lose its turn, but never the block that it has out.

   Batcher. A ring of blocks of max_items, so that the items of one flush lie in one piece: the block that is out, if
   any, then full ones, then the one that is being filled. Only that last is ever flushed in part, when it is `due`: by
   its delay, on request, in a drain or at the end of the lifetime. One lock, `mu`; before it nothing, behind it the
   locks of timers. Callbacks, the pool and the start of threads run without it.

     rests --something is ready--> asked --a thread comes--> works --nothing is ready any more--> rests
       ^                            |  \                      | \--a drain takes the turn away--> rests
       |<--no thread: asks later----/   \--a drain or the end of the lifetime comes first--> works

   The thread that makes something ready while nobody works and nobody is asked asks for a thread: a worker of the pool,
   or a runner of section 10 if there is no pool or it has ended. If there is neither, a timer asks again, and so does
   the next call. Any thread may come at any time: ctx__batch_work() does what is ready, one block after the other,
   unless another thread is at it, and a thread that finds nothing leaves. Once the context is done it hands everything
   to on_drop instead; the thread that ends the lifetime comes for that itself.

   `works` names the thread whose turn it is, by its scope. A drain takes the turn away from its own thread, if it is
   called by flush or on_drop, and from one that is stuck. That call keeps its block, which nobody uses again because
   the batcher is closed, and the rest is for the next thread to come. So a drain never waits for itself.

   The timer of the delay is armed by the first item of a block and left armed when the block is flushed sooner: when
   it fires it looks how old the first item now is, and is armed again.

   The batcher is counted: its owner, the callback on its context, an armed timer, each thread that was asked, each
   drain and each thread that waits for room hold it. So freeing waits for no flush; it waits only for threads that are
   just asking the pool, because the pool may be freed next. */

#define CTX__BATCH_AGAIN CTX_MS(1) /* until a thread is asked for again that could not be had */

struct ctx_batch {
    ctx_batch_desc_t desc; /* [const] defaults resolved */
    ctx_t *ctx;            /* [const] below the lifetime */
    ctx_on_done_t on_end;  /* on ctx */
    char *items;           /* blocks of desc.max_items; a thread that has taken a block out may read it */
    size_t blocks;         /* [const] */
    void *raw;             /* [const] what to free */
    unsigned forks;        /* [const] as for pools */
    uint32_t refs;         /* [atomic] */
    uint32_t askers;       /* [atomic, raised under mu] threads that are asking for another */
    ctx__turns_t turns;    /* what the pool is asked for */
    uint32_t mu;
    size_t head;           /* [mu] the oldest block: it is out while a thread works */
    size_t full;           /* [mu] full blocks that wait, behind that */
    size_t fill;           /* [mu] items in the block behind those */
    ctx_time_t first_at;   /* [mu] when the first of these came */
    bool due;              /* [mu] flush that block as it is */
    bool asked;            /* [mu] a thread has been asked to come, and has not */
    bool closed;           /* [mu] */
    bool drained;          /* [mu] */
    bool armed;            /* [mu] the timer is, or is about to call */
    ctx__scope_t *works;   /* [mu] the thread whose turn it is, with a block out; NULL: none */
    unsigned calls;        /* [mu] threads in flush or on_drop, with those that have lost the turn */
    unsigned draining;     /* [mu] of these, inside a drain */
    ctx__call_t timer;
    uint64_t added;        /* [mu] items ever */
    uint64_t tallied;      /* [mu] dropped items that the shutdown report has, ... */
    uint64_t tallied_stuck; /* [mu] ... and items of stuck flushes */
    uint64_t flushed;      /* [atomic] items of flushes that returned 0 */
    uint64_t dropped;      /* [atomic] items that went to on_drop */
    ctx__queue_t at_room, at_end; /* [mu] */
};

static void ctx__batch_ref(ctx_batch_t *batch) { CTX__ADD(&batch->refs, 1u, RELAXED); }

static void ctx__batch_unref(ctx_batch_t *batch) {
    if (CTX__SUB(&batch->refs, 1u, ACQ_REL) != 1) return;
    ctx_end_at(batch->ctx, NULL);
    CTXCANCEL_FREE(batch->raw);
}

/* [mu] */
static size_t ctx__batch_waiting(const ctx_batch_t *batch) { return batch->full * batch->desc.max_items + batch->fill; }

/* [mu] */
static bool ctx__batch_ready(const ctx_batch_t *batch) {
    return batch->full || (batch->fill && (batch->due || ctx_err(batch->ctx)));
}

/* [mu] Something is ready that nobody sees to. */
static bool ctx__batch_left(const ctx_batch_t *batch) {
    return !batch->works && !batch->asked && ctx__batch_ready(batch);
}

/* [mu] Make the timer call at `when` at the latest. */
static void ctx__batch_arm(ctx_batch_t *batch, ctx_time_t when) {
    if (batch->armed && when < batch->timer.timer.deadline) ctx__timer_move(&batch->timer.timer, when);
    if (batch->armed) return;
    batch->armed = true;
    ctx__batch_ref(batch);
    ctx__timer_add(&batch->timer.timer, when);
}

static void ctx__batch_flush_or_drop(ctx_batch_t *batch, ctx_t *ctx, const char *items, size_t n) {
    int tries = batch->desc.retries, rc;
    if (ctx__deadline(ctx) != CTX_NO_DEADLINE && ctx_now() >= ctx__deadline(ctx)) ctx__expire(ctx);
    rc = ctx_err(ctx);
    if (!rc) {
        do rc = batch->desc.flush(ctx, items, n, batch->desc.user);
        while (rc && tries-- > 0 && !ctx_err(ctx));
    }
    CTX__ADD(rc ? &batch->dropped : &batch->flushed, n, RELAXED);
    if (rc && batch->desc.on_drop) batch->desc.on_drop(items, n, rc, batch->desc.user);
}

/* [mu] The block that is out is no longer the batcher's, and the turn is free. */
static void ctx__batch_pass(ctx_batch_t *batch) {
    batch->head = batch->head + 1 < batch->blocks ? batch->head + 1 : 0;
    batch->works = NULL;
}

/* Do what is ready, unless another thread is at it. The caller holds the batcher. */
static void ctx__batch_work(ctx_batch_t *batch, ctx_t *ctx) {
    ctx__scope_t scope;
    ctx__scope_enter(&scope, CTX__IN_FLUSH, batch);
    ctx__lock(&batch->mu);
    batch->asked = false;
    ctx__wake_all(&batch->at_room); /* the context may be done */
    while (!batch->works && ctx__batch_ready(batch)) {
        const char *items = batch->items + batch->head * batch->desc.max_items * batch->desc.item_size;
        size_t n = batch->full ? batch->desc.max_items : batch->fill;
        if (batch->full) batch->full--;
        else batch->fill = 0, batch->due = false;
        /* cppcheck-suppress autoVariables ; it is taken back below */
        batch->works = &scope;
        batch->calls++;
        ctx__wake_all(&batch->at_room);
        ctx__unlock(&batch->mu);
        ctx__batch_flush_or_drop(batch, ctx, items, n);
        if (batch->forks != ctx__forks) break; /* flush has forked: the rest and the lock are the parent process's */
        ctx__lock(&batch->mu);
        batch->calls--;
        if (batch->works == &scope) ctx__batch_pass(batch);
    }
    ctx__scope_leave(&scope);
    if (batch->forks != ctx__forks) return;
    ctx__wake_all(&batch->at_end);
    ctx__unlock(&batch->mu);
}

static void ctx__batch_job(const ctx__job_t *job) {
    ctx_batch_t *batch = (ctx_batch_t *)job->owner;
    ctx__batch_work(batch, batch->ctx);
    ctx__batch_unref(batch);
}

/* Ask for a thread: a worker of `pool`, or a runner if that is NULL or has ended. False: there is none. */
static bool ctx__batch_ask(ctx_batch_t *batch, ctx_pool_t *pool) {
    const ctx__job_t job = { ctx__batch_job, batch, NULL, NULL, NULL, batch->desc.name };
    ctx__batch_ref(batch);
    if (pool && !ctx__pool_want(pool, &batch->turns)) return true;
    if (!ctx__run(&job)) return true;
    ctx__batch_unref(batch);
    return false;
}

/* The same, and if there is none the timer asks again. */
static void ctx__batch_ask_until_had(ctx_batch_t *batch, ctx_pool_t *pool) {
    int rc;
    if (ctx__batch_ask(batch, pool)) return;
    rc = ctx__timer_ready();
    ctx__lock(&batch->mu);
    batch->asked = false;
    ctx__wake_all(&batch->at_end);
    if (!rc && ctx__batch_ready(batch)) ctx__batch_arm(batch, ctx_time_add(ctx_now(), CTX__BATCH_AGAIN));
    ctx__unlock(&batch->mu);
}

/* [mu] This thread is about to wait. A worker of the pool does not wait for the pool, for it may be the only one. */
static ctx_pool_t *ctx__batch_pool_to_wait_for(ctx_batch_t *batch) {
    ctx_pool_t *pool = batch->desc.pool;
    if (!pool || !ctx__scope_of(CTX__IN_TASK, pool)) return pool;
    batch->asked = false;
    return NULL;
}

/* [mu] Let go of `mu`, and ask for a thread if something is left. */
static inline void ctx__batch_unlock(ctx_batch_t *batch, ctx_pool_t *pool) {
    bool ask = ctx__batch_left(batch);
    if (ask) CTX__ADD(&batch->askers, 1u, RELAXED), batch->asked = true;
    ctx__unlock(&batch->mu);
    if (!ask) return;
    ctx__batch_ask_until_had(batch, pool);
    CTX__SUB(&batch->askers, 1u, RELEASE); /* pairs with the load in ctx_batch_free() */
}

/* By a worker of the pool; or the pool has ended, and no worker will come. */
static void ctx__batch_come(ctx__turns_t *turns, bool lost) {
    ctx_batch_t *batch = CTX__CONTAINER(turns, ctx_batch_t, turns);
    if (lost) ctx__batch_ask_until_had(batch, NULL);
    else ctx__batch_work(batch, batch->ctx);
    ctx__batch_unref(batch);
}

/* Runs on the runtime thread. */
static void ctx__batch_tick(void *arg) {
    ctx_batch_t *batch = (ctx_batch_t *)arg;
    if (batch->forks != ctx__forks) return;
    ctx__lock(&batch->mu);
    batch->armed = false;
    if (batch->fill && batch->desc.max_delay && !batch->due) {
        ctx_time_t due_at = ctx_time_add(batch->first_at, batch->desc.max_delay);
        if (due_at <= ctx_now()) batch->due = true;
        else ctx__batch_arm(batch, due_at);
    }
    ctx__batch_unlock(batch, batch->desc.pool);
    ctx__batch_unref(batch);
}

/* Runs when the context is done. A thread that is at work will see that by itself. */
static void ctx__batch_ended(void *arg) {
    ctx_batch_t *batch = (ctx_batch_t *)arg;
    if (batch->forks == ctx__forks) ctx__batch_work(batch, batch->ctx);
    ctx__batch_unref(batch);
}

/* Put the defaults in. The bytes of all blocks; 0: `errno` says what is wrong. */
static size_t ctx__batch_resolve(ctx_batch_desc_t *d, size_t *blocks) {
    errno = EINVAL;
    if (!d->item_size || !d->flush || d->max_delay < 0 || d->retries < 0) return 0;
    if (!d->name) d->name = "batch";
    if (!d->max_items) d->max_items = 100;
    if (!d->grace) d->grace = CTX_MS(100);
    errno = ENOMEM;
    if (d->max_items > SIZE_MAX / 16 / d->item_size) return 0;
    if (!d->queue) d->queue = 4 * d->max_items;
    if (d->queue < d->max_items) d->queue = d->max_items;
    if (d->queue / d->max_items > SIZE_MAX / 4 / d->max_items / d->item_size) return 0;
    *blocks = d->queue / d->max_items + (d->queue % d->max_items != 0) + 1; /* one may be out */
    return *blocks * d->max_items * d->item_size;
}

CTXCANCEL_API ctx_batch_t *ctx_batch_new(ctx_t *lifetime, const ctx_batch_desc_t *desc) {
    size_t head = ctx__round_up(sizeof(ctx_batch_t), CTX__LINE), blocks, bytes;
    ctx_batch_desc_t d;
    ctx_desc_t node;
    ctx_batch_t *batch;
    void *raw;
    errno = EINVAL;
    if (!lifetime || !desc) return NULL;
    d = *desc;
    bytes = ctx__batch_resolve(&d, &blocks);
    if (!bytes) return NULL;
    ctx__me();
    batch = (ctx_batch_t *)ctx__alloc_lines(head, bytes, &raw);
    if (!batch) return NULL;
    batch->raw = raw;
    batch->items = (char *)batch + head;
    batch->blocks = blocks;
    batch->desc = d;
    batch->forks = ctx__forks;
    batch->refs = 2; /* its owner's, and that of on_end */
    batch->turns.come = ctx__batch_come;
    batch->turns.op = d.name;
    batch->timer.timer.kind = CTX__TIMER_CALL;
    batch->timer.fn = ctx__batch_tick;
    batch->timer.owner = batch;
    memset(&node, 0, sizeof node);
    node.name = d.name;
    batch->ctx = ctx_derive_at(lifetime, &node, "ctx_batch_new");
    if (batch->ctx->flags & CTX__F_FAILED) {
        errno = -ctx_err(batch->ctx);
        CTXCANCEL_FREE(raw);
        return NULL;
    }
    ctx__reg_or_run(&batch->on_end, batch->ctx, ctx__batch_ended, batch, CTX__REG_OWN);
    return batch;
}

/* [mu] 0 if items are taken, whether or not there is room. */
static int ctx__batch_refuses(const ctx_batch_t *batch) { return batch->closed ? CTX_CLOSED : ctx_err(batch->ctx); }

/* [mu] */
static inline int ctx__batch_put(ctx_batch_t *batch, const void *item) {
    const ctx_batch_desc_t *desc = &batch->desc;
    size_t block = batch->head + (batch->works != NULL) + batch->full;
    int rc = ctx__batch_refuses(batch);
    if (!rc && ctx__batch_waiting(batch) >= desc->queue) rc = CTX_QUEUE_FULL;
    if (rc) return rc;
    if (block >= batch->blocks) block -= batch->blocks;
    memcpy(batch->items + (block * desc->max_items + batch->fill) * desc->item_size, item, desc->item_size);
    batch->added++;
    if (batch->fill++ == 0 && desc->max_delay) {
        batch->first_at = ctx_now();
        ctx__batch_arm(batch, ctx_time_add(batch->first_at, desc->max_delay));
    }
    if (batch->fill == desc->max_items) {
        batch->full++;
        batch->fill = 0;
        batch->due = false;
    }
    return 0;
}

/* Add, if there is room. With `waits` the caller holds the batcher when there is none. */
static inline int ctx__batch_add(ctx_batch_t *batch, const void *item, bool waits) {
    int rc;
    if (!batch || !item) return CTX_INVALID;
    if (batch->desc.max_delay && CTX__UNLIKELY(ctx__timer_ready())) return CTX_NO_MEMORY;
    ctx__lock(&batch->mu);
    rc = ctx__batch_put(batch, item);
    if (waits && rc == CTX_QUEUE_FULL) ctx__batch_ref(batch);
    ctx__batch_unlock(batch, batch->desc.pool);
    return rc;
}

CTXCANCEL_API int ctx_batch_add(ctx_batch_t *batch, const void *item) { return ctx__batch_add(batch, item, false); }

static bool ctx__batch_has_room(void *arg) {
    const ctx_batch_t *batch = (const ctx_batch_t *)arg;
    return ctx__batch_refuses(batch) || ctx__batch_waiting(batch) < batch->desc.queue;
}

CTXCANCEL_API int ctx_batch_add_wait(ctx_batch_t *batch, ctx_t *ctx, const void *item) {
    int rc = ctx ? ctx_err(ctx) : CTX_INVALID;
    if (rc) return rc;
    rc = ctx__batch_add(batch, item, true);
    if (rc != CTX_QUEUE_FULL) return rc;
    if (!ctx__scope_of(CTX__IN_FLUSH, batch)) { /* else it would wait for itself */
        ctx__lock(&batch->mu);
        ctx__batch_unlock(batch, ctx__batch_pool_to_wait_for(batch));
        ctx__lock(&batch->mu);
        ctx__await(&batch->mu, &batch->at_room, ctx__batch_has_room, batch, ctx, CTX_NO_DEADLINE);
        rc = ctx_err(ctx);
        if (!rc) rc = ctx__batch_put(batch, item);
        ctx__batch_unlock(batch, batch->desc.pool);
    }
    ctx__batch_unref(batch);
    return rc;
}

CTXCANCEL_API int ctx_batch_flush(ctx_batch_t *batch) {
    int rc;
    if (!batch) return CTX_INVALID;
    ctx__lock(&batch->mu);
    rc = ctx__batch_refuses(batch);
    if (!rc) batch->due = batch->fill > 0;
    ctx__batch_unlock(batch, batch->desc.pool);
    return rc;
}

/* [mu] Nothing waits and no call runs; a drain from inside a call does not wait for calls that drain, such as its own.
   By the thread that drains. */
static bool ctx__batch_over(void *arg) {
    const ctx_batch_t *batch = (const ctx_batch_t *)arg;
    return !ctx__batch_waiting(batch) && batch->calls <= (ctx__scope_of(CTX__IN_FLUSH, batch) ? batch->draining : 0);
}

static bool ctx__batch_over_or_left(void *batch) {
    return ctx__batch_over(batch) || ctx__batch_left((const ctx_batch_t *)batch);
}

/* There is no other thread: flush here, with a context that is done at `until`. False: it was. */
static CTX__COLD bool ctx__batch_work_here(ctx_batch_t *batch, ctx_time_t until) {
    ctx__make_t make = ctx__make_plain;
    ctx_t *ctx;
    bool in_time;
    make.site = "ctx_batch_drain";
    make.deadline = ctx__timer_ready() ? CTX_NO_DEADLINE : until;
    ctx = ctx__make(batch->ctx, NULL, &make);
    if (ctx->flags & CTX__F_FAILED) ctx = batch->ctx;
    else if (until < ctx__deadline(ctx)) /* waits and polls see it without a timer */
        CTX__STORE(&ctx->timer.deadline, until, RELAXED);
    ctx__batch_work(batch, ctx);
    in_time = !ctx_err(ctx) || ctx_err(batch->ctx);
    if (ctx != batch->ctx) ctx_end_at(ctx, NULL);
    return in_time;
}

/* [mu, released meanwhile] Have all flushed that is left. False: `until` has come first. */
static bool ctx__batch_finish(ctx_batch_t *batch, ctx_time_t until) {
    ctx_pool_t *pool = ctx__batch_pool_to_wait_for(batch);
    while (!ctx__await(&batch->mu, &batch->at_end, ctx__batch_over_or_left, batch, &ctx__root, until)) {
        bool in_time;
        if (ctx__batch_over(batch)) return true;
        batch->asked = true;
        ctx__unlock(&batch->mu);
        in_time = ctx__batch_ask(batch, pool) || ctx__batch_work_here(batch, until);
        ctx__lock(&batch->mu);
        if (!in_time) break;
    }
    return false;
}

/* The budget is over: cancel what runs, and drop the rest. */
static void ctx__batch_cut(ctx_batch_t *batch) {
    ctx_dur_t grace = batch->desc.grace > 0 ? batch->desc.grace : 0;
    ctx_cancel_cause_at(batch->ctx, CTX_DEADLINE_EXCEEDED, "batcher drained", "ctx_batch_drain");
    ctx__lock(&batch->mu);
    ctx__await(&batch->mu, &batch->at_end, ctx__batch_over, batch, &ctx__root, ctx__from_now(grace));
    if (batch->works) ctx__batch_pass(batch); /* that call is stuck */
    ctx__unlock(&batch->mu);
    ctx__batch_work(batch, batch->ctx);
}

/* The drain of a thread has ended. Dropped items, and those of a stuck flush, are told to the shutdown that the thread
   works for, each once. */
static void ctx__batch_settle(ctx_batch_t *batch, bool inside, ctx_batch_report_t *report) {
    uint64_t stuck;
    bool removed;
    ctx__lock(&batch->mu);
    removed = batch->armed && ctx__timer_remove(&batch->timer.timer);
    batch->armed = batch->armed && !removed;
    batch->drained = true;
    batch->draining -= inside;
    report->dropped = CTX__LOAD(&batch->dropped, ACQUIRE);
    report->flushed = CTX__LOAD(&batch->flushed, ACQUIRE);
    report->stuck = batch->added - report->flushed - report->dropped;
    stuck = report->stuck > batch->tallied_stuck ? report->stuck - batch->tallied_stuck : 0;
    ctx__tally_add(report->dropped - batch->tallied, stuck);
    batch->tallied = report->dropped;
    batch->tallied_stuck += stuck;
    ctx__unlock(&batch->mu);
    if (removed) ctx__batch_unref(batch);
}

CTXCANCEL_API int ctx_batch_drain(ctx_batch_t *batch, ctx_dur_t budget, ctx_batch_report_t *report) {
    ctx_time_t began = ctx_now(), end = ctx__from_now(budget > 0 ? budget : 0);
    ctx_batch_report_t r;
    ctx__scope_t *inside;
    bool in_time;
    memset(&r, 0, sizeof r);
    if (report) *report = r;
    if (!batch) return CTX_INVALID;
    if (batch->forks != ctx__forks) return CTX_CLOSED; /* its lock and its items are the parent process's */
    inside = ctx__scope_of(CTX__IN_FLUSH, batch);
    ctx__batch_ref(batch);
    ctx__lock(&batch->mu);
    batch->closed = true;
    batch->due = batch->fill > 0;
    batch->draining += inside != NULL;
    if (inside && inside == batch->works) ctx__batch_pass(batch);
    ctx__wake_all(&batch->at_room);
    in_time = ctx__batch_over(batch) || (budget > 0 && ctx__batch_finish(batch, end));
    ctx__unlock(&batch->mu);
    if (!in_time) ctx__batch_cut(batch);
    ctx_cancel_at(batch->ctx, NULL);
    ctx__batch_settle(batch, inside != NULL, &r);
    r.took = ctx_now() - began;
    if (report) *report = r;
    ctx__batch_unref(batch);
    return in_time ? 0 : CTX_DEADLINE_EXCEEDED;
}

CTXCANCEL_API void ctx_batch_free(ctx_batch_t *batch) {
    unsigned spin = 0;
    int turns;
    if (!batch) return;
    if (!batch->drained) ctx_batch_drain(batch, 0, NULL);
    if (ctx_on_done_try_stop(&batch->on_end) == CTX_ON_DONE_STOPPED) ctx__batch_unref(batch);
    while (batch->forks == ctx__forks && CTX__LOAD(&batch->askers, ACQUIRE)) ctx__relax(&spin);
    turns = batch->desc.pool ? ctx__pool_unwant(batch->desc.pool, &batch->turns) : 0;
    while (turns-- > 0) ctx__batch_unref(batch);
    ctx__batch_unref(batch);
}

/* -- limiter --

   Every token that is taken has a place in time, in the order of asking, and a place moves only to where nobody else
   has one.

   One word, `full_at`: the time at which the bucket would be full. Taking `n` tokens moves it by their cost, from now
   at the earliest; the tokens are there once it is no further away than the cost of a whole bucket. So a thread that
   takes on credit gets a place in time. Threads that wait for theirs stand in a queue, in the order of the places.
   When one gives up or tokens are given back, those behind move up and the word moves back, as far as they stand
   without a gap. A gap is a place that was reserved, whose owner cannot be told that it moved, or one that could not
   be filled.

     now ....[first waits][second waits][reserved][third waits] full_at

   A place is given up only as far as it lies ahead of the clock: without it the bucket would have been full before.
   `mu` guards the queue, and everything that makes the word less. It is behind the gate of a fork, in whose child
   nobody waits. */

#define CTX__SPAN_MAX (INT64_MAX / 2) /* 146 years */

typedef struct {
    ctx__wait_t wait; /* its link: [mu] */
    ctx_dur_t span;   /* [const] the cost of its tokens */
    int64_t full_at;  /* [mu] the end of its place: what the word became when they were taken */
    int64_t seen;     /* [owner thread] the place that it sleeps for */
} ctx__limiter_waiter_t;

/* Take `n` tokens if they are there at `latest`. `*at`: when they are; `*full_at`: what the word became. */
static bool ctx__limiter_take(ctx_limiter_t *limiter, int64_t n, ctx_time_t now, ctx_time_t latest, ctx_time_t *at,
                              int64_t *full_at) {
    ctx_dur_t span = n * limiter->cost, bucket = limiter->bucket;
    int64_t before = CTX__LOAD(&limiter->full_at, RELAXED);
    do {
        *full_at = ctx_time_add(before > now ? before : now, span);
        *at = ctx_time_add(*full_at, -bucket);
        if (*at > latest) return false;
    } while (!CTX__CAS_WEAK(&limiter->full_at, &before, *full_at, ACQ_REL, RELAXED));
    return true;
}

static void ctx__limiter_enter(ctx_limiter_t *limiter) {
    ctx__enter(&limiter->mu);
    if (limiter->forks != ctx__forks) limiter->waiters.first = NULL; /* they are the parent process's */
    limiter->forks = ctx__forks;
}

static ctx__limiter_waiter_t *ctx__limiter_waiter(ctx__link_t *link) {
    return link ? CTX__CONTAINER(link, ctx__limiter_waiter_t, wait.link) : NULL;
}

/* [mu] Give up the last `span` of the time from `begin` to `end`. The waiters from `waiter` on move up as far as they
   stand without a gap, and so does the word. False: nobody stands there, and the word has moved meanwhile. */
static bool ctx__limiter_give_up(ctx_limiter_t *limiter, int64_t begin, int64_t end, ctx_dur_t span,
                                 ctx__limiter_waiter_t *waiter) {
    bool alone = !waiter;
    int64_t to = ctx_time_add(end, -span);
    if (to < begin) to = begin;
    if (to >= end) return true;
    span = end - to;
    for (; waiter && waiter->full_at - waiter->span == end; waiter = ctx__limiter_waiter(waiter->wait.link.next)) {
        end = waiter->full_at;
        waiter->full_at -= span;
        ctx__unpark(&waiter->wait.parker);
    }
    return waiter || CTX__CAS(&limiter->full_at, &end, end - span, ACQ_REL, RELAXED) || !alone;
}

/* [mu] `n` tokens are given back: give up the last time that nobody waits for, behind the waiters or else before the
   last of them that stand without a gap. */
static bool ctx__limiter_give_back(ctx_limiter_t *limiter, int64_t n, ctx_time_t now) {
    ctx__limiter_waiter_t *waiter = ctx__limiter_waiter(limiter->waiters.first), *first = NULL;
    int64_t begin = now, end = now, reach = now, full_at = CTX__LOAD(&limiter->full_at, ACQUIRE);
    for (; waiter; waiter = ctx__limiter_waiter(waiter->wait.link.next)) {
        int64_t start = waiter->full_at - waiter->span;
        if (!first || start != reach) begin = reach, end = start, first = waiter;
        reach = waiter->full_at;
    }
    if (!first || full_at != reach) begin = reach, end = full_at, first = NULL;
    return ctx__limiter_give_up(limiter, begin > now ? begin : now, end, n * limiter->cost, first);
}

static bool ctx__limiter_moved(void *arg) {
    const ctx__limiter_waiter_t *waiter = (const ctx__limiter_waiter_t *)arg;
    return waiter->full_at != waiter->seen;
}

/* The tokens are not there yet. */
static CTX__COLD int ctx__limiter_wait(ctx_limiter_t *limiter, ctx_t *ctx, int64_t n) {
    ctx__limiter_waiter_t waiter;
    ctx_time_t now, at;
    int err = CTX_DEADLINE_EXCEEDED;
    ctx__wait_init(&waiter.wait);
    waiter.span = n * limiter->cost;
    ctx__limiter_enter(limiter);
    if (ctx__limiter_take(limiter, n, ctx_now(), ctx_deadline(ctx) - 1, &at, &waiter.full_at)) {
        ctx__queue_add(&limiter->waiters, &waiter.wait.link);
        do {
            waiter.seen = waiter.full_at;
            at = ctx_time_add(waiter.full_at, -limiter->bucket);
            err = ctx__wait_on(&waiter.wait, &limiter->mu, NULL, ctx__limiter_moved, &waiter, ctx, at);
        } while (!err);
        ctx__queue_out(&limiter->waiters, &waiter.wait.link); /* leaves its `next` */
        now = ctx_now();
        at = waiter.full_at - waiter.span;
        if (err == CTX_NOT_READY) err = 0;
        else ctx__limiter_give_up(limiter, at > now ? at : now, waiter.full_at, waiter.span,
                                  ctx__limiter_waiter(waiter.wait.link.next));
    }
    ctx__leave(&limiter->mu);
    return err;
}

CTXCANCEL_API int ctx_limiter_init(ctx_limiter_t *limiter, double per_second, int64_t burst) {
    double cost;
    CTXCANCEL_ASSERT(ctx__set(limiter));
    memset(limiter, 0, sizeof *limiter);
    limiter->cost = 1;
    if (!(per_second > 0 && per_second <= 1e7) || burst < 1 || burst > 1000000000) return CTX_INVALID;
    cost = 1e9 / per_second;
    limiter->full_at = INT64_MIN / 2;
    limiter->cost = CTX__SPAN_MAX / burst;
    if (cost < (double)limiter->cost) {
        limiter->cost = (int64_t)cost; /* whole, so that the tokens of a bucket add up to it */
        if ((double)limiter->cost < cost) limiter->cost++;
    }
    limiter->burst = burst;
    limiter->bucket = burst * limiter->cost;
    return 0;
}

CTXCANCEL_API bool ctx_limiter_allow(ctx_limiter_t *limiter, int64_t n) {
    ctx_time_t now, at;
    int64_t full_at;
    CTXCANCEL_ASSERT(ctx__set(limiter));
    if (n < 0 || n > limiter->burst) return false;
    now = ctx_now();
    return ctx__limiter_take(limiter, n, now, now, &at, &full_at);
}

CTXCANCEL_API ctx_dur_t ctx_limiter_reserve(ctx_limiter_t *limiter, int64_t n) {
    ctx_time_t now, at;
    int64_t full_at;
    CTXCANCEL_ASSERT(ctx__set(limiter));
    if (n < 0 || n > limiter->burst) return CTX_INVALID;
    now = ctx_now();
    ctx__limiter_take(limiter, n, now, CTX_NO_DEADLINE, &at, &full_at);
    return at > now ? at - now : 0;
}

CTXCANCEL_API void ctx_limiter_refund(ctx_limiter_t *limiter, int64_t n) {
    ctx_time_t now = ctx_now();
    CTXCANCEL_ASSERT(ctx__set(limiter) && n >= 0);
    if (n > CTX__SPAN_MAX / limiter->cost) n = CTX__SPAN_MAX / limiter->cost;
    ctx__limiter_enter(limiter);
    while (!ctx__limiter_give_back(limiter, n, now)) {}
    ctx__leave(&limiter->mu);
}

CTXCANCEL_API int ctx_limiter_wait(ctx_limiter_t *limiter, ctx_t *ctx, int64_t n) {
    int err;
    CTXCANCEL_ASSERT(ctx__set(limiter));
    if (!ctx || n < 0 || n > limiter->burst) return CTX_INVALID;
    err = ctx_err(ctx);
    return err || ctx_limiter_allow(limiter, n) ? err : ctx__limiter_wait(limiter, ctx, n);
}

/* -- retry -- */

static ctx_dur_t ctx__retry_jitter(ctx_dur_t wait, double jitter) {
    return wait - (ctx_dur_t)((double)wait * jitter * ((double)ctx__random() / 4294967296.0));
}

/* One attempt in a context of its own. */
static CTX__COLD int ctx__retry_attempt(ctx_t *ctx, ctx_dur_t timeout, ctx_task_fn fn, void *arg) {
    ctx_t *own = ctx_with_timeout_at(ctx, timeout, "ctx_retry");
    int rc = own->flags & CTX__F_FAILED ? ctx_err(own) : fn(own, arg);
    ctx_end_at(own, NULL);
    return rc;
}

CTXCANCEL_API int ctx_retry(ctx_t *ctx, const ctx_retry_desc_t *desc, ctx_task_fn fn, void *arg) {
    ctx_retry_desc_t d;
    double wait;
    int tried, rc, err;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (!d.attempts) d.attempts = 3;
    if (!d.base) d.base = CTX_MS(100);
    if (!d.cap) d.cap = CTX_S(10);
    if (d.factor >= 0 && d.factor <= 0) d.factor = 2; /* a zero, without -Wfloat-equal */
    if (!ctx || !fn || d.base < 0 || d.cap < 0 || !(d.factor >= 1) || !(d.jitter >= 0 && d.jitter <= 1))
        return CTX_INVALID;
    err = ctx_err(ctx);
    if (err) return err;
    wait = (double)d.base;
    for (tried = 1;; tried++) {
        ctx_dur_t next;
        ctx_time_t until;
        rc = d.attempt_timeout ? ctx__retry_attempt(ctx, d.attempt_timeout, fn, arg) : fn(ctx, arg);
        if (rc == 0 || tried == d.attempts || (d.retryable && !d.retryable(rc, arg))) return rc;
        next = ctx__retry_jitter(wait < (double)d.cap ? (ctx_dur_t)wait : d.cap, d.jitter);
        if (d.on_retry && !ctx_err(ctx) && d.on_retry(tried, rc, &next, arg)) return rc;
        if (next < 0) next = 0;
        if (tried == INT32_MAX) tried = 0; /* attempts without end */
        until = ctx_time_add(ctx_now(), next); /* read once: a wait that is begun ends before the deadline */
        if (until >= ctx_deadline(ctx)) return rc;
        err = ctx__sleep_until(ctx, until);
        if (err) return err;
        if (wait < (double)d.cap) wait *= d.factor;
    }
}

/* == 13. system =================================================== */

/* While a context or a registration wants a signal the handler of this copy of the library stands, and with the last
   one the action that stood before comes back.

   Signals. The handler notes the signal and posts a semaphore, which is all that a handler may do; one thread waits
   there, calls every registration and cancels every context that asked for it. A thread that follows one which
   ctx_runtime_stop() ends does not wait at the semaphore before that one has left it, for it could take the post that
   is meant for the other. SA_RESETHAND has put the default action back by then, unless somebody keeps the handler: a
   registration, or a context with a `second`. Per signal there is a count of those that want it and the action that
   stood before the first of them, which comes back with the last. All of it under ctx__life; canceling and calling is
   done without.

   Calls. The signal thread notes in each registration which signals it has yet to be told of, then takes one at a time
   under ctx__life and puts a frame for its call into a stripe, as section 3 does for callbacks. So a stop, which takes
   the registration out under ctx__life, finds the frame of a call that has begun, and waits for it by the rules of
   section 3; no other call begins. `call.state` is LINKED while the registration is in, so that a stop which finds no
   frame sees whether the call has registered it anew. The signal thread does not touch a registration once it has left
   ctx__life with the frame in place.

     registered --signal--> due --the signal thread claims it--> registered, a frame stands for the call
          \------------------\---- ctx_on_signals_stop(), or a fork that drops it ----> out */

enum { CTX__SIGNALS = 65 };

typedef struct ctx__notify {
    ctx_t node;
    uint64_t wants[2];             /* [const] as in a registration */
    ctx_t *second;                 /* [const] canceled by the second signal, which then does not end the process */
    ctx_t *target;                 /* [signal thread] what the signal at hand cancels */
    struct ctx__notify *next_hit;  /* [signal thread] */
    ctx__link_t link;              /* [ctx__life] pprev NULL: not live */
} ctx__notify_t;

/* One copy of the library in a process handles signals at a time, for the actions that each would put back are the
   other's: the copies, static ones too, meet at this symbol. [atomic] */
__attribute__((weak, visibility("default"))) extern void *ctx__signals_owner;
__attribute__((weak, visibility("default"))) void *ctx__signals_owner = NULL;

static struct {
    ctx__link_t *live;                   /* [ctx__life] contexts */
    ctx__queue_t regs;                   /* [ctx__life] registrations */
    unsigned count[CTX__SIGNALS];        /* [ctx__life] contexts and registrations that want it */
    unsigned kept[CTX__SIGNALS];         /* [ctx__life] of these, registrations and contexts with a `second` */
    struct sigaction before[CTX__SIGNALS]; /* [ctx__life] while count is not 0 */
    int pending[CTX__SIGNALS];           /* [atomic] */
    sem_t posted;
    pthread_t thread;                    /* [ctx__life] */
    bool running;                        /* [ctx__life] */
    uint32_t era;                        /* [atomic, set under ctx__life] as for the runtime thread */
    uint32_t gone;                       /* [atomic] how many of its threads have ended, so the era whose turn it is */
} ctx__signals;

/* "signal " and its name. */
static const char *ctx__signal_site(int signal) {
    switch (signal) {
    case SIGHUP: return "signal SIGHUP";
    case SIGINT: return "signal SIGINT";
    case SIGQUIT: return "signal SIGQUIT";
    case SIGTERM: return "signal SIGTERM";
    case SIGUSR1: return "signal SIGUSR1";
    case SIGUSR2: return "signal SIGUSR2";
    case SIGALRM: return "signal SIGALRM";
    case SIGPIPE: return "signal SIGPIPE";
    case SIGCHLD: return "signal SIGCHLD";
    case SIGCONT: return "signal SIGCONT";
    case SIGTSTP: return "signal SIGTSTP";
    case SIGTTIN: return "signal SIGTTIN";
    case SIGTTOU: return "signal SIGTTOU";
    case SIGURG: return "signal SIGURG";
    case SIGXCPU: return "signal SIGXCPU";
    case SIGXFSZ: return "signal SIGXFSZ";
    case SIGVTALRM: return "signal SIGVTALRM";
    case SIGPROF: return "signal SIGPROF";
    case SIGABRT: return "signal SIGABRT";
#ifdef SIGWINCH
    case SIGWINCH: return "signal SIGWINCH";
#endif
#ifdef SIGIO
    case SIGIO: return "signal SIGIO";
#endif
#ifdef SIGPWR
    case SIGPWR: return "signal SIGPWR";
#endif
    default: return "signal";
    }
}

static const char *ctx__signal_name(int signal) {
    const char *site = ctx__signal_site(signal);
    return site[6] ? site + 7 : site;
}

static bool ctx__signal_in(const uint64_t set[2], int signal) {
    return (set[signal / 64] >> (signal % 64) & 1) != 0;
}

static void ctx__signal_set(uint64_t set[2], int signal, bool in) {
    uint64_t bit = (uint64_t)1 << (signal % 64);
    set[signal / 64] = in ? set[signal / 64] | bit : set[signal / 64] & ~bit;
}

/* Is there anybody to hear signals? [ctx__life] */
static bool ctx__signals_wanted(void) { return ctx__signals.live || ctx__signals.regs.first; }

static void ctx__signal_handler(int signal) {
    int saved = errno;
    CTX__STORE(&ctx__signals.pending[signal], 1, RELEASE);
    sem_post(&ctx__signals.posted);
    errno = saved;
}

/* [ctx__life] A signal has come: it is due to the registrations that want it. Returns the contexts that want it,
   pinned. */
static ctx__notify_t *ctx__signal_collect(int signal) {
    ctx__notify_t *hit = NULL;
    ctx__link_t *link;
    for (link = ctx__signals.regs.first; link; link = link->next) {
        ctx_on_signals_t *reg = CTX__CONTAINER(link, ctx_on_signals_t, link);
        if (ctx__signal_in(reg->wants, signal)) ctx__signal_set(reg->due, signal, true);
    }
    for (link = ctx__signals.live; link; link = link->next) {
        ctx__notify_t *notify = CTX__CONTAINER(link, ctx__notify_t, link);
        if (!ctx__signal_in(notify->wants, signal) || !ctx__pin(&notify->node)) continue;
        notify->target = NULL;
        if (notify->second && ctx__why(&notify->node)) notify->target = ctx_retain(notify->second);
        notify->next_hit = hit;
        hit = notify;
    }
    return hit;
}

/* [ctx__life] The next registration that the signal is due to, of a context that is not done; NULL: none. It is due no
   longer. */
static ctx_on_signals_t *ctx__signal_claim(int signal) {
    ctx__link_t *link;
    for (link = ctx__signals.regs.first; link; link = link->next) {
        ctx_on_signals_t *reg = CTX__CONTAINER(link, ctx_on_signals_t, link);
        if (!ctx__signal_in(reg->due, signal)) continue;
        ctx__signal_set(reg->due, signal, false);
        if (!ctx_err(reg->call.ctx)) return reg;
    }
    return NULL;
}

/* Call the next registration that the signal is due to. Returns false if there is none. */
static bool ctx__signal_call(int signal) {
    void (*fn)(int signal, void *user) = NULL;
    void *user = NULL;
    ctx_on_signals_t *reg;
    ctx__frame_t frame;
    ctx__life_lock();
    reg = ctx__signal_claim(signal);
    if (reg) {
        fn = reg->fn;
        user = reg->call.arg;
        ctx__frame_enter(&frame, &reg->call, true);
        CTX__STORE(&reg->call.state, CTX__REG_LINKED, RELEASE); /* for the next signal */
    }
    ctx__life_unlock();
    if (!reg) return false;
    fn(signal, user);
    ctx__frame_leave(&frame, &reg->call);
    return true;
}

static void ctx__signal_deliver(int signal) {
    ctx__notify_t *hit = NULL;
    ctx__life_lock();
    if (CTX__EXCHANGE(&ctx__signals.pending[signal], 0, ACQUIRE)) hit = ctx__signal_collect(signal);
    ctx__life_unlock();
    while (ctx__signal_call(signal)) {}
    while (hit) {
        ctx_t *node = &hit->node, *second = hit->target;
        hit = hit->next_hit;
        ctx_cancel_cause_at(second ? second : node, signal, ctx__signal_name(signal), ctx__signal_site(signal));
        ctx_release(second);
        ctx__unpin(node);
    }
}

static bool ctx__signals_awaited(void) {
    bool awaited;
    ctx__life_lock();
    awaited = ctx__signals.live || ctx__signals.regs.first;
    ctx__life_unlock();
    return awaited;
}

static void *ctx__signal_main(void *arg) {
    uint32_t era = (uint32_t)(uintptr_t)arg;
    int signal;
    uint32_t gone;
    ctx__thread_name("ctx-signals");
    while ((gone = CTX__LOAD(&ctx__signals.gone, ACQUIRE)) != era)
        ctx__futex_wait(&ctx__signals.gone, gone, CTX_NO_DEADLINE);
    while (CTX__LOAD(&ctx__signals.era, ACQUIRE) == era) {
        while (sem_wait(&ctx__signals.posted) < 0) {}
        for (signal = 1; signal < CTX__SIGNALS; signal++)
            if (CTX__LOAD(&ctx__signals.pending[signal], RELAXED)) ctx__signal_deliver(signal);
    }
    gone = era; /* pairs with the load at the beginning of the next one; a fork in a callback has counted already */
    CTX__CAS(&ctx__signals.gone, &gone, era + 1, RELEASE, RELAXED);
    ctx__futex_wake(&ctx__signals.gone, INT32_MAX);
    return NULL;
}

/* [ctx__life] */
static int ctx__signal_start(void) {
    int rc = 0;
    if (ctx__signals.running) return 0;
    rc = ctx__thread_start(&ctx__signals.thread, ctx__signal_main, (void *)(uintptr_t)ctx__signals.era);
    ctx__signals.running = !rc;
    return rc;
}

/* Have the signal handled, or by default the next one only; or end the process. */
static int ctx__signal_action(int signal, bool handled, bool keep, struct sigaction *before) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handled ? ctx__signal_handler : SIG_DFL;
    action.sa_flags = SA_RESTART | (keep ? 0 : (int)SA_RESETHAND);
    sigemptyset(&action.sa_mask);
    return sigaction(signal, &action, before) < 0 ? -errno : 0;
}

/* [ctx__life] One less wants the signal. Without one that keeps the handler it is for the next signal only, and
   if that has come to all that are left, it is the default. */
static void ctx__signal_unhook(int signal, bool keep) {
    bool waiting = false;
    ctx__link_t *link;
    ctx__signals.kept[signal] -= keep;
    if (--ctx__signals.count[signal] == 0) {
        sigaction(signal, &ctx__signals.before[signal], NULL);
    } else if (keep && !ctx__signals.kept[signal]) {
        for (link = ctx__signals.live; link; link = link->next) {
            ctx__notify_t *notify = CTX__CONTAINER(link, ctx__notify_t, link);
            waiting = waiting || (ctx__signal_in(notify->wants, signal) && !ctx__why(&notify->node));
        }
        ctx__signal_action(signal, waiting, false, NULL);
    }
}

/* [ctx__life] Also when it is hooked already, for a first signal may have put the default action back. */
static int ctx__signal_hook(int signal, bool keep) {
    struct sigaction before;
    int rc;
    if (!ctx__signals.count[signal]) CTX__STORE(&ctx__signals.pending[signal], 0, RELAXED); /* from long ago */
    rc = ctx__signal_action(signal, true, keep || ctx__signals.kept[signal], &before);
    if (rc) return rc;
    if (ctx__signals.count[signal]++ == 0) ctx__signals.before[signal] = before;
    ctx__signals.kept[signal] += keep;
    return 0;
}

/* [ctx__life] Becomes the copy that handles signals, unless another one is. */
static bool ctx__signals_claim(void) {
    void *nobody = NULL;
    return CTX__CAS(&ctx__signals_owner, &nobody, (void *)&ctx__signals, ACQ_REL, ACQUIRE) || nobody == &ctx__signals;
}

/* [ctx__life] The last context or registration of this copy may have ended. */
static void ctx__signals_yield(void) {
    if (!ctx__signals_wanted()) CTX__STORE(&ctx__signals_owner, (void *)NULL, RELEASE);
}

/* [ctx__life] One more wants these. */
static int ctx__signals_hook(const uint64_t wants[2], bool keep) {
    int signal, rc = ctx__signals_claim() ? ctx__signal_start() : CTX_ALREADY;
    if (rc == CTX_ALREADY) return rc;
    for (signal = 1; !rc && signal < CTX__SIGNALS; signal++)
        if (ctx__signal_in(wants, signal) && ctx__signal_hook(signal, keep)) rc = CTX_INVALID;
    if (!rc) return 0;
    for (signal -= 2; signal > 0; signal--) /* the one before the last has failed */
        if (ctx__signal_in(wants, signal)) ctx__signal_unhook(signal, keep);
    ctx__signals_yield();
    return rc;
}

/* [ctx__life] One that wanted these has been taken out. */
static void ctx__signals_unhook(const uint64_t wants[2], bool keep) {
    int signal;
    for (signal = 1; signal < CTX__SIGNALS; signal++)
        if (ctx__signal_in(wants, signal)) ctx__signal_unhook(signal, keep);
    ctx__signals_yield();
}

/* A notifying context was ended, or its last reference dropped. */
static void ctx__notify_ended(ctx_t *node) {
    ctx__notify_t *notify = (ctx__notify_t *)(void *)node;
    ctx__life_lock();
    if (notify->link.pprev) {
        ctx__link_out(&notify->link);
        ctx__signals_unhook(notify->wants, notify->second != NULL);
    }
    ctx__life_unlock();
}

/* The set of these. Returns 0, or CTX_INVALID. */
static int ctx__signals_of(const int *signals, size_t n, uint64_t set[2]) {
    size_t i;
    if (!signals || !n) return CTX_INVALID;
    for (i = 0; i < n; i++) {
        if (signals[i] < 1 || signals[i] >= CTX__SIGNALS) return CTX_INVALID;
        ctx__signal_set(set, signals[i], true);
    }
    return 0;
}

/* The context of ctx_notify_signals(). `second` may be NULL, and must outlive it else. */
static ctx_t *ctx__notify_make(ctx_t *parent, const int *signals, size_t n, const char *site, ctx_t *second) {
    ctx_t *bad = ctx__bad_parent(parent);
    ctx__make_t make = ctx__make_plain;
    uint64_t wants[2] = { 0, 0 };
    ctx__notify_t *notify;
    int rc;
    if (bad) return bad;
    if (ctx__signals_of(signals, n, wants)) return ctx__failed(CTX_INVALID);
    notify = ctx__me()->linked ? (ctx__notify_t *)ctx__alloc(sizeof *notify) : NULL;
    if (!notify) return ctx__failed(CTX_NO_MEMORY);
    memcpy(notify->wants, wants, sizeof wants);
    notify->second = second;
    ctx__me();
    make.flags = CTX__F_NOTIFY;
    make.site = site;
    ctx__make(parent, &notify->node, &make);
    ctx__life_lock();
    rc = ctx__signals_hook(notify->wants, second != NULL);
    if (!rc) ctx__link_in(&ctx__signals.live, &notify->link);
    ctx__life_unlock();
    if (!rc) return &notify->node;
    ctx_end_at(&notify->node, NULL);
    return ctx__failed(rc);
}

CTXCANCEL_API ctx_t *ctx_notify_signals_at(ctx_t *parent, const int *signals, size_t n, const char *site) {
    return ctx__notify_make(parent, signals, n, site, NULL);
}

CTXCANCEL_API int ctx_on_signals(ctx_on_signals_t *reg, ctx_t *ctx, const int *signals, size_t n,
                                 void (*fn)(int signal, void *user), void *user) {
    uint64_t wants[2] = { 0, 0 };
    int rc = ctx && fn && reg ? ctx__signals_of(signals, n, wants) : CTX_INVALID;
    if (!rc) rc = ctx_err(ctx);
    if (!rc && !ctx__me()->linked) rc = CTX_NO_MEMORY;
    if (!rc) ctx__timer_revive(ctx);
    if (!reg) return rc;
    ctx__life_lock(); /* a stop on another thread may be waiting for the call that registers it anew */
    memset(reg, 0, sizeof *reg);
    if (!rc) rc = ctx__signals_hook(wants, true);
    if (!rc) {
        memcpy(reg->wants, wants, sizeof wants);
        reg->fn = fn;
        reg->call.arg = user;
        reg->call.ctx = ctx_retain(ctx);
        reg->call.flags = (int)(ctx__self.index * CTX__REG_THREAD);
        CTX__STORE(&reg->call.state, CTX__REG_LINKED, RELEASE);
        ctx__queue_add(&ctx__signals.regs, &reg->link);
    }
    ctx__life_unlock();
    return rc;
}

/* [ctx__life] Its context is for the caller to release. */
static ctx_t *ctx__on_signals_out(ctx_on_signals_t *reg) {
    ctx__queue_out(&ctx__signals.regs, &reg->link);
    CTX__STORE(&reg->call.state, CTX__REG_IDLE, RELEASE);
    ctx__signals_unhook(reg->wants, true);
    return reg->call.ctx;
}

CTXCANCEL_API void ctx_on_signals_stop(ctx_on_signals_t *reg) {
    bool again;
    ctx_t *ctx;
    CTXCANCEL_ASSERT(ctx__set(reg));
    do {
        ctx__life_lock();
        ctx = reg->link.pprev ? ctx__on_signals_out(reg) : NULL;
        ctx__life_unlock();
        again = ctx__frame_wait(&reg->call); /* the call may have registered it anew */
        ctx_release(ctx);
    } while (again);
}

CTXCANCEL_API int ctx_poll_fd(ctx_t *ctx, int fd, short events) {
    struct pollfd fds[2];
    int rc = ctx_err(ctx);
    if (rc) return rc;
    if (fd < 0) return -EBADF;
    fds[0].fd = fd, fds[0].events = events, fds[0].revents = 0;
    rc = ctx__poll(fds, 1, 0);
    if (rc < 0 || fds[0].revents) return rc < 0 ? rc : fds[0].revents;
    return ctx__wait_fd(ctx, fds);
}

/* -- fork --

   No thread is inside the library while the process forks: the gate of section 1 sees to it. So in the child no lock
   behind the gate is taken and what they guard is whole (locks of pools, semaphores, groups, channels and batchers may
   be taken: the child must not use those). The child handler only takes out what belongs to threads that it has not:
   their callbacks, waits and frames, the sleepers of the fake clock, the runners. It goes through the nodes that have
   callbacks or a descriptor, and through no others, however many contexts there are.

     open --ctx__fork_prepare()--> closed, emptying --nobody inside--> fork --> open in both processes

   The child keeps every context, deadline and descriptor. A context that is done may have callbacks left which another
   thread was about to call in the parent: those of the thread that forked are handed to the child's runtime thread.
   Pools made before are closed, for their threads are the parent's. If the runtime thread forks, inside a callback, it
   is the child's runtime thread too, and ends when nothing is left to do for it. */

static void ctx__fork_prepare(void) {
    ctx__thread_t *me = ctx__me();
    ctx__link_t *link;
    unsigned turn = 0;
    bool fenced;
    CTXCANCEL_ASSERT((me->inside & ~CTX__STRANGER) == 0); /* not from an allocator */
    ctx__lock(&ctx__gate.mu);
    CTX__STORE(&ctx__gate.forking, me, RELEASE);
    CTX__OR(&ctx__gate.word, (uint32_t)CTX__GATE_CLOSED, SEQ_CST);
    fenced = (CTX__LOAD(&ctx__gate.word, RELAXED) & CTX__GATE_FENCES) || ctx__fences();
    CTXCANCEL_ASSERT(fenced); /* the system said that it can */
    for (link = ctx__gate.threads; link; link = link->next) {
        ctx__thread_t *thread = CTX__CONTAINER(link, ctx__thread_t, link);
        while (thread != me && (CTX__LOAD(&thread->inside, SEQ_CST) & ~CTX__STRANGER)) ctx__relax(&turn);
    }
    (void)fenced;
}

static void ctx__fork_parent(void) {
    CTX__STORE(&ctx__gate.forking, (ctx__thread_t *)NULL, RELEASE);
    if (CTX__AND(&ctx__gate.word, (uint32_t)CTX__GATE_FENCES, ACQ_REL) & CTX__GATE_SLEPT_ON)
        ctx__futex_wake(&ctx__gate.word, INT32_MAX);
    ctx__unlock(&ctx__gate.mu);
}

/* Is it the library's, or was it registered by the thread that has forked? */
static bool ctx__fork_keeps(const ctx_on_done_t *reg) {
    return (reg->flags & CTX__REG_OWN) || (unsigned)reg->flags / CTX__REG_THREAD == ctx__self.index;
}

/* Drop the callbacks of threads that are gone, for their storage may go with their stacks. */
static void ctx__fork_forget(ctx_t *node) {
    ctx_on_done_t *all = node->on_done, *reg, *next;
    node->on_done = NULL;
    if (all) all->prev->next = NULL;
    for (reg = all; reg; reg = next) {
        next = reg->next;
        reg->state = ctx__fork_keeps(reg) ? CTX__REG_LINKED : CTX__REG_IDLE; /* a thread may have been stopping it */
        if (reg->state == CTX__REG_LINKED) ctx__reg_link(node, reg);
    }
}

enum { CTX__WATCHED_CALLING = 2 }; /* this thread is about to call its callbacks */

static ctx_t *ctx__called_nodes(ctx__scope_t *scope) {
    return scope->kind == CTX__IN_CALLBACK ? CTX__CONTAINER(scope, ctx__calling_t, scope)->first : NULL;
}

static void ctx__fork_mark_calling(bool on) {
    ctx__scope_t *scope;
    ctx_t *node;
    for (scope = ctx__self.scope; scope; scope = scope->outer)
        for (node = ctx__called_nodes(scope); node; node = node->work)
            node->watched = (uint8_t)((node->watched & 1) | (on ? CTX__WATCHED_CALLING : 0));
}

static void ctx__fork_node(ctx_t *node, ctx_t **dead) {
    bool had = node->on_done != NULL;
    ctx__fork_forget(node);
    if (node->event) {
        ctx__event_unshare(node->event);
        if (ctx__done(node)) ctx__event_set(node->event);
    }
    if (had && node->list.orphan && ctx__list_idle(node, &node->list)) ctx__pin_drop(node, dead);
    if (!node->on_done || !ctx__done(node) || (node->watched & CTX__WATCHED_CALLING) || !ctx__pin(node)) return;
    node->work = ctx__runtime.pending;
    if (!node->work) ctx__runtime.pending_last = node;
    ctx__runtime.pending = node;
}

static void ctx__fork_nodes(void) {
    ctx_t *dead = NULL;
    ctx__link_t *link;
    unsigned i;
    ctx__runtime.pending = NULL;
    ctx__fork_mark_calling(true);
    for (i = 0; i < CTX__STRIPES; i++)
        for (link = ctx__watched[i].first; link; link = link->next)
            ctx__fork_node(CTX__CONTAINER(link, ctx_t, watch), &dead);
    ctx__fork_mark_calling(false);
    ctx__bury(dead);
}

/* Keep the frames of callbacks that this thread is in; nobody waits for them any more. */
static void ctx__fork_frames(void) {
    unsigned i;
    for (i = 0; i < CTX__STRIPES; i++) {
        ctx__frame_t **at = &ctx__stripes[i].frames;
        while (*at) {
            (*at)->stoppers = NULL;
            if ((*at)->thread != &ctx__self) *at = (*at)->next;
            else at = &(*at)->next;
        }
    }
}

/* Drop the registrations for signals that other threads made, before a thread of the child's may get their stacks. What
   the parent was about to tell is not the child's. */
static void ctx__fork_signals(void) {
    ctx_on_done_t *dropped = NULL;
    ctx__link_t *link, *next;
    ctx__life_lock();
    for (link = ctx__signals.regs.first; link; link = next) {
        ctx_on_signals_t *reg = CTX__CONTAINER(link, ctx_on_signals_t, link);
        next = link->next;
        memset(reg->due, 0, sizeof reg->due);
        if (ctx__fork_keeps(&reg->call)) continue;
        ctx__on_signals_out(reg);
        reg->call.next = dropped;
        dropped = &reg->call;
    }
    ctx__life_unlock();
    for (; dropped; dropped = dropped->next) ctx_release(dropped->ctx);
}

static void ctx__fork_child(void) {
    ctx__thread_t *me = &ctx__self;
    unsigned i;
    ctx__forks++;
    ctx__gate.threads = NULL;
    if (me->linked) ctx__link_in(&ctx__gate.threads, &me->link);
    ctx__futex_init();
    ctx__runtime.running = ctx__runtime.running && me->runtime;
    ctx__runtime.nags = NULL;
    ctx__signals.running = false;
    ctx__signals.gone = ++ctx__signals.era; /* this thread may be the one that waited for signals */
    for (i = 0; i < CTX__WHEELS; i++) ctx__wheels[i].started = 0;
    memset(&ctx__wheels[CTX__WHEELS], 0, sizeof *ctx__wheels);
    ctx__wheels[CTX__WHEELS].tick = ctx__tick_of(ctx_now());
    ctx__pollers_forget();
    ctx__fork_frames();
    ctx__fork_nodes();
    ctx__lookers = 0;
    ctx__clock.starting = 0;
    ctx__clock.running = ctx__clock_word(ctx__clock.era, 0, me->counted && me->counted == ctx__clock.era);
    ctx__runners_forget();
    ctx__fork_parent(); /* opens the gate */
    ctx__fork_signals();
    if (CTX__TSAN) return; /* it does not allow threads in the child of a threaded process */
    if (ctx__timers_armed() || ctx__runtime.pending) ctx__timer_ready();
    ctx__life_lock();
    if (ctx__signals_wanted()) ctx__signal_start();
    ctx__life_unlock();
}

/* -- the beginning and the end -- */

/* The largest power of two up to `n`, and to `most`. */
static unsigned ctx__power(unsigned n, unsigned most) {
    unsigned p = 1;
    while (p * 2 <= n && p * 2 <= most) p *= 2;
    return p;
}

static void ctx__setup(void) {
    int rc = 0;
    ctx__cpus = ctx__cpu_count();
    ctx__shard_count = ctx__power(ctx__cpus * 2, CTX__SHARDS_MAX);
    if (ctx__shard_count < 4) ctx__shard_count = 4;
    ctx__wheel_count = ctx__power(ctx__cpus * 2, CTX__WHEELS);
    if (!ctx__fences_available()) ctx__gate.word = CTX__GATE_FENCES;
    rc |= sem_init(&ctx__signals.posted, 0, 0);
    rc |= pthread_atfork(ctx__fork_prepare, ctx__fork_parent, ctx__fork_child);
    rc |= pthread_key_create(&ctx__thread_key, ctx__thread_leave);
    CTX__STORE(&ctx__thread_keyed, rc == 0, RELEASE); /* else no context can be made */
}

/* When the code is unloaded the key's destructor goes with it. */
__attribute__((destructor)) static void ctx__unload(void) {
    if (CTX__EXCHANGE(&ctx__thread_keyed, false, ACQ_REL)) pthread_key_delete(ctx__thread_key);
}

CTXCANCEL_API void ctx_runtime_stop(void) {
    pthread_t runtime, signals;
    bool join_runtime, join_signals;
    ctx__event_t event;
    unsigned i;
    ctx__me();
    ctx__runners_stop();
    ctx__life_lock();
    join_runtime = ctx__runtime.running != 0;
    join_signals = ctx__signals.running && !ctx__signals_wanted();
    runtime = ctx__runtime.thread;
    signals = ctx__signals.thread;
    CTX__ADD(&ctx__runtime.era, 1u, RELEASE);
    CTX__STORE(&ctx__runtime.running, 0u, RELEASE);
    CTX__ADD(&ctx__signals.era, (uint32_t)join_signals, RELEASE);
    ctx__signals.running = ctx__signals.running && !join_signals;
    ctx__life_unlock();
    /* Joined without the lock: a callback on one of them may be waiting for it. */
    if (join_runtime) {
        ctx__runtime_kick();
        ctx__thread_join(runtime);
    }
    if (join_signals) {
        sem_post(&ctx__signals.posted);
        ctx__thread_join(signals);
    }
    ctx__runtime_call_pending(); /* that no thread was there for */
    ctx__enter(&ctx__runtime.mu);
    event = ctx__event_done;
    ctx__event_done.fd = ctx__event_done.writer = -1;
    ctx__leave(&ctx__runtime.mu);
    ctx__event_close(&event);
    for (i = 0; i < ctx__wheel_count; i++) {
        ctx__enter(&ctx__wheels[i].mu);
        ctx__wheels[i].started = 0;
        ctx__leave(&ctx__wheels[i].mu);
    }
    ctx__poller_close(&ctx__self);
    ctx__cache_flush(&ctx__self);
    ctx__clock_resume();
}

/* == 14. service ================================================== */

/* While a service is stopped its phase only grows, and each of its callbacks is launched by the one step into a phase:
   so each runs at most once, and in the order refuse, drain, cancel, force.

       NEW <----> STARTING ----> RUNNING ----> QUIET ----> CANCELED ----> FORCED
        |            |  ctx is    (refuse and     ^  ctx is     |   (force)  |
        |            v  canceled   drain run)     |  canceled   |            |
        |         ABORTED --- start went well ----/             |            |
        |            | start failed                             |            |
        \------------+------------------------------------------+------------+----> OVER

   Before QUIET: NEW was never started, or its start has failed; STARTING has a `start` under way; ABORTED is such a one
   to which a stop came. From CANCELED on a service is OVER as soon as nothing of it is active, and the thread that
   brings that about makes it so. All other steps are the supervisor's: the thread in ctx_service_stop(), ctx_app_run()
   or ctx_cleanup_run(). It takes each service as far as it goes when something of it has changed or its `deadline` has
   come. The deadlines are
     up to RUNNING   the time at which it must begin in order to be in time; it begins earlier if nobody needs it
     QUIET           what refuse and drain have
     others          the end of the grace period. After CANCELED comes FORCED if there is a force. Then what it needs
                     goes on to stop, as if it had stopped, and it has until the end of the budget; then it is late
   No deadline is later than budget and grace period, and the supervisor calls nothing of the program's. A service is
   canceled `grace` before the end of the budget at the latest, so one that stops when it is told does so inside the
   budget. Once the budget of an app has passed, or a second signal has come, nothing waits for anything but on_force,
   which is the force of a service of its own: the hook.

   A cleanup is a service that is RUNNING when it is made and has nothing but a drain, which only its own deadline
   cancels. So it is over when that has returned.

   Each callback runs on a thread of its own (section 10). When none can be had it goes to the spare thread, which runs
   them one after the other. That thread is there from the first start of a service that has such callbacks, or from the
   first cleanup, until no service is left.

   One lock guards all of this, of all services. It is cold, and nothing of the program's runs under it. A service is
   counted: its owner and each active callback hold it, and it holds its app. So a stuck one is left behind and nothing
   that it touches is freed. What a stop needs is allocated with the service: the context of the drain too. */

#define CTX__NEVER INT64_MIN /* the time of what has not happened */

enum { CTX__NEW, CTX__STARTING, CTX__RUNNING, CTX__ABORTED, CTX__QUIET, CTX__CANCELED, CTX__FORCED, CTX__OVER };
enum { CTX__UNDECIDED, CTX__RUN, CTX__LEAVE };

typedef struct {
    ctx__link_t link; /* [mu] in the queue of the spare thread */
    ctx__job_t job;
} ctx__spare_call_t;

/* A stop, and what its supervisor knows. [mu], all but what is set before it begins. */
typedef struct ctx__stop {
    ctx__queue_t members;  /* services */
    size_t n, left;        /* of these; not over */
    size_t critical;       /* of these, that the others wait for */
    ctx_time_t start, end; /* of the budget */
    ctx_dur_t budget, took;
    ctx_time_t earliest;   /* no deadline is sooner; CTX__NEVER: go through all */
    bool app, cleanups;    /* of what; neither: one service */
    bool hurry;            /* of an app: the budget has passed, or a second signal has come */
    ctx_t *second;         /* done at the second signal; else the background */
    ctx_service_t *hook;   /* on_force, as the force of a service (may be NULL) */
    int code;              /* cause of the cancels */
    const char *what;
    const char *site;      /* of an app: what began its shutdown */
    int failed_rc;         /* of the first member that failed */
    const char *failed;    /* its name */
    int rc;                /* result */
    ctx__queue_t changed;  /* services for the supervisor to look at */
    ctx__queue_t waiting;  /* the supervisor */
} ctx__stop_t;

struct ctx_service {
    ctx_service_desc_t desc;    /* [const] defaults resolved */
    void (*on_late)(const char *name, int rc, ctx_dur_t took, void *arg); /* [const] of a cleanup */
    bool cleanup, critical;     /* [const] */
    ctx_t *parent;              /* [const] a reference */
    ctx_t *ctx;                 /* [const] of start and run */
    ctx_app_t *app;             /* [const] whose it is; a reference */
    ctx_t *drain_ctx;           /* [supervisor] */
    void *drain_node;           /* [supervisor] memory for that; NULL: used */
    uint32_t refs;              /* [atomic] */
    ctx__link_t link;           /* [mu] all services */
    ctx__link_t member;         /* [mu] of a stop */
    ctx__link_t change;         /* [mu] in the stop's queue */
    ctx__stop_t *stop;          /* [mu] its supervisor's; NULL: none, or that has gone */
    ctx__queue_t waiters;       /* [mu] for one of the fields below to change */
    ctx__spare_call_t calls[2];       /* [mu] quiet and force */
    uint8_t phase;              /* [mu] from here on */
    uint8_t decided;            /* whether `run` shall run */
    int active;                 /* callbacks that have not returned */
    bool started;               /* start went well */
    bool quiet;                 /* refuse and drain have returned */
    bool released;              /* what it needs has been told that it does not need that any more */
    bool late;
    bool marked;                /* scratch of a thread that goes over all services */
    ctx_time_t began, noticed, drained, canceled, forced, finished; /* CTX__NEVER: not yet */
    ctx_time_t deadline;        /* of the phase */
    int rc;                     /* the first error */
    ctx__tally_t tally;         /* [atomic] */
    ctx_service_t **needs;      /* [const while an app runs] what `.needs` names: array of stb_ds.h */
    size_t dependents;          /* services that need this one and have not released it */
    ctx__stop_t own;            /* the stop of a service that has no app */
};

static struct {
    uint32_t mu;
    ctx__link_t *all;     /* [mu] those that their owners have */
    ctx__queue_t calls;   /* [mu] for the spare thread */
    ctx__queue_t waiting; /* [mu] that thread */
    bool spare;           /* [mu] it is there, ... */
    unsigned forks;       /* [mu] ... in this process */
} ctx__services;

struct ctx_app {
    ctx__stop_t stop;         /* of its services */
    ctx_t *parent;            /* [const] a reference */
    ctx_t *ctx;               /* [const] detached from it: the services stop in order */
    ctx_t *stopping;          /* [const] below that: done when the shutdown begins. Lives as long as the app's memory */
    ctx_t *first, *second;    /* [owner thread] done at the first and at the second signal */
    ctx_t *over;              /* [owner thread] done when `first` or the parent is */
    uint32_t refs;            /* [atomic] the owner, and each service */
    int ready;                /* [atomic] */
};

#define CTX__MEMBER(l) CTX__CONTAINER(l, ctx_service_t, member)

static void ctx__app_unref(ctx_app_t *app) {
    if (!app || CTX__SUB(&app->refs, 1u, ACQ_REL) != 1) return;
    ctx_release(app->stopping);
    CTXCANCEL_FREE(app);
}

static void ctx__service_unref(ctx_service_t *service) {
    if (CTX__SUB(&service->refs, 1u, ACQ_REL) != 1) return;
    ctx_end_at(service->ctx, NULL);
    ctx_end_at(service->drain_ctx, NULL);
    ctx_release(service->parent);
    ctx__app_unref(service->app);
    CTXCANCEL_FREE(service->drain_node);
    stbds_arrfree(service->needs);
    CTXCANCEL_FREE(service);
}

/* [mu] Is there a spare thread? Not in the child of a fork, if it was the parent's. */
static bool ctx__spare_is_there(void) { return ctx__services.spare && ctx__services.forks == ctx__forks; }

/* The owner lets go of it. */
static void ctx__service_drop(ctx_service_t *service) {
    ctx__enter(&ctx__services.mu);
    ctx__link_out(&service->link);
    if (!ctx__services.all && ctx__spare_is_there()) ctx__wake_all(&ctx__services.waiting);
    ctx__leave(&ctx__services.mu);
    ctx__service_unref(service);
}

/* -- the spare thread -- */

static bool ctx__spare_due(void *unused) {
    (void)unused;
    return ctx__services.calls.first || !ctx__services.all;
}

static void ctx__spare_job(const ctx__job_t *unused) {
    ctx__job_t job;
    (void)unused;
    ctx__enter(&ctx__services.mu);
    for (;;) {
        ctx__link_t *link;
        ctx__await(&ctx__services.mu, &ctx__services.waiting, ctx__spare_due, NULL, &ctx__root, CTX_NO_DEADLINE);
        link = ctx__services.calls.first;
        if (!link) break;
        ctx__queue_out(&ctx__services.calls, link);
        job = CTX__CONTAINER(link, ctx__spare_call_t, link)->job;
        ctx__leave(&ctx__services.mu);
        job.run(&job);
        ctx__enter(&ctx__services.mu);
    }
    ctx__services.spare = false;
    ctx__leave(&ctx__services.mu);
}

/* Start it, unless it is there. Called by the owner of a service, so that there is one. 0, or CTX_NO_MEMORY. */
static int ctx__spare_start(void) {
    ctx__job_t job;
    bool start;
    int rc;
    ctx__enter(&ctx__services.mu);
    start = !ctx__spare_is_there();
    if (ctx__services.forks != ctx__forks) { /* so were its calls */
        memset(&ctx__services.calls, 0, sizeof ctx__services.calls);
        memset(&ctx__services.waiting, 0, sizeof ctx__services.waiting);
        ctx__services.forks = ctx__forks;
    }
    ctx__services.spare = true;
    ctx__leave(&ctx__services.mu);
    if (!start) return 0;
    memset(&job, 0, sizeof job);
    job.run = ctx__spare_job;
    rc = ctx__run(&job);
    if (!rc) return 0;
    ctx__enter(&ctx__services.mu);
    ctx__services.spare = false;
    ctx__leave(&ctx__services.mu);
    return rc;
}

/* -- what a service's own threads do -- */

/* [mu] Have the supervisor look at it. */
static void ctx__service_changed(ctx_service_t *service) {
    if (!service->stop || service->change.pprev) return;
    ctx__queue_add(&service->stop->changed, &service->change);
    ctx__wake_all(&service->stop->waiting);
}

/* [mu] What it needed and nobody else needs stops next. */
static void ctx__service_release(ctx_service_t *service) {
    size_t i;
    if (service->released) return;
    service->released = true;
    for (i = 0; i < stbds_arrlenu(service->needs); i++)
        if (--service->needs[i]->dependents == 0) ctx__service_changed(service->needs[i]);
    if (service->critical && --service->stop->critical == 0) service->stop->earliest = CTX__NEVER;
}

/* [mu] The end of its way through a stop. */
static void ctx__service_over(ctx_service_t *service, bool late) {
    ctx__stop_t *stop = service->stop;
    service->phase = CTX__OVER;
    service->deadline = CTX_NO_DEADLINE;
    service->late = late;
    stop->left--;
    ctx__service_release(service);
    if (service == stop->hook) stop->earliest = CTX__NEVER;
    if (!stop->left || stop->earliest == CTX__NEVER) ctx__wake_all(&stop->waiting);
}

/* [mu] It has reacted; the first error counts, for its stop too. */
static void ctx__service_note(ctx_service_t *service, int rc) {
    ctx__stop_t *stop = service->stop;
    if (service->phase == CTX__OVER) return;
    if (service->noticed == CTX__NEVER) service->noticed = ctx_now();
    if (!rc || service->rc) return;
    service->rc = rc;
    if (!stop || stop->failed_rc) return;
    stop->failed_rc = rc;
    stop->failed = service->desc.name;
    ctx__wake_all(&stop->waiting);
}

/* [mu] A callback has returned for good. */
static void ctx__service_inactive(ctx_service_t *service) {
    bool through = service->cleanup || service->phase >= CTX__CANCELED ||
                   (service->phase == CTX__ABORTED && !service->started);
    if (--service->active == 0) {
        service->finished = ctx_now();
        ctx__wake_all(&service->waiters);
        if (through && service->stop && service->phase != CTX__OVER) ctx__service_over(service, false);
    }
    if (service->phase < CTX__CANCELED) ctx__service_changed(service);
}

/* A callback begins: what it drains is counted for the service. */
static void ctx__service_enter(ctx_service_t *service, ctx__serving_t *serving, bool drains) {
    serving->tally = &service->tally;
    serving->drains = drains;
    serving->excused = false;
    ctx__scope_enter(&serving->scope, CTX__IN_SERVICE, service);
}

static void ctx__service_leave(const ctx__serving_t *serving) { ctx__scope_leave(&serving->scope); }

/* [mu] The callback has returned. */
static void ctx__service_returned(ctx_service_t *service, bool excused) {
    if (!excused) ctx__service_inactive(service);
}

/* An error of run cancels the services below the same parent. */
static void ctx__service_cancel_siblings(ctx_service_t *service, int rc) {
    ctx__link_t *link;
    for (;;) {
        ctx_t *ctx = NULL;
        ctx__enter(&ctx__services.mu);
        for (link = ctx__services.all; link && !ctx; link = link->next) {
            ctx_service_t *sibling = CTX__CONTAINER(link, ctx_service_t, link);
            if (sibling == service || sibling->parent != service->parent || sibling->cleanup) continue;
            if (!ctx_err(sibling->ctx)) ctx = ctx_retain(sibling->ctx);
        }
        ctx__leave(&ctx__services.mu);
        if (!ctx) return;
        ctx_cancel_cause_at(ctx, rc, service->desc.name, "ctx_service_start");
        ctx_release(ctx);
    }
}

static bool ctx__service_decided(void *arg) {
    const ctx_service_t *service = (const ctx_service_t *)arg;
    return service->decided != CTX__UNDECIDED || service->phase > CTX__RUNNING;
}

/* Its thread is there before `start` is called, so that a start which went well cannot fail for want of one. */
static void ctx__service_run_job(const ctx__job_t *job) {
    ctx_service_t *service = (ctx_service_t *)job->owner;
    ctx__serving_t serving;
    bool runs, alone;
    int rc = 0;
    ctx__enter(&ctx__services.mu);
    ctx__await(&ctx__services.mu, &service->waiters, ctx__service_decided, service, &ctx__root, CTX_NO_DEADLINE);
    runs = service->decided == CTX__RUN;
    ctx__leave(&ctx__services.mu);
    ctx__service_enter(service, &serving, false);
    if (runs) rc = service->desc.run(service->ctx, service->desc.user);
    ctx__service_leave(&serving);
    if (rc && rc == ctx_err(service->ctx)) rc = 0; /* it was told to stop */
    ctx__enter(&ctx__services.mu);
    alone = rc && !service->app && service->phase == CTX__RUNNING;
    if (rc || (runs && service->phase != CTX__RUNNING)) ctx__service_note(service, rc);
    if (alone) {
        ctx__leave(&ctx__services.mu);
        ctx__service_cancel_siblings(service, rc);
        ctx__enter(&ctx__services.mu);
    }
    ctx__service_returned(service, serving.excused);
    ctx__leave(&ctx__services.mu);
    ctx__service_unref(service);
}

/* Takes note that `refuse` has returned, if it has. Returns true if the next of the two may begin: not after force or
   the stop, unless it is a cleanup. */
static bool ctx__service_may_drain(ctx_service_t *service, bool refused) {
    bool may;
    ctx__enter(&ctx__services.mu);
    if (refused) ctx__service_note(service, 0);
    may = service->cleanup || service->phase < CTX__FORCED;
    ctx__leave(&ctx__services.mu);
    return may;
}

static void ctx__service_quiet_job(const ctx__job_t *job) {
    ctx_service_t *service = (ctx_service_t *)job->owner;
    bool drains = ctx__service_may_drain(service, false), late;
    ctx__serving_t serving;
    ctx_time_t now;
    int rc = 0;
    ctx__service_enter(service, &serving, true);
    if (service->desc.refuse && drains) {
        service->desc.refuse(service->desc.user);
        drains = ctx__service_may_drain(service, true);
    }
    drains = drains && service->desc.drain;
    if (drains) rc = service->desc.drain(job->ctx, service->desc.user);
    ctx__service_leave(&serving);
    if (rc == CTX_CANCELED && ctx_err(job->ctx) && !service->cleanup)
        rc = CTX_DEADLINE_EXCEEDED; /* only its time can have run out */
    now = ctx_now();
    ctx__enter(&ctx__services.mu);
    late = service->phase == CTX__OVER;
    ctx__service_note(service, rc);
    if (drains && !service->cleanup) service->drained = now;
    service->quiet = true;
    ctx__service_returned(service, serving.excused);
    ctx__leave(&ctx__services.mu);
    if (late && service->on_late) service->on_late(service->desc.name, rc, now - service->began, service->desc.user);
    ctx__service_unref(service);
}

static void ctx__service_force_job(const ctx__job_t *job) {
    ctx_service_t *service = (ctx_service_t *)job->owner;
    ctx__serving_t serving;
    ctx__service_enter(service, &serving, false);
    service->desc.force(service->desc.user);
    ctx__service_leave(&serving);
    ctx__enter(&ctx__services.mu);
    ctx__service_returned(service, serving.excused);
    ctx__leave(&ctx__services.mu);
    ctx__service_unref(service);
}

/* [mu, released meanwhile] Make a callback active. Without a thread of its own it goes to the spare one if there is a
   `call`, for then it must not be left out. Returns 0, or CTX_NO_MEMORY. */
static int ctx__service_launch(ctx_service_t *service, ctx__spare_call_t *call, void (*run)(const ctx__job_t *job),
                               ctx_t *ctx) {
    ctx__job_t job;
    int rc;
    memset(&job, 0, sizeof job);
    job.run = run;
    job.owner = service;
    job.ctx = ctx;
    job.name = service->desc.name;
    CTX__ADD(&service->refs, 1u, RELAXED);
    service->active++;
    ctx__leave(&ctx__services.mu);
    rc = ctx__run(&job);
    ctx__enter(&ctx__services.mu);
    if (!rc) return 0;
    if (!call) {
        service->active--;
        CTX__SUB(&service->refs, 1u, RELAXED); /* not the last: the caller's is still there */
        return rc;
    }
    if (ctx__spare_is_there()) {
        call->job = job;
        ctx__queue_add(&ctx__services.calls, &call->link);
        ctx__wake_all(&ctx__services.waiting);
        return 0;
    }
    ctx__leave(&ctx__services.mu); /* in the child of a fork, if it was started in the parent */
    run(&job);
    ctx__enter(&ctx__services.mu);
    return 0;
}

/* -- one service's way through a stop: by the supervisor; each [mu, released meanwhile] -- */

/* When it must be canceled to have its grace period inside the budget. */
static ctx_time_t ctx__stop_cut(const ctx__stop_t *stop, const ctx_service_t *service) {
    ctx_dur_t grace = service->desc.grace;
    if (stop->end == CTX_NO_DEADLINE) return CTX_NO_DEADLINE;
    return ctx_time_add(stop->end, -(grace < stop->budget / 2 ? grace : stop->budget / 2));
}

/* The end of a grace period that begins now. */
static ctx_time_t ctx__stop_grace(const ctx__stop_t *stop, const ctx_service_t *service, ctx_time_t now) {
    return ctx_time_add(ctx__min(now, stop->end), service->desc.grace);
}

static void ctx__stop_deadline(ctx__stop_t *stop, ctx_service_t *service, ctx_time_t deadline) {
    service->deadline = deadline;
    stop->earliest = ctx__min(stop->earliest, deadline);
}

/* Its last grace period has passed. */
static void ctx__stop_overdue(ctx__stop_t *stop, ctx_service_t *service, ctx_time_t now) {
    if (stop->hurry || now >= stop->end) {
        ctx__service_over(service, true);
        return;
    }
    ctx__stop_deadline(stop, service, stop->end);
    ctx__service_release(service);
}

/* To CANCELED, or to ABORTED. A cleanup is canceled by its own deadline alone. */
static void ctx__stop_cancel(ctx__stop_t *stop, ctx_service_t *service, uint8_t phase) {
    ctx_time_t now = ctx_now(), own = service->drain_ctx ? ctx_deadline(service->drain_ctx) : CTX_NO_DEADLINE;
    service->phase = phase;
    if (service->cleanup && own <= now) service->canceled = own;
    if (!service->cleanup && service->canceled == CTX__NEVER) service->canceled = now;
    ctx__stop_deadline(stop, service, ctx__stop_grace(stop, service, now));
    ctx__wake_all(&service->waiters);
    ctx__leave(&ctx__services.mu);
    if (!service->cleanup)
        ctx__cancel(service->ctx, ctx__reason(stop->code, stop->what, "ctx_service_stop"), false);
    if (own <= now) ctx__expire(service->drain_ctx);
    else if (service->drain_ctx && !service->cleanup) ctx_cancel_at(service->drain_ctx, NULL);
    ctx__enter(&ctx__services.mu);
    if (service->phase != CTX__OVER && !service->active && (phase == CTX__CANCELED || !service->started))
        ctx__service_over(service, false);
}

static void ctx__stop_force(ctx__stop_t *stop, ctx_service_t *service) {
    service->phase = CTX__FORCED;
    service->forced = ctx_now();
    ctx__stop_deadline(stop, service, ctx__stop_grace(stop, service, service->forced));
    ctx__service_launch(service, &service->calls[1], ctx__service_force_job, NULL);
}

/* The context of drain: detached, for the service's own may be done. Without a timer thread it has its deadline all the
   same: a thread that waits ends it itself, and the supervisor does. */
static ctx_t *ctx__service_drain_ctx(ctx_service_t *service, ctx_time_t deadline) {
    ctx__make_t make = ctx__make_plain;
    ctx_t *node = (ctx_t *)service->drain_node;
    make.detach = true;
    make.name = service->desc.name;
    make.site = "ctx_service_stop";
    if (deadline != CTX_NO_DEADLINE && !ctx__timer_ready()) make.deadline = deadline;
    service->drain_node = NULL;
    node = ctx__make(service->ctx, node, &make);
    if (make.deadline != deadline) CTX__STORE(&node->timer.deadline, deadline, RELAXED);
    return service->drain_ctx = node;
}

/* Refuse and drain, if there is anything to do; then it is canceled. */
static void ctx__stop_quiet(ctx__stop_t *stop, ctx_service_t *service) {
    ctx_time_t deadline = ctx__stop_cut(stop, service), own = CTX_NO_DEADLINE;
    ctx_t *ctx;
    if (!service->desc.refuse && !service->desc.drain) {
        ctx__stop_cancel(stop, service, CTX__CANCELED);
        return;
    }
    if (service->desc.drain_budget > 0) own = ctx__from_now(service->desc.drain_budget);
    if (!service->cleanup || own == CTX_NO_DEADLINE) own = ctx__min(own, deadline);
    service->phase = CTX__QUIET;
    ctx__stop_deadline(stop, service, ctx__min(own, deadline));
    ctx__leave(&ctx__services.mu);
    ctx = ctx__service_drain_ctx(service, own);
    ctx__enter(&ctx__services.mu);
    ctx__service_launch(service, &service->calls[0], ctx__service_quiet_job, ctx);
}

/* Its turn has come. */
static void ctx__stop_begin(ctx__stop_t *stop, ctx_service_t *service) {
    service->began = ctx_now();
    if (service->phase == CTX__STARTING) ctx__stop_cancel(stop, service, CTX__ABORTED);
    else if (service->phase == CTX__RUNNING && !stop->hurry) ctx__stop_quiet(stop, service);
    else ctx__stop_cancel(stop, service, CTX__CANCELED);
}

/* Do those stand in its way that are to stop first? */
static bool ctx__stop_awaits(const ctx__stop_t *stop, const ctx_service_t *service) {
    return service->dependents || (stop->critical && !service->critical);
}

/* Does its force wait for on_force to return? No longer than that has, which is until the last grace period. */
static bool ctx__stop_holds_force(const ctx__stop_t *stop, const ctx_service_t *service) {
    return service->phase == CTX__CANCELED && service->desc.force && stop->hurry && stop->hook &&
           stop->hook->phase != CTX__OVER;
}

/* As far as it goes now. */
static void ctx__stop_advance(ctx__stop_t *stop, ctx_service_t *service, ctx_time_t now) {
    uint8_t phase;
    do {
        bool passed = now >= service->deadline;
        phase = service->phase;
        if (phase <= CTX__RUNNING) {
            if (passed || stop->hurry || !ctx__stop_awaits(stop, service)) ctx__stop_begin(stop, service);
        } else if (phase == CTX__ABORTED && service->started) {
            ctx__stop_quiet(stop, service);
        } else if (phase == CTX__QUIET) {
            if (passed || stop->hurry || service->quiet) ctx__stop_cancel(stop, service, CTX__CANCELED);
        } else if (phase == CTX__CANCELED && service->desc.force) {
            if ((passed || stop->hurry) && !ctx__stop_holds_force(stop, service)) ctx__stop_force(stop, service);
        } else if (phase != CTX__OVER && passed) {
            ctx__stop_overdue(stop, service, now);
        }
    } while (service->phase != phase);
}

/* The budget of an app has passed, or a second signal came: all that are left go on to canceled and forced. */
static void ctx__stop_hurry(ctx__stop_t *stop, ctx_time_t now) {
    ctx_time_t latest = CTX__NEVER;
    ctx__link_t *link;
    stop->hurry = true;
    stop->earliest = CTX__NEVER;
    for (link = stop->members.first; link; link = link->next) {
        ctx_service_t *service = CTX__MEMBER(link);
        ctx_time_t until = ctx__stop_grace(stop, service, now);
        if (until > latest) latest = until;
        if (service->phase != CTX__OVER) service->deadline = ctx__min(service->deadline, until);
    }
    if (!stop->hook) return;
    stop->left++;
    ctx__stop_force(stop, stop->hook);
    if (stop->hook->phase != CTX__OVER) stop->hook->deadline = latest;
}

/* Go through all; say when to do so again. */
static void ctx__stop_clock(ctx__stop_t *stop, ctx_time_t now) {
    ctx__link_t *link;
    stop->earliest = stop->app && !stop->hurry ? stop->end : CTX_NO_DEADLINE;
    for (link = stop->members.first; link; link = link->next) {
        ctx_service_t *service = CTX__MEMBER(link);
        ctx__stop_advance(stop, service, now);
        if (!ctx__stop_holds_force(stop, service)) stop->earliest = ctx__min(stop->earliest, service->deadline);
    }
    if (!stop->hurry || !stop->hook) return;
    ctx__stop_advance(stop, stop->hook, now);
    stop->earliest = ctx__min(stop->earliest, stop->hook->deadline);
}

/* The next service that has changed, or NULL. */
static ctx_service_t *ctx__stop_changed(ctx__stop_t *stop) {
    ctx__link_t *link = stop->changed.first;
    if (!link) return NULL;
    ctx__queue_out(&stop->changed, link);
    return CTX__CONTAINER(link, ctx_service_t, change);
}

static bool ctx__stop_due(void *arg) {
    const ctx__stop_t *stop = (const ctx__stop_t *)arg;
    return stop->changed.first || !stop->left || stop->earliest == CTX__NEVER;
}

/* Makes a service part of a stop. */
static void ctx__stop_add(ctx__stop_t *stop, ctx_service_t *service) {
    ctx__queue_add(&stop->members, &service->member);
    service->stop = stop;
    service->deadline = ctx__stop_cut(stop, service);
    stop->n++;
    stop->left++;
    stop->critical += service->critical;
    stop->earliest = CTX__NEVER;
}

/* Bring all services of a stop to their end, as far as the time allows. */
static void ctx__stop_run(ctx__stop_t *stop) {
    ctx_service_t *service;
    while (stop->left) {
        ctx_time_t now = ctx_now();
        if (stop->app && !stop->hurry && (now >= stop->end || ctx_err(stop->second))) ctx__stop_hurry(stop, now);
        while ((service = ctx__stop_changed(stop)) != NULL) ctx__stop_advance(stop, service, now);
        if (now >= stop->earliest) ctx__stop_clock(stop, now);
        if (stop->left)
            ctx__await(&ctx__services.mu, &stop->waiting, ctx__stop_due, stop,
                       stop->hurry || !stop->app ? &ctx__root : stop->second, stop->earliest);
    }
    while (ctx__stop_changed(stop)) {}
    stop->took = ctx_now() - stop->start;
}

/* -- reports -- */

static ctx_dur_t ctx__since(ctx_time_t start, ctx_time_t t) {
    return t == CTX__NEVER ? -1 : t > start ? t - start : 0;
}

/* [mu] When the last thing of it was over. */
static ctx_time_t ctx__service_over_at(const ctx_service_t *service) {
    return service->finished > service->canceled ? service->finished : service->canceled;
}

/* [mu] Did all components stop in time? */
static bool ctx__stop_in_time(const ctx__stop_t *stop) {
    const ctx__link_t *link;
    for (link = stop->members.first; link; link = link->next) {
        const ctx_service_t *service = CTX__MEMBER(link);
        if (service->late || (service->finished > stop->end && !stop->cleanups)) return false;
    }
    return true;
}

/* [mu] */
static void ctx__service_part(const ctx_service_t *service, ctx_time_t start, ctx_shutdown_part_t *part) {
    memset(part, 0, sizeof *part);
    part->name = service->desc.name;
    part->began_at = ctx__since(start, service->began);
    part->noticed_at = ctx__since(start, service->noticed);
    part->drained_at = ctx__since(start, service->drained);
    part->canceled_at = ctx__since(start, service->canceled);
    part->forced_at = ctx__since(start, service->forced);
    part->finished_at = service->late ? -1 : ctx__since(start, ctx__service_over_at(service));
    part->rc = service->rc;
    part->dropped = CTX__LOAD(&service->tally.dropped, RELAXED);
    part->stuck = CTX__LOAD(&service->tally.stuck, RELAXED);
    part->not_started = !service->started;
    part->late = service->late;
}

/* How long it held the stop up. */
static ctx_dur_t ctx__service_held(const ctx_service_t *service) {
    return service->late ? INT64_MAX : ctx__service_over_at(service) - service->began;
}

/* Mark the `most` of them that belong into a report. */
static void ctx__stop_mark(const ctx__stop_t *stop, size_t most) {
    ctx__link_t *link;
    for (link = stop->members.first; link; link = link->next) CTX__MEMBER(link)->marked = stop->n <= most;
    for (; stop->n > most && most; most--) {
        ctx_service_t *slowest = NULL;
        for (link = stop->members.first; link; link = link->next) {
            ctx_service_t *service = CTX__MEMBER(link);
            if (!service->marked && (!slowest || ctx__service_held(service) > ctx__service_held(slowest)))
                slowest = service;
        }
        if (slowest) slowest->marked = true;
    }
}

static int ctx__part_compare(const ctx_shutdown_part_t *a, const ctx_shutdown_part_t *b) {
    return a->began_at < b->began_at ? -1 : a->began_at > b->began_at;
}

static void ctx__parts_sort(ctx_shutdown_part_t *parts, size_t n) {
    size_t i, at;
    for (i = 1; i < n; i++) {
        ctx_shutdown_part_t part = parts[i];
        for (at = i; at > 0 && ctx__part_compare(&parts[at - 1], &part) > 0; at--) parts[at] = parts[at - 1];
        parts[at] = part;
    }
}

/* [mu] All but lame_duck. */
static void ctx__stop_report(const ctx__stop_t *stop, ctx_shutdown_report_t *report) {
    const ctx__link_t *link;
    if (!report) return;
    memset(report, 0, sizeof *report);
    report->cause = stop->what;
    report->rc = stop->rc;
    report->budget = stop->budget;
    report->took = stop->took;
    report->forced = ctx_err(stop->second) != 0;
    report->total = stop->n;
    ctx__stop_mark(stop, CTX_SHUTDOWN_PARTS);
    for (link = stop->members.first; link; link = link->next) {
        const ctx_service_t *service = CTX__MEMBER(link);
        report->late += service->late;
        report->dropped += CTX__LOAD(&service->tally.dropped, RELAXED);
        report->stuck += CTX__LOAD(&service->tally.stuck, RELAXED);
        if (service->marked) ctx__service_part(service, stop->start, &report->parts[report->n++]);
    }
    report->within_budget = !report->stuck && ctx__stop_in_time(stop);
    ctx__parts_sort(report->parts, report->n);
}

static const char *ctx__dur_text(char *text, size_t size, ctx_dur_t dur) {
    double us = (double)dur / 1e3;
    if (dur < 0) snprintf(text, size, "-");
    else if (us < 1000) snprintf(text, size, "%.0f us", us);
    else if (us < 1e6) snprintf(text, size, "%.1f ms", us / 1e3);
    else snprintf(text, size, "%.2f s", us / 1e6);
    return text;
}

#define CTX__BAR 32 /* columns of a time line */

/* The column of a time. */
static int ctx__bar_at(const ctx_shutdown_report_t *report, ctx_dur_t t) {
    double at = report->took > 0 ? (double)t / (double)report->took * CTX__BAR : 0;
    return at < 0 ? 0 : at > CTX__BAR ? CTX__BAR : (int)at;
}

/* Something that took no time still shows, in one column. */
static void ctx__bar_fill(char *bar, const ctx_shutdown_report_t *report, ctx_dur_t from, ctx_dur_t to, char mark) {
    int i = ctx__bar_at(report, from), end = to < 0 ? CTX__BAR : ctx__bar_at(report, to);
    if (from < 0) return;
    if (i == CTX__BAR) i--;
    do bar[i++] = mark;
    while (i < end);
}

/* `text` in `columns` columns: cut between characters of UTF-8, without control characters. */
static void ctx__print_fitted(const char *text, int columns, FILE *file) {
    for (; text && *text; text++) {
        if (((unsigned char)*text & 0xc0) != 0x80 && columns-- == 0) return;
        fputc((unsigned char)*text < ' ' || *text == 127 ? '?' : *text, file);
    }
    while (columns-- > 0) fputc(' ', file);
}

static void ctx__part_bar(const ctx_shutdown_report_t *report, const ctx_shutdown_part_t *part, char *bar) {
    memset(bar, ' ', CTX__BAR);
    bar[CTX__BAR] = 0;
    if (part->not_started) return;
    ctx__bar_fill(bar, report, part->began_at, part->finished_at, '=');
    ctx__bar_fill(bar, report, part->canceled_at, part->finished_at, '~');
    ctx__bar_fill(bar, report, part->forced_at, part->finished_at, '!');
    if (part->late) bar[CTX__BAR - 1] = '>';
}

/* What stands behind the bar. */
static void ctx__part_text(const ctx_shutdown_part_t *part, char *text, size_t size) {
    char time[32];
    int n;
    if (part->late) n = snprintf(text, size, "LATE");
    else if (part->not_started) n = snprintf(text, size, part->rc ? "start failed" : "not started");
    else n = snprintf(text, size, "until %s", ctx__dur_text(time, sizeof time, part->finished_at));
    if (part->dropped)
        n += snprintf(text + n, size - (size_t)n, ", %llu dropped", (unsigned long long)part->dropped);
    if (part->stuck) n += snprintf(text + n, size - (size_t)n, ", %llu stuck", (unsigned long long)part->stuck);
    if (part->rc) snprintf(text + n, size - (size_t)n, ", %.60s", ctx_strerror(part->rc));
}

static void ctx__part_print(const ctx_shutdown_report_t *report, const ctx_shutdown_part_t *part, FILE *file) {
    char bar[CTX__BAR + 1], text[200];
    ctx__part_bar(report, part, bar);
    ctx__part_text(part, text, sizeof text);
    fputs("  ", file);
    ctx__print_fitted(part->name ? part->name : "?", 16, file);
    fprintf(file, " |%s| %.46s\n", bar, text);
}

static const char *ctx__report_text(const ctx_shutdown_report_t *report) {
    if (report->late) return "some are late";
    if (report->stuck) return "something is stuck";
    return report->within_budget ? "inside the budget" : "over the budget";
}

CTXCANCEL_API int ctx_shutdown_print(const ctx_shutdown_report_t *report, FILE *file) {
    char took[32], budget[32], duck[32];
    size_t i, n;
    if (!report || !file) return CTX_INVALID;
    n = report->n < CTX_SHUTDOWN_PARTS ? report->n : CTX_SHUTDOWN_PARTS;
    errno = 0;
    fprintf(file, "shutdown (%.24s): %s of %s, %s\n", report->cause ? report->cause : "request",
            ctx__dur_text(took, sizeof took, report->took), ctx__dur_text(budget, sizeof budget, report->budget),
            ctx__report_text(report));
    if (report->lame_duck > 0)
        fprintf(file, "  of which %s as a lame duck\n", ctx__dur_text(duck, sizeof duck, report->lame_duck));
    if (report->forced) fprintf(file, "  forced by a second signal\n");
    if (report->rc) fprintf(file, "  error: %.80s\n", ctx_strerror(report->rc));
    fprintf(file, "  components: %llu, late: %llu, dropped: %llu, stuck: %llu\n", (unsigned long long)report->total,
            (unsigned long long)report->late, (unsigned long long)report->dropped, (unsigned long long)report->stuck);
    if (n) fprintf(file, "  = refuse and drain   ~ canceled   ! forced   > still running\n");
    for (i = 0; i < n; i++) ctx__part_print(report, &report->parts[i], file);
    if (report->total > n) fprintf(file, "  and %llu more\n", (unsigned long long)(report->total - n));
    if (!fflush(file) && !ferror(file)) return 0;
    return errno ? -errno : -EIO;
}

CTXCANCEL_API void ctx_shutdown_dropped(uint64_t n) { ctx__tally_add(n, 0); }

/* -- services -- */

static ctx_service_t *ctx__service_make(ctx_t *parent, const ctx_service_desc_t *desc) {
    ctx__make_t make = ctx__make_plain;
    ctx_service_t *service;
    errno = ENOMEM;
    service = (ctx_service_t *)ctx__alloc(sizeof *service);
    if (!service) return NULL;
    ctx__me();
    service->desc = *desc;
    if (!service->desc.name) service->desc.name = "service";
    if (!service->desc.grace) service->desc.grace = CTX_MS(100);
    if (service->desc.grace < 0) service->desc.grace = 0;
    service->refs = 1;
    service->noticed = service->drained = service->finished = CTX__NEVER;
    service->began = service->canceled = service->forced = CTX__NEVER;
    make.name = service->desc.name;
    make.site = "ctx_service_new";
    service->ctx = ctx__make(parent, NULL, &make);
    service->drain_node = CTXCANCEL_MALLOC(sizeof(ctx_t));
    service->parent = ctx_retain(parent);
    if ((service->ctx->flags & CTX__F_FAILED) || !service->drain_node) {
        ctx__service_unref(service);
        errno = ENOMEM;
        return NULL;
    }
    ctx__enter(&ctx__services.mu);
    ctx__link_in(&ctx__services.all, &service->link);
    ctx__leave(&ctx__services.mu);
    return service;
}

CTXCANCEL_API ctx_service_t *ctx_service_new(ctx_t *parent, const ctx_service_desc_t *desc) {
    errno = EINVAL;
    if (!parent || !desc || desc->drain_budget < 0 || ctx__bad_parent(parent)) return NULL;
    return ctx__service_make(parent, desc);
}

/* What its stop will need is there before anything of it runs. */
static int ctx__service_call_start(ctx_service_t *service, ctx__serving_t *serving) {
    int rc = ctx_err(service->ctx);
    serving->excused = false;
    if (rc || !service->desc.start) return rc;
    ctx__service_enter(service, serving, false);
    rc = service->desc.start(service->ctx, service->desc.user);
    ctx__service_leave(serving);
    return rc;
}

/* Has a start that failed been cleared away? */
static bool ctx__service_settled(void *arg) {
    const ctx_service_t *service = (const ctx_service_t *)arg;
    return service->phase != CTX__STARTING || !service->active;
}

/* Call start and let run go on, unless a stop has come between. The phase is STARTING and this is counted as active.
   After an error it may be tried again, once the thread for run has gone. */
static int ctx__service_do_start(ctx_service_t *service) {
    bool stops = service->desc.refuse || service->desc.drain || service->desc.force;
    int rc = stops ? ctx__spare_start() : 0;
    ctx__serving_t serving;
    serving.excused = false;
    ctx__enter(&ctx__services.mu);
    service->decided = CTX__UNDECIDED;
    if (!rc && service->desc.run) rc = ctx__service_launch(service, NULL, ctx__service_run_job, NULL);
    ctx__leave(&ctx__services.mu);
    if (!rc) rc = ctx__service_call_start(service, &serving);
    ctx__enter(&ctx__services.mu);
    service->started = !rc && service->phase != CTX__OVER;
    if (service->phase == CTX__STARTING && !rc) service->phase = CTX__RUNNING;
    else if (service->phase != CTX__STARTING) ctx__service_note(service, rc == ctx_err(service->ctx) ? 0 : rc);
    if (service->phase > CTX__RUNNING && !rc) rc = CTX_CLOSED;
    service->decided = rc ? CTX__LEAVE : CTX__RUN;
    ctx__wake_all(&service->waiters);
    ctx__service_returned(service, serving.excused);
    ctx__await(&ctx__services.mu, &service->waiters, ctx__service_settled, service, &ctx__root, CTX_NO_DEADLINE);
    if (service->phase == CTX__STARTING) service->phase = CTX__NEW;
    ctx__leave(&ctx__services.mu);
    return rc;
}

CTXCANCEL_API int ctx_service_start(ctx_service_t *service) {
    uint8_t phase;
    int rc;
    if (!service) return CTX_INVALID;
    ctx__enter(&ctx__services.mu);
    phase = service->phase;
    if (phase == CTX__NEW) {
        service->phase = CTX__STARTING;
        service->active++;
    }
    ctx__leave(&ctx__services.mu);
    if (phase > CTX__RUNNING) return CTX_CLOSED;
    if (phase != CTX__NEW) return CTX_ALREADY;
    CTX__ADD(&service->refs, 1u, RELAXED);
    rc = ctx__service_do_start(service);
    ctx__service_unref(service);
    return rc;
}

/* [mu] A callback of the service's own that stops it is not waited for. */
static void ctx__service_excuse(ctx_service_t *service) {
    ctx__scope_t *scope = ctx__scope_of(CTX__IN_SERVICE, service);
    ctx__serving_t *serving = scope ? CTX__CONTAINER(scope, ctx__serving_t, scope) : NULL;
    if (!serving || serving->excused) return;
    serving->excused = true;
    if (serving->drains) service->quiet = true;
    ctx__service_inactive(service);
}

static bool ctx__service_stopped(void *arg) {
    const ctx_service_t *service = (const ctx_service_t *)arg;
    return service->phase == CTX__OVER && !service->stop;
}

/* [mu, released meanwhile] The one stop. */
static void ctx__service_supervise(ctx_service_t *service, ctx_dur_t budget) {
    ctx__stop_t *stop = &service->own;
    stop->start = ctx_now();
    stop->budget = budget > 0 ? budget : 0;
    stop->end = ctx_time_add(stop->start, stop->budget);
    stop->second = &ctx__root;
    stop->what = "service stopped";
    ctx__stop_add(stop, service);
    ctx__stop_run(stop);
    stop->what = "request"; /* for reports */
    stop->rc = ctx__stop_in_time(stop) ? service->rc : CTX_DEADLINE_EXCEEDED;
    service->stop = NULL;
    ctx__wake_all(&service->waiters);
}

CTXCANCEL_API int ctx_service_stop(ctx_service_t *service, ctx_dur_t budget, ctx_shutdown_report_t *report) {
    int rc;
    if (!service) return CTX_INVALID;
    ctx__enter(&ctx__services.mu);
    ctx__service_excuse(service);
    if (!service->stop && service->phase != CTX__OVER) ctx__service_supervise(service, budget);
    ctx__await(&ctx__services.mu, &service->waiters, ctx__service_stopped, service, &ctx__root, CTX_NO_DEADLINE);
    rc = service->own.rc;
    ctx__stop_report(&service->own, report);
    ctx__leave(&ctx__services.mu);
    return rc;
}

CTXCANCEL_API void ctx_service_free(ctx_service_t *service) {
    if (!service) return;
    ctx_service_stop(service, 0, NULL);
    ctx__service_drop(service);
}

/* -- apps -- */

CTXCANCEL_API ctx_app_t *ctx_app_new(ctx_t *parent) {
    ctx__make_t make = ctx__make_plain;
    ctx_app_t *app;
    errno = EINVAL;
    if (!parent || ctx__bad_parent(parent)) return NULL;
    errno = ENOMEM;
    app = (ctx_app_t *)ctx__alloc(sizeof *app);
    if (!app) return NULL;
    ctx__me();
    make.name = "app";
    make.site = "ctx_app_new";
    make.detach = true;
    app->ctx = ctx__make(parent, NULL, &make);
    make.detach = false;
    app->stopping = ctx__make(app->ctx, NULL, &make);
    if ((app->ctx->flags | app->stopping->flags) & CTX__F_FAILED) {
        ctx_end_at(app->stopping, NULL);
        ctx_end_at(app->ctx, NULL);
        CTXCANCEL_FREE(app);
        return NULL;
    }
    app->parent = ctx_retain(parent);
    app->refs = 1;
    app->stop.app = true;
    return app;
}

static ctx_service_t *ctx__app_find(const ctx_app_t *app, const char *name) {
    ctx__link_t *link = app->stop.members.first;
    while (link && strcmp(CTX__MEMBER(link)->desc.name, name) != 0) link = link->next;
    return link ? CTX__MEMBER(link) : NULL;
}

CTXCANCEL_API int ctx_app_add(ctx_app_t *app, const ctx_service_desc_t *desc) {
    ctx_service_t *service;
    if (!app || !desc || !desc->name || desc->drain_budget < 0 || ctx__app_find(app, desc->name)) return CTX_INVALID;
    service = ctx__service_make(app->ctx, desc);
    if (!service) return CTX_NO_MEMORY;
    service->app = app; /* nothing of it runs yet */
    CTX__ADD(&app->refs, 1u, RELAXED);
    ctx__stop_add(&app->stop, service);
    return 0;
}

CTXCANCEL_API ctx_t *ctx_app_ctx(ctx_app_t *app) { return app ? app->stopping : ctx__failed(CTX_INVALID); }

CTXCANCEL_API bool ctx_app_ready(const ctx_app_t *app) {
    return app && CTX__LOAD(&app->ready, ACQUIRE) != 0;
}

CTXCANCEL_API void ctx_app_free(ctx_app_t *app) {
    ctx__link_t *link;
    if (!app) return;
    while ((link = app->stop.members.first) != NULL) {
        ctx__queue_out(&app->stop.members, link); /* NOLINT(clang-analyzer-unix.Malloc): the owner has a reference */
        ctx__service_drop(CTX__MEMBER(link));
    }
    if (app->stop.hook) ctx__service_drop(app->stop.hook);
    ctx_end_at(app->over, NULL);
    ctx_end_at(app->first, NULL);
    ctx_end_at(app->second, NULL);
    ctx_end_at(app->ctx, NULL);
    ctx_release(app->parent);
    ctx__app_unref(app);
}

/* Find what each service needs, and count who needs it. */
static int ctx__app_resolve(ctx_app_t *app) {
    ctx__link_t *link;
    for (link = app->stop.members.first; link; link = link->next) {
        ctx_service_t *service = CTX__MEMBER(link);
        const char *const *name;
        for (name = service->desc.needs; name && *name; name++) {
            ctx_service_t *need = ctx__app_find(app, *name);
            if (!need) return CTX_INVALID;
            if (!ctx__array_reserve((void **)&service->needs, sizeof need, 1)) return CTX_NO_MEMORY;
            stbds_arrput(service->needs, need);
            need->dependents++;
        }
    }
    return 0;
}

static bool ctx__app_may_start(const ctx_service_t *service) {
    size_t i;
    for (i = 0; i < stbds_arrlenu(service->needs); i++)
        if (!service->needs[i]->marked) return false;
    return true;
}

/* Put the services into an order in which each comes after those that it needs. */
static int ctx__app_order(ctx_app_t *app) {
    ctx__queue_t rest = app->stop.members, *ordered = &app->stop.members;
    ctx__link_t *link, *next;
    bool progress = true;
    memset(ordered, 0, sizeof *ordered);
    if (rest.first) rest.first->pprev = &rest.first;
    while (rest.first && progress) {
        progress = false;
        for (link = rest.first; link; link = next) {
            ctx_service_t *service = CTX__MEMBER(link);
            next = link->next;
            if (!ctx__app_may_start(service)) continue;
            service->marked = progress = true;
            ctx__queue_out(&rest, link);
            ctx__queue_add(ordered, link);
        }
    }
    if (progress || !rest.first) return 0;
    while ((link = rest.first) != NULL) { /* a circle */
        ctx__queue_out(&rest, link);
        ctx__queue_add(ordered, link);
    }
    return CTX_INVALID;
}

/* The contexts that end it, and what on_force needs. */
static int ctx__app_prepare(ctx_app_t *app, const ctx_app_desc_t *d) {
    static const int usual[] = { SIGTERM, SIGINT, 0 };
    const int *signals = d->signals ? d->signals : usual;
    ctx_service_desc_t hook;
    size_t n = 0;
    while (signals[n]) n++;
    app->stop.second = app->second = ctx_with_cancel_at(&ctx__root, "ctx_app_run");
    app->first = n ? ctx__notify_make(&ctx__root, signals, n, "ctx_app_run", app->second)
                   : ctx_with_cancel_at(&ctx__root, "ctx_app_run");
    if (app->second->flags & CTX__F_FAILED) return ctx_err(app->second);
    if (app->first->flags & CTX__F_FAILED) return ctx_err(app->first);
    app->over = ctx_merge_at(app->first, app->parent, "ctx_app_run");
    if (app->over->flags & CTX__F_FAILED) return ctx_err(app->over);
    if (!d->on_force) return 0;
    memset(&hook, 0, sizeof hook);
    hook.name = "on_force";
    hook.force = d->on_force;
    hook.user = d->user;
    app->stop.hook = ctx__service_make(app->ctx, &hook);
    if (!app->stop.hook) return CTX_NO_MEMORY;
    app->stop.hook->stop = &app->stop;
    return ctx__spare_start();
}

static void ctx__app_start_job(const ctx__job_t *job) {
    ctx_service_t *service = (ctx_service_t *)job->owner;
    int rc = ctx__service_do_start(service);
    ctx__enter(&ctx__services.mu);
    if (rc && rc != ctx_err(service->ctx) && rc != CTX_CLOSED) ctx__service_note(service, rc);
    ctx__service_changed(service);
    ctx__leave(&ctx__services.mu);
    ctx__service_unref(service);
}

/* [mu, released meanwhile] */
static void ctx__app_start(ctx_service_t *service) {
    int rc;
    service->phase = CTX__STARTING;
    rc = ctx__service_launch(service, NULL, ctx__app_start_job, NULL);
    if (!rc) return;
    service->phase = CTX__NEW;
    ctx__service_note(service, rc);
}

static bool ctx__app_due(void *arg) {
    const ctx__stop_t *stop = (const ctx__stop_t *)arg;
    return stop->changed.first || stop->failed_rc;
}

/* [mu, released meanwhile] Start all in order, unless there is a reason to shut down before. Then wait for one. True:
   it had been ready. */
static bool ctx__app_live(ctx_app_t *app) {
    ctx__stop_t *stop = &app->stop;
    ctx__link_t *next = stop->members.first;
    ctx_service_t *starting = NULL;
    bool ready = false;
    while (!stop->failed_rc && !ctx_err(app->over)) {
        while (ctx__stop_changed(stop)) {}
        if (ready || (starting && starting->phase == CTX__STARTING)) {
            ctx__await(&ctx__services.mu, &stop->waiting, ctx__app_due, stop, app->over, CTX_NO_DEADLINE);
        } else if (next) {
            starting = CTX__MEMBER(next);
            next = next->next;
            ctx__app_start(starting);
        } else {
            ready = true;
            CTX__STORE(&app->ready, 1, RELEASE);
        }
    }
    CTX__STORE(&app->ready, 0, RELEASE);
    return ready;
}

/* [mu] Why it shuts down. */
static void ctx__app_cause(ctx_app_t *app) {
    ctx_cause_t cause = ctx_cause(app->over);
    app->stop.what = app->stop.failed_rc ? app->stop.failed : cause.what;
    app->stop.code = app->stop.failed_rc ? app->stop.failed_rc : cause.code;
    app->stop.site = app->stop.failed_rc ? "ctx_app_run" : cause.site;
}

/* [mu, released meanwhile] Returns the time as a lame duck. */
static ctx_dur_t ctx__app_shut_down(ctx_app_t *app, ctx_dur_t budget, ctx_dur_t lame_duck) {
    ctx__stop_t *stop = &app->stop;
    ctx_dur_t duck = 0;
    ctx__link_t *link;
    stop->start = ctx_now();
    stop->budget = budget;
    stop->end = ctx_time_add(stop->start, budget);
    ctx__leave(&ctx__services.mu);
    ctx_cancel_cause_at(app->stopping, stop->code, stop->what, stop->site);
    if (lame_duck > 0) {
        ctx__sleep_until(app->second, ctx__min(stop->end, ctx_time_add(stop->start, lame_duck)));
        duck = ctx_now() - stop->start;
    }
    ctx__enter(&ctx__services.mu);
    for (link = stop->members.first; link; link = link->next)
        CTX__MEMBER(link)->deadline = ctx__stop_cut(stop, CTX__MEMBER(link));
    stop->earliest = CTX__NEVER;
    ctx__stop_run(stop);
    stop->rc = stop->failed_rc || ctx__stop_in_time(stop) ? stop->failed_rc : CTX_DEADLINE_EXCEEDED;
    for (link = stop->members.first; link; link = link->next) CTX__MEMBER(link)->stop = NULL;
    if (stop->hook) stop->hook->stop = NULL;
    return duck;
}

CTXCANCEL_API int ctx_app_run(ctx_app_t *app, const ctx_app_desc_t *desc) {
    ctx_dur_t duck = 0;
    ctx_app_desc_t d;
    bool ready;
    int rc;
    if (!app) return CTX_INVALID;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (d.budget == 0) d.budget = CTX_S(25);
    if (d.report) memset(d.report, 0, sizeof *d.report);
    rc = ctx__app_resolve(app);
    if (!rc) rc = ctx__app_order(app);
    if (!rc) rc = ctx__app_prepare(app, &d);
    if (!rc) {
        ctx__enter(&ctx__services.mu);
        ready = ctx__app_live(app);
        ctx__app_cause(app);
        duck = ctx__app_shut_down(app, d.budget < 0 ? 0 : d.budget, ready ? d.lame_duck : 0);
        rc = app->stop.rc;
        ctx__stop_report(&app->stop, d.report);
        ctx__leave(&ctx__services.mu);
        if (d.report) d.report->lame_duck = duck;
    }
    ctx_app_free(app);
    return rc;
}

/* -- cleanups -- */

CTXCANCEL_API int ctx_cleanup_add(ctx_cleanup_t *cleanup, const ctx_cleanup_desc_t *desc) {
    ctx_service_desc_t d;
    ctx_service_t *service;
    if (!cleanup || !desc || !desc->fn || desc->timeout < 0) return CTX_INVALID;
    memset(&d, 0, sizeof d);
    d.name = desc->name ? desc->name : "cleanup";
    d.drain = desc->fn;
    d.user = desc->arg;
    d.drain_budget = desc->timeout;
    d.grace = -1;
    service = ctx__service_make(&ctx__root, &d);
    if (!service) return CTX_NO_MEMORY;
    if (ctx__spare_start()) {
        ctx__service_drop(service);
        return CTX_NO_MEMORY;
    }
    service->cleanup = service->started = true;
    service->critical = desc->critical;
    service->on_late = desc->on_late;
    service->phase = CTX__RUNNING;
    ctx__enter(&ctx__services.mu);
    if (cleanup->run) {
        ctx__stop_add(cleanup->run, service);
        ctx__wake_all(&cleanup->run->waiting);
    } else {
        ctx__queue_add(&cleanup->items, &service->member);
    }
    ctx__leave(&ctx__services.mu);
    return 0;
}

CTXCANCEL_API int ctx_cleanup_run(ctx_cleanup_t *cleanup, ctx_dur_t budget, ctx_shutdown_report_t *report) {
    ctx__stop_t stop;
    ctx__link_t *link;
    if (report) memset(report, 0, sizeof *report);
    if (!cleanup) return CTX_INVALID;
    memset(&stop, 0, sizeof stop);
    stop.cleanups = true;
    stop.second = &ctx__root;
    stop.what = "cleanup";
    stop.start = ctx_now();
    stop.budget = budget > 0 ? budget : 0;
    stop.end = ctx_time_add(stop.start, stop.budget);
    ctx__enter(&ctx__services.mu);
    while ((link = cleanup->items.first) != NULL) {
        ctx__queue_out(&cleanup->items, link);
        ctx__stop_add(&stop, CTX__MEMBER(link));
    }
    /* cppcheck-suppress autoVariables ; it is taken back below */
    if (stop.n) cleanup->run = &stop;
    ctx__stop_run(&stop);
    if (stop.n) cleanup->run = NULL;
    stop.rc = stop.failed_rc || ctx__stop_in_time(&stop) ? stop.failed_rc : CTX_DEADLINE_EXCEEDED;
    ctx__stop_report(&stop, report);
    for (link = stop.members.first; link; link = link->next) CTX__MEMBER(link)->stop = NULL;
    ctx__leave(&ctx__services.mu);
    while ((link = stop.members.first) != NULL) {
        ctx__queue_out(&stop.members, link);
        ctx__service_drop(CTX__MEMBER(link));
    }
    return stop.rc;
}

#ifdef __cplusplus
}
#endif

#ifdef CTX__DEFAULT_SOURCE
#undef _DEFAULT_SOURCE
#undef CTX__DEFAULT_SOURCE
#endif

#ifdef __cplusplus
#pragma GCC diagnostic pop
#endif

#endif /* CTX__IMPLEMENTED */
#endif /* CTXCANCEL_IMPLEMENTATION */

/* MIT License

   Copyright (c) 2026 the authors of ctxcancel.h

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
   documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
   rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
   permit persons to whom the Software is furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
   Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
   WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE. */
