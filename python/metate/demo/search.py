"""Questions answered from the docstrings of this machine's Python: exact search beside product quantisation.

Where sentence-transformers and one of its models are on this machine, that model makes the vectors. Elsewhere a text is
a bag of character n-grams, hashed, weighted by how rare they are, and projected by signs to a few hundred dimensions
(Weinberger et al. 2009): no model, no download, and a spelling mistake costs little.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import os
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from metate.search import FlatIndex, Index, IVFPQIndex, PQIndex

Floats = npt.NDArray[np.float32]
Embed: TypeAlias = "Callable[[list[str]], Floats]"  # texts to unit vectors

QUESTIONS = (
    "how do I run a function in several processes",
    "parse a date from a string",
    "remove a directory and everything in it",
    "decompress a gzip file",
    "find the greatest common divisor",
)
_BUCKETS = 1 << 16
_TEXT = 600  # characters of a docstring that count


@dataclass(frozen=True)
class Plan:
    """How much is searched, and by what."""

    folders: tuple[Path, ...] = tuple(dict.fromkeys(Path(sysconfig.get_path(p)) for p in ("stdlib", "purelib")))
    most: int = 40_000  # docstrings
    most_for_model: int = 4_000  # where a model reads them
    seconds: float = 40  # of reading
    dim: int = 256
    M: int = 32
    bits: int = 8
    nlist: int = 128
    nprobes: tuple[int, ...] = (1, 4, 16)
    queries: int = 256
    plot: Path = Path("metate-search.png")


@dataclass(frozen=True)
class Entry:
    """A documented function, class or module."""

    name: str
    text: str


def documented(plan: Plan) -> Iterator[Entry]:
    """The docstrings of all that is public, the standard library first, each text once."""
    end, seen = time.monotonic() + plan.seconds, set()
    for folder in plan.folders:
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder)
            if {"test", "tests", "site-packages", "idlelib"} & set(inner.parts) or time.monotonic() > end:
                continue
            for name, text in _docstrings(path, ".".join(inner.with_suffix("").parts).removesuffix(".__init__")):
                if len(text) > 30 and text not in seen:
                    seen.add(text)
                    yield Entry(name, text)


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    places: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while places:
        name, node = places.pop()
        text = ast.get_docstring(node)
        if text:
            yield name, text[:_TEXT]
        if isinstance(node, (ast.Module, ast.ClassDef)):
            places += [
                (f"{name}.{child.name}", child)
                for child in node.body
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_"
            ]


def installed_model() -> tuple[str, Any] | None:
    """Name and model: the first of sentence-transformers that the cache of Hugging Face holds."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    for folder in sorted(hub.glob("models--sentence-transformers--*/snapshots/*/modules.json")):
        name = folder.parts[-4].removeprefix("models--").replace("--", "/", 1)
        library = importlib.import_module("sentence_transformers")
        return name, library.SentenceTransformer(str(folder.parent), device="cpu", local_files_only=True)
    return None


def _model_embedding(model: Any) -> Embed:
    def embed(texts: list[str]) -> Floats:
        found = model.encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    return embed


class Embedding:
    """Texts to unit vectors; which n-grams are rare it learns from the texts that are searched."""

    def __init__(self, texts: list[str], dim: int) -> None:
        random = np.random.default_rng(0)
        self.column = random.integers(0, dim, (_BUCKETS, 2))
        self.sign = random.choice([-1.0, 1.0], (_BUCKETS, 2))
        self.dim, counts = dim, np.zeros(_BUCKETS)
        for text in texts:
            counts[_grams(text)[0]] += 1
        self.weight = np.log((1 + len(texts)) / (1 + counts))

    def __call__(self, texts: list[str]) -> Floats:
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            grams, counts = _grams(text)
            weight = (self.weight[grams] * np.sqrt(counts))[:, None] * self.sign[grams]
            row += np.bincount(self.column[grams].ravel(), weight.ravel(), self.dim)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return rows


def _grams(text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The buckets of all runs of 3, 4 and 5 letters within and around words, and how often each occurs."""
    words = "".join(c if c.isalnum() else " " for c in text.lower())
    letters = np.frombuffer(f" {' '.join(words.split())} ".encode(), np.uint8).astype(np.uint64)
    found = []
    for n in (3, 4, 5):
        hashed = np.zeros(max(len(letters) - n + 1, 0), np.uint64)
        for i in range(n if len(hashed) else 0):
            hashed = (hashed ^ letters[i : i + len(hashed)]) * np.uint64(0x9E3779B97F4A7C15)
        found.append((hashed >> np.uint64(48)).astype(np.int64))
    return np.unique(np.concatenate(found), return_counts=True)


def play(console: Console, questions: tuple[str, ...] = (), plan: Plan | None = None) -> bool:
    """Reads, indexes, measures, answers; whether exact search found every docstring by itself."""
    plan, found = plan or Plan(), installed_model()
    entries = _read(console, plan, plan.most if found is None else plan.most_for_model)
    embed: Embed = (
        Embedding([entry.text for entry in entries], plan.dim) if found is None else _model_embedding(found[1])
    )
    with console.status("embedding them"):
        x = embed([f"{entry.name} {entry.text}" for entry in entries])
    dim = x.shape[1]
    console.print(f"{len(x)} docstrings, as vectors of {dim} dimensions by {found[0] if found else 'hashed n-grams'}")
    queries = embed([entry.text.partition("\n")[0] for entry in entries[:: max(1, len(entries) // plan.queries)]])
    exact = FlatIndex(dim, "cosine")
    exact.add(x)
    rows = [_measured("exact", exact, queries, None, exact)]
    nlist, M = min(plan.nlist, len(entries) // 4), math.gcd(plan.M, dim)
    for name, index in {
        "PQ": PQIndex(dim, M, plan.bits, "cosine"),
        "OPQ, refined": PQIndex(dim, M, plan.bits, "cosine", opq=True, refine="sq8"),
        "IVF-PQ, refined": IVFPQIndex(dim, nlist, M, plan.bits, "cosine", refine="sq8"),
    }.items():
        with console.status(f"{name}: training and adding"):
            index.train(x, progress=False)
            index.add(x, progress=False)
        for nprobe in (None,) if index.nlist is None else [n for n in plan.nprobes if n <= nlist]:
            label = name if nprobe is None else f"{name}, {nprobe} of {nlist} lists"
            rows.append(_measured(label, index, queries, nprobe, exact))
    _show(console, rows, plan)
    best = exact.search(x[: plan.queries], 1)[0]
    for question in questions or chain(QUESTIONS, _typed(console)):
        _answer(console, question, embed, exact, entries)
    return bool((best > 0.999).all())


def _read(console: Console, plan: Plan, most: int) -> list[Entry]:
    entries: list[Entry] = []
    with Progress(
        TextColumn("reading docstrings"), BarColumn(), TextColumn("{task.completed}"), console=console
    ) as bar:
        task = bar.add_task("", total=most)
        for entry in documented(plan):
            entries.append(entry)
            bar.advance(task)
            if len(entries) == most:
                break
    return entries


@dataclass(frozen=True)
class Measured:
    """One way of searching: the share of the ten exact neighbours that it found, and its speed."""

    name: str
    bytes: int  # of a vector
    recall: float
    one: float  # queries a second, one by one
    many: float  # all at once


def _measured(name: str, index: Index, queries: Floats, nprobe: int | None, exact: Index) -> Measured:
    began = time.perf_counter()
    found = index.search(queries, 10, nprobe=nprobe)[1]
    many = len(queries) / (time.perf_counter() - began)
    few = queries[:: max(1, len(queries) // 32)]
    began = time.perf_counter()
    for query in few:
        index.search(query, 10, nprobe=nprobe)
    one = len(few) / (time.perf_counter() - began)
    truth = exact.search(queries, 10)[1]
    recall = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]))
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in index.column_types().values())
    return Measured(name, size, recall, one, many)


def _show(console: Console, rows: list[Measured], plan: Plan) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("search", "bytes", "recall of 10", "queries/s", "in a batch"):
        table.add_column(title, justify="left" if title == "search" else "right")
    for row in rows:
        table.add_row(row.name, str(row.bytes), f"{row.recall:.3f}", f"{row.one:.0f}", f"{row.many:.0f}")
    console.print(table)
    console.print(f"on {torch.get_num_threads()} threads", highlight=False)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(rows, plan.plot)
        console.print(f"wrote {escape(str(plan.plot))}", highlight=False)


def _plot(rows: list[Measured], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row.recall for row in rows], [row.many for row in rows], "o")
    for row in rows:
        axes.annotate(row.name, (row.recall, row.many), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="recall of the 10 exact neighbours", ylabel="queries a second", yscale="log")
    axes.margins(x=0.25, y=0.15)
    figure.savefig(path, dpi=120)


def _typed(console: Console) -> Iterator[str]:
    """Questions from a terminal, until an empty one."""
    while sys.stdin.isatty():
        try:
            question = console.input("\nyour question (nothing ends): ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        yield question


def _answer(console: Console, question: str, embed: Embed, index: Index, entries: list[Entry]) -> None:
    console.print(f"\n[bold]{escape(question)}[/]")
    for score, at in zip(*(part.tolist() for part in index.search(embed([question])[0], 3)), strict=True):
        if at >= 0:
            line = entries[at].text.partition("\n")[0][:90]
            console.print(f"  {score:.2f} [cyan]{escape(entries[at].name)}[/]  {escape(line)}", highlight=False)
