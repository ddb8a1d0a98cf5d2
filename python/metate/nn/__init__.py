"""Modules: linear layers (Linear, dense, for few rows; QuantLinear of low bits, LoraLinear on top of it;
quantize_model, which puts them in place, and dequantize_model, which takes them out), attention over a cache of latents
(LatentAttention), mixtures of experts (MoE, of GroupedLinear layers, which have low-bit and LoRA forms too), and
product quantisation (ProductQuantizer)."""

from metate.nn.latent_attention import LatentAttention
from metate.nn.linear import Linear
from metate.nn.lora import LoraGroupedLinear, LoraLinear
from metate.nn.model import dequantize_model, quantize_model
from metate.nn.moe import GroupedLinear, MoE
from metate.nn.product_quantizer import ProductQuantizer
from metate.nn.quant_linear import QuantGroupedLinear, QuantLinear

__all__ = [
    "GroupedLinear",
    "LatentAttention",
    "Linear",
    "LoraGroupedLinear",
    "LoraLinear",
    "MoE",
    "ProductQuantizer",
    "QuantGroupedLinear",
    "QuantLinear",
    "dequantize_model",
    "quantize_model",
]
