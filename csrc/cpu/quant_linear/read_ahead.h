// How the codes of a panel are read for few rows of x: some blocks of a row in one run, then those of the next row.
#pragma once

#include "decode.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int few_rows = 4;                // of x
constexpr int blocks_at_once = 32;         // of a row, at most: a long run, and its sums stay in the second cache
constexpr int64_t rows_ahead = 8;          // that are on their way
constexpr int64_t bytes_of_stream = 8192;  // that are on their way where W is read from end to end

struct Reading {
    const LowBitMatrix& w;
    int64_t row, first_block, most, blocks;
    int64_t begin;  // bytes from the start of a row

    Reading(const LowBitMatrix& matrix, int64_t first_row, int64_t k, int64_t most_blocks)
        : w(matrix),
          row(first_row),
          first_block(k),
          most(most_blocks),
          blocks(smaller(most, ceil_div(matrix.columns, block) - k)),
          begin(k * block / 8 * matrix.bits) {}

    // Row i of the panel; the last one again where there are no more.
    METATE_FN const uint8_t* line(int64_t i) const {
        return static_cast<const uint8_t*>(w.codes.data) + smaller(row + i, w.rows - 1) * w.codes.stride[0] + begin;
    }
    METATE_FN int64_t bytes_left(int64_t read) const { return ceil_div(w.columns * w.bits, 8) - begin - read; }

    // Bytes from row i of the panel to what is read `rows_ahead` rows later: in this run, in the next, or in the panel
    // behind.
    METATE_FN int64_t ahead(int64_t i) const {
        const int64_t stride = w.codes.stride[0], run = most * block / 8 * w.bits;
        if (i + rows_ahead < panel) return rows_ahead * stride;
        return bytes_left(run) > 0 ? run - (panel - rows_ahead) * stride : rows_ahead * stride - begin;
    }
};

// Fetches what will be read while row i and those behind it are: line after line of one row after another, the order
// that processors foresee, though several rows are read side by side.
struct Ahead {
    const uint8_t* at;
    int64_t lines, left, gap;

    Ahead(const Reading& r, int64_t i)
        : at(r.line(i) + r.ahead(i)),
          lines(ceil_div(r.blocks * block / 8 * r.w.bits, 64)),
          left(lines),
          gap(r.w.codes.stride[0] - 64 * lines) {}

    // The same bytes of rows `stride` apart.
    Ahead(const uint8_t* from, int64_t bytes, int64_t stride)
        : at(from), lines(ceil_div(bytes, 64)), left(lines), gap(stride - 64 * lines) {}

    // What comes `bytes_of_stream` after what is read from `from` to `end`, and then, unless that is null, `after`.
    Ahead(const uint8_t* from, const uint8_t* end, const uint8_t* after)
        : at(from + bytes_of_stream),
          lines(int64_t{1} << 40),
          left(larger((end - at) / 64, 1)),
          gap(after ? after - end : 0) {}

    METATE_FN void fetch() {
        __builtin_prefetch(at, 0, 3);
        at += 64;
        if (--left == 0) at += gap, left = lines;
    }
};

}  // namespace
}  // namespace metate::cpu::METATE_ISA
