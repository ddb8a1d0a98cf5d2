// One tile of the backward pass: a few dozen queries of one head against one block of keys.
//
// P is recomputed from the logits and lse; the five products of the tile run on the packed operands of gemm.h. Parts of
// the tile that no query sees are neither computed nor read: products end where the windows of their rows end.
#pragma once

#include "../parallel.h"
#include "score.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int max_tile_queries = 96;
constexpr int max_groups = max_tile_queries / tile_rows;
static_assert(max_tile_queries % tile_rows == 0 && tile_rows % 2 == 0);

struct Blocking {
    int64_t queries, keys;       // of a tile; keys is a multiple of 64, as score.h wants it
    int64_t depth, value_depth;  // head dimensions, rounded up to whole panels
    int64_t line;  // floats from row to row of a tile; an odd number of cache lines, or rows collide in L1
};

inline Blocking blocking_of(const Attention& a) {
    const int64_t d = a.q.size[3], dv = a.v.size[3], widest = d > dv ? d : dv;
    const int64_t keys = widest > 256 ? 64 : 128;
    return {widest > 128 ? max_tile_queries / 2 : max_tile_queries, keys, round_up(d, panel), round_up(dv, panel),
            keys + 16};
}

// tile_rows rows of a tile, and what they see of the block.
struct Group {
    TileMask mask;
    int64_t begin, end;  // keys within the block; none outside is seen
};

// What all blocks of keys share of a head, by (query head of the group, query rounded up to whole tile_rows).
template <class Word>
struct Rows {
    float* dq;     // (rows, depth)
    Word* packed;  // tile after tile: q and dout as operands, depth + value_depth words a row
};

template <class Word>
inline Rows<Word> take_rows(Arena& arena, const Blocking& size, int64_t rows) {
    return {arena.take<float>(rows * size.depth), arena.take<Word>(rows * (size.depth + size.value_depth))};
}

// What a worker needs for a block of keys and for a tile.
template <class Word>
struct Workspace {
    Word *key_panels, *keys_across, *values_across;                     // of the block of keys
    Word *query_rows, *query_panels, *gradient_rows, *gradient_panels;  // of the tile: q and dout, in Rows::packed
    float *dk, *dv;                                                     // (keys, depth), unscaled
    float *p, *ds;  // (queries, line): q·k and dout·v, in the end P∘Z and the gradient of scale · q·k
    Word *p_columns, *ds_columns, *ds_rows;  // p and ds as left operands
    float* derivative;                       // (queries, line) of the softcap
    Rows<Word> own;                          // where the head is this worker's alone
    Row row[max_tile_queries];
    Group group[max_groups];
    uint32_t kept[max_tile_queries][max_chunks];  // by dropout
    float lse[max_tile_queries], delta[max_tile_queries];
    bool finite_keys, finite_queries, finite_gradients;
    // The tile: queries first … first + queries - 1 of the sequence and keys key … key + keys - 1.
    int64_t first, queries, groups, key, keys;
    bool whole;  // every query sees every key and these are several, so that the masks are not set
    bool plain;  // logits are scaled products and nothing is dropped: pairs come without p and ds
};

template <class Word>
inline void lay_out(Arena& arena, const Blocking& size, bool has_softcap, int64_t own_rows, Workspace<Word>& w) {
    const int64_t wide = elements_of<Word>;
    w.key_panels = arena.take<Word>(size.keys / wide * size.depth);
    w.keys_across = arena.take<Word>(round_up(size.depth / wide, width) * size.keys);
    w.values_across = arena.take<Word>(round_up(size.value_depth / wide, width) * size.keys);
    // Products may run on up to tile_rows rows more.
    w.dk = arena.take<float>((size.keys + tile_rows) * size.depth);
    w.dv = arena.take<float>((size.keys + tile_rows) * size.value_depth);
    w.p = arena.take<float>(size.queries * size.line);
    w.ds = arena.take<float>(size.queries * size.line);
    if constexpr (elements_of<Word> == 1) {
        w.p_columns = w.p;
        w.ds_columns = w.ds_rows = w.ds;
    } else {
        w.p_columns = arena.take<Word>(size.queries / 2 * size.line);
        w.ds_columns = arena.take<Word>(size.queries / 2 * size.line);
        w.ds_rows = arena.take<Word>(size.queries * size.line / 2);
    }
    w.derivative = has_softcap ? arena.take<float>(size.queries * size.line) : nullptr;
    w.own = take_rows<Word>(arena, size, own_rows);
}

// Masks.

// The rows of the tile and what each sees. Returns whether any of them sees a key of the block.
template <class Word>
inline bool see(const AttentionBackward& args, const Scoring& scoring, const Sequence& s, int64_t head,
                Workspace<Word>& w) {
    const Attention& a = args.problem;
    bool has_dead_row = false;
    for (int64_t r = 0; r < w.queries; ++r) {
        const float lse = *value_at<float>(args.lse, s.batch, head, s.q0 + w.first + r);
        has_dead_row |= lse == -__builtin_inff();
        w.lse[r] = lse;
        w.delta[r] = *value_at<float>(args.delta, s.batch, head, s.q0 + w.first + r);
    }
    w.plain = scoring.plain && !a.dropout_threshold;
    int64_t begin, end, last_begin, last_end;
    window_of(a, s, w.first, begin, end);
    window_of(a, s, w.first + w.queries - 1, last_begin, last_end);
    w.whole = !has_dead_row && !a.intervals && !a.bits && !a.blocks && last_begin <= w.key && end >= w.key + w.keys &&
              w.keys > 1;  // see settle
    if (w.whole && scoring.plain) return true;
    for (int64_t r = 0; r < w.groups * tile_rows; ++r) {
        w.row[r] = r < w.queries ? row_of(a, s, w.first + r, head) : Row{};
        if (r < w.queries && w.lse[r] == -__builtin_inff()) w.row[r].begin = w.row[r].end = 0;
    }
    if (w.whole) return true;
    uint32_t any = 0;
    const int chunks = static_cast<int>(ceil_div(w.keys, chunk));
    for (int64_t g = 0; g < w.groups; ++g) {
        Group& group = w.group[g];
        const Row* const row = w.row + g * tile_rows;
        mask_tile(a, row, tile_rows, w.key, chunks, group.mask);
        any |= group.mask.any;
        group.begin = w.keys, group.end = 0;
        for (int r = 0; r < tile_rows; ++r) {
            const int64_t low = clamp(row[r].begin - w.key, 0, w.keys), high = clamp(row[r].end - w.key, 0, w.keys);
            if (low >= high) continue;
            if (low < group.begin) group.begin = low;
            if (high > group.end) group.end = high;
        }
    }
    return any != 0;
}

template <class Word>
inline void draw_dropout(const Attention& a, const Sequence& s, int64_t head, Workspace<Word>& w) {
    for (int64_t r = 0; r < w.queries; ++r) {
        for (int64_t c = 0; c * chunk < w.keys; c += 2) {
            const uint64_t kept = kept_keys(a, s.number, w.first + r, head, (w.key + c * chunk) / 64);
            w.kept[r][c] = static_cast<uint32_t>(kept);
            w.kept[r][c + 1] = static_cast<uint32_t>(kept >> 32);
        }
    }
}

// From products to P and dS.

constexpr int vectors_of_chunk = chunk / width;

// Rows of a chunk where logits are scaled products: p = exp(s - lse), ds = p (dp - delta), 0 where the row's word says
// so (no words: nowhere).
template <bool is_whole, int rows>
METATE_FN void differentiate_rows(float scale, const float* lse, const float* delta, const uint32_t* words,
                                  int64_t line, const float* s, const float* dp, vf (&p)[rows * vectors_of_chunk],
                                  vf (&ds)[rows * vectors_of_chunk]) {
    constexpr int n = vectors_of_chunk;
#pragma GCC unroll 8
    for (int i = 0; i < rows * n; ++i) {
        const vf products = load(s + i / n * line + i % n * width);
        p[i] = fma(products, splat(scale), splat(-lse[i / n])) * splat(log2_e);
    }
    exp2(p);
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
__attribute__((noinline)) void differentiate_plain(float scale, int64_t first, int64_t j, const uint32_t* words,
                                                   int64_t line, Workspace<float>& w) {
    float *p = w.p + first * line + j, *ds = w.ds + first * line + j;
    for (int r = 0; r < tile_rows; ++r, p += line, ds += line) {
        vf x[vectors_of_chunk], y[vectors_of_chunk];
        differentiate_rows<is_whole, 1>(scale, w.lse + first + r, w.delta + first + r, words + r, line, p, ds, x, y);
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
__attribute__((noinline)) void differentiate_plain(float scale, int64_t first, int64_t j, const uint32_t* words,
                                                   int64_t line, Workspace<Pair>& w) {
    for (int r = 0; r < tile_rows; r += 2) {
        const int64_t row = first + r, at = row * line + j;
        vf p[4], ds[4];
        differentiate_rows<is_whole, 2>(scale, w.lse + row, w.delta + row, words + r, line, w.p + at, w.ds + at, p, ds);
        narrow_rows(p, ds, row, j, line, w);
    }
}
#endif

// A row with a single key, which the chunk holds: its p is 1 where lse is the logit but for rounding. Sums of 16-bit
// gradients are then often exact, and the last bit of their rounding would show it.
template <class Word>
METATE_FN void settle(const Attention& a, float scale, int64_t r, int64_t line, Workspace<Word>& w) {
    const Row& row = w.row[r];
    if (w.whole || row.end - row.begin != 1 || a.q.dtype == DType::f32) return;
    float &logit = w.p[r * line + row.begin - w.key], &lse = w.lse[r];
    if (__builtin_fabsf(logit * scale - lse) < 0x1p-20f * (16 + __builtin_fabsf(lse))) logit = lse = 0.0f;
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
    const float scale = scoring.plain ? scoring.scale : 1.0f;
    settle(a, scale, r, line, w);
    const vf dropout_scale = splat(static_cast<float>(a.dropout_scale)), zero = splat(0.0f);
    for (int v = 0; v < chunk / width; ++v) {
        const int64_t j = c * chunk + v * width;
        const vf x = keep(word, v, probability(fma(load(p + j), splat(scale), splat(-w.lse[r]))), zero);
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
inline void differentiate_group(const Attention& a, const Scoring& scoring, const Sequence& s, int64_t g, int64_t c,
                                int64_t line, Workspace<Word>& w) {
    const bool is_whole = w.whole || w.group[g].mask.all >> c & 1;
    const int64_t first = g * tile_rows, at = first * line + c * chunk;
    if (is_whole && w.plain && first + tile_rows <= w.queries && (c + 1) * chunk <= w.keys) {
        return differentiate_plain<true>(scoring.scale, first, c * chunk, nullptr, line, w);
    }
    uint32_t words[tile_rows];
    for (int64_t i = 0; i < tile_rows; ++i) {
        words[i] = first + i >= w.queries ? 0
                 : is_whole               ? range_word(0, w.keys, c * chunk)
                                          : w.group[g].mask.words[i][c];
    }
    if (w.plain) {
        for (int64_t i = 0; i < tile_rows; ++i) {
            if (words[i]) settle(a, scoring.scale, first + i, line, w);
        }
        return differentiate_plain<false>(scoring.scale, first, c * chunk, words, line, w);
    }
    for (int64_t i = 0; i < tile_rows; ++i) {
        if (words[i]) {
            differentiate(a, scoring, s, first + i, c, words[i], line, w);
        } else {
            clear_row(at + i * line, w);
        }
    }
}

// The products of group g of the tile with the packed keys (or values) j … end-1 of the block. Floats serve as left
// operand in panels too; pairs lie along the queries there, and along the head dimension in rows.
template <class Word>
METATE_FN void multiply_across(const Workspace<Word>& w, const Blocking& size, int64_t n, int64_t depth,
                               const Word* rows, const Word* panels, const Word* across, int64_t g, int64_t j,
                               int64_t end, float* to) {
    const int64_t steps = steps_of<Word>(n), first = g * tile_rows, row = depth / elements_of<Word>;
    Product<Word> product{rows + first * row, row,    across + j * steps, steps, to + first * size.line + j,
                          size.line,          nullptr};
    if constexpr (elements_of<Word> == 1) {
        product.a = panels + first * panel;
        product.stride = w.groups * tile_rows * panel;
        multiply<Left::panels, Into::set, short_chain>(tile_rows, end - j, product);
    } else {
        multiply<Left::rows, Into::set, short_chain>(tile_rows, end - j, product);
    }
}

// p and ds of the tile.
template <class Word>
inline void differentiate_tile(const Attention& a, const Scoring& scoring, const Sequence& s, const Blocking& size,
                               Workspace<Word>& w) {
    for (int64_t c = 0; c * chunk < w.keys; ++c) {
        for (int64_t g = 0; g < w.groups; ++g) {
            if (!w.whole && !(w.group[g].mask.any >> c & 1)) {
                clear_group(g * tile_rows, c * chunk, size.line, w);
                continue;
            }
            const int64_t last = w.whole ? w.keys : w.group[g].end,
                          end = last < (c + 1) * chunk ? last : (c + 1) * chunk;
            for (int64_t j = c * chunk; j < end; j += panel) {
                multiply_across(w, size, a.q.size[3], size.depth, w.query_rows, w.query_panels, w.keys_across, g, j,
                                end, w.p);
                multiply_across(w, size, a.v.size[3], size.value_depth, w.gradient_rows, w.gradient_panels,
                                w.values_across, g, j, end, w.ds);
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

// Products.

METATE_FN vf add_where_nonzero(vf sum, float a, const float* b) {
    return a == 0.0f ? sum : add_product(sum, splat(a), b);
}
#if defined(METATE_HAS_BF16_DOT)
METATE_FN vf add_where_nonzero(vf sum, Pair a, const Pair* b) {
    const vi used =
        keep_elements(load(reinterpret_cast<const int32_t*>(b)), a.first.bits & 0x7fff, a.second.bits & 0x7fff);
    return dot(sum, spread(&a), used);
}
#endif

// c += a · b with nothing from b where a is 0, not even from NaN or infinity. The bits are those of multiply otherwise.
template <Left left, class Word>
__attribute__((noinline)) void multiply_where_nonzero(int rows, const Product<Word>& p) {
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < 2; ++v) {
            float* const c = p.c + r * p.c_stride + v * width;
            vf sum = splat(0.0f);
            for (int64_t k = 0; k < p.steps; ++k) {
                const Word x = p.a[left == Left::rows ? r * p.stride + k : k * p.stride + r];
                sum = add_where_nonzero(sum, x, p.b + k * panel + v * width);
            }
            store(c, combine<Into::add>(c, sum, nullptr, r));
        }
    }
}

template <Left left, class Word>
METATE_FN void accumulate(bool safe, int rows, int64_t columns, const Product<Word>& p) {
    safe ? multiply<left, Into::add>(rows, columns, p) : multiply_where_nonzero<left>(rows, p);
}

// The words of k that hold its elements begin … end-1.
template <class Word>
METATE_FN void to_words(int64_t& begin, int64_t& end) {
    begin /= elements_of<Word>;
    end = steps_of<Word>(end);
}

// dv += pᵀ · dout and dk += dsᵀ · q: for a few keys at a time, over the queries that see them.
template <class Word>
inline void add_key_gradients(const Blocking& size, int64_t d, int64_t dv, Workspace<Word>& w) {
    const int64_t steps = steps_of<Word>(w.groups * tile_rows);
    const bool safe_values = w.whole || w.finite_gradients, safe_keys = w.whole || w.finite_queries;
    struct Run {
        int64_t begin, end;
    } runs[128 / tile_rows + 1];
    for (int64_t j = 0; j < w.keys; j += tile_rows) {
        Run& run = runs[j / tile_rows];
        run = {0, w.queries};
        if (!w.whole) {
            const int64_t low = w.key + j, high = low + tile_rows;
            const auto blind = [&](int64_t r) {
                return w.row[r].begin >= high || w.row[r].end <= low || w.row[r].begin >= w.row[r].end;
            };
            for (int64_t g = 0; g < w.groups && (w.group[g].begin >= j + tile_rows || w.group[g].end <= j); ++g)
                run.begin += tile_rows;
            while (run.begin < run.end && blind(run.begin)) ++run.begin;
            while (run.begin < run.end && blind(run.end - 1)) --run.end;
        }
        to_words<Word>(run.begin, run.end);
    }
    const auto sweep = [&](int64_t n, int64_t stride, const Word* left, const Word* right, bool safe, float* to) {
        for (int64_t column = 0; column < n; column += panel) {
            for (int64_t j = 0; j < w.keys; j += tile_rows) {
                const Run run = runs[j / tile_rows];
                if (run.begin >= run.end) continue;
                accumulate<Left::columns>(safe, static_cast<int>(w.keys - j < tile_rows ? w.keys - j : tile_rows),
                                          n - column,
                                          Product<Word>{left + run.begin * size.line + j, size.line,
                                                        right + column * steps + run.begin * panel, run.end - run.begin,
                                                        to + j * stride + column, stride, nullptr});
            }
        }
    };
    sweep(dv, size.value_depth, w.p_columns, w.gradient_panels, safe_values, w.dv);
    sweep(d, size.depth, w.ds_columns, w.query_panels, safe_keys, w.dk);
}

// dq += ds · k
template <class Word>
inline void add_query_gradient(const Blocking& size, int64_t d, Workspace<Word>& w, float* dq) {
    const int64_t steps = steps_of<Word>(round_up(w.keys, chunk)), line = size.line / elements_of<Word>;
    for (int64_t column = 0; column < d; column += panel) {
        for (int64_t g = 0; g < w.groups; ++g) {
            int64_t begin = w.whole ? 0 : w.group[g].begin, end = w.whole ? w.keys : w.group[g].end;
            if (begin >= end) continue;
            to_words<Word>(begin, end);
            accumulate<Left::rows>(w.whole || w.finite_keys, tile_rows, d - column,
                                   Product<Word>{w.ds_rows + g * tile_rows * line + begin, line,
                                                 w.key_panels + column * steps + begin * panel, end - begin,
                                                 dq + g * tile_rows * size.depth + column, size.depth, nullptr});
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

// Packing and unpacking.

template <class Word, class T>
inline void pack_keys(const Attention& a, const Sequence& s, int64_t kv, Workspace<Word>& w) {
    const T* const k = row_at<T>(a.k, s.batch, s.k0 + w.key, kv);
    const T* const v = row_at<T>(a.v, s.batch, s.k0 + w.key, kv);
    const int64_t d = a.k.size[3], dv = a.v.size[3];
    pack_transposed(w.keys_across, k, a.k.stride[1], a.k.stride[3], w.keys, d);
    pack_transposed(w.values_across, v, a.v.stride[1], a.v.stride[3], w.keys, dv);
    const int64_t steps = steps_of<Word>(round_up(w.keys, chunk));
    w.finite_keys = pack_rows(w.key_panels, k, a.k.stride[1], a.k.stride[3], w.keys, d, steps, steps * panel);
}

// Places the operands of the tile in its rows of Rows::packed.
template <class Word>
inline void place_operands(const Blocking& size, Word* packed, Workspace<Word>& w) {
    const int64_t rows = w.groups * tile_rows, steps = steps_of<Word>(rows);
    w.query_panels = packed;
    w.gradient_panels = w.query_panels + steps * size.depth;
    w.query_rows = w.gradient_panels + steps * size.value_depth;  // of pairs only
    w.gradient_rows = w.query_rows + rows * size.depth / elements_of<Word>;
}

// Returns whether all elements are finite.
template <class Word, class T>
inline bool pack_queries(const View<4>& view, const Sequence& s, int64_t head, int64_t depth, const Workspace<Word>& w,
                         Word* rows, Word* panels) {
    const T* const from = row_at<T>(view, s.batch, s.q0 + w.first, head);
    const int64_t n = view.size[3], stride = view.stride[1], words = depth / elements_of<Word>;
    if constexpr (elements_of<Word> == 2) {
        for (int64_t r = 0; r < w.queries; ++r) pack_row(rows + r * words, words, from + r * stride, view.stride[3], n);
    }
    const int64_t steps = steps_of<Word>(w.groups * tile_rows);
    return pack_rows(panels, from, stride, view.stride[3], w.queries, n, steps, steps * panel);
}

template <class T>
inline void store_row(T* to, int64_t stride, int64_t n, const float* from, float factor) {
    for (int64_t j = 0; j < n; j += width) {
        const vf x = load(from + j) * splat(factor);
        if (stride == 1) {
            n - j >= width ? store(to + j, x) : store(to + j, x, n - j);
        } else {
            float line[width];
            store(line, x);
            for (int64_t i = 0; i < width && j + i < n; ++i) to[(j + i) * stride] = from_float<T>(line[i]);
        }
    }
}

// Rows first … first + count - 1 of a gradient; without a source, zeros.
template <class T>
inline void store_gradient(const View<4>& view, int64_t batch, int64_t first, int64_t count, int64_t head,
                           const float* from, int64_t depth, float factor) {
    const float zeros[max_head_dim] = {};
    constexpr int64_t in_line = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < count; ++r) {
        if (r + rows_ahead < count) {
            const T* const later = row_at<T>(view, batch, first + r + rows_ahead, head);
            for (int64_t c = 0; c < view.size[3]; c += in_line) __builtin_prefetch(later + c * view.stride[3], 1, 2);
        }
        store_row(row_at<T>(view, batch, first + r, head), view.stride[3], view.size[3],
                  from ? from + r * depth : zeros, factor);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
