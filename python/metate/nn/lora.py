"""LoraLinear: a frozen linear layer plus trained low-rank updates, one adapter or several in a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metate.errors import fail


class LoraLinear(nn.Module):
    """base(x) + (alpha / r) · dropout(x) Aᵀ Bᵀ (Hu et al. 2021), with A and B chosen by adapter.

    Args:
        base: QuantLinear or nn.Linear. Its parameters are frozen.
        r: rank of the update.
        alpha: the update counts alpha / r; default r.
        dropout: probability with which an input of the update is dropped while training.
        adapters: how many there are. `lora_A` is (adapters, r, in_features), `lora_B` (adapters, out_features, r).
        dtype: of A and B, in which the update is computed.

    `adapter` is the one in use: a number for all, or an integer tensor with one for every entry of the first dimension
    of x, where -1 means none. `forward` takes another for one call.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float | None = None, dropout: float = 0.0, *, adapters: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise fail("nn.LoraLinear", "base", type(base).__name__, "a QuantLinear or nn.Linear", error=TypeError)
        for name, value in (("r", r), ("adapters", adapters)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise fail("nn.LoraLinear", name, value, "1 or more")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.scale = (r if alpha is None else alpha) / r
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(adapters, r, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(adapters, base.out_features, r, dtype=dtype, device=device))
        self.adapter: int | Tensor = 0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as nn.Linear begins, B zero: the update begins as nothing."""
        for matrix in self.lora_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, adapter: int | Tensor | None = None) -> Tensor:
        chosen = self.adapter if adapter is None else adapter
        out: Tensor = self.base(x)
        if isinstance(chosen, Tensor):
            return self._several(x, out, chosen)
        self._check(chosen, chosen)
        return out if chosen < 0 else out + self._update(x, chosen, out.dtype)

    def _several(self, x: Tensor, out: Tensor, chosen: Tensor) -> Tensor:
        """Adds the update of each adapter to the entries that chose it."""
        if chosen.dim() != 1 or x.dim() < 2 or chosen.shape[0] != x.shape[0] or chosen.is_floating_point():
            expected = f"integers of shape ({x.shape[0] if x.dim() > 1 else 'batch'},), one for each entry of x"
            raise fail("nn.LoraLinear", "adapter", f"{chosen.dtype} of shape {tuple(chosen.shape)}", expected)
        numbers = chosen.unique().tolist()
        if numbers:
            self._check(numbers[0], numbers[-1])
        for number in numbers:
            if number >= 0:
                entries = (chosen == number).nonzero().flatten().to(x.device)
                out = out.index_add(0, entries, self._update(x[entries], number, out.dtype))
        return out

    def _update(self, x: Tensor, adapter: int, dtype: torch.dtype) -> Tensor:
        low = self.dropout(x.to(self.lora_A.dtype)) @ self.lora_A[adapter].T
        update: Tensor = (low * self.scale) @ self.lora_B[adapter].T
        return update.to(dtype)

    def _check(self, least: int, most: int) -> None:
        if least < -1 or most >= self.lora_A.shape[0]:
            got = least if least < -1 else most
            raise fail("nn.LoraLinear", "adapter", got, f"0 to {self.lora_A.shape[0] - 1}, or -1 for none")

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, adapters={self.lora_A.shape[0]}"
