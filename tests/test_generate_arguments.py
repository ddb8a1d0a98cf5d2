"""What `metate.generate` refuses by name, before it computes anything."""

import pytest
import torch

pytest.importorskip("metate._runtime", reason="not built: run `pip install .` in metate's source")
import metate
from metate.generate import NgramDraft
from metate.models import Llama, LlamaConfig


@pytest.fixture(scope="module")
def model():
    return Llama(LlamaConfig(32, 16, 16, 1, 2, 1, 8)).initialize(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("eos", [None, "</s>", ["</s>"], 2.5])
def test_ends_that_no_token_is_are_refused(model, eos):
    with pytest.raises(TypeError, match=r"metate.generate: eos is .*, expected a"):
        metate.generate(model, [[1, 2]], eos=eos)


@pytest.mark.parametrize(
    "kind,message,wrong",
    [
        (TypeError, "generate: prompts is NoneType", dict(prompts=None)),
        (TypeError, "generate: max_new_tokens is '3', expected an integer", dict(max_new_tokens="3")),
        (TypeError, "generate: page_size is 2.5, expected an integer", dict(page_size=2.5)),
        (ValueError, "generate: page_size is 0, expected at least 1", dict(page_size=0)),
        (TypeError, "generate: seed is None, expected an integer", dict(seed=None)),
        (TypeError, "generate: stop is None, expected sequences", dict(stop=None)),
        (TypeError, "Scheduler: max_sequences is 'a', expected an integer", dict(max_sequences="a")),
        (TypeError, "Scheduler: cache is int, expected a metate.generate.PagedKVCache", dict(cache=3)),
    ],
)
def test_arguments_of_another_kind_are_named(model, kind, message, wrong):
    with pytest.raises(kind, match=f"metate.{message}"):
        metate.generate(model, **{**dict(prompts=[[1, 2]]), **wrong})


def test_a_draft_that_guesses_nothing_is_refused():
    with pytest.raises(ValueError, match=r"metate.NgramDraft: tokens is 0, expected at least 1"):
        NgramDraft(0)
