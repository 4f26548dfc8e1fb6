// Element types of cuBLAS and cuDNN on the CPU, converted to and rounded from f32.
#pragma once

#include <cstdint>
#include <cstring>

namespace number {
enum Type { F32, F16, BF16 };

inline size_t bytes(Type type) { return type == F32 ? 4 : 2; }

inline float bits(uint32_t pattern) {
    float value;
    std::memcpy(&value, &pattern, 4);
    return value;
}

inline uint32_t pattern(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Bf16 {
    uint16_t bits;
};
inline float get(float x) { return x; }
inline float get(_Float16 x) { return x; }
inline float get(Bf16 x) { return bits(uint32_t(x.bits) << 16); }
inline void set(float& to, float x) { to = x; }
inline void set(_Float16& to, float x) { to = static_cast<_Float16>(x); }
inline void set(Bf16& to, float x) {  // to the nearest, ties to even
    uint32_t b = pattern(x);
    to.bits = x != x ? 0x7FFF : static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

// An f32 operand as a tensor core reads it if TF32 is allowed: 10 bits of mantissa, rounded to nearest.
inline float tf32(float x) { return x - x != 0 ? x : bits((pattern(x) + 0x1000) & ~0x1FFFu); }

// Calls f with a null pointer of the C++ type behind `type`.
template <class F>
auto visit(Type type, F f) {
    switch (type) {
        case F16: return f(static_cast<_Float16*>(nullptr));
        case BF16: return f(static_cast<Bf16*>(nullptr));
        default: return f(static_cast<float*>(nullptr));
    }
}

inline float load(Type type, const void* base, size_t index) {
    return visit(type, [&](auto* t) { return get(static_cast<decltype(t)>(const_cast<void*>(base))[index]); });
}

inline void store(Type type, void* base, size_t index, float value) {
    visit(type, [&](auto* t) { set(static_cast<decltype(t)>(base)[index], value); });
}
}  // namespace number
