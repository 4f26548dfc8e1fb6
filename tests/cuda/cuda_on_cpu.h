// Runs CUDA kernels on the CPU: with this header included before it, a .cu file is plain C++17.
//
// The threads of a block are fibers on one OS thread, so a kernel's barriers, shuffles and shared memory behave as
// they do on a GPU, while blocks run one after another. Warp-wide instructions (shuffles, votes, ldmatrix, mma.sync)
// run once, by the last lane to arrive, on the operands of all 32 lanes, with the fragment layouts of the PTX ISA
// ("Warp-level matrix instructions"). Beyond the values of a result, it checks:
//
// - dynamic shared memory starts as NaN, and a guard behind it must survive the block;
// - an asynchronous copy lands only when it is waited for, and its destination is NaN until then;
// - lanes that meet in different warp-wide instructions, or never meet, end the program with a message;
// - `elbo_cuda_reverse` runs warps and lanes in the opposite order: a result that changes has a race.
//
// It says nothing about speed, registers, bank conflicts or the memory model.
//
// Use: include this file, then the .cu files, then
// `elbo_cuda_launch([&] { kernel(arguments...); }, grid, block, dynamic_shared_bytes)`. Launches from several OS threads
// at once are independent of each other.
#pragma once

// Makes the kernels' common.cuh take its instructions from here.
#ifndef ELBO_CUDA_ON_CPU
#define ELBO_CUDA_ON_CPU
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks on one OS thread never overlap, so a static variable of that thread belongs to one block.
#define __shared__ static thread_local

// ---- vector types -------------------------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __attribute__((aligned(8), may_alias)) uint2 {
    unsigned x, y;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
    unsigned x, y, z, w;
};
struct __attribute__((aligned(8), may_alias)) float2 {
    float x, y;
};
struct __attribute__((aligned(16), may_alias)) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- half precision -----------------------------------------------------------------------------------------------

struct __attribute__((may_alias)) __half {
    uint16_t bits;
};
struct __attribute__((may_alias)) __nv_bfloat16 {
    uint16_t bits;
};
struct __attribute__((aligned(4), may_alias)) __half2 {
    __half x, y;
};
struct __attribute__((aligned(4), may_alias)) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace elbo_cuda {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

/// IEEE binary16, subnormals included.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

/// Round to nearest, ties to even.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) return sign | uint16_t(std::lrintf(std::fabs(value) * 0x1p24f));
    return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(uint16_t value) { return bits_float(uint32_t(value) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace elbo_cuda

inline float __half2float(__half value) { return elbo_cuda::half_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {elbo_cuda::float_to_half(value)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return elbo_cuda::bfloat_to_float(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {elbo_cuda::float_to_bfloat(value)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {__bfloat162float(value.x), __bfloat162float(value.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline unsigned max(unsigned x, unsigned y) { return x < y ? y : x; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T>
inline T __ldg(const T* address) {
    return *address;
}

// ---- fibers -------------------------------------------------------------------------------------------------------

/// Runs warps and lanes last to first.
inline bool elbo_cuda_reverse = false;

namespace elbo_cuda {

constexpr unsigned LANES = 32, MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 256, MAX_DYNAMIC_SHARED = 227 << 10;
constexpr unsigned char GUARD = 0xa5, UNINITIALISED = 0xff;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

/// A lane's operands and result of a warp-wide instruction.
union Operands {
    uint64_t word;
    const void* address;
    uint32_t registers[4];
    float result[4];
    struct {
        uint32_t a[4], b[2];
        float c[4];
    } matrix;
};

/// cp.async of one thread.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    uint64_t group;
};

enum class State { Ready, AtWarp, AtBlock, Done };

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    unsigned char* stack;
    uint3 thread;
    unsigned warp, lane;
    State state;
    uint64_t awaited;  // generation of the barrier that the fiber waits for
    std::vector<Copy> copies;
    uint64_t committed;
};

struct Warp {
    unsigned lanes, arrived;
    uint64_t generation;
    const void* instruction;
    Operands operands[2][LANES];  // by parity of the generation: a fast lane may be one instruction ahead
};

struct Block {
    const std::function<void()>* kernel;
    dim3 grid, size;
    uint3 index;
    unsigned threads, alive, arrived;
    uint64_t generation;
    Fiber* running;
#if defined(__x86_64__)
    void* scheduler;
#else
    ucontext_t scheduler;
#endif
    std::unique_ptr<Fiber[]> fibers;
    std::unique_ptr<Warp[]> warps;
    unsigned char* stacks;
    unsigned char* shared;
    size_t shared_bytes;

    Block() : fibers(new Fiber[MAX_THREADS]), warps(new Warp[MAX_THREADS / LANES]) {
        stacks = static_cast<unsigned char*>(mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) fail("no memory for the stacks");
        shared = static_cast<unsigned char*>(std::aligned_alloc(1024, MAX_DYNAMIC_SHARED + 1024));
    }
    ~Block() {
        munmap(stacks, MAX_THREADS * STACK_BYTES);
        std::free(shared);
    }
};

inline Block& block() {
    static thread_local Block instance;
    return instance;
}

#if defined(__x86_64__)
/// Saves the callee-saved registers and the stack pointer in `*from` (rdi), continues at `to` (rsi).
__attribute__((naked, noinline)) inline void switch_stack(void** /* from */, void* /* to */) {
    asm volatile(
        "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void to_scheduler(Block& b) { switch_stack(&b.running->stack_pointer, b.scheduler); }
inline void to_fiber(Block& b, Fiber& fiber) {
    b.running = &fiber;
    switch_stack(&b.scheduler, fiber.stack_pointer);
}
#else
inline void to_scheduler(Block& b) { swapcontext(&b.running->context, &b.scheduler); }
inline void to_fiber(Block& b, Fiber& fiber) {
    b.running = &fiber;
    swapcontext(&b.scheduler, &fiber.context);
}
#endif

inline void release_if_all_arrived(Block& b) {
    if (b.arrived == 0 || b.arrived < b.alive) return;
    b.arrived = 0;
    ++b.generation;
}

inline void fiber_main() {
    Block& b = block();
    (*b.kernel)();
    b.running->state = State::Done;
    --b.alive;
    release_if_all_arrived(b);
    to_scheduler(b);
    fail("a finished thread was resumed");
}

inline void prepare(Fiber& fiber) {
#if defined(__x86_64__)
    // The state that switch_stack leaves: six registers, the return address, and the alignment after a call.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline bool runnable(const Block& b, const Fiber& fiber) {
    switch (fiber.state) {
        case State::Ready: return true;
        case State::AtWarp: return b.warps[fiber.warp].generation != fiber.awaited;
        case State::AtBlock: return b.generation != fiber.awaited;
        case State::Done: return false;
    }
    return false;
}

inline void run_block(Block& b) {
    const unsigned warps = (b.threads + LANES - 1) / LANES;
    b.alive = b.threads;
    b.arrived = 0;
    for (unsigned w = 0; w < warps; ++w) {
        Warp& warp = b.warps[w];
        warp.lanes = b.threads - w * LANES < LANES ? b.threads - w * LANES : LANES;
        warp.arrived = 0;
        warp.generation = 0;
    }
    for (unsigned t = 0; t < b.threads; ++t) {
        Fiber& fiber = b.fibers[t];
        fiber.stack = b.stacks + t * STACK_BYTES;
        fiber.thread = {t % b.size.x, t / b.size.x % b.size.y, t / (b.size.x * b.size.y)};
        fiber.warp = t / LANES;
        fiber.lane = t % LANES;
        fiber.state = State::Ready;
        fiber.copies.clear();
        fiber.committed = 0;
        prepare(fiber);
    }
    std::memset(b.shared, UNINITIALISED, b.shared_bytes);
    std::memset(b.shared + b.shared_bytes, GUARD, GUARD_BYTES);

    while (b.alive > 0) {
        bool progress = false;
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned w = elbo_cuda_reverse ? warps - 1 - i : i;
            const unsigned lanes = b.warps[w].lanes;
            for (bool again = true; again;) {
                again = false;
                for (unsigned j = 0; j < lanes; ++j) {
                    Fiber& fiber = b.fibers[w * LANES + (elbo_cuda_reverse ? lanes - 1 - j : j)];
                    if (!runnable(b, fiber)) continue;
                    fiber.state = State::Ready;
                    to_fiber(b, fiber);
                    again = progress = true;
                }
            }
        }
        if (!progress) fail("deadlock: some lanes of a warp, or threads of a block, never reach a barrier others wait at");
    }
    for (size_t i = 0; i < GUARD_BYTES; ++i)
        if (b.shared[b.shared_bytes + i] != GUARD) fail("a write past the end of dynamic shared memory");
}

/// One warp-wide instruction: `execute` sees the operands of all lanes and leaves each lane's result in place.
template <typename Execute>
inline Operands warp_wide(const void* instruction, const Operands& mine, Execute execute) {
    Block& b = block();
    Fiber& fiber = *b.running;
    Warp& warp = b.warps[fiber.warp];
    Operands* operands = warp.operands[warp.generation & 1];
    if (warp.arrived == 0) warp.instruction = instruction;
    if (warp.instruction != instruction) fail("lanes of a warp meet in different instructions");
    operands[fiber.lane] = mine;
    if (++warp.arrived == warp.lanes) {
        execute(operands);
        warp.arrived = 0;
        ++warp.generation;
    } else {
        fiber.state = State::AtWarp;
        fiber.awaited = warp.generation;
        to_scheduler(b);
    }
    return operands[fiber.lane];
}

template <typename T>
inline Operands pack(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Operands operands{};
    std::memcpy(&operands.word, &value, sizeof(T));
    return operands;
}

template <typename T, typename Source>
inline T shuffle(unsigned mask, T value, const void* instruction, Source source) {
    if (mask != 0xffffffffu) fail("only full warps shuffle here");
    const Operands result = warp_wide(instruction, pack(value), [&](Operands* lanes) {
        uint64_t before[LANES];
        for (unsigned i = 0; i < LANES; ++i) before[i] = lanes[i].word;
        for (unsigned i = 0; i < LANES; ++i) lanes[i].word = before[source(i)];
    });
    T out;
    std::memcpy(&out, &result.word, sizeof(T));
    return out;
}

/// Bits of the lanes whose predicate holds.
inline unsigned ballot(unsigned mask, bool predicate) {
    static const char instruction = 0;
    if (mask != 0xffffffffu) fail("only full warps vote here");
    return unsigned(warp_wide(&instruction, pack(uint64_t(predicate)), [](Operands* lanes) {
                        uint64_t votes = 0;
                        for (unsigned i = 0; i < LANES; ++i) votes |= (lanes[i].word & 1) << i;
                        for (unsigned i = 0; i < LANES; ++i) lanes[i].word = votes;
                    }).word);
}

// ---- instructions that common.cuh wraps ---------------------------------------------------------------------------

inline unsigned char* dynamic_shared() { return block().shared; }

inline void check_alignment(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("a 16-byte access to an address that is not a multiple of 16");
}

/// cp.async.cg.shared.global 16: the first `bytes` are copied, the rest becomes zero.
inline void cp_async_16(void* to, const void* from, unsigned bytes) {
    check_alignment(to);
    if (bytes) check_alignment(from);
    Fiber& fiber = *block().running;
    std::memset(to, UNINITIALISED, 16);
    fiber.copies.push_back({to, from, bytes, fiber.committed});
}

inline void cp_async_commit() { ++block().running->committed; }

/// cp.async.wait_group: all but the newest `pending` groups have landed.
inline void cp_async_wait(unsigned pending) {
    Fiber& fiber = *block().running;
    size_t kept = 0;
    for (const Copy& copy : fiber.copies) {
        if (copy.group + pending < fiber.committed) {
            if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
            std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
        } else {
            fiber.copies[kept++] = copy;
        }
    }
    fiber.copies.resize(kept);
}

/// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane 8 i + r holds the address of row r of matrix i; lane l gets
/// elements 2 (l % 4) and the next of row l / 4, or of column l / 4 when transposed.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, bool transposed) {
    static const char plain = 0, trans = 0;
    check_alignment(row);
    Operands mine{};
    mine.address = row;
    const Operands result = warp_wide(transposed ? &trans : &plain, mine, [&](Operands* lanes) {
        uint16_t matrix[4][8][8];
        for (unsigned i = 0; i < LANES; ++i) std::memcpy(matrix[i / 8][i % 8], lanes[i].address, 16);
        for (unsigned i = 0; i < LANES; ++i)
            for (unsigned m = 0; m < 4; ++m) {
                const unsigned major = i / 4, minor = 2 * (i % 4);
                const uint16_t low = transposed ? matrix[m][minor][major] : matrix[m][major][minor];
                const uint16_t high = transposed ? matrix[m][minor + 1][major] : matrix[m][major][minor + 1];
                lanes[i].registers[m] = low | uint32_t(high) << 16;
            }
    });
    std::memcpy(out, result.registers, sizeof out);
}

inline float element(uint32_t pair, unsigned half, __half) { return half_to_float(uint16_t(pair >> (16 * half))); }
inline float element(uint32_t pair, unsigned half, __nv_bfloat16) { return bfloat_to_float(uint16_t(pair >> (16 * half))); }

/// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: c += a b.
template <typename T>
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static const char instruction = 0;
    Operands mine;
    std::memcpy(mine.matrix.a, a, sizeof a);
    std::memcpy(mine.matrix.b, b, sizeof b);
    std::memcpy(mine.matrix.c, c, sizeof c);
    const Operands result = warp_wide(&instruction, mine, [](Operands* lanes) {
        float left[16][16], right[16][8], sum[16][8];
        for (unsigned i = 0; i < LANES; ++i) {
            const unsigned group = i / 4, pair = 2 * (i % 4);
            for (unsigned r = 0; r < 4; ++r)
                for (unsigned h = 0; h < 2; ++h)
                    left[group + 8 * (r & 1)][pair + h + 8 * (r >> 1)] = element(lanes[i].matrix.a[r], h, T{});
            for (unsigned r = 0; r < 2; ++r)
                for (unsigned h = 0; h < 2; ++h) right[pair + h + 8 * r][group] = element(lanes[i].matrix.b[r], h, T{});
            for (unsigned r = 0; r < 4; ++r) sum[group + 8 * (r >> 1)][pair + (r & 1)] = lanes[i].matrix.c[r];
        }
        for (unsigned m = 0; m < 16; ++m)
            for (unsigned k = 0; k < 16; ++k)
                for (unsigned n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
        for (unsigned i = 0; i < LANES; ++i)
            for (unsigned r = 0; r < 4; ++r) lanes[i].result[r] = sum[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)];
    });
    std::memcpy(c, result.result, sizeof c);
}

}  // namespace elbo_cuda

#define threadIdx (elbo_cuda::block().running->thread)
#define blockIdx (elbo_cuda::block().index)
#define blockDim (elbo_cuda::block().size)
#define gridDim (elbo_cuda::block().grid)

inline void __syncthreads() {
    elbo_cuda::Block& b = elbo_cuda::block();
    elbo_cuda::Fiber& fiber = *b.running;
    const uint64_t generation = b.generation;
    ++b.arrived;
    elbo_cuda::release_if_all_arrived(b);
    if (b.generation == generation) {
        fiber.state = elbo_cuda::State::AtBlock;
        fiber.awaited = generation;
        elbo_cuda::to_scheduler(b);
    }
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    static const char instruction = 0;
    if (mask != 0xffffffffu) elbo_cuda::fail("only full warps synchronise here");
    elbo_cuda::warp_wide(&instruction, elbo_cuda::Operands{}, [](elbo_cuda::Operands*) {});
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    static const char instruction = 0;
    return elbo_cuda::shuffle(mask, value, &instruction, [=](unsigned lane) {
        const unsigned source = lane ^ unsigned(lanes);
        return source / unsigned(width) == lane / unsigned(width) ? source : lane;
    });
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    static const char instruction = 0;
    return elbo_cuda::shuffle(mask, value, &instruction, [=](unsigned lane) {
        return lane % unsigned(width) + delta < unsigned(width) ? lane + delta : lane;
    });
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    static const char instruction = 0;
    return elbo_cuda::shuffle(mask, value, &instruction, [=](unsigned lane) {
        return lane / unsigned(width) * unsigned(width) + unsigned(source) % unsigned(width);
    });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return elbo_cuda::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return elbo_cuda::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return elbo_cuda::ballot(mask, predicate != 0) == 0xffffffffu; }

/// Runs `kernel` once for each thread of each block, and returns when all have finished.
inline void elbo_cuda_launch(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > elbo_cuda::MAX_THREADS) elbo_cuda::fail("a block has 1 to 1024 threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) elbo_cuda::fail("invalid grid");
    if (dynamic_shared_bytes > elbo_cuda::MAX_DYNAMIC_SHARED) elbo_cuda::fail("more than 227 KiB of shared memory");
    elbo_cuda::Block& b = elbo_cuda::block();
    b.kernel = &kernel;
    b.grid = grid;
    b.size = block;
    b.threads = unsigned(threads);
    b.shared_bytes = dynamic_shared_bytes;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                b.index = {x, y, z};
                elbo_cuda::run_block(b);
            }
}
