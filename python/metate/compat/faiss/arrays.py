"""The small functions over arrays that code written for faiss calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from metate.compat.faiss.distances import METRIC_L2, between
from metate.compat.faiss.parameters import Floats, NumberVector
from metate.compat.faiss.quantizer import as_array
from metate.compat.faiss.streams import Bytes

_AT_ONCE = 1 << 22  # numbers of a temporary


def eval_intersection(I1: Any, I2: Any) -> int:
    """How many ids the rows of two results have in common, over all rows."""
    return sum(len(np.intersect1d(a, b)) for a, b in zip(np.asarray(I1), np.asarray(I2), strict=True))


def pairwise_distances(xq: Any, xb: Any, metric: int = METRIC_L2, metric_arg: float = 0.0) -> Floats:
    """All distances (queries, vectors) by any of faiss' metrics; metric_arg: the p of METRIC_Lp."""
    queries, base = as_array(xq), as_array(xb)
    together = max(1, _AT_ONCE // max(base.size, 1))
    parts = [
        between(metric, queries[at : at + together, None], base, metric_arg)
        for at in range(0, max(len(queries), 1), together)
    ]
    return np.concatenate(parts)


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
        self.D[subset], self.I[subset] = best_of(distances, ids, self.k, self.keep_max)

    def finalize(self) -> None:
        """Nothing to do: the best stand first already."""


def merge_knn_results(Dall: Any, Iall: Any, keep_max: bool = False) -> tuple[Any, Any]:
    """The k best of results (parts, n, k)."""
    distances, ids = (np.hstack(list(np.asarray(part))) for part in (Dall, Iall))
    return best_of(distances, ids, np.shape(Dall)[2], keep_max)


def best_of(distances: Any, ids: Any, k: int, largest: bool) -> tuple[Any, Any]:
    """The first k of each row; missing ones, with id -1, come last."""
    keys = -distances.astype(np.float64) if largest else distances
    order = np.lexsort((keys, ids < 0))[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def imbalance_factor(n: int, k: int, assign: Any) -> float:
    """Of n numbers below k: 1 where all come as often, k where one alone comes."""
    counts = np.bincount(np.asarray(assign)[:n], minlength=k).astype(np.float64)
    return float(k * np.square(counts).sum() / counts.sum() ** 2)


def bucket_sort(tab: Any, nbucket: int | None = None, nt: int = 0) -> tuple[Any, Any]:
    """(lims, perm): the places of the numbers b are perm[lims[b] : lims[b + 1]]."""
    numbers = np.asarray(tab).reshape(-1)
    return _lims(numbers, nbucket), np.argsort(numbers, kind="stable")


def matrix_bucket_sort_inplace(tab: Any, nbucket: int | None = None, nt: int = 0) -> Any:
    """The rows that hold b, written into tab.ravel()[lims[b] : lims[b + 1]]; lims."""
    lims, places = _lims(tab.reshape(-1), nbucket), np.argsort(tab.reshape(-1), kind="stable")
    tab[...] = (places // tab.shape[1]).reshape(tab.shape)
    return lims


def _lims(numbers: Any, nbucket: int | None) -> Any:
    counts = np.bincount(numbers, minlength=nbucket or 0)
    if nbucket is not None and len(counts) != nbucket:
        raise RuntimeError(f"bucket_sort: a number is {numbers.max()}, expected less than {nbucket}")
    return np.append(0, counts.cumsum())


class RangeSearchResult:
    """Where results lie that are asked for with pointers."""

    def __init__(self, nq: int) -> None:
        self.nq, self.lims = nq, np.zeros(nq + 1, np.int64)
        self.distances, self.labels = np.zeros(0, np.float32), np.zeros(0, np.int64)


def memcpy(to: Any, source: Any, nbytes: int) -> None:
    """Bytes of one array into another."""
    there, here = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (to, source))
    there[:nbytes] = here[:nbytes]


def rev_swig_ptr(array: Any, n: int) -> Any:
    """The first n numbers of what stands for a pointer."""
    return np.asarray(array).reshape(-1)[:n]


def get_num_gpus() -> int:
    """None that faiss' GPU classes would use, for they are not here: give metate.search's indexes a device."""
    return 0


def get_mem_usage_kb() -> int:
    """What this process holds of the memory."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


class Float32Vector(NumberVector):
    dtype = np.float32


class Int64Vector(NumberVector):
    dtype = np.int64


class UInt8Vector(NumberVector):
    dtype = np.uint8


def MaybeOwnedVectorUInt8(array: Any) -> Any:
    """The bytes themselves: who owns them is Python's to know."""
    return array


def vector_to_array(vector: Any) -> Any:
    """A copy of what faiss keeps in a C++ vector, and we in an array or in bytes."""
    if isinstance(vector, NumberVector):
        return np.array(vector, vector.dtype)
    return np.frombuffer(bytes(vector), np.uint8) if isinstance(vector, Bytes) else np.array(vector)


vector_float_to_array = AlignedTable_to_array = vector_to_array


def copy_array_to_vector(array: Any, vector: Any) -> None:
    """Into an array that is part of an index, or the bytes of a reader."""
    if isinstance(vector, Bytes):
        vector[:] = np.ascontiguousarray(array, np.uint8).tobytes()
    elif isinstance(vector, NumberVector):
        vector[:] = np.asarray(array, vector.dtype)
    else:
        vector[...] = array


def swig_ptr(array: Any) -> Any:
    """The array itself: nothing here takes a pointer."""
    return array
