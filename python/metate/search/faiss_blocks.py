"""Codes of 4 bits in the blocks of faiss' fast scan: two sub-codes of 32 rows after another, rows 0 … 15 in the low
halves of bytes and rows 16 … 31 in the high ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ROWS = 32
_ORDER = np.arange(16).reshape(2, 8).T.ravel()  # of the rows of a half: 0, 8, 1, 9, …


def blocks_of(codes: Bytes) -> Bytes:
    """Of codes (rows, pairs): as many blocks as hold them, one after another."""
    rows, pairs = codes.shape
    whole = np.zeros((-(-rows // ROWS) * ROWS, pairs), np.uint8)
    whole[:rows] = codes
    halves = whole.reshape(-1, 2, 16, pairs)[:, :, _ORDER].transpose(0, 3, 1, 2)  # block, pair, half, row
    numbers = np.stack([halves & 15, halves >> 4], 2)
    packed: Bytes = numbers[..., 0, :] | numbers[..., 1, :] << 4
    return packed.reshape(-1)


def codes_of(blocks: Bytes, rows: int, pairs: int, together: int = ROWS) -> Bytes:
    """The inverse; a block may hold a multiple of 32 rows, 32 for a pair of sub-codes after another."""
    groups = together // ROWS
    packed = blocks.reshape(-1, pairs, groups, 2, 16).transpose(0, 2, 4, 1, 3)  # block, group, row, pair, number
    whole = np.empty((len(packed), groups, 2, 16, pairs), np.uint8)
    for half, numbers in enumerate((packed & 15, packed >> 4)):
        whole[:, :, half, _ORDER] = numbers[..., 0] | numbers[..., 1] << 4
    return np.ascontiguousarray(whole.reshape(-1, pairs)[:rows])
