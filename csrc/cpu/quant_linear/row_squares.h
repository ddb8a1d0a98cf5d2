// Few rows of x times 4-bit codes as they lie: squares of W are transposed in registers and multiplied as they are
// looked up, so that nothing decoded is stored. The same sums in the same order as product.h; those of whole numbers
// are exact, and segments, digits and results integer.h's.
#pragma once

#include "row_turns.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t square_rows = 8;        // of x, at once: their sums and a square fill the registers
constexpr int64_t most_square_rows = 16;  // of x, at most, where squares beat decoded panels

METATE_FN bool can_take_squares(const LowBitMatrix& w, const Arithmetic& arithmetic) {
    return width == 16 && (!arithmetic.digits || arithmetic.sums == Sums::dots) && w.columns > 0 && can_sum_chunks(w);
}

#if defined(METATE_HAS_WORD_SHUFFLES)

// Word j of those that a dword of codes stands for.
template <Unit unit>
METATE_FN vf word_of(vf dword, int j, vi table) {
    if constexpr (unit == Unit::pairs) return as_float(lookup_pairs(table, as_int(dword), 4 * j));
    return lookup({as_float(table)}, shift_right(as_int(dword), 4 * j));
}

// What is left of `width` rows of W from some block on.
struct StripCodes {
    const uint8_t* codes;
    int64_t stride, rows, bytes;

    StripCodes(const LowBitMatrix& w, int64_t row, int64_t k)
        : codes(codes_of(w, {row, k, 0})),
          stride(w.codes.stride[0]),
          rows(w.rows - row),
          bytes(ceil_div(w.columns, 2) - k * block / 2) {}

    // The next block: dword i of row r in lane r of number i; zeros where there are none.
    METATE_FN void load_square(vf (&square)[width]) {
        const bool whole = is_whole();
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i)
            square[i] = whole    ? load(reinterpret_cast<const float*>(codes + i * stride))
                      : i < rows ? as_float(load_bytes(codes + i * stride, bytes))
                                 : splat(0.0f);
        transpose(square);
        pass();
    }
    METATE_FN void pass() {
        codes += block / 2;
        bytes -= block / 2;
    }
    METATE_FN bool is_whole() const { return rows >= width && bytes >= block / 2; }
};

struct PanelCodes {
    StripCodes halves[2];

    PanelCodes(const LowBitMatrix& w, int64_t row, int64_t k) : halves{{w, row, k}, {w, row + width, k}} {}
};

// Halves of a panel side by side, which share what is loaded of x; one where memory sets the pace, which likes few rows
// of W at a time.
METATE_FN constexpr int halves_beside(int64_t rows) {
    return rows > 2 ? 2 : 1;
}
// Chunks whose sums are formed side by side: a dot product waits six cycles for the one before it in its chain, and two
// begin in each.
METATE_FN constexpr int chunks_beside(int rows) {
    return rows > 4 ? 1 : rows > 2 ? 2 : 8;
}

// Blocks whose codes are transposed before they are multiplied.
METATE_FN constexpr int blocks_beside(int rows, int chunk_columns) {
    const int blocks = chunks_beside(rows) * chunk_columns / block;
    return blocks > 1 ? blocks : 1;
}

// Transposed codes of the blocks of one panel or half: those that are multiplied, and where rows of x leave the
// processor room for it, the block behind them, which is transposed meanwhile.
template <int rows, int chunk_columns>
struct Squares {
    static constexpr int halves = halves_beside(rows), lanes = halves * width;
    static constexpr int size = blocks_beside(rows, chunk_columns) * width * lanes;
    static constexpr bool looks_ahead = rows > 2;
    static constexpr int steps = halves * width / 4;

    alignas(64) float words[looks_ahead ? 2 : 1][size];
    int now = 0;
    bool is_ahead = false;  // the next block is there

    // Makes the next `blocks` blocks those that are multiplied.
    template <int blocks>
    METATE_FN const float* take(PanelCodes& codes) {
        if (is_ahead) {
            now = 1 - now;
        } else {
            for (int i = 0; i < blocks * halves; ++i) {
                vf square[width];
                codes.halves[i % halves].load_square(square);
                float* const to = words[now] + i / halves * width * lanes + i % halves * width;
#pragma GCC unroll 16
                for (int j = 0; j < width; ++j) store(to + j * lanes, square[j]);
            }
        }
        is_ahead = false;
        return words[now];
    }
    // Four rows of the next block, which is whole.
    METATE_FN void look_ahead(const PanelCodes& codes, int step) {
        const StripCodes& half = codes.halves[step % halves];
        const int row = step / halves * 4;
        store_columns(words[1 - now] + step % halves * width + row, lanes, half.codes + row * half.stride, half.stride);
    }
    METATE_FN void end_block(PanelCodes& codes) {
        is_ahead = true;
#pragma GCC unroll 2
        for (int v = 0; v < halves; ++v) codes.halves[v].pass();
    }
};

// Adds `blocks` blocks to the totals of a panel, or of one of its halves.
template <Unit unit, int rows, int chunk_columns, int blocks>
METATE_FN void multiply_square(const Tile& t, PanelCodes& codes, Squares<rows, chunk_columns>& squares, vi table,
                               Ahead& ahead) {
    constexpr int chunks = block / chunk_columns, words = chunk_columns / columns_in<unit>;
    constexpr int of_dword = unit_columns / columns_in<unit>, dwords = chunk_columns / unit_columns;
    constexpr int most = chunks_beside(rows), together = most < blocks * chunks ? most : blocks * chunks;
    constexpr int halves = halves_beside(rows), lanes = halves * width;
    constexpr int turns = blocks * chunks / together * dwords;
    const float* const room = squares.template take<blocks>(codes);
    const bool looks_ahead = squares.looks_ahead && t.blocks > 1 && codes.halves[halves - 1].is_whole();
    int step = 0;
    const float* x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        x[r] = t.x + r * t.stride;
        asm("" : "+r"(x[r]));  // or compilers keep the distances of all words in memory instead
    }
    for (int c = 0; c < blocks * chunks; c += together) {
        const float* const first = room + c * dwords * lanes;
        vf sum[together][rows][halves] = {};
        for (int d = 0; d < dwords; ++d) {
            const int turn = c / together * dwords + d + 1;
            for (; looks_ahead && step * turns < squares.steps * turn; ++step) squares.look_ahead(codes, step);
            vf dword[together][halves];
#pragma GCC unroll 8
            for (int q = 0; q < together; ++q) {
#pragma GCC unroll 2
                for (int v = 0; v < halves; ++v) {
                    dword[q][v] = load(first + (q * dwords + d) * lanes + v * width);
                    ahead.fetch();  // a line for each row of W
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < of_dword; ++j) {
#pragma GCC unroll 8
                for (int q = 0; q < together; ++q) {
                    vf value[halves];
#pragma GCC unroll 2
                    for (int v = 0; v < halves; ++v) value[v] = word_of<unit>(dword[q][v], j, table);
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
    if (looks_ahead) squares.end_block(codes);
}

template <Unit unit, int rows, int chunk_columns>
__attribute__((noinline)) void multiply_squares_as(Tile t, PanelCodes codes, vi table, Ahead& later) {
    constexpr int most = blocks_beside(rows, chunk_columns);
    static_assert(most == 1 || !Squares<rows, chunk_columns>::looks_ahead);
    Ahead ahead = later;  // in registers
    Squares<rows, chunk_columns> squares;
    const auto multiply = [&]<int blocks>() __attribute__((always_inline)) {
        for (; t.blocks >= blocks; t.blocks -= blocks) {
            multiply_square<unit, rows, chunk_columns, blocks>(t, codes, squares, table, ahead);
            t.plan += blocks;
            t.x += blocks * block / columns_in<unit>;
            t.sums += blocks * t.block_sums;
        }
    };
    if constexpr (most > 1) multiply.template operator()<most>();
    multiply.template operator()<1>();
    later = ahead;
}

// The blocks of a tile with a panel, or with as many halves as go beside each other.
template <Unit unit, int rows = square_rows>
METATE_FN void multiply_squares(int64_t n, const Tile& tile, const PanelCodes& codes, vi table, Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_squares<unit, rows - 1>(n, tile, codes, table, ahead);
    }
    if constexpr (unit == Unit::pairs) {
        if (tile.most_columns > longest)
            return multiply_squares_as<unit, rows, longest_pairs>(tile, codes, table, ahead);
    }
    multiply_squares_as<unit, rows, longest>(tile, codes, table, ahead);
}

#endif

#if defined(METATE_HAS_VNNI_FORMS)

// Adds a block to the totals of one half of a panel, in whole numbers: what multiply_segments does.
template <int rows, int digits, int used, bool has_table>
METATE_FN void multiply_digit_square(const IntegerTile& t, const vf (&square)[width], vi entries, Ahead& ahead) {
    constexpr int dwords = longest / unit_columns, together = used == 1 && rows <= 4 ? 2 : 1;
    constexpr int last = used > 1 ? 1 : 0;  // of the digits whose sums are joined as whole numbers
    const vi mask = splat(0x0f0f0f0f);
    const int32_t* x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        x[r] = t.x + r * t.stride;
        asm("" : "+r"(x[r]));  // as in multiply_square
    }
    vi sum[used][together][rows];
    int64_t at = 0, digit_at[used];
    const auto begin = [&](int s) __attribute__((always_inline)) {
        const Segment& segment = t.segments[s];
        at = (segment.group - t.first_group) * panel;
#pragma GCC unroll 3
        for (int d = 0; d < used; ++d) {
            digit_at[d] = segment.offset * digits + d * segment.quads - segment.first_quad;
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
                for (int i = 0; i < together; ++i) sum[d][i][r] = splat(0);
                if (d < last) continue;
                const vi start = splat(x[r][t.starts_at + 2 * s + d - last]);
                sum[d][0][r] = t.centers ? multiply(load(t.centers + at), start) : start;
            }
        }
    };
    const auto end = [&](int s) __attribute__((always_inline)) {
        const vf scale = load(t.scales + at);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            vi whole = sum[last][0][r];
            if (together > 1) whole = add(whole, sum[last][together - 1][r]);
            if (last) whole = add(shift_left(sum[0][0][r], 8), whole);
            vf step = splat(bit_cast<float>(x[r][t.steps_at + s])), value = to_float(whole);
            if (used < digits) step = step * splat(t.radix);
            if (used == 3) value = fma(value, splat(t.radix), to_float(sum[used - 1][0][r]));
            vf total = fma(value * step, scale, load(t.total + r * panel));
            if (t.corrections)
                total = fma(splat(bit_cast<float>(x[r][t.totals_at + s])), load(t.corrections + at), total);
            store(t.total + r * panel, total);
        }
    };
    int s = 0;
    begin(s);
#pragma GCC unroll 4
    for (int c = 0; c < block / longest; ++c) {
#pragma GCC unroll 8
        for (int q = c * dwords * 2; q < (c + 1) * dwords * 2; ++q) {
            const vi word = as_int(square[q / 2]);
            vi codes = bit_and(q % 2 ? shift_right(word, 4) : word, mask);
            if (has_table) codes = lookup_bytes(entries, codes);
            if (q % 2) ahead.fetch();
#pragma GCC unroll 3
            for (int d = 0; d < used; ++d) {
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r)
                    vnni_add_dot(sum[d][q % together][r], codes, splat(x[r][digit_at[d] + q]));
            }
        }
        if (t.segments[s].end > (c + 1) * longest) continue;
        end(s);
        if (++s == t.count) break;
        begin(s);
    }
}

// The same of some blocks, whose lines of x are `apart` dwords apart.
template <int rows, int digits, bool has_table>
__attribute__((noinline)) void multiply_digits_as(IntegerTile t, const IntegerPlan* plan, int64_t blocks, int64_t apart,
                                                  StripCodes codes, const ByteTable& table, Ahead& later) {
    Ahead ahead = later;  // in registers
    const vi entries = table_of_bytes(table.bytes);
    for (const IntegerPlan* const end = plan + blocks; plan < end; ++plan, t.x += apart) {
        t.segments = plan->segments;
        t.count = plan->count;
        vf square[width];
        codes.load_square(square);
        if constexpr (digits == 3) {
            bool has_last = false;
            for (int r = 0; r < rows; ++r) has_last |= t.x[r * t.stride + t.used_at] == 3;
            if (!has_last) {
                multiply_digit_square<rows, 3, 2, has_table>(t, square, entries, ahead);
                continue;
            }
        }
        multiply_digit_square<rows, digits, digits, has_table>(t, square, entries, ahead);
    }
    later = ahead;
}

// Of x, at once, with so many digits.
METATE_FN constexpr int digit_square_rows(int digits) {
    return digits == 3 ? 4 : static_cast<int>(square_rows);
}

template <int digits, int rows = digit_square_rows(digits)>
METATE_FN void multiply_digits(int64_t n, const IntegerTile& tile, const IntegerPlan* plan, int64_t blocks,
                               int64_t apart, const StripCodes& codes, const ByteTable& table, Ahead& ahead) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_digits<digits, rows - 1>(n, tile, plan, blocks, apart, codes, table, ahead);
    }
    table.unit ? multiply_digits_as<rows, digits, true>(tile, plan, blocks, apart, codes, table, ahead)
               : multiply_digits_as<rows, digits, false>(tile, plan, blocks, apart, codes, table, ahead);
}

#endif

}  // namespace
}  // namespace metate::cpu::METATE_ISA
