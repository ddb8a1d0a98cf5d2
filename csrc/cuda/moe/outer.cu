// Σ a[r]ᵀ b[r] over the rows of each expert, on the tensor cores: a block makes 128 × 128 numbers of one expert and
// walks along its rows, 32 at a time. Both operands are read across, as they lie.
#include "schedule.h"

namespace metate::cuda {
namespace {

using namespace moe;

constexpr int threads = 256, tile = 128, rows_at_once = 32, stages = 4;
constexpr int pitch = tile * 2, tile_bytes = rows_at_once * pitch;

struct Matrix {
    View<2> view;
    bool vectors;  // rows can be read 16 bytes at a time
};

struct Outer {
    Matrix a, b;
    View<1> offsets;
    Order order;  // of the rows of b
    View<3> out;
    int experts, rows, across, down;
    bool pairs;  // two neighbours of out can be written at once
};

// Eight consecutive rows have a chunk of 16 bytes in eight groups of banks.
METATE_DEVICE int offset(int row, int chunk) {
    return row * pitch + ((chunk ^ (row & 7)) << 4);
}

// 32 rows and 128 columns from `column` on; source(row) is the row of the matrix, -1 for zeros.
template <typename Source>
METATE_DEVICE void load_rows(unsigned char* to, const Matrix& m, int column, const Source& source) {
    const auto* const data = static_cast<const uint16_t*>(m.view.data);
    const int columns = static_cast<int>(m.view.size[1]);
    if (m.vectors) {
        METATE_UNROLL
        for (int i = 0; i < rows_at_once * tile / 8 / threads; ++i) {
            const int index = i * threads + thread_index(), row = index / 16, chunk = index % 16;
            const int from = source(row), at = column + chunk * 8;
            const int bytes = from >= 0 ? most(least(columns - at, 8), 0) * 2 : 0;
            cp_async_16(to + offset(row, chunk), data + from * m.view.stride[0] + at, bytes);
        }
        return;
    }
    METATE_NO_UNROLL
    for (int index = thread_index(); index < rows_at_once * tile; index += threads) {
        const int row = index / tile, at = index % tile, from = source(row);
        const auto* const number = data + from * m.view.stride[0] + (column + at) * m.view.stride[1];
        const bool inside = from >= 0 && column + at < columns;
        store_shared(to + offset(row, at / 8) + at % 8 * 2, inside ? load_global<uint16_t>(number) : uint16_t{0});
    }
}

// A warp's 32 columns of a by 64 of b.
template <typename T>
METATE_DEVICE void multiply(float (&sum)[2][8][4], const unsigned char* a, const unsigned char* b) {
    const int i = lane() & 7, m = lane() >> 3;  // the row of a matrix, and which matrix, that a lane points at
    METATE_UNROLL
    for (int r = 0; r < rows_at_once; r += 16) {
        uint32_t left[2][4];
        METATE_UNROLL
        for (int n = 0; n < 2; ++n)
            ldmatrix_x4_trans(left[n], a + offset(r + (m >> 1) * 8 + i, warp() / 2 * 4 + n * 2 + (m & 1)));
        METATE_UNROLL
        for (int j = 0; j < 8; j += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, b + offset(r + (m & 1) * 8 + i, warp() % 2 * 8 + j + (m >> 1)));
            METATE_UNROLL
            for (int n = 0; n < 2; ++n) {
                mma_m16n8k16<T>(sum[n][j], left[n], {right[0], right[1]});
                mma_m16n8k16<T>(sum[n][j + 1], left[n], {right[2], right[3]});
            }
        }
    }
}

template <typename T>
METATE_DEVICE void write(const Outer& f, const float (&sum)[2][8][4], int expert, int first_row, int first_column) {
    const int rows = static_cast<int>(f.out.size[1]), columns = static_cast<int>(f.out.size[2]);
    METATE_UNROLL
    for (int i = 0; i < 32; ++i) {
        const int n = i / 16, j = i / 2 % 8, half = i % 2;
        const int row = first_row + warp() / 2 * 32 + n * 16 + half * 8 + (lane() >> 2);
        const int column = first_column + warp() % 2 * 64 + j * 8 + (lane() & 3) * 2;
        if (row >= rows || column >= columns) continue;
        T* const to =
            static_cast<T*>(f.out.data) + expert * f.out.stride[0] + row * f.out.stride[1] + column * f.out.stride[2];
        const float first = sum[n][j][half * 2], second = sum[n][j][half * 2 + 1];
        if (f.pairs) {
            store_global(to, pack<T>(first, second));
            continue;
        }
        store_global(to, from_float<T>(first));
        if (column + 1 < columns) store_global(to + f.out.stride[2], from_float<T>(second));
    }
}

template <typename T>
METATE_KERNEL(threads, 2)
outer_kernel(METATE_PARAMETER(Outer, f)) {
    METATE_SHARED(unsigned char, shared);
    const int tiles = f.across * f.down, expert = block_index().x / tiles;
    const int first_column = block_index().x % tiles % f.across * tile;
    const int first_row = block_index().x % tiles / f.across * tile;
    const int begin = offset_of(f.offsets, f.experts, f.rows, expert);
    const int end = offset_of(f.offsets, f.experts, f.rows, expert + 1);
    const int steps = (most(end - begin, 0) + rows_at_once - 1) / rows_at_once;
    const auto load = [&](int n) {
        if (n < steps) {
            unsigned char* const stage = shared + n % stages * 2 * tile_bytes;
            const int first = begin + n * rows_at_once;
            load_rows(stage, f.a, first_row, [&](int row) { return first + row < end ? first + row : -1; });
            load_rows(stage + tile_bytes, f.b, first_column,
                      [&](int row) { return first + row < end ? f.order(first + row) : -1; });
        }
        cp_async_commit();
    };
    METATE_UNROLL
    for (int n = 0; n < stages - 1; ++n) load(n);
    float sum[2][8][4];
    lowbit::clear(sum);
    METATE_NO_UNROLL
    for (int n = 0; n < steps; ++n) {
        cp_async_wait<stages - 2>();
        sync_threads();
        load(n + stages - 1);
        const unsigned char* const stage = shared + n % stages * 2 * tile_bytes;
        multiply<T>(sum, stage, stage + tile_bytes);
    }
    cp_async_wait<0>();
    write<T>(f, sum, expert, first_row, first_column);
}

Matrix matrix_of(const View<2>& view) {
    return {view, reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (view.size[1] <= 1 || view.stride[1] == 1) &&
                      (view.size[0] <= 1 || view.stride[0] % 8 == 0)};
}

}  // namespace

void grouped_outer(const GroupedOuter& g, const Device& device) {
    constexpr int64_t limit = int64_t{1} << 27;
    if (g.a.dtype != DType::bf16 && g.a.dtype != DType::f16)
        refuse("grouped_outer", "a is neither bfloat16 nor float16");
    if (g.a.size[0] >= limit || g.b.size[0] >= limit || g.a.size[1] >= limit || g.b.size[1] >= limit)
        refuse("grouped_outer", "more than 2^27 rows or columns");
    const int64_t across = ceil_div(g.out.size[2], tile), down = ceil_div(g.out.size[1], tile);
    const int64_t blocks = g.out.size[0] * across * down;
    if (blocks > 0x7fffffff) refuse("grouped_outer", "more than 2^31 tiles of results");
    const Outer f{matrix_of(g.a),
                  matrix_of(g.b),
                  g.offsets,
                  order_of(g.order, g.k, g.b.size[0]),
                  g.out,
                  static_cast<int>(g.out.size[0]),
                  static_cast<int>(g.a.size[0]),
                  static_cast<int>(across),
                  static_cast<int>(down),
                  reinterpret_cast<uintptr_t>(g.out.data) % 4 == 0 && g.out.stride[2] == 1 && g.out.size[2] % 2 == 0 &&
                      g.out.stride[1] % 2 == 0 && g.out.stride[0] % 2 == 0};
    const auto kernel = g.a.dtype == DType::bf16 ? outer_kernel<bf16> : outer_kernel<f16>;
    launch(kernel, {static_cast<int>(blocks)}, threads, stages * 2 * tile_bytes, device.stream, f);
}

}  // namespace metate::cuda
