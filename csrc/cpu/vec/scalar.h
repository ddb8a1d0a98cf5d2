// 16-bit floats one at a time.
#pragma once

#include "../isa.h"

namespace metate::cpu::METATE_ISA {
namespace {

#define METATE_FN METATE_INLINE

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Scalar conversions.

template <class To, class From>
METATE_FN To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

METATE_FN float to_float(float x) {
    return x;
}
METATE_FN float to_float(bf16 x) {
    return bit_cast<float>(uint32_t{x.bits} << 16);
}
METATE_FN float to_float(f16 x) {
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
    const float tiny = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -tiny : tiny;
}

template <class T>
T from_float(float x);
template <>
METATE_FN float from_float<float>(float x) {
    return x;
}
template <>
METATE_FN bf16 from_float<bf16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
METATE_FN f16 from_float<f16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 31 << 15, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (rest >= 0x38800000u)
        return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13)};
    // Below the normal range the addition itself rounds: 0.5 has the smallest f16 step as its last bit.
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u))};
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
