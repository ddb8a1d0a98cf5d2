"""Experts of a checkpoint, which lie there one by one, stacked as metate.nn.MoE holds them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metate import FormatError, QuantizedExperts, QuantizedWeight
from metate.models.config import LlamaConfig
from metate.ops.moe.experts import same_numbers

Weight = QuantizedExperts | QuantizedWeight | Tensor

_EXPERT = re.compile(r"(layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+?)(?:\.weight)?")
_ROUTER = re.compile(r"(layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate(?:\.weight)?")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names
_STACKS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def inner_names(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Weights by their names inside of Llama, one at a time."""
    for name in found:
        if not name.endswith("rotary_emb.inv_freq"):
            yield name.removeprefix("model."), found[name]


def stacked_experts(found: Mapping[str, Any], config: LlamaConfig) -> Iterator[tuple[str, Weight]]:
    """`inner_names` of a mixture: experts stacked, a layer at a time."""
    experts: dict[tuple[str, str, int], str] = {}  # (layer, part, number) -> name in the checkpoint
    for name in found:
        inner = name.removeprefix("model.")
        if expert := _EXPERT.fullmatch(inner):
            layer, number, part = expert.groups()
            experts[layer, _PARTS.get(part, part), int(number)] = name
        elif router := _ROUTER.fullmatch(inner):
            weight = found[name]
            yield f"{router[1]}.mlp.router.weight", weight if isinstance(weight, Tensor) else weight.dequantize()
        elif not name.endswith("rotary_emb.inv_freq"):
            yield inner, found[name]
    for layer in sorted({layer for layer, _, _ in experts}):
        for stack, parts in _STACKS.items():
            try:
                rows = [[found[experts.pop((layer, p, i))] for p in parts] for i in range(config.num_experts)]
            except KeyError as error:
                raise FormatError(f"metate.Llama: the checkpoint lacks an expert: {error}") from error
            yield f"{layer}.mlp.experts.{stack}.weight", stacked_weights(rows)
    if experts:
        raise FormatError(f"metate.Llama: the checkpoint has too much: {', '.join(list(experts.values())[:5])}")


def stacked_weights(experts: Sequence[Sequence[Any]]) -> QuantizedExperts | Tensor:
    """One weight for every expert, the parts of each below one another. Low-bit ones of unlike forms become dense."""
    parts = [part for expert in experts for part in expert]
    if all(isinstance(part, QuantizedWeight) and _alike(part, parts[0]) for part in parts) and all(
        _same(expert[0].permutation, part.permutation) for expert in experts for part in expert
    ):
        return QuantizedExperts.stack([_below(expert) for expert in experts])
    dense = [[p.dequantize() if isinstance(p, QuantizedWeight) else p for p in expert] for expert in experts]
    return torch.stack([torch.cat(expert) for expert in dense])


def _alike(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    numbers = ("bits", "group_size", "super_groups", "zero")
    dtypes_a, dtypes_b = ({name: t.dtype for name, t in w.tensors.items()} for w in (a, b))
    alike = all(getattr(a, name) == getattr(b, name) for name in numbers)
    return alike and dtypes_a == dtypes_b and _same(a.codebook, b.codebook)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and same_numbers(a, b))


def _below(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several weights, which share codebook and permutation, as one."""
    rows = [name for name in parts[0].tensors if name not in ("codebook", "permutation")]
    joined: dict[str, Any] = {name: torch.cat([part.tensors[name] for part in parts]) for name in rows}
    shape = (sum(part.out_features for part in parts), parts[0].in_features)
    return dataclasses.replace(parts[0], shape=shape, **joined)
