#!/usr/bin/env bash
# Tests docs/examples/ingest.c from the outside: whenever it is stopped, the database holds exactly the lines that it
# has acknowledged.
#
#   tests/test_ingest.sh [INGEST]        a binary to test (default: build/examples/ingest, built here if missing)
#
# INGEST_ROUNDS=N  random stops (default: 20)        SLOW=N  multiplies time limits (for sanitizers)
export LC_ALL=C ASAN_OPTIONS=${ASAN_OPTIONS:-exitcode=99} # 1 is what ingest itself ends with
cd "$(dirname "$0")/.." || exit 2
. tests/shell.sh

ingest=${1:-build/examples/ingest}
case $ingest in /*) ;; *) ingest=$PWD/$ingest ;; esac
if [ ! -x "$ingest" ]; then
    mkdir -p "$(dirname "$ingest")"
    $CC -O2 -I. docs/examples/ingest.c -o "$ingest" -pthread -lsqlite3 || exit 2
fi
rounds=${INGEST_ROUNDS:-20}
slow=${SLOW:-1}

# What looks at the database is not what wrote it.
#   look DATABASE            a line `ID TEXT` for each row; status 1 if a checksum is wrong
#   look DATABASE SECONDS    says `locked` and keeps the database locked for so long
cat >"$tmp/look.c" <<'END'
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    sqlite3 *db;
    sqlite3_stmt *rows;
    int wrong = 0, rc = sqlite3_open_v2(argv[1], &db, SQLITE_OPEN_READWRITE, NULL);
    if (rc != SQLITE_OK) return 2;
    sqlite3_busy_timeout(db, 5000);
    if (argc > 2) {
        if (sqlite3_exec(db, "BEGIN EXCLUSIVE", NULL, NULL, NULL) != SQLITE_OK) return 2;
        puts("locked");
        fflush(stdout);
        usleep((unsigned)(atof(argv[2]) * 1e6));
        return sqlite3_close(db);
    }
    rc = sqlite3_prepare_v2(db, "SELECT id, checksum, text FROM lines ORDER BY id", -1, &rows, NULL);
    if (rc != SQLITE_OK) return 2;
    while ((rc = sqlite3_step(rows)) == SQLITE_ROW) {
        const unsigned char *text = sqlite3_column_blob(rows, 2);
        int n = sqlite3_column_bytes(rows, 2);
        unsigned sum = 2166136261u;
        for (int i = 0; i < n; i++) sum = (sum ^ text[i]) * 16777619u;
        wrong += sum != (unsigned)sqlite3_column_int64(rows, 1);
        printf("%lld ", (long long)sqlite3_column_int64(rows, 0));
        fwrite(n > 0 ? (const char *)text : "", 1, (size_t)n, stdout);
        putchar('\n');
    }
    return rc != SQLITE_DONE ? 2 : wrong != 0;
}
END
$CC -O1 "$tmp/look.c" -o "$tmp/look" -lsqlite3 || exit 2
look=$tmp/look

cd "$tmp" || exit 2
exec 3>&1 # for what a test wants to say beside its name

lines() { wc -l <"$1" | tr -d ' '; }
now_ms() { echo $(($(date +%s%N) / 1000000)); }
detail() { echo "   $*" >&3; }

# run [ARGS...]: with a guard against hanging. Leaves $status, and stderr in ./err.
run() { status=0; timeout -k 5 $((60 * slow)) "$ingest" "$@" 2>err || status=$?; }
ended() { # ended STATUS [TEXT]
    [ "$status" -eq "$1" ] || { cat err; return 1; }
    [ -z "${2:-}" ] || grep -q -- "$2" err || { cat err; return 1; }
}
fresh() { rm -f db db-journal rows pipe; : >acks; : >err; }

# feed [FROM]: numbered lines without an end, with spaces to trim and letters to raise.
feed() { seq -f '  line %.0f	' "${1:-1}" 100000000 2>/dev/null; }
# It ends by itself when its reader goes, unless there never was one.
stop_feeder() { kill $feeder 2>/dev/null || true; wait $feeder 2>/dev/null || true; }

# The rows of a fresh database are lines 1 to n of what `feed` gives, whole and in order, and ./acks says just that.
exact() {
    if [ -s db ]; then "$look" db >rows; else : >rows; fi
    awk '{ if ($0 != NR " LINE " NR) { print "row " NR " is: " $0; exit 1 } }' rows
    awk '{ print "ack", $3, $1 }' rows >wanted
    cmp wanted acks
}

# finish_in SECONDS: wait for $pid. Leaves $status and $took (ms). The guard is a process beside it, since a signal to
# `timeout` is not one to what it runs.
finish_in() {
    { timeout $(($1 * slow)) tail --pid=$pid -f /dev/null || kill -KILL $pid; } >/dev/null 2>&1 3>&- 9>&- &
    local guard=$! begin; begin=$(now_ms)
    status=0
    wait $pid || status=$?
    took=$(($(now_ms) - begin))
    kill $guard 2>/dev/null || true # it may have seen the end by itself
    wait $guard 2>/dev/null || true
    [ $status -ne 137 ]
}
# A test that fails leaves processes behind that nobody waits for.
tidily() {
    trap 'kill -KILL $(jobs -p) 2>/dev/null || true; umount disk 2>/dev/null || true' EXIT
    "$@"
}
await() { # await COMMAND...: until it succeeds, for ten seconds
    for _ in $(seq 1 $((1000 * slow))); do if "$@" >/dev/null 2>&1; then return 0; fi; sleep 0.01; done
    return 1
}

# -- what it stores --------------------------------------------------------------------------------------------------

stores_and_acknowledges_every_line() {
    fresh
    feed 1 | head -n 5000 >input
    run db input >acks
    ended 0
    [ "$(lines acks)" -eq 5000 ]
    exact
}

reads_standard_input() {
    fresh
    feed 1 | head -n 1000 | run db >acks
    [ "$(lines acks)" -eq 1000 ]
    exact
}

stored() { # stored INPUT ROWS: printf's formats
    fresh
    printf "$1" >input
    run db input >acks
    ended 0
    "$look" db >rows
    printf "$2" >wanted
    cmp wanted rows
    [ "$(lines acks)" -eq "$(lines rows)" ]
}
an_empty_input_is_fine() { stored '' ''; }
an_empty_line_is_a_line() { stored 'a\n\n \t \nb\n' '1 A\n2 \n3 \n4 B\n'; }
the_last_line_needs_no_newline() { stored 'a\nb' '1 A\n2 B\n'; }
crlf_is_an_end_of_line() { stored 'a\r\nb\r\n' '1 A\n2 B\n'; }
nul_bytes_are_stored() { stored 'a\0b\n\0\n' '1 A\0B\n2 \0\n'; }
other_bytes_are_stored_as_they_are() { stored '\377\200\n\303\274x\n' '1 \377\200\n2 \303\274X\n'; }
the_longest_line_fits() {
    fresh
    { head -c 4000 /dev/zero | tr '\0' x; echo; echo y; } >input
    run db input >acks
    ended 0
    [ "$("$look" db | wc -c)" -eq 4007 ]
}
a_longer_line_is_an_error_after_those_before_it() {
    fresh
    { feed 1 | head -n 300; head -c 4001 /dev/zero | tr '\0' x; echo; echo y; } >input
    run db input >acks
    ended 1 'after line 300: Message too long'
    [ "$(lines acks)" -eq 300 ]
    exact
}
a_line_without_end_is_an_error() {
    fresh
    head -c 10000000 /dev/zero >input
    run db input >acks
    ended 1 'Message too long'
}

ids_go_on_in_the_next_run() {
    fresh
    printf 'a\nb\n' >input
    run db input >acks
    run db input >acks
    ended 0
    printf 'ack 1 3\nack 2 4\n' | cmp - acks
    [ "$("$look" db | wc -l)" -eq 4 ]
}

an_acknowledgement_does_not_wait_for_more_lines() {
    fresh
    mkfifo pipe
    "$ingest" db pipe >acks 2>err & pid=$!
    exec 9>pipe
    printf 'line 1\nline 2\nli' >&9
    await grep -q 'ack 2' acks
    exec 9>&-
    finish_in 20
    [ $status -eq 0 ]
    printf 'ack 1 1\nack 2 2\nack 3 3\n' | cmp - acks
}

# -- how it stops ----------------------------------------------------------------------------------------------------

# Round I: a feeder at full speed, a signal after a random time. Half of the rounds read a FIFO by name, half standard
# input. (SIGINT is not among the signals: background jobs of a shell ignore it until they ask for it.)
one_stop() {
    fresh
    rm -f started
    local ms=$((RANDOM % 300)) signal=TERM input=pipe
    [ $(($1 % 5)) -ne 0 ] || signal=HUP
    [ $(($1 % 2)) -ne 0 ] || input=
    mkfifo pipe
    feed >pipe & feeder=$!
    # By way of sh, because a signal that meets bash between its fork and its exec is lost.
    sh -c 'echo >started; [ "$1" ] || exec <pipe; exec "$0" db $1 >acks 2>err' "$ingest" $input & pid=$!
    until [ -e started ]; do :; done
    [ $ms -lt 30 ] || sleep "0.$(printf %03d $ms)" # a sleep takes its time even if it is for none
    kill -s $signal $pid
    finish_in 30
    stop_feeder
    exact
    n=$(lines acks)
    case $status in
        0) ;;
        129 | 143) early=$((early + 1)); [ "$n" -eq 0 ] ;; # killed before main() had its handlers
        *) cat err; return 1 ;;
    esac
    [ $took -lt $((5000 * slow)) ] # the budget is 10 s, and nothing is in the way
}

holds_exactly_what_it_acknowledged_at_random_stops() {
    local least=999999999 most=0 longest=0 total=0 i
    early=0
    for i in $(seq 1 "$rounds"); do
        one_stop "$i" # not as a condition: there -e would have no effect
        total=$((total + n))
        [ "$n" -ge $least ] || least=$n
        [ "$n" -le $most ] || most=$n
        [ "$took" -le $longest ] || longest=$took
    done
    detail "$rounds stops: $least to $most lines, $total in all; slowest $longest ms; $early came before main()"
}

# Two signals at once or nearly so: the second gives up what is not committed.
holds_exactly_what_it_acknowledged_after_two_signals() {
    local i total=0 given_up=0
    for i in $(seq 1 $(((rounds + 1) / 2))); do
        fresh
        mkfifo pipe
        feed >pipe & feeder=$!
        "$ingest" db pipe >acks 2>err & pid=$!
        await test -s acks
        sleep "0.0$(printf %02d $((RANDOM % 100)))"
        kill -TERM $pid
        sleep "0.00$((RANDOM % 10))"
        kill -TERM $pid 2>/dev/null || true
        finish_in 30
        stop_feeder
        case $status in
            0) refuse grep -q 'lines read' err ;;
            143) ;; # all was done, and the second came on the way out
            1) given_up=$((given_up + 1)) ;;
            *) cat err; return 1 ;;
        esac
        exact
        total=$((total + $(lines acks)))
    done
    detail "$i stops with two signals: $total lines; $given_up gave something up"
}

# What a kill may leave: a batch that was committed a moment ago. Nothing that was acknowledged is missing.
loses_nothing_acknowledged_when_killed() {
    local i most=0 extra
    for i in $(seq 1 5); do
        fresh
        mkfifo pipe
        feed >pipe & feeder=$!
        "$ingest" db pipe >acks 2>err & pid=$!
        await test -s acks
        sleep "0.0$(printf %02d $((RANDOM % 100)))"
        kill -KILL $pid
        wait $pid 2>/dev/null || true
        stop_feeder
        "$look" db >rows
        awk '{ print "ack", $3, $1 }' rows >wanted
        extra=$(($(lines wanted) - $(lines acks)))
        head -n "$(lines acks)" wanted | cmp - acks
        [ $extra -ge 0 ] && [ $extra -le 100 ]
        [ $extra -le $most ] || most=$extra
    done
    detail "killed $i times: at most $most lines without acknowledgement"
}

stops_on() { # stops_on SIGNAL
    fresh
    mkfifo pipe
    exec 9<>pipe # a sender that says nothing
    printf 'line 1\nline 2\nline 3, in part' >&9
    "$ingest" -v db pipe >acks 2>err 9>&- & pid=$!
    await grep -q 'ack 2' acks
    kill -s "$1" $pid
    finish_in 20
    exec 9>&-
    [ $status -eq 0 ]
    exact
    [ "$(lines acks)" -eq 2 ]
    grep "$1" err
}
sigterm_wakes_a_reader_of_a_silent_pipe() { stops_on TERM; }
sigint_wakes_a_reader_of_a_silent_pipe() { stops_on INT; }
verbose_draws_the_shutdown() { stops_on TERM; grep reader err; grep stage err; grep writer err; }

sigterm_wakes_a_reader_of_a_fifo_without_a_writer() {
    fresh
    mkfifo pipe
    "$ingest" db pipe >acks 2>err & pid=$!
    await test -s db
    sleep 0.1
    kill -TERM $pid
    finish_in 20
    [ $status -eq 0 ]
    [ ! -s acks ]
}

ends_when_the_writers_have_closed_the_fifo() {
    fresh
    mkfifo pipe
    "$ingest" db pipe >acks 2>err & pid=$!
    sleep 0.1 # its end must not be taken for come before they have
    { printf 'line 1\n'; sleep 0.2; printf 'line 2\n'; } >pipe
    finish_in 20
    [ $status -eq 0 ]
    exact
    [ "$(lines acks)" -eq 2 ]
}

# -- an output that fails --------------------------------------------------------------------------------------------

a_full_output_is_an_error() {
    fresh
    feed | head -n 1000 >input
    run db input >/dev/full
    ended 1 'No space left on device: lines 1 to [0-9]* are stored, but not acknowledged'
    : >acks
    "$look" db >rows
    [ "$(lines rows)" -eq "$(sed -n 's/.*lines 1 to \([0-9]*\) are.*/\1/p' err)" ] # and nothing after them
}

a_closed_output_is_refused() {
    fresh
    printf 'line 1\n' >input
    run db input >&-
    ended 2 'standard output: Bad file descriptor'
    [ ! -s db ]
}

an_output_whose_reader_leaves_is_an_error() {
    fresh
    mkfifo pipe
    feed >pipe & feeder=$!
    { run db pipe; echo "$status" >status; } | head -n 5 >acks
    stop_feeder
    status=$(cat status)
    ended 1 'nobody reads the standard output any more\|Broken pipe'
    [ "$(lines acks)" -eq 5 ]
    "$look" db >rows
    awk '{ if ($0 != NR " LINE " NR) exit 1 }' rows
}

a_closed_standard_error_is_survived() {
    fresh
    feed | head -n 100 >input
    status=0
    timeout 60 "$ingest" -v db input >acks 2>&- || status=$?
    [ $status -eq 0 ]
    exact
}

a_closed_standard_input_is_an_error() { fresh; run db <&- >acks; ended 1 'standard input: after line 0: Bad file'; }

# stuck ARGS...: a run whose output nobody reads, with all its queues full. The pipe has room for one flush or so.
stuck() {
    fresh
    rm -f output
    mkfifo pipe output
    exec 9<>output
    yes '' 2>/dev/null | dd bs=4096 count=15 iflag=fullblock 2>/dev/null >&9
    feed >pipe 9>&- & feeder=$!
    "$ingest" "$@" db pipe >output 2>err 9>&- & pid=$!
    await has_rows
    sleep 0.3
    kill -0 $pid
}
has_rows() { [ -n "$("$look" db)" ]; }
# What is in the pipe was acknowledged.
unstick() {
    stop_feeder
    timeout 1 cat <&9 | grep -v '^$' >acks || true
    exec 9>&-
    exact
    [ -s acks ]
}

a_stuck_output_holds_a_stop_for_its_budget_only() {
    stuck -b 1
    kill -TERM $pid
    finish_in 20
    detail "stopped after $took ms of a budget of 1 s"
    unstick
    ended 1 'not stored'
}

a_second_signal_stops_at_once() {
    stuck -b 60
    kill -TERM $pid
    sleep 0.2
    kill -0 $pid
    kill -TERM $pid
    finish_in 20
    detail "stopped $took ms after the second signal"
    unstick
    ended 1 'not stored'
}

# -- a database that fails -------------------------------------------------------------------------------------------

a_lock_at_the_start_is_waited_for() {
    fresh
    run db /dev/null
    "$look" db 0.5 >locked & local holder=$!
    await grep -q locked locked
    feed | head -n 1000 >input
    run db input >acks
    wait $holder
    ended 0
    [ "$(lines acks)" -eq 1000 ]
    exact
}

# locked_for SECONDS: from after the first line until, perhaps, after the second.
locked_for() {
    fresh
    mkfifo pipe
    "$ingest" db pipe >acks 2>err & pid=$!
    exec 9>pipe
    printf 'line 1\n' >&9
    await grep -q 'ack 1' acks
    "$look" db "$1" >locked 9>&- & local holder=$!
    await grep -q locked locked
    printf 'line 2\n' >&9
    [ "$1" -gt 1 ] || exec 9>&-
    finish_in 30
    exec 9>&-
    kill $holder 2>/dev/null || true
    wait $holder 2>/dev/null || true
    exact
}
a_short_lock_is_waited_for() { locked_for 1; ended 0; [ "$(lines acks)" -eq 2 ]; }
a_long_lock_is_an_error() {
    locked_for 60
    ended 1 'line 2 and all after it are not stored: database is locked'
    [ "$(lines acks)" -eq 1 ]
}

sigterm_ends_the_wait_for_a_lock() {
    fresh
    run db /dev/null >acks
    "$look" db 60 >locked & local holder=$!
    await grep -q locked locked
    feed | head -n 10 >input
    "$ingest" db input >acks 2>err & pid=$!
    sleep 0.2
    kill -TERM $pid
    finish_in 20
    kill $holder
    wait $holder 2>/dev/null || true
    [ $status -ne 0 ]
    [ ! -s acks ]
    [ -z "$("$look" db)" ]
}

a_limit_on_file_sizes_is_an_error() {
    fresh
    feed | head -n 100000 >input
    status=0
    (ulimit -f 100; exec timeout 60 "$ingest" db input >acks 2>err) || status=$?
    ended 1 'not stored'
    exact
    [ "$(lines acks)" -gt 100 ]
}

a_full_disk_is_an_error() {
    fresh
    mount -t tmpfs -o size=200k none disk
    feed | head -n 100000 >input
    run disk/db input >acks
    cp disk/db db
    umount disk
    ended 1 'database or disk is full'
    exact
    [ "$(lines acks)" -gt 100 ]
}

no_database() { # no_database DATABASE TEXT
    printf 'a\n' >input
    run "$1" input >acks
    ended 1 "$2"
    [ ! -s acks ]
}
a_database_in_no_directory_is_an_error() { no_database missing/db 'missing/db: unable to open'; }
a_directory_as_database_is_an_error() { mkdir -p void; no_database void 'void: unable to open'; }
another_file_as_database_is_an_error() {
    seq 1 1000 >text
    no_database text 'text: file is not a database'
    seq 1 1000 | cmp - text
}
a_read_only_database_is_an_error() {
    fresh
    run db /dev/null >acks
    chmod 444 db
    printf 'a\n' >input
    if [ "$(id -u)" -ne 0 ]; then
        run db input >acks
    else
        chmod 755 . # not to root, who may write everywhere
        cp "$ingest" ./ingest.copy
        chmod 755 ingest.copy
        status=0
        timeout 60 setpriv --reuid=65534 --regid=65534 --clear-groups ./ingest.copy db input >acks 2>err || status=$?
    fi
    ended 1 'attempt to write a readonly database'
    [ ! -s acks ]
    chmod 644 db
}

# -- the command line ------------------------------------------------------------------------------------------------

misused() { # misused TEXT ARGS...
    local text=$1
    shift
    run "$@" </dev/null >acks
    ended 2 "$text"
    ended 2 '^usage:'
    [ ! -s acks ]
}
bad_arguments_are_refused() {
    fresh
    misused DATABASE
    misused DATABASE ''
    misused DATABASE db input more
    misused option -x db
    misused option -b db
    for seconds in 0 -1 x 1x '' 3601 99999999999999999999; do misused option -b "$seconds" db; done
    [ ! -e db ]
}
a_missing_input_is_refused() { fresh; misused 'missing: No such file' db missing; [ ! -e db ]; }
a_directory_as_input_is_refused() { fresh; mkdir -p void; misused 'void: Is a directory' db void; [ ! -e db ]; }
an_unreadable_input_is_refused() {
    fresh
    printf 'a\n' >input
    chmod 000 input
    status=0
    if [ "$(id -u)" -ne 0 ]; then
        run db input >acks
    else
        cp "$ingest" ./ingest.copy
        chmod 755 . ingest.copy
        timeout 60 setpriv --reuid=65534 --regid=65534 --clear-groups ./ingest.copy db input >acks 2>err || status=$?
    fi
    rm -f input
    ended 2 'input: Permission denied'
}

for name in stores_and_acknowledges_every_line reads_standard_input an_empty_input_is_fine an_empty_line_is_a_line \
    the_last_line_needs_no_newline crlf_is_an_end_of_line nul_bytes_are_stored other_bytes_are_stored_as_they_are \
    the_longest_line_fits a_longer_line_is_an_error_after_those_before_it a_line_without_end_is_an_error \
    ids_go_on_in_the_next_run an_acknowledgement_does_not_wait_for_more_lines \
    holds_exactly_what_it_acknowledged_at_random_stops holds_exactly_what_it_acknowledged_after_two_signals \
    loses_nothing_acknowledged_when_killed sigterm_wakes_a_reader_of_a_silent_pipe \
    sigint_wakes_a_reader_of_a_silent_pipe verbose_draws_the_shutdown \
    sigterm_wakes_a_reader_of_a_fifo_without_a_writer ends_when_the_writers_have_closed_the_fifo \
    a_full_output_is_an_error a_closed_output_is_refused an_output_whose_reader_leaves_is_an_error \
    a_closed_standard_error_is_survived a_closed_standard_input_is_an_error \
    a_stuck_output_holds_a_stop_for_its_budget_only a_second_signal_stops_at_once a_lock_at_the_start_is_waited_for \
    a_short_lock_is_waited_for a_long_lock_is_an_error sigterm_ends_the_wait_for_a_lock \
    a_limit_on_file_sizes_is_an_error a_database_in_no_directory_is_an_error a_directory_as_database_is_an_error \
    another_file_as_database_is_an_error bad_arguments_are_refused a_missing_input_is_refused \
    a_directory_as_input_is_refused; do
    expect $name tidily $name
done
mkdir disk
if mount -t tmpfs -o size=200k none disk 2>/dev/null; then
    umount disk
    expect a_full_disk_is_an_error tidily a_full_disk_is_an_error
else
    skip a_full_disk_is_an_error "cannot mount one here"
fi
if [ "$(id -u)" -ne 0 ] || has setpriv; then
    expect a_read_only_database_is_an_error tidily a_read_only_database_is_an_error
    expect an_unreadable_input_is_refused tidily an_unreadable_input_is_refused
else
    skip a_read_only_database_is_an_error "root may write everywhere and there is no setpriv"
fi
finish
