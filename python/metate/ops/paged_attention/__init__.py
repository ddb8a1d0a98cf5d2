"""Attention over a paged key-value cache, as servers keep it (Kwon et al. 2023, PagedAttention), and its writing.

`csrc/paged_attention.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail, renamed, require_dense, require_flag
from metate.masks import AttentionMask, window_sides
from metate.op import REGISTRY
from metate.ops.paged_attention.declaration import append_op, paged_attention_op
from metate.shortcut import Shortcut

__all__ = ["append_kv", "cascade_attention", "paged_attention"]

_attend = Shortcut("paged_attention")
Attend = Callable[..., Any]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    left_pad: Tensor | None = None,
    tree_mask: Tensor | None = None,
    positions: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    return_column_sums: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact attention of new queries to the keys and values that a paged cache holds, their own included.

    Args:
        q: (batch, heads, head_dim), one query a sequence; or (batch, queries, heads, head_dim); or, with cu_seqlens_q,
            (tokens, heads, head_dim): sequences of different numbers of queries one after another. float32, bfloat16,
            float16 (float64 on a CPU). Under autocast it takes the dtype of a cache of floats: no call casts a cache.
        k_cache: (pages, page_size, kv_heads, head_dim), any strides; heads a multiple of kv_heads. In the dtype of q;
            or int8 or float8_e4m3fn; or uint8 of head_dim / 2 columns, two 4-bit codes (value + 8) a byte, the even
            element in the low nibble. head_dim: 1 to 576.
        v_cache: (pages, page_size, kv_heads, value_dim), dtype of k_cache; may be a view of it: multi-head latent
            attention reads k_cache (…, 1, 576) and v_cache = k_cache[..., :512]. value_dim: 1 to 512.
        block_table: (batch, max_pages) int32: key j of a sequence is row j % page_size of page
            block_table[b, j // page_size]. Entries behind the last used page may be anything; pages may be shared.
        seq_lens: (batch) int32: keys of each sequence, those of its queries included; query i of n stands at position
            seq_len - n + i. If that is before all keys and causal, it sees none: 0 and lse -inf, as in flash-attn.
        cu_seqlens_q: (batch + 1) int32: where the queries of each sequence start in a packed q.
        causal: a query sees no key behind its position. window: (left, right), how many keys before and after its
            position it sees, inclusive; -1: no limit.
        scale: factor of q kᵀ; default head_dim ** -0.5. softcap: > 0: scores become softcap · tanh(score / softcap).
        alibi_slopes: (heads) or (batch, heads) float32. left_pad: (batch) int32: keys before it are padding.
        sinks: (heads), one more logit in each softmax denominator; or one for every query, of the shape of lse.
        tree_mask: bool, (batch or 1, queries, queries), packed (tokens, queries): whether query i sees key j of the
            sequence's own newest keys, for trees of speculated tokens; older keys are not affected. A tree needs
            causal=False unless its tokens see only earlier ones. Or the same as int32 words of 32 bits.
        positions: int32, (batch), (batch, queries) or packed (tokens): where queries stand instead, in any order.
        k_scale, v_scale: (pages, page_size, kv_heads) float32, one a row: for int8 and uint8, and where float8 has any.
        return_lse: also return log Σ exp(score): (batch, heads, queries), packed (heads, tokens), or (batch, heads).
        return_column_sums: also return Σ_i probability[i, j], for evictions: (batch, heads, max_pages · page_size).
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        out like q, with value_dim; then lse and column sums where asked for. A query without a key gives 0 and lse
        -inf. What no query may see may hold NaN. No gradient: inference only.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected. On a GPU page
            numbers and lengths are not looked at.
    """
    packed = cu_seqlens_q is not None
    dims = _check_dims("paged_attention", q, packed, return_lse, return_column_sums)
    left, right = window_sides("paged_attention", window, causal)
    bits = None if tree_mask is None else _tree_bits(tree_mask, q, cu_seqlens_q)
    rest = (
        k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, cu_seqlens_q, left_pad,
        alibi_slopes if alibi_slopes is None else _widen(q, alibi_slopes),
        sinks if sinks is None else _widen(q, sinks), bits, positions,
        (q.shape[-1] or 1) ** -0.5 if scale is None else scale, left, right, softcap, return_column_sums,
    )  # fmt: skip
    first_only = not (return_lse or return_column_sums)
    if dims == 4:
        results = paged_attention_op.call((q, *rest), first_only, backend)
    else:
        results = _attend((q, *rest), _with_four_dims, (q, rest, packed, first_only, backend), backend, first_only)
    if first_only:
        return results
    out, lse, sums = results
    return (out, *([lse] if return_lse else []), *([sums] if return_column_sums else []))


def cascade_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prefix_table: Tensor, prefix_lens: Tensor, cu_groups: Tensor,
    block_table: Tensor, seq_lens: Tensor, *, cu_seqlens_q: Tensor | None = None, causal: bool = True,
    window: tuple[int, int] = (-1, -1), scale: float | None = None, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, left_pad: Tensor | None = None,
    tree_mask: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    return_lse: bool = False, return_column_sums: bool = False, backend: str | None = None,
) -> Any:  # fmt: skip
    """`paged_attention` of sequences that share prefixes, every prefix read once for all its sequences.

    Args:
        q: (batch, heads, head_dim), (batch, queries, heads, head_dim) or, with cu_seqlens_q, (tokens, heads, head_dim);
            the sequences of a group one after another.
        prefix_table: (groups, max_prefix_pages) int32, prefix_lens: (groups) int32: the keys that a group shares.
        cu_groups: (groups + 1) int32, from 0 to batch: group g is the sequences cu_groups[g] … cu_groups[g+1]-1.
        block_table, seq_lens: what each sequence has behind its prefix, its own queries included.
        left_pad: (groups) or (batch) int32: so many of the first keys of a sequence are padding; of groups where there
            are as many of them as sequences. alibi_slopes: (heads) or (batch, heads). sinks: (heads). Where padding or
            slopes are of sequences, a prefix is read for each of its sequences.
        return_column_sums: also return Σ_i probability[i, j] of the prefixes' keys, over all queries of a group,
            (groups, heads, max_prefix_pages · page_size), and of the sequences' own, (batch, heads, max_pages ·
            page_size). Own keys are read twice then.
        Others as in `paged_attention`.

    Returns:
        out like q, then lse and the two tensors of column sums where asked for: what `paged_attention` gives for the
        whole sequences. Source: Hydragen (Juravsky et al. 2024), FlashInfer's cascades (Ye et al. 2025).

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    packed = cu_seqlens_q is not None
    dims = _check_dims("cascade_attention", q, packed, return_lse, return_column_sums)
    left, right = window_sides("cascade_attention", window, causal)
    x = q if packed or dims == 4 else q.unsqueeze(1)
    _check_groups(q, cu_groups, prefix_table, prefix_lens, k_cache)
    groups = prefix_lens.shape[0]
    _check_own(x, seq_lens, cu_seqlens_q, left_pad, groups, tree_mask is not None)
    batch = seq_lens.shape[0]
    _check_all_have_groups(cu_groups, batch)
    _check_heads(batch, alibi_slopes, sinks)
    numbers = torch.arange(batch + 1, dtype=torch.int32, device=seq_lens.device)
    owner = group = _owners(cu_groups, numbers[:-1])
    pads_sequences = left_pad is not None and left_pad.shape[0] != groups
    if pads_sequences or (alibi_slopes is not None and alibi_slopes.dim() == 2):
        # Queries of a group differ: each sequence is a group.
        prefix_table, prefix_lens = prefix_table[owner], prefix_lens[owner]
        left_pad = left_pad if left_pad is None or pads_sequences else left_pad[owner]
        cu_groups, group = numbers, numbers[:-1]
    positions = None
    if left >= 0 or alibi_slopes is not None:
        positions = _positions(x, prefix_lens[group] + seq_lens, cu_seqlens_q)
    attend = partial(
        paged_attention, k_cache=k_cache, v_cache=v_cache, causal=False, scale=scale, softcap=softcap,
        alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, return_lse=True, backend=backend,
    )  # fmt: skip
    own = partial(
        _part, {}, attend, x, block_table=block_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q,
        window=(left, right), tree_mask=tree_mask,
        left_pad=None if left_pad is None else (left_pad - prefix_lens).clamp(min=0)[group],
    )  # fmt: skip
    prefix = partial(
        _part, _PREFIX, attend, x if packed else x.flatten(0, 1), block_table=prefix_table, seq_lens=prefix_lens,
        cu_seqlens_q=cu_groups * x.shape[1] if cu_seqlens_q is None else cu_seqlens_q[cu_groups.long()],
        window=(left, -1), left_pad=left_pad, positions=positions,
    )  # fmt: skip
    shape = None if packed else x.shape[:2]
    if return_column_sums:
        out, lse, *sums = _sum_both(own, prefix, shape, sinks)
        if cu_groups is numbers:
            sums[0] = sums[0].new_zeros(groups, *sums[0].shape[1:]).index_add_(0, owner, sums[0])
    else:
        out, lse, *sums = _merge_both(own, prefix, shape, sinks, backend)
    if dims == 3 and not packed:
        out, lse = out.squeeze(1), lse.squeeze(2)
    found = (out, *([lse] if return_lse else []), *sums)
    return found if len(found) > 1 else out


_PREFIX = {"block_table": "prefix_table", "seq_lens": "prefix_lens"}


def _part(names: dict[str, str], attend: Attend, *args: Any, **options: Any) -> Any:
    """Own keys or the prefixes; what is wrong is told of the arguments as they came."""
    try:
        return attend(*args, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise renamed(error, "paged_attention", "cascade_attention", names) from None


def _merge_both(
    own: Attend, prefix: Attend, shape: torch.Size | None, sinks: Tensor | None, backend: str | None
) -> tuple[Tensor, ...]:
    """out and lse of own keys and the prefix, whose queries are packed; `shape`: (batch, queries) of others."""
    merge = REGISTRY["merge_attention_states"]
    out, lse = own(sinks=sinks)
    prefix_out, prefix_lse = prefix()
    if shape is not None:
        outs = torch.stack([prefix_out.unflatten(0, shape), out])
        lses = torch.stack([prefix_lse.unflatten(1, shape).transpose(0, 1), lse])
        return tuple(merge.call((outs, lses), backend=backend))
    outs, lses = torch.stack([prefix_out, out]), torch.stack([prefix_lse, lse])
    out, lse = merge.call((outs.unsqueeze(1), lses.unsqueeze(1)), backend=backend)
    return out.squeeze(0), lse.squeeze(0)


def _sum_both(own: Attend, prefix: Attend, shape: torch.Size | None, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """The same with column sums, of the prefixes and of own keys. What a query gives to other keys is one more logit in
    its denominator: so each part has its share of the whole, and sums of probabilities are right."""
    _, own_lse = own(sinks=sinks)
    rest = own_lse if shape is None else own_lse.transpose(0, 1).flatten(1)
    prefix_out, lse, prefix_sums = prefix(sinks=rest, return_column_sums=True)
    if shape is not None:
        prefix_out, lse = prefix_out.unflatten(0, shape), lse.unflatten(1, shape).transpose(0, 1)
    others = lse + torch.log1p(-(own_lse - lse).clamp(max=0).exp()).where(lse > -math.inf, 0)
    if sinks is not None:
        others = torch.logaddexp(others, sinks.to(others.dtype)[:, None])
    out, _, sums = own(sinks=others, return_column_sums=True)
    return prefix_out + out, lse, prefix_sums, sums


def _owners(starts: Tensor, numbers: Tensor) -> Tensor:
    """Which of the runs from starts[n] to starts[n + 1] numbers are in."""
    return torch.searchsorted(starts[1:].contiguous(), numbers, right=True)


def _positions(x: Tensor, keys: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """(tokens): where the queries of sequences stand that have so many keys, those of their prefixes included."""
    rows = torch.arange(x.shape[0] if cu_seqlens_q is not None else x.shape[1], dtype=torch.int32, device=x.device)
    if cu_seqlens_q is None:
        return (keys[:, None] - x.shape[1] + rows).flatten()
    if not keys.shape[0]:
        return rows
    sequence = _owners(cu_seqlens_q, rows).clamp(max=keys.shape[0] - 1)
    return keys[sequence] - cu_seqlens_q[sequence + 1] + rows


def append_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> None:
    """Writes new keys and values into a paged cache, rotated and quantised as asked for.

    Args:
        k: (tokens, kv_heads, head_dim), v: (tokens, kv_heads, value_dim), float32, bfloat16, float16 or float64. v and
            v_cache None: keys only, as where v_cache is a view of k_cache. Under autocast as q of `paged_attention`.
        k_cache, v_cache: (pages, page_size, kv_heads, ·) as in `paged_attention`, written in place.
        slot_mapping: (tokens) int32 or int64: page · page_size + row for each token, none twice; -1 skips a token.
        k_scale, v_scale: (pages, page_size, kv_heads) float32, written in place: for int8 (amax / 127), 4-bit codes in
            uint8 (amax / 7), and float8_e4m3fn (amax / 448; without scales numbers are saturated). A head that is not
            finite everywhere gives a scale that is not finite.
        rotary_cos, rotary_sin: (max_positions, R / 2) float32, positions: (tokens) int32 or int64: rotates the first R
            columns of every head of k, in pairs (2i, 2i + 1) if interleaved, (i, i + R / 2) if not.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Raises:
        ValueError: before anything is written, for a slot or position out of range, or a slot given twice (CPU).
        NotImplementedError: where something would need a gradient.
    """
    append_op.call(
        (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rotary_cos, rotary_sin, positions, interleaved),
        backend=backend,
    )


def _with_four_dims(q: Tensor, rest: tuple[Any, ...], packed: bool, first_only: bool, backend: str | None) -> Any:
    """One query a sequence, or packed ones: the operator has a dimension more, of size 1."""
    one, of_lse = (0, 0) if packed else (1, 2)
    if rest[9] is not None or rest[11] is not None:
        sinks, bits, positions = rest[9:12]
        sinks = sinks.unsqueeze(of_lse) if isinstance(sinks, Tensor) and sinks.dim() == 2 else sinks
        positions = positions.unsqueeze(one) if isinstance(positions, Tensor) and positions.dim() == 1 else positions
        rest = (*rest[:9], sinks, bits, positions, *rest[12:])
    found = paged_attention_op.call((q.unsqueeze(one), *rest), first_only, backend)
    if first_only:
        return found.squeeze(one)
    return found[0].squeeze(one), found[1].squeeze(of_lse), found[2]


def _check_dims(op: str, q: Tensor, packed: bool, return_lse: bool, return_column_sums: bool) -> int:
    """How many dimensions q has."""
    if not type(return_lse) is type(return_column_sums) is bool:
        require_flag(op, "return_lse", return_lse)
        require_flag(op, "return_column_sums", return_column_sums)
    require_dense(op, "q", q)
    dims = q.dim()
    if dims != 3 and (packed or dims != 4):
        expected = (
            "(tokens, heads, head_dim)" if packed else "(batch, heads, head_dim) or (batch, queries, heads, head_dim)"
        )
        raise fail(op, "q", f"of shape {tuple(q.shape)}", expected)
    return dims


def _require_numbers(op: str, name: str, x: object, q: Tensor) -> None:
    """int32 beside q."""
    require_dense(op, name, x, "an int32 tensor")
    assert isinstance(x, Tensor)
    if x.dtype != torch.int32:
        raise fail(op, name, x.dtype, "an int32 tensor; convert it with .to()", error=TypeError)
    if x.device != q.device:
        raise fail(op, name, f"on {x.device}", f"{q.device} like q; move it with .to()")


def _check_groups(q: Tensor, cu_groups: Tensor, prefix_table: Tensor, prefix_lens: Tensor, k_cache: Tensor) -> None:
    op = "cascade_attention"
    for name, x in (("cu_groups", cu_groups), ("prefix_table", prefix_table), ("prefix_lens", prefix_lens)):
        _require_numbers(op, name, x, q)
    if cu_groups.dim() != 1 or prefix_lens.shape != (cu_groups.shape[0] - 1,):
        got = f"of shape {tuple(prefix_lens.shape)} beside cu_groups of shape {tuple(cu_groups.shape)}"
        raise fail(op, "prefix_lens", got, "(groups) beside (groups + 1)")
    if prefix_table.dim() != 2 or prefix_table.shape[0] != prefix_lens.shape[0]:
        got = f"of shape {tuple(prefix_table.shape)}"
        raise fail(op, "prefix_table", got, f"({prefix_lens.shape[0]}, max_prefix_pages), a row for each group")
    if isinstance(k_cache, Tensor) and k_cache.dim() == 4 and not torch.compiler.is_compiling():
        keys = prefix_table.shape[1] * k_cache.shape[1]
        if prefix_lens.device.type == "cpu" and ((prefix_lens < 0) | (prefix_lens > keys)).any():
            expected = f"0 to {keys}, what {prefix_table.shape[1]} pages hold"
            raise fail(op, "prefix_lens", prefix_lens.tolist(), expected)


def _check_heads(batch: int, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None:
            require_dense("cascade_attention", name, x)
    if isinstance(sinks, Tensor) and sinks.dim() != 1:
        raise fail("cascade_attention", "sinks", f"of shape {tuple(sinks.shape)}", "(heads)")
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() != 1:
        shape = tuple(alibi_slopes.shape)
        if len(shape) != 2 or shape[0] != batch:
            raise fail("cascade_attention", "alibi_slopes", f"of shape {shape}", f"(heads) or ({batch}, heads)")


def _check_all_have_groups(cu_groups: Tensor, batch: int) -> None:
    """A sequence outside of every group would lose its prefix and still give numbers."""
    if cu_groups.device.type == "cpu" and not torch.compiler.is_compiling():
        starts = cu_groups.tolist()
        if starts[0] != 0 or starts[-1] != batch or starts != sorted(starts):
            expected = f"non-decreasing numbers from 0 to the {batch} sequences of q"
            raise fail("cascade_attention", "cu_groups", starts, expected)


def _check_own(
    q: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None, left_pad: Tensor | None, groups: int, is_tree: bool
) -> None:
    """Queries before the keys of their own sequence would see all of the prefix. One query alone may do so."""
    op, queries = "cascade_attention", q.shape[1]
    for name, x in (("seq_lens", seq_lens), ("cu_seqlens_q", cu_seqlens_q), ("left_pad", left_pad)):
        if x is None and name != "seq_lens":
            continue
        _require_numbers(op, name, x, q)
        assert x is not None
        batch = seq_lens.numel()
        own = batch if cu_seqlens_q is not None else q.shape[0]
        sizes = {"seq_lens": {own}, "cu_seqlens_q": {batch + 1}, "left_pad": {groups, batch}}[name]
        if x.dim() != 1 or x.shape[0] not in sizes:
            raise fail(op, name, f"of shape {tuple(x.shape)}", " or ".join(f"({size},)" for size in sorted(sizes)))
    if seq_lens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    n = torch.full_like(seq_lens, queries) if cu_seqlens_q is None else cu_seqlens_q.diff()
    short = seq_lens < n.where((n > 1) | is_tree, 0)
    if short.any():
        b = int(short.nonzero()[0])
        raise fail(op, f"seq_lens[{b}]", int(seq_lens[b]), f"at least {int(n[b])}, the keys of its queries")


def _longest(cu_seqlens_q: Any) -> int:
    """The most queries of a sequence, where looking costs little: on a CPU."""
    known = isinstance(cu_seqlens_q, Tensor) and cu_seqlens_q.device.type == "cpu" and cu_seqlens_q.numel() > 1
    return int(cu_seqlens_q.diff().max()) if known and not torch.compiler.is_compiling() else 0


def _widen(q: Tensor, x: Tensor | None) -> Tensor | None:
    """Slopes and sinks in the dtype of the softmax."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _tree_bits(mask: Tensor, q: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """(B or 1, rows, words) int32 from a bool mask; packed: (1, tokens, words)."""
    packed = cu_seqlens_q is not None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.int32):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise fail("paged_attention", "tree_mask", got, "a bool tensor, or int32 words of 32 bits", error=TypeError)
    if mask.dim() not in ((2,) if packed else (2, 3)):
        expected = "(tokens, queries)" if packed else "(batch or 1, queries, queries)"
        raise fail("paged_attention", "tree_mask", f"of shape {tuple(mask.shape)}", expected)
    mask = mask if mask.dim() == 3 else mask[None]
    if mask.dtype == torch.int32:
        return mask
    queries = _longest(cu_seqlens_q) if packed else q.shape[1] if q.dim() == 4 else 1
    if mask.shape[2] < queries or (mask.shape[2] > queries and not packed):  # bits would not show it
        expected = f"{queries} columns{' or more' if packed else ''}, one for each query of a sequence"
        raise fail("paged_attention", "tree_mask", f"of shape {tuple(mask.shape[int(packed) :])}", expected)
    bits = AttentionMask.dense(mask[:, None]).bits
    assert bits is not None
    return bits[:, 0]
