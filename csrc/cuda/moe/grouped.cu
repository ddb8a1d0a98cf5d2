// Before the grouped products: the table of tiles, and rows of x made readable 16 bytes at a time.
#include "grouped.h"

namespace metate::cuda::moe {
namespace {

constexpr int threads = 256, rows_at_once = 64;

struct Gather {
    View<2> x, permutation;
    View<1> offsets;
    Order order;
    uint16_t* to;
    int64_t pitch;
    int rows, columns, experts, across;
};

METATE_DEVICE int expert_of(const Gather& f, int row) {
    int low = -1, high = f.experts + 1;  // the last whose first row is not behind this one
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offset_of(f.offsets, f.experts, f.rows, middle) <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Rows in the order of the columns that their experts store; rows of no expert are left as they are.
METATE_KERNEL(threads, 1)
gather_kernel(METATE_PARAMETER(Gather, f)) {
    const int column = block_index().x % f.across * threads + thread_index();
    const int first = block_index().x / f.across * rows_at_once;
    if (column >= f.columns) return;
    METATE_NO_UNROLL
    for (int row = first; row < least(first + rows_at_once, f.rows); ++row) {
        const int expert = expert_of(f, row), source = f.order(row);
        if (expert < 0 || expert >= f.experts) continue;
        const auto* const place = static_cast<const int32_t*>(f.permutation.data) + expert * f.permutation.stride[0] +
                                  column * f.permutation.stride[1];
        const int from = load_global<int32_t>(place);
        const auto* const x = static_cast<const uint16_t*>(f.x.data) + source * f.x.stride[0] + from * f.x.stride[1];
        store_global(f.to + row * f.pitch + column, source >= 0 ? load_global<uint16_t>(x) : uint16_t{0});
    }
}

}  // namespace

bool prepare(Grouped& f, const Call& c, int tile_rows, const Device& device) {
    constexpr int64_t limit = int64_t{1} << 27;
    const int64_t rows = c.out.size[0], experts = c.offsets.size[0] - 1;
    if (c.x.dtype != DType::bf16 && c.x.dtype != DType::f16) refuse(c.op, "x is neither bfloat16 nor float16");
    if (rows >= limit || c.x.size[0] >= limit || c.w.rows >= limit || c.w.columns >= limit)
        refuse(c.op, "more than 2^27 rows or columns");
    if (rows == 0 || c.out.size[1] == 0) return false;
    Product& p = f.product;
    p.out = c.out;
    if (c.bias) p.bias = {c.bias.data, c.bias.dtype, {c.bias.size[1]}, {c.bias.stride[1]}};
    if (c.places) p.places = {c.places.data, c.places.dtype, {c.places.size[1]}, {c.places.stride[1]}};
    f.bias = expert_bytes(c.bias);
    f.places = expert_bytes(c.places);
    p.outputs = static_cast<int>(c.out.size[1]);
    p.summed = static_cast<int>(c.over_rows ? c.w.rows : c.w.columns);
    p.steps = static_cast<int>(ceil_div(p.summed, step));
    p.slice_steps = lowbit::slice_steps(p.outputs, p.steps);
    p.vector_out = reinterpret_cast<uintptr_t>(c.out.data) % 8 == 0 && c.out.stride[1] == 1 && !c.places &&
                   (rows == 1 || c.out.stride[0] % 4 == 0);
    f.order = order_of(c.order, c.k, c.x.size[0]);
    f.experts = static_cast<int>(experts);
    f.tiles = static_cast<int>(most_tiles(rows, experts, tile_rows));

    const bool as_it_is = !c.permutation && reinterpret_cast<uintptr_t>(c.x.data) % 16 == 0 &&
                          (p.summed <= 1 || c.x.stride[1] == 1) && (c.x.size[0] <= 1 || c.x.stride[0] % 8 == 0);
    const int64_t pitch = ceil_div(p.summed, 8) * 8, gathered = c.permutation ? rows : c.x.size[0];
    const int64_t table = ceil_div(f.tiles * static_cast<int64_t>(sizeof(Segment)), 256) * 256;
    auto* const memory = static_cast<unsigned char*>(
        device.scratch(static_cast<size_t>(table + (as_it_is ? 0 : gathered * pitch * 2)), device.context));
    f.segments = reinterpret_cast<Segment*>(memory);
    make_schedule({c.offsets, f.experts, static_cast<int>(rows), tile_rows, f.tiles, f.segments}, device);
    p.x = as_it_is ? static_cast<const unsigned char*>(c.x.data) : memory + table;
    p.x_pitch = as_it_is ? c.x.stride[0] : pitch;
    if (as_it_is) return true;
    if (!c.permutation) {
        lowbit::gather(c.x, {}, memory + table, pitch, device);
        return true;
    }
    const int64_t across = ceil_div(p.summed, threads), blocks = across * ceil_div(rows, rows_at_once);
    if (blocks > 0x7fffffff) refuse(c.op, "more than 2^31 tiles of rows to permute");
    launch(gather_kernel, {static_cast<int>(blocks)}, threads, 0, device.stream,
           Gather{c.x, c.permutation, c.offsets, f.order, reinterpret_cast<uint16_t*>(memory + table), pitch,
                  static_cast<int>(rows), p.summed, f.experts, static_cast<int>(across)});
    f.order = {};
    return true;
}

}  // namespace metate::cuda::moe
