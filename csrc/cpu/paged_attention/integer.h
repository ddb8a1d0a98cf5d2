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

// Turns `rows` rows of `count` numbers, a multiple of width, into words in their place. Of each row, one times its step
// goes to `steps`: NaN, and so are all products, where a number is not finite.
template <class S>
void to_whole(float* x, int64_t stride, int64_t rows, int64_t count, float* steps);

#if defined(METATE_HAS_VNNI_FORMS)
constexpr float levels = 28672;  // with codes up to 128, sums over max_key_dim numbers fit 32 bits
static_assert(128 * 28672ll * max_key_dim < INT32_MAX);
constexpr float least_magnitude = 0x1p-110f;  // of a row: the inverse of its step is finite

template <class S>
void to_whole(float* x, int64_t stride, int64_t rows, int64_t count, float* steps) {
    for (; rows > 0; rows -= width, x += width * stride, steps += width) {
        const int64_t n = smaller(rows, width);
        vf most[width], poison[width];
        for (int64_t r = 0; r < width; ++r) {
            most[r] = splat(least_magnitude);
            poison[r] = splat(0.0f);
            for (int64_t i = 0; r < n && i < count; i += width) {
                const vf y = load(x + r * stride + i);
                most[r] = max(abs(y), most[r]);
                poison[r] = fma(y, splat(0.0f), poison[r]);
            }
        }
        const vf size = largest_of_rows(most);
        const vm finite = equal(sum_rows(poison), splat(0.0f));
        store(steps, select(finite, size / splat(levels), splat(__builtin_nanf(""))), n);
        float inverse[width];
        store(inverse, splat(levels) / size);
        for (int64_t r = 0; r < n; ++r) {
            float* const row = x + r * stride;
            for (int64_t i = 0; i < count; i += width)
                store_words(reinterpret_cast<uint16_t*>(row) + i, to_int(load(row + i) * splat(inverse[r])));
        }
    }
}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
