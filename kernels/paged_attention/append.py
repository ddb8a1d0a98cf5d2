"""Writing tokens into a paged cache: keys are rotated, both are brought to the cache's format."""

import triton
import triton.language as tl

from ..shared import rounded


@triton.jit
def load_row(x, token, head, col, inside):
    pointers = x[0] + token.to(tl.int64) * x[1] + head.to(tl.int64) * x[2] + col.to(tl.int64) * x[3]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_rotated(x, token, head, col, position, rotation, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
                 DIM: tl.constexpr):  # fmt: skip
    """The columns `col` of a row, of which the first ROTATED turn in pairs of neighbours, or of the halves."""
    inside = col < DIM
    value = load_row(x, token, head, col, inside)
    if ROTATED > 0:
        turns = col < ROTATED
        if INTERLEAVED:
            first = col % 2 == 0
            other = col ^ 1
            angle = col // 2
        else:
            first = col < ROTATED // 2
            other = tl.where(first, col + ROTATED // 2, col - ROTATED // 2)
            angle = col % (ROTATED // 2)
        partner = load_row(x, token, head, other, turns)
        row = rotation[0] + position.to(tl.int64) * rotation[1]
        cos = tl.load(row + angle.to(tl.int64) * rotation[2], mask=turns, other=0.0)
        row = rotation[3] + position.to(tl.int64) * rotation[4]
        sin = tl.load(row + angle.to(tl.int64) * rotation[5], mask=turns, other=0.0)
        turned = rounded(value, cos) + rounded(tl.where(first, -partner, partner), sin)
        value = tl.where(turns, turned, value)
    return value


@triton.jit
def round_even(x):
    """Exact to the nearest whole number, ties to even, up to 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float_to_float8(x):
    """e4m3 as a byte, saturating. What is below its normal numbers is rounded by adding a float whose last bit is its
    smallest number."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | (bits >> 24) & 0x80).to(tl.uint8)


@triton.jit
def steps(x, amax, most: tl.constexpr):
    """x in units of amax / most, and that unit; 0 in units of 0. Divisions are exact, so that all machines agree."""
    unit = tl.math.div_rn(amax, tl.zeros_like(amax) + most)
    divisor = tl.where(unit == 0.0, 1.0, unit)
    return tl.math.div_rn(x, divisor + tl.zeros_like(x)), unit


@triton.jit
def store_row(cache, scale, x, odd, page, row, head, col, DIM: tl.constexpr, FORMAT: tl.constexpr):
    """Writes elements `col`; of packed formats, x and `odd` are the elements 2 col and 2 col + 1."""
    amax = tl.max(tl.abs(x), 0)
    if FORMAT == "int4":
        amax = tl.maximum(amax, tl.max(tl.abs(odd), 0))
        even_steps, unit = steps(x, amax, 7.0)
        odd_steps, _ = steps(odd, amax, 7.0)
        low = tl.minimum(tl.maximum(round_even(even_steps), -8.0), 7.0) + 8.0
        high = tl.minimum(tl.maximum(round_even(odd_steps), -8.0), 7.0) + 8.0
        x = (low.to(tl.int32) | high.to(tl.int32) << 4).to(tl.uint8)
    elif FORMAT == "int8":
        x, unit = steps(x, amax, 127.0)
        x = round_even(x).to(tl.int32).to(tl.int8)
    elif FORMAT == "float8":
        if scale is not None:
            x, unit = steps(x, amax, 448.0)
        x = float_to_float8(x)
    PACKED: tl.constexpr = 2 if FORMAT == "int4" else 1
    pointers = cache[0] + page * cache[1] + row * cache[2] + head.to(tl.int64) * cache[3] + col.to(tl.int64) * cache[4]
    tl.store(pointers, x.to(cache[0].dtype.element_ty), mask=col < DIM // PACKED)
    if scale is not None:
        tl.store(scale[0] + page * scale[1] + row * scale[2] + head.to(tl.int64) * scale[3], unit)


@triton.jit(do_not_specialize=["heads"])
def append_kernel(k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, rotation, positions, heads, page_size,
                  INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, ROTATED: tl.constexpr, DIM: tl.constexpr,
                  VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program per token and head."""
    token = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    page = slot // page_size
    row = slot % page_size
    position = slot
    if positions is not None:
        position = tl.load(positions + token).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if FORMAT == "int4":
        col = tl.arange(0, BLOCK // 2)
        even = load_rotated(k, token, head, 2 * col, position, rotation, ROTATED, INTERLEAVED, DIM)
        odd = load_rotated(k, token, head, 2 * col + 1, position, rotation, ROTATED, INTERLEAVED, DIM)
        store_row(k_cache, k_scale, even, odd, page, row, head, col, DIM, FORMAT)
        even = load_row(v, token, head, 2 * col, 2 * col < VALUE_DIM)
        odd = load_row(v, token, head, 2 * col + 1, 2 * col + 1 < VALUE_DIM)
        store_row(v_cache, v_scale, even, odd, page, row, head, col, VALUE_DIM, FORMAT)
    else:
        x = load_rotated(k, token, head, col, position, rotation, ROTATED, INTERLEAVED, DIM)
        store_row(k_cache, k_scale, x, None, page, row, head, col, DIM, FORMAT)
        x = load_row(v, token, head, col, col < VALUE_DIM)
        store_row(v_cache, v_scale, x, None, page, row, head, col, VALUE_DIM, FORMAT)
