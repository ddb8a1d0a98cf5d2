"""HQQ: integer codes whose real-valued zero points are fitted to the weights alone (Badri & Shaji 2023).

Half-quadratic splitting of |W - Q|_p, p < 1: outliers are taken out by a shrinkage, and the zero point is the mean of
what remains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight, pack_codes, packed_bytes
from metate.memory import allocate
from metate.quant.grid import Grid, checked, grouped
from metate.quant.settings import blocks

_P, _BETA, _KAPPA = 0.7, 10.0, 1.01


def quantize_hqq(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 64,
    *,
    iterations: int = 20,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """(N, K) to integers with scale and real zero point for each group, without calibration.

    The zero points lower to offsets. Each group keeps the zero point of the iteration that had the least error.

    Args:
        weight, bits, group_size, scale_dtype: as in `quantize_rtn`.
        iterations: of the splitting.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    group_size = checked("quantize_hqq", weight, group_size)
    grid = Grid(bits, False, scale_dtype).check("quantize_hqq", weight)
    rows, columns = weight.shape
    codes = allocate((rows, packed_bytes(columns, bits)), torch.uint8, weight.device)
    scales = torch.empty(rows, -(-columns // group_size), dtype=scale_dtype, device=weight.device)
    offsets = torch.empty_like(scales)
    for part in blocks(rows, columns):
        values = grouped(weight[part].detach().float(), group_size)
        scale, offset = _solve(grid, values, columns, iterations)
        found = grid.codes(values - offset[..., None], scale[..., None], torch.zeros_like(scale)[..., None])
        codes[part] = pack_codes(found.flatten(1)[:, :columns].to(torch.uint8), bits)
        scales[part], offsets[part] = scale, offset
    return QuantizedWeight((rows, columns), bits, group_size, codes, scales, offsets=offsets)


def _solve(grid: Grid, values: Tensor, columns: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (n, G) of (n, G, group_size) values, rounded as they will be stored.

    Two starts, since the splitting finds the nearest minimum: the range of the values, and the one with a step at 0.
    """
    present = (torch.arange(values.shape[1] * values.shape[2], device=values.device) < columns).view(values.shape[1:])
    low = values.masked_fill(~present, torch.inf).amin(-1)
    high = values.masked_fill(~present, -torch.inf).amax(-1)
    wide, zero = grid.fit(values)
    info = torch.finfo(grid.scale_dtype)
    tight = ((high - low) / grid.top).clamp(info.smallest_normal * info.eps, info.max).to(grid.scale_dtype).float()
    tight = torch.where(high > low, tight, 1)
    best, best_scale, best_offset = torch.full_like(tight, torch.inf), tight, low
    for scale, start in ((tight, low), (wide, -zero * wide)):
        offset, error = _split(grid, values, present, scale, start, iterations)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _split(
    grid: Grid, values: Tensor, present: Tensor, scale: Tensor, offset: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """The best offset met by half-quadratic splitting, and its error."""
    offset = offset.to(grid.scale_dtype).float()
    best, best_offset, beta = torch.full_like(scale, torch.inf), offset, _BETA
    count = present.sum(-1)
    for _ in range(iterations + 1):
        steps = grid.codes(values - offset[..., None], scale[..., None], torch.zeros_like(scale)[..., None])
        centred = values - steps.mul_(scale[..., None])
        rest = centred - offset[..., None]
        error = (rest.abs().pow(_P) * present).sum(-1)
        better = error < best
        best, best_offset = torch.where(better, error, best), torch.where(better, offset, best_offset)
        outliers = rest.sign() * (rest.abs() - rest.abs().pow(_P - 1) / beta).clamp_(min=0)
        offset = (((centred - outliers) * present).sum(-1) / count).to(grid.scale_dtype).float()
        beta *= _KAPPA
    return best_offset, best
