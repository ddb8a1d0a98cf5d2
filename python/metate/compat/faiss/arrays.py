"""The small functions over arrays that code written for faiss calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from metate.compat.faiss.base import METRIC_L2, metric_name
from metate.compat.faiss.parameters import Floats
from metate.compat.faiss.quantizer import as_array
from metate.compat.faiss.streams import Bytes


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


class ResultHeap:
    """The k best of results that come some at a time: the least, or the largest."""

    def __init__(self, nq: int, k: int, keep_max: bool = False) -> None:
        self.nq, self.k, self.keep_max = nq, k, keep_max
        worst = np.finfo(np.float32).max * (-1 if keep_max else 1)
        self.D, self.I = np.full((nq, k), worst, np.float32), np.full((nq, k), -1, np.int64)

    def add_result(self, D: Any, I: Any) -> None:  # noqa: E741
        """Distances and ids (nq, any)."""
        self.add_result_subset(np.arange(self.nq), D, I)

    def add_result_subset(self, subset: Any, D: Any, I: Any) -> None:  # noqa: E741
        """Those of the queries `subset`; ids (any,) are those of all."""
        distances = np.hstack([self.D[subset], np.asarray(D, np.float32)])
        ids = np.hstack([self.I[subset], np.broadcast_to(np.asarray(I, np.int64), np.shape(D))])
        self.D[subset], self.I[subset] = _best(distances, ids, self.k, self.keep_max)

    def finalize(self) -> None:
        """Nothing to do: the best stand first already."""


def merge_knn_results(Dall: Any, Iall: Any, keep_max: bool = False) -> tuple[Any, Any]:
    """The k best of results (parts, n, k)."""
    distances, ids = (np.hstack(list(np.asarray(part))) for part in (Dall, Iall))
    return _best(distances, ids, np.shape(Dall)[2], keep_max)


def _best(distances: Any, ids: Any, k: int, largest: bool) -> tuple[Any, Any]:
    """The first k of each row; missing ones, with id -1, come last."""
    keys = -distances.astype(np.float64) if largest else distances
    order = np.lexsort((keys, ids < 0))[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def is_similarity_metric(metric: int) -> bool:
    """Whether the largest is the best."""
    return metric_name(metric) == "inner_product"


def imbalance_factor(n: int, k: int, assign: Any) -> float:
    """Of n numbers below k: 1 where all come as often, k where one alone comes."""
    counts = np.bincount(np.asarray(assign)[:n], minlength=k).astype(np.float64)
    return float(k * np.square(counts).sum() / counts.sum() ** 2)


def get_mem_usage_kb() -> int:
    """What this process holds of the memory."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def vector_to_array(vector: Any) -> Any:
    """A copy of what faiss keeps in a C++ vector, and we in an array or in bytes."""
    return np.frombuffer(bytes(vector), np.uint8) if isinstance(vector, Bytes) else np.array(vector)


vector_float_to_array = vector_to_array


def copy_array_to_vector(array: Any, vector: Any) -> None:
    """Into an array that is part of an index, or the bytes of a reader."""
    if isinstance(vector, Bytes):
        vector[:] = np.ascontiguousarray(array, np.uint8).tobytes()
    else:
        vector[...] = array


def swig_ptr(array: Any) -> Any:
    """The array itself: nothing here takes a pointer."""
    return array
