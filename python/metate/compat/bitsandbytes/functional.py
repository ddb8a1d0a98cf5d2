"""bitsandbytes.functional: blockwise 4- and 8-bit quantisation with its states, and products with such weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from metate.compat.bitsandbytes import maps
from metate.errors import FormatError, fail
from metate.low_bit import ROWS_OF_TILE, TILES, fit_tiles, rows_of, tiles_of
from metate.ops.quant_linear import QuantizedWeight, quant_linear
from metate.quant import bitsandbytes as format
from metate.quant.settings import Settings, json_bytes, parse_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIX = format.STATE

create_dynamic_map, create_linear_map = maps.create_dynamic_map, maps.create_linear_map
create_normal_map, create_fp8_map = maps.create_normal_map, maps.create_fp8_map


class QuantState:
    """What undoes a blockwise quantisation: scales, codebook, shape; `state2` quantises the scales themselves."""

    def __init__(
        self, absmax: Tensor, shape: torch.Size | None = None, code: Tensor | None = None,
        blocksize: int | None = None, quant_type: str | None = None, dtype: torch.dtype | None = None,
        offset: Tensor | None = None, state2: QuantState | None = None,
    ) -> None:  # fmt: skip
        self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize
        self.quant_type, self.dtype, self.offset, self.state2 = quant_type, dtype, offset, state2
        self._lowered: tuple[Any, QuantizedWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lowered": None}  # a view of the weight

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    # Every entry of a state dict is an attribute too: FSDP looks them up one by one.

    @property
    def quant_map(self) -> Tensor | None:
        return self.code

    @property
    def nested_absmax(self) -> Tensor | None:
        return None if self.state2 is None else self.state2.absmax

    @property
    def nested_quant_map(self) -> Tensor | None:
        return None if self.state2 is None else self.state2.code

    def __getattr__(self, name: str) -> Any:
        if name == "bitsandbytes__" + str(self.__dict__.get("quant_type")):
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def scales(self) -> Tensor:
        """The float32 scale of every block."""
        if self.state2 is None or self.offset is None:
            return self.absmax
        return dequantize_blockwise(self.absmax, self.state2).float() + self.offset

    def lower(self, packed: Tensor) -> QuantizedWeight:
        """The canonical form of a packed 4-bit weight (out_features, in_features), made once.

        Rows of whole bytes, and tiles, are taken as they are: a byte holds an even column in its high nibble, hence the
        pairs of columns change places.
        """
        if self._lowered is not None and is_dynamo_compiling():  # see _same_memory
            return self._lowered[1]
        shape, quant_type, block_size = self.shape, self.quant_type, self.blocksize
        if shape is None or len(shape) != 2 or quant_type is None or block_size is None:
            raise fail("compat.bitsandbytes", "quant_state.shape", shape, "(out_features, in_features)")
        rows, columns = shape
        data, copies = _bytes(packed), columns % block_size != 0 or columns % 2 != 0
        version = packed._version if copies and not packed.is_inference() else 0
        key = (data.data_ptr(), data.device, version, self.absmax)
        if self._lowered is None or any(a is not b and a != b for a, b in zip(self._lowered[0], key, strict=True)):
            if copies:
                state = format.State4bit(data, self.scales(), quant_type, block_size, (rows, columns))
                weight = state.lower()
            else:
                swapped = torch.arange(columns, dtype=torch.int32, device=data.device) ^ 1
                codes = (data.view(TILES) if packed.dim() == IN_TILES else data).view(rows, -1)
                weight = QuantizedWeight(
                    (rows, columns), 4, block_size, codes, self.scales().view(rows, -1),
                    codebook=format.codebook(quant_type).to(data.device), permutation=swapped,
                )  # fmt: skip
            self._lowered = key, weight
        return self._lowered[1]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """From the tensors beside a weight of a checkpoint, or from what `as_dict()` gives."""
        given = {name.rpartition(".")[2]: value for name, value in qs_dict.items()}
        packed = [name for name in given if name.startswith("bitsandbytes__")]
        if "quant_type" not in given:
            if len(packed) != 1:
                got = f"given {len(packed)} times"
                raise fail("QuantState.from_dict", "quant_state.bitsandbytes__*", got, "one, or unpacked members")
            text = given.pop(packed[0]).cpu().numpy().tobytes()
            given |= parse_json(text, "quant_state", 1 << 16)
        missing = next((name for name in ("absmax", "quant_map", "dtype") if name not in given), None)
        if missing is not None:
            raise fail("QuantState.from_dict", missing, "missing", "an entry", error=FormatError)
        numbers = Settings("quant_state", {name: _plain(value) for name, value in given.items()})
        kind = numbers.text("quant_type", None, "nf4", "fp4")
        dtype = _DTYPES[numbers.text("dtype", "float32", *_DTYPES) or "float32"]
        offset = second = None
        if "nested_absmax" in given:
            numbers.text("nested_dtype", "float32", "float32")
            offset = torch.tensor(numbers.number("nested_offset"), dtype=torch.float32, device=device)
            second = cls(
                given["nested_absmax"].to(device), code=given["nested_quant_map"].to(device),
                blocksize=numbers.integer("nested_blocksize", None, 1, 2**31), dtype=torch.float32,
            )  # fmt: skip
        return cls(
            given["absmax"].to(device), _shape(given.get("shape"), kind), given["quant_map"].to(device),
            numbers.integer("blocksize", None, 32 if kind else 1, 4096 if kind else 2**31), kind, dtype, offset, second,
        )  # fmt: skip

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Members by name; packed: tensors alone, the rest as JSON in one of them."""
        members: dict[str, Any] = {
            "quant_type": self.quant_type, "absmax": self.absmax, "blocksize": self.blocksize,
            "quant_map": self.code, "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }  # fmt: skip
        if self.state2 is not None and self.offset is not None:
            members |= {
                "nested_absmax": self.state2.absmax, "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": None if self.state2.code is None else self.state2.code.clone(),
                "nested_dtype": _name(self.state2.dtype), "nested_offset": self.offset.item(),
            }  # fmt: skip
        if not packed or self.quant_type is None:
            return members
        tensors = {name: value for name, value in members.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in members.items() if name not in tensors}
        return {**tensors, _PREFIX + self.quant_type: json_bytes(others)}

    def to(self, device: torch.device | str | None) -> None:
        """Moves it, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        self._lowered = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        plain = all(getattr(self, n) == getattr(other, n) for n in ("shape", "dtype", "blocksize", "quant_type"))
        tensors = all(_close(getattr(self, n), getattr(other, n)) for n in ("absmax", "code", "offset"))
        return plain and tensors and self.state2 == other.state2

    __hash__ = None  # type: ignore[assignment]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6)


def _shape(given: Any, kind: str | None) -> torch.Size | None:
    """The shape in a state; states of 8 bits, which have no kind, need none."""
    if given is None and kind is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise fail("QuantState.from_dict", "shape", repr(given)[:60], "a list of sizes", error=FormatError)
    sizes = Settings("quant_state shape", dict(enumerate(given)))  # type: ignore[arg-type]
    return torch.Size(sizes.integer(i, None, 0, 2**40) for i in sizes.values)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return is_dynamo_compiling() or a.data_ptr() == b.data_ptr()  # graphs compare no addresses


def _plain(value: Any) -> Any:
    """A member as JSON would have it."""
    return _name(value) if isinstance(value, torch.dtype) else value


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(packed: Tensor) -> Tensor:
    return packed.detach().contiguous().flatten().view(torch.uint8)


# Layers have packed weights in tiles on a CPU, which makes them (out_features / 16, in_features / 8, 64 bytes): as much
# memory, told by its shape, and the same results from the fastest read.
IN_TILES = 3


def pack_tiles(packed: Tensor, state: QuantState) -> Tensor:
    """A packed 4-bit weight in tiles, where it can be; as it is otherwise."""
    shape = state.shape
    if packed.dim() == IN_TILES or packed.device.type != "cpu" or shape is None or len(shape) != 2:
        return packed
    rows, columns = shape
    if columns % int(state.blocksize or 1) or not fit_tiles(rows, columns, 4, int(state.blocksize or 1)):
        return packed
    tiles = tiles_of(_bytes(packed).view(rows, columns // 2))
    return tiles.view(packed.dtype).view(rows // ROWS_OF_TILE, columns // 8, -1)


def unpack_tiles(packed: Tensor) -> Tensor:
    """The rows of a packed 4-bit weight that may be in tiles, (…, 1)."""
    if packed.dim() != IN_TILES:
        return packed
    tiles = _bytes(packed).view(TILES).view(ROWS_OF_TILE * packed.shape[0], packed.shape[1])
    return rows_of(tiles).view(packed.dtype).view(-1, 1)


def _floating(op: str, A: Tensor) -> None:
    if A.dtype not in _DTYPES.values():
        raise fail(op, "A", A.dtype, "float32, bfloat16 or float16")


# 4 bits.


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of "nf4" or "fp4"."""
    if typename not in ("nf4", "fp4"):
        raise NotImplementedError(f"metate.get_4bit_type: typename is {typename!r}, expected 'nf4' or 'fp4'")
    return format.codebook(typename).to(device or "cpu", copy=True)


def quantize_4bit(
    A: Tensor, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None,
    compress_statistics: bool = False, quant_type: str = "fp4", quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """(packed (…, 1), state) of a tensor of any shape, bit for bit those of bitsandbytes on a CPU."""
    _floating("quantize_4bit", A)
    if quant_type not in ("nf4", "fp4"):
        raise fail("quantize_4bit", "quant_type", repr(quant_type), "'nf4' or 'fp4'")
    made = format.quantize_4bit(A.reshape(1, -1), quant_type, blocksize or 64, compress_statistics)
    offset = second = None
    if made.nested_absmax is not None:
        offset = torch.tensor(made.nested_offset, dtype=torch.float32, device=A.device)
        second = QuantState(
            made.nested_absmax, code=made.nested_map, blocksize=made.nested_size, dtype=torch.float32
        )  # fmt: skip
    packed = made.packed
    if quant_storage != torch.uint8:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % quant_storage.itemsize)).view(quant_storage)
    scales = made.absmax if absmax is None else absmax.copy_(made.absmax)
    state = QuantState(
        scales, A.shape, get_4bit_type(quant_type, A.device), made.block_size, quant_type, A.dtype, offset, second
    )
    return (packed[:, None] if out is None else out.copy_(packed[:, None])), state


def dequantize_4bit(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int | None = None, quant_type: str = "fp4",
) -> Tensor:  # fmt: skip
    """The tensor of `quant_state.shape`; a packed (1, …) one comes back transposed, as there."""
    if quant_state is None:
        if absmax is None or out is None:
            raise fail("dequantize_4bit", "quant_state", None, "one, or absmax and out")
        quant_state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    shape, block_size, dtype = quant_state.shape, quant_state.blocksize, quant_state.dtype
    if shape is None or dtype is None or block_size not in format.BLOCK_SIZES:
        raise fail("dequantize_4bit", "quant_state", quant_state.as_dict(), "a shape, dtype and blocksize")
    A = unpack_tiles(A)
    flat = torch.empty(shape.numel() + shape.numel() % 2, dtype=dtype, device=A.device)
    _dequantize_blocks(flat, _bytes(A), quant_state.scales().float(), str(quant_state.quant_type), block_size, shape)
    result = flat[: shape.numel()].view(shape) if out is None else out.copy_(flat[: shape.numel()].view(shape))
    return result.t() if A.shape[0] == 1 and A.dim() == 2 and result.dim() == 2 else result


def _dequantize_blocks(
    flat: Tensor, packed: Tensor, scales: Tensor, quant_type: str, block_size: int, shape: torch.Size
) -> None:
    """Of an even number of elements: rows of whole blocks, and the elements of a last block that is none."""
    table = format.codebook(quant_type).to(flat.device)
    columns = shape[-1] if len(shape) > 1 and shape[-1] and shape[-1] % block_size == 0 else block_size
    whole = flat.numel() // columns * columns
    for part, width in ((slice(0, whole), columns), (slice(whole, flat.numel()), flat.numel() - whole)):
        if part.start == part.stop:
            continue
        rows, swapped = flat[part].view(-1, width), torch.arange(width, dtype=torch.int32, device=flat.device) ^ 1
        codes = packed[part.start // 2 : part.stop // 2].view(-1, width // 2)
        levels = scales[part.start // block_size : -(-part.stop // block_size)].view(rows.shape[0], -1)
        torch.ops.metate.dequantize(
            rows, codes, levels, None, None, None, None, table, swapped, 4, min(block_size, width), 0, 0
        )


quantize_fp4, quantize_nf4 = partial(quantize_4bit, quant_type="fp4"), partial(quantize_4bit, quant_type="nf4")
dequantize_fp4, dequantize_nf4 = partial(dequantize_4bit, quant_type="fp4"), partial(dequantize_4bit, quant_type="nf4")


def gemv_4bit(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:  # fmt: skip
    """A Wᵀ of the packed weight B, for any number of rows of A."""
    if state is None:
        raise fail("gemv_4bit", "state", None, "the QuantState of B")
    result = quant_linear(A, state.lower(B))
    return result if out is None else out.copy_(result)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A Wᵀ + bias with gradients to A and bias, of the packed weight B or its transpose.

    A weight that was quantised as (in_features, out_features) is unpacked at every call, with a DeprecationWarning.
    """
    if quant_state is None:
        raise fail("matmul_4bit", "quant_state", None, "the QuantState of B")
    shape = quant_state.shape
    if shape is not None and len(shape) == 2 and A.shape[-1] == shape[0] != shape[1]:
        text = f"matmul_4bit: quant_state.shape is {tuple(shape)}; quantize the weight as (out_features, in_features)"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        weight = dequantize_4bit(unpack_tiles(B).view(-1, 1), quant_state).to(A.dtype)
        result = torch.nn.functional.linear(A, weight.t(), bias)
    else:
        result = quant_linear(A, quant_state.lower(B), bias)
    return result if out is None else out.copy_(result)


# 8 bits.


def quantize_blockwise(
    A: Tensor, code: Tensor | None = None, absmax: Tensor | None = None, out: Tensor | None = None,
    blocksize: int = 4096, nested: bool = False,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """(indices into `code`, state): blocks divided by their absmax, nearest value; the dynamic 8-bit map by default."""
    _floating("quantize_blockwise", A)
    if blocksize < 1:
        raise fail("quantize_blockwise", "blocksize", blocksize, "1 or more")
    code = (format.dynamic_map() if code is None else code).to(A.device, copy=True)
    index, scales = format.nearest_in_blocks(A.reshape(-1).float(), blocksize, code)
    offset = second = None
    if nested:
        offset = scales.mean()
        scales, second = quantize_blockwise(scales - offset, blocksize=blocksize)
    scales = scales if absmax is None else absmax.copy_(scales)
    state = QuantState(scales, None, code, blocksize, None, A.dtype, offset, second)
    index = index.view(A.shape)
    return (index if out is None else out.copy_(index)), state


def dequantize_blockwise(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, code: Tensor | None = None,
    out: Tensor | None = None, blocksize: int = 4096, nested: bool = False,
) -> Tensor:  # fmt: skip
    """The inverse of `quantize_blockwise`."""
    if A.dtype != torch.uint8:
        raise fail("dequantize_blockwise", "A", A.dtype, "uint8")
    if quant_state is None:
        if absmax is None:
            raise fail("dequantize_blockwise", "quant_state", None, "one, or absmax")
        code = format.dynamic_map() if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    if quant_state.code is None or quant_state.blocksize is None:
        raise fail("dequantize_blockwise", "quant_state", "without code or blocksize", "both")
    scale = quant_state.scales().float().repeat_interleave(min(quant_state.blocksize, max(1, A.numel())))
    values = quant_state.code.to(A.device)[A.flatten().int()].float() * scale[: A.numel()]
    result = values.view(A.shape).to(quant_state.dtype)
    return result if out is None else out.copy_(result)


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """(int8 rows, their absmax, columns with a value of `threshold` or more, which are left out of both)."""
    flat = A.reshape(-1, A.shape[-1])
    outliers = None
    if threshold > 0:
        large = flat.abs() >= threshold
        outliers = large.any(0).nonzero().flatten()
        flat = flat.masked_fill(large, 0)
    made = format.quantize_int8(flat)
    rows = made["weight"]
    if outliers is not None:
        rows[:, outliers] = 0
    return rows.view(A.shape), made["SCB"], outliers


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Float32 rows of int8 ones and their absmax."""
    return A * stats.view(-1, 1) * (1 / 127)


def int8_linear_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32
) -> Tensor:  # fmt: skip
    """A Bᵀ of int8 numbers, in int32: exact."""
    if A.dtype != torch.int8 or B.dtype != torch.int8:
        raise fail("int8_linear_matmul", "A, B", f"{A.dtype}, {B.dtype}", "int8")
    result = torch._int_mm(A.reshape(-1, A.shape[-1]).contiguous(), B.contiguous().t())
    result = result.view(*A.shape[:-1], B.shape[0])
    return result if out is None else out.copy_(result)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Float16 values of an int32 product, by the absmax of the rows of either side, and the bias added."""
    result = A.view(-1, A.shape[-1]) * (row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)) * (1 / 127**2)
    result = (result if bias is None else result + bias).to(torch.float16)
    return result if out is None else out.copy_(result)


@dataclass
class MatmulLtState:
    """The int8 weight CB with the absmax SCB of its rows, and how to compute with it."""

    CB: Tensor | None = None
    SCB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    _lowered: tuple[Tensor, Tensor, QuantizedWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lowered": None}

    def reset_grads(self) -> None:
        self.CB = self.SCB = self._lowered = None

    def lower(self) -> QuantizedWeight:
        """The canonical form, made once; it takes as much memory as CB again."""
        if self.CB is None or self.SCB is None:
            raise fail("compat.bitsandbytes", "state", "without CB and SCB", "an int8 weight; call .to(device)")
        kept = self._lowered
        if kept is None or kept[1] is not self.SCB or not _same_memory(kept[0], self.CB):
            weight = format.lower_int8({"weight": self.CB.detach(), "SCB": self.SCB.float()})
            self._lowered = kept = (self.CB, self.SCB, weight)
        return kept[2]


def matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, state: MatmulLtState | None = None, threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A Wᵀ + bias of an int8 weight; a weight that is still floating is used as it is.

    Activations stay floating where bitsandbytes rounds them to 8 bits, hence outliers (`threshold`) need no care.
    """
    if B.dtype == torch.int8:
        if state is None:
            raise fail("matmul", "state", None, "the MatmulLtState of B")
        result = quant_linear(A, state.lower(), bias)
    else:
        result = torch.nn.functional.linear(A, Tensor.to(B, A.dtype), None if bias is None else bias.to(A.dtype))
    return result if out is None else out.copy_(result)
