"""Modules over low-bit weights: QuantLinear, LoraLinear on top of it, and quantize_model, which puts them in place."""

from metate.nn.lora import LoraLinear
from metate.nn.model import quantize_model
from metate.nn.quant_linear import QuantLinear

__all__ = ["LoraLinear", "QuantLinear", "quantize_model"]
