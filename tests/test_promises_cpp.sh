#!/bin/sh
# Compiled as C++: an exception that leaves a callback ends the program through std::terminate, wherever the callback runs.
. tests/shell.sh

has "$CXX" || { skip exceptions "no $CXX"; finish; }

cat >"$tmp/throw.cpp" <<'END_C'
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
#include <cstdlib>
#include <cstring>
#include <exception>
#include <unistd.h>
static void throws(void *) { throw 1; }
static void nothing(void *) {}
static void terminated() { _exit(42); }
static int throwing_task(ctx_t *, void *) { throw 2; }
int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    static ctx_on_done_t reg, before, after;
    std::set_terminate(terminated);
    alarm(30);
    try {
        ctx_t *ctx = ctx_with_cancel(ctx_background());
        ctx_on_done(&before, ctx, nothing, NULL);
        if (!strcmp(what, "none")) ctx_on_done(&reg, ctx, nothing, NULL);
        else if (!strcmp(what, "cancel") || !strcmp(what, "end")) ctx_on_done(&reg, ctx, throws, NULL);
        ctx_on_done(&after, ctx, nothing, NULL);
        if (!strcmp(what, "end")) ctx_end(ctx);
        else ctx_cancel(ctx);
        if (!strcmp(what, "register")) ctx_on_done(&reg, ctx, throws, NULL); /* done: it runs in the call */
        if (!strcmp(what, "deadline")) {
            ctx_t *timed = ctx_with_timeout(ctx_background(), CTX_MS(20));
            ctx_on_done(&reg, timed, throws, NULL);
            for (;;) pause();
        }
        if (!strcmp(what, "advance")) {
            ctx_clock_fake(1);
            ctx_t *timed = ctx_with_timeout(ctx_background(), 10);
            ctx_on_done(&reg, timed, throws, NULL);
            ctx_clock_advance(20);
        }
        if (!strcmp(what, "task")) {
            if (ctx_go(ctx_background(), "task", throwing_task, NULL)) return 2;
            for (;;) pause();
        }
    } catch (int) {
        return 3;
    }
    return strcmp(what, "none") ? 4 : 0;
}
END_C

builds() {
    $CXX -std=c++11 -O2 -g -Wall -Wextra -Werror -I. -pthread "$tmp/throw.cpp" -o "$tmp/throw"
    $CXX -std=c++17 -O0 -g -Wall -Wextra -Werror -I. -pthread "$tmp/throw.cpp" -o "$tmp/throw_O0"
}
terminates() {
    for program in throw throw_O0; do
        status=0
        timeout -k 5 60 "$tmp/$program" "$1" || status=$?
        [ $status -eq 42 ]
    done
}
ends_well() { timeout -k 5 60 "$tmp/throw" none && timeout -k 5 60 "$tmp/throw_O0" none; }

expect builds
expect callbacks_that_throw_nothing_end_well ends_well
expect an_exception_out_of_a_callback_terminates_in_a_cancel terminates cancel
expect an_exception_out_of_a_callback_terminates_in_an_end terminates end
expect an_exception_out_of_a_callback_terminates_in_its_registration terminates register
expect an_exception_out_of_a_callback_terminates_on_the_runtime_thread terminates deadline
expect an_exception_out_of_a_callback_terminates_where_the_clock_is_advanced terminates advance
expect an_exception_out_of_a_task_terminates terminates task
finish
