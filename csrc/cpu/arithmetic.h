// Whole numbers: the sizes and ranges that every family cuts.
#pragma once

#include "isa.h"

namespace metate::cpu::METATE_ISA {
namespace {

METATE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
METATE_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) {
    return ceil_div(n, unit) * unit;
}
METATE_INLINE constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
METATE_INLINE constexpr int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
METATE_INLINE constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
