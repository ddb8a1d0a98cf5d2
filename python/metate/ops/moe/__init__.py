"""Mixtures of experts: routing, permutation, grouped products dense and low-bit, and the layer made of them.

`csrc/moe.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail, renamed, require_choice, require_dense, require_flag, require_number
from metate.ops.moe import grouped
from metate.ops.moe.declaration import activation_op, permute_op, sort_op, unpermute_op
from metate.ops.moe.experts import QuantizedExperts
from metate.ops.moe.routing import Route, moe_route, update_bias
from metate.scalars import plain
from metate.shortcut import Shortcut

__all__ = [
    "QuantizedExperts", "Route", "gated_activation", "grouped_linear", "moe_mlp", "moe_permute", "moe_route",
    "moe_sort", "moe_unpermute", "update_bias",
]  # fmt: skip

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATINGS = ("gate_up", "up_gate", "interleaved", "none")
Lora = tuple[Tensor, Tensor]
_activate = Shortcut("gated_activation")
layer_shortcut = Shortcut("moe_mlp", operators=5)


def moe_sort(experts: Tensor, num_experts: int, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the choices of all tokens by expert, stably.

    Args:
        experts: (tokens, k) int32, as `Route.experts`. Numbers outside [0, num_experts) belong to no expert and get no
            row.
        num_experts: how many experts there are.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        order: (tokens · k) int32: the choice (token · k + j) that stands at each row; -1 behind the last row of any.
        inverse: (tokens, k) int32: the row of each choice, -1 for none.
        offsets: (num_experts + 1) int32: rows of expert e are offsets[e] … offsets[e+1] - 1.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    order, inverse, offsets = sort_op.call((experts, num_experts), backend=backend)
    return order, inverse, offsets


def moe_permute(x: Tensor, order: Tensor, k: int = 1, *, backend: str | None = None) -> Tensor:
    """The rows of all choices, sorted by expert: row r of the result is x[order[r] // k].

    Args:
        x: (tokens, hidden), float32, bfloat16, float16, float64, any strides.
        order: (rows) int32, as from `moe_sort`: choices 0 … tokens · k - 1, none twice; -1 gives zeros.
        k: choices of a token.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (rows, hidden), dtype of x. Gradients reach x. `grouped_linear` with an order gathers these rows itself.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    out: Tensor = permute_op.call((x, order, k), backend=backend)
    return out


def moe_unpermute(y: Tensor, inverse: Tensor, weights: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Σ_j weights[t, j] · y[inverse[t, j]] for every token t: the results of its choices, added up in float32.

    Args:
        y: (rows, hidden), float32, bfloat16, float16, float64, any strides.
        inverse: (tokens, k) int32, as from `moe_sort`: rows of y; -1 adds nothing.
        weights: (tokens, k), float32 or the dtype of y, as `Route.weights`; None: all 1.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (tokens, hidden), dtype of y. Gradients reach y and weights.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    out: Tensor = unpermute_op.call((y, inverse, weights), backend=backend)
    return out


def grouped_linear(
    x: Tensor,
    w: Tensor | QuantizedExperts,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    order: Tensor | None = None,
    k: int = 1,
    lora: Lora | None = None,
    scaling: float = 1.0,
    int8_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The rows of each expert times its own weight: row r of expert e gives row r · w[e]ᵀ + bias[e].

    Args:
        x: (rows, in_features), sorted by expert; or, with an order, (tokens, in_features). float32, bfloat16, float16.
        w: (experts, out_features, in_features), dtype of x, any strides; or QuantizedExperts: no dense copy is made.
        offsets: (experts + 1) int32: rows of expert e are offsets[e] … offsets[e+1] - 1; they do not decrease. Rows
            before the first and behind the last give zeros and are not read.
        bias: (experts, out_features), float32 or the dtype of x.
        order: (rows) int32: row r is x[order[r] // k], gathered in the product: no permuted copy of x exists.
        lora: A (experts, rank, in_features) and B (experts, out_features, rank), dtype of x: scaling · (row Aᵀ) Bᵀ is
            added (Hu et al. 2022).
        int8_activations: round every chunk of at most 32 columns of a row to 8 bits before it meets a low-bit w, as
            `quant_linear` does with activation="int8": a relative error of about 8e-3, and no gradients.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (rows, out_features), dtype of x. A row depends on no other row, bit for bit. Gradients reach x, dense w, bias,
        A, B, and, of low-bit weights, float scales, offsets and codebooks that ask for one.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    require_flag("grouped_linear", "int8_activations", int8_activations)
    if isinstance(w, QuantizedExperts):
        require_dense("grouped_linear", "x", x)
        if x.shape[-1:] != (w.shape[2],):
            raise fail("grouped_linear", "x", f"of shape {tuple(x.shape)}", f"(rows, {w.shape[2]}) for {w!r}")
        op = grouped.quant_int8_op if int8_activations else grouped.quant_linear_op
        args = x, *w.arguments, bias, offsets, order, *w.scalars, k
        out: Tensor = op.call(args, backend=backend)
    else:
        if int8_activations:
            raise fail("grouped_linear", "int8_activations", True, "False beside a dense w, or QuantizedExperts")
        out = grouped.linear_op.call((x, w, offsets, bias, order, k), backend=backend)
    if lora is None:
        return out
    scaling = require_number("grouped_linear", "scaling", scaling)
    _check_lora(lora, tuple(w.shape))
    low = _thin(0, lora, (x, lora[0], offsets, None, order, k), backend)
    return out + scaling * _thin(1, lora, (low, lora[1], offsets, None, None, 1), backend)


def _check_lora(lora: Lora, shape: tuple[int, ...]) -> None:
    """A (experts, rank, in_features) and B (experts, out_features, rank) beside a weight of `shape`."""
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise fail("grouped_linear", "lora", type(lora).__name__, "two tensors, A and B", error=TypeError)
    for i, part in enumerate(lora):
        require_dense("grouped_linear", f"lora[{i}]", part)
    rank = lora[0].shape[1] if lora[0].dim() > 1 else "rank"
    for i, expected in enumerate(((shape[0], rank, shape[2]), (shape[0], shape[1], rank))):
        if tuple(lora[i].shape) != expected:
            fitting = f"({', '.join(map(str, expected))}) beside w of shape {shape}"
            raise fail("grouped_linear", f"lora[{i}]", f"of shape {tuple(lora[i].shape)}", fitting)


def _thin(part: int, lora: Lora, args: tuple[Any, ...], backend: str | None) -> Tensor:
    """A product with one of two adapters."""
    try:
        return grouped.linear_op.call(args, backend=backend)  # type: ignore[no-any-return]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise renamed(error, "grouped_linear", "grouped_linear", {"w": f"lora[{part}]"}) from None


def gated_activation(
    x: Tensor,
    activation: str = "silu",
    *,
    gating: str = "gate_up",
    limit: float | None = None,
    alpha: float = 1.0,
    shift: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """f(gate) · (up + shift): SwiGLU, GeGLU and their like in one pass.

    Args:
        x: (…, 2 · width): gate and up. float32, bfloat16, float16.
        activation: "silu": x · sigmoid(alpha · x); "gelu"; "gelu_tanh"; "relu"; "relu2": relu(x)².
        gating: "gate_up": the gate is the first half; "up_gate": the second; "interleaved": gate and up by turns;
            "none": x is (…, width), and the result f(x).
        limit: gate at most this, up within ± this; None: no limit.
        alpha: inside of "silu" alone. shift: added to up. GPT-OSS: limit 7, alpha 1.702, shift 1, interleaved.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (…, width), dtype of x. Gradients reach x. Source: Shazeer 2020, GLU variants.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    choices = activation_scalars(activation, gating, limit, alpha, shift)
    require_dense("gated_activation", "x", x)
    if not x.dim():
        raise fail("gated_activation", "x", "of shape ()", "(…, columns)")
    if x.dim() == 2:
        return activation_op.call((x, *choices), backend=backend)  # type: ignore[no-any-return]
    return _activate((x, *choices), _activate_rows, (x, choices, backend), backend)  # type: ignore[no-any-return]


def _activate_rows(x: Tensor, choices: tuple[Any, ...], backend: str | None) -> Tensor:
    out: Tensor = activation_op.call((x[None].flatten(0, -2), *choices), backend=backend)
    return out.view(*x.shape[:-1], out.shape[1])


def activation_scalars(
    activation: str = "silu", gating: str = "gate_up", limit: float | None = None, alpha: float = 1.0,
    shift: float = 0.0,
) -> tuple[int, int, float, float, float]:  # fmt: skip
    """Those of the operator behind `gated_activation`."""
    numbers = math.inf if limit is None else limit, alpha, shift
    if not type(numbers[0]) is type(alpha) is type(shift) is float:
        for name, value in zip(("limit", "alpha", "shift"), numbers, strict=True):
            if not isinstance(plain(value), (float, int)):
                raise fail("gated_activation", name, repr(value), "a number", error=TypeError)
        numbers = float(numbers[0]), float(alpha), float(shift)
    require_choice("gated_activation", "activation", activation, ACTIVATIONS)
    require_choice("gated_activation", "gating", gating, GATINGS)
    return ACTIVATIONS.index(activation), GATINGS.index(gating), *numbers


def moe_mlp(
    x: Tensor,
    route: Route,
    w_gate_up: Tensor | QuantizedExperts,
    w_down: Tensor | QuantizedExperts,
    *,
    activation: str = "silu",
    gating: str = "gate_up",
    limit: float | None = None,
    alpha: float = 1.0,
    shift: float = 0.0,
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    lora_gate_up: Lora | None = None,
    lora_down: Lora | None = None,
    scaling: float = 1.0,
    shared: tuple[Tensor | QuantizedExperts | None, ...] | None = None,
    int8_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A layer of experts: Σ_j weight_j · W_down[e_j] f(W_gate_up[e_j] x) of every token, e_j its choices.

    Args:
        x: (…, hidden), as many tokens as `route` has.
        route: from `moe_route`. Dropped choices add nothing.
        w_gate_up: (experts, 2 · width, hidden), or (experts, width, hidden) with gating "none"; w_down: (experts,
            hidden, width): tensors in the dtype of x with any strides, or QuantizedExperts.
        activation, gating, limit, alpha, shift: as in `gated_activation`.
        bias_gate_up, bias_down, lora_gate_up, lora_down, scaling, int8_activations: as in `grouped_linear`.
        shared: w_gate_up, w_down and, if they have such, both biases of experts that every token takes with a weight of
            1, stacked like the others, of a width of their own.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        Like x. A token depends on no other, bit for bit. Dense weights take no permuted copy of x; low-bit ones one of
        the rows that were chosen, on a CPU. Gradients reach x, the weights of the route (and so the logits), and what
        `grouped_linear` gives one. Source: Shazeer et al. 2017.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    choices = activation_scalars(activation, gating, limit, alpha, shift)
    require_flag("moe_mlp", "int8_activations", int8_activations)
    parts, loras = (w_gate_up, w_down, bias_gate_up, bias_down), (lora_gate_up, lora_down)
    given = x, route, parts, loras, scaling, choices, int8_activations, backend
    if shared is not None:
        every = _every_token(x, route, shared, choices)
        return _experts(*given) + _experts(x, every, (*shared, None, None)[:4], (None, None), *given[4:])
    return _experts(*given)


def _every_token(x: Tensor, route: Route, shared: Any, choices: tuple[Any, ...]) -> Route:
    """All tokens to all shared experts."""
    if not isinstance(shared, (tuple, list)) or len(shared) not in (2, 4):
        got = f"{len(shared)} of them" if isinstance(shared, (tuple, list)) else type(shared).__name__
        raise fail("moe_mlp", "shared", got, "a tuple: w_gate_up, w_down and, if there are any, both biases")
    _check_tokens(x, route)
    number = _check_weights(x, None, shared, choices, ("shared[0]", "shared[1]"))
    tokens = route.experts.shape[0]
    experts = torch.arange(number, dtype=torch.int32, device=x.device).expand(tokens, number)
    ones = route.weights.new_ones(tokens, number)
    return Route(ones, experts, experts, ones, number, route.score, tokens * number)


def _experts(*given: Any) -> Tensor:
    """In one call, where none of its operators must be seen; the arguments of `_one_by_one`."""
    x, route, parts, loras, _, choices, int8_activations, backend = given
    if type(route) is not Route or any(lora is not None for lora in loras):
        return _one_by_one(*given)
    routed = route.experts, route.weights, route.num_experts, route.rows
    args = layer_arguments(x, routed, parts, choices, int8_activations)
    return layer_shortcut(args, _one_by_one, given, backend)  # type: ignore[no-any-return]


def _one_by_one(
    x: Tensor, route: Route, parts: tuple[Any, ...], loras: tuple[Lora | None, ...], scaling: float,
    choices: tuple[Any, ...], int8_activations: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """A layer by its operators."""
    w_gate_up, w_down, bias_gate_up, bias_down = parts
    _check_tokens(x, route)
    _check_weights(x, route.num_experts, parts, choices, ("w_gate_up", "w_down"))
    options: dict[str, Any] = dict(scaling=scaling, int8_activations=int8_activations, backend=backend)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    order, inverse, offsets = moe_sort(route.experts, route.num_experts, backend=backend)
    if route.rows < order.shape[0]:
        order = order[: route.rows]
    k = inverse.shape[1]
    options.update(order=order, k=k)
    hidden = _part("gate_up", tokens, w_gate_up, offsets, bias_gate_up, lora=loras[0], **options)
    hidden = activation_op.call((hidden, *choices), backend=backend)
    options.update(order=None, k=1)
    y = _part("down", hidden, w_down, offsets, bias_down, lora=loras[1], **options)
    out = moe_unpermute(y, inverse, route.weights, backend=backend)
    return out if x.dim() == 2 else out.view(x.shape)


def _part(name: str, x: Tensor, w: Any, offsets: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """One product of a layer; what is wrong with it is told of the layer's arguments."""
    try:
        return grouped_linear(x, w, offsets, bias, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        names = {"w": f"w_{name}", "bias": f"bias_{name}", "lora": f"lora_{name}"}
        raise renamed(error, "grouped_linear", "moe_mlp", names) from None


def layer_arguments(
    x: Tensor, routed: tuple[Tensor, Tensor, int, int], parts: tuple[Any, ...], choices: tuple[Any, ...],
    int8_activations: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of `layer_shortcut`.

    routed: experts and weights of the tokens, how many experts there are, and at most how many rows. parts: both
    weights, both biases. choices: the `activation_scalars`.
    """
    w_gate_up, w_down, bias_gate_up, bias_down = parts
    return x, *routed, _stacked(w_gate_up), _stacked(w_down), bias_gate_up, bias_down, int8_activations, *choices


def _stacked(w: Tensor | QuantizedExperts) -> tuple[Any, ...]:
    """Weights, of which dense ones are of 0 bits."""
    if isinstance(w, QuantizedExperts):
        return w.arguments, w.scalars, w.shape[2]
    return (w, None, None, None, None, None, None, None), (0, 0, 0, 0), 0


def _check_tokens(x: Tensor, route: Route) -> None:
    if not isinstance(route, Route):
        raise fail("moe_mlp", "route", type(route).__name__, "what metate.moe_route returns", error=TypeError)
    require_dense("moe_mlp", "x", x)
    tokens = route.experts.shape[0]
    if x.dim() < 2 or x.numel() != tokens * x.shape[-1]:
        raise fail("moe_mlp", "x", f"of shape {tuple(x.shape)}", f"(…, hidden) of the {tokens} tokens of the route")


def _check_weights(x: Tensor, experts: int | None, parts: Any, choices: tuple[Any, ...], names: tuple[str, str]) -> int:
    """How many experts the first two parts are of, whose shapes must fit x, each other, and `experts` if given."""
    for name, w in zip(names, parts, strict=False):
        if not isinstance(w, QuantizedExperts):
            require_dense("moe_mlp", name, w, "a torch.Tensor or metate.QuantizedExperts")
    first, second = tuple(parts[0].shape), tuple(parts[1].shape)
    number, hidden = (experts or first[0]) if first else 0, x.shape[-1]
    halves = 1 if GATINGS[choices[1]] == "none" else 2
    if len(first) != 3 or first[::2] != (number, hidden) or first[1] % halves:
        columns = "width" if halves == 1 else "2 · width"
        fitting = f"({number}, {columns}, {hidden}) for {number} experts and {hidden} columns of x"
        raise fail("moe_mlp", names[0], f"of shape {first}", fitting)
    if second != (number, hidden, first[1] // halves):
        fitting = f"({number}, {hidden}, {first[1] // halves}) beside {names[0]} of shape {first}"
        raise fail("moe_mlp", names[1], f"of shape {second}", fitting)
    return number
