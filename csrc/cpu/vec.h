// A vector of `width` floats and what kernels do with it, for the instruction set of this pass.
//
// vf holds floats, vi as many 32-bit integers, vm one truth value per lane. Loads and stores take any address, and the
// forms with a count touch no byte beyond the first `n` elements. 16-bit floats exist in memory only: load widens,
// store rounds to nearest even. With METATE_HAS_BF16_DOT a lane of vi can also be a pair of bfloat16.
#pragma once

// METATE_EMULATE_BF16 builds the avx512bf16 pass for machines without VDPBF16PS, bit for bit, for tests.
#if defined(__AVX512BF16__) || defined(METATE_EMULATE_BF16)
#define METATE_HAS_BF16_DOT 1
#endif

namespace metate::cpu::METATE_ISA {
namespace {
#if defined(METATE_HAS_BF16_DOT)
constexpr bool only_bf16 = true;  // calls of other dtypes take the avx512 pass
#else
constexpr bool only_bf16 = false;
#endif
}  // namespace
}  // namespace metate::cpu::METATE_ISA

#if defined(__AVX512F__)
#include "vec/avx512.h"
#elif defined(__AVX2__)
#include "vec/avx2.h"
#else
#include "vec/baseline.h"
#endif

#include "arithmetic.h"

namespace metate::cpu::METATE_ISA {
namespace {

#if !defined(__AVX512F__)
template <class T>
METATE_FN vf load_16_bit(const T* p, int64_t n) {
    T copy[width] = {};
    for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
    return load(copy);
}
METATE_FN vf load(const bf16* p, int64_t n) {
    return load_16_bit(p, n);
}
METATE_FN vf load(const f16* p, int64_t n) {
    return load_16_bit(p, n);
}

template <class T>
METATE_FN void store_16_bit(T* p, vf x, int64_t n) {
    T copy[width];
    store(copy, x);
    for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}
METATE_FN void store(bf16* p, vf x, int64_t n) {
    store_16_bit(p, x, n);
}
METATE_FN void store(f16* p, vf x, int64_t n) {
    store_16_bit(p, x, n);
}
#endif

// sum + a · b, of floats or of pairs of bfloat16.
METATE_FN vf add_product(vf sum, vf a, vf b) {
    return fma(a, b, sum);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf add_product(vf sum, vi a, vi b) {
    return dot(sum, a, b);
}
#endif

// Functions.

// 2^x within 2.3 ulp for x < 128; 0 below -125.5, so that no result is subnormal; NaN for NaN. 2^0 is 1. Several
// vectors step by step together: one alone waits for its own results most of the time.
template <int n>
METATE_FN void exp2(vf (&x)[n]) {
    constexpr float coefficients[] = {0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    vf rest[n], p[n];
    vm live[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        live[i] = not_less(x[i], splat(-125.5f));
        rest[i] = rest_of_round(x[i]);
        x[i] = x[i] - rest[i];
        p[i] = splat(0x1.5bba14p-10f);
    }
#pragma GCC unroll 5
    for (const float c : coefficients) {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) p[i] = fma(p[i], rest[i], splat(c));
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] = scale_by_power(p[i], x[i], live[i]);
}

METATE_FN vf exp2(vf x) {
    vf one[1] = {x};
    exp2(one);
    return one[0];
}

// Within 2 ulp, NaN for NaN.
METATE_FN vf tanh(vf x) {
    const vf size = abs(x), square = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fma(p, square, splat(2.06390887954e-2f));
    p = fma(p, square, splat(-5.37397155531e-2f));
    p = fma(p, square, splat(1.33314422036e-1f));
    p = fma(p, square, splat(-3.33332819422e-1f));
    const vf near_zero = fma(p * square, x, x);
    const vf power = exp2(min(splat(30.0f), size) * splat(2.8853900817779268f));
    const vf far = splat(1.0f) - splat(2.0f) / (power + splat(1.0f));
    const vf with_sign = select(less(x, splat(0.0f)), splat(0.0f) - far, far);
    return select(less(size, splat(0.625f)), near_zero, with_sign);
}

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.69314718055994531f;

}  // namespace
}  // namespace metate::cpu::METATE_ISA
