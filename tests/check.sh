#!/bin/bash
# The matrix: check.sh [PATTERN] runs every cell, or those whose name matches. `make check` installs the tools first.
#
# A cell is one way to compile and run the tests, or one tool. Not every combination is run: each compiler, standard,
# optimisation level, sanitizer, machine and configuration appears at least once, and those that interact (the portable
# parker with the thread sanitizer, strict C99 with musl) appear together. A cell whose tool is missing is named as skipped.
#
# Not here, and why:
#   helgrind, drd   they see no order in __atomic builtins, so that each correct publication is a race to them;
#                   the thread sanitizer knows the builtins, and runs with both compilers (and the portable parker:
#                   it holds signals back from a thread that sleeps in a futex).
#   gcc -fanalyzer  takes the second of two references that are dropped for a double free.
#   memory sanitizer  needs a libc and libcrypto built with it; memcheck finds the same here.
set -u
cd "$(dirname "$0")/.." || exit 2
pattern=${1:-.}
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef -Werror"
cwarn="$warn -Wstrict-prototypes"
dir=build/check
passed=0 failed=0 skipped=()
export TEST_TIMEOUT=${TEST_TIMEOUT:-120} RUN_LIMIT=300

export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
# Without these a block counts as reachable while a dead register or stack slot still shows its address.
export LSAN_OPTIONS=use_registers=0:use_stacks=0
memcheck="valgrind --fair-sched=yes -q --error-exitcode=9 --leak-check"
memcheck_lost="$memcheck=full --show-leak-kinds=definite --errors-for-leak-kinds=definite"
memcheck_left="$memcheck=full --show-leak-kinds=all --errors-for-leak-kinds=all"

# -- cells ---------------------------------------------------------------------------------------------------------

skip() {
    [[ $1 =~ $pattern ]] || return 0
    skipped+=("$1")
    echo "skip $1 ($2)"
}

# cell NAME "TOOL..." COMMAND...: one line of the report; the log is shown when it fails.
cell() {
    local name=$1 tools=$2 tool start log=$dir/$1.log
    shift 2
    [[ $name =~ $pattern ]] || return 0
    for tool in $tools; do
        command -v "$tool" >/dev/null || { skip "$name" "no $tool"; return; }
    done
    start=$(date +%s%N)
    ("$@") </dev/null >"$log" 2>&1
    local status=$? seconds=$((($(date +%s%N) - start) / 100000000))
    seconds=$((seconds / 10)).$((seconds % 10))
    if ((status == 0)); then
        passed=$((passed + 1))
        echo "ok $name ($seconds s)"
    else
        failed=$((failed + 1))
        show "$log"
        echo "FAIL $name ($seconds s, status $status, log $log)"
    fi
}

# What a reader wants of a long log: the failures with what came before them, or else its end.
show() {
    if grep -qE '^FAIL|error:|ERROR|WARNING' "$1"; then
        grep -E -B4 -A12 '^FAIL|error:|ERROR|WARNING' "$1" | head -n 60 | sed 's/^/    /'
    else
        tail -n 30 "$1" | sed 's/^/    /'
    fi
}

# -- running all tests one way -------------------------------------------------------------------------------------

# together COMMAND ITEM...: COMMAND for each item, two at a time.
together() {
    local command=$1 item
    shift
    for item; do
        while (($(jobs -rp | wc -l) >= 2)); do wait -n; done
        $command "$item" &
    done
    wait
}

# Tests that need the implementation in their own file: they look inside it, or configure it.
own_implementation=$(grep -lE 'fault\.h|ctx__|define pthread_|CTXCANCEL_(STATIC|MALLOC|ASSERT|TEST_)' tests/test_*.c)

# The other tests ask for the implementation too, so to have them without they are given a ctxcancel.h that takes this
# back.
mkdir -p $dir/apart
printf '#undef CTXCANCEL_IMPLEMENTATION\n#include "../../../ctxcancel.h"\n' >$dir/apart/ctxcancel.h
apart_flags="-I$dir/apart -D_DEFAULT_SOURCE" # which the implementation would define in strict ISO mode

# Tests that measure how soon a thread notices run by themselves, the others two at a time.
alone='test_(timers|waiting|polling|pool|time)\.c'

# suite NAME COMPILER FLAG...: compile each test with its own implementation and run it.  $tests: which ones, if not
# all; $link: what to link.
suite() {
    local out=$dir/$1 list=${tests:-$(echo tests/test_*.c)} test status=0
    local compiler=("${@:2}")
    rm -rf "$out"
    mkdir -p "$out"
    together compile_test $list
    together run_test $(echo "$list" | tr ' ' '\n' | grep -vE "$alone")
    for test in $list; do
        if [[ $test =~ $alone ]]; then run_test "$test"; fi
        cat "$out/$(basename "$test" .c).log"
        tail -n 1 "$out/$(basename "$test" .c).log" | grep -q '^[1-9][0-9]* passed, 0 failed$' || status=1
    done
    return $status
}

compile_test() {
    local apart= objects=${link:-}
    if [[ " ${own_implementation//$'\n'/ } " == *" $1 "* ]]; then objects=; elif [ -n "$objects" ]; then apart=$apart_flags; fi
    timeout 300 "${compiler[@]}" -pthread $apart -I. -Itests "$1" -o "$out/$(basename "$1" .c)" $objects
}
run_test() { tests/run.sh "$out/$(basename "$1" .c)" >"$out/$(basename "$1" .c).log" 2>&1; }

# The same with the implementation compiled once for all: the storms in their full length, or short.
once() {
    local name=$1 link=$dir/$1.o
    shift
    "$@" -pthread -I. -c $dir/impl.c -o "$link" || return 1
    suite "$name" "$@"
}
quick() { TEST_QUICK=1 once "$@"; }

# A few of them, one or two for each kind of code, where a cell differs little from one that runs all; FULL=1: all.
some=$(echo tests/test_{context,timers,pool,group,channel,batch,app}.c)
[ -n "${FULL:-}" ] && some=
few() { tests=$some quick "$@"; }

# The same, each test with its own.
quick_whole() { TEST_QUICK=1 suite "$@"; }
few_whole() { tests=$some TEST_QUICK=1 suite "$@"; }

# apart NAME COMPILER SUFFIX IMPLEMENTER FLAG...: tests by one compiler, the implementation by another or with other
# flags.
apart() {
    local name=$1 tester=$2 suffix=$3 tests
    shift 3
    local link=$dir/$name.o
    "$@" -pthread -I. -c $dir/impl.$suffix -o "$link" || return 1
    [ "$suffix" = cpp ] && link="$link -lstdc++" # as the C++ compiler would link it
    tests=$(ls ${some:-tests/test_*.c} | grep -vxF "$own_implementation")
    TEST_QUICK=1 suite "$name" "$tester" -std=gnu11 -O2 -g
}

# -- the header alone ----------------------------------------------------------------------------------------------

mkdir -p $dir
printf '#define CTXCANCEL_IMPLEMENTATION\n#include "ctxcancel.h"\n' | tee $dir/impl.c >$dir/impl.cpp
printf '#include "ctxcancel.h"\n' | tee $dir/decl.c >$dir/decl.cpp

# headers COMPILER SUFFIX STANDARD...: declarations and implementation are free of warnings.
headers() {
    local compiler=$1 suffix=$2 part flags=$warn
    shift 2
    [ "$suffix" = c ] && flags=$cwarn
    for part in decl impl; do
        printf '%s\n' "$@" |
            xargs -t -P 2 -I@ $compiler -std=@ $flags -O1 -pthread -I. -c $dir/$part.$suffix -o /dev/null || return 1
    done
}

configurations() { # COMPILER
    printf '%s\n' -DCTXCANCEL_NO_FUTEX -DCTXCANCEL_NO_SITES -DCTXCANCEL_STATIC -DNDEBUG \
        -DCTXCANCEL_NO_STB_DS_IMPLEMENTATION "-DCTXCANCEL_STATIC -DCTXCANCEL_NO_FUTEX -DNDEBUG" "-O3" "-Os" |
        xargs -t -P 2 -I@ sh -c "$1 -std=c99 $cwarn -O2 @ -pthread -I. -c $dir/impl.c -o /dev/null"
}

# What the cells above do not ask for. The compilers see what may be NULL only when they optimise, and tests that ask
# about NULL would trip on it.
careful() { # COMPILER FLAG...
    printf '%s\n' -O1 -O2 -O3 "-O2 -DNDEBUG" "-O2 -DCTXCANCEL_NO_FUTEX" |
        xargs -t -P 2 -I@ sh -c "$* $cwarn -Wnull-dereference -Wfloat-equal @ -pthread -I. -c $dir/impl.c -o /dev/null"
}

# -- tools ---------------------------------------------------------------------------------------------------------

# A copy named .c, since the analyzer passes over functions of included files. It takes a minute of one core, so it is
# begun before the first cell; its own cell waits for it.
run_tidy() {
    cp ctxcancel.h $dir/ctxcancel.c
    timeout 500 clang-tidy --quiet $dir/ctxcancel.c -- -std=c11 -DCTXCANCEL_IMPLEMENTATION -pthread &&
        timeout 300 clang-tidy --quiet $dir/decl.c --header-filter='ctxcancel\.h$' -- -std=c11 -I. -pthread
}

tidy() { # a cell is no parent of that job, so they meet at a file
    while [ ! -s $dir/tidy.status ]; do sleep 1; done
    cat $dir/tidy.out
    return "$(cat $dir/tidy.status)"
}
rm -f $dir/tidy.status
if [[ clang-tidy =~ $pattern ]] && command -v clang-tidy >/dev/null; then
    { run_tidy >$dir/tidy.out 2>&1; echo $? >$dir/tidy.status; } &
fi

check_cpp() {
    timeout 300 cppcheck --quiet --std=c11 --enable=warning,performance,portability --inline-suppr --error-exitcode=1 \
        --suppressions-list=tests/cppcheck.txt -DCTXCANCEL_IMPLEMENTATION -D__linux__ -D__GNUC__=12 -I. $dir/impl.c
}

# The checks must see a leak if there is one: each has to fail on this program, and only because of the leak.
# A forgotten context still stands in the tree, so only memcheck counts it, as memory that is reachable at the end.
cat >$dir/leak.c <<'END'
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
static __attribute__((noinline)) void leak(void) {
#ifdef LEAK_A_CONTEXT
    ctx_t *volatile lost = ctx_with_cancel(ctx_background());
#else
    void *volatile lost = CTXCANCEL_MALLOC(100);
#endif
    lost = NULL;
    (void)lost;
}
static __attribute__((noinline)) int scrub(void) {
    volatile char over[4096];
    for (size_t i = 0; i < sizeof over; i++) over[i] = 0;
    return over[17];
}
int main(int argc, char **argv) {
    (void)argv;
    if (argc > 1) leak();
    int rc = scrub();
    ctx_runtime_stop();
    return rc;
}
END

seeded_leak() { # NAME WRAP COMPILER FLAG...
    local prog=$dir/leak-$1 wrap=$2
    shift 2
    "$@" -g -std=c11 -pthread -I. $dir/leak.c -o "$prog" || return 1
    echo "without the leak:"
    timeout 60 $wrap "$prog" || return 1
    echo "with it:"
    if timeout 60 $wrap "$prog" leak; then echo "ERROR: the leak was not seen"; return 1; fi
    return 0
}

# Where a foreign libc or machine looks for stb_ds.h.
mkdir -p $dir/include
for place in /usr/include/stb /usr/local/include/stb; do
    [ -e $place/stb_ds.h ] && ln -sfn $place $dir/include/stb
done

# The child of a fork cannot start a thread here: qemu-user 7.2 ends with "qemu_plugin_vcpu_init_hook: assertion failed".
qemu() { # MACHINE COMPILER FLAG...
    tests=$(ls ${some:-tests/test_*.c} | grep -v test_fork) TEST_NO_CHILD_THREADS=1 RUN_WRAP="qemu-$1" \
        quick "qemu-$1" "${@:2}" -static -isystem $dir/include
}

# Older 32-bit processors. ARMv6 without its K extension is what Raspbian compiles for; it has no yield instruction, and
# no 64-bit atomic operations: see -latomic in README.md.
armv6() {
    arm-linux-gnueabihf-gcc -march=armv6+fp -marm -std=c11 -O2 $cwarn -isystem $dir/include -I. -c $dir/impl.c -o $dir/armv6.o
}

# From the i586 on, programs need no libatomic.
without_libatomic() {
    local machine
    for machine in i586 i686; do
        gcc -m32 -march=$machine $asm -std=c11 -O2 -pthread -I. docs/examples/first.c -o $dir/first-$machine || return 1
        timeout 60 $dir/first-$machine || return 1
    done
}

# musl's FD_SET converts the sign of a descriptor in the line that uses it.
musl() { few musl-c99 musl-gcc -std=c99 -O2 -g $cwarn -Wno-sign-conversion -static -isystem $dir/include; }
# Tests that fork have children which leave by _exit() with what they still hold, so what is reachable does not count; and
# what other threads of the parent held is lost in a child by nature, so in test_fork and test_group only bad accesses
# count (the address sanitizer counts the leaks of the latter).
under_memcheck() {
    local status=0
    export RUN_LIMIT=500
    tests=$(ls ${some:-tests/test_*.c} | grep -vE 'test_(fork|group)\.c') RUN_WRAP=$memcheck_lost \
        quick memcheck gcc -std=c11 -O1 -g || status=1
    tests=$(echo tests/test_{fork,group}.c) RUN_WRAP="$memcheck=no" quick memcheck-fork gcc -std=c11 -O1 -g || status=1
    return $status
}

# -- the matrix ----------------------------------------------------------------------------------------------------

cell headers-gcc gcc headers gcc c c99 c11 c17 gnu2x
cell headers-clang clang headers clang c c99 c11 c17 gnu2x
cell headers-g++ g++ headers g++ cpp c++11 c++14 c++20 gnu++17
cell headers-clang++ clang++ headers clang++ cpp c++11 c++14 c++20 gnu++17
cell configurations-gcc gcc configurations gcc
cell configurations-clang clang configurations clang
cell careful-gcc gcc careful gcc -std=c11
cell careful-clang clang careful clang -std=c11 -Wmissing-variable-declarations
cell build-all-languages-clang "clang clang++" env CC=clang CXX=clang++ tests/test_build.sh

cell clang-tidy clang-tidy tidy
cell cppcheck cppcheck check_cpp
cell seeded-leak-gcc-address gcc seeded_leak gcc-asan "" gcc -fsanitize=address -fno-omit-frame-pointer
cell seeded-leak-clang-address clang seeded_leak clang-asan "" clang -fsanitize=address -fno-omit-frame-pointer
cell seeded-leak-clang-leak clang seeded_leak clang-lsan "" clang -fsanitize=leak
cell seeded-leak-memcheck "gcc valgrind" seeded_leak memcheck "$memcheck_lost" gcc
cell forgotten-context-memcheck "gcc valgrind" seeded_leak memcheck "$memcheck_left" gcc -DLEAK_A_CONTEXT

# `make test` shortens its storms; here the tests that have some run at full length.
full_length() { tests=$(grep -lE 'test_scale|TEST_QUICK|steps_' tests/test_*.c) once "$@"; }
cell full-length gcc full_length full-length gcc -std=c11 -O2 -g $cwarn
cell full-length-nofutex gcc full_length full-length-nofutex gcc -std=c11 -O2 -g -DCTXCANCEL_NO_FUTEX $cwarn
cell explore gcc make --no-print-directory explore TIME=180

cell gcc-c99-O0 gcc quick_whole gcc-c99-O0 gcc -std=c99 -O0 -g $cwarn
cell gcc-c17-O3 gcc few gcc-c17-O3 gcc -std=c17 -O3 $cwarn
cell gcc-c17-O3-lto gcc few gcc-c17-O3-lto gcc -std=c17 -O3 -flto=auto $cwarn
cell clang-c11-O2 clang few clang-c11-O2 clang -std=c11 -O2 -g $cwarn
cell clang-c99-O3-lto "clang ld.lld" few clang-c99-O3-lto clang -std=c99 -O3 -flto -fuse-ld=lld $cwarn \
    -Wno-unused-command-line-argument
cell g++-c++11 g++ apart g++-c++11 gcc cpp g++ -std=c++11 -O2 -g $warn
cell clang++-c++20 clang++ apart clang++-c++20 clang cpp clang++ -std=c++20 -O2 -g $warn
cell static gcc few_whole static gcc -std=c11 -O2 -DCTXCANCEL_STATIC $cwarn
cell no-sites gcc apart no-sites gcc c gcc -std=c11 -O2 -DCTXCANCEL_NO_SITES $cwarn

sanitize="-O1 -g -fno-omit-frame-pointer"
cell gcc-address-undefined gcc quick gcc-address-undefined gcc -std=c11 $sanitize -fsanitize=address,undefined
cell clang-address-undefined-nofutex clang few clang-address-undefined-nofutex \
    clang -std=c11 $sanitize -fsanitize=address,undefined -DCTXCANCEL_NO_FUTEX
# The polling tests are loops of one thread, which the thread sanitizer makes slow and has nothing to say of.
no_polling() { tests=$(ls tests/test_*.c | grep -v test_polling) quick "$@"; }
cell gcc-thread gcc no_polling gcc-thread gcc -std=c11 $sanitize -fsanitize=thread
cell clang-thread clang few clang-thread clang -std=c11 $sanitize -fsanitize=thread
cell clang-leak clang few clang-leak clang -std=c11 $sanitize -fsanitize=leak
cell memcheck "gcc valgrind" under_memcheck
skip helgrind "knows no atomic builtins: see the top of tests/check.sh"
skip drd "knows no atomic builtins: see the top of tests/check.sh"

# Everything that is for Linux alone is left out, as on another POSIX system.
cell not-linux gcc quick not-linux gcc -U__linux__ -std=c11 -O2 -g $cwarn
cell musl-c99 musl-gcc musl
# Debian's gcc-12-multilib leaves out the link to asm/ that gcc-multilib has.
asm="-isystem /usr/include/x86_64-linux-gnu"
if echo '#include <errno.h>' | gcc -m32 $asm -x c -c - -o $dir/m32.o 2>/dev/null; then
    cell i386 gcc few i386 gcc -m32 -std=c11 -O2 $cwarn $asm
    cell i586-without-libatomic gcc without_libatomic
else
    skip i386 "gcc has no -m32 here"
    skip i586-without-libatomic "gcc has no -m32 here"
fi
cell armv6-compiles arm-linux-gnueabihf-gcc armv6
cell arm-32 "arm-linux-gnueabihf-gcc qemu-arm" qemu arm arm-linux-gnueabihf-gcc -std=c11 -O2 $cwarn
cell arm-64 "aarch64-linux-gnu-gcc qemu-aarch64" qemu aarch64 aarch64-linux-gnu-gcc -std=c11 -O2 $cwarn

((${#skipped[@]})) && echo "${#skipped[@]} skipped: ${skipped[*]}"
echo "$passed passed, $failed failed"
((passed > 0 && failed == 0))
