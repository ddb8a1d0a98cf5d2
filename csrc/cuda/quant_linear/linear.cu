// x Wᵀ + bias. 4-bit codes in groups of whole 32 columns are decoded into registers, at any number of rows of x; every
// other width and group by way of shared memory.
#include "host.h"

namespace metate::cuda {
namespace {

using namespace lowbit;

template <typename T>
void run(const Call& call, const Device& device) {
    const int64_t rows = call.x.size[0];
    const Weight w = weight_of(call.w);
    const bool direct = w.bits == 4 && w.group_size % 32 == 0;
    const int tile = rows <= 8 ? 8 : rows <= 32 && direct ? 32 : 64;
    prepare(call, false, tile, device, [&](const Product& p, int slices) {
        if (direct) {
            const auto launcher = tile == 8  ? launch_product<T, 1, Kind::direct>
                                : tile == 32 ? launch_product<T, 4, Kind::direct>
                                             : launch_product<T, 8, Kind::direct>;
            launcher(p, slices, device);
        } else {
            const auto launcher = tile == 8 ? launch_product<T, 1, Kind::staged> : launch_product<T, 8, Kind::staged>;
            launcher(p, slices, device);
        }
    });
}

}  // namespace

void quant_linear(const QuantLinear& q, const Device& device) {
    if (q.int8_activations) refuse("quant_linear", "activations are not rounded to 8 bits");
    const Call call{"quant_linear", q.x, q.w, q.w.permutation, q.bias, {}, q.out, q.update};
    q.x.dtype == DType::bf16 ? run<bf16>(call, device) : run<f16>(call, device);
}

}  // namespace metate::cuda
