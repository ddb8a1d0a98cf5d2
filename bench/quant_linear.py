"""Low-bit linear layers and dequantised weights beside PyTorch, bitsandbytes, ONNX Runtime, OpenVINO, ggml and gguf.

Every contender computes with the same dequantised weights up to the rounding of its own scales; packing is outside the
timing. Codebooks of 4 bits are NF4's, and zeros have 4 bits. torch's 4-bit kernel takes bfloat16 only, asymmetric
groups of 32 to 256 columns; bitsandbytes bfloat16 and NF4; ONNX Runtime takes float32, OpenVINO zeros, and ggml float32
and symmetric weights, as GGUF's Q4_0 has them. Who rounds activations to 8 bits, each in its own way, is judged by the
exact product.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import metate
from metate.bench import ggml
from metate.bench.onnx_session import session
from metate.bench.openvino_request import opset, request
from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.low_bit import QuantizedWeight, arranged, pack_codes, rows_of, stored_weight, unpack_codes
from metate.memory import allocate
from metate.op import Args, Case
from metate.ops.quant_linear.declaration import dequantize_op, int8_op, linear_op, matmul_op, weight_case
from metate.quant.bitsandbytes import codebook

PACKABLE = (32, 64, 128, 256)
Q4_0 = [weight_case(M, 4096, 4096, 4, 32, "symmetric", scales="float16") for M in (1, 4, 16, 128, 512)]


def workloads(compile: bool) -> list[Workload]:
    exact = {
        "torch dense": dense, "torch int4pack": int4pack, "bitsandbytes NF4": bitsandbytes,
        "onnxruntime MatMulNBits": lambda setup: onnx(setup, 1), "openvino": openvino,
    }  # fmt: skip
    rounded = {
        "onnxruntime MatMulNBits, level 4": lambda setup: onnx(setup, 4), "ggml mul_mat": mul_mat,
        "openvino, dynamic quantization": lambda setup: openvino(setup, rounded=32),
    }  # fmt: skip
    cases = [*Q4_0, *linear_op.domain.sweep]
    return [
        Workload("low-bit linear", linear_op, cases, exact, call_op, linear_op.flops, label=label, placed=arranged_too),
        Workload("low-bit linear, int8 activations", Rounded(), cases, rounded, call_op, int8_op.flops,  # type: ignore[arg-type]
                 label=label, placed=arranged_too),
        Workload("low-bit matmul (input gradient)", matmul_op, matmul_op.domain.sweep, {"torch dense": dense_matmul},
                 call_op, matmul_op.flops, label=label, placed=placed),
        Workload("dequantize", dequantize_op, [Q4_0[0], *dequantize_op.domain.sweep],
                 {"torch": formula, "bitsandbytes NF4": bitsandbytes_dense, "gguf": gguf_dense}, dequantized,
                 dequantize_op.flops, label=lambda case: label(case).partition(" ")[2], placed=placed),
    ]  # fmt: skip


class Rounded:
    """The operator of rounded activations, whose truth is the exact product: its own error is what others may have."""

    def __getattr__(self, name: str) -> Any:
        return getattr(int8_op, name)

    def __call__(self, *args: Any) -> Any:
        return int8_op(*args)

    def compute(self, dtype: torch.dtype, args: Args) -> tuple[Any, ...]:
        return (linear_op if dtype == torch.float64 else int8_op).compute(dtype, args)


def label(case: Case) -> str:
    return f"M{case['M']} N{case['N']} K{case['K']} {case['bits']}-bit {case['form']} g{case['group']}"


def placed(args: Args) -> Args:
    """Codes lie where those of a quantised model do; codebooks of 16 entries become NF4's, zeros those of 4 bits."""
    found, (zeros, table) = list(args), map(linear_op.parameters.index, ("zeros", "codebook"))
    found[1] = allocate(args[1].shape, args[1].dtype, args[1].device).copy_(args[1])
    if args[zeros] is not None:
        found[zeros] = args[zeros].clamp(max=15)
    if args[table] is not None and len(args[table]) == 16:
        found[table] = codebook("nf4").to(args[table])
    return tuple(found)


def arranged_too(args: Args) -> Args:
    """The same, in tiles where layers have tiles."""
    x, codes, *rest = placed(args)
    return (x, arranged(codes, (codes.shape[0], x.shape[1]), *args[-4:-2]), *rest)


def dense_weight(named: dict[str, Any], columns: int, dtype: torch.dtype) -> Tensor:
    fields = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "codebook")
    scalars = (named["bits"], named["group_size"], named["super_groups"], named["zero"], columns)
    floats = (x.float() if x is not None and x.is_floating_point() else x for x in (named[name] for name in fields))
    return stored_weight(*floats, *scalars).to(dtype)


def weights_of(setup: Setup) -> list[QuantizedWeight]:
    names = ("scales", "super_scales", "super_groups", "zero", "zeros", "offsets", "super_offsets", "codebook")
    shape = (setup.case["N"], setup.case["K"])
    return [
        QuantizedWeight(
            shape, named["bits"], named["group_size"], rows_of(named["codes"]), **{n: named[n] for n in names}
        )
        for named in setup.named
    ]


def dequantized(setup: Setup, backend: str) -> Run:
    sets = weights_of(setup)
    return lambda i: metate.dequantize(sets[i % len(sets)], setup.dtype, backend=backend)


def formula(setup: Setup) -> Run:
    """Operators of torch, one after another."""
    return lambda i: dense_weight(setup.named[i % len(setup.named)], setup.case["K"], setup.dtype)


def bitsandbytes_dense(setup: Setup) -> Run:
    case = setup.case
    if setup.device != "cpu" or (case["bits"], case["form"]) != (4, "codebook"):
        raise Skip("NF4 on a CPU only")
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise Skip("needs bitsandbytes") from None
    sets = []
    for named in setup.named:
        packed = (named["codes"] << 4 | named["codes"] >> 4).view(-1, 1)
        state = functional.QuantState(
            named["scales"].float().flatten(), torch.Size((case["N"], case["K"])), named["codebook"], case["group"],
            "nf4", setup.dtype,
        )  # fmt: skip
        sets.append((packed, state))
    return lambda i: functional.dequantize_4bit(*sets[i % len(sets)])


def gguf_dense(setup: Setup) -> Run:
    """numpy's operators, in float32."""
    case = setup.case
    if setup.device != "cpu" or (case["bits"], case["group"], case["form"]) != (4, 32, "symmetric"):
        raise Skip("Q4_0 on a CPU only")
    if setup.dtype != torch.float32:
        raise Skip("float32 only")
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise Skip("needs gguf") from None
    sets = [np.asarray(ggml.q4_0(named["codes"], named["scales"], case["K"])) for named in setup.named]
    kind = gguf.GGMLQuantizationType.Q4_0
    return lambda i: torch.from_numpy(gguf.dequantize(sets[i % len(sets)].reshape(case["N"], -1), kind))


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
        codes = unpack_codes(rows_of(named["codes"]), 4, case["K"]).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        shift = (8 - named["zero"] - named["zeros"].float()) * named["scales"].float()
        levels = torch.stack([named["scales"].T, shift.T], dim=-1).to(torch.bfloat16).contiguous()
        sets.append((named["x"], packed, case["group"], levels))
    return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(*sets[i % len(sets)])


def bitsandbytes(setup: Setup) -> Run:
    """Scales become bfloat16, as in its Linear4bit on a CPU."""
    case = setup.case
    if setup.device != "cpu" or setup.dtype != torch.bfloat16 or (case["bits"], case["form"]) != (4, "codebook"):
        raise Skip("bfloat16 times NF4 on a CPU only")
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise Skip("needs bitsandbytes") from None
    if not functional.has_avx512bf16():
        raise Skip("its CPU kernel needs AVX512_BF16")
    sets = []
    for named in setup.named:
        rows = rows_of(named["codes"])
        codes = rows << 4 | rows >> 4
        state = SimpleNamespace(
            dtype=setup.dtype, nested=False, shape=(case["N"], case["K"]), blocksize=case["group"],
            absmax=named["scales"].float(),
        )  # fmt: skip
        packed, state = functional._convert_weight_packed_for_cpu(codes, state)
        sets.append((named["x"], packed, state.shape, state.absmax, named["codebook"], case["group"]))
    return lambda i: torch.ops.bitsandbytes.gemv_4bit(*sets[i % len(sets)])


def onnx(setup: Setup, level: int) -> Run:
    """Computes in float32 (level 1), or rounds activations to 8 bits (level 4)."""
    case = setup.case
    if setup.device != "cpu" or case["form"] not in ("symmetric", "zeros"):
        raise Skip("symmetric codes and those with zeros on a CPU only")
    M, N, K, bits, group = (case[name] for name in ("M", "N", "K", "bits", "group"))
    inputs, outputs = {"x": ((M, K), np.float32)}, {"y": ((M, N), np.float32)}
    bound = []
    for named in setup.named:
        weights = {
            "codes": rows_of(named["codes"]).view(N, K // group, -1).numpy(),
            "scales": named["scales"].float().flatten().numpy(),
        }
        if named["zeros"] is not None:
            weights["zero_points"] = pack_codes(named["zeros"], bits).flatten().numpy()
        attributes = {"N": N, "K": K, "bits": bits, "block_size": group, "accuracy_level": level}
        layer = session("MatMulNBits", inputs, outputs, weights, **attributes)
        x, out, binding = named["x"].float().numpy(), torch.empty(M, N), layer.io_binding()
        binding.bind_cpu_input("x", x)
        binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.data_ptr())
        bound.append((layer, binding, out, x))

    def run(i: int) -> Tensor:
        layer, binding, out, _ = bound[i % len(bound)]
        layer.run_with_iobinding(binding)
        return out

    return run


def openvino(setup: Setup, rounded: int = 0) -> Run:
    """float16 scales. rounded: columns whose activations share a step of 8 bits, 0 for activations as they are."""
    case = setup.case
    if setup.device != "cpu" or (case["bits"], case["form"]) != (4, "zeros"):
        raise Skip("4-bit codes with zeros on a CPU only")
    ov, operators = opset()
    M, N, K, group = (case[name] for name in ("M", "N", "K", "group"))
    calls: list[tuple[Any, list[Any]]] = []
    kept: list[Any] = []
    for named in setup.named:

        def constant(codes: Tensor, columns: int) -> Any:
            kept.append(codes.flatten().numpy())
            shape = ov.Shape([N, K // group, columns])
            return operators.constant(ov.Tensor(kept[-1], shape, ov.Type.u4))

        x = operators.parameter([M, K], ov.Type.f32)
        both = constant(rows_of(named["codes"]), group), constant(pack_codes(named["zeros"], 4), 1)
        whole = operators.subtract(*(operators.convert(one, ov.Type.f16) for one in both))
        scales = operators.constant(named["scales"].half()[..., None].numpy())
        weight = operators.reshape(operators.multiply(whole, scales), operators.constant(np.array([N, K])), False)
        product = operators.matmul(x, operators.convert(weight, ov.Type.f32), False, True)
        # Rounded activations are rounded from float32, to which bfloat16 would be rounded once more.
        dtype = torch.float32 if rounded else setup.dtype
        called = request(product, [x], dtype, DYNAMIC_QUANTIZATION_GROUP_SIZE=rounded)
        kept.append(named["x"].float().numpy())
        called.set_input_tensor(0, ov.Tensor(kept[-1], shared_memory=True))
        calls.append((called, kept))  # it reads arrays where they are

    def run(i: int) -> Tensor:
        called, _ = calls[i % len(calls)]
        called.infer()
        return torch.from_numpy(called.get_output_tensor(0).data)

    return run


def mul_mat(setup: Setup) -> Run:
    """ggml rounds its float32 activations to 8 bits."""
    case = setup.case
    if setup.device != "cpu" or (case["bits"], case["group"], case["form"]) != (4, 32, "symmetric"):
        raise Skip("Q4_0 on a CPU only")
    M, N, K = (case[name] for name in "MNK")
    graphs = ggml.Graphs()
    built = []
    for _ in setup.named:
        weight, x = graphs.tensor(ggml.Q4_0, K, N, weight=True), graphs.tensor(ggml.F32, K, M)
        out = graphs.op("mul_mat", weight, x)
        built.append((weight, x, out, graphs.graph(out)))
    graphs.allocate(repack=True)
    for (weight, x, *_), named in zip(built, setup.named, strict=True):
        graphs.set(weight, ggml.q4_0(rows_of(named["codes"]), named["scales"], K))
        graphs.set(x, named["x"].float())

    def run(i: int) -> Tensor:
        *_, out, graph = built[i % len(built)]
        graphs.run(graph)
        return graphs.get(out, M, N)

    return run
