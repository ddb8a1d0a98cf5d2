"""Assembled models, one file per architecture family."""

from metate.models.config import LlamaConfig
from metate.models.llama import Cache, Llama

__all__ = ["Cache", "Llama", "LlamaConfig"]
