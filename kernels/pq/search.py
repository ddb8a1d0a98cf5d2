"""The k best rows that a program has seen, as 64-bit numbers: the distance above, in an order that whole numbers have,
and the rank of the row's id below, so that equal distances are told apart."""

import triton
import triton.language as tl

EMPTY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.constexpr_function
def log2(size):
    return size.bit_length() - 1


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def kept(keep, row, inside):
    """Whether rows are inside and the bitmap has them."""
    if keep is not None:
        inside &= (tl.load(keep + row // 8, mask=inside, other=0).to(tl.int32) >> (row % 8).to(tl.int32)) & 1 == 1
    return inside


@triton.jit
def span(ranges, ranges_strides, q, p, n):
    """First and last row of range p, cut to those that exist."""
    first = tl.cast(0, tl.int64)
    last = tl.cast(n, tl.int64)
    if ranges is not None:
        at = ranges + q * ranges_strides[0] + tl.cast(p, tl.int64) * ranges_strides[1]
        first = tl.minimum(tl.maximum(tl.load(at), 0), last)
        last = tl.minimum(tl.maximum(tl.load(at + ranges_strides[2]), 0), last)
    return first, last


@triton.jit
def swap(x, falls, axis: tl.constexpr):
    """Neighbours along an axis of two in order: the lesser first, or where it falls last."""
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (len(x.shape) - axis - 1))
    return tl.where(second == falls, tl.min(x, axis, keep_dims=True), tl.max(x, axis, keep_dims=True))


@triton.jit
def merge_steps(x, falls, stage: tl.constexpr):
    """Sorts runs of 2**stage numbers that rise and then fall; x is a cube of sides 2."""
    for i in tl.static_range(stage):
        x = swap(x, falls, len(x.shape) - stage + i)
    return x


@triton.jit
def sort_falling(x, STEPS: tl.constexpr):
    for stage in tl.static_range(1, STEPS):
        x = merge_steps(x, tl.reshape(tl.arange(0, 2), [1] * (STEPS - stage - 1) + [2] + [1] * stage), stage)
    return merge_steps(x, 1, STEPS)


@triton.jit
def add_best(best, key, k, ONE: tl.constexpr):
    """The best of `best`, which rises, and of other keys; all that changes is behind where k keys are below the new."""
    if ONE:
        best = tl.minimum(best, tl.min(key))
    elif tl.min(key) < tl.max(tl.where(tl.arange(0, best.shape[0]) < k, best, -1 - EMPTY)):
        STEPS: tl.constexpr = log2(best.shape[0])
        new = sort_falling(tl.reshape(key, [2] * STEPS), STEPS)
        new = merge_steps(tl.minimum(tl.reshape(best, [2] * STEPS), new), 0, STEPS)
        best = tl.reshape(new, best.shape)
    return best


@triton.jit
def keys_of(distance, row, ranks, inside, LARGEST: tl.constexpr, above):
    """What sorts rows by distance and rank; those whose distance is not finite come last, and so do those that an
    earlier pass has found: up to the key at `above`."""
    distance += 0.0  # -0 is no less than 0
    bits = (-distance if LARGEST else distance).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    inside &= finite(distance)
    rank = row if ranks is None else tl.load(ranks + row, mask=inside, other=0)
    key = tl.where(inside, order << 32 | rank, EMPTY)
    if above is not None:
        key = tl.where(key > tl.load(above), key, EMPTY)
    return key
