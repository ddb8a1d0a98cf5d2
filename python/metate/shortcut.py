"""Shortcut: one direct call of a binding in place of several operators, or of one and the making of its arguments.

Python between small kernels costs more than they do, and so does a tensor that is another in a different shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from metate import library
from metate.backends import is_plain

Args = tuple[Any, ...]


class Shortcut:
    """A binding of csrc/torch that takes the arguments of a function as they are, which makes `operators` direct calls.

    Nothing is checked on this way: a call is taken once all that the operators check of one like it was found right,
    equal in all but the memory and the strides of its tensors.
    """

    def __init__(self, binding: str, operators: int = 1) -> None:
        self.binding, self.operators = binding, operators

    @cached_property
    def _direct(self) -> tuple[library.Direct, ...]:
        return library.direct(self.binding, None)

    def __call__(
        self, args: Args, otherwise: Callable[..., Any], given: Args, backend: str | None = None,
        first_only: bool = False,
    ) -> Any:  # fmt: skip
        """What `otherwise(*given)` gives, which calls the operators: it is called where somebody is to see them."""
        if backend is not None or not is_plain():
            return otherwise(*given)
        for direct in self._direct:
            result = direct.call(args, first_only)
            if result is not NotImplemented:
                return result
        before = library.direct_calls()
        result = otherwise(*given)
        if library.direct_calls() == before + self.operators:  # each was checked before
            for direct in self._direct:
                direct.admit(args)
        return result
