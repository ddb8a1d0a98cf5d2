// Low-bit weights as operators are given them: one matrix, or the matrices of several experts stacked.
#pragma once

#include <type_traits>

#include "bind.h"
#include "quant_linear.h"

namespace metate::bind {

// Kernels read rows of bytes, or tiles, which lie without gaps; other layouts of the codes are copied.
inline Tensor readable_codes(const Tensor& codes) {
    const int last = static_cast<int>(codes.dim()) - 1;
    const bool are_lines = codes.size(last) < 2 || codes.stride(last) == 1;
    const bool have_gaps = dtype(codes) == DType::i32 && codes.stride(last - 1) != codes.size(last);
    return are_lines && !have_gaps ? codes : contiguous(codes);
}

// A LowBitMatrix, or a LowBitExperts with one dimension more.
template <class Weight>
Weight low_bit(int64_t columns, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& super_scales,
               const std::optional<Tensor>& zeros, const std::optional<Tensor>& offsets,
               const std::optional<Tensor>& super_offsets, const std::optional<Tensor>& codebook,
               const std::optional<Tensor>& permutation, int64_t bits, int64_t group_size, int64_t super_groups,
               int64_t zero) {
    constexpr int n = std::extent_v<decltype(decltype(Weight::codes)::size)>;
    return {
        .rows = codes.size(n - 2),
        .columns = columns,
        .bits = bits,
        .group_size = group_size,
        .super_groups = super_groups,
        .zero = zero,
        .codes = view<n>(codes),
        .scales = view<n>(scales),
        .super_scales = view<n>(super_scales),
        .zeros = view<n>(zeros),
        .offsets = view<n>(offsets),
        .super_offsets = view<n>(super_offsets),
        .codebook = view<1>(codebook),
        .permutation = view<n - 1>(permutation),
    };
}

}  // namespace metate::bind
