"""Which ids a search or a removal concerns, and the parameters of one search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from metate.compat.faiss.parameters import Owned

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class IDSelector(Owned):
    """A set of ids: `selector(ids)` is a mask."""

    def __call__(self, ids: Integers) -> Booleans:
        raise NotImplementedError

    def is_member(self, i: int) -> bool:
        return bool(self(np.array([i]))[0])


@dataclass
class IDSelectorRange(IDSelector):
    """imin <= id < imax."""

    imin: int
    imax: int
    assume_sorted: bool = False

    def __call__(self, ids: Integers) -> Booleans:
        inside: Booleans = (ids >= self.imin) & (ids < self.imax)
        return inside

    def find_sorted_ids_bounds(self, list_size: int, ids: Integers, jmin: Any, jmax: Any) -> None:
        """Where in ascending ids those of the range begin and end, written into two arrays."""
        jmin[...], jmax[...] = np.searchsorted(ids[:list_size], [self.imin, self.imax])


class IDSelectorBatch(IDSelector):
    """The ids of an array, or the first n of one."""

    def __init__(self, *given: Any) -> None:
        self.ids = np.asarray(given[-1], np.int64).reshape(-1)[: given[0] if len(given) == 2 else None]

    def __call__(self, ids: Integers) -> Booleans:
        return np.isin(ids, self.ids)


class IDSelectorArray(IDSelectorBatch):
    """The same; faiss compares one by one."""


class IDSelectorBitmap(IDSelector):
    """Bit i % 8 of byte i // 8 says whether i is in."""

    def __init__(self, bitmap: Any) -> None:
        self.mask = np.unpackbits(np.asarray(bitmap, np.uint8), bitorder="little").view(np.bool_)

    def __call__(self, ids: Integers) -> Booleans:
        known = (ids >= 0) & (ids < len(self.mask))
        found = np.zeros(len(ids), np.bool_)
        found[known] = self.mask[ids[known]]
        return found


class PyCallbackIDSelector(IDSelector):
    """Asks a function, id by id."""

    def __init__(self, callback: Callable[[int], bool]) -> None:
        self.callback = callback

    def __call__(self, ids: Integers) -> Booleans:
        return np.fromiter((bool(self.callback(int(i))) for i in ids), np.bool_, len(ids))


class IDSelectorTranslated(IDSelector):
    """Places of an index with ids of its own, chosen by those ids."""

    def __init__(self, mapped: Any, sel: IDSelector) -> None:
        self.id_map, self.sel = np.asarray(getattr(mapped, "id_map", mapped), np.int64), sel

    def __call__(self, ids: Integers) -> Booleans:
        return self.sel(self.id_map[ids])


class IDSelectorAll(IDSelector):
    def __call__(self, ids: Integers) -> Booleans:
        return np.ones(len(ids), np.bool_)


@dataclass
class IDSelectorNot(IDSelector):
    sel: IDSelector

    def __call__(self, ids: Integers) -> Booleans:
        return ~self.sel(ids)


@dataclass
class _Pair(IDSelector):
    lhs: IDSelector
    rhs: IDSelector


class IDSelectorAnd(_Pair):
    def __call__(self, ids: Integers) -> Booleans:
        return self.lhs(ids) & self.rhs(ids)


class IDSelectorOr(_Pair):
    def __call__(self, ids: Integers) -> Booleans:
        return self.lhs(ids) | self.rhs(ids)


class IDSelectorXOr(_Pair):
    def __call__(self, ids: Integers) -> Booleans:
        return self.lhs(ids) ^ self.rhs(ids)


def selector(which: Any) -> IDSelector:
    """A selector, or the ids of an array."""
    return which if isinstance(which, IDSelector) else IDSelectorBatch(which)


@dataclass
class SearchParameters:
    sel: IDSelector | None = None


@dataclass
class SearchParametersPQ(SearchParameters):
    search_type: int = 0
    polysemous_ht: int = 0


@dataclass
class SearchParametersIVF(SearchParameters):
    nprobe: int = 1
    max_codes: int = 0
    max_lists_num: int = 0  # of the fast scan, which is not there
    ensure_topk_full: bool = False
    max_empty_result_buckets: int = 0
    quantizer_params: SearchParameters | None = None
    inverted_list_context: Any = None


IVFSearchParameters = SearchParametersIVF


@dataclass
class SearchParametersPreTransform(SearchParameters):
    index_params: SearchParameters | None = None


@dataclass
class IndexRefineSearchParameters(SearchParameters):
    k_factor: float = 1.0
    base_index_params: SearchParameters | None = field(default=None)
