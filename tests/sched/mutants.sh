#!/bin/bash
# Is the explorer strong enough? Plant each fault of a list in a copy of ctxcancel.h and see which scenario finds it.
#   tests/sched/mutants.sh [LIST [NAME...]]
# LIST is tests/sched/mutants.txt by default. With NAMEs, only the mutants whose name contains one are tried.
# A line of the list, where \n stands for a new line, and `old` must occur once in the section's implementation:
#   name | section | 'old' => 'new' | scenario
# The scenario is the one that shall find the fault; its program is the word before its colon. It runs depth first, then
# with priorities, then with races.c, which sees a memory order that is too weak, and then depth first with the bound of
# three. If none of these finds the fault, all other scenarios run, unless SCHED_OTHERS is 0. A scenario that fails
# without the fault too is no evidence.
# HDR names the header (default: ctxcancel.h), SCHED_FLAGS more compiler flags, SCHED_TIME the seconds for each run of a
# scenario (default: 20). The status is 0 if every mutant was found.
set -u
cd "$(dirname "$0")/../.." || exit 2
list=${1:-tests/sched/mutants.txt}
shift
header=${HDR:-ctxcancel.h}
seconds=${SCHED_TIME:-20}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/base" "$work/mutant"
cp "$header" "$work/base/ctxcancel.h" || exit 2
header=$work/base/ctxcancel.h
missed=0

# plant SECTION OLD NEW: the mutated header on standard output; status 1 unless OLD occurs exactly once.
plant() {
    section=$1 old=$2 new=$3 awk '
        function plain(text) { gsub(/\\n/, "\n", text); return text }
        BEGIN { RS = "\001"; old = plain(ENVIRON["old"]); new = plain(ENVIRON["new"]) }
        {
            banner = "\n/* == " ENVIRON["section"] ". "
            from = index($0, banner)
            from += index(substr($0, from + 1), banner)
            section = substr($0, from + 1)
            end = index(section, "\n/* == ")
            if (end) section = substr(section, 1, end)
            at = index(section, old)
            if (!at || index(substr(section, at + 1), old)) exit 1
            printf "%s%s%s", substr($0, 1, from + at - 1), new, substr($0, from + at + length(old))
        }' "$header"
}

compile=("${CC:-gcc}" -std=gnu11 -O1 -g -w -no-pie -pthread -I.)
"${compile[@]}" -c tests/sched/sched.c -o "$work/sched.o" || exit 2
"${compile[@]}" -c tests/sched/races.c -o "$work/races.o" || exit 2

# build DIRECTORY PROGRAM: with DIRECTORY/ctxcancel.h. A PROGRAM that ends in .races is built with races.c.
build() {
    local races=() flags=() source="tests/sched/scenarios_${2%.races}.c"
    [ -x "$1/$2" ] && return
    [ "$2" = "${2%.races}" ] || { races=("$work/races.o") flags=(-fsanitize=thread); }
    # shellcheck disable=SC2086
    "${compile[@]}" "${flags[@]}" ${SCHED_FLAGS:-} "-DHDR=\"$1/ctxcancel.h\"" -c "$source" -o "$1/$2.o" &&
        "${compile[@]}" "$1/$2.o" "$work/sched.o" "${races[@]}" -o "$1/$2"
}

# failures DIRECTORY PROGRAM ARGUMENT...: each as "scenario | N (strategy)"
failures() {
    build "$1" "$2" || return 2
    timeout 1200 "$1/$2" --quiet --time "$seconds" "${@:3}" |
        sed -nE 's/^(.*): FAILED after ([0-9]+) schedules, [0-9.]+ s \(([^)]*)\): (data race)?.*/\1 | \2 (\3) \4/p'
}

# find_it PROGRAM ARGUMENT...: the first failure of the mutant in a scenario that passes without it; status 1 if none.
find_it() {
    failures "$work/mutant" "$@" | while IFS= read -r failure; do
        scenario=${failure% | *}
        failures "$work/base" "$1" "${@:2:$#-2}" "$scenario" | grep -qF "$scenario | " || { echo "$failure" && break; }
    done | grep .
}

printf '%s | %s | %s\n' mutant 'found by' schedules
while IFS= read -r line; do
    [[ $line =~ ^\ *(#|$) ]] && continue
    pattern="^([^|]*[^| ]) *\| *([0-9]+) *\| *'(.*)' => '(.*)' *\| *([^|:]+)(:[^|]*[^| ])? *$"
    if ! [[ $line =~ $pattern ]]; then
        echo "not a mutant: $line"
        missed=1
        continue
    fi
    name=${BASH_REMATCH[1]} section=${BASH_REMATCH[2]} old=${BASH_REMATCH[3]} new=${BASH_REMATCH[4]}
    program=${BASH_REMATCH[5]} scenario=${BASH_REMATCH[5]}${BASH_REMATCH[6]}
    wanted=$#
    for part; do [[ $name == *"$part"* ]] && wanted=0; done
    [ "$wanted" = 0 ] || continue
    rm -f "$work/mutant"/*
    if ! plant "$section" "$old" "$new" >"$work/mutant/ctxcancel.h"; then
        echo "$name | DOES NOT APPLY exactly once |"
        missed=1
        continue
    fi
    if ! build "$work/mutant" "$program" 2>"$work/errors"; then
        echo "$name | DOES NOT COMPILE: $(head -1 "$work/errors") |"
        missed=1
        continue
    fi
    found=$(find_it "$program" --bound 2 "$scenario") || found=$(find_it "$program" --strategy pct "$scenario") ||
        found=$(find_it "$program.races" --bound 2 "$scenario") ||
        found=$(find_it "$program" --bound 3 "$scenario")
    if [ -z "$found" ] && [ "${SCHED_OTHERS:-1}" != 0 ]; then
        for file in tests/sched/scenarios_*.c; do
            other=${file##*/scenarios_}
            found=$(find_it "${other%.c}" --bound 2 ": ") && break
        done
        found=${found:+$found, not by $scenario}
    fi
    [ -n "$found" ] || missed=1
    echo "$name | ${found:-NOT FOUND |}"
done <"$list"
exit $missed
