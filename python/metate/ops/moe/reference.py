"""The semantics of csrc/moe.h in plain torch: schema, truth, error budget and fallback of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import int8_activations, stored_weight

SOFTMAX, SOFTMAX_CHOSEN, SIGMOID, SQRT_SOFTPLUS = range(4)
SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)
GATE_UP, UP_GATE, INTERLEAVED, UNGATED = range(4)
TINY = 1e-20  # beside a sum of weights


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Routing.


def scores_of(logits: Tensor, score: int) -> Tensor:
    if score == SOFTMAX:
        return torch.softmax(logits, -1)
    if score == SIGMOID:
        return torch.sigmoid(logits)
    return logits if score == SOFTMAX_CHOSEN else torch.nn.functional.softplus(logits).sqrt()


def moe_topk(
    logits: Tensor, bias: Tensor | None, top_k: int, score: int, groups: int, top_groups: int, group_rule: int,
    renormalise: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and numbers of the chosen experts of every row, best first."""
    logits = _wide(logits)
    scores = scores_of(logits, score)
    choice = logits if bias is None else scores + bias.to(scores.dtype)
    order = choice.argsort(dim=-1, descending=True, stable=True)
    if groups > 1:
        values = choice if group_rule == 0 or bias is not None else scores
        by_group = values.unflatten(-1, (groups, -1)).sort(-1, descending=True).values
        value = by_group[..., 0] if group_rule == 0 else by_group[..., :2].sum(-1)
        best = value.argsort(dim=-1, descending=True, stable=True)[..., :top_groups]
        barred = torch.ones_like(value, dtype=torch.bool).scatter(-1, best, False)
        barred = barred.repeat_interleave(logits.shape[-1] // groups, -1)
        order = order.gather(-1, barred.gather(-1, order).int().argsort(dim=-1, stable=True))
    chosen = order[..., :top_k]
    return weights_of(scores, chosen, score, renormalise, scaling), chosen.int()


def weights_of(scores: Tensor, chosen: Tensor, score: int, renormalise: bool, scaling: float) -> Tensor:
    weights = scores.gather(-1, chosen)
    if score == SOFTMAX_CHOSEN:
        weights = torch.softmax(weights, -1)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * scaling


def moe_topk_backward(
    grad: Tensor, logits: Tensor, experts: Tensor, score: int, renormalise: bool, scaling: float
) -> Tensor:
    """The gradient of the weights to the logits: the choice is given."""
    logits = _wide(logits)
    chosen = experts.long()
    scores = scores_of(logits, score)
    weights = scores.gather(-1, chosen)
    if score == SOFTMAX_CHOSEN:
        weights = torch.softmax(weights, -1)
    grad = grad.to(weights.dtype) * scaling
    if renormalise:
        total = weights.sum(-1, keepdim=True) + TINY
        grad = (grad - (grad * weights).sum(-1, keepdim=True) / total) / total
    if score in (SOFTMAX, SOFTMAX_CHOSEN):
        common = (grad * weights).sum(-1, keepdim=True)
        if score == SOFTMAX:
            return scores * (torch.zeros_like(logits).scatter_add(-1, chosen, grad) - common)
        grad = weights * (grad - common)
    elif score == SIGMOID:
        grad = grad * weights * (1 - weights)
    else:
        grad = grad * torch.sigmoid(logits.gather(-1, chosen)) / (2 * weights)
    return torch.zeros_like(logits).scatter_add(-1, chosen, grad)


# Permutation.


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order (R), inverse (T, k) and offsets (E + 1) of a stable counting sort by expert."""
    flat = experts.flatten().long()
    slots = flat.shape[0]
    kept = (flat >= 0) & (flat < num_experts)
    key, order = flat.where(kept, num_experts).sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(slots, device=flat.device)).where(kept, -1)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return order.where(key < num_experts, -1).int(), inverse.view(experts.shape).int(), offsets.int()


def gather(x: Tensor, order: Tensor | None, k: int) -> Tensor:
    """x[order // k], zeros where order is -1; x itself without an order."""
    if order is None:
        return x
    if not x.shape[0]:
        return x.new_zeros(order.shape[0], x.shape[1])
    rows = x[order.clamp(min=0).long() // k]
    return torch.where(order[:, None] >= 0, rows, 0)


def moe_permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    return gather(x, order, k)


def _slots(y: Tensor, inverse: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each choice j: the rows of y that stand for it, zeros where there is none."""
    for j in range(inverse.shape[1]):
        yield j, gather(y, inverse[:, j], 1)


def moe_unpermute(y: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_j weights[t, j] · y[inverse[t, j]]."""
    out = y.new_zeros(inverse.shape[0], y.shape[1])
    for j, rows in _slots(y, inverse):
        out = out + (rows if weights is None else rows * weights[:, j, None].to(y.dtype))
    return out


def moe_unpermute_backward(dout: Tensor, y: Tensor, inverse: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients to y and, where there are weights, to them."""
    dy = y.new_zeros(y.shape[0] + 1, y.shape[1])  # the last row takes what belongs to no row
    dots = []
    for j, rows in _slots(y, inverse):
        weight = None if weights is None else weights[:, j, None].to(y.dtype)
        dy[inverse[:, j].long()] = dout if weight is None else dout * weight
        present = inverse[:, j] >= 0
        dots.append(torch.where(present, (torch.where(present[:, None], dout, 0) * rows).sum(-1), 0))
    if weights is None:
        return dy[:-1], dy.new_empty(0)
    return dy[:-1], torch.stack(dots, 1) if dots else dy.new_zeros(weights.shape)


# Grouped products.


def _segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if stop > start:
            yield expert, slice(start, stop)


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, order: Tensor | None, k: int) -> Tensor:
    """x[r] · w[e]ᵀ + bias[e] for the rows r of each expert e; zeros in the rows of none."""
    rows = gather(x, order, k)
    out = x.new_zeros(rows.shape[0], w.shape[1])
    for expert, segment in _segments(offsets):
        out[segment] = rows[segment] @ w[expert].T
        if bias is not None:
            out[segment] += bias[expert].to(x.dtype)
    return out


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, k: int) -> Tensor:
    """Σ a[r]ᵀ · b[r] over the rows r of each expert."""
    rows = gather(b, order, k)
    out = a.new_zeros(offsets.shape[0] - 1, a.shape[1], b.shape[1])
    for expert, segment in _segments(offsets):
        out[expert] = a[segment].T @ rows[segment]
    return out


def _dense(expert: int, stacked: Sequence[Tensor | None], codebook: Tensor | None, *numbers: int) -> Tensor:
    """The weight of an expert with its columns as they are stored."""
    arguments: list[Any] = [*(None if t is None else t[expert] for t in stacked), codebook, *numbers]
    return stored_weight(*arguments)


def quant_grouped_linear(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, expert_offsets: Tensor, order: Tensor | None, bits: int, group_size: int, super_groups: int,
    zero: int, k: int,
) -> Tensor:  # fmt: skip
    """`grouped_linear` on low-bit weights."""
    levels = codes, scales, super_scales, zeros, offsets, super_offsets, codebook
    numbers = bits, group_size, super_groups, zero
    return _low_bit(x, levels, permutation, bias, expert_offsets, order, numbers, k, lambda rows: rows)


def quant_grouped_linear_int8(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, expert_offsets: Tensor, order: Tensor | None, bits: int, group_size: int, super_groups: int,
    zero: int, k: int,
) -> Tensor:  # fmt: skip
    """The same with the rows rounded to 8 bits, as `quant_linear_int8` rounds them."""
    levels = codes, scales, super_scales, zeros, offsets, super_offsets, codebook
    numbers = bits, group_size, super_groups, zero
    rounded = partial(int8_activations, group_size=group_size)
    return _low_bit(x, levels, permutation, bias, expert_offsets, order, numbers, k, rounded)


def _low_bit(
    x: Tensor, levels: tuple[Tensor | None, ...], permutation: Tensor | None, bias: Tensor | None,
    expert_offsets: Tensor, order: Tensor | None, numbers: tuple[int, ...], k: int, rounded: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    *stacked, codebook = levels
    rows = gather(x, order, k)
    out = x.new_zeros(rows.shape[0], stacked[0].shape[1])  # type: ignore[union-attr]
    for expert, segment in _segments(expert_offsets):
        weight = _dense(expert, tuple(stacked), codebook, *numbers, x.shape[1])
        here = rows[segment] if permutation is None else rows[segment][:, permutation[expert].long()]
        out[segment] = rounded(here) @ weight.to(x.dtype).T
        if bias is not None:
            out[segment] += bias[expert].to(x.dtype)
    return out


def quant_grouped_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    expert_offsets: Tensor, bits: int, group_size: int, super_groups: int, zero: int, in_features: int,
) -> Tensor:  # fmt: skip
    """x[r] · W[e]: what carries a gradient of `quant_grouped_linear` back to its rows."""
    out = x.new_zeros(x.shape[0], in_features)
    stacked = codes, scales, super_scales, zeros, offsets, super_offsets
    for expert, segment in _segments(expert_offsets):
        weight = _dense(expert, stacked, codebook, bits, group_size, super_groups, zero, in_features)
        here = x[segment] @ weight.to(x.dtype)
        out[segment] = here if permutation is None else here[:, torch.argsort(permutation[expert].long())]
    return out


# Activations.


def _halves(x: Tensor, layout: int) -> tuple[Tensor, Tensor | None]:
    """gate and up."""
    half = x.shape[-1] // 2
    if layout == UNGATED:
        return x, None
    if layout == INTERLEAVED:
        return x[..., 0::2], x[..., 1::2]
    first, second = x[..., :half], x[..., half:]
    return (first, second) if layout == GATE_UP else (second, first)


def _join(gate: Tensor, up: Tensor | None, layout: int) -> Tensor:
    """The inverse of `_halves`."""
    if up is None:
        return gate
    if layout == INTERLEAVED:
        return torch.stack([gate, up], -1).flatten(-2)
    return torch.cat([gate, up] if layout == GATE_UP else [up, gate], -1)


def _activate(x: Tensor, activation: int, alpha: float) -> Tensor:
    if activation == SILU:
        return x * torch.sigmoid(alpha * x)
    if activation in (GELU, GELU_TANH):
        return torch.nn.functional.gelu(x, approximate="none" if activation == GELU else "tanh")
    return x.relu() if activation == RELU else x.relu().square()


def _slope(x: Tensor, activation: int, alpha: float) -> Tensor:
    """The derivative of `_activate`. Where it ends in 0 and 1 it has long done so at 1000; beyond, terms overflow."""
    if activation == SILU:
        z = (alpha * x).clamp(-1000, 1000)
        s = torch.sigmoid(z)
        return s + z * s * (1 - s)
    if activation in (GELU, GELU_TANH):
        x = x.clamp(-1000, 1000)
    if activation == GELU:
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == GELU_TANH:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return (x > 0).to(x.dtype) if activation == RELU else 2 * x.relu()


def gated_activation(x: Tensor, activation: int, layout: int, limit: float, alpha: float, shift: float) -> Tensor:
    """f(gate) · (up + shift), gate at most `limit`, up within ± limit."""
    gate, up = _halves(x, layout)
    out = _activate(gate.clamp(max=limit), activation, alpha)
    return out if up is None else out * (up.clamp(-limit, limit) + shift)


def gated_activation_backward(
    grad: Tensor, x: Tensor, activation: int, layout: int, limit: float, alpha: float, shift: float
) -> Tensor:
    gate, up = _halves(x, layout)
    outside, gate = gate > limit, gate.clamp(max=limit)  # NaN is not
    d_gate = grad * _slope(gate, activation, alpha)
    d_up = None
    if up is not None:
        d_gate = d_gate * (up.clamp(-limit, limit) + shift)
        d_up = torch.where(up.abs() > limit, 0, grad * _activate(gate, activation, alpha))
    return _join(torch.where(outside, 0, d_gate), d_up, layout)
