// Rows moved to their experts, and summed back: a warp moves 16 bytes a lane of one row at a time.
#include "numbers.h"

namespace metate::cuda {
namespace {

using namespace moe;

// Pieces of 32 vectors in a row.
template <typename T>
int64_t pieces_of(int64_t columns) {
    return ceil_div(columns, warp_size * Pack<T>::size);
}

// The row of this warp's piece, and the column of this lane in it.
struct Place {
    int64_t row;
    int column;
};

template <typename T>
METATE_DEVICE Place place_of(int pieces) {
    const int64_t number = warp_number();
    return {number / pieces, (static_cast<int>(number % pieces) * warp_size + lane()) * Pack<T>::size};
}

template <typename T>
METATE_DEVICE T* element(const View<2>& view, int64_t row, int64_t column) {
    return static_cast<T*>(view.data) + row * view.stride[0] + column * view.stride[1];
}

struct Permute {
    View<2> x, out;
    Order order;
    int pieces;
    bool vectors;
};

template <typename T>
METATE_KERNEL(block_threads, 1)
permute_kernel(METATE_PARAMETER(Permute, f)) {
    const auto [row, column] = place_of<T>(f.pieces);
    if (row >= f.out.size[0]) return;
    const int count = static_cast<int>(f.out.size[1]) - column, source = f.order(static_cast<int>(row));
    Pack<T> numbers{};
    if (source >= 0) numbers.load(element<T>(f.x, source, column), f.x.stride[1], count, f.vectors);
    numbers.store(element<T>(f.out, row, column), f.out.stride[1], count, f.vectors);
}

// Weights are float32 (float64 beside float64) or of the type of the rows.
template <typename T>
METATE_DEVICE typename SumOf<T>::type weight_at(const View<2>& weights, int64_t token, int64_t choice) {
    const int64_t at = token * weights.stride[0] + choice * weights.stride[1];
    if constexpr (is_same<T, double>) {
        return load_global<double>(static_cast<const double*>(weights.data) + at);
    } else {
        return number_at(weights.data, weights.dtype, at);
    }
}

struct Unpermute {
    View<2> y, inverse, weights, out;
    int rows, k, pieces;
    bool vectors;
};

template <typename T>
METATE_KERNEL(block_threads, 1)
unpermute_kernel(METATE_PARAMETER(Unpermute, f)) {
    using Sum = typename SumOf<T>::type;
    const auto [token, column] = place_of<T>(f.pieces);
    if (token >= f.out.size[0]) return;
    const int count = static_cast<int>(f.out.size[1]) - column;
    Sum sum[Pack<T>::size] = {};
    METATE_NO_UNROLL
    for (int j = 0; j < f.k; ++j) {
        const int row = integer_at(f.inverse, token, j);
        if (row < 0 || row >= f.rows) continue;
        const Sum weight = f.weights ? weight_at<T>(f.weights, token, j) : Sum{1};
        Pack<T> numbers{};
        numbers.load(element<T>(f.y, row, column), f.y.stride[1], count, f.vectors);
        METATE_UNROLL
        for (int i = 0; i < Pack<T>::size; ++i) sum[i] = fma(weight, widen(numbers.element[i]), sum[i]);
    }
    Pack<T> result;
    METATE_UNROLL
    for (int i = 0; i < Pack<T>::size; ++i) result.element[i] = narrow<T>(sum[i]);
    result.store(element<T>(f.out, token, column), f.out.stride[1], count, f.vectors);
}

struct UnpermuteBackward {
    View<2> dout, y, inverse, weights, dy, d_weights;
    int32_t* slots;  // of each row of y, -1 for none
    int rows, columns, k;
    int64_t count;
    bool vectors;
};

// Finds out whose each row is; slots without a row have no gradient.
METATE_KERNEL(block_threads, 1)
name_rows_kernel(METATE_PARAMETER(UnpermuteBackward, f)) {
    const int64_t slot = static_cast<int64_t>(block_index().x) * block_threads + thread_index();
    if (slot >= f.count) return;
    const int64_t token = slot / f.k, choice = slot % f.k;
    const int row = integer_at(f.inverse, token, choice);
    if (row >= 0 && row < f.rows) {
        store_global(f.slots + row, static_cast<int32_t>(slot));
    } else if (f.d_weights) {
        if (f.d_weights.dtype == DType::f64) {
            store_global(element<double>(f.d_weights, token, choice), 0.);
        } else {
            store_global(element<float>(f.d_weights, token, choice), 0.f);
        }
    }
}

template <typename Sum>
METATE_DEVICE Sum add_all_lanes(Sum x) {
    if constexpr (is_same<Sum, double>) {
        METATE_UNROLL
        for (int flip = 16; flip > 0; flip /= 2) {
            const Words<2> own = __builtin_bit_cast(Words<2>, x);
            const Words<2> other{{shuffle_xor(own[0], flip), shuffle_xor(own[1], flip)}};
            x += __builtin_bit_cast(double, other);
        }
        return x;
    } else {
        return add_lanes(x);
    }
}

template <typename T>
METATE_KERNEL(block_threads, 1)
unpermute_backward_kernel(METATE_PARAMETER(UnpermuteBackward, f)) {
    using Sum = typename SumOf<T>::type;
    const int64_t row = warp_number();
    if (row >= f.rows) return;
    const int slot = load_global<int32_t>(f.slots + row), token = slot / f.k, choice = slot % f.k;
    const Sum weight = f.weights && slot >= 0 ? weight_at<T>(f.weights, token, choice) : Sum{1};
    Sum dot = 0;
    METATE_NO_UNROLL
    for (int column = lane() * Pack<T>::size; column < f.columns; column += warp_size * Pack<T>::size) {
        const int count = f.columns - column;
        Pack<T> slopes{}, numbers{}, result;
        if (slot >= 0) {
            slopes.load(element<T>(f.dout, token, column), f.dout.stride[1], count, f.vectors);
            if (f.weights) numbers.load(element<T>(f.y, row, column), f.y.stride[1], count, f.vectors);
        }
        METATE_UNROLL
        for (int i = 0; i < Pack<T>::size; ++i) {
            result.element[i] = narrow<T>(weight * widen(slopes.element[i]));
            dot = fma(widen(slopes.element[i]), widen(numbers.element[i]), dot);
        }
        result.store(element<T>(f.dy, row, column), f.dy.stride[1], count, f.vectors);
    }
    if (!f.d_weights) return;
    dot = add_all_lanes(dot);
    if (lane() == 0 && slot >= 0) store_global(element<Sum>(f.d_weights, token, choice), dot);
}

}  // namespace

void moe_permute(const MoePermute& p, const Device& device) {
    Permute f{p.x, p.out, order_of(p.order, p.k, p.x.size[0]), 0, has_vectors(p.x) && has_vectors(p.out)};
    for_type(p.x.dtype, [&]<typename T>() {
        f.pieces = static_cast<int>(pieces_of<T>(p.out.size[1]));
        if (f.pieces) launch_warps("moe_permute", permute_kernel<T>, p.out.size[0] * f.pieces, 0, device, f);
    });
}

void moe_unpermute(const MoeUnpermute& u, const Device& device) {
    Unpermute f{u.y,
                u.inverse,
                u.weights,
                u.out,
                static_cast<int>(u.y.size[0]),
                static_cast<int>(u.inverse.size[1]),
                0,
                has_vectors(u.y) && has_vectors(u.out)};
    for_type(u.y.dtype, [&]<typename T>() {
        f.pieces = static_cast<int>(pieces_of<T>(u.out.size[1]));
        if (f.pieces) launch_warps("moe_unpermute", unpermute_kernel<T>, u.out.size[0] * f.pieces, 0, device, f);
    });
}

void moe_unpermute_backward(const MoeUnpermuteBackward& u, const Device& device) {
    const int64_t rows = u.y.size[0], k = u.inverse.size[1], slots = u.inverse.size[0] * k;
    const size_t bytes = static_cast<size_t>(rows) * sizeof(int32_t);
    auto* const names = static_cast<int32_t*>(rows ? device.scratch(bytes, device.context) : nullptr);
    if (rows) fill_bytes(names, 0xff, bytes, device.stream);
    const UnpermuteBackward f{u.dout,
                              u.y,
                              u.inverse,
                              u.weights,
                              u.dy,
                              u.d_weights,
                              names,
                              static_cast<int>(rows),
                              static_cast<int>(u.y.size[1]),
                              static_cast<int>(k > 0 ? k : 1),
                              slots,
                              has_vectors(u.y) && has_vectors(u.dout) && has_vectors(u.dy)};
    launch(name_rows_kernel, {static_cast<int>(ceil_div(slots, block_threads))}, block_threads, 0, device.stream, f);
    for_type(u.y.dtype, [&]<typename T>() {
        launch_warps("moe_unpermute_backward", unpermute_backward_kernel<T>, rows, 0, device, f);
    });
}

}  // namespace metate::cuda
