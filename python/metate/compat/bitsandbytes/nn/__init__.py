"""bitsandbytes.nn: the linear layers and their parameters, and two embeddings."""

from metate.compat.bitsandbytes.nn.embedding import Embedding, StableEmbedding
from metate.compat.bitsandbytes.nn.modules import (
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

__all__ = [
    "Embedding",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
]
