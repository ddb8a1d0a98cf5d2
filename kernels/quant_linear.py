"""Products with low-bit weights in Triton: tiles of W are decoded as they are multiplied, whatever their format.

The weights are the left operand and a result's sum is cut into slices by the sizes of W alone. With few rows of x every
slice is a program of its own, and a second kernel adds the slices; with many, a program adds its slices in the same
order. So a row of the result does not depend on how many there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shared

STEP = 128  # what slices and whole sizes are multiples of; no tile is longer
CHUNK = tl.constexpr(32)  # columns of x that share a scale of their 8-bit form
MAGIC = tl.constexpr(0x4B000000)  # a number below 2^23 put into the last bits of the float 2^23 adds itself to it

# (BLOCK_N outputs, BLOCK_K summed, warps, stages), by the size of an element and the rows of x in a tile.
SHAPES = {
    "half 16": [(64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4)],
    "half 32": [(64, 64, 4, 4), (128, 64, 8, 4)],
    "half 64": [(64, 64, 4, 4), (128, 64, 8, 3)],
    "half 128": [(64, 64, 8, 3), (128, 32, 8, 4), (128, 64, 8, 3)],
    "float 4": [(64, 32, 4, 3), (32, 64, 4, 2)],
    "float 16": [(64, 32, 4, 3), (32, 32, 4, 3)],
    "float 64": [(64, 16, 4, 3), (64, 32, 8, 2)],
}


def config_of(shape: tuple[int, int, int, int]) -> triton.Config:
    outputs, summed, warps, stages = shape
    return triton.Config({"BLOCK_N": outputs, "BLOCK_K": summed}, num_warps=warps, num_stages=stages)


def class_of(named: dict[str, Any]) -> str:
    return f"{'float' if named['x'].element_size() == 4 else 'half'} {named['BLOCK_M']}"


def rows_of_a_tile(rows: int, dtype: torch.dtype) -> int:
    sizes = (4, 16, 64) if dtype == torch.float32 else (16, 32, 64, 128)
    return next((size for size in sizes if rows <= size), sizes[-1])


# Tiles of W. Its tensors are None or (pointer, strides); sizes = (rows, columns, row_bytes, group_size, super_groups,
# zero). A tile's first column is a multiple of 16. Rows past the end repeat the last one, columns hold anything.


@triton.jit
def load_bytes(codes, row, at, row_bytes, WHOLE: tl.constexpr):
    pointers = codes[0] + row[:, None] * codes[1] + (at.to(tl.int64) * codes[2])[None, :]
    return tl.load(pointers, mask=None if WHOLE else (at < row_bytes)[None, :]).to(tl.int32)


@triton.jit
def load_codes(codes, row, k0, row_bytes, BITS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, COLS) codes. Where codes may lie across two bytes, each is taken from the pair it begins in."""
    ROWS: tl.constexpr = row.shape[0]
    if 8 % BITS == 0:
        PARTS: tl.constexpr = 8 // BITS
        words = load_bytes(codes, row, k0 // PARTS + tl.arange(0, COLS // PARTS), row_bytes, WHOLE)
        code = tl.reshape(words[:, :, None] >> (tl.arange(0, PARTS) * BITS)[None, None, :], (ROWS, COLS))
    else:
        at = k0 // 8 * BITS + tl.arange(0, COLS // 2 if BITS == 3 else COLS)
        words = load_bytes(codes, row, at, row_bytes, False) | load_bytes(codes, row, at + 1, row_bytes, False) << 8
        bit = tl.arange(0, COLS) * BITS
        code = tl.gather(words, tl.broadcast_to((bit // 8)[None, :], (ROWS, COLS)), 1) >> (bit % 8)[None, :]
    return code & ((1 << BITS) - 1)


@triton.jit
def load_level(level, row, group, inside):
    """One number for each row and run of columns."""
    pointers = level[0] + row[:, None] * level[1] + (group.to(tl.int64) * level[2])[None, :]
    return tl.load(pointers, mask=inside).to(tl.float32)


@triton.jit
def load_levels(fine, coarse, row, group, super_groups, inside):
    level = load_level(fine, row, group, inside)
    if coarse is not None:
        level *= load_level(coarse, row, group // super_groups, inside)
    return level


@triton.jit
def per_column(level, COLS: tl.constexpr):
    """(rows, runs) → (rows, COLS)."""
    RUN: tl.constexpr = COLS // level.shape[1]
    if level.shape[1] == 1 or RUN == 1:
        level = tl.broadcast_to(level, (level.shape[0], COLS))
    else:
        runs = tl.broadcast_to(level[:, :, None], (level.shape[0], level.shape[1], RUN))
        level = tl.reshape(runs, (level.shape[0], COLS))
    return level


@triton.jit
def load_weight(codes, scales, super_scales, zeros, offsets, super_offsets, codebook, sizes, n0, k0, BITS: tl.constexpr,
                GRAIN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                ROUNDED: tl.constexpr = False):  # fmt: skip
    """(ROWS, COLS) weights. A group is whole runs of GRAIN columns; WHOLE says that COLS divides the columns, ROUNDED
    that products with scales are rounded before offsets are added."""
    rows, columns, row_bytes, group_size, super_groups, zero = sizes
    RUN: tl.constexpr = GRAIN if GRAIN < COLS else COLS
    row = tl.minimum(n0 + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    column = k0 + tl.arange(0, COLS // RUN) * RUN
    group = column // group_size
    inside = None if WHOLE else (column < columns)[None, :]
    code = load_codes(codes, row, k0, row_bytes, BITS, COLS, WHOLE)
    if codebook is not None:
        value = tl.reshape(tl.gather(codebook, tl.reshape(code, (ROWS * COLS,)), 0), (ROWS, COLS))
    else:
        center = 8388608.0 + tl.cast(zero, tl.float32)
        if zeros is not None:
            center = per_column(center + load_level(zeros, row, group, inside), COLS)
        value = (code | MAGIC).to(tl.float32, bitcast=True) - center
    scale = per_column(load_levels(scales, super_scales, row, group, super_groups, inside), COLS)
    weight = shared.rounded(value, scale) if ROUNDED and offsets is not None else value * scale
    if offsets is not None:
        weight += per_column(load_levels(offsets, super_offsets, row, group, super_groups, inside), COLS)
    return weight


@triton.jit
def store_outputs(out, value, n, m, x_rows, outputs, bias, places):
    """The tile (outputs n, rows m) of a contiguous result: with its bias, and where `places` has columns for it."""
    inside = n < outputs
    column = n.to(tl.int64)
    if bias is not None:
        value += tl.load(bias[0] + column * bias[1], mask=inside, other=0.0).to(tl.float32)[:, None]
    if places is not None:
        column = tl.load(places[0] + column * places[1], mask=inside, other=0).to(tl.int64)
    pointers = out + m.to(tl.int64)[None, :] * outputs + column[:, None]
    tl.store(pointers, value.to(out.dtype.element_ty), mask=inside[:, None] & (m < x_rows)[None, :])


@shared.tuned(
    {name: [config_of(shape) for shape in shapes] for name, shapes in SHAPES.items()},
    class_of,
    config_of((64, 64, 1, 1)),
    key=["outputs", "summed", "BLOCK_M", "BITS", "GRAIN", "TRANSPOSED"],
)
@triton.jit(do_not_specialize=["x_rows", "slices", "zero"])
def product_kernel(x, out, x_strides, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, bias,
                   places, x_rows, outputs, summed, rows, columns, row_bytes, group_size, super_groups, zero,
                   slice_size, slices, BITS: tl.constexpr, GRAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
                   WHOLE_COLUMNS: tl.constexpr, WHOLE_SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """Each program owns BLOCK_N outputs of BLOCK_M rows of x and adds up `slices` slices for them. The outputs are rows
    of W, or TRANSPOSED its columns."""
    tiles_m = tl.cdiv(x_rows, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(0) // tiles_m * BLOCK_N
    sizes = (rows, columns, row_bytes, group_size, super_groups, zero)
    x += (tl.minimum(m, x_rows - 1).to(tl.int64) * x_strides[0])[None, :]

    # Held by the program: a table in memory would be fetched ahead tile by tile, in the place of codes.
    table = None if codebook is None else tl.load(codebook[0] + tl.arange(0, 1 << BITS).to(tl.int64) * codebook[1])
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for part in range(slices):
        begin = (tl.program_id(1) * slices + part) * slice_size
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k0 in range(begin, tl.minimum(begin + slice_size, summed), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = None if WHOLE_SUM else (k < summed)[:, None]
            right = tl.load(x + (k.to(tl.int64) * x_strides[1])[:, None], mask=inside, other=None if WHOLE_SUM else 0.0)
            if TRANSPOSED:
                left = tl.trans(load_weight(codes, scales, super_scales, zeros, offsets, super_offsets, table, sizes,
                                            k0, n0, BITS, GRAIN, WHOLE_COLUMNS, BLOCK_K, BLOCK_N))  # fmt: skip
            else:
                left = load_weight(codes, scales, super_scales, zeros, offsets, super_offsets, table, sizes, n0, k0,
                                   BITS, GRAIN, WHOLE_COLUMNS, BLOCK_N, BLOCK_K)  # fmt: skip
            if not WHOLE_SUM:
                left = tl.where((k < summed)[None, :], left, 0.0)
            acc = shared.product(left.to(right.dtype), right, acc)
        total += acc

    out += tl.program_id(1).to(tl.int64) * x_rows * outputs
    store_outputs(out, total, n0 + tl.arange(0, BLOCK_N), m, x_rows, outputs, bias, places)


@triton.jit(do_not_specialize=["x_rows", "slices"])
def add_kernel(partial, out, bias, places, x_rows, outputs, slices, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds the slices of BLOCK_N outputs of BLOCK_M rows, as product_kernel does."""
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (n < outputs)[:, None] & (m < x_rows)[None, :]
    pointers = partial + m.to(tl.int64)[None, :] * outputs + n[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for part in range(slices):
        total += tl.load(pointers + tl.cast(part, tl.int64) * x_rows * outputs, mask=inside, other=0.0)
    store_outputs(out, total, n, m, x_rows, outputs, bias, places)


@triton.jit(do_not_specialize=["zero"])
def dequantize_kernel(out, out_strides, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, places,
                      rows, columns, row_bytes, group_size, super_groups, zero, BITS: tl.constexpr,
                      GRAIN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A tile of W, stored column k at column places[k]."""
    across = tl.cdiv(columns, COLS)
    n0, k0 = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLS
    sizes = (rows, columns, row_bytes, group_size, super_groups, zero)
    table = None if codebook is None else tl.load(codebook[0] + tl.arange(0, 1 << BITS).to(tl.int64) * codebook[1])
    weight = load_weight(codes, scales, super_scales, zeros, offsets, super_offsets, table, sizes, n0, k0, BITS, GRAIN,
                         False, ROWS, COLS, True)  # fmt: skip
    n, k = n0 + tl.arange(0, ROWS), k0 + tl.arange(0, COLS)
    column = k.to(tl.int64)
    if places is not None:
        column = tl.load(places[0] + column * places[1], mask=k < columns, other=0).to(tl.int64)
    pointers = out + (n.to(tl.int64) * out_strides[0])[:, None] + (column * out_strides[1])[None, :]
    tl.store(pointers, weight.to(out.dtype.element_ty), mask=(n < rows)[:, None] & (k < columns)[None, :])


@triton.jit(do_not_specialize=["x_rows"])
def round_kernel(x, out, x_strides, x_rows, columns, group_size, BLOCK_M: tl.constexpr):
    """x rounded to 8 bits, each run of columns up to every 32nd and to a group's end by its largest magnitude."""
    chunks = tl.cdiv(columns, CHUNK)
    m = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    inside = (m < x_rows)[:, None] & (k < columns)[None, :]
    pointers = x + (m.to(tl.int64) * x_strides[0])[:, None] + (k.to(tl.int64) * x_strides[1])[None, :]
    number = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    group = k // group_size
    together = (group[:, None] == group[None, :])[None, :, :]
    largest = tl.max(tl.where(together, tl.abs(number)[:, None, :], 0.0), 2)
    inverse = tl.div_rn(127.0, largest)
    scaled = tl.where((largest > 0.0) & (inverse < float("inf")), shared.rounded(number, inverse), number * 0.0)
    whole = (scaled + 12582912.0) - 12582912.0  # ties to even
    rounded = whole * tl.div_rn(largest, 127.0)
    tl.store(out + m.to(tl.int64)[:, None] * columns + k[None, :], rounded.to(out.dtype.element_ty), mask=inside)


# Launchers.


def strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor, *tensor.stride())


def _slices(outputs: int, summed: int) -> tuple[int, int]:
    """How many slices a sum has and how long they are: so many that a GPU is busy where one row is multiplied."""
    steps = triton.cdiv(summed, STEP)
    wanted = min(triton.cdiv(256, triton.cdiv(outputs, 64)), triton.cdiv(steps, 4))
    length = triton.cdiv(steps, max(wanted, 1))
    return (triton.cdiv(steps, length) if steps else 0), length * STEP


def sizes_of(
    summed: int, rows: int, columns: int, row_bytes: int, bits: int, group_size: int, super_groups: int, zero: int
) -> dict[str, int | bool]:
    """What kernels are told of the sizes of W, and of what is summed of it."""
    if group_size >= columns:  # one group a row
        group_size = triton.next_power_of_2(max(columns, STEP))
    return {
        "summed": summed, "rows": rows, "columns": columns, "row_bytes": row_bytes, "group_size": group_size,
        "super_groups": min(max(super_groups, 1), triton.cdiv(columns, group_size) or 1), "zero": zero, "BITS": bits,
        "GRAIN": min(group_size & -group_size, STEP), "WHOLE_COLUMNS": columns % STEP == 0,
        "WHOLE_SUM": summed % STEP == 0,
    }  # fmt: skip


def _product(
    x: Tensor,
    tensors: dict[str, Tensor | None],
    bias: Tensor | None,
    places: Tensor | None,
    scalars: tuple[int, int, int, int],
    columns: int,
    transposed: bool,
) -> Tensor:
    """x Wᵀ + bias, or x W with output n at column places[n] where `transposed`."""
    codes = tensors["codes"]
    assert codes is not None
    rows = codes.shape[0]
    outputs, summed = (columns, rows) if transposed else (rows, columns)
    out = x.new_empty(x.shape[0], outputs)
    if not out.numel():
        return out
    slices, slice_size = _slices(outputs, summed)
    split = slices > 1 and x.shape[0] <= 64
    block = rows_of_a_tile(x.shape[0], x.dtype)
    end = {"out": out, "bias": strided(bias), "places": strided(places)}
    sizes = {"x_rows": x.shape[0], "outputs": outputs, "slices": slices}
    problem = {
        **{name: strided(tensor) for name, tensor in tensors.items()}, **sizes, **end,
        **sizes_of(summed, rows, columns, codes.shape[1], *scalars), "x": x, "x_strides": x.stride(),
        "slice_size": slice_size, "TRANSPOSED": transposed, "BLOCK_M": block,
    }  # fmt: skip
    if split:
        partial = torch.empty((slices, x.shape[0], outputs), dtype=torch.float32, device=x.device)
        problem |= {"out": partial, "bias": None, "places": None, "slices": 1}
    tiles = triton.cdiv(x.shape[0], block)

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return tiles * triton.cdiv(outputs, chosen["BLOCK_N"]), slices if split else 1

    shared.launch(product_kernel, grid, problem, x)
    if split:
        shape = {"BLOCK_M": 4, "BLOCK_N": 64}
        programs = triton.cdiv(x.shape[0], 4) * triton.cdiv(outputs, 64)
        shared.launch(add_kernel, (programs,), {**sizes, **end, **shape, "partial": partial}, x)
    return out


_TENSORS = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "codebook")


def quant_linear(x: Tensor, *weight: Any) -> Tensor:
    *tensors, permutation, bias = weight[:9]
    stored = x if permutation is None else x.index_select(1, permutation)
    return _product(stored, dict(zip(_TENSORS, tensors, strict=True)), bias, None, weight[9:], x.shape[1], False)


def round_rows(x: Tensor, group_size: int) -> Tensor:
    """x, its columns in the order of the codes, with the activations rounded to 8 bits."""
    rounded = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rounded.numel():
        arguments = {"x": x, "x_strides": x.stride(), "out": rounded, "x_rows": x.shape[0], "BLOCK_M": 8}
        arguments |= {"columns": x.shape[1], "group_size": min(group_size, x.shape[1])}
        shared.launch(round_kernel, (triton.cdiv(x.shape[0], 8) * triton.cdiv(x.shape[1], 32),), arguments, x)
    return rounded


def quant_linear_int8(x: Tensor, *weight: Any) -> Tensor:
    *tensors, permutation, bias = weight[:9]
    stored = x if permutation is None else x.index_select(1, permutation)
    rounded = round_rows(stored, weight[10])
    return _product(rounded, dict(zip(_TENSORS, tensors, strict=True)), bias, None, weight[9:], x.shape[1], False)


def quant_matmul(x: Tensor, *weight: Any) -> Tensor:
    *tensors, permutation = weight[:8]
    *scalars, columns = weight[8:]
    return _product(x, dict(zip(_TENSORS, tensors, strict=True)), None, permutation, tuple(scalars), columns, True)


def dequantize(out: Tensor, *weight: Any) -> None:
    *tensors, permutation = weight[:8]
    rows, columns = out.shape
    if not out.numel():
        return
    tile = {"ROWS": 16, "COLS": STEP}
    problem = {
        **{name: strided(tensor) for name, tensor in zip(_TENSORS, tensors, strict=True)},
        **sizes_of(columns, rows, columns, tensors[0].shape[1], *weight[8:]), **tile, "out": out,
        "out_strides": out.stride(), "places": strided(permutation),
    }  # fmt: skip
    programs = triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, STEP)
    shared.launch(dequantize_kernel, (programs,), problem, out)


def _refusal(x: Tensor, *sizes: int) -> str | None:
    too_many = [size for size in (*x.shape, *sizes) if size >= 2**30]
    return shared.refusal(x) or (f"{too_many[0]} rows or columns: fewer than 2**30" if too_many else None)


REFUSES = {
    "quant_linear": lambda x, codes, *rest: _refusal(x, codes.shape[0]),
    "quant_linear_int8": lambda x, codes, *rest: _refusal(x, codes.shape[0]),
    "quant_matmul": lambda x, *rest: _refusal(x, rest[-1]),
    "dequantize": lambda out, *rest: _refusal(out),
    **{
        f"lora_{name}": lambda *args: "low-rank updates: on cpu, cuda and reference"
        for name in ("linear", "matmul", "shrink", "outer")
    },
}
