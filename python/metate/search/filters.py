"""What a search may find, said in any of several ways, lowered once to a bitmap over the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metate.errors import fail
from metate.search.storage import Integers, Lists, is_set, set_bits

Booleans: TypeAlias = "npt.NDArray[np.bool_]"

# ids; a range of ids; a boolean mask, or a uint8 bitmap (least significant bit first), indexed by id; a predicate over
# an array of ids that returns an array of booleans, asked about some of them at a time. Ids that no vector has match
# nothing.
Filter: TypeAlias = "Sequence[int] | range | npt.NDArray[Any] | Tensor | Callable[[Integers], Any]"


def matching(op: str, lists: Lists, what: Filter) -> Iterator[Integers]:
    """The living rows that a filter lets through, some at a time: an index may be larger than memory."""
    array: Any = what.detach().cpu().numpy() if isinstance(what, Tensor) else what
    if isinstance(array, (list, tuple)):
        array = np.asarray(array) if len(array) else np.zeros(0, np.int64)
        array = array.astype(np.int64) if array.dtype == np.uint8 else array  # only an array is a bitmap
    if isinstance(array, np.ndarray) and array.dtype not in (np.bool_, np.uint8):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise fail(op, "filter", f"{array.dtype} of shape {array.shape}", "one dimension of integer ids")
        rows = lists.find(np.unique(array.astype(np.int64)))
        yield rows[rows >= 0]
        return
    let_through = _predicate(op, array)
    for rows in lists.row_blocks():
        yield rows[let_through(lists.ids(rows))]


def keep_bitmap(op: str, lists: Lists, what: Filter | None) -> Tensor | None:
    """The rows to look at, a bit for each that scans see; None: all of them."""
    if what is None:
        return lists.kept
    bitmap = np.zeros((max(lists.capacity, 1) + 7) // 8, np.uint8)
    for rows in matching(op, lists, what):
        set_bits(bitmap, rows)
    return lists.bits(bitmap)


def _predicate(op: str, what: Any) -> Callable[[Integers], Booleans]:
    """Which of some ids are let through."""
    if isinstance(what, range):
        return lambda ids: _in_range(ids, what)
    if callable(what):
        return lambda ids: _asked(op, what, ids)
    if not isinstance(what, np.ndarray):
        raise fail(
            op, "filter", type(what).__name__, "ids, a range, a mask, a bitmap or a function of ids", error=TypeError
        )
    if what.ndim != 1:
        raise fail(op, "filter", f"of shape {what.shape}", "one dimension")
    return lambda ids: _in_mask(ids, what)


def _in_mask(ids: Integers, mask: npt.NDArray[Any]) -> Booleans:
    bits = mask.dtype == np.uint8
    inside: Booleans = (ids >= 0) & (ids < len(mask) * (8 if bits else 1))
    known = ids[inside]
    inside[inside] = is_set(mask, known) if bits else mask[known]
    return inside


def _in_range(ids: Integers, wanted: range) -> Booleans:
    if not len(wanted):
        return np.zeros(len(ids), np.bool_)
    low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
    inside: Booleans = (ids >= low) & (ids <= high) & ((ids - low) % abs(wanted.step) == 0)
    return inside


def _asked(op: str, predicate: Callable[[Integers], Any], ids: Integers) -> Booleans:
    answer = predicate(ids.copy())
    answer = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    if answer.dtype != np.bool_ or answer.shape != ids.shape:
        got = f"a function that returns {answer.dtype} of shape {answer.shape} for {len(ids)} ids"
        raise fail(op, "filter", got, "one boolean for each id")
    return answer
