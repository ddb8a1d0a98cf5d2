"""How every refusal reads: the operator, the argument, what came, what was expected."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from metate.scalars import plain


class FormatError(ValueError):
    """A file or a serialised state that does not hold what its format promises."""


def fail(op: str, argument: str, got: object, expected: str, *, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise: `metate.attention: q is float8, expected float32, bfloat16 or float16`.

    A dtype shows its bare name, however it came.
    """
    return error(_DTYPE.sub("", f"metate.{op}: {argument} is {got}, expected {expected}"))


_DTYPE = re.compile(r"\btorch\.(?=bool\b|b?float\d|u?int\d|complex\d)")


def require_package(route: str, name: str, wanted: str) -> None:
    """ModuleNotFoundError where a package that a part of metate reaches into is missing; `wanted` as pip takes it."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"metate.{route}: {name} is not installed; `pip install '{wanted}'`")


def require_dense(op: str, argument: str, x: object, expected: str = "a torch.Tensor") -> None:
    """TypeError where x is no tensor, or one whose numbers do not stand in one array: nested or sparse."""
    if not isinstance(x, Tensor):
        raise fail(op, argument, type(x).__name__, expected, error=TypeError)
    if x.is_nested:
        raise fail(op, argument, "a nested tensor", "a dense one; pass its values()", error=TypeError)
    if x.layout != torch.strided:
        raise fail(op, argument, x.layout, "a dense tensor; use .to_dense()", error=TypeError)


def require_choice(op: str, argument: str, value: object, allowed: Collection[str]) -> None:
    """ValueError where the value is none of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise fail(op, argument, repr(value)[:60], " or ".join(map(repr, allowed)))


def require_flag(op: str, argument: str, value: object) -> bool:
    """The value as a bool; TypeError where it is none, for anything else would count as True."""
    if type(value) is bool:
        return value
    found = plain(value)
    if not isinstance(found, int):
        raise fail(op, argument, repr(value)[:60], "True or False", error=TypeError)
    return bool(found)


def renamed(error: Exception, op: str, function: str, names: Mapping[str, str]) -> Exception:
    """What `op` found wrong, told of the function that users called and of its arguments; other errors as they are."""
    head, own, rest = str(error).partition(f"metate.{op}: ")
    argument = _ARGUMENT.match(rest)
    if head or not own or not argument:
        return error
    name = argument.group()
    return type(error)(f"metate.{function}: {names.get(name, name)}{rest[len(name) :]}")


def require_number(op: str, argument: str, value: object) -> float:
    """The value as a float; TypeError where it is no number, ValueError where it is not finite."""
    number = plain(value)
    if not isinstance(number, (int, float)):
        raise fail(op, argument, repr(value)[:60], "a number", error=TypeError)
    if not -_MOST <= number <= _MOST:  # compilers take no isfinite of a number that they do not know
        raise fail(op, argument, repr(value)[:60], "a finite number")
    return float(number)


_ARGUMENT = re.compile(r"\w+")
_MOST = torch.finfo(torch.float64).max
