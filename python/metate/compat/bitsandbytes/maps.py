"""The codebooks that bitsandbytes makes: 256 ascending float32 values in [-1, 1], zeros in the places not used."""

from __future__ import annotations

import torch
from torch import Tensor

from metate.errors import fail
from metate.quant import bitsandbytes as format

_SIZE = 256


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Values denser towards 0: of `max_exponent_bits` decades, the largest has the most of them."""
    return _filled(format.dynamic_map(signed, max_exponent_bits, total_bits).tolist())


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values; with `add_zero`, or of fewer than 8 bits, 0 is one of them."""
    with_zero = signed and (add_zero or total_bits < 8)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, 2**total_bits - with_zero, dtype=torch.float32)
    half = values.numel() // 2
    return torch.cat([values[:half], values.new_zeros(_SIZE - values.numel()), values[half:]])


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution from that of `offset` on, one more of them above 0 than below."""
    sides = [_quantiles(offset, 9 if use_extra_value else 8), _quantiles(offset, 8)]
    values = torch.tensor(_sorted_with_zeros([*sides[0], *(-value for value in sides[1])]), dtype=torch.float32)
    return values / values.max()


def _quantiles(offset: float, count: int) -> list[float]:
    shares = torch.linspace(offset, 0.5, count, dtype=torch.float32, device="cpu")
    quantiles: Tensor = torch.special.ndtri(shares[:-1].double())
    return quantiles.tolist()


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:  # fmt: skip
    """Floating-point numbers of these bits, divided by the largest."""
    if exponent_bits + precision_bits + signed != total_bits:
        got = f"{total_bits} for {exponent_bits} and {precision_bits} bits"
        raise fail("create_fp8_map", "total_bits", got, "the sum of sign, exponent and precision")
    bias, steps = 2 ** (exponent_bits - 1), 2**precision_bits
    values = [
        fraction / steps * 2.0**-bias if exponent == 0 else (1 + fraction / steps) * 2.0 ** (bias + 1 - exponent)
        for exponent in range(2**exponent_bits)
        for fraction in range(steps)
    ]
    return _filled(values + [-value for value in values] if signed else values)


def _filled(values: list[float]) -> Tensor:
    codes = torch.tensor(_sorted_with_zeros(values), dtype=torch.float32)
    return codes / codes.max()


def _sorted_with_zeros(values: list[float]) -> list[float]:
    return sorted(values + [0.0] * (_SIZE - len(values)))
