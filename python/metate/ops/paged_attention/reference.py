"""The semantics of csrc/paged_attention.h in plain torch: schema, truth, error budget and fallback of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = {torch.int8: 127.0, torch.uint8: 7.0, torch.float8_e4m3fn: 448.0}  # of a quantised cache: amax is this many


def decode(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that a cache stands for."""
    if cache.dtype == torch.uint8:
        cache = (torch.stack([cache & 15, cache >> 4], -1).to(torch.int8) - 8).flatten(-2)
    values = cache.to(dtype)
    return values if scale is None else values * scale.to(dtype)[..., None]


def quantise(x: Tensor, dtype: torch.dtype, scaled: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of heads (…, D), in float32 whatever x is: every kernel computes the same bits."""
    x = x.float()
    scale = x.new_ones(x.shape[:-1])
    if scaled:
        scale = x.abs().amax(-1) / STEPS[dtype] if x.shape[-1] else torch.zeros_like(scale)
    y = torch.where(scale[..., None] != 0, x / scale[..., None], 0)
    if dtype == torch.float8_e4m3fn:
        return y.clamp(-448, 448).to(dtype), scale
    if dtype == torch.int8:
        return y.nan_to_num(0).round().clamp(-127, 127).to(dtype), scale
    low, high = (y.nan_to_num(0).round().clamp(-8, 7) + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, scale


class _Sequences:
    """Every sequence in a row of its own: queries (B, n, …), and where each of them came from."""

    def __init__(self, q: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> None:
        self.entries, self.cu, self.tokens = seq_lens.shape[0], cu_seqlens_q, q.shape[1]
        if cu_seqlens_q is None:
            self.n = torch.full_like(seq_lens, q.shape[1], dtype=torch.int64)
            self.row = torch.arange(q.shape[1], device=q.device)
            return
        cu = cu_seqlens_q.long()
        self.n = cu[1:] - cu[:-1]
        self.row = torch.arange(int(self.n.max()) if self.entries else 0, device=q.device)
        self.index = (cu[:-1, None] + self.row).clamp(max=max(self.tokens - 1, 0))

    def apart(self, x: Tensor) -> Tensor:
        if self.cu is None:
            return x
        if not x.shape[1]:
            return x.new_zeros(self.entries, self.row.shape[0], *x.shape[2:])
        return x[0][self.index]

    def together(self, x: Tensor, outside: float) -> Tensor:
        """(B, n, …) back to (1, tokens, …), or as it is."""
        if self.cu is None:
            return x
        packed = x.new_full((self.tokens, *x.shape[2:]), outside)
        here = self.row < self.n[:, None]
        packed[self.index[here]] = x[here]
        return packed[None]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cu_seqlens_q: Tensor | None,
    left_pad: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    return_column_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = _Sequences(q, seq_lens, cu_seqlens_q)
    x, rows, n = sequences.apart(q), sequences.row, sequences.n
    keys = torch.arange(block_table.shape[1] * k_cache.shape[1], device=q.device)
    position = (seq_lens - n)[:, None] + rows if positions is None else sequences.apart(positions)  # (B, n)
    distance = keys - position[..., None]  # (B, n, K)
    allowed = (keys < seq_lens[:, None])[:, None] & (rows < n[:, None])[..., None]
    if left_pad is not None:
        allowed = allowed & (keys >= left_pad[:, None, None])
    if window_left >= 0:
        allowed = allowed & (distance >= -window_left)
    if window_right >= 0:
        allowed = allowed & (distance <= window_right)
    if tree_mask is not None and tree_mask.shape[2]:
        own = keys - (seq_lens - n)[:, None]  # (B, K): place among the newest keys
        words = sequences.apart(tree_mask).expand(own.shape[0], -1, -1)
        at = own.clamp(0, 32 * tree_mask.shape[2] - 1)[:, None].expand(-1, words.shape[1], -1)
        set_ = (words.gather(2, at // 32) >> (at % 32)) & 1 == 1
        allowed = allowed & (set_ | (own < 0)[:, None])

    group = q.shape[2] // max(k_cache.shape[2], 1)
    seen = allowed.any(1)  # (B, K): nothing else of the cache is looked at
    k = _gather(k_cache, k_scale, block_table, seen, q.dtype, group)
    v = _gather(v_cache, v_scale, block_table, seen, q.dtype, group)
    x = x.where(allowed.any(2)[..., None, None], 0).transpose(1, 2)
    s = (x * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = (
            s
            - (alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None])[..., None, None]
            * distance.abs()[:, None]
        )
    s = s.masked_fill(~allowed[:, None], -math.inf)
    terms = s
    if sinks is not None:
        rest = sinks[:, None] if sinks.dim() == 1 else sequences.apart(sinks.transpose(1, 2)).transpose(1, 2)
        terms = torch.cat([s, rest.to(s.dtype).expand(s.shape[:3])[..., None]], -1)
    lse = torch.logsumexp(terms, -1) if terms.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    # not exp(s - lse): a large lse cannot tell among how many equal scores a row is shared
    p = torch.softmax(terms, -1)[..., : s.shape[-1]].masked_fill(~allowed[:, None], 0.0)
    out = p @ v.nan_to_num(0.0, 0.0, 0.0)
    if not v.isfinite().all():  # what is not finite reaches the queries that see it, and no other by a factor of 0
        out = out.masked_fill(allowed[:, None].to(s.dtype) @ (~v.isfinite()).to(s.dtype) > 0, math.nan)
    out = sequences.together(out.transpose(1, 2), 0.0)
    lse = sequences.together(lse.transpose(1, 2), -math.inf).transpose(1, 2)
    return out.contiguous(), lse.contiguous(), p.sum(2) if return_column_sums else lse.new_empty(0)


def _gather(
    cache: Tensor, scale: Tensor | None, block_table: Tensor, seen: Tensor, dtype: torch.dtype, group: int
) -> Tensor:
    """(B, Hq, K, ·): the keys of every sequence in their order, 0 where no query sees them."""
    width = cache.shape[3] * (2 if cache.dtype == torch.uint8 else 1)
    if not (cache.shape[0] and seen.numel()):
        return torch.zeros(
            seen.shape[0], group * cache.shape[2], seen.shape[1], width, dtype=dtype, device=cache.device
        )
    pages = block_table.long().clamp(0, cache.shape[0] - 1)
    rows = decode(cache[pages], None if scale is None else scale[pages], dtype).flatten(1, 2)
    rows = rows.where(seen[..., None, None], 0).transpose(1, 2)
    return rows[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def append_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The caches and scales after the call."""
    if rotary_cos is not None and rotary_sin is not None and positions is not None:
        cos, sin = (angles[positions.long()][:, None] for angles in (rotary_cos, rotary_sin))
        k = _rotate(k, cos, sin, interleaved)
    used = slot_mapping >= 0
    slots = slot_mapping[used].long()
    k_cache, k_scale = _write(k[used], k_cache, k_scale, slots)
    if v is not None and v_cache is not None:
        v_cache, v_scale = _write(v[used], v_cache, v_scale, slots)
    return k_cache, v_cache, k_scale, v_scale


def _write(x: Tensor, cache: Tensor, scale: Tensor | None, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    if cache.dtype not in STEPS:
        return _place(cache, slots, x), scale
    codes, scales = quantise(x, cache.dtype, scale is not None)
    return _place(cache, slots, codes), None if scale is None else _place(scale, slots, scales)


def _place(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """A copy of a cache with these rows at these slots."""
    placed = cache.clone(memory_format=torch.contiguous_format)
    page_size = max(cache.shape[1], 1)
    placed[slots // page_size, slots % page_size] = rows.to(cache.dtype)
    return placed


def _rotate(k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    head, tail = k[..., : 2 * half], k[..., 2 * half :]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), tail], -1)
