// The small products of low-rank updates: x Aᵀ by adapter, and the gradients of A and B, sums over each adapter's rows.
#include "host.h"

namespace metate::cuda {
namespace {

using namespace lowbit;

// x Aᵀ: a block makes 16 rows and 16 ranks; its warps take parts of 32 columns in turn, and their sums are added in
// their order. Thread t of a quad multiplies columns 8·t … 8·t + 7 of a part.

constexpr int shrink_threads = 256, shrink_warps = shrink_threads / 32, shrink_rows = 16, shrink_ranks = 16;

struct Shrink {
    View<2> x;
    View<3> a;
    View<1> ids;
    View<2> out;
    int rows, columns, rank, adapters;
    bool x_vectors, a_vectors;  // whether eight neighbouring numbers of T can be read at once
};

template <typename T>
METATE_DEVICE Words<4> load_eight(const void* data, DType dtype, int64_t line, int64_t stride, int column, int columns,
                                  bool vectors) {
    if (vectors && column + 8 <= columns) return load_global<Words<4>>(static_cast<const T*>(data) + line + column);
    uint32_t first[2], second[2];
    load_four<T>(first, data, dtype, line, stride, column, columns, 1.f);
    load_four<T>(second, data, dtype, line, stride, column + 4, columns, 1.f);
    return {{first[0], first[1], second[0], second[1]}};
}

template <typename T>
METATE_DEVICE void sum_columns(float (&sum)[2][4], const Shrink& f, int first, int first_rank, int adapter) {
    const int g = lane() >> 2, t = lane() & 3;
    METATE_NO_UNROLL
    for (int k = warp() * 32; k < f.columns; k += shrink_warps * 32) {
        Words<4> x[2], a[2];
        METATE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int row = first + i * 8 + g, rank = first_rank + i * 8 + g;
            x[i] = load_eight<T>(f.x.data, f.x.dtype, row * f.x.stride[0], f.x.stride[1], k + 8 * t,
                                 row < f.rows ? f.columns : 0, f.x_vectors);
            a[i] = load_eight<T>(f.a.data, f.a.dtype, adapter * f.a.stride[0] + rank * f.a.stride[1], f.a.stride[2],
                                 k + 8 * t, rank < f.rank ? f.columns : 0, f.a_vectors);
        }
        METATE_UNROLL
        for (int s = 0; s < 2; ++s) {
            METATE_UNROLL
            for (int i = 0; i < 2; ++i) {
                mma_m16n8k16<T>(sum[i], {x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1]},
                                {a[i][2 * s], a[i][2 * s + 1]});
            }
        }
    }
}

template <typename T>
METATE_KERNEL(shrink_threads, 1)
shrink_kernel(METATE_PARAMETER(Shrink, f)) {
    METATE_SHARED(unsigned char, shared);
    const int first = block_index().x * shrink_rows, first_rank = block_index().y * shrink_ranks;
    const int thread = thread_index(), row = first + thread / shrink_ranks, rank = first_rank + thread % shrink_ranks;
    const int own = row < f.rows ? adapter_of(f.ids, f.adapters, row) : -1;
    float result = 0.f;
    METATE_NO_UNROLL
    for (int adapter = -1;;) {
        adapter = next_adapter(f.ids, f.adapters, first, least(shrink_rows, f.rows - first), adapter);
        if (adapter == no_adapter) break;
        float sum[2][4] = {};
        sum_columns<T>(sum, f, first, first_rank, adapter);
        sync_threads();
        METATE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int to = ((lane() >> 2) + i % 4 / 2 * 8) * shrink_ranks + i / 4 * 8 + (lane() & 3) * 2 + i % 2;
            store_shared(shared + (warp() * shrink_threads + to) * 4, sum[i / 4][i % 4]);
        }
        sync_threads();
        if (own != adapter) continue;
        METATE_UNROLL
        for (int w = 0; w < shrink_warps; ++w) result += load_shared<float>(shared + (w * shrink_threads + thread) * 4);
    }
    if (row >= f.rows || rank >= f.rank) return;
    store_global(static_cast<float*>(f.out.data) + row * f.out.stride[0] + rank * f.out.stride[1], result);
}

// Sums over the rows of an adapter: a thread makes one column of eight ranks, from a slice of the rows; slices are
// added afterwards, in their order.

constexpr int outer_threads = 128, outer_ranks = 8;

struct Outer {
    View<2> x, low;
    View<1> ids;
    View<3> out;
    float* partial;  // (slices, adapters, rank, columns)
    int rows, columns, rank, adapters, slice_rows, slices;
};

template <typename T>
METATE_KERNEL(outer_threads, 1)
outer_kernel(METATE_PARAMETER(Outer, f)) {
    const int column = block_index().x * outer_threads + thread_index(), adapter = block_index().z / f.slices;
    const int first_rank = block_index().y * outer_ranks, slice = block_index().z % f.slices;
    if (column >= f.columns) return;
    float sum[outer_ranks] = {};
    METATE_NO_UNROLL
    for (int row = slice * f.slice_rows; row < least(f.rows, (slice + 1) * f.slice_rows); ++row) {
        if (adapter_of(f.ids, f.adapters, row) != adapter) continue;
        const T* const from = static_cast<const T*>(f.x.data) + row * f.x.stride[0] + column * f.x.stride[1];
        const float x = to_float(load_global<T>(from));
        const float* const low = static_cast<const float*>(f.low.data) + row * f.low.stride[0];
        METATE_UNROLL
        for (int r = 0; r < outer_ranks; ++r)
            if (first_rank + r < f.rank)
                sum[r] = fmaf(load_global<float>(low + (first_rank + r) * f.low.stride[1]), x, sum[r]);
    }
    float* const to = f.partial + ((static_cast<int64_t>(slice) * f.adapters + adapter) * f.rank) * f.columns + column;
    METATE_UNROLL
    for (int r = 0; r < outer_ranks; ++r)
        if (first_rank + r < f.rank) store_global(to + static_cast<int64_t>(first_rank + r) * f.columns, sum[r]);
}

METATE_KERNEL(256, 1)
add_outers_kernel(METATE_PARAMETER(Outer, f)) {
    const int64_t index = static_cast<int64_t>(block_index().x) * 256 + thread_index();
    const int64_t size = static_cast<int64_t>(f.adapters) * f.rank * f.columns;
    if (index >= size) return;
    float sum = 0.f;
    for (int s = 0; s < f.slices; ++s) sum += load_global<float>(f.partial + s * size + index);
    const int64_t column = index % f.columns, rank = index / f.columns % f.rank, adapter = index / f.columns / f.rank;
    store_global(
        static_cast<float*>(f.out.data) + adapter * f.out.stride[0] + rank * f.out.stride[1] + column * f.out.stride[2],
        sum);
}

// Whether every line begins at a multiple of 16 bytes; strides of a dimension that is not walked do not count.
template <int n>
bool has_vectors(const View<n>& view, DType dtype) {
    bool found = view.dtype == dtype && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[n - 1] == 1;
    for (int i = 0; i + 1 < n; ++i) found = found && (view.size[i] <= 1 || view.stride[i] % 8 == 0);
    return found;
}

void require_small(const char* op, const View<2>& x, int64_t rank, int64_t adapters) {
    constexpr int64_t limit = int64_t{1} << 27;
    if (x.dtype != DType::bf16 && x.dtype != DType::f16) refuse(op, "x is neither bfloat16 nor float16");
    if (x.size[0] >= limit || x.size[1] >= limit) refuse(op, "more than 2^27 rows or columns");
    if (rank >= 1 << 18 || adapters >= 1 << 12) refuse(op, "a rank of 2^18 or 4096 adapters");
}

}  // namespace

void lora_shrink(const LoraShrink& call, const Device& device) {
    require_small("lora_shrink", call.x, call.a.size[1], call.a.size[0]);
    const Shrink f{call.x,
                   call.a,
                   call.ids,
                   call.out,
                   static_cast<int>(call.x.size[0]),
                   static_cast<int>(call.x.size[1]),
                   static_cast<int>(call.a.size[1]),
                   static_cast<int>(call.a.size[0]),
                   has_vectors(call.x, call.x.dtype),
                   has_vectors(call.a, call.x.dtype)};
    const Dim3 grid{static_cast<int>(ceil_div(f.rows, shrink_rows)), static_cast<int>(ceil_div(f.rank, shrink_ranks)),
                    1};
    const auto kernel = call.x.dtype == DType::bf16 ? shrink_kernel<bf16> : shrink_kernel<f16>;
    launch(kernel, grid, shrink_threads, shrink_warps * shrink_threads * 4, device.stream, f);
}

void lora_outer(const LoraOuter& call, const Device& device) {
    constexpr int64_t blocks_wanted = 1024, least_rows = 64, most_slices = 64;
    const int64_t adapters = call.out.size[0], rank = call.out.size[1], rows = call.x.size[0];
    require_small("lora_outer", call.x, rank, adapters);
    const int64_t columns = call.x.size[1], size = adapters * rank * columns;
    if (size == 0) return;
    const Dim3 tiles{static_cast<int>(ceil_div(columns, outer_threads)), static_cast<int>(ceil_div(rank, outer_ranks)),
                     1};
    int64_t slices = ceil_div(blocks_wanted, tiles.x * tiles.y * adapters);
    if (slices > ceil_div(rows, least_rows)) slices = ceil_div(rows, least_rows);
    if (slices > most_slices) slices = most_slices;
    if (slices * adapters > 65535) slices = 65535 / adapters;
    if (slices < 1) slices = 1;
    const auto bytes = static_cast<size_t>(slices * size) * sizeof(float);
    const Outer f{call.x,
                  call.low,
                  call.ids,
                  call.out,
                  static_cast<float*>(device.scratch(bytes, device.context)),
                  static_cast<int>(rows),
                  static_cast<int>(columns),
                  static_cast<int>(rank),
                  static_cast<int>(adapters),
                  static_cast<int>(ceil_div(rows, slices)),
                  static_cast<int>(slices)};
    const auto kernel = call.x.dtype == DType::bf16 ? outer_kernel<bf16> : outer_kernel<f16>;
    launch(kernel, {tiles.x, tiles.y, static_cast<int>(slices * adapters)}, outer_threads, 0, device.stream, f);
    if (ceil_div(size, 256) > 0x7fffffff) refuse("lora_outer", "more than 2^39 results");
    launch(add_outers_kernel, {static_cast<int>(ceil_div(size, 256)), 1, 1}, 256, 0, device.stream, f);
}

}  // namespace metate::cuda
