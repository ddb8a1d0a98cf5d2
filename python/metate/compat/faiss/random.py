"""faiss' random numbers: the same seed, the same ones, for data of examples and tests, and for where k-means begins."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
_BLOCKS = 1024  # that larger arrays are drawn in, each by a generator of its own


class _Words:
    """The words of a Mersenne twister (Matsumoto, Nishimura 1998) that begins with the low half of a seed."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def take(self, count: int) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self._state.bytes(4 * count), "<u4").astype(np.uint32)

    def integers(self, count: int) -> Integers:
        return (self.take(count) & 0x7FFFFFFF).astype(np.int64)


def _shape(n: int | tuple[int, ...]) -> tuple[int, ...]:
    return n if isinstance(n, tuple) else (n,)


def _blocks(size: int, seed: int) -> list[tuple[int, int, _Words]]:
    """(first, last, words) of each block."""
    count = 1 if size < _BLOCKS else _BLOCKS
    first, step = _Words(seed).integers(2).tolist()
    return [(j * size // count, (j + 1) * size // count, _Words(first + j * step)) for j in range(count)]


def rand(n: int | tuple[int, ...], seed: int = 12345) -> Floats:
    """Uniform from 0 to 1."""
    found = np.empty(math.prod(_shape(n)), np.float32)
    for first, last, words in _blocks(len(found), seed):
        found[first:last] = words.take(last - first).astype(np.float32) / np.float32(2**32)
    return found.reshape(_shape(n))


def randn(n: int | tuple[int, ...], seed: int = 12345) -> Floats:
    """Normal, by pairs within the unit circle (Marsaglia's polar method)."""
    found = np.empty(math.prod(_shape(n)), np.float32)
    for first, last, words in _blocks(len(found), seed):
        pairs = np.empty((0, 2))
        while 2 * len(pairs) < last - first:
            points = 2 * (words.take(2 * (last - first + 8)).reshape(-1, 2) / (2.0**32 - 1)) - 1
            square = (points**2).sum(1, keepdims=True)
            inside = square[:, 0] < 1
            square = square[inside]
            pairs = np.concatenate([pairs, points[inside] * np.sqrt(-2 * np.log(square) / square)])
        found[first:last] = pairs.reshape(-1)[: last - first]
    return found.reshape(_shape(n))


def randint(n: int | tuple[int, ...], seed: int = 12345, vmax: int | None = None) -> Integers:
    """Integers from 0 to vmax - 1, or to 2**62 - 1."""
    found = np.empty(math.prod(_shape(n)), np.int64)
    for first, last, words in _blocks(len(found), seed):
        low, high = words.integers(2 * (last - first)).reshape(-1, 2).T
        found[first:last] = low | high << 31
    return (found if vmax is None else found % vmax).reshape(_shape(n))


def rand_smooth_vectors(n: int, d: int, seed: int = 1234) -> Floats:
    """(n, d) vectors on a smooth surface of ten dimensions, like descriptors."""
    surface = randn((n, 10), seed) @ rand((10, d), seed + 1)
    smooth: Floats = np.sin(surface * (rand(d, seed + 2) * 4 + np.float32(0.1)))
    return smooth


def permutation(n: int, count: int, seed: int) -> Integers:
    """The first `count` of n numbers in faiss' random order."""
    moved: dict[int, int] = {}  # what stands where it did not at first
    found = np.empty(count, np.int64)
    last = max(n - 1, 0)  # which is left where it is
    for i, word in enumerate(_Words(seed).take(min(count, last)).tolist()):
        at = i + word % (n - i)
        found[i], moved[at] = moved.get(at, at), moved.get(i, i)
    if count > last:
        found[last:] = moved.get(last, last)
    return found
