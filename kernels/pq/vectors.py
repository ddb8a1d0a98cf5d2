"""Vectors are first compared in bfloat16, group by group of rows, to tell which groups cannot hold a result; what is
left is compared exactly, in float64."""

import triton
import triton.language as tl

from .. import shared
from .search import EMPTY, add_best, finite, kept, keys_of, span


@triton.jit(do_not_specialize=["Q", "n"])
def bounds_kernel(queries, base, squares, keep, out, Q, n, D, groups, L2: tl.constexpr, LARGEST: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """The least of every group of rows of |b|² - 2 q b, or of q b, or of their opposites; -inf where one is no number.
    Both operands are contiguous bfloat16."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    tiles = tl.cdiv(n, BLOCK_N)
    q = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at = queries + (tl.minimum(q, Q - 1).to(tl.int64) * D)[:, None]
    base_at = base + (tl.minimum(row, n - 1) * D)[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left = tl.load(q_at + k[None, :], mask=(k < D)[None, :], other=0.0)
        right = tl.load(base_at + k[:, None], mask=(k < D)[:, None], other=0.0)
        value = shared.product(left, right, value)
    if L2:
        value = tl.load(squares + row, mask=row < n, other=0.0)[None, :] - 2.0 * value
    if LARGEST:
        value = -value
    value = tl.where(finite(value), value, -float("inf"))
    value = tl.where(kept(keep, row, row < n)[None, :], value, float("inf"))
    least = tl.min(tl.reshape(value, (BLOCK_M, GROUPS, GROUP)), 2)
    group = (tl.program_id(0) % tiles).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = out + q.to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(at, least, mask=(q < Q)[:, None] & (group < groups)[None, :])


@triton.jit
def exact_distance(query, base, base_stride, row, inside, scale, offset, D, METRIC: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """Σ (q - b)², Σ q b, Σ |q - b| or max |q - b| in float64, rounded once; METRIC as csrc/pq.h numbers them."""
    total = tl.zeros((row.shape[0],), tl.float64)
    most = tl.zeros((row.shape[0],), tl.float64)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        q = tl.load(query + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
        at = base + row[:, None] * base_stride + k[None, :]
        b = tl.load(at, mask=inside[:, None] & (k < D)[None, :], other=0.0).to(tl.float64)
        if scale is not None:
            b *= tl.load(scale + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
            b += tl.load(offset + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
        if METRIC == 0:
            b = (q - b) * (q - b)
        elif METRIC == 1:
            b *= q
        else:
            b = tl.abs(q - b)
        if METRIC == 4:
            most = tl.maximum(most, tl.max(b, 1))
            b -= b  # NaN, which a maximum drops
        total += tl.sum(b, 1)
    return (total + most).to(tl.float32)


@triton.jit(do_not_specialize=["n", "P", "k", "slices"])
def exact_kernel(queries, base, base_stride, scale, offset, ranges, ranges_strides, ranks, keep, above, bounds,
                 limits, out, n, P, D, k, groups, slices, METRIC: tl.constexpr, LARGEST: tl.constexpr,
                 ONE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The k best rows for a query, first of BLOCK, among every `slices`-th chunk of its ranges; where groups of rows
    have bounds, those count alone whose bound is not above the query's limit."""
    q, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = queries + q * D
    best = tl.full((BLOCK,), EMPTY, tl.int64)
    if above is not None:
        above += q
    for p in range(P):
        first, last = span(ranges, ranges_strides, q, p, n)
        chunks = ((tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK).to(tl.int32)
        for chunk in range((part + p) % slices, chunks, slices):
            row = first + tl.cast(chunk, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = kept(keep, row, row < last)
            if bounds is not None:
                bound = tl.load(bounds + q * groups + row // GROUP, mask=inside, other=float("inf"))
                inside &= bound <= tl.load(limits + q)
            if tl.max(inside.to(tl.int32)) > 0:
                distance = exact_distance(query, base, base_stride, row, inside, scale, offset, D, METRIC, BLOCK_K)
                best = add_best(best, keys_of(distance, row, ranks, inside, LARGEST, above), k, ONE)
    tl.store(out + (q * slices + part) * BLOCK + tl.arange(0, BLOCK), best)
