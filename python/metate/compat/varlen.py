"""torch's own `torch.nn.attention.varlen.varlen_attn` on CPU tensors, where torch has no kernel for it.

Active, metate is the CPU kernel of the flash attention operators that `varlen_attn` and `varlen_attn_out` call: packed
sequences forward and backward, windows, grouped heads, seqused_k, and paged caches by block_table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metate.ops.attention import attention_varlen
from metate.ops.attention.declaration import backward_op
from metate.ops.paged_attention import paged_attention

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


@contextlib.contextmanager
def activated() -> Iterator[None]:
    """`activate` for a block: `with metate.compat.varlen.activated(): varlen_attn(q, k, v, …)`."""
    before = active()
    activate()
    try:
        yield
    finally:
        if not before:
            restore()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if cu_q is None or dropout_p or return_debug_mask:
        raise NotImplementedError("varlen_attn on metate: expected packed sequences (cu_seq_q) without dropout")
    options: dict[str, Any] = {
        "scale": scale, "causal": is_causal, "window": _window(window_size_left, window_size_right),
        "alibi_slopes": alibi_slopes, "return_lse": True,
    }  # fmt: skip
    if seqused_k is None and block_table is None:
        if cu_k is None:
            raise ValueError("varlen_attn: cu_seq_k is None, expected it where block_table is None")
        out, lse = attention_varlen(q, k, v, cu_q, cu_k, **options)
    else:
        lengths = cu_k.diff() if seqused_k is None and cu_k is not None else seqused_k
        if lengths is None or (block_table is None and cu_k is None):
            raise ValueError("varlen_attn: seqused_k is None, expected it where cu_seq_k is")
        if block_table is None and cu_k is not None:  # every key a page: sequences of which only the start is in use
            block_table = cu_k[:-1, None] + torch.arange(int(max_k), dtype=torch.int32)
            k, v = k[:, None], v[:, None]
        assert block_table is not None
        out, lse = paged_attention(q, k, v, block_table, lengths, cu_seqlens_q=cu_q, **options)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # so torch's kernels mark a query without a key
    unused = q.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), unused, unused


def _forward_into(out: Tensor, *args: Any, **options: Any) -> Tensor:
    result, lse, *_ = _forward(*args, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    left, right = _window(window_size_left, window_size_right)
    right = 0 if is_causal else right
    delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1).T
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    batched = (x.unsqueeze(0) for x in (grad_out, q, k, v, lse, delta))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scalars = (scale, left, right, False, 0.0, 0.0, 0, 0, 1, 1, False, False)
    dq, dk, dv, _, _ = backward_op(*batched, None, None, None, None, None, cu_q, cu_k, *scalars)
    return dq[0], dk[0], dv[0]


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else int(left), -1 if right is None else int(right)
