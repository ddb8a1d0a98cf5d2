"""Modules: low-bit linear layers (QuantLinear, LoraLinear on top of it, quantize_model, which puts them in place, and
dequantize_model, which takes them out), attention over a cache of latents (LatentAttention), and product quantisation
that learns (ProductQuantizer)."""

from metate.nn.latent_attention import LatentAttention
from metate.nn.lora import LoraLinear
from metate.nn.model import dequantize_model, quantize_model
from metate.nn.product_quantizer import ProductQuantizer
from metate.nn.quant_linear import QuantLinear

__all__ = ["LatentAttention", "LoraLinear", "ProductQuantizer", "QuantLinear", "dequantize_model", "quantize_model"]
