#!/bin/sh
# A shared object with the library in it: it may be unloaded after ctx_runtime_stop(), and leaves nothing in the process.
. tests/shell.sh

# The object: all that leaves something in a process is used, by whichever thread calls.
cat >"$tmp/plugin.c" <<'END_C'
#define CTXCANCEL_STATIC
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include <signal.h>
static void nothing(void *arg) { (void)arg; }
static int task(ctx_t *ctx, void *arg) { (void)ctx, (void)arg; return 0; }
int plugin_use(void);
int plugin_use(void) {
    ctx_on_done_t reg;
    ctx_t *ctx = ctx_with_cancel(ctx_background()), *child = ctx_merge(ctx, ctx_background());
    int ok = ctx_err(child) == 0 && ctx_on_done(&reg, child, nothing, NULL) && ctx_done_fd(child) >= 0 && ctx_cancel(ctx);
    ctx_end(child);
    ctx_end(ctx);
    return ok;
}
int plugin_use_threads(void);
int plugin_use_threads(void) {
    const int sig = SIGUSR1;
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1)), *caught = ctx_notify_signals(ctx_background(), &sig, 1);
    int ok = ctx_wait(ctx, CTX_FOREVER) == CTX_DEADLINE_EXCEEDED && ctx_err(caught) == 0 &&
             ctx_go(ctx_background(), "go", task, NULL) == 0 && ctx_go_wait(ctx_background()) == 0;
    ctx_end(caught);
    ctx_end(ctx);
    return ok;
}
void plugin_stop(void);
void plugin_stop(void) { ctx_runtime_stop(); }
END_C

# The program: it knows nothing of the library.
cat >"$tmp/host.c" <<'END_C'
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
static void *object;
static int (*use)(void), (*use_threads)(void);
static void (*stop)(void);
static pthread_barrier_t used, gone;

static void fail(const char *what) { printf("failed: %s\n", what); exit(1); }
static void *symbol(const char *name) {
    void *p = dlsym(object, name);
    if (!p) fail(name);
    return p;
}
static void load(const char *path) {
    object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!object) fail(dlerror());
    *(void **)&use = symbol("plugin_use");
    *(void **)&use_threads = symbol("plugin_use_threads");
    *(void **)&stop = symbol("plugin_stop");
}
static void unload(void) {
    stop();
    if (dlclose(object) != 0) fail("dlclose");
}
static int loaded(const char *path) {
    void *p = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (p) dlclose(p);
    return p != NULL;
}
static int free_keys(void) {
    static pthread_key_t keys[PTHREAD_KEYS_MAX];
    int n = 0;
    while (n < PTHREAD_KEYS_MAX && pthread_key_create(&keys[n], NULL) == 0) n++;
    for (int i = 0; i < n; i++) pthread_key_delete(keys[i]);
    return n;
}
static int entries(const char *path) {
    DIR *dir = opendir(path);
    int n = 0;
    if (!dir) return -1;
    while (readdir(dir)) n++;
    closedir(dir);
    return n;
}
static void *uses_and_outlives(void *arg) {
    *(int *)arg = use();
    pthread_barrier_wait(&used);
    pthread_barrier_wait(&gone);
    return NULL; /* destructors of this thread run now */
}
int main(int argc, char **argv) {
    const char *path = argv[1], *what = argc > 2 ? argv[2] : "";
    if (!strcmp(what, "unload")) { /* it really goes, with all its threads and descriptors */
        int fds = entries("/proc/self/fd");
        load(path);
        if (!use() || !use_threads()) fail("use");
        unload();
        if (loaded(path)) fail("it is still loaded");
        if (entries("/proc/self/fd") != fds) fail("a descriptor is left");
        if (entries("/proc/self/task") != entries("/proc/self/task")) fail("?");
    } else if (!strcmp(what, "threads")) { /* threads that used it end when it is gone */
        enum { N = 8 };
        pthread_t threads[N];
        int ok[N];
        pthread_barrier_init(&used, NULL, N + 1);
        pthread_barrier_init(&gone, NULL, N + 1);
        load(path);
        for (int i = 0; i < N; i++) pthread_create(&threads[i], NULL, uses_and_outlives, &ok[i]);
        pthread_barrier_wait(&used);
        if (!use_threads()) fail("use");
        unload();
        if (loaded(path)) fail("it is still loaded");
        pthread_barrier_wait(&gone);
        for (int i = 0; i < N; i++) pthread_join(threads[i], NULL);
        for (int i = 0; i < N; i++)
            if (!ok[i]) fail("use in a thread");
    } else if (!strcmp(what, "fork")) { /* no handler of it is left behind */
        load(path);
        if (!use()) fail("use");
        unload();
        pid_t pid = fork();
        if (pid == 0) _exit(0);
        int status = 1;
        if (waitpid(pid, &status, 0) != pid || status != 0) fail("fork");
    } else if (!strcmp(what, "keys")) {
        int before = free_keys(), n = atoi(argv[3]);
        for (int i = 0; i < n; i++) {
            load(path);
            if (!use()) fail("use");
            if (i % 100 == 0 && !use_threads()) fail("use of threads");
            unload();
        }
        if (free_keys() != before) {
            printf("%d keys were free, now %d\n", before, free_keys());
            fail("a key is left");
        }
    } else {
        fail("what?");
    }
    puts("fine");
    return 0;
}
END_C

build() { # OBJECT FLAG...
    object=$1
    shift
    $CC -std=c11 -O2 -g -Wall -Wextra -Werror -I. -fPIC -shared -pthread "$@" "$tmp/plugin.c" -o "$tmp/$object"
}
host() { timeout -k 5 "${limit:-60}" "$tmp/host" "$@"; }

builds() {
    build plugin.so
    build plugin_nofutex.so -DCTXCANCEL_NO_FUTEX
    $CC -std=c11 -O2 -g "$tmp/host.c" -o "$tmp/host" -pthread -ldl
}
a_used_object_is_unloaded_with_all_it_has() { host "$tmp/plugin.so" unload && host "$tmp/plugin_nofutex.so" unload; }
threads_that_used_an_object_may_end_when_it_is_gone() { host "$tmp/plugin.so" threads && host "$tmp/plugin_nofutex.so" threads; }
a_fork_after_the_object_is_gone_is_safe() { host "$tmp/plugin.so" fork; }
two_thousand_loads_leak_no_key() { limit=300 host "$tmp/plugin.so" keys 2000; }

expect builds
expect a_used_object_is_unloaded_with_all_it_has
expect threads_that_used_an_object_may_end_when_it_is_gone
expect a_fork_after_the_object_is_gone_is_safe
expect two_thousand_loads_leak_no_key
finish
