// From the contract's structs to kernel parameters.
#pragma once

#include "../attention/host.h"
#include "attend.h"

namespace metate::cuda::paged {

void attend_few(const Attend& f, void* stream);   // up to 16 rows a block
void attend_many(const Attend& f, void* stream);  // 64 rows
constexpr int64_t wide_shared = 163 * 1024;       // shared memory that attend_wide needs
template <int row_warps>
void attend_wide(const Attend& f, void* stream);  // of more than 256 columns: 16 rows for each of 1 or 2 row_warps
void merge_splits(const Problem& p, void* stream);
void sum_columns(const Problem& p, const Cache& k, void* stream);

inline void refuse(const char* op, const char* what) {
    throw std::invalid_argument(std::string(op) + " on cuda: " + what);
}

inline Cache cache_of(const View<4>& view, const View<3>& scale, DType plain) {
    const Format format = view.dtype == plain     ? Format::plain
                        : view.dtype == DType::i8 ? Format::int8
                        : view.dtype == DType::u8 ? Format::int4
                                                  : Format::float8;
    const int64_t element = bytes_of(view.dtype);
    bool vectors = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[3] == 1;
    for (int i = 0; i < 3; ++i) vectors = vectors && (view.size[i] <= 1 || view.stride[i] * element % 16 == 0);
    return {view, scale, format, static_cast<int>(view.size[3] * element), vectors};
}

// Whether values are the first columns of the keys, and counted alike.
inline bool are_in_keys(const Cache& v, const Cache& k) {
    bool same = v.view.data == k.view.data && v.scale.data == k.scale.data && v.bytes <= k.bytes;
    for (int i = 0; i < 4; ++i) same = same && v.view.stride[i] == k.view.stride[i];
    for (int i = 0; i < 3; ++i) same = same && v.scale.stride[i] == k.scale.stride[i];
    return same;
}

// body<T, head, coded>() for the kernel that serves these caches of up to 256 columns.
template <typename T, bool coded, typename Body>
void for_head(int64_t columns, Body body) {
    if (columns <= 64) {
        body.template operator()<T, 64, coded>();
    } else if (columns <= 128) {
        body.template operator()<T, 128, coded>();
    } else {
        body.template operator()<T, 256, coded>();
    }
}

template <typename Body>
void for_kernel(const Attend& f, Body body) {
    const PagedAttention& a = f.problem.a;
    const int64_t columns = a.q.size[3] > a.out.size[3] ? a.q.size[3] : a.out.size[3];
    const bool coded = f.k.format != Format::plain;
    const auto with_type = [&]<typename T>() {
        coded ? for_head<T, true>(columns, body) : for_head<T, false>(columns, body);
    };
    a.q.dtype == DType::bf16 ? with_type.template operator()<bf16>() : with_type.template operator()<f16>();
}

}  // namespace metate::cuda::paged
