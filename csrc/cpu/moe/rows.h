// What every grouped product knows of its rows: where those of an expert lie, and where each comes from.
#pragma once

#include <string.h>

#include "../../moe.h"
#include "../parallel.h"
#include "../strided.h"

namespace metate::cpu::METATE_ISA {
namespace {

METATE_FN int64_t index_at(const View<1>& numbers, int64_t i) {
    return static_cast<const int32_t*>(numbers.data)[i * numbers.stride[0]];
}
METATE_FN int64_t index_at(const View<2>& numbers, int64_t i, int64_t j) {
    return static_cast<const int32_t*>(numbers.data)[i * numbers.stride[0] + j * numbers.stride[1]];
}

// Rows of x by an order, or as they stand.
struct Rows {
    const View<2>& x;
    const View<1>& order;
    int64_t k;

    int64_t count() const { return order ? order.size[0] : x.size[0]; }

    // Null where a row is zeros.
    template <class T>
    METATE_FN const T* at(int64_t row) const {
        if (order) {
            const int64_t slot = index_at(order, row);
            if (slot < 0 || slot >= x.size[0] * k) return nullptr;
            row = slot / k;
        }
        return static_cast<const T*>(x.data) + row * x.stride[0];
    }
};

#if defined(METATE_HAS_BF16_DOT)
// Pairs of the elements of two rows; null stands for zeros.
METATE_FN vi zip_any(const bf16* a, const bf16* b, int64_t stride, int64_t n) {
    static const bf16 zeros[width] = {};
    if (stride == 1) return n >= width ? zip(a ? a : zeros, b ? b : zeros) : zip(a ? a : zeros, b ? b : zeros, n);
    bf16 lines[2][width] = {};
    for (int64_t i = 0; i < n && i < width; ++i) {
        if (a) lines[0][i] = a[i * stride];
        if (b) lines[1][i] = b[i * stride];
    }
    return zip(lines[0], lines[1]);
}
#endif

// Clears n elements of any dtype.
METATE_FN void clear_line(char* to, int64_t n, int64_t stride, int64_t bytes) {
    if (stride == 1) {
        memset(to, 0, static_cast<size_t>(n * bytes));
        return;
    }
    for (int64_t i = 0; i < n; ++i) memset(to + i * stride * bytes, 0, static_cast<size_t>(bytes));
}

// Zeros in the rows of no expert.
inline void clear_outside(const View<2>& out, const View<1>& offsets) {
    const int64_t first = index_at(offsets, 0), last = index_at(offsets, offsets.size[0] - 1),
                  bytes = bytes_of(out.dtype);
    for (int64_t r = 0; r < out.size[0]; ++r) {
        if (r == first && last > first) r = last;
        if (r < out.size[0])
            clear_line(static_cast<char*>(out.data) + r * out.stride[0] * bytes, out.size[1], out.stride[1], bytes);
    }
}

}  // namespace
}  // namespace metate::cpu::METATE_ISA
