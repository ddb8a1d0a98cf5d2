// Binds csrc/attention.h: the operators declared in python/metate/ops/attention.
#include "attention.h"

#include <math.h>

#include "bind.h"
#include "contents.h"

namespace metate::bind {
namespace {

using Optional = std::optional<Tensor>;

// What follows the tensors in every signature.
struct Scalars {
    double scale;
    int64_t window_left, window_right;
    bool top_left;
    double softcap;
    int64_t block_m, block_n;
};

struct Dropout {
    double p = 0;
    int64_t seed = 0, offset = 0;
};

// The view of an optional tensor, repeated along dimensions of size 1 up to `size`.
template <int N>
View<N> broadcast(const Optional& tensor, const int64_t (&size)[N]) {
    View<N> view = bind::view<N>(tensor);
    for (int i = 0; view && i < N; ++i) {
        if (view.size[i] == 1 && size[i] != 1) view.stride[i] = 0;
        view.size[i] = size[i];
    }
    return view;
}

// (heads) for every batch entry, or (batch, heads).
View<2> per_head(const Optional& tensor, int64_t batch) {
    if (!tensor || tensor->dim() == 2) return view<2>(tensor);
    View<1> heads = view<1>(*tensor);
    return {heads.data, heads.dtype, {batch, heads.size[0]}, {0, heads.stride[0]}};
}

Attention problem(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& slopes,
                  const Optional& sinks, const Optional& intervals, const Optional& blocks, const Optional& bits,
                  const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, const Scalars& scalars,
                  const Dropout& dropout = {}) {
    const View<4> queries = view_with<4>(q, 0), keys = view_with<4>(k, 0);
    const int64_t B = queries.size[0], Sq = queries.size[1], H = queries.size[2], Sk = keys.size[1];
    expect(q, [&] {
        return (!cu_seqlens_q || are_offsets(view<1>(cu_seqlens_q), Sq)) &&
               (!cu_seqlens_k || are_offsets(view<1>(cu_seqlens_k), Sk));
    });
    const int64_t m = scalars.block_m, n = scalars.block_n;
    const double threshold = nearbyint(dropout.p * 0x1p32);
    return {
        .q = queries,
        .k = keys,
        .v = view_with<4>(v, 0),
        .bias = broadcast<4>(bias, {B, H, Sq, Sk}),
        .alibi_slopes = per_head(slopes, cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : B),
        .sinks = view<1>(sinks),
        .intervals = broadcast<4>(intervals, {B, H, Sq, 2}),
        .blocks = broadcast<4>(blocks, {B, H, (Sq + m - 1) / m, (Sk + n - 1) / n}),
        .bits = broadcast<4>(bits, {B, H, Sq, (Sk + 31) / 32}),
        .cu_seqlens_q = view<1>(cu_seqlens_q),
        .cu_seqlens_k = view<1>(cu_seqlens_k),
        .block_m = m,
        .block_n = n,
        .window_left = scalars.window_left,
        .window_right = scalars.window_right,
        .top_left = scalars.top_left,
        .scale = scalars.scale,
        .softcap = scalars.softcap,
        .dropout_threshold = threshold < 0x1p32 ? static_cast<uint32_t>(threshold) : UINT32_MAX,
        .dropout_scale = 1 / (1 - dropout.p),
        .seed = static_cast<uint64_t>(dropout.seed),
        .offset = static_cast<uint32_t>(dropout.offset),
    };
}

// The dtype of softmax statistics beside inputs like x.
DType wide(const Tensor& x) {
    return dtype(x) == DType::f64 ? DType::f64 : DType::f32;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
                                     const Optional& alibi_slopes, const Optional& sinks, const Optional& intervals,
                                     const Optional& blocks, const Optional& bits, const Optional& cu_seqlens_q,
                                     const Optional& cu_seqlens_k, double scale, int64_t window_left,
                                     int64_t window_right, bool top_left, double softcap, double dropout_p,
                                     int64_t seed, int64_t offset, int64_t block_m, int64_t block_n) {
    const bool packed = q.dim() == 3;
    Tensor out =
        packed ? empty(q, {q.size(0), q.size(1), v.size(2)}) : empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
    Tensor lse =
        packed ? empty(q, {q.size(1), q.size(0)}, wide(q)) : empty(q, {q.size(0), q.size(2), q.size(1)}, wide(q));
    METATE_LAUNCH(
        attention, q,
        AttentionForward{
            problem(q, k, v, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k,
                    {scale, window_left, window_right, top_left, softcap, block_m, block_n}, {dropout_p, seed, offset}),
            view_with<4>(out, 0), view_with<3>(lse, 0)});
    return {out, lse};
}

Tensor attention_delta(const Tensor& out, const Tensor& grad_out, const Optional& grad_lse) {
    Tensor delta = empty(out, {out.size(0), out.size(2), out.size(1)}, wide(out));
    METATE_LAUNCH(attention_delta, out,
                  AttentionDelta{view<4>(out), view<4>(grad_out), view<3>(grad_lse), view<3>(delta)});
    return delta;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Tensor& delta,
    const Optional& bias, const Optional& alibi_slopes, const Optional& sinks, const Optional& intervals,
    const Optional& blocks, const Optional& bits, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
    double scale, int64_t window_left, int64_t window_right, bool top_left, double softcap, double dropout_p,
    int64_t seed, int64_t offset, int64_t block_m, int64_t block_n, bool partial, bool need_dbias,
    bool need_dalibi_slopes) {
    need_dbias = need_dbias && bias;
    need_dalibi_slopes = need_dalibi_slopes && alibi_slopes;
    if (need_dalibi_slopes) (void)q.handle();  // the sum below is torch's
    Tensor dq = empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    Tensor dk = empty(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
    Tensor dv = empty(v, {v.size(0), v.size(1), v.size(2), v.size(3)});
    Tensor dbias = need_dbias ? empty(q, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, wide(q))
                              : empty(q, {0}, wide(q));
    const int64_t entries = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0);
    Tensor dslopes = need_dalibi_slopes ? empty(q, {entries, q.size(2)}, wide(q)) : empty(q, {0}, wide(q));
    AttentionBackward backward{
        problem(q, k, v, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k,
                {scale, window_left, window_right, top_left, softcap, block_m, block_n}, {dropout_p, seed, offset}),
        view<4>(grad_out),
        view<3>(lse),
        partial,
        view<3>(delta),
        view<4>(dq),
        view<4>(dk),
        view<4>(dv),
        {},
        {}};
    if (need_dbias) backward.dbias = broadcast<4>(dbias, {q.size(0), q.size(2), q.size(1), k.size(1)});
    if (need_dalibi_slopes) backward.dalibi_slopes = view<2>(dslopes);
    METATE_LAUNCH(attention_backward, q, backward);
    if (need_dalibi_slopes && alibi_slopes->dim() == 1) {
        const int64_t over_batch[] = {0};
        dslopes = Tensor(torch::stable::sum(dslopes.handle(), over_batch));
    }
    return {dq, dk, dv, dbias, dslopes};
}

Tensor attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, const Optional& bias,
                             const Optional& alibi_slopes, const Optional& sinks, const Optional& intervals,
                             const Optional& blocks, const Optional& bits, const Optional& cu_seqlens_q,
                             const Optional& cu_seqlens_k, double scale, int64_t window_left, int64_t window_right,
                             bool top_left, double softcap, int64_t block_m, int64_t block_n) {
    Tensor sums =
        q.dim() == 3 ? empty(q, {q.size(1), k.size(0)}, wide(q)) : empty(q, {q.size(0), q.size(2), k.size(1)}, wide(q));
    METATE_LAUNCH(attention_column_sums, q,
                  AttentionColumnSums{
                      problem(q, k, k, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k,
                              {scale, window_left, window_right, top_left, softcap, block_m, block_n}),
                      view_with<3>(lse, 0), view_with<3>(sums, 0)});
    return sums;
}

#if !defined(METATE_CUDA)
// Both in one direct call.
std::tuple<Tensor, Tensor, Tensor> attention_and_column_sums(
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& alibi_slopes,
    const Optional& sinks, const Optional& intervals, const Optional& blocks, const Optional& bits,
    const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, double scale, int64_t window_left, int64_t window_right,
    bool top_left, double softcap, double dropout_p, int64_t seed, int64_t offset, int64_t block_m, int64_t block_n) {
    const auto [out, lse] =
        attention(q, k, v, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                  window_left, window_right, top_left, softcap, dropout_p, seed, offset, block_m, block_n);
    return {out, lse,
            attention_column_sums(q, k, lse, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q,
                                  cu_seqlens_k, scale, window_left, window_right, top_left, softcap, block_m, block_n)};
}
#endif

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& outs, const Tensor& lses) {
    Tensor out = empty(outs, {outs.size(1), outs.size(2), outs.size(3), outs.size(4)});
    Tensor lse = empty(lses, {lses.size(1), lses.size(2), lses.size(3)});
    METATE_LAUNCH(merge_attention_states, outs,
                  MergeAttentionStates{view<5>(outs), view<4>(lses), view<4>(out), view<3>(lse)});
    return {out, lse};
}

METATE_REGISTER(m) {
#if !defined(METATE_CUDA)
    offer<&attention_and_column_sums>("attention_and_column_sums");
#endif
    METATE_IMPL(m, attention);
    METATE_IMPL(m, attention_delta);
    METATE_IMPL(m, attention_backward);
    METATE_IMPL(m, attention_column_sums);
    METATE_IMPL(m, merge_attention_states);
}

}  // namespace
}  // namespace metate::bind
