// The nearest of the centroids of a codebook, by sums of squared differences, so that being far from the origin costs
// no precision: points have lanes, or, where they are few, centroids have. Where a second centroid is too near to tell,
// all are compared exactly.
#pragma once

#include "assign.h"

namespace metate::cpu::METATE_ISA {
namespace {

// `count` <= width rows, `stride` apart, side by side, column after column; the last one again to the end of a vector.
METATE_FN void turn_rows(float* to, const float* from, int64_t stride, int64_t count, int64_t columns) {
    for (int64_t first = 0; first < columns; first += width) {
        const int64_t n = smaller(width, columns - first);
        vf square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load_numbers(from + smaller(i, count - 1) * stride + first, n);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i)
            if (i < n) store(to + (first + i) * width, square[i]);
    }
}

// In each lane the least two distances, and the number that has the least.
struct Nearest {
    vf best = splat(infinity), second = splat(infinity);
    vi number = splat(0);

    METATE_FN void meet(vf distance, vi own) {
        second = min(max(distance, best), second);
        number = select(less(distance, best), own, number);
        best = min(distance, best);
    }
};

// The largest distance that may be less than one of `least`. A sum is off by less than (columns + 3) u of itself, or by
// what is lost below the normal numbers.
METATE_FN vf bound_of(vf least, int64_t columns) {
    return fma(least, splat(static_cast<float>(2 * static_cast<double>(columns + 8) * unit)), least + splat(0x1p-100f));
}

// Points in lanes, column after column, against centroids one by one. There are `together` of them or a multiple.
template <int columns, int together>
METATE_FN void meet_centroids(Nearest& at, const float* points, const Vectors<float>& book, int64_t centroids) {
    const int64_t d = columns ? columns : book.columns;
    for (int64_t l = 0; l < centroids; l += together) {
        vf sum[together];
#pragma GCC unroll 8
        for (int j = 0; j < together; ++j) sum[j] = splat(0.0f);
#pragma GCC unroll 8
        for (int64_t i = 0; i < d; ++i) {
            const vf x = load(points + i * width);
#pragma GCC unroll 8
            for (int j = 0; j < together; ++j) {
                const vf gap = x - splat(book.data[(l + j) * d + i]);
                sum[j] = fma(gap, gap, sum[j]);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < together; ++j) at.meet(sum[j], splat(static_cast<int32_t>(l + j)));
    }
}

// Calls found(i, number) for `count` <= width points; -1 where no distance is finite.
template <class Found>
METATE_FN void encode_lanes(const Vectors<float>& book, int64_t centroids, float* turned, const Vectors<float>& x,
                            int64_t count, const Found& found) {
    Nearest at;
    turn_rows(turned, x.data, x.stride, count, book.columns);
    if (book.columns == 4)
        meet_centroids<4, 2>(at, turned, book, centroids);
    else if (book.columns == 8)
        meet_centroids<8, 2>(at, turned, book, centroids);
    else if (centroids < 8)
        meet_centroids<0, 2>(at, turned, book, centroids);
    else
        meet_centroids<0, 8>(at, turned, book, centroids);
    const uint32_t sure = bits_of(less(bound_of(at.best, book.columns), at.second));
    int32_t numbers[width];
    store(numbers, at.number);
    for (int64_t i = 0; i < count; ++i)
        found(i, sure >> i & 1 ? numbers[i] : best_of_all(book, centroids, x.row(i), true, false).id);
}

// How far a point is from `width` centroids, each in a lane. `columns` divide a vector, in which the point stands again
// and again.
template <int columns>
METATE_FN vf distances_of(const float* centroids, vf point) {
    vf sums[columns];
#pragma GCC unroll 8
    for (int i = 0; i < columns; ++i) {
        const vf gap = point - load(centroids + i * width);
        sums[i] = gap * gap;
    }
#pragma GCC unroll 3
    for (int left = columns; left > 1; left /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < left / 2; ++i) {
            separate(sums[2 * i], sums[2 * i + 1]);
            sums[i] = sums[2 * i] + sums[2 * i + 1];
        }
    return sums[0];
}

// Of any columns.
METATE_FN vf distances_of(const float* centroids, const float* point, int64_t columns) {
    vf sums[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) sums[i] = splat(0.0f);
    for (int64_t first = 0; first < columns; first += width) {
        const int64_t n = smaller(width, columns - first);
        const vf x = load_numbers(point + first, n);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
            const vf gap = x - load_numbers(centroids + i * columns + first, n);
            sums[i] = fma(gap, gap, sums[i]);
        }
    }
    return sum_rows(sums);
}

template <int columns>
METATE_FN Nearest meet_point(const Vectors<float>& book, int64_t centroids, const float* point) {
    Nearest at;
    float again[width];
    for (int i = 0; columns && i < width; ++i) again[i] = point[i % (columns ? columns : 1)];
    const vf x = load(again);
    for (int64_t l = 0; l < centroids; l += width) {
        vf distance;
        if constexpr (columns > 0)
            distance = distances_of<columns>(book.row(l), x);
        else
            distance = distances_of(book.row(l), point, book.columns);
        at.meet(distance, add(lanes(), splat(static_cast<int32_t>(l))));
    }
    return at;
}

// The number of the nearest of all centroids, of which there are whole vectors; -1 where no distance is finite.
METATE_FN int64_t encode_point(const Vectors<float>& book, int64_t centroids, const float* point) {
    const int64_t d = book.columns;
    const Nearest at = d == 2               ? meet_point<2>(book, centroids, point)
                     : d == 4               ? meet_point<4>(book, centroids, point)
                     : d == 8 && width >= 8 ? meet_point<8>(book, centroids, point)
                                            : meet_point<0>(book, centroids, point);
    const vf bound = bound_of(splat(-largest(splat(0.0f) - at.best)), d);
    const uint32_t near = bits_of(not_less(bound, at.best));
    if (__builtin_popcount(near) != 1 || bits_of(not_less(bound, at.second)))
        return best_of_all(book, centroids, point, true, false).id;
    int32_t numbers[width];
    store(numbers, at.number);
    return numbers[__builtin_ctz(near)];
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
