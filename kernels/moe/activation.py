"""Gated activations and their gradients."""

import triton
import triton.language as tl

from .route import sigmoid
from .rows import store_rows, tile_of

SILU, GELU, GELU_TANH, RELU, RELU2 = (tl.constexpr(activation) for activation in range(5))
GATE_UP, UP_GATE, INTERLEAVED, UNGATED = (tl.constexpr(layout) for layout in range(4))


@triton.jit
def gelu_argument(x):
    """0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def normal_below(x):
    """The normal distribution's share below x, as csrc/cpu/moe/functions.h has it: 1 + erf would cancel below 0."""
    size = tl.abs(x * 0.7071067811865476)
    s = tl.where(size > 4.25, 4.25, size)
    p = 8.48996038e-8 * s - 2.22529411e-6
    p = p * s + 2.58575656e-5
    p = p * s - 1.74113418e-4
    p = p * s + 7.30304280e-4
    p = p * s - 1.74463342e-3
    p = p * s + 1.64713143e-4
    p = p * s + 1.91894025e-2
    p = p * s - 1.02801412e-1
    p = p * s - 6.36613905e-1
    p = p * s - 1.12837958
    tail = 0.5 * tl.exp(p * s + (s - size) * (s + size))
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        x = x * sigmoid(alpha * x)
    elif ACTIVATION == GELU:
        x = x * normal_below(x)
    elif ACTIVATION == GELU_TANH:
        x = x * sigmoid(gelu_argument(x))
    else:
        x = tl.where(x <= 0.0, 0.0, x)
        if ACTIVATION == RELU2:
            x = x * x
    return x


@triton.jit
def clamp(x, low, high):
    """Leaves NaN as it is."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def before_overflow(x):
    """Derivatives that end in 0 and 1 have long done so here; beyond, their terms would overflow."""
    return clamp(x, -1000.0, 1000.0)


@triton.jit
def slope_of(x, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        z = before_overflow(alpha * x)
        x = sigmoid(z) * (1.0 + z * sigmoid(-z))  # 1 - sigmoid(z) leaves few digits where that is near 1
    elif ACTIVATION == GELU:
        x = before_overflow(x)
        bell = x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        x = normal_below(x) + bell
    elif ACTIVATION == GELU_TANH:
        x = before_overflow(x)
        z = gelu_argument(x)
        x = sigmoid(z) * (1.0 + x * sigmoid(-z) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == RELU:
        x = tl.where(x > 0.0, 1.0, 0.0)
    else:
        x = tl.where(x <= 0.0, 0.0, 2.0 * x)
    return x


@triton.jit
def places_of(column, width, LAYOUT: tl.constexpr):
    """Columns of x in which gate and up stand."""
    gate = column
    up = column + width
    if LAYOUT == UP_GATE:
        gate = column + width
        up = column
    elif LAYOUT == INTERLEAVED:
        gate = 2 * column
        up = 2 * column + 1
    return gate, up


@triton.jit
def load_at(x, strides, row, column, inside):
    pointers = x + (row.to(tl.int64) * strides[0])[:, None] + (column.to(tl.int64) * strides[1])[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, out, x_strides, rows, width, limit, alpha, shift, ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row, column = tile_of(width, BLOCK_R, BLOCK_D)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at_gate, at_up = places_of(column, width, LAYOUT)
    gate = load_at(x, x_strides, row, at_gate, inside)
    value = activate(tl.where(gate > limit, limit, gate), alpha, ACTIVATION)
    if LAYOUT != UNGATED:
        value *= clamp(load_at(x, x_strides, row, at_up, inside), -limit, limit) + shift
    store_rows(out, value, row, rows, column, width)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(grad, x, dx, grad_strides, x_strides, rows, width, columns, limit, alpha, shift,
                    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    row, column = tile_of(width, BLOCK_R, BLOCK_D)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at_gate, at_up = places_of(column, width, LAYOUT)
    slope = load_at(grad, grad_strides, row, column, inside)
    given = load_at(x, x_strides, row, at_gate, inside)
    gate = tl.where(given > limit, limit, given)
    d_gate = slope * slope_of(gate, alpha, ACTIVATION)
    at_row = dx + (row.to(tl.int64) * columns)[:, None]
    if LAYOUT != UNGATED:
        up = load_at(x, x_strides, row, at_up, inside)
        d_gate *= clamp(up, -limit, limit) + shift
        d_up = tl.where(tl.abs(up) > limit, 0.0, slope * activate(gate, alpha, ACTIVATION))
        tl.store(at_row + at_up[None, :], d_up.to(dx.dtype.element_ty), mask=inside)
    d_gate = tl.where(given > limit, 0.0, d_gate)  # NaN stays
    tl.store(at_row + at_gate[None, :], d_gate.to(dx.dtype.element_ty), mask=inside)
