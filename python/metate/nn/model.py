"""quantize_model and dequantize_model: the linear layers of any module to low bits, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from metate.errors import fail
from metate.nn.quant_linear import METHODS, QuantLinear

Module = TypeVar("Module", bound=nn.Module)


def quantize_model(model: Module, method: str = "nf4", *, skip: Iterable[str] = (), **options: Any) -> Module:
    """Replaces the nn.Linear layers of a model by QuantLinear, in place, one at a time; returns the model.

    Left dense: subclasses of nn.Linear, layers whose weight another module uses too (an output layer tied to the
    embedding), and what `skip` names.

    Args:
        method: "nf4", "fp4", "int8" or "int4".
        skip: names of modules, whole ("model.lm_head") or the last parts ("lm_head"), with * for anything; all that
            is inside them stays dense too.
        options: of the method, as in `QuantLinear.from_linear`.

    Raises:
        ValueError: the method is unknown, or a name of `skip` fits no module.
    """
    if method not in METHODS:
        raise fail("quantize_model", "method", repr(method), " or ".join(map(repr, METHODS)))
    skip = [skip] if isinstance(skip, str) else list(skip)
    named = list(model.named_modules(remove_duplicate=False))
    for pattern in skip:
        if not any(_names(pattern, name) for name, _ in named):
            raise fail("quantize_model", "skip", repr(pattern), f"the name of a module of {type(model).__name__}")
    if type(model) is nn.Linear:
        return model if skip else QuantLinear.from_linear(model, method, **options)  # type: ignore[arg-type, return-value]
    layers = {name: m for name, m in named if type(m) is nn.Linear and not any(_names(s, name) for s in skip)}
    chosen = set(map(id, layers.values()))
    elsewhere = {
        id(parameter) for _, m in named if id(m) not in chosen for parameter in m.parameters(recurse=False)
    }  # fmt: skip
    made: dict[int, QuantLinear] = {}
    for name, layer in layers.items():
        if id(layer.weight) in elsewhere:
            continue
        if id(layer) not in made:
            made[id(layer)] = QuantLinear.from_linear(layer, method, **options)
        model.set_submodule(name, made[id(layer)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path takes weights as tensors
    return model


def dequantize_model(model: Module, dtype: torch.dtype = torch.float32) -> Module:
    """Replaces the QuantLinear layers of a model by nn.Linear, in place, one at a time; returns the model. Their
    weights can learn.

    Layers inside of others count too: after it, PEFT's `merge_and_unload` adds adapters to dense weights, without the
    rounding that going back to low bits would cost.

    Args:
        dtype: of the weights. Biases stay what they are.
    """
    if isinstance(model, QuantLinear):
        return _dense(model, dtype)  # type: ignore[return-value]
    made: dict[int, nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLinear):
            if id(layer) not in made:
                made[id(layer)] = _dense(layer, dtype)
            model.set_submodule(name, made[id(layer)])
    return model


def _dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
    dense.weight = nn.Parameter(layer.dequantize(dtype))
    if isinstance(layer.bias, nn.Parameter) or layer.bias is None:
        dense.bias = layer.bias
    else:
        dense.bias = nn.Parameter(layer.bias, requires_grad=False)
    return dense.train(layer.training)


def _names(pattern: str, name: str) -> bool:
    """Whether a name is, or is inside of, what the pattern names."""
    return any(fnmatchcase(name, form) for form in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))
