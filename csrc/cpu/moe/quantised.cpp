// Low-bit experts: the products of quant_linear of those that have rows, shared out together.
#include "rows.h"

namespace metate::cpu::METATE_ISA {
namespace {

constexpr int64_t at_once = 64;  // experts of one schedule

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

// multiply(list, n) for the experts that have any rows; product(expert, its rows of x, its rows of out) is one of them.
template <class Product, class Call, class Of, class Multiply>
void for_experts(const Call& call, const Of& product, const Multiply& multiply) {
    clear_outside(call.out, call.offsets);
    Product list[at_once];
    int64_t n = 0;
    for (int64_t e = 0; e + 1 < call.offsets.size[0]; ++e) {
        const int64_t first = index_at(call.offsets, e), last = index_at(call.offsets, e + 1);
        if (last <= first) continue;
        list[n++] = product(e, rows_between(call.x, first, last), rows_between(call.out, first, last));
        if (n == at_once) multiply(list, n), n = 0;
    }
    if (n > 0) multiply(list, n);
}

}  // namespace

void quant_grouped_linear(const QuantGroupedLinear& call, const Runtime& runtime) {
    for_experts<QuantLinear>(
        call,
        [&](int64_t e, const View<2>& x, const View<2>& out) {
            return QuantLinear{x, call.w[e], row_of(call.bias, e), call.int8_activations, out};
        },
        [&](const QuantLinear* list, int64_t n) { cpu::quant_linears({list, n}, runtime); });
}

void quant_grouped_matmul(const QuantGroupedMatmul& call, const Runtime& runtime) {
    for_experts<QuantMatmul>(
        call, [&](int64_t e, const View<2>& x, const View<2>& out) { return QuantMatmul{x, call.w[e], out}; },
        [&](const QuantMatmul* list, int64_t n) { cpu::quant_matmuls({list, n}, runtime); });
}

}  // namespace metate::cpu::METATE_ISA

METATE_DISPATCH(quant_grouped_linear, QuantGroupedLinear, p.x.dtype)
METATE_DISPATCH(quant_grouped_matmul, QuantGroupedMatmul, p.x.dtype)
