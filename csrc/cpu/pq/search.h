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
    return (a.key > b.key) | ((a.key == b.key) & (a.id > b.id));
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

// Puts the hits of first … last that `goes_first` holds of before the others; returns how far they reach.
template <class GoesFirst>
METATE_FN int64_t split(Hit* hits, int64_t first, int64_t last, const GoesFirst& goes_first) {
    for (int64_t i = first; i < last; ++i) {  // no branch that a processor would have to guess
        const Hit hit = hits[i];
        hits[i] = hits[first];
        hits[first] = hit;
        first += goes_first(hit);
    }
    return first;
}

// Moves hits so that the k-th best is in its place, better ones before it, and worse ones behind it (Hoare 1961).
inline void select(Hit* hits, int64_t count, int64_t k) {
    uint64_t random = 1;
    for (int64_t first = 0, last = count; last - first > 1;) {
        Hit some[3];
        for (Hit& one : some) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            one = hits[first + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(last - first))];
        }
        const bool ascend = worse(some[1], some[0]);
        const Hit &low = some[!ascend], &high = some[ascend];
        const Hit pivot = worse(low, some[2]) ? low : worse(some[2], high) ? high : some[2];
        const int64_t better = split(hits, first, last, [&](const Hit& hit) { return worse(pivot, hit); });
        if (k <= better) {
            last = better;
        } else if (better > first) {
            first = better;
        } else {  // the pivot is the best of them: those like it are split off, of which there may be many
            first = split(hits, first, last, [&](const Hit& hit) { return !worse(hit, pivot); });
            if (k <= first) return;
        }
    }
}

// Best first.
inline void sort(Hit* hits, int64_t count) {
    constexpr int64_t few = 16;
    while (count > few) {
        const int64_t half = count / 2;
        select(hits, count, half);
        sort(hits + half, count - half);
        count = half;
    }
    for (int64_t i = 1; i < count; ++i) {
        const Hit hit = hits[i];
        int64_t at = i;
        for (; at > 0 && worse(hits[at - 1], hit); --at) hits[at] = hits[at - 1];
        hits[at] = hit;
    }
}

constexpr int64_t most_in_heap = 32;  // results; more are gathered, which moves a hit once and not past many

// Hits that the k best of a query need room for.
METATE_FN int64_t hits_of(int64_t k) {
    return k > most_in_heap ? 2 * k : k;
}

// The best of one query that one worker has seen: a heap with the worst on top, or, where many are wanted, twice as
// many with the best of them, which are sorted out when there is no more room. `shared` bounds what any worker need
// look at: the least k-th best key that one of them knows. Which value of it is read changes the work, never the
// result.
struct Best {
    Hit* hits;
    int64_t k, count;
    uint32_t* shared;

    METATE_FN float limit() const { return bit_cast<float>(__atomic_load_n(shared, __ATOMIC_RELAXED)); }

    METATE_FN void lower(float key) {
        uint32_t seen = __atomic_load_n(shared, __ATOMIC_RELAXED);
        while (key < bit_cast<float>(seen) && !__atomic_compare_exchange_n(shared, &seen, bit_cast<uint32_t>(key), true,
                                                                           __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }

    void gather(Hit hit) {
        if (hit.key > limit()) return;
        hits[count++] = hit;
        if (count != k && count != 2 * k) return;
        select(hits, count, k);
        count = k;
        lower(hits[k - 1].key);
    }

    void offer(Hit hit) {
        if (!(hit.key - hit.key == 0.0f)) return;  // infinite or NaN
        if (k > most_in_heap) return gather(hit);
        if (count < k) {
            int64_t at = count++;
            for (; at > 0 && worse(hit, hits[(at - 1) / 2]); at = (at - 1) / 2) hits[at] = hits[(at - 1) / 2];
            hits[at] = hit;
            if (count < k) return;
        } else {
            if (!worse(hits[0], hit)) return;
            sink(hits, k, 0, hit);
        }
        lower(hits[0].key);
    }

    // The best first, k at most.
    void finish() {
        if (count > k) select(hits, count, k), count = k;
        sort(hits, count);
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
    best.finish();
    for (int64_t i = 0; i < best.count; ++i) {
        distances[i] = key_of(s, best.hits[i].key);
        found[i] = best.hits[i].id;
    }
    for (int64_t i = best.count; i < s.k; ++i) {
        distances[i] = s.largest ? -infinity : infinity;
        found[i] = -1;
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

// The best of `queries` queries for each of `workers` workers, and the bound that workers share.
struct Heaps {
    Hit* hits;
    int64_t* counts;
    Bound* shared;
    int64_t workers, queries, k;

    void take(Arena& arena) {
        hits = arena.take<Hit>(workers * queries * hits_of(k));
        counts = arena.take<int64_t>(workers * queries);
        shared = arena.take<Bound>(queries);
    }
    void clear(const float* limits = nullptr) const {
        for (int64_t i = 0; i < workers * queries; ++i) counts[i] = 0;
        for (int64_t q = 0; q < queries; ++q) shared[q].key = bit_cast<uint32_t>(limits ? limits[q] : infinity);
    }
    Best open(int64_t worker, int64_t q) const {
        const int64_t i = worker * queries + q;
        return {hits + i * hits_of(k), k, counts[i], &shared[q].key};
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
                    for (int64_t i = 0; i < one.count; ++i) all.offer(one.hits[i]);
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
// that these find good bounds. Of lists that are read from memory, the others come along with those nearest: `once`.
struct Visits {
    int64_t lists, room, rows_alone;
    bool once;
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
        int64_t* const nearest = pieces;  // whether a list is that to a query, until pieces are counted
        for (int64_t list = 0; list < lists; ++list) nearest[list] = 0;
        for (int64_t q = 0; once && q < Q; ++q)
            if (const int64_t list = list_of(s, q, 0); list >= 0) nearest[list] = 1;
        const auto each = [&](const auto& visit) {
            for (int64_t p = 0; p < P; ++p)
                for (int64_t q = 0; q < Q; ++q)
                    if (const int64_t list = list_of(s, q, p); list >= 0)
                        visit(p == 0 || nearest[list] ? list : lists + list, Asked{q, p});
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
    const int64_t lists = s.ranges.size[1];
    Visits visits{lists,   most,   many ? longer * rows_alone : rows_alone, s.n > lists * rows_alone, nullptr,
                  nullptr, nullptr};
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
