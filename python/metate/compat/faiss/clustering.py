"""k-means and brute force by faiss' names."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metate.compat.faiss.base import Index
from metate.compat.faiss.distances import METRIC_INNER_PRODUCT, METRIC_L2, metric_name
from metate.compat.faiss.indexes import IndexFlat, IndexFlatIP, IndexFlatL2
from metate.compat.faiss.parameters import ClusteringParameters, Floats, IterationStats, Vector
from metate.compat.faiss.quantizer import as_array, like
from metate.ops.pq import topk_distances


class Kmeans:
    """`Kmeans(d, k).train(x)`, then centroids, obj, iteration_stats, index, assign."""

    def __init__(self, d: int, k: int, **given: Any) -> None:
        given.pop("gpu", None)
        self.d, self.k, self.cp = int(d), int(k), ClusteringParameters(**given)
        self.centroids: Floats | None = None
        self.obj: Floats | None = None
        self.iteration_stats: list[dict[str, float]] | None = None
        self.index: Index | None = None

    def train(self, x: Any, weights: Any = None, init_centroids: Any = None) -> float:
        points = as_array(x)
        if points.ndim != 2 or points.shape[1] != self.d:
            raise AssertionError(f"Kmeans: x of shape {points.shape}, expected (n, {self.d})")
        counts, begin = (None if given is None else as_array(given) for given in (weights, init_centroids))
        self.centroids, stats = self.cp.run(points, self.k, self.cp.spherical, counts, begin)
        self.obj = np.array([one.obj for one in stats])
        self.iteration_stats = [asdict(one) for one in stats]
        self.index = IndexFlatIP(self.d) if self.cp.spherical else IndexFlatL2(self.d)
        self.index.add(self.centroids)
        return stats[-1].obj if stats else 0.0

    def assign(self, x: Any) -> tuple[Floats, npt.NDArray[np.int64]]:
        """(distances, numbers) of the nearest centroids."""
        if self.index is None:
            raise AssertionError("Kmeans: train before assigning")
        distances, ids = self.index.search(as_array(x), 1)
        return distances[:, 0], ids[:, 0]


class Clustering(ClusteringParameters):
    """`train(x, index)` leaves the centroids in the index; those set before are where it begins."""

    def __init__(self, d: int, k: int, cp: ClusteringParameters | None = None) -> None:
        super().__init__(**({} if cp is None else cp.__dict__))
        self.d, self.k = int(d), int(k)
        self.centroids: Floats = np.zeros(0, np.float32)
        self.iteration_stats: Vector[IterationStats] = Vector()

    def train(self, x: Any, index: Index, weights: Any = None) -> None:
        begin = as_array(self.centroids).reshape(-1, self.d) if len(self.centroids) else None
        counts, product = None if weights is None else as_array(weights), index.metric_type == METRIC_INNER_PRODUCT
        found, self.iteration_stats = self.run(as_array(x), self.k, product, counts, begin)
        self.centroids = found.reshape(-1)
        index.reset()
        index.add(found)


def kmin(array: Any, k: int) -> tuple[Any, Any]:
    """The k least of every row, and where they are."""
    values, places = torch.from_numpy(as_array(array)).sort(stable=True, dim=1)
    return values[:, :k].numpy(), places[:, :k].numpy()


def knn(xq: Any, xb: Any, k: int, metric: int = METRIC_L2) -> tuple[Any, Any]:
    """(distances, places) of the k nearest."""
    queries, base = torch.from_numpy(as_array(xq)), torch.from_numpy(as_array(xb))
    distances, places = topk_distances(queries, base, k, metric=metric_name(metric))
    return like(xq, distances.numpy()), like(xq, places.numpy())


def flat_like(d: int, metric: int) -> IndexFlat:
    kinds = {METRIC_L2: IndexFlatL2, METRIC_INNER_PRODUCT: IndexFlatIP}
    return kinds[metric](d) if metric in kinds else IndexFlat(d, metric)
