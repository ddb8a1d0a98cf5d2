"""QuantizedExperts: the low-bit weights of all experts of a layer, stacked as one operator reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.low_bit import LowBitTensors, QuantizedWeight
from metate.memory import allocate

_SHARED = ("codebook",)  # tensors that all experts have in common
_NUMBERS = ("bits", "group_size", "super_groups", "zero")


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedExperts(LowBitTensors):
    """Weights [experts E, out_features N, in_features K]: the tensors of E `QuantizedWeight`s, stacked.

    shape: (E, N, K). Every other field is that of QuantizedWeight with a first dimension of E, but for the codebook and
    the numbers, which the experts share. FormatError names the field that is wrong.
    """

    shape: tuple[int, int, int]
    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor
    super_scales: Tensor | None = None
    super_groups: int = 0
    zero: int = 0
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    super_offsets: Tensor | None = None
    codebook: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shape, tuple) or len(self.shape) != 3 or self.shape[0] < 1:
            raise _fail("shape", self.shape, "a tuple of 3 integers (experts, out_features, in_features)")
        for name, tensor in self.tensors.items():
            if name not in _SHARED and (not tensor.dim() or tensor.shape[0] != self.shape[0]):
                raise _fail(name, f"shape {tuple(tensor.shape)}", f"a first dimension of {self.shape[0]} experts")
        for expert in range(self.shape[0]):
            self[expert]  # checks itself

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[QuantizedWeight]:
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """The weight of one expert, a view."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        tensors: dict[str, Any] = {
            name: tensor if name in _SHARED else tensor[expert] for name, tensor in self.tensors.items()
        }
        return QuantizedWeight(self.shape[1:], **numbers, **tensors)

    @classmethod
    def stack(cls, weights: Sequence[QuantizedWeight]) -> QuantizedExperts:
        """One stack of weights that are alike in all but their values."""
        if not weights:
            raise _fail("weights", "empty", "a QuantizedWeight for each expert")
        first = weights[0]
        for expert, weight in enumerate(weights):
            if not isinstance(weight, QuantizedWeight):
                raise fail("QuantizedExperts", f"weights[{expert}]", type(weight).__name__, "a metate.QuantizedWeight",
                           error=TypeError)  # fmt: skip
            problem = _difference(first, weight)
            if problem:
                raise _fail(f"weights[{expert}]", weight, f"a weight like that of expert 0, {first}: {problem} differs")
        numbers: dict[str, Any] = {name: getattr(first, name) for name in _NUMBERS}
        tensors: dict[str, Any] = {
            name: tensor if name in _SHARED else _stacked([w.tensors[name] for w in weights])
            for name, tensor in first.tensors.items()
        }
        return cls((len(weights), *first.shape), **numbers, **tensors)

    @classmethod
    def quantize(cls, weights: Tensor, quantizer: Callable[[Tensor], QuantizedWeight]) -> QuantizedExperts:
        """Dense weights (E, N, K), one expert after another by any quantiser of metate.quant."""
        if not isinstance(weights, Tensor) or weights.dim() != 3:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise fail("QuantizedExperts", "weights", got, "a tensor (experts, out_features, in_features)")
        return cls.stack([quantizer(weight) for weight in weights])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights (E, N, K), computed in float32 and rounded to `dtype`."""
        if torch.is_grad_enabled() and self.learns:
            return torch.stack([weight.dequantize(dtype) for weight in self])
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for weight, part in zip(self, out, strict=True):
            weight.dequantize(out=part)
        return out

    def __repr__(self) -> str:
        return f"QuantizedExperts({len(self)} × {self[0]!r})"


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    return torch.stack(list(tensors), out=allocate((len(tensors), *first.shape), first.dtype, first.device))


def _difference(a: QuantizedWeight, b: QuantizedWeight) -> str:
    """What two weights do not have in common and must, or nothing."""
    for name in ("shape", *_NUMBERS):
        if getattr(a, name) != getattr(b, name):
            return name
    for name in {**a.tensors, **b.tensors}:
        x, y = a.tensors.get(name), b.tensors.get(name)
        if x is None or y is None or (x.dtype, x.device) != (y.dtype, y.device):
            return name
        if name in _SHARED and not same_numbers(x, y):
            return name
    return ""


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """NaN is NaN: codebooks of floating-point codes have them."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _fail(field: str, got: object, expected: str) -> Exception:
    return fail("QuantizedExperts", field, got, expected, error=FormatError)
