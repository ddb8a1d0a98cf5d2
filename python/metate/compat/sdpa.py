"""metate under torch's own `F.scaled_dot_product_attention`, through torch's registry of flash attention providers.

Active, it takes the CPU kernels that SDPA picks where it may fuse (forward and backward) and hands back to torch's own
what metate does not serve. Calls that SDPA itself sends to its unfused formula (dropout, a mask that needs a gradient,
other sizes of k and v) stay there.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from metate.compat import switched_on
from metate.ops.attention import attention
from metate.ops.attention.declaration import backward_op

__all__ = ["activate", "activated", "active", "restore"]

_NAME = "metate"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_MAX_HEAD_DIM = 512


def activate() -> None:
    """Every fusible `F.scaled_dot_product_attention` on a CPU runs on metate from now on, in all threads."""
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        raise NotImplementedError(
            f"metate.compat.sdpa: torch {torch.__version__} has no registry of attention kernels; upgrade to 2.11"
        )
    if not active():
        torch.nn.attention.register_flash_attention_impl(_NAME, register_fn=_register)
        torch.nn.attention.activate_flash_attention_impl(_NAME)


def restore() -> None:
    """Gives `F.scaled_dot_product_attention` back to torch's kernels; nothing where metate is not active."""
    if active():
        torch.nn.attention.restore_flash_attention_impl()


def active() -> bool:
    """Whether metate serves `F.scaled_dot_product_attention` now."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)  # not before torch 2.11
    return bool(current() == _NAME)


def activated() -> AbstractContextManager[None]:
    """`activate` for a block: `with metate.compat.sdpa.activated(): model(x)`."""
    return switched_on(active, activate, restore)


class _Handle:
    """Keeps the overriding kernels; `remove` uncovers torch's own."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


def _register() -> _Handle:
    forward_of_torch = torch.library.get_kernel(f"aten::{_FORWARD}", "CPU")
    backward_of_torch = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")

    def forward(
        keys: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        if not _serves(q, v, attn_mask, dropout_p):
            return forward_of_torch.call_boxed(keys, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        return _forward(q, k, v, is_causal, attn_mask, scale)

    def backward(
        keys: Any, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
        is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        if not _serves(q, v, attn_mask, dropout_p):
            return backward_of_torch.call_boxed(
                keys, grad_out, q, k, v, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        return _backward(grad_out, q, k, v, out, logsumexp, is_causal, attn_mask, scale)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl(_FORWARD, forward, "CPU", with_keyset=True, allow_override=True)
        library.impl(_BACKWARD, backward, "CPU", with_keyset=True, allow_override=True)
    return _Handle(library)


def _serves(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    small = max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
    return dropout_p == 0 and small and (mask is None or mask.dtype in (q.dtype, torch.float32))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():  # below autograd already: without this the tensors would ask for a graph
        out, lse = attention(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal, top_left=True, scale=scale,
            bias=_bias(mask, q, k), return_lse=True,
        )  # fmt: skip
    # Compiled graphs rely on the strides of torch's kernel: those of q, and (batch, seqlen, heads) for the lse.
    out, wanted = out.transpose(1, 2), torch.empty_like(q)
    out = out if out.stride() == wanted.stride() else wanted.copy_(out)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.no_grad():
        delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1)
        grad_out, q, k, v = (x.transpose(1, 2) for x in (grad_out, q, k, v))
        dq, dk, dv, _, _ = backward_op(
            grad_out, q, k, v, lse, delta, _bias(mask, q.transpose(1, 2), k.transpose(1, 2)), None, None, None, None,
            None, None, q.shape[-1] ** -0.5 if scale is None else scale, -1, 0 if is_causal else -1, True, 0.0, 0.0, 0,
            0, 1, 1, False, False,
        )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The additive mask with its four dimensions; torch has turned a bool one into 0 and -inf before."""
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
