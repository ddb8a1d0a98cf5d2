// The products in double precision, one weight at a time: csrc/quant_linear.h to the letter.
#pragma once

#include "low_rank.h"

#if defined(METATE_ISA_BASELINE)
namespace metate::cpu::METATE_ISA {
namespace {

inline double exact_at(const View<2>& view, int64_t row, int64_t column) {
    if (view.dtype == DType::f64)
        return static_cast<const double*>(view.data)[row * view.stride[0] + column * view.stride[1]];
    if (view.dtype == DType::i8) return static_cast<double>(number_at<int8_t>(view, row, column));
    return static_cast<double>(any_at(view, row, column));
}

inline double level_exact(const View<2>& fine, const View<2>& coarse, int64_t super_groups, int64_t row, int64_t g) {
    const double value = exact_at(fine, row, g);
    return coarse ? value * exact_at(coarse, row, g / super_groups) : value;
}

inline double weight_exact(const LowBitMatrix& w, int64_t row, int64_t j) {
    const uint8_t* const codes = codes_at(w, row, 0);
    const int64_t bit = j * w.bits, shift = bit % 8, number = bit / 8;
    const int64_t byte = w.in_tiles() ? number / 4 * rows_of_tile * 4 + number % 4 : number;
    int code = codes[byte] >> shift;
    if (shift + w.bits > 8) code |= codes[byte + 1] << (8 - shift);
    code &= (1 << w.bits) - 1;
    const int64_t g = j / w.group_size;
    double value = static_cast<double>(code - w.zero);
    if (w.zeros) value -= static_cast<double>(number_at<uint8_t>(w.zeros, row, g));
    if (w.codebook) {
        const int64_t at = code * w.codebook.stride[0];
        value = w.codebook.dtype == DType::f64 ? static_cast<const double*>(w.codebook.data)[at]
                                               : static_cast<double>(static_cast<const float*>(w.codebook.data)[at]);
    }
    value *= level_exact(w.scales, w.super_scales, w.super_groups, row, g);
    return w.offsets ? value + level_exact(w.offsets, w.super_offsets, w.super_groups, row, g) : value;
}

METATE_FN int64_t feature_of(const LowBitMatrix& w, int64_t j) {
    return w.permutation ? static_cast<const int32_t*>(w.permutation.data)[j * w.permutation.stride[0]] : j;
}

constexpr int64_t exact_columns = 256;

// What the update adds to column n of row m.
inline double update_exact(const LowRank& u, int64_t m, int64_t n) {
    const int64_t adapter = u.low ? adapter_of(u.ids, u.right.size[0], m) : -1;
    if (adapter < 0) return 0;
    const View<2> right = matrix_of(u.right, adapter);
    double sum = 0;
    for (int64_t i = 0; i < right.size[1]; ++i) sum += exact_at(u.low, m, i) * exact_at(right, n, i);
    return sum * static_cast<const double*>(u.scaling.data)[adapter * u.scaling.stride[0]];
}

inline void linear_exact(const QuantLinear& call, const Runtime& runtime) {
    const LowBitMatrix& w = call.w;
    for_pieces(runtime, w.rows, [&](int, int64_t n) {
        double* const out = static_cast<double*>(call.out.data) + n;
        double bias = 0;
        if (call.bias) {
            const int64_t at = n * call.bias.stride[0];
            bias = call.bias.dtype == DType::f64 ? static_cast<const double*>(call.bias.data)[at]
                                                 : static_cast<double>(static_cast<const float*>(call.bias.data)[at]);
        }
        for (int64_t m = 0; m < call.x.size[0]; ++m) out[m * call.out.stride[0]] = 0;
        for (int64_t k = 0; k < w.columns; k += exact_columns) {
            double weights[exact_columns];
            const int64_t columns = smaller(exact_columns, w.columns - k);
            for (int64_t j = 0; j < columns; ++j) weights[j] = weight_exact(w, n, k + j);
            for (int64_t m = 0; m < call.x.size[0]; ++m) {
                const double* x = static_cast<const double*>(call.x.data) + m * call.x.stride[0];
                double sum = 0;
                for (int64_t j = 0; j < columns; ++j) sum += x[feature_of(w, k + j) * call.x.stride[1]] * weights[j];
                out[m * call.out.stride[0]] += sum;
            }
        }
        for (int64_t m = 0; m < call.x.size[0]; ++m)
            out[m * call.out.stride[0]] += update_exact(call.update, m, n) + bias;
    });
}

inline void matmul_exact(const QuantMatmul& call, const Runtime& runtime) {
    const LowBitMatrix& w = call.w;
    for_pieces(runtime, w.columns, [&](int, int64_t j) {
        double* const out = static_cast<double*>(call.out.data) + feature_of(w, j);
        for (int64_t m = 0; m < call.x.size[0]; ++m) out[m * call.out.stride[0]] = 0;
        for (int64_t n = 0; n < w.rows; n += exact_columns) {
            double weights[exact_columns];
            const int64_t rows = smaller(exact_columns, w.rows - n);
            for (int64_t i = 0; i < rows; ++i) weights[i] = weight_exact(w, n + i, j);
            for (int64_t m = 0; m < call.x.size[0]; ++m) {
                const double* x = static_cast<const double*>(call.x.data) + m * call.x.stride[0] + n * call.x.stride[1];
                double sum = 0;
                for (int64_t i = 0; i < rows; ++i) sum += x[i * call.x.stride[1]] * weights[i];
                out[m * call.out.stride[0]] += sum;
            }
        }
        for (int64_t m = 0; m < call.x.size[0]; ++m)
            out[m * call.out.stride[0]] += update_exact(call.update, m, feature_of(w, j));
    });
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
#endif
