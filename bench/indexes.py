"""Indexes beside those of faiss, trained on the same vectors: the share of the ten nearest that is found, and speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import metate
from metate.bench.run import Approximate, Setup, Skip, Workload
from metate.op import Args, Case
from metate.ops.pq.declaration import topk_op
from metate.search import FlatIndex, Index, IVFFlatIndex, IVFPQIndex, PQIndex

Floats = npt.NDArray[np.float32]

D, POOL, K = 128, 512, 10
_REFINED = 16  # times k: candidates that are ranked by full vectors
_TRAINED = 1 << 18  # vectors to train on


@dataclass(frozen=True)
class Kind:
    """How we make an index, and by which strings faiss does."""

    make: Callable[[], Index]
    faiss: str
    fast: str = ""  # of faiss, with its scan of 4 bits


KINDS = {
    "PQ16x8": Kind(lambda: PQIndex(D, 16), "PQ16x8"),
    "PQ32x4": Kind(lambda: PQIndex(D, 32, 4), "PQ32x4", "PQ32x4fs"),
    "PQ32x4 refined": Kind(lambda: PQIndex(D, 32, 4, refine="float32"), "PQ32x4,RFlat", "PQ32x4fs,RFlat"),
    "OPQ PQ16x8": Kind(lambda: PQIndex(D, 16, opq=True), "OPQ16,PQ16x8"),
    "IVF1024 PQ16x8": Kind(lambda: IVFPQIndex(D, 1024, 16), "IVF1024,PQ16x8"),
    "IVF1024 PQ32x4": Kind(lambda: IVFPQIndex(D, 1024, 32, 4), "IVF1024,PQ32x4", "IVF1024,PQ32x4fs"),
    "IVF1024 Flat": Kind(lambda: IVFFlatIndex(D, 1024), "IVF1024,Flat"),
}
SWEEP = [
    dict(data=data, n=n, index=kind, Q=Q, nprobe=nprobe)
    for data, n in (("mixture", 1_000_000), ("sphere", 200_000), ("heavy", 200_000))
    for kind in KINDS
    for nprobe in ((1, 8, 32) if "IVF" in kind else (0,))
    for Q in (1, 64)
]


def workload() -> Workload:
    return Workload("index", topk_op, SWEEP, {"faiss": faiss_searcher, "faiss fast scan": faiss_fast_searcher},
                    our_searcher, lambda case: 2.0 * case["Q"] * case["n"] * D, (torch.float32,), label,
                    inputs=inputs)  # fmt: skip


def label(case: Case) -> str:
    probed = f" nprobe {case['nprobe']}" if case["nprobe"] else ""
    return f"{case['data']} {case['n'] // 1000}k {case['index']}{probed} Q{case['Q']}"


# Data.


@lru_cache(maxsize=1)
def vectors(data: str, n: int) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Base, queries, and the ids of the nearest."""
    random = np.random.default_rng(20)
    x = np.empty((n + POOL, D), np.float32)
    draw = {"mixture": _mixture, "sphere": _sphere, "heavy": _heavy}[data](random)
    for part in np.array_split(x, max(1, len(x) // 50_000)):
        part[:] = draw(len(part))
    x = x[random.permutation(len(x))]
    base, queries = x[:n], x[n:]
    exact = FlatIndex(D)
    exact.add(base)
    return base, queries, exact.search(queries, K)[1]


def _mixture(random: np.random.Generator) -> Callable[[int], Floats]:
    """Gaussians of unequal spread in 12 dimensions, bent into 128: descriptors have so few."""
    centres, spread = 1.5 * random.standard_normal((500, 12)), random.uniform(0.4, 1, 500)
    first, second = random.standard_normal((12, 256)) / 12**0.5, random.standard_normal((256, D)) / 16

    def draw(n: int) -> Floats:
        which = random.integers(0, 500, n)
        z = centres[which] + spread[which, None] * random.standard_normal((n, 12))
        return np.tanh(z @ first) @ second + 0.02 * random.standard_normal((n, D))

    return draw


def _sphere(random: np.random.Generator) -> Callable[[int], Floats]:
    """Uniform on the sphere: nothing to learn."""

    def draw(n: int) -> Floats:
        x = random.standard_normal((n, D))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return draw


def _heavy(random: np.random.Generator) -> Callable[[int], Floats]:
    """Student's t with 3 degrees of freedom, axes of falling variance turned at random: correlated, with outliers."""
    turn = np.linalg.qr(random.standard_normal((D, D)))[0] * np.arange(1, D + 1)[:, None] ** -0.5

    def draw(n: int) -> Floats:
        return random.standard_normal((n, D)) @ turn / np.sqrt(random.chisquare(3, (n, 1)) / 3)

    return draw


def inputs(case: Case) -> Args:
    base, queries, _ = vectors(case["data"], case["n"])
    return torch.from_numpy(queries[: case["Q"]]), torch.from_numpy(base), *[None] * 5, K, 0, False


# Contenders.


def _approximate(case: Case, search: Callable[[Floats], Any]) -> Approximate:
    """A search of a few queries after another, and its recall over all of them."""
    _, queries, truth = vectors(case["data"], case["n"])
    found = np.concatenate([search(part) for part in np.array_split(queries, POOL // 64)])
    recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)])
    batches = np.split(queries, POOL // case["Q"])
    return Approximate(lambda i: search(batches[i % len(batches)]), float(recall))


@lru_cache(maxsize=1)
def _our_index(data: str, n: int, kind: str) -> Index:
    index = KINDS[kind].make()
    base = vectors(data, n)[0]
    index.train(base[:_TRAINED], progress=False)
    index.add(base, progress=False)
    return index


def our_searcher(setup: Setup, backend: str) -> Approximate:
    case = setup.case
    index = _our_index(case["data"], case["n"], case["index"])
    how = {"refine_factor": _REFINED} | ({"nprobe": case["nprobe"]} if case["nprobe"] else {})

    def search(queries: Floats) -> Tensor:
        with metate.use(backend):
            return index.search(queries, K, **how)[1]

    return _approximate(case, search)


def faiss_module() -> Any:
    try:
        import faiss
    except ImportError:
        raise Skip("faiss is not installed: pip install faiss-cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


@lru_cache(maxsize=2)
def _faiss_index(data: str, n: int, description: str) -> Any:
    index = faiss_module().index_factory(D, description)
    base = vectors(data, n)[0]
    index.train(base[:_TRAINED])
    index.add(base)
    return index


def faiss_searcher(setup: Setup, fast: bool = False) -> Approximate:
    case, kind = setup.case, KINDS[setup.case["index"]]
    if fast and not kind.fast:
        raise Skip("codes of 4 bits only")
    index = _faiss_index(case["data"], case["n"], kind.fast if fast else kind.faiss)
    if case["nprobe"]:
        faiss_module().extract_index_ivf(index).nprobe = case["nprobe"]
    if "refined" in case["index"]:
        index.k_factor = _REFINED
    return _approximate(case, lambda queries: index.search(queries, K)[1])


def faiss_fast_searcher(setup: Setup) -> Approximate:
    return faiss_searcher(setup, fast=True)
