// Sums of the points of each cluster, which k-means moves its centroids by.
#include "../../pq.h"
#include "../arithmetic.h"
#include "../parallel.h"

namespace metate::cpu::METATE_ISA {
namespace {

using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

// Columns first … last of all records, one after another: each sum is one worker's, whoever helps.
void add_columns(const AddToClusters& c, int64_t first, int64_t last) {
    const int64_t d = c.x.size[1], records = c.x.size[0] / c.period;
    const int64_t* const numbers = static_cast<const int64_t*>(c.numbers.data);
    for (int64_t i = 0; i < records; ++i)
        for (int64_t column = first; column < last; column = (column / d + 1) * d) {
            const int64_t point = i * c.period + column / d, begin = column % d,
                          end = smaller(d, last - column + begin);
            const float* const from = static_cast<const float*>(c.x.data) + point * d;
            float* const to = static_cast<float*>(c.sums.data) + numbers[point] * d;
            int64_t j = begin;
            for (; j + 4 <= end; j += 4) *reinterpret_cast<Four*>(to + j) += *reinterpret_cast<const Four*>(from + j);
            for (; j < end; ++j) to[j] += from[j];
        }
}

}  // namespace

// Columns are shared out: those of a point of a record, or, where points stand alone, cache lines.
void add_to_clusters(const AddToClusters& c, const Runtime& runtime) {
    constexpr int64_t worth_workers = 1 << 17;  // numbers
    const int64_t d = c.x.size[1], columns = c.period * d, unit = c.period > 1 ? d : 16;
    Runtime workers = runtime;
    if (c.x.size[0] * d < worth_workers) workers.threads = 1;
    const int64_t units = ceil_div(columns, unit), pieces = workers_of(workers, units);
    for_pieces(workers, pieces, [&](int, int64_t piece) {
        add_columns(c, units * piece / pieces * unit, smaller(columns, units * (piece + 1) / pieces * unit));
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(add_to_clusters, AddToClusters, p.x.dtype)
