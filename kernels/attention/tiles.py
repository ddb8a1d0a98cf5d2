"""What every attention kernel does to one tile: find its place, load it, bend its scores, mask it, drop from it.

A tile pairs the queries m0 … m0+BLOCK_M-1 of one sequence with its keys n0 … n0+BLOCK_N-1. Queries run along axis 0,
or along axis 1 where TRANSPOSED says so. Scores are kept in `unit`s of exp: log2(e) saves a multiplication an element,
1 saves float32 its last bits.

Tuples keep the parameter lists readable:
  span   = (sequence, batch, head, first_q, size_q, first_k, size_k, tokens_q, tokens_k, heads)
           batch indexes tensors (0 when packed); first_* are token offsets within a batch
  window = (diagonal, left, right): keys i + diagonal - left … i + diagonal + right
  masks  = (intervals, blocks, bits, block_m, block_n), each tensor None or (pointer, step_batch, step_head)
  terms  = (bias, alibi_slopes, inner, outer, unit), bias None or (pointer, four strides), slopes None or
           (pointer, step_batch)
  noise  = (seed_lo, seed_hi, offset, threshold)
"""

import triton
import triton.language as tl

from ..shared import product, rounded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(slot, cu_seqlens, sequences, tokens, BLOCK: tl.constexpr):
    """The sequence that a program serves and the first row of its block there.

    Packed sequence s owns the slots from cu_seqlens[s] // BLOCK + s on: always enough, known without a prefix sum, and
    tokens // BLOCK + sequences in all. A slot its sequence does not fill gets a row outside of it.
    """
    if cu_seqlens is None:
        blocks = tl.cdiv(tokens, BLOCK)
        sequence = slot // blocks
        row = slot % blocks * BLOCK
    else:
        sequence = slot * 0
        after = sequences
        while after - sequence > 1:
            middle = (sequence + after) // 2
            here = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
            sequence = tl.where(here, middle, sequence)
            after = tl.where(here, after, middle)
        row = (slot - sequence - tl.load(cu_seqlens + sequence) // BLOCK) * BLOCK
    return sequence, row


@triton.jit
def slots(cu_seqlens, sequences, tokens, BLOCK: tl.constexpr):
    """How many values of `slot` the grid holds for each head."""
    return sequences * tl.cdiv(tokens, BLOCK) if cu_seqlens is None else tokens // BLOCK + sequences


@triton.jit
def extent(sequence, cu_seqlens, tokens):
    """First token and number of tokens of a sequence; bounds that lie are cut to what the tensor holds."""
    if cu_seqlens is None:
        first = sequence * 0
        size = first + tokens
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)
        size = tl.maximum(tl.minimum(tl.load(cu_seqlens + sequence + 1), tokens) - first, 0)
    return first, size


@triton.jit
def make_span(sequence, head, cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, heads):
    first_q, size_q = extent(sequence, cu_seqlens_q, tokens_q)
    first_k, size_k = extent(sequence, cu_seqlens_k, tokens_k)
    batch = sequence if cu_seqlens_q is None else sequence * 0
    return (sequence, batch, head, first_q, size_q, first_k, size_k, tokens_q, tokens_k, heads)


@triton.jit
def block_of_queries(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK: tl.constexpr):
    """The first query of this program's block, -1 or beyond its sequence where it has none, and its span.

    Backwards: under a causal mask the last queries have the most work, and short programs should finish last.
    """
    per_head = slots(cu_seqlens_q, sequences, tokens_q, BLOCK)
    place = per_head - 1 - tl.program_id(0) % per_head
    sequence, first = locate(place, cu_seqlens_q, sequences, tokens_q, BLOCK)
    head = tl.program_id(0) // per_head
    return first, make_span(sequence, head, cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, heads)


@triton.jit
def block_of_keys(cu_seqlens_q, cu_seqlens_k, sequences, tokens_q, tokens_k, heads, BLOCK: tl.constexpr):
    """The same for a block of keys."""
    per_head = slots(cu_seqlens_k, sequences, tokens_k, BLOCK)
    sequence, first = locate(tl.program_id(0) % per_head, cu_seqlens_k, sequences, tokens_k, BLOCK)
    head = tl.program_id(0) // per_head
    return first, make_span(sequence, head, cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, heads)


@triton.jit
def head_of(tensor, strides, batch, first, head):
    """Pointer to the first token of a sequence in one head of a (batch, token, head, dim) tensor."""
    return tensor + batch.to(tl.int64) * strides[0] + first.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def load_rows(base, strides, first, size, sound, ROWS: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr,
              TAIL: tl.constexpr):  # fmt: skip
    """Rows first … first+ROWS-1 of one head; zeros beyond DIM, beyond `size` (looked at where TAIL) and where `sound`,
    if there is one, is false."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    pointers = base + tl.cast(first, tl.int64) * strides[1]
    pointers += (row.to(tl.int64) * strides[1])[:, None] + (col.to(tl.int64) * strides[3])[None, :]
    if TAIL:
        inside = first + row < size
        if sound is not None:
            inside &= sound
        inside = inside[:, None]
        if COLS != DIM:
            inside &= (col < DIM)[None, :]
        x = tl.load(pointers, mask=inside, other=0.0)
    elif COLS != DIM:
        x = tl.load(pointers, mask=(col < DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def sound_rows(base, strides, first, size, ROWS: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr):
    """Rows that hold numbers only (inf - inf and nan - nan are not 0).

    A tile product multiplies masked rows by 0, and 0 · NaN would still spoil everything. Tiles with masked elements
    therefore leave unsound rows out, and where there were any a second walk takes those one by one (`add_product`). The
    rows are read once more for that, which is cheaper than holding a whole operand in registers.
    """
    x = load_rows(base, strides, first, size, None, ROWS, DIM, COLS, True).to(tl.float32)
    return tl.min((x - x == 0).to(tl.int32), 1) > 0


@triton.jit
def store_rows(tensor, x, batch, first, head, heads, tokens, m0, size, ROWS: tl.constexpr, DIM: tl.constexpr,
               COLS: tl.constexpr):  # fmt: skip
    """Rows m0 … of a sequence of a contiguous (batch, token, head, dim) tensor."""
    row = m0 + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    pointers = ((batch.to(tl.int64) * tokens + first + row) * heads + head) * DIM
    inside = (row < size)[:, None] & (col < DIM)[None, :]
    tl.store(tensor + pointers[:, None] + col[None, :], x.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def row_offset(span):
    """Offset of a sequence's first query in a contiguous (batch, head, token) tensor."""
    return (span[1].to(tl.int64) * span[9] + span[2]) * span[7] + span[3]


@triton.jit
def load_values(tensor, m0, span, other, BLOCK_M: tl.constexpr):
    """Of the queries m0 … of a sequence, from a contiguous (batch, head, token) tensor."""
    i = tl.arange(0, BLOCK_M)
    return tl.load(tensor + row_offset(span) + m0 + i, mask=i < span[4] - m0, other=other).to(tl.float32)


@triton.jit
def pair(m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Query and key positions of a tile, ready to broadcast against each other."""
    i = m0 + tl.arange(0, BLOCK_M)
    j = n0 + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        i = i[None, :]
        j = j[:, None]
    else:
        i = i[:, None]
        j = j[None, :]
    return i, j


@triton.jit
def row_products(a, b):
    """a bᵀ in float32, where b may be a single row. Of float32, no more than 32 products are added one after another: a
    long chain would cost the exponential that follows its last bits."""
    PARTS: tl.constexpr = a.shape[1] // 32
    if b.shape[0] == 1:
        result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1, keep_dims=True)
    elif a.dtype == tl.float32 and PARTS > 1:
        a = tl.permute(tl.reshape(a, (a.shape[0], PARTS, 32)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], PARTS, 32)), (1, 2, 0))
        result = tl.sum(product(a, b), 0)
    else:
        result = product(a, tl.trans(b))
    return result


@triton.jit
def add_product(acc, a, b, seen):
    """acc + a b, where b is a whole tile or, to be exact whatever it holds, one row that only the `seen` rows of a
    meet."""
    a = a.to(b.dtype)
    if b.shape[0] == 1:
        acc += tl.where(seen, a.to(tl.float32) * b.to(tl.float32), 0.0)
    else:
        acc = product(a, b, acc)
    return acc


@triton.jit
def tanh(x):
    """Accurate to the last bits also near 0, where the exponential form cancels (polynomial of Cephes' tanhf)."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    return tl.where(z < 0.390625, x + x * z * series, 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0))


@triton.jit
def bend(s, m0, n0, span, window, terms, CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
         TRANSPOSED: tl.constexpr):  # fmt: skip
    """Raw products to scores, rounded: of large ones nothing must be left beside their maximum. And the tanh of the
    soft cap, for its derivative."""
    sequence, batch, head, _, size_q, _, size_k, _, _, _ = span
    bias, slopes, inner, outer, unit = terms
    i, j = pair(m0, n0, BLOCK_M, BLOCK_N, TRANSPOSED)
    bent = rounded(s, inner)
    if CAP:
        bent = tanh(bent)
        s = rounded(bent, outer)
    else:
        s = bent
    if bias is not None:
        pointers = bias[0] + batch.to(tl.int64) * bias[1] + head.to(tl.int64) * bias[2]
        pointers += i.to(tl.int64) * bias[3] + j.to(tl.int64) * bias[4]
        s += tl.load(pointers, mask=(i < size_q) & (j < size_k), other=0.0).to(tl.float32) * unit
    if slopes is not None:
        slope = tl.load(slopes[0] + sequence.to(tl.int64) * slopes[1] + head).to(tl.float32) * unit
        s -= slope * distance(i, j, window)
    return s, bent


@triton.jit
def unit_of(NATURAL: tl.constexpr):
    return 1.0 if NATURAL else LOG2E


@triton.jit
def exponential(x, terms):
    return tl.exp2(x * (LOG2E / terms[4]))


@triton.jit
def probability(s, peak, rest, terms):
    """exp(s - peak - rest); a peak that is not 0 is the largest score of its row, which another tile's shape may have
    rounded another way."""
    ahead = s - peak
    ahead = tl.where(ahead > tl.where(peak == 0.0, float("inf"), 0.0), 0.0, ahead)
    return exponential(ahead - rest, terms)


@triton.jit
def distance(i, j, window):
    return tl.abs(i + window[0] - j).to(tl.float32)


@triton.jit
def mask_base(mask, span):
    return span[1].to(tl.int64) * mask[1] + span[2].to(tl.int64) * mask[2]


@triton.jit
def interval_rows(i, span, intervals):
    """First key and key after the last of the queries i; none for queries outside the sequence."""
    pointers = intervals[0] + (mask_base(intervals, span) * span[7] + span[3] + i) * 2
    begin = tl.load(pointers, mask=i < span[4], other=0)
    end = tl.load(pointers + 1, mask=i < span[4], other=0)
    return begin, end


@triton.jit
def block_words(i, j, span, masks):
    """The block mask's byte for queries i and keys j."""
    _, blocks, _, block_m, block_n = masks
    rows = mask_base(blocks, span) * tl.cdiv(span[7], block_m) + i // block_m
    pointers = blocks[0] + rows * tl.cdiv(span[8], block_n) + j // block_n
    return tl.load(pointers, mask=(i < span[4]) & (j < span[6]), other=0)


@triton.jit
def allowed_pairs(m0, n0, span, window, masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which queries of a tile may see which of its keys."""
    intervals, blocks, bits, _, _ = masks
    size_q, size_k = span[4], span[6]
    i, j = pair(m0, n0, BLOCK_M, BLOCK_N, TRANSPOSED)
    ahead = j - i - window[0]
    allowed = (ahead >= -window[1]) & (ahead <= window[2]) & (i < size_q) & (j < size_k)
    if intervals is not None:
        begin, end = interval_rows(i, span, intervals)
        allowed &= (begin <= j) & (j < end)
    if blocks is not None:
        allowed &= block_words(i, j, span, masks) != 0
    if bits is not None:
        rows = mask_base(bits, span) * span[7] + i
        words = tl.load(bits[0] + rows * tl.cdiv(span[8], 32) + j // 32, mask=(i < size_q) & (j < size_k), other=0)
        allowed &= (words >> (j % 32)) & 1 != 0
    return allowed


@triton.jit
def block_is_whole(masks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where one byte of the block mask covers a whole tile."""
    return (masks[3] % BLOCK_M == 0) & (masks[4] % BLOCK_N == 0)


@triton.jit
def block_is_live(m0, n0, span, masks):
    """False where the block mask rules out a tile that it covers with one byte."""
    live = True
    if masks[1] is not None:
        live = block_words(m0, n0, span, masks) != 0
    return live


@triton.jit
def edge_is_live(allowed, masks):
    """False where data masks leave nothing of a tile. Ranges alone never give such a tile."""
    live = True
    if masks[0] is not None or masks[1] is not None or masks[2] is not None:
        live = tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0
    return live


@triton.jit
def kept(m0, n0, span, noise, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which elements survive dropout: each Philox call decides on four keys, 16 apart."""
    seed_lo, seed_hi, offset, threshold = noise
    key_lo = seed_lo.to(tl.uint32, bitcast=True)
    key_hi = seed_hi.to(tl.uint32, bitcast=True)
    limit = threshold.to(tl.uint32, bitcast=True)
    if BLOCK_N % 64 == 0:
        i = (m0 + tl.arange(0, BLOCK_M))[:, None]
        counter = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    else:
        i, j = pair(m0, n0, BLOCK_M, BLOCK_N, TRANSPOSED)
        counter = (j >> 6) * 16 + (j & 15)
    zero = (i - i) + (counter - counter)
    row = (zero + span[0] * span[9] + span[2]).to(tl.uint32, bitcast=True)
    counter = (zero + counter).to(tl.uint32, bitcast=True)
    i = (zero + i).to(tl.uint32, bitcast=True)
    offset = (zero + offset).to(tl.uint32, bitcast=True)
    a, b, c, d = tl.philox_impl(counter, i, row, offset, key_lo, key_hi, 10)
    keep_0, keep_1, keep_2, keep_3 = a >= limit, b >= limit, c >= limit, d >= limit
    if BLOCK_N % 64 == 0:
        low = tl.join(keep_0.to(tl.int8), keep_1.to(tl.int8))
        high = tl.join(keep_2.to(tl.int8), keep_3.to(tl.int8))
        words = tl.reshape(tl.join(low, high), (BLOCK_M, BLOCK_N // 64, 16, 2, 2))
        if TRANSPOSED:
            keep = tl.reshape(tl.permute(words, (1, 4, 3, 2, 0)), (BLOCK_N, BLOCK_M)) != 0
        else:
            keep = tl.reshape(tl.permute(words, (0, 1, 4, 3, 2)), (BLOCK_M, BLOCK_N)) != 0
    else:
        word = (j >> 4) & 3
        keep = tl.where(word < 2, tl.where(word == 0, keep_0, keep_1), tl.where(word == 2, keep_2, keep_3))
    return keep
