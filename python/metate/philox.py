"""Philox4x32-10 (Salmon et al. 2011) in plain torch: the dropout mask that every backend reproduces bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (as int64) for each counter of four 32-bit words (as int64, broadcastable)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # A product of two 32-bit words wraps in int64 but keeps all its 64 bits.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _MASK) ^ c1 ^ k0, high & _MASK, (low >> 32 & _MASK) ^ c3 ^ k1, low & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """The 32-bit word below which an element is dropped with probability p."""
    return min(round(p * 2**32), 2**32 - 1)


def keep_mask(p: float, seed: int, offset: int, stream: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """True where attention dropout keeps the weight of (stream, row, column), int64 and broadcastable.

    One counter serves the four columns j, j + 16, j + 32, j + 48 of a group of 64, so that a vector of 16 lanes draws
    four vectors of neighbouring columns at once (see csrc/attention.h).
    """
    counter = ((column >> 6) * 16 + (column & 15), row & _MASK, stream & _MASK, torch.full_like(column, offset & _MASK))
    words = torch.broadcast_tensors(*philox(counter, seed))
    which = (column >> 4) & 3
    word = words[3]
    for i in range(3):
        word = torch.where(which == i, words[i], word)
    kept: Tensor = word >= threshold(p)
    return kept
