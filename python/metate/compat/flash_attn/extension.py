"""The functions of flash-attn's compiled extension, `flash_attn_2_cuda`, with its positional arguments.

For code that calls it past the Python interface, as some context parallel trainings do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metate.compat.flash_attn.passes import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

__all__ = ["bwd", "fwd", "varlen_bwd", "varlen_fwd"]


def fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, alibi_slopes: Tensor | None, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    return_softmax: bool, generator: None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, softmax_lse, S_dmask, rng_state) of q (batch, seqlen_q, heads, head_dim) over k, v; also into `out`."""
    _refuse("fwd", generator)
    return _into(out, _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ))  # fmt: skip


def varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    seqused_k: Tensor | None, leftpad_k: Tensor | None, block_table: Tensor | None, alibi_slopes: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, zero_tensors: bool, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, return_softmax: bool, generator: None = None,
    num_splits: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fwd` over packed sequences (tokens, heads, head_dim), or over pages where block_table is given."""
    _refuse("varlen_fwd", generator)
    return _into(out, _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, return_softmax, block_table, leftpad_k, seqused_k,
        zero_tensors, num_splits,
    ))  # fmt: skip


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, alibi_slopes: Tensor | None, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float, deterministic: bool,
    generator: None = None, rng_state: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dq, dk, dv, softmax_d), the gradients in the tensors given for them."""
    _refuse("bwd", generator)
    grads = _room((dq, dk, dv), (q, k, v))
    return *grads, _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, *grads, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip


def varlen_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, zero_tensors: bool, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, deterministic: bool, generator: None = None,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`bwd` over packed sequences."""
    _refuse("varlen_bwd", generator)
    grads = _room((dq, dk, dv), (q, k, v))
    return *grads, _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, *grads, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
        zero_tensors,
    )  # fmt: skip


def _refuse(function: str, generator: None) -> None:
    if generator is not None:
        raise RuntimeError(
            f"flash_attn.{function}: the `generator` argument is no longer supported, got a "
            f"{type(generator).__name__}; pass None and seed with torch.manual_seed"
        )


def _into(out: Tensor | None, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if out is None else (out.copy_(found[0]), *found[1:])


def _room(given: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) if grad is None else grad for grad, x in zip(given, like, strict=True))
    return dq, dk, dv
