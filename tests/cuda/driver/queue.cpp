// Decides when the fake GPU works: at once, or with ELBO_EMULATED_ASYNC=1 as late as the API allows, in the order of the calls.
//
// Late work reveals bugs that a GPU shows only by chance: a staging buffer that is refilled before it was copied, a result that is
// read before it is ready. All streams share one queue, so a missing wait between two streams is not detected.
//
// Between cuProfilerStart and cuProfilerStop, each piece of work is written to the file named by ELBO_EMULATED_PROFILE, as a line
// with its name and its nanoseconds.
#include "driver.h"
#include "queue.h"

#include <chrono>
#include <deque>
#include <fstream>
#include <mutex>
#include <string>

namespace {
struct Work {
    void (*run)(void*);
    void* data;
    std::string what;
};

std::recursive_mutex running;  // one piece of work at a time, in order
std::mutex mutex;
std::deque<Work> pending;
bool late = false;
std::ofstream profile;  // open while a profile is taken

bool next() {
    std::lock_guard in_order(running);
    Work work;
    {
        std::lock_guard lock(mutex);
        if (pending.empty()) return false;
        work = pending.front();
        pending.pop_front();
    }
    const auto began = std::chrono::steady_clock::now();
    work.run(work.data);
    if (profile.is_open()) profile << work.what << '\t' << (std::chrono::steady_clock::now() - began).count() << '\n';
    return true;
}
}  // namespace

namespace queue {
void configure() {
    const char* value = std::getenv("ELBO_EMULATED_ASYNC");
    late = value && *value == '1';
}

void finish() {
    while (next()) {
    }
}

bool advance() { return next(); }

void start_profile() {
    finish();
    std::lock_guard in_order(running);
    const char* path = std::getenv("ELBO_EMULATED_PROFILE");
    if (path && *path) profile.open(path, std::ios::app);
}

void stop_profile() {
    finish();
    std::lock_guard in_order(running);
    profile.close();
}
}  // namespace queue

extern "C" void elbo_emulated_later(const void* stream, void (*run)(void*), void* data, const char* what) {
    elbo_emulated_stream(stream, what);
    {
        std::lock_guard lock(mutex);
        pending.push_back({run, data, what});
    }
    if (!late) queue::finish();
}
