"""faiss' quantizers over our operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metate.compat.faiss.parameters import ClusteringParameters, Floats
from metate.ops.pq import pq_decode, pq_distance_tables, pq_encode
from metate.ops.pq.codes import LEAST_BITS, MOST_BITS
from metate.search.arrays import tensor_of
from metate.search.codecs import Vectors
from metate.search.faiss_index import SQ_STORAGE, levels_of, sq_bytes, sq_rows
from metate.search.faiss_nodes import SQ_BFLOAT, SQ_BYTE, SQ_HALF, SQ_SIZES
from metate.search.training import train_codebooks

Bytes = npt.NDArray[np.uint8]


def like(x: Any, y: Any) -> Any:
    """y, an array, as what x is."""
    return torch.from_numpy(y).to(x.device) if isinstance(x, Tensor) else y


def as_array(x: Any) -> Floats:
    """As float32, of anything whose numbers are real."""
    array = tensor_of("compat.faiss", "x", x).cpu().float().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if array.dtype.kind == "c":
        raise TypeError("metate.compat.faiss: vectors are complex, expected real numbers")
    return np.ascontiguousarray(array, np.float32)


def normalize_L2(x: Any) -> None:
    """Scales rows to length 1, in place; zeros stay."""
    rows = x if isinstance(x, Tensor) else torch.from_numpy(x)
    rows.div_(rows.norm(dim=1, keepdim=True).masked_fill_((rows == 0).all(1, keepdim=True), 1))


class ProductQuantizer:
    """Codes of M sub-vectors; of an index, or alone."""

    def __init__(self, d: int, M: int, nbits: int) -> None:
        if d % M or not LEAST_BITS <= nbits <= MOST_BITS:
            raise RuntimeError(f"ProductQuantizer: d={d}, M={M}, nbits={nbits}, expected d % M == 0, nbits 1 to 16")
        self.d, self.M, self.nbits = d, M, nbits
        self.dsub, self.ksub, self.code_size = d // M, 1 << nbits, (M * nbits + 7) // 8
        self.cp, self.verbose = ClusteringParameters(), False
        self._books = torch.zeros(M, self.ksub, d // M, dtype=torch.float32, device="cpu")
        self.sdc_table = np.zeros(0, np.float32)

    @property
    def centroids(self) -> Floats:
        """What is written into it is what encodes."""
        return as_array(self._books).reshape(-1)

    def train(self, x: Any) -> None:
        points, cp = as_array(x), self.cp
        points = points[cp.chosen(len(points), self.ksub)]
        begin = torch.from_numpy(cp.first(len(points), self.ksub))
        self._books = train_codebooks(
            torch.from_numpy(points),
            self.M,
            self.nbits,
            cp.seed,
            cp.niter,
            most=cp.max_points_per_centroid,
            begin=begin,
        )

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


class ScalarQuantizer:
    """Numbers one by one: in a byte, of the range that each column had in training, or as float16 or bfloat16."""

    QT_8bit, QT_fp16, QT_bf16 = SQ_BYTE, SQ_HALF, SQ_BFLOAT
    # Numbers of those that are not here, for code that tells kinds by them.
    QT_4bit, QT_8bit_uniform, QT_4bit_uniform, QT_8bit_direct, QT_6bit, QT_8bit_direct_signed = 1, 2, 3, 5, 6, 8
    QT_0bit, QT_1bit_tqmse, QT_2bit_tqmse, QT_3bit_tqmse, QT_4bit_tqmse, QT_8bit_tqmse = range(9, 15)
    QT_2bit_tq, QT_3bit_tq, QT_4bit_tq, QT_5bit_tq = range(15, 19)

    def __init__(self, d: int, qtype: int) -> None:
        if qtype not in SQ_SIZES:
            raise RuntimeError(f"ScalarQuantizer: qtype is {qtype}, expected QT_8bit, QT_fp16 or QT_bf16")
        self.d, self.qtype, self.code_size = d, qtype, d * SQ_SIZES[qtype]
        self.trained: Floats = np.zeros(0, np.float32)
        self._codec = Vectors(d, SQ_STORAGE[qtype])

    def train(self, x: Any) -> None:
        if self.qtype == self.QT_8bit:
            points = as_array(x)
            least = points.min(0)
            self.trained = np.concatenate([least, points.max(0) - least])

    def _model(self) -> dict[str, Tensor]:
        if self.qtype == self.QT_8bit and not len(self.trained):
            raise RuntimeError("ScalarQuantizer: not trained; call train(x)")
        return {name: torch.from_numpy(array) for name, array in levels_of(self.trained).items()}

    def compute_codes(self, x: Any) -> Bytes:
        return sq_bytes(self._codec.encode(self._model(), torch.from_numpy(as_array(x)))[self._codec.name])

    def decode(self, codes: Any) -> Floats:
        rows = sq_rows(np.ascontiguousarray(codes, np.uint8), self._codec.columns[self._codec.name][1])
        return as_array(self._codec.decode(self._model(), {self._codec.name: rows}))
