// Few rows of x times 4-bit codes as they lie, in floats: the chunks of a row of W fill the lanes, and only their sums
// are transposed. The same sums in the same order as product.h.
#pragma once

#include "product.h"
#include "read_ahead.h"

namespace metate::cpu::METATE_ISA {
namespace {

// Whether W is all chunks of so many columns.
METATE_FN bool are_whole_chunks(const LowBitMatrix& w, int64_t columns) {
    return w.columns % columns == 0 && (w.group_size % columns == 0 || w.group_size >= w.columns);
}

METATE_FN bool can_sum_chunks(const LowBitMatrix& w) {
    return w.bits == 4 && are_whole_chunks(w, longest);
}

// The chunk of a run that lies in a lane once transpose_parts has spread its dwords.
METATE_FN constexpr int chunk_in(int lane) {
    return lane % 4 * (width / 4) + lane / 4;
}

constexpr int64_t run_columns = width * longest;  // of as many chunks as there are lanes

// x for every run, row and column of a chunk: a float for each lane.
struct LaneRows {
    float* x;
    int64_t rows;

    METATE_FN float* at(int64_t number, int64_t row) const { return x + (number * rows + row) * run_columns; }
};

inline void spread(const LaneRows& to, const PackedRows& from, int64_t columns, const Runtime& runtime) {
    for_pieces(runtime, ceil_div(columns, run_columns) * to.rows, [&](int, int64_t i) {
        float* const x = to.at(i / to.rows, i % to.rows);
        for (int lane = 0; lane < width; ++lane) {
            const int64_t column = i / to.rows * run_columns + chunk_in(lane) * longest;
            const float* line = column < columns ? from.line(column / block, i % to.rows) + column % block : nullptr;
            for (int64_t j = 0; j < longest; ++j) x[j * width + lane] = line ? line[j] : 0.0f;
        }
    });
}

// The sums of some runs of a panel, for every row of x.
struct ChunkSums {
    float* sums;
    int64_t rows;

    // Of `width` rows of W, the first or the second half of the panel: a vector a row, later a vector a chunk.
    METATE_FN float* at(int64_t number, int64_t row, int64_t half) const {
        return sums + ((number * rows + row) * 2 + half) * width * width;
    }
};
constexpr int64_t runs_at_once = blocks_at_once * block / run_columns;
constexpr int64_t most_chunk_sums = runs_at_once * few_rows * panel * width;

// What finds values in dwords of codes, column j of a chunk.
template <Values::Kind kind>
struct Finder {
    const Values& values;
    Table16 table;

    explicit Finder(const Values& v) : values(v), table(table16(v.entries)) {}
    METATE_FN vf operator()(const vi (&words)[4], int j) const {
        return value_in<4, kind>(words[j / 8], words[j / 8], j % 8 * 4, values, table);
    }
};

// Part i of four of a run.
METATE_FN vi part_of(const uint8_t* codes, int i, int64_t left) {
    constexpr int part = 4 * width;
    return left >= 4 * part ? load(reinterpret_cast<const int32_t*>(codes + i * part))
                            : load_bytes(codes + i * part, larger(left - i * part, 0));
}

// The sums of run `number` of those read, of `lines` rows of W.
template <Values::Kind kind, int rows, int lines>
METATE_FN void sum_run(vf (&sums)[lines][rows], const uint8_t* const (&codes)[lines], const Reading& reading,
                       int64_t number, Ahead& ahead, const float* x, const Finder<kind>& find) {
    constexpr int bytes = width * longest / 2, fetches = lines * bytes / 64, apart = longest / fetches;
    const int64_t left = reading.bytes_left(number * bytes);
    vi words[lines][4];
#pragma GCC unroll 4
    for (int r = 0; r < lines; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) sums[r][m] = splat(0.0f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) words[r][i] = part_of(codes[r], i, left);
        transpose_parts(words[r]);
    }
#pragma GCC unroll 32
    for (int j = 0; j < longest; ++j) {
        if (j % apart == 0) ahead.fetch();
        vf value[lines];
#pragma GCC unroll 4
        for (int r = 0; r < lines; ++r) value[r] = find(words[r], j);
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) {
            const vf a = load(x + (m * longest + j) * width);
#pragma GCC unroll 4
            for (int r = 0; r < lines; ++r) sums[r][m] = add_product(sums[r][m], a, value[r]);
        }
    }
}

template <Values::Kind kind, int rows>
__attribute__((noinline)) void sum_chunks(const ChunkSums& to, const Reading& reading, const LaneRows& x,
                                          const Values& values) {
    constexpr int lines = 2;
    const Finder<kind> find(values);
    const int64_t first = reading.first_block * block / run_columns,
                  runs = ceil_div(reading.blocks * block, run_columns);
    for (int i = 0; i < panel; i += lines) {
        const uint8_t* codes[lines];
        for (int r = 0; r < lines; ++r) codes[r] = reading.line(i + r);
        Ahead ahead(reading, i);
        for (int64_t number = 0; number < runs; ++number) {
            vf sums[lines][rows];
            sum_run<kind, rows, lines>(sums, codes, reading, number, ahead, x.at(first + number, 0), find);
            for (int r = 0; r < lines; ++r) {
                for (int m = 0; m < rows; ++m) store(to.at(number, m, i / width) + (i + r) % width * width, sums[r][m]);
                codes[r] += run_columns / 2;
            }
        }
    }
    for (int64_t i = 0; i < runs * rows * 2; ++i) {
        float* const square = to.sums + i * width * width;
        vf lanes[width];
        for (int r = 0; r < width; ++r) lanes[r] = load(square + r * width);
        transpose(lanes);
        for (int lane = 0; lane < width; ++lane) store(square + chunk_in(lane) * width, lanes[lane]);
    }
}

template <int rows = few_rows>
METATE_FN void sum_chunks_of(const ChunkSums& to, const Reading& reading, const LaneRows& x, const Values& values) {
    if constexpr (rows > 1) {
        if (to.rows < rows) return sum_chunks_of<rows - 1>(to, reading, x, values);
    }
    values.kind == Values::table ? sum_chunks<Values::table, rows>(to, reading, x, values)
                                 : sum_chunks<Values::whole, rows>(to, reading, x, values);
}

// Adds the sums of the chunks of one block, number k of those read, to the totals: add_sum, but a total stays in its
// register meanwhile. The tile is taken by value: no store to the totals can change it.
inline void add_chunks(const ChunkSums& from, int64_t k, const Tile t) {
    for (int m = 0; m < from.rows; ++m) {
        for (int v = 0; v < 2; ++v) {
            float* const at = t.total + m * panel + v * width;
            vf total = load(at);
            for (int c = 0; c < t.plan->count; ++c) {
                const int64_t chunk = (k * block + t.plan->chunks[c].begin) / longest;
                const int64_t scale = (t.plan->chunks[c].group - t.first_group) * panel + v * width;
                const vf sum = load(from.at(chunk / width, m, v) + chunk % width * width);
                total = fma(sum, load(t.scales + scale), total);
                if (t.corrections && t.plan->chunks[c].is_last)
                    total = fma(splat(t.sums[m * t.sums_stride + c]), load(t.corrections + scale), total);
            }
            store(at, total);
        }
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
