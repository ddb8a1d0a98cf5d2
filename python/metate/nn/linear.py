"""A dense linear layer whose product of a few rows is bound by the memory alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metate.backends import is_plain
from metate.ops.moe import grouped_linear

FEW_ROWS = 64  # of more, torch's product is as fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFFSETS = [torch.tensor([0, rows], dtype=torch.int32, device="cpu") for rows in range(FEW_ROWS + 1)]  # of one expert


class Linear(nn.Linear):
    """torch.nn.Linear for models that generate: at most 64 rows on a CPU are multiplied as those of the one expert of
    `metate.grouped_linear`, which reads the weight at the memory's speed; a row depends on no other row then, bit for
    bit. What needs a gradient, what is compiled, where `metate.use` names a backend, and all else, is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        few = is_plain() and not torch.is_grad_enabled() and 0 < input.numel() <= FEW_ROWS * input.shape[-1]
        if not few or not _takes(input, Tensor) or not _takes(weight, nn.Parameter):
            return F.linear(input, weight, bias)
        x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        offsets = OFFSETS[x.shape[0]]
        out = grouped_linear(x, weight.unsqueeze(0), offsets, bias if bias is None else bias.unsqueeze(0))
        return out if input.dim() == 2 else out.view(*input.shape[:-1], self.out_features)


def _takes(x: Tensor, kind: type) -> bool:
    """Whether the kernels for few rows take it: a tensor of torch's own kind, in a dtype and on a device of theirs."""
    return type(x) is kind and x.is_cpu and x.dtype in DTYPES
