// The gradients of what is added to the logits, the bias and the ALiBi slopes: sums of the gradients of the logits,
// made once more, 64 queries by 64 keys at a time, by blocks that each own their part of the result. So every sum has
// one order, also over dimensions along which the bias is broadcast.
#include "chunked.h"
#include "gradient.h"

namespace metate::cuda::flash {
namespace {

struct LogitGradient {
    Backward b;
    View<4> dbias;
    int tiles[4], sums[4];  // blocks along each dimension of the bias, and how many tiles each sums along it
    View<2> dslopes;
    float* partial;  // one per tile of queries
};

// The gradients of the logits of 64 queries and 64 keys.
template <typename T>
METATE_DEVICE void logit_gradient(float (&error)[1][8][4], const Backward& b, const Scorer<true>& scorer,
                                  int first_query, int first_key, unsigned char* shared) {
    const Problem& p = b.problem;
    const int kv_head = scorer.head / p.group;
    const Sequence& sequence = scorer.s;
    float s[1][8][4];
    multiply_chunks<T>(s, queries_of(p, p.a.q, b.vector_q, sequence, scorer.head), first_query,
                       keys_of(p, p.a.k, b.vector_k, sequence, kv_head), first_key, shared);
    multiply_chunks<T>(error, queries_of(p, b.grad_out, b.vector_grad_out, sequence, scorer.head), first_query,
                       keys_of(p, p.a.v, b.vector_v, sequence, kv_head), first_key, shared);
    const Lines<false, 1, 8> lines(first_query, first_key, warp());
    differentiate<T, false>(s, error, scorer, lines, partial, [&](int line) {
        return row_state(b, sequence, scorer.head, least(lines.query(line), sequence.queries - 1));
    });
}

// Writes a tile's sums to the gradient of the bias: over all its rows, or columns, where the bias has but one.
METATE_DEVICE void store_sums(const float (&sums)[1][8][4], const View<4>& dbias, float* out, int first_query,
                              int first_key, bool one_row, bool one_column, unsigned char* shared) {
    constexpr int pitch = 65;
    const auto at = [&](int i, int j) { return shared + (i * pitch + j) * 4; };
    const Lines<false, 1, 8> lines(0, 0, warp());
    cp_async_wait<0>();
    sync_threads();
    METATE_UNROLL
    for (int e = 0; e < 32; ++e) {
        store_shared(at(lines.query(e / 16), lines.key(e % 16)), sums[0][e % 16 / 2][e / 16 * 2 + e % 2]);
    }
    sync_threads();
    const int thread = thread_index();
    if (one_row && thread < 64) {
        float sum = 0.f;
        for (int i = 0; i < 64; ++i) sum += load_shared<float>(at(i, thread));
        store_shared(at(0, thread), sum);
    }
    sync_threads();
    const int rows = one_row ? 1 : least(64, static_cast<int>(dbias.size[2]) - first_query);
    const int columns = one_column ? 1 : least(64, static_cast<int>(dbias.size[3]) - first_key);
    for (int index = thread; index < rows * columns; index += chunk_threads) {
        const int i = index / columns, j = index % columns;
        float sum = load_shared<float>(at(i, j));
        for (int other = 1; one_column && other < 64; ++other) sum += load_shared<float>(at(i, other));
        store_global(out + (first_query + i) * dbias.stride[2] + (first_key + j) * dbias.stride[3], sum);
    }
}

template <typename T>
METATE_KERNEL(chunk_threads, 1)
grad_bias_kernel(METATE_PARAMETER(LogitGradient, g)) {
    METATE_SHARED(unsigned char, shared);
    const Problem& p = g.b.problem;
    int index = block_index().x, own[4];
    METATE_UNROLL
    for (int i = 3; i >= 0; --i) {
        own[i] = index % g.tiles[i];
        index /= g.tiles[i];
    }
    float sums[1][8][4];
    clear(sums);
    METATE_NO_UNROLL
    for (int n = 0; n < g.sums[0] * g.sums[1] * g.sums[2] * g.sums[3]; ++n) {
        // One of the tiles along broadcast dimensions.
        int rest = n;
        const int j = own[3] + rest % g.sums[3];
        rest /= g.sums[3];
        const int i = own[2] + rest % g.sums[2];
        rest /= g.sums[2];
        const int h = own[1] + rest % g.sums[1], b = own[0] + rest / g.sums[1];
        const Scorer<true> scorer(p, {b, 0, 0, p.queries, p.keys, false}, h);
        const Bounds bounds = scorer.bounds(i * 64, 64, i);
        if (scorer.kind(bounds, i * 64, i * 64 + 64, j * 64, j * 64 + 64) == skipped) continue;
        float error[1][8][4];
        logit_gradient<T>(error, g.b, scorer, i * 64, j * 64, shared);
        METATE_UNROLL
        for (int e = 0; e < 32; ++e) sums[0][e / 4][e % 4] += error[0][e / 4][e % 4];
    }
    float* const out = static_cast<float*>(g.dbias.data) + own[0] * g.dbias.stride[0] + own[1] * g.dbias.stride[1];
    store_sums(sums, g.dbias, out, own[2] * 64, own[3] * 64, g.dbias.stride[2] == 0, g.dbias.stride[3] == 0, shared);
}

// One partial sum per tile of queries and head.
template <typename T>
METATE_KERNEL(chunk_threads, 1)
grad_slopes_kernel(METATE_PARAMETER(LogitGradient, g)) {
    METATE_SHARED(unsigned char, shared);
    const Problem& p = g.b.problem;
    const Place place = locate(p, false, 64, g.b.tiles, p.heads, false);
    const Scorer<true> scorer(p, place.sequence, place.head);
    float sum = 0.f;
    if (place.first < place.sequence.queries) {
        const Bounds bounds = scorer.bounds(place.first, 64, place.slot);
        const int end = bounds.any.high > bounds.any.low ? (bounds.any.high + 63) / 64 : 0;
        METATE_NO_UNROLL
        for (int tile = bounds.any.low / 64; tile < end; ++tile) {
            if (scorer.kind(bounds, place.first, place.first + 64, tile * 64, tile * 64 + 64) == skipped) continue;
            float error[1][8][4];
            logit_gradient<T>(error, g.b, scorer, place.first, tile * 64, shared);
            const Lines<false, 1, 8> lines(place.first, tile * 64, warp());
            lines.each(error, [&](float x, int i, int j) { sum -= x * scorer.distance(i, j); });
        }
    }
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) sum += shuffle_xor(sum, flip);
    cp_async_wait<0>();
    sync_threads();
    if (lane() == 0) store_shared(shared + warp() * 4, sum);
    sync_threads();
    if (thread_index() != 0) return;
    sum = 0.f;
    for (int w = 0; w < chunk_threads / warp_size; ++w) sum += load_shared<float>(shared + w * 4);
    const int64_t line = static_cast<int64_t>(p.packed ? 0 : place.sequence.batch) * p.heads + place.head;
    store_global(g.partial + line * g.b.tiles + place.slot, sum);
}

// Sums the partial sums of each slope: one thread per slope.
METATE_KERNEL(32, 1)
sum_slopes_kernel(METATE_PARAMETER(LogitGradient, g)) {
    const Problem& p = g.b.problem;
    const int64_t heads = p.a.q.size[2], index = static_cast<int64_t>(block_index().x) * 32 + thread_index();
    const int64_t row = index / heads, h = index % heads;
    if (row >= g.dslopes.size[0]) return;
    // A slope of one batch element or packed sequence, or of all of them.
    const bool all = g.dslopes.size[0] == 1;
    int64_t first = all ? 0 : row, last = all ? p.a.q.size[0] : row + 1;
    int low = 0, high = g.b.tiles;
    if (p.packed) {
        first = 0, last = 1;
        if (!all) {
            low = packed_slot(p.a.cu_seqlens_q, static_cast<int>(row) + 1, p.queries, 64);
            high = packed_slot(p.a.cu_seqlens_q, static_cast<int>(row) + 2, p.queries, 64);
        }
    }
    float sum = 0.f;
    for (int64_t b = first; b < last; ++b) {
        for (int slot = low; slot < high; ++slot)
            sum += load_global<float>(g.partial + (b * heads + h) * g.b.tiles + slot);
    }
    store_global(static_cast<float*>(g.dslopes.data) + row * g.dslopes.stride[0] + h * g.dslopes.stride[1], sum);
}

}  // namespace

void grad_bias(const Backward& b, const View<4>& dbias, const Device& device) {
    LogitGradient g{};
    g.b = b;
    g.dbias = dbias;
    int64_t blocks = 1, sums = 1;
    for (int i = 0; i < 4; ++i) {
        const int64_t all = i < 2 ? dbias.size[i] : (dbias.size[i] + 63) / 64;
        g.tiles[i] = dbias.stride[i] == 0 ? 1 : static_cast<int>(all);
        g.sums[i] = dbias.stride[i] == 0 ? static_cast<int>(all) : 1;
        blocks *= g.tiles[i];
        sums *= g.sums[i];
    }
    if (blocks > 0x7fffffff || sums > 0x7fffffff) refuse("more than 2^31 tiles of the bias");
    for_dtype(b.problem.a.q.dtype, [&]<typename T>() {
        launch(grad_bias_kernel<T>, {static_cast<int>(blocks)}, chunk_threads, chunked_shared_bytes, device.stream, g);
    });
}

void grad_slopes(const Backward& b, const View<2>& dslopes, float* partial, const Device& device) {
    LogitGradient g{};
    g.b = b;
    g.b.tiles = slots_of(b.problem, false, 64);
    g.dslopes = dslopes;
    g.partial = partial;
    const int blocks = grid_of(b.problem, g.b.tiles, b.problem.a.q.size[2]);
    for_dtype(b.problem.a.q.dtype, [&]<typename T>() {
        launch(grad_slopes_kernel<T>, {blocks}, chunk_threads, chunked_shared_bytes, device.stream, g);
    });
    const int64_t slopes = dslopes.size[0] * dslopes.size[1];
    launch(sum_slopes_kernel, {static_cast<int>((slopes + 31) / 32)}, 32, 0, device.stream, g);
}

}  // namespace metate::cuda::flash
