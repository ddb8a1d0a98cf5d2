// A panel of W decoded into the first-level cache, in floats or pairs, and its totals as results.
#pragma once

#include "problem.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Of pairs that 4-bit codes stand for.
inline vi table_of([[maybe_unused]] const Problem& p) {
#if defined(METATE_HAS_BF16_DOT)
    if (p.pairs) return pair_table(p.values.entries);
#endif
#if defined(METATE_HAS_WORD_SHUFFLES)
    return whole_table(p.values.entries);
#else
    return splat(0);
#endif
}

// A whole block of `width` rows as pairs; `centers` as in spread_centers, or null.
inline void decode_square_of(const Problem& p, int64_t row, int64_t k, const int32_t* centers, float* to) {
    const LowBitMatrix& w = p.call.w;
    const int64_t pitch = w.in_tiles() ? rows_of_tile * 4 : w.row_bytes(), ahead = bytes_ahead(w, k);
    const auto as = w.in_tiles() ? centers ? decode_square<true, true> : decode_square<true, false>
                  : centers      ? decode_square<false, true>
                                 : decode_square<false, false>;
    as(to, codes_at(w, row, k), pitch, ahead, table_of(p), centers);
}

inline void decode_panel(const Problem& p, const Workspace& at, int64_t panel_number, int64_t row, int64_t k,
                         float* to) {
    const LowBitMatrix& w = p.call.w;
    const int64_t columns = smaller(block, w.columns - k * block);
    for (int v = 0; v < 2 && row + v * width < w.rows; ++v) {
        float* const values = to + v * width;
        const int64_t first = row + v * width, passed = p.plans[k].first_group - at.first_group[panel_number];
        const int64_t offset = (panel_number * p.window + passed) * panel + v * width;
        const bool has_centers = p.whole_pairs && at.centers;
        int32_t centers[block / unit_columns * width];
        if (has_centers) spread_centers(centers, p.plans[k], at.centers + offset);
        if (p.x.unit != Unit::floats && w.bits == 4 && columns == block && first + width <= w.rows) {
            decode_square_of(p, first, k, has_centers ? centers : nullptr, values);
        } else {
            transpose_words(at.words, w, first, k, bytes_ahead(w, k));
            if (p.x.unit == Unit::floats)
                decode(values, panel, at.words, columns, w.bits, p.values);
            else if (w.bits == 4)
                decode_pairs(values, panel, at.words, columns, table_of(p));
            else
                decode_byte_pairs(values, at.words, columns, p.values.center);
            if (has_centers) add_centers(values, centers, columns);
        }
        if (!p.sums_scaled)
            scale_values(values, at.scales + offset, at.corrections ? at.corrections + offset : nullptr,
                         has_own_centers(w), panel, k * block, columns, w.group_size);
    }
}

template <class T>
void write_panel(const QuantLinear& call, const float* totals, int64_t row, int64_t first_x, int64_t rows) {
    const int64_t n = smaller(panel, call.w.rows - row);
    float bias[panel] = {};
    for (int64_t i = 0; i < n && call.bias; ++i) {
        const int64_t at = (row + i) * call.bias.stride[0];
        bias[i] = call.bias.dtype == DType::f32 ? static_cast<const float*>(call.bias.data)[at]
                                                : to_float(static_cast<const T*>(call.bias.data)[at]);
    }
    const vf first = load(bias), second = load(bias + width);
    T* out = static_cast<T*>(call.out.data) + first_x * call.out.stride[0] + row;
    for (int64_t r = 0; r < rows; ++r, totals += panel, out += call.out.stride[0]) {
        const vf line[] = {load(totals) + first, load(totals + width) + second};
        if (n == panel) {
            store(out, line[0]);
            store(out + width, line[1]);
        } else {
            store(out, line[0], smaller(n, width));
            if (n > width) store(out + width, line[1], n - width);
        }
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
