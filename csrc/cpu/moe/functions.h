// The functions of scores and activations, to a few units in the last place.
#pragma once

#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

// eˣ for x <= 87, 0 far below: the product with log2(e) is carried beyond float32, since its error grows with x.
METATE_FN vf exp(vf x) {
    x = max(splat(-100.0f), x);  // an infinite x would have no rest
    const vf scale = splat(log2_e), y = x * scale;
    const vf rest = fma(x, scale, splat(0.0f) - y);
    return exp2(y) * fma(fma(x, splat(1.92596299e-8f), rest), splat(ln_2), splat(1.0f));
}

// 0 below -87, where eˣ leaves the normal numbers: what multiplies the result may be as large as 2^63. `rest`: 1 less
// the result, without the difference, which leaves few digits of a share near 1.
METATE_FN vf sigmoid(vf x, vf* rest = nullptr) {
    const vf power = exp(min(splat(87.0f), splat(0.0f) - x)), value = splat(1.0f) / (splat(1.0f) + power);
    if (rest) *rest = power * value;
    return select(less(x, splat(-87.0f)), splat(0.0f), value);
}

// The normal distribution's share below x. With s = |x| / √2, erfc(s) = exp(s · a polynomial of s): in the lower tail
// nothing cancels, as 1 + erf would. Beyond the polynomial's end only s² counts.
METATE_FN vf normal_below(vf x) {
    constexpr float log_erfc[] = {8.48996038e-8f,  -2.22529411e-6f, 2.58575656e-5f, -1.74113418e-4f,
                                  7.30304280e-4f,  -1.74463342e-3f, 1.64713143e-4f, 1.91894025e-2f,
                                  -1.02801412e-1f, -6.36613905e-1f, -1.12837958f};
    const vf size = abs(x * splat(0.70710678f)), s = min(splat(4.25f), size);
    vf p = splat(log_erfc[0]);
#pragma GCC unroll 10
    for (int i = 1; i < 11; ++i) p = fma(p, s, splat(log_erfc[i]));
    const vf tail = splat(0.5f) * exp(fma(p, s, (s - size) * (s + size)));
    return select(less(x, splat(0.0f)), tail, splat(1.0f) - tail);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
