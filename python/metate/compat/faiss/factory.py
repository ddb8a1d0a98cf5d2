"""Indexes from strings and files, and back to files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metate.compat.faiss.base import METRIC_L2, Elementary, Index
from metate.compat.faiss.clustering import flat_like
from metate.compat.faiss.composite import IndexIDMap, IndexIDMap2, IndexPreTransform, IndexRefine, IndexRefineFlat
from metate.compat.faiss.indexes import IndexFlat, IndexPQ
from metate.compat.faiss.ivf import IndexIVF, IndexIVFFlat, IndexIVFPQ
from metate.compat.faiss.quantizer import ProductQuantizer
from metate.compat.faiss.transforms import LinearTransform, OPQMatrix, PCAMatrix, RandomRotationMatrix, VectorTransform
from metate.errors import FormatError
from metate.search import faiss_files as files
from metate.search.faiss_index import from_tree, to_tree
from metate.search.files import replacing


def index_factory(d: int, description: str, metric: int = METRIC_L2) -> Index:
    """The index of a string such as "OPQ16_64,IVF256,PQ16x4,RFlat" or "IDMap,Flat"."""
    parts, wrap, refine = description.split(","), None, ""
    chain: list[LinearTransform] = []
    if parts[0] in ("IDMap", "IDMap2"):
        wrap = parts.pop(0)
    elif parts[-1] in ("IDMap", "IDMap2"):
        wrap = parts.pop()
    if parts and (again := re.fullmatch(r"R(Flat)|Refine\((.+)\)", parts[-1])):
        refine = again[1] or again[2]
        parts.pop()
    width = d
    while parts and (step := _made(parts[0], width)):
        chain.append(step)
        width = step.d_out
        parts.pop(0)
    index = _elementary(width, parts, metric, description)
    for step in chain:
        if isinstance(step, OPQMatrix) and isinstance(index, (IndexPQ, IndexIVFPQ)):
            step.pq = index.pq  # type: ignore[assignment]
    index = IndexPreTransform(*chain, index) if chain else index
    if refine == "Flat":
        index = IndexRefineFlat(index)
    elif refine:
        index = IndexRefine(index, _elementary(d, [refine], metric, description))
    if wrap is not None:
        index = IndexIDMap(index) if wrap == "IDMap" else IndexIDMap2(index)
    return index


def _made(part: str, d: int) -> LinearTransform | None:
    """The transform that a part of a string stands for."""
    if pca := re.fullmatch(r"PCA(W?)(R?)(\d+)", part):
        return PCAMatrix(d, int(pca[3]), -0.5 if pca[1] else 0.0, bool(pca[2]))
    match = re.fullmatch(r"(OPQ|RR)(\d*)(?:_(\d+))?", part)
    if not match:
        return None
    kind, number, size = match.groups()
    out = int(size or (number if kind == "RR" and number else d))
    return OPQMatrix(d, int(number or 1), out) if kind == "OPQ" else RandomRotationMatrix(d, out)


def _elementary(d: int, parts: list[str], metric: int, description: str) -> Index:
    lists = re.fullmatch(r"IVF(\d+)([kM]?)(?:\((PQ.+)\))?", parts[0]) if len(parts) == 2 else None
    nlist = int(lists[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[lists[2]] if lists else 0
    code = parts[-1] if len(parts) == (2 if lists else 1) else ""
    match = re.fullmatch(r"PQ(\d+)(?:x(\d+))?(np)?", code)
    if code != "Flat" and not match:
        raise RuntimeError(
            f"index_factory: {description!r}, expected what metate has: "
            "[IDMap,][PCAn|OPQ…|RR…,][IVFn[(PQm)],]Flat|PQm[xb][,Refine(Flat|PQm)]"
        )
    if match:
        M, bits = int(match[1]), int(match[2] or 8)
        if d % M:
            raise RuntimeError(f"index_factory: {M} sub-vectors of {d} dimensions, expected a divisor")
        if lists:
            return IndexIVFPQ(_quantizer(d, lists[3], metric, description), d, nlist, M, bits, metric)
        return IndexPQ(d, M, bits, metric)
    if lists:
        return IndexIVFFlat(_quantizer(d, lists[3], metric, description), d, nlist, metric)
    return flat_like(d, metric)


def _quantizer(d: int, code: str | None, metric: int, description: str) -> Index:
    return _elementary(d, [code or "Flat"], metric, description)


# Files.


class VectorIOWriter:
    """Keeps in `data` what is written to it."""

    def __init__(self) -> None:
        self.data = bytearray()

    def __call__(self, part: bytes) -> None:
        self.data += part


class PyCallbackIOWriter:
    """Hands what is written to it to a function, `bs` bytes at a time."""

    def __init__(self, callback: Callable[[bytes], Any], bs: int = 1 << 20) -> None:
        self.callback, self.bs = callback, bs

    def __call__(self, part: bytes) -> None:
        for first in range(0, len(part), self.bs):
            self.callback(part[first : first + self.bs])


class VectorIOReader:
    """Gives what is in `data`: one index."""

    def __init__(self) -> None:
        self.data = bytearray()


class PyCallbackIOReader:
    """Asks a function for at most `bs` bytes at a time, until it gives none: one index."""

    def __init__(self, callback: Callable[[int], bytes], bs: int = 1 << 20) -> None:
        self.callback, self.bs = callback, bs

    @property
    def data(self) -> bytearray:
        found = bytearray()
        while part := self.callback(self.bs):
            found += part
        return found


def write_index(index: Index, path: str | VectorIOWriter | PyCallbackIOWriter) -> None:
    """In faiss' own format, to a file whole or not at all."""
    if isinstance(path, (VectorIOWriter, PyCallbackIOWriter)):
        path(serialize_index(index).tobytes())
        return
    tree = _tree(index)
    with replacing(Path(path)) as file:
        files.write_tree(tree, file)


IO_FLAG_READ_ONLY, IO_FLAG_SKIP_PRECOMPUTE_TABLE, IO_FLAG_MMAP, IO_FLAG_MMAP_IFC = 2, 16, 8 | 0x646F0000, 1 << 9


class ReadError(FormatError, RuntimeError):
    """A FormatError that code written for faiss catches too."""


def read_index(path: str | VectorIOReader | PyCallbackIOReader, *flags: Any) -> Index:
    """An index that faiss or `write_index` wrote; FormatError for anything else. Flags change nothing: it is copied."""
    if isinstance(path, (VectorIOReader, PyCallbackIOReader)):
        return deserialize_index(np.frombuffer(bytes(path.data), np.uint8))
    try:
        return _index(files.read_tree(path))
    except FormatError as error:
        raise ReadError(f"{error} ({path})") from None


def write_ProductQuantizer(pq: ProductQuantizer, path: str) -> None:
    with replacing(Path(path)) as file:
        files.write_codebooks(pq._books.numpy(), file)


def read_ProductQuantizer(path: str) -> ProductQuantizer:
    try:
        books = files.read_codebooks(path)
    except FormatError as error:
        raise ReadError(f"{error} ({path})") from None
    M, levels, width = books.shape
    pq = ProductQuantizer(M * width, M, levels.bit_length() - 1)
    pq.centroids[...] = books.reshape(-1)
    return pq


def serialize_index(index: Index) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    files.write_tree(_tree(index), file)
    return np.frombuffer(file.getvalue(), np.uint8)


def deserialize_index(data: npt.NDArray[np.uint8]) -> Index:
    try:
        return _index(files.parse(data.tobytes()))
    except FormatError as error:
        raise ReadError(str(error)) from None


def clone_index(index: Index) -> Index:
    return deserialize_index(serialize_index(index))


def _tree(index: Index) -> files.Node:
    head = index.d, index.ntotal, index.metric_type, index.is_trained
    if isinstance(index, IndexIDMap):
        return files.IDMap(*head, _tree(index.index), index.id_map, isinstance(index, IndexIDMap2))
    if isinstance(index, IndexPreTransform):
        return files.PreTransform(*head, [_step(step) for step in index.chain], _tree(index.index))
    if isinstance(index, IndexRefine):
        return files.Refine(*head, _tree(index.base_index), _tree(index.refine_index), index.k_factor)
    if isinstance(index, IndexIVF):
        index._inner.nprobe = min(index.nprobe, index.nlist)
        tree = to_tree(index._inner)
        assert isinstance(tree, files.IVF)
        tree.quantizer = _tree(index.quantizer)
        return tree
    return to_tree(index._inner)  # type: ignore[attr-defined]


def _step(step: VectorTransform) -> files.Transform:
    if not isinstance(step, LinearTransform):
        raise RuntimeError(f"write_index: a transform is {type(step).__name__}, expected a linear one")
    A = step.A.reshape(step.d_out, step.d_in)
    pca = None
    if isinstance(step, PCAMatrix):
        pca = files.PCA(
            step.eigen_power, step.epsilon, step.random_rotation, step.mean, step.eigenvalues, step.PCAMat
        )  # fmt: skip
    return files.Transform(A, step.b if step.have_bias else None, step.is_trained, pca)


def _index(node: files.Node) -> Index:
    if isinstance(node, files.IDMap):
        mapped = (IndexIDMap2 if node.two_way else IndexIDMap).__new__(IndexIDMap2 if node.two_way else IndexIDMap)
        inner = _index(node.index)
        Index.__init__(mapped, inner.d, inner.metric_type)
        mapped.index, mapped.own_fields, mapped._ids = inner, True, node.ids.copy()
        return mapped
    if isinstance(node, files.PreTransform):
        return IndexPreTransform(*map(_transform, node.chain), _index(node.index))
    if isinstance(node, files.Refine):
        base, fine = _index(node.base), _index(node.refine)
        if base.ntotal != fine.ntotal:
            raise files.complain("refined index", f"{base.ntotal} vectors", f"{fine.ntotal}, and that it is trained")
        flat = isinstance(fine, IndexFlat)
        refined = IndexRefineFlat(base, fine.reconstruct_n()) if flat else IndexRefine(base, fine)
        refined.k_factor = node.k_factor
        return refined
    return _leaf(from_tree(node), node)


def _transform(step: files.Transform) -> LinearTransform:
    d_out, d_in = step.A.shape
    transform = LinearTransform(d_in, d_out)
    if (pca := step.pca) is not None:
        transform = PCAMatrix(d_in, d_out, pca.eigen_power, pca.random_rotation)
        transform.epsilon, transform.PCAMat = pca.epsilon, pca.directions.copy()
        transform.mean, transform.eigenvalues = pca.mean.copy(), pca.eigenvalues.copy()
    if step.is_trained:
        transform.set(step.A, step.b)
    return transform


def _leaf(inner: Any, node: files.Node) -> Index:
    found: Elementary
    if isinstance(node, files.IVF):
        quantizer = _index(node.quantizer)
        if node.codebooks is None:
            found = IndexIVFFlat(quantizer, node.d, inner.nlist, node.metric)
        else:
            found = IndexIVFPQ(quantizer, node.d, inner.nlist, inner.M, inner.bits, node.metric)
            found.by_residual = inner.residual
        found.nprobe = node.nprobe
    elif isinstance(node, files.PQ):
        found = IndexPQ(node.d, inner.M, inner.bits, node.metric)
    else:
        found = flat_like(node.d, node.metric)
    found._took(inner)
    return found


# Ways into an index.


def downcast_index(index: Index) -> Index:
    return index


def extract_index_ivf(index: Index) -> IndexIVF:
    """The index of lists within others."""
    while not isinstance(index, IndexIVF):
        inner = getattr(index, "index", None) or getattr(index, "base_index", None)
        if inner is None:
            raise RuntimeError(f"extract_index_ivf: {type(index).__name__} has no lists")
        index = inner
    return index


class ParameterSpace:
    """`ParameterSpace().set_index_parameter(index, "nprobe", 8)`"""

    def set_index_parameter(self, index: Index, name: str, value: float) -> None:
        if name == "nprobe":
            extract_index_ivf(index).nprobe = int(value)
        elif name == "k_factor_rf" and isinstance(index, IndexRefine):
            index.k_factor = float(value)
        else:
            raise RuntimeError(f"ParameterSpace: {name!r}, expected nprobe or k_factor_rf")

    def set_index_parameters(self, index: Index, text: str) -> None:
        for part in text.split(","):
            name, _, value = part.partition("=")
            self.set_index_parameter(index, name, float(value))
