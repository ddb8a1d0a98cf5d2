// A product of the rows of experts as its kernels see it: runs of rows, copied as words, and where results go.
#pragma once

#include "../attention/gemm.h"
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t depth = long_chain;  // words of a packed panel, which stays in the first-level cache
constexpr int64_t few_words = 256;  // of a row: so few that each rounding counts, and what short chains cost does not
constexpr int64_t rows_at_once = 3 * panel;
static_assert(rows_at_once % tile_rows == 0);
constexpr int few = width == 16 ? 12 : 4;  // rows whose sums fit the registers beside a square of the weight
constexpr int strip_rows = 4;              // and beside strips of a transposed one
constexpr int64_t few_bytes = 1 << 20;     // of the weight in a piece of few rows
constexpr int lane_rows = 2;               // rows whose chains stand side by side in lanes

// What a lane holds while rows of the weight are transposed: a number, or two bfloat16 side by side.
template <class T>
constexpr int per_lane = __is_same(T, bf16) ? 2 : 1;

// A run of rows of one expert.
struct Span {
    int64_t expert, first, rows;
    int64_t place;  // among the rows of x as words
};

// How the chains of a row of the weight stand in lanes, in `parts` one after another: `used` of them in `spread` lanes.
// None where a chain is shorter, or half of the lanes would be idle.
struct Lanes {
    int64_t chains = 0, parts = 0, used = 0, spread = 0;

    Lanes(int64_t columns, int64_t chain) {
        if (chain < depth || columns % chain != 0 || columns < 3 * chain) return;
        chains = columns / chain;
        parts = ceil_div(chains, width);
        used = ceil_div(chains, parts);
        for (spread = 4; spread < used;) spread *= 2;
    }
};

template <class T, class Word>
struct Problem {
    const GroupedLinear& call;
    Rows rows;
    Lanes lanes;
    Word* x;          // of all spans, `pitch` words a row
    int64_t* pieces;  // before each span
    int64_t pitch;

    explicit Problem(const GroupedLinear& c)
        : call(c),
          rows{c.x, c.order, c.k},
          lanes(columns(), chain()),
          x(nullptr),
          pieces(nullptr),
          // not a power of two: rows would share lines of the cache
          pitch(round_up(larger(words(), lanes.parts * chain_words() * lanes.spread), width) + width) {}
    int64_t columns() const { return call.x.size[1]; }
    Word* words_of(const Span& span) const { return x + span.place * pitch; }
    bool lies_in_rows() const { return call.w.stride[2] == 1; }
    bool takes_few(const Span& span) const { return lies_in_rows() && span.rows <= few; }
    // Not where words are widened elements: whole lines of the cache would be two squares each.
    bool takes_lanes(const Span& span) const {
        return per_lane<T> == elements_of<Word> && takes_few(span) && span.rows <= lane_rows && lanes.chains > 0;
    }
    bool takes_tiles(const Span& span) const { return lies_in_rows() && span.rows > few; }
    // The first row of a panel. Panels of many rows are whole, or where rows are fewer half a vector shorter: those of
    // one vector, of which there is one where nothing else fits, wait for their loads.
    int64_t first_of(const Span& span, int64_t number) const {
        const int64_t panels = ceil_div(span.rows, panel);
        if (half == 0 || !takes_tiles(span)) return smaller(number * panel, span.rows);
        const int64_t shorter = (panels * panel - span.rows) / larger(half, 1);
        return smaller(number * panel - larger(number - larger(panels - shorter, 0), 0) * half, span.rows);
    }
    bool takes_strips(const Span& span) const {
        return !lies_in_rows() && call.w.stride[1] == 1 && span.rows <= strip_rows;
    }
    int64_t words() const { return steps_of<Word>(columns()); }
    int64_t chain_words() const { return words() <= few_words ? short_chain : depth; }
    int64_t chain() const { return chain_words() * elements_of<Word>; }  // columns
    const T* weight(int64_t expert, int64_t n, int64_t k) const {
        const View<3>& w = call.w;
        return static_cast<const T*>(w.data) + expert * w.stride[0] + n * w.stride[1] + k * w.stride[2];
    }
};

// visit(span) for the rows of every expert that has any.
template <class T, class Word, class Visit>
void for_spans(const Problem<T, Word>& p, const Visit& visit) {
    Span span{0, 0, 0, 0};
    for (; span.expert + 1 < p.call.offsets.size[0]; ++span.expert) {
        const int64_t begin = index_at(p.call.offsets, span.expert), end = index_at(p.call.offsets, span.expert + 1);
        // Even parts: a short one would cost as much of the weight as a whole one.
        const int64_t parts = ceil_div(end - begin, rows_at_once);
        const int64_t most = parts > 1 ? round_up(ceil_div(end - begin, parts), width / 2) : rows_at_once;
        for (span.first = begin; span.first < end; span.first += most) {
            span.rows = smaller(most, end - span.first);
            visit(span);
            span.place += p.takes_tiles(span) ? round_up(span.rows, panel) : span.rows;
        }
    }
}

template <class T, class Word>
void copy_row(const Problem<T, Word>& p, int64_t row, Word* to) {
    const T* const from = p.rows.template at<T>(row);
    const int64_t stride = p.call.x.stride[1];
    constexpr int64_t at_once = max_head_dim / elements_of<Word>;
    for (int64_t at = 0; at < p.pitch; at += at_once) {
        const int64_t k = at * elements_of<Word>, n = from ? clamp(p.columns() - k, 0, max_head_dim) : 0;
        pack_row(to + at, smaller(at_once, p.pitch - at), n > 0 ? from + k * stride : nullptr, stride, n);
    }
}

// The same for lanes: word i of a chain beside those of the other chains of its part.
template <class T, class Word>
void copy_chains(const Problem<T, Word>& p, int64_t row, Word* to) {
    const T* const from = p.rows.template at<T>(row);
    const int64_t stride = p.call.x.stride[1], words = p.chain_words(), spread = p.lanes.spread;
    Word line[long_chain];
    for (int64_t part = 0, chain = 0; part < p.lanes.parts; ++part, to += words * spread)
        for (int64_t lane = 0; lane < spread; ++lane) {
            const bool some = from && lane < p.lanes.used && chain < p.lanes.chains;
            pack_row(line, words, some ? from + chain++ * p.chain() * stride : nullptr, stride, some ? p.chain() : 0);
            for (int64_t i = 0; i < words; ++i) to[i * spread + lane] = line[i];
        }
}

// `n` rows side by side as half a panel: word (k, row) at k · panel + row; zeros stand for rows that there are not.
template <class T, class Word>
void copy_columns(const Problem<T, Word>& p, int64_t row, int64_t n, Word* to) {
    constexpr int64_t unit = width * elements_of<Word>;
    const int64_t stride = p.call.x.stride[1];
    const T* from[width];
    for (int i = 0; i < width; ++i) from[i] = i < n ? p.rows.template at<T>(row + i) : nullptr;
    for (int64_t k = 0; k < p.columns(); k += unit, to += width * panel) {
        const int64_t left = smaller(unit, p.columns() - k);
        vf square[width];
        for (int i = 0; i < width; ++i) {
            T line[unit];
            square[i] =
                from[i] ? load_words(contiguous(from[i] + k * stride, stride, left, line), left, to) : splat(0.0f);
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store_words(to + i * panel, square[i]);
    }
}

// Panel number `number` of the rows of a span, or as many of its rows.
template <class T, class Word>
void copy_rows(const Problem<T, Word>& p, const Span& span, int64_t number) {
    const int64_t first = p.first_of(span, number), end = p.first_of(span, number + 1);
    Word* const to = p.words_of(span) + number * panel * p.pitch;
    if (p.takes_tiles(span)) {
        for (int64_t c = 0; c < end - first; c += width)
            copy_columns(p, span.first + first + c, end - first - c, to + c);
        return;
    }
    const auto copy = p.takes_lanes(span) ? copy_chains<T, Word> : copy_row<T, Word>;
    for (int64_t r = first; r < end; ++r) copy(p, span.first + r, p.words_of(span) + r * p.pitch);
}

// The bias of n columns and zeros behind.
template <class T>
METATE_FN vf bias_at(const GroupedLinear& call, int64_t expert, int64_t column, int64_t n) {
    if (!call.bias) return splat(0.0f);
    const int64_t at = expert * call.bias.stride[0] + column * call.bias.stride[1];
    if (call.bias.dtype == DType::f32)
        return load_any(static_cast<const float*>(call.bias.data) + at, call.bias.stride[1], n);
    return load_any(static_cast<const T*>(call.bias.data) + at, call.bias.stride[1], n);
}

template <class T>
METATE_FN void write(const GroupedLinear& call, int64_t row, int64_t column, vf x, int64_t n) {
    T* const out = static_cast<T*>(call.out.data) + row * call.out.stride[0] + column * call.out.stride[1];
    store_any(out, call.out.stride[1], x, n);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
