// Merges attention over disjoint keys: one thread per element of the output, which reads the n lses of its row.
#include <math.h>

#include "host.h"

namespace metate::cuda::flash {
namespace {

template <typename T>
METATE_KERNEL(256, 1)
merge_kernel(METATE_PARAMETER(MergeAttentionStates, a)) {
    const int64_t columns = a.out.size[3], heads = a.out.size[2], tokens = a.out.size[1];
    const int64_t total = a.out.size[0] * tokens * heads * (columns > 0 ? columns : 1);
    const int64_t index = static_cast<int64_t>(block_index().x) * 256 + thread_index();
    if (index >= total) return;
    const int64_t d = columns > 0 ? index % columns : 0, row = columns > 0 ? index / columns : index;
    const int64_t h = row % heads, s = row / heads % tokens, b = row / heads / tokens;

    const float* const lse =
        static_cast<const float*>(a.lses.data) + b * a.lses.stride[1] + h * a.lses.stride[2] + s * a.lses.stride[3];
    const int64_t states = a.outs.size[0];
    float top = -infinite();
    for (int64_t n = 0; n < states; ++n) top = fmaxf(top, load_global<float>(lse + n * a.lses.stride[0]));
    const float base = top == -infinite() ? 0.f : top;
    const int64_t start = b * a.outs.stride[1] + s * a.outs.stride[2] + h * a.outs.stride[3] + d * a.outs.stride[4];
    const T* const outs = static_cast<const T*>(a.outs.data) + start;
    float sum = 0.f, out = 0.f;
    for (int64_t n = 0; n < states; ++n) {
        const float weight = expf(load_global<float>(lse + n * a.lses.stride[0]) - base);
        sum += weight;
        // A state without keys holds nothing, not even NaN.
        if (weight != 0.f && columns > 0) out += weight * to_float(load_global<T>(outs + n * a.outs.stride[0]));
    }
    if (d == 0) {
        float* const merged =
            static_cast<float*>(a.lse.data) + b * a.lse.stride[0] + h * a.lse.stride[1] + s * a.lse.stride[2];
        store_global(merged, base + logf(sum));
    }
    if (columns == 0) return;
    out = sum == 0.f ? 0.f : out / sum;
    const int64_t at = b * a.out.stride[0] + s * a.out.stride[1] + h * a.out.stride[2] + d * a.out.stride[3];
    if constexpr (is_same<T, float>) {
        store_global(static_cast<float*>(a.out.data) + at, out);
    } else {
        store_global(static_cast<T*>(a.out.data) + at, from_float<T>(out));
    }
}

}  // namespace
}  // namespace metate::cuda::flash

namespace metate::cuda {

void merge_attention_states(const MergeAttentionStates& a, const Device& device) {
    const int64_t columns = a.out.size[3] > 0 ? a.out.size[3] : 1;
    const int64_t blocks = (a.out.size[0] * a.out.size[1] * a.out.size[2] * columns + 255) / 256;
    if (blocks > 0x7fffffff) flash::refuse("merging more than 2^39 elements");
    const auto run = [&](void (*kernel)(MergeAttentionStates)) {
        arch::launch(kernel, {static_cast<int>(blocks)}, 256, 0, device.stream, a);
    };
    switch (a.out.dtype) {
        case DType::f32:
            return run(flash::merge_kernel<float>);
        case DType::bf16:
            return run(flash::merge_kernel<arch::bf16>);
        case DType::f16:
            return run(flash::merge_kernel<arch::f16>);
        default:
            flash::refuse("states to merge are neither float32, bfloat16 nor float16");
    }
}

}  // namespace metate::cuda
