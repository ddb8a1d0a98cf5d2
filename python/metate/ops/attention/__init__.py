"""Exact attention, dense and packed, forward and backward (Dao et al. 2022, 2023: FlashAttention 1 and 2).

`csrc/attention.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metate.axes import Axes
from metate.errors import fail, require_dense
from metate.masks import AttentionMask, window_sides
from metate.ops.attention.declaration import attention_op, column_sums_op, merge_op
from metate.scalars import plain
from metate.shortcut import Shortcut

__all__ = ["attention", "attention_varlen", "merge_attention_states"]

_attend_packed = Shortcut("attention")
_attend_and_sum = Shortcut("attention_and_column_sums", operators=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: AttentionMask | Tensor | None = None,
    top_left: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
    return_column_sums: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(mask(scale · q kᵀ) + bias) v, exact, in memory linear in the sequence lengths.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float32, bfloat16, float16 (float64 on a CPU), any strides.
        k: (batch, seqlen_k, kv_heads, head_dim), dtype of q; heads must be a multiple of kv_heads (GQA, MQA).
        v: (batch, seqlen_k, kv_heads, value_dim). head_dim and value_dim: 1 to 512.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (bottom-right, as in FlashAttention ≥ 2.1).
        window: (left, right), how many keys before and after its diagonal a query sees, inclusive; -1: no limit.
        scale: factor of q kᵀ; default head_dim ** -0.5.
        softcap: > 0: scores become softcap · tanh(score / softcap), before masks and bias.
        alibi_slopes: (heads) or (batch, heads), float32; adds -slope · |i + seqlen_k - seqlen_q - j|
            (Press et al. 2022).
        bias: broadcastable to (batch, heads, seqlen_q, seqlen_k), float32 or the dtype of q; added to the scores.
        sinks: (heads), one more logit in each softmax denominator (GPT-OSS).
        mask: an AttentionMask (document, tree, block-sparse), or a bool tensor broadcastable to
            (batch, heads, seqlen_q, seqlen_k), True where a query may see a key.
        top_left: measure causal, window and ALiBi from the diagonal j = i instead of the bottom-right one.
        dropout_p: probability in [0, 1) of dropping an attention weight; reproducible from (seed, offset) everywhere.
        seed: of the dropout, -2**63 to 2**64 - 1, as torch's generators take it (64 bits count); None draws one from
            torch's default generator.
        return_lse: also return log Σ exp(score), natural logarithm, sinks included: (batch, heads, seqlen_q), float32.
        return_column_sums: also return Σ_i probability[i, j] before dropout, without gradient:
            (batch, heads, seqlen_k), float32.
        deterministic: the backward too gives the same bits on every run. All present backends always do.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        out (batch, seqlen_q, heads, value_dim), then lse and the column sums where asked for. A query without a key
        gives 0, lse -inf and no gradient. Gradients reach q, k, v, bias, alibi_slopes, sinks, also through lse.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    mask = _NO_MASK if mask is None else _mask(mask, q, k)
    if bias is not None or alibi_slopes is not None or sinks is not None:
        bias, alibi_slopes, sinks = _widen(q, bias, alibi_slopes, sinks)
        if isinstance(bias, Tensor) and bias.dim() < 4:
            bias = bias[(None,) * (4 - bias.dim())]
    tensors = (q, k, v, bias, alibi_slopes, sinks, mask.intervals, mask.blocks, mask.bits, None, None)
    flags = _flags(q, causal, window, scale, top_left, softcap, dropout_p, seed, offset, mask.block_size)
    args = tensors + flags
    if not return_column_sums:
        return attention_op.call(args, not return_lse, backend)
    out, lse, sums = _attend_and_sum(args, _one_by_one, (args, backend), backend)
    return (out, lse, sums) if return_lse else (out, sums)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: AttentionMask | None = None,
    top_left: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
    return_column_sums: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` over sequences of different lengths packed one after another, without padding.

    Args:
        q: (tokens_q, heads, head_dim); k: (tokens_k, kv_heads, head_dim); v: (tokens_k, kv_heads, value_dim).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1) int32 on the device of q: where each sequence starts,
            non-decreasing, the last at most the number of tokens. They stay there; no length reaches the host.
        mask: an AttentionMask of intervals (1, heads or 1, tokens_q, 2), key positions counted within the sequence.
        Others as in `attention`; alibi_slopes (heads) or (sequences, heads).

    Returns:
        out (tokens_q, heads, value_dim), then lse (heads, tokens_q) and column sums (heads, tokens_k) where asked for.
        Tokens outside every sequence give 0 and lse -inf. Gradients as of `attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected. Lengths that
            decrease or lead beyond the tokens are refused on a CPU; elsewhere looking would wait for the device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_dense("attention_varlen", name, tensor)
        if tensor.dim() != 3:
            raise fail("attention_varlen", name, f"of shape {tuple(tensor.shape)}", "(tokens, heads, head_dim)")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require_dense("attention_varlen", name, starts, "an int32 torch.Tensor")
    mask = _NO_MASK if mask is None else mask
    if not isinstance(mask, AttentionMask):
        raise fail("attention_varlen", "mask", type(mask).__name__, "an AttentionMask of intervals", error=TypeError)
    if alibi_slopes is not None or sinks is not None:
        _, alibi_slopes, sinks = _widen(q, None, alibi_slopes, sinks)
    flags = _flags(q, causal, window, scale, top_left, softcap, dropout_p, seed, offset, mask.block_size)
    rest = None, alibi_slopes, sinks, mask.intervals, mask.blocks, mask.bits, cu_seqlens_q, cu_seqlens_k, *flags
    args, first_only = (q, k, v, *rest), not (return_lse or return_column_sums)
    if not return_column_sums:
        return _attend_packed(args, _packed, (args, False, first_only, backend), backend, first_only)
    out, lse, sums = _attend_and_sum(args, _packed, (args, True, False, backend), backend)
    return (out, lse, sums) if return_lse else (out, sums)


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One attention result from n over disjoint sets of keys: lse = log Σ exp lse_n, out = Σ exp(lse_n - lse) out_n.

    Args:
        outs: (n, batch, seqlen, heads, value_dim), float32, bfloat16, float16 (float64 on a CPU), any strides.
        lses: (n, batch, heads, seqlen), float32, natural logarithm.

    Returns:
        out (batch, seqlen, heads, value_dim) and lse (batch, heads, seqlen); where every lse is -inf: 0 and -inf.
        Differentiable in both. Source: FlashInfer (Ye et al. 2025), section 2.2; FlashDecoding (2023).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    result: tuple[Tensor, Tensor] = merge_op.call((outs, lses))
    return result


def _packed(args: tuple[Any, ...], sums: bool, first_only: bool, backend: str | None) -> Any:
    """The sequences of a batch of one; what is wrong is told of the tensors as they came."""
    batch = *(x.unsqueeze(0) for x in args[:3]), *args[3:]
    try:
        if first_only:
            return attention_op.call(batch, True, backend).squeeze(0)
        found = _one_by_one(batch, backend) if sums else attention_op.call(batch, False, backend)
    except (TypeError, ValueError, NotImplementedError) as error:
        prefix, own, text = str(error).partition("metate.attention:")
        if prefix or not own:
            raise
        _PACKED.check(dict(zip(attention_op.parameters, args, strict=False)))
        raise type(error)(f"metate.attention_varlen:{text}") from None
    return tuple(x.squeeze(0) for x in found)


_PACKED = Axes(
    "attention_varlen",
    {
        "q": "tokens_q heads head_dim",
        "k": "tokens_k kv_heads head_dim",
        "v": "tokens_k kv_heads value_dim",
        "cu_seqlens_q": "sequences+1",
        "cu_seqlens_k": "sequences+1",
    },
)


def _one_by_one(args: tuple[Any, ...], backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and column sums."""
    out, lse = attention_op.call(args, backend=backend)
    q, k, _, *terms, _, _, _, block_m, block_n = args
    given = q, k, lse, *terms, block_m, block_n
    return out, lse, column_sums_op.call(given, backend=backend)


def _mask(mask: AttentionMask | Tensor, q: Tensor, k: Tensor) -> AttentionMask:
    if isinstance(mask, AttentionMask):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise fail(
            "attention", "mask", got, "a bool tensor or an AttentionMask; give additive masks as bias", error=TypeError
        )
    if not all(isinstance(x, Tensor) and x.dim() == 4 and not x.is_nested for x in (q, k)):
        return _NO_MASK  # the operator says what is wrong
    rows, columns = q.shape[1], k.shape[1]
    height, width = (1, 1, *mask.shape)[-2:]
    if mask.dim() > 4 or height not in (1, rows) or width not in (1, columns):  # bits would not show all of it
        full = (*q.shape[0:3:2], rows, columns)
        raise fail("attention", "mask", f"of shape {tuple(mask.shape)}", f"broadcastable to {full}")
    bits = AttentionMask.dense(mask, columns).bits
    return AttentionMask(bits=None if bits is None else bits.expand(-1, -1, rows, -1))


_NO_MASK = AttentionMask()


def _widen(q: Tensor, bias: Tensor | None, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Bias in a dtype that kernels read, slopes and sinks in that of the softmax."""
    dtype = q.dtype if isinstance(q, Tensor) else torch.float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        raise fail("attention", "bias", "bool", "numbers, which are added; give truth values as mask", error=TypeError)
    if isinstance(bias, Tensor) and bias.is_floating_point() and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(wide)
    return (bias, *(x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in vectors))


def _flags(
    q: Tensor, causal: bool, window: tuple[int, int], scale: float | None, top_left: bool, softcap: float,
    dropout_p: float, seed: int | None, offset: int, block_size: tuple[int, int],
) -> tuple[Any, ...]:  # fmt: skip
    """The scalar arguments of the operators, in order."""
    left, right = window_sides("attention", window, causal)
    if scale is None:
        try:
            scale = q.shape[-1] ** -0.5
        except (AttributeError, RuntimeError):
            require_dense("attention", "q", q)
            raise
        except (IndexError, ZeroDivisionError):
            scale = 1.0  # the operator says what is wrong
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu").item()) if dropout_p else 0
    elif isinstance(seed := plain(seed), int) and 2**63 <= seed < 2**64:
        seed -= 2**64  # the same 64 bits, as operators take them
    return scale, left, right, top_left, softcap, dropout_p, seed, offset, *block_size
