// A piece of paged attention: a few query rows of some neighbouring heads over one split of the keys, taken a tile of
// keys at a time, and the logits of such a tile.
#pragma once

#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "../strided.h"
#include "integer.h"
#include "tile.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t split_keys = 512, piece_rows = 16;
constexpr int64_t packed_rows = 128;   // of a packed piece, which has one head
constexpr int64_t packed_tiles = 4;    // at most, of the keys that are packed together: a block
constexpr int64_t piece_bytes = 2048;  // of neighbouring heads in a row of keys: long enough to stream
constexpr int max_heads = 8;
// How far ahead rows are asked for that are read in their order: by more than the keys that are read in turn, or the
// last of them would be read before they are asked for. What is asked for much earlier leaves the first cache level
// before it is read, for lack of room, and is fetched twice.
constexpr int64_t lead = 24576 / Prefetch::batch_bytes, short_lead = 8192 / Prefetch::batch_bytes;
constexpr int64_t most_cached = 64 << 20;  // bytes of keys and values, of which a last cache may hold a good part
static_assert(split_keys % tile_keys == 0 && piece_rows % 4 == 0 && packed_rows % 16 == 0);

// Of a row: probability = 2^(logit - largest) · share, with logits in powers of 2; a share of 0 where it sees no key. A
// large lse says it less exactly: what it was rounded by is in the exponent.
struct Softmax {
    float largest, share;
};

// What the whole call shares.
struct Shape {
    const PagedAttention& a;
    int64_t group, heads;  // query heads of a key head; key heads of a piece
    int64_t d, dv;
    int64_t q_stride, o_stride;  // words of a row of q, floats of a row of results
    bool plain;                  // logits are products times scale and nothing else
    bool integers;               // products of few rows are those of integer.h
    bool packs;                  // some sequence has many rows
    int64_t tiles;               // of a block
    float scale, softcap;        // exp(logit) = 2^(scale · product) if plain
    Softmax* softmax;            // (batch, head, query), where sums are asked for
    int64_t bytes;               // of the keys and values of all sequences
};

// One query of one head.
struct Row {
    int64_t query, head, position;
    int64_t begin, end;  // the keys it may see, but for bits
    const int32_t* bits;
    float slope;
};

// Rows of a sequence count r = query · group + head within the group.
inline Row row_at(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t r) {
    const PagedAttention& a = s.a;
    Row row{r / s.group, kv_head * s.group + r % s.group, 0, 0, 0, nullptr, 0.0f};
    const int64_t position = row.position =
        a.positions ? at(a.positions, seq.batch, seq.q0 + row.query) : seq.keys - seq.queries + row.query;
    row.begin = a.window_left >= 0 ? clamp(position - a.window_left, 0, seq.keys) : 0;
    row.end = a.window_right >= 0 ? clamp(position + a.window_right + 1, 0, seq.keys) : seq.keys;
    if (seq.left_pad > row.begin) row.begin = seq.left_pad;
    if (a.bits) {
        const int64_t batch = a.bits.size[0] == 1 ? 0 : seq.batch;
        row.bits = static_cast<const int32_t*>(a.bits.data) + batch * a.bits.stride[0] +
                   (seq.q0 + row.query) * a.bits.stride[1];
    }
    if (a.alibi_slopes) {
        row.slope = static_cast<const float*>(
            a.alibi_slopes.data)[seq.number * a.alibi_slopes.stride[0] + row.head * a.alibi_slopes.stride[1]];
    }
    return row;
}

// Which keys of the tile that starts at `key` a row may see.
inline uint64_t visible(const Shape& s, const Sequence& seq, const Row& row, int64_t key) {
    static_assert(tile_keys == 64);
    const int64_t low = clamp(row.begin - key, 0, 64), high = clamp(row.end - key, 0, 64);
    if (low >= high) return 0;
    uint64_t mask = (high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1) & ~uint64_t{0} << low;
    if (!row.bits) return mask;
    const int64_t first = seq.keys - seq.queries;  // the key of bit 0
    for (int64_t j = clamp(first - key, 0, 64); j < high; ++j) {
        const int64_t t = key + j - first;
        if (!(static_cast<uint32_t>(row.bits[t / 32 * s.a.bits.stride[2]]) >> t % 32 & 1)) mask &= ~(uint64_t{1} << j);
    }
    return mask;
}

// Results over some of the keys: Σ 2^(logit - m) v, with logits in powers of 2, and the sum of those powers.
struct State {
    float *o, *m, *l;
    float* logits;  // of few rows, where column sums are asked for: row r of head h at (h · rows + r) · kept_stride
};
constexpr int64_t kept_stride = split_keys + line_floats;

struct Piece {
    int64_t sequence, head, heads, row, rows, key_begin, key_end;
    bool packed;  // products are those of packed.h
    State state;
    // Row r of head h is row h · pitch() + r of what a piece computes: rows of a head fill the products' tiles.
    int64_t pitch() const { return round_up(rows, 4); }
};

// Whether a piece reads a tile's rows in their order, as memory gives them: a few keys of all heads, then the next.
// Many rows read a head's at once, and so do those that wait for arithmetic: of 4-bit caches, or by short vectors.
inline bool in_order(const Shape& s, const Piece& piece) {
    const View<4>& cache = s.a.v_cache;
    const int64_t bytes = piece.heads * cache.size[3] * bytes_of(cache.dtype);
    return width == 16 && piece.rows <= 4 && cache.dtype != DType::u8 && bytes >= piece_bytes / 2;
}

// Whether the rows of a page follow each other, with none of another piece between them: where some are, these have a
// part of the first cache level alone, whose lines addresses choose.
inline bool fill_pages(const Shape& s, const Piece& piece) {
    const View<4>& cache = s.a.v_cache;
    return cache.stride[1] == piece.heads * cache.size[3];
}

METATE_FN int64_t lead_of(const Shape& s, const Piece& piece) {
    return fill_pages(s, piece) ? lead : short_lead;
}

// How much of a sequence is a piece: never by the number of workers or what else is in the batch. Few rows take some
// heads together, which lie side by side; very many are pieces enough without a split of the keys.
struct Cut {
    int64_t heads, rows, keys;
    bool packed;
};
Cut cut_of(const Shape& s, const Sequence& seq) {
    const int64_t rows = seq.queries * s.group, blocks = ceil_div(rows, packed_rows);
    if (rows <= piece_rows) return {s.heads, piece_rows, split_keys, false};
    const int64_t keys = blocks > 2 ? round_up(larger(seq.keys, 1), split_keys) : 4 * split_keys;
    return {1, round_up(ceil_div(rows, blocks), 4), keys, true};
}
// Where the rows of a tile lie: of the piece's first head, and the bytes to the next head; and what is asked for of
// those of all heads, in the order of memory.
struct Rows {
    const uint8_t* at[tile_keys];
    int64_t next_head;
    const uint8_t** batches;
    int64_t count;  // of batches
};

// Neighbouring keys of a tile that some row sees, in one page.
struct Span {
    int64_t first, count;
};

// The keys of a tile.
struct Tile {
    int64_t key, count;
    uint64_t some, mask[packed_rows];  // the keys that some row sees, that a row sees
    Slot slot[tile_keys];
    Span span[tile_keys];
    int64_t spans;
    Rows k, v;
};

struct Scratch {
    float *q, *p, *factor;
    float *q_step, *p_step;    // of rows of q and p where they are whole numbers
    float *k_scale, *v_scale;  // of the rows of a tile, a head after the other
    uint8_t* rows;             // room for rows whose elements do not stand side by side
    Tile* tile;
    Row* row;
    const uint8_t** batches;
    Prefetch* ahead;
    float* lanes;          // q, as multiply_keys_by_lanes takes it
    float *keys, *values;  // packed, of a block
};

// p_stride of a block.
METATE_FN int64_t packed_stride(const Shape& s) {
    return s.tiles * tile_keys + line_floats;
}

METATE_FN bool has_whole_numbers(const Shape& s, const Piece& piece) {
    return s.integers && !piece.packed;
}
// Calls run<S>() for what a cache holds.
template <class Run>
METATE_FN void with_cache(const PagedAttention& a, const Run& run) {
    if (a.k_cache.dtype == DType::i8) return run.template operator()<int8_t>();
    if (a.k_cache.dtype == DType::u8) return run.template operator()<nibbles>();
    if (a.k_cache.dtype == DType::f8) return run.template operator()<e4m3>();
    with_floats(a.k_cache.dtype, run);
}
// Calls run<W>() for what the products of a piece read a cache as: of many rows, of few, or of either.
template <class S, class Run>
METATE_FN void with_packed_products(const Run& run) {
    if constexpr (has_pairs<S>)
        run.template operator()<pairs<S>>();
    else
        run.template operator()<S>();
}
template <class S, class Run>
METATE_FN void with_row_products([[maybe_unused]] const Shape& s, const Run& run) {
    if constexpr (has_integers<S>) {
        if (only_bf16 || s.integers) return run.template operator()<whole<S>>();  // all machines with pairs have them
    }
    if constexpr (!has_integers<S> || !only_bf16) with_packed_products<S>(run);
}
template <class S, class Run>
METATE_FN void with_products(const Shape& s, const Piece& piece, const Run& run) {
    piece.packed ? with_packed_products<S>(run) : with_row_products<S>(s, run);
}

// Calls run<few>() for products of `rows` rows: how many values are read in turn, and about half as many keys; 0 where
// rows are not read in order. Fewer are read nearer to their order and cost more arithmetic: from memory that is
// faster, from a cache slower. Results are the same: sums of whole numbers, which become floats after `few` values,
// take 16 in either case, and rows of codes are short.
template <class W, int rows, class Run>
METATE_FN void with_order(const Shape& s, const Piece& piece, const Run& run) {
    constexpr bool is_codes = quantised<W> || is_whole<W> || is_pairs<W>;
    if constexpr (width == 16 && rows <= 4 && !has_nibbles<W>) {
        const bool from_memory = s.bytes > most_cached && fill_pages(s, piece);
        if (in_order(s, piece)) {
            if constexpr (is_codes) return run.template operator()<group_keys>();
            return from_memory ? run.template operator()<4>() : run.template operator()<8>();
        }
    }
    run.template operator()<0>();
}

inline Shape shape_of(const PagedAttention& a) {
    Shape s{a,
            1,
            1,
            a.q.size[3],
            a.out.size[3],
            0,
            0,
            false,
            false,
            false,
            1,
            static_cast<float>(a.scale),
            static_cast<float>(a.softcap),
            nullptr,
            0};
    s.group = a.q.size[2] / a.k_cache.size[2];
    s.plain = !(s.softcap > 0) && !a.alibi_slopes;
    with_cache(a, [&]<class S>() {
        s.heads = clamp(piece_bytes / larger(bytes_before<S>(s.d), 1), 1, smaller(max_heads, a.k_cache.size[2]));
        s.q_stride = quantised<S> ? round_up(s.d, 2 * block) : words_of_row<S>(s.d);
        s.o_stride = round_up(s.dv, quantised<S> ? 2 * block : block);
        constexpr int64_t budget = width == 16 ? 131072 : 65536;  // words: about half of the second cache level
        for (s.tiles = packed_tiles; s.tiles > 1 && s.tiles * tile_keys * (s.q_stride + s.o_stride) > budget;)
            s.tiles /= 2;
        s.integers = has_integers<S> && a.q.dtype != DType::f32 && isa() >= Isa::avx512vnni;
    });
    return s;
}

// At most, of the keys of a tile, or its values, and of their scales.
inline int64_t most_batches(const Shape& s) {
    const int64_t bytes = larger(s.a.k_cache.size[3], s.a.v_cache.size[3]) * bytes_of(s.a.k_cache.dtype);
    return tile_keys * s.heads * (ceil_div(bytes, Prefetch::batch_bytes) + 2);
}

inline Scratch take_scratch(const Shape& s, Arena& arena) {
    const int64_t rows = round_up(larger(s.heads * piece_rows, s.packs ? packed_rows : 0), width);
    const int64_t tiles = s.packs ? s.tiles : 1;
    Scratch my;
    my.q = arena.take<float>(rows * s.q_stride);
    my.lanes = arena.take<float>(s.heads * piece_rows * s.q_stride);
    my.p = arena.take<float>(piece_rows * larger(s.heads * p_stride, s.packs ? packed_stride(s) : 0));
    my.factor = arena.take<float>(rows);
    my.q_step = arena.take<float>(rows);
    my.p_step = arena.take<float>(rows);
    my.k_scale = arena.take<float>(larger(s.heads, tiles) * tile_keys);
    my.v_scale = arena.take<float>(larger(s.heads, tiles) * tile_keys);
    my.rows = arena.take<uint8_t>(tile_keys * max_key_dim * 4);
    my.tile = arena.take<Tile>(2 * tiles);
    const int64_t most = most_batches(s);
    const uint8_t** batches = arena.take<const uint8_t*>(4 * tiles * most);
    for (int64_t i = 0; arena.base && i < 2 * tiles; ++i) {
        my.tile[i].k.batches = batches + 2 * i * most;
        my.tile[i].v.batches = batches + (2 * i + 1) * most;
    }
    my.batches = arena.take<const uint8_t*>(Prefetch::last + 2 * tiles * most);
    my.row = arena.take<Row>(rows);
    my.ahead = arena.take<Prefetch>(1);
    if (s.packs) my.keys = arena.take<float>(tiles * tile_keys * s.q_stride);
    if (s.packs) my.values = arena.take<float>(tiles * tile_keys * s.o_stride);
    return my;
}

// Queries.

// Calls run<T>() for the elements of queries: those of the cache, unless it is quantised.
template <class S, class Run>
METATE_FN void with_queries(const Shape& s, const Run& run) {
    if constexpr (is_pairs<S>)
        run.template operator()<bf16>();
    else if constexpr (quantised<S> || is_whole<S>)
        with_floats(s.a.q.dtype, run);
    else
        run.template operator()<S>();
}

template <class T, class S>
void load_query(const Shape& s, const Sequence& seq, const Row& row, float* to) {
    const View<4>& q = s.a.q;
    const T* from = static_cast<const T*>(q.data) + seq.batch * q.stride[0] + (seq.q0 + row.query) * q.stride[1] +
                    row.head * q.stride[2];
    int64_t i = 0;
    if constexpr (has_bf16_dots<S> && __is_same(T, bf16)) {
        memset(to, 0, static_cast<size_t>(s.q_stride) * sizeof(float));
        T* line = reinterpret_cast<T*>(to);
        for (; i + 8 <= s.d && q.stride[3] == 1; i += 8) memcpy(line + place<S>(i), from + i, 8 * sizeof(T));
        for (; i < s.d; ++i) memcpy(line + place<S>(i), from + i * q.stride[3], sizeof(T));
        return;
    }
#if defined(METATE_HAS_VNNI_FORMS)
    if constexpr (__is_same(S, whole<int8_t>)) {
        memset(to, 0, static_cast<size_t>(s.q_stride) * sizeof(float));
        for (; q.stride[3] == 1 && i + block <= s.d; i += block) {
            vf even = load(from + i), odd = load(from + i + width);
            separate(even, odd);
            store(to + place<S>(i), even);
            store(to + place<S>(i + 1), odd);
        }
        for (; i < s.d; ++i) to[place<S>(i)] = to_float(from[i * q.stride[3]]);
        return;
    }
#endif
    for (; !in_pairs<S> && q.stride[3] == 1 && i + width <= s.d; i += width) store(to + i, load(from + i));
    if (q.stride[3] == 1 && in_pairs<T> && in_pairs<S>) {
        for (; i + block <= s.d; i += block) {
            vf a, b;
            read<T>(reinterpret_cast<const uint8_t*>(from + i), block, a, b);
            store(to + i, a);
            store(to + i + width, b);
        }
    }
    memset(to + i, 0, static_cast<size_t>(s.q_stride - i) * sizeof(float));
    for (; i < s.d; ++i) to[place<S>(i)] = to_float(from[i * q.stride[3]]);
}

// Tiles.

// Adds to what is asked for: of the keys of a tile that are seen, what lies at(key), `bytes` for each head. What
// follows in memory is one run, whose batches are written many at a time.
template <class At>
METATE_FN void ask_for(const Piece& piece, const Tile& tile, int64_t next_key, int64_t next_head, int64_t bytes,
                       Rows& rows, const At& at) {
    const int64_t heads = next_head == bytes ? 1 : piece.heads, length = heads == 1 ? piece.heads * bytes : bytes;
    const uint8_t *begin = nullptr, *end = nullptr, **to = rows.batches + rows.count;
    const auto close_run = [&] {
        const int64_t count = ceil_div(end - begin, Prefetch::batch_bytes);
        for (int64_t i = 0; i < count; ++i) to[i] = begin + i * Prefetch::batch_bytes;
        to += count;
    };
    const auto add = [&](const uint8_t* p, int64_t size) {
        if (p != end) {
            close_run();
            begin = p;
        }
        end = p + size;
    };
    for (int64_t i = 0; i < tile.spans; ++i) {
        const Span span = tile.span[i];
        const uint8_t* p = at(span.first);
        const bool whole = heads == 1 && next_key == length;
        if (whole) add(p, span.count * length);
        for (int64_t j = 0; !whole && j < span.count; ++j, p += next_key) {
            for (int64_t h = 0; h < heads; ++h) add(p + h * next_head, length);
        }
    }
    close_run();
    rows.count = to - rows.batches;
}

// A key that no query sees takes the place of one that is seen: its row may be read, and its weight is 0.
METATE_FN void place_rows(const View<4>& cache, const Piece& piece, const Tile& tile, Rows& rows) {
    const int64_t bytes = bytes_of(cache.dtype), next_key = cache.stride[1] * bytes;
    const uint8_t* const seen = row_of(cache, tile.slot[tile.span[0].first], piece.head);
    if (~tile.some) {
        for (const uint8_t*& at : rows.at) at = seen;
    }
    for (int64_t i = 0; i < tile.spans; ++i) {
        const Span span = tile.span[i];
        const uint8_t* const at = row_of(cache, tile.slot[span.first], piece.head);
        for (int64_t j = 0; j < span.count; ++j) rows.at[span.first + j] = at + j * next_key;
    }
    rows.next_head = cache.stride[2] * bytes;
    ask_for(piece, tile, next_key, rows.next_head, cache.size[3] * bytes, rows, [&](int64_t j) { return rows.at[j]; });
}

// Finds the pages of the keys that are seen.
inline void place_keys(const Shape& s, const Sequence& seq, Tile& tile) {
    const int64_t page_size = s.a.k_cache.size[1];
    const auto* table = static_cast<const int32_t*>(s.a.block_table.data) + seq.number * s.a.block_table.stride[0];
    tile.spans = 0;
    for (uint64_t left = tile.some; left;) {
        const int64_t first = __builtin_ctzll(left), page = (tile.key + first) / page_size;
        const int64_t row = tile.key + first - page * page_size, number = table[page * s.a.block_table.stride[1]];
        const uint64_t unseen = ~(left >> first);
        const int64_t count = smaller(unseen ? __builtin_ctzll(unseen) : tile_keys, page_size - row);
        for (int64_t i = 0; i < count; ++i) tile.slot[first + i] = {number, row + i};
        tile.span[tile.spans++] = {first, count};
        left = first + count < tile_keys ? left & ~uint64_t{0} << (first + count) : 0;
    }
    for (uint64_t left = ~tile.some; left; left &= left - 1)
        tile.slot[__builtin_ctzll(left)] = tile.slot[tile.span[0].first];
}

// Of the keys of a piece those that some row sees, and those that all rows see.
struct Range {
    int64_t begin, end, all_begin, all_end;
};

inline Range range_of(const Sequence& seq, const Row* row, const Piece& piece) {
    Range range{piece.key_end, 0, 0, piece.key_end};
    for (int64_t r = 0; r < piece.rows; ++r) {
        range.all_begin = larger(row[r].begin, range.all_begin);
        range.all_end = smaller(row[r].bits ? smaller(seq.keys - seq.queries, row[r].end) : row[r].end, range.all_end);
        if (row[r].begin >= row[r].end) continue;
        range.begin = smaller(row[r].begin, range.begin);
        range.end = larger(row[r].end, range.end);
    }
    range.begin = larger(range.begin, piece.key_begin);
    range.end = smaller(range.end, piece.key_end);
    return range;
}

inline void place_tile(const Shape& s, const Sequence& seq, const Row* row, const Piece& piece, const Range& range,
                       int64_t key, Tile& tile) {
    tile.key = key;
    tile.count = smaller(range.end - key, tile_keys);
    tile.some = 0;
    tile.k.count = tile.v.count = 0;
    if (tile.count <= 0) return;
    const bool all = range.all_begin <= key && key + tile_keys <= range.all_end;
    for (int64_t r = 0; r < piece.rows; ++r)
        tile.some |= tile.mask[r] = all ? ~uint64_t{0} : visible(s, seq, row[r], key);
    if (!tile.some) return;
    place_keys(s, seq, tile);
    if (s.a.k_scale) {
        constexpr auto bytes = static_cast<int64_t>(sizeof(float));
        const View<3>* const both[] = {&s.a.k_scale, &s.a.v_scale};  // which are read together, after the keys
        for (const View<3>* scales : both) {
            ask_for(piece, tile, scales->stride[1] * bytes, scales->stride[2] * bytes, bytes, tile.k, [&](int64_t j) {
                return reinterpret_cast<const uint8_t*>(scale_at(*scales, tile.slot[j], piece.head));
            });
        }
    }
    place_rows(s.a.k_cache, piece, tile, tile.k);
    place_rows(s.a.v_cache, piece, tile, tile.v);
}

// The first keys of another piece, to be asked for: those that its first row sees.
inline void place_first_tile(const Shape& s, Piece piece, Tile& tile) {
    piece.rows = 1;
    const Sequence seq = sequence_of(s.a, piece.sequence);
    const Row row = row_at(s, seq, piece.head, piece.row);
    const Range range = range_of(seq, &row, piece);
    place_tile(s, seq, &row, piece, range, range.begin / tile_keys * tile_keys, tile);
}

// `count` rows from `first` on; copies where elements do not stand side by side.
template <class S>
METATE_FN Lines lines_of(const View<4>& cache, const Rows& rows, int64_t h, int64_t first, int64_t count, uint8_t* room,
                         const uint8_t** copies) {
    if (cache.stride[3] == 1) return {rows.at + first, h * rows.next_head};
    const int64_t columns = cache.size[3];
    for (int64_t j = 0; j < count; ++j) {
        const S* from = reinterpret_cast<const S*>(rows.at[first + j] + h * rows.next_head);
        S* line = reinterpret_cast<S*>(room) + j * columns;
        for (int64_t i = 0; i < columns; ++i) line[i] = from[i * cache.stride[3]];
        copies[j] = reinterpret_cast<const uint8_t*>(line);
    }
    return {copies, 0};
}

// Scales of the rows of a tile, of keys and of values, 0 where nothing is seen.
__attribute__((noinline)) void gather_scales(const Shape& s, const Piece& piece, const Tile& tile, const Scratch& my) {
    constexpr int columns = 2 * max_heads;
    static_assert(columns % width == 0);
    alignas(64) float lines[tile_keys][columns];  // heads' scales of a key, then of its value
    const View<3>* const scales[] = {&s.a.k_scale, &s.a.v_scale};
    for (int i = 0; i < 2; ++i) {
        const bool whole = piece.heads == max_heads && scales[i]->stride[2] == 1;
        for (int64_t j = 0; j < tile_keys; ++j) {
            const float* from = scale_at(*scales[i], tile.slot[j], piece.head);
            float* to = lines[j] + i * max_heads;
            if (whole)
                memcpy(to, from, max_heads * sizeof(float));
            else
                for (int64_t h = 0; h < piece.heads; ++h) to[h] = from[h * scales[i]->stride[2]];
        }
    }
    for (int64_t j = 0; j < tile_keys; j += width) {
        const vm seen = mask_of(static_cast<uint32_t>(tile.some >> j));
        for (int64_t c = 0; c < columns; c += width) {
            vf rows[width];
            for (int i = 0; i < width; ++i) rows[i] = load(lines[j + i] + c);
            transpose(rows);
            for (int64_t i = 0; i < width; ++i) {
                const int64_t h = (c + i) % max_heads;
                if (h >= piece.heads) continue;
                float* to = c + i < max_heads ? my.k_scale : my.v_scale;
                store(to + h * tile_keys + j, select(seen, rows[i], splat(0.0f)));
            }
        }
    }
}

// The logits, as powers of 2, of a row over a tile, in place of its products, which count in `step`; -inf where it does
// not see.
inline void to_logits(const Shape& s, const Row& row, uint64_t mask, int64_t key, float step, const float* scales,
                      float* x) {
    const float scale = s.plain ? static_cast<float>(s.a.scale * 1.4426950408889634) : s.scale;
    for (int j = 0; j < tile_keys; j += width) {
        vf y = load(x + j);
        if (step != 1.0f) y = y * splat(step);
        if (scales) y = y * load(scales + j);
        y = y * splat(scale);
        if (!s.plain) {
            if (s.softcap > 0) y = tanh(y / splat(s.softcap)) * splat(s.softcap);
            const auto ahead = static_cast<int32_t>(row.position - key - j);
            y = y - splat(row.slope) * to_float(abs(sub(splat(ahead), lanes())));
            y = y * splat(log2_e);
        }
        store(x + j, select(mask_of(static_cast<uint32_t>(mask >> j)), y, splat(-INFINITY)));
    }
}

// How many words of a row a lane takes where keys are multiplied by lanes, else 0: a sequence's rows alone decide.
template <class S>
METATE_FN int words_of_lane(const Shape& s, int64_t rows) {
    const int64_t words = words_of_row<S>(s.d);
    const bool fits = s.d == words * elements_of_word<S> && words <= most_lane_words;
    if (!has_lanes<S> || rows <= 4 || !fits) return 0;
    return rows > width / 2 ? 1 : 2;
}

// Queries of a head for products by lanes.
template <int words>
void spread_queries(const Shape& s, const float* q, int64_t rows, float* to) {
    memset(to, 0, static_cast<size_t>(s.q_stride * width / words) * sizeof(float));
    for (int64_t word = 0; word < s.q_stride; word += words, to += width) {
        for (int64_t r = 0; r < rows; ++r) memcpy(to + r * words, q + r * s.q_stride + word, words * sizeof(float));
    }
}

// Rows and queries of a piece.
template <class S>
void begin_piece(const Shape& s, const Sequence& seq, const Piece& piece, const Scratch& my) {
    const int64_t pitch = piece.pitch();
    const bool whole_numbers = has_whole_numbers(s, piece);
    for (int64_t h = 0; h < piece.heads; ++h) {
        float* q = my.q + h * pitch * s.q_stride;
        for (int64_t r = 0; r < piece.rows; ++r) {
            const Row& row = my.row[h * piece_rows + r] = row_at(s, seq, piece.head + h, piece.row + r);
            with_products<S>(s, piece, [&]<class W>() {
                with_queries<W>(s, [&]<class T>() { load_query<T, W>(s, seq, row, q + r * s.q_stride); });
            });
        }
        memset(q + piece.rows * s.q_stride, 0, static_cast<size_t>((pitch - piece.rows) * s.q_stride) * sizeof(float));
        const int each = piece.packed ? 0 : words_of_lane<S>(s, piece.rows);
        float* const lanes = my.lanes + h * piece_rows * s.q_stride;
        if (each == 1) spread_queries<1>(s, q, piece.rows, lanes);
        if (each == 2) spread_queries<2>(s, q, piece.rows, lanes);
        if constexpr (has_integers<S>) {
            if (whole_numbers) to_whole<S>(q, s.q_stride, pitch, s.q_stride, my.q_step + h * pitch);
        }
    }
}

// Tiles one after the other, or blocks of them, of which keys are read, then values. What is packed is asked for at
// once, while what comes before it is computed.
struct Stream {
    const Tile *tile, *next;
    int64_t tiles;
    bool has_values;

    // Starts to ask, in `steps` steps, for what is read after the keys of a tile, or after its values.
    void advance(const Shape& s, const Piece& piece, bool after_values, int64_t steps, const Scratch& my) const {
        const auto add = [&](const Rows& rows, int64_t first, int64_t last) {
            my.ahead->add(rows.batches + smaller(first, rows.count),
                          smaller(last, rows.count) - smaller(first, rows.count));
        };
        my.ahead->clear();
        if (in_order(s, piece)) {
            const int64_t n = lead_of(s, piece);
            add(after_values ? tile->v : tile->k, n, INT64_MAX);
            add(after_values || !has_values ? next->k : tile->v, 0, n);
        } else {
            for (int64_t t = 0; t < tiles && (after_values || !has_values); ++t) {
                add(next[t].k, 0, INT64_MAX);
                if (piece.packed && has_values) add(next[t].v, 0, INT64_MAX);
            }
            if (!after_values && has_values) add(tile->v, 0, INT64_MAX);
        }
        my.ahead->begin(steps);
    }
};

// Runs body(stream) for the tiles of a piece, or its blocks, which asks for the keys of a following one in the end.
template <class S, class Body>
void for_tiles(const Shape& s, const Sequence& seq, const Piece& piece, const Piece* following, bool has_values,
               const Scratch& my, const Body& body) {
    begin_piece<S>(s, seq, piece, my);
    const Range range = range_of(seq, my.row, piece);
    const int64_t tiles = piece.packed ? s.tiles : 1, keys = tiles * tile_keys;
    Tile *tile = my.tile, *next = my.tile + tiles;
    const auto place = [&](int64_t key, Tile* to) {
        for (int64_t t = 0; t < tiles; ++t) place_tile(s, seq, my.row, piece, range, key + t * tile_keys, to[t]);
    };
    const int64_t begin = range.begin / keys * keys;
    place(begin, tile);
    const Rows& asked = tile->k;
    my.ahead->start(my.batches, asked.batches,
                    in_order(s, piece) ? smaller(lead_of(s, piece), asked.count) : asked.count);
    for (int64_t key = begin; key < range.end; key += keys) {
        place(key + keys, next);
        if (key + keys >= range.end && following) place_first_tile(s, *following, *next);
        uint64_t some = 0;
        for (int64_t t = 0; t < tiles; ++t) some |= tile[t].some;
        if (some) body(Stream{tile, next, tiles, has_values});
        Tile* done = tile;
        tile = next;
        next = done;
    }
}

METATE_FN Softmax& softmax_at(const Shape& s, const Sequence& seq, int64_t query, int64_t head) {
    const View<4>& q = s.a.q;
    return s.softmax[(seq.batch * q.size[2] + head) * q.size[1] + seq.q0 + query];
}

METATE_FN float sink_of(const PagedAttention& a, const Sequence& seq, int64_t query, int64_t head) {
    const View<3>& sinks = a.sinks;
    const int64_t place = seq.batch * sinks.stride[0] + head * sinks.stride[1] + (seq.q0 + query) * sinks.stride[2];
    return sinks ? static_cast<const float*>(sinks.data)[place] : -INFINITY;
}

METATE_FN float* lse_at(const PagedAttention& a, const Sequence& seq, int64_t query, int64_t head) {
    return static_cast<float*>(a.lse.data) + seq.batch * a.lse.stride[0] + head * a.lse.stride[1] +
           (seq.q0 + query) * a.lse.stride[2];
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
