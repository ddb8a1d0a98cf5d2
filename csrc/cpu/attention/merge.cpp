// Partial attention results over disjoint keys, merged by their log-sum-exp.
#include <math.h>

#include "../../attention.h"
#include "../parallel.h"
#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t rows_of_piece = 64;

template <class T>
METATE_FN vf load_any(const T* from, int64_t stride, int64_t n) {
    if (stride == 1) return n >= width ? load(from) : load(from, n);
    float line[width] = {};
    for (int64_t i = 0; i < n && i < width; ++i) line[i] = to_float(from[i * stride]);
    return load(line);
}

template <class T>
METATE_FN void store_any(T* to, int64_t stride, vf x, int64_t n) {
    if (stride == 1) return n >= width ? store(to, x) : store(to, x, n);
    float line[width];
    store(line, x);
    for (int64_t i = 0; i < n && i < width; ++i) to[i * stride] = from_float<T>(line[i]);
}

// Σ weight[i] · part i of n, over the rows of dv elements; a part of weight 0 is not looked at.
template <class T>
void merge_row(const T* parts, int64_t part_stride, int64_t stride, const float* weight, int64_t n, int64_t dv, T* out,
               int64_t out_stride) {
    for (int64_t c = 0; c < dv; c += width) {
        vf sum = splat(0.0f);
        for (int64_t i = 0; i < n; ++i) {
            if (weight[i] == 0.0f) continue;
            sum = fma(splat(weight[i]), load_any(parts + i * part_stride + c * stride, stride, dv - c), sum);
        }
        store_any(out + c * out_stride, out_stride, sum, dv - c);
    }
}

#if defined(METATE_ISA_BASELINE)
void merge_row(const double* parts, int64_t part_stride, int64_t stride, const double* weight, int64_t n, int64_t dv,
               double* out, int64_t out_stride) {
    for (int64_t c = 0; c < dv; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (weight[i] != 0) sum += weight[i] * parts[i * part_stride + c * stride];
        }
        out[c * out_stride] = sum;
    }
}
#endif

// weight[i] = exp(lse_i - lse); returns lse.
template <class Wide>
Wide weights_of(const Wide* lses, int64_t stride, int64_t n, Wide* weight) {
    Wide top = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; ++i) top = lses[i * stride] > top ? lses[i * stride] : top;
    for (int64_t i = 0; i < n; ++i) {
        const Wide lse = lses[i * stride];
        weight[i] = lse == -INFINITY ? 0 : static_cast<Wide>(exp(static_cast<double>(lse - top)));
        total += weight[i];
    }
    for (int64_t i = 0; i < n; ++i) weight[i] = total == 0 ? 0 : weight[i] / total;
    return total == 0 ? -INFINITY : static_cast<Wide>(top + log(static_cast<double>(total)));
}

template <class T, class Wide>
void run(const MergeAttentionStates& call, const Runtime& runtime) {
    const View<5>& outs = call.outs;
    const View<4>& lses = call.lses;
    const int64_t n = outs.size[0], queries = outs.size[2], heads = outs.size[3], dv = outs.size[4];
    const int64_t rows = outs.size[1] * queries * heads, pieces = (rows + rows_of_piece - 1) / rows_of_piece;
    if (pieces == 0) return;
    const int workers = static_cast<int>(pieces < runtime.threads ? pieces : runtime.threads);
    Arena arena;
    arena.take<Wide>(n);
    const size_t bytes = arena.used;
    char* const scratch = static_cast<char*>(runtime.scratch(bytes * static_cast<size_t>(workers)));
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        Wide* weight = reinterpret_cast<Wide*>(scratch + static_cast<size_t>(worker) * bytes);
        const int64_t end = (piece + 1) * rows_of_piece < rows ? (piece + 1) * rows_of_piece : rows;
        for (int64_t row = piece * rows_of_piece; row < end; ++row) {
            const int64_t b = row / (queries * heads), i = row / heads % queries, h = row % heads;
            const Wide* lse =
                static_cast<const Wide*>(lses.data) + b * lses.stride[1] + h * lses.stride[2] + i * lses.stride[3];
            const T* parts =
                static_cast<const T*>(outs.data) + b * outs.stride[1] + i * outs.stride[2] + h * outs.stride[3];
            T* out = static_cast<T*>(call.out.data) + b * call.out.stride[0] + i * call.out.stride[1] +
                     h * call.out.stride[2];
            static_cast<Wide*>(
                call.lse.data)[b * call.lse.stride[0] + h * call.lse.stride[1] + i * call.lse.stride[2]] =
                weights_of(lse, lses.stride[0], n, weight);
            merge_row(parts, outs.stride[0], outs.stride[4], weight, n, dv, out, call.out.stride[3]);
        }
    });
}

}  // namespace

void merge_attention_states(const MergeAttentionStates& call, const Runtime& runtime) {
    switch (call.outs.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            return run<double, double>(call, runtime);
#endif
        case DType::bf16:
            return run<bf16, float>(call, runtime);
        case DType::f16:
            return run<f16, float>(call, runtime);
        default:
            return run<float, float>(call, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(merge_attention_states, MergeAttentionStates, p.outs.dtype)
