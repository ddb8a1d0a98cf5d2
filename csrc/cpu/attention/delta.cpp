// What the backward needs of a row: delta = Σ_d out · grad_out - grad_lse. A piece of work is a run of queries of all
// heads, read in the order of memory.
#include "../parallel.h"
#include "../strided.h"
#include "exact.h"

namespace metate::cpu::METATE_ISA {
namespace {

template <class T>
METATE_FN float dot(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t n) {
    vf total = splat(0.0f);
    for (int64_t c = 0; c < n; c += width)
        total = fma(load_any(x + c * x_stride, x_stride, n - c), load_any(y + c * y_stride, y_stride, n - c), total);
    return sum(total);
}
template <class T, class Wide>
void run(const AttentionDelta& call, const Runtime& runtime) {
    const View<4>& out = call.out;
    const int64_t queries = out.size[1], heads = out.size[2], n = out.size[3];
    constexpr int64_t together = 16;
    const int64_t runs = ceil_div(queries, together);
    const auto find = [&](int64_t b, int64_t query, int64_t h) {
        Wide& delta = *value_at<Wide>(call.delta, b, h, query);
        const T *x = row_at<T>(out, b, query, h), *y = row_at<T>(call.grad_out, b, query, h);
        if constexpr (__is_same(T, double))
            delta = dot_exact(x, out.stride[3], y, call.grad_out.stride[3], n);
        else
            delta = dot(x, out.stride[3], y, call.grad_out.stride[3], n);
        if (call.grad_lse) delta -= *value_at<Wide>(call.grad_lse, b, h, query);
    };
    for_pieces(worth(runtime, out.size[0] * queries * heads * n / 16), out.size[0] * runs, [&](int, int64_t piece) {
        const int64_t first = piece % runs * together, end = smaller(first + together, queries);
        for (int64_t query = first; query < end; ++query)
            for (int64_t h = 0; h < heads; ++h) find(piece / runs, query, h);
    });
}

}  // namespace

void attention_delta(const AttentionDelta& call, const Runtime& runtime) {
    switch (call.out.dtype) {
#if defined(METATE_ISA_BASELINE)
        case DType::f64:
            return run<double, double>(call, runtime);
#endif
        case DType::bf16:
            return run<bf16, float>(call, runtime);
        case DType::f16:
            return run<f16, float>(call, runtime);
        default:
            return run<float, float>(call, runtime);
    }
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(attention_delta, AttentionDelta, p.out.dtype)
