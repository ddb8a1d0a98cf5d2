// Few rows of x times 4-bit codes in tiles, multiplied as they are looked up, so that nothing decoded is stored. Codes
// as they lie become tiles first, some blocks at a time, in the first-level cache. The same sums in the same order as
// product.h; those of whole numbers are exact, and segments, digits and results integer.h's.
#pragma once

#include "row_turns.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t most_tiled_rows = width == 16 ? 8 : 4;  // of x, at once: their sums and codes fill the registers
constexpr int words_of_block = block / 8 * static_cast<int>(rows_of_tile);

// Whether few rows of x take W in tiles; where vectors are few, W must be tiles already.
METATE_FN bool can_take_tiles(const LowBitMatrix& w, const Arithmetic& arithmetic) {
    if (width < 8 || w.columns == 0 || !can_sum_chunks(w)) return false;
    return width == 16 ? !arithmetic.digits || arithmetic.sums == Sums::dots : w.in_tiles() && !arithmetic.digits;
}

// Halves of a panel side by side, which share what is loaded of x; one where memory sets the pace, which likes few rows
// of W at a time. Short vectors find both halves in one tile.
METATE_FN constexpr int halves_beside(int64_t rows) {
    return width < 16 || rows > 2 ? 2 : 1;
}
// Chunks whose sums are formed side by side: a dot product waits six cycles for the one before it in its chain, and two
// begin in each.
METATE_FN constexpr int chunks_beside(int rows) {
    if (width < 16) return rows > 1 ? 1 : 2;
    return rows > 4 ? 1 : rows > 2 ? 2 : 8;
}

// Dwords of the blocks of a panel or of one of its halves, rows_of_tile apart.
struct PanelWords {
    const int32_t* halves[2];
};

// The dwords from block k on: of tiles as they lie; of others, and of what ends within a block, in `room` for
// span · words_of_block dwords of each half. Nobody uses what stands for rows that are not there.
inline PanelWords words_of(const LowBitMatrix& w, int64_t row, int64_t k, int64_t blocks, int halves, int32_t* room) {
    PanelWords words{};
    const int64_t columns = smaller(blocks * block, w.columns - k * block);
    for (int v = 0; v < halves; ++v, room += span * words_of_block) {
        const int64_t first = row + (row + v * width < w.rows ? v * width : 0), lane = first % rows_of_tile;
        words.halves[v] = room + lane;
        if (w.in_tiles() && columns == blocks * block) {
            words.halves[v] = words_at(w, first, k);
        } else if (w.in_tiles()) {
            memcpy(room, words_at(w, first - lane, k), static_cast<size_t>(columns) / 8 * rows_of_tile * 4);
        } else {
            for (int64_t i = 0; i < blocks; ++i) transpose_words(room + i * words_of_block, w, first, k + i, 0);
        }
    }
    return words;
}

// What products with codes that are at hand ask for: those codes, again and again.
inline Ahead at_hand(const PanelWords& words, int64_t blocks) {
    return Ahead(reinterpret_cast<const uint8_t*>(words.halves[0]), blocks * words_of_block * 4, 0);
}

// Finds word j of those that a dword of codes stands for.
template <Unit unit, Values::Kind kind>
struct WordFinder {
    const Values& values;
    Table16 table;
    vi pairs;

    WordFinder(const Values& v, vi pair_table) : values(v), table(table16(v.entries)), pairs(pair_table) {}
    METATE_FN vf operator()(vi dword, int j) const {
#if defined(METATE_HAS_WORD_SHUFFLES)
        if constexpr (unit == Unit::pairs) return as_float(lookup_pairs(pairs, dword, 4 * j));
#endif
        return value_in<4, kind>(dword, dword, 4 * j, values, table);
    }
};

// Adds `blocks` blocks to the totals of a panel, or of one of its halves.
template <Unit unit, int rows, int chunk_columns, int blocks, class Find>
METATE_FN void multiply_tile_blocks(const Tile& t, const PanelWords& from, const Find& find, Ahead& ahead) {
    constexpr int chunks = block / chunk_columns, words = chunk_columns / columns_in<unit>;
    constexpr int of_dword = unit_columns / columns_in<unit>, dwords = chunk_columns / unit_columns;
    constexpr int most = chunks_beside(rows), together = most < blocks * chunks ? most : blocks * chunks;
    constexpr int halves = halves_beside(rows);
    const float* x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        x[r] = t.x + r * t.stride;
        asm("" : "+r"(x[r]));  // or compilers keep the distances of all words in memory instead
    }
    for (int c = 0; c < blocks * chunks; c += together) {
        vf sum[together][rows][halves] = {};
        for (int d = 0; d < dwords; ++d) {
            vi dword[together][halves];
#pragma GCC unroll 8
            for (int q = 0; q < together; ++q) {
#pragma GCC unroll 2
                for (int v = 0; v < halves; ++v) {
                    dword[q][v] = load(from.halves[v] + ((c + q) * dwords + d) * rows_of_tile);
                    if (v * width % rows_of_tile == 0) ahead.fetch();
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < of_dword; ++j) {
#pragma GCC unroll 8
                for (int q = 0; q < together; ++q) {
                    vf value[halves];
#pragma GCC unroll 2
                    for (int v = 0; v < halves; ++v) value[v] = find(dword[q][v], j);
                    const int word = (c + q) * words + d * of_dword + j;
#pragma GCC unroll 8
                    for (int r = 0; r < rows; ++r) {
                        const vf a = splat(x[r][word]);
#pragma GCC unroll 2
                        for (int v = 0; v < halves; ++v) sum[q][r][v] = add_product<unit>(sum[q][r][v], a, value[v]);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int q = 0; q < together; ++q) {
            const int64_t k = (c + q) / chunks, number = (c + q) % chunks;
            if (number >= t.plan[k].count) continue;
            const Chunk& chunk = t.plan[k].chunks[number];
            const int64_t scale = (chunk.group - t.first_group) * panel;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < halves; ++v) {
                    float* const at = t.total + r * panel + v * width;
                    store(at, fma(sum[q][r][v], load(t.scales + scale + v * width), load(at)));
                }
            }
            if (!t.corrections || !chunk.is_last) continue;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const vf x_sum = splat(t.sums[k * t.block_sums + r * t.sums_stride + number]);
#pragma GCC unroll 2
                for (int v = 0; v < halves; ++v) {
                    float* const at = t.total + r * panel + v * width;
                    store(at, fma(x_sum, load(t.corrections + scale + v * width), load(at)));
                }
            }
        }
    }
}

template <Unit unit, Values::Kind kind, int rows, int chunk_columns>
__attribute__((noinline)) void multiply_tiles_as(Tile t, PanelWords words, const Values& values, vi pairs,
                                                 Ahead& later) {
    constexpr int most = chunks_beside(rows) * chunk_columns / block;
    Ahead ahead = later;  // in registers
    const WordFinder<unit, kind> find(values, pairs);
    const auto multiply = [&]<int blocks>() __attribute__((always_inline)) {
        for (; t.blocks >= blocks; t.blocks -= blocks) {
            multiply_tile_blocks<unit, rows, chunk_columns, blocks>(t, words, find, ahead);
            t.plan += blocks;
            t.x += blocks * block / columns_in<unit>;
            t.sums += blocks * t.block_sums;
            for (const int32_t*& half : words.halves) half += blocks * words_of_block;
        }
    };
    if constexpr (most > 1) multiply.template operator()<most>();
    multiply.template operator()<1>();
    later = ahead;
}

// The blocks of a tile of x with a panel, or with as many halves as go beside each other.
template <Unit unit, Values::Kind kind, int rows = most_tiled_rows>
METATE_FN void multiply_tiles(int64_t n, const Tile& tile, const PanelWords& words, const Values& values, vi pairs,
                              Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_tiles<unit, kind, rows - 1>(n, tile, words, values, pairs, ahead);
    }
    if constexpr (unit == Unit::pairs) {
        if (tile.most_columns > longest)
            return multiply_tiles_as<unit, kind, rows, longest_pairs>(tile, words, values, pairs, ahead);
    }
    multiply_tiles_as<unit, kind, rows, longest>(tile, words, values, pairs, ahead);
}

#if defined(METATE_HAS_VNNI_FORMS)

// What codes stand for in whole numbers.
enum class Found {
    centered,      // themselves, less a center that all have
    own_centered,  // less one for every row and group
    moved,         // the same, moved to one that all have
    bytes,         // those of a table
    decoded,       // themselves: they are such bytes already
};

// Of x, at once; and halves of a panel beside each other. More than fill the registers are split.
constexpr int most_digit_rows = 4;
METATE_FN constexpr int halves_of_digits(int rows, int digits) {
    return digits == 3 ? 1 : halves_beside(rows);
}

// Adds a block to the totals of a panel or of one of its halves, in whole numbers: what multiply_segments does.
template <int rows, int digits, int used, Found found>
METATE_FN void multiply_digit_tile(const IntegerTile& t, const PanelWords& words, vi entries, Ahead& ahead) {
    constexpr int dwords = longest / unit_columns, halves = halves_of_digits(rows, digits);
    constexpr int together = used == 1 && rows <= 4 ? 2 : 1;
    constexpr int last = used > 1 ? 1 : 0;  // of the digits whose sums are joined as whole numbers
    const vi mask = splat(0x0f0f0f0f);
    const int32_t* x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        x[r] = t.x + r * t.stride;
        asm("" : "+r"(x[r]));  // as in multiply_tile_blocks
    }
    vi sum[used][together][rows][halves];
    vf part[rows][halves] = {};  // of a group
    vi move[halves] = {};
    int64_t at = 0, digit_at[used];
    const auto begin = [&](int s) __attribute__((always_inline)) {
        const Segment& segment = t.segments[s];
        at = (segment.group - t.first_group) * panel;
        vi center[halves] = {};
#pragma GCC unroll 2
        for (int v = 0; v < halves; ++v) {
            if (found == Found::own_centered) center[v] = load(t.centers + at + v * width);
            if (found == Found::moved) move[v] = load(t.centers + at + v * width);
        }
#pragma GCC unroll 3
        for (int d = 0; d < used; ++d) {
            digit_at[d] = segment.offset * digits + d * segment.quads - segment.first_quad;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const vi start = d < last ? splat(0) : splat(x[r][t.terms_at + segment_terms * s + t.start + d - last]);
#pragma GCC unroll 2
                for (int v = 0; v < halves; ++v) {
#pragma GCC unroll 2
                    for (int i = 1; i < together; ++i) sum[d][i][r][v] = splat(0);
                    sum[d][0][r][v] = found == Found::own_centered && d >= last ? multiply(center[v], start) : start;
                }
            }
        }
    };
    const auto end = [&](int s) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            vf step = splat(bit_cast<float>(x[r][t.terms_at + segment_terms * s + step_term]));
            if (used < digits) step = step * splat(t.radix);
#pragma GCC unroll 2
            for (int v = 0; v < halves; ++v) {
                vi whole = sum[last][0][r][v];
                if (together > 1) whole = add(whole, sum[last][together - 1][r][v]);
                if (last) whole = add(shift_left(sum[0][0][r][v], 8), whole);
                vf value = to_float(whole);
                if (used == 3) value = fma(value, splat(t.radix), to_float(sum[used - 1][0][r][v]));
                part[r][v] = fma(value, step, part[r][v]);
            }
        }
        if (digits < 3 && !t.segments[s].is_last) return;  // of three digits, every one is
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < halves; ++v) {
                float* const total = t.total + r * panel + v * width;
                store(total, fma(part[r][v], load(t.scales + at + v * width), load(total)));
                part[r][v] = splat(0.0f);
            }
        }
        if (!t.corrections) return;
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const vf x_sum = splat(bit_cast<float>(x[r][t.terms_at + segment_terms * s + total_term]));
#pragma GCC unroll 2
            for (int v = 0; v < halves; ++v) {
                float* const total = t.total + r * panel + v * width;
                store(total, fma(x_sum, load(t.corrections + at + v * width), load(total)));
            }
        }
    };
    int s = 0;
    begin(s);
#pragma GCC unroll 4
    for (int c = 0; c < block / longest; ++c) {
#pragma GCC unroll 8
        for (int q = c * dwords * 2; q < (c + 1) * dwords * 2; ++q) {
            vi codes[halves];
#pragma GCC unroll 2
            for (int v = 0; v < halves; ++v) {
                const vi word = load(words.halves[v] + q / 2 * rows_of_tile);
                codes[v] = bit_and(q % 2 ? shift_right(word, 4) : word, mask);
                if (found == Found::bytes) codes[v] = lookup_bytes(entries, codes[v]);
                if (found == Found::moved) codes[v] = add(codes[v], move[v]);
                if (q % 2) ahead.fetch();
            }
#pragma GCC unroll 3
            for (int d = 0; d < used; ++d) {
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r) {
                    const vi a = splat(x[r][digit_at[d] + q]);
#pragma GCC unroll 2
                    for (int v = 0; v < halves; ++v) vnni_add_dot(sum[d][q % together][r][v], codes[v], a);
                }
            }
        }
        if (t.segments[s].end > (c + 1) * longest) continue;
        end(s);
        if (++s == t.count) break;
        begin(s);
    }
}

// The same of some blocks, whose lines of x are `apart` dwords apart.
template <int rows, int digits, Found found>
__attribute__((noinline)) void multiply_digits_as(IntegerTile t, const IntegerPlan* plan, int64_t blocks, int64_t apart,
                                                  PanelWords words, const ByteTable& table, Ahead& later) {
    Ahead ahead = later;  // in registers
    const vi entries = table_of_bytes(table.bytes);
    for (const IntegerPlan* const end = plan + blocks; plan < end; ++plan, t.x += apart) {
        t.segments = plan->segments;
        t.count = plan->count;
        bool has_last = digits == 1;
        for (int r = 0; digits == 3 && r < rows; ++r) has_last |= t.x[r * t.stride + t.used_at] == 3;
        has_last ? multiply_digit_tile<rows, digits, digits, found>(t, words, entries, ahead)
                 : multiply_digit_tile<rows, digits, (digits == 3 ? 2 : 1), found>(t, words, entries, ahead);
        for (const int32_t*& half : words.halves) half += words_of_block;
    }
    later = ahead;
}

template <int digits, int rows = most_digit_rows>
METATE_FN void multiply_digits(int64_t n, const IntegerTile& tile, const IntegerPlan* plan, int64_t blocks,
                               int64_t apart, const PanelWords& words, const ByteTable& table, Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_digits<digits, rows - 1>(n, tile, plan, blocks, apart, words, table, ahead);
    }
    if (table.unit)
        multiply_digits_as<rows, digits, Found::bytes>(tile, plan, blocks, apart, words, table, ahead);
    else if (digits == 1 && tile.are_moves)
        multiply_digits_as<rows, digits, digits == 1 ? Found::moved : Found::own_centered>(tile, plan, blocks, apart,
                                                                                           words, table, ahead);
    else if (tile.centers)
        multiply_digits_as<rows, digits, Found::own_centered>(tile, plan, blocks, apart, words, table, ahead);
    else
        multiply_digits_as<rows, digits, Found::centered>(tile, plan, blocks, apart, words, table, ahead);
}

#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
