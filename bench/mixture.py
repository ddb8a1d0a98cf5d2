"""A layer of experts, as Mixtral has them, forward and training, beside transformers and ggml.

The route is given: every contender takes the tokens, their experts and the weights of these. A set of inputs holds
several problems for the same weights, so that few tokens come round to all experts and no cache serves the next call.
Weights lie in large pages of the system, as layers of metate.nn hold them, for every contender.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metate
from metate import QuantizedExperts, QuantizedWeight
from metate.bench import ggml
from metate.bench.run import Run, Setup, Skip, Workload
from metate.low_bit import int8_activations
from metate.memory import in_large_pages
from metate.op import REGISTRY, Args, Case
from metate.ops.moe import Route
from metate.quant import quantize_nf4

PROBLEMS = 16  # tokens of all problems, at least
FORMS = ("dense", "nf4", "int4")

Weights = Tensor | QuantizedExperts


def layers() -> list[Workload]:
    forward, training = Layer("moe_mlp"), Training("moe_mlp, forward and backward")
    rounded = Rounded("moe_mlp, int8 activations")
    rivals = {
        "transformers eager": lambda setup: transformers(setup, "eager"),
        "transformers grouped_mm": lambda setup: transformers(setup, "grouped_mm"),
    }
    cases = [dict(T=T, k=2, E=8, N=3584, K=1024, form=form) for form in FORMS for T in (1, 16, 256)]
    several = [case for case in cases if case["T"] > 1 and case["form"] == "dense"]
    low_bit = [case for case in cases if case["form"] == "int4"]
    product = {"ggml mul_mat_id": mul_mat_id}
    return [
        Workload(forward.name, forward, cases, rivals | product, ours, flops, label=label, moved=forward.moved, sets=1),  # type: ignore[arg-type]
        Workload(rounded.name, rounded, low_bit, product, ours, flops, label=label, moved=rounded.moved, sets=1),  # type: ignore[arg-type]
        Workload(training.name, training, several, rivals, train_ours, lambda case: 3 * flops(case), label=label,  # type: ignore[arg-type]
                 moved=training.moved, sets=1),
    ]  # fmt: skip


def label(case: Case) -> str:
    return "T{T}·{k} E{E} inner {N} hidden {K} {form}".format(**case)


def flops(case: Case) -> float:
    return float(6 * case["T"] * case["k"] * case["N"] * case["K"])


@lru_cache(maxsize=2)  # of a layer: its truths and its rivals share them
def dequantized(weights: QuantizedExperts) -> Tensor:
    """Of experts that `draw` made."""
    return turned(weights[0].dequantize(), len(weights))


def dense(weights: Weights) -> Tensor:
    return weights if isinstance(weights, Tensor) else dequantized(weights)


def turned(one: Tensor, experts: int) -> Tensor:
    """A stack in which every expert begins with another row."""
    return torch.stack([one.roll(expert, 0) for expert in range(experts)])


def draw(form: str, generator: torch.Generator, E: int, N: int, K: int) -> Weights:
    """Weights of variance 1 / columns: one expert's, `turned` for the others."""
    rows = torch.randn(N, K, generator=generator) * K**-0.5
    if form == "dense":
        return turned(rows, E)
    if form == "nf4":
        weight = quantize_nf4(rows)
    else:
        codes = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
        scales = (rows[:, ::32].abs() / 4).half()  # as q4_0 of GGUF has them
        weight = QuantizedWeight((N, K), 4, 32, codes, scales, zero=8)
    rows_of = {name: t for name, t in weight.tensors.items() if name != "codebook"}
    return QuantizedExperts.stack(
        [replace(weight, **{name: t.roll(expert, 0) for name, t in rows_of.items()}) for expert in range(E)]
    )


@dataclass(frozen=True)
class Layer:
    """What the benchmark asks of an operator, of a whole layer."""

    name: str
    parameters = ("x", "experts", "weights", "w_gate_up", "w_down")
    outputs = ("out",)

    def example(self, case: Case, dtype: torch.dtype, device: str, seed: int) -> Args:
        generator = torch.Generator().manual_seed(seed)
        T, E, K = case["T"], case["E"], case["K"]
        count = max(2, PROBLEMS // T)
        scores, experts = torch.rand(count, T, E, generator=generator).topk(case["k"])
        args = (
            torch.randn(count, T, K, generator=generator).to(dtype), experts.int(), scores.softmax(-1),
            draw(case["form"], generator, E, 2 * case["N"], K), draw(case["form"], generator, E, K, case["N"]),
        )  # fmt: skip
        moved = (a.to(dtype) if isinstance(a, Tensor) and a.dim() == 3 and a.shape[0] == E else a for a in args)
        return tuple(in_large_pages(a.to(device)) if isinstance(a, Tensor) else a.to(device) for a in moved)

    def implementations(self, device: str) -> dict[str, Any]:
        return REGISTRY["grouped_linear"].implementations(device)

    def refusal(self, backend: str, args: Args) -> str | None:
        x, offsets = args[0][0], torch.zeros(len(args[3]) + 1, dtype=torch.int32)
        return REGISTRY["grouped_linear"].refusal(backend, (x, x[None], offsets, None, None, 1))

    def sharding(self, op: Any, args: Args) -> list[Any]:
        """Over tokens."""
        return [({"out": 0}, {"x": 1, "experts": 1, "weights": 1})]

    def compute(self, dtype: torch.dtype, args: Args) -> tuple[Tensor, ...]:
        """Of the first problem."""
        x, experts, weights, *matrices = args
        return (layer(x[0].to(dtype), experts[0], weights[0].to(dtype), *matrices),)

    def moved(self, setup: Setup) -> float:
        """Weights of the experts that have tokens, by the mean problem; tokens in and out."""
        x, experts, _, *matrices = setup.sets[0]
        chosen = sum(len(one.unique()) for one in experts) / len(experts)
        return chosen / len(matrices[0]) * sum(w.nbytes for w in matrices) + 2 * x[0].nbytes


@dataclass(frozen=True)
class Rounded(Layer):
    """The same with activations rounded to 8 bits; its own error from the exact layer is what others may have."""

    def compute(self, dtype: torch.dtype, args: Args) -> tuple[Tensor, ...]:
        if dtype == torch.float64:
            return super().compute(dtype, args)
        x, experts, weights, *matrices = args
        group = matrices[0].group_size
        problem = x[0].to(dtype), experts[0], weights[0].to(dtype)
        return (layer(*problem, *matrices, rounded=lambda rows: int8_activations(rows, group)),)


@dataclass(frozen=True)
class Training(Layer):
    """The same with gradients to the tokens and to the weights."""

    outputs = ("dx", "d_gate_up", "d_down")

    def sharding(self, op: Any, args: Args) -> list[Any]:
        return [({}, {})]

    def compute(self, dtype: torch.dtype, args: Args) -> tuple[Tensor, ...]:
        x, experts, weights, *matrices = args
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x[0], *matrices)]
        return torch.autograd.grad(
            layer(leaves[0], experts[0], weights[0].to(dtype), *leaves[1:]), leaves, x[1].to(dtype)
        )

    def moved(self, setup: Setup) -> float:
        """The weights are read for the result and for the gradient to it, and their gradients written."""
        return 3 * super().moved(setup)


def layer(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Weights, w_down: Weights,
    rounded: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:  # fmt: skip
    """The truth: expert after expert."""
    out = torch.zeros_like(x)
    for expert in range(len(w_gate_up)):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = (rounded(x[token]) @ dense(w_gate_up)[expert].to(x.dtype).T).chunk(2, -1)
            y = rounded(F.silu(gate) * up) @ dense(w_down)[expert].to(x.dtype).T
            out = out.index_add(0, token, y * weights[token, choice, None])
    return out


# Contenders.


def train(problems: Any, leaves: list[list[Tensor]], grad: Tensor, call: Callable[..., Tensor]) -> Run:
    def run(i: int) -> tuple[Tensor, ...]:
        mine = leaves[i % len(leaves)]
        for leaf in mine:
            leaf.grad = None
        call(problems[i % len(leaves)], *mine).backward(grad)
        return tuple(leaf.grad for leaf in mine)  # type: ignore[misc]

    return run


def routes(setup: Setup) -> list[Route]:
    _, experts, weights, w, _ = setup.sets[0]
    logits = weights.new_zeros(*experts.shape[1:-1], len(w))
    return [Route(w_, e, e, logits, len(w), "softmax", e.numel()) for e, w_ in zip(experts, weights, strict=True)]


def ours(setup: Setup, backend: str) -> Run:
    x, _, _, w_gate_up, w_down = setup.sets[0]
    found = routes(setup)
    first = next(iter(setup.op.implementations(setup.device)))
    chosen = None if backend == first else backend  # a call that names none costs less
    rounds = isinstance(setup.op, Rounded)

    @torch.no_grad()
    def run(i: int) -> Tensor:
        route = found[i % len(x)]
        return metate.moe_mlp(x[i % len(x)], route, w_gate_up, w_down, int8_activations=rounds, backend=chosen)

    return run


def _leaves(setup: Setup) -> list[list[Tensor]]:
    """Of each problem; the weights are the same."""
    x, _, _, *matrices = setup.sets[0]
    shared = [w.clone().requires_grad_() for w in matrices]
    return [[one.clone().requires_grad_(), *shared] for one in x]


def train_ours(setup: Setup, backend: str) -> Run:
    return train(routes(setup), _leaves(setup), setup.sets[0][0][1],
                 lambda route, x, *w: metate.moe_mlp(x, route, *w, backend=backend))  # fmt: skip


def transformers(setup: Setup, implementation: str) -> Run:
    """Its module of experts, with low-bit weights dequantised."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        raise Skip("transformers is not installed, or too old") from None
    x, experts, weights, w_gate_up, w_down = setup.sets[0]
    case = setup.case
    config = MixtralConfig(hidden_size=case["K"], intermediate_size=case["N"], num_local_experts=case["E"])
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    names = ("gate_up_proj", "down_proj")

    def call(problem: tuple[Tensor, Tensor], rows: Tensor, *matrices: Tensor) -> Tensor:
        module._parameters.update(zip(names, matrices, strict=True))  # type: ignore[arg-type]
        out: Tensor = module(rows, *problem)
        return out

    problems = [(e.long(), w.to(setup.dtype)) for e, w in zip(experts, weights, strict=True)]
    if isinstance(setup.op, Training):
        return train(problems, _leaves(setup), x[1], call)
    matrices = [nn.Parameter(dense(w).to(setup.dtype), requires_grad=False) for w in (w_gate_up, w_down)]

    @torch.no_grad()
    def run(i: int) -> Tensor:
        return call(problems[i % len(x)], x[i % len(x)], *matrices)

    return run


def mul_mat_id(setup: Setup) -> Run:
    """ggml takes float32 tokens; it rounds them to the type of dense weights, and beside 4-bit ones to 8 bits."""
    case, (x, experts, weights, w_gate_up, w_down) = setup.case, setup.sets[0]
    rounds = isinstance(setup.op, Rounded)
    if setup.device != "cpu" or case["form"] != ("int4" if rounds else "dense"):
        raise Skip("on a CPU, dense weights, or 4-bit ones beside activations of 8 bits")
    kind = ggml.Q4_0 if rounds else {torch.float32: ggml.F32, torch.bfloat16: ggml.BF16}[setup.dtype]
    T, k, E, N, K = (case[letter] for letter in "TkENK")
    graphs = ggml.Graphs()
    gate, up = (graphs.tensor(kind, K, N, E, weight=True) for _ in range(2))
    down = graphs.tensor(kind, N, K, E, weight=True)
    built = []
    for _ in x:
        rows, chosen = graphs.tensor(ggml.F32, K, 1, T), graphs.tensor(ggml.I32, k, T)
        factors = graphs.tensor(ggml.F32, 1, k, T)
        both = (graphs.op("mul_mat_id", w, rows, chosen) for w in (gate, up))
        hidden = graphs.op("swiglu_split", *both)
        y = graphs.op("mul", graphs.op("mul_mat_id", down, hidden, chosen), factors)
        sizes = (ctypes.c_int64(K), ctypes.c_int64(T), ctypes.c_size_t(4 * K * k))
        out, *rest = (graphs.op("view_2d", y, *sizes, ctypes.c_size_t(4 * K * j)) for j in range(k))
        for part in rest:
            out = graphs.op("add", out, part)
        built.append((rows, chosen, factors, out, graphs.graph(out)))
    graphs.allocate(repack=kind == ggml.Q4_0)
    for tensor, weight, part in (
        (gate, w_gate_up, slice(N)),
        (up, w_gate_up, slice(N, None)),
        (down, w_down, slice(None)),
    ):
        graphs.set(tensor, torch.stack(list(_blocks(weight, part))))
    for i, (rows, chosen, factors, *_) in enumerate(built):
        for tensor, values in ((rows, x[i].float()), (chosen, experts[i]), (factors, weights[i])):
            graphs.set(tensor, values)

    def run(i: int) -> Tensor:
        *_, out, graph = built[i % len(built)]
        graphs.run(graph)
        return graphs.get(out, T, K)

    return run


def _blocks(weights: Weights, rows: slice) -> Iterator[Tensor]:
    """Each expert's weight as ggml stores it."""
    for one in weights:
        yield one[rows] if isinstance(one, Tensor) else ggml.q4_0(one.codes[rows], one.scales[rows], one.in_features)
