// The shape of every kernel of the family, and the choice of a kernel on the host.
#pragma once

#include "../../attention.h"
#include "../arch/arch.h"

namespace metate::cuda::flash {

enum class Pass { forward, grad_queries, grad_keys };

// A block keeps one tile of rows (queries, or keys in grad_keys) and walks over tiles of `step` keys (or queries).
struct Config {
    int head;  // columns of every tile: D and Dv padded
    int warps;
    int fragments;  // 16-row fragments per warp: each operand fragment of a step is used that often
    int step;
    int parts;  // groups of warps that share rows and split the columns of the result between them

    METATE_INLINE constexpr int threads() const { return warps * 32; }
    METATE_INLINE constexpr int rows() const { return warps / parts * fragments * 16; }
};

constexpr int head_tile(int64_t columns) {
    return columns <= 64 ? 64 : columns <= 96 ? 96 : columns <= 128 ? 128 : columns <= 192 ? 192 : 256;
}

// Chosen so that accumulators fit in 255 registers and every block in 99 KiB of shared memory, the least that any GPU
// since sm_80 offers.
METATE_INLINE constexpr Config choose(Pass pass, int head, bool general) {
    switch (pass) {
        case Pass::forward:
            if (head == 128 && general) return {head, 8, 1, 64, 1};
            if (head <= 128) return {head, 4, 2, head == 128 ? 48 : 64, 1};
            return {head, 8, 1, head == 192 ? 64 : 32, 1};
        case Pass::grad_queries:
            if (head == 128) return {head, 8, 1, 32, 1};
            if (head <= 96) return {head, 4, 2, 32, 1};
            return {head, 4, 1, head == 192 ? 32 : 16, 1};
        case Pass::grad_keys:
            if (head <= 128) return {head, 8, 1, head == 64 ? 64 : 32, 1};
            return {head, 8, 1, head == 192 ? 32 : 16, 2};
    }
    return {};
}

// Forward: the rows of q, one tile of k, one of v. Backward: two tiles of rows, twice two of the step.
constexpr size_t shared_bytes(Pass pass, Config c) {
    const size_t row = static_cast<size_t>(c.head) * 2;
    return pass == Pass::forward ? row * (c.rows() + 2 * c.step)
                                 : row * (2 * c.rows() + 4 * c.step) + (pass == Pass::grad_keys ? 24 * c.step : 0);
}

}  // namespace metate::cuda::flash
