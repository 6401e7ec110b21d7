/* batch_writer.c: many threads add single rows, and few large writes come out, none lost on the way.
   Recipe: docs/batch_writer.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

enum { PRODUCERS = 4, ROWS_EACH = 2000, BATCH = 100 };

typedef struct {
    int producer, n;
} row_t;

/* Only flush and on_drop use this, and they never run at the same time: no lock. */
typedef struct {
    int writes, refused, stored, dropped;
} table_t;

/* Stands for a transaction: all of the rows or none. Each tenth attempt fails, as a busy database does. */
static int write_rows(ctx_t *ctx, const void *items, size_t n, void *user) {
    const row_t *rows = items;
    table_t *table = user;
    (void)rows;
    if (++table->writes % 10 == 0) return table->refused++, -EBUSY;
    int rc = ctx_sleep(ctx, CTX_US(200)); /* the same for one row as for a hundred: that is the gain */
    if (rc == 0) table->stored += (int)n;
    return rc;
}

/* What cannot be written: count it, log it, put it into a file. This is the last that anybody hears of it. */
static void rows_lost(const void *items, size_t n, int reason, void *user) {
    (void)items;
    table_t *table = user;
    table->dropped += (int)n;
    printf("%d rows lost: %s\n", (int)n, ctx_strerror(reason));
}

static int produce(ctx_t *ctx, void *arg) {
    ctx_batch_t *batch = arg;
    for (int i = 0; i < ROWS_EACH; i++) {
        row_t row = {.n = i};
        int rc = ctx_batch_add(batch, &row); /* never waits: what a request handler wants */
        if (rc == CTX_QUEUE_FULL) rc = ctx_batch_add_wait(batch, ctx, &row); /* a loader rather waits */
        if (rc != 0) return rc; /* this row was not taken: it is still ours */
    }
    return 0;
}

int main(void) {
    table_t table = {0};
    ctx_batch_t *batch = ctx_batch_new(ctx_background(), &(ctx_batch_desc_t){.name = "rows",
                                                                             .item_size = sizeof(row_t),
                                                                             .max_items = BATCH,
                                                                             .max_delay = CTX_MS(10),
                                                                             .flush = write_rows,
                                                                             .retries = 3,
                                                                             .on_drop = rows_lost,
                                                                             .user = &table});
    if (!batch) return perror("batch"), 1;

    ctx_group_t *group = ctx_group_new(ctx_background(), NULL);
    if (!group) return perror("group"), 1;
    for (int i = 0; i < PRODUCERS; i++) ctx_group_go(group, produce, batch);
    int failed = ctx_group_wait(group);

    int late = ctx_batch_drain(batch, CTX_S(5), NULL); /* after the last add; afterwards table is ours */
    ctx_batch_free(batch);
    ctx_runtime_stop();
    printf("%d rows in %d writes, %d of them refused; %d rows lost\n", table.stored, table.writes, table.refused,
           table.dropped);
    return failed == 0 && late == 0 && table.stored + table.dropped == PRODUCERS * ROWS_EACH ? 0 : 1;
}
