"""Product quantisation and brute-force search in plain torch: values, and, run in float64, the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metate.ops.pq.codes import bits_of, pack_codes, separate, unpack_codes

_AT_ONCE = 1 << 23  # numbers of a temporary


def pq_distance_tables(queries: Tensor, codebooks: Tensor, metric: int) -> Tensor:
    """Squared distances (metric 0) or inner products (1) of the sub-vectors of queries and their centroids."""
    M, _, width = codebooks.shape
    parts = queries.view(-1, M, width) if queries.is_contiguous() else queries.reshape(queries.shape[0], M, width)
    if metric == 1:
        return torch.einsum("qmd,mld->qml", parts, codebooks)
    return (parts[:, :, None] - codebooks).square().sum(3)


def pq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """The packed numbers of the nearest centroids: those that `topk_distances` finds with k = 1."""
    _, levels, width = codebooks.shape
    nearest = [
        topk_distances(part, book, None, None, None, None, None, 1, 0, False)[1].clamp_min_(0)
        for part, book in zip(x.split(width, 1), codebooks, strict=True)
    ]
    return pack_codes(torch.cat(nearest, 1), bits_of("pq_encode", "codebooks", levels))


def pq_decode(codebooks: Tensor, codes: Tensor) -> Tensor:
    """The centroids that codes stand for, side by side."""
    M, levels, _ = codebooks.shape
    indices = unpack_codes(codes, M, bits_of("pq_decode", "codebooks", levels))
    return torch.cat([book[indices[:, m]] for m, book in enumerate(codebooks)], 1)


def pq_scan(
    tables: Tensor, codes: Tensor, ranges: Tensor | None, bias: Tensor | None, row_bias: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, n: int, k: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best rows of every query: sums of table entries, in float32 and in this order whatever the dtype."""
    M, levels = tables.shape[1:]
    bits = bits_of("pq_scan", "tables", levels)
    codes = pack_codes(separate(codes, n), bits) if codes.dim() == 3 else codes
    found, last = [], None
    for q, table in enumerate(tables.float()):
        if ranges is not None or last is None:
            last = _rows(None if ranges is None else ranges[q], keep, n, tables.device)
            columns = unpack_codes(codes[last[0]], M, bits).T.contiguous()
        rows, place = last
        total = torch.zeros(rows.shape[0], dtype=torch.float32, device=tables.device)
        for entries, column in zip(table, columns, strict=True):
            total += entries[column]
        if row_bias is not None:
            total += row_bias.float()[rows]
        if bias is not None:
            total += bias[q].float()[place]
        found.append(_best(total[None], (rows if ids is None else ids[rows])[None], k, largest))
    return _stack(found, k, tables.device)


def topk_distances(
    queries: Tensor, base: Tensor, ranges: Tensor | None, scale: Tensor | None, offset: Tensor | None,
    ids: Tensor | None, keep: Tensor | None, k: int, metric: int, largest: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best rows of every query: distances in float64, rounded once to float32."""
    queries, base = queries.double(), base.double()
    if scale is not None and offset is not None:
        base = base * scale.double() + offset.double()
    n = base.shape[0]
    if ranges is None:
        rows, _ = _rows(None, keep, n, queries.device)
        base = base if keep is None else base[rows]
        chunk = max(1, _AT_ONCE // max(rows.shape[0] * (base.shape[1] if metric > 1 else 1), 1))
        found = [_nearest(part, base, rows, ids, k, metric, largest) for part in queries.split(chunk)]
    else:
        found = []
        for q, query in enumerate(queries):
            rows, _ = _rows(ranges[q], keep, n, queries.device)
            found.append(_rank(query[None], base[rows][None], rows[None], ids, k, metric, largest))
    return _stack(found, k, queries.device)


def ivf_search_of(floor: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """`ivf_search` by the operators of a floor: a module that has `topk_distances`, `pq_distance_tables`, `pq_scan`."""

    def ivf_search(
        queries: Tensor, centroids: Tensor, extents: Tensor, rows: Tensor, codebooks: Tensor | None,
        row_bias: Tensor | None, scale: Tensor | None, offset: Tensor | None, ids: Tensor | None, keep: Tensor | None,
        n: int, nprobe: int, k: int, metric: int, residual: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The k best rows of the lists of the nprobe nearest centroids."""
        largest = metric == 1
        near, lists = floor.topk_distances(queries, centroids, None, None, None, None, None, nprobe, metric, largest)
        ranges = torch.nn.functional.pad(extents, (0, 0, 0, 1))[lists]  # list -1 has no rows
        found: tuple[Tensor, Tensor]
        if codebooks is None:
            found = floor.topk_distances(queries, rows, ranges, scale, offset, ids, keep, k, metric, largest)
            return found
        asked = -2 * queries if residual and not largest else queries
        tables = floor.pq_distance_tables(asked, codebooks, int(residual or largest))
        found = floor.pq_scan(tables, rows, ranges, near if residual else None, row_bias, ids, keep, n, k, largest)
        return found

    return ivf_search


def _rows(ranges: Tensor | None, keep: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that a query compares with, and the number of the range that each is in."""
    spans = [(0, n)] if ranges is None else [(max(a, 0), max(a, 0, min(b, n))) for a, b in ranges.tolist()]
    rows = torch.cat(
        [torch.arange(first, last, device=device) for first, last in spans] or [torch.arange(0, device=device)]
    )
    lengths = torch.tensor([last - first for first, last in spans], dtype=torch.int64, device="cpu")
    place = torch.repeat_interleave(lengths).to(device)
    if keep is not None:
        kept = (keep[rows >> 3] >> (rows & 7).to(torch.uint8)) & 1 == 1
        rows, place = rows[kept], place[kept]
    return rows, place


def _nearest(
    queries: Tensor, base: Tensor, rows: Tensor, ids: Tensor | None, k: int, metric: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """Products find who may be among the best, with room for their rounding; then the best are ranked directly."""
    n, D = base.shape
    if n <= k or not queries.numel() or metric > 1:  # of which products tell nothing
        return _rank(queries, base.expand(queries.shape[0], n, D), rows.expand(queries.shape[0], n), ids, k, metric,
                     largest)  # fmt: skip
    key = queries @ base.T
    squares, size = queries.square().sum(1, keepdim=True), base.square().sum(1)
    key = squares + size - 2 * key if metric == 0 else key
    key = (-key if largest else key).masked_fill(~key.isfinite(), torch.inf)
    kth = key.topk(k, 1, largest=False).values[:, -1:]
    slack = 4 * (D + 8) * torch.finfo(torch.float64).eps * (squares + size.nan_to_num(0, 0, 0).max())
    slack = slack + 4 * torch.finfo(torch.float32).eps * kth.abs() + torch.finfo(torch.float32).tiny
    several = int((key <= kth + slack).sum(1).max())
    at = key.topk(several, 1, largest=False).indices
    parts = max(1, _AT_ONCE // (several * D))
    found = [
        _rank(q, base[a], rows[a], ids, k, metric, largest)
        for q, a in zip(queries.split(parts), at.split(parts), strict=True)
    ]
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _rank(
    queries: Tensor, candidates: Tensor, rows: Tensor, ids: Tensor | None, k: int, metric: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The k best of candidates (Q, C, D), each query its own."""
    queries = queries[:, None]
    if metric == 1:
        exact = (queries * candidates).sum(2)
    else:
        gap = queries - candidates
        exact = gap.square().sum(2) if metric == 0 else gap.abs().sum(2) if metric == 3 else _largest(gap.abs())
    return _best(exact.float(), rows if ids is None else ids[rows], k, largest)


def _largest(gaps: Tensor) -> Tensor:
    """Of (Q, C, D) along D; 0 of none."""
    return gaps.amax(2) if gaps.shape[2] else gaps.sum(2)


def _best(distances: Tensor, ids: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of (Q, C) that are finite, best first, among equals the lower id; then -1 at an infinite distance."""
    key = -distances if largest else distances
    key = key.masked_fill(~distances.isfinite(), torch.inf)
    if key.shape[1] > 4 * k:
        kth = key.topk(k, 1, largest=False).values[:, -1:]
        several = int((key <= kth).sum(1).max()) if key.shape[0] else k
        key, at = key.topk(several, 1, largest=False)
        ids = ids.gather(1, at)
    ids, order = ids.sort(stable=True, dim=1)
    key, order = key.gather(1, order).sort(stable=True, dim=1)
    ids = ids.gather(1, order)[:, :k].masked_fill(key[:, :k].isinf(), -1)
    short = (0, k - ids.shape[1])
    key = torch.nn.functional.pad(key[:, :k], short, value=torch.inf)
    return -key if largest else key, torch.nn.functional.pad(ids, short, value=-1)


def _stack(found: list[tuple[Tensor, Tensor]], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    empty = torch.empty(0, k, device=device), torch.empty(0, k, dtype=torch.int64, device=device)
    return torch.cat([empty[0], *(d for d, _ in found)]), torch.cat([empty[1], *(i for _, i in found)])
