"""flash-attn's forward and backward apart, without autograd: what ring and context parallel attention call.

The names and arguments are flash-attn's private ones; code that cuts attention into parts merges their softmax_lse
itself and gives the merged one to the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metate.compat.flash_attn.semantics import attend, attend_packed, attend_pages, attention_options, cache_options
from metate.ops.attention.declaration import backward_op, delta_op

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "gradients",
]


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, softmax_lse, S_dmask, rng_state) as `flash_attn_func` computes them; rng_state (2,) int64: seed, offset."""
    window = (window_size_left, window_size_right)
    options = attention_options(q, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False)
    with torch.no_grad():
        return *attend(q, k, v, options, return_softmax), _rng_state(options)


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`_flash_attn_forward` over packed sequences or pages, of which seqused_k (batch) int32 keys are in use.

    zero_tensors changes nothing: what no sequence covers is 0 in any case.
    """
    if num_splits > 1:
        raise RuntimeError(
            f"_flash_attn_varlen_forward: num_splits > 1 is not supported, got {num_splits}; 0 lets metate cut the work"
        )
    window = (window_size_left, window_size_right)
    if cu_seqlens_k is not None and block_table is None and leftpad_k is None and seqused_k is None:
        options = attention_options(q, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False)
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        with torch.no_grad():
            return *attend_packed(*packed, options, return_softmax), _rng_state(options)
    if dropout_p:
        raise NotImplementedError(
            f"_flash_attn_varlen_forward: dropout_p is {dropout_p}, expected 0 beside block_table, leftpad_k or "
            "seqused_k"
        )
    options = cache_options(softmax_scale, causal, window, softcap, alibi_slopes)
    pages = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, block_table, seqused_k)
    return *attend_pages(*pages, options, leftpad_k), q.new_empty(0), _rng_state({"seed": 0})


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes the gradients into those of dq, dk and dv that are given; softmax_d (batch, heads, seqlen_q) = Σ out dout.

    The probabilities are exp(score - softmax_lse), so that with the lse of all parts each part gives its share.
    """
    window = (window_size_left, window_size_right)
    seed = _seed("_flash_attn_backward", dropout_p, rng_state)
    *found, delta = gradients(
        [dout, q, k, v, out, softmax_lse], None, None, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes,
        seed,
    )  # fmt: skip
    _write((dq, dk, dv), found)
    return delta


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    """`_flash_attn_backward` over packed sequences; softmax_d is (heads, tokens_q)."""
    window = (window_size_left, window_size_right)
    seed = _seed("_flash_attn_varlen_backward", dropout_p, rng_state)
    batched = [x.unsqueeze(0) for x in (dout, q, k, v, out, softmax_lse)]
    *found, delta = gradients(
        batched, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, seed
    )
    _write((dq, dk, dv), [x.squeeze(0) for x in found])
    return delta.squeeze(0)


def gradients(
    tensors: list[Tensor], cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, dropout_p: float,
    scale: float | None, causal: bool, window: tuple[int, int], softcap: float, alibi_slopes: Tensor | None, seed: int,
    partial: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and Σ out dout of `attention`'s operator.

    tensors: dout, q, k, v, out and the softmax_lse, with a batch dimension; the last is +inf where no key is seen.
    partial: it may be over more keys than k has, as where a ring of devices passes keys on.
    """
    dout, q, k, v, out, lse = tensors
    left, right = window
    scalars = (
        q.shape[-1] ** -0.5 if scale is None else scale, left, 0 if causal else right, False, max(softcap, 0.0),
        dropout_p, seed, 0, 1, 1, partial, False, False,
    )  # fmt: skip
    with torch.no_grad():
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        delta = delta_op(out, dout, None)
        masks = (None, alibi_slopes, None, None, None, None, cu_seqlens_q, cu_seqlens_k)
        dq, dk, dv, *_ = backward_op(dout, q, k, v, lse, delta, *masks, *scalars)
    return dq, dk, dv, delta


def _rng_state(options: dict[str, Any]) -> Tensor:
    return torch.tensor([options["seed"], 0], device="cpu")


def _seed(function: str, dropout_p: float, rng_state: Tensor | None) -> int:
    if not dropout_p:
        return 0
    if rng_state is None:
        raise ValueError(f"{function}: rng_state is None, expected the forward's beside dropout_p = {dropout_p}")
    return int(rng_state[0].item())


def _write(given: tuple[Tensor | None, ...], found: list[Tensor]) -> None:
    for target, gradient in zip(given, found, strict=True):
        if target is not None:
            target.copy_(gradient)
