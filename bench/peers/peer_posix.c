/* POSIX: sem_t, a mutex, and a semaphore to wake by. */
#include "../bench.h"
#include <semaphore.h>

static sem_t sem;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static uint64_t sem_pair(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        sem_wait(&sem);
        BENCH_BARRIER();
        sem_post(&sem);
    }
    return bench_now() - began;
}

static uint64_t mutex_pair(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        pthread_mutex_lock(&mutex);
        BENCH_BARRIER();
        pthread_mutex_unlock(&mutex);
    }
    return bench_now() - began;
}

static void *thread_main(void *arg) { return arg; }

static uint64_t thread_each(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        pthread_t thread;
        bench_check(pthread_create(&thread, NULL, thread_main, NULL) == 0, "no thread");
        pthread_join(thread, NULL);
    }
    return bench_now() - began;
}

static sem_t bell;

static void bell_park(void) {
    while (sem_wait(&bell) != 0) {
    }
}
static void bell_wake(void) { sem_post(&bell); }

/* Hand-over: a semaphore of each side. */
static sem_t turn[2];

static void turn_fresh(void) {
    sem_init(&turn[0], 0, 0);
    sem_init(&turn[1], 0, 0);
}
static void turn_give(unsigned side) { sem_post(&turn[side]); }
static void turn_take(unsigned side) {
    while (sem_wait(&turn[!side]) != 0) {
    }
}
static void turn_over(void) {
    sem_destroy(&turn[0]);
    sem_destroy(&turn[1]);
}

int main(int argc, char **argv) {
    static const bench_wake_t way = {"wait_wake", NULL, bell_park, bell_wake, NULL};
    static const bench_hand_t hand = {"semaphore", turn_fresh, turn_give, turn_take, turn_over, false};
    if (bench_section(argc, argv, "semaphore")) {
        sem_init(&sem, 0, 8);
        bench_run("sem_pair", sem_pair, 10000000);
        bench_run("mutex_pair", mutex_pair, 10000000);
        sem_destroy(&sem);
    }
    if (bench_section(argc, argv, "pool")) bench_run("thread_each", thread_each, 2000);
    if (bench_section(argc, argv, "group")) bench_every_run("go_each", thread_each, 2000);
    if (bench_section(argc, argv, "handover")) bench_all_hands(argv[0], &hand, 1, false, 0);
    if (bench_section(argc, argv, "waiting") && bench_wants("wait_wake")) {
        sem_init(&bell, 0, 0);
        bench_wakes(&way, 1, 1000);
        sem_destroy(&bell);
    }
    return 0;
}
