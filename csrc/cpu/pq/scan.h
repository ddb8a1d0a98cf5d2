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

template <int bits>
void scan_blocks(const Scan& scan, Asked asked, Span span, Best& best) {
    const float* const table = scan.table(asked.q);
    for (int64_t first = span.first; first < span.last;) {
        const int64_t begin = first % block_codes & -rows_together;  // of these rows, inside their block
        const uint8_t* const block = scan.block(first);
        float sum[rows_together];
        add_entries(sum, scan, table, [&](int i, int64_t m) { return code_in<bits>(block, begin + i, m); });
        const float limit = best.limit();
        const int64_t row = first - first % block_codes + begin, end = smaller(row + rows_together, span.last);
        for (; first < end; ++first) scan.offer(sum[first - row], first, asked, limit, best);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
