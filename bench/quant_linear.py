"""Low-bit linear layers beside PyTorch: dense weights, and torch's own 4-bit kernel where it knows the format.

Every contender computes with the same dequantised weights up to the rounding of its own scales; packing is outside the
timing. torch's 4-bit kernel takes bfloat16 only, asymmetric groups of 32 to 256 columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.low_bit import stored_weight, unpack_codes
from metate.op import Case
from metate.ops.quant_linear.declaration import int8_op, linear_op, matmul_op

PACKABLE = (32, 64, 128, 256)


def workloads(compile: bool) -> list[Workload]:
    rivals = {"torch dense": dense, "torch int4pack": int4pack}
    return [
        Workload("low-bit linear", linear_op, linear_op.domain.sweep, rivals, call_op, linear_op.flops, label=label),
        Workload("low-bit linear, int8 activations", int8_op, int8_op.domain.sweep, {}, call_op, int8_op.flops,
                 label=label),
        Workload("low-bit matmul (input gradient)", matmul_op, matmul_op.domain.sweep, {"torch dense": dense_matmul},
                 call_op, matmul_op.flops, label=label),
    ]  # fmt: skip


def label(case: Case) -> str:
    return f"M{case['M']} N{case['N']} K{case['K']} {case['bits']}-bit {case['form']} g{case['group']}"


def dense_weight(named: dict[str, Any], columns: int, dtype: torch.dtype) -> Tensor:
    fields = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "codebook")
    scalars = (named["bits"], named["group_size"], named["super_groups"], named["zero"], columns)
    return stored_weight(*(named[field] for field in fields), *scalars).to(dtype)


def dense(setup: Setup) -> Run:
    sets = [(named["x"], dense_weight(named, setup.case["K"], setup.dtype)) for named in setup.named]
    return lambda i: F.linear(*sets[i % len(sets)])


def dense_matmul(setup: Setup) -> Run:
    sets = [(named["x"], dense_weight(named, setup.case["K"], setup.dtype)) for named in setup.named]
    return lambda i: torch.matmul(*sets[i % len(sets)])


def int4pack(setup: Setup) -> Run:
    """W = (code - 8) · scale + (8 - zero) · scale, both in bfloat16."""
    case = setup.case
    if setup.device != "cpu" or setup.dtype != torch.bfloat16:
        raise Skip("bfloat16 on a CPU only")
    if case["bits"] != 4 or case["form"] != "zeros" or case["group"] not in PACKABLE:
        raise Skip("4-bit codes with zeros, in groups of 32, 64, 128 or 256")
    sets = []
    for named in setup.named:
        codes = unpack_codes(named["codes"], 4, case["K"]).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        shift = (8 - named["zero"] - named["zeros"].float()) * named["scales"].float()
        levels = torch.stack([named["scales"].T, shift.T], dim=-1).to(torch.bfloat16).contiguous()
        sets.append((named["x"], packed, case["group"], levels))
    return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(*sets[i % len(sets)])
