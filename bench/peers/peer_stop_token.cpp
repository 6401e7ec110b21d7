// C++20: std::stop_source, std::stop_token, std::stop_callback. A child is a source that a callback links to its
// parent's token. There are no deadlines and no values.
#include "../bench.h"
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <semaphore>
#include <stop_token>
#include <vector>

namespace {

std::stop_source server;

void fresh_server() { server = std::stop_source(); }

struct stop_it {
    std::stop_source source;
    void operator()() noexcept { source.request_stop(); }
};

struct child_t {
    std::stop_source source;
    std::stop_callback<stop_it> link;
    explicit child_t(const std::stop_token &parent) : source(), link(parent, stop_it{source}) {}
};

uint64_t cancel_child(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        child_t child(server.get_token());
        BENCH_KEEP(&child);
    }
    return bench_now() - began;
}

uint64_t cancel_alone(size_t n) {
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        std::stop_source child;
        BENCH_KEEP(&child);
    }
    return bench_now() - began;
}

uint64_t cancel_many(size_t n, size_t times) {
    uint64_t spent = 0;
    for (size_t t = 0; t < times; t++) {
        std::stop_source parent;
        std::vector<std::unique_ptr<child_t>> child;
        for (size_t i = 0; i < n; i++) child.push_back(std::make_unique<child_t>(parent.get_token()));
        uint64_t began = bench_now();
        parent.request_stop();
        spent += bench_now() - began;
        bench_check(child[0]->source.stop_requested() && child[n - 1]->source.stop_requested(), "not canceled");
    }
    return spent;
}

uint64_t cancel_100(size_t n) { return cancel_many(100, n / 100 + 1); }
uint64_t cancel_10k(size_t n) { return cancel_many(10000, n / 10000 + 1); }

struct on_done {
    void operator()() noexcept { BENCH_KEEP(this); }
};

uint64_t after_stop(size_t n) {
    std::stop_token token = server.get_token();
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        std::stop_callback<on_done> callback(token, on_done{});
        BENCH_KEEP(&callback);
    }
    return bench_now() - began;
}

uint64_t err_loop(size_t n) {
    std::stop_token token = server.get_token();
    uint64_t began = bench_now();
    for (size_t i = 0; i < n; i++) {
        if (token.stop_requested()) break;
        BENCH_BARRIER();
    }
    return bench_now() - began;
}

std::optional<std::stop_source> waited;
std::mutex mutex;
std::condition_variable_any condition;

void wait_prepare() { waited.emplace(); }
void wait_park() {
    std::unique_lock<std::mutex> lock(mutex);
    condition.wait(lock, waited->get_token(), [] { return false; });
}
void wait_wake() { waited->request_stop(); }

// Hand-over: a semaphore of each side, which cannot be canceled.
std::optional<std::counting_semaphore<>> turn[2];

void turn_fresh() {
    turn[0].emplace(0);
    turn[1].emplace(0);
}
void turn_give(unsigned side) { turn[side]->release(); }
void turn_take(unsigned side) { turn[!side]->acquire(); }

} // namespace

int main(int argc, char **argv) {
    static const bench_wake_t way = {"wait_wake", wait_prepare, wait_park, wait_wake, nullptr};
    static const bench_hand_t hand = {"semaphore", turn_fresh, turn_give, turn_take, nullptr, false};
    if (bench_section(argc, argv, "context")) {
        bench_run("cancel_child", cancel_child, 1000000);
        bench_run("cancel_child_alone", cancel_alone, 2000000);
        bench_run("cancel_each_100", cancel_100, 100000);
        bench_run("cancel_each_10k", cancel_10k, 100000);
        if (bench_wants("cancel_each_1m")) {
            size_t n = bench_scaled(1000000);
            bench_print("cancel_each_1m", double(cancel_many(n, 1)) / double(n), "ns");
        }
        bench_run("after_stop", after_stop, 5000000);
        bench_two_threads("cancel_child_2t", cancel_child, 500000, fresh_server);
    }
    if (bench_section(argc, argv, "polling")) bench_run("err_loop", err_loop, 50000000);
    if (bench_section(argc, argv, "handover")) bench_all_hands(argv[0], &hand, 1, false, 0);
    if (bench_section(argc, argv, "waiting") && bench_wants("wait_wake")) bench_wakes(&way, 1, 1000);
    return 0;
}
