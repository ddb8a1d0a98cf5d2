// Column sums of attention probabilities: for each key and head, how much all queries look at it.
//
// A piece of work is a block of keys of one key head: its keys are packed once and every tile of queries that sees the
// block passes by, in ascending order.
#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "exact.h"

namespace metate::cpu::METATE_ISA {
namespace {

struct Shape {
    const AttentionColumnSums& call;
    const Attention& a;
    Scoring scoring;
    int64_t group, d, d_words, q_stride;
    int64_t block;     // keys of a piece
    int64_t s_stride;  // floats from row to row of a tile of logits
};

template <class Word>
struct Scratch {
    Word *q, *k;
    float *s, *partial, *total, *carry;  // partial, total and carry: (group, block)
};

template <class Word>
Shape shape_of(const AttentionColumnSums& call) {
    const Attention& a = call.problem;
    Shape s{call, a, scoring_of(a), 1, a.q.size[3], steps_of<Word>(a.q.size[3]), 0, 0, 0};
    if (a.k.size[2]) s.group = a.q.size[2] / a.k.size[2];
    constexpr int64_t line = 16, words_of_keys = 32768;
    s.q_stride = round_up(s.d_words, 16) + line;
    s.block = clamp(words_of_keys / (s.d_words + 1) / 64 * 64, 64, 256);
    s.s_stride = s.block + line;
    return s;
}

template <class Word>
Scratch<Word> take_scratch(const Shape& s, Arena& arena) {
    return {arena.take<Word>(tile_rows * s.q_stride),  arena.take<Word>(s.block * s.d_words),
            arena.take<float>(tile_rows * s.s_stride), arena.take<float>(s.group * s.block),
            arena.take<float>(s.group * s.block),      arena.take<float>(s.group * s.block)};
}

// Adds the probabilities of one row to the partial sums of its head.
void add_row(const Shape& s, const Sequence& seq, const Row& row, int64_t key, const TileMask& mask, int r, float* x,
             float* partial) {
    const float lse = *value_at<float>(s.call.lse, seq.batch, row.head, seq.q0 + row.query);
    if (lse == -INFINITY) return;
    if (!s.scoring.plain) to_logits(s.a, s.scoring, seq, row, key, mask.any, x);
    const float scale = s.scoring.plain ? s.scoring.scale : 1.0f;
    for (uint32_t left = mask.any; left; left &= left - 1) {
        const int c = __builtin_ctz(left);
        for (int v = 0; v < chunk / width; ++v) {
            const int64_t at = c * chunk + v * width;
            vf p = probability(fma(load(x + at), splat(scale), splat(-lse)));
            if (!(mask.all >> c & 1)) p = keep(mask.words[r][c], v, p, splat(0.0f));
            store(partial + at, load(partial + at) + p);
        }
    }
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

// The rows, a tile, that start at row `first` of the group.
template <class T, class Word>
void add_tile(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, int chunks, int64_t first, int rows,
              const Scratch<Word>& my) {
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
        add_row(s, seq, row[r], key, mask, r, my.s + r * s.s_stride, my.partial + row[r].head % s.group * s.block);
    }
}

// The queries whose window reaches a key of key … key+keys-1.
void queries_of(const Attention& a, const Sequence& seq, int64_t key, int64_t keys, int64_t& begin, int64_t& end) {
    begin = a.window_right >= 0 ? clamp(key - a.window_right - seq.diagonal, 0, seq.queries) : 0;
    end = a.window_left >= 0 ? clamp(key + keys + a.window_left - seq.diagonal, 0, seq.queries) : seq.queries;
}

template <class T, class Word>
void run_block(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, const Scratch<Word>& my) {
    const Attention& a = s.a;
    const int64_t keys = seq.keys - key < s.block ? seq.keys - key : s.block;
    float* const sums[] = {my.partial, my.total, my.carry};
    for (float* zero : sums) memset(zero, 0, static_cast<size_t>(s.group * s.block) * sizeof(float));
    int64_t begin, end;
    queries_of(a, seq, key, keys, begin, end);
    if (begin < end) {
        pack_transposed(my.k, row_at<T>(a.k, seq.batch, seq.k0 + key, kv_head), a.k.stride[1], a.k.stride[3], keys,
                        s.d);
        const int chunks = static_cast<int>(ceil_div(keys, chunk));
        const int64_t rows = seq.queries * s.group;
        for (int64_t r = begin * s.group / tile_rows * tile_rows; r < end * s.group; r += tile_rows) {
            const int live = static_cast<int>(rows - r < tile_rows ? rows - r : tile_rows);
            add_tile<T>(s, seq, kv_head, key, chunks, r, live, my);
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

struct KeyBlock {
    int64_t sequence, key;
};

template <class T, class Word>
void run(const AttentionColumnSums& call, const Runtime& runtime) {
    const Shape s = shape_of<Word>(call);
    const int64_t heads = s.a.k.size[2], ranges = sequences_of(s.a) + (s.a.cu_seqlens_k ? 2 : 0);
    int64_t blocks = 0;
    for (int64_t n = 0; n < ranges; ++n) blocks += ceil_div(keys_of(s.a, n).keys, s.block);
    const int64_t pieces = blocks * heads;
    if (pieces == 0) return;
    KeyBlock* piece = nullptr;
    const auto scratch_of = lay_out(
        runtime, pieces, [&](Arena& arena) { piece = arena.take<KeyBlock>(blocks); },
        [&](Arena& arena) { return take_scratch<Word>(s, arena); });
    for (int64_t n = 0, i = 0; n < ranges; ++n) {
        // With a causal mask the first keys have the most queries.
        for (int64_t key = 0; key < keys_of(s.a, n).keys; key += s.block) piece[i++] = {n, key};
    }
    for_pieces(runtime, pieces, [&](int worker, int64_t i) {
        const KeyBlock& at = piece[i / heads];
        run_block<T, Word>(s, keys_of(s.a, at.sequence), i % heads, at.key, scratch_of(worker));
    });
}

#if defined(METATE_ISA_BASELINE)
// Double precision, one head after the other, a few rows at a time lest a long sum be rounded for each of them.
void add_sequence_exact(const AttentionColumnSums& call, const Sequence& seq, int64_t head) {
    const Attention& a = call.problem;
    const int64_t kv_head = head / (a.q.size[2] / a.k.size[2]);
    constexpr int most = 16;
    for (int64_t first = 0; first < seq.queries; first += most) {
        const int rows = static_cast<int>(clamp(seq.queries - first, 0, most));
        Row row[most];
        for (int r = 0; r < rows; ++r) row[r] = row_of(a, seq, first + r, head);
        for (int64_t j = 0; j < seq.keys; ++j) {
            const double* k = row_at<double>(a.k, seq.batch, seq.k0 + j, kv_head);
            double sum = 0;
            for (int r = 0; r < rows; ++r) {
                const double lse = *value_at<double>(call.lse, seq.batch, head, seq.q0 + row[r].query);
                if (lse == -INFINITY || !sees(a, row[r], j)) continue;
                const double* q = row_at<double>(a.q, seq.batch, seq.q0 + row[r].query, head);
                const double product = dot_exact(q, a.q.stride[3], k, a.k.stride[3], a.q.size[3]);
                sum += exp(logit_exact(a, seq, row[r], j, product) - lse);
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
