"""One file or folder a family of operators, registered in this order whoever imports one first."""

from metate.ops import attention, moe, quant_linear

__all__ = ["attention", "moe", "quant_linear"]
