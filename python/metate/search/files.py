"""Indexes on disk: one safetensors file whose metadata say what it is, with a checksum of every tensor.

    metadata["metate.search"] = {"version": 1, "index": "IVFPQIndex", "settings": {…}, "next_id": n, "crc32": {name: …}}
    tensors: length (lists) int64, "trained.…" float32, and "column.…" of all rows, list by list

A file is written beside its place, flushed, and moved there: a crash leaves the old one. Reading begins with a check of
the header against the size of the file; nothing in it is executed, and nothing is allocated because it says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import inspect
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from metate.errors import FormatError, fail
from metate.search.arrays import bytes_of, tensor_of
from metate.search.base import State
from metate.search.index import MOST_ID, Index
from metate.search.indexes import MOST_SEED, FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex
from metate.search.storage import Lists

VERSION = 1
_KEY = "metate.search"
_KINDS: dict[str, type[Index]] = {kind.__name__: kind for kind in (FlatIndex, PQIndex, IVFFlatIndex, IVFPQIndex)}
_DTYPES = {
    "I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER = 1 << 20  # bytes of a header
_MOST_DIMENSIONS = 1 << 20
_CHUNK = 1 << 24  # bytes that a checksum reads at a time
_UNFINISHED = ".saving"  # how the name of a file ends that is not in its place yet


_SAVED = "a file that index.save wrote; those of faiss are for metate.search.read_faiss"


def _complain(what: str, got: object, expected: str) -> FormatError:
    error = fail("search.load", what, str(got)[:100], expected, error=FormatError)
    assert isinstance(error, FormatError)
    return error


# Writing.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when all is on disk, and leaves it alone otherwise.

    It has no name until then, where the system has such files: a process that is killed leaves nothing. Where it must
    have one, or has just been given one, the next save removes it: nobody holds its lock.
    """
    with _opened(path.parent, path) as folder:
        _remove_abandoned(path)
        name = str(path.parent / f".{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        try:
            with os.fdopen(_new_file(path, name), "w+b") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not os.fstat(file.fileno()).st_nlink:
                    os.link(f"/proc/self/fd/{file.fileno()}", name, src_dir_fd=folder, follow_symlinks=True)
                os.replace(name, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise
        os.fsync(folder)


@contextlib.contextmanager
def _opened(folder: Path, path: Path) -> Iterator[int]:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield handle
    finally:
        os.close(handle)


def _new_file(path: Path, name: str) -> int:
    """Open for writing: without a name, or where the system or the folder has no such files, under this one."""
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed and os.path.isdir("/proc/self/fd"):  # where such a file is given its name from
        with contextlib.suppress(OSError):
            return os.open(path.parent, unnamed | os.O_RDWR, 0o666)
    try:
        return os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _remove_abandoned(path: Path) -> None:
    """What processes that were killed have left of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        with contextlib.suppress(OSError), open(left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def save(index: Index, path: str | Path) -> None:
    """Writes a snapshot of the index, a part of the rows at a time."""
    state = index._state
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], Iterator[Tensor]]] = {}
    length = torch.from_numpy(state.lists.living())
    tensors["length"] = length.dtype, tuple(length.shape), iter([length])
    for name, tensor in state.model.items():
        tensors[f"trained.{name}"] = tensor.dtype, tuple(tensor.shape), iter([tensor])
    for name, column in state.lists.columns.items():
        shape = (state.lists.total, *column.shape[1:])
        tensors[f"column.{name}"] = column.dtype, shape, state.lists.packed_blocks(name)
    ordered = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)  # each begins at a multiple of its own
    entries, at = {}, 0
    for name in ordered:
        dtype, shape, _ = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    checksums = dict.fromkeys(ordered, "0" * 8)
    about = {
        "version": VERSION, "index": type(index).__name__, "settings": index.settings(), "next_id": state.next_id,
        "crc32": checksums,
    }  # fmt: skip
    with replacing(Path(path)) as file:
        file.write(_header(entries, about))
        for name in ordered:
            crc = 0
            for block in tensors[name][2]:
                crc = zlib.crc32(bytes_of(block), crc)
                file.write(bytes_of(block))
            checksums[name] = f"{crc:08x}"
        file.seek(0)
        file.write(_header(entries, about))  # as long as before


def _header(entries: dict[str, Any], about: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {_KEY: json.dumps(about)}, **entries}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


# Reading.


@dataclass(frozen=True)
class _File:
    """A checked header, and views of the data behind it."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


def load(
    path: str | Path, *, mmap: bool = False, verify: bool | None = None, device: str | torch.device = "cpu"
) -> Index:
    """The index in a file that `index.save(path)` wrote.

    Args:
        mmap: leave the rows in the file and read what searches touch, so that an index may be larger than memory.
            Adding to it copies them into memory.
        verify: compare all checksums, which reads the whole file; default: unless mmap.
        device: where the rows go; with mmap the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file does not hold what its format promises.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"metate.search.load: path is {path}, expected a file that exists")
    if mmap and torch.device(device).type != "cpu":
        raise fail("search.load", "device", device, "cpu with mmap=True")
    verify = not mmap if verify is None else verify
    file = _open(path, mmap)
    about, tensors = file.about, file.tensors
    index, lists = _empty(about, tensors), tensors["length"]
    total = next(_under("column.", tensors))[1].shape[0]
    within = bool(((lists >= 0) & (lists <= total)).all())  # so the sum of up to 2**20 of them does not overflow
    if not within or int(lists.double().sum()) != total or int(lists.sum()) != total:
        raise _complain("length", "list lengths", f"numbers from 0 on that add up to the {total} rows")
    if verify:
        _verify(about, tensors)
    model = {name: tensor.clone().to(device) for name, tensor in _under("trained.", tensors)}
    if not all(bool(t.isfinite().all()) for t in model.values()):
        raise _complain("trained tensors", "not finite everywhere", "finite numbers")
    columns = {name: tensor.to(device) for name, tensor in _under("column.", tensors)}
    next_id = about["next_id"]
    if "ids" not in columns:
        next_id = max(next_id, total)
    elif verify and total:
        ids = columns["ids"]
        if int(ids.min()) < 0 or int(ids.max()) >= next_id:
            raise _complain("ids", f"{int(ids.min())} to {int(ids.max())}", f"numbers from 0 to {next_id - 1}")
    index.device = torch.device(device)
    laid_out = columns if mmap else index.codec.laid_out(columns)
    index._state = State(model, Lists.packed(lists.numpy().copy(), laid_out, mmap), next_id)
    return index


def _under(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), t) for name, t in tensors.items() if name.startswith(prefix))


def _open(path: Path, mmap: bool) -> _File:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER):
            raise _complain("header", f"{length} bytes in a file of {size}", _SAVED)
        header = _json(file.read(length), "header")
    entries, begin = dict(header), 8 + length
    metadata = entries.pop("__metadata__", None)
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise _complain("metadata", "without metate.search", _SAVED)
    places = _places(entries, begin, size)
    # Mapped for reading alone: a mapping that may be written must fit memory, even where nobody writes.
    data = tensor_of("search.load", "path", np.memmap(path, np.uint8, "r") if mmap else np.fromfile(path, np.uint8))
    if len(data) != size:
        raise _complain("file", f"{len(data)} bytes", f"{size}, as a moment ago")
    return _File(
        _about(_json(text.encode(), "metadata"), set(places)),
        {name: data[a:b].view(dtype).view(shape) for name, (dtype, shape, a, b) in places.items()},
    )


def _json(data: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        parsed = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _complain(what, f"not JSON ({error})", "a JSON object") from None
    if not isinstance(parsed, dict):
        raise _complain(what, type(parsed).__name__, "a JSON object")
    return parsed


def _natural(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _places(entries: dict[str, Any], begin: int, size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    """Where tensors lie: one after another, without holes, to the end of the file."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES:
            raise _complain(f"tensor {name!r}", entry, f"dtype {' or '.join(_DTYPES)}, shape and data_offsets")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not isinstance(shape, list) or len(shape) > 4 or not all(_natural(s, size) for s in shape):
            raise _complain(f"shape of {name!r}", shape, "up to 4 numbers that fit the file")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(o, size) for o in offsets):
            raise _complain(f"data_offsets of {name!r}", offsets, "two numbers within the file")
        dtype = _DTYPES[entry["dtype"]]
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize or (begin + offsets[0]) % dtype.itemsize:
            raise _complain(f"data_offsets of {name!r}", offsets, f"{math.prod(shape)} aligned {entry['dtype']}")
        found[name] = dtype, tuple(shape), begin + offsets[0], begin + offsets[1]
    at = begin
    for _, _, first, last in sorted(found.values(), key=lambda place: place[2:]):
        if first != at:
            raise _complain("data_offsets", f"{first - begin} where {at - begin} ends", "one tensor after another")
        at = last
    if at != size:
        raise _complain("file", f"{size} bytes", f"{at}, by its header")
    return found


def _about(about: dict[str, Any], names: set[str]) -> dict[str, Any]:
    if about.get("version") != VERSION:
        raise _complain("version", about.get("version"), f"{VERSION}; a newer metate may read it")
    if not _natural(about.get("next_id"), MOST_ID + 1):
        raise _complain("next_id", about.get("next_id"), "a number from 0 on")
    crc = about.get("crc32")
    if not isinstance(crc, dict) or set(crc) != names:
        raise _complain("crc32", crc, "a checksum of every tensor")
    return about


def _empty(about: dict[str, Any], tensors: dict[str, Tensor]) -> Index:
    """The index without its contents, when the tensors are those that it has."""
    kind, settings = about.get("index"), about.get("settings")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _complain("index", kind, " or ".join(_KINDS))
    if not isinstance(settings, dict):
        raise _complain("settings", settings, "an object")
    lists = tensors["length"].numel() if "length" in tensors else 0
    for name, limit in (("dim", _MOST_DIMENSIONS), ("nlist", lists), ("seed", MOST_SEED)):
        if name in settings and not _natural(settings[name], limit):
            raise _complain(f"settings {name}", settings[name], f"a number up to {limit}")
    if any(not isinstance(settings.get(name, True), bool) for name in ("opq", "residual")):
        raise _complain("settings", settings, "true or false for opq and residual")
    known = set(inspect.signature(_KINDS[kind]).parameters) - {"device"}
    if set(settings) != known:
        raise _complain("settings", sorted(settings), f"{sorted(known)}")
    try:
        index = _KINDS[kind](**settings)
    except (TypeError, ValueError) as error:
        raise _complain("settings", error, f"those of {kind}") from None
    trained = {f"trained.{name}": (torch.float32, shape) for name, shape in index.trained_shapes().items()}
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"length": (torch.int64, (index.nlist or 1,))}
    rows = {tensor.shape[0] if tensor.dim() else -1 for _, tensor in _under("column.", tensors)}
    if len(rows) != 1:
        raise _complain("columns", f"of {sorted(rows)} rows", "of the same number of rows")
    columns = {**index.column_types(), **({"ids": ((), torch.int64)} if "column.ids" in tensors else {})}
    expected.update({f"column.{name}": (dtype, (*rows, *shape)) for name, (shape, dtype) in columns.items()})
    if any(name in tensors for name in trained) or rows != {0}:
        expected.update(trained)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise _complain(f"tensor {name!r}", found.get(name, "missing"), f"{expected.get(name, 'none')}")
    return index


def _verify(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        data, crc = bytes_of(tensor), 0
        for a in range(0, len(data), _CHUNK):
            crc = zlib.crc32(data[a : a + _CHUNK], crc)
        if about["crc32"][name] != f"{crc:08x}":
            raise _complain(f"checksum of {name!r}", f"{crc:08x}", f"{about['crc32'][name]}: the file is damaged")
