// Partial attention results over disjoint keys, merged by their log-sum-exp.
//
// A piece of work is a vector of queries of all heads: their lses stand side by side, so the weights of a head are
// found for all of them at once, and the parts are then read in the order of memory.
#include <math.h>

#include "../../attention.h"
#include "../parallel.h"
#include "../strided.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Σ weight[i · width] · part i of n over `vectors` vectors of columns, the last of which may be short; a part of weight
// 0 is not looked at. Part after part, so that memory is read in runs of whole cache lines.
template <int vectors, class T>
METATE_FN void merge_columns(const T* parts, int64_t part_stride, int64_t stride, const float* weight, int64_t n,
                             int64_t columns, T* out, int64_t out_stride) {
    vf sum[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = splat(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        if (weight[i * width] == 0.0f) continue;
        const T* part = parts + i * part_stride;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const vf x = load_any(part + v * width * stride, stride, vectors > 1 ? width : columns);
            sum[v] = fma(splat(weight[i * width]), x, sum[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        store_any(out + v * width * out_stride, out_stride, sum[v], vectors > 1 ? width : columns);
}

template <class T>
void merge_row(const T* parts, int64_t part_stride, int64_t stride, const float* weight, int64_t n, int64_t dv, T* out,
               int64_t out_stride) {
    constexpr int many = 8;
    int64_t c = 0;
    for (; c + many * width <= dv; c += many * width)
        merge_columns<many>(parts + c * stride, part_stride, stride, weight, n, dv - c, out + c * out_stride,
                            out_stride);
    for (; c < dv; c += width)
        merge_columns<1>(parts + c * stride, part_stride, stride, weight, n, dv - c, out + c * out_stride, out_stride);
}

template <class T>
METATE_FN T* at(const View<4>& view, int64_t i, int64_t j, int64_t k) {
    return static_cast<T*>(view.data) + i * view.stride[1] + j * view.stride[2] + k * view.stride[3];
}
template <class T>
METATE_FN T* at(const View<3>& view, int64_t i, int64_t j, int64_t k) {
    return static_cast<T*>(view.data) + i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
}

// weight[i · width + q] = exp(lse_i - lse) of part i for `queries` <= width queries from `query` on; writes their lse.
void find_weights(const MergeAttentionStates& call, int64_t b, int64_t h, int64_t query, int64_t queries,
                  float* weight) {
    const int64_t n = call.lses.size[0], stride = call.lses.stride[3], lse_stride = call.lse.stride[2];
    vf top = splat(-INFINITY), total = splat(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        const vf x = load_any(at<float>(call.lses, b, h, query) + i * call.lses.stride[0], stride, queries);
        store(weight + i * width, x);
        top = max(x, top);
    }
    for (int64_t i = 0; i < n; ++i) {
        const vf x = load(weight + i * width), y = exp2((x - top) * splat(log2_e));
        const vf w = select(equal(x, splat(-INFINITY)), splat(0.0f), y);
        store(weight + i * width, w);
        total = total + w;
    }
    const vf none = splat(0.0f);
    for (int64_t i = 0; i < n; ++i)
        store(weight + i * width, select(equal(total, none), none, load(weight + i * width) / total));
    float tops[width], totals[width];
    store(tops, top);
    store(totals, total);
    float* lse = at<float>(call.lse, b, h, query);
    for (int64_t q = 0; q < queries; ++q) lse[q * lse_stride] = totals[q] == 0 ? -INFINITY : tops[q] + logf(totals[q]);
}

template <class T>
void run(const MergeAttentionStates& call, const Runtime& runtime) {
    const View<5>& outs = call.outs;
    const int64_t n = outs.size[0], queries = outs.size[2], heads = outs.size[3], dv = outs.size[4];
    const int64_t groups = (queries + width - 1) / width, pieces = outs.size[1] * groups;
    if (pieces == 0) return;
    const Runtime workers = worth(runtime, n * outs.size[1] * queries * heads * dv / 16);
    const auto weights =
        lay_out(workers, pieces, [](Arena&) {}, [=](Arena& arena) { return arena.take<float>(heads * n * width); });
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        float* const weight = weights(worker);
        const int64_t b = piece / groups, first = piece % groups * width;
        const int64_t live = queries - first < width ? queries - first : width;
        for (int64_t h = 0; h < heads; ++h) find_weights(call, b, h, first, live, weight + h * n * width);
        for (int64_t q = 0; q < live; ++q) {
            for (int64_t h = 0; h < heads; ++h) {
                const T* parts = static_cast<const T*>(outs.data) + b * outs.stride[1] + (first + q) * outs.stride[2] +
                                 h * outs.stride[3];
                T* out = static_cast<T*>(call.out.data) + b * call.out.stride[0] + (first + q) * call.out.stride[1] +
                         h * call.out.stride[2];
                merge_row(parts, outs.stride[0], outs.stride[4], weight + h * n * width + q, n, dv, out,
                          call.out.stride[3]);
            }
        }
    });
}

#if defined(METATE_ISA_BASELINE)
// Double precision, a row at a time.
void merge_row_exact(const MergeAttentionStates& call, int64_t b, int64_t h, int64_t query) {
    const View<5>& outs = call.outs;
    const int64_t n = outs.size[0];
    const double* lses = at<double>(call.lses, b, h, query);
    const double* parts =
        static_cast<const double*>(outs.data) + b * outs.stride[1] + query * outs.stride[2] + h * outs.stride[3];
    double* out = static_cast<double*>(call.out.data) + b * call.out.stride[0] + query * call.out.stride[1] +
                  h * call.out.stride[2];
    double top = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; ++i) top = fmax(top, lses[i * call.lses.stride[0]]);
    for (int64_t i = 0; i < n && top > -INFINITY; ++i) total += exp(lses[i * call.lses.stride[0]] - top);
    *at<double>(call.lse, b, h, query) = total == 0 ? -INFINITY : top + log(total);
    for (int64_t c = 0; c < outs.size[4]; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < n && total != 0; ++i) {
            const double weight = exp(lses[i * call.lses.stride[0]] - top) / total;
            if (weight != 0) sum += weight * parts[i * outs.stride[0] + c * outs.stride[4]];
        }
        out[c * call.out.stride[3]] = sum;
    }
}

void run_exact(const MergeAttentionStates& call, const Runtime& runtime) {
    const int64_t queries = call.outs.size[2], heads = call.outs.size[3];
    for_pieces(runtime, call.outs.size[1] * queries, [&](int, int64_t i) {
        for (int64_t h = 0; h < heads; ++h) merge_row_exact(call, i / queries, h, i % queries);
    });
}
#endif

}  // namespace

void merge_attention_states(const MergeAttentionStates& call, const Runtime& runtime) {
    switch (call.outs.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            return run_exact(call, runtime);
#endif
        case DType::bf16:
            return run<bf16>(call, runtime);
        case DType::f16:
            return run<f16>(call, runtime);
        default:
            return run<float>(call, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(merge_attention_states, MergeAttentionStates, p.outs.dtype)
