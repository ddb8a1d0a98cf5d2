"""faiss' product quantizer over our operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate.compat.faiss.parameters import ClusteringParameters, Floats
from metate.ops.pq import pq_decode, pq_distance_tables, pq_encode
from metate.search.training import train_codebooks

Bytes = npt.NDArray[np.uint8]


def like(x: Any, y: Any) -> Any:
    """y, an array, as what x is."""
    return torch.from_numpy(y).to(x.device) if isinstance(x, Tensor) else y


def as_array(x: Any) -> Floats:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return np.ascontiguousarray(array, np.float32)


def normalize_L2(x: Any) -> None:
    """Scales rows to length 1, in place; zeros stay."""
    rows = x if isinstance(x, Tensor) else torch.from_numpy(x)
    rows.div_(rows.norm(dim=1, keepdim=True).masked_fill_((rows == 0).all(1, keepdim=True), 1))


class ProductQuantizer:
    """Codes of M sub-vectors; of an index, or alone."""

    def __init__(self, d: int, M: int, nbits: int) -> None:
        if d % M or not 4 <= nbits <= 16:
            raise RuntimeError(f"ProductQuantizer: d={d}, M={M}, nbits={nbits}, expected d % M == 0, nbits 4 to 16")
        self.d, self.M, self.nbits = d, M, nbits
        self.dsub, self.ksub, self.code_size = d // M, 1 << nbits, (M * nbits + 7) // 8
        self.cp, self.verbose = ClusteringParameters(), False
        self._books = torch.zeros(M, self.ksub, d // M)
        self.sdc_table = np.zeros(0, np.float32)

    @property
    def centroids(self) -> Floats:
        """What is written into it is what encodes."""
        return as_array(self._books).reshape(-1)

    def train(self, x: Any) -> None:
        points, cp = torch.from_numpy(as_array(x)), self.cp
        self._books = train_codebooks(points, self.M, self.nbits, cp.seed, cp.niter, most=cp.max_points_per_centroid)

    def compute_codes(self, x: Any) -> Bytes:
        codes: Bytes = pq_encode(torch.from_numpy(as_array(x)), self._books).numpy()
        return codes

    def decode(self, codes: Any) -> Floats:
        return as_array(pq_decode(torch.from_numpy(np.ascontiguousarray(codes, np.uint8)), self._books))

    def compute_distance_tables(self, nx: int, x: Any, tables: Any) -> None:
        """Squared distances (nx, M, ksub) of the sub-vectors of x and the centroids, written into `tables`."""
        self._tables(nx, x, tables, "l2")

    def compute_inner_prod_tables(self, nx: int, x: Any, tables: Any) -> None:
        self._tables(nx, x, tables, "inner_product")

    def compute_sdc_table(self) -> None:
        """Squared distances (M, ksub, ksub) between centroids, into `sdc_table`."""
        points = self._books.transpose(0, 1).reshape(self.ksub, self.d)
        tables = pq_distance_tables(points, self._books)
        self.sdc_table = as_array(tables.transpose(0, 1)).reshape(-1)

    def sync_transposed_centroids(self) -> None:
        """Nothing to do: they are turned when vectors are encoded."""

    clear_transposed_centroids = sync_transposed_centroids

    def _tables(self, nx: int, x: Any, tables: Any, metric: str) -> None:
        queries = torch.from_numpy(as_array(x).reshape(nx, self.d))
        tables.reshape(nx, self.M, self.ksub)[...] = pq_distance_tables(queries, self._books, metric=metric).numpy()
