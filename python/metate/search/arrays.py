"""numpy or torch in, the same out; nothing is copied where the layout allows."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate.errors import fail, require_dense

Array: TypeAlias = "npt.NDArray[Any] | Tensor"

_BLOCK = 1 << 22  # numbers that are converted, checked and encoded at a time
_FEW = 1 << 13  # numbers that numpy's BLAS multiplies in this thread
FLOAT32 = np.dtype(np.float32)


class _Writable:
    """A read-only array as torch would have it; nobody writes there."""

    def __init__(self, x: npt.NDArray[Any]) -> None:
        self.kept = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.__array_interface__["data"][0], False)}


def tensor_of(op: str, argument: str, x: Any) -> Tensor:
    """The same memory as a tensor."""
    if isinstance(x, Tensor):
        require_dense(op, argument, x)
        if x.is_meta:
            raise fail(op, argument, "a meta tensor", "one with contents", error=NotImplementedError)
        return x.detach()
    if not isinstance(x, np.ndarray):
        raise fail(op, argument, type(x).__name__, "a numpy array or a torch tensor", error=TypeError)
    if x.dtype is FLOAT32 and x.flags.carray:
        return torch.from_numpy(x)
    if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
        raise fail(op, argument, x.dtype, "numbers that torch has too", error=TypeError)
    if not x.dtype.isnative or any(stride < 0 or stride % x.itemsize for stride in x.strides):
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    if not x.flags.writeable and x.size:
        x = np.asarray(_Writable(x))
    return torch.from_numpy(x)


def empty_results(*shape: int) -> tuple[Tensor, Tensor]:
    """Distances and ids of a search, on the CPU, to be written."""
    return torch.empty(shape, dtype=torch.float32, device="cpu"), torch.empty(shape, dtype=torch.int64, device="cpu")


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a tensor, which is copied where it is not in one piece or not the CPU's."""
    return x.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


class Vectors:
    """(n, dim) vectors of any real dtype, given out as blocks of finite float32."""

    def __init__(self, op: str, argument: str, x: Any, dim: int, device: torch.device, single: bool = False) -> None:
        self.op, self.argument, self.device = op, argument, device
        self.numpy = isinstance(x, np.ndarray)
        tensor = tensor_of(op, argument, x)
        self.single = single and tensor.dim() == 1
        tensor = tensor[None] if self.single else tensor
        if tensor.dim() != 2 or tensor.shape[1] != dim:
            shapes = f"({dim},) or (n, {dim})" if single else f"(n, {dim})"
            raise fail(op, argument, f"of shape {tuple(tensor.shape)}", f"{shapes}, for the index has {dim} dimensions")
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise fail(op, argument, tensor.dtype, "real numbers", error=TypeError)
        self.tensor = tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def take(self, rows: Tensor) -> Tensor:
        return self._checked(self.tensor[rows.to(self.tensor.device)])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        rows = rows or max(1, _BLOCK // max(1, self.tensor.shape[1]))
        count = len(self)
        for a in range(0, count, rows):
            part = slice(a, min(a + rows, count))
            yield part, self._checked(self.tensor if rows >= count else self.tensor[part])

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or x.device != self.device:
            x = x.to(self.device, torch.float32)
        x = x.contiguous()
        if not (_finite(x.numpy()) if self.device.type == "cpu" else bool(x.isfinite().all())):
            raise fail(self.op, self.argument, "not finite everywhere", "finite float32 numbers")
        return x

    def results(self, *tensors: Tensor) -> tuple[Any, ...]:
        """As the caller gave the vectors: numpy or torch, one or many."""
        home = self.tensor.device
        given = [t.numpy(force=True) if self.numpy else t.to(home) for t in tensors]
        return tuple(x[0] if self.single else x for x in given)


def _finite(x: npt.NDArray[Any]) -> bool:
    """A single query feels every call: its square is finite where its numbers are, and as a rule only there."""
    return (x.size <= _FEW and isfinite(np.vdot(x, x))) or bool(np.isfinite(x).all())
