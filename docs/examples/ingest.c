/* ingest: lines from a pipe into SQLite, each acknowledged once it is committed, and stoppable at any moment.

   usage: ingest [-v] [-b SECONDS] DATABASE [INPUT]

     INPUT       a FIFO or a file (default: standard input)
     -b SECONDS  the budget of a shutdown, 1 to 3600 (default: 10)
     -v          say on standard error how the shutdown went

   Each line is trimmed, upper-cased, given a checksum and stored. Then `ack 17 1017` on standard output says that line
   17 of this input is committed as row 1017. Acknowledgements come in the order of the lines and leave none out, so the
   last one tells a sender where to go on.

   The end of the input, SIGTERM, SIGINT and SIGHUP stop it in order: the reader stops reading, the stage transforms
   what was read, the writer commits and acknowledges it. Whenever that comes, DATABASE gets exactly the acknowledged
   lines. A second signal gives up what is not committed yet. Two things are beyond a program's reach: a SIGKILL between
   a commit and its acknowledgement; and an output that seems to have room and then refuses the write, as a full disk
   does: a message names the lines.

   Exit status: 0 if all that was accepted is stored and acknowledged; 1 if not, and a message says what and why; 2 if
   the command line makes no sense.      Build: cc -O2 -I. docs/examples/ingest.c -o ingest -pthread -lsqlite3 */
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

#include <ctype.h>
#include <limits.h>
#include <sqlite3.h>
#include <sys/stat.h>

enum {
    LONGEST = 4000, /* bytes of a line */
    ACK_MAX = sizeof "ack 18446744073709551615 -9223372036854775808\n" - 1,
    BATCH = PIPE_BUF / ACK_MAX /* so that one write() puts all acknowledgements of a flush into a pipe, or none */
};

/* A plain value that queues copy: nobody owns it, and one that is dropped leaves nothing to free. */
typedef struct {
    unsigned long long number;
    uint32_t len, checksum;
    char text[LONGEST];
} line_t;

typedef struct {
    const char *database, *input_name;
    ctx_t *intake;     /* done when no more is to be read; the app's parent, so that the app then shuts down */
    ctx_chan_t *lines; /* from the reader to the stage */
    ctx_sem_t adding;  /* the right to empty `lines` into the batcher, or to close that */

    int input; /* the reader's */
    size_t used;
    char bytes[LONGEST + 1]; /* what came, without a complete line so far */
    line_t line;
    unsigned long long accepted;

    ctx_t *life; /* the writer's: of the batcher, so that no stop of a service cancels its last flush */
    ctx_batch_t *batch;
    ctx_sem_t gate; /* held from before a commit until after its acknowledgement */
    sqlite3 *db;
    sqlite3_stmt *insert;
    char why[200]; /* what the last error was, where the text of its code would not do */
    int failed;    /* the first error of a flush: nothing is stored after it */
    unsigned long long stored;
} ingest_t;

/* -- reader: input -> lines ---------------------------------------------------------------------------------------- */

/* A line is accepted when the stage's inbox has it. While the rest is slow this waits, and then so does the sender. */
static int accept_line(ingest_t *in, ctx_t *ctx, const char *text, size_t len) {
    memcpy(in->line.text, text, len);
    in->line.len = (uint32_t)len;
    in->line.number = in->accepted + 1;
    int rc = ctx_chan_send(in->lines, ctx, &in->line);
    if (rc == 0) in->accepted++;
    return rc;
}

static int accept_lines(ingest_t *in, ctx_t *ctx) {
    char *start = in->bytes, *end = start + in->used, *newline;
    int rc = 0;
    for (; rc == 0 && (newline = memchr(start, '\n', (size_t)(end - start))) != NULL; start = newline + 1)
        rc = accept_line(in, ctx, start, (size_t)(newline - start));
    in->used = (size_t)(end - start);
    memmove(in->bytes, start, in->used);
    return rc == 0 && in->used > LONGEST ? -EMSGSIZE : rc;
}

/* 0 at the end of the input and when the intake is done. What is half a line then was never accepted. */
static int read_all(ingest_t *in, ctx_t *ctx) {
    struct pollfd fds[] = {{.fd = in->input, .events = POLLIN}, {.fd = ctx_done_fd(in->intake), .events = POLLIN}};
    int rc = fds[1].fd < 0 ? fds[1].fd : 0;
    while (rc == 0) {
        int ready = poll(fds, 2, -1); /* nothing could wake a read() that waits for an idle sender */
        if (ctx_err(in->intake) != 0) return 0;
        if (ready <= 0 || fds[0].revents == 0) continue; /* read() would take a FIFO without a writer yet for ended */
        ssize_t n = read(in->input, in->bytes + in->used, sizeof in->bytes - in->used);
        if (n == 0) return in->used == 0 ? 0 : accept_line(in, ctx, in->bytes, in->used);
        if (n < 0 && errno != EINTR && errno != EAGAIN) return -errno;
        if (n > 0) in->used += (size_t)n;
        rc = accept_lines(in, ctx);
    }
    return rc;
}

/* The end of the input and an error both shut the app down in order, so that neither costs the lines before it. */
static int reader_run(ctx_t *ctx, void *user) {
    ingest_t *in = user;
    int rc = read_all(in, ctx);
    if (rc == 0)
        ctx_cancel_cause(in->intake, CTX_CLOSED, "end of input");
    else if (ctx_err(in->intake) == 0)
        fprintf(stderr, "ingest: %s: after line %llu: %s\n", in->input_name, in->accepted, ctx_strerror(rc));
    return rc;
}

static void reader_refuse(void *user) { ctx_cancel(((ingest_t *)user)->intake); }

/* -- stage: lines -> batcher --------------------------------------------------------------------------------------- */

static int transform(ctx_t *ctx, const void *item, void *out, void *user) {
    (void)out;
    ingest_t *in = user;
    const line_t *line = item;
    line_t row = {.number = line->number, .checksum = 2166136261u /* FNV-1a */};
    uint32_t from = 0, to = line->len;
    while (to > 0 && isspace((unsigned char)line->text[to - 1])) to--; /* also the CR of a CRLF */
    while (from < to && isspace((unsigned char)line->text[from])) from++;
    for (; from < to; from++) {
        int c = toupper((unsigned char)line->text[from]);
        row.text[row.len++] = (char)c;
        row.checksum = (row.checksum ^ (uint32_t)c) * 16777619u;
    }
    return ctx_batch_add_wait(in->batch, ctx, &row);
}

/* `run` and `drain` alike, one after the other: what is left when `run` returns, or if it never began, is for `drain`,
   which usually just waits for the end of `run`. One worker, so that lines stay in order. */
static int stage_work(ctx_t *ctx, void *user) {
    ingest_t *in = user;
    int rc = ctx_sem_acquire(&in->adding, ctx, 1);
    if (rc != 0) return rc;
    rc = ctx_stage_run(ctx, &(ctx_stage_desc_t){.in = in->lines, .fn = transform, .user = in});
    if (rc != 0) ctx_chan_close(in->lines);
    while (rc != 0 && ctx_chan_try_recv(in->lines, NULL) == 0) continue; /* no line may overtake one that is lost */
    ctx_sem_release(&in->adding, 1);
    return rc;
}

static void stage_refuse(void *user) { ctx_chan_close(((ingest_t *)user)->lines); }

/* -- writer: batcher -> database, acknowledgements ----------------------------------------------------------------- */

typedef struct {
    ingest_t *in;
    const line_t *lines;
    size_t n, len;
    char acks[BATCH * ACK_MAX + 1];
} job_t;

/* SQLite's result as an error. Its text is kept, since a rollback would replace it. */
static int check(ingest_t *in, int result) {
    if (result == SQLITE_OK || result == SQLITE_DONE) return 0;
    snprintf(in->why, sizeof in->why, "%s", sqlite3_errmsg(in->db));
    return (result & 0xff) == SQLITE_BUSY ? CTX_NOT_READY : (result & 0xff) == SQLITE_FULL ? -ENOSPC : -EIO;
}

static int execute(ingest_t *in, const char *sql) { return check(in, sqlite3_exec(in->db, sql, NULL, NULL, NULL)); }

/* One attempt: all lines are committed, or none. */
static int store(ctx_t *ctx, void *arg) {
    (void)ctx;
    job_t *job = arg;
    ingest_t *in = job->in;
    int rc = execute(in, "BEGIN IMMEDIATE");
    job->len = 0;
    for (size_t i = 0; rc == 0 && i < job->n; i++) {
        const line_t *line = &job->lines[i];
        sqlite3_bind_int64(in->insert, 1, line->checksum);
        sqlite3_bind_blob(in->insert, 2, line->text, (int)line->len, SQLITE_STATIC); /* bytes, NUL and all */
        rc = check(in, sqlite3_step(in->insert));
        sqlite3_reset(in->insert);
        job->len += (size_t)snprintf(job->acks + job->len, sizeof job->acks - job->len, "ack %llu %lld\n", line->number,
                                     (long long)sqlite3_last_insert_rowid(in->db));
    }
    if (rc == 0) rc = execute(in, "COMMIT");
    if (!sqlite3_get_autocommit(in->db)) sqlite3_exec(in->db, "ROLLBACK", NULL, NULL, NULL);
    return rc;
}

static bool may_pass(int rc, void *arg) { return (void)arg, rc == CTX_NOT_READY || rc == -ENOSPC; }

/* Waiting for the output comes before the commit, so that nothing waits between that and its acknowledgement. An output
   that nobody reads, or can read any more, is met here, with nothing stored. */
static int wait_for_room(ingest_t *in, ctx_t *ctx) {
    int ready = ctx_poll_fd(ctx, STDOUT_FILENO, POLLOUT); /* which makes no descriptor for this short context */
    if (ready < 0 || !(ready & (POLLERR | POLLHUP | POLLNVAL))) return ready < 0 ? ready : 0;
    snprintf(in->why, sizeof in->why, "nobody reads the standard output any more");
    return CTX_CLOSED;
}

static int acknowledge(const job_t *job) {
    for (size_t done = 0; done < job->len;) {
        ssize_t n = write(STDOUT_FILENO, job->acks + done, job->len - done);
        if (n < 0 && errno != EINTR) return -errno;
        if (n > 0) done += (size_t)n;
    }
    return 0;
}

/* The first failure ends the intake, and so the app. */
static bool fail(ingest_t *in, int rc) {
    if (in->failed != 0) return false;
    in->failed = rc;
    ctx_cancel_cause(in->intake, rc, "writer");
    return true;
}

static int flush(ctx_t *ctx, const void *items, size_t n, void *user) {
    ingest_t *in = user;
    job_t job = {.in = in, .lines = items, .n = n};
    int rc = in->failed; /* nor here */
    if (rc == 0) rc = wait_for_room(in, ctx);
    if (rc == 0) rc = ctx_sem_acquire(&in->gate, ctx, 1);
    if (rc != 0) return rc;
    ctx_t *patience = ctx_with_timeout(ctx, CTX_S(2)); /* how long a database may be locked or a disk full */
    ctx_retry_desc_t again = {.attempts = -1, .base = CTX_MS(2), .cap = CTX_MS(100), .retryable = may_pass};
    rc = ctx_retry(patience, &again, store, &job);
    int unsaid = rc == 0 ? acknowledge(&job) : 0;
    if (rc == 0) {
        in->stored = job.lines[n - 1].number;
        in->why[0] = '\0'; /* of an attempt that was not the last */
    }
    ctx_sem_release(&in->gate, 1);
    ctx_end(patience);
    if (unsaid != 0 && fail(in, unsaid))
        fprintf(stderr, "ingest: standard output: %s: lines %llu to %llu are stored, but not acknowledged\n",
                strerror(-unsaid), job.lines[0].number, job.lines[n - 1].number);
    return rc; /* not `unsaid`: those lines are in the database, so they must not go to not_stored() */
}

static void not_stored(const void *items, size_t n, int reason, void *user) {
    (void)n;
    ingest_t *in = user;
    if (fail(in, reason))
        fprintf(stderr, "ingest: %s: line %llu and all after it are not stored: %s\n", in->database,
                ((const line_t *)items)->number, in->why[0] ? in->why : ctx_strerror(reason));
}

static int writer_start(ctx_t *ctx, void *user) {
    (void)ctx;
    ingest_t *in = user;
    int rc = check(in, sqlite3_open_v2(in->database, &in->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, NULL));
    sqlite3_busy_timeout(in->db, 2000);
    if (rc == 0)
        rc = execute(in, "BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS lines"
                         " (id INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, text BLOB NOT NULL); COMMIT");
    const char *insert = "INSERT INTO lines (checksum, text) VALUES (?, ?)";
    if (rc == 0) rc = check(in, sqlite3_prepare_v2(in->db, insert, -1, &in->insert, NULL));
    if (rc != 0) return fprintf(stderr, "ingest: %s: %s\n", in->database, in->why), rc;
    sqlite3_busy_timeout(in->db, 0); /* from here on ctx_retry() waits, which a stop can wake */
    in->batch = ctx_batch_new(in->life, &(ctx_batch_desc_t){.item_size = sizeof(line_t),
                                                            .max_items = BATCH,
                                                            .max_delay = CTX_MS(20),
                                                            .flush = flush,
                                                            .on_drop = not_stored,
                                                            .user = in});
    return in->batch ? 0 : -errno;
}

/* Its turn comes also when the stage is overdue, and then still adds: the batcher is left to main. */
static int writer_drain(ctx_t *ctx, void *user) {
    ingest_t *in = user;
    int rc = ctx_sem_acquire(&in->adding, ctx, 1);
    if (rc != 0) return rc;
    rc = ctx_batch_drain(in->batch, ctx_remaining(ctx), NULL);
    ctx_batch_free(in->batch);
    in->batch = NULL;
    return rc;
}

static void writer_force(void *user) { ctx_cancel(((ingest_t *)user)->life); } /* ends a drain that goes on */

/* -- program ------------------------------------------------------------------------------------------------------- */

static int run(ingest_t *in, ctx_dur_t budget, bool verbose) {
    static const char *const needs_stage[] = {"stage", NULL}, *const needs_writer[] = {"writer", NULL};
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP, 0};
    static ctx_shutdown_report_t report;
    ctx_service_desc_t services[] = {
        {.name = "reader", .run = reader_run, .refuse = reader_refuse, .needs = needs_stage},
        {.name = "stage", .run = stage_work, .refuse = stage_refuse, .drain = stage_work, .needs = needs_writer},
        {.name = "writer", .start = writer_start, .drain = writer_drain, .force = writer_force, .grace = CTX_MS(300)}};
    in->intake = ctx_with_cancel(ctx_background());
    in->life = ctx_with_cancel(ctx_background());
    in->lines = ctx_chan_new(sizeof(line_t), 256);
    ctx_app_t *app = ctx_app_new(in->intake);
    bool ready = ctx_sem_init(&in->adding, 1) == 0 && ctx_sem_init(&in->gate, 1) == 0;
    ready = ready && in->lines && app;
    for (int i = 0; i < 3 && ready; i++) {
        services[i].user = in;
        ready = ctx_app_add(app, &services[i]) == 0;
    }
    if (!ready) return fprintf(stderr, "ingest: %s\n", ctx_strerror(CTX_NO_MEMORY)), 1;

    int rc = ctx_app_run(app, &(ctx_app_desc_t){.signals = signals, .budget = budget, .report = &report});
    if (verbose) ctx_shutdown_print(&report, stderr);
    if (rc != 0) fprintf(stderr, "ingest: stopped by %s: %s\n", report.cause, ctx_strerror(rc));

    /* If a thread is stuck with all this, it keeps it. But do not end between a commit and its acknowledgement. */
    if (report.late == 0) ctx_batch_free(in->batch); /* there is one only if the writer could not close it */
    ctx_t *moment = ctx_with_timeout(ctx_background(), CTX_S(2));
    if (ctx_sem_acquire(&in->gate, moment, 1) != 0 || report.late > 0) _exit(1);
    ctx_end(moment);
    bool whole = rc == 0 && in->failed == 0 && in->stored == in->accepted;
    if (in->stored < in->accepted)
        fprintf(stderr, "ingest: of %llu lines read %llu are stored\n", in->accepted, in->stored);
    sqlite3_finalize(in->insert);
    sqlite3_close(in->db);
    ctx_chan_free(in->lines);
    ctx_end(in->intake);
    ctx_end(in->life);
    ctx_runtime_stop();
    return whole ? 0 : 1;
}

static int usage(const char *what, const char *why) {
    fprintf(stderr, "ingest: %s: %s\nusage: ingest [-v] [-b SECONDS] DATABASE [INPUT]\n", what, why);
    return 2;
}

int main(int argc, char **argv) {
    static ingest_t in = {.input_name = "standard input"};
    struct stat file;
    bool verbose = false;
    long budget = 10;
    /* A descriptor that is closed now would be given to the next file opened: acknowledgements in the database. With
       /dev/null opened the wrong way round it is taken, and fails as if it were closed. */
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) != fd) return 1;
    signal(SIGPIPE, SIG_IGN); /* let write() return these as errors, which stop the app in order */
    signal(SIGXFSZ, SIG_IGN);
    for (int option; (option = getopt(argc, argv, "vb:")) != -1;) {
        char *end = "";
        if (option == 'v') verbose = true;
        if (option == 'b') budget = strtol(optarg, &end, 10);
        if (option == '?' || *end != '\0' || budget < 1 || budget > 3600) return usage("option", "not like this");
    }
    argv += optind;
    if (!argv[0] || !argv[0][0] || (argv[1] && argv[2])) return usage("DATABASE [INPUT]", "one or two names, please");
    in.database = argv[0];
    if (argv[1]) {
        in.input_name = argv[1];
        in.input = open(argv[1], O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* else a FIFO makes it wait for a first writer */
        if (in.input < 0 || fstat(in.input, &file) != 0) return usage(argv[1], strerror(errno));
        if (S_ISDIR(file.st_mode)) return usage(argv[1], strerror(EISDIR));
    }
    if ((fcntl(STDOUT_FILENO, F_GETFL) & O_ACCMODE) == O_RDONLY) return usage("standard output", strerror(EBADF));
    return run(&in, CTX_S(budget), verbose);
}
