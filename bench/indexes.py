"""Indexes beside those of faiss, trained on the same vectors: the share of the ten nearest that is found, and speed.

Recall varies with the sample and with where k-means begins; the rows of training have its mean over several samples.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import metate
from metate.bench.run import Approximate, Repetition, Setup, Skip, Workload, timed, timed_backends
from metate.op import Args, Case
from metate.ops.pq.declaration import topk_op
from metate.search import FlatIndex, Index, IVFFlatIndex, IVFPQIndex, PQIndex

Floats = npt.NDArray[np.float32]

D, POOL, K = 128, 512, 10
_REFINED = 16  # times k: candidates that are ranked by full vectors
_BATCH = 64
_SLOW = 0.5  # seconds of a batch whose repetitions for recall are enough
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
    for Q in (1, _BATCH)
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
        Workload("training of an index", topk_op, TRAINING, {"faiss": faiss_trainer}, trainer,
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


def _recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)]))


class Judged(NamedTuple):
    """A search of one index, which share of the nearest it finds, and how long batches took meanwhile."""

    search: Search
    recall: float
    repetitions: tuple[Repetition, ...]


def _judged(search: Search, data: str, n: int, seed: int = _SEED) -> Judged:
    """By a few queries after another."""
    _, queries, truth = vectors(data, n, seed)
    found: list[npt.NDArray[np.int64]] = []
    parts = np.split(queries, POOL // _BATCH)
    repetitions = tuple(timed(lambda part=part: found.append(search(part))) for part in parts)  # type: ignore[misc]
    return Judged(search, _recall(np.concatenate(found), truth), repetitions)


def _approximate(case: Case, judged: Judged) -> Approximate:
    queries = vectors(case["data"], case["n"])[1]
    batches = np.split(queries, POOL // case["Q"])

    def run(i: int) -> Any:
        return judged.search(batches[i % len(batches)])

    if case["Q"] != _BATCH:
        return Approximate(run, (judged.recall,))
    seconds = statistics.median(seconds for _, seconds in judged.repetitions)
    return Approximate(run, (judged.recall,), seconds, judged.repetitions if seconds > _SLOW else ())


def _ours(kind: str, x: Floats) -> Index:
    index = KINDS[kind].make()
    index.train(x, progress=False)
    return index


@lru_cache(maxsize=1)
def _our_index(kind: str, data: str, n: int) -> Index:
    x = vectors(data, n)[0]
    index = _ours(kind, x[:_TRAINED])
    index.add(x, progress=False)
    return index


def _our_search(index: Index, nprobe: int, backend: str) -> Search:
    how = {"refine_factor": _REFINED} | ({"nprobe": nprobe} if nprobe else {})

    def search(queries: Floats) -> Tensor:
        return index.search(queries, K, **how)[1]

    def search_on(queries: Floats) -> Tensor:
        with metate.use(backend):
            return search(queries)

    return search if backend == next(iter(topk_op.implementations("cpu"))) else search_on  # as users call it


@lru_cache(maxsize=2)  # of single queries and of batches alike, on one backend after another
def _our_judged(kind: str, data: str, n: int, nprobe: int, backend: str) -> Judged:
    return _judged(_our_search(_our_index(kind, data, n), nprobe, backend), data, n)


def our_searcher(setup: Setup, backend: str) -> Approximate:
    case = setup.case
    return _approximate(case, _our_judged(case["index"], case["data"], case["n"], case["nprobe"], backend))


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
def _faiss_index(description: str, data: str, n: int) -> Any:
    x = vectors(data, n)[0]
    index = _theirs(description, x[:_TRAINED])
    index.add(x)
    return index


@lru_cache(maxsize=1)
def _faiss_fast(description: str, data: str, n: int) -> Any:
    """The same codes for the fast scan."""
    faiss = faiss_module()
    index = _faiss_index(description, data, n)
    base = faiss.downcast_index(index.base_index) if description.endswith("RFlat") else index
    fast = (faiss.IndexIVFPQFastScan if "IVF" in description else faiss.IndexPQFastScan)(base)
    if base is index:
        return fast
    x = vectors(data, n)[0]
    return faiss.IndexRefineFlat(fast, faiss.swig_ptr(x))


def _faiss_search(kind: str, index: Any, nprobe: int) -> Search:
    if nprobe:
        faiss_module().extract_index_ivf(index).nprobe = nprobe
    if "refined" in kind:
        index.k_factor = _REFINED
    return lambda queries: index.search(queries, K)[1]


@lru_cache(maxsize=2)  # of single queries and of batches alike, with and without the fast scan
def _faiss_judged(kind: str, data: str, n: int, nprobe: int, fast: bool) -> Judged:
    of = KINDS[kind].faiss, data, n
    index = (_faiss_fast if fast else _faiss_index)(*of)
    return _judged(_faiss_search(kind, index, nprobe), data, n)


def faiss_searcher(setup: Setup, fast: bool = False) -> Approximate:
    case = setup.case
    if fast and not KINDS[case["index"]].fast:
        raise Skip("codes of 4 bits only")
    return _approximate(case, _faiss_judged(case["index"], case["data"], case["n"], case["nprobe"], fast))


def faiss_fast_searcher(setup: Setup) -> Approximate:
    return faiss_searcher(setup, fast=True)


# Training.


class Trained(NamedTuple):
    """Of each sample, how training on it went, and what the index finds."""

    repetitions: tuple[Repetition, ...]
    recalls: tuple[float, ...]


def _teacher(kind: str, who: str, nprobe: int) -> tuple[Callable[[Floats], Any], Callable[[Any], Search]]:
    """Training, on a backend or by faiss, and the search of what it made."""
    if who == "faiss":
        return partial(_theirs, KINDS[kind].faiss), lambda index: _faiss_search(kind, index, nprobe)

    def train(x: Floats) -> Index:
        with metate.use(who):
            return _ours(kind, x)

    return train, lambda index: _our_search(index, nprobe, who)


@lru_cache(maxsize=1)
def _trained(kind: str, data: str, n: int, nprobe: int, everyone: tuple[str, ...]) -> dict[str, Trained]:
    """All train on one sample in turn, then on the next: what recall is averaged over is timed too."""
    found: dict[str, list[tuple[Repetition, float]]] = {who: [] for who in everyone}
    for seed in _SEEDS:
        x = vectors(data, n, seed)[0]
        for who in everyone:
            train, search = _teacher(kind, who, nprobe)
            made: list[Any] = []
            repetition = timed(lambda train=train, made=made: made.append(train(x[:_TRAINED])))
            made[0].add(x)
            found[who].append((repetition, _judged(search(made[0]), data, n, seed).recall))
    return {who: Trained(*zip(*pairs, strict=True)) for who, pairs in found.items()}


def trainer(setup: Setup, who: str) -> Approximate:
    case, backends = setup.case, timed_backends(setup.op, setup.device)
    named = case["index"], case["data"], case["n"], case["nprobe"]
    everyone = (*backends, "faiss") if importlib.util.find_spec("faiss") else tuple(backends)
    one = _trained(*named, everyone)[who]
    train, x = _teacher(case["index"], who, case["nprobe"])[0], vectors(case["data"], case["n"], _SEEDS[0])[0]
    return Approximate(lambda i: train(x[:_TRAINED]), one.recalls, repetitions=one.repetitions)


def faiss_trainer(setup: Setup) -> Approximate:
    faiss_module()
    return trainer(setup, "faiss")
