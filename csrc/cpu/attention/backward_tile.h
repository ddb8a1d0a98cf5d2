// One tile of the backward pass: a few dozen queries of one head against one block of keys.
//
// P is recomputed from the logits and the softmax of the rows; the five products of the tile run on the packed operands
// of gemm.h. Parts of the tile that no query sees are neither computed nor read: products end where the windows of
// their rows end.
#pragma once

#include "softmax.h"

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
    Softmax softmax[max_tile_queries];
    float delta[max_tile_queries];
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

template <class Word>
METATE_FN int rows_of_group(const Workspace<Word>& w, int64_t g) {
    const int64_t left = w.queries - g * tile_rows;
    return static_cast<int>(left < tile_rows ? left : tile_rows);
}

// Masks.

// The rows of the tile and what each sees. Returns whether any of them sees a key of the block.
template <class Word>
inline bool see(const AttentionBackward& args, const RowSoftmax& softmax, const Sequence& s, int64_t head,
                Workspace<Word>& w) {
    const Attention& a = args.problem;
    const Scoring& scoring = softmax.scoring;
    const int chunks = static_cast<int>(ceil_div(w.keys, chunk));
    uint32_t allowed = 0, forbidden = 0;
    for (int64_t m = w.first; a.blocks && m < w.first + w.queries; m = (m / a.block_m + 1) * a.block_m)
        add_blocks(a, blocks_of(a, s, m / a.block_m, head), w.key, chunks, allowed, forbidden);
    if (a.blocks && !allowed) return false;
    bool has_dead_row = false;
    for (int64_t r = 0; r < w.queries; ++r) {
        w.softmax[r] = softmax.of(s, head, w.first + r);
        has_dead_row |= w.softmax[r].rest == -INFINITY;
        w.delta[r] = *value_at<float>(args.delta, s.batch, head, s.q0 + w.first + r);
    }
    w.plain = scoring.plain && !a.dropout_threshold;
    int64_t begin, end, last_begin, last_end;
    window_of(a, s, w.first, begin, end);
    window_of(a, s, w.first + w.queries - 1, last_begin, last_end);
    w.whole = !has_dead_row && !a.intervals && !a.bits && !forbidden && last_begin <= w.key && end >= w.key + w.keys &&
              w.keys > 1;  // see settle
    if (w.whole && scoring.plain) return true;
    for (int64_t r = 0; r < w.groups * tile_rows; ++r) {
        Row row{};
        if (r < w.queries) row = row_of(a, s, w.first + r, head);
        if (r < w.queries && w.softmax[r].rest == -INFINITY) row.begin = row.end = 0;
        w.row[r] = row;
    }
    if (w.whole) return true;
    uint32_t any = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
        Group& group = w.group[g];
        const Row* const row = w.row + g * tile_rows;
        mask_tile(a, span_of(row, tile_rows), row, w.key, chunks, group.mask);
        const uint32_t seen = group.mask.any;
        any |= seen;
        group.begin = w.keys, group.end = 0;
        if (!seen) continue;
        group.begin = larger(group.mask.begin, __builtin_ctz(seen) * chunk);
        group.end = smaller(group.mask.end, (32 - __builtin_clz(seen)) * chunk);
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
            const auto sees_none = [&](int64_t g) {
                const uint32_t chunks = 1u << j / chunk | 1u << (j + tile_rows - 1) / chunk;
                return !(w.group[g].mask.any & chunks) || w.group[g].begin >= j + tile_rows || w.group[g].end <= j;
            };
            for (int64_t g = 0; g < w.groups && sees_none(g); ++g) run.begin += tile_rows;
            for (int64_t g = w.groups - 1; g * tile_rows > run.begin && sees_none(g); --g) run.end = g * tile_rows;
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
            accumulate<Left::rows>(w.whole || w.finite_keys, rows_of_group(w, g), d - column,
                                   Product<Word>{w.ds_rows + g * tile_rows * line + begin, line,
                                                 w.key_panels + column * steps + begin * panel, end - begin,
                                                 dq + g * tile_rows * size.depth + column, size.depth, nullptr});
        }
    }
}

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
        for (int64_t r = 0; r < w.queries; ++r) {
            const T* const row = from + r * stride;
            for (int64_t c = 0; c < n && w.first + r + rows_ahead < s.queries; c += 32)
                __builtin_prefetch(row + rows_ahead * stride + c * view.stride[3], 0, 2);
            pack_row(rows + r * words, words, row, view.stride[3], n);
        }
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
