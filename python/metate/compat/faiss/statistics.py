"""What faiss counts as it searches, and its global settings."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass
class IndexIVFStats:
    """Of all searches since `reset`: queries, lists, and vectors that were compared. Before the first reset nobody
    looks, and nothing is counted: a search need not know."""

    nq: int = 0
    nlist: int = 0
    ndis: int = 0
    wanted = False

    def reset(self) -> None:
        self.nq = self.nlist = self.ndis = 0
        self.wanted = True

    def add(self, other: IndexIVFStats) -> None:
        self.nq, self.nlist, self.ndis = self.nq + other.nq, self.nlist + other.nlist, self.ndis + other.ndis


indexIVF_stats = IndexIVFStats()


@dataclass
class IndexPQStats:
    """Of all searches since `reset`: queries, codes that were looked at, and those near enough in their bits."""

    nq: int = 0
    ncode: int = 0
    n_hamming_pass: int = 0

    def reset(self) -> None:
        self.nq = self.ncode = self.n_hamming_pass = 0

    def add(self, queries: int, codes: int) -> None:
        self.nq, self.ncode = self.nq + queries, self.ncode + codes


indexPQ_stats = IndexPQStats()

# The thresholds between faiss' own ways of computing the same distances change nothing here.
cvar = SimpleNamespace(
    indexIVF_stats=indexIVF_stats, indexPQ_stats=indexPQ_stats, distance_compute_blas_threshold=20,
    distance_compute_blas_query_bs=4096, distance_compute_blas_database_bs=1024, distance_compute_min_k_reservoir=100,
    bucket_sort_verbose=0,
)  # fmt: skip
