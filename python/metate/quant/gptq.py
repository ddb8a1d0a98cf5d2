"""GPTQ checkpoints: qweight packed along the inputs, qzeros along the outputs, g_idx, two conventions for zero points.

"gptq" (v1) stores a zero point minus one, "gptq_v2" as it is. Labels are known to lie, so symmetric checkpoints, whose
every zero point must be 2**(bits - 1), are read by their data, and what fits neither convention is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.low_bit import FLOATS, QuantizedWeight, pack_codes, unpack_codes
from metate.memory import allocate
from metate.quant.patterns import Patterns
from metate.quant.settings import Settings, as_bytes, blocks, complain, take

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
_WORDS = (torch.int32, torch.int8, torch.int16, torch.int64)
_log = logging.getLogger("metate")


class Overrides:
    """The settings of each module: the first pattern of "dynamic" that matches its name overrides some."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._dynamic = settings, settings.section("dynamic")
        self._names = list(self._dynamic.values)
        self._patterns = Patterns(name[2:] if name[:2] in ("+:", "-:") else name for name in self._names)

    def of(self, module: str) -> Settings:
        place = self._patterns.first(module)
        if place is None:
            return self._settings
        name = self._names[place]
        if name.startswith("-:"):
            raise complain(module, "quantised", f"dense, for dynamic has {name!r}")
        return Settings(self._settings.what, {**self._settings.values, **self._dynamic.section(name).values})


def lower(tensors: Mapping[str, Tensor], settings: Settings, version: str | None = None) -> QuantizedWeight:
    """The tensors qweight, qzeros, scales and g_idx of a module. `version`, one of VERSIONS, overrides the label."""
    qweight = take(tensors, "qweight", *_WORDS, shape=(None, None))
    words, rows = qweight.shape
    word = qweight.element_size() * 8
    index = take(tensors, "g_idx", torch.int32, torch.int64, shape=(None,)) if "g_idx" in tensors else None
    if index is not None and index.numel() == 0:  # some writers leave it empty without desc_act
        index = None
    bits = _bits(settings, words * word, index)
    columns = words * word // bits
    if bits * columns != words * word or rows == 0 or columns == 0:
        raise complain("qweight", f"shape {tuple(qweight.shape)}", f"whole columns of {bits} bits")
    scales = take(tensors, "scales", *FLOATS, shape=(None, rows))
    zero, zeros = _zeros(tensors, settings, bits, scales.shape, version)
    codes = _transposed_bytes(qweight)
    group_size, permutation, chosen = _groups(index, settings, columns, scales.shape[0])
    if permutation is not None:
        codes = _permuted(codes, bits, permutation)
    if chosen is not None:
        scales, zeros = scales[chosen], None if zeros is None else zeros[chosen]
    return QuantizedWeight(
        (rows, columns), bits, group_size, codes, scales.t().contiguous(), zero=zero,
        zeros=None if zeros is None else zeros.t().contiguous(),
        permutation=None if permutation is None else permutation.int(),
    )  # fmt: skip


def _bits(settings: Settings, stored: int, index: Tensor | None) -> int:
    bits = settings.integer("bits", None, 1, 8) if "bits" in settings.values else 0
    if not bits and index is not None:
        bits = stored // index.numel()
    if bits not in BITS:
        raise complain("bits", bits or "unknown", f"one of {BITS} (in the configuration, or by the length of g_idx)")
    return bits


def _transposed_bytes(qweight: Tensor) -> Tensor:
    """(N, K · bits / 8): the words of a column one after another are the packed row of the canonical form."""
    words, rows = qweight.shape
    size = qweight.element_size()
    codes = allocate((rows, words * size), torch.uint8)
    for part in blocks(rows, words * size):
        codes[part] = as_bytes(qweight[:, part].t())
    return codes


def _permuted(codes: Tensor, bits: int, permutation: Tensor) -> Tensor:
    result = allocate(codes.shape, codes.dtype, codes.device)
    for part in blocks(codes.shape[0], permutation.numel()):
        result[part] = pack_codes(unpack_codes(codes[part], bits, permutation.numel())[:, permutation], bits)
    return result


def _groups(
    index: Tensor | None, settings: Settings, columns: int, groups: int
) -> tuple[int, Tensor | None, Tensor | None]:
    """Group size, the order of columns that makes groups consecutive, and the scales to take where not each in turn."""
    given = settings.group_size(columns, "group_size") if "group_size" in settings.values else 0
    if index is None:
        group_size = given or -(-columns // max(1, groups))
        if -(-columns // group_size) != groups:
            raise complain("scales", f"{groups} groups", f"{-(-columns // group_size)} of {group_size} columns")
        return min(group_size, columns), None, None
    if index.numel() != columns:
        raise complain("g_idx", f"{index.numel()} entries", f"{columns}, one a column")
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise complain("g_idx", f"from {int(index.min())} to {int(index.max())}", f"0 to {groups - 1}")
    ordered, order = index.long().sort(stable=True)
    permutation = None if torch.equal(order, torch.arange(columns, device=index.device)) else order
    group_size = min(given or -(-columns // groups), columns)
    expected = torch.arange(columns, device=index.device) // group_size
    if torch.equal(ordered, expected) and groups == -(-columns // group_size):
        return group_size, permutation, None
    starts = [0, *((ordered[1:] != ordered[:-1]).nonzero().flatten() + 1).tolist()]  # groups of unequal length
    group_size = math.gcd(*starts) or columns
    return group_size, permutation, ordered[::group_size]


def _zeros(
    tensors: Mapping[str, Tensor], settings: Settings, bits: int, shape: torch.Size, version: str | None
) -> tuple[int, Tensor | None]:
    """The zero point of the whole weight, or (0 and) one for each group and row, (G, N)."""
    groups, rows = shape
    packed = take(tensors, "qzeros", *_WORDS, shape=(groups, None))
    word = packed.element_size() * 8
    width = -(-rows * bits // word)
    if packed.shape[1] != width:
        raise complain("qzeros", f"shape {tuple(packed.shape)}", f"({groups}, {width}) for {rows} rows of {bits} bits")
    stored = unpack_codes(as_bytes(packed), bits, rows)
    if stored.numel() == 0:
        raise complain("scales", f"shape {tuple(shape)}", "at least one group and row")
    first = int(stored[0, 0])
    constant = first if bool((stored == first).all()) else None
    plus_one = _stored_minus_one(settings, bits, constant, version)
    if constant is not None:
        return (constant + plus_one) % 2**bits, None
    return 0, (stored + plus_one) & (2**bits - 1)


def _stored_minus_one(settings: Settings, bits: int, constant: int | None, version: str | None) -> bool:
    """Whether zero points are stored minus one: the convention of v1."""
    if version is not None:
        return version == "gptq"
    labels = [settings.text(name, None, *VERSIONS) for name in ("checkpoint_format", "format")]
    label = labels[0] or labels[1]
    symmetric = settings.flag("sym", None)
    middle = 2 ** (bits - 1)
    by_data = {middle - 1: "gptq", middle: "gptq_v2"}.get(-1 if constant is None else constant)
    hint = 'a convention; pass checkpoint_format="gptq" (stored minus one) or "gptq_v2"'
    if symmetric and by_data is None:
        raise complain("qzeros", "other than the middle of the codes though sym is true", hint)
    if symmetric is False and label and by_data and label != by_data:
        raise complain("qzeros", f"{constant} everywhere, in a checkpoint labelled {label} without symmetry", hint)
    if symmetric is not False and by_data:
        if label and label != by_data:
            _log.warning("metate.load_quantized: labelled %s, but its zero points are those of %s", label, by_data)
        return by_data == "gptq"
    if label is None and symmetric is None:
        raise complain("qzeros", "of a checkpoint without a label", hint)
    return (label or "gptq") == "gptq"  # before v2 there was no label


def write(weight: QuantizedWeight, version: str = "gptq") -> dict[str, Tensor]:
    """The tensors of an affine weight of 2, 3, 4 or 8 bits, of whole 32-bit words of columns and rows."""
    rows, columns = weight.shape
    bits = weight.bits
    if bits not in BITS or weight.codebook is not None or weight.offsets is not None or weight.super_scales is not None:
        raise _unwritable("weight", weight, f"integers of {BITS} bits with one level of scales")
    if columns % 32 or rows % 32:
        raise _unwritable("shape", weight.shape, "multiples of 32; pad the weight")
    if version not in VERSIONS:
        raise _unwritable("version", version, " or ".join(VERSIONS))
    zeros = weight.zeros.int() if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.int32)
    zeros = zeros + weight.zero
    if int(zeros.min()) < 0 or int(zeros.max()) >= 2**bits:
        raise _unwritable("zeros", f"{int(zeros.min())} to {int(zeros.max())}", f"0 to {2**bits - 1}")
    stored = (zeros - int(version == "gptq")).remainder(2**bits).to(torch.uint8)
    group = torch.arange(columns, dtype=torch.int32, device=weight.scales.device) // weight.group_size
    codes = weight.in_rows().codes
    if weight.permutation is not None:
        order = weight.permutation.long()
        group = torch.empty_like(group).index_copy_(0, order, group)
        codes = _permuted(codes, bits, order.argsort())
    return {
        "qweight": codes.view(torch.int32).t().contiguous(),
        "qzeros": pack_codes(stored.t().contiguous(), bits).view(torch.int32),
        "scales": weight.scales.t().contiguous().half(),
        "g_idx": group,
    }


def configuration(weight: QuantizedWeight, symmetric: bool, version: str = "gptq") -> dict[str, object]:
    """The `quantization_config` under which a checkpoint of such weights is read."""
    return {
        "quant_method": "gptq", "bits": weight.bits, "group_size": weight.group_size, "sym": symmetric,
        "desc_act": weight.permutation is not None, "checkpoint_format": version, "pack_dtype": "int32",
    }  # fmt: skip


def _unwritable(argument: str, got: object, expected: str) -> Exception:
    return fail("quant.gptq.write", argument, got, expected, error=FormatError)
