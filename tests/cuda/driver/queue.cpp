// When the fake GPU works: at once, or with ELBO_EMULATED_ASYNC=1 as late as the API allows, in the order of the calls.
//
// Late work shows what a GPU only shows by bad luck: a staging buffer that is refilled before its copy was made, a result
// that is read before it is waited for. All streams share one queue, so a missing wait between two streams is not shown.
#include "driver.h"
#include "queue.h"

#include <deque>
#include <mutex>

namespace {
struct Work {
    void (*run)(void*);
    void* data;
};

std::recursive_mutex running;  // one piece of work at a time, in order
std::mutex mutex;
std::deque<Work> pending;
bool late = false;

bool next() {
    std::lock_guard in_order(running);
    Work work;
    {
        std::lock_guard lock(mutex);
        if (pending.empty()) return false;
        work = pending.front();
        pending.pop_front();
    }
    work.run(work.data);
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
}  // namespace queue

extern "C" void elbo_emulated_later(const void* stream, void (*run)(void*), void* data, const char* what) {
    elbo_emulated_stream(stream, what);
    {
        std::lock_guard lock(mutex);
        pending.push_back({run, data});
    }
    if (!late) queue::finish();
}
