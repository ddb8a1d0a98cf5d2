// Products of packed rows of x with a decoded panel, chunk by chunk: total = fma(sum of the chunk, scale, total).
//
// Every path computes an output by the same operations in the same order, so a row does not depend on how many rows
// there are: a chunk is one chain of fused multiply-adds over ascending columns, or of dot products of pairs of
// bfloat16, each of which takes the place of a float.
#pragma once

#include <string.h>

#include "read_ahead.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Rows of x whose sums stay in registers: with two vectors of each, chains enough for two dot products a cycle, of
// which each waits six cycles for the one before it.
constexpr int tile_rows = width == 16 ? 8 : width == 4 ? 4 : 6;

// Columns of one block that share a scale, at most `longest` or, of some pairs, `longest_pairs`.
struct Chunk {
    int begin, end;  // within the block
    int64_t group;
    bool is_last;  // of its group, or of the block
};

// The chunks of block k, at most `block` of them, of at most `most` columns; returns how many.
inline int chunks_of(Chunk* chunks, int64_t columns, int64_t group_size, int64_t k, int64_t most = longest) {
    const int64_t first = k * block, last = smaller(first + block, columns);
    int64_t group = first / group_size,
            group_end = (group + 1) * group_size;  // a division would cost as much as a chunk
    int64_t run_end = first + most;
    int n = 0;
    for (int64_t at = first; at < last; ++n) {
        const int64_t end = smaller(smaller(last, run_end), group_end);
        chunks[n] = {static_cast<int>(at - first), static_cast<int>(end - first), group,
                     end == last || end == group_end};
        if (end == run_end) run_end += most;
        if (end == group_end) ++group, group_end += group_size;
        at = end;
    }
    return n;
}

// Whether products take columns by twos: as pairs of bfloat16 or of 16-bit whole numbers.
enum class Unit { floats, pairs, whole_pairs };
METATE_FN constexpr int columns_of(Unit unit) {
    return unit == Unit::floats ? 1 : 2;
}
template <Unit unit>
constexpr int columns_in = columns_of(unit);

constexpr int64_t span = 8;  // blocks whose sums join the rest as one: short chains round less

// A float or half a pair for every block, row and column of x, span after span, the rows of a span one after another;
// and the sums of its chunks, those of one group together, as the last one's. Columns come in the order of the
// permutation.
struct PackedRows {
    float* x;     // (spans, rows, blocks of a span, words of a block)
    float* sums;  // (blocks, rows, most_chunks), or null
    int64_t rows, blocks, most_chunks;
    Unit unit = Unit::floats;
    int most_columns = longest;  // of a chunk
    // Of whole numbers, and null otherwise: their last digits, like x; which rows of a block have such, (blocks, rows);
    // and what a whole number is multiplied by, like the sums.
    float* last = nullptr;
    uint8_t* has_last = nullptr;
    float* steps = nullptr;

    METATE_FN int64_t words() const { return block / columns_of(unit); }
    // A row of so many blocks of a span: not a power of two, or rows would share lines of the cache.
    METATE_FN int64_t pitch(int64_t n) const { return n * words() + width; }
    // Floats from one row to the next in the span of block k.
    METATE_FN int64_t stride(int64_t k) const { return pitch(smaller(span, blocks - k / span * span)); }
    METATE_FN int64_t size() const { return rows * (blocks * words() + ceil_div(blocks, span) * width); }
    METATE_FN float* line(int64_t k, int64_t row) const {
        return x + k / span * rows * pitch(span) + k % span * words() + row * stride(k);
    }
    METATE_FN int64_t chunks_at(int64_t k, int64_t row) const { return (k * rows + row) * most_chunks; }
    METATE_FN float* sums_of(int64_t k, int64_t row) const { return sums + chunks_at(k, row); }
    METATE_FN float* last_line(int64_t k, int64_t row) const { return last + (line(k, row) - x); }
};

template <class T>
void pack_line(float* to, const T* from, int64_t stride, const View<1>& permutation, int64_t first, int64_t n) {
    if (permutation) {
        const int32_t* order = static_cast<const int32_t*>(permutation.data) + first * permutation.stride[0];
        for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[order[i * permutation.stride[0]] * stride]);
        return;
    }
    from += first * stride;
    int64_t i = 0;
    for (; stride == 1 && i + width <= n; i += width) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
}

// The n <= longest numbers of a chunk to whole multiples of their largest magnitude / 127.
inline void round_chunk(float* x, int n) {
    const vf zero = splat(0.0f);
    vf most = zero, poison = zero;
    for (int i = 0; i < n; i += width) {
        const vf part = n - i >= width ? load(x + i) : load(x + i, n - i);
        most = max(abs(part), most);
        poison = fma(part, zero, poison);  // NaN once a number is not finite, and then all of the chunk is
    }
    const float largest_size = largest(most) + sum(poison), step = largest_size / 127;
    const float infinity = __builtin_inff();  // the inverse of a chunk below 4e-37, which rounds to 0
    const float inverse = largest_size > 0 && 127 / largest_size < infinity ? 127 / largest_size : 0;
    for (int i = 0; i < n; i += width) {
        const vf part = (n - i >= width ? load(x + i) : load(x + i, n - i)) * splat(inverse);
        const vf rounded = (part - rest_of_round(part)) * splat(step);
        n - i >= width ? store(x + i, rounded) : store(x + i, rounded, n - i);
    }
}

// The columns of a block as pairs, as decode_pairs has them, rounded to bfloat16 if they were not.
inline void to_pairs(float* to, const float* from) {
    uint32_t bits[block], pairs[block / 2];
    memcpy(bits, from, sizeof bits);
    for (uint32_t& x : bits) x += 0x7fff + (x >> 16 & 1);
    for (int i = 0; i < block; i += unit_columns)
        for (int j = 0; j < 4; ++j) pairs[i / 2 + j] = bits[i + j] >> 16 | (bits[i + j + 4] & 0xffff0000u);
    memcpy(to, pairs, sizeof pairs);
}

// A whole block of bfloat16 as it lies, and the sums of its chunks, which are whole vectors.
template <class T>
METATE_FN bool pack_pairs([[maybe_unused]] float* to, [[maybe_unused]] float* sums, [[maybe_unused]] const T* from,
                          [[maybe_unused]] const Chunk* chunks, [[maybe_unused]] int count) {
#if defined(METATE_HAS_BF16_DOT)
    if constexpr (__is_same(T, bf16)) {
        for (int i = 0; i < block; i += 2 * width) store(to + i / 2, as_float(interleave_halves(load_pairs(from + i))));
        vf total = splat(0.0f);
        for (int c = 0; c < count; ++c) {
            for (int i = chunks[c].begin; i < chunks[c].end; i += 2 * width)
                total = dot(total, as_int(load(to + i / 2)), splat(0x3f803f80));
            if (!chunks[c].is_last) continue;
            sums[c] = sum(total);
            total = splat(0.0f);
        }
        return true;
    }
#endif
    return false;
}

// The same of floats.
METATE_FN void sum_groups(float* sums, const float* x, const Chunk* chunks, int count) {
    for (int c = 0, begin = 0; c < count; ++c) {
        if (!chunks[c].is_last) continue;
        vf total = splat(0.0f);
        for (; begin < chunks[c].end; begin += width) {
            const int n = chunks[c].end - begin;
            total = total + (n >= width ? load(x + begin) : load(x + begin, n));
        }
        begin = chunks[c].end;
        sums[c] = sum(total);
    }
}

// x, (rows, columns), as PackedRows; `group_size` for the sums, and where chunks are `rounded`, of `longest` columns.
template <class T>
void pack(const PackedRows& to, const View<2>& x, const View<1>& permutation, int64_t group_size, bool rounded,
          const Runtime& runtime) {
    const int64_t columns = x.size[1], rows_at_once = 16, row_pieces = ceil_div(to.rows, rows_at_once);
    const bool is_plain = to.unit == Unit::pairs && x.stride[1] == 1 && !permutation && !rounded;
    for_pieces(runtime, ceil_div(columns, block) * row_pieces, [&](int, int64_t piece) {
        const int64_t k = piece / row_pieces, first = piece % row_pieces * rows_at_once;
        const bool is_whole = is_plain && columns - k * block >= block;
        Chunk chunks[block], parts[block];
        const int count = to.sums ? chunks_of(chunks, columns, group_size, k, to.most_columns) : 0;
        const int rounded_parts = rounded ? chunks_of(parts, columns, group_size, k) : 0;
        for (int64_t row = first; row < smaller(to.rows, first + rows_at_once); ++row) {
            const T* from = static_cast<const T*>(x.data) + row * x.stride[0];
            float* const sums = to.sums ? to.sums_of(k, row) : nullptr;
            if (is_whole && pack_pairs(to.line(k, row), sums, from + k * block, chunks, count)) continue;
            float room[block] = {};
            float* const line = to.unit == Unit::pairs ? room : to.line(k, row);
            pack_line(line, from, x.stride[1], permutation, k * block, smaller(block, columns - k * block));
            for (int c = 0; c < rounded_parts; ++c) round_chunk(line + parts[c].begin, parts[c].end - parts[c].begin);
            if (to.unit == Unit::pairs) to_pairs(to.line(k, row), line);
            sum_groups(sums, line, chunks, count);
        }
    });
}

// The call that needs the largest workspace.
template <class Calls>
const auto& with_most_rows(const Calls& all) {
    int64_t most = 0;
    for (int64_t i = 1; i < all.count; ++i)
        if (all.calls[i].x.size[0] > all.calls[most].x.size[0]) most = i;
    return all.calls[most];
}

// The chunks of one block, and the groups that its scales come from.
struct BlockPlan {
    Chunk* chunks;
    int count;
    int64_t first_group, last_group;
};

// Blocks of one span, one after another, with some rows of x.
struct Tile {
    const float* x;  // rows `stride` apart
    int64_t stride;
    const float* values;  // (word, lane) at word · panel + lane
    const BlockPlan* plan;
    int64_t blocks;
    int most_columns;
    const float *scales, *corrections;  // (group, lane) at (group - first_group) · panel + lane; or null
    int64_t first_group;
    const float* sums;  // of the chunks of x, rows sums_stride and blocks block_sums apart
    int64_t sums_stride, block_sums;
    const float *last, *steps;  // of whole numbers, like x and like the sums
    const uint8_t* has_last;    // blocks block_rows apart
    int64_t block_rows;
    float *total, *earlier;  // of the span, and of those before it: rows `panel` floats apart
    bool begins, ends;       // the span
};

template <int rows>
METATE_FN void load_totals(vf (&total)[rows][2], const float* from) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) total[r][v] = load(from + r * panel + v * width);
    }
}
template <int rows>
METATE_FN void store_totals(float* to, const vf (&total)[rows][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) store(to + r * panel + v * width, total[r][v]);
    }
}

template <int rows>
METATE_FN void add_totals(float* to, const vf (&total)[rows][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float* const at = to + r * panel + v * width;
            store(at, load(at) + total[r][v]);
        }
    }
}

// total = fma(sum, scale, total) for the sums of a chunk, number c of its block, and the corrections of what they left
// out.
template <bool scaled, int rows>
METATE_FN void add_sums(vf (&total)[rows][2], const Tile& t, const Chunk& chunk, int64_t c, const vf (&sum)[rows][2]) {
    const int64_t scale = (chunk.group - t.first_group) * panel;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            total[r][v] =
                scaled ? fma(sum[r][v], load(t.scales + scale + v * width), total[r][v]) : total[r][v] + sum[r][v];
    }
    if (!scaled || !t.corrections || !chunk.is_last) return;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        const vf x_sum = splat(t.sums[r * t.sums_stride + c]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) total[r][v] = fma(x_sum, load(t.corrections + scale + v * width), total[r][v]);
    }
}

// sum + a word of x times words of W. Whole numbers are 32 bits in the lanes of floats.
template <Unit unit>
METATE_FN vf add_product(vf sum, vf x, vf values) {
#if defined(METATE_HAS_VNNI_FORMS)
    if constexpr (unit == Unit::whole_pairs) {
        vi whole = as_int(sum);
        vnni_add_word_dot(whole, as_int(x), as_int(values));
        return as_float(whole);
    }
#endif
#if defined(METATE_HAS_BF16_DOT)
    if constexpr (unit == Unit::pairs) return METATE_ISA::add_product(sum, as_int(x), as_int(values));
#endif
    return METATE_ISA::add_product(sum, x, values);
}

// The last digits of a chunk of so many words times half a panel: few chunks have any.
template <Unit unit>
__attribute__((noinline)) vf sum_last_digits(const float* x, const float* values, int words) {
    vf sum[4] = {};
    for (; words > 0; words -= 4, x += 4, values += 4 * panel) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = add_product<unit>(sum[j], splat(x[j]), load(values + j * panel));
    }
    return to_float(add(add(as_int(sum[0]), as_int(sum[1])), add(as_int(sum[2]), as_int(sum[3]))));
}

// Whole numbers of a chunk as floats. What they are multiplied by is meant for numbers without their last digits.
template <Unit unit, int rows>
METATE_FN void scale_by_steps(vf (&sum)[rows][2], const Tile& t, int64_t c, const float* x, const float* values,
                              int words) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        const vf step = splat(t.steps[r * t.sums_stride + c]);
        const float* const last = t.last + (x - t.x) + r * t.stride;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            vf value = to_float(as_int(sum[r][v]));
            if (t.has_last[r]) [[unlikely]]
                value = fma(sum_last_digits<unit>(last, values + v * width, words), splat(0x1p-8f), value);
            sum[r][v] = value * step;
        }
    }
}

// Where the rows of a tile of x and the words of W have been read up to. Three rows to a pointer: with the stride once
// and twice as index, every address is one addressing mode.
template <int rows>
struct Reader {
    static constexpr int bases = (rows + 2) / 3;
    const float *x[bases], *values;

    METATE_FN explicit Reader(const Tile& t) : values(t.values) {
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) x[i] = t.x + 3 * i * t.stride;
    }
    METATE_FN void advance(int words) {
#pragma GCC unroll 4
        for (int i = 0; i < bases; ++i) {
            x[i] += words;
            asm("" : "+r"(x[i]));  // or compilers keep the distances of all rows and words in memory instead
        }
        values += words * panel;
    }
};

// `together` whole chunks from number c on: few rows have too few chains of additions to keep the processor busy.
template <Unit unit, int rows, bool scaled, int together>
METATE_FN void multiply_chunks(vf (&total)[rows][2], const Tile& t, Reader<rows>& from, const Chunk* chunks, int c) {
    const int chunk_words = t.most_columns / columns_in<unit>;
    const int64_t stride = t.stride;
    vf sum[together][rows][2];
#pragma GCC unroll 4
    for (int q = 0; q < together; ++q) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sum[q][r][0] = sum[q][r][1] = splat(0.0f);
    }
    const auto add_columns = [&]<int n>() __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
#pragma GCC unroll 4
            for (int q = 0; q < together; ++q) {
                const float* const value = from.values + q * chunk_words * panel;
                const vf first = load(value), second = load(value + width);
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r) {
                    const vf a = splat(from.x[r / 3][r % 3 * stride + q * chunk_words]);
                    sum[q][r][0] = add_product<unit>(sum[q][r][0], a, first);
                    sum[q][r][1] = add_product<unit>(sum[q][r][1], a, second);
                }
            }
            from.advance(1);
        }
    };
    const Reader<rows> begin = from;
    const int columns = chunks[c].end - chunks[c].begin;
    const int words = unit == Unit::floats ? columns : static_cast<int>(ceil_div(columns, unit_columns)) * 4;
    int left = words;
    if (width < 16) asm("" : "+m"(total));  // to memory: with the sums they would not fit the registers
    for (; left >= 4; left -= 4) add_columns.template operator()<4>();
    for (; left > 0; --left) add_columns.template operator()<1>();
    if (together > 1) from.advance((together - 1) * chunk_words);
#pragma GCC unroll 4
    for (int q = 0; q < together; ++q) {
        if constexpr (unit == Unit::whole_pairs)
            scale_by_steps<unit>(sum[q], t, c + q, begin.x[0] + q * chunk_words, begin.values + q * chunk_words * panel,
                                 words);
        add_sums<scaled>(total, t, chunks[c + q], c + q, sum[q]);
    }
}

// Whether the n chunks from number c on are whole.
METATE_FN bool are_whole(const BlockPlan& plan, int c, int n, int most_columns) {
    return c + n <= plan.count && plan.chunks[c].begin + n * most_columns == plan.chunks[c + n - 1].end;
}

template <Unit unit, int rows, bool scaled>
__attribute__((noinline)) void multiply_tile(const Tile& tile) {
    constexpr int together = rows > 2 ? 1 : 4 / rows;
    Tile t = tile;  // which no store to the totals can change
    Reader<rows> from(t);
    vf total[rows][2] = {};
    if (!t.begins) load_totals(total, t.total);
    for (const BlockPlan* const end = t.plan + t.blocks; t.plan < end; ++t.plan) {
        const BlockPlan plan = *t.plan;
        for (int c = 0; c < plan.count;) {
            if (together > 1 && are_whole(plan, c, together, t.most_columns)) {
                multiply_chunks<unit, rows, scaled, together>(total, t, from, plan.chunks, c);
                c += together;
            } else {
                multiply_chunks<unit, rows, scaled, 1>(total, t, from, plan.chunks, c++);
            }
        }
        if (t.sums) t.sums += t.block_sums;
        if constexpr (unit == Unit::whole_pairs) {
            t.steps += t.block_sums;
            t.has_last += t.block_rows;
        }
    }
    t.ends ? add_totals(t.earlier, total) : store_totals(t.total, total);
}

template <Unit unit, bool scaled, int rows = tile_rows>
METATE_FN void multiply_rows(int64_t n, const Tile& tile) {
    if constexpr (rows > 1) {
        if (n < rows) return multiply_rows<unit, scaled, rows - 1>(n, tile);
    }
    multiply_tile<unit, rows, scaled>(tile);
}

// n things in so many parts of about the same size: a division for all of them, where one for each would take as long
// as some dozens of products.
struct Parts {
    int64_t count, least, more;  // the first `more` parts have one more than the least
    METATE_FN Parts(int64_t n, int64_t parts) : count(parts), least(n / parts), more(n % parts) {}
    METATE_FN int64_t operator[](int64_t i) const { return least + (i < more); }
};

// All rows of x from `row` on with one panel from block k on. Tiles of about the same height: two of 4 are better than
// 6 and 2. Meanwhile so many lines are fetched `ahead`.
template <Unit unit, bool scaled>
inline void multiply(const PackedRows& x, int64_t k, int64_t row, int64_t rows, Tile tile,
                     Ahead ahead = {nullptr, int64_t{0}, int64_t{0}}, int64_t lines = 0) {
    const Parts tiles(rows, ceil_div(rows, tile_rows)), lines_of_tile(lines, tiles.count);
    tile.x = x.line(k, row);
    tile.sums = x.sums ? x.sums_of(k, row) : nullptr;
    if constexpr (unit == Unit::whole_pairs) {
        tile.last = x.last_line(k, row);
        tile.steps = x.steps + x.chunks_at(k, row);
        tile.has_last = x.has_last + k * x.rows + row;
    }
    for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t n = tiles[i];
        for (int64_t line = 0; line < lines_of_tile[i]; ++line) ahead.fetch();
        multiply_rows<unit, scaled>(n, tile);
        tile.x += n * tile.stride;
        if (tile.sums) tile.sums += n * tile.sums_stride;
        if constexpr (unit == Unit::whole_pairs) {
            tile.last += n * tile.stride;
            tile.steps += n * tile.sums_stride;
            tile.has_last += n;
        }
        tile.total += n * panel;
        if (tile.ends) tile.earlier += n * panel;
    }
}

template <class T>
METATE_FN void store_line(T* to, const float* from, int64_t n) {
    for (; n >= width; n -= width, to += width, from += width) store(to, load(from));
    if (n > 0) store(to, load(from, n), n);
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
