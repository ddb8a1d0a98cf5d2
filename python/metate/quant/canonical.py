"""The canonical form itself in a checkpoint: X.codes, X.scales, … and the numbers as JSON in X.quantized_weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import FLOATS, QuantizedWeight
from metate.ops.moe import QuantizedExperts
from metate.quant.settings import Settings, complain, json_bytes, parse_json, take

MARK = "quantized_weight"
FIELDS = {
    "codes": (torch.uint8,), "scales": (*FLOATS, torch.int8), "super_scales": FLOATS, "zeros": (torch.uint8,),
    "offsets": (*FLOATS, torch.int8), "super_offsets": FLOATS, "codebook": (torch.float32,),
    "permutation": (torch.int32,),
}  # fmt: skip


def lower(tensors: Mapping[str, Tensor], settings: Settings) -> QuantizedWeight | QuantizedExperts:
    """A module's tensors, named by the field; experts where the shape has three sizes."""
    text = take(tensors, MARK, torch.uint8, shape=(None,))
    numbers = Settings(MARK, parse_json(text.numpy().tobytes(), MARK, 1 << 12))
    shape = numbers.values.get("shape")
    if not isinstance(shape, list) or len(shape) not in (2, 3) or any(type(size) is not int for size in shape):
        raise complain(f"{MARK} shape", shape, "[out_features, in_features], or [experts, out_features, in_features]")
    found = {name: take(tensors, name, *dtypes) for name, dtypes in FIELDS.items() if name in tensors}
    if not {"codes", "scales"} <= found.keys():
        raise complain("codes or scales", "missing", "a tensor")
    kind: Any = QuantizedWeight if len(shape) == 2 else QuantizedExperts
    lowered: QuantizedWeight | QuantizedExperts = kind(
        tuple(shape), numbers.integer("bits", None, 1, 8), numbers.integer("group_size", None, 1, 2**31),
        zero=numbers.integer("zero", 0, 0, 255), super_groups=numbers.integer("super_groups", 0, 0, 2**31), **found,
    )  # fmt: skip
    return lowered


def write(weight: QuantizedWeight | QuantizedExperts) -> dict[str, Tensor]:
    """The inverse of `lower`."""
    return {**weight.in_rows().tensors, MARK: numbers_of(weight)}


def numbers_of(weight: QuantizedWeight | QuantizedExperts) -> Tensor:
    """The tensor of MARK."""
    numbers = {
        "shape": list(weight.shape), "bits": weight.bits, "group_size": weight.group_size, "zero": weight.zero,
        "super_groups": weight.super_groups,
    }  # fmt: skip
    return json_bytes(numbers)
