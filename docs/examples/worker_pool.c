/* worker_pool.c: one pool for the whole program; each request is a group on it, which joins its tasks and stops them at
   the first error. Recipe: docs/worker_pool.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <stdio.h>

enum { WORKERS = 4, TILES = 12 };

/* Each task has a place of its own for its result, so results need no lock: ctx_group_wait() comes after all writes. */
typedef struct {
    int number;
    bool broken;
    int pixels;
} tile_t;

static int decode(ctx_t *ctx, void *arg) {
    tile_t *tile = arg;
    if (tile->broken) return -EIO;
    int rc = ctx_sleep(ctx, CTX_MS(2)); /* the work; it ends early when another tile fails */
    if (rc != 0) return rc;
    tile->pixels = 1000 + tile->number;
    return 0;
}

/* A task of the pool that needs the pool. If it only waited, all workers could come to wait for tiles that no worker is
   left to decode. A group that waits runs its own tasks instead. */
typedef struct {
    ctx_pool_t *pool;
    int broken; /* which tile is; negative: none */
    int rc;
    int pixels;
} picture_t;

static int load(ctx_t *ctx, void *arg) {
    picture_t *picture = arg;
    tile_t tiles[TILES];
    ctx_group_t *group = ctx_group_new(ctx, &(ctx_group_desc_t){.name = "picture", .pool = picture->pool});
    if (!group) return -errno;
    for (int i = 0; i < TILES; i++) {
        tiles[i] = (tile_t){.number = i, .broken = i == picture->broken};
        ctx_group_go(group, decode, &tiles[i]);
    }
    picture->rc = ctx_group_wait(group); /* tiles is on this stack, so nothing may leave without this */
    for (int i = 0; i < TILES && picture->rc == 0; i++) picture->pixels += tiles[i].pixels;
    return 0; /* one bad picture is no reason to stop the others */
}

int main(void) {
    ctx_pool_t *pool = ctx_pool_new(ctx_background(), &(ctx_pool_desc_t){.name = "work", .workers = WORKERS});
    if (!pool) return perror("pool"), 1;
    ctx_t *request = ctx_with_timeout(ctx_background(), CTX_S(10));

    /* More pictures than workers, each of which wants workers. */
    picture_t pictures[2 * WORKERS];
    ctx_group_t *album = ctx_group_new(request, &(ctx_group_desc_t){.name = "album", .pool = pool});
    if (!album) return perror("group"), 1;
    for (int i = 0; i < 2 * WORKERS; i++) {
        pictures[i] = (picture_t){.pool = pool, .broken = i == 3 ? 5 : -1};
        ctx_group_go(album, load, &pictures[i]);
    }
    int rc = ctx_group_wait(album);

    int good = 0;
    for (int i = 0; rc == 0 && i < 2 * WORKERS; i++) {
        if (pictures[i].rc == 0) good++;
        printf("picture %d: %s, %d pixels\n", i, ctx_strerror(pictures[i].rc), pictures[i].pixels);
    }
    ctx_end(request);
    ctx_drain_report_t report;
    if (rc == 0) rc = ctx_pool_drain(pool, CTX_S(1), &report);
    ctx_pool_free(pool);
    ctx_runtime_stop();
    printf("%d of %d pictures, %d workers\n", good, 2 * WORKERS, WORKERS);
    return rc == 0 && good == 2 * WORKERS - 1 && pictures[3].rc == -EIO ? 0 : 1;
}
