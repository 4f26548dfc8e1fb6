// Shared by the fake CUDA libraries: how they report errors, and how a device address becomes host memory.
//
// Device addresses are host addresses moved by a constant that no process can map. Host code that reads through a device
// pointer, and a library that forgets to ask `elbo_emulated_memory`, therefore crash here as they would on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

extern "C" {
// Host memory of the device range [device, device + bytes). Aborts unless the range is inside one live allocation.
void* elbo_emulated_memory(uint64_t device, size_t bytes, const char* what);
// Fills a device range with NaNs in the order of the stream, since a workspace may contain anything after use.
void elbo_emulated_scribble(const void* stream, const void* device, size_t bytes, const char* what);
// Aborts if `stream` was never created or is already destroyed.
void elbo_emulated_stream(const void* stream, const char* what);
// Whether this thread has a current context; the libraries need one.
int elbo_emulated_context();
// Calls run(data) in the order of the stream: see queue.cpp.
void elbo_emulated_later(const void* stream, void (*run)(void*), void* data, const char* what);
}

#define ELBO_FAIL(...)                                     \
    do {                                                   \
        std::fprintf(stderr, "emulated CUDA: " __VA_ARGS__); \
        std::fprintf(stderr, "\n");                        \
        std::abort();                                      \
    } while (0)

// Adds work to a stream. Everything `work` captures must outlive the call.
template <class F>
void later(const void* stream, const char* what, F work) {
    elbo_emulated_later(stream, [](void* data) { (*std::unique_ptr<F>(static_cast<F*>(data)))(); }, new F(std::move(work)), what);
}

template <class T>
T* emulated(const void* device, size_t bytes, const char* what) {
    return static_cast<T*>(elbo_emulated_memory(reinterpret_cast<uint64_t>(device), bytes, what));
}
