"""Product quantisation and brute-force search in Triton.

A search keeps the k best rows that a program has seen as 64-bit numbers: the distance above, in an order that whole
numbers have, and the rank of the row's id below, so that equal distances are told apart. Programs take chunks of rows
in turn, and torch sorts what they found. Vectors are first compared in bfloat16, group by group of rows, to tell which
groups cannot hold a result; what is left is compared exactly, in float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shared

EMPTY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
GROUP = 32  # rows with one bound
BOUNDS = 1 << 26  # bounds kept at once
MOST = 512  # results of a search
TINY = tl.constexpr(2.0**-126)


@triton.constexpr_function
def log2(size):
    return size.bit_length() - 1


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def kept(keep, row, inside):
    """Whether rows are inside and the bitmap has them."""
    if keep is not None:
        inside &= (tl.load(keep + row // 8, mask=inside, other=0).to(tl.int32) >> (row % 8).to(tl.int32)) & 1 == 1
    return inside


@triton.jit
def span(ranges, ranges_strides, q, p, n):
    """First and last row of range p, cut to those that exist."""
    first = tl.cast(0, tl.int64)
    last = tl.cast(n, tl.int64)
    if ranges is not None:
        at = ranges + q * ranges_strides[0] + p * ranges_strides[1]
        first = tl.minimum(tl.maximum(tl.load(at), 0), last)
        last = tl.minimum(tl.maximum(tl.load(at + ranges_strides[2]), 0), last)
    return first, last


@triton.jit
def swap(x, falls, axis: tl.constexpr):
    """Neighbours along an axis of two in order: the lesser first, or where it falls last."""
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (len(x.shape) - axis - 1))
    return tl.where(second == falls, tl.min(x, axis, keep_dims=True), tl.max(x, axis, keep_dims=True))


@triton.jit
def merge_steps(x, falls, stage: tl.constexpr):
    """Sorts runs of 2**stage numbers that rise and then fall; x is a cube of sides 2."""
    for i in tl.static_range(stage):
        x = swap(x, falls, len(x.shape) - stage + i)
    return x


@triton.jit
def sort_falling(x, STEPS: tl.constexpr):
    for stage in tl.static_range(1, STEPS):
        x = merge_steps(x, tl.reshape(tl.arange(0, 2), [1] * (STEPS - stage - 1) + [2] + [1] * stage), stage)
    return merge_steps(x, 1, STEPS)


@triton.jit
def add_best(best, key, k, ONE: tl.constexpr):
    """The best of `best`, which rises, and of other keys; all that changes is behind where k keys are below the new."""
    if ONE:
        best = tl.minimum(best, tl.min(key))
    elif tl.min(key) < tl.max(tl.where(tl.arange(0, best.shape[0]) < k, best, -1 - EMPTY)):
        STEPS: tl.constexpr = log2(best.shape[0])
        new = sort_falling(tl.reshape(key, [2] * STEPS), STEPS)
        new = merge_steps(tl.minimum(tl.reshape(best, [2] * STEPS), new), 0, STEPS)
        best = tl.reshape(new, best.shape)
    return best


@triton.jit
def keys_of(distance, row, ranks, inside, LARGEST: tl.constexpr):
    """What sorts rows by distance and rank; those whose distance is not finite come last."""
    distance += 0.0  # -0 is no less than 0
    bits = (-distance if LARGEST else distance).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    inside &= finite(distance)
    rank = row if ranks is None else tl.load(ranks + row, mask=inside, other=0)
    return tl.where(inside, order << 32 | rank, EMPTY)


@triton.jit
def load_code(at, stride, bit, inside, BITS: tl.constexpr):
    """The number that begins at a bit of rows of bytes, from its byte and those that it reaches into."""
    at += bit // 8 * stride
    shift = (bit % 8).to(tl.int32)
    code = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        code |= tl.load(at + stride, mask=inside & (shift + BITS > 8), other=0).to(tl.int32) << 8
        code |= tl.load(at + 2 * stride, mask=inside & (shift + BITS > 16), other=0).to(tl.int32) << 16
    return (code >> shift) & ((1 << BITS) - 1)


@triton.jit
def code_at(codes, strides, row, m, M, inside, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Number m of rows, packed or in blocks of 32 rows."""
    if BLOCKS:
        byte = (row // 32 * M + m) * (4 * BITS) + row % (4 * BITS)
        code = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 4:
            code = (code >> (row % 32 // 16 * 4).to(tl.int32)) & 15
    else:
        bit = tl.full(row.shape, m * BITS, tl.int32)
        code = load_code(codes + row * strides[0], strides[1], bit, inside, BITS)
    return code


@triton.jit(do_not_specialize=["n", "P", "k", "slices"])
def scan_kernel(tables, codes, codes_strides, ranges, ranges_strides, bias, bias_strides, row_bias, ranks, keep, out, n,
                P, M, k, slices, BITS: tl.constexpr, BLOCKS: tl.constexpr, LARGEST: tl.constexpr, ONE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """The k best rows for a query, first of BLOCK, among every `slices`-th chunk of its ranges."""
    q, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables += q * M << BITS
    best = tl.full((BLOCK,), EMPTY, tl.int64)
    for p in range(P):
        first, last = span(ranges, ranges_strides, q, p, n)
        added = 0.0
        if bias is not None:
            added = tl.load(bias + q * bias_strides[0] + p * bias_strides[1])
        chunks = ((tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK).to(tl.int32)
        for chunk in range((part + p) % slices, chunks, slices):
            row = first + tl.cast(chunk, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = kept(keep, row, row < last)
            total = tl.zeros((BLOCK,), tl.float32)
            for m in range(M):
                code = code_at(codes, codes_strides, row, m, M, inside, BITS, BLOCKS)
                total += tl.load(tables + (m << BITS) + code)
            if row_bias is not None:
                total += tl.load(row_bias + row, mask=inside, other=0.0)
            if bias is not None:
                total += added
            best = add_best(best, keys_of(total, row, ranks, inside, LARGEST), k, ONE)
    tl.store(out + (q * slices + part) * BLOCK + tl.arange(0, BLOCK), best)


@triton.jit(do_not_specialize=["Q", "n"])
def bounds_kernel(queries, base, squares, keep, out, Q, n, D, groups, L2: tl.constexpr, LARGEST: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """The least of every group of rows of |b|² - 2 q b, or of q b, or of their opposites; -inf where one is no number.
    Both operands are contiguous bfloat16."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    tiles = tl.cdiv(n, BLOCK_N)
    q = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at = queries + (tl.minimum(q, Q - 1).to(tl.int64) * D)[:, None]
    base_at = base + (tl.minimum(row, n - 1) * D)[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left = tl.load(q_at + k[None, :], mask=(k < D)[None, :], other=0.0)
        right = tl.load(base_at + k[:, None], mask=(k < D)[:, None], other=0.0)
        value = shared.product(left, right, value)
    if L2:
        value = tl.load(squares + row, mask=row < n, other=0.0)[None, :] - 2.0 * value
    if LARGEST:
        value = -value
    value = tl.where(finite(value), value, -float("inf"))
    value = tl.where(kept(keep, row, row < n)[None, :], value, float("inf"))
    least = tl.min(tl.reshape(value, (BLOCK_M, GROUPS, GROUP)), 2)
    group = (tl.program_id(0) % tiles).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = out + q.to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(at, least, mask=(q < Q)[:, None] & (group < groups)[None, :])


@triton.jit
def exact_distance(query, base, base_stride, row, inside, scale, offset, D, L2: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ (q - b)² or Σ q b in float64, rounded once."""
    total = tl.zeros((row.shape[0],), tl.float64)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        q = tl.load(query + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
        at = base + row[:, None] * base_stride + k[None, :]
        b = tl.load(at, mask=inside[:, None] & (k < D)[None, :], other=0.0).to(tl.float64)
        if scale is not None:
            b *= tl.load(scale + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
            b += tl.load(offset + k, mask=k < D, other=0.0).to(tl.float64)[None, :]
        if L2:
            b = (q - b) * (q - b)
        else:
            b *= q
        total += tl.sum(b, 1)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["n", "P", "k", "slices"])
def exact_kernel(queries, base, base_stride, scale, offset, ranges, ranges_strides, ranks, keep, bounds, limits, out, n,
                 P, D, k, groups, slices, L2: tl.constexpr, LARGEST: tl.constexpr, ONE: tl.constexpr,
                 GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The k best rows for a query, first of BLOCK, among every `slices`-th chunk of its ranges; where groups of rows
    have bounds, those count alone whose bound is not above the query's limit."""
    q, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = queries + q * D
    best = tl.full((BLOCK,), EMPTY, tl.int64)
    for p in range(P):
        first, last = span(ranges, ranges_strides, q, p, n)
        chunks = ((tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK).to(tl.int32)
        for chunk in range((part + p) % slices, chunks, slices):
            row = first + tl.cast(chunk, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = kept(keep, row, row < last)
            if bounds is not None:
                bound = tl.load(bounds + q * groups + row // GROUP, mask=inside, other=float("inf"))
                inside &= bound <= tl.load(limits + q)
            if tl.max(inside.to(tl.int32)) > 0:
                distance = exact_distance(query, base, base_stride, row, inside, scale, offset, D, L2, BLOCK_K)
                best = add_best(best, keys_of(distance, row, ranks, inside, LARGEST), k, ONE)
    tl.store(out + (q * slices + part) * BLOCK + tl.arange(0, BLOCK), best)


@triton.jit
def book_distance(x, x_strides, books, row, level, n, d, TYPE: tl.constexpr):
    """(rows, levels) squared distances in TYPE."""
    total = tl.zeros((row.shape[0], level.shape[0]), TYPE)
    for j in range(d):
        a = tl.load(x + row * x_strides[0] + j * x_strides[1], mask=row < n, other=0.0).to(TYPE)
        difference = a[:, None] - tl.load(books + level * d + j).to(TYPE)[None, :]
        total += difference * difference
    return total


@triton.jit(do_not_specialize=["n"])
def encode_kernel(x, x_strides, books, out, n, M, d, L: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr):
    """The nearest of L centroids of a sub-vector: float32 tells which can be it, and float64 which it is."""
    m = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x += m * d * x_strides[1]
    books += m * L * d
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for first in range(0, L, BLOCK_L):
        distance = book_distance(x, x_strides, books, row, first + tl.arange(0, BLOCK_L), n, d, tl.float32)
        least = tl.minimum(least, tl.min(tl.where(finite(distance), distance, float("inf")), 1))
    error = (d + 16) * 2.0**-22
    limit = least * (1.0 + error) + (d + 16) * TINY
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    code = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, L, BLOCK_L):
        level = first + tl.arange(0, BLOCK_L)
        near = book_distance(x, x_strides, books, row, level, n, d, tl.float32) * (1.0 - error) > limit[:, None]
        near = ~near & (row < n)[:, None]
        if tl.max(near.to(tl.int32)) > 0:
            exact = book_distance(x, x_strides, books, row, level, n, d, tl.float64).to(tl.float32)
            exact = tl.where(near & finite(exact), exact, float("inf"))
            nearest = tl.min(exact, 1)
            at = tl.min(tl.where(exact == nearest[:, None], level[None, :], L), 1)
            code = tl.where(nearest < best, at, code)
            best = tl.minimum(best, nearest)
    tl.store(out + row * M + m, code, mask=row < n)


@triton.jit(do_not_specialize=["count"])
def pack_kernel(indices, out, count, M, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The bytes of rows of M numbers: each from the three numbers that may reach into it."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = byte // row_bytes
    bit = (byte % row_bytes).to(tl.int32) * 8
    value = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(3):
        m = bit // BITS + part
        number = tl.load(indices + row * M + m, mask=(byte < count) & (m < M), other=0)
        shift = m * BITS - bit
        value |= tl.where(shift < 0, number >> tl.maximum(-shift, 0), number << tl.minimum(tl.maximum(shift, 0), 8))
    tl.store(out + byte, value.to(tl.uint8), mask=byte < count)


@triton.jit(do_not_specialize=["count"])
def decode_kernel(codes, codes_strides, books, out, count, M, D, d, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // D
    column = at % D
    m = column // d
    code = load_code(codes + row * codes_strides[0], codes_strides[1], m * BITS, inside, BITS)
    value = tl.load(books + ((m << BITS) + code) * d + column % d, mask=inside)
    tl.store(out + at, value, mask=inside)


@triton.jit(do_not_specialize=["Q"])
def tables_kernel(queries, query_strides, books, book_strides, out, Q, M, L, d, L2: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_L: tl.constexpr):  # fmt: skip
    """A tile of the table of one sub-vector: BLOCK queries, BLOCK_L centroids."""
    m = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_L)
    q = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    level = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (q < Q)[:, None] & (level < L)[None, :]
    total = tl.zeros((BLOCK, BLOCK_L), tl.float32)
    for j in range(d):
        a = tl.load(queries + q * query_strides[0] + (m * d + j) * query_strides[1], mask=q < Q, other=0.0)
        at = books + m * book_strides[0] + level.to(tl.int64) * book_strides[1] + j * book_strides[2]
        b = tl.load(at, mask=level < L, other=0.0)
        if L2:
            difference = a[:, None] - b[None, :]
            total += difference * difference
        else:
            total += a[:, None] * b[None, :]
    tl.store(out + (q[:, None] * M + m) * L + level[None, :], total, mask=inside)


# Launchers.


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _slices(queries: int, rows: int, chunk: int) -> int:
    """Programs of a query: so many that a GPU is busy."""
    return max(1, min(triton.cdiv(1024, max(queries, 1)), triton.cdiv(rows, 4 * chunk)))


class _Search:
    """What the kernels of both searches take, and results from what they write."""

    def __init__(self, beside: Tensor, n: int, ranges: Any, ids: Any, keep: Any, k: int, largest: bool, block: int):
        self.n, self.k, self.largest, self.ids = n, k, largest, _contiguous(ids)
        self.order = None if ids is None else ids.argsort(stable=True)  # row of each rank
        ranks = None if self.order is None else torch.empty_like(self.order)
        if ranks is not None:
            ranks[self.order] = torch.arange(n, device=ids.device)
        block = max(block, triton.next_power_of_2(k))
        slices = _slices(beside.shape[0], n, block)
        self.out = torch.empty((beside.shape[0], slices, block), dtype=torch.int64, device=beside.device)
        self.arguments = {
            "n": n, "P": 1 if ranges is None else ranges.shape[1], "ranges": ranges, "ranks": ranks,
            "ranges_strides": None if ranges is None else ranges.stride(), "keep": _contiguous(keep),
            "k": k, "slices": slices, "LARGEST": largest, "ONE": k == 1, "BLOCK": block,
            "out": self.out,
        }  # fmt: skip

    def results(self) -> tuple[Tensor, Tensor]:
        keys = self.out[..., : self.k].flatten(1)
        keys = (keys.sort(1).values if self.out.shape[1] > 1 else keys)[:, : self.k]
        missing, rank = keys == EMPTY.value, keys & 0xFFFFFFFF
        bits = (keys >> 32).to(torch.int32)
        distances = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        distances = (-distances if self.largest else distances).masked_fill(
            missing, -torch.inf if self.largest else torch.inf
        )
        found = rank.masked_fill(missing, 0)
        if self.order is not None and self.ids is not None and self.n:
            found = self.ids[self.order[found]]
        return distances, found.masked_fill(missing, -1)


def pq_distance_tables(queries: Tensor, codebooks: Tensor, metric: int) -> Tensor:
    M, L, d = codebooks.shape
    out = queries.new_empty(queries.shape[0], M, L)
    arguments = {
        "queries": queries, "query_strides": queries.stride(), "books": codebooks, "book_strides": codebooks.stride(),
        "out": out, "Q": queries.shape[0], "M": M, "L": L, "d": d, "L2": metric == 0, "BLOCK": 16, "BLOCK_L": 64,
    }  # fmt: skip
    if out.numel():
        grid = (triton.cdiv(queries.shape[0], 16) * triton.cdiv(L, 64), M)
        shared.launch(tables_kernel, grid, arguments, queries)
    return out


def _bits(levels: int) -> int:
    return levels.bit_length() - 1


def pq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    M, L, d = codebooks.shape
    n, bits, block = x.shape[0], _bits(L), 32
    row_bytes = triton.cdiv(M * bits, 8)
    indices = torch.empty((n, M), dtype=torch.int32, device=x.device)
    codes = torch.empty((n, row_bytes), dtype=torch.uint8, device=x.device)
    if n:
        arguments = {
            "x": x, "x_strides": x.stride(), "books": codebooks.contiguous(), "out": indices, "n": n, "M": M, "d": d,
            "L": L, "BLOCK": block, "BLOCK_L": min(L, 128),
        }  # fmt: skip
        shared.launch(encode_kernel, (triton.cdiv(n, block), M), arguments, x)
        arguments = {
            "indices": indices, "out": codes, "count": codes.numel(), "M": M, "row_bytes": row_bytes, "BITS": bits,
            "BLOCK": 256,
        }  # fmt: skip
        shared.launch(pack_kernel, (triton.cdiv(codes.numel(), 256),), arguments, x)
    return codes


def pq_decode(codebooks: Tensor, codes: Tensor) -> Tensor:
    M, L, d = codebooks.shape
    out = codebooks.new_empty(codes.shape[0], M * d)
    if out.numel():
        arguments = {
            "codes": codes, "codes_strides": codes.stride(), "books": codebooks.contiguous(), "out": out,
            "count": out.numel(), "M": M, "D": M * d, "d": d, "BITS": _bits(L), "BLOCK": 256,
        }  # fmt: skip
        shared.launch(decode_kernel, (triton.cdiv(out.numel(), 256),), arguments, codebooks)
    return out


def pq_scan(
    tables: Tensor, codes: Tensor, ranges: Tensor | None, bias: Tensor | None, row_bias: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, n: int, k: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    search = _Search(tables, n, ranges, ids, keep, k, largest, 256)
    codes = codes.contiguous() if codes.dim() == 3 else codes
    if tables.shape[0]:
        arguments = search.arguments | {
            "tables": tables.contiguous(), "codes": codes, "codes_strides": codes.stride(), "bias": bias,
            "bias_strides": None if bias is None else bias.stride(), "row_bias": _contiguous(row_bias),
            "M": tables.shape[1], "BITS": _bits(tables.shape[2]), "BLOCKS": codes.dim() == 3,
        }  # fmt: skip
        shared.launch(scan_kernel, (tables.shape[0], search.arguments["slices"]), arguments, tables)
    return search.results()


class _Rows:
    """A base around its middle, in bfloat16, and by how much a comparison with it may err."""

    def __init__(self, base: Tensor, scale: Tensor | None, offset: Tensor | None, metric: int):
        self.metric = metric
        sample = _values(base[:: max(1, base.shape[0] // 1024)], scale, offset)
        self.middle = sample.mean(0).nan_to_num(0.0, 0.0, 0.0)
        rows = _values(base, scale, offset) - self.middle
        self.squares = rows.square().sum(1)
        self.rows = rows.to(torch.bfloat16)
        lengths = torch.nn.functional.pad(self.squares.sqrt(), (0, -base.shape[0] % GROUP)).view(-1, GROUP)
        self.lengths = lengths.nan_to_num(torch.inf).amax(1)
        rough = self.middle if metric == 1 else self.middle * 0.0
        if scale is not None and offset is not None:
            rough = torch.maximum(rough.abs(), 128 * scale.abs() + (offset - self.middle).abs())
        self.least = rough.norm()  # the rounding of a row is relative to no less than this

    def errors(self, queries: Tensor) -> Tensor:
        """(Q, groups): what a bound may lack."""
        length = queries.norm(dim=1, keepdim=True)
        times = 2 if self.metric == 0 else 1
        rounding = times * (2.0**-8 + 2.0**-15) * length * self.lengths
        sums = (queries.shape[1] + 16) * 2.0**-20
        return rounding + sums * (length.square() + self.lengths.clamp_min(self.least).square()) + TINY.value


def _values(base: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    return base.float() if scale is None or offset is None else torch.addcmul(offset, base.float(), scale)


def _bounds(queries: Tensor, rows: _Rows, keep: Tensor | None, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """(Q, groups) below every distance of a group, up to a term of the query; (Q) what the k best are not above."""
    moved = queries - rows.middle if rows.metric == 0 else queries
    n, D = rows.rows.shape
    out = queries.new_empty(queries.shape[0], rows.lengths.shape[0])
    arguments = {
        "queries": moved.to(torch.bfloat16).contiguous(), "base": rows.rows, "squares": rows.squares, "keep": keep,
        "out": out, "Q": queries.shape[0], "n": n, "D": D, "groups": out.shape[1], "L2": rows.metric == 0,
        "LARGEST": largest, "GROUP": GROUP, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32,
    }  # fmt: skip
    grid = (triton.cdiv(queries.shape[0], 64) * triton.cdiv(n, 128),)
    shared.launch(bounds_kernel, grid, arguments, queries)
    errors = rows.errors(moved)
    above = (out + errors).nan_to_num(torch.inf, torch.inf, torch.inf)  # a group with a NaN row promises nothing
    limits = above.topk(k, 1, largest=False).values[:, -1].contiguous()
    return (out - errors).nan_to_num(-torch.inf, torch.inf, -torch.inf), limits


def topk_distances(
    queries: Tensor, base: Tensor, ranges: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, k: int, metric: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, D = base.shape
    queries, keep = queries.contiguous(), _contiguous(keep)
    base = base if base.stride(1) == 1 or D < 2 else base.contiguous()
    rows = _Rows(base, scale, offset, metric) if ranges is None and n > GROUP * k else None
    chunk = max(1, BOUNDS // triton.cdiv(n, GROUP)) if rows else max(queries.shape[0], 1)
    distances, found = [], []
    for first in range(0, max(queries.shape[0], 1), chunk):
        part = queries[first : first + chunk]
        search = _Search(part, n, ranges, ids, keep, k, largest, 64)
        if part.shape[0]:
            bounds, limits = _bounds(part, rows, keep, k, largest) if rows else (None, None)
            arguments = search.arguments | {
                "queries": part, "base": base, "base_stride": base.stride(0), "scale": _contiguous(scale),
                "offset": _contiguous(offset), "bounds": bounds, "limits": limits, "D": D,
                "groups": triton.cdiv(n, GROUP), "L2": metric == 0, "GROUP": GROUP,
                "BLOCK_K": 2048 // search.arguments["BLOCK"],
            }  # fmt: skip
            shared.launch(exact_kernel, (part.shape[0], search.arguments["slices"]), arguments, queries)
        results = search.results()
        distances.append(results[0])
        found.append(results[1])
    return torch.cat(distances), torch.cat(found)


def _refused_search(queries: Tensor, rows: int, k: int) -> str | None:
    if k > MOST:
        return f"k = {k}: up to {MOST}"
    return f"{rows} rows: fewer than 2**31" if rows >= 1 << 31 else shared.refusal(queries)


def _refused_float64(x: Tensor) -> str | None:
    return "dtype float64: float32" if x.dtype == torch.float64 else shared.refusal(x)


REFUSES = {
    "pq_distance_tables": lambda queries, *rest: _refused_float64(queries),
    "pq_encode": lambda x, *rest: _refused_float64(x),
    "pq_decode": lambda codebooks, *rest: _refused_float64(codebooks),
    "pq_scan": lambda tables, *rest: _refused_search(tables, rest[-3], rest[-2]),
    "topk_distances": lambda queries, base, *rest: _refused_search(queries, base.shape[0], rest[-3]),
}
