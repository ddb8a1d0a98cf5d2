"""Which tiles a kernel visits: the keys a block of queries can see, and the queries that can see a block of keys.

Both give four tile-aligned positions (start, whole_start, whole_stop, stop). Nothing outside start … stop is allowed,
everything inside whole_start … whole_stop is; `edge_tile` walks the two ends that are left for masking.
"""

import triton
import triton.language as tl

from .tiles import block_is_whole, interval_rows

NEVER = tl.constexpr(2**31 - 1)
CHUNK = tl.constexpr(1024)  # queries looked at together when their intervals are searched


@triton.jit
def align(start, whole_start, whole_stop, stop, masks, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Start and stop outwards, the whole part inwards; no whole part where single elements may be masked anywhere."""
    start = tl.minimum(tl.maximum(start, 0), size) // BLOCK * BLOCK
    stop = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(stop, 0), size), BLOCK) * BLOCK, start)
    whole_start = tl.cdiv(tl.minimum(tl.maximum(whole_start, 0), size), BLOCK) * BLOCK
    whole_stop = tl.minimum(tl.maximum(whole_stop, 0), size) // BLOCK * BLOCK
    whole_start = tl.minimum(tl.maximum(whole_start, start), stop)
    whole_stop = tl.minimum(tl.maximum(whole_stop, whole_start), stop)
    if masks[2] is not None:
        whole_stop = whole_start
    elif masks[1] is not None:
        whole_stop = tl.where(block_is_whole(masks, BLOCK_M, BLOCK_N), whole_stop, whole_start)
    return start, whole_start, whole_stop, stop


@triton.jit
def keys_of(m0, span, window, masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    size_q, size_k = span[4], span[6]
    diagonal, left, right = window
    last = tl.minimum(m0 + BLOCK_M, size_q) - 1
    start = m0 + diagonal - left
    stop = last + diagonal + right + 1
    whole_start = last + diagonal - left
    whole_stop = m0 + diagonal + right + 1
    if masks[0] is not None:
        i = m0 + tl.arange(0, BLOCK_M)
        begin, end = interval_rows(i, span, masks[0])
        sees = begin < end
        start = tl.maximum(start, tl.min(tl.where(sees, begin, NEVER), 0))
        stop = tl.minimum(stop, tl.max(tl.where(sees, end, 0), 0))
        whole_start = tl.maximum(whole_start, tl.max(tl.where(i < size_q, begin, 0), 0))
        whole_stop = tl.minimum(whole_stop, tl.min(tl.where(i < size_q, end, NEVER), 0))
    return align(start, whole_start, whole_stop, stop, masks, size_k, BLOCK_M, BLOCK_N, BLOCK_N)


@triton.jit
def queries_of(n0, span, window, masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    size_q, size_k = span[4], span[6]
    diagonal, left, right = window
    last = tl.minimum(n0 + BLOCK_N, size_k) - 1
    start = n0 - diagonal - right
    stop = last - diagonal + left + 1
    whole_start = last - diagonal - right
    whole_stop = n0 - diagonal + left + 1
    if masks[0] is not None:
        start, stop, whole_start, whole_stop = within_intervals(
            tl.minimum(tl.maximum(start, 0), size_q), tl.minimum(stop, size_q), whole_start, whole_stop, n0, last, span,
            masks[0])  # fmt: skip
    return align(start, whole_start, whole_stop, stop, masks, size_q, BLOCK_M, BLOCK_N, BLOCK_M)


@triton.jit
def within_intervals(start, stop, whole_start, whole_stop, n0, last, span, intervals):
    """Narrows the range to queries whose interval meets the keys n0 … last, and the whole part to the queries whose
    interval covers them, if those are consecutive."""
    at = tl.arange(0, CHUNK)
    first_meet = tl.full((CHUNK,), NEVER, tl.int32)
    last_meet = tl.full((CHUNK,), -1, tl.int32)
    first_cover = tl.full((CHUNK,), NEVER, tl.int32)
    last_cover = tl.full((CHUNK,), -1, tl.int32)
    covers = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(start, stop, CHUNK):
        i = chunk + at
        begin, end = interval_rows(i, span, intervals)
        meet = (begin <= last) & (n0 < end) & (begin < end)
        cover = (begin <= n0) & (last < end)
        first_meet = tl.where(meet, tl.minimum(first_meet, i), first_meet)
        last_meet = tl.where(meet, i, last_meet)
        first_cover = tl.where(cover, tl.minimum(first_cover, i), first_cover)
        last_cover = tl.where(cover, i, last_cover)
        covers += cover.to(tl.int32)
    start = tl.maximum(start, tl.min(first_meet, 0))
    stop = tl.minimum(stop, tl.max(last_meet, 0) + 1)
    first = tl.min(first_cover, 0)
    final = tl.max(last_cover, 0)
    whole_start = tl.maximum(whole_start, first)
    whole_stop = tl.where(tl.sum(covers, 0) == final - first + 1, tl.minimum(whole_stop, final + 1), 0)
    return start, stop, whole_start, whole_stop


@triton.jit
def edge_tile(t, start, whole_start, whole_stop, BLOCK: tl.constexpr):
    """Position of the t-th tile outside the whole part."""
    before = (whole_start - start) // BLOCK
    return tl.where(t < before, start + t * BLOCK, whole_stop + (t - before) * BLOCK)


@triton.jit
def edge_tiles(start, whole_start, whole_stop, stop, BLOCK: tl.constexpr):
    return (whole_start - start + stop - whole_stop) // BLOCK
