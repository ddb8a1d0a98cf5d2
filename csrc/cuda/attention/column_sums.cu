// Column sums of the probabilities, in two passes of one kernel. In the first a block finds the softmax of 64 rows,
// from the same logits: where they are large, an lse would have been rounded too much. In the second it keeps 64 keys
// of one query head and walks over the queries that see them.
#include <math.h>

#include "chunked.h"
#include "host.h"
#include "softmax.h"

namespace metate::cuda::flash {
namespace {

struct ColumnSums {
    Problem problem;
    View<3> largest, share;  // probability = 2^(logit - largest) · share, with binary logits
    View<3> sums;
    int tiles;
    bool vector_q, vector_k, first_pass;
};

template <typename T>
METATE_DEVICE void find_softmax(const ColumnSums& f, unsigned char* shared) {
    const Problem& p = f.problem;
    const Place place = locate(p, false, 64, f.tiles, p.heads, p.right >= 0);
    const Sequence& sequence = place.sequence;
    if (place.first >= sequence.queries) return;
    const Scorer<true> scorer(p, sequence, place.head);
    const Matrix q = queries_of(p, p.a.q, f.vector_q, sequence, place.head);
    const Matrix k = keys_of(p, p.a.k, f.vector_k, sequence, place.head / p.group);
    float largest[2] = {-infinite(), -infinite()}, sum[2] = {}, no_values[1][1][4] = {};
    for (KeyTiles<true, 64, 64> keys(scorer, place); !keys.at_end(); keys.find(keys.tile + 1)) {
        float s[1][8][4];
        multiply_chunks<T>(s, q, place.first, k, keys.first_key(), shared);
        const Lines<false, 1, 8> lines(place.first, keys.first_key(), warp());
        make_logits<T, false>(s, s, scorer, lines);
        mask(s, scorer, lines);
        softmax<false>(s, largest, sum, no_values, 1.f);
    }

    float sink = -infinite();  // one more logit in the denominator
    if (p.a.sinks)
        sink =
            load_global<float>(static_cast<const float*>(p.a.sinks.data) + place.head * p.a.sinks.stride[0]) * log2_e;
    const Lines<false, 1, 8> lines(place.first, 0, warp());
    METATE_UNROLL
    for (int r = 0; r < 2; ++r) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        const int i = lines.query(r);
        if ((lane() & 3) != 0 || i >= sequence.queries) continue;
        const float top = fmaxf(largest[r], sink), base = top == -infinite() ? 0.f : top;
        const float total = sum[r] * fast_exp2(largest[r] - base) + fast_exp2(sink - base);
        store_global(row_values(p, f.largest, sequence, place.head) + i, base);
        store_global(row_values(p, f.share, sequence, place.head) + i, total == 0.f ? 0.f : 1.f / total);
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
    const float* const largest = row_values(p, f.largest, sequence, place.head);
    const float* const share = row_values(p, f.share, sequence, place.head);

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
            const float base = load_global<float>(largest + i), weight = load_global<float>(share + i);
            METATE_UNROLL
            for (int place_ = 0; place_ < lines.places; ++place_) {
                sums[place_] += fast_exp2(lines.at(s, line, place_) - base) * weight;
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

}  // namespace
}  // namespace metate::cuda::flash

namespace metate::cuda {

void attention_column_sums(const AttentionColumnSums& a, const Device& device) {
    using namespace flash;
    Problem p = problem_of(a.problem, true);
    const int64_t heads = p.heads, rows = p.a.q.size[0] * heads * p.queries;
    const size_t bytes = summary_bytes(p, 64);
    auto* const scratch = static_cast<unsigned char*>(device.scratch(bytes + 2 * rows * sizeof(float), device.context));
    if (bytes) summarise(p, 64, scratch, device);
    const View<3> largest{
        scratch + bytes, DType::f32, {p.a.q.size[0], heads, p.queries}, {heads * p.queries, p.queries, 1}};
    View<3> share = largest;
    share.data = static_cast<float*>(largest.data) + rows;
    for (const bool first : {true, false}) {
        const ColumnSums f{p,
                           largest,
                           share,
                           a.sums,
                           slots_of(p, !first, 64),
                           moves_vectors(a.problem.q),
                           moves_vectors(a.problem.k),
                           first};
        for_dtype(a.problem.q.dtype, [&]<typename T>() {
            launch(column_sums_kernel<T>, {grid_of(p, f.tiles, heads)}, chunk_threads, chunked_shared_bytes,
                   device.stream, f);
        });
    }
}

}  // namespace metate::cuda
