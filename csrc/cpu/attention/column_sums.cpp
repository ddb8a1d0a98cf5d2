// Column sums of attention probabilities: for each key and head, how much all queries look at it.
//
// A piece of work is a block of keys, and every tile of queries that sees it passes by, in ascending order. Where the
// lse of rows is coarse, their softmax is found first.
#include <math.h>
#include <string.h>

#include "../parallel.h"
#include "exact.h"
#include "softmax.h"

namespace metate::cpu::METATE_ISA {
namespace {

struct Shape {
    const AttentionColumnSums& call;
    Walk walk;
    RowSoftmax softmax;
};

template <class Word>
struct Scratch {
    WalkScratch<Word> walk;
    float *partial, *total, *carry;  // (group, block)
};

template <class Word>
Scratch<Word> take_scratch(const Walk& walk, Arena& arena) {
    const int64_t sums = walk.group * walk.block;
    return {take_walk<Word>(walk, arena), arena.take<float>(sums), arena.take<float>(sums), arena.take<float>(sums)};
}

// Adds the probabilities of row r of a tile to the partial sums of its head.
METATE_FN void add_row(float exponent, const Softmax& of, const TileMask& mask, int r, const float* x, float* partial) {
    if (of.rest == -INFINITY) return;
    for_seen(mask, r, x, [&](int64_t at, vf y) {
        const vf p = exp2(fma(y - splat(of.reference), splat(exponent), splat(of.rest)));
        store(partial + at, load(partial + at) + p);
    });
}

// Adds the partial sums to the totals, with what rounding lost carried over (Kahan), and begins new ones.
template <class Word>
void put_away(const Walk& walk, const Scratch<Word>& my) {
    for (int64_t i = 0; i < walk.group * walk.block; i += width) {
        const vf old = load(my.total + i), more = load(my.partial + i) - load(my.carry + i), sum = old + more;
        store(my.carry + i, (sum - old) - more);
        store(my.total + i, sum);
        store(my.partial + i, splat(0.0f));
    }
}

// The queries whose window reaches a key of key … key+keys-1.
void queries_of(const Attention& a, const Sequence& seq, int64_t key, int64_t keys, int64_t& begin, int64_t& end) {
    begin = a.window_right >= 0 ? clamp(key - a.window_right - seq.diagonal, 0, seq.queries) : 0;
    end = a.window_left >= 0 ? clamp(key + keys + a.window_left - seq.diagonal, 0, seq.queries) : seq.queries;
}

template <class T, class Word>
void run_block(const Shape& s, const Sequence& seq, int64_t kv_head, int64_t key, const Scratch<Word>& my) {
    const Walk& walk = s.walk;
    const int64_t keys = smaller(seq.keys - key, walk.block), group = walk.group;
    float* const sums[] = {my.partial, my.total, my.carry};
    for (float* zero : sums) memset(zero, 0, static_cast<size_t>(group * walk.block) * sizeof(float));
    int64_t begin, end;
    queries_of(walk.a, seq, key, keys, begin, end);
    if (begin < end) {
        const int chunks = pack_block<T>(walk, seq, kv_head, key, my.walk);
        const int64_t rows = seq.queries * group;
        for (int64_t r = begin * group / tile_rows * tile_rows; r < end * group; r += tile_rows) {
            const int live = static_cast<int>(smaller(rows - r, tile_rows));
            for_rows<T>(walk, seq, kv_head, key, chunks, r, live, my.walk,
                        [&](const Row& row, const TileMask& mask, int i, const float* x) {
                            add_row(walk.scoring.exponent, s.softmax.of(seq, row.head, row.query), mask, i, x,
                                    my.partial + row.head % group * walk.block);
                        });
            if ((r / tile_rows + 1) % group == 0) put_away(walk, my);  // a tile of rows of each head at a time
        }
        put_away(walk, my);
    }
    for (int64_t g = 0; g < group; ++g) {
        for (int64_t j = 0; j < keys; ++j) {
            *value_at<float>(s.call.sums, seq.batch, kv_head * group + g, seq.k0 + key + j) =
                my.total[g * walk.block + j];
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

template <class T, class Word>
void run(const AttentionColumnSums& call, const Runtime& runtime) {
    const Attention& a = call.problem;
    Shape s{call, walk_of<Word>(a), {scoring_of(a), call.lse, largest_lse(DType::f32), nullptr}};
    const int64_t heads = a.k.size[2], sequences = sequences_of(a), ranges = sequences + (a.cu_seqlens_k ? 2 : 0);
    int64_t blocks = 0;
    for (int64_t n = 0; n < ranges; ++n) blocks += ceil_div(keys_of(a, n).keys, s.walk.block);
    if (blocks * heads == 0) return;
    const int64_t rows = has_coarse(call.lse, s.softmax.limit) ? places_of(s.walk, nullptr) : 0;
    Place *piece = nullptr, *row_piece = nullptr;
    const auto scratch_of = lay_out(
        runtime, larger(blocks, rows) * heads,
        [&](Arena& arena) {
            piece = arena.take<Place>(blocks);
            row_piece = arena.take<Place>(rows);
            if (rows) s.softmax.found = arena.take<Softmax>(a.q.size[0] * a.q.size[2] * a.q.size[1]);
        },
        [&](Arena& arena) { return take_scratch<Word>(s.walk, arena); });
    for (int64_t n = 0, i = 0; n < ranges; ++n) {
        // With a causal mask the first keys have the most queries.
        for (int64_t key = 0; key < keys_of(a, n).keys; key += s.walk.block) piece[i++] = {n, key};
    }
    if (rows) {
        places_of(s.walk, row_piece);
        find_softmaxes<T, Word>(runtime, s.walk, s.softmax, row_piece, rows,
                                [&](int worker) { return scratch_of(worker).walk; });
    }
    for_pieces(runtime, blocks * heads, [&](int worker, int64_t i) {
        const Place& at = piece[i / heads];
        run_block<T, Word>(s, keys_of(a, at.sequence), i % heads, at.first, scratch_of(worker));
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
