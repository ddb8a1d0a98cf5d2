"""metate over torch.distributed: DTensor placements for every operator, which importing this registers, and experts
spread over processes (ExpertParallel, spread_experts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

from metate.op import REGISTRY, Op
from metate.parallel.experts import ExpertParallel, spread_experts

__all__ = ["ExpertParallel", "distribute", "spread_experts"]


def distribute(op: Op, args: tuple[Any, ...], dims: Mapping[str, int], mesh: DeviceMesh) -> tuple[Any, ...]:
    """The arguments of a call as DTensors, for `op.torch_op`, which then runs as `op.sharding` says.

    Args:
        op: one of `metate.op.REGISTRY`.
        args: all its positional arguments, the same on every rank.
        dims: argument -> the dimension along which it is split; the other tensors are replicated.
        mesh: of one dimension.

    Raises:
        What torch.distributed.tensor.distribute_tensor does.
    """
    return tuple(
        distribute_tensor(arg, mesh, [Shard(dims[name]) if name in dims else Replicate()])
        if isinstance(arg, Tensor)
        else arg
        for name, arg in zip(op.parameters, args, strict=True)
    )


def _register(op: Op) -> None:
    @register_sharding(op.torch_op)  # type: ignore[untyped-decorator]
    def placements(*args: Any) -> list[Any]:
        args = (*args, *[None] * (len(op.parameters) - len(args)))
        tensors = [arg is not None and hasattr(arg, "shape") for arg in args]
        returned = () if op.writes else tuple(op.outputs)
        everywhere = [Replicate()] * len(returned), [Replicate() if t else None for t in tensors]
        return [
            everywhere,
            *(
                (
                    [Shard(outputs[name]) if name in outputs else Replicate() for name in returned],
                    [
                        (Shard(inputs[name]) if name in inputs else Replicate()) if t else None
                        for name, t in zip(op.parameters, tensors, strict=True)
                    ],
                )
                for outputs, inputs in op.sharding(op, args)
            ),
        ]


for _op in REGISTRY.values():
    _register(_op)
