"""Mixtures of experts: a router, experts of which every token takes a few, and shared ones that every token takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from metate.backends import is_plain
from metate.errors import fail, require_flag
from metate.memory import in_large_pages
from metate.nn.arguments import require_input
from metate.ops.moe import (
    Route,
    activation_scalars,
    gated_activation,
    grouped_linear,
    layer_arguments,
    layer_shortcut,
    moe_route,
    moe_sort,
    moe_unpermute,
    update_bias,
)
from metate.ops.moe.routing import CHOICE
from metate.scalars import is_whole, plain


class GroupedLinear(nn.Module):
    """One linear layer an expert: `weight` (num_experts, out_features, in_features), `bias` (num_experts, out_features)
    or None.

    `forward` takes rows sorted by expert, those of expert e from offsets[e] to offsets[e + 1]; or any rows and the
    `order` in which they stand so, as `metate.grouped_linear` does, and raises what it does. On a CPU the weight lies
    in large pages where the system has them: a token reads it in about a tenth less time.
    """

    int8_activations = False  # as in `metate.grouped_linear`, of low-bit layers

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        weight = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        self.weight: Any = nn.Parameter(in_large_pages(weight))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every expert as nn.Linear begins."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound)

    def forward(self, x: Tensor, offsets: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:
        options: dict[str, Any] = dict(order=order, k=k, int8_activations=self.int8_activations)
        return grouped_linear(x, self.weight, offsets, self.bias, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to` makes lies in large pages, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.parameters(recurse=False):
            in_large_pages(parameter)
        return self

    def part(self, first: int, last: int) -> GroupedLinear:
        """A copy with the experts first … last - 1."""
        found = GroupedLinear(0, self.in_features, self.out_features, self.bias is not None)
        found.num_experts = last - first
        for name, parameter in self.named_parameters(recurse=False):
            setattr(found, name, nn.Parameter(parameter[first:last].detach().clone(), parameter.requires_grad))
        return found

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class Experts(nn.Module):
    """The experts alone: rows by a Route through gate and up, activation and down, added up by its weights.

    `gate_up` and `down` are GroupedLinear layers, or what takes their place: QuantGroupedLinear, LoraGroupedLinear.
    `activation` are arguments of `metate.gated_activation`.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **activation: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.activation = num_experts, activation
        columns = _columns(intermediate_size, activation)
        self.gate_up: nn.Module = GroupedLinear(num_experts, hidden_size, columns, bias, device, dtype)
        self.down: nn.Module = GroupedLinear(num_experts, intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor, route: Route, beside: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x (tokens, hidden_size); `beside` is added, what every token takes whatever its route."""
        out = self.combine(x, route.experts, route.weights, route.rows)
        return out if beside is None else out + beside(x)

    def combine(self, x: Tensor, experts: Tensor, weights: Tensor | None, rows: int) -> Tensor:
        """Σ_j weights[t, j] · expert experts[t, j] of x[t]; at most `rows` of the numbers are those of an expert."""
        given = x, experts, weights, rows
        parts = parts_of(self.gate_up, self.down)
        if weights is None or parts is None:
            return self._one_by_one(*given)
        routed, choices = (experts, weights, self.num_experts, rows), activation_scalars(**self.activation)
        rounds: Any = self.gate_up.int8_activations
        args = layer_arguments(x, routed, parts, choices, rounds)
        return layer_shortcut(args, self._one_by_one, given)  # type: ignore[no-any-return]

    def _one_by_one(self, x: Tensor, experts: Tensor, weights: Tensor | None, rows: int) -> Tensor:
        order, inverse, offsets = moe_sort(experts, self.num_experts)
        hidden = self.gate_up(x, offsets, order[:rows], experts.shape[1])
        hidden = self.down(gated_activation(hidden, **self.activation), offsets)
        return moe_unpermute(hidden, inverse, weights)


def parts_of(gate_up: Any, down: Any) -> tuple[Any, ...] | None:
    """Weights and biases of two layers; or None where the layers are to be called: they are of other kinds or round
    activations differently, somebody hooks into them, or a compiler looks on."""
    if not is_plain() or has_global_hooks():
        return None
    for layer in (gate_up, down):
        is_ours = getattr(layer.forward, "__func__", None) is GroupedLinear.forward
        if not is_ours or layer._forward_hooks or layer._forward_pre_hooks:
            return None
    if gate_up.int8_activations != down.int8_activations:
        return None
    return gate_up.weight, down.weight, gate_up.bias, down.bias


class SharedExpert(nn.Module):
    """The expert that every token takes; with `gate`, times a sigmoid of its own for every token (Qwen2-MoE)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool = False, gate: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **activation: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Linear(hidden_size, _columns(intermediate_size, activation), bias, device, dtype)
        self.down = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)
        self.gate = Router(hidden_size, 1, False, device, dtype) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated_activation(self.gate_up(x), **self.activation))
        return out if self.gate is None else torch.sigmoid(self.gate(x)) * out


def _columns(intermediate_size: int, activation: Mapping[str, Any]) -> int:
    """Of gate and up together; a try says what is wrong with the activation before anything computes with it."""
    gated_activation(torch.zeros(1, 2, dtype=torch.float32, device="cpu"), **activation, backend="reference")
    return intermediate_size if activation.get("gating") == "none" else 2 * intermediate_size


class Router(nn.Linear):
    """Logits of the experts. A class of its own: low-bit formats leave it alone."""


class MoE(nn.Module):
    """Mixture of experts: y = Σ over the chosen experts of weight · expert(x), plus shared experts.

    Args:
        hidden_size, intermediate_size: of x, and inside of an expert.
        num_experts, top_k: how many there are, and how many a token takes.
        activation, gating, limit, alpha, shift: as in `metate.gated_activation`; SwiGLU unless told otherwise.
        bias: whether the experts have biases. `router_bias`: whether the router has.
        shared_size: inside of the shared expert, 0 for none. `shared_gate`: whether it has a sigmoid of its own.
        correction: keeps a `correction_bias`, added to the scores for the choice alone; `update_bias` moves it towards
            even loads (Wang et al. 2024).
        noisy: noise of learned deviation on the logits in training (Shazeer et al. 2017).
        routing: further arguments of `metate.moe_route`: score, policy, renormalise, capacity_factor, groups, …

    Raises:
        TypeError, ValueError: naming the argument of `metate.gated_activation` or `metate.moe_route` that is wrong.

    After a call `route` is how its tokens went: for losses (`moe.route.load_balance_loss()`), for counts of the load.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int = 2, *,
        activation: str = "silu", gating: str = "gate_up", limit: float | None = None, alpha: float = 1.0,
        shift: float = 0.0, bias: bool = False, router_bias: bool = False, shared_size: int = 0,
        shared_gate: bool = False, correction: bool = False, noisy: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **routing: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size),
                            ("num_experts", num_experts), ("top_k", top_k), ("shared_size", shared_size)):  # fmt: skip
            if not is_whole(plain(value), int(name != "shared_size"), 2**31 - 1):
                raise fail("nn.MoE", name, repr(value)[:60], "an integer, 1 or more (shared_size: or 0)")
        for name, value in (("bias", bias), ("router_bias", router_bias), ("shared_gate", shared_gate),
                            ("correction", correction), ("noisy", noisy)):  # fmt: skip
            require_flag("nn.MoE", name, value)
        if top_k > num_experts:
            raise fail("nn.MoE", "top_k", top_k, f"1 to num_experts, {num_experts}")
        gate: Any = dict(activation=activation, gating=gating, limit=limit, alpha=alpha, shift=shift)
        self.hidden_size, self.top_k, self.routing = hidden_size, top_k, routing
        # A try, of which the caller's random numbers know nothing, says what is wrong with the routing.
        tried = {**routing, "generator": torch.Generator("cpu")}
        logits = torch.zeros(1, num_experts, dtype=torch.float32, device="cpu")
        moe_route(logits, top_k, noise=None, **tried, backend="reference")
        self.router = Router(hidden_size, num_experts, router_bias, device, dtype)
        self.noise = Router(hidden_size, num_experts, False, device, dtype) if noisy else None
        self.experts = Experts(hidden_size, intermediate_size, num_experts, bias, device, dtype, **gate)
        self.shared: nn.Module | None = None
        if shared_size:
            self.shared = SharedExpert(hidden_size, shared_size, bias, shared_gate, device, dtype, **gate)
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device) if correction else None
        self.register_buffer("correction_bias", zeros)
        self.route: Route | None = None

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """x (…, hidden_size) → the same shape.

        experts (…, top_k): where the tokens go, as `route.chosen` of an earlier call: then neither groups nor a
        correction bias chooses.
        """
        try:
            return self._mix(x, experts)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            require_input("nn.MoE", x, "(…, {})", self.hidden_size, self.router)  # microseconds: only now
            raise

    def _mix(self, x: Tensor, experts: Tensor | None) -> Tensor:
        noise = F.softplus(self.noise(x)) if self.noise is not None and self.training else None
        bias: Tensor | None = self.correction_bias  # type: ignore[assignment]
        choice = {"bias": bias, "experts": experts, **self.routing}
        if experts is not None:
            choice = {name: value for name, value in choice.items() if name not in CHOICE}
        self.route = moe_route(self.router(x), self.top_k, noise=noise, **choice)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out: Tensor = self.experts(rows, self.route, self.shared)
        return out if x.dim() == 2 else out.reshape(x.shape)

    def update_bias(self, rate: float = 1e-3) -> None:
        """Moves `correction_bias` by the loads of the last call, away from experts that took more than the mean."""
        if self.correction_bias is None or self.route is None:
            got = "no correction_bias" if self.correction_bias is None else "no call yet"
            raise fail("nn.MoE", "update_bias", got, "MoE(…, correction=True), and a call before")
        update_bias(self.correction_bias, self.route.counts(), rate)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """`correction_bias` stays float32 where the layer goes to 16 bits: the steps of `update_bias` would be lost."""
        before = self._buffers["correction_bias"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers["correction_bias"]
        if before is not None and after is not None and after.element_size() < 4:
            self._buffers["correction_bias"] = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the layer, not of the last call, whose tensors belong to a graph."""
        return {**self.__dict__, "route": None}
