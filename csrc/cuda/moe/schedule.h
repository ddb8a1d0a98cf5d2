// Which rows of a grouped product belong together: a table of tiles made on the device from the offsets of the experts,
// which the host never sees.
#pragma once

#include "../../moe.h"
#include "../quant_linear/host.h"

namespace metate::cuda::moe {

using namespace arch;
using lowbit::ceil_div;
using lowbit::least;
using lowbit::most;
using lowbit::refuse;

// Rows first … end - 1 of an expert, of which a tile begins at the first. Rows in front of those of expert 0 belong to
// expert -1, rows behind the last expert's to the expert one beyond. No rows: no tile.
struct alignas(16) Segment {
    int expert, first, end, unused;
};

struct Schedule {
    View<1> offsets;
    int experts, rows, tile_rows, tiles;
    Segment* segments;  // of every tile
};

// As many tiles of `tile_rows` rows as R rows of E experts can have.
inline int64_t most_tiles(int64_t rows, int64_t experts, int64_t tile_rows) {
    const int64_t parts = rows < experts + 2 ? rows : experts + 2;
    return (rows - parts) / tile_rows + parts;
}

void make_schedule(const Schedule& f, const Device& device);

// The first row of an expert; of -1 and of `experts` + 1, the first and the last of all.
METATE_DEVICE int offset_of(const View<1>& offsets, int experts, int rows, int expert) {
    if (expert < 0) return 0;
    if (expert > experts) return rows;
    const int at = load_global<int32_t>(static_cast<const int32_t*>(offsets.data) + expert * offsets.stride[0]);
    return least(most(at, 0), rows);
}

// Rows gathered by an order: `slots` numbers name k times each row of x.
struct Order {
    View<1> order;
    int k, slots;

    // The row of x for a row of the product, -1 for none.
    METATE_DEVICE int operator()(int row) const {
        if (!order) return row;
        const int slot = load_global<int32_t>(static_cast<const int32_t*>(order.data) + row * order.stride[0]);
        return slot >= 0 && slot < slots ? slot / k : -1;
    }
};

inline Order order_of(const View<1>& order, int64_t k, int64_t rows_of_x) {
    return {order, static_cast<int>(k), static_cast<int>(rows_of_x * k)};
}

}  // namespace metate::cuda::moe
