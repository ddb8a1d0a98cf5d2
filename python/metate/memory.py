"""Memory of tensors that are read from end to end again and again, or in short runs from everywhere."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20  # bytes
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which mmap has no name for everywhere


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty, on a CPU in large pages of the system: looking up small ones takes a sixth of a matrix-vector
    product's time."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(*shape)


def prefer_large_pages(address: int, size: int) -> None:
    """Asks the system to hold `size` bytes of a process' memory in large pages: what nobody has touched yet, and, where
    it can, what is there. Advice: no value and no address changes, and systems without it go on as before."""
    begin, end = -(-address // LARGE_PAGE) * LARGE_PAGE, (address + size) // LARGE_PAGE * LARGE_PAGE
    if begin >= end or sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for advice in (mmap.MADV_HUGEPAGE, _COLLAPSE):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor, its memory on a CPU in large pages if the system can."""
    if type(tensor.data) is Tensor and tensor.is_cpu and tensor.layout == torch.strided:
        storage = tensor.untyped_storage()
        prefer_large_pages(storage.data_ptr(), storage.nbytes())
    return tensor
