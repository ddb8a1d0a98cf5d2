"""PEFT's LoRA on low-bit layers: `target_parameters` names low-bit experts as it names dense ones, and adapters of
experts and linear layers merge into low bits.

PEFT adapts a stacked parameter by a wrapper of the module that has it, which adds W + ΔW at every call. Low-bit experts
are layers and no parameters: while PEFT looks for what to adapt, parameters without memory stand in their places, and
while a wrapper calls the module, ΔW runs beside the layer, two thin products of the same rows. Adapters have the names
and shapes of those of dense experts: what learned on low-bit ones goes on top of dense ones, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

from metate.nn.low_bit import LowBit
from metate.nn.model import dequantize_model
from metate.nn.moe import GroupedLinear
from metate.nn.quant_linear import QuantLinear
from metate.ops.moe import QuantizedExperts, grouped_linear
from metate.quant import requantize

__all__ = ["disable", "enable"]

_before: dict[str, Any] = {}


def enable() -> None:
    """Lets PEFT's LoRA merge into low-bit layers, and `peft.LoraConfig(target_parameters=…)` adapt low-bit experts,
    those of `metate.compat.transformers.quantize_experts` and of `metate.nn.MoE`; in models that it adapts from now on.

    Adapters train, are saved and loaded, switched, added up, merged and unmerged. Merging rounds W + ΔW to the format
    that W has, as `metate.quant.requantize` does it, with a warning: what is smaller than half a step may be lost.
    `metate.nn.dequantize_model(model)` first merges without rounding. Unmerging brings W back to the bit, which is kept
    until then. Models adapted so stay it when this is disabled.
    """
    for place, name, ours in _PATCHES:
        _before.setdefault(name, getattr(place, name))
        setattr(place, name, ours)


def disable() -> None:
    """Puts PEFT's own functions back."""
    for place, name, _ in _PATCHES:
        if name in _before:
            setattr(place, name, _before.pop(name))


def _inject_parameters(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    model = kwargs["model"] if "model" in kwargs else args[1]
    with ExitStack() as stack:
        for module in list(model.modules()):
            names = [name for name, child in module._modules.items() if isinstance(child, GroupedLinear)]
            if names:
                stack.enter_context(_as_parameters(module, names))
        return _before["_inject_parameters"](tuner, *args, **kwargs)


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> Any:
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    if isinstance(target, QuantLinear):
        config.fan_in_fan_out = False  # W is (out_features, in_features), also in the place of a Conv1D
        return Linear(target, adapter_name, config=config, **kwargs)
    return _before["dispatch_default"](target, adapter_name, config=config, **kwargs)


def _check_merge_allowed(tuner: Any) -> None:
    """PEFT refuses models of GPTQ, for the layers of its package cannot merge; ours can."""
    model, name = tuner.model.__dict__, "quantization_method"
    hidden = name in model and not any(isinstance(module, GPTQLoraLinear) for module in tuner.model.modules())
    kept = model.pop(name) if hidden else None
    try:
        _before["_check_merge_allowed"](tuner)
    finally:
        if hidden:
            model[name] = kept


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (tuners_utils.BaseTuner, "_inject_parameters", _inject_parameters),
    (lora_model, "dispatch_default", _dispatch),
    (lora_model.LoraModel, "_check_merge_allowed", _check_merge_allowed),
)


class _Merging:
    """A layer of adapters over a low-bit one, whose weight as it was before the first merge is kept."""

    merged_adapters: list[str]
    _unmerged: Any = None

    @contextmanager
    def _rounding(self, layer: Any) -> Iterator[list[Tensor]]:
        """Into the list goes what W, dense, has become; the layer rounds it, or takes back what is kept."""
        was, found = list(self.merged_adapters), list[Tensor]()
        try:
            yield found
        except BaseException:
            self.merged_adapters[:] = was
            raise
        if not self.merged_adapters:
            if was:
                layer.weight, self._unmerged = self._unmerged.to(layer.weight.device), None
        elif self.merged_adapters != was:
            warnings.warn(
                "metate: merging adapters into low-bit weights rounds their sum to the same format; "
                "metate.nn.dequantize_model(model) before merging keeps it whole",
                stacklevel=2,
            )
            before = layer.weight
            self._unmerged = before if self._unmerged is None else self._unmerged
            if isinstance(before, QuantizedExperts):
                layer.weight = QuantizedExperts.stack([*map(requantize, before, found[0])])
            else:
                layer.weight = requantize(before, found[0])


class Linear(_Merging, lora.Linear):  # type: ignore[misc]
    """PEFT's, on a QuantLinear."""

    base_layer: Any

    @contextmanager
    def _on_dense(self) -> Iterator[None]:
        """For what PEFT does to weight and bias themselves."""
        layer: Any = self.base_layer
        if not isinstance(layer, LowBit):  # dequantised in the meantime
            yield
            return
        with self._rounding(layer) as found:
            dense: Any = dequantize_model(layer)
            self.base_layer = dense
            try:
                yield
            finally:
                self.base_layer = layer
            if layer.bias is not None:
                layer.bias.data = dense.bias.data.to(layer.bias.dtype)
            found.append(dense.weight.detach())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._on_dense():
            super().merge(True, adapter_names)  # low bits have no code for NaN

    def unmerge(self) -> None:
        with self._on_dense():
            super().unmerge()


@contextmanager
def _as_parameters(experts: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Parameters in the places of layers."""
    modules = dict(experts._modules)
    for name in names:
        experts._parameters[name] = nn.Parameter(_parameter(experts, experts._modules.pop(name)), False)
    try:
        yield
    finally:
        for name in names:
            del experts._parameters[name]
        experts._modules.clear()
        experts._modules.update(modules)


def _parameter(experts: nn.Module, layer: Any) -> Tensor:
    """The weight as the model was made with it; of a low-bit one shape and device only."""
    weight = layer.weight
    if isinstance(layer, LowBit):
        weight = torch.empty((), device=weight.device).expand(weight.shape)
    return weight.mT if _turned(experts) else weight  # type: ignore[no-any-return]


def _turned(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


class _Adapted(nn.Module):
    """A layer of experts and adapters beside it."""

    def __init__(self, layer: nn.Module, adapters: list[tuple[Tensor, Tensor, float]]) -> None:
        super().__init__()
        self.layer, self.adapters = layer, adapters

    def forward(self, x: Tensor, offsets: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:
        out: Tensor = self.layer(x, offsets, order, k)
        for A, B, scaling in self.adapters:
            thin = grouped_linear(x, A.to(x.dtype), offsets, order=order, k=k)
            out = out + scaling * grouped_linear(thin, B.to(x.dtype), offsets)
        return out


class ParamWrapper(_Merging, lora.ParamWrapper):  # type: ignore[misc]  # PEFT asks for a class of this name
    """PEFT's, for layers of experts too."""

    def _layer(self) -> Any:
        return self.get_base_layer()._modules.get(self.parameter_name)

    def get_param(self) -> Tensor:
        layer = self._layer()
        found: Tensor = super().get_param() if layer is None else _parameter(self.get_base_layer(), layer)
        return found

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A (experts, rank, in) and B (experts, out, rank), which PEFT keeps as (out, rank · experts)."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        experts = self.num_experts
        return (
            A.view(experts, -1, A.shape[1]),
            B.reshape(-1, experts).t().contiguous().view(experts, B.shape[0], -1),
            self.scaling[adapter],
        )

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        layer, modules = self._layer(), self.get_base_layer()._modules
        if layer is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        adapters = [self._factors(adapter) for adapter in active_adapters if adapter in self.lora_A]
        modules[self.parameter_name] = _Adapted(layer, adapters)
        try:
            yield
        finally:
            modules[self.parameter_name] = layer

    @contextmanager
    def _on_dense(self) -> Iterator[None]:
        """For what PEFT does to the parameter itself."""
        layer, experts, name = self._layer(), self.get_base_layer(), self.parameter_name
        if layer is None:
            yield
            return
        with ExitStack() as stack:
            found = stack.enter_context(self._rounding(layer)) if isinstance(layer, LowBit) else None
            with _as_parameters(experts, [name]):
                if found is not None:
                    dense = layer.dequantize()
                    experts._parameters[name].data = dense.mT if _turned(experts) else dense
                yield
                merged = experts._parameters[name].data
            merged = merged.mT if _turned(experts) else merged
            if found is None:
                layer.weight.data = merged
            else:
                found.append(merged)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        safe_merge |= isinstance(self._layer(), LowBit)
        with self._on_dense():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        with self._on_dense():
            super().unmerge()
