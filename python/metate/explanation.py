"""explain and supports: which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metate import backends, library
from metate.backends import BACKENDS, State, within
from metate.errors import fail
from metate.op import Args, Captured, Op


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the others do not."""

    op: str
    backend: str | None
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"metate.{self.op}: " + (f"runs on {self.backend}" if self.backend else "no backend runs this call")]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.refusals.items())])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would run on, and why the others do not; it is not run.

    function: of metate's operators, or one of yours that calls some, of which the first is explained.

    >>> print(metate.explain(metate.attention, q, k, v, causal=True))

    Raises:
        TypeError: the function calls no operator of metate. What is wrong with the arguments, as the call itself would.
    """
    op, call = _first_call(function, args, kwargs)
    op.check(call)
    forced, refusals, chosen = backends.forced(), {}, None
    device = call[0].device.type
    if device != "meta" and any(call[i] is not None for i in op._contents):
        op.contents[1](*call)
    available = op.implementations(device)
    for name in BACKENDS:
        if name not in available:
            refusals[name] = library.unavailable(name, device)
        elif (reason := op.refusal(name, call)) is not None:
            refusals[name] = reason
    for name in available:
        if name not in refusals and chosen is None and forced in (None, name):
            chosen = name
    if forced is not None:
        refusals.update(
            {name: f"only {forced} is allowed" for name in BACKENDS if name != forced and name not in refusals}
        )
    return Explanation(op.name, chosen, refusals)


def _first_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Op, Args]:
    """The operator that a function calls first, and the arguments of that call."""
    got = getattr(function, "__name__", None) or repr(function)[:60]
    cause: Exception | None = None
    if callable(function):
        try:
            with within(State(backends.used(), capture=True)):
                function(*args, **kwargs)
        except Captured as captured:
            return captured.op, captured.call
        except Exception as error:
            if str(getattr(function, "__module__", "")).startswith("metate") or str(error).startswith("metate."):
                raise  # what is wrong with a call of ours
            got, cause = f"{got}, which raised {type(error).__name__}: {error}"[:300], error
    raise fail("explain", "function", got, "a public operator of metate", error=TypeError) from cause


def supports(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether `function(*args, **kwargs)` would run; `explain` tells why not. Never raises for wrong arguments."""
    try:
        return explain(function, *args, **kwargs).backend is not None
    except (TypeError, ValueError, NotImplementedError):
        return False
