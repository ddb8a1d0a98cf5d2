// The softmax of rows, for the passes behind the forward, which weigh by it: from lse, or found anew where that is
// coarse.
//
// Finding it takes the products of csrc/attention.h once more: of some rows of one key head, which walk over the blocks
// of keys. They have the bits of the backward's own products, or what large ones are rounded by would be all there is.
#pragma once

#include <math.h>

#include "../parallel.h"
#include "score.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Of a row: probability = 2^(exponent · (x - reference) + rest), x and exponent as in Scoring; a rest of -inf where it
// sees no key.
struct Softmax {
    float reference, rest;
};

inline Softmax softmax_of(const Scoring& scoring, float lse) {
    if (lse == -INFINITY) return {0.0f, -INFINITY};
    const float scale = scoring.plain ? scoring.scale : 1.0f, at = lse / scale, reference = fabsf(at) < 1e30f ? at : 0;
    return {reference, fmaf(reference, scale, -lse) * log2_e};
}

inline bool is_coarse(float lse, float limit) {
    return !(fabsf(lse) <= limit) && lse != -INFINITY;
}

inline bool has_coarse(const View<3>& lse, float limit) {
    bool found = false;
    for (int64_t b = 0; b < lse.size[0]; ++b) {
        for (int64_t h = 0; h < lse.size[1]; ++h) {
            for (int64_t i = 0; i < lse.size[2]; ++i) found |= is_coarse(*value_at<float>(lse, b, h, i), limit);
        }
    }
    return found;
}

// Of all rows of a call.
struct RowSoftmax {
    Scoring scoring;
    View<3> lse;
    float limit;     // of |lse|
    Softmax* found;  // (batch, head, query): of the rows beyond it; null if there are none

    bool is_coarse(const Sequence& s, int64_t head, int64_t query) const {
        return METATE_ISA::is_coarse(*value_at<float>(lse, s.batch, head, s.q0 + query), limit);
    }
    Softmax& at(const Sequence& s, int64_t head, int64_t query) const {
        return found[(s.batch * lse.size[1] + head) * lse.size[2] + s.q0 + query];
    }
    Softmax of(const Sequence& s, int64_t head, int64_t query) const {
        if (found && is_coarse(s, head, query)) return at(s, head, query);
        return softmax_of(scoring, *value_at<float>(lse, s.batch, head, s.q0 + query));
    }
};

// Logits of rows, a tile at a time.

// Sizes named `words` count 32-bit words of operands.
struct Walk {
    const Attention& a;
    Scoring scoring;
    int64_t group, d, d_words, q_stride;
    int64_t block;     // keys packed at a time
    int64_t s_stride;  // floats from row to row of a tile of logits
};

template <class Word>
Walk walk_of(const Attention& a) {
    constexpr int64_t line = 16, words_of_keys = 32768;
    const int64_t d = a.q.size[3], d_words = steps_of<Word>(d),
                  block = clamp(words_of_keys / (d_words + 1) / 64 * 64, 64, 256);
    return {a,     scoring_of(a), a.k.size[2] ? a.q.size[2] / a.k.size[2] : 1, d, d_words, round_up(d_words, 16) + line,
            block, block + line};
}

constexpr int64_t piece_rows = 16 * tile_rows;  // enough to pay for packing the keys

template <class Word>
struct WalkScratch {
    Word *q, *k;
    float* s;
    float *largest, *powers;  // of the rows of a piece, and the sum of powers relative to it
};

template <class Word>
WalkScratch<Word> take_walk(const Walk& walk, Arena& arena) {
    return {arena.take<Word>(tile_rows * walk.q_stride), arena.take<Word>(walk.block * walk.d_words),
            arena.take<float>(tile_rows * walk.s_stride), arena.take<float>(piece_rows), arena.take<float>(piece_rows)};
}

constexpr int64_t shortest_chain = 8;  // of sums of floats where scores are few, see gemm.h

// Calls body(row, mask, r, x) for the rows, a tile, that start at row `first` of the group, with their logits x, unless
// none of them sees a key.
template <class T, class Word, class Body>
void for_rows(const Walk& walk, const Sequence& seq, int64_t kv_head, int64_t key, int chunks, int64_t first, int rows,
              const WalkScratch<Word>& my, const Body& body) {
    const Attention& a = walk.a;
    Row row[tile_rows];
    for (int r = 0; r < rows; ++r) {
        row[r] = row_of(a, seq, (first + r) / walk.group, kv_head * walk.group + (first + r) % walk.group);
    }
    TileMask mask;
    mask_tile(a, span_of(row, rows), row, key, chunks, mask);
    if (!mask.any) return;
    for (int r = 0; r < rows; ++r) {
        pack_row(my.q + r * walk.q_stride, round_up(walk.d_words, width),
                 row_at<T>(a.q, seq.batch, seq.q0 + row[r].query, row[r].head), a.q.stride[3], walk.d);
    }
    const Product<Word> products{my.q, walk.q_stride, my.k, walk.d_words, my.s, walk.s_stride, nullptr};
    if constexpr (elements_of<Word> == 2)
        multiply_keys<max_head_dim>(rows, mask, products);
    else if (seq.has_few_scores())
        multiply_keys<shortest_chain>(rows, mask, products);
    else
        multiply_keys<short_chain>(rows, mask, products);
    for (int r = 0; r < rows; ++r) {
        float* const x = my.s + r * walk.s_stride;
        if (!walk.scoring.plain) to_logits(a, walk.scoring, seq, row[r], key, mask.any, x);
        body(row[r], mask, r, x);
    }
}

// Calls body(at, x) for what row r of a tile sees: vectors of x from column `at` on, -inf where it does not see.
template <class Body>
METATE_FN void for_seen(const TileMask& mask, int r, const float* x, const Body& body) {
    for (uint32_t left = mask.any; left; left &= left - 1) {
        const int c = __builtin_ctz(left);
        for (int v = 0; v < chunk / width; ++v) {
            const int64_t at = c * chunk + v * width;
            const vf y = load(x + at);
            body(at, mask.all >> c & 1 ? y : keep(mask.words[r][c], v, y, splat(-INFINITY)));
        }
    }
}

// Packs the keys of the block at `key`; returns of how many chunks they are.
template <class T, class Word>
int pack_block(const Walk& walk, const Sequence& seq, int64_t kv_head, int64_t key, const WalkScratch<Word>& my) {
    const View<4>& k = walk.a.k;
    const int64_t keys = smaller(seq.keys - key, walk.block);
    pack_transposed(my.k, row_at<T>(k, seq.batch, seq.k0 + key, kv_head), k.stride[1], k.stride[3], keys, walk.d);
    return static_cast<int>(ceil_div(keys, chunk));
}

// Finding.

// Takes row r of a tile into the largest logit of that row and the sum of its powers.
METATE_FN void take_row(const Walk& walk, const TileMask& mask, int r, const float* x, float& largest, float& powers) {
    const vf exponent = splat(walk.scoring.exponent);
    vf top = splat(largest), total = splat(0.0f);
    for_seen(mask, r, x, [&](int64_t, vf y) { top = max(y, top); });
    const float highest = METATE_ISA::largest(top), reference = highest == -INFINITY ? 0.0f : highest;
    for_seen(mask, r, x, [&](int64_t, vf y) { total = total + exp2((y - splat(reference)) * exponent); });
    powers = powers * exp2f((largest - reference) * walk.scoring.exponent) + sum(total);
    largest = highest;
}

// The softmax of a row that has met all its keys; a sink is one more logit in the denominator.
inline Softmax softmax_of(const Walk& walk, int64_t head, float largest, float powers) {
    if (powers == 0.0f) return {0.0f, -INFINITY};
    if (!walk.a.sinks) return {largest, -log2f(powers)};
    const float sink = static_cast<const float*>(walk.a.sinks.data)[head * walk.a.sinks.stride[0]];
    const float ahead = fmaf(-largest, walk.scoring.plain ? walk.scoring.scale : 1.0f, sink) * log2_e;
    if (ahead <= 0.0f) return {largest, -log2f(powers + exp2f(ahead))};
    return {largest, -ahead - log2f(powers * exp2f(-ahead) + 1.0f)};
}

// The first row of a piece.
struct Place {
    int64_t sequence, first;
};

// The pieces of rows of each key head, to `to` if that is not null; returns how many. With a causal mask the last
// queries have the most keys.
inline int64_t places_of(const Walk& walk, Place* to) {
    int64_t count = 0;
    for (int64_t n = sequences_of(walk.a) - 1; n >= 0; --n) {
        for (int64_t r = ceil_div(sequence_of(walk.a, n).queries * walk.group, piece_rows); r-- > 0; ++count) {
            if (to) to[count] = {n, r * piece_rows};
        }
    }
    return count;
}

// Finds the softmax of the rows of a piece whose lse is coarse.
template <class T, class Word>
void find_softmax(const Walk& walk, const RowSoftmax& softmax, const Place& place, int64_t kv_head,
                  const WalkScratch<Word>& my) {
    const Sequence seq = sequence_of(walk.a, place.sequence);
    const int64_t rows = smaller(seq.queries * walk.group - place.first, piece_rows);
    const auto query_of = [&](int64_t r) { return (place.first + r) / walk.group; };
    const auto head_of = [&](int64_t r) { return kv_head * walk.group + (place.first + r) % walk.group; };
    bool wanted[piece_rows / tile_rows] = {};
    int64_t begin = seq.keys, end = 0;
    for (int64_t r = 0; r < rows; ++r) {
        my.largest[r] = -INFINITY;
        my.powers[r] = 0.0f;
        if (!softmax.is_coarse(seq, head_of(r), query_of(r))) continue;
        wanted[r / tile_rows] = true;
        const Row row = row_of(walk.a, seq, query_of(r), head_of(r));
        if (row.begin >= row.end) continue;
        begin = smaller(begin, row.begin);
        end = larger(end, row.end);
    }
    for (int64_t key = begin / walk.block * walk.block; key < end; key += walk.block) {
        const int chunks = pack_block<T>(walk, seq, kv_head, key, my);
        for (int64_t at = 0; at < rows; at += tile_rows) {
            if (!wanted[at / tile_rows]) continue;
            for_rows<T>(walk, seq, kv_head, key, chunks, place.first + at,
                        static_cast<int>(smaller(rows - at, tile_rows)), my,
                        [&](const Row&, const TileMask& mask, int r, const float* x) {
                            take_row(walk, mask, r, x, my.largest[at + r], my.powers[at + r]);
                        });
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        if (!softmax.is_coarse(seq, head_of(r), query_of(r))) continue;
        softmax.at(seq, head_of(r), query_of(r)) = softmax_of(walk, head_of(r), my.largest[r], my.powers[r]);
    }
}

// Finds all of them. `place` holds places_of(walk).
template <class T, class Word, class ScratchOf>
void find_softmaxes(const Runtime& runtime, const Walk& walk, const RowSoftmax& softmax, const Place* place,
                    int64_t places, const ScratchOf& scratch_of) {
    const int64_t heads = walk.a.k.size[2];
    for_pieces(runtime, places * heads, [&](int worker, int64_t i) {
        find_softmax<T, Word>(walk, softmax, place[i / heads], i % heads, scratch_of(worker));
    });
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
