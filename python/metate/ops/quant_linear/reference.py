"""The semantics of csrc/quant_linear.h in plain torch: schema, truth, error budget and fallback of every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import int8_activations, stored_weight


def quant_linear(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, super_groups: int, zero: int,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias."""
    weight = stored_weight(
        codes, scales, super_scales, zeros, offsets, super_offsets, codebook, bits, group_size, super_groups, zero,
        x.shape[1],
    )  # fmt: skip
    out = (x if permutation is None else x[:, permutation.long()]) @ weight.to(x.dtype).T
    return out if bias is None else out + bias


def quant_linear_int8(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, bits: int, group_size: int, super_groups: int, zero: int,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias with the activations rounded to 8 bits."""
    permuted = x if permutation is None else x[:, permutation.long()]
    rounded = int8_activations(permuted, group_size)
    return quant_linear(
        rounded, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, None, bias, bits, group_size,
        super_groups, zero,
    )  # fmt: skip


def quant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bits: int, group_size: int, super_groups: int, zero: int, in_features: int,
) -> Tensor:  # fmt: skip
    """x W: what carries a gradient of `quant_linear` back to its input."""
    weight = stored_weight(
        codes, scales, super_scales, zeros, offsets, super_offsets, codebook, bits, group_size, super_groups, zero,
        in_features,
    )  # fmt: skip
    out = x @ weight.to(x.dtype)
    return out if permutation is None else out[:, torch.argsort(permutation.long())]


def dequantize(
    out: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bits: int, group_size: int, super_groups: int, zero: int,
) -> Tensor:  # fmt: skip
    """W, which is what `out` is after the call."""
    weight = stored_weight(
        codes, scales, super_scales, zeros, offsets, super_offsets, codebook, bits, group_size, super_groups, zero,
        out.shape[1],
    )  # fmt: skip
    return weight if permutation is None else weight[:, torch.argsort(permutation.long())]


# Low-rank updates.


def _rows_by_adapter(adapter_ids: Tensor | None, adapters: int) -> Iterator[tuple[int, Any]]:
    """(adapter, numbers of its rows); rows whose number is none of an adapter are left out."""
    for adapter in range(adapters):
        yield adapter, slice(None) if adapter_ids is None else (adapter_ids == adapter).nonzero().flatten()


def lora_linear(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    bias: Tensor | None, A: Tensor, B: Tensor, scaling: Tensor, adapter_ids: Tensor | None, bits: int,
    group_size: int, super_groups: int, zero: int,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias + scaling (x Aᵀ) Bᵀ."""
    out = quant_linear(
        x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bias, bits, group_size,
        super_groups, zero,
    )  # fmt: skip
    for adapter, rows in _rows_by_adapter(adapter_ids, A.shape[0]):
        out[rows] += scaling[adapter] * (x[rows] @ A[adapter].T @ B[adapter].T)
    return out


def lora_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, super_scales: Tensor | None, zeros: Tensor | None,
    offsets: Tensor | None, super_offsets: Tensor | None, codebook: Tensor | None, permutation: Tensor | None,
    A: Tensor, B: Tensor, scaling: Tensor, adapter_ids: Tensor | None, bits: int, group_size: int, super_groups: int,
    zero: int, in_features: int,
) -> Tensor:  # fmt: skip
    """x W + scaling (x B) A: what carries a gradient of `lora_linear` back to its input."""
    out = quant_matmul(
        x, codes, scales, super_scales, zeros, offsets, super_offsets, codebook, permutation, bits, group_size,
        super_groups, zero, in_features,
    )  # fmt: skip
    for adapter, rows in _rows_by_adapter(adapter_ids, A.shape[0]):
        out[rows] += scaling[adapter] * (x[rows] @ B[adapter] @ A[adapter])
    return out


def lora_shrink(x: Tensor, A: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """x Aᵀ with the A of each row's adapter."""
    out = x.new_zeros(x.shape[0], A.shape[1])
    for adapter, rows in _rows_by_adapter(adapter_ids, A.shape[0]):
        out[rows] = x[rows] @ A[adapter].T
    return out


def lora_outer(x: Tensor, low: Tensor, adapter_ids: Tensor | None, adapters: int) -> Tensor:
    """lowᵀ x over the rows of each adapter: the gradient of `lora_shrink` to A."""
    out = x.new_zeros(adapters, low.shape[1], x.shape[1])
    for adapter, rows in _rows_by_adapter(adapter_ids, adapters):
        out[adapter] = low[rows].T @ x[rows]
    return out
