// From the contract's structs to kernel parameters: what both products do on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "product.h"

namespace metate::cuda::lowbit {

inline void refuse(const char* op, const char* what) {
    throw std::invalid_argument(std::string(op) + " on cuda: " + what);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline Weight weight_of(const LowBitMatrix& m) {
    if (m.in_tiles()) refuse("quant_linear", "codes in tiles are for a CPU; QuantizedWeight.in_rows has rows of bytes");
    Weight w{};
    w.m = m;
    w.rows = static_cast<int>(m.rows);
    w.columns = static_cast<int>(m.columns);
    w.bits = static_cast<int>(m.bits);
    w.group_size = static_cast<int>(m.group_size < m.columns ? m.group_size : ceil_div(m.columns, 32) * 32);
    w.groups = w.columns > 0 ? static_cast<int>(ceil_div(w.columns, w.group_size)) : 0;
    w.super_groups = static_cast<int>(m.super_groups < w.groups ? m.super_groups : w.groups);
    w.row_bytes = static_cast<int>(ceil_div(m.columns * m.bits, 8));
    w.zero = static_cast<float>(m.zero);
    w.vectors = reinterpret_cast<uintptr_t>(m.codes.data) % 16 == 0 && (m.rows <= 1 || m.codes.stride[0] % 16 == 0) &&
                (w.row_bytes <= 1 || m.codes.stride[1] == 1);
    return w;
}

// Slices of the sum, in steps: of the sizes of W alone, so that a GPU is busy where one row of x is multiplied.
inline int slice_steps(int outputs, int steps) {
    constexpr int64_t blocks = 256, shortest = 4;
    const int64_t wanted = ceil_div(blocks, ceil_div(outputs, step)), most_slices = ceil_div(steps, shortest);
    const int64_t slices = wanted < most_slices ? wanted : most_slices;
    return slices > 0 ? static_cast<int>(ceil_div(steps, slices)) : 1;
}

// Rows of x, column permutation[j] as number j, without gaps and every row at a multiple of 16 bytes.
void gather(const View<2>& x, const View<1>& permutation, void* to, int64_t to_pitch, const Device& device);

// Adds `slices` partial sums and the bias.
void add_slices(const Product& p, int slices, const Device& device);

template <typename T, int fragments, Kind kind>
void launch_product(const Product& p, int slices, const Device& device) {
    const int64_t blocks = ceil_div(p.outputs, step) * p.x_tiles;
    if (blocks > 0x7fffffff) refuse("quant_linear", "more than 2^31 tiles of results");
    launch(product_kernel<T, fragments, kind>, {static_cast<int>(blocks), 1, p.partial ? slices : 1}, threads,
           shared_bytes(kind, p.w.bits, fragments * 8), device.stream, p);
}

struct Call {
    const char* op;
    View<2> x;
    LowBitMatrix w;
    View<1> order;  // permutation of the columns of x, or absent
    View<1> bias, places;
    View<2> out;
    LowRank update;
};

// run(parameters, slices) launches the kernel for the x_rows, with tiles of `tile` rows.
template <typename Run>
void prepare(const Call& c, bool over_rows, int tile, const Device& device, const Run& run) {
    constexpr int64_t limit = int64_t{1} << 27;
    if (c.x.dtype != DType::bf16 && c.x.dtype != DType::f16) refuse(c.op, "x is neither bfloat16 nor float16");
    if (c.x.size[0] >= limit || c.w.rows >= limit || c.w.columns >= limit)
        refuse(c.op, "more than 2^27 rows or columns");
    if (c.out.size[0] == 0 || c.out.size[1] == 0) return;
    Product p{};
    p.w = weight_of(c.w);
    p.out = c.out;
    p.bias = c.bias;
    p.places = c.places;
    p.update = c.update;
    p.x_rows = static_cast<int>(c.x.size[0]);
    p.x_tiles = static_cast<int>(ceil_div(p.x_rows, tile));
    p.outputs = static_cast<int>(c.out.size[1]);
    p.summed = static_cast<int>(over_rows ? c.w.rows : c.w.columns);
    p.steps = static_cast<int>(ceil_div(p.summed, step));
    p.slice_steps = slice_steps(p.outputs, p.steps);
    p.vector_out = reinterpret_cast<uintptr_t>(c.out.data) % 8 == 0 && c.out.stride[1] == 1 && !c.places &&
                   (p.x_rows == 1 || c.out.stride[0] % 4 == 0);
    const int slices_of_w = p.steps > 0 ? static_cast<int>(ceil_div(p.steps, p.slice_steps)) : 1;
    const int slices = slices_of_w + (c.update.low ? 1 : 0);
    const bool split = slices_of_w > 1 && ceil_div(p.outputs, step) * p.x_tiles < device.processors;

    const bool as_it_is = !c.order && reinterpret_cast<uintptr_t>(c.x.data) % 16 == 0 &&
                          (p.summed <= 1 || c.x.stride[1] == 1) && (p.x_rows == 1 || c.x.stride[0] % 8 == 0);
    const int64_t x_pitch = ceil_div(p.summed, 8) * 8;
    const size_t gathered = as_it_is ? 0 : static_cast<size_t>(ceil_div(p.x_rows * x_pitch * 2, 256) * 256);
    const size_t partial = split ? static_cast<size_t>(slices) * p.x_rows * ceil_div(p.outputs, step) * step * 4 : 0;
    auto* const memory = gathered + partial > 0
                           ? static_cast<unsigned char*>(device.scratch(gathered + partial, device.context))
                           : nullptr;
    p.x = as_it_is ? static_cast<const unsigned char*>(c.x.data) : memory;
    p.x_pitch = as_it_is ? c.x.stride[0] : x_pitch;
    if (gathered) gather(c.x, c.order, memory, x_pitch, device);
    if (split) p.partial = reinterpret_cast<float*>(memory + gathered);
    run(p, slices);
    if (split) add_slices(p, slices, device);
}

}  // namespace metate::cuda::lowbit
