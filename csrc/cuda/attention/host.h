// From the contract's structs to kernel parameters: what every launcher of the family does on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "config.h"
#include "score.h"

namespace metate::cuda::flash {

inline Divider divider(int64_t d) {
    int shift = 0;
    while ((int64_t{1} << shift) < d) ++shift;
    return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / (d > 0 ? d : 1)), 31 + shift};
}

// Whether more than windows stands between dot products and probabilities; a scale of 0 or less turns maxima around.
inline bool is_general(const Attention& a) {
    return a.bias || a.alibi_slopes || a.intervals || a.blocks || a.bits || a.softcap > 0 || a.dropout_threshold != 0 ||
           !(a.scale > 0);
}

inline void refuse(const char* what) {
    throw std::invalid_argument(std::string("attention on cuda: ") + what);
}

inline Problem problem_of(const Attention& a, bool general) {
    if (a.q.dtype != DType::bf16 && a.q.dtype != DType::f16) refuse("q is neither bfloat16 nor float16");
    if (a.q.size[3] > 256 || (a.v && a.v.size[3] > 256)) refuse("head dimensions go up to 256");
    if (a.q.size[1] + a.k.size[1] >= int64_t{1} << 30) refuse("more than 2^30 queries and keys");
    Problem p{};
    p.a = a;
    p.queries = static_cast<int>(a.q.size[1]);
    p.keys = static_cast<int>(a.k.size[1]);
    p.heads = static_cast<int>(a.q.size[2]);
    p.group = a.k.size[2] > 0 ? p.heads / static_cast<int>(a.k.size[2]) : 1;
    const int64_t longest = p.queries + p.keys;
    p.left = static_cast<int>(a.window_left < longest ? a.window_left : longest);
    p.right = static_cast<int>(a.window_right < longest ? a.window_right : longest);
    p.packed = static_cast<bool>(a.cu_seqlens_q);
    p.sequences = p.packed ? static_cast<int>(a.cu_seqlens_q.size[0]) - 1 : 0;
    if (a.blocks) {
        p.block_m = divider(a.block_m);
        p.block_n = divider(a.block_n);
    }
    p.scale = static_cast<float>(a.scale);
    p.unit = general ? 1.f : p.scale * log2_e;
    p.softcap = static_cast<float>(a.softcap);
    p.dropout_scale = a.dropout_threshold != 0 ? static_cast<float>(a.dropout_scale) : 1.f;
    return p;
}

// Whether rows of 16-bit elements can be moved 16 bytes at a time.
inline bool moves_vectors(const View<4>& v) {
    bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[3] == 1;
    for (int i = 0; i < 3; ++i) aligned = aligned && (v.size[i] <= 1 || v.stride[i] % 8 == 0);
    return aligned;
}

inline int slots_of(const Problem& p, bool over_keys, int rows) {
    const int tokens = over_keys ? p.keys : p.queries;
    return p.packed ? tokens / rows + p.sequences + 2 : (tokens + rows - 1) / rows;
}

inline int grid_of(const Problem& p, int slots, int64_t heads) {
    const int64_t blocks = slots * heads * (p.packed ? 1 : p.a.q.size[0]);
    if (blocks > 0x7fffffff) refuse("more than 2^31 tiles of queries or keys");
    return static_cast<int>(blocks);
}

inline size_t summary_bytes(const Problem& p, int rows) {
    return p.a.intervals ? static_cast<size_t>(grid_of(p, slots_of(p, false, rows), p.a.q.size[2])) * 16 : 0;
}

// Bounds of what each tile of `rows` queries sees, into `memory`, for kernels that get the problem from then on.
void summarise(Problem& p, int rows, void* memory, const Device& device);

// body<T, head, general>() for the kernel that serves this problem. Beyond 128 columns the general kernel serves all:
// there the products outweigh its tests.
template <typename T, typename Body>
void for_head(int head, bool general, Body body) {
    switch (head) {
        case 64:
            return general ? body.template operator()<T, 64, true>() : body.template operator()<T, 64, false>();
        case 96:
            return general ? body.template operator()<T, 96, true>() : body.template operator()<T, 96, false>();
        case 128:
            return general ? body.template operator()<T, 128, true>() : body.template operator()<T, 128, false>();
        case 192:
            return body.template operator()<T, 192, true>();
        default:
            return body.template operator()<T, 256, true>();
    }
}

inline int head_of(const Attention& a) {
    return head_tile(a.q.size[3] > a.v.size[3] ? a.q.size[3] : a.v.size[3]);
}

inline bool takes_general(const Attention& a) {
    return head_of(a) > 128 || is_general(a);
}

template <typename Body>
void for_kernel(const Attention& a, Body body) {
    const int head = head_of(a);
    const bool general = takes_general(a);
    if (a.q.dtype == DType::bf16) {
        for_head<arch::bf16>(head, general, body);
    } else {
        for_head<arch::f16>(head, general, body);
    }
}

}  // namespace metate::cuda::flash
