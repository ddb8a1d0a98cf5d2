"""Products of the rows of each expert, beside PyTorch: a loop over the experts, and its grouped product.

Low-bit rivals get their weights dequantised outside the timing. mixture.py has the whole layer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metate.bench import mixture
from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.low_bit import stored_weight
from metate.op import Args, Case
from metate.ops.moe.grouped import linear_op, outer_op, quant_linear_op
from metate.ops.moe.reference import gather

BALANCED = [dict(linear_op.domain.sweep[0], T=T, N=N, K=K, gathered=False)
            for N, K in ((7168, 1024), (1024, 3584)) for T in (256, 1024)]  # fmt: skip
_STACKED = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets")


def workloads(compile: bool) -> list[Workload]:
    rivals = {"torch loop": loop, "torch._grouped_mm": grouped_mm}
    many = [case for case in outer_op.domain.sweep if case["T"] > 1 and case["gathered"]]
    return [
        *mixture.layers(),
        Workload("grouped linear", linear_op, linear_op.domain.sweep, rivals, call_op, linear_op.flops, label=label,
                 moved=moved),
        Workload("grouped linear, balanced", linear_op, BALANCED, {"torch dense product": dense_product}, call_op,
                 linear_op.flops, label=lambda case: f"{label(case)} balanced", placed=balanced),
        Workload("grouped linear, low-bit", quant_linear_op, quant_linear_op.domain.sweep, rivals, call_op,
                 quant_linear_op.flops, label=label, moved=moved),
        Workload("grouped outer (weight gradient)", outer_op, many,
                 {"torch loop": outer_loop}, call_op, outer_op.flops, label=label),
    ]  # fmt: skip


def label(case: Case) -> str:
    form = f" {case['bits']}-bit {case['form']}" if "bits" in case else ""
    return f"T{case['T']}·{case['k']} E{case['E']} N{case['N']} K{case['K']}{form}"


def balanced(args: Args) -> Args:
    """As many rows for every expert, and the same weight: what one dense product of all rows computes, too."""
    x, w, offsets, *rest = args
    experts = len(w)
    even = torch.arange(experts + 1, dtype=offsets.dtype, device=offsets.device) * (len(x) // experts)
    return x, w[:1].repeat(experts, 1, 1), even, *rest


def moved(setup: Setup) -> float:
    """Of the weights only those of experts that have rows."""
    idle = 0.0
    for named in setup.named:
        offsets = named["expert_offsets" if "codes" in named else "offsets"]
        share = float((offsets.diff() == 0).float().mean())
        stacked = [named[name] for name in ("w", *_STACKED, "bias") if named.get(name) is not None]
        idle += share * sum(t.nbytes for t in stacked if t is not offsets)
    return setup.op.bytes(setup.sets[0]) - idle / len(setup.sets)


def weights_of(setup: Setup, named: dict[str, Any]) -> Tensor:
    if "w" in named:
        weights: Tensor = named["w"]
        return weights
    numbers = [named[name] for name in ("bits", "group_size", "super_groups", "zero")]
    experts = (
        stored_weight(
            *(None if named[field] is None else named[field][e] for field in _STACKED),
            named["codebook"], *numbers, setup.case["K"],
        )
        for e in range(setup.case["E"])
    )  # fmt: skip
    return torch.stack([weight.to(setup.dtype) for weight in experts])


def dense(setup: Setup, named: dict[str, Any]) -> Tensor:
    """Once for all rivals."""
    if "dense" not in named:
        named["dense"] = weights_of(setup, named)
    weights: Tensor = named["dense"]
    return weights


def problems(setup: Setup) -> list[tuple[Tensor, Tensor | None, int, Tensor, Tensor]]:
    """x, order, k, weights and offsets of experts of every set of inputs."""
    return [
        (named["x"], named["order"], named["k"], dense(setup, named),
         named["expert_offsets" if "codes" in named else "offsets"])
        for named in setup.named
    ]  # fmt: skip


def _rival(sets: list[Any], call: Callable[..., Tensor]) -> Run:
    @torch.no_grad()
    def run(i: int) -> Tensor:
        return call(*sets[i % len(sets)])

    return run


def loop(setup: Setup) -> Run:
    def call(x: Tensor, order: Tensor | None, k: int, w: Tensor, offsets: Tensor) -> Tensor:
        rows = gather(x, order, k)
        out = x.new_zeros(rows.shape[0], w.shape[1])
        for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
            if stop > start:
                torch.mm(rows[start:stop], w[expert].T, out=out[start:stop])
        return out

    return _rival(problems(setup), call)


def grouped_mm(setup: Setup) -> Run:
    if not hasattr(torch, "_grouped_mm"):
        raise Skip("this torch has no _grouped_mm")
    return _rival(
        problems(setup),
        lambda x, order, k, w, offsets: torch._grouped_mm(gather(x, order, k), w.mT, offs=offsets[1:]),
    )


def dense_product(setup: Setup) -> Run:
    return _rival([(named["x"], named["w"][0]) for named in setup.named], F.linear)


def outer_loop(setup: Setup) -> Run:
    def call(a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, k: int) -> Tensor:
        rows = gather(b, order, k)
        out = a.new_zeros(offsets.shape[0] - 1, a.shape[1], b.shape[1])
        for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
            torch.mm(a[start:stop].T, rows[start:stop], out=out[expert])
        return out

    return _rival(list(setup.sets), call)
