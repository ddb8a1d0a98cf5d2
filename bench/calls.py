"""What a call costs: every public function on a shape so small that its kernel is the least of it, beside torch's own.

These are times of the way from Python to a kernel and back; no limit of the machine is near.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import metate
from metate import QuantizedWeight
from metate.bench import mixture
from metate.bench.run import Run, Setup, Skip, Workload
from metate.op import REGISTRY

Call = Callable[[], Any]
Prepare = Callable[[Any], Call]  # of an operator's arguments, by name

NAME = "a call"
WEIGHT = dict(N=64, K=64, form="codebook")
ROWS = dict(k=2, E=8, D=64)
CODES = dict(M=8, bits=8)
SIZES: dict[str, dict[str, Any]] = {  # beside those of the operators' first cases
    "attention": dict(D=64, Dv=64),
    "merge_attention_states": dict(n=2, Dv=64),
    "paged_attention": dict(page_size=16, D=64, Dv=64),
    "append_kv": dict(page_size=16, D=64, Dv=64),
    "quant_linear": WEIGHT,
    "lora_linear": dict(**WEIGHT, rank=8),
    "moe_topk": dict(E=8, k=2),
    "moe_sort": ROWS,
    "moe_permute": ROWS,
    "moe_unpermute": ROWS,
    "grouped_linear": dict(N=64, K=64),
    "gated_activation": dict(C=128, layout=0),
    "pq_distance_tables": dict(**CODES, d=8),
    "pq_encode": dict(M=8, d=8),
    "pq_decode": dict(**CODES, d=8),
    "pq_scan": dict(**CODES, n=8),
    "topk_distances": dict(n=64, D=64),
    "ivf_search": dict(n=64, lists=4, D=64),
}


def workloads(compile: bool) -> list[Workload]:
    layer = mixture.layers()[0]
    rivals = {name: rival for name, rival in layer.rivals.items() if name == "transformers eager"}
    tiny = dict(T=1, k=2, E=8, N=16, K=16, form="dense")
    of_layer = dataclasses.replace(
        layer, name=NAME, cases=[tiny], rivals=rivals, dtypes=(torch.float32,), label=lambda case: "moe_mlp", call=True
    )
    return [*map(workload, SIZES), of_layer]


def workload(name: str) -> Workload:
    op = REGISTRY[name]
    return Workload(
        NAME,
        op,
        [{**op.domain.cases[0], **SIZES[name]}],
        {rival: partial(_run, prepare) for rival, prepare in RIVALS.get(name, {}).items()},
        lambda setup, backend: _ours(OURS[name], setup, backend),
        op.flops,
        dtypes=(torch.float32,),
        label=lambda case: op.public if op.public != "moe_topk" else "moe_route",
        sets=1,
        call=True,
    )


def _run(prepare: Prepare, setup: Setup) -> Run:
    call = prepare(SimpleNamespace(**setup.named[0]))
    return lambda i: call()


def _ours(prepare: Prepare, setup: Setup, backend: str) -> Run:
    if backend != next(iter(setup.op.implementations(setup.device))):
        raise Skip("the first choice alone is timed")
    return _run(prepare, setup)


def _weight(a: Any) -> QuantizedWeight:
    names = ("scales", "super_scales", "super_groups", "zero", "zeros", "offsets", "super_offsets", "codebook")
    rest = {name: getattr(a, name) for name in (*names, "permutation")}
    return QuantizedWeight((a.codes.shape[0], a.x.shape[1]), a.bits, a.group_size, a.codes, **rest)


def _append(a: Any) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        metate.append_kv(a.k, a.v, a.k_cache, a.v_cache, a.slot_mapping)
        return a.k_cache, a.v_cache

    return call


def _route(a: Any) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        route = metate.moe_route(a.logits, a.top_k)
        return route.weights, route.experts

    return call


OURS: dict[str, Prepare] = {
    "attention": lambda a: partial(metate.attention, a.q, a.k, a.v),
    "merge_attention_states": lambda a: partial(metate.merge_attention_states, a.outs, a.lses),
    "paged_attention": lambda a: partial(metate.paged_attention, a.q, a.k_cache, a.v_cache, a.block_table, a.seq_lens),
    "append_kv": _append,
    "quant_linear": lambda a: partial(metate.quant_linear, a.x, _weight(a)),
    "lora_linear": lambda a: partial(metate.lora_linear, a.x, _weight(a), a.A, a.B, scaling=a.scaling),
    "moe_topk": _route,
    "moe_sort": lambda a: partial(metate.moe_sort, a.experts, a.num_experts),
    "moe_permute": lambda a: partial(metate.moe_permute, a.x, a.order, a.k),
    "moe_unpermute": lambda a: partial(metate.moe_unpermute, a.y, a.inverse, a.weights),
    "grouped_linear": lambda a: partial(metate.grouped_linear, a.x, a.w, a.offsets),
    "gated_activation": lambda a: partial(metate.gated_activation, a.x),
    "pq_distance_tables": lambda a: partial(metate.pq_distance_tables, a.queries, a.codebooks),
    "pq_encode": lambda a: partial(metate.pq_encode, a.x, a.codebooks),
    "pq_decode": lambda a: partial(metate.pq_decode, a.codes, a.codebooks),
    "pq_scan": lambda a: partial(metate.pq_scan, a.tables, a.codes, a.k),
    "topk_distances": lambda a: partial(metate.topk_distances, a.queries, a.base, a.k),
    "ivf_search": lambda a: partial(metate.ivf_search, a.queries, a.centroids, a.extents, a.rows, a.k),
}

# Rivals: torch's own functions where it has one that does the same, at most a few where it has none.


def _sdpa(a: Any) -> Call:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (a.q, a.k, a.v))
    return lambda: F.scaled_dot_product_attention(q, k, v).view(a.q.shape)  # one query: the same order


def _gathered(a: Any) -> Call:
    length = int(a.seq_lens[0])
    k, v = (x[a.block_table[0]].flatten(0, 1)[:length].movedim(0, 1)[None] for x in (a.k_cache, a.v_cache))
    q = a.q.transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(q, k, v).view(a.q.shape)


def _index_put(a: Any) -> Call:
    k_cache, v_cache, slots = a.k_cache.flatten(0, 1), a.v_cache.flatten(0, 1), (a.slot_mapping.long(),)

    def call() -> tuple[Tensor, Tensor]:
        k_cache.index_put_(slots, a.k)
        v_cache.index_put_(slots, a.v)
        return a.k_cache, a.v_cache

    return call


def _linear(a: Any) -> Call:
    return partial(F.linear, a.x, _weight(a).dequantize())


def _low_rank(a: Any) -> Call:
    weight, A, B = _weight(a).dequantize(), a.A[0], (a.scaling * a.B)[0]
    return lambda: F.linear(a.x, weight) + F.linear(F.linear(a.x, A), B)


def _silu(a: Any) -> Call:
    gate, up = a.x.chunk(2, -1)
    return lambda: F.silu(gate) * up


RIVALS: dict[str, dict[str, Prepare]] = {
    "attention": {"torch SDPA": _sdpa},
    "paged_attention": {"torch SDPA, gathered": _gathered},
    "append_kv": {"torch index_put": _index_put},
    "quant_linear": {"torch linear, dense": _linear},
    "lora_linear": {"torch linear, dense": _low_rank},
    "moe_topk": {"torch softmax, topk": lambda a: lambda: a.logits.softmax(-1).topk(a.top_k)},
    "moe_permute": {"torch index_select": lambda a: partial(torch.index_select, a.x, 0, a.order // a.k)},
    "grouped_linear": {"torch linear": lambda a: partial(F.linear, a.x, a.w[0])},
    "gated_activation": {"torch silu, mul": _silu},
}
