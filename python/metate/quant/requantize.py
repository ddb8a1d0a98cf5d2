"""New values in the format of a low-bit weight: its bits, groups, order of columns, codebook and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import QuantizedWeight, both_levels, pack_codes
from metate.quant.grid import checked
from metate.quant.settings import blocks, in_own_dtypes


@in_own_dtypes
def requantize(weight: QuantizedWeight, values: Tensor) -> QuantizedWeight:
    """Other values in the format of a weight of any format.

    A group keeps its scale, zero point and offset, or gets those of the range of its new values, whichever leaves the
    smaller squared error: what a weight holds exactly it goes on holding exactly. Scales of scales stay.

    Args:
        weight: whose bits, groups, permutation, codebook and dtypes are taken.
        values: (out_features, in_features), any floating dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    if not isinstance(weight, QuantizedWeight):
        raise fail("requantize", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
    checked("requantize", values, 1)
    if tuple(values.shape) != weight.shape:
        raise fail("requantize", "values", f"shape {tuple(values.shape)}", f"{weight.shape} like weight")
    made = {name: tensor.clone() for name, tensor in weight.in_rows().tensors.items() if name in _LEVELS}
    order = None if weight.permutation is None else weight.permutation.long()
    form = _Form(weight)
    for part in blocks(*weight.shape):
        rows = values[part].detach().float()
        groups = _grouped(rows if order is None else rows[:, order], weight.group_size)
        found, codes = form.nearest(groups, part)
        made["codes"][part] = pack_codes(codes.flatten(1)[:, : weight.in_features], weight.bits)
        for name, tensor in found.items():
            made[name][part] = tensor
    fields: dict[str, Any] = dict(made)
    return replace(weight, **fields)


_LEVELS = ("codes", "scales", "zeros", "offsets")


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """(n, K) -> (n, G, group_size); a short last group is filled with its last value, which widens no range."""
    group_size = min(group_size, values.shape[1])
    filled = torch.nn.functional.pad(values, (0, -values.shape[1] % group_size), mode="replicate")
    groups: Tensor = filled.unflatten(1, (-1, group_size))
    return groups


@dataclass(frozen=True)
class _Form:
    """What a code of a weight can stand for."""

    weight: QuantizedWeight

    def nearest(self, groups: Tensor, part: slice) -> tuple[dict[str, Tensor], Tensor]:
        """(n, G, C) values of some rows -> their levels as stored, and codes (n, G, C) uint8."""
        best: dict[str, Tensor] = {}
        codes = least = groups.new_empty(0)
        for levels in self._choices(groups, part):
            scale, zero, offset = self._seen(levels, part)
            found = self._codes((groups - offset) / scale.where(scale != 0, 1), zero)
            error = (self._values(found, zero) * scale + offset - groups).square().sum(-1)
            if not best:
                best, codes, least = levels, found, error
                continue
            better = error < least
            best = {name: tensor.where(better, best[name]) for name, tensor in levels.items()}
            codes, least = found.where(better[..., None], codes), error.minimum(least)
        return best, codes

    def _choices(self, groups: Tensor, part: slice) -> Iterator[dict[str, Tensor]]:
        """Levels to try: those that are there, and those of the values' range."""
        tensors = self.weight.tensors
        yield {name: tensors[name][part] for name in _LEVELS[1:] if name in tensors}
        for beyond in (0.0, 0.5) if self.weight.codebook is None else (0.0,):
            yield self._fitted(groups.amin(-1), groups.amax(-1), part, beyond)

    def _fitted(self, low: Tensor, high: Tensor, part: slice, beyond: float) -> dict[str, Tensor]:
        """Levels (n, G) under which the codes reach from low to high, the last ones that part of a step less."""
        weight, found = self.weight, {}
        least, most = self._reach()
        least, most = least - beyond, most + beyond
        if weight.offsets is not None:
            zero = 0 if weight.zeros is None else weight.zeros[part].float()
            scale = self._stored("scales", (high - low) / (most - least), part)
            offset = low - (least - zero) * self._read("scales", scale, part)
            return {"scales": scale, "offsets": self._stored("offsets", offset, part), **self._kept("zeros", part)}
        if weight.zeros is not None:
            low, high = low.clamp(max=0), high.clamp(min=0)
            found["scales"] = self._stored("scales", (high - low) / (most - least), part)
            scale = self._read("scales", found["scales"], part)
            zeros = (-low / scale.where(scale != 0, 1) - beyond).round() - weight.zero
            found["zeros"] = zeros.clamp(0, 2**weight.bits - 1).to(torch.uint8)
            return found
        above = high / most if most > 0 else torch.zeros_like(high)
        below = low / least if least < 0 else torch.zeros_like(low)
        return {"scales": self._stored("scales", torch.maximum(above, below), part)}

    def _kept(self, name: str, part: slice) -> dict[str, Tensor]:
        tensor = self.weight.tensors.get(name)
        return {} if tensor is None else {name: tensor[part]}

    def _reach(self) -> tuple[float, float]:
        """The least and the largest value of a code, before zeros, scale and offset."""
        weight = self.weight
        if weight.codebook is None:
            return -weight.zero, 2**weight.bits - 1 - weight.zero
        finite = weight.codebook[weight.codebook.isfinite()]
        return float(finite.min()), float(finite.max())

    def _coarse(self, name: str, part: slice) -> Tensor | None:
        tensor = self.weight.tensors.get(f"super_{name}")
        return None if tensor is None else tensor[part]

    def _read(self, name: str, stored: Tensor, part: slice) -> Tensor:
        """Scales or offsets (n, G) in float32, as kernels read them."""
        return both_levels(stored, self._coarse(name, part), self.weight.super_groups).float()

    def _stored(self, name: str, wanted: Tensor, part: slice) -> Tensor:
        """The inverse of `_read`, to the nearest that there is."""
        like, coarse = self.weight.tensors[name], self._coarse(name, part)
        if coarse is None:
            info = torch.finfo(like.dtype)
            return wanted.clamp(info.min, info.max).to(like.dtype)
        unit = both_levels(torch.ones_like(like[part]), coarse, self.weight.super_groups).float()
        return (wanted / unit.where(unit != 0, 1)).round().clamp(-128, 127).to(torch.int8)

    def _seen(self, levels: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, whole zero point and offset (n, G, 1) in float32."""
        scale = self._read("scales", levels["scales"], part)
        zero = levels["zeros"].float() if "zeros" in levels else torch.zeros_like(scale)
        offset = self._read("offsets", levels["offsets"], part) if "offsets" in levels else torch.zeros_like(scale)
        return scale[..., None], (zero + self.weight.zero)[..., None], offset[..., None]

    def _codes(self, steps: Tensor, zero: Tensor) -> Tensor:
        table = self.weight.codebook
        if table is None:
            return (steps + zero).round().clamp_(0, 2**self.weight.bits - 1).to(torch.uint8)
        order = table.argsort()
        order = order[table[order].isfinite()]
        ascending = table[order]
        return order.to(torch.uint8)[torch.bucketize(steps, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)]

    def _values(self, codes: Tensor, zero: Tensor) -> Tensor:
        table = self.weight.codebook
        return codes.float() - zero if table is None else table[codes.int()]
