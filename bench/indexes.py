"""Indexes beside those of faiss, trained on the same vectors: the share of the ten nearest that is found, and speed.

Recall varies with the sample and with where k-means begins; the rows of training have its mean over several samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
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
_TRAINED = 40 << 10  # vectors to train on: faiss wants 39 for each list
_SEED = 20  # of the vectors whose search is timed
_SEEDS = tuple(range(5))  # of those that recall is averaged over


@dataclass(frozen=True)
class Kind:
    """How we make an index, and by which strings faiss does; np: it spares sorting centroids for another search."""

    make: Callable[[], Index]
    faiss: str
    fast: bool = False  # faiss has its scan of 4 bits too


FLAT_KINDS = {
    "PQ16x8": Kind(partial(PQIndex, D, 16), "PQ16x8np"),
    "PQ32x4": Kind(partial(PQIndex, D, 32, 4), "PQ32x4np", True),
    "PQ32x4 refined": Kind(partial(PQIndex, D, 32, 4, refine="float32"), "PQ32x4np,RFlat", True),
    "OPQ PQ16x8": Kind(partial(PQIndex, D, 16, opq=True), "OPQ16,PQ16x8np"),
}


def _kinds(lists: int) -> dict[str, Kind]:
    return FLAT_KINDS | {
        f"IVF{lists} PQ16x8": Kind(partial(IVFPQIndex, D, lists, 16), f"IVF{lists},PQ16x8np"),
        f"IVF{lists} PQ32x4": Kind(partial(IVFPQIndex, D, lists, 32, 4), f"IVF{lists},PQ32x4np", True),
        f"IVF{lists} Flat": Kind(partial(IVFFlatIndex, D, lists), f"IVF{lists},Flat"),
    }


def _nprobes(kind: str) -> tuple[int, ...]:
    return (1, 8, 32) if "IVF" in kind else (0,)


KINDS = _kinds(1024) | _kinds(256)
SWEEP = [
    dict(data="mixture", n=1_000_000, index=kind, Q=Q, nprobe=nprobe)
    for kind in _kinds(1024)
    for nprobe in _nprobes(kind)
    for Q in (1, 64)
]
TRAINING = [
    dict(data=data, n=20_000, index=kind, nprobe=8 if "IVF" in kind else 0)
    for data in ("mixture", "sphere", "heavy")
    for kind in _kinds(256)
    if "refined" not in kind and ("OPQ" not in kind or data == "heavy")  # trained like others; slow
]


def index_workloads() -> list[Workload]:
    return [
        Workload("index", topk_op, SWEEP, {"faiss": faiss_searcher, "faiss fast scan": faiss_fast_searcher},
                 our_searcher, lambda case: 2.0 * case["Q"] * case["n"] * D, (torch.float32,), label, inputs=inputs),
        Workload("training of an index", topk_op, TRAINING, {"faiss": faiss_trainer}, our_trainer,
                 lambda case: 2.0 * 25 * 256 * case["n"] * D, (torch.float32,), label, inputs=inputs),
    ]  # fmt: skip


def label(case: Case) -> str:
    probed = f" nprobe {case['nprobe']}" if case["nprobe"] else ""
    asked = f" Q{case['Q']}" if "Q" in case else ""
    return f"{case['data']} {case['n'] // 1000}k {case['index']}{probed}{asked}"


# Data.


@lru_cache(maxsize=len(_SEEDS))
def vectors(data: str, n: int, seed: int = _SEED) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Base, queries, and the ids of the nearest."""
    random = np.random.default_rng(seed)
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
    return torch.from_numpy(queries[: case.get("Q")]), torch.from_numpy(base), *[None] * 5, K, 0, False


# Contenders.

Search = Callable[[Floats], Any]


def _recall(search: Search, queries: Floats, truth: npt.NDArray[np.int64]) -> float:
    """A few queries after another."""
    found = np.concatenate([search(part) for part in np.array_split(queries, POOL // 64)])
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)]))


def _approximate(case: Case, search: Search) -> Approximate:
    _, queries, truth = vectors(case["data"], case["n"])
    batches = np.split(queries, POOL // case["Q"])
    return Approximate(lambda i: search(batches[i % len(batches)]), (_recall(search, queries, truth),))


def _trainer(case: Case, train: Callable[[Floats], Any], searches: Sequence[Search], seconds: float) -> Approximate:
    """Training on one sample after another, and the recall of each index over queries of the same kind."""
    samples = [vectors(case["data"], case["n"], seed) for seed in _SEEDS]
    recalls = [_recall(search, *sample[1:]) for search, sample in zip(searches, samples, strict=True)]
    return Approximate(lambda i: train(samples[i % len(samples)][0][:_TRAINED]), tuple(recalls), seconds)


def _filled(
    train: Callable[[Floats], Any], data: str, n: int, seeds: tuple[int, ...], **how: Any
) -> tuple[list[Any], float]:
    """Indexes, a seed each, and how long it took to train one."""
    indexes, seconds = [], []
    for seed in seeds:
        x = vectors(data, n, seed)[0]
        began = time.perf_counter()
        index = train(x[:_TRAINED])
        seconds.append(time.perf_counter() - began)
        index.add(x, **how)
        indexes.append(index)
    return indexes, statistics.median(seconds)


def _ours(kind: str, x: Floats) -> Index:
    index = KINDS[kind].make()
    index.train(x, progress=False)
    return index


@lru_cache(maxsize=1)
def _our_indexes(kind: str, data: str, n: int, seeds: tuple[int, ...]) -> tuple[list[Index], float]:
    return _filled(partial(_ours, kind), data, n, seeds, progress=False)


def _our_search(case: Case, index: Index, backend: str) -> Search:
    how = {"refine_factor": _REFINED} | ({"nprobe": case["nprobe"]} if case["nprobe"] else {})

    def search(queries: Floats) -> Tensor:
        return index.search(queries, K, **how)[1]

    def search_on(queries: Floats) -> Tensor:
        with metate.use(backend):
            return search(queries)

    return search if backend == next(iter(topk_op.implementations("cpu"))) else search_on  # as users call it


def our_searcher(setup: Setup, backend: str) -> Approximate:
    case = setup.case
    (index,), _ = _our_indexes(case["index"], case["data"], case["n"], (_SEED,))
    return _approximate(case, _our_search(case, index, backend))


def our_trainer(setup: Setup, backend: str) -> Approximate:
    case = setup.case

    def train(x: Floats) -> Index:
        with metate.use(backend):
            return _ours(case["index"], x)

    indexes, seconds = _our_indexes(case["index"], case["data"], case["n"], _SEEDS)
    return _trainer(case, train, [_our_search(case, index, backend) for index in indexes], seconds)


def faiss_module() -> Any:
    try:
        import faiss
    except ImportError:
        raise Skip("faiss is not installed: pip install faiss-cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _theirs(description: str, x: Floats) -> Any:
    index = faiss_module().index_factory(D, description)
    index.train(x)
    return index


@lru_cache(maxsize=1)
def _faiss_indexes(description: str, data: str, n: int, seeds: tuple[int, ...]) -> tuple[list[Any], float]:
    return _filled(partial(_theirs, description), data, n, seeds)


@lru_cache(maxsize=1)
def _faiss_fast(description: str, data: str, n: int) -> Any:
    """The same codes for the fast scan."""
    faiss = faiss_module()
    (index,), _ = _faiss_indexes(description, data, n, (_SEED,))
    base = faiss.downcast_index(index.base_index) if description.endswith("RFlat") else index
    fast = (faiss.IndexIVFPQFastScan if "IVF" in description else faiss.IndexPQFastScan)(base)
    if base is index:
        return fast
    x = vectors(data, n)[0]
    return faiss.IndexRefineFlat(fast, faiss.swig_ptr(x))


def _faiss_search(case: Case, index: Any) -> Search:
    if case["nprobe"]:
        faiss_module().extract_index_ivf(index).nprobe = case["nprobe"]
    if "refined" in case["index"]:
        index.k_factor = _REFINED
    return lambda queries: index.search(queries, K)[1]


def faiss_searcher(setup: Setup, fast: bool = False) -> Approximate:
    case, kind = setup.case, KINDS[setup.case["index"]]
    if fast and not kind.fast:
        raise Skip("codes of 4 bits only")
    of = kind.faiss, case["data"], case["n"]
    index = _faiss_fast(*of) if fast else _faiss_indexes(*of, (_SEED,))[0][0]
    return _approximate(case, _faiss_search(case, index))


def faiss_trainer(setup: Setup) -> Approximate:
    case, description = setup.case, KINDS[setup.case["index"]].faiss
    indexes, seconds = _faiss_indexes(description, case["data"], case["n"], _SEEDS)
    searches = [_faiss_search(case, index) for index in indexes]
    return _trainer(case, partial(_theirs, description), searches, seconds)


def faiss_fast_searcher(setup: Setup) -> Approximate:
    return faiss_searcher(setup, fast=True)
