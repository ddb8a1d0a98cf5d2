// Exact attention, dense and packed: out = softmax(mask(softcap(scale · q kᵀ)) + bias + alibi) v.
//
// For query row i and key j of one sequence, with queries `Sq` and keys `Sk` of that sequence:
//   s = scale · q_i·k_j;  if softcap > 0: s = softcap · tanh(s / softcap)
//   s += bias[b,h,i,j] - alibi_slopes[b,h] · |i + diagonal - j|,   diagonal = top_left ? 0 : Sk - Sq
//   allowed when  j >= i + diagonal - window_left  (window_left >= 0)
//            and  j <= i + diagonal + window_right (window_right >= 0)
//            and  intervals[b,h,i,0] <= j < intervals[b,h,i,1]
//            and  blocks[b,h,i / block_m, j / block_n] != 0
//            and  bit j % 32 of bits[b,h,i,j / 32]
// `sinks[h]` is one more logit in the denominator. lse = log(sum of exp, sinks included), natural logarithm.
// A row without a key: out 0, lse -inf (sinks[h] with sinks), gradients 0. A masked key never touches a row, not even
// with NaN in k or v.
//
// The passes behind the forward weigh by exp(s - lse). An lse is a rounded number, and what a large one lost is in
// every weight: of n equal keys each would get all of the row. So where |lse| > largest_lse(dtype of the results), they
// find the softmax of the row from its logits, sinks included.
//
// Dropout keeps an element when word (j >> 4 & 3) of Philox4x32-10 with key {seed lo, seed hi} and counter
// {(j >> 6) * 16 + (j & 15), i, b * Hq + h, offset} is >= dropout_threshold, and scales it by 1 / (1 - p).
// lse and column sums are those of the probabilities before dropout. b, i and j count within the sequence batch, the
// sequence's queries and its keys.
//
// Packed: with cu_seqlens_q/k (int32, sequences + 1, non-decreasing), q is (1, tokens, Hq, D), sequence b has the
// queries cu_seqlens_q[b] … cu_seqlens_q[b+1]-1 and the keys likewise; tokens outside every sequence give out 0, lse
// -inf, gradients 0. lse is then (1, Hq, tokens); intervals is indexed by token and holds key positions within the
// sequence. bias, blocks and bits are absent.
#pragma once

#include "metate.h"

namespace metate {

struct Attention {
    View<4> q, k, v;       // (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, Dv): one dtype; Hq a multiple of Hkv
    View<4> bias;          // (B, Hq, Sq, Sk), broadcast by stride 0; f32 or the dtype of q
    View<2> alibi_slopes;  // (B, Hq) f32 (f64 where q is)
    View<1> sinks;         // (Hq) f32 (f64 where q is)
    View<4> intervals;     // (B, Hq, Sq, 2) i32, any values
    View<4> blocks;        // (B, Hq, ⌈Sq/block_m⌉, ⌈Sk/block_n⌉) u8
    View<4> bits;          // (B, Hq, Sq, ⌈Sk/32⌉) i32
    View<1> cu_seqlens_q, cu_seqlens_k;  // (sequences + 1) i32
    int64_t block_m, block_n;
    int64_t window_left, window_right;  // -1: no limit
    bool top_left;
    double scale;
    double softcap;              // 0: none
    uint32_t dropout_threshold;  // p · 2³², 0: no dropout
    double dropout_scale;        // 1 / (1 - p)
    uint64_t seed;
    uint32_t offset;
};

struct AttentionForward {
    Attention problem;
    View<4> out;  // (B, Sq, Hq, Dv), dtype of q
    View<3> lse;  // (B, Hq, Sq), f32 (f64 where q is)
};

// What the backward needs of a row: delta = Σ_d out · grad_out - grad_lse.
struct AttentionDelta {
    View<4> out, grad_out;  // (B, Sq, Hq, Dv)
    View<3> grad_lse;       // (B, Hq, Sq), f32 (f64 where out is), or absent
    View<3> delta;          // like grad_lse
};

// For 16-bit results, which are rounded by 2^-9 or 2^-12 themselves, an lse may lose 2^-16, for others 2^-20.
constexpr double largest_lse(DType results) {
    return results == DType::bf16 || results == DType::f16 ? 512 : 32;
}

struct AttentionBackward {
    Attention problem;
    View<4> grad_out;       // like out
    View<3> lse;            // of the forward
    bool partial;           // lse is over more keys than these, so that it alone tells the weights
    View<3> delta;          // (B, Hq, Sq), like lse: see AttentionDelta
    View<4> dq, dk, dv;     // like q, k, v
    View<4> dbias;          // (B, Hq, Sq, Sk) f32 (f64), stride 0 where the bias is broadcast: sums over it; or absent
    View<2> dalibi_slopes;  // (B, Hq) f32 (f64), or absent
};

// Column sums of the probabilities: sums[b, h, j] = Σ_i exp(s_ij - lse_i).
struct AttentionColumnSums {
    Attention problem;  // v unused
    View<3> lse;        // of the forward
    View<3> sums;       // (B, Hq, Sk), f32 (f64 where q is)
};

// n partial results over disjoint keys into one: lse = log Σ exp lse_n, out = Σ exp(lse_n - lse) out_n.
struct MergeAttentionStates {
    View<5> outs;  // (n, B, S, H, Dv)
    View<4> lses;  // (n, B, H, S), f32 (f64 where outs is)
    View<4> out;   // (B, S, H, Dv)
    View<3> lse;   // (B, H, S)
};

namespace cpu {
void attention(const AttentionForward&, const Runtime&);
void attention_delta(const AttentionDelta&, const Runtime&);
void attention_backward(const AttentionBackward&, const Runtime&);
void attention_column_sums(const AttentionColumnSums&, const Runtime&);
void merge_attention_states(const MergeAttentionStates&, const Runtime&);
}  // namespace cpu

namespace cuda {
void attention(const AttentionForward&, const Device&);
void attention_delta(const AttentionDelta&, const Device&);
void attention_backward(const AttentionBackward&, const Device&);
void attention_column_sums(const AttentionColumnSums&, const Device&);
void merge_attention_states(const MergeAttentionStates&, const Device&);
}  // namespace cuda

}  // namespace metate
