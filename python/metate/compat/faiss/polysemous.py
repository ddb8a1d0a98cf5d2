"""Codes that tell near from far by the bits in which they differ (polysemous codes: Douze, Jégou, Perronnin 2016), and
searches of PQ indexes by codes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate.compat.faiss.distances import METRIC_L2
from metate.compat.faiss.parameters import Only
from metate.compat.faiss.quantizer import ProductQuantizer, as_array, like
from metate.compat.faiss.statistics import indexPQ_stats
from metate.ops.pq import pq_distance_tables, pq_encode, pq_scan, unpack_codes
from metate.search.arrays import empty_results

if TYPE_CHECKING:
    from metate.compat.faiss.indexes import IndexPQ

Doubles = npt.NDArray[np.float64]
SEARCH_TYPES = range(6)
ST_PQ, ST_HE, ST_GENERALIZED_HE, ST_SDC, ST_POLYSEMOUS, ST_POLYSEMOUS_GENERALIZE = SEARCH_TYPES


class PolysemousTraining:
    """An order of the centroids of each sub-vector in which numbers differ in more bits the further centroids are.

    faiss anneals; here the best swap of two numbers is made until none helps, from `n_redo` orders, the given one
    first.
    """

    OT_None, OT_ReproduceDistances_affine = 0, 1
    ntrain_permutation = Only(0)  # centroids are what is ordered by

    def __init__(self) -> None:
        self.n_iter, self.n_redo, self.seed, self.init_random = 500000, 2, 123, False
        self.optimization_type = self.OT_ReproduceDistances_affine
        self.dis_weight_factor, self.max_memory = math.log(2), 20 << 30

    def memory_usage_per_thread(self, pq: ProductQuantizer) -> int:
        """Bytes of what is known of all pairs of centroids."""
        return 8 * 8 * pq.ksub**2

    def optimize_pq_for_hamming(self, pq: ProductQuantizer, n: int = 0, x: Any = None) -> None:
        """Numbers the centroids anew; no vector may be encoded yet."""
        if self.optimization_type == self.OT_None:
            return
        if (needed := self.memory_usage_per_thread(pq)) >= self.max_memory:
            raise RuntimeError(f"PolysemousTraining: it takes {needed} bytes, expected less than max_memory")
        for book in pq._books:
            order = torch.from_numpy(self._order(as_array(book), pq.nbits))
            book[order] = book.clone()

    def _order(self, centroids: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.int64]:
        """The number of each centroid."""
        points = centroids.astype(np.float64)
        gaps = np.square(points[:, None] - points).sum(2)
        wanted = (gaps - gaps.mean()) / max(gaps.std(), np.finfo(np.float64).tiny) * math.sqrt(bits / 4) + bits / 2
        weights = np.exp(-self.dis_weight_factor * wanted)
        random = np.random.default_rng(self.seed)
        found = []
        for turn in range(max(1, self.n_redo)):
            order = np.arange(len(points))
            found.append(_improved(random.permutation(order) if turn or self.init_random else order,
                                   wanted, weights, self.n_iter))  # fmt: skip
        return min(found, key=lambda pair: pair[0])[1]


def bits_apart(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """In how many bits numbers below 2**16 differ."""
    differing = (a ^ b).astype("<u2")[..., None].view(np.uint8)
    found: npt.NDArray[np.int64] = np.unpackbits(differing, axis=-1).sum(-1, dtype=np.int64)
    return found


def _improved(
    order: npt.NDArray[np.int64], wanted: Doubles, weights: Doubles, most: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """Σ weights (wanted - bits)² of what up to `most` best swaps of two numbers lead to, and the order.

    That sum is a constant plus Σ A bits² + B bits; with P = A bits² + B bits, products of matrices, all swaps are
    judged at once (as quadratic assignments are: Taillard 1991), and P changes by little in one.
    """
    bits = bits_apart(order[:, None], order).astype(np.float64)
    factors = [(weights, bits * bits), (-2 * weights * wanted, bits)]
    products = np.zeros_like(bits)
    for A, H in factors:
        products += A @ H
    tolerance = 1e-9 * float(np.abs(weights * np.square(wanted)).sum())
    for _ in range(most):
        own = np.diagonal(products)
        change = products + products.T - own[:, None] - own
        for A, H in factors:
            diagonal = np.diagonal(A)
            change -= (diagonal[:, None] + diagonal - 2 * A) * H
        r, s = divmod(int(change.argmin()), len(order))
        if not change[r, s] < -tolerance:
            break
        pair, swapped = [r, s], [s, r]
        for A, H in factors:
            products += np.outer(A[:, r] - A[:, s], H[s] - H[r])
            H[pair] = H[swapped]
            H[:, pair] = H[:, swapped]
        products[:, pair] = np.add(*(A @ H[:, pair] for A, H in factors))
        order[pair] = order[swapped]
    return float((weights * np.square(wanted - bits_apart(order[:, None], order))).sum()), order


def search(index: IndexPQ, x: Any, k: int, how: int, most: int) -> tuple[Any, Any]:
    """The k nearest (distances, ids) by codes: ST_HE by the bits, ST_GENERALIZED_HE by the numbers that differ, ST_SDC
    by the distances of centroids; ST_POLYSEMOUS(_GENERALIZE) by vectors, among codes that differ by less than `most`.
    """
    if not ST_HE <= how <= ST_POLYSEMOUS_GENERALIZE:
        raise RuntimeError(f"IndexPQ: search_type is {how}, expected {ST_PQ} to {ST_POLYSEMOUS_GENERALIZE}")
    queries, books = torch.from_numpy(as_array(x)), index.pq._books
    cache = index._inner._state.cache
    if "packed" not in cache:
        cache["packed"] = torch.from_numpy(index.codes.reshape(-1, index.code_size))
    codes: Tensor = cache["packed"]
    indexPQ_stats.add(len(queries), len(queries) * len(codes))
    if how == ST_SDC:
        distances, ids = pq_scan(pq_distance_tables(queries, books, symmetric=True), codes, k)
    elif how in (ST_HE, ST_GENERALIZED_HE):
        own = _signs(index, queries) if index.encode_signs else pq_encode(queries, books)
        distances, ids = pq_scan(_differences(index.pq, own, how == ST_GENERALIZED_HE), codes, k)
    else:
        distances, ids = _polysemous(index, queries, codes, k, how == ST_POLYSEMOUS_GENERALIZE, most)
    return like(x, distances.numpy()), like(x, ids.numpy())


def _differences(pq: ProductQuantizer, codes: Tensor, generalized: bool) -> Tensor:
    """Tables (Q, M, ksub) of the bits in which each number differs from that of a query; of whether it differs."""
    own = unpack_codes(codes, pq.M, pq.nbits).numpy().astype(np.int64)[..., None]
    each = np.arange(pq.ksub)
    return torch.from_numpy((own != each if generalized else bits_apart(own, each)).astype(np.float32))


def _signs(index: IndexPQ, queries: Tensor) -> Tensor:
    """Queries as codes of the signs of their columns."""
    if index.d != index.pq.nbits * index.pq.M:
        raise RuntimeError(
            f"IndexPQ: encode_signs of {index.d} columns, expected {index.pq.nbits * index.pq.M}: a bit each"
        )
    return torch.from_numpy(np.packbits(queries.numpy() > 0, axis=1, bitorder="little"))


def _polysemous(
    index: IndexPQ, queries: Tensor, codes: Tensor, k: int, generalized: bool, most: int
) -> tuple[Tensor, Tensor]:
    pq = index.pq
    if pq.nbits != 8 or index.metric_type != METRIC_L2:
        raise RuntimeError(f"IndexPQ: polysemous search of {pq.nbits} bits, expected 8 bits and METRIC_L2")
    most = most or 8 * pq.M + 1
    own, rows, tables = pq_encode(queries, pq._books).numpy(), codes.numpy(), pq_distance_tables(queries, pq._books)
    weights = np.minimum(np.arange(256), 1) if generalized else bits_apart(np.arange(256), np.zeros(1, np.int64))
    distances, ids = empty_results(len(queries), k)
    for q in range(len(queries)):
        near = weights.astype(np.uint8)[rows ^ own[q]].sum(1, dtype=np.int64) < most
        indexPQ_stats.n_hamming_pass += int(near.sum())
        keep = torch.from_numpy(np.packbits(near, bitorder="little"))
        distances[q : q + 1], ids[q : q + 1] = pq_scan(tables[q : q + 1], codes, k, keep=keep)
    return distances, ids
