"""Float8 e4m3 weights with a scale for the tensor, each row, or each block of rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import FLOATS, QuantizedWeight
from metate.memory import allocate
from metate.quant.grid import checked
from metate.quant.settings import Settings, as_bytes, blocks, complain, on_cpu, take
from metate.scalars import is_whole, plain

_LARGEST = 448.0
_BLOCK = (128, 128)


@cache
@on_cpu
def codebook() -> Tensor:
    """The value of every byte, float32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def lower(tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedWeight:
    """The tensors weight and weight_scale_inv (blocks), or weight and weight_scale (tensor, rows or blocks)."""
    weight = take(tensors, "weight", torch.float8_e4m3fn, shape=(None, None))
    name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    scales = take(tensors, name, *FLOATS)
    rows, columns = weight.shape
    if weight.numel() == 0:
        raise complain("weight", f"shape {tuple(weight.shape)}", "at least one row and column")
    if scales.numel() == 1:
        scales, height, width = scales.view(1, 1), rows, columns
    elif tuple(scales.shape) in ((rows,), (rows, 1)) and name == "weight_scale":
        scales, height, width = scales.view(rows, 1), 1, columns
    else:
        height, width = _block(settings)
        scales = take(tensors, name, *FLOATS, shape=(-(-rows // height), -(-columns // width)))
    return _canonical(as_bytes(weight).clone(), scales, height, min(width, columns))


def _block(settings: Settings) -> tuple[int, int]:
    given = settings.values.get("weight_block_size", list(_BLOCK))
    if not isinstance(given, list) or len(given) != 2:
        raise complain("weight_block_size", given, "[rows, columns]")
    sizes = Settings("weight_block_size", {"rows": given[0], "columns": given[1]})
    return sizes.integer("rows", None, 1, 2**31), sizes.integer("columns", None, 1, 2**31)


def _canonical(codes: Tensor, scales: Tensor, height: int, width: int) -> QuantizedWeight:
    rows, columns = codes.shape
    per_row = scales.repeat_interleave(min(height, rows), 0)[:rows].contiguous()
    return QuantizedWeight((rows, columns), 8, width, codes, per_row, codebook=codebook().to(codes.device))


def quantize_fp8(weight: Tensor, block: tuple[int, int] = _BLOCK) -> QuantizedWeight:
    """(N, K) to e4m3 with a float32 scale for every block of rows and columns: largest magnitude / 448.

    Args:
        weight: (out_features, in_features), any floating dtype. block: (rows, columns) that share a scale.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; also for NaN and infinity.
    """
    checked("quantize_fp8", weight, 1)
    pair = isinstance(block, (tuple, list)) and len(block) == 2
    block = tuple(map(plain, block)) if pair else block
    if not pair or not all(is_whole(size, 1) for size in block):
        raise fail("quantize_fp8", "block", repr(block), "(rows, columns), 1 or more each")
    height, width = block
    rows, columns = weight.shape
    height, width = min(height, rows), min(width, columns)
    codes = allocate((rows, columns), torch.uint8, weight.device)
    scales = torch.empty(-(-rows // height), -(-columns // width), dtype=torch.float32, device=weight.device)
    for part in blocks(rows, columns, height):
        values = weight[part].detach().float()
        padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -values.shape[0] % height))
        tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        scale = (tiles.abs().amax((1, 3)) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[: values.shape[0], :columns]
        codes[part] = as_bytes(scaled.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn))
        scales[part.start // height : -(-part.stop // height)] = scale
    return _canonical(codes, scales, height, width)
