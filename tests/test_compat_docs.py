"""The examples of docs/compat.md run as they stand there."""

import re
from pathlib import Path

import pytest
import torch

from metate import compat
from metate.compat import sdpa
from metate.compat import transformers as route

TEXT = (Path(__file__).resolve().parent.parent / "docs/compat.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", TEXT, re.S | re.M))


def test_no_example_is_left_out():
    assert len(EXAMPLES) == TEXT.count("```python")


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title):
    if "transformers" in title:
        pytest.importorskip("transformers")
    if "PEFT" in title:
        pytest.importorskip("peft")
    if title.split(".")[0] in ("F", "torch") and not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip("came with torch 2.11")
    try:
        exec(EXAMPLES[title], {})
    finally:
        if title in ("flash-attn", "bitsandbytes", "faiss"):
            compat.uninstall(title.replace("-", "_"))
        if title in ("transformers", "PEFT on low-bit experts"):
            route.disable()
    assert not sdpa.active()
