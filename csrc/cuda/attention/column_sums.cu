// Column sums of the probabilities: a block keeps 64 keys of one query head and walks over the queries that see them.
#include "chunked.h"
#include "host.h"

namespace metate::cuda::flash {
namespace {

struct ColumnSums {
    Problem problem;
    View<3> lse, sums;
    int tiles;
    bool vector_q, vector_k;
};

template <typename T>
METATE_KERNEL(chunk_threads, 2)
column_sums_kernel(METATE_PARAMETER(ColumnSums, f)) {
    METATE_SHARED(unsigned char, shared);
    const Problem& p = f.problem;
    const Place place = locate(p, true, 64, f.tiles, p.heads, false);
    const Sequence& sequence = place.sequence;
    if (place.first >= sequence.keys) return;
    const Scorer<true> scorer(p, sequence, place.head);
    const Matrix q = queries_of(p, p.a.q, f.vector_q, sequence, place.head);
    const Matrix k = keys_of(p, p.a.k, f.vector_k, sequence, place.head / p.group);
    const float* const lse = row_values(p, f.lse, sequence, place.head);

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
            const float of_row = load_global<float>(lse + i * f.lse.stride[2]);
            const float base = of_row == -infinite() ? infinite() : of_row * log2_e;
            METATE_UNROLL
            for (int place_ = 0; place_ < lines.places; ++place_) {
                sums[place_] += fast_exp2(lines.at(s, line, place_) - base);
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

}  // namespace
}  // namespace metate::cuda::flash

namespace metate::cuda {

void attention_column_sums(const AttentionColumnSums& a, const Device& device) {
    using namespace flash;
    Problem p = problem_of(a.problem, true);
    if (const size_t bytes = summary_bytes(p, 64)) summarise(p, 64, device.scratch(bytes, device.context), device);
    const int tiles = slots_of(p, true, 64);
    for_dtype(a.problem.q.dtype, [&]<typename T>() {
        launch(column_sums_kernel<T>, {grid_of(p, tiles, p.a.q.size[2])}, chunk_threads, chunked_shared_bytes,
               device.stream,
               ColumnSums{p, a.lse, a.sums, tiles, moves_vectors(a.problem.q), moves_vectors(a.problem.k)});
    });
}

}  // namespace metate::cuda
