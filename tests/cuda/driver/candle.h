// Additions to cuda_on_cpu.h for candle's own kernels: half types with operators, and a few intrinsics.
//
// candle's sources are compiled unchanged (see build.sh), for compute capability 8.0. Its FP8 kernels compile, but abort when
// they run.
#pragma once

#define __half elbo_plain_half  // ours have no operators; the names are candle's here
#define __half2 elbo_plain_half2
#define __nv_bfloat16 elbo_plain_bfloat16
#define __nv_bfloat162 elbo_plain_bfloat162
#define __half2float elbo_plain_half2float
#define __bfloat162float elbo_plain_bfloat162float
#define __float2bfloat16_rn elbo_plain_float2bfloat16_rn
#include "cuda_on_cpu.h"
#undef __half
#undef __half2
#undef __nv_bfloat16
#undef __nv_bfloat162
#undef __half2float
#undef __bfloat162float
#undef __float2bfloat16_rn

#include "emulated.h"

#include <cassert>
#include <limits>
#include <math.h>
#include <stdint.h>
#include <type_traits>

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

// A 16-bit float: every operation is done in f32 and rounded once.
template <uint16_t (*encode)(float), float (*decode)(uint16_t)>
struct __attribute__((may_alias)) Small {
    uint16_t bits;
    Small() = default;
    template <class N, class = std::enable_if_t<std::is_arithmetic_v<N>>>
    Small(N value) : bits(encode(static_cast<float>(value))) {}
    operator float() const { return decode(bits); }
    friend Small operator-(Small a) { return -float(a); }
    friend Small operator+(Small a, Small b) { return float(a) + float(b); }
    friend Small operator-(Small a, Small b) { return float(a) - float(b); }
    friend Small operator*(Small a, Small b) { return float(a) * float(b); }
    friend Small operator/(Small a, Small b) { return float(a) / float(b); }
    friend Small& operator+=(Small& a, Small b) { return a = a + b; }
    friend Small& operator-=(Small& a, Small b) { return a = a - b; }
    friend Small& operator*=(Small& a, Small b) { return a = a * b; }
    friend Small& operator/=(Small& a, Small b) { return a = a / b; }
    friend bool operator==(Small a, Small b) { return float(a) == float(b); }
    friend bool operator!=(Small a, Small b) { return float(a) != float(b); }
    friend bool operator<(Small a, Small b) { return float(a) < float(b); }
    friend bool operator<=(Small a, Small b) { return float(a) <= float(b); }
    friend bool operator>(Small a, Small b) { return float(a) > float(b); }
    friend bool operator>=(Small a, Small b) { return float(a) >= float(b); }
    friend bool __hisnan(Small a) { return std::isnan(float(a)); }
    friend Small __habs(Small a) { return std::fabs(float(a)); }
    friend Small __hmax_nan(Small a, Small b) { return __hisnan(a) || a > b ? a : b; }
    friend Small __hmin_nan(Small a, Small b) { return __hisnan(a) || a < b ? a : b; }
    friend Small hsqrt(Small a) { return std::sqrt(float(a)); }
    friend Small hexp(Small a) { return std::exp(float(a)); }
    friend Small hlog(Small a) { return std::log(float(a)); }
    friend Small hsin(Small a) { return std::sin(float(a)); }
    friend Small hcos(Small a) { return std::cos(float(a)); }
};
using __half = Small<elbo_cuda::float_to_half, elbo_cuda::half_to_float>;
using __nv_bfloat16 = Small<elbo_cuda::float_to_bfloat, elbo_cuda::bfloat_to_float>;

struct __attribute__((aligned(4), may_alias)) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }

inline float __half2float(__half a) { return a; }
inline __half __float2half(float a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) {
    __half a;
    a.bits = bits;
    return a;
}

struct __nv_fp8_e4m3 {
    unsigned char __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float) { ELBO_FAIL("an FP8 kernel of candle is not implemented"); }
};
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(unsigned char, int) { ELBO_FAIL("an FP8 kernel of candle is not implemented"); }

// Integer and float helpers of CUDA's global namespace.
template <class A, class B>
auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) > T(b) ? T(a) : T(b);
}
inline float normcdff(float x) { return 0.5f * erfcf(-x * float(M_SQRT1_2)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
template <class To, class From>
To elbo_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned a) { return elbo_bits<float>(a); }
inline float __int_as_float(int a) { return elbo_bits<float>(a); }
inline unsigned __float_as_uint(float a) { return elbo_bits<unsigned>(a); }
inline int __float_as_int(float a) { return elbo_bits<int>(a); }
inline double __longlong_as_double(long long a) { return elbo_bits<double>(a); }
inline long long __double_as_longlong(double a) { return elbo_bits<long long>(a); }

// Only one thread of a launch runs at a time, so these are atomic.
template <class T>
T atomicCAS(T* at, T expected, T value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <class T, class V>
T atomicAdd(T* at, V value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <class T, class V>
T atomicMin(T* at, V value) {
    T old = *at;
    *at = min(old, T(value));
    return old;
}
template <class T, class V>
T atomicMax(T* at, V value) {
    T old = *at;
    *at = max(old, T(value));
    return old;
}

namespace cuda::std {
template <class T>
using numeric_limits = ::std::numeric_limits<T>;
}
