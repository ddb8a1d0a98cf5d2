// One row of x times codes as they lie: the rows of W in turn, so that memory is read line after line. What is summed,
// and in which order, is row_dots.h's and row_chunks.h's.
#pragma once

#include "row_chunks.h"
#include "row_dots.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t columns_in_turn = 4096;  // of a row, at most: as much of x stays in the first-level cache
constexpr int run_blocks = 4;              // of a row of W, whose quarters fill a vector
constexpr int dots_beside = 4;             // rows of W that share what is loaded of x, where that has one digit
constexpr int64_t turn_sums = columns_in_turn / longest * width;  // of a strip

// Columns of `width` rows of W.
struct Strip {
    int64_t row, first_block, blocks;
};

// Number i of the strips from row `first` on.
METATE_FN Strip strip_of(const LowBitMatrix& w, int64_t first, int64_t i) {
    constexpr int64_t most = columns_in_turn / block;
    const int64_t parts = ceil_div(w.columns, columns_in_turn), begin = i % parts * most;
    return {first + i / parts * width, begin, smaller(most, ceil_div(w.columns, block) - begin)};
}

METATE_FN const uint8_t* codes_of(const LowBitMatrix& w, const Strip& s) {
    return codes_at(w, s.row, s.first_block);
}

// What is to be fetched meanwhile, from row number r of a strip: as many rows later as are 8 KiB, or as many of the
// next strip.
struct TurnAhead {
    int64_t rows, stride, beyond;  // bytes to the row of that number in the next strip, were it behind the last of this

    TurnAhead(const LowBitMatrix& w, const Strip& s, const uint8_t* next)
        : rows(smaller(8192 / (smaller(columns_in_turn, w.columns) * w.bits / 8 + 1) + 1, width)),
          stride(w.codes.stride[0]),
          beyond(next - codes_of(w, s) - width * stride) {}
    METATE_FN int64_t bytes(int64_t r) const { return rows * stride + (r + rows < width ? 0 : beyond); }
};

// Segments side by side whose sums fill a vector, a unit: with three digits they are blocks, otherwise chunks, which
// are quarters of blocks in whole numbers, in the lanes in which sum_parts leaves them.
METATE_FN constexpr int blocks_of_unit(int digits) {
    return digits == 3 ? width : width * longest / block;
}

// Of one row of W for `width` segments: where all codes have the same center, Term; otherwise what it is found from,
// with groups numbered from the first one on.
struct UnitTerms {
    int32_t high[width], low[width];
    int32_t digit_sums[3][width], groups[width], first_group;
    bool has_last;  // of the digits
};

METATE_FN bool can_take_turns(const LowBitMatrix& w, const Arithmetic& arithmetic) {
    if (w.columns == 0) return false;
    const bool are_blocks = w.group_size % block == 0 || w.group_size >= w.columns;
    return arithmetic.digits == 0 ? can_sum_chunks(w)
                                  : can_dot_rows(w, arithmetic) && (arithmetic.digits < 3 || are_blocks) &&
                                        (!w.zeros || w.zeros.stride[1] == 1);
}

inline void set_unit(UnitTerms& to, const SpreadRows& x, const IntegerRows& from, const IntegerPlan* plans,
                     int64_t first, int64_t blocks) {
    to = {};
    to.first_group = static_cast<int32_t>(plans[first].segments[0].group);
    for (int lane = 0; lane < width; ++lane) {
        const int chunk = x.digits == 3 ? lane * quarters : chunk_in(lane), s = chunk % quarters;
        const int64_t k = first + chunk / quarters;
        if (k >= blocks || s >= plans[k].count) continue;
        const int32_t* const line = from.line(k, 0);
        const Term& term = x.terms_of(k, 0)[s];
        to.high[lane] = term.high;
        to.low[lane] = term.low;
        to.groups[lane] = static_cast<int32_t>(plans[k].segments[s].group) - to.first_group;
        for (int d = 0; d < x.digits; ++d) to.digit_sums[d][lane] = line[from.sums_at() + s * x.digits + d];
        to.has_last |= x.digits == 3 && x.used[k] == 3;
    }
}

// The sums of a unit of `width` rows of W: a vector a segment, in ascending order.
METATE_FN void order_unit(vf (&to)[width], const float* sums, bool are_chunks) {
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load(sums + i * width);
    transpose(square);
    if (are_chunks) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) to[chunk_in(i)] = square[i];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) to[i] = square[i];
    }
}

#if defined(METATE_HAS_VNNI_FORMS)

// Codes of a row of W from some block on, and what their segments are centered by.
struct TurnCodes {
    const uint8_t* codes;
    int64_t bytes, ahead;
    const uint8_t* zeros;  // of the row, or null
    int64_t groups;
    int32_t zero;
};

METATE_FN vi center_of(const TurnCodes& w, const UnitTerms& terms) {
    const vi zeros = load_wide(w.zeros + terms.first_group, smaller(w.groups - terms.first_group, width));
    const vi spread = as_int(lookup({as_float(zeros)}, load(terms.groups)));
    return bit_and(sub(splat(-w.zero), spread), splat(0xffff));
}

// What centered_sum() finds.
template <int digits>
METATE_FN vf whole_sum(vi high, vi low, const TurnCodes& w, const UnitTerms& terms, float radix) {
    vi high_term = load(terms.high), low_term = load(terms.low);
    if (w.zeros) {
        const vi center = center_of(w, terms);
        high_term = multiply_words(center, load(terms.digit_sums[0]));
        if (digits == 3) {
            high_term = add(shift_left(high_term, 8), multiply_words(center, load(terms.digit_sums[1])));
            low_term = multiply_words(center, load(terms.digit_sums[2]));
        }
    }
    vf value = to_float(add(high, high_term));
    if (digits == 3)
        value = terms.has_last ? fma(value, splat(radix), to_float(add(low, low_term))) : value * splat(radix);
    return value;
}

// A unit of one row whose numbers have one digit, and of x what stands beside it.
template <int bits, bool has_table>
METATE_FN void sum_unit(float* to, const TurnCodes& w, int64_t read, const vi (&x)[run_blocks][2],
                        const UnitTerms& terms, vi entries) {
    constexpr int block_bytes = block / 8 * bits;
    vi sums[run_blocks];
#pragma GCC unroll 4
    for (int i = 0; i < run_blocks; ++i, read += block_bytes) {
        vi both[2];
#pragma GCC unroll 2
        for (int at = 0; at < block_bytes; at += 64) __builtin_prefetch(w.codes + read + w.ahead + at, 0, 2);
        load_codes<bits>(both[0], both[1], w.codes + read, w.bytes - read);
        sums[i] = splat(0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            vnni_add_dot(sums[i], has_table ? lookup_bytes(entries, both[half]) : both[half], x[i][half]);
    }
    store(to, whole_sum<1>(sum_parts(sums), splat(0), w, terms, 0));
}

// Sums of some blocks of `rows` rows, which share what is loaded of x: a unit of a row a vector, the rows of a unit one
// after another, units `width` vectors apart.
template <int bits, bool has_table, int rows>
__attribute__((noinline)) void sum_rows_as(float* to, const TurnCodes* w, const int32_t* quads, int64_t blocks,
                                           const UnitTerms* terms, const ByteTable& table) {
    const vi entries = table_of_bytes(table.bytes);
    for (int64_t k = 0; k < blocks; k += run_blocks, to += width * width, ++terms) {
        vi x[run_blocks][2];
#pragma GCC unroll 4
        for (int i = 0; i < run_blocks; ++i, quads += quads_of_block)
            x[i][0] = load(quads), x[i][1] = load(quads + width);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
            sum_unit<bits, has_table>(to + r * width, w[r], k * (block / 8) * bits, x, *terms, entries);
    }
}

// The same of one row whose numbers have three digits.
template <int bits, bool has_table>
__attribute__((noinline)) void sum_row_as(float* to, const TurnCodes& w, const int32_t* quads, int64_t blocks,
                                          const UnitTerms* terms, const ByteTable& table, float radix) {
    constexpr int digits = 3, block_bytes = block / 8 * bits, runs = blocks_of_unit(digits) / run_blocks;
    const vi entries = table_of_bytes(table.bytes);
    const uint8_t* codes = w.codes;
    int64_t bytes = w.bytes;
    for (int64_t k = 0; k < blocks; k += runs * run_blocks, to += width * width, ++terms) {
        vi high[runs], low[runs];
        const auto sum_unit = [&]<bool has_last>() __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int run = 0; run < runs; ++run) {
                vi sums[2][run_blocks];
#pragma GCC unroll 4
                for (int i = 0; i < run_blocks; ++i, quads += digits * quads_of_block) {
                    vi both[2];
#pragma GCC unroll 2
                    for (int at = 0; at < block_bytes; at += 64) __builtin_prefetch(codes + w.ahead + at, 0, 2);
                    load_codes<bits>(both[0], both[1], codes, bytes);
                    for (vi& part : both) part = has_table ? lookup_bytes(entries, part) : part;
                    sums[0][i] = dot<2>(both, quads);
                    if constexpr (has_last) sums[1][i] = dot<1>(both, quads + 2 * quads_of_block);
                    codes += block_bytes;
                    bytes -= block_bytes;
                }
                high[run] = sum_parts(sums[0]);
                if constexpr (has_last) low[run] = sum_parts(sums[1]);
            }
        };
        terms->has_last ? sum_unit.template operator()<true>() : sum_unit.template operator()<false>();
        const auto joined = [](const vi(&x)[runs]) __attribute__((always_inline)) {
            const auto halve = [](vi a, vi b) { return add(join_even_parts(a, b), join_odd_parts(a, b)); };
            return halve(halve(x[0], x[1]), halve(x[2], x[3]));
        };
        store(to, whole_sum<digits>(joined(high), terms->has_last ? joined(low) : splat(0), w, *terms, radix));
    }
}

template <int bits, bool has_table>
METATE_FN void sum_rows_in(float* to, const TurnCodes* w, int64_t rows, const int32_t* quads, int64_t blocks,
                           const UnitTerms* terms, int digits, const ByteTable& table, float radix) {
    if (digits == 1 && rows == dots_beside)
        return sum_rows_as<bits, has_table, dots_beside>(to, w, quads, blocks, terms, table);
    for (; rows > 0; --rows, ++w, to += width)
        digits == 3 ? sum_row_as<bits, has_table>(to, *w, quads, blocks, terms, table, radix)
                    : sum_rows_as<bits, has_table, 1>(to, w, quads, blocks, terms, table);
}

// Up to dots_beside rows of a strip, from number `first` on.
inline void dot_in_turn(float* to, const LowBitMatrix& w, const Strip& s, int64_t first, int64_t rows,
                        const TurnAhead& ahead, const SpreadRows& x, const UnitTerms* terms, const ByteTable& table,
                        float radix) {
    const int64_t begin = s.first_block * block / 8 * w.bits;
    TurnCodes codes[dots_beside];
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = s.row + first + r;
        const uint8_t* const zeros = static_cast<const uint8_t*>(w.zeros.data) + row * w.zeros.stride[0];
        codes[r] = {static_cast<const uint8_t*>(w.codes.data) + row * w.codes.stride[0] + begin,
                    ceil_div(w.columns * w.bits, 8) - begin,
                    ahead.bytes(first + r),
                    has_own_centers(w) ? zeros : nullptr,
                    w.zeros.size[1],
                    static_cast<int32_t>(w.zero)};
    }
    const int32_t* const quads = x.at(s.first_block, 0);
    terms += s.first_block / blocks_of_unit(x.digits);
    if (w.bits == 8) return sum_rows_in<8, false>(to, codes, rows, quads, s.blocks, terms, x.digits, table, radix);
    table.unit ? sum_rows_in<4, true>(to, codes, rows, quads, s.blocks, terms, x.digits, table, radix)
               : sum_rows_in<4, false>(to, codes, rows, quads, s.blocks, terms, x.digits, table, radix);
}

#else
inline void dot_in_turn(float*, const LowBitMatrix&, const Strip&, int64_t, int64_t, const TurnAhead&,
                        const SpreadRows&, const UnitTerms*, const ByteTable&, float) {}
#endif

// Floats.

// As many chunks of a row of W as there are lanes, and the same columns of x.
struct Run {
    float* to;
    const uint8_t* codes;
    int64_t left, ahead;  // bytes: of the row, and to what is to be fetched meanwhile
    const float* x;
};

constexpr int runs_beside = 2;  // the chain of one would leave the processor waiting
constexpr int64_t runs_in_turn = columns_in_turn / (width * longest);

// The runs of a strip, row by row.
struct TurnRuns {
    const LaneRows& x;
    const uint8_t* codes;
    int64_t stride, left, bytes, first, count;

    TurnRuns(const LowBitMatrix& w, const Strip& s, const LaneRows& from)
        : x(from),
          codes(codes_of(w, s)),
          stride(w.codes.stride[0]),
          left(ceil_div(w.columns, 2) - s.first_block * block / 2),
          bytes(run_columns / 2),
          first(s.first_block * block / run_columns),
          count(ceil_div(s.blocks * block, run_columns)) {}

    // Rows that are read together: their runs side by side leave none over.
    METATE_FN int64_t rows_beside() const {
        int64_t rows = 1;
        while (rows * count % runs_beside) ++rows;
        return rows;
    }
    // Those of row r, whose sums go to every width-th vector; returns the place behind them.
    METATE_FN Run* set(Run* runs, float* to, int64_t r, int64_t ahead) const {
        const uint8_t* from = codes + r * stride;
        for (int64_t i = 0; i < count; ++i, to += width * width, from += bytes)
            *runs++ = {to, from, left - i * bytes, ahead, x.at(first + i, 0)};
        return runs;
    }
};

template <Values::Kind kind, int n>
METATE_FN void sum_runs(const Run* runs, const Finder<kind>& find) {
    constexpr int bytes = width * longest / 2;
    vf sums[n];
    vi words[n][4];
#pragma GCC unroll 4
    for (int q = 0; q < n; ++q) {
        sums[q] = splat(0.0f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) words[q][i] = part_of(runs[q].codes, i, runs[q].left);
#pragma GCC unroll 8
        for (int at = 0; at < bytes; at += 64) __builtin_prefetch(runs[q].codes + runs[q].ahead + at, 0, 2);
        transpose_parts(words[q]);
    }
#pragma GCC unroll 32
    for (int j = 0; j < longest; ++j) {
#pragma GCC unroll 4
        for (int q = 0; q < n; ++q) sums[q] = add_product(sums[q], load(runs[q].x + j * width), find(words[q], j));
    }
#pragma GCC unroll 4
    for (int q = 0; q < n; ++q) store(runs[q].to, sums[q]);
}

template <Values::Kind kind>
__attribute__((noinline)) void sum_runs_as(const Run* runs, int64_t n, const Values& values) {
    const Finder<kind> find(values);
    for (; n >= runs_beside; n -= runs_beside, runs += runs_beside) sum_runs<kind, runs_beside>(runs, find);
    for (; n > 0; --n, ++runs) sum_runs<kind, 1>(runs, find);
}

inline void sum_runs_of(const Run* runs, int64_t n, const Values& values) {
    values.kind == Values::table ? sum_runs_as<Values::table>(runs, n, values)
                                 : sum_runs_as<Values::whole>(runs, n, values);
}

// Asks for what scales the rows of a strip.
struct TurnLevels {
    struct Level {
        const char* line;
        int64_t stride, bytes;  // of a row, and of the groups of the strip
    } levels[2];
    int count = 0;

    TurnLevels(const LowBitMatrix& w, int64_t row, int64_t first, int64_t last) {
        const View<2>* const views[] = {&w.scales, &w.offsets};
        for (const View<2>* view : views) {
            if (!*view) continue;
            const int64_t size = bytes_of(view->dtype), step = view->stride[1] * size, stride = view->stride[0] * size;
            levels[count++] = {static_cast<const char*>(view->data) + row * stride + first * step, stride,
                               (last - first) * step};
        }
    }
    METATE_FN void fetch(int64_t r) const {
        for (int i = 0; i < count; ++i) {
            const char* const line = levels[i].line + r * levels[i].stride;
            for (int64_t at = 0; at <= levels[i].bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
        }
    }
};

}  // namespace
}  // namespace metate::cpu::METATE_ISA
