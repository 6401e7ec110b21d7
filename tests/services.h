/* services.h: see what a shutdown does, when, and in which order. Include it after ctxcancel.h and test.h.

   actor_t       a service that plays a script and writes down each callback
   until_quiet   waits until all other threads sleep: what the last move of the fake clock set off is over then
   drive         moves the fake clock, step by step, until a flag is set
   stopper_t     ctx_service_stop() on a thread of its own */
#ifndef SERVICES_H
#define SERVICES_H

#include "gates.h"

#include <limits.h>

/* -- the fake clock --------------------------------------------------------------------------------------------- */

#define T0 CTX_S(1000)

/* What all times in the tests are multiples of, so that a step of the clock ends exactly where something happens. */
#define STEP CTX_MS(100)

static inline bool others_sleep(void) {
#if defined(__linux__) || defined(__gnu_linux__) /* -U__linux__ is for the header alone */
    DIR *dir = opendir("/proc/self/task");
    bool asleep = true;
    if (!dir) return false;
    for (struct dirent *entry; asleep && (entry = readdir(dir)) != NULL;) {
        char path[300], line[256] = "";
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == thread_id()) continue;
        snprintf(path, sizeof path, "/proc/self/task/%s/stat", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file) continue; /* it has ended */
        if (!fgets(line, (int)sizeof line, file)) line[0] = '\0';
        fclose(file);
        const char *state = strrchr(line, ')');
        asleep = !state || (state[1] && state[2] != 'R' && state[2] != 'D');
    }
    closedir(dir);
    return asleep;
#else
    test_sleep_ms(20);
    return true;
#endif
}

static inline void until_quiet(void) {
    int64_t end = test_now_ns() + PATIENCE_NS;
    for (int seen = 0; seen < 3 && test_now_ns() < end;) {
        test_sleep_ms(1);
        seen = others_sleep() ? seen + 1 : 0;
    }
}

/* Move the clock by `dur` in steps, each when the one before has had its effects. */
static inline void pass(ctx_dur_t dur) {
    until_quiet();
    for (; dur > 0; dur -= STEP) {
        ctx_clock_advance(dur < STEP ? dur : STEP);
        until_quiet();
    }
}

/* Move the clock until the flag is set, for an hour at most. */
static inline void drive(const int *flag) {
    int64_t end = test_now_ns() + PATIENCE_NS;
    for (int i = 0; i < 36000 && test_now_ns() < end; i++) {
        until_quiet();
        if (load(flag)) return;
        ctx_clock_advance(STEP);
    }
    EXPECT(load(flag));
}

/* -- actors ----------------------------------------------------------------------------------------------------- */

typedef enum { STARTS, STARTED, RUNS, REFUSES, DRAINS, DRAINED, CANCELED, FORCES, RETURNED, EVENTS } event_t;

typedef struct {
    const char *name;

    /* The script. A callback stands at its gate, whatever its context says. */
    gate_t *start_gate, *run_gate, *refuse_gate, *drain_gate, *force_gate;
    gate_t *force_opens;   /* `force` opens this gate */
    bool run_ends;         /* `run` returns without waiting for its context */
    ctx_dur_t run_lingers; /* once canceled `run` goes on for so long */
    ctx_dur_t drain_takes; /* how long `drain` takes unless its context ends before */
    int start_rc, run_rc, drain_rc;

    /* What happened. */
    int n[EVENTS];            /* [atomic] how often */
    int place[EVENTS];        /* the order of all events of all actors */
    ctx_time_t at[EVENTS];    /* since T0 */
    int start_err, drain_err; /* the contexts when the callbacks began */
    ctx_time_t drain_deadline;
    ctx_time_t run_deadline;
    ctx_cause_t cause; /* of the context of `run` */
    pthread_t starter, runner, drainer;
    ctx_on_done_t reg;
} actor_t;

static int events_so_far; /* [atomic] */

static inline actor_t actor(const char *name) {
    actor_t a;
    memset(&a, 0, sizeof a);
    a.name = name;
    return a;
}

static inline int times(const actor_t *a, event_t event) { return load(&a->n[event]); }

/* The first of each kind is kept; more than one is for the test to find. */
static inline void note(actor_t *a, event_t event) {
    if (load(&a->n[event]) == 0) {
        a->at[event] = ctx_now() - T0;
        a->place[event] = add(&events_so_far, 1);
    }
    add(&a->n[event], 1);
}

static inline bool before(const actor_t *a, event_t first, const actor_t *b, event_t second) {
    return times(a, first) && times(b, second) && a->place[first] < b->place[second];
}

static inline void notes_canceled(void *arg) { note((actor_t *)arg, CANCELED); }

static inline int actor_start(ctx_t *ctx, void *user) {
    actor_t *a = (actor_t *)user;
    a->start_err = ctx_err(ctx);
    a->starter = pthread_self();
    note(a, STARTS);
    if (a->start_gate) gate_pass(a->start_gate);
    int rc = a->start_rc;
    note(a, STARTED);
    return rc;
}

/* No callback touches its actor after its last note: the test may be over then. */
static inline int actor_run(ctx_t *ctx, void *user) {
    actor_t *a = (actor_t *)user;
    a->runner = pthread_self();
    a->run_deadline = ctx_deadline(ctx);
    ctx_on_done(&a->reg, ctx, notes_canceled, a);
    note(a, RUNS);
    if (a->run_gate)
        gate_pass(a->run_gate);
    else if (!a->run_ends)
        ctx_wait(ctx, CTX_FOREVER);
    if (a->run_lingers) ctx_sleep(ctx_background(), a->run_lingers);
    if (ctx_on_done_stop(&a->reg) && ctx_err(ctx)) note(a, CANCELED); /* it was woken before the callback ran */
    a->cause = ctx_cause(ctx);
    int rc = a->run_rc;
    note(a, RETURNED);
    return rc;
}

static inline void actor_refuse(void *user) {
    actor_t *a = (actor_t *)user;
    gate_t *gate = a->refuse_gate;
    note(a, REFUSES);
    if (gate) gate_pass(gate);
}

static inline int actor_drain(ctx_t *ctx, void *user) {
    actor_t *a = (actor_t *)user;
    a->drainer = pthread_self();
    a->drain_err = ctx_err(ctx);
    a->drain_deadline = ctx_deadline(ctx);
    note(a, DRAINS);
    if (a->drain_gate) gate_pass(a->drain_gate);
    if (a->drain_takes) ctx_sleep(ctx, a->drain_takes);
    int rc = a->drain_rc;
    note(a, DRAINED);
    return rc;
}

static inline void actor_force(void *user) {
    actor_t *a = (actor_t *)user;
    gate_t *opens = a->force_opens, *gate = a->force_gate;
    note(a, FORCES);
    if (opens) gate_open(opens);
    if (gate) gate_pass(gate);
}

static inline ctx_service_desc_t describe(actor_t *a) {
    ctx_service_desc_t desc;
    memset(&desc, 0, sizeof desc);
    desc.name = a->name;
    desc.start = actor_start;
    desc.run = actor_run;
    desc.refuse = actor_refuse;
    desc.drain = actor_drain;
    desc.force = actor_force;
    desc.user = a;
    return desc;
}

/* What was begun has ended, and nothing was called twice. */
static inline void expect_orderly(const actor_t *a) {
    for (int event = 0; event < EVENTS; event++) EXPECT(times(a, (event_t)event) <= 1);
    EXPECT_EQ(times(a, STARTS), times(a, STARTED));
    EXPECT_EQ(times(a, RUNS), times(a, RETURNED));
    EXPECT_EQ(times(a, DRAINS), times(a, DRAINED));
}

/* It was told in the full order of the phases, and did not have to be forced. */
static inline void expect_stopped(const actor_t *a) {
    expect_orderly(a);
    EXPECT(before(a, RUNS, a, REFUSES));
    EXPECT(before(a, REFUSES, a, DRAINS));
    EXPECT(before(a, DRAINED, a, CANCELED));
    EXPECT(before(a, CANCELED, a, RETURNED));
    EXPECT_EQ(times(a, FORCES), 0);
}

static inline void expect_untouched(const actor_t *a) {
    for (int event = 0; event < EVENTS; event++) EXPECT_EQ(times(a, (event_t)event), 0);
}

/* -- services --------------------------------------------------------------------------------------------------- */

static inline UNUSED_OK ctx_service_t *service_of(ctx_t *parent, const ctx_service_desc_t *desc) {
    ctx_service_t *service = ctx_service_new(parent, desc);
    if (!service) {
        fprintf(stderr, "no service for the test: %s\n", strerror(errno));
        abort();
    }
    return service;
}

/* A service that has started and whose run is inside. */
static inline UNUSED_OK ctx_service_t *started(ctx_t *parent, const ctx_service_desc_t *desc) {
    ctx_service_t *service = service_of(parent, desc);
    EXPECT_EQ(ctx_service_start(service), 0);
    if (desc->run == actor_run) UNTIL(times((const actor_t *)desc->user, RUNS) == 1);
    return service;
}

typedef struct {
    ctx_service_t *service;
    ctx_dur_t budget;
    ctx_shutdown_report_t report;
    int tid, done, rc;
    pthread_t thread;
} stopper_t;

static inline void *stops(void *arg) {
    stopper_t *s = (stopper_t *)arg;
    store(&s->tid, thread_id());
    s->rc = ctx_service_stop(s->service, s->budget, &s->report);
    store(&s->done, 1);
    return NULL;
}

static inline UNUSED_OK void stop_apart(stopper_t *s, ctx_service_t *service, ctx_dur_t budget) {
    memset(s, 0, sizeof *s);
    s->service = service;
    s->budget = budget;
    s->thread = thread_start(stops, s);
}

/* Stop while the fake clock moves. */
static inline UNUSED_OK int stop_driven(ctx_service_t *service, ctx_dur_t budget, ctx_shutdown_report_t *report) {
    stopper_t s;
    stop_apart(&s, service, budget);
    drive(&s.done);
    thread_join(s.thread);
    if (report) *report = s.report;
    return s.rc;
}

#endif /* SERVICES_H */
