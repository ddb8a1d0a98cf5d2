// Attention over a paged cache. The keys of a sequence are split at fixed positions; a piece of work is a few query
// rows of some neighbouring heads over one split, taken a tile of keys at a time. What the splits of a row found is
// merged in their order.
#include "column_sums.h"
#include "piece.h"

namespace metate::cpu::METATE_ISA {
namespace {

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
            read<S>(values[j] + (offset + bytes_before<S>(c)), smaller(s.dv - c, block), a, b);
            poison = fma(a, splat(0.0f), fma(b, splat(0.0f), poison));
        }
    }
    return sum(poison) == 0.0f;
}

// What multiply_tile_values adds, a row at a time and of the keys that it sees alone.
template <class S>
void multiply_seen_values(const Shape& s, const Piece& piece, const Tile& tile, const uint8_t* const* values,
                          int64_t offset, const float* p, float* o, const float* factor, Prefetch& ahead) {
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
                          smaller(kv_heads - head, s.heads),
                          r,
                          smaller(rows - r, piece_rows),
                          key,
                          key + keys,
                          {}});
            }
        }
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

// The pieces that share rows: `splits` of them, `step` apart.
struct Merge {
    int64_t first, splits, step;
};

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
