"""Where indexes are written to and read from, beside files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_AT_ONCE = 1 << 20  # bytes


class Bytes(bytearray):
    """Bytes with the names of a C++ vector."""

    def size(self) -> int:
        return len(self)

    def swap(self, other: Bytes) -> None:
        self[:], other[:] = bytes(other), bytes(self)


class IOWriter:
    """`writer(part)` writes bytes."""

    def __call__(self, part: bytes) -> None:
        raise NotImplementedError


class VectorIOWriter(IOWriter):
    """Keeps in `data` what is written to it."""

    def __init__(self) -> None:
        self.data = Bytes()

    def __call__(self, part: bytes) -> None:
        self.data += part


class PyCallbackIOWriter(IOWriter):
    """Hands what is written to it to a function, `bs` bytes at a time."""

    def __init__(self, callback: Callable[[bytes], Any], bs: int = _AT_ONCE) -> None:
        self.callback, self.bs = callback, bs

    def __call__(self, part: bytes) -> None:
        for first in range(0, len(part), self.bs):
            self.callback(part[first : first + self.bs])


class BufferedIOWriter(PyCallbackIOWriter):
    """Hands `bsz` bytes at a time to another writer; none wait here."""

    def __init__(self, writer: IOWriter, bsz: int = _AT_ONCE) -> None:
        super().__init__(writer, bsz)


class FileIOWriter(IOWriter):
    def __init__(self, fname: str) -> None:
        self.file = open(fname, "wb", buffering=0)  # noqa: SIM115

    def __call__(self, part: bytes) -> None:
        self.file.write(part)


class IOReader:
    """`read(size)` gives up to so many bytes, none at the end; reader(array, size, count) fills an array."""

    def read(self, size: int) -> bytes:
        raise NotImplementedError

    def __call__(self, array: Any, size: int, count: int) -> int:
        """Reads `count` things of `size` bytes into memory, and says how many there were."""
        found = bytearray()
        while len(found) < size * count and (part := self.read(size * count - len(found))):
            found += part
        array.reshape(-1).view(np.uint8)[: len(found)] = np.frombuffer(found, np.uint8)
        return len(found) // size


class VectorIOReader(IOReader):
    """Gives what is in `data`."""

    def __init__(self) -> None:
        self.data, self.at = Bytes(), 0

    def read(self, size: int) -> bytes:
        part = bytes(self.data[self.at : self.at + size])
        self.at += len(part)
        return part


class ZeroCopyIOReader(VectorIOReader):
    """Gives the first `size` bytes of an array."""

    def __init__(self, data: Any, size: int) -> None:
        super().__init__()
        self.data = Bytes(memoryview(data).cast("B")[:size])


class PyCallbackIOReader(IOReader):
    """Asks a function for at most `bs` bytes at a time."""

    def __init__(self, callback: Callable[[int], bytes], bs: int = _AT_ONCE) -> None:
        self.callback, self.bs = callback, bs

    def read(self, size: int) -> bytes:
        return self.callback(min(size, self.bs))


class FileIOReader(PyCallbackIOReader):
    def __init__(self, fname: str) -> None:
        self.file = open(fname, "rb")  # noqa: SIM115
        super().__init__(self.file.read)


class BufferedIOReader(IOReader):
    """Asks another reader for `bsz` bytes at a time."""

    def __init__(self, reader: IOReader, bsz: int = _AT_ONCE) -> None:
        self.reader, self.bsz, self.waiting = reader, bsz, b""

    def read(self, size: int) -> bytes:
        self.waiting = self.waiting or self.reader.read(self.bsz)
        part, self.waiting = self.waiting[:size], self.waiting[size:]
        return part
