// Attention backward in double precision: a query and a key at a time, added up where the gradients lie.
#pragma once

#include "../parallel.h"
#include "exact.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Zeros every element, once where it is repeated by a stride of 0.
template <class Real, int N>
inline void clear(const View<N>& view) {
    if (!view) return;
    int64_t extent[4] = {1, 1, 1, 1}, stride[4] = {};
    for (int n = 0; n < N; ++n) extent[n] = view.stride[n] == 0 ? 1 : view.size[n], stride[n] = view.stride[n];
    for (int64_t i = 0; i < extent[0]; ++i) {
        for (int64_t j = 0; j < extent[1]; ++j) {
            for (int64_t k = 0; k < extent[2]; ++k) {
                Real* const row = static_cast<Real*>(view.data) + i * stride[0] + j * stride[1] + k * stride[2];
                for (int64_t l = 0; l < extent[3]; ++l) row[l * stride[3]] = 0;
            }
        }
    }
}

// The largest logit of a row whose lse is coarse, and log Σ exp(logit - that); else lse and 0.
struct SoftmaxExact {
    double reference, rest;
};

inline SoftmaxExact softmax_exact(const AttentionBackward& args, const Sequence& s, const Row& row) {
    const Attention& a = args.problem;
    const double lse = *value_at<double>(args.lse, s.batch, row.head, s.q0 + row.query);
    if (args.partial || fabs(lse) <= largest_lse(DType::f64) || lse == -INFINITY) return {lse, 0};
    const int64_t kv = row.head / (a.q.size[2] / a.k.size[2]);
    const auto logit = [&](int64_t j) {
        const double *q = row_at<double>(a.q, s.batch, s.q0 + row.query, row.head),
                     *k = row_at<double>(a.k, s.batch, s.k0 + j, kv);
        return sees(a, row, j) ? logit_exact(a, s, row, j, dot_exact(q, a.q.stride[3], k, a.k.stride[3], a.q.size[3]))
                               : -static_cast<double>(INFINITY);
    };
    const double sink = a.sinks ? static_cast<const double*>(a.sinks.data)[row.head * a.sinks.stride[0]]
                                : -static_cast<double>(INFINITY);
    double largest = sink, powers = 0;
    for (int64_t j = row.begin; j < row.end; ++j) largest = fmax(largest, logit(j));
    for (int64_t j = row.begin; j < row.end; ++j) powers += exp(logit(j) - largest);
    return {largest, log(powers + exp(sink - largest))};
}

METATE_FN void add_scaled(double* to, int64_t to_stride, double factor, const double* x, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] += factor * x[i * stride];
}

inline void backward_row_exact(const AttentionBackward& args, const Sequence& s, int64_t query, int64_t head) {
    const Attention& a = args.problem;
    const int64_t kv = head / (a.q.size[2] / a.k.size[2]), d = a.q.size[3], dv = a.v.size[3], at = s.q0 + query;
    const Row row = row_of(a, s, query, head);
    const double lse = *value_at<double>(args.lse, s.batch, head, at);
    const double delta = *value_at<double>(args.delta, s.batch, head, at);
    if (lse == -INFINITY) return;
    const SoftmaxExact softmax = softmax_exact(args, s, row);
    const double* const q = row_at<double>(a.q, s.batch, at, head);
    const double* const dout = row_at<double>(args.grad_out, s.batch, at, head);
    double slope_sum = 0;
    for (int64_t j = row.begin; j < row.end; ++j) {
        if (!sees(a, row, j)) continue;
        const double* const k = row_at<double>(a.k, s.batch, s.k0 + j, kv);
        const double* const v = row_at<double>(a.v, s.batch, s.k0 + j, kv);
        double derivative;
        const double product = dot_exact(q, a.q.stride[3], k, a.k.stride[3], d);
        const double p = exp(logit_exact(a, s, row, j, product, &derivative) - softmax.reference - softmax.rest);
        const double z = !a.dropout_threshold ? 1 : keeps(a, s, row, j) ? a.dropout_scale : 0;
        const double dp = z == 0 ? 0 : z * dot_exact(dout, args.grad_out.stride[3], v, a.v.stride[3], dv);
        const double ds = p * (dp - delta), product_gradient = ds * derivative * a.scale;
        if (args.dbias) {
            const int64_t* const stride = args.dbias.stride;
            static_cast<double*>(
                args.dbias.data)[s.batch * stride[0] + head * stride[1] + query * stride[2] + j * stride[3]] += ds;
        }
        slope_sum -= ds * static_cast<double>(llabs(query + s.diagonal - j));
        add_scaled(row_at<double>(args.dq, s.batch, at, head), args.dq.stride[3], product_gradient, k, a.k.stride[3],
                   d);
        add_scaled(row_at<double>(args.dk, s.batch, s.k0 + j, kv), args.dk.stride[3], product_gradient, q,
                   a.q.stride[3], d);
        if (z != 0) {
            add_scaled(row_at<double>(args.dv, s.batch, s.k0 + j, kv), args.dv.stride[3], p * z, dout,
                       args.grad_out.stride[3], dv);
        }
    }
    if (args.dalibi_slopes) {
        const View<2>& to = args.dalibi_slopes;
        const int64_t batch = s.number < to.size[0] ? s.number : 0;
        static_cast<double*>(to.data)[batch * to.stride[0] + head * to.stride[1]] += slope_sum;
    }
}

inline void backward_exact(const AttentionBackward& args, const Runtime& runtime) {
    const Attention& a = args.problem;
    clear<double>(args.dq), clear<double>(args.dk), clear<double>(args.dv), clear<double>(args.dbias),
        clear<double>(args.dalibi_slopes);
    const int64_t kv_heads = a.k.size[2], group = kv_heads ? a.q.size[2] / kv_heads : 0,
                  heads = sequences_of(a) * kv_heads;
    const auto run = [&](int64_t n) {
        const Sequence s = sequence_of(a, n / kv_heads);
        for (int64_t head = n % kv_heads * group; head < (n % kv_heads + 1) * group; ++head) {
            for (int64_t i = 0; i < s.queries; ++i) backward_row_exact(args, s, i, head);
        }
    };
    if (args.dbias || args.dalibi_slopes) {  // heads may add to the same elements
        for (int64_t n = 0; n < heads; ++n) run(n);
    } else {
        for_pieces(runtime, heads, [&](int, int64_t n) { run(n); });
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
