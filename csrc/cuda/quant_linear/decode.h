// A low-bit matrix on the device: scales of a row's groups, and codes of shared memory turned into 16-bit weights.
// Whatever its format, a weight is computed in float32 and rounded once.
#pragma once

#include <math.h>

#include "../../quant_linear.h"
#include "../arch/arch.h"

namespace metate::cuda::lowbit {

using namespace arch;

// A matrix whose numbers fit in 32 bits; groups longer than a row are cut to the row.
struct Weight {
    LowBitMatrix m;
    int rows, columns, bits, group_size, groups, super_groups, row_bytes;
    float zero;
    bool vectors;  // rows of codes can be read 16 bytes at a time
};

METATE_DEVICE int least(int a, int b) {
    return a < b ? a : b;
}
METATE_DEVICE int most(int a, int b) {
    return a > b ? a : b;
}

// Numbers of n rows as they lie in memory; made floats where they are used, so that loads do not wait for one another.
template <typename T, int n>
METATE_DEVICE void load_words(uint32_t (&raw)[n], const View<2>& view, int row, int last, int column) {
    METATE_UNROLL
    for (int i = 0; i < n; ++i) {
        const int64_t at = least(row + i, last) * view.stride[0] + column * view.stride[1];
        raw[i] = load_global<T>(static_cast<const T*>(view.data) + at);
    }
}

template <int n>
METATE_DEVICE void load_raw(uint32_t (&raw)[n], const View<2>& view, int row, int last, int column) {
    switch (bytes_of(view.dtype)) {
        case 4:
            return load_words<uint32_t>(raw, view, row, last, column);
        case 2:
            return load_words<uint16_t>(raw, view, row, last, column);
        default:
            return load_words<uint8_t>(raw, view, row, last, column);
    }
}

template <int n, typename Make>
METATE_DEVICE void make_each(float (&values)[n], const uint32_t (&raw)[n], const Make& make) {
    METATE_UNROLL
    for (int i = 0; i < n; ++i) values[i] = make(raw[i]);
}

template <int n>
METATE_DEVICE void values_of(float (&values)[n], const uint32_t (&raw)[n], DType dtype) {
    switch (dtype) {
        case DType::bf16:
            return make_each(values, raw, [](uint32_t x) { return to_float(bf16{static_cast<uint16_t>(x)}); });
        case DType::f16:
            return make_each(values, raw, [](uint32_t x) { return to_float(f16{static_cast<uint16_t>(x)}); });
        case DType::i8:
            return make_each(values, raw, [](uint32_t x) { return static_cast<float>(static_cast<int8_t>(x)); });
        default:
            return make_each(values, raw, [](uint32_t x) { return float_of(x); });
    }
}

// What makes weights of a group's values in n rows: (value - zero) · scale + offset.
template <int n>
struct Levels {
    float scale[n], offset[n], zero[n];
};

template <int n>
struct RawLevels {
    uint32_t scale[n], super_scale[n], zeros[n], offset[n], super_offset[n];
};

// A row or a group outside the matrix stands for the nearest inside: what it gives must be finite, nobody uses it.
template <int n>
METATE_DEVICE void load_levels(RawLevels<n>& raw, const Weight& w, int row, int group) {
    const int last = w.rows - 1;
    group = least(group, w.groups - 1);
    load_raw(raw.scale, w.m.scales, row, last, group);
    if (w.m.zeros) load_raw(raw.zeros, w.m.zeros, row, last, group);
    if (w.m.offsets) load_raw(raw.offset, w.m.offsets, row, last, group);
    if (w.m.super_scales || w.m.super_offsets) {
        const int super_group = group / w.super_groups;
        if (w.m.super_scales) load_raw(raw.super_scale, w.m.super_scales, row, last, super_group);
        if (w.m.super_offsets) load_raw(raw.super_offset, w.m.super_offsets, row, last, super_group);
    }
}

template <int n>
METATE_DEVICE void scale_by(float (&values)[n], const View<2>& coarse, const uint32_t (&raw)[n]) {
    if (!coarse) return;
    float factors[n];
    values_of(factors, raw, coarse.dtype);
    METATE_UNROLL
    for (int i = 0; i < n; ++i) values[i] *= factors[i];
}

template <int n>
METATE_DEVICE void make_levels(Levels<n>& levels, const Weight& w, const RawLevels<n>& raw) {
    values_of(levels.scale, raw.scale, w.m.scales.dtype);
    scale_by(levels.scale, w.m.super_scales, raw.super_scale);
    METATE_UNROLL
    for (int i = 0; i < n; ++i) {
        levels.offset[i] = 0.f;
        levels.zero[i] = w.m.zeros ? w.zero + static_cast<float>(raw.zeros[i]) : w.zero;
    }
    if (!w.m.offsets) return;
    values_of(levels.offset, raw.offset, w.m.offsets.dtype);
    scale_by(levels.offset, w.m.super_offsets, raw.super_offset);
}

// Eight weights of 4 bits as four packed pairs. A code put into the last bits of 2^23 is 2^23 + code; 4 bits higher it
// counts 16-fold, which the scale takes back, so a pair costs one shift.
template <typename T>
METATE_DEVICE void decode_nibbles(uint32_t (&pairs)[4], uint32_t word, float scale, float offset, float zero) {
    constexpr uint32_t magic = 0x4b000000u;
    const float even_zero = 8388608.f + zero, odd_zero = 8388608.f + 16.f * zero, odd_scale = scale * 0.0625f;
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t byte = word >> (8 * i);
        const float even = float_of((byte & 0xfu) | magic) - even_zero;
        const float odd = float_of((byte & 0xf0u) | magic) - odd_zero;
        pairs[i] = pack<T>(fmaf(even, scale, offset), fmaf(odd, odd_scale, offset));
    }
}

// The same with the 16 values of a codebook in shared memory: they lie in 16 banks, so a lookup has no conflicts.
template <typename T>
METATE_DEVICE void look_up_nibbles(uint32_t (&pairs)[4], uint32_t word, float scale, float offset,
                                   const unsigned char* table) {
    METATE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t byte = word >> (8 * i);
        const float even = load_shared<float>(table + (i == 0 ? (word << 2) & 0x3cu : (word >> (8 * i - 2)) & 0x3cu));
        const float odd = load_shared<float>(table + (byte >> 2 & 0x3cu));
        pairs[i] = pack<T>(fmaf(even, scale, offset), fmaf(odd, scale, offset));
    }
}

// Eight codes of any width, which fill `bits` bytes of shared memory.
METATE_DEVICE uint64_t load_codes(const unsigned char* from, int bits) {
    if (bits == 4) return load_shared<uint32_t>(from);
    if (bits == 8) return load_shared<uint64_t>(from);
    uint64_t codes = 0;
    METATE_NO_UNROLL
    for (int i = 0; i < bits; ++i) codes |= static_cast<uint64_t>(load_shared<uint8_t>(from + i)) << (8 * i);
    return codes;
}

// Calls put(e, value, level) for eight neighbouring columns from `column` on, a multiple of 8: for e = 0 and 1 by
// turns.
template <typename Put>
METATE_DEVICE void decode_each(const Weight& w, uint64_t codes, int row, int column, const unsigned char* table,
                               const Put& put) {
    const uint32_t mask = (1u << w.bits) - 1;
    const bool one_group = w.group_size % 8 == 0;
    int group = column / w.group_size, left = (group + 1) * w.group_size - column;
    Levels<1> level;
    const auto enter = [&](int g) {
        RawLevels<1> raw{};
        load_levels(raw, w, row, g);
        make_levels(level, w, raw);
    };
    enter(group);
    METATE_NO_UNROLL
    for (int i = 0; i < 8; i += 2) {
        METATE_UNROLL
        for (int e = 0; e < 2; ++e, --left, codes >>= w.bits) {
            if (!one_group && left == 0) {
                enter(++group);
                left = w.group_size;
            }
            const uint32_t code = static_cast<uint32_t>(codes) & mask;
            put(e, w.m.codebook ? load_shared<float>(table + code * 4) : static_cast<float>(code) - level.zero[0],
                level);
        }
    }
}

// Weights of eight neighbouring columns from `column` on, a multiple of 8.
template <typename T>
METATE_DEVICE Words<4> decode_any(const Weight& w, uint64_t codes, int row, int column, const unsigned char* table) {
    Words<4> pairs{};
    float weight[2];
    decode_each(w, codes, row, column, table, [&](int e, float value, const Levels<1>& level) {
        weight[e] = fmaf(value, level.scale[0], level.offset[0]);
        // An index known only at run time would put the words into local memory: shift them through.
        if (e == 1) pairs = {{pairs[1], pairs[2], pairs[3], pack<T>(weight[0], weight[1])}};
    });
    return pairs;
}

}  // namespace metate::cuda::lowbit
