"""Gradients of attention, recomputed tile by tile from the softmax of every row: one kernel owns blocks of keys (dk,
dv), one blocks of queries (dq and the rows of the slopes' gradient). No atomics: every sum has one owner and one
order."""

import triton
import triton.language as tl

from .configs import RUNTIME, tuned
from .ranges import edge_tile, edge_tiles, keys_of, queries_of
from .tiles import (
    add_product,
    allowed_pairs,
    bend,
    block_is_live,
    block_of_keys,
    block_of_queries,
    distance,
    edge_is_live,
    head_of,
    kept,
    load_rows,
    load_values,
    pair,
    probability,
    row_offset,
    row_products,
    sound_rows,
    store_rows,
    unit_of,
)


@triton.jit
def load_rows_of(states, m0, span, AXIS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(peak, rest, delta) of a block of queries, to broadcast against a tile that has them along AXIS."""
    peaks, rests, delta = states
    peak = load_values(peaks, m0, span, 0.0, BLOCK_M)
    rest = load_values(rests, m0, span, float("inf"), BLOCK_M)
    delta = load_values(delta, m0, span, 0.0, BLOCK_M)
    return tl.expand_dims(peak, 1 - AXIS), tl.expand_dims(rest, 1 - AXIS), tl.expand_dims(delta, 1 - AXIS)


@triton.jit
def score_gradient(s, dp, rows, m0, n0, span, window, terms, noise, dropout_scale, allowed,
                   CAP: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   TRANSPOSED: tl.constexpr):  # fmt: skip
    """From raw products q·k and grad_out·v: the probabilities that met v, the gradient of the scores, and that of the
    raw products up to `scale`. `rows` are of `load_rows_of`; `allowed` is None where nothing is masked."""
    s, bent = bend(s, m0, n0, span, window, terms, CAP, BLOCK_M, BLOCK_N, TRANSPOSED)
    peak, rest, delta = rows
    p = probability(s, peak, rest, terms)
    used = p
    if DROPOUT:
        keep = kept(m0, n0, span, noise, BLOCK_M, BLOCK_N, TRANSPOSED)
        used = tl.where(keep, p * dropout_scale, 0.0)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    ds = p * (dp - delta)
    raw = ds
    if CAP:
        raw = ds * (1.0 - bent * bent)
    if allowed is not None:
        used = tl.where(allowed, used, 0.0)
        ds = tl.where(allowed, ds, 0.0)
        raw = tl.where(allowed, raw, 0.0)
    return used, ds, raw


@triton.jit
def keys_tile(dk, dv, q, grad_out, keys, values, states, q_strides, grad_strides, m0, n0, span, window, terms, noise,
              dropout_scale, allowed, sound, CAP: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr,
              VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds what one tile of queries, or a single query, contributes to dk (without `scale`) and dv. `allowed` is None
    where nothing is masked, `sound` where no query is left out."""
    edge: tl.constexpr = allowed is not None
    rows = load_rows(q, q_strides, m0, span[4], sound, BLOCK_M, DIM, BLOCK_D, edge)
    grads = load_rows(grad_out, grad_strides, m0, span[4], sound, BLOCK_M, VALUE_DIM, BLOCK_V, edge)
    used, _, raw = score_gradient(
        row_products(keys, rows), row_products(values, grads), load_rows_of(states, m0, span, 1, BLOCK_M), m0, n0,
        span, window, terms, noise, dropout_scale, allowed, CAP, DROPOUT, BLOCK_M, BLOCK_N, True)  # fmt: skip
    return add_product(dk, raw, rows, allowed), add_product(dv, used, grads, allowed)


@tuned("keys")
@triton.jit(do_not_specialize=RUNTIME)
def keys_kernel(q, k, v, grad_out, peaks, rests, delta, dk, dv, q_strides, k_strides, v_strides, grad_strides, bias,
                slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads,
                group, left, right, bottom_right, block_m, block_n, inner, outer, scale, seed_lo, seed_hi, offset,
                threshold, dropout_scale, CAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr,
                DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                SHORT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    n0, span = block_of_keys(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK_N)
    sequence, batch, kv_head, first_q, size_q, first_k, size_k, _, _, _ = span
    if (n0 < 0) | (n0 >= size_k):
        return
    window = ((size_k - size_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    terms = (bias, slopes, inner, outer, unit_of(NATURAL))
    noise = (seed_lo, seed_hi, offset, threshold)
    states = (peaks, rests, delta)
    k = head_of(k, k_strides, batch, first_k, kv_head)
    v = head_of(v, v_strides, batch, first_k, kv_head)
    keys = load_rows(k, k_strides, n0, size_k, None, BLOCK_N, DIM, BLOCK_D, True)
    values = load_rows(v, v_strides, n0, size_k, None, BLOCK_N, VALUE_DIM, BLOCK_V, True)

    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        span = (sequence, batch, head, first_q, size_q, first_k, size_k, tokens_q, tokens_k, heads)
        q_head = head_of(q, q_strides, batch, first_q, head)
        grad_head = head_of(grad_out, grad_strides, batch, first_q, head)
        start, whole_start, whole_stop, stop = queries_of(n0, span, window, masks, BLOCK_M, BLOCK_N)
        for m0 in range(whole_start, whole_stop, BLOCK_M):
            if block_is_live(m0, n0, span, masks):
                dk_sum, dv_sum = keys_tile(dk_sum, dv_sum, q_head, grad_head, keys, values, states, q_strides,
                                           grad_strides, m0, n0, span, window, terms, noise, dropout_scale, None, None,
                                           CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M,
                                           BLOCK_N)  # fmt: skip
        tiles = edge_tiles(start, whole_start, whole_stop, stop, BLOCK_M)
        unsound = tl.zeros((BLOCK_M,), tl.int1)
        for t in range(tiles):
            m0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_M)
            allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, True)
            if edge_is_live(allowed, masks):
                sound = sound_rows(q_head, q_strides, m0, size_q, BLOCK_M, DIM, BLOCK_D)
                sound &= sound_rows(grad_head, grad_strides, m0, size_q, BLOCK_M, VALUE_DIM, BLOCK_V)
                unsound |= ~sound
                dk_sum, dv_sum = keys_tile(dk_sum, dv_sum, q_head, grad_head, keys, values, states, q_strides,
                                           grad_strides, m0, n0, span, window, terms, noise, dropout_scale,
                                           allowed & sound[None, :], sound, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D,
                                           BLOCK_V, BLOCK_M, BLOCK_N)  # fmt: skip
        for t in range(tl.max(unsound.to(tl.int32), 0) * tiles * BLOCK_M):  # the queries left out, one by one
            m0 = edge_tile(t // BLOCK_M, start, whole_start, whole_stop, BLOCK_M) + t % BLOCK_M
            sound = sound_rows(q_head, q_strides, m0, size_q, 1, DIM, BLOCK_D)
            sound &= sound_rows(grad_head, grad_strides, m0, size_q, 1, VALUE_DIM, BLOCK_V)
            if tl.max(sound.to(tl.int32), 0) == 0:
                same_keys = load_rows(k, k_strides, n0, size_k, None, BLOCK_N, DIM, BLOCK_D, True)
                same_values = load_rows(v, v_strides, n0, size_k, None, BLOCK_N, VALUE_DIM, BLOCK_V, True)
                allowed = allowed_pairs(m0, n0, span, window, masks, 1, BLOCK_N, True)
                dk_sum, dv_sum = keys_tile(dk_sum, dv_sum, q_head, grad_head, same_keys, same_values, states,
                                           q_strides, grad_strides, m0, n0, span, window, terms, noise, dropout_scale,
                                           allowed, None, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, 1,
                                           BLOCK_N)  # fmt: skip

    kv_heads = heads // group
    store_rows(dk, dk_sum * scale, batch, first_k, kv_head, kv_heads, tokens_k, n0, size_k, BLOCK_N, DIM, BLOCK_D)
    store_rows(dv, dv_sum, batch, first_k, kv_head, kv_heads, tokens_k, n0, size_k, BLOCK_N, VALUE_DIM, BLOCK_V)


@triton.jit
def queries_tile(dq, slope_rows, q, grads, k, v, state, k_strides, v_strides, m0, n0, span, window, terms, noise,
                 dropout_scale, allowed, sound, SLOPES: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr,
                 DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds what one tile of keys, or a single key, contributes to dq (without `scale`) and to the slopes' gradient."""
    edge: tl.constexpr = allowed is not None
    keys = load_rows(k, k_strides, n0, span[6], sound, BLOCK_N, DIM, BLOCK_D, edge)
    values = load_rows(v, v_strides, n0, span[6], None, BLOCK_N, VALUE_DIM, BLOCK_V, edge)
    _, ds, raw = score_gradient(
        row_products(q, keys), row_products(grads, values), state, m0, n0, span, window, terms, noise, dropout_scale,
        allowed, CAP, DROPOUT, BLOCK_M, BLOCK_N, False)  # fmt: skip
    dq = add_product(dq, raw, keys, allowed)
    if SLOPES:
        i, j = pair(m0, n0, BLOCK_M, BLOCK_N, False)
        slope_rows += tl.sum(ds * distance(i, j, window), 1)
    return dq, slope_rows


@tuned("queries")
@triton.jit(do_not_specialize=RUNTIME)
def queries_kernel(q, k, v, grad_out, peaks, rests, delta, dq, dslope_rows, q_strides, k_strides, v_strides,
                   grad_strides, bias, slopes, intervals, blocks, bits, cu_seqlens_q, cu_seqlens_k, sequences, tokens_q,
                   tokens_k, heads, group, left, right, bottom_right, block_m, block_n, inner, outer, scale, seed_lo,
                   seed_hi, offset, threshold, dropout_scale, CAP: tl.constexpr, NATURAL: tl.constexpr,
                   DROPOUT: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_V: tl.constexpr, SHORT: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    m0, span = block_of_queries(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK_M)
    _, batch, head, first_q, size_q, first_k, size_k, _, _, _ = span
    if (m0 < 0) | (m0 >= size_q):
        return
    window = ((size_k - size_q) * bottom_right, left, right)
    masks = (intervals, blocks, bits, block_m, block_n)
    terms = (bias, slopes, inner, outer, unit_of(NATURAL))
    noise = (seed_lo, seed_hi, offset, threshold)
    q = head_of(q, q_strides, batch, first_q, head)
    grad_out = head_of(grad_out, grad_strides, batch, first_q, head)
    rows = load_rows(q, q_strides, m0, size_q, None, BLOCK_M, DIM, BLOCK_D, True)
    grads = load_rows(grad_out, grad_strides, m0, size_q, None, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    k = head_of(k, k_strides, batch, first_k, head // group)
    v = head_of(v, v_strides, batch, first_k, head // group)
    state = load_rows_of((peaks, rests, delta), m0, span, 0, BLOCK_M)

    SLOPES: tl.constexpr = dslope_rows is not None
    dq_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    slope_rows = tl.zeros((BLOCK_M,), tl.float32)
    start, whole_start, whole_stop, stop = keys_of(m0, span, window, masks, BLOCK_M, BLOCK_N)
    for n0 in range(whole_start, whole_stop, BLOCK_N):
        if block_is_live(m0, n0, span, masks):
            dq_sum, slope_rows = queries_tile(dq_sum, slope_rows, rows, grads, k, v, state, k_strides,
                                              v_strides, m0, n0, span, window, terms, noise, dropout_scale, None,
                                              None, SLOPES, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
                                              BLOCK_M, BLOCK_N)  # fmt: skip
    tiles = edge_tiles(start, whole_start, whole_stop, stop, BLOCK_N)
    unsound = tl.zeros((BLOCK_N,), tl.int1)
    for t in range(tiles):
        n0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_N)
        allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, BLOCK_N, False)
        if edge_is_live(allowed, masks):
            sound = sound_rows(k, k_strides, n0, size_k, BLOCK_N, DIM, BLOCK_D)
            unsound |= ~sound
            dq_sum, slope_rows = queries_tile(dq_sum, slope_rows, rows, grads, k, v, state, k_strides,
                                              v_strides, m0, n0, span, window, terms, noise, dropout_scale,
                                              allowed & sound[None, :], sound, SLOPES, CAP, DROPOUT, DIM, VALUE_DIM,
                                              BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N)  # fmt: skip
    for t in range(tl.max(unsound.to(tl.int32), 0) * tiles * BLOCK_N):  # the keys left out, one by one
        n0 = edge_tile(t // BLOCK_N, start, whole_start, whole_stop, BLOCK_N) + t % BLOCK_N
        if tl.max(sound_rows(k, k_strides, n0, size_k, 1, DIM, BLOCK_D).to(tl.int32), 0) == 0:
            same_rows = load_rows(q, q_strides, m0, size_q, None, BLOCK_M, DIM, BLOCK_D, True)
            same_grads = load_rows(grad_out, grad_strides, m0, size_q, None, BLOCK_M, VALUE_DIM, BLOCK_V, True)
            allowed = allowed_pairs(m0, n0, span, window, masks, BLOCK_M, 1, False)
            dq_sum, slope_rows = queries_tile(dq_sum, slope_rows, same_rows, same_grads, k, v, state,
                                              k_strides, v_strides, m0, n0, span, window, terms, noise, dropout_scale,
                                              allowed, None, SLOPES, CAP, DROPOUT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
                                              BLOCK_M, 1)  # fmt: skip

    store_rows(dq, dq_sum * scale, batch, first_q, head, heads, tokens_q, m0, size_q, BLOCK_M, DIM, BLOCK_D)
    if SLOPES:
        i = m0 + tl.arange(0, BLOCK_M)
        tl.store(dslope_rows + row_offset(span) + i, -slope_rows, mask=i < size_q)
