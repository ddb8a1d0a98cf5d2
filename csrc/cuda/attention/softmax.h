// The online softmax of one tile of scores.
#pragma once

#include <math.h>

#include "score.h"

namespace metate::cuda::flash {

// Scores into probabilities relative to the largest score so far, to which the sums and the output are brought, too.
template <int m, int n, int d>
METATE_DEVICE void softmax(float (&s)[m][n][4], float (&largest)[2 * m], float (&sum)[2 * m], float (&o)[m][d][4],
                           float unit) {
    float decay[2 * m];
    bool moved = false;
    METATE_UNROLL
    for (int r = 0; r < 2 * m; ++r) {
        float top = largest[r];
        METATE_UNROLL
        for (int c = 0; c < 2 * n; ++c) top = fmaxf(top, s[r / 2][c / 2][r % 2 * 2 + c % 2]);
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float base = top == -infinite() ? 0.f : top * unit;
        decay[r] = fast_exp2(largest[r] * unit - base);
        moved |= top != largest[r];
        largest[r] = top;
        sum[r] *= decay[r];
        METATE_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            float& x = s[r / 2][c / 2][r % 2 * 2 + c % 2];
            x = fast_exp2(x * unit - base);
            sum[r] += x;
        }
    }
    if (!vote_any(moved)) return;
    METATE_UNROLL
    for (int i = 0; i < m * d * 4; ++i) o[i / 4 / d][i / 4 % d][i % 4] *= decay[i / 4 / d * 2 + i % 4 / 2];
}

}  // namespace metate::cuda::flash
