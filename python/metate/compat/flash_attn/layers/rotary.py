"""Rotary position embeddings (Su et al. 2021), with the interface of flash_attn.layers.rotary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(x1, x2) → (-x2, x1), for halves of the last dimension or for its even and odd elements."""
    first, second = _pairs(x, interleaved)
    return _join(-second, first, interleaved)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (batch, seqlen, heads, head_dim) turned by cos, sin ((batch,) seqlen, rotary_dim / 2), in the dtype of x."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = (_join(t, t, interleaved).unsqueeze(-2) for t in (cos, sin))
    turned = x[..., :rotary_dim] * cos + rotate_half(x[..., :rotary_dim], interleaved) * sin
    return torch.cat([turned, x[..., rotary_dim:]], -1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns the first rotary_dim elements of every head of x by the angles of its position.

    Args:
        x: (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) with cu_seqlens.
        cos, sin: (positions, rotary_dim / 2).
        interleaved: pairs are even and odd elements (GPT-J) instead of first and second half (GPT-NeoX).
        inplace: overwrite x, also where it needs a gradient.
        seqlen_offsets: position of the first token, one for all or (batch).
        cu_seqlens: (batch + 1), where packed sequences start.
    """
    return _rotate(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens)


apply_rotary_emb_func = apply_rotary_emb  # its older name


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns q and k of qkv in place: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads, head_dim) with
    num_heads_q heads of q before those of k and v. cos_k and sin_k are the angles of k, where they differ."""
    if qkv.dim() == 4:
        if num_heads_q is None:
            raise ValueError("apply_rotary_emb_qkv_: num_heads_q is None, expected the heads of q beside a 4-d qkv")
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        parts = [(0, num_heads_q), (num_heads_q, heads_k)]
    else:
        parts = [(0, 1), (1, 1)]
    angles = [(cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)]
    return _rotate_parts(qkv, parts, angles, interleaved, seqlen_offsets)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turns k of kv (batch, seqlen, 2, heads, head_dim) in place."""
    return _rotate_parts(kv, [(0, 1)], [(cos, sin)], interleaved, seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embeddings with a growing table of angles; with scale_base those of xPos (Sun et al. 2022)."""

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (steps + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (steps / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables for positions below seqlen, computed in float32 whatever the dtype of the model."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (device, dtype)
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = positions[:, None] * frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = ((positions - seqlen // 2) / self.scale_base)[:, None]
        growth = self.scale.to(positions.device) ** power
        self._cos_cached, self._sin_cached = (cos * growth).to(dtype), (sin * growth).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / growth).to(dtype), (sin / growth).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns qkv, or q (given as qkv) and kv, in place; with a tensor of offsets, max_seqlen sizes the tables."""
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("RotaryEmbedding: max_seqlen is None, expected a number beside a tensor of offsets")
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)


class _Rotary(torch.autograd.Function):
    """One rotation; backward turns the other way. In place it returns its input unmarked: that allows leaves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool, offsets: Any, cu_seqlens: Any
    ) -> Tensor:
        cos, sin = _angles_at(x, cos, sin, offsets, cu_seqlens)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, x if inplace else torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin, ctx.interleaved, torch.empty_like(grads[0])), *[None] * 6


class _RotaryParts(torch.autograd.Function):
    """Rotations in place of parts (start, length) of the third dimension, each with its own (cos, sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Any, angles: Any, interleaved: bool, offsets: Any) -> Tensor:
        located = [t for cos, sin in angles for t in _angles_at(x, cos, sin, offsets, None)]
        ctx.parts, ctx.interleaved = parts, interleaved
        ctx.save_for_backward(*located)
        _turn_parts(x, parts, located, interleaved, 1)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = grads[0].clone()
        _turn_parts(grad, ctx.parts, ctx.saved_tensors, ctx.interleaved, -1)
        return grad, None, None, None, None


_rotate: Callable[..., Tensor] = _Rotary.apply
_rotate_parts: Callable[..., Tensor] = _RotaryParts.apply


def _angles_at(x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """cos and sin of every token of x, broadcastable to its heads."""
    tokens = torch.arange(x.shape[0 if cu_seqlens is not None else 1], device=x.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        positions = tokens - cu_seqlens[sequence] + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)
    elif isinstance(offsets, Tensor):
        positions = tokens + offsets[:, None]
    else:
        positions = tokens + offsets
    head_dims = x.dim() - (2 if cu_seqlens is not None else 3)
    return [t[positions].reshape(*positions.shape, *[1] * head_dims, t.shape[-1]) for t in (cos, sin)]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> Tensor:
    """Rotates into out (which may be x), in float32 at least."""
    rotary_dim = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = _pairs(x[..., :rotary_dim].to(wide), interleaved)
    out[..., :rotary_dim] = _join(first * cos - second * sin, first * sin + second * cos, interleaved)
    if out is not x:
        out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def _turn_parts(x: Tensor, parts: Any, angles: Any, interleaved: bool, direction: int) -> None:
    for (start, length), cos, sin in zip(parts, angles[::2], angles[1::2], strict=True):
        part = x.narrow(2, start, length)
        _turn(part, cos, direction * sin, interleaved, part)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    return torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
