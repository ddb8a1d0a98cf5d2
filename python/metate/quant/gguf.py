"""GGUF files, versions 2 and 3: a bounds-checked pass over the header, then views of the mapped file.

The pass costs time linear in the header, allocates nothing that a size in the file asks for, and refuses whatever does
not lie inside the file. Quantised tensors lower block type by block type (gguf_blocks.py).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metate.low_bit import QuantizedWeight
from metate.quant.gguf_blocks import TYPES, lower
from metate.quant.settings import complain

MAGIC = b"GGUF"
_DENSE = {
    0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16), 28: ("F64", torch.float64),
    24: ("I8", torch.int8), 25: ("I16", torch.int16), 26: ("I32", torch.int32), 27: ("I64", torch.int64),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAME = 65535  # bytes of a key or a name
_DIMENSIONS = 4
_MOST = 65536  # tensors or keys
_STRINGS = 1 << 22  # of all arrays: a second's work
_LEAST_ENTRY, _LEAST_TENSOR = 13, 32  # bytes of the smallest metadata entry and tensor description


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: dims as the file has them, fastest first; start in bytes of its file."""

    data: mmap.mmap
    kind: int
    dims: tuple[int, ...]
    start: int
    size: int


class _Reader:
    """A position in a buffer that never passes its end."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at, self.end = data, 0, len(data)
        self.strings = 0

    def skip(self, size: int, what: str) -> int:
        """Moves on and returns where it was."""
        if size > self.end - self.at:  # also where a string has already led beyond the end
            raise complain(what, f"{size} bytes at {self.at}", f"at most {self.end - self.at}, for the file ends there")
        self.at += size
        return self.at - size

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        size = self.number("Q", what)
        if limit is not None and size > limit:
            raise complain(what, f"{size} bytes", f"at most {limit}")
        start = self.skip(size, what)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError:
            raise complain(what, "not UTF-8", "a name") from None

    def pass_value(self, kind: int, what: str) -> None:
        """Moves past a metadata value."""
        if kind in _SCALARS:
            self.skip(struct.calcsize("<" + _SCALARS[kind]), what)
        elif kind == _STRING:
            self.skip(self.number("Q", what), what)
        elif kind == _ARRAY:
            item, count = self.number("I", what), self.number("Q", what)
            if item in _SCALARS:
                self.skip(count * struct.calcsize("<" + _SCALARS[item]), what)
            elif item == _STRING:
                most = min((self.end - self.at) // 8, _STRINGS - self.strings)
                if count > most:
                    raise complain(what, f"{count} strings", f"at most {most} in what is left")
                self.strings += count
                self.pass_strings(count, what)
            else:
                raise complain(what, f"an array of type {item}", "one of numbers or strings")
        else:
            raise complain(what, f"type {kind}", "0 to 12")

    def pass_strings(self, count: int, what: str) -> None:
        """Vocabularies have many: nothing but the sum of their lengths is computed."""
        at, last, size_at = self.at, self.end - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise complain(what, f"a string at {at}", f"one before {last}, for the file ends there")
            at += 8 + size_at(self.data, at)[0]
        self.at = at
        self.skip(0, what)


class Metadata(Mapping[str, Any]):
    """The key-value section, decoded key by key: numbers, strings, lists of them."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, key: str, kind: int, at: int) -> None:
        if key in self._places:
            raise complain(f"key {key!r}", "given twice", "once")
        self._places[key] = kind, at

    def __getitem__(self, key: str) -> Any:
        kind, at = self._places[key]
        reader = _Reader(self._data)
        reader.at = at
        return self._value(reader, kind, f"key {key!r}")

    def _value(self, reader: _Reader, kind: int, what: str) -> Any:
        if kind == _STRING:
            return reader.text(what)
        if kind == _ARRAY:
            item, count = reader.number("I", what), reader.number("Q", what)
            return [self._value(reader, item, what) for _ in range(count)]
        return reader.number(_SCALARS[kind], what)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _mapped(path: str | Path) -> mmap.mmap:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise complain(str(path), "empty", "a GGUF file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # views of it may be written to


class GGUFFile(Mapping[str, "QuantizedWeight | Tensor"]):
    """Tensor name -> QuantizedWeight or dense tensor (dimensions slowest first), made as it is asked for.

    Weights of more than two dimensions (experts) are one weight of all their rows. Of a model split into several files
    the metadata are those of the first.
    """

    def __init__(self, *paths: str | Path) -> None:
        self._entries: dict[str, _Entry] = {}
        found = [self._read_header(_mapped(path)) for path in paths]
        self.metadata = found[0]

    def _read_header(self, data: mmap.mmap) -> Metadata:
        reader, metadata = _Reader(data), Metadata(data)
        magic = reader.skip(4, "magic")
        if data[magic : magic + 4] != MAGIC:
            raise complain("magic", data[:4], "GGUF")
        version = reader.number("I", "version")
        if version not in (2, 3):
            raise complain("version", version, "2 or 3, little-endian")
        tensors, entries = reader.number("Q", "tensor count"), reader.number("Q", "metadata count")
        room = reader.end - reader.at
        if entries * _LEAST_ENTRY + tensors * _LEAST_TENSOR > room or max(entries, tensors) > _MOST:
            expected = f"as many as {room} bytes hold, at most {_MOST}"
            raise complain("counts", f"{tensors} tensors and {entries} keys", expected)
        for _ in range(entries):
            key = reader.text("key", _NAME)
            kind = reader.number("I", f"key {key!r}")
            metadata.add(key, kind, reader.at)
            reader.pass_value(kind, f"key {key!r}")
        described = [self._describe(reader) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise complain("general.alignment", alignment, "a power of two up to 2**20")
        start = -(-reader.at // alignment) * alignment
        for name, kind, dims, offset in described:
            self._place(data, name, kind, dims, offset, start, alignment)
        return metadata

    def _describe(self, reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
        name = reader.text("tensor name", _NAME)
        count = reader.number("I", f"{name!r} dimensions")
        if not 1 <= count <= _DIMENSIONS:
            raise complain(f"{name!r} dimensions", count, f"1 to {_DIMENSIONS}")
        dims = tuple(reader.number("Q", f"{name!r} dimensions") for _ in range(count))
        if not all(dims) or math.prod(dims) >= 2**48:
            raise complain(f"{name!r} dimensions", dims, "from 1, and fewer than 2**48 elements")
        return name, reader.number("I", f"{name!r} type"), dims, reader.number("Q", f"{name!r} offset")

    def _place(
        self, data: mmap.mmap, name: str, kind: int, dims: tuple[int, ...], offset: int, start: int, alignment: int
    ) -> None:
        if kind in TYPES:
            elements, size = TYPES[kind].elements, TYPES[kind].size
        elif kind in _DENSE:
            elements, size = 1, _DENSE[kind][1].itemsize
        else:
            elements, size = 1, 0  # refused when asked for; the rest of the file may still be read
        if dims[0] % elements:
            raise complain(f"{name!r} dimensions", dims, f"rows in multiples of {elements}")
        total = math.prod(dims) // elements * size
        if offset % alignment or start + offset + total > len(data):
            raise complain(f"{name!r} offset", offset, f"a multiple of {alignment} with {total} bytes behind it")
        if name in self._entries:
            raise complain(f"tensor {name!r}", "given twice", "once")
        self._entries[name] = _Entry(data, kind, dims, start + offset, total)

    def __getitem__(self, name: str) -> QuantizedWeight | Tensor:
        return self._read(name, self._entries[name])

    def experts(self, name: str) -> int:
        """How many matrices a tensor is a stack of, as those of a mixture's experts are."""
        entry = self._entries[name]
        if len(entry.dims) != 3 or not entry.size:
            raise complain(f"{name!r}", f"dimensions {entry.dims} of type {entry.kind}", "a stack of matrices")
        return entry.dims[2]

    def expert(self, name: str, number: int) -> QuantizedWeight | Tensor:
        """One matrix of a stack."""
        entry, size = self._entries[name], self._entries[name].size // self.experts(name)
        start = entry.start + number * size
        return self._read(name, dataclasses.replace(entry, dims=entry.dims[:2], start=start, size=size))

    def _read(self, name: str, entry: _Entry) -> QuantizedWeight | Tensor:
        if entry.kind in _DENSE:
            dtype = _DENSE[entry.kind][1]
            flat = torch.frombuffer(entry.data, dtype=dtype, count=entry.size // dtype.itemsize, offset=entry.start)
            return flat.view(entry.dims[::-1])
        if entry.kind not in TYPES:
            known = ", ".join(sorted(t.name for t in TYPES.values()))
            raise complain(f"{name!r} type", entry.kind, f"F32, F16, BF16, F64, an integer type, {known}")
        kind = TYPES[entry.kind]
        raw = torch.frombuffer(entry.data, dtype=torch.uint8, count=entry.size, offset=entry.start)
        columns = entry.dims[0]
        return lower(kind, raw.view(-1, columns // kind.elements, kind.size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
