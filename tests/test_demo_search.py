"""`metate demo search` on a few modules of the standard library."""

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
from rich.console import Console

from metate.demo import search


def test_answers_from_docstrings(tmp_path, capsys):
    plan = search.Plan(
        folders=(Path(sysconfig.get_path("stdlib")) / "json",), most=60, dim=64, M=8, bits=4, nlist=2, nprobes=(1, 2),
        queries=8, plot=tmp_path / "plot.png",
    )  # fmt: skip
    assert search.play(Console(width=200), ("serialise an object to a JSON document",), plan)
    shown = capsys.readouterr().out
    assert " docstrings" in shown and "2 of 2 lists" in shown
    assert "encoder.JSONEncoder" in shown.partition("JSON document")[2]
    exact = next(line for line in shown.splitlines() if line.startswith("exact"))
    assert "1.000" in exact
    assert plan.plot.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_embedding_survives_spelling():
    texts = ["open a compressed archive", "compute a matrix product", "send an electronic letter"]
    embed = search.Embedding(texts, 512)
    x = embed(texts)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert (x @ embed(["matirx prodct"])[0]).argmax() == 1
    assert np.isfinite(embed(["", "a"])).all()
