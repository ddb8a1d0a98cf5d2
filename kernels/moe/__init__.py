"""Mixtures of experts in Triton: launchers with the parameters of the declared operators."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..quant_linear import round_rows, rows_of_a_tile, sizes_of, strided
from ..shared import launch, refusal
from .activation import backward_kernel, forward_kernel
from .grouped import linear_kernel, outer_kernel
from .route import topk_backward_kernel, topk_kernel
from .rows import permute_kernel, place_kernel, sort_kernel, unpermute_backward_kernel, unpermute_kernel

MOST_EXPERTS = 8192  # whose scores a program holds at once


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], beside: Tensor) -> None:
    if programs:
        launch(kernel, (programs,), arguments, beside)


def _padded(experts: int, groups: int) -> tuple[int, int]:
    """Groups and experts of a group, as powers of two."""
    return triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)


def moe_topk(
    logits: Tensor, bias: Tensor | None, k: int, score: int, groups: int, top_groups: int, group_rule: int,
    renormalise: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, size = logits.shape
    weights = torch.empty((tokens, k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, k), dtype=torch.int32, device=logits.device)
    runs, length = _padded(size, groups)
    block = max(1, min(16, 2048 // (runs * length)))
    arguments = {
        "logits": logits, "bias": strided(bias), "weights": weights, "experts": experts, "strides": logits.stride(),
        "tokens": tokens, "group_size": size // groups, "groups": groups, "top_groups": top_groups, "k": k,
        "scaling": float(scaling), "SCORE": score, "GROUP_RULE": group_rule, "RENORMALISE": renormalise,
        "BLOCK_T": block, "GROUPS": runs, "SIZE": length, "K": triton.next_power_of_2(k),
    }  # fmt: skip
    _launch(topk_kernel, triton.cdiv(tokens, block), arguments, logits)
    return weights, experts


def moe_topk_backward(
    grad: Tensor, logits: Tensor, experts: Tensor, score: int, renormalise: bool, scaling: float
) -> Tensor:
    tokens, size = logits.shape
    d_logits = logits.new_empty(tokens, size)
    length, k = triton.next_power_of_2(max(size, 1)), experts.shape[1]
    block = max(1, min(16, 2048 // length))
    arguments = {
        "grad": grad, "logits": logits, "experts": experts, "d_logits": d_logits, "grad_strides": grad.stride(),
        "strides": logits.stride(), "expert_strides": experts.stride(), "tokens": tokens, "size": size, "k": k,
        "scaling": float(scaling), "SCORE": score, "RENORMALISE": renormalise, "BLOCK_T": block, "SIZE": length,
        "K": triton.next_power_of_2(max(k, 1)),
    }  # fmt: skip
    _launch(topk_backward_kernel, triton.cdiv(tokens, block) if size else 0, arguments, logits)
    return d_logits


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = experts.numel()
    order = experts.new_empty(slots)
    inverse = torch.empty_like(experts, memory_format=torch.contiguous_format)
    offsets = experts.new_empty(num_experts + 1)
    arguments = {
        "experts": experts, "order": order, "inverse": inverse, "offsets": offsets, "strides": experts.stride(),
        "k": max(experts.shape[1], 1), "slots": slots, "num_experts": num_experts, "BLOCK_E": 4, "BLOCK_S": 1024,
    }  # fmt: skip
    _launch(sort_kernel, triton.cdiv(num_experts + 1, 4), arguments, experts)
    return order, inverse, offsets


def _tiles(rows: int, columns: int) -> tuple[int, dict[str, int]]:
    """How many tiles of 1024 numbers there are, and of what shape."""
    width = max(16, min(triton.next_power_of_2(max(columns, 1)), 512))
    height = 1024 // width
    return triton.cdiv(rows, height) * triton.cdiv(columns, width), {"BLOCK_R": height, "BLOCK_D": width}


def moe_permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    out = x.new_empty(order.shape[0], x.shape[1])
    programs, blocks = _tiles(*out.shape)
    arguments = {
        "x": x, "order": order, "out": out, "x_strides": x.stride(), "order_stride": order.stride(0), "k": k,
        "slots": x.shape[0] * k, "rows": out.shape[0], "columns": out.shape[1],
    }  # fmt: skip
    _launch(permute_kernel, programs, arguments | blocks, x)
    return out


def moe_unpermute(y: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    tokens, k = inverse.shape
    out = y.new_empty(tokens, y.shape[1])
    programs, blocks = _tiles(*out.shape)
    arguments = {
        "y": y, "inverse": inverse, "weights": strided(weights), "out": out, "y_strides": y.stride(),
        "inverse_strides": inverse.stride(), "k": k, "rows": y.shape[0], "tokens": tokens, "columns": out.shape[1],
    }  # fmt: skip
    _launch(unpermute_kernel, programs, arguments | blocks, y)
    return out


def moe_unpermute_backward(dout: Tensor, y: Tensor, inverse: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    (rows, columns), k, slots = y.shape, inverse.shape[1], inverse.numel()
    dy = y.new_empty(rows, columns)
    d_weights = torch.zeros((0,) if weights is None else inverse.shape, dtype=torch.float32, device=y.device)
    order = torch.full((rows,), -1, dtype=torch.int32, device=y.device)
    arguments = {
        "dout": dout, "y": y, "inverse": inverse, "order": order, "weights": strided(weights), "dy": dy,
        "d_weights": d_weights, "dout_strides": dout.stride(), "y_strides": y.stride(),
        "inverse_strides": inverse.stride(), "k": max(k, 1), "rows": rows, "slots": slots, "columns": columns,
        "BLOCK": 1024,
    }  # fmt: skip
    _, blocks = _tiles(rows, columns)
    _launch(place_kernel, triton.cdiv(slots, 1024), arguments, y)
    _launch(unpermute_backward_kernel, triton.cdiv(rows, blocks["BLOCK_R"]), arguments | blocks, y)
    return dy, d_weights


# Grouped products.


def _grouped(x: Tensor, starts: Tensor, order: Tensor | None, k: int, outputs: int, **given: Any) -> Tensor:
    """A result of `outputs` columns. Tiles of rows are as high as those of an expert on average."""
    rows, experts = x.shape[0] if order is None else order.shape[0], starts.shape[0] - 1
    out = x.new_empty(rows, outputs)
    if not experts:
        return out.zero_()
    block = rows_of_a_tile(triton.cdiv(rows, experts), x.dtype)
    parts = min(rows, experts + 2)  # that have rows, at most
    tiles = (rows - parts) // block + parts
    absent = dict.fromkeys(("w", *_LEVELS, "codebook", "permutation", "bias", "places"))
    arguments = {
        **absent, "TRANSPOSED": False, **given, "x": x, "out": out, "x_strides": x.stride(), "order": strided(order),
        "k": k, "slots": x.shape[0] * k, "expert_offsets": strided(starts), "experts": experts, "out_rows": rows,
        "tiles": tiles, "outputs": outputs, "BLOCK_M": block,
        "SEGMENTS": min(triton.next_power_of_2(experts + 2), 1024),
    }  # fmt: skip
    if out.numel():
        launch(linear_kernel, lambda chosen: (tiles * triton.cdiv(outputs, chosen["BLOCK_N"]),), arguments, x)
    return out


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, order: Tensor | None, k: int) -> Tensor:
    _, N, K = w.shape
    sizes = sizes_of(K, N, K, 0, 0, 1, 0, 0)
    return _grouped(x, offsets, order, k, N, w=strided(w), bias=strided(bias), **sizes)


_LEVELS = ("codes", "scales", "super_scales", "zeros", "offsets", "super_offsets")


def quant_grouped_linear(x: Tensor, *rest: Any) -> Tensor:
    *levels, codebook, permutation, bias, starts, order = rest[:11]
    *scalars, k = rest[11:]
    weight = {name: strided(tensor) for name, tensor in zip(_LEVELS, levels, strict=True)}
    _, rows, row_bytes = levels[0].shape
    return _grouped(
        x, starts, order, k, rows, **weight, codebook=strided(codebook), permutation=strided(permutation),
        bias=strided(bias), **sizes_of(x.shape[1], rows, x.shape[1], row_bytes, *scalars),
    )  # fmt: skip


def quant_grouped_linear_int8(x: Tensor, *rest: Any) -> Tensor:
    return quant_grouped_linear(round_rows(x, rest[12]), *rest)


def quant_grouped_matmul(x: Tensor, *rest: Any) -> Tensor:
    *levels, codebook, permutation, starts = rest[:9]
    *scalars, columns = rest[9:]
    weight = {name: strided(tensor) for name, tensor in zip(_LEVELS, levels, strict=True)}
    _, rows, row_bytes = levels[0].shape
    return _grouped(
        x, starts, None, 1, columns, **weight, codebook=strided(codebook), places=strided(permutation),
        TRANSPOSED=True, **sizes_of(rows, rows, columns, row_bytes, *scalars),
    )  # fmt: skip


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, k: int) -> Tensor:
    experts, N, K = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    out = a.new_empty(experts, N, K)
    arguments = {
        "a": a, "b": b, "out": out, "a_strides": a.stride(), "b_strides": b.stride(), "order": strided(order), "k": k,
        "slots": b.shape[0] * k, "expert_offsets": strided(offsets), "rows": a.shape[0], "N": N, "K": K,
    }  # fmt: skip

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (experts * triton.cdiv(N, chosen["BLOCK_N"]) * triton.cdiv(K, chosen["BLOCK_K"]),)

    if out.numel():
        launch(outer_kernel, grid, arguments, a)
    return out


# Activations.


def gated_activation(x: Tensor, activation: int, layout: int, limit: float, alpha: float, shift: float) -> Tensor:
    rows, width = x.shape[0], x.shape[1] if layout == 3 else x.shape[1] // 2
    out = x.new_empty(rows, width)
    programs, blocks = _tiles(rows, width)
    arguments = {
        "x": x, "out": out, "x_strides": x.stride(), "rows": rows, "width": width, "limit": float(limit),
        "alpha": float(alpha), "shift": float(shift), "ACTIVATION": activation, "LAYOUT": layout,
    }  # fmt: skip
    _launch(forward_kernel, programs, arguments | blocks, x)
    return out


def gated_activation_backward(
    grad: Tensor, x: Tensor, activation: int, layout: int, limit: float, alpha: float, shift: float
) -> Tensor:
    (rows, width), columns = grad.shape, x.shape[1]
    dx = x.new_empty(rows, columns)
    programs, blocks = _tiles(rows, width)
    arguments = {
        "grad": grad, "x": x, "dx": dx, "grad_strides": grad.stride(), "x_strides": x.stride(), "rows": rows,
        "width": width, "columns": columns, "limit": float(limit), "alpha": float(alpha), "shift": float(shift),
        "ACTIVATION": activation, "LAYOUT": layout,
    }  # fmt: skip
    _launch(backward_kernel, programs, arguments | blocks, x)
    return dx


# Refusals.


def _refusal(x: Tensor, *sizes: int) -> str | None:
    too_many = [size for size in (*x.shape, *sizes) if size >= 2**30]
    return refusal(x) or (f"{too_many[0]} rows or columns: fewer than 2**30" if too_many else None)


def _refused_route(logits: Tensor, groups: int) -> str | None:
    runs, length = _padded(logits.shape[1], groups)
    if runs * length > MOST_EXPERTS:
        return f"{logits.shape[1]} experts in {groups} groups: up to {MOST_EXPERTS}, counted in powers of two"
    return _refusal(logits)


def _refused_sort(experts: Tensor, _: int) -> str | None:
    return f"{experts.numel()} slots: fewer than 2**30" if experts.numel() >= 2**30 else None


def _refused_rows(x: Tensor, *tensors: Any) -> str | None:
    return _refusal(x, *(t.numel() for t in tensors if isinstance(t, Tensor) and t.dtype == torch.int32))


def _refused_low_bit(x: Tensor, codes: Tensor, *rest: Any) -> str | None:
    return _refused_rows(x, rest[9]) or _refusal(x, *codes.shape, x.shape[0] * rest[-1])


def _refused_int8(x: Tensor, *rest: Any) -> str | None:
    if rest[7] is not None:
        return "activations rounded to 8 bits in an order of each expert: on a CPU"
    return _refused_low_bit(x, *rest)


REFUSES = {
    "moe_topk": lambda logits, bias, k, score, groups, *_: _refused_route(logits, groups),
    "moe_topk_backward": lambda grad, logits, *_: _refused_route(logits, 1),
    "moe_sort": _refused_sort,
    "moe_permute": lambda x, order, k: _refused_rows(x, order) or _refusal(x, x.shape[0] * k),
    "moe_unpermute": _refused_rows,
    "moe_unpermute_backward": _refused_rows,
    "grouped_linear": lambda x, w, *rest: _refused_rows(x, rest[2]) or _refusal(x, *w.shape, x.shape[0] * rest[-1]),
    "grouped_outer": lambda a, b, *rest: _refused_rows(a, rest[1]) or _refusal(b, b.shape[0] * rest[-1]),
    "quant_grouped_linear": _refused_low_bit,
    "quant_grouped_linear_int8": _refused_int8,
    "quant_grouped_matmul": lambda x, codes, *rest: _refusal(x, *codes.shape, rest[-1]),
    "gated_activation": lambda x, *_: _refusal(x),
    "gated_activation_backward": lambda grad, x, *_: _refusal(x),
}
