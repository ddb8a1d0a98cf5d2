"""Linear layers on low-bit weights: every format through one canonical form (weight.py) and one kernel a backend.

`csrc/quant_linear.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.op import use
from metate.ops.quant_linear.declaration import int8_op, linear_op
from metate.ops.quant_linear.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "dequantize", "quant_linear"]


def quant_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """x Wᵀ + bias from the codes of W: no dense copy of W exists at any time.

    Args:
        x: (…, in_features), float32, bfloat16, float16 (float64 on a CPU), any strides.
        weight: W, (out_features, in_features), of any format that lowers to QuantizedWeight, on the device of x.
        bias: (out_features), float32 or the dtype of x.
        activation: None computes with x as it is, sums in float32. "int8" first rounds every chunk of at most 32
            columns of a row to 8 bits (Dettmers et al. 2022, LLM.int8, by chunk): a relative error of about 8e-3, and
            no gradients. The CPU kernel adds these integers as floats, so that it saves no time over None.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (…, out_features), dtype of x. A row depends on no other row, bit for bit. Gradients reach x and bias through
        the low-bit kernels, and float scales, offsets and codebooks that ask for one through W's formula.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    if not isinstance(weight, QuantizedWeight):
        raise fail("quant_linear", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
    if activation not in (None, "int8"):
        raise fail("quant_linear", "activation", repr(activation), "None or 'int8'")
    if not isinstance(x, Tensor):
        raise fail("quant_linear", "x", type(x).__name__, "a torch.Tensor", error=TypeError)
    if not x.dim() or x.shape[-1] != weight.in_features:
        raise fail("quant_linear", "x", f"of shape {tuple(x.shape)}", f"(…, {weight.in_features}) for {weight!r}")
    if backend is not None:
        with use(backend):
            return quant_linear(x, weight, bias, activation=activation)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    op = linear_op if activation is None else int8_op
    out: Tensor = op(rows, *arguments(weight), bias, *scalars(weight))
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.out_features)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W as a dense tensor (out_features, in_features), computed in float32 and rounded to `dtype`."""
    if not isinstance(weight, QuantizedWeight):
        raise fail("dequantize", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
    return weight.dequantize(dtype)


def arguments(weight: QuantizedWeight) -> tuple[Any, ...]:
    """The tensors of a weight as the operators take them."""
    w = weight
    return w.codes, w.scales, w.super_scales, w.zeros, w.offsets, w.super_offsets, w.codebook, w.permutation


def scalars(weight: QuantizedWeight) -> tuple[int, int, int, int]:
    """Its numbers, in the order of the operators."""
    return weight.bits, weight.group_size, weight.super_groups, weight.zero
