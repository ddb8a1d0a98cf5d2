// Attention over a paged cache. The keys of a sequence are split at fixed positions; a piece of work is a few query
// rows of some neighbouring heads over one split, taken a tile of keys at a time. What the splits of a row found is
// merged in their order.
#include "column_sums.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Weights at the place of logits from j on, as floats or as pairs of bfloat16.
template <bool as_pairs, int n>
METATE_FN void store_weights(float* x, int j, const vf (&y)[n]) {
#if defined(METATE_HAS_BF16_DOT)
#pragma GCC unroll 2
    for (int i = 0; as_pairs && i < n; i += 2) store(x + (j + i * width) / 2, as_float(narrow_pairs(y[i], y[i + 1])));
#endif
#pragma GCC unroll 4
    for (int i = 0; !as_pairs && i < n; ++i) store(x + j + i * width, y[i]);
}

// Logits of some rows of a piece, over a tile or a block, and the scales of its values if there are scales.
struct Logits {
    float* at;
    int64_t stride, columns;
    const float* scales;  // of a head after the other, tile_keys apart
};

// Turns the logits of a row into 2^(logit - reference), each times its scale where there are scales. Returns the sum
// of the powers.
template <bool as_pairs>
METATE_FN vf to_powers(float* x, int64_t columns, float reference, const float* scales) {
    constexpr int vectors = tile_keys / width, batch = vectors < 4 ? vectors : 4;
    vf total = splat(0.0f);
    for (int64_t j = 0; j < columns; j += batch * width) {
        vf y[batch];
#pragma GCC unroll 4
        for (int i = 0; i < batch; ++i) y[i] = load(x + j + i * width) - splat(reference);
        exp2(y);
#pragma GCC unroll 4
        for (int i = 0; i < batch; ++i) {
            total = total + y[i];
            if (scales) y[i] = y[i] * load(scales + j + i * width);
        }
        store_weights<as_pairs>(x, j, y);
    }
    return total;
}

constexpr int soft_steps = 4;  // between products, how often a row asks for what will be read

// Turns logits of at most `width` rows into weights of the values, for the new maximum m of each row, and finds by
// which factor old results shrink: of several rows, for one alone waits for its own results most of the time.
template <bool as_pairs>
void to_weights(const Piece& piece, int64_t first, int64_t count, const Logits& x, float* factors, Prefetch& ahead) {
    const int64_t pitch = piece.pitch();
    const auto is_row = [&](int64_t i) { return i < count && (first + i) % pitch < piece.rows; };
    vf rows[width];
    for (int i = 0; i < width; ++i) {
        rows[i] = splat(-INFINITY);
        if (!is_row(i)) continue;
        for (int64_t j = 0; j < x.columns; j += width) rows[i] = max(load(x.at + i * x.stride + j), rows[i]);
    }
    const vf old = load(piece.state.m + first, count), m = max(largest_of_rows(rows), old);
    const vf reference = select(equal(m, splat(-INFINITY)), splat(0.0f), m), factor = exp2(old - reference);
    float references[width];
    store(references, reference);
    store(piece.state.m + first, m, count);
    store(factors, factor);
    for (int i = 0; i < width; ++i) {
        rows[i] = splat(0.0f);
        if (!is_row(i)) continue;
        for (int step = 0; step < soft_steps; ++step) ahead.fetch();
        const float* scales = x.scales ? x.scales + (first + i) / pitch * tile_keys : nullptr;
        rows[i] = to_powers<as_pairs>(x.at + i * x.stride, x.columns, references[i], scales);
    }
    store(piece.state.l + first, fma(load(piece.state.l + first, count), factor, sum_rows(rows)), count);
}

// Whether what the seen values of a tile stand for is finite.
template <class S>
bool are_finite(const Shape& s, const Tile& tile, const Lines& values, const float* scales) {
    vf poison = splat(0.0f);  // NaN once a number is not finite
    for (uint64_t left = tile.some; left; left &= left - 1) {
        const int j = __builtin_ctzll(left);
        if (scales) poison = fma(splat(scales[j]), splat(0.0f), poison);
        for (int64_t c = 0; c < s.dv; c += block) {
            vf a, b;
            read<S>(values.at[j] + (values.offset + bytes_before<S>(c)), smaller(s.dv - c, block), a, b);
            poison = fma(a, splat(0.0f), fma(b, splat(0.0f), poison));
        }
    }
    return sum(poison) == 0.0f;
}

// Whether a weight of 0 would not hide a value from the rows that do not see it: one that is not finite, seen by
// others.
template <class S>
bool has_unsafe_values(const Shape& s, const Piece& piece, int64_t h, const Tile& tile, const Scratch& my) {
    bool is_mixed = false;
    for (int64_t r = 0; r < piece.rows; ++r) is_mixed |= tile.mask[r] != tile.some;
    if (!is_mixed) return false;
    const uint8_t* copies[tile_keys];
    const Lines values = lines_of<S>(s.a.v_cache, tile.v, h, 0, tile_keys, my.rows, copies);
    return !are_finite<S>(s, tile, values, s.a.v_scale ? my.v_scale + h * tile_keys : nullptr);
}

// Adds the values of a tile to row r of a head, of the keys that it sees alone, by weights that are products of a whole
// tile.
template <class S>
void add_seen_values(const Shape& s, const Piece& piece, int64_t h, int64_t r, const Tile& tile, const float* weights,
                     const float* factor, const Scratch& my) {
    const uint64_t mask = tile.mask[r];
    float weight[tile_keys], step = 1.0f;
    const uint8_t *copies[tile_keys], *seen[tile_keys];
    const Lines values = lines_of<S>(s.a.v_cache, tile.v, h, 0, tile_keys, my.rows, copies);
    memcpy(weight, weights, sizeof weight);
    with_products<S>(s, piece, [&]<class W>() {
        constexpr size_t bytes = has_bf16_dots<W> ? sizeof(bf16) : sizeof(float);
        for (size_t j = 0; j < tile_keys; ++j) {
            const bool is_seen = mask >> j & 1;
            seen[j] = values.at[is_seen ? j : static_cast<size_t>(__builtin_ctzll(mask))];
            if (!is_seen) memset(reinterpret_cast<uint8_t*>(weight) + j * bytes, 0, bytes);
        }
        if constexpr (is_whole<W>) to_whole<S>(weight, 0, 1, tile_keys, &step);
        const Result to{piece.state.o + (h * piece.pitch() + r) * s.o_stride, 0, 0, 0, factor, &step};
        multiply_values<W, 1, 0>({seen, values.offset}, 0, 1, tile.count, weight, 0, s.dv, to, *my.ahead);
    });
}

// Adds the values of a tile to the rows of a piece.
template <class S>
void add_values(const Shape& s, const Piece& piece, const Tile& tile, const Scratch& my) {
    const uint8_t* copies[tile_keys];
    const int64_t pitch = piece.pitch();
    uint32_t done = 0;
    for (int64_t h = 0; h < piece.heads; ++h) {
        if (has_unsafe_values<S>(s, piece, h, tile, my)) {
            done |= 1u << h;
            for (int64_t r = 0, row = h * pitch; r < piece.rows; ++r, ++row) {
                if (tile.mask[r]) add_seen_values<S>(s, piece, h, r, tile, my.p + row * p_stride, my.factor + row, my);
            }
        }
    }
    if constexpr (has_integers<S>) {
        if (s.integers) to_whole<S>(my.p, p_stride, piece.heads * pitch, tile_keys, my.p_step);
    }
    const int64_t heads = in_order(s, piece) && s.a.v_cache.stride[3] == 1 && !done ? piece.heads : 1;
    for (int64_t h = 0; h < piece.heads; h += heads) {
        if (done >> h & 1) continue;
        const Lines values = lines_of<S>(s.a.v_cache, tile.v, h, 0, tile_keys, my.rows, copies);
        with_row_products<S>(s, [&]<class W>() {
            for_row_tiles<W>(piece.rows, [&]<int n>(int64_t r) {
                const int64_t row = h * pitch + r;
                const Result to{piece.state.o + row * s.o_stride,
                                pitch * s.o_stride,
                                s.o_stride,
                                pitch,
                                my.factor + row,
                                my.p_step + row};
                with_order<W, n>(s, piece, [&]<int few>() {
                    multiply_values<W, n, few>(values, tile.v.next_head, heads, tile.count, my.p + row * p_stride,
                                               pitch * p_stride, s.dv, to, *my.ahead);
                });
            });
        });
    }
}

template <class S>
void add_tile(const Shape& s, const Piece& piece, const Stream& stream, const Scratch& my) {
    find_logits<S>(s, piece, stream, my);
    if (s.a.sums) keep_logits(piece, *stream.tile, my);
    const int64_t steps = piece.heads * piece.rows * soft_steps + steps_of<S>(s, piece, *stream.tile, true);
    stream.advance(s, piece, true, steps, my);
    const int64_t count = piece.heads * piece.pitch();
    with_row_products<S>(s, [&]<class W>() {
        for (int64_t first = 0; first < count; first += width) {
            const Logits x{my.p + first * p_stride, p_stride, tile_keys, s.a.v_scale ? my.v_scale : nullptr};
            to_weights<has_bf16_dots<W>>(piece, first, smaller(count - first, width), x, my.factor + first, *my.ahead);
        }
    });
    add_values<S>(s, piece, *stream.tile, my);
}

// Adds the values of a block, some of which are unsafe, to `rows` rows of a piece from `first` on.
template <class S>
void add_seen_block(const Shape& s, const Piece& piece, int64_t first, int64_t rows, const Block& block,
                    const Scratch& my) {
    int64_t words = 0;  // of a tile's weights
    with_packed_products<S>([&]<class W>() { words = tile_keys / elements_of_word<W>; });
    for (int64_t r = 0; r < rows; ++r) {
        const float *weights = my.p + r * packed_stride(s) + block.first * tile_keys, *factor = my.factor + r;
        for (int64_t t = block.first; t <= block.last; ++t, weights += words) {
            const Tile& tile = block.tile[t];
            if (!tile.some || !tile.mask[first + r]) continue;
            add_seen_values<S>(s, piece, 0, first + r, tile, weights, factor, of_tile(s, t, my));
            factor = nullptr;
        }
    }
}

// The same for many rows, some of which take a block through all steps before the next rows.
template <class S>
void add_block(const Shape& s, const Piece& piece, const Stream& stream, const Scratch& my) {
    const Block block = pack_block<S>(s, piece, stream, my);
    bool is_safe = true;
    for (int64_t t = block.first; t <= block.last; ++t)
        is_safe &= !block.tile[t].some || !has_unsafe_values<S>(s, piece, 0, block.tile[t], of_tile(s, t, my));
    stream.advance(s, piece, true, packed_steps_of<S>(s, piece, block) + piece.rows * soft_steps, my);
    const int64_t begin = block.first * tile_keys, columns = (block.last + 1) * tile_keys - begin;
    const int64_t stride = packed_stride(s);
    for (int64_t first = 0; first < piece.rows; first += tile_rows) {
        const int64_t rows = smaller(piece.rows - first, tile_rows);
        find_packed_logits<S>(s, first, rows, block, my);
        for (int64_t r = 0; r < rows; r += width) {
            const Logits x{my.p + r * stride + begin, stride, columns, s.a.v_scale ? my.v_scale + begin : nullptr};
            with_packed_products<S>([&]<class W>() {
                to_weights<has_bf16_dots<W>>(piece, first + r, smaller(rows - r, width), x, my.factor + r, *my.ahead);
            });
        }
        if (is_safe)
            add_packed_values<S>(s, piece, first, rows, block, my);
        else
            add_seen_block<S>(s, piece, first, rows, block, my);
    }
}

// Pieces.

State take_state(const Shape& s, const Piece& piece, Arena& arena) {
    const int64_t count = round_up(piece.heads * piece.pitch(), width);
    const int64_t kept = s.a.sums && !piece.packed ? piece.heads * piece.rows * kept_stride : 0;
    return {arena.take<float>(count * s.o_stride), arena.take<float>(count), arena.take<float>(count),
            arena.take<float>(kept)};
}

// How many pieces share their keys, and into how many runs the keys are split.
int64_t pieces_of_split(const Shape& s, const Sequence& seq, const Cut& cut) {
    return ceil_div(s.a.k_cache.size[2], cut.heads) * ceil_div(seq.queries * s.group, cut.rows);
}
int64_t splits_of(const Sequence& seq, const Cut& cut) {
    return ceil_div(seq.keys, cut.keys);
}

// Calls run(piece) for the pieces of a sequence: split after split, so that a worker streams.
template <class Run>
void for_pieces_of(const Shape& s, const Sequence& seq, const Run& run) {
    const int64_t rows = seq.queries * s.group, kv_heads = s.a.k_cache.size[2];
    const Cut cut = cut_of(s, seq);
    for (int64_t key = 0; key < seq.keys; key += cut.keys) {
        for (int64_t head = 0; head < kv_heads; head += cut.heads) {
            for (int64_t r = 0; r < rows; r += cut.rows) {
                run(Piece{seq.number,
                          head,
                          smaller(kv_heads - head, cut.heads),
                          r,
                          smaller(rows - r, cut.rows),
                          key,
                          key + cut.keys,
                          cut.packed,
                          {}});
            }
        }
    }
}

template <class S>
void run_piece(const Shape& s, const Piece& piece, const Piece* following, const Scratch& my) {
    const int64_t rows = round_up(piece.heads * piece.pitch(), width);
    memset(piece.state.o, 0, static_cast<size_t>(rows * s.o_stride) * sizeof(float));
    for (int64_t r = 0; r < rows; r += width) {
        store(piece.state.m + r, splat(-INFINITY));
        store(piece.state.l + r, splat(0.0f));
    }
    const Sequence seq = sequence_of(s.a, piece.sequence);
    for_tiles<S>(s, seq, piece, following, true, my,
                 [&](const Stream& stream) { (piece.packed ? add_block<S> : add_tile<S>)(s, piece, stream, my); });
}

// Results.

inline void store_out(const Shape& s, const Sequence& seq, int64_t query, int64_t head, const float* o) {
    const View<4>& out = s.a.out;
    with_floats(out.dtype, [&]<class T>() {
        T* const to = static_cast<T*>(out.data) + seq.batch * out.stride[0] + (seq.q0 + query) * out.stride[1] +
                      head * out.stride[2];
        int64_t c = 0;
        if (out.stride[3] == 1) {
            for (; c + width <= s.dv; c += width) store(to + c, load(o + c));
        }
        for (; c < s.dv; ++c) to[c * out.stride[3]] = from_float<T>(o[c]);
    });
}

// The columns of a row of sums of W, divided by l, in their order.
template <class W>
void order_columns(const Shape& s, const float* o, float l, float* line) {
    const float scale = l == 0.0f ? 0.0f : unit<W> / l;
    for (int64_t c = 0; c < s.o_stride; c += width) {
        for (int64_t j = c; j < c + width; ++j) line[column_of<W>(j)] = o[j] * scale;
    }
}

// Merges what the splits found for the rows of the first piece; later splits are `step` pieces apart.
inline void merge(const Shape& s, const Piece* piece, int64_t splits, int64_t step) {
    const Sequence seq = sequence_of(s.a, piece->sequence);
    alignas(64) float o[max_key_dim + 2 * block], line[max_key_dim + 2 * block];
    for (int64_t i = 0; i < piece->heads * piece->rows; ++i) {
        const int64_t h = i / piece->rows, r = i % piece->rows, at = h * piece->pitch() + r;
        const int64_t query = (piece->row + r) / s.group,
                      head = (piece->head + h) * s.group + (piece->row + r) % s.group;
        const float sink = sink_of(s.a, seq, query, head) * log2_e;
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
        if (s.a.sums) softmax_at(s, seq, query, head) = {m, l == 0.0f ? 0.0f : 1 / l};
        with_cache(
            s.a, [&]<class S>() { with_products<S>(s, *piece, [&]<class W>() { order_columns<W>(s, o, l, line); }); });
        store_out(s, seq, query, head, line);
    }
}

// Rows without a sequence, and those of sequences without keys.
inline void write_empty(const Shape& s, const Sequence& seq, bool sinks) {
    const float zeros[max_key_dim] = {};
    for (int64_t query = 0; query < seq.queries; ++query) {
        for (int64_t head = 0; head < s.a.q.size[2]; ++head) {
            store_out(s, seq, query, head, zeros);
            *lse_at(s.a, seq, query, head) = sinks ? sink_of(s.a, seq, query, head) : -INFINITY;
        }
    }
}

// The pieces that share rows: `splits` of them, `step` apart.
struct Merge {
    int64_t first, splits, step;
};

}  // namespace

void paged_attention(const PagedAttention& a, const Runtime& all_threads) {
    if (a.q.size[2] == 0) return;
    Shape s = shape_of(a);
    const int64_t sequences = a.seq_lens.size[0], sum_splits = a.sums ? ceil_div(a.sums.size[2], split_keys) : 0;
    const int64_t head_blocks = ceil_div(a.k_cache.size[2], s.heads);
    int64_t count = 0, merge_count = 0, logits = 0;
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence seq = sequence_of(a, n);
        const Cut cut = cut_of(s, seq);
        const int64_t blocks = pieces_of_split(s, seq, cut);
        s.packs |= cut.packed;
        count += blocks * splits_of(seq, cut);
        merge_count += seq.keys ? blocks : 0;
        logits += seq.keys * seq.queries * a.q.size[2];
        s.bytes += seq.keys * a.k_cache.size[2] * (a.k_cache.size[3] + a.v_cache.size[3]) * bytes_of(a.k_cache.dtype);
    }
    const Runtime runtime = worth(all_threads, logits * (s.d + s.dv) / 8);
    Piece* pieces = nullptr;
    Merge* merges = nullptr;
    int64_t* first_piece = nullptr;  // of a sequence
    const auto shared = [&](Arena& arena) {
        pieces = arena.take<Piece>(count);
        merges = arena.take<Merge>(merge_count);
        first_piece = arena.take<int64_t>(sequences);
        if (a.sums) s.softmax = arena.take<Softmax>(a.q.size[0] * a.q.size[1] * a.q.size[2]);
        int64_t i = 0, m = 0;
        for (int64_t n = 0; n < sequences; ++n) {
            const Sequence seq = sequence_of(a, n);
            const int64_t splits = splits_of(seq, cut_of(s, seq)), first = i;
            if (arena.base) first_piece[n] = i;
            for_pieces_of(s, seq, [&](Piece piece) {
                piece.state = take_state(s, piece, arena);
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
    const int workers = workers_of(runtime, count);  // which go on at about the same pace
    for_pieces(runtime, count, [&](int worker, int64_t i) {
        const Piece* following = i + workers < count ? pieces + i + workers : nullptr;
        with_cache(a, [&]<class S>() { run_piece<S>(s, pieces[i], following, scratch_of(worker)); });
    });
    for_pieces(runtime, merge_count, [&](int, int64_t i) {
        const Merge& m = merges[i];
        merge(s, pieces + m.first, m.splits, m.step);
    });
    for (int64_t n = 0; n < sequences; ++n) {
        const Sequence seq = sequence_of(a, n);
        if (seq.keys == 0) write_empty(s, seq, true);
    }
    if (a.cu_seqlens_q) {
        const int64_t begin = at(a.cu_seqlens_q, 0), end = at(a.cu_seqlens_q, sequences);
        write_empty(s, {-1, 0, 0, begin, 0, 0}, false);
        write_empty(s, {-1, 0, end, a.q.size[1] - end, 0, 0}, false);
    }
    for_pieces(runtime, sum_splits * sequences * head_blocks, [&](int worker, int64_t i) {
        const int64_t block = i % head_blocks, n = i / head_blocks;
        with_cache(a, [&]<class S>() {
            const int64_t sequence = n / sum_splits;
            find_sums<S>(s, sequence, n % sum_splits, block * s.heads, pieces + first_piece[sequence],
                         scratch_of(worker));
        });
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(paged_attention, PagedAttention, p.q.dtype)
