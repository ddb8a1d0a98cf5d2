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
//   topk_distances  Σ (query - row)² or Σ query · row in float64, of the stored numbers, rounded once to float32; an
//                   int8 row stands for scale · row + offset
//   pq_encode       number m is the id that topk_distances (L2, k = 1) finds among codebook m; 0 where it finds none
// Approximations may only tell which rows cannot be among the best.
#pragma once

#include "metate.h"

namespace metate {

enum class Metric : int8_t { l2, inner_product };

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
    int64_t bits;       // 4 to 16
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
    int64_t bits;      // 4 to 16
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

namespace cpu {
void pq_distance_tables(const PqDistanceTables&, const Runtime&);
void pq_encode(const PqEncode&, const Runtime&);
void pq_decode(const PqDecode&, const Runtime&);
void pq_scan(const PqScan&, const Runtime&);
void topk_distances(const TopkDistances&, const Runtime&);
}  // namespace cpu

namespace cuda {
void pq_distance_tables(const PqDistanceTables&, const Device&);
void pq_encode(const PqEncode&, const Device&);
void pq_decode(const PqDecode&, const Device&);
void pq_scan(const PqScan&, const Device&);
void topk_distances(const TopkDistances&, const Device&);
}  // namespace cuda

}  // namespace metate
