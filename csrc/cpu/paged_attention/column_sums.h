// Column sums of paged attention: weights relative to a row's softmax, which is known once its splits are merged.
// Logits of few rows are kept until then, so that the cache is read once; those of many are computed anew.
#pragma once

#include "packed.h"
#include "unpacked.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Keeps the logits of a tile.
inline void keep_logits(const Piece& piece, const Tile& tile, const Scratch& my) {
    float* to = piece.state.logits + (tile.key - piece.key_begin);
    for (int64_t h = 0; h < piece.heads; ++h) {
        const float* from = my.p + h * piece.pitch() * p_stride;
        for (int64_t r = 0; r < piece.rows; ++r, from += p_stride, to += kept_stride)
            for (int j = 0; j < tile_keys; j += width) store(to + j, load(from + j));
    }
}

// Adds what a row has in the tile that starts at `key`.
inline void add_row(const Shape& s, const Sequence& seq, const Row& row, int64_t key, uint64_t mask,
                    const float* logits) {
    const View<3>& sums = s.a.sums;
    const Softmax of = softmax_at(s, seq, row.query, row.head);
    if (!mask || of.share == 0.0f) return;
    float* const to =
        static_cast<float*>(sums.data) + seq.number * sums.stride[0] + row.head * sums.stride[1] + key * sums.stride[2];
    float p[tile_keys];
    for (int j = 0; j < tile_keys; j += width) {
        const vf weight = exp2(load(logits + j) - splat(of.largest)) * splat(of.share);
        store(p + j, select(mask_of(static_cast<uint32_t>(mask >> j)), weight, splat(0.0f)));
    }
    const int64_t count = smaller(seq.keys - key, tile_keys);
    for (int64_t j = 0; j < count && sums.stride[2] == 1; j += width) {
        const int64_t n = smaller(count - j, width);
        store(to + j, load(to + j, n) + load(p + j), n);
    }
    for (int64_t j = 0; j < count && sums.stride[2] != 1; ++j) to[j * sums.stride[2]] += p[j];
}

// sums[b, h, j] = Σ_i probability_ij over the keys of a piece of few rows.
inline void add_kept(const Shape& s, const Sequence& seq, const Piece& piece) {
    for (int64_t h = 0; h < piece.heads; ++h) {
        for (int64_t r = 0; r < piece.rows; ++r) {
            const Row row = row_at(s, seq, piece.head + h, piece.row + r);
            const float* logits = piece.state.logits + (h * piece.rows + r) * kept_stride;
            for (int64_t key = piece.key_begin; key < smaller(piece.key_end, seq.keys); key += tile_keys)
                add_row(s, seq, row, key, visible(s, seq, row, key), logits + (key - piece.key_begin));
        }
    }
}

// The same over a block of many rows.
template <class S>
void add_block_sums(const Shape& s, const Sequence& seq, const Piece& piece, const Stream& stream, const Scratch& my) {
    const Block block = pack_block<S>(s, piece, stream, my);
    stream.advance(s, piece, true, packed_steps_of<S>(s, piece, block), my);
    for (int64_t first = 0; first < piece.rows; first += tile_rows) {
        const int64_t rows = smaller(piece.rows - first, tile_rows);
        find_packed_logits<S>(s, first, rows, block, my);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t t = block.first; t <= block.last; ++t) {
                const Tile& tile = block.tile[t];
                const float* logits = my.p + r * packed_stride(s) + t * tile_keys;
                if (tile.some) add_row(s, seq, my.row[first + r], tile.key, tile.mask[first + r], logits);
            }
        }
    }
}

// Of some heads over one split and many rows: products as they were when the softmax was found.
template <class S>
void add_again(const Shape& s, const Sequence& seq, const Cut& cut, int64_t head, int64_t heads, int64_t first,
               const Scratch& my) {
    for (int64_t h = head; h < head + heads; ++h) {
        Piece piece{seq.number, h, 1, 0, 0, first, first + split_keys, true, {}};
        for (; piece.row < seq.queries * s.group; piece.row += cut.rows) {
            piece.rows = smaller(seq.queries * s.group - piece.row, cut.rows);
            for_tiles<S>(s, seq, piece, nullptr, false, my,
                         [&](const Stream& stream) { add_block_sums<S>(s, seq, piece, stream, my); });
        }
    }
}

// The sums of some heads over one split, from nothing. `pieces` are those of the sequence.
template <class S>
void find_sums(const Shape& s, int64_t n, int64_t split, int64_t head, const Piece* pieces, const Scratch& my) {
    const View<3>& sums = s.a.sums;
    const int64_t heads = smaller(s.a.k_cache.size[2] - head, s.heads), first = split * split_keys;
    for (int64_t h = head * s.group; h < (head + heads) * s.group; ++h) {
        float* to = static_cast<float*>(sums.data) + n * sums.stride[0] + h * sums.stride[1];
        for (int64_t j = first; j < first + split_keys && j < sums.size[2]; ++j) to[j * sums.stride[2]] = 0.0f;
    }
    const Sequence seq = sequence_of(s.a, n);
    if (first >= seq.keys || !seq.queries) return;
    const Cut cut = cut_of(s, seq);
    if (cut.packed) return add_again<S>(s, seq, cut, head, heads, first, my);
    const int64_t blocks = ceil_div(s.a.k_cache.size[2], cut.heads);
    add_kept(s, seq, pieces[split * blocks + head / cut.heads]);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
