"""Named axes: from "B Sk Hkv D" follow the shape checks of an operator and the errors that name the argument.

An entry is a list of alternatives separated by " or ", each a list of terms separated by blanks. A term is a name (`D`,
bound by the first argument that has it), a number, a name with an exact divisor (`K/2`), with a ceiling divisor
(`Sk//32`, or `Sk//block_n` for a scalar given to `check`), with an addend (`sequences+1`), or any of these followed by
`?`: the size or 1, which broadcasts. Readers are told words instead of letters: (batch, seqlen_k, kv_heads, head_dim).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metate.errors import fail

_TERM = re.compile(r"(?P<name>\w+)(?:(?P<op>//|/|\+)(?P<by>\w+))?(?P<broadcast>\?)?$")


class Axes:
    """The axes of one operator's tensors. `given`: how users name an argument, where that is another name; `words`: how
    they name an axis."""

    def __init__(
        self, op: str, axes: Mapping[str, str], given: Mapping[str, str] | None = None,
        words: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.op = op
        self.given, self.words = dict(given or {}), dict(words or {})
        self.alternatives = {
            name: [[_parse(term) for term in option.split()] for option in text.split(" or ")]
            for name, text in axes.items()
        }

    def text(self, name: str) -> str:
        """The shape of an argument in words."""
        options = (", ".join(self._word(*term) for term in option) for option in self.alternatives[name])
        return " or ".join(f"({option})" for option in options)

    def _word(self, axis: str, operator: str | None, by: str | None, broadcast: bool = False) -> str:
        word = self.words.get(axis, axis)
        if operator == "//":
            word = f"⌈{word} / {by}⌉"
        elif operator:
            word = f"{word} {operator} {by}"
        return f"{word} or 1" if broadcast else word

    def check(self, tensors: Mapping[str, Tensor | None], scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The size of every named axis. ValueError naming the argument whose shape disagrees with those before it."""
        sizes: dict[str, Any] = dict(scalars or {})
        for name, options in self.alternatives.items():
            tensor = tensors.get(name)
            if tensor is not None:
                self._match(name, tensor, options, sizes)
        return sizes

    def _match(self, name: str, tensor: Tensor, options: list[Any], sizes: dict[str, Any]) -> None:
        problem = ""
        for option in options:
            if len(option) == tensor.dim():
                differs = self._disagreement(option, tensor, sizes)
                if not differs:
                    return
                problem = problem or differs
        expected = f"{self.text(name)} with {problem}" if problem else self.text(name)
        raise fail(self.op, self.given.get(name, name), f"of shape {tuple(tensor.shape)}", expected)

    def _disagreement(self, option: list[Any], tensor: Tensor, sizes: dict[str, Any]) -> str:
        bound: dict[str, Any] = {}
        for (axis, operator, by, broadcast), size in zip(option, tensor.shape, strict=True):
            if broadcast and size == 1:
                continue
            if axis.isdigit():
                expected = int(axis)
            else:
                known = sizes.get(axis, bound.get(axis))
                if known is None:
                    bound[axis] = _solve(operator, by, size)
                    continue
                expected = _size(known, operator, int(by) if by and by.isdigit() else max(sizes.get(by, 1), 1))
            if size != expected:
                return f"{self._word(axis, operator, by)} = {expected}"
        sizes.update(bound)
        return ""


def _parse(term: str) -> tuple[str, str | None, str | None, bool]:
    match = _TERM.match(term)
    assert match, term
    return match["name"], match["op"], match["by"], bool(match["broadcast"])


def _size(known: Any, operator: str | None, by: int) -> Any:
    if operator == "/":
        return known // by
    if operator == "//":
        return (known + by - 1) // by
    return known + by if operator == "+" else known


def _solve(operator: str | None, by: str | None, size: Any) -> Any:
    """The axis that a first term binds; a ceiling cannot be undone, so no first term has one."""
    if operator == "/":
        return size * int(by or 1)
    return size - int(by or 0) if operator == "+" else size
