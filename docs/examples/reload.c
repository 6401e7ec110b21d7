/* reload.c: each SIGHUP reads the configuration again while the program works on; Ctrl-C or SIGTERM stops it.
   Run it with the path of a file to try it by hand: `./reload limit.txt`, then `kill -HUP`. Without one it writes a
   file of its own and sends itself the signals. Recipe: docs/reload.md */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
    const char *path;
    pthread_mutex_t mu;
    int limit, reloads; /* [mu] */
} config_t;

static int read_limit(const char *path) {
    int limit = -1;
    FILE *file = fopen(path, "r");
    if (!file) return -1;
    if (fscanf(file, "%d", &limit) != 1) limit = -1;
    fclose(file);
    return limit;
}

/* On the signal thread. A file that cannot be read leaves the configuration as it is. */
static void reload(int signal, void *user) {
    config_t *config = (config_t *)user;
    int limit = read_limit(config->path);
    (void)signal;
    pthread_mutex_lock(&config->mu);
    config->reloads++;
    if (limit >= 0) config->limit = limit;
    printf("SIGHUP: the limit is %d%s\n", config->limit, limit < 0 ? " as before" : "");
    pthread_mutex_unlock(&config->mu);
}

static int limit_now(config_t *config, int *reloads) {
    pthread_mutex_lock(&config->mu);
    int limit = config->limit;
    if (reloads) *reloads = config->reloads;
    pthread_mutex_unlock(&config->mu);
    return limit;
}

static int write_limit(const char *path, int limit) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    fprintf(file, "%d\n", limit);
    return fclose(file);
}

/* What an administrator does: three times a new limit and a SIGHUP, in the end a SIGTERM. */
static int administrate(ctx_t *ctx, void *arg) {
    config_t *config = (config_t *)arg;
    for (int limit = 10; limit <= 30; limit += 10) {
        if (write_limit(config->path, limit) != 0) break;
        kill(getpid(), SIGHUP);
        while (limit_now(config, NULL) != limit && ctx_sleep(ctx, CTX_MS(1)) == 0) continue;
    }
    kill(getpid(), SIGTERM);
    return 0;
}

int main(int argc, char **argv) {
    const int stops[] = {SIGINT, SIGTERM}, reloads[] = {SIGHUP};
    char own[] = "/tmp/reload-XXXXXX";
    config_t config = {.mu = PTHREAD_MUTEX_INITIALIZER};
    if (argc == 1) close(mkstemp(own));
    config.path = argc > 1 ? argv[1] : own;
    config.limit = read_limit(config.path);

    ctx_t *ctx = ctx_notify_signals(ctx_background(), stops, 2);
    ctx_on_signals_t on_hup;
    int rc = ctx_on_signals(&on_hup, ctx, reloads, 1, reload, &config);
    if (rc != 0) return fprintf(stderr, "%s\n", ctx_strerror(rc)), 1;

    ctx_pool_t *pool = ctx_pool_new(ctx, &(ctx_pool_desc_t){.workers = 1});
    if (!pool) return perror("pool"), 1;
    if (argc == 1) rc = ctx_pool_submit(pool, ctx, "administrate", administrate, &config);

    while (rc == 0) rc = ctx_sleep(ctx, CTX_MS(10)); /* the work, with limit_now() wherever it matters */
    printf("%s\n", ctx_cause(ctx).what);

    ctx_pool_free(pool);
    ctx_on_signals_stop(&on_hup); /* reload() is not running now, and will not be called: config may go */
    ctx_end(ctx);
    ctx_runtime_stop();
    int times = 0, limit = limit_now(&config, &times);
    if (argc > 1) return 0;
    unlink(own);
    return times == 3 && limit == 30 ? 0 : 1;
}
