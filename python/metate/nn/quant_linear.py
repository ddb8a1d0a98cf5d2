"""QuantLinear: nn.Linear with a low-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import FormatError, fail
from metate.ops.quant_linear import QuantizedWeight, quant_linear
from metate.quant import canonical, quantize_fp4, quantize_nf4, quantize_rtn
from metate.quant.settings import Settings

METHODS: dict[str, Callable[..., QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "fp4": quantize_fp4,
    "int8": partial(quantize_rtn, bits=8, group_size=-1),
    "int4": quantize_rtn,
}
_NUMBERS = ("shape", "bits", "group_size", "super_groups", "zero")
_PARTS = (*canonical.FIELDS, canonical.MARK)


class QuantLinear(nn.Linear):
    """x Wᵀ + bias from the codes of W, with gradients to x and to the bias; W itself is frozen.

    The tensors of W are buffers under the names of its fields. `state_dict` adds the numbers as `quantized_weight`, so
    that a state is what `metate.load_quantized` reads, and `load_state_dict` takes a state of any format of the same
    shape. `.to(dtype)`, `.half()` and the like change the bias alone: the dtypes of a weight are part of its format.

    It is an nn.Linear to those who ask (PEFT among them), but `weight` is a QuantizedWeight and not a tensor.

    Args:
        weight: W, (out_features, in_features).
        bias: (out_features); a Parameter stays one, another tensor becomes a buffer.
        activation: as in `metate.quant_linear`.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, *, activation: str | None = None) -> None:
        nn.Module.__init__(self)
        if not isinstance(weight, QuantizedWeight):
            raise fail("nn.QuantLinear", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
        if bias is not None and tuple(bias.shape) != (weight.out_features,):
            raise fail("nn.QuantLinear", "bias", f"of shape {tuple(bias.shape)}", f"({weight.out_features},)")
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.activation = activation
        self._hold(weight, canonical.write(weight))
        self._weight: QuantizedWeight | None = weight
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: str = "nf4", **options: Any) -> QuantLinear:
        """A linear layer with its weight quantised without calibration; the bias is shared.

        Args:
            method: "nf4" or "fp4" (options of `quantize_nf4`: block_size, nested), "int4" (groups of 128) or "int8"
                (one scale a row; options of `quantize_rtn`: group_size, symmetric, mse, scale_dtype).
        """
        return cls(quantized(linear.weight, method, options), linear.bias).train(linear.training)

    def _hold(self, weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> None:
        """Makes the tensors buffers in place of those that are there, and takes the numbers."""
        for name in _PARTS:
            self._buffers.pop(name, None)
        for name in _PARTS:
            if name in tensors:
                shared = name == "codebook"  # by all layers of a format; files refuse tensors that layers share
                self.register_buffer(name, tensors[name].clone() if shared else tensors[name].contiguous())
        self._fields = tuple(name for name in canonical.FIELDS if name in tensors)
        self._numbers = {name: getattr(weight, name) for name in _NUMBERS}

    @property
    def weight(self) -> QuantizedWeight:  # type: ignore[override]
        """W, on the buffers as they are now."""
        built = self._weight
        if built is None or any(self._buffers[name] is not getattr(built, name) for name in self._fields):
            tensors: dict[str, Any] = {name: self._buffers[name] for name in self._fields}
            built = self._weight = QuantizedWeight(**self._numbers, **tensors)
        return built

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a dense tensor."""
        return self.weight.dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return quant_linear(input, self.weight, self.bias, activation=self.activation)

    def reset_parameters(self) -> None:
        raise NotImplementedError("metate.nn.QuantLinear: a quantised weight is not initialised; make one from_linear")

    def extra_repr(self) -> str:
        numbers = self._numbers
        form = f"bits={numbers['bits']}, group_size={min(numbers['group_size'], max(1, self.in_features))}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        own = {id(self._buffers[name]) for name in _PARTS if name in self._buffers}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            data = tensor.flatten().view(torch.uint8)  # integers keep their dtype
            result = fn(data)
            return tensor if result is data else result.view(tensor.dtype).view(tensor.shape)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._weight = None
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if prefix + canonical.MARK in state_dict:
            try:
                self._expect({name: state_dict[prefix + name] for name in _PARTS if prefix + name in state_dict})
            except FormatError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'QuantLinear'}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._weight = None

    def _expect(self, tensors: dict[str, Tensor]) -> None:
        """Makes room for a checked state, which may be of another format."""
        mark = tensors[canonical.MARK].cpu()
        weight = canonical.lower({**tensors, canonical.MARK: mark}, Settings("state", {}))
        if weight.shape != self._numbers["shape"]:
            raise fail("nn.QuantLinear", "state", weight, f"of shape {self._numbers['shape']}", error=FormatError)
        device = self._buffers["codes"].device  # type: ignore[union-attr]
        self._hold(weight, {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()})


def quantized(weight: Tensor, method: str, options: Mapping[str, Any]) -> QuantizedWeight:
    """A dense weight by one of METHODS."""
    if method not in METHODS:
        raise fail("nn.QuantLinear", "method", repr(method), " or ".join(map(repr, METHODS)))
    return METHODS[method](weight.detach(), **options)
