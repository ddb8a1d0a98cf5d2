"""PEFT's LoRA on low-bit experts: `target_parameters` names them as it names dense ones.

PEFT adapts a stacked parameter by a wrapper of the module that has it, which adds W + ΔW at every call. Low-bit experts
are layers and no parameters: while PEFT looks for what to adapt, parameters without memory stand in their places, and
while a wrapper calls the module, ΔW runs beside the layer, two thin products of the same rows. Adapters have the names
and shapes of those of dense experts: what learned on low-bit ones goes on top of dense ones, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from peft.tuners.lora import model as lora_model
from torch import Tensor, nn

from metate.errors import fail
from metate.nn.low_bit import LowBit
from metate.nn.moe import GroupedLinear
from metate.ops.moe import grouped_linear

__all__ = ["disable", "enable"]

_before: dict[str, Any] = {}


def enable() -> None:
    """Lets `peft.LoraConfig(target_parameters=…)` adapt low-bit experts, those of
    `metate.compat.transformers.quantize_experts` and of `metate.nn.MoE`.

    Adapters train, are saved and loaded, switched and added up. `merge_and_unload` wants dense experts:
    `metate.nn.dequantize_model(model)` first. Models adapted so stay it when this is disabled.
    """
    if not _before:
        _before.update(inject=tuners_utils.BaseTuner._inject_parameters, dispatch=lora_model.dispatch_default)
        tuners_utils.BaseTuner._inject_parameters = _inject_parameters
        lora_model.dispatch_default = _dispatch


def disable() -> None:
    """Puts PEFT's own functions back."""
    if _before:
        tuners_utils.BaseTuner._inject_parameters = _before.pop("inject")
        lora_model.dispatch_default = _before.pop("dispatch")


def _inject_parameters(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    model = kwargs["model"] if "model" in kwargs else args[1]
    with ExitStack() as stack:
        for module in list(model.modules()):
            names = [name for name, child in module._modules.items() if isinstance(child, GroupedLinear)]
            if names:
                stack.enter_context(_as_parameters(module, names))
        return _before["inject"](tuner, *args, **kwargs)


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> Any:
    if parameter_name is None:
        return _before["dispatch"](target, adapter_name, config=config, **kwargs)
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)


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
    return weight.mT if getattr(experts, "is_transposed", False) else weight  # type: ignore[no-any-return]


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


class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]  # PEFT asks for a class of this name
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
    def _merging(self) -> Iterator[None]:
        """For what PEFT does to the parameter itself."""
        layer, experts, name = self._layer(), self.get_base_layer(), self.parameter_name
        if layer is None:
            yield
            return
        if isinstance(layer, LowBit):
            expected = "dense, for a low-bit weight has no room for an adapter: metate.nn.dequantize_model(model) first"
            raise fail("compat.peft", name, layer, expected, error=NotImplementedError)
        with _as_parameters(experts, [name]):
            yield
            merged = experts._parameters[name].data
        layer.weight.data = merged.mT if getattr(experts, "is_transposed", False) else merged

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with self._merging():
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with self._merging():
            super().unmerge()
