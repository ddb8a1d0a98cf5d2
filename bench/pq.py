"""Brute-force search, codes, their scans and the indexes over them, beside PyTorch and faiss.

faiss takes vectors where a scan takes tables: with centroids that are unit vectors, the tables are their own queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.bench import indexes
from metate.bench.indexes import faiss_module
from metate.bench.run import Run, Setup, Skip, Workload, call_op
from metate.op import Case
from metate.ops.pq.codes import bits_of, pack_codes, separate
from metate.ops.pq.declaration import encode_op, scan_op, topk_op

SINGLE = (torch.float32,)
_AT_ONCE = 1 << 24  # distances that torch holds
_SCANNED = 1 << 22  # rows that it scans, of all queries
_CANDIDATES = 10  # times k: what the approximate scan of faiss hands on to exact sums


def workloads(compile: bool) -> list[Workload]:
    return [
        Workload("brute-force search", topk_op, topk_op.domain.sweep, {"torch": torch_topk, "faiss": faiss_topk},
                 call_op, topk_op.flops, SINGLE, label),
        Workload("scan of codes", scan_op, scan_op.domain.sweep,
                 {"torch": torch_scan, "faiss": faiss_scan, "faiss fast scan, refined": faiss_fast_scan},
                 call_op, scan_op.flops, SINGLE, label),
        Workload("encode", encode_op, encode_op.domain.sweep, {"torch": torch_encode, "faiss": faiss_encode},
                 call_op, encode_op.flops, SINGLE, label),
        *(indexes.index_workloads() if compile else []),  # which take minutes to train
    ]  # fmt: skip


def label(case: Case) -> str:
    return " ".join(f"{name}{size}" for name, size in case.items() if not isinstance(size, bool))


# Vectors.


def torch_topk(setup: Setup) -> Run:
    def run(i: int) -> tuple[Tensor, Tensor]:
        named = setup.named[i % len(setup.named)]
        queries, base, k = named["queries"], named["base"], named["k"]
        squares, found = base.square().sum(1), []
        for part in queries.split(max(1, _AT_ONCE // base.shape[0])):
            key = torch.addmm(squares, part, base.T, alpha=-2)
            best, ids = key.topk(k, 1, largest=False)
            found.append((best + part.square().sum(1, keepdim=True), ids))
        return torch.cat([d for d, _ in found]), torch.cat([ids for _, ids in found])

    return run


def faiss_topk(setup: Setup) -> Run:
    faiss = faiss_module()
    sets = [(n["queries"].numpy(), n["base"].numpy(), n["k"]) for n in setup.named]

    def run(i: int) -> tuple[Tensor, Tensor]:
        distances, ids = faiss.knn(*sets[i % len(sets)])
        return torch.from_numpy(distances), torch.from_numpy(ids)

    return run


# Codes.


def _numbers(named: dict[str, Any]) -> Tensor:
    return separate(named["codes"], named["n"])


def _sums(tables: Tensor, rows: Tensor) -> Tensor:
    """(Q, candidates) sums of table entries; rows (Q, candidates, M)."""
    return tables.gather(2, rows.transpose(1, 2).long()).sum(1)


def torch_scan(setup: Setup) -> Run:
    if setup.case["Q"] * setup.case["n"] > _SCANNED:
        raise Skip("seconds a call; one query says how fast it is")
    numbers = [_numbers(named) for named in setup.named]

    def run(i: int) -> tuple[Tensor, Tensor]:
        named, rows = setup.named[i % len(setup.named)], numbers[i % len(numbers)]
        found = [_sums(table[None], rows[None]).topk(named["k"], 1, largest=False) for table in named["tables"]]
        return torch.cat([d for d, _ in found]), torch.cat([ids for _, ids in found])

    return run


def _faiss_queries(tables: Tensor) -> Any:
    """What has the inner products -tables with unit vectors."""
    return -tables.flatten(1).numpy()


def _faiss_index(kind: Any, faiss: Any, named: dict[str, Any]) -> Any:
    """An index with the codes of a case whose centroids are unit vectors."""
    _, M, levels = named["tables"].shape
    bits = bits_of("bench", "tables", levels)
    index = kind(M * levels, M, bits, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.tile(np.eye(levels, dtype=np.float32), (M, 1, 1)).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def _with_codes(faiss: Any, index: Any, named: dict[str, Any]) -> Any:
    codes = pack_codes(_numbers(named), bits_of("bench", "tables", named["tables"].shape[2]))
    faiss.copy_array_to_vector(codes.numpy().ravel(), index.codes)
    index.ntotal = named["n"]
    return index


def faiss_scan(setup: Setup) -> Run:
    faiss = faiss_module()
    sets = [
        (_with_codes(faiss, _faiss_index(faiss.IndexPQ, faiss, n), n), _faiss_queries(n["tables"]), n["k"])
        for n in setup.named
    ]

    def run(i: int) -> tuple[Tensor, Tensor]:
        index, queries, k = sets[i % len(sets)]
        distances, ids = index.search(queries, k)
        return -torch.from_numpy(distances), torch.from_numpy(ids)

    return run


def faiss_fast_scan(setup: Setup) -> Run:
    faiss = faiss_module()
    if setup.case["bits"] != 4:
        raise Skip("codes of 4 bits only")
    sets = []
    for named in setup.named:
        plain = _with_codes(faiss, _faiss_index(faiss.IndexPQ, faiss, named), named)
        sets.append((faiss.IndexPQFastScan(plain), _faiss_queries(named["tables"]), _numbers(named), named))

    def run(i: int) -> tuple[Tensor, Tensor]:
        index, queries, numbers, named = sets[i % len(sets)]
        near = torch.from_numpy(index.search(queries, _CANDIDATES * named["k"])[1])
        best, at = _sums(named["tables"], numbers[near]).topk(named["k"], 1, largest=False)
        return best, near.gather(1, at)

    return run


# Encoding.


def torch_encode(setup: Setup) -> Run:
    def run(i: int) -> Tensor:
        named = setup.named[i % len(setup.named)]
        x, books = named["x"], named["codebooks"]
        M, levels, width = books.shape
        parts = x.view(-1, M, width).transpose(0, 1)
        key = torch.baddbmm(books.square().sum(2)[:, None], parts, books.transpose(1, 2), alpha=-2)
        return pack_codes(key.argmin(2).T, bits_of("bench", "codebooks", levels))

    return run


def faiss_encode(setup: Setup) -> Run:
    faiss = faiss_module()
    sets = []
    for named in setup.named:
        M, levels, width = named["codebooks"].shape
        quantizer = faiss.ProductQuantizer(M * width, M, bits_of("bench", "codebooks", levels))
        faiss.copy_array_to_vector(named["codebooks"].numpy().ravel(), quantizer.centroids)
        sets.append((quantizer, named["x"].numpy()))

    def run(i: int) -> Tensor:
        quantizer, x = sets[i % len(sets)]
        return torch.from_numpy(quantizer.compute_codes(x))

    return run
