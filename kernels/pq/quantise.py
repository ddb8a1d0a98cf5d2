"""Distance tables, codes of vectors and vectors of codes."""

import triton
import triton.language as tl

from .scan import load_code
from .search import finite

TINY = tl.constexpr(2.0**-126)


@triton.jit
def book_distance(x, x_strides, books, row, level, n, d, TYPE: tl.constexpr):
    """(rows, levels) squared distances in TYPE."""
    total = tl.zeros((row.shape[0], level.shape[0]), TYPE)
    for j in range(d):
        at = x + row * x_strides[0] + tl.cast(j, tl.int64) * x_strides[1]
        a = tl.load(at, mask=row < n, other=0.0).to(TYPE)
        difference = a[:, None] - tl.load(books + level * d + j).to(TYPE)[None, :]
        total += difference * difference
    return total


@triton.jit(do_not_specialize=["n"])
def encode_kernel(x, x_strides, books, out, n, M, d, L: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr):
    """The nearest of L centroids of a sub-vector: float32 tells which can be it, and float64 which it is."""
    m = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x += m * d * x_strides[1]
    books += m * L * d
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for first in range(0, L, BLOCK_L):
        distance = book_distance(x, x_strides, books, row, first + tl.arange(0, BLOCK_L), n, d, tl.float32)
        least = tl.minimum(least, tl.min(tl.where(finite(distance), distance, float("inf")), 1))
    error = (d + 16) * 2.0**-22
    limit = least * (1.0 + error) + (d + 16) * TINY
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    code = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, L, BLOCK_L):
        level = first + tl.arange(0, BLOCK_L)
        near = book_distance(x, x_strides, books, row, level, n, d, tl.float32) * (1.0 - error) > limit[:, None]
        near = ~near & (row < n)[:, None]
        if tl.max(near.to(tl.int32)) > 0:
            exact = book_distance(x, x_strides, books, row, level, n, d, tl.float64).to(tl.float32)
            exact = tl.where(near & finite(exact), exact, float("inf"))
            nearest = tl.min(exact, 1)
            at = tl.min(tl.where(exact == nearest[:, None], level[None, :], L), 1)
            code = tl.where(nearest < best, at, code)
            best = tl.minimum(best, nearest)
    tl.store(out + row * M + m, code, mask=row < n)


@triton.jit(do_not_specialize=["count"])
def pack_kernel(indices, out, count, M, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The bytes of rows of M numbers: each from those that may reach into it."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = byte // row_bytes
    bit = (byte % row_bytes).to(tl.int32) * 8
    value = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(8 // BITS + 2):
        m = bit // BITS + part
        number = tl.load(indices + row * M + m, mask=(byte < count) & (m < M), other=0)
        shift = m * BITS - bit
        value |= tl.where(shift < 0, number >> tl.maximum(-shift, 0), number << tl.minimum(tl.maximum(shift, 0), 8))
    tl.store(out + byte, value.to(tl.uint8), mask=byte < count)


@triton.jit(do_not_specialize=["count"])
def decode_kernel(codes, codes_strides, books, out, count, M, D, d, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // D
    column = at % D
    m = column // d
    code = load_code(codes + row * codes_strides[0], codes_strides[1], m * BITS, inside, BITS)
    value = tl.load(books + ((m << BITS) + code) * d + column % d, mask=inside)
    tl.store(out + at, value, mask=inside)


@triton.jit(do_not_specialize=["Q"])
def tables_kernel(queries, query_strides, books, book_strides, out, Q, M, L, d, L2: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_L: tl.constexpr):  # fmt: skip
    """A tile of the table of one sub-vector: BLOCK queries, BLOCK_L centroids."""
    m = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_L)
    q = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    level = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (q < Q)[:, None] & (level < L)[None, :]
    total = tl.zeros((BLOCK, BLOCK_L), tl.float32)
    for j in range(d):
        a = tl.load(queries + q * query_strides[0] + (m * d + j) * query_strides[1], mask=q < Q, other=0.0)
        at = books + m * book_strides[0] + level.to(tl.int64) * book_strides[1] + tl.cast(j, tl.int64) * book_strides[2]
        b = tl.load(at, mask=level < L, other=0.0)
        if L2:
            difference = a[:, None] - b[None, :]
            total += difference * difference
        else:
            total += a[:, None] * b[None, :]
    tl.store(out + (q[:, None] * M + m) * L + level[None, :], total, mask=inside)
