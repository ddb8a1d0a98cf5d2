"""What the low-bit products refuse, their gradients, and how they are batched and sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metate.errors import fail
from metate.low_bit import are_tiles, level_gradients, validate_weight
from metate.op import Op, loop_vmap

Args = tuple[Any, ...]
Splits = list[tuple[dict[str, int], dict[str, int]]]  # dimensions that outputs and arguments are split over
LOW = (torch.int8, torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Refusals.


def refused_by_cuda(x: Tensor, *sizes: int) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: bfloat16 or float16 (tensor cores)"
    too_many = [size for size in (*x.shape, *sizes) if size >= 2**27]
    return f"{too_many[0]} rows or columns: fewer than 2**27" if too_many else None


def refused_float64(out: Tensor, *_: Any) -> str | None:
    return "float64: up to float32" if out.dtype == torch.float64 else None


def dequantize_refused_by_cuda(out: Tensor, *_: Any) -> str | None:
    too_many = [size for size in out.shape if size >= 2**27]
    return refused_float64(out) or (f"{too_many[0]} rows or columns: fewer than 2**27" if too_many else None)


def validate_linear(op: str) -> Callable[..., None]:
    def validate(x: Tensor, *rest: Any) -> None:
        bits, group_size, super_groups, zero = rest[-4:]
        validate_weight(op, x, rest[:_PERMUTATION], bits, group_size, super_groups, zero, x.shape[1])

    return validate


def validate_matmul(op: str) -> Callable[..., None]:
    def validate(x: Tensor, *rest: Any) -> None:
        if not 0 <= rest[-1] < 2**48:
            raise fail(op, "in_features", rest[-1], "0 to 2**48")
        validate_weight(op, x, rest[:_PERMUTATION], *rest[-5:])

    return validate


_PERMUTATION = 8  # its place among the arguments of every product
_seen: Any = WeakIdKeyDictionary()  # permutation -> its version when it was found to be one


def check_permutation(op: str) -> Callable[..., None]:
    """Contents, where looking costs little: on a CPU, once a tensor."""

    def check(*args: Any) -> None:
        permutation = args[_PERMUTATION]
        if permutation is None or permutation.device.type != "cpu":
            return
        version = None if permutation.is_inference() else permutation._version
        if version is not None and _seen.get(permutation) == version:
            return
        order = torch.arange(permutation.shape[0], dtype=torch.int32, device=permutation.device)
        if not torch.equal(permutation.sort().values, order):
            raise fail(op, "permutation", "not one", f"every number from 0 to {permutation.shape[0] - 1} once")
        if version is not None:
            _seen[permutation] = version

    return check


# Gradients.


def save(ctx: Any, inputs: Args, output: Tensor) -> None:
    tensors = [a for a in inputs if a is None or isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.scalars = inputs[len(tensors) :]


def backward_linear(matmul: Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> Args:
        x, *tensors, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dx = matmul(grad, *tensors, *ctx.scalars, x.shape[1]) if needed[0] else None
        learned = weight_gradients(grad, x, tensors, ctx.scalars, needed[1:9])
        dbias = bias_gradient(grad, bias) if needed[9] else None
        return (dx, *learned, dbias, *[None] * len(ctx.scalars))

    return backward


def backward_matmul(linear: Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> Args:
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dx = linear(grad, *tensors, None, *ctx.scalars[:-1]) if needed[0] else None
        learned = weight_gradients(x, grad, tensors, ctx.scalars[:-1], needed[1:9])
        return (dx, *learned, *[None] * len(ctx.scalars))

    return backward


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.to(_wide(grad)).sum(0).to(bias.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weight_gradients(rows: Tensor, columns: Tensor, tensors: Any, scalars: Args, needed: Any) -> list[Tensor | None]:
    """Of scales, offsets and codebook, from d W = rowsᵀ columns: memory of (N, K), taken only where they learn."""
    if not any(needed):
        return [None] * 8
    *parts, permutation = tensors
    wide = _wide(rows)
    columns = columns if permutation is None else columns[:, permutation.long()]
    return [*level_gradients(rows.to(wide).T @ columns.to(wide), parts, scalars, needed[6]), None]


# Batching and sharding.


def fold_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """A mapped x has more rows; anything else mapped is another weight."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return loop_vmap(op, info, in_dims, args)
    x = args[0].movedim(in_dims[0], 0)
    return op(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


BY_ROWS = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "bias")


def shard_linear(op: Op, args: Args) -> Splits:
    """Over the rows of x, or over those of W; tiles are not cut."""
    named = dict(zip(op.parameters, args, strict=False))
    if are_tiles(named["codes"]):
        return [({"out": 0}, {"x": 0})]
    return [({"out": 0}, {"x": 0}), ({"out": 1}, {name: 0 for name in BY_ROWS if named[name] is not None})]


def refuse_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> Any:
    raise NotImplementedError(f"metate.{op.name}: no vmap: it writes into its arguments; call it for every weight")


def shard_dequantize(op: Op, args: Args) -> Splits:
    """Over the rows of W; tiles are not cut."""
    named = dict(zip(op.parameters, args, strict=False))
    if are_tiles(named["codes"]):
        return []
    return [({}, {name: 0 for name in ("out", *BY_ROWS[:-1]) if named[name] is not None})]


def shard_matmul(op: Op, args: Args) -> Splits:
    return [({"out": 0}, {"x": 0})]
