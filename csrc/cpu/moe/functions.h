// The functions of scores and activations, to a few units in the last place.
#pragma once

#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

// eˣ for x <= 87: the product with log2(e) is carried beyond float32, since its error grows with x.
METATE_FN vf exp(vf x) {
    const vf scale = splat(log2_e), y = x * scale;
    const vf rest = fma(x, scale, splat(0.0f) - y);
    return exp2(y) * fma(fma(x, splat(1.92596299e-8f), rest), splat(ln_2), splat(1.0f));
}

// 0 below -87, where eˣ leaves the normal numbers: what multiplies the result may be as large as 2^63.
METATE_FN vf sigmoid(vf x) {
    const vf value = splat(1.0f) / (splat(1.0f) + exp(min(splat(87.0f), splat(0.0f) - x)));
    return select(less(x, splat(-87.0f)), splat(0.0f), value);
}

// erf(x): x times a polynomial of x² below 1, 1 - exp(a polynomial) above.
METATE_FN vf erf(vf x) {
    constexpr float near[] = {7.8824974e-5f, -8.0188550e-4f, 5.1893122e-3f, -2.6854329e-2f,
                              1.1283597e-1f, -3.7612626e-1f, 1.1283791f};
    constexpr float far[] = {1.6151035e-6f,  -4.5612207e-5f, 5.9296080e-4f, -4.7411672e-3f, 2.6367560e-2f,
                             -1.0998356e-1f, -6.3193107e-1f, -1.1301705f,   3.0421902e-4f};
    const vf size = min(splat(4.0f), abs(x)), square = size * size;
    vf p = splat(near[0]), q = splat(far[0]);
#pragma GCC unroll 6
    for (int i = 1; i < 7; ++i) p = fma(p, square, splat(near[i]));
#pragma GCC unroll 8
    for (int i = 1; i < 9; ++i) q = fma(q, size, splat(far[i]));
    const vf outside = splat(1.0f) - exp(q);
    const vf signed_outside = select(less(x, splat(0.0f)), splat(0.0f) - outside, outside);
    return select(less(size, splat(1.0f)), p * x, signed_outside);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
