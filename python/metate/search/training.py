"""Codebooks of product quantisation, and the rotation before it (OPQ: Ge, He, Ke, Sun 2013)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metate.ops.pq import pq_decode, pq_encode, topk_distances
from metate.ops.pq.kmeans import fit_codebooks, move_codebooks, sample_rows

LIST_ITERATIONS = 10  # of k-means for lists
CODEBOOK_ITERATIONS = 20  # more: smaller errors, but no better recall
_TOGETHER = 1 << 17  # sub-vectors whose means are taken at once: more, and they leave the cache
_FIRST = 8  # iterations of k-means before the first rotation is fitted
_CROWD = 256  # vectors that others are compared with
_LEAST = 0.1  # of the median of distances: what lies nearer than that counts as that


def train_codebooks(
    x: Tensor, M: int, bits: int, seed: int, iterations: int = CODEBOOK_ITERATIONS,
    tick: Callable[[], None] = lambda: None, most: int = 256, begin: Tensor | None = None, among: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(M, 2**bits, D/M): k-means of every sub-vector by itself.

    From points taken at random, as for lists: k-means++ spends centroids on outliers, which are nobody's neighbours; or
    from the 2**bits points of the rows `begin`. `among` (n, D), where the vectors lie: they count by closeness there.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    levels, width = 1 << bits, x.shape[1] // M
    if len(x) > most * levels:
        rows = sample_rows(len(x), most * levels, generator).to(x.device)
        x, among = x[rows], None if among is None else among[rows]
    weights = None if among is None else closeness(among, generator)
    books, together = [], max(1, _TOGETHER // max(len(x), 1))
    for m in range(0, M, together):
        part = x[:, m * width : (m + together) * width].contiguous()
        where = generator if begin is None else begin
        books.append(fit_codebooks(part, part.shape[1] // width, levels, iterations, where, weights))
        for _ in range(len(books[-1])):
            tick()
    return torch.cat(books)


def closeness(x: Tensor, generator: torch.Generator) -> Tensor:
    """(n), up to 1: the inverse of the squared distance of every vector from others, the second nearest of a sample.

    Neighbours are told apart where errors of codes are small beside the distances between them. With these weights
    k-means makes that share small everywhere; without, it gives most centroids to vectors that have no neighbours.
    """
    sample = x[sample_rows(len(x), _CROWD, generator).to(x.device)]
    gaps = topk_distances(x, sample, 2)[0][:, -1]
    gaps = gaps.where(gaps.isfinite(), 0)  # of a single vector
    middle = gaps.median()
    least = (_LEAST * (middle if middle > 0 else gaps.amax())).clamp_min(torch.finfo(gaps.dtype).tiny)
    return least / (gaps + least)


def train_rotation(
    x: Tensor, M: int, bits: int, seed: int, iterations: int, tick: Callable[[], None] = lambda: None
) -> Tensor:
    """An orthonormal (D, D) matrix R such that x Rᵀ loses little by product quantisation.

    It begins with the principal axes, dealt out so that every sub-vector has about the same product of variances, and
    goes on in turns: codebooks for the rotated vectors, then the rotation that leads nearest to what was decoded.
    """
    rotation = _principal_axes(x, M)
    books = train_codebooks(x @ rotation.T, M, bits, seed, _FIRST)
    for _ in range(iterations):
        rotated = x @ rotation.T
        codes = pq_encode(rotated, books)
        books = move_codebooks(rotated, codes, books)
        left, _, right = torch.linalg.svd((x.T @ pq_decode(codes, books)).double())
        rotation = (left @ right).T.to(x.dtype).contiguous()
        tick()
    return rotation


def _principal_axes(x: Tensor, M: int) -> Tensor:
    centred = (x - x.mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred / max(len(x), 1))
    values = values.clamp_min(max(1e-9 * float(values[-1]), torch.finfo(torch.float64).tiny))
    logs = (values / values[0]).log().tolist()  # none is negative, or the part with the least would be dealt more
    dealt: list[list[int]] = [[] for _ in range(M)]
    products = [0.0] * M
    for axis in reversed(range(len(logs))):  # the largest variance first
        m = min((m for m in range(M) if len(dealt[m]) < len(logs) // M), key=products.__getitem__)
        dealt[m].append(axis)
        products[m] += logs[axis]
    rotation: Tensor = axes.T[[axis for part in dealt for axis in part]].to(x.dtype).contiguous()
    return rotation
