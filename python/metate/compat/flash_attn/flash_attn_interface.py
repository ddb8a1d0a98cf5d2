"""The attention functions of flash-attn 2 over `metate.attention`: its argument order, defaults and results."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from metate.compat.flash_attn import extension as flash_attn_gpu
from metate.compat.flash_attn.passes import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from metate.compat.flash_attn.semantics import (
    attend,
    attend_packed,
    attend_pages,
    attention_options,
    cache_options,
    flash_lse,
    window_sides,
)
from metate.explanation import explain
from metate.ops.attention import attention, attention_varlen
from metate.ops.paged_attention import append_kv, paged_attention
from metate.ops.paged_attention.rules import check_attention, least_and_most

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

USE_TRITON_ROCM = False


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, heads, head_dim) over k, v (batch, seqlen_k, kv_heads, head_dim).

    Args:
        dropout_p: probability of dropping an attention weight.
        softmax_scale: factor of q kᵀ; default head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right), keys before and after the diagonal, inclusive; -1: no limit.
        softcap: > 0: scores become softcap · tanh(score / softcap).
        alibi_slopes: (heads) or (batch, heads); adds -slope · |i + seqlen_k - seqlen_q - j|.
        deterministic: the backward gives the same bits every time.
        return_attn_probs: also return softmax_lse (batch, heads, seqlen_q) and S_dmask (batch, heads, seqlen_q,
            seqlen_k): exp(score - the row's largest score), negative where dropped; empty without dropout.
    """
    options = attention_options(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attention(q, k, v, **options)
    return attend(q, k, v, options, True)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor (batch, seqlen_k, 2, kv_heads, head_dim)."""
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 2, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 2, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` over packed sequences: q (tokens_q, heads, head_dim), k and v (tokens_k, kv_heads, head_dim).

    cu_seqlens_q and cu_seqlens_k (batch + 1) int32 say where sequences start. max_seqlen_q and max_seqlen_k are the
    last sizes of S_dmask (batch, heads, max_seqlen_q, max_seqlen_k); softmax_lse is (heads, tokens_q). With block_table
    (batch, pages of a sequence) int32, k and v are pages (pages, page_size, kv_heads, head_dim) of any size, without
    dropout and gradient.
    """
    if block_table is not None:
        if dropout_p:
            raise NotImplementedError(
                f"flash_attn_varlen_func: dropout_p is {dropout_p}, expected 0 beside block_table"
            )
        options = cache_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
        out, lse = attend_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, block_table, None, options)
        return (out, lse, q.new_empty(0)) if return_attn_probs else out
    options = attention_options(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if not return_attn_probs:
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, True)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor (tokens_k, 2, kv_heads, head_dim)."""
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor (tokens, 3, heads, head_dim)."""
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache of keys and values, after new ones are written into it; no gradient.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (cache entries, seqlen_cache, kv_heads, head_dim); with block_table pages of any size, (pages,
            page_size, kv_heads, head_dim).
        k, v: (batch, seqlen_new, kv_heads, head_dim), written in place from position cache_seqlens on.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2); turn k, and q with it, before the attention.
        cache_seqlens: keys in the cache before this call, one number or (batch).
        cache_batch_idx: (batch), the cache entry of each query; default one after another. Not beside block_table.
        cache_leftpad: (batch), the first valid key of each entry.
        block_table: (batch, pages of a sequence) int32, the pages that a sequence's keys are in.
        num_splits: accepted; metate cuts the work by itself.
        Others as in `flash_attn_func`; causal, windows and ALiBi count from the last valid key.
    """
    tensors = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad,
        "block_table": block_table,
    }  # fmt: skip
    _check_tensors(tensors)
    with torch.no_grad():
        table = _pages_of(k_cache, block_table, cache_batch_idx, q.shape[0])
        lengths = _lengths_of(table.shape[1] * k_cache.shape[1] if cache_seqlens is None else cache_seqlens, q)
        if k is not None or q.device.type == "cpu":  # looking waits for a GPU; its kernels trust lengths alone
            place = "cache" if block_table is None else "pages in block_table"
            _check_room(lengths, 0 if k is None else k.shape[1], table.shape[1] * k_cache.shape[1], place)
        lengths = lengths.to(torch.int32)
        options = cache_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
        options |= {"left_pad": cache_leftpad, "return_lse": True}
        if rotary_cos is not None and rotary_sin is not None:
            local = causal or max(window_sides(window_size)) >= 0
            _check_angles(tensors, lengths, local)
            q = _rotate_queries(q, rotary_cos, rotary_sin, lengths, local, rotary_interleaved)
        if k is not None and v is not None:
            after = lengths + k.shape[1]
            _check_read(q, k_cache, v_cache, table, after, options)
            angles = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "interleaved": rotary_interleaved}
            _append(k_cache, v_cache, k, v, lengths, table, angles)
            lengths = after
        out, lse = paged_attention(q, k_cache, v_cache, table, lengths, **options)
    return (out, flash_lse(lse)) if return_softmax_lse else out


_AXES = {
    "q": "batch, seqlen_q, heads, head_dim",
    "k_cache": "entries or pages, positions, kv_heads, head_dim",
    "v_cache": "entries or pages, positions, kv_heads, head_dim",
    "k": "batch, seqlen_new, kv_heads, head_dim",
    "v": "batch, seqlen_new, kv_heads, head_dim",
    "rotary_cos": "positions, rotary_dim / 2",
    "rotary_sin": "positions, rotary_dim / 2",
    "cache_batch_idx": "batch",
    "cache_leftpad": "batch",
    "block_table": "batch, pages of a sequence",
}
_WHOLE = ("cache_batch_idx", "cache_leftpad", "block_table")


def _check_tensors(tensors: dict[str, Any]) -> None:
    """What flash_attn_with_kvcache is given: here the caller's names are known, and nothing is written yet."""
    for name, other in (("k", "v"), ("v", "k"), ("rotary_cos", "rotary_sin"), ("rotary_sin", "rotary_cos")):
        if tensors[name] is None and tensors[other] is not None:
            raise ValueError(f"flash_attn_with_kvcache: {name} is None, expected a tensor beside {other}")
    if tensors["k"] is None and tensors["rotary_cos"] is not None:
        raise ValueError("flash_attn_with_kvcache: k is None, expected new keys beside rotary_cos and rotary_sin")
    q = tensors["q"]
    for name, axes in _AXES.items():
        x = tensors[name]
        if x is None and name not in ("q", "k_cache", "v_cache"):
            continue
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            got = x.layout if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"flash_attn_with_kvcache: {name} is {got}, expected a dense torch.Tensor ({axes})")
        if name in _WHOLE and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"flash_attn_with_kvcache: {name} is {x.dtype}, expected torch.int32")
        if x.dim() != axes.count(",") + 1 or (axes.startswith("batch") and x.shape[0] != q.shape[0]):
            batch = f" with batch = {q.shape[0]}" if name != "q" and axes.startswith("batch") else ""
            raise ValueError(f"flash_attn_with_kvcache: {name} is of shape {tuple(x.shape)}, expected ({axes}){batch}")
        if name == "q" and x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"flash_attn_with_kvcache: q is {x.dtype}, expected bfloat16, float16, float32 or float64")
        if x.device != q.device:
            raise ValueError(f"flash_attn_with_kvcache: {name} is on {x.device}, expected {q.device} like q")


def _lengths_of(given: Any, q: Tensor) -> Tensor:
    """(batch) whole numbers, from one or as many."""
    lengths: Tensor | None = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        lengths = torch.as_tensor(given, device=q.device)
    if lengths is None or lengths.layout != torch.strided or lengths.dtype not in (torch.int32, torch.int64):
        kind = given.dtype if isinstance(given, Tensor) else repr(given)[:60]
        raise TypeError(f"flash_attn_with_kvcache: cache_seqlens is {kind}, expected an integer or (batch) int32")
    if lengths.dim() and lengths.shape != q.shape[:1]:
        got, expected = tuple(lengths.shape), tuple(q.shape[:1])
        raise ValueError(f"flash_attn_with_kvcache: cache_seqlens is of shape {got}, expected one number or {expected}")
    return lengths.expand(q.shape[0])


def _check_angles(tensors: dict[str, Any], lengths: Tensor, local: bool) -> None:
    """That they are there for every position that is turned, and no wider than the heads."""
    q, k, cos, sin = (tensors[name] for name in ("q", "k", "rotary_cos", "rotary_sin"))
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        got = f"{sin.dtype} of shape {tuple(sin.shape)}"
        expected = f"{cos.dtype} of shape {tuple(cos.shape)} like rotary_cos"
        raise ValueError(f"flash_attn_with_kvcache: rotary_sin is {got}, expected {expected}")
    if cos.dtype not in (q.dtype, torch.float32) or 2 * cos.shape[1] > q.shape[3]:
        got = f"{cos.dtype} of shape {tuple(cos.shape)}"
        expected = f"{q.dtype} or float32, of at most {q.shape[3]} / 2 columns"
        raise ValueError(f"flash_attn_with_kvcache: rotary_cos is {got}, expected {expected}")
    end = max(k.shape[1], q.shape[1] if local else 1) + (int(lengths.max()) if lengths.numel() else 0)
    if end > cos.shape[0]:
        raise ValueError(
            f"flash_attn_with_kvcache: rotary_cos is of {cos.shape[0]} positions, expected at least {end}: "
            "cache_seqlens and the new tokens"
        )


def _parts(function: str, name: str, packed: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    """q, k and v, or k and v, of one tensor."""
    if not isinstance(packed, Tensor) or packed.dim() != dim + 3 or packed.shape[dim] != count:
        got = f"of shape {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        before = "batch, seqlen" if dim == 2 else "tokens"
        raise ValueError(f"{function}: {name} is {got}, expected ({before}, {count}, heads, head_dim)")
    return packed.unbind(dim)


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many columns of S_dmask share a running maximum: whole rows."""
    return 2**30


def _pages_of(k_cache: Tensor, block_table: Tensor | None, entries: Tensor | None, batch: int) -> Tensor:
    """(batch, pages of a sequence) int32: a contiguous cache is one with a page an entry."""
    if block_table is not None:
        if entries is not None:
            raise ValueError("flash_attn_with_kvcache: cache_batch_idx is given, expected None beside block_table")
        return block_table
    if entries is None:
        entries = torch.arange(batch, device=k_cache.device)
    return entries.to(torch.int32)[:, None]


def _rotate_queries(q: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, local: bool, interleaved: bool) -> Tensor:
    """q turned from the position of the first new key on; at that position alone where all queries see the same."""
    from metate.compat.flash_attn.layers.rotary import apply_rotary_emb

    x = q if local else q.flatten(1, 2)[:, None]
    turned: Tensor = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=lengths)
    return turned.view(q.shape)


class _NoRoom(ValueError, RuntimeError):
    """A ValueError as everywhere in metate, and flash-attn's RuntimeError for callers that catch that."""


def _check_room(lengths: Tensor, new: int, room: int, place: str) -> None:
    first, last = least_and_most(lengths) if lengths.numel() else (0, 0)
    if first < 0:
        raise ValueError(f"flash_attn_with_kvcache: cache_seqlens is {first}, expected at least 0")
    if (end := new + last) > room:
        raise _NoRoom(
            f"flash_attn_with_kvcache: cache_seqlens + {new} new keys reach {end}, expected at most the {room} "
            f"positions of the {place}"
        )


_found_right: set[Any] = set()  # all but the contents of reads


def _check_read(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, options: dict[str, Any]
) -> None:
    """Raises what is wrong with a read, before anything is written: all of it in the first of those that are alike."""
    given = (q, k_cache, v_cache, table, lengths, *options.values())
    alike = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in given)
    if alike in _found_right:
        check_attention(q, k_cache, v_cache, table, lengths, None, None, None, options["left_pad"], *[None] * 4)
        return
    explain(paged_attention, q, k_cache, v_cache, table, lengths, **options)
    if len(_found_right) == 1000:
        _found_right.clear()
    _found_right.add(alike)


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, angles: dict[str, Any]
) -> None:
    """Writes k, turned, and v behind what the cache holds."""
    page_size = k_cache.shape[1]
    positions = lengths[:, None]
    if k.shape[1] > 1:
        positions = positions + torch.arange(k.shape[1], device=k.device, dtype=torch.int32)
    slots = table.gather(1, (positions // page_size).long()).long() * page_size + positions % page_size
    if angles["rotary_cos"] is not None:
        angles = {name: a.float() if isinstance(a, Tensor) else a for name, a in angles.items()}
        angles["positions"] = positions.flatten()
    else:
        angles = {}
    append_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten(), **angles)
