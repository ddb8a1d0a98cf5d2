// A vector of `width` floats and what kernels do with it, for the instruction set of this pass.
//
// vf holds floats, vi as many 32-bit integers, vm one truth value per lane. Loads and stores take any address, and the
// forms with a count touch no byte beyond the first `n` elements. 16-bit floats exist in memory only: load widens,
// store rounds to nearest even. With METATE_HAS_BF16_DOT a lane of vi can also be a pair of bfloat16.
#pragma once

#include "isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// METATE_EMULATE_BF16 builds the avx512bf16 pass for machines without VDPBF16PS, bit for bit, for tests.
#if defined(__AVX512BF16__) || defined(METATE_EMULATE_BF16)
#define METATE_HAS_BF16_DOT 1
#endif

namespace metate::cpu::METATE_ISA {
namespace {

#define METATE_FN METATE_INLINE

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Scalar conversions.

template <class To, class From>
METATE_FN To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

METATE_FN float to_float(float x) {
    return x;
}
METATE_FN float to_float(bf16 x) {
    return bit_cast<float>(uint32_t{x.bits} << 16);
}
METATE_FN float to_float(f16 x) {
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
    const float tiny = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -tiny : tiny;
}

template <class T>
T from_float(float x);
template <>
METATE_FN float from_float<float>(float x) {
    return x;
}
template <>
METATE_FN bf16 from_float<bf16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
METATE_FN f16 from_float<f16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 31 << 15, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (rest >= 0x38800000u)
        return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13)};
    // Below the normal range the addition itself rounds: 0.5 has the smallest f16 step as its last bit.
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u))};
}

#if defined(__AVX512F__)

constexpr int width = 16;
using vf = __m512;
using vi = __m512i;
using vm = __mmask16;

METATE_FN vm mask_of(uint32_t bits) {
    return static_cast<vm>(bits);
}  // lane i: bit i
METATE_FN uint32_t bits_of(vm m) {
    return m;
}
METATE_FN vm first(int64_t n) {
    return static_cast<vm>((1u << n) - 1);
}  // n <= width

METATE_FN vf splat(float x) {
    return _mm512_set1_ps(x);
}
METATE_FN vi splat(int32_t x) {
    return _mm512_set1_epi32(x);
}
METATE_FN vi lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
METATE_FN vf load(const float* p) {
    return _mm512_loadu_ps(p);
}
METATE_FN vf load(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first(n), p);
}
METATE_FN void store(float* p, vf x) {
    _mm512_storeu_ps(p, x);
}
METATE_FN void store(float* p, vf x, int64_t n) {
    _mm512_mask_storeu_ps(p, first(n), x);
}
METATE_FN vf widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
METATE_FN vf load(const bf16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
METATE_FN vf load(const bf16* p, int64_t n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
METATE_FN vf load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
METATE_FN vf load(const f16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}

METATE_FN vf fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
METATE_FN vf max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}  // b where either is NaN
METATE_FN vf min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
METATE_FN vf abs(vf a) {
    return _mm512_abs_ps(a);
}
METATE_FN vf round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
METATE_FN vm less(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
METATE_FN vm not_less(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
}
METATE_FN vm equal(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
METATE_FN vm is_nan(vf a) {
    return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
}
METATE_FN vf select(vm m, vf a, vf b) {
    return _mm512_mask_blend_ps(m, b, a);
}
METATE_FN vi select(vm m, vi a, vi b) {
    return _mm512_mask_blend_epi32(m, b, a);
}
METATE_FN float sum(vf a) {
    return _mm512_reduce_add_ps(a);
}
METATE_FN float largest(vf a) {
    return _mm512_reduce_max_ps(a);
}

METATE_FN vi load(const int32_t* p) {
    return _mm512_loadu_si512(p);
}
METATE_FN vi add(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
METATE_FN vi sub(vi a, vi b) {
    return _mm512_sub_epi32(a, b);
}
METATE_FN vi exor(vi a, vi b) {
    return _mm512_xor_si512(a, b);
}
METATE_FN vi abs(vi a) {
    return _mm512_abs_epi32(a);
}
METATE_FN vm below_unsigned(vi a, vi b) {
    return _mm512_cmplt_epu32_mask(a, b);
}
METATE_FN vf to_float(vi a) {
    return _mm512_cvtepi32_ps(a);
}
METATE_FN vf as_float(vi a) {
    return _mm512_castsi512_ps(a);
}
METATE_FN vi as_int(vf a) {
    return _mm512_castps_si512(a);
}
// The 64-bit products of unsigned lanes.
METATE_FN void multiply(vi a, vi b, vi& high, vi& low) {
    const vi even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
// p · 2^n for whole n, 0 where m is false; a NaN in p stays.
METATE_FN vf scale_by_power(vf p, vf n, vm m) {
    return _mm512_maskz_scalef_ps(m, p, n);
}

METATE_FN __m256i narrow_bf16(vf x) {
    const vi bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), splat(1));
    const vi rounded = _mm512_srli_epi32(add(bits, add(odd, splat(0x7fff))), 16);
    const vi quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), splat(0x40));
    return _mm512_cvtepi32_epi16(select(is_nan(x), quiet, rounded));
}
METATE_FN __m256i narrow_f16(vf x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
METATE_FN void store(bf16* p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
METATE_FN void store(bf16* p, vf x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(x));
}
METATE_FN void store(f16* p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x));
}
METATE_FN void store(f16* p, vf x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_f16(x));
}

METATE_FN void transpose(vf (&r)[width]) {
    vf t[width];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}

#elif defined(__AVX2__)

constexpr int width = 8;
using vf = __m256;
using vi = __m256i;
struct vm {
    __m256i lanes;
};

METATE_FN vf splat(float x) {
    return _mm256_set1_ps(x);
}
METATE_FN vi splat(int32_t x) {
    return _mm256_set1_epi32(x);
}
METATE_FN vi lanes() {
    return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}
METATE_FN vm mask_of(uint32_t bits) {
    const vi bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {_mm256_cmpeq_epi32(_mm256_and_si256(splat(static_cast<int32_t>(bits)), bit), bit)};
}
METATE_FN uint32_t bits_of(vm m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m.lanes)));
}
METATE_FN vm first(int64_t n) {
    return {_mm256_cmpgt_epi32(splat(static_cast<int32_t>(n)), lanes())};
}
METATE_FN vf load(const float* p) {
    return _mm256_loadu_ps(p);
}
METATE_FN vf load(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, first(n).lanes);
}
METATE_FN void store(float* p, vf x) {
    _mm256_storeu_ps(p, x);
}
METATE_FN void store(float* p, vf x, int64_t n) {
    _mm256_maskstore_ps(p, first(n).lanes, x);
}
METATE_FN vf widen_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
METATE_FN vf load(const bf16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
METATE_FN vf load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

METATE_FN vf fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
METATE_FN vf max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}  // b where either is NaN
METATE_FN vf min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
METATE_FN vf abs(vf a) {
    return _mm256_andnot_ps(splat(-0.0f), a);
}
METATE_FN vf round(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
METATE_FN vm less(vf a, vf b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ))};
}
METATE_FN vm not_less(vf a, vf b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_NLT_UQ))};
}
METATE_FN vm equal(vf a, vf b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))};
}
METATE_FN vm is_nan(vf a) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q))};
}
METATE_FN vf select(vm m, vf a, vf b) {
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m.lanes));
}
METATE_FN vi select(vm m, vi a, vi b) {
    return _mm256_blendv_epi8(b, a, m.lanes);
}
METATE_FN float sum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
METATE_FN float largest(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

METATE_FN vi load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
METATE_FN vi add(vi a, vi b) {
    return _mm256_add_epi32(a, b);
}
METATE_FN vi sub(vi a, vi b) {
    return _mm256_sub_epi32(a, b);
}
METATE_FN vi exor(vi a, vi b) {
    return _mm256_xor_si256(a, b);
}
METATE_FN vi abs(vi a) {
    return _mm256_abs_epi32(a);
}
METATE_FN vm below_unsigned(vi a, vi b) {
    const vi top = splat(INT32_MIN);
    return {_mm256_cmpgt_epi32(exor(b, top), exor(a, top))};
}
METATE_FN vf to_float(vi a) {
    return _mm256_cvtepi32_ps(a);
}
METATE_FN vf as_float(vi a) {
    return _mm256_castsi256_ps(a);
}
METATE_FN vi as_int(vf a) {
    return _mm256_castps_si256(a);
}
// The 64-bit products of unsigned lanes.
METATE_FN void multiply(vi a, vi b, vi& high, vi& low) {
    const vi even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// p · 2^n for whole n, 0 where m is false; a NaN in p stays, for n is then NaN and converts to a multiple of 2^9.
METATE_FN vf scale_by_power(vf p, vf n, vm m) {
    const vi shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(_mm256_castsi256_ps(m.lanes), as_float(add(as_int(p), shifted)));
}

METATE_FN __m128i narrow_bf16(vf x) {
    const vi bits = as_int(x), high = _mm256_srli_epi32(bits, 16), odd = _mm256_and_si256(high, splat(1));
    const vi rounded = _mm256_srli_epi32(add(bits, add(odd, splat(0x7fff))), 16);
    const vi chosen = select(is_nan(x), _mm256_or_si256(high, splat(0x40)), rounded);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
METATE_FN void store(bf16* p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x));
}
METATE_FN void store(f16* p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

METATE_FN void transpose(vf (&r)[width]) {
    vf t[width];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const vf low = r[i], high = r[i + 4];
        r[i] = _mm256_permute2f128_ps(low, high, 0x20);
        r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}

#else

constexpr int width = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint64_t vl __attribute__((vector_size(16)));
struct vm {
    vi lanes;
};

METATE_FN vf splat(float x) {
    return vf{x, x, x, x};
}
METATE_FN vi splat(int32_t x) {
    return vi{x, x, x, x};
}
METATE_FN vi lanes() {
    return vi{0, 1, 2, 3};
}
METATE_FN vm mask_of(uint32_t bits) {
    return {(splat(static_cast<int32_t>(bits)) & vi{1, 2, 4, 8}) != 0};
}
METATE_FN uint32_t bits_of(vm m) {
    const vi bit = m.lanes & vi{1, 2, 4, 8};
    return static_cast<uint32_t>(bit[0] | bit[1] | bit[2] | bit[3]);
}
METATE_FN vm first(int64_t n) {
    return {lanes() < splat(static_cast<int32_t>(n))};
}
METATE_FN vf load(const float* p) {
    vf x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
METATE_FN void store(float* p, vf x) {
    __builtin_memcpy(p, &x, sizeof x);
}
METATE_FN vf load(const float* p, int64_t n) {
    vf x = {};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
METATE_FN void store(float* p, vf x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}
METATE_FN vf load(const bf16* p) {
    return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
METATE_FN vf load(const f16* p) {
    return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

METATE_FN vf fma(vf a, vf b, vf c) {
    return a * b + c;
}
METATE_FN vf max(vf a, vf b) {
    return a > b ? a : b;
}  // b where either is NaN
METATE_FN vf min(vf a, vf b) {
    return a < b ? a : b;
}
METATE_FN vf abs(vf a) {
    return (vf)((vi)a & INT32_MAX);
}
// Magnitudes below 2^22. Opaque, or the compiler would fold the two additions.
METATE_FN vf round(vf a) {
    vf shifted = a + 0x1.8p23f;
    __asm__("" : "+m"(shifted));
    return shifted - 0x1.8p23f;
}
METATE_FN vm less(vf a, vf b) {
    return {a < b};
}
METATE_FN vm not_less(vf a, vf b) {
    return {~(a < b)};
}
METATE_FN vm equal(vf a, vf b) {
    return {a == b};
}
METATE_FN vm is_nan(vf a) {
    return {a != a};
}
METATE_FN vf select(vm m, vf a, vf b) {
    return (vf)(((vi)a & m.lanes) | ((vi)b & ~m.lanes));
}
METATE_FN vi select(vm m, vi a, vi b) {
    return (a & m.lanes) | (b & ~m.lanes);
}
METATE_FN float sum(vf a) {
    return (a[0] + a[2]) + (a[1] + a[3]);
}
METATE_FN float largest(vf a) {
    const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}

METATE_FN vi load(const int32_t* p) {
    vi x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
METATE_FN vi add(vi a, vi b) {
    return (vi)((vu)a + (vu)b);
}
METATE_FN vi sub(vi a, vi b) {
    return (vi)((vu)a - (vu)b);
}
METATE_FN vi exor(vi a, vi b) {
    return a ^ b;
}
METATE_FN vi abs(vi a) {
    return a < 0 ? sub(splat(0), a) : a;
}
METATE_FN vm below_unsigned(vi a, vi b) {
    return {(vu)a < (vu)b};
}
METATE_FN vf to_float(vi a) {
    return __builtin_convertvector(a, vf);
}
METATE_FN vf as_float(vi a) {
    return (vf)a;
}
METATE_FN vi as_int(vf a) {
    return (vi)a;
}
// The 64-bit products of unsigned lanes.
METATE_FN void multiply(vi a, vi b, vi& high, vi& low) {
    const vl low_half = {0xffffffffu, 0xffffffffu};
    const vl even = ((vl)a & low_half) * ((vl)b & low_half), odd = ((vl)a >> 32) * ((vl)b >> 32);
    low = (vi)((even & low_half) | odd << 32);
    high = (vi)(even >> 32 | (odd & ~low_half));
}
// p · 2^n for whole n, 0 where m is false; a NaN in p stays.
METATE_FN vf scale_by_power(vf p, vf n, vm m) {
    const vi power = __builtin_convertvector(select({m.lanes & (n == n)}, n, splat(0.0f)), vi);
    return (vf)(add((vi)p, power << 23) & m.lanes);
}

template <class T>
METATE_FN void store_16_bit(T* p, vf x) {
    for (int i = 0; i < width; ++i) p[i] = from_float<T>(x[i]);
}
METATE_FN void store(bf16* p, vf x) {
    store_16_bit(p, x);
}
METATE_FN void store(f16* p, vf x) {
    store_16_bit(p, x);
}

METATE_FN void transpose(vf (&r)[width]) {
    vf t[width];
    for (int i = 0; i < 4; ++i) t[i] = vf{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < 4; ++i) r[i] = t[i];
}

#endif

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

#if defined(METATE_HAS_BF16_DOT)
// Pairs of bfloat16: the earlier element in the low half of a lane.
METATE_FN vi load_pairs(const bf16* p) {
    return _mm512_loadu_si512(p);
}
METATE_FN vi load_pairs(const bf16* p, int64_t n) {  // n < 2·width elements, zeros after them
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << n) - 1), p);
}
// Lane c is the pair (a[c], b[c]).
METATE_FN vi join_pairs(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
METATE_FN vi zip(const bf16* a, const bf16* b) {
    return join_pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}
METATE_FN vi zip(const bf16* a, const bf16* b, int64_t n) {
    return join_pairs(_mm256_maskz_loadu_epi16(first(n), a), _mm256_maskz_loadu_epi16(first(n), b));
}
// Whether any of the 2·width elements is infinite or NaN.
METATE_FN bool any_not_finite(vi pairs) {
    const vi exponent = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent) != 0;
}

#if defined(METATE_EMULATE_BF16)
// Subnormal numbers count as zeros of their sign.
METATE_FN vf flush(vf x) {
    const vm tiny = _mm512_cmp_ps_mask(_mm512_abs_ps(x), splat(0x1p-126f), _CMP_LT_OQ);
    return _mm512_mask_and_ps(x, tiny, x, splat(-0.0f));
}
METATE_FN vf dot(vf sum, vi a, vi b) {
    const vi high = splat(static_cast<int32_t>(0xffff0000u));
    const vf a1 = flush(as_float(_mm512_and_si512(a, high))), b1 = flush(as_float(_mm512_and_si512(b, high)));
    const vf a0 = flush(as_float(_mm512_slli_epi32(a, 16))), b0 = flush(as_float(_mm512_slli_epi32(b, 16)));
    return flush(fma(a0, b0, flush(fma(a1, b1, flush(sum)))));
}
// The floats of low, then those of high, as 2·width bfloat16.
METATE_FN vi narrow_pairs(vf low, vf high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(flush(low))), narrow_bf16(flush(high)), 1);
}
#else
METATE_FN vf dot(vf sum, vi a, vi b) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
METATE_FN vi narrow_pairs(vf low, vf high) {
    return bit_cast<vi>(_mm512_cvtne2ps_pbh(high, low));
}
#endif
#endif

// Functions.

// 2^x within 2.3 ulp for x < 128; 0 below -125.5, so that no result is subnormal; NaN for NaN. 2^0 is 1.
METATE_FN vf exp2(vf x) {
    const vf whole = round(x), r = x - whole;
    vf p = splat(0x1.5bba14p-10f);
    p = fma(p, r, splat(0x1.3cea88p-7f));
    p = fma(p, r, splat(0x1.c6b752p-5f));
    p = fma(p, r, splat(0x1.ebf9bcp-3f));
    p = fma(p, r, splat(0x1.62e42ap-1f));
    p = fma(p, r, splat(1.0f));
    return scale_by_power(p, whole, not_less(x, splat(-125.5f)));
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
