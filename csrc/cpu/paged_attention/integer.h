// The products of attention with cached codes of 8 and 4 bits in whole numbers, by VNNI.
//
// A row of queries, and its weights of a tile's keys, become multiples of a step of their own, in two digits of 8 bits:
// the step is 2^-15 of the largest number, and queries are 16-bit floats. VNNI multiplies unsigned bytes by signed
// ones, so codes are taken with a bias, and what the bias adds (the row's `excess`) is subtracted. Sums are exact.
#pragma once

#include "tile.h"

namespace metate::cpu::METATE_ISA {
namespace {

#if defined(METATE_HAS_VNNI_FORMS)
template <class S>
constexpr bool has_integers = __is_same(S, int8_t) || __is_same(S, nibbles);
#else
template <class S>
constexpr bool has_integers = false;
#endif

// Codes are read in lines of 64 bytes, which hold a vector of unsigned codes, or two.
constexpr int code_line = 64;
template <class S>
constexpr int planes = __is_same(S, nibbles) ? 2 : 1;
template <class S>
constexpr int32_t code_bias = __is_same(S, nibbles) ? 8 : 128;

template <class S>
METATE_FN constexpr int64_t code_lines(int64_t elements) {
    return ceil_div(elements, code_line * planes<S>);
}
// Where the i-th quarter of a plane of a line stands among numbers in the order of read().
template <class S>
METATE_FN constexpr int64_t quarter_at(int64_t line, int plane, int i) {
    return (4 * line + i) * planes<S> * width + plane * width;
}

template <class S>
METATE_FN constexpr int64_t sum_stride(int64_t dv) {
    return code_lines<S>(dv) * planes<S> * code_line;
}

// Rows as whole numbers: the digits of row r from digits + r · stride on, one times its step, and its excess.
struct Integers {
    int8_t* digits;
    int64_t stride;
    float* step;
    int32_t* excess;

    METATE_FN Integers from(int64_t row) const { return {digits + row * stride, stride, step + row, excess + row}; }
};

inline Integers take_integers(int64_t rows, int64_t stride, Arena& arena) {
    Integers to;
    to.digits = arena.take<int8_t>(rows * stride);
    to.stride = stride;
    to.step = arena.take<float>(rows);
    to.excess = arena.take<int32_t>(rows);
    return to;
}

constexpr int64_t weight_bytes = 2 * tile_keys;
template <class S>
METATE_FN constexpr int64_t query_bytes(int64_t d) {
    return code_lines<S>(d) * 2 * planes<S> * code_line;
}
constexpr int quad = 4;  // keys whose codes of a column stand side by side
constexpr int64_t quads_at_once = group_keys / quad, plane_bytes = quads_at_once * quad * code_line;

// Queries: for every line of a cache's row its planes' high digits, then the low ones. `q` has q_stride numbers.
template <class S>
void pack_query(const float* q, int64_t q_stride, int64_t d, const Integers& row);
// Weights of a tile's keys: 64 high digits, then 64 low ones.
template <class S>
void pack_weights(const float* p, const Integers& row);
// multiply_keys() of tile.h.
template <class S, int rows>
void multiply_key_codes(const uint8_t* const* keys, int64_t offset, int64_t count, const Integers& q, int64_t d,
                        float* c, int64_t stride, Prefetch& shared);
// The codes of up to group_keys rows, plane after plane: quad after quad, 16 columns in a vector.
template <class S>
void interleave_values(const uint8_t* const* values, int64_t offset, int64_t count, int64_t dv, uint8_t* to);
// multiply_all_values() of tile.h for interleaved codes, weighted by keys from `first` on; `sum` takes the place of
// to.sum: rows sum_stride apart.
template <class S, int rows>
void multiply_value_codes(const uint8_t* codes, int64_t count, const Integers& weights, int64_t first, int64_t dv,
                          int32_t* sum, const Sums& to, Prefetch& ahead);

#if defined(METATE_HAS_VNNI_FORMS)

template <class S>
METATE_FN void read_codes(const uint8_t* p, int64_t n, vi (&codes)[planes<S>]) {
    const vi bytes = n >= code_line ? load(reinterpret_cast<const int32_t*>(p)) : load_bytes(p, n);
    if constexpr (__is_same(S, nibbles)) {
        codes[0] = bit_and(bytes, splat(0x0f0f0f0f));
        codes[1] = bit_and(shift_right(bytes, 4), splat(0x0f0f0f0f));
    } else {
        codes[0] = exor(bytes, splat(static_cast<int32_t>(0x80808080u)));
    }
}

constexpr float levels = 28672;  // with codes up to 127, sums over max_key_dim numbers fit 32 bits
static_assert(127 * 28672ll * max_key_dim < INT32_MAX);
constexpr float least_magnitude = 0x1p-110f;  // of a row: the inverse of its step is finite

// Turns `count` vectors into digits: at(i) loads vector i, digits of which belong to(i) bytes behind the row's begin,
// low digits `low` bytes behind the high ones. Numbers that are not finite make the step, and so every product, NaN.
template <class At, class To>
METATE_FN void to_integers(int64_t count, int64_t low, int32_t bias, const Integers& row, const At& at, const To& to) {
    vf most = splat(least_magnitude), poison = splat(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const vf x = at(i);
        most = max(abs(x), most);
        poison = fma(x, splat(0.0f), poison);
    }
    const float size = largest(most);
    const vf inverse = splat(levels / size);
    vi total = splat(0);
    for (int64_t i = 0; i < count; ++i) {
        const vi x = to_int(at(i) * inverse);
        total = add(total, x);
        auto* digits = reinterpret_cast<uint8_t*>(row.digits + to(i));
        store_bytes(digits, shift_right(add(x, splat(128)), 8));
        store_bytes(digits + low, x);
    }
    const bool is_finite = sum(poison) == 0.0f;
    *row.step = is_finite ? size / levels : __builtin_nanf("");
    *row.excess = is_finite ? -bias * static_cast<int32_t>(sum(to_float(total))) : 0;
}

template <class S>
void pack_query(const float* q, int64_t q_stride, int64_t d, const Integers& row) {
    constexpr int each = 4 * planes<S>;
    to_integers(
        code_lines<S>(d) * each, planes<S> * code_line, code_bias<S>, row,
        [&](int64_t i) {
            const int64_t from = quarter_at<S>(i / each, static_cast<int>(i % each / 4), static_cast<int>(i % 4));
            return from < q_stride ? load(q + from) : splat(0.0f);
        },
        [](int64_t i) { return i / each * 2 * planes<S> * code_line + i % each * width; });
}

template <class S>
void pack_weights(const float* p, const Integers& row) {
    to_integers(
        tile_keys / width, tile_keys, code_bias<S>, row, [&](int64_t i) { return load(p + i * width); },
        [](int64_t i) { return i * width; });
}

template <class S, int rows>
__attribute__((noinline)) void multiply_key_codes(const uint8_t* const* keys, int64_t offset, int64_t count,
                                                  const Integers& q, int64_t d, float* c, int64_t stride,
                                                  Prefetch& shared) {
    constexpr int together = width / rows;  // keys whose sums fill the accumulators
    const int64_t bytes = bytes_before<S>(d);
    Prefetch ahead = shared;
    vi excess = splat(q.excess[0]);
    vf step = splat(q.step[0]);
    for (int r = 1; r < rows; ++r) {
        const vm lanes = mask_of(((1u << together) - 1) << r * together);
        excess = select(lanes, splat(q.excess[r]), excess);
        step = select(lanes, splat(q.step[r]), step);
    }
    for (int64_t first = 0; first < count; first += together) {
        const uint8_t* key[together];
        vi sums[width];
#pragma GCC unroll 16
        for (int k = 0; k < together; ++k) key[k] = keys[first + k] + offset;
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) sums[i] = splat(0);
        for (int digit = 0; digit < 2; ++digit) {
            const int8_t* digits = q.digits + digit * planes<S> * code_line;
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) sums[i] = shift_left(sums[i], 8);
            const auto step_over = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
                ahead.fetch();
                vi x[rows][planes<S>];
#pragma GCC unroll 4
                for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                    for (int p = 0; p < planes<S>; ++p)
                        x[r][p] = load(reinterpret_cast<const int32_t*>(digits + r * q.stride + p * code_line));
                }
#pragma GCC unroll 16
                for (int k = 0; k < together; ++k) {
                    vi codes[planes<S>];
                    read_codes<S>(key[k] + at, n, codes);
#pragma GCC unroll 2
                    for (int p = 0; p < planes<S>; ++p) {
#pragma GCC unroll 4
                        for (int r = 0; r < rows; ++r) vnni_add_dot(sums[r * together + k], codes[p], x[r][p]);
                    }
                }
                digits += 2 * planes<S> * code_line;
            };
            int64_t at = 0;
            for (; at + code_line <= bytes; at += code_line) step_over(at, code_line);
            if (at < bytes) step_over(at, bytes - at);
        }
        float line[width];
        store(line, to_float(add(sum_rows(sums), excess)) * step);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
            __builtin_memcpy(c + r * stride + first, line + r * together, together * sizeof(float));
    }
    shared = ahead;
}

// Values.

template <class S>
void interleave_values(const uint8_t* const* values, int64_t offset, int64_t count, int64_t dv, uint8_t* to) {
    const int64_t bytes = bytes_before<S>(dv);
    for (int64_t first = 0; first < count; first += quad, to += quad * code_line) {
        uint8_t* line = to;
        for (int64_t at = 0; at < bytes; at += code_line) {
            vi rows[planes<S>][quad];
#pragma GCC unroll 4
            for (int k = 0; k < quad; ++k) {
                vi codes[planes<S>];
                read_codes<S>(values[first + k] + (offset + at), bytes - at, codes);
#pragma GCC unroll 2
                for (int p = 0; p < planes<S>; ++p) rows[p][k] = codes[p];
            }
#pragma GCC unroll 2
            for (int p = 0; p < planes<S>; ++p, line += plane_bytes) {
                interleave_bytes(rows[p]);
#pragma GCC unroll 4
                for (int i = 0; i < quad; ++i) store(reinterpret_cast<int32_t*>(line) + i * width, rows[p][i]);
            }
        }
    }
}

// Adds `quads` quads of a plane of a line, weighted by keys from `first` on.
template <class S, int rows>
__attribute__((noinline)) void multiply_plane(const uint8_t* codes, int64_t quads, const Integers& weights,
                                              int64_t first, int64_t dv, int64_t line, int plane, int32_t* sum,
                                              const Sums& to, Prefetch& shared) {
    Prefetch ahead = shared;
    vi sums[rows][4];
    int32_t* const kept = sum + (line * planes<S> + plane) * code_line;
    const int64_t kept_stride = sum_stride<S>(dv);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = splat(0);
    }
    for (int digit = 0; digit < 2; ++digit) {
        const int8_t* w = weights.digits + digit * tile_keys + first;
        for (int64_t k = 0; k < quads; ++k, w += quad) {
            ahead.fetch();
            vi x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) x[i] = load(reinterpret_cast<const int32_t*>(codes) + (k * 4 + i) * width);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                int32_t four;
                __builtin_memcpy(&four, w + r * weights.stride, sizeof four);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) vnni_add_dot(sums[r][i], x[i], splat(four));
            }
        }
        if (digit) break;
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                sums[r][i] = shift_left(sums[r][i], 8);
                if (!to.is_first) sums[r][i] = add(sums[r][i], load(kept + r * kept_stride + i * width));
            }
        }
    }
    shared = ahead;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        if (!to.is_last) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) store(kept + r * kept_stride + i * width, sums[r][i]);
            continue;
        }
        transpose_quarters(sums[r]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t at = quarter_at<S>(line, plane, i);
            if (at >= to.stride) break;
            float* const o = to.o + r * to.stride + at;
            const vf total = to_float(add(sums[r][i], splat(weights.excess[r]))) * splat(weights.step[r]);
            store(o, fma(load(o), splat(to.factor[r]), total));
        }
    }
}

template <class S, int rows>
void multiply_value_codes(const uint8_t* codes, int64_t count, const Integers& weights, int64_t first, int64_t dv,
                          int32_t* sum, const Sums& to, Prefetch& ahead) {
    for (int64_t line = 0; line < code_lines<S>(dv); ++line) {
        for (int plane = 0; plane < planes<S>; ++plane, codes += plane_bytes)
            multiply_plane<S, rows>(codes, ceil_div(count, quad), weights, first, dv, line, plane, sum, to, ahead);
    }
}

#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
