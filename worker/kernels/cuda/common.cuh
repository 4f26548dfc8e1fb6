// Code shared by the kernels: element types, 16-byte vectors, sums over a warp, and instructions that CUDA C++ has no
// name for. Arithmetic is in f32, rounded once when stored. No kernel uses atomics, and the order of every sum depends
// only on the shape of one image, so an image's result has the same bits whatever else is in its batch.
#pragma once

#ifndef ELBO_CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
/// Threads per block of every kernel except attention.
constexpr u32 THREADS = 256;
/// Elements a thread moves at a time if the layout allows: 16 bytes of a half type, 32 of f32.
constexpr u32 VECTOR = 8;

/// Defines `name`_f32, `name`_f16 and `name`_bf16 through `define(T, suffix)`.
#define ELBO_EACH_TYPE(define) define(float, f32) define(__half, f16) define(__nv_bfloat16, bf16)

// ---- conversions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <typename Pair>
__device__ __forceinline__ u32 bits_of(Pair pair) {
    u32 bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

/// Two elements of a half type in one register, the first in the low bits.
template <typename T>
__device__ __forceinline__ u32 pack_pair(float low, float high);
template <>
__device__ __forceinline__ u32 pack_pair<__half>(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
}
template <>
__device__ __forceinline__ u32 pack_pair<__nv_bfloat16>(float low, float high) {
    return bits_of(__floats2bfloat162_rn(low, high));
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(u32 pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(u32 pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(u32 pair) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// ---- memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool aligned(const void* address) { return (reinterpret_cast<u64>(address) & 15) == 0; }

/// N elements as stored in memory: one, or VECTOR moved 16 bytes at a time (their address must be a multiple of 16).
template <u32 N, typename T>
struct Elements;
template <typename T>
struct Elements<1, T> {
    T value;
};
template <>
struct Elements<VECTOR, float> {
    float4 low, high;
};
template <>
struct Elements<VECTOR, __half> {
    uint4 words;
};
template <>
struct Elements<VECTOR, __nv_bfloat16> {
    uint4 words;
};

template <u32 N, typename T>
__device__ __forceinline__ Elements<N, T> fetch(const T* from) {
    return *reinterpret_cast<const Elements<N, T>*>(from);
}
template <u32 N, typename T>
__device__ __forceinline__ void put(T* to, const Elements<N, T>& elements) {
    *reinterpret_cast<Elements<N, T>*>(to) = elements;
}

template <u32 N, typename T>
__device__ __forceinline__ void unpack(const Elements<N, T>& from, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = to_float(from.value);
    } else if constexpr (sizeof(T) == 4) {
        to[0] = from.low.x, to[1] = from.low.y, to[2] = from.low.z, to[3] = from.low.w;
        to[4] = from.high.x, to[5] = from.high.y, to[6] = from.high.z, to[7] = from.high.w;
    } else {
        const float2 a = unpack_pair<T>(from.words.x), b = unpack_pair<T>(from.words.y);
        const float2 c = unpack_pair<T>(from.words.z), d = unpack_pair<T>(from.words.w);
        to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
        to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;
    }
}

template <u32 N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    unpack<N, T>(fetch<N>(from), to);
}

template <u32 N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    Elements<N, T> elements;
    if constexpr (N == 1) {
        elements.value = from_float<T>(from[0]);
    } else if constexpr (sizeof(T) == 4) {
        elements.low = make_float4(from[0], from[1], from[2], from[3]);
        elements.high = make_float4(from[4], from[5], from[6], from[7]);
    } else {
        elements.words = make_uint4(pack_pair<T>(from[0], from[1]), pack_pair<T>(from[2], from[3]), pack_pair<T>(from[4], from[5]),
                                    pack_pair<T>(from[6], from[7]));
    }
    put<N>(to, elements);
}

/// Index of an image's row: `rows[image]`, or the image's own index if `rows` is null.
__device__ __forceinline__ u32 row_of(const u32* rows, u32 image) { return rows ? rows[image] : image; }

// ---- indices ------------------------------------------------------------------------------------------------------

/// First index and step of a grid-stride loop.
__device__ __forceinline__ u64 grid_index() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 grid_step() { return u64(gridDim.x) * blockDim.x; }

/// Quotient and remainder. 64-bit division is slow on a GPU and seldom needed.
__device__ __forceinline__ u64 divide(u64 value, u32 by, u32& remainder) {
    if (value >> 32) {
        remainder = u32(value % by);
        return value / by;
    }
    remainder = u32(value) % by;
    return u32(value) / by;
}

// ---- sums ---------------------------------------------------------------------------------------------------------

/// Sum over aligned runs of `width` lanes (a power of two), the same bits in each lane.
template <u32 width = WARP, typename V>
__device__ __forceinline__ V lane_sum(V value) {
#pragma unroll
    for (u32 distance = width / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

/// Maximum over aligned runs of `width` lanes (a power of two).
template <u32 width = WARP>
__device__ __forceinline__ float lane_max(float value) {
#pragma unroll
    for (u32 distance = width / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

// ---- activations --------------------------------------------------------------------------------------------------

/// x / (1 + exp(-x)); half types use the fast exponential, whose error is below their rounding.
template <typename T>
__device__ __forceinline__ float sigmoid_times(float x, float argument) {
    if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-argument));
    return __fdividef(x, 1.0f + __expf(-argument));
}

template <typename T>
__device__ __forceinline__ float silu(float x) {
    return sigmoid_times<T>(x, x);
}

__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// ---- instructions -------------------------------------------------------------------------------------------------

#ifdef ELBO_CUDA_ON_CPU

__device__ __forceinline__ float exp2_fast(float x) { return exp2f(x); }
using elbo_cuda::cp_async_16;
using elbo_cuda::cp_async_commit;
template <u32 pending>
__device__ __forceinline__ void cp_async_wait() {
    elbo_cuda::cp_async_wait(pending);
}
template <bool transposed>
__device__ __forceinline__ void ldmatrix_x4(u32 (&out)[4], const void* row) {
    elbo_cuda::ldmatrix_x4(out, row, transposed);
}
using elbo_cuda::mma_16816;
#define ELBO_DYNAMIC_SHARED(name) unsigned char* const name = elbo_cuda::dynamic_shared()

#else

/// 2^x to 2 ulp, 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 shared_address(const void* address) {
    return static_cast<u32>(__cvta_generic_to_shared(address));
}

/// Copies the first `bytes` (0 to 16) of 16 bytes into shared memory and zeroes the others, asynchronously.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
}

/// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `pending` groups of this thread are in flight.
template <u32 pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Four 8 x 8 matrices of a half type; lane 8 i + r gives the address of row r of matrix i.
template <bool transposed>
__device__ __forceinline__ void ldmatrix_x4(u32 (&out)[4], const void* row) {
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(shared_address(row))
                     : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8], f32 sums.
template <typename T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
__device__ __forceinline__ void mma_16816<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define ELBO_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif
