// The product of few rows of x with 4-bit codes straight from transposed words: the same sums in the same order as
// product.h, without decoded values in memory.
#pragma once

#include "product.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int fused_rows = 4;

// What to fetch beside the products, evenly: a line of each row of W, `stride` bytes apart.
struct Ahead {
    const uint8_t* at;
    int64_t stride;
};

// `block` whole columns of the rows of W in the lanes of `words`; `lane` is the first of them in the panel.
template <int rows, Values::Kind kind>
__attribute__((noinline)) void multiply_decoding(const Tile& t, const int32_t* words, int lane, const Values& values,
                                                 Ahead ahead) {
    constexpr int bits = 4, together = rows == 1 ? 4 : 2;
    const Table16 table = table16(values.entries);
    for (int c = 0; c < block / longest; c += together) {
        vf sum[together][rows];
#pragma GCC unroll 4
        for (int q = 0; q < together; ++q) {
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sum[q][r] = splat(0.0f);
        }
        const float* const x = t.x + c * longest;
#pragma GCC unroll 32
        for (int j = 0; j < longest; ++j) {
            if (j % (block / together / width) == 0) {
                __builtin_prefetch(ahead.at, 0, 2);
                ahead.at += ahead.stride;
            }
#pragma GCC unroll 4
            for (int q = 0; q < together; ++q) {
                const vf value = value_at<bits, kind>(words + (c + q) * bits * width, j, values, table);
#pragma GCC unroll 4
                for (int r = 0; r < rows; ++r) sum[q][r] = fma(splat(x[r * block + q * longest + j]), value, sum[q][r]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < together; ++q) {
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) add_sum<true>(t, c + q, r, lane, sum[q][r]);
        }
    }
}

template <int rows = fused_rows>
METATE_FN void multiply_fused(int64_t n, const Tile& t, const int32_t* words, int lane, const Values& values,
                              const Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_fused<rows - 1>(n, t, words, lane, values, ahead);
    }
    if (width == 16 || values.kind == Values::table)
        return multiply_decoding<rows, Values::table>(t, words, lane, values, ahead);
    if constexpr (width < 16) multiply_decoding<rows, Values::whole>(t, words, lane, values, ahead);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
