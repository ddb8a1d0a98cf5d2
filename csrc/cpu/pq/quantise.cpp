// Distance tables, codes of vectors and vectors of codes.
#include "codes.h"
#include "encode.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Tables: some centroids at a time, turned (unless they are already) so that each has a lane, against a block of
// queries.

constexpr int64_t table_queries = 64;
constexpr int vectors_together = 8;
constexpr int64_t worth_workers = 1 << 18;  // products; fewer, and starting workers costs more

// The columns of a query, and centroids of which the same column lies side by side, `step` apart.
struct TableOperands {
    const float* query;
    int64_t stride;
    const float* centroids;
    int64_t step, columns;
};

// `vectors` vectors of entries, which hide each other's latency.
template <bool l2, int vectors>
METATE_FN void table_entries(float* to, const TableOperands& at, vf factor) {
    vf sum[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = splat(0.0f);
    for (int64_t i = 0; i < at.columns; ++i) {
        const vf a = splat(at.query[i * at.stride]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const vf b = load(at.centroids + i * at.step + v * width), gap = a - b;
            sum[v] = l2 ? fma(gap, gap, sum[v]) : fma(a, b, sum[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(to + v * width, sum[v] * factor);
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
        const int64_t together = turned && L % (vectors_together * width) == 0 ? vectors_together * width : width;
        const auto query_of = [&](int64_t q) {
            return static_cast<const float*>(c.queries.data) + q * c.queries.stride[0] + m * d * stride;
        };
        const auto entries_of = [&](int64_t q) { return static_cast<float*>(c.tables.data) + (q * M + m) * L; };
        if (L < width) {
            float *const lanes = memory(worker), entries[width];
            for (int64_t i = 0; i < d * width; ++i) lanes[i] = 0.0f;
            for (int64_t l = 0; l < L; ++l)
                for (int64_t i = 0; i < d; ++i)
                    lanes[i * width + l] = book[l * c.codebooks.stride[1] + i * c.codebooks.stride[2]];
            for (int64_t q = first; q < end; ++q) {
                table_entries<l2, 1>(entries, {query_of(q), stride, lanes, width, d}, factor);
                __builtin_memcpy(entries_of(q), entries, static_cast<size_t>(L) * sizeof(float));
            }
        }
        for (int64_t l = 0; l + width <= L; l += together) {
            const float* const centroids = turned ? book + l : memory(worker);
            if (!turned) turn_rows(memory(worker), book + l * d, d, width, d);
            for (int64_t q = first; q < end; ++q) {
                float* const to = entries_of(q) + l;
                const TableOperands at{query_of(q), stride, centroids, step, d};
                if (together > width)
                    table_entries<l2, vectors_together>(to, at, factor);
                else
                    table_entries<l2, 1>(to, at, factor);
            }
        }
    });
}

constexpr int64_t points_together = 128, codes_together = 8;  // of a piece: whole vectors, whole bytes
constexpr int64_t worth_lanes = width / 2;                    // points

}  // namespace

void pq_distance_tables(const PqDistanceTables& c, const Runtime& runtime) {
    return c.metric == Metric::l2 ? fill_tables<true>(c, runtime) : fill_tables<false>(c, runtime);
}

void pq_encode(const PqEncode& c, const Runtime& runtime) {
    const int64_t n = c.x.size[0], M = c.codebooks.size[0], L = c.codebooks.size[1], d = c.codebooks.size[2];
    const int64_t blocks = ceil_div(n, points_together), bytes = c.codes.size[1];
    const int64_t pieces = blocks * ceil_div(M, codes_together);
    if (pieces == 0) return;
    const Runtime workers = worth(runtime, n * M * L * d / width);
    const auto memory =
        lay_out(workers, pieces, [](Arena&) {}, [&](Arena& arena) { return arena.take<float>(d * width); });
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        const int64_t first = piece % blocks * points_together, count = smaller(points_together, n - first);
        const int64_t begin = piece / blocks * codes_together, end = smaller(M, begin + codes_together);
        uint8_t codes[points_together][codes_together * 2] = {};  // copied at last: others write beside them
        for (int64_t m = begin; m < end; ++m) {
            const Vectors<float> book{static_cast<const float*>(c.codebooks.data) + m * L * d, d, d, nullptr, nullptr};
            Vectors<float> x{static_cast<const float*>(c.x.data) + first * c.x.stride[0] + m * d, c.x.stride[0], d,
                             nullptr, nullptr};
            int64_t i = 0;
            const auto found = [&](int64_t at, int64_t number) __attribute__((always_inline)) {
                if (number > 0) put_code(codes[i + at], m - begin, c.bits, static_cast<uint32_t>(number));
            };
            const int64_t least = L < width ? 1 : worth_lanes;  // points that stand in lanes rather than centroids
            for (; count - i >= least; i += width, x.data = x.row(width))
                encode_lanes(book, L, memory(worker), x, smaller(width, count - i), found);
            for (; i < count; ++i, x.data = x.row(1)) found(0, encode_point(book, L, x.data));
        }
        const int64_t size = ceil_div((end - begin) * c.bits, 8);
        uint8_t* to = static_cast<uint8_t*>(c.codes.data) + first * bytes + begin * c.bits / 8;
        for (int64_t i = 0; i < count; ++i, to += bytes) __builtin_memcpy(to, codes[i], static_cast<size_t>(size));
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
