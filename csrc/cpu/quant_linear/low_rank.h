// What low-rank matrices add to a product, and how their squares come into vectors.
#pragma once

#include "decode.h"

namespace metate::cpu::METATE_ISA {
namespace {

// The adapter of a row, -1 where it has none.
METATE_FN int64_t adapter_of(const View<1>& ids, int64_t adapters, int64_t row) {
    const int64_t id = ids ? static_cast<const int32_t*>(ids.data)[row * ids.stride[0]] : 0;
    return id >= 0 && id < adapters ? id : -1;
}

// The end of the rows from `row` on, before `end`, that have its adapter.
METATE_FN int64_t end_of_run(const View<1>& ids, int64_t adapters, int64_t row, int64_t end) {
    const int64_t adapter = adapter_of(ids, adapters, row);
    if (!ids) return end;
    while (++row < end && adapter_of(ids, adapters, row) == adapter) {
    }
    return row;
}

METATE_FN View<2> matrix_of(const View<3>& all, int64_t number) {
    char* const data = static_cast<char*>(all.data) + number * all.stride[0] * bytes_of(all.dtype);
    return {data, all.dtype, {all.size[1], all.size[2]}, {all.stride[1], all.stride[2]}};
}

template <class T>
METATE_FN void load_square_as(vf (&square)[width], const View<2>& m, const View<1>& places, int64_t row,
                              int64_t column) {
    const int64_t rows = smaller(width, m.size[0] - row), columns = smaller(width, m.size[1] - column);
    const T* const from = static_cast<const T*>(m.data) + row * m.stride[0] + column * m.stride[1];
    for (int i = 0; i < width; ++i) square[i] = splat(0.0f);
    if (!places && m.stride[0] == 1) {
        for (int i = 0; i < columns; ++i)
            square[i] = rows == width ? load(from + i * m.stride[1]) : load(from + i * m.stride[1], rows);
    } else if (!places && m.stride[1] == 1) {
        for (int i = 0; i < rows; ++i)
            square[i] = columns == width ? load(from + i * m.stride[0]) : load(from + i * m.stride[0], columns);
        transpose(square);
    } else {
        const int32_t* const order = static_cast<const int32_t*>(places.data);
        for (int i = 0; i < columns; ++i) {
            float line[width] = {};
            for (int j = 0; j < rows; ++j)
                line[j] = number_at<T>(m, places ? order[(row + j) * places.stride[0]] : row + j, column + i);
            square[i] = load(line);
        }
    }
}

// `width` rows and columns of a matrix, a column a vector, with zeros beyond its edges. Its row number i is at
// places[i], where there are places.
inline void load_square(vf (&square)[width], const View<2>& m, const View<1>& places, int64_t row, int64_t column) {
    switch (m.dtype) {
        case DType::bf16:
            return load_square_as<bf16>(square, m, places, row, column);
        case DType::f16:
            return load_square_as<f16>(square, m, places, row, column);
        default:
            return load_square_as<float>(square, m, places, row, column);
    }
}

// Adds the update to `lanes` columns (a multiple of width, whose last may be beyond the result) of some rows, `lanes`
// floats apart; column number i of the result has row places[i] of the right matrices, where there are places.
inline void add_low_rank(const LowRank& u, const View<1>& places, float* totals, int64_t lanes, int64_t column,
                         int64_t first, int64_t rows) {
    if (!u.low) return;
    const int64_t adapters = u.right.size[0], columns = u.right.size[1], rank = u.right.size[2];
    for (int64_t begin = first, end; begin < first + rows; begin = end) {
        end = end_of_run(u.ids, adapters, begin, first + rows);
        const int64_t adapter = adapter_of(u.ids, adapters, begin);
        if (adapter < 0) continue;
        const View<2> right = matrix_of(u.right, adapter);
        const float scaling = static_cast<const float*>(u.scaling.data)[adapter * u.scaling.stride[0]];
        for (int64_t lane = 0; lane < lanes && column + lane < columns; lane += width) {
            for (int64_t r = 0; r < rank; r += width) {
                vf square[width];
                load_square(square, right, places, column + lane, r);
                const int64_t last = smaller(width, rank - r);
                for (int64_t m = begin; m < end; ++m) {  // a sum of its own: the total is rounded once a square
                    vf even = splat(0.0f), odd = even;
                    for (int64_t i = 0; i < last; i += 2) {
                        even = fma(splat(number_at<float>(u.low, m, r + i)), square[i], even);
                        if (i + 1 < last) odd = fma(splat(number_at<float>(u.low, m, r + i + 1)), square[i + 1], odd);
                    }
                    float* const total = totals + (m - first) * lanes + lane;
                    store(total, fma(splat(scaling), even + odd, load(total)));
                }
            }
        }
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
