// Column sums of attention probabilities: for each key and head, how much all queries look at it.
//
// Two passes make the same logits. The first finds the softmax of every row; a piece of its work is some rows of one
// key head, which walk over the blocks of keys. The second adds up: a piece is a block of keys, and every tile of
// queries that sees it passes by, in ascending order. (The forward's lse would save the first pass. But where logits
// are large, what it was rounded by is in every probability, and 10^20 leaves no room for the logarithm of how many
// keys there are.)
#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "exact.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Of a row: probability = 2^(exponent · (x - largest)) · share, x as in Scoring; a share of 0 where it sees no key.
struct Softmax {
    float largest, share;
};

constexpr int64_t piece_rows = 16 * tile_rows;  // of the first pass: enough to pay for packing the keys

struct Shape {
    const AttentionColumnSums& call;
    const Attention& a;
    Scoring scoring;
    int64_t group, d, d_words, q_stride;
    int64_t block;     // keys of a piece
    int64_t s_stride;  // floats from row to row of a tile of logits
    Softmax* softmax;  // (batch, head, query)

    Softmax& softmax_at(const Sequence& seq, const Row& row) const {
        return softmax[(seq.batch * a.q.size[2] + row.head) * a.q.size[1] + seq.q0 + row.query];
    }
};

template <class Word>
struct Scratch {
    Word *q, *k;
    float *s, *partial, *total, *carry;  // partial, total and carry: (group, block)
    float *largest, *powers;             // of the rows of the first pass, and the sum of powers relative to it
};

template <class Word>
Shape shape_of(const AttentionColumnSums& call) {
    const Attention& a = call.problem;
    Shape s{call, a, scoring_of(a), 1, a.q.size[3], steps_of<Word>(a.q.size[3]), 0, 0, 0, nullptr};
    if (a.k.size[2]) s.group = a.q.size[2] / a.k.size[2];
    constexpr int64_t line = 16, words_of_keys = 32768;
    s.q_stride = round_up(s.d_words, 16) + line;
    s.block = clamp(words_of_keys / (s.d_words + 1) / 64 * 64, 64, 256);
    s.s_stride = s.block + line;
    return s;
}

template <class Word>
Scratch<Word> take_scratch(const Shape& s, Arena& arena) {
    return {arena.take<Word>(tile_rows * s.q_stride),
            arena.take<Word>(s.block * s.d_words),
            arena.take<float>(tile_rows * s.s_stride),
            arena.take<float>(s.group * s.block),
            arena.take<float>(s.group * s.block),
            arena.take<float>(s.group * s.block),
            arena.take<float>(piece_rows),
            arena.take<float>(piece_rows)};
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

// Takes row r of a tile into the largest logit of that row and the sum of its powers.
METATE_FN void take_row(const Shape& s, const TileMask& mask, int r, const float* x, float& largest, float& powers) {
    vf top = splat(largest);
    for_seen(mask, r, x, [&](int64_t, vf y) { top = max(y, top); });
    const float highest = METATE_ISA::largest(top);
    const float reference = highest == -INFINITY ? 0.0f : highest;
    vf total = splat(0.0f);
    for_seen(mask, r, x,
             [&](int64_t, vf y) { total = total + exp2((y - splat(reference)) * splat(s.scoring.exponent)); });
    powers = powers * exp2f((largest - reference) * s.scoring.exponent) + sum(total);
    largest = highest;
}

// The softmax of a row that has met all its keys; a sink is one more logit in the denominator.
Softmax softmax_of(const Shape& s, const Row& row, float largest, float powers) {
    if (powers == 0.0f) return {0.0f, 0.0f};
    if (!s.a.sinks) return {largest, 1 / powers};
    const float sink = static_cast<const float*>(s.a.sinks.data)[row.head * s.a.sinks.stride[0]] * log2_e;
    const float top = largest * s.scoring.exponent, base = sink > top ? sink : top, weight = exp2f(top - base);
    return {largest, weight / (powers * weight + exp2f(sink - base))};
}

// Adds the probabilities of row r of a tile to the partial sums of its head.
METATE_FN void add_row(const Shape& s, const Softmax& of, const TileMask& mask, int r, const float* x, float* partial) {
    if (of.share == 0.0f) return;
    for_seen(mask, r, x, [&](int64_t at, vf y) {
        const vf p = exp2((y - splat(of.largest)) * splat(s.scoring.exponent)) * splat(of.share);
        store(partial + at, load(partial + at) + p);
    });
}

// Adds the partial sums to the totals, with what rounding lost carried over (Kahan), and begins new ones.
template <class Word>
void put_away(const Shape& s, const Scratch<Word>& my) {
    for (int64_t i = 0; i < s.group * s.block; i += width) {
        const vf old = load(my.total + i), more = load(my.partial + i) - load(my.carry + i), sum = old + more;
        store(my.carry + i, (sum - old) - more);
        store(my.total + i, sum);
        store(my.partial + i, splat(0.0f));
    }
}

// Calls body(row, mask, r, x) for the rows, a tile, that start at row `first` of the group, with their logits x, unless
// none of them sees a key.
template <class T, class Word, class Body>
void for_rows(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, int chunks, int64_t first, int rows,
              const Scratch<Word>& my, const Body& body) {
    Row row[tile_rows];
    for (int r = 0; r < rows; ++r) {
        row[r] = row_of(s.a, seq, (first + r) / s.group, kv_head * s.group + (first + r) % s.group);
    }
    TileMask mask;
    mask_tile(s.a, span_of(row, rows), row, key, chunks, mask);
    if (!mask.any) return;
    for (int r = 0; r < rows; ++r) {
        pack_row(my.q + r * s.q_stride, round_up(s.d_words, width),
                 row_at<T>(s.a.q, seq.batch, seq.q0 + row[r].query, row[r].head), s.a.q.stride[3], s.d);
    }
    multiply_keys<short_chain>(rows, mask, Product<Word>{my.q, s.q_stride, my.k, s.d_words, my.s, s.s_stride, nullptr});
    for (int r = 0; r < rows; ++r) {
        float* const x = my.s + r * s.s_stride;
        if (!s.scoring.plain) to_logits(s.a, s.scoring, seq, row[r], key, mask.any, x);
        body(row[r], mask, r, x);
    }
}

// Packs the keys of the block at `key`; returns how many there are.
template <class T, class Word>
int64_t pack_block(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, const Scratch<Word>& my) {
    const int64_t keys = smaller(seq.keys - key, s.block);
    pack_transposed(my.k, row_at<T>(s.a.k, seq.batch, seq.k0 + key, kv_head), s.a.k.stride[1], s.a.k.stride[3], keys,
                    s.d);
    return keys;
}

// The first pass over the rows of a group from `first` on.
template <class T, class Word>
void find_softmax(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t first, const Scratch<Word>& my) {
    const int64_t rows = smaller(seq.queries * s.group - first, piece_rows);
    const auto row_at_place = [&](int64_t r) {
        return row_of(s.a, seq, (first + r) / s.group, kv_head * s.group + (first + r) % s.group);
    };
    int64_t begin = seq.keys, end = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const Row row = row_at_place(r);
        my.largest[r] = -INFINITY;
        my.powers[r] = 0.0f;
        if (row.begin >= row.end) continue;
        begin = smaller(begin, row.begin);
        end = larger(end, row.end);
    }
    for (int64_t key = begin / s.block * s.block; key < end; key += s.block) {
        const int chunks = static_cast<int>(ceil_div(pack_block<T>(s, seq, kv_head, key, my), chunk));
        for (int64_t at = 0; at < rows; at += tile_rows) {
            const int live = static_cast<int>(smaller(rows - at, tile_rows));
            for_rows<T>(s, seq, kv_head, key, chunks, first + at, live, my,
                        [&](const Row&, const TileMask& mask, int r, const float* x) {
                            take_row(s, mask, r, x, my.largest[at + r], my.powers[at + r]);
                        });
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const Row row = row_at_place(r);
        s.softmax_at(seq, row) = softmax_of(s, row, my.largest[r], my.powers[r]);
    }
}

// The queries whose window reaches a key of key … key+keys-1.
void queries_of(const Attention& a, const Sequence& seq, int64_t key, int64_t keys, int64_t& begin, int64_t& end) {
    begin = a.window_right >= 0 ? clamp(key - a.window_right - seq.diagonal, 0, seq.queries) : 0;
    end = a.window_left >= 0 ? clamp(key + keys + a.window_left - seq.diagonal, 0, seq.queries) : seq.queries;
}

// The second pass over a block of keys.
template <class T, class Word>
void run_block(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, const Scratch<Word>& my) {
    const Attention& a = s.a;
    const int64_t keys = smaller(seq.keys - key, s.block);
    float* const sums[] = {my.partial, my.total, my.carry};
    for (float* zero : sums) memset(zero, 0, static_cast<size_t>(s.group * s.block) * sizeof(float));
    int64_t begin, end;
    queries_of(a, seq, key, keys, begin, end);
    if (begin < end) {
        const int chunks = static_cast<int>(ceil_div(pack_block<T>(s, seq, kv_head, key, my), chunk));
        const int64_t rows = seq.queries * s.group;
        for (int64_t r = begin * s.group / tile_rows * tile_rows; r < end * s.group; r += tile_rows) {
            const int live = static_cast<int>(smaller(rows - r, tile_rows));
            for_rows<T>(s, seq, kv_head, key, chunks, r, live, my,
                        [&](const Row& row, const TileMask& mask, int i, const float* x) {
                            add_row(s, s.softmax_at(seq, row), mask, i, x, my.partial + row.head % s.group * s.block);
                        });
            if ((r / tile_rows + 1) % s.group == 0) put_away(s, my);  // a tile of rows of each head at a time
        }
        put_away(s, my);
    }
    for (int64_t g = 0; g < s.group; ++g) {
        for (int64_t j = 0; j < keys; ++j) {
            *value_at<float>(s.call.sums, seq.batch, kv_head * s.group + g, seq.k0 + key + j) =
                my.total[g * s.block + j];
        }
    }
}

// Sequence n; behind the last one, the keys before the first sequence and those after the last, which nobody sees.
Sequence keys_of(const Attention& a, int64_t n) {
    const int64_t count = sequences_of(a);
    if (n < count) return sequence_of(a, n);
    const int64_t begin = n == count ? 0 : offset_in(a.cu_seqlens_k, count);
    const int64_t end = n == count ? offset_in(a.cu_seqlens_k, 0) : a.k.size[1];
    return {-1, 0, 0, begin, 0, end - begin, 0};
}

// The first row, or key, of a piece.
struct Place {
    int64_t sequence, first;
};

template <class T, class Word>
void run(const AttentionColumnSums& call, const Runtime& runtime) {
    Shape s = shape_of<Word>(call);
    const int64_t heads = s.a.k.size[2], sequences = sequences_of(s.a), ranges = sequences + (s.a.cu_seqlens_k ? 2 : 0);
    int64_t blocks = 0, row_blocks = 0;
    for (int64_t n = 0; n < ranges; ++n) blocks += ceil_div(keys_of(s.a, n).keys, s.block);
    for (int64_t n = 0; n < sequences; ++n) row_blocks += ceil_div(sequence_of(s.a, n).queries * s.group, piece_rows);
    if (blocks * heads == 0) return;
    Place *piece = nullptr, *row_piece = nullptr;
    const auto scratch_of = lay_out(
        runtime, larger(blocks, row_blocks) * heads,
        [&](Arena& arena) {
            piece = arena.take<Place>(blocks);
            row_piece = arena.take<Place>(row_blocks);
            s.softmax = arena.take<Softmax>(s.a.q.size[0] * s.a.q.size[2] * s.a.q.size[1]);
        },
        [&](Arena& arena) { return take_scratch<Word>(s, arena); });
    for (int64_t n = 0, i = 0; n < ranges; ++n) {
        // With a causal mask the first keys have the most queries.
        for (int64_t key = 0; key < keys_of(s.a, n).keys; key += s.block) piece[i++] = {n, key};
    }
    for (int64_t n = sequences - 1, i = 0; n >= 0; --n) {
        // And the last queries the most keys.
        const int64_t rows = sequence_of(s.a, n).queries * s.group;
        for (int64_t r = ceil_div(rows, piece_rows); r-- > 0;) row_piece[i++] = {n, r * piece_rows};
    }
    for_pieces(runtime, row_blocks * heads, [&](int worker, int64_t i) {
        const Place& at = row_piece[i / heads];
        find_softmax<T, Word>(s, sequence_of(s.a, at.sequence), i % heads, at.first, scratch_of(worker));
    });
    for_pieces(runtime, blocks * heads, [&](int worker, int64_t i) {
        const Place& at = piece[i / heads];
        run_block<T, Word>(s, keys_of(s.a, at.sequence), i % heads, at.first, scratch_of(worker));
    });
}

#if defined(METATE_ISA_BASELINE)
// Double precision, one head after the other, a few rows at a time lest a long sum be rounded for each of them.
void add_sequence_exact(const AttentionColumnSums& call, const Sequence& seq, int64_t head) {
    const Attention& a = call.problem;
    const int64_t kv_head = head / (a.q.size[2] / a.k.size[2]);
    const double sink = a.sinks ? static_cast<const double*>(a.sinks.data)[head * a.sinks.stride[0]] : -INFINITY;
    const auto logit = [&](const Row& row, int64_t j) {
        if (!sees(a, row, j)) return -static_cast<double>(INFINITY);
        const double* k = row_at<double>(a.k, seq.batch, seq.k0 + j, kv_head);
        const double* q = row_at<double>(a.q, seq.batch, seq.q0 + row.query, head);
        return logit_exact(a, seq, row, j, dot_exact(q, a.q.stride[3], k, a.k.stride[3], a.q.size[3]));
    };
    constexpr int most = 16;
    for (int64_t first = 0; first < seq.queries; first += most) {
        const int rows = static_cast<int>(clamp(seq.queries - first, 0, most));
        Row row[most];
        double largest[most], powers[most];
        for (int r = 0; r < rows; ++r) {
            row[r] = row_of(a, seq, first + r, head);
            largest[r] = sink;
            for (int64_t j = 0; j < seq.keys; ++j) largest[r] = fmax(largest[r], logit(row[r], j));
            powers[r] = exp(sink - largest[r]);
            for (int64_t j = 0; j < seq.keys; ++j) powers[r] += exp(logit(row[r], j) - largest[r]);
        }
        for (int64_t j = 0; j < seq.keys; ++j) {
            double sum = 0;
            for (int r = 0; r < rows; ++r) {
                if (largest[r] != -INFINITY) sum += exp(logit(row[r], j) - largest[r]) / powers[r];
            }
            *value_at<double>(call.sums, seq.batch, head, seq.k0 + j) += sum;
        }
    }
}

void run_exact(const AttentionColumnSums& call, const Runtime& runtime) {
    const Attention& a = call.problem;
    const int64_t heads = a.q.size[2], keys = a.k.size[1];
    for_pieces(runtime, a.q.size[0] * heads, [&](int, int64_t i) {
        for (int64_t j = 0; j < keys; ++j) *value_at<double>(call.sums, i / heads, i % heads, j) = 0;
        if (!a.cu_seqlens_q) return add_sequence_exact(call, sequence_of(a, i / heads), i % heads);
        for (int64_t n = 0; n < sequences_of(a); ++n) add_sequence_exact(call, sequence_of(a, n), i % heads);
    });
}
#endif

}  // namespace

void attention_column_sums(const AttentionColumnSums& call, const Runtime& runtime) {
#if defined(METATE_ISA_BASELINE)
    if (call.problem.q.dtype == DType::f64) return run_exact(call, runtime);
#endif
    with_words(call.problem.q.dtype,
               [&]<class T, class Word>() { run<T, Word>(call, worth(runtime, operations_of(call.problem))); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(attention_column_sums, AttentionColumnSums, p.problem.q.dtype)
