// The fake libcuda's streams and events.
#include "driver.h"
#include "queue.h"

#include <chrono>
#include <mutex>
#include <set>

using driver::alive;

namespace {
using Clock = std::chrono::steady_clock;

struct Event {
    bool timed;
    bool recorded = false;
    int pending = 0;  // records that the stream has not reached yet
    Clock::time_point at;
};

std::mutex mutex;
std::set<CUstream> streams;
std::set<Event*> events;

enum { CU_EVENT_DISABLE_TIMING = 2 };

bool alive(Event* event) {
    std::lock_guard lock(mutex);
    return events.count(event);
}
}  // namespace

bool driver::alive(CUstream stream) {
    if (reinterpret_cast<uintptr_t>(stream) <= 2) return true;  // default, legacy and per-thread streams
    std::lock_guard lock(mutex);
    return streams.count(stream);
}

extern "C" {
void elbo_emulated_stream(const void* stream, const char* what) {
    if (!alive(static_cast<CUstream>(const_cast<void*>(stream)))) ELBO_FAIL("%s on a stream that does not exist (any more)", what);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int) {
    ELBO_READY();
    std::lock_guard lock(mutex);
    *stream = reinterpret_cast<CUstream>(new char);
    streams.insert(*stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

CUresult cuStreamDestroy_v2(CUstream stream) {
    ELBO_READY();
    queue::finish();
    std::lock_guard lock(mutex);  // the byte of a destroyed stream stays allocated, so that no new stream gets its address
    return streams.erase(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuStreamSynchronize(CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    queue::finish();
    return driver::left_over();
}

CUresult cuStreamQuery(CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return queue::advance() ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, Event* event, unsigned) {
    ELBO_READY();
    return alive(stream) && alive(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuStreamIsCapturing(CUstream stream, int* status) {
    *status = 0;
    return alive(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuStreamBeginCapture_v2(CUstream, int) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    later(stream, "cuLaunchHostFunc", [=] { function(data); });
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(Event** event, unsigned flags) {
    ELBO_READY();
    std::lock_guard lock(mutex);
    *event = new Event{!(flags & CU_EVENT_DISABLE_TIMING)};
    events.insert(*event);
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(Event* event) {
    ELBO_READY();
    std::lock_guard lock(mutex);
    return events.erase(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;  // pending records keep the event alive
}

CUresult cuEventRecord(Event* event, CUstream stream) {
    ELBO_READY();
    if (!alive(event) || !alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    {
        std::lock_guard lock(mutex);
        event->pending++;
    }
    later(stream, "cuEventRecord", [=] {
        std::lock_guard lock(mutex);
        event->recorded = true;
        event->pending--;
        event->at = Clock::now();
    });
    return CUDA_SUCCESS;
}

// Every query runs one piece of work, so that a program that polls makes progress.
CUresult cuEventQuery(Event* event) {
    ELBO_READY();
    if (!alive(event)) return CUDA_ERROR_INVALID_HANDLE;
    std::unique_lock lock(mutex);
    if (!event->pending) return CUDA_SUCCESS;
    lock.unlock();
    queue::advance();
    return CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(Event* event) {
    CUresult result;
    while ((result = cuEventQuery(event)) == CUDA_ERROR_NOT_READY) {
    }
    return result;
}

CUresult cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (!alive(start) || !alive(end)) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->timed || !end->timed || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    if (start->pending || end->pending) return CUDA_ERROR_NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime(float* milliseconds, Event* start, Event* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
}
