#!/bin/sh
# Two runtimes in one process (CTXCANCEL_STATIC): they share no context, and signals are handled by one at a time.
. tests/shell.sh

cat >"$tmp/side.h" <<'END_C'
#include <stdbool.h>
/* One runtime, as the other file sees it. */
typedef struct {
    void *(*notify)(const int *signals, int n); /* a context that the signals cancel */
    int (*err)(void *ctx);
    int (*wait)(void *ctx);
    int (*cause)(void *ctx);
    void (*end)(void *ctx);
    int (*timeout)(void);                       /* use it for something else */
    void (*stop)(void);
} side_t;
extern const side_t side_a, side_b;
END_C
cat >"$tmp/side.c" <<'END_C'
#define CTXCANCEL_STATIC
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include "side.h"
static void *notify(const int *signals, int n) { return ctx_notify_signals(ctx_background(), signals, (size_t)n); }
static int err(void *ctx) { return ctx_err((ctx_t *)ctx); }
static int wait_for(void *ctx) { return ctx_wait((ctx_t *)ctx, CTX_S(30)); }
static int cause(void *ctx) { return ctx_cause((ctx_t *)ctx).code; }
static void end(void *ctx) { ctx_end((ctx_t *)ctx); }
static int timeout_of_it(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    int rc = ctx_wait(ctx, CTX_FOREVER);
    ctx_end(ctx);
    return rc == CTX_DEADLINE_EXCEEDED;
}
const side_t SIDE = {notify, err, wait_for, cause, end, timeout_of_it, ctx_runtime_stop};
END_C
cat >"$tmp/main.c" <<'END_C'
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "side.h"
#define REQUIRE(expr) do { if (!(expr)) { printf("line %d: %s\n", __LINE__, #expr); exit(1); } } while (0)
static const int usr1[] = {SIGUSR1}, usr2[] = {SIGUSR2}, both[] = {SIGUSR1, SIGUSR2};
static void (*action(int sig))(int) {
    struct sigaction now;
    sigaction(sig, NULL, &now);
    return now.sa_handler;
}
/* While `one` handles signals the other is told so, whatever signals it asks for; `one` still gets them. */
static void check_turn(const side_t *one, const side_t *other) {
    void *first = one->notify(usr1, 1), *refused = other->notify(usr1, 1);
    REQUIRE(one->err(first) == 0);
    REQUIRE(other->err(refused) == -EALREADY);
    other->end(refused);
    refused = other->notify(usr2, 1);
    REQUIRE(other->err(refused) == -EALREADY);
    other->end(refused);
    refused = other->notify(both, 2);
    REQUIRE(other->err(refused) == -EALREADY);
    other->end(refused);
    REQUIRE(action(SIGUSR2) == SIG_DFL); /* a refused one has changed nothing */
    void *second = one->notify(both, 2); /* the same runtime may have more of them */
    REQUIRE(one->err(second) == 0);
    kill(getpid(), SIGUSR1);
    REQUIRE(one->wait(first) == -ECANCELED && one->cause(first) == SIGUSR1);
    REQUIRE(one->wait(second) == -ECANCELED && one->cause(second) == SIGUSR1);
    one->end(first);
    refused = other->notify(usr1, 1);
    REQUIRE(other->err(refused) == -EALREADY); /* one of the first's is left */
    other->end(refused);
    one->end(second);
    REQUIRE(action(SIGUSR1) == SIG_DFL && action(SIGUSR2) == SIG_DFL);
    first = other->notify(both, 2); /* now it may */
    REQUIRE(other->err(first) == 0);
    kill(getpid(), SIGUSR2);
    REQUIRE(other->wait(first) == -ECANCELED && other->cause(first) == SIGUSR2);
    other->end(first);
    REQUIRE(action(SIGUSR1) == SIG_DFL && action(SIGUSR2) == SIG_DFL);
}
/* The process lives although the other runtime asks again and again while signals come to the one that has them. */
static void check_rain(void) {
    for (int i = 0; i < 200; i++) {
        void *a = side_a.notify(usr1, 1);
        REQUIRE(side_a.err(a) == 0);
        void *b = side_b.notify(usr1, 1);
        kill(getpid(), SIGUSR1);
        REQUIRE(side_a.wait(a) == -ECANCELED);
        side_b.end(b);
        side_a.end(a);
    }
}
static void *asks(void *arg) {
    const side_t *side = arg;
    for (int i = 0; i < 2000; i++) {
        void *ctx = side->notify(usr1, 1);
        if (side->err(ctx) != 0 && side->err(ctx) != -EALREADY) return (void *)1;
        side->end(ctx);
    }
    return NULL;
}
/* Both ask at the same time: never both have it. The program's handler stands before and after. */
static void handler(int sig) { (void)sig; }
static void check_race(void) {
    pthread_t a, b;
    void *bad_a, *bad_b;
    signal(SIGUSR1, handler);
    pthread_create(&a, NULL, asks, (void *)&side_a);
    pthread_create(&b, NULL, asks, (void *)&side_b);
    pthread_join(a, &bad_a);
    pthread_join(b, &bad_b);
    REQUIRE(!bad_a && !bad_b);
    REQUIRE(action(SIGUSR1) == handler);
    signal(SIGUSR1, SIG_DFL);
}
static void check_fork(void) {
    void *a = side_a.notify(usr1, 1);
    REQUIRE(side_a.err(a) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(20);
        REQUIRE(side_a.timeout() && side_b.timeout());
        void *b = side_b.notify(usr1, 1);
        REQUIRE(side_b.err(b) == -EALREADY); /* the child has a's context, too */
        side_b.end(b);
        side_a.end(a);
        b = side_b.notify(usr1, 1);
        REQUIRE(side_b.err(b) == 0);
        side_b.end(b);
        _exit(0);
    }
    int status = 1;
    REQUIRE(waitpid(pid, &status, 0) == pid && status == 0);
    side_a.end(a);
}
int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    REQUIRE(side_a.timeout() && side_b.timeout());
    if (!strcmp(what, "turn")) check_turn(&side_a, &side_b), check_turn(&side_b, &side_a);
    if (!strcmp(what, "rain")) check_rain();
    if (!strcmp(what, "race")) check_race();
    if (!strcmp(what, "fork")) check_fork();
    REQUIRE(side_a.timeout() && side_b.timeout());
    side_a.stop();
    side_b.stop();
    return 0;
}
END_C

builds() {
    for side in a b; do
        $CC -std=c11 -O2 -g -Wall -Wextra -Werror -I. -I"$tmp" -pthread -DSIDE=side_$side -c "$tmp/side.c" -o "$tmp/$side.o"
    done
    $CC -std=gnu11 -O2 -g -Wall -Wextra -Werror -I"$tmp" -pthread "$tmp/main.c" "$tmp/a.o" "$tmp/b.o" -o "$tmp/two"
}
two() { timeout -k 5 60 "$tmp/two" "$1"; }

expect builds
expect while_one_runtime_handles_signals_the_other_is_told_already two turn
expect a_signal_that_one_runtime_handles_never_ends_the_process two rain
expect runtimes_that_ask_at_the_same_time_leave_the_programs_action two race
expect a_child_of_a_fork_keeps_the_turn two fork
finish
