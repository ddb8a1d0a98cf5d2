// Register-blocked products of small tiles, and the packing they want.
//
// A product adds, for each row r and column c, a(r, k) · b(k, c) over k in ascending order into one accumulator, so a
// row's result depends neither on the rows beside it nor on the tile's size. Operands are made of 32-bit words: a
// float, or a Pair of bfloat16 that stand one after the other in k; `steps` counts words.
#pragma once

#include "../strided.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int tile_rows = width == 16 ? 12 : 6;  // with `panel` columns they fill the registers
constexpr int panel = 2 * width;                 // columns of a packed panel of b

struct Pair {
    bf16 first, second;
};
template <class Word>
constexpr int elements_of = __is_same(Word, Pair) ? 2 : 1;

// Calls run<T, Word>() with the elements of a dtype and the words in which this instruction set multiplies them.
template <class Run>
void with_words(DType dtype, const Run& run) {
    with_floats(dtype, [&]<class T>() {
        if constexpr (only_bf16)
            run.template operator()<T, Pair>();
        else
            run.template operator()<T, float>();
    });
}

template <class Word>
METATE_FN constexpr int64_t steps_of(int64_t elements) {
    return (elements + elements_of<Word> - 1) / elements_of<Word>;
}

METATE_FN vf add_product(vf sum, vf a, const float* b) {
    return add_product(sum, a, load(b));
}
METATE_FN vf spread(const float* a) {
    return splat(*a);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf add_product(vf sum, vi a, vf b) {
    return add_product(sum, a, as_int(b));
}
METATE_FN vf add_product(vf sum, vi a, const Pair* b) {
    return add_product(sum, a, load(reinterpret_cast<const float*>(b)));
}
METATE_FN vi spread(const Pair* a) {
    return splat(bit_cast<int32_t>(*a));
}
#endif

// Columns that are half a vector, of which two rows share one.
#if defined(METATE_HAS_HALVES)
constexpr int half = width / 2;
#else
constexpr int half = 0;
#endif

// What becomes of the old values of c: lost, added to, or scaled row by row and added to.
enum class Into { set, add, scaled };
// How a lies in memory: a(r, k) at r · stride + k, at k · stride + r, or panel after panel as pack_rows leaves floats,
// at k / panel · stride + r · panel + k % panel.
enum class Left { rows, columns, panels };

template <class Word>
struct Product {
    const Word* a;
    int64_t stride;  // of a
    const Word* b;   // panel: word (k, c) at k · panel + c
    int64_t steps;
    float* c;  // (r, column) at r · c_stride + column
    int64_t c_stride;
    const float* factor;  // of each row, with Into::scaled
};

// What a product does beside its sums, every few steps.
struct Nothing {
    METATE_FN void operator()() const {}
};

// A product and what stood there. Adding last keeps the rounding of long sums to that of their parts.
template <Into into>
METATE_FN vf combine(const float* c, vf sum, const float* factor, int r) {
    if constexpr (into == Into::set) return sum;
    if constexpr (into == Into::add) return load(c) + sum;
    return fma(load(c), splat(factor[r]), sum);
}

// Of so many whole vectors of columns and perhaps a half one behind them.
template <Left left, Into into, int rows, int vectors, bool has_half = false, class Word, class Beside>
__attribute__((noinline)) void multiply_tile(const Product<Word>& p, Beside beside) {
    static_assert(!has_half || (into == Into::add && rows % 2 == 0));
    float* const c = p.c;
    const int64_t c_stride = p.c_stride;
    vf sum[rows][vectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            sum[r][v] = splat(0.0f);
        }
    }
    vf last[has_half ? rows / 2 : 1] = {};
    // Three rows to a pointer: with the stride once and twice as index, every address is one addressing mode.
    constexpr int bases = (rows + 2) / 3;
    const Word* base[bases];
    const int64_t row_stride = left == Left::rows ? p.stride : left == Left::panels ? panel : 1;
    const int64_t step = left == Left::columns ? p.stride : 1;
#pragma GCC unroll 4
    for (int i = 0; i < bases; ++i) base[i] = p.a + 3 * i * row_stride;
    const Word* b = p.b;
    const auto a_at = [&](int r, int j) __attribute__((always_inline)) {
        return spread(base[r / 3] + r % 3 * row_stride + j * step);
    };
    const auto add_steps = [&]<int n>() __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) {
                const auto a = a_at(r, j);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) sum[r][v] = add_product(sum[r][v], a, b + j * panel + v * width);
                if constexpr (has_half) {
                    if (r % 2 == 0) continue;
                    const auto columns = reinterpret_cast<const float*>(b + j * panel + vectors * width);
                    last[r / 2] = add_product(last[r / 2], join_halves(a_at(r - 1, j), a), repeat<half>(columns));
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) base[i] += n * step;
        b += n * panel;
    };
    // Several steps at a time, or the counting would take the slots that another thread of the core could use.
    constexpr int batch = left == Left::columns ? 1 : 4;
    for (int64_t left_steps = p.steps; left_steps > 0; left_steps -= panel) {
        int64_t k = left == Left::panels && left_steps > panel ? panel : left_steps;
        for (; k >= batch; k -= batch) {
            beside();
            add_steps.template operator()<batch>();
        }
        for (; k > 0; --k) add_steps.template operator()<1>();
        if constexpr (left != Left::panels) break;
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) base[i] += p.stride - panel;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
            store(c + r * c_stride + v * width, combine<into>(c + r * c_stride + v * width, sum[r][v], p.factor, r));
        if constexpr (has_half) {
            if (r % 2 == 0) continue;
            const auto below = p.c + r * c_stride + vectors * width, above = below - c_stride;
            store_halves(above, below, load_halves(above, below) + last[r / 2]);
        }
    }
}

template <Left left, Into into, class Word, class Beside = Nothing>
METATE_FN void multiply_steps(int rows, int64_t columns, const Product<Word>& p, const Beside& beside = {}) {
    constexpr int middle = tile_rows < 8 ? tile_rows : 8;
    if (columns > width) {
        if (rows > 8) return multiply_tile<left, into, tile_rows, 2>(p, beside);
        if (rows > 4) return multiply_tile<left, into, middle, 2>(p, beside);
        if (rows > 2) return multiply_tile<left, into, 4, 2>(p, beside);
        if (rows > 1) return multiply_tile<left, into, 2, 2>(p, beside);
        return multiply_tile<left, into, 1, 2>(p, beside);
    }
    if (rows > 4) return multiply_tile<left, into, tile_rows, 1>(p, beside);
    return multiply_tile<left, into, 4, 1>(p, beside);
}

// How many steps a sum from nothing takes in one chain, for it is rounded as often as that. Short chains are for scores
// whose lse comes from elsewhere: there an error of one score is an error of its probability that nothing cancels.
constexpr int64_t long_chain = 128, short_chain = 32;

// c += a · b for `rows` <= tile_rows rows and `columns` <= panel columns. A tile may run on a few rows and columns more
// than were asked for, up to tile_rows and panel: they must be readable in a (and factor) and writable in c.
template <Left left, Into into, int64_t longest = long_chain, class Word, class Beside = Nothing>
METATE_FN void multiply(int rows, int64_t columns, const Product<Word>& whole, const Beside& beside = {}) {
    if (into != Into::set || whole.steps <= longest) return multiply_steps<left, into>(rows, columns, whole, beside);
    int64_t steps = whole.steps;
    Product<Word> p = whole;
    p.steps = longest;
    multiply_steps<left, Into::set>(rows, columns, p, beside);
    for (steps -= longest; steps > 0; steps -= longest) {
        p.a += left == Left::columns ? longest * p.stride : left == Left::panels ? longest / panel * p.stride : longest;
        p.b += longest * panel;
        p.steps = steps < longest ? steps : longest;
        multiply_steps<left, Into::add>(rows, columns, p, beside);
    }
}

// Packing.

constexpr int max_head_dim = 512;

// A row of n elements, contiguous: where it is if its elements stand side by side, else copied to `line`.
template <class T>
METATE_FN const T* contiguous(const T* row, int64_t stride, int64_t n, T* line) {
    if (stride == 1) return row;
    for (int64_t i = 0; i < n; ++i) line[i] = row[i * stride];
    return line;
}

METATE_FN void store_words(float* to, vf x) {
    store(to, x);
}
template <class T>
METATE_FN vf load_words(const T* from, int64_t n, const float*) {
    return n >= width ? load(from) : load(from, n);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN void store_words(Pair* to, vf x) {
    store(reinterpret_cast<float*>(to), x);
}
METATE_FN vf load_words(const bf16* from, int64_t n, const Pair*) {
    return as_float(n >= 2 * width ? load_pairs(from) : load_pairs(from, n));
}
#endif

// One row of n <= max_head_dim elements as words, zeros up to `words` (a multiple of width).
template <class Word, class T>
inline void pack_row(Word* to, int64_t words, const T* row, int64_t stride, int64_t n) {
    T line[max_head_dim];
    row = contiguous(row, stride, n, line);
    constexpr int unit = width * elements_of<Word>;
    int64_t at = 0;
    for (; at + unit <= n; at += unit, to += width) store_words(to, load_words(row + at, unit, to));
    for (words -= steps_of<Word>(at); words > 0; words -= width, at += unit, to += width) {
        store_words(to, at < n ? load_words(row + at, n - at, to) : splat(0.0f));
    }
}

// One square of a transpose: `width` rows from `from` on, `width` words each.
template <class Word, class T>
METATE_FN void transpose_square(Word* to, const T* from, int64_t row_stride) {
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load_words(from + i * row_stride, width * elements_of<Word>, to);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) store_words(to + i * panel, square[i]);
}

// The same where rows or words are missing: zeros stand for the rows.
template <class Word, class T>
inline void transpose_rest(Word* to, const T* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t n) {
    constexpr int64_t unit = width * elements_of<Word>;
    vf square[width];
    for (int i = 0; i < width; ++i) {
        T line[unit];
        square[i] = i < rows ? load_words(contiguous(from + i * row_stride, stride, n < unit ? n : unit, line), n, to)
                             : splat(0.0f);
    }
    transpose(square);
    const int64_t words = n < unit ? steps_of<Word>(n) : width;
    for (int64_t i = 0; i < words; ++i) store_words(to + i * panel, square[i]);
}

// The transpose of `rows` rows of n <= max_head_dim elements, as b of a product over n: panel after panel, word (k, c)
// of a panel at k · panel + c, steps_of(n) words deep. Rows are filled up with zeros to whole panels.
template <class Word, class T>
inline void pack_transposed(Word* to, const T* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t n) {
    constexpr int unit = width * elements_of<Word>;
    const int64_t steps = steps_of<Word>(n);
    for (int64_t row = 0; row < round_up(rows, panel); row += width) {
        const T* line = from + row * row_stride;
        Word* const out = to + row / panel * steps * panel + row % panel;
        const bool has_next = row + 2 * width <= rows;  // whole rows far apart are more than the machine foresees
        for (int64_t at = 0; at < n; at += unit, line += unit * stride) {
            Word* const square = out + at / elements_of<Word> * panel;
            for (int i = 0; i < width && has_next; ++i) __builtin_prefetch(line + (width + i) * row_stride, 0, 2);
            if (stride == 1 && n - at >= unit && rows - row >= width) {
                transpose_square(square, line, row_stride);
            } else {
                transpose_rest(square, line, row_stride, stride, rows - row, n - at);
            }
        }
    }
}

constexpr int64_t rows_ahead = 16;  // how far ahead rows are fetched into the cache

// `rows` rows of n elements as b of a product over the rows: every `panel_stride` words a panel of `panel` elements of
// n, word (k, c) of a panel at k · panel + c, `steps` >= steps_of(rows) words deep, zeros after the rows and columns.
// Returns whether all elements are finite.
template <class T>
inline bool pack_rows(float* to, const T* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t n,
                      int64_t steps, int64_t panel_stride) {
    T line[max_head_dim];
    vf poison = splat(0.0f);  // NaN once an element was infinite or NaN
    const auto put = [&](float* at, vf x) {
        poison = fma(x, splat(0.0f), poison);
        store(at, x);
    };
    for (int64_t k = 0; k < rows; ++k, from += row_stride, to += panel) {
        const T* row = contiguous(from, stride, n, line);
        float* out = to;
        int64_t c = 0;
        for (; c + panel <= n; c += panel, out += panel_stride) {
            if (k + rows_ahead < rows) __builtin_prefetch(from + rows_ahead * row_stride + c * stride, 0, 2);
            put(out, load(row + c));
            put(out + width, load(row + c + width));
        }
        if (c == n) continue;
        put(out, n - c >= width ? load(row + c) : load(row + c, n - c));
        put(out + width, n - c > width ? load(row + c + width, n - c - width) : splat(0.0f));
    }
    for (int64_t k = rows; k < steps; ++k, to += panel) {
        for (int64_t c = 0; c < panel * ceil_div(n, panel); c += width)
            store(to + c / panel * panel_stride + c % panel, splat(0.0f));
    }
    return bits_of(is_nan(poison)) == 0;
}

#if defined(METATE_HAS_BF16_DOT)
inline bool pack_rows(Pair* to, const bf16* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t n,
                      int64_t steps, int64_t panel_stride) {
    bf16 even[max_head_dim], odd[max_head_dim];
    const bf16 zeros[max_head_dim] = {};
    vm bad = 0;
    for (int64_t k = 0; k < steps; ++k, to += panel) {
        const bf16 *first = from + 2 * k * row_stride, *second = first + row_stride;
        const bf16* a = 2 * k < rows ? contiguous(first, stride, n, even) : zeros;
        const bf16* b = 2 * k + 1 < rows ? contiguous(second, stride, n, odd) : zeros;
        Pair* out = to;
        const auto put = [&](Pair* at, vi x) {
            bad |= not_finite(x);
            store_words(at, as_float(x));
        };
        int64_t c = 0;
        for (; c + panel <= n; c += panel, out += panel_stride) {
            if (2 * k + 2 * rows_ahead < rows) {
                __builtin_prefetch(first + 2 * rows_ahead * row_stride + c * stride, 0, 2);
                __builtin_prefetch(second + 2 * rows_ahead * row_stride + c * stride, 0, 2);
            }
            put(out, zip(a + c, b + c));
            put(out + width, zip(a + c + width, b + c + width));
        }
        if (c == n) continue;
        put(out, n - c >= width ? zip(a + c, b + c) : zip(a + c, b + c, n - c));
        put(out + width, n - c > width ? zip(a + c + width, b + c + width, n - c - width) : splat(0));
    }
    return bad == 0;
}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
