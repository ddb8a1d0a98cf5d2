"""LoraLinear: a frozen linear layer plus trained low-rank updates, one adapter or several in a batch; and
LoraGroupedLinear: one for every expert."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metate.errors import fail
from metate.nn.moe import GroupedLinear
from metate.nn.quant_linear import QuantLinear
from metate.ops.moe import grouped_linear
from metate.ops.quant_linear import lora_linear, low_rank_update
from metate.scalars import is_whole, plain


class LoraLinear(nn.Module):
    """base(x) + (alpha / r) · dropout(x) Aᵀ Bᵀ (Hu et al. 2021), with A and B chosen by adapter.

    Args:
        base: QuantLinear or nn.Linear. Its parameters are frozen.
        r: rank of the update.
        alpha: the update counts alpha / r; default r.
        dropout: probability with which an input of the update is dropped while training.
        adapters: how many there are. `lora_A` is (adapters, r, in_features), `lora_B` (adapters, out_features, r).
        dtype: of A and B. The update is summed in float32.

    On a QuantLinear, base and update are one pass, `metate.lora_linear`, unless dropout or 8-bit activations give them
    different inputs.

    `adapter` is the one in use: a number for all, or an integer tensor with one for every entry of the first dimension
    of x (or of the first ones), where -1 means none. `forward` takes another for one call.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float | None = None, dropout: float = 0.0, *, adapters: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise fail("nn.LoraLinear", "base", type(base).__name__, "a QuantLinear or nn.Linear", error=TypeError)
        r, adapters = plain(r), plain(adapters)
        for name, value in (("r", r), ("adapters", adapters)):
            if not is_whole(value, 1):
                raise fail("nn.LoraLinear", name, repr(value), "1 or more")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.scale = (r if alpha is None else alpha) / r
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(adapters, r, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(adapters, base.out_features, r, dtype=dtype, device=device))
        self.adapter: int | Tensor = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as nn.Linear begins, B zero: the update begins as nothing."""
        _begin(self.lora_A, self.lora_B)

    def forward(self, x: Tensor, adapter: int | Tensor | None = None) -> Tensor:
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        ids: Tensor | None = None
        chosen = self.adapter if adapter is None else adapter
        if isinstance(chosen, Tensor):
            ids = chosen.to(x.device)
        else:
            chosen = plain(chosen)
            if not isinstance(chosen, int) or not -1 <= chosen < A.shape[0]:
                expected = f"0 to {A.shape[0] - 1}, or -1 for none; several as a tensor"
                raise fail("nn.LoraLinear", "adapter", repr(chosen), expected)
            if chosen < 0:
                return self.base(x)  # type: ignore[no-any-return]
            if A.shape[0] > 1:
                A, B = A[chosen : chosen + 1], B[chosen : chosen + 1]
        if A.dtype not in (x.dtype, torch.float32):
            A, B = A.to(x.dtype), B.to(x.dtype)
        base, drops = self.base, self.training and self.dropout.p > 0
        if not drops and isinstance(base, QuantLinear) and base.activation is None:
            return lora_linear(x, base.weight, A, B, base.bias, scaling=self.scale, adapter_ids=ids)
        out: Tensor = base(x)
        return out + low_rank_update(self.dropout(x), A, B, self.scale, ids).to(out.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, adapters={self.lora_A.shape[0]}"


class LoraGroupedLinear(nn.Module):
    """base(x) + (alpha / r) · dropout(x) Aₑᵀ Bₑᵀ, with A and B of the expert e that a row goes to.

    Args:
        base: QuantGroupedLinear or GroupedLinear. Its parameters are frozen.
        r, alpha, dropout, dtype: as of LoraLinear. `lora_A` is (num_experts, r, in_features), `lora_B` (num_experts,
            out_features, r).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    def __init__(
        self, base: GroupedLinear, r: int, alpha: float | None = None, dropout: float = 0.0, *,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(base, GroupedLinear):
            expected = "a QuantGroupedLinear or GroupedLinear"
            raise fail("nn.LoraGroupedLinear", "base", type(base).__name__, expected, error=TypeError)
        r = plain(r)
        if not is_whole(r, 1):
            raise fail("nn.LoraGroupedLinear", "r", repr(r), "1 or more")
        self.base, self.r, self.scale = base.requires_grad_(False), r, (r if alpha is None else alpha) / r
        self.num_experts, self.in_features, self.out_features = base.num_experts, base.in_features, base.out_features
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(self.num_experts, r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.num_experts, self.out_features, r, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LoraLinear begins."""
        _begin(self.lora_A, self.lora_B)

    def forward(self, x: Tensor, offsets: Tensor, order: Tensor | None = None, k: int = 1) -> Tensor:
        A, B, base = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), self.base
        if not (self.training and self.dropout.p > 0):
            options: dict[str, Any] = dict(lora=(A, B), scaling=self.scale, int8_activations=base.int8_activations)
            return grouped_linear(x, base.weight, offsets, base.bias, order=order, k=k, **options)
        update = grouped_linear(grouped_linear(self.dropout(x), A, offsets, order=order, k=k), B, offsets)
        out: Tensor = base(x, offsets, order, k) + self.scale * update
        return out

    def part(self, first: int, last: int) -> LoraGroupedLinear:
        """A copy with the experts first … last - 1."""
        found = LoraGroupedLinear(self.base.part(first, last), self.r, self.scale * self.r, self.dropout.p)
        for name in ("lora_A", "lora_B"):
            whole = getattr(self, name)
            setattr(found, name, nn.Parameter(whole[first:last].detach().clone(), whole.requires_grad))
        return found

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, num_experts={self.num_experts}"


@torch.no_grad()
def _begin(A: Tensor, B: Tensor) -> None:
    for matrix in A:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    nn.init.zeros_(B)
