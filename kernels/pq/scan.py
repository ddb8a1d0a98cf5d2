"""Numbers in packed and in interleaved codes, and the scan of codes."""

import triton
import triton.language as tl

from .search import EMPTY, add_best, kept, keys_of, span


@triton.jit
def load_code(at, stride, bit, inside, BITS: tl.constexpr):
    """The number that begins at a bit of rows of bytes, from its byte and those that it reaches into."""
    stride = tl.cast(stride, tl.int64)
    at += bit // 8 * stride
    shift = (bit % 8).to(tl.int32)
    code = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        code |= tl.load(at + stride, mask=inside & (shift + BITS > 8), other=0).to(tl.int32) << 8
        code |= tl.load(at + 2 * stride, mask=inside & (shift + BITS > 16), other=0).to(tl.int32) << 16
    return (code >> shift) & ((1 << BITS) - 1)


@triton.jit
def code_at(codes, strides, row, m, M, inside, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Number m of rows, packed or in blocks of 32 rows."""
    if BLOCKS:
        byte = (row // 32 * M + m) * (4 * BITS) + row % (4 * BITS)
        code = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 4:
            code = (code >> (row % 32 // 16 * 4).to(tl.int32)) & 15
    else:
        bit = tl.full(row.shape, m * BITS, tl.int32)
        code = load_code(codes + row * strides[0], strides[1], bit, inside, BITS)
    return code


@triton.jit(do_not_specialize=["n", "P", "k", "slices"])
def scan_kernel(tables, codes, codes_strides, ranges, ranges_strides, bias, bias_strides, row_bias, ranks, keep, above,
                out, n, P, M, k, slices, BITS: tl.constexpr, BLOCKS: tl.constexpr, LARGEST: tl.constexpr,
                ONE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The k best rows for a query, first of BLOCK, among every `slices`-th chunk of its ranges."""
    q, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables += q * M << BITS
    best = tl.full((BLOCK,), EMPTY, tl.int64)
    if above is not None:
        above += q
    for p in range(P):
        first, last = span(ranges, ranges_strides, q, p, n)
        added = 0.0
        if bias is not None:
            added = tl.load(bias + q * bias_strides[0] + tl.cast(p, tl.int64) * bias_strides[1])
        chunks = ((tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK).to(tl.int32)
        for chunk in range((part + p) % slices, chunks, slices):
            row = first + tl.cast(chunk, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = kept(keep, row, row < last)
            total = tl.zeros((BLOCK,), tl.float32)
            for m in range(M):
                code = code_at(codes, codes_strides, row, m, M, inside, BITS, BLOCKS)
                total += tl.load(tables + (m << BITS) + code)
            if row_bias is not None:
                total += tl.load(row_bias + row, mask=inside, other=0.0)
            if bias is not None:
                total += added
            best = add_best(best, keys_of(total, row, ranks, inside, LARGEST, above), k, ONE)
    tl.store(out + (q * slices + part) * BLOCK + tl.arange(0, BLOCK), best)
