// Few rows of an expert times its weight as it lies, which is read once: memory bounds them.
#pragma once

#include "linear.h"

namespace metate::cpu::METATE_ISA {
namespace {

template <class T>
constexpr int square_columns = width * per_lane<T>;
template <class T, class Word>
constexpr int square_words = square_columns<T> / elements_of<Word>;

template <class T>
METATE_FN vf load_lanes(const T* row, int64_t n) {
    return n >= width ? load(row) : load(row, n);
}
METATE_FN vf load_lanes(const bf16* row, int64_t n) {
    if (n >= square_columns<bf16>) return load(reinterpret_cast<const float*>(row));
    bf16 line[square_columns<bf16>] = {};
    memcpy(line, row, static_cast<size_t>(n) * sizeof(bf16));
    return load(reinterpret_cast<const float*>(line));
}

// Vector i of `square`: lane i of `width` rows of the weight, of which there are n; zeros behind the columns.
template <class T>
METATE_FN void load_square(vf (&square)[width], const T* from, int64_t stride, int64_t n, int64_t left) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = load_lanes(from + (i < n ? i : n - 1) * stride, left);
    transpose(square);
}

// Word i of `width` rows.
template <class T, class Word>
METATE_FN vf word(const vf (&square)[width], int i) {
    if constexpr (per_lane<T> == elements_of<Word>) return square[i];
    const vi pair = as_int(square[i / 2]);
    return as_float(i % 2 ? bit_and(pair, splat(-0x10000)) : shift_left(pair, 16));
}

// Rows of the weight, one line of the cache after another: memory is fastest where it is read from end to end, in
// whatever order products take what was read.
struct Lines {
    const char* row;
    int64_t bytes, stride;  // of a row
    int64_t at = 0;

    METATE_FN void fetch() {
        __builtin_prefetch(row + at);
        at += 64;
        if (at < bytes) return;
        at = 0;
        row += stride;
    }
};

// `next`: as many lines as the square has are fetched, one at a time.
template <class T, class Word, int rows>
METATE_FN void add_square(vf (&sum)[rows], const vf (&square)[width], const Word* x, int64_t pitch, Lines& next) {
    constexpr int lines = larger(width * width * static_cast<int>(sizeof(float)) / 64, 1);
#pragma GCC unroll 32
    for (int i = 0; i < square_words<T, Word>; ++i) {
        if (i % (square_words<T, Word> / lines) == 0) next.fetch();
        const vf value = word<T, Word>(square, i);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) sum[r] = add_product(sum[r], spread(x + r * pitch + i), value);
    }
}

// `width` columns of the result of few rows. `next`: the weight of the columns after them.
template <int rows, class T, class Word>
void multiply_few(const Problem<T, Word>& p, const Word* x, const T* w, int64_t n, Lines next, vf (&total)[rows]) {
    constexpr int64_t step = square_columns<T>;
    static_assert(short_chain * elements_of<Word> % step == 0);
    const int64_t stride = p.call.w.stride[1], columns = p.columns(), chain = p.chain();
    vf sum[rows];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) total[r] = sum[r] = splat(0.0f);
    for (int64_t k = 0; k < columns; k += step, x += square_words<T, Word>) {
        vf square[width];
        load_square(square, w + k, stride, n, columns - k);
        add_square<T>(sum, square, x, p.pitch, next);
        if (((k + step) & (chain - 1)) > 0 && k + step < columns) continue;  // a power of two
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            total[r] = total[r] + sum[r];
            sum[r] = splat(0.0f);
        }
    }
}

// Rows behind those of the span are readable, and not written.
template <int rows, class T, class Word>
void compute_few(const Problem<T, Word>& p, const Span& span, int64_t n, int64_t end, const T* after) {
    if constexpr (rows > 1) {
        constexpr int fewer = rows > 4 ? rows - 2 : rows - 1;
        if (span.rows <= fewer) return compute_few<fewer>(p, span, n, end, after);
    }
    const int64_t size = sizeof(T), bytes = p.columns() * size, stride = p.call.w.stride[1] * size;
    for (; n < end; n += width) {
        const int64_t count = smaller(width, end - n);
        const T* const now = p.weight(span.expert, n, 0);
        const T* const next = n + width < end ? p.weight(span.expert, n + width, 0) : after ? after : now;
        vf total[rows];
        multiply_few<rows>(p, p.words_of(span), now, count, Lines{reinterpret_cast<const char*>(next), bytes, stride},
                           total);
        const vf bias = bias_at<T>(p.call, span.expert, n, count);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
            if (r < span.rows) write<T>(p.call, span.first + r, n, total[r] + bias, count);
    }
}

// Few rows and lanes of chains: several rows of the weight in turn are slower to read than one after another.

METATE_FN vf word_of(vf x, const float*) {
    return x;
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vi word_of(vf x, const Pair*) {
    return as_int(x);
}
#endif

// Chain c of row r of a region of the weight stands in lane r · spread + c. Lanes without a chain and rows that there
// are not read what is there anyway.
struct Places {
    int64_t at[width];

    Places(const Lanes& lanes, int64_t rows, int64_t stride, int64_t chain) {
        for (int64_t lane = 0; lane < width; ++lane) {
            const int64_t row = lane / lanes.spread, c = lane % lanes.spread;
            at[lane] = row < rows && c < lanes.used ? row * stride + c * chain : 0;
        }
    }
};

template <int spread, int rows, class T, class Word>
METATE_FN void multiply_region(const T* region, const Places& places, const Word* x, int64_t pitch, Lines next,
                               vf (&sum)[rows]) {
    constexpr int64_t unit = width * elements_of<Word>, squares = depth / width;
    constexpr int64_t lines = depth * elements_of<Word> * static_cast<int64_t>(sizeof(T)) / 64;  // of a chain
    constexpr int64_t every = squares / lines;                                                   // products to a line
    static_assert(every * lines == squares);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum[r] = splat(0.0f);
    for (int64_t i = 0; i < squares; ++i, x += width * spread) {
        vf square[width];
#pragma GCC unroll 16
        for (int lane = 0; lane < width; ++lane)
            square[lane] = load_words(region + places.at[lane] + i * unit, unit, x);
        transpose(square);
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) {
            // One at a time: a burst of them would hold up the loads behind it.
            if ((i * width + j) % every == 0) next.fetch();
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const float* const words = reinterpret_cast<const float*>(x + r * pitch + j * spread);
                sum[r] = add_product(sum[r], word_of(repeat<spread>(words), x), square[j]);
            }
        }
    }
}

// Adds the chains of `count` rows of the weight in lanes to their totals, in ascending order.
METATE_FN void add_lanes(float* totals, vf sum, int64_t count, int64_t spread, int64_t chains) {
    float lanes[width];
    store(lanes, sum);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < chains; ++c) totals[i] += lanes[i * spread + c];
}

template <int rows, int spread, class T, class Word>
void compute_lanes(const Problem<T, Word>& p, const Span& span, int64_t n, int64_t end, const T* after) {
    if constexpr (rows > 1) {
        if (span.rows <= rows / 2) return compute_lanes<rows / 2, spread>(p, span, n, end, after);
    }
    constexpr int64_t at_once = width / spread;  // rows of the weight
    const Lanes& lanes = p.lanes;
    const int64_t stride = p.call.w.stride[1], columns = lanes.used * p.chain();  // of a part
    const Places whole(lanes, at_once, stride, p.chain()), rest(lanes, (end - n) % at_once, stride, p.chain());
    const int64_t size = sizeof(T), bytes = p.columns() * size;
    const auto row_at = [&](int64_t row) {
        return row < end ? p.weight(span.expert, row, 0) : after ? after : p.weight(span.expert, n, 0);
    };
    for (; n < end; n += width) {
        const int64_t count = smaller(width, end - n);
        float totals[rows][width] = {};
        for (int64_t i = 0; i < count; i += at_once) {
            const int64_t there = smaller(at_once, count - i);
            for (int64_t part = 0; part < lanes.parts; ++part) {
                const bool is_last = part + 1 == lanes.parts;
                const char* const row = reinterpret_cast<const char*>(row_at(is_last ? n + i + at_once : n + i));
                vf sum[rows];
                multiply_region<spread>(row_at(n + i) + part * columns, there < at_once ? rest : whole,
                                        p.words_of(span) + part * p.chain_words() * spread, p.pitch,
                                        Lines{row, bytes, stride * size, is_last ? 0 : (part + 1) * columns * size},
                                        sum);
                const int64_t chains = smaller(lanes.used, lanes.chains - part * lanes.used);
                for (int r = 0; r < rows; ++r) add_lanes(totals[r] + i, sum[r], there, spread, chains);
            }
        }
        const vf bias = bias_at<T>(p.call, span.expert, n, count);
        for (int r = 0; r < span.rows; ++r) write<T>(p.call, span.first + r, n, load(totals[r]) + bias, count);
    }
}

template <class T, class Word>
void compute_lanes(const Problem<T, Word>& p, const Span& span, int64_t n, int64_t end, const T* after) {
    if (p.lanes.spread == 4) return compute_lanes<lane_rows, 4>(p, span, n, end, after);
    if constexpr (width >= 8) {
        if (p.lanes.spread == 8) return compute_lanes<lane_rows, 8>(p, span, n, end, after);
    }
    if constexpr (width >= 16) compute_lanes<lane_rows, 16>(p, span, n, end, after);
}

// Few rows with a transposed weight.

constexpr int64_t strips_columns = 8 * width;  // of a piece
constexpr int64_t steps_ahead = 1024;          // rows of the transposed weight that are on their way

// Vectors of the result that fit the registers.
constexpr int strip_of(int rows) {
    if (width == 16) return rows > 2 ? 4 : 8;
    return rows > 3 ? 2 : rows > 1 ? 4 : 8;
}

// The word of `width` columns in a row of the transposed weight and, where words are pairs, in the next one if there is
// one.
template <class T>
METATE_FN vf zip_rows(const T* row, int64_t, bool, int64_t n, const float*) {
    return load_any(row, 1, n);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf zip_rows(const bf16* row, int64_t stride, bool has_next, int64_t n, const Pair*) {
    return as_float(zip_any(row, has_next ? row + stride : nullptr, 1, n));
}
#endif

// What `left` rows of the transposed weight add to `count` columns of totals (row, column), strips_columns apart.
template <bool whole, int rows, class T, class Word>
void add_strip(const Word* x, int64_t pitch, const T* w, int64_t stride, int64_t left, int64_t count, float* totals) {
    constexpr int strip = strip_of(rows), at_once = elements_of<Word>;
    vf sum[rows][strip];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) sum[r][v] = splat(0.0f);
    }
    for (; left > 0; left -= at_once, w += at_once * stride, ++x) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) {
            if (v * width * static_cast<int>(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 2
                for (int i = 0; i < at_once; ++i) __builtin_prefetch(w + (steps_ahead + i) * stride + v * width, 0, 2);
            }
            const int64_t n = whole ? width : clamp(count - v * width, 0, width);
            const vf value = zip_rows(w + v * width, stride, left > 1, n, x);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sum[r][v] = add_product(sum[r][v], spread(x + r * pitch), value);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < strip; ++v) {
            float* const total = totals + r * strips_columns + v * width;
            store(total, load(total) + sum[r][v]);
        }
    }
}

template <int rows, class T, class Word>
void compute_strips(const Problem<T, Word>& p, const Span& span, int64_t n) {
    if constexpr (rows > 1) {
        if (span.rows < rows) return compute_strips<rows - 1>(p, span, n);
    }
    const int64_t stride = p.call.w.stride[2], columns = p.columns(), chain = p.chain();
    const int64_t count = smaller(strips_columns, p.call.out.size[1] - n);
    const Word* x = p.words_of(span);
    constexpr int64_t at_once = strip_of(rows) * width;
    float totals[rows * strips_columns] = {};
    for (int64_t k = 0; k < columns; k += chain, x += chain / elements_of<Word>) {
        const int64_t left = smaller(chain, columns - k);
        for (int64_t c = 0; c < count; c += at_once) {
            const T* const w = p.weight(span.expert, n + c, k);
            count - c >= at_once ? add_strip<true, rows>(x, p.pitch, w, stride, left, count - c, totals + c)
                                 : add_strip<false, rows>(x, p.pitch, w, stride, left, count - c, totals + c);
        }
    }
    for (int64_t c = 0; c < count; c += width) {
        const vf bias = bias_at<T>(p.call, span.expert, n + c, count - c);
        for (int r = 0; r < rows; ++r)
            write<T>(p.call, span.first + r, n + c, load(totals + r * strips_columns + c) + bias, count - c);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
