// The products of attention with cached codes of 8 and 4 bits in whole numbers, by VNNI.
//
// A row of queries, and its weights of a tile's keys, become multiples of a step of their own, numbers of 16 bits: the
// step is 2^-15 of the largest number, and queries are 16-bit floats. Codes become 16 bits wide as they are read. Sums
// are exact.
#pragma once

#include "tile.h"

namespace metate::cpu::METATE_ISA {
namespace {

#if defined(METATE_HAS_VNNI_FORMS)
template <class S>
constexpr bool has_integers = __is_same(S, int8_t) || __is_same(S, nibbles);
#else
template <class S>
constexpr bool has_integers = false;
#endif

// Turns `count` numbers, a multiple of width, into words in their place, and returns one times their step: NaN, and so
// are all products, where one is not finite.
template <class S>
float to_whole(float* x, int64_t count);

#if defined(METATE_HAS_VNNI_FORMS)
constexpr float levels = 28672;  // with codes up to 128, sums over max_key_dim numbers fit 32 bits
static_assert(128 * 28672ll * max_key_dim < INT32_MAX);
constexpr float least_magnitude = 0x1p-110f;  // of a row: the inverse of its step is finite

template <class S>
float to_whole(float* x, int64_t count) {
    vf most = splat(least_magnitude), poison = splat(0.0f);
    for (int64_t i = 0; i < count; i += width) {
        most = max(abs(load(x + i)), most);
        poison = fma(load(x + i), splat(0.0f), poison);
    }
    const float size = largest(most);
    const vf inverse = splat(levels / size);
    for (int64_t i = 0; i < count; i += width)
        store_words(reinterpret_cast<uint16_t*>(x) + i, to_int(load(x + i) * inverse));
    return sum(poison) == 0.0f ? size / levels : __builtin_nanf("");
}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
