#!/bin/sh
# Build the benchmarks and those of the peers that are installed, run them in turns, and print one table.
#
#   bench/run.sh                 everything; writes bench/results.md and the table in README.md
#   bench/run.sh pool            one section (context polling values timers semaphore pool waiting group channel flow
#                                service treesum)
#   bench/run.sh cancel_child    figures whose name contains this; nothing is written
#   ROUNDS=9 bench/run.sh        more rounds (default 5)
#   PEERS="go cpp" bench/run.sh  only these peers ("" for none; default: go cpp nsync glib posix)
set -eu

cd "$(dirname "$0")/.."
build=${BUILD:-build}/bench
rounds=${ROUNDS:-5}
peers=${PEERS-go cpp nsync glib posix}
pattern=${1:-}
cc=${CC:-gcc}
cxx=${CXX:-g++}
# Aligned loops: in a loop of three instructions, where it happens to lie would otherwise decide.
optimise="-O2 -falign-loops=64"
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef"
cflags="-std=gnu11 -D_GNU_SOURCE $optimise $warnings -Wstrict-prototypes -pthread ${BENCH_CFLAGS:-}"
all_sections="polling context values timers semaphore pool waiting group channel flow service treesum"
tab=$(printf '\t')

have() { command -v "$1" >/dev/null 2>&1; }

# Which sections the pattern asks for, and which figures of them.
figures=
case " $all_sections " in
*" ${pattern:-$all_sections} "*) sections=${pattern:-$all_sections} ;;
*)
    figures=$pattern
    sections=$(awk -F '\t' -v only="$pattern" \
        '!/^#/ && index($2, only) && !seen[$1]++ { printf "%s ", $1 }' bench/figures.txt)
    ;;
esac
if [ -z "$sections" ]; then
    echo "bench: no section or figure is called $pattern" >&2
    exit 2
fi
export BENCH_ONLY="$figures"

mkdir -p "$build"

# == build =====================================================================

build_ours() {
    for section in $sections; do
        [ "$section" = treesum ] && continue
        $cc $cflags "bench/bench_$section.c" -o "$build/bench_$section"
        if grep -q BENCH_COUNT "bench/bench_$section.c"; then
            $cc $cflags -DBENCH_COUNT "bench/bench_$section.c" -o "$build/count_$section"
        fi
    done
}

build_treesum() {
    [ -f docs/examples/treesum.c ] || { echo "bench: skipped treesum: the program is not there" >&2; return 0; }
    $cc -O2 -pthread -I. docs/examples/treesum.c -o "$build/treesum" -lcrypto
    $cc $cflags bench/bench_treesum.c -o "$build/bench_treesum"
    [ -f "$build/tree/complete" ] && return
    # 200 MB: 1,600 small files, 60 of a megabyte, one of forty.
    rm -rf "$build/tree"
    mkdir -p "$build/tree/small" "$build/tree/middle" "$build/tree/big"
    head -c 104857600 /dev/urandom | split -a 4 -b 65536 - "$build/tree/small/f"
    head -c 62914560 /dev/urandom | split -a 4 -b 1048576 - "$build/tree/middle/f"
    head -c 41943040 /dev/urandom >"$build/tree/big/f"
    : >"$build/tree/complete"
}

# Go's peer with golang.org/x if its modules are there or can be had; else without the figures that need them.
build_go() (
    have go || exit
    out=$(cd "$build" && pwd)/peer_go
    cd bench/peers
    quickly=
    have timeout && quickly="timeout 60"
    $quickly go build -tags modules -o "$out" peer_go.go peer_go_modules.go && exit
    go build -o "$out" peer_go.go peer_go_plain.go
)

# The modules that Go's peer was built with.
go_modules() { go version -m "$build/peer_go" | awk '$1 == "dep" { printf "%s%s %s", sep, $2, $3; sep = ", " }'; }

# Build one peer, or say why not.
build_peer() {
    rm -f "$build/peer_$1"
    case $1 in
    go) build_go ;;
    cpp) have "$cxx" && $cxx -std=c++20 $optimise $warnings -pthread bench/peers/peer_stop_token.cpp -o "$build/peer_cpp" ;;
    nsync) $cc $cflags bench/peers/peer_nsync.c -o "$build/peer_nsync" -lnsync ;;
    glib)
        have pkg-config && pkg-config --exists gio-2.0 &&
            $cc $cflags $(pkg-config --cflags gio-2.0 | sed 's/-I/-isystem /g') bench/peers/peer_glib.c \
                -o "$build/peer_glib" $(pkg-config --libs gio-2.0)
        ;;
    posix) $cc $cflags bench/peers/peer_posix.c -o "$build/peer_posix" ;;
    esac
}

build_ours
case " $sections " in *" treesum "*) build_treesum ;; esac
running=
skipped=
for peer in $peers; do
    if build_peer "$peer" 2>"$build/peer_$peer.log"; then
        running="$running $peer"
    else
        skipped="$skipped $peer"
        echo "bench: skipped the peer $peer: not installed, or it does not build ($build/peer_$peer.log)" >&2
    fi
done

case " $running " in
*" go "*)
    [ -n "$(go_modules)" ] ||
        echo "bench: skipped golang.org/x: its modules are not there and cannot be had ($build/peer_go.log)" >&2
    ;;
esac

# == run =======================================================================

samples=$build/samples.txt
: >"$samples"

# A program that hangs must not hold the others up.
limit=
have timeout && limit="timeout 120"

# One program's samples, marked with whose they are.
collect() {
    who=$1
    shift
    if $limit "$@" >"$build/out.txt"; then
        sed "s/^/$who$tab/" "$build/out.txt" >>"$samples"
    else
        echo "bench: failed: $(basename "$1")" >&2
        failed=1
    fi
}

failed=0
load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo unknown)
round=1
while [ "$round" -le "$rounds" ]; do
    for section in $sections; do
        printf '\rround %d of %d: %-10s' "$round" "$rounds" "$section" >&2
        if [ "$section" = treesum ]; then
            [ -x "$build/bench_treesum" ] && [ -d "$build/tree" ] &&
                collect ours "$build/bench_treesum" "$build/treesum" "$build/tree"
            continue
        fi
        collect ours "$build/bench_$section"
        # The counts do not vary.
        [ "$round" = 1 ] && [ -x "$build/count_$section" ] && collect ours "$build/count_$section"
        for peer in $running; do collect "$peer" "$build/peer_$peer" "$section"; done
    done
    round=$((round + 1))
done
printf '\r%40s\r' '' >&2

# == report ====================================================================

version() { "$@" 2>/dev/null | head -n 1; }

machine() {
    awk -F ': *' '/^model name/ { m = $2 } /^processor/ { n++ } /^flags/ && / hypervisor / { vm = ", virtual machine" }
                  END { print "- Processor: " m ", " n " cores" vm }' /proc/cpuinfo
    awk '/^MemTotal/ { printf "- Memory: %.0f GB\n", $2 / 1048576 }' /proc/meminfo
    echo "- System: $(. /etc/os-release && echo "$PRETTY_NAME"), $(uname -s) $(uname -r | cut -d - -f 1), $(uname -m)"
    echo "- Compilers: $(version $cc --version); $(version $cxx --version); both $optimise"
    for peer in $running; do
        case $peer in
        go)
            modules=$(go_modules)
            echo "- Go: $(go version | cut -d ' ' -f 3), ${modules:-without golang.org/x}"
            ;;
        glib) echo "- GLib: $(pkg-config --modversion glib-2.0)" ;;
        nsync) have dpkg-query && echo "- nsync: $(dpkg-query -W -f '${Version}' libnsync-dev 2>/dev/null)" ;;
        esac
    done
    [ -z "$skipped" ] || echo "- Not installed:$skipped"
    echo "- Load average when it began: $load"
}

# The table of what was run, as report.awk makes it with these variables.
table() {
    awk -F '\t' -v run=" $(echo $sections) " 'index(run, " " $1 " ")' bench/figures.txt >"$build/figures.txt"
    awk -v only="$figures" "$@" -f bench/report.awk "$build/figures.txt" "$samples"
}

table | tee "$build/table.txt"
[ -z "$pattern" ] || exit "$failed"

{
    echo "# Figures"
    echo
    echo "Written by \`make bench\`. Medians of $rounds rounds in which all programs took turns; the spread is the least and the"
    echo "most of all samples. Times are nanoseconds unless something else is said; of Go and the others too."
    echo
    machine
    echo
    cat "$build/table.txt"
    echo
    cat bench/notes.md
} >bench/results.md
echo
echo "written: bench/results.md"

# The README's table stands between two markers.
if [ -f README.md ] && grep -q '^<!-- bench -->' README.md && grep -q '^<!-- /bench -->' README.md; then
    table -v short=1 >"$build/readme_table.txt"
    awk -v table="$build/readme_table.txt" '
        /^<!-- \/bench -->/ { inside = 0 }
        !inside { print }
        /^<!-- bench -->/ { inside = 1; print ""; while ((getline line < table) > 0) print line; print "" }
    ' README.md >"$build/README.md"
    cat "$build/README.md" >README.md
    echo "written: the table in README.md"
fi
exit "$failed"
