"""faiss' elementary indexes: each holds one index of metate.search and speaks faiss' language about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate.compat.faiss.parameters import ClusteringParameters
from metate.compat.faiss.selectors import SearchParameters, SearchParametersIVF, SearchParametersPQ, selector
from metate.ops.pq import pq_decode, pq_encode
from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex
from metate.search.training import train_codebooks

METRIC_INNER_PRODUCT, METRIC_L2 = 0, 1
_METRICS = {METRIC_INNER_PRODUCT: "inner_product", METRIC_L2: "l2"}
_MOST = float(np.finfo(np.float32).max)  # the distance of what is not there


def metric_name(metric: int) -> str:
    if metric not in _METRICS:
        raise NotImplementedError(
            f"metate.compat.faiss: metric is {metric}, expected METRIC_L2 or METRIC_INNER_PRODUCT"
        )
    return _METRICS[metric]


def like(x: Any, y: Any) -> Any:
    """y, an array, as what x is."""
    return torch.from_numpy(y).to(x.device) if isinstance(x, Tensor) else y


def as_array(x: Any) -> npt.NDArray[np.float32]:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return np.ascontiguousarray(array, np.float32)


class Index:
    """What all indexes have; subclasses give `_search` and `_range` over arrays."""

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
        raise NotImplementedError

    def add(self, x: Any) -> None:
        raise NotImplementedError

    def add_with_ids(self, x: Any, ids: Any) -> None:
        raise RuntimeError(f"add_with_ids not implemented for {type(self).__name__}; put it into an IndexIDMap")

    def remove_ids(self, x: Any) -> int:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def reconstruct_batch(self, keys: Any) -> Any:
        raise NotImplementedError

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        raise NotImplementedError

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def _checked(self, x: Any) -> Any:
        if x.ndim != 2 or x.shape[1] != self.d:
            raise AssertionError(f"{type(self).__name__}: vectors of shape {tuple(x.shape)}, expected (n, {self.d})")
        return x

    def search(self, x: Any, k: int, *, params: SearchParameters | None = None, D: Any = None, I: Any = None) -> Any:  # noqa: E741
        """(distances, ids), each (n, k)."""
        if k < 1:
            raise AssertionError(f"k is {k}, expected 1 and more")
        distances, ids = self._search(self._checked(x), int(k), params)
        distances = distances.clip(-_MOST, _MOST)
        for given, found in ((D, distances), (I, ids)):
            if given is not None:
                given[...] = found
        return distances if D is None else D, ids if I is None else I

    def range_search(self, x: Any, thresh: float, *, params: SearchParameters | None = None) -> tuple[Any, Any, Any]:
        """(lims, distances, ids) of all nearer than a threshold, for each query by ascending id."""
        lims, distances, ids = self._range(self._checked(x), float(thresh), params)
        query = np.repeat(np.arange(len(lims) - 1), np.diff(np.asarray(lims)))
        order = np.lexsort((np.asarray(ids), query))
        return lims, distances[order], ids[order]

    def assign(self, x: Any, k: int, labels: Any = None) -> Any:
        return self.search(x, k, I=labels)[1]

    def search_and_reconstruct(self, x: Any, k: int, *, params: SearchParameters | None = None) -> tuple[Any, Any, Any]:
        """Distances, ids, and the vectors (n, k, d) found; NaN for what is not there."""
        distances, ids = self.search(x, k, params=params)
        found = np.full((*ids.shape, self.d), np.nan, np.float32)
        there = np.asarray(ids) >= 0
        if there.any():
            found[there] = as_array(self.reconstruct_batch(np.asarray(ids)[there]))
        return distances, ids, like(x, found)

    def reconstruct(self, key: int, x: Any = None) -> Any:
        found = self.reconstruct_batch(np.array([key], np.int64))[0]
        if x is None:
            return found
        x[...] = found
        return x

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: Any = None) -> Any:
        count = self.ntotal - n0 if ni == -1 else ni
        if n0 < 0 or count < 0 or n0 + count > self.ntotal:
            raise RuntimeError(f"reconstruct_n: {n0} and the next {ni}, expected within {self.ntotal} vectors")
        found = self.reconstruct_batch(np.arange(n0, n0 + count))
        if x is None:
            return found
        x[...] = found
        return x

    def compute_residual(self, x: Any, key: int) -> Any:
        return x - self.reconstruct(int(key))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy.deepcopy: the bytes of its file."""
        from metate.compat.faiss.factory import deserialize_index, serialize_index

        return deserialize_index, (serialize_index(self),)


class _Elementary(Index):
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
        if trained and not self._inner.is_trained:
            raise RuntimeError(f"{type(self).__name__}: not trained; call train(x)")

    def train(self, x: Any) -> None:
        self._inner.train(self._checked(x), progress=False)

    def add(self, x: Any) -> None:
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

    def reconstruct_batch(self, keys: Any) -> Any:
        try:
            return self._inner.reconstruct(keys)
        except KeyError as error:
            raise RuntimeError(error.args[0]) from None

    def remove_ids(self, x: Any) -> int:
        return int(self._inner.remove_ids(selector(x)))


class _Sequential(_Elementary):
    """Ids are places: those behind a removed vector move up."""

    def remove_ids(self, x: Any) -> int:
        removed = super().remove_ids(x)
        self._inner.renumber()
        return removed


class IndexFlat(_Sequential):
    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        self._inner = FlatIndex(self.d, metric_name(metric))
        self.code_size = 4 * self.d

    def train(self, x: Any) -> None:
        self._checked(x)

    def get_xb(self) -> Any:
        return self.reconstruct_n()

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """The bytes of all vectors."""
        return as_array(self.reconstruct_n()).reshape(-1).view(np.uint8)


class IndexFlatL2(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)


class ProductQuantizer:
    """Codes of M sub-vectors; of an index, or alone."""

    def __init__(self, d: int, M: int, nbits: int, inner: Any = None) -> None:
        self.d, self.M, self.nbits = d, M, nbits
        self.dsub, self.ksub, self.code_size = d // M, 1 << nbits, (M * nbits + 7) // 8
        self._inner, self._books = inner, torch.zeros(M, self.ksub, d // M)

    @property
    def _codebooks(self) -> Tensor:
        books: Tensor = self._books if self._inner is None else self._inner._state.model.get("codebooks", self._books)
        return books

    @property
    def centroids(self) -> npt.NDArray[np.float32]:
        return as_array(self._codebooks).reshape(-1)

    def train(self, x: Any) -> None:
        self._books = train_codebooks(torch.from_numpy(as_array(x)), self.M, self.nbits, 1234)

    def compute_codes(self, x: Any) -> npt.NDArray[np.uint8]:
        codes: npt.NDArray[np.uint8] = pq_encode(torch.from_numpy(as_array(x)), self._codebooks).numpy()
        return codes

    def decode(self, codes: Any) -> npt.NDArray[np.float32]:
        return as_array(pq_decode(torch.from_numpy(np.ascontiguousarray(codes, np.uint8)), self._codebooks))


class IndexPQ(_Sequential):
    def __init__(self, d: int, M: int, nbits: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        self._inner = PQIndex(self.d, M, nbits, metric_name(metric))
        self.pq = ProductQuantizer(self.d, M, nbits, self._inner)
        self.code_size = self.pq.code_size
        self.do_polysemous_training, self.search_type = False, 0

    def _how(self, params: SearchParameters | None) -> dict[str, Any]:
        return {"filter": params.sel} if isinstance(params, SearchParametersPQ) else super()._how(params)


class DirectMap:
    """Kinds of maps from ids to rows: here all the same."""

    NoMap, Array, Hashtable = range(3)


class InvertedLists:
    """The sizes and ids of lists."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.nlist = inner.nlist

    def list_size(self, number: int) -> int:
        return len(self.get_ids(number))

    def get_ids(self, number: int) -> Any:
        lists = self._inner._state.lists
        return lists.ids(lists.rows(slice(number, number + 1)))


class IndexIVF(_Elementary):
    """Lists by the nearest vector of a flat index, which training fills, or which comes filled."""

    def __init__(self, quantizer: Index, d: int, nlist: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        if not isinstance(quantizer, IndexFlat):
            raise NotImplementedError(
                f"metate.compat.faiss: quantizer is {type(quantizer).__name__}, expected IndexFlat"
            )
        self.quantizer, self.nlist, self.nprobe = quantizer, int(nlist), 1
        self.own_fields = True
        self.cp = ClusteringParameters(niter=10, spherical=metric == METRIC_INNER_PRODUCT)
        self._inner = self._make()

    def _make(self) -> Any:
        raise NotImplementedError

    def train(self, x: Any) -> None:
        if self.quantizer.ntotal != self.nlist:
            centroids, _ = self.cp.run(as_array(self._checked(x)), self.nlist)
            self.quantizer.reset()
            self.quantizer.add(centroids)
        self._inner.train(self._checked(x), centroids=self.quantizer.reconstruct_n(), progress=False)

    def add_with_ids(self, x: Any, ids: Any) -> None:
        self._ready()
        self._inner.add_with_ids(self._checked(x), ids, progress=False)

    def update_vectors(self, keys: Any, x: Any) -> None:
        """Other vectors under ids that are there."""
        if self.remove_ids(keys) != len(keys):
            raise RuntimeError("update_vectors: keys are not all in the index")
        self.add_with_ids(x, keys)

    @property
    def invlists(self) -> InvertedLists:
        return InvertedLists(self._inner)

    def get_list_size(self, number: int) -> int:
        return self.invlists.list_size(number)

    def make_direct_map(self, new_maintain_direct_map: bool = True) -> None:
        """Nothing to do: ids are found without."""

    set_direct_map_type = make_direct_map

    def _how(self, params: SearchParameters | None) -> dict[str, Any]:
        if params is not None and not isinstance(params, SearchParametersIVF):
            return self._refuse(params)
        for name, value in ({} if params is None else vars(params)).items():
            if name not in ("sel", "nprobe") and value:
                raise NotImplementedError(
                    f"metate.compat.faiss: {name} of SearchParametersIVF is not there; use nprobe"
                )
        nprobe = self.nprobe if params is None else params.nprobe
        if nprobe < 1:
            raise RuntimeError(f"{type(self).__name__}: nprobe is {nprobe}, expected 1 and more")
        return {"nprobe": min(nprobe, self.nlist), "filter": None if params is None else params.sel}


class IndexIVFFlat(IndexIVF):
    def __init__(self, quantizer: Index, d: int, nlist: int, metric: int = METRIC_L2) -> None:
        super().__init__(quantizer, d, nlist, metric)
        self.code_size = 4 * self.d
        if quantizer.ntotal == self.nlist:  # there is nothing else to train
            self._inner.set_trained({"centroids": quantizer.reconstruct_n()})

    def _make(self) -> IVFFlatIndex:
        return IVFFlatIndex(self.d, self.nlist, metric_name(self.metric_type), seed=1234)


class IndexIVFPQ(IndexIVF):
    def __init__(
        self, quantizer: Index, d: int, nlist: int, M: int, nbits_per_idx: int, metric: int = METRIC_L2
    ) -> None:
        self._M, self._bits, self._residual = M, nbits_per_idx, True
        self.use_precomputed_table = 0
        super().__init__(quantizer, d, nlist, metric)
        self.code_size = self.pq.code_size

    def _make(self) -> IVFPQIndex:
        inner = IVFPQIndex(
            self.d, self.nlist, self._M, self._bits, metric_name(self.metric_type), residual=self._residual, seed=1234
        )
        self.pq = ProductQuantizer(self.d, self._M, self._bits, inner)
        return inner

    @property
    def by_residual(self) -> bool:
        return self._residual

    @by_residual.setter
    def by_residual(self, residual: bool) -> None:
        if bool(residual) != self._residual:
            if self._inner.is_trained:
                raise RuntimeError("IndexIVFPQ: by_residual is set after training, expected before")
            self._residual = bool(residual)
            self._inner = self._make()

    def precompute_table(self) -> None:
        """Nothing to do: what does not depend on the query lies beside the codes."""
