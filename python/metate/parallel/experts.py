"""Expert parallelism: every process holds some of the experts, tokens travel to theirs and back (Lepikhin et al. 2020).

Rows sorted by expert are sorted by process too, so one all-to-all takes them there and one brings the results back; the
weights are applied where the tokens live. Both are differentiable, and while rows travel (in the backward pass too) the
shared experts compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from metate.errors import fail
from metate.nn.moe import Experts, MoE
from metate.ops.moe import Route, moe_permute, moe_sort, moe_unpermute


@dataclass
class _Trip:
    """One way of rows between the processes of a group, and of their gradients back."""

    group: dist.ProcessGroup | None
    sent: list[int]  # rows to each process
    received: list[int]
    work: Any = None
    luggage: Any = None  # what has to stay alive until `work` is done

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        rows = rows.contiguous()
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(out, rows, received, sent, group=self.group, async_op=True)
        self.luggage = rows, out
        return out

    def end(self) -> Tensor:
        self.work.wait()
        _, out = self.luggage
        self.work = self.luggage = None
        return out  # type: ignore[no-any-return]


class _Depart(torch.autograd.Function):
    """Rows leave; what is returned is not there before `_Arrive`. Backward: their gradients have come back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.start(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    """Rows have come. Backward: their gradients leave; the ones returned stand in for them as far as `_Depart`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.end()
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.start(grad, back=True)
        return grad, None


_depart: Callable[[Tensor, _Trip], Tensor] = _Depart.apply
_arrive: Callable[[Tensor, _Trip], Tensor] = _Arrive.apply


class SpreadExperts(Experts):
    """The experts of this process among those of a group; `forward` takes the tokens of this process and must be called
    by all, those without tokens too."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup | None = None) -> None:
        nn.Module.__init__(self)
        self.group, self.all_experts = group, experts.num_experts
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if size > experts.num_experts:
            raise fail("parallel.ExpertParallel", "group", f"of {size} processes", f"at most {experts.num_experts}")
        self.bounds = [experts.num_experts * i // size for i in range(size + 1)]  # first expert of each process
        first, last = self.bounds[rank : rank + 2]
        self.num_experts, self.activation = last - first, experts.activation
        self.gate_up = experts.gate_up.part(first, last)  # type: ignore[operator]
        self.down = experts.down.part(first, last)  # type: ignore[operator]
        self.train(experts.training)

    def forward(self, x: Tensor, route: Route, beside: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        order, inverse, offsets = moe_sort(route.experts, self.all_experts)
        arriving = self._announce(offsets.diff())
        sizes = torch.stack([offsets[self.bounds].diff(), arriving.sum(1, dtype=torch.int32)]).tolist()
        there, back = _Trip(self.group, *sizes), _Trip(self.group, *reversed(sizes))
        leaving = moe_permute(x, order[: sum(sizes[0])], route.experts.shape[1])
        travelling = _depart(leaving, there)
        extra = None if beside is None else beside(x)
        rows = _arrive(travelling, there)
        local = torch.arange(self.num_experts, dtype=torch.int32, device=x.device).repeat(len(arriving))
        local = local.repeat_interleave(arriving.flatten())[:, None]
        done = self.combine(rows, local, None, len(local))
        done = _arrive(_depart(done, back), back)
        out = moe_unpermute(done, inverse, route.weights)
        return out if extra is None else out + extra

    def _announce(self, counts: Tensor) -> Tensor:
        """How many rows come: (processes, experts here), from how many go to each expert."""
        size = len(self.bounds) - 1
        arriving = counts.new_empty(size * self.num_experts)
        to = [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]
        dist.all_to_all_single(arriving, counts, [self.num_experts] * size, to, group=self.group)
        return arriving.view(size, self.num_experts)


def spread_experts(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Leaves in every MoE of a module the experts of this process alone, in place; returns the module.

    The processes of `group` must hold the same weights before. Each goes on with tokens of its own. The gradient of an
    expert is the sum over all tokens of the group: where others are averaged over processes, divide it by their number.

    Raises:
        ValueError: there are more processes than experts.
    """
    for part in module.modules():
        if isinstance(part, MoE) and not isinstance(part.experts, SpreadExperts):
            part.experts = SpreadExperts(part.experts, group)
    return module


class ExpertParallel(ParallelStyle):
    """`spread_experts` as a plan of torch: `parallelize_module(model, mesh, {"layers.*.mlp": ExpertParallel()})`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return spread_experts(module, device_mesh.get_group())
