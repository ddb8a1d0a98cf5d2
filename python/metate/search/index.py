"""What all indexes share: training, adding, removing and searching, over snapshots that writers replace."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.errors import fail
from metate.ops.pq import kmeans, topk_distances
from metate.search.arrays import Array, Vectors, tensor_of
from metate.search.codecs import Model, Probe, Product
from metate.search.codecs import Vectors as Raw
from metate.search.filters import Filter, keep_bitmap, matching, torch_bits
from metate.search.interleaved import first_rows
from metate.search.progress import Steps
from metate.search.storage import Integers, Lists
from metate.search.training import train_rotation

METRICS = ("l2", "inner_product", "cosine")
MOST_ID = 2**62
_SAMPLE = 256  # training vectors a centroid
_QUERIES = 1 << 24  # numbers of the tables, and of the vectors to refine, of the queries that are searched at a time
_REFINE = "refine"  # the column of full vectors beside codes


@dataclass(frozen=True)
class State:
    """One snapshot: what training found, the rows, and the id that `add` gives next."""

    model: Model
    lists: Lists
    next_id: int = 0


class Index:
    """The base of all indexes; make FlatIndex, PQIndex, IVFFlatIndex or IVFPQIndex.

    Any number of threads may search while others add and remove: a search reads one snapshot from beginning to end, and
    a writer makes the next one and puts it in place. Writers wait for each other.
    """

    def __init__(
        self, dim: int, metric: str, codec: Raw | Product, *, nlist: int | None = None, opq: bool = False,
        refine: str | None = None, seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.dim, self.metric, self.codec = dim, metric, codec
        self.nlist, self.opq, self.seed = nlist, opq, seed
        self.refine = None if refine is None else Raw(dim, refine, _REFINE)
        self.device = torch.device(device)
        self.nprobe = 1
        self._lock = threading.Lock()
        self._state = State({}, self._no_rows())

    # What it is.

    @property
    def ntotal(self) -> int:
        return self._state.lists.total

    def __len__(self) -> int:
        return self.ntotal

    @property
    def next_id(self) -> int:
        """The id that `add` gives next."""
        return self._state.next_id

    @property
    def is_trained(self) -> bool:
        return self._is_trained(self._state)

    @property
    def largest(self) -> bool:
        """Whether the best "distance" is the largest: it is a product or a cosine."""
        return self.metric != "l2"

    @property
    def _scan_metric(self) -> str:
        return "inner_product" if self.largest else "l2"

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that training finds."""
        shapes = dict(self.codec.trained)
        if self.opq:
            shapes["rotation"] = self.dim, self.dim
        if self.nlist is not None:
            shapes["centroids"] = self.nlist, self.dim
        if self.refine is not None:
            shapes.update(self.refine.trained)
        return shapes

    def column_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes of a row and dtypes of what is kept for each vector."""
        refined = {} if self.refine is None else self.refine.columns
        return {**self.codec.columns, **refined, **({} if self.nlist is None else {"ids": ((), torch.int64)})}

    def _no_rows(self) -> Lists:
        columns = {
            name: torch.empty((0, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.column_types().items()
        }
        return Lists.empty(self.nlist or 1, self.codec.laid_out(columns))

    def _is_trained(self, state: State) -> bool:
        return all(name in state.model for name in self.trained_shapes())

    def _op(self, method: str) -> str:
        return f"search.{type(self).__name__}.{method}"

    def _trained(self, op: str) -> State:
        state = self._state
        if not self._is_trained(state):
            raise fail(op, "the index", "not trained", "trained: call train(x) first", error=RuntimeError)
        return state

    # Training.

    @torch.no_grad()
    def train(self, x: Array, *, centroids: Array | None = None, progress: bool | None = None) -> None:
        """Fits rotation, centroids and codebooks to a sample of vectors like those to come.

        Args:
            x: (n, dim). At most 256 vectors for each centroid are used, chosen by the index' seed.
            centroids: (nlist, dim) of the lists, where they are known already; behind the rotation, if there is one.
            progress: a bar on stderr; None: where that is a terminal and it takes more than a second.

        Raises:
            RuntimeError: the index holds vectors, which are encoded with what it learnt before.
        """
        op = self._op("train")
        vectors = Vectors(op, "x", x, self.dim, self.device)
        lists = 0 if centroids is not None else self.nlist or 0
        least = max(self.codec.least, lists, 0 if self.refine is None else self.refine.least)
        if len(vectors) < least:
            raise fail(op, "x", f"{len(vectors)} vectors", f"at least {least}: one for each centroid")
        known = {} if centroids is None else {"centroids": self._given_centroids(op, centroids)}
        with self._lock:
            if self._state.lists.total:
                raise fail(op, "the index", f"holding {self.ntotal} vectors", "empty: reset() it", error=RuntimeError)
            rows = torch.arange(len(vectors))
            if len(rows) > _SAMPLE * max(least, 256):
                generator = torch.Generator().manual_seed(self.seed)
                rows = torch.randperm(len(rows), generator=generator)[: _SAMPLE * max(least, 256)].sort().values
            self._state = State(self._fit(vectors.take(rows), known, progress), self._no_rows())

    def _given_centroids(self, op: str, centroids: Any) -> Tensor:
        if self.nlist is None:
            raise fail(op, "centroids", "given", "None: this index has no lists")
        vectors = Vectors(op, "centroids", centroids, self.dim, self.device)
        if len(vectors) != self.nlist:
            raise fail(op, "centroids", f"{len(vectors)} of them", f"{self.nlist}, one for each list")
        return vectors.take(torch.arange(self.nlist))

    def _fit(self, x: Tensor, known: Model, progress: bool | None) -> dict[str, Tensor]:
        """What training finds beside what is known."""
        x = self._scaled(x)
        model = dict(known)
        turns = 20 if self.opq else 0
        M = self.codec.M if isinstance(self.codec, Product) else 0
        with Steps("training", turns + M + (self.nlist is not None), progress) as steps:
            if self.refine is not None:
                model.update(self.refine.fit(x, self.seed, steps.advance))
            if self.opq and isinstance(self.codec, Product):
                model["rotation"] = train_rotation(x, M, self.codec.bits, self.seed, turns, steps.advance)
                x = x @ model["rotation"].T
            if self.nlist is not None and "centroids" not in model:
                model["centroids"] = kmeans(x, self.nlist, seed=self.seed, spherical=self.largest)[0]
                steps.advance()
            if isinstance(self.codec, Product) and self.codec.residual:
                x = x - model["centroids"][self._assign(model, x)]
            model.update(self.codec.fit(x, self.seed, steps.advance))
        return model

    def set_trained(self, tensors: Mapping[str, Array]) -> None:
        """Takes what training would find, by the names of `trained_shapes()`, from elsewhere."""
        op, model = self._op("set_trained"), {}
        for name, shape in self.trained_shapes().items():
            if name not in tensors:
                raise fail(op, "tensors", f"without {name!r}", f"{', '.join(self.trained_shapes())}")
            tensor = tensor_of(op, name, tensors[name]).to(self.device, torch.float32).contiguous().clone()
            if tensor.shape != shape:
                raise fail(op, name, f"of shape {tuple(tensor.shape)}", f"{shape}")
            if not bool(tensor.isfinite().all()):
                raise fail(op, name, "not finite everywhere", "finite numbers")
            model[name] = tensor
        with self._lock:
            if self._state.lists.total:
                raise fail(op, "the index", f"holding {self.ntotal} vectors", "empty: reset() it", error=RuntimeError)
            self._state = State(model, self._no_rows())

    def trained(self) -> dict[str, Tensor]:
        """What `set_trained` takes."""
        return dict(self._state.model)

    # Adding and removing.

    def add(self, x: Array, *, progress: bool | None = None) -> None:
        """Adds vectors (n, dim), with the ids that follow the largest one so far; 0, 1, 2, … where none was given.

        They are read, checked and encoded some at a time, so x may be a memory-mapped array.
        """
        self._add(self._op("add"), x, None, progress)

    def add_with_ids(self, x: Array, ids: Array, *, progress: bool | None = None) -> None:
        """Adds vectors (n, dim) under ids (n,): integers from 0 on, each new to the index."""
        op = self._op("add_with_ids")
        numbers = tensor_of(op, "ids", np.asarray(ids) if isinstance(ids, (list, tuple, range)) else ids)
        if numbers.dtype.is_floating_point or numbers.dtype == torch.bool or numbers.dim() != 1:
            raise fail(op, "ids", f"{numbers.dtype} of shape {tuple(numbers.shape)}", "one dimension of integers")
        self._add(op, x, numbers.cpu().numpy().astype(np.int64), progress)

    @torch.no_grad()
    def _add(self, op: str, x: Any, ids: Integers | None, progress: bool | None) -> None:
        vectors = Vectors(op, "x", x, self.dim, self.device)
        if ids is not None and len(ids) != len(vectors):
            raise fail(op, "ids", f"{len(ids)} ids", f"{len(vectors)}, one for each vector")
        with self._lock:
            state = self._trained(op)
            if ids is not None:
                self._check_new(op, state, ids)
            lists, values = self._encode(state.model, vectors, progress)
            self._state = self._appended(state, lists, values, ids)

    def _check_new(self, op: str, state: State, ids: Integers) -> None:
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() > MOST_ID:
            got = ids.min() if ids.min() < 0 else ids.max()
            raise fail(op, "ids", f"holding {got}", f"0 to {MOST_ID}; -1 marks what is not found")
        ordered = np.sort(ids)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice) and ordered[0] < state.next_id:
            twice = ids[state.lists.find(ids) >= 0]
        if len(twice):
            raise fail(op, "ids", f"holding {twice[0]} twice or again", "ids new to the index; remove_ids() them first")

    def _appended(self, state: State, lists: Integers, values: dict[str, Tensor], ids: Integers | None) -> State:
        rows = state.lists if ids is None else state.lists.explicit()
        if ids is None:
            ids = np.arange(state.next_id, state.next_id + len(lists))
        if not rows.implicit:
            values["ids"] = torch.from_numpy(ids).to(self.device)
        next_id = max(state.next_id, int(ids.max()) + 1) if len(ids) else state.next_id
        return State(state.model, rows.append(lists, values), next_id)

    def _encode(self, model: Model, vectors: Vectors, progress: bool | None) -> tuple[Integers, dict[str, Tensor]]:
        """The list and the columns of every vector, made a block at a time."""
        lists = np.zeros(len(vectors), np.int64)
        values = {
            name: torch.empty((len(vectors), *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.column_types().items()
        }
        with Steps("adding", len(vectors), progress) as steps:
            for part, x in vectors.blocks():
                x = self._scaled(x)
                columns = {} if self.refine is None else self.refine.encode(model, x)
                x = self._rotated(model, x)
                columns.update(self._coded(model, x, lists[part]))
                for name, column in columns.items():
                    values[name][part] = column
                steps.advance(len(x))
        return lists, values

    def _coded(self, model: Model, x: Tensor, lists: Integers) -> dict[str, Tensor]:
        """The codec's columns; writes the lists."""
        centroids = None
        if self.nlist is not None:
            assigned = self._assign(model, x)
            lists[:] = assigned.cpu().numpy()
            if len(lists) and lists.min() < 0:
                raise fail(self._op("add"), "x", "huge in places", "numbers whose squared distances float32 can hold")
            if isinstance(self.codec, Product) and self.codec.residual:
                centroids = model["centroids"][assigned]
                return self.codec.encode(model, x - centroids, centroids)
        return self.codec.encode(model, x)

    @torch.no_grad()
    def assign(self, x: Array) -> Integers:
        """The list that each vector of (n, dim) goes to."""
        op = self._op("assign")
        if self.nlist is None:
            raise fail(op, "the index", "without lists", "one with lists")
        model, lists = self._trained(op).model, [np.zeros(0, np.int64)]
        for _, rows in Vectors(op, "x", x, self.dim, self.device).blocks():
            lists.append(self._assign(model, self._rotated(model, self._scaled(rows))).cpu().numpy())
        return np.concatenate(lists)

    def _assign(self, model: Model, x: Tensor) -> Tensor:
        return topk_distances(x, model["centroids"], 1, metric=self._scan_metric)[1][:, 0]

    def _scaled(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x) if self.metric == "cosine" else x

    def _rotated(self, model: Model, x: Tensor) -> Tensor:
        """In float64, so that a row does not depend on how many rows are rotated with it."""
        return (x.double() @ model["rotation"].double().T).float() if self.opq else x

    def remove_ids(self, which: Filter) -> int:
        """Removes the vectors that a filter lets through (see `search`), and says how many there were."""
        op = self._op("remove_ids")
        with self._lock:
            state = self._state
            rows = matching(op, state.lists, which)
            self._state = replace(state, lists=state.lists.without(rows))
        return len(rows)

    def renumber(self) -> None:
        """Gives the vectors of an index without lists the ids 0, 1, 2, … in their order, as if just added."""
        if self.nlist is not None:
            raise fail(self._op("renumber"), "the index", "one of lists", "one without: its vectors have an order")
        with self._lock:
            state = self._state
            lists = state.lists.rebuilt()
            columns = {name: column for name, column in lists.columns.items() if name != "ids"}
            lists = replace(lists, columns=columns, _cache={})
            self._state = State(state.model, lists, lists.total)

    def reset(self) -> None:
        """Removes all vectors; what was trained stays."""
        with self._lock:
            self._state = State(self._state.model, self._no_rows())

    # Searching.

    @torch.no_grad()
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
                indexed by id, or a function from an array of ids to an array of booleans.
            refine_factor: of an index with refinement: k × refine_factor candidates are ranked by their full vectors.

        Returns:
            (distances, ids), each (Q, k) or (k,), best first, of equal ones the lower id; numpy for numpy. Distances
            are squared (metric "l2"), or products or cosines, of which larger is better. What is not there has id -1 at
            +inf (-inf).
        """
        op = self._op("search")
        vectors, k, nprobe = self._checked_search(op, queries, k, nprobe)
        if not isinstance(refine_factor, int) or refine_factor < 1:
            raise fail(op, "refine_factor", refine_factor, "an integer from 1 on")
        state = self._trained(op)
        keep = torch_bits(keep_bitmap(op, state.lists, filter), self.device)
        found = [self._search(state, x, k, nprobe, keep, refine_factor) for _, x in vectors.blocks(self._at_once(k))]
        if not found:
            return vectors.results(torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))
        return vectors.results(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _checked_search(self, op: str, queries: Any, k: int, nprobe: int | None) -> tuple[Vectors, int, int]:
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
            raise fail(op, "k", k, "an integer from 1 on")
        chosen = self.nprobe if nprobe is None else nprobe
        if self.nlist is None and nprobe is not None:
            raise fail(op, "nprobe", nprobe, "None: this index has no lists")
        if not isinstance(chosen, (int, np.integer)) or not 1 <= chosen <= (self.nlist or 1):
            raise fail(op, "nprobe", chosen, f"an integer from 1 to {self.nlist}, the number of lists")
        return Vectors(op, "queries", queries, self.dim, self.device, single=True), int(k), int(chosen)

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
        wide = k if self.refine is None else min(k * factor, max(k, state.lists.total))
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
        ranges = bias = None
        if self.nlist is not None:
            bias, probed = topk_distances(rotated, state.model["centroids"], nprobe, metric=self._scan_metric)
            start, length = torch.from_numpy(lists.start)[probed.cpu()], torch.from_numpy(lists.length)[probed.cpu()]
            ranges = torch.stack([start, start + length], 2).to(self.device)
            bias = bias if isinstance(codec, Product) and codec.residual else None
        columns = {name: first_rows(column, lists.scanned) for name, column in lists.columns.items()}
        keep = None if keep is None else keep[: (lists.scanned + 7) // 8]
        probe = Probe(columns, ranges, bias, ids, keep, k)
        return codec.scan(state.model, rotated if codec is self.codec else x, probe, self._scan_metric)

    def _refined(self, state: State, x: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of candidate rows (Q, C) by their full vectors."""
        distances = self._exact(state, x, rows)
        ids = state.lists.ids_column()
        if ids is not None and len(ids):
            rows = torch.where(rows < 0, rows, ids[rows.clamp_min(0)])
        order = rows.argsort(dim=1, stable=True)
        distances, rows = distances.gather(1, order), rows.gather(1, order)
        order = distances.argsort(dim=1, stable=True, descending=self.largest)[:, :k]
        return distances.gather(1, order), rows.gather(1, order)

    def _exact(self, state: State, x: Tensor, rows: Tensor) -> Tensor:
        assert self.refine is not None
        missing = rows < 0
        if not len(state.lists.columns[_REFINE]):
            return torch.full(rows.shape, -torch.inf if self.largest else torch.inf, device=x.device)
        stored = {_REFINE: state.lists.columns[_REFINE][rows.clamp_min(0)]}
        candidates = self.refine.decode(state.model, stored)
        if self.largest:
            return candidates.mul_(x[:, None]).sum(2).masked_fill_(missing, -torch.inf)
        return (candidates - x[:, None]).square_().sum(2).masked_fill_(missing, torch.inf)

    @torch.no_grad()
    def range_search(
        self, queries: Array, radius: float, *, nprobe: int | None = None, filter: Filter | None = None
    ) -> tuple[Any, Any, Any]:
        """All vectors nearer than a radius: squared distance below it, product or cosine above it.

        An index with refinement compares the full vectors of all rows that it looks at.

        Returns:
            (lims, distances, ids): those of query q, best first, lie from lims[q] to lims[q + 1].
        """
        op = self._op("range_search")
        vectors, _, nprobe = self._checked_search(op, queries, 1, nprobe)
        if not isinstance(radius, (int, float, np.floating)) or radius != radius:
            raise fail(op, "radius", radius, "a number")
        state = self._trained(op)
        keep = torch_bits(keep_bitmap(op, state.lists, filter), self.device)
        counts, distances, ids = [], [], []
        for _, x in vectors.blocks(self._at_once(256)):
            for near, found in self._within(state, x, float(radius), nprobe, keep):
                counts.append(len(near))
                distances.append(near)
                ids.append(found)
        lims = torch.tensor([0, *counts]).cumsum(0)
        none = torch.empty(0), torch.empty(0, dtype=torch.int64)
        vectors.single = False  # lists of results have no row to be taken out
        return vectors.results(lims, torch.cat([none[0], *distances]), torch.cat([none[1], *ids]))

    def _within(
        self, state: State, x: Tensor, radius: float, nprobe: int, keep: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For every query, those within: more and more are asked for until the last one is outside."""
        x = self._scaled(x)
        codec, ids = self.refine or self.codec, state.lists.ids_column()
        results: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(x)
        open_, k = torch.arange(len(x)), 64
        while len(open_):
            distances, found = self._scan(state, x[open_.to(x.device)], k, nprobe, keep, ids, codec)
            inside = (distances > radius if self.largest else distances < radius) & (found >= 0)
            full = inside[:, -1].cpu() if k < state.lists.total else torch.zeros(len(open_), dtype=torch.bool)
            for at in (~full).nonzero()[:, 0].tolist():
                results[int(open_[at])] = distances[at][inside[at]], found[at][inside[at]]
            open_, k = open_[full], min(8 * k, max(state.lists.total, 1))
        return results

    @torch.no_grad()
    def reconstruct(self, ids: int | Array) -> Any:
        """The vectors of ids, (n, dim) or (dim,) for one, as the index knows them; torch for a tensor of ids."""
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
        return x @ state.model["rotation"] if self.opq else x

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; `metate.search.load` reads it."""
        from metate.search.files import save

        save(self, path)

    def settings(self) -> dict[str, Any]:
        """The arguments that make such an index, empty."""
        raise NotImplementedError

    def __repr__(self) -> str:
        lists = "" if self.nlist is None else f", nlist={self.nlist}"
        return f"{type(self).__name__}(dim={self.dim}, metric={self.metric!r}{lists}, ntotal={self.ntotal})"
