"""What the backward needs of a row: delta = Σ_d out · grad_out - grad_lse."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def delta_kernel(out, grad_out, grad_lse, delta, out_strides, grad_strides, lse_strides, rows, tokens, heads,
                 VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Each program owns rows of (batch, token, head)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    col = tl.arange(0, BLOCK_V).to(tl.int64)
    used = inside[:, None] & (col < VALUE_DIM)[None, :]
    out += (batch * out_strides[0] + token * out_strides[1] + head * out_strides[2])[:, None]
    grad_out += (batch * grad_strides[0] + token * grad_strides[1] + head * grad_strides[2])[:, None]
    x = tl.load(out + (col * out_strides[3])[None, :], mask=used, other=0.0).to(tl.float32)
    g = tl.load(grad_out + (col * grad_strides[3])[None, :], mask=used, other=0.0).to(tl.float32)
    total = tl.sum(x * g, 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + batch * lse_strides[0] + head * lse_strides[1] + token * lse_strides[2],
                         mask=inside, other=0.0)  # fmt: skip
    tl.store(delta + (batch * heads + head) * tokens + token, total, mask=inside)
