// Device memory of the fake driver (libcuda): allocation, limits, bounds and red zones.
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

namespace {
constexpr uint64_t DEVICE = 1ull << 60;  // device address = host address + DEVICE
constexpr size_t RED_ZONE = 512;         // also the alignment of allocations, that of the real driver
constexpr unsigned char FILL = 0xFF;     // NaN as f32, f16 and bf16; an index out of range as u32
constexpr size_t H100 = 85'029'158'912;  // bytes

struct Allocation {
    unsigned char* block;
    size_t bytes;
    bool retired = false;  // freed, but the stream has not reached the free yet
};

std::mutex mutex;
std::map<uint64_t, Allocation> allocations;
size_t in_use = 0, most = 0;
size_t limit = H100;

// The allocation with `device` inside or at its end; allocations are never adjacent.
std::map<uint64_t, Allocation>::iterator find(uint64_t device) {
    auto next = allocations.upper_bound(device);
    if (next == allocations.begin()) return allocations.end();
    auto found = std::prev(next);
    return device <= found->first + found->second.bytes ? found : allocations.end();
}

// The same, but only if the program may still use it.
const Allocation* usable(uint64_t device) {
    auto found = find(device);
    return found == allocations.end() || found->second.retired ? nullptr : &found->second;
}

bool intact(const unsigned char* zone, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (zone[i] != FILL) return false;
    return true;
}

bool intact(const Allocation& a) {
    return intact(a.block, RED_ZONE) && intact(a.block + RED_ZONE + a.bytes, RED_ZONE);
}
}  // namespace

namespace memory {
void configure() {
    const char* bytes = std::getenv("ELBO_EMULATED_MEMORY");
    std::lock_guard lock(mutex);
    limit = bytes && *bytes ? std::strtoull(bytes, nullptr, 10) : H100;
}

size_t capacity() {
    std::lock_guard lock(mutex);
    return limit;
}

size_t used() {
    std::lock_guard lock(mutex);
    return in_use;
}

size_t high() {
    std::lock_guard lock(mutex);
    return most;
}

void reset_high() {
    std::lock_guard lock(mutex);
    most = in_use;
}

uint64_t allocate(size_t bytes) {
    std::lock_guard lock(mutex);
    if (bytes > limit || in_use > limit - bytes) return 0;
    size_t whole = (bytes + 3 * RED_ZONE - 1) / RED_ZONE * RED_ZONE;
    auto* block = static_cast<unsigned char*>(std::aligned_alloc(RED_ZONE, whole));
    if (!block) return 0;
    std::memset(block, FILL, bytes + 2 * RED_ZONE);
    uint64_t device = reinterpret_cast<uint64_t>(block + RED_ZONE) + DEVICE;
    allocations[device] = {block, bytes};
    in_use += bytes;
    most = std::max(most, in_use);
    return device;
}

bool retire(uint64_t device) {
    std::lock_guard lock(mutex);
    auto found = allocations.find(device);
    if (found == allocations.end() || found->second.retired) return false;
    found->second.retired = true;
    return true;
}

void release(uint64_t device) {
    std::lock_guard lock(mutex);
    auto found = allocations.find(device);
    Allocation a = found->second;
    if (!intact(a)) ELBO_FAIL("a write beyond the %zu bytes at %#lx, found when they were freed", a.bytes, device);
    std::memset(a.block, FILL, a.bytes + 2 * RED_ZONE);
    std::free(a.block);
    in_use -= a.bytes;
    allocations.erase(found);
}

bool is_device(uint64_t address) { return address >= DEVICE; }

void* argument(uint64_t device, size_t alignment, const char* kernel, int index) {
    if (!device) return nullptr;
    std::lock_guard lock(mutex);
    if (!usable(device))
        ELBO_FAIL("argument %d of kernel %s, %#lx, is no device memory (freed, on the host, or not a pointer)", index, kernel, device);
    if (device % alignment) ELBO_FAIL("argument %d of kernel %s, %#lx, is not aligned to %zu bytes", index, kernel, device, alignment);
    return reinterpret_cast<void*>(device - DEVICE);
}

void check_red_zones(uint64_t device, const std::string& what) {
    std::lock_guard lock(mutex);
    auto found = find(device);
    if (found != allocations.end() && !intact(found->second))
        ELBO_FAIL("%s wrote beyond an allocation of %zu bytes", what.c_str(), found->second.bytes);
}
}  // namespace memory

extern "C" void* elbo_emulated_memory(uint64_t device, size_t bytes, const char* what) {
    std::lock_guard lock(mutex);
    const Allocation* found = usable(device);
    if (!found) ELBO_FAIL("%s: %#lx is no device memory (freed, or on the host)", what, device);
    size_t room = reinterpret_cast<uint64_t>(found->block + RED_ZONE) + DEVICE + found->bytes - device;
    if (bytes > room) ELBO_FAIL("%s: %zu bytes at %#lx, of which only %zu are allocated", what, bytes, device, room);
    return reinterpret_cast<void*>(device - DEVICE);
}

extern "C" void elbo_emulated_scribble(const void* stream, const void* device, size_t bytes, const char* what) {
    if (!bytes) return;
    auto host = emulated<char>(device, bytes, what);
    later(stream, what, [=] { std::memset(host, FILL, bytes); });
}
