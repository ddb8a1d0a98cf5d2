"""faiss' own files, read and written.

A file is a tree of four-letter nodes (faiss_nodes.py). Reading makes the tree first, bounds-checked: a length is
compared with what is left of the file before anything is made of it. Layout: faiss/impl/index_write.cpp.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from metate.errors import FormatError, fail
from metate.search.faiss_blocks import ROWS, blocks_of, codes_of
from metate.search.faiss_nodes import (
    INNER_PRODUCT,
    IVF,
    L2,
    LINF,
    PCA,
    PQ,
    SQ,
    SQ_BYTE,
    SQ_SIZES,
    Bytes,
    Flat,
    Floats,
    IDMap,
    Integers,
    Node,
    Normalization,
    PreTransform,
    Refine,
    Step,
    Transform,
    TwoLayer,
)

Head: TypeAlias = "tuple[int, int, int, bool]"  # d, ntotal, metric, is_trained
Read = TypeVar("Read")

_DEPTH = 8  # nodes within nodes
_MOST_DIMENSIONS = 1 << 20
_MOST_UNTRAINED = 1 << 28  # numbers of a matrix that a file tells the shape of alone
_UNUSED = 1 << 20  # what faiss writes into two fields of every header
_HEADER = "<iqqq?i"


def complain(what: str, got: object, expected: str) -> FormatError:
    error = fail("search.read_faiss", what, str(got)[:100], expected, error=FormatError)
    assert isinstance(error, FormatError)
    return error


class TooShort(FormatError):
    """What there is of a file ends before byte `needed`."""

    needed: int


def _too_short(what: str, needed: int, end: int) -> TooShort:
    error = TooShort(str(complain(what, f"beyond byte {needed}", f"within {end}: the file ends there")))
    error.needed = needed
    return error


# Reading.


class Reader:
    """A position in the file that never passes its end. Arrays are views of it."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def skip(self, size: int, what: str) -> int:
        if size > self.end - self.at:
            raise _too_short(what, self.at + size, self.end)
        self.at += size
        return self.at - size

    def values(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout), what))

    def number(self, code: str, what: str, least: int, most: int) -> int:
        (value,) = self.values("<" + code, what)
        if not least <= value <= most:
            raise complain(what, value, f"{least} to {most}")
        return int(value)

    def multiple(self, code: str, what: str, unit: int, most: int) -> int:
        """How many times the unit a number is."""
        value = self.number(code, what, unit, most)
        if value % unit:
            raise complain(what, value, f"a multiple of {unit}")
        return value // unit

    def count(self, code: str, what: str, least: int = 0) -> int:
        """Of what takes a byte at least."""
        value = self.number(code, what, least, 2**62)
        if value > self.end:
            raise _too_short(what, value, self.end)
        return value

    def flag(self, what: str) -> bool:
        return self.number("B", what, 0, 1) == 1

    def array(self, dtype: npt.DTypeLike, count: int, what: str) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        return np.frombuffer(self.data, kind, count, self.skip(count * kind.itemsize, what))

    def vector(self, dtype: npt.DTypeLike, what: str, count: int, unit: int = 1) -> npt.NDArray[Any]:
        """A length, in units of so many elements, and elements."""
        self.number("Q", f"length of {what}", count, count)
        return self.array(dtype, count * unit, what)

    def finite(self, what: str, count: int) -> Floats:
        numbers: Floats = self.vector(np.float32, what, count)
        if not np.isfinite(numbers).all():
            raise complain(what, "not finite everywhere", "finite numbers")
        return numbers

    def fourcc(self) -> str:
        return bytes(self.array(np.uint8, 4, "a node")).decode("latin-1")


def whole(data: bytes | mmap.mmap, read: Callable[[Reader], Read]) -> Read:
    """What stands in a file and ends with it."""
    reader = Reader(data)
    found = read(reader)
    if reader.at != reader.end:
        raise complain("file", f"{reader.end} bytes", f"{reader.at}, where the index ends")
    return found


def from_stream(take: Callable[[int], bytes], read: Callable[[Reader], Read]) -> Read:
    """What stands in a stream next: of `take`, which gives up to so many bytes, none at the end, no byte more is asked
    for, or a pipe might wait forever. As more turns out to be needed, it is read from the beginning again."""
    data, needed = bytearray(), 4
    while True:
        while len(data) < needed and (part := take(needed - len(data))):
            data += part
        try:
            return read(Reader(bytes(data)))
        except TooShort as error:
            if len(data) < needed:
                raise
            needed = error.needed


def read_node(reader: Reader) -> Node:
    return _node(reader, 0)


def _node(reader: Reader, depth: int) -> Node:
    kind = reader.fourcc()
    if kind not in _READERS:
        raise complain("a node", repr(kind), f"one of {', '.join(_READERS)}")
    if depth > _DEPTH:
        raise complain("the tree", f"{depth} nodes deep", f"at most {_DEPTH}")
    d = reader.number("i", "d", 1, _MOST_DIMENSIONS)
    ntotal = reader.count("q", "ntotal")
    reader.values("<qq", "the header")
    trained, metric = reader.flag("is_trained"), reader.number("i", "metric", INNER_PRODUCT, LINF)
    if metric > L2:
        reader.values("<f", "metric_arg")
    return _READERS[kind](reader, kind, (d, ntotal, metric, trained), depth)


def _flat_kind(metric: int) -> str:
    return {INNER_PRODUCT: "IxFI", L2: "IxF2"}.get(metric, "IxFl")


def _flat(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, metric, _ = head
    if kind != _flat_kind(metric):
        raise complain("metric", metric, f"that of {kind}")
    return Flat(*head, reader.vector(np.float32, "vectors", ntotal * d).reshape(ntotal, d))


def _codebooks(reader: Reader, d: int | None, trained: bool) -> Floats:
    d = reader.number("Q", "d of the quantizer", d or 1, d or _MOST_DIMENSIONS)
    M, bits = reader.number("Q", "M", 1, d), reader.number("Q", "nbits", 1, 16)
    if d % M:
        raise complain("M", M, f"a divisor of {d}")
    centroids = reader.vector(np.float32, "centroids", d << bits)
    if trained and not np.isfinite(centroids).all():
        raise complain("centroids", "not finite everywhere", "finite numbers")
    return centroids.reshape(M, 1 << bits, d // M)


def _pq(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, trained = head
    codebooks = _codebooks(reader, d, trained)
    size = code_size(codebooks)
    codes = reader.vector(np.uint8, "codes", ntotal * size).reshape(ntotal, size)
    asked = reader.number("i", "search_type", 0, 5), reader.flag("encode_signs"), *reader.values("<i", "polysemous_ht")
    return PQ(*head, codebooks, codes, asked=asked)


def _fast_pq(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, trained = head
    codebooks = _codebooks(reader, d, trained)
    size = code_size(codebooks)
    if codebooks.shape[1] != 16:
        raise complain("levels of a fast scan", codebooks.shape[1], "16")
    reader.values("<i", "implem")
    together = ROWS * reader.multiple("i", "bbs", ROWS, 1 << 10)
    reader.values("<iQ", "qbs and ntotal2")
    reader.number("Q", "M2", 2 * size, 2 * size)
    blocks = reader.vector(np.uint8, "codes", -(-ntotal // together) * together * size)
    return PQ(*head, codebooks, codes_of(blocks, ntotal, size, together), True)


def _sq(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, is_trained = head
    quantizer, size, trained = _scalar_quantizer(reader, d, is_trained)
    codes = reader.vector(np.uint8, "codes", ntotal * size).reshape(ntotal, size)
    return SQ(*head, quantizer, trained, codes)


def _scalar_quantizer(reader: Reader, d: int, is_trained: bool) -> tuple[int, int, Floats]:
    """Its kind, the bytes of a vector, and what was trained."""
    quantizer = reader.number("i", "qtype", 0, 1 << 10)
    if quantizer not in SQ_SIZES:
        raise complain("qtype", quantizer, "one of QT_8bit, QT_fp16 and QT_bf16")
    reader.values("<if", "rangestat")
    reader.number("Q", "d of the quantizer", d, d)
    size = reader.number("Q", "code_size", d * SQ_SIZES[quantizer], d * SQ_SIZES[quantizer])
    return quantizer, size, reader.finite("what was trained", 2 * d if quantizer == SQ_BYTE and is_trained else 0)


def code_size(codebooks: Floats) -> int:
    M, levels, _ = codebooks.shape
    return int(M * (levels.bit_length() - 1) + 7) // 8


def _ivf(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, trained = head
    nlist, nprobe = reader.count("Q", "nlist", 1), reader.number("Q", "nprobe", 1, 2**63)
    quantizer = _list_quantizer(reader, d, nlist, trained, depth)
    direct = _pass_direct_map(reader)
    residual, codebooks, size, pairs = False, None, 4 * d, 0
    of_numbers, numbers = None, np.zeros(0, np.float32)
    if kind == "IwSq":
        of_numbers, size, numbers = _scalar_quantizer(reader, d, trained)
        reader.number("Q", "code_size", size, size)
        residual = reader.flag("by_residual")
    elif kind != "IwFl":
        residual = reader.flag("by_residual")
        (size,) = reader.values("<Q", "code_size")
        if kind == "IwPf":
            reader.number("i", "bbs", ROWS, ROWS)
            pairs = reader.number("Q", "M2", 2, d + 1) // 2
            reader.values("<iQ", "implem and qbs2")
        codebooks = _codebooks(reader, d, trained)
        if size != code_size(codebooks) or (pairs and (codebooks.shape[1] != 16 or pairs != size)):
            raise complain("code_size", size, f"{code_size(codebooks)}")
    lists = _block_lists(reader, nlist, size, ntotal) if pairs else _lists(reader, nlist, size, ntotal)
    return IVF(*head, nprobe, quantizer, *lists, codebooks, residual, pairs > 0, of_numbers, numbers, direct)


def _list_quantizer(reader: Reader, d: int, nlist: int, trained: bool, depth: int) -> Node:
    """The centroids of all lists, or, under their numbers, of some."""
    quantizer = _node(reader, depth + 1)
    inner, known = quantizer, quantizer.ntotal == nlist
    if isinstance(quantizer, IDMap):
        inner, ids = quantizer.index, quantizer.ids
        known = bool(((ids >= 0) & (ids < nlist)).all()) and len(np.unique(ids)) == len(ids)
    if not isinstance(inner, (Flat, PQ)) or inner.d != d or (trained and not known):
        raise complain("quantizer", type(inner).__name__, f"a flat or PQ index of {nlist} vectors of {d} dimensions")
    if not np.isfinite(inner.vectors if isinstance(inner, Flat) else inner.codebooks).all():
        raise complain("centroids of lists", "not finite everywhere", "finite numbers")
    return quantizer


def _two_layer(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, trained = head
    quantizer = _node(reader, depth + 1)
    nlist = reader.count("Q", "nlist", 1)
    if not isinstance(quantizer, Flat) or quantizer.d != d or quantizer.ntotal not in {nlist, nlist * trained}:
        raise complain("quantizer", type(quantizer).__name__, f"a flat index of {nlist} vectors of {d} dimensions")
    reader.number("B", "quantizer_trains_alone", 0, 0)
    codebooks = _codebooks(reader, d, trained)
    sizes = ((nlist - 1).bit_length() + 7) // 8, code_size(codebooks)
    for name, size in zip(("code_size_1", "code_size_2", "code_size"), (*sizes, sum(sizes)), strict=True):
        reader.number("Q", name, size, size)
    codes = reader.vector(np.uint8, "codes", ntotal * sum(sizes)).reshape(ntotal, sum(sizes))
    return TwoLayer(*head, quantizer, nlist, codebooks, codes)


def _pass_direct_map(reader: Reader) -> int:
    """Its kind: where rows lie is known without."""
    kind = reader.number("B", "direct map", 0, 2)
    reader.array(np.int64, reader.count("Q", "direct map"), "direct map")
    if kind == 2:
        reader.array(np.int64, 2 * reader.count("Q", "direct map"), "direct map")
    return kind


def _lists(reader: Reader, nlist: int, size: int, ntotal: int) -> tuple[Integers, Bytes, Integers]:
    if (kind := reader.fourcc()) != "ilar":
        raise complain("inverted lists", repr(kind), "'ilar', lists in memory")
    reader.number("Q", "nlist of the lists", nlist, nlist)
    reader.number("Q", "code_size of the lists", size, size)
    length = np.zeros(nlist, np.int64)
    if (layout := reader.fourcc()) == "full":
        sizes = reader.vector(np.uint64, "list sizes", nlist)
        numbers = np.arange(nlist)
    elif layout == "sprs":
        count = reader.number("Q", "list sizes", 0, 2 * nlist)
        pairs = reader.array(np.uint64, count - count % 2, "list sizes").reshape(-1, 2)
        numbers, sizes = pairs[:, 0], pairs[:, 1]
        if count % 2 or (numbers >= nlist).any() or (numbers[1:] <= numbers[:-1]).any():
            raise complain("list sizes", "out of order", "pairs of ascending list numbers and sizes")
        numbers = numbers.astype(np.int64)
    else:
        raise complain("list sizes", repr(layout), "'full' or 'sprs'")
    if (sizes > ntotal).any() or sum(sizes.tolist()) != ntotal:
        raise complain("list sizes", "numbers", f"sizes that add up to {ntotal}")
    length[numbers] = sizes.astype(np.int64)
    codes, ids = np.empty((ntotal, size), np.uint8), np.empty(ntotal, np.int64)
    reader.skip(ntotal * (size + 8), "the lists")
    reader.at -= ntotal * (size + 8)
    at = 0
    for n in length[length > 0].tolist():
        codes[at : at + n] = reader.array(np.uint8, n * size, "codes of a list").reshape(n, size)
        ids[at : at + n] = reader.array(np.int64, n, "ids of a list")
        at += n
    return length, codes, ids


def _block_lists(reader: Reader, nlist: int, size: int, ntotal: int) -> tuple[Integers, Bytes, Integers]:
    """Of the fast scan."""
    if (kind := reader.fourcc()) != "ilbl":
        raise complain("inverted lists", repr(kind), "'ilbl', lists of blocks")
    reader.number("Q", "nlist of the lists", nlist, nlist)
    reader.values("<Q", "code_size of the lists")  # which they do not have
    reader.number("Q", "n_per_block", ROWS, ROWS)
    reader.number("Q", "block_size", ROWS * size, ROWS * size)
    length, codes, ids = np.zeros(nlist, np.int64), np.empty((0, size), np.uint8), np.empty(0, np.int64)
    parts: list[tuple[Bytes, Integers]] = [(codes, ids)]
    for number in range(nlist):
        n = length[number] = reader.number("Q", "the size of a list", 0, ntotal)
        own = reader.array(np.int64, n, "ids of a list")
        blocks = reader.vector(np.uint8, "codes of a list", -(-n // ROWS) * ROWS * size)
        parts.append((codes_of(blocks, n, size), own))
    if length.sum() != ntotal:
        raise complain("list sizes", "numbers", f"sizes that add up to {ntotal}")
    return length, np.concatenate([codes for codes, _ in parts]), np.concatenate([ids for _, ids in parts])


def _pca(reader: Reader, old: bool) -> PCA:
    (power,) = reader.values("<f", "eigen_power")
    epsilon = 0.0 if old else reader.values("<f", "epsilon")[0]
    rotated = reader.flag("random_rotation")
    reader.number("i", "balanced_bins", 0, 0)
    found = []
    for what in ("the mean", "eigenvalues", "directions"):
        found.append(reader.array(np.float32, reader.count("Q", what), what))
    return PCA(power, epsilon, rotated, *found)


def _normalization(reader: Reader) -> Normalization:
    (norm,) = reader.values("<f", "norm")
    d_in, d_out = (reader.number("i", name, 1, _MOST_DIMENSIONS) for name in ("d_in", "d_out"))
    if norm != 2 or d_in != d_out or not reader.flag("is_trained"):
        raise complain("a normalization", f"by norm {norm}, {d_in} to {d_out} dimensions", "norm 2 and as many")
    return Normalization(d_in)


def read_transform(reader: Reader) -> Step:
    kind = reader.fourcc()
    if kind == "VNrm":
        return _normalization(reader)
    if kind not in ("LTra", "rrot", "PcAm", "Pcam"):
        raise complain("transform", repr(kind), "'VNrm', or 'LTra', 'rrot' or 'Pcam', a linear one")
    pca = _pca(reader, kind == "PcAm") if kind[0] == "P" else None
    biased = reader.flag("have_bias")
    at = reader.at
    for _ in range(2):  # the dimensions come last
        reader.array(np.float32, reader.count("Q", "size of A or b"), "A or b")
    d_in, d_out = (reader.number("i", name, 1, _MOST_DIMENSIONS) for name in ("d_in", "d_out"))
    trained, end = reader.flag("is_trained"), reader.at
    if pca is not None and (d_out > d_in or pca.mean.size not in (0, d_in) or pca.directions.size % d_in):
        raise complain("a PCA", f"{pca.mean.size} means and {d_in} to {d_out} dimensions", "what fits them")
    if not trained and d_in * d_out > _MOST_UNTRAINED:
        raise complain("an untrained transform", f"{d_in} to {d_out} dimensions", f"a matrix of {_MOST_UNTRAINED}")
    reader.at = at
    A = reader.finite("A", d_in * d_out if trained else 0)
    (count,) = struct.unpack_from("<Q", reader.data, reader.at)
    b = reader.finite("b", d_out if biased and trained else int(count))
    reader.at = end
    return Transform(
        A.reshape(d_out, d_in) if trained else np.zeros((d_out, d_in), np.float32), b if biased else None, trained, pca
    )


def _pretransform(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, metric, _ = head
    chain = [read_transform(reader) for _ in range(reader.number("i", "transforms", 0, _DEPTH))]
    inner = _within(reader, depth, ntotal)
    sizes = [d, *(size for step in chain for size in step.sizes), inner.d]
    if sizes[::2] != sizes[1::2] or inner.metric != metric:
        raise complain("transforms", sizes, "each to take what the one before it gives")
    return PreTransform(*head, chain, inner)


def _refine(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    d, ntotal, _, _ = head
    base, refine = _within(reader, depth, ntotal), _within(reader, depth, ntotal)
    (factor,) = reader.values("<f", "k_factor")
    if not isinstance(refine, (Flat, SQ, PQ)) or refine.d != d or base.d != d:
        raise complain("refine index", type(refine).__name__, f"a flat, scalar-quantised or PQ index of {d} dimensions")
    if not math.isfinite(factor) or not 1 <= factor <= 1000:
        raise complain("k_factor", factor, "1 to 1000")
    return Refine(*head, base, refine, factor)


def _idmap(reader: Reader, kind: str, head: Head, depth: int) -> Node:
    inner = _within(reader, depth, head[1])
    if inner.d != head[0]:
        raise complain("dimensions of the mapped index", inner.d, f"{head[0]}")
    return IDMap(*head, inner, reader.vector(np.int64, "id_map", head[1]), kind == "IxM2")


def _within(reader: Reader, depth: int, ntotal: int) -> Node:
    inner = _node(reader, depth + 1)
    if inner.ntotal != ntotal:
        raise complain("vectors of the inner index", inner.ntotal, f"{ntotal}")
    return inner


_READERS: dict[str, Callable[[Reader, str, Head, int], Node]] = {
    "IxF2": _flat, "IxFI": _flat, "IxFl": _flat, "IxSQ": _sq, "IxPq": _pq, "IPfs": _fast_pq, "IwFl": _ivf,
    "IwPQ": _ivf, "IwPf": _ivf, "IwSq": _ivf, "Ix2L": _two_layer, "IxPT": _pretransform, "IxRF": _refine,
    "IxMp": _idmap, "IxM2": _idmap,
}  # fmt: skip


def read_codebooks(reader: Reader) -> Floats:
    """The codebooks (M, 2**bits, d/M) of a product quantizer's own file."""
    return _codebooks(reader, None, True)


def from_file(path: str | Path, read: Callable[[Reader], Read]) -> Read:
    """What a file holds; its arrays are views of it."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise complain("file", "empty", "an index of faiss")
        return whole(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), read)


# Writing.


def write_tree(node: Node, file: BinaryIO) -> None:
    """The bytes that faiss writes for such an index."""
    kind, body = _WRITERS[type(node)]
    file.write((kind(node) if callable(kind) else kind).encode())
    file.write(struct.pack(_HEADER, node.d, node.ntotal, _UNUSED, _UNUSED, node.is_trained, node.metric))
    if node.metric > L2:
        file.write(struct.pack("<f", 0.0))  # metric_arg
    body(node, file)


def _put(file: BinaryIO, dtype: npt.DTypeLike, x: npt.NDArray[Any], units: int | None = None) -> None:
    """A length and elements."""
    file.write(struct.pack("<Q", x.size if units is None else units))
    file.write(np.ascontiguousarray(x, dtype).data)


def write_codebooks(books: Floats, file: BinaryIO) -> None:
    M, levels, width = books.shape
    file.write(struct.pack("<QQQ", M * width, M, levels.bit_length() - 1))
    _put(file, np.float32, books)


def _write_pq(node: PQ, file: BinaryIO) -> None:
    write_codebooks(node.codebooks, file)
    if node.fast:
        rows, pairs = -(-node.ntotal // ROWS) * ROWS, code_size(node.codebooks)
        file.write(struct.pack("<iiiQQ", 0, ROWS, 0, rows, 2 * pairs))
        _put(file, np.uint8, blocks_of(node.codes))
        return
    _put(file, np.uint8, node.codes)
    M, levels, _ = node.codebooks.shape
    file.write(struct.pack("<i?i", *(node.asked or (0, False, M * (levels.bit_length() - 1) + 1))))  # as faiss begins


def _write_sq(node: SQ, file: BinaryIO) -> None:
    _write_quantizer(node.kind, node.d, node.trained, file)
    _put(file, np.uint8, node.codes)


def _write_quantizer(kind: int, d: int, trained: Floats, file: BinaryIO) -> None:
    file.write(struct.pack("<iifQQ", kind, 0, 0.0, d, d * SQ_SIZES[kind]))
    _put(file, np.float32, trained)


def _write_ivf(node: IVF, file: BinaryIO) -> None:
    file.write(struct.pack("<QQ", len(node.length), node.nprobe))
    write_tree(node.quantizer, file)
    _write_direct_map(node, file)
    if node.kind is not None:
        _write_quantizer(node.kind, node.d, node.trained, file)
        file.write(struct.pack("<Q?", node.d * SQ_SIZES[node.kind], node.by_residual))
    if node.codebooks is not None:
        size = code_size(node.codebooks)
        file.write(struct.pack("<?Q", node.by_residual, size))
        if node.fast:
            file.write(struct.pack("<iQiQ", ROWS, 2 * size, 0, 0))
        write_codebooks(node.codebooks, file)
    (_write_block_lists if node.fast else _write_lists)(node, file)


def _write_direct_map(node: IVF, file: BinaryIO) -> None:
    """Of an id, its list, and its place there in the low half."""
    count = len(node.ids)
    home = np.repeat(np.arange(len(node.length)), node.length)
    places = home << 32 | np.arange(count) - (np.cumsum(node.length) - node.length)[home]
    in_turn = count == 0 or (int(node.ids.min()) == 0 and int(node.ids.max()) == count - 1)
    kind = 2 if node.direct == 1 and not in_turn else node.direct
    file.write(struct.pack("<B", kind))
    _put(file, np.int64, places[np.argsort(node.ids)] if kind == 1 else places[:0])
    if kind == 2:
        _put(file, np.int64, np.stack([node.ids, places], 1), count)


def _write_two_layer(node: TwoLayer, file: BinaryIO) -> None:
    write_tree(node.quantizer, file)
    file.write(struct.pack("<QB", node.nlist, 0))
    write_codebooks(node.codebooks, file)
    size = code_size(node.codebooks)
    file.write(struct.pack("<QQQ", ((node.nlist - 1).bit_length() + 7) // 8, size, node.codes.shape[1]))
    _put(file, np.uint8, node.codes)


def _write_lists(node: IVF, file: BinaryIO) -> None:
    file.write(b"ilar" + struct.pack("<QQ", len(node.length), node.codes.shape[1]))
    filled = np.flatnonzero(node.length)
    if len(filled) > len(node.length) // 2:
        file.write(b"full")
        _put(file, np.uint64, node.length)
    else:
        file.write(b"sprs")
        _put(file, np.uint64, np.stack([filled, node.length[filled]], 1))
    at = 0
    for n in node.length[filled].tolist():
        file.write(np.ascontiguousarray(node.codes[at : at + n]).data)
        file.write(np.ascontiguousarray(node.ids[at : at + n]).data)
        at += n


def _write_block_lists(node: IVF, file: BinaryIO) -> None:
    file.write(b"ilbl" + struct.pack("<QQQQ", len(node.length), 2**64 - 1, ROWS, ROWS * node.codes.shape[1]))
    at = 0
    for n in node.length.tolist():
        _put(file, np.int64, node.ids[at : at + n])
        _put(file, np.uint8, blocks_of(node.codes[at : at + n]))
        at += n


def write_transform(step: Step, file: BinaryIO) -> None:
    if isinstance(step, Normalization):
        file.write(b"VNrm" + struct.pack("<fii?", 2.0, step.d, step.d, True))
        return
    if (pca := step.pca) is not None:
        file.write(b"Pcam" + struct.pack("<ff?i", pca.eigen_power, pca.epsilon, pca.random_rotation, 0))
        for array in (pca.mean, pca.eigenvalues, pca.directions):
            _put(file, np.float32, array)
    file.write((b"" if pca else b"LTra") + struct.pack("<?", step.b is not None))
    _put(file, np.float32, step.A if step.is_trained else step.A[:0])
    _put(file, np.float32, np.zeros(0) if step.b is None else step.b)
    file.write(struct.pack("<ii?", *step.sizes, step.is_trained))


def _write_pretransform(node: PreTransform, file: BinaryIO) -> None:
    file.write(struct.pack("<i", len(node.chain)))
    for step in node.chain:
        write_transform(step, file)
    write_tree(node.index, file)


def _write_refine(node: Refine, file: BinaryIO) -> None:
    write_tree(node.base, file)
    write_tree(node.refine, file)
    file.write(struct.pack("<f", node.k_factor))


def _write_idmap(node: IDMap, file: BinaryIO) -> None:
    write_tree(node.index, file)
    _put(file, np.int64, node.ids)


_WRITERS: dict[type[Node], tuple[Any, Callable[[Any, BinaryIO], None]]] = {
    Flat: (lambda node: _flat_kind(node.metric),
           lambda node, file: _put(file, np.float32, node.vectors)),
    SQ: ("IxSQ", _write_sq),
    PQ: (lambda node: "IPfs" if node.fast else "IxPq", _write_pq),
    IVF: (lambda node: "IwSq" if node.kind is not None else
          "IwFl" if node.codebooks is None else "IwPf" if node.fast else "IwPQ", _write_ivf),
    TwoLayer: ("Ix2L", _write_two_layer),
    PreTransform: ("IxPT", _write_pretransform),
    Refine: ("IxRF", _write_refine),
    IDMap: (lambda node: "IxM2" if node.two_way else "IxMp", _write_idmap),
}  # fmt: skip
