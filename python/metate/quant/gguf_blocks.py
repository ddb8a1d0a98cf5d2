"""The block types of GGUF, each lowered to the canonical form: same codes, same scales, columns back in order.

A block function takes (n, B, size) bytes, B blocks a row, and gives the fields of QuantizedWeight for these n rows,
with codes still unpacked, (n, K) uint8. Layouts: ggml's ggml-common.h.

The blocks of IQ1, IQ2 and IQ3 name points of a grid, eight or four columns by one index, and signs or shifts beside
them. A code here is one coordinate, with its sign as the top bit. So 2.1 to 3.4 bits a weight in the file become 4.3 to
4.6, for kernels read codes of 4 bits twice as fast as those of 3; IQ1's 1.6 and 1.8, which that would be too many for,
become 3.3 and 3.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight, pack_codes
from metate.memory import allocate
from metate.quant.gguf_grids import points
from metate.quant.settings import blocks as slices

Fields = dict[str, Tensor]

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled; the scale is halved
_IQ1 = (-7 / 8, 1 / 8, 9 / 8, 0, -9 / 8, -1 / 8, 7 / 8, 0)  # -1, 0 and 1, moved up or down by an eighth
_IQ2 = (1, 25 / 8, 43 / 8, *5 * (0,), -1, -25 / 8, -43 / 8, *5 * (0,))  # as 2 s + 1 multiplies them, of a scale s
_IQ3_XXS = (1, 3, 5, 7, 9, 11, 13, 31 / 2, -1, -3, -5, -7, -9, -11, -13, -31 / 2)
_IQ3_S = (1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)


@dataclass(frozen=True)
class BlockType:
    """elements and bytes of a block; what is the same for every weight of the type; the function of its blocks."""

    name: str
    elements: int
    size: int
    bits: int
    group_size: int
    read: Callable[[Tensor], Fields]
    fixed: dict[str, Any] = field(default_factory=dict)
    table: tuple[float, ...] | None = None


def lower(kind: BlockType, raw: Tensor) -> QuantizedWeight:
    """(N, B, size) bytes to the canonical form, a block of rows at a time."""
    rows, columns = raw.shape[0], raw.shape[1] * kind.elements
    result: dict[str, Any] = {}
    for part in slices(rows, columns):
        fields = kind.read(raw[part])
        fields["codes"] = pack_codes(fields["codes"], kind.bits)
        for name, value in fields.items():
            if name not in result:
                result[name] = allocate((rows, *value.shape[1:]), value.dtype, value.device)
            result[name][part] = value
    if kind.table is not None:
        result["codebook"] = torch.tensor(kind.table, dtype=torch.float32, device=raw.device)
    return QuantizedWeight((rows, columns), kind.bits, kind.group_size, **result, **kind.fixed)


def _words(raw: Tensor, at: int, size: int, dtype: torch.dtype) -> Tensor:
    """`size` bytes of every block as numbers of another type: (n, B, C)."""
    copy = raw[:, :, at : at + size].clone(memory_format=torch.contiguous_format)  # a slice may begin at an odd place
    return copy.view(dtype)


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 at a place in every block: (n, B)."""
    return _words(raw, at, 2, torch.float16)[:, :, 0]


def _fields(raw: Tensor, *shifts: int, mask: int) -> Tensor:
    """(n, B, A, C) bytes -> (n, B, A, shifts, C): the bit fields at these shifts."""
    return torch.stack([raw >> shift & mask for shift in shifts], 3)


def _spread(raw: Tensor, *shifts: int, mask: int) -> Tensor:
    """(n, B, C) -> (n, B, C · shifts): the bit fields of one number after another."""
    return _fields(raw[..., None], *shifts, mask=mask).flatten(2)


def _bits(raw: Tensor) -> Tensor:
    return _spread(raw, *range(8), mask=1)


def _nibbles(raw: Tensor) -> Tensor:
    return _spread(raw, 0, 4, mask=15)


def _rows(codes: Tensor) -> Tensor:
    return codes.flatten(1)


def _halves(raw: Tensor) -> Tensor:
    """(n, B, 16) bytes of 32 codes: low nibbles the first 16 columns, high nibbles the others."""
    return _fields(raw[:, :, None], 0, 4, mask=15)


def _fifth_bits(raw: Tensor) -> Tensor:
    """(n, B, 4) bytes: bit j of the 32 belongs to column j."""
    return _bits(raw).view(*raw.shape[:2], 1, 2, 16)


def _q4_0(raw: Tensor) -> Fields:
    return {"codes": _rows(_halves(raw[:, :, 2:])), "scales": _half(raw, 0)}


def _q4_1(raw: Tensor) -> Fields:
    return {"codes": _rows(_halves(raw[:, :, 4:])), "scales": _half(raw, 0), "offsets": _half(raw, 2)}


def _q5_0(raw: Tensor) -> Fields:
    codes = _halves(raw[:, :, 6:]) | _fifth_bits(raw[:, :, 2:6]) << 4
    return {"codes": _rows(codes), "scales": _half(raw, 0)}


def _q5_1(raw: Tensor) -> Fields:
    codes = _halves(raw[:, :, 8:]) | _fifth_bits(raw[:, :, 4:8]) << 4
    return {"codes": _rows(codes), "scales": _half(raw, 0), "offsets": _half(raw, 2)}


def _q8_0(raw: Tensor) -> Fields:
    return {"codes": _rows(raw[:, :, 2:] ^ 128), "scales": _half(raw, 0)}


def _q2_k(raw: Tensor) -> Fields:
    packed = raw[:, :, :16]
    return {
        "codes": _rows(_fields(raw[:, :, 16:80].unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3)),
        "scales": _rows(packed & 15).view(torch.int8), "super_scales": _half(raw, 80),
        "offsets": _rows(packed >> 4).view(torch.int8), "super_offsets": -_half(raw, 82),
    }  # fmt: skip


def _q3_k(raw: Tensor) -> Fields:
    high = _fields(raw[:, :, None, :32], *range(8), mask=1).view(*raw.shape[:2], 2, 4, 32)
    low = _fields(raw[:, :, 32:96].unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3)
    fine, coarse = raw[:, :, None, 96:104], raw[:, :, None, 104:108]
    scales = _fields(fine, 0, 4, mask=15).flatten(2) | _fields(coarse, 0, 2, 4, 6, mask=3).flatten(2) << 4
    return {
        "codes": _rows(low | high << 2), "scales": _rows(scales.view(torch.int8) - 32), "super_scales": _half(raw, 108),
    }  # fmt: skip


def _six_bit_scales(raw: Tensor) -> Fields:
    """Scales and minima of Q4_K and Q5_K: 6 bits each, eight of both in 12 bytes.

    A minimum is subtracted, so the coarse level carries the sign: an integer 0 has none, and x - 0 is not x + 0 at -0.
    """
    low, high, mixed = raw[:, :, 4:8], raw[:, :, 8:12], raw[:, :, 12:16]
    scales = torch.cat([low & 63, mixed & 15 | low >> 2 & 48], 2)
    minima = torch.cat([high & 63, mixed >> 4 | high >> 2 & 48], 2)
    return {
        "scales": _rows(scales).view(torch.int8), "super_scales": _half(raw, 0),
        "offsets": _rows(minima).view(torch.int8), "super_offsets": -_half(raw, 2),
    }  # fmt: skip


def _q4_k(raw: Tensor) -> Fields:
    return {"codes": _rows(_fields(raw[:, :, 16:].unflatten(2, (4, 32)), 0, 4, mask=15)), **_six_bit_scales(raw)}


def _q5_k(raw: Tensor) -> Fields:
    low = _fields(raw[:, :, 48:].unflatten(2, (4, 32)), 0, 4, mask=15)
    high = _fields(raw[:, :, None, 16:48], *range(8), mask=1).view(*raw.shape[:2], 4, 2, 32)
    return {"codes": _rows(low | high << 4), **_six_bit_scales(raw)}


def _q6_k(raw: Tensor) -> Fields:
    low = _fields(raw[:, :, :128].unflatten(2, (2, 64)), 0, 4, mask=15).view(*raw.shape[:2], 2, 4, 32)
    high = _fields(raw[:, :, 128:192].unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3)
    return {
        "codes": _rows(low | high << 4), "scales": _rows(raw[:, :, 192:208]).view(torch.int8),
        "super_scales": _half(raw, 208),
    }  # fmt: skip


def _iq4_xs(raw: Tensor) -> Fields:
    high = torch.stack([raw[:, :, 2 + pair // 4] >> 2 * (pair % 4) & 3 for pair in range(8)], 2)
    low = torch.stack([raw[:, :, 4 + pair // 2] >> 4 * (pair % 2) & 15 for pair in range(8)], 2)
    return {
        "codes": _rows(_fields(raw[:, :, 8:].unflatten(2, (8, 16)), 0, 4, mask=15)),
        "scales": _rows((low | high << 4).view(torch.int8) - 32), "super_scales": _half(raw, 0),
    }  # fmt: skip


def _mxfp4(raw: Tensor) -> Fields:
    """The scale is 2**(e - 128), exact in bfloat16; its two smallest values are subnormal there."""
    exponent = raw[:, :, 0].to(torch.int16)
    pattern = torch.where(exponent < 2, 32 << exponent, (exponent - 1) << 7).to(torch.int16)
    return {"codes": _rows(_halves(raw[:, :, 1:])), "scales": pattern.view(torch.bfloat16)}


def _nvfp4(raw: Tensor) -> Fields:
    """Four runs of 16 columns, each with an unsigned e4m3 scale: half of it, for the doubled codebook."""
    byte = torch.arange(256, device=raw.device)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    value = torch.where(exponent == 0, mantissa * 2**-7, (1 + mantissa) * 2.0 ** (exponent - 8))
    value[[0, 127]] = 0
    codes = _fields(raw[:, :, 4:].unflatten(2, (4, 8)), 0, 4, mask=15)
    return {"codes": _rows(codes), "scales": value.bfloat16()[_rows(raw[:, :, :4]).int()]}


def _q1_0(raw: Tensor) -> Fields:
    return {"codes": _rows(_bits(raw[:, :, 2:])), "scales": _half(raw, 0)}


def _q2_0(raw: Tensor) -> Fields:
    return {"codes": _rows(_spread(raw[:, :, 2:], 0, 2, 4, 6, mask=3)), "scales": _half(raw, 0)}


def _ternary(raw: Tensor, count: int) -> Tensor:
    """(n, B, C) bytes, fractions of 256, to their first `count` digits in base 3: all first ones, all second ones, …"""
    fractions = torch.stack([raw * 3**place for place in range(count)], 2).flatten(2)  # modulo 1, as uint8 wraps
    return (fractions.to(torch.int16) * 3 >> 8).to(torch.uint8)


def _tq1_0(raw: Tensor) -> Fields:
    digits = _ternary(raw[:, :, :32], 5), _ternary(raw[:, :, 32:48], 5), _ternary(raw[:, :, 48:52], 4)
    return {"codes": _rows(torch.cat(digits, 2)), "scales": _half(raw, 52)}


def _tq2_0(raw: Tensor) -> Fields:
    return {"codes": _rows(_fields(raw[:, :, :64].unflatten(2, (2, 32)), 0, 2, 4, 6, mask=3)), "scales": _half(raw, 64)}


def _on_grid(grid: str, index: Tensor, signs: Tensor, top: int = 3) -> Tensor:
    """(n, B, P) numbers of points, and a bit for each of their coordinates -> the codes, of which it is bit `top`."""
    return points(grid)[_rows(index).int()].flatten(1) | _rows(signs) << top


def _even(seven: Tensor) -> Tensor:
    """The signs of eight columns, of which seven are given and the last makes the number of minuses even."""
    parity = seven ^ seven >> 4
    parity = parity ^ parity >> 2
    return (seven | (parity ^ parity >> 1) << 7 & 128).to(torch.uint8)


def _odd(scale: Tensor) -> Tensor:
    """2 s + 1, of s in up to 4 bits."""
    return _rows(2 * scale + 1).to(torch.int8)


def _signs_below_scales(word: Tensor) -> tuple[Tensor, Tensor]:
    """(n, B, 8) int32, each the signs and the scale of 32 columns: (n, B, 256) bits and (n, B · 8) scales."""
    return _bits(_even(_spread(word, 0, 7, 14, 21, mask=127))), _odd(word >> 28 & 15)


def _iq2_xxs(raw: Tensor) -> Fields:
    signs, scales = _signs_below_scales(_words(raw, 2, 64, torch.int32)[:, :, 1::2])
    index = raw[:, :, 2:].unflatten(2, (8, 8))[..., :4].flatten(2)
    return {"codes": _on_grid("iq2_xxs", index, signs), "scales": scales, "super_scales": _half(raw, 0)}


def _iq2_xs(raw: Tensor) -> Fields:
    words = _words(raw, 2, 64, torch.int16)
    codes = _on_grid("iq2_xs", words & 511, _bits(_even(words >> 9 & 127)))
    return {"codes": codes, "scales": _odd(_nibbles(raw[:, :, 66:])), "super_scales": _half(raw, 0)}


def _iq2_s(raw: Tensor) -> Fields:
    index = raw[:, :, 2:34] | _spread(raw[:, :, 66:74], 0, 2, 4, 6, mask=3).int() << 8
    codes = _on_grid("iq2_s", index, _bits(raw[:, :, 34:66]))
    return {"codes": codes, "scales": _odd(_nibbles(raw[:, :, 74:])), "super_scales": _half(raw, 0)}


def _iq3_xxs(raw: Tensor) -> Fields:
    signs, scales = _signs_below_scales(_words(raw, 66, 32, torch.int32))
    return {
        "codes": _on_grid("iq3_xxs", raw[:, :, 2:66], signs), "scales": scales, "super_scales": _half(raw, 0),
    }  # fmt: skip


def _iq3_s(raw: Tensor) -> Fields:
    index = raw[:, :, 2:66] | _bits(raw[:, :, 66:74]).int() << 8
    codes = _on_grid("iq3_s", index, _bits(raw[:, :, 74:106]))
    return {"codes": codes, "scales": _odd(_nibbles(raw[:, :, 106:])), "super_scales": _half(raw, 0)}


def _iq1_s(raw: Tensor) -> Fields:
    words = _words(raw, 34, 16, torch.int16)
    index = raw[:, :, 2:34] | _spread(words, 0, 3, 6, 9, mask=7).int() << 8
    down = (words >> 15 & 1).to(torch.uint8).repeat_interleave(32, 2)
    return {
        "codes": _on_grid("iq1", index, down, 2), "scales": _odd(words >> 12 & 7), "super_scales": _half(raw, 0),
    }  # fmt: skip


def _iq1_m(raw: Tensor) -> Fields:
    """The float16 lies in the last four bits of four words, which hold four scales each before them."""
    beside = _nibbles(raw[:, :, 32:48])
    codes = _on_grid("iq1", raw[:, :, :32] | (beside & 7).int() << 8, (beside >> 3).repeat_interleave(8, 2), 2)
    quarters = raw[:, :, 49::2] >> 4
    return {
        "codes": codes, "scales": _odd(_spread(_words(raw, 48, 8, torch.int16), 0, 3, 6, 9, mask=7)),
        "super_scales": _half(quarters[:, :, ::2] | quarters[:, :, 1::2] << 4, 0),
    }  # fmt: skip


TYPES = {
    2: BlockType("Q4_0", 32, 18, 4, 32, _q4_0, {"zero": 8}),
    3: BlockType("Q4_1", 32, 20, 4, 32, _q4_1),
    6: BlockType("Q5_0", 32, 22, 5, 32, _q5_0, {"zero": 16}),
    7: BlockType("Q5_1", 32, 24, 5, 32, _q5_1),
    8: BlockType("Q8_0", 32, 34, 8, 32, _q8_0, {"zero": 128}),
    10: BlockType("Q2_K", 256, 84, 2, 16, _q2_k, {"super_groups": 16}),
    11: BlockType("Q3_K", 256, 110, 3, 16, _q3_k, {"zero": 4, "super_groups": 16}),
    12: BlockType("Q4_K", 256, 144, 4, 32, _q4_k, {"super_groups": 8}),
    13: BlockType("Q5_K", 256, 176, 5, 32, _q5_k, {"super_groups": 8}),
    14: BlockType("Q6_K", 256, 210, 6, 16, _q6_k, {"zero": 32, "super_groups": 16}),
    16: BlockType("IQ2_XXS", 256, 66, 4, 32, _iq2_xxs, {"super_groups": 8}, table=_IQ2),
    17: BlockType("IQ2_XS", 256, 74, 4, 16, _iq2_xs, {"super_groups": 16}, table=_IQ2),
    18: BlockType("IQ3_XXS", 256, 98, 4, 32, _iq3_xxs, {"super_groups": 8}, table=_IQ3_XXS),
    19: BlockType("IQ1_S", 256, 50, 3, 32, _iq1_s, {"super_groups": 8}, table=_IQ1),
    20: BlockType("IQ4_NL", 32, 18, 4, 32, _q4_0, table=_IQ4),
    21: BlockType("IQ3_S", 256, 110, 4, 32, _iq3_s, {"super_groups": 8}, table=_IQ3_S),
    22: BlockType("IQ2_S", 256, 82, 4, 16, _iq2_s, {"super_groups": 16}, table=_IQ2),
    23: BlockType("IQ4_XS", 256, 136, 4, 32, _iq4_xs, {"super_groups": 8}, table=_IQ4),
    29: BlockType("IQ1_M", 256, 56, 3, 16, _iq1_m, {"super_groups": 16}, table=_IQ1),
    34: BlockType("TQ1_0", 256, 54, 2, 256, _tq1_0, {"zero": 1}),
    35: BlockType("TQ2_0", 256, 66, 2, 256, _tq2_0, {"zero": 1}),
    39: BlockType("MXFP4", 32, 17, 4, 32, _mxfp4, table=_E2M1),
    40: BlockType("NVFP4", 64, 36, 4, 16, _nvfp4, table=_E2M1),
    41: BlockType("Q1_0", 128, 18, 1, 128, _q1_0, table=(-1, 1)),
    42: BlockType("Q2_0", 64, 18, 2, 64, _q2_0, {"zero": 1}),
}
