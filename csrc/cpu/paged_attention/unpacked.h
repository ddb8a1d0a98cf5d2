// Few query rows over a tile of keys, whose rows in the cache are multiplied where they lie.
#pragma once

#include "piece.h"

namespace metate::cpu::METATE_ISA {
namespace {

// How often the products of the keys of a tile, or of its values, ask for lines that will be read.
template <class S>
int64_t steps_of(const Shape& s, const Piece& piece, const Tile& tile, bool values) {
    int64_t steps = 0;
    with_row_products<S>(s, [&]<class W>() {
        for_row_tiles<W>(piece.rows, [&]<int n>(int64_t) {
            constexpr int64_t columns = blocks_of<W, n> * block_of<W>;
            const int64_t blocks = s.dv / columns + ceil_div(s.dv % columns, block_of<W>);
            steps += values ? ceil_div(tile.count, elements_of_word<W>) * blocks
                            : ceil_div(tile.count * n, width) * ceil_div(s.d, block_of<W>);
        });
        if (!values && words_of_lane<W>(s, piece.rows))
            steps = ceil_div(tile.count, group_keys) * 2 * (words_of_row<W>(s.d) / lane_words);
    });
    return piece.heads * steps;
}

#if defined(METATE_HAS_BF16_DOT)
// The products of a tile's keys with the rows of a piece by lanes, head after head: a head's queries stay in the first
// cache level.
template <class S, int words_of_lane>
void multiply_tile_by_lanes(const Shape& s, const Piece& piece, const Tile& tile, const Scratch& my) {
    const uint8_t* copies[tile_keys];
    for (int64_t h = 0; h < piece.heads; ++h) {
        const Lines keys = lines_of<S>(s.a.k_cache, tile.k, h, 0, tile_keys, my.rows, copies);
        float* const to = my.p + h * piece.pitch() * p_stride;
        multiply_keys_by_lanes<S, words_of_lane>(keys, tile.count, my.lanes + h * piece_rows * s.q_stride,
                                                 words_of_row<S>(s.d), {to, 0, p_stride}, piece.rows, *my.ahead);
    }
}

#endif

// The products of a tile's keys with the rows of a piece.
template <class S>
void multiply_tile_keys(const Shape& s, const Piece& piece, const Stream& stream, const Scratch& my) {
    const Tile& tile = *stream.tile;
    const int64_t pitch = piece.pitch();
    const bool in_place = s.a.k_cache.stride[3] == 1;
    const int64_t together = in_place ? piece.heads : 1;
    const int64_t group = in_place && piece.rows <= 4 ? tile_keys : group_keys;  // more rows come back to some keys
    const uint8_t* copies[group_keys];
    stream.advance(s, piece, false, steps_of<S>(s, piece, tile, false), my);
#if defined(METATE_HAS_BF16_DOT)
    if constexpr (has_lanes<S>) {
        const int each = words_of_lane<S>(s, piece.rows);
        if (each == 1) return multiply_tile_by_lanes<S, 1>(s, piece, tile, my);
        if (each == 2) return multiply_tile_by_lanes<S, 2>(s, piece, tile, my);
    }
#endif
    for (int64_t first = 0; first < tile.count; first += group) {
        const int64_t count = smaller(tile.count - first, group);
        for (int64_t h = 0; h < piece.heads; h += together) {
            const Lines keys = lines_of<S>(s.a.k_cache, tile.k, h, first, group, my.rows, copies);
            with_row_products<S>(s, [&]<class W>() {
                for_row_tiles<W>(piece.rows, [&]<int n>(int64_t r) {
                    const int64_t row = h * pitch + r;
                    const Matrix q{my.q + row * s.q_stride, pitch * s.q_stride, s.q_stride};
                    const Matrix to{my.p + row * p_stride + first, pitch * p_stride, p_stride};
                    with_order<W, n>(s, piece, [&]<int few>() {
                        if constexpr (few == 4) {
                            if (together % 2 == 0)
                                return multiply_keys<W, n, 2>(keys, tile.k.next_head, together, count, q, s.d, to,
                                                              *my.ahead);
                        }
                        multiply_keys<W, n, 1>(keys, tile.k.next_head, together, count, q, s.d, to, *my.ahead);
                    });
                });
            });
        }
    }
}

// The same as logits.
template <class S>
__attribute__((noinline)) void find_logits(const Shape& s, const Piece& piece, const Stream& stream,
                                           const Scratch& my) {
    const Tile& tile = *stream.tile;
    const int64_t pitch = piece.pitch();
    multiply_tile_keys<S>(s, piece, stream, my);
    if (s.a.k_scale) gather_scales(s, piece, tile, my);
    float unit_of_products = 1.0f;
    with_row_products<S>(s, [&]<class W>() { unit_of_products = unit<W>; });
    for (int64_t h = 0; h < piece.heads; ++h) {
        const float* scales = s.a.k_scale ? my.k_scale + h * tile_keys : nullptr;
        for (int64_t r = 0; r < piece.rows; ++r) {
            const float step = s.integers ? my.q_step[h * pitch + r] : unit_of_products;
            to_logits(s, my.row[h * piece_rows + r], tile.mask[r], tile.key, step, scales,
                      my.p + (h * pitch + r) * p_stride);
        }
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
