"""What all indexes share: training, adding and removing, each of which makes the next snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate import library
from metate.backends import is_plain
from metate.errors import fail
from metate.op import below_autocast
from metate.ops.pq.declaration import topk_op
from metate.ops.pq.kmeans import fit_centroids, sample_rows
from metate.search.arrays import Array, Vectors, tensor_of
from metate.search.base import Adding, Grown, State
from metate.search.codecs import Model, Product
from metate.search.codecs import Vectors as Raw
from metate.search.filters import Filter, matching
from metate.search.progress import Steps
from metate.search.searching import Searching
from metate.search.storage import Integers, Lists
from metate.search.training import LIST_ITERATIONS, train_rotation

MOST_ID = 2**62
_SAMPLE = 256  # training vectors a centroid


def _ascending_from(first: int, ids: Integers) -> bool:
    """Whether ids ascend from one on that none has reached: they are new, without a look at those that are there."""
    within = first <= ids.item(0) and ids.item(-1) <= MOST_ID
    return within and (len(ids) == 1 or bool((ids[1:] > ids[:-1]).all()))


class Index(Searching):
    """The base of all indexes; make FlatIndex, PQIndex, IVFFlatIndex or IVFPQIndex.

    Any number of threads may search while others add and remove: a search reads one snapshot from beginning to end, and
    a writer makes the next one and puts it in place. Writers wait for each other.
    """

    # Training.

    @torch.no_grad()
    def train(self, x: Array, *, centroids: Array | None = None, progress: bool | None = None) -> None:
        """Fits rotation, centroids and codebooks to a sample of vectors like those to come.

        Args:
            x: (n, dim). At most 256 vectors for each centroid are used, chosen by the index' seed.
            centroids: (nlist, dim) of the lists, where they are known already; behind the rotation, if there is one.
            progress: a bar on stderr; None: where that is a terminal and it takes more than a second.

        Raises:
            TypeError, ValueError: naming the argument; fewer vectors than centroids; NaN and infinity.
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
            rows = torch.arange(len(vectors), device="cpu")
            if len(rows) > _SAMPLE * max(least, 256):
                rows = sample_rows(len(rows), _SAMPLE * max(least, 256), torch.Generator("cpu").manual_seed(self.seed))
            with below_autocast():
                self._state = State(self._fit(vectors.take(rows), known, progress), self._no_rows())

    def _given_centroids(self, op: str, centroids: Any) -> Tensor:
        if self.nlist is None:
            raise fail(op, "centroids", "given", "None: this index has no lists")
        vectors = Vectors(op, "centroids", centroids, self.dim, self.device)
        if len(vectors) != self.nlist:
            raise fail(op, "centroids", f"{len(vectors)} of them", f"{self.nlist}, one for each list")
        return vectors.take(torch.arange(self.nlist, device="cpu"))

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
                model["centroids"] = fit_centroids(
                    x, self.nlist, "sample", LIST_ITERATIONS, self.seed, self.largest, self.largest
                )[0]
                steps.advance()
            among = None if self.metric == "inner_product" else x  # the longest have the largest products anyway
            if isinstance(self.codec, Product) and self.codec.residual:
                x = x - model["centroids"][self._assign(model, x)]
            model.update(self.codec.fit(x, self.seed, steps.advance, among))
        return model

    def set_trained(self, tensors: Mapping[str, Array]) -> None:
        """Takes what training would find, by the names of `trained_shapes()`, from elsewhere: float32 of those shapes.

        Raises:
            TypeError, ValueError: naming the tensor that is absent, of another shape or not finite.
            RuntimeError: the index holds vectors, which are encoded with what it learnt before.
        """
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

        Raises:
            TypeError, ValueError: naming the argument; NaN and infinity. Nothing is added then.
            RuntimeError: the index is not trained.
        """
        if progress or not self._added_quickly(x):
            self._add(self._op("add"), x, None, progress)

    def _added_quickly(self, x: Any, ids: Any = None) -> bool:
        """Where that is compiled: around a single vector, Python costs more than its kernels do."""
        if type(x) is not np.ndarray or not is_plain():
            return False
        if ids is not None and (type(ids) is not np.ndarray or ids.dtype != np.int64 or ids.shape != x.shape[:1]):
            return False
        with self._lock:
            newest = self._newest
            first = newest.next_id
            new = ids is None or (len(ids) > 0 and _ascending_from(first, ids))
            if new and type(newest) is Grown and newest.made is None:
                state, base, adding = None, newest.base, self._adding  # made for the last one
                length: Integers | bytes = newest.length
            else:
                state = base = self._state
                if ids is not None:
                    self._check_new(self._op("add_with_ids"), state, ids)
                    if state.lists.implicit:
                        state = base = replace(state, lists=state.lists.explicit())
                length, adding = base.lists.length, self._adding_to(base.model, base.lists)
            if adding.run is None:
                return False
            wanted = state is not None and state.lists.known_places() is not None
            found = adding.run(x, length, ids, first, None, wanted)
            if found is False:
                return False
            next_id = first + len(x) if ids is None else ids.item(-1) + 1 if new else max(first, int(ids.max()) + 1)
            if type(found) is bytes:
                grown = Grown()
                grown.base, grown.length, grown.next_id, grown.made = base, found, next_id, None
                self._newest = grown
            else:
                state = state or self._state
                self._state = State(state.model, self._with_places(state, x, ids, *found), next_id)
            return True

    def _with_places(self, state: State, x: Any, ids: Integers | None, length: bytes | None, places: bytes) -> Lists:
        """What ends an addition whose lists are known, and with a length its rows too: else lists have no room."""
        old, at, first = state.lists, np.frombuffer(places, np.int64), state.next_id
        if length is None:
            old = old.with_room(np.bincount(at, minlength=len(old.length)))  # which leaves out rows that are gone
            run = self._adding_to(state.model, old).run
            assert run is not None
            done = run(x, old.length, ids, first, places, True)
            assert done, "lists that were made longer have room"
            length, at = done[0], np.frombuffer(done[1], np.int64)
        ids = np.arange(first, first + len(x)) if ids is None else ids
        return old.grown(np.frombuffer(length, np.int64).copy(), at[: len(x)], at[len(x) :], ids)

    def _adding_to(self, model: Model, lists: Lists) -> Adding:
        """The compiled way to add to these rows, where it does what `_add` does."""
        old = self._adding
        if old.start is lists.start and old.columns is lists.columns and old.model is model:
            return old
        run, raw = None, isinstance(self.codec, Raw) and self.codec.storage == "float32"
        plain = self.refine is None and not self.opq and self.metric != "cosine" and self.device.type == "cpu"
        if plain and (raw or isinstance(self.codec, Product)) and model.keys() == self.trained_shapes().keys():
            rows, codebooks, row_bias, *_ = self.codec.stored(model, lists.columns)
            columns = model.get("centroids"), codebooks, rows, lists.columns.get("ids"), row_bias
            extents = torch.from_numpy(lists.start), torch.from_numpy(lists.room)
            residual = isinstance(self.codec, Product) and self.codec.residual
            one = torch.empty(1, 1, dtype=torch.float32, device="cpu")
            like = one, one, *[None] * 5, 1, 0, False
            if old.run is not None or topk_op.plan(like)[0] == "cpu":
                run = library.prepared_add((*columns, *extents, self._metric_number, residual))
        self._adding = Adding(lists.columns, lists.start, model, run)
        return self._adding

    def add_with_ids(self, x: Array, ids: Array, *, progress: bool | None = None) -> None:
        """Adds vectors (n, dim) under ids (n,): integers from 0 on, each new to the index. Raises as `add` does."""
        if not progress and self._added_quickly(x, ids):
            return
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
        if not len(ids) or _ascending_from(state.next_id, ids):
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
        """The list that each vector of (n, dim) goes to, (n) int64; ValueError of an index without lists."""
        op = self._op("assign")
        if self.nlist is None:
            raise fail(op, "the index", "without lists", "one with lists")
        model, lists = self._trained(op).model, [np.zeros(0, np.int64)]
        for _, rows in Vectors(op, "x", x, self.dim, self.device).blocks():
            lists.append(self._assign(model, self._rotated(model, self._scaled(rows))).cpu().numpy())
        return np.concatenate(lists)

    def remove_ids(self, which: Filter, *, renumber: bool = False) -> int:
        """Removes the vectors that a filter lets through (see `search`), and says how many there were.

        Args:
            renumber: the others have the ids 0, 1, 2, … then, in their order, as if just added; of an index without
                lists, for others have no order.
        """
        op = self._op("remove_ids")
        if renumber and self.nlist is not None:
            raise fail(op, "renumber", renumber, "False: this index has lists, and its vectors no order")
        with self._lock:
            state = self._state
            rows = np.concatenate([np.zeros(0, np.int64), *matching(op, state.lists, which)])
            lists, next_id = state.lists.without(rows), state.next_id
            if renumber:
                lists = lists.rebuilt()
                columns = {name: column for name, column in lists.columns.items() if name != "ids"}
                lists, next_id = replace(lists, columns=columns, _cache={}), lists.total
            self._state = State(state.model, lists, next_id)
        return len(rows)

    def reset(self) -> None:
        """Removes all vectors; what was trained stays."""
        with self._lock:
            self._state = State(self._state.model, self._no_rows())

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
