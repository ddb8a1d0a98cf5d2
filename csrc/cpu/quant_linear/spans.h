// Many rows of x times codes of 4 bits in whole numbers of one digit: the codes of some blocks are bytes in the
// first-level cache before rows of x meet them, several at a time, whose sums and what a group has gathered stay in
// registers. Segments, digits and results are integer.h's.
#pragma once

#include "tiles.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t blocks_in_bytes = span / 2;                     // at a time: more would leave the cache no room for x
constexpr int64_t lines_of_segment = 2 * longest / unit_columns;  // of a panel's codes
constexpr int64_t bytes_of_span = 2 * 4 * span * words_of_block;  // the same
constexpr int span_rows = 6;  // of x, at once: twelve chains of sums, and as many vectors of groups

#if defined(METATE_HAS_VNNI_FORMS)

// The codes of some blocks of a panel as multiply_span_tile takes them; `moves` like the scales, or null.
template <bool has_table, bool has_moves>
[[gnu::noinline]] void decode_span(int32_t* to, const PanelWords& words, const IntegerPlan* plan, int64_t blocks,
                                   const int32_t* moves, int64_t first_group, const ByteTable& table) {
    constexpr int dwords = longest / unit_columns;
    const vi mask = splat(0x0f0f0f0f), entries = table_of_bytes(table.bytes);
    const int32_t* from[] = {words.halves[0], words.halves[1]};
    for (const IntegerPlan* const end = plan + blocks; plan < end; ++plan) {
        for (int s = 0; s < plan->count; ++s) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const vi move =
                    has_moves ? load(moves + (plan->segments[s].group - first_group) * panel + v * width) : splat(0);
#pragma GCC unroll 4
                for (int i = 0; i < dwords; ++i) {
                    const vi word = load(from[v] + i * rows_of_tile);
                    vi codes[] = {bit_and(word, mask), bit_and(shift_right(word, 4), mask)};
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j) {
                        if (has_table) codes[j] = lookup_bytes(entries, codes[j]);
                        if (has_moves) codes[j] = add(codes[j], move);
                        store(to + (2 * i + j) * panel + v * width, codes[j]);
                    }
                }
                from[v] += dwords * rows_of_tile;
            }
            to += 2 * dwords * panel;
        }
    }
}

// What a register of codes of a segment is found from: bytes of decode_span, or dwords of tiles.
template <Found found>
struct SegmentCodes {
    const int32_t* from[2];
    const vi entries, mask = splat(0x0f0f0f0f);
    vi move[2] = {};

    METATE_FN SegmentCodes(const IntegerTile& t, const PanelWords& words, const ByteTable& table)
        : from{found == Found::decoded ? t.codes : words.halves[0],
               found == Found::decoded ? t.codes + width : words.halves[1]},
          entries(found == Found::bytes ? table_of_bytes(table.bytes) : splat(0)) {}
    METATE_FN void begin(const IntegerTile& t, const Segment& segment) {
        const int32_t* const moves = t.centers + (segment.group - t.first_group) * panel;
        if (found == Found::moved) move[0] = load(moves), move[1] = load(moves + width);
    }
    METATE_FN vi operator()(int quad, int v) const {
        if (found == Found::decoded) return load(from[v] + quad * panel);
        const vi word = load(from[v] + quad / 2 * rows_of_tile);
        const vi code = bit_and(quad % 2 ? shift_right(word, 4) : word, mask);
        return found == Found::bytes ? lookup_bytes(entries, code) : found == Found::moved ? add(code, move[v]) : code;
    }
    METATE_FN void end() {
        constexpr int dwords = longest / unit_columns;
        for (const int32_t*& half : from) half += found == Found::decoded ? 2 * dwords * panel : dwords * rows_of_tile;
    }
};

// Some blocks with a few rows of x, whose lines are `apart` dwords apart from one block to the next.
template <int rows, Found found, int start, bool are_groups>
[[gnu::noinline]] void multiply_span_tile(const IntegerTile& tile, const PanelWords& words, const IntegerPlan* plan,
                                          int64_t blocks, int64_t apart, const ByteTable& table, Ahead& later) {
    constexpr int quads = longest / 4, together = rows > 4 ? 1 : 2;
    // Three rows to a pointer: with the stride once and twice as index, every address is one addressing mode.
    constexpr int bases = (rows + 2) / 3;
    const IntegerTile t = tile;  // which no store to the totals can change
    const int64_t stride = t.stride;
    SegmentCodes<found> codes(t, words, table);
    Ahead ahead = later;  // in registers
    const int32_t* x[bases];
#pragma GCC unroll 4
    for (int i = 0; i < bases; ++i) {
        x[i] = t.x + 3 * i * stride;
        asm("" : "+r"(x[i]));
    }
    vf part[rows][2] = {};  // of a group, or of all where segments are groups
    if (t.begins && !are_groups) store_totals(t.total, part);
    if (!t.begins && are_groups) load_totals(part, t.total);
    for (const IntegerPlan* const end = plan + blocks; plan < end; ++plan) {
        const int32_t *digits[bases], *terms[bases];
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) {
            digits[i] = x[i];
            terms[i] = x[i] + t.terms_at;
            asm("" : "+r"(digits[i]), "+r"(terms[i]));
            x[i] += apart;
        }
        const Segment* segment = plan->segments;
        for (const Segment* const last = segment + plan->count; segment < last; ++segment) {
            codes.begin(t, *segment);
            vi sum[together][rows][2];
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                sum[0][r][0] = sum[0][r][1] = splat(terms[r / 3][r % 3 * stride + start]);
                if (together > 1) sum[together - 1][r][0] = sum[together - 1][r][1] = splat(0);
            }
#pragma GCC unroll 8
            for (int q = 0; q < quads; ++q) {
                const vi first = codes(q, 0), second = codes(q, 1);
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r) {
                    const vi a = splat(digits[r / 3][r % 3 * stride + q]);
                    vnni_add_dot(sum[q % together][r][0], first, a);
                    vnni_add_dot(sum[q % together][r][1], second, a);
                }
            }
            codes.end();
            const int64_t at = (segment->group - t.first_group) * panel;
            for (int i = 0; found != Found::decoded && i < t.fetched; ++i) ahead.fetch();
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const vf step = splat(bit_cast<float>(terms[r / 3][r % 3 * stride + step_term]));
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    const vi whole = together > 1 ? add(sum[0][r][v], sum[together - 1][r][v]) : sum[0][r][v];
                    if (!are_groups) {
                        part[r][v] = fma(to_float(whole), step, part[r][v]);
                        continue;
                    }
                    part[r][v] = fma(to_float(whole) * step, load(t.scales + at + v * width), part[r][v]);
                    if (t.corrections)
                        part[r][v] = fma(splat(bit_cast<float>(terms[r / 3][r % 3 * stride + total_term])),
                                         load(t.corrections + at + v * width), part[r][v]);
                }
            }
            if (!are_groups && segment->is_last) {
                float* total = t.total;
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r, total += panel) {
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v) {
                        vf result = fma(part[r][v], load(t.scales + at + v * width), load(total + v * width));
                        if (t.corrections)
                            result = fma(splat(bit_cast<float>(terms[r / 3][r % 3 * stride + total_term])),
                                         load(t.corrections + at + v * width), result);
                        store(total + v * width, result);
                        part[r][v] = splat(0.0f);
                    }
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < bases; ++i) digits[i] += quads, terms[i] += segment_terms;
        }
    }
    later = ahead;
    if (are_groups && !t.ends) store_totals(t.total, part);
    if (!t.ends) return;
    if (!are_groups) load_totals(part, t.total);
    add_totals(t.earlier, part);
}

// n rows of x, at most span_rows.
template <Found found, int start, int rows = span_rows>
METATE_FN void multiply_span_rows(int64_t n, const IntegerTile& tile, const PanelWords& words, const IntegerPlan* plan,
                                  int64_t blocks, int64_t apart, const ByteTable& table, Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows)
            return multiply_span_rows<found, start, rows - 1>(n, tile, words, plan, blocks, apart, table, ahead);
    }
    tile.are_groups ? multiply_span_tile<rows, found, start, true>(tile, words, plan, blocks, apart, table, ahead)
                    : multiply_span_tile<rows, found, start, false>(tile, words, plan, blocks, apart, table, ahead);
}

// The same with dwords of tiles.
inline void multiply_dwords(int64_t n, const IntegerTile& tile, const PanelWords& words, const IntegerPlan* plan,
                            int64_t blocks, int64_t apart, const ByteTable& table, Ahead& ahead) {
    const auto multiply = table.unit   ? multiply_span_rows<Found::bytes, 0>
                        : tile.centers ? multiply_span_rows<Found::moved, 1>
                                       : multiply_span_rows<Found::centered, 0>;
    multiply(n, tile, words, plan, blocks, apart, table, ahead);
}

// n rows of x; as many codes as these are fetched meanwhile.
inline void multiply_bytes(IntegerTile tile, const IntegerPlan* plan, int64_t blocks, int64_t apart, int64_t n,
                           Ahead ahead) {
    const Parts parts(n, ceil_div(n, span_rows));
    const Parts lines(blocks * (block / longest) * lines_of_segment, parts.count);
    const auto multiply = tile.start ? multiply_span_rows<Found::decoded, 1> : multiply_span_rows<Found::decoded, 0>;
    for (int64_t i = 0; i < parts.count; ++i) {
        for (int64_t line = 0; line < lines[i]; ++line) ahead.fetch();
        multiply(parts[i], tile, {}, plan, blocks, apart, {}, ahead);
        tile.x += parts[i] * tile.stride;
        tile.total += parts[i] * panel;
        tile.earlier += parts[i] * panel;
    }
}

inline void decode_span(int32_t* to, const PanelWords& words, const IntegerPlan* plan, int64_t blocks,
                        const int32_t* moves, int64_t first_group, const ByteTable& table) {
    const auto decode = table.unit ? decode_span<true, false>
                      : moves      ? decode_span<false, true>
                                   : decode_span<false, false>;
    decode(to, words, plan, blocks, moves, first_group, table);
}

#else
inline void multiply_dwords(int64_t, const IntegerTile&, const PanelWords&, const IntegerPlan*, int64_t, int64_t,
                            const ByteTable&, Ahead&) {}
inline void multiply_bytes(const IntegerTile&, const IntegerPlan*, int64_t, int64_t, int64_t, Ahead) {}
inline void decode_span(int32_t*, const PanelWords&, const IntegerPlan*, int64_t, const int32_t*, int64_t,
                        const ByteTable&) {}
#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
