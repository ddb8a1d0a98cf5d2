"""Low-bit formats: reading, lowering to the canonical form, quantising, writing. One file a format."""

from metate.low_bit import QuantizedWeight
from metate.quant.awq_search import fold_scale, quantize_awq, search_awq_scale
from metate.quant.bitsandbytes import quantize_fp4, quantize_int8, quantize_nf4
from metate.quant.calibration import Calibration
from metate.quant.checkpoint import QuantizedCheckpoint, load_quantized, save_quantized
from metate.quant.fp8 import quantize_fp8
from metate.quant.gguf import GGUFFile
from metate.quant.gptq_solver import quantize_gptq
from metate.quant.hqq import quantize_hqq
from metate.quant.requantize import requantize
from metate.quant.rtn import quantize_rtn

__all__ = [
    "Calibration",
    "GGUFFile",
    "QuantizedCheckpoint",
    "QuantizedWeight",
    "fold_scale",
    "load_quantized",
    "quantize_awq",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_int8",
    "quantize_nf4",
    "quantize_rtn",
    "requantize",
    "save_quantized",
    "search_awq_scale",
]
