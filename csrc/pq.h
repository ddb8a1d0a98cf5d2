// Product quantisation and brute-force search: distance tables, codes, scans of codes, and distances of vectors.
//
// Codes are M numbers of `bits` bits a row. Packed, number m is bits m·bits … (m+1)·bits - 1 of the row's bytes, least
// significant first; bits that fill the last byte mean nothing. Interleaved (4 or 8 bits), a block holds 32 rows,
// (M, 4·bits) bytes: of 8 bits, byte j of number m is that of row j; of 4 bits, byte j holds row j in its low half and
// row j + 16 in its high half. The last block may hold fewer rows; what fills it may be anything.
//
// A search compares query q with the rows ranges[q, p, 0] <= i < ranges[q, p, 1] of every p, cut to 0 … n, that `keep`
// keeps; with `lists`, those of the ranges that it names. It finds the k best distances (smallest, or largest), best
// first, among equal ones the lower id first. Rows whose distance is infinite or NaN are not found; what is missing is
// id -1 at distance inf (-inf if largest). Results are the same, bit for bit, whatever the layout of codes, the batch,
// the order of ranges and the number of threads:
//   pq_scan         (Σ_m tables[q, m, code_m(i)] + row_bias[i]) + bias[q, p], in float32, summed in order of m
//   topk_distances  Σ (query - row)², Σ query · row, Σ |query - row| or max |query - row| in float64, of the stored
//                   numbers, rounded once to float32; an int8 row stands for scale · row + offset
//   pq_encode       number m is the id that topk_distances (L2, k = 1) finds among codebook m; 0 where it finds none
// Approximations may only tell which rows cannot be among the best.
#pragma once

#include "metate.h"

namespace metate {

// L2 is squared; l1 and linf are the sum and the largest of the differences, of vectors alone.
enum class Metric : int8_t { l2, inner_product, l1 = 3, linf = 4 };

// Of memory in one piece.
template <int N>
METATE_INLINE View<N> contiguous_view(void* data, DType dtype, const int64_t (&size)[N]) {
    View<N> view{data, dtype, {}, {}};
    for (int64_t i = N - 1, next = 1; i >= 0; next *= size[i], --i) view.size[i] = size[i], view.stride[i] = next;
    return view;
}

METATE_INLINE int64_t code_bits(int64_t levels) {
    int64_t bits = 0;
    while (int64_t{1} << bits < levels) ++bits;
    return bits;
}

struct PqDistanceTables {
    View<2> queries;    // (Q, M · d) f32
    View<3> codebooks;  // (M, L, d) f32, contiguous, or with a stride of 1 along L
    Metric metric;
    View<3> tables;       // (Q, M, L) f32: Σ (q - c)² or Σ q · c over the d columns, times `factor`
    float factor = 1.0f;  // a power of two
};

struct PqEncode {
    View<2> x;          // (n, M · d) f32, the columns of a row side by side
    View<3> codebooks;  // (M, 2^bits, d) f32, contiguous
    int64_t bits;       // 1 to 16
    View<2> codes;      // (n, ⌈M · bits / 8⌉) u8, contiguous, packed; bits that fill the last byte are 0
};

struct PqDecode {
    View<3> codebooks;  // (M, 2^bits, d) f32, contiguous
    View<2> codes;      // (n, ⌈M · bits / 8⌉) u8, the bytes of a row side by side
    int64_t bits;
    View<2> out;  // (n, M · d) f32, contiguous
};

// Which rows a search compares with which query, and what it finds.
struct Search {
    int64_t n;       // rows
    View<3> ranges;  // (Q, P, 2) i64, or absent: P = 1, all rows; beside lists (1, L, 2)
    View<1> ids;     // (n) i64, contiguous, what rows are called; absent: their number
    View<1> keep;    // (⌈n / 8⌉) u8, contiguous: bit i % 8 of byte i / 8 keeps row i; absent: all
    int64_t k;
    bool largest;
    View<2> distances;  // (Q, k) f32, contiguous
    View<2> found;      // (Q, k) i64, contiguous
    View<2> lists{};    // (Q, P) i64, or absent: range p of query q is ranges[0, lists[q, p]], empty where that is -1
};

struct PqScan {
    View<3> tables;    // (Q, M, L) f32, contiguous, L = 2^bits
    int64_t bits;      // 1 to 16
    View<2> packed;    // (n, ⌈M · bits / 8⌉) u8, the bytes of a row side by side, or absent
    View<3> blocks;    // (⌈n / 32⌉, M, 4 · bits) u8, contiguous, where codes are interleaved, or absent
    View<2> bias;      // (Q, P) f32, or absent
    View<1> row_bias;  // (n) f32, contiguous, or absent
    Search search;
};

struct TopkDistances {
    View<2> queries;        // (Q, D) f32, the columns of a row side by side
    View<2> base;           // (n, D) f32, bf16, f16 or i8, the columns of a row side by side
    View<1> scale, offset;  // (D) f32, contiguous, beside an i8 base
    Metric metric;
    Search search;
};

// A search of the `nprobe` lists whose centroids are nearest to each query: of vectors by topk_distances, of codes by
// pq_scan.
struct IvfSearch {
    View<2> queries;        // (Q, D) f32, the columns of a row side by side
    View<2> centroids;      // (lists, D) f32, the columns of a row side by side
    View<2> rows;           // vectors or packed codes, or absent
    View<3> blocks;         // interleaved codes, or absent
    View<3> codebooks;      // beside codes, as of PqDistanceTables
    bool residual;          // codes are of vectors less the centroids of their lists
    View<1> row_bias;       // as of PqScan: of residual codes and L2 Σ r (r + 2 c), r decoded and c its list's centroid
    View<1> scale, offset;  // as of TopkDistances
    Metric metric;
    int64_t nprobe;
    Search search;  // with `ranges` of all lists; `lists` are found

    METATE_INLINE int64_t tables() const { return codebooks ? codebooks.size[0] * codebooks.size[1] : 0; }
    METATE_INLINE int64_t workspace_bytes() const { return queries.size[0] * (12 * nprobe + 4 * tables()); }
};

// Calls launch(kernel's parameters) for each kernel that it is made of, with so much memory between them.
template <class Launch>
METATE_INLINE void launch_each(const IvfSearch& c, void* workspace, const Launch& launch) {
    const int64_t Q = c.queries.size[0], lists = c.centroids.size[0];
    char* const memory = static_cast<char*>(workspace);
    const View<2> near = contiguous_view(memory + 8 * Q * c.nprobe, DType::f32, {Q, c.nprobe});
    Search search = c.search;
    search.lists = contiguous_view(memory, DType::i64, {Q, c.nprobe});
    launch(TopkDistances{
        c.queries, c.centroids, {}, {}, c.metric, {lists, {}, {}, {}, c.nprobe, search.largest, near, search.lists}});
    if (!c.codebooks) return launch(TopkDistances{c.queries, c.rows, c.scale, c.offset, c.metric, search});
    // |q - c - r|² = |q - c|² + (|r|² + 2 c·r) - 2 q·r: the list's, the row's, and that of tables of the query alone.
    const int64_t M = c.codebooks.size[0], L = c.codebooks.size[1];
    const View<3> tables = contiguous_view(memory + 12 * Q * c.nprobe, DType::f32, {Q, M, L});
    launch(PqDistanceTables{c.queries, c.codebooks, c.residual ? Metric::inner_product : c.metric, tables,
                            c.residual && !search.largest ? -2.0f : 1.0f});
    launch(PqScan{tables, code_bits(L), c.rows, c.blocks, c.residual ? near : View<2>{}, c.row_bias, search});
}

// Vectors that are written behind the rows of lists, as they are or as their codes. What is there stays as it is, so
// that others may search it meanwhile.
struct PqAdd {
    View<2> x;                       // (n, D) f32, contiguous
    View<2> centroids;               // (lists, D) f32, contiguous; absent: one list
    View<3> codebooks;               // (M, 2^bits, d) f32, contiguous; absent: rows are vectors
    View<2> rows;                    // (capacity, D) f32, or (capacity, ⌈M · bits / 8⌉) u8, contiguous, or absent
    View<3> blocks;                  // interleaved codes, contiguous, or absent
    View<1> row_bias;                // (capacity) f32, contiguous, or absent
    View<1> ids;                     // (capacity) i64, contiguous, or absent
    View<1> start, room;             // (lists) i64, contiguous: the first row of each, and how many it may have
    Metric metric;                   // of the nearest centroid
    bool residual;                   // as of IvfSearch
    const int64_t* named = nullptr;  // (n) ids of the vectors; absent: those from first_id on
    int64_t first_id = 0;
    bool known = false;         // `lists` says where vectors go; else it is found
    int64_t* length = nullptr;  // (lists) rows of each, which grow
    int64_t* lists = nullptr;   // (n) the list of each vector
    int64_t* places = nullptr;  // (n) the row of each vector
    void* workspace = nullptr;  // workspace_bytes()
    // What came of it: `no_room` where a list has none, `refused` where vectors are not finite. Only if it is done do
    // lengths, rows and places mean anything.
    enum class Came { done, no_room, refused }* came = nullptr;

    static constexpr int64_t together = 4096;  // vectors that are encoded at a time
    METATE_INLINE int64_t bits() const { return code_bits(codebooks.size[1]); }
    METATE_INLINE int64_t code_bytes() const { return (codebooks.size[0] * bits() + 7) / 8; }
    METATE_INLINE int64_t workspace_bytes() const {
        const int64_t n = x.size[0], most = n < together ? n : together;
        const int64_t finding = centroids ? 4 * n : 0, coding = codebooks ? (8 * x.size[1] + code_bytes()) * most : 0;
        return finding < coding ? coding : finding;
    }
};

// Σ r (r + 2 c) of every row, which `row_bias` holds.
struct PqRowBias {
    View<2> decoded, centroids;  // (n, D) f32, contiguous
    View<1> bias;                // (n) f32, contiguous
};

// Adds every point to the sum of its cluster, in order. Points come in records of `period`, and those at different
// places of a record belong to different clusters.
struct AddToClusters {
    View<2> x;        // (n, d) f32, contiguous
    View<1> numbers;  // (n) i64, contiguous: the cluster of each
    View<2> sums;     // (clusters, d) f32, contiguous
    int64_t period;   // a divisor of n
};

namespace cpu {
void pq_distance_tables(const PqDistanceTables&, const Runtime&);
void pq_encode(const PqEncode&, const Runtime&);
void pq_decode(const PqDecode&, const Runtime&);
void pq_scan(const PqScan&, const Runtime&);
void topk_distances(const TopkDistances&, const Runtime&);
void pq_add(const PqAdd&, const Runtime&);
void pq_row_bias(const PqRowBias&, const Runtime&);
void add_to_clusters(const AddToClusters&, const Runtime&);
}  // namespace cpu

namespace cuda {
void pq_distance_tables(const PqDistanceTables&, const Device&);
void pq_encode(const PqEncode&, const Device&);
void pq_decode(const PqDecode&, const Device&);
void pq_scan(const PqScan&, const Device&);
void topk_distances(const TopkDistances&, const Device&);
}  // namespace cuda

}  // namespace metate
