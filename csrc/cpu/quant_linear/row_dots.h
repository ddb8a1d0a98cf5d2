// Few rows of x times codes of 4 and 8 bits as they lie: the columns of a row of W fill the lanes, and only sums are
// transposed. The segments and digits are integer.h's, and so are the results, bit for bit: sums are exact.
#pragma once

#include "integer.h"
#include "read_ahead.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int quarter_rows = 4;                 // of W, whose sums share a vector
constexpr int quads_of_block = block / 4;       // in two vectors
constexpr int quarter = longest, quarters = 4;  // of a block: the columns of 16 bytes of its vectors

METATE_FN bool can_dot_rows(const LowBitMatrix& w, const Arithmetic& arithmetic) {
    return width == 16 && arithmetic.digits && arithmetic.sums == Sums::dots && (w.bits == 4 || w.bits == 8) &&
           (w.group_size % quarter == 0 || w.group_size >= w.columns);
}

// What the sums of a segment lack where all codes have the same center: -center times the digits of x, of the sums of
// the first two digits, and of the last; and its step in units of the last digit that is summed.
struct Term {
    int32_t high, low;
    float step;
};

// Digits of x in the order in which load_codes leaves W: two vectors for every block, row and digit.
struct SpreadRows {
    int32_t* x;
    int32_t* used;  // of block k: digits that are not 0 in every row
    Term* terms;    // of the segments of every block and row
    int64_t rows, most_segments;
    int digits;

    METATE_FN int64_t stride() const { return digits * quads_of_block; }
    METATE_FN int32_t* at(int64_t k, int64_t row) const { return x + (k * rows + row) * stride(); }
    METATE_FN Term* terms_of(int64_t k, int64_t row) const { return terms + (k * rows + row) * most_segments; }
};

// The terms of a block, when it is known how many digits are used in every row.
inline void set_terms(const SpreadRows& to, const IntegerRows& from, int count, int64_t k, int64_t row, int center,
                      float radix) {
    const int32_t* const line = from.line(k, row);
    for (int s = 0; s < count; ++s) {
        int32_t digit_sums[3] = {};  // of the higher two, and of the last
        for (int d = 0; d < to.digits; ++d)
            digit_sums[to.digits == 1 ? 1 : d] = static_cast<int16_t>(line[from.sums_at() + s * to.digits + d]);
        const float step = bit_cast<float>(line[from.terms_at() + segment_terms * s + step_term]);
        to.terms_of(k, row)[s] = {-center * (digit_sums[0] * 256 + digit_sums[1]), -center * digit_sums[2],
                                  to.used[k] < to.digits ? step * radix : step};
    }
}

// Block k of x.
inline void spread_block(const SpreadRows& to, const IntegerRows& from, const IntegerPlan& plan, int64_t k,
                         bool is_last, int64_t bits) {
    to.used[k] = 0;
    for (int64_t row = 0; row < to.rows; ++row) {
        const int32_t* quad = from.line(k, row);
        const int32_t used = quad[from.used_at()];
        if (used > to.used[k]) to.used[k] = used;
        int32_t* x = to.at(k, row);
        for (int q = 0; is_last && q < to.stride(); ++q) x[q] = 0;
        for (int s = 0; s < plan.count; ++s) {
            const int first = plan.segments[s].first_quad, n = plan.segments[s].quads;
            for (int d = 0; d < to.digits; ++d, quad += n) {
                int32_t* const line = x + d * quads_of_block;
                for (int q = 0; bits == 4 && q < n / 2; ++q) {
                    line[first / 2 + q] = quad[2 * q];
                    line[first / 2 + q + width] = quad[2 * q + 1];
                }
                for (int q = first; bits == 8 && q < first + n; ++q)
                    line[q % 8 / 4 * width + q / 8 * 4 + q % 4] = quad[q - first];
            }
        }
    }
}

inline void spread(const SpreadRows& to, const IntegerRows& from, const IntegerPlan* plans, int64_t blocks,
                   int64_t bits, int center, float radix, const Runtime& runtime) {
    for_pieces(runtime, blocks, [&](int, int64_t k) {
        spread_block(to, from, plans[k], k, k == blocks - 1, bits);
        for (int64_t row = 0; row < to.rows; ++row) set_terms(to, from, plans[k].count, k, row, center, radix);
    });
}

// What a run of blocks of a panel leaves to be scaled: sums of digits times codes over each quarter. With three digits
// those of the first two, and of the last.
struct QuarterSums {
    int32_t* sums;
    int rows, parts;

    // For `quarter_rows` rows of W from quarter_rows · i on: lane 4 j + r is quarter j of row r.
    METATE_FN int32_t* at(int64_t k, int i, int row, int part) const {
        return sums + (((k * (panel / quarter_rows) + i) * rows + row) * parts + part) * width;
    }
};
constexpr int64_t most_quarter_sums = blocks_at_once * panel / quarter_rows * few_rows * 2 * width;

#if defined(METATE_HAS_VNNI_FORMS)

// The first `bytes` bytes of a row's block as two vectors of quads, and zeros after them: lanes 4 j … 4 j + 3 of both
// hold quarter j.
template <int bits>
METATE_FN void load_codes(vi& first, vi& second, const uint8_t* from, int64_t bytes) {
    const auto part = [&](int64_t at) {  // a mask costs a quarter of the speed
        return bytes >= at + 4 * width ? load(reinterpret_cast<const int32_t*>(from + at))
                                       : load_bytes(from + at, larger(bytes - at, 0));
    };
    const vi low = part(0);
    if constexpr (bits == 4) {
        const vi mask = splat(0x0f0f0f0f);
        first = bit_and(low, mask);
        second = bit_and(shift_right(low, 4), mask);
    } else {
        const vi high = part(4 * width);
        first = join_even_parts(low, high);
        second = join_odd_parts(low, high);
    }
}

// The products of 128 codes with so many digits, as whole numbers.
template <int digits>
METATE_FN vi dot(const vi (&codes)[2], const int32_t* x) {
    vi sum = splat(0);
#pragma GCC unroll 2
    for (int d = 0; d < digits; ++d, x += quads_of_block) {
        if (d > 0) sum = shift_left(sum, 8);
        vnni_add_dot(sum, codes[0], load(x));
        vnni_add_dot(sum, codes[1], load(x + width));
    }
    return sum;
}

// What `rows` rows of x, spread from `quads` on, and quarter_rows rows of W leave of a block.
template <int rows, int digits, int used>
METATE_FN void sum_block(int32_t* to, const vi (&codes)[quarter_rows][2], const int32_t* quads) {
    constexpr int parts = digits == 3 ? 2 : 1, used_parts = used == 3 ? 2 : 1;
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m, quads += digits * quads_of_block, to += parts * width) {
        vi sums[used_parts][quarter_rows];
#pragma GCC unroll 4
        for (int r = 0; r < quarter_rows; ++r) {
            sums[0][r] = dot<used - used_parts + 1>(codes[r], quads);
            if constexpr (used_parts == 2) sums[1][r] = dot<1>(codes[r], quads + 2 * quads_of_block);
        }
#pragma GCC unroll 2
        for (int part = 0; part < used_parts; ++part) store(to + part * width, sum_parts(sums[part]));
    }
}

template <int bits, bool has_table, int digits, int rows>
__attribute__((noinline)) void sum_codes(const QuarterSums& to, const Reading& reading, const SpreadRows& x,
                                         const ByteTable& table) {
    constexpr int parts = digits == 3 ? 2 : 1, block_bytes = block / 8 * bits;
    const vi entries = table_of_bytes(table.bytes);
    for (int i = 0; i < panel / quarter_rows; ++i) {
        const uint8_t* line[quarter_rows];
        for (int r = 0; r < quarter_rows; ++r) line[r] = reading.line(i * quarter_rows + r);
        Ahead ahead(reading, i * quarter_rows);
        for (int64_t k = 0; k < reading.blocks; ++k) {
            const int64_t bytes = reading.bytes_left(k * block_bytes);
            int32_t* const sums = to.sums + (k * (panel / quarter_rows) + i) * rows * parts * width;
            vi codes[quarter_rows][2];
#pragma GCC unroll 4
            for (int r = 0; r < quarter_rows; ++r) {
                for (int at = 0; at < block_bytes; at += 64) ahead.fetch();
                load_codes<bits>(codes[r][0], codes[r][1], line[r], bytes);
                for (vi& part : codes[r]) part = has_table ? lookup_bytes(entries, part) : part;
                line[r] += block_bytes;
            }
            const int32_t* const quads = x.x + (reading.first_block + k) * rows * digits * quads_of_block;
            if (digits == 3 && x.used[reading.first_block + k] == 2)
                sum_block<rows, digits, (digits == 3 ? 2 : digits)>(sums, codes, quads);
            else
                sum_block<rows, digits, digits>(sums, codes, quads);
        }
    }
}

template <int bits, bool has_table, int digits, int rows = few_rows>
METATE_FN void sum_codes_of(const QuarterSums& to, const Reading& reading, const SpreadRows& x,
                            const ByteTable& table) {
    if constexpr (rows > 1) {
        if (to.rows < rows) return sum_codes_of<bits, has_table, digits, rows - 1>(to, reading, x, table);
    }
    sum_codes<bits, has_table, digits, rows>(to, reading, x, table);
}

template <int bits, bool has_table>
METATE_FN void sum_codes_in(const QuarterSums& to, const Reading& reading, const SpreadRows& x,
                            const ByteTable& table) {
    to.parts == 2 ? sum_codes_of<bits, has_table, 3>(to, reading, x, table)
                  : sum_codes_of<bits, has_table, 1>(to, reading, x, table);
}

inline void sum_codes_of(const QuarterSums& to, const Reading& reading, const SpreadRows& x, const ByteTable& table) {
    if (reading.w.bits == 8) return sum_codes_in<8, false>(to, reading, x, table);
    table.unit ? sum_codes_in<4, true>(to, reading, x, table) : sum_codes_in<4, false>(to, reading, x, table);
}

// Of `width` rows of W: the sum over a segment in units of its step, from the sums of its parts and what they are
// centered by.
template <int digits, int used>
METATE_FN vf centered_sum(const vi (&sums)[used == 3 ? 2 : 1], vi center, const int32_t* digit_sums, float radix) {
    vi high = multiply_words(center, splat(digit_sums[0]));
    if constexpr (used == 1) return to_float(add(sums[0], high));
    high = add(shift_left(high, 8), multiply_words(center, splat(digit_sums[1])));
    const vf value = to_float(add(sums[0], high));
    if constexpr (used < digits) return value;
    const vi low = multiply_words(center, splat(digit_sums[2]));
    return fma(value, splat(radix), to_float(add(sums[used == 3], low)));
}

// The same where all codes have one center.
template <int used>
METATE_FN vf centered_sum(const vi (&sums)[used == 3 ? 2 : 1], const Term& term, float radix) {
    const vf value = to_float(add(sums[0], splat(term.high)));
    return used == 3 ? fma(value, splat(radix), to_float(add(sums[used == 3], splat(term.low)))) : value;
}

// Row m of x and half v of the panel. Everything is taken by value: no store to the totals can change it.
template <int digits, int used, bool own_centers>
METATE_FN void add_row(const QuarterSums from, int64_t k, const IntegerTile t, const Term* terms, int m, int v) {
    constexpr int parts = used == 3 ? 2 : 1;
    const int32_t* const line = t.x + m * t.stride;
    const int32_t* const first = from.at(k, v * quarters, m, 0);
    const int64_t apart = from.at(0, 1, 0, 0) - from.at(0, 0, 0, 0);
    vi sums[parts][quarters], whole[parts];
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
#pragma GCC unroll 4
        for (int j = 0; j < quarters; ++j) sums[part][j] = load(first + j * apart + part * width);
        transpose_quarters(sums[part]);
        whole[part] = splat(0);
    }
    float* const total = t.total + m * panel + v * width;
    vf result = load(total), of_group = splat(0.0f);
    const auto add_segment = [&](int s) __attribute__((always_inline)) {
        const int64_t at = (t.segments[s].group - t.first_group) * panel + v * width;
        vf value;
        if constexpr (own_centers)
            value = centered_sum<digits, used>(whole, load(t.centers + at), line + t.sums_at + s * digits, t.radix);
        else
            value = centered_sum<used>(whole, terms[s], t.radix);
        of_group = fma(value, splat(terms[s].step), of_group);
        if (!t.segments[s].is_last) return;
        result = fma(of_group, load(t.scales + at), result);
        of_group = splat(0.0f);
        if (t.corrections)
            result = fma(splat(bit_cast<float>(line[t.terms_at + segment_terms * s + total_term])),
                         load(t.corrections + at), result);
    };
    int s = 0;
#pragma GCC unroll 4
    for (int j = 0; j < quarters; ++j) {
#pragma GCC unroll 2
        for (int part = 0; part < parts; ++part) whole[part] = add(whole[part], sums[part][j]);
        if (t.segments[s].end > (j + 1) * quarter) continue;
        add_segment(s);
        if (++s == t.count) break;
        for (vi& part : whole) part = splat(0);
    }
    store(total, result);
}

template <int digits, int used, bool own_centers>
METATE_FN void add_rows(const QuarterSums& from, int64_t k, const IntegerTile& t, const SpreadRows& x,
                        int64_t block_of_x) {
    for (int m = 0; m < from.rows; ++m)
        for (int v = 0; v < 2; ++v) add_row<digits, used, own_centers>(from, k, t, x.terms_of(block_of_x, m), m, v);
}

template <bool own_centers>
METATE_FN void add_digits(const QuarterSums& from, int64_t k, const IntegerTile& t, const SpreadRows& x, int64_t at) {
    if (from.parts == 1) return add_rows<1, 1, own_centers>(from, k, t, x, at);
    x.used[at] == 2 ? add_rows<3, 2, own_centers>(from, k, t, x, at) : add_rows<3, 3, own_centers>(from, k, t, x, at);
}

// Scales the sums of block `at` of x, number k of those read, and adds them to the totals: what multiply_segments does.
inline void add_sums(const QuarterSums& from, int64_t k, const IntegerTile& t, const SpreadRows& x, int64_t at) {
    t.centers ? add_digits<true>(from, k, t, x, at) : add_digits<false>(from, k, t, x, at);
}

#else
inline void sum_codes_of(const QuarterSums&, const Reading&, const SpreadRows&, const ByteTable&) {}
inline void add_sums(const QuarterSums&, int64_t, const IntegerTile&, const SpreadRows&, int64_t) {}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
