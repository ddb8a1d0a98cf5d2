"""Paged attention in Triton: launchers with the parameters of the declared operators."""

import math
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from ..shared import launch, refusal
from .append import append_kernel
from .attend import attend_kernel, merge_kernel, sums_kernel
from .problem import FARTHEST

SPLIT = 256  # keys of the shortest split; a multiple of every BLOCK_N
PROGRAMS = 1 << 14  # as many as keep any GPU busy: with more, each takes several splits

_FORMATS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "float8"}


def _format(cache: Tensor) -> str:
    return _FORMATS.get(cache.dtype, "plain")


def _cache(cache: Tensor) -> tuple[Any, ...]:
    """A cache as kernels take it: float8 as bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache, *cache.stride()


def _scale(scale: Tensor | None) -> tuple[Any, ...] | None:
    return None if scale is None else (scale, *scale.stride())


def _sinks(sinks: Tensor | None) -> tuple[Any, ...] | None:
    """With strides of batch, head and query."""
    if sinks is None:
        return None
    return sinks, *(sinks.stride() if sinks.dim() == 3 else (0, sinks.stride(0), 0))


def _bits(bits: Tensor | None) -> tuple[Any, ...] | None:
    if bits is None:
        return None
    batch, row, word = bits.stride()
    return bits, batch * (bits.shape[0] > 1), row, word, bits.shape[2]


def _parts(dim: int) -> tuple[int, int]:
    """A width as a power of 2 and another one after it, or 0: 576 = 512 + 64 and 96 = 64 + 32, but 100 in 128."""
    whole = max(16, triton.next_power_of_2(dim))
    if whole > 32 and dim > whole // 2:
        rest = max(16, triton.next_power_of_2(dim - whole // 2))
        if rest < whole // 2:
            return whole // 2, rest
    return whole, 0


def _rows_of_a_block(q: Tensor, rows: int, width: int, packed: bool) -> int:
    """Of packed sequences one may be long and its neighbours not: their results must not tell."""
    largest = max(16, min(64, 8192 // (width * q.element_size())))
    return largest if packed else min(largest, max(16, triton.next_power_of_2(rows)))


_PARAMETERS = (
    *("q", "k_cache", "v_cache", "block_table", "seq_lens", "k_scale", "v_scale", "cu_seqlens_q", "left_pad"),
    *("alibi_slopes", "sinks", "tree_mask", "positions", "scale", "window_left", "window_right", "softcap"),
    "return_column_sums",
)


def paged_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = SimpleNamespace(**dict(zip(_PARAMETERS, arguments, strict=True)))
    problem = _problem(call)
    q, sequences, heads, capacity = call.q, problem["sequences"], problem["heads"], problem["capacity"]
    batch, tokens = q.shape[:2]
    out = q.new_empty(batch, tokens, heads, problem["VALUE_DIM"])
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    sums = q.new_empty((sequences, heads, capacity) if call.return_column_sums else 0, dtype=torch.float32)
    softmax = q.new_empty((2, *lse.shape), dtype=torch.float32) if sums.numel() else (None, None)
    problem |= {"out": out, "lse": lse, "peaks": softmax[0], "shares": softmax[1], "sums": sums}
    if call.cu_seqlens_q is not None:  # tokens of no sequence are nobody's
        out.zero_()
        lse.fill_(-math.inf)
    if sequences and lse.numel():
        _attend(problem)
    if sums.numel():

        def grid(chosen: dict[str, Any]) -> tuple[int]:
            return (sequences * heads * triton.cdiv(capacity, chosen["BLOCK_N"]),)

        launch(sums_kernel, grid, {**problem, "BLOCK_M": 16}, q)
    return out, lse, sums


def _problem(call: SimpleNamespace) -> dict[str, Any]:
    """The arguments that say which keys there are, who sees them, and what makes scores."""
    q, k_cache, table, slopes = call.q, call.k_cache, call.block_table, call.alibi_slopes
    sequences, pages = table.shape
    capacity = pages * k_cache.shape[1]
    heads, dim, kv_heads = q.shape[2], q.shape[3], k_cache.shape[2]
    natural = q.dtype == torch.float32
    unit = 1.0 if natural else math.log2(math.e)
    unlimited = q.shape[1] + capacity + (0 if call.positions is None else FARTHEST.value)
    if slopes is not None:
        slopes = (slopes.contiguous(), heads * (slopes.dim() == 2 and slopes.shape[0] > 1))
    value_dim = call.v_cache.shape[3] * (2 if call.v_cache.dtype == torch.uint8 else 1)
    block_d, rest = _parts(dim)
    return {
        "q": q,
        "q_strides": q.stride(),
        "k": _cache(k_cache),
        "v": _cache(call.v_cache),
        "k_scale": _scale(call.k_scale),
        "v_scale": _scale(call.v_scale),
        "table": (table, *table.stride(), pages, k_cache.shape[0]),
        "seq_lens": call.seq_lens.contiguous(),
        "cu_seqlens_q": None if call.cu_seqlens_q is None else call.cu_seqlens_q.contiguous(),
        "left_pad": None if call.left_pad is None else call.left_pad.contiguous(),
        "slopes": slopes,
        "sinks": _sinks(call.sinks),
        "bits": _bits(call.tree_mask),
        "positions": None if call.positions is None else (call.positions, *call.positions.stride()),
        "sequences": sequences,
        "tokens": q.shape[1],
        "capacity": capacity,
        "heads": heads,
        "kv_heads": kv_heads,
        "group": heads // max(kv_heads, 1),
        "page_size": k_cache.shape[1],
        "left": unlimited if call.window_left < 0 else min(call.window_left, unlimited),
        "right": unlimited if call.window_right < 0 else min(call.window_right, unlimited),
        "inner": call.scale / call.softcap if call.softcap > 0 else call.scale * unit,
        "outer": call.softcap * unit,
        "CAP": call.softcap > 0,
        "NATURAL": natural,
        "FORMAT": _format(k_cache),
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_d,
        "REST": rest,
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }


def _attend(arguments: dict[str, Any]) -> None:
    q, out, packed = arguments["q"], arguments["out"], arguments["cu_seqlens_q"] is not None
    names = ("sequences", "tokens", "group", "kv_heads", "capacity")
    sequences, tokens, group, kv_heads, capacity = (arguments[name] for name in names)
    rows = tokens * group
    block = _rows_of_a_block(q, rows, max(arguments["BLOCK_D"], arguments["BLOCK_V"]), packed)
    slots = kv_heads * (rows // block + sequences if packed else sequences * triton.cdiv(rows, block))
    shortest = max(SPLIT, 16 * triton.next_power_of_2(group))  # what a split leaves behind grows with the group
    most = triton.cdiv(capacity, shortest)
    at_once = max(1, min(most, triton.cdiv(PROGRAMS, max(slots, 1))))
    most_of_one = most if packed else triton.cdiv(most, triton.cdiv(rows, 64)) if rows else 0
    rows *= 1 if packed else sequences
    partials = min(rows * most, 64 * most * sequences + rows) if most_of_one > 1 else 0
    entries = kv_heads * partials
    partial = {name: q.new_empty(entries, dtype=torch.float32) for name in ("partial_total", "partial_peak")}
    partial["partial_acc"] = q.new_empty(entries * arguments["VALUE_DIM"], dtype=torch.float32)
    arguments |= {**partial, "shortest": shortest, "most": most, "at_once": at_once, "BLOCK_M": block}
    if slots:
        launch(attend_kernel, (slots * at_once,), arguments, q)
    if partials:
        launch(merge_kernel, (out.shape[0] * tokens * out.shape[2],), {**arguments, "BLOCK_S": 16}, q)


def append_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    tokens, heads, dim = k.shape
    if v is None or v_cache is None:
        v, v_cache = k[..., :0], k_cache[..., :0]
    value_dim = v.shape[2]
    if not k.numel() and not v.numel():
        return
    rotated = cos.shape[1] * 2 if cos is not None else 0
    arguments = {
        "k": (k, *k.stride()),
        "v": (v, *v.stride()),
        "k_cache": _cache(k_cache),
        "v_cache": _cache(v_cache),
        "k_scale": _scale(k_scale),
        "v_scale": _scale(v_scale),
        "slot_mapping": slot_mapping.contiguous(),
        "rotation": None if cos is None or sin is None else (cos, *cos.stride(), sin, *sin.stride()),
        "positions": None if positions is None else positions.contiguous(),
        "heads": heads,
        "page_size": k_cache.shape[1],
        "INTERLEAVED": interleaved,
        "FORMAT": _format(k_cache),
        "ROTATED": rotated,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK": max(16, triton.next_power_of_2(max(dim, value_dim))),
    }
    launch(append_kernel, (tokens * heads,), arguments, k)


def _refusal(q: Tensor, *caches: Tensor | None) -> str | None:
    """What the kernels do not do."""
    if reason := refusal(q):
        return reason
    given = [cache for cache in caches if cache is not None]
    width = max(q.shape[-1], *(cache.shape[-1] * (2 if cache.dtype == torch.uint8 else 1) for cache in given))
    return f"head_dim {width}: up to 1024" if width > 1024 else None


def _refuses_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *rest: Any) -> str | None:
    positions = max(q.shape[0] * q.shape[1] * q.shape[2], block_table.shape[1] * k_cache.shape[1] + q.shape[1])
    if positions >= 2**30:
        return f"{positions} rows of queries or positions of keys: fewer than 2**30, they are int32"
    return _refusal(q, k_cache, v_cache)


REFUSES = {
    "paged_attention": _refuses_attention,
    "append_kv": lambda k, v, k_cache, v_cache, *rest: _refusal(k, k_cache, v_cache),
}
