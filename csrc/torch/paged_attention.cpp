// Binds csrc/paged_attention.h: the operators declared in python/metate/ops/paged_attention.
#include "paged_attention.h"

#include <algorithm>

#include "bind.h"
#include "contents.h"

namespace metate::bind {
namespace {

using Optional = std::optional<Tensor>;

// (heads) for every sequence, or (sequences, heads).
View<2> per_head(const Optional& tensor, int64_t sequences) {
    if (!tensor || tensor->dim() == 2) return view<2>(tensor);
    View<1> heads = view<1>(*tensor);
    return {heads.data, heads.dtype, {sequences, heads.size[0]}, {0, heads.stride[0]}};
}

// (heads) for every query, or like lse, without its dimension of size 1.
View<3> per_row(const Optional& tensor, const View<4>& q, int missing) {
    if (!tensor) return {};
    if (tensor->dim() != 1) return view_with<3>(*tensor, missing);
    View<1> heads = view<1>(*tensor);
    return {heads.data, heads.dtype, {q.size[0], heads.size[0], q.size[1]}, {0, heads.stride[0], 0}};
}

// Whether lengths, page numbers and offsets are what rules.py in python/metate/ops/paged_attention expects of a CPU's.
bool are_within(const PagedAttention& a) {
    const auto at = [](const auto& view, auto... index) {
        int64_t offset = 0, i = 0;
        ((offset += index * view.stride[i++]), ...);
        return int64_t{static_cast<const int32_t*>(view.data)[offset]};
    };
    const int64_t sequences = a.seq_lens.size[0], page_size = a.k_cache.size[1];
    for (int64_t n = 0; n < sequences; ++n) {
        const int64_t keys = at(a.seq_lens, n);
        if (keys < 0 || keys > a.block_table.size[1] * page_size) return false;
        if (a.left_pad && at(a.left_pad, n) < 0) return false;
        bool are_pages = true;
        for (int64_t p = 0; p * page_size < keys; ++p) {
            const int64_t page = at(a.block_table, n, p);
            are_pages &= page >= 0 && page < a.k_cache.size[0];
        }
        if (!are_pages) return false;
    }
    for (int64_t b = 0; a.positions && b < a.positions.size[0]; ++b)
        for (int64_t i = 0; i < a.positions.size[1]; ++i)
            if (std::abs(at(a.positions, b, i)) >= int64_t{1} << 28) return false;
    if (!a.cu_seqlens_q) return true;
    if (at(a.cu_seqlens_q, 0) < 0 || at(a.cu_seqlens_q, sequences) > a.q.size[1]) return false;
    for (int64_t n = 0; n < sequences; ++n) {
        const int64_t queries = at(a.cu_seqlens_q, n + 1) - at(a.cu_seqlens_q, n);
        if (queries < 0 || (a.bits && queries > 32 * a.bits.size[2])) return false;
    }
    return true;
}

template <int N>
bool has_own_memory(const View<N>& view) {
    for (int i = 0; view && i < N; ++i)
        if (view.stride[i] == 0 && view.size[i] > 1) return false;
    return true;
}

// Whether caches begin with the same element, or share one while strides are equal, as of parts of one tensor.
bool are_shared(const View<4>& a, const View<4>& b) {
    int order[4] = {0, 1, 2, 3};  // of dimensions, the widest stride first
    std::sort(order, order + 4, [&](int i, int j) { return a.stride[i] > a.stride[j]; });
    bool are_alike = true;
    for (int i = 0; i < 4; ++i) {
        if (!a.size[i] || !b.size[i]) return false;
        are_alike &= a.stride[i] == b.stride[i];
    }
    if (!are_alike) return a.data == b.data;
    const auto is_apart_by = [&](const auto& again, int64_t elements, int i) -> bool {
        if (i == 4) return elements == 0;
        const int64_t stride = std::max<int64_t>(a.stride[order[i]], 1),
                      below = elements / stride - (elements % stride < 0);
        for (int64_t steps = below; steps <= below + 1; ++steps)
            if (steps < b.size[order[i]] && -steps < a.size[order[i]] && again(again, elements - steps * stride, i + 1))
                return true;
        return false;
    };
    const int64_t bytes = static_cast<const uint8_t*>(a.data) - static_cast<const uint8_t*>(b.data);
    return bytes % bytes_of(a.dtype) == 0 && is_apart_by(is_apart_by, bytes / bytes_of(a.dtype), 0);
}

// The same of what a cache is written by, and of its memory.
bool are_within(const AppendKv& a) {
    return has_own_memory(a.k_cache) && has_own_memory(a.v_cache) && has_own_memory(a.k_scale) &&
           has_own_memory(a.v_scale) && are_few_once(a.slot_mapping, a.k_cache.size[0] * a.k_cache.size[1]) &&
           (!a.positions || bind::are_within(as_row(a.positions), 0, a.cos.size[0])) &&
           !(a.v_cache && are_shared(a.k_cache, a.v_cache));
}

std::tuple<Tensor, Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const Tensor& seq_lens,
    const Optional& k_scale, const Optional& v_scale, const Optional& cu_seqlens_q, const Optional& left_pad,
    const Optional& alibi_slopes, const Optional& sinks, const Optional& bits, const Optional& positions, double scale,
    int64_t window_left, int64_t window_right, double softcap, bool need_sums) {
    View<3> shared_bits = view<3>(bits);
    if (bits && shared_bits.size[0] == 1) shared_bits.stride[0] = 0;
    const bool given = q.dim() == 4, packed = cu_seqlens_q.has_value();
    const View<4> queries = view_with<4>(q, packed ? 0 : 1);
    PagedAttention call{queries,
                        view<4>(k_cache),
                        view<4>(v_cache),
                        view<2>(block_table),
                        view<1>(seq_lens),
                        view<3>(k_scale),
                        view<3>(v_scale),
                        view<1>(cu_seqlens_q),
                        view<1>(left_pad),
                        per_head(alibi_slopes, seq_lens.size(0)),
                        per_row(sinks, queries, packed ? 0 : 2),
                        shared_bits,
                        positions ? view_with<2>(*positions, packed ? 0 : 1) : View<2>{},
                        scale,
                        window_left,
                        window_right,
                        softcap,
                        {},
                        {},
                        {}};
    expect(q, [&] { return are_within(call); });
    const DType wide = q.dtype() == DType::f64 ? DType::f64 : DType::f32;
    const int64_t dv = v_cache.size(3) * (v_cache.dtype() == DType::u8 ? 2 : 1);
    const auto& [batch, tokens, heads, columns] = call.q.size;
    Tensor out = given ? empty(q, {batch, tokens, heads, dv}) : empty(q, {q.size(0), heads, dv});
    Tensor lse = given  ? empty(q, {batch, heads, tokens}, wide)
               : packed ? empty(q, {heads, tokens}, wide)
                        : empty(q, {batch, heads}, wide);
    Tensor sums = need_sums ? empty(q, {block_table.size(0), heads, block_table.size(1) * k_cache.size(1)}, wide)
                            : empty(q, {0}, wide);
    call.out = view_with<4>(out, packed ? 0 : 1);
    call.lse = view_with<3>(lse, packed ? 0 : 2);
    if (need_sums) call.sums = view<3>(sums);
    METATE_LAUNCH(paged_attention, q, call);
    return {out, lse, sums};
}

void append_kv(const Tensor& k, const Optional& v, const Tensor& k_cache, const Optional& v_cache,
               const Tensor& slot_mapping, const Optional& k_scale, const Optional& v_scale, const Optional& cos,
               const Optional& sin, const Optional& positions, bool interleaved) {
    const AppendKv call{view<3>(k),       view<3>(v),       view<4>(k_cache), view<4>(v_cache), view<1>(slot_mapping),
                        view<3>(k_scale), view<3>(v_scale), view<2>(cos),     view<2>(sin),     view<1>(positions),
                        interleaved};
    expect(k, [&] { return are_within(call); });
    METATE_LAUNCH(append_kv, k, call);
}

METATE_REGISTER(m) {
    METATE_IMPL(m, paged_attention);
    METATE_IMPL(m, append_kv);
}

}  // namespace
}  // namespace metate::bind
