"""torch's own `torch.nn.attention.varlen.varlen_attn` on CPU tensors, where torch has no kernel for it.

Active, metate is the CPU kernel of the flash attention operators that `varlen_attn` and `varlen_attn_out` call: packed
sequences forward and backward, windows, grouped heads, seqused_k, and paged caches by block_table.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from metate.compat import switched_on
from metate.compat.flash_attn.passes import _flash_attn_varlen_forward, gradients

__all__ = ["activate", "activated", "active", "restore"]

_libraries: list[torch.library.Library] = []  # one while active


def activate() -> None:
    """`varlen_attn` of CPU tensors runs on metate from now on, in all threads."""
    if active():
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_forward_no_dropout_inplace", _forward_into, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    _libraries.append(library)


def restore() -> None:
    """Takes it back: `varlen_attn` refuses CPU tensors again. Nothing where metate is not active."""
    while _libraries:
        _libraries.pop()._destroy()


def active() -> bool:
    """Whether metate serves `varlen_attn` of CPU tensors now."""
    return bool(_libraries)


def activated() -> AbstractContextManager[None]:
    """`activate` for a block: `with metate.compat.varlen.activated(): varlen_attn(q, k, v, …)`."""
    return switched_on(active, activate, restore)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if cu_q is None or dropout_p or return_debug_mask:
        raise NotImplementedError("varlen_attn on metate: expected packed sequences (cu_seq_q) without dropout")
    if cu_k is None and (block_table is None or seqused_k is None):
        missing, where = ("cu_seq_k", "block_table") if block_table is None else ("seqused_k", "cu_seq_k")
        raise ValueError(f"varlen_attn: {missing} is None, expected it where {where} is None")
    window = _window(window_size_left, window_size_right)
    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, is_causal, *window, alibi_slopes=alibi_slopes,
        block_table=block_table, seqused_k=seqused_k,
    )  # fmt: skip
    unused = q.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64, device="cpu"), unused, unused


def _forward_into(out: Tensor, *args: Any, **options: Any) -> Tensor:
    result, lse, *_ = _forward(*args, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    window = _window(window_size_left, window_size_right)
    batched = [x.unsqueeze(0) for x in (grad_out, q, k, v, out, lse)]
    dq, dk, dv, _ = gradients(batched, cu_q, cu_k, 0.0, scale, is_causal, window, 0.0, None, 0)
    return dq[0], dk[0], dv[0]


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else int(left), -1 if right is None else int(right)
