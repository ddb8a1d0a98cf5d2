"""Files that faiss 1.15 wrote (tests/data/faiss) are read, searched and written again; damaged ones are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import bounded_memory, damaged, overwrite, survives

from metate import FormatError
from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex, read_faiss, write_faiss
from metate.search import faiss_files as files
from metate.search import faiss_nodes as nodes

FOLDER = Path(__file__).parent / "data" / "faiss"
FILES = sorted(FOLDER.glob("*.index"))
EXPECTED = np.load(FOLDER / "expected.npz")  # x: what was added; q: queries; and faiss' answers
MALFORMED = int(os.environ.get("METATE_TEST_MALFORMED", "2000"))  # files of all 30 kinds; a million in the long target
KINDS = {
    "flat": FlatIndex, "idmap2": FlatIndex, "ivfflat": IVFFlatIndex, "ivfpq": IVFPQIndex, "opq": IVFPQIndex,
    "ivfsq": IVFFlatIndex, "refine": PQIndex, "idmap": PQIndex, "pq": PQIndex, "sq": FlatIndex,
}  # fmt: skip
OTHER = {  # what files are written as that say more than an index of metate.search holds
    "idmap2": b"IxMp", "pq_fast": b"IxPq", "pq_fast_ip": b"IxPq", "ivfpq_fast": b"IwPQ", "sq_byte": b"IxSQ",
    "ivfsq_byte": b"IwSq",
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "ivfsq_half"], ids=lambda path: path.stem)
def test_answers_are_those_of_faiss(path, tmp_path):
    name, index = path.stem, read_faiss(path)
    assert type(index) is KINDS[name.split("_")[0]] and index.ntotal == 40
    distances, ids = index.search(EXPECTED["q"], 5)
    there, answer = ids >= 0, EXPECTED[f"{name}.I"]
    np.testing.assert_allclose(distances[there], EXPECTED[f"{name}.D"][there], rtol=1e-5, atol=2e-6)
    assert np.array_equal(np.sort(ids, 1), np.sort(answer, 1)) and (ids != answer).mean() <= 0.1  # near ties
    write_faiss(index, tmp_path / "index")
    written = (tmp_path / "index").read_bytes()
    assert written[:4] == OTHER[name] if name in OTHER else written == path.read_bytes()
    again = read_faiss(tmp_path / "index")
    assert np.array_equal(again.search(EXPECTED["q"], 5)[1], ids)
    index.add(EXPECTED["x"][:3])
    assert index.ntotal == 43


def test_what_we_train_goes_there_and_back(tmp_path):
    x, q = EXPECTED["x"], EXPECTED["q"]
    for index in (
        IVFPQIndex(8, 3, 2, 4, opq=True, refine="sq8"), PQIndex(8, 2, 4, "inner_product", opq=True),
        IVFFlatIndex(8, 3, "cosine", storage="float16"), IVFPQIndex(8, 3, 4, 4, residual=False),
        FlatIndex(8, "inner_product", storage="sq8"), IVFFlatIndex(8, 3, storage="sq8"),
    ):  # fmt: skip
        write_faiss(index, tmp_path / "untrained")
        assert not read_faiss(tmp_path / "untrained").is_trained
        index.train(x)
        index.add_with_ids(x, 3 * np.arange(40)[::-1] + 1)
        index.remove_ids(range(0, 30, 5))
        write_faiss(index, tmp_path / "index")
        found = read_faiss(tmp_path / "index")
        unit = q / np.linalg.norm(q, axis=1, keepdims=True)
        for a, b in zip(index.search(unit, 9), found.search(unit, 9), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_damaged_files_are_refused_or_searched(path, tmp_path):
    data, random, mutant = path.read_bytes(), np.random.default_rng(0), tmp_path / "index"
    mutant.write_bytes(data)

    def read():
        try:
            index = read_faiss(mutant)
        except FormatError as error:
            assert str(error).startswith("metate.search.read_faiss: ")
            raise
        if index.is_trained:
            index.search(EXPECTED["q"], 5)

    with bounded_memory(len(data)):
        for _ in range(max(MALFORMED // 30, 200)):
            changed = damaged(data, random, min(200, len(data)))
            overwrite(mutant, changed)
            survives(read, changed)


def test_what_cannot_be_read_is_named(tmp_path):
    for data, message in [
        (b"", "file is empty"),
        (b"IxHN" + bytes(60), "a node is 'IxHN'"),
        (FILES[0].read_bytes() + b"x", "where the index ends"),
        ((FOLDER / "ivfsq_half.index").read_bytes(), "by_residual is true of scalar-quantised lists"),
    ]:
        (tmp_path / "index").write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read_faiss(tmp_path / "index")
    with pytest.raises(FileNotFoundError):
        read_faiss(tmp_path / "none")


def test_a_shape_alone_takes_no_memory(tmp_path):
    A = np.broadcast_to(np.float32(0), (1 << 19, 1 << 18))
    inner = nodes.Flat(1 << 19, 0, nodes.L2, True, np.zeros((0, 1 << 19), np.float32))
    tree = nodes.PreTransform(1 << 18, 0, nodes.L2, False, [nodes.Transform(A, None, False)], inner)
    with open(tmp_path / "index", "wb") as file:
        files.write_tree(tree, file)
    with pytest.raises(FormatError, match="an untrained transform is 262144 to 524288 dimensions"):
        read_faiss(tmp_path / "index")
