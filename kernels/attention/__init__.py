"""Attention in Triton: launchers with the parameters of the declared operators."""

import contextlib
import math
import threading
from typing import Any

import torch
import triton
from torch import Tensor

from .forward import forward_kernel

# The tuner and the interpreter keep the state of a launch in globals.
_launching = threading.Lock()


def _launch(kernel: Any, rows: str, heads: int, arguments: dict[str, Any]) -> None:
    """One program per head and block of queries (rows "M") or keys ("N"). Which blocks a packed sequence has is known
    on the device only, so there are as many programs as it could have at most."""
    tokens = arguments["tokens_q" if rows == "M" else "tokens_k"]
    sequences = arguments["sequences"]
    packed = arguments["cu_seqlens_q"] is not None

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        block = chosen[f"BLOCK_{rows}"]
        return (heads * (tokens // block + sequences if packed else sequences * triton.cdiv(tokens, block)),)

    _run(kernel, grid, arguments)


def _run(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
    q: Tensor = arguments["q"]
    with _launching, torch.cuda.device_of(q) if q.is_cuda else contextlib.nullcontext():
        kernel[grid](**{name: arguments[name] for name in kernel.arg_names if name in arguments})


def _signed(word: int) -> int:
    """The 32-bit word as the int32 that a kernel receives whatever the value."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _mask(mask: Tensor | None) -> tuple[Tensor, int, int] | None:
    """A dense mask with one step per batch and per head, 0 where it is shared."""
    if mask is None:
        return None
    for axis in (0, 1):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.contiguous(), mask.shape[1] * (mask.shape[0] > 1), int(mask.shape[1] > 1)


def _strided(bias: Tensor | None) -> tuple[Any, ...] | None:
    if bias is None:
        return None
    return bias, *(stride * (size > 1) for stride, size in zip(bias.stride(), bias.shape, strict=True))


def _problem(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    blocks: Tensor | None,
    bits: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
    seed: int,
    offset: int,
    block_m: int,
    block_n: int,
) -> dict[str, Any]:
    """The arguments that every kernel takes."""
    batch, tokens_q, heads, dim = q.shape
    tokens_k = k.shape[1]
    unlimited = tokens_q + tokens_k
    sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    slopes = None
    if alibi_slopes is not None:
        slopes = (alibi_slopes.contiguous(), heads * (alibi_slopes.dim() == 2 and alibi_slopes.shape[0] > 1))
    return {
        "q": q,
        "k": k,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "bias": _strided(bias),
        "slopes": slopes,
        "sinks": None if sinks is None else sinks.contiguous(),
        "intervals": _mask(intervals),
        "blocks": _mask(blocks),
        "bits": _mask(bits),
        "cu_seqlens_q": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        "cu_seqlens_k": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        "sequences": sequences,
        "tokens_q": tokens_q,
        "tokens_k": tokens_k,
        "heads": heads,
        "group": heads // max(k.shape[2], 1),
        "left": unlimited if window_left < 0 else min(window_left, unlimited),
        "right": unlimited if window_right < 0 else min(window_right, unlimited),
        "bottom_right": int(not top_left),
        "block_m": max(block_m, 1),
        "block_n": max(block_n, 1),
        "inner": scale / softcap if softcap > 0 else scale * math.log2(math.e),
        "outer": softcap * math.log2(math.e),
        "seed_lo": _signed(seed),
        "seed_hi": _signed(seed >> 32),
        "offset": _signed(offset),
        "threshold": _signed(min(round(dropout_p * 2**32), 2**32 - 1)),
        "CAP": softcap > 0,
        "DROPOUT": dropout_p > 0,
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "SHORT": tokens_q <= 16 * max(sequences if cu_seqlens_q is not None else 1, 1),
    }


def _value(v: Tensor, dropout_p: float) -> dict[str, Any]:
    """The arguments of the kernels that look at v."""
    return {
        "v": v,
        "v_strides": v.stride(),
        "dropout_scale": 1.0 / (1.0 - dropout_p),
        "VALUE_DIM": v.shape[3],
        "BLOCK_V": max(16, triton.next_power_of_2(v.shape[3])),
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    blocks: Tensor | None,
    bits: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
    seed: int,
    offset: int,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    problem = _problem(
        *(q, k, bias, alibi_slopes, sinks, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, scale),
        *(window_left, window_right, top_left, softcap, dropout_p, seed, offset, block_m, block_n),
    )
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if cu_seqlens_q is not None:  # tokens of no sequence are nobody's
        out.zero_()
        lse.fill_(-math.inf)
    if lse.numel():
        _launch(forward_kernel, "M", heads, {**problem, **_value(v, dropout_p), "out": out, "lse": lse})
    return out, lse
