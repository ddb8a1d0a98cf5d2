// Attention over a paged cache. The keys of a sequence are split at fixed positions; a piece of work is a few query
// rows of some neighbouring heads over one split, taken a tile of keys at a time. What the splits of a row found is
// merged in their order.
#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "tile.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t split_keys = 512, piece_rows = 16, line_floats = 16;
constexpr int64_t piece_bytes = 2048;  // of neighbouring heads in a row of keys: long enough to stream
constexpr int max_heads = 8;
static_assert(split_keys % tile_keys == 0 && piece_rows % 4 == 0);

METATE_FN constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
METATE_FN constexpr int64_t round_up(int64_t n, int64_t by) {
    return ceil_div(n, by) * by;
}
METATE_FN int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

// What the whole call shares.
struct Shape {
    const PagedAttention& a;
    int64_t group, heads;  // query heads of a key head; key heads of a piece
    int64_t d, dv;
    int64_t q_stride, o_stride;  // floats of a row of q, of a row of results
    bool plain;                  // logits are products times scale and nothing else
    float scale, softcap;        // exp(logit) = 2^(scale · product) if plain
};

// One query of one head.
struct Row {
    int64_t query, head;
    int64_t begin, end;  // the keys it may see, but for bits
    const int32_t* bits;
    float slope;
};

// Rows of a sequence count r = query · group + head within the group.
Row row_at(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t r) {
    const PagedAttention& a = s.a;
    Row row{r / s.group, kv_head * s.group + r % s.group, 0, 0, nullptr, 0.0f};
    const int64_t position = seq.keys - seq.queries + row.query;
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
uint64_t visible(const Shape& s, const Sequence& seq, const Row& row, int64_t key) {
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
};

struct Piece {
    int64_t sequence, head, heads, row, rows, key_begin, key_end;
    State state;  // row r of head h is its row h · state_rows(rows) + r
};

// Where the rows of a tile lie: of the piece's first head, and the bytes to the next head.
struct Rows {
    const uint8_t* at[tile_keys];
    int64_t next_head;
};

// The keys of a tile.
struct Tile {
    int64_t key, count;
    uint64_t some, mask[piece_rows];  // the keys that some row sees, that a row sees
    Slot slot[tile_keys];
    Rows k, v;
};

struct Scratch {
    float *q, *p, *weight;
    uint8_t* rows;  // room for rows whose elements do not stand side by side
    Tile* tile;
    Row* row;
    Run* runs;
    Ahead* ahead;
};

constexpr int64_t p_stride = tile_keys + line_floats;

template <class S>
Shape shape_of(const PagedAttention& a) {
    Shape s{
        a, 1, 1, a.q.size[3], a.out.size[3], 0, 0, false, static_cast<float>(a.scale), static_cast<float>(a.softcap)};
    s.group = a.q.size[2] / a.k_cache.size[2];
    s.heads = clamp(piece_bytes / (bytes_before<S>(s.d) + 1), 1, at_most(max_heads, a.k_cache.size[2]));
    s.q_stride = round_up(s.d, block);
    s.o_stride = round_up(s.dv, block);
    s.plain = !(s.softcap > 0) && !a.alibi_slopes;
    return s;
}

Scratch take_scratch(const Shape& s, Arena& arena) {
    Scratch my;
    my.q = arena.take<float>(s.heads * piece_rows * s.q_stride);
    my.p = arena.take<float>(piece_rows * p_stride);
    my.weight = arena.take<float>(piece_rows * p_stride);
    my.rows = arena.take<uint8_t>(tile_keys * max_head_dim * 4);
    my.tile = arena.take<Tile>(2);
    my.row = arena.take<Row>(s.heads * piece_rows);
    my.runs = arena.take<Run>(2 * tile_keys * s.heads);
    my.ahead = arena.take<Ahead>(1);
    return my;
}

// Queries.

template <class T, class S>
void load_query(const Shape& s, const Sequence& seq, const Row& row, float* to) {
    const View<4>& q = s.a.q;
    const T* from = static_cast<const T*>(q.data) + seq.batch * q.stride[0] + (seq.q0 + row.query) * q.stride[1] +
                    row.head * q.stride[2];
    memset(to, 0, static_cast<size_t>(s.q_stride) * sizeof(float));
    for (int64_t i = 0; i < s.d; ++i) to[place<S>(i)] = to_float(from[i * q.stride[3]]);
}

// Tiles.

template <class S>
void place_rows(const View<4>& cache, int64_t head, const Tile& tile, Rows& rows) {
    for (int64_t j = 0; j < tile_keys; ++j) rows.at[j] = row_of<S>(cache, tile.slot[j], head);
    rows.next_head = cache.stride[2] * static_cast<int64_t>(sizeof(S));
}

// A key that no query sees takes the place of one that is seen: its row may be read, and its weight is 0.
template <class S>
void place_tile(const Shape& s, const Sequence& seq, const Row* row, const Piece& piece, int64_t key, int64_t end,
                Tile& tile) {
    tile.key = key;
    tile.count = at_most(end - key, tile_keys);
    tile.some = 0;
    for (int64_t r = 0; r < piece.rows; ++r) tile.some |= tile.mask[r] = visible(s, seq, row[r], key);
    if (!tile.some) return;
    const int64_t page_size = s.a.k_cache.size[1], seen = __builtin_ctzll(tile.some);
    const auto* table = static_cast<const int32_t*>(s.a.block_table.data) + seq.number * s.a.block_table.stride[0];
    int64_t page = (key + seen) / page_size, at = (key + seen) % page_size;
    for (int64_t j = seen; j < tile.count; ++j, ++at) {
        if (at == page_size) {
            at = 0;
            ++page;
        }
        if (tile.some >> j & 1) tile.slot[j] = {table[page * s.a.block_table.stride[1]], at};
    }
    for (int64_t j = 0; j < tile_keys; ++j) {
        if (!(tile.some >> j & 1)) tile.slot[j] = tile.slot[seen];
    }
    place_rows<S>(s.a.k_cache, piece.head, tile, tile.k);
    place_rows<S>(s.a.v_cache, piece.head, tile, tile.v);
}

// Copies of the rows of one head whose elements do not stand side by side.
template <class S>
void copy_rows(const View<4>& cache, const Rows& rows, int64_t h, uint8_t* to, const uint8_t** at) {
    const int64_t columns = cache.size[3];
    for (int64_t j = 0; j < tile_keys; ++j) {
        const S* from = reinterpret_cast<const S*>(rows.at[j] + h * rows.next_head);
        S* line = reinterpret_cast<S*>(to) + j * columns;
        for (int64_t i = 0; i < columns; ++i) line[i] = from[i * cache.stride[3]];
        at[j] = reinterpret_cast<const uint8_t*>(line);
    }
}

// Scales of the rows of a tile, 0 where nothing is seen.
void gather_scales(const View<3>& scales, int64_t head, const Tile& tile, float* to) {
    for (int64_t j = 0; j < tile_keys; ++j) {
        to[j] = j < tile.count && tile.some >> j & 1 ? scale_of(scales, tile.slot[j], head) : 0.0f;
    }
}

// The logits, as powers of 2, of a row over a tile, in place of its products; -inf where it does not see.
template <class S>
void to_logits(const Shape& s, const Sequence& seq, const Row& row, uint64_t mask, int64_t key, const float* scales,
               float* x) {
    const float scale = s.plain ? static_cast<float>(s.a.scale * 1.4426950408889634) : s.scale;
    for (int j = 0; j < tile_keys; j += width) {
        vf y = load(x + j);
        if constexpr (unit<S> != 1.0f) y = y * splat(unit<S>);
        if (scales) y = y * load(scales + j);
        y = y * splat(scale);
        if (!s.plain) {
            if (s.softcap > 0) y = tanh(y / splat(s.softcap)) * splat(s.softcap);
            const auto ahead = static_cast<int32_t>(seq.keys - seq.queries + row.query - key - j);
            y = y - splat(row.slope) * to_float(abs(sub(splat(ahead), lanes())));
            y = y * splat(log2_e);
        }
        store(x + j, select(mask_of(static_cast<uint32_t>(mask >> j)), y, splat(-INFINITY)));
    }
}

// Turns logits into 2^(logit - m) for the new maximum m, and returns by which factor old results shrink.
float exponentials(float* x, float& m, float& l) {
    constexpr int vectors = tile_keys / width;
    vf top = load(x);
    for (int j = width; j < tile_keys; j += width) top = max(load(x + j), top);
    const float highest = largest(top), old = m;
    if (highest > m) m = highest;
    const float reference = m == -INFINITY ? 0.0f : m;
    vf total = splat(0.0f);
    constexpr int batch = vectors < 4 ? vectors : 4;
    for (int j = 0; j < tile_keys; j += batch * width) {
        vf y[batch];
#pragma GCC unroll 4
        for (int i = 0; i < batch; ++i) y[i] = load(x + j + i * width) - splat(reference);
        exp2(y);
#pragma GCC unroll 4
        for (int i = 0; i < batch; ++i) {
            total = total + y[i];
            store(x + j + i * width, y[i]);
        }
    }
    const float factor = exp2f(old - reference);
    l = l * factor + sum(total);
    return factor;
}

// The products of a tile's keys with the rows of a piece, as logits.
template <class S>
void find_logits(const Shape& s, const Sequence& seq, const Piece& piece, int64_t h, const Tile& tile,
                 const Scratch& my) {
    const uint8_t *copies[tile_keys], *const *keys = tile.k.at;
    const int64_t head = piece.head + h;
    const float* q = my.q + h * piece_rows * s.q_stride;
    int64_t offset = h * tile.k.next_head;
    if (s.a.k_cache.stride[3] != 1) {
        copy_rows<S>(s.a.k_cache, tile.k, h, my.rows, copies);
        keys = copies;
        offset = 0;
    }
    for_row_tiles(piece.rows, [&]<int n>(int64_t r) {
        multiply_tile_keys<S, n>(keys, offset, tile.count, q + r * s.q_stride, s.q_stride, s.d, my.p + r * p_stride,
                                 p_stride, *my.ahead);
    });
    alignas(64) float scales[tile_keys];
    if (s.a.k_scale) gather_scales(s.a.k_scale, head, tile, scales);
    for (int64_t r = 0; r < piece.rows; ++r) {
        const Row& row = my.row[h * piece_rows + r];
        to_logits<S>(s, seq, row, tile.mask[r], tile.key, s.a.k_scale ? scales : nullptr, my.p + r * p_stride);
    }
}

// Whether what the values of a tile stand for is finite, or every row sees all of them: then a weight of 0 hides one.
template <class S>
bool are_safe(const Shape& s, const Piece& piece, const Tile& tile, const uint8_t* const* values, int64_t offset,
              const float* scales) {
    bool is_mixed = false;
    for (int64_t r = 0; r < piece.rows; ++r) is_mixed |= tile.mask[r] != tile.some;
    if (!is_mixed) return true;
    vf poison = splat(0.0f);  // NaN once a number is not finite
    for (uint64_t left = tile.some; left; left &= left - 1) {
        const int j = __builtin_ctzll(left);
        if (scales) poison = fma(splat(scales[j]), splat(0.0f), poison);
        for (int64_t c = 0; c < s.dv; c += block) {
            vf a, b;
            read<S>(values[j] + (offset + bytes_before<S>(c)), at_most(s.dv - c, block), a, b);
            poison = fma(a, splat(0.0f), fma(b, splat(0.0f), poison));
        }
    }
    return sum(poison) == 0.0f;
}

// What multiply_tile_values adds, a row at a time and of the keys that it sees alone.
template <class S>
void multiply_seen_values(const Shape& s, const Piece& piece, const Tile& tile, const uint8_t* const* values,
                          int64_t offset, const float* p, float* o, const float* factor, Ahead& ahead) {
    for (int64_t r = 0; r < piece.rows; ++r) {
        if (!tile.mask[r]) continue;
        const uint8_t* seen[tile_keys];
        float weight[tile_keys];
        for (int j = 0; j < tile_keys; ++j) {
            const bool is_seen = tile.mask[r] >> j & 1;
            seen[j] = values[is_seen ? j : __builtin_ctzll(tile.mask[r])];
            weight[j] = is_seen ? p[r * p_stride + j] : 0.0f;
        }
        multiply_tile_values<S, 1>(seen, offset, tile.count, weight, p_stride, s.dv, o + r * s.o_stride, s.o_stride,
                                   factor + r, ahead);
    }
}

template <class S>
void add_tile(const Shape& s, const Sequence& seq, const Piece& piece, int64_t h, const Tile& tile, const Scratch& my) {
    find_logits<S>(s, seq, piece, h, tile, my);
    const uint8_t *copies[tile_keys], *const *values = tile.v.at;
    const int64_t head = piece.head + h, first = h * round_up(piece.rows, 4);
    float factor[piece_rows] = {};
    for (int64_t r = 0; r < piece.rows; ++r) {
        factor[r] = exponentials(my.p + r * p_stride, piece.state.m[first + r], piece.state.l[first + r]);
    }
    const float* p = my.p;
    alignas(64) float scales[tile_keys];
    if (s.a.v_scale) {
        gather_scales(s.a.v_scale, head, tile, scales);
        for (int64_t r = 0; r < piece.rows; ++r) {
            for (int j = 0; j < tile_keys; j += width) {
                store(my.weight + r * p_stride + j, load(my.p + r * p_stride + j) * load(scales + j));
            }
        }
        p = my.weight;
    }
    int64_t offset = h * tile.v.next_head;
    if (s.a.v_cache.stride[3] != 1) {
        copy_rows<S>(s.a.v_cache, tile.v, h, my.rows, copies);
        values = copies;
        offset = 0;
    }
    float* const o = piece.state.o + first * s.o_stride;
    if (!are_safe<S>(s, piece, tile, values, offset, s.a.v_scale ? scales : nullptr)) {
        return multiply_seen_values<S>(s, piece, tile, values, offset, p, o, factor, *my.ahead);
    }
    for_row_tiles(piece.rows, [&]<int n>(int64_t r) {
        multiply_tile_values<S, n>(values, offset, tile.count, p + r * p_stride, p_stride, s.dv, o + r * s.o_stride,
                                   s.o_stride, factor + r, *my.ahead);
    });
}

// Pieces.

State take_state(const Shape& s, int64_t heads, int64_t rows, Arena& arena) {
    const int64_t count = heads * round_up(rows, 4);
    return {arena.take<float>(count * s.o_stride), arena.take<float>(count), arena.take<float>(count)};
}

// Where keys are split: never by the number of workers or what else is in the batch. Many rows are pieces enough, and
// read the keys once.
int64_t split_of(const Shape& s, const Sequence& seq) {
    return seq.queries * s.group <= piece_rows ? split_keys : round_up(seq.keys, split_keys);
}
int64_t splits_of(const Shape& s, const Sequence& seq) {
    return seq.keys ? ceil_div(seq.keys, split_of(s, seq)) : 0;
}

// Calls run(piece) for the pieces of a sequence: split after split, so that a worker streams.
template <class Run>
void for_pieces_of(const Shape& s, const Sequence& seq, const Run& run) {
    const int64_t rows = seq.queries * s.group, kv_heads = s.a.k_cache.size[2], keys = split_of(s, seq);
    for (int64_t key = 0; key < seq.keys; key += keys) {
        for (int64_t head = 0; head < kv_heads; head += s.heads) {
            for (int64_t r = 0; r < rows; r += piece_rows) {
                run(Piece{seq.number,
                          head,
                          at_most(kv_heads - head, s.heads),
                          r,
                          at_most(rows - r, piece_rows),
                          key,
                          key + keys,
                          {}});
            }
        }
    }
}

// The keys that some row of a piece sees, from a whole tile on.
void range_of(const Row* row, const Piece& piece, int64_t& begin, int64_t& end) {
    begin = piece.key_end;
    end = 0;
    for (int64_t r = 0; r < piece.rows; ++r) {
        if (row[r].begin >= row[r].end) continue;
        begin = at_most(row[r].begin, begin);
        if (row[r].end > end) end = row[r].end;
    }
    begin = (begin > piece.key_begin ? begin : piece.key_begin) / tile_keys * tile_keys;
    end = at_most(end, piece.key_end);
}

// Rows and queries of a piece, and scratch without anything that could be NaN.
template <class T, class S>
void begin_piece(const Shape& s, const Sequence& seq, const Piece& piece, const Scratch& my) {
    const auto clear = [](auto* at, int64_t count) { memset(at, 0, static_cast<size_t>(count) * sizeof *at); };
    clear(my.q, s.heads * piece_rows * s.q_stride);
    clear(my.p, piece_rows * p_stride);
    clear(my.weight, piece_rows * p_stride);
    for (int64_t h = 0; h < piece.heads; ++h) {
        for (int64_t r = 0; r < piece.rows; ++r) {
            const Row& row = my.row[h * piece_rows + r] = row_at(s, seq, piece.head + h, piece.row + r);
            load_query<T, S>(s, seq, row, my.q + (h * piece_rows + r) * s.q_stride);
        }
    }
}

// The rows of a tile of keys as runs of memory: heads that lie beside each other are one. Returns the end of the runs.
template <class S>
Run* runs_of(const View<4>& cache, const Rows& rows, const Piece& piece, const Tile& tile, Run* to) {
    const int64_t bytes = cache.size[3] * static_cast<int64_t>(sizeof(S)), heads = piece.heads;
    const bool beside = cache.stride[3] == 1 && cache.stride[2] == cache.size[3];
    for (int64_t j = 0; j < tile.count; ++j) {
        if (!(tile.some >> j & 1)) continue;
        for (int64_t h = 0; h < heads; h += beside ? heads : 1) {
            *to++ = {rows.at[j] + h * rows.next_head, ceil_div(beside ? heads * bytes : bytes, 64)};
        }
    }
    return to;
}

// How often the products of a tile ask for lines that will be read.
int64_t steps_of(const Shape& s, const Piece& piece, const Tile& tile) {
    int64_t steps = 0;
    for_row_tiles(piece.rows, [&]<int n>(int64_t) {
        steps +=
            ceil_div(tile.count, width / n) * ceil_div(s.d, block) + tile.count * ceil_div(s.dv, blocks_of<n> * block);
    });
    return piece.heads * steps;
}

// Runs body(head, tile) for the tiles and heads of a piece; meanwhile the next tile comes into the second cache.
template <class T, class S, class Body>
void for_tiles(const Shape& s, const Sequence& seq, const Piece& piece, const Scratch& my, const Body& body) {
    begin_piece<T, S>(s, seq, piece, my);
    int64_t begin, end;
    range_of(my.row, piece, begin, end);
    Tile *tile = my.tile, *next = my.tile + 1;
    if (begin < end) place_tile<S>(s, seq, my.row, piece, begin, end, *tile);
    for (int64_t key = begin; key < end; key += tile_keys) {
        next->some = 0;
        if (key + tile_keys < end) place_tile<S>(s, seq, my.row, piece, key + tile_keys, end, *next);
        Run* runs = my.runs;
        if (next->some) {
            runs = runs_of<S>(s.a.k_cache, next->k, piece, *next, runs);
            runs = runs_of<S>(s.a.v_cache, next->v, piece, *next, runs);
        }
        int64_t lines = 0;
        for (const Run* run = my.runs; run != runs; ++run) lines += run->lines;
        my.ahead->begin(my.runs, runs - my.runs, lines, steps_of(s, piece, *tile));
        for (int64_t h = 0; h < piece.heads && tile->some; ++h) body(h, *tile);
        Tile* done = tile;
        tile = next;
        next = done;
    }
}

template <class T, class S>
void run_piece(const Shape& s, const Piece& piece, const Scratch& my) {
    const int64_t rows = piece.heads * round_up(piece.rows, 4);
    memset(piece.state.o, 0, static_cast<size_t>(rows * s.o_stride) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        piece.state.m[r] = -INFINITY;
        piece.state.l[r] = 0.0f;
    }
    const Sequence seq = sequence_of(s.a, piece.sequence);
    for_tiles<T, S>(s, seq, piece, my, [&](int64_t h, const Tile& tile) { add_tile<S>(s, seq, piece, h, tile, my); });
}

// Results.

template <class T>
void store_out(const Shape& s, const Sequence& seq, int64_t query, int64_t head, const float* o) {
    const View<4>& out = s.a.out;
    T* to =
        static_cast<T*>(out.data) + seq.batch * out.stride[0] + (seq.q0 + query) * out.stride[1] + head * out.stride[2];
    for (int64_t c = 0; c < s.dv; ++c) to[c * out.stride[3]] = from_float<T>(o[c]);
}

METATE_FN float* lse_at(const PagedAttention& a, const Sequence& seq, int64_t query, int64_t head) {
    return static_cast<float*>(a.lse.data) + seq.batch * a.lse.stride[0] + head * a.lse.stride[1] +
           (seq.q0 + query) * a.lse.stride[2];
}

// Merges what the splits found for the rows of the first piece; later splits are `step` pieces apart.
template <class T, class S>
void merge(const Shape& s, const Piece* piece, int64_t splits, int64_t step) {
    const Sequence seq = sequence_of(s.a, piece->sequence);
    alignas(64) float o[max_head_dim + 2 * block], line[max_head_dim + 2 * block];
    for (int64_t i = 0; i < piece->heads * piece->rows; ++i) {
        const int64_t h = i / piece->rows, r = i % piece->rows, at = h * round_up(piece->rows, 4) + r;
        const int64_t query = (piece->row + r) / s.group,
                      head = (piece->head + h) * s.group + (piece->row + r) % s.group;
        float sink = -INFINITY;
        if (s.a.sinks) sink = static_cast<const float*>(s.a.sinks.data)[head * s.a.sinks.stride[0]] * log2_e;
        float m = sink;
        for (int64_t n = 0; n < splits; ++n) m = piece[n * step].state.m[at] > m ? piece[n * step].state.m[at] : m;
        const float reference = m == -INFINITY ? 0.0f : m;
        float l = exp2f(sink - reference);
        for (int64_t c = 0; c < s.o_stride; c += width) store(o + c, splat(0.0f));
        for (int64_t n = 0; n < splits; ++n) {
            const State& state = piece[n * step].state;
            if (state.m[at] == -INFINITY && state.l[at] == 0.0f) continue;
            const float weight = exp2f(state.m[at] - reference);
            l += weight * state.l[at];
            for (int64_t c = 0; c < s.o_stride; c += width) {
                store(o + c, fma(load(state.o + at * s.o_stride + c), splat(weight), load(o + c)));
            }
        }
        *lse_at(s.a, seq, query, head) = l == 0.0f ? -INFINITY : m * ln_2 + logf(l);
        const float scale = l == 0.0f ? 0.0f : unit<S> / l;
        for (int64_t c = 0; c < s.dv; ++c) line[c] = o[place<S>(c)] * scale;
        store_out<T>(s, seq, query, head, line);
    }
}

// Rows without a sequence, and those of sequences without keys.
template <class T>
void write_empty(const Shape& s, const Sequence& seq, bool sinks) {
    const float zeros[max_head_dim] = {};
    for (int64_t query = 0; query < seq.queries; ++query) {
        for (int64_t head = 0; head < s.a.q.size[2]; ++head) {
            store_out<T>(s, seq, query, head, zeros);
            *lse_at(s.a, seq, query, head) =
                sinks ? static_cast<const float*>(s.a.sinks.data)[head * s.a.sinks.stride[0]] : -INFINITY;
        }
    }
}

// sums[b, h, j] = Σ_i 2^(logit_ij - lse_i) of one split and some heads: the products anew, for lse was not known.
template <class T, class S>
void add_sums(const Shape& s, const Piece& first, const Scratch& my) {
    const PagedAttention& a = s.a;
    const Sequence seq = sequence_of(a, first.sequence);
    Piece piece = first;
    for (; piece.row < seq.queries * s.group; piece.row += piece_rows) {
        piece.rows = at_most(seq.queries * s.group - piece.row, piece_rows);
        for_tiles<T, S>(s, seq, piece, my, [&](int64_t h, const Tile& tile) {
            find_logits<S>(s, seq, piece, h, tile, my);
            for (int64_t r = 0; r < piece.rows; ++r) {
                const Row& row = my.row[h * piece_rows + r];
                const float lse = *lse_at(a, seq, row.query, row.head);
                float* sums =
                    static_cast<float*>(a.sums.data) + seq.number * a.sums.stride[0] + row.head * a.sums.stride[1];
                for (uint64_t left = lse == -INFINITY ? 0 : tile.mask[r]; left; left &= left - 1) {
                    const int j = __builtin_ctzll(left);
                    sums[(tile.key + j) * a.sums.stride[2]] += exp2f(my.p[r * p_stride + j] - lse * log2_e);
                }
            }
        });
    }
}

// The pieces that share rows: `splits` of them, `step` apart.
struct Merge {
    int64_t first, splits, step;
};

// The sums of some heads over one split, from nothing.
template <class T, class S>
void find_sums(const Shape& s, int64_t n, int64_t split, int64_t head, const Scratch& my) {
    const View<3>& sums = s.a.sums;
    const int64_t heads = at_most(s.a.k_cache.size[2] - head, s.heads), first = split * split_keys;
    for (int64_t h = head * s.group; h < (head + heads) * s.group; ++h) {
        float* to = static_cast<float*>(sums.data) + n * sums.stride[0] + h * sums.stride[1];
        for (int64_t j = first; j < first + split_keys && j < sums.size[2]; ++j) to[j * sums.stride[2]] = 0.0f;
    }
    add_sums<T, S>(s, Piece{n, head, heads, 0, 0, first, first + split_keys, {}}, my);
}

template <class T, class S>
void run(const PagedAttention& a, const Runtime& runtime) {
    if (a.q.size[2] == 0) return;
    const Shape s = shape_of<S>(a);
    const int64_t sequences = a.seq_lens.size[0], sum_splits = a.sums ? ceil_div(a.sums.size[2], split_keys) : 0;
    const int64_t head_blocks = ceil_div(a.k_cache.size[2], s.heads);
    int64_t count = 0, merge_count = 0;
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence seq = sequence_of(a, n);
        const int64_t blocks = head_blocks * ceil_div(seq.queries * s.group, piece_rows);
        count += blocks * splits_of(s, seq);
        merge_count += seq.keys ? blocks : 0;
    }
    Piece* pieces = nullptr;
    Merge* merges = nullptr;
    const auto shared = [&](Arena& arena) {
        pieces = arena.take<Piece>(count);
        merges = arena.take<Merge>(merge_count);
        int64_t i = 0, m = 0;
        for (int64_t n = 0; n < sequences; ++n) {
            const Sequence seq = sequence_of(a, n);
            const int64_t splits = splits_of(s, seq), first = i;
            for_pieces_of(s, seq, [&](Piece piece) {
                piece.state = take_state(s, piece.heads, piece.rows, arena);
                if (arena.base) pieces[i] = piece;
                ++i;
            });
            for (int64_t j = 0; splits && j < (i - first) / splits; ++j) {
                if (arena.base) merges[m] = {first + j, splits, (i - first) / splits};
                ++m;
            }
        }
    };
    const int64_t most = count > sum_splits * sequences * head_blocks ? count : sum_splits * sequences * head_blocks;
    const auto scratch_of = lay_out(runtime, most, shared, [&](Arena& arena) { return take_scratch(s, arena); });
    for_pieces(runtime, count, [&](int worker, int64_t i) { run_piece<T, S>(s, pieces[i], scratch_of(worker)); });
    for_pieces(runtime, merge_count,
               [&](int, int64_t i) { merge<T, S>(s, pieces + merges[i].first, merges[i].splits, merges[i].step); });
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence seq = sequence_of(a, n);
        if (seq.keys == 0) write_empty<T>(s, seq, bool(a.sinks));
    }
    if (a.cu_seqlens_q) {
        const int64_t begin = at(a.cu_seqlens_q, 0), end = at(a.cu_seqlens_q, sequences);
        write_empty<T>(s, {-1, 0, 0, begin, 0, 0}, false);
        write_empty<T>(s, {-1, 0, end, a.q.size[1] - end, 0, 0}, false);
    }
    for_pieces(runtime, sum_splits * sequences * head_blocks, [&](int worker, int64_t i) {
        const int64_t block = i % head_blocks, n = i / head_blocks;
        find_sums<T, S>(s, n / sum_splits, n % sum_splits, block * s.heads, scratch_of(worker));
    });
}

// A cache of the queries' dtype, or a quantised one.
template <class T>
void run_stored(const PagedAttention& a, const Runtime& runtime) {
    switch (a.k_cache.dtype) {
        case DType::i8:
            return run<T, int8_t>(a, runtime);
        case DType::u8:
            return run<T, nibbles>(a, runtime);
        case DType::f8:
            return run<T, e4m3>(a, runtime);
        default:
            return run<T, T>(a, runtime);
    }
}

}  // namespace

void paged_attention(const PagedAttention& a, const Runtime& runtime) {
    switch (a.q.dtype) {
        case DType::bf16:
            return run_stored<bf16>(a, runtime);
        case DType::f16:
            return run_stored<f16>(a, runtime);
        default:
            return run_stored<float>(a, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(paged_attention, PagedAttention, p.q.dtype)
