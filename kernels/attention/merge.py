"""Merges attention over disjoint sets of keys: weights exp(lse_n - lse) on the partial outputs."""

import triton
import triton.language as tl

from .tiles import LN2, LOG2E


@triton.jit(do_not_specialize=["parts", "rows", "tokens", "heads"])
def merge_kernel(outs, lses, out, lse, outs_strides, lses_strides, parts, rows, tokens, heads, VALUE_DIM: tl.constexpr,
                 BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Each program owns rows of (batch, token, head); a part whose lse is -inf has weight 0, whatever it holds."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    col = tl.arange(0, BLOCK_V)
    lses += batch * lses_strides[1] + head * lses_strides[2] + token * lses_strides[3]
    outs += (batch * outs_strides[1] + token * outs_strides[2] + head * outs_strides[3])[:, None]
    outs += (col.to(tl.int64) * outs_strides[4])[None, :]

    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    merged = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for part in range(parts):
        step = tl.cast(part, tl.int64)
        logit = tl.load(lses + step * lses_strides[0], mask=inside, other=-float("inf")).to(tl.float32) * LOG2E
        new_peak = tl.maximum(peak, logit)
        safe_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - safe_peak)
        weight = tl.exp2(logit - safe_peak)
        used = (inside & (logit != -float("inf")))[:, None] & (col < VALUE_DIM)[None, :]
        x = tl.load(outs + step * outs_strides[0], mask=used, other=0.0).to(tl.float32)
        total = total * shrink + weight
        merged = merged * shrink[:, None] + weight[:, None] * x
        peak = new_peak
    merged *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    tl.store(out + row[:, None] * VALUE_DIM + col[None, :], merged.to(out.dtype.element_ty),
             mask=inside[:, None] & (col < VALUE_DIM)[None, :])  # fmt: skip
    joined = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(total)) * LN2)
    tl.store(lse + (batch * heads + head) * tokens + token, joined, mask=inside)
