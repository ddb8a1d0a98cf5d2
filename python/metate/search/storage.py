"""Rows of an index in lists, as immutable snapshots over shared memory.

One pool of rows serves all lists. Each list owns an extent of the pool, contiguous, a multiple of 32 rows, with room at
its end. A snapshot says where the extents lie and how long the lists are; rows behind those lengths belong to no
snapshot, so adding writes there in place while older snapshots are being read, and publishes new lengths. A list that
outgrows its extent moves to a larger one at the end of the pool; when the pool is full everything moves to a new pool:
adding costs amortised O(rows added). Removing clears bits in a copy of a bitmap; when a quarter of the rows is dead
they are dropped.

Only the newest snapshot may be extended: two that extend the same one would write the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate import library
from metate.search.interleaved import Column, empty_like, first_rows, whole_blocks

Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]

_ALIGN = 32  # rows; whole bytes of a bitmap, and whole blocks of interleaved codes
_MOVED = 1 << 18  # rows that are copied at a time
_SMALL = 1 << 21  # bytes for which a list alone has room where it must move
_OFFSET = 40  # bits of a place that count rows within a list


def spans(start: Integers, length: Integers) -> Integers:
    """The rows start[i] … start[i] + length[i] - 1 of every i, one after another."""
    ends = np.cumsum(length)
    rows: Integers = np.repeat(start - (ends - length), length)
    rows += np.arange(len(rows))
    return rows


def _aligned(rows: Any) -> Any:
    return -(-rows // _ALIGN) * _ALIGN


def is_set(bitmap: Bits, rows: Integers) -> npt.NDArray[np.bool_]:
    set_: npt.NDArray[np.bool_] = (bitmap[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 != 0
    return set_


def set_bits(bitmap: Bits, rows: Integers) -> None:
    np.bitwise_or.at(bitmap, rows >> 3, np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8)))


def _clear(bitmap: Bits, rows: Integers) -> None:
    np.bitwise_and.at(bitmap, rows >> 3, ~np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8)))


class Places:
    """id -> list and offset in it, as sorted runs of falling size, the newest last; never changed once made."""

    def __init__(self, runs: tuple[tuple[Integers, Integers], ...] = ()) -> None:
        self.runs = runs

    def plus(self, ids: Integers, places: Integers) -> Places:
        """With more of them; runs of like size are merged, so that there are few."""
        order = np.argsort(ids, kind="stable")
        run, older = (ids[order], places[order]), list(self.runs)
        while older and 2 * len(run[0]) >= len(older[-1][0]):
            ids, places = (np.concatenate(pair) for pair in zip(older.pop(), run, strict=True))
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
            newest = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, bool)
            run = ids[newest], places[order][newest]
        return Places((*older, run))

    def find(self, ids: Integers) -> Integers:
        """The newest place of each id, -1 where it has none."""
        found = np.full(len(ids), -1, np.int64)
        for known, places in reversed(self.runs):
            if len(known):
                at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
                found = np.where((found < 0) & (known[at] == ids), places[at], found)
        return found


@dataclass(frozen=True)
class Lists:
    """One snapshot. Columns are (capacity, …) tensors; "ids" is absent while ids are row numbers (one list alone)."""

    columns: Mapping[str, Column]
    start: Integers
    length: Integers
    room: Integers
    used: int  # rows of the pool that extents have had
    capacity: int
    live: Bits | None = None  # over the pool; rows that nobody has used yet count as alive
    dead: int = 0
    mapped: bool = False  # columns lie in a file, and what takes memory for each row is not made of them
    _cache: dict[str, Places] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Lists], tuple[Any, ...]]:
        """For copies: without the cache, which searches write meanwhile."""
        own = self.columns, self.start, self.length, self.room, self.used, self.capacity, self.live, self.dead
        return Lists, own

    @staticmethod
    def empty(count: int, prototypes: Mapping[str, Column]) -> Lists:
        """No rows in `count` lists; a prototype is a column of no rows."""
        none = np.zeros(count, np.int64)
        return Lists(prototypes, none, none, none, 0, 0)

    @staticmethod
    def packed(length: Integers, columns: Mapping[str, Column], mapped: bool = False) -> Lists:
        """Lists that lie one after another without room, as a file has them."""
        total = int(length.sum())
        return Lists(columns, np.cumsum(length) - length, length, length, total, total, mapped=mapped)

    @property
    def total(self) -> int:
        return int(self.length.sum()) - self.dead

    @property
    def scanned(self) -> int:
        """The rows before this one hold all lists; where there is one list, nothing else."""
        return int(self.length[0]) if len(self.length) == 1 else self.used

    @cached_property
    def extents(self) -> Tensor:
        """(lists + 1, 2): the first row of a list and the one behind its last. List -1 has no rows."""
        ends = np.stack([self.start, self.start + self.length], 1)
        return torch.from_numpy(np.concatenate([ends, np.zeros((1, 2), np.int64)])).to(self.device)

    @cached_property
    def kept(self) -> Tensor | None:
        """The living rows among those that scans see, a bit each; None: all of them."""
        return self.bits(self.live)

    def bits(self, bitmap: Bits | None) -> Tensor | None:
        """A bitmap over the pool as scans take it."""
        return None if bitmap is None else torch.from_numpy(bitmap[: (self.scanned + 7) // 8]).to(self.device)

    @property
    def device(self) -> torch.device:
        return next(iter(self.columns.values())).device

    @cached_property
    def seen(self) -> dict[str, Column]:
        """The columns as scans see them."""
        return {name: first_rows(column, self.scanned) for name, column in self.columns.items()}

    @property
    def implicit(self) -> bool:
        """Whether ids are row numbers."""
        return "ids" not in self.columns

    def rows(self, lists: slice = slice(None)) -> Integers:
        """Rows that are alive, list by list."""
        rows = spans(self.start[lists], self.length[lists])
        return rows if self.live is None else rows[is_set(self.live, rows)]

    def row_blocks(self) -> Iterator[Integers]:
        """The same, some at a time."""
        ends = np.cumsum(self.length)
        begins = ends - self.length
        for a in range(0, int(self.length.sum()), _MOVED):
            held = slice(int(np.searchsorted(ends, a, "right")), int(np.searchsorted(begins, a + _MOVED)))
            low, high = (np.clip(at[held], a, a + _MOVED) for at in (begins, ends))
            rows = spans(self.start[held] + low - begins[held], high - low)
            yield rows if self.live is None else rows[is_set(self.live, rows)]

    def ids_column(self) -> Tensor | None:
        """The ids of the rows that scans see; None: row numbers."""
        column = self.seen.get("ids")
        return column if isinstance(column, Tensor) else None

    def ids(self, rows: Integers) -> Integers:
        ids = self.ids_column()
        if ids is None:
            return rows
        return ids[torch.from_numpy(rows).to(ids.device)].cpu().numpy()

    def list_of(self, rows: Integers) -> Integers:
        """The list that each row lies in."""
        held = np.flatnonzero(self.room)
        order = held[np.argsort(self.start[held])]
        return order[np.searchsorted(self.start[order], rows, side="right") - 1]

    def find(self, ids: Integers) -> Integers:
        """The row of each id, -1 where there is none."""
        if self.implicit:
            rows = np.where((ids >= 0) & (ids < self.length[0]), ids, -1)
        elif self.mapped and self.known_places() is None:
            return self._looked_up(ids)
        else:
            places = self._places().find(ids)
            rows = np.where(places < 0, -1, self.start[places >> _OFFSET] + (places & ((1 << _OFFSET) - 1)))
        if self.live is not None and len(rows):
            rows = np.where((rows >= 0) & is_set(self.live, np.maximum(rows, 0)), rows, -1)
        return rows

    def _looked_up(self, ids: Integers) -> Integers:
        """The same, by reading all ids."""
        wanted, back = np.unique(ids, return_inverse=True)
        found = np.full(len(wanted), -1, np.int64)
        for rows in self.row_blocks() if len(wanted) else ():
            known = self.ids(rows)
            at = np.minimum(np.searchsorted(wanted, known), len(wanted) - 1)
            here = wanted[at] == known
            found[at[here]] = rows[here]
        looked_up: Integers = found[back]
        return looked_up

    def _places(self) -> Places:
        """Made when first asked for, kept up to date from then on."""
        if "places" not in self._cache:
            rows = self.rows()
            self._cache["places"] = Places().plus(self.ids(rows), self._place(rows))
        return self._cache["places"]

    def _place(self, rows: Integers) -> Integers:
        lists = self.list_of(rows) if len(rows) else rows
        return (lists << _OFFSET) + rows - self.start[lists]

    def append(self, lists: Integers, values: Mapping[str, Tensor]) -> Lists:
        """The next snapshot, with row i of the values in lists[i]. Only for the newest snapshot."""
        count = np.bincount(lists, minlength=len(self.start)).astype(np.int64)
        new = self.with_room(count)
        order = np.argsort(lists, kind="stable")
        rows = np.empty(len(lists), np.int64)
        rows[order] = spans(new.start + new.length, count)
        at = torch.from_numpy(rows)
        for name, column in new.columns.items():
            if len(count) == 1:
                begin = int(new.start[0] + new.length[0])
                column[begin : begin + len(rows)] = values[name]
            else:
                column.index_copy_(0, at.to(column.device), values[name])
        cache = {}
        if (known := new.known_places()) is not None:
            cache["places"] = known.plus(values["ids"].cpu().numpy(), new._place(rows))
        return replace(new, length=new.length + count, _cache=cache)

    def grown(self, length: Integers, lists: Integers, rows: Integers, ids: Integers) -> Lists:
        """The next snapshot, after rows were written behind lists that had room."""
        cache = {}
        if (known := self.known_places()) is not None:
            cache["places"] = known.plus(ids, (lists << _OFFSET) + rows - self.start[lists])
        return replace(self, length=length, _cache=cache)

    def known_places(self) -> Places | None:
        """Where ids lie, if that was asked for: to be kept up to date."""
        return None if self.implicit else self._cache.get("places")

    def with_room(self, count: Integers) -> Lists:
        """The same rows, with room for so many more in each list."""
        need = self.length + count
        over = np.flatnonzero(need > self.room)
        if not len(over):
            return self
        first = self.used == 0
        room = _aligned(need[over] if first else 2 * need[over])
        if self.used + int(room.sum()) > self.capacity:
            return self.rebuilt(count, tight=first)
        start, rooms = self.start.copy(), self.room.copy()
        start[over] = self.used + np.cumsum(room) - room
        rooms[over] = room
        moved = replace(self, start=start, room=rooms, used=self.used + int(room.sum()))
        _copy_lists(self.columns, self.start[over], self.length[over], self.columns, start[over])
        if self.live is not None:  # in place: these bits belong to no snapshot yet
            source, target = spans(self.start[over], self.length[over]), spans(start[over], self.length[over])
            _clear(self.live, target[~is_set(self.live, source)])
        return moved

    def _spare(self, rows: Any) -> Any:
        """How many more rows than so many a pool has: a CPU gives memory to those that are written."""
        return rows if self.device.type == "cpu" else rows // 4

    def _spare_alone(self, rows: Any) -> Any:
        """The same where one list has the pool."""
        small = _SMALL // sum(math.prod(c.shape[1:]) * c.dtype.itemsize for c in self.columns.values())
        return self._spare(np.maximum(rows, small)) if self.device.type == "cpu" else self._spare(rows)

    def rebuilt(self, count: Integers | int = 0, tight: bool = False) -> Lists:
        """The living rows in a new pool, with room for `count` more in each list; `tight`: and for no others."""
        length = self.living()
        need = length + count
        alone = len(need) == 1
        room = _aligned(need if tight else need + (self._spare_alone(need) if alone else need))
        used = int(room.sum())
        capacity = used if tight or alone else used + int(_aligned(self._spare(used) // 2))
        columns = {name: empty_like(column, capacity) for name, column in self.columns.items()}
        start = np.cumsum(room) - room
        if self.dead:
            _copy_rows(self.columns, self.rows(), columns, spans(start, length))
        else:
            _copy_lists(self.columns, self.start, length, columns, start)
        kept = self._cache if not self.dead else {}  # offsets hold where no row was dropped
        return Lists(columns, start, length, room, used, capacity, _cache=dict(kept))

    def explicit(self) -> Lists:
        """With a column of ids."""
        if not self.implicit:
            return self
        ids = torch.arange(self.capacity, dtype=torch.int64, device=self.device)
        return replace(self, columns={**self.columns, "ids": ids}, _cache={})

    def without(self, rows: Integers) -> Lists:
        """The next snapshot, in which these rows, alive until now, are dead."""
        if not len(rows):
            return self
        new = self.explicit()
        live = np.full(-(-self.capacity // 8), 255, np.uint8) if self.live is None else self.live.copy()
        _clear(live, rows)
        new = replace(new, live=live, dead=self.dead + len(rows), _cache=dict(new._cache))
        return new.rebuilt() if 4 * new.dead > int(new.length.sum()) else new

    def living(self) -> Integers:
        """How many rows of each list are alive."""
        if self.live is None:
            return self.length
        length = np.zeros_like(self.length)
        for rows in self.row_blocks():
            length += np.bincount(self.list_of(rows), minlength=len(length))
        return length

    def packed_blocks(self, name: str) -> Iterator[Tensor]:
        """The living rows of a column, list by list, some at a time."""
        column = self.columns[name]
        for rows in self.row_blocks():
            yield column[torch.from_numpy(rows).to(column.device)]


def _copy_lists(
    source: Mapping[str, Column], start: Integers, length: Integers, target: Mapping[str, Column], to: Integers
) -> None:
    """Lists that begin at `start` to where they will begin: whole blocks where all begin with one."""
    if ((start | to) % _ALIGN).any() or any(len(c) % _ALIGN for c in (*source.values(), *target.values())):
        _copy_rows(source, spans(start, length), target, spans(to, length))
        return
    first, then, blocks = start // _ALIGN, to // _ALIGN, -(-length // _ALIGN)
    numbers = [torch.from_numpy(each) for each in (then, first, blocks)]
    for name, column in source.items():
        here, there = whole_blocks(column), whole_blocks(target[name])
        if here.device.type != "cpu" or not library.copy_lists((there, here, *numbers)):
            _copy_rows({name: here}, spans(first, blocks), {name: there}, spans(then, blocks))


def _copy_rows(source: Mapping[str, Column], rows: Integers, target: Mapping[str, Column], to: Integers) -> None:
    for a in range(0, len(rows), _MOVED):
        for name, column in source.items():
            here, there = (torch.from_numpy(at[a : a + _MOVED]).to(column.device) for at in (rows, to))
            target[name].index_copy_(0, there, column.index_select(0, here))
