// What the kernels that move and change rows share: numbers of any floating dtype, work by the warp, launches.
#pragma once

#include <math.h>

#include "schedule.h"

namespace metate::cuda::moe {

constexpr int warps = 4, block_threads = warps * warp_size;

// What sums of a type are computed in.
template <typename T>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<double> {
    using type = double;
};

template <typename T>
METATE_DEVICE typename SumOf<T>::type widen(T x) {
    if constexpr (is_same<T, bf16> || is_same<T, f16>) {
        return to_float(x);
    } else {
        return x;
    }
}

template <typename T>
METATE_DEVICE T narrow(typename SumOf<T>::type x) {
    if constexpr (is_same<T, bf16> || is_same<T, f16>) {
        return from_float<T>(x);
    } else {
        return x;
    }
}

METATE_DEVICE float number_at(const void* data, DType dtype, int64_t at) {
    switch (dtype) {
        case DType::bf16:
            return to_float(load_global<bf16>(static_cast<const bf16*>(data) + at));
        case DType::f16:
            return to_float(load_global<f16>(static_cast<const f16*>(data) + at));
        default:
            return load_global<float>(static_cast<const float*>(data) + at);
    }
}

METATE_DEVICE int integer_at(const View<2>& view, int64_t row, int64_t column) {
    return load_global<int32_t>(static_cast<const int32_t*>(view.data) + row * view.stride[0] +
                                column * view.stride[1]);
}

// Elements of T in 16 bytes, moved as one access where `vectors`, and only as far as `count` says.
template <typename T>
struct Pack {
    static constexpr int size = 16 / sizeof(T);
    T element[size];

    METATE_DEVICE void load(const T* from, int64_t stride, int count, bool vectors) {
        if (vectors && count >= size) {
            *this = load_global<Pack>(from);
            return;
        }
        METATE_UNROLL
        for (int i = 0; i < size; ++i)
            if (i < count) element[i] = load_global<T>(from + i * stride);
    }
    METATE_DEVICE void store(T* to, int64_t stride, int count, bool vectors) const {
        if (vectors && count >= size) {
            store_global(to, *this);
            return;
        }
        METATE_UNROLL
        for (int i = 0; i < size; ++i)
            if (i < count) store_global(to + i * stride, element[i]);
    }
};

// Whether rows can be read and written 16 bytes at a time from every column that is a multiple of them.
inline bool has_vectors(const View<2>& view) {
    const int64_t size = bytes_of(view.dtype);
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[1] == 1 &&
           (view.size[0] <= 1 || view.stride[0] * size % 16 == 0);
}

// The number of this warp in the grid.
METATE_DEVICE int64_t warp_number() {
    return static_cast<int64_t>(block_index().x) * warps + warp();
}

METATE_DEVICE float add_lanes(float x) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) x += shuffle_xor(x, flip);
    return x;
}
METATE_DEVICE int add_lanes(int x) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) x += shuffle_xor(x, flip);
    return x;
}
// Leaves out NaN.
METATE_DEVICE float largest_of_lanes(float x) {
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) x = fmaxf(x, shuffle_xor(x, flip));
    return x;
}

METATE_DEVICE float sigmoid(float x) {
    return 1.f / (1.f + expf(-x));
}

// A warp for each piece of work.
template <typename Parameters>
void launch_warps(const char* op, void (*kernel)(Parameters), int64_t count, size_t shared_bytes, const Device& device,
                  const Parameters& f) {
    const int64_t blocks = ceil_div(count, warps);
    if (blocks > 0x7fffffff) refuse(op, "more than 2^33 pieces of work");
    launch(kernel, {static_cast<int>(blocks)}, block_threads, shared_bytes, device.stream, f);
}

// body.operator()<T>() for the floating type of a tensor.
template <typename Body>
void for_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f64:
            return body.template operator()<double>();
        case DType::bf16:
            return body.template operator()<bf16>();
        case DType::f16:
            return body.template operator()<f16>();
        default:
            return body.template operator()<float>();
    }
}

}  // namespace metate::cuda::moe
