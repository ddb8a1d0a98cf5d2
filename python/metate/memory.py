"""Memory of tensors that are read from end to end again and again, or in short runs from everywhere."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20  # bytes


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
