"""The two operators on a paged cache, each with everything that is true of it whatever machine runs it."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.masks import AttentionMask, lengths_of, visible_pairs
from metate.op import Case, Domain, Op, loop_vmap
from metate.ops.paged_attention import reference, rules

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn, "scaled fp8": torch.float8_e4m3fn}
_WIDE = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_WORDS = {"B": "batch", "Sq": "queries", "Hq": "heads", "Hkv": "kv_heads", "D": "head_dim", "Dv": "value_dim"}
_CACHE = {
    "k_cache": "pages page_size Hkv D or pages page_size Hkv D/2",
    "v_cache": "pages page_size Hkv Dv or pages page_size Hkv Dv/2",
}
_SCALES = {"k_scale": "pages page_size Hkv", "v_scale": "pages page_size Hkv"}
_QUANTISED = (torch.int8, torch.uint8, torch.float8_e4m3fn)


# Cases. A sequence fills max_pages or less; `cache` names how keys and values are stored, absent: in the dtype of q.


def _case(B: int, Sq: int, max_pages: int, page_size: int, Hq: int, Hkv: int, D: int, Dv: int | None = None,
          **flags: Any) -> Case:  # fmt: skip
    return dict(B=B, Sq=Sq, max_pages=max_pages, page_size=page_size, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv or D, **flags)


CASES = [
    _case(1, 1, 1, 1, 1, 1, 1),
    _case(2, 3, 5, 3, 4, 2, 33, 17, window=(-1, 0)),
    _case(3, 1, 4, 16, 8, 2, 64),
    _case(2, 1, 3, 128, 4, 1, 128, window=(-1, 0)),
    _case(1, 65, 9, 16, 4, 2, 64, window=(-1, 0)),
    _case(2, 70, 7, 16, 2, 1, 40, window=(20, 0), left_pad=True),
    _case(2, 5, 130, 1, 6, 2, 32, softcap=4.0, sinks=True, window=(9, 1)),
    _case(2, 2, 40, 16, 4, 4, 80, alibi=1, return_column_sums=True, window=(-1, 0)),
    _case(2, 7, 6, 16, 4, 2, 48, alibi=2, sinks=True, left_pad=True, cache="int8"),
    _case(2, 6, 5, 16, 4, 2, 32, tree=True),
    _case(2, 40, 3, 32, 2, 2, 32, 64, tree=True, cache="int4"),
    _case(3, 30, 6, 8, 4, 2, 16, lengths=(1, 0, 25), window=(-1, 0), left_pad=True),
    _case(2, 50, 5, 16, 4, 1, 64, lengths=(9, 40), tree=True, return_column_sums=True, sinks=True),
    _case(1, 1, 20, 16, 16, 1, 576, 512, shared=True),
    _case(2, 2, 20, 16, 20, 1, 576, 512, shared=True, cache="scaled fp8", window=(-1, 0)),
    _case(2, 1, 33, 16, 16, 1, 576, 512, shared=True, lengths=(1, 0)),
    _case(1, 9, 30, 16, 4, 1, 512, window=(-1, 0)),
    _case(2, 3, 9, 64, 4, 2, 320, 264, cache="int4", softcap=4.0, sinks=True),
    _case(2, 1, 33, 16, 8, 2, 128, cache="int8"),
    _case(2, 4, 33, 16, 8, 2, 128, cache="int4", window=(-1, 0)),
    _case(3, 1, 9, 16, 4, 2, 24, cache="fp8", return_column_sums=True),
    _case(1, 3, 40, 16, 2, 2, 128, cache="scaled fp8", window=(100, 0)),
    _case(2, 3, 5, 16, 4, 2, 40, positions=True, window=(30, 5), alibi=1, sinks=2),
    _case(
        3, 70, 40, 16, 4, 2, 64, lengths=(30, 1, 37), positions=True, window=(90, 0), sinks=2, return_column_sums=True
    ),
    _case(2, 4, 9, 64, 4, 1, 320, positions=True, window=(200, 9), sinks=2, cache="int8"),
    _case(2, 3, 1, 16, 4, 2, 32, positions=True, window=(-1, 4), alibi=2),
    _case(2, 2, 1, 16, 4, 2, 32, positions=True, window=(30, -1)),
    _case(2, 1, 33, 16, 16, 8, 128),
    _case(2, 2, 11, 16, 16, 8, 128, cache="int8", window=(60, 0)),
    _case(2, 1, 9, 16, 24, 8, 128, cache="scaled fp8", left_pad=True),
    _case(2, 1, 50, 3, 12, 3, 200, 184, window=(90, 0)),
    _case(1, 2, 9, 16, 16, 8, 72, 80, window=(-1, 0), left_pad=True),
    _case(2, 3, 9, 16, 16, 2, 128, window=(-1, 0)),
    _case(0, 1, 2, 4, 2, 1, 8),
    _case(2, 0, 2, 4, 2, 1, 8),
    _case(2, 3, 0, 4, 2, 1, 8, sinks=True, return_column_sums=True),
]
SWEEP = [
    _case(B, 1, keys // 16, 16, 32, 8, 128, full=True, cache=cache)
    for B, keys in ((1, 2048), (1, 8192), (8, 8192), (32, 8192))
    for cache in (None, "int8", "int4", "fp8")
] + [
    _case(8, 1, 64, 128, 32, 8, 128, full=True),
    _case(8, 1, 64, 128, 32, 8, 128, full=True, cache="int8"),
    _case(8, 1, 512, 16, 32, 1, 576, 512, full=True, shared=True),
    _case(1, 128, 128, 16, 32, 8, 128, full=True, window=(-1, 0)),
    _case(1, 512, 256, 16, 32, 8, 128, full=True, window=(-1, 0)),
]


def draw(rng: Random) -> Case:
    """Any legal combination, small: of few queries and keys where heads are wide."""
    heads, store, wide = rng.choice([1, 2, 3]), rng.choice([None, None, *STORED]), rng.random() < 0.1
    even = 2 if store == "int4" else 1
    D, Dv = (even * rng.randint(1, most // even) for most in ((576, 512) if wide else (140, 140)))
    page_size = rng.choice([1, 3, 8, 16, 64])
    queries, keys = ([1, 1, 2, 5, 17], 100) if wide else ([0, 1, 1, 2, 5, 17, 64, 90], 400)
    case = _case(
        rng.randint(0, 3), rng.choice(queries), rng.randint(0, keys // page_size), page_size,
        heads * rng.choice([1, 2, 4, 8]), heads, D, min(D, Dv) if (shared := rng.random() < 0.2) else Dv,
    )  # fmt: skip
    case.update(cache=store, shared=shared, return_column_sums=rng.random() < 0.3)
    case["window"] = rng.choice([(-1, 0), (-1, -1), (rng.randint(0, 150), 0), (rng.randint(-1, 90), rng.randint(0, 9))])
    flags = dict(softcap=4.0, sinks=rng.choice([1, 2]), alibi=rng.choice([1, 2]))
    for name, value in (flags | dict.fromkeys(("left_pad", "tree", "positions", "full"), True)).items():
        if rng.random() < 0.2:
            case[name] = value
    if rng.random() < 0.3:
        cuts = sorted(rng.randint(0, case["Sq"]) for _ in range(case["B"]))
        case["lengths"] = tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))
    return case


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _cache(case: Case, D: int, dtype: torch.dtype, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Any]:
    """A cache with numbers in `rows` (pages, page_size) and NaN, or codes of no meaning, elsewhere; its scales."""
    x = _normal(generator, *rows.shape, case["Hkv"], D)
    store, scale = case.get("cache"), None
    if store is None:
        return x.masked_fill(~rows[..., None, None], float("nan")).to(dtype), None
    x, scale = reference.quantise(x, STORED[store], store != "fp8")
    if store == "fp8":
        return torch.where(rows[..., None, None], x.float(), float("nan")).to(x.dtype), None
    return x, scale.masked_fill(~rows[..., None], float("nan"))


def _attention_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    B, Sq, width, page_size, Hq = (case[name] for name in ("B", "Sq", "max_pages", "page_size", "Hq"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, pages = width * page_size, B * width + 2
    lens = torch.randint(min(Sq, keys), keys + 1, (B,), generator=generator, dtype=torch.int32)
    lens[: B if case.get("full") else 1] = keys
    table = torch.randperm(pages, generator=generator)[: B * width].view(B, width).to(torch.int32)
    used = torch.arange(keys).view(width, page_size) < lens[:, None, None]  # (B, width, page_size)
    rows = torch.zeros(pages, page_size, dtype=torch.bool)
    rows[table.long()] = used
    table[~used.any(2)] = -1
    k_cache, k_scale = _cache(case, case["D"], dtype, rows, generator)
    if case.get("shared"):  # values are the first columns of the keys, as in multi-head latent attention
        v_cache, v_scale = k_cache[..., : k_cache.shape[3] * case["Dv"] // case["D"]], k_scale
    else:
        v_cache, v_scale = _cache(case, case["Dv"], dtype, rows, generator)
    lengths, most = case.get("lengths"), Sq
    entries = 1 if lengths is not None else B
    if lengths is not None:
        most = max(lengths, default=0)
    left, right = case.get("window", (-1, -1))
    slopes = (B, Hq) if case.get("alibi") == 2 else (Hq,)
    sinks = (entries, Hq, Sq) if case.get("sinks") == 2 else (Hq,)
    return (
        _normal(generator, entries, Sq, Hq, case["D"]).to(dtype),
        k_cache, v_cache, table, lens, k_scale, v_scale,
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if lengths is not None else None,
        torch.randint(0, keys // 2 + 1, (B,), generator=generator, dtype=torch.int32) if case.get("left_pad") else None,
        0.1 * _normal(generator, *slopes).abs().to(wide) if "alibi" in case else None,
        _normal(generator, *sinks).to(wide) if case.get("sinks") else None,
        _tree(entries, Sq, most, generator) if case.get("tree") else None,
        torch.randint(-1, 2 * keys + 1, (entries, Sq), generator=generator, dtype=torch.int32)
        if case.get("positions")
        else None,
        case["D"] ** -0.5, left, right, case.get("softcap", 0.0), case.get("return_column_sums", False),
    )  # fmt: skip


def _tree(entries: int, rows: int, n: int, generator: torch.Generator) -> Tensor:
    bits = AttentionMask.dense(torch.rand(entries, 1, rows, n, generator=generator) < 0.6).bits
    assert bits is not None
    return bits[:, 0]


def _visible_pairs(case: Case) -> int:
    """(query, key) pairs of one head, where every sequence is full unless its keys are counted."""
    full = [case["max_pages"] * case["page_size"]] * case["B"]
    pairs = zip(case.get("lengths") or [case["Sq"]] * case["B"], case.get("keys") or full, strict=True)
    return sum(visible_pairs(n, keys, keys - n, *case.get("window", (-1, -1))) for n, keys in pairs)


def _sizes(named: Case) -> Case:
    """Of a call; what is not known of its sequences is as if they were full, and packed ones one."""
    lens, starts = named["seq_lens"], lengths_of(named["cu_seqlens_q"])
    known = type(lens) is Tensor and not lens.is_meta and (starts is not None or named["cu_seqlens_q"] is None)
    case = {**named, "window": (named["window_left"], named["window_right"]), "Dv": rules.numbers(named["v_cache"])}
    return {**case, "lengths": starts, "keys": lens.tolist()} if known else {**case, "B": named["q"].shape[0]}


paged_attention_op = Op(
    "paged_attention",
    reference.paged_attention,
    words=_WORDS,
    axes={
        "q": "B? Sq Hq D",
        **_CACHE,
        "block_table": "B max_pages",
        "seq_lens": "B",
        **_SCALES,
        "cu_seqlens_q": "B+1",
        "left_pad": "B",
        "alibi_slopes": "Hq or B Hq",
        "sinks": "Hq or B? Hq Sq",
        "tree_mask": "B? Sq words",
        "positions": "B? Sq",
    },
    dtypes={
        "q": FLOATS,
        "k_cache": ("q", *_QUANTISED),
        "v_cache": ("q", *_QUANTISED),
        "block_table": (torch.int32,),
        "seq_lens": (torch.int32,),
        "k_scale": (torch.float32,),
        "v_scale": (torch.float32,),
        "cu_seqlens_q": (torch.int32,),
        "left_pad": (torch.int32,),
        "alibi_slopes": _WIDE,
        "sinks": _WIDE,
        "tree_mask": (torch.int32,),
        "positions": (torch.int32,),
    },
    outputs={"out": "q", "lse": torch.float32, "sums": torch.float32},
    shapes=lambda q, k_cache, v_cache, block_table, seq_lens, *rest: (
        (*q.shape[:3], rules.numbers(v_cache)),
        (q.shape[0], q.shape[2], q.shape[1]),
        (block_table.shape[0], q.shape[2], block_table.shape[1] * k_cache.shape[1]) if rest[-1] else (0,),
    ),
    domain=Domain(_attention_inputs, CASES, SWEEP, draw, ("B", "Sq", "max_pages"), "B"),
    flops=lambda case: 2.0 * case["Hq"] * _visible_pairs(case) * (case["D"] + case["Dv"]),
    sizes=_sizes,
    autocast=("q",),
    storage="k_cache",
    vmap=loop_vmap,
    sharding=rules.shard_attention,
    validate=rules.validate_attention,
    refuses={
        "cpu": lambda q, *_: rules.refused_float64(q),
        "cuda": lambda q, k_cache, v_cache, *_: rules.refused_by_cuda(q, v_cache),
    },
    contents=("block_table seq_lens left_pad cu_seqlens_q positions", rules.check_attention),
    contents_in_kernel=True,
    gradient="it reads a cache, for inference; train with metate.attention",
)


# Appending.


def _append_case(tokens: int, pages: int, page_size: int, Hkv: int, D: int, Dv: int, **flags: Any) -> Case:
    return dict(tokens=tokens, pages=pages, page_size=page_size, Hkv=Hkv, D=D, Dv=Dv, **flags)


APPEND_CASES = [
    _append_case(1, 1, 1, 1, 1, 1),
    _append_case(7, 3, 5, 2, 33, 17),
    _append_case(65, 9, 16, 2, 128, 64, rotary=128),
    _append_case(9, 5, 3, 3, 40, 40, rotary=24, interleaved=True, skip=True),
    _append_case(33, 4, 16, 2, 64, 64, cache="int8", skip=True),
    _append_case(5, 4, 16, 2, 130, 70, cache="int8", rotary=66),
    _append_case(20, 3, 16, 2, 66, 34, cache="int4"),
    _append_case(20, 3, 16, 2, 72, 36, cache="fp8"),
    _append_case(3, 3, 8, 1, 64, 24, cache="scaled fp8", skip=True),
    _append_case(4, 2, 8, 1, 576, 0),
    _append_case(4, 2, 8, 1, 576, 0, keys_only=True),
    _append_case(5, 3, 8, 1, 66, 0, cache="int8", keys_only=True),
    _append_case(0, 2, 8, 1, 8, 8, cache="int8"),
    _append_case(3, 0, 8, 1, 8, 8, skip=True),
]
APPEND_SWEEP = [
    _append_case(tokens, max(tokens // 8, 4), 16, 8, 128, 128, rotary=128, cache=cache)
    for tokens in (32, 4096)
    for cache in (None, "int8", "int4", "fp8")
]


def draw_append(rng: Random) -> Case:
    store = rng.choice([None, None, *STORED])
    even, most = 2 if store == "int4" else 1, 576 if rng.random() < 0.1 else 140
    D = even * rng.randint(1, most // even)
    case = _append_case(
        rng.choice([0, 1, 2, 17, 64]), rng.randint(2, 9), rng.choice([1, 3, 16]), rng.choice([1, 2, 3]), D,
        even * rng.randint(0, min(most, 512) // even), skip=rng.random() < 0.5,
    )  # fmt: skip
    case.update(cache=store, keys_only=rng.random() < 0.2)
    if rng.random() < 0.4 and D > 1 and store not in ("int4", "fp8", "scaled fp8"):  # there a tie moves many bits
        case.update(rotary=2 * rng.randint(1, D // 2), interleaved=rng.random() < 0.5)
    return case


def _append_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    tokens, pages, page_size, heads = (case[name] for name in ("tokens", "pages", "page_size", "Hkv"))
    rows = torch.ones(pages, page_size, dtype=torch.bool)
    (k_cache, k_scale), (v_cache, v_scale) = (_cache(case, case[D], dtype, rows, generator) for D in ("D", "Dv"))
    slots = torch.full((tokens,), -1, dtype=torch.int64 if case.get("skip") else torch.int32)
    free = torch.randperm(pages * page_size, generator=generator)[:tokens].to(slots.dtype)
    slots[: free.shape[0]] = free
    if case.get("skip"):
        slots[torch.rand(tokens, generator=generator) < 0.3] = -1
    cos = sin = positions = None
    if rotary := case.get("rotary"):
        angle = 3 * _normal(generator, 50, rotary // 2)
        cos, sin = angle.cos(), angle.sin()
        positions = torch.randint(0, 50, (tokens,), generator=generator, dtype=slots.dtype)
    k, v = (_normal(generator, tokens, heads, case[D]).to(dtype) for D in ("D", "Dv"))
    values = (None, None, None) if case.get("keys_only") else (v, v_cache, v_scale)
    return (
        k, values[0], k_cache, values[1], slots, k_scale, values[2], cos, sin, positions, case.get("interleaved", False)
    )  # fmt: skip


append_op = Op(
    "append_kv",
    reference.append_kv,
    words=_WORDS | {"R": "rotary_dim / 2"},
    axes={
        "k": "tokens Hkv D",
        "v": "tokens Hkv Dv",
        **_CACHE,
        "slot_mapping": "tokens",
        **_SCALES,
        "rotary_cos": "positions R",
        "rotary_sin": "positions R",
        "positions": "tokens",
    },
    dtypes={
        "k": FLOATS,
        "v": ("k",),
        "k_cache": ("k", *_QUANTISED),
        "v_cache": ("k", *_QUANTISED),
        "slot_mapping": _INTEGERS,
        "k_scale": (torch.float32,),
        "v_scale": (torch.float32,),
        "rotary_cos": (torch.float32,),
        "rotary_sin": (torch.float32,),
        "positions": _INTEGERS,
    },
    outputs={"k_cache": "k_cache", "v_cache": "v_cache", "k_scale": "k_scale", "v_scale": "v_scale"},
    shapes=lambda k, v, k_cache, v_cache, slots, k_scale, v_scale, *_: tuple(
        (k.shape[0], *x.shape[2:]) for x in (k_cache, v_cache, k_scale, v_scale) if x is not None
    ),
    domain=Domain(_append_inputs, APPEND_CASES, APPEND_SWEEP, draw_append, ("tokens",), "tokens"),
    flops=lambda case: 4.0 * case["tokens"] * case["Hkv"] * (case["D"] + case["Dv"]),
    sizes=lambda named: {"Dv": 0, **named},
    autocast=("k", "v"),
    storage="k_cache",
    vmap=rules.refuse_vmap,
    sharding=rules.shard_append,
    validate=rules.validate_append,
    refuses=dict.fromkeys(("cpu", "cuda"), lambda k, *_: rules.refused_float64(k)),
    contents=("slot_mapping", rules.check_append),
    contents_in_kernel=True,
    gradient="it writes a cache, for inference; train with metate.attention",
    writes=True,
)
