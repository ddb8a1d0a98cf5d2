"""What a search may find, said in any of several ways, lowered once to a bitmap over the rows of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metate.errors import fail
from metate.search.storage import Integers, Lists

# ids; a range of ids; a boolean mask, or a uint8 bitmap (least significant bit first), indexed by id; a predicate over
# an array of ids that returns an array of booleans. Ids that no vector has match nothing.
Filter: TypeAlias = "Sequence[int] | range | npt.NDArray[Any] | Tensor | Callable[[Integers], Any]"


def matching(op: str, lists: Lists, what: Filter) -> Integers:
    """The living rows that a filter lets through."""
    array: Any = what.detach().cpu().numpy() if isinstance(what, Tensor) else what
    if isinstance(array, (list, tuple)):
        array = np.asarray(array) if len(array) else np.zeros(0, np.int64)
        array = array.astype(np.int64) if array.dtype == np.uint8 else array  # only an array is a bitmap
    if isinstance(array, np.ndarray) and array.dtype not in (np.bool_, np.uint8):
        ids = array
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise fail(op, "filter", f"{ids.dtype} of shape {ids.shape}", "one dimension of integer ids")
        rows = lists.find(np.unique(ids.astype(np.int64)))
        found: Integers = rows[rows >= 0]
        return found
    rows = lists.rows()
    ids = lists.ids(rows)
    if isinstance(array, range):
        return rows[_in_range(ids, array)]
    if callable(array):
        return rows[_asked(op, array, ids)]
    if not isinstance(array, np.ndarray):
        raise fail(
            op, "filter", type(what).__name__, "ids, a range, a mask, a bitmap or a function of ids", error=TypeError
        )
    if array.ndim != 1:
        raise fail(op, "filter", f"of shape {array.shape}", "one dimension")
    mask = array if array.dtype == np.bool_ else np.unpackbits(array, bitorder="little").view(np.bool_)
    known = (ids >= 0) & (ids < len(mask))
    inside: Integers = rows[known][mask[ids[known]]]
    return inside


def keep_bitmap(op: str, lists: Lists, what: Filter | None) -> Tensor | None:
    """The rows to look at, a bit for each that scans see; None: all of them."""
    if what is None:
        return lists.kept
    mask = np.zeros(max(lists.capacity, 1), np.bool_)
    mask[matching(op, lists, what)] = True
    return lists.bits(np.packbits(mask, bitorder="little"))


def _in_range(ids: Integers, wanted: range) -> npt.NDArray[np.bool_]:
    if not len(wanted):
        return np.zeros(len(ids), np.bool_)
    low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
    inside: npt.NDArray[np.bool_] = (ids >= low) & (ids <= high) & ((ids - low) % abs(wanted.step) == 0)
    return inside


def _asked(op: str, predicate: Callable[[Integers], Any], ids: Integers) -> npt.NDArray[np.bool_]:
    answer = predicate(ids.copy())
    answer = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    if answer.dtype != np.bool_ or answer.shape != ids.shape:
        got = f"a function that returns {answer.dtype} of shape {answer.shape} for {len(ids)} ids"
        raise fail(op, "filter", got, "one boolean for each id")
    return answer
