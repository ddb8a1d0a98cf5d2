// The softmax of every row, for the passes behind the forward.
#pragma once

#include "host.h"

namespace metate::cuda::flash {

// (B, Hq, Sq), contiguous. probability = 2^((x - largest) · unit - lse), x a score in units of the problem; +inf for
// the lse of a row that sees no key.
struct Rows {
    View<3> largest, lse;
};

inline size_t rows_bytes(const Problem& p) {
    return 2 * sizeof(float) * static_cast<size_t>(p.a.q.size[0]) * static_cast<size_t>(p.heads) *
           static_cast<size_t>(p.queries);
}

Rows rows_in(const Problem& p, void* memory);

// From lse; where |lse| > limit, from the scores. The problem has its summary for tiles of 64 queries.
void find_softmax(const Problem& p, const View<3>& lse, double limit, const Rows& rows, const Device& device);

}  // namespace metate::cuda::flash
