"""Products of the rows of each expert with its own weight, dense or low-bit, and their declarations."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import TILES, reading_rows
from metate.masks import lengths_of
from metate.op import REGISTRY, Case, Domain, Op, loop_vmap
from metate.ops.moe import reference, rules
from metate.ops.moe.declaration import FLOATS, INDEX, WORDS, expert_numbers, normal

# Cases. `gathered`: rows are tokens by an order; otherwise they stand sorted, `head` rows of no expert first.


def _case(T: int, k: int, E: int, N: int, K: int, skew: str = "", **flags: Any) -> Case:
    return dict(T=T, k=k, E=E, N=N, K=K, skew=skew, together=1, **flags)


CASES = [
    _case(1, 1, 1, 1, 1),
    _case(5, 1, 3, 9, 33, bias=True, head=2),
    _case(7, 2, 4, 17, 65, "none", gathered=True, bias=True),
    _case(65, 1, 5, 63, 40, "none"),
    _case(33, 3, 2, 20, 129, "one", gathered=True),
    _case(20, 4, 256, 7, 12, gathered=True, bias=True),
    _case(130, 1, 3, 40, 300, bias=True),
    _case(3, 2, 8, 130, 257, gathered=True),
    _case(0, 2, 3, 5, 6, gathered=True, bias=True),
    _case(4, 1, 3, 0, 6),
    _case(4, 1, 3, 5, 0, bias=True),
]
SWEEP = [_case(T, 2, 8, N, K, gathered=N > K) for N, K in ((7168, 1024), (1024, 3584)) for T in (1, 16, 256)]


def draw(rng: Random) -> Case:
    """Any legal combination, small."""
    case = _case(
        rng.choice([0, 1, 2, 5, 17, 70]), rng.choice([1, 1, 2, 5]), rng.choice([1, 2, 4, 9]),
        rng.choice([0, 1, 7, 16, 33, 64]), rng.choice([1, 8, 31, 100, 260]), rng.choice(["", "one", "none"]),
    )  # fmt: skip
    case.update(gathered=rng.random() < 0.5, bias=rng.random() < 0.4, head=rng.choice([0, 0, 3]))
    return case


def _segments(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor | None, int, int]:
    """offsets, order, k, and how many rows stand sorted."""
    order, _, offsets = reference.moe_sort(expert_numbers(case, generator), case["E"])
    if case.get("gathered"):
        return offsets, order, case["k"], order.shape[0]
    head = case.get("head", 0)
    return offsets + head, None, 1, order.shape[0] + head


def _linear_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    E, N, K = case["E"], case["N"], case["K"]
    offsets, order, k, rows = _segments(case, generator)
    x = normal(generator, rows if order is None else case["T"], K)
    bias = normal(generator, E, N).to(dtype) if case.get("bias") else None
    return x.to(dtype), (0.1 * normal(generator, E, N, K)).to(dtype), offsets, bias, order, k


def _outer_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    offsets, order, k, rows = _segments(case, generator)
    b = 0.1 * normal(generator, rows if order is None else case["T"], case["K"])
    return normal(generator, rows, case["N"]).to(dtype), b.to(dtype), offsets, order, k


def _flops(case: Case) -> float:
    return float(2 * case["T"] * case["k"] * case["N"] * case["K"])


def _sizes(named: Case) -> Case:
    """Of a call: the rows that experts take, or, where offsets are not known, all."""
    lengths = lengths_of(named.get("expert_offsets", named["offsets"]))
    rows = named.get("R", named.get("T")) if lengths is None else sum(lengths)
    return {**named, "T": rows, "k": 1, "K": named.get("in_features", named.get("K"))}


linear_op = Op(
    "grouped_linear",
    reference.grouped_linear,
    words=WORDS,
    axes={"x": "T K", "w": "E N K", "offsets": "E+1", "bias": "E N", "order": "R"},
    dtypes={"x": FLOATS, "w": ("x",), "offsets": INDEX, "bias": ("x", torch.float32), "order": INDEX},
    outputs={"out": "x"},
    shapes=lambda x, w, offsets, bias, order, k: ((rules.rows_of(x, order), w.shape[1]),),
    domain=Domain(_linear_inputs, CASES, SWEEP, draw, ("T",), "N"),
    flops=_flops,
    sizes=_sizes,
    autocast=("x", "w"),
    vmap=loop_vmap,
    sharding=rules.shard_columns(w=1, bias=1),
    validate=rules.validate_grouped_linear,
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_by_cuda},
    contents=("offsets order", rules.check_grouped_linear),
    contents_in_kernel=True,
)

outer_op = Op(
    "grouped_outer",
    reference.grouped_outer,
    words=WORDS,
    axes={"a": "R N", "b": "T K", "offsets": "E+1", "order": "R"},
    dtypes={"a": FLOATS, "b": ("a",), "offsets": INDEX, "order": INDEX},
    outputs={"out": "a"},
    shapes=lambda a, b, offsets, *_: ((offsets.shape[0] - 1, a.shape[1], b.shape[1]),),
    domain=Domain(_outer_inputs, CASES, SWEEP, draw, ("T",), "N"),
    flops=_flops,
    sizes=_sizes,
    autocast=("a", "b"),
    vmap=loop_vmap,
    sharding=rules.shard_outer,
    validate=rules.validate_outer,
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_by_cuda},
    contents=("offsets order", rules.check_outer),
    contents_in_kernel=True,
)

# Low-bit weights: those of the experts stacked, as `quant_linear` takes one.

_WEIGHT = {
    "codes": "E N row_bytes", "scales": "E N groups", "super_scales": "E N supers", "zeros": "E N groups",
    "offsets": "E N groups", "super_offsets": "E N supers", "codebook": "levels",
}  # fmt: skip
_LOW = (torch.int8, *FLOATS)
_WEIGHT_DTYPES: dict[str, tuple[str | torch.dtype, ...]] = {
    "codes": (torch.uint8, TILES), "scales": _LOW, "super_scales": FLOATS, "zeros": (torch.uint8,), "offsets": _LOW,
    "super_offsets": FLOATS, "codebook": (torch.float32, torch.float64), "permutation": INDEX,
}  # fmt: skip


def _quant_case(T: int, k: int, E: int, N: int, K: int, bits: int, group: int, form: str, **flags: Any) -> Case:
    return dict(_case(T, k, E, N, K, flags.pop("skew", "")), bits=bits, group=group, form=form, **flags)


QUANT_CASES = [
    _quant_case(1, 1, 1, 1, 1, 4, 32, "symmetric"),
    _quant_case(6, 2, 3, 17, 129, 4, 64, "codebook", gathered=True, bias=True),
    _quant_case(9, 1, 4, 33, 127, 3, 40, "zeros", permuted=True, bias=True, head=2),
    _quant_case(33, 2, 2, 20, 96, 4, 32, "offsets", scales="float16", skew="none", gathered=True),
    _quant_case(4, 2, 8, 9, 530, 6, 16, "symmetric", super_groups=16, gathered=True),
    _quant_case(7, 1, 3, 18, 515, 4, 32, "offsets", super_groups=8, skew="one"),
    _quant_case(6, 3, 64, 12, 70, 8, 128, "codebook", scales="bfloat16", gathered=True, permuted=True),
    _quant_case(0, 2, 3, 5, 6, 4, 32, "symmetric", gathered=True),
    _quant_case(4, 1, 3, 5, 0, 4, 32, "zeros", bias=True),
    _quant_case(7, 2, 3, 48, 416, 4, 32, "zeros", gathered=True, tiles=True),
]
QUANT_SWEEP = [_quant_case(T, 2, 8, 7168, 1024, 4, 64, "codebook", gathered=True) for T in (1, 16, 256)]


def draw_quant(rng: Random) -> Case:
    """Any legal combination, small."""
    bits = rng.randint(1, 8)
    case = dict(draw(rng), bits=rng.choice([bits, 4]), group=rng.choice([1, 8, 32, 100, 500]))
    case["form"] = rng.choice(["codebook", "symmetric", "zeros", "offsets"])
    case["scales"] = rng.choice(["float32", "bfloat16", "float16"])
    if rng.random() < 0.3:
        case["super_groups"] = rng.randint(1, 20)
    if rng.random() < 0.3:
        case["permuted"] = True
    if rng.random() < 0.2:
        case.update(N=16 * rng.randint(1, 5), K=32 * rng.randint(1, 9), bits=4, group=32 * rng.randint(1, 5))
        case["tiles"] = True
    return case


def _quant_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Every argument of the operators by name: a weight of `quant_linear` for each expert, with one codebook."""
    op = REGISTRY["quant_linear"]
    one = {**case, "M": 1}
    experts = [dict(zip(op.parameters, op.domain.make(one, dtype, generator), strict=True)) for _ in range(case["E"])]
    named: dict[str, Any] = dict(experts[0])
    for name in (*_WEIGHT, "permutation", "bias"):
        if name != "codebook" and named[name] is not None:
            named[name] = torch.stack([expert[name] for expert in experts])
    offsets, order, k, rows = _segments(case, generator)
    named.update(expert_offsets=offsets, order=order, k=k, in_features=case["K"])
    named["x"] = normal(generator, rows if order is None else case["T"], case["K"]).to(dtype)
    named["grad"] = normal(generator, rows, case["N"]).to(dtype)
    return named


def _make(parameters: tuple[str, ...], **renamed: str) -> Any:
    def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        named = _quant_inputs(case, dtype, generator)
        return tuple(named[renamed.get(name, name)] for name in parameters)

    return make


_LINEAR = tuple(reference.quant_grouped_linear.__annotations__)[:-1]
_MATMUL = tuple(reference.quant_grouped_matmul.__annotations__)[:-1]

_PRODUCT: dict[str, Any] = dict(  # of low-bit experts, with activations as they are or rounded
    words=WORDS,
    axes={"x": "T K", **_WEIGHT, "permutation": "E K", "bias": "E N", "expert_offsets": "E+1", "order": "R"},
    dtypes={"x": FLOATS, **_WEIGHT_DTYPES, "bias": ("x", torch.float32), "expert_offsets": INDEX, "order": INDEX},
    outputs={"out": "x"},
    shapes=lambda x, codes, *rest: ((rules.rows_of(x, rest[9]), codes.shape[1]),),
    domain=Domain(_make(_LINEAR), QUANT_CASES, QUANT_SWEEP, draw_quant, ("T",), "N"),
    flops=_flops,
    sizes=_sizes,
    autocast=("x",),
    vmap=loop_vmap,
    sharding=rules.shard_low_bit(codes=1, scales=1, super_scales=1, zeros=1, offsets=1, super_offsets=1, bias=1),
    validate=rules.validate_quant_linear,
    contents=("expert_offsets order permutation", rules.check_quant_linear),
    contents_in_kernel=True,
    public="grouped_linear",
    given={"expert_offsets": "offsets", **{name: f"w.{name}" for name in (*_WEIGHT, "permutation")}},
)

quant_linear_op = Op(
    "quant_grouped_linear",
    reference.quant_grouped_linear,
    refuses=reading_rows(cuda=rules.refused_by_cuda),
    **_PRODUCT,
)

quant_int8_op = Op(
    "quant_grouped_linear_int8",
    reference.quant_grouped_linear_int8,
    refuses=reading_rows(cpu=rules.refused_float64, cuda=lambda *_: "activations rounded to 8 bits: on a CPU"),
    gradient="activations are rounded to integers; train without int8_activations",
    **_PRODUCT,
)

quant_matmul_op = Op(
    "quant_grouped_matmul",
    reference.quant_grouped_matmul,
    words=WORDS,
    axes={"x": "R N", **_WEIGHT, "permutation": "E in_features", "expert_offsets": "E+1"},
    dtypes={"x": FLOATS, **_WEIGHT_DTYPES, "expert_offsets": INDEX},
    outputs={"out": "x"},
    shapes=lambda x, *rest: ((x.shape[0], rest[-1]),),
    domain=Domain(
        _make(_MATMUL, x="grad"),
        QUANT_CASES,
        QUANT_SWEEP[-1:],
        draw_quant,
        ("T",),
        "together",
    ),
    flops=_flops,
    sizes=_sizes,
    autocast=("x",),
    vmap=loop_vmap,
    sharding=rules.shard_nothing,
    validate=rules.validate_quant_matmul,
    refuses=reading_rows(cuda=rules.refused_by_cuda),
    contents=("expert_offsets permutation", rules.check_quant_matmul),
    contents_in_kernel=True,
)

linear_op.differentiable(rules.backward_grouped_linear, rules.save)
outer_op.differentiable(rules.backward_outer, rules.save)
quant_linear_op.differentiable(rules.backward_quant_linear, rules.save)
quant_matmul_op.differentiable(rules.backward_quant_matmul, rules.save)
