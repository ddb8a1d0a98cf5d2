// The vector layer for AVX-512 F, BW, DQ and VL, and pairs of bfloat16 where their dot product exists.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace metate::cpu::METATE_ISA {
namespace {

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
// n = 4, 8 or width floats, again and again.
template <int n>
METATE_FN vf repeat(const float* p) {
    if constexpr (n == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (n == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return load(p);
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

#define METATE_HAS_HALVES 1
// The first half of the lanes of a and the second half of those of b.
METATE_FN vf join_halves(vf a, vf b) {
    return _mm512_mask_blend_ps(0xff00, a, b);
}
METATE_FN vi join_halves(vi a, vi b) {
    return _mm512_mask_blend_epi32(0xff00, a, b);
}
METATE_FN vf load_halves(const float* a, const float* b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
METATE_FN void store_halves(float* a, float* b, vf x) {
    _mm256_storeu_ps(a, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(b, _mm512_extractf32x8_ps(x, 1));
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
// a less its nearest whole number; 0 for an infinite a.
METATE_FN vf rest_of_round(vf a) {
    return _mm512_reduce_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
METATE_FN void store(int32_t* p, vi x) {
    _mm512_storeu_si512(p, x);
}
// The first n <= 4·width bytes, zeros after them.
METATE_FN vi load_bytes(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
}
METATE_FN vi bit_and(vi a, vi b) {
    return _mm512_and_si512(a, b);
}
METATE_FN vi bit_or(vi a, vi b) {
    return _mm512_or_si512(a, b);
}
METATE_FN vi shift_left(vi a, int n) {
    return _mm512_slli_epi32(a, static_cast<unsigned>(n));
}
METATE_FN vi shift_right(vi a, int n) {  // zeros move in
    return _mm512_srli_epi32(a, static_cast<unsigned>(n));
}
METATE_FN vi to_int(vf a) {
    return _mm512_cvtps_epi32(a);
}
// The first n <= width bytes, one in each lane.
METATE_FN vi load_wide(const uint8_t* p, int64_t n) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p));
}
METATE_FN vi load_wide(const int8_t* p, int64_t n) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p));
}

// The first n <= width e4m3 numbers, divided by e4m3_unit (finite ones: as f16 they are that much smaller); zeros
// after.
constexpr float e4m3_unit = 256.0f;
METATE_FN vf load_e4m3(const uint8_t* p, int64_t n) {
    const __m128i codes = _mm_maskz_loadu_epi8(first(n), p);
    const __m256i spread = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    const vf x = _mm512_cvtph_ps(_mm256_and_si256(spread, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
    return _mm512_mask_mov_ps(x, nan, splat(__builtin_nanf("")));
}

// Sums of neighbouring products: of two 16-bit numbers in each lane, and of two bytes, unsigned times signed, in each
// half of a lane, clipped to 16 bits.
METATE_FN vi multiply_words(vi a, vi b) {
    return _mm512_madd_epi16(a, b);
}
METATE_FN vi multiply_bytes(vi a, vi b) {
    return _mm512_maddubs_epi16(a, b);
}
METATE_FN vi multiply(vi a, vi b) {  // the low halves of products
    return _mm512_mullo_epi32(a, b);
}
METATE_FN vi add_words(vi a, vi b) {
    return _mm512_add_epi16(a, b);
}
// The lowest byte of each lane, side by side.
METATE_FN void store_bytes(uint8_t* p, vi x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

#define METATE_HAS_BYTE_SHUFFLES 1
// In every 16 bytes, those of `table` that the low four bits of `index` name; indices are below 128.
METATE_FN vi lookup_bytes(vi table, vi index) {
    return _mm512_shuffle_epi8(table, index);
}
METATE_FN vi add_clipped_bytes(vi a, vi b) {  // unsigned
    return _mm512_adds_epu8(a, b);
}
METATE_FN vi shift_right_words(vi a, int n) {
    return _mm512_srli_epi16(a, static_cast<unsigned>(n));
}
constexpr int clip_pairs = 2;
// Bit i: byte i of the sums over all 16 bytes of a[0], then of b[0], a[1] and b[1], and of `more` is below 255.
METATE_FN uint64_t below_clip(const vi (&a)[clip_pairs], const vi (&b)[clip_pairs], const uint8_t* more) {
    vi halves[clip_pairs];
    for (int i = 0; i < clip_pairs; ++i)
        halves[i] = add_clipped_bytes(_mm512_shuffle_i64x2(a[i], b[i], 0x44), _mm512_shuffle_i64x2(a[i], b[i], 0xee));
    const vi sums = add_clipped_bytes(_mm512_shuffle_i64x2(halves[0], halves[1], 0x88),
                                      _mm512_shuffle_i64x2(halves[0], halves[1], 0xdd));
    return _mm512_cmpneq_epi8_mask(add_clipped_bytes(sums, _mm512_loadu_si512(more)), _mm512_set1_epi8(-1));
}

#define METATE_HAS_WORD_SHUFFLES 1
// 256 bytes to look up.
struct Table256 {
    vi quarters[4];
};
// The entry that each byte names: where isa() is avx512vbmi or more.
METATE_FN vi vbmi_lookup_bytes(const Table256& table, vi index) {
    vi first = index, second = index;
    __asm__("vpermi2b %2, %1, %0" : "+v"(first) : "v"(table.quarters[0]), "v"(table.quarters[1]));
    __asm__("vpermi2b %2, %1, %0" : "+v"(second) : "v"(table.quarters[2]), "v"(table.quarters[3]));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second);
}
// The entry of 128 that the low seven bits of each byte name: where isa() is avx512vbmi or more.
METATE_FN vi vbmi_lookup_bytes(vi first, vi last, vi index) {
    __asm__("vpermi2b %2, %1, %0" : "+v"(index) : "v"(first), "v"(last));
    return index;
}
// Bit i: byte i is at most `most`, unsigned.
METATE_FN uint64_t bytes_at_most(vi a, uint8_t most) {
    return _mm512_cmple_epu8_mask(a, _mm512_set1_epi8(static_cast<int8_t>(most)));
}
// In every word, the entry that the low byte of `low` and the high byte of `high` name, which are the same number. Word
// w of the table holds entry w in its low and entry w + 128 in its high byte.
METATE_FN vi lookup_words(const Table256& table, vi low, vi high) {
    const vi first = _mm512_permutex2var_epi16(table.quarters[0], low, table.quarters[1]);
    const vi second = _mm512_permutex2var_epi16(table.quarters[2], low, table.quarters[3]);
    const vi pair = _mm512_mask_blend_epi16(_mm512_movepi16_mask(_mm512_slli_epi16(high, 1)), first, second);
    const vi byte = _mm512_mask_blend_epi16(_mm512_movepi16_mask(high), _mm512_set1_epi16(1), _mm512_set1_epi16(256));
    return _mm512_maddubs_epi16(pair, byte);
}
METATE_FN vi shift_left_words(vi a, int n) {
    return _mm512_slli_epi16(a, static_cast<unsigned>(n));
}
// 32 bytes from a, then 32 from b.
METATE_FN vi load_halves(const uint8_t* a, const uint8_t* b) {
    const vi low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    return _mm512_inserti64x4(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
}
// The low halves of the lanes, side by side.
METATE_FN void store_words(uint16_t* p, vi x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
// The even words of 64 at p, or the odd ones.
METATE_FN vi load_every_other(const uint16_t* p, int odd) {
    const vi index = _mm512_add_epi16(_mm512_set1_epi16(static_cast<int16_t>(odd)),
                                      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                                       30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0));
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(p), index, _mm512_loadu_si512(p + 32));
}
// Bit 2 i: word i of `even` is at most `most`, unsigned; bit 2 i + 1: that of `odd`.
METATE_FN uint64_t at_most(vi even, vi odd, uint16_t most) {
    const vi bound = _mm512_set1_epi16(static_cast<int16_t>(most));
    return _pdep_u64(_mm512_cmple_epu16_mask(even, bound), 0x5555555555555555u) |
           _pdep_u64(_mm512_cmple_epu16_mask(odd, bound), 0xaaaaaaaaaaaaaaaau);
}
METATE_FN vi add_clipped_words(vi a, vi b) {  // unsigned
    return _mm512_adds_epu16(a, b);
}

#define METATE_HAS_VNNI_FORMS 1
// sum + the products of four bytes, unsigned times signed: where isa() is avx512vnni or more.
METATE_FN void vnni_add_dot(vi& sum, vi a, vi b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
// sum + the products of two words: where isa() is avx512vnni or more.
METATE_FN void vnni_add_word_dot(vi& sum, vi a, vi b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
METATE_FN vi shift_right_signed_words(vi a, unsigned n) {
    return _mm512_srai_epi16(a, n);
}
METATE_FN vi sub_words(vi a, vi b) {
    return _mm512_sub_epi16(a, b);
}
// Two rows: the elements of each 16 bytes of a and b side by side, first their first four, then, in b, their last four.
METATE_FN void zip_parts(vi& a, vi& b) {
    const vi low = _mm512_unpacklo_epi16(a, b);
    b = _mm512_unpackhi_epi16(a, b);
    a = low;
}
// The same of bytes, eight of each sixteen at a time.
METATE_FN void zip_bytes(vi& a, vi& b) {
    const vi low = _mm512_unpacklo_epi8(a, b);
    b = _mm512_unpackhi_epi8(a, b);
    a = low;
}
// Two lanes, again and again.
METATE_FN vi splat_two(const int32_t* p) {
    int64_t both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm512_set1_epi64(both);
}
// Sixteen bytes, again and again.
METATE_FN vi table_of_bytes(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Of a and b, cut into parts of 16 bytes: the even ones, and the odd ones.
METATE_FN vi join_even_parts(vi a, vi b) {
    return _mm512_shuffle_i32x4(a, b, 0x88);
}
METATE_FN vi join_odd_parts(vi a, vi b) {
    return _mm512_shuffle_i32x4(a, b, 0xdd);
}
// Lane 4 j + i is the sum of part j of rows[i].
METATE_FN vi sum_parts(const vi (&rows)[4]) {
    const vi a = add(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
    const vi b = add(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
    return add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Vector i gets quarter i of each, in their order.
METATE_FN void transpose_quarters(vi (&r)[4]) {
    const vi a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
    const vi c = _mm512_shuffle_i32x4(r[0], r[1], 0xee), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
    r[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    r[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    r[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// Of every 16 bytes: elements 0 and 4, 1 and 5, 2 and 6, 3 and 7. Of every 8: 0 and 2, 1 and 3.
METATE_FN vi interleave_halves(vi x) {
    return _mm512_unpacklo_epi16(x, _mm512_bsrli_epi128(x, 8));
}
METATE_FN vi interleave_quarters(vi x) {
    return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, 0xd8), 0xd8);
}
// Sixteen words, looked up by the low four bits of each word; and words shifted right.
METATE_FN vi lookup_pairs(vi table, vi words, int shift) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, static_cast<unsigned>(shift)), table);
}
METATE_FN vi twice(__m256i x) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(x), x, 1);
}
// Tables for it: of whole numbers, and of bfloat16.
METATE_FN vi whole_table(const float* p) {
    return twice(_mm512_cvtepi32_epi16(to_int(load(p))));
}

// Sixteen floats, looked up by the low four bits of each lane.
struct Table16 {
    vf values;
};
METATE_FN Table16 table16(const float* p) {
    return {_mm512_loadu_ps(p)};
}
METATE_FN vf lookup(const Table16& table, vi index) {
    return _mm512_permutexvar_ps(index, table.values);
}
METATE_FN vf gather(const float* p, vi index) {
    return _mm512_i32gather_ps(index, p, 4);
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
#if defined(__AVX512BF16__)
    constexpr int subnormal = 0x20;  // the instruction would make zeros of them
    if (!_mm512_fpclass_ps_mask(x, subnormal)) [[likely]]
        return bit_cast<__m256i>(_mm512_cvtneps_pbh(x));
#endif
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
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}

// Of the elements of a and then b: a becomes those at even places, b those at odd ones.
METATE_FN void separate(vf& a, vf& b) {
    const vi even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const vf odds = _mm512_permutex2var_ps(a, add(even, splat(1)), b);
    a = _mm512_permutex2var_ps(a, even, b);
    b = odds;
}
// The way back.
METATE_FN void interleave(vf& a, vf& b) {
    const vi low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const vf high = _mm512_permutex2var_ps(a, add(low, splat(8)), b);
    a = _mm512_permutex2var_ps(a, low, b);
    b = high;
}

// Stores past the caches to an aligned place; stream_end() before others may look.
METATE_FN void stream(float* p, vf x) {
    _mm512_stream_ps(p, x);
}
METATE_FN void stream(bf16* p, vf x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
METATE_FN void stream(f16* p, vf x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x));
}
METATE_FN void stream_end() {
    _mm_sfence();
}

// Lane i is the sum of rows[i].
METATE_FN vf sum_rows(const vf (&rows)[width]) {
    const auto pair = [](__m512 a) { return _mm512_castps_pd(a); };
    __m512 quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const vf* r = rows + 4 * i;
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
        quarters[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pair(a), pair(b))),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(pair(a), pair(b))));
    }
    const auto halve = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halve(halve(quarters[0], quarters[1]), halve(quarters[2], quarters[3]));
}

METATE_FN vi sum_rows(const vi (&rows)[width]) {
    __m512i quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        quarters[i] = sum_parts({rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]});
    const auto halve = [](vi a, vi b) { return add(join_even_parts(a, b), join_odd_parts(a, b)); };
    return halve(halve(quarters[0], quarters[1]), halve(quarters[2], quarters[3]));
}

// Within every 16 bytes, lane j of r[i] changes places with lane i of r[j].
METATE_FN void transpose_parts(vi (&r)[4]) {
    const vi low0 = _mm512_unpacklo_epi32(r[0], r[1]), low1 = _mm512_unpacklo_epi32(r[2], r[3]);
    const vi high0 = _mm512_unpackhi_epi32(r[0], r[1]), high1 = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(low0, low1);
    r[1] = _mm512_unpackhi_epi64(low0, low1);
    r[2] = _mm512_unpacklo_epi64(high0, high1);
    r[3] = _mm512_unpackhi_epi64(high0, high1);
}

// What transpose() makes of rows of 64 bytes, `stride` bytes apart: quarters of rows are put together as they are
// loaded.
METATE_FN void load_transposed(vf (&r)[width], const uint8_t* p, int64_t stride) {
    __m512 quarters[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto part = [&](int row, int c) {
            return _mm_loadu_ps(reinterpret_cast<const float*>(p + row * stride) + 4 * c);
        };
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) quarters[c][i] = _mm512_castps128_ps512(part(i, c));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) quarters[c][i] = _mm512_insertf32x4(quarters[c][i], part(i + 4, c), 1);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) quarters[c][i] = _mm512_insertf32x4(quarters[c][i], part(i + 8, c), 2);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) quarters[c][i] = _mm512_insertf32x4(quarters[c][i], part(i + 12, c), 3);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512(&q)[4] = quarters[c];
        const auto pair = [](__m512 a) { return _mm512_castps_pd(a); };
        const __m512d low0 = pair(_mm512_unpacklo_ps(q[0], q[1])), low1 = pair(_mm512_unpacklo_ps(q[2], q[3]));
        const __m512d high0 = pair(_mm512_unpackhi_ps(q[0], q[1])), high1 = pair(_mm512_unpackhi_ps(q[2], q[3]));
        r[4 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
        r[4 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
        r[4 * c + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
        r[4 * c + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
    }
}

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
// Sixteen bfloat16, twice, for lookup_pairs.
METATE_FN vi pair_table(const float* p) {
    return twice(narrow_bf16(_mm512_loadu_ps(p)));
}
// Words of two rows of codes of 4 bits, for lookup_row_pairs: lane c of number i gets word 4 i + c / 4 of each.
struct RowPairWords {
    alignas(64) uint16_t at[8][32];
};
constexpr RowPairWords row_pair_words = [] {
    RowPairWords words{};
    for (uint16_t i = 0; i < 8; ++i) {
        for (uint16_t c = 0; c < 16; ++c) {
            words.at[i][2 * c] = static_cast<uint16_t>(4 * i + c / 4);
            words.at[i][2 * c + 1] = static_cast<uint16_t>(32 + 4 * i + c / 4);
        }
    }
    return words;
}();
// Codes 16 i … 16 i + 15 of rows a and b, looked up in tables of their own, which narrow_pairs has made one: lane c is
// a pair of column c.
METATE_FN vi lookup_row_pairs(vi tables, vi a, vi b, int64_t i) {
    const vi shifts = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0, 4, 4, 8, 8, 12, 12));
    const vi words = _mm512_permutex2var_epi16(a, _mm512_load_si512(row_pair_words.at[i]), b);
    const vi codes = bit_and(_mm512_srlv_epi16(words, shifts), splat(0x000f000f));
    return _mm512_permutexvar_epi16(bit_or(codes, splat(0x00100000)), tables);
}
// Zeros where the first or second elements of pairs are not to count.
METATE_FN vi keep_elements(vi pairs, bool first, bool second) {
    return _mm512_and_si512(pairs, splat(static_cast<int32_t>((first ? 0xffffu : 0) | (second ? 0xffff0000u : 0))));
}
// The lanes where an element is infinite or NaN.
METATE_FN vm not_finite(vi pairs) {
    const vi exponents = splat(0x7f807f80), low = _mm512_and_si512(pairs, exponents);
    const vi first = _mm512_and_si512(low, splat(0xffff)), second = _mm512_srli_epi32(low, 16);
    return static_cast<vm>(_mm512_cmpeq_epi32_mask(first, splat(0x7f80)) |
                           _mm512_cmpeq_epi32_mask(second, splat(0x7f80)));
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
// Lane c is the pair (a[c], b[c]).
METATE_FN vi narrow_zip(vf a, vf b) {
    alignas(64) static constexpr uint16_t by_turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(by_turns), narrow_pairs(a, b));
}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
