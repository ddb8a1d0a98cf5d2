"""metate: kernels for transformers and vector search that run everywhere PyTorch runs."""

from metate import library
from metate.backends import use
from metate.errors import FormatError
from metate.explanation import explain, supports
from metate.generate import generate
from metate.masks import AttentionMask
from metate.nn import quantize_model
from metate.ops.attention import attention, attention_varlen, merge_attention_states
from metate.ops.moe import (
    QuantizedExperts,
    Route,
    gated_activation,
    grouped_linear,
    moe_mlp,
    moe_permute,
    moe_route,
    moe_sort,
    moe_unpermute,
    update_bias,
)
from metate.ops.paged_attention import append_kv, cascade_attention, paged_attention
from metate.ops.pq import (
    ivf_search,
    kmeans,
    pq_decode,
    pq_distance_tables,
    pq_encode,
    pq_interleave,
    pq_scan,
    topk_distances,
)
from metate.ops.quant_linear import QuantizedWeight, dequantize, lora_linear, quant_linear
from metate.quant import load_quantized

library.load()

__version__ = "0.1.0"
__all__ = [
    "AttentionMask",
    "FormatError",
    "QuantizedExperts",
    "QuantizedWeight",
    "Route",
    "append_kv",
    "attention",
    "attention_varlen",
    "cascade_attention",
    "dequantize",
    "explain",
    "gated_activation",
    "generate",
    "grouped_linear",
    "ivf_search",
    "kmeans",
    "load_quantized",
    "lora_linear",
    "merge_attention_states",
    "moe_mlp",
    "moe_permute",
    "moe_route",
    "moe_sort",
    "moe_unpermute",
    "paged_attention",
    "pq_decode",
    "pq_distance_tables",
    "pq_encode",
    "pq_interleave",
    "pq_scan",
    "quant_linear",
    "quantize_model",
    "supports",
    "topk_distances",
    "update_bias",
    "use",
]
