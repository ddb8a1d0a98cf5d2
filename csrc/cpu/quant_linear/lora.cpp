// The small products of low-rank updates: x Aᵀ by adapter, and the gradients of A and B, sums over each adapter's rows.
#include "../strided.h"
#include "exact.h"
#include "product.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t slice = 512;       // columns of x that are summed by themselves
constexpr int64_t shrink_rows = 32;  // rows of x that share a square of A

// x Aᵀ.

// Adds slice `number` of the sums of `rows` rows to zeroed `sums`, `pitch` floats apart.
template <class T>
void add_slice(const LoraShrink& call, int64_t number, int64_t first, int64_t rows, float* sums, int64_t pitch) {
    const int64_t adapters = call.a.size[0], rank = call.a.size[1];
    const int64_t last = smaller(call.x.size[1], (number + 1) * slice);
    for (int64_t begin = first, end; begin < first + rows; begin = end) {
        end = end_of_run(call.ids, adapters, begin, first + rows);
        const int64_t adapter = adapter_of(call.ids, adapters, begin);
        if (adapter < 0) continue;
        const View<2> a = matrix_of(call.a, adapter);
        for (int64_t r = 0; r < rank; r += width) {
            for (int64_t k = number * slice; k < last; k += width) {
                vf square[width];
                load_square(square, a, {}, r, k);
                for (int64_t m = begin; m < end; ++m) {
                    const T* const x = static_cast<const T*>(call.x.data) + m * call.x.stride[0] + k * call.x.stride[1];
                    float line[width];
                    store(line, load_any(x, call.x.stride[1], last - k));
                    vf even = splat(0.0f), odd = even;
#pragma GCC unroll 8
                    for (int i = 0; i < width; i += 2) {
                        even = fma(splat(line[i]), square[i], even);
                        odd = fma(splat(line[i + 1]), square[i + 1], odd);
                    }
                    float* const sum = sums + (m - first) * pitch + r;
                    store(sum, load(sum) + (even + odd));
                }
            }
        }
    }
}

METATE_FN void clear(float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += width) store(to + i, splat(0.0f));
}

METATE_FN void add_to_row(const LoraShrink& call, int64_t row, const float* sums) {
    float* const out = static_cast<float*>(call.out.data) + row * call.out.stride[0];
    for (int64_t i = 0; i < call.out.size[1]; ++i) out[i * call.out.stride[1]] += sums[i];
}

METATE_FN void clear_row(const LoraShrink& call, int64_t row) {
    float* const out = static_cast<float*>(call.out.data) + row * call.out.stride[0];
    for (int64_t i = 0; i < call.out.size[1]; ++i) out[i * call.out.stride[1]] = 0;
}

// Few rows are shared out by slices, many by rows; slices are added in one order either way.
template <class T>
void shrink(const LoraShrink& call, const Runtime& runtime) {
    const int64_t rows = call.x.size[0], rank = call.a.size[1], pitch = round_up(rank, width);
    const int64_t slices = ceil_div(call.x.size[1], slice), few = 16;
    const int64_t row_pieces = ceil_div(rows, shrink_rows), pieces = rows <= few ? slices : row_pieces;
    const int64_t piece_floats = smaller(rows, shrink_rows) * pitch;
    const Runtime workers = worth(runtime, rows * call.x.size[1] * rank);
    const int64_t blocks = rows <= few ? slices : workers_of(workers, pieces);
    float* const sums =
        static_cast<float*>(runtime.scratch(static_cast<size_t>(blocks * piece_floats) * sizeof(float)));
    for (int64_t m = 0; m < rows; ++m) clear_row(call, m);
    for_pieces(workers, pieces, [&](int worker, int64_t piece) {
        float* const mine = sums + (rows <= few ? piece : worker) * piece_floats;
        const int64_t first = rows <= few ? 0 : piece * shrink_rows, n = smaller(shrink_rows, rows - first);
        for (int64_t s = rows <= few ? piece : 0; s < (rows <= few ? piece + 1 : slices); ++s) {
            clear(mine, n * pitch);
            add_slice<T>(call, s, first, n, mine, pitch);
            for (int64_t m = 0; m < n && rows > few; ++m) add_to_row(call, first + m, mine + m * pitch);
        }
    });
    for (int64_t s = 0; s < slices && rows <= few; ++s)
        for (int64_t m = 0; m < rows; ++m) add_to_row(call, m, sums + s * piece_floats + m * pitch);
}

// Sums over the rows of an adapter.

// Rows by adapter, ascending: those of adapter a are rows[starts[a]] … rows[starts[a + 1] - 1].
struct Grouped {
    int64_t *rows, *starts;
};

inline void group(const Grouped& to, const View<1>& ids, int64_t adapters, int64_t rows) {
    for (int64_t a = 0; a <= adapters; ++a) to.starts[a] = 0;
    for (int64_t m = 0; m < rows; ++m) {
        const int64_t adapter = adapter_of(ids, adapters, m);
        if (adapter >= 0) ++to.starts[adapter + 1];
    }
    for (int64_t a = 0; a < adapters; ++a) to.starts[a + 1] += to.starts[a];
    for (int64_t m = 0; m < rows; ++m) {
        const int64_t adapter = adapter_of(ids, adapters, m);
        if (adapter >= 0) to.rows[to.starts[adapter]++] = m;
    }
    for (int64_t a = adapters; a > 0; --a) to.starts[a] = to.starts[a - 1];
    to.starts[0] = 0;
}

constexpr int outer_vectors = 4, outer_ranks = width == 16 ? 4 : 2;
constexpr int64_t outer_columns = outer_vectors * width;

// Σ low[m, r …]ᵀ x[m, k …] over n ≤ `longest` rows, added to `sums` of outer_ranks × outer_columns.
template <class T>
void add_rows(const LoraOuter& call, const int64_t* rows, int64_t n, int64_t r, int64_t k, float* sums) {
    const int64_t ranks = smaller(outer_ranks, call.low.size[1] - r), left = call.x.size[1] - k;
    const bool whole = left >= outer_columns && call.x.stride[1] == 1;
    vf sum[outer_ranks][outer_vectors];
#pragma GCC unroll 4
    for (int i = 0; i < outer_ranks; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < outer_vectors; ++v) sum[i][v] = splat(0.0f);
    }
    for (int64_t m = 0; m < n; ++m) {
        const T* const x = static_cast<const T*>(call.x.data) + rows[m] * call.x.stride[0] + k * call.x.stride[1];
        float factors[outer_ranks] = {};
        for (int64_t i = 0; i < ranks; ++i) factors[i] = number_at<float>(call.low, rows[m], r + i);
#pragma GCC unroll 4
        for (int v = 0; v < outer_vectors; ++v) {
            const vf part = whole ? load(x + v * width)
                                  : load_any(x + v * width * call.x.stride[1], call.x.stride[1],
                                             left > v * width ? left - v * width : 0);
#pragma GCC unroll 4
            for (int i = 0; i < outer_ranks; ++i) sum[i][v] = fma(splat(factors[i]), part, sum[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < outer_ranks; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < outer_vectors; ++v) {
            float* const at = sums + i * outer_columns + v * width;
            store(at, load(at) + sum[i][v]);
        }
    }
}

template <class T>
void outer(const LoraOuter& call, const Runtime& runtime) {
    const int64_t adapters = call.out.size[0], rank = call.out.size[1], columns = call.out.size[2];
    const int64_t rows = call.x.size[0], tiles = ceil_div(columns, outer_columns);
    if (rank == 0 || columns == 0) return;  // however many adapters
    const int64_t pitch = round_up(rank, outer_ranks) * outer_columns;
    const Runtime workers = worth(runtime, rows * columns * rank);
    Grouped grouped{};
    const auto own = lay_out(
        workers, adapters * tiles,
        [&](Arena& arena) {
            grouped.rows = arena.take<int64_t>(rows);
            grouped.starts = arena.take<int64_t>(adapters + 1);
        },
        [&](Arena& arena) { return arena.take<float>(pitch); });
    group(grouped, call.ids, adapters, rows);
    for_pieces(workers, adapters * tiles, [&](int worker, int64_t piece) {
        const int64_t adapter = piece / tiles, k = piece % tiles * outer_columns, last = grouped.starts[adapter + 1];
        float* const sums = own(worker);
        clear(sums, pitch);
        for (int64_t m = grouped.starts[adapter]; m < last; m += longest) {
            for (int64_t r = 0; r < rank; r += outer_ranks)
                add_rows<T>(call, grouped.rows + m, smaller(longest, last - m), r, k, sums + r * outer_columns);
        }
        float* const out = static_cast<float*>(call.out.data) + adapter * call.out.stride[0] + k * call.out.stride[2];
        for (int64_t r = 0; r < rank; ++r)
            for (int64_t i = 0; i < smaller(outer_columns, columns - k); ++i)
                out[r * call.out.stride[1] + i * call.out.stride[2]] = sums[r * outer_columns + i];
    });
}

#if defined(METATE_ISA_BASELINE)
inline void shrink_exact(const LoraShrink& call, const Runtime& runtime) {
    for_pieces(runtime, call.x.size[0], [&](int, int64_t m) {
        const int64_t adapter = adapter_of(call.ids, call.a.size[0], m);
        for (int64_t r = 0; r < call.a.size[1]; ++r) {
            double sum = 0;
            for (int64_t k = 0; adapter >= 0 && k < call.x.size[1]; ++k)
                sum += exact_at(call.x, m, k) * exact_at(matrix_of(call.a, adapter), r, k);
            static_cast<double*>(call.out.data)[m * call.out.stride[0] + r * call.out.stride[1]] = sum;
        }
    });
}

inline void outer_exact(const LoraOuter& call, const Runtime& runtime) {
    const int64_t adapters = call.out.size[0], rank = call.out.size[1];
    if (rank == 0 || call.out.size[2] == 0) return;
    for_pieces(runtime, adapters * rank, [&](int, int64_t piece) {
        const int64_t adapter = piece / rank, r = piece % rank;
        double* const out = static_cast<double*>(call.out.data) + adapter * call.out.stride[0] + r * call.out.stride[1];
        for (int64_t k = 0; k < call.out.size[2]; ++k) out[k * call.out.stride[2]] = 0;
        for (int64_t m = 0; m < call.x.size[0]; ++m) {
            if (adapter_of(call.ids, adapters, m) != adapter) continue;
            const double factor = exact_at(call.low, m, r);
            for (int64_t k = 0; k < call.out.size[2]; ++k)
                out[k * call.out.stride[2]] += factor * exact_at(call.x, m, k);
        }
    });
}
#endif

}  // namespace

void lora_shrink(const LoraShrink& call, const Runtime& runtime) {
    switch (call.x.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            return shrink_exact(call, runtime);
#endif
        case DType::bf16:
            return shrink<bf16>(call, runtime);
        case DType::f16:
            return shrink<f16>(call, runtime);
        default:
            return shrink<float>(call, runtime);
    }
}

void lora_outer(const LoraOuter& call, const Runtime& runtime) {
    switch (call.x.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            return outer_exact(call, runtime);
#endif
        case DType::bf16:
            return outer<bf16>(call, runtime);
        case DType::f16:
            return outer<f16>(call, runtime);
        default:
            return outer<float>(call, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(lora_shrink, LoraShrink, p.x.dtype)
METATE_DISPATCH(lora_outer, LoraOuter, p.x.dtype)
