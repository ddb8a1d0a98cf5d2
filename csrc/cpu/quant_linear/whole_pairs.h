// Many rows of x times codes of 4 and 8 bits in whole numbers of 16 bits, by twos: a number of x is its first two
// digits as one, and where it has a last one, that apart. The segments and digits are integer.h's, and so are the
// results, bit for bit: sums are exact.
#pragma once

#include "integer.h"

namespace metate::cpu::METATE_ISA {
namespace {

// What codes stand for as whole numbers, in units of the table if there is one; without their centers where they have
// their own.
inline Values whole_values(const LowBitMatrix& w, Values v, const ByteTable& table) {
    if (has_own_centers(w)) v.center = 0;
    for (int i = 0; i < 16; ++i)
        v.entries[i] = table.unit ? static_cast<float>(table.bytes[i]) - 128 : static_cast<float>(i) - v.center;
    return v;
}

#if defined(METATE_HAS_VNNI_FORMS)

// Of any number of rows.
inline bool can_take_whole_pairs(const LowBitMatrix& w, const Arithmetic& arithmetic) {
    return arithmetic.digits == 3 && (w.bits == 4 || w.bits == 8) &&
           (w.group_size % unit_columns == 0 || w.group_size >= w.columns);
}

// Two columns of a dword of codes are as far apart as half of it.
template <int bits>
METATE_FN vi pair_words(vi words) {
    return bits == 4 ? interleave_halves(words) : interleave_quarters(words);
}

METATE_FN int32_t sum_of(const int32_t* q, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) sum += q[i];
    return sum;
}

// A block of whole numbers with three digits: the first two of each, and the last.
template <int bits>
METATE_FN void store_digits(float* first, float* last, const int32_t* q) {
    for (int i = 0; i < block; i += 2 * width) {
        uint16_t high[2 * width], low[2 * width];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const vi number = load(q + i + v * width), rounded = shift_right(add(number, splat(128)), 8);
            store_words(high + v * width, rounded);
            store_words(low + v * width, sub(number, shift_left(rounded, 8)));
        }
        store(first + i / 2, as_float(pair_words<bits>(load(reinterpret_cast<const int32_t*>(high)))));
        if (last) store(last + i / 2, as_float(pair_words<bits>(load(reinterpret_cast<const int32_t*>(low)))));
    }
}

// x, (rows, columns), as whole numbers; `unit` is that of the table of W.
template <class T>
void pack_whole(const PackedRows& to, const QuantLinear& call, float unit, const Runtime& runtime) {
    const int64_t columns = call.w.columns, rows_at_once = 16, row_pieces = ceil_div(to.rows, rows_at_once);
    for_pieces(runtime, ceil_div(columns, block) * row_pieces, [&](int, int64_t piece) {
        const int64_t k = piece / row_pieces, first = piece % row_pieces * rows_at_once;
        Chunk chunks[block];
        const int count = chunks_of(chunks, columns, call.w.group_size, k, to.most_columns);
        for (int64_t row = first; row < smaller(to.rows, first + rows_at_once); ++row) {
            const T* from = static_cast<const T*>(call.x.data) + row * call.x.stride[0];
            float x[block];
            int32_t q[block + width] = {}, used = 2;
            pack_line(x, from, call.x.stride[1], call.w.permutation, k * block, smaller(block, columns - k * block));
            for (int c = 0; c < count; ++c) {
                const int begin = chunks[c].begin, n = chunks[c].end - begin;
                const float step = round_floats(q + begin, used, x + begin, n, enough_for<T>);
                to.steps[to.chunks_at(k, row) + c] = step * unit * 256;
                if (to.sums) to.sums_of(k, row)[c] = static_cast<float>(sum_of(q + begin, n)) * step;
            }
            to.has_last[k * to.rows + row] = used == 3;
            float* const last = used == 3 ? to.last_line(k, row) : nullptr;
            call.w.bits == 4 ? store_digits<4>(to.line(k, row), last, q) : store_digits<8>(to.line(k, row), last, q);
        }
    });
}

// Codes of 8 bits, less their center, as pairs.
inline void decode_byte_pairs(float* to, const int32_t* words, int64_t columns, float center) {
    const vi mask = splat(0x00ff00ff), less = splat(static_cast<int32_t>(center) * 0x10001);
    for (; columns > 0; columns -= 4, words += width, to += 2 * panel) {
        const vi word = load(words);
        store(to, as_float(sub_words(bit_and(word, mask), less)));
        store(to + panel, as_float(sub_words(bit_and(shift_right(word, 8), mask), less)));
    }
}

// What is added to the pairs of a block whose codes have their own centers: a vector for every dword of 4-bit codes.
inline void spread_centers(int32_t* to, const BlockPlan& plan, const int32_t* centers) {
    for (int c = 0; c < plan.count; ++c) {
        const vi one = load(centers + (plan.chunks[c].group - plan.first_group) * panel);
        const vi both = bit_or(bit_and(one, splat(0xffff)), shift_left(one, 16));
        for (int i = plan.chunks[c].begin; i < plan.chunks[c].end; i += unit_columns)
            store(to + i / unit_columns * width, both);
    }
}

inline void add_centers(float* values, const int32_t* centers, int64_t columns) {
    for (int64_t word = 0; word < ceil_div(columns, unit_columns) * unit_columns / 2; ++word, values += panel)
        store(values, as_float(add_words(as_int(load(values)), load(centers + word / 4 * width))));
}

#else
METATE_FN bool can_take_whole_pairs(const LowBitMatrix&, const Arithmetic&) {
    return false;
}
template <class T>
void pack_whole(const PackedRows&, const QuantLinear&, float, const Runtime&) {}
inline void decode_byte_pairs(float*, const int32_t*, int64_t, float) {}
inline void spread_centers(int32_t*, const BlockPlan&, const int32_t*) {}
inline void add_centers(float*, const int32_t*, int64_t) {}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
