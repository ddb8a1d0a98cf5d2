// Grouped products with low-bit weights, forward and across.
#include "grouped.h"

namespace metate::cuda {
namespace {

using namespace moe;

template <typename T>
void run(const Grouped& f, int rows, Kind kind, const Device& device) {
    const auto launcher = kind == Kind::transposed ? launch_grouped<T, 8, Kind::transposed>
                        : kind == Kind::direct
                            ? (rows == 8 ? launch_grouped<T, 1, Kind::direct> : launch_grouped<T, 8, Kind::direct>)
                            : (rows == 8 ? launch_grouped<T, 1, Kind::staged> : launch_grouped<T, 8, Kind::staged>);
    launcher(f, device);
}

void run(const Call& call, const LowBitExperts& w, const Device& device) {
    const int64_t experts = call.offsets.size[0] - 1;
    Grouped f{};
    f.product.w = lowbit::weight_of(call.w);
    f.product.w.vectors = f.product.w.vectors && (experts <= 1 || w.codes.stride[0] % 16 == 0);
    f.codes = expert_bytes(w.codes);
    f.scales = expert_bytes(w.scales);
    f.super_scales = expert_bytes(w.super_scales);
    f.zeros = expert_bytes(w.zeros);
    f.offsets = expert_bytes(w.offsets);
    f.super_offsets = expert_bytes(w.super_offsets);
    const bool direct = f.product.w.bits == 4 && f.product.w.group_size % 32 == 0;
    const Kind kind = call.over_rows ? Kind::transposed : direct ? Kind::direct : Kind::staged;
    const int rows = call.over_rows ? 64 : tile_rows_of(call.out.size[0], experts, 64);
    if (!prepare(f, call, rows, device)) return;
    call.x.dtype == DType::bf16 ? run<bf16>(f, rows, kind, device) : run<f16>(f, rows, kind, device);
}

}  // namespace

void quant_grouped_linear(const QuantGroupedLinear& q, const Device& device) {
    run({"quant_grouped_linear", q.x, q.w[0], q.offsets, q.order, q.k, q.w.permutation, q.bias, {}, q.out, false}, q.w,
        device);
}

void quant_grouped_matmul(const QuantGroupedMatmul& q, const Device& device) {
    run({"quant_grouped_matmul", q.x, q.w[0], q.offsets, {}, 1, {}, {}, q.w.permutation, q.out, true}, q.w, device);
}

}  // namespace metate::cuda
