// Grouped products with dense weights: 16-bit codes that mean themselves, read along the outputs or along the sum.
#include "grouped.h"

namespace metate::cuda {
namespace {

using namespace moe;

template <typename T>
void run(const Grouped& f, int rows, bool transposed, const Device& device) {
    const auto launcher = transposed ? (rows == 8    ? launch_grouped<T, 1, Kind::dense_transposed>
                                        : rows == 64 ? launch_grouped<T, 8, Kind::dense_transposed>
                                                     : launch_grouped<T, 16, Kind::dense_transposed>)
                                     : (rows == 8    ? launch_grouped<T, 1, Kind::dense>
                                        : rows == 64 ? launch_grouped<T, 8, Kind::dense>
                                                     : launch_grouped<T, 16, Kind::dense>);
    launcher(f, device);
}

}  // namespace

void grouped_linear(const GroupedLinear& g, const Device& device) {
    // Lines of the weight are its rows, or its columns where their elements are neighbours.
    const bool transposed = g.w.stride[2] != 1 && g.w.stride[1] == 1;
    const int line = transposed ? 2 : 1, along = transposed ? 1 : 2;
    LowBitMatrix w{};
    w.rows = g.w.size[line];
    w.columns = g.w.size[along];
    w.codes = {g.w.data, g.w.dtype, {w.rows, w.columns}, {g.w.stride[line], g.w.stride[along]}};
    Grouped f{};
    f.product.w.m = w;
    f.product.w.rows = static_cast<int>(w.rows);
    f.product.w.columns = static_cast<int>(w.columns);
    f.product.w.bits = 16;
    f.product.w.vectors = reinterpret_cast<uintptr_t>(g.w.data) % 16 == 0 && g.w.stride[along] == 1 &&
                          (w.rows <= 1 || g.w.stride[line] % 8 == 0) && (g.w.size[0] <= 1 || g.w.stride[0] % 8 == 0);
    f.codes = g.w.stride[0] * 2;
    int rows = tile_rows_of(g.out.size[0], g.offsets.size[0] - 1, 128);
    if (static_cast<int64_t>(block_bytes(Kind::dense, 16, rows)) > shared_limit(device)) rows = 64;  // fits everywhere
    const Call call{"grouped_linear", g.x, w, g.offsets, g.order, g.k, {}, g.bias, {}, g.out, transposed};
    if (!prepare(f, call, rows, device)) return;
    g.x.dtype == DType::bf16 ? run<bf16>(f, rows, transposed, device) : run<f16>(f, rows, transposed, device);
}

}  // namespace metate::cuda
