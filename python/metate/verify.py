"""Checks operators on this machine: every declared case, and configurations drawn from a seed, against float64.

A drawn configuration also lies in awkward memory: odd offsets, permuted and padded strides, NaN in every gap.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

import metate
from metate.op import Args, Op


@dataclass(frozen=True)
class Check:
    """One call to make: case `number` of the declaration, or the configuration drawn from seed `number`."""

    op: Op
    device: str
    backend: str
    dtype: torch.dtype
    number: int
    drawn: bool

    @property
    def reproduction(self) -> str:
        """The command that runs this check again, and only this."""
        which = f"--seed {self.number}" if self.drawn else f"--case {self.number}"
        name = str(self.dtype).removeprefix("torch.")
        command = f"metate verify --op {self.op.name} --backend {self.backend} --dtype {name} {which}"
        return command if self.device == "cpu" else f"{command} --device {self.device}"

    def inputs(self) -> Args:
        if not self.drawn:
            return self.op.example(self.op.domain.cases[self.number], self.dtype, self.device)
        rng = Random(self.number)
        args = self.op.example(self.op.domain.draw(rng), self.dtype, self.device, self.number)
        return tuple(scatter(a, rng) if isinstance(a, Tensor) else a for a in args)

    def case(self) -> dict[str, Any]:
        return self.op.domain.draw(Random(self.number)) if self.drawn else self.op.domain.cases[self.number]


@dataclass(frozen=True)
class Result:
    """What came of a check. `refused`: the backend says why it does not run this call."""

    check: Check
    status: str  # passed, refused or failed
    detail: str = ""
    seconds: float = 0.0


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def parity(ops: Iterable[Op], dtypes: Iterable[torch.dtype], where: Iterable[tuple[str, str]]) -> Iterator[Check]:
    """Every declared case of the operators on every (device, backend) that has them."""
    for op, device, backend, taken in _places(ops, dtypes, where):
        for dtype in taken:
            for number in range(len(op.domain.cases)):
                yield Check(op, device, backend, dtype, number, drawn=False)


def fuzz(
    ops: Iterable[Op], dtypes: Iterable[torch.dtype], where: Iterable[tuple[str, str]], count: int, seed: int
) -> Iterator[Check]:
    """`count` configurations of every operator: those of the seeds from `seed` on, one dtype each, on every backend."""
    for op, device, backend, taken in _places(ops, dtypes, where):
        for number in range(seed, seed + count):
            yield Check(op, device, backend, taken[number % len(taken)], number, drawn=True)


def _places(
    ops: Iterable[Op], dtypes: Iterable[torch.dtype], where: Iterable[tuple[str, str]]
) -> Iterator[tuple[Op, str, str, list[torch.dtype]]]:
    """The operators on every (device, backend) that has them, with those of the dtypes that they take, if any."""
    kinds, places = list(dtypes), list(where)
    for op in ops:
        for device, backend in places:
            if backend in op.implementations(device) and (taken := _accepted(op, kinds)):
                yield op, device, backend, taken


def _accepted(op: Op, kinds: list[torch.dtype]) -> list[torch.dtype]:
    """Those that the first argument may be, directly or because the argument that it follows may; whole numbers are the
    same beside every dtype."""
    rules = op.dtypes[next(iter(op.axes))]
    accepted = {dtype for rule in rules for dtype in (op.dtypes[rule] if isinstance(rule, str) else [rule])}
    if not any(isinstance(dtype, torch.dtype) and dtype.is_floating_point for dtype in accepted):
        return kinds[:1]
    return [kind for kind in kinds if kind in accepted]


def run(check: Check) -> Result:
    """Makes the call and compares it with the truth. Nothing raises: an error is a failure."""
    began = time.perf_counter()

    def done(status: str, detail: str = "") -> Result:
        return Result(check, status, detail, time.perf_counter() - began)

    try:
        args = check.inputs()
        reason = check.op.refusal(check.backend, args)
        if reason is not None:
            return done("refused", reason)
        with metate.use(check.backend):
            got = check.op.trial(args)
            check.op.assert_close(got, args)
            if check.drawn and check.backend == "cpu":
                _assert_same(got, check.op.trial(tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)))
    except AssertionError as error:
        return done("failed", str(error))
    except Exception as error:
        return done("failed", f"{type(error).__name__}: {error}")
    return done("passed")


def _assert_same(got: Any, contiguous: Any) -> None:
    """Layout never changes a bit of a CPU result."""
    pairs = zip(got, contiguous, strict=True) if isinstance(got, tuple) else [(got, contiguous)]
    for i, (a, b) in enumerate(pairs):
        a, b = a.flatten().contiguous().view(torch.uint8), b.flatten().contiguous().view(torch.uint8)
        if not torch.equal(a, b):
            raise AssertionError(f"output {i} differs in {int((a != b).sum())} bytes from that of contiguous inputs")


def scatter(tensor: Tensor, rng: Random) -> Tensor:
    """The same values at an odd offset with permuted, padded strides; what lies between them is NaN or very large."""
    order = list(range(tensor.dim()))
    rng.shuffle(order)
    offset, strides, step = rng.choice([0, 1, 3, 8]), [0] * tensor.dim(), 1
    for dim in order:
        strides[dim] = step
        step *= max(tensor.shape[dim], 1) + rng.choice([0, 0, 1, 5])
    gap = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    storage = torch.full((offset + step,), gap, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, strides, offset).copy_(tensor)
