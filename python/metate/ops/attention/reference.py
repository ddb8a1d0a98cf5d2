"""The semantics of csrc/attention.h in plain torch: schema, truth, error budget and fallback of every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metate.philox import keep_mask


def _positions(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, top_left: bool, taken: slice
) -> tuple[Tensor, ...]:
    """Batch entry and position of every query taken, position of every key, the diagonal, and who shares a sequence."""
    rows, columns = torch.arange(q.shape[1], device=q.device)[taken], torch.arange(k.shape[1], device=q.device)
    if cu_q is None or cu_k is None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None].expand(q.shape[0], rows.shape[0])
        diagonal = torch.zeros_like(rows) if top_left else (k.shape[1] - q.shape[1]) + torch.zeros_like(rows)
        together = torch.ones(1, 1, rows.shape[0], k.shape[1], dtype=torch.bool, device=q.device)
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


_ALL = slice(None)
LARGEST_LSE = 32.0  # a float32 of that size is wrong by up to 2**-20, and so is exp of it


class _Scores:
    """What forward, backward and column sums share: scores, who may see whom, and the dropout factors, of the queries
    that are taken."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, intervals: Tensor | None,
        blocks: Tensor | None, bits: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, scale: float, left: int,
        right: int, top_left: bool, softcap: float, block_m: int, block_n: int, taken: slice = _ALL,
    ) -> None:  # fmt: skip
        self.group = q.shape[2] // max(k.shape[2], 1)
        self.scale, self.softcap = scale, softcap
        self.batch, rows, columns, diagonal, allowed = _positions(q, k, cu_q, cu_k, top_left, taken)
        self.rows, self.columns = rows, columns
        self.inside = None
        if cu_q is not None:
            token = torch.arange(q.shape[1], device=q.device)[taken]
            self.inside = (token >= cu_q[0]) & (token < cu_q[-1])
        self.distance = columns - rows[:, None] - diagonal  # of key j from the diagonal of row i
        if left >= 0:
            allowed = allowed & (self.distance >= -left)
        if right >= 0:
            allowed = allowed & (self.distance <= right)
        if intervals is not None:
            intervals = intervals[:, :, taken]
            allowed = allowed & (columns >= intervals[..., :1]) & (columns < intervals[..., 1:])
        if blocks is not None:
            allowed = allowed & (blocks[:, :, rows // block_m][..., columns // block_n] != 0)
        if bits is not None:
            allowed = allowed & ((bits[:, :, taken][..., columns // 32] >> (columns % 32)) & 1).bool()
        self.allowed = allowed.expand(q.shape[0], q.shape[2], rows.shape[0], k.shape[1])
        alive = self.allowed.any(-1)[..., None]  # NaN in padding must not meet a factor of 0
        self.q = q[:, taken].transpose(1, 2).where(alive, 0)
        self.k = self.clean_keys(k)
        s = (self.q * scale) @ self.k.transpose(-1, -2)
        self.capped = softcap * torch.tanh(s / softcap) if softcap > 0 else s
        s = self.capped
        if bias is not None:
            s = s + rows_of(bias, taken)
        if alibi_slopes is not None:
            s = s - self.slopes(alibi_slopes) * self.distance.abs()
        self.s = s.masked_fill(~self.allowed, -math.inf)

    def slopes(self, alibi_slopes: Tensor) -> Tensor:
        """(B, H, Sq or 1, 1): those of the batch entry or of the sequence of a query."""
        if alibi_slopes.dim() == 1:
            return alibi_slopes[:, None, None]
        return alibi_slopes[self.batch].transpose(1, 2)[..., None]

    def slopes_gradient(self, ds: Tensor, alibi_slopes: Tensor) -> Tensor:
        rows = -(ds * self.distance.abs()).sum(-1)  # (B, H, Sq)
        if alibi_slopes.dim() == 1:
            return rows.sum((0, 2))
        entries = self.batch.expand(rows.shape[0], -1).flatten()
        return torch.zeros_like(alibi_slopes).index_add(0, entries, rows.transpose(1, 2).flatten(0, 1))

    def clean_keys(self, x: Tensor) -> Tensor:
        """(B, H, Sk, ·) from (B, Sk, Hkv, ·): repeated for the group, 0 where no query sees the key."""
        seen = self.allowed.any(-2)[..., None]
        x = x.transpose(1, 2)[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)
        return x.where(seen, 0)

    def shares(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities and lse; a sink is one more logit in the denominator."""
        s = self.s
        if sinks is not None:
            extra = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
            if self.inside is not None:  # tokens outside every sequence have no sink either
                extra = extra.masked_fill(~self.inside[:, None], -math.inf)
            s = torch.cat([s, extra], -1)
        p, lse = shares(s)
        return p[..., : self.s.shape[-1]], lse

    def probabilities(self, lse: Tensor, sinks: Tensor | None, partial: bool = False) -> Tensor:
        """exp(s - lse), or the softmax where an lse is too large to tell it; `partial`: it is over more keys."""
        if partial:
            return torch.exp(self.s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        coarse = ((lse.abs() > LARGEST_LSE) & (lse != -math.inf))[..., None]
        lse = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
        p = torch.exp((self.s - lse).masked_fill(coarse, 0.0))
        return torch.where(coarse, self.shares(sinks)[0], p)

    def dropout(self, p: float, seed: int, offset: int) -> Tensor:
        """0 or 1 / (1 - p) for every score."""
        heads = self.s.shape[1]
        streams = self.batch[:, None] * heads + torch.arange(heads, device=self.s.device)[:, None]  # (B, H, Sq)
        keep = keep_mask(p, seed, offset, streams[..., None], self.rows[:, None], self.columns)
        return keep.to(self.s.dtype) / (1 - p)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    blocks: Tensor | None,
    bits: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
    seed: int,
    offset: int,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n)  # fmt: skip
    p, lse = scores.shares(sinks)
    if dropout_p > 0:
        p = p * scores.dropout(dropout_p, seed, offset)
    out = p @ scores.clean_keys(v)
    return out.transpose(1, 2).contiguous(), lse


def attention_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    delta = (out * grad_out).sum(-1).transpose(1, 2)
    return delta.contiguous() if grad_lse is None else delta - grad_lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    blocks: Tensor | None,
    bits: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
    seed: int,
    offset: int,
    block_m: int,
    block_n: int,
    partial: bool,
    need_dbias: bool,
    need_dalibi_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward_of_rows(
        _ALL, grad_out, q, k, v, lse, delta, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q,
        cu_seqlens_k, scale, window_left, window_right, top_left, softcap, dropout_p, seed, offset, block_m, block_n,
        partial, need_dbias, need_dalibi_slopes,
    )  # fmt: skip


def backward_of_rows(
    taken: slice, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, intervals: Tensor | None, blocks: Tensor | None,
    bits: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, window_left: int,
    window_right: int, top_left: bool, softcap: float, dropout_p: float, seed: int, offset: int, block_m: int,
    block_n: int, partial: bool, need_dbias: bool, need_dalibi_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What some of the queries give to the gradients: their rows of dq and of a dbias that has rows, their part of the
    others."""
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n, taken)  # fmt: skip
    lse, delta = lse[..., taken], delta[..., taken]
    alive = (lse != -math.inf)[..., None]
    go = grad_out[:, taken].transpose(1, 2).where(alive, 0)
    p = scores.probabilities(lse, sinks, partial)
    dp = go @ scores.clean_keys(v).transpose(-1, -2)
    kept = p
    if dropout_p > 0:
        factor = scores.dropout(dropout_p, seed, offset)
        kept, dp = p * factor, dp * factor
    ds = p * (dp - delta.masked_fill(~alive.squeeze(-1), 0.0)[..., None])
    dv = kept.transpose(-1, -2) @ go
    dbias = _sum_to(ds, rows_of(bias, taken).shape) if need_dbias and bias is not None else ds.new_empty(0)
    dalibi = ds.new_empty(0)
    if need_dalibi_slopes and alibi_slopes is not None:
        dalibi = scores.slopes_gradient(ds, alibi_slopes)
    if softcap > 0:
        ds = ds * (1 - (scores.capped / softcap) ** 2)
    dq = (ds @ scores.k) * scale
    dk = (ds.transpose(-1, -2) @ scores.q) * scale

    dk, dv = (x.unflatten(1, (k.shape[2], scores.group)).sum(2) for x in (dk, dv))
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dbias, dalibi


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    blocks: Tensor | None,
    bits: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    block_m: int,
    block_n: int,
) -> Tensor:
    scores = _Scores(q, k, bias, alibi_slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale,
                     window_left, window_right, top_left, softcap, block_m, block_n)  # fmt: skip
    return scores.probabilities(lse, sinks).sum(-2)


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    p, lse = shares(lses.movedim(0, -1))
    weights = p.movedim(-1, 0).transpose(-1, -2)[..., None]
    return (outs.where(weights > 0, 0) * weights).sum(0), lse


def shares(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows, 0 where all is -inf, and its log Σ exp. A large one cannot tell among how many equal terms the
    row is shared: exp(term - lse) would give each of them all of it."""
    lse = torch.logsumexp(terms, -1) if terms.shape[-1] else terms.new_full(terms.shape[:-1], -math.inf)
    return torch.softmax(terms, -1).masked_fill((lse == -math.inf)[..., None], 0.0), lse


def rows_of(bias: Tensor, taken: slice) -> Tensor:
    """The rows of a bias that the queries taken have; one that is broadcast along them has no other."""
    return bias if bias.shape[2] == 1 else bias[:, :, taken]


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of broadcasting a tensor of `shape` to that of x."""
    return x.sum_to_size(shape) if x.shape != shape else x
