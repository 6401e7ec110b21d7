#!/bin/sh
# Count the instructions of the paths of one thread, with callgrind. Unlike times they hardly vary, so a change shows
# on a busy machine too; they depend on the compiler.
#
#   bench/instructions.sh           count, and compare with bench/instructions.txt: status 1 if one grew by over 10 %
#   bench/instructions.sh --update  count, and write bench/instructions.txt
set -eu

cd "$(dirname "$0")/.."
build=${BUILD:-build}/bench
noted=bench/instructions.txt
command -v valgrind >/dev/null 2>&1 || { echo "instructions: skipped: valgrind is not installed" >&2; exit 0; }
mkdir -p "$build"
${CC:-gcc} -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef -Wstrict-prototypes \
    -pthread bench/bench_instructions.c -o "$build/bench_instructions"

instructions() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$build/bench_instructions" "$1" "$2" 2>&1 |
        awk '/Collected/ { print $NF }'
}

few=1000
many=6000
for figure in $("$build/bench_instructions"); do
    # The difference of two runs leaves out what is done once.
    echo "$figure $(instructions "$figure" $few) $(instructions "$figure" $many)"
done | awk -v few=$few -v many=$many '{ printf "%s\t%.1f\n", $1, ($3 - $2) / (many - few) }' >"$build/instructions.txt"

awk -F '\t' '
    FILENAME != ARGV[ARGC - 1] { before[$1] = $2; next }
    {
        grew = $1 in before && $2 > before[$1] * 1.1 + 1
        printf "%-16s %8.1f instructions", $1, $2
        if ($1 in before) printf "   before %8.1f%s", before[$1], grew ? "   GREW" : ""
        print ""
        bad = bad || grew
    }
    END { exit bad }
' $([ -f $noted ] && echo $noted) "$build/instructions.txt" || grew=1
if [ "${1:-}" = --update ]; then
    cp "$build/instructions.txt" "$noted"
    exit 0
fi
exit "${grew:-0}"
