"""quantize_model and dequantize_model: the linear layers of any module to low bits, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metate.errors import fail, require_choice
from metate.nn.linear import Linear
from metate.nn.low_bit import METHODS, LowBit
from metate.nn.moe import GroupedLinear
from metate.nn.quant_linear import QuantGroupedLinear, QuantLinear
from metate.op import below_autocast

Module = TypeVar("Module", bound=nn.Module)
_LOW_BIT: dict[type, Any] = {nn.Linear: QuantLinear, Linear: QuantLinear, GroupedLinear: QuantGroupedLinear}


def quantize_model(model: Module, method: str = "nf4", *, skip: Iterable[str] = (), **options: Any) -> Module:
    """Replaces the linear layers of a model, torch's and metate's, by QuantLinear, and the experts of metate.nn.MoE by
    QuantGroupedLinear, in place, one at a time; returns the model.

    Left dense: other subclasses of nn.Linear (routers are such), layers whose weight another module uses too (an output
    layer tied to the embedding), and what `skip` names.

    Args:
        method: "nf4", "fp4", "int8", "int4", "hqq" (integers with fitted zero points) or "fp8" (e4m3 in blocks).
        skip: names of modules, whole ("model.lm_head") or the last parts ("lm_head"), with * for anything; all that
            is inside them stays dense too.
        options: of the method, as in `QuantLinear.from_linear`.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: the method is unknown, or a name of `skip` fits no module.
    """
    if not isinstance(model, nn.Module):
        raise fail("quantize_model", "model", type(model).__name__, "a torch.nn.Module", error=TypeError)
    require_choice("quantize_model", "method", method, METHODS)
    if not isinstance(skip, Iterable):
        raise fail("quantize_model", "skip", repr(skip)[:60], "names of modules", error=TypeError)
    skip = [skip] if isinstance(skip, str) else list(skip)
    named = list(model.named_modules(remove_duplicate=False))
    for pattern in skip:
        if not any(_names(pattern, name) for name, _ in named):
            raise fail("quantize_model", "skip", repr(pattern), f"the name of a module of {type(model).__name__}")
    if type(model) in _LOW_BIT:
        return model if skip else _low_bit(model, method, options)  # type: ignore[return-value]
    layers = {name: m for name, m in named if type(m) in _LOW_BIT and not any(_names(s, name) for s in skip)}
    chosen = set(map(id, layers.values()))
    elsewhere = {
        id(parameter) for _, m in named if id(m) not in chosen for parameter in m.parameters(recurse=False)
    }  # fmt: skip
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if id(layer.weight) in elsewhere:
            continue
        if id(layer) not in made:
            made[id(layer)] = _low_bit(layer, method, options)
        model.set_submodule(name, made[id(layer)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path takes weights as tensors
    return model


def dequantize_model(model: Module, dtype: torch.dtype = torch.float32) -> Module:
    """Replaces the low-bit layers of a model by dense ones, in place, one at a time; returns the model. Their weights
    can learn.

    Layers inside of others count too: after it, PEFT's `merge_and_unload` adds adapters to dense weights, without the
    rounding that going back to low bits would cost.

    Args:
        dtype: of the weights. Biases stay what they are.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise fail("dequantize_model", "model", type(model).__name__, "a torch.nn.Module", error=TypeError)
    if isinstance(model, LowBit):
        return _dense(model, dtype)  # type: ignore[return-value]
    made: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LowBit):
            if id(layer) not in made:
                made[id(layer)] = _dense(layer, dtype)
            model.set_submodule(name, made[id(layer)])
    return model


def _low_bit(layer: nn.Module, method: str, options: dict[str, Any]) -> nn.Module:
    with below_autocast():  # quantisers choose the dtypes they compute in
        made: nn.Module = _LOW_BIT[type(layer)].from_linear(layer, method, **options)
    return made


def _dense(layer: LowBit, dtype: torch.dtype) -> nn.Module:
    *experts, out_features, in_features = layer.weight.shape
    kind: Any = GroupedLinear if experts else nn.Linear
    dense: Any = kind(*experts, in_features, out_features, False, device="meta")
    dense.weight = nn.Parameter(layer.dequantize(dtype))
    bias: Tensor | None = layer.bias
    dense.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    made: nn.Module = dense.train(layer.training)
    return made


def _names(pattern: str, name: str) -> bool:
    """Whether a name is, or is inside of, what the pattern names."""
    return any(fnmatchcase(name, form) for form in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))
