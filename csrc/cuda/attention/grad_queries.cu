// The gradient of the queries: a block keeps a tile of queries and walks over the keys they see, as the forward does,
// two tiles of keys and values in flight. It makes the probabilities again, and nobody else adds to its rows: the
// result does not depend on the order in which blocks run.
#include "gradient.h"

namespace metate::cuda::flash {
namespace {

template <typename T, int head, bool general>
METATE_KERNEL(choose(Pass::grad_queries, head, general).threads(), 1)
grad_queries_kernel(METATE_PARAMETER(Backward, b)) {
    METATE_SHARED(unsigned char, shared);
    constexpr Config c = choose(Pass::grad_queries, head, general);
    constexpr int m = c.fragments, rows = c.rows(), step = c.step, pitch = c.head * 2;
    unsigned char *const q_tile = shared, *const grad_tile = q_tile + rows * pitch,
                         *const steps = grad_tile + rows * pitch;
    const Problem& p = b.problem;

    // Which queries, and which tiles of keys they see.
    const Place place = locate(p, false, rows, b.tiles, p.heads, p.right >= 0);
    if (place.first >= place.sequence.queries) return;
    const Scorer<general> scorer(p, place.sequence, place.head);
    KeyTiles<general, rows, step> keys(scorer, place);

    // The first copies.
    const Matrix k = keys_of(p, p.a.k, b.vector_k, place.sequence, place.head / p.group);
    const Matrix v = keys_of(p, p.a.v, b.vector_v, place.sequence, place.head / p.group);
    const auto load_step = [&](int stage) {
        load_tile<step, c.head, c.threads()>(steps + stage * 2 * step * pitch, k, keys.first_key());
        load_tile<step, c.head, c.threads()>(steps + (stage * 2 + 1) * step * pitch, v, keys.first_key());
    };
    if (!keys.at_end()) {
        load_tile<rows, c.head, c.threads()>(q_tile, queries_of(p, p.a.q, b.vector_q, place.sequence, place.head),
                                             place.first);
        load_tile<rows, c.head, c.threads()>(
            grad_tile, queries_of(p, b.grad_out, b.vector_grad_out, place.sequence, place.head), place.first);
        load_step(0);
    }
    cp_async_commit();
    float dq[m][c.head / 8][4];
    clear(dq);

    int stage = 0;
    METATE_NO_UNROLL
    while (!keys.at_end()) {
        // This step is there, and everybody is done with the one before: fetch the next into its place. A masked key
        // that is NaN must not reach a query through its weight of 0.
        unsigned char* const k_tile = steps + stage * 2 * step * pitch;
        unsigned char* const v_tile = k_tile + step * pitch;
        const int first_key = keys.first_key();
        const TileKind kind = keys.kind;
        cp_async_wait<0>();
        sync_threads();
        keys.find(keys.tile + 1);
        stage ^= 1;
        if (!keys.at_end()) load_step(stage);
        cp_async_commit();

        // Dot products, probabilities, gradients of the dot products.
        float s[m][step / 8][4], error[m][step / 8][4];
        clear(s);
        clear(error);
        multiply_transposed<T, c.head>(s, q_tile, k_tile, warp());
        multiply_transposed<T, c.head>(error, grad_tile, v_tile, warp());
        const Lines<false, m, step / 8> lines(place.first, first_key, warp());
        differentiate<T, true>(s, error, scorer, lines, kind, [&](int line) {
            return row_state(b, scorer.s, scorer.head, least(lines.query(line), scorer.s.queries - 1));
        });

        // Their product with the keys.
        uint32_t left[m][step / 16][4];
        pack_left<T>(left, error);
        bool poisoned = false;
        if (kind == partial) {
            sync_threads();
            poisoned = sync_threads_or(clear_nonfinite<T, step, c.head, c.threads()>(k_tile));
        }
        multiply<T, c.head, 1>(dq, left, k_tile, 0);
        if (poisoned) add_nonfinite<T, 1>(dq, left, k, first_key, 0);
    }

    // The gradient, through the place of the queries. (Where this is was not worth a register through the loop.)
    const Place here = locate(p, false, rows, b.tiles, p.heads, p.right >= 0);
    float factor[2 * m];
    METATE_UNROLL
    for (int r = 0; r < 2 * m; ++r) factor[r] = p.scale;
    store_through<T, rows, c.head, c.threads()>(q_tile, dq, factor,
                                                queries_of(p, b.dq, b.vector_dq, here.sequence, here.head), here.first);
}

}  // namespace

void grad_queries(Backward b, void* scratch, const Device& device) {
    for_kernel(b.problem.a, [&]<typename T, int head, bool general>() {
        constexpr Config c = choose(Pass::grad_queries, head, general);
        summarise(b.problem, c.rows(), scratch, device);
        b.tiles = slots_of(b.problem, false, c.rows());
        launch(grad_queries_kernel<T, head, general>, {grid_of(b.problem, b.tiles, b.problem.a.q.size[2])}, c.threads(),
               shared_bytes(Pass::grad_queries, c), device.stream, b);
    });
}

}  // namespace metate::cuda::flash
