// Brute-force search. Few queries, and those with ranges, look at all their rows; many share the tensor cores' bounds,
// and look at the rows of the groups that these leave.
#include "vectors.h"

namespace metate::cuda {
namespace pq {
namespace {

struct Candidates {
    Vectors v;
    Rows rows;
    Sink sink;
    Bounds bounds;
    int32_t *groups, *counts;  // of the queries of this turn: (queries, bounds.groups) and (queries)
    int64_t first, queries;    // the first query of this turn, and how many there are
};

// Whether a group may hold a row that is not above the limit.
METATE_DEVICE bool may_reach(const Bounds& b, int64_t q, int64_t group, float square, float rough, float limit) {
    return !(bound_at(b, q, group) - error_of(b, square, rough, group) > limit);
}

// k groups that have a row below `limit` are enough: lists the groups whose bound is not above it.
METATE_KERNEL(threads, 2)
limit_kernel(METATE_PARAMETER(Candidates, f)) {
    METATE_SHARED(unsigned char, shared);
    const Bounds& b = f.bounds;
    const int64_t q = block_index().x;
    const float square = load_global<float>(b.squares + q), rough = load_global<float>(b.rough);
    Selection list(shared, f.sink.k);
    METATE_NO_UNROLL
    for (int64_t begin = 0; begin < b.groups; begin += chunk) {
        uint32_t key[each];
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            const int64_t group = begin + i * threads + thread_index();
            key[i] = group < b.groups ? key_of(bound_at(b, q, group) + error_of(b, square, rough, group), false) : none;
        }
        list.offer(key, [&](int i) { return begin + i * threads + thread_index(); });
    }
    list.finish();
    const float limit = distance_of(list.key(f.sink.k - 1), false);
    int count = 0;
    Places places(shared + Selection::bytes(f.sink.k));
    METATE_NO_UNROLL
    for (int64_t begin = 0; begin < b.groups; begin += chunk) {
        bool chosen[each];
        int place[each];
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            const int64_t group = begin + i * threads + thread_index();
            chosen[i] = group < b.groups && may_reach(b, q, group, square, rough, limit);
        }
        const int total = places.assign(chosen, place);
        METATE_UNROLL
        for (int i = 0; i < each; ++i)
            if (chosen[i])
                store_global(f.groups + q * b.groups + count + place[i],
                             static_cast<int32_t>(begin + i * threads + thread_index()));
        count += total;
    }
    if (thread_index() == 0) store_global(f.counts + q, count);
}

// The k best rows of the listed groups.
METATE_KERNEL(threads, 2)
rank_kernel(METATE_PARAMETER(Candidates, f)) {
    METATE_SHARED(unsigned char, shared);
    constexpr int taken = chunk / group_rows;
    const int64_t q = block_index().x;
    const int32_t* const groups = f.groups + q * f.bounds.groups;
    const int count = load_global<int32_t>(f.counts + q);
    Selection list(shared, f.sink.k);
    METATE_NO_UNROLL
    for (int begin = block_index().y * taken; begin < count; begin += f.sink.slices * taken) {
        uint32_t key[each];
        int64_t row[each];
        METATE_UNROLL
        for (int i = 0; i < each; ++i) {
            const int at = begin + (i * threads + thread_index()) / group_rows;
            row[i] = at < count ? int64_t{load_global<int32_t>(groups + at)} * group_rows + lane() : f.rows.n;
            const bool inside = row[i] < f.rows.n && is_kept(f.rows, row[i]);
            key[i] = inside ? exact_key(f.v, f.first + q, row[i]) : none;
        }
        list.offer(key, [&](int i) { return id_of(f.rows, row[i]); });
    }
    list.finish();
    write_list(f.sink, list, q, block_index().y);
}

METATE_DEVICE int64_t shuffle_id(int64_t id, int flip) {
    const auto low = static_cast<uint32_t>(id), high = static_cast<uint32_t>(id >> 32);
    return static_cast<int64_t>(static_cast<uint64_t>(shuffle_xor(high, flip)) << 32 | shuffle_xor(low, flip));
}

// k = 1: a warp for every query. Its lanes take eight rows each of four groups that may hold the nearest.
METATE_KERNEL(threads, 2)
nearest_kernel(METATE_PARAMETER(Candidates, f)) {
    const Bounds& b = f.bounds;
    const int64_t q = static_cast<int64_t>(block_index().x) * warps + warp();
    if (q >= f.queries) return;
    const float square = load_global<float>(b.squares + q), rough = load_global<float>(b.rough);
    float limit = float_of(0x7f800000u);
    for (int64_t group = lane(); group < b.groups; group += warp_size) {
        const float above = bound_at(b, q, group) + error_of(b, square, rough, group);
        if (is_finite(above)) limit = fminf(limit, above);
    }
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) limit = fminf(limit, shuffle_xor(limit, flip));
    uint32_t best = none;
    int64_t best_id = INT64_MAX;
    METATE_NO_UNROLL
    for (int64_t begin = 0; begin < b.groups; begin += warp_size) {
        const int64_t group = begin + lane();
        uint32_t left = vote_ballot(group < b.groups && may_reach(b, q, group, square, rough, limit));
        METATE_NO_UNROLL
        while (left != 0) {
            int64_t row = f.rows.n;
            METATE_UNROLL
            for (int part = 0; part < warp_size / fine_rows; ++part) {
                if (left == 0) break;
                if (lane() / fine_rows == part) row = (begin + lowest_bit(left)) * fine_rows + lane() % fine_rows;
                left &= left - 1;
            }
            if (row >= f.rows.n || !is_kept(f.rows, row)) continue;
            const uint32_t key = exact_key(f.v, f.first + q, row);
            const int64_t id = id_of(f.rows, row);
            if (key != none && comes_before(key, id, best, best_id)) best = key, best_id = id;
        }
    }
    METATE_UNROLL
    for (int flip = 16; flip > 0; flip /= 2) {
        const uint32_t key = shuffle_xor(best, flip);
        const int64_t id = shuffle_id(best_id, flip);
        if (comes_before(key, id, best, best_id)) best = key, best_id = id;
    }
    if (lane() == 0) write_result(f.sink, q, best, best_id);
}

constexpr int64_t most_bounds = 128 << 20;                      // bytes of the bounds of a turn
constexpr int64_t few_queries = 8, most_queries = 65535 * 128;  // of a turn: blocks of the grid's second dimension

// As many queries at a time as memory for their bounds allows.
void search_groups(const Vectors& v, const Rows& rows, Sink sink, int64_t queries, const Device& device) {
    const bool one = sink.k == 1;
    BoundsProblem problem{v, rows.keep, rows.n, queries, one ? fine_rows : group_rows};
    const int64_t groups = ceil_div(rows.n, problem.rows), most = most_bounds / (groups * 4) / 128 * 128;
    if (problem.queries > most) problem.queries = most < 128 ? 128 : most;
    if (problem.queries > most_queries) problem.queries = most_queries;
    const int64_t turn = problem.queries;
    sink.slices = one ? 1 : slices_of(turn, sink.k * int64_t{group_rows}, device);
    const int64_t bounds = bounds_bytes(problem), lists = list_bytes(turn, sink);
    const int64_t listed = one ? 0 : ceil_div(turn * (groups + 1), 64) * 256;
    auto* const memory =
        static_cast<unsigned char*>(device.scratch(static_cast<size_t>(bounds + lists + listed), device.context));
    Candidates f{
        v,       rows, sink, place_bounds(problem, memory, device), reinterpret_cast<int32_t*>(memory + bounds + lists),
        nullptr, 0,    0};
    f.counts = f.groups + turn * groups;
    place_lists(f.sink, memory + bounds, turn);
    for (f.first = 0; f.first < queries; f.first += turn) {
        f.queries = queries - f.first < turn ? queries - f.first : turn;
        f.sink.distances = sink.distances + f.first * sink.k;
        f.sink.found = sink.found + f.first * sink.k;
        bound_groups(problem, f.bounds, memory, f.first, f.queries, device);
        const auto blocks = static_cast<int>(f.queries);
        if (one) {
            launch(nearest_kernel, {static_cast<int>(ceil_div(f.queries, warps)), 1, 1}, threads, 0, device.stream, f);
            continue;
        }
        launch(limit_kernel, {blocks, 1, 1}, threads, Selection::bytes(sink.k) + Places::bytes, device.stream, f);
        launch(rank_kernel, {blocks, sink.slices, 1}, threads, Selection::bytes(sink.k), device.stream, f);
        merge_lists(f.sink, f.queries, device);
    }
}

}  // namespace
}  // namespace pq

void topk_distances(const TopkDistances& call, const Device& device) {
    using namespace pq;
    const int64_t queries = call.queries.size[0], D = call.queries.size[1], n = call.search.n;
    if (queries == 0) return;
    if (queries > 0x7fffffff || D > 1 << 20) refuse("topk_distances", "2^31 queries or more than 2^20 columns");
    const Vectors v{call.queries,
                    call.base,
                    static_cast<const float*>(call.scale.data),
                    static_cast<const float*>(call.offset.data),
                    static_cast<int>(D),
                    call.metric,
                    call.search.largest};
    const Rows rows = rows_of(call.search);
    Sink sink = sink_of("topk_distances", call.search, 1);
    if (v.by_products() && !call.search.ranges && queries >= few_queries && n >= sink.k * int64_t{2 * group_rows} &&
        n < int64_t{1} << 35) {
        search_groups(v, rows, sink, queries, device);
        return;
    }
    sink.slices = slices_of(queries, n, device);
    if (sink.slices > 1) place_lists(sink, device.scratch(list_bytes(queries, sink), device.context), queries);
    search_rows(v, rows, sink, queries, device);
    merge_lists(sink, queries, device);
}

}  // namespace metate::cuda
