// The kernels that the fake driver can launch. `build.sh` wraps every .cu file in a translation unit that registers its entry
// points here. A launch unpacks the driver's void** by the type of the function.
#pragma once

#include "cuda_on_cpu.h"
#include "memory.h"

#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace kernels {
struct Launch {
    const char* name;
    void** slots;
    dim3 grid, block;
    size_t shared;
    const void* stream;
};

// The first number of __launch_bounds__(...).
constexpr unsigned bound(unsigned threads = 1024, unsigned = 0, unsigned = 0) { return threads; }

struct Kernel {
    const char* source;  // "elbo/norm", "candle/unary"
    const char* name;
    void (*run)(const Launch&);
    unsigned max_threads;  // __launch_bounds__
};

std::vector<Kernel>& all();

struct Register {
    Register(const char* source, const char* name, void (*run)(const Launch&), unsigned max_threads) { all().push_back({source, name, run, max_threads}); }
};

// One argument of type `T`. Pointers are checked and become host pointers.
template <class T>
T unpack(const Launch& launch, size_t index, std::vector<uint64_t>& touched) {
    static_assert(std::is_pointer_v<T> || sizeof(T) <= 8, "an argument by value could hide a device pointer");
    T value;
    std::memcpy(static_cast<void*>(&value), launch.slots[index], sizeof value);
    if constexpr (std::is_pointer_v<T>) {
        auto device = reinterpret_cast<uint64_t>(value);
        touched.push_back(device);
        constexpr size_t alignment = alignof(std::conditional_t<std::is_void_v<std::remove_pointer_t<T>>, char, std::remove_pointer_t<T>>);
        value = static_cast<T>(memory::argument(device, alignment, launch.name, static_cast<int>(index)));
    }
    return value;
}

// Like elbo_cuda_launch, but without a fiber per thread: for kernels whose threads never wait for each other.
template <class F>
void launch_flat(F kernel, dim3 grid, dim3 size) {
    elbo_cuda::Block& block = elbo_cuda::block();
    elbo_cuda::Fiber& thread = block.fibers[0];
    block.grid = grid;
    block.size = size;
    block.running = &thread;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block.index = {x, y, z};
                for (unsigned c = 0; c < size.z; c++)
                    for (unsigned b = 0; b < size.y; b++)
                        for (unsigned a = 0; a < size.x; a++) thread.thread = {a, b, c}, kernel();
            }
}

template <bool FLAT, class... A, size_t... I>
void call(void (*kernel)(A...), const Launch& launch, std::index_sequence<I...>) {
    std::vector<uint64_t> touched;
    std::tuple<A...> arguments{unpack<A>(launch, I, touched)...};
    later(launch.stream, launch.name, [=] {
        auto thread = [&] { std::apply(kernel, arguments); };
        if constexpr (FLAT) launch_flat(thread, launch.grid, launch.block);
        else elbo_cuda_launch(thread, launch.grid, launch.block, launch.shared);
        for (uint64_t device : touched) memory::check_red_zones(device, std::string("kernel ") + launch.name);
    });
}

template <bool FLAT, class... A>
void run(void (*kernel)(A...), const Launch& launch) {
    call<FLAT>(kernel, launch, std::index_sequence_for<A...>{});
}

template <auto kernel>
void entry(const Launch& launch) {
    run<false>(kernel, launch);
}

template <auto kernel>
void flat_entry(const Launch& launch) {
    run<true>(kernel, launch);
}
}  // namespace kernels
