"""The documentation tells the truth: its Python runs, its commands exist, its generated page is the current one."""

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metate.bench import report
from metate.cli import app, operators_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# The routes of docs/compat.md each stand alone: tests/test_compat_docs.py.
SNIPPETS = [page for page in PAGES if "```python" in page.read_text() and page.stem != "compat"]


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page):
    """All of a page in one process, in order, as a reader would type them."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if "transformers" in code and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    if "sdpa" in code and not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip("torch's registry of attention kernels came with 2.11")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_page_of_operators_is_current():
    pytest.importorskip("triton", reason="its refusals are part of the page")
    assert (ROOT / "docs" / "ops.md").read_text() == operators_page(), "run `metate docs`"


def test_the_measurements_are_those_of_records():
    page, readme = ((ROOT / name).read_text() for name in ("docs/measured.md", "README.md"))
    records = [json.loads(path.read_text()) for path in (ROOT / "bench" / "results").glob("*.json")]
    shown = {page.find(report.section(record)): record for record in records if "command" in record}
    shown.pop(-1, None)
    assert len(shown) == page.count("\n## "), "run `metate docs --measured`"
    assert report.summary([shown[at] for at in sorted(shown)]) in readme


@pytest.mark.parametrize("module", ["", ".nn", ".quant", ".search", ".generate", ".parallel"])
def test_public_functions_say_what_they_raise(module):
    """And of what shapes and dtypes their arguments are, which no test can read."""
    module = importlib.import_module(f"metate{module}")
    for name in module.__all__:
        function = getattr(module, name)
        if inspect.isfunction(function):
            documented = inspect.getdoc(function) or ""
            assert "Raises:" in documented or "Never raises" in documented, name


def test_commands_that_the_readme_names_exist():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"(?:^|`)\s*metate ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"info", "verify", "bench", "demo"} <= named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
