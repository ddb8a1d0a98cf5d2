// Mixtures of experts: T tokens, E experts, k choices a token, R rows that stand sorted by expert.
//
// Numbers of experts, rows and slots are i32; a slot is t·k + j, choice j of token t. Sums are float32 (float64 beside
// float64). A row of a result depends on its own row of the arguments alone, not on how many rows there are.
#pragma once

#include "metate.h"
#include "quant_linear.h"

namespace metate {

// Scores of a row of logits: softmax over all of it; softmax over the chosen logits only; sigmoid; √softplus.
enum class Score : int8_t { softmax, softmax_chosen, sigmoid, sqrt_softplus };

// The k best experts of every row, best first; of equal ones the lower number is better, and NaN is best of all.
//   value of an expert  = its logit; with a bias, its score + bias (its logit + bias for softmax_chosen)
//   groups > 1          : of `groups` runs of E / groups experts only the `top_groups` best count. Value of a run:
//                         group_rule 0: the largest value of its experts
//                         group_rule 1: the sum of its two largest scores (+ bias), or of the one that there is
//   weights             = scores without bias, in order of choice; if `renormalise` divided by (their sum + 1e-20),
//                         both times `scaling`
struct MoeTopk {
    View<2> logits;  // (T, E)
    View<1> bias;    // (E) f32, or absent
    Score score;
    int64_t groups, top_groups, group_rule;
    bool renormalise;
    float scaling;
    View<2> weights;  // (T, k) f32
    View<2> experts;  // (T, k) i32
};

// The gradient of those weights to the logits, the choice given: 0 for experts that were not chosen, but for softmax.
struct MoeTopkBackward {
    View<2> grad;     // (T, k) f32
    View<2> logits;   // (T, E)
    View<2> experts;  // (T, k) i32, each within [0, E)
    Score score;
    bool renormalise;
    float scaling;
    View<2> d_logits;  // (T, E), dtype of logits
};

// A stable counting sort of slots by expert. Slots whose number is not in [0, E) get no row.
struct MoeSort {
    View<2> experts;  // (T, k) i32, any numbers
    int64_t num_experts;
    View<1> order;    // (T·k) i32: the slot at each row; -1 from offsets[E] on
    View<2> inverse;  // (T, k) i32: the row of each slot, -1 for none
    View<1> offsets;  // (E + 1) i32: rows of expert e are offsets[e] … offsets[e+1] - 1
};

// out[r] = x[order[r] / k]; zeros where order[r] is outside [0, T·k).
struct MoePermute {
    View<2> x;      // (T, D), any dtype
    View<1> order;  // (R) i32
    int64_t k;
    View<2> out;  // (R, D)
};

// out[t] = Σ_j weights[t, j] · y[inverse[t, j]], j ascending, one fused multiply-add each (a sum without weights).
// Where inverse is outside [0, R) nothing is added, and rows of y that no slot names are not read.
struct MoeUnpermute {
    View<2> y;        // (R, D)
    View<2> inverse;  // (T, k) i32
    View<2> weights;  // (T, k) f32 (f64), or the dtype of y; or absent
    View<2> out;      // (T, D), dtype of y
};

// dy[inverse[t, j]] = weights[t, j] · dout[t], zeros in rows that no slot names (none names one twice);
// d_weights[t, j] = dout[t] · y[inverse[t, j]], 0 where there is no such row.
struct MoeUnpermuteBackward {
    View<2> dout;       // (T, D)
    View<2> y;          // (R, D), dtype of dout
    View<2> inverse;    // (T, k) i32
    View<2> weights;    // as above, or absent
    View<2> dy;         // (R, D)
    View<2> d_weights;  // (T, k) f32 (f64), absent without weights
};

// Rows of a grouped product: row r is x[r], or x[order[r] / k] where there is an order, zeros where order[r] is outside
// [0, T·k). Rows of expert e are offsets[e] … offsets[e+1] - 1. Offsets do not decrease and stay within 0 … R; a kernel
// that cannot be sure of it clamps them. Rows of no expert are not read.

// out[r] = row r · w[e]ᵀ + bias[e]; zeros in the rows of no expert.
struct GroupedLinear {
    View<2> x;        // (T, K); (R, K) without an order
    View<3> w;        // (E, N, K), dtype of x, any strides: the gradient to x takes a transposed one
    View<1> offsets;  // (E + 1) i32
    View<2> bias;     // (E, N) f32 or the dtype of x, or absent
    View<1> order;    // (R) i32, or absent
    int64_t k;
    View<2> out;  // (R, N), dtype of x
};

// out[e] = Σ a[r]ᵀ · (row r of b) over the rows of expert e; zeros where it has none.
struct GroupedOuter {
    View<2> a;               // (R, N)
    View<2> b;               // (T, K), dtype of a; (R, K) without an order
    View<1> offsets, order;  // as above
    int64_t k;
    View<3> out;  // (E, N, K), dtype of a
};

// The weights of all experts, each a LowBitMatrix; they share a codebook.
struct LowBitExperts {
    int64_t rows, columns;
    int64_t bits, group_size, super_groups, zero;
    View<3> codes;                   // (E, rows, ⌈columns · bits / 8⌉) u8, the bytes of a row side by side
    View<3> scales, super_scales;    // (E, rows, groups), …
    View<3> zeros;                   // … as LowBitMatrix has them, or absent
    View<3> offsets, super_offsets;  //
    View<1> codebook;                // (2^bits), or absent
    View<2> permutation;             // (E, columns) i32, or absent

    METATE_INLINE LowBitMatrix operator[](int64_t expert) const {
        return {rows,
                columns,
                bits,
                group_size,
                super_groups,
                zero,
                part(codes, expert),
                part(scales, expert),
                part(super_scales, expert),
                part(zeros, expert),
                part(offsets, expert),
                part(super_offsets, expert),
                codebook,
                part(permutation, expert)};
    }

  private:
    template <int N>
    METATE_INLINE static View<N - 1> part(const View<N>& all, int64_t expert) {
        View<N - 1> one{};
        if (!all) return one;
        one.data = static_cast<char*>(all.data) + expert * all.stride[0] * bytes_of(all.dtype);
        one.dtype = all.dtype;
        for (int i = 1; i < N; ++i) {
            one.size[i - 1] = all.size[i];
            one.stride[i - 1] = all.stride[i];
        }
        return one;
    }
};

// GroupedLinear with low-bit weights, which multiply as in QuantLinear.
struct QuantGroupedLinear {
    View<2> x;  // (T, columns); (R, columns) without an order
    LowBitExperts w;
    View<2> bias;            // (E, rows) f32 or the dtype of x, or absent
    View<1> offsets, order;  // of experts, as above; cpu:: takes no order
    int64_t k;
    bool int8_activations;  // as in QuantLinear; cpu:: alone
    View<2> out;            // (R, rows), dtype of x
};

// out[r] = x[r] · W[e]; zeros in the rows of no expert.
struct QuantGroupedMatmul {
    View<2> x;  // (R, rows)
    LowBitExperts w;
    View<1> offsets;
    View<2> out;  // (R, columns), dtype of x
};

// silu: x · sigmoid(alpha · x); gelu by erf; gelu_tanh: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))); relu; relu².
enum class Activation : int8_t { silu, gelu, gelu_tanh, relu, relu2 };
// Where gate and up stand in a row of x: one half each; up in the first half; gate and up by turns; only a gate.
enum class Gating : int8_t { gate_up, up_gate, interleaved, none };

// out = f(min(gate, limit)) · (clamp(up, -limit, limit) + shift); without up the first factor alone.
struct GatedActivation {
    View<2> x;  // (R, 2·I), (R, I) with Gating::none
    Activation activation;
    Gating gating;
    float limit, alpha, shift;  // limit: infinity for none
    View<2> out;                // (R, I), dtype of x
};

// No gradient passes what is beyond the limit; at the limit it passes.
struct GatedActivationBackward {
    View<2> grad;  // (R, I)
    View<2> x;     // dtype of grad
    Activation activation;
    Gating gating;
    float limit, alpha, shift;
    View<2> dx;  // like x
};

namespace cpu {
void moe_topk(const MoeTopk&, const Runtime&);
void moe_topk_backward(const MoeTopkBackward&, const Runtime&);
void moe_sort(const MoeSort&, const Runtime&);
void moe_permute(const MoePermute&, const Runtime&);
void moe_unpermute(const MoeUnpermute&, const Runtime&);
void moe_unpermute_backward(const MoeUnpermuteBackward&, const Runtime&);
void grouped_linear(const GroupedLinear&, const Runtime&);
void grouped_outer(const GroupedOuter&, const Runtime&);
void quant_grouped_linear(const QuantGroupedLinear&, const Runtime&);
void quant_grouped_matmul(const QuantGroupedMatmul&, const Runtime&);
void gated_activation(const GatedActivation&, const Runtime&);
void gated_activation_backward(const GatedActivationBackward&, const Runtime&);
}  // namespace cpu

namespace cuda {
void moe_topk(const MoeTopk&, const Device&);
void moe_topk_backward(const MoeTopkBackward&, const Device&);
void moe_sort(const MoeSort&, const Device&);
void moe_permute(const MoePermute&, const Device&);
void moe_unpermute(const MoeUnpermute&, const Device&);
void moe_unpermute_backward(const MoeUnpermuteBackward&, const Device&);
void grouped_linear(const GroupedLinear&, const Device&);
void grouped_outer(const GroupedOuter&, const Device&);
void quant_grouped_linear(const QuantGroupedLinear&, const Device&);
void quant_grouped_matmul(const QuantGroupedMatmul&, const Device&);
void gated_activation(const GatedActivation&, const Device&);
void gated_activation_backward(const GatedActivationBackward&, const Device&);
}  // namespace cuda

}  // namespace metate
