"""AWQ: columns that meet large inputs are scaled up before rounding, and ranges cut, to the least output error.

Lin et al. 2024. The inverse of the scale belongs into the operation before the layer. Errors are those of the layer's
output on the calibration inputs, computed from their second moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import QuantizedWeight, pack_codes, packed_bytes
from metate.memory import allocate
from metate.quant.calibration import Calibration, check_calibration
from metate.quant.grid import Grid, checked, grouped
from metate.quant.rtn import affine
from metate.quant.settings import blocks, in_own_dtypes

_STEPS = 20  # exponents of the scale that are tried
_ROWS = 1024  # of all layers of the same inputs, by which scales are judged
_CUTS = 10  # ranges that are tried, from the whole one down to a half
_LEAST = 1e-4


@in_own_dtypes
def search_awq_scale(
    weights: Sequence[Tensor],
    calibration: Calibration,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    clip: bool = True,
) -> Tensor:
    """The scale (K) of the columns of all `weights`, layers of the same inputs, that rounding likes best.

    scale = E|x|**r / mean|w|**(1 - r), or E|x|**r alone, the r in [0, 1) of the least output error; all ones are one of
    them.

    Args:
        weights: one or more of (out_features, K). calibration: of their inputs. Others as in `quantize_awq`.
        clip: judge them with ranges cut, as `quantize_awq` will: that may do what a scale would have done.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    op = "search_awq_scale"
    grid = Grid(bits, symmetric).check(op)
    if not isinstance(weights, Sequence) or not weights:
        raise fail(op, "weights", type(weights).__name__, "a list of weights, one or more", error=TypeError)
    sizes = {checked(op, weight, group_size) for weight in weights}
    for weight in weights:
        check_calibration(op, calibration, weight)
    (size,) = sizes  # of as many columns each
    device = weights[0].device
    hessian = calibration.hessian.to(device)
    magnitude = calibration.mean_magnitude.to(device).clamp(min=_LEAST)
    step = max(1, sum(weight.shape[0] for weight in weights) // _ROWS)
    judges = [weight[::step].detach().float() for weight in weights]
    scales = _scales(magnitude, _mean_share(weights, size))
    return min(scales, key=lambda scale: _loss(judges, scale, hessian, grid, size, clip))


def _scales(magnitude: Tensor, share: Tensor) -> Iterator[Tensor]:
    """The scales that are tried, all ones first."""
    for step in range(_STEPS):
        ratio = step / _STEPS
        for scale in (magnitude**ratio, magnitude**ratio / (share ** (1 - ratio) + _LEAST)):
            positive = scale.clamp(min=_LEAST)
            yield positive / (positive.max() * positive.min()).sqrt()


def _mean_share(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over all rows of a column's magnitude, relative to the largest of its group."""
    total, rows = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device), 0
    for weight in weights:
        groups = grouped(weight.detach().float().abs(), group_size)
        share = groups / (groups.amax(2, keepdim=True) + 1e-6)
        total += share.flatten(1)[:, : total.numel()].sum(0)
        rows += weight.shape[0]
    return total / rows


def _loss(weights: Sequence[Tensor], scale: Tensor, hessian: Tensor, grid: Grid, group_size: int, clip: bool) -> float:
    moments = _group_moments(hessian / torch.outer(scale, scale), group_size) if clip else None
    loss = 0.0
    for weight in weights:
        groups = grouped(weight * scale, group_size)
        fitted, zero = grid.fit(groups, None if moments is None else _cut(groups, moments, grid))
        rounded = grid.round_trip(groups, fitted[..., None], zero[..., None]).flatten(1)[:, : weight.shape[1]]
        delta = rounded / scale - weight
        loss += float(((delta @ hessian) * delta).sum())
    return loss


@in_own_dtypes
def quantize_awq(
    weight: Tensor,
    calibration: Calibration,
    bits: int = 4,
    group_size: int = 128,
    *,
    scale: Tensor | None = None,
    symmetric: bool = False,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedWeight, Tensor]:
    """(N, K) times the scale of its columns, rounded; and that scale (K), whose inverse the inputs must get.

    Args:
        weight, bits, group_size, symmetric, scale_dtype: as in `quantize_rtn`.
        calibration: what came into the layer, in_features wide.
        scale: from `search_awq_scale`, where layers share their inputs or their inputs cannot be scaled (ones);
            None searches one for this layer.
        clip: cut each group's range to where the output error is least.

    Returns:
        the quantised weight W' and s with W x ≈ W' (x / s); `fold_scale` puts 1 / s into the operation before.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    group_size = checked("quantize_awq", weight, group_size)
    check_calibration("quantize_awq", calibration, weight)
    grid = Grid(bits, symmetric, scale_dtype).check("quantize_awq", weight)
    if scale is None:
        scale = search_awq_scale([weight], calibration, bits, group_size, symmetric=symmetric, clip=clip)
    rows, columns = weight.shape
    if not isinstance(scale, Tensor) or tuple(scale.shape) != (columns,) or not bool((scale > 0).all()):
        got = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise fail("quantize_awq", "scale", got, f"a tensor ({columns},), all positive")
    scale = scale.to(weight.device)
    hessian = calibration.hessian.to(weight.device)
    moments = _group_moments(hessian / torch.outer(scale, scale), group_size) if clip else None
    codes = allocate((rows, packed_bytes(columns, bits)), torch.uint8, weight.device)
    shape = rows, -(-columns // group_size)
    scales = torch.empty(shape, dtype=scale_dtype, device=weight.device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for part in blocks(rows, columns):
        groups = grouped(weight[part].detach().float() * scale, group_size)
        fitted, zero = grid.fit(groups, None if moments is None else _cut(groups, moments, grid))
        found = grid.codes(groups, fitted[..., None], zero[..., None]).flatten(1)[:, :columns]
        codes[part] = pack_codes(found.to(torch.uint8), bits)
        scales[part], zeros[part] = fitted, zero.to(torch.uint8)
    return affine((rows, columns), bits, group_size, codes, scales, None if symmetric else zeros), scale


def _group_moments(hessian: Tensor, group_size: int) -> Tensor:
    """(G, group_size, group_size): the moments of the inputs of each group."""
    padded = torch.nn.functional.pad(hessian, (0, -hessian.shape[1] % group_size, 0, -hessian.shape[0] % group_size))
    tiles = padded.unflatten(0, (-1, group_size)).unflatten(2, (-1, group_size))
    moments: Tensor = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return moments


def _cut(groups: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """(n, G): the largest magnitude to keep in each group."""
    largest = groups.abs().amax(2)
    limit, best = largest, torch.full_like(largest, torch.inf)
    for step in range(_CUTS):
        tried = largest * (1 - step / (2 * _CUTS))
        scale, zero = grid.fit(groups, tried)
        delta = grid.round_trip(groups, scale[..., None], zero[..., None]) - groups
        error = (torch.einsum("ngc,gcd->ngd", delta, moments) * delta).sum(2)
        better = error < best
        limit, best = torch.where(better, tried, limit), torch.where(better, error, best)
    return limit


def fold_scale(previous: torch.nn.Module, scale: Tensor) -> None:
    """Divides what `previous` puts out by the scale, in place: the inverse that `quantize_awq` leaves to be applied.

    Args:
        previous: a norm, with weight (channels), or a linear layer, with weight (channels, in_features); its bias too.
        scale: (channels), as from `search_awq_scale`.

    Raises:
        ValueError: the weight has not as many channels as the scale.
    """
    weight = previous.weight
    if not isinstance(weight, Tensor) or weight.dim() not in (1, 2) or weight.shape[0] != scale.numel():
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise fail("fold_scale", "previous.weight", got, f"{scale.numel()} channels first, in a norm or linear layer")
    with torch.no_grad():
        weight.div_(scale if weight.dim() == 1 else scale[:, None])
        bias = getattr(previous, "bias", None)
        if isinstance(bias, Tensor):
            bias.div_(scale)
