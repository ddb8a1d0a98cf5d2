"""How every index is searched: a scan of the rows of one snapshot, and what is made of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metate import library
from metate.backends import is_plain
from metate.errors import fail
from metate.op import below_autocast
from metate.ops.pq import topk_distances
from metate.ops.pq.declaration import ivf_op
from metate.scalars import is_whole, plain
from metate.search.arrays import FLOAT32, Array, Vectors, empty_results, tensor_of
from metate.search.base import Base, State
from metate.search.codecs import Probe, Product
from metate.search.codecs import Vectors as Raw
from metate.search.filters import Filter, keep_bitmap
from metate.search.storage import Integers

_MOST_RESULTS = 1 << 31  # of a query
_QUERIES = 1 << 24  # numbers of the tables, and of the vectors to refine, of the queries that are searched at a time


class _Listed(NamedTuple):
    """A snapshot of lists as `ivf_search` takes it."""

    stored: tuple[Tensor | None, ...]
    n: int
    metric: int
    residual: bool
    quick: int  # queries that may be searched as they come, at most
    run: Callable[..., bool] | None  # of numpy arrays (queries, distances, ids, nprobe): csrc/torch/pq/arrays.cpp


class Searching(Base):
    """Reads one snapshot from beginning to end, whatever writers do meanwhile."""

    def search(
        self, queries: Array, k: int, *, nprobe: int | None = None, filter: Filter | None = None,
        refine_factor: int = 4,
    ) -> tuple[Any, Any]:  # fmt: skip
        """The k nearest vectors of every query.

        Args:
            queries: (Q, dim), or (dim,) for one.
            k: how many; there may be fewer in the index.
            nprobe: lists to look into, of an index that has lists; default: `index.nprobe`.
            filter: what may be found: ids (a list, an integer array), a range of ids, a boolean mask or a uint8 bitmap
                indexed by id, or a function from an array of ids, some at a time, to an array of booleans. Ids that no
                vector has match nothing, and ids behind the end of a mask are out.
            refine_factor: of an index with refinement: k × refine_factor candidates are ranked by their full vectors.

        Returns:
            (distances, ids), each (Q, k) or (k,), best first, of equal ones the lower id; numpy for numpy. Distances
            are squared (metric "l2"), or products or cosines, of which larger is better. What is not there has id -1 at
            +inf (-inf).

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
            RuntimeError: the index is not trained.
        """
        op = self._op("search")
        if not is_whole(plain(refine_factor), 1, 1 << 62):
            raise fail(op, "refine_factor", repr(refine_factor), "an integer from 1 on")
        state = self._trained(op)
        if filter is None:
            quick = self._searched_quickly(state, queries, k, self.nprobe if nprobe is None else nprobe)
            if quick is not None:
                return quick
        vectors, k, nprobe = self._checked_search(op, queries, k, nprobe)
        keep = keep_bitmap(op, state.lists, filter)
        most = min(k, max(state.lists.total, 1))  # kernels and refinement need not look for more than there are
        found = [
            self._search(state, x, most, nprobe, keep, int(refine_factor))
            for _, x in vectors.blocks(self._at_once(most))
        ]
        if not found:
            found = [empty_results(0, most)]
        distances, ids = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        return vectors.results(*((distances, ids) if most == k else self._padded(distances, ids, k)))

    def _padded(self, distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """With what says that nothing more is there."""
        more = 0, k - ids.shape[1]
        worst = -torch.inf if self.largest else torch.inf
        return torch.nn.functional.pad(distances, more, value=worst), torch.nn.functional.pad(ids, more, value=-1)

    def _searched_quickly(self, state: State, queries: Any, k: Any, nprobe: Any) -> tuple[Any, Any] | None:
        """The plain search of lists, or None: around a single query, Python costs more than its kernels do."""
        listed: _Listed | None = state.cache.get("listed")
        if (
            listed is None or listed.run is None or type(queries) is not np.ndarray or queries.ndim != 2
            or queries.dtype is not FLOAT32 or not queries.flags.carray or not 0 < len(queries) <= listed.quick
            or type(k) is not int or not 0 < k < _MOST_RESULTS or type(nprobe) is not int or not is_plain()
        ):  # fmt: skip
            return None
        distances, ids = np.empty((len(queries), k), FLOAT32), np.empty((len(queries), k), np.int64)
        # Nothing is found for a query that is not finite.
        return (distances, ids) if listed.run(queries, distances, ids, nprobe) else None

    def _checked_search(self, op: str, queries: Any, k: int, nprobe: int | None) -> tuple[Vectors, int, int]:
        k = plain(k)
        if not is_whole(k, 1, _MOST_RESULTS - 1):
            raise fail(op, "k", repr(k), "an integer from 1 on, up to 2**31 - 1")
        chosen = plain(self.nprobe if nprobe is None else nprobe)
        if self.nlist is None and nprobe is not None:
            raise fail(op, "nprobe", repr(nprobe), "None: this index has no lists")
        if not is_whole(chosen, 1, self.nlist or 1):
            raise fail(op, "nprobe", repr(chosen), f"an integer from 1 to {self.nlist}, the number of lists")
        return Vectors(op, "queries", queries, self.dim, self.device, single=True), k, chosen

    def _at_once(self, k: int) -> int:
        """Queries to search in one call of the kernels."""
        each = self.codec.M << self.codec.bits if isinstance(self.codec, Product) else self.dim
        if self.refine is not None:
            each = max(each, 4 * k * self.dim)
        return max(1, _QUERIES // each)

    def _search(
        self, state: State, x: Tensor, k: int, nprobe: int, keep: Tensor | None, factor: int
    ) -> tuple[Tensor, Tensor]:
        x = self._scaled(x)
        ids = state.lists.ids_column() if self.refine is None else None
        wide = k if self.refine is None else min(k * factor, max(state.lists.total, 1))
        distances, found = self._scan(state, x, wide, nprobe, keep, ids, self.codec)
        if self.refine is None:
            return distances, found
        return self._refined(state, x, found, k)

    def _scan(
        self, state: State, x: Tensor, k: int, nprobe: int, keep: Tensor | None, ids: Tensor | None,
        codec: Raw | Product,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """By a codec's columns; ids, or rows where none are given."""
        lists, rotated = state.lists, self._rotated(state.model, x)
        if self.nlist is not None and codec is self.codec:
            listed = self._listed(state)
            found: tuple[Tensor, Tensor] = ivf_op(
                rotated, *listed.stored, ids, keep, listed.n, nprobe, k, listed.metric, listed.residual
            )
            return found
        ranges = None
        if self.nlist is not None:
            probed = topk_distances(rotated, state.model["centroids"], nprobe, metric=self._scan_metric)[1]
            ranges = lists.extents[probed]
        probe = Probe(lists.seen, ranges, None, ids, keep, k)
        return codec.scan(state.model, rotated if codec is self.codec else x, probe, self._scan_metric)

    def _listed(self, state: State) -> _Listed:
        """What `ivf_search` is told of a snapshot, made once."""
        if "listed" not in state.cache:
            columns = state.lists.seen
            rows, codebooks, *beside = self.codec.stored(state.model, columns)
            if codebooks is not None:  # tables are made of the same number of many centroids at once
                codebooks = codebooks.mT.contiguous().mT
            plain = self.refine is None and not self.opq and self.metric != "cosine" and self.device.type == "cpu"
            stored = state.model["centroids"], state.lists.extents[:-1], rows, codebooks, *beside
            kept, n = (state.lists.ids_column(), state.lists.kept), len(next(iter(columns.values())))
            residual = isinstance(self.codec, Product) and self.codec.residual
            run = _prepared(*stored, *kept, n, self._metric_number, residual) if plain else None
            state.cache["listed"] = _Listed(stored, n, self._metric_number, residual, self._at_once(1), run)
        listed: _Listed = state.cache["listed"]
        return listed

    def _refined(self, state: State, x: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of candidate rows (Q, C) by their full vectors: each is a range, and none where there is none."""
        assert self.refine is not None
        ranges = torch.stack([rows, rows + 1], 2)
        probe = Probe(state.lists.seen, ranges, None, state.lists.ids_column(), None, k)
        return self.refine.scan(state.model, x, probe, self._scan_metric)

    @torch.no_grad()
    def range_search(
        self, queries: Array, radius: float, *, nprobe: int | None = None, filter: Filter | None = None
    ) -> tuple[Any, Any, Any]:
        """All vectors nearer than a radius: squared distance below it, product or cosine above it.

        An index with refinement compares the full vectors of all rows that it looks at.

        Returns:
            (lims, distances, ids): those of query q, best first, lie from lims[q] to lims[q + 1].

        Raises: as `search` does.
        """
        op = self._op("range_search")
        vectors, _, nprobe = self._checked_search(op, queries, 1, nprobe)
        radius = plain(radius)
        if not isinstance(radius, (int, float)) or radius != radius:
            raise fail(op, "radius", repr(radius), "a number")
        state = self._trained(op)
        keep = keep_bitmap(op, state.lists, filter)
        counts, distances, ids = [], [], []
        for _, x in vectors.blocks(self._at_once(256)):
            for near, found in self._within(state, x, float(radius), nprobe, keep):
                counts.append(len(near))
                distances.append(near)
                ids.append(found)
        lims, none = torch.tensor([0, *counts], device="cpu").cumsum(0), empty_results(0)
        vectors.single = False  # lists of results have no row to be taken out
        return vectors.results(lims, torch.cat([none[0], *distances]), torch.cat([none[1], *ids]))

    def _within(
        self, state: State, x: Tensor, radius: float, nprobe: int, keep: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For every query, those within: more and more are asked for until the last one is outside."""
        x = self._scaled(x)
        codec, ids = self.refine or self.codec, state.lists.ids_column()
        results = [empty_results(0)] * len(x)
        open_, k = torch.arange(len(x), device="cpu"), 64
        while len(open_):
            distances, found = self._scan(state, x[open_.to(x.device)], k, nprobe, keep, ids, codec)
            inside = (distances > radius if self.largest else distances < radius) & (found >= 0)
            full = inside[:, -1].cpu() & (k < state.lists.total)
            for at in (~full).nonzero()[:, 0].tolist():
                results[int(open_[at])] = distances[at][inside[at]], found[at][inside[at]]
            open_, k = open_[full], min(8 * k, max(state.lists.total, 1))
        return results

    @torch.no_grad()
    def reconstruct(self, ids: int | Array) -> Any:
        """The vectors of ids, (n, dim) or (dim,) for one, as the index knows them; torch for a tensor of ids.

        Raises:
            KeyError: the index has no such id. TypeError, ValueError: ids are no integers in a row.
        """
        op, state = self._op("reconstruct"), self._trained(self._op("reconstruct"))
        tensor = tensor_of(op, "ids", np.asarray(ids) if not isinstance(ids, Tensor) else ids)
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool or tensor.dim() > 1:
            raise fail(op, "ids", f"{tensor.dtype} of shape {tuple(tensor.shape)}", "an integer or a row of them")
        wanted = tensor.cpu().numpy().astype(np.int64).reshape(-1)
        rows = state.lists.find(wanted)
        if len(rows) and rows.min() < 0:
            raise fail(op, "ids", f"holding {wanted[rows < 0][0]}", "ids in the index", error=KeyError)
        x = self._decoded(state, rows)
        x = x[0] if tensor.dim() == 0 else x
        return x if isinstance(ids, Tensor) else x.cpu().numpy()

    def _decoded(self, state: State, rows: Integers) -> Tensor:
        at = torch.from_numpy(rows).to(self.device)
        columns = {name: column[at] for name, column in state.lists.columns.items()}
        if self.refine is not None:
            return self.refine.decode(state.model, columns)
        x = self.codec.decode(state.model, columns)
        if isinstance(self.codec, Product) and self.codec.residual and len(rows):
            x = x + state.model["centroids"][torch.from_numpy(state.lists.list_of(rows)).to(self.device)]
        with below_autocast():
            return x @ state.model["rotation"] if self.opq else x


def _prepared(*args: Any) -> Callable[..., bool] | None:
    """The compiled search of a snapshot, where it is what `ivf_search` would run."""
    *tensors, n, metric, residual = args
    if not is_plain() or ivf_op.plan((tensors[0][:1], *tensors, n, 1, 1, metric, residual))[0] != "cpu":
        return None
    return library.prepared_search(args)
