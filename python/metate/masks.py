"""Attention masks as data: intervals, blocks and bits. No mask costs a compilation or an N × N tensor of floats."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metate.errors import fail, require_dense
from metate.scalars import plain


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see; what is given is intersected, also with causal and window of the call.

    intervals: (batch or 1, heads or 1, seqlen_q, 2) int32: row i sees the keys in [start, end).
    blocks: (batch or 1, heads or 1, ⌈seqlen_q / block_size[0]⌉, ⌈seqlen_k / block_size[1]⌉) uint8: visible blocks.
    bits: (batch or 1, heads or 1, seqlen_q, ⌈seqlen_k / 32⌉) int32: bit j % 32 of word j // 32 shows key j.

    The functions below make masks, and raise TypeError or ValueError naming the argument. What a mask must be to q and
    k is checked where it is used.
    """

    intervals: Tensor | None = None
    blocks: Tensor | None = None
    bits: Tensor | None = None
    block_size: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        size = _two("AttentionMask", "block_size", self.block_size, "two integers (rows, columns)")
        object.__setattr__(self, "block_size", size)

    @staticmethod
    def documents(document_ids: Tensor) -> AttentionMask:
        """Tokens see their own document only; (batch, seqlen) or (seqlen) ids, equal ids next to each other.

        For the same queries and keys. A row sees from the first to the last token of its run of equal ids.
        """
        require_dense("AttentionMask.documents", "document_ids", document_ids)
        if document_ids.dim() not in (1, 2):
            got = f"of shape {tuple(document_ids.shape)}"
            raise fail("AttentionMask.documents", "document_ids", got, "(batch, seqlen) or (seqlen)")
        ids = document_ids if document_ids.dim() == 2 else document_ids[None]
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        last = torch.ones_like(first)
        last[:, :-1] = first[:, 1:]
        start = torch.where(first, position, 0).cummax(1).values
        end = torch.where(last, position + 1, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        return AttentionMask(intervals=torch.stack([start, end], -1).to(torch.int32)[:, None])

    @staticmethod
    def lengths(seqlens_k: Tensor, seqlen_q: int, starts: Tensor | None = None) -> AttentionMask:
        """Padded batches: row b sees the keys in [starts[b], seqlens_k[b]); both (batch) integers, starts default 0."""
        for name, given in (("seqlens_k", seqlens_k), ("starts", seqlens_k if starts is None else starts)):
            require_dense("AttentionMask.lengths", name, given)
            if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
                got = f"{given.dtype} of shape {tuple(given.shape)}"
                raise fail("AttentionMask.lengths", name, got, "(batch) integers")
            if given.shape != seqlens_k.shape or given.device != seqlens_k.device:
                got, expected = (f"of shape {tuple(x.shape)} on {x.device}" for x in (given, seqlens_k))
                raise fail("AttentionMask.lengths", name, got, f"{expected} like seqlens_k")
        _count("lengths", "seqlen_q", seqlen_q)
        start = torch.zeros_like(seqlens_k) if starts is None else starts
        ends = torch.stack([start, seqlens_k], -1).to(torch.int32)
        return AttentionMask(intervals=ends[:, None, None].expand(-1, 1, seqlen_q, 2))

    @staticmethod
    def block_sparse(blocks: Tensor, block_size: tuple[int, int] = (128, 128)) -> AttentionMask:
        """Visible blocks of block_size (rows, columns), those not 0; blocks as in the class, bool or any numbers, or
        without the leading dimensions."""
        visible = _four_dimensions("block_sparse", "blocks", blocks) != 0
        return AttentionMask(blocks=visible.to(torch.uint8), block_size=block_size)

    @staticmethod
    def dense(visible: Tensor, seqlen_k: int | None = None) -> AttentionMask:
        """Any bool mask, broadcastable to (batch, heads, seqlen_q, seqlen_k), packed to one bit per pair."""
        visible = _four_dimensions("dense", "visible", visible)
        if visible.dtype != torch.bool:
            raise fail("AttentionMask.dense", "visible", visible.dtype, "torch.bool", error=TypeError)
        if seqlen_k is not None and visible.shape[3] == 1:
            visible = visible.expand(*visible.shape[:3], seqlen_k)
        padded = torch.nn.functional.pad(visible, (0, -visible.shape[3] % 32))
        # Eight truth values, the bytes of a word, become bits: the product moves that of byte i to bit 56 + i.
        packed = (padded.flatten().view(torch.int64) * 0x0102040810204080) >> 56
        words = packed.to(torch.uint8).view(torch.int32)
        return AttentionMask(bits=words.view(*padded.shape[:3], padded.shape[3] // 32))

    @staticmethod
    def tree(parents: Sequence[int], prefix: int = 0) -> AttentionMask:
        """Speculative decoding: token i of a tree sees `prefix` keys, its ancestors and itself; parents[root] = -1.

        The keys are the prefix followed by the tokens of the tree; a parent comes before its children.
        """
        try:
            parents = [operator.index(parent) for parent in parents]
        except TypeError:
            op, got = "AttentionMask.tree", repr(parents)[:60]
            raise fail(op, "parents", got, "a list of integers", error=TypeError) from None
        _count("tree", "prefix", prefix)
        n = len(parents)
        visible = torch.zeros(n, prefix + n, dtype=torch.bool, device="cpu")
        visible[:, :prefix] = True
        for i, parent in enumerate(parents):
            if not -1 <= parent < i:
                raise fail("AttentionMask.tree", f"parents[{i}]", parent, f"-1 or an earlier token (0 to {i - 1})")
            if parent >= 0:
                visible[i, prefix:] = visible[parent, prefix:]
            visible[i, prefix + i] = True
        return AttentionMask.dense(visible)


def visible_pairs(queries: int, keys: int, diagonal: int, left: int, right: int) -> int:
    """How many (query, key) pairs a window leaves: query i stands at key i + diagonal; -1: no limit."""
    behind = _clamped_sum(diagonal + right + 1, queries, keys) if right >= 0 else queries * keys
    return behind - (_clamped_sum(diagonal - left, queries, keys) if left >= 0 else 0)


def lengths_of(cu_seqlens: Tensor | None) -> list[int] | None:
    """The lengths of packed sequences, where there are any and they are known."""
    if cu_seqlens is None or type(cu_seqlens) is not Tensor or cu_seqlens.is_meta:
        return None
    return cu_seqlens.diff().tolist()


def _clamped_sum(first: int, count: int, most: int) -> int:
    """Σ min(max(x, 0), most) over `count` integers from `first` on."""

    def below(end: int) -> int:
        rising = min(max(end, 0), most)
        return rising * (rising - 1) // 2 + most * max(end - most, 0)

    return below(first + count) - below(first)


def window_sides(op: str, window: tuple[int, int], causal: bool) -> tuple[int, int]:
    """How many keys before and behind its position a query sees, none behind it where causal; -1: no limit."""
    left, right = _two(op, "window", window, "two integers (left, right); -1 means no limit")
    if not isinstance(causal, int) and not isinstance(plain(causal), int):
        raise fail(op, "causal", type(causal).__name__, "True or False", error=TypeError)
    if causal:
        right = 0 if right == -1 else min(right, 0)
    return left, right


def _two(op: str, name: str, given: tuple[int, int], expected: str) -> tuple[int, int]:
    """The two integers of a pair, which a compiler may not know yet."""
    if isinstance(given, (tuple, list)) and len(given) == 2:
        first, second = given
        if type(first) not in _WHOLE or type(second) not in _WHOLE:
            first, second = plain(first), plain(second)
        if type(first) in _WHOLE and type(second) in _WHOLE:
            return first, second
    raise fail(op, name, repr(given)[:60], expected, error=TypeError)


_WHOLE = (int, torch.SymInt)


def _count(function: str, name: str, given: object) -> None:
    """A number of rows or keys, which positions of 32 bits can tell; a compiler may not know it yet."""
    if isinstance(given, torch.SymInt):
        return
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise fail(f"AttentionMask.{function}", name, repr(given)[:60], "an integer", error=TypeError) from None
    if not 0 <= number < 2**31:
        raise fail(f"AttentionMask.{function}", name, number, "0 to 2**31 - 1")


def _four_dimensions(function: str, name: str, x: Tensor) -> Tensor:
    require_dense(f"AttentionMask.{function}", name, x)
    if x.dim() > 4:
        expected = "at most 4 dimensions (batch, heads, rows, columns)"
        raise fail(f"AttentionMask.{function}", name, f"of shape {tuple(x.shape)}", expected)
    return x[(None,) * (4 - x.dim())]
