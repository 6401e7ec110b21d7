#!/bin/sh
# The demonstration behind `make demo`: treesum on a real tree, verified, then stopped by a deadline and by a signal.
#
#   docs/examples/demo.sh [TREESUM [TREE]]      (default: build/examples/treesum /usr/include)
#
# Needs nothing but coreutils. Status 0 when everything went as it says.
set -u
treesum=${1:-build/examples/treesum}
tree=${2:-/usr/include}
[ -x "$treesum" ] || { echo "demo: $treesum is not there: run 'make demo'" >&2; exit 2; }
[ -d "$tree" ] || { echo "demo: there is no $tree to hash" >&2; exit 2; }
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wrong=0
expect() { # expect STATUS WANTED MEANING
    if [ "$1" -eq "$2" ]; then
        echo "   -> status $1: $3"
    else
        echo "   -> status $1, but $2 was expected ($3)"
        wrong=1
    fi
}

echo "1. Hash every file below $tree, with an audit record of each:"
echo "   \$ treesum -a audit.json $tree >sums"
"$treesum" -a "$work/audit.json" "$tree" >"$work/sums" 2>"$work/err"
status=$?
tail -n 1 "$work/err" | sed 's/^/   /'
expect $status 0 "every file was hashed"
head -n 1 "$work/sums" | sed 's/^/   first line of sums:   /'
head -n 1 "$work/audit.json" | sed 's/^/   first line of audit:  /'

echo
echo "2. Let sha256sum read all of it again and compare:"
echo "   \$ sha256sum -c --quiet sums"
sha256sum -c --quiet "$work/sums"
expect $? 0 "sha256sum agrees on all $(wc -l <"$work/sums") files"

# Sparse files: they take no room on the disk, and minutes to hash.
mkdir "$work/huge"
for name in one two three; do
    truncate -s 100G "$work/huge/$name" 2>/dev/null || truncate -s 15G "$work/huge/$name" || exit 2
done

echo
echo "3. Three files of 100 GB and half a second: the deadline of the whole run cancels both workers mid-file:"
echo "   \$ treesum -t 500ms huge"
(cd "$work" && case $treesum in /*) "$treesum" -t 500ms huge ;; *) "$OLDPWD/$treesum" -t 500ms huge ;; esac) 2>"$work/err"
status=$?
sed 's/^/   /' "$work/err"
expect $status 124 "cut by the deadline, as timeout(1) would say it"

echo
echo "4. The same files, and a Ctrl-C (SIGINT) after half a second, beside a tree that does get done:"
echo "   \$ timeout --preserve-status -s INT 0.5 treesum -a audit.json $tree huge >sums"
timeout --preserve-status -s INT 0.5 "$treesum" -a "$work/audit.json" "$tree" "$work/huge" >"$work/sums" 2>"$work/err"
status=$?
tail -n 2 "$work/err" | sed 's/^/   /'
expect $status 130 "stopped by SIGINT"
printed=$(wc -l <"$work/sums") recorded=$(wc -l <"$work/audit.json")
[ "$printed" -eq "$recorded" ] || wrong=1
echo "   -> hashes printed: $printed, audit lines: $recorded: the two agree whenever the stop comes"

echo
if [ $wrong -eq 0 ]; then echo "All as it should be."; else echo "Something was not as it should be."; fi
exit $wrong
