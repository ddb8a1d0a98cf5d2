"""Indexes from strings and files, and back to files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from metate.compat.faiss.base import Elementary, Index
from metate.compat.faiss.clustering import flat_like
from metate.compat.faiss.composite import IndexIDMap, IndexIDMap2, IndexPreTransform, IndexRefine, IndexRefineFlat
from metate.compat.faiss.distances import METRIC_L2
from metate.compat.faiss.indexes import IndexFlat, IndexPQ, IndexPQFastScan, IndexScalarQuantizer
from metate.compat.faiss.ivf import (
    DirectMap,
    Index2Layer,
    IndexIVF,
    IndexIVFFlat,
    IndexIVFPQ,
    IndexIVFPQFastScan,
    IndexIVFScalarQuantizer,
)
from metate.compat.faiss.ivflib import extract_index_ivf
from metate.compat.faiss.quantizer import ProductQuantizer, ScalarQuantizer
from metate.compat.faiss.streams import IOReader, IOWriter
from metate.compat.faiss.transforms import (
    LinearTransform,
    NormalizationTransform,
    OPQMatrix,
    PCAMatrix,
    RandomRotationMatrix,
    VectorTransform,
)
from metate.errors import FormatError
from metate.search import faiss_files as files
from metate.search import faiss_nodes as nodes
from metate.search.faiss_index import from_tree, to_tree
from metate.search.files import replacing

SCALARS = {"SQ8": ScalarQuantizer.QT_8bit, "SQfp16": ScalarQuantizer.QT_fp16, "SQbf16": ScalarQuantizer.QT_bf16}


def index_factory(d: int, description: str, metric: int = METRIC_L2) -> Index:
    """The index of a string such as "OPQ16_64,IVF256,PQ16x4,RFlat" or "IDMap,Flat"."""
    parts, wrap, refine = description.split(","), None, ""
    chain: list[VectorTransform] = []
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


def _made(part: str, d: int) -> VectorTransform | None:
    """The transform that a part of a string stands for."""
    if part in ("L2norm", "L2Norm"):
        return NormalizationTransform(d)
    if pca := re.fullmatch(r"PCA(W?)(R?)(\d+)", part):
        return PCAMatrix(d, int(pca[3]), -0.5 if pca[1] else 0.0, bool(pca[2]))
    match = re.fullmatch(r"(OPQ|RR)(\d*)(?:_(\d+))?", part)
    if not match:
        return None
    kind, number, size = match.groups()
    out = int(size or (number if kind == "RR" and number else d))
    return OPQMatrix(d, int(number or 1), out) if kind == "OPQ" else RandomRotationMatrix(d, out)


def _elementary(d: int, parts: list[str], metric: int, description: str) -> Index:
    if layers := re.fullmatch(r"Residual(\d+),PQ(\d+)(?:x(\d+))?(?:np)?", ",".join(parts)):
        return Index2Layer(flat_like(d, metric), int(layers[1]), int(layers[2]), int(layers[3] or 8), metric)
    lists = re.fullmatch(r"IVF(\d+)([kM]?)(?:\((PQ.+)\))?", parts[0]) if len(parts) == 2 else None
    nlist = int(lists[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[lists[2]] if lists else 0
    code = parts[-1] if len(parts) == (2 if lists else 1) else ""
    match = re.fullmatch(r"PQ(\d+)(?:x(\d+))?(?:(np)|(fsr?)(?:_(\d+))?)?", code)
    if code not in ("Flat", *SCALARS) and not match:
        raise RuntimeError(
            f"index_factory: {description!r}, expected what metate has: [IDMap,][PCAn|OPQ…|RR…|L2norm,]"
            "[IVFn[(PQm)],]Flat|PQm[xb]|PQmx4fs|SQ8|SQfp16|SQbf16[,Refine(Flat|SQ8|PQm)], or Residualn,PQm"
        )
    if match:
        M, bits, rows = int(match[1]), int(match[2] or 8), [int(match[5])] if match[5] else []
        if d % M:
            raise RuntimeError(f"index_factory: {M} sub-vectors of {d} dimensions, expected a divisor")
        coded: IndexPQ | IndexIVFPQ
        if lists:
            kind = IndexIVFPQFastScan if match[4] else IndexIVFPQ
            coded = kind(_quantizer(d, lists[3], metric, description), d, nlist, M, bits, metric, *rows)
            coded.by_residual = match[4] != "fs"
        else:
            coded = (IndexPQFastScan if match[4] else IndexPQ)(d, M, bits, metric, *rows)
        coded.do_polysemous_training = not (match[3] or match[4])
        return coded
    if code in SCALARS:
        if not lists:
            return IndexScalarQuantizer(d, SCALARS[code], metric)
        return IndexIVFScalarQuantizer(_quantizer(d, lists[3], metric, description), d, nlist, SCALARS[code], metric)
    if lists:
        return IndexIVFFlat(_quantizer(d, lists[3], metric, description), d, nlist, metric)
    return flat_like(d, metric)


def _quantizer(d: int, code: str | None, metric: int, description: str) -> Index:
    return _elementary(d, [code or "Flat"], metric, description)


# Files.


def write_index(index: Index | None, path: str | IOWriter) -> None:
    """In faiss' own format, to a file whole or not at all."""
    _write(path, lambda file: _write_node(index, file))


def _write(path: str | IOWriter, write: Callable[[BinaryIO], None]) -> None:
    if isinstance(path, IOWriter):
        memory = io.BytesIO()
        write(memory)
        path(memory.getvalue())
        return
    with replacing(Path(path)) as file:
        write(file)


def _write_node(index: Index | None, file: BinaryIO) -> None:
    if index is None:
        file.write(b"null")
    else:
        files.write_tree(_tree(index), file)


IO_FLAG_READ_ONLY, IO_FLAG_SKIP_PRECOMPUTE_TABLE, IO_FLAG_MMAP, IO_FLAG_MMAP_IFC = 2, 16, 8 | 0x646F0000, 1 << 9


class ReadError(FormatError, RuntimeError):
    """A FormatError that code written for faiss catches too."""


def read_index(path: str | IOReader, *flags: Any) -> Any:
    """An index that faiss or `write_index` wrote; FormatError for anything else. Flags change nothing: it is copied."""
    return _read(path, _root, _made_of)


def _root(reader: files.Reader) -> nodes.Node | None:
    if reader.fourcc() == "null":
        return None
    reader.at -= 4
    return files.read_node(reader)


def _made_of(root: nodes.Node | None) -> Index | None:
    return None if root is None else _index(root)


def _read(path: str | IOReader, read: Callable[[files.Reader], Any], make: Callable[[Any], Any]) -> Any:
    try:
        return make(files.from_stream(path.read, read) if isinstance(path, IOReader) else files.from_file(path, read))
    except FormatError as error:
        raise ReadError(str(error) if isinstance(path, IOReader) else f"{error} ({path})") from None


def write_ProductQuantizer(pq: ProductQuantizer, path: str | IOWriter) -> None:
    _write(path, lambda file: files.write_codebooks(pq._books.numpy(), file))


def read_ProductQuantizer(path: str | IOReader) -> ProductQuantizer:
    return _read(path, files.read_codebooks, _quantizer_of)  # type: ignore[no-any-return]


def _quantizer_of(books: nodes.Floats) -> ProductQuantizer:
    M, levels, width = books.shape
    pq = ProductQuantizer(M * width, M, levels.bit_length() - 1)
    pq.centroids[...] = books.reshape(-1)
    return pq


def write_VectorTransform(vt: VectorTransform, path: str | IOWriter) -> None:
    _write(path, lambda file: files.write_transform(_step(vt), file))


def read_VectorTransform(path: str | IOReader) -> VectorTransform:
    return _read(path, files.read_transform, _transform)  # type: ignore[no-any-return]


def shard_ivf_index_centroids(
    index: IndexIVF, shard_count: int = 20, filename_template: str = "shard.%d.index",
    sharding_function: Callable[[int, int], int] | None = None, generate_ids: bool = False,
) -> None:  # fmt: skip
    """Writes copies of an index, each with the centroids that the function of (number, shard_count), by default the
    remainder, gives it: under their numbers, so that lists stay what they are, or, not trained, under new ones."""
    op, count = "shard_ivf_index_centroids", index.quantizer.ntotal
    if not count:
        raise RuntimeError(f"{op}: the quantizer has no centroids, expected some to shard")
    if index.is_trained and not generate_ids:
        raise RuntimeError(f"{op}: generate_ids is False of a trained index, expected True: lists keep their numbers")
    centroids = np.asarray(index.quantizer.reconstruct_n())
    shard_of = sharding_function or (lambda number, count: number % count)
    home = np.array([shard_of(i, shard_count) for i in range(count)])
    if home.min() < 0 or home.max() >= shard_count:
        raise RuntimeError(f"{op}: shards {home.min()} to {home.max()}, expected 0 to {shard_count - 1}")
    tree = _tree(index)
    assert isinstance(tree, nodes.IVF)
    for shard in range(shard_count):
        numbers = np.flatnonzero(home == shard)
        head = index.d, len(numbers), index.quantizer.metric_type, True
        part: nodes.Node = nodes.Flat(*head, centroids[numbers])
        part = nodes.IDMap(*head, part, numbers, True) if generate_ids else part
        _write(filename_template % shard, partial(files.write_tree, replace(tree, quantizer=part)))


def serialize_index(index: Index | None) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    _write_node(index, file)
    return np.frombuffer(file.getvalue(), np.uint8)


def deserialize_index(data: npt.NDArray[np.uint8]) -> Any:
    try:
        return _made_of(files.whole(data.tobytes(), _root))
    except FormatError as error:
        raise ReadError(str(error)) from None


def clone_index(index: Index) -> Any:
    return deserialize_index(serialize_index(index))


def _tree(index: Index) -> nodes.Node:
    head = index.d, index.ntotal, index.metric_type, index.is_trained
    if isinstance(index, IndexIDMap):
        return nodes.IDMap(*head, _tree(index.index), index.id_map, isinstance(index, IndexIDMap2))
    if isinstance(index, IndexPreTransform):
        return nodes.PreTransform(*head, [_step(step) for step in index.chain], _tree(index.index))
    if isinstance(index, IndexRefine):
        return nodes.Refine(*head, _tree(index.base_index), _tree(index.refine_index), index.k_factor)
    if isinstance(index, IndexIVF):
        index._inner.nprobe = min(index.nprobe, index.nlist)
        tree = to_tree(index._inner)
        assert isinstance(tree, nodes.IVF)
        tree.quantizer, tree.fast = _tree(index.quantizer), isinstance(index, IndexIVFPQFastScan)
        tree.direct = index.direct_map.type
        if isinstance(index, IndexIVFScalarQuantizer):
            tree.by_residual, tree.trained = index.by_residual, index.sq.trained
        return tree
    if isinstance(index, Index2Layer):
        codes = index.codes.reshape(-1, index.code_size)
        quantizer = _tree(index.q1.quantizer)
        return nodes.TwoLayer(*head, quantizer, index.q1.nlist, index.pq._books.numpy(), codes)
    leaf = to_tree(index._inner)  # type: ignore[attr-defined]
    if isinstance(leaf, nodes.SQ) and isinstance(index, IndexScalarQuantizer):
        leaf.trained = index.sq.trained
    if isinstance(leaf, nodes.PQ):
        leaf.fast = isinstance(index, IndexPQFastScan)
        assert isinstance(index, IndexPQ)
        leaf.asked = index.search_type, index.encode_signs, index.polysemous_ht
    return leaf


def _step(step: VectorTransform) -> nodes.Step:
    if isinstance(step, NormalizationTransform):
        return nodes.Normalization(step.d_in)
    if not isinstance(step, LinearTransform):
        raise RuntimeError(f"write_index: a transform is {type(step).__name__}, expected a linear one")
    A = step.A.reshape(step.d_out, step.d_in)
    pca = None
    if isinstance(step, PCAMatrix):
        pca = nodes.PCA(
            step.eigen_power, step.epsilon, step.random_rotation, step.mean, step.eigenvalues, step.PCAMat
        )  # fmt: skip
    return nodes.Transform(A, step.b if step.have_bias else None, step.is_trained, pca)


def _index(node: nodes.Node) -> Index:
    if isinstance(node, nodes.IDMap):
        mapped = (IndexIDMap2 if node.two_way else IndexIDMap).__new__(IndexIDMap2 if node.two_way else IndexIDMap)
        inner = _index(node.index)
        Index.__init__(mapped, inner.d, inner.metric_type)
        mapped.index, mapped.own_fields, mapped._ids = inner, True, node.ids.copy()
        return mapped
    if isinstance(node, nodes.PreTransform):
        return IndexPreTransform(*map(_transform, node.chain), _index(node.index))
    if isinstance(node, nodes.Refine):
        base, fine = _index(node.base), _index(node.refine)
        if base.ntotal != fine.ntotal:
            raise files.complain("refined index", f"{base.ntotal} vectors", f"{fine.ntotal}, and that it is trained")
        kind = IndexRefineFlat if isinstance(fine, IndexFlat) else IndexRefine
        refined = kind.__new__(kind)
        IndexRefine.__init__(refined, base, fine)
        refined.k_factor = node.k_factor
        return refined
    if isinstance(node, nodes.IVF):  # lists are found by the quantizer's metric here, whatever that of the index
        stored = replace(node, quantizer=replace(_of_all_lists(node), metric=node.metric))
        if node.codebooks is None:  # vectors less centroids are what the index within knows
            stored.by_residual = False
        return _leaf(from_tree(stored), node)
    if isinstance(node, nodes.TwoLayer):
        M, levels, _ = node.codebooks.shape
        layered = Index2Layer(_index(node.quantizer), node.nlist, M, levels.bit_length() - 1, node.metric)
        layered.pq._books = torch.from_numpy(node.codebooks.copy())
        layered.is_trained = node.is_trained
        if len(node.codes):
            layered.add_sa_codes(node.codes)
        return layered
    plain = replace(node, asked=None) if isinstance(node, nodes.PQ) else node
    return _leaf(from_tree(plain), node)


def _of_all_lists(node: nodes.IVF) -> nodes.Node:
    """The quantizer; of one with ids a flat one, zeros where it has no centroid; of an untrained index none."""
    if not isinstance(node.quantizer, nodes.IDMap):
        return node.quantizer if node.is_trained else nodes.Flat(node.d, 0, node.metric)
    centroids = np.zeros((len(node.length), node.d), np.float32)
    if node.is_trained:
        centroids[node.quantizer.ids] = _index(node.quantizer.index).reconstruct_n()
    return nodes.Flat(node.d, len(centroids), node.metric, True, centroids)


def _transform(step: nodes.Step) -> VectorTransform:
    if isinstance(step, nodes.Normalization):
        return NormalizationTransform(step.d)
    d_out, d_in = step.A.shape
    transform = LinearTransform(d_in, d_out)
    if (pca := step.pca) is not None:
        transform = PCAMatrix(d_in, d_out, pca.eigen_power, pca.random_rotation)
        transform.epsilon, transform.PCAMat = pca.epsilon, pca.directions.copy()
        transform.mean, transform.eigenvalues = pca.mean.copy(), pca.eigenvalues.copy()
    if step.is_trained:
        transform.set(step.A, step.b)
    return transform


def _leaf(inner: Any, node: nodes.Node) -> Index:
    found: Elementary
    if isinstance(node, nodes.IVF):
        quantizer = _index(node.quantizer)
        if node.kind is not None:
            found = IndexIVFScalarQuantizer(
                quantizer, node.d, inner.nlist, node.kind, node.metric, node.by_residual
            )  # fmt: skip
            found.sq.trained = node.trained.copy()
        elif node.codebooks is None:
            found = IndexIVFFlat(quantizer, node.d, inner.nlist, node.metric)
        else:
            kind = IndexIVFPQFastScan if node.fast else IndexIVFPQ
            found = kind(quantizer, node.d, inner.nlist, inner.M, inner.bits, node.metric)
            found.by_residual = inner.residual
        found.nprobe, found.direct_map = node.nprobe, DirectMap(node.direct)
    elif isinstance(node, nodes.PQ):
        coded = found = (IndexPQFastScan if node.fast else IndexPQ)(node.d, inner.M, inner.bits, node.metric)
        if node.asked is not None:
            coded.search_type, coded.encode_signs, coded.polysemous_ht = node.asked
    elif isinstance(node, nodes.SQ):
        scalar = found = IndexScalarQuantizer(node.d, node.kind, node.metric)
        scalar.sq.trained = node.trained.copy()
    else:
        found = flat_like(node.d, node.metric)
    found._took(inner)
    return found


# Ways into an index.


def downcast(whole: Any) -> Any:
    """It is what it is."""
    return whole


downcast_index = downcast_VectorTransform = downcast_Quantizer = downcast_InvertedLists = downcast


class ParameterSpace:
    """`ParameterSpace().set_index_parameter(index, "nprobe", 8)`"""

    def set_index_parameter(self, index: Index, name: str, value: float) -> None:
        if name == "nprobe":
            extract_index_ivf(index).nprobe = int(value)
        elif name == "ht" and isinstance(index, IndexPQ):
            index.polysemous_ht = int(value)
            index.search_type = IndexPQ.ST_polysemous if value else IndexPQ.ST_PQ
        elif name == "k_factor_rf" and isinstance(index, IndexRefine):
            index.k_factor = float(value)
        else:
            raise RuntimeError(f"ParameterSpace: {name!r}, expected nprobe, k_factor_rf or ht")

    def set_index_parameters(self, index: Index, text: str) -> None:
        for part in text.split(","):
            name, _, value = part.partition("=")
            self.set_index_parameter(index, name, float(value))
