// Tensors for tests of kernels: in awkward memory, filled at random, compared with loops in double precision.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "emulated.h"

using metate::DType;
using metate::View;

inline const double infinity = INFINITY;

// A tensor with gaps of NaN between its elements. Layouts: 0 contiguous, 1 rows apart by a multiple of 16 bytes,
// 2 dimensions in another order and nothing aligned.
template <int N>
struct Tensor {
    View<N> view{};
    std::vector<uint8_t> memory;

    Tensor() = default;
    Tensor(DType dtype, std::vector<int64_t> size, int layout, Random& random) {
        view.dtype = dtype;
        std::vector<int> order(N);
        for (int i = 0; i < N; ++i) order[i] = N - 1 - i;
        if (layout == 2) std::shuffle(order.begin(), order.end(), random);
        int64_t stride = layout == 2 ? draw(random, 1, 2) : 1;
        for (int i = 0; i < N; ++i) {
            view.size[order[i]] = size[order[i]];
            view.stride[order[i]] = stride;
            stride *= std::max<int64_t>(size[order[i]], 1);
            if (layout == 1 && i == 0) stride = (stride + 7) / 8 * 8 + 8;
            if (layout == 2) stride += draw(random, 0, 3);
        }
        const int64_t bytes = metate::bytes_of(dtype);
        memory.assign((stride + 8) * bytes + 16, 0xff);
        auto start = (reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16;
        view.data = reinterpret_cast<void*>(start + (layout == 2 ? bytes : 0));
    }
    Tensor(Tensor&&) = default;
    Tensor& operator=(Tensor&&) = default;
    Tensor(const Tensor&) = delete;

    int64_t offset(const int64_t (&at)[N]) const {
        int64_t sum = 0;
        for (int i = 0; i < N; ++i) sum += at[i] * view.stride[i];
        return sum;
    }
    double get(const int64_t (&at)[N]) const {
        const int64_t o = offset(at);
        switch (view.dtype) {
            case DType::bf16:
                return to_float(static_cast<const bf16*>(view.data)[o]);
            case DType::f16:
                return to_float(static_cast<const f16*>(view.data)[o]);
            case DType::f32:
                return static_cast<const float*>(view.data)[o];
            case DType::i32:
                return static_cast<const int32_t*>(view.data)[o];
            case DType::i64:
                return static_cast<double>(static_cast<const int64_t*>(view.data)[o]);
            case DType::i8:
                return static_cast<const int8_t*>(view.data)[o];
            default:
                return static_cast<const uint8_t*>(view.data)[o];
        }
    }
    void set(const int64_t (&at)[N], double x) {
        const int64_t o = offset(at);
        switch (view.dtype) {
            case DType::bf16:
                static_cast<bf16*>(view.data)[o] = from_float<bf16>(static_cast<float>(x));
                break;
            case DType::f16:
                static_cast<f16*>(view.data)[o] = from_float<f16>(static_cast<float>(x));
                break;
            case DType::f32:
                static_cast<float*>(view.data)[o] = static_cast<float>(x);
                break;
            case DType::i32:
                static_cast<uint32_t*>(view.data)[o] = static_cast<uint32_t>(static_cast<int64_t>(x));
                break;
            case DType::i64:
                static_cast<int64_t*>(view.data)[o] = static_cast<int64_t>(x);
                break;
            case DType::i8:
                static_cast<int8_t*>(view.data)[o] = static_cast<int8_t>(x);
                break;
            default:
                static_cast<uint8_t*>(view.data)[o] = static_cast<uint8_t>(x);
        }
    }
    // visit(index) for every element.
    template <typename Visit>
    void each(const Visit& visit) const {
        int64_t at[N] = {};
        for (int i = 0; i < N; ++i) {
            if (view.size[i] == 0) return;
        }
        for (;;) {
            visit(at);
            int i = N - 1;
            while (i >= 0 && ++at[i] == view.size[i]) at[i--] = 0;
            if (i < 0) return;
        }
    }
    template <typename Value>
    Tensor&& fill(const Value& value) && {
        each([&](const int64_t (&at)[N]) { set(at, value()); });
        return std::move(*this);
    }
    // Repeats dimension i.
    void broadcast(int i) { view.stride[i] = 0; }
};

// Results in double precision, dense in the order of the contract's sizes.
template <int N>
struct Truth {
    int64_t size[N];
    std::vector<double> value;

    explicit Truth(const View<N>& view, double start = 0) {
        int64_t count = 1;
        for (int i = 0; i < N; ++i) count *= size[i] = view.size[i];
        value.assign(count, start);
    }
    double& operator()(const int64_t (&at)[N]) {
        int64_t o = 0;
        for (int i = 0; i < N; ++i) o = o * size[i] + at[i];
        return value[o];
    }
};

// The largest error over a tensor, relative to `budget` times the rounding unit of the results at their largest.
template <int N>
void compare(const std::string& text, const char* name, const Tensor<N>& got, Truth<N>& truth, double budget,
             DType rounding) {
    double largest = 0;
    for (double x : truth.value) {
        if (isfinite(x)) largest = std::max(largest, fabs(x));
    }
    const double unit = rounding == DType::bf16 ? 0x1p-8 : rounding == DType::f16 ? 0x1p-11 : 0x1p-18;
    const double allowed = budget * unit * std::max(largest, 1e-3);
    got.each([&](const int64_t (&at)[N]) {
        const double x = got.get(at), y = truth(at);
        if (x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= allowed) return;
        std::string where;
        for (int i = 0; i < N; ++i) where.append(i ? "," : "").append(std::to_string(at[i]));
        require(false, std::string(name) + "[" + where + "] is " + std::to_string(x) + ", should be " +
                           std::to_string(y) + " within " + std::to_string(allowed) + " in: " + text);
    });
}
