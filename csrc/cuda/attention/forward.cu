// The forward pass: a block keeps a tile of queries and walks over the keys they see with an online softmax
// (FlashAttention-2). Tiles of keys and of values take turns in shared memory: the copy of the one runs while the other
// is multiplied.
#include <math.h>

#include "host.h"
#include "softmax.h"

namespace metate::cuda::flash {
namespace {

struct Forward {
    Problem problem;
    View<4> out;
    View<3> lse;
    int tiles;
    bool vector_q, vector_k, vector_v, vector_out;
};

// The output's factor for each row of this thread, and the row's lse. A sink is one more logit in the denominator.
template <int m>
METATE_DEVICE void finish_rows(const Forward& f, const Place& place, const Lines<false, m, 2>& lines,
                               const float (&largest)[2 * m], float (&sum)[2 * m], float (&factor)[2 * m]) {
    const Problem& p = f.problem;
    const bool sinks = p.a.sinks && !place.sequence.padding;
    const float sink =
        sinks
            ? load_global<float>(static_cast<const float*>(p.a.sinks.data) + place.head * p.a.sinks.stride[0]) * log2_e
            : -infinite();
    float* const lse = row_values(p, f.lse, place.sequence, place.head);
    METATE_UNROLL
    for (int r = 0; r < 2 * m; ++r) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        const float scaled = largest[r] == -infinite() ? -infinite() : product(largest[r], p.unit);
        const float top = fmaxf(scaled, sink), base = top == -infinite() ? 0.f : top;
        const float decay = fast_exp2(scaled - base);
        const float total = sum[r] * decay + fast_exp2(sink - base);
        factor[r] = total == 0.f ? 0.f : decay / total * p.dropout_scale;
        if ((lane() & 3) == 0 && lines.query(r) < place.sequence.queries) {
            store_global(lse + lines.query(r) * f.lse.stride[2], (base + log2f(total)) * ln_2);
        }
    }
}

template <typename T, int head, bool general>
METATE_KERNEL(choose(Pass::forward, head, general).threads(), 1)
forward_kernel(METATE_PARAMETER(Forward, f)) {
    METATE_SHARED(unsigned char, shared);
    constexpr Config c = choose(Pass::forward, head, general);
    constexpr int m = c.fragments, rows = c.rows(), step = c.step, pitch = c.head * 2;
    unsigned char *const q_tile = shared, *const k_tile = q_tile + rows * pitch, *const v_tile = k_tile + step * pitch;
    const Problem& p = f.problem;

    // Which queries, and which tiles of keys they see. Under a causal mask the longest rows start first.
    const Place place = locate(p, false, rows, f.tiles, p.heads, p.right >= 0);
    if (place.first >= place.sequence.queries) return;
    const Scorer<general> scorer(p, place.sequence, place.head);
    KeyTiles<general, rows, step> keys(scorer, place);

    // The first copies.
    const Matrix k = keys_of(p, p.a.k, f.vector_k, place.sequence, place.head / p.group);
    const Matrix v = keys_of(p, p.a.v, f.vector_v, place.sequence, place.head / p.group);
    if (!keys.at_end()) {
        load_tile<rows, c.head, c.threads()>(q_tile, queries_of(p, p.a.q, f.vector_q, place.sequence, place.head),
                                             place.first);
        load_tile<step, c.head, c.threads()>(k_tile, k, keys.first_key());
    }
    cp_async_commit();

    float o[m][c.head / 8][4], largest[2 * m], sum[2 * m], factor[2 * m];
    clear(o);
    METATE_UNROLL
    for (int r = 0; r < 2 * m; ++r) largest[r] = -infinite(), sum[r] = 0.f;

    METATE_NO_UNROLL
    while (!keys.at_end()) {
        // The keys are there; fetch their values while the scores are made.
        cp_async_wait<0>();
        sync_threads();
        const int first_key = keys.first_key();
        load_tile<step, c.head, c.threads()>(v_tile, v, first_key);
        cp_async_commit();
        float s[m][step / 8][4];
        clear(s);
        multiply_transposed<T, c.head>(s, q_tile, k_tile, warp());
        const Lines<false, m, step / 8> lines(place.first, first_key, warp());
        if constexpr (general) make_logits<T, false>(s, s, scorer, lines);
        if (keys.kind == partial) mask(s, scorer, lines);

        // The values are there and the keys no longer needed; fetch the next keys. Where a masked key's value could be
        // NaN, its probability of 0 would not keep it out.
        bool poisoned = false;
        cp_async_wait<0>();
        sync_threads();
        if (keys.kind == partial) {
            poisoned = sync_threads_or(clear_nonfinite<T, step, c.head, c.threads()>(v_tile));
        }
        keys.find(keys.tile + 1);
        if (!keys.at_end()) load_tile<step, c.head, c.threads()>(k_tile, k, keys.first_key());
        cp_async_commit();

        // Probabilities, and their product with the values.
        softmax<!general>(s, largest, sum, o, p.unit);
        if (general && p.a.dropout_threshold != 0) {
            uint32_t kept[lines.lines] = {};
            lines.keep(kept, p, scorer.s, scorer.head);
            lines.drop(s, kept, 1.f);
        }
        uint32_t left[m][step / 16][4];
        pack_left<T>(left, s);
        multiply<T, c.head, 1>(o, left, v_tile, 0);
        if (poisoned) add_nonfinite<T, 1>(o, left, v, first_key, 0);
    }

    // The output, through the place of the queries. (Where this is was not worth a register through the loop.)
    const Place here = locate(p, false, rows, f.tiles, p.heads, p.right >= 0);
    finish_rows<m>(f, here, Lines<false, m, 2>(here.first, 0, warp()), largest, sum, factor);
    store_through<T, rows, c.head, c.threads()>(
        q_tile, o, factor, queries_of(p, f.out, f.vector_out, here.sequence, here.head), here.first);
}

}  // namespace
}  // namespace metate::cuda::flash

namespace metate::cuda {

void attention(const AttentionForward& a, const Device& device) {
    flash::for_kernel(a.problem, [&]<typename T, int head, bool general>() {
        using namespace flash;
        constexpr Config c = choose(Pass::forward, head, general);
        Problem p = problem_of(a.problem, general);
        if (const size_t bytes = summary_bytes(p, c.rows())) {
            summarise(p, c.rows(), device.scratch(bytes, device.context), device);
        }
        const int tiles = slots_of(p, false, c.rows());
        launch(forward_kernel<T, head, general>, {grid_of(p, tiles, p.a.q.size[2])}, c.threads(),
               shared_bytes(Pass::forward, c), device.stream,
               Forward{p, a.out, a.lse, tiles, moves_vectors(a.problem.q), moves_vectors(a.problem.k),
                       moves_vectors(a.problem.v), moves_vectors(a.out)});
    });
}

}  // namespace metate::cuda
