"""How k-means runs, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from metate.compat.faiss.random import Integers, permutation
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

    def own(self, owns: bool = True) -> bool:
        return True


class Owned:
    this = Own()


class Vector(list[Item]):
    """A list with the names of a C++ vector."""

    def at(self, i: int) -> Item:
        return self[i]

    def size(self) -> int:
        return len(self)


class NumberVector(Vector[Any]):
    """Numbers of one dtype: so many zeros, or none."""

    dtype: type[np.generic]

    def __init__(self, size: int = 0) -> None:
        super().__init__([self.dtype(0)] * size)

    def push_back(self, number: Any) -> None:
        self.append(self.dtype(number))

    def resize(self, size: int) -> None:
        self[size:] = [self.dtype(0)] * (size - len(self))


class Numbers(np.ndarray[Any, np.dtype[Any]]):
    """An array that is read as a C++ vector, too."""

    def at(self, i: int) -> Any:
        return self[i]


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

    def chosen(self, n: int, k: int) -> Integers | slice:
        """The rows of n points that k centroids are trained on."""
        if n < k:
            raise RuntimeError(f"k-means: {n} points, expected at least k={k}")
        most = k * self.max_points_per_centroid
        return permutation(n, most, self.seed) if n > most else slice(None)

    def first(self, n: int, k: int, turn: int = 0) -> Integers:
        """The points, of n, where k centroids begin."""
        return np.arange(k) if n == k else permutation(n, k, self.seed + 1 + 15486557 * turn)

    def run(
        self, x: Floats, k: int, product: bool, weights: Floats | None = None, begin: Floats | None = None
    ) -> tuple[Floats, Vector[IterationStats]]:
        """The centroids of the best of `nredo` runs, and what is known of its iterations: those that changed them.

        With `product`, points go to the largest inner product.
        """
        rows = self.chosen(len(x), k)
        x, weights = x[rows], None if weights is None else weights[rows]
        if len(x) == k:
            return x, Vector([IterationStats(0.0)])
        given = x[:0] if begin is None else begin
        runs = []
        for turn in range(self.nredo):
            start = np.concatenate([given, x[self.first(len(x), k, turn)[len(given) :]]])
            runs.append(
                fit_centroids(
                    torch.from_numpy(x), k, torch.from_numpy(start), self.niter, self.seed, self.spherical, product,
                    None, None if weights is None else torch.from_numpy(weights), self.int_centroids,
                )
            )  # fmt: skip
        last = [float(objective[-1]) if len(objective) else 0.0 for _, objective in runs]
        centroids, objective = runs[int(np.argmax(last) if product else np.argmin(last))]
        changed = objective[: int((objective != objective[-1:]).sum()) + 1] if len(objective) else objective
        return centroids.numpy(), Vector(map(IterationStats, changed.tolist()))
