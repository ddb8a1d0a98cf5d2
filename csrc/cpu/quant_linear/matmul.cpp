// x W, the gradient of x Wᵀ: whole weights, scales included, in panels of W's columns, rounded to bfloat16 where pairs
// of them are multiplied.
#include "../strided.h"
#include "exact.h"
#include "low_rank.h"
#include "product.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr Unit unit = only_bf16 ? Unit::pairs : Unit::floats;
constexpr int64_t blocks_together = only_bf16 ? span : 1;  // of W's rows
constexpr int64_t panel_floats = blocks_together * block / columns_in<unit> * panel;
constexpr int64_t most_rows_at_once = only_bf16 ? 512 : 128;  // of x, for which W is decoded once

struct Workspace {
    int32_t* words;
    float *strip, *values, *totals, *scales, *corrections;
};

struct Problem {
    QuantMatmul call;
    Values values;
    PackedRows x;  // its columns are the rows of W
    BlockPlan* plans;
    int64_t blocks, rows_at_once;
    bool scales_entries;  // before they are looked up, in vectors of columns that have one scale

    explicit Problem(const QuantMatmul& c)
        : call(c),
          values(values_of(c.w)),
          x{nullptr, nullptr, c.x.size[0], ceil_div(c.w.rows, block), 0},
          plans(nullptr),
          blocks(ceil_div(c.w.rows, block)),
          rows_at_once(smaller(most_rows_at_once, c.x.size[0])),
          scales_entries(only_bf16 && c.w.bits == 4 && (c.w.group_size % width == 0 || c.w.group_size >= c.w.columns)) {
        x.unit = unit;
        if (unit == Unit::pairs) x.most_columns = block;
    }
    Workspace workspace(Arena& arena) const {
        Workspace at{};
        at.words = arena.take<int32_t>(most_words);
        at.strip = arena.take<float>(block * width);
        at.values = arena.take<float>(block / panel * panel_floats);
        at.totals = arena.take<float>(rows_at_once * block);
        at.scales = arena.take<float>((block + width) * width);
        at.corrections = arena.take<float>((block + width) * width);
        return at;
    }
};

// The columns of block k of W and the groups that they are in.
struct Columns {
    int64_t k, first, count, first_group, groups;
    Columns(const LowBitMatrix& w, int64_t number)
        : k(number),
          first(k * block),
          count(smaller(block, w.columns - first)),
          first_group(first / w.group_size),
          groups((first + count - 1) / w.group_size - first_group + 1) {}
};

#if defined(METATE_HAS_BF16_DOT)

// The first row of pair number i, and how far the second one is from it: as PackedRows has x.
constexpr int first_of_pair(int i) {
    return i / 4 * unit_columns + i % 4;
}
constexpr int apart = unit_columns / 2;

// The first n rows; zeros in the place of others, which are multiplied with zeros.
METATE_FN void store_strip(float* to, const vf (&rows)[width], int64_t n) {
    const auto row = [&](int i) { return i < n ? rows[i] : splat(0.0f); };
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i)
        store(to + i * panel, as_float(narrow_zip(row(first_of_pair(i)), row(first_of_pair(i) + apart))));
}

// The codes of a block of `width` rows of 4 bits, a row a vector, and asks for those of rows to come.
inline void load_codes(vi (&rows)[width], const LowBitMatrix& w, int64_t row, int64_t k, int64_t columns) {
    const uint8_t* const codes = codes_at(w, row, k);
    const int64_t pitch = w.in_tiles() ? rows_of_tile * 4 : w.row_bytes(), ahead = 2 * width * w.row_bytes();
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) __builtin_prefetch(codes + ahead + i * pitch);
    if (!w.in_tiles()) {
        for (int i = 0; i < width; ++i)
            rows[i] = row + i < w.rows ? load_bytes(codes + i * pitch, ceil_div(columns, 2)) : splat(0);
        return;
    }
    vf square[width];
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i)
        square[i] = i * unit_columns < columns ? load(reinterpret_cast<const float*>(codes + i * pitch)) : splat(0.0f);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = as_int(square[i]);
}

METATE_FN vf scale_entries(vf entries, float scale, float correction, bool before) {
    return before ? (entries + splat(correction)) * splat(scale) : fma(entries, splat(scale), splat(correction));
}

// What decode_strip does, where entries may be scaled.
[[gnu::noinline]] void look_up_strip(const Problem& p, int64_t row, const Columns& columns, float* to) {
    const LowBitMatrix& w = p.call.w;
    const bool before = has_own_centers(w);
    vi codes[width];
    vf scales[width], corrections[width];
    load_codes(codes, w, row, columns.k, columns.count);
    load_scale_rows(scales, corrections, has_corrections(w), before, w, p.values.center, row, columns.first_group,
                    columns.groups);
    float scale[width][width], correction[width][width];
    for (int i = 0; i < width; ++i) store(scale[i], scales[i]), store(correction[i], corrections[i]);
    for (int i = 0; i < width / 2; ++i, to += panel) {
        const int a = first_of_pair(i), b = a + apart;
        const auto entries_of = [&](int r) { return row + r < w.rows ? load(p.values.entries) : splat(0.0f); };
        const vf of_a = entries_of(a), of_b = entries_of(b);
        int64_t end = (columns.first_group + 1) * w.group_size - columns.first;
        for (int64_t g = 0, c = 0; g < columns.groups; ++g, end += w.group_size) {
            const vi tables = narrow_pairs(scale_entries(of_a, scale[a][g], correction[a][g], before),
                                           scale_entries(of_b, scale[b][g], correction[b][g], before));
            for (; c < smaller(end, columns.count); c += width)
                store(to + c / panel * panel_floats + c % panel,
                      as_float(lookup_row_pairs(tables, codes[a], codes[b], c / width)));
        }
    }
}

#else

METATE_FN void store_strip(float* to, const vf (&rows)[width], int64_t) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) store(to + i * panel, rows[i]);
}
inline void look_up_strip(const Problem&, int64_t, const Columns&, float*) {}

#endif

// Some columns of W[row … row + width], a word of a panel for every row of W or for two: (panel number, word, lane).
void decode_strip(const Problem& p, const Workspace& at, int64_t row, const Columns& columns, float* to) {
    const LowBitMatrix& w = p.call.w;
    if (row % panel == 0) fetch_levels(w, row + panel, columns.first_group);
    if (p.scales_entries) return look_up_strip(p, row, columns, to);
    transpose_words(at.words, w, row, columns.k, bytes_ahead(w, columns.k));
    decode(at.strip, width, at.words, columns.count, w.bits, p.values);
    float* const corrections = has_corrections(w) ? at.corrections : nullptr;
    load_scales(at.scales, corrections, has_own_centers(w), width, w, p.values.center, row, columns.first_group,
                columns.groups);
    scale_values(at.strip, at.scales, corrections, has_own_centers(w), width, columns.first, columns.count,
                 w.group_size);
    for (int64_t c = columns.count; c < round_up(columns.count, width); ++c) store(at.strip + c * width, splat(0.0f));
    for (int64_t c = 0; c < columns.count; c += width) {
        vf square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load(at.strip + (c + i) * width);
        transpose(square);
        store_strip(to + c / panel * panel_floats + c % panel, square, w.rows - row);
    }
}

template <class T>
void write(const QuantMatmul& call, const float* totals, int64_t column, int64_t first_x, int64_t rows) {
    const int64_t n = smaller(panel, call.w.columns - column);
    const int32_t* const order = static_cast<const int32_t*>(call.w.permutation.data);
    for (int64_t r = 0; r < rows; ++r, totals += panel) {
        T* const out = static_cast<T*>(call.out.data) + (first_x + r) * call.out.stride[0];
        if (!call.w.permutation) {
            store_line(out + column, totals, n);
            continue;
        }
        T line[panel];
        store_line(line, totals, n);
        for (int64_t i = 0; i < n; ++i) out[order[(column + i) * call.w.permutation.stride[0]]] = line[i];
    }
}

// `block` stored columns of the result.
template <class T>
void compute_piece(const Problem& p, const Workspace& at, int64_t k) {
    const LowBitMatrix& w = p.call.w;
    const Columns columns(w, k);
    const int64_t panels = ceil_div(columns.count, panel);
    for (int64_t x_row = 0; x_row < p.x.rows; x_row += p.rows_at_once) {
        const int64_t rows = smaller(p.rows_at_once, p.x.rows - x_row);
        if (p.blocks == 0)
            for (int64_t i = 0; i < panels * rows * panel; i += width) store(at.totals + i, splat(0.0f));
        for (int64_t n = 0; n < p.blocks; n += blocks_together) {
            const int64_t end = smaller(n + blocks_together, p.blocks);
            for (int64_t row = n * block; row < smaller(w.rows, end * block); row += width)
                decode_strip(p, at, row, columns, at.values + (row - n * block) / columns_in<unit> * panel);
            for (int64_t i = 0; i < panels; ++i) {
                Tile tile{};
                tile.stride = p.x.stride(n);
                tile.values = at.values + i * panel_floats;
                tile.plan = p.plans + n;
                tile.blocks = end - n;
                tile.most_columns = p.x.most_columns;
                tile.total = at.totals + i * rows * panel;
                tile.begins = n == 0;
                multiply<unit, false>(p.x, n, x_row, rows, tile);
            }
        }
        for (int64_t i = 0; i < panels; ++i) {
            float* const totals = at.totals + i * rows * panel;
            add_low_rank(p.call.update, w.permutation, totals, panel, k * block + i * panel, x_row, rows);
            write<T>(p.call, totals, k * block + i * panel, x_row, rows);
        }
    }
}

// How sums over the rows of W are cut, which all calls have in common.
BlockPlan* plan_sums(const Problem& p, Arena& arena) {
    BlockPlan* const plans = arena.take<BlockPlan>(p.blocks);
    const int64_t most = ceil_div(block, p.x.most_columns);
    Chunk* chunks = arena.take<Chunk>(p.blocks * most);
    for (int64_t n = 0; n < p.blocks && arena.base; ++n, chunks += most)
        plans[n] = {chunks, chunks_of(chunks, p.call.w.rows, p.call.w.rows, n, p.x.most_columns), 0, 0};
    return plans;
}

template <class T>
void run(const QuantMatmuls& all, const Runtime& runtime) {
    const QuantMatmul& most = with_most_rows(all);
    const Problem largest(most);
    const int64_t rows = most.w.rows, columns = most.w.columns, pieces = ceil_div(columns, block);
    if (largest.x.rows == 0 || columns == 0) return;
    const Runtime workers = worth(runtime, all.count * rows * columns);
    Problem* problems = nullptr;
    const auto own = lay_out(
        workers, workers.threads,
        [&](Arena& arena) {
            problems = arena.take<Problem>(all.count);
            BlockPlan* const plans = plan_sums(largest, arena);
            for (int64_t i = 0; i < all.count; ++i) {
                Problem p(all.calls[i]);
                p.plans = plans;
                p.x.x = arena.take<float>(p.x.size());
                if (arena.base) problems[i] = p;
            }
        },
        [&](Arena& arena) { return largest.workspace(arena); });
    for (int64_t i = 0; i < all.count; ++i)
        pack<T>(problems[i].x, all.calls[i].x, {}, 1, false, worth(runtime, problems[i].x.rows * rows));
    for_pieces(workers, all.count * pieces, [&](int worker, int64_t piece) {
        compute_piece<T>(problems[piece / pieces], own(worker), piece % pieces);
    });
}

}  // namespace

void quant_matmuls(const QuantMatmuls& all, const Runtime& runtime) {
#if defined(METATE_ISA_BASELINE)
    if (all.calls->x.dtype == DType::f64) {
        for (int64_t i = 0; i < all.count; ++i) matmul_exact(all.calls[i], runtime);
        return;
    }
#endif
    with_floats(all.calls->x.dtype, [&]<class T>() { run<T>(all, runtime); });
}

void quant_matmul(const QuantMatmul& call, const Runtime& runtime) {
    METATE_ISA::quant_matmuls({&call, 1}, runtime);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH_BF16(quant_matmuls, QuantMatmuls, p.calls->x.dtype)
METATE_DISPATCH_BF16(quant_matmul, QuantMatmul, p.x.dtype)
