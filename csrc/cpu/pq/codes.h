// Numbers in packed and in interleaved codes.
#pragma once

#include "../../pq.h"
#include "../vec.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int block_codes = 32;  // rows of an interleaved block

// Number m of a packed row. Reads no byte behind the number.
METATE_FN uint32_t code_at(const uint8_t* row, int64_t m, int64_t bits) {
    const int64_t first = m * bits, shift = first & 7;
    const uint8_t* const from = row + (first >> 3);
    uint32_t value = from[0];
    if (shift + bits > 8) value |= uint32_t{from[1]} << 8;
    if (shift + bits > 16) value |= uint32_t{from[2]} << 16;
    return value >> shift & ((1u << bits) - 1);
}

// Adds number m to a packed row that holds zeros there.
METATE_FN void put_code(uint8_t* row, int64_t m, int64_t bits, uint32_t value) {
    const int64_t first = m * bits, shift = first & 7;
    uint8_t* const to = row + (first >> 3);
    value <<= shift;
    to[0] = static_cast<uint8_t>(to[0] | value);
    if (shift + bits > 8) to[1] = static_cast<uint8_t>(to[1] | value >> 8);
    if (shift + bits > 16) to[2] = static_cast<uint8_t>(to[2] | value >> 16);
}

// Calls run<bits>() with the bits known to the compiler where they are common, else with 0.
template <class Run>
METATE_FN void with_bits(int64_t bits, const Run& run) {
    if (bits == 8) return run.template operator()<8>();
    if (bits == 4) return run.template operator()<4>();
    run.template operator()<0>();
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
