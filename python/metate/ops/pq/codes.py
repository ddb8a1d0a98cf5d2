"""Codes of product quantisation as bytes: packed as faiss packs them, or in blocks of rows for scans by shuffles."""

from __future__ import annotations

import torch
from torch import Tensor

from metate.errors import fail

BLOCK = 32  # rows of an interleaved block
LEAST_BITS, MOST_BITS = 1, 16


def bits_of(op: str, argument: str, levels: int) -> int:
    """log2 of the number of centroids of a sub-vector."""
    for bits in range(LEAST_BITS, MOST_BITS + 1):
        if levels == 1 << bits:
            return bits
    raise fail(
        op, argument, f"of {levels} centroids a sub-vector", f"a power of two, 2**{LEAST_BITS} to 2**{MOST_BITS}"
    )


def row_bytes(M: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return (M * bits + 7) // 8


def _places(M: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The byte that sub-code m begins in, and its first bit there."""
    first = torch.arange(M, device=device) * bits
    return first // 8, (first % 8).to(torch.int32)


def pack_codes(indices: Tensor, bits: int) -> Tensor:
    """(n, M) numbers below 2**bits → (n, row_bytes) bytes: sub-code m takes bits m·bits…, least significant first."""
    n, M = indices.shape
    if bits in (8, 16):
        return indices.to(torch.uint8 if bits == 8 else torch.uint16).contiguous().view(torch.uint8)
    byte, shift = _places(M, bits, indices.device)
    value = indices.to(torch.int32) << shift
    out = torch.zeros(n, row_bytes(M, bits) + 2, dtype=torch.uint8, device=indices.device)
    for part in range(3):  # 16 bits that begin anywhere in a byte reach into two more; no two sub-codes share a bit
        out.index_add_(1, byte + part, (value >> (8 * part)).to(torch.uint8))
    return out[:, : row_bytes(M, bits)].contiguous()


def unpack_codes(codes: Tensor, M: int, bits: int) -> Tensor:
    """(n, row_bytes) bytes → (n, M) int32: the inverse of `pack_codes`."""
    if bits == 8:
        return codes.to(torch.int32)
    if bits == 4:
        return torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :M].to(torch.int32)
    byte, shift = _places(M, bits, codes.device)
    padded = torch.nn.functional.pad(codes, (0, 2))
    value = torch.zeros(codes.shape[0], M, dtype=torch.int32, device=codes.device)
    for part in range(3):
        value += padded[:, byte + part].to(torch.int32) << (8 * part)
    return (value >> shift) & ((1 << bits) - 1)


def interleave(codes: Tensor, M: int, bits: int) -> Tensor:
    """(n, row_bytes) codes of 4 or 8 bits → (⌈n/32⌉, M, 4·bits): of 32 rows, sub-code after sub-code.

    Of 8 bits, byte j is that of row j. Of 4 bits, byte j holds row j in its low half and row j + 16 in its high half.
    Rows that fill the last block are zeros.
    """
    if bits == 4:
        codes = unpack_codes(codes, M, bits).to(torch.uint8)
    rows = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % BLOCK))
    blocks = rows.view(rows.shape[0] // BLOCK, BLOCK, M).transpose(1, 2)
    if bits == 4:
        blocks = blocks[..., : BLOCK // 2] | blocks[..., BLOCK // 2 :] << 4
    return blocks.contiguous()


def separate(blocks: Tensor, n: int) -> Tensor:
    """(⌈n/32⌉, M, 4·bits) → (n, M) int32: the numbers that were interleaved."""
    if blocks.shape[2] == BLOCK // 2:
        blocks = torch.cat([blocks & 15, blocks >> 4], 2)
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * BLOCK, blocks.shape[1])[:n].to(torch.int32)
