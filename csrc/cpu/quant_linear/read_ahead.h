// How the codes of a panel are read for few rows of x: some blocks of a row in one run, then those of the next row.
#pragma once

#include "decode.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int few_rows = 4;        // of x
constexpr int blocks_at_once = 8;  // of a row
constexpr int64_t rows_ahead = 8;  // few enough that what was fetched is still in the first cache, and is soon read

struct Reading {
    const LowBitMatrix& w;
    int64_t row, first_block, blocks;
    int64_t begin;  // bytes from the start of a row

    Reading(const LowBitMatrix& matrix, int64_t first_row, int64_t k)
        : w(matrix),
          row(first_row),
          first_block(k),
          blocks(smaller(blocks_at_once, ceil_div(matrix.columns, block) - k)),
          begin(k * block / 8 * matrix.bits) {}

    // Row i of the panel; the last one again where there are no more.
    METATE_FN const uint8_t* line(int64_t i) const {
        return static_cast<const uint8_t*>(w.codes.data) + smaller(row + i, w.rows - 1) * w.codes.stride[0] + begin;
    }
    METATE_FN int64_t bytes_left(int64_t read) const { return ceil_div(w.columns * w.bits, 8) - begin - read; }

    // Bytes from row i of the panel to what is read `rows_ahead` rows later: in this run, in the next, or in the panel
    // behind.
    METATE_FN int64_t ahead(int64_t i) const {
        const int64_t stride = w.codes.stride[0], run = blocks_at_once * block / 8 * w.bits;
        if (i + rows_ahead < panel) return rows_ahead * stride;
        return bytes_left(run) > 0 ? run - (panel - rows_ahead) * stride : rows_ahead * stride - begin;
    }
};

}  // namespace
}  // namespace metate::cpu::METATE_ISA
