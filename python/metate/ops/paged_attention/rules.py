"""What the operators on a paged cache refuse, and how they are batched and sharded."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.op import Op

MAX_HEAD_DIM, MAX_VALUE_DIM = 576, 512
Args = tuple[Any, ...]


def numbers(cache: Tensor) -> Any:
    """How many numbers a row of a cache holds."""
    return cache.shape[3] * (2 if cache.dtype == torch.uint8 else 1)


# Refusals.


def refused_float64(x: Tensor) -> str | None:
    return "float64: up to float32" if x.dtype == torch.float64 else None


def refused_by_cuda(q: Tensor, v_cache: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(q.dtype).removeprefix('torch.')}: bfloat16 or float16 (tensor cores)"
    width = max(q.shape[3], numbers(v_cache))
    if width > 256 and q.is_cuda:
        properties = torch.cuda.get_device_properties(q.device)
        if properties.shared_memory_per_block_optin < 163 * 1024:  # type: ignore[attr-defined]
            return f"head_dim {width}: up to 256 on a GPU with less than 163 KiB of shared memory a block"
    return None


def validate_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, cu_seqlens_q: Tensor | None, left_pad: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, bits: Tensor | None, positions: Tensor | None, scale: float, left: int, right: int,
    softcap: float, return_column_sums: bool,
) -> None:  # fmt: skip
    op = "paged_attention"
    entries = 1 if cu_seqlens_q is not None else block_table.shape[0]
    rows_of_sinks = sinks if sinks is not None and sinks.dim() == 3 else None
    for name, tensor in (("q", q), ("tree_mask", bits), ("positions", positions), ("sinks", rows_of_sinks)):
        if tensor is not None and tensor.shape[0] != entries and (name != "tree_mask" or tensor.shape[0] != 1):
            packed = "packed sequences" if cu_seqlens_q is not None else "that of block_table"
            expected = f"a first dimension of {entries}: {packed}"
            raise fail(op, name, f"of shape {tuple(tensor.shape)}", expected)
    D, heads, kv_heads = q.shape[3], q.shape[2], k_cache.shape[2]
    _validate_cache(op, "k_cache", k_cache, k_scale, q.dtype, D)
    _validate_cache(op, "v_cache", v_cache, v_scale, q.dtype, numbers(v_cache))
    if v_cache.dtype != k_cache.dtype or (v_scale is None) != (k_scale is None):
        got = f"{v_cache.dtype} {'without' if v_scale is None else 'with'} v_scale"
        raise fail(op, "v_cache", got, f"{k_cache.dtype} with or without scales as k_cache is", error=TypeError)
    for name, size, most in (("q", D, MAX_HEAD_DIM), ("v_cache", numbers(v_cache), MAX_VALUE_DIM)):
        if not 1 <= size <= most:
            raise fail(op, name, f"of head dimension {size}", f"1 to {most}")
    if heads % kv_heads if kv_heads else heads:
        layout = "(pages, page_size, kv_heads, head_dim)"
        raise fail(op, "q", f"of {heads} heads", f"a multiple of the {kv_heads} heads of k_cache {layout}")
    if bits is not None and cu_seqlens_q is None and bits.shape[2] != -(-q.shape[1] // 32):
        expected = f"{-(-q.shape[1] // 32)} for {q.shape[1]} queries"
        raise fail(op, "tree_mask", f"of {bits.shape[2]} words a row", expected)
    for name, tensor in (("alibi_slopes", slopes), ("sinks", sinks)):
        if tensor is not None and (tensor.dtype == torch.float64) != (q.dtype == torch.float64):
            wide = "float64" if q.dtype == torch.float64 else "float32"
            raise fail(op, name, tensor.dtype, f"{wide} beside {q.dtype}; convert it with .to()", error=TypeError)
    if not math.isfinite(scale):
        raise fail(op, "scale", scale, "a finite number")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise fail(op, "softcap", softcap, "0 (none) or a positive number")
    for name, value in (("window[0]", left), ("window[1]", right)):
        if value < -1:
            raise fail(op, name, value, "-1 (no limit) or a number of keys")


def _validate_cache(op: str, name: str, cache: Tensor, scale: Tensor | None, dtype: torch.dtype, columns: Any) -> None:
    """A cache holds `columns` numbers of a dtype, or quantised ones beside their scales."""
    if cache.shape[1] < 1:
        raise fail(op, name, f"of shape {tuple(cache.shape)}", "pages of at least 1 row")
    if numbers(cache) != columns:
        stored = f"{columns} columns" if cache.dtype != torch.uint8 else f"{columns} / 2 bytes, two 4-bit codes each"
        raise fail(op, name, f"of shape {tuple(cache.shape)}", f"a last dimension of {stored}")
    scales = name[0] + "_scale"
    if cache.dtype in (torch.int8, torch.uint8) and scale is None and cache.shape[3]:
        raise fail(op, scales, None, f"(pages, page_size, kv_heads) float32 beside a cache of {cache.dtype}")
    if cache.dtype == dtype and scale is not None:
        raise fail(op, scales, "given", f"None beside a cache of {cache.dtype}, which needs none")


def check_attention(*args: Any) -> None:
    """Contents, where looking costs little: on a CPU. Kernels on a GPU trust them."""
    _, k_cache, _, table, seq_lens, _, _, cu, left_pad, *_ = args
    if seq_lens.device.type != "cpu":
        return
    op, keys = "paged_attention", table.shape[1] * k_cache.shape[1]
    longest = 0
    if seq_lens.shape[0]:
        shortest, longest = least_and_most(seq_lens)
        if shortest < 0 or longest > keys:
            raise fail(op, "seq_lens", f"{shortest} to {longest}", f"0 to {keys}, what {table.shape[1]} pages hold")
    if longest:
        _check_pages(table[:, : -(-longest // k_cache.shape[1])], k_cache, seq_lens)
    if left_pad is not None and left_pad.shape[0] and int(left_pad.min()) < 0:
        raise fail(op, "left_pad", int(left_pad.min()), "at least 0")
    positions = args[12]
    if positions is not None and positions.numel():
        least, most = least_and_most(positions)
        if max(-least, most) >= 1 << 28:
            raise fail(op, "positions", f"{least} to {most}", "numbers between -2**28 and 2**28")
    if cu is not None:
        starts = cu.tolist()
        if starts != sorted(starts):
            raise fail(op, "cu_seqlens_q", starts if len(starts) < 20 else "decreasing", "non-decreasing offsets")
        tokens = args[0].shape[1]
        if starts and not (starts[0] >= 0 and starts[-1] <= tokens):
            raise fail(op, "cu_seqlens_q", f"{starts[0]} to {starts[-1]}", f"offsets within 0 to {tokens} tokens")
        bits = args[11]
        most = max((b - a for a, b in pairwise(starts)), default=0)
        if bits is not None and most > 32 * bits.shape[2]:
            expected = f"{-(-most // 32)} for {most} queries of a sequence"
            raise fail(op, "tree_mask", f"of {bits.shape[2]} words a row", expected)


def least_and_most(x: Tensor) -> tuple[int, int]:
    """The least and the largest of some whole numbers. A few of them are looked at sooner than torch is called."""
    if x.numel() > 64:
        least, most = x.aminmax()
        return int(least), int(most)
    values = x.flatten().tolist()
    return min(values), max(values)


def _check_pages(table: Tensor, k_cache: Tensor, seq_lens: Tensor) -> None:
    pages = k_cache.shape[0]
    least, most = least_and_most(table)
    if least >= 0 and most < pages:
        return
    first = torch.arange(table.shape[1], device=table.device) * k_cache.shape[1]
    wrong = ((table < 0) | (table >= pages)) & (first < seq_lens[:, None])
    if wrong.any():
        b, p = (int(i) for i in wrong.nonzero()[0])
        expected = f"a page from 0 to {pages - 1}: sequence {b} has {int(seq_lens[b])} keys"
        raise fail("paged_attention", f"block_table[{b}, {p}]", int(table[b, p]), expected)


def validate_append(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    op = "append_kv"
    _validate_cache(op, "k_cache", k_cache, k_scale, k.dtype, k.shape[2])
    if v is not None and v_cache is not None:
        _validate_cache(op, "v_cache", v_cache, v_scale, v.dtype, v.shape[2])
        if v_cache.dtype != k_cache.dtype:
            raise fail(op, "v_cache", v_cache.dtype, f"{k_cache.dtype} as k_cache", error=TypeError)
    elif v is not None or v_cache is not None or v_scale is not None:
        name = next(name for name, x in (("v", v), ("v_cache", v_cache), ("v_scale", v_scale)) if x is not None)
        raise fail(op, name, "given", "v and v_cache, or neither of them nor v_scale: keys only", error=TypeError)
    if not (cos is None) == (sin is None) == (positions is None):
        got = "given without rotary_sin and positions, or they without it"
        raise fail(op, "rotary_cos", got, "all three or none")
    if cos is not None and 2 * cos.shape[1] > k.shape[2]:
        raise fail(op, "rotary_cos", f"of {cos.shape[1]} columns", f"at most half of the {k.shape[2]} columns of k")


def check_append(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    op = "append_kv"
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
            raise fail(op, name, "expanded (a stride of 0)", "memory of its own for every element; use .contiguous()")
    if v_cache is not None and _are_shared(k_cache, v_cache):
        raise fail(op, "v_cache", "the memory of k_cache", "memory of its own, or v and v_cache None: keys only")
    if slots.device.type != "cpu" or not slots.shape[0]:
        return
    order = slots.sort().values
    rows = k_cache.shape[0] * k_cache.shape[1]
    if int(order[0]) < -1 or int(order[-1]) >= rows:
        raise fail(op, "slot_mapping", f"{int(order[0])} to {int(order[-1])}", f"-1 (skip) or 0 to {rows - 1}")
    twice = (order[1:] == order[:-1]) & (order[1:] >= 0)
    if twice.any():
        raise fail(op, "slot_mapping", f"{int(order[1:][twice][0])} twice", "every slot at most once")
    if positions is not None and cos is not None:
        least, most = (int(x) for x in positions.aminmax())
        if least < 0 or most >= cos.shape[0]:
            raise fail(op, "positions", f"{least} to {most}", f"0 to {cos.shape[0] - 1}, the rows of rotary_cos")


def _are_shared(a: Tensor, b: Tensor) -> bool:
    """Whether caches begin with the same element, or share one while strides are equal, as of parts of one tensor."""
    if not a.numel() or not b.numel():
        return False
    if a.stride() != b.stride():
        return a.data_ptr() == b.data_ptr()
    dims = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)

    def are_apart_by(elements: int, dims: list[tuple[int, int, int]]) -> bool:
        if not dims:
            return elements == 0
        stride, of_a, of_b = dims[0]
        below = elements // max(stride, 1)
        return any(
            -of_a < steps < of_b and are_apart_by(elements - steps * stride, dims[1:]) for steps in (below, below + 1)
        )

    elements, rest = divmod(a.data_ptr() - b.data_ptr(), a.element_size())
    return not rest and are_apart_by(elements, dims)


# Batching and sharding.


def refuse_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> Any:
    raise NotImplementedError(
        f"metate.{op.name}: no vmap: it writes into its arguments; call it once with all tokens of the batch"
    )


def shard_attention(op: Op, args: Args) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Over heads; over sequences, which share the pages."""
    named = dict(zip(op.parameters, args, strict=False))
    sums = ["sums"] if named["return_column_sums"] else []
    slopes = named["alibi_slopes"]
    sinks = named["sinks"]
    heads = {"q": 2, "k_cache": 2, "v_cache": 2, "k_scale": 2, "v_scale": 2}
    heads["sinks"] = 1 if sinks is not None and len(sinks.shape) == 3 else 0
    if slopes is not None:
        heads["alibi_slopes"] = len(slopes.shape) - 1
    split = [({"out": 2, "lse": 1, **dict.fromkeys(sums, 1)}, _given(named, heads))]
    if named["cu_seqlens_q"] is None:
        batch = {"q": 0, "block_table": 0, "seq_lens": 0, "left_pad": 0, "positions": 0}
        if slopes is not None and len(slopes.shape) == 2:
            batch["alibi_slopes"] = 0
        if sinks is not None and len(sinks.shape) == 3:
            batch["sinks"] = 0
        if named["tree_mask"] is not None and named["tree_mask"].shape[0] != 1:
            batch["tree_mask"] = 0
        split.append((dict.fromkeys(["out", "lse", *sums], 0), _given(named, batch)))
    return split


def shard_append(op: Op, args: Args) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Over heads."""
    named = dict(zip(op.parameters, args, strict=False))
    return [({}, _given(named, {"k": 1, "v": 1, "k_cache": 2, "v_cache": 2, "k_scale": 2, "v_scale": 2}))]


def _given(named: dict[str, Any], dims: dict[str, int]) -> dict[str, int]:
    return {name: dim for name, dim in dims.items() if named[name] is not None}
