"""Round to nearest: the plain integer formats, from weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight, pack_codes, packed_bytes
from metate.memory import allocate
from metate.quant.grid import Grid, checked, grouped
from metate.quant.settings import blocks


def quantize_rtn(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    mse: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """(N, K) rounded to the nearest of 2**bits steps over the range of each group of columns.

    Args:
        weight: (out_features, in_features), any floating dtype.
        bits: 2 to 8.
        group_size: columns that share a scale; -1: one scale a row.
        symmetric: the range is ± the largest magnitude, and the middle code 0; else from the least (or 0) to the
            largest (or 0) value, with a zero point for each group.
        mse: shrink each range to where the error is least.
        scale_dtype: float32, bfloat16 or float16.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    group_size = checked("quantize_rtn", weight, group_size)
    grid = Grid(bits, symmetric, scale_dtype).check("quantize_rtn", weight)
    rows, columns = weight.shape
    codes = allocate((rows, packed_bytes(columns, bits)), torch.uint8, weight.device)
    shape = rows, -(-columns // group_size)
    scales = torch.empty(shape, dtype=scale_dtype, device=weight.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for part in blocks(rows, columns):
        groups = grouped(weight[part].detach().float(), group_size)
        scale, zero = grid.search(groups) if mse else grid.fit(groups)
        found = grid.codes(groups, scale[..., None], zero[..., None]).flatten(1)[:, :columns]
        codes[part] = pack_codes(found.to(torch.uint8), bits)
        scales[part], zeros[part] = scale, zero.to(torch.uint8)
    return affine((rows, columns), bits, group_size, codes, scales, None if symmetric else zeros)


def affine(
    shape: tuple[int, int], bits: int, group_size: int, codes: Tensor, scales: Tensor, zeros: Tensor | None,
    permutation: Tensor | None = None,
) -> QuantizedWeight:  # fmt: skip
    """The canonical form of integer codes; without zero points the middle code is 0."""
    zero = 2 ** (bits - 1) if zeros is None else 0
    return QuantizedWeight(shape, bits, group_size, codes, scales, zero=zero, zeros=zeros, permutation=permutation)
