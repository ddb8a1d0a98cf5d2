"""What `metate.generate` refuses by name, before it computes anything."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("metate._runtime", reason="not built: run `pip install .` in metate's source")
import metate
from metate.generate import ModelDraft, NgramDraft, PagedKVCache, Scheduler
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
        (ValueError, r"generate: max_new_tokens is \d+, expected less than 2\^31", dict(max_new_tokens=2**70)),
        (TypeError, "generate: stream is 'no', expected True or False", dict(stream="no")),
        (TypeError, "generate: return_logprobs is None, expected True or False", dict(return_logprobs=None)),
        (ValueError, "generate: draft is 3, expected None", dict(draft=3)),
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
    with pytest.raises(TypeError, match=r"metate.NgramDraft: longest is None, expected an integer"):
        NgramDraft(longest=None)
    with pytest.raises(TypeError, match=r"metate.ModelDraft: model is int, expected metate.models.Llama"):
        ModelDraft(3)


def test_schedulers_and_caches_name_what_is_wrong(model):
    cache = PagedKVCache(model.cache_layout, 4)
    for kind, message, call in (
        (TypeError, "Scheduler: model is str", lambda: Scheduler("llama", cache)),
        (
            ValueError,
            "Scheduler: cache is one of CacheLayout.layers=3.*expected one of the model's cache_layout",
            lambda: Scheduler(model, PagedKVCache(replace(model.cache_layout, layers=3), 4)),
        ),
        (ValueError, "Scheduler: seed is -1", lambda: Scheduler(model, cache, seed=-1)),
        (
            TypeError,
            "generate: constraint is 3",
            lambda: Scheduler(model, cache).add([1], max_new_tokens=2, constraint=3),
        ),
        (ValueError, "ModelDraft: dtype is 'int2'", lambda: ModelDraft(model, dtype="int2")),
        (
            TypeError,
            "PagedKVCache: prefix_cache is 'no'",
            lambda: PagedKVCache(model.cache_layout, 4, prefix_cache="no"),
        ),
        (TypeError, "PagedKVCache: on_evict is int", lambda: PagedKVCache(model.cache_layout, 4, on_evict=3)),
        (ValueError, "PagedKVCache: blocks is", lambda: PagedKVCache(model.cache_layout, 2**31)),
    ):
        with pytest.raises(kind, match=f"metate.{message}"):
            call()
