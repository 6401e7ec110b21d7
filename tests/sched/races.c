/* races.c: find data races in the schedules of the explorer, by the memory orders that the code asks for.

   For a scenario compiled with -fsanitize=thread but linked without it: the compiler then calls __tsan_read8() and the
   like before each access, and __tsan_atomic64_load() and the like for each atomic operation. These are defined here.
   Each thread has a vector clock. A release stores the clock with the word, an acquire of the word joins it, also for
   the start and the join of threads. Two accesses to one byte race if at least one is a write, at most one is atomic,
   and neither happens before the other. A free counts as a write to the whole block. So a missing or too weak
   acquire or release shows as a race even though the schedules themselves are sequentially consistent. Plain accesses
   to freed blocks and to stacks that were left are found too.

   Not seen: an order between two atomic words that only a full barrier gives (store, then load of another word);
   accesses by memcpy() and memset(); fences, which count as nothing. */
#define SCHED_ENGINE
#include "sched.h"
#include <sys/mman.h>

enum { N = SCHED_THREADS, WORDS = 1 << 14 };
typedef uint16_t races_clock_t;

typedef struct {
    uint32_t generation;              /* of the schedule that it is about */
    uint32_t write_pc[N], read_pc[N]; /* the last of each thread */
    races_clock_t plain_read[N], plain_write[N], atomic_read[N], atomic_write[N];
} races_byte_t;

typedef struct {
    uintptr_t word;
    uint32_t generation;
    races_clock_t clock[N];
} races_word_t;

static struct races {
    races_clock_t clock[N][N];
    races_word_t words[WORDS];
    uint32_t generation;
    races_byte_t *blocks, *data; /* shadows */
} * R;

extern char __data_start[], _end[];

/* The explorer's. */
extern char *const sched_memory;
extern const size_t sched_memory_size;
void sched_access_check(const volatile void *word, const char *op, const char *file, int line);
int sched_thread_or_none(void);
const char *sched_program(void);

void sched_races_begin(void) {
    int i;
    if (!R) {
        char *all = (char *)mmap(NULL, sizeof *R, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        size_t blocks = sched_memory_size * sizeof(races_byte_t),
               data = (size_t)(_end - __data_start) * sizeof(races_byte_t);
        char *shadow = (char *)mmap(NULL, blocks + data, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED || shadow == MAP_FAILED) perror("mmap"), _exit(2);
        R = (struct races *)(void *)all;
        R->blocks = (races_byte_t *)(void *)shadow;
        R->data = (races_byte_t *)(void *)(shadow + blocks);
    }
    R->generation++;
    memset(R->clock, 0, sizeof R->clock);
    for (i = 0; i < N; i++) R->clock[i][i] = 1;
}

static void join(races_clock_t *to, const races_clock_t *from) {
    int i;
    for (i = 0; i < N; i++)
        if (to[i] < from[i]) to[i] = from[i];
}

/* What `from` has done happens before what `to` does next. */
void sched_races_edge(int from, int to) {
    join(R->clock[to], R->clock[from]);
    R->clock[from][from]++;
}

static races_word_t *word_of(const volatile void *word) {
    uintptr_t key = (uintptr_t)word;
    unsigned i = (unsigned)(key * 0x9e3779b97f4a7c15u >> 50) & (WORDS - 1);
    while (R->words[i].word && R->words[i].word != key) i = (i + 1) & (WORDS - 1);
    if (R->words[i].generation != R->generation) memset(R->words[i].clock, 0, sizeof R->words[i].clock);
    R->words[i].word = key;
    R->words[i].generation = R->generation;
    return &R->words[i];
}

static bool acquires(int order) {
    return order == __ATOMIC_CONSUME || order == __ATOMIC_ACQUIRE || order >= __ATOMIC_ACQ_REL;
}
static bool releases(int order) { return order >= __ATOMIC_RELEASE; }

/* [after the access] */
static void synchronize(const volatile void *word, int order, bool reads, bool writes) {
    int me = sched_thread_or_none();
    races_word_t *w;
    if (me < 0 || !R) return;
    w = word_of(word);
    if (reads && acquires(order)) join(R->clock[me], w->clock);
    if (!writes) return;
    if (!reads)
        memset(w->clock, 0, sizeof w->clock); /* a store ends what was released before; a read-modify-write goes on */
    if (releases(order)) {
        join(w->clock, R->clock[me]);
        R->clock[me][me]++;
    }
}

void sched_races_acquire(const volatile void *word) { synchronize(word, __ATOMIC_ACQUIRE, true, false); }
void sched_races_release(const volatile void *word) { synchronize(word, __ATOMIC_RELEASE, false, true); }

static races_byte_t *byte_of(uintptr_t at) {
    races_byte_t *byte;
    if (at - (uintptr_t)sched_memory < sched_memory_size)
        byte = &R->blocks[at - (uintptr_t)sched_memory];
    else if (at - (uintptr_t)__data_start < (size_t)(_end - __data_start))
        byte = &R->data[at - (uintptr_t)__data_start];
    else
        return NULL;
    if (byte->generation != R->generation) {
        memset(byte, 0, sizeof *byte);
        byte->generation = R->generation;
    }
    return byte;
}

static void place(uint32_t pc, char *text, size_t size) {
    char command[512];
    FILE *out;
    snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%x", sched_program(), pc - 1);
    snprintf(text, size, "0x%x", pc);
    out = popen(command, "r");
    if (out && fgets(text, (int)size, out)) text[strcspn(text, "\n")] = 0;
    if (out) pclose(out);
}

static void race(const char *what, uint32_t pc, const char *before, uint32_t pc_before, int thread_before) {
    char now[128], then[128];
    place(pc, now, sizeof now);
    place(pc_before, then, sizeof then);
    sched_fail(NULL, 0, "data race: %s at %s, not ordered with the %s at %s by thread %d", what, now, before, then,
               thread_before);
}

static void access_range(const volatile void *address, size_t size, bool atomic, bool writes, void *caller) {
    int me = sched_thread_or_none(), i;
    uint32_t pc = (uint32_t)(uintptr_t)caller;
    const races_clock_t *clock;
    size_t k;
    if (me < 0 || !R) return;
    if (!atomic) sched_access_check(address, writes ? "plain write" : "plain read", NULL, 0);
    clock = R->clock[me];
    for (k = 0; k < size; k++) {
        races_byte_t *byte = byte_of((uintptr_t)address + k);
        const char *what = writes ? atomic ? "atomic write" : "write" : atomic ? "atomic read" : "read";
        if (!byte) return;
        for (i = 0; i < N; i++) {
            if (i == me) continue;
            if (byte->plain_write[i] > clock[i]) race(what, pc, "write", byte->write_pc[i], i);
            if (!atomic && byte->atomic_write[i] > clock[i]) race(what, pc, "atomic write", byte->write_pc[i], i);
            if (writes && byte->plain_read[i] > clock[i]) race(what, pc, "read", byte->read_pc[i], i);
            if (writes && !atomic && byte->atomic_read[i] > clock[i])
                race(what, pc, "atomic read", byte->read_pc[i], i);
        }
        if (writes) {
            (atomic ? byte->atomic_write : byte->plain_write)[me] = clock[me];
            byte->write_pc[me] = pc;
        } else {
            (atomic ? byte->atomic_read : byte->plain_read)[me] = clock[me];
            byte->read_pc[me] = pc;
        }
    }
}

void sched_races_free(const void *block, size_t size, void *caller) { access_range(block, size, false, true, caller); }

/* == what the compiler calls ====================================== */

#define PLAIN(n)                                                                                              \
    void __tsan_read##n(void *p) { access_range(p, n, false, false, __builtin_return_address(0)); }           \
    void __tsan_write##n(void *p) { access_range(p, n, false, true, __builtin_return_address(0)); }           \
    void __tsan_unaligned_read##n(void *p) { access_range(p, n, false, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##n(void *p) { access_range(p, n, false, true, __builtin_return_address(0)); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
void __tsan_read_range(void *p, size_t n) { access_range(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, size_t n) { access_range(p, n, false, true, __builtin_return_address(0)); }
void __tsan_init(void) {}
void __tsan_func_entry(void *caller) { (void)caller; }
void __tsan_func_exit(void) {}
void __tsan_atomic_thread_fence(int order) { __atomic_thread_fence(order); }

#define MODIFY(bits, name)                                                                                       \
    uint##bits##_t __tsan_atomic##bits##_fetch_##name(volatile uint##bits##_t *p, uint##bits##_t v, int order) { \
        uint##bits##_t before;                                                                                   \
        access_range(p, bits / 8, true, true, __builtin_return_address(0));                                      \
        before = __atomic_fetch_##name(p, v, __ATOMIC_SEQ_CST);                                                  \
        synchronize(p, order, true, true);                                                                       \
        return before;                                                                                           \
    }
#define ATOMIC(bits)                                                                                         \
    uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *p, int order) {                 \
        access_range(p, bits / 8, true, false, __builtin_return_address(0));                                 \
        synchronize(p, order, true, false);                                                                  \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                         \
    }                                                                                                        \
    void __tsan_atomic##bits##_store(volatile uint##bits##_t *p, uint##bits##_t v, int order) {              \
        access_range(p, bits / 8, true, true, __builtin_return_address(0));                                  \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                            \
        synchronize(p, order, false, true);                                                                  \
    }                                                                                                        \
    uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t *p, uint##bits##_t v, int order) { \
        access_range(p, bits / 8, true, true, __builtin_return_address(0));                                  \
        synchronize(p, order, true, true);                                                                   \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                                        \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t *p, uint##bits##_t *seen,      \
                                                      uint##bits##_t v, int order, int failed) {             \
        bool won = *p == *seen;                                                                              \
        access_range(p, bits / 8, true, won, __builtin_return_address(0));                                   \
        synchronize(p, won ? order : failed, true, won);                                                     \
        return __atomic_compare_exchange_n(p, seen, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
    }                                                                                                        \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t *p, uint##bits##_t *seen,        \
                                                    uint##bits##_t v, int order, int failed) {               \
        return __tsan_atomic##bits##_compare_exchange_strong(p, seen, v, order, failed);                     \
    }                                                                                                        \
    MODIFY(bits, add) MODIFY(bits, sub) MODIFY(bits, and) MODIFY(bits, or) MODIFY(bits, xor)
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
