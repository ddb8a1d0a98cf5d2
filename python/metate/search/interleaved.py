"""A column of codes in the layout that scans read fastest, with the few methods of a tensor that lists need."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from metate.ops.pq import pack_codes, pq_interleave, unpack_codes
from metate.ops.pq.codes import BLOCK, row_bytes

_HALF = BLOCK // 2
_LINE = 64  # bytes of a cache line, where rows begin


def new_rows(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, of the dtype and on the device of `like`. On a CPU numpy allocates: in large pages where there are
    any, without which rows in random lists wait for page tables."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    memory = torch.from_numpy(np.empty(size + _LINE, np.uint8))
    first = -memory.data_ptr() % _LINE
    return memory[first : first + size].view(like.dtype).view(shape)


class Interleaved:
    """(n, ⌈M·bits/8⌉) packed codes of 4 or 8 bits, kept as blocks of 32 rows (see `metate.ops.pq.pq_interleave`).

    Of 4 bits two rows share a byte. Writing a row beside one that is being read puts the same bits there again.
    """

    dtype = torch.uint8

    def __init__(self, blocks: Tensor, rows: int) -> None:
        self.blocks, self.rows = blocks, rows
        self.M, self.bits = blocks.shape[1], 8 if blocks.shape[2] == BLOCK else 4

    @staticmethod
    def of(codes: Tensor, M: int, bits: int) -> Interleaved:
        return Interleaved(pq_interleave(codes, M, bits), codes.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, row_bytes(self.M, self.bits)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def __len__(self) -> int:
        return self.rows

    def new_empty(self, shape: tuple[int, ...]) -> Interleaved:
        return Interleaved(new_rows(self.blocks, (-(-shape[0] // BLOCK), *self.blocks.shape[1:])), shape[0])

    def first(self, rows: int) -> Interleaved:
        """The same memory without the later rows."""
        return Interleaved(self.blocks[: -(-rows // BLOCK)], rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Packed codes of rows."""
        if self.bits == 8:
            return self.blocks[rows // BLOCK, :, rows % BLOCK]
        bytes_ = self.blocks[rows // BLOCK, :, rows % _HALF]
        upper = (rows % BLOCK >= _HALF)[:, None]
        return pack_codes(torch.where(upper, bytes_ >> 4, bytes_ & 15), 4)

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        return self[rows]

    def __setitem__(self, rows: slice, codes: Tensor) -> None:
        """Packed codes into consecutive rows: whole blocks at once, those of blocks begun row by row."""
        begin, end = rows.start, rows.start + len(codes)
        first, last = min(-(-begin // BLOCK) * BLOCK, end), max(end // BLOCK * BLOCK, begin)
        if first < last:
            whole = pq_interleave(codes[first - begin : last - begin], self.M, self.bits)
            self.blocks[first // BLOCK : last // BLOCK] = whole
        for a, b in ((begin, first), (max(first, last), end)):
            self.index_copy_(0, torch.arange(a, b, device=self.device), codes[a - begin : b - begin])

    def index_copy_(self, dim: int, rows: Tensor, codes: Tensor) -> None:
        if self.bits == 8:
            self.blocks[rows // BLOCK, :, rows % BLOCK] = codes
            return
        numbers = unpack_codes(codes, self.M, 4).to(torch.uint8)
        for shift, wanted in ((0, rows % BLOCK < _HALF), (4, rows % BLOCK >= _HALF)):
            at = rows[wanted]
            place = at // BLOCK, slice(None), at % _HALF  # each byte once
            self.blocks[place] = (self.blocks[place] & (240 >> shift)) | (numbers[wanted] << shift)


Column: TypeAlias = Tensor | Interleaved


def first_rows(column: Column, rows: int) -> Column:
    return column.first(rows) if isinstance(column, Interleaved) else column[:rows]


def whole_blocks(column: Column) -> Tensor:
    """The same memory with 32 rows in one; there are so many, or a multiple."""
    return column.blocks if isinstance(column, Interleaved) else column.view(-1, BLOCK, *column.shape[1:])


def empty_like(column: Column, rows: int) -> Column:
    """As many rows of such a column, uninitialised."""
    shape = (rows, *column.shape[1:])
    return column.new_empty(shape) if isinstance(column, Interleaved) else new_rows(column, shape)
