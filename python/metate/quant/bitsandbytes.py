"""bitsandbytes: NF4 and FP4 blocks over the flat weight, nested scales, row-wise int8; its states read and written.

Dettmers et al. 2023 (QLoRA), appendix E for NF4; Dettmers et al. 2022 (8-bit optimizers) for the dynamic map of nested
scales; Dettmers et al. 2022 (LLM.int8()). Codes and states have the bits that the library itself computes on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from metate.errors import FormatError, fail, require_dense
from metate.low_bit import QuantizedWeight, pack_codes, unpack_codes
from metate.memory import allocate
from metate.quant.settings import Settings, as_bytes, blocks, complain, json_bytes, on_cpu, parse_json, take

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "quant_state.bitsandbytes__"
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)  # `bnb_4bit_quant_storage`
_NESTED = 256  # scales that share a scale
_TINY = 1e-38
# fmt: off
_CODES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "fp4": (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3),
}
# fmt: on


@cache
@on_cpu
def codebook(quant_type: str) -> Tensor:
    """The 16 values of "nf4" or "fp4" in [-1, 1], float32, in the order of the codes."""
    values = torch.tensor(_CODES[quant_type], dtype=torch.float32)
    return values / values.abs().max()


@cache
@on_cpu
def dynamic_map(signed: bool = True, exponent_bits: int = 7, bits: int = 8) -> Tensor:
    """The dynamic type: 2**bits float32 values up to 1, ascending, denser towards 0, of `exponent_bits` decades."""
    values = [0.0, 1.0]
    fraction_bits = bits - 1 - exponent_bits
    decades = [(place, 2 ** (place + fraction_bits + (not signed))) for place in range(exponent_bits)]
    decades.append((exponent_bits - 1, 2**fraction_bits - 1))  # codes without the bit that ends an exponent
    for place, count in decades:
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        means = 10 ** (place - (exponent_bits - 1)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True)
class State4bit:
    """A 4-bit weight as bitsandbytes stores it. `nested_*` are None where the absmax are plain float32.

    packed: (⌈N · K / 2⌉) uint8, the even element in the high nibble.
    absmax: float32, one for each block of the flat weight; or uint8, indices into nested_map.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: float = 0.0
    nested_size: int = _NESTED

    def __post_init__(self) -> None:
        if self.quant_type not in _CODES:
            raise complain("quant_type", self.quant_type, "nf4 or fp4")
        if self.block_size not in BLOCK_SIZES:
            raise complain("blocksize", self.block_size, f"one of {BLOCK_SIZES}")
        if self.nested_size < 1:
            raise complain("nested_blocksize", self.nested_size, "1 or more")
        count = self.shape[0] * self.shape[1]
        scales = -(-count // self.block_size)
        parts = {"weight": self.packed, "absmax": self.absmax}
        take(parts, "weight", torch.uint8, shape=(-(-count // 2),))
        if self.nested_absmax is None or self.nested_map is None:
            take(parts, "absmax", torch.float32, shape=(scales,))
        else:
            take(parts, "absmax", torch.uint8, shape=(scales,))
            nested = {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_map}
            take(nested, "nested_absmax", torch.float32, shape=(-(-scales // self.nested_size),))
            take(nested, "nested_quant_map", torch.float32, shape=(256,))

    def scales(self) -> Tensor:
        """The absmax of every block, float32."""
        if self.nested_absmax is None or self.nested_map is None:
            return self.absmax
        coarse = self.nested_absmax.repeat_interleave(min(self.nested_size, self.absmax.numel()))
        return self.nested_map[self.absmax.int()] * coarse[: self.absmax.numel()] + self.nested_offset

    def with_nested_scales(self) -> State4bit:
        """The same codes, their plain absmax rounded to 8 bits."""
        offset = self.absmax.mean()
        table = dynamic_map().to(self.absmax.device)
        fine, coarse = nearest_in_blocks(self.absmax - offset, _NESTED, table)
        return replace(self, absmax=fine, nested_absmax=coarse, nested_map=table, nested_offset=offset.item())

    def lower(self) -> QuantizedWeight:
        """The canonical form. Blocks that cross rows are cut into groups that divide both rows and blocks."""
        rows, columns = self.shape
        group_size = math.gcd(columns, self.block_size)
        groups = columns // group_size
        scales = self.scales()
        if columns % self.block_size:
            flat = scales.new_empty(rows * groups)
            for part in blocks(rows * groups, 32):  # of 8-byte indices
                group = torch.arange(part.start, part.stop, device=scales.device)
                flat[part] = scales[group * group_size // self.block_size]
            scales = flat
        return QuantizedWeight(
            self.shape, 4, group_size, self._codes(), scales.view(rows, groups),
            codebook=codebook(self.quant_type).to(self.packed.device),
        )  # fmt: skip

    def _codes(self) -> Tensor:
        rows, columns = self.shape
        codes = allocate((rows, -(-columns // 2)), torch.uint8, self.packed.device)
        if columns % 2 == 0:
            torch.bitwise_left_shift(self.packed.reshape(codes.shape), 4, out=codes)
            return codes.bitwise_or_(self.packed.reshape(codes.shape) >> 4)
        for rows_here in blocks(rows, columns, 2):  # an even number of rows begins with a byte
            first, last = rows_here.start * columns // 2, -(-rows_here.stop * columns // 2)
            flat = self.packed[first:last]
            nibbles = torch.stack([flat >> 4, flat & 15], 1).flatten()[: (rows_here.stop - rows_here.start) * columns]
            codes[rows_here] = pack_codes(nibbles.view(-1, columns), 4)
        return codes

    def tensors(self) -> dict[str, Tensor]:
        """The serialised state: "weight" and what follows "weight." in a checkpoint."""
        members: dict[str, object] = {
            "quant_type": self.quant_type, "blocksize": self.block_size,
            "dtype": next(name for name, dtype in _FLOATS.items() if dtype == self.dtype), "shape": list(self.shape),
        }  # fmt: skip
        found = {"weight": self.packed[:, None], "absmax": self.absmax, "quant_map": codebook(self.quant_type)}
        if self.nested_absmax is not None and self.nested_map is not None:
            found |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_map}
            members |= {"nested_blocksize": self.nested_size, "nested_dtype": "float32"}
            members["nested_offset"] = self.nested_offset
        found[STATE + self.quant_type] = json_bytes(members)
        return found

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> State4bit:
        """The inverse of `tensors`."""
        kinds = [kind for kind in _CODES if STATE + kind in tensors]
        if len(kinds) != 1:
            raise complain("quant_state", f"{len(kinds)} of them", "one of nf4 and fp4")
        text = take(tensors, STATE + kinds[0], torch.uint8, shape=(None,))
        state = Settings("quant_state", parse_json(text.numpy().tobytes(), "quant_state", 1 << 16))
        state.text("quant_type", None, kinds[0])
        dtype = state.text("dtype", "float32", *_FLOATS)
        table = take(tensors, "quant_map", torch.float32, shape=(16,))
        if not torch.allclose(table, codebook(kinds[0]), rtol=0, atol=1e-4):
            raise complain("quant_map", "other values", f"those of {kinds[0]}")
        nested: dict[str, Tensor] = {}
        offset, size = 0.0, _NESTED
        if "nested_absmax" in tensors:
            nested = {
                "nested_absmax": take(tensors, "nested_absmax", torch.float32, shape=(None,)),
                "nested_map": take(tensors, "nested_quant_map", torch.float32, shape=(256,)),
            }
            state.text("nested_dtype", "float32", "float32")
            offset, size = state.number("nested_offset"), state.integer("nested_blocksize", None, 1, 2**31)
        return State4bit(
            as_bytes(take(tensors, "weight", *_STORAGE).flatten()),
            take(tensors, "absmax", torch.uint8 if nested else torch.float32, shape=(None,)),
            kinds[0], state.integer("blocksize", None, 32, 4096), _shape(state), _FLOATS[dtype or "float32"],
            **nested, nested_offset=offset, nested_size=size,
        )  # fmt: skip


def _shape(state: Settings) -> tuple[int, int]:
    shape = state.values.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise complain("quant_state shape", shape, "[out_features, in_features]")
    sizes = Settings("quant_state shape", dict(zip(("0", "1"), shape, strict=True)))
    return sizes.integer("0", None, 1, 2**40), sizes.integer("1", None, 1, 2**40)


def lower(tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedWeight:
    """A module's tensors, named as in the checkpoint without the module and "weight."; int8 has an "SCB"."""
    return lower_int8(tensors) if "SCB" in tensors else State4bit.read(tensors).lower()


def lower_int8(tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """LLM.int8() weights: one scale a row."""
    weight = take(tensors, "weight", torch.int8, shape=(None, None))
    rows, columns = weight.shape
    if weight.numel() == 0:
        raise complain("weight", f"shape {tuple(weight.shape)}", "at least one row and column")
    scales = take(tensors, "SCB", torch.float32, shape=(rows,))
    if "weight_format" in tensors:
        layout = take(tensors, "weight_format", torch.uint8)
        if layout.numel() != 1 or int(layout) != 0:
            raise complain(
                "weight_format", layout.flatten().tolist()[:1], "0 (row major); save the model again to convert it"
            )
    codes = as_bytes(weight) ^ 128
    return QuantizedWeight((rows, columns), 8, columns, codes, (scales / 127)[:, None], zero=128)


def _absmax(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of every block, and the blocks divided by theirs (as one multiplication where full)."""
    full = flat.numel() // block_size * block_size
    head = flat[:full].view(-1, block_size)
    absmax = head.abs().amax(1)
    scaled = (head * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).flatten()
    if full < flat.numel():
        last = flat[full:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp_(-1, 1)])
    return absmax, scaled


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """Index into `values` of the nearest one, the smaller value in a tie."""
    order = values.argsort()
    ascending = values[order]
    edges = (ascending[:-1] + ascending[1:]) / 2
    if len(values) > 16 or scaled.is_meta:
        return order[torch.bucketize(scaled, edges, out_int32=True)].to(torch.uint8)
    index = torch.zeros_like(scaled, dtype=torch.uint8)  # few: to count the edges below is faster than to search
    is_below = torch.empty_like(scaled, dtype=torch.bool)
    for edge in edges:
        index += torch.le(scaled, edge, out=is_below).logical_not_().view(torch.uint8)  # NaN is above all
    is_ascending = torch.equal(values, ascending)
    return index if is_ascending else order.to(torch.uint8)[index.int()]


def nearest_in_blocks(values: Tensor, size: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into a table of values in [-1, 1], and the largest magnitude of every `size` values, of a flat tensor.

    bitsandbytes on a CPU first rounds the divided values to 65536 steps in [-1, 1]; its bits need the same detour.
    """
    padded = torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)
    absmax = padded.abs().amax(1)
    inverse = torch.where(absmax == 0, 0, 1.0 / absmax)
    scaled = (padded * inverse[:, None]).clamp_(-1, 1)
    steps = (((scaled + 1.0) * 0.5) * 65535 + 0.5).floor_()
    index = _nearest(-1.0 + (2.0 * steps) / 65535, table.to(values.device))
    index[absmax == 0] = 0
    return index.flatten()[: values.numel()], absmax


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int = 64, nested: bool = False) -> State4bit:
    """What bitsandbytes' `functional.quantize_4bit` computes, `nested` being its `compress_statistics`."""
    _check_weight(f"quantize_{quant_type}", weight)
    if block_size not in BLOCK_SIZES:
        raise fail(f"quantize_{quant_type}", "block_size", block_size, f"one of {BLOCK_SIZES}")
    flat = weight.detach().reshape(-1)
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    values = codebook(quant_type).to(weight.device)
    for part in blocks(flat.numel(), 1, 4096):  # a multiple of every block size
        found, scaled = _absmax(flat[part].float(), block_size)
        absmax[part.start // block_size : -(-part.stop // block_size)] = found
        pairs = _nearest(torch.nn.functional.pad(scaled, (0, scaled.numel() % 2)), values).view(-1, 2)
        packed[part.start // 2 : -(-part.stop // 2)] = pairs[:, 0] << 4 | pairs[:, 1]
    rows, columns = weight.shape
    state = State4bit(packed, absmax, quant_type, block_size, (rows, columns), weight.dtype)
    return state.with_nested_scales() if nested else state


def quantize_nf4(weight: Tensor, block_size: int = 64, nested: bool = False) -> QuantizedWeight:
    """(N, K) to NormalFloat4: blocks of the flat weight divided by their absmax, nearest of 16 normal quantiles.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16.
        block_size: 32, 64, … 4096 elements that share a scale.
        nested: round the scales themselves to 8 bits, 256 of them to a scale ("double quantisation").

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. NaN makes NaN of its block.
    """
    return quantize_4bit(weight, "nf4", block_size, nested).lower()


def quantize_fp4(weight: Tensor, block_size: int = 64, nested: bool = False) -> QuantizedWeight:
    """(N, K) to FP4: blocks of the flat weight divided by their absmax; sign, two bits of exponent, one of mantissa.

    Args: as of `quantize_nf4`.

    Raises: as `quantize_nf4` does.
    """
    return quantize_4bit(weight, "fp4", block_size, nested).lower()


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """The tensors of LLM.int8() (Dettmers et al. 2022): every row divided by its largest magnitude / 127, and rounded.

    Args:
        weight: (N, K), float32, bfloat16 or float16.

    Returns:
        "weight" (N, K) int8 and "SCB" (N) float32, the largest magnitudes, as bitsandbytes' checkpoints hold them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check_weight("quantize_int8", weight)
    absmax = weight.abs().amax(1).float()
    factor = 127.0 / absmax.clamp(min=_TINY)[:, None]
    return {"weight": torch.round(weight * factor).to(torch.int8), "SCB": absmax}


def quant_type(weight: QuantizedWeight) -> str:
    """ "nf4" or "fp4", by the codebook."""
    for kind in _CODES:
        if weight.codebook is not None and torch.equal(weight.codebook.cpu(), codebook(kind)):
            return kind
    raise fail("quant.bitsandbytes", "weight", weight, "one of NF4 or FP4 codes", error=FormatError)


def write(weight: QuantizedWeight, nested: bool = False) -> dict[str, Tensor]:
    """The serialised tensors of an NF4 or FP4 weight whose groups are parts of blocks of the flat one."""
    kind = quant_type(weight)
    if weight.permutation is not None or weight.scales.dtype != torch.float32 or weight.offsets is not None:
        raise fail("quant.bitsandbytes.write", "weight", weight, "float32 scales alone", error=FormatError)
    absmax, block_size = _blocks(weight)
    state = State4bit(_flat_codes(weight), absmax, kind, block_size, weight.shape)
    return (state.with_nested_scales() if nested else state).tensors()


def _blocks(weight: QuantizedWeight) -> tuple[Tensor, int]:
    """The scales of the smallest blocks that a file may have, and their size."""
    size, scales = weight.group_size, weight.scales.flatten()
    for block_size in BLOCK_SIZES if weight.in_features % size == 0 else ():
        if block_size % size:
            continue
        groups = block_size // size
        last = scales[-1:].expand(-scales.numel() % groups)
        by_block = torch.cat([scales, last]).view(-1, groups)
        if torch.equal(by_block.view(torch.int32), by_block[:, :1].expand(-1, groups).contiguous().view(torch.int32)):
            return by_block[:, 0].contiguous(), block_size
    expected = f"parts of blocks of {BLOCK_SIZES} elements that share a scale, whole ones in every row"
    raise fail("quant.bitsandbytes.write", "group_size", size, expected, error=FormatError)


def _flat_codes(weight: QuantizedWeight) -> Tensor:
    """The codes of the flat weight, the even element in the high nibble: (⌈N · K / 2⌉)."""
    rows, columns = weight.shape
    codes = weight.in_rows().codes
    if columns % 2 == 0:
        return (codes << 4 | codes >> 4).flatten()
    packed = torch.empty(-(-rows * columns // 2), dtype=torch.uint8, device=codes.device)
    nothing = _CODES[quant_type(weight)].index(0)  # fills the last byte
    for part in blocks(rows, columns, 2):  # an even number of rows begins with a byte
        nibbles = unpack_codes(codes[part], 4, columns).flatten()
        pairs = torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2), value=nothing).view(-1, 2)
        packed[part.start * columns // 2 : -(-part.stop * columns // 2)] = pairs[:, 0] << 4 | pairs[:, 1]
    return packed


def _check_weight(op: str, weight: Tensor) -> None:
    require_dense(op, "weight", weight)
    if weight.dtype not in _FLOATS.values():
        raise fail(op, "weight", weight.dtype, "a float32, bfloat16 or float16 tensor", error=TypeError)
    if weight.dim() != 2 or 0 in weight.shape:
        raise fail(op, "weight", f"shape {tuple(weight.shape)}", "(out_features, in_features), neither of them 0")
