// Attention scores in double precision, one key at a time: csrc/attention.h to the letter.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "score.h"

namespace metate::cpu::METATE_ISA {
namespace {

METATE_FN bool sees(const Attention& a, const Row& row, int64_t key) {
    return mask_word(a, row, key / chunk * chunk) >> key % chunk & 1;
}

// In eight sums, which are rounded less often than one and do not wait for each other.
METATE_FN double dot_exact(const double* x, int64_t x_stride, const double* y, int64_t y_stride, int64_t n) {
    double sum[8] = {};
    for (int64_t i = 0; i < n; ++i) sum[i % 8] += x[i * x_stride] * y[i * y_stride];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// The logit of a row and key from their product. `derivative`, if not null: d capped / d (scale · product).
inline double logit_exact(const Attention& a, const Sequence& s, const Row& row, int64_t key, double product,
                          double* derivative = nullptr) {
    double x = product * a.scale;
    if (derivative) *derivative = 1;
    if (a.softcap > 0) {
        const double t = ::tanh(x / a.softcap);
        x = t * a.softcap;
        if (derivative) *derivative = 1 - t * t;
    }
    if (row.bias) {
        const int64_t at = key * a.bias.stride[3];
        x += a.bias.dtype == DType::f64 ? reinterpret_cast<const double*>(row.bias)[at]
                                        : reinterpret_cast<const float*>(row.bias)[at];
    }
    if (a.alibi_slopes) {
        const auto& view = a.alibi_slopes;
        const int64_t batch = s.number < view.size[0] ? s.number : 0;
        const double slope = static_cast<const double*>(view.data)[batch * view.stride[0] + row.head * view.stride[1]];
        x -= slope * static_cast<double>(llabs(row.query + s.diagonal - key));
    }
    return x;
}

METATE_FN bool keeps(const Attention& a, const Sequence& s, const Row& row, int64_t key) {
    return !a.dropout_threshold || (kept_keys(a, s.number, row.query, row.head, key / 64) >> key % 64 & 1);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
