// Products with a low-bit weight W (rows n, columns k), read as it lies in its file, or in tiles.
//
// With stored column j of row n in group g = j / group_size:
//   code  = bits j·bits … (j+1)·bits - 1 of row n of codes, least significant first
//   value = codebook[code], or code - zero - zeros[n, g]
//   scale = scales[n, g], times super_scales[n, g / super_groups] where there are such; offset likewise, 0 without
//   W[n, permutation[j]] = value · scale + offset;  without a permutation, W[n, j]
//
// In a tile, codes of 4 bits of 16 rows are interleaved: 8 columns are a dword, and dword j of row r of the 16 is
// number 16 j + r. A tile takes the bytes that its rows would. W is tiles where rows % 16 == 0, columns % 32 == 0, and
// group_size % 32 == 0 or >= columns.
//
// Sums are float32, or exact in whole numbers: 16-bit floats may be rounded to multiples of a power of two that leave
// the largest |x| of at most 128 columns 22 bits, or 14 where that moves them by less than their dtype has rounded them
// (in the root mean square). With bfloat16 x, entries of a codebook may be rounded to bfloat16, and W in a product x W.
// A row of the result depends on that row of x alone, not on how many rows there are.
//
// With int8_activations, x is rounded first: a chunk is a run of stored columns that ends at every 32nd column and at
// every group's end; with `largest` the largest |x| of the row in it, x becomes round(x · (127 / largest)) · (largest
// / 127), in float32, ties to even; 0 where largest is 0, or so small that 127 / largest is infinite. With bfloat16 x
// and a codebook, the rounded x may be rounded to bfloat16.
#pragma once

#include "metate.h"

namespace metate {

constexpr int64_t rows_of_tile = 16;

struct LowBitMatrix {
    int64_t rows, columns;
    int64_t bits;  // 1 to 8
    int64_t group_size, super_groups;
    int64_t zero;
    View<2> codes;                   // (rows, ⌈columns · bits / 8⌉) u8, the bytes of a row side by side; or tiles, i32
    View<2> scales, super_scales;    // (rows, groups), floating or i8; (rows, ⌈groups / super_groups⌉) or absent
    View<2> zeros;                   // (rows, groups) u8, or absent
    View<2> offsets, super_offsets;  // like the scales, or absent
    View<1> codebook;                // (2^bits) f32 (f64), or absent
    View<1> permutation;             // (columns) i32, a permutation, or absent

    METATE_INLINE bool in_tiles() const { return codes.dtype == DType::i32; }
    // Bytes from the codes of one row to those of the next, or a sixteenth of a tile.
    METATE_INLINE int64_t row_bytes() const { return codes.stride[0] * bytes_of(codes.dtype); }
};

// What low-rank matrices add to a product: row m gains scaling[a] · low[m] · right[a]ᵀ of the adapter a = ids[m], in
// float32 like the product, before it is rounded. Without ids every row has adapter 0; a number that is none of an
// adapter adds nothing.
struct LowRank {
    View<2> low;      // (M, rank) f32 (f64), or absent: nothing is added
    View<3> right;    // (adapters, columns of the result, rank), f32 or the dtype of x
    View<1> scaling;  // (adapters) f32 (f64)
    View<1> ids;      // (M) i32, or absent
};

struct QuantLinear {
    View<2> x;  // (M, columns)
    LowBitMatrix w;
    View<1> bias;  // (rows) f32 or the dtype of x, or absent
    bool int8_activations;
    View<2> out;  // (M, rows), dtype of x
    LowRank update{};
};

struct QuantMatmul {
    View<2> x;  // (M, rows)
    LowBitMatrix w;
    View<2> out;  // x · W: (M, columns), dtype of x
    LowRank update{};
};

// out = W, computed in float32: the product with the scale is rounded, then the sum with the offset, then to the dtype
// of out.
struct Dequantize {
    LowBitMatrix w;
    View<2> out;  // (rows, columns) f32, bf16 or f16
};

// Calls whose work is shared out as one: alike in all but the numbers of rows of x and the memory.
struct QuantLinears {
    const QuantLinear* calls;
    int64_t count;  // at least 1
};
struct QuantMatmuls {
    const QuantMatmul* calls;
    int64_t count;
};

// out[m] = x[m] · a[ids[m]]ᵀ; zeros where a row has no adapter.
struct LoraShrink {
    View<2> x;    // (M, K)
    View<3> a;    // (adapters, rank, K), f32 or the dtype of x
    View<1> ids;  // as in LowRank
    View<2> out;  // (M, rank) f32 (f64)
};

// out[a] = Σ low[m]ᵀ · x[m] over the rows m of adapter a, in ascending order; zeros where it has none.
struct LoraOuter {
    View<2> x;    // (M, K)
    View<2> low;  // (M, rank) f32 (f64)
    View<1> ids;  // as in LowRank
    View<3> out;  // (adapters, rank, K) f32 (f64)
};

namespace cpu {
void quant_linear(const QuantLinear&, const Runtime&);
void quant_matmul(const QuantMatmul&, const Runtime&);
void dequantize(const Dequantize&, const Runtime&);
void quant_linears(const QuantLinears&, const Runtime&);
void quant_matmuls(const QuantMatmuls&, const Runtime&);
void lora_shrink(const LoraShrink&, const Runtime&);
void lora_outer(const LoraOuter&, const Runtime&);
}  // namespace cpu

namespace cuda {
void quant_linear(const QuantLinear&, const Device&);  // without int8_activations
void quant_matmul(const QuantMatmul&, const Device&);
void dequantize(const Dequantize&, const Device&);
void lora_shrink(const LoraShrink&, const Device&);
void lora_outer(const LoraOuter&, const Device&);
}  // namespace cuda

}  // namespace metate
