"""Decoding from a paged cache, beside PyTorch on the same keys and values laid out contiguously; and writing one.

Rivals of decoding get the cache gathered (and, where it is quantised, decoded to the dtype of the queries) outside the
timing, with the query heads of a group as rows, so that no key is read twice. All caches lie where metate's own class
puts them: in large pages of the system.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import metate
from metate.bench import attention, ggml
from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.generate.cache import allocate
from metate.op import Args, Case
from metate.ops.paged_attention.declaration import append_op, paged_attention_op
from metate.ops.paged_attention.reference import decode

MOST_KEYS = 1 << 17  # of all sequences, that a rival gets a float32 copy of, and that a quick run draws


def workloads(compile: bool) -> list[Workload]:
    rivals = {"torch SDPA, gathered": sdpa, "torch naive, gathered": naive}
    if not torch.cuda.is_available():
        rivals["onnxruntime GroupQueryAttention, gathered, float32"] = onnxruntime
        rivals["openvino ScaledDotProductAttention, gathered"] = openvino
        rivals["ggml flash_attn_ext, gathered, float32 or float16"] = flash_attention
    chunk_rivals = {"torch SDPA, gathered": sdpa_chunk, "torch naive, gathered": naive_chunk}
    if not torch.cuda.is_available():
        chunk_rivals["ggml flash_attn_ext, gathered, float32 or float16"] = flash_attention_chunk
    if compile:
        rivals["torch flex_attention, compiled, gathered"] = flex
        chunk_rivals["torch flex_attention, compiled, gathered"] = flex_chunk
    sweep = paged_attention_op.domain.sweep if compile else list(filter(is_quick, paged_attention_op.domain.sweep))
    decoding = [case for case in sweep if case["Sq"] == 1]
    paged = [case for case in decoding if (case["B"], case["D"], case["page_size"]) == (8, 128, 16)]
    paging = [case for case in paged if compile and not case.get("cache")]
    return [
        Workload(
            "paged attention, shuffled pages of 16 beside others",
            paged_attention_op,
            paging,
            {"metate, shuffled pages of 128": in_pages(128), "metate, one page a sequence": in_pages(None)},
            call_op,
            flops=paged_attention_op.flops,
            label=label,
            checked=1,
            placed=in_large_pages,
        ),
        *(
            Workload(
                name,
                paged_attention_op,
                cases,
                others,
                call_op,
                flops=paged_attention_op.flops,
                label=label,
                checked=1,
                placed=in_large_pages,
                sets=sets,
            )
            for name, cases, others, sets in (
                ("paged attention, one query", [case for case in decoding if keys_of(case) <= MOST_KEYS], rivals, 2),
                # No processor's cache serves a second call of these, and two sets would not fit beside the rivals'.
                ("paged attention, one query", [case for case in decoding if keys_of(case) > MOST_KEYS], rivals, 1),
                ("paged attention, a chunk of a prompt", [case for case in sweep if case["Sq"] > 1], chunk_rivals, 2),
            )
        ),
        Workload(
            "append to a paged cache, rotated",
            append_op,
            [case for case in append_op.domain.sweep if not case.get("cache")],
            {"torch, eager": index_put},
            append,
            flops=append_op.flops,
            label=lambda case: f"tokens {case['tokens']} H{case['Hkv']} D{case['D']}",
            checked=2,
        ),
    ]


def keys_of(case: Case) -> int:
    keys: int = case["B"] * case["max_pages"] * case["page_size"]
    return keys


def is_quick(case: Case) -> bool:
    """Whether inputs and truth of a case take seconds: of large caches only the dtypes that are judged by speed."""
    return keys_of(case) <= 1 << 14 or (keys_of(case) <= MOST_KEYS and case.get("cache") in (None, "int8"))


def label(case: Case) -> str:
    keys = case["max_pages"] * case["page_size"]
    queries = f"queries {case['Sq']} " if case["Sq"] > 1 else ""
    pages = f"pages of {case['page_size']}" if case["page_size"] != 16 else ""
    parts = (f"B{case['B']} {queries}keys {keys} H{case['Hq']}/{case['Hkv']} D{case['D']}", case.get("cache"), pages)
    return " ".join(part for part in parts if part)


def large(x: Tensor) -> Tensor:
    return allocate(x.shape, x.dtype, x.device).copy_(x)


def in_large_pages(args: Args) -> Args:
    named = dict(zip(paged_attention_op.parameters, args, strict=True))
    shared = named["k_cache"].data_ptr() == named["v_cache"].data_ptr()
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if named[name] is not None:
            named[name] = large(named[name])
    if shared:
        named["v_cache"] = named["k_cache"][..., : named["v_cache"].shape[3]]
    return tuple(named.values())


def in_pages(page_size: int | None) -> Callable[[Setup], Run]:
    """The same call over the same keys in pages of another size, None: of a sequence's length."""

    def prepare(setup: Setup) -> Run:
        sets = []
        for named in setup.named:
            old = named["block_table"].long()
            sequences, keys = old.shape[0], old.shape[1] * named["k_cache"].shape[1]
            size = page_size or keys
            pages = sequences * keys // size
            table = (torch.randperm(pages) if page_size else torch.arange(pages)).view(sequences, -1).to(old.device)
            caches = {}
            for name in ("k_cache", "v_cache"):
                x = named[name]
                caches[name] = allocate((pages, size, *x.shape[2:]), x.dtype, x.device)
                for sequence, at in zip(old, table, strict=True):
                    caches[name][at] = x[sequence].view(-1, size, *x.shape[2:])
            sets.append(tuple({**named, **caches, "block_table": table.int()}.values()))
        return lambda i: setup.op(*sets[i % len(sets)])

    return prepare


def gathered(setup: Setup) -> attention.Sets:
    """q, k and v of full sequences: the one query as (batch, kv_heads, rows, dim), several as (batch, heads, queries,
    dim)."""
    found: attention.Sets | None = setup.shared.get("gathered")
    if found is not None:
        return found
    sets: attention.Sets = []
    for named in setup.named:
        q, pages = named["q"], named["block_table"].long()
        if not (named["seq_lens"] == setup.case["max_pages"] * setup.case["page_size"]).all():
            raise Skip("sequences of different lengths")
        k, v = (
            decode(named[f"{x}_cache"][pages], scale if scale is None else scale[pages], q.dtype).flatten(1, 2)
            for x, scale in (("k", named["k_scale"]), ("v", named["v_scale"]))
        )
        rows = q.view(q.shape[0], k.shape[2], -1, q.shape[3]) if q.shape[1] == 1 else q.transpose(1, 2).contiguous()
        sets.append((rows, large(k.transpose(1, 2)), large(v.transpose(1, 2))))
    setup.shared["gathered"] = sets
    return sets


def _rival(setup: Setup, call: Callable[..., Tensor]) -> Run:
    sets = gathered(setup)

    @torch.no_grad()
    def run(i: int) -> Tensor:
        out = call(*sets[i % len(sets)])
        return out.reshape(out.shape[0], 1, -1, out.shape[3])

    return run


def sdpa(setup: Setup) -> Run:
    return _rival(setup, F.scaled_dot_product_attention)


def naive(setup: Setup) -> Run:
    return _rival(setup, lambda q, k, v: (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1) @ v)


def flex(setup: Setup) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # past a number of recompilations it would run uncompiled
    return _rival(setup, torch.compile(flex_attention, dynamic=False))


def _cast(setup: Setup, dtype: torch.dtype) -> attention.Sets:
    if keys_of(setup.case) * dtype.itemsize > MOST_KEYS * torch.float32.itemsize:
        raise Skip("too much memory for another copy")
    return [tuple(large(x.to(dtype)) for x in tensors) for tensors in gathered(setup)]


def onnxruntime(setup: Setup) -> Run:
    """The cache holds all but the last key, which comes beside the query."""
    if setup.case["D"] != setup.case["Dv"]:
        raise Skip("keys and values of one dimension only")
    return attention.group_queries(_as_one_query(_cast(setup, torch.float32)), setup.case)


def _as_one_query(sets: attention.Sets) -> attention.Sets:
    return [(q.flatten(1, 2)[:, :, None], k, v) for q, k, v in sets]


def openvino(setup: Setup) -> Run:
    run = attention.scaled_products(_cast(setup, torch.float32), setup.dtype, causal=False)
    return lambda i: run(i).reshape(setup.case["B"], 1, setup.case["Hq"], -1)


def flash_attention(setup: Setup) -> Run:
    return ggml.flash_attention(_as_one_query(_cast(setup, attention.half_as_float16(setup.dtype))), None)


# A chunk of a prompt: causal, its last token is the last key.


def _chunk_rival(setup: Setup, call: Callable[..., Tensor]) -> Run:
    sets = gathered(setup)

    @torch.no_grad()
    def run(i: int) -> Tensor:
        out: Tensor = attention.back(call(*sets[i % len(sets)]), setup)
        return out

    return run


def _seen(setup: Setup) -> Tensor:
    """Which keys each query of a chunk sees."""
    q, k, _ = gathered(setup)[0]
    keys = k.shape[2]
    return torch.ones(q.shape[2], keys, dtype=torch.bool, device=q.device).tril(keys - q.shape[2])


def sdpa_chunk(setup: Setup) -> Run:
    seen = _seen(setup)
    return _chunk_rival(setup, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))


def naive_chunk(setup: Setup) -> Run:
    return _chunk_rival(setup, lambda q, k, v: attention.plain(q, k, v, None))


def flex_chunk(setup: Setup) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, k, _ = gathered(setup)[0]
    queries, keys = q.shape[2], k.shape[2]
    mask = create_block_mask(lambda b, h, i, j: j <= i + keys - queries, None, None, queries, keys, device=setup.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return _chunk_rival(setup, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True))


def flash_attention_chunk(setup: Setup) -> Run:
    sets = _cast(setup, attention.half_as_float16(setup.dtype))
    return ggml.flash_attention(sets, torch.zeros(()).masked_fill(~_seen(setup), -math.inf))


# Appending.


def append(setup: Setup, backend: str) -> Run:
    def run(i: int) -> tuple[Tensor, Tensor]:
        args, named = setup.sets[i % len(setup.sets)], setup.named[i % len(setup.sets)]
        with metate.use(backend):
            setup.op(*args)
        return named["k_cache"], named["v_cache"]

    return run


def index_put(setup: Setup) -> Run:
    def run(i: int) -> tuple[Tensor, Tensor]:
        named = setup.named[i % len(setup.sets)]
        cos, sin = (named[name][named["positions"]][:, None] for name in ("rotary_cos", "rotary_sin"))
        a, b = named["k"].float().chunk(2, -1)
        k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        for cache, x in ((named["k_cache"], k), (named["v_cache"], named["v"])):
            cache.flatten(0, 1)[named["slot_mapping"]] = x.to(cache.dtype)
        return named["k_cache"], named["v_cache"]

    return run
