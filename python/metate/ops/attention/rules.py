"""What attention refuses, its gradients, and how it is batched and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.op import Op, loop_vmap
from metate.ops.attention import reference

MAX_HEAD_DIM = 512


def validate_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    bias, slopes, sinks, *masks = rest[:8]
    scale, left, right, _, softcap, p, seed, offset, *block_size = rest[8:]
    _validate("attention", q, k, v, bias, slopes, masks, scale, left, right, softcap, block_size)
    _validate_wide("attention", q, alibi_slopes=slopes, sinks=sinks)
    _validate_dropout("attention", p, seed, offset)


def validate_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: Any
) -> None:
    bias, slopes, sinks, *masks = rest[:8]
    scale, left, right, _, softcap, p, seed, offset, *block_size = rest[8:-3]
    _validate("attention_backward", q, k, v, bias, slopes, masks, scale, left, right, softcap, block_size)
    _validate_wide("attention_backward", q, alibi_slopes=slopes, sinks=sinks, lse=lse, delta=delta)
    _validate_dropout("attention_backward", p, seed, offset)


def validate_column_sums(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> None:
    bias, slopes, sinks, *masks = rest[:8]
    scale, left, right, _, softcap, *block_size = rest[8:]
    _validate("attention_column_sums", q, k, k, bias, slopes, masks, scale, left, right, softcap, block_size)
    _validate_wide("attention_column_sums", q, alibi_slopes=slopes, sinks=sinks, lse=lse)


def refused_by_cuda(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(q.dtype).removeprefix('torch.')}: bfloat16 or float16 (tensor cores)"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"head_dim {q.shape[3]}, value_dim {v.shape[3]}: up to 256"
    if q.shape[1] + k.shape[1] >= 2**30:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: fewer than 2**30 together"
    return None


def validate_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> None:
    _validate_wide("attention_delta", out, grad_lse=grad_lse)


def validate_merge(outs: Tensor, lses: Tensor) -> None:
    _validate_wide("merge_attention_states", outs, lses=lses)


def _validate(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, masks: Any, scale: float,
    left: int, right: int, softcap: float, block_size: Any,
) -> None:  # fmt: skip
    _validate_heads(op, q, k, v)
    _validate_packed(op, q, slopes, bias, *masks)
    _validate_scalars(op, scale, left, right, softcap, block_size)


def _validate_wide(op: str, q: Tensor, **vectors: Tensor | None) -> None:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, vector in vectors.items():
        if vector is not None and vector.dtype != wide:
            raise fail(op, name, vector.dtype, f"{wide} beside {q.dtype}", error=TypeError)


def _validate_dropout(op: str, p: float, seed: int, offset: int) -> None:
    if not 0 <= p < 1:
        raise fail(op, "dropout_p", p, "a probability in [0, 1)")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:  # under a compiler it may be drawn later
        raise fail(op, "seed", seed, "a 64-bit integer")
    if not 0 <= offset < 2**32:
        raise fail(op, "offset", offset, "0 to 2**32 - 1")


def _validate_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, size in (("head_dim", q.shape[3]), ("value_dim", v.shape[3])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise fail(op, name, size, f"1 to {MAX_HEAD_DIM}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if (kv_heads == 0) != (heads == 0) or (kv_heads and heads % kv_heads):
        # Those who come from layouts with heads before the sequence see the axes.
        expected = "q heads must be a multiple of k heads; axes are (…, heads, head_dim)"
        raise ValueError(f"metate.{op}: k has {kv_heads} heads, q has {heads}; {expected}")


def _validate_packed(
    op: str, q: Tensor, slopes: Tensor | None, bias: Tensor | None, intervals: Tensor | None, blocks: Tensor | None,
    bits: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
) -> None:  # fmt: skip
    if (cu_q is None) != (cu_k is None):
        raise fail(op, "cu_seqlens_k" if cu_k is None else "cu_seqlens_q", None, "both cu_seqlens or neither")
    sequences = q.shape[0]
    if cu_q is not None:
        sequences = cu_q.shape[0] - 1
        if q.shape[0] != 1 or sequences < 0:
            raise fail(
                op, "cu_seqlens_q", f"of shape {tuple(cu_q.shape)}", "(sequences + 1), with packed tokens of batch 1"
            )
        for name, tensor in (("bias", bias), ("mask.blocks", blocks), ("mask.bits", bits)):
            if tensor is not None:
                instead = "use mask.intervals, windows or ALiBi"
                raise NotImplementedError(f"metate.{op}: {name} with packed sequences: {instead}")
    if slopes is not None and slopes.dim() == 2 and slopes.shape[0] != sequences:
        raise fail(
            op, "alibi_slopes", f"of shape {tuple(slopes.shape)}", f"({q.shape[2]},) or ({sequences}, {q.shape[2]})"
        )


def _validate_scalars(op: str, scale: float, left: int, right: int, softcap: float, block_size: Any) -> None:
    if not math.isfinite(scale):
        raise fail(op, "scale", scale, "a finite number")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise fail(op, "softcap", softcap, "0 (none) or a positive number")
    for name, value in (("window[0]", left), ("window[1]", right)):
        if value < -1:
            raise fail(op, name, value, "-1 (no limit) or a number of keys")
    for name, value in zip(("block_size[0]", "block_size[1]"), block_size, strict=True):
        if value < 1:
            raise fail(op, name, value, "at least 1")


def check_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    _check_cu_seqlens(q, k, *rest[6:8])


def check_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: Any) -> None:
    _check_cu_seqlens(q, k, *rest[6:8])


def check_column_sums(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> None:
    _check_cu_seqlens(q, k, *rest[6:8])


def _check_cu_seqlens(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    """Contents, where looking costs nothing: on a CPU. Kernels on a GPU clamp what they read."""
    for name, cu, tokens in (("cu_seqlens_q", cu_q, q.shape[1]), ("cu_seqlens_k", cu_k, k.shape[1])):
        if cu is None or cu.device.type != "cpu":
            continue
        starts = cu.tolist()
        if any(b < a for a, b in pairwise(starts)):
            raise fail("attention_varlen", name, starts if len(starts) < 20 else "decreasing", "non-decreasing offsets")
        if starts and not (starts[0] >= 0 and starts[-1] <= tokens):
            raise fail("attention_varlen", name, f"{starts[0]} to {starts[-1]}", f"offsets within 0 to {tokens} tokens")


# Gradients.


def backward_shapes(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *rest: Any
) -> tuple[Any, ...]:
    bias, slopes, *_, need_dbias, need_dslopes = rest
    dbias = bias.shape if need_dbias and bias is not None else (0,)
    return q.shape, k.shape, v.shape, dbias, slopes.shape if need_dslopes and slopes is not None else (0,)


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.flags = inputs[11:]


def backward_of(delta_op: Op, backward_op: Op) -> Callable[..., Any]:
    return lambda ctx, grad_out, grad_lse: _backward(delta_op, backward_op, ctx, grad_out, grad_lse)


def _backward(
    delta_op: Op, backward_op: Op, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    q, k, v, bias, slopes, sinks, *masks, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = delta_op(out, grad_out, grad_lse)
    needed = ctx.needs_input_grad
    dq, dk, dv, dbias, dslopes = backward_op(
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        bias,
        slopes,
        sinks,
        *masks,
        *ctx.flags,
        False,
        needed[3] and bias is not None,
        needed[4] and slopes is not None,
    )
    dsinks = None
    if sinks is not None and needed[5]:
        alive = lse != -math.inf
        dsinks = -(torch.exp(sinks[:, None] - lse.where(alive, 0)) * delta).where(alive, 0).sum((0, 2))
    return (dq, dk, dv, dbias.to(bias.dtype) if bias is not None and needed[3] else None,
            dslopes if needed[4] and slopes is not None else None, dsinks,
            *[None] * (len(masks) + len(ctx.flags)))  # fmt: skip


def save_delta(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def backward_delta(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    out, grad_out = ctx.saved_tensors
    row = grad.transpose(1, 2)[..., None]
    to_out, to_grad_out = ((row * x).to(x.dtype) for x in (grad_out, out))
    return to_out, to_grad_out, -grad if ctx.needs_input_grad[2] else None


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:14])
    ctx.flags = inputs[14:]


SCORES_AT_ONCE = 1 << 21  # of second derivatives, in several tensors of float32


def double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives by torch's autograd through the backward formula, a few queries at a time.

    So memory stays linear in the lengths; where third derivatives may follow, torch keeps all (B, Hq, Sq, Sk) scores.
    """
    inputs = ctx.saved_tensors
    differentiable = [i for i in range(9) if inputs[i] is not None and ctx.needs_input_grad[i]]
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        # New nodes: lse and delta depend on q, k, v in the outer graph, which must not be walked here.
        leaves = [
            (inputs[i].view_as(inputs[i]) if inputs[i].requires_grad else inputs[i].detach().requires_grad_()).to(wide)
            for i in differentiable
        ]
    arguments = [x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    for i, leaf in zip(differentiable, leaves, strict=True):
        arguments[i] = leaf
    totals: list[Tensor | None] = [None] * (len(inputs) + len(ctx.flags))
    for taken in _tiles_of_queries(inputs[1], inputs[2]) if leaves else ():
        found = _second_derivatives(taken, (*arguments, *ctx.flags), leaves, grads)
        for i, gradient in zip(differentiable, found, strict=True):
            total = totals[i]
            totals[i] = gradient if total is None or gradient is None else total + gradient
    return tuple(x if x is None else x.to(inputs[i].dtype) for i, x in enumerate(totals))


def _tiles_of_queries(q: Tensor, k: Tensor) -> list[slice]:
    scores = q.shape[0] * q.shape[2] * k.shape[1]
    if torch.is_grad_enabled() or q.shape[1] * scores <= SCORES_AT_ONCE:
        return [slice(None)]
    rows = max(16, SCORES_AT_ONCE // scores)
    return [slice(first, first + rows) for first in range(0, q.shape[1], rows)]


def _second_derivatives(
    taken: slice, arguments: tuple[Any, ...], leaves: list[Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What some of the queries give, from the gradients of dq, dk, dv, dbias and dalibi_slopes."""
    with torch.enable_grad():
        outputs = reference.backward_of_rows(taken, *arguments)
    grad_q, grad_k, grad_v, grad_bias, grad_slopes = grads
    weights = (
        None if grad_q is None else grad_q[:, taken], grad_k, grad_v,
        None if grad_bias is None or arguments[6] is None else reference.rows_of(grad_bias, taken), grad_slopes,
    )  # fmt: skip
    pairs = [
        (o, g.to(o.dtype))
        for o, g in zip(outputs, weights, strict=True)
        if g is not None and o.requires_grad and o.numel()
    ]
    if not pairs:
        return (None,) * len(leaves)
    outs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outs, leaves, given, allow_unused=True, create_graph=torch.is_grad_enabled())


def save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def backward_merge(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight_n = exp(lse_n - lse): d out_n = weight_n g, d lse_n = weight_n (g · (out_n - out) + g_lse)."""
    outs, lses, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0))
    g = grad_out.to(lse.dtype)
    inner = (g * (outs.to(lse.dtype) - out.to(lse.dtype))).sum(-1).transpose(-1, -2)
    dlses = (weights * (inner + grad_lse)).where(weights > 0, 0)
    return (weights.transpose(-1, -2)[..., None] * g).to(outs.dtype), dlses


# Batching and sharding.

_HEADS = {"q": 2, "k": 2, "v": 2, "grad_out": 2, "dq": 2, "dk": 2, "dv": 2, "out": 2, "lse": 1, "delta": 1, "sums": 1,
          "bias": 1, "intervals": 1, "blocks": 1, "bits": 1, "sinks": 0, "dbias": 1}  # fmt: skip
_BATCH = {name: 0 for name in _HEADS if name != "sinks"}


def shardings(op: Op, args: tuple[Any, ...]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Attention splits over batch and over heads; packed sequences over heads only."""
    named = dict(zip(op.parameters, args, strict=False))
    split = []
    for dims in (_BATCH, _HEADS) if named["cu_seqlens_q"] is None else (_HEADS,):
        inputs = {
            name: dims[name]
            for name, arg in named.items()
            if arg is not None and name in dims and arg.shape[dims[name]] != 1
        }
        if dims is _HEADS and named["alibi_slopes"] is not None:
            inputs["alibi_slopes"] = len(named["alibi_slopes"].shape) - 1
        if dims is _BATCH and named["alibi_slopes"] is not None and len(named["alibi_slopes"].shape) == 2:
            inputs["alibi_slopes"] = 0
        if not (named.get("need_dbias") or named.get("need_dalibi_slopes")):
            split.append(({name: dims[name] for name in op.outputs if name in dims}, inputs))
    return split


def fold_vmap(op: Op, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """A mapped dimension becomes more batch, where the batch entries are independent."""
    named = dict(zip(op.parameters, args, strict=False))
    mapped = {name for name, dim in zip(op.parameters, in_dims, strict=False) if dim is not None}
    apart = named.get("need_dbias") or named.get("need_dalibi_slopes") or named.get("dropout_p")
    if (
        named["cu_seqlens_q"] is not None
        or mapped & {"sinks", "alibi_slopes"}
        or apart
        or named.get("alibi_slopes") is not None
    ):
        return loop_vmap(op, info, in_dims, args)
    q, q_dim = named["q"], dict(zip(op.parameters, in_dims, strict=False))["q"]
    batch = q.movedim(q_dim, 0).shape[1] if q_dim is not None else q.shape[0]

    def fold(name: str, x: Any, dim: int | None) -> Any:
        if (
            not isinstance(x, Tensor)
            or name == "sinks"
            or (dim is None and x.shape[0] == 1 and name in ("bias", "intervals", "blocks", "bits"))
        ):
            return x
        x = x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        return x.expand(info.batch_size, batch, *x.shape[2:]).flatten(0, 1)

    folded = [fold(name, x, dim) for name, x, dim in zip(op.parameters, args, in_dims, strict=True)]
    results = op(*folded)
    if isinstance(results, Tensor):
        return results.unflatten(0, (info.batch_size, batch)), 0
    unfolded = tuple(
        r.unflatten(0, (info.batch_size, batch)) if r.dim() > 1 else r.expand(info.batch_size, -1) for r in results
    )
    return unfolded, (0,) * len(unfolded)


def delta_shardings(op: Op, args: tuple[Any, ...]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Rows are apart: over batch, heads and queries."""
    return [
        ({"delta": row}, {"out": token, "grad_out": token} | ({} if args[2] is None else {"grad_lse": row}))
        for token, row in ((0, 0), (2, 1), (1, 2))
    ]


def delta_vmap(op: Op, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The mapped dimension joins the batch."""
    folded = (
        x
        if x is None
        else (x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)).flatten(0, 1)
        for x, dim in zip(args, in_dims, strict=True)
    )
    return op(*folded).unflatten(0, (info.batch_size, -1)), 0


def merge_vmap(op: Op, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The mapped dimension joins the batch, the second dimension of both arguments."""
    outs, lses = (
        (x.movedim(dim, 1) if dim is not None else x[:, None].expand(-1, info.batch_size, *x.shape[1:])).flatten(1, 2)
        for x, dim in zip(args, in_dims, strict=True)
    )
    return tuple(r.unflatten(0, (info.batch_size, -1)) for r in op(outs, lses)), (0, 0)
