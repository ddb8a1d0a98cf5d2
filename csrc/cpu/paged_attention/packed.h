// Many query rows over a tile of keys: keys and values are packed as words, whatever they are stored as, for the
// products of dense attention.
#pragma once

#include "../attention/gemm.h"
#include "piece.h"

namespace metate::cpu::METATE_ISA {
namespace {

static_assert(panel == block && tile_keys % panel == 0 && tile_rows <= piece_rows);

template <class S>
using WordOf = typename Either<has_bf16_dots<S>, Pair, float>::type;

// Panel after panel of keys of a tile, one word of all in a line; words in the order of take_key(), as in q.
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

// Panel after panel of columns of the values of a tile, those of one value, or two, in a line; panels are as deep as a
// block.
template <class S>
void pack_values(const Shape& s, const Lines& values, int64_t count, float* to) {
    constexpr int vectors = block_of<S> / width;
    const int64_t words = s.tiles * tile_keys / elements_of_word<S>;  // of a column
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

// Values of 0, for a tile that no row sees among others.
template <class S>
void pack_zeros(const Shape& s, float* to) {
    const int64_t words = s.tiles * tile_keys / elements_of_word<S>, own = tile_keys / elements_of_word<S>;
    for (int64_t c = 0; c < s.dv; c += panel)
        memset(to + c * words, 0, static_cast<size_t>(own * panel) * sizeof(float));
}

// What a tile t of a block has, behind what tiles before it have.
METATE_FN Scratch of_tile(const Shape& s, int64_t t, Scratch my) {
    my.p += t * tile_keys;
    my.k_scale += t * tile_keys;
    my.v_scale += t * tile_keys;
    my.keys += t * tile_keys * s.q_stride;
    return my;
}

// A block as packed: its tiles from the first to the last that some row sees.
struct Block {
    const Tile* tile;
    int64_t first, last;
};

template <class S>
Block pack_block(const Shape& s, const Piece& piece, const Stream& stream, const Scratch& my) {
    Block block{stream.tile, stream.tiles, 0};
    const uint8_t* copies[tile_keys];
    for (int64_t t = 0; t < stream.tiles; ++t) {
        const Tile& tile = stream.tile[t];
        const Scratch own = of_tile(s, t, my);
        with_packed_products<S>([&]<class W>() {
            float* const to = my.values + t * tile_keys / elements_of_word<W> * panel;
            if (!tile.some) return pack_zeros<W>(s, to);
            pack_keys<W>(s, lines_of<S>(s.a.k_cache, tile.k, 0, 0, tile_keys, my.rows, copies), own.keys);
            if (!stream.has_values) return;
            pack_values<W>(s, lines_of<S>(s.a.v_cache, tile.v, 0, 0, tile_keys, my.rows, copies), tile.count, to);
        });
        if (!tile.some) continue;
        block.first = smaller(t, block.first);
        block.last = t;
        if (s.a.k_scale) gather_scales(s, piece, tile, own);
    }
    return block;
}

// What products do beside their sums.
struct Ahead {
    Prefetch* prefetch;
    METATE_FN void operator()() const { prefetch->fetch(); }
};

// How often the products of the rows of a piece with a block ask for lines that will be read.
template <class S>
int64_t packed_steps_of(const Shape& s, const Piece& piece, const Block& block) {
    constexpr int64_t batch = 4;  // words between calls
    int64_t steps = 0;
    with_packed_products<S>([&]<class W>() {
        const int64_t keys = (block.last + 1 - block.first) * tile_keys;
        steps = keys / panel * (words_of_row<W>(s.d) / batch) +
                ceil_div(s.dv, panel) * (keys / elements_of_word<W> / batch);
    });
    return ceil_div(piece.rows, tile_rows) * steps;
}

// The products of a block's keys with `rows` rows of a piece from `first` on, as logits.
template <class S>
void find_packed_logits(const Shape& s, int64_t first, int64_t rows, const Block& block, const Scratch& my) {
    const int64_t stride = packed_stride(s);
    with_packed_products<S>([&]<class W>() {
        using Word = WordOf<W>;
        constexpr int64_t chain = elements_of<Word> == 1 ? short_chain : long_chain;  // pairs are rounded more by far
        const int64_t words = words_of_row<W>(s.d);
        for (int64_t t = block.first; t <= block.last; ++t) {
            const Tile& tile = block.tile[t];
            const Scratch own = of_tile(s, t, my);
            for (int64_t key = 0; tile.some && key < tile_keys; key += panel) {
                multiply<Left::rows, Into::set, chain>(
                    static_cast<int>(rows), panel,
                    Product<Word>{reinterpret_cast<Word*>(my.q + first * s.q_stride), s.q_stride,
                                  reinterpret_cast<Word*>(own.keys) + key * words, words, own.p + key, stride, nullptr},
                    Ahead{my.ahead});
            }
            const float* scales = s.a.k_scale ? own.k_scale : nullptr;
            for (int64_t r = 0; r < rows; ++r) {
                const uint64_t mask = tile.some ? tile.mask[first + r] : 0;
                to_logits(s, my.row[first + r], mask, tile.key, unit<W>, scales, own.p + r * stride);
            }
        }
    });
}

// Adds the values of a block to `rows` rows of a piece from `first` on.
template <class S>
void add_packed_values(const Shape& s, const Piece& piece, int64_t first, int64_t rows, const Block& block,
                       const Scratch& my) {
    with_packed_products<S>([&]<class W>() {
        using Word = WordOf<W>;
        constexpr int64_t each = elements_of_word<W>;
        const int64_t begin = block.first * tile_keys, depth = s.tiles * tile_keys / each;
        const int64_t keys = (block.last - block.first) * tile_keys + block.tile[block.last].count;
        for (int64_t column = 0; column < round_up(s.dv, block_of<W>); column += panel) {
            const auto* values = reinterpret_cast<Word*>(my.values) + column * depth + begin / each * panel;
            multiply<Left::rows, Into::scaled>(
                static_cast<int>(rows), panel,
                Product<Word>{reinterpret_cast<Word*>(my.p + begin), packed_stride(s), values, steps_of<Word>(keys),
                              piece.state.o + first * s.o_stride + column, s.o_stride, my.factor},
                Ahead{my.ahead});
        }
    });
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
