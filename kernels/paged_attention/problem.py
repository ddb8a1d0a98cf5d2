"""Who sees what: the rows of a block, the keys that they can see, and the scores between the two.

The query heads that share a head of the cache are rows of one block: row r of a sequence is query r // group, head
r % group of the group. Keys are cut into splits at fixed positions, which are programs of their own; the more rows a
sequence has, the longer are its splits, so that there is work enough for the GPU and no more to merge than that takes.

Tuples keep the parameter lists readable:
  span   = (sequence, batch, kv_head, first_token, queries, keys, first_key, group)
           batch indexes tensors (0 when packed); keys before first_key are padding
  limits = (left, right): query at position p sees keys p - left … p + right
  terms  = (slopes, bits, inner, outer, unit, positions), slopes None or (pointer, step_batch), bits None or (pointer,
           three strides, words), positions None or (pointer, two strides)
"""

import triton
import triton.language as tl

from ..attention.tiles import LOG2E, row_products, tanh
from ..shared import rounded
from .cache import load_elements, load_scale

ROWS = tl.constexpr(64)  # rows for which a split has its shortest length
FARTHEST = tl.constexpr(2**28)  # position, either way


@triton.jit
def make_span(sequence, kv_head, cu_seqlens_q, seq_lens, left_pad, tokens, capacity, group):
    """Bounds that lie are cut to what the tensors hold."""
    if cu_seqlens_q is None:
        first = sequence * 0
        queries = first + tokens
        batch = sequence
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), 0), tokens)
        queries = tl.maximum(tl.minimum(tl.load(cu_seqlens_q + sequence + 1), tokens) - first, 0)
        batch = sequence * 0
    keys = tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), capacity)
    first_key = keys * 0
    if left_pad is not None:
        first_key = tl.maximum(tl.load(left_pad + sequence), 0)
    return (sequence, batch, kv_head, first, queries, keys, first_key, group)


@triton.jit
def owner(slot, cu_seqlens_q, sequences, rows, block, apart):
    """The last packed sequence s with cu_seqlens_q[s] · rows // block + s · apart <= slot."""
    sequence = slot * 0
    after = sequences
    while after - sequence > 1:
        middle = (sequence + after) // 2
        here = tl.load(cu_seqlens_q + middle) * rows // block + middle * apart <= slot
        sequence = tl.where(here, middle, sequence)
        after = tl.where(here, after, middle)
    return sequence


@triton.jit
def locate(slot, cu_seqlens_q, sequences, tokens, group, BLOCK_M: tl.constexpr):
    """The sequence that a program serves and the first row of its block there. Packed sequence s owns the slots from
    cu_seqlens_q[s] · group // BLOCK_M + s on: always enough, and known without a prefix sum."""
    if cu_seqlens_q is None:
        blocks = tl.cdiv(tokens * group, BLOCK_M)
        sequence = slot // blocks
        row = slot % blocks * BLOCK_M
    else:
        sequence = owner(slot, cu_seqlens_q, sequences, group, BLOCK_M, 1)
        row = (slot - sequence - tl.load(cu_seqlens_q + sequence) * group // BLOCK_M) * BLOCK_M
    return sequence, row


@triton.jit
def splits_of(span, limits, positions, shortest):
    """Length of this sequence's splits, the first that any of its queries sees, and how many there are."""
    queries, keys = span[4], span[5]
    length = shortest * tl.maximum(tl.cdiv(queries * span[7], ROWS), 1)
    low = tl.maximum(span[6], 0)
    if positions is None:
        low = tl.maximum(low, keys - queries - limits[0])
    first = low // length
    return length, first, tl.maximum(tl.cdiv(keys, length) - first, 0)


@triton.jit
def first_partial(span, tokens, most):
    """The first of a sequence's partial results. `most` is how many splits of the shortest length there may be: a
    sequence has at most rows · most partial results, and at most ROWS · most + rows, so the lesser sum over those
    before it is enough."""
    rows = (span[1].to(tl.int64) * tokens + span[3]) * span[7]
    return tl.minimum(rows * most, span[0].to(tl.int64) * ROWS * most + rows)


@triton.jit
def keys_of(i_first, i_last, begin, end, span, limits, terms, BLOCK_N: tl.constexpr):
    """Which keys of the split begin … end the queries i_first … i_last visit: the range that any sees; and its tiles
    (start, whole_start, whole_stop, stop), of which those from whole_start to whole_stop are seen whole by all: none
    where queries stand in any order."""
    _, _, _, _, queries, keys, first_key, _ = span
    place = keys - queries
    low = tl.maximum(first_key, begin)
    high = tl.minimum(keys, end)
    if terms[5] is None:
        low = tl.maximum(low, place + i_first - limits[0])
        high = tl.maximum(tl.minimum(high, place + i_last + limits[1] + 1), low)
        whole_low = tl.maximum(low, place + i_last - limits[0])
        whole_high = tl.minimum(high, place + i_first + limits[1] + 1)
    else:
        high = tl.maximum(high, low)
        whole_low = low
        whole_high = low
    if terms[1] is not None:
        whole_high = tl.minimum(whole_high, place)
    start = low // BLOCK_N * BLOCK_N
    stop = tl.cdiv(high, BLOCK_N) * BLOCK_N
    whole_start = tl.minimum(tl.cdiv(whole_low, BLOCK_N) * BLOCK_N, stop)
    whole_stop = tl.maximum(whole_high, 0) // BLOCK_N * BLOCK_N
    return low, high, start, whole_start, tl.maximum(whole_stop, whole_start), stop


@triton.jit
def load_queries(q, strides, span, i, head, live, C0: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr):
    """Columns C0 … of the rows (query i, head); zeros for the others than the `live` ones."""
    col = C0 + tl.arange(0, COLS)
    rows = span[1].to(tl.int64) * strides[0] + (span[3] + i).to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    pointers = q + rows[:, None] + (col.to(tl.int64) * strides[3])[None, :]
    inside = live[:, None]
    if C0 + COLS > DIM:
        inside &= (col < DIM)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def multiply(q, rest, k, k_scale, places, kv_head, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
             FORMAT: tl.constexpr):  # fmt: skip
    """q kᵀ. Heads whose width is far from a power of 2 come in two parts, the second in `rest`."""
    s = row_products(q, load_elements(k, places, kv_head, inside, 0, BLOCK_D, DIM, FORMAT).to(q.dtype))
    if rest is not None:
        part = load_elements(k, places, kv_head, inside, BLOCK_D, rest.shape[1], DIM, FORMAT)
        s += row_products(rest, part.to(q.dtype))
    if k_scale is not None:
        s *= load_scale(k_scale, places, kv_head, inside)[None, :]
    return s


@triton.jit
def positions_of(i, span, positions):
    """Where queries stand. Numbers that lie are cut to what sums of them may be."""
    if positions is None:
        place = span[5] - span[4] + i
    else:
        row = (span[3] + tl.minimum(i, span[4] - 1)).to(tl.int64) * positions[2]
        given = tl.load(positions[0] + span[1].to(tl.int64) * positions[1] + row)
        place = tl.minimum(tl.maximum(given, -FARTHEST), FARTHEST)
    return place


@triton.jit
def bend(s, i, j, head, span, terms, CAP: tl.constexpr):
    """Raw products to scores in units of `unit`."""
    slopes, _, inner, outer, unit, positions = terms
    s = rounded(s, inner)
    if CAP:
        s = rounded(tanh(s), outer)
    if slopes is not None:
        slope = tl.load(slopes[0] + span[0].to(tl.int64) * slopes[1] + head).to(tl.float32) * unit
        s -= slope[:, None] * tl.abs(positions_of(i, span, positions)[:, None] - j[None, :]).to(tl.float32)
    return s


@triton.jit
def allowed_pairs(i, j, live, span, limits, terms):
    """Which of the rows' queries may see which keys."""
    _, batch, _, first, queries, keys, first_key, _ = span
    bits = terms[1]
    ahead = j[None, :] - positions_of(i, span, terms[5])[:, None]
    allowed = live[:, None] & (ahead >= -limits[0]) & (ahead <= limits[1])
    allowed &= ((j >= first_key) & (j < keys))[None, :]
    if bits is not None:
        newest = j - (keys - queries)
        rows = batch.to(tl.int64) * bits[1] + (first + i).to(tl.int64) * bits[2]
        pointers = bits[0] + rows[:, None] + ((newest // 32).to(tl.int64) * bits[3])[None, :]
        known = live[:, None] & ((newest >= 0) & (newest // 32 < bits[4]))[None, :]
        words = tl.load(pointers, mask=known, other=0)
        allowed &= (newest < 0)[None, :] | ((words >> (newest & 31)[None, :]) & 1 != 0)
    return allowed


@triton.jit
def exponential(x, unit):
    return tl.exp2(x * (LOG2E / unit))
