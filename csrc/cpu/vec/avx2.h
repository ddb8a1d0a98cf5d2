// The vector layer for AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace metate::cpu::METATE_ISA {
namespace {

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
// n = 4 or width floats, again and again.
template <int n>
METATE_FN vf repeat(const float* p) {
    if constexpr (n == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return load(p);
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
// a less its nearest whole number.
METATE_FN vf rest_of_round(vf a) {
    return a - _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
METATE_FN void store(int32_t* p, vi x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
// The first n <= 4·width bytes, zeros after them.
METATE_FN vi load_bytes(const uint8_t* p, int64_t n) {
    if (n >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    uint8_t copy[32] = {};
    for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(copy));
}
METATE_FN vi bit_and(vi a, vi b) {
    return _mm256_and_si256(a, b);
}
METATE_FN vi bit_or(vi a, vi b) {
    return _mm256_or_si256(a, b);
}
METATE_FN vi shift_left(vi a, int n) {
    return _mm256_slli_epi32(a, n);
}
METATE_FN vi shift_right(vi a, int n) {  // zeros move in
    return _mm256_srli_epi32(a, n);
}
METATE_FN vi to_int(vf a) {
    return _mm256_cvtps_epi32(a);
}
// The first n <= width bytes, one in each lane.
template <class T>
METATE_FN __m128i load_eight_bytes(const T* p, int64_t n) {
    if (n >= width) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    T copy[16] = {};
    for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(copy));
}
METATE_FN vi load_wide(const uint8_t* p, int64_t n) {
    return _mm256_cvtepu8_epi32(load_eight_bytes(p, n));
}
METATE_FN vi load_wide(const int8_t* p, int64_t n) {
    return _mm256_cvtepi8_epi32(load_eight_bytes(p, n));
}

// The first n <= width e4m3 numbers, divided by e4m3_unit (finite ones: as f16 they are that much smaller); zeros
// after.
constexpr float e4m3_unit = 256.0f;
METATE_FN vf load_e4m3(const uint8_t* p, int64_t n) {
    const __m128i codes = load_eight_bytes(p, n), spread = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    const vf x = _mm256_cvtph_ps(_mm_and_si128(spread, _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
    const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    return _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)));
}

// The lowest byte of each lane, side by side.
METATE_FN void store_bytes(uint8_t* p, vi x) {
    const vi low = _mm256_shuffle_epi8(x, splat(0x0c080400));  // a copy in every dword of its half
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
// Sums of neighbouring products: of two 16-bit numbers in each lane, and of two bytes, unsigned times signed, in each
// half of a lane, clipped to 16 bits.
METATE_FN vi multiply_words(vi a, vi b) {
    return _mm256_madd_epi16(a, b);
}
METATE_FN vi multiply_bytes(vi a, vi b) {
    return _mm256_maddubs_epi16(a, b);
}
METATE_FN vi multiply(vi a, vi b) {  // the low halves of products
    return _mm256_mullo_epi32(a, b);
}
METATE_FN vi add_words(vi a, vi b) {
    return _mm256_add_epi16(a, b);
}

#define METATE_HAS_BYTE_SHUFFLES 1
// In every 16 bytes, those of `table` that the low four bits of `index` name; indices are below 128.
METATE_FN vi lookup_bytes(vi table, vi index) {
    return _mm256_shuffle_epi8(table, index);
}
METATE_FN vi add_clipped_bytes(vi a, vi b) {  // unsigned
    return _mm256_adds_epu8(a, b);
}
METATE_FN vi shift_right_words(vi a, int n) {
    return _mm256_srli_epi16(a, n);
}
constexpr int clip_pairs = 1;
// Bit i: byte i of the sums over all 16 bytes of a[0], then of b[0], and of `more` is below 255.
METATE_FN uint64_t below_clip(const vi (&a)[clip_pairs], const vi (&b)[clip_pairs], const uint8_t* more) {
    const vi sums =
        add_clipped_bytes(_mm256_permute2x128_si256(a[0], b[0], 0x20), _mm256_permute2x128_si256(a[0], b[0], 0x31));
    const vi all = add_clipped_bytes(sums, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(more)));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(all, _mm256_set1_epi8(-1))));
}

// Sixteen floats, looked up by the low four bits of each lane.
struct Table16 {
    vf low, high;
};
METATE_FN Table16 table16(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
METATE_FN vf lookup(const Table16& table, vi index) {
    const vf low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, as_float(shift_left(index, 28)));
}
METATE_FN vf gather(const float* p, vi index) {
    return _mm256_i32gather_ps(p, index, 4);
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
#pragma GCC unroll 16
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        const vf low = r[i], high = r[i + 4];
        r[i] = _mm256_permute2f128_ps(low, high, 0x20);
        r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}

// Of the elements of a and then b: a becomes those at even places, b those at odd ones.
METATE_FN void separate(vf& a, vf& b) {
    const auto ordered = [](vf x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
    const vf odds = ordered(_mm256_shuffle_ps(a, b, 0xdd));
    a = ordered(_mm256_shuffle_ps(a, b, 0x88));
    b = odds;
}
// The way back.
METATE_FN void interleave(vf& a, vf& b) {
    const vf low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
}

// Stores past the caches to an aligned place; stream_end() before others may look.
METATE_FN void stream(float* p, vf x) {
    _mm256_stream_ps(p, x);
}
METATE_FN void stream(bf16* p, vf x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x));
}
METATE_FN void stream(f16* p, vf x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
METATE_FN void stream_end() {
    _mm_sfence();
}

// Lane i is the sum of rows[i].
METATE_FN vf sum_rows(const vf (&rows)[width]) {
    const auto pair = [](__m256 a) { return _mm256_castps_pd(a); };
    __m256 halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const vf* r = rows + 4 * i;
        const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
        const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
        halves[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(pair(a), pair(b))),
                                  _mm256_castpd_ps(_mm256_unpackhi_pd(pair(a), pair(b))));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
                         _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
}

// Within every 16 bytes, lane j of r[i] changes places with lane i of r[j].
METATE_FN void transpose_parts(vi (&r)[4]) {
    const vi low0 = _mm256_unpacklo_epi32(r[0], r[1]), low1 = _mm256_unpacklo_epi32(r[2], r[3]);
    const vi high0 = _mm256_unpackhi_epi32(r[0], r[1]), high1 = _mm256_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm256_unpacklo_epi64(low0, low1);
    r[1] = _mm256_unpackhi_epi64(low0, low1);
    r[2] = _mm256_unpacklo_epi64(high0, high1);
    r[3] = _mm256_unpackhi_epi64(high0, high1);
}

// What transpose() makes of rows of 32 bytes, `stride` bytes apart: halves of rows are put together as they are loaded.
METATE_FN void load_transposed(vf (&r)[width], const uint8_t* p, int64_t stride) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
        __m256 q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto part = [&](int row) {
                return _mm_loadu_ps(reinterpret_cast<const float*>(p + row * stride) + 4 * c);
            };
            q[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(i)), part(i + 4), 1);
        }
        const auto pair = [](__m256 a) { return _mm256_castps_pd(a); };
        const __m256d low0 = pair(_mm256_unpacklo_ps(q[0], q[1])), low1 = pair(_mm256_unpacklo_ps(q[2], q[3]));
        const __m256d high0 = pair(_mm256_unpackhi_ps(q[0], q[1])), high1 = pair(_mm256_unpackhi_ps(q[2], q[3]));
        r[4 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(low0, low1));
        r[4 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low0, low1));
        r[4 * c + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high0, high1));
        r[4 * c + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high0, high1));
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
