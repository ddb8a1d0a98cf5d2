// What moves single bytes through whole vectors, for kernels that ask isa() for avx512vbmi before they use it.
#pragma once

#include "../vec.h"

#if defined(METATE_HAS_WORD_SHUFFLES)
#define METATE_HAS_VBMI_FORMS 1

namespace metate::cpu::METATE_ISA {
namespace {

// The floats that 64 bytes name, in their order, of 256 that are cut into four tables of bytes, the lowest first.
METATE_FN void vbmi_lookup_floats(vf (&to)[4], const Table256 (&planes)[4], vi index) {
    const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    index = _mm512_permutexvar_epi32(order, index);
    vi bytes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bytes[i] = vbmi_lookup_bytes(planes[i], index);
    const vi low[] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpacklo_epi8(bytes[2], bytes[3])};
    const vi high[] = {_mm512_unpackhi_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
    to[0] = as_float(_mm512_unpacklo_epi16(low[0], low[1]));
    to[1] = as_float(_mm512_unpackhi_epi16(low[0], low[1]));
    to[2] = as_float(_mm512_unpacklo_epi16(high[0], high[1]));
    to[3] = as_float(_mm512_unpackhi_epi16(high[0], high[1]));
}

// Byte i of the result is byte from[i] of x.
METATE_FN vi vbmi_move_bytes(vi x, vi from) {
    vi to;
    __asm__("vpermb %2, %1, %0" : "=v"(to) : "v"(from), "v"(x));
    return to;
}
// Byte i of the result begins with bit from[i] of the eight bytes of x that it belongs to.
METATE_FN vi vbmi_move_bits(vi x, vi from) {
    vi to;
    __asm__("vpmultishiftqb %2, %1, %0" : "=v"(to) : "v"(from), "v"(x));
    return to;
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
#endif
