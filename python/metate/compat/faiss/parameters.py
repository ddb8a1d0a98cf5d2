"""How k-means runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metate.ops.pq.kmeans import fit_centroids

Floats = npt.NDArray[np.float32]


class ClusteringParameters:
    """Fields may be given by name."""

    def __init__(self, **given: Any) -> None:
        self.niter, self.nredo, self.verbose, self.spherical = 25, 1, False, False
        self.seed, self.max_points_per_centroid, self.min_points_per_centroid = 1234, 256, 39
        for name, value in given.items():
            if not hasattr(self, name):
                raise AttributeError(f"metate.compat.faiss: k-means has no parameter {name}")
            setattr(self, name, value)

    def run(self, x: Floats, k: int) -> tuple[Floats, Floats]:
        """The centroids of the best of `nredo` runs, and the objective after each iteration."""
        if len(x) < k:
            raise RuntimeError(f"k-means: {len(x)} points, expected at least k={k}")
        runs = [
            fit_centroids(
                torch.from_numpy(x), k, iterations=self.niter, seed=self.seed + turn, spherical=self.spherical,
                most=self.max_points_per_centroid,
            )
            for turn in range(self.nredo)
        ]  # fmt: skip
        last = [float(objective[-1]) if len(objective) else 0.0 for _, objective in runs]
        best = runs[int(np.argmax(last) if self.spherical else np.argmin(last))]
        return best[0].numpy(), best[1].numpy()
