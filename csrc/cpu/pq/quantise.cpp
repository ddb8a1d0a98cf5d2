// Distance tables, codes of vectors and vectors of codes.
#include "codes.h"
#include "nearest.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Tables: `width` centroids at a time, turned so that each has a lane, against a block of queries.

constexpr int64_t table_queries = 64;

METATE_FN void turn_centroids(float* to, const float* from, int64_t columns) {
    for (int64_t first = 0; first < columns; first += width) {
        const int64_t n = smaller(width, columns - first);
        vf square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load_numbers(from + i * columns + first, n);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i)
            if (i < n) store(to + (first + i) * width, square[i]);
    }
}

template <bool l2>
METATE_FN vf table_entries(const float* query, int64_t stride, const float* centroids, int64_t columns) {
    vf sum = splat(0.0f);
    for (int64_t i = 0; i < columns; ++i) {
        const vf a = splat(query[i * stride]), b = load(centroids + i * width), gap = a - b;
        sum = l2 ? fma(gap, gap, sum) : fma(a, b, sum);
    }
    return sum;
}

template <bool l2>
void fill_tables(const PqDistanceTables& c, const Runtime& runtime) {
    const int64_t Q = c.queries.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const int64_t blocks = ceil_div(Q, table_queries), stride = c.queries.stride[1];
    const auto memory =
        lay_out(runtime, M * blocks, [](Arena&) {}, [&](Arena& arena) { return arena.take<float>(d * width); });
    for_pieces(runtime, M * blocks, [&](int worker, int64_t piece) {
        float* const centroids = memory(worker);
        const int64_t m = piece % M, first = piece / M * table_queries, end = smaller(Q, first + table_queries);
        const float* const book = static_cast<const float*>(c.codebooks.data) + m * L * d;
        for (int64_t l = 0; l < L; l += width) {
            turn_centroids(centroids, book + l * d, d);
            for (int64_t q = first; q < end; ++q) {
                const float* const query =
                    static_cast<const float*>(c.queries.data) + q * c.queries.stride[0] + m * d * stride;
                float* const table = static_cast<float*>(c.tables.data) + (q * M + m) * L;
                store(table + l, table_entries<l2>(query, stride, centroids, d));
            }
        }
    });
}

// Encoding: sub-vectors are queries, and the centroids of their codebook the rows.

struct PackedBooks {
    PackedRows* blocks;  // (M, blocks of a codebook)
    float* panels;
    int64_t M, L, d, count;

    int64_t floats_of_block() const { return base_rows * (d + 1); }
    void take(Arena& arena) {
        blocks = arena.take<PackedRows>(M * count);
        panels = arena.take<float>(M * count * floats_of_block());
    }
};

struct Workspace {
    PackedQueries queries;
    float* keys;
};

// The codes of `rows` vectors from number `first` on.
void encode_rows(const PqEncode& c, const PackedBooks& books, const Workspace& at, const Heaps& heaps, int64_t slot,
                 int64_t first, int64_t rows) {
    const int64_t L = books.L, d = books.d, bytes = c.codes.size[1];
    const Search s{L, {}, {}, {}, 1, false, {}, {}};
    uint8_t* const codes = static_cast<uint8_t*>(c.codes.data) + first * bytes;
    for (int64_t i = 0; i < rows * bytes; ++i) codes[i] = 0;
    for (int64_t m = 0; m < books.M; ++m) {
        const Vectors<float> v{static_cast<const float*>(c.codebooks.data) + m * L * d, d, d, nullptr, nullptr};
        at.queries.fill(static_cast<const float*>(c.x.data) + first * c.x.stride[0] + m * d, c.x.stride[0], rows, d,
                        d + 1);
        for (int64_t r = 0; r < rows; ++r) {
            heaps.counts[slot + r] = 0;
            heaps.shared[slot + r] = bit_cast<uint32_t>(infinity);
        }
        for (int64_t b = 0; b < books.count; ++b) {
            const int64_t begin = b * base_rows;
            compare_block<true>(
                s, Block<float>{v, books.blocks[m * books.count + b], begin, smaller(base_rows, L - begin)}, at.queries,
                rows, at.keys, [&](int64_t r) { return heaps.open(0, slot + r); },
                [&](int64_t r, const Best& best) { heaps.close(0, slot + r, best); });
        }
        for (int64_t r = 0; r < rows; ++r)
            if (heaps.counts[slot + r])
                put_code(codes + r * bytes, m, c.bits, static_cast<uint32_t>(heaps.hits[slot + r].id));
    }
}

}  // namespace

void pq_distance_tables(const PqDistanceTables& c, const Runtime& runtime) {
    return c.metric == Metric::l2 ? fill_tables<true>(c, runtime) : fill_tables<false>(c, runtime);
}

void pq_encode(const PqEncode& c, const Runtime& runtime) {
    const int64_t n = c.x.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const int64_t pieces = ceil_div(n, query_rows);
    if (pieces == 0) return;
    PackedBooks books{nullptr, nullptr, M, L, d, ceil_div(L, base_rows)};
    Heaps heaps{nullptr, nullptr, nullptr, 1, workers_of(runtime, pieces) * query_rows, 1};
    const auto memory = lay_out(
        runtime, pieces,
        [&](Arena& arena) {
            books.take(arena);
            heaps.take(arena);
        },
        [&](Arena& arena) {
            Workspace at{{}, arena.take<float>(tile_rows * base_rows)};
            at.queries.take(arena, d + 1);
            return at;
        });
    for_pieces(runtime, M * books.count, [&](int, int64_t piece) {
        const int64_t m = piece / books.count, begin = piece % books.count * base_rows;
        const Vectors<float> v{static_cast<const float*>(c.codebooks.data) + m * L * d, d, d, nullptr, nullptr};
        books.blocks[piece] = {books.panels + piece * books.floats_of_block(), d + 1, 0.0};
        pack_rows_of<true>(books.blocks[piece], v, begin, smaller(base_rows, L - begin), false);
    });
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        const int64_t first = piece * query_rows;
        encode_rows(c, books, memory(worker), heaps, worker * query_rows, first, smaller(query_rows, n - first));
    });
}

void pq_decode(const PqDecode& c, const Runtime& runtime) {
    constexpr int64_t rows = 512;
    const int64_t n = c.codes.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const float* const books = static_cast<const float*>(c.codebooks.data);
    for_pieces(runtime, ceil_div(n, rows), [&](int, int64_t piece) {
        for (int64_t i = piece * rows; i < smaller(n, (piece + 1) * rows); ++i) {
            const uint8_t* const row = static_cast<const uint8_t*>(c.codes.data) + i * c.codes.stride[0];
            float* to = static_cast<float*>(c.out.data) + i * M * d;
            for (int64_t m = 0; m < M; ++m, to += d) {
                const float* const from = books + (m * L + code_at(row, m, c.bits)) * d;
                for (int64_t j = 0; j < d; ++j) to[j] = from[j];
            }
        }
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(pq_distance_tables, PqDistanceTables, p.queries.dtype)
METATE_DISPATCH(pq_encode, PqEncode, p.x.dtype)
METATE_DISPATCH(pq_decode, PqDecode, p.codebooks.dtype)
