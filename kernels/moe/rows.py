"""Rows of tokens sorted by expert: the sort of slots, and rows moved to their experts and summed back."""

import triton
import triton.language as tl

NOBODY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def numbers_of(experts, strides, slot, k, slots, num_experts):
    """The expert of each slot, num_experts where it has none, NOBODY where there is no slot."""
    pointers = experts + (slot // k).to(tl.int64) * strides[0] + (slot % k).to(tl.int64) * strides[1]
    number = tl.load(pointers, mask=slot < slots, other=NOBODY)
    return tl.where((slot < slots) & ((number < 0) | (number > num_experts)), num_experts, number)


@triton.jit(do_not_specialize=["slots"])
def sort_kernel(experts, order, inverse, offsets, strides, k, slots, num_experts, BLOCK_E: tl.constexpr,
                BLOCK_S: tl.constexpr):  # fmt: skip
    """Each program looks at all slots for BLOCK_E experts: first how many are of lower ones, then where each own one
    goes. Slots of no expert are sorted behind the others, and leave no trace but -1."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    row = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, slots, BLOCK_S):
        number = numbers_of(experts, strides, first + s, k, slots, num_experts)
        row += tl.sum((number[None, :] < expert[:, None]).to(tl.int32), 1)
    tl.store(offsets + expert, row, mask=expert <= num_experts)
    for first in range(0, slots, BLOCK_S):
        slot = first + s
        own = numbers_of(experts, strides, slot, k, slots, num_experts)[None, :] == expert[:, None]
        place = row[:, None] + tl.cumsum(own.to(tl.int32), 1) - 1
        none = (expert == num_experts)[:, None]
        tl.store(order + place, tl.where(none, -1, slot[None, :]), mask=own)
        tl.store(inverse + tl.broadcast_to(slot[None, :], place.shape), tl.where(none, -1, place), mask=own)
        row += tl.sum(own.to(tl.int32), 1)


@triton.jit
def tile_of(columns, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns of this program."""
    tiles = tl.cdiv(columns, BLOCK_D)
    program = tl.program_id(0)
    return program // tiles * BLOCK_R + tl.arange(0, BLOCK_R), program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def load_rows(x, strides, row, inside, column, columns):
    """(rows, columns) in float32, zeros outside."""
    pointers = x + (row.to(tl.int64) * strides[0])[:, None] + (column.to(tl.int64) * strides[1])[None, :]
    return tl.load(pointers, mask=inside[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(out, value, row, rows, column, columns):
    pointers = out + (row.to(tl.int64) * columns)[:, None] + column[None, :]
    tl.store(pointers, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "slots"])
def permute_kernel(x, order, out, x_strides, order_stride, k, slots, rows, columns, BLOCK_R: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    row, column = tile_of(columns, BLOCK_R, BLOCK_D)
    slot = tl.load(order + row.to(tl.int64) * order_stride, mask=row < rows, other=-1)
    value = load_rows(x, x_strides, slot // k, (slot >= 0) & (slot < slots), column, columns)
    store_rows(out, value, row, rows, column, columns)


@triton.jit(do_not_specialize=["rows", "tokens"])
def unpermute_kernel(y, inverse, weights, out, y_strides, inverse_strides, k, rows, tokens, columns,
                     BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    token, column = tile_of(columns, BLOCK_R, BLOCK_D)
    wide = token.to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for slot in range(k):
        j = tl.cast(slot, tl.int64)
        row = tl.load(inverse + wide * inverse_strides[0] + j * inverse_strides[1], mask=token < tokens, other=-1)
        there = (row >= 0) & (row < rows)
        value = load_rows(y, y_strides, row, there, column, columns)
        if weights is not None:
            weight = tl.load(weights[0] + wide * weights[1] + j * weights[2], mask=there, other=0.0).to(tl.float32)
            total = tl.fma(tl.broadcast_to(weight[:, None], value.shape), value, total)
        else:
            total += value
    store_rows(out, total, token, tokens, column, columns)


@triton.jit(do_not_specialize=["rows", "slots"])
def place_kernel(inverse, order, inverse_strides, k, rows, slots, BLOCK: tl.constexpr):
    """order[inverse[slot]] = slot."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pointers = inverse + (slot // k).to(tl.int64) * inverse_strides[0] + (slot % k).to(tl.int64) * inverse_strides[1]
    row = tl.load(pointers, mask=slot < slots, other=-1)
    tl.store(order + row, slot, mask=(row >= 0) & (row < rows))


@triton.jit(do_not_specialize=["rows"])
def unpermute_backward_kernel(dout, y, order, weights, dy, d_weights, dout_strides, y_strides, k, rows, columns,
                              BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Each program owns BLOCK_R rows of y, of which `order` says whose they are."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(order + row, mask=row < rows, other=-1)
    there = slot >= 0
    token = slot // k
    weight = tl.full((BLOCK_R,), 1.0, tl.float32)
    if weights is not None:
        pointers = weights[0] + token.to(tl.int64) * weights[1] + (slot % k).to(tl.int64) * weights[2]
        weight = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    dot = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, columns, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        slope = load_rows(dout, dout_strides, token, there, column, columns)
        store_rows(dy, slope * weight[:, None], row, rows, column, columns)
        if weights is not None:
            dot += slope * load_rows(y, y_strides, row, there, column, columns)
    if weights is not None:
        tl.store(d_weights + slot, tl.sum(dot, 1), mask=there)
