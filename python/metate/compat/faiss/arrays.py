"""The small functions over arrays that code written for faiss calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from metate.compat.faiss.base import METRIC_L2, metric_name
from metate.compat.faiss.parameters import Floats
from metate.compat.faiss.quantizer import as_array
from metate.compat.faiss.selectors import Integers


def rand(n: int | tuple[int, ...], seed: int = 12345) -> Floats:
    """Uniform from 0 to 1; other numbers than faiss'."""
    return np.random.default_rng(seed).random(n, np.float32)


def randn(n: int | tuple[int, ...], seed: int = 12345) -> Floats:
    """Normal; other numbers than faiss'."""
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def randint(n: int | tuple[int, ...], seed: int = 12345, vmax: int | None = None) -> Integers:
    """Integers from 0 to vmax - 1; other numbers than faiss'."""
    return np.random.default_rng(seed).integers(0, vmax or 2**63 - 1, n)


def eval_intersection(I1: Any, I2: Any) -> int:
    """How many ids the rows of two results have in common, over all rows."""
    return sum(len(np.intersect1d(a, b)) for a, b in zip(np.asarray(I1), np.asarray(I2), strict=True))


def pairwise_distances(xq: Any, xb: Any, metric: int = METRIC_L2) -> Floats:
    """All squared distances, or inner products."""
    queries, base = as_array(xq).astype(np.float64), as_array(xb).astype(np.float64)
    products = queries @ base.T
    if metric_name(metric) == "inner_product":
        return as_array(products)
    squares = np.square(queries).sum(1)[:, None] + np.square(base).sum(1) - 2 * products
    return as_array(np.maximum(squares, 0))


def vector_to_array(vector: Any) -> Any:
    """A copy of what faiss keeps in a C++ vector, and we in an array."""
    return np.array(vector)


vector_float_to_array = vector_to_array


def copy_array_to_vector(array: Any, vector: Any) -> None:
    """Into an array that is part of an index, or the bytes of a reader."""
    if isinstance(vector, bytearray):
        vector[:] = np.ascontiguousarray(array, np.uint8).tobytes()
    else:
        vector[...] = array


def swig_ptr(array: Any) -> Any:
    """The array itself: nothing here takes a pointer."""
    return array
