// Binds csrc/moe.h: the operators declared in python/metate/ops/moe.
#include "moe.h"

#include "bind.h"
#include "contents.h"
#include "low_bit.h"

namespace metate::bind {
namespace {

using Optional = std::optional<Tensor>;

bool is_order(const Tensor& order, int64_t slots) {
    return are_once(as_row(view<1>(order)), slots);
}

// Offsets of experts, and the order of the rows if there is one.
bool are_rows(const Tensor& offsets, int64_t rows, const Optional& order, int64_t slots) {
    return are_offsets(view<1>(offsets), rows) && (!order || is_order(*order, slots));
}

bool are_permutations(const Optional& numbers) {
    const View<2> all = view<2>(numbers);
    for (int64_t e = 0; all && e < all.size[0]; ++e)
        if (!is_permutation(
                {static_cast<int32_t*>(all.data) + e * all.stride[0], all.dtype, {all.size[1]}, {all.stride[1]}}))
            return false;
    return true;
}

std::tuple<Tensor, Tensor> moe_topk(const Tensor& logits, const Optional& bias, int64_t k, int64_t score,
                                    int64_t groups, int64_t top_groups, int64_t group_rule, bool renormalise,
                                    double scaling) {
    Tensor weights = empty(logits, {logits.size(0), k}, DType::f32);
    Tensor experts = empty(logits, {logits.size(0), k}, DType::i32);
    METATE_LAUNCH(moe_topk, logits,
                  MoeTopk{view<2>(logits), view<1>(bias), static_cast<Score>(score), groups, top_groups, group_rule,
                          renormalise, static_cast<float>(scaling), view<2>(weights), view<2>(experts)});
    return {weights, experts};
}

Tensor moe_topk_backward(const Tensor& grad, const Tensor& logits, const Tensor& experts, int64_t score,
                         bool renormalise, double scaling) {
    expect(logits, [&] { return are_within(view<2>(experts), 0, logits.size(1)); });
    Tensor d_logits = empty(logits, {logits.size(0), logits.size(1)});
    METATE_LAUNCH(moe_topk_backward, logits,
                  MoeTopkBackward{view<2>(grad), view<2>(logits), view<2>(experts), static_cast<Score>(score),
                                  renormalise, static_cast<float>(scaling), view<2>(d_logits)});
    return d_logits;
}

std::tuple<Tensor, Tensor, Tensor> moe_sort(const Tensor& experts, int64_t num_experts) {
    Tensor order = empty(experts, {experts.size(0) * experts.size(1)});
    Tensor inverse = empty(experts, {experts.size(0), experts.size(1)});
    Tensor offsets = empty(experts, {num_experts + 1});
    METATE_LAUNCH(moe_sort, experts,
                  MoeSort{view<2>(experts), num_experts, view<1>(order), view<2>(inverse), view<1>(offsets)});
    return {order, inverse, offsets};
}

Tensor moe_permute(const Tensor& x, const Tensor& order, int64_t k) {
    expect(x, [&] { return is_order(order, x.size(0) * k); });
    Tensor out = empty(x, {order.size(0), x.size(1)});
    METATE_LAUNCH(moe_permute, x, MoePermute{view<2>(x), view<1>(order), k, view<2>(out)});
    return out;
}

// `out` is a row for each of inverse.
Tensor unpermute(const Tensor& y, const Tensor& inverse, const Optional& weights, Tensor out) {
    METATE_LAUNCH(moe_unpermute, y, MoeUnpermute{view<2>(y), view<2>(inverse), view<2>(weights), view_rows(out)});
    return out;
}

Tensor moe_unpermute(const Tensor& y, const Tensor& inverse, const Optional& weights) {
    expect(y, [&] { return are_within(view<2>(inverse), -1, y.size(0)); });
    return unpermute(y, inverse, weights, empty(y, {inverse.size(0), y.size(1)}));
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& dout, const Tensor& y, const Tensor& inverse,
                                                  const Optional& weights) {
    expect(y, [&] { return are_once(view<2>(inverse), y.size(0)); });
    const DType sums = dout.dtype() == DType::f64 ? DType::f64 : DType::f32;
    Tensor dy = empty(y, {y.size(0), y.size(1)});
    Tensor d_weights = weights ? empty(y, {inverse.size(0), inverse.size(1)}, sums) : empty(y, {0}, sums);
    METATE_LAUNCH(moe_unpermute_backward, y,
                  MoeUnpermuteBackward{view<2>(dout), view<2>(y), view<2>(inverse), view<2>(weights), view<2>(dy),
                                       weights ? view<2>(d_weights) : View<2>{}});
    return {dy, d_weights};
}

int64_t rows_of(const Tensor& x, const Optional& order) {
    return order ? order->size(0) : x.size(0);
}

Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const Optional& bias,
                      const Optional& order, int64_t k) {
    expect(x, [&] { return are_rows(offsets, rows_of(x, order), order, x.size(0) * k); });
    Tensor out = empty(x, {rows_of(x, order), w.size(1)});
    METATE_LAUNCH(
        grouped_linear, x,
        GroupedLinear{view<2>(x), view<3>(w), view<1>(offsets), view<2>(bias), view<1>(order), k, view<2>(out)});
    return out;
}

Tensor grouped_outer(const Tensor& a, const Tensor& b, const Tensor& offsets, const Optional& order, int64_t k) {
    expect(a, [&] { return are_rows(offsets, a.size(0), order, b.size(0) * k); });
    Tensor out = empty(a, {offsets.size(0) - 1, a.size(1), b.size(1)});
    METATE_LAUNCH(grouped_outer, a,
                  GroupedOuter{view<2>(a), view<2>(b), view<1>(offsets), view<1>(order), k, view<3>(out)});
    return out;
}

Tensor low_bit_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                      const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                      const Optional& codebook, const Optional& permutation, const Optional& bias,
                      const Tensor& expert_offsets, const Optional& order, int64_t bits, int64_t group_size,
                      int64_t super_groups, int64_t zero, int64_t k, bool int8_activations) {
    expect(x, [&] {
        return are_rows(expert_offsets, rows_of(x, order), order, x.size(0) * k) && are_permutations(permutation);
    });
    const Tensor bytes = readable_codes(codes);
#if !defined(METATE_CUDA)
    if (order)  // low-bit kernels of the CPU read rows that stand one after another
        return low_bit_linear(moe_permute(x, *order, k), codes, scales, super_scales, zeros, offsets, super_offsets,
                              codebook, permutation, bias, expert_offsets, {}, bits, group_size, super_groups, zero, 1,
                              int8_activations);
#endif
    Tensor out = empty(x, {rows_of(x, order), codes.size(1)});
    METATE_LAUNCH(
        quant_grouped_linear, x,
        QuantGroupedLinear{view<2>(x),
                           low_bit<LowBitExperts>(x.size(1), bytes, scales, super_scales, zeros, offsets, super_offsets,
                                                  codebook, permutation, bits, group_size, super_groups, zero),
                           view<2>(bias), view<1>(expert_offsets), view<1>(order), k, int8_activations, view<2>(out)});
    return out;
}

Tensor quant_grouped_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                            const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                            const Optional& codebook, const Optional& permutation, const Optional& bias,
                            const Tensor& expert_offsets, const Optional& order, int64_t bits, int64_t group_size,
                            int64_t super_groups, int64_t zero, int64_t k) {
    return low_bit_linear(x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias,
                          expert_offsets, order, bits, group_size, super_groups, zero, k, false);
}

#if !defined(METATE_CUDA)
Tensor quant_grouped_linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                 const Optional& super_scales, const Optional& zeros, const Optional& offsets,
                                 const Optional& super_offsets, const Optional& codebook, const Optional& permutation,
                                 const Optional& bias, const Tensor& expert_offsets, const Optional& order,
                                 int64_t bits, int64_t group_size, int64_t super_groups, int64_t zero, int64_t k) {
    return low_bit_linear(x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias,
                          expert_offsets, order, bits, group_size, super_groups, zero, k, true);
}
#endif

Tensor quant_grouped_matmul(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                            const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                            const Optional& codebook, const Optional& permutation, const Tensor& expert_offsets,
                            int64_t bits, int64_t group_size, int64_t super_groups, int64_t zero, int64_t in_features) {
    expect(x, [&] { return are_rows(expert_offsets, x.size(0), {}, 0) && are_permutations(permutation); });
    const Tensor bytes = readable_codes(codes);
    Tensor out = empty(x, {x.size(0), in_features});
    METATE_LAUNCH(quant_grouped_matmul, x,
                  QuantGroupedMatmul{
                      view<2>(x),
                      low_bit<LowBitExperts>(in_features, bytes, scales, super_scales, zeros, offsets, super_offsets,
                                             codebook, permutation, bits, group_size, super_groups, zero),
                      view<1>(expert_offsets), view<2>(out)});
    return out;
}

Tensor gated_activation(const Tensor& x, int64_t activation, int64_t layout, double limit, double alpha, double shift) {
    const Gating gating = static_cast<Gating>(layout);
    const View<2> rows = view_rows(x);
    Tensor out = empty_rows(x, gating == Gating::none ? rows.size[1] : rows.size[1] / 2);
    METATE_LAUNCH(gated_activation, x,
                  GatedActivation{rows, static_cast<Activation>(activation), gating, static_cast<float>(limit),
                                  static_cast<float>(alpha), static_cast<float>(shift), view_rows(out)});
    return out;
}

Tensor gated_activation_backward(const Tensor& grad, const Tensor& x, int64_t activation, int64_t layout, double limit,
                                 double alpha, double shift) {
    Tensor dx = empty(x, {x.size(0), x.size(1)});
    METATE_LAUNCH(gated_activation_backward, x,
                  GatedActivationBackward{view<2>(grad), view<2>(x), static_cast<Activation>(activation),
                                          static_cast<Gating>(layout), static_cast<float>(limit),
                                          static_cast<float>(alpha), static_cast<float>(shift), view<2>(dx)});
    return dx;
}

#if !defined(METATE_CUDA)

// The weights of a product: tensors and numbers as QuantizedExperts has them, and how many columns they are of; dense
// ones (experts, N, K) stand in place of the codes, and have 0 bits.
using Tensors = std::tuple<Tensor, Optional, Optional, Optional, Optional, Optional, Optional, Optional>;
using Numbers = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Weight = std::tuple<Tensors, Numbers, int64_t>;

Tensor product(const Tensor& x, const Weight& weight, const Optional& bias, const Tensor& expert_offsets,
               const Optional& order, int64_t k, bool int8_activations) {
    const auto& [tensors, numbers, columns] = weight;
    const auto& [w, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation] = tensors;
    const auto& [bits, group_size, super_groups, zero] = numbers;
    if (!bits) return grouped_linear(x, w, expert_offsets, bias, order, k);
    return low_bit_linear(x, w, *scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias,
                          expert_offsets, order, bits, group_size, super_groups, zero, k, int8_activations);
}

// A layer in one direct call: the operators that python/metate/ops/moe/__init__.py calls one after another. Tokens may
// lie in more dimensions than one.
Tensor moe_mlp(const Tensor& x, const Tensor& experts, const Tensor& weights, int64_t num_experts, int64_t rows,
               const Weight& gate_up, const Weight& down, const Optional& bias_gate_up, const Optional& bias_down,
               bool int8_activations, int64_t activation, int64_t layout, double limit, double alpha, double shift) {
    if (rows < experts.size(0) * experts.size(1)) throw NeedsDispatcher{};
    View<2> all = view_rows(x);
    Tensor tokens;
    tokens.borrow(all);
    const auto [order, inverse, offsets] = moe_sort(experts, num_experts);
    const Tensor hidden = product(tokens, gate_up, bias_gate_up, offsets, order, experts.size(1), int8_activations);
    const Tensor activated = gated_activation(hidden, activation, layout, limit, alpha, shift);
    const Tensor y = product(activated, down, bias_down, offsets, {}, 1, int8_activations);
    return unpermute(y, inverse, weights, empty_rows(x, y.size(1)));
}

#endif

METATE_REGISTER(m) {
#if !defined(METATE_CUDA)
    offer<&moe_mlp>("moe_mlp");
#endif
    METATE_IMPL(m, moe_topk);
    METATE_IMPL(m, moe_topk_backward);
    METATE_IMPL(m, moe_sort);
    METATE_IMPL(m, moe_permute);
    METATE_IMPL(m, moe_unpermute);
    METATE_IMPL(m, moe_unpermute_backward);
    METATE_IMPL(m, grouped_linear);
    METATE_IMPL(m, grouped_outer);
    METATE_IMPL(m, quant_grouped_linear);
#if !defined(METATE_CUDA)
    METATE_IMPL(m, quant_grouped_linear_int8);
#endif
    METATE_IMPL(m, quant_grouped_matmul);
    METATE_IMPL(m, gated_activation);
    METATE_IMPL(m, gated_activation_backward);
}

}  // namespace
}  // namespace metate::bind
