"""The integer grid of affine formats: range of a group -> scale and zero point -> codes. RTN, GPTQ and AWQ share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metate.errors import fail, require_dense
from metate.low_bit import FLOATS
from metate.scalars import is_whole, plain

_SHRINKS = 80  # ranges that the search by error tries, from the whole one down to a fifth
_NORM = 2.4  # exponent of the error (Frantar et al. 2022, code)


@dataclass(frozen=True)
class Grid:
    """2**bits steps; symmetric: the middle code is 0 and the range ± the largest magnitude."""

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", plain(self.bits))

    def check(self, op: str, weight: Tensor | None = None) -> Grid:
        """Itself, where it is sound and its scales reach the largest magnitude of `weight`."""
        if not is_whole(self.bits, 2, 8):
            raise fail(op, "bits", repr(self.bits), "2 to 8")
        if self.scale_dtype not in FLOATS:
            raise fail(op, "scale_dtype", self.scale_dtype, "float32, bfloat16 or float16", error=TypeError)
        reach = self.top / (1 + self.symmetric) * torch.finfo(self.scale_dtype).max
        if weight is not None and not weight.is_meta and float(largest := weight.detach().abs().max()) > reach:
            raise fail(op, "weight", f"{largest:.3g} at most", f"up to {reach:.3g}, or a wider scale_dtype")
        return self

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, values: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(…, C) float32 groups -> scale and zero point (…), float32, of their range, cut to ± limit (…)."""
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        if limit is not None:
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        info = torch.finfo(self.scale_dtype)
        scale = ((high - low) / self.top).clamp(info.smallest_normal * info.eps, info.max).to(self.scale_dtype).float()
        scale = torch.where(high > low, scale, 1)
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else (-low / scale).round()
        return scale, zero.clamp(0, self.top)

    def search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`fit` to the range, shrunk or not, of the least error."""
        largest = values.abs().amax(-1)
        best_scale, best_zero = self.fit(values)
        best = self._error(values, best_scale, best_zero)
        for step in range(1, _SHRINKS):
            scale, zero = self.fit(values, largest * (1 - step / 100))
            error = self._error(values, scale, zero)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _error(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        difference = self.round_trip(values, scale[..., None], zero[..., None]) - values
        error: Tensor = difference.abs_().pow_(_NORM).sum(-1)
        return error

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, still floating."""
        codes: Tensor = (values / scale).round_().add_(zero).clamp_(0, self.top)
        return codes

    def round_trip(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self.codes(values, scale, zero).sub_(zero).mul_(scale)


def grouped(values: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, G, group_size); a short last group is filled with zeros, which every range contains."""
    filled = torch.nn.functional.pad(values, (0, -values.shape[1] % group_size))
    groups: Tensor = filled.unflatten(1, (-1, group_size))
    return groups


def checked(op: str, weight: Tensor, group_size: int) -> int:
    """The group size (-1: the whole row), after a look at the arguments."""
    require_dense(op, "weight", weight)
    if weight.dtype not in (*FLOATS, torch.float64):
        raise fail(op, "weight", weight.dtype, "a floating-point tensor", error=TypeError)
    if weight.dim() != 2 or 0 in weight.shape:
        raise fail(op, "weight", f"shape {tuple(weight.shape)}", "(out_features, in_features), neither of them 0")
    group_size = plain(group_size)
    if not is_whole(group_size, 1) and group_size != -1:
        raise fail(op, "group_size", repr(group_size), "1 or more, or -1 for one group a row")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):  # integers have no code for them
        raise fail(op, "weight", "not finite", "numbers without NaN or infinity")
    return weight.shape[1] if group_size == -1 else min(group_size, weight.shape[1])
