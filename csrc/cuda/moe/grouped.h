// Grouped products: the products of csrc/cuda/quant_linear, with the weight of the expert that each tile of rows
// belongs to. Blocks walk over the tiles, eight tiles of rows side by side along the outputs, so that what they read
// stays in caches.
#pragma once

#include "schedule.h"

namespace metate::cuda::moe {

using lowbit::Kind;
using lowbit::Product;
using lowbit::step;

constexpr int band = 8;

struct Grouped {
    Product product;  // of expert 0
    Segment* segments;
    Order order;
    int experts, tiles;
    // Bytes from one expert to the next.
    int64_t codes, scales, super_scales, zeros, offsets, super_offsets, bias, places;
};

template <int N>
METATE_DEVICE void advance(View<N>& view, int64_t bytes, int expert) {
    if (view) view.data = static_cast<unsigned char*>(view.data) + bytes * expert;
}

// The product of one expert, up to row `end`; with no steps, zeros, where there is no such expert.
METATE_DEVICE Product product_of(const Grouped& f, int expert, int end) {
    Product p = f.product;
    p.x_rows = end;
    if (expert < 0 || expert >= f.experts) {
        p.steps = 0;
        p.bias.data = nullptr;
        return p;
    }
    advance(p.w.m.codes, f.codes, expert);
    advance(p.w.m.scales, f.scales, expert);
    advance(p.w.m.super_scales, f.super_scales, expert);
    advance(p.w.m.zeros, f.zeros, expert);
    advance(p.w.m.offsets, f.offsets, expert);
    advance(p.w.m.super_offsets, f.super_offsets, expert);
    advance(p.bias, f.bias, expert);
    advance(p.places, f.places, expert);
    return p;
}

template <typename T, int fragments, Kind kind>
METATE_KERNEL(lowbit::threads, fragments == 16 ? 1 : 2)
grouped_kernel(METATE_PARAMETER(Grouped, f)) {
    METATE_SHARED(unsigned char, shared);
    constexpr int rows = fragments * 8;
    unsigned char* const sources = shared + lowbit::shared_bytes(kind, f.product.w.bits, rows);
    const int across = (f.product.outputs + step - 1) / step;
    METATE_NO_UNROLL
    for (int index = block_index().x; index < f.tiles * across; index += grid_size().x) {
        const int above = index / (across * band) * band, height = least(f.tiles - above, band);
        const int place = index % (across * band), first_output = place / height * step;
        const auto segment = load_global<Segment>(f.segments + above + place % height);
        if (segment.first >= segment.end) continue;
        const Product p = product_of(f, segment.expert, segment.end);
        sync_threads();  // nobody reads the tile before any more
        for (int row = thread_index(); row < rows; row += lowbit::threads) {
            const int source = segment.first + row < segment.end ? f.order(segment.first + row) : -1;
            store_shared(sources + row * 4, source);
        }
        sync_threads();
        const auto source = [&](int row) { return load_shared<int>(sources + row * 4); };
        float total[2][fragments][4];
        lowbit::sum_steps<T, fragments, kind>(total, p, shared, source, first_output, 0, p.steps);
        lowbit::write<T, fragments, kind>(p, total, segment.first, first_output);
    }
}

// Shared memory of a block: that of the product, and the row of x for each of a tile.
inline size_t block_bytes(Kind kind, int bits, int rows) {
    return lowbit::shared_bytes(kind, bits, rows) + static_cast<size_t>(rows) * 4;
}

template <typename T, int fragments, Kind kind>
void launch_grouped(const Grouped& f, const Device& device) {
    const int64_t blocks = f.tiles * ceil_div(f.product.outputs, step), at_once = device.processors * 4;
    if (blocks > 0x7f000000) refuse("grouped product", "about 2^31 tiles of results");  // indices step beyond the last
    launch(grouped_kernel<T, fragments, kind>, {static_cast<int>(blocks < at_once ? blocks : at_once)}, lowbit::threads,
           block_bytes(kind, f.product.w.bits, fragments * 8), device.stream, f);
}

// What both kinds of weights have in common.
struct Call {
    const char* op;
    View<2> x;
    LowBitMatrix w;  // of expert 0
    View<1> offsets, order;
    int64_t k;
    View<2> permutation;  // of the columns of x, for each expert
    View<2> bias, places;
    View<2> out;
    bool over_rows;  // of w, instead of its columns
};

template <int N>
int64_t expert_bytes(const View<N>& stack) {
    return stack ? stack.stride[0] * bytes_of(stack.dtype) : 0;
}

// Adds what the host knows of a call to f, makes the table of tiles, and gathers rows that cannot be read as they lie.
// False where there is nothing to do.
bool prepare(Grouped& f, const Call& c, int tile_rows, const Device& device);

// How many rows of x a tile has: as many as an expert has on average, of 8, 64 or 128.
inline int tile_rows_of(int64_t rows, int64_t experts, int most_rows) {
    const int64_t average = ceil_div(rows, experts > 0 ? experts : 1);
    return average <= 8 ? 8 : average <= 64 ? 64 : most_rows;
}

}  // namespace metate::cuda::moe
