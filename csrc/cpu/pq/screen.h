// The nearest of a few thousand centroids by products of 16-bit whole numbers, of which there are twice as many to a
// vector as of floats. They leave few points open; for those, the centroids in question are compared exactly.
#pragma once

#include "assign.h"

#if defined(METATE_HAS_VNNI_FORMS)
namespace metate::cpu::METATE_ISA {
namespace {

// Two columns of a vector, as multiples of 1/32767 of its length: no sum of their products leaves 32 bits.
struct Couple {
    int16_t first, second;
};
constexpr double most_word = 32767;

METATE_FN vi spread(const Couple* a) {
    return splat(bit_cast<int32_t>(*a));
}
// Sums are whole numbers, which keep their bits in lanes of floats.
METATE_FN vf add_product(vf sum, vi a, const Couple* b) {
    vi whole = as_int(sum);
    vnni_add_word_dot(whole, a, load(reinterpret_cast<const int32_t*>(b)));
    return as_float(whole);
}

// Rounding moves a vector by at most √columns / 2 multiples. Of two vectors, the product is off by less than this share
// of that of their lengths, roundings of floats and of the distance included.
METATE_FN double word_share(int64_t columns) {
    const double moved = 0.51 * __builtin_sqrt(static_cast<double>(columns)) / most_word;
    return moved * (2 + moved) + 32 * unit;
}

// The length of a vector of up to 2^13 columns, or a little more, and not 0; NaN where it has none.
METATE_FN float length_of(vf squares) {
    const float length = static_cast<float>(__builtin_sqrt(static_cast<double>(sum(squares)))) * (1 + 0x1p-16f);
    return length < 0x1p-55f ? 0x1p-55f : length;
}

// Writes a vector as words, whole vectors of them with zeros at the end. Returns its length.
METATE_FN float to_words(Couple* words, const float* x, int64_t columns) {
    vf squares = splat(0.0f);
    for (int64_t i = 0; i < columns; i += width) {
        const vf part = load_numbers(x + i, columns - i);
        squares = fma(part, part, squares);
    }
    const float length = length_of(squares);
    const vf inverse = splat(static_cast<float>(most_word) / length);
    auto* const to = reinterpret_cast<uint16_t*>(words);
    for (int64_t i = 0; i < round_up(columns, 2 * width); i += width)
        store_words(to + i, to_int(i < columns ? load_numbers(x + i, columns - i) * inverse : splat(0.0f)));
    return length;
}

// Centroids as words, their lengths, and |c|² (or 0), negated where the largest are sought, less its own rounding.
struct Screen {
    Couple* rows;
    float *lengths, *squares;
    int64_t columns, count, steps;
    bool l2, largest;

    // Memory of a worker: half a panel of points as words, the panel, and the keys of all centroids.
    struct Space {
        Couple *line, *points;
        float* keys;
    };

    METATE_FN static bool fits(int64_t columns, int64_t count) {
        return isa() >= Isa::avx512vnni && columns >= 2 * width && columns <= 1 << 13 && count > 1 && count <= 1 << 14;
    }
    METATE_FN int64_t stride() const { return round_up(steps, width) + width; }  // not a power of two

    void take(Arena& arena) {
        rows = arena.take<Couple>(round_up(count, tile_rows) * stride());
        lengths = arena.take<float>(count);
        squares = arena.take<float>(count);
    }
    Space space(Arena& arena) const {
        return {arena.take<Couple>(width * stride()), arena.take<Couple>(round_up(steps, width) * panel),
                arena.take<float>(round_up(count, tile_rows) * panel)};
    }
    void pack(const Vectors<float>& v) const {
        for (int64_t r = 0; r < count; ++r) {
            const double square = exact_distance<Metric::inner_product>(v, v.row(r), v.row(r));
            lengths[r] = to_words(rows + r * stride(), v.row(r), columns);
            squares[r] = static_cast<float>((l2 ? square * (largest ? -1 : 1) : 0.0) - 32 * unit * square);
        }
    }

    // As assign_points; false, and nothing is found, where so many points are open that floats are faster.
    template <class Found>
    METATE_FN bool assign(const Space& at, const Vectors<float>& v, const Vectors<float>& x, int64_t first,
                          int64_t points, const Found& found) const;
};

// Points first … first + count, count <= panel, turned so that each has a lane, and their lengths.
METATE_FN void turn_points(const Screen& s, const Screen::Space& at, float* lengths, const Vectors<float>& x,
                           int64_t first, int64_t count) {
    for (int64_t half = 0; half < panel; half += width) {
        for (int64_t i = 0; i < width; ++i)  // lanes without a point have the last one
            lengths[half + i] =
                to_words(at.line + i * s.stride(), x.row(first + smaller(half + i, count - 1)), s.columns);
        for (int64_t step = 0; step < s.steps; step += width) {
            vf square[width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i)
                square[i] = load(reinterpret_cast<const float*>(at.line + i * s.stride() + step));
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i)
                store(reinterpret_cast<float*>(at.points + (step + i) * panel + half), square[i]);
        }
    }
}

// What a panel of points found: no key that stands for a centroid is more than its exact one, and those above the limit
// of a point are not its nearest. Bit i of `sure`: one alone is not above it.
struct Screened {
    alignas(64) float limits[panel];
    int32_t numbers[panel];
    uint32_t sure;
};

METATE_FN void screen_points(const Screen& s, const Screen::Space& at, const Vectors<float>& x, int64_t first,
                             int64_t count, Screened& to) {
    const double share = word_share(s.columns) * (s.l2 ? 2 : 1), sign = (s.largest ? -1.0 : 1.0) * (s.l2 ? -2 : 1);
    alignas(64) float lengths[panel];
    vf factor[2], error[2], best[2], second[2];
    vi number[2] = {splat(0), splat(0)};
    turn_points(s, at, lengths, x, first, count);
    for (int h = 0; h < 2; ++h) {
        factor[h] = load(lengths + h * width) * splat(static_cast<float>(sign / (most_word * most_word)));
        error[h] = load(lengths + h * width) * splat(static_cast<float>(share));
        best[h] = second[h] = splat(infinity);
    }
    for (int64_t row = 0; row < s.count; row += tile_rows) {
        const int rows = static_cast<int>(smaller(tile_rows, s.count - row));
        multiply_steps<Left::rows, Into::set>(rows, panel,
                                              Product<Couple>{s.rows + row * s.stride(), s.stride(), at.points, s.steps,
                                                              at.keys + row * panel, panel, nullptr});
        for (int64_t r = row; r < row + rows; ++r) {
            const vf length = splat(s.lengths[r]), square = splat(s.squares[r]);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                float* const own = at.keys + r * panel + h * width;
                const vf key = fma(fma(to_float(as_int(load(own))), factor[h], -error[h]), length, square);
                store(own, key);
                second[h] = min(max(key, best[h]), second[h]);
                number[h] = select(less(key, best[h]), splat(static_cast<int32_t>(r)), number[h]);
                best[h] = min(key, best[h]);
            }
        }
    }
    to.sure = 0;
    const vf rounding = splat(static_cast<float>(64 * unit));
    for (int h = 0; h < 2; ++h) {
        const vf own = load(lengths + h * width), length = gather(s.lengths, number[h]);
        const vf limit = best[h] + fma(own * own + length * length, rounding, length * (error[h] + error[h]));
        store(to.limits + h * width, limit);
        store(to.numbers + h * width, number[h]);
        to.sure |= bits_of(less(limit, second[h])) << (h * width);
    }
}

template <class Found>
METATE_FN bool Screen::assign(const Space& at, const Vectors<float>& v, const Vectors<float>& x, int64_t first,
                              int64_t points, const Found& found) const {
    constexpr int most_open = 8;
    Screened told;
    screen_points(*this, at, x, first, points, told);
    if (__builtin_popcount(~told.sure) > most_open) return false;
    for (int64_t i = 0; i < points; ++i) {
        const auto near = [&](int64_t r) { return !(told.limits[i] < at.keys[r * panel + i]); };
        const bool sure = told.sure >> i & 1;
        found(first + i, sure ? told.numbers[i] : best_of(v, count, x.row(first + i), l2, largest, near).id);
    }
    return true;
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
#endif
