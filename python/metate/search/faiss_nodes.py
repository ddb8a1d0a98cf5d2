"""What faiss' files hold: a tree of nodes, of flat, scalar-quantised, PQ and IVF indexes, with rotations, id maps and
refinement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

INNER_PRODUCT, L2, L1, LINF = range(4)
METRICS = {INNER_PRODUCT: "inner_product", L2: "l2", L1: "l1", LINF: "linf"}
SQ_BYTE, SQ_HALF, SQ_BFLOAT = 0, 4, 7
SQ_SIZES = {SQ_BYTE: 1, SQ_HALF: 2, SQ_BFLOAT: 2}  # bytes of a number


@dataclass
class Node:
    """What every index has: dimensions, number of vectors, metric."""

    d: int
    ntotal: int
    metric: int
    is_trained: bool = True


@dataclass
class Flat(Node):
    vectors: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass
class PQ(Node):
    """codebooks (M, 2**bits, d/M); codes (ntotal, code_size); fast: of faiss' fast scan; asked: search_type,
    encode_signs and polysemous_ht."""

    codebooks: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    codes: Bytes = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    fast: bool = False
    asked: tuple[int, bool, int] | None = None


@dataclass
class SQ(Node):
    """kind: one of SQ_SIZES; trained: of SQ_BYTE, the least of each column, then how much more the largest is."""

    kind: int = 0
    trained: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    codes: Bytes = field(default_factory=lambda: np.zeros((0, 0), np.uint8))


@dataclass
class IVF(Node):
    """Vectors or codes as bytes (rows, code_size), with their ids, list by list; codebooks: of IVF-PQ; fast: of its
    fast scan; kind and trained: of scalar-quantised ones, as of SQ. A quantizer with ids has the centroids of some
    lists."""

    nprobe: int = 1
    quantizer: Any = None
    length: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    codes: Bytes = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    ids: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    codebooks: Floats | None = None
    by_residual: bool = False
    fast: bool = False
    kind: int | None = None
    trained: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    direct: int = 0  # the kind of its map from ids to places


@dataclass
class TwoLayer(Node):
    """Codes (ntotal, bytes), each the number of a list and the code of what is left beside its centroid."""

    quantizer: Any = None
    nlist: int = 0
    codebooks: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    codes: Bytes = field(default_factory=lambda: np.zeros((0, 0), np.uint8))


@dataclass
class PCA:
    """What A and b of a principal component analysis are made of."""

    eigen_power: float
    epsilon: float
    random_rotation: bool
    mean: Floats
    eigenvalues: Floats
    directions: Floats


@dataclass
class Transform:
    """x → A x + b."""

    A: Floats
    b: Floats | None
    is_trained: bool = True
    pca: PCA | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Dimensions before and after."""
        return self.A.shape[1], self.A.shape[0]


@dataclass
class Normalization:
    """x → x / |x|."""

    d: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.d, self.d


Step: TypeAlias = Transform | Normalization


@dataclass
class PreTransform(Node):
    chain: list[Step] = field(default_factory=list)
    index: Any = None


@dataclass
class Refine(Node):
    base: Any = None
    refine: Any = None
    k_factor: float = 1.0


@dataclass
class IDMap(Node):
    index: Any = None
    ids: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    two_way: bool = False
