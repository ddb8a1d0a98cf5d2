"""Assembled models, one file per architecture family."""

from metate.models.llama import Cache, Llama, LlamaConfig

__all__ = ["Cache", "Llama", "LlamaConfig"]
