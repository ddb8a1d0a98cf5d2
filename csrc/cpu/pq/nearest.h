// Queries against blocks of rows by products: |b|² - 2 q·b (or q·b) of a tile of queries and a block tells which rows
// may be among the best; those are compared once more, exactly.
//
// With u = 2^-24, a product of D + 1 steps and the sum of squares beside it are off by less than (D + 8) u times
// 2 (|q| |b| + |b|²), or |q| |b| without squares: a row further behind the worst of the best than that is not looked
// at.
#pragma once

#include "../attention/gemm.h"
#include "search.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Rows of vectors as they are stored.
template <class T>
struct Vectors {
    const T* data;
    int64_t stride, columns;
    const float *scale, *offset;  // of int8

    METATE_FN const T* row(int64_t i) const { return data + i * stride; }
};

METATE_FN vf load_numbers(const int8_t* p, int64_t n) {
    return to_float(load_wide(p, n));
}
template <class T>
METATE_FN vf load_numbers(const T* p, int64_t n) {
    return n >= width ? load(p) : load(p, n);
}

// Columns first … first + n of a row, n <= width, zeros after them.
template <class T>
METATE_FN vf load_values(const Vectors<T>& v, const T* row, int64_t first, int64_t n) {
    const vf x = load_numbers(row + first, n);
    if constexpr (!__is_same(T, int8_t)) return x;
    return fma(x, load_numbers(v.scale + first, n), load_numbers(v.offset + first, n));
}

template <class T>
METATE_FN double exact_value(const Vectors<T>& v, const T* row, int64_t i) {
    if constexpr (__is_same(T, int8_t))
        return static_cast<double>(v.scale[i]) * row[i] + static_cast<double>(v.offset[i]);
    else
        return static_cast<double>(to_float(row[i]));
}

// The distance in double precision, in which it is ranked after one rounding.
template <Metric metric, class T>
METATE_FN double exact_distance(const Vectors<T>& v, const float* query, const T* row) {
    constexpr int chains = 8;
    using Doubles = double __attribute__((vector_size(8 * chains)));
    using Floats = float __attribute__((vector_size(4 * chains), aligned(4), may_alias));
    Doubles sum = {}, most = {};
    // Of a column, or of some side by side: by reference, as vectors this wide are not passed on every machine.
    const auto meet = [](auto& total, auto& largest, const auto& a, const auto& b) __attribute__((always_inline)) {
        const auto gap = a - b;
        if constexpr (metric == Metric::inner_product) {
            total += a * b;
        } else if constexpr (metric == Metric::l2) {
            total += gap * gap;
        } else {
            const auto term = gap < 0 ? -gap : gap;
            total += metric == Metric::linf ? term - term : term;  // NaN, of inf too, which a comparison may drop
            if constexpr (metric == Metric::linf) largest = largest < term ? term : largest;
        }
    };
    int64_t i = 0;
    if constexpr (__is_same(T, float)) {
        for (; i + chains <= v.columns; i += chains) {
            const Doubles a = __builtin_convertvector(*reinterpret_cast<const Floats*>(query + i), Doubles);
            const Doubles b = __builtin_convertvector(*reinterpret_cast<const Floats*>(row + i), Doubles);
            meet(sum, most, a, b);
        }
    }
    const auto add = [&](int chain, int64_t at) __attribute__((always_inline)) {
        const double a = static_cast<double>(query[at]), b = exact_value(v, row, at);
        double total = sum[chain], largest = most[chain];
        meet(total, largest, a, b);
        sum[chain] = total, most[chain] = largest;
    };
    for (; i + chains <= v.columns; i += chains)
#pragma GCC unroll 8
        for (int c = 0; c < chains; ++c) add(c, i + c);
    for (int c = 0; i < v.columns; ++i, ++c) add(c, i);
    if constexpr (metric == Metric::linf) {
        for (int c = 1; c < chains; ++c) most[0] = most[0] < most[c] ? most[c] : most[0];
        sum[0] += most[0];
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

constexpr double unit = 0x1p-24;

// The largest approximate key that a row may have whose exact one is `limit` or better. `shift` is what the
// approximation leaves out, `error` how far it may be off.
METATE_FN float bound_of(float limit, double shift, double error) {
    const double key = static_cast<double>(limit);
    const double bound = key - shift + error + 4 * unit * __builtin_fabs(key);
    return static_cast<float>(bound + 4 * unit * __builtin_fabs(bound) + 0x1p-140);
}

constexpr int64_t base_rows = width == 16 ? 512 : 256;  // of a block: its panels stay in the second cache
constexpr int64_t query_rows = 240;                     // of a block of queries, whole tiles

// Vectors of a block side by side: panel after panel, in each column after column.
struct PackedRows {
    float* panels;
    int64_t steps;  // columns, and one more for the squares
    double size;    // the largest |b|
};

METATE_FN int64_t steps_of_rows(int64_t columns, bool l2) {
    return columns + l2;
}

// Packs -2 b and |b|² (or -b), negated where the largest are sought. Lanes without a row are zeros.
template <class T>
void pack_rows_of(PackedRows& packed, const Vectors<T>& v, int64_t first, int64_t rows, bool l2, bool largest) {
    const vf factor = splat((l2 ? -2.0f : 1.0f) * (largest ? -1.0f : 1.0f));
    vf most = splat(0.0f);
    for (int64_t row = 0; row < rows; row += panel) {
        float* const to = packed.panels + row * packed.steps;
        vf squares[2] = {splat(0.0f), splat(0.0f)};
        for (int64_t column = 0; column < v.columns; column += width) {
            const int64_t n = smaller(width, v.columns - column);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                vf square[width];
#pragma GCC unroll 16
                for (int i = 0; i < width; ++i) {
                    const int64_t at = row + half * width + i;
                    square[i] = at < rows ? load_values(v, v.row(first + at), column, n) : splat(0.0f);
                }
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < width; ++i) {
                    if (i >= n) break;
                    squares[half] = fma(square[i], square[i], squares[half]);
                    store(to + (column + i) * panel + half * width, square[i] * factor);
                }
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            most = max(most, squares[half]);
            if (l2) store(to + v.columns * panel + half * width, largest ? splat(0.0f) - squares[half] : squares[half]);
        }
    }
    // A NaN, which max may drop, makes approximations that no bound refuses.
    packed.size = __builtin_sqrt(static_cast<double>(METATE_ISA::largest(most)) * (1 + 1e-3));
}

// A block of queries as products want them, and how large they are.
struct PackedQueries {
    float* rows;  // `steps` apart, whole tiles
    double *size, *square;

    void take(Arena& arena, int64_t steps) {
        rows = arena.take<float>(query_rows * steps);
        size = arena.take<double>(query_rows);
        square = arena.take<double>(query_rows);
    }

    void fill(const float* from, int64_t stride, int64_t count, int64_t columns, int64_t steps) const {
        const Vectors<float> all{from, stride, columns, nullptr, nullptr};
        for (int64_t r = 0; r < count; ++r) {
            float* const to = rows + r * steps;
            for (int64_t i = 0; i < columns; ++i) to[i] = all.row(r)[i];
            if (steps > columns) to[columns] = 1.0f;
            square[r] = exact_distance<Metric::inner_product>(all, all.row(r), all.row(r));
            size[r] = __builtin_sqrt(square[r]);
        }
    }
};

// What compare_block knows of a block: rows first … first + count, packed.
struct Block {
    const PackedRows& packed;
    int64_t columns, first, count;
    bool l2;
};

// Offers the rows of a block whose approximate keys do not exceed the bound; distance(query, row) is exact.
template <class Distance>
METATE_FN void offer_rows(const Search& s, const Block& block, const float* query, const float* keys, float bound,
                          double shift, double error, const Distance& distance, Best& best) {
    for (int64_t c = 0; c < block.count; c += width) {
        uint32_t near = bits_of(not_less(splat(bound), load(keys + c)));
        for (; near; near &= near - 1) {
            const int64_t at = c + __builtin_ctz(near), row = block.first + at;
            if (at >= block.count || keys[at] > bound || !kept(s, row)) continue;
            const float before = best.limit();
            best.offer({key_of(s, distance(query, row)), id_of(s, row)});
            const float limit = best.limit();
            if (limit < before) {
                const float lower = bound_of(limit, shift, error);
                bound = lower < bound ? lower : bound;
            }
        }
    }
}

// Compares query r of a block of queries with a block of rows, given their approximate keys.
template <class Distance>
METATE_FN void compare_query(const Search& s, const Block& block, const PackedQueries& queries, int64_t r,
                             const float* keys, const Distance& distance, Best& best) {
    const double size = queries.size[r], far = block.packed.size;
    const double error = static_cast<double>(block.columns + 8) * 1.1 * unit * size * far * (block.l2 ? 2 : 1) +
                         (block.l2 ? static_cast<double>(block.columns + 8) * 2.2 * unit * far * far : 0.0);
    const double shift = block.l2 ? (s.largest ? -queries.square[r] : queries.square[r]) : 0.0;
    const float* const query = queries.rows + r * block.packed.steps;
    float bound = bound_of(best.limit(), shift, error);
    if (const int64_t whole = block.count / width * width; worth_bound(s, keys, whole, bound)) {
        const double least = static_cast<double>(kth_key(keys, whole, s.k)) + shift + error;
        const float other = bound_of(static_cast<float>(least), shift, error);
        bound = other < bound ? other : bound;
    }
    offer_rows(s, block, query, keys, bound, shift, error, distance, best);
}

// Compares `count` queries with a block. best(r) gives the best of query r, done(r, best) takes it back.
template <class Distance, class Open, class Close>
METATE_FN void compare_block(const Search& s, const Block& block, const PackedQueries& queries, int64_t count,
                             float* keys, const Distance& distance, const Open& open, const Close& close) {
    const int64_t steps = block.packed.steps, panels = ceil_div(block.count, panel);
    for (int64_t q = 0; q < count; q += tile_rows) {
        const int rows = static_cast<int>(smaller(tile_rows, count - q));
        for (int64_t i = 0; i < panels; ++i)
            multiply<Left::rows, Into::set>(
                rows, panel,
                Product<float>{queries.rows + q * steps, steps, block.packed.panels + i * panel * steps, steps,
                               keys + i * panel, base_rows, nullptr});
        for (int r = 0; r < rows; ++r) {
            Best best = open(q + r);
            compare_query(s, block, queries, q + r, keys + r * base_rows, distance, best);
            close(q + r, best);
        }
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
