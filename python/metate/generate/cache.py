"""Keys and values of all layers and sequences in pages (Kwon et al. 2023, PagedAttention, section 4)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from metate import library
from metate.errors import fail, require_flag
from metate.memory import allocate
from metate.ops.paged_attention import append_kv, paged_attention

if TYPE_CHECKING:
    from metate._runtime import BlockManager

# What a cache may hold beside the model's own dtype: dtype of the tensors, heads' columns a byte holds.
COMPRESSED = {"int8": (torch.int8, 1), "int4": (torch.uint8, 2), "fp8": (torch.float8_e4m3fn, 1)}


@dataclass(frozen=True)
class CacheLayout:
    """What a model keeps of each token, and where it computes."""

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype  # of queries, keys and values
    device: torch.device


def positive(op: str, name: str, given: object) -> int:
    """A whole number from 1 to 2^31 - 1, numpy's too."""
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise fail(op, name, repr(given)[:60], "an integer, at least 1", error=TypeError) from None
    if not 1 <= number < 2**31:
        raise fail(op, name, number, "at least 1" if number < 1 else "less than 2^31")
    return number


def require_model(op: str, model: object) -> None:
    """TypeError where it is none that can be served."""
    if not (hasattr(model, "cache_layout") and hasattr(model, "forward_paged")):
        expected = "metate.models.Llama, or what has the members of metate.generate.Model"
        raise fail(op, "model", type(model).__name__, expected, error=TypeError)


def require_cache_dtype(op: str, dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, str) and dtype in COMPRESSED):
        got, expected = repr(dtype)[:60], f"None (that of the model) or one of {list(COMPRESSED)}"
        raise fail(op, "dtype", got, expected)


class Model(Protocol):
    """What a model offers to `metate.generate` and `Scheduler`; `metate.models.Llama` does."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def cache_layout(self) -> CacheLayout: ...

    def forward_paged(self, batch: Batch) -> Tensor:
        """Logits (len(batch.rows), vocab_size) of the tokens `batch.rows`; every layer calls `batch.attend` once."""
        ...


@dataclass(frozen=True)
class Part:
    """The next tokens of one sequence within a step."""

    sequence: int
    tokens: Sequence[int]
    slots: Sequence[int]  # as PagedKVCache.append gave them
    wanted: int  # so many last tokens need logits


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, one after another: what one forward pass works on.

    tokens, positions: (n) int64. cu_seqlens_q: (sequences + 1) int32, where each sequence's tokens begin. block_table:
    (sequences, pages) int32. seq_lens: (sequences) int32, these tokens included. slot_mapping: (n) int64. rows:
    (wanted) int64, the tokens whose logits are wanted.
    """

    cache: PagedKVCache
    tokens: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    block_table: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    rows: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Writes keys and values of a layer to the cache, then attends to all that the sequences have in it.

        Args:
            layer: 0 … layers-1. q: (n, heads, head_dim), k: (n, kv_heads, head_dim), v: (n, kv_heads, value_dim).
            options: `scale`, `window`, `softcap`, `alibi_slopes` and `sinks` of `metate.paged_attention`.

        Returns:
            (n, heads, value_dim) in the dtype of q.
        """
        keys, values, scales = self.cache.layers[layer]
        append_kv(k, v, keys, values, self.slot_mapping, **scales)
        if len(self.seq_lens) < len(self.tokens):
            options["cu_seqlens_q"] = self.cu_seqlens_q
        out: Tensor = paged_attention(q, keys, values, self.block_table, self.seq_lens, **scales, **options)
        return out


class PagedKVCache:
    """The keys and values of every layer and sequence, in blocks that sequences share.

    Args:
        layout: what the model keeps, `model.cache_layout`.
        blocks: how many blocks of `page_size` tokens there are, for all sequences together.
        dtype: "int8", "int4" or "fp8" (e4m3), each with a float32 scale per token and head; None: that of the model.
        prefix_cache: sequences find full blocks of earlier ones by their tokens.
        on_evict: `on_evict(block, tokens)`, called before a cached block is overwritten, with all tokens from the
            beginning of its sequence to its end: `cache.keys[:, block]` and `cache.values[:, block]` are still there
            to be stored elsewhere. It must not call the cache.

    `keys`: (layers, blocks, page_size, kv_heads, head_dim), `values` likewise with value_dim; int4 holds two columns a
    byte. `key_scales`, `value_scales`: (layers, blocks, page_size, kv_heads) float32, or None.

    Raises:
        ValueError, TypeError: naming the argument. CacheFull (a RuntimeError): no room; nothing was changed.
    """

    def __init__(
        self,
        layout: CacheLayout,
        blocks: int,
        page_size: int = 16,
        *,
        dtype: str | None = None,
        prefix_cache: bool = True,
        on_evict: Callable[[int, list[int]], None] | None = None,
    ) -> None:
        if not isinstance(layout, CacheLayout):
            raise fail("PagedKVCache", "layout", type(layout).__name__, "a CacheLayout, as model.cache_layout",
                       error=TypeError)  # fmt: skip
        blocks, page_size = positive("PagedKVCache", "blocks", blocks), positive("PagedKVCache", "page_size", page_size)
        require_cache_dtype("PagedKVCache", dtype)
        prefix_cache = require_flag("PagedKVCache", "prefix_cache", prefix_cache)
        if on_evict is not None and not callable(on_evict):
            got, expected = type(on_evict).__name__, "a function of a block and its tokens, or None"
            raise fail("PagedKVCache", "on_evict", got, expected, error=TypeError)
        stored, share = COMPRESSED[dtype] if dtype else (layout.dtype, 1)
        for name in ("head_dim", "value_dim"):
            if getattr(layout, name) % share:
                raise fail("PagedKVCache", name, getattr(layout, name), "an even number, for two columns a byte")
        self.layout, self.page_size, self.dtype = layout, page_size, dtype
        self.manager: BlockManager = library.runtime().BlockManager(blocks, page_size, prefix_cache=prefix_cache)
        self.manager.set_hook(on_evict)
        rows = (layout.layers, blocks, page_size, layout.kv_heads)
        self.keys, self.values = (
            allocate((*rows, width // share), stored, layout.device) for width in (layout.head_dim, layout.value_dim)
        )
        self.key_scales, self.value_scales = (
            allocate(rows, torch.float32, layout.device) if dtype else None for _ in range(2)
        )
        self.layers = [self._layer(i) for i in range(layout.layers)]

    def _layer(self, i: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        scales: dict[str, Any] = {}
        if self.key_scales is not None and self.value_scales is not None:
            scales = {"k_scale": self.key_scales[i], "v_scale": self.value_scales[i]}
        return self.keys[i], self.values[i], scales

    @property
    def _tensors(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(x.nbytes for x in self._tensors)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that sequences hold now."""
        found = self.manager.statistics()
        return self.nbytes // found["blocks"] * found["used"]

    @property
    def capacity(self) -> int:
        """Tokens that fit in."""
        return self.manager.statistics()["blocks"] * self.page_size

    def append(self, sequence: int, tokens: Sequence[int]) -> list[int]:
        """Slots of the next tokens of a sequence; shared blocks are copied first where these will be written."""
        slots, copies = self.manager.append(sequence, tokens)
        for source, target in copies:
            for x in self._tensors:
                x[:, target] = x[:, source]
        return slots

    def batch(self, parts: Sequence[Part]) -> Batch:
        """One forward pass over the last tokens that were appended to each of several sequences."""
        tables, lengths = self.manager.tables([part.sequence for part in parts])
        seq_lens = torch.frombuffer(lengths, dtype=torch.int32)
        counts = _integers(len(part.tokens) for part in parts).to(torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32)
        total = int(ends[-1])
        # Of a token: its place in the batch, less the sequence's end in it, plus the sequence's length.
        positions = torch.arange(total, device="cpu") + (seq_lens - ends).repeat_interleave(counts, output_size=total)
        rows = [i for part, end in zip(parts, ends.tolist(), strict=True) for i in range(end - part.wanted, end)]
        tensors = (
            _integers(token for part in parts for token in part.tokens),
            positions,
            torch.cat((ends.new_zeros(1), ends)),
            torch.frombuffer(tables, dtype=torch.int32).view(len(parts), -1),
            seq_lens,
            _integers(slot for part in parts for slot in part.slots),
            _integers(rows),
        )
        return Batch(self, *(x.to(self.layout.device) for x in tensors))


def _integers(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
