// One product of x with low-bit weights: how it is cut and planned, what workers hold, and the scales of a panel.
#pragma once

#include "spans.h"
#include "whole_pairs.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t many_rows = 24;    // of x, that are multiplied with whole spans, whose totals stay in registers
constexpr int64_t small_group = 16;  // below, weights are scaled instead of sums: many short sums round more often
constexpr int64_t operations_to_pack = 6;  // a number of x
static_assert(blocks_at_once >= span * few_rows);

constexpr int64_t most_panels = 4;  // of a piece; of many rows of floats 2, or totals push x out of the second cache

// How the result is cut: pieces of `panels` panels of W's rows.
struct Cut {
    int64_t panels, pieces;
};

inline Cut cut_of(int64_t rows, int64_t n, bool in_bytes) {
    const int64_t all = ceil_div(n, panel), spread = ceil_div(all, 32);
    const int64_t most = rows >= 64 && !in_bytes ? 2 : most_panels;
    const int64_t panels = smaller(most, spread > 1 ? spread : 1);
    return {panels, ceil_div(all, panels)};
}

// Of x, up to which codes are looked up again for every few rows: decoded once, they would leave the first-level cache.
METATE_FN constexpr int64_t most_rows_in_tiles(bool pairs, int digits) {
    return (pairs ? 16 : digits == 1 ? 5 : digits == 0 && width == 16 ? 4 : 1) * most_tiled_rows;
}

// What a worker needs for one piece.
struct Workspace {
    int32_t* words;
    float* values;
    float *totals, *earlier;      // of the present span of blocks, and of those before it
    float *scales, *corrections;  // of `window` groups for each panel
    int32_t *codes, *centers;     // of products in whole numbers, like the values and the scales
    bool* have_moves;             // of each panel's window: its centers are moves
    int64_t* first_group;         // the same, -1: nothing loaded
    int32_t* quarter_sums;        // where codes are read row by row: of products in whole numbers,
    float* chunk_sums;            // and in floats
    float* turn_sums;             // of one row of x: of two strips
    int32_t* room;                // where codes become tiles, for a span of both halves of a panel
};

#if defined(METATE_HAS_BF16_DOT)
// Whether bfloat16 is multiplied in pairs. Entries of codebooks are rounded to it then: less than results are.
inline bool takes_pairs(const QuantLinear& c, const Values& values) {
    const int64_t group = c.w.group_size;
    if (c.x.dtype != DType::bf16 || c.w.bits != 4) return false;
    if (group % longest != 0 && (group < c.w.columns || group < small_group)) return false;
    bool is_exact = true;
    for (int i = 0; i < 16; ++i) is_exact &= to_float(from_float<bf16>(values.entries[i])) == values.entries[i];
    const bool in_integers = arithmetic_of(c, values, small_group).digits > 0;
    if (c.int8_activations) return !in_integers && c.w.codebook;
    return is_exact || c.w.codebook;
}
#else
inline bool takes_pairs(const QuantLinear&, const Values&) {
    return false;
}
#endif

// No group is longer than a row: of few columns, weights are scaled and not sums, whatever group they are part of.
inline QuantLinear with_groups_in_rows(QuantLinear call) {
    call.w.group_size = smaller(call.w.group_size, larger(call.w.columns, 1));
    return call;
}

struct Problem {
    QuantLinear call;
    Values values;
    bool pairs;
    Arithmetic arithmetic;
    bool whole_pairs;  // of x and W, in the place of digits
    PackedRows x;
    IntegerRows integers;
    SpreadRows spread;   // where codes are read row by row: of products in whole numbers,
    LaneRows lane_rows;  // and in floats
    Cut cut;
    BlockPlan* plans;
    IntegerPlan* integer_plans;
    int64_t blocks, blocks_together, window;
    int64_t most_groups;   // of the windows of a worker, which may take calls of fewer rows
    int64_t rows_at_once;  // of x, for which W is decoded once: their blocks and totals share the second-level cache
    UnitTerms* units;
    bool sums_scaled, can_dot, can_sum;
    bool can_tile, takes_tiles;   // few rows
    bool can_span, takes_spans;   // many rows of whole numbers of one digit
    bool dots_rows, sums_chunks;  // by rows of codes: in whole numbers, in floats
    bool can_turn, takes_turns;   // one row of x

    explicit Problem(const QuantLinear& given)
        : call(with_groups_in_rows(given)),
          values(values_of(call.w)),
          pairs(takes_pairs(call, values)),
          arithmetic(pairs ? Arithmetic{} : arithmetic_of(call, values, small_group)),
          whole_pairs(call.x.size[0] >= many_rows && can_take_whole_pairs(call.w, arithmetic)),
          cut(cut_of(call.x.size[0], call.w.rows, arithmetic.digits == 1)),
          plans(nullptr),
          integer_plans(nullptr),
          blocks(ceil_div(call.w.columns, block)),
          can_dot(!call.w.in_tiles() && can_dot_rows(call.w, arithmetic)),
          can_sum(!call.w.in_tiles() && width < 16 && !arithmetic.digits && can_sum_chunks(call.w)),
          can_tile(can_take_tiles(call.w, arithmetic)),
          takes_tiles(can_tile && call.x.size[0] >= (can_dot ? 2 : 1) &&
                      call.x.size[0] <= most_rows_in_tiles(pairs, arithmetic.digits)),
          can_span(can_tile && arithmetic.digits == 1),
          takes_spans(can_span && !takes_tiles && call.x.size[0] > few_rows),
          dots_rows(can_dot && !takes_tiles && call.x.size[0] <= few_rows),
          sums_chunks(can_sum && call.x.size[0] <= few_rows) {
        const int64_t groups_of_block = smaller(block, (block - 2) / call.w.group_size + 2);
        const bool are_many = call.x.size[0] >= many_rows && !in_digits() && call.w.group_size >= small_group;
        blocks_together = are_many ? span : can_span ? blocks_in_bytes : 1;
        rows_at_once = in_digits() ? 256 : 512;
        const int64_t run = span * block, group = call.w.group_size;
        const int64_t groups_of_span = run % group ? (run - 2) / group + 2 : run / group;
        window = round_up(are_many || takes_tiles || can_span ? groups_of_span : groups_of_block, width);
        most_groups = larger(most_panels * window, can_tile ? round_up(groups_of_span, width) : 0);
        units = nullptr;
        can_turn = (can_dot || can_sum) && !pairs && can_take_turns(call.w, arithmetic);
        takes_turns = can_turn && call.x.size[0] == 1;
        sums_scaled = call.w.group_size >= small_group;
        x = {nullptr, nullptr, call.x.size[0], blocks, groups_of_block + block / longest};
        const int64_t unit = unit_of(call.w.bits),
                      shared = call.w.group_size % unit ? 2 * (unit - 1) * x.most_chunks : unit;
        const int64_t most_quads = ceil_div(block + shared + 16, 4);
        integers = {nullptr, call.x.size[0], most_quads, x.most_chunks, arithmetic.digits};
        spread = {nullptr, nullptr, nullptr, call.x.size[0], x.most_chunks, arithmetic.digits};
        x.unit = pairs ? Unit::pairs : whole_pairs ? Unit::whole_pairs : Unit::floats;
        if (arithmetic.digits == 3) x.most_columns = block;
        if (whole_pairs) values = whole_values(call.w, values, arithmetic.table);
        if (pairs && are_whole_chunks(call.w, longest_pairs)) x.most_columns = longest_pairs;
        lane_rows = {nullptr, call.x.size[0]};
    }
    bool in_digits() const { return arithmetic.digits && !whole_pairs; }
    float center() const { return arithmetic.table.unit ? 128.0f : values.center; }
    int segments_of(int64_t k) const { return arithmetic.digits ? integer_plans[k].count : plans[k].count; }
    int64_t group_of(int64_t k, int c) const {
        return arithmetic.digits ? integer_plans[k].segments[c].group : plans[k].chunks[c].group;
    }
    // What sums of segments are multiplied by.
    const int32_t* terms_of(int64_t k) const { return integers.line(k, 0) + integers.terms_at(); }
    // What corrections are multiplied by.
    float x_sum_of(int64_t k, int c) const {
        return arithmetic.digits ? bit_cast<float>(terms_of(k)[segment_terms * c + total_term]) : x.sums_of(k, 0)[c];
    }
    bool is_corrected_by(int64_t k, int c) const { return arithmetic.digits || plans[k].chunks[c].is_last; }
    bool is_corrected() const {
        return arithmetic.digits ? static_cast<bool>(call.w.offsets) : has_corrections(call.w);
    }
    // Enough for calls with fewer rows of x too.
    Workspace workspace(Arena& arena) const {
        Workspace at{};
        at.words = arena.take<int32_t>(2 * most_words);
        at.values = in_digits() ? nullptr : arena.take<float>(blocks_together * x.words() * panel);
        at.codes = arithmetic.digits ? arena.take<int32_t>(blocks_in_bytes * block / 4 * panel) : nullptr;
        at.totals = arena.take<float>(most_panels * smaller(rows_at_once, x.rows) * panel);
        at.earlier = arena.take<float>(most_panels * smaller(rows_at_once, x.rows) * panel);
        at.scales = arena.take<float>(most_groups * panel);
        at.corrections = is_corrected() ? arena.take<float>(most_groups * panel) : nullptr;
        at.centers = arithmetic.digits && has_own_centers(call.w) ? arena.take<int32_t>(most_groups * panel) : nullptr;
        at.have_moves = arena.take<bool>(most_panels);
        at.first_group = arena.take<int64_t>(most_panels);
        at.room = can_tile ? arena.take<int32_t>(2 * span * words_of_block) : nullptr;
        at.turn_sums = can_turn ? arena.take<float>(2 * turn_sums) : nullptr;
        at.quarter_sums = can_dot ? arena.take<int32_t>(most_quarter_sums) : nullptr;
        at.chunk_sums = can_sum ? arena.take<float>(most_chunk_sums) : nullptr;
        return at;
    }
};

inline void plan_blocks(const Problem& p, Chunk* chunks, Segment* segments) {
    const LowBitMatrix& w = p.call.w;
    for (int64_t k = 0; k < p.blocks; ++k, chunks += p.x.most_chunks) {
        if (p.arithmetic.digits) {
            Segment* const own = segments + k * p.x.most_chunks;
            p.integer_plans[k] = {own, segments_of(own, w, k, p.call.int8_activations)};
        }
        const int count = chunks_of(chunks, w.columns, p.sums_scaled ? w.group_size : w.columns, k, p.x.most_columns);
        const int64_t last = smaller((k + 1) * block, w.columns) - 1;
        p.plans[k] = {chunks, count, k * block / w.group_size, last / w.group_size};
    }
}

// The scales of a panel, or of one of its halves, for blocks from number k on.
inline void load_window(const Problem& p, const Workspace& at, int64_t panel_number, int64_t row, int64_t k,
                        int64_t end, int halves) {
    const LowBitMatrix& w = p.call.w;
    const int64_t first = p.plans[k].first_group, last = p.plans[end - 1].last_group;
    int64_t& loaded = at.first_group[panel_number];
    if (loaded >= 0 && first >= loaded && last < loaded + p.window) return;
    loaded = first;
    const int64_t groups = smaller(p.window, w.scales.size[1] - first), offset = panel_number * p.window * panel;
    for (int v = 0; v < 2 && row + v * width < w.rows; ++v) {
        if (!(halves >> v & 1)) continue;
        float* const corrections = at.corrections ? at.corrections + offset + v * width : nullptr;
        load_scales(at.scales + offset + v * width, corrections, !p.sums_scaled && has_own_centers(w), panel, w,
                    p.values.center, row + v * width, first, groups);
        if (at.centers && !p.takes_turns)
            load_centers(at.centers + offset + v * width, panel, w, row + v * width, first, groups);
    }
    // One or two rows multiply their starts by centers in less time than codes move.
    at.have_moves[panel_number] = at.centers && p.can_span && p.x.rows > 2 && (p.takes_tiles || p.takes_spans) &&
                                  to_moves(at.centers + offset, groups, row + width < w.rows ? halves : 1, w.bits);
    if (halves == 3) fetch_levels(w, row + panel, first);  // after the loads, which would wait for it
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
