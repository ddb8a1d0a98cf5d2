"""The indexes: vectors as they are or product-quantised, of which a search scans all or the lists nearest to it."""

from __future__ import annotations

from typing import Any

import torch

from metate.errors import fail, require_choice
from metate.ops.pq import METRICS, OF_CODES
from metate.ops.pq.codes import LEAST_BITS, MOST_BITS
from metate.scalars import is_whole, plain
from metate.search.codecs import STORED, Product, Vectors
from metate.search.index import Index

_MOST_SIZE = 2**31 - 1
MOST_SEED = 2**63 - 1


class FlatIndex(Index):
    """All vectors, compared exactly.

    Args:
        dim: dimensions of a vector.
        metric: "l2" (squared distance), "inner_product", "cosine", "l1" (sum of differences), or "linf" (the largest).
        storage: "float32", "float16", "bfloat16", or "sq8" (a byte a dimension, trained).
        device: where the vectors lie.
    """

    def __init__(
        self, dim: int, metric: str = "l2", *, storage: str = "float32", device: str | torch.device = "cpu"
    ) -> None:
        dim = plain(dim)
        op = "search.FlatIndex"
        _check(op, dim=dim, metric=metric, storage=storage)
        super().__init__(dim, metric, Vectors(dim, storage), device=device)
        self.storage = storage

    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "metric": self.metric, "storage": self.storage}


class PQIndex(Index):
    """Product-quantised vectors (Jégou, Douze, Schmid 2011), all of them scanned.

    Args:
        dim, device: as of FlatIndex.
        metric: "l2", "inner_product", or "cosine".
        M: sub-vectors; dim is a multiple of it.
        bits: of a sub-code, 1 to 16; 4 and 8 are scanned fastest. A vector takes M × bits / 8 bytes.
        opq: rotate first, so that less is lost (Ge et al. 2013). Trained.
        refine: None, or how full vectors are kept beside the codes, to rank candidates by: a `storage` of FlatIndex.
        seed: of the sample and of k-means.
    """

    def __init__(
        self, dim: int, M: int, bits: int = 8, metric: str = "l2", *, opq: bool = False, refine: str | None = None,
        seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        dim, M, bits, seed = map(plain, (dim, M, bits, seed))
        _check("search.PQIndex", dim=dim, metric=metric, M=M, bits=bits, refine=refine, seed=seed)
        super().__init__(dim, metric, Product(dim, M, bits), opq=opq, refine=refine, seed=seed, device=device)
        self.M, self.bits = M, bits

    def settings(self) -> dict[str, Any]:
        return {
            "dim": self.dim, "M": self.M, "bits": self.bits, "metric": self.metric, "opq": self.opq,
            "refine": None if self.refine is None else self.refine.storage, "seed": self.seed,
        }  # fmt: skip


class IVFFlatIndex(Index):
    """Vectors in the list of the nearest of `nlist` centroids; a search looks into `nprobe` lists.

    Args:
        dim, metric, storage, device: as of FlatIndex.
        nlist: lists, each with a centroid that training finds.
        seed: of the sample and of k-means.
    """

    def __init__(
        self, dim: int, nlist: int, metric: str = "l2", *, storage: str = "float32", seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        dim, nlist, seed = map(plain, (dim, nlist, seed))
        _check("search.IVFFlatIndex", dim=dim, metric=metric, storage=storage, nlist=nlist, seed=seed)
        super().__init__(dim, metric, Vectors(dim, storage), nlist=nlist, seed=seed, device=device)
        self.storage = storage

    def settings(self) -> dict[str, Any]:
        assert self.nlist is not None
        return {
            "dim": self.dim, "nlist": self.nlist, "metric": self.metric, "storage": self.storage, "seed": self.seed,
        }  # fmt: skip


class IVFPQIndex(Index):
    """Product-quantised vectors in lists (Jégou, Douze, Schmid 2011).

    Args:
        dim, nlist, device: as of IVFFlatIndex.
        metric, M, bits, opq, refine, seed: as of PQIndex.
        residual: quantise what is left of a vector when the centroid of its list is subtracted.
    """

    def __init__(
        self, dim: int, nlist: int, M: int, bits: int = 8, metric: str = "l2", *, residual: bool = True,
        opq: bool = False, refine: str | None = None, seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        dim, nlist, M, bits, seed = map(plain, (dim, nlist, M, bits, seed))
        _check("search.IVFPQIndex", dim=dim, metric=metric, M=M, bits=bits, refine=refine, nlist=nlist, seed=seed)
        codec = Product(dim, M, bits, residual, row_bias=residual and metric == "l2")
        super().__init__(dim, metric, codec, nlist=nlist, opq=opq, refine=refine, seed=seed, device=device)
        self.M, self.bits, self.residual = M, bits, residual

    def settings(self) -> dict[str, Any]:
        assert self.nlist is not None
        return {
            "dim": self.dim, "nlist": self.nlist, "M": self.M, "bits": self.bits, "metric": self.metric,
            "residual": self.residual, "opq": self.opq, "refine": None if self.refine is None else self.refine.storage,
            "seed": self.seed,
        }  # fmt: skip


def _check(op: str, **given: Any) -> None:
    for name in ("dim", "nlist", "M", "bits"):
        value = given.get(name, 8)
        if not is_whole(value, 1, _MOST_SIZE):
            raise fail(op, name, repr(value)[:60], f"an integer from 1 to {_MOST_SIZE}")
    seed = given.get("seed", 0)
    if not is_whole(seed, 0, MOST_SEED):
        raise fail(op, "seed", repr(seed), f"an integer from 0 to {MOST_SEED}")
    require_choice(op, "metric", given["metric"], OF_CODES if "M" in given else METRICS)
    for name in ("storage", "refine"):
        if name in given and (name, given[name]) != ("refine", None):
            require_choice(op, name, given[name], STORED)
    if "M" in given and given["dim"] % given["M"]:
        raise fail(op, "M", given["M"], f"a divisor of dim, {given['dim']}")
    if "bits" in given and not LEAST_BITS <= given["bits"] <= MOST_BITS:
        raise fail(op, "bits", given["bits"], f"{LEAST_BITS} to {MOST_BITS}")
