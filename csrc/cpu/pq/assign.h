// The nearest of a few thousand centroids for many points: products with the points in lanes, so that the least key,
// its number and the second least are kept without looking back. Where the second is too near to tell, all are compared
// exactly.
#pragma once

#include "nearest.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Centroids as products want them: -2 c and |c|² (or -c and 0) in rows of `steps`, negated where the largest are
// sought, less how far a key may be off because of |c|; behind them every |c|².
struct Centroids {
    float* rows;
    int64_t count, steps;
    double size;  // the largest |c|

    METATE_FN static int64_t floats(int64_t count, int64_t columns) {
        return round_up(count, tile_rows) * (columns + 2);
    }
    METATE_FN float* squares() const { return rows + round_up(count, tile_rows) * steps; }
};

// Twice this share of |x|² + |c|² is more than the error of two keys (nearest.h, with |x| |c| <= (|x|² + |c|²) / 2) and
// the rounding of their distances.
METATE_FN double error_share(int64_t columns) {
    return (static_cast<double>(columns + 8) * 3.3 + 10) * unit;
}

inline void pack_centroids(Centroids& c, const Vectors<float>& v, bool l2, bool largest) {
    const float sign = largest ? -1.0f : 1.0f;
    double most = 0.0;
    for (int64_t r = 0; r < c.count; ++r) {
        const double square = exact_distance<Metric::inner_product>(v, v.row(r), v.row(r));
        float* const to = c.rows + r * c.steps;
        for (int64_t i = 0; i < v.columns; ++i) to[i] = v.row(r)[i] * (l2 ? -2.0f : 1.0f) * sign;
        to[v.columns] = static_cast<float>((l2 ? square * sign : 0.0) - error_share(v.columns) * square);
        c.squares()[r] = static_cast<float>(square);
        most = square > most ? square : most;
    }
    c.size = __builtin_sqrt(most);
}

// Memory of a worker: a panel of points, and the keys of a tile of centroids.
struct AssignSpace {
    float *points, *keys;

    METATE_FN static AssignSpace take(Arena& arena, int64_t columns) {
        return {arena.take<float>((columns + 1) * panel), arena.take<float>(tile_rows * panel)};
    }
};

// Points first … first + count, count <= panel, turned so that each has a lane, and their squares.
METATE_FN void pack_points(float* to, vf (&squares)[2], const Vectors<float>& x, int64_t first, int64_t count) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        squares[half] = splat(0.0f);
        for (int64_t column = 0; column < x.columns; column += width) {
            const int64_t n = smaller(width, x.columns - column);
            vf square[width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) {
                const int64_t at = half * width + i;
                square[i] = at < count ? load_numbers(x.row(first + at) + column, n) : splat(0.0f);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) {
                if (i >= n) break;
                squares[half] = fma(square[i], square[i], squares[half]);
                store(to + (column + i) * panel + half * width, square[i]);
            }
        }
        store(to + x.columns * panel + half * width, splat(1.0f));
    }
}

// The exact best of the centroids that may be near; id -1 where no distance is finite.
template <class Near>
METATE_FN Hit best_of(const Vectors<float>& v, int64_t count, const float* point, bool l2, bool largest,
                      const Near& near) {
    Hit best{infinity, -1};
    for (int64_t i = 0; i < count; ++i) {
        if (!near(i)) continue;
        const float distance = static_cast<float>(l2 ? exact_distance<Metric::l2>(v, point, v.row(i))
                                                     : exact_distance<Metric::inner_product>(v, point, v.row(i)));
        const float key = largest ? -distance : distance;
        if (key < best.key && key > -infinity) best = {key, i};
    }
    return best;
}

inline Hit best_of_all(const Vectors<float>& v, int64_t count, const float* point, bool l2, bool largest) {
    return best_of(v, count, point, l2, largest, [](int64_t) { return true; });
}

// found(point, centroid) for points first … first + count, count <= panel; centroid -1 where there is none.
template <class Found>
METATE_FN void assign_points(const Centroids& c, const Vectors<float>& v, bool l2, bool largest, const AssignSpace& at,
                             const Vectors<float>& x, int64_t first, int64_t count, const Found& found) {
    vf squares[2], best[2], second[2];
    vi number[2] = {splat(0), splat(0)};
    pack_points(at.points, squares, x, first, count);
    for (int h = 0; h < 2; ++h) best[h] = second[h] = splat(infinity);
    for (int64_t row = 0; row < c.count; row += tile_rows) {
        const int rows = static_cast<int>(smaller(tile_rows, c.count - row));
        multiply<Left::rows, Into::set>(
            rows, panel, Product<float>{c.rows + row * c.steps, c.steps, at.points, c.steps, at.keys, panel, nullptr});
        for (int r = 0; r < rows; ++r) {
            const vi own = splat(static_cast<int32_t>(row + r));
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const vf key = load(at.keys + r * panel + h * width);
                second[h] = min(max(key, best[h]), second[h]);
                number[h] = select(less(key, best[h]), own, number[h]);
                best[h] = min(key, best[h]);
            }
        }
    }
    // The second key is below all others; the error that was taken off the best one, which counts against it, and that
    // of |x| twice, must not lead so far. The largest |c| decides for most points, its own for those far from outliers.
    const vf share = splat(static_cast<float>(2 * error_share(v.columns)));
    alignas(64) float far[panel];
    int32_t numbers[panel];
    uint32_t sure = 0;
    const auto compare = [&](int h, vf square) __attribute__((always_inline)) {
        sure |= bits_of(less(fma(share, squares[h] + square, best[h]), second[h])) << (h * width);
    };
    for (int h = 0; h < 2; ++h) {
        compare(h, splat(static_cast<float>(c.size * c.size)));
        store(numbers + h * width, number[h]);
    }
    if (uint64_t{sure} + 1 != uint64_t{1} << panel) {
        for (int i = 0; i < panel; ++i) far[i] = c.squares()[numbers[i]];
        for (int h = 0; h < 2; ++h) compare(h, load(far + h * width));
    }
    for (int i = 0; i < count; ++i) {
        const bool known = c.count > 1 && (sure >> i & 1);
        found(first + i, known ? numbers[i] : best_of_all(v, c.count, x.row(first + i), l2, largest).id);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
