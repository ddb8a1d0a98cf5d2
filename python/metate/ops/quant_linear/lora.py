"""Low-bit products with low-rank updates: their declarations, gradients and rules.

W + scaling · B A stands in for W, with the A, B and scaling of each row's adapter. Gradients are the same products
again: `lora_matmul` is `lora_linear` read across, and those of A and B are `lora_outer` of what `lora_shrink` gives.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail
from metate.low_bit import reading_rows
from metate.op import Case, Domain, Op, loop_vmap
from metate.ops.quant_linear import declaration, reference, rules
from metate.ops.quant_linear.declaration import FLOATS, weight_case
from metate.ops.quant_linear.rules import Args, Splits

_PAIR = {"A": "adapters rank K", "B": "adapters N rank", "scaling": "adapters", "adapter_ids": "M"}
_IDS = (torch.int32,)
_SUMS = (torch.float32, torch.float64)
_NARROW = ("x", torch.float32)
_PAIR_DTYPES: dict[str, tuple[str | torch.dtype, ...]] = {
    "A": _NARROW, "B": _NARROW, "scaling": _SUMS, "adapter_ids": _IDS,
}  # fmt: skip

# Refusals.


def _validate_update(op: str, x: Tensor, A: Tensor, scaling: Tensor, adapter_ids: Tensor | None) -> None:
    if not A.shape[0]:
        raise fail(op, "A", f"of shape {tuple(A.shape)}", "one adapter or more")
    _validate_ids(op, A.shape[0], adapter_ids)
    _validate_sums(op, x, "scaling", scaling)


def _validate_ids(op: str, adapters: int, adapter_ids: Tensor | None) -> None:
    if adapter_ids is None and adapters != 1:
        raise fail(op, "adapter_ids", None, f"an adapter for every row of x: there are {adapters}")


def _validate_sums(op: str, x: Tensor, name: str, sums: Tensor) -> None:
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    if sums.dtype != expected:
        raise fail(op, name, sums.dtype, f"{expected} beside {x.dtype}", error=TypeError)


def _validate_linear(x: Tensor, *rest: Any) -> None:
    rules.validate_linear("lora_linear")(x, *rest)
    A, _, scaling, adapter_ids = rest[9:13]
    _validate_update("lora_linear", x, A, scaling, adapter_ids)


def _validate_matmul(x: Tensor, *rest: Any) -> None:
    rules.validate_matmul("lora_matmul")(x, *rest)
    A, _, scaling, adapter_ids = rest[8:12]
    _validate_update("lora_matmul", x, A, scaling, adapter_ids)


def _validate_outer(x: Tensor, low: Tensor, adapter_ids: Tensor | None, adapters: int) -> None:
    if not 0 <= adapters < 2**31:
        raise fail("lora_outer", "adapters", adapters, "0 to 2**31 - 1, as many as adapter_ids can name")
    _validate_ids("lora_outer", adapters, adapter_ids)
    _validate_sums("lora_outer", x, "low", low)


def check_adapter_ids(op: str, adapter_ids: Tensor | None, adapters: int) -> None:
    """Contents, on a CPU: elsewhere looking waits for the device, and a number of no adapter adds nothing."""
    if adapter_ids is None or adapter_ids.device.type != "cpu" or not adapter_ids.numel():
        return
    least, most = (int(end) for end in adapter_ids.aminmax())
    if least < -1 or most >= adapters:
        got = f"{least if least < -1 else most} for a row"
        raise fail(op, "adapter_ids", got, f"0 to {adapters - 1}, or -1 for no adapter")


def _check_contents(*args: Any) -> None:
    _CHECK_PERMUTATION(*args)
    check_adapter_ids("lora_linear", args[13], args[10].shape[0])


_CHECK_PERMUTATION = rules.check_permutation("lora_linear")


def _refused_by_cuda(x: Tensor, adapters: int, rank: int, *sizes: int) -> str | None:
    if adapters >= 2**12 or rank >= 2**18:
        return f"{adapters} adapters of rank {rank}: fewer than 2**12, of less than 2**18"
    return rules.refused_by_cuda(x, *sizes)


# Gradients.


def _backward_linear(ctx: Any, grad: Tensor) -> Args:
    x, *weight, bias, A, B, scaling, adapter_ids = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx = matmul_op(grad, *weight, A, B, scaling, adapter_ids, *ctx.scalars, x.shape[1]) if needed[0] else None
    learned = rules.weight_gradients(grad, x, weight, ctx.scalars, needed[1:9])
    dbias = rules.bias_gradient(grad, bias) if needed[9] else None
    update = _update_gradients(x, grad, A, B, scaling, adapter_ids, needed[10:13])
    return (dx, *learned, dbias, *update, None, *[None] * len(ctx.scalars))


def _backward_matmul(ctx: Any, grad: Tensor) -> Args:
    x, *weight, A, B, scaling, adapter_ids = ctx.saved_tensors
    needed, scalars = ctx.needs_input_grad, ctx.scalars[:-1]
    dx = linear_op(grad, *weight, None, A, B, scaling, adapter_ids, *scalars) if needed[0] else None
    learned = rules.weight_gradients(x, grad, weight, scalars, needed[1:9])
    update = _update_gradients(grad, x, A, B, scaling, adapter_ids, needed[9:12])
    return (dx, *learned, *update, None, *[None] * len(ctx.scalars))


def _update_gradients(
    inputs: Tensor, outputs: Tensor, A: Tensor, B: Tensor, scaling: Tensor, adapter_ids: Tensor | None, needed: Any
) -> list[Tensor | None]:
    """Of A, B and scaling in Σ scaling · (inputs Aᵀ) · (outputs B), from the rows on either side, (M, K) and (M, N)."""
    found: list[Tensor | None] = [None] * 3
    adapters = A.shape[0]
    factor = factors_of(scaling, adapter_ids)
    from_inputs = shrink_op(inputs, A, adapter_ids) if needed[1] or needed[2] else None
    from_outputs = shrink_op(outputs, B.mT, adapter_ids) if needed[0] or needed[2] else None
    if from_outputs is not None and needed[0]:
        found[0] = outer_op(inputs, from_outputs * factor, adapter_ids, adapters).to(A.dtype)
    if from_inputs is not None and needed[1]:
        found[1] = outer_op(outputs, from_inputs * factor, adapter_ids, adapters).mT.to(B.dtype)
    if from_inputs is not None and from_outputs is not None and needed[2]:
        products = (from_inputs * from_outputs).sum(1, keepdim=True)
        if adapter_ids is not None:
            numbers = torch.arange(adapters, device=adapter_ids.device)
            products = torch.where(adapter_ids.unsqueeze(1) == numbers, products, 0)
        found[2] = products.sum(0).to(scaling.dtype)
    return found


def factors_of(scaling: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """The scaling of every row, (M, 1); of any adapter where a row has none, for what it multiplies is zero there."""
    return scaling if adapter_ids is None else scaling[adapter_ids.clamp(0, scaling.shape[0] - 1).long()].unsqueeze(1)


def _backward_shrink(ctx: Any, grad: Tensor) -> Args:
    x, A, adapter_ids = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx = shrink_op(grad.to(x.dtype), A.mT, adapter_ids).to(x.dtype) if needed[0] else None
    dA = outer_op(x, grad, adapter_ids, A.shape[0]).to(A.dtype) if needed[1] else None
    return dx, dA, None


def _backward_outer(ctx: Any, grad: Tensor) -> Args:
    x, low, adapter_ids = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx = shrink_op(low.to(x.dtype), grad.mT, adapter_ids).to(x.dtype) if needed[0] else None
    dlow = shrink_op(x, grad, adapter_ids) if needed[1] else None
    return dx, dlow, None, None


# Batching and sharding.


def _fold_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """Mapped x and adapter_ids have more rows; anything else mapped is another weight."""
    place = op.parameters.index("adapter_ids")
    if in_dims[0] is None or any(dim is not None for i, dim in enumerate(in_dims) if i not in (0, place)):
        return loop_vmap(op, info, in_dims, args)
    x, ids = args[0].movedim(in_dims[0], 0), args[place]
    if ids is not None:
        ids = ids.expand(info.batch_size, -1) if in_dims[place] is None else ids.movedim(in_dims[place], 0)
        ids = ids.flatten()
    out = op(x.flatten(0, 1), *args[1:place], ids, *args[place + 1 :])
    return out.unflatten(0, x.shape[:2]), 0


def _by_rows(op: Op, args: Args) -> dict[str, int]:
    named = dict(zip(op.parameters, args, strict=False))
    return {name: 0 for name in ("x", "adapter_ids") if named[name] is not None}


def _shard_linear(op: Op, args: Args) -> Splits:
    by_columns = [(out, {**given, "B": 1}) for out, given in rules.shard_linear(op, args)[1:]]
    return [({"out": 0}, _by_rows(op, args)), *by_columns]


def _shard_matmul(op: Op, args: Args) -> Splits:
    return [({"out": 0}, _by_rows(op, args))]


def _shard_shrink(op: Op, args: Args) -> Splits:
    return [({"out": 0}, _by_rows(op, args)), ({"out": 1}, {"A": 1})]


def _shard_outer(op: Op, args: Args) -> Splits:
    return [({"out": 1}, {"low": 1}), ({"out": 2}, {"x": 1})]


# Cases.


def _case(M: int, N: int, K: int, rank: int, adapters: int = 1, bits: int = 4, group: int = 32,
          form: str = "codebook", **flags: Any) -> Case:  # fmt: skip
    return weight_case(M, N, K, bits, group, form, rank=rank, adapters=adapters, **flags)


CASES = [
    _case(1, 1, 1, 1),
    _case(5, 65, 129, 3, 3, form="zeros", bias=True, ids=True),
    _case(2, 33, 127, 16, bits=3, group=40, form="zeros", permuted=True, bias=True),
    _case(9, 40, 257, 8, 2, bits=8, group=128, scales="bfloat16", ids=True, wide=True),
    _case(40, 70, 200, 17, 4, group=128, form="offsets", permuted=True, bias=True, ids=True),
    _case(3, 18, 515, 33, form="offsets", super_groups=8, wide=True),
    _case(70, 130, 1100, 20, 5, group=64, ids=True, bias=True),
    _case(130, 64, 63, 65, form="symmetric"),
    _case(6, 300, 384, 64, 2, bits=6, group=16, form="symmetric", ids=True),
    _case(4, 8, 40, 0, 2, ids=True, bias=True),
    _case(0, 5, 6, 2, 2, ids=True),
    _case(3, 0, 6, 4),
    _case(3, 5, 0, 4, form="zeros", bias=True),
]
SWEEP = [
    _case(M, N, K, rank, adapters, group=64, ids=adapters > 1)
    for N, K in ((4096, 4096), (4096, 14336))
    for M in (1, 16, 512)
    for rank, adapters in ((16, 1), (64, 1), (16, 8))
]


def draw(rng: Random) -> Case:
    """Any legal combination, small."""
    case = declaration.draw(rng)
    case.update(rank=rng.choice([0, 1, 2, 5, 8, 16, 17, 40]), adapters=rng.randint(1, 4), wide=rng.random() < 0.5)
    case["ids"] = case["adapters"] > 1 or rng.random() < 0.3
    return case


def _update_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """What the operators take beside a weight. `wide` adapters have float32 matrices beside any x."""
    M, N, K, rank, adapters = (case[name] for name in ("M", "N", "K", "rank", "adapters"))
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    learned = sums if case.get("wide") else dtype
    ids = torch.randint(-1, adapters, (M,), generator=generator, dtype=torch.int32)
    return dict(
        A=normal(adapters, rank, K).to(learned), B=(0.05 * normal(adapters, N, rank)).to(learned),
        scaling=(1 + normal(adapters).abs()).to(sums), adapter_ids=ids if case.get("ids") else None,
        low=normal(M, rank).to(sums), adapters=adapters,
    )  # fmt: skip


def _domain(reference: Any, **renamed: str) -> Domain:
    """Inputs of an operator by the names of its arguments."""
    parameters = tuple(reference.__annotations__)[:-1]

    def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
        named = {**declaration.inputs(case, dtype, generator), **_update_inputs(case, dtype, generator)}
        return tuple(named[renamed.get(name, name)] for name in parameters)

    return Domain(make, CASES, SWEEP, draw, ("M",), "M")


def _update_flops(case: Case) -> float:
    return float(2 * case["M"] * case["rank"] * case["K"])


def _flops(case: Case) -> float:
    return declaration.flops(case) + _update_flops(case) + float(2 * case["M"] * case["rank"] * case["N"])


# Operators.


linear_op = Op(
    "lora_linear",
    reference.lora_linear,
    words=declaration.WORDS,
    axes={"x": "M K", **declaration.WEIGHT, "permutation": "K", "bias": "N", **_PAIR},
    dtypes={"x": FLOATS, **declaration.WEIGHT_DTYPES, "bias": _NARROW, **_PAIR_DTYPES},
    outputs={"out": "x"},
    shapes=lambda x, codes, *_: ((x.shape[0], codes.shape[0]),),
    domain=_domain(reference.lora_linear),
    flops=_flops,
    autocast=("x", "A", "B"),
    vmap=_fold_vmap,
    sharding=_shard_linear,
    validate=_validate_linear,
    refuses=reading_rows(cuda=lambda x, codes, *rest: _refused_by_cuda(x, *rest[8].shape[:2], codes.shape[0])),
    contents=("permutation adapter_ids", _check_contents),
    contents_in_kernel=True,
)

matmul_op = Op(
    "lora_matmul",
    reference.lora_matmul,
    words=declaration.WORDS,
    axes={"x": "M N", **declaration.WEIGHT, "permutation": "in_features", **_PAIR, "A": "adapters rank in_features"},
    dtypes={"x": FLOATS, **declaration.WEIGHT_DTYPES, **_PAIR_DTYPES},
    outputs={"out": "x"},
    shapes=lambda x, *rest: ((x.shape[0], rest[-1]),),
    domain=dataclasses.replace(_domain(reference.lora_matmul, x="grad"), sweep=SWEEP[-2:]),
    flops=_flops,
    sizes=lambda named: {**named, "K": named["in_features"]},
    autocast=("x", "A", "B"),
    vmap=_fold_vmap,
    sharding=_shard_matmul,
    validate=_validate_matmul,
    refuses=reading_rows(cuda=lambda x, *rest: _refused_by_cuda(x, *rest[8].shape[:2], rest[-1])),
    contents=("permutation", rules.check_permutation("lora_matmul")),
    contents_in_kernel=True,
)

shrink_op = Op(
    "lora_shrink",
    reference.lora_shrink,
    words=declaration.WORDS,
    axes={"x": "M K", "A": _PAIR["A"], "adapter_ids": "M"},
    dtypes={"x": FLOATS, "A": _NARROW, "adapter_ids": _IDS},
    outputs={"out": torch.float32},
    shapes=lambda x, A, _: ((x.shape[0], A.shape[1]),),
    domain=_domain(reference.lora_shrink),
    flops=_update_flops,
    autocast=("x", "A"),
    vmap=_fold_vmap,
    sharding=_shard_shrink,
    validate=lambda x, A, adapter_ids: _validate_ids("lora_shrink", A.shape[0], adapter_ids),
    refuses={"cuda": lambda x, A, _: _refused_by_cuda(x, *A.shape[:2])},
)

outer_op = Op(
    "lora_outer",
    reference.lora_outer,
    words=declaration.WORDS,
    axes={"x": "M K", "low": "M rank", "adapter_ids": "M"},
    dtypes={"x": FLOATS, "low": _SUMS, "adapter_ids": _IDS},
    outputs={"out": torch.float32},
    shapes=lambda x, low, _, adapters: ((adapters, low.shape[1], x.shape[1]),),
    domain=dataclasses.replace(_domain(reference.lora_outer), batch="K"),  # rows are summed
    flops=_update_flops,
    autocast=("x",),
    vmap=loop_vmap,
    sharding=_shard_outer,
    validate=_validate_outer,
    refuses={"cuda": lambda x, low, _, adapters: _refused_by_cuda(x, adapters, low.shape[1])},
)

linear_op.differentiable(_backward_linear, rules.save)
matmul_op.differentiable(_backward_matmul, rules.save)
shrink_op.differentiable(_backward_shrink, rules.save)
outer_op.differentiable(_backward_outer, rules.save)
