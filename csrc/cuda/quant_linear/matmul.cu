// x · W, the input gradient of x Wᵀ: the same weights, read across.
#include "host.h"

namespace metate::cuda {

void quant_matmul(const QuantMatmul& q, const Device& device) {
    using namespace lowbit;
    const Call call{"quant_matmul", q.x, q.w, {}, {}, q.w.permutation, q.out, q.update};
    prepare(call, true, 64, device, [&](const Product& p, int slices) {
        const auto launcher = q.x.dtype == DType::bf16 ? launch_product<bf16, 8, Kind::transposed>
                                                       : launch_product<f16, 8, Kind::transposed>;
        launcher(p, slices, device);
    });
}

}  // namespace metate::cuda
