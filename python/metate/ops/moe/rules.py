"""What the operators of mixtures of experts refuse, their gradients, and how they are batched and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import are_tiles, level_gradients, validate_weight
from metate.op import REGISTRY, Op, loop_vmap

Args = tuple[Any, ...]
Splits = list[tuple[dict[str, int], dict[str, int]]]  # dimensions that outputs and arguments are split over
MAX_EXPERTS = 2**20
MAX_ROWS = 2**31 - 1  # what int32 numbers count

# Refusals.


def refused_float64(x: Tensor, *_: Any) -> str | None:
    return "float64: up to float32" if x.dtype == torch.float64 else None


def refused_by_cuda(x: Tensor, *rest: Any) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: bfloat16 or float16 (tensor cores)"
    largest = max(rest[-1], *(size for a in (x, *rest) if isinstance(a, Tensor) for size in a.shape))
    return f"{largest} rows or columns: fewer than 2**27" if largest >= 2**27 else None


def refused_topk_by_cuda(
    logits: Tensor, bias: Tensor | None, top_k: int, score: int, groups: int, top_groups: int, *_: Any
) -> str | None:
    few = top_groups <= 3072
    return refused_float64(logits) or (None if few else f"{top_groups} groups chosen: up to 3072")


def refused_topk_backward_by_cuda(grad: Tensor, *_: Any) -> str | None:
    few = grad.shape[1] <= 1536
    return refused_float64(grad) or (None if few else f"{grad.shape[1]} experts of a row: up to 1536")


def _whole(op: str, name: str, value: Any, least: int, most: int) -> None:
    if not least <= value <= most:
        raise fail(op, name, value, f"{least} to {most}")


def _few_rows(op: str, name: str, x: Tensor) -> None:
    size = math.prod(x.shape) if name != "x" else x.shape[0]
    if size > MAX_ROWS:
        raise fail(op, name, f"of shape {tuple(x.shape)}", f"at most {MAX_ROWS} rows, which int32 numbers count")


def validate_topk(
    logits: Tensor, bias: Tensor | None, top_k: int, score: int, groups: int, top_groups: int, group_rule: int,
    renormalise: bool, scaling: float,
) -> None:  # fmt: skip
    op, experts = "moe_route", logits.shape[1]
    _whole(op, "groups", groups, 1, MAX_EXPERTS)
    if experts % groups or not experts:
        raise fail(op, "logits", f"of {experts} experts", f"1 or more, a multiple of the {groups} groups")
    _whole(op, "top_groups", top_groups, 1, groups)
    _whole(op, "top_k", top_k, 1, experts // groups * top_groups)
    _whole(op, "group_rule", group_rule, 0, 1)
    _validate_weights(op, score, scaling)
    if bias is not None and bias.dtype == torch.float64 and logits.dtype != torch.float64:
        raise fail(op, "bias", "float64", f"float32 beside {logits.dtype}", error=TypeError)


def validate_topk_backward(
    grad: Tensor, logits: Tensor, experts: Tensor, score: int, renormalise: bool, scaling: float
) -> None:
    op = "moe_topk_backward"
    _validate_weights(op, score, scaling)
    if (grad.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise fail(op, "logits", logits.dtype, f"float64 beside float64, else none, like grad: {grad.dtype}",
                   error=TypeError)  # fmt: skip


def _validate_weights(op: str, score: int, scaling: float) -> None:
    _whole(op, "score", score, 0, 3)
    if not math.isfinite(scaling):
        raise fail(op, "scaling", scaling, "a finite number")


def check_topk_backward(grad: Tensor, logits: Tensor, experts: Tensor, *_: Any) -> None:
    within("moe_topk_backward", "experts", experts, 0, logits.shape[1])


def validate_sort(experts: Tensor, num_experts: int) -> None:
    _whole("moe_sort", "num_experts", num_experts, 1, MAX_EXPERTS)
    _few_rows("moe_sort", "experts", experts)


def validate_permute(x: Tensor, order: Tensor, k: int) -> None:
    _validate_k("moe_permute", x, k)


def _validate_k(op: str, x: Tensor, k: int) -> None:
    _whole(op, "k", k, 1, MAX_EXPERTS)
    if x.shape[0] * k > MAX_ROWS:
        raise fail(op, "x", f"of {x.shape[0]} rows, {k} times each", f"at most {MAX_ROWS} together")


def validate_combine(op: str, y: Tensor, weights: Tensor | None) -> None:
    if weights is not None and (weights.dtype == torch.float64) != (y.dtype == torch.float64):
        raise fail(op, "weights", weights.dtype, f"float32 or, like y, {y.dtype}", error=TypeError)


def check_permute(x: Tensor, order: Tensor, k: int) -> None:
    _check_order("moe_permute", order, x.shape[0] * k)


def check_unpermute(y: Tensor, inverse: Tensor, weights: Tensor | None) -> None:
    within("moe_unpermute", "inverse", inverse, -1, y.shape[0])


def check_unpermute_backward(dout: Tensor, y: Tensor, inverse: Tensor, weights: Tensor | None) -> None:
    _once("moe_unpermute_backward", "inverse", inverse, y.shape[0])


def within(op: str, name: str, numbers: Tensor, least: int, most: int) -> None:
    """Contents, where looking costs little: on a CPU. Elsewhere kernels pass over what is out of range."""
    if numbers.device.type != "cpu" or not numbers.numel():
        return
    low, high = (int(end) for end in numbers.aminmax())
    if low < least or high >= most:
        expected = f"{least} to {most - 1}" if most else f"{least}: there are no rows"
        raise fail(op, name, low if low < least else high, expected)


def _once(op: str, name: str, numbers: Tensor, most: int) -> None:
    within(op, name, numbers, -1, most)
    if numbers.device.type == "cpu" and numbers.numel():
        twice = torch.bincount(numbers.flatten().long() + 1, minlength=1)[1:] > 1
        if twice.any():
            raise fail(op, name, f"{int(twice.nonzero()[0])} twice", "every number at most once")


def _check_order(op: str, order: Tensor | None, slots: int) -> None:
    if order is not None:
        _once(op, "order", order, slots)


def _check_offsets(op: str, name: str, offsets: Tensor, rows: int) -> None:
    if offsets.device.type != "cpu":
        return
    starts = offsets.tolist()
    if starts[0] < 0 or starts[-1] > rows or starts != sorted(starts):
        got = starts if len(starts) < 20 else f"{starts[0]} to {starts[-1]}"
        raise fail(op, name, got, f"non-decreasing numbers within 0 to {rows}, the rows that there are")


def _validate_offsets(op: str, name: str, offsets: Tensor) -> None:
    if not offsets.shape[0]:
        raise fail(op, name, "empty", "one number more than there are experts")


def validate_grouped_linear(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, order: Tensor | None, k: int
) -> None:
    _validate_k("grouped_linear", x, k)


def check_grouped_linear(x: Tensor, w: Tensor, offsets: Tensor, bias: Any, order: Tensor | None, k: int) -> None:
    _check_order("grouped_linear", order, x.shape[0] * k)
    _check_offsets("grouped_linear", "offsets", offsets, rows_of(x, order))


def rows_of(x: Tensor, order: Tensor | None) -> int:
    return x.shape[0] if order is None else order.shape[0]


def validate_outer(a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, k: int) -> None:
    op = "grouped_outer"
    _validate_offsets(op, "offsets", offsets)
    _validate_k(op, b, k)
    if order is None and a.shape[0] != b.shape[0]:
        raise fail(op, "b", f"of {b.shape[0]} rows", f"{a.shape[0]} rows as a, or an order that names one for each")


def check_outer(a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, k: int) -> None:
    _check_order("grouped_outer", order, b.shape[0] * k)
    _check_offsets("grouped_outer", "offsets", offsets, a.shape[0])


def validate_quant_linear(x: Tensor, *rest: Any) -> None:
    op, k = "grouped_linear", rest[-1]
    _validate_k(op, x, k)
    bits, group_size, super_groups, zero, _ = rest[-5:]
    validate_weight(op, x, rest[:8], bits, group_size, super_groups, zero, x.shape[1])


def validate_quant_matmul(x: Tensor, *rest: Any) -> None:
    op, in_features = "quant_grouped_matmul", rest[-1]
    _whole(op, "in_features", in_features, 0, 2**48)
    validate_weight(op, x, rest[:8], *rest[-5:])


def check_quant_linear(x: Tensor, *rest: Any) -> None:
    permutation, _, offsets, order = rest[7:11]
    _check_order("grouped_linear", order, x.shape[0] * rest[-1])
    _check_offsets("grouped_linear", "offsets", offsets, rows_of(x, order))
    _check_permutation("grouped_linear", permutation)


def check_quant_matmul(x: Tensor, *rest: Any) -> None:
    _check_offsets("quant_grouped_matmul", "expert_offsets", rest[8], x.shape[0])
    _check_permutation("quant_grouped_matmul", rest[7])


def _check_permutation(op: str, permutation: Tensor | None) -> None:
    if permutation is None or permutation.device.type != "cpu":
        return
    order = torch.arange(permutation.shape[1], dtype=torch.int32, device=permutation.device)
    if not (permutation.sort(1).values == order).all():
        raise fail(op, "permutation", "not one", f"every number from 0 to {permutation.shape[1] - 1} once an expert")


def validate_activation(op: str) -> Callable[..., None]:
    def validate(*args: Any) -> None:
        x = args[-6]
        activation, layout, limit, alpha, shift = args[-5:]
        _whole(op, "activation", activation, 0, 4)
        _whole(op, "layout", layout, 0, 3)
        if layout != 3 and x.shape[1] % 2:
            raise fail(op, "x", f"of {x.shape[1]} columns", "an even number: a gate and an up for each result")
        if not limit > 0:
            raise fail(op, "limit", limit, "a positive number, infinity for none")
        for name, value in (("alpha", alpha), ("shift", shift)):
            if not math.isfinite(value):
                raise fail(op, name, value, "a finite number")
        if len(args) == 7 and tuple(args[0].shape) != (x.shape[0], width(x, layout)):
            raise fail(op, "grad", f"of shape {tuple(args[0].shape)}", f"({x.shape[0]}, {width(x, layout)})")

    return validate


def width(x: Tensor, layout: int) -> int:
    """Columns of the result."""
    return x.shape[1] if layout == 3 else x.shape[1] // 2


# Gradients.


def save(ctx: Any, inputs: Args, output: Any) -> None:
    tensors = [a for a in inputs if a is None or isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.scalars = inputs[len(tensors) :]


def through_reference(name: str) -> Callable[..., Any]:
    """Gradients by torch's autograd through the reference: for second derivatives, which are rarely wanted."""

    def backward(ctx: Any, *grads: Tensor) -> Args:
        inputs = ctx.saved_tensors
        wanted = [i for i, x in enumerate(inputs) if x is not None and ctx.needs_input_grad[i]]
        with torch.enable_grad():
            leaves = {
                i: x.view_as(x) if (x := inputs[i]).requires_grad else x.detach().requires_grad_() for i in wanted
            }
            out = REGISTRY[name].fallback(*(leaves.get(i, x) for i, x in enumerate(inputs)), *ctx.scalars)
        keep = torch.is_grad_enabled()
        found = torch.autograd.grad(out, list(leaves.values()), grads, allow_unused=True, create_graph=keep)
        by_input = dict(zip(leaves, found, strict=True))
        return tuple(by_input.get(i) for i in range(len(inputs) + len(ctx.scalars)))

    return backward


def save_topk(ctx: Any, inputs: Args, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.scalars = (inputs[3], *inputs[7:])
    ctx.set_materialize_grads(False)


def backward_topk(ctx: Any, grad: Tensor | None, _: Any) -> Args:
    logits, experts = ctx.saved_tensors
    found = None
    if grad is not None and ctx.needs_input_grad[0]:
        found = REGISTRY["moe_topk_backward"](grad, logits, experts, *ctx.scalars)
    return (found, *[None] * 8)


def inverse_of(order: Tensor, tokens: Any, k: int) -> Tensor:
    """(tokens, k): at which row each slot stands in `order`, -1 where at none."""
    slots = tokens * k
    numbers = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    inverse = torch.full((slots + 1,), -1, dtype=torch.int32, device=order.device)
    inverse = inverse.scatter(0, torch.where(order < 0, slots, order).long(), numbers)
    return inverse[:slots].view(tokens, k)


def ungather(d_rows: Tensor, x: Tensor, order: Tensor | None, k: int) -> Tensor:
    """The gradient to x from that to its rows as `order` gathers them."""
    if order is None:
        return d_rows
    found: Tensor = REGISTRY["moe_unpermute"](d_rows, inverse_of(order, x.shape[0], k), None)
    return found


def backward_permute(ctx: Any, grad: Tensor) -> Args:
    x, order = ctx.saved_tensors
    return ungather(grad, x, order, ctx.scalars[0]), None, None


def backward_unpermute(ctx: Any, grad: Tensor) -> Args:
    y, inverse, weights = ctx.saved_tensors
    dy, d_weights = REGISTRY["moe_unpermute_backward"](grad.to(y.dtype), y, inverse, weights)
    return dy, None, None if weights is None else d_weights.to(weights.dtype)


def backward_unpermute_backward(ctx: Any, ddy: Tensor, dd_weights: Tensor) -> Args:
    dout, y, inverse, weights = ctx.saved_tensors
    unpermute, backward = REGISTRY["moe_unpermute"], REGISTRY["moe_unpermute_backward"]
    d_dout = unpermute(ddy, inverse, weights)
    if weights is None:
        return d_dout, None, None, None
    d_dout = d_dout + unpermute(y, inverse, dd_weights)
    dy = backward(dout, y, inverse, dd_weights)[0]
    return d_dout, dy, None, backward(dout, ddy, inverse, weights)[1].to(weights.dtype)


def backward_grouped_linear(ctx: Any, grad: Tensor) -> Args:
    x, w, offsets, bias, order = ctx.saved_tensors
    (k,), needed = ctx.scalars, ctx.needs_input_grad
    linear, outer = REGISTRY["grouped_linear"], REGISTRY["grouped_outer"]
    dx = ungather(linear(grad, w.mT, offsets, None, None, 1), x, order, k) if needed[0] else None
    dw = outer(grad, x, offsets, order, k) if needed[1] else None
    return dx, dw, None, _bias_gradient(grad, offsets, bias) if needed[3] else None, None, None


def _bias_gradient(grad: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """Sums over the rows of each expert, rounded once."""
    if bias.dtype != grad.dtype and grad.dtype != torch.float64:
        grad = grad.float()
    ones = grad.new_ones(1, 1).expand(grad.shape[0], 1)
    found: Tensor = REGISTRY["grouped_outer"](ones, grad, offsets, None, 1).squeeze(1)
    return found.to(bias.dtype)


def backward_outer(ctx: Any, grad: Tensor) -> Args:
    a, b, offsets, order = ctx.saved_tensors
    (k,), needed, linear = ctx.scalars, ctx.needs_input_grad, REGISTRY["grouped_linear"]
    da = linear(b, grad, offsets, None, order, k) if needed[0] else None
    db = ungather(linear(a, grad.mT, offsets, None, None, 1), b, order, k) if needed[1] else None
    return da, db, None, None, None


def backward_quant_linear(ctx: Any, grad: Tensor) -> Args:
    x, *weight, bias, offsets, order = ctx.saved_tensors
    *numbers, k = ctx.scalars
    needed = ctx.needs_input_grad
    dx = None
    if needed[0]:
        rows = REGISTRY["quant_grouped_matmul"](grad, *weight, offsets, *numbers, x.shape[1])
        dx = ungather(rows, x, order, k)
    learned = _weight_gradients(grad, x, offsets, order, k, weight, numbers, needed[1:9])
    d_bias = _bias_gradient(grad, offsets, bias) if needed[9] else None
    return (dx, *learned, d_bias, *[None] * 7)


def backward_quant_matmul(ctx: Any, grad: Tensor) -> Args:
    x, *weight, offsets = ctx.saved_tensors
    *numbers, _ = ctx.scalars
    needed = ctx.needs_input_grad
    dx = None
    if needed[0]:
        dx = REGISTRY["quant_grouped_linear"](grad, *weight, None, offsets, None, *numbers, 1)
    return (dx, *_weight_gradients(x, grad, offsets, None, 1, weight, numbers, needed[1:9]), *[None] * 6)


def _weight_gradients(
    rows: Tensor, columns: Tensor, offsets: Tensor, order: Tensor | None, k: int, weight: Any, numbers: Any, needed: Any
) -> list[Tensor | None]:
    """Of scales, offsets and codebook, from d W[e] = rowsᵀ columns: memory of (E, N, K), where they learn."""
    if not any(needed):
        return [None] * 8
    *parts, permutation = weight
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    d_weight = REGISTRY["grouped_outer"](rows.to(wide), columns.to(wide), offsets, order, k)
    if permutation is not None:
        d_weight = d_weight.gather(2, permutation.long()[:, None].expand(d_weight.shape))
    flat = [None if part is None else part.flatten(0, 1) for part in parts[:-1]]
    found = level_gradients(d_weight.flatten(0, 1), [*flat, parts[-1]], tuple(numbers), needed[6])
    shaped = [f if f is None or p is None else f.view(p.shape) for f, p in zip(found, parts, strict=True)]
    return [*shaped, None]


def backward_activation(ctx: Any, grad: Tensor) -> Args:
    (x,) = ctx.saved_tensors
    return (REGISTRY["gated_activation_backward"](grad, x, *ctx.scalars), *[None] * 5)


# Batching and sharding.


def fold_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """Mapped rows are more rows, where every tensor that is mapped or not has a row for each."""
    tensors = args[: op.arity]
    if any(a is not None and (d is None or a.dim() != 2) for a, d in zip(tensors, in_dims, strict=False)):
        return loop_vmap(op, info, in_dims, args)
    rows = [None if a is None else a.movedim(d, 0).flatten(0, 1) for a, d in zip(tensors, in_dims, strict=False)]
    out = op(*rows, *args[op.arity :])
    if isinstance(out, tuple):
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in out), (0,) * len(out)
    return out.unflatten(0, (info.batch_size, -1)), 0


def shard_rows(op: Op, args: Args) -> Splits:
    """Over rows, of which no one notices another."""
    rows = {name for name, text in op.axes.items() if text.split()[0] in ("T", "R") and len(text.split()) == 2}
    named = dict(zip(op.parameters, args, strict=False))
    return [(dict.fromkeys(op.outputs, 0), {name: 0 for name in rows if named[name] is not None})]


def shard_columns(**arguments: int) -> Callable[[Op, Args], Splits]:
    """Over the last dimension of the first result, from these dimensions of the arguments."""

    def shard(op: Op, args: Args) -> Splits:
        named = dict(zip(op.parameters, args, strict=False))
        first = next(iter(op.outputs))
        return [({first: 1}, {name: dim for name, dim in arguments.items() if named[name] is not None})]

    return shard


def shard_outer(op: Op, args: Args) -> Splits:
    return [({"out": 1}, {"a": 1}), ({"out": 2}, {"b": 1})]


def shard_low_bit(**arguments: int) -> Callable[[Op, Args], Splits]:
    """The same of low-bit weights; tiles are not cut."""

    def shard(op: Op, args: Args) -> Splits:
        return shard_nothing(op, args) if are_tiles(args[1]) else shard_columns(**arguments)(op, args)

    return shard


def shard_nothing(op: Op, args: Args) -> Splits:
    """Every number of the result may depend on every number of the arguments."""
    return [({}, {})]
