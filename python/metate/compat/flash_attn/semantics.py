"""What flash-attn's arguments and results mean in metate's terms.

softmax_lse is +inf where a query sees no key, and S_dmask (what `return_attn_probs` shows beside dropout) is
exp(score - the row's largest score), negative where dropped.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metate.ops.attention import attention, attention_varlen
from metate.ops.paged_attention import paged_attention
from metate.philox import keep_mask
from metate.scalars import plain

__all__ = ["attend", "attend_packed", "attend_pages", "attention_options", "cache_options", "flash_lse", "window_sides"]


def window_sides(window: Any) -> tuple[int, int]:
    try:
        left, right = (operator.index(side) for side in window)
    except (TypeError, ValueError):
        raise TypeError(f"flash_attn: window_size is {window!r}, expected two integers (left, right)") from None
    return left, right


def _softcap(given: Any) -> float:
    """flash-attn takes any number that is not above 0 for none."""
    given = plain(given)
    if not isinstance(given, (int, float)):
        raise TypeError(f"flash_attn: softcap is {given!r}, expected a number")
    return 0.0 if given <= 0 else given


def _longest(name: str, given: Any, starts: list[int]) -> int:
    """max_seqlen as the caller gives it."""
    longest = max((end - start for start, end in pairwise(starts)), default=0)
    try:
        size = operator.index(given)
    except TypeError:
        raise TypeError(f"flash_attn: {name} is {given!r}, expected an integer") from None
    if size < longest:
        raise ValueError(f"flash_attn: {name} is {size}, expected at least {longest}, the longest sequence")
    return size


def attention_options(
    q: Tensor, dropout_p: float, scale: float | None, causal: bool, window: Any, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool,
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of metate.attention. The seed is drawn here, so that S_dmask can tell what it dropped."""
    return {
        "dropout_p": dropout_p,
        "scale": q.shape[-1] ** -0.5 if scale is None and isinstance(q, Tensor) and q.dim() and q.shape[-1] else scale,
        "causal": causal,
        "window": window_sides(window),
        "softcap": _softcap(softcap),
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "seed": int(torch.randint(2**62, (), device="cpu").item()) if dropout_p else 0,
    }


def cache_options(
    scale: float | None, causal: bool, window: Any, softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """Keyword arguments of metate.paged_attention."""
    return {
        "scale": scale, "causal": causal, "window": window_sides(window), "softcap": _softcap(softcap),
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip


def flash_lse(lse: Tensor) -> Tensor:
    """flash-attn marks a query without a key by +inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_softmax: bool) -> tuple[Tensor, ...]:
    """(out, softmax_lse, S_dmask), the last empty where not asked for or nothing is dropped."""
    out, lse = attention(q, k, v, return_lse=True, **options)
    if not (return_softmax and options["dropout_p"]):
        return out, flash_lse(lse), q.new_empty(0)
    rows = [_dmask(b, q[b], k[b], options) for b in range(q.shape[0])]
    dmask = torch.stack(rows) if rows else q.new_empty(0, q.shape[2], q.shape[1], k.shape[1])
    return out, flash_lse(lse), dmask


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    options: dict[str, Any], return_softmax: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`attend` over packed sequences; S_dmask is (batch, heads, max_seqlen_q, max_seqlen_k)."""
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options)
    if not (return_softmax and options["dropout_p"]):
        return out, flash_lse(lse), q.new_empty(0)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows, columns = _longest("max_seqlen_q", max_seqlen_q, starts_q), _longest("max_seqlen_k", max_seqlen_k, starts_k)
    padded = q.new_zeros(len(starts_q) - 1, q.shape[1], rows, columns)
    for b in range(padded.shape[0]):
        q_b, k_b = q[starts_q[b] : starts_q[b + 1]], k[starts_k[b] : starts_k[b + 1]]
        padded[b, :, : q_b.shape[0], : k_b.shape[0]] = _dmask(b, q_b, k_b, options)
    return out, flash_lse(lse), padded


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_k: int,
    block_table: Tensor | None, lengths: Tensor | None, options: dict[str, Any], left_pad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, softmax_lse) of packed queries over pages, or over sequences of k of which only `lengths` are in use."""
    if block_table is None or lengths is None:
        if cu_seqlens_k is None:
            raise ValueError("flash_attn: cu_seqlens_k is None, expected it where block_table or seqused_k is None")
        if not isinstance(cu_seqlens_k, Tensor) or cu_seqlens_k.dim() != 1 or cu_seqlens_k.dtype != torch.int32:
            raise TypeError("flash_attn: cu_seqlens_k is no int32 torch.Tensor of one dimension")
        lengths = cu_seqlens_k.diff() if lengths is None else lengths
        if block_table is None:  # every key a page
            block_table = cu_seqlens_k[:-1, None] + torch.arange(int(max_seqlen_k), dtype=torch.int32, device=k.device)
            k, v = k[:, None], v[:, None]
    with torch.no_grad():
        out, lse = paged_attention(
            q, k, v, block_table, lengths, cu_seqlens_q=cu_seqlens_q, left_pad=left_pad, return_lse=True, **options
        )
    return out, flash_lse(lse)


def _dmask(entry: int, q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """(heads, seqlen_q, seqlen_k) of one batch entry."""
    (seqlen_q, heads, _), seqlen_k = q.shape, k.shape[0]
    with torch.no_grad():
        keys = k.transpose(0, 1).float().repeat_interleave(heads // k.shape[1], 0)
        s = (q.transpose(0, 1).float() * options["scale"]) @ keys.transpose(1, 2)
        if cap := options["softcap"]:
            s = cap * torch.tanh(s / cap)
        rows, columns = torch.arange(seqlen_q, device=q.device)[:, None], torch.arange(seqlen_k, device=q.device)
        distance = columns - rows - (seqlen_k - seqlen_q)
        if (slopes := options["alibi_slopes"]) is not None:
            s = s - (slopes if slopes.dim() == 1 else slopes[entry]).float()[:, None, None] * distance.abs()
        left, right = options["window"]
        right = 0 if options["causal"] else right
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance < -left
        if right >= 0:
            hidden |= distance > right
        s = s.masked_fill(hidden, -torch.inf)
        top = s.amax(-1, keepdim=True) if seqlen_k else s.new_zeros(heads, seqlen_q, 1)
        s = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
        stream = torch.arange(heads, device=q.device)[:, None, None] + entry * heads
        kept = keep_mask(options["dropout_p"], options["seed"], 0, stream, rows, columns)
        return torch.where(kept, s, -s).to(q.dtype)
