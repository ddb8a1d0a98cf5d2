"""What files say, read strictly: JSON into checked numbers and names, tensors of checked dtype and shape.

Nothing from a file is executed, looked up as an attribute or compiled; every complaint is a FormatError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.op import below_autocast

_BLOCK = 1 << 20  # weights that a conversion unpacks at a time
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def on_cpu(make: Callable[_Given, Tensor]) -> Callable[_Given, Tensor]:
    """Of tensors that are kept: made on the CPU for any use, whatever device and mode are set at the first."""

    @wraps(make)
    def made(*args: _Given.args, **kwargs: _Given.kwargs) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*args, **kwargs)

    return made


def in_own_dtypes(run: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Autocast changes no dtype in it."""

    @wraps(run)
    def ran(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        with below_autocast():
            return run(*args, **kwargs)

    return ran


def complain(argument: str, got: object, expected: str, op: str = "load_quantized") -> FormatError:
    """The FormatError to raise."""
    error = fail(op, argument, _short(got), expected, error=FormatError)
    assert isinstance(error, FormatError)
    return error


def parse_json(data: bytes, what: str, limit: int = 2 << 20) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes."""
    if len(data) > limit:
        raise complain(what, f"{len(data)} bytes", f"at most {limit}")
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise complain(what, f"not JSON ({error})", "a JSON object") from None
    if not isinstance(parsed, dict):
        raise complain(what, type(parsed).__name__, "a JSON object")
    return parsed


@dataclass(frozen=True)
class Settings:
    """A JSON object whose members are read by kind and range. `what` names it in errors."""

    what: str
    values: Mapping[str, Any]

    def integer(self, name: str, default: int | None, least: int, most: int) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise complain(f"{self.what} {name}", value, f"an integer from {least} to {most}")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, int) and abs(value) < 2**63:
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise complain(f"{self.what} {name}", value, "a finite number")
        return value

    def flag(self, name: str, default: bool | None) -> bool | None:
        value = self.values.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise complain(f"{self.what} {name}", value, "true or false")
        return value

    def text(self, name: str, default: str | None, *allowed: str) -> str | None:
        """One of `allowed`, where any are given; letters compare without case."""
        value = self.values.get(name, default)
        if value is None:
            return None
        if not isinstance(value, str):
            raise complain(f"{self.what} {name}", value, "a string")
        value = value.lower()
        if allowed and value not in allowed:
            raise complain(f"{self.what} {name}", value, " or ".join(allowed))
        return value

    def section(self, name: str) -> Settings:
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise complain(f"{self.what} {name}", type(value).__name__, "an object")
        return Settings(f"{self.what} {name}", value)

    def group_size(self, columns: int, *names: str) -> int:
        """The first name that is given: -1 means one group a row. Default: one group."""
        for name in names:
            if self.values.get(name) is not None:
                size = self.integer(name, None, -1, 2**31)
                if size == 0:
                    raise complain(f"{self.what} {name}", 0, "-1 or 1 and more")
                return max(1, columns) if size == -1 else size
        return max(1, columns)


def take(
    tensors: Mapping[str, Tensor], name: str, *dtypes: torch.dtype, shape: tuple[int | None, ...] | None = None
) -> Tensor:
    """A tensor of the state: present, of one of the dtypes, of the shape (None: any size)."""
    tensor = tensors.get(name)
    if tensor is None:
        raise complain(name, "missing", "a tensor")
    if tensor.dtype not in dtypes:
        raise complain(name, tensor.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if shape is not None:
        fits = len(shape) == tensor.dim() and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise complain(
                name, f"shape {tuple(tensor.shape)}", f"({', '.join('any' if s is None else str(s) for s in shape)})"
            )
    return tensor


def blocks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows, each of about a million weights, so that a conversion unpacks no whole layer."""
    step = max(1, _BLOCK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def json_bytes(members: Mapping[str, Any]) -> Tensor:
    """A JSON object as a tensor of bytes, as safetensors files hold one beside a weight."""
    return torch.tensor(list(json.dumps(members).encode()), dtype=torch.uint8, device="cpu")


def as_bytes(tensor: Tensor) -> Tensor:
    """The little-endian bytes of a tensor, the last dimension grown accordingly."""
    tensor = tensor.contiguous()
    if tensor.stride(-1) != 1:  # of one element, and then contiguous with any stride
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.view(torch.uint8)


def _short(got: object) -> object:
    text = str(got)
    return text if len(text) <= 100 else f"{text[:100]}…"
