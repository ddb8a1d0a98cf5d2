// Conversions between float and the 16-bit types (round to nearest even), and the special function unit's
// approximations.
#pragma once

#include "platform.h"

namespace metate::cuda::arch {

// Two elements in one register, `low` at the lower address.
template <typename T>
METATE_DEVICE uint32_t pack(float low, float high) {
    static_assert(is_same<T, bf16> || is_same<T, f16>);
#if defined(__CUDACC__)
    uint32_t packed;
    if constexpr (is_same<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
#else
    return emulator::round(is_same<T, bf16>, low) | static_cast<uint32_t>(emulator::round(is_same<T, bf16>, high))
                                                        << 16;
#endif
}

template <typename T>
METATE_DEVICE T from_float(float value) {
    static_assert(is_same<T, bf16> || is_same<T, f16>);
#if defined(__CUDACC__)
    T result;
    if constexpr (is_same<T, bf16>) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    }
    return result;
#else
    return {emulator::round(is_same<T, bf16>, value)};
#endif
}

METATE_DEVICE float to_float(float value) {
    return value;
}

METATE_DEVICE float to_float(bf16 value) {
#if defined(__CUDACC__)
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
    return emulator::widen(true, value.bits);
#endif
}

METATE_DEVICE float to_float(f16 value) {
#if defined(__CUDACC__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    return emulator::widen(false, value.bits);
#endif
}

template <typename T>
METATE_DEVICE float low(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed)});
}

template <typename T>
METATE_DEVICE float high(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed >> 16)});
}

METATE_DEVICE uint32_t bits_of(float value) {
#if defined(__CUDACC__)
    return __float_as_uint(value);
#else
    return __builtin_bit_cast(uint32_t, value);
#endif
}

METATE_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(float, bits);
#endif
}

// a·b, rounded before it meets a sum.
METATE_DEVICE float product(float a, float b) {
#if defined(__CUDACC__)
    return __fmul_rn(a, b);
#else
    volatile const float rounded = a * b;
    return rounded;
#endif
}

// The same value, of which the compiler no longer knows where it comes from: what is computed from it inside a loop
// stays there, instead of holding registers across the loop.
template <typename T>
METATE_DEVICE T opaque(T value) {
#if defined(__CUDACC__)
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(value));
    } else {
        asm volatile("" : "+r"(value));
    }
#endif
    return value;
}

// The number of the lowest set bit of a word that has one.
METATE_DEVICE int lowest_bit(uint32_t word) {
#if defined(__CUDACC__)
    return __ffs(static_cast<int>(word)) - 1;
#else
    return __builtin_ctz(word);
#endif
}

// How many bits of a word are set.
METATE_DEVICE int count_bits(uint32_t word) {
#if defined(__CUDACC__)
    return __popc(word);
#else
    return __builtin_popcount(word);
#endif
}

#if defined(__CUDACC__)
#define METATE_UNARY(instruction, name)                 \
    METATE_DEVICE float name(float x) {                 \
        float y;                                        \
        asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
        return y;                                       \
    }
#else
#define METATE_UNARY(instruction, name) \
    METATE_DEVICE float name(float x) { \
        return emulator::name(x);       \
    }
#endif
METATE_UNARY("ex2.approx.ftz.f32", fast_exp2)  // relative error 2^-22; -inf gives 0
METATE_UNARY("lg2.approx.ftz.f32", fast_log2)  // absolute error 2^-22 in (0.5, 2), relative elsewhere; 0 gives -inf
METATE_UNARY("rcp.approx.ftz.f32", fast_reciprocal)  // relative error 2^-23; 0 gives inf
METATE_UNARY("tanh.approx.f32", fast_tanh)           // relative error 2^-11
#undef METATE_UNARY

}  // namespace metate::cuda::arch
