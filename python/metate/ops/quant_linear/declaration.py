"""The low-bit products, each with everything that is true of it whatever machine runs it."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import TILES, pack_codes, reading_rows, tiles_of
from metate.op import Case, Domain, Op
from metate.ops.quant_linear import reference, rules

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS = {"M": "rows", "N": "out_features", "K": "in_features"}
WEIGHT = {
    "codes": "N row_bytes", "scales": "N groups", "super_scales": "N supers", "zeros": "N groups",
    "offsets": "N groups", "super_offsets": "N supers", "codebook": "levels",
}  # fmt: skip
WEIGHT_DTYPES: dict[str, tuple[str | torch.dtype, ...]] = {
    "codes": (torch.uint8, TILES), "scales": rules.LOW, "super_scales": FLOATS, "zeros": (torch.uint8,),
    "offsets": rules.LOW, "super_offsets": FLOATS, "codebook": (torch.float32, torch.float64),
    "permutation": (torch.int32,),
}  # fmt: skip
_LINEAR_AXES = {"x": "M K", **WEIGHT, "permutation": "K", "bias": "N"}
_LINEAR_DTYPES = {"x": FLOATS, **WEIGHT_DTYPES, "bias": ("x", torch.float32)}

# Cases.


def weight_case(M: int, N: int, K: int, bits: int, group: int, form: str, **flags: Any) -> Case:
    return dict(M=M, N=N, K=K, bits=bits, group=group, form=form, **flags)


CASES = [
    weight_case(1, 1, 1, 4, 32, "symmetric"),
    weight_case(3, 65, 129, 4, 64, "codebook", bias=True),
    weight_case(2, 33, 127, 3, 40, "zeros", permuted=True, bias=True),
    weight_case(5, 17, 300, 8, 1000, "symmetric", scales="float16"),
    weight_case(4, 20, 96, 4, 32, "offsets", scales="float16"),
    weight_case(2, 7, 530, 6, 16, "symmetric", super_groups=16),  # Q6_K
    weight_case(3, 18, 515, 4, 32, "offsets", super_groups=8),  # Q4_K, a short super block
    weight_case(2, 9, 70, 2, 16, "zeros", scales="bfloat16"),
    weight_case(1, 35, 65, 5, 7, "codebook", permuted=True),
    weight_case(9, 40, 257, 8, 128, "codebook", scales="bfloat16"),  # fp8
    weight_case(130, 70, 200, 4, 128, "zeros", bias=True),
    weight_case(16, 300, 384, 4, 128, "codebook"),
    weight_case(63, 31, 65, 1, 1, "symmetric"),
    weight_case(13, 96, 640, 7, 33, "zeros", permuted=True),
    weight_case(1, 200, 1024, 4, 1024, "symmetric"),
    weight_case(1, 130, 416, 4, 32, "zeros", scales="float16"),
    weight_case(0, 5, 6, 4, 32, "symmetric"),
    weight_case(3, 0, 6, 4, 32, "codebook"),
    weight_case(3, 5, 0, 4, 32, "zeros", bias=True),
    weight_case(1, 48, 416, 4, 32, "codebook", tiles=True),
    weight_case(4, 32, 640, 4, 64, "zeros", tiles=True, permuted=True, bias=True),
    weight_case(9, 16, 1184, 4, 2000, "symmetric", tiles=True, scales="bfloat16"),
    weight_case(70, 80, 288, 4, 32, "offsets", tiles=True, super_groups=8),
]
SWEEP = [
    weight_case(M, N, K, 4, group, form)
    for N, K in ((4096, 4096), (14336, 4096), (4096, 14336))
    for M in (1, 4, 16, 128, 512)
    for group, form in ((64, "codebook"), (128, "zeros"))
]


def draw(rng: Random) -> Case:
    """Any legal combination, small."""
    bits = rng.randint(1, 8)
    case = weight_case(
        rng.choice([0, 1, 2, 3, 4, 7, 8, 9, 13, 40]), rng.choice([0, 1, 7, 16, 31, 33, 64, 100]), rng.randint(0, 400),
        rng.choice([bits, 4]), rng.choice([1, 3, 8, 16, 32, 64, 100, 128, 500]),
        rng.choice(["codebook", "symmetric", "zeros", "offsets"]),
    )  # fmt: skip
    case["scales"] = rng.choice(["float32", "bfloat16", "float16"])
    if rng.random() < 0.3:
        case["super_groups"] = rng.randint(1, 20)
    for flag in ("permuted", "bias"):
        if rng.random() < 0.3:
            case[flag] = True
    if rng.random() < 0.2:
        case.update(N=16 * rng.randint(1, 5), K=32 * rng.randint(1, 14), bits=4, group=32 * rng.randint(1, 5))
        case["tiles"] = True
    return case


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Every argument of the operators by name; `x` and `grad` are the rows on either side of W."""
    M, N, K, bits, group, form = (case[name] for name in ("M", "N", "K", "bits", "group", "form"))
    double = dtype == torch.float64
    groups = -(-K // group)
    supers = -(-groups // case["super_groups"]) if "super_groups" in case else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def whole(least: int, most: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(least, most + 1, shape, generator=generator, dtype=dtype)

    level = torch.float64 if double else getattr(torch, case.get("scales", "float32"))
    wide = torch.float64 if double else torch.float32
    named: dict[str, Any] = dict.fromkeys(_LINEAR_AXES)
    named.update(
        x=normal(M, K).to(dtype), grad=normal(M, N).to(dtype), out=torch.full((N, K), float("nan"), dtype=dtype),
        codes=pack_codes(whole(0, 2**bits - 1, N, K), bits), scales=_scales(normal(N, groups), level),
        bits=bits, group_size=group, super_groups=case.get("super_groups", 0), zero=0, in_features=K,
    )  # fmt: skip
    if form == "codebook":
        named["codebook"] = normal(2**bits).sort().values.to(wide)
    elif form == "symmetric":
        named["zero"] = 2 ** (bits - 1)
    elif form == "zeros":
        named["zeros"] = whole(0, min(2**bits, 255), N, groups)
        named["zero"] = 1 if bits < 4 else 0
    else:
        named["offsets"] = (-(2.0**bits) / 2 * _scales(normal(N, groups), torch.float32)).to(level)
    if supers:
        for fine, coarse in (("scales", "super_scales"), ("offsets", "super_offsets")):
            if named[fine] is not None:
                named[fine] = whole(-63, 63, N, groups, dtype=torch.int8)
                named[coarse] = _scales(normal(N, supers), level)
    if case.get("tiles"):
        named["codes"] = tiles_of(named["codes"])
    if case.get("permuted"):
        named["permutation"] = torch.randperm(K, generator=generator).to(torch.int32)
    if case.get("bias"):
        named["bias"] = normal(N).to(dtype)
    return named


def _scales(noise: Tensor, dtype: torch.dtype) -> Tensor:
    return (0.01 * (1 + noise.abs())).to(dtype)


def _make(op_parameters: tuple[str, ...], **renamed: str) -> Any:
    """`make` of a Domain whose operator takes these arguments."""

    def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        named = inputs(case, dtype, generator)
        return tuple(named[renamed.get(name, name)] for name in op_parameters)

    return make


def flops(case: Case) -> float:
    M, N, K = case["M"], case["N"], case["K"]
    return float(2 * M * N * K)


# What `dequantize` meets in files: NF4, GPTQ or AWQ, GGUF's Q4_K and Q6_K, fp8.
DEQUANTIZE_SWEEP = [
    weight_case(1, N, K, bits, group, form, **flags)
    for N, K in ((4096, 4096), (4096, 14336))
    for bits, group, form, flags in (
        (4, 64, "codebook", {}),
        (4, 128, "zeros", {}),
        (4, 32, "offsets", {"super_groups": 8}),
        (6, 16, "symmetric", {"super_groups": 16}),
        (8, 128, "codebook", {}),
    )
]

# Operators.

_LINEAR = tuple(reference.quant_linear.__annotations__)[:-1]


def _domain(make: Any, sweep: list[Case]) -> Domain:
    return Domain(make, CASES, sweep, draw, ("M",), "M")


linear_op = Op(
    "quant_linear",
    reference.quant_linear,
    words=WORDS,
    axes=_LINEAR_AXES,
    dtypes=_LINEAR_DTYPES,
    outputs={"out": "x"},
    shapes=lambda x, codes, *_: ((x.shape[0], codes.shape[0]),),
    domain=_domain(_make(_LINEAR), SWEEP),
    flops=flops,
    autocast=("x",),
    vmap=rules.fold_vmap,
    sharding=rules.shard_linear,
    validate=rules.validate_linear("quant_linear"),
    refuses=reading_rows(cuda=lambda x, codes, *_: rules.refused_by_cuda(x, codes.shape[0])),
    contents=("permutation", rules.check_permutation("quant_linear")),
    contents_in_kernel=True,
)

int8_op = Op(
    "quant_linear_int8",
    reference.quant_linear_int8,
    words=WORDS,
    axes=_LINEAR_AXES,
    dtypes=_LINEAR_DTYPES,
    outputs={"out": "x"},
    shapes=lambda x, codes, *_: ((x.shape[0], codes.shape[0]),),
    domain=_domain(_make(_LINEAR), SWEEP),
    flops=flops,
    autocast=("x",),
    vmap=rules.fold_vmap,
    sharding=rules.shard_linear,
    validate=rules.validate_linear("quant_linear"),
    refuses=reading_rows(
        cpu=lambda x, *_: "float64: up to float32" if x.dtype == torch.float64 else None,
        cuda=lambda *_: "activations rounded to 8 bits: on a CPU",
    ),
    contents=("permutation", rules.check_permutation("quant_linear")),
    contents_in_kernel=True,
    gradient='activations are rounded to integers; train without activation="int8"',
    public="quant_linear",
)

matmul_op = Op(
    "quant_matmul",
    reference.quant_matmul,
    words=WORDS,
    axes={"x": "M N", **WEIGHT, "permutation": "in_features"},
    dtypes={"x": FLOATS, **WEIGHT_DTYPES},
    outputs={"out": "x"},
    shapes=lambda x, *rest: ((x.shape[0], rest[-1]),),
    domain=_domain(
        _make(tuple(reference.quant_matmul.__annotations__)[:-1], x="grad"),
        [weight_case(512, 4096, 4096, 4, 64, "codebook"), weight_case(512, 4096, 4096, 4, 128, "zeros")],
    ),
    flops=flops,
    sizes=lambda named: {**named, "K": named["in_features"]},
    autocast=("x",),
    vmap=rules.fold_vmap,
    sharding=rules.shard_matmul,
    validate=rules.validate_matmul("quant_matmul"),
    refuses=reading_rows(cuda=lambda x, *rest: rules.refused_by_cuda(x, rest[-1])),
    contents=("permutation", rules.check_permutation("quant_matmul")),
    contents_in_kernel=True,
)

dequantize_op = Op(
    "dequantize",
    reference.dequantize,
    words=WORDS,
    axes={"out": "N K", **WEIGHT, "permutation": "K"},
    dtypes={"out": FLOATS, **WEIGHT_DTYPES},
    outputs={"out": "out"},
    shapes=lambda out, *_: (out.shape,),
    domain=Domain(_make(tuple(reference.dequantize.__annotations__)[:-1]), CASES, DEQUANTIZE_SWEEP, draw, ("N",), "N"),
    flops=lambda case: 2.0 * case["N"] * case["K"],
    autocast=(),
    vmap=rules.refuse_vmap,
    sharding=rules.shard_dequantize,
    validate=rules.validate_linear("dequantize"),
    refuses=reading_rows(cpu=rules.refused_float64, cuda=rules.dequantize_refused_by_cuda),
    contents=("permutation", rules.check_permutation("dequantize")),
    contents_in_kernel=True,
    gradient="it writes into its argument; QuantizedWeight.dequantize has one, to what makes the weight",
    writes=True,
)

linear_op.differentiable(rules.backward_linear(matmul_op), rules.save)
matmul_op.differentiable(rules.backward_matmul(linear_op), rules.save)
