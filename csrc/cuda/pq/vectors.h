// Vectors as a search compares them: elements of any type, and distances in float64 rounded once.
#pragma once

#include "search.h"

namespace metate::cuda::pq {

struct Vectors {
    View<2> queries, base;
    const float *scale, *offset;  // of an int8 base
    int D;
    Metric metric;
    bool largest;

    METATE_INLINE bool is(Metric other) const { return metric == other; }
    METATE_INLINE bool by_products() const { return is(Metric::l2) || is(Metric::inner_product); }
};

// One number of a matrix as it is stored.
METATE_DEVICE float stored_at(const View<2>& x, int64_t row, int column) {
    const int64_t at = row * x.stride[0] + column * x.stride[1];
    if (x.dtype == DType::f32) return load_global<float>(static_cast<const float*>(x.data) + at);
    if (x.dtype == DType::bf16) return to_float(load_global<bf16>(static_cast<const bf16*>(x.data) + at));
    if (x.dtype == DType::f16) return to_float(load_global<f16>(static_cast<const f16*>(x.data) + at));
    return load_global<int8_t>(static_cast<const int8_t*>(x.data) + at);
}

METATE_DEVICE uint32_t exact_key(const Vectors& v, int64_t q, int64_t row) {
    double sum = 0, most = 0;
    for (int k = 0; k < v.D; ++k) {
        const double x = stored_at(v.queries, q, k);
        double y = stored_at(v.base, row, k);
        if (v.scale) y = y * load_global<float>(v.scale + k) + load_global<float>(v.offset + k);
        const double gap = fabs(x - y);
        if (v.is(Metric::linf)) {
            most = fmax(most, gap);
            sum += gap - gap;  // NaN, which fmax drops
        } else {
            sum += v.is(Metric::inner_product) ? x * y : v.is(Metric::l2) ? gap * gap : gap;
        }
    }
    return key_of(static_cast<float>(sum + most), v.largest);
}

// What bounds.cu knows of groups of rows, so that few of them need be looked at.
constexpr int group_rows = 32, fine_rows = 8;

struct Bounds {
    float* values;         // (queries, groups): no row of a group is below its bound by more than error_of
    const float* squares;  // of the lengths of queries
    const float* lengths;  // of the longest of every group_rows rows
    const float* rough;    // what the rounding of rows is relative to, at least; squared
    int64_t groups;
    int rows;  // of a group: group_rows or fine_rows
    float product_error, sum_error;
};

METATE_DEVICE float bound_at(const Bounds& b, int64_t q, int64_t group) {
    return load_global<float>(b.values + q * b.groups + group);
}

METATE_DEVICE float error_of(const Bounds& b, float square, float rough, int64_t group) {
    const float length = load_global<float>(b.lengths + group * b.rows / group_rows);
    const float longest = length * length > rough ? length * length : rough;
    return b.product_error * sqrtf(square) * length + b.sum_error * (square + longest) + 0x1p-120f;
}

// Fills `values`, `squares`, `lengths` and `rough`, all within `memory`; searches only what `rows.keep` keeps.
struct BoundsProblem {
    Vectors vectors;
    const uint8_t* keep;
    int64_t n, queries;  // queries of a turn, at most
    int rows;            // of a group
};

int64_t bounds_bytes(const BoundsProblem& problem);
Bounds place_bounds(const BoundsProblem& problem, void* memory, const Device& device);
void bound_groups(const BoundsProblem& problem, const Bounds& bounds, void* memory, int64_t first, int64_t count,
                  const Device& device);

// Looks at every row of the ranges of a query.
void search_rows(const Vectors& vectors, const Rows& rows, const Sink& sink, int64_t queries, const Device& device);

}  // namespace metate::cuda::pq
