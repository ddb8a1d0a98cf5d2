"""Attention in Triton: launchers with the parameters of the declared operators."""

import math
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from ..shared import launch, refusal
from .backward import keys_kernel, queries_kernel
from .delta import delta_kernel
from .forward import forward_kernel
from .merge import merge_kernel
from .sums import bias_kernel, columns_kernel, rows_kernel, slopes_kernel


def _launch(kernel: Any, rows: str, heads: int, arguments: dict[str, Any]) -> None:
    """One program per head and block of queries (rows "M") or keys ("N"). Which blocks a packed sequence has is known
    on the device only, so there are as many programs as it could have at most."""
    tokens = arguments["tokens_q" if rows == "M" else "tokens_k"]
    sequences = arguments["sequences"]
    packed = arguments["cu_seqlens_q"] is not None

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        block = chosen[f"BLOCK_{rows}"]
        return (heads * (tokens // block + sequences if packed else sequences * triton.cdiv(tokens, block)),)

    launch(kernel, grid, arguments, arguments["q"])


def _signed(word: int) -> int:
    """The 32-bit word as the int32 that a kernel receives whatever the value."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _mask(mask: Tensor | None) -> tuple[Tensor, int, int] | None:
    """A dense mask with one step per batch and per head, 0 where it is shared."""
    if mask is None:
        return None
    for axis in (0, 1):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.contiguous(), mask.shape[1] * (mask.shape[0] > 1), int(mask.shape[1] > 1)


def _strided(bias: Tensor | None) -> tuple[Any, ...] | None:
    if bias is None:
        return None
    return bias, *(stride * (size > 1) for stride, size in zip(bias.stride(), bias.shape, strict=True))


# The parameters that the operators share, in their order.
_TERMS = ("bias", "alibi_slopes")
_MASKS = ("intervals", "blocks", "bits", "cu_seqlens_q", "cu_seqlens_k")
_SCORES = ("scale", "window_left", "window_right", "top_left", "softcap")
_DROPOUT = ("dropout_p", "seed", "offset")
_BLOCKS = ("block_m", "block_n")


def _call(arguments: tuple[Any, ...], *parameters: str) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(parameters, arguments, strict=True)))


def _problem(call: SimpleNamespace) -> dict[str, Any]:
    """The arguments that make scores, which every kernel takes."""
    q, k, cu_seqlens_q, softcap = call.q, call.k, call.cu_seqlens_q, call.softcap
    batch, tokens_q, heads, dim = q.shape
    tokens_k = k.shape[1]
    unlimited = tokens_q + tokens_k
    natural = q.dtype == torch.float32
    unit = 1.0 if natural else math.log2(math.e)
    sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    slopes = None
    if call.alibi_slopes is not None:
        per_batch = call.alibi_slopes.dim() == 2 and call.alibi_slopes.shape[0] > 1
        slopes = (call.alibi_slopes.contiguous(), heads * per_batch)
    return {
        "q": q,
        "k": k,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "bias": _strided(call.bias),
        "slopes": slopes,
        "intervals": _mask(call.intervals),
        "blocks": _mask(call.blocks),
        "bits": _mask(call.bits),
        "cu_seqlens_q": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        "cu_seqlens_k": None if call.cu_seqlens_k is None else call.cu_seqlens_k.contiguous(),
        "sequences": sequences,
        "tokens_q": tokens_q,
        "tokens_k": tokens_k,
        "heads": heads,
        "group": heads // max(k.shape[2], 1),
        "left": unlimited if call.window_left < 0 else min(call.window_left, unlimited),
        "right": unlimited if call.window_right < 0 else min(call.window_right, unlimited),
        "bottom_right": int(not call.top_left),
        "block_m": max(call.block_m, 1),
        "block_n": max(call.block_n, 1),
        "inner": call.scale / softcap if softcap > 0 else call.scale * unit,
        "outer": softcap * unit,
        "scale": call.scale,
        "CAP": softcap > 0,
        "NATURAL": natural,
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "SHORT": tokens_q <= 16 * max(sequences if cu_seqlens_q is not None else 1, 1),
    }


def _value(call: SimpleNamespace) -> dict[str, Any]:
    """The arguments of the kernels that look at v, through what dropout leaves."""
    v, seed, dropout_p = call.v, call.seed, call.dropout_p
    return {
        "v": v,
        "v_strides": v.stride(),
        "VALUE_DIM": v.shape[3],
        "BLOCK_V": max(16, triton.next_power_of_2(v.shape[3])),
        "seed_lo": _signed(seed),
        "seed_hi": _signed(seed >> 32),
        "offset": _signed(call.offset),
        "threshold": _signed(min(round(dropout_p * 2**32), 2**32 - 1)),
        "dropout_scale": 1.0 / (1.0 - dropout_p),
        "DROPOUT": dropout_p > 0,
    }


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _call(arguments, "q", "k", "v", *_TERMS, "sinks", *_MASKS, *_SCORES, *_DROPOUT, *_BLOCKS)
    problem = _problem(call)
    batch, tokens, heads, _ = call.q.shape
    out = call.q.new_empty(batch, tokens, heads, call.v.shape[3])
    lse = call.q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if call.cu_seqlens_q is not None:  # tokens of no sequence are nobody's
        out.zero_()
        lse.fill_(-math.inf)
    if lse.numel():
        problem |= _value(call)
        problem |= {"sinks": None if call.sinks is None else call.sinks.contiguous(), "out": out, "lse": lse}
        _launch(forward_kernel, "M", heads, problem)
    return out, lse


def _largest_lse(results: torch.dtype) -> float:
    """Half of what it is elsewhere (csrc/attention.h): scores in powers of 2 are rounded once more."""
    return 16.0 if results == torch.float32 else 256.0


def _find_softmax(problem: dict[str, Any], lse: Tensor, sinks: Tensor | None, limit: float) -> None:
    """Adds what the kernels behind the forward weigh by: see `rows_kernel`."""
    problem["peaks"], problem["rests"] = lse.new_empty(2, *lse.shape, dtype=torch.float32)
    if lse.numel():
        rows = {"lse": lse.contiguous(), "limit": limit, "sinks": None if sinks is None else sinks.contiguous()}
        _launch(rows_kernel, "M", lse.shape[1], problem | rows)


def attention_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, tokens, heads, dim = out.shape
    delta = out.new_empty(batch, heads, tokens, dtype=torch.float32)
    if delta.numel():
        width = max(16, triton.next_power_of_2(dim))
        block = max(1, 4096 // width)
        arguments = {"out": out, "grad_out": grad_out, "grad_lse": grad_lse, "delta": delta, "rows": delta.numel()}
        arguments |= {"out_strides": out.stride(), "grad_strides": grad_out.stride(), "tokens": tokens, "heads": heads}
        arguments |= {"lse_strides": None if grad_lse is None else grad_lse.stride()}
        arguments |= {"VALUE_DIM": dim, "BLOCK_V": width, "BLOCK_M": block}
        launch(delta_kernel, (triton.cdiv(delta.numel(), block),), arguments, out)
    return delta


def attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = ("grad_out", "q", "k", "v", "lse", "delta", *_TERMS, "sinks", *_MASKS, *_SCORES, *_DROPOUT, *_BLOCKS)
    call = _call(arguments, *given, "partial", "need_dbias", "need_dalibi_slopes")
    q, k, v, lse = call.q, call.k, call.v, call.lse
    problem = _problem(call) | _value(call)
    problem |= {"grad_out": call.grad_out, "grad_strides": call.grad_out.stride()}
    problem["delta"] = call.delta.contiguous()
    _find_softmax(problem, lse, call.sinks, math.inf if call.partial else _largest_lse(q.dtype))
    empty = q.new_zeros if call.cu_seqlens_q is not None else q.new_empty  # tokens of no sequence have gradient 0
    dq, dk, dv = empty(q.shape), empty(k.shape), empty(v.shape)
    rows = lse.new_empty(lse.shape, dtype=torch.float32) if call.need_dalibi_slopes else None
    if dk.numel() or dv.numel():
        _launch(keys_kernel, "N", k.shape[2], {**problem, "dk": dk, "dv": dv})
    if dq.numel():
        _launch(queries_kernel, "M", q.shape[2], {**problem, "dq": dq, "dslope_rows": rows})
    dbias, dalibi = (lse.new_empty(0, dtype=torch.float32) for _ in range(2))
    if call.bias is not None and call.need_dbias:
        dbias = _bias_gradient(call.bias, problem)
    if rows is not None and call.alibi_slopes is not None:
        dalibi = _slopes_gradient(call.alibi_slopes, rows, problem)
    return dq, dk, dv, dbias, dalibi


def _bias_gradient(bias: Tensor, problem: dict[str, Any]) -> Tensor:
    dbias = bias.new_empty(bias.shape, dtype=torch.float32)
    batches, heads, rows, columns = bias.shape

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (batches * heads * triton.cdiv(rows, chosen["BLOCK_M"]) * triton.cdiv(columns, chosen["BLOCK_N"]),)

    if dbias.numel():
        shape = {"bias_batches": batches, "bias_heads": heads, "ONE_ROW": rows == 1, "ONE_COLUMN": columns == 1}
        launch(bias_kernel, grid, {**problem, **shape, "dbias": dbias}, bias)
    return dbias


def _slopes_gradient(alibi_slopes: Tensor, rows: Tensor, problem: dict[str, Any]) -> Tensor:
    heads, sequences = problem["heads"], problem["sequences"]
    dslopes = rows.new_empty(sequences, heads)
    if dslopes.numel():
        arguments = {**problem, "dslope_rows": rows, "dslopes": dslopes, "BLOCK_M": 1024}
        launch(slopes_kernel, (sequences * heads,), arguments, rows)
    if alibi_slopes.dim() == 1:
        return dslopes.sum(0)
    return dslopes if alibi_slopes.shape[0] == sequences else dslopes.sum(0, keepdim=True)


def attention_column_sums(*arguments: Any) -> Tensor:
    call = _call(arguments, "q", "k", "lse", *_TERMS, "sinks", *_MASKS, *_SCORES, *_BLOCKS)
    q, k = call.q, call.k
    empty = torch.empty if call.cu_seqlens_k is None else torch.zeros
    sums = empty((q.shape[0], q.shape[2], k.shape[1]), dtype=torch.float32, device=q.device)
    if sums.numel():
        problem = _problem(call) | {"sums": sums}
        _find_softmax(problem, call.lse, call.sinks, _largest_lse(torch.float32))
        _launch(columns_kernel, "N", q.shape[2], problem)
    return sums


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    parts, batch, tokens, heads, dim = outs.shape
    out = outs.new_empty(batch, tokens, heads, dim)
    lse = lses.new_empty(batch, heads, tokens, dtype=torch.float32)
    rows = batch * tokens * heads
    if rows:
        width = max(16, triton.next_power_of_2(dim))
        block = max(1, 4096 // width)
        arguments = {"outs": outs, "lses": lses, "out": out, "lse": lse, "parts": parts, "rows": rows}
        arguments |= {"outs_strides": outs.stride(), "lses_strides": lses.stride(), "tokens": tokens, "heads": heads}
        arguments |= {"VALUE_DIM": dim, "BLOCK_V": width, "BLOCK_M": block}
        launch(merge_kernel, (triton.cdiv(rows, block),), arguments, outs)
    return out, lse


def _refusal(*tensors: Tensor) -> str | None:
    """What the kernels do not do, from the tensors with a head dimension."""
    if reason := refusal(tensors[0]):
        return reason
    width = max(tensor.shape[-1] for tensor in tensors)
    if width > 512:
        return f"head_dim {width}: up to 512"
    tokens = sum(tensor.shape[1] for tensor in tensors)
    return f"{tokens} tokens: fewer than 2**30, positions are int32" if tokens >= 2**30 else None


REFUSES = {
    "attention": lambda q, k, v, *rest: _refusal(q, v),
    "attention_delta": lambda out, *rest: _refusal(out),
    "attention_backward": lambda grad_out, q, k, v, *rest: _refusal(q, v),
    "attention_column_sums": lambda q, k, *rest: _refusal(q, k),
    "merge_attention_states": lambda outs, lses: _refusal(outs),
}
