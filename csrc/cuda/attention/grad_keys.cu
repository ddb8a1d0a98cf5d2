// The gradients of keys and values: a block keeps a tile of keys and values and walks over the queries that see them,
// in all query heads that share them. The products are taken the other way round, keys by queries, so that
// probabilities and gradients leave one product in the registers where the next wants them. Every sum has one order.
#include "gradient.h"

namespace metate::cuda::flash {
namespace {

// One tile of queries of one query head.
struct Step {
    int head, tile;
    TileKind kind;
};

template <typename T, int head_dim, bool general>
struct KeyBlock {
    static constexpr Config c = choose(Pass::grad_keys, head_dim, general);
    static constexpr int m = c.fragments, rows = c.rows(), step = c.step, pitch = c.head * 2;
    const Backward& b;
    const Problem& p;
    Place place;

    METATE_DEVICE explicit KeyBlock(const Backward& backward) : b(backward), p(backward.problem) {
        place = locate(p, true, rows, b.tiles, p.heads / p.group, false);
    }

    METATE_DEVICE int end_head() const { return (place.head + 1) * p.group; }

    // The tiles of queries that the windows let see these keys.
    METATE_DEVICE Range window() const {
        const Sequence& s = place.sequence;
        const int diagonal = p.a.top_left ? 0 : s.keys - s.queries, last = least(place.first + rows, s.keys) - 1;
        const int low = p.right >= 0 ? most(0, place.first - diagonal - p.right) : 0;
        const int high = p.left >= 0 ? least(s.queries, last - diagonal + p.left + 1) : s.queries;
        return {low / step, high > low ? (high + step - 1) / step : 0};
    }

    METATE_DEVICE TileKind kind_of(const Scorer<general>& scorer, int tile, int first_slot) const {
        const int first = tile * step;
        const TileKind kind = scorer.kind(scorer.bounds(first, step, first_slot + tile), first, first + step,
                                          place.first, place.first + rows);
        return kind == full && first + step > place.sequence.queries ? partial : kind;
    }

    // The first step from `from` on that sees anything; its head is beyond the last when there is none.
    METATE_DEVICE Step find(Step from) const {
        const Range range = window();
        const Sequence& s = place.sequence;
        METATE_NO_UNROLL
        for (; from.head < end_head(); ++from.head, from.tile = range.low) {
            const Scorer<general> scorer(p, s, from.head);
            const bool numbered = general && p.packed && p.a.intervals;
            const int slot = numbered ? packed_slot(p.a.cu_seqlens_q, s.batch + 1, p.queries, step) : 0;
            from.tile =
                next_tile<general>(from.tile, range.high, from.kind, [&](int n) { return kind_of(scorer, n, slot); });
            if (from.tile < range.high) break;
        }
        return from;
    }

    METATE_DEVICE Matrix queries(int head) const { return queries_of(p, p.a.q, b.vector_q, place.sequence, head); }
    METATE_DEVICE Matrix gradients(int head) const {
        return queries_of(p, b.grad_out, b.vector_grad_out, place.sequence, head);
    }

    // Starts the copy of a step's queries and gradients. The states of its rows come back in registers: the largest
    // score of row r in thread r, its lse in thread step + r, its delta in thread 2 · step + r.
    METATE_DEVICE float load(const Step& to, unsigned char* tiles) const {
        load_tile<step, c.head, c.threads()>(tiles, queries(to.head), to.tile * step);
        load_tile<step, c.head, c.threads()>(tiles + step * pitch, gradients(to.head), to.tile * step);
        const int i = to.tile * step + thread_index() % step;
        if (thread_index() >= 3 * step || i >= place.sequence.queries) return 0.f;
        const RowState state = row_state(b, place.sequence, to.head, i);
        return thread_index() < step ? state.largest : thread_index() < 2 * step ? state.lse : state.delta;
    }

    // Starts the copies of the keys and values, and of the first step with what the forward left of it.
    METATE_DEVICE void begin(const Step& first, unsigned char* k_tile, unsigned char* v_tile, unsigned char* steps,
                             unsigned char* states) const {
        load_tile<rows, c.head, c.threads()>(k_tile, keys_of(p, p.a.k, b.vector_k, place.sequence, place.head),
                                             place.first);
        load_tile<rows, c.head, c.threads()>(v_tile, keys_of(p, p.a.v, b.vector_v, place.sequence, place.head),
                                             place.first);
        const float fetched = load(first, steps);
        if (thread_index() < 3 * step) store_shared(states + thread_index() * 4, fetched);
    }

    // Writes the gradients, through the places of keys and values.
    template <int n>
    METATE_DEVICE void store(unsigned char* k_tile, unsigned char* v_tile, const float (&dk)[m][n][4],
                             const float (&dv)[m][n][4], int row_warp, int part) const {
        float scale[2 * m], dropout_scale[2 * m];
        METATE_UNROLL
        for (int r = 0; r < 2 * m; ++r) scale[r] = p.scale, dropout_scale[r] = p.dropout_scale;
        cp_async_wait<0>();
        sync_threads();
        put_tile<T, c.head, c.parts>(k_tile, dk, scale, row_warp, part);
        put_tile<T, c.head, c.parts>(v_tile, dv, dropout_scale, row_warp, part);
        sync_threads();
        store_tile<rows, c.head, c.threads()>(k_tile, keys_of(p, b.dk, b.vector_dk, place.sequence, place.head),
                                              place.first);
        store_tile<rows, c.head, c.threads()>(v_tile, keys_of(p, b.dv, b.vector_dv, place.sequence, place.head),
                                              place.first);
    }
};

template <typename T, int head, bool general>
METATE_KERNEL(choose(Pass::grad_keys, head, general).threads(), 1)
grad_keys_kernel(METATE_PARAMETER(Backward, b)) {
    METATE_SHARED(unsigned char, shared);
    using Block = KeyBlock<T, head, general>;
    constexpr Config c = Block::c;
    constexpr int m = c.fragments, rows = c.rows(), step = c.step, pitch = c.head * 2, n = c.head / c.parts / 8;
    unsigned char *const k_tile = shared, *const v_tile = k_tile + rows * pitch, *const steps = v_tile + rows * pitch;
    unsigned char* const states = steps + 4 * step * pitch;
    const Problem& p = b.problem;

    // Which keys, and the first copies.
    const Block block(b);
    const Place& place = block.place;
    if (place.first >= place.sequence.keys) return;
    const int row_warp = warp() % (c.warps / c.parts), part = warp() / (c.warps / c.parts);
    Step at = block.find({place.head * p.group, block.window().low, skipped});
    if (at.head < block.end_head()) block.begin(at, k_tile, v_tile, steps, states);
    cp_async_commit();
    float dk[m][n][4], dv[m][n][4];
    clear(dk);
    clear(dv);

    int stage = 0;
    METATE_NO_UNROLL
    while (at.head < block.end_head()) {
        // This step is there, and everybody is done with the one before: fetch the next into its place.
        unsigned char* const q_tile = steps + stage * 2 * step * pitch;
        unsigned char* const grad_tile = q_tile + step * pitch;
        unsigned char* const row_states = states + stage * step * 12;
        const Step now = at;
        cp_async_wait<0>();
        sync_threads();
        at = block.find({at.head, at.tile + 1, skipped});
        stage ^= 1;
        float fetched = 0.f;
        const bool more = at.head < block.end_head();
        if (more) fetched = block.load(at, steps + stage * 2 * step * pitch);
        cp_async_commit();

        // Dot products, probabilities, gradients of the dot products.
        float s[m][step / 8][4], error[m][step / 8][4];
        clear(s);
        clear(error);
        multiply_transposed<T, c.head>(s, k_tile, q_tile, row_warp);
        multiply_transposed<T, c.head>(error, v_tile, grad_tile, row_warp);
        const Scorer<general> scorer(p, place.sequence, now.head);
        const Lines<true, m, step / 8> lines(place.first, now.tile * step, row_warp);
        const TileKind kind = general ? now.kind : block.kind_of(scorer, now.tile, 0);
        differentiate<T, true>(s, error, scorer, lines, kind, [&](int line) {
            const unsigned char* const row = row_states + (lines.query(line) - now.tile * step) * 4;
            return RowState{load_shared<float>(row), load_shared<float>(row + step * 4),
                            load_shared<float>(row + step * 8)};
        });

        // Their products with the gradients and the queries. A query that sees nothing may be NaN.
        bool poisoned = false;
        if (kind == partial) {
            sync_threads();
            const bool grad = clear_nonfinite<T, step, c.head, c.threads()>(grad_tile);
            poisoned = sync_threads_or(clear_nonfinite<T, step, c.head, c.threads()>(q_tile) || grad);
        }
        uint32_t left[m][step / 16][4];
        pack_left<T>(left, s);
        multiply<T, c.head, c.parts>(dv, left, grad_tile, part);
        if (poisoned) add_nonfinite<T, c.parts>(dv, left, block.gradients(now.head), now.tile * step, part);
        pack_left<T>(left, error);
        multiply<T, c.head, c.parts>(dk, left, q_tile, part);
        if (poisoned) add_nonfinite<T, c.parts>(dk, left, block.queries(now.head), now.tile * step, part);
        if (more && thread_index() < 3 * step) store_shared(states + (stage * 3 * step + thread_index()) * 4, fetched);
    }

    // (Which block this is was not worth a register through the loop.)
    Block(b).store(k_tile, v_tile, dk, dv, row_warp, part);
}

}  // namespace

void grad_keys(Backward b, void* scratch, const Device& device) {
    for_kernel(b.problem.a, [&]<typename T, int head, bool general>() {
        constexpr Config c = choose(Pass::grad_keys, head, general);
        summarise(b.problem, c.step, scratch, device);
        b.tiles = slots_of(b.problem, true, c.rows());
        launch(grad_keys_kernel<T, head, general>, {grid_of(b.problem, b.tiles, b.problem.a.k.size[2])}, c.threads(),
               shared_bytes(Pass::grad_keys, c), device.stream, b);
    });
}

}  // namespace metate::cuda::flash
