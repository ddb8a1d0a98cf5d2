// What every scan of codes does: exact sums of table entries, in order, and the offer of a row.
#pragma once

#include "codes.h"
#include "search.h"

namespace metate::cpu::METATE_ISA {
namespace {

struct Scan {
    const PqScan& call;
    int64_t M, L;

    explicit Scan(const PqScan& c) : call(c), M(c.tables.size[1]), L(c.tables.size[2]) {}

    METATE_FN const float* table(int64_t q) const { return static_cast<const float*>(call.tables.data) + q * M * L; }
    METATE_FN const uint8_t* packed(int64_t row) const {
        return static_cast<const uint8_t*>(call.packed.data) + row * call.packed.stride[0];
    }
    METATE_FN const uint8_t* block(int64_t row) const {
        return static_cast<const uint8_t*>(call.blocks.data) + row / block_codes * M * call.blocks.size[2];
    }
    METATE_FN float bias(Asked asked) const {
        return static_cast<const float*>(call.bias.data)[asked.q * call.bias.stride[0] + asked.p * call.bias.stride[1]];
    }
    // The distance of a row whose table entries add up to `sum`.
    METATE_FN float finish(float sum, int64_t row, Asked asked) const {
        if (call.row_bias) sum += static_cast<const float*>(call.row_bias.data)[row];
        return call.bias ? sum + bias(asked) : sum;
    }
    METATE_FN void offer(float sum, int64_t row, Asked asked, float limit, Best& best) const {
        const float key = key_of(call.search, finish(sum, row, asked));
        if (key <= limit && kept(call.search, row)) best.offer({key, id_of(call.search, row)});
    }
};

constexpr int rows_together = 8;  // chains of additions that hide each other's latency

// Sums of `count` <= rows_together rows; code(i, m) is number m of row i, and any number for a row that is not there.
template <class Code>
METATE_FN void add_entries(float (&sum)[rows_together], const Scan& scan, const float* table, const Code& code) {
#pragma GCC unroll 8
    for (int i = 0; i < rows_together; ++i) sum[i] = 0.0f;
    for (int64_t m = 0; m < scan.M; ++m, table += scan.L)
#pragma GCC unroll 8
        for (int i = 0; i < rows_together; ++i) sum[i] += table[code(i, m)];
}

// Number m of row i of a block.
template <int bits>
METATE_FN uint32_t code_in(const uint8_t* block, int64_t i, int64_t m) {
    if (bits == 8) return block[m * block_codes + i];
    const uint32_t both = block[m * (block_codes / 2) + (i & 15)];
    return i < 16 ? both & 15 : both >> 4;
}

// Bit i: row i of the block is first … last.
METATE_FN uint32_t inside(int64_t block, int64_t first, int64_t last) {
    uint32_t rows = ~0u;
    if (first > block) rows &= ~0u << (first - block);
    if (last < block + block_codes) rows &= ~(~0u << (last - block));
    return rows;
}

constexpr int block_vectors = block_codes / width;

// The sums of all rows of a block: tables of 16 entries are looked up in registers.
template <int bits>
METATE_FN void add_block(vf (&sum)[block_vectors], const Scan& scan, const float* table, const uint8_t* block) {
    if constexpr (bits == 4) {
        constexpr int half = block_vectors / 2;
#pragma GCC unroll 8
        for (int i = 0; i < block_vectors; ++i) sum[i] = splat(0.0f);
        for (int64_t m = 0; m < scan.M; ++m, table += 16, block += block_codes / 2) {
            const Table16 entries = table16(table);
#pragma GCC unroll 4
            for (int i = 0; i < half; ++i) {
                const vi codes = load_wide(block + i * width, width);
                sum[i] = sum[i] + lookup(entries, codes);
                sum[i + half] = sum[i + half] + lookup(entries, shift_right(codes, 4));
            }
        }
    } else {
        float sums[block_codes];
        for (int row = 0; row < block_codes; row += rows_together) {
            float some[rows_together];
            add_entries(some, scan, table, [&](int i, int64_t m) { return code_in<bits>(block, row + i, m); });
            for (int i = 0; i < rows_together; ++i) sums[row + i] = some[i];
        }
        for (int i = 0; i < block_vectors; ++i) sum[i] = load(sums + i * width);
    }
}

// The keys of all rows of the block that begins with `row`.
template <int bits>
METATE_FN void keys_of_block(float* keys, const Scan& scan, Asked asked, int64_t row) {
    const float* const row_bias = static_cast<const float*>(scan.call.row_bias.data);
    const vf sign = splat(scan.call.search.largest ? -1.0f : 1.0f);
    vf sum[block_vectors];
    add_block<bits>(sum, scan, scan.table(asked.q), scan.block(row));
    for (int i = 0; i < block_vectors; ++i) {
        const int64_t first = row + i * width, left = scan.call.search.n - first;
        if (row_bias && left > 0)
            sum[i] = sum[i] + (left < width ? load(row_bias + first, left) : load(row_bias + first));
        if (scan.call.bias) sum[i] = sum[i] + splat(scan.bias(asked));
        store(keys + i * width, sum[i] * sign);
    }
}

// Offers those of a block that `wanted` has a bit for and whose keys do not exceed the bound.
METATE_FN void offer_keys(const Scan& scan, int64_t row, uint32_t wanted, const float* keys, float bound, Best& best) {
    uint32_t near = 0;
    for (int i = 0; i < block_vectors; ++i)
        near |= static_cast<uint32_t>(bits_of(not_less(splat(bound), load(keys + i * width)))) << i * width;
    for (near &= wanted; near; near &= near - 1) {
        const int at = __builtin_ctz(near);
        if (keys[at] <= best.limit() && kept(scan.call.search, row + at))
            best.offer({keys[at], id_of(scan.call.search, row + at)});
    }
}

template <int bits>
void offer_block(const Scan& scan, Asked asked, int64_t row, uint32_t wanted, Best& best) {
    float keys[block_codes];
    keys_of_block<bits>(keys, scan, asked, row);
    offer_keys(scan, row, wanted, keys, best.limit(), best);
}

template <int bits>
void scan_blocks(const Scan& scan, Asked asked, Span span, Best& best) {
    for (int64_t row = span.first / block_codes * block_codes; row < span.last; row += block_codes)
        offer_block<bits>(scan, asked, row, inside(row, span.first, span.last), best);
}

constexpr int64_t first_rows = 512;

// The same for the first rows of a query, at most first_rows, whose keys are finite: few of them are offered.
template <int bits>
void scan_first(const Scan& scan, Asked asked, Span span, Best& best) {
    const Search& s = scan.call.search;
    const int64_t begin = span.first / block_codes * block_codes, count = round_up(span.last - begin, block_codes);
    float keys[first_rows];
    for (int64_t i = 0; i < count; i += block_codes) keys_of_block<bits>(keys + i, scan, asked, begin + i);
    for (int64_t i = 0; i < span.first - begin; ++i) keys[i] = infinity;
    for (int64_t i = span.last - begin; i < count; ++i) keys[i] = infinity;
    float bound = best.limit();
    if (worth_bound(s, keys, count, bound)) {
        const float kth = kth_key(keys, count, s.k);
        bound = kth < bound ? kth : bound;
    }
    for (int64_t i = 0; i < count; i += block_codes)
        offer_keys(scan, begin + i, inside(begin + i, span.first, span.last), keys + i, bound, best);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
