// Binds csrc/quant_linear.h: the operators declared in python/metate/ops/quant_linear.
#include "quant_linear.h"

#include "bind.h"
#include "contents.h"
#include "low_bit.h"

namespace metate::bind {
namespace {

using Optional = std::optional<Tensor>;

void expect_permutation(const Tensor& x, const Optional& permutation) {
    expect(x, [&] { return !permutation || is_permutation(view<1>(permutation)); });
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
              const Optional& zeros, const Optional& offsets, const Optional& super_offsets, const Optional& codebook,
              const Optional& permutation, const Optional& bias, int64_t bits, int64_t group_size, int64_t super_groups,
              int64_t zero, bool int8_activations) {
    expect_permutation(x, permutation);
    const Tensor bytes = readable_codes(codes);
    const View<2> rows = view_rows(x);
    Tensor out = empty_rows(x, codes.size(0));
    METATE_LAUNCH(
        quant_linear, x,
        QuantLinear{rows,
                    low_bit<LowBitMatrix>(rows.size[1], bytes, scales, super_scales, zeros, offsets, super_offsets,
                                          codebook, permutation, bits, group_size, super_groups, zero),
                    view<1>(bias), int8_activations, view_rows(out)});
    return out;
}

Tensor quant_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                    const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                    const Optional& codebook, const Optional& permutation, const Optional& bias, int64_t bits,
                    int64_t group_size, int64_t super_groups, int64_t zero) {
    return linear(x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias, bits,
                  group_size, super_groups, zero, false);
}

#if !defined(METATE_CUDA)
Tensor quant_linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                         const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                         const Optional& codebook, const Optional& permutation, const Optional& bias, int64_t bits,
                         int64_t group_size, int64_t super_groups, int64_t zero) {
    return linear(x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias, bits,
                  group_size, super_groups, zero, true);
}
#endif

Tensor quant_matmul(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                    const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                    const Optional& codebook, const Optional& permutation, int64_t bits, int64_t group_size,
                    int64_t super_groups, int64_t zero, int64_t in_features) {
    expect_permutation(x, permutation);
    const Tensor bytes = readable_codes(codes);
    Tensor out = empty(x, {x.size(0), in_features});
    METATE_LAUNCH(
        quant_matmul, x,
        QuantMatmul{view<2>(x),
                    low_bit<LowBitMatrix>(in_features, bytes, scales, super_scales, zeros, offsets, super_offsets,
                                          codebook, permutation, bits, group_size, super_groups, zero),
                    view<2>(out)});
    return out;
}

void dequantize(const Tensor& out, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                const Optional& zeros, const Optional& offsets, const Optional& super_offsets, const Optional& codebook,
                const Optional& permutation, int64_t bits, int64_t group_size, int64_t super_groups, int64_t zero) {
    expect_permutation(out, permutation);
    const Tensor bytes = readable_codes(codes);
    prefer_large_pages(out);
    METATE_LAUNCH(
        dequantize, out,
        Dequantize{low_bit<LowBitMatrix>(out.size(1), bytes, scales, super_scales, zeros, offsets, super_offsets,
                                         codebook, permutation, bits, group_size, super_groups, zero),
                   view<2>(out)});
}

View<3> transposed(const Tensor& matrices) {
    View<3> all = view<3>(matrices);
    return {
        all.data, all.dtype, {all.size[0], all.size[2], all.size[1]}, {all.stride[0], all.stride[2], all.stride[1]}};
}

// Sums are float32, or float64 beside float64.
DType sum_dtype(const Tensor& x) {
    return dtype(x) == DType::f64 ? DType::f64 : DType::f32;
}

Tensor shrink(const Tensor& x, const View<3>& a, const Optional& ids) {
    const View<2> rows = view_rows(x);
    Tensor out = empty(x, {rows.size[0], a.size[1]}, sum_dtype(x));
    METATE_LAUNCH(lora_shrink, x, LoraShrink{rows, a, view<1>(ids), view<2>(out)});
    return out;
}

Tensor lora_shrink(const Tensor& x, const Tensor& a, const Optional& ids) {
    return shrink(x, view<3>(a), ids);
}

// The scaling of every adapter.
Tensor scalings(const Tensor& x, const TensorOrNumber& scaling, int64_t adapters) {
    if (const Tensor* given = std::get_if<Tensor>(&scaling)) return *given;
    Tensor all = empty(x, {adapters}, sum_dtype(x));
    for (int64_t i = 0; i < adapters; ++i) {
        const double number = std::get<double>(scaling);
        if (all.dtype() == DType::f64)
            static_cast<double*>(all.data_ptr())[i] = number;
        else
            static_cast<float*>(all.data_ptr())[i] = static_cast<float>(number);
    }
    return all;
}

Tensor lora_outer(const Tensor& x, const Tensor& low, const Optional& ids, int64_t adapters) {
    Tensor out = empty(x, {adapters, low.size(1), x.size(1)}, sum_dtype(x));
    METATE_LAUNCH(lora_outer, x, LoraOuter{view<2>(x), view<2>(low), view<1>(ids), view<3>(out)});
    return out;
}

Tensor lora_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                   const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                   const Optional& codebook, const Optional& permutation, const Optional& bias, const Tensor& a,
                   const Tensor& b, const TensorOrNumber& scaling, const Optional& ids, int64_t bits,
                   int64_t group_size, int64_t super_groups, int64_t zero) {
    const View<2> rows = view_rows(x);
    const View<3> first = view_with<3>(a, 0);
    expect_permutation(x, permutation);
    expect(x, [&] {
        return !ids || (ids->dtype() == DType::i32 && ids->dim() == 1 && ids->size(0) == rows.size[0] &&
                        are_within(as_row(view<1>(ids)), -1, first.size[0]));
    });
    const Tensor bytes = readable_codes(codes), low = shrink(x, first, ids);
    const Tensor factors = scalings(x, scaling, first.size[0]);
    Tensor out = empty_rows(x, codes.size(0));
    METATE_LAUNCH(
        quant_linear, x,
        QuantLinear{rows,
                    low_bit<LowBitMatrix>(rows.size[1], bytes, scales, super_scales, zeros, offsets, super_offsets,
                                          codebook, permutation, bits, group_size, super_groups, zero),
                    view<1>(bias), false, view_rows(out),
                    LowRank{view<2>(low), view_with<3>(b, 0), view<1>(factors), view<1>(ids)}});
    return out;
}

Tensor lora_matmul(const Tensor& x, const Tensor& codes, const Tensor& scales, const Optional& super_scales,
                   const Optional& zeros, const Optional& offsets, const Optional& super_offsets,
                   const Optional& codebook, const Optional& permutation, const Tensor& a, const Tensor& b,
                   const Tensor& scaling, const Optional& ids, int64_t bits, int64_t group_size, int64_t super_groups,
                   int64_t zero, int64_t in_features) {
    expect_permutation(x, permutation);
    const Tensor bytes = readable_codes(codes), low = shrink(x, transposed(b), ids);
    Tensor out = empty(x, {x.size(0), in_features});
    METATE_LAUNCH(
        quant_matmul, x,
        QuantMatmul{view<2>(x),
                    low_bit<LowBitMatrix>(in_features, bytes, scales, super_scales, zeros, offsets, super_offsets,
                                          codebook, permutation, bits, group_size, super_groups, zero),
                    view<2>(out), LowRank{view<2>(low), transposed(a), view<1>(scaling), view<1>(ids)}});
    return out;
}

METATE_REGISTER(m) {
    METATE_IMPL(m, quant_linear);
    METATE_IMPL(m, quant_matmul);
    METATE_IMPL(m, dequantize);
    METATE_IMPL(m, lora_linear);
    METATE_IMPL(m, lora_matmul);
    METATE_IMPL(m, lora_shrink);
    METATE_IMPL(m, lora_outer);
#if !defined(METATE_CUDA)
    METATE_IMPL(m, quant_linear_int8);
#endif
}

}  // namespace
}  // namespace metate::bind
