// The fake libcuda: one H100 and its context. Streams and memory are in streams.cpp and transfers.cpp.
#include "driver.h"
#include "queue.h"

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {
struct Context {
} primary;

std::mutex mutex;
bool initialized = false;
int retained = 0;
thread_local Context* current = nullptr;

// The fault and its launch, from ELBO_EMULATED_FAULT.
enum class Fault { None, Lost, Stale } fault = Fault::None;
long fault_at = 0;
std::atomic<bool> lost = false, stale = false;

void configure_fault() {
    const std::string value = std::getenv("ELBO_EMULATED_FAULT") ? std::getenv("ELBO_EMULATED_FAULT") : "";
    const size_t at = value.find('@');
    if (at == std::string::npos) return;
    const std::string kind = value.substr(0, at);
    fault = kind == "lost" ? Fault::Lost : kind == "stale" ? Fault::Stale : Fault::None;
    fault_at = std::strtol(value.c_str() + at + 1, nullptr, 10);
    if (fault == Fault::None) ELBO_FAIL("ELBO_EMULATED_FAULT=%s is neither lost@N nor stale@N", value.c_str());
}

CUresult attribute(int attribute, int* value) {
    static const std::map<int, int> values = {
        {1, 1024},  {2, 1024},  {3, 1024},  {4, 64},  // threads of a block, and its dimensions
        {5, 2147483647}, {6, 65535}, {7, 65535},      // grid
        {8, driver::SHARED_DEFAULT}, {9, 65536}, {10, 32}, {11, 2147483647}, {12, 65536}, {13, 1980000},
        {14, 512}, {15, 1}, {16, driver::MULTIPROCESSORS}, {17, 0}, {18, 0}, {19, 1}, {20, 0}, {31, 1}, {32, 1},
        {33, 1}, {34, 0}, {35, 0}, {36, 2619000}, {37, 5120}, {38, 50 << 20}, {39, 2048}, {40, 3}, {41, 1},
        {50, 0}, {75, 9}, {76, 0}, {78, 1}, {79, 1}, {80, 1}, {81, driver::SHARED_PROCESSOR}, {82, 65536}, {83, 1},
        {89, 1}, {90, 1}, {95, 1}, {97, driver::SHARED_OPT_IN}, {106, 32}, {115, 1},
    };
    auto found = values.find(attribute);
    if (found == values.end()) ELBO_FAIL("cuDeviceGetAttribute: attribute %d is not implemented", attribute);
    *value = found->second;
    return CUDA_SUCCESS;
}
}  // namespace

CUresult driver::ready() {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (lost) return CUDA_ERROR_ILLEGAL_ADDRESS;
    return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult driver::launching() {
    static std::atomic<long> launches = 0;
    const bool now = fault != Fault::None && ++launches == fault_at;
    if (now && fault == Fault::Lost) lost = true;
    if (now && fault == Fault::Stale) {
        stale = true;
        return CUDA_ERROR_INVALID_VALUE;
    }
    return ready();
}

CUresult driver::left_over() { return stale.exchange(false) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

extern "C" {
CUresult cuInit(unsigned) {
    memory::configure();
    queue::configure();
    driver::configure_threads();
    configure_fault();
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");  // any name means the one device; an empty list means no device
    if (visible && !*visible) return CUDA_ERROR_NO_DEVICE;
    initialized = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

#define NAMES(N)                                                                                                      \
    N(CUDA_SUCCESS, "no error")                                                                                       \
    N(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                                                   \
    N(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                                      \
    N(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                                             \
    N(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                                     \
    N(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                                            \
    N(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                                         \
    N(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                                                     \
    N(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                                           \
    N(CUDA_ERROR_FILE_NOT_FOUND, "file not found")                                                                    \
    N(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                                           \
    N(CUDA_ERROR_NOT_FOUND, "named symbol not found")                                                                 \
    N(CUDA_ERROR_NOT_READY, "device not ready")                                                                       \
    N(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")

CUresult cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
#define N(code, text) \
    case code: *name = #code; return CUDA_SUCCESS;
        NAMES(N)
#undef N
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
#define N(code, description) \
    case code: *text = description; return CUDA_SUCCESS;
        NAMES(N)
#undef N
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDeviceGet(int* device, int ordinal) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *device = 0;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, length, "NVIDIA H100 80GB HBM3 (emulated)");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(char* uuid, int) {
    std::memcpy(uuid, "elbo emulated GPU", 16);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory::capacity();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, int name, int) { return attribute(name, value); }

CUresult cuDeviceGetPCIBusId(char* id, int length, int) {
    std::snprintf(id, length, "0000:01:00.0");
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(Context** context, int) {
    std::lock_guard lock(mutex);
    retained++;
    *context = &primary;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard lock(mutex);
    if (!retained) return CUDA_ERROR_INVALID_CONTEXT;
    retained--;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    std::lock_guard lock(mutex);
    *flags = 0;
    *active = retained > 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(Context** context) {
    *context = current;
    return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuCtxSetCurrent(Context* context) {
    if (context && context != &primary) return CUDA_ERROR_INVALID_CONTEXT;
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(int* device) {
    *device = 0;
    return driver::ready();
}
CUresult cuCtxSynchronize() {
    ELBO_READY();
    queue::finish();
    return CUDA_SUCCESS;
}
CUresult cuCtxSetFlags(unsigned) { return driver::ready(); }
CUresult cuCtxSetLimit(int, size_t) { return driver::ready(); }
CUresult cuCtxSetCacheConfig(int) { return driver::ready(); }
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return driver::ready();
}
CUresult cuProfilerStart() {
    ELBO_READY();
    queue::start_profile();
    return CUDA_SUCCESS;
}
CUresult cuProfilerStop() {
    ELBO_READY();
    queue::stop_profile();
    return CUDA_SUCCESS;
}
int elbo_emulated_context() { return driver::ready() == CUDA_SUCCESS; }
}
