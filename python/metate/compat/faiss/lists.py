"""Rows of an index as faiss shows them: what a list holds, bytes of codes, subsets, lists chosen by the caller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.compat.faiss.parameters import Floats, Vector
from metate.compat.faiss.quantizer import Bytes, as_array
from metate.compat.faiss.selectors import Booleans, Integers, SearchParametersIVF
from metate.search.arrays import empty_results
from metate.search.codecs import Probe, Product
from metate.search.faiss_index import sq_bytes, sq_rows
from metate.search.filters import keep_bitmap
from metate.search.storage import Lists

_AT_ONCE = 1 << 22  # numbers of queries, and results, of lists that are searched at a time


class InvertedLists:
    """The sizes, ids and codes of lists, as they are now."""

    INVALID_CODE_SIZE = 2**64 - 1

    def __init__(self, inner: Any, code_size: int) -> None:
        self._inner = inner
        self.nlist, self.code_size = inner.nlist, code_size

    def list_size(self, number: int) -> int:
        return len(self.get_ids(number))

    def get_ids(self, number: int) -> Any:
        lists = self._inner._state.lists
        return lists.ids(lists.rows(slice(number, number + 1)))

    def get_codes(self, number: int) -> Any:
        return stored(self._inner, self.get_ids(number))[1]

    @property
    def codes(self) -> Vector[Bytes]:
        """The bytes of every list."""
        return Vector(self.get_codes(number).reshape(-1) for number in range(self.nlist))

    def release_ids(self, number: int, ids: Any) -> None:
        """Nothing to do: what `get_ids` and `get_codes` gave are copies."""

    release_codes = release_ids


@dataclass
class ArrayInvertedLists:
    """A copy of some lists."""

    ids: list[Integers]
    codes: list[Bytes]

    @staticmethod
    def of(lists: Any, numbers: Iterable[int]) -> ArrayInvertedLists:
        numbers = list(numbers)
        return ArrayInvertedLists([lists.get_ids(i) for i in numbers], [lists.get_codes(i) for i in numbers])

    @property
    def nlist(self) -> int:
        return len(self.ids)

    def list_size(self, number: int) -> int:
        return len(self.ids[number])

    def get_ids(self, number: int) -> Any:
        return self.ids[number]

    def get_codes(self, number: int) -> Any:
        return self.codes[number]


def with_lists(lists: Integers, codes: Bytes, size: int) -> Bytes:
    """Codes behind the numbers of their lists, in `size` bytes, the lowest first."""
    numbers = np.ascontiguousarray(lists, "<i8").view(np.uint8).reshape(-1, 8)
    return np.hstack([numbers[:, :size], codes])


def without_lists(codes: Any, size: int) -> tuple[Integers, Bytes]:
    """The inverse."""
    rows = np.ascontiguousarray(codes, np.uint8)
    numbers = np.zeros((len(rows), 8), np.uint8)
    numbers[:, :size] = rows[:, :size]
    return numbers.view("<i8")[:, 0].astype(np.int64), rows[:, size:]


def stored(inner: Any, ids: Integers) -> tuple[Integers, Bytes]:
    """The list and the bytes of what is stored under each id; list 0 and zeros for -1."""
    lists, there = inner._state.lists, ids >= 0
    rows = lists.find(ids[there])
    name = "codes" if isinstance(inner.codec, Product) else "vectors"
    found = sq_bytes(lists.columns[name][torch.from_numpy(rows)])
    home, codes = np.zeros(len(ids), np.int64), np.zeros((len(ids), found.shape[1]), np.uint8)
    home[there], codes[there] = (lists.list_of(rows) if len(rows) else rows), found
    return home, codes


def subset(lists: Lists, kind: int, a1: int, a2: int) -> Integers:
    """The rows with ids from a1 to a2 (kind 0), with id % a1 == a2 (1), the a1-th to the a2-th spread over all lists
    (2), the a2-th of a1 parts of every list (3), the lists from a1 to a2 (4)."""
    rows = lists.rows()
    ids = lists.ids(rows)
    home = lists.list_of(rows) if len(rows) else rows
    if kind in (0, 1, 4):
        chosen = ids % a1 == a2 if kind == 1 else (ids >= a1) & (ids < a2) if kind == 0 else (home >= a1) & (home < a2)
        return np.asarray(rows[chosen], np.int64)
    if kind not in (2, 3):
        raise RuntimeError(f"copy_subset_to: subset_type is {kind}, expected 0 to 4")
    sizes = np.bincount(home, minlength=len(lists.length))
    ends = np.cumsum(sizes)
    if kind == 3:
        low, high = sizes * a2 // a1, sizes * (a2 + 1) // a1
    else:
        low, high = (np.diff(ends * a // max(len(rows), 1), prepend=0) for a in (a1, a2))
    place = np.arange(len(rows)) - (ends - sizes)[home]
    return np.asarray(rows[(place >= low[home]) & (place < high[home])], np.int64)


def append(source: Any, lists: Lists, rows: Integers, target: Any, ids: Integers | None) -> None:
    """Rows of one index, of a snapshot of its lists, at the end of another, their codes as they are, under ids, or
    those that come next."""
    same_training("merge_from", source, target)
    home = lists.list_of(rows) if len(rows) else rows
    at = torch.from_numpy(rows).to(source.device)
    values = {name: column[at] for name, column in lists.columns.items() if name != "ids"}
    _extend("merge_from", target, home, values, ids)


def append_codes(target: Any, home: Integers, codes: Bytes, ids: Integers | None) -> None:
    """Rows of bytes at the ends of the lists `home`, under ids, or those that come next."""
    op, codec = "add_sa_codes", target.codec
    if len(home) and not 0 <= home.min() <= home.max() < (target.nlist or 1):
        raise RuntimeError(f"{op}: lists {home.min()} to {home.max()}, expected 0 to {target.nlist - 1}")
    if isinstance(codec, Product):
        values = {"codes": torch.from_numpy(codes.copy())}
        if codec.row_bias:
            model = target._trained(op).model
            values["bias"] = codec.bias(model, values["codes"], model["centroids"][torch.from_numpy(home)])
    else:
        values = {codec.name: sq_rows(codes, codec.columns[codec.name][1])}
        if not bool(values[codec.name].isfinite().all()):
            raise RuntimeError(f"{op}: vectors are not finite everywhere, expected finite numbers")
    _extend(op, target, home, values, ids)


def _extend(op: str, target: Any, home: Integers, values: dict[str, Tensor], ids: Integers | None) -> None:
    with target._lock:
        state = target._trained(op)
        if ids is not None:
            target._check_new(op, state, ids)
        target._state = target._appended(state, home, values, ids)


def same_training(op: str, source: Any, target: Any) -> None:
    theirs, ours = source.trained(), target.trained()
    if source.settings().keys() != target.settings().keys() or any(
        name not in theirs or theirs[name].shape != ours[name].shape or not torch.equal(theirs[name], ours[name])
        for name in target.trained_shapes()
    ):
        raise RuntimeError(f"{op}: the other index is of another kind or training, expected clones of one index")


def preassigned(
    inner: Any, x: Any, probed: Any, distances: Any, k: int, asked: SearchParametersIVF
) -> tuple[Tensor, Tensor]:
    """A search of the lists `probed` (Q, P), -1 for none, at those distances from their centroids."""
    op, state, numbers = "search_preassigned", inner._trained("search_preassigned"), _numbers(inner, probed)
    lists, bias = state.lists, None
    if isinstance(inner.codec, Product) and inner.codec.residual:
        if distances is None:
            raise AssertionError(f"{op}: Dq is None, expected distances, which those of residuals are added to")
        bias = torch.from_numpy(as_array(distances))
    keep = keep_bitmap(op, lists, asked.sel)
    ranges = visited(lists, numbers, keep, k, asked)[0] if asked.max_codes else lists.extents[torch.from_numpy(numbers)]
    probe = Probe(lists.seen, ranges, bias, lists.ids_column(), keep, k)
    found: tuple[Tensor, Tensor] = inner.codec.scan(
        state.model, torch.from_numpy(as_array(x)), probe, inner._scan_metric
    )
    return found


def candidates(inner: Any, x: Floats, rows: Integers, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the rows (Q, C), -1 for none, of an index whose ids are row numbers."""
    state, at = inner._trained("search"), torch.from_numpy(rows)
    probe = Probe(state.lists.seen, torch.stack([at, at + 1], 2), None, None, None, k)
    found: tuple[Tensor, Tensor] = inner.codec.scan(state.model, torch.from_numpy(x), probe, inner._scan_metric)
    return found


def _numbers(inner: Any, probed: Any) -> Integers:
    """The lists that a caller names, -1 for none."""
    numbers: Integers = np.asarray(probed, np.int64)
    if numbers.size and not -1 <= numbers.min() <= numbers.max() < inner.nlist:
        held = f"{numbers.min()} to {numbers.max()}"
        raise RuntimeError(f"search_preassigned: Iq holds {held}, expected -1 to {inner.nlist - 1}")
    return numbers


def of_residuals(
    inner: Any, x: Floats, probed: Any, centroids: Floats, k: int, asked: SearchParametersIVF
) -> tuple[Tensor, Tensor]:
    """The same where rows are vectors less the centroids of their lists: a query less the centroid looks into a list,
    and the best of all its lists are the query's."""
    state, numbers = inner._trained("search_preassigned"), _numbers(inner, probed)
    lists, product = state.lists, inner._scan_metric == "inner_product"
    keep = keep_bitmap("search_preassigned", lists, asked.sel)
    ranges = visited(lists, numbers, keep, k, asked)[0] if asked.max_codes else lists.extents[torch.from_numpy(numbers)]
    found, most = [], max(1, min(k, lists.total))
    together = max(1, _AT_ONCE // max(1, numbers.shape[1] * max(most, x.shape[1])))
    for a in range(0, len(x), together):
        queries = torch.from_numpy(x[a : a + together])[:, None]
        c = torch.from_numpy(centroids[numbers[a : a + together]])
        own = ranges[a : a + together].reshape(-1, 1, 2)
        probe = Probe(lists.seen, own, None, lists.ids_column(), keep, most)
        asking = queries.expand_as(c) if product else queries - c
        distances, ids = inner.codec.scan(state.model, asking.reshape(-1, x.shape[1]), probe, inner._scan_metric)
        if product:
            distances = distances + (queries * c).sum(2).reshape(-1, 1)
        found.append(_best_of_lists(distances.reshape(len(c), -1), ids.reshape(len(c), -1), k, product))
    none = empty_results(0, k)
    return tuple(torch.cat(parts) for parts in zip(none, *found, strict=True))  # type: ignore[return-value]


def _best_of_lists(distances: Tensor, ids: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of each row; of equal ones the lower id."""
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(1)
    distances, ids = distances.gather(1, order), ids.gather(1, order)
    order = distances.argsort(dim=1, descending=largest, stable=True)[:, :k]
    more = 0, k - order.shape[1]
    worst = -torch.inf if largest else torch.inf
    return (
        torch.nn.functional.pad(distances.gather(1, order), more, value=worst),
        torch.nn.functional.pad(ids.gather(1, order), more, value=-1),
    )


def visited(
    lists: Lists, probed: Integers, keep: Tensor | None, k: int, asked: SearchParametersIVF
) -> tuple[Tensor, Integers]:
    """The rows (Q, P, 2) of the lists (Q, P) that are looked at, and how many each query is compared with, of those
    that are kept: max_codes and no more, or, with ensure_topk_full, whole lists until there are so many, and k."""
    kept, living = _count_before(keep, lists.scanned), _count_before(lists.kept, lists.scanned)
    ranges: Tensor = lists.extents[torch.from_numpy(probed)].clone()
    begin, end = ranges.numpy()[..., 0], ranges.numpy()[..., 1]
    most = asked.max_codes or lists.scanned
    left = np.full(len(probed), max(most, k) if asked.ensure_topk_full else most)
    for first, last in zip(begin.T, end.T, strict=True):
        if asked.ensure_topk_full:
            last[left <= 0] = first[left <= 0]
        else:
            wanted = living[first] + np.minimum(living[last] - living[first], left)
            last[:] = np.maximum(first, np.searchsorted(living, wanted))
        left = np.maximum(left - (kept[last] - kept[first]), 0)
    return ranges, (kept[end] - kept[begin]).sum(1)


def _count_before(bits: Tensor | None, rows: int) -> Integers:
    """How many of the rows before each are set, and of all."""
    if bits is None:
        return np.arange(rows + 1)
    return np.append(0, np.unpackbits(bits.numpy(), bitorder="little")[:rows].cumsum(dtype=np.int64))


def before_empty(inner: Any, probed: Integers, lims: Integers, ids: Integers, most: int) -> tuple[Booleans, Booleans]:
    """Which results of a range search are found, and which of the lists `probed` (Q, P) are looked into, where it ends
    after `most` lists in turn without any."""
    lists, queries = inner._state.lists, len(probed)
    query = np.repeat(np.arange(queries), np.diff(lims))
    home = lists.list_of(lists.find(ids)) if len(ids) else ids
    hits, looked = np.zeros((queries, inner.nlist), np.bool_), np.ones(probed.shape, np.bool_)
    hits[query, home] = True
    turn = np.zeros(queries, np.int64)
    for q, p in np.ndindex(probed.shape):
        looked[q, p] = turn[q] < most
        if not looked[q, p]:
            hits[q, probed[q, p]] = False
        elif hits[q, probed[q, p]]:
            turn[q] = 0
        else:
            turn[q] += 1
    stays: Booleans = hits[query, home]
    return stays, looked
