"""QuantizedWeight: the canonical form of a low-bit weight, to which every format lowers and from which kernels compute.

In float32, with g = j // group_size the group of stored column j:
value = codebook[code] or code - zero - zeros[n, g], W[n, permutation[j]] = value · scale[n, g] + offset[n, g].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.memory import allocate
from metate.scalars import is_whole, plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Weight = TypeVar("Weight", bound="LowBitTensors")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes < 2**bits → (N, ⌈K · bits / 8⌉) bytes: column j from bit j · bits of its row, LSB first."""
    rows, columns = codes.shape
    period = torch.nn.functional.pad(codes, (0, -columns % 8)).unflatten(1, (-1, 8))  # 8 columns fill `bits` bytes
    packed = codes.new_zeros(rows, period.shape[1], bits)
    for column in range(8):
        byte, shift = divmod(column * bits, 8)
        packed[:, :, byte] |= period[:, :, column] << shift
        if shift + bits > 8:
            packed[:, :, byte + 1] |= period[:, :, column] >> (8 - shift)
    return packed.flatten(1)[:, : packed_bytes(columns, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: (N, columns) uint8."""
    period = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = packed.new_empty(packed.shape[0], period.shape[1], 8)
    for column in range(8):
        byte, shift = divmod(column * bits, 8)
        code = period[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | period[:, :, byte + 1] << (8 - shift)
        codes[:, :, column] = code & (2**bits - 1)
    return codes.flatten(1)[:, :columns].contiguous()


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(-columns * bits // 8)


ROWS_OF_TILE = 16  # csrc/quant_linear.h
TILES = torch.int32  # the dtype of codes in tiles


def tiles_of(rows: Tensor) -> Tensor:
    """(…, N, K / 2) bytes of 4-bit codes → (…, N, K / 8) int32 in tiles: dword j of row 16 t + r is number 16 j + r of
    the 16 rows from 16 t on. As many bytes in another order, of which a CPU reads few rows as one stream."""
    words = rows.contiguous().view(TILES)
    tiles = words.unflatten(-2, (-1, ROWS_OF_TILE)).transpose(-1, -2)
    result = allocate(words.shape, TILES, rows.device)
    result.view(tiles.shape).copy_(tiles)
    return result


def rows_of(codes: Tensor) -> Tensor:
    """The bytes of every row of codes, which may be in tiles."""
    if codes.dtype != TILES:
        return codes
    rows, words = codes.shape[-2:]
    tiles: Tensor = codes.unflatten(-2, (rows // ROWS_OF_TILE, ROWS_OF_TILE)).flatten(-2)
    tiles = tiles.unflatten(-1, (words, ROWS_OF_TILE)).transpose(-1, -2)
    return tiles.reshape(codes.shape).contiguous().view(torch.uint8)


def are_tiles(codes: Any) -> bool:
    """Whether codes, or what DTensor's rules see of them, are in tiles."""
    return bool(getattr(codes, "tensor_meta", codes).dtype == TILES)


TILES_NEED = "uint8; int32 is for 4 bits, 16 · n rows, 32 · n columns and groups of 32 · n or whole rows"


def fit_tiles(rows: Any, columns: Any, bits: int, group_size: int) -> bool:
    """Whether codes may be in tiles."""
    whole_groups = group_size % 32 == 0 or group_size >= columns
    return bits == 4 and rows > 0 and columns > 0 and rows % ROWS_OF_TILE == 0 and columns % 32 == 0 and whole_groups


def arranged(codes: Tensor, shape: tuple[int, ...], bits: int, group_size: int) -> Tensor:
    """Codes of weights (…, N, K) as they are read fastest where they are: tiles on a CPU, where they can be."""
    if codes.device.type != "cpu":
        return rows_of(codes)
    fit = codes.dtype != TILES and fit_tiles(shape[-2], shape[-1], bits, group_size)
    return tiles_of(codes) if fit else codes


def per_column(value: Tensor, group: int, columns: int) -> Tensor:
    """(N, groups of `group` columns) → (N, columns)."""
    return value.repeat_interleave(max(1, min(group, columns)), 1)[:, :columns]


def both_levels(fine: Tensor, coarse: Tensor | None, super_groups: int) -> Tensor:
    """(N, G) scales or offsets, with the super ones multiplied in."""
    return fine if coarse is None else fine.to(coarse.dtype) * per_column(coarse, super_groups, fine.shape[1])


def integers(codes: Tensor, zeros: Tensor | None, group_size: int, zero: int) -> Tensor:
    """code - zero - zeros[n, g] of unpacked codes: (N, K) int32."""
    values = codes.int() - zero
    return values if zeros is None else values - per_column(zeros.int(), group_size, codes.shape[1])


def int8_activations(x: Tensor, group_size: int) -> Tensor:
    """x with every chunk of a row rounded to whole multiples of its largest magnitude / 127.

    Chunks end at every 32nd column and where a group ends. The rounding is done in float32 whatever the dtype, so that
    every precision computes from the same integers.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    starts = (columns % 32 == 0) | (columns % group_size == 0)
    chunk = torch.cumsum(starts.int(), 0) - 1
    single = x.float()
    number = int(starts.sum())
    index = chunk.expand(x.shape[0], -1)
    largest = single.new_zeros(x.shape[0], number).scatter_reduce(1, index, single.abs(), "amax")
    steps = torch.full_like(largest, 127)  # 127 / largest would be a product with a rounded reciprocal
    inverse = steps / largest
    inverse = torch.where((largest > 0) & ~inverse.isinf(), inverse, torch.zeros_like(largest))
    whole = torch.round(single * inverse.gather(1, index))
    return whole.to(x.dtype) * (largest / 127).gather(1, index).to(x.dtype)


def stored_weight(
    codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None, offsets: Tensor | None,
    super_offsets: Tensor | None, codebook: Tensor | None, bits: int, group_size: int, super_groups: int, zero: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """W with its columns as they are stored, (N, columns), in the dtype of the scales (of the super scales)."""
    unpacked = unpack_codes(rows_of(codes), bits, columns)
    scale = per_column(both_levels(scales, super_scales, super_groups), group_size, columns)
    if codebook is not None:
        weight = codebook[unpacked.int()].to(scale.dtype) * scale
    else:
        weight = integers(unpacked, zeros, group_size, zero).to(scale.dtype) * scale
    if offsets is None:
        return weight
    return weight + per_column(both_levels(offsets, super_offsets, super_groups), group_size, columns)


def level_gradients(
    d_weight: Tensor, tensors: Any, scalars: tuple[int, ...], codebook_learns: bool
) -> list[Tensor | None]:
    """Of the tensors from codes to codebook, from the gradient of W with its columns as they are stored."""
    codes, scales, super_scales, zeros, offsets, super_offsets, codebook = tensors
    bits, group_size, super_groups, zero = scalars
    wide = d_weight.dtype
    unpacked = unpack_codes(rows_of(codes), bits, d_weight.shape[1])
    if codebook is not None:
        values = codebook.to(wide)[unpacked.int()]
    else:
        values = integers(unpacked, zeros, group_size, zero).to(wide)
    d_scale = _sum_groups(d_weight * values, group_size)
    found: list[Tensor | None] = [None] * 7
    found[1], found[2] = _both_gradients(d_scale, scales, super_scales, super_groups)
    if offsets is not None:
        d_offset = _sum_groups(d_weight, group_size)
        found[4], found[5] = _both_gradients(d_offset, offsets, super_offsets, super_groups)
    if codebook is not None and codebook_learns:
        level = both_levels(scales, super_scales, super_groups).to(wide)
        shares = d_weight * per_column(level, group_size, d_weight.shape[1])
        zero_sum = torch.zeros(codebook.shape[0], dtype=wide, device=codebook.device)
        found[6] = zero_sum.index_add(0, unpacked.flatten().int(), shares.flatten()).to(codebook.dtype)
    return found


def _both_gradients(
    d_level: Tensor, fine: Tensor, coarse: Tensor | None, super_groups: int
) -> tuple[Tensor | None, Tensor | None]:
    if coarse is None:
        return d_level.to(fine.dtype), None
    return None, _sum_groups(d_level * fine.to(d_level.dtype), super_groups).to(coarse.dtype)


def _sum_groups(x: Tensor, group: int) -> Tensor:
    """(N, columns) → (N, groups): sums over the columns of each group."""
    columns = x.shape[1]
    group = max(1, min(group, columns))
    padded: Tensor = torch.nn.functional.pad(x, (0, -columns % group))
    return padded.reshape(x.shape[0], padded.shape[1] // group, group).sum(2)


def validate_weight(
    op: str, x: Tensor, tensors: Any, bits: int, group_size: int, super_groups: int, zero: int, columns: Any
) -> None:
    """What the tensors of a weight, or of a stack of weights, must be to each other and to the columns of x."""
    codes, scales, super_scales, zeros, offsets, super_offsets, codebook, _ = tensors
    for name, value, least, most in (("bits", bits, 1, 8), ("group_size", group_size, 1, 2**62),
                                     ("super_groups", super_groups, 0, 2**62), ("zero", zero, 0, 255)):  # fmt: skip
        if not least <= value <= most:
            raise fail(op, name, value, f"{least} to {most}")
    groups = ceil_div(columns, group_size)
    supers = ceil_div(groups, super_groups) if super_groups else 0
    in_tiles = codes.dtype == TILES
    if in_tiles and not fit_tiles(codes.shape[-2], columns, bits, group_size):
        got = f"int32 for {codes.shape[-2]} × {columns} weights of {bits} bits in groups of {group_size}"
        raise fail(op, "codes", got, TILES_NEED)
    line = columns // 8 if in_tiles else packed_bytes(columns, bits)
    widths = [("codes", codes, line), ("scales", scales, groups), ("zeros", zeros, groups),
              ("offsets", offsets, groups), ("super_scales", super_scales, supers),
              ("super_offsets", super_offsets, supers)]  # fmt: skip
    for name, tensor, width in widths:
        if tensor is not None and tensor.shape[-1] != width:
            expected = f"({codes.shape[-2]}, {width}) for {columns} columns of {bits} bits in groups of {group_size}"
            raise fail(op, name, f"of shape {tuple(tensor.shape)}", expected)
    if codebook is not None and codebook.shape[0] != 2**bits:
        raise fail(op, "codebook", f"of {codebook.shape[0]} values", f"2**bits = {2**bits}")
    if codebook is not None and (zero or zeros is not None):
        raise fail(op, "codebook", "given beside zero or zeros", "one or the other")
    for name, fine, coarse in (("scales", scales, super_scales), ("offsets", offsets, super_offsets)):
        if (fine is not None and fine.dtype == torch.int8) != (coarse is not None):
            got = "None" if coarse is None else "given"
            raise fail(op, f"super_{name}", got, f"a tensor beside int8 {name}, None otherwise")
    for name, tensor in (("scales", scales), ("offsets", offsets), ("super_scales", super_scales),
                         ("super_offsets", super_offsets), ("codebook", codebook)):  # fmt: skip
        if tensor is not None and tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise fail(op, name, "float64", f"float32 beside {x.dtype}", error=TypeError)


def reading_rows(**refuses: Callable[..., str | None]) -> dict[str, Callable[..., str | None]]:
    """The refusals of an operator whose second argument is codes: those given, and of backends that read no tiles."""

    def refusal(backend: str) -> Callable[..., str | None]:
        def refuse(x: Tensor, codes: Tensor, *rest: Any) -> str | None:
            if codes.dtype == TILES:
                return "codes in tiles: in rows (QuantizedWeight.in_rows)"
            return refuses[backend](x, codes, *rest) if backend in refuses else None

        return refuse

    return {**refuses, "cuda": refusal("cuda"), "triton": refusal("triton")}


def ceil_div(a: Any, b: int) -> Any:
    return (a + b - 1) // b


class LowBitTensors:
    """What one weight and a stack of them have in common: fields that are tensors, or None, and numbers.

    arguments, scalars: the tensors and the numbers in the order of the operators.
    """

    shape: tuple[int, ...]
    codes: Tensor
    arguments: tuple[Any, ...]
    scalars: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        tensors = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "codebook", "permutation")
        numbers = ("bits", "group_size", "super_groups", "zero")
        for name in numbers:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name, fields in (("arguments", tensors), ("scalars", numbers)):
            object.__setattr__(self, name, tuple(getattr(self, field) for field in fields))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by field, in the order of the fields."""
        found = ((field.name, self.__dict__[field.name]) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: tensor for name, tensor in found if isinstance(tensor, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def data(self) -> Tensor:
        """Nothing, as `hasattr` says: of a tensor it would be what PEFT merges an adapter into."""
        raise AttributeError(
            f"metate.{type(self).__name__}: low-bit weights have no data to add to; to merge PEFT's adapters call "
            "metate.compat.peft.enable() before PEFT adapts the model, or metate.nn.dequantize_model before merging"
        )

    @property
    def learns(self) -> bool:
        """Whether something that makes the weights asks for a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors.values())

    def to(self: Weight, device: torch.device | str) -> Weight:
        """The same weights on another device; codes in tiles become rows where that is no CPU."""
        weight = self if torch.device(device).type == "cpu" else self.in_rows()
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
        return dataclasses.replace(weight, **moved)  # type: ignore[type-var]

    def in_tiles(self: Weight) -> Weight:
        """The same weights with their codes in the order in which they are read fastest, for all calls to come.

        That takes no more memory, only another order: 4-bit codes of 16 rows interleaved, as `tiles_of` has them. The
        results are the same, bit for bit. Other bits, numbers of rows that are no multiple of 16 and of columns that
        are none of 32, and groups that are neither a multiple of 32 nor a row stay as they are, and so does what is on
        other devices. Layers of metate.nn do this as they are made.
        """
        return self._with(arranged(self.codes, self.shape, *self.scalars[:2]))

    def in_rows(self: Weight) -> Weight:
        """The same weights with the bytes of every row of codes side by side, as `pack_codes` has them."""
        return self._with(rows_of(self.codes))

    def _with(self: Weight, codes: Tensor) -> Weight:
        return self if codes is self.codes else dataclasses.replace(self, codes=codes)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight(LowBitTensors):
    """A weight [out_features N, in_features K] in low-bit codes. Checked as it is made: FormatError names the field.

    shape: (N, K).
    bits: 1 to 8, of a code.
    group_size: columns that share a scale; G = ⌈K / group_size⌉, the last group may be short.
    codes: (N, ⌈K · bits / 8⌉) uint8, as `pack_codes` packs them; or (N, K / 8) int32, in tiles: see `in_tiles`.
    scales: (N, G) float32, bfloat16 or float16; or int8: scale = float(scales) · super_scales[n, g // super_groups].
    super_scales: (N, ⌈G / super_groups⌉) float32, bfloat16 or float16, beside int8 scales only.
    super_groups: groups that share a super scale (and a super offset); 0 where there is none.
    zero: 0 to 255, one for the whole weight.
    zeros: (N, G) uint8, or None.
    offsets: (N, G) like scales, int8 ones with super_offsets, or None.
    codebook: (2**bits) float32, or None; excludes zero and zeros.
    permutation: (K) int32: stored column j holds the weight of input feature permutation[j]; None: of j.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor
    super_scales: Tensor | None = None
    super_groups: int = 0
    zero: int = 0
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    super_offsets: Tensor | None = None
    codebook: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self._check_sizes()
        grouped = (rows, self.groups)
        supers = (rows, -(-self.groups // self.super_groups) if self.super_groups else 0)
        self._check_codes(rows, columns)
        self._check("scales", grouped, *FLOATS, torch.int8)
        self._check("zeros", grouped, torch.uint8)
        self._check("offsets", grouped, *FLOATS, torch.int8)
        self._check("super_scales", supers, *FLOATS)
        self._check("super_offsets", supers, *FLOATS)
        self._check("codebook", (2**self.bits,), torch.float32)
        self._check("permutation", (columns,), torch.int32)
        self._check_super("scales", self.scales, self.super_scales)
        self._check_super("offsets", self.offsets, self.super_offsets)
        if bool(self.super_groups) != (self.super_scales is not None or self.super_offsets is not None):
            raise _fail("super_groups", self.super_groups, "0 without super_scales and super_offsets, 1 or more with")
        if self.codebook is not None and (self.zero or self.zeros is not None):
            raise _fail("codebook", "given beside zero or zeros", "one or the other")
        self._check_permutation()

    def _check_sizes(self) -> tuple[int, int]:
        shape = tuple(map(plain, self.shape)) if isinstance(self.shape, tuple) else self.shape
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(is_whole(size, 0, 2**48) for size in shape):
            raise _fail("shape", shape, "a tuple of 2 integers (out_features, in_features)")
        if not is_whole(self.bits, 1, 8):
            raise _fail("bits", self.bits, "1 to 8")
        if not is_whole(self.group_size, 1, 2**62):
            raise _fail("group_size", self.group_size, "1 or more; in_features for one group a row")
        if not is_whole(self.super_groups, 0, 2**62):
            raise _fail("super_groups", self.super_groups, "0 or more")
        if not is_whole(self.zero, 0, 255):
            raise _fail("zero", self.zero, "0 to 255")
        object.__setattr__(self, "shape", shape)
        return shape

    def _check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        tensor = self.__dict__[name]
        if tensor is None and name not in ("codes", "scales"):
            return
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            got = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _fail(name, got, "a dense torch.Tensor")
        if tensor.dtype not in dtypes:
            raise _fail(name, tensor.dtype, " or ".join(map(str, dtypes)))
        if tuple(tensor.shape) != shape:
            raise _fail(name, f"shape {tuple(tensor.shape)}", f"{shape} for {self._summary()}")
        if tensor.device != self.codes.device:
            raise _fail(name, f"on {tensor.device}", f"{self.codes.device} like codes; move it with .to()")

    def _check_codes(self, rows: int, columns: int) -> None:
        in_tiles = isinstance(self.codes, Tensor) and self.codes.dtype == TILES
        if in_tiles and not fit_tiles(rows, columns, self.bits, self.group_size):
            raise _fail("codes", "int32", TILES_NEED)
        line = columns // 8 if in_tiles else packed_bytes(columns, self.bits)
        self._check("codes", (rows, line), TILES if in_tiles else torch.uint8)

    def _check_super(self, name: str, fine: Tensor | None, coarse: Tensor | None) -> None:
        two_level = fine is not None and fine.dtype == torch.int8
        if two_level != (coarse is not None):
            got = "None" if coarse is None else "given"
            raise _fail(f"super_{name}", got, f"a tensor beside int8 {name}, None otherwise")

    def _check_permutation(self) -> None:
        if self.permutation is None or self.permutation.is_meta:
            return
        seen = torch.zeros(self.in_features, dtype=torch.bool, device=self.permutation.device)
        inside = (self.permutation >= 0) & (self.permutation < self.in_features)
        seen[self.permutation[inside].long()] = True
        if not bool(seen.all()):
            raise _fail("permutation", "not one", f"every number from 0 to {self.in_features - 1} once")

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def groups(self) -> int:
        """G: groups of a row."""
        return -(-self.in_features // self.group_size)

    @property
    def dtype(self) -> torch.dtype:
        """uint8, that of codes: no floating-point dtype, for those who ask a layer's weight."""
        return torch.uint8

    @property
    def bits_per_weight(self) -> float:
        """With everything that stands beside the codes."""
        return self.nbytes * 8 / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """W, (out_features, in_features): computed in float32, rounded to `dtype`.

        out: written and returned in place of a new tensor, then in its dtype. Without it gradients reach what makes W.
        """
        return self.dense(torch.ops.metate.dequantize, dtype, out)

    def dense(self, operator: Callable[..., None], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """`dequantize` by metate::dequantize, called in any way."""
        if out is None and torch.is_grad_enabled() and self.learns:
            return self._formula().to(dtype)
        if (dtype if out is None else out.dtype) not in FLOATS:
            single = self.dense(operator, torch.float32, None)
            return single.to(dtype) if out is None else out.copy_(single)
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        operator(out, *self.arguments, *self.scalars)
        return out

    def _formula(self) -> Tensor:
        """W in operators of torch, in float32."""
        arguments: list[Any] = [x.float() if _is_low(x) else x for x in self.arguments]
        permutation = arguments.pop()
        arguments += [*self.scalars, self.in_features]
        weight = stored_weight(*arguments)
        return weight if permutation is None else weight[:, torch.argsort(permutation.long())]

    def _summary(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]} weights, {self.bits} bits, groups of {self.group_size}"

    def __repr__(self) -> str:
        beside = ", ".join(name for name in self.tensors if name not in ("codes", "scales"))
        return f"QuantizedWeight({self._summary()}{', ' + beside if beside else ''})"


def _is_low(x: Tensor | None) -> bool:
    return x is not None and x.dtype in FLOATS


def _fail(field: str, got: object, expected: str) -> Exception:
    return fail("QuantizedWeight", field, got, expected, error=FormatError)
