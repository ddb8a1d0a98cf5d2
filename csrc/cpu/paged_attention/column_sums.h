// Column sums of paged attention: the products anew, for lse was not known when they were first found.
#pragma once

#include "packed.h"
#include "unpacked.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Adds what a row has in a tile.
inline void add_row(const Shape& s, const Sequence& seq, const Row& row, const Tile& tile, uint64_t mask,
                    const float* logits) {
    const PagedAttention& a = s.a;
    const float lse = *lse_base_2_at(s, seq, row.query, row.head);
    if (lse == -INFINITY) return;
    float* sums = static_cast<float*>(a.sums.data) + seq.number * a.sums.stride[0] + row.head * a.sums.stride[1];
    for (uint64_t left = mask; left; left &= left - 1) {
        const int j = __builtin_ctzll(left);
        sums[(tile.key + j) * a.sums.stride[2]] += exp2f(logits[j] - lse);
    }
}

// sums[b, h, j] = Σ_i 2^(logit_ij - lse_i) over a tile, or a block.
template <class S>
void add_tile_sums(const Shape& s, const Sequence& seq, const Piece& piece, const Stream& stream, const Scratch& my) {
    find_logits<S>(s, seq, piece, stream, my);
    for (int64_t i = 0; i < piece.heads * piece.rows; ++i) {
        const int64_t h = i / piece.rows, r = i % piece.rows;
        add_row(s, seq, my.row[h * piece_rows + r], *stream.tile, stream.tile->mask[r],
                my.p + (h * piece.pitch() + r) * p_stride);
    }
}
template <class S>
void add_block_sums(const Shape& s, const Sequence& seq, const Piece& piece, const Stream& stream, const Scratch& my) {
    const Block block = pack_block<S>(s, piece, stream, my);
    stream.advance(s, piece, true, packed_steps_of<S>(s, piece, block), my);
    for (int64_t first = 0; first < piece.rows; first += tile_rows) {
        const int64_t rows = smaller(piece.rows - first, tile_rows);
        find_packed_logits<S>(s, seq, first, rows, block, my);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t t = block.first; t <= block.last; ++t) {
                const Tile& tile = block.tile[t];
                const float* logits = my.p + r * packed_stride(s) + t * tile_keys;
                if (tile.some) add_row(s, seq, my.row[first + r], tile, tile.mask[first + r], logits);
            }
        }
    }
}

// The sums of one split and a piece's heads: products as they were when lse was found.
template <class S>
void add_sums(const Shape& s, const Sequence& seq, const Cut& cut, Piece piece, const Scratch& my) {
    for (; piece.row < seq.queries * s.group; piece.row += cut.rows) {
        piece.rows = smaller(seq.queries * s.group - piece.row, cut.rows);
        for_tiles<S>(s, seq, piece, nullptr, false, my, [&](const Stream& stream) {
            (piece.packed ? add_block_sums<S> : add_tile_sums<S>)(s, seq, piece, stream, my);
        });
    }
}

// The sums of some heads over one split, from nothing.
template <class S>
void find_sums(const Shape& s, int64_t n, int64_t split, int64_t head, const Scratch& my) {
    const View<3>& sums = s.a.sums;
    const int64_t heads = smaller(s.a.k_cache.size[2] - head, s.heads), first = split * split_keys;
    for (int64_t h = head * s.group; h < (head + heads) * s.group; ++h) {
        float* to = static_cast<float*>(sums.data) + n * sums.stride[0] + h * sums.stride[1];
        for (int64_t j = first; j < first + split_keys && j < sums.size[2]; ++j) to[j * sums.stride[2]] = 0.0f;
    }
    const Sequence seq = sequence_of(s.a, n);
    const Cut cut = cut_of(s, seq);
    for (int64_t h = 0; h < heads; h += cut.heads) {
        const int64_t together = smaller(heads - h, cut.heads);
        add_sums<S>(s, seq, cut, Piece{n, head + h, together, 0, 0, first, first + split_keys, cut.packed, {}}, my);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
