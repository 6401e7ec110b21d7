#!/bin/sh
# Run test programs one after the other and add up: run.sh [TEST | NAME=VALUE]... [-e EXAMPLE...]
# NAME=VALUE goes into the environment of those after it. A test ends with a line `N passed, N failed`; an example passes by ending with status 0.
# RUN_LIMIT: seconds a program may take (default 600).  RUN_WRAP: a command to run it under (valgrind, qemu).
set -u
limit=${RUN_LIMIT:-600}
wrap=${RUN_WRAP:-}
passed=0 failed=0 examples=
out=$(mktemp)
trap 'rm -f "$out"' EXIT

bad() { # a failure that the program itself could not count
    echo "FAIL $1"
    failed=$((failed + 1))
}

ending() { if [ "$1" = 124 ] || [ "$1" = 137 ]; then echo "stopped after $limit s"; else echo "ended with status $1"; fi; }

add_up() { # the program's own counts, or a failure if it has none
    sum=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out" | tail -n 1)
    [ -n "$sum" ] || { bad "$1 ($(ending "$2") before its last line)"; return; }
    passed=$((passed + ${sum%% passed*}))
    sum=${sum##*passed, }
    sum=${sum%% failed}
    failed=$((failed + sum))
    if [ "$2" -ne 0 ] && [ "$sum" -eq 0 ]; then bad "$1 (all tests passed, but it ended with status $2)"; fi
}

for program in "$@"; do
    case $program in
        -e) examples=1; continue ;;
        *=*) export "$program"; continue ;;
    esac
    start=$(date +%s)
    echo "== $program"
    [ -x "$program" ] || { bad "$program (did not build)"; continue; }
    # Only the output goes through the file; the status must be the program's.
    timeout -k 5 "$limit" $wrap "$program" </dev/null >"$out" 2>&1
    status=$?
    seconds=$(($(date +%s) - start))
    if [ -n "$examples" ]; then
        if [ $status -eq 0 ]; then passed=$((passed + 1)); echo "ok example_${program##*/}"
        else cat "$out"; bad "example_${program##*/} ($(ending $status))"; fi
        continue
    fi
    grep -vE '^[0-9]+ passed, [0-9]+ failed$' "$out"
    add_up "$program" $status
    echo "   $seconds s"
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
