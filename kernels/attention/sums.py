"""Sums over attention's matrices that are never stored: column sums of the probabilities, the gradient of the bias
over the dimensions it is broadcast along, the gradient of the ALiBi slopes over a sequence.

Before them and before the gradients one kernel finds the softmax of every row: from its lse, or from the same scores
where a large lse would show what it was rounded by."""

import triton
import triton.language as tl

from ..shared import product
from .backward import load_rows_of, score_gradient
from .configs import RUNTIME, tuned
from .ranges import edge_tile, edge_tiles, keys_of, queries_of
from .tiles import (
    LOG2E,
    allowed_pairs,
    bend,
    block_is_live,
    block_of_keys,
    block_of_queries,
    edge_is_live,
    exponential,
    head_of,
    load_rows,
    load_values,
    make_span,
    probability,
    row_offset,
    row_products,
    unit_of,
)


@triton.jit
def rows_tile(total, peak, rows, k, k_strides, m0, n0, span, window, terms, allowed, CAP: tl.constexpr,
              DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    keys = load_rows(k, k_strides, n0, span[6], None, BLOCK_N, DIM, BLOCK_D, allowed is not None)
    s, _ = bend(row_products(keys, rows), m0, n0, span, window, terms, CAP, BLOCK_M, BLOCK_N, True)
    if allowed is not None:
        s = tl.where(allowed, s, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(s, 0))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    return total * exponential(peak - base, terms) + tl.sum(exponential(s - base[None, :], terms), 0), new_peak


@tuned("columns")
@triton.jit(do_not_specialize=RUNTIME)
def rows_kernel(q, k, lse, limit, sinks, peaks, rests, q_strides, k_strides, bias, slopes, intervals, blocks, bits,
                cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, group, left, right, bottom_right,
                block_m, block_n, inner, outer, CAP: tl.constexpr, NATURAL: tl.constexpr, DIM: tl.constexpr,
                BLOCK_D: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """probability = exp(s - peak - rest), in the scores' unit: each program owns a block of queries. A peak is 0 where
    |lse| <= limit, a rest +inf where a row sees no key. Tiles lie as in `columns_kernel`."""
    m0, span = block_of_queries(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK_M)
    _, batch, head, first_q, size_q, first_k, size_k, _, _, _ = span
    if (m0 < 0) | (m0 >= size_q):
        return
    window = ((size_k - size_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    terms = (bias, slopes, inner, outer, unit_of(NATURAL))
    i = m0 + tl.arange(0, BLOCK_M)
    row_lse = load_values(lse, m0, span, -float("inf"), BLOCK_M)
    coarse = ~(tl.abs(row_lse) <= limit) & (row_lse != -float("inf"))
    rest = tl.where(row_lse == -float("inf"), float("inf"), row_lse * terms[4])
    tl.store(peaks + row_offset(span) + i, tl.zeros((BLOCK_M,), tl.float32), mask=(i < size_q) & ~coarse)
    tl.store(rests + row_offset(span) + i, rest, mask=(i < size_q) & ~coarse)
    if tl.max(coarse.to(tl.int32), 0) == 0:
        return
    q = head_of(q, q_strides, batch, first_q, head)
    k = head_of(k, k_strides, batch, first_k, head // group)
    rows = load_rows(q, q_strides, m0, size_q, None, BLOCK_M, DIM, BLOCK_D, True)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start, whole_start, whole_stop, stop = keys_of(m0, span, window, masks, BLOCK_M, BLOCK_N)
    for n0 in range(whole_start, whole_stop, BLOCK_N):
        if block_is_live(m0, n0, span, masks):
            total, peak = rows_tile(total, peak, rows, k, k_strides, m0, n0, span, window, terms, None, CAP, DIM,
                                    BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip
    for t in range(edge_tiles(start, whole_start, whole_stop, stop, BLOCK_N)):
        n0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_N)
        allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, True)
        if edge_is_live(allowed, masks):
            total, peak = rows_tile(total, peak, rows, k, k_strides, m0, n0, span, window, terms, allowed, CAP, DIM,
                                    BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip
    top = peak
    if sinks is not None:
        top = tl.maximum(peak, tl.load(sinks + head).to(tl.float32) * terms[4])
    base = tl.where(top == -float("inf"), 0.0, top)
    total *= exponential(peak - base, terms)
    if sinks is not None:
        total += exponential(tl.load(sinks + head).to(tl.float32) * terms[4] - base, terms)
    rest = tl.where(total == 0.0, float("inf"), tl.log2(total) * (terms[4] / LOG2E))
    tl.store(peaks + row_offset(span) + i, base, mask=(i < size_q) & coarse)
    tl.store(rests + row_offset(span) + i, rest, mask=(i < size_q) & coarse)


@triton.jit
def columns_tile(total, q, keys, peaks, rests, q_strides, m0, n0, span, window, terms, allowed, CAP: tl.constexpr,
                 DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    rows = load_rows(q, q_strides, m0, span[4], None, BLOCK_M, DIM, BLOCK_D, allowed is not None)
    s, _ = bend(row_products(keys, rows), m0, n0, span, window, terms, CAP, BLOCK_M, BLOCK_N, True)
    peak = load_values(peaks, m0, span, 0.0, BLOCK_M)[None, :]
    p = probability(s, peak, load_values(rests, m0, span, float("inf"), BLOCK_M)[None, :], terms)
    if allowed is not None:
        p = tl.where(allowed, p, 0.0)
    return total + tl.sum(p, 1)


@tuned("columns")
@triton.jit(do_not_specialize=RUNTIME)
def columns_kernel(q, k, peaks, rests, sums, q_strides, k_strides, bias, slopes, intervals, blocks, bits, cu_seqlens_q,
                   cu_seqlens_k, sequences, tokens_q, tokens_k, heads, group, left, right, bottom_right, block_m,
                   block_n, inner, outer, CAP: tl.constexpr, NATURAL: tl.constexpr, DIM: tl.constexpr,
                   BLOCK_D: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """sums[b, h, j] = Σ_i probability_ij: each program owns a block of keys."""
    n0, span = block_of_keys(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK_N)
    _, batch, head, first_q, size_q, first_k, size_k, _, _, _ = span
    if (n0 < 0) | (n0 >= size_k):
        return
    window = ((size_k - size_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    terms = (bias, slopes, inner, outer, unit_of(NATURAL))
    q = head_of(q, q_strides, batch, first_q, head)
    k = head_of(k, k_strides, batch, first_k, head // group)
    keys = load_rows(k, k_strides, n0, size_k, None, BLOCK_N, DIM, BLOCK_D, True)

    total = tl.zeros((BLOCK_N,), tl.float32)
    start, whole_start, whole_stop, stop = queries_of(n0, span, window, masks, BLOCK_M, BLOCK_N)
    for m0 in range(whole_start, whole_stop, BLOCK_M):
        if block_is_live(m0, n0, span, masks):
            total = columns_tile(total, q, keys, peaks, rests, q_strides, m0, n0, span, window, terms, None, CAP, DIM,
                                 BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip
    for t in range(edge_tiles(start, whole_start, whole_stop, stop, BLOCK_M)):
        m0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_M)
        allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, True)
        if edge_is_live(allowed, masks):
            total = columns_tile(total, q, keys, peaks, rests, q_strides, m0, n0, span, window, terms, allowed, CAP,
                                 DIM, BLOCK_D, BLOCK_M, BLOCK_N)  # fmt: skip

    j = n0 + tl.arange(0, BLOCK_N)
    column = (batch.to(tl.int64) * heads + head) * tokens_k + first_k + j
    tl.store(sums + column, total, mask=j < size_k)


@tuned("bias")
@triton.jit(do_not_specialize=[*RUNTIME, "bias_batches", "bias_heads"])
def bias_kernel(q, k, v, grad_out, peaks, rests, delta, dbias, q_strides, k_strides, v_strides, grad_strides, bias,
                slopes, intervals, blocks, bits, sequences, tokens_q, tokens_k, heads, group, bias_batches, bias_heads,
                left, right, bottom_right, block_m, block_n, inner, outer, seed_lo, seed_hi, offset, threshold,
                dropout_scale, CAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, ONE_ROW: tl.constexpr,
                ONE_COLUMN: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_V: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Each program owns one tile of dbias, of the bias' own shape, and walks over all tiles of scores that share it."""
    blocks_m = tl.cdiv(tokens_q, BLOCK_M)
    blocks_n = tl.cdiv(tokens_k, BLOCK_N)
    own_m = 1 if ONE_ROW else blocks_m
    own_n = 1 if ONE_COLUMN else blocks_n
    shared_m = blocks_m // own_m
    shared_n = blocks_n // own_n
    shared_heads = heads // bias_heads
    tile = tl.program_id(0)
    tile_n = tile % own_n
    tile_m = tile // own_n % own_m
    plane = tile // (own_n * own_m)
    window = ((tokens_k - tokens_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    terms = (bias, slopes, inner, outer, unit_of(NATURAL))
    noise = (seed_lo, seed_hi, offset, threshold)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(sequences // bias_batches * shared_heads * shared_m * shared_n):
        n0 = (tile_n + t % shared_n) * BLOCK_N
        m0 = (tile_m + t // shared_n % shared_m) * BLOCK_M
        head = plane % bias_heads + t // (shared_n * shared_m) % shared_heads
        batch = plane // bias_heads + t // (shared_n * shared_m * shared_heads)
        span = make_span(batch, head, None, None, tokens_q, tokens_k, heads)
        allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, False)
        if tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0:
            first = batch * 0
            rows = load_rows(head_of(q, q_strides, batch, first, head), q_strides, m0, tokens_q, None, BLOCK_M, DIM,
                             BLOCK_D, True)  # fmt: skip
            keys = load_rows(head_of(k, k_strides, batch, first, head // group), k_strides, n0, tokens_k, None, BLOCK_N,
                             DIM, BLOCK_D, True)  # fmt: skip
            grads = load_rows(head_of(grad_out, grad_strides, batch, first, head), grad_strides, m0, tokens_q, None,
                              BLOCK_M, VALUE_DIM, BLOCK_V, True)  # fmt: skip
            values = load_rows(head_of(v, v_strides, batch, first, head // group), v_strides, n0, tokens_k, None,
                               BLOCK_N, VALUE_DIM, BLOCK_V, True)  # fmt: skip
            _, ds, _ = score_gradient(
                row_products(rows, keys), product(grads, tl.trans(values)),
                load_rows_of((peaks, rests, delta), m0, span, 0, BLOCK_M), m0, n0, span, window, terms, noise,
                dropout_scale, allowed, CAP, DROPOUT, BLOCK_M, BLOCK_N, False)  # fmt: skip
            total += ds

    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW and ONE_COLUMN:
        tl.store(dbias + plane, tl.sum(tl.sum(total, 1), 0))
    elif ONE_ROW:
        tl.store(dbias + plane.to(tl.int64) * tokens_k + j, tl.sum(total, 0), mask=j < tokens_k)
    elif ONE_COLUMN:
        tl.store(dbias + plane.to(tl.int64) * tokens_q + i, tl.sum(total, 1), mask=i < tokens_q)
    else:
        row = plane.to(tl.int64) * tokens_q + i
        inside = (i < tokens_q)[:, None] & (j < tokens_k)[None, :]
        tl.store(dbias + row[:, None] * tokens_k + j[None, :], total, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def slopes_kernel(dslope_rows, dslopes, cu_seqlens_q, sequences, tokens_q, heads, BLOCK_M: tl.constexpr):
    """dslopes[sequence, head] from its rows' shares, one program each."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    span = make_span(sequence, head, cu_seqlens_q, cu_seqlens_q, tokens_q, tokens_q, heads)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for m0 in range(0, span[4], BLOCK_M):
        total += load_values(dslope_rows, m0, span, 0.0, BLOCK_M)
    tl.store(dslopes + tl.program_id(0), tl.sum(total, 0))
