// The tensor core: loading its fragments from shared memory, and multiplying them.
#pragma once

#include "memory.h"
#include "platform.h"

namespace metate::cuda::arch {

// ldmatrix: N 8×8 matrices of 16-bit elements. Lane 8·m + r passes the address of row r of matrix m (16 bytes, aligned
// to 16; lanes from 8·N on are ignored). Lane l receives elements 2·(l % 4) and 2·(l % 4) + 1 of row l / 4 of each
// matrix, or of its transpose.
#if defined(__CUDACC__)
#define METATE_LDMATRIX(name, count, form, placeholders, address, ...)                                   \
    METATE_DEVICE void name(uint32_t (&r)[count], const void* row) {                                     \
        asm volatile("ldmatrix.sync.aligned.m8n8." form ".shared.b16 {" placeholders "}, [" address "];" \
                     : __VA_ARGS__                                                                       \
                     : "r"(shared_address(row)));                                                        \
    }
#define METATE_LDMATRICES(count, form, ...)                     \
    METATE_LDMATRIX(ldmatrix_##form, count, #form, __VA_ARGS__) \
    METATE_LDMATRIX(ldmatrix_##form##_trans, count, #form ".trans", __VA_ARGS__)
METATE_LDMATRICES(1, x1, "%0", "%1", "=r"(r[0]))
METATE_LDMATRICES(2, x2, "%0, %1", "%2", "=r"(r[0]), "=r"(r[1]))
METATE_LDMATRICES(4, x4, "%0, %1, %2, %3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
#else
#define METATE_LDMATRICES(count, form)                                                       \
    inline void ldmatrix_##form(uint32_t (&r)[count], const void* row METATE_SITE) {         \
        emulator::ldmatrix(r, count, false, row, where);                                     \
    }                                                                                        \
    inline void ldmatrix_##form##_trans(uint32_t (&r)[count], const void* row METATE_SITE) { \
        emulator::ldmatrix(r, count, true, row, where);                                      \
    }
METATE_LDMATRICES(1, x1)
METATE_LDMATRICES(2, x2)
METATE_LDMATRICES(4, x4)
#endif
#undef METATE_LDMATRIX
#undef METATE_LDMATRICES

// d += a·b with a (16×16, row), b (16×8, column) of T and d (16×8) of float. With g = lane / 4, t = lane % 4:
//   a[0] (g, 2t…)   a[1] (g + 8, 2t…)   a[2] (g, 2t + 8…)   a[3] (g + 8, 2t + 8…)     two elements of a row each
//   b[0] (2t…, g)   b[1] (2t + 8…, g)                                                  two elements of a column each
//   d[0] (g, 2t)    d[1] (g, 2t + 1)    d[2] (g + 8, 2t)    d[3] (g + 8, 2t + 1)
template <typename T>
METATE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] METATE_SITE) {
    static_assert(is_same<T, bf16> || is_same<T, f16>);
#if defined(__CUDACC__)
#define METATE_MMA(type)                                                                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (is_same<T, bf16>) {
        METATE_MMA("bf16");
    } else {
        METATE_MMA("f16");
    }
#undef METATE_MMA
#else
    emulator::mma_m16n8k16(is_same<T, bf16>, d, a, b, where);
#endif
}

}  // namespace metate::cuda::arch
