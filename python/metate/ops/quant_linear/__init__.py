"""Linear layers on low-bit weights: every format through one canonical form (weight.py) and one kernel a backend.

`csrc/quant_linear.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metate.errors import fail, require_dense, require_number
from metate.low_bit import QuantizedWeight
from metate.op import Op
from metate.ops.quant_linear.declaration import dequantize_op, int8_op, linear_op
from metate.ops.quant_linear.lora import check_adapter_ids, factors_of, shrink_op
from metate.ops.quant_linear.lora import linear_op as lora_op
from metate.shortcut import Shortcut

__all__ = ["QuantizedWeight", "dequantize", "lora_linear", "quant_linear"]

_multiply, _multiply_int8, _adapt = map(Shortcut, ("quant_linear", "quant_linear_int8", "lora_linear"))


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
        weight: W, (out_features, in_features), of any format that lowers to QuantizedWeight, on the device of x. On a
            CPU few rows of x take 4-bit ones faster from `weight.in_tiles()`, made once.
        bias: (out_features), float32 or the dtype of x.
        activation: None computes with x as it is, sums in float32. "int8" first rounds every chunk of at most 32
            columns of a row to 8 bits (Dettmers et al. 2022, LLM.int8, by chunk): a relative error of about 8e-3, and
            no gradients. On a CPU, products of codes (not of a codebook) and these integers are summed
            in whole numbers: the faster the more rows there are.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (…, out_features), dtype of x. A row depends on no other row, bit for bit. Gradients reach x and bias through
        the low-bit kernels, and float scales, offsets and codebooks that ask for one through W's formula. What a number
        that is not finite reaches is not finite: infinite, or NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    shape = x.shape if isinstance(x, Tensor) and isinstance(weight, QuantizedWeight) and not x.is_nested else ()
    if not shape or shape[-1] != weight.shape[1]:
        _check_rows("quant_linear", x, weight)
    if activation is not None and not (isinstance(activation, str) and activation == "int8"):
        raise fail("quant_linear", "activation", repr(activation)[:60], "None or 'int8'")
    op, shortcut = (linear_op, _multiply) if activation is None else (int8_op, _multiply_int8)
    rest = *weight.arguments, bias, *weight.scalars
    if len(shape) == 2:
        return op.call((x, *rest), backend=backend)  # type: ignore[no-any-return]
    args = x, *rest
    return shortcut(args, _in_rows, (op, args, backend), backend)  # type: ignore[no-any-return]


def _in_rows(op: Op, args: tuple[Any, ...], backend: str | None) -> Tensor:
    x, codes = args[:2]
    if x.dim() == 2:
        return op.call(args, backend=backend)  # type: ignore[no-any-return]
    out: Tensor = op.call((x.reshape(-1, x.shape[-1]), *args[1:]), backend=backend)
    return out.reshape(*x.shape[:-1], codes.shape[0])


def lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    adapter_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ in one pass (Hu et al. 2022): the result is written once, update included.

    Args:
        x: (…, in_features), float32, bfloat16, float16 (float64 on a CPU), any strides.
        weight: W, (out_features, in_features), on the device of x.
        A: (adapters, rank, in_features), float32 or the dtype of x; (rank, in_features) for one adapter. Any rank.
        B: (adapters, out_features, rank), float32 or the dtype of x; (out_features, rank) for one adapter.
        bias: (out_features), float32 or the dtype of x.
        scaling: a number for all adapters, or (adapters) float32.
        adapter_ids: which adapter a row of x has, -1 for none: integers of the first dimensions of x, (batch,) or
            (batch, length) beside (batch, length, in_features). Needed where there are several adapters. On a CPU
            other numbers are refused; elsewhere they count as -1.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (…, out_features), dtype of x. A row depends on no other row, bit for bit. Gradients reach x, A, B, scaling and
        bias; those of A and B are sums over the rows of each adapter, zeros for one without rows, and deterministic.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    _check_rows("lora_linear", x, weight)
    args = x, *weight.arguments, bias, A, B, scaling, adapter_ids, *weight.scalars
    given = x, weight, A, B, bias, scaling, adapter_ids, backend
    return _adapt(args, _by_adapters, given, backend)  # type: ignore[no-any-return]


def _by_adapters(
    x: Tensor, weight: QuantizedWeight, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    adapter_ids: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    adapters = _adapters(x, A, B, scaling, adapter_ids)
    return _in_rows(lora_op, (x, *weight.arguments, bias, *adapters, *weight.scalars), backend)


def low_rank_update(
    x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor = 1.0, adapter_ids: Tensor | None = None
) -> Tensor:
    """scaling · (x Aᵀ) Bᵀ alone, in float32: what `lora_linear` adds, for weights of other kinds."""
    A, B, factors, ids = _adapters(x, A, B, scaling, adapter_ids)
    check_adapter_ids("lora_linear", ids, A.shape[0])
    low = shrink_op(x.reshape(-1, x.shape[-1]), A, ids) * factors_of(factors, ids)
    out: Tensor = shrink_op(low.to(x.dtype), B, ids)
    return out.reshape(*x.shape[:-1], B.shape[1])


def _check_rows(op: str, x: Tensor, weight: QuantizedWeight) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise fail(op, "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
    require_dense(op, "x", x)
    if not x.dim() or x.shape[-1] != weight.in_features:
        raise fail(op, "x", f"of shape {tuple(x.shape)}", f"(…, {weight.in_features}) for {weight!r}")


def _adapters(
    x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, adapter_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A and B with a dimension of adapters, a scaling for each, and an int32 number for every row of x."""
    for name, matrix in (("A", A), ("B", B)):
        require_dense("lora_linear", name, matrix)
        if matrix.dim() not in (2, 3):
            raise fail("lora_linear", name, f"of shape {tuple(matrix.shape)}", "2 dimensions, or 3 with adapters first")
    A, B = (matrix.unsqueeze(0) if matrix.dim() == 2 else matrix for matrix in (A, B))
    if not isinstance(scaling, Tensor):
        scaling = require_number("lora_linear", "scaling", scaling)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaling = torch.full(A.shape[:1], scaling, dtype=wide, device=x.device)
    if adapter_ids is None:
        return A, B, scaling, None
    ids = adapter_ids
    require_dense("lora_linear", "adapter_ids", ids, "a tensor of integers")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise fail("lora_linear", "adapter_ids", ids.dtype, "a tensor of integers", error=TypeError)
    if not 1 <= ids.dim() < x.dim() or ids.shape != x.shape[: ids.dim()]:
        expected = f"{tuple(x.shape[:-1])} or its first sizes: a number for each row of x"
        raise fail("lora_linear", "adapter_ids", f"of shape {tuple(ids.shape)}", expected)
    more = x.shape[ids.dim() : -1]
    ids = ids.clamp(-2, A.shape[0]).to(torch.int32).reshape(*ids.shape, *[1] * len(more)).expand(*ids.shape, *more)
    return A, B, scaling, ids.reshape(-1)


def dequantize(
    weight: QuantizedWeight,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """W as a dense tensor (out_features, in_features), computed in float32 and rounded to `dtype`.

    Args:
        weight: W, of any format that lowers to QuantizedWeight.
        dtype: of the result.
        out: (out_features, in_features), any strides: written and returned in place of a new tensor, in its dtype.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        W. Without `out`, gradients reach scales, offsets and codebooks that ask for one, by torch's own operators.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    if not isinstance(weight, QuantizedWeight):
        raise fail("dequantize", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
    if not isinstance(dtype, torch.dtype):
        raise fail("dequantize", "dtype", repr(dtype)[:60], "a torch.dtype", error=TypeError)
    if out is not None:
        require_dense("dequantize", "out", out)
    return weight.dense(lambda *args: dequantize_op.call(args, backend=backend), dtype, out)
