"""Linear layers with low-bit weights: QuantLinear, and QuantGroupedLinear with one for every expert."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metate.errors import fail
from metate.nn.low_bit import LowBit, quantized
from metate.nn.moe import GroupedLinear
from metate.ops.moe import QuantizedExperts
from metate.ops.quant_linear import QuantizedWeight, quant_linear


class QuantLinear(LowBit, nn.Linear):
    """x Wᵀ + bias from the codes of W, with gradients to x and to the bias; W itself is frozen.

    The tensors of W are buffers under the names of its fields. `state_dict` adds the numbers as `quantized_weight`, so
    that a state is what `metate.load_quantized` reads, and `load_state_dict` takes a state of any format of the same
    shape. `.to(dtype)`, `.half()` and the like change the bias alone: the dtypes of a weight are part of its format.

    It is an nn.Linear to those who ask (PEFT among them), but `weight` is a QuantizedWeight and not a tensor.

    Args:
        weight: W, (out_features, in_features).
        bias: (out_features); a Parameter stays one, another tensor becomes a buffer.
        activation: as in `metate.quant_linear`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, *, activation: str | None = None) -> None:
        nn.Module.__init__(self)
        if not isinstance(weight, QuantizedWeight):
            raise fail("nn.QuantLinear", "weight", type(weight).__name__, "a metate.QuantizedWeight", error=TypeError)
        _check_bias("nn.QuantLinear", bias, (weight.out_features,))
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.activation = activation
        self._take(weight, bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: str = "nf4", **options: Any) -> QuantLinear:
        """A linear layer with its weight quantised without calibration; the bias is shared.

        Args:
            method: "nf4" or "fp4" (options of `quantize_nf4`: block_size, nested), "int4" (groups of 128) or "int8"
                (one scale a row; options of `quantize_rtn`: group_size, symmetric, mse, scale_dtype), "hqq" (groups of
                64; options of `quantize_hqq`: bits, group_size, iterations, scale_dtype) or "fp8" (blocks of 128 by
                128; an option of `quantize_fp8`: block).

        Raises:
            ValueError: the method is unknown. Also what its quantiser says of the weight.
        """
        return cls(quantized(linear.weight, method, options), linear.bias).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return quant_linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        numbers = self._numbers
        form = f"bits={numbers['bits']}, group_size={min(numbers['group_size'], max(1, self.in_features))}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"


def _check_bias(layer: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None and not isinstance(bias, Tensor):
        raise fail(layer, "bias", type(bias).__name__, "a torch.Tensor or None", error=TypeError)
    if bias is not None and tuple(bias.shape) != shape:
        raise fail(layer, "bias", f"of shape {tuple(bias.shape)}", f"{shape}")


class QuantGroupedLinear(LowBit, GroupedLinear):
    """GroupedLinear from the codes of its weights, with gradients to the rows and to the bias; the weights are frozen.

    Buffers, states and dtypes are as QuantLinear's, `weight` is a `metate.QuantizedExperts`.

    Args:
        weight: of every expert, (num_experts, out_features, in_features).
        bias: (num_experts, out_features); a Parameter stays one, another tensor becomes a buffer.
        int8_activations: as in `metate.grouped_linear`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    def __init__(
        self, weight: QuantizedExperts, bias: Tensor | None = None, *, int8_activations: bool = False
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        if not isinstance(weight, QuantizedExperts):
            got = type(weight).__name__
            raise fail("nn.QuantGroupedLinear", "weight", got, "a metate.QuantizedExperts", error=TypeError)
        _check_bias("nn.QuantGroupedLinear", bias, weight.shape[:2])
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.int8_activations = int8_activations
        self._take(weight, bias)

    @classmethod
    def from_linear(cls, grouped: GroupedLinear, method: str = "nf4", **options: Any) -> QuantGroupedLinear:
        """A grouped layer with the weight of every expert quantised as `QuantLinear.from_linear` does it."""
        return cls.from_dense(grouped.weight, grouped.bias, method, **options).train(grouped.training)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None = None, method: str = "nf4", **options: Any
    ) -> QuantGroupedLinear:
        """The same from (num_experts, out_features, in_features); codes of one expert are made at a time."""
        return cls(QuantizedExperts.quantize(weight, lambda one: quantized(one, method, options)), bias)

    def part(self, first: int, last: int) -> QuantGroupedLinear:
        """A copy with the experts first … last - 1."""
        bias: Tensor | None = None
        if self.bias is not None:
            bias = self.bias[first:last].detach().clone()
            if isinstance(self.bias, nn.Parameter):
                bias = nn.Parameter(bias, self.bias.requires_grad)
        weight = QuantizedExperts.stack([self.weight[e] for e in range(first, last)])
        return QuantGroupedLinear(weight, bias, int8_activations=self.int8_activations)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self._numbers['bits']}, group_size={self._numbers['group_size']}"
