// Brute-force search: many queries by products (nearest.h), few, or those with ranges of their own, row by row; by L1
// and Linf, which no product tells anything about, every row exactly.
#include "../strided.h"
#include "screen.h"

namespace metate::cpu::METATE_ISA {
namespace {

template <class T>
METATE_FN Vectors<T> vectors_of(const TopkDistances& c) {
    return {static_cast<const T*>(c.base.data), c.base.stride[0], c.base.size[1],
            static_cast<const float*>(c.scale.data), static_cast<const float*>(c.offset.data)};
}

// Calls run(vectors) for the rows of the base.
template <class Run>
METATE_FN void with_vectors(const TopkDistances& c, const Run& run) {
    if (c.base.dtype == DType::i8) return run(vectors_of<int8_t>(c));
    with_floats(c.base.dtype, [&]<class T>() { run(vectors_of<T>(c)); });
}

METATE_FN bool is_l2(const TopkDistances& c) {
    return c.metric == Metric::l2;
}

template <class T>
METATE_FN double distance_by(Metric metric, const Vectors<T>& v, const float* query, const T* row) {
    switch (metric) {
        case Metric::l2:
            return exact_distance<Metric::l2>(v, query, row);
        case Metric::l1:
            return exact_distance<Metric::l1>(v, query, row);
        case Metric::linf:
            return exact_distance<Metric::linf>(v, query, row);
        default:
            return exact_distance<Metric::inner_product>(v, query, row);
    }
}

// Of a row from a query, exactly.
float distance_of(const TopkDistances& c, const float* query, int64_t row) {
    double distance = 0.0;
    with_vectors(c, [&]<class T>(const Vectors<T>& v) { distance = distance_by(c.metric, v, query, v.row(row)); });
    return static_cast<float>(distance);
}

METATE_FN const float* query_of(const TopkDistances& c, int64_t q) {
    return static_cast<const float*>(c.queries.data) + q * c.queries.stride[0];
}

// Row by row.

constexpr int64_t keys_at_once = 512;  // rows between two looks at the bound
constexpr int64_t bytes_ahead = 4096;  // rows are fetched so far before they are read: processors look to a page's end

// A query of a turn.
struct RowQuery {
    const float* data;
    double size;
    Best* best;
};

// Sums over the columns of a row: of the distance, and, of an inner product, of the magnitudes of its terms. Rows are
// read one after another, which is the order that processors foresee, once for several queries.
template <bool l2, int queries, class T>
METATE_FN void add_columns(const Vectors<T>& v, const RowQuery* q, const T* row, vf (&sum)[queries],
                           vf (&size)[queries]) {
    vf sums[queries][2], sizes[queries][2];
#pragma GCC unroll 4
    for (int j = 0; j < queries; ++j)
        for (int chain = 0; chain < 2; ++chain) sums[j][chain] = sizes[j][chain] = splat(0.0f);
    const auto add = [&](int64_t i, int64_t n, int chain) __attribute__((always_inline)) {
        const vf b = load_values(v, row, i, n);
#pragma GCC unroll 4
        for (int j = 0; j < queries; ++j) {
            const vf a = load_numbers(q[j].data + i, n);
            if (l2) {
                const vf gap = a - b;
                sums[j][chain] = fma(gap, gap, sums[j][chain]);
            } else {
                const vf term = a * b;
                sums[j][chain] = sums[j][chain] + term;
                sizes[j][chain] = sizes[j][chain] + abs(term);
            }
        }
    };
    int64_t i = 0;
    for (; i + 2 * width <= v.columns; i += 2 * width) {
        add(i, width, 0);
        add(i + width, width, 1);
    }
    if (i + width <= v.columns) add(i, width, 0), i += width;
    if (i < v.columns) add(i, v.columns - i, 1);
#pragma GCC unroll 4
    for (int j = 0; j < queries; ++j) {
        sum[j] = sums[j][0] + sums[j][1];
        size[j] = sizes[j][0] + sizes[j][1];
    }
}

// The share of its magnitudes that a sum over the columns may be off.
METATE_FN double sum_share(int64_t columns) {
    return unit * 2 * (static_cast<double>(columns / width) + 16);
}

// How far off the sum of a squared distance of `distance` may be, u (columns / width + 16) of it; of int8, whose values
// are rounded, as far as that moves the row.
METATE_FN double rounding(const TopkDistances& c, double distance, double query) {
    const double gap = __builtin_sqrt(distance);
    return sum_share(c.base.size[1]) * distance +
           (c.base.dtype == DType::i8 ? 16 * unit * gap * (query + gap) + 1e-12 * query * query : 0.0);
}

METATE_FN float row_bound(const TopkDistances& c, float limit, double query) {
    const double distance = is_l2(c) && limit - limit == 0.0f ? __builtin_fabs(static_cast<double>(limit)) : 0.0;
    return bound_of(limit, 0.0, rounding(c, distance, query) + 0x1p-140);
}

// What some rows look like to a query.
struct RowKeys {
    float keys[keys_at_once];
    double off;  // how much more than its key an exact one may be, of inner products
};

// Approximate keys of `count` rows, and inf to the end of a vector; of inner products, no more than the exact ones.
template <bool l2, int queries, class T>
void approximate_keys(RowKeys (&to)[queries], const Vectors<T>& v, const RowQuery* q, int64_t first, int64_t count,
                      bool largest) {
    const vf sign = splat(largest ? -1.0f : 1.0f), share = splat(static_cast<float>(-sum_share(v.columns)));
    const int64_t bytes = v.columns * static_cast<int64_t>(sizeof(T)), rows_ahead = 1 + bytes_ahead / (bytes + 1);
    vf most[queries];
    for (int j = 0; j < queries; ++j) most[j] = splat(0.0f);
    for (int64_t at = 0; at < count; at += width) {
        vf sums[queries][width], sizes[queries][width];
        for (int i = 0; i < width; ++i) {
            vf sum[queries], size[queries];
            const char* const ahead = reinterpret_cast<const char*>(v.row(first + at + i + rows_ahead));
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
            add_columns<l2, queries>(v, q, v.row(first + smaller(at + i, count - 1)), sum, size);
#pragma GCC unroll 4
            for (int j = 0; j < queries; ++j) sums[j][i] = sum[j], sizes[j][i] = size[j];
        }
        const int64_t left = count - at;
        for (int j = 0; j < queries; ++j) {
            vf key = sum_rows(sums[j]) * sign;
            if (!l2) {
                const vf size = sum_rows(sizes[j]);
                most[j] = max(size, most[j]);
                key = fma(size, share, key);
            }
            store(to[j].keys + at, left < width ? select(METATE_ISA::first(left), key, splat(infinity)) : key);
        }
    }
    for (int j = 0; j < queries; ++j)
        to[j].off = l2 ? 0.0 : 2 * sum_share(v.columns) * static_cast<double>(METATE_ISA::largest(most[j]));
}

// The exact k-th best key is not more than this, given the k-th of the approximate ones.
METATE_FN float kth_limit(const TopkDistances& c, double kth, double off, double query) {
    const double further = is_l2(c) ? rounding(c, 2 * __builtin_fabs(kth) + 4e-12 * query * query, query) : off;
    return static_cast<float>(kth + further + 0x1p-140);
}

// Offers the rows from `first` on whose keys do not exceed what the best ones allow.
void offer_near(const TopkDistances& c, const RowQuery& q, const RowKeys& rows, int64_t first, int64_t count) {
    const Search& s = c.search;
    const int64_t whole = round_up(count, width);
    float limit = q.best->limit(), bound = row_bound(c, limit, q.size);
    if (worth_bound(s, rows.keys, whole, bound)) {
        const float kth = kth_limit(c, static_cast<double>(kth_key(rows.keys, whole, s.k)), rows.off, q.size);
        if (kth < limit) bound = row_bound(c, limit = kth, q.size);
    }
    for (int64_t i = 0; i < count; i += width) {
        uint32_t near = bits_of(not_less(splat(bound), load(rows.keys + i)));
        for (; near; near &= near - 1) {
            const int64_t at = i + __builtin_ctz(near), row = first + at;
            if (at >= count || rows.keys[at] > bound || !kept(s, row)) continue;
            q.best->offer({key_of(s, distance_of(c, q.data, row)), id_of(s, row)});
            if (const float now = q.best->limit(); now < limit) bound = row_bound(c, limit = now, q.size);
        }
    }
}

template <int queries>
void compare_rows(const TopkDistances& c, const RowQuery* q, Span span) {
    RowKeys rows[queries];
    for (int64_t first = span.first; first < span.last; first += keys_at_once) {
        const int64_t count = smaller(keys_at_once, span.last - first);
        with_vectors(c, [&]<class T>(const Vectors<T>& v) {
            (is_l2(c) ? approximate_keys<true, queries, T>
                      : approximate_keys<false, queries, T>)(rows, v, q, first, count, c.search.largest);
        });
        for (int j = 0; j < queries; ++j) offer_near(c, q[j], rows[j], first, count);
    }
}

// Row by row, exactly: by metrics that nothing tells of more cheaply than themselves, and few rows.
void offer_all(const TopkDistances& c, const float* query, Span span, Best& best) {
    const Search& s = c.search;
    with_vectors(c, [&]<class T>(const Vectors<T>& v) {
        for (int64_t row = span.first; row < span.last; ++row) {
            if (!kept(s, row)) continue;
            const float key = key_of(s, static_cast<float>(distance_by(c.metric, v, query, v.row(row))));
            if (key <= best.limit()) best.offer({key, id_of(s, row)});
        }
    });
}

constexpr int64_t ranges_ahead = 16;  // that are fetched while others are compared

// Fetches what ranges first … last of a query begin with: candidates lie anywhere. Inlined: a call of a function that
// does nothing but fetch is dropped.
METATE_FN void fetch_candidates(const TopkDistances& c, int64_t q, int64_t first, int64_t last) {
    const int64_t bytes = bytes_of(c.base.dtype);
    for (int64_t p = first; p < smaller(last, spans_of(c.search)); ++p) {
        const Span span = span_of(c.search, q, p);
        const char* const row = static_cast<const char*>(c.base.data) + span.first * c.base.stride[0] * bytes;
        for (int64_t i = 0; span.first < span.last && i < c.base.size[1] * bytes; i += 64) __builtin_prefetch(row + i);
    }
}

constexpr int64_t few_rows = 4;      // of a range; more are first compared approximately
constexpr int64_t cached_rows = 64;  // that one group of queries after another looks at

void by_rows(const TopkDistances& c, const Runtime& runtime) {
    const int64_t columns = c.base.size[1];
    search_rows(
        c.search, runtime, columns * bytes_of(c.base.dtype), most_together,
        [](Arena& arena) { return arena.take<char>(0); }, [](char*) {},
        [&](char*, const Turn& turn) {
            if (turn.span.last - turn.span.first <= few_rows) {  // candidates, likely, each a range
                const Asked asked = turn.asked[0];
                const int64_t next = asked.p + ranges_ahead;
                fetch_candidates(c, asked.q, asked.p ? next : 0, next + 1);
                for (int64_t i = 0; i < turn.count; ++i)
                    offer_all(c, query_of(c, turn.asked[i].q), turn.span, turn.best[i]);
                return;
            }
            RowQuery queries[most_together];
            for (int64_t i = 0; i < turn.count; ++i) {
                const float* const query = query_of(c, turn.asked[i].q);
                const Vectors<float> own{query, 0, columns, nullptr, nullptr};
                queries[i] = {query, __builtin_sqrt(exact_distance<Metric::inner_product>(own, query, query)),
                              turn.best + i};
            }
            const bool together = turn.count == 1 || turn.count == 2 || turn.count == 4;
            Span rows = turn.span;
            for (; rows.first < turn.span.last; rows.first = rows.last) {
                rows.last = together ? turn.span.last : smaller(turn.span.last, rows.first + cached_rows);
                const RowQuery* q = queries;
                int64_t left = turn.count;
                for (; left >= 4; left -= 4, q += 4) compare_rows<4>(c, q, rows);
                for (; left >= 2; left -= 2, q += 2) compare_rows<2>(c, q, rows);
                if (left) compare_rows<1>(c, q, rows);
            }
        });
}

void by_distances(const TopkDistances& c, const Runtime& runtime) {
    const Search& s = c.search;
    search_rows(
        s, runtime, c.base.size[1] * bytes_of(c.base.dtype), 1, [](Arena& arena) { return arena.take<char>(0); },
        [](char*) {},
        [&](char*, const Turn& turn) { offer_all(c, query_of(c, turn.asked[0].q), turn.span, turn.best[0]); });
}

// By products.

constexpr int64_t few_queries = 4;        // fewer go row by row
constexpr int64_t segment_rows = 4096;    // rows of a piece of work, or a quarter of all
constexpr int64_t shared_queries = 2048;  // more queries are cut, but not the rows
constexpr int64_t shared_room = 1 << 20;

struct Workspace {
    PackedRows rows;
    PackedQueries queries;
    float* keys;
};

void by_products(const TopkDistances& c, const Runtime& runtime) {
    const Search& s = c.search;
    const bool l2 = is_l2(c);
    const int64_t Q = c.queries.size[0], columns = c.base.size[1], steps = steps_of_rows(columns, l2);
    const bool split = Q <= shared_queries && Q * room(s) <= shared_room;
    const int64_t quarter = round_up(ceil_div(s.n, 4), base_rows);
    const int64_t length = !split ? s.n : quarter < segment_rows ? quarter : segment_rows;
    const int64_t blocks = ceil_div(Q, query_rows), segments = split && s.n ? ceil_div(s.n, length) : 1;
    const int64_t pieces = blocks * segments;
    Heaps heaps{nullptr, nullptr, nullptr, workers_of(runtime, pieces), split ? Q : query_rows, room(s)};
    if (!split) heaps.queries = heaps.workers * query_rows, heaps.workers = 1;
    const auto memory = lay_out(
        runtime, pieces, [&](Arena& arena) { heaps.take(arena); },
        [&](Arena& arena) {
            Workspace at{
                {arena.take<float>(base_rows * steps), steps, 0.0}, {}, arena.take<float>(tile_rows * base_rows)};
            at.queries.take(arena, steps);
            return at;
        });
    heaps.clear();
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        Workspace at = memory(worker);
        const int64_t first_query = piece % blocks * query_rows, segment = piece / blocks;
        const int64_t count = smaller(query_rows, Q - first_query);
        const int64_t lane = split ? worker : 0, slot = split ? first_query : worker * query_rows;
        at.queries.fill(query_of(c, first_query), c.queries.stride[0], count, columns, steps);
        const int64_t end = smaller(s.n, (segment + 1) * length);
        for (int64_t first = segment * length; first < end; first += base_rows) {
            const int64_t rows = smaller(base_rows, end - first);
            with_vectors(c,
                         [&]<class T>(const Vectors<T>& v) { pack_rows_of(at.rows, v, first, rows, l2, s.largest); });
            compare_block(
                s, Block{at.rows, columns, first, rows, l2}, at.queries, count, at.keys,
                [&](const float* query, int64_t row) { return distance_of(c, query, row); },
                [&](int64_t r) { return heaps.open(lane, slot + r); },
                [&](int64_t r, const Best& best) { heaps.close(lane, slot + r, best); });
        }
        for (int64_t r = 0; !split && r < count; ++r) {
            Best best = heaps.open(0, slot + r);
            write_best(s, first_query + r, best);
            best.count = 0;
            *best.shared = bit_cast<uint32_t>(infinity);
            heaps.close(0, slot + r, best);
        }
    });
    if (split) heaps.write(s, runtime);
}

// k = 1 of many queries and few rows: the assignment of k-means.

constexpr int64_t most_centroids = 1 << 16;
constexpr int64_t assign_together = 256;  // queries of a piece, whole panels

bool is_assignment(const TopkDistances& c) {
    const Search& s = c.search;
    return s.k == 1 && c.base.dtype == DType::f32 && !s.ranges && !s.keep && !s.ids && s.n > 0 &&
           s.n <= most_centroids && c.queries.size[0] >= few_queries && s.n <= 4 * c.queries.size[0];
}

// Words that no instruction multiplies fast.
struct NoScreen {
    struct Space {};

    void take(Arena&) const {}
    Space space(Arena&) const { return {}; }
    void pack(const Vectors<float>&) const {}
    template <class... Anything>
    bool assign(const Anything&...) const {
        return false;
    }
};

// The distance to a centroid, or to the best of those at a finite distance.
void put_nearest(const TopkDistances& c, const Vectors<float>& v, int64_t q, int64_t number) {
    const Search& s = c.search;
    const float* const query = query_of(c, q);
    float distance = infinity;
    for (int again = 0; number >= 0 && again < 2; ++again) {
        distance = distance_of(c, query, number);
        if (distance - distance == 0.0f) break;
        number = best_of_all(v, s.n, query, is_l2(c), s.largest).id;
    }
    if (number < 0) distance = s.largest ? -infinity : infinity;
    static_cast<float*>(s.distances.data)[q] = distance;
    static_cast<int64_t*>(s.found.data)[q] = number;
}

template <class Screen>
void assign(const TopkDistances& c, const Runtime& runtime, Screen screen) {
    const Search& s = c.search;
    const bool l2 = is_l2(c);
    const int64_t Q = c.queries.size[0], D = c.base.size[1], pieces = ceil_div(Q, assign_together);
    const Vectors<float> v = vectors_of<float>(c), x{query_of(c, 0), c.queries.stride[0], D, nullptr, nullptr};
    Centroids centroids{nullptr, s.n, D + 1, 0.0};
    struct Space {
        AssignSpace floats;
        typename Screen::Space words;
    };
    const auto memory = lay_out(
        runtime, pieces,
        [&](Arena& arena) {
            centroids.rows = arena.take<float>(Centroids::floats(s.n, D));
            screen.take(arena);
        },
        [&](Arena& arena) { return Space{AssignSpace::take(arena, D), screen.space(arena)}; });
    pack_centroids(centroids, v, l2, s.largest);
    screen.pack(v);
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        const Space at = memory(worker);
        const int64_t end = smaller(Q, (piece + 1) * assign_together);
        const auto found = [&](int64_t q, int64_t number) { put_nearest(c, v, q, number); };
        bool screened = true;
        for (int64_t first = piece * assign_together; first < end; first += panel) {
            const int64_t count = smaller(panel, end - first);
            screened = screened && screen.assign(at.words, v, x, first, count, found);
            if (!screened) assign_points(centroids, v, l2, s.largest, at.floats, x, first, count, found);
        }
    });
}

void assign(const TopkDistances& c, const Runtime& runtime) {
#if defined(METATE_HAS_VNNI_FORMS)
    const int64_t D = c.base.size[1], n = c.search.n;
    if (Screen::fits(D, n))
        return assign(c, runtime, Screen{nullptr, nullptr, nullptr, D, n, (D + 1) / 2, is_l2(c), c.search.largest});
#endif
    assign(c, runtime, NoScreen{});
}

}  // namespace

void topk_distances(const TopkDistances& c, const Runtime& runtime) {
    const int64_t Q = c.queries.size[0];
    const bool alone = c.search.ranges || Q < few_queries || query_rows * room(c.search) > int64_t{1} << 24;
    if (!is_l2(c) && c.metric != Metric::inner_product) return by_distances(c, runtime);
    if (is_assignment(c)) return assign(c, runtime);
    alone ? by_rows(c, runtime) : by_products(c, runtime);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(topk_distances, TopkDistances, p.base.dtype)
