// What low-rank matrices add to the outputs of a product: small products by adapter, on the tensor cores. Every row of
// a tile is multiplied with the matrices of every adapter that the tile has, and takes the sums of its own.
#pragma once

#include "decode.h"

namespace metate::cuda::lowbit {

constexpr int no_adapter = 0x7fffffff;

// The adapter of a row, -1 where it has none.
METATE_DEVICE int adapter_of(const View<1>& ids, int adapters, int row) {
    if (!ids) return 0;
    const int id = load_global<int32_t>(static_cast<const int32_t*>(ids.data) + row * ids.stride[0]);
    return id >= 0 && id < adapters ? id : -1;
}

// The least adapter above `last` among up to 64 rows from `first` on, for the whole warp; no_adapter where none is
// left.
METATE_DEVICE int next_adapter(const View<1>& ids, int adapters, int first, int count, int last) {
    int next = no_adapter;
    METATE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int row = i * 32 + lane(), id = row < count ? adapter_of(ids, adapters, first + row) : -1;
        if (id > last) next = least(next, id);
    }
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) next = least(next, shuffle_xor(next, flip));
    return next;
}

template <typename T>
METATE_DEVICE float number_at(const void* data, DType dtype, int64_t at) {
    return dtype == DType::f32 ? load_global<float>(static_cast<const float*>(data) + at)
                               : to_float(load_global<T>(static_cast<const T*>(data) + at));
}

// Four numbers of a line from `column` on as two packed pairs, zeros beyond its end.
template <typename T>
METATE_DEVICE void load_four(uint32_t (&pairs)[2], const void* data, DType dtype, int64_t line, int64_t stride,
                             int column, int columns, float factor) {
    float numbers[4];
    METATE_UNROLL
    for (int i = 0; i < 4; ++i)
        numbers[i] = column + i < columns ? factor * number_at<T>(data, dtype, line + (column + i) * stride) : 0.f;
    pairs[0] = pack<T>(numbers[0], numbers[1]);
    pairs[1] = pack<T>(numbers[2], numbers[3]);
}

}  // namespace metate::cuda::lowbit
