#!/bin/sh
# Build the benchmarks and those of the peers that are installed, run them in turns, and print one table.
#
#   bench/run.sh                 everything; writes bench/results.md and the table in README.md
#   bench/run.sh pool context    these sections (polling context values timers semaphore pool waiting group channel
#                                handover flow service treesum); nothing is written
#   bench/run.sh cancel_child    figures whose name contains this; nothing is written
#   bench/run.sh --against COMMIT [SECTION... | FIGURE]
#                                this header beside that commit's, without peers; writes build/against.md. Both sides have
#                                the benchmarks of this tree, except where one does not compile with that commit's header,
#                                because names have changed since: there that side has the commit's own. Each program of
#                                one side runs right after the same of the other. The ratio is now / then of each pair,
#                                so above 1 is slower (less work, where more is better); above 1.05 it is marked, above
#                                1.10 where a child is made and ended, and of hand-over above the limits in against.awk.
#                                Yardsticks (a bare futex, the clock) should stay at 1: they show how quiet the machine was.
#   ROUNDS=9 bench/run.sh        more rounds (default 5; with --against 7)
#   PEERS="go cpp" bench/run.sh  only these peers ("" for none; default: go tokio cpp nsync glib posix)
set -eu

cd "$(dirname "$0")/.."
build=${BUILD:-build}/bench
against=
if [ "${1:-}" = --against ]; then
    against=$(git rev-parse --short --verify "${2:?usage: bench/run.sh --against COMMIT [SECTION... | FIGURE]}^{commit}")
    shift 2
fi
rounds=${ROUNDS:-$([ -n "$against" ] && echo 7 || echo 5)}
peers=${PEERS-go tokio cpp nsync glib posix}
pattern=$*
cc=${CC:-gcc}
cxx=${CXX:-g++}
# Aligned loops: in a loop of three instructions, where it happens to lie would otherwise decide.
optimise="-O2 -falign-loops=64"
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef"
cflags="-std=gnu11 -D_GNU_SOURCE $optimise $warnings -Wstrict-prototypes -pthread ${BENCH_CFLAGS:-}"
all_sections="polling context values timers semaphore pool waiting group channel handover flow service treesum"
tab=$(printf '\t')

have() { command -v "$1" >/dev/null 2>&1; }

# Which sections the arguments ask for, and which figures of them.
are_sections() {
    for name; do
        case " $all_sections " in *" $name "*) ;; *) return 1 ;; esac
    done
}

figures=
if are_sections "$@"; then
    sections=${pattern:-$all_sections}
else
    figures=$pattern
    sections=$(awk -F '\t' -v only="$pattern" \
        '!/^#/ && index($2 " " $7, only) && !seen[$1]++ { printf "%s ", $1 }' bench/figures.txt)
fi
if [ -z "$sections" ]; then
    echo "bench: no section or figure is called $pattern" >&2
    exit 2
fi
export BENCH_ONLY="$figures"

mkdir -p "$build"

# == build =====================================================================

# build_section TREE OUT SECTION: the programs of a section from the sources of a tree. Fails if one does not compile.
build_section() {
    $cc $cflags "$1/bench/bench_$3.c" -o "$2/bench_$3" || return 1
    if grep -q BENCH_COUNT "$1/bench/bench_$3.c"; then
        $cc $cflags -DBENCH_COUNT "$1/bench/bench_$3.c" -o "$2/count_$3" || return 1
    fi
    if [ "$3" = treesum ]; then $cc -O2 -pthread -I"$1" "$1/docs/examples/treesum.c" -o "$2/treesum" -lcrypto; fi
}

# build_ours OUT TREE...: each section from the first of these trees in which it compiles.
build_ours() {
    out=$1
    shift
    mkdir -p "$out"
    for section in $sections; do
        [ "$section" != treesum ] || make_tree
        build_first "$out" "$section" "$@" || {
            echo "bench: $section does not compile: $out/$section.log" >&2
            return 1
        }
    done
}

build_first() { # OUT SECTION TREE...
    log=$1/$2.log
    first=$3
    : >"$log"
    for tree in "$3" ${4+"$4"}; do
        rm -f "$1/bench_$2" "$1/count_$2"
        [ -f "$tree/bench/bench_$2.c" ] || continue
        if build_section "$tree" "$1" "$2" 2>>"$log"; then
            [ "$tree" = "$first" ] || echo "bench: $2: that commit's own benchmark beside this one" >&2
            return 0
        fi
    done
    return 1
}

make_tree() {
    if [ -f "$build/tree/complete" ]; then return; fi
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

# tokio's peer, if its crates are on this machine already.
build_tokio() {
    have cargo && cargo build --quiet --release --offline --manifest-path bench/peers/tokio/Cargo.toml \
        --target-dir "$build/tokio" && cp "$build/tokio/release/peer_tokio" "$build/peer_tokio"
}

tokio_version() { awk '/^name = "tokio"$/ { getline; print $3 }' bench/peers/tokio/Cargo.lock | tr -d '"'; }

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
    tokio) build_tokio ;;
    esac
}

build_ours "$build" .
running=
if [ -n "$against" ]; then
    # The other side: that commit's header with the benchmarks of this tree, or all of that commit's.
    other=$build/against
    rm -rf "$other"
    mkdir -p "$other/tree" "$other/mixed/docs"
    git archive "$against" ctxcancel.h bench docs/examples | tar -x -C "$other/tree"
    cp -R bench "$other/mixed/bench"
    cp -R docs/examples "$other/mixed/docs/examples"
    cp "$other/tree/ctxcancel.h" "$other/mixed/"
    build_ours "$other" "$other/mixed" "$other/tree"
    peers=
fi
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

# own_programs DIRECTORY SECTION WHO: the programs of this library for a section.
own_programs() {
    if [ "$2" = treesum ]; then
        if [ -x "$1/bench_treesum" ] && [ -d "$build/tree" ]; then
            collect "$3" "$1/bench_treesum" "$1/treesum" "$build/tree"
        fi
        return
    fi
    if [ -x "$1/bench_$2" ]; then collect "$3" "$1/bench_$2"; fi
    # The counts do not vary.
    if [ "$round" = 1 ] && [ -x "$1/count_$2" ]; then collect "$3" "$1/count_$2"; fi
}

failed=0
load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo unknown)
round=1
while [ "$round" -le "$rounds" ]; do
    for section in $sections; do
        printf '\rround %d of %d: %-10s' "$round" "$rounds" "$section" >&2
        if [ -n "$against" ]; then
            own_programs "$other" "$section" "then$tab$round"
            own_programs "$build" "$section" "now$tab$round"
            continue
        fi
        own_programs "$build" "$section" ours
        [ "$section" != treesum ] || continue
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
        tokio) echo "- $(rustc --version), tokio $(tokio_version)" ;;
        glib) echo "- GLib: $(pkg-config --modversion glib-2.0)" ;;
        nsync) have dpkg-query && echo "- nsync: $(dpkg-query -W -f '${Version}' libnsync-dev 2>/dev/null)" ;;
        esac
    done
    [ -z "$skipped" ] || echo "- Not installed:$skipped"
    echo "- Load average when it began: $load"
}

if [ -n "$against" ]; then
    {
        echo "# This header beside that of $against"
        echo
        echo "then: $(git log -1 --format='%h %s' "$against")"
        echo "now: the working tree on $(git log -1 --format='%h %s')"
        echo "$rounds rounds; the median of each side, the median of the ratios now / then of the rounds, and their least"
        echo "and most. Marked: a ratio above 1.05, above 1.10 where a child is made and ended, and of hand-over above the"
        echo "limits in bench/against.awk."
        echo
        machine
        echo
        awk -v only="$figures" -f bench/against.awk "$samples"
    } | tee "$(dirname "$build")/against.md"
    echo
    echo "written: $(dirname "$build")/against.md"
    exit "$failed"
fi

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
