// Column sums of the probabilities, and what they and the backward need before: the softmax of every row. Both are
// passes of one kernel. In the first a block has 64 rows of one query head, in the second 64 keys and walks over the
// queries that see them.
#include <math.h>

#include "chunked.h"
#include "rows.h"

namespace metate::cuda::flash {
namespace {

struct ColumnSums {
    Problem problem;
    View<3> lse;
    float limit;  // of |lse|, beyond which it does not tell the softmax
    Rows rows;
    View<3> sums;
    int tiles;
    bool vector_q, vector_k, first_pass;
};

// The largest score of each row and the sum of powers relative to it, from 64 keys more.
METATE_DEVICE void take_scores(const float (&s)[1][8][4], float unit, float (&largest)[2], float (&sum)[2]) {
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        float top = largest[r];
        METATE_UNROLL
        for (int c = 0; c < 16; ++c) top = fmaxf(top, s[0][c / 2][r * 2 + c % 2]);
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float base = top == -infinite() ? 0.f : top;
        sum[r] *= fast_exp2((largest[r] - base) * unit);
        largest[r] = top;
        METATE_UNROLL
        for (int c = 0; c < 16; ++c) sum[r] += fast_exp2((s[0][c / 2][r * 2 + c % 2] - base) * unit);
    }
}

template <typename T>
METATE_DEVICE void find_softmax(const ColumnSums& f, unsigned char* shared) {
    const Problem& p = f.problem;
    const Place place = locate(p, false, 64, f.tiles, p.heads, p.right >= 0);
    const Sequence& sequence = place.sequence;
    if (place.first >= sequence.queries) return;
    const Lines<false, 1, 8> rows(place.first, 0, warp());
    float lse[2], largest[2] = {-infinite(), -infinite()}, sum[2] = {};
    bool coarse[2];
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int i = rows.query(r);
        lse[r] = i < sequence.queries
                   ? load_global<float>(row_values(p, f.lse, sequence, place.head) + i * f.lse.stride[2])
                   : -infinite();
        coarse[r] = !(fabsf(lse[r]) <= f.limit) && lse[r] != -infinite();
    }
    if (sync_threads_or(coarse[0] || coarse[1])) {
        const Scorer<true> scorer(p, sequence, place.head);
        const Matrix q = queries_of(p, p.a.q, f.vector_q, sequence, place.head);
        const Matrix k = keys_of(p, p.a.k, f.vector_k, sequence, place.head / p.group);
        for (KeyTiles<true, 64, 64> keys(scorer, place); !keys.at_end(); keys.find(keys.tile + 1)) {
            float s[1][8][4];
            multiply_chunks<T>(s, q, place.first, k, keys.first_key(), shared);
            const Lines<false, 1, 8> lines(place.first, keys.first_key(), warp());
            if (p.unit == 1.f) make_logits<T, false>(s, s, scorer, lines);
            mask(s, scorer, lines);
            take_scores(s, p.unit, largest, sum);
        }
    }

    float sink = -infinite();  // one more logit in the denominator
    if (p.a.sinks)
        sink =
            load_global<float>(static_cast<const float*>(p.a.sinks.data) + place.head * p.a.sinks.stride[0]) * log2_e;
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        const int i = rows.query(r);
        if ((lane() & 3) != 0 || i >= sequence.queries) continue;
        float base = 0.f, rest = lse[r] == -infinite() ? infinite() : lse[r] * log2_e;
        if (coarse[r]) {
            base = largest[r] == -infinite() ? 0.f : largest[r];
            const float ahead = sink - base * p.unit, above = fmaxf(ahead, 0.f);
            rest =
                sum[r] == 0.f ? infinite() : above + fast_log2(sum[r] * fast_exp2(-above) + fast_exp2(ahead - above));
        }
        store_global(row_values(p, f.rows.largest, sequence, place.head) + i, base);
        store_global(row_values(p, f.rows.lse, sequence, place.head) + i, rest);
    }
    cp_async_wait<0>();
}

template <typename T>
METATE_DEVICE void add_columns(const ColumnSums& f, unsigned char* shared) {
    const Problem& p = f.problem;
    const Place place = locate(p, true, 64, f.tiles, p.heads, false);
    const Sequence& sequence = place.sequence;
    if (place.first >= sequence.keys) return;
    const Scorer<true> scorer(p, sequence, place.head);
    const Matrix q = queries_of(p, p.a.q, f.vector_q, sequence, place.head);
    const Matrix k = keys_of(p, p.a.k, f.vector_k, sequence, place.head / p.group);
    const float* const largest = row_values(p, f.rows.largest, sequence, place.head);
    const float* const lse = row_values(p, f.rows.lse, sequence, place.head);

    float sums[2] = {};
    const int slot = p.packed && p.a.intervals ? packed_slot(p.a.cu_seqlens_q, sequence.batch + 1, p.queries, 64) : 0;
    const int end = (sequence.queries + 63) / 64;
    TileKind kind = skipped;
    const auto kind_of = [&](int n) {
        return scorer.kind(scorer.bounds(n * 64, 64, slot + n), n * 64, n * 64 + 64, place.first, place.first + 64);
    };
    for (int tile = next_tile<true>(0, end, kind, kind_of); tile < end;
         tile = next_tile<true>(tile + 1, end, kind, kind_of)) {
        float s[1][8][4];
        multiply_chunks<T>(s, k, place.first, q, tile * 64, shared);
        const Lines<true, 1, 8> lines(place.first, tile * 64, warp());
        make_logits<T, false>(s, s, scorer, lines);
        mask(s, scorer, lines);
        METATE_UNROLL
        for (int line = 0; line < lines.lines; ++line) {
            const int i = lines.query(line);
            if (i >= sequence.queries) continue;
            const float base = load_global<float>(largest + i), rest = load_global<float>(lse + i);
            METATE_UNROLL
            for (int place_ = 0; place_ < lines.places; ++place_) {
                sums[place_] += fast_exp2(lines.at(s, line, place_) - base - rest);
            }
        }
    }

    float* const out = static_cast<float*>(f.sums.data) + (p.packed ? 0 : sequence.batch) * f.sums.stride[0] +
                       place.head * f.sums.stride[1] + sequence.first_key * f.sums.stride[2];
    const Lines<true, 1, 8> lines(place.first, 0, warp());
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        sums[r] += shuffle_xor(sums[r], 1);
        sums[r] += shuffle_xor(sums[r], 2);
        if ((lane() & 3) == 0 && lines.key(r) < sequence.keys) {
            store_global(out + lines.key(r) * f.sums.stride[2], sums[r]);
        }
    }
    cp_async_wait<0>();
}

template <typename T>
METATE_KERNEL(chunk_threads, 2)
column_sums_kernel(METATE_PARAMETER(ColumnSums, f)) {
    METATE_SHARED(unsigned char, shared);
    f.first_pass ? find_softmax<T>(f, shared) : add_columns<T>(f, shared);
}

template <bool first_pass>
void run_pass(ColumnSums f, const Device& device) {
    const Problem& p = f.problem;
    f.first_pass = first_pass;
    f.tiles = slots_of(p, !first_pass, 64);
    for_dtype(p.a.q.dtype, [&]<typename T>() {
        launch(column_sums_kernel<T>, {grid_of(p, f.tiles, p.heads)}, chunk_threads, chunked_shared_bytes,
               device.stream, f);
    });
}

ColumnSums passes_of(const Problem& p, const View<3>& lse, double limit, const Rows& rows) {
    return {p, lse, static_cast<float>(limit), rows, {}, 0, moves_vectors(p.a.q), moves_vectors(p.a.k), false};
}

}  // namespace

Rows rows_in(const Problem& p, void* memory) {
    const int64_t batch = p.a.q.size[0], heads = p.heads, queries = p.queries;
    Rows rows{{memory, DType::f32, {batch, heads, queries}, {heads * queries, queries, 1}}, {}};
    rows.lse = rows.largest;
    rows.lse.data = static_cast<float*>(memory) + batch * heads * queries;
    return rows;
}

void find_softmax(const Problem& p, const View<3>& lse, double limit, const Rows& rows, const Device& device) {
    run_pass<true>(passes_of(p, lse, limit, rows), device);
}

}  // namespace metate::cuda::flash

namespace metate::cuda {

void attention_column_sums(const AttentionColumnSums& a, const Device& device) {
    using namespace flash;
    Problem p = problem_of(a.problem, true);
    const size_t bytes = summary_bytes(p, 64);
    auto* const scratch = static_cast<unsigned char*>(device.scratch(bytes + rows_bytes(p), device.context));
    if (bytes) summarise(p, 64, scratch, device);
    ColumnSums f = passes_of(p, a.lse, largest_lse(DType::f32), rows_in(p, scratch + bytes));
    f.sums = a.sums;
    run_pass<true>(f, device);
    run_pass<false>(f, device);
}

}  // namespace metate::cuda
