"""The backends, and which of them calls may run on: what the environment, `use` and `explain` say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from torch.compiler import is_dynamo_compiling

from metate import library
from metate.errors import require_choice

BACKENDS = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class State:
    """What `use` and `explain` set for the calls of this thread or task."""

    backend: str | None = None
    capture: bool = False


current: ContextVar[State | None] = ContextVar("metate", default=None)


@contextlib.contextmanager
def within(state: State | None) -> Iterator[None]:
    token = current.set(state)
    try:
        yield
    finally:
        current.reset(token)


def on(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Context in which calls run on a backend; on None as without it."""
    return within(State(backend)) if backend else contextlib.nullcontext()


@dataclass
class Traced:
    """What `use` says to a compiler, which knows no context variables."""

    backend: str | None = None


traced = Traced()


def used() -> str | None:
    """The backend that `use` names."""
    state = current.get()
    return state.backend if state else None


def forced() -> str | None:
    """The only backend that may run, if `use` or the environment names one."""
    return used() or library.requested_backend()


def is_plain() -> bool:
    """Whether nothing but the environment says how operators run, and no compiler looks on."""
    return not is_dynamo_compiling() and current.get() is None


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Allow one backend only, in this thread or task: `with metate.use("triton"): ...`

    backend: "cpu", "cuda", "triton" or "reference". On a CPU "cuda" is an emulator and "triton" its interpreter, where
    they were built or asked for; both are for tests.

    Raises:
        ValueError: for another name. Calls that the backend does not run raise NotImplementedError and say why.
    """
    require_choice("use", "backend", backend, BACKENDS)
    if not is_dynamo_compiling():
        with within(State(backend)):
            yield
        return
    before, traced.backend = traced.backend, backend
    try:
        yield
    finally:
        traced.backend = before
