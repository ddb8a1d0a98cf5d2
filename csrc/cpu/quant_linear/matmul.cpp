// x W, the gradient of x Wᵀ: whole weights, scales included, in panels of W's columns.
#include "exact.h"
#include "low_rank.h"
#include "product.h"

namespace metate::cpu::METATE_ISA {
namespace {

struct Workspace {
    int32_t* words;
    float *strip, *values, *totals, *scales, *corrections;
};

struct Problem {
    QuantMatmul call;
    Values values;
    PackedRows x;  // its columns are the rows of W
    int64_t blocks, rows_at_once;

    explicit Problem(const QuantMatmul& c)
        : call(c),
          values(values_of(c.w)),
          x{nullptr, nullptr, c.x.size[0], ceil_div(c.w.rows, block), 0},
          blocks(ceil_div(c.w.rows, block)) {
        rows_at_once = smaller(128, x.rows);
    }
    Workspace workspace(Arena& arena) const {
        Workspace at{};
        at.words = arena.take<int32_t>(most_words);
        at.strip = arena.take<float>(block * width);
        at.values = arena.take<float>(block * block);
        at.totals = arena.take<float>(rows_at_once * block);
        at.scales = arena.take<float>((block + width) * width);
        at.corrections = arena.take<float>((block + width) * width);
        return at;
    }
};

// W[row … row + width, block k], a row of a panel for every row of W: (panel number, row, lane).
void decode_strip(const Problem& p, const Workspace& at, int64_t row, int64_t k, float* to) {
    const LowBitMatrix& w = p.call.w;
    const int64_t columns = smaller(block, w.columns - k * block), first_group = k * block / w.group_size;
    transpose_words(at.words, w, row, k, bytes_ahead(w, k));
    decode(at.strip, width, at.words, columns, w.bits, p.values);
    float* const corrections = has_corrections(w) ? at.corrections : nullptr;
    load_scales(at.scales, corrections, has_own_centers(w), width, w, p.values.center, row, first_group,
                (k * block + columns - 1) / w.group_size - first_group + 1);
    scale_values(at.strip, at.scales, corrections, has_own_centers(w), width, k * block, columns, w.group_size);
    for (int64_t c = columns; c < round_up(columns, width); ++c) store(at.strip + c * width, splat(0.0f));
    for (int64_t c = 0; c < columns; c += width) {
        vf square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load(at.strip + (c + i) * width);
        transpose(square);
        float* const out = to + c / panel * block * panel + c % panel;
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) store(out + i * panel, square[i]);
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
    const int64_t panels = ceil_div(smaller(block, w.columns - k * block), panel);
    for (int64_t x_row = 0; x_row < p.x.rows; x_row += p.rows_at_once) {
        const int64_t rows = smaller(p.rows_at_once, p.x.rows - x_row);
        for (int64_t i = 0; i < panels * rows * panel; i += width) store(at.totals + i, splat(0.0f));
        for (int64_t n = 0; n < p.blocks; ++n) {
            Chunk chunks[block];
            const BlockPlan plan{chunks, chunks_of(chunks, w.rows, w.rows, n), 0, 0};
            for (int64_t row = n * block; row < smaller(w.rows, (n + 1) * block); row += width)
                decode_strip(p, at, row, k, at.values + (row - n * block) * panel);
            for (int64_t i = 0; i < panels; ++i) {
                Tile tile{};
                tile.stride = p.x.stride(n);
                tile.values = at.values + i * block * panel;
                tile.plan = &plan;
                tile.blocks = 1;
                tile.most_columns = longest;
                tile.total = at.totals + i * rows * panel;
                multiply<Unit::floats, false>(p.x, n, x_row, rows, tile);
            }
        }
        for (int64_t i = 0; i < panels; ++i) {
            float* const totals = at.totals + i * rows * panel;
            add_low_rank(p.call.update, w.permutation, totals, panel, k * block + i * panel, x_row, rows);
            write<T>(p.call, totals, k * block + i * panel, x_row, rows);
        }
    }
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
            for (int64_t i = 0; i < all.count; ++i) {
                Problem p(all.calls[i]);
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
    switch (all.calls->x.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            for (int64_t i = 0; i < all.count; ++i) matmul_exact(all.calls[i], runtime);
            return;
#endif
        case DType::bf16:
            return run<bf16>(all, runtime);
        case DType::f16:
            return run<f16>(all, runtime);
        default:
            return run<float>(all, runtime);
    }
}

void quant_matmul(const QuantMatmul& call, const Runtime& runtime) {
    METATE_ISA::quant_matmuls({&call, 1}, runtime);
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(quant_matmuls, QuantMatmuls, p.calls->x.dtype)
METATE_DISPATCH(quant_matmul, QuantMatmul, p.x.dtype)
