"""Product quantisation (Jégou et al. 2011) and brute-force search: codes, distance tables, scans, k-means.

`csrc/pq.h` states the semantics that every backend shares, reference.py says them in plain torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail, require_choice, require_dense
from metate.op import Op
from metate.ops.pq.codes import interleave, pack_codes, unpack_codes
from metate.ops.pq.declaration import decode_op, encode_op, ivf_op, scan_op, tables_op, topk_op
from metate.ops.pq.kmeans import kmeans
from metate.scalars import is_whole, plain
from metate.shortcut import Shortcut

__all__ = [
    "ivf_search", "kmeans", "pack_codes", "pq_decode", "pq_distance_tables", "pq_encode", "pq_interleave", "pq_scan",
    "topk_distances", "unpack_codes",
]  # fmt: skip
METRICS = {"l2": 0, "inner_product": 1, "cosine": 2, "l1": 3, "linf": 4}
OF_CODES = ("l2", "inner_product", "cosine")  # sums of what sub-vectors have
_COSINE = METRICS["cosine"]  # which bindings know, and operators do not
_cosines = {op: Shortcut(op.name) for op in (tables_op, topk_op, ivf_op)}


def pq_distance_tables(
    queries: Tensor,
    codebooks: Tensor,
    *,
    metric: str = "l2",
    symmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How far every sub-vector of every query is from each of its centroids.

    Args:
        queries: (Q, D), float32 (float64 on a CPU), any strides.
        codebooks: (M, L, D/M) of the same dtype: M sub-vectors, L = 2 to 65536 centroids each, a power of two.
        metric: "l2" (squared Euclidean distance), "inner_product", or "cosine" (inner product of the normalised query).
        symmetric: replace every query by the centroids nearest to it first (Jégou et al. 2011, SDC).
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (Q, M, L): entries that add up, over the codes of a row, to its distance. Gradients reach queries and codebooks
        (but not the queries of symmetric tables). Source: Jégou, Douze, Schmid 2011.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    number = _metric("pq_distance_tables", metric, OF_CODES)
    if symmetric:
        queries = _normalised(queries) if number == _COSINE else queries
        codes = pq_encode(queries, codebooks, backend=backend)
        queries, number = pq_decode(codes, codebooks, backend=backend), min(number, 1)
    tables: Tensor = _call(tables_op, (queries, codebooks, number), number, backend)
    return tables


def pq_encode(x: Tensor, codebooks: Tensor, *, backend: str | None = None) -> Tensor:
    """The numbers of the nearest centroids of every vector, packed.

    Args:
        x: (n, D) float32, any strides.
        codebooks: (M, L, D/M) float32; a code has log2(L) bits.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (n, ⌈M·bits/8⌉) uint8 in the bit order of faiss, least significant first: `unpack_codes(codes, M, bits)` are the
        numbers. Each is that of the centroid at the least squared distance, computed exactly and rounded to float32,
        among equals the lowest; 0 where no distance is finite. No gradient: see `metate.nn.ProductQuantizer`.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    codes: Tensor = encode_op.call((x, codebooks), backend=backend)
    return codes


def pq_decode(codes: Tensor, codebooks: Tensor, *, backend: str | None = None) -> Tensor:
    """The centroids that codes stand for, side by side.

    Args:
        codes: (n, ⌈M·bits/8⌉) uint8, as from `pq_encode`.
        codebooks: (M, L, D/M), float32 (float64 on a CPU), L = 2**bits.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        (n, D), dtype of codebooks. Gradients reach the codebooks.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    x: Tensor = decode_op.call((codebooks, codes), backend=backend)
    return x


def pq_interleave(codes: Tensor, M: int, bits: int) -> Tensor:
    """Codes in the layout that `pq_scan` reads fastest (André et al. 2015, PQ Fast Scan).

    Args:
        codes: (n, ⌈M·bits/8⌉) uint8, as from `pq_encode`.
        M: sub-codes of a row.
        bits: of a sub-code, 4 or 8.

    Returns:
        (⌈n/32⌉, M, 4·bits) uint8. A block holds 32 rows, sub-code after sub-code. Of 8 bits, byte j is that of row j;
        of 4, byte j holds row j in its low half and row j + 16 in its high half. Rows that fill the last block are 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    op = "pq_interleave"
    require_dense(op, "codes", codes)
    if codes.dtype != torch.uint8:
        raise fail(op, "codes", codes.dtype, "a uint8 tensor", error=TypeError)
    M, bits = plain(M), plain(bits)
    if not is_whole(M, 1):
        raise fail(op, "M", repr(M)[:60], "an integer, 1 or more")
    if not is_whole(bits) or bits not in (4, 8):
        raise fail(op, "bits", repr(bits)[:60], "4 or 8")
    if codes.dim() != 2 or codes.shape[1] != (M * bits + 7) // 8:
        raise fail(
            op, "codes", f"of shape {tuple(codes.shape)}", f"(n, {(M * bits + 7) // 8}): {M} codes of {bits} bits"
        )
    return interleave(codes, M, bits)


def pq_scan(
    tables: Tensor,
    codes: Tensor,
    k: int,
    *,
    n: int | None = None,
    ranges: Tensor | None = None,
    bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    ids: Tensor | None = None,
    keep: Tensor | None = None,
    largest: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of codes for every query, without ever writing all distances.

    The distance of row i is (Σ_m tables[q, m, code_m(i)] + row_bias[i]) + bias[q, p], summed from left to right in
    float32: the result is the same, bit for bit, on every backend, in either layout, for any batch and order of ranges.

    Args:
        tables: (Q, M, L) float32, as from `pq_distance_tables`.
        codes: (n, ⌈M·bits/8⌉) uint8, packed, or (⌈n/32⌉, M, 4·bits) uint8, interleaved by `pq_interleave`.
        k: how many, at least 1; more than there are rows is fine.
        n: the number of rows of interleaved codes.
        ranges: (Q, P, 2) int64: query q scans rows first <= i < last of its P ranges, which do not overlap, may be
            empty and are cut to the rows that exist; None scans all.
        bias: (Q, P) float32, added to the rows of a range; (Q, 1) without ranges.
        row_bias: (n) float32, added to a row for every query.
        ids: (n) int64, what rows are called in the result; None calls them by their number.
        keep: (⌈n/8⌉) uint8: bit i % 8 of byte i // 8 says whether row i may be found; None keeps all.
        largest: find the largest instead of the smallest.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        distances (Q, k) float32 and ids (Q, k) int64, best first, among equal distances the lower id first. Rows whose
        distance is infinite or NaN are not found; where fewer than k are, the id is -1 and the distance inf (-inf). No
        gradient. Source: Jégou, Douze, Schmid 2011.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    if n is None and isinstance(codes, Tensor):
        if codes.dim() == 3:
            raise fail("pq_scan", "n", None, "the number of rows beside interleaved codes")
        n = codes.shape[0] if codes.dim() else 0
    distances, found = scan_op.call((tables, codes, ranges, bias, row_bias, ids, keep, n, k, largest), backend=backend)
    return distances, found


def topk_distances(
    queries: Tensor,
    base: Tensor,
    k: int,
    *,
    metric: str = "l2",
    largest: bool | None = None,
    ranges: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    ids: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of every query, exactly, without ever writing all distances.

    Distances are the exact ones rounded once to float32, near 0 too: products only find the candidates, which are then
    ranked by their differences in float64.

    Args:
        queries: (Q, D) float32, any strides.
        base: (n, D), float32, bfloat16, float16, or int8 that stands for scale * base + offset.
        k: how many, at least 1; more than there are rows is fine. k = 1 is the assignment of k-means.
        metric: "l2" (squared Euclidean distance), "inner_product", "cosine" (inner product of the normalised query;
            normalise base yourself), "l1" (sum of the differences), or "linf" (the largest of them).
        largest: find the largest instead of the smallest; None: what is nearest by the metric.
        ranges, ids, keep: as in `pq_scan`.
        scale, offset: (D) float32, of an int8 base.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        distances (Q, k) float32 and ids (Q, k) int64 as from `pq_scan`. No gradient.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    number = _metric("topk_distances", metric)
    biggest = number in (1, _COSINE) if largest is None else largest
    args = queries, base, ranges, scale, offset, ids, keep, k, number, biggest
    distances, found = _call(topk_op, args, number, backend)
    return distances, found


def ivf_search(
    queries: Tensor,
    centroids: Tensor,
    extents: Tensor,
    rows: Tensor,
    k: int,
    *,
    nprobe: int = 1,
    metric: str = "l2",
    codebooks: Tensor | None = None,
    n: int | None = None,
    residual: bool = False,
    row_bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    ids: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows for every query among those of the `nprobe` lists whose centroids are nearest to it.

    It is `topk_distances` of the centroids, and of the rows of those lists, or `pq_scan` of their codes by
    `pq_distance_tables` of the query, bit for bit.

    Args:
        queries: (Q, D) float32, any strides.
        centroids: (lists, D) float32.
        extents: (lists, 2) int64: list i has the rows first <= row < last that exist. Lists do not overlap.
        rows: vectors (n, D) as the base of `topk_distances`, or codes as in `pq_scan`.
        k: how many, at least 1; more than there are rows is fine.
        nprobe: 1 to the number of lists.
        metric: "l2", "inner_product", "cosine" (inner product of the normalised query), or, of vectors, "l1" or "linf".
        codebooks: (M, L, D/M) float32 of codes; None: rows are vectors.
        n: the number of rows of interleaved codes.
        residual: codes stand for vectors less the centroid of their list.
        row_bias: (n) float32, beside residual codes and metric "l2": |r|² + 2 c·r of a row that stands for c + r.
        scale, offset: (D) float32, of int8 vectors.
        ids, keep: as in `pq_scan`.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that accepts the call.

    Returns:
        distances (Q, k) float32 and ids (Q, k) int64 as from `pq_scan`. No gradient. Source: Jégou, Douze, Schmid 2011.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what came and what was expected.
    """
    number = _metric("ivf_search", metric, METRICS if codebooks is None else OF_CODES)
    if n is None and isinstance(rows, Tensor):
        if rows.dim() == 3:
            raise fail("ivf_search", "n", None, "the number of rows beside interleaved codes")
        n = rows.shape[0] if rows.dim() else 0
    args = (
        queries, centroids, extents, rows, codebooks, row_bias, scale, offset, ids, keep, n, nprobe, k, number, residual
    )  # fmt: skip
    distances, found = _call(ivf_op, args, number, backend)
    return distances, found


def _call(op: Op, args: tuple[Any, ...], metric: int, backend: str | None) -> Any:
    if metric != _COSINE:
        return op.call(args, backend=backend)
    return _cosines[op](args, _by_product, (op, args, backend), backend)


def _by_product(op: Op, args: tuple[Any, ...], backend: str | None) -> Any:
    """A cosine is the product of a query of length 1."""
    at = op.parameters.index("metric")
    product = (_normalised(args[0]), *args[1:at], METRICS["inner_product"], *args[at + 1 :])
    return op.call(product, backend=backend)


def _normalised(queries: Tensor) -> Tensor:
    """Rows over their lengths, which are at least 1e-12; in double precision, rounded once."""
    if not isinstance(queries, Tensor) or not queries.is_floating_point() or not queries.dim() or queries.is_nested:
        return queries  # the operator says what is wrong
    wide = queries.double()
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / lengths.clamp_min(1e-12)).to(queries.dtype)


def _metric(op: str, metric: Any, known: Collection[str] = METRICS) -> int:
    require_choice(op, "metric", metric, known)
    return METRICS[metric]
