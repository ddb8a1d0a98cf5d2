// Rows to the experts and back.
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t piece_elements = 1 << 14;

// Pieces of rows: enough elements for a worker.
inline int64_t rows_of_piece(int64_t columns) {
    return larger(piece_elements / larger(columns, 1), 1);
}

template <class Body>
void for_rows(const Runtime& runtime, int64_t rows, int64_t columns, const Body& body) {
    const int64_t step = rows_of_piece(columns);
    for_pieces(worth(runtime, rows * columns), ceil_div(rows, step), [&](int, int64_t piece) {
        for (int64_t r = piece * step; r < smaller(rows, (piece + 1) * step); ++r) body(r);
    });
}

template <class Word>
void copy_line(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<Word*>(to)[i * to_stride] = reinterpret_cast<const Word*>(from)[i * from_stride];
}

void copy_any(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n, int64_t bytes) {
    if (to_stride == 1 && from_stride == 1) {
        memcpy(to, from, static_cast<size_t>(n * bytes));
    } else if (bytes == 2) {
        copy_line<uint16_t>(to, to_stride, from, from_stride, n);
    } else if (bytes == 4) {
        copy_line<uint32_t>(to, to_stride, from, from_stride, n);
    } else {
        copy_line<uint64_t>(to, to_stride, from, from_stride, n);
    }
}

METATE_FN char* line_of(const View<2>& x, int64_t row) {
    return static_cast<char*>(x.data) + row * x.stride[0] * bytes_of(x.dtype);
}

// One number of a weight in any floating dtype.
METATE_FN double number(const View<2>& weights, int64_t t, int64_t j) {
    const int64_t at = t * weights.stride[0] + j * weights.stride[1];
    switch (weights.dtype) {
        case DType::f64:
            return static_cast<const double*>(weights.data)[at];
        case DType::bf16:
            return static_cast<double>(to_float(static_cast<const bf16*>(weights.data)[at]));
        case DType::f16:
            return static_cast<double>(to_float(static_cast<const f16*>(weights.data)[at]));
        default:
            return static_cast<double>(static_cast<const float*>(weights.data)[at]);
    }
}

// The row of slot (t, j), -1 for none.
METATE_FN int64_t row_of(const View<2>& inverse, int64_t t, int64_t j, int64_t rows) {
    const int64_t row = index_at(inverse, t, j);
    return row < 0 || row >= rows ? -1 : row;
}

template <class T>
METATE_FN const T* line_as(const View<2>& x, int64_t row) {
    return static_cast<const T*>(x.data) + row * x.stride[0];
}

// Four vectors of the sum of a token, all choices in their order.
template <class T>
void combine(const MoeUnpermute& call, int64_t t) {
    constexpr int many = 4;
    T* const out = static_cast<T*>(call.out.data) + t * call.out.stride[0];
    for (int64_t c = 0; c < call.out.size[1]; c += many * width) {
        vf sum[many];
        for (int v = 0; v < many; ++v) sum[v] = splat(0.0f);
        const int64_t left = call.out.size[1] - c;
        for (int64_t j = 0; j < call.inverse.size[1]; ++j) {
            const int64_t row = row_of(call.inverse, t, j, call.y.size[0]);
            if (row < 0) continue;
            const vf weight = splat(call.weights ? static_cast<float>(number(call.weights, t, j)) : 1.0f);
            const T* const y = line_as<T>(call.y, row) + c * call.y.stride[1];
            for (int v = 0; v < many && v * width < left; ++v)
                sum[v] =
                    fma(weight, load_any(y + v * width * call.y.stride[1], call.y.stride[1], left - v * width), sum[v]);
        }
        for (int v = 0; v < many && v * width < left; ++v)
            store_any(out + (c + v * width) * call.out.stride[1], call.out.stride[1], sum[v], left - v * width);
    }
}

#if defined(METATE_ISA_BASELINE)
void combine_exact(const MoeUnpermute& call, int64_t t) {
    double* const out = static_cast<double*>(call.out.data) + t * call.out.stride[0];
    for (int64_t c = 0; c < call.out.size[1]; ++c) {
        double sum = 0;
        for (int64_t j = 0; j < call.inverse.size[1]; ++j) {
            const int64_t row = row_of(call.inverse, t, j, call.y.size[0]);
            if (row < 0) continue;
            sum +=
                (call.weights ? number(call.weights, t, j) : 1.0) * line_as<double>(call.y, row)[c * call.y.stride[1]];
        }
        out[c * call.out.stride[1]] = sum;
    }
}

void spread_exact(const MoeUnpermuteBackward& call, int64_t t) {
    const double* const dout = line_as<double>(call.dout, t);
    for (int64_t j = 0; j < call.inverse.size[1]; ++j) {
        const int64_t row = row_of(call.inverse, t, j, call.y.size[0]);
        const double weight = call.weights ? number(call.weights, t, j) : 1.0;
        double sum = 0;
        for (int64_t c = 0; c < call.dout.size[1] && row >= 0; ++c) {
            const double d = dout[c * call.dout.stride[1]];
            static_cast<double*>(call.dy.data)[row * call.dy.stride[0] + c * call.dy.stride[1]] = weight * d;
            if (call.weights) sum += d * line_as<double>(call.y, row)[c * call.y.stride[1]];
        }
        if (call.weights)
            static_cast<double*>(call.d_weights.data)[t * call.d_weights.stride[0] + j * call.d_weights.stride[1]] =
                sum;
    }
}
#endif

template <class T>
void spread(const MoeUnpermuteBackward& call, int64_t t) {
    const View<2>&dout = call.dout, &y = call.y, &dy = call.dy;
    for (int64_t j = 0; j < call.inverse.size[1]; ++j) {
        const int64_t row = row_of(call.inverse, t, j, y.size[0]);
        const vf weight = splat(call.weights ? static_cast<float>(number(call.weights, t, j)) : 1.0f);
        vf total = splat(0.0f);
        for (int64_t c = 0; c < dout.size[1] && row >= 0; c += width) {
            const int64_t left = dout.size[1] - c;
            const vf d = load_any(line_as<T>(dout, t) + c * dout.stride[1], dout.stride[1], left);
            store_any(static_cast<T*>(dy.data) + row * dy.stride[0] + c * dy.stride[1], dy.stride[1], weight * d, left);
            if (call.weights) total = fma(d, load_any(line_as<T>(y, row) + c * y.stride[1], y.stride[1], left), total);
        }
        if (call.weights)
            static_cast<float*>(call.d_weights.data)[t * call.d_weights.stride[0] + j * call.d_weights.stride[1]] =
                sum(total);
    }
}

}  // namespace

void moe_permute(const MoePermute& call, const Runtime& runtime) {
    const int64_t bytes = bytes_of(call.x.dtype), slots = call.x.size[0] * call.k;
    for_rows(runtime, call.out.size[0], call.out.size[1], [&](int64_t r) {
        const int64_t slot = index_at(call.order, r);
        char* const to = line_of(call.out, r);
        if (slot < 0 || slot >= slots) return clear_line(to, call.out.size[1], call.out.stride[1], bytes);
        copy_any(to, call.out.stride[1], line_of(call.x, slot / call.k), call.x.stride[1], call.x.size[1], bytes);
    });
}

void moe_unpermute(const MoeUnpermute& call, const Runtime& runtime) {
    const auto each = [&](const auto& body) { for_rows(runtime, call.out.size[0], call.out.size[1], body); };
#if defined(METATE_ISA_BASELINE)
    if (call.y.dtype == DType::f64) return each([&](int64_t t) { combine_exact(call, t); });
#endif
    with_floats(call.y.dtype, [&]<class T>() { each([&](int64_t t) { combine<T>(call, t); }); });
}

void moe_unpermute_backward(const MoeUnpermuteBackward& call, const Runtime& runtime) {
    const int64_t tokens = call.dout.size[0], columns = call.dout.size[1], bytes = bytes_of(call.dy.dtype);
    for_rows(runtime, call.dy.size[0], columns,
             [&](int64_t r) { clear_line(line_of(call.dy, r), columns, call.dy.stride[1], bytes); });
    const auto each = [&](const auto& body) { for_rows(runtime, tokens, columns, body); };
#if defined(METATE_ISA_BASELINE)
    if (call.y.dtype == DType::f64) return each([&](int64_t t) { spread_exact(call, t); });
#endif
    with_floats(call.y.dtype, [&]<class T>() { each([&](int64_t t) { spread<T>(call, t); }); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(moe_permute, MoePermute, p.x.dtype)
METATE_DISPATCH(moe_unpermute, MoeUnpermute, p.y.dtype)
METATE_DISPATCH(moe_unpermute_backward, MoeUnpermuteBackward, p.y.dtype)
