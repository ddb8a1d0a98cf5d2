"""Mixtures of experts of transformers on metate: its experts interface, and patches for the classes that have none.

Imported through `metate.compat.transformers` only. Experts that go through the interface keep their weights as one
tensor for all of them; what differs is read from their flags: biases, transposed weights, columns of gate and up, a
norm behind, an activation of their own. Llama-4, DBRX, Switch, JetMoE, Step-3.7 and LongCat-Flash have no interface:
the modules of a model that asks get another `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metate.nn import QuantGroupedLinear
from metate.nn.moe import parts_of
from metate.ops.moe import (
    activation_scalars,
    gated_activation,
    grouped_linear,
    layer_arguments,
    layer_shortcut,
    moe_permute,
    moe_sort,
    moe_unpermute,
)

Model = TypeVar("Model", bound=nn.Module)

_NAME = "metate"
_GATED = {  # classes of transformers.activations, and torch's own, that only wrap these functions
    "SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "ReLUSquaredActivation": "relu2",
}  # fmt: skip
_CLAMPED = {  # classes whose own function is GPT-OSS's activation: gating, and the names of limit and alpha
    "GptOssExperts": ("interleaved", "limit", "alpha"),
    "OpenAIPrivacyFilterExperts": ("gate_up", "limit", "alpha"),
    "MiniMaxM3VLExperts": ("gate_up", "swiglu_limit", "swiglu_alpha"),
}


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' interface: hidden_states (tokens, hidden) through the experts top_k_index (tokens, k).

    Numbers of no expert (tokens that belong to another process) cost nothing and give zero, and no gradient.
    """
    chosen = top_k_index.to(torch.int32)
    weights = _widened(top_k_weights, hidden_states)
    given = experts, hidden_states, chosen, weights
    activation, parts = _activation(experts), _parts(experts)
    if activation is None or parts is None or getattr(experts, "has_post_expert_norm", False):
        return _one_by_one(*given)
    routed, rounds = (chosen, weights, experts.num_experts, chosen.numel()), _rounds(experts)
    args = layer_arguments(hidden_states, routed, parts, activation_scalars(**activation), rounds)
    return layer_shortcut(args, _one_by_one, given)  # type: ignore[no-any-return]


def _one_by_one(experts: Any, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    order, inverse, offsets = moe_sort(chosen, experts.num_experts)
    hidden = _project(experts, _first(experts), hidden_states, offsets, order, chosen.shape[1])
    hidden = _project(experts, "down_proj", _activate(experts, hidden), offsets)
    if getattr(experts, "has_post_expert_norm", False):
        hidden = experts.post_expert_norm(hidden)
    return _add_up(hidden, inverse, weights)


def _first(experts: Any) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def _parts(experts: Any) -> tuple[Any, ...] | None:
    """Weights and biases, where neither projection has to be called for itself."""
    layers = getattr(experts, _first(experts)), experts.down_proj
    modules = [isinstance(layer, nn.Module) for layer in layers]
    if any(modules):
        return parts_of(*layers) if all(modules) else None
    biases = _bias(experts, _first(experts)), _bias(experts, "down_proj")
    return *(_weight(experts, layer) for layer in layers), *biases


def _rounds(experts: Any) -> bool:
    return bool(getattr(experts.down_proj, "int8_activations", False))


def _weight(experts: Any, weight: Tensor) -> Tensor:
    return weight.mT if getattr(experts, "is_transposed", False) else weight


def _bias(experts: Any, name: str) -> Tensor | None:
    return getattr(experts, f"{name}_bias") if getattr(experts, "has_bias", False) else None


def _project(
    experts: Any, name: str, x: Tensor, offsets: Tensor, order: Tensor | None = None, k: int = 1
) -> Tensor:  # fmt: skip
    weight = getattr(experts, name)
    if isinstance(weight, nn.Module):  # of `quantize_experts`, or an adapter around it
        return weight(x, offsets, order, k)  # type: ignore[no-any-return]
    return grouped_linear(x, _weight(experts, weight), offsets, _bias(experts, name), order=order, k=k)


def _activate(experts: Any, hidden: Tensor) -> Tensor:
    """In one pass where the activation is known here; else by the experts' own function, which sees rows."""
    known = _activation(experts)
    if known is not None:
        return gated_activation(hidden, **known)
    if not getattr(experts, "has_gate", True):
        return _gated(experts.act_fn, hidden, "none")
    if _own_gate(experts) is None:
        return _gated(experts.act_fn, hidden)
    out: Tensor = experts._apply_gate(hidden)
    return out


def _own_gate(experts: Any) -> Any:
    """The function of the class, if it has one of its own."""
    from transformers.integrations.moe import _default_apply_gate

    own = getattr(type(experts), "_apply_gate", _default_apply_gate)
    return None if own is _default_apply_gate else own


def _activation(experts: Any) -> dict[str, Any] | None:
    """Arguments of `metate.gated_activation`, where it has what the experts compute."""
    gated = getattr(experts, "has_gate", True)
    own = _own_gate(experts) if gated else None
    if own is None:
        name = _GATED.get(type(experts.act_fn).__name__)
        return None if name is None else dict(activation=name, gating="gate_up" if gated else "none")
    if type(experts).__name__ not in _CLAMPED:
        return None
    gating, *names = _CLAMPED[type(experts).__name__]
    limit, alpha = (getattr(experts, name) for name in names)
    return dict(gating=gating, limit=limit, alpha=alpha, shift=1.0)


def _gated(activation: nn.Module, hidden: Tensor, gating: str = "gate_up") -> Tensor:
    """activation(gate) · up of columns gate first, or activation(hidden)."""
    name = _GATED.get(type(activation).__name__)
    if name is not None:
        return gated_activation(hidden, name, gating=gating)
    gate, up = (hidden, 1.0) if gating == "none" else hidden.chunk(2, -1)
    out: Tensor = activation(gate) * up
    return out


def _add_up(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    return moe_unpermute(rows, inverse, None if weights is None else _widened(weights, rows))


def _widened(weights: Tensor, rows: Tensor) -> Tensor:
    """To what sums of rows are kept in."""
    return weights.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)


# Classes without the interface.


def _llama4(moe: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Its scores multiply the inputs of the experts."""
    rows = hidden_states.reshape(-1, moe.hidden_dim)
    scores, logits = moe.router(rows)
    chosen = logits.topk(moe.top_k, 1).indices
    order, inverse, offsets = moe_sort(chosen.to(torch.int32), moe.num_experts)
    x = moe_permute(rows, order, moe.top_k) * scores.gather(1, chosen).flatten()[order.long(), None]
    hidden = grouped_linear(x, moe.experts.gate_up_proj.mT, offsets)
    hidden = grouped_linear(_gated(moe.experts.act_fn, hidden), moe.experts.down_proj.mT, offsets)
    return moe.shared_expert(rows) + _add_up(hidden, inverse), logits


def _dbrx(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Its gate, up and down lie in two dimensions, down transposed."""
    mlp, shape = experts.mlp, (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    gate, up, down = (weight.view(shape) for weight in (mlp.w1, mlp.v1, mlp.w2))
    rows, k = hidden_states.reshape(-1, experts.hidden_size), top_k_index.shape[1]
    order, inverse, offsets = moe_sort(top_k_index.to(torch.int32), experts.num_experts)
    gate, up = (grouped_linear(rows, weight, offsets, order=order, k=k) for weight in (gate, up))
    hidden = grouped_linear(mlp.activation_fn(gate) * up, down.mT, offsets)
    return _add_up(hidden, inverse, top_k_weights).view(hidden_states.shape)


def _switch(experts: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """One expert a token, none where it was full; every expert is a module of its own."""
    every, weights = list(experts.values()), _switch_weights(experts)
    if not weights:  # low-bit, one by one
        return type(experts).forward(experts, hidden_states, selected_experts, routing_weights)  # type: ignore[no-any-return]
    if not torch.compiler.is_compiling():
        for layer in weights:
            _pack(layer)
    chosen = selected_experts.argmax(-1).where(selected_experts.any(-1), experts.num_experts)
    order, inverse, offsets = moe_sort(chosen.to(torch.int32), experts.num_experts)
    hidden = grouped_linear(hidden_states, stack(weights[0]), offsets, order=order)
    hidden = every[0].dropout(every[0].act(hidden)).to(weights[1][0].dtype)
    hidden = grouped_linear(hidden, stack(weights[1]), offsets)
    return _add_up(hidden, inverse, routing_weights).to(hidden_states.dtype)


def _switch_weights(experts: Any) -> list[list[Tensor]]:
    """Those of the first layers and of the second ones; nothing where they are no tensors."""
    found = [[expert.get_submodule(name).weight for expert in experts.values()] for name in ("wi", "wo")]
    return found if all(isinstance(weight, Tensor) for layer in found for weight in layer) else []


def _jetmoe(experts: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Rows come sorted."""
    offsets = torch.tensor([0, *accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
    return grouped_linear(inputs, experts.weight, offsets)


def _longcat_flash(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts behind those with weights return their input."""
    number, k = experts.num_routed_experts, top_k_index.shape[1]
    same = (_widened(top_k_weights, hidden_states) * (top_k_index >= number)).sum(-1, keepdim=True)
    out: Tensor = (hidden_states * same).to(hidden_states.dtype)
    if number == 0:
        return out
    order, inverse, offsets = moe_sort(top_k_index.to(torch.int32), number)
    hidden = grouped_linear(hidden_states, experts.gate_up_proj[:number], offsets, order=order, k=k)
    hidden = grouped_linear(_gated(experts.act_fn, hidden), experts.down_proj, offsets)
    return out + _add_up(hidden, inverse, top_k_weights)


_PATCHES: dict[str, Callable[..., Any]] = {
    "Llama4TextMoe": _llama4, "DbrxExperts": _dbrx, "SwitchTransformersExperts": _switch,
    "JetMoeParallelExperts": _jetmoe, "Step3p7Experts": experts_forward, "LongcatFlashExperts": _longcat_flash,
}  # fmt: skip
_REFUSED = {
    "NllbMoeExperts": "transformers reads its router's mask as expert numbers: every token takes experts 0 and 1; keep "
    "experts_implementation='eager' for what transformers computes",
}


class _Stack(torch.autograd.Function):
    """torch.stack, without a copy where the tensors already follow one another in memory."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        if not _follow(tensors):
            return torch.stack(tensors)
        first = tensors[0]
        return first.detach().as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.unbind()


def _follow(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie behind one another in memory."""
    first, storage = tensors[0], tensors[0].untyped_storage().data_ptr()
    return all(
        t.untyped_storage().data_ptr() == storage and t.is_contiguous()
        and t.storage_offset() == first.storage_offset() + i * first.numel()
        for i, t in enumerate(tensors)
    )  # fmt: skip


def stack(tensors: Sequence[Tensor]) -> Tensor:
    return _Stack.apply(*tensors)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def _pack(parameters: Sequence[Tensor]) -> None:
    """Moves parameters behind one another in memory, unless they are; they stay parameters of their own."""
    if not _follow(parameters):
        for parameter, place in zip(parameters, torch.stack(list(parameters)), strict=True):
            parameter.data = place


# What users call.


def register() -> None:
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(_NAME, experts_forward)
    if not _ORIGINALS:
        for name, also in (("post_init", _made), ("set_experts_implementation", _set)):
            _ORIGINALS[name] = getattr(PreTrainedModel, name)
            setattr(PreTrainedModel, name, _followed(_ORIGINALS[name], also))


def unregister() -> None:
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface._global_mapping.pop(_NAME, None)
    while _ORIGINALS:
        setattr(PreTrainedModel, *_ORIGINALS.popitem())


_ORIGINALS: dict[str, Callable[..., Any]] = {}  # methods of transformers' models, while ours stand in their place


def _followed(original: Callable[..., Any], also: Callable[..., None]) -> Callable[..., Any]:
    @wraps(original)
    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original(model, *args, **kwargs)
        also(model, *args, **kwargs)
        return out

    return method


def _made(model: Any) -> None:
    if getattr(model.config, "_experts_implementation", None) == _NAME:
        _patch(model, _NAME)


def _set(model: nn.Module, experts_implementation: Any) -> None:
    if isinstance(experts_implementation, str):
        _patch(model, experts_implementation)


def _patch(model: nn.Module, implementation: str) -> None:
    """The modules of classes without the interface."""
    for module in model.modules():
        reason = _REFUSED.get(type(module).__name__) if implementation == _NAME else None
        if reason is not None:
            raise NotImplementedError(f"metate.compat.transformers: no {type(module).__name__}: {reason}")
        patch = _PATCHES.get(type(module).__name__)
        if patch is not None and type(module).__module__.startswith("transformers.models."):
            module.__dict__.pop("forward", None)
            if implementation == _NAME:
                module.forward = MethodType(patch, module)


def use_experts(model: Model, implementation: str = _NAME) -> Model:
    """Runs the experts of one model on metate, whatever its class; returns the model.

    Classes with transformers' interface get `set_experts_implementation`, the others (Llama-4, DBRX, Switch, JetMoE,
    Step-3.7, LongCat-Flash) another `forward` on their modules. Any other implementation than "metate" takes that back.

    Raises:
        NotImplementedError: for NLLB-MoE, whose experts transformers does not run as they were trained.
    """
    if implementation == _NAME:
        register()
    _patch(model, implementation)
    by_name: Any = getattr(model, "set_experts_implementation", None)
    if by_name is not None:
        by_name(implementation)
    return model


@torch.no_grad()
def quantize_experts(model: Model, method: str = "nf4", **options: Any) -> Model:
    """Makes the experts of one model low-bit, in place, a matrix at a time, and runs them on metate; returns the model.

    Serves the classes with transformers' interface: `gate_up_proj` and `down_proj` become QuantGroupedLinear layers.
    `metate.quantize_model` does the linear layers of the same model.

    Args:
        method, options: as of `metate.quantize_model`.
    """
    for module in list(model.modules()):
        if not {"gate_up_proj", "up_proj"} & module._parameters.keys() or not hasattr(module, "is_transposed"):
            continue
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            weight = module._parameters.pop(name, None)
            if weight is not None:
                dense = weight.mT if module.is_transposed else weight
                bias = module._parameters.pop(f"{name}_bias", None)
                module.add_module(name, QuantGroupedLinear.from_dense(dense, bias, method, **options))
    return use_experts(model)
