// The vector layer for any machine, in the compiler's own vector types.
#pragma once

#include "scalar.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int width = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint64_t vl __attribute__((vector_size(16)));
typedef uint16_t vs __attribute__((vector_size(8)));  // 16 bits of each lane
typedef int16_t vh __attribute__((vector_size(16)));
typedef uint16_t vuh __attribute__((vector_size(16)));
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
// n = width floats.
template <int n>
METATE_FN vf repeat(const float* p) {
    return load(p);
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
METATE_FN vi load_halves(const void* p) {
    vs x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, vi);
}
METATE_FN vf load(const bf16* p) {
    return (vf)(load_halves(p) << 16);
}
METATE_FN vf load(const f16* p) {
    const vi bits = load_halves(p), rest = bits & 0x7fff;
    const vi normal = (rest << 13) + (rest < 0x7c00 ? splat(0x38000000) : splat(0x70000000));
    const vi tiny = (vi)(__builtin_convertvector(rest, vf) * 0x1p-24f);
    return (vf)((bits & 0x8000) << 16 | (rest < 0x400 ? tiny : normal));
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
// a less its nearest whole number, for magnitudes below 2^22. Opaque, or the compiler would fold the two additions.
METATE_FN vf rest_of_round(vf a) {
    vf shifted = a + 0x1.8p23f;
    __asm__("" : "+m"(shifted));
    return a - (shifted - 0x1.8p23f);
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
METATE_FN void store(int32_t* p, vi x) {
    __builtin_memcpy(p, &x, sizeof x);
}
// The first n <= 4·width bytes, zeros after them.
METATE_FN vi load_bytes(const uint8_t* p, int64_t n) {
    uint8_t copy[16] = {};
    for (int64_t i = 0; i < n && i < 16; ++i) copy[i] = p[i];
    vi x;
    __builtin_memcpy(&x, copy, sizeof x);
    return x;
}
METATE_FN vi bit_and(vi a, vi b) {
    return a & b;
}
METATE_FN vi bit_or(vi a, vi b) {
    return a | b;
}
METATE_FN vi shift_left(vi a, int n) {
    return (vi)((vu)a << static_cast<uint32_t>(n));
}
METATE_FN vi shift_right(vi a, int n) {  // zeros move in
    return (vi)((vu)a >> static_cast<uint32_t>(n));
}
METATE_FN vi to_int(vf a) {
    return __builtin_convertvector(a - rest_of_round(a), vi);
}
// The first n <= width bytes, one in each lane.
template <class T>
METATE_FN vi load_wide(const T* p, int64_t n) {
    vi x = {};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
// The first n <= width e4m3 numbers, divided by e4m3_unit; zeros after them.
constexpr float e4m3_unit = 0x1p120f;
METATE_FN vf load_e4m3(const uint8_t* p, int64_t n) {
    const vi codes = load_wide(p, n), size = codes & 0x7f;
    const vi nan = (size == 0x7f) & 0x7fc00000;
    return (vf)(size << 20 | (codes & 0x80) << 24 | nan);
}
// The lowest byte of each lane, side by side.
METATE_FN void store_bytes(uint8_t* p, vi x) {
    for (int i = 0; i < width; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
// Sums of neighbouring products: of two 16-bit numbers in each lane, and of two bytes, unsigned times signed, in each
// half of a lane, which must fit it.
METATE_FN vi multiply_words(vi a, vi b) {
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
METATE_FN vi multiply_bytes(vi a, vi b) {
    const vh even = (vh)(a & 0x00ff00ff), odd = (vh)((vuh)a >> 8);
    return (vi)(even * ((vh)((vuh)b << 8) >> 8) + odd * ((vh)b >> 8));
}
METATE_FN vi multiply(vi a, vi b) {  // the low halves of products
    return a * b;
}
METATE_FN vi add_words(vi a, vi b) {
    return (vi)((vuh)a + (vuh)b);
}
METATE_FN vf gather(const float* p, vi index) {
    return vf{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
// Sixteen floats, looked up by the low four bits of each lane.
struct Table16 {
    const float* values;
};
METATE_FN Table16 table16(const float* p) {
    return {p};
}
METATE_FN vf lookup(const Table16& table, vi index) {
    return gather(table.values, index & 15);
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

// As from_float(), lane by lane.
METATE_FN void store_halves(void* p, vu x) {
    const vs narrow = __builtin_convertvector(x, vs);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
METATE_FN void store(bf16* p, vf x) {
    const vu bits = (vu)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_halves(p, x == x ? rounded : bits >> 16 | 0x40);
}
METATE_FN void store(f16* p, vf x) {
    const vi bits = (vi)x, rest = bits & INT32_MAX;
    const vi normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    const vi tiny = (vi)((vf)rest + 0.5f) - 0x3f000000;
    const vi finite = rest < 0x38800000 ? tiny : normal, no_number = splat(0x7e00), infinite = splat(0x7c00);
    const vi size = rest < 0x477ff000 ? finite : rest > 0x7f800000 ? no_number : infinite;
    store_halves(p, ((vu)bits >> 16 & 0x8000) | (vu)size);
}

METATE_FN void transpose(vf (&r)[width]) {
    vf t[width];
    for (int i = 0; i < 4; ++i) t[i] = vf{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < 4; ++i) r[i] = t[i];
}

// Of the elements of a and then b: a becomes those at even places, b those at odd ones.
METATE_FN void separate(vf& a, vf& b) {
    const vf odds = {a[1], a[3], b[1], b[3]};
    a = vf{a[0], a[2], b[0], b[2]};
    b = odds;
}
// The way back.
METATE_FN void interleave(vf& a, vf& b) {
    const vf high = {a[2], b[2], a[3], b[3]};
    a = vf{a[0], b[0], a[1], b[1]};
    b = high;
}

// Where a machine can, stores past the caches to an aligned place; stream_end() before others may look.
template <class T>
METATE_FN void stream(T* p, vf x) {
    store(p, x);
}
METATE_FN void stream_end() {}

// Lane i is the sum of rows[i].
METATE_FN vf sum_rows(const vf (&rows)[width]) {
    vf r[width] = {rows[0], rows[1], rows[2], rows[3]};
    transpose(r);
    return (r[0] + r[2]) + (r[1] + r[3]);
}

METATE_FN void transpose_parts(vi (&r)[4]) {
    vi t[4];
    for (int i = 0; i < 4; ++i) t[i] = vi{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < 4; ++i) r[i] = t[i];
}

// What transpose() makes of rows of 16 bytes, `stride` bytes apart.
METATE_FN void load_transposed(vf (&r)[width], const uint8_t* p, int64_t stride) {
    for (int i = 0; i < width; ++i) __builtin_memcpy(&r[i], p + i * stride, sizeof r[i]);
    transpose(r);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
