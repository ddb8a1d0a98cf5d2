// Many query rows over a tile of keys: keys and values are packed as words, whatever they are stored as, for the
// products of dense attention.
#pragma once

#include "../attention/gemm.h"
#include "piece.h"

namespace metate::cpu::METATE_ISA {
namespace {

static_assert(panel == block && tile_keys % panel == 0);

template <class S>
using WordOf = typename Either<has_bf16_dots<S>, Pair, float>::type;

// Panel after panel of keys, one word of all in a line; words in the order of take_key(), as in q.
template <class S>
void pack_keys(const Shape& s, const Lines& keys, float* to) {
    for (int64_t first = 0; first < tile_keys; first += width) {
        float* out = to + first / panel * words_of_row<S>(s.d) * panel + first % panel;
        for (int64_t c = 0; c < s.d; c += block_of<S>) {
            constexpr int vectors = vectors_of_block<S>;
            vf rows[vectors][width];
#pragma GCC unroll 16
            for (int i = 0; i < width; ++i) {
                Words<S> x[vectors];
                take_key<S>(keys.at[first + i] + (keys.offset + bytes_before<S>(c)), smaller(s.d - c, block_of<S>), x);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) rows[v][i] = as_floats(x[v]);
            }
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v, out += width * panel) {
                transpose(rows[v]);
#pragma GCC unroll 16
                for (int i = 0; i < width; ++i) store(out + i * panel, rows[v][i]);
            }
        }
    }
}

// Panel after panel of columns, those of one value, or two, in a line.
template <class S>
void pack_values(const Shape& s, const Lines& values, int64_t count, float* to) {
    constexpr int vectors = block_of<S> / width, words = tile_keys / elements_of_word<S>;  // of a column
    for (int64_t k = 0; k < count; k += elements_of_word<S>, to += panel) {
        const uint8_t *v = values.at[k] + values.offset, *next = row_of_zeros;
        if (has_dots<S> && k + 1 < count) next = values.at[k + 1] + values.offset;
        for (int64_t c = 0; c < s.dv; c += block_of<S>) {
            Words<S> x[vectors];
            take_values<S>(v + bytes_before<S>(c), next + bytes_before<S>(c), smaller(s.dv - c, block_of<S>), x);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; ++i) {
                const int64_t column = c + i * width, before = column / panel * panel;
                store(to + before * words + (column - before), as_floats(x[i]));
            }
        }
    }
}

// c = a · b, or c · factor + a · b, for `columns` columns of b, whose panels are panel_stride words apart.
template <Into into, class Word>
void multiply_panels(int64_t rows, int64_t columns, int64_t panel_stride, const Product<Word>& whole) {
    for (int64_t column = 0; column < columns; column += panel) {
        for (int64_t r = 0; r < rows; r += tile_rows) {
            Product<Word> p = whole;
            p.a += r * p.stride;
            p.b += column / panel * panel_stride;
            p.c += r * p.c_stride + column;
            p.factor += r;
            multiply<Left::rows, into>(static_cast<int>(smaller(rows - r, tile_rows)), panel, p);
        }
    }
}

// The products of a tile's keys with the rows of a piece of one head.
template <class S>
void multiply_packed_keys(const Shape& s, const Piece& piece, const Tile& tile, const Scratch& my) {
    const uint8_t* copies[tile_keys];
    const Lines keys = lines_of<S>(s.a.k_cache, tile.k, 0, 0, tile_keys, my.rows, copies);
    with_packed_products<S>([&]<class W>() {
        using Word = WordOf<W>;
        const int64_t words = words_of_row<W>(s.d);
        pack_keys<W>(s, keys, my.packed);
        multiply_panels<Into::set>(piece.rows, tile_keys, words * panel,
                                   Product<Word>{reinterpret_cast<Word*>(my.q), s.q_stride,
                                                 reinterpret_cast<Word*>(my.packed), words, my.p, p_stride, my.factor});
    });
}

// The products of a tile's keys with the rows of a piece, as logits.
template <class S>
__attribute__((noinline)) void find_logits(const Shape& s, const Sequence& seq, const Piece& piece,
                                           const Stream& stream, const Scratch& my) {
    const Tile& tile = *stream.tile;
    const int64_t pitch = piece.pitch();
    if (piece.packed)
        multiply_packed_keys<S>(s, piece, tile, my);
    else
        multiply_tile_keys<S>(s, piece, stream, my);
    if (s.a.k_scale) gather_scales(s, piece, tile, my);
    float unit_of_products = 1.0f;
    with_products<S>(s, piece, [&]<class W>() { unit_of_products = unit<W>; });
    for (int64_t h = 0; h < piece.heads; ++h) {
        const float* scales = s.a.k_scale ? my.k_scale + h * tile_keys : nullptr;
        for (int64_t r = 0; r < piece.rows; ++r) {
            const Row& row = my.row[h * piece_rows + r];
            const float step = has_whole_numbers(s, piece) ? my.q_step[h * pitch + r] : unit_of_products;
            to_logits(s, seq, row, tile.mask[r], tile.key, step, scales, my.p + (h * pitch + r) * p_stride);
        }
    }
}

// Adds the values of a tile to the rows of a piece of one head.
template <class S>
void add_packed_values(const Shape& s, const Piece& piece, const Tile& tile, const Scratch& my) {
    const uint8_t* copies[tile_keys];
    const Lines values = lines_of<S>(s.a.v_cache, tile.v, 0, 0, tile_keys, my.rows, copies);
    with_packed_products<S>([&]<class W>() {
        using Word = WordOf<W>;
        pack_values<W>(s, values, tile.count, my.packed);
        multiply_panels<Into::scaled>(
            piece.rows, round_up(s.dv, block_of<W>), tile_keys / elements_of_word<W> * panel,
            Product<Word>{reinterpret_cast<Word*>(my.p), p_stride, reinterpret_cast<Word*>(my.packed),
                          steps_of<Word>(tile.count), piece.state.o, s.o_stride, my.factor});
    });
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
