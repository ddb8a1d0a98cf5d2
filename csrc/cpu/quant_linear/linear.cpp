// x Wᵀ + bias with W decoded panel by panel into the first-level cache.
#include "../strided.h"
#include "exact.h"
#include "low_rank.h"
#include "panels.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Without what changes from block to block.
IntegerTile integer_tile(const Problem& p, const Workspace& at, int64_t panel_number, const Tile& tile) {
    const IntegerRows& x = p.integers;
    return {nullptr,
            x.stride(),
            x.sums_at(),
            x.terms_at(),
            x.used_at(),
            0,
            at.codes,
            nullptr,
            0,
            at.centers ? at.centers + panel_number * p.window * panel : nullptr,
            false,
            tile.scales,
            tile.corrections,
            tile.first_group,
            p.arithmetic.radix,
            tile.total,
            tile.earlier,
            tile.begins,
            tile.ends,
            p.call.w.group_size <= longest && longest % p.call.w.group_size == 0,
            0,
            nullptr,
            0};
}

void enter_block(IntegerTile& tile, const Problem& p, int64_t k, int64_t x_row, int64_t first_group) {
    tile.x = p.integers.line(k, x_row);
    tile.segments = p.integer_plans[k].segments;
    tile.count = p.integer_plans[k].count;
    tile.first_group = first_group;
}

void multiply_codes(const Problem& p, const Workspace& at, int64_t panel_number, int64_t row, int64_t k, int64_t x_row,
                    int64_t rows, const Tile& tile) {
    IntegerTile integers = integer_tile(p, at, panel_number, tile);
    enter_block(integers, p, k, x_row, tile.first_group);
    const int64_t columns = smaller(block, p.call.w.columns - k * block);
    const bool in_words = rows <= word_rows && p.call.w.bits == 4 && p.arithmetic.sums == Sums::words;
    const int64_t stride = p.call.w.row_bytes(), ahead = bytes_ahead(p.call.w, k);
    for (int v = 0; v < 2 && row + v * width < p.call.w.rows; ++v) {
        int32_t* const words = at.words + v * most_words;
        transpose_words(words, p.call.w, row + v * width, k, in_words ? 0 : ahead);
        if (!in_words) decode_bytes(at.codes + v * width, words, columns, p.call.w.bits);
        if (p.arithmetic.table.unit) find_bytes(at.codes + v * width, columns, p.arithmetic.table);
    }
    if (integers.centers && p.arithmetic.digits == 1 && p.arithmetic.sums == Sums::dots &&
        join_centers(at.codes, p.integer_plans[k], integers.centers, tile.first_group, p.call.w.bits,
                     smaller(panel, p.call.w.rows - row))) {
        integers.centers = nullptr;
        integers.start = 1;
    }
    if (in_words) {
        integers.codes = at.words;
        integers.ahead = codes_at(p.call.w, row, k) + ahead;
        integers.row_bytes = stride;
    }
    multiply_integers(p.arithmetic, integers, rows, in_words);
}

// The blocks of a tile from number k on; `next` are the codes to be read after theirs.
void multiply_panel(const Problem& p, const Workspace& at, int64_t panel_number, const Tile& tile, int64_t row,
                    int64_t k, int64_t x_row, int64_t rows, const uint8_t* next) {
    if (p.in_digits()) return multiply_codes(p, at, panel_number, row, k, x_row, rows, tile);
    const int64_t beside = p.call.w.in_tiles() ? rows_of_tile : 1, bytes = tile.blocks * block / 8 * p.call.w.bits;
    const Ahead ahead(next, bytes * beside, p.call.w.row_bytes() * beside);
    const int64_t lines = panel / beside * ahead.lines;
    for (int64_t i = 0; i < tile.blocks; ++i)
        decode_panel(p, at, panel_number, row, k + i, at.values + i * p.x.words() * panel);
#if defined(METATE_HAS_BF16_DOT)
    if (p.pairs) return multiply<Unit::pairs, true>(p.x, k, x_row, rows, tile, ahead, lines);
#endif
#if defined(METATE_HAS_VNNI_FORMS)
    if (p.whole_pairs) return multiply<Unit::whole_pairs, true>(p.x, k, x_row, rows, tile, ahead, lines);
#endif
    p.sums_scaled ? multiply<Unit::floats, true>(p.x, k, x_row, rows, tile, ahead, lines)
                  : multiply<Unit::floats, false>(p.x, k, x_row, rows, tile, ahead, lines);
}

void clear(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += width) store(to + i, splat(0.0f));
}
void clear(const Workspace& at, int64_t n) {
    clear(at.totals, n);
    clear(at.earlier, n);
}

// Moves n totals of a span to the earlier ones.
void end_span(float* earlier, float* totals, int64_t n) {
    for (int64_t i = 0; i < n; i += width) store(earlier + i, load(earlier + i) + load(totals + i));
    clear(totals, n);
}
void end_span(const Workspace& at, int64_t n) {
    end_span(at.earlier, at.totals, n);
}

// The earlier totals of `rows` rows of x with `count` panels become results.
template <class T>
void finish(const Problem& p, const Workspace& at, int64_t first, int64_t count, int64_t x_row, int64_t rows) {
    for (int64_t i = 0; i < count; ++i) {
        float* const totals = at.earlier + i * rows * panel;
        add_low_rank(p.call.update, {}, totals, panel, (first + i) * panel, x_row, rows);
        write_panel<T>(p.call, totals, (first + i) * panel, x_row, rows);
    }
}

Tile tile_of(const Problem& p, const Workspace& at, int64_t panel_number, int64_t rows) {
    const int64_t offset = panel_number * p.window * panel, total = panel_number * rows * panel;
    return {nullptr,
            0,
            at.values,
            nullptr,
            0,
            p.x.most_columns,
            at.scales + offset,
            at.corrections && p.sums_scaled ? at.corrections + offset : nullptr,
            0,
            nullptr,
            p.x.most_chunks,
            p.x.rows * p.x.most_chunks,
            nullptr,
            nullptr,
            nullptr,
            p.x.rows,
            at.totals + total,
            at.earlier + total,
            false,
            false};
}

// Blocks k … end - 1 of one span.
void enter_blocks(Tile& tile, const Problem& p, int64_t k, int64_t end, int64_t first_group) {
    tile.stride = p.x.stride(k);
    tile.plan = p.plans + k;
    tile.blocks = end - k;
    tile.first_group = first_group;
    tile.begins = k % span == 0;
    tile.ends = end % span == 0 || end == p.blocks;
}

// Panel number `number`, whose codes are read row by row, in whole numbers.
void dot_rows(const Problem& p, const Workspace& at, int64_t number) {
    const QuarterSums sums{at.quarter_sums, static_cast<int>(p.x.rows), p.arithmetic.digits == 3 ? 2 : 1};
    IntegerTile tile = integer_tile(p, at, 0, tile_of(p, at, 0, p.x.rows));
    for (int64_t first = 0; first < p.blocks; first += blocks_at_once) {
        const Reading reading(p.call.w, number * panel, first, blocks_at_once);
        sum_codes_of(sums, reading, p.spread, p.arithmetic.table);
        for (int64_t k = 0; k < reading.blocks; ++k) {
            if (k % span == 0) end_span(at, p.x.rows * panel);
            load_window(p, at, 0, number * panel, first + k, first + k + 1, 3);
            enter_block(tile, p, first + k, 0, at.first_group[0]);
            add_sums(sums, k, tile, p.spread, first + k);
        }
    }
}

// The same in floats, whose sums take more room.
void sum_rows(const Problem& p, const Workspace& at, int64_t number) {
    const ChunkSums sums{at.chunk_sums, p.x.rows};
    Tile tile = tile_of(p, at, 0, p.x.rows);
    const int64_t most = blocks_at_once / p.x.rows / span * span;
    for (int64_t first = 0; first < p.blocks; first += most) {
        const Reading reading(p.call.w, number * panel, first, most);
        sum_chunks_of(sums, reading, p.lane_rows, p.values);
        for (int64_t k = 0; k < reading.blocks; ++k) {
            if (k % span == 0) end_span(at, p.x.rows * panel);
            load_window(p, at, 0, number * panel, first + k, first + k + 1, 3);
            enter_blocks(tile, p, first + k, first + k + 1, at.first_group[0]);
            tile.sums = p.x.sums ? p.x.sums_of(first + k, 0) : nullptr;
            add_chunks(sums, k, tile);
        }
    }
}

// Reads the rows of a strip, some at a time.
struct StripReader {
    const Problem& p;
    const Strip& s;
    TurnAhead ahead;
    TurnLevels levels;
    TurnRuns runs;
    int64_t at_once;

    StripReader(const Problem& problem, const Strip& strip, const uint8_t* next)
        : p(problem),
          s(strip),
          ahead(p.call.w, s, next),
          levels(p.call.w, s.row, p.plans[s.first_block].first_group, p.plans[s.first_block + s.blocks - 1].last_group),
          runs(p.call.w, s, p.lane_rows),
          at_once(!p.dots_rows               ? runs.rows_beside()
                  : p.arithmetic.digits == 1 ? dots_beside
                                             : 1) {}

    void read(float* to, int64_t r, int64_t end) const {
        for (int64_t i = r; i < end; ++i) levels.fetch(i);
        if (p.dots_rows)
            return dot_in_turn(to + r * width, p.call.w, s, r, end - r, ahead, p.spread, p.units, p.arithmetic.table,
                               p.arithmetic.radix);
        if constexpr (width < 16) {
            Run list[runs_beside * runs_in_turn], *last = list;
            for (; r < end; ++r) last = runs.set(last, to + r * width, r, ahead.bytes(r));
            if (last > list) sum_runs_of(list, last - list, p.values);
        }
    }
};

// Scales unit number `number` of a strip and adds it to the totals.
void scale_unit(const Problem& p, const Workspace& at, const float* sums, const Strip& s, int64_t number) {
    const int unit_blocks = blocks_of_unit(p.arithmetic.digits), segments = width / unit_blocks;
    const int64_t v = s.row % panel / width, first = s.first_block + number * unit_blocks;
    const int64_t end = smaller(first + unit_blocks, s.first_block + s.blocks);
    vf ordered[width];
    order_unit(ordered, sums + number * width * width, segments > 1);
    load_window(p, at, 0, s.row / panel * panel, first, end, 1 << v);
    const float* const scales = at.scales + v * width - at.first_group[0] * panel;
    const float* const corrections = at.corrections ? at.corrections + v * width - at.first_group[0] * panel : nullptr;
    float *const totals = at.totals + v * width, *const earlier = at.earlier + v * width;
    vf total = load(totals);
    const vf* sum = ordered;
    for (int64_t k = first; k < end; ++k, sum += segments) {
        if (k % span == 0) {
            store(earlier, load(earlier) + total);
            total = splat(0.0f);
        }
        const int count = p.segments_of(k);
        const int32_t* const of_x = p.arithmetic.digits ? p.terms_of(k) : nullptr;
        vf part = splat(0.0f);
        for (int c = 0; c < count; ++c) {
            part = of_x ? fma(sum[c], splat(bit_cast<float>(of_x[segment_terms * c + step_term])), part) : sum[c];
            if (of_x && !p.integer_plans[k].segments[c].is_last) continue;
            const int64_t scale = p.group_of(k, c) * panel;
            total = fma(part, load(scales + scale), total);
            part = splat(0.0f);
            if (corrections && p.is_corrected_by(k, c))
                total = fma(splat(p.x_sum_of(k, c)), load(corrections + scale), total);
        }
    }
    store(totals, total);
}

// One row of x takes one row of W after another; a strip is scaled unit by unit while the next one is read. `after`:
// the codes to be read after these, or null.
template <class T>
void compute_in_turn(const Problem& p, const Workspace& at, int64_t first, int64_t last, const uint8_t* after) {
    const LowBitMatrix& w = p.call.w;
    const int64_t parts = ceil_div(w.columns, columns_in_turn), strips = ceil_div(last - first, width) * parts;
    for (int64_t i = 0; i <= strips; ++i) {
        const Strip now = strip_of(w, first, i), before = strip_of(w, first, i > 0 ? i - 1 : 0);
        const int64_t units = i > 0 ? ceil_div(before.blocks, blocks_of_unit(p.arithmetic.digits)) : 0;
        float* const sums[] = {at.turn_sums + i % 2 * turn_sums, at.turn_sums + (i + 1) % 2 * turn_sums};
        if (i > 0 && before.first_block == 0) {
            if (before.row % panel == 0) clear(at, panel);
            at.first_group[0] = -1;
        }
        const uint8_t* const next = codes_of(w, strip_of(w, first, i + 1));
        const StripReader reader(p, now, i + 1 == strips && after ? after : next);
        const int64_t step = reader.at_once, rows = i < strips ? last - now.row : 0;
        for (int64_t r = 0, unit = 0; r < width; r += step) {
            reader.read(sums[0], r, smaller(r + step, rows));
            for (; unit * width < units * (r + step); ++unit) scale_unit(p, at, sums[1], before, unit);
        }
        if (i > 0 && i % parts == 0 && (before.row % panel > 0 || before.row + width >= last)) {
            end_span(at, panel);
            finish<T>(p, at, before.row / panel, 1, 0, 1);
        }
    }
}

// Rows `first` … `end` - 1 of x with the tile of some blocks.
template <Unit unit, Values::Kind kind>
void multiply_tiles(const Problem& p, Tile tile, int64_t k, int64_t first, int64_t end, const PanelWords& words,
                    vi pairs, Ahead& ahead) {
    tile.x = p.x.line(k, first);
    tile.sums = p.x.sums ? p.x.sums_of(k, first) : nullptr;
    tile.total += first * panel;
    multiply_tiles<unit, kind>(end - first, tile, words, p.values, pairs, ahead);
}

#if defined(METATE_HAS_VNNI_FORMS)
void multiply_digits(const Problem& p, IntegerTile tile, int64_t k, int64_t rows, int64_t blocks, PanelWords words,
                     int64_t halves, Ahead& ahead) {
    const auto multiply = [&]<int digits>() {
        const int beside = halves_of_digits(static_cast<int>(rows), digits);
        for (int64_t v = 0; v < halves; v += beside) {
            multiply_digits<digits>(rows, tile, p.integer_plans + k, blocks, p.integers.block_stride(), words,
                                    p.arithmetic.table, ahead);
            words.halves[0] = words.halves[1];
            tile.scales += width;
            if (tile.corrections) tile.corrections += width;
            if (tile.centers) tile.centers += width;
            tile.total += width;
        }
    };
    p.arithmetic.digits == 3 ? multiply.template operator()<3>() : multiply.template operator()<1>();
}
#else
void multiply_digits(const Problem&, const IntegerTile&, int64_t, int64_t, int64_t, const PanelWords&, int64_t,
                     Ahead&) {}
constexpr int most_digit_rows = 1;
#endif

// The tile of some blocks with all rows of x, about as many at a time; the codes are at hand for those after the first.
void multiply_tiles(const Problem& p, const Workspace& at, const Tile& tile, int64_t row, int64_t k, int halves,
                    vi pairs, Ahead& ahead) {
    const LowBitMatrix& w = p.call.w;
    const int64_t rows = p.x.rows;
    const PanelWords words = words_of(w, row, k, tile.blocks, halves, at.room);
    IntegerTile integers = integer_tile(p, at, 0, tile);
    if (integers.centers) {
        integers.centers += row % panel;
        integers.are_moves = at.have_moves[0];
        integers.start = integers.are_moves;
    }
    integers.begins = integers.ends = false;
    const bool in_dwords = p.can_span && rows > most_digit_rows && (!integers.centers || integers.are_moves);
    const int64_t most = !p.in_digits() ? most_tiled_rows : in_dwords ? span_rows : most_digit_rows;
    const Parts parts(rows, ceil_div(rows, most)), lines(lines_of_segment, parts.count);
    Ahead here = at_hand(words, tile.blocks);
    for (int64_t i = 0, first = 0, end = 0; i < parts.count; ++i, first = end) {
        end = first + parts[i];
        Ahead& later = i == 0 || in_dwords ? ahead : here;
        IntegerTile part = integers;
        part.total += first * panel;
        part.fetched = static_cast<int>(lines[i]);
        part.x = p.integers.line(k, first);
        if (in_dwords)
            multiply_dwords(end - first, part, words, p.integer_plans + k, tile.blocks, p.integers.block_stride(),
                            p.arithmetic.table, later);
        else if (p.in_digits())
            multiply_digits(p, part, k, end - first, tile.blocks, words, smaller(halves, ceil_div(w.rows - row, width)),
                            later);
        else if (p.pairs)
            multiply_tiles<Unit::pairs, Values::table>(p, tile, k, first, end, words, pairs, later);
        else if (p.values.kind == Values::table)
            multiply_tiles<Unit::floats, Values::table>(p, tile, k, first, end, words, pairs, later);
        else
            multiply_tiles<Unit::floats, Values::whole>(p, tile, k, first, end, words, pairs, later);
    }
}

// The same with many rows of x, in whole numbers.
void multiply_span(const Problem& p, const Workspace& at, int64_t panel_number, const Tile& tile, int64_t row,
                   int64_t k, int64_t x_row, int64_t rows, const uint8_t* next) {
    const LowBitMatrix& w = p.call.w;
    const int64_t beside = w.in_tiles() ? rows_of_tile : 1;
    IntegerTile integers = integer_tile(p, at, panel_number, tile);
    if (integers.centers && !at.have_moves[panel_number]) [[unlikely]] {
        if (tile.begins) clear(tile.total, rows * panel);
        for (int64_t i = 0; i < tile.blocks; ++i) multiply_codes(p, at, panel_number, row, k + i, x_row, rows, tile);
        if (tile.ends) end_span(tile.earlier, tile.total, rows * panel);
        return;
    }
    integers.x = p.integers.line(k, x_row);
    integers.start = integers.centers != nullptr;
    decode_span(at.codes, words_of(w, row, k, tile.blocks, 2, at.room), p.integer_plans + k, tile.blocks,
                integers.centers, tile.first_group, p.arithmetic.table);
    multiply_bytes(integers, p.integer_plans + k, tile.blocks, p.integers.block_stride(), rows,
                   Ahead(next, tile.blocks * block / 2 * beside, w.row_bytes() * beside));
}

// `count` panels from number `first` on.
template <class T>
void compute_panels(const Problem& p, const Workspace& at, int64_t first, int64_t count) {
    for (int64_t x_row = 0; x_row < p.x.rows; x_row += p.rows_at_once) {
        const int64_t rows = smaller(p.rows_at_once, p.x.rows - x_row);
        if (p.in_digits()) clear(at.totals, count * rows * panel);
        clear(at.earlier, count * rows * panel);
        for (int64_t i = 0; i < count; ++i) at.first_group[i] = -1;
        for (int64_t k = 0; k < p.blocks; k += p.blocks_together) {
            const int64_t end = smaller(k + p.blocks_together, p.blocks);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t row = (first + i) * panel;
                load_window(p, at, i, row, k, end, 3);
                Tile tile = tile_of(p, at, i, rows);
                enter_blocks(tile, p, k, end, at.first_group[i]);
                const bool is_last = i + 1 == count;
                const uint8_t* const next =
                    codes_at(p.call.w, is_last ? first * panel : row + panel, is_last ? end : k);
                const auto multiply = p.takes_spans ? multiply_span : multiply_panel;
                multiply(p, at, i, tile, row, k, x_row, rows, next);
            }
            if (p.in_digits() && !p.takes_spans && (end % span == 0 || end == p.blocks))
                end_span(at, count * rows * panel);
        }
        finish<T>(p, at, first, count, x_row, rows);
    }
}

// Few rows of x take one panel after another, or one half after another; the next one, or what is to be read `after`
// the last, is fetched meanwhile.
template <class T>
void compute_tiles(const Problem& p, const Workspace& at, int64_t first, int64_t last, const uint8_t* after) {
    const LowBitMatrix& w = p.call.w;
    const vi pairs = p.pairs ? table_of(p) : splat(0);
    const int halves = p.in_digits() && !w.in_tiles() ? 2 : halves_beside(p.x.rows);
    const bool is_stream = w.in_tiles() && halves * width == rows_of_tile;  // read from end to end
    const int64_t step = w.in_tiles() || halves > 1 ? span : span / 2;      // codes of few rows do not wait for many
    const int64_t further = p.can_span && p.x.rows > span_rows ? bytes_of_span - bytes_of_stream : 0;
    Ahead ahead(codes_at(w, first, 0) + further, codes_at(w, last, 0), after);
    for (int64_t row = first, next = 0; row < last; row = next) {
        next = row + halves * width;
        const int64_t v = row % panel / width;
        if (!is_stream)
            ahead = Ahead(next >= last && after ? after : codes_at(w, next, 0), ceil_div(w.columns, 2), w.row_bytes());
        Tile tile = tile_of(p, at, 0, p.x.rows);
        tile.scales += v * width;
        if (tile.corrections) tile.corrections += v * width;
        tile.total += v * width;
        if (v == 0) clear(at, p.x.rows * panel);
        at.first_group[0] = -1;
        const TurnLevels levels(w, next, 0, w.scales.size[1] - 1);
        for (int64_t k = 0, r = 0; k < p.blocks; k += span) {
            const int64_t end = smaller(k + span, p.blocks);
            for (; halves == 1 && r * p.blocks < width * end; ++r) levels.fetch(r);
            load_window(p, at, 0, row - v * width, k, end, halves == 2 ? 3 : 1 << v);
            for (int64_t i = k; i < end; i += step) {
                enter_blocks(tile, p, i, smaller(i + step, end), at.first_group[0]);
                multiply_tiles(p, at, tile, row, i, halves, pairs, ahead);
            }
            end_span(at, p.x.rows * panel);
        }
        if (next % panel == 0 || next >= last) finish<T>(p, at, row / panel, 1, 0, p.x.rows);
    }
}

// Few rows of x take one panel after another: that reads W's rows in long runs.
template <class T>
void compute_piece(const Problem& p, const Workspace& at, int64_t piece, const uint8_t* after) {
    const int64_t first = piece * p.cut.panels, end = smaller(first + p.cut.panels, ceil_div(p.call.w.rows, panel));
    const int64_t end_row = smaller(end * panel, p.call.w.rows);
    if (p.takes_turns) return compute_in_turn<T>(p, at, first * panel, end_row, after);
    if (p.takes_tiles) return compute_tiles<T>(p, at, first * panel, end_row, after);
    if (!p.dots_rows && !p.sums_chunks) {
        const int64_t at_once = p.x.rows <= tile_rows ? 1 : p.cut.panels;
        for (int64_t i = first; i < end; i += at_once) compute_panels<T>(p, at, i, smaller(at_once, end - i));
        return;
    }
    for (int64_t i = first; i < end; ++i) {
        clear(at, p.x.rows * panel);
        at.first_group[0] = -1;
        if (p.dots_rows) {
            dot_rows(p, at, i);
        } else if constexpr (width < 16) {
            sum_rows(p, at, i);
        }
        end_span(at, p.x.rows * panel);
        finish<T>(p, at, i, 1, 0, p.x.rows);
    }
}

// Memory for the plans of a problem.
void take_plans(Problem& p, Arena& arena, Chunk*& chunks, Segment*& segments) {
    const bool in_integers = p.arithmetic.digits > 0;
    p.plans = arena.take<BlockPlan>(p.blocks);
    chunks = arena.take<Chunk>(p.blocks * p.x.most_chunks);
    p.integer_plans = in_integers ? arena.take<IntegerPlan>(p.blocks) : nullptr;
    segments = in_integers ? arena.take<Segment>(p.blocks * p.x.most_chunks) : nullptr;
}

// Memory for its packed x.
void take_rows(Problem& p, Arena& arena) {
    const int64_t most_chunks = p.x.most_chunks, sums = p.blocks * p.x.rows * most_chunks;
    if (p.in_digits()) {
        p.integers.lines = arena.take<int32_t>(p.blocks * p.x.rows * p.integers.stride());
        if (!p.dots_rows) return;
        p.spread.x = arena.take<int32_t>(round_up(p.blocks, width) * p.x.rows * p.spread.stride());
        p.spread.used = arena.take<int32_t>(p.blocks);
        p.units =
            p.takes_turns ? arena.take<UnitTerms>(ceil_div(p.blocks, blocks_of_unit(p.arithmetic.digits))) : nullptr;
        p.spread.terms = arena.take<Term>(sums);
        return;
    }
    p.x.x = arena.take<float>(p.x.size());
    p.x.sums = p.sums_scaled && p.is_corrected() ? arena.take<float>(sums) : nullptr;
    if (p.whole_pairs) {
        p.x.last = arena.take<float>(p.x.size());
        p.x.has_last = arena.take<uint8_t>(p.blocks * p.x.rows);
        p.x.steps = arena.take<float>(sums);
    }
    const int64_t columns = round_up(p.call.w.columns, run_columns);
    p.lane_rows.x = p.sums_chunks || p.takes_turns ? arena.take<float>(columns * p.x.rows) : nullptr;
}

// The calls of one schedule, and where the pieces of each begin.
struct Schedule {
    Problem* problems;
    int64_t* first;
    Chunk* chunks;
    Segment* segments;
};

// Takes the memory of a schedule, without what its workers have their own of; `like` is any of its problems.
Schedule schedule_of(const QuantLinears& all, Problem like, bool have_own, Arena& arena) {
    Schedule s{};
    s.problems = arena.take<Problem>(all.count);
    s.first = arena.take<int64_t>(all.count + 1);
    if (!have_own) take_plans(like, arena, s.chunks, s.segments);
    if (arena.base) s.first[0] = 0;
    for (int64_t i = 0; i < all.count; ++i) {
        Problem p(all.calls[i]);
        p.plans = like.plans;
        p.integer_plans = like.integer_plans;
        if (!have_own) take_rows(p, arena);
        if (!arena.base) continue;
        s.problems[i] = p;
        s.first[i + 1] = s.first[i] + (p.x.rows ? p.cut.pieces : 0);
    }
    return s;
}

template <class T>
void pack_rows(const Problem& p, const Runtime& runtime) {
    const QuantLinear& call = p.call;
    const Runtime packers = worth(runtime, p.x.rows * call.w.columns * operations_to_pack);
    if (p.whole_pairs)
        pack_whole<T>(p.x, call, p.arithmetic.table.unit ? p.arithmetic.table.unit : 1.0f, packers);
    else if (p.in_digits())
        pack_integers<T>(p.integers, p.integer_plans, call, p.arithmetic, p.center(), packers);
    else
        pack<T>(p.x, call.x, call.w.permutation, call.w.group_size, call.int8_activations, packers);
    if (p.dots_rows)
        spread(p.spread, p.integers, p.integer_plans, p.blocks, call.w.bits, static_cast<int>(p.center()),
               p.arithmetic.radix, packers);
    const int unit_blocks = blocks_of_unit(p.arithmetic.digits);
    for (int64_t k = 0; p.units && k < p.blocks; k += unit_blocks)
        set_unit(p.units[k / unit_blocks], p.spread, p.integers, p.integer_plans, k, p.blocks);
    if (p.lane_rows.x) spread(p.lane_rows, p.x, call.w.columns, packers);
}

constexpr int64_t worth_packing = 16;  // rows of W for a worker and row of x
constexpr int64_t most_own_rows = 16;  // of x, that a worker packs by itself

// Where a worker packs few rows of x by itself: that is less work than to wait for what another's caches hold.
struct OwnRows {
    Problem* problem;
    int64_t* number;  // of the problem packed, -1: none
    char* room;       // of its plans and its x

    OwnRows(int64_t bytes, Arena& arena)
        : problem(arena.take<Problem>(1)), number(arena.take<int64_t>(1)), room(arena.take<char>(bytes)) {}

    // Problem number i, a copy of p.
    template <class T>
    const Problem& packed(const Problem& p, int64_t i, const Runtime& alone) const {
        if (*number == i) return *problem;
        *problem = p;
        Arena arena{room};
        Chunk* chunks;
        Segment* segments;
        take_plans(*problem, arena, chunks, segments);
        if (*number < 0) plan_blocks(*problem, chunks, segments);  // which are those of all problems
        take_rows(*problem, arena);
        pack_rows<T>(*problem, alone);
        *number = i;
        return *problem;
    }
};

int64_t most_own_bytes(const QuantLinears& all) {
    int64_t most = 0;
    for (int64_t i = 0; i < all.count; ++i) {
        Problem p(all.calls[i]);
        Arena arena;
        Chunk* chunks;
        Segment* segments;
        take_plans(p, arena, chunks, segments);
        take_rows(p, arena);
        most = larger(most, static_cast<int64_t>(arena.used));
    }
    return most;
}

template <class T>
void run(const QuantLinears& all, const Runtime& runtime) {
    const QuantLinear& most = with_most_rows(all);
    const Problem largest(most);
    const LowBitMatrix& w = most.w;
    if (largest.x.rows == 0 || w.rows == 0) return;
    const Runtime workers = worth(runtime, all.count * w.rows * w.columns);
    const bool have_own = largest.x.rows <= most_own_rows && largest.x.rows * workers.threads * worth_packing <= w.rows;
    const int64_t own_bytes = have_own ? most_own_bytes(all) : 0;
    struct Worker {
        Workspace at;
        OwnRows rows;
    };
    Schedule s{};
    const auto own = lay_out(
        workers, workers.threads, [&](Arena& arena) { s = schedule_of(all, largest, have_own, arena); },
        [&](Arena& arena) { return Worker{largest.workspace(arena), OwnRows(own_bytes, arena)}; });
    for (int i = 0; i < workers.threads; ++i) *own(i).rows.number = -1;
    if (!have_own) plan_blocks(s.problems[0], s.chunks, s.segments);
    for (int64_t i = 0; i < all.count && !have_own; ++i) pack_rows<T>(s.problems[i], runtime);
    Runtime alone = runtime;
    alone.threads = 1;
    const int64_t pieces = s.first[all.count], step = workers.threads;
    // As many pieces on as there are workers is what a worker gets next, most likely.
    const auto codes_of_piece = [&](int64_t piece) -> const uint8_t* {
        if (piece >= pieces) return nullptr;
        const int64_t i = run_of(s.first, all.count, piece);
        const Problem& p = s.problems[i];
        return codes_of(p.call.w, {(piece - s.first[i]) * p.cut.panels * panel, 0, 0});
    };
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        const int64_t i = run_of(s.first, all.count, piece);
        const Worker mine = own(worker);
        const Problem& p = have_own ? mine.rows.template packed<T>(s.problems[i], i, alone) : s.problems[i];
        compute_piece<T>(p, mine.at, piece - s.first[i], codes_of_piece(piece + step));
    });
}

}  // namespace

void quant_linears(const QuantLinears& all, const Runtime& runtime) {
#if defined(METATE_ISA_BASELINE)
    if (all.calls->x.dtype == DType::f64) {
        for (int64_t i = 0; i < all.count; ++i) linear_exact(all.calls[i], runtime);
        return;
    }
#endif
    with_floats(all.calls->x.dtype, [&]<class T>() { run<T>(all, runtime); });
}

void quant_linear(const QuantLinear& call, const Runtime& runtime) {
    METATE_ISA::quant_linears({&call, 1}, runtime);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(quant_linears, QuantLinears, p.calls->x.dtype)
METATE_DISPATCH_BF16(quant_linear, QuantLinear, p.x.dtype)
