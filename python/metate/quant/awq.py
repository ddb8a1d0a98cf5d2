"""AWQ checkpoints: 4-bit codes with a zero point per group, in the packings gemm, gemv and gemv_fast.

Lin et al. 2024. gemm packs along the outputs with nibbles in the order 0 2 4 6 1 3 5 7, gemv along the inputs in order,
gemv_fast (and llm-awq) 16-bit words of four interleaved rows, with zero points already multiplied by the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.low_bit import FLOATS, QuantizedWeight, pack_codes, unpack_codes
from metate.memory import allocate
from metate.quant.settings import Settings, as_bytes, blocks, complain, take

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of a word of gemm -> hence nibble i holds column _ORDER[i]
_PACKINGS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def lower(tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedWeight:
    """The tensors qweight, qzeros (or scaled_zeros) and scales of a module."""
    for name in ("bits", "w_bit"):
        if name in settings.values:
            settings.integer(name, None, 4, 4)
    labels = [settings.text(name, None, *_PACKINGS) for name in ("version", "checkpoint_format", "format")]
    version = next(filter(None, labels), "gemm")
    qweight = take(tensors, "qweight", torch.int32, torch.int16, shape=(None, None))
    if qweight.dtype == torch.int16:
        return _lower_fast(tensors, settings, qweight)
    if version == "gemv":
        return _lower_gemv(tensors, settings, qweight)
    if version != "gemm":
        raise complain("qweight", qweight.dtype, f"torch.int16 in version {version}")
    return _lower_gemm(tensors, settings, qweight)


def _lower_gemm(tensors: Mapping[str, Tensor], settings: Settings, qweight: Tensor) -> QuantizedWeight:
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    group_size, groups = _groups(settings, columns)
    scales = take(tensors, "scales", *FLOATS, shape=(groups, rows))
    qzeros = take(tensors, "qzeros", torch.int32, shape=(groups, rows // 8))
    codes = allocate((rows, -(-columns // 2)), torch.uint8)
    for part in blocks(rows, columns, 8):
        codes[part] = _packed_rows(qweight[:, part.start // 8 : part.stop // 8])
    return QuantizedWeight(
        (rows, columns), 4, group_size, codes, scales.t().contiguous(), zeros=_ordered(qzeros).t().contiguous()
    )


def _packed_rows(words: Tensor) -> Tensor:
    """(K, M) words of gemm -> (8 M, ⌈K / 2⌉): two inputs a byte, row by row."""
    words = torch.nn.functional.pad(words, (0, 0, 0, words.shape[0] % 2))
    low, high = words[0::2], words[1::2]
    packed = torch.empty(words.shape[1], 8, low.shape[0], dtype=torch.uint8, device=words.device)
    for column in range(8):
        shift = 4 * _ORDER.index(column)
        packed[:, column] = (low >> shift & 15 | (high >> shift & 15) << 4).to(torch.uint8).t()
    return packed.flatten(0, 1)


def _ordered(words: Tensor) -> Tensor:
    """(A, B) words of gemm -> (A, 8 B) codes."""
    nibbles = unpack_codes(as_bytes(words), 4, words.shape[1] * 8).view(words.shape[0], words.shape[1], 8)
    place = [_ORDER.index(column) for column in range(8)]
    return nibbles[:, :, place].flatten(1)


def _lower_gemv(tensors: Mapping[str, Tensor], settings: Settings, qweight: Tensor) -> QuantizedWeight:
    rows, columns = qweight.shape[0], qweight.shape[1] * 8
    group_size, groups = _groups(settings, columns)
    scales = _at_least(take(tensors, "scales", *FLOATS, shape=(rows, None)), "scales", groups, 1)
    qzeros = take(tensors, "qzeros", torch.int32, shape=(rows, None))
    zeros = _at_least(unpack_codes(as_bytes(qzeros), 4, qzeros.shape[1] * 8), "qzeros", groups, 1)
    return QuantizedWeight(
        (rows, columns), 4, group_size, as_bytes(qweight).clone(), scales.contiguous(), zeros=zeros.contiguous()
    )


def _lower_fast(tensors: Mapping[str, Tensor], settings: Settings, qweight: Tensor) -> QuantizedWeight:
    """Zero points come as -zero · scale, rounded to 16 bits: they lower to offsets, which keeps the rounding."""
    rows, columns = qweight.shape[0] * 4, qweight.shape[1]
    if columns % 64:
        raise complain("qweight", f"shape {tuple(qweight.shape)}", "a multiple of 64 columns in gemv_fast")
    group_size, groups = _groups(settings, columns)
    scales = _at_least(take(tensors, "scales", *FLOATS, shape=(None, rows)), "scales", groups, 0)
    name = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    offsets = _at_least(take(tensors, name, *FLOATS, shape=(None, rows)), name, groups, 0)
    codes = allocate((rows, columns // 2), torch.uint8)
    for part in blocks(rows, columns, 4):
        codes[part] = pack_codes(_deinterleaved(qweight[part.start // 4 : part.stop // 4]), 4)
    return QuantizedWeight(
        (rows, columns), 4, group_size, codes, scales.t().contiguous(), offsets=offsets.t().contiguous()
    )


def _deinterleaved(words: Tensor) -> Tensor:
    """(N / 4, K) 16-bit words of gemv_fast -> (N, K) codes.

    A word holds a nibble of each of four rows; a row's runs of 64 columns follow each other; within 32 columns the
    order is that of tensor-core fragments: pairs (8 apart) first, then even before odd.
    """
    quads, columns = words.shape
    nibbles = unpack_codes(as_bytes(words), 4, columns * 4).view(quads, columns // 64, 64 * 4)
    runs = nibbles.view(quads, columns // 64, 4, 64)  # the words of a run, read as four rows of 64
    by_row = runs.permute(0, 2, 1, 3).reshape(quads * 4, columns // 32, 4, 2, 4)
    even_odd = by_row.transpose(3, 4).reshape(quads * 4, columns // 32, 4, 4, 2)
    return even_odd.transpose(2, 3).reshape(quads * 4, columns)


def _groups(settings: Settings, columns: int) -> tuple[int, int]:
    group_size = settings.group_size(columns, "group_size", "q_group_size")
    if columns == 0:
        raise complain("qweight", "empty", "at least one column")
    return min(group_size, columns), -(-columns // group_size)


def _at_least(tensor: Tensor, name: str, groups: int, dim: int) -> Tensor:
    """The first `groups` entries: these packings pad."""
    if tensor.shape[dim] < groups:
        raise complain(name, f"shape {tuple(tensor.shape)}", f"at least {groups} groups")
    return tensor.narrow(dim, 0, groups)


def write(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The gemm tensors of a 4-bit affine weight."""
    rows, columns = weight.shape
    if weight.bits != 4 or weight.codebook is not None or weight.offsets is not None or weight.super_scales is not None:
        raise fail("quant.awq.write", "weight", weight, "4-bit integers with one level of scales", error=FormatError)
    if weight.permutation is not None or rows % 8 or columns % weight.group_size:
        expected = "rows in multiples of 8, whole groups, no permutation"
        raise fail("quant.awq.write", "weight", weight, expected, error=FormatError)
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.uint8)
    codes = weight.in_rows().codes
    qweight = torch.empty(columns, rows // 8, dtype=torch.int32, device=codes.device)
    for part in blocks(rows, columns, 8):
        qweight[:, part.start // 8 : part.stop // 8] = _words(unpack_codes(codes[part], 4, columns))
    return {
        "qweight": qweight, "qzeros": _words(zeros + weight.zero), "scales": weight.scales.t().contiguous().half(),
    }  # fmt: skip


def _words(codes: Tensor) -> Tensor:
    """(N, A) codes -> (A, N / 8) words of gemm."""
    nibbles = codes.t().reshape(codes.shape[1], -1, 8)[:, :, list(_ORDER)].flatten(1)
    return pack_codes(nibbles, 4).view(torch.int32)


def configuration(weight: QuantizedWeight) -> dict[str, object]:
    """The `quantization_config` under which a checkpoint of such weights is read."""
    return {
        "quant_method": "awq", "bits": 4, "group_size": weight.group_size, "zero_point": True, "version": "gemm",
    }  # fmt: skip
