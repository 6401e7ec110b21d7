#!/bin/bash
# Run test programs and add up: run.sh [TEST | NAME=VALUE]... [-e EXAMPLE...]
# NAME=VALUE goes into the environment of the programs after it. A test ends with a line `N passed, N failed`; an
# example passes by ending with status 0. Each program's report appears when the program has ended.
# SKIPPED=NAMES: what is left out, for the last lines.
# JOBS: how many run at the same time (default 1).  RUN_LIMIT: seconds a program may take (default 600).
# RUN_WRAP: a command to run it under (valgrind, qemu).
set -u
jobs=${JOBS:-1}
limit=${RUN_LIMIT:-600}
wrap=${RUN_WRAP:-}
passed=0 failed=0 skipped=
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# Programs that measure how soon a thread notices run one at a time, after the others.
alone='/test_(timers|waiting|polling|pool|time)$'

bad() { # a failure that the program itself could not count
    echo "FAIL $1"
    failed=$((failed + 1))
}

ending() { if [ "$1" = 124 ] || [ "$1" = 137 ]; then echo "stopped after $limit s"; else echo "ended with status $1"; fi; }

add_up() { # PROGRAM STATUS OUT: the program's own counts, or a failure if it has none
    local sum
    sum=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$3" | tail -n 1)
    [ -n "$sum" ] || { bad "$1 ($(ending "$2") before its last line)"; return; }
    passed=$((passed + ${sum%% passed*}))
    sum=${sum##*passed, }
    sum=${sum%% failed}
    failed=$((failed + sum))
    if [ "$2" -ne 0 ] && [ "$sum" -eq 0 ]; then bad "$1 (all tests passed, but it ended with status $2)"; fi
}

# run NUMBER KIND PROGRAM [NAME=VALUE]...: leaves the output in $dir/NUMBER.out and, last, the rest in $dir/NUMBER.
run() {
    local out=$dir/$1.out start status=missing
    start=$(date +%s)
    if [ -x "$3" ]; then
        # Only the output goes through the file; the status must be the program's.
        env "${@:4}" timeout -k 5 "$limit" $wrap "$3" </dev/null >"$out" 2>&1
        status=$?
    fi
    echo "$status $(($(date +%s) - start)) $2 $3" >"$dir/$1.new"
    mv "$dir/$1.new" "$dir/$1"
}

# Report the programs that have ended since the last call.
report() {
    local done number status seconds kind program
    for done in "$dir"/*; do
        number=${done##*/}
        case $number in *[!0-9]*) continue ;; esac
        read -r status seconds kind program <"$done"
        rm -f "$done"
        echo "== $program"
        if [ "$status" = missing ]; then bad "$program (did not build)"
        elif [ "$kind" = example ]; then
            if [ "$status" -eq 0 ]; then passed=$((passed + 1)); echo "ok example_${program##*/}"
            else cat "$dir/$number.out"; bad "example_${program##*/} ($(ending "$status"))"; fi
        else
            grep -vE '^[0-9]+ passed, [0-9]+ failed$' "$dir/$number.out"
            add_up "$program" "$status" "$dir/$number.out"
            echo "   $seconds s"
        fi
    done
}

until_running() { # NUMBER: wait until no more than that many programs run
    while (($(jobs -rp | wc -l) > $1)); do wait -n; done
    report
}

number=0 kind=test variables=() later=()
start() { # HOW_MANY_BESIDE KIND PROGRAM [NAME=VALUE]...
    until_running "$1"
    number=$((number + 1))
    run $number "${@:2}" &
}

for argument; do
    case $argument in
        -e) kind=example ;;
        SKIPPED=*) skipped=${argument#SKIPPED=} ;;
        *=*) variables+=("$argument") ;;
        *)
            if ((jobs > 1)) && [[ $argument =~ $alone ]]; then later+=("$kind $argument ${variables[*]}"); continue; fi
            start $((jobs - 1)) $kind "$argument" "${variables[@]}"
            ;;
    esac
done
for words in "${later[@]}"; do start 0 $words; done
until_running 0

[ -z "$skipped" ] || echo "$(wc -w <<<"$skipped") skipped: $skipped"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
