"""Mixtures of experts."""

from metate.ops.moe import declaration, grouped  # noqa: F401
