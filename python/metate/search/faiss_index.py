"""Indexes from faiss' files and back: the tree of a file becomes one index with its rotation, refinement and ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metate.ops.pq import pq_decode
from metate.search import faiss_files as files
from metate.search import faiss_nodes as nodes
from metate.search.base import State
from metate.search.codecs import Product, Vectors
from metate.search.files import replacing
from metate.search.index import MOST_ID, Index
from metate.search.indexes import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex
from metate.search.storage import Integers, Lists

_AT_ONCE = 1 << 16  # rows
SQ_STORAGE = {nodes.SQ_BYTE: "sq8", nodes.SQ_HALF: "float16", nodes.SQ_BFLOAT: "bfloat16"}
_SIGN = np.uint8(128)  # the difference between numbers from 0 to 255 and from -128 to 127


def read_faiss(path: str | Path) -> Index:
    """The index in a file that faiss wrote: flat, PQ, IVF-flat or IVF-PQ, also for the fast scan, rotated (OPQ),
    refined by full vectors, or with an id map; or of 8-bit, float16 or bfloat16 numbers, flat or in lists (which
    metate.compat.faiss reads with residuals too).

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"metate.search.read_faiss: path is {path}, expected a file that exists")
    return from_tree(files.from_file(path, files.read_node))


def write_faiss(index: Index, path: str | Path) -> None:
    """Writes a file that faiss reads, whole or not at all.

    Vectors of refinement that are kept in fewer bits are written as float32; an index of cosines as one of
    inner products, over the normalised vectors.

    Raises:
        OSError: the file cannot be written.
    """
    tree = to_tree(index)
    with replacing(Path(path)) as file:
        files.write_tree(tree, file)


def from_tree(node: nodes.Node) -> Index:
    """One index of the nodes; its arrays are copies."""
    names = refined = rotation = None
    if isinstance(node, nodes.IDMap):
        names, node = node.ids, node.index
    if isinstance(node, nodes.Refine):
        if not isinstance(node.refine, nodes.Flat):
            raise files.complain("refine index", type(node.refine).__name__, "a flat one")
        refined, node = node.refine.vectors, node.base
    if isinstance(node, nodes.PreTransform):
        rotation, node = _rotation(node), node.index
    index = _like(node, rotation is not None, refined is not None)
    if not node.is_trained:
        return index
    found = {"rotation": rotation, "centroids": None, "codebooks": None}
    if isinstance(node, nodes.IVF):
        if node.quantizer.metric != node.metric:
            raise files.complain("metric of the quantizer", node.quantizer.metric, f"the index' own, {node.metric}")
        found["centroids"], found["codebooks"] = _centroids(node.quantizer), node.codebooks
    elif isinstance(node, nodes.PQ):
        found["codebooks"] = node.codebooks
    elif isinstance(node, nodes.SQ):
        found.update(levels_of(node.trained))
    if isinstance(node, nodes.IVF) and node.kind is not None:
        found.update(levels_of(node.trained))
    index.set_trained({name: array.copy() for name, array in found.items() if array is not None})
    index._state = _filled(index, node, names, refined)
    return index


def levels_of(trained: nodes.Floats) -> dict[str, nodes.Floats]:
    """What Vectors ("sq8") is told where faiss takes the middle of each of 256 steps."""
    if not len(trained):
        return {}
    least, more = trained.astype(np.float64).reshape(2, -1)
    scale = np.maximum(more / 255, np.finfo(np.float32).tiny)
    return {"vectors.scale": scale.astype(np.float32), "vectors.offset": (least + 128.5 * scale).astype(np.float32)}


def steps_of(scale: nodes.Floats, offset: nodes.Floats) -> nodes.Floats:
    """The inverse."""
    least = offset.astype(np.float64) - 128.5 * scale
    return np.concatenate([least, 255 * scale.astype(np.float64)]).astype(np.float32)


def sq_bytes(rows: Tensor) -> nodes.Bytes:
    """Rows of a column of vectors as faiss has them."""
    stored = _as_bytes(rows.view(torch.int16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy())
    return stored ^ _SIGN if rows.dtype == torch.int8 else stored


def sq_rows(stored: nodes.Bytes, dtype: torch.dtype) -> Tensor:
    """The inverse."""
    rows = torch.from_numpy(stored ^ _SIGN if dtype == torch.int8 else stored.copy())
    return rows.reshape(-1).view(dtype).view(len(stored), stored.shape[1] // dtype.itemsize)


def _centroids(quantizer: nodes.Node) -> nodes.Floats:
    if isinstance(quantizer, nodes.Flat):
        return quantizer.vectors
    if not isinstance(quantizer, nodes.PQ):
        raise files.complain("quantizer", type(quantizer).__name__, "the centroids of all lists")
    codes, books = (torch.from_numpy(array.copy()) for array in (quantizer.codes, quantizer.codebooks))
    centroids: nodes.Floats = pq_decode(codes, books).numpy()
    return centroids


def _rotation(node: nodes.PreTransform) -> nodes.Floats:
    """The matrix of a rotation; of an untrained one nothing but its shape."""
    step = node.chain[0] if len(node.chain) == 1 else None
    if not isinstance(step, nodes.Transform) or step.b is not None or node.d != node.index.d:
        raise files.complain("transforms", f"{len(node.chain)} of them", "one rotation without bias")
    A = step.A
    if node.is_trained and not (np.abs(A).max() < 2 and np.allclose(A @ A.T, np.eye(node.d), atol=1e-3)):
        raise files.complain("transform", "not a rotation", "an orthonormal matrix")
    return A


def _like(node: nodes.Node, rotated: bool, refined: bool) -> Index:
    """An empty index of the kind."""
    metric, refine = nodes.METRICS[node.metric], "float32" if refined else None
    if isinstance(node, nodes.PQ):
        if node.asked is not None and node.asked[0]:
            raise files.complain("search_type", node.asked[0], "0, or metate.compat.faiss")
        M, levels, _ = node.codebooks.shape
        return PQIndex(node.d, M, levels.bit_length() - 1, metric, opq=rotated, refine=refine)
    index: Index
    if isinstance(node, nodes.IVF) and node.codebooks is not None:
        M, levels, _ = node.codebooks.shape
        index = IVFPQIndex(
            node.d, len(node.length), M, levels.bit_length() - 1, metric, residual=node.by_residual, opq=rotated,
            refine=refine,
        )  # fmt: skip
    elif rotated or refined:
        raise files.complain("index", type(node).__name__, "PQ or IVF-PQ below a rotation or refinement")
    elif isinstance(node, nodes.IVF):
        if node.by_residual:
            raise files.complain("by_residual", "true of scalar-quantised lists", "false, or metate.compat.faiss")
        storage = "float32" if node.kind is None else SQ_STORAGE[node.kind]
        index = IVFFlatIndex(node.d, len(node.length), metric, storage=storage)
    elif isinstance(node, nodes.Flat):
        return FlatIndex(node.d, metric)
    elif isinstance(node, nodes.SQ):
        return FlatIndex(node.d, metric, storage=SQ_STORAGE[node.kind])
    else:
        raise files.complain("index", type(node).__name__, "one id map, refinement and rotation, in this order")
    index.nprobe = min(node.nprobe, len(node.length)) if isinstance(node, nodes.IVF) else 1
    return index


def _filled(index: Index, node: nodes.Node, names: Integers | None, refined: nodes.Floats | None) -> State:
    """The snapshot that holds the rows."""
    model, columns, places = index._state.model, {}, np.arange(node.ntotal)
    length = np.array([node.ntotal])
    if isinstance(node, nodes.IVF):
        places, length = node.ids, node.length
        plain = node.codebooks is None and node.kind is None
        stored = node.codes.view(np.float32) if plain else node.codes
    else:
        stored = node.vectors if isinstance(node, nodes.Flat) else node.codes  # type: ignore[attr-defined]
    if isinstance(node, nodes.SQ) or (isinstance(node, nodes.IVF) and node.kind is not None):
        columns["vectors"] = sq_rows(node.codes, index.column_types()["vectors"][1])
    else:
        columns["codes" if isinstance(index.codec, Product) else "vectors"] = torch.from_numpy(stored.copy())
    if (names is not None or refined is not None) and ((places < 0) | (places >= node.ntotal)).any():
        raise files.complain("ids", "beyond the vectors", f"0 to {node.ntotal - 1} below a map or refinement")
    if refined is not None:
        columns["refine"] = torch.from_numpy(refined[places])
    if "bias" in index.column_types():
        columns["bias"] = _bias(index, model["centroids"], columns["codes"], length)
    ids = places if names is None else names[places]
    if len(np.unique(ids)) != len(ids) or ((ids < 0) | (ids > MOST_ID)).any():
        raise files.complain("ids", "out of range or given twice", f"each once, from 0 to {MOST_ID}")
    if names is not None or isinstance(node, nodes.IVF):
        columns["ids"] = torch.from_numpy(ids.copy())
    return State(model, Lists.packed(length, index.codec.laid_out(columns)), int(ids.max()) + 1 if len(ids) else 0)


def _bias(index: Index, centroids: Tensor, codes: Tensor, length: Integers) -> Tensor:
    assert isinstance(index.codec, Product)
    home = torch.from_numpy(np.repeat(np.arange(len(length)), length))
    parts = [
        index.codec.bias(index._state.model, c, centroids[h])
        for c, h in zip(codes.split(_AT_ONCE), home.split(_AT_ONCE), strict=True)
    ]
    return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *parts])


def to_tree(index: Index) -> nodes.Node:
    """The nodes that faiss has for it."""
    state = index._state
    lists, model = state.lists, {name: tensor.cpu().numpy() for name, tensor in state.model.items()}
    rows, trained = lists.rows(), index.is_trained
    metric = next(number for number, name in nodes.METRICS.items() if name == index._scan_metric)
    ids, n = lists.ids(rows), len(rows)
    head = index.dim, n, metric, trained
    sequential = bool(np.array_equal(ids, np.arange(n)))
    node: nodes.Node
    books, codec, kind, steps = None, index.codec, None, np.zeros(0, np.float32)
    if isinstance(codec, Product):
        stored = _rows(state, "codes").numpy()
        books = model.get("codebooks", np.zeros(codec.trained["codebooks"], np.float32))
    elif index.nlist is None and codec.storage != "float32":
        return _mapped(nodes.SQ(*head, *_scalar(state, codec), sq_bytes(_rows(state, codec.name))), ids, sequential)
    elif codec.storage != "float32":
        kind, steps = _scalar(state, codec)
        stored = sq_bytes(_rows(state, codec.name))
    else:
        stored = _full(index, state, codec)
    if index.nlist is not None:
        centroids = model.get("centroids", np.zeros((0, index.dim), np.float32))
        quantizer = nodes.Flat(index.dim, len(centroids), metric, trained, centroids)
        inner = ids if index.refine is None else np.arange(n)
        node = nodes.IVF(
            *head, index.nprobe, quantizer, lists.living(), _as_bytes(stored), inner, books,
            isinstance(codec, Product) and codec.residual, False, kind, steps,
        )  # fmt: skip
    elif books is not None:
        node = nodes.PQ(*head, books, stored)
    else:
        node = nodes.Flat(*head, stored)
    if index.opq:
        A = model.get("rotation", np.zeros((index.dim, index.dim), np.float32))
        node = nodes.PreTransform(*head, [nodes.Transform(A, None, trained)], node)
    if index.refine is not None:
        full = _full(index, state, index.refine)
        node = nodes.Refine(*head, node, nodes.Flat(index.dim, n, metric, True, full), 4.0)
    return _mapped(node, ids, sequential or (index.nlist is not None and index.refine is None))


def _mapped(node: nodes.Node, ids: Integers, known: bool) -> nodes.Node:
    """With ids that the node does not know."""
    return node if known else nodes.IDMap(node.d, node.ntotal, node.metric, node.is_trained, node, ids)


def _scalar(state: State, codec: Vectors) -> tuple[int, nodes.Floats]:
    """What a quantizer of numbers is, and what it was trained to."""
    kind = next(number for number, storage in SQ_STORAGE.items() if storage == codec.storage)
    scale, offset = (state.model.get(f"{codec.name}.{part}") for part in ("scale", "offset"))
    if scale is None or offset is None:
        return kind, np.zeros(0, np.float32)
    return kind, steps_of(scale.numpy(), offset.numpy())


def _rows(state: State, name: str) -> Tensor:
    """The living rows of a column, list by list."""
    column = state.lists.columns[name]
    none = torch.empty((0, *column.shape[1:]), dtype=column.dtype, device="cpu")
    return torch.cat([none, *(block.cpu() for block in state.lists.packed_blocks(name))])


def _full(index: Index, state: State, codec: Vectors) -> nodes.Floats:
    """Full vectors as float32."""
    rows = _rows(state, codec.name).to(index.device)
    x: nodes.Floats = (codec.decode(state.model, {codec.name: rows}) if len(rows) else rows.float()).cpu().numpy()
    return x


def _as_bytes(x: Any) -> nodes.Bytes:
    return np.ascontiguousarray(x).view(np.uint8) if len(x) else np.zeros((0, x.itemsize * x.shape[1]), np.uint8)
