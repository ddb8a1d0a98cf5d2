"""What all of faiss' indexes have, and how those over one index of metate.search answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.compat.faiss.distances import METRIC_L2, between, metric_name
from metate.compat.faiss.parameters import Floats, Owned
from metate.compat.faiss.quantizer import Bytes, as_array, like
from metate.compat.faiss.selectors import Integers, SearchParameters, SearchParametersIVF, SearchParametersPQ, selector
from metate.scalars import is_whole, plain

MOST = float(np.finfo(np.float32).max)  # the distance of what is not there


class Index(Owned):
    """What all indexes have; subclasses give `_search` and `_range` over arrays."""

    by_themselves: Callable[[Any], Any] = staticmethod(as_array)  # vectors that no argument says the kind of

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        self.d, self.metric_type, self.metric_arg = int(d), int(metric), 0.0
        self.verbose = False
        metric_name(metric)

    @property
    def ntotal(self) -> int:
        raise NotImplementedError

    @property
    def is_trained(self) -> bool:
        raise NotImplementedError

    def train(self, x: Any) -> None:
        """Learns what vectors (n, d) are like, where there is something to learn."""
        raise NotImplementedError

    def add(self, x: Any) -> None:
        """Adds vectors to the index: (n, d) float32, under the ids that come next."""
        raise NotImplementedError

    def add_with_ids(self, x: Any, ids: Any) -> None:
        raise RuntimeError(f"add_with_ids not implemented for {type(self).__name__}; put it into an IndexIDMap")

    def remove_ids(self, x: Any) -> int:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def reconstruct_batch(self, keys: Any, x: Any = None) -> Any:
        """The vectors of ids; of an index of lists once it has a direct map."""
        self._may_reconstruct()
        return given((self._vectors_of(keys), x))[0]

    def _may_reconstruct(self) -> None:
        """Raises where ids alone do not lead to vectors, as faiss has it."""

    def _vectors_of(self, keys: Any) -> Any:
        raise NotImplementedError

    def sa_code_size(self) -> int:
        """Bytes of a vector as `sa_encode` writes it."""
        raise RuntimeError(f"sa_code_size not implemented for {type(self).__name__}")

    def _encode(self, x: Floats) -> Bytes:
        raise RuntimeError(f"sa_encode not implemented for {type(self).__name__}")

    def _decode(self, codes: Bytes) -> Floats:
        raise RuntimeError(f"sa_decode not implemented for {type(self).__name__}")

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        raise RuntimeError(f"add_sa_codes not implemented for {type(self).__name__}")

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        """Takes all that another index, trained alike, holds, and empties it."""
        raise RuntimeError(f"merge_from not implemented for {type(self).__name__}")

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        raise NotImplementedError

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def _checked(self, x: Any) -> Any:
        if not isinstance(x, (np.ndarray, Tensor)):
            kind = type(x).__name__
            raise TypeError(f"{type(self).__name__}: vectors are {kind}, expected a numpy array or a torch tensor")
        if x.ndim != 2 or x.shape[1] != self.d:
            raise AssertionError(f"{type(self).__name__}: vectors of shape {tuple(x.shape)}, expected (n, {self.d})")
        return x

    def search(self, x: Any, k: int, D: Any = None, I: Any = None, *, params: SearchParameters | None = None) -> Any:  # noqa: E741
        """(distances, ids), each (n, k)."""
        if not is_whole(plain(k), 1):
            raise AssertionError(f"{type(self).__name__}: k is {k!r}, expected an integer from 1 on")
        distances, ids = self._search(self._checked(x), int(k), params)
        return given((distances.clip(-MOST, MOST), D), (ids, I))

    def range_search(self, x: Any, thresh: float, *, params: SearchParameters | None = None) -> tuple[Any, Any, Any]:
        """(lims, distances, ids) of all nearer than a threshold, for each query by ascending id."""
        return by_id(*self._range(self._checked(x), float(thresh), params))

    def assign(self, x: Any, k: int, labels: Any = None) -> Any:
        return self.search(x, k, I=labels)[1]

    def search_and_reconstruct(
        self, x: Any, k: int, D: Any = None, I: Any = None, R: Any = None, *, params: SearchParameters | None = None,  # noqa: E741
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Distances, ids, and the vectors (n, k, d) found; NaN for what is not there."""
        distances, ids = self.search(x, k, params=params, D=D, I=I)
        found = np.full((*ids.shape, self.d), np.nan, np.float32)
        there = np.asarray(ids) >= 0
        if there.any():
            found[there] = as_array(self._vectors_of(np.asarray(ids)[there]))
        return distances, ids, given((like(x, found), R))[0]

    def reconstruct(self, key: int, x: Any = None) -> Any:
        return given((self.by_themselves(self.reconstruct_batch(np.array([key], np.int64))[0]), x))[0]

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: Any = None) -> Any:
        count = self.ntotal - n0 if ni == -1 else ni
        if n0 < 0 or count < 0 or n0 + count > self.ntotal:
            raise RuntimeError(f"reconstruct_n: {n0} and the next {ni}, expected within {self.ntotal} vectors")
        return given((self.by_themselves(self._vectors_of(np.arange(n0, n0 + count))), x))[0]

    def sa_encode(self, x: Any, codes: Any = None) -> Any:
        """The bytes of vectors, (n, sa_code_size())."""
        return given((like(x, self._encode(as_array(self._checked(x)))), codes))[0]

    def sa_decode(self, codes: Any, x: Any = None) -> Any:
        """The vectors that bytes stand for."""
        return given((like(codes, self._decode(self._code_rows("sa_decode", codes))), x))[0]

    def add_sa_codes(self, codes: Any, ids: Any = None) -> None:
        """Adds what `sa_encode` wrote."""
        rows = self._code_rows("add_sa_codes", codes)
        numbers = None if ids is None else np.asarray(ids, np.int64)
        if numbers is not None and numbers.shape != (len(rows),):
            raise AssertionError(f"add_sa_codes: ids of shape {numbers.shape}, expected ({len(rows)},)")
        self._add_codes(rows, numbers)

    def _code_rows(self, op: str, codes: Any) -> Bytes:
        rows = np.ascontiguousarray(codes, np.uint8)
        if rows.ndim != 2 or rows.shape[1] != self.sa_code_size():
            raise AssertionError(f"{op}: codes of shape {rows.shape}, expected (n, {self.sa_code_size()})")
        return rows

    def get_distance_computer(self) -> DistanceComputer:
        return DistanceComputer(self)

    def compute_residual(self, x: Any, key: int) -> Any:
        return x - like(x, self.reconstruct_batch(np.array([key], np.int64))[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy.deepcopy: the bytes of its file."""
        from metate.compat.faiss.factory import deserialize_index, serialize_index

        return deserialize_index, (serialize_index(self),)


class DistanceComputer(Owned):
    """`set_query(x)`, then the distance of any vector in the index, which sees queries as `before` makes them."""

    def __init__(self, index: Index, before: Callable[[Any], Any] = lambda x: x) -> None:
        self._index, self._before, self._query = index, before, np.zeros(index.d, np.float32)

    def set_query(self, x: Any) -> None:
        self._query = as_array(self._before(as_array(x).reshape(1, -1))).reshape(self._index.d)

    def __call__(self, i: int) -> float:
        return self._distance(self._query, self._vector(i))

    def symmetric_dis(self, i: int, j: int) -> float:
        """Between two vectors of the index."""
        return self._distance(self._vector(i), self._vector(j))

    def _vector(self, at: int) -> Floats:
        return as_array(self._index._vectors_of(np.array([at]))).reshape(-1)

    def _distance(self, a: Floats, b: Floats) -> float:
        return float(between(self._index.metric_type, a, b))


def given(*pairs: tuple[Any, Any]) -> tuple[Any, ...]:
    """What was found, written into the array that was given for it, if any."""
    for found, array in pairs:
        if array is not None:
            if array.shape != found.shape:
                raise AssertionError(f"results are of shape {found.shape}, expected room for them, not {array.shape}")
            array[...] = torch.as_tensor(found, device=array.device) if isinstance(array, Tensor) else found
    return tuple(found if array is None else array for found, array in pairs)


def by_id(lims: Any, distances: Any, ids: Any) -> tuple[Any, Any, Any]:
    """The results of every query by ascending id."""
    query = np.repeat(np.arange(len(lims) - 1), np.diff(np.asarray(lims)))
    order = np.lexsort((np.asarray(ids), query))
    return lims, distances[order], ids[order]


class Elementary(Index):
    """An index over one of metate's."""

    _inner: Any

    @property
    def ntotal(self) -> int:
        return int(self._inner.ntotal)

    @property
    def is_trained(self) -> bool:
        return bool(self._inner.is_trained)

    @is_trained.setter
    def is_trained(self, trained: bool) -> None:
        """With centroids and codebooks set by hand."""
        if trained and not self._inner.is_trained:
            if not all(np.any(np.asarray(array)) for array in self._given().values()):
                self._ready()
            self._set_trained()

    def _set_trained(self) -> None:
        self._inner.set_trained(self._given())
        self._took(self._inner)

    def _took(self, inner: Any) -> None:
        """Shows what a trained index knows where faiss has it."""
        self._inner = inner

    def _given(self) -> dict[str, Any]:
        """What training finds, where the parts of this index know it already; zeros or nothing where they do not."""
        return {}

    def add(self, x: Any) -> None:
        """Adds vectors to the index: (n, d) float32, under the ids that come next."""
        if not self._inner._added_quickly(x):
            self._ready()
            self._inner.add(self._checked(x), progress=False)

    def _ready(self) -> None:
        if not self._inner.is_trained:
            raise RuntimeError(f"{type(self).__name__}: not trained; call train(x)")

    def reset(self) -> None:
        self._inner.reset()

    def _how(self, params: SearchParameters | None) -> dict[str, Any]:
        if params is not None and not isinstance(params, (SearchParametersPQ, SearchParametersIVF)):
            return {"filter": params.sel} if type(params) is SearchParameters else self._refuse(params)
        return {} if params is None else self._refuse(params)

    def _refuse(self, params: SearchParameters) -> dict[str, Any]:
        raise RuntimeError(f"{type(self).__name__}: params are {type(params).__name__}, expected those of this index")

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        self._ready()
        distances, ids = self._inner.search(x, k, **self._how(params))
        return distances, ids

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        self._ready()
        lims, distances, ids = self._inner.range_search(x, radius, **self._how(params))
        return lims, distances, ids

    def _vectors_of(self, keys: Any) -> Any:
        try:
            return self._inner.reconstruct(keys)
        except KeyError as error:
            raise RuntimeError(error.args[0]) from None

    def remove_ids(self, x: Any) -> int:
        return int(self._inner.remove_ids(selector(x)))
