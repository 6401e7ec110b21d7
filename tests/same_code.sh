#!/bin/bash
# Does ctxcancel.h compile to the same machine code as another version of it?
#   tests/same_code.sh COMMIT|FILE     compares the working tree with that one; status 0 if the code is the same
# For changes that shall only change how the source reads. Assertions are left out, for they hold line numbers. Not for
# -O0 and -Os: there a function of one call is a call.
set -u
cd "$(dirname "$0")/.." || exit 2
other=${1:?usage: tests/same_code.sh COMMIT|FILE}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/a" "$work/b"
if [ -f "$other" ]; then cp "$other" "$work/a/ctxcancel.h"; else git show "$other:ctxcancel.h" >"$work/a/ctxcancel.h" || exit 2; fi
cp ctxcancel.h "$work/b/ctxcancel.h"
status=0
for flags in "-O2" "-O3" "-O2 -DCTXCANCEL_NO_FUTEX"; do
    for side in a b; do
        # shellcheck disable=SC2086
        (cd "$work/$side" && ${CC:-gcc} -std=c11 $flags -DCTXCANCEL_IMPLEMENTATION "-DCTXCANCEL_ASSERT(x)=((void)0)" -x c -c ctxcancel.h -o code.o) ||
            exit 2
        # A line for each function, in order of their names: places in the file do not count.
        objdump -d --no-show-raw-insn -r "$work/$side/code.o" | sed 1,3d |
            sed -E 's/^ *[0-9a-f]+://; s/[-+]?0x[0-9a-f]+\(%rip\)//; s/#.*//; s/(call|j[a-z]+) +[0-9a-f]+/\1/; s/ <[^>]*>$//; s/([a-z.])[-+]0x[0-9a-f]+$/\1/; s/\t+[0-9a-f]+: R_/ R_/' |
            awk '/^[0-9a-f]+ <.*>:$/ {printf "\n"; sub(/^[0-9a-f]+ /, "")} {printf "%s;", $0}' | sort >"$work/$side/code"
    done
    if cmp -s "$work/a/code" "$work/b/code"; then
        echo "same: $flags"
    else
        echo "differs: $flags ($(diff "$work/a/code" "$work/b/code" | grep -c '^[<>]') functions)"
        status=1
    fi
done
exit $status
