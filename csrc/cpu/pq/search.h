// What every search shares: the best k so far of a query, and the rows of all queries cut into pieces.
#pragma once

#include "../../pq.h"
#include "../arithmetic.h"
#include "../parallel.h"
#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr float infinity = __builtin_inff();

// key: the distance, negated where the largest are sought.
struct Hit {
    float key;
    int64_t id;
};

METATE_FN bool worse(const Hit& a, const Hit& b) {
    return a.key > b.key || (a.key == b.key && a.id > b.id);
}

METATE_FN void sink(Hit* heap, int64_t count, int64_t at, Hit hit) {
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= count) break;
        if (child + 1 < count && worse(heap[child + 1], heap[child])) ++child;
        if (!worse(heap[child], hit)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = hit;
}

// The best of one query that one worker has seen: a heap with the worst on top. `shared` bounds what any worker need
// look at: the least k-th best key of all of them. Which value of it is read changes the work, never the result.
struct Best {
    Hit* heap;
    int64_t k, count;
    uint32_t* shared;

    METATE_FN float limit() const { return bit_cast<float>(__atomic_load_n(shared, __ATOMIC_RELAXED)); }

    METATE_FN void lower(float key) {
        uint32_t seen = __atomic_load_n(shared, __ATOMIC_RELAXED);
        while (key < bit_cast<float>(seen) && !__atomic_compare_exchange_n(shared, &seen, bit_cast<uint32_t>(key), true,
                                                                           __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }

    void offer(Hit hit) {
        if (!(hit.key - hit.key == 0.0f)) return;  // infinite or NaN
        if (count < k) {
            int64_t at = count++;
            for (; at > 0 && worse(hit, heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
            heap[at] = hit;
            if (count < k) return;
        } else {
            if (!worse(heap[0], hit)) return;
            sink(heap, k, 0, hit);
        }
        lower(heap[0].key);
    }
};

METATE_FN bool kept(const Search& s, int64_t row) {
    const uint8_t* const keep = static_cast<const uint8_t*>(s.keep.data);
    return !keep || (keep[row >> 3] >> (row & 7) & 1);
}
METATE_FN int64_t id_of(const Search& s, int64_t row) {
    return s.ids ? static_cast<const int64_t*>(s.ids.data)[row] : row;
}
METATE_FN float key_of(const Search& s, float distance) {
    return s.largest ? -distance : distance;
}
// How many hits of a query are worth room.
METATE_FN int64_t room(const Search& s) {
    return smaller(s.k, s.n);
}

void write_best(const Search& s, int64_t q, Best& best) {
    float* const distances = static_cast<float*>(s.distances.data) + q * s.k;
    int64_t* const found = static_cast<int64_t*>(s.found.data) + q * s.k;
    for (int64_t i = best.count; i < s.k; ++i) {
        distances[i] = s.largest ? -infinity : infinity;
        found[i] = -1;
    }
    for (int64_t left = best.count; left > 0; --left) {
        const Hit worst = best.heap[0];
        sink(best.heap, left - 1, 0, best.heap[left - 1]);
        distances[left - 1] = key_of(s, worst.key);
        found[left - 1] = worst.id;
    }
}

// How many of `count` keys, whole vectors, do not exceed the bound.
METATE_FN int64_t count_near(const float* keys, int64_t count, float bound) {
    int64_t near = 0;
    for (int64_t i = 0; i < count; i += width)
        near += __builtin_popcount(bits_of(not_less(splat(bound), load(keys + i))));
    return near;
}

constexpr int64_t most_bounded = 2 * width;  // of k: so many lanes have a least key each

// No less than the k-th least of `count` keys, whole vectors, and not much more, or inf: by halving what lies between
// the least of all and the largest of the least of each lane.
inline float kth_key(const float* keys, int64_t count, int64_t k) {
    vf least[2] = {splat(infinity), splat(infinity)};
    for (int64_t i = 0; i < count; i += width) {
        vf& lane = least[i / width & 1];
        lane = min(load(keys + i), lane);
    }
    float low = -largest(splat(0.0f) - min(least[0], least[1])), high = largest(max(least[0], least[1]));
    if (k == 1) return low;
    if (k > most_bounded) high = infinity;
    while (high - low < infinity) {
        const float middle = low + (high - low) * 0.5f;
        if (!(low < middle && middle < high)) break;
        int64_t below = 0;
        for (int64_t i = 0; i < count; i += width)
            below += __builtin_popcount(bits_of(less(load(keys + i), splat(middle))));
        (below < k ? low : high) = middle;
        if (below >= k && below <= k + 2) break;
    }
    return high;
}

// Whether so many rows are near that the k-th least key is worth finding.
METATE_FN bool worth_bound(const Search& s, const float* keys, int64_t count, float bound) {
    return !s.keep && s.k <= most_bounded && count_near(keys, count, bound) > 2 * s.k + 4;
}

struct Span {
    int64_t first, last;
};

METATE_FN int64_t spans_of(const Search& s) {
    return s.lists ? s.lists.size[1] : s.ranges ? s.ranges.size[1] : 1;
}
METATE_FN int64_t list_of(const Search& s, int64_t q, int64_t p) {
    return static_cast<const int64_t*>(s.lists.data)[q * s.lists.stride[0] + p * s.lists.stride[1]];
}
METATE_FN Span span_of(const Search& s, int64_t q, int64_t p) {
    if (!s.ranges) return {0, s.n};
    if (s.lists) {
        p = list_of(s, q, p);
        if (p < 0) return {0, 0};
        q = 0;
    }
    const int64_t* const at =
        static_cast<const int64_t*>(s.ranges.data) + q * s.ranges.stride[0] + p * s.ranges.stride[1];
    const int64_t first = at[0] < 0 ? 0 : at[0], last = smaller(at[s.ranges.stride[2]], s.n);
    return {first, last < first ? first : last};
}
METATE_FN int64_t rows_of(const Search& s, int64_t q) {
    int64_t rows = 0;
    for (int64_t p = 0; p < spans_of(s); ++p) rows += span_of(s, q, p).last - span_of(s, q, p).first;
    return rows;
}

// In a cache line of its own: workers on distant cores write those of different queries at once.
struct Bound {
    alignas(64) uint32_t key;
};

// The heaps of `queries` queries for each of `workers` workers, and the bound that workers share.
struct Heaps {
    Hit* hits;
    int64_t* counts;
    Bound* shared;
    int64_t workers, queries, k;

    void take(Arena& arena) {
        hits = arena.take<Hit>(workers * queries * k);
        counts = arena.take<int64_t>(workers * queries);
        shared = arena.take<Bound>(queries);
    }
    void clear(const float* limits = nullptr) const {
        for (int64_t i = 0; i < workers * queries; ++i) counts[i] = 0;
        for (int64_t q = 0; q < queries; ++q) shared[q].key = bit_cast<uint32_t>(limits ? limits[q] : infinity);
    }
    Best open(int64_t worker, int64_t q) const {
        const int64_t i = worker * queries + q;
        return {hits + i * k, k, counts[i], &shared[q].key};
    }
    void close(int64_t worker, int64_t q, const Best& best) const { counts[worker * queries + q] = best.count; }

    // Writes the results of all queries.
    void write(const Search& s, const Runtime& runtime) const {
        constexpr int64_t together = 32;
        for_pieces(runtime, ceil_div(queries, together), [&](int, int64_t piece) {
            for (int64_t q = piece * together; q < smaller(queries, (piece + 1) * together); ++q) {
                Best all = open(0, q);
                for (int64_t worker = 1; worker < workers; ++worker) {
                    const Best one = open(worker, q);
                    for (int64_t i = 0; i < one.count; ++i) all.offer(one.heap[i]);
                }
                write_best(s, q, all);
            }
        });
    }
};

// What a query calls the rows of a scan: its range p.
struct Asked {
    int64_t q, p;
};

// What a scan is told to do: `count` different queries look at the rows of `span`; those of `next` come after it.
struct Turn {
    int64_t count;
    Span span;
    const Asked* asked;
    Best* best;
    Span next = {0, 0};
};

constexpr int64_t bytes_alone = 1 << 17;  // of rows that are worth a piece of their own
constexpr int64_t longer = 4;             // times as many, where all workers have enough pieces: memory is read in runs
constexpr int64_t enough = 4;             // pieces of a worker
constexpr int64_t split_queries = 64;     // fewer queries are cut by rows, and any number that scan the same rows
constexpr int64_t split_room = 1 << 20;   // but only where heaps for every worker are small
constexpr int most_together = 16;         // queries of a turn

// Which ranges of queries are in which list: those nearest to their queries, list after list, before all others, so
// that these find good bounds.
struct Visits {
    int64_t lists, room, rows_alone;
    int64_t *first, *pieces;  // of the visits of each list, and of the work on them, and one behind the last
    Asked* asked;

    void take(Arena& arena) {
        first = arena.take<int64_t>(2 * lists + 2);
        pieces = arena.take<int64_t>(2 * lists + 1);
        asked = arena.take<Asked>(room);
    }

    METATE_FN int64_t parts(const Search& s, int64_t run) const {
        const Span span = span_of(s, asked[first[run]].q, asked[first[run]].p);
        return ceil_div(span.last - span.first, rows_alone);
    }

    METATE_FN const Asked* asked_of(const Search& s, int64_t run, int64_t piece, int64_t together) const {
        return asked + first[run] + (piece - pieces[run]) / parts(s, run) * together;
    }
    METATE_FN Span span(const Search& s, int64_t run, int64_t piece) const {
        const Span all = span_of(s, asked[first[run]].q, asked[first[run]].p);
        const int64_t begin = all.first + (piece - pieces[run]) % parts(s, run) * rows_alone;
        return {begin, smaller(all.last, begin + rows_alone)};
    }

    // Pieces of work, each of up to `together` queries and rows_alone rows.
    int64_t sort(const Search& s, int64_t together) const {
        const int64_t Q = s.distances.size[0], P = spans_of(s);
        const auto each = [&](const auto& visit) {
            for (int64_t q = 0; q < Q; ++q)
                for (int64_t p = 0; p < P; ++p)
                    if (const int64_t list = list_of(s, q, p); list >= 0) visit(p ? lists + list : list, Asked{q, p});
        };
        for (int64_t run = 0; run < 2 * lists + 2; ++run) first[run] = 0;
        each([&](int64_t run, Asked) { ++first[run + 2]; });
        for (int64_t run = 2; run < 2 * lists + 2; ++run) first[run] += first[run - 1];
        each([&](int64_t run, Asked visit) { asked[first[run + 1]++] = visit; });
        pieces[0] = 0;
        for (int64_t run = 0; run < 2 * lists; ++run) {
            const int64_t count = first[run + 1] - first[run];
            pieces[run + 1] = pieces[run] + (count ? ceil_div(count, together) * parts(s, run) : 0);
        }
        return pieces[2 * lists];
    }
};

// search_rows where many queries look into few lists: each is read for several queries at a time.
template <class Own, class Prepare, class Scan>
void search_lists(const Search& s, const Runtime& runtime, int64_t rows_alone, int64_t together, const Own& own,
                  const Prepare& prepare, const Scan& scan) {
    const int64_t Q = s.distances.size[0], most = Q * spans_of(s);
    const int workers = workers_of(runtime, most);
    const bool many = most >= enough * together * runtime.threads;
    Visits visits{s.ranges.size[1], most, many ? longer * rows_alone : rows_alone, nullptr, nullptr, nullptr};
    Heaps heaps{nullptr, nullptr, nullptr, workers, Q, room(s)};
    const auto memory = lay_out(
        runtime, most,
        [&](Arena& arena) {
            heaps.take(arena);
            visits.take(arena);
        },
        own);
    heaps.clear();
    for (int worker = 0; worker < workers; ++worker) prepare(memory(worker));
    const int64_t pieces = visits.sort(s, together);
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        const int64_t run = run_of(visits.pieces, 2 * visits.lists, piece);
        const Asked* const asked = visits.asked_of(s, run, piece, together);
        Best best[most_together];
        Turn turn{smaller(together, visits.asked + visits.first[run + 1] - asked), visits.span(s, run, piece), asked,
                  best};
        if (const int64_t next = piece + workers; next < pieces)  // likely this worker's
            turn.next = visits.span(s, run_of(visits.pieces, 2 * visits.lists, next), next);
        for (int64_t i = 0; i < turn.count; ++i) best[i] = heaps.open(worker, asked[i].q);
        scan(memory(worker), turn);
        for (int64_t i = 0; i < turn.count; ++i) heaps.close(worker, asked[i].q, best[i]);
    });
    heaps.write(s, runtime);
}

// Whether all queries look at the same rows.
METATE_FN bool same_rows(const Search& s) {
    return !s.ranges || (!s.lists && s.ranges.stride[0] == 0);
}
METATE_FN bool cut_by_rows(const Search& s) {
    const int64_t Q = s.distances.size[0];
    return (same_rows(s) || Q < split_queries) && Q * room(s) <= split_room;
}

// Calls scan(memory, turn) for parts of every range of every query and writes the results. A row takes `row_bytes`.
// `memory` is what own(arena) takes for each worker; prepare(memory) sees it before they begin. A turn has up to
// `together` queries where these scan the same rows and there are enough of them for all workers, else one. Where rows
// are cut, keys above the limit of a query, if there are limits, need not be offered.
template <class Own, class Prepare, class Scan>
void search_rows(const Search& s, const Runtime& runtime, int64_t row_bytes, int64_t together, const Own& own,
                 const Prepare& prepare, const Scan& scan, const float* limits = nullptr) {
    const int64_t Q = s.distances.size[0], rows_alone = ceil_div(bytes_alone, row_bytes > 0 ? row_bytes : 1);
    if (together > 1 && s.lists && Q > 1 && 32 * Q * spans_of(s) >= s.ranges.size[1] && Q * room(s) <= split_room)
        return search_lists(s, runtime, rows_alone, together, own, prepare, scan);
    const bool split = cut_by_rows(s), same = same_rows(s);
    int64_t parts = 1;
    for (int64_t q = 0; split && q < (same ? 1 : Q); ++q) {
        const int64_t rows = rows_of(s, q), most = ceil_div(rows, rows_alone), least = ceil_div(most, longer);
        const int64_t wanted = smaller(most, ceil_div(enough * runtime.threads, same ? 1 : Q));
        // As many as workers, who find the same rows in their caches as in the search before, where these have room.
        const bool again = same && most <= enough * runtime.threads;
        parts = larger(parts, again ? smaller(most, runtime.threads) : larger(least, wanted));
    }
    const int64_t group = split && same && Q * parts >= 2 * together * runtime.threads ? together : 1;
    const int64_t groups = ceil_div(Q, group), pieces = groups * parts;
    if (pieces == 0) return;
    const int workers = workers_of(runtime, pieces);
    Heaps heaps{nullptr, nullptr, nullptr, workers, split ? Q : 1, room(s)};
    if (!split) heaps.queries = workers, heaps.workers = 1;  // one query at a time for each worker
    const auto memory = lay_out(runtime, pieces, [&](Arena& arena) { heaps.take(arena); }, own);
    heaps.clear(split ? limits : nullptr);
    for (int worker = 0; worker < workers; ++worker) prepare(memory(worker));
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        const int64_t q = piece % groups * group, part = piece / groups;  // the same rows for one after another
        const int64_t lane = split ? worker : 0, slot = split ? q : worker;
        Best best[most_together];
        Asked asked[most_together];
        Turn turn{smaller(group, Q - q), {}, asked, best};
        for (int64_t i = 0; i < turn.count; ++i) best[i] = heaps.open(lane, slot + i), asked[i] = {q + i, 0};
        const int64_t all = rows_of(s, q), begin = all * part / parts, end = all * (part + 1) / parts;
        int64_t before = 0;
        turn.next = span_of(s, q, 0);
        for (int64_t p = 0; p < spans_of(s); ++p) {
            const Span span = turn.next;
            turn.next = p + 1 < spans_of(s) ? span_of(s, q, p + 1) : Span{0, 0};
            for (int64_t i = 0; i < turn.count; ++i) asked[i].p = p;
            const int64_t length = span.last - span.first;
            const int64_t from = begin > before ? begin - before : 0, to = smaller(end - before, length);
            turn.span = {span.first + from, span.first + to};
            if (from < to) scan(memory(worker), turn);
            before += length;
        }
        if (!split) {
            write_best(s, q, best[0]);
            best[0].count = 0;
            *best[0].shared = bit_cast<uint32_t>(infinity);
        }
        for (int64_t i = 0; i < turn.count; ++i) heaps.close(lane, slot + i, best[i]);
    });
    if (split) heaps.write(s, runtime);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
