"""Experts of transformers, which models keep stacked in one tensor, as linear layers of their own: as checkpoints do.

Their names and order come from transformers' table of how it stacks what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import fail
from metate.models.experts import stacked_weights
from metate.nn import QuantGroupedLinear

_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r".*experts\.\*\.(\w+)\.weight\$?")


class Expert(nn.Module):
    """One expert: the linear layers whose outputs stand side by side, the activation, the last layer."""

    def __init__(self, weights: Mapping[str, Tensor], activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activate = activate
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, weight.requires_grad)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.children()
        out: Tensor = last(self.activate(torch.cat([linear(x) for linear in first], -1)))
        return out


class Apart(nn.ModuleList):
    """What was stacked, called as before. everyone: all tokens go to all experts, with even weights.

    stacked: the module in whose place this one stands; its parameters are gone.
    """

    everyone = False

    def __init__(self, stacked: Any, parts: Mapping[str, Sequence[str]]) -> None:
        weights = {name: stacked._parameters.pop(name) for name in _STACKS if name in stacked._parameters}
        self.parts = {name: parts[name] for name in weights}
        activate = stacked._apply_gate if stacked.has_gate else stacked.act_fn
        experts = range(next(iter(weights.values())).shape[0])
        super().__init__(
            Expert({p: w for name in weights for p, w in self._split(name, weights[name][e])}, activate)
            for e in experts
        )
        self.__dict__["stacked"] = stacked

    def _split(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        return zip(self.parts[name], weight.data.chunk(len(self.parts[name])), strict=True)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            if self.everyone:
                tokens = torch.arange(len(hidden_states), device=hidden_states.device)
                weights = top_k_weights.new_full((len(tokens), 1), 1 / len(self))
            else:
                tokens, place = (top_k_index == number).nonzero(as_tuple=True)
                weights = top_k_weights[tokens, place, None]
            if len(tokens):
                out.index_add_(0, tokens, (expert(hidden_states[tokens]) * weights).to(out.dtype))
        return out


def take_apart(model: nn.Module) -> nn.Module:
    """Puts `Apart` in the place of all stacked experts, in place, with views of the same memory; returns the model.

    Raises ValueError where a checkpoint of the model has no linear layers in the place of its experts.
    """
    found = {name: module for name, module in model.named_modules() if _is_stacked(module)}
    parts = _parts(model) if found else {}
    for name, module in found.items():
        odd = module.is_transposed or module.has_bias or module.has_post_expert_norm or not module.is_concatenated
        if odd or any(stack in module._parameters and stack not in parts for stack in _STACKS):
            got = f"a {type(model).__name__}, whose checkpoints have {type(module).__name__} in one piece"
            expected = "experts that are linear layers; metate.compat.transformers.quantize_experts takes these"
            raise fail("quantize_decoder", "model", got, expected)
        model.set_submodule(name, Apart(module, parts))
    return model


def _is_stacked(module: Any) -> bool:
    """Whether it has transformers' interface of experts, and dense weights."""
    return hasattr(module, "is_transposed") and any(name in module._parameters for name in _STACKS)


def _parts(model: Any) -> dict[str, tuple[str, ...]]:
    """Stacked parameter -> the names that its parts have in a checkpoint, in the order of rows."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, tuple[str, ...]] = {}
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        names = stacked_parts(conversion)
        if names is not None:
            found.setdefault(conversion.target_patterns[0].rpartition(".")[2], names)
    return found


def stacked_parts(conversion: Any) -> tuple[str, ...] | None:
    """The names of an expert's parts that a conversion of transformers stacks; None where it does something else."""
    names = [_EXPERT.fullmatch(pattern) for pattern in conversion.source_patterns]
    return tuple(name[1] for name in names if name) if all(names) and len(conversion.target_patterns) == 1 else None


def apart(model: nn.Module) -> dict[str, Apart]:
    """The experts that stand apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Apart)}


def gates(model: nn.Module) -> dict[str, nn.Module]:
    """What stands beside experts and chooses among them, or weighs them: few outputs, on which much depends."""
    found: dict[str, nn.Module] = {}
    for name, experts in apart(model).items():
        around = name.rpartition(".")[0]
        for inner, module in model.get_submodule(around).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] in (1, len(experts)):
                found[f"{around}.{inner}"] = module
    return found


@contextmanager
def everyone(layer: nn.Module) -> Iterator[None]:
    """All tokens go to all experts."""
    changed = apart(layer).values()
    for experts in changed:
        experts.everyone = True
    try:
        yield
    finally:
        for experts in changed:
            experts.everyone = False


def together(experts: Apart) -> nn.Module:
    """The module as it was, with layers of low-bit experts; `metate.compat.transformers.use_experts` runs them."""
    stacked: Any = experts.stacked
    for stack, parts in experts.parts.items():
        weight = stacked_weights([[getattr(expert, part).weight for part in parts] for expert in experts])
        if isinstance(weight, Tensor):
            stacked.register_parameter(stack, nn.Parameter(weight.detach(), requires_grad=False))
        else:
            stacked.add_module(stack, QuantGroupedLinear(weight))
    made: nn.Module = stacked.train(experts.training)
    return made


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of parameters in a model whose experts stand apart -> their names in a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty(0, 0) for name in names}
    written = {id(mark): name for name, mark in revert_weight_conversion(model, dict(marks)).items()}
    lost = next((name for name, mark in marks.items() if id(mark) not in written), None)
    if lost is not None:
        got = f"a {type(model).__name__}, whose checkpoints have {lost} in another form"
        raise fail("quantize_decoder", "model", got, "one whose weights have names of their own there")
    return {name: written[id(mark)] for name, mark in marks.items()}
