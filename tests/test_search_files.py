"""Indexes on disk: all they hold comes back, whoever is killed while writing leaves the old file, and no file does
harm."""

import json
import os
import resource
import signal
import sys
import tracemalloc
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import bounded_memory, damaged, overwrite, survives
from test_search import KINDS, D, Q, X, everything, filled

from metate import FormatError
from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, files, load, write_faiss

MALFORMED = int(os.environ.get("METATE_TEST_MALFORMED", "2000"))  # files of all 30 kinds; a million in the long target


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_everything(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    index, path = filled(KINDS[kind]("l2")), tmp_path / "index"
    for turn in range(3):  # empty, full, with holes
        if turn == 1:
            index.add(X)
        if turn == 2:
            index.remove_ids(range(5, 15))
        index.save(path)
        for mmap in (False, True):
            found = load(path, mmap=mmap)
            assert type(found) is type(index) and found.settings() == index.settings()
            for a, b in zip(found.search(Q, 9), index.search(Q, 9), strict=True):
                assert np.array_equal(a, b)
            found.add(X[:3])
            index_ids = found.search(X[:3], 70, **everything(index))[1]
            assert {70, 71, 72} <= set(index_ids.ravel().tolist()) or turn == 0
        assert "length" in safetensors.load_file(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def with_zeros(index, path, zeros):
    """The file of an index of two lists, the first one empty until so many zeros, a hole in the file, are put there."""
    index.save(path)
    data, header = path.read_bytes(), _header(path.read_bytes())
    about, end = json.loads(header.pop("__metadata__")["metate.search"]), 8 + int.from_bytes(data[:8], "little")
    parts, at = [], 0
    for name, entry in header.items():
        part = data[end + entry["data_offsets"][0] : end + entry["data_offsets"][1]]
        hole = zeros * len(part) // index.ntotal if name.startswith("column.") else 0
        part = np.array([zeros, index.ntotal]).tobytes() if name == "length" else part
        entry["shape"][0] += zeros if hole else 0
        entry["data_offsets"] = [at, at + hole + len(part)]
        parts.append((at + hole, part))
        at += hole + len(part)
    text = json.dumps({"__metadata__": {"metate.search": json.dumps(about)}, **header}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, part in parts:
            file.seek(8 + len(text) + place)
            file.write(part)
    return load(path, mmap=True)


def two_lists():
    """The second one holds all vectors."""
    index = IVFFlatIndex(D, 2)
    index.set_trained({"centroids": np.stack([np.zeros(D), np.ones(D)]).astype(np.float32)})
    index.add_with_ids(1 + 0.1 * X, np.arange(5, 75))
    return index


def test_an_index_larger_than_memory_is_searched(tmp_path):
    """A list of zeros twice as large as memory before one of vectors."""
    index, rows = two_lists(), 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (4 * D + 8)
    found = with_zeros(index, tmp_path / "index", rows)
    assert found.ntotal == rows + 70
    for queries in (Q, torch.from_numpy(Q)):
        for a, b in zip(found.search(1 + 0.1 * queries, 9), index.search(1 + 0.1 * Q, 9, nprobe=2), strict=True):
            assert np.array_equal(a, b)


def test_filters_of_a_mapped_index_take_a_bit_a_row(tmp_path):
    """Whatever says them; for its ids alone there are eight bytes."""
    index, rows = two_lists(), 1 << 22
    found = with_zeros(index, tmp_path / "index", rows)
    wanted, mask = np.arange(10, 60, 3), np.zeros(80, bool)
    mask[wanted] = True
    expected = index.search(1 + 0.1 * Q, 9, nprobe=2, filter=wanted)
    assert (expected[1][:, 0] >= 0).all()
    for what in (
        wanted, range(10, 60, 3), mask, np.packbits(mask, bitorder="little"),
        lambda ids: (ids >= 10) & (ids < 60) & (ids % 3 == 1),
    ):  # fmt: skip
        tracemalloc.start()
        try:
            answer = found.search(1 + 0.1 * Q, 9, filter=what)
            assert tracemalloc.get_traced_memory()[1] < 4 * rows
        finally:
            tracemalloc.stop()
        assert all(np.array_equal(a, b) for a, b in zip(answer, expected, strict=True))
    assert np.array_equal(found.reconstruct(wanted), index.reconstruct(wanted))
    with pytest.raises(KeyError):
        found.reconstruct(1000)


def test_untrained_indexes_have_files(tmp_path):
    index = IVFPQIndex(D, 5, 4, 4, "cosine", residual=False, refine="sq8", seed=3)
    index.save(tmp_path / "index")
    found = load(tmp_path / "index")
    assert not found.is_trained and found.settings() == index.settings()
    found.train(X)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    index, path = filled(FlatIndex(D)), tmp_path / "index"
    index.add(X)
    index.save(path)
    index.add(X)
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
            patch.setattr(os, broken, lambda *_: (_ for _ in ()).throw(OSError("disk")))
            index.save(path)
        assert [file.name for file in tmp_path.iterdir()] == ["index"] and load(path).ntotal == 70
    path = tmp_path / "no folder" / "index"
    with pytest.raises(FileNotFoundError) as caught:
        index.save(path)
    assert caught.value.filename == str(path)


def killed_at(step, work):
    """Does the work in a child that is killed when files.py has called so many functions; whether it came to that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, _):
            nonlocal calls
            if event == "c_call" and frame.f_code.co_filename == files.__file__:
                calls += 1
                if calls > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_save_that_is_killed_leaves_the_old_file(unnamed, tmp_path, monkeypatch):
    """Wherever it is; nothing else is there when the next one is done, nor as a rule before."""
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    old, new, path = FlatIndex(D), FlatIndex(D), tmp_path / "index"
    old.add(X)
    new.add(X[:50])
    old.save(path)
    step = left = 0
    while killed_at(step, lambda: new.save(path)):
        names = sorted(file.name for file in tmp_path.iterdir())
        left += len(names) > 1
        assert names[-1] == "index" and load(path).ntotal in (70, 50)
        old.save(path)
        assert [file.name for file in tmp_path.iterdir()] == ["index"] and load(path).ntotal == 70
        step += 1
    assert step > 20 and load(path).ntotal == 50
    assert left <= 2 if unnamed and hasattr(os, "O_TMPFILE") else left > 2


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path):
    old, new, path = FlatIndex(D), FlatIndex(D), tmp_path / "index"
    old.add(X[:5])
    new.add(X)
    old.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (X[:30].nbytes, hard))
    try:
        with pytest.raises(OSError) as caught:
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert load(path).ntotal == 5 and [file.name for file in tmp_path.iterdir()] == ["index"]


def test_the_file_of_a_save_under_way_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    index, path = FlatIndex(D), tmp_path / "index"
    index.add(X)
    with files.replacing(path) as file:
        file.write(b"slow")
        index.save(path)
        assert load(path).ntotal == 70 and len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"slow" and len(list(tmp_path.iterdir())) == 1


def _header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _with_header(data, change):
    """The file with a header that was changed; what lies behind stays aligned."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = _header(data)
    about = json.loads(header["__metadata__"]["metate.search"])
    change(header, about)
    if "__metadata__" in header:
        header["__metadata__"]["metate.search"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + data[end:]


HOSTILE = {
    "version": lambda h, a: a.update(version=2),
    "kind": lambda h, a: a.update(index="Index"),
    "setting": lambda h, a: a["settings"].update(M=2),
    "setting missing": lambda h, a: a["settings"].pop("opq"),
    "setting more": lambda h, a: a["settings"].update(device="cuda"),
    "huge": lambda h, a: a["settings"].update(dim=2**60),
    "many lists": lambda h, a: a["settings"].update(nlist=2**40),
    "bool": lambda h, a: a["settings"].update(residual=1),
    "next id": lambda h, a: a.update(next_id=-1),
    "next id low": lambda h, a: a.update(next_id=3),
    "no checksum": lambda h, a: a["crc32"].pop("length"),
    "wrong checksum": lambda h, a: a["crc32"].update(length="00000000"),
    "no metadata": lambda h, a: h.pop("__metadata__"),
    "dtype": lambda h, a: h["column.codes"].update(dtype="I8"),
    "shape": lambda h, a: h["column.codes"].update(shape=[35, 4]),
    "shape negative": lambda h, a: h["column.codes"].update(shape=[-70, -2]),
    "offsets": lambda h, a: h["column.codes"].update(data_offsets=[0, 140]),
    "offsets beyond": lambda h, a: h["column.codes"].update(data_offsets=[2**62, 2**62 + 140]),
    "tensor missing": lambda h, a: h.pop("length"),
    "no dimension": lambda h, a: h["length"].update(shape=[]),
    "entry": lambda h, a: h.update(length=[1, 2]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, tmp_path):
    index, path = filled(IVFPQIndex(D, 5, 4, 4)), tmp_path / "index"
    index.add(X)
    index.save(path)
    path.write_bytes(_with_header(path.read_bytes(), HOSTILE[case]))
    with pytest.raises(FormatError, match=r"metate\.search\.load: "):
        load(path)


def test_files_of_others_are_told_apart(tmp_path):
    index = FlatIndex(D)
    index.add(X)
    write_faiss(index, tmp_path / "faiss")
    (tmp_path / "text").write_text("a text of more than 8 bytes")
    for name in ("faiss", "text"):
        with pytest.raises(FormatError, match=r"expected a file that index\.save wrote; those of faiss are for"):
            load(tmp_path / name)


VALUES = [
    None, True, -1, 0, 1, 2, 7, 8, 16, 69, 71, 2**31, 2**62, 2**63, 2**64, -(2**70), 1e300, float("nan"), "", "F32",
    "I64", "l2", "0" * 8, [], [0, 0], [70, 8], [2**40, 2**40], {}, "__class__",
]  # fmt: skip


def _with_other_values(data, random):
    """The file with values of its header that are others, gone, or under another name."""

    def change(header, about):
        for _ in range(int(random.integers(1, 4))):
            held = header if random.random() < 0.5 else about
            while inner := [each for each in (held.values() if isinstance(held, dict) else held)
                            if isinstance(each, (dict, list)) and each and random.random() < 0.7]:  # fmt: skip
                held = inner[int(random.integers(len(inner)))]
            keys = [key for key in held if key != "__metadata__"] if isinstance(held, dict) else range(len(held))
            if not len(keys):
                continue
            key, value = keys[int(random.integers(len(keys)))], deepcopy(VALUES[int(random.integers(len(VALUES)))])
            if isinstance(held, dict) and random.random() < 0.2:
                value = held.pop(key)
                key = str(value)[:9]
            held[key] = value

    return _with_header(data, change)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(kind, tmp_path):
    """Or, without comparing checksums, searched without a crash."""
    index, path = filled(KINDS[kind]("l2")), tmp_path / "index"
    index.add(X)
    index.save(path)
    data, random = path.read_bytes(), np.random.default_rng(0)
    header, expected = 8 + int.from_bytes(data[:8], "little"), index.search(Q, 9)

    def read(mutant, mapped):
        overwrite(path, mutant)
        found = load(path, mmap=mapped).search(Q, 9)
        # What is not refused says the same: another seed, spaces.
        assert mapped or all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    with bounded_memory(len(data)):
        for turn in range(max(MALFORMED // 30, 200)):
            mutant = _with_other_values(data, random) if turn % 2 else damaged(data, random, header)
            survives(lambda mutant=mutant, turn=turn: read(mutant, turn % 4 > 1), mutant)


def test_lengths_of_no_dimension_are_refused(tmp_path):
    index, path = filled(FlatIndex(D)), tmp_path / "index"
    index.save(path)
    path.write_bytes(_with_header(path.read_bytes(), lambda h, a: h["length"].update(shape=[])))
    with pytest.raises(FormatError, match="tensor 'length'"):
        load(path)


def test_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "index"
    for text in (b"", b"x", b"\xff" * 9, (2).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"[[[["):
        path.write_bytes(text)
        with pytest.raises(FormatError):
            load(path)
    with pytest.raises(FileNotFoundError, match="a file that exists"):
        load(tmp_path / "none")
