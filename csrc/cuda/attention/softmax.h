// The online softmax of one tile of scores.
#pragma once

#include <math.h>

#include "score.h"

namespace metate::cuda::flash {

// Where scores are so large, a difference of two comes before its product with the unit: otherwise the products are not
// rounded before they meet, and what the one was rounded by, 2^-24 of it, is in the exponent.
constexpr float large_score = 0x1p22f;

// Scores into probabilities relative to the largest score so far, to which the sums and the output are brought, too.
// `raw`: scores are dot products, to be multiplied by the unit; otherwise they are binary logits, and rounded.
template <bool raw, int m, int n, int d>
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
        float base = top == -infinite() ? 0.f : raw ? product(top, unit) : top;
        decay[r] = fast_exp2((raw ? product(largest[r], unit) : largest[r]) - base);
        if (raw && fabsf(base) > large_score) {
            decay[r] = fast_exp2((largest[r] - top) * unit);
            base = 0.f;
            METATE_UNROLL
            for (int c = 0; c < 2 * n; ++c) s[r / 2][c / 2][r % 2 * 2 + c % 2] -= top;
        }
        moved |= top != largest[r];
        largest[r] = top;
        sum[r] *= decay[r];
        METATE_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            float& x = s[r / 2][c / 2][r % 2 * 2 + c % 2];
            x = fast_exp2((raw ? x * unit : x) - base);
            sum[r] += x;
        }
    }
    if (!vote_any(moved)) return;
    METATE_UNROLL
    for (int i = 0; i < m * d * 4; ++i) o[i / 4 / d][i / 4 % d][i % 4] *= decay[i / 4 / d * 2 + i % 4 / 2];
}

}  // namespace metate::cuda::flash
