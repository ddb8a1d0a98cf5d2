"""Exact attention, dense and packed, forward and backward (Dao et al. 2022, 2023: FlashAttention 1 and 2).

`csrc/attention.h` states the semantics that every backend shares; the references here are those semantics in plain torch.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.masks import AttentionMask
from metate.op import Case, Domain, Op, use
from metate.philox import keep_mask

MAX_HEAD_DIM = 512

# Parameters that follow the tensors of every operator below, with the value that switches each off.
#   scale, window_left, window_right, top_left, softcap, dropout_p, seed, offset, block_m, block_n


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
        alibi_slopes: (heads) or (batch, heads), float32; adds -slope · |i + seqlen_k - seqlen_q - j| (Press et al. 2022).
        bias: broadcastable to (batch, heads, seqlen_q, seqlen_k), float32 or the dtype of q; added to the scores.
        sinks: (heads), one more logit in each softmax denominator (GPT-OSS).
        mask: an AttentionMask (document, tree, block-sparse), or a bool tensor broadcastable to
            (batch, heads, seqlen_q, seqlen_k), True where a query may see a key.
        top_left: measure causal, window and ALiBi from the diagonal j = i instead of the bottom-right one.
        dropout_p: probability in [0, 1) of dropping an attention weight; reproducible from (seed, offset) everywhere.
        seed: 64-bit seed of the dropout; None draws one from torch's default generator.
        return_lse: also return log Σ exp(score), natural logarithm, sinks included: (batch, heads, seqlen_q), float32.
        return_column_sums: also return Σ_i probability[i, j] before dropout: (batch, heads, seqlen_k), float32, no gradient.
        deterministic: the backward too gives the same bits on every run. All present backends always do.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        out (batch, seqlen_q, heads, value_dim), then lse and the column sums where asked for. A query without a key
        gives 0, lse -inf and no gradient. Gradients reach q, k, v, bias, alibi_slopes, sinks, also through lse.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    mask = _mask(mask, q, k)
    tensors = (q, k, v, bias, alibi_slopes, sinks, mask.intervals, mask.blocks, mask.bits, None, None)
    flags = _flags(q, causal, window, scale, top_left, softcap, dropout_p, seed, offset, mask.block_size)
    return _call(tensors, flags, return_lse, return_column_sums, backend)


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
        cu_seqlens_q, cu_seqlens_k: (sequences + 1) int32 on the device of q: where each sequence starts, non-decreasing,
            the last at most the number of tokens. They stay on the device; no length reaches the host.
        mask: an AttentionMask of intervals (1, heads or 1, tokens_q, 2), key positions counted within the sequence.
        Others as in `attention`; alibi_slopes (heads).

    Returns:
        out (tokens_q, heads, value_dim), then lse (heads, tokens_q) and column sums (heads, tokens_k) where asked for.
        Tokens outside every sequence give 0 and lse -inf.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise fail("attention_varlen", name, type(tensor).__name__, "a torch.Tensor", error=TypeError)
        if tensor.dim() != 3:
            raise fail("attention_varlen", name, f"shape {tuple(tensor.shape)}", "3 dimensions (tokens, heads, head_dim)")
    mask = mask or AttentionMask()
    tensors = (
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0),
        None, alibi_slopes, sinks, mask.intervals, mask.blocks, mask.bits, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    flags = _flags(q, causal, window, scale, top_left, softcap, dropout_p, seed, offset, mask.block_size)
    results = _call(tensors, flags, return_lse, return_column_sums, backend)
    return tuple(r.squeeze(0) for r in results) if isinstance(results, tuple) else results.squeeze(0)


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One attention result from n over disjoint sets of keys: lse = log Σ exp lse_n, out = Σ exp(lse_n - lse) out_n.

    Args:
        outs: (n, batch, seqlen, heads, value_dim); lses: (n, batch, heads, seqlen), float32, natural logarithm.

    Returns:
        out (batch, seqlen, heads, value_dim) and lse (batch, heads, seqlen); where every lse is -inf: 0 and -inf.
        Differentiable in both. Source: FlashInfer (Ye et al. 2025), section 2.2; FlashDecoding (2023).
    """
    result: tuple[Tensor, Tensor] = merge_op(outs, lses)
    return result


def _call(tensors: tuple[Any, ...], flags: tuple[Any, ...], lse: bool, sums: bool, backend: str | None) -> Any:
    if backend is not None:
        with use(backend):
            return _call(tensors, flags, lse, sums, None)
    out, log_sum = op(*tensors, *flags)
    if not (lse or sums):
        return out
    results = [out, log_sum] if lse else [out]
    if sums:
        q, k, _, bias, slopes, _, *masks = tensors
        scale, left, right, top_left, softcap, _, _, _, *block_size = flags
        results.append(column_sums_op(q, k, log_sum.detach(), bias, slopes, *masks, scale, left, right, top_left, softcap, *block_size))
    return tuple(results)


def _mask(mask: AttentionMask | Tensor | None, q: Tensor, k: Tensor) -> AttentionMask:
    if mask is None:
        return _NO_MASK
    if isinstance(mask, AttentionMask):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise fail("attention", "mask", got, "a bool tensor or an AttentionMask; give additive masks as bias", error=TypeError)
    return AttentionMask.dense(mask, k.shape[1])


_NO_MASK = AttentionMask()


def _flags(
    q: Tensor, causal: bool, window: tuple[int, int], scale: float | None, top_left: bool, softcap: float,
    dropout_p: float, seed: int | None, offset: int, block_size: tuple[int, int],
) -> tuple[Any, ...]:  # fmt: skip
    """The scalar arguments of the operators, in order."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"metate.attention: window is {window!r}, expected two integers (left, right); -1 means no limit") from None
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if scale is None:
        scale = _default_scale(q)
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if dropout_p else 0
    return float(scale), left, right, top_left, float(softcap), float(dropout_p), seed, offset, *block_size


def _default_scale(q: Tensor) -> float:
    if not isinstance(q, Tensor):
        raise fail("attention", "q", type(q).__name__, "a torch.Tensor", error=TypeError)
    return q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0


# References.


def _positions(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, top_left: bool) -> tuple[Tensor, ...]:
    """Of every query its batch entry and position, of every key its position, the diagonal, and who shares a sequence."""
    rows, columns = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    if cu_q is None or cu_k is None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None].expand(q.shape[0], q.shape[1])
        diagonal = torch.zeros_like(rows) if top_left else (k.shape[1] - q.shape[1]) + torch.zeros_like(rows)
        together = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        return batch, rows, columns, diagonal[:, None], together
    cu_q, cu_k = cu_q.long(), cu_k.long()
    sequence_q = torch.searchsorted(cu_q, rows, right=True) - 1
    sequence_k = torch.searchsorted(cu_k, columns, right=True) - 1
    last = cu_q.shape[0] - 2
    inside_q, inside_k = (sequence_q >= 0) & (sequence_q <= last), (sequence_k >= 0) & (sequence_k <= last)
    at_q, at_k = sequence_q.clamp(0, max(last, 0)), sequence_k.clamp(0, max(last, 0))
    if last >= 0:
        lengths = (cu_k[1:] - cu_k[:-1]) - (cu_q[1:] - cu_q[:-1])
        diagonal = torch.zeros_like(rows) if top_left else lengths[at_q]
        rows, columns = rows - cu_q[at_q], columns - cu_k[at_k]
    else:
        diagonal = torch.zeros_like(rows)
    together = inside_q[:, None] & inside_k & (at_q[:, None] == at_k)
    return at_q[None], rows, columns, diagonal[:, None], together[None, None]


class _Scores:
    """What forward, backward and column sums share: scores, who may see whom, and the dropout factors."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, intervals: Tensor | None,
        blocks: Tensor | None, bits: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, scale: float, left: int,
        right: int, top_left: bool, softcap: float, block_m: int, block_n: int,
    ) -> None:  # fmt: skip
        self.group = q.shape[2] // max(k.shape[2], 1)
        self.scale, self.softcap = scale, softcap
        self.batch, rows, columns, diagonal, allowed = _positions(q, k, cu_q, cu_k, top_left)
        self.rows, self.columns = rows, columns
        self.distance = columns - rows[:, None] - diagonal  # of key j from the diagonal of row i
        if left >= 0:
            allowed = allowed & (self.distance >= -left)
        if right >= 0:
            allowed = allowed & (self.distance <= right)
        if intervals is not None:
            allowed = allowed & (columns >= intervals[..., :1]) & (columns < intervals[..., 1:])
        if blocks is not None:
            allowed = allowed & (blocks[:, :, rows // block_m][..., columns // block_n] != 0)
        if bits is not None:
            allowed = allowed & ((bits[..., columns // 32] >> (columns % 32)) & 1).bool()
        self.allowed = allowed.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        alive = self.allowed.any(-1)[..., None]  # NaN in padding must not meet a factor of 0
        self.q = q.transpose(1, 2).where(alive, 0)
        self.k = self.clean_keys(k)
        s = (self.q * scale) @ self.k.transpose(-1, -2)
        self.capped = softcap * torch.tanh(s / softcap) if softcap > 0 else s
        s = self.capped
        if bias is not None:
            s = s + bias
        if alibi_slopes is not None:
            s = s - alibi_slopes.expand(q.shape[0], q.shape[2])[..., None, None] * self.distance.abs()
        self.s = s.masked_fill(~self.allowed, -math.inf)

    def clean_keys(self, x: Tensor) -> Tensor:
        """(B, H, Sk, ·) from (B, Sk, Hkv, ·): repeated for the group, 0 where no query sees the key."""
        seen = self.allowed.any(-2)[..., None]
        return x.transpose(1, 2).repeat_interleave(self.group, 1).where(seen, 0)

    def probabilities(self, lse: Tensor) -> Tensor:
        return torch.exp(self.s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])

    def dropout(self, p: float, seed: int, offset: int) -> Tensor:
        """0 or 1 / (1 - p) for every score."""
        heads = self.s.shape[1]
        streams = self.batch[:, None] * heads + torch.arange(heads, device=self.s.device)[:, None]  # (B, H, Sq)
        keep = keep_mask(p, seed, offset, streams[..., None], self.rows[:, None], self.columns)
        return keep.to(self.s.dtype) / (1 - p)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    intervals: Tensor | None = None,
    blocks: Tensor | None = None,
    bits: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float = 1.0,
    window_left: int = -1,
    window_right: int = -1,
    top_left: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    block_m: int = 1,
    block_n: int = 1,
) -> tuple[Tensor, Tensor]:
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n)  # fmt: skip
    s = scores.s
    if sinks is not None:
        extra = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        if cu_seqlens_q is not None:  # tokens outside every sequence have no sink either
            token = torch.arange(q.shape[1], device=q.device)
            inside = (token >= cu_seqlens_q[0]) & (token < cu_seqlens_q[-1])
            extra = extra.masked_fill(~inside[:, None], -math.inf)
        s = torch.cat([s, extra], -1)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    p = scores.probabilities(lse)
    if dropout_p > 0:
        p = p * scores.dropout(dropout_p, seed, offset)
    out = p @ scores.clean_keys(v)
    return out.transpose(1, 2).contiguous(), lse


def reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    intervals: Tensor | None = None,
    blocks: Tensor | None = None,
    bits: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float = 1.0,
    window_left: int = -1,
    window_right: int = -1,
    top_left: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    block_m: int = 1,
    block_n: int = 1,
    need_dbias: bool = False,
    need_dalibi_slopes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n)  # fmt: skip
    alive = (lse != -math.inf)[..., None]
    go = grad_out.transpose(1, 2).where(alive, 0)
    p = scores.probabilities(lse)
    dp = go @ scores.clean_keys(v).transpose(-1, -2)
    kept = p
    if dropout_p > 0:
        factor = scores.dropout(dropout_p, seed, offset)
        kept, dp = p * factor, dp * factor
    ds = p * (dp - delta.masked_fill(~alive.squeeze(-1), 0.0)[..., None])
    dv = kept.transpose(-1, -2) @ go
    dbias = _sum_to(ds, bias.shape) if need_dbias and bias is not None else ds.new_empty(0)
    dalibi = ds.new_empty(0)
    if need_dalibi_slopes and alibi_slopes is not None:
        dalibi = _sum_to(-(ds * scores.distance.abs()).sum((-1, -2)), alibi_slopes.shape)
    if softcap > 0:
        ds = ds * (1 - (scores.capped / softcap) ** 2)
    dq = (ds @ scores.k) * scale
    dk = (ds.transpose(-1, -2) @ scores.q) * scale

    def heads_last(x: Tensor, heads: int) -> Tensor:
        return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2).transpose(1, 2).contiguous()

    return (dq.transpose(1, 2).contiguous(), heads_last(dk, k.shape[2]) if k.shape[2] else torch.zeros_like(k),
            heads_last(dv, v.shape[2]) if v.shape[2] else torch.zeros_like(v), dbias, dalibi)  # fmt: skip


def reference_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    intervals: Tensor | None = None,
    blocks: Tensor | None = None,
    bits: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float = 1.0,
    window_left: int = -1,
    window_right: int = -1,
    top_left: bool = False,
    softcap: float = 0.0,
    block_m: int = 1,
    block_n: int = 1,
) -> Tensor:
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n)  # fmt: skip
    return scores.probabilities(lse).sum(-2)


def reference_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(lses, 0) if lses.shape[0] else lses.new_full(lses.shape[1:], -math.inf)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0)).transpose(-1, -2)[..., None]
    return (outs.where(weights > 0, 0) * weights).sum(0), lse


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of broadcasting a tensor of `shape` to that of x."""
    return x.sum_to_size(shape) if x.shape != shape else x
