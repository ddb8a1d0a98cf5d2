"""FlashAttention-2 forward: each program owns a block of queries and walks over the keys it can see, keeping a running
maximum and sum of the softmax."""

import triton
import triton.language as tl

from .configs import RUNTIME, tuned
from .ranges import edge_tile, edge_tiles, keys_of
from .tiles import (
    LN2,
    add_product,
    allowed_pairs,
    bend,
    block_is_live,
    block_of_queries,
    edge_is_live,
    exponential,
    head_of,
    kept,
    load_rows,
    row_offset,
    row_products,
    sound_rows,
    store_rows,
    unit_of,
)


@triton.jit
def forward_tile(acc, total, peak, q, k, v, k_strides, v_strides, m0, n0, span, window, terms, noise, allowed,
                 sound, CAP: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    """Takes one tile of keys, or a single key, into the running softmax. `allowed` is None where nothing is masked,
    `sound` where no value is left out."""
    edge: tl.constexpr = allowed is not None
    keys = load_rows(k, k_strides, n0, span[6], None, BLOCK_N, DIM, BLOCK_D, edge)
    s, _ = bend(row_products(q, keys), m0, n0, span, window, terms, CAP, BLOCK_M, BLOCK_N, False)
    if edge:
        s = tl.where(allowed, s, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    safe_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = exponential(s - safe_peak[:, None], terms)
    shrink = exponential(peak - safe_peak, terms)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(m0, n0, span, noise, BLOCK_M, BLOCK_N, False), p, 0.0)
    values = load_rows(v, v_strides, n0, span[6], sound, BLOCK_N, VALUE_DIM, BLOCK_V, edge)
    return add_product(acc * shrink[:, None], p, values, allowed), total, new_peak


@tuned("forward")
@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(q, k, v, out, lse, q_strides, k_strides, v_strides, bias, slopes, sinks, intervals, blocks, bits,
                   cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, group, left, right, bottom_right,
                   block_m, block_n, inner, outer, seed_lo, seed_hi, offset, threshold, dropout_scale,
                   CAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr,
                   VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SHORT: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    m0, span = block_of_queries(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK_M)
    _, batch, head, first_q, size_q, first_k, size_k, _, _, _ = span
    if (m0 < 0) | (m0 >= size_q):
        return
    window = ((size_k - size_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    unit = unit_of(NATURAL)
    terms = (bias, slopes, inner, outer, unit)
    noise = (seed_lo, seed_hi, offset, threshold)
    q = head_of(q, q_strides, batch, first_q, head)
    rows = load_rows(q, q_strides, m0, size_q, None, BLOCK_M, DIM, BLOCK_D, True)
    k = head_of(k, k_strides, batch, first_k, head // group)
    v = head_of(v, v_strides, batch, first_k, head // group)

    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * unit
        peak = tl.zeros((BLOCK_M,), tl.float32) + sink
        total = tl.where(peak == -float("inf"), 0.0, 1.0)
    else:
        peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)

    start, whole_start, whole_stop, stop = keys_of(m0, span, window, masks, BLOCK_M, BLOCK_N)
    for n0 in range(whole_start, whole_stop, BLOCK_N):
        if block_is_live(m0, n0, span, masks):
            acc, total, peak = forward_tile(acc, total, peak, rows, k, v, k_strides, v_strides, m0, n0, span, window,
                                            terms, noise, None, None, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
                                            BLOCK_M, BLOCK_N)  # fmt: skip
    tiles = edge_tiles(start, whole_start, whole_stop, stop, BLOCK_N)
    unsound = tl.zeros((BLOCK_N,), tl.int1)
    for t in range(tiles):
        n0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_N)
        allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, False)
        if edge_is_live(allowed, masks):
            sound = sound_rows(v, v_strides, n0, size_k, BLOCK_N, VALUE_DIM, BLOCK_V)
            unsound |= ~sound
            acc, total, peak = forward_tile(acc, total, peak, rows, k, v, k_strides, v_strides, m0, n0, span, window,
                                            terms, noise, allowed & sound[None, :], sound, CAP, DROPOUT, DIM, VALUE_DIM,
                                            BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N)  # fmt: skip
    for t in range(tl.max(unsound.to(tl.int32), 0) * tiles * BLOCK_N):  # the keys left out, one by one
        n0 = edge_tile(t // BLOCK_N, start, whole_start, whole_stop, BLOCK_N) + t % BLOCK_N
        if tl.max(sound_rows(v, v_strides, n0, size_k, 1, VALUE_DIM, BLOCK_V).to(tl.int32), 0) == 0:
            same_rows = load_rows(q, q_strides, m0, size_q, None, BLOCK_M, DIM, BLOCK_D, True)
            allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, 1, False)
            acc, total, peak = forward_tile(acc, total, peak, same_rows, k, v, k_strides, v_strides, m0, n0, span,
                                            window, terms, noise, allowed, None, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D,
                                            BLOCK_V, BLOCK_M, 1)  # fmt: skip

    acc = acc * (tl.where(total == 0.0, 0.0, dropout_scale / total))[:, None]
    result = tl.where(total == 0.0, -float("inf"), peak / unit + tl.log2(total) * LN2)
    i = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse + row_offset(span) + i, result, mask=i < size_q)
    store_rows(out, acc, batch, first_q, head, heads, tokens_q, m0, size_q, BLOCK_M, VALUE_DIM, BLOCK_V)
