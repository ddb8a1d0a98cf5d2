"""Attention over a paged cache: one program takes a block of rows through some splits of their keys, a second kernel
merges the splits of a row, and a third sums the probabilities of each key."""

from typing import Any

import triton
import triton.language as tl

from .. import shared
from ..attention.ranges import edge_tile, edge_tiles
from ..attention.tiles import LN2, add_product, unit_of
from .cache import find_keys, load_values, sound_values
from .problem import (
    allowed_pairs,
    bend,
    exponential,
    first_partial,
    keys_of,
    load_queries,
    locate,
    make_span,
    multiply,
    owner,
    splits_of,
)

# (BLOCK_N, warps, stages), by the size of an element of q, the width of a head and the rows of a block. The first of
# 16-bit heads of up to 128 compiles for sm_80 and sm_90 without spills.
SHAPES = {
    "half 64 16": [(64, 4, 3), (64, 4, 2), (128, 4, 3)],
    "half 64 64": [(32, 8, 2), (64, 8, 2), (64, 4, 2)],
    "half 128 16": [(32, 4, 2), (64, 4, 2), (64, 8, 3)],
    "half 128 64": [(32, 8, 2), (64, 8, 2), (32, 4, 2)],
    "half 256 16": [(32, 8, 2), (32, 4, 2)],
    "half 512 16": [(32, 8, 1), (16, 8, 1)],
    "float 64 16": [(32, 4, 2), (64, 4, 2)],
    "float 64 64": [(32, 8, 2), (32, 4, 2)],
    "float 128 16": [(32, 4, 1), (16, 4, 2)],
    "float 256 16": [(16, 4, 1), (32, 8, 1)],
    "float 512 16": [(16, 8, 1), (16, 4, 1)],
}
# Arguments whose value must not make a new kernel.
RUNTIME = ["sequences", "tokens", "capacity", "heads", "left", "right", "shortest", "most", "at_once", "columns"]


def _config(shape: tuple[int, int, int]) -> triton.Config:
    block_n, warps, stages = shape
    return triton.Config({"BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


def _class(named: dict[str, Any]) -> str:
    width = min(512, max(64, named["BLOCK_D"] * (2 if named["REST"] else 1), named.get("BLOCK_V", 0)))
    kind = "float" if named["q"].element_size() == 4 else "half"
    return f"{kind} {width} {16 if named['BLOCK_M'] == 16 else 64}"


_tuned = shared.tuned(
    {name: [_config(shape) for shape in shapes] for name, shapes in SHAPES.items()},
    _class,
    _config((64, 1, 1)),
    key=("DIM", "VALUE_DIM", "BLOCK_M", "FORMAT"),
)


@triton.jit
def take_tile(state, q, rest, k, v, k_scale, v_scale, table, page_size, n0, inside, seen, sound, i, head, span, terms,
              CAP: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Takes one tile of keys, or a single key, into the running softmax (acc, total, peak). `inside` (keys to load) and
    `seen` (pairs) are None where nothing is masked, `sound` where no value is left out."""
    acc, total, peak = state
    unit = terms[4]
    places = find_keys(n0, inside, span[0], table, page_size, BLOCK_N)
    s = multiply(q, rest, k, k_scale, places, span[2], inside, DIM, BLOCK_D, FORMAT)
    s = bend(s, i, n0 + tl.arange(0, BLOCK_N), head, span, terms, CAP)
    if seen is not None:
        s = tl.where(seen, s, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    safe_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = exponential(s - safe_peak[:, None], unit)
    shrink = exponential(peak - safe_peak, unit)
    loaded = inside
    if sound is not None:
        loaded = inside & sound
    values = load_values(v, v_scale, places, span[2], loaded, q.dtype, VALUE_DIM, BLOCK_V, FORMAT)
    acc = add_product(acc * shrink[:, None], p, values, seen)
    return acc, total * shrink + tl.sum(p, 1), new_peak


@triton.jit
def take_split(q, rest, k, v, k_scale, v_scale, table, page_size, begin, end, i_first, i_last, i, head, live, span,
               limits, terms, CAP: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The softmax of a block of rows over the keys begin … end: (acc, total, peak)."""
    ROWS: tl.constexpr = q.shape[0]
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    state = (tl.zeros((ROWS, BLOCK_V), tl.float32), tl.zeros((ROWS,), tl.float32), peak)
    low, high, start, whole_start, whole_stop, stop = keys_of(i_first, i_last, begin, end, span, limits, terms,
                                                              BLOCK_N)  # fmt: skip
    for n0 in range(whole_start, whole_stop, BLOCK_N):
        state = take_tile(state, q, rest, k, v, k_scale, v_scale, table, page_size, n0, None, None, None, i, head, span,
                          terms, CAP, FORMAT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N)  # fmt: skip
    tiles = edge_tiles(start, whole_start, whole_stop, stop, BLOCK_N)
    unsound = tl.zeros((BLOCK_N,), tl.int1)
    for t in range(tiles):
        n0 = edge_tile(t, start, whole_start, whole_stop, BLOCK_N)
        j = n0 + tl.arange(0, BLOCK_N)
        inside = (j >= low) & (j < high)
        places = find_keys(n0, inside, span[0], table, page_size, BLOCK_N)
        sound = sound_values(v, v_scale, places, span[2], inside, q.dtype, VALUE_DIM, BLOCK_V, FORMAT)
        unsound |= ~sound
        seen = allowed_pairs(i, j, live, span, limits, terms) & sound[None, :]
        state = take_tile(state, q, rest, k, v, k_scale, v_scale, table, page_size, n0, inside, seen, sound, i, head,
                          span, terms, CAP, FORMAT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N)  # fmt: skip
    for t in range(tl.max(unsound.to(tl.int32), 0) * tiles * BLOCK_N):  # the keys left out, one by one
        n0 = edge_tile(t // BLOCK_N, start, whole_start, whole_stop, BLOCK_N) + t % BLOCK_N
        j = n0 + tl.arange(0, 1)
        inside = (j >= low) & (j < high)
        places = find_keys(n0, inside, span[0], table, page_size, 1)
        sound = sound_values(v, v_scale, places, span[2], inside, q.dtype, VALUE_DIM, BLOCK_V, FORMAT)
        if tl.max(sound.to(tl.int32), 0) == 0:
            seen = allowed_pairs(i, j, live, span, limits, terms)
            state = take_tile(state, q, rest, k, v, k_scale, v_scale, table, page_size, n0, inside, seen, None, i, head,
                              span, terms, CAP, FORMAT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, 1)  # fmt: skip
    return state


@triton.jit
def finish(state, sink, unit):
    """out, lse, peak and share of rows that have met all their keys: probability = exp(s - peak) · share. A sink is one
    more logit in the denominator."""
    acc, total, peak = state
    if sink is not None:
        sink = sink * unit
        top = tl.maximum(peak, sink)
        base = tl.where(top == -float("inf"), 0.0, top)
        shrink = exponential(peak - base, unit)
        total = total * shrink + exponential(sink - base, unit)
        acc = acc * shrink[:, None]
        peak = top
    lse = tl.where(total == 0.0, -float("inf"), peak / unit + tl.log2(total) * LN2)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    return acc * share[:, None], lse, peak, share


@triton.jit
def store_results(state, out, lse, peaks, shares, sinks, span, i, head, live, tokens, heads, unit,
                  VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    sink = None
    if sinks is not None:
        rows = span[1].to(tl.int64) * sinks[1] + head.to(tl.int64) * sinks[2]
        places = rows + (span[3] + i).to(tl.int64) * sinks[3]
        sink = tl.load(sinks[0] + places, mask=live, other=-float("inf")).to(tl.float32)
    result, row_lse, peak, share = finish(state, sink, unit)
    col = tl.arange(0, BLOCK_V)
    batch = span[1].to(tl.int64)
    rows = ((batch * tokens + span[3] + i) * heads + head) * VALUE_DIM
    inside = live[:, None] & (col < VALUE_DIM)[None, :]
    tl.store(out + rows[:, None] + col[None, :], result.to(out.dtype.element_ty), mask=inside)
    row = (batch * heads + head) * tokens + span[3] + i
    tl.store(lse + row, row_lse, mask=live)
    if peaks is not None:  # for sums of probabilities, which would show what an lse was rounded by
        tl.store(peaks + row, peak, mask=live)
        tl.store(shares + row, share, mask=live)


@_tuned
@triton.jit(do_not_specialize=RUNTIME)
def attend_kernel(q, k, v, out, lse, peaks, shares, partial_acc, partial_total, partial_peak, k_scale, v_scale, table,
                  seq_lens, cu_seqlens_q, left_pad, slopes, sinks, bits, positions, q_strides, sequences, tokens,
                  capacity, heads, kv_heads, group, page_size, left, right, shortest, most, at_once, inner, outer,
                  CAP: tl.constexpr, NATURAL: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr,
                  VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_V: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    kv_head = tl.program_id(0) % kv_heads
    part = tl.program_id(0) // kv_heads % at_once
    sequence, m0 = locate(tl.program_id(0) // kv_heads // at_once, cu_seqlens_q, sequences, tokens, group, BLOCK_M)
    span = make_span(sequence, kv_head, cu_seqlens_q, seq_lens, left_pad, tokens, capacity, group)
    rows = span[4] * group
    if (m0 < 0) | (m0 >= rows):
        return
    limits = (left, right)
    terms = (slopes, bits, inner, outer, unit_of(NATURAL), positions)
    length, first, splits = splits_of(span, limits, positions, shortest)
    r = m0 + tl.arange(0, BLOCK_M)
    live = r < rows
    i = tl.minimum(r, rows - 1) // group
    head = kv_head * group + r % group
    i_first = m0 // group
    i_last = (tl.minimum(m0 + BLOCK_M, rows) - 1) // group
    queries = load_queries(q, q_strides, span, i, head, live, 0, BLOCK_D, DIM)
    rest = None
    if REST > 0:
        rest = load_queries(q, q_strides, span, i, head, live, BLOCK_D, REST, DIM)
    entries = first_partial(span, tokens, most)
    for split in range(part, tl.maximum(splits, 1), at_once):  # without a key: a row of zeros
        begin = (first + split) * length
        state = take_split(queries, rest, k, v, k_scale, v_scale, table, page_size, begin, begin + length, i_first,
                           i_last, i, head, live, span, limits, terms, CAP, FORMAT, DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
                           BLOCK_N)  # fmt: skip
        if splits <= 1:
            store_results(state, out, lse, peaks, shares, sinks, span, i, head, live, tokens, heads, terms[4],
                          VALUE_DIM, BLOCK_V)  # fmt: skip
        else:
            acc, total, peak = state
            at = ((entries + split * rows + r) * kv_heads + kv_head).to(tl.int64)
            col = tl.arange(0, BLOCK_V)
            inside = live[:, None] & (col < VALUE_DIM)[None, :]
            tl.store(partial_acc + at[:, None] * VALUE_DIM + col[None, :], acc, mask=inside)
            tl.store(partial_total + at, total, mask=live)
            tl.store(partial_peak + at, peak, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def merge_kernel(out, lse, peaks, shares, partial_acc, partial_total, partial_peak, seq_lens, cu_seqlens_q, left_pad,
                 sinks, positions, sequences, tokens, capacity, heads, kv_heads, group, left, right, shortest, most,
                 NATURAL: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_S: tl.constexpr):  # fmt: skip
    """One program per query and head: what its splits say together. A single split has said it already."""
    head = tl.program_id(0) % heads
    token = tl.program_id(0) // heads
    if cu_seqlens_q is None:
        sequence = token // tokens
        i = token % tokens
    else:
        sequence = owner(token, cu_seqlens_q, sequences, 1, 1, 0)
        i = token - tl.load(cu_seqlens_q + sequence)
    span = make_span(sequence, head // group, cu_seqlens_q, seq_lens, left_pad, tokens, capacity, group)
    _, _, splits = splits_of(span, (left, right), positions, shortest)
    if (i >= 0) & (i < span[4]) & (splits > 1):
        entries = first_partial(span, tokens, most) + i * group + head % group
        at = tl.arange(0, BLOCK_S)
        col = tl.arange(0, BLOCK_V)
        unit = unit_of(NATURAL)
        peak = tl.full((1,), -float("inf"), tl.float32)
        for s0 in range(0, splits, BLOCK_S):
            entry = (entries + (s0 + at).to(tl.int64) * span[4] * group) * kv_heads + span[2]
            tops = tl.load(partial_peak + entry, mask=s0 + at < splits, other=-float("inf"))
            peak = tl.maximum(peak, tl.max(tops, 0))
        base = tl.where(peak == -float("inf"), 0.0, peak)
        acc = tl.zeros((1, BLOCK_V), tl.float32)
        total = tl.zeros((1,), tl.float32)
        for s0 in range(0, splits, BLOCK_S):
            inside = s0 + at < splits
            entry = (entries + (s0 + at).to(tl.int64) * span[4] * group) * kv_heads + span[2]
            weight = exponential(tl.load(partial_peak + entry, mask=inside, other=-float("inf")) - base, unit)
            total += tl.sum(weight * tl.load(partial_total + entry, mask=inside, other=0.0), 0)
            pointers = partial_acc + entry[:, None] * VALUE_DIM + col[None, :]
            rows = tl.load(pointers, mask=inside[:, None] & (col < VALUE_DIM)[None, :], other=0.0)
            acc += tl.sum(weight[:, None] * rows, 0, keep_dims=True)
        row = i + tl.arange(0, 1)
        heads_of_row = head + tl.arange(0, 1)
        store_results((acc, total, peak), out, lse, peaks, shares, sinks, span, row, heads_of_row, row == i, tokens,
                      heads, unit, VALUE_DIM, BLOCK_V)  # fmt: skip


@_tuned
@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(q, k, peaks, shares, sums, k_scale, table, seq_lens, cu_seqlens_q, left_pad, slopes, bits, positions,
                q_strides, sequences, tokens, capacity, heads, group, page_size, left, right, inner, outer,
                CAP: tl.constexpr, NATURAL: tl.constexpr, FORMAT: tl.constexpr, DIM: tl.constexpr,
                BLOCK_D: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Sums of the probabilities of BLOCK_N keys of one sequence over the queries of one head."""
    blocks = tl.cdiv(capacity, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    head = tl.program_id(0) // blocks % heads
    sequence = tl.program_id(0) // blocks // heads
    span = make_span(sequence, head // group, cu_seqlens_q, seq_lens, left_pad, tokens, capacity, group)
    limits = (left, right)
    terms = (slopes, bits, inner, outer, unit_of(NATURAL), positions)
    j = n0 + tl.arange(0, BLOCK_N)
    inside = (j >= span[6]) & (j < span[5])
    places = find_keys(n0, inside, sequence, table, page_size, BLOCK_N)
    place = span[5] - span[4]
    total = tl.zeros((BLOCK_N,), tl.float32)
    start = place * 0
    stop = tl.where(n0 < span[5], span[4], 0)
    if positions is None:
        start = tl.maximum(n0 - place - right, 0) // BLOCK_M * BLOCK_M
        stop = tl.minimum(n0 + BLOCK_N - place + left, stop)
    for m0 in range(start, stop, BLOCK_M):
        i = m0 + tl.arange(0, BLOCK_M)
        heads_of_rows = head + i * 0
        live = i < span[4]
        queries = load_queries(q, q_strides, span, i, heads_of_rows, live, 0, BLOCK_D, DIM)
        rest = None
        if REST > 0:
            rest = load_queries(q, q_strides, span, i, heads_of_rows, live, BLOCK_D, REST, DIM)
        s = multiply(queries, rest, k, k_scale, places, span[2], inside, DIM, BLOCK_D, FORMAT)
        s = bend(s, i, j, heads_of_rows, span, terms, CAP)
        row = (span[1].to(tl.int64) * heads + head) * tokens + span[3] + i
        peak = tl.load(peaks + row, mask=live, other=0.0)
        share = tl.load(shares + row, mask=live, other=0.0)
        seen = allowed_pairs(i, j, live, span, limits, terms) & (share != 0.0)[:, None]
        # A tile of another shape may have rounded the largest score another way.
        ahead = s - peak[:, None]
        p = exponential(tl.where(ahead > 0.0, 0.0, ahead), terms[4]) * share[:, None]
        total += tl.sum(tl.where(seen, p, 0.0), 0)
    row = (sequence.to(tl.int64) * heads + head) * capacity
    tl.store(sums + row + j, total, mask=j < capacity)
