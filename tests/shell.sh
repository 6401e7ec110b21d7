# The harness of the test scripts: `. tests/shell.sh`, then expect NAME [COMMAND...], skip NAME REASON, and finish.
# Run from the top of the tree. $tmp is a directory that goes away; $CC compiles C.
set -u
CC=${CC:-gcc}
CXX=${CXX:-g++}
passed=0 failed=0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

has() { command -v "$1" >/dev/null 2>&1; }

# Under -e a plain `! command` fails nothing, so: this does.
refuse() { if "$@"; then return 1; fi; }

# COMMAND (default: a function called NAME) runs in a subshell with -e: a function's first failing command fails the test, and its trace is shown.
expect() {
    name=$1
    shift
    [ $# -gt 0 ] || set -- "$name"
    # Not as the condition of an if, where -e would have no effect.
    (set -e; set -x; "$@") >"$tmp/log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok $name"
    else
        failed=$((failed + 1))
        tail -n 12 "$tmp/log" | sed 's/^/  /'
        echo "FAIL $name (status $status)"
    fi
}

skip() { echo "skip $1 ($2)"; }

finish() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}
