// Low-bit experts: the products of quant_linear, expert after expert, each cut over all workers.
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

View<2> rows_between(const View<2>& x, int64_t first, int64_t last) {
    View<2> part = x;
    part.data = static_cast<char*>(x.data) + first * x.stride[0] * bytes_of(x.dtype);
    part.size[0] = last - first;
    return part;
}

View<1> row_of(const View<2>& x, int64_t row) {
    if (!x) return {};
    return {static_cast<char*>(x.data) + row * x.stride[0] * bytes_of(x.dtype), x.dtype, {x.size[1]}, {x.stride[1]}};
}

// body(expert, its rows of x, its rows of out) for every expert that has any.
template <class Call, class Body>
void for_experts(const Call& call, const Body& body) {
    clear_outside(call.out, call.offsets);
    for (int64_t e = 0; e + 1 < call.offsets.size[0]; ++e) {
        const int64_t first = index_at(call.offsets, e), last = index_at(call.offsets, e + 1);
        if (last > first) body(e, rows_between(call.x, first, last), rows_between(call.out, first, last));
    }
}

}  // namespace

void quant_grouped_linear(const QuantGroupedLinear& call, const Runtime& runtime) {
    for_experts(call, [&](int64_t e, const View<2>& x, const View<2>& out) {
        cpu::quant_linear({x, call.w[e], row_of(call.bias, e), false, out}, runtime);
    });
}

void quant_grouped_matmul(const QuantGroupedMatmul& call, const Runtime& runtime) {
    for_experts(call, [&](int64_t e, const View<2>& x, const View<2>& out) {
        cpu::quant_matmul({x, call.w[e], out}, runtime);
    });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(quant_grouped_linear, QuantGroupedLinear, p.x.dtype)
METATE_DISPATCH(quant_grouped_matmul, QuantGroupedMatmul, p.x.dtype)
