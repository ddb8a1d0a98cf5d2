"""What layers with low-bit weights share: tensors as buffers, states that are checkpoints, dtypes that stay.

On a CPU codes stand in tiles, wherever they can (`QuantizedWeight.in_tiles`): as much memory, and the fastest read.
States have them as rows, which every device and version reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import FormatError, fail, require_choice
from metate.low_bit import arranged, rows_of
from metate.ops.quant_linear import QuantizedWeight
from metate.quant import canonical, quantize_fp4, quantize_fp8, quantize_hqq, quantize_nf4, quantize_rtn
from metate.quant.settings import Settings

METHODS: dict[str, Callable[..., QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "fp4": quantize_fp4,
    "int8": partial(quantize_rtn, bits=8, group_size=-1),
    "int4": quantize_rtn,
    "hqq": quantize_hqq,
    "fp8": quantize_fp8,
}
_NUMBERS = ("shape", "bits", "group_size", "super_groups", "zero")
_PARTS = (*canonical.FIELDS, canonical.MARK)


class LowBit(nn.Module):
    """A module whose `weight` is a QuantizedWeight, or QuantizedExperts, on its buffers."""

    bias: Any
    _kind: Any

    def _take(self, weight: Any, bias: Tensor | None) -> None:
        """Makes the weight's tensors buffers; the bias too, unless it is a Parameter."""
        weight = weight.in_tiles()
        self._hold(weight, {**weight.tensors, canonical.MARK: canonical.numbers_of(weight)})
        self._weight: Any = weight
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    def _hold(self, weight: Any, tensors: Mapping[str, Tensor]) -> None:
        """Makes the tensors buffers in place of those that are there, and takes the numbers."""
        self._kind = type(weight)
        for name in _PARTS:
            self._buffers.pop(name, None)
        for name in _PARTS:
            if name in tensors:
                shared = name == "codebook"  # by all layers of a format; files refuse tensors that layers share
                self.register_buffer(name, tensors[name].clone() if shared else tensors[name].contiguous())
        self._fields = tuple(name for name in canonical.FIELDS if name in tensors)
        self._numbers = {name: getattr(weight, name) for name in _NUMBERS}

    @property
    def weight(self) -> Any:
        """W, on the buffers as they are now."""
        built, buffers = self._weight, self._buffers
        for name in self._fields:
            if built is None or buffers[name] is not getattr(built, name):
                tensors: dict[str, Any] = {field: buffers[field] for field in self._fields}
                built = self._weight = self._kind(**self._numbers, **tensors)
        return built

    @weight.setter
    def weight(self, weight: Any) -> None:
        """Another weight of the same shape, in any format."""
        layer = f"nn.{type(self).__name__}"
        if type(weight) is not self._kind:
            raise fail(layer, "weight", type(weight).__name__, f"a metate.{self._kind.__name__}", error=TypeError)
        if weight.shape != self._numbers["shape"]:
            raise fail(layer, "weight", weight, f"of shape {self._numbers['shape']}")
        self._take(weight, self.bias)

    def _arrange(self) -> None:
        numbers, codes = self._numbers, self._buffers["codes"]
        sizes = numbers["shape"], numbers["bits"], numbers["group_size"]
        self._buffers["codes"] = arranged(codes, *sizes)  # type: ignore[arg-type]
        self._weight = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a dense tensor."""
        dense: Tensor = self.weight.dequantize(dtype)
        return dense

    def reset_parameters(self) -> None:
        name = type(self).__name__
        raise NotImplementedError(f"metate.nn.{name}: a quantised weight is not initialised; make one from_linear")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowBit:
        own = {id(self._buffers[name]) for name in _PARTS if name in self._buffers}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            data = tensor.flatten().view(torch.uint8)  # integers keep their dtype
            result = fn(data)
            return tensor if result is data else result.view(tensor.dtype).view(tensor.shape)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "codes"
        destination[name] = rows_of(destination[name])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if prefix + canonical.MARK in state_dict:
            try:
                self._expect({name: state_dict[prefix + name] for name in _PARTS if prefix + name in state_dict})
            except FormatError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
                return
        self._buffers["codes"] = rows_of(self._buffers["codes"])  # type: ignore[arg-type]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._arrange()

    def _expect(self, tensors: dict[str, Tensor]) -> None:
        """Makes room for a checked state, which may be of another format."""
        mark = tensors[canonical.MARK].cpu()
        weight = canonical.lower({**tensors, canonical.MARK: mark}, Settings("state", {}))
        if weight.shape != self._numbers["shape"]:
            raise fail(
                f"nn.{type(self).__name__}", "state", weight, f"of shape {self._numbers['shape']}", error=FormatError
            )
        device = self._buffers["codes"].device  # type: ignore[union-attr]
        self._hold(weight, {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()})


def quantized(weight: Tensor, method: str, options: Mapping[str, Any]) -> QuantizedWeight:
    """A dense weight by one of METHODS."""
    require_choice("quantize_model", "method", method, METHODS)
    return METHODS[method](weight.detach(), **options)
