"""What the low-bit products refuse, their gradients, and how they are batched and sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metate.errors import fail
from metate.op import Op, loop_vmap
from metate.ops.quant_linear import reference
from metate.ops.quant_linear.weight import packed_bytes, unpack_codes

Args = tuple[Any, ...]
Splits = list[tuple[dict[str, int], dict[str, int]]]  # dimensions that outputs and arguments are split over
LOW = (torch.int8, torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Refusals.


def refused_by_cuda(x: Tensor, *sizes: int) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: bfloat16 or float16 (tensor cores)"
    too_many = [size for size in (*x.shape, *sizes) if size >= 2**27]
    return f"{too_many[0]} rows or columns: fewer than 2**27" if too_many else None


def validate_linear(op: str) -> Callable[..., None]:
    def validate(x: Tensor, *rest: Any) -> None:
        bits, group_size, super_groups, zero = rest[-4:]
        validate_weight(op, x, rest[:_PERMUTATION], bits, group_size, super_groups, zero, x.shape[1])

    return validate


def validate_matmul(op: str) -> Callable[..., None]:
    def validate(x: Tensor, *rest: Any) -> None:
        if not 0 <= rest[-1] < 2**48:
            raise fail(op, "in_features", rest[-1], "0 to 2**48")
        validate_weight(op, x, rest[:_PERMUTATION], *rest[-5:])

    return validate


def validate_weight(
    op: str, x: Tensor, tensors: Any, bits: int, group_size: int, super_groups: int, zero: int, columns: Any
) -> None:
    codes, scales, super_scales, zeros, offsets, super_offsets, codebook, _ = tensors
    for name, value, least, most in (("bits", bits, 1, 8), ("group_size", group_size, 1, 2**62),
                                     ("super_groups", super_groups, 0, 2**62), ("zero", zero, 0, 255)):  # fmt: skip
        if not least <= value <= most:
            raise fail(op, name, value, f"{least} to {most}")
    groups = _ceil(columns, group_size)
    supers = _ceil(groups, super_groups) if super_groups else 0
    widths = [("codes", codes, packed_bytes(columns, bits)), ("scales", scales, groups), ("zeros", zeros, groups),
              ("offsets", offsets, groups), ("super_scales", super_scales, supers),
              ("super_offsets", super_offsets, supers)]  # fmt: skip
    for name, tensor, width in widths:
        if tensor is not None and tensor.shape[1] != width:
            expected = f"({codes.shape[0]}, {width}) for {columns} columns of {bits} bits in groups of {group_size}"
            raise fail(op, name, f"of shape {tuple(tensor.shape)}", expected)
    if codebook is not None and codebook.shape[0] != 2**bits:
        raise fail(op, "codebook", f"of {codebook.shape[0]} values", f"2**bits = {2**bits}")
    if codebook is not None and (zero or zeros is not None):
        raise fail(op, "codebook", "given beside zero or zeros", "one or the other")
    for name, fine, coarse in (("scales", scales, super_scales), ("offsets", offsets, super_offsets)):
        if (fine is not None and fine.dtype == torch.int8) != (coarse is not None):
            got = "None" if coarse is None else "given"
            raise fail(op, f"super_{name}", got, f"a tensor beside int8 {name}, None otherwise")
    for name, tensor in (("scales", scales), ("offsets", offsets), ("super_scales", super_scales),
                         ("super_offsets", super_offsets), ("codebook", codebook)):  # fmt: skip
        if tensor is not None and tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise fail(op, name, "float64", f"float32 beside {x.dtype}", error=TypeError)


def _ceil(a: Any, b: int) -> Any:
    return (a + b - 1) // b


_PERMUTATION = 8  # its place among the arguments of every product
_seen: Any = WeakIdKeyDictionary()  # permutation -> its version when it was found to be one


def check_permutation(op: str) -> Callable[..., None]:
    """Contents, where looking costs little: on a CPU, once a tensor."""

    def check(*args: Any) -> None:
        permutation = args[_PERMUTATION]
        if permutation is None or permutation.device.type != "cpu":
            return
        version = None if permutation.is_inference() else permutation._version
        if version is not None and _seen.get(permutation) == version:
            return
        order = torch.arange(permutation.shape[0], dtype=torch.int32)
        if not torch.equal(permutation.sort().values, order):
            raise fail(op, "permutation", "not one", f"every number from 0 to {permutation.shape[0] - 1} once")
        if version is not None:
            _seen[permutation] = version

    return check


# Gradients.


def save(ctx: Any, inputs: Args, output: Tensor) -> None:
    tensors = [a for a in inputs if a is None or isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.scalars = inputs[len(tensors) :]


def backward_linear(matmul: Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> Args:
        x, *tensors, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dx = matmul(grad, *tensors, *ctx.scalars, x.shape[1]) if needed[0] else None
        learned = weight_gradients(grad, x, tensors, ctx.scalars, needed[1:9])
        dbias = bias_gradient(grad, bias) if needed[9] else None
        return (dx, *learned, dbias, *[None] * len(ctx.scalars))

    return backward


def backward_matmul(linear: Op) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> Args:
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dx = linear(grad, *tensors, None, *ctx.scalars[:-1]) if needed[0] else None
        learned = weight_gradients(x, grad, tensors, ctx.scalars[:-1], needed[1:9])
        return (dx, *learned, *[None] * len(ctx.scalars))

    return backward


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.to(_wide(grad)).sum(0).to(bias.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weight_gradients(rows: Tensor, columns: Tensor, tensors: Any, scalars: Args, needed: Any) -> list[Tensor | None]:
    """Of scales, offsets and codebook, from d W = rowsᵀ columns: memory of (N, K), taken only where they learn."""
    codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation = tensors
    if not any(needed):
        return [None] * 8
    bits, group_size, super_groups, zero = scalars
    wide = _wide(rows)
    columns = columns if permutation is None else columns[:, permutation.long()]
    d_weight = rows.to(wide).T @ columns.to(wide)
    unpacked = unpack_codes(codes, bits, d_weight.shape[1])
    if codebook is not None:
        values = codebook.to(wide)[unpacked.int()]
    else:
        values = reference.integers(unpacked, zeros, group_size, zero).to(wide)
    d_scale = _sum_groups(d_weight * values, group_size)
    found: list[Tensor | None] = [None] * 8
    found[1], found[2] = _both_gradients(d_scale, scales, super_scales, super_groups)
    if offsets is not None:
        d_offset = _sum_groups(d_weight, group_size)
        found[4], found[5] = _both_gradients(d_offset, offsets, super_offsets, super_groups)
    if codebook is not None and needed[6]:
        level = reference.both_levels(scales, super_scales, super_groups).to(wide)
        shares = d_weight * reference.per_column(level, group_size, d_weight.shape[1])
        zero_sum = torch.zeros(codebook.shape[0], dtype=wide, device=codebook.device)
        found[6] = zero_sum.index_add(0, unpacked.flatten().int(), shares.flatten()).to(codebook.dtype)
    return found


def _both_gradients(
    d_level: Tensor, fine: Tensor, coarse: Tensor | None, super_groups: int
) -> tuple[Tensor | None, Tensor | None]:
    if coarse is None:
        return d_level.to(fine.dtype), None
    return None, _sum_groups(d_level * fine.to(d_level.dtype), super_groups).to(coarse.dtype)


def _sum_groups(x: Tensor, group: int) -> Tensor:
    """(N, columns) → (N, groups): sums over the columns of each group."""
    columns = x.shape[1]
    group = max(1, min(group, columns))
    padded: Tensor = torch.nn.functional.pad(x, (0, -columns % group))
    return padded.reshape(x.shape[0], padded.shape[1] // group, group).sum(2)


# Batching and sharding.


def fold_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """A mapped x has more rows; anything else mapped is another weight."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return loop_vmap(op, info, in_dims, args)
    x = args[0].movedim(in_dims[0], 0)
    return op.torch_op(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


BY_ROWS = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets", "bias")


def shard_linear(op: Op, args: Args) -> Splits:
    """Over the rows of x, or over those of W."""
    named = dict(zip(op.parameters, args, strict=False))
    return [({"out": 0}, {"x": 0}), ({"out": 1}, {name: 0 for name in BY_ROWS if named[name] is not None})]


def shard_matmul(op: Op, args: Args) -> Splits:
    return [({"out": 0}, {"x": 0})]
