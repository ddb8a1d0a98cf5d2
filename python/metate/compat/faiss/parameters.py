"""How k-means runs, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from metate.ops.pq.kmeans import fit_centroids

Floats = npt.NDArray[np.float32]
Item = TypeVar("Item")


class Only:
    """An attribute of faiss that may be set to the one value that we have, and to no other."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        return self.value

    def __set__(self, owner: Any, value: Any) -> None:
        if value is not self.value and value != self.value:
            raise NotImplementedError(
                f"metate.compat.faiss: {self.name} of {type(owner).__name__} is {value}, expected {self.value}: "
                "there is nothing else"
            )


class Own:
    """What is asked about who frees an object: it is Python's."""

    def own(self) -> bool:
        return True


class Owned:
    this = Own()


class Vector(list[Item]):
    """A list with the names of a C++ vector."""

    def at(self, i: int) -> Item:
        return self[i]

    def size(self) -> int:
        return len(self)


@dataclass
class IterationStats:
    """Of one iteration of k-means: the sum of distances before centroids move."""

    obj: float


class ClusteringParameters:
    """Fields may be given by name."""

    def __init__(self, **given: Any) -> None:
        self.niter, self.nredo, self.verbose, self.spherical, self.int_centroids = 25, 1, False, False, False
        self.seed, self.max_points_per_centroid, self.min_points_per_centroid = 1234, 256, 39
        for name, value in given.items():
            if not hasattr(self, name):
                raise AttributeError(f"metate.compat.faiss: k-means has no parameter {name}")
            setattr(self, name, value)

    def run(
        self, x: Floats, k: int, product: bool, weights: Floats | None = None, begin: Floats | None = None
    ) -> tuple[Floats, Vector[IterationStats]]:
        """The centroids of the best of `nredo` runs, and what is known of its iterations: those that changed them.

        With `product`, points go to the largest inner product.
        """
        if len(x) < k:
            raise RuntimeError(f"k-means: {len(x)} points, expected at least k={k}")
        runs = [
            fit_centroids(
                torch.from_numpy(x), k, "sample" if begin is None else torch.from_numpy(begin), self.niter,
                self.seed + turn, self.spherical, product, self.max_points_per_centroid,
                None if weights is None else torch.from_numpy(weights), self.int_centroids,
            )
            for turn in range(self.nredo)
        ]  # fmt: skip
        last = [float(objective[-1]) if len(objective) else 0.0 for _, objective in runs]
        centroids, objective = runs[int(np.argmax(last) if product else np.argmin(last))]
        changed = objective[: int((objective != objective[-1:]).sum()) + 1] if len(objective) else objective
        return centroids.numpy(), Vector(map(IterationStats, changed.tolist()))
