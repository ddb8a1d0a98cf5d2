"""faiss' indexes of lists over those of metate.search."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from metate.compat.faiss.arrays import RangeSearchResult, best_of
from metate.compat.faiss.base import MOST, Elementary, Index, by_id, given
from metate.compat.faiss.composite import IndexIDMap
from metate.compat.faiss.distances import METRIC_INNER_PRODUCT, METRIC_L2, between, metric_name
from metate.compat.faiss.indexes import IndexFlat, IndexPQ, block_rows
from metate.compat.faiss.lists import (
    InvertedLists,
    append,
    append_codes,
    before_empty,
    of_residuals,
    preassigned,
    same_training,
    stored,
    subset,
    visited,
    with_lists,
    without_lists,
)
from metate.compat.faiss.parameters import ClusteringParameters, Floats, Only
from metate.compat.faiss.polysemous import PolysemousTraining
from metate.compat.faiss.quantizer import Bytes, ProductQuantizer, ScalarQuantizer, as_array, like
from metate.compat.faiss.random import permutation
from metate.compat.faiss.selectors import Integers, SearchParameters, SearchParametersIVF
from metate.compat.faiss.statistics import IndexIVFStats, indexIVF_stats
from metate.search import IVFFlatIndex, IVFPQIndex
from metate.search.faiss_index import SQ_STORAGE
from metate.search.filters import keep_bitmap


class DirectMap:
    """Kinds of maps from ids to rows. Here ids are always found; but without a map, `reconstruct` is refused."""

    NoMap, Array, Hashtable = range(3)

    def __init__(self, type: int = NoMap) -> None:
        self.type = type

    def no(self) -> bool:
        return self.type == self.NoMap


class IndexIVF(Elementary):
    """Lists by the nearest vector of a flat or PQ index, which training fills, or which comes filled."""

    PARALLEL_MODE_NO_HEAP_INIT = 1024  # of parallel_mode: results go on from those that D and I hold

    code_size: int
    quantizer_trains_alone, clustering_index = Only(0), Only(None)

    def __init__(self, quantizer: Index, d: int, nlist: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        if not isinstance(getattr(quantizer, "index", quantizer), (IndexFlat, IndexPQ)):
            raise NotImplementedError(
                f"metate.compat.faiss: quantizer is {type(quantizer).__name__}, expected IndexFlat or IndexPQ, or an "
                "IndexIDMap2 of one"
            )
        if quantizer.d != d:
            raise RuntimeError(f"{type(self).__name__}: quantizer has {quantizer.d} dimensions, expected {d}")
        self.quantizer, self.nlist, self.nprobe, self.max_codes = quantizer, int(nlist), 1, 0
        self.direct_map = DirectMap()
        self.own_fields, self.parallel_mode = True, 0  # work is divided in one way, which parallel_mode does not change
        self.cp = ClusteringParameters(niter=10, spherical=metric == METRIC_INNER_PRODUCT)
        self._inner = self._make()

    def _make(self) -> Any:
        raise NotImplementedError

    @property
    def metric_type(self) -> int:
        return self._metric

    @metric_type.setter
    def metric_type(self, metric: int) -> None:
        before, self._metric = getattr(self, "_metric", metric), int(metric)
        if before == metric:
            return
        if self._inner.is_trained:
            self._metric = before
            raise RuntimeError(f"{type(self).__name__}: metric_type is set after training, expected before")
        self._inner = self._make()

    def train(self, x: Any) -> None:
        points = as_array(self._checked(x))
        if self.quantizer.ntotal != self.nlist and not isinstance(self.quantizer, IndexIDMap):
            centroids, _ = self.cp.run(points, self.nlist, self.quantizer.metric_type == METRIC_INNER_PRODUCT)
            self.quantizer.reset()
            if not self.quantizer.is_trained:
                self.quantizer.train(centroids)
            self.quantizer.add(centroids)
        self._train_codes(points)
        self._set_trained()

    def _train_codes(self, x: Floats) -> None:
        """There are none to train."""

    def _given(self) -> dict[str, Any]:
        return {"centroids": self._centroids()}

    def _centroids(self) -> Floats:
        """Of all lists; zeros for those that a quantizer with ids of its own does not have."""
        if isinstance(self.quantizer, IndexIDMap):
            centroids, ids = np.zeros((self.nlist, self.d), np.float32), self.quantizer.id_map
            centroids[ids] = self.quantizer.index._vectors_of(np.arange(len(ids)))
            return centroids
        if self.quantizer.ntotal != self.nlist:
            raise RuntimeError(f"{type(self).__name__}: not trained; call train(x)")
        return as_array(self.quantizer.reconstruct_n())

    @property
    def _mixed(self) -> bool:
        """Whether lists are found otherwise than by the metric of the vectors in them among all centroids."""
        return self.quantizer.metric_type != self.metric_type or isinstance(self.quantizer, IndexIDMap)

    @property
    def _direct(self) -> bool:
        """Whether the index within adds and searches as this one does."""
        return not self._mixed

    def add(self, x: Any) -> None:
        if self._direct:
            super().add(x)
        else:
            self.add_with_ids(x, None)

    def add_with_ids(self, x: Any, ids: Any) -> None:
        if isinstance(ids, np.ndarray) and ids.dtype.kind == "f":
            ids = ids.astype(np.int64)  # as faiss does
        if not self._direct:
            self.add_sa_codes(self.sa_encode(as_array(x)), ids)
        elif ids is None or not self._inner._added_quickly(x, ids):
            self._ready()
            self._inner.add_with_ids(self._checked(x), ids, progress=False)

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        self._ready()
        append_codes(self._inner, *without_lists(codes, self.coarse_code_size()), ids)

    def update_vectors(self, keys: Any, x: Any) -> None:
        """Other vectors under ids that are there."""
        ids = np.asarray(keys, np.int64)
        if len(np.unique(ids)) != len(ids) or (self._inner._state.lists.find(ids) < 0).any():
            raise RuntimeError("update_vectors: keys are not all in the index, or given twice")
        codes = self.sa_encode(x)  # which may refuse them
        if len(codes) != len(ids):
            raise AssertionError(f"update_vectors: {len(codes)} vectors, expected {len(ids)}, one for each key")
        self.remove_ids(ids)
        self._add_codes(codes, ids)

    @property
    def invlists(self) -> InvertedLists:
        return InvertedLists(self._inner, self.code_size)

    def get_list_size(self, number: int) -> int:
        return self.invlists.list_size(number)

    def check_ids_sorted(self) -> bool:
        """Whether every list has its ids in ascending order."""
        return all(bool((np.diff(self.invlists.get_ids(number)) > 0).all()) for number in range(self.nlist))

    def make_direct_map(self, new_maintain_direct_map: bool = True) -> None:
        self.set_direct_map_type(DirectMap.Array if new_maintain_direct_map else DirectMap.NoMap)

    def set_direct_map_type(self, type: int) -> None:
        if type not in (DirectMap.NoMap, DirectMap.Array, DirectMap.Hashtable):
            raise RuntimeError(f"set_direct_map_type: type is {type}, expected NoMap, Array or Hashtable of DirectMap")
        self.direct_map = DirectMap(int(type))

    def _may_reconstruct(self) -> None:
        if self.direct_map.no():
            raise RuntimeError(f"{type(self).__name__}: direct map not initialized; call make_direct_map()")

    # Rows of lists.

    def coarse_code_size(self) -> int:
        """Bytes of the number of a list."""
        return ((self.nlist - 1).bit_length() + 7) // 8

    def sa_code_size(self) -> int:
        return self.coarse_code_size() + self.code_size

    def _encode(self, x: Floats) -> Bytes:
        self._ready()
        lists = self.quantizer.assign(x, 1)[:, 0] if self._mixed else self._inner.assign(x)
        if (lists < 0).any():
            raise ValueError(f"{type(self).__name__}: vectors are not finite everywhere, expected finite numbers")
        return with_lists(lists, self._to_bytes(x, lists), self.coarse_code_size())

    def _decode(self, codes: Bytes) -> Floats:
        lists, rest = without_lists(codes, self.coarse_code_size())
        return self._from_bytes(rest, lists)

    def _to_bytes(self, x: Floats, lists: Any) -> Bytes:
        return x.view(np.uint8)

    def _from_bytes(self, codes: Bytes, lists: Any) -> Floats:
        return np.ascontiguousarray(codes).view(np.float32)

    def check_compatible_for_merge(self, other: Any) -> None:
        same_training("check_compatible_for_merge", other._inner, self._inner)

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        lists = other._inner._state.lists
        rows = lists.rows()
        append(other._inner, lists, rows, self._inner, lists.ids(rows) + add_id)
        other.reset()

    def copy_subset_to(self, other: Any, subset_type: int, a1: int, a2: int) -> None:
        """Adds a part of the vectors to another index: 0, ids a1 <= id < a2; 1, id % a1 == a2; 2, the vectors a1 to a2
        of ntotal; 3, part a2 of a1 of every list; 4, lists a1 to a2."""
        lists = self._inner._state.lists
        rows = subset(lists, subset_type, a1, a2)
        append(self._inner, lists, rows, other._inner, lists.ids(rows))

    def search_preassigned(
        self, x: Any, k: int, Iq: Any, Dq: Any, *, params: SearchParameters | None = None, D: Any = None, I: Any = None,  # noqa: E741
    ) -> Any:  # fmt: skip
        """Search in the lists Iq (n, nprobe), at distances Dq from their centroids."""
        distances, ids = self._search_lists(self._checked(x), k, Iq, Dq, self._asked(params))
        if self.parallel_mode & self.PARALLEL_MODE_NO_HEAP_INIT and D is not None and I is not None:
            both, labels = (np.hstack([np.asarray(old), new]) for old, new in ((D, distances), (I, ids)))
            distances, ids = best_of(both, labels, k, self.metric_type == METRIC_INNER_PRODUCT)
        return given((distances.clip(-MOST, MOST), D), (ids, I))

    def _search_lists(self, x: Any, k: int, lists: Any, near: Any, asked: SearchParametersIVF) -> tuple[Any, Any]:
        self._count(k, lists, asked)
        near = self._distances(x, lists) if self._mixed else near
        distances, ids = self._preassigned(x, lists, near, k, asked)
        return like(x, distances.numpy()), like(x, ids.numpy())

    def _preassigned(self, x: Any, lists: Any, near: Any, k: int, asked: SearchParametersIVF) -> tuple[Tensor, Tensor]:
        return preassigned(self._inner, x, lists, near, k, asked)

    def _distances(self, x: Any, lists: Any) -> Floats:
        """Of queries and the centroids of lists (n, nprobe), by the metric of the index."""
        return between(self.metric_type, as_array(x)[:, None], self._centroids()[np.asarray(lists)])

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        asked = self._asked(params)
        if self._direct and not asked.max_codes and not indexIVF_stats.wanted:
            return super()._search(x, k, params)
        self._ready()
        near, lists = self.quantizer._search(x, asked.nprobe, None)
        return self._search_lists(x, k, lists, near, asked)

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        asked = self._asked(params)
        most = asked.max_empty_result_buckets
        if self._direct and not most and not indexIVF_stats.wanted:
            return super()._range(x, radius, params)
        if most and self.parallel_mode:
            raise RuntimeError("max_empty_result_buckets supported only for parallel_mode = 0")
        self._ready()
        near, lists = (np.asarray(part) for part in self.quantizer._search(x, asked.nprobe, None))
        found = super()._range(x, radius, params) if self._direct else self._range_lists(x, radius, lists, near, asked)
        lims, distances, ids = (np.asarray(part) for part in found)
        stays, looked = before_empty(self._inner, lists, lims, ids, most or self.nlist)
        self._count(0, np.where(looked, lists, -1), replace(asked, max_codes=0))
        lims = np.append(0, stays.cumsum())[lims]
        return tuple(like(x, part) for part in (lims, distances[stays], ids[stays]))

    def _count(self, k: int, lists: Any, asked: SearchParametersIVF) -> None:
        """In the statistics, where somebody looks at them."""
        if indexIVF_stats.wanted:
            numbers, rows = np.asarray(lists, np.int64), self._inner._state.lists
            compared = visited(rows, numbers, keep_bitmap("search", rows, asked.sel), k, asked)[1]
            indexIVF_stats.add(IndexIVFStats(len(numbers), int((numbers >= 0).sum()), int(compared.sum())))

    def add_core(self, n: int, x: Any, xids: Any, precomputed_idx: Any, inverted_list_context: Any = None) -> None:
        """Adds n vectors to given lists, -1 for none."""
        rows, lists = as_array(x).reshape(n, self.d), np.asarray(precomputed_idx, np.int64)[:n]
        ids = np.arange(self.ntotal, self.ntotal + n) if xids is None else np.asarray(xids, np.int64)
        to = lists >= 0
        self._ready()
        append_codes(self._inner, lists[to], self._to_bytes(rows[to], lists[to]), ids[to])

    def range_search_preassigned_c(
        self, n: int, x: Any, radius: float, keys: Any, coarse_dis: Any, result: RangeSearchResult
    ) -> None:
        """The same as the next, into a result."""
        found = self.range_search_preassigned(as_array(x).reshape(n, self.d), radius, keys, coarse_dis)
        result.lims, result.distances, result.labels = found

    def range_search_preassigned(self, x: Any, thresh: float, Iq: Any, Dq: Any) -> tuple[Any, Any, Any]:
        """Range search in the lists Iq (n, nprobe), at distances Dq from their centroids."""
        return self._range_lists(self._checked(x), thresh, Iq, Dq, SearchParametersIVF())

    def _range_lists(
        self, x: Any, thresh: float, lists: Any, near: Any, asked: SearchParametersIVF
    ) -> tuple[Any, Any, Any]:
        """More and more are asked for until the last one is outside."""
        k, product = 64, self.metric_type == METRIC_INNER_PRODUCT
        near, asked = self._distances(x, lists) if self._mixed else near, replace(asked, max_codes=0)
        while True:
            distances, ids = (part.numpy() for part in self._preassigned(x, lists, near, k, asked))
            inside = (distances > thresh if product else distances < thresh) & (ids >= 0)
            if k >= self.ntotal or not inside[:, -1].any():
                break
            k *= 8
        lims = np.concatenate([[0], inside.sum(1).cumsum()])
        return tuple(like(x, part) for part in by_id(lims, distances[inside], ids[inside]))

    def search_and_return_codes(
        self, x: Any, k: int, *, include_listnos: bool = False, params: SearchParameters | None = None, D: Any = None,
        I: Any = None, codes: Any = None,  # noqa: E741
    ) -> Any:  # fmt: skip
        """Distances, ids and (n, k, bytes) the codes of what was found, behind the numbers of lists if wanted."""
        distances, ids = self.search(x, k, params=params, D=D, I=I)
        home, found = stored(self._inner, np.asarray(ids).reshape(-1))
        found = with_lists(home, found, self.coarse_code_size()) if include_listnos else found
        return distances, ids, given((found.reshape(*ids.shape, -1), codes))[0]

    def _asked(self, params: SearchParameters | None) -> SearchParametersIVF:
        """What a search is asked for, by its parameters or by the index."""
        if params is None:
            asked = SearchParametersIVF(nprobe=self.nprobe, max_codes=self.max_codes)
        elif isinstance(params, SearchParametersIVF):
            asked = params
        else:
            self._refuse(params)
        if asked.quantizer_params is not None or asked.inverted_list_context is not None:
            raise NotImplementedError(
                "metate.compat.faiss: quantizer_params and inverted_list_context of SearchParametersIVF are not there"
            )
        if asked.nprobe < 1:
            raise RuntimeError(f"{type(self).__name__}: nprobe is {asked.nprobe}, expected 1 and more")
        return replace(asked, nprobe=min(asked.nprobe, self.nlist))

    def _how(self, params: SearchParameters | None) -> dict[str, Any]:
        asked = self._asked(params)
        return {"nprobe": asked.nprobe, "filter": asked.sel}


class IndexIVFFlat(IndexIVF):
    def __init__(self, quantizer: Index, d: int, nlist: int, metric: int = METRIC_L2) -> None:
        super().__init__(quantizer, d, nlist, metric)
        self.code_size = 4 * self.d
        if quantizer.ntotal == self.nlist:  # there is nothing else to train
            self._set_trained()

    def _make(self) -> IVFFlatIndex:
        return IVFFlatIndex(self.d, self.nlist, metric_name(self.metric_type), seed=1234)


class _OfResiduals(IndexIVF):
    """Codes of vectors less the centroids of their lists, unless by_residual is unset."""

    _residual: bool

    @property
    def by_residual(self) -> bool:
        return self._residual

    @by_residual.setter
    def by_residual(self, residual: bool) -> None:
        if bool(residual) == self._residual:
            return
        self._residual, before = bool(residual), self._inner
        self._inner = self._make()
        if before.is_trained:  # codes stay, and mean something else
            self._inner.set_trained(before.trained())
            lists = before._state.lists
            ids = lists.ids(lists.rows())
            append_codes(self._inner, *stored(before, ids), ids)

    def _residual_of(self, x: Floats, lists: Any) -> Floats:
        return x - self._centroids()[lists] if self._residual else x


class IndexIVFScalarQuantizer(_OfResiduals):
    """Numbers in a byte, or as float16 or bfloat16. Lists of residuals are searched one by one: each has queries of its
    own."""

    def __init__(
        self, quantizer: Index, d: int, nlist: int, qtype: int, metric: int = METRIC_L2, by_residual: bool = True
    ) -> None:
        self.sq, self._residual = ScalarQuantizer(d, qtype), bool(by_residual)
        super().__init__(quantizer, d, nlist, metric)
        self.code_size = self.sq.code_size

    def _make(self) -> IVFFlatIndex:
        storage = SQ_STORAGE[self.sq.qtype]
        return IVFFlatIndex(self.d, self.nlist, metric_name(self.metric_type), storage=storage, seed=1234)

    @property
    def _direct(self) -> bool:
        return super()._direct and not self._residual

    def _train_codes(self, x: Floats) -> None:
        self.sq.train(self._residual_of(x, self.quantizer.assign(x, 1)[:, 0]))

    def _given(self) -> dict[str, Any]:
        return super()._given() | self.sq._model()

    def _to_bytes(self, x: Floats, lists: Any) -> Bytes:
        return self.sq.compute_codes(self._residual_of(x, lists))

    def _from_bytes(self, codes: Bytes, lists: Any) -> Floats:
        x = self.sq.decode(codes)
        return x + self._centroids()[lists] if self._residual else x

    def _vectors_of(self, keys: Any) -> Any:
        x = super()._vectors_of(keys)
        if not self._residual:
            return x
        return like(x, as_array(x) + self._centroids()[stored(self._inner, np.asarray(keys, np.int64))[0]])

    def _preassigned(self, x: Any, lists: Any, near: Any, k: int, asked: SearchParametersIVF) -> tuple[Tensor, Tensor]:
        if not self._residual:
            return super()._preassigned(x, lists, near, k, asked)
        return of_residuals(self._inner, as_array(x), lists, self._centroids(), k, asked)


class IndexIVFPQ(_OfResiduals):
    """polysemous_ht, by which faiss passes over codes, changes nothing: lists that are probed are looked at whole."""

    scan_table_threshold = Only(0)

    def __init__(
        self, quantizer: Index, d: int, nlist: int, M: int, nbits_per_idx: int, metric: int = METRIC_L2
    ) -> None:
        self._M, self._bits, self._residual = M, nbits_per_idx, True
        self.use_precomputed_table, self.polysemous_ht = 0, 0
        self.do_polysemous_training, self.polysemous_training = False, PolysemousTraining()
        super().__init__(quantizer, d, nlist, metric)
        self.pq = ProductQuantizer(self.d, M, nbits_per_idx)
        self.code_size = self.pq.code_size

    def _make(self) -> IVFPQIndex:
        return IVFPQIndex(
            self.d, self.nlist, self._M, self._bits, metric_name(self.metric_type), residual=self._residual, seed=1234
        )

    def _shape(self) -> tuple[Any, ...]:
        return self.quantizer, self.d, self.nlist, self._M, self._bits, self.metric_type

    def _train_codes(self, x: Floats) -> None:
        most = self.pq.cp.max_points_per_centroid * self.pq.ksub
        if len(x) > most:
            x = x[permutation(len(x), most, 1234)]
        self.pq.train(self._residual_of(x, self.quantizer.assign(x, 1)[:, 0]))
        if self.do_polysemous_training:
            self.polysemous_training.optimize_pq_for_hamming(self.pq)

    def _given(self) -> dict[str, Any]:
        return super()._given() | {"codebooks": self.pq._books.numpy()}

    def _took(self, inner: Any) -> None:
        super()._took(inner)
        self.pq._books = inner.trained().get("codebooks", self.pq._books)

    def _to_bytes(self, x: Floats, lists: Any) -> Bytes:
        return self.pq.compute_codes(self._residual_of(x, lists))

    def _from_bytes(self, codes: Bytes, lists: Any) -> Floats:
        x = self.pq.decode(codes)
        return x + self._centroids()[lists] if self._residual else x

    def precompute_table(self) -> None:
        """Nothing to do: what does not depend on the query lies beside the codes."""


class IndexIVFPQFastScan(IndexIVFPQ):
    """(quantizer, d, nlist, M, nbits, metric, bbs), or (index, bbs) with what an IndexIVFPQ holds; as IndexPQFastScan.
    It quantises vectors, not residuals, until by_residual is set."""

    def __init__(self, *given: Any) -> None:
        like = given[0] if isinstance(given[0], IndexIVFPQ) else None
        super().__init__(*(given[:6] if like is None else like._shape()))
        self.bbs = block_rows(given[6:] if like is None else given[1:])
        if self.pq.nbits != 4:
            raise RuntimeError(f"IndexIVFPQFastScan: nbits is {self.pq.nbits}, expected 4")
        self.by_residual = like is not None and like.by_residual
        if like is not None:
            self.nprobe = like.nprobe
            self._took(copy.deepcopy(like._inner))


class Index2Layer(Index):
    """A list for every vector and codes of what is left beside its centroid, as an IndexIVFPQ makes them, one vector
    after another: to encode and reconstruct, not to search."""

    def __init__(self, quantizer: Index, nlist: int, M: int, nbits: int = 8, metric: int = METRIC_L2) -> None:
        super().__init__(quantizer.d, metric)
        self.q1 = IndexIVFPQ(quantizer, quantizer.d, nlist, M, nbits, metric)
        self.code_size_1, self.code_size_2 = self.q1.coarse_code_size(), self.q1.code_size
        self.code_size = self.q1.sa_code_size()

    @property
    def pq(self) -> ProductQuantizer:
        return self.q1.pq

    @pq.setter
    def pq(self, pq: ProductQuantizer) -> None:
        self.q1.pq = pq

    @property
    def cp(self) -> ClusteringParameters:
        return self.q1.cp

    @property
    def ntotal(self) -> int:
        return self.q1.ntotal

    @property
    def is_trained(self) -> bool:
        return self.q1.is_trained

    @is_trained.setter
    def is_trained(self, trained: bool) -> None:
        self.q1.is_trained = trained

    @property
    def codes(self) -> Bytes:
        """The codes of all vectors."""
        home, codes = stored(self.q1._inner, np.arange(self.ntotal))
        return with_lists(home, codes, self.code_size_1).reshape(-1)

    def train(self, x: Any) -> None:
        self.q1.train(x)

    def add(self, x: Any) -> None:
        self.q1.add(x)

    def reset(self) -> None:
        self.q1.reset()

    def sa_code_size(self) -> int:
        return self.code_size

    def _encode(self, x: Floats) -> Bytes:
        return self.q1._encode(x)

    def _decode(self, codes: Bytes) -> Floats:
        return self.q1._decode(codes)

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        if ids is not None:
            raise RuntimeError("Index2Layer: ids are given, expected None: ids are places")
        self.q1._add_codes(codes, None)

    def _vectors_of(self, keys: Any) -> Any:
        return self.q1._vectors_of(keys)

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        raise RuntimeError("Index2Layer: search is not there, use IndexIVFPQ")

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        raise RuntimeError("Index2Layer: range_search is not there, use IndexIVFPQ")
