"""Numbers of other libraries (numpy's, fractions) as Python's own, which kernels, compilers and files take."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

PLAIN = frozenset({int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool})


def plain(value: Any) -> Any:
    """The Python number that equals `value`; what is no number comes back as it is."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def is_whole(value: Any, least: float = -float("inf"), most: float = float("inf")) -> bool:
    """Whether it is an integer of Python within bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
