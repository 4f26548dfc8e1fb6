// The fake libcuda's memory: allocation, copies, page-locked host memory and the pool.
#include "driver.h"
#include "queue.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

using driver::alive;

namespace {
// Keeps no freed memory, so its threshold has no effect.
struct Pool {
    uint64_t attributes[16] = {0, 1, 1, 1};
} pool;

std::mutex mutex;
std::map<const char*, size_t> pinned;  // page-locked host memory: start, bytes

bool is_pinned(const void* host, size_t bytes) {
    std::lock_guard lock(mutex);
    auto at = static_cast<const char*>(host);
    auto next = pinned.upper_bound(at);
    return next != pinned.begin() && at + bytes <= std::prev(next)->first + std::prev(next)->second;
}
}  // namespace

extern "C" {
CUresult cuMemAlloc_v2(CUdeviceptr* device, size_t bytes) {
    ELBO_READY();
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    *device = memory::allocate(bytes);
    if (!*device) {  // memory freed in stream order may be reused after waiting
        queue::finish();
        *device = memory::allocate(bytes);
    }
    return *device ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAllocAsync(CUdeviceptr* device, size_t bytes, CUstream stream) {
    ELBO_READY();
    return alive(stream) ? cuMemAlloc_v2(device, bytes) : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuMemAllocFromPoolAsync(CUdeviceptr* device, size_t bytes, Pool*, CUstream stream) { return cuMemAllocAsync(device, bytes, stream); }

CUresult cuMemFree_v2(CUdeviceptr device) {
    ELBO_READY();
    queue::finish();
    if (!device) return CUDA_SUCCESS;
    if (!memory::retire(device)) ELBO_FAIL("cuMemFree of %#lx, which is no allocation (any more)", device);
    memory::release(device);
    return CUDA_SUCCESS;
}

CUresult cuMemFreeAsync(CUdeviceptr device, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!memory::retire(device)) ELBO_FAIL("cuMemFreeAsync of %#lx, which is no allocation (any more)", device);
    later(stream, "cuMemFreeAsync", [=] { memory::release(device); });
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    ELBO_READY();
    *total = memory::capacity();
    *free = *total - std::min(*total, memory::used());
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** host, size_t bytes, unsigned) {
    ELBO_READY();
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    *host = std::aligned_alloc(4096, whole);
    if (!*host) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(*host, 0xFF, whole);
    std::lock_guard lock(mutex);
    pinned[static_cast<char*>(*host)] = bytes;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* host) {
    ELBO_READY();
    {
        std::lock_guard lock(mutex);
        if (!pinned.erase(static_cast<char*>(host))) return CUDA_ERROR_INVALID_VALUE;
    }
    std::free(host);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr device, const void* host, size_t bytes, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!bytes) return CUDA_SUCCESS;
    if (memory::is_device(reinterpret_cast<uint64_t>(host))) ELBO_FAIL("cuMemcpyHtoD from a device address");
    void* to = elbo_emulated_memory(device, bytes, "cuMemcpyHtoD");
    if (is_pinned(host, bytes)) {
        later(stream, "cuMemcpyHtoD", [=] {
            if (!is_pinned(host, bytes)) ELBO_FAIL("page-locked memory was freed before it was copied to the device");
            std::memcpy(to, host, bytes);
        });
    } else {  // the driver copies pageable memory before it returns
        auto from = static_cast<const char*>(host);
        later(stream, "cuMemcpyHtoD", [=, staged = std::string(from, from + bytes)] { std::memcpy(to, staged.data(), bytes); });
    }
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync_v2(void* host, CUdeviceptr device, size_t bytes, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!bytes) return CUDA_SUCCESS;
    if (memory::is_device(reinterpret_cast<uint64_t>(host))) ELBO_FAIL("cuMemcpyDtoH to a device address");
    const void* from = elbo_emulated_memory(device, bytes, "cuMemcpyDtoH");
    const bool asynchronous = is_pinned(host, bytes);
    later(stream, "cuMemcpyDtoH", [=] {
        if (asynchronous && !is_pinned(host, bytes)) ELBO_FAIL("page-locked memory was freed before the device copied to it");
        std::memcpy(host, from, bytes);
    });
    if (!asynchronous) queue::finish();
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!bytes) return CUDA_SUCCESS;
    if (to < from + bytes && from < to + bytes) ELBO_FAIL("cuMemcpyDtoD between overlapping ranges");
    void* target = elbo_emulated_memory(to, bytes, "cuMemcpyDtoD, to");
    const void* source = elbo_emulated_memory(from, bytes, "cuMemcpyDtoD, from");
    later(stream, "cuMemcpyDtoD", [=] { std::memcpy(target, source, bytes); });
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr device, unsigned char value, size_t count, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (!count) return CUDA_SUCCESS;
    void* to = elbo_emulated_memory(device, count, "cuMemsetD8");
    later(stream, "cuMemsetD8", [=] { std::memset(to, value, count); });
    return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr device, unsigned value, size_t count, CUstream stream) {
    ELBO_READY();
    if (!alive(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (device % 4) return CUDA_ERROR_INVALID_VALUE;
    if (!count) return CUDA_SUCCESS;
    auto to = static_cast<unsigned*>(elbo_emulated_memory(device, 4 * count, "cuMemsetD32"));
    later(stream, "cuMemsetD32", [=] { std::fill_n(to, count, value); });
    return CUDA_SUCCESS;
}

// Calls without a stream wait until the work is done.
#define WAIT(call)                     \
    CUresult result = call;            \
    if (!result) queue::finish();      \
    return result
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { WAIT(cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr)); }
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { WAIT(cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr)); }
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { WAIT(cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr)); }
CUresult cuMemsetD8_v2(CUdeviceptr device, unsigned char value, size_t count) { WAIT(cuMemsetD8Async(device, value, count, nullptr)); }
CUresult cuMemsetD32_v2(CUdeviceptr device, unsigned value, size_t count) { WAIT(cuMemsetD32Async(device, value, count, nullptr)); }

CUresult cuDeviceGetDefaultMemPool(Pool** out, int) {
    *out = &pool;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetMemPool(Pool** out, int device) { return cuDeviceGetDefaultMemPool(out, device); }
CUresult cuMemPoolTrimTo(Pool* which, size_t) { return which == &pool ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuMemPoolSetAttribute(Pool* which, int attribute, void* value) {
    if (which != &pool || attribute < 1 || attribute > 8) return CUDA_ERROR_INVALID_VALUE;
    if (attribute <= 3) which->attributes[attribute] = *static_cast<int*>(value);
    if (attribute == 4) which->attributes[attribute] = *static_cast<uint64_t*>(value);
    if (attribute == 6 || attribute == 8) memory::reset_high();
    return CUDA_SUCCESS;
}

CUresult cuMemPoolGetAttribute(Pool* which, int attribute, void* value) {
    if (which != &pool || attribute < 1 || attribute > 8) return CUDA_ERROR_INVALID_VALUE;
    if (attribute <= 3) *static_cast<int*>(value) = static_cast<int>(which->attributes[attribute]);
    if (attribute == 4) *static_cast<uint64_t*>(value) = which->attributes[attribute];
    if (attribute == 5 || attribute == 7) *static_cast<uint64_t*>(value) = memory::used();
    if (attribute == 6 || attribute == 8) *static_cast<uint64_t*>(value) = memory::high();
    return CUDA_SUCCESS;
}
}
