#!/usr/bin/env bash
# Tests docs/examples/treesum.c from the outside, with nothing but coreutils and the shell.
#
#   tests/test_treesum.sh [TREESUM]      a binary to test (default: build/examples/treesum, built here if missing)
#
# Prints `ok NAME`, `skip NAME` or `FAIL NAME` for each promise and, last, `N passed, N failed`. Time bounds are wide,
# since machines are busy; what was measured is printed beside the name. SLOW=N multiplies them (for valgrind).
set -u
export LC_ALL=C
cd "$(dirname "$0")/.." || exit 2
here=$PWD
slow=${SLOW:-1}
early=0.4; [ "$slow" -gt 1 ] && early=$slow
treesum=${1:-$here/build/examples/treesum}
case $treesum in /*) ;; *) treesum=$here/$treesum ;; esac
if [ ! -x "$treesum" ]; then
    mkdir -p "$(dirname "$treesum")"
    ${CC:-cc} -O2 -I. docs/examples/treesum.c -o "$treesum" -pthread -lcrypto || exit 2
fi

work=$(mktemp -d) || exit 2
clean_up() { chmod -R u+rwx "$work" 2>/dev/null; rm -rf "$work"; }
trap clean_up EXIT
cd "$work" || exit 2

passed=0 failed=0
ok() { passed=$((passed + 1)); echo "ok $1${2:+ ($2)}"; }
skip() { echo "skip $1 ($2)"; }
bad() { failed=$((failed + 1)); echo "FAIL $1${2:+: $2}"; }

# Run treesum with a guard against hanging. Leaves $status; the run's stderr is in ./err, stdout where it is sent.
run() { timeout -k 5 $((60 * slow)) "$treesum" "$@" 2>err; status=$?; }

# check NAME STATUS TEXT: the last run ended with STATUS and said TEXT (a basic regular expression; '' for anything).
check() {
    if [ "$status" -ne "$2" ]; then bad "$1" "status $status instead of $2: $(head -c 300 err)"
    elif [ -n "$3" ] && ! grep -q -- "$3" err; then bad "$1" "no '$3' in: $(head -c 300 err)"
    else ok "$1"; fi
}
# that NAME CONDITION...: a command that must succeed.
that() { local name=$1; shift; if "$@"; then ok "$name"; else bad "$name"; fi; }

now_ms() { echo $(($(date +%s%N) / 1000000)); }
lines() { wc -l <"$1" | tr -d ' '; }
# in_time NAME MS: the last stop took less than 2 s. The goal is 50 ms, which no test can promise on a busy machine.
in_time() { if [ "$2" -lt $((2000 * slow)) ]; then ok "$1" "$2 ms"; else bad "$1" "took $2 ms"; fi; }

# stop_after SECONDS SIGNAL ARGS...: start treesum, signal it later, wait for it. Leaves $status and $took (ms).
# `timeout` would hide how long the stop took, so the guard is a second process. The delay starts when the file ./audit
# appears (unless ARGS name another one): a shell starts background jobs with SIGINT ignored, so a signal that comes
# before main() has its handler would be lost.
stop_after() {
    local delay=$1 signal=$2 ready=audit; shift 2
    case "$*" in *'-a '*) ready= ;; *) rm -f audit; set -- -a audit "$@" ;; esac
    "$treesum" "$@" 2>err & local pid=$!
    { timeout $((30 * slow)) tail --pid=$pid -f /dev/null || kill -KILL $pid; } >/dev/null 2>&1 9>&- & local guard=$!
    while [ -n "$ready" ] && [ ! -e audit ] && kill -0 $pid 2>/dev/null; do sleep 0.005; done
    sleep "$delay"
    local start; start=$(now_ms)
    kill -s "$signal" $pid 2>/dev/null
    wait $pid; status=$?
    took=$(($(now_ms) - start))
    kill $guard 2>/dev/null; wait $guard 2>/dev/null
}

# A sparse file: takes no room, takes minutes to hash.
huge() { truncate -s 100G "$1" 2>/dev/null || truncate -s 15G "$1"; }

mkdir -p tree/sub/deeper tree/empty
for i in $(seq 1 300); do echo "file $i" >"tree/sub/$i.txt"; done
: >tree/zero
head -c 3000000 /dev/urandom >tree/sub/deeper/large
mkdir big; huge big/a; huge big/b; huge big/c

# --- what it prints ---------------------------------------------------------------------------------------------------

run tree >sums; check hashes_a_tree 0 '^treesum: 303 files\|^treesum: 302 files'
that sha256sum_verifies_it sh -c 'sha256sum -c --quiet sums'
find tree -type f -exec sha256sum {} + | sort >want; sort sums >have
that prints_what_sha256sum_prints cmp -s want have
run tree/ >sums; sort sums >have
that a_trailing_slash_is_not_doubled cmp -s want have
run ./tree >sums; sed 's,  tree/,  ./tree/,' want | sort >want2; sort sums >have
that names_are_as_given cmp -s want2 have
run tree/zero tree/sub/1.txt >sums; sha256sum tree/zero tree/sub/1.txt | sort >want2; sort sums >have
that a_path_may_be_a_file cmp -s want2 have
run -q tree >sums; check quiet_succeeds 0 ''
that quiet_is_silent test ! -s err
run -j 1 tree >sums; sort sums >have; that one_job_is_enough cmp -s want have
run -j 64 tree >sums; sort sums >have; that many_jobs_agree cmp -s want have
mkdir void; run void >sums; check an_empty_tree_is_fine 0 '^treesum: 0 files, 0 bytes, 0 canceled, 0 failed'
that an_empty_tree_prints_nothing test ! -s sums

mkdir odd
: >'odd/with space'; : >$'odd/new\nline'; : >$'odd/carriage\rreturn'; : >'odd/back\slash'; : >$'odd/all\\of\r\nthem'
: >$'odd/tab\t"quote"'; : >$'odd/not\xff\xc0utf8'; : >$'odd/\xe2\x82\xac'; : >'odd/-'; : >'odd/*'; : >'odd/ lead'; : >$'odd/\e[1m'
mkdir $'odd/dir\nwith\\both'; echo x >$'odd/dir\nwith\\both/file'
run -a audit odd >sums; check odd_names_are_hashed 0 ''
that odd_names_verify sh -c 'sha256sum -c --quiet sums'
find odd -type f -exec sha256sum {} + | sort >want2; sort sums >have
that odd_names_are_escaped_like_sha256sum cmp -s want2 have
that odd_names_make_one_audit_line_each test "$(lines audit)" -eq "$(lines sums)"
that audit_has_no_control_bytes sh -c '! tr -d "\n" <audit | grep -q "[[:cntrl:]]"'
that audit_marks_what_is_not_utf8 grep -q '\\ufffd\\ufffdutf8.*"path_hex":"6f64642f6e6f74ffc075746638"' audit
if command -v python3 >/dev/null; then
    python3 - <<'PY' && ok audit_is_json_with_exact_names || bad audit_is_json_with_exact_names
import json, hashlib, os
seen = set()
for line in open("audit", encoding="utf-8"):
    r = json.loads(line)
    path = bytes.fromhex(r["path_hex"]) if "path_hex" in r else r["path"].encode()
    data = open(path, "rb").read()
    assert hashlib.sha256(data).hexdigest() == r["sha256"] and len(data) == r["bytes"] and r["seconds"] >= 0
    assert r["root"] == "odd"
    seen.add(path)
want = {os.path.join(d, f) for d, _, fs in os.walk(b"odd") for f in fs}
assert seen == want, (seen, want)
PY
else skip audit_is_json_with_exact_names "no python3"; fi

echo dash >-x; run -q -- -x >sums; check two_dashes_end_the_options 0 ''
that a_name_with_a_dash_verifies sh -c 'sha256sum -c --quiet sums'

# --- what it meets in a tree ------------------------------------------------------------------------------------------

mkdir -p links/a/b; echo f >links/a/b/f
ln -s ../.. links/a/b/up; ln -s self links/self; ln -s b links/a/c; ln -s a/b/f links/to_file; ln -s nowhere links/dangling
run links >sums; check loops_of_links_end 0 'links/self: skipped: it is a loop'
that links_inside_are_not_followed test "$(lines sums)" -eq 1
that links_to_directories_are_named grep -q 'links/a/b/up: skipped' err
run -q links/a/c >sums; check a_link_as_path_is_followed 0 ''
that a_link_as_path_keeps_its_name grep -q '  links/a/c/f$' sums
run links/self tree/zero >sums; check a_loop_as_path_fails 1 'links/self: Too many levels'
that others_go_on_after_a_loop test "$(lines sums)" -eq 1

mkdir fifos; mkfifo fifos/pipe; echo f >fifos/file
run fifos >sums; check a_fifo_is_skipped 0 'fifos/pipe: skipped: it is a FIFO'
that others_go_on_after_a_fifo test "$(lines sums)" -eq 1
run fifos/pipe tree/zero >sums; check a_fifo_as_path_fails 1 'fifos/pipe: neither'
run /dev/null >sums; check a_device_as_path_fails 1 '/dev/null: neither'

run missing tree/zero '' >sums; check a_missing_path_fails 1 'missing: No such file'
that others_go_on_after_a_missing_path test "$(lines sums)" -eq 1

# Files that vanish between being listed and being opened. Its output is a pipe that nobody reads at first, so the run
# comes to rest in the middle of a directory listing; what is left of that is then deleted.
mkdir racing; (cd racing && seq 1 4000 | xargs touch)
mkfifo pipe; exec 9<>pipe
timeout -k 5 $((60 * slow)) "$treesum" racing >pipe 2>err 9>&- & run_pid=$!
sleep "$early"
rm -r racing
cat <&9 >sums & reader=$!
wait $run_pid; status=$?
sleep 0.2; kill $reader; wait $reader 2>/dev/null; exec 9>&-; rm pipe
check vanished_files_fail 1 'racing/[0-9]*: No such file'
that others_go_on_after_a_vanished_file test "$(lines sums)" -gt 100

mkdir -p locked/dir; echo a >locked/file; echo b >locked/dir/inner; echo c >locked/free
chmod 755 . locked; chmod 000 locked/file locked/dir
if [ "$(id -u)" -ne 0 ]; then
    run locked >sums; unreadable=1
elif command -v setpriv >/dev/null; then
    cp "$treesum" ./treesum.copy; chmod 755 treesum.copy
    timeout 60 setpriv --reuid=65534 --regid=65534 --clear-groups ./treesum.copy locked >sums 2>err; status=$?; unreadable=1
else unreadable=0; fi
if [ $unreadable = 1 ]; then
    check unreadable_files_fail 1 'locked/file: Permission denied'
    that unreadable_directories_fail grep -q 'locked/dir: Permission denied' err
    that others_go_on_after_an_unreadable_file grep -q 'locked/free$' sums
else skip unreadable_files_fail "root reads everything and there is no setpriv"; fi
chmod 755 locked/dir

# Deeper than PATH_MAX, deeper than descriptors last. Only `cd` a level at a time gets there.
name=$(printf 'd%.0s' $(seq 1 100))
(mkdir deep && cd deep && for i in $(seq 1 300); do mkdir "$name" && cd "$name" || exit; echo "$i" >f; done) 2>/dev/null
(ulimit -n 60; timeout 60 "$treesum" -j 2 deep >sums 2>err); status=$?
check deep_trees_need_few_descriptors 0 ''
that paths_longer_than_the_system_takes test "$(lines sums)" -eq 300
cut -c1-64 sums | sort >have; for i in $(seq 1 300); do echo "$i" | sha256sum | cut -c1-64; done | sort >want2
that deep_files_are_hashed_right cmp -s have want2
(ulimit -n 40; timeout 60 "$treesum" -j 500 tree >sums 2>err); status=$?
check too_few_descriptors_are_an_error 1 'limit on open files'
(ulimit -n 64; timeout 60 "$treesum" -j 4 tree >sums 2>err); status=$?
sort sums >have; that few_descriptors_are_enough cmp -s want have

mkdir own; for i in $(seq 1 20); do echo "$i" >own/$i; done
(cd own && timeout 60 "$treesum" -a AUDIT . >SUMS 2>../err); status=$?
check its_own_outputs_are_skipped 0 'SUMS: skipped'
that its_own_outputs_do_not_spoil_the_sums sh -c 'cd own && sha256sum -c --quiet SUMS && test $(wc -l <SUMS) -eq 20'

# --- deadlines and signals --------------------------------------------------------------------------------------------

start=$(now_ms); run -t 300ms big >sums; took=$(($(now_ms) - start - 300))
check the_total_deadline_gives_124 124 'the total deadline passed'
in_time the_total_deadline_stops_promptly "$took"
that the_summary_says_all grep -q '^treesum: 0 files, 0 bytes, [23] canceled, 0 failed, time to notice [0-9.]* ms' err
run -t 0ms tree >sums; check a_deadline_of_zero_has_passed 124 ''
run -T 0ms tree/zero >sums; check a_file_deadline_of_zero_has_passed 124 'tree/zero: cut'
run -t 1h tree >sums; check a_far_deadline_changes_nothing 0 ''

cp tree/sub/1.txt big/small
start=$(now_ms); run -T 200ms big >sums; took=$(($(now_ms) - start))
check the_file_deadline_gives_124 124 'big/a: cut'
that the_file_deadline_names_each grep -q 'big/c: cut' err
that others_go_on_after_the_file_deadline grep -q '  big/small$' sums
that cut_files_are_counted_failed grep -q '^treesum: 1 files, .* 0 canceled, 3 failed' err
rm big/small

stop_after "$early" INT big >sums; check sigint_gives_130 130 'stopped: SIGINT'; in_time sigint_stops_promptly "$took"
stop_after "$early" TERM big >sums; check sigterm_gives_143 143 'stopped: SIGTERM'; in_time sigterm_stops_promptly "$took"
stop_after "$early" HUP big >sums; check sighup_gives_129 129 'stopped: SIGHUP'
stop_after "$early" TERM -q big >sums; check quiet_still_says_why_it_stopped 143 'stopped: SIGTERM'
that quiet_gives_no_summary sh -c '! grep -q "time to notice" err'
echo "   time to notice, as measured by itself: $(stop_after "$early" INT big >sums; sed -n 's/.*time to notice \([0-9.]* ms\).*/\1/p' err)"

# --- outputs that fail ------------------------------------------------------------------------------------------------

run tree >/dev/full; check a_full_output_fails 1 'standard output: No space left'
run tree >&-; check a_closed_output_fails 1 'standard output: '
run tree 1</dev/null; check an_unwritable_output_fails 1 'standard output: Bad file'
timeout 60 "$treesum" tree 2>err | head -1 >sums; status=${PIPESTATUS[0]}
if [ "$status" -eq 0 ]; then ok a_reader_that_leaves_is_an_error "it left too late to be noticed"
else check a_reader_that_leaves_is_an_error 1 'standard output: Broken pipe'; fi
timeout 60 "$treesum" tree big 2>err | head -c 1 >sums; status=${PIPESTATUS[0]}
check a_reader_that_leaves_ends_the_run 1 'standard output: Broken pipe'
run -a /dev/full tree >sums; check a_full_audit_fails 1 '/dev/full: No space left'
that a_full_audit_prints_nothing test ! -s sums
run -a missing/audit tree >sums; check an_audit_that_cannot_open_fails 1 'missing/audit: No such file'
that without_audit_nothing_starts test ! -s sums
run -a void tree >sums; check a_directory_as_audit_fails 1 'void: Is a directory'
mkfifo unread; run -a unread tree >sums; check a_fifo_without_reader_as_audit_fails 1 'nobody reads'
run -a sums tree >sums; check audit_and_output_must_differ 1 'also the standard output'
(ulimit -f 1; timeout 60 "$treesum" -a audit tree >sums 2>err); status=$?
check a_file_size_limit_fails 1 'File too large'
that a_file_size_limit_keeps_the_pair test "$(lines audit)" -eq "$(lines sums)"
run tree 2>&- >sums; sort sums >have; that a_closed_stderr_is_survived cmp -s want have

# A small disk that fills up midway, where we may mount one.
mkdir disk
if mount -t tmpfs -o size=16k none disk 2>/dev/null; then
    run -a disk/audit tree >sums; check a_disk_that_fills_up_fails 1 'disk/audit: No space left'
    that a_disk_that_fills_up_keeps_the_pair test "$(lines disk/audit)" -eq "$(lines sums)"
    that a_disk_that_fills_up_leaves_whole_lines sh -c 'test -z "$(tail -c 1 disk/audit | tr -d "\n")"'
    rm disk/audit
    run -a audit tree >disk/sums; check an_output_that_fills_up_fails 1 'standard output: No space left'
    that an_output_that_fills_up_keeps_the_pair test "$(lines audit)" -eq "$(lines disk/sums)"
    umount disk
else skip a_disk_that_fills_up_fails "cannot mount one here"; fi

# A pipe that nobody reads: the run gets stuck on it, and a signal still ends it.
mkdir many; (cd many && seq 1 3000 | xargs touch)
mkfifo stuck; exec 9<>stuck
stop_after "$early" TERM many >stuck 9>&-; check a_stuck_output_ends_by_signal 143 'stopped: SIGTERM'
in_time a_stuck_output_ends_promptly "$took"
timeout 5 cat <&9 >sums & reader=$!; sleep 0.5; kill $reader 2>/dev/null; wait $reader 2>/dev/null; exec 9>&-
if [ "$(lines sums)" -eq "$(lines audit)" ]; then ok a_stuck_output_keeps_the_pair "$(lines sums) lines"
else bad a_stuck_output_keeps_the_pair "$(lines sums) printed, $(lines audit) in the audit"; fi
exec 9<>stuck
stop_after "$early" INT -t 10m missing1 many big 2>/dev/null >sums; check a_signal_wins_over_a_far_deadline 130 ''
timeout -k 5 $((30 * slow)) "$treesum" -t 500ms many >stuck 2>err 9>&-; status=$?
check a_stuck_output_ends_by_deadline 124 ''; exec 9>&-
mkfifo stuck_audit; exec 9<>stuck_audit
stop_after $((2 * slow)) TERM -a stuck_audit many >sums 9>&-; check a_stuck_audit_ends_by_signal 143 ''; exec 9>&-

# --- the audit is exact, whenever it stops ----------------------------------------------------------------------------

mkdir steady; (cd steady && for i in $(seq 1 2000); do echo "$i" >"$i"; done)
huge steady/0
run -a audit tree >sums; that audit_is_complete_without_a_stop test "$(lines audit)" -eq "$(lines sums)"
run -a audit tree >sums; that audit_starts_afresh test "$(lines audit)" -eq "$(lines sums)"
wrong=0 least=999999 most=0 longest=0
for i in $(seq 1 20); do
    case $((i % 2)) in 0) signal=INT expect=130 ;; *) signal=TERM expect=143 ;; esac
    stop_after "0.0$(printf %02d $((RANDOM % 100)))" $signal steady tree >sums
    [ "$status" -eq $expect ] || { wrong=$((wrong + 1)); echo "   run $i: status $status instead of $expect: $(tail -1 err)"; }
    n=$(lines sums)
    [ "$(lines audit)" -eq "$n" ] || { wrong=$((wrong + 1)); echo "   run $i: $n printed, $(lines audit) in the audit"; }
    cut -c1-64 sums | sort >have; sed 's/.*"sha256":"\([0-9a-f]*\)".*/\1/' audit | sort >want2
    cmp -s have want2 || wrong=$((wrong + 1))
    sha256sum -c --quiet sums >/dev/null 2>&1 || [ "$n" -eq 0 ] || wrong=$((wrong + 1))
    [ "$n" -lt $least ] && least=$n; [ "$n" -gt $most ] && most=$n; [ "$took" -gt $longest ] && longest=$took
done
if [ $wrong -eq 0 ]; then ok audit_is_exact_after_20_signals "$least to $most hashes printed, slowest end $longest ms"
else bad audit_is_exact_after_20_signals "$wrong differences"; fi

# --- the bar ----------------------------------------------------------------------------------------------------------

if command -v script >/dev/null && script -qec true /dev/null >/dev/null 2>&1; then
    timeout 60 script -qec "$treesum -t 500ms big >sums" screen >/dev/null 2>&1
    that a_terminal_gets_a_bar grep -q '\[#*-*\] ' screen
    timeout 60 script -qec "$treesum -q -t 300ms big >sums" screen >/dev/null 2>&1
    that quiet_gets_no_bar sh -c '! grep -q "\[#*-*\] " screen'
else skip a_terminal_gets_a_bar "no script(1)"; fi
run -t 300ms big >sums; that a_file_gets_no_bar sh -c '! grep -q "\[#*-*\] " err'

# --- the command line -------------------------------------------------------------------------------------------------

run; check no_path_is_a_usage_error 2 'usage:'
for bad_args in '-j 0' '-j -1' '-j x' '-j 3x' '-j 1025' '-j 99999999999999999999' '-t 5' '-t x' '-t 5x' '-t -5s' '-t 5sx' '-t 1.5s' \
    '-t 99999999999999999999s' '-t 9223372037s' '-T 9999999h' '-T ms' '-Z' '-t' '-j' '-a'; do
    # shellcheck disable=SC2086
    run $bad_args tree >sums 2>&1
    case $bad_args in -t | -j | -a) timeout 60 "$treesum" tree $bad_args >sums 2>err; status=$? ;; esac
    check "bad_arguments: $bad_args" 2 'usage:'
    [ -s sums ] && bad "nothing_is_printed: $bad_args"
done
run -j '' tree; check "bad_arguments: -j ''" 2 'usage:'
run -t '' tree; check "bad_arguments: -t ''" 2 'usage:'
run -a '' tree; check "bad_arguments: -a ''" 2 'usage:'
run - ; check a_lone_dash_is_refused 2 'write ./-'
for good in '-t 9s' '-t 2m' '-t 1h' '-t 5000ms' '-t 60000000us' '-j 1024' '-t 9223372036s'; do
    # shellcheck disable=SC2086
    run $good tree/zero >sums; check "good_arguments: $good" 0 ''
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
