"""What every index is made of: its settings, what training finds, and the newest snapshot of its rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metate.errors import fail
from metate.ops.pq import METRICS, topk_distances
from metate.search.codecs import Model, Product
from metate.search.codecs import Vectors as Raw
from metate.search.interleaved import Column
from metate.search.storage import Integers, Lists

REFINE = "refine"  # the column of full vectors beside codes


@dataclass(frozen=True)
class State:
    """One snapshot: what training found, the rows, and the id that `add` gives next."""

    model: Model
    lists: Lists
    next_id: int = 0
    cache: dict[str, Any] = field(default_factory=dict, init=False)  # what searches make of the rest

    def __reduce__(self) -> tuple[type[State], tuple[Model, Lists, int]]:
        return State, (self.model, self.lists, self.next_id)


class Grown:
    """The next snapshot, after rows were written behind the lists of one: made whole for whoever looks at it."""

    __slots__ = "base", "length", "made", "next_id"

    base: State
    length: bytes
    next_id: int
    made: State | None

    def state(self) -> State:
        if self.made is None:
            lists = replace(self.base.lists, length=np.frombuffer(self.length, np.int64).copy(), _cache={})
            self.made = State(self.base.model, lists, self.next_id)
        return self.made


class Adding(NamedTuple):
    """The compiled way to add to these columns, where there is one (csrc/torch/pq/arrays.cpp)."""

    columns: Mapping[str, Column]
    start: Integers | None
    model: Model
    run: Callable[..., Any] | None


class Base:
    """Settings and state; searching.py and index.py add what is done with them."""

    def __init__(
        self, dim: int, metric: str, codec: Raw | Product, *, nlist: int | None = None, opq: bool = False,
        refine: str | None = None, seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.dim, self.metric, self.codec = dim, metric, codec
        self.nlist, self.opq, self.seed = nlist, opq, seed
        self.refine = None if refine is None else Raw(dim, refine, REFINE)
        self.device = torch.device(device)
        self.nprobe = 1
        self._lock = threading.Lock()
        self._state = State({}, self._no_rows())
        self._adding = Adding({}, None, {}, None)

    @property
    def _state(self) -> State:
        newest = self._newest
        return newest if isinstance(newest, State) else newest.state()

    @_state.setter
    def _state(self, state: State) -> None:
        self._newest: State | Grown = state

    def __getstate__(self) -> dict[str, Any]:
        """For copies, by `copy.deepcopy` and between processes: of one snapshot, with rows and a lock of their own."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_adding")}
        return kept | {"_newest": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._adding = Adding({}, None, {}, None)

    def __copy__(self) -> Base:
        return copy.deepcopy(self)  # two indexes that share rows would write the same ones

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
        return self.metric in ("inner_product", "cosine")

    @property
    def _scan_metric(self) -> str:
        return "inner_product" if self.largest else self.metric

    @property
    def _metric_number(self) -> int:
        """Of `_scan_metric`, as operators have it."""
        return METRICS[self._scan_metric]

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
        if "trained" not in state.cache:
            if not self._is_trained(state):
                raise fail(op, "the index", "not trained", "trained: call train(x) first", error=RuntimeError)
            state.cache["trained"] = True
        return state

    def _assign(self, model: Model, x: Tensor) -> Tensor:
        return topk_distances(x, model["centroids"], 1, metric=self._scan_metric)[1][:, 0]

    def _scaled(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x) if self.metric == "cosine" else x

    def _rotated(self, model: Model, x: Tensor) -> Tensor:
        """In float64, so that a row does not depend on how many rows are rotated with it."""
        return (x.double() @ model["rotation"].double().T).float() if self.opq else x
