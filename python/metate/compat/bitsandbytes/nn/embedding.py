"""Embeddings whose optimizer states keep 32 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metate.compat.bitsandbytes.optim import GlobalOptimManager


class Embedding(nn.Embedding):
    """nn.Embedding, drawn from Xavier's uniform distribution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """An embedding with a LayerNorm behind it, in torch's default dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(input).to(torch.get_default_dtype()))
        return out.to(self.weight.dtype)
