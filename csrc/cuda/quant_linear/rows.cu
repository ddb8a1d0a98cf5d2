// Before and after the products: rows of x in the order of stored columns, and slices added up.
#include "host.h"

namespace metate::cuda::lowbit {
namespace {

struct Gather {
    View<2> x;
    View<1> permutation;
    uint16_t* to;
    int64_t pitch, count;
};

METATE_KERNEL(256, 1)
gather_kernel(METATE_PARAMETER(Gather, f)) {
    const int64_t index = static_cast<int64_t>(block_index().x) * 256 + thread_index();
    if (index >= f.count) return;
    const int64_t row = index / f.x.size[1], to = index % f.x.size[1];
    int64_t from = to;
    if (f.permutation)
        from = load_global<int32_t>(static_cast<const int32_t*>(f.permutation.data) + to * f.permutation.stride[0]);
    const auto* const x = static_cast<const uint16_t*>(f.x.data) + row * f.x.stride[0] + from * f.x.stride[1];
    store_global(f.to + row * f.pitch + to, load_global<uint16_t>(x));
}

struct AddSlices {
    Product p;
    int slices;
};

template <typename T>
METATE_KERNEL(256, 1)
add_slices_kernel(METATE_PARAMETER(AddSlices, f)) {
    const Product& p = f.p;
    const int64_t index = static_cast<int64_t>(block_index().x) * 256 + thread_index();
    const int64_t row = index / p.outputs;
    if (row >= p.x_rows) return;
    const int output = static_cast<int>(index % p.outputs);
    const int64_t pitch = (p.outputs + step - 1) / step * step;
    float sum = 0.f;
    for (int s = 0; s < f.slices; ++s)
        sum += load_global<float>(p.partial + (static_cast<int64_t>(s) * p.x_rows + row) * pitch + output);
    store_global(place_of<T>(p, static_cast<int>(row), output), from_float<T>(sum + bias_at<T>(p.bias, output)));
}

int blocks_of(int64_t count) {
    if (count > int64_t{0x7fffffff} * 256) refuse("quant_linear", "more than 2^39 elements");
    return static_cast<int>(ceil_div(count, 256));
}

}  // namespace

void gather(const View<2>& x, const View<1>& permutation, void* to, int64_t to_pitch, const Device& device) {
    const int64_t count = x.size[0] * x.size[1];
    launch(gather_kernel, {blocks_of(count)}, 256, 0, device.stream,
           Gather{x, permutation, static_cast<uint16_t*>(to), to_pitch, count});
}

void add_slices(const Product& p, int slices, const Device& device) {
    const int blocks = blocks_of(static_cast<int64_t>(p.x_rows) * p.outputs);
    const auto kernel = p.out.dtype == DType::bf16 ? add_slices_kernel<bf16> : add_slices_kernel<f16>;
    launch(kernel, {blocks}, 256, 0, device.stream, AddSlices{p, slices});
}

}  // namespace metate::cuda::lowbit
