// Distance tables, codes of vectors and vectors of codes.
#include "assign.h"
#include "codes.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Tables: `width` centroids at a time, turned (unless they are already) so that each has a lane, against a block of
// queries.

constexpr int64_t table_queries = 64;
constexpr int64_t worth_workers = 1 << 18;  // products; fewer, and starting workers costs more

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
METATE_FN vf table_entries(const float* query, int64_t stride, const float* centroids, int64_t step, int64_t columns) {
    vf sum = splat(0.0f);
    for (int64_t i = 0; i < columns; ++i) {
        const vf a = splat(query[i * stride]), b = load(centroids + i * step), gap = a - b;
        sum = l2 ? fma(gap, gap, sum) : fma(a, b, sum);
    }
    return sum;
}

template <bool l2>
void fill_tables(const PqDistanceTables& c, const Runtime& runtime) {
    const int64_t Q = c.queries.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const int64_t blocks = ceil_div(Q, table_queries), stride = c.queries.stride[1];
    const bool turned = c.codebooks.stride[1] == 1;
    const int64_t step = turned ? c.codebooks.stride[2] : width;
    const vf factor = splat(c.factor);
    Runtime workers = runtime;
    if (Q * L * M * d < worth_workers) workers.threads = 1;
    const auto memory =
        lay_out(workers, M * blocks, [](Arena&) {}, [&](Arena& arena) { return arena.take<float>(d * width); });
    for_pieces(workers, M * blocks, [&](int worker, int64_t piece) {
        const int64_t m = piece % M, first = piece / M * table_queries, end = smaller(Q, first + table_queries);
        const float* const book = static_cast<const float*>(c.codebooks.data) + m * c.codebooks.stride[0];
        for (int64_t l = 0; l < L; l += width) {
            const float* const centroids = turned ? book + l : memory(worker);
            if (!turned) turn_centroids(memory(worker), book + l * d, d);
            for (int64_t q = first; q < end; ++q) {
                const float* const query =
                    static_cast<const float*>(c.queries.data) + q * c.queries.stride[0] + m * d * stride;
                float* const table = static_cast<float*>(c.tables.data) + (q * M + m) * L;
                store(table + l, table_entries<l2>(query, stride, centroids, step, d) * factor);
            }
        }
    });
}

constexpr int64_t encode_together = 256;  // rows of a piece, whole panels

}  // namespace

void pq_distance_tables(const PqDistanceTables& c, const Runtime& runtime) {
    return c.metric == Metric::l2 ? fill_tables<true>(c, runtime) : fill_tables<false>(c, runtime);
}

void pq_encode(const PqEncode& c, const Runtime& runtime) {
    const int64_t n = c.x.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const int64_t pieces = ceil_div(n, encode_together), bytes = c.codes.size[1];
    if (pieces == 0) return;
    Centroids* books = nullptr;
    float* rows = nullptr;
    const auto memory = lay_out(
        runtime, pieces,
        [&](Arena& arena) {
            books = arena.take<Centroids>(M);
            rows = arena.take<float>(M * Centroids::floats(L, d));
        },
        [&](Arena& arena) { return AssignSpace::take(arena, d); });
    const auto book = [&](int64_t m) {
        return Vectors<float>{static_cast<const float*>(c.codebooks.data) + m * L * d, d, d, nullptr, nullptr};
    };
    for_pieces(runtime, M, [&](int, int64_t m) {
        books[m] = {rows + m * Centroids::floats(L, d), L, d + 1, 0.0};
        pack_centroids<true>(books[m], book(m), false);
    });
    for_pieces(runtime, pieces, [&](int worker, int64_t piece) {
        const AssignSpace at = memory(worker);
        const int64_t begin = piece * encode_together, end = smaller(n, begin + encode_together);
        uint8_t* const codes = static_cast<uint8_t*>(c.codes.data);
        for (int64_t i = begin * bytes; i < end * bytes; ++i) codes[i] = 0;
        for (int64_t m = 0; m < M; ++m) {
            const Vectors<float> x{static_cast<const float*>(c.x.data) + m * d, c.x.stride[0], d, nullptr, nullptr};
            for (int64_t first = begin; first < end; first += panel)
                assign_points<true>(books[m], book(m), false, at, x, first, smaller(panel, end - first),
                                    [&](int64_t row, int64_t number) {
                                        if (number > 0)
                                            put_code(codes + row * bytes, m, c.bits, static_cast<uint32_t>(number));
                                    });
        }
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
