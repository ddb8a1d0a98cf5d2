"""Which experts a token goes to: the policies of the literature over one operator, and their losses."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metate.backends import BACKENDS, use
from metate.errors import fail, require_choice, require_dense, require_flag, require_number
from metate.ops.moe import reference
from metate.ops.moe.declaration import FLOATS, topk_op
from metate.ops.moe.rules import within
from metate.scalars import is_whole, plain

SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus")
POLICIES = ("topk", "switch", "gshard", "expert_choice", "sinkhorn", "mixture_of_depths")
_ITERATIONS = 50  # of Sinkhorn's normalisation, at most
CHOICE = {"bias": None, "groups": 1, "top_groups": 1, "group_rule": "max"}
_GIVEN = "given experts"
_UNUSED: dict[str, dict[str, Any]] = {  # what policies with a choice of their own do not look at, and its default
    _GIVEN: {**CHOICE, "policy": "topk"},
    "sinkhorn": CHOICE,
    "expert_choice": {**CHOICE, "renormalise": False, "drop": "position"},
    "mixture_of_depths": {**CHOICE, "renormalise": False, "drop": "position", "scaling": 1.0},
}


@dataclass(frozen=True, eq=False)
class Route:
    """Where every token goes.

    weights: (tokens, k) float32: what the result of each choice is multiplied by; 0 for a dropped one.
    experts: (tokens, k) int32: `num_experts` marks a choice that was dropped or that there is not.
    chosen: the same before anything was dropped.
    logits: (tokens, num_experts), as they were given, noise included.
    rows: how many choices at most have an expert.
    """

    weights: Tensor
    experts: Tensor
    chosen: Tensor
    logits: Tensor
    num_experts: int
    score: str
    rows: int

    def counts(self) -> Tensor:
        """(num_experts) float32: how many choices fell on each expert, before anything was dropped."""
        return _counts(self.chosen, self.num_experts)

    def probabilities(self) -> Tensor:
        """(tokens, num_experts): the scores of each token, as shares of their sum."""
        logits = self.logits.to(self.weights.dtype)
        if self.score in ("softmax", "softmax_topk"):
            return torch.softmax(logits, -1)
        scores = reference.scores_of(logits, SCORES.index(self.score))
        return scores / scores.sum(-1, keepdim=True)

    def load_balance_loss(self, kind: str = "switch", *, sequences: int = 1, counts: Tensor | None = None) -> Tensor:
        """num_experts · Σ_e share of choices · mean probability: 1 where all is balanced, num_experts at worst, 0 of no
        tokens.

        Args:
            kind: "switch" counts all choices (Fedus et al. 2022, and k times less than transformers' for top-k);
                "gshard" the first choices only (Lepikhin et al. 2021).
            sequences: of how many sequences of one length the tokens are: the loss is the mean of theirs
                (DeepSeek-V3).
            counts: (num_experts): choices counted over more tokens than these, such as the sum of `counts()` over all
                processes: the loss of the global batch (Qiu et al. 2025).
        """
        require_choice("load_balance_loss", "kind", kind, ("switch", "gshard"))
        sequences, tokens, device = plain(sequences), self.chosen.shape[0], self.chosen.device
        if not is_whole(sequences, 1) or tokens % sequences:
            raise fail("load_balance_loss", "sequences", repr(sequences)[:60], f"a divisor of the {tokens} tokens")
        chosen = self.chosen if kind == "switch" else self.chosen[:, :1]
        if counts is None:
            parts = [_counts(part, self.num_experts) for part in chosen.unflatten(0, (sequences, tokens // sequences))]
            loads = torch.stack(parts).to(self.weights.dtype)
        else:
            require_dense("load_balance_loss", "counts", counts)
            if counts.shape != (self.num_experts,) or counts.is_complex() or counts.device != device:
                got = f"{counts.dtype} of shape {tuple(counts.shape)} on {counts.device}"
                raise fail("load_balance_loss", "counts", got, f"real numbers ({self.num_experts},) on {device}")
            loads = counts.to(self.weights.dtype).expand(sequences, -1)
        shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
        means = _mean(self.probabilities().unflatten(0, (sequences, tokens // sequences)), 1)
        loss: Tensor = self.num_experts * (shares * means).sum(-1).mean()
        return loss

    def z_loss(self) -> Tensor:
        """mean log²Σexp(logits): keeps logits small (Zoph et al. 2022, ST-MoE)."""
        return _mean(torch.logsumexp(self.logits.to(self.weights.dtype), -1).square(), 0)

    def importance_loss(self) -> Tensor:
        """The squared coefficient of variation of the weights that experts get (Shazeer et al. 2017)."""
        flat, index = self.weights.flatten(), self.experts.flatten().long()
        sums = flat.new_zeros(self.num_experts + 1).index_add(0, index, flat)[:-1]
        return sums.var(unbiased=False) / (sums.mean().square() + reference.TINY)


def update_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3) -> None:
    """Balances without a loss (Wang et al. 2024): the bias of an overloaded expert sinks by `rate`, others rise.

    Args:
        bias: (num_experts), floating, changed in place.
        counts: (num_experts), as from `Route.counts`.
        rate: how far the bias of an expert moves.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    for name, x in (("bias", bias), ("counts", counts)):
        require_dense("update_bias", name, x)
    if bias.dtype not in FLOATS:
        raise fail("update_bias", "bias", bias.dtype, "float32, bfloat16, float16 or float64", error=TypeError)
    if counts.shape != bias.shape:
        raise fail("update_bias", "counts", f"of shape {tuple(counts.shape)}", f"{tuple(bias.shape)} like bias")
    if counts.is_complex() or counts.device != bias.device:
        got = f"{counts.dtype} on {counts.device}"
        raise fail("update_bias", "counts", got, f"real numbers on {bias.device} like bias", error=TypeError)
    rate = require_number("update_bias", "rate", rate)
    with torch.no_grad():
        counts = counts.to(bias.dtype)
        bias += rate * torch.sign(counts.mean() - counts)


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalise: bool = False,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_rule: str = "max",
    scaling: float = 1.0,
    noise: Tensor | None = None,
    experts: Tensor | None = None,
    policy: str = "topk",
    capacity_factor: float | None = None,
    drop: str = "position",
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Route:
    """Chooses experts for every token from the logits of a router.

    Args:
        logits: (…, num_experts), float32, bfloat16, float16 (float64 on a CPU).
        top_k: experts of a token.
        score: "softmax" over all experts, then the choice (Mixtral, DeepSeek-V2); "softmax_topk": softmax over the
            chosen (GPT-OSS); "sigmoid" (DeepSeek-V3, Llama 4); "sqrt_softplus" (DeepSeek-V4).
        renormalise: weights are divided by their sum. scaling: then multiplied by this.
        bias: (num_experts) float32, added to the scores for the choice, never to the weights; see `update_bias`.
        groups, top_groups: only the `top_groups` best of `groups` runs of experts are chosen from; a run is worth its
            best expert (group_rule "max", DeepSeek-V2) or its two best together ("sum", DeepSeek-V3).
        noise: standard deviation of noise on the logits, of a shape that broadcasts (noisy top-k, Shazeer et al. 2017).
        experts: (…, top_k), integers: the choice is given, the weights are those of the logits: `Route.chosen` of an
            earlier call (routing replay, Ma et al. 2025), or a table by token (hash layers, Roller et al. 2021).
        policy: "topk"; "switch": top-1 (Fedus et al. 2022); "gshard": top-2, renormalised, the second by chance with a
            probability of twice its weight (Lepikhin et al. 2021); "expert_choice": each expert takes its best tokens
            · top_k / num_experts (Zhou et al. 2022); "sinkhorn": top_k of the doubly normalised logits (Clark et al.
            2022); "mixture_of_depths": logits (…, length, 1), of each sequence the best capacity_factor · length
            tokens, weighted by sigmoids of theirs (Raposo et al. 2024).
        capacity_factor: an expert takes at most ⌈capacity_factor · tokens · top_k / num_experts⌉ choices; None: all,
            but 1 for "expert_choice" and 1/8 for "mixture_of_depths".
        drop: which choices an expert drops: those behind its capacity in order of position, first choices before
            second ones, or those of least weight ("probability").
        generator: of the random numbers.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        Route. Of equal scores the lower expert number is chosen. Gradients reach logits through the weights.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected; also for what
            given experts, or a policy with a choice of its own ("expert_choice", …), would not look at.
    """
    top_k, scaling, capacity_factor = plain(top_k), plain(scaling), plain(capacity_factor)
    _check(logits, score, group_rule, policy, capacity_factor, drop, renormalise, backend)
    choice = policy if experts is None else _GIVEN
    if choice in _UNUSED:
        _check_policy(choice, top_k, logits.shape[-1], bias=bias, groups=groups, top_groups=top_groups, policy=policy,
                      group_rule=group_rule, renormalise=renormalise, scaling=scaling, drop=drop)  # fmt: skip
    if noise is not None:
        _check_noise(noise, logits)
        logits = logits + noise * _random(logits, generator, normal=True)
    flat = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    with nullcontext() if backend is None else use(backend):
        if policy == "mixture_of_depths":
            return _mixture_of_depths(logits, 0.125 if capacity_factor is None else capacity_factor)
        if policy == "expert_choice":
            return _expert_choice(flat, top_k, score, scaling, 1.0 if capacity_factor is None else capacity_factor)
        if choice in (_GIVEN, "sinkhorn"):
            chosen = _sinkhorn(flat, top_k) if experts is None else _given(experts, logits, top_k)
            weights = _weights_of(flat, chosen, score, renormalise, scaling)
        else:
            k = {"switch": 1, "gshard": 2}.get(policy, top_k)
            if policy != "topk" and not (is_whole(top_k) and top_k == k):
                raise fail("moe_route", "top_k", repr(top_k)[:60], f"{k} for policy {policy!r}")
            weights, chosen = topk_op.call((
                flat, bias, k, SCORES.index(score), groups, top_groups, ("max", "sum").index(group_rule),
                renormalise or policy == "gshard", scaling,
            ))  # fmt: skip
    kept = chosen if policy != "gshard" else _second_by_chance(weights, chosen, flat.shape[1], generator)
    return _dropped(weights, chosen, kept, flat, score, capacity_factor, drop)


def _second_by_chance(weights: Tensor, experts: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """The second choice with a probability of twice its weight, else the number of no expert."""
    second = 2 * weights[:, 1] / (weights.sum(-1) + reference.TINY)
    taken = _random(second, generator) < second
    return torch.stack([experts[:, 0], experts[:, 1].where(taken, number)], 1)


def _dropped(
    weights: Tensor, chosen: Tensor, experts: Tensor, logits: Tensor, score: str, factor: float | None, drop: str
) -> Route:
    """The route to the experts that are left of those chosen, each of which takes no more than its capacity."""
    number = logits.shape[1]
    if factor is not None:
        experts = _within_capacity(experts, weights, number, math.ceil(factor * experts.numel() / number), drop)
    if experts is not chosen:
        weights = weights.where(experts < number, 0)
    return Route(weights, experts, chosen, logits, number, score, experts.numel())


def _check(
    logits: Tensor, score: str, group_rule: str, policy: str, capacity_factor: float | None, drop: str,
    renormalise: bool, backend: str | None,
) -> None:  # fmt: skip
    require_dense("moe_route", "logits", logits)
    require_flag("moe_route", "renormalise", renormalise)
    if backend is not None:
        require_choice("moe_route", "backend", backend, BACKENDS)
    if logits.dtype not in FLOATS:
        raise fail("moe_route", "logits", logits.dtype, "float32, bfloat16, float16 or float64", error=TypeError)
    if logits.dim() < 2 or not logits.shape[-1]:
        raise fail("moe_route", "logits", f"of shape {tuple(logits.shape)}", "(…, num_experts)")
    choices = (("score", score, SCORES), ("group_rule", group_rule, ("max", "sum")), ("policy", policy, POLICIES),
               ("drop", drop, ("position", "probability")))  # fmt: skip
    for name, value, allowed in choices:
        require_choice("moe_route", name, value, allowed)
    real = isinstance(capacity_factor, (int, float)) and 0 < capacity_factor < 2.0**63
    if capacity_factor is not None and not real:
        got = repr(capacity_factor)[:60]
        raise fail("moe_route", "capacity_factor", got, "a positive number, or None: nothing is dropped")


def _check_policy(choice: str, top_k: int, experts: int, **given: Any) -> None:
    """Where the operator is not called, what it would check; and that nothing given is ignored."""
    for name, default in _UNUSED[choice].items():
        value = given[name]
        if isinstance(value, Tensor) or value != default:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            why = "a choice that is given" if choice == _GIVEN else f"policy {choice!r}"
            raise fail("moe_route", name, got, f"{default!r}: {why} does not look at it")
    if choice != "mixture_of_depths" and not is_whole(top_k, 1, experts):
        raise fail("moe_route", "top_k", repr(top_k), f"1 to {experts}")
    require_number("moe_route", "scaling", given["scaling"])


def _check_noise(noise: Tensor, logits: Tensor) -> None:
    require_dense("moe_route", "noise", noise)
    if noise.dtype not in FLOATS or noise.device != logits.device:
        got, expected = f"{noise.dtype} on {noise.device}", f"floats on {logits.device} like logits"
        raise fail("moe_route", "noise", got, expected, error=TypeError)
    pairs = zip(noise.shape[::-1], logits.shape[::-1], strict=False)
    if noise.dim() > logits.dim() or any(size not in (1, whole) for size, whole in pairs):
        got, expected = f"of shape {tuple(noise.shape)}", f"one that broadcasts to {tuple(logits.shape)}"
        raise fail("moe_route", "noise", got, expected)


def _random(like: Tensor, generator: torch.Generator | None, normal: bool = False) -> Tensor:
    """As many numbers as those of a tensor; from torch's own generator in a way that compilers take."""
    if generator is None:
        draw_like = torch.randn_like if normal else torch.rand_like
        return draw_like(like, memory_format=torch.contiguous_format)
    draw = torch.randn if normal else torch.rand
    return draw(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _mean(x: Tensor, dim: int) -> Tensor:
    """Zero where there is nothing: a process without tokens adds no loss."""
    return x.sum(dim) / max(x.shape[dim], 1)


def _counts(experts: Tensor, number: int) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=number + 1)[:number].float()


def _within_capacity(experts: Tensor, weights: Tensor, number: int, capacity: int, drop: str) -> Tensor:
    """Experts with the number of none where an expert has `capacity` choices that come before."""
    slots = experts.T.flatten().long()  # first choices of all tokens, then the second ones
    order = torch.arange(slots.shape[0], device=slots.device)
    if drop == "probability":
        order = weights.detach().T.flatten().argsort(descending=True, stable=True)
    by_expert = order[slots[order].argsort(stable=True)]
    ordered = slots[by_expert]
    starts = torch.searchsorted(ordered, torch.arange(number + 1, device=slots.device))
    rank = torch.arange(slots.shape[0], device=slots.device) - starts[ordered.clamp(max=number)]
    kept = torch.empty_like(rank, dtype=torch.bool).scatter(0, by_expert, rank < capacity)
    return experts.where(kept.view(experts.shape[1], -1).T, number)


def _expert_choice(logits: Tensor, top_k: int, score: str, scaling: float, factor: float) -> Route:
    """A slot for every pair of token and expert; no expert where it did not choose the token."""
    tokens, number = logits.shape
    capacity = min(math.ceil(factor * tokens * top_k / number), tokens)
    scores = _all_scores(logits, score)
    best = scores.detach().argsort(dim=0, descending=True, stable=True)[:capacity]
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, True)
    numbers = torch.arange(number, dtype=torch.int32, device=logits.device).expand(tokens, -1)
    experts = numbers.where(taken, number)
    weights = (scores * scaling).where(taken, 0)
    return Route(weights, experts, experts, logits, number, score, capacity * number)


def _all_scores(logits: Tensor, score: str) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return reference.scores_of(wide, SCORES.index("softmax" if score == "softmax_topk" else score))


def _given(experts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """(tokens, top_k) int32."""
    require_dense("moe_route", "experts", experts)
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise fail("moe_route", "experts", experts.dtype, "integers", error=TypeError)
    flat, tokens = experts.reshape(-1, experts.shape[-1]) if experts.dim() else experts, logits.shape[:-1].numel()
    if tuple(flat.shape) != (tokens, top_k):
        got = f"of shape {tuple(experts.shape)}"
        raise fail("moe_route", "experts", got, f"(…, {top_k}) for the {tokens} tokens of logits")
    if not torch.compiler.is_compiling():  # a graph cannot look at contents
        within("moe_route", "experts", experts, 0, logits.shape[-1])
    return flat.int()


def _weights_of(logits: Tensor, chosen: Tensor, score: str, renormalise: bool, scaling: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    number = SCORES.index(score)
    return reference.weights_of(reference.scores_of(wide, number), chosen.long(), number, renormalise, scaling)


def _sinkhorn(logits: Tensor, top_k: int) -> Tensor:
    """The choice by logits normalised over experts and tokens by turns."""
    with torch.no_grad():
        wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
        log_p, done = wide.clone(), torch.zeros((), dtype=torch.bool, device=wide.device)
        for _ in range(_ITERATIONS):
            before = log_p
            log_p = log_p - torch.logsumexp(log_p, 0, keepdim=True) if log_p.shape[0] else log_p
            log_p = log_p - torch.logsumexp(log_p, 1, keepdim=True)
            close = torch.isclose(before, log_p, atol=1e-4).all()
            if torch.compiler.is_compiling():  # a graph goes on to the end, and keeps what it would have stopped with
                log_p, done = torch.where(done, before, log_p), done | close
            elif close:
                break
        return log_p.argsort(dim=-1, descending=True, stable=True)[:, :top_k].int()


def _mixture_of_depths(logits: Tensor, factor: float) -> Route:
    if logits.shape[-1] != 1:
        raise fail("moe_route", "logits", f"of shape {tuple(logits.shape)}", "(…, length, 1) for 'mixture_of_depths'")
    length = logits.shape[-2]
    capacity = min(math.ceil(factor * length), length)
    flat = logits.reshape(-1, length)
    best = flat.detach().argsort(dim=-1, descending=True, stable=True)[:, :capacity]
    taken = torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True).view(-1, 1)
    rows = flat.reshape(-1, 1)
    experts = torch.where(taken, 0, 1).int()
    weights = torch.sigmoid(rows if rows.dtype == torch.float64 else rows.float()).where(taken, 0)
    return Route(weights, experts, experts, rows, 1, "sigmoid", capacity * flat.shape[0])
