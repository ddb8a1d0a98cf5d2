"""Products of the rows of each expert with its own weight. Which rows an expert has is known on the device only: there
are as many programs as tiles of rows there can be at most, and each finds its tile in the offsets."""

import triton
import triton.language as tl

from .. import shared
from ..quant_linear import SHAPES, class_of, config_of, load_weight, store_outputs

TOGETHER = tl.constexpr(8)  # tiles of rows that walk along the outputs together, so that they share what caches hold

# (BLOCK_N, BLOCK_K of a tile of the result, BLOCK_R rows summed at a time, warps, stages).
OUTER_SHAPES = {
    "half": [(64, 64, 32, 4, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3)],
    "float": [(64, 64, 16, 4, 3), (64, 64, 32, 8, 2)],
    "few": [(16, 64, 32, 4, 3), (16, 128, 32, 4, 2)],  # 16 columns of a or less
}


@triton.jit
def tile_of_segment(offsets, experts, rows, tile, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; rows before the first expert's and behind the last one's
    belong to the experts -1 and `experts`. No rows where there is no such tile."""
    expert = -1
    first = 0
    end = 0
    passed = 0
    for s0 in range(0, experts + 2, SEGMENTS):
        s = s0 + tl.arange(0, SEGMENTS)
        pointers = offsets[0] + s.to(tl.int64) * offsets[1]
        begins = tl.load(pointers - offsets[1], mask=(s > 0) & (s < experts + 2), other=0)
        ends = tl.load(pointers, mask=s < experts + 1, other=rows)
        begins = tl.minimum(tl.maximum(begins, 0), rows)
        ends = tl.minimum(tl.maximum(ends, begins), rows)
        tiles = tl.where(s < experts + 2, tl.cdiv(ends - begins, BLOCK_M), 0)
        last = passed + tl.cumsum(tiles, 0)
        here = (last - tiles <= tile) & (tile < last)
        expert += tl.sum(tl.where(here, s, 0), 0)
        first += tl.sum(tl.where(here, begins + (tile - last + tiles) * BLOCK_M, 0), 0)
        end += tl.sum(tl.where(here, ends, 0), 0)
        passed += tl.sum(tiles, 0)
    return expert, first, end


@triton.jit  # noqa: RET503
def expert_of(stack, expert):
    """The matrix of one expert, or None, which Triton 3.6 takes from the end of a function only."""
    if stack is not None:
        return stack[0] + expert.to(tl.int64) * stack[1], stack[2], stack[3]


@triton.jit
def source_rows(order, k, slots, row, end):
    """(row of x, whether there is one) for each row of the product."""
    if order is None:
        source = tl.minimum(row, end - 1)
        there = row < end
    else:
        slot = tl.load(order[0] + row.to(tl.int64) * order[1], mask=row < end, other=-1)
        there = (slot >= 0) & (slot < slots)
        source = tl.where(there, slot // k, 0)
    return source, there


@triton.jit
def load_dense(w, n0, k0, rows, columns, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) of a matrix; rows past the end repeat the last one."""
    n = tl.minimum(n0 + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    k = k0 + tl.arange(0, COLS)
    pointers = w[0] + (n * w[1])[:, None] + (k.to(tl.int64) * w[2])[None, :]
    return tl.load(pointers, mask=None if WHOLE else (k < columns)[None, :], other=None if WHOLE else 0.0)


@shared.tuned(
    {name: [config_of(shape) for shape in shapes] for name, shapes in SHAPES.items()},
    class_of,
    config_of((64, 64, 1, 1)),
    key=["outputs", "summed", "BLOCK_M", "BITS", "GRAIN", "TRANSPOSED"],
)
@triton.jit(do_not_specialize=["out_rows", "slots", "tiles", "zero"])
def linear_kernel(x, out, x_strides, order, k, slots, expert_offsets, w, codes, scales, super_scales, zeros, offsets,
                  super_offsets, codebook, permutation, bias, places, experts, out_rows, tiles, outputs, summed, rows,
                  columns, row_bytes, group_size, super_groups, zero, BITS: tl.constexpr, GRAIN: tl.constexpr,
                  TRANSPOSED: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, WHOLE_SUM: tl.constexpr,
                  SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """Each program owns BLOCK_N outputs of BLOCK_M rows of one expert: rows of its weight, dense (BITS is 0) or
    low-bit, or TRANSPOSED columns of a low-bit one."""
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    band = tl.program_id(0) // (tiles_n * TOGETHER) * TOGETHER
    height = tl.minimum(tiles - band, TOGETHER)
    place = tl.program_id(0) % (tiles_n * TOGETHER)
    n0 = place // height * BLOCK_N
    expert, m0, end = tile_of_segment(expert_offsets, experts, out_rows, band + place % height, BLOCK_M, SEGMENTS)
    if m0 < end:
        real = (expert >= 0) & (expert < experts)
        expert = tl.where(real, expert, 0)
        m = m0 + tl.arange(0, BLOCK_M)
        row, there = source_rows(order, k, slots, m, end)
        right_rows = x + (row.to(tl.int64) * x_strides[0])[None, :]
        table = None if codebook is None else tl.load(codebook[0] + tl.arange(0, 1 << BITS).to(tl.int64) * codebook[1])
        sizes = (rows, columns, row_bytes, group_size, super_groups, zero)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k0 in range(0, tl.where(real, summed, 0), BLOCK_K):
            inner = k0 + tl.arange(0, BLOCK_K)
            inside = inner < summed
            column = inner
            if permutation is not None:
                at = permutation[0] + expert.to(tl.int64) * permutation[1] + inner.to(tl.int64) * permutation[2]
                column = tl.load(at, mask=inside, other=0)
            taken = there[None, :] if WHOLE_SUM else there[None, :] & inside[:, None]
            right = tl.load(right_rows + (column.to(tl.int64) * x_strides[1])[:, None], mask=taken, other=0.0)
            if BITS == 0:
                left = load_dense(expert_of(w, expert), n0, k0, rows, columns, WHOLE_SUM, BLOCK_N, BLOCK_K)
            elif TRANSPOSED:
                left = tl.trans(load_weight(expert_of(codes, expert), expert_of(scales, expert),
                                            expert_of(super_scales, expert), expert_of(zeros, expert),
                                            expert_of(offsets, expert), expert_of(super_offsets, expert), table, sizes,
                                            k0, n0, BITS, GRAIN, WHOLE_COLUMNS, BLOCK_K, BLOCK_N))  # fmt: skip
            else:
                left = load_weight(expert_of(codes, expert), expert_of(scales, expert),
                                   expert_of(super_scales, expert), expert_of(zeros, expert),
                                   expert_of(offsets, expert), expert_of(super_offsets, expert), table, sizes, n0, k0,
                                   BITS, GRAIN, WHOLE_COLUMNS, BLOCK_N, BLOCK_K)  # fmt: skip
            if BITS > 0 and not WHOLE_SUM:
                left = tl.where(inside[None, :], left, 0.0)
            acc = shared.product(left.to(right.dtype), right, acc)
        n = n0 + tl.arange(0, BLOCK_N)
        if bias is not None:
            at = bias[0] + expert.to(tl.int64) * bias[1] + n.to(tl.int64) * bias[2]
            acc += tl.load(at, mask=n < tl.where(real, outputs, 0), other=0.0).to(tl.float32)[:, None]
        own_places = None if places is None else (places[0] + expert.to(tl.int64) * places[1], places[2])
        store_outputs(out, acc, n, m, end, outputs, None, own_places)


@shared.tuned(
    {
        name: [
            triton.Config({"BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": rows}, num_warps=warps, num_stages=stages)
            for n, k, rows, warps, stages in shapes
        ]
        for name, shapes in OUTER_SHAPES.items()
    },
    lambda named: "few" if named["N"] <= 16 else "float" if named["a"].element_size() == 4 else "half",
    triton.Config({"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 32}, num_warps=1, num_stages=1),
    key=["N", "K"],
)
@triton.jit(do_not_specialize=["rows", "slots"])
def outer_kernel(a, b, out, a_strides, b_strides, order, k, slots, expert_offsets, rows, N, K, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Each program adds up one tile of aᵀ b over the rows of one expert."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    expert = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    at = expert_offsets[0] + expert.to(tl.int64) * expert_offsets[1]
    begin = tl.minimum(tl.maximum(tl.load(at), 0), rows)
    end = tl.minimum(tl.load(at + expert_offsets[1]), rows)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    left_columns = a + (n.to(tl.int64) * a_strides[1])[:, None]
    right_columns = b + (column.to(tl.int64) * b_strides[1])[None, :]
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        row, there = source_rows(order, k, slots, r, end)
        left = tl.load(left_columns + (r.to(tl.int64) * a_strides[0])[None, :],
                       mask=(n < N)[:, None] & (r < end)[None, :], other=0.0)  # fmt: skip
        right = tl.load(right_columns + (row.to(tl.int64) * b_strides[0])[:, None],
                        mask=there[:, None] & (column < K)[None, :], other=0.0)  # fmt: skip
        acc = shared.product(left, right, acc)
    pointers = out + expert.to(tl.int64) * N * K + (n.to(tl.int64) * K)[:, None] + column[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (column < K)[None, :])
