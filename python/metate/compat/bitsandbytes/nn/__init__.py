"""bitsandbytes.nn: the linear layers and their parameters."""

from metate.compat.bitsandbytes.nn.modules import (
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit"]
