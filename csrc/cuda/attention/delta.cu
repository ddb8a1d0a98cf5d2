// What the backward needs of a row: delta = Σ_d out · grad_out - grad_lse. One warp per row.
#include "host.h"

namespace metate::cuda::flash {
namespace {

constexpr int warps = 8;

// One kernel for every dtype: memory takes longer than telling them apart.
METATE_DEVICE float read(const View<4>& view, int64_t at) {
    if (view.dtype == DType::f32) return load_global<float>(static_cast<const float*>(view.data) + at);
    if (view.dtype == DType::bf16) return to_float(load_global<bf16>(static_cast<const bf16*>(view.data) + at));
    return to_float(load_global<f16>(static_cast<const f16*>(view.data) + at));
}

METATE_KERNEL(32 * warps, 1)
delta_kernel(METATE_PARAMETER(AttentionDelta, a)) {
    const int64_t heads = a.out.size[2], tokens = a.out.size[1];
    const int64_t row = static_cast<int64_t>(block_index().x) * warps + thread_index() / 32;
    if (row >= a.out.size[0] * tokens * heads) return;
    const int64_t h = row % heads, s = row / heads % tokens, b = row / heads / tokens;
    const auto start_of = [&](const View<4>& view) {
        return b * view.stride[0] + s * view.stride[1] + h * view.stride[2];
    };
    const int64_t out = start_of(a.out), grad = start_of(a.grad_out);
    const int lane = thread_index() % 32;
    float sum = 0.f;
    for (int64_t d = lane; d < a.out.size[3]; d += 32)
        sum += read(a.out, out + d * a.out.stride[3]) * read(a.grad_out, grad + d * a.grad_out.stride[3]);
    for (int flip = 16; flip > 0; flip /= 2) sum += shuffle_xor(sum, flip);
    if (lane > 0) return;
    const auto at = [&](const View<3>& view) {
        return static_cast<float*>(view.data) + b * view.stride[0] + h * view.stride[1] + s * view.stride[2];
    };
    if (a.grad_lse) sum -= load_global<float>(at(a.grad_lse));
    store_global(at(a.delta), sum);
}

}  // namespace
}  // namespace metate::cuda::flash

namespace metate::cuda {

void attention_delta(const AttentionDelta& a, const Device& device) {
    if (a.out.dtype == DType::f64) flash::refuse("out is neither float32, bfloat16 nor float16");
    const int64_t rows = a.out.size[0] * a.out.size[1] * a.out.size[2];
    const int64_t blocks = (rows + flash::warps - 1) / flash::warps;
    if (blocks > 0x7fffffff) flash::refuse("more than 2^34 rows");
    arch::launch(flash::delta_kernel, {static_cast<int>(blocks)}, 32 * flash::warps, 0, device.stream, a);
}

}  // namespace metate::cuda
