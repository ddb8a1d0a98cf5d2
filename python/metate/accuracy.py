"""How near the float64 truth the results of an operator are, and how near they must be: see `Op.assert_close`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


def assert_close(op: Any, got: Any, args: Args) -> None:
    dtype = args[0].dtype
    truth = _comparable(op.compute(torch.float64, args))
    kinds = [g.dtype for g in (got if isinstance(got, tuple) else (got,))]
    results = _comparable(got if isinstance(got, tuple) else (got,))
    named = dict(zip(op.parameters, args, strict=False))
    names = [name for name in op.outputs if not op.writes or named[name] is not None]
    for name, g, t in zip(names, results, truth, strict=True):
        if g.shape != t.shape:
            raise AssertionError(f"{op.name}: {name} has shape {tuple(g.shape)}, expected {tuple(t.shape)}")
    for name, g, t in zip(names, results, _with_overflow(op, args, results, truth), strict=True):
        if not torch.equal(t.isfinite(), g.isfinite()):
            raise AssertionError(f"{op.name}: {name} is finite where the truth is not, or the reverse")
    errors = _distances(results, truth)
    tiny = torch.finfo(torch.float32).tiny if dtype != torch.float64 else 0.0  # kernels may flush what is smaller
    roundings = 4 if dtype == torch.float64 else 1  # there the truth is rounded too
    ulps = [
        roundings * torch.finfo(kind).eps * size + tiny
        if kind.is_floating_point
        else float(kind.itemsize == 1)  # a code beside a tie; other integers are exact
        for kind, size in zip(kinds, _distances(truth), strict=True)
    ]
    budgets = [0.0] * len(errors)
    for more in _errors_of_torch(op, dtype, args, truth):
        budgets = [max(pair) for pair in zip(budgets, more, strict=True)]
        if all(e <= 2 * b + ulp for e, b, ulp in zip(errors, budgets, ulps, strict=True)):
            return
    raise AssertionError(
        f"{op.name}: {', '.join(names)} are off by {_numbers(errors)}; torch in {dtype} by "
        f"{_numbers(budgets)}, one ulp is {_numbers(ulps)}"
    )


def _with_overflow(op: Any, args: Args, results: Sequence[Tensor], truth: Args) -> Args:
    """The truth, without what is beyond float32, in which kernels compute, or beyond the dtype of a result."""
    if all(torch.equal(t.isfinite(), g.isfinite()) for g, t in zip(results, truth, strict=True)):
        return truth
    narrow = _comparable(op.compute(torch.float32, args))
    return tuple(
        torch.where(n.to(g.dtype).isfinite() | ~t.isfinite(), t, g.double())
        for g, n, t in zip(results, narrow, truth, strict=True)
    )


def _errors_of_torch(op: Any, dtype: torch.dtype, args: Args, truth: Args) -> Iterator[list[float]]:
    """Errors of every output of plain torch: as asked, in float32, and on the same problem rounded otherwise.

    In float64, where plain torch is the truth: by how much the results move with a rounding of the inputs.
    """
    double = dtype == torch.float64
    for working in () if double else (dtype, torch.float32):
        yield _distances(_comparable(op.compute(working, args)), truth)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        nearby = tuple(_jitter(arg, generator) for arg in args)
        moved = _comparable(op.compute(torch.float64, nearby))
        yield _distances(moved, truth) if double else _distances(_comparable(op.compute(dtype, nearby)), moved)


def _distances(results: Sequence[Tensor], truth: Sequence[Tensor] | None = None) -> list[float]:
    """Largest difference of each result, from 0 without a truth, among the entries that are finite in both."""
    truth = [torch.zeros_like(x) for x in results] if truth is None else truth
    distances = []
    for x, t in zip(results, truth, strict=True):
        finite = t.isfinite() & x.isfinite()
        distances.append((x.double() - t).where(finite, 0).abs().amax().item() if t.numel() else 0.0)
    return distances


def _jitter(arg: Any, generator: torch.Generator) -> Any:
    """A floating tensor with every number moved by about one rounding, of float32 by up to 16.

    All arithmetic is at least in float32. Moved by one of its roundings, most sums and products are rounded as before:
    over such problems the mean error of a number does not vanish beside its spread, and their largest error is that of
    one draw, not of eight. From 16 on the errors of different draws are independent.
    """
    if not computes(arg):
        return arg
    size = 2.0**-19 if arg.dtype == torch.float32 else torch.finfo(arg.dtype).eps
    noise = 2 * torch.rand(arg.shape, generator=generator, dtype=torch.float64) - 1
    return (arg.double() * (1 + size * noise.to(arg.device))).to(arg.dtype)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.2e}" for value in values) + ")"


def computes(arg: Any) -> bool:
    """Whether an argument is a tensor of a dtype that torch computes in: 8-bit floats are storage, like integers."""
    return isinstance(arg, Tensor) and arg.is_floating_point() and arg.element_size() > 1


def _comparable(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x if not x.is_floating_point() or computes(x) else x.float() for x in results)
