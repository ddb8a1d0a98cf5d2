"""Classes of faiss that are not here, for code that asks whether an index is one: none is."""

from __future__ import annotations

from typing import Any


class Absent:
    def __init__(self, *given: Any, **named: Any) -> None:
        raise NotImplementedError(f"metate.compat.faiss: {type(self).__name__} is not there")


class IndexBinary(Absent):
    """Binary vectors."""


class IndexBinaryIVF(IndexBinary):
    """Lists of them."""


class IndexHNSW(Absent):
    """Graphs."""


class IndexLSH(Absent):
    """Signs of projections."""


class IndexRaBitQ(Absent):
    """A bit of every turned column."""


class IndexIVFRaBitQ(Absent):
    """Lists of them."""


class MultiIndexQuantizer(Absent):
    """Lists for every pair of centroids."""


class ITQTransform(Absent):
    """A rotation for signs."""
