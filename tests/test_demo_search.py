"""`metate demo search` on a few modules of the standard library."""

import importlib.machinery
import importlib.util
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
from rich.console import Console

from metate.demo import search


def small(tmp_path):
    return search.Plan(
        folders=(Path(sysconfig.get_path("stdlib")) / "json",), most=60, dim=64, M=8, bits=4, nlist=2, nprobes=(1, 2),
        queries=8, plot=tmp_path / "plot.png",
    )  # fmt: skip


def test_answers_from_docstrings(tmp_path, capsys, monkeypatch):
    plan = small(tmp_path)
    monkeypatch.setattr(search, "installed_model", lambda: None)
    assert search.play(Console(width=200), ("serialise an object to a JSON document",), plan)
    shown = capsys.readouterr().out
    assert " docstrings" in shown and "2 of 2 lists" in shown
    assert "encoder.JSONEncoder" in shown.partition("JSON document")[2]
    exact = next(line for line in shown.splitlines() if line.startswith("exact"))
    assert "1.000" in exact
    assert plan.plot.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_questions_are_typed_at_a_terminal(tmp_path, capsys, monkeypatch):
    typed = iter(["serialise an object to a JSON document", " "])
    monkeypatch.setattr(search, "installed_model", lambda: None)
    monkeypatch.setattr(search, "QUESTIONS", ("decode a document",))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    assert search.play(Console(width=80), (), small(tmp_path))
    shown = capsys.readouterr().out
    asked = [line for line in shown.splitlines() if line.startswith("your question")]
    assert len(asked) == 2 and "encoder.JSONEncoder" in shown.partition("your question")[2]
    table = [line for line in shown.splitlines() if line.startswith(("exact", "PQ", "OPQ", "IVF-PQ"))]
    assert [line.split()[-4] for line in table] == ["256", "4", "68", "76", "76"], "bytes of a vector, a line each"


class SentenceTransformer:
    """Its interface: vectors of 12 dimensions."""

    def __init__(self, path, device=None, local_files_only=False):
        assert (Path(path) / "modules.json").exists() and device == "cpu" and local_files_only

    def encode(self, sentences, normalize_embeddings=False, convert_to_numpy=True, show_progress_bar=None):
        assert normalize_embeddings and convert_to_numpy and show_progress_bar is False
        return search.Embedding(["JSON"], 12)(sentences)


def test_a_model_of_sentence_transformers_is_used(tmp_path, capsys, monkeypatch):
    library = types.ModuleType("sentence_transformers")
    library.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    library.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert search.installed_model() is None
    folder = tmp_path / "models--sentence-transformers--all-small" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "modules.json").touch()
    search.play(Console(width=200), ("what writes JSON",), small(tmp_path))
    assert "12 dimensions by sentence-transformers/all-small" in capsys.readouterr().out


def test_embedding_survives_spelling():
    texts = ["open a compressed archive", "compute a matrix product", "send an electronic letter"]
    embed = search.Embedding(texts, 512)
    x = embed(texts)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert (x @ embed(["matirx prodct"])[0]).argmax() == 1
    assert np.isfinite(embed(["", "a"])).all()
