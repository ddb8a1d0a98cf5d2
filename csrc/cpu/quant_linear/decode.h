// Codes, scales and offsets of a low-bit matrix as vectors of the products: lane r holds row r of `width` rows.
//
// The dwords of `width` rows are transposed; then every column is a shift away in all lanes at once, whatever the
// width of a code, for 32 columns fill `bits` dwords. Codes become centered whole numbers or codebook entries; scales
// are left to the products, which multiply sums instead of weights.
#pragma once

#include "../../quant_linear.h"
#include "../parallel.h"
#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int block = 128;         // columns decoded at a time
constexpr int longest = 32;        // columns of a chunk: the longest chain of additions
constexpr int longest_pairs = 64;  // the same where bfloat16 is multiplied, to which results round more than sums
constexpr int panel = 2 * width;   // rows of a panel: with tile_rows rows of x they fill the registers

// What a code stands for before its scale.
struct Values {
    enum Kind { table, whole, codebook } kind;
    float center;        // subtracted from codes; corrections make up for it where zeros differ from it
    float entries[256];  // table: of codes up to 4 bits, repeated up to 16; codebook: of every code
};

inline Values values_of(const LowBitMatrix& w) {
    Values v{};
    v.center = static_cast<float>(w.zeros || w.offsets ? int64_t{1} << (w.bits - 1) : w.zero);
    v.kind = w.bits <= 4 && (w.codebook || width == 16) ? Values::table : w.codebook ? Values::codebook : Values::whole;
    const float* const codebook = static_cast<const float*>(w.codebook.data);
    const int mask = (1 << w.bits) - 1;
    for (int i = 0; i < 16 || i <= mask; ++i)
        v.entries[i] = codebook ? codebook[(i & mask) * w.codebook.stride[0]] : static_cast<float>(i & mask) - v.center;
    return v;
}

// Bytes from block k of a row, or of a tile, to what comes two blocks later: there, or in the next panel.
METATE_FN int64_t bytes_ahead(const LowBitMatrix& w, int64_t k) {
    const int64_t rows = w.in_tiles() ? rows_of_tile : 1, later = rows * (2 * block / 8 * w.bits);
    const int64_t bytes = rows * ceil_div(w.columns * w.bits, 8), begin = rows * (k * block / 8 * w.bits);
    return later + (begin + later < bytes ? 0 : panel * w.row_bytes() - bytes);
}

// Where the codes of a row begin, or, of tiles, its first dword from block k on.
METATE_FN const uint8_t* codes_at(const LowBitMatrix& w, int64_t row, int64_t k) {
    const uint8_t* const codes = static_cast<const uint8_t*>(w.codes.data);
    if (!w.in_tiles()) return codes + row * w.row_bytes() + k * (block / 8) * w.bits;
    const int64_t lane = row % rows_of_tile;
    return codes + (row - lane) * w.row_bytes() + k * (block / 2) * rows_of_tile + lane * 4;
}
METATE_FN const int32_t* words_at(const LowBitMatrix& w, int64_t row, int64_t k) {
    return reinterpret_cast<const int32_t*>(codes_at(w, row, k));
}

// `width` dwords of `width` rows, transposed; and fetches what lies `ahead` bytes further, unless that is 0.
__attribute__((noinline)) static void transpose_tile(int32_t* words, const uint8_t* from, int64_t stride,
                                                     int64_t ahead) {
    vf square[width];
    const uint8_t* next = from + ahead;
    if (ahead) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i, next += stride) __builtin_prefetch(next, 0, 2);
    }
    load_transposed(square, from, stride);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) store(words + i * width, as_int(square[i]));
}

// The bits of columns `block` · k … of up to `width` rows as transposed dwords: 4 · bits vectors, row r in lane r.
inline void transpose_words(int32_t* words, const LowBitMatrix& w, int64_t row, int64_t k, int64_t ahead) {
    if (w.in_tiles()) {
        const int32_t* from = words_at(w, row, k);
        for (int64_t i = smaller(w.columns - k * block, block); i > 0; i -= 8, from += rows_of_tile, words += width) {
            if (ahead) __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + ahead, 0, 2);
            store(words, load(from));
        }
        return;
    }
    const int64_t row_bytes = ceil_div(w.columns * w.bits, 8), begin = k * block / 8 * w.bits;
    const int64_t rows = smaller(w.rows - row, width), bytes = smaller(row_bytes - begin, block / 8 * w.bits);
    const int64_t stride = w.codes.stride[0];
    const uint8_t* const codes = codes_at(w, row, k);
    int64_t at = 0;
    for (; rows == width && bytes - at >= 4 * width; at += 4 * width, words += width * width)
        transpose_tile(words, codes + at, stride, ahead);
    for (; at < bytes; at += 4 * width, words += width * width) {
        vf square[width];
        for (int i = 0; i < width; ++i)
            square[i] = i < rows ? as_float(load_bytes(codes + at + i * stride, bytes - at)) : splat(0.0f);
        transpose(square);
        for (int i = 0; i < width; ++i) store(words + i * width, as_int(square[i]));
    }
}
constexpr int most_words = (32 + width - 1) / width * width * width;  // numbers that transpose_words writes

// The code that begins with bit `shift` of a dword, and may end in the next one.
template <int bits, Values::Kind kind>
METATE_FN vf value_in(vi word, vi next, int shift, const Values& v, const Table16& table) {
    constexpr int mask = (1 << bits) - 1;
    if (kind == Values::whole && shift > 0 && shift + bits < 32) {  // exact, and a shift less
        const float unit = 1.0f / static_cast<float>(1u << shift);
        return fma(to_float(bit_and(word, splat(mask << shift))), splat(unit), splat(-v.center));
    }
    const vi low = shift ? shift_right(word, shift) : word;
    const vi code = shift + bits > 32 ? bit_or(low, shift_left(next, 32 - shift)) : low;
    if constexpr (kind == Values::table) {
        return lookup(table, code);
    } else if constexpr (kind == Values::whole) {
        return to_float(bit_and(code, splat(mask))) - splat(v.center);
    } else {
        return gather(v.entries, bit_and(code, splat(mask)));
    }
}

// Column j of 32 whose dwords start at `words`.
template <int bits, Values::Kind kind>
METATE_FN vf value_at(const int32_t* words, int j, const Values& v, const Table16& table) {
    const int at = j * bits / 32, shift = j * bits % 32;
    const vi word = load(words + at * width);
    return value_in<bits, kind>(word, shift + bits > 32 ? load(words + (at + 1) * width) : word, shift, v, table);
}

template <int bits, Values::Kind kind>
void decode_as(float* to, int64_t stride, const int32_t* words, int64_t columns, const Values& v) {
    const Table16 table = table16(v.entries);
    for (; columns > 0; columns -= 32, words += bits * width) {
#pragma GCC unroll 32
        for (int j = 0; j < 32; ++j, to += stride) store(to, value_at<bits, kind>(words, j, v, table));
    }
}

// Values of `columns` columns, rounded up to 32, `stride` floats apart, of the rows in the lanes of `words`.
template <int bits>
METATE_FN void decode_bits(float* to, int64_t stride, const int32_t* words, int64_t columns, const Values& v) {
    if constexpr (bits <= 4) {
        if (v.kind == Values::table) return decode_as<bits, Values::table>(to, stride, words, columns, v);
    } else {
        if (v.kind == Values::codebook) return decode_as<bits, Values::codebook>(to, stride, words, columns, v);
    }
    if constexpr (bits > 4 || width < 16) decode_as<bits, Values::whole>(to, stride, words, columns, v);
}

inline void decode(float* to, int64_t stride, const int32_t* words, int64_t columns, int64_t bits, const Values& v) {
    switch (bits) {
        case 1:
            return decode_bits<1>(to, stride, words, columns, v);
        case 2:
            return decode_bits<2>(to, stride, words, columns, v);
        case 3:
            return decode_bits<3>(to, stride, words, columns, v);
        case 4:
            return decode_bits<4>(to, stride, words, columns, v);
        case 5:
            return decode_bits<5>(to, stride, words, columns, v);
        case 6:
            return decode_bits<6>(to, stride, words, columns, v);
        case 7:
            return decode_bits<7>(to, stride, words, columns, v);
        default:
            return decode_bits<8>(to, stride, words, columns, v);
    }
}

// Pairs of bfloat16 or of whole numbers, where their dot products exist: two columns of a dword of 4-bit codes, half a
// dword apart, so that one shift finds both.

constexpr int unit_columns = 8;  // of a dword, in 4 pairs

#if defined(METATE_HAS_WORD_SHUFFLES)
// What decode() does, in pairs.
inline void decode_pairs(float* to, int64_t stride, const int32_t* words, int64_t columns, vi table) {
    for (; columns > 0; columns -= unit_columns, words += width) {
        const vi word = load(words);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, to += stride) store(to, as_float(lookup_pairs(table, word, 4 * j)));
    }
}

// The same of a whole block of `width` rows, as their codes lie, one row after another or in a tile, `pitch` bytes from
// one row or dword to the next: what fills the time in which they come from memory. Adds the centers of whole numbers:
// a vector of pairs for every dword of codes.
template <bool in_tile, bool has_centers>
[[gnu::noinline]] void decode_square(float* to, const uint8_t* from, int64_t pitch, int64_t ahead, vi table,
                                     [[maybe_unused]] const int32_t* centers) {
    vf square[width];
    for (int i = 0; i < width; ++i) __builtin_prefetch(from + ahead + i * pitch, 0, 2);
    if constexpr (!in_tile) load_transposed(square, from, pitch);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
        if constexpr (in_tile) square[i] = load(reinterpret_cast<const float*>(from + i * pitch));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            vi pairs = lookup_pairs(table, as_int(square[i]), 4 * j);
            if constexpr (has_centers) pairs = add_words(pairs, load(centers + i * width));
            store(to + (4 * i + j) * panel, as_float(pairs));
        }
    }
}
#else
inline void decode_pairs(float*, int64_t, const int32_t*, int64_t, vi) {}
template <bool in_tile, bool has_centers>
void decode_square(float*, const uint8_t*, int64_t, int64_t, vi, const int32_t*) {}
#endif

// Scales.

template <class T>
METATE_FN vf load_line(const View<2>& view, int64_t row, int64_t column, int64_t n) {
    const T* from = static_cast<const T*>(view.data) + row * view.stride[0] + column * view.stride[1];
    if (view.stride[1] == 1) return n >= width ? load(from) : load(from, n);
    float line[width] = {};
    for (int64_t i = 0; i < n; ++i) line[i] = to_float(from[i * view.stride[1]]);
    return load(line);
}

METATE_FN float to_float(int8_t x) {
    return static_cast<float>(x);
}
METATE_FN float to_float(uint8_t x) {
    return static_cast<float>(x);
}
template <class T>
METATE_FN float number_at(const View<2>& view, int64_t row, int64_t column) {
    return to_float(static_cast<const T*>(view.data)[row * view.stride[0] + column * view.stride[1]]);
}

METATE_FN float any_at(const View<2>& view, int64_t row, int64_t column) {
    switch (view.dtype) {
        case DType::bf16:
            return number_at<bf16>(view, row, column);
        case DType::f16:
            return number_at<f16>(view, row, column);
        default:
            return number_at<float>(view, row, column);
    }
}

template <class T>
METATE_FN void load_lines(vf (&lines)[width], const View<2>& view, int64_t row, int64_t rows, int64_t group,
                          int64_t n) {
    if (rows == width && n >= width && view.stride[1] == 1) {
        const T* const first = static_cast<const T*>(view.data) + row * view.stride[0] + group;
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) lines[i] = load(first + i * view.stride[0]);
        return;
    }
    if (n > width) n = width;
    for (int i = 0; i < rows; ++i) lines[i] = load_line<T>(view, row + i, group, n);
}

METATE_FN vf two_level_line(const View<2>& fine, const View<2>& coarse, int64_t super_groups, int64_t row,
                            int64_t group, int64_t n) {
    if (n > width) n = width;
    float factors[2 * width];  // each is written to the end of the line, the next one over it
    int64_t super = group / super_groups;
    for (int64_t i = 0; i < n; i = ++super * super_groups - group)
        store(factors + i, splat(any_at(coarse, row, super)));
    const int8_t* const from = static_cast<const int8_t*>(fine.data) + row * fine.stride[0] + group * fine.stride[1];
    if (fine.stride[1] == 1) return to_float(load_wide(from, n)) * load(factors);
    int8_t line[width] = {};
    for (int64_t i = 0; i < n; ++i) line[i] = from[i * fine.stride[1]];
    return to_float(load_wide(line, width)) * load(factors);
}

// Scales or offsets of `width` groups of some rows, both levels multiplied; zeros after the first n.
inline void load_levels(vf (&lines)[width], const View<2>& fine, const View<2>& coarse, int64_t super_groups,
                        int64_t row, int64_t rows, int64_t group, int64_t n) {
    switch (fine.dtype) {
        case DType::bf16:
            return load_lines<bf16>(lines, fine, row, rows, group, n);
        case DType::f16:
            return load_lines<f16>(lines, fine, row, rows, group, n);
        case DType::f32:
            return load_lines<float>(lines, fine, row, rows, group, n);
        default:
            for (int i = 0; i < rows; ++i) lines[i] = two_level_line(fine, coarse, super_groups, row + i, group, n);
    }
}

// Asks for what load_scales will read of a panel: a line of every row of the tensors that scale it.
inline void fetch_levels(const LowBitMatrix& w, int64_t row, int64_t group) {
    const View<2>* const levels[] = {&w.scales, &w.offsets, &w.zeros};
    for (const View<2>* level : levels) {
        const int64_t size = bytes_of(level->dtype), stride = level->stride[0] * size;
        const char* line = static_cast<const char*>(level->data) + row * stride + group * level->stride[1] * size;
        for (int64_t i = row; *level && i < smaller(row + panel, w.rows); ++i, line += stride)
            __builtin_prefetch(line, 0, 2);
    }
}

// Of `width` rows and groups that are all there.
template <class T>
METATE_FN void load_square(float* to, int64_t stride, const View<2>& view, int64_t row, int64_t group) {
    const T* const from = static_cast<const T*>(view.data) + row * view.stride[0] + group;
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load(from + i * view.stride[0]);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) store(to + i * stride, square[i]);
}
inline void load_square(float* to, int64_t stride, const View<2>& view, int64_t row, int64_t group) {
    if (view.dtype == DType::bf16) return load_square<bf16>(to, stride, view, row, group);
    if (view.dtype == DType::f16) return load_square<f16>(to, stride, view, row, group);
    load_square<float>(to, stride, view, row, group);
}

// The zeros of n <= width groups of a row.
METATE_FN vi zeros_of(const LowBitMatrix& w, int64_t row, int64_t group, int64_t n) {
    const uint8_t* const from =
        static_cast<const uint8_t*>(w.zeros.data) + row * w.zeros.stride[0] + group * w.zeros.stride[1];
    if (w.zeros.stride[1] == 1) return load_wide(from, n);
    int32_t line[width] = {};
    for (int64_t i = 0; i < n; ++i) line[i] = from[i * w.zeros.stride[1]];
    return load(line);
}

METATE_FN bool has_corrections(const LowBitMatrix& w) {
    return w.zeros || w.offsets;
}

// Whether codes of different rows or groups are centered by different numbers. These may be taken from them before they
// are scaled: a code that is its zero point is 0 then.
METATE_FN bool has_own_centers(const LowBitMatrix& w) {
    return w.zeros && !w.offsets && !w.codebook;
}

// Their corrections where there are zeros and no offsets, times `scales` where there are some.
METATE_FN void correct_square(float* to, const float* scales, int64_t stride, const View<2>& zeros, float shift,
                              int64_t row, int64_t group) {
    const uint8_t* const from = static_cast<const uint8_t*>(zeros.data) + row * zeros.stride[0] + group;
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = splat(shift) - to_float(load_wide(from + i * zeros.stride[0], width));
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i)
        store(to + i * stride, scales ? fma(square[i], load(scales + i * stride), splat(0.0f)) : square[i]);
}

// Scales of n <= width groups of some rows from `group` on, a vector a row; and what a column's x is to be multiplied
// by besides: corrections = (center - zero - zeros) · scale + offset, where there are such; or, if they come `before`
// the scales, center - zero - zeros. Zeros for rows and groups that are not there.
inline void load_scale_rows(vf (&scale)[width], vf (&correction)[width], bool is_corrected, bool before,
                            const LowBitMatrix& w, float center, int64_t row, int64_t group, int64_t n) {
    const int64_t rows = smaller(w.rows - row, width);
    const float shift = w.codebook ? 0 : center - static_cast<float>(w.zero);
    for (int i = 0; i < width; ++i) scale[i] = correction[i] = splat(0.0f);
    load_levels(scale, w.scales, w.super_scales, w.super_groups, row, rows, group, n);
    if (w.offsets) load_levels(correction, w.offsets, w.super_offsets, w.super_groups, row, rows, group, n);
    for (int i = 0; i < rows && is_corrected; ++i) {
        const vf zeros = w.zeros ? to_float(zeros_of(w, row + i, group, n)) : splat(0.0f);
        correction[i] = before ? splat(shift) - zeros : fma(splat(shift) - zeros, scale[i], correction[i]);
    }
}

// The same of any number of groups, a vector a group, `stride` floats apart; `corrections` are null where there are
// none.
inline void load_scales(float* scales, float* corrections, bool before, int64_t stride, const LowBitMatrix& w,
                        float center, int64_t row, int64_t group, int64_t n) {
    const float shift = w.codebook ? 0 : center - static_cast<float>(w.zero);
    const bool is_plain = w.rows - row >= width && w.scales.stride[1] == 1 && w.scales.dtype != DType::i8 &&
                          (!corrections || (!w.offsets && w.zeros.stride[1] == 1));
    for (int64_t g = 0; g < n; g += width) {
        if (is_plain && n - g >= width) {
            float* const square = scales + g * stride;
            load_square(square, stride, w.scales, row, group + g);
            if (corrections)
                correct_square(corrections + g * stride, before ? nullptr : square, stride, w.zeros, shift, row,
                               group + g);
            continue;
        }
        const int64_t groups = smaller(n - g, width);
        vf scale[width], correction[width];
        load_scale_rows(scale, correction, corrections != nullptr, before, w, center, row, group + g, groups);
        transpose(scale);
        if (corrections) transpose(correction);
        for (int64_t j = 0; j < groups; ++j) {
            store(scales + (g + j) * stride, scale[j]);
            if (corrections) store(corrections + (g + j) * stride, correction[j]);
        }
    }
}

// Whole weights out of values, column after column `stride` floats apart, where column 0 is number `first` of W and the
// scales start at its group, corrections as `load_scales` has made them.
inline void scale_values(float* values, const float* scales, const float* corrections, bool before, int64_t stride,
                         int64_t first, int64_t columns, int64_t group_size) {
    int64_t left = group_size - first % group_size;
    for (int64_t c = 0; c < columns; ++c, --left, values += stride) {
        if (left == 0) {
            scales += stride;
            if (corrections) corrections += stride;
            left = group_size;
        }
        const vf value = load(values), scale = load(scales);
        if (!corrections)
            store(values, value * scale);
        else
            store(values, before ? (value + load(corrections)) * scale : fma(value, scale, load(corrections)));
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
