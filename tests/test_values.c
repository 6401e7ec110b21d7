/* Values: keys, copies, records that are inherited by pointer, shadowing, typed pairs. */
#include "blocks.h"

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "test.h"
#include "race.h"

static long settled_blocks(void) {
    ctx_runtime_stop();
    return blocks_live();
}

static const ctx_key_t int_key = CTX_KEY(int);

static ctx_t *with_int(ctx_t *parent, int value) { return ctx_with_value(parent, &int_key, &value); }

/* 0 when absent. */
static int int_of(const ctx_t *ctx, const ctx_key_t *key) {
    const int *value = (const int *)ctx_value(ctx, key);
    return value ? *value : 0;
}

TEST(a_key_that_nobody_set_is_absent) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    EXPECT(ctx_value(ctx_background(), &int_key) == NULL);
    EXPECT(ctx_value(ctx, &int_key) == NULL);
    ctx_t *other = with_int(ctx, 7);
    EXPECT(ctx_value(ctx, &int_key) == NULL);
    EXPECT(ctx_value(ctx_background(), &int_key) == NULL);
    ctx_end(other);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_value_is_a_copy) {
    int value = 7;
    ctx_t *ctx = ctx_with_value(ctx_background(), &int_key, &value);
    value = 8;
    EXPECT(ctx_value(ctx, &int_key) != &value);
    EXPECT_EQ(int_of(ctx, &int_key), 7);
    ctx_end(ctx);
}

TEST(a_value_stays_where_it_is_and_children_share_it) {
    ctx_t *ctx = with_int(ctx_background(), 7);
    const void *at = ctx_value(ctx, &int_key);
    ctx_t *child = ctx_with_cancel(ctx);
    ctx_t *below = ctx_with_timeout(child, CTX_S(50));
    EXPECT(ctx_value(child, &int_key) == at);
    EXPECT(ctx_value(below, &int_key) == at);
    ctx_end(child);
    ctx_end(ctx);
    EXPECT(ctx_value(below, &int_key) == at);
    EXPECT_EQ(int_of(below, &int_key), 7);
    ctx_end(below);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_key_is_its_address) {
    static const ctx_key_t twin = CTX_KEY(int);
    ctx_t *ctx = with_int(ctx_background(), 7);
    EXPECT(strcmp(twin.name, int_key.name) == 0 && twin.size == int_key.size);
    EXPECT(ctx_value(ctx, &twin) == NULL);
    int eight = 8;
    ctx_t *both = ctx_with_value(ctx, &twin, &eight);
    EXPECT_EQ(int_of(both, &int_key), 7);
    EXPECT_EQ(int_of(both, &twin), 8);
    ctx_end(both);
    ctx_end(ctx);
}

TEST(a_value_is_found_at_any_depth) {
    enum { DEPTH = 1000 };
    ctx_t *chain[DEPTH];
    chain[0] = with_int(ctx_background(), 7);
    for (int i = 1; i < DEPTH; i++) chain[i] = ctx_with_cancel(chain[i - 1]);
    const void *at = ctx_value(chain[0], &int_key);
    for (int i = 0; i < DEPTH; i++) EXPECT(ctx_value(chain[i], &int_key) == at);
    for (int i = 0; i < DEPTH; i++) ctx_end(chain[i]);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(setting_a_key_again_shadows_it_below_and_nowhere_else) {
    ctx_t *top = with_int(ctx_background(), 1);
    ctx_t *sibling = ctx_with_cancel(top);
    ctx_t *shadow = with_int(top, 2);
    ctx_t *below = ctx_with_cancel(shadow);
    ctx_t *deeper = with_int(below, 3);
    ctx_t *bottom = ctx_with_cancel(deeper);
    EXPECT_EQ(int_of(top, &int_key), 1);
    EXPECT_EQ(int_of(sibling, &int_key), 1);
    EXPECT_EQ(int_of(shadow, &int_key), 2);
    EXPECT_EQ(int_of(below, &int_key), 2);
    EXPECT_EQ(int_of(deeper, &int_key), 3);
    EXPECT_EQ(int_of(bottom, &int_key), 3);
    ctx_end(bottom);
    ctx_end(deeper);
    EXPECT_EQ(int_of(below, &int_key), 2);
    ctx_end(below);
    ctx_end(shadow);
    EXPECT_EQ(int_of(top, &int_key), 1);
    ctx_end(sibling);
    ctx_end(top);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(shadowing_leaves_other_keys_alone) {
    static const ctx_key_t other = CTX_KEY(int);
    int nine = 9;
    ctx_t *a = with_int(ctx_background(), 1);
    ctx_t *b = ctx_with_value(a, &other, &nine);
    ctx_t *c = with_int(b, 2);
    EXPECT_EQ(int_of(c, &other), 9);
    EXPECT_EQ(int_of(c, &int_key), 2);
    EXPECT_EQ(int_of(b, &int_key), 1);
    ctx_end(a);
    ctx_end(b);
    EXPECT_EQ(int_of(c, &other), 9);
    ctx_end(c);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(shadowing_again_and_again_keeps_only_what_can_be_read) {
    ctx_t *ctx = with_int(ctx_background(), 0);
    for (int i = 1; i < 1000; i++) {
        ctx_t *next = with_int(ctx, i);
        ctx_end(ctx);
        ctx = next;
    }
    ctx_t *detached = ctx_without_cancel(ctx);
    ctx_end(ctx);
    EXPECT_EQ(int_of(detached, &int_key), 999);
    EXPECT(settled_blocks() <= 4); /* values nobody can reach are freed with their contexts */
    ctx_end(detached);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_thousand_keys_are_each_found) {
    enum { KEYS = 1000 };
    static ctx_key_t keys[KEYS];
    ctx_t *chain[KEYS];
    uint64_t sum = 0;
    for (int i = 0; i < KEYS; i++) {
        keys[i].name = "int";
        keys[i].size = sizeof(int);
        int value = i + 1;
        chain[i] = ctx_with_value(i ? chain[i - 1] : ctx_background(), &keys[i], &value);
        CHECK_EQ(ctx_err(chain[i]), 0);
    }
    int wrong = 0;
    for (int i = 0; i < KEYS; i++) {
        wrong += int_of(chain[KEYS - 1], &keys[i]) != i + 1;
        for (int k = 0; k < KEYS; k += 37) wrong += int_of(chain[i], &keys[k]) != (k <= i ? k + 1 : 0);
    }
    EXPECT_EQ(wrong, 0);
    for (int i = 0; i < KEYS - 1; i++) ctx_end(chain[i]);
    for (int i = 0; i < KEYS; i++) sum += (uint64_t)int_of(chain[KEYS - 1], &keys[i]);
    EXPECT_EQ(sum, KEYS * (KEYS + 1) / 2);
    ctx_end(chain[KEYS - 1]);
    EXPECT_EQ(settled_blocks(), 0);
}

typedef union {
    long long integer;
    double real;
    long double extended;
    void *pointer;
    void (*function)(void);
} strictest_t;

typedef struct {
    char shift;
    strictest_t strictest;
} alignment_t;

TEST(a_value_of_any_size_is_whole_and_aligned_for_any_type) {
    enum { MOST = 300 };
    static ctx_key_t keys[MOST];
    unsigned char bytes[MOST];
    ctx_t *ctx = ctx_retain(ctx_background());
    for (size_t size = 1; size < MOST; size++) {
        keys[size].name = "bytes";
        keys[size].size = size;
        memset(bytes, (int)(size % 251), size);
        ctx_t *next = ctx_with_value(ctx, &keys[size], bytes);
        ctx_end(ctx);
        ctx = ctx_without_cancel(next);
        ctx_end(next);
    }
    int wrong = 0;
    for (size_t size = 1; size < MOST; size++) {
        const unsigned char *value = (const unsigned char *)ctx_value(ctx, &keys[size]);
        CHECK(value != NULL);
        wrong += (uintptr_t)value % offsetof(alignment_t, strictest) != 0;
        for (size_t i = 0; i < size; i++) wrong += value[i] != size % 251;
    }
    EXPECT_EQ(wrong, 0);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_big_value_is_whole) {
    enum { BIG = 3 * 1024 * 1024 + 1 };
    static const ctx_key_t key = {"big", BIG};
    unsigned char *source = (unsigned char *)malloc(BIG);
    CHECK(source != NULL);
    for (size_t i = 0; i < BIG; i++) source[i] = (unsigned char)(i * 31 % 257);
    ctx_t *ctx = ctx_with_value(ctx_background(), &key, source);
    ctx_t *child = ctx_with_cancel(ctx);
    ctx_end(ctx);
    const void *value = ctx_value(child, &key);
    EXPECT(value != NULL && memcmp(value, source, BIG) == 0);
    ctx_end(child);
    free(source);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_key_of_size_zero_is_a_mark) {
    static const ctx_key_t mark = {"mark", 0};
    ctx_t *plain = with_int(ctx_background(), 7);
    ctx_t *marked = ctx_with_value(plain, &mark, "");
    EXPECT_EQ(ctx_err(marked), 0);
    EXPECT(ctx_value(marked, &mark) != NULL);
    EXPECT(ctx_value(plain, &mark) == NULL);
    EXPECT_EQ(int_of(marked, &int_key), 7);
    ctx_t *below = with_int(marked, 8);
    EXPECT(ctx_value(below, &mark) != NULL);
    EXPECT_EQ(int_of(below, &int_key), 8);
    ctx_end(below);
    ctx_end(marked);
    ctx_end(plain);
    EXPECT_EQ(settled_blocks(), 0);
}

/* A value that no address space could hold is no memory, not an overflow. */
TEST(a_key_of_absurd_size_is_no_memory) {
    static const ctx_key_t sizes[] = {{"max", SIZE_MAX}, {"less", SIZE_MAX - 100}, {"half", SIZE_MAX / 2 + 1}};
#ifdef TEST_SANITIZED
    size_t n = 1; /* their malloc aborts on a request that only a real one refuses */
#else
    size_t n = sizeof sizes / sizeof sizes[0];
#endif
    for (size_t i = 0; i < n; i++) {
        ctx_t *ctx = ctx_with_value(ctx_background(), &sizes[i], "x");
        EXPECT_EQ(ctx_err(ctx), CTX_NO_MEMORY);
        ctx_end(ctx);
    }
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(values_are_readable_whatever_became_of_their_context) {
    ctx_t *ctx = with_int(ctx_background(), 7);
    ctx_t *child = ctx_with_cancel(ctx);
    ctx_t *detached = ctx_without_cancel(child);
    ctx_cancel(ctx);
    EXPECT_EQ(int_of(ctx, &int_key), 7);
    EXPECT_EQ(int_of(child, &int_key), 7);
    ctx_t *born_done = ctx_with_cancel(child);
    ctx_end(ctx);
    ctx_end(child);
    EXPECT_EQ(int_of(born_done, &int_key), 7);
    ctx_end(born_done);
    EXPECT_EQ(int_of(detached, &int_key), 7);
    ctx_t *shadow = with_int(detached, 8);
    EXPECT_EQ(int_of(detached, &int_key), 7);
    ctx_release(detached);
    EXPECT_EQ(int_of(shadow, &int_key), 8);
    ctx_end(shadow);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(a_context_may_be_given_values_after_it_was_canceled) {
    ctx_t *done = ctx_with_cancel(ctx_background());
    ctx_cancel(done);
    ctx_t *valued = with_int(done, 7);
    EXPECT_EQ(ctx_err(valued), CTX_CANCELED);
    EXPECT_EQ(int_of(valued, &int_key), 7);
    ctx_t *detached = ctx_without_cancel(valued);
    ctx_end(valued);
    ctx_end(done);
    EXPECT_EQ(ctx_err(detached), 0);
    EXPECT_EQ(int_of(detached, &int_key), 7);
    ctx_end(detached);
    EXPECT_EQ(settled_blocks(), 0);
}

/* -- typed pairs ----------------------------------------------------------------------------------------------- */

typedef struct {
    char user[16];
    long id;
    double weight;
} request_t;

CTX_VALUE(request_t, request);
CTX_VALUE(int, shard);
CTX_VALUE(int, replica); /* the same type, another key */

TEST(a_typed_pair_sets_and_gets_its_struct) {
    request_t request;
    memset(&request, 0, sizeof request);
    strcpy(request.user, "ann");
    request.id = 42;
    request.weight = 0.5;
    EXPECT(request_from(ctx_background()) == NULL);
    ctx_t *ctx = ctx_with_request(ctx_background(), &request);
    request.id = 43;
    ctx_t *child = ctx_with_timeout(ctx, CTX_S(5));
    const request_t *seen = request_from(child);
    CHECK(seen != NULL);
    EXPECT(strcmp(seen->user, "ann") == 0 && seen->id == 42 && seen->weight > 0.4 && seen->weight < 0.6);
    ctx_t *shadow = ctx_with_request(child, &request);
    EXPECT(request_from(shadow) && request_from(shadow)->id == 43);
    EXPECT(seen->id == 42);
    ctx_end(shadow);
    ctx_end(child);
    ctx_end(ctx);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST(typed_pairs_of_one_type_are_two_keys) {
    int three = 3, four = 4;
    ctx_t *shard = ctx_with_shard(ctx_background(), &three);
    EXPECT(replica_from(shard) == NULL);
    ctx_t *both = ctx_with_replica(shard, &four);
    EXPECT(shard_from(both) && *shard_from(both) == 3);
    EXPECT(replica_from(both) && *replica_from(both) == 4);
    EXPECT(ctx_value(both, &ctx_key_shard) == (const void *)shard_from(both));
    EXPECT_EQ(ctx_key_request.size, sizeof(request_t));
    EXPECT(strcmp(ctx_key_request.name, "request_t") == 0);
    ctx_end(both);
    ctx_end(shard);
}

TEST(a_typed_pair_without_a_value_gives_a_failed_context) {
    ctx_t *ctx = ctx_with_shard(ctx_background(), NULL);
    EXPECT_EQ(ctx_err(ctx), CTX_INVALID);
    ctx_end(ctx);
}

/* -- many threads ---------------------------------------------------------------------------------------------- */

typedef struct {
    start_line_t line;
    ctx_t *shared;
} readers_t;

/* Each thread derives, shadows, reads and drops on top of one shared record. */
static void *share_a_record(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    readers_t *readers = (readers_t *)side->shared;
    int wrong = 0;
    start_line(&readers->line);
    for (int i = 0, n = test_scale(20000); i < n; i++) {
        ctx_t *child = ctx_with_cancel(readers->shared);
        ctx_t *shadow = with_int(child, side->id * n + i);
        ctx_t *detached = ctx_without_cancel(i % 2 ? shadow : child);
        wrong += int_of(readers->shared, &int_key) != 77;
        wrong += int_of(child, &int_key) != 77;
        wrong += int_of(shadow, &int_key) != side->id * n + i;
        ctx_end(child);
        ctx_end(shadow);
        wrong += int_of(detached, &int_key) != (i % 2 ? side->id * n + i : 77);
        ctx_end(detached);
    }
    EXPECT_EQ(wrong, 0);
    start_line(&readers->line);
    if (side->id == 0) ctx_end(readers->shared);
    return NULL;
}

TEST(eight_threads_share_a_record) {
    readers_t readers;
    start_line_init(&readers.line, 8);
    readers.shared = with_int(ctx_background(), 77);
    race_run(8, share_a_record, &readers);
    EXPECT_EQ(settled_blocks(), 0);
}

typedef struct {
    start_line_t line;
    ctx_t *last[2]; /* two contexts over one record, each the last of its thread */
    int rounds;
} record_race_t;

static void *drop_a_record(void *arg) {
    race_side_t *side = (race_side_t *)arg;
    record_race_t *race = (record_race_t *)side->shared;
    int wrong = 0;
    for (int round = 0; round < race->rounds; round++) {
        if (side->id == 0) {
            ctx_t *first = with_int(ctx_background(), round);
            race->last[0] = ctx_without_cancel(first);
            race->last[1] = ctx_without_cancel(first);
            ctx_end(first);
        }
        start_line(&race->line);
        wrong += int_of(race->last[side->id], &int_key) != round;
        ctx_end(race->last[side->id]);
        start_line(&race->line);
    }
    EXPECT_EQ(wrong, 0);
    return NULL;
}

TEST(the_last_of_two_threads_to_drop_a_record_frees_it) {
    record_race_t race;
    memset(&race, 0, sizeof race);
    start_line_init(&race.line, 2);
    race.rounds = test_scale(20000);
    race_run(2, drop_a_record, &race);
    EXPECT_EQ(settled_blocks(), 0);
}

TEST_MAIN
