"""GPTQ: columns are rounded one after another, and each error is spread over the columns still to come.

Frantar et al. 2022. The inverse Hessian is used through its Cholesky factor, in blocks of columns, so that most of the
work is matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import QuantizedWeight, pack_codes
from metate.quant.calibration import Calibration, check_calibration
from metate.quant.grid import Grid, checked, grouped
from metate.quant.rtn import affine
from metate.quant.settings import in_own_dtypes

_BLOCK = 128  # columns whose errors are spread at once over the rest
_ATTEMPTS = 6  # each with ten times the damping


@in_own_dtypes
def quantize_gptq(
    weight: Tensor,
    calibration: Calibration,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
    damp: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """(N, K) to integers of the least output error on the calibration inputs.

    Args:
        weight, bits, group_size, symmetric, scale_dtype: as in `quantize_rtn`.
        calibration: what came into the layer, in_features wide.
        act_order: columns of the largest inputs first ("desc_act"): better, at the price of a permutation unless
        static_groups: the ranges of the groups are fixed before the first column, groups are of neighbours.
        mse: shrink each range to where the rounding error is least, in the rows whose output error that lessens.
        damp: what is added to the diagonal of the Hessian, relative to its mean.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    group_size = checked("quantize_gptq", weight, group_size)
    check_calibration("quantize_gptq", calibration, weight)
    if not 0 < damp < 1:
        raise fail("quantize_gptq", "damp", damp, "between 0 and 1")
    grid = Grid(bits, symmetric, scale_dtype).check("quantize_gptq", weight)
    hessian = calibration.hessian.to(weight.device)
    values = weight.detach().float().clone()
    unused = hessian.diagonal() == 0
    values[:, unused] = 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    attempts = [_Ranges(grid, shrunk, group_size) for shrunk in ((False, True) if mse else (False,))]
    group = torch.arange(values.shape[1], device=weight.device) // group_size
    for ranges in attempts if static_groups else ():
        ranges.fix(values)
    if order is not None:
        values, hessian = values[:, order], hessian[order][:, order]
        group = group[order] if static_groups else group
    codes, scales, zeros = _solve(values.t(), hessian, _inverse_factor(hessian, damp), attempts, group.tolist())
    if order is not None and (static_groups or group_size >= values.shape[1]):  # one group has any order
        codes, order = codes[order.argsort()], None
    rows, columns = weight.shape
    packed = pack_codes(codes.t().contiguous(), bits)
    return affine(
        (rows, columns), bits, group_size, packed, scales.t().to(scale_dtype).contiguous(),
        None if symmetric else zeros.t().to(torch.uint8).contiguous(), None if order is None else order.int(),
    )  # fmt: skip


@dataclass
class _Ranges:
    """Scale and zero point (N) of every group met so far."""

    grid: Grid
    mse: bool
    group_size: int
    scales: list[Tensor] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)

    def fix(self, values: Tensor) -> None:
        """All groups of (N, K) weights."""
        for start in range(0, values.shape[1], self.group_size):
            self.add(values[:, start : start + self.group_size])

    def add(self, values: Tensor) -> None:
        groups = grouped(values, self.group_size)[:, 0]
        scale, zero = self.grid.search(groups) if self.mse else self.grid.fit(groups)
        self.scales.append(scale)
        self.zeros.append(zero)


def _solve(
    values: Tensor, hessian: Tensor, factor: Tensor, attempts: list[_Ranges], group: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (K, N), scales and zero points (G, N) of (K, N) weights.

    The range of a group can be that of its weights as the block began, or with the errors of its neighbours already
    spread over them, which may widen it; and it can be shrunk. None is always better, so each row keeps what came to
    the least error.
    """
    taken = torch.tensor(group, device=values.device)
    best: tuple[Tensor, ...] = ()
    least = values.new_full(values.shape[1:], torch.inf)
    for ranges, early in _choices(attempts):
        codes = _round_columns(values.clone(memory_format=torch.contiguous_format), factor, ranges, group, early)
        found = codes, torch.stack(ranges.scales), torch.stack(ranges.zeros)
        delta = (codes - found[2][taken]) * found[1][taken] - values
        error = ((hessian @ delta) * delta).sum(0)
        better = error < least
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True)) if best else found
        least = torch.minimum(error, least)
    codes, scales, zeros = best
    return codes, scales, zeros


def _choices(attempts: list[_Ranges]) -> Iterator[tuple[_Ranges, bool]]:
    """Ranges to round with, and whether those of groups within a block are taken as the block begins."""
    for ranges in attempts:
        fixed = bool(ranges.scales)
        yield ranges, False
        if not fixed and ranges.group_size <= _BLOCK // 2:  # groups begin within blocks
            yield replace(ranges, scales=[], zeros=[]), True


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian = hessian.clone()
    hessian.diagonal()[hessian.diagonal() == 0] = mean
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(mean * damp * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise fail("quantize_gptq", "calibration", "too few or too uniform inputs", "more of them, or a larger damp")


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns in which groups neither begin nor end halfway, or which no group exceeds."""
    if group_size >= _BLOCK:
        for start in range(0, columns, group_size):
            end = min(start + group_size, columns)
            yield from ((at, min(at + _BLOCK, end)) for at in range(start, end, _BLOCK))
    else:
        step = _BLOCK // group_size * group_size
        yield from ((at, min(at + step, columns)) for at in range(0, columns, step))


def _round_columns(values: Tensor, factor: Tensor, ranges: _Ranges, group: list[int], early: bool) -> Tensor:
    """(K, N) weights, columns of the matrix as rows, to codes (K, N) uint8. Changes `values`."""
    columns = values.shape[0]
    codes = torch.empty_like(values, dtype=torch.uint8)
    for start, end in _blocks(columns, ranges.group_size):
        errors = torch.empty_like(values[start:end])
        begun = values[start:end].clone() if early else values[start:end]
        for column in range(start, end):
            if group[column] == len(ranges.scales):
                first = column - start
                ahead = (
                    values[column : column + ranges.group_size]
                    if first == 0
                    else begun[first : first + ranges.group_size]
                )
                ranges.add(ahead.t())
            scale, zero = ranges.scales[group[column]], ranges.zeros[group[column]]
            code = ranges.grid.codes(values[column], scale, zero)
            codes[column] = code.to(torch.uint8)
            error = (values[column] - (code - zero) * scale) / factor[column, column]
            values[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        values[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes
