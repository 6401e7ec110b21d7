#!/bin/bash
# Explore for about SECONDS: explore.sh SECONDS PROGRAM...
# First every scenario by itself, up to the bound of two preemptions or as long as its share of half the time lasts, and
# with races.c up to the bound of one; then, until the time is over, priorities and chance with new seeds, and the bound
# of three. The last line is `N passed, N failed`.
set -u
seconds=${1:?usage: explore.sh SECONDS PROGRAM...}
shift
end=$((SECONDS + seconds))
passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Runs a program with these options, and adds what it says.
run() {
    local program=$1 sum
    shift
    timeout $((seconds * 2 + 120)) "$program" --quiet "$@" >"$log" 2>&1
    sum=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n 1)
    if [[ $sum =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
        passed=$((passed + BASH_REMATCH[1]))
        failed=$((failed + BASH_REMATCH[2]))
        ((BASH_REMATCH[2] == 0)) || { echo "FAIL $program $*"; cat "$log"; }
    else
        failed=$((failed + 1))
        echo "FAIL $program $* (ended without a sum)"
        cat "$log"
    fi
}

scenarios=0
for program; do
    case $program in
        */races/*) ;;
        *) scenarios=$((scenarios + $("$program" --list | wc -l))) ;;
    esac
done
share=$(awk -v s="$seconds" -v n="$scenarios" 'BEGIN { printf "%.2f", s / 2 / (n + 1) }')
for program; do
    case $program in
        */races/*) run "$program" --bound 1 --time "$(awk -v share="$share" 'BEGIN { printf "%.2f", share / 3 }')" ;;
        *) run "$program" --time "$share" ;;
    esac
done
for ((seed = 1; SECONDS < end; seed++)); do
    for program; do
        ((SECONDS < end)) || break
        run "$program" --strategy pct --seed "$RANDOM$seed" --time "$share"
        run "$program" --strategy random --seed "$RANDOM$seed" --schedules 300 --time "$share"
        ((seconds < 600)) || run "$program" --bound 3 --time $((seconds / 60))
    done
done
echo "$passed passed, $failed failed"
((failed == 0))
