"""Where products and the state of int8 weights are imported from, too."""

from metate.compat.bitsandbytes.functional import MatmulLtState, matmul, matmul_4bit

__all__ = ["MatmulLtState", "matmul", "matmul_4bit"]
