"""Indexes around other indexes: with ids of one's own, behind transforms, refined by full vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.compat.faiss.base import DistanceComputer, Index
from metate.compat.faiss.distances import METRIC_INNER_PRODUCT, between
from metate.compat.faiss.indexes import IndexFlat, IndexFlatCodes
from metate.compat.faiss.lists import candidates
from metate.compat.faiss.parameters import Floats, Numbers, Vector
from metate.compat.faiss.quantizer import Bytes, as_array, like
from metate.compat.faiss.selectors import (
    IDSelectorBatch,
    IDSelectorTranslated,
    IndexRefineSearchParameters,
    Integers,
    SearchParameters,
    SearchParametersPreTransform,
    selector,
)
from metate.compat.faiss.transforms import VectorTransform


class _Around(Index):
    """What is passed on to the index within."""

    def __init__(self, index: Index, d: int | None = None) -> None:
        super().__init__(index.d if d is None else d, index.metric_type)
        self.index, self.own_fields = index, True

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    @property
    def is_trained(self) -> bool:
        return self.index.is_trained

    @is_trained.setter
    def is_trained(self, trained: bool) -> None:
        """It is what the index within is."""

    def train(self, x: Any) -> None:
        self.index.train(self._checked(x))

    def reset(self) -> None:
        self.index.reset()

    def _may_reconstruct(self) -> None:
        self.index._may_reconstruct()

    def sa_code_size(self) -> int:
        return self.index.sa_code_size()

    def _encode(self, x: Floats) -> Bytes:
        return self.index._encode(x)

    def _decode(self, codes: Bytes) -> Floats:
        return self.index._decode(codes)

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        self.index._add_codes(codes, ids)


class IndexIDMap(_Around):
    """Ids of one's own for an index that numbers vectors. A search beside a removal, which moves vectors, is done
    again: what it finds was there at one time."""

    _room: Integers  # what `_ids` is the beginning of
    _count: int
    _writing: threading.RLock
    _moves: int  # of vectors to other places: begun and ended ones, so that it is odd during one

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        if index.ntotal:
            raise RuntimeError(f"IndexIDMap: index holds {index.ntotal} vectors, expected an empty one")
        self._ids = np.zeros(0, np.int64)

    def __new__(cls, *args: Any) -> IndexIDMap:
        made = super().__new__(cls)
        made._writing, made._moves = threading.RLock(), 0
        return made

    @property
    def id_map(self) -> Integers:
        return self._ids.view(Numbers)

    @property
    def _ids(self) -> Integers:
        count = self._count  # before the memory, which may be that of more
        return self._room[:count]

    @_ids.setter
    def _ids(self, ids: Integers) -> None:
        self._room, self._count = ids, len(ids)

    def add(self, x: Any) -> None:
        raise RuntimeError("IndexIDMap: add is not there, use add_with_ids")

    def add_with_ids(self, x: Any, ids: Any) -> None:
        numbers = (
            ids if type(ids) is np.ndarray else np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, np.int64)
        )
        if numbers.shape != (len(x),):
            raise AssertionError(f"IndexIDMap: ids of shape {numbers.shape}, expected ({len(x)},)")
        self._add(numbers, lambda: self.index.add(x))

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        if ids is None:
            raise RuntimeError("IndexIDMap: add_sa_codes without ids, expected one for each row")
        self._add(ids, lambda: self.index._add_codes(codes, None))

    def _add(self, ids: Integers, add: Callable[[], None]) -> None:
        """The ids first: whoever searches meanwhile finds no vector without one."""
        with self._writing:
            count = self._count
            self._append(ids)
            try:
                add()
            except BaseException:
                self._count = count
                raise

    def _append(self, ids: Integers) -> None:
        """Behind the others, in memory with room for as many again: searches may hold the ones before."""
        old, total = self._count, self._count + len(ids)
        if len(self._room) < total:
            room = np.empty(2 * total, np.int64)
            room[:old] = self._room[:old]
            self._room = room
        self._room[old:total] = ids
        self._count = total

    def _named(self, places: Any) -> Any:
        """Ids of places, -1 for -1."""
        at = np.asarray(places)
        return like(places, np.append(self._ids, -1)[at])

    def _params(self, params: SearchParameters | None) -> SearchParameters | None:
        """The selector over places instead of ids."""
        if params is None or params.sel is None:
            return params
        if isinstance(params.sel, IDSelectorTranslated):  # of places already
            return params
        places = np.flatnonzero(params.sel(self._ids))
        return type(params)(**{**params.__dict__, "sel": IDSelectorBatch(places)})

    def _in_place(self, read: Callable[[], Any]) -> Any:
        """What is read while no vector moves: where one did, again, and no other may meanwhile."""
        before = self._moves
        if before % 2 == 0:
            try:
                found = read()
            except Exception:
                if self._moves == before:
                    raise
            else:
                if self._moves == before:
                    return found
        with self._writing:
            return read()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        with self._writing:
            self._moves += 1
            try:
                yield
            finally:
                self._moves += 1

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        def found() -> tuple[Any, Any]:
            distances, places = self.index._search(x, k, self._params(params))
            return distances, self._named(places)

        return self._in_place(found)  # type: ignore[no-any-return]

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        def found() -> tuple[Any, Any, Any]:
            lims, distances, places = self.index._range(x, radius, self._params(params))
            return lims, distances, self._named(places)

        return self._in_place(found)  # type: ignore[no-any-return]

    def remove_ids(self, x: Any) -> int:
        with self._moving():
            gone = selector(x)(self._ids)
            removed = self.index.remove_ids(np.flatnonzero(gone))
            self._ids = self._ids[~gone]
        return removed

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        self._add(other.id_map + add_id, lambda: self.index.merge_from(other.index))
        other.reset()

    def reset(self) -> None:
        with self._moving():
            self.index.reset()
            self._ids = np.zeros(0, np.int64)

    def _may_reconstruct(self) -> None:
        raise RuntimeError("IndexIDMap: reconstruct is not there, use IndexIDMap2")

    def _vectors_of(self, keys: Any) -> Any:
        self._may_reconstruct()


class IndexIDMap2(IndexIDMap):
    """The same, and vectors are reconstructed by id."""

    def check_consistency(self) -> None:
        """Nothing to do: ids are looked up where they are."""

    def _may_reconstruct(self) -> None:
        self.index._may_reconstruct()

    def _vectors_of(self, keys: Any) -> Any:
        return self._in_place(lambda: self.index._vectors_of(self._places(np.asarray(keys, np.int64))))

    def _places(self, wanted: Integers) -> Integers:
        ids = self._ids
        order = np.argsort(ids, kind="stable")
        at = np.minimum(np.searchsorted(ids, wanted, sorter=order), max(len(order) - 1, 0))
        if not len(order) or (ids[order[at]] != wanted).any():
            raise RuntimeError("IndexIDMap2: a key is not in the index")
        return np.asarray(order[at], np.int64)


class IndexPreTransform(_Around):
    """Transforms, one after another, before an index. Attributes that it does not have are refused: they are set on the
    index within."""

    _OWN = frozenset({"d", "metric_type", "metric_arg", "verbose", "index", "own_fields", "chain", "is_trained"})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._OWN:
            raise AttributeError(f"IndexPreTransform has no {name}: set it on the index within (extract_index_ivf)")
        super().__setattr__(name, value)

    def __init__(self, *parts: Any) -> None:
        *chain, index = parts
        super().__init__(index, chain[0].d_in if chain else index.d)
        self.chain: Vector[VectorTransform] = Vector(chain)

    def prepend_transform(self, transform: VectorTransform) -> None:
        self.chain.insert(0, transform)
        self.d = transform.d_in

    @property
    def is_trained(self) -> bool:
        return self.index.is_trained and all(step.is_trained for step in self.chain)

    @is_trained.setter
    def is_trained(self, trained: bool) -> None:
        """It is what the parts are."""

    def train(self, x: Any) -> None:
        self._checked(x)
        for step in self.chain:
            if not step.is_trained:
                step.train(x)
            x = step.apply(x)
        if not self.index.is_trained:
            self.index.train(x)

    def apply_chain(self, x: Any) -> Any:
        for step in self.chain:
            x = step.apply(x)
        return x

    def apply_py(self, x: Any) -> Any:
        return self.apply_chain(x)

    def _encode(self, x: Floats) -> Bytes:
        return self.index._encode(as_array(self.apply_chain(x)))

    def _decode(self, codes: Bytes) -> Floats:
        return as_array(self.reverse_chain(self.index._decode(codes)))

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        self.index.merge_from(other.index, add_id)

    def get_distance_computer(self) -> DistanceComputer:
        """Between transformed vectors."""
        return DistanceComputer(self.index, self.apply_chain)

    def reverse_chain(self, x: Any) -> Any:
        for step in reversed(self.chain):
            x = step.reverse_transform(x)
        return x

    def add(self, x: Any) -> None:
        self.index.add(self.apply_chain(self._checked(x)))

    def add_with_ids(self, x: Any, ids: Any) -> None:
        self.index.add_with_ids(self.apply_chain(self._checked(x)), ids)

    def remove_ids(self, x: Any) -> int:
        return self.index.remove_ids(x)

    @staticmethod
    def _params(params: SearchParameters | None) -> SearchParameters | None:
        return params.index_params if isinstance(params, SearchParametersPreTransform) else params

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        return self.index._search(self.apply_chain(x), k, self._params(params))

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        return self.index._range(self.apply_chain(x), radius, self._params(params))

    def _vectors_of(self, keys: Any) -> Any:
        return self.reverse_chain(self.index._vectors_of(keys))


class IndexRefine(Index):
    """Candidates of one index, ranked by the vectors of another."""

    def __init__(self, base_index: Index, refine_index: Index) -> None:
        super().__init__(base_index.d, base_index.metric_type)
        if base_index.ntotal != refine_index.ntotal:
            raise RuntimeError(f"IndexRefine: {base_index.ntotal} and {refine_index.ntotal} vectors, expected as many")
        self.base_index, self.refine_index, self.k_factor, self.own_fields = base_index, refine_index, 1.0, True

    @property
    def ntotal(self) -> int:
        return self.base_index.ntotal

    @property
    def is_trained(self) -> bool:
        return self.base_index.is_trained and self.refine_index.is_trained

    def train(self, x: Any) -> None:
        self.base_index.train(x)
        self.refine_index.train(x)

    def add(self, x: Any) -> None:
        """What ranks candidates first: whoever searches meanwhile finds none without."""
        if not self.is_trained:
            raise RuntimeError(f"{type(self).__name__}: not trained; call train(x)")
        self.refine_index.add(x)
        self.base_index.add(x)

    def reset(self) -> None:
        self.base_index.reset()
        self.refine_index.reset()

    def sa_code_size(self) -> int:
        return self.base_index.sa_code_size() + self.refine_index.sa_code_size()

    def _encode(self, x: Floats) -> Bytes:
        return np.hstack([self.base_index._encode(x), self.refine_index._encode(x)])

    def _decode(self, codes: Bytes) -> Floats:
        return self.refine_index._decode(np.ascontiguousarray(codes[:, self.base_index.sa_code_size() :]))

    def _may_reconstruct(self) -> None:
        self.refine_index._may_reconstruct()

    def _vectors_of(self, keys: Any) -> Any:
        return self.refine_index._vectors_of(keys)

    def _asked(self, params: SearchParameters | None) -> tuple[float, SearchParameters | None]:
        """k_factor, and the parameters of the base index."""
        if isinstance(params, IndexRefineSearchParameters):
            return params.k_factor, params.base_index_params
        return self.k_factor, params

    def _distances(self, queries: Floats, ids: Any) -> Floats:
        """Of each query and the vector under the id beside it; of -1 the worst."""
        worst = -np.inf if self.metric_type == METRIC_INNER_PRODUCT else np.inf
        distances, there = np.full(ids.shape, worst, np.float32), ids >= 0
        vectors = as_array(self.refine_index._vectors_of(ids[there]))
        distances[there] = between(self.metric_type, queries[there], vectors)
        return distances

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        factor, inner = self._asked(params)
        ids = np.asarray(self.base_index._search(x, max(k, int(k * factor)), inner)[1])
        full = self.refine_index
        if (
            isinstance(full, IndexFlatCodes)
            and full.metric_type == self.metric_type
            and full._inner._state.lists.implicit
        ):
            return tuple(like(x, part.numpy()) for part in candidates(full._inner, as_array(x), ids, k))
        distances = self._distances(np.repeat(as_array(x)[:, None], ids.shape[1], 1), ids)
        best_first = -distances if self.metric_type == METRIC_INNER_PRODUCT else distances
        order = np.lexsort((ids, best_first))[:, :k]
        return tuple(like(x, np.take_along_axis(a, order, 1)) for a in (distances, ids))

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        """Of those that the base index finds within radius * k_factor, the ones that are within the radius."""
        factor, inner = self._asked(params)
        lims, _, ids = (np.asarray(part) for part in self.base_index._range(x, radius * factor, inner))
        query = np.repeat(np.arange(len(lims) - 1), np.diff(lims))
        distances = self._distances(as_array(x)[query], ids)
        inside = distances > radius if self.metric_type == METRIC_INNER_PRODUCT else distances < radius
        lims = np.concatenate([[0], np.bincount(query[inside], minlength=len(lims) - 1).cumsum()])
        return tuple(like(x, part) for part in (lims, distances[inside], ids[inside]))


class IndexRefineFlat(IndexRefine):
    """Refined by full vectors; those that the base index holds already must be given."""

    def __init__(self, base_index: Index, vectors: Any = None) -> None:
        flat = IndexFlat(base_index.d, base_index.metric_type)
        if vectors is not None:
            flat.add(torch.as_tensor(vectors, device="cpu"))
        super().__init__(base_index, flat)


class IndexShards(Index):
    """([d,] threaded, successive_ids): a search asks all shards. Successive ids are places among the vectors of all
    shards, one after another; else ids are those of the shards. Shards are searched in turn, each by all threads."""

    def __init__(self, *given: Any) -> None:
        sized = bool(given) and not isinstance(given[0], bool)
        super().__init__(int(given[0]) if sized else 0)
        flags = given[1:] if sized else given
        self.threaded = bool(flags[0]) if flags else False
        self.successive_ids = bool(flags[1]) if len(flags) > 1 else True
        self.shards: Vector[Index] = Vector()

    def add_shard(self, index: Index) -> None:
        if not self.shards and not self.d:
            self.d = index.d
        if index.d != self.d or (self.shards and index.metric_type != self.metric_type):
            raise RuntimeError(f"IndexShards: a shard of {index.d} dimensions or another metric, expected {self.d}")
        self.metric_type = index.metric_type
        self.shards.append(index)

    def count(self) -> int:
        return len(self.shards)

    def at(self, i: int) -> Index:
        return self.shards[i]

    @property
    def ntotal(self) -> int:
        return sum(shard.ntotal for shard in self.shards)

    @property
    def is_trained(self) -> bool:
        return all(shard.is_trained for shard in self.shards)

    def train(self, x: Any) -> None:
        for shard in self.shards:
            if not shard.is_trained:
                shard.train(x)

    def reset(self) -> None:
        for shard in self.shards:
            shard.reset()

    def add(self, x: Any) -> None:
        if self.successive_ids and self.ntotal:
            raise RuntimeError("IndexShards: with successive_ids, all vectors are added at once")
        self._add(x, None if self.successive_ids else np.arange(self.ntotal, self.ntotal + len(x)))

    def add_with_ids(self, x: Any, ids: Any) -> None:
        if self.successive_ids:
            raise RuntimeError("IndexShards: ids are given beside successive_ids, expected add")
        self._add(x, np.asarray(ids, np.int64))

    def _add(self, x: Any, ids: Integers | None) -> None:
        cuts = [len(x) * i // max(len(self.shards), 1) for i in range(len(self.shards) + 1)]
        for shard, a, b in zip(self.shards, cuts, cuts[1:], strict=False):
            shard.add(x[a:b]) if ids is None else shard.add_with_ids(x[a:b], ids[a:b])

    def _firsts(self) -> list[int]:
        """What is added to the ids of each shard."""
        before = np.cumsum([0, *(shard.ntotal for shard in self.shards)])
        return [int(first) if self.successive_ids else 0 for first in before[:-1]]

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        parts = [tuple(map(np.asarray, shard._search(x, k, params))) for shard in self.shards]
        distances = np.hstack([found for found, _ in parts])
        ids = np.hstack([np.where(i < 0, i, i + n) for (_, i), n in zip(parts, self._firsts(), strict=True)])
        best_first = -distances if self.metric_type == METRIC_INNER_PRODUCT else distances
        order = np.lexsort((ids, best_first, ids < 0))[:, :k]
        return tuple(like(x, np.take_along_axis(part, order, 1)) for part in (distances, ids))

    def _range(self, x: Any, radius: float, params: SearchParameters | None) -> tuple[Any, Any, Any]:
        parts = [tuple(map(np.asarray, shard._range(x, radius, params))) for shard in self.shards]
        query = np.concatenate([np.repeat(np.arange(len(x)), np.diff(lims)) for lims, *_ in parts])
        ids = np.concatenate([i + n for (*_, i), n in zip(parts, self._firsts(), strict=True)])
        order = np.argsort(query, kind="stable")
        lims = np.append(0, np.bincount(query, minlength=len(x)).cumsum())
        distances = np.concatenate([found for _, found, _ in parts])
        return tuple(like(x, part) for part in (lims, distances[order], ids[order]))
