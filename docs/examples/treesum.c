/* treesum: the SHA-256 of every regular file below some paths, on all cores, and stoppable at any moment.

   usage: treesum [-j N] [-t TOTAL] [-T PER_FILE] [-a AUDIT] [-q] PATH...

     -j N         hash N files at a time, 1 to 1024 (default: one per core)
     -t TOTAL     stop the whole run after this long
     -T PER_FILE  give up on a file that takes longer than this, and go on with the others
     -a AUDIT     start the file AUDIT afresh and write one JSON line there for each hash printed
     -q           no progress bar, no summary, no notes on links to directories; errors are still reported

   A duration is a whole number and a unit: 500us, 250ms, 2s, 1m, 1h. Zero is a deadline that has already passed.

   It prints what sha256sum prints, in the order in which the files are finished, so that
   `treesum DIR | sha256sum -c --quiet` verifies DIR. A symbolic link given as PATH is followed; inside a tree none is,
   so that no loop of them can hold the walk. Anything but a regular file is skipped, and so are the files that this
   run itself writes.

   Exit status
     0    every file was hashed
     1    some could not be, or the output or AUDIT could not be written
     2    the command line makes no sense
     124  the total deadline passed, or a file was cut by the per-file deadline
     129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C), SIGTERM; a second signal ends the program on the spot

   AUDIT has {"path", "root", "sha256", "bytes", "seconds"} on each line: root is the PATH that the file was found
   below, seconds run from finding the file to knowing its hash. Bytes of a name that are not UTF-8 read as U+FFFD in
   path, and then "path_hex" has the exact bytes. However the run is stopped, AUDIT has one line for each hash printed,
   no more and no less. (Beyond a program's reach are a SIGKILL, or a second signal, between two system calls; and
   taking back what was written when AUDIT is a pipe.)

   How it works: the main thread walks the tree and submits each file to the pool `hashing`; a hashed file goes to the
   pool `reporting`, whose only worker writes both its lines. Both queues are short, so the walk runs just ahead of the
   hashing and memory stays the same for any tree. One context, `run.ctx`, is what a signal, the total deadline or a
   broken output cancels; all that waits or works looks at it. docs/treesum.md walks through the details.

   Build: cc -O2 -I. docs/examples/treesum.c -o treesum -pthread -lcrypto */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* POSIX and d_type also with -std=c99; has to come before the first system header */
#endif

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/evp.h>

#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"

enum {
    CHUNK = 32 * 1024, /* read, and hashed, between two looks at the context: a fraction of a millisecond */
    QUEUE = 128,       /* files that wait, in each pool */
    OPEN_LEVELS = 64,  /* directories above the current one that are kept open */
    SPARE_FDS = 16,    /* the standard three, AUDIT, what the library needs */
    MAX_JOBS = 1024,
    LAST_WORDS = 10, /* milliseconds that the summary waits, after a stop, for a stderr without room */
    STATUS_USAGE = 2,
    STATUS_DEADLINE = 124
};

/* How long a stop waits for what does not answer, such as a read from a dead network disk. Workers that do answer take
   a millisecond. Reporting gets more: it may hold one line of a pair that is half written. */
#define NOTICE CTX_MS(40)
#define REPORTING_BUDGET CTX_S(1)

typedef struct {
    int jobs;
    ctx_dur_t total;    /* 0: none; negative: passed already, as in ctx_desc_t */
    ctx_dur_t per_file; /* the same */
    const char *audit;  /* NULL: none */
    bool quiet;
    char **paths; /* ends in NULL */
} options_t;

/* Bytes that grow. After a failed allocation it stays failed, so that only the last step needs a check. */
typedef struct {
    char *at;
    size_t len, cap;
    bool failed;
} text_t;

/* Something to write to, that may be slow, stuck, full or gone. */
typedef struct {
    int fd;       /* -1: not wanted */
    bool regular; /* never makes us wait, and can be cut back */
    dev_t dev;    /* to know it again when the walk meets it */
    ino_t ino;
} sink_t;

/* What is needed to hash one file, kept from one file to the next. */
typedef struct hasher {
    struct hasher *next;
    EVP_MD_CTX *digest;
    unsigned char buffer[CHUNK];
} hasher_t;

typedef struct {
    uint64_t files, bytes; /* hashed and printed */
    uint64_t canceled;     /* accepted, but a stop came first */
    uint64_t failed;       /* files and directories that could not be read, files that were cut */
    uint64_t cut;          /* by the per-file deadline; also counted as failed */
    uint64_t unfinished;   /* accepted, and not yet one of the above */
    uint64_t bytes_read;   /* for the progress bar */
    uint64_t bytes_found;  /* for the progress bar, ... */
    bool survey_done;      /* ... which shows a share once this is set */
    bool output_failed;
} tally_t;

typedef struct {
    options_t options;
    ctx_t *signals; /* what a signal cancels */
    ctx_t *ctx;     /* its child: done when everything must stop */
    ctx_on_done_t on_stop;
    ctx_time_t started, stopped_at;
    bool walk_cut; /* [main thread] the walk ended before it had seen everything */

    ctx_pool_t *hashing, *reporting, *progress;
    size_t queue, open_levels; /* as the limit on open files allows */

    sink_t out, err, audit;
    text_t line, record; /* [reporting worker] */

    ctx_sem_t console; /* one permit: who has it writes to the terminal. A lock that a stop can end the wait for */
    bool bar_shown;    /* [console] */

    pthread_mutex_t lock;
    pthread_cond_t idle; /* no file is unfinished */
    hasher_t *hashers;   /* [lock] not in use */
    tally_t tally;       /* [lock] */
} run_t;

/* All that belongs to the request "hash this file". It travels in the file's context, as one value, from the walk
   through both pools: a task needs to be told nothing else. */
typedef struct {
    run_t *run;
    const char *root; /* the PATH that it was found below */
    const char *path; /* its name as printed */
    ctx_time_t start;
} request_t;

CTX_VALUE(request_t, request);

/* An open directory, shared by the walk and the files in the queue that are to be opened in it. Names are looked up
   from here rather than from the top: paths may be longer than the system takes, and no link can slip in. */
typedef struct {
    int fd;
    int refs; /* [run->lock] */
} dir_t;

/* A file on its way through the pools. Whoever has it owns it, up to finish(). */
typedef struct {
    ctx_t *request;
    dir_t *dir;  /* where `name` is looked up; NULL: it is a PATH. Dropped once the file is open */
    size_t name; /* where the last component starts in `path` */
    uint64_t bytes;
    double seconds;
    unsigned char hash[32];
    char path[];
} file_t;

/* How a file ended. Whoever decides on FAILED has said why; finish() only counts. */
typedef enum { HASHED, SKIPPED, CANCELED, CUT, FAILED } verdict_t; /* the first two are fine */

/* == text ========================================================= */

static bool text_reserve(text_t *text, size_t more) {
    if (text->failed) return false;
    size_t need = text->len + more;
    if (need <= text->cap) return true;
    size_t cap = need < 256 ? 256 : need * 2;
    char *at = realloc(text->at, cap);
    text->failed = at == NULL;
    if (text->failed) return false;
    text->at = at;
    text->cap = cap;
    return true;
}

static void text_put(text_t *text, const void *bytes, size_t n) {
    if (!text_reserve(text, n)) return;
    memcpy(text->at + text->len, bytes, n);
    text->len += n;
}

static void text_puts(text_t *text, const char *string) { text_put(text, string, strlen(string)); }

/* For numbers and short words; what is longer than the buffer is cut. */
__attribute__((format(printf, 2, 3))) static void text_putf(text_t *text, const char *format, ...) {
    char buffer[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    if (n > 0) text_put(text, buffer, (size_t)n < sizeof buffer ? (size_t)n : sizeof buffer - 1);
}

static void text_clear(text_t *text) {
    text->len = 0;
    text->failed = false;
}

static void text_free(text_t *text) {
    free(text->at);
    memset(text, 0, sizeof *text);
}

static void text_put_hex(text_t *text, const void *bytes, size_t n) {
    static const char digits[] = "0123456789abcdef";
    const unsigned char *byte = bytes;
    if (!text_reserve(text, 2 * n)) return;
    for (size_t i = 0; i < n; i++) {
        text->at[text->len++] = digits[byte[i] >> 4];
        text->at[text->len++] = digits[byte[i] & 15];
    }
}

/* A name as it may safely go to a terminal. */
static void text_put_visible(text_t *text, const char *name) {
    for (; *name != '\0'; name++) {
        unsigned char byte = (unsigned char)*name;
        if (byte < 0x20 || byte == 0x7f)
            text_putf(text, "\\%03o", byte);
        else
            text_put(text, name, 1);
    }
}

/* The line of sha256sum, which marks a line that has escapes by a backslash in front. */
static void text_put_sum_line(text_t *text, const unsigned char hash[32], const char *name) {
    if (strpbrk(name, "\\\n\r") != NULL) text_puts(text, "\\");
    text_put_hex(text, hash, 32);
    text_puts(text, "  ");
    for (; *name != '\0'; name++) {
        if (*name == '\\')
            text_puts(text, "\\\\");
        else if (*name == '\n')
            text_puts(text, "\\n");
        else if (*name == '\r')
            text_puts(text, "\\r");
        else
            text_put(text, name, 1);
    }
    text_puts(text, "\n");
}

/* How many bytes the character at `s` has in well-formed UTF-8 (Unicode, table 3-7), or 0. The final NUL of a string
   is no continuation byte, so this never reads past it. */
static size_t utf8_length(const unsigned char *s) {
    unsigned char low = 0x80, high = 0xbf; /* what the second byte may be */
    size_t n;
    if (s[0] < 0x80) return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf)
        n = 2;
    else if (s[0] >= 0xe0 && s[0] <= 0xef)
        n = 3;
    else if (s[0] >= 0xf0 && s[0] <= 0xf4)
        n = 4;
    else
        return 0;
    if (s[0] == 0xe0) low = 0xa0;
    if (s[0] == 0xed) high = 0x9f;
    if (s[0] == 0xf0) low = 0x90;
    if (s[0] == 0xf4) high = 0x8f;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    return n;
}

/* A JSON string. False if some bytes were not UTF-8 and became U+FFFD. */
static bool text_put_json(text_t *text, const char *string) {
    bool exact = true;
    text_puts(text, "\"");
    while (*string != '\0') {
        size_t n = utf8_length((const unsigned char *)string);
        unsigned char byte = (unsigned char)*string;
        if (n == 0)
            text_puts(text, "\\ufffd");
        else if (byte == '"' || byte == '\\')
            text_putf(text, "\\%c", byte);
        else if (byte < 0x20)
            text_putf(text, "\\u%04x", byte);
        else
            text_put(text, string, n);
        if (n == 0) exact = false;
        string += n != 0 ? n : 1;
    }
    text_puts(text, "\"");
    return exact;
}

static void text_put_record(text_t *text, const request_t *request, const file_t *file) {
    text_puts(text, "{\"path\":");
    bool exact = text_put_json(text, request->path);
    text_puts(text, ",\"root\":");
    text_put_json(text, request->root);
    text_puts(text, ",\"sha256\":\"");
    text_put_hex(text, file->hash, sizeof file->hash);
    text_putf(text, "\",\"bytes\":%llu,\"seconds\":%.6f", (unsigned long long)file->bytes, file->seconds);
    if (!exact) {
        text_puts(text, ",\"path_hex\":\"");
        text_put_hex(text, request->path, strlen(request->path));
        text_puts(text, "\"");
    }
    text_puts(text, "}\n");
}

/* == output ======================================================= */

static bool stopped(const run_t *run) { return ctx_err(run->ctx) != 0; }

/* A descriptor like `fd`, for a pipe or terminal, that never makes us wait in write(). O_NONBLOCK cannot be set on `fd`
   itself, since other programs have the same one; opening it again makes one of our own. -1 where that is not possible:
   then sink_write() does what it can with poll(). */
static int open_again(int fd) {
    char name[32];
    if ((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) return -1;
    (void)snprintf(name, sizeof name, "/dev/fd/%d", fd);
    return open(name, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

static void sink_init(sink_t *sink, int fd) {
    struct stat info;
    memset(sink, 0, sizeof *sink);
    sink->fd = fd;
    if (fstat(fd, &info) != 0) return;
    sink->regular = S_ISREG(info.st_mode);
    sink->dev = info.st_dev;
    sink->ino = info.st_ino;
    int own = S_ISFIFO(info.st_mode) || isatty(fd) ? open_again(fd) : -1;
    if (own >= 0) sink->fd = own;
}

static bool sink_is(const sink_t *sink, const struct stat *info) {
    return sink->regular && sink->dev == info->st_dev && sink->ino == info->st_ino;
}

static bool sink_ready(const sink_t *sink, int milliseconds) {
    struct pollfd room = {.fd = sink->fd, .events = POLLOUT};
    return poll(&room, 1, milliseconds) > 0;
}

/* Wait until `sink` takes some bytes, or has an error to tell. 0, or CTX_CANCELED if there was no room when the run was
   stopped. The other end may be a pipe that nobody reads: the context's descriptor is what wakes us then. */
static int sink_wait(const run_t *run, const sink_t *sink) {
    if (sink->regular) return 0;
    struct pollfd wait[2] = {{.fd = sink->fd, .events = POLLOUT}, {.fd = ctx_done_fd(run->ctx), .events = POLLIN}};
    while (!stopped(run)) {
        if (poll(wait, 2, -1) < 0 && errno != EINTR) return -errno;
        if (wait[0].revents != 0) return 0;
    }
    return sink_ready(sink, 0) ? 0 : CTX_CANCELED;
}

/* Remove the last `n` bytes written, where that can be done: in a file that nobody else has added to since. */
static void sink_take_back(const sink_t *sink, size_t n) {
    struct stat info;
    if (!sink->regular || n == 0) return;
    off_t end = lseek(sink->fd, 0, SEEK_CUR);
    if (end < (off_t)n || fstat(sink->fd, &info) != 0 || info.st_size != end) return;
    if (ftruncate(sink->fd, end - (off_t)n) == 0) (void)lseek(sink->fd, end - (off_t)n, SEEK_SET);
}

/* Write all or, if that can be helped, nothing. 0, CTX_CANCELED when stopped while there was no room, or the system's
   error. A pipe takes PIPE_BUF bytes in one piece and, once poll() has seen room, without blocking; so only a longer
   line can be torn, by a stop while nobody reads. */
static int sink_write(const run_t *run, const sink_t *sink, const text_t *text) {
    size_t done = 0;
    int rc = text->failed ? CTX_NO_MEMORY : 0;
    while (rc == 0 && done < text->len) {
        rc = sink_wait(run, sink);
        if (rc != 0) break;
        size_t n = text->len - done < PIPE_BUF ? text->len - done : PIPE_BUF;
        ssize_t put = write(sink->fd, text->at + done, n);
        if (put >= 0)
            done += (size_t)put;
        else if (errno == EAGAIN) /* poll() saw room, but not enough, or for others: no reason to spin */
            rc = ctx_sleep(run->ctx, CTX_MS(1)) != 0 ? CTX_CANCELED : 0;
        else if (errno != EINTR)
            rc = -errno;
    }
    if (rc != 0) sink_take_back(sink, done);
    return rc;
}

/* Take the terminal, without the bar. False if a stop came while another thread had it: then go on without, for a
   thread that cannot finish its write must not hold up the end. */
static bool console_enter(run_t *run) {
    if (ctx_sem_acquire(&run->console, run->ctx, 1) != 0 && !ctx_sem_try_acquire(&run->console, 1)) return false;
    if (run->bar_shown) {
        text_t erase = {.at = "\r\033[K", .len = 4};
        (void)sink_write(run, &run->err, &erase);
        run->bar_shown = false;
    }
    return true;
}

static void console_leave(run_t *run, bool entered) {
    if (entered) ctx_sem_release(&run->console, 1);
}

/* Say one line on stderr. It ends the text. When even that fails there is nobody left to tell. */
static void say_text(run_t *run, text_t *text) {
    text_puts(text, "\n");
    bool entered = console_enter(run);
    (void)sink_write(run, &run->err, text);
    console_leave(run, entered);
    text_free(text);
}

static void say(run_t *run, const char *path, const char *what) {
    text_t text = {0};
    text_puts(&text, "treesum: ");
    if (path != NULL) {
        text_put_visible(&text, *path != '\0' ? path : "''");
        text_puts(&text, ": ");
    }
    text_puts(&text, what);
    say_text(run, &text);
}

static verdict_t fail(run_t *run, const char *path, const char *why) {
    say(run, path, why);
    return FAILED;
}

static verdict_t skip(run_t *run, const char *path, const char *why) {
    say(run, path, why);
    return SKIPPED;
}

/* == files ======================================================== */

static void dir_retain(run_t *run, dir_t *dir) {
    pthread_mutex_lock(&run->lock);
    dir->refs++;
    pthread_mutex_unlock(&run->lock);
}

static void dir_release(run_t *run, dir_t *dir) {
    if (dir == NULL) return;
    pthread_mutex_lock(&run->lock);
    bool last = --dir->refs == 0;
    pthread_mutex_unlock(&run->lock);
    if (!last) return;
    close(dir->fd);
    free(dir);
}

static file_t *file_new(const char *path, size_t name) {
    size_t n = strlen(path) + 1;
    file_t *file = malloc(sizeof *file + n);
    if (file == NULL) return NULL;
    memset(file, 0, sizeof *file);
    memcpy(file->path, path, n);
    file->name = name;
    return file;
}

/* The one place where a file ends, whichever way. */
static void finish(run_t *run, file_t *file, verdict_t verdict) {
    dir_release(run, file->dir);
    pthread_mutex_lock(&run->lock);
    tally_t *tally = &run->tally;
    switch (verdict) {
        case HASHED: tally->files++, tally->bytes += file->bytes; break;
        case SKIPPED: break;
        case CANCELED: tally->canceled++; break;
        case CUT: tally->cut++, tally->failed++; break;
        case FAILED: tally->failed++; break;
    }
    if (--tally->unfinished == 0) pthread_cond_broadcast(&run->idle);
    pthread_mutex_unlock(&run->lock);
    ctx_release(file->request);
    free(file);
}

/* A pool did not take a file, or not run it: because of a stop, as a rule. */
static void finish_refused(run_t *run, file_t *file, int reason) {
    finish(run, file, stopped(run) ? CANCELED : fail(run, file->path, strerror(-reason)));
}

static void drop_file(const char *op, void *arg, int reason, void *user) {
    (void)op;
    finish_refused(user, arg, reason);
}

/* Hand a file over to the next pool, waiting for room until the run is stopped. The file's context bounds the wait and
   gives the task its values. Once accepted the file is no longer ours: its task may have finished it, with its
   reference to that context, before the submit is back. */
static void hand_over(run_t *run, ctx_pool_t *pool, const char *op, ctx_task_fn task, file_t *file) {
    ctx_t *request = ctx_retain(file->request);
    int rc = ctx_pool_submit_wait(pool, request, op, task, file);
    if (rc != 0) finish_refused(run, file, rc);
    ctx_release(request);
}

/* == hashing ====================================================== */

static void hasher_free(hasher_t *hasher) {
    EVP_MD_CTX_free(hasher->digest);
    free(hasher);
}

static hasher_t *hasher_new(void) {
    hasher_t *hasher = malloc(sizeof *hasher);
    if (hasher == NULL) return NULL;
    hasher->next = NULL;
    hasher->digest = EVP_MD_CTX_new();
    /* Finding the algorithm takes longer than hashing a small file: it is done here, once. */
    if (hasher->digest != NULL && EVP_DigestInit_ex(hasher->digest, EVP_sha256(), NULL) == 1) return hasher;
    hasher_free(hasher);
    return NULL;
}

static hasher_t *hasher_take(run_t *run) {
    pthread_mutex_lock(&run->lock);
    hasher_t *hasher = run->hashers;
    if (hasher != NULL) run->hashers = hasher->next;
    pthread_mutex_unlock(&run->lock);
    return hasher != NULL ? hasher : hasher_new();
}

static void hasher_give_back(run_t *run, hasher_t *hasher) {
    pthread_mutex_lock(&run->lock);
    hasher->next = run->hashers;
    run->hashers = hasher;
    pthread_mutex_unlock(&run->lock);
}

/* The file's context is done. If the whole run is, nothing more need be said; else it was the file's own deadline. */
static verdict_t give_up(run_t *run, const char *path) {
    if (stopped(run)) return CANCELED;
    text_t text = {0};
    text_puts(&text, "treesum: ");
    text_put_visible(&text, path);
    text_putf(&text, ": cut: it took longer than the %g s of -T",
              (double)(run->options.per_file > 0 ? run->options.per_file : 0) / 1e9);
    say_text(run, &text);
    return CUT;
}

static const char *not_regular(mode_t mode) {
    switch (mode & S_IFMT) {
        case S_IFIFO: return "skipped: it is a FIFO";
        case S_IFSOCK: return "skipped: it is a socket";
        case S_IFCHR: return "skipped: it is a character device";
        case S_IFBLK: return "skipped: it is a block device";
        default: return "skipped: it is not a regular file";
    }
}

/* Open a file found by the walk. Between the walk and here it may have vanished or become anything else: O_NONBLOCK
   keeps a FIFO from holding us, O_NOFOLLOW keeps us in the tree. */
static verdict_t open_file(run_t *run, file_t *file, int *fd) {
    int flags = O_RDONLY | O_NONBLOCK | O_CLOEXEC | (file->dir != NULL ? O_NOFOLLOW : 0);
    struct stat info;
    *fd = openat(file->dir != NULL ? file->dir->fd : AT_FDCWD, file->path + file->name, flags);
    if (*fd < 0) return fail(run, file->path, strerror(errno));
    dir_release(run, file->dir);
    file->dir = NULL;

    verdict_t verdict = HASHED;
    if (fstat(*fd, &info) != 0)
        verdict = fail(run, file->path, strerror(errno));
    else if (!S_ISREG(info.st_mode))
        verdict = skip(run, file->path, not_regular(info.st_mode));
    else if (sink_is(&run->out, &info) || sink_is(&run->audit, &info))
        verdict = skip(run, file->path, "skipped: this run is writing it");
#ifdef POSIX_FADV_SEQUENTIAL
    else if (info.st_size > CHUNK)
        (void)posix_fadvise(*fd, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
    if (verdict != HASHED) close(*fd);
    return verdict;
}

static void count_read(run_t *run, size_t n) {
    if (run->progress == NULL) return;
    pthread_mutex_lock(&run->lock);
    run->tally.bytes_read += n;
    pthread_mutex_unlock(&run->lock);
}

/* Hash what `fd` has, looking at the context between chunks: this loop is where every stop is noticed. */
static verdict_t hash_fd(run_t *run, ctx_t *ctx, file_t *file, int fd, hasher_t *hasher) {
    if (EVP_DigestInit_ex(hasher->digest, NULL, NULL) != 1) return fail(run, file->path, "libcrypto failed");
    for (;;) {
        if (ctx_err(ctx) != 0) return give_up(run, file->path);
        ssize_t got = read(fd, hasher->buffer, CHUNK);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(run, file->path, strerror(errno));
        if (got == 0) break;
        if (EVP_DigestUpdate(hasher->digest, hasher->buffer, (size_t)got) != 1)
            return fail(run, file->path, "libcrypto failed");
        file->bytes += (uint64_t)got;
        count_read(run, (size_t)got);
    }
    if (EVP_DigestFinal_ex(hasher->digest, file->hash, NULL) != 1) return fail(run, file->path, "libcrypto failed");
    return HASHED;
}

static verdict_t hash_file(run_t *run, ctx_t *ctx, file_t *file) {
    int fd;
    if (ctx_err(ctx) != 0 || run->options.per_file < 0) return give_up(run, file->path);
    verdict_t verdict = open_file(run, file, &fd);
    if (verdict != HASHED) return verdict;
    hasher_t *hasher = hasher_take(run);
    if (hasher == NULL) {
        verdict = fail(run, file->path, strerror(ENOMEM));
    } else {
        verdict = hash_fd(run, ctx, file, fd, hasher);
        hasher_give_back(run, hasher);
    }
    close(fd);
    return verdict;
}

/* == reporting ==================================================== */

/* The output is broken: nothing that the run could still do is of use. Said once, since one worker reports. */
static verdict_t output_fails(run_t *run, const char *name, int rc) {
    pthread_mutex_lock(&run->lock);
    run->tally.output_failed = true;
    pthread_mutex_unlock(&run->lock);
    verdict_t verdict = fail(run, name, strerror(-rc)); /* first: after the stop a message waits for nobody */
    ctx_cancel_cause(run->ctx, CTX_CANCELED, "the output failed");
    return verdict;
}

/* With a bar on the same terminal, the hash must not land in the middle of it. */
static int print_line(run_t *run) {
    bool shared = run->progress != NULL && isatty(run->out.fd);
    bool entered = shared && console_enter(run);
    int rc = sink_write(run, &run->out, &run->line);
    console_leave(run, entered);
    return rc;
}

/* Write the pair of lines for one file, or neither. The audit line goes first because it is the one that can be taken
   back. Waiting for room in the output comes before, so that a stop usually falls there, when nothing is written. */
static verdict_t report_file(run_t *run, const request_t *request, const file_t *file) {
    if (run->tally.output_failed) return CANCELED; /* written by this worker alone: no lock to read it here */
    text_clear(&run->line);
    text_clear(&run->record);
    text_put_sum_line(&run->line, file->hash, request->path);
    if (run->audit.fd >= 0) text_put_record(&run->record, request, file);
    if (run->line.failed || run->record.failed) return fail(run, request->path, strerror(ENOMEM));

    int rc = sink_wait(run, &run->out);
    if (rc == CTX_CANCELED) return CANCELED;
    rc = sink_write(run, &run->audit, &run->record);
    if (rc == CTX_CANCELED) return CANCELED;
    if (rc != 0) return output_fails(run, run->options.audit, rc);
    rc = print_line(run);
    if (rc == 0) return HASHED;
    sink_take_back(&run->audit, run->record.len);
    return rc == CTX_CANCELED ? CANCELED : output_fails(run, "standard output", rc);
}

/* Detached: it has the values of the request, but neither its cancellation nor its deadline. */
static int report_task(ctx_t *ctx, void *arg) {
    const request_t *request = request_from(ctx);
    verdict_t verdict = report_file(request->run, request, arg);
    finish(request->run, arg, verdict);
    return verdict == HASHED ? 0 : CTX_CANCELED;
}

/* Handing over waits on the request's context and not on the task's own: that one has the deadline of -T, which is for
   the file and not for whoever reads our output. */
static int hash_task(ctx_t *ctx, void *arg) {
    file_t *file = arg;
    const request_t *request = request_from(ctx);
    run_t *run = request->run;
    verdict_t verdict = hash_file(run, ctx, file);
    file->seconds = (double)(ctx_now() - request->start) / 1e9;
    if (verdict == HASHED)
        hand_over(run, run->reporting, "report", report_task, file);
    else
        finish(run, file, verdict);
    return verdict <= SKIPPED ? 0 : CTX_CANCELED;
}

/* == walking ====================================================== */

/* One directory on the way from PATH to where the walk is. */
typedef struct {
    dir_t *dir; /* NULL: closed for now, see walk_reopen() */
    dev_t dev;
    ino_t ino;
    size_t path_len; /* of walk->path, for this directory */
    size_t names;    /* where its names start in walk->names */
} level_t;

/* A depth-first walk without recursion. Files are handed on as they are met; only the names of subdirectories are kept,
   one after the other, each with its NUL, and taken from the end. */
typedef struct {
    run_t *run;
    ctx_t *ctx;
    bool survey; /* only add up sizes, for the progress bar */
    const char *root;
    text_t path;
    text_t names;
    level_t *levels;
    size_t depth, cap;
} walk_t;

/* Complaints are for the walk that counts: the survey stays silent. */
static void walk_fails(walk_t *walk, const char *path, const char *why) {
    if (walk->survey) return;
    pthread_mutex_lock(&walk->run->lock);
    walk->run->tally.failed++;
    pthread_mutex_unlock(&walk->run->lock);
    say(walk->run, path, why);
}

static void walk_skips(walk_t *walk, const char *why) {
    if (!walk->survey) say(walk->run, walk->path.at, why);
}

/* Make walk->path the name of an entry of the current directory. False when memory is short. */
static bool walk_path_enter(walk_t *walk, const char *name) {
    walk->path.failed = false;
    walk->path.len = walk->levels[walk->depth - 1].path_len;
    if (walk->path.at[walk->path.len - 1] != '/') text_puts(&walk->path, "/");
    text_put(&walk->path, name, strlen(name) + 1);
    if (!walk->path.failed) walk->path.len--; /* the NUL is not part of it */
    return !walk->path.failed;
}

/* Make walk->path the name of the current directory. It has been longer, so there is room for the NUL. */
static const char *walk_path(walk_t *walk) {
    walk->path.len = walk->levels[walk->depth - 1].path_len;
    walk->path.at[walk->path.len] = '\0';
    return walk->path.at;
}

static void walk_add_size(walk_t *walk, const struct stat *info) {
    pthread_mutex_lock(&walk->run->lock);
    walk->run->tally.bytes_found += (uint64_t)info->st_size;
    pthread_mutex_unlock(&walk->run->lock);
}

/* Send a file on its way. The wait for room in the queue is what keeps the walk from running ahead. */
static void walk_submit(walk_t *walk, dir_t *dir, size_t name) {
    run_t *run = walk->run;
    file_t *file = file_new(walk->path.at, name);
    if (file == NULL) {
        walk_fails(walk, walk->path.at, strerror(ENOMEM));
        return;
    }
    request_t request = {.run = run, .root = walk->root, .path = file->path, .start = ctx_now()};
    file->request = ctx_with_request(run->ctx, &request);
    file->dir = dir;
    if (dir != NULL) dir_retain(run, dir);
    pthread_mutex_lock(&run->lock);
    run->tally.unfinished++;
    pthread_mutex_unlock(&run->lock);

    /* Without memory the context was born failed, and has no values. */
    if (ctx_err(file->request) != 0)
        finish_refused(run, file, ctx_err(file->request));
    else
        hand_over(run, run->hashing, "hash", hash_task, file);
}

/* A link is not followed. Worth a word when it leads to a directory, whose files one may miss or whose link one may
   fear, or nowhere but back to itself. */
static void walk_link(walk_t *walk, dir_t *dir, const char *name) {
    struct stat info;
    if (fstatat(dir->fd, name, &info, 0) == 0) {
        if (S_ISDIR(info.st_mode) && !walk->run->options.quiet)
            walk_skips(walk, "skipped: it is a symbolic link to a directory");
    } else if (errno == ELOOP) {
        walk_skips(walk, "skipped: it is a loop of symbolic links");
    }
}

static void walk_entry(walk_t *walk, dir_t *dir, const struct dirent *entry) {
    struct stat info;
    mode_t mode = (mode_t)DTTOIF((unsigned)entry->d_type);
    if (!walk_path_enter(walk, entry->d_name)) {
        walk_fails(walk, walk->root, strerror(ENOMEM));
        return;
    }
    if (entry->d_type == DT_UNKNOWN || (walk->survey && S_ISREG(mode))) {
        if (fstatat(dir->fd, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0) {
            walk_fails(walk, walk->path.at, strerror(errno));
            return;
        }
        mode = info.st_mode;
    }
    if (S_ISDIR(mode))
        text_put(&walk->names, entry->d_name, strlen(entry->d_name) + 1);
    else if (S_ISLNK(mode))
        walk_link(walk, dir, entry->d_name);
    else if (!S_ISREG(mode))
        walk_skips(walk, not_regular(mode));
    else if (walk->survey)
        walk_add_size(walk, &info);
    else
        walk_submit(walk, dir, walk->path.len - strlen(entry->d_name));
}

/* The next name in a directory. NULL at its end with errno 0, or when it cannot be read on. */
static const struct dirent *next_entry(DIR *stream) {
    const struct dirent *entry;
    do {
        errno = 0;
        entry = readdir(stream);
    } while (entry != NULL && (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0));
    return entry;
}

/* Read the current directory from end to end, unless stopped. The stream has a descriptor of its own, to be closed
   here, while `dir` stays open for the files that wait to be opened in it. */
static void walk_scan(walk_t *walk) {
    dir_t *dir = walk->levels[walk->depth - 1].dir;
    int fd = fcntl(dir->fd, F_DUPFD_CLOEXEC, 0);
    DIR *stream = fd >= 0 ? fdopendir(fd) : NULL;
    if (stream == NULL) {
        walk_fails(walk, walk->path.at, strerror(errno));
        if (fd >= 0) close(fd);
        return;
    }
    const struct dirent *entry = next_entry(stream);
    while (entry != NULL && ctx_err(walk->ctx) == 0) {
        walk_entry(walk, dir, entry);
        entry = next_entry(stream);
    }
    int failed = entry == NULL ? errno : 0;
    if (walk->names.failed) failed = ENOMEM; /* some subdirectories are forgotten; the others can still be walked */
    walk->names.failed = false;
    if (failed != 0) walk_fails(walk, walk_path(walk), strerror(failed));
    closedir(stream);
}

/* Open a directory as the new deepest level. 0 or the system's error. */
static int walk_push(walk_t *walk, int at, const char *name, int flags, const level_t *known) {
    struct stat info;
    if (walk->depth == walk->cap) {
        size_t cap = walk->cap != 0 ? walk->cap * 2 : 32;
        level_t *levels = realloc(walk->levels, cap * sizeof *levels);
        if (levels == NULL) return ENOMEM;
        walk->levels = levels;
        walk->cap = cap;
    }
    dir_t *dir = malloc(sizeof *dir);
    if (dir == NULL) return ENOMEM;
    dir->refs = 1;
    dir->fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags);
    if (dir->fd >= 0 && fstat(dir->fd, &info) == 0) {
        level_t level = {
            .dir = dir, .dev = info.st_dev, .ino = info.st_ino, .path_len = walk->path.len, .names = walk->names.len};
        if (known == NULL || (known->dev == level.dev && known->ino == level.ino)) {
            walk->levels[walk->depth++] = known == NULL ? level : *known;
            walk->levels[walk->depth - 1].dir = dir;
            return 0;
        }
        errno = ESTALE;
    }
    int failed = errno;
    if (dir->fd >= 0) close(dir->fd);
    free(dir);
    return failed;
}

/* Go down. Only the nearest levels stay open, or a deep tree would use up the descriptors. */
static void walk_enter(walk_t *walk, int at, const char *name, int flags) {
    int failed = walk_push(walk, at, name, flags, NULL);
    if (failed != 0) {
        walk_fails(walk, walk->path.at, strerror(failed));
        return;
    }
    if (walk->depth > walk->run->open_levels) {
        level_t *far = &walk->levels[walk->depth - 1 - walk->run->open_levels];
        dir_release(walk->run, far->dir);
        far->dir = NULL;
    }
    walk_scan(walk);
}

/* Come back to a level that was closed: its way is up from the one below, if it still leads to the same directory. */
static void walk_reopen(walk_t *walk, dir_t *below) {
    level_t level = walk->levels[--walk->depth];
    int failed = below != NULL ? walk_push(walk, below->fd, "..", 0, &level) : ESTALE;
    if (failed == 0) return;
    walk->depth++;
    if (walk->names.len == level.names) return; /* nothing left to do here */
    walk_fails(walk, walk_path(walk), failed == ESTALE ? "moved while it was being walked" : strerror(failed));
    walk->names.len = level.names;
}

/* Go up. */
static void walk_leave(walk_t *walk) {
    dir_t *left = walk->levels[--walk->depth].dir;
    if (walk->depth > 0 && walk->levels[walk->depth - 1].dir == NULL) walk_reopen(walk, left);
    dir_release(walk->run, left);
}

/* Go down into the last subdirectory that is pending, or up if there is none. */
static void walk_step(walk_t *walk) {
    const level_t *level = &walk->levels[walk->depth - 1];
    if (walk->names.len == level->names) {
        walk_leave(walk);
        return;
    }
    size_t at = walk->names.len - 1;
    while (at > level->names && walk->names.at[at - 1] != '\0') at--;
    walk->names.len = at; /* the bytes stay in place until walk_scan() adds the next name */
    if (walk_path_enter(walk, walk->names.at + at))
        walk_enter(walk, level->dir->fd, walk->path.at + walk->path.len - strlen(walk->names.at + at), O_NOFOLLOW);
    else
        walk_fails(walk, walk->root, strerror(ENOMEM));
}

static void walk_tree(walk_t *walk) {
    walk_enter(walk, AT_FDCWD, walk->root, 0);
    while (walk->depth > 0 && ctx_err(walk->ctx) == 0) walk_step(walk);
    while (walk->depth > 0) dir_release(walk->run, walk->levels[--walk->depth].dir);
}

static void walk_root(walk_t *walk, const char *root) {
    struct stat info;
    walk->root = root;
    text_clear(&walk->path);
    text_clear(&walk->names);
    text_put(&walk->path, root, strlen(root) + 1);
    if (walk->path.failed) {
        walk_fails(walk, root, strerror(ENOMEM));
        return;
    }
    walk->path.len--;
    if (stat(root, &info) != 0)
        walk_fails(walk, root, strerror(errno));
    else if (S_ISDIR(info.st_mode))
        walk_tree(walk);
    else if (!S_ISREG(info.st_mode))
        walk_fails(walk, root, "neither a regular file nor a directory");
    else if (walk->survey)
        walk_add_size(walk, &info);
    else
        walk_submit(walk, NULL, 0);
}

/* Walk every PATH, as long as `ctx` lets us. True if all was seen. */
static bool walk_all(run_t *run, ctx_t *ctx, bool survey) {
    walk_t walk = {.run = run, .ctx = ctx, .survey = survey};
    for (char **path = run->options.paths; *path != NULL && ctx_err(ctx) == 0; path++) walk_root(&walk, *path);
    text_free(&walk.path);
    text_free(&walk.names);
    free(walk.levels);
    return ctx_err(ctx) == 0;
}

/* == progress ===================================================== */

/* A second walk, which only adds up sizes and so is soon done, says what the whole is. */
static int survey_task(ctx_t *ctx, void *arg) {
    run_t *run = arg;
    bool all = walk_all(run, ctx, true);
    pthread_mutex_lock(&run->lock);
    run->tally.survey_done = all;
    pthread_mutex_unlock(&run->lock);
    return 0;
}

/* Not drawn while the terminal takes nothing: unlike a message it can be left out. */
static void draw_bar(run_t *run) {
    enum { WIDTH = 30 };
    if (!sink_ready(&run->err, 0)) return;
    pthread_mutex_lock(&run->lock);
    tally_t now = run->tally;
    pthread_mutex_unlock(&run->lock);
    double share = now.survey_done && now.bytes_found > 0 ? (double)now.bytes_read / (double)now.bytes_found : 0;
    if (share > 1) share = 1; /* files may grow */
    int full = (int)(share * WIDTH);

    text_t text = {0};
    text_puts(&text, "[");
    for (int i = 0; i < WIDTH; i++) text_puts(&text, i < full ? "#" : "-");
    if (now.survey_done)
        text_putf(&text, "] %3d %%", (int)(share * 100));
    else
        text_puts(&text, "]   ? %");
    text_putf(&text, "  %llu files  %.1f MB", (unsigned long long)now.files, (double)now.bytes_read / 1e6);

    bool entered = console_enter(run);
    if (entered && sink_write(run, &run->err, &text) == 0) run->bar_shown = true;
    console_leave(run, entered);
    text_free(&text);
}

static int draw_task(ctx_t *ctx, void *arg) {
    while (ctx_sleep(ctx, CTX_MS(100)) == 0) draw_bar(arg);
    return 0;
}

/* A run without its bar is still a run, so nothing here is an error. */
static void progress_start(run_t *run) {
    if (run->options.quiet || !isatty(run->err.fd)) return;
    run->progress = ctx_pool_new(run->ctx, &(ctx_pool_desc_t){.name = "progress", .workers = 2, .grace = NOTICE});
    if (run->progress == NULL) return;
    if (ctx_pool_submit(run->progress, run->ctx, "survey", survey_task, run) != 0 ||
        ctx_pool_submit(run->progress, run->ctx, "draw", draw_task, run) != 0) {
        ctx_pool_free(run->progress);
        run->progress = NULL;
    }
}

/* == the run ====================================================== */

static void note_stop(void *arg) { ((run_t *)arg)->stopped_at = ctx_now(); }

/* How many files may wait and how many directories stay open, within the limit on open descriptors: each worker has
   one, each file that waits may hold a directory. False if there are too few for even that. */
static bool fit_open_files(run_t *run) {
    struct rlimit limit;
    rlim_t jobs = (rlim_t)run->options.jobs, want = SPARE_FDS + 2 * jobs + QUEUE + 3 * OPEN_LEVELS;
    run->queue = QUEUE;
    run->open_levels = OPEN_LEVELS;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= want) return true;
    limit.rlim_cur = limit.rlim_max < want ? limit.rlim_max : want;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0 && getrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
    if (limit.rlim_cur >= want) return true;
    if (limit.rlim_cur < SPARE_FDS + 2 * jobs + 8) return false;
    rlim_t spare = limit.rlim_cur - SPARE_FDS - 2 * jobs;
    run->queue = (size_t)(spare / 4);
    run->open_levels = (size_t)(spare / 8);
    return true;
}

/* Hold the places of the standard three, so that nothing we open gets one of their numbers. False if the output was
   closed. */
static bool start_outputs(run_t *run) {
    bool out_open = fcntl(STDOUT_FILENO, F_GETFD) >= 0;
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0) (void)!open("/dev/null", O_RDWR);
    sink_init(&run->out, STDOUT_FILENO);
    sink_init(&run->err, STDERR_FILENO);
    return out_open;
}

/* Emptied only once it is known not to be our own output. O_NONBLOCK: a FIFO without a reader is an error, no wait. */
static bool open_audit(run_t *run) {
    const char *path = run->options.audit;
    struct stat out;
    run->audit.fd = -1;
    if (path == NULL) return true;
    int fd = open(path, O_WRONLY | O_CREAT | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0666);
    if (fd < 0) {
        say(run, path, errno == ENXIO ? "nobody reads this FIFO" : strerror(errno));
        return false;
    }
    sink_init(&run->audit, fd);
    if (run->audit.fd != fd) close(fd);
    if (fstat(STDOUT_FILENO, &out) == 0 && (S_ISREG(out.st_mode) || S_ISFIFO(out.st_mode)) &&
        out.st_dev == run->audit.dev && out.st_ino == run->audit.ino) {
        say(run, path, "it is also the standard output");
        return false;
    }
    if (!run->audit.regular || ftruncate(run->audit.fd, 0) == 0) return true;
    say(run, path, strerror(errno));
    return false;
}

/* Everything that may stop the run comes together in run->ctx: a signal from above it, its own deadline, and
   output_fails() by hand. */
static bool start_context(run_t *run) {
    int signals[3] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction hup;
    bool nohup = sigaction(SIGHUP, NULL, &hup) == 0 && hup.sa_handler == SIG_IGN;
    signal(SIGPIPE, SIG_IGN); /* a closed pipe and a file that may not grow are errors of write(), with a message */
    signal(SIGXFSZ, SIG_IGN);
    run->signals = ctx_notify_signals(ctx_background(), signals, nohup ? 2 : 3);
    run->ctx = ctx_derive(
        run->signals,
        &(ctx_desc_t){.name = "treesum", .deadline_cause = "the total deadline passed", .timeout = run->options.total});
    (void)ctx_on_done(&run->on_stop, run->ctx, note_stop, run);
    int err = ctx_err(run->ctx);
    return ctx_sem_init(&run->console, 1) == 0 && (err == 0 || err == CTX_DEADLINE_EXCEEDED || err == CTX_CANCELED);
}

static bool start_pools(run_t *run) {
    ctx_dur_t per_file = run->options.per_file > 0 ? run->options.per_file : 0;
    if (ctx_done_fd(run->ctx) < 0) return false;
    run->hashing = ctx_pool_new(run->ctx, &(ctx_pool_desc_t){.name = "hashing",
                                                             .workers = run->options.jobs,
                                                             .queue = run->queue,
                                                             .task_timeout = per_file,
                                                             .on_drop = drop_file,
                                                             .user = run,
                                                             .grace = NOTICE});
    /* Below the background, not below the run: what was accepted is written also after a stop. */
    run->reporting = ctx_pool_new(
        ctx_background(),
        &(ctx_pool_desc_t){.name = "reporting", .workers = 1, .queue = run->queue, .on_drop = drop_file, .user = run});
    return run->hashing != NULL && run->reporting != NULL;
}

static bool run_start(run_t *run) {
    run->started = ctx_now();
    pthread_mutex_init(&run->lock, NULL);
    pthread_cond_init(&run->idle, NULL);
    run->audit.fd = -1;
    bool out_open = start_outputs(run);
    if (!start_context(run))
        say(run, NULL, "cannot start: out of memory or threads");
    else if (!out_open)
        say(run, "standard output", "it is closed");
    else if (!fit_open_files(run))
        say(run, NULL, "the limit on open files is too low for so many jobs: see ulimit -n");
    else if (!start_pools(run))
        say(run, NULL, "cannot start: out of memory or descriptors");
    else
        return open_audit(run);
    return false;
}

/* Wait until every file has come to its end or the run is stopped. */
static void run_wait(run_t *run) {
    pthread_mutex_lock(&run->lock);
    int err = 0;
    while (err == 0 && run->tally.unfinished > 0) err = ctx_cond_wait(run->ctx, &run->idle, &run->lock);
    pthread_mutex_unlock(&run->lock);
}

/* Bring the pools to their end: at once and with all the time they want when nothing is left, on a budget after a
   stop. The number of workers that did not come back in time. */
static uint64_t run_drain(run_t *run) {
    ctx_dur_t patience = stopped(run) ? 0 : CTX_FOREVER;
    ctx_drain_report_t hashing, reporting, progress = {0};
    if (run->progress != NULL) (void)ctx_pool_drain(run->progress, 0, &progress);
    (void)ctx_pool_drain(run->hashing, patience, &hashing);
    (void)ctx_pool_drain(run->reporting, stopped(run) ? REPORTING_BUDGET : patience, &reporting);
    return hashing.stuck + reporting.stuck + progress.stuck;
}

/* A stop that came after the last file has stopped nothing. */
static bool was_cut_short(const run_t *run, const tally_t *tally) {
    return stopped(run) && (run->walk_cut || tally->canceled > 0 || tally->output_failed);
}

static int exit_status(const run_t *run, const tally_t *tally) {
    if (was_cut_short(run, tally)) {
        ctx_cause_t cause = ctx_cause(run->ctx);
        if (cause.code > 0) return 128 + cause.code; /* a signal's number; errors are negative */
        return cause.code == CTX_DEADLINE_EXCEEDED ? STATUS_DEADLINE : 1;
    }
    if (tally->cut > 0) return STATUS_DEADLINE;
    return tally->failed > 0 || tally->output_failed ? 1 : 0;
}

static void summarise(run_t *run, const tally_t *tally, uint64_t stuck, ctx_time_t ended) {
    text_t text = {0};
    bool cut_short = was_cut_short(run, tally);
    if (stopped(run)) (void)sink_ready(&run->err, LAST_WORDS);
    if (cut_short) {
        text_puts(&text, "treesum: stopped: ");
        text_puts(&text, ctx_cause(run->ctx).what);
        say_text(run, &text);
    }
    if (run->options.quiet) return;
    text_putf(&text, "treesum: %llu files, %llu bytes, %llu canceled, %llu failed, time to notice ",
              (unsigned long long)tally->files, (unsigned long long)tally->bytes, (unsigned long long)tally->canceled,
              (unsigned long long)tally->failed);
    if (cut_short)
        text_putf(&text, "%.3f ms", (double)(ended - run->stopped_at) / 1e6);
    else
        text_puts(&text, "-");
    if (stuck > 0) text_putf(&text, ", workers that did not answer %llu", (unsigned long long)stuck);
    text_putf(&text, ", took %.3f s", (double)(ended - run->started) / 1e9);
    say_text(run, &text);
}

/* The last errors of delayed writing are told by close(). */
static void close_outputs(run_t *run, tally_t *tally) {
    if (run->out.fd != STDOUT_FILENO) close(run->out.fd);
    if (run->audit.fd >= 0 && close(run->audit.fd) != 0) {
        tally->output_failed = true;
        say(run, run->options.audit, strerror(errno));
    }
    if (close(STDOUT_FILENO) != 0) {
        tally->output_failed = true;
        say(run, "standard output", strerror(errno));
    }
}

static void run_free(run_t *run) {
    ctx_pool_free(run->progress);
    ctx_pool_free(run->hashing);
    ctx_pool_free(run->reporting);
    (void)ctx_on_done_stop(&run->on_stop);
    ctx_end(run->ctx);
    ctx_end(run->signals);
    while (run->hashers != NULL) {
        hasher_t *hasher = run->hashers;
        run->hashers = hasher->next;
        hasher_free(hasher);
    }
    text_free(&run->line);
    text_free(&run->record);
    pthread_cond_destroy(&run->idle);
    pthread_mutex_destroy(&run->lock);
    ctx_runtime_stop();
}

static int run_finish(run_t *run) {
    uint64_t stuck = run_drain(run);
    ctx_time_t ended = ctx_now();
    pthread_mutex_lock(&run->lock);
    tally_t tally = run->tally;
    pthread_mutex_unlock(&run->lock);
    tally.canceled += tally.unfinished; /* what stuck workers hold */
    /* When this says true the callback will never run: the stop came this instant. */
    if (ctx_on_done_stop(&run->on_stop)) run->stopped_at = ended;
    if (stuck == 0) close_outputs(run, &tally);
    summarise(run, &tally, stuck, ended);
    int status = exit_status(run, &tally);
    if (stuck > 0) _exit(status); /* what they still touch must stay; the system takes it all at once */
    return status;
}

/* == command line ================================================= */

/* NULL, or what is wrong with it. */
static const char *parse_duration(const char *text, ctx_dur_t *out) {
    static const struct {
        const char *unit;
        ctx_dur_t length;
    } units[] = {{"us", CTX_US(1)}, {"ms", CTX_MS(1)}, {"s", CTX_S(1)}, {"m", CTX_S(60)}, {"h", CTX_S(3600)}};
    int64_t count = 0;
    if (*text == '-') return "a duration cannot be negative";
    if (*text < '0' || *text > '9') return "not a duration: write 250ms, 2s or 1m";
    for (; *text >= '0' && *text <= '9'; text++) {
        if (count > (INT64_MAX - 9) / 10) return "longer than 292 years";
        count = count * 10 + (*text - '0');
    }
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (strcmp(text, units[i].unit) != 0) continue;
        if (count > INT64_MAX / units[i].length) return "longer than 292 years";
        *out = count * units[i].length;
        return NULL;
    }
    return *text == '\0' ? "a duration needs a unit: us, ms, s, m or h"
                         : "not a duration: a whole number, then us, ms, s, m or h";
}

/* To the library 0 means none, on the command line it means passed. */
static const char *parse_deadline(const char *text, ctx_dur_t *out) {
    const char *wrong = parse_duration(text, out);
    if (wrong == NULL && *out == 0) *out = -1;
    return wrong;
}

static const char *parse_jobs(const char *text, int *out) {
    int count = 0;
    for (const char *at = text; *at != '\0'; at++) {
        if (*at < '0' || *at > '9') return "not a whole number";
        if (count <= MAX_JOBS) count = count * 10 + (*at - '0');
    }
    if (count < 1 || count > MAX_JOBS) return "jobs must be 1 to 1024";
    *out = count;
    return NULL;
}

static const char usage[] = "usage: treesum [-j N] [-t TOTAL] [-T PER_FILE] [-a AUDIT] [-q] PATH...\n";

static int usage_error(int option, const char *value, const char *why) {
    if (option == 0)
        fprintf(stderr, "treesum: %s\n", why);
    else if (value == NULL)
        fprintf(stderr, "treesum: -%c: %s\n", option, why);
    else
        fprintf(stderr, "treesum: -%c '%s': %s\n", option, value, why);
    fputs(usage, stderr);
    return STATUS_USAGE;
}

static const char *parse_option(options_t *options, int option, char *value) {
    switch (option) {
        case 'j': return parse_jobs(value, &options->jobs);
        case 't': return parse_deadline(value, &options->total);
        case 'T': return parse_deadline(value, &options->per_file);
        case 'a': options->audit = value; return *value != '\0' ? NULL : "needs a file name";
        case 'q': options->quiet = true; return NULL;
        default: return "no such option";
    }
}

/* 0 to go on, else the exit status. */
static int parse_command_line(int argc, char **argv, options_t *options) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    options->jobs = cores < 1 ? 1 : cores > MAX_JOBS ? MAX_JOBS : (int)cores;
    opterr = 0;
    for (int option; (option = getopt(argc, argv, ":j:t:T:a:q")) != -1;) {
        if (option == ':') return usage_error(optopt, NULL, "needs a value");
        if (option == '?') return usage_error(optopt != 0 ? optopt : '?', NULL, "no such option");
        const char *wrong = parse_option(options, option, optarg);
        if (wrong != NULL) return usage_error(option, optarg, wrong);
    }
    options->paths = argv + optind;
    if (*options->paths == NULL) return usage_error(0, NULL, "no PATH given");
    for (char **path = options->paths; *path != NULL; path++)
        if (strcmp(*path, "-") == 0)
            return usage_error(0, NULL, "'-' is standard input to sha256sum: for a file of that name write ./-");
    return 0;
}

int main(int argc, char **argv) {
    static run_t run;
    int status = parse_command_line(argc, argv, &run.options);
    if (status != 0) return status;
    status = 1;
    if (run_start(&run)) {
        progress_start(&run);
        run.walk_cut = !walk_all(&run, run.ctx, false);
        run_wait(&run);
        status = run_finish(&run);
    }
    run_free(&run);
    return status;
}
