"""metate under torch's own `F.scaled_dot_product_attention`, through torch's registry of flash attention providers.

Active, it takes the place of the CPU kernels that SDPA picks where it may fuse, forward and backward, and of the
formula where SDPA has no kernel and keeps all N² probabilities: dropout, a mask that needs a gradient, a value
dimension of its own, three-dimensional tensors. What metate does not serve goes to torch as before.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from metate.compat import switched_on
from metate.ops.attention import attention
from metate.ops.attention.declaration import backward_op

__all__ = ["activate", "activated", "active", "restore"]

_NAME = "metate"
_CALL = "scaled_dot_product_attention"
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
    call_of_torch = {key: torch.library.get_kernel(f"aten::{_CALL}", key) for key in ("CPU", "AutogradCPU")}
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

    def call_on(key: str) -> Any:
        def call(
            keys: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
        ) -> Any:  # fmt: skip
            options = attn_mask, dropout_p, is_causal
            if _needs_formula(q, v, *options) and _serves_formula(q, k, v, *options, enable_gqa):
                return _attend(q, k, v, *options, scale)
            return call_of_torch[key].call_boxed(keys, q, k, v, *options, scale=scale, enable_gqa=enable_gqa)

        return call

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl(_FORWARD, forward, "CPU", with_keyset=True, allow_override=True)
        library.impl(_BACKWARD, backward, "CPU", with_keyset=True, allow_override=True)
        for key in call_of_torch:
            library.impl(_CALL, call_on(key), key, with_keyset=True, allow_override=True)
    return _Handle(library)


def _serves(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    small = max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
    return dropout_p == 0 and small and (mask is None or mask.dtype in (q.dtype, torch.float32))


def _needs_formula(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool) -> bool:
    """Whether torch has no kernel for a call that it takes."""
    learns = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    unfused = dropout_p > 0 or learns or q.dim() == 3 or q.shape[-1] != v.shape[-1]
    return unfused and dropout_p < 1 and (mask is None or not is_causal)


def _serves_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, grouped: bool
) -> bool:
    """Whether metate computes it: unless torch would broadcast, differentiate forward or refuse, or was told to use
    the formula (`sdpa_kernel(SDPBackend.MATH)`)."""
    wanted = torch.backends.cuda.flash_sdp_enabled() and torch.autograd.forward_ad._current_level < 0
    traced = type(q) not in (Tensor, torch.nn.Parameter)
    if traced and dropout_p > 0:  # the seed would be drawn while the graph is made, or break it
        return False
    if not wanted or not q.dim() == k.dim() == v.dim() in (3, 4) or not q.dtype == k.dtype == v.dtype:
        return False
    heads, kv_heads = q.shape[-3], k.shape[-3]
    fit = heads == kv_heads or (grouped and q.dim() == 4 and kv_heads > 0 and heads % kv_heads == 0)
    fit = fit and q.shape[:-3] == k.shape[:-3] and k.shape[:-1] == v.shape[:-1] and q.shape[-1] == k.shape[-1]
    dims = min(q.shape[-1], v.shape[-1]) > 0 and max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
    return fit and dims and (mask is None or (mask.dim() <= q.dim() and mask.dtype in (torch.bool, q.dtype)))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    tensors = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    seen, bias = (mask, None) if mask is not None and mask.dtype == torch.bool else (None, mask)
    out = attention(
        *tensors, causal=is_causal, top_left=True, scale=scale, dropout_p=dropout_p, mask=seen, bias=bias
    )  # fmt: skip
    return cast(Tensor, out).transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


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
            None, None, None, q.shape[-1] ** -0.5 if scale is None else scale, -1, 0 if is_causal else -1, True, 0.0,
            0.0, 0, 0, 1, 1, False, False, False,
        )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The additive mask with its four dimensions; torch has turned a bool one into 0 and -inf before."""
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
