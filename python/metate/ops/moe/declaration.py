"""Routing, permutation and activation: each operator with everything that is true of it whatever machine runs it."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.op import Case, Domain, Op, loop_vmap
from metate.ops.moe import reference, rules

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int32,)
_WIDE = (torch.float32, torch.float64)
WORDS = {
    "T": "tokens", "R": "rows", "E": "num_experts", "D": "hidden", "N": "out_features", "K": "in_features",
    "C": "columns", "I": "width",
}  # fmt: skip
_TOGETHER = "together"  # the batch axis, of size 1, of operators whose result depends on every row


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


# Routing.


def _route_case(T: int, E: int, k: int, score: int, **flags: Any) -> Case:
    return dict(T=T, E=E, k=k, score=score, **flags)


TOPK_CASES = [
    _route_case(1, 1, 1, 0),
    _route_case(7, 9, 3, 0),
    _route_case(65, 8, 2, 0, renormalise=True),
    _route_case(33, 64, 6, 0, groups=8, top_groups=3, scaling=16.0),
    _route_case(5, 256, 8, 2, groups=8, top_groups=4, rule=1, renormalise=True, scaling=2.5, bias=True),
    _route_case(63, 32, 4, 1),
    _route_case(17, 65, 7, 3, renormalise=True, scaling=1.5, bias=True),
    _route_case(3, 6, 6, 2, groups=3, top_groups=3, rule=1),
    _route_case(4, 5, 2, 1, bias=True, renormalise=True),
    _route_case(0, 8, 2, 0),
]
TOPK_SWEEP = [
    _route_case(T, E, k, score, **flags)
    for T in (1, 16, 256, 4096)
    for E, k, score, flags in (
        (8, 2, 0, dict(renormalise=True)),
        (256, 8, 2, dict(groups=8, top_groups=4, rule=1, renormalise=True, scaling=2.5, bias=True)),
    )
]


def draw_topk(rng: Random) -> Case:
    groups = rng.choice([1, 1, 2, 3, 5])
    experts = groups * rng.randint(1, 60 // groups)
    top_groups = rng.randint(1, groups)
    case = _route_case(
        rng.choice([0, 1, 2, 9, 40]), experts, rng.randint(1, min(8, experts // groups * top_groups)), rng.randrange(4)
    )
    case.update(groups=groups, top_groups=top_groups, rule=rng.randrange(2), scaling=rng.choice([1.0, 2.5]))
    case.update(renormalise=rng.random() < 0.5, bias=rng.random() < 0.4)
    return case


def _topk_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    T, E = case["T"], case["E"]
    return (
        normal(generator, T, E).to(dtype),
        0.1 * normal(generator, E).to(wide(dtype)) if case.get("bias") else None,
        case["k"], case["score"], case.get("groups", 1), case.get("top_groups", 1), case.get("rule", 0),
        case.get("renormalise", False), case.get("scaling", 1.0),
    )  # fmt: skip


def _topk_backward_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    args = _topk_inputs(case, dtype, generator)
    experts = reference.moe_topk(*args)[1]
    grad = normal(generator, *experts.shape).to(wide(dtype))
    return grad, args[0], experts, args[3], *args[7:]


topk_op = Op(
    "moe_topk",
    reference.moe_topk,
    words=WORDS,
    axes={"logits": "T E", "bias": "E"},
    dtypes={"logits": FLOATS, "bias": _WIDE},
    outputs={"weights": torch.float32, "experts": torch.int32},
    shapes=lambda logits, bias, top_k, *_: ((logits.shape[0], top_k),) * 2,
    domain=Domain(_topk_inputs, TOPK_CASES, TOPK_SWEEP, draw_topk, ("T",), "T"),
    flops=lambda case: float(8 * case["T"] * case["E"]),
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows,
    validate=rules.validate_topk,
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_topk_by_cuda},
    public="moe_route",
)

topk_backward_op = Op(
    "moe_topk_backward",
    reference.moe_topk_backward,
    words=WORDS,
    axes={"grad": "T k", "logits": "T E", "experts": "T k"},
    dtypes={"grad": _WIDE, "logits": FLOATS, "experts": INDEX},
    outputs={"d_logits": "logits"},
    shapes=lambda grad, logits, *_: (logits.shape,),
    domain=Domain(_topk_backward_inputs, TOPK_CASES, TOPK_SWEEP, draw_topk, ("T",), "T"),
    flops=lambda case: float(8 * case["T"] * case["E"]),
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows,
    validate=rules.validate_topk_backward,
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_topk_backward_by_cuda},
    contents=("experts", rules.check_topk_backward),
    contents_in_kernel=True,
)

# Permutation.


def expert_numbers(case: Case, generator: torch.Generator) -> Tensor:
    """(T, k) int32. `skew`: all to one expert, or a third of the slots to none."""
    T, k, E = case["T"], case["k"], case["E"]
    experts = torch.randint(0, E, (T, k), generator=generator, dtype=torch.int32)
    if case.get("skew") == "one":
        experts.fill_(E - 1)
    elif case.get("skew") == "none":
        experts[torch.rand(T, k, generator=generator) < 0.35] = E
    return experts


def _rows_case(T: int, k: int, E: int, D: int, skew: str = "", weighted: bool = True, together: int = 1) -> Case:
    return dict(T=T, k=k, E=E, D=D, skew=skew, weighted=weighted, together=together)


ROWS_CASES = [
    _rows_case(1, 1, 1, 1),
    _rows_case(5, 2, 7, 33),
    _rows_case(65, 8, 256, 63, "none"),
    _rows_case(63, 3, 4, 130, "one", weighted=False),
    _rows_case(9, 4, 3, 65, "none", weighted=False),
    _rows_case(130, 1, 9, 17),
    _rows_case(16, 2, 8, 257, "none"),
    _rows_case(0, 2, 8, 5),
    _rows_case(3, 2, 4, 0),
]
ROWS_SWEEP = [_rows_case(T, 2, 8, 1024) for T in (1, 16, 256, 4096)]


def draw_rows(rng: Random) -> Case:
    return _rows_case(
        rng.choice([0, 1, 2, 9, 70]), rng.randint(1, 8), rng.choice([1, 2, 8, 33]), rng.choice([1, 7, 64, 100, 300]),
        rng.choice(["", "one", "none"]), rng.random() < 0.6,
    )  # fmt: skip


def _permute_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    order = reference.moe_sort(expert_numbers(case, generator), case["E"])[0]
    return normal(generator, case["T"], case["D"]).to(dtype), order, case["k"]


def _unpermute_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Slots of no expert have rows of no meaning."""
    order, inverse, _ = reference.moe_sort(expert_numbers(case, generator), case["E"])
    y = normal(generator, order.shape[0], case["D"]).to(dtype)
    weights = normal(generator, case["T"], case["k"]).abs().to(wide(dtype)) if case["weighted"] else None
    return y, inverse, weights


def _unpermute_backward_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return normal(generator, case["T"], case["D"]).to(dtype), *_unpermute_inputs(case, dtype, generator)


def _moved(case: Case) -> float:
    return float(2 * case["T"] * case["k"] * case["D"])


sort_op = Op(
    "moe_sort",
    reference.moe_sort,
    words=WORDS,
    axes={"experts": "T k"},
    dtypes={"experts": INDEX},
    outputs={"order": torch.int32, "inverse": torch.int32, "offsets": torch.int32},
    shapes=lambda experts, num_experts: (
        (experts.shape[0] * experts.shape[1],),
        experts.shape,
        (num_experts + 1,),
    ),
    domain=Domain(
        lambda case, dtype, generator: (expert_numbers(case, generator), case["E"]),
        ROWS_CASES,
        ROWS_SWEEP,
        draw_rows,
        ("T",),
        _TOGETHER,
    ),
    flops=lambda case: float(4 * case["T"] * case["k"]),
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_nothing,
    validate=rules.validate_sort,
    gradient="numbers of experts are integers",
)

permute_op = Op(
    "moe_permute",
    reference.moe_permute,
    words=WORDS,
    axes={"x": "T D", "order": "R"},
    dtypes={"x": FLOATS, "order": INDEX},
    outputs={"out": "x"},
    shapes=lambda x, order, k: ((order.shape[0], x.shape[1]),),
    domain=Domain(_permute_inputs, ROWS_CASES, ROWS_SWEEP, draw_rows, ("T",), "D"),
    flops=_moved,
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_columns(x=1),
    validate=rules.validate_permute,
    contents=("order", rules.check_permute),
    contents_in_kernel=True,
)

unpermute_op = Op(
    "moe_unpermute",
    reference.moe_unpermute,
    words=WORDS,
    axes={"y": "R D", "inverse": "T k", "weights": "T k"},
    dtypes={"y": FLOATS, "inverse": INDEX, "weights": ("y", *_WIDE)},
    outputs={"out": "y"},
    shapes=lambda y, inverse, weights: ((inverse.shape[0], y.shape[1]),),
    domain=Domain(_unpermute_inputs, ROWS_CASES, ROWS_SWEEP, draw_rows, ("T",), "T"),
    flops=_moved,
    autocast=(),
    vmap=loop_vmap,
    sharding=lambda op, args: [
        *rules.shard_columns(y=1)(op, args),
        ({"out": 0}, {"inverse": 0} if args[2] is None else {"inverse": 0, "weights": 0}),
    ],
    validate=lambda y, inverse, weights: rules.validate_combine("moe_unpermute", y, weights),
    contents=("inverse", rules.check_unpermute),
    contents_in_kernel=True,
)

unpermute_backward_op = Op(
    "moe_unpermute_backward",
    reference.moe_unpermute_backward,
    words=WORDS,
    axes={"dout": "T D", "y": "R D", "inverse": "T k", "weights": "T k"},
    dtypes={"dout": FLOATS, "y": ("dout",), "inverse": INDEX, "weights": ("y", *_WIDE)},
    outputs={"dy": "y", "d_weights": torch.float32},
    shapes=lambda dout, y, inverse, weights: (y.shape, (0,) if weights is None else weights.shape),
    domain=Domain(_unpermute_backward_inputs, ROWS_CASES, ROWS_SWEEP, draw_rows, ("T",), _TOGETHER),
    flops=_moved,
    autocast=(),
    vmap=loop_vmap,
    sharding=rules.shard_nothing,
    validate=lambda dout, y, inverse, weights: rules.validate_combine("moe_unpermute_backward", y, weights),
    contents=("inverse", rules.check_unpermute_backward),
    contents_in_kernel=True,
)

# Activations.


def _activation_case(R: int, columns: int, activation: int, layout: int, **flags: Any) -> Case:
    return dict(R=R, C=columns, activation=activation, layout=layout, **flags)


ACTIVATION_CASES = [
    _activation_case(1, 1, 0, 3),
    _activation_case(3, 66, 0, 0),
    _activation_case(65, 130, 0, 2, limit=0.7, alpha=1.702, shift=1.0),
    _activation_case(7, 34, 1, 1),
    _activation_case(5, 126, 2, 0),
    _activation_case(4, 63, 4, 3),
    _activation_case(2, 1026, 4, 0, limit=1.0),
    _activation_case(63, 10, 3, 2),
    _activation_case(9, 65, 1, 3),
    _activation_case(0, 8, 0, 0),
    _activation_case(3, 0, 0, 0),
]
ACTIVATION_SWEEP = [_activation_case(R, 7168, 0, 0) for R in (2, 32, 512)]


def draw_activation(rng: Random) -> Case:
    case = _activation_case(
        rng.choice([0, 1, 2, 9, 40]), 2 * rng.choice([1, 3, 8, 31, 32, 100]), rng.randrange(5), rng.randrange(4)
    )
    if rng.random() < 0.4:
        case.update(limit=rng.choice([0.5, 2.0]), alpha=rng.choice([1.0, 1.702]), shift=rng.choice([0.0, 1.0]))
    return case


def _activation_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    return (
        normal(generator, case["R"], case["C"]).to(dtype), case["activation"], case["layout"],
        case.get("limit", math.inf), case.get("alpha", 1.0), case.get("shift", 0.0),
    )  # fmt: skip


def _activation_backward_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    args = _activation_inputs(case, dtype, generator)
    return normal(generator, case["R"], rules.width(args[0], case["layout"])).to(dtype), *args


activation_op = Op(
    "gated_activation",
    reference.gated_activation,
    words=WORDS,
    axes={"x": "R C"},
    dtypes={"x": FLOATS},
    outputs={"out": "x"},
    shapes=lambda x, activation, layout, *_: ((x.shape[0], rules.width(x, layout)),),
    domain=Domain(_activation_inputs, ACTIVATION_CASES, ACTIVATION_SWEEP, draw_activation, ("R",), "R"),
    flops=lambda case: float(10 * case["R"] * case["C"]),
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows,
    validate=rules.validate_activation("gated_activation"),
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_float64},
)

activation_backward_op = Op(
    "gated_activation_backward",
    reference.gated_activation_backward,
    words=WORDS,
    axes={"grad": "R I", "x": "R C"},
    dtypes={"grad": FLOATS, "x": ("grad",)},
    outputs={"dx": "x"},
    shapes=lambda grad, x, *_: (x.shape,),
    domain=Domain(_activation_backward_inputs, ACTIVATION_CASES, ACTIVATION_SWEEP, draw_activation, ("R",), "R"),
    flops=lambda case: float(20 * case["R"] * case["C"]),
    autocast=(),
    vmap=rules.fold_vmap,
    sharding=rules.shard_rows,
    validate=rules.validate_activation("gated_activation_backward"),
    refuses={"cpu": rules.refused_float64, "cuda": rules.refused_float64},
)

topk_op.differentiable(rules.backward_topk, rules.save_topk)
topk_backward_op.differentiable(rules.through_reference("moe_topk_backward"), rules.save)
permute_op.differentiable(rules.backward_permute, rules.save)
unpermute_op.differentiable(rules.backward_unpermute, rules.save)
unpermute_backward_op.differentiable(rules.backward_unpermute_backward, rules.save)
activation_op.differentiable(rules.backward_activation, rules.save)
activation_backward_op.differentiable(rules.through_reference("gated_activation_backward"), rules.save)
