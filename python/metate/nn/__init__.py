"""Modules over low-bit weights: QuantLinear, LoraLinear on top of it, quantize_model, which puts
them in place, and dequantize_model, which takes them out."""

from metate.nn.lora import LoraLinear
from metate.nn.model import dequantize_model, quantize_model
from metate.nn.quant_linear import QuantLinear

__all__ = ["LoraLinear", "QuantLinear", "dequantize_model", "quantize_model"]
