"""faiss' indexes without lists: each holds one index of metate.search and speaks faiss' language about it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from metate.compat.faiss import polysemous
from metate.compat.faiss.base import Elementary, Index
from metate.compat.faiss.distances import METRIC_INNER_PRODUCT, METRIC_L2, metric_name
from metate.compat.faiss.lists import append, append_codes, stored
from metate.compat.faiss.parameters import Floats
from metate.compat.faiss.quantizer import Bytes, ProductQuantizer, ScalarQuantizer
from metate.compat.faiss.selectors import Integers, SearchParameters, SearchParametersPQ, selector
from metate.compat.faiss.statistics import indexPQ_stats
from metate.search import FlatIndex, PQIndex
from metate.search.faiss_index import SQ_STORAGE


class CodePacker:
    """One code after another, a block each."""

    nvec = 1

    def __init__(self, code_size: int) -> None:
        self.code_size = self.block_size = code_size

    def unpack_1(self, block: Any, offset: int) -> Bytes:
        """Code number `offset`."""
        code: Bytes = np.asarray(block, np.uint8).reshape(-1, self.code_size)[offset]
        return code


class IndexFlatCodes(Elementary):
    """Ids are places: those behind a removed vector move up."""

    code_size: int

    def remove_ids(self, x: Any) -> int:
        return int(self._inner.remove_ids(selector(x), renumber=True))

    def sa_code_size(self) -> int:
        return self.code_size

    @property
    def codes(self) -> Bytes:
        """The codes of all vectors, one after another. What is set to it takes their place."""
        return stored(self._inner, np.arange(self.ntotal))[1].reshape(-1)

    @codes.setter
    def codes(self, codes: Any) -> None:
        rows = np.ascontiguousarray(codes, np.uint8).reshape(-1, self.code_size)
        self.reset()
        self._add_codes(rows, None)

    @property
    def ntotal(self) -> int:
        return int(self._inner.ntotal)

    @ntotal.setter
    def ntotal(self, count: int) -> None:
        """As faiss has it after codes were set: nothing is left to do."""
        if count != self.ntotal:
            raise RuntimeError(f"{type(self).__name__}: ntotal is set to {count}, expected {self.ntotal}, as codes are")

    def get_CodePacker(self) -> CodePacker:
        """How codes lie in `codes`."""
        return CodePacker(self.code_size)

    def merge_from(self, other: Any, add_id: int = 0) -> None:
        if add_id:
            raise RuntimeError(f"{type(self).__name__}: add_id is {add_id}, expected 0: ids are places")
        lists = other._inner._state.lists
        append(other._inner, lists, lists.rows(), self._inner, None)
        other.reset()

    def _add_codes(self, codes: Bytes, ids: Integers | None) -> None:
        if ids is not None:
            raise RuntimeError(f"{type(self).__name__}: ids are given, expected None: ids are places")
        self._ready()
        append_codes(self._inner, np.zeros(len(codes), np.int64), codes, None)

    get_FlatCodesDistanceComputer = Index.get_distance_computer


class IndexFlat(IndexFlatCodes):
    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        self._inner = FlatIndex(self.d, metric_name(metric))
        self.code_size = 4 * self.d

    def train(self, x: Any) -> None:
        self._checked(x)

    def get_xb(self) -> Any:
        return self.reconstruct_n()

    def _encode(self, x: Floats) -> Bytes:
        return np.array(x.view(np.uint8))

    def _decode(self, codes: Bytes) -> Floats:
        return codes.view(np.float32)


class IndexFlatL2(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)


class IndexScalarQuantizer(IndexFlatCodes):
    def __init__(self, d: int, qtype: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        self.sq = ScalarQuantizer(self.d, qtype)
        self._inner = FlatIndex(self.d, metric_name(metric), storage=SQ_STORAGE[qtype])
        self.code_size = self.sq.code_size

    def train(self, x: Any) -> None:
        self.sq.train(self._checked(x))
        self._set_trained()

    def _given(self) -> dict[str, Any]:
        return self.sq._model()

    def _encode(self, x: Floats) -> Bytes:
        return self.sq.compute_codes(x)

    def _decode(self, codes: Bytes) -> Floats:
        return self.sq.decode(codes)


class IndexPQ(IndexFlatCodes):
    """search_type: ST_PQ, or another of polysemous.py. encode_signs: ST_HE takes the signs of a query for its code."""

    ST_PQ, ST_HE, ST_generalized_HE, ST_SDC, ST_polysemous, ST_polysemous_generalize = polysemous.SEARCH_TYPES

    def __init__(self, d: int, M: int, nbits: int, metric: int = METRIC_L2) -> None:
        super().__init__(d, metric)
        self.search_type, self.encode_signs, self.polysemous_ht = self.ST_PQ, False, M * nbits + 1
        self.do_polysemous_training, self.polysemous_training = False, polysemous.PolysemousTraining()
        self._inner = PQIndex(self.d, M, nbits, metric_name(metric))
        self.pq = ProductQuantizer(self.d, M, nbits)
        self.code_size = self.pq.code_size

    def train(self, x: Any) -> None:
        self.pq.train(self._checked(x))
        if self.do_polysemous_training:
            self.polysemous_training.optimize_pq_for_hamming(self.pq)
        self._set_trained()

    def _given(self) -> dict[str, Any]:
        return {"codebooks": self.pq._books.numpy()}

    def _took(self, inner: Any) -> None:
        super()._took(inner)
        self.pq._books = inner.trained().get("codebooks", self.pq._books)

    def _encode(self, x: Floats) -> Bytes:
        return self.pq.compute_codes(x)

    def _decode(self, codes: Bytes) -> Floats:
        return self.pq.decode(codes)

    def _search(self, x: Any, k: int, params: SearchParameters | None) -> tuple[Any, Any]:
        own = params if isinstance(params, SearchParametersPQ) else None
        how, most = (self.search_type, self.polysemous_ht) if own is None else (own.search_type, own.polysemous_ht)
        if how == self.ST_PQ:
            indexPQ_stats.add(len(x), len(x) * self.ntotal)
            return super()._search(x, k, params)
        if params is not None and params.sel is not None:
            raise RuntimeError(f"IndexPQ: a selector and search_type {how}, expected ST_PQ")
        self._ready()
        return polysemous.search(self, x, k, how, most)

    def _how(self, params: SearchParameters | None) -> dict[str, Any]:
        return {"filter": params.sel} if isinstance(params, SearchParametersPQ) else super()._how(params)


class IndexPQFastScan(IndexPQ):
    """(d, M, nbits, metric, bbs), or (index, bbs) with what an IndexPQ holds: codes of 4 bits, which all indexes here
    scan fast, and without rounding distances. implem and qbs choose among the scans of faiss, and nothing here."""

    def __init__(self, *given: Any) -> None:
        self.implem = self.qbs = 0
        like = given[0] if isinstance(given[0], IndexPQ) else None
        super().__init__(*(given[:4] if like is None else (like.d, like.pq.M, like.pq.nbits, like.metric_type)))
        self.bbs = block_rows(given[4:] if like is None else given[1:])
        if self.pq.nbits != 4:
            raise RuntimeError(f"IndexPQFastScan: nbits is {self.pq.nbits}, expected 4")
        if like is not None:
            self._took(copy.deepcopy(like._inner))


def block_rows(given: tuple[Any, ...]) -> int:
    """Rows of faiss' blocks: a layout of its files, and of nothing here."""
    rows = int(given[0]) if given else 32
    if rows < 32 or rows % 32:
        raise RuntimeError(f"bbs is {rows}, expected a multiple of 32")
    return rows
