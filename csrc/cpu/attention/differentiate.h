// P and dS of a tile of the backward pass, from its two products over the head dimensions.
//
// Where every row of a group sees every key of a chunk, these products stay in registers until they are p and ds: what
// is stored beside products takes their time. Elsewhere they pass through memory and what stands between them and p.
#pragma once

#include "backward_tile.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int vectors_of_chunk = chunk / width;

// 2^x for x < 128; of what becomes bfloat16 within 2^-13, 2^0 being 1.
template <class Word, int n>
METATE_FN void exp2_of(vf (&x)[n]) {
    if constexpr (elements_of<Word> == 1) return exp2(x);
    constexpr float coefficients[] = {0x1.f00c4ep-3f, 0x1.62f5fap-1f, 1.0f};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const vf rest = rest_of_round(x[i]);
        vf p = splat(0x1.c2a25cp-5f);
#pragma GCC unroll 3
        for (const float c : coefficients) p = fma(p, rest, splat(c));
        x[i] = scale_by_power(p, x[i] - rest, mask_of(0xffff));
    }
}

// log2 of the probabilities of a row from its products, or logits.
METATE_FN vf powers_of(vf x, const Softmax& of, float exponent) {
    return fma(x - splat(of.reference), splat(exponent), splat(of.rest));
}

// Rows of a chunk where logits are scaled products: p, ds = p (dp - delta), 0 where the row's word says so (no words:
// nowhere).
template <class Word, bool is_whole, int rows>
METATE_FN void differentiate_rows(float exponent, const Softmax* of, const float* delta, const uint32_t* words,
                                  int64_t line, const float* s, const float* dp, vf (&p)[rows * vectors_of_chunk],
                                  vf (&ds)[rows * vectors_of_chunk]) {
    constexpr int n = vectors_of_chunk;
#pragma GCC unroll 8
    for (int i = 0; i < rows * n; ++i) {
        p[i] = powers_of(load(s + i / n * line + i % n * width), of[i / n], exponent);
    }
    exp2_of<Word>(p);
#pragma GCC unroll 8
    for (int i = 0; i < rows * n; ++i) {
        ds[i] = p[i] * (load(dp + i / n * line + i % n * width) - splat(delta[i / n]));
        if constexpr (!is_whole) {
            p[i] = keep(words[i / n], i % n, p[i], splat(0.0f));
            ds[i] = keep(words[i / n], i % n, ds[i], splat(0.0f));
        }
    }
}

// tile_rows rows from `first` on of the chunk at key j.
template <bool is_whole>
__attribute__((noinline)) void differentiate_plain(float exponent, int64_t first, int64_t j, const uint32_t* words,
                                                   int64_t line, Workspace<float>& w) {
    float *p = w.p + first * line + j, *ds = w.ds + first * line + j;
    for (int r = 0; r < tile_rows; ++r, p += line, ds += line) {
        vf x[vectors_of_chunk], y[vectors_of_chunk];
        differentiate_rows<float, is_whole, 1>(exponent, w.softmax + first + r, w.delta + first + r, words + r, line, p,
                                               ds, x, y);
#pragma GCC unroll 8
        for (int v = 0; v < vectors_of_chunk; ++v) {
            store(p + v * width, x[v]);
            store(ds + v * width, y[v]);
        }
    }
}

#if defined(METATE_HAS_BF16_DOT)
// Pairs of p and ds in two rows of a chunk: along the queries for dk and dv, along the keys for dq.
METATE_FN void narrow_rows(const vf (&p)[4], const vf (&ds)[4], int64_t row, int64_t j, int64_t line,
                           const Workspace<Pair>& w) {
    const int64_t column = row / 2 * line + j;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        store_words(w.p_columns + column + i * width, as_float(narrow_zip(p[i], p[2 + i])));
        store_words(w.ds_columns + column + i * width, as_float(narrow_zip(ds[i], ds[2 + i])));
        store_words(w.ds_rows + ((row + i) * line + j) / 2, as_float(narrow_pairs(ds[2 * i], ds[2 * i + 1])));
    }
}

template <bool is_whole>
__attribute__((noinline)) void differentiate_plain(float exponent, int64_t first, int64_t j, const uint32_t* words,
                                                   int64_t line, Workspace<Pair>& w) {
    for (int r = 0; r < tile_rows; r += 2) {
        const int64_t row = first + r, at = row * line + j;
        vf p[4], ds[4];
        differentiate_rows<Pair, is_whole, 2>(exponent, w.softmax + row, w.delta + row, words + r, line, w.p + at,
                                              w.ds + at, p, ds);
        narrow_rows(p, ds, row, j, line, w);
    }
}
#endif

// A row with a single key, which the chunk holds: its p is 1 if it is so but for rounding. Sums of 16-bit
// gradients are then often exact, and the last bit of their rounding would show it.
template <class Word>
METATE_FN void settle(const Attention& a, float exponent, int64_t r, int64_t line, Workspace<Word>& w) {
    const Row& row = w.row[r];
    if (w.whole || row.end - row.begin != 1 || a.q.dtype == DType::f32) return;
    float& x = w.p[r * line + row.begin - w.key];
    Softmax& of = w.softmax[r];
    const float power = fmaf(x - of.reference, exponent, of.rest);
    if (fabsf(power) < 0x1p-20f * (24 + fabsf(of.reference * exponent))) x = of.reference = of.rest = 0.0f;
}

// The same with everything between product and probability; dropout scales dp and the p that multiplies dout.
template <class Word>
inline void differentiate(const Attention& a, const Scoring& scoring, const Sequence& s, int64_t r, int64_t c,
                          uint32_t word, int64_t line, Workspace<Word>& w) {
    float* const p = w.p + r * line;
    float* const ds = w.ds + r * line;
    if (!scoring.plain) {
        to_logits(a, scoring, s, w.row[r], w.key, 1u << c, p, w.derivative ? w.derivative + r * line : nullptr);
    }
    settle(a, scoring.exponent, r, line, w);
    const vf dropout_scale = splat(static_cast<float>(a.dropout_scale)), zero = splat(0.0f);
    for (int v = 0; v < chunk / width; ++v) {
        const int64_t j = c * chunk + v * width;
        const vf x = keep(word, v, exp2(powers_of(load(p + j), w.softmax[r], scoring.exponent)), zero);
        vf shown = x, y = load(ds + j);
        if (a.dropout_threshold) {
            const vm kept = mask_of(w.kept[r][c] >> v * width);
            shown = select(kept, x * dropout_scale, zero);
            y = select(kept, y * dropout_scale, zero);
        }
        store(p + j, shown);
        store(ds + j, keep(word, v, x * (y - splat(w.delta[r])), zero));
    }
}

// One row of a chunk that begins at element `at` of the tile: nothing there.
template <class Word>
METATE_FN void clear_row(int64_t at, Workspace<Word>& w) {
    for (int j = 0; j < chunk; j += width) {
        store(w.p + at + j, splat(0.0f));
        store(w.ds + at + j, splat(0.0f));
    }
}

// tile_rows rows of which none sees a key of the chunk at j.
template <class Word>
METATE_FN void clear_group(int64_t first, int64_t j, int64_t line, Workspace<Word>& w) {
    for (int64_t r = first; r < first + tile_rows; ++r) clear_row(r * line + j, w);
#if defined(METATE_HAS_BF16_DOT)
    if constexpr (elements_of<Word> == 2) {
        const vf zeros[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        for (int64_t r = first; w.plain && r < first + tile_rows; r += 2) narrow_rows(zeros, zeros, r, j, line, w);
    }
#endif
}

template <class Word>
METATE_FN bool sees_all(int64_t g, int64_t c, const Workspace<Word>& w) {
    return w.whole || w.group[g].mask.all >> c & 1;
}
// Whether a chunk has all its keys, and a group all its rows, each of which sees them.
template <class Word>
METATE_FN bool is_full(int64_t g, int64_t c, const Workspace<Word>& w) {
    return sees_all(g, c, w) && (g + 1) * tile_rows <= w.queries && (c + 1) * chunk <= w.keys;
}

template <class Word>
inline void differentiate_group(const Attention& a, const Scoring& scoring, const Sequence& s, int64_t g, int64_t c,
                                int64_t line, Workspace<Word>& w) {
    const bool is_whole = sees_all(g, c, w);
    const int64_t first = g * tile_rows, at = first * line + c * chunk;
    if constexpr (width < 16) {
        if (w.plain && is_full(g, c, w))
            return differentiate_plain<true>(scoring.exponent, first, c * chunk, nullptr, line, w);
    }
    uint32_t words[tile_rows];
    for (int64_t i = 0; i < tile_rows; ++i) {
        words[i] = first + i >= w.queries ? 0
                 : is_whole               ? range_word(0, w.keys, c * chunk)
                                          : w.group[g].mask.words[i][c];
    }
    if (w.plain) {
        for (int64_t i = 0; i < tile_rows; ++i) {
            if (words[i]) settle(a, scoring.exponent, first + i, line, w);
        }
        return differentiate_plain<false>(scoring.exponent, first, c * chunk, words, line, w);
    }
    for (int64_t i = 0; i < tile_rows; ++i) {
        if (words[i]) {
            differentiate(a, scoring, s, first + i, c, words[i], line, w);
        } else {
            clear_row(at + i * line, w);
        }
    }
}

template <class Word>
__attribute__((noinline)) void multiply_in_short_chains(int rows, int64_t columns, const Product<Word>& whole) {
    for (int64_t k = 0; k == 0 || k < whole.steps; k += shortest_chain) {
        Product<Word> p = whole;
        p.a += k / panel * whole.stride + k % panel;
        p.b += k * panel;
        p.steps = smaller(whole.steps - k, shortest_chain);
        k == 0 ? multiply_steps<Left::panels, Into::set>(rows, columns, p)
               : multiply_steps<Left::panels, Into::add>(rows, columns, p);
    }
}

// The products of group g of the tile with the packed keys (or values) j … end-1 of the block. Floats serve as left
// operand in panels too; pairs lie along the queries there, and along the head dimension in rows.
template <class Word>
METATE_FN void multiply_across(const Workspace<Word>& w, const Blocking& size, int64_t n, int64_t depth,
                               const Word* rows, const Word* panels, const Word* across, int64_t g, int64_t j,
                               int64_t end, bool are_few, float* to) {
    const int64_t steps = steps_of<Word>(n), first = g * tile_rows, row = depth / elements_of<Word>;
    const int live = rows_of_group(w, g);
    Product<Word> product{rows + first * row, row,    across + j * steps, steps, to + first * size.line + j,
                          size.line,          nullptr};
    if constexpr (elements_of<Word> == 1) {
        product.a = panels + first * panel;
        product.stride = w.groups * tile_rows * panel;
        are_few ? multiply_in_short_chains(live, end - j, product)
                : multiply<Left::panels, Into::set, short_chain>(live, end - j, product);
    } else {
        multiply<Left::rows, Into::set, max_head_dim>(live, end - j, product);
    }
}

constexpr int half_group = tile_rows / 2;

// sum += a · b, where a(r, k) lies at r · stride + k.
template <class Word>
METATE_FN void add_steps(const Word* a, int64_t stride, const Word* b, int64_t steps, vf (&sum)[half_group][2]) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k, ++a, b += panel) {
#pragma GCC unroll 6
        for (int r = 0; r < half_group; ++r) {
            const auto x = spread(a + r * stride);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) sum[r][v] = add_product(sum[r][v], x, b + v * width);
        }
    }
}

// sum = a · b: of pairs in rows `stride` apart, and of floats in panels as Left::panels says, in short chains.
template <class Word>
METATE_FN void multiply_half(const Word* a, int64_t stride, const Word* b, int64_t steps, vf (&sum)[half_group][2]) {
    constexpr bool in_panels = elements_of<Word> == 1;
    for (auto& row : sum) row[0] = row[1] = splat(0.0f);
    if constexpr (!in_panels) return add_steps(a, stride, b, steps, sum);
    add_steps(a, panel, b, smaller(steps, panel), sum);
    for (int64_t k = panel; k < steps; k += panel) {
        a += stride, b += panel * panel;
        vf more[half_group][2];
        for (auto& row : more) row[0] = row[1] = splat(0.0f);
        add_steps(a, panel, b, smaller(steps - k, panel), more);
        for (int r = 0; r < half_group; ++r) sum[r][0] = sum[r][0] + more[r][0], sum[r][1] = sum[r][1] + more[r][1];
    }
}

METATE_FN void store_half(const vf (&p)[half_group][2], const vf (&ds)[half_group][2], int64_t row, int64_t j,
                          int64_t line, const Workspace<float>& w) {
#pragma GCC unroll 6
    for (int r = 0; r < half_group; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            store(w.p + (row + r) * line + j + v * width, p[r][v]);
            store(w.ds + (row + r) * line + j + v * width, ds[r][v]);
        }
    }
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN void store_half(const vf (&p)[half_group][2], const vf (&ds)[half_group][2], int64_t row, int64_t j,
                          int64_t line, const Workspace<Pair>& w) {
#pragma GCC unroll 3
    for (int r = 0; r < half_group; r += 2) {
        narrow_rows({p[r][0], p[r][1], p[r + 1][0], p[r + 1][1]}, {ds[r][0], ds[r][1], ds[r + 1][0], ds[r + 1][1]},
                    row + r, j, line, w);
    }
}
#endif

// p and ds of group g, all rows of which see all keys of the chunk at j.
template <class Word>
__attribute__((noinline)) void differentiate_whole(const Attention& a, float exponent, const Blocking& size, int64_t g,
                                                   int64_t j, const Workspace<Word>& w) {
    constexpr bool in_panels = elements_of<Word> == 1;
    const int64_t steps = steps_of<Word>(a.q.size[3]), value_steps = steps_of<Word>(a.v.size[3]);
    const auto multiply_rows = [&](const Word* rows, const Word* panels, int64_t depth, const Word* across, int64_t row,
                                   int64_t n, vf(&sum)[half_group][2]) {
        const int64_t words = depth / elements_of<Word>;
        multiply_half(in_panels ? panels + row * panel : rows + row * words,
                      in_panels ? w.groups * tile_rows * panel : words, across + j * n, n, sum);
    };
    for (int64_t row = g * tile_rows; row < (g + 1) * tile_rows; row += half_group) {
        vf p[half_group][2], ds[half_group][2];
        multiply_rows(w.query_rows, w.query_panels, size.depth, w.keys_across, row, steps, p);
#pragma GCC unroll 3
        for (int r = 0; r < half_group; r += 2) {
            vf x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) x[i] = powers_of(p[r + i / 2][i % 2], w.softmax[row + r + i / 2], exponent);
            exp2_of<Word>(x);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) p[r + i / 2][i % 2] = x[i];
        }
        multiply_rows(w.gradient_rows, w.gradient_panels, size.value_depth, w.values_across, row, value_steps, ds);
#pragma GCC unroll 6
        for (int r = 0; r < half_group; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) ds[r][v] = p[r][v] * (ds[r][v] - splat(w.delta[row + r]));
        }
        store_half(p, ds, row, j, size.line, w);
    }
}

// p and ds of the tile.
template <class Word>
inline void differentiate_tile(const Attention& a, const Scoring& scoring, const Sequence& s, const Blocking& size,
                               Workspace<Word>& w) {
    const bool are_few = elements_of<Word> == 1 && s.has_few_scores();
    for (int64_t c = 0; c * chunk < w.keys; ++c) {
        for (int64_t g = 0; g < w.groups; ++g) {
            if (!w.whole && !(w.group[g].mask.any >> c & 1)) {
                clear_group(g * tile_rows, c * chunk, size.line, w);
                continue;
            }
            if constexpr (width == 16) {
                if (w.plain && is_full(g, c, w) && !are_few) {
                    differentiate_whole(a, scoring.exponent, size, g, c * chunk, w);
                    continue;
                }
            }
            const int64_t last = w.whole ? w.keys : w.group[g].end,
                          end = last < (c + 1) * chunk ? last : (c + 1) * chunk;
            for (int64_t j = c * chunk; j < end; j += panel) {
                multiply_across(w, size, a.q.size[3], size.depth, w.query_rows, w.query_panels, w.keys_across, g, j,
                                end, are_few, w.p);
                multiply_across(w, size, a.v.size[3], size.value_depth, w.gradient_rows, w.gradient_panels,
                                w.values_across, g, j, end, are_few, w.ds);
            }
            differentiate_group(a, scoring, s, g, c, size.line, w);
        }
    }
}

// ds becomes the gradient of scale · q·k.
template <class Word>
inline void apply_softcap(const Blocking& size, Workspace<Word>& w) {
    for (int64_t r = 0; r < w.queries; ++r) {
        for (int64_t j = 0; j < w.keys; j += width) {
            float* const at = w.ds + r * size.line + j;
            const vf y = load(at), z = y * load(w.derivative + r * size.line + j);
            store(at, select(equal(y, splat(0.0f)), y, z));  // where nothing was seen the derivative is not set
        }
    }
}

#if defined(METATE_HAS_BF16_DOT)
// p and ds of the tile as pairs.
inline void narrow_tile(const Blocking& size, Workspace<Pair>& w) {
    for (int64_t r = 0; r < w.groups * tile_rows; r += 2) {
        for (int64_t j = 0; j < w.keys; j += chunk) {
            vf p[4], ds[4];
            for (int i = 0; i < 4; ++i) {
                const int64_t at = (r + i / 2) * size.line + j + i % 2 * width;
                p[i] = load(w.p + at), ds[i] = load(w.ds + at);
            }
            narrow_rows(p, ds, r, j, size.line, w);
        }
    }
}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
