"""Text from a model with a paged cache: batches that change while they run, speculation, grammars."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from torch import Tensor

from metate.errors import fail, require_flag
from metate.generate.cache import Batch, CacheLayout, Model, PagedKVCache, Part, positive, require_model
from metate.generate.constraint import Constraint, MatcherConstraint
from metate.generate.draft import Draft, ModelDraft, NgramDraft, Wish
from metate.generate.sampling import Sampling, Speculated
from metate.generate.scheduler import Event, Scheduler, Totals

__all__ = [
    "Batch",
    "CacheLayout",
    "Constraint",
    "Draft",
    "Event",
    "Generation",
    "MatcherConstraint",
    "Model",
    "ModelDraft",
    "NgramDraft",
    "PagedKVCache",
    "Part",
    "Sampling",
    "Scheduler",
    "Speculated",
    "Totals",
    "Wish",
    "generate",
]


@dataclass
class Generation:
    """What a prompt became: its new tokens, why they end (as in `Event`), and their log-probabilities if asked for."""

    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    logprobs: list[float] | None = None


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    eos: int | Iterable[int] = (),
    stop: Iterable[Sequence[int]] = (),
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    draft: Draft | Model | str | None = None,
    return_logprobs: bool = False,
    stream: bool = False,
    cache: PagedKVCache | None = None,
    cache_dtype: str | None = None,
    page_size: int = 16,
    max_sequences: int = 64,
    token_budget: int = 512,
) -> Any:
    """Continues prompts, many at once, each as if it were alone.

    Args:
        model: `metate.models.Llama`, or anything with the three members of `metate.generate.Model`.
        prompts: sequences of token numbers, or an integer tensor (prompts, length). Text: encode it first.
        max_new_tokens: of each prompt, at least 1.
        temperature, top_k, top_p, min_p: what is drawn from, as `Sampling` says; temperature 0 is greedy.
        seed: prompt i draws with seed + i; or a seed for each prompt.
        eos: token or tokens that end a text. stop: token sequences that do. Both stay in the text.
        constraint: called with the tokens generated so far, it gives what may follow: a bool mask (vocab), a packed
            int32 mask (ceil(vocab / 32)) as xgrammar and llguidance fill it, or None for anything. One for all prompts
            if it keeps no state, else one for each; `MatcherConstraint` makes one of a matcher. Where only one token
            is allowed it is taken without a forward pass of its own. May be asked about guesses that are not kept.
        draft: None; "ngram", guesses from repetitions in the text; or a smaller model with the same vocabulary.
            Guesses are checked many at a time. The text keeps the model's distribution exactly (Leviathan et al. 2023,
            theorem in appendix A.1); greedy and n-gram: it stays the text without a draft.
        return_logprobs: also give log-probabilities (natural), as `Event` defines them.
        stream: give an iterator of `Event`, tokens as they come; request i is prompt i.
        cache: to keep prefixes from call to call; None: one that holds max_sequences of the longest texts.
        cache_dtype, page_size: of a cache made here, as in `PagedKVCache`. max_sequences, token_budget: as in
            `Scheduler`.

    Returns:
        A `Generation` for each prompt, in their order; or an iterator of `Event`.

    Raises:
        ValueError, TypeError: naming the argument. CacheFull (a RuntimeError): others hold the blocks of `cache`.
    """
    texts = _prompts(prompts)
    require_model("generate", model)
    stream = require_flag("generate", "stream", stream)
    page_size = positive("generate", "page_size", page_size)
    max_new_tokens = positive("generate", "max_new_tokens", max_new_tokens)
    max_sequences = min(positive("Scheduler", "max_sequences", max_sequences), max(len(texts), 1))
    if cache is None:
        longest = sorted((len(text) + max_new_tokens for text in texts), reverse=True)[:max_sequences]
        blocks = sum(-(-length // page_size) for length in longest)
        cache = PagedKVCache(model.cache_layout, max(blocks, 1), page_size, dtype=cache_dtype)
    scheduler = Scheduler(model, cache, max_sequences=max_sequences, token_budget=token_budget, draft=draft)
    for text, own_seed, own in zip(texts, _seeds(seed, len(texts)), _each(constraint, len(texts)), strict=True):
        scheduler.add(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seed=own_seed, eos=eos, stop=stop, constraint=own, return_logprobs=return_logprobs,
        )  # fmt: skip
    events = _events(scheduler)
    if stream:
        return events
    found = [Generation(logprobs=[] if return_logprobs else None) for _ in texts]
    for event in events:
        generation = found[event.request]
        generation.finished = event.finished
        if event.token is not None:
            generation.tokens.append(event.token)
            if generation.logprobs is not None and event.logprob is not None:
                generation.logprobs.append(event.logprob)
    return found


def _events(scheduler: Scheduler) -> Iterator[Event]:
    """All events; who stops listening, or is stopped by an error, leaves nothing in the cache."""
    with contextlib.ExitStack() as stack:
        for number in range(scheduler.added):
            stack.callback(scheduler.cancel, number)
        yield from scheduler


def _prompts(prompts: Sequence[Sequence[int]] | Tensor) -> list[Sequence[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            got = f"{prompts.dtype} of shape {tuple(prompts.shape)}"
            raise fail("generate", "prompts", got, "integers (prompts, length)", error=TypeError)
        return list(prompts.tolist())
    if not isinstance(prompts, Iterable):
        got = type(prompts).__name__
        raise fail("generate", "prompts", got, "sequences of token numbers (encode text first)", error=TypeError)
    texts = [text.tolist() if isinstance(text, Tensor) else text for text in prompts]
    if isinstance(prompts, str) or any(isinstance(text, (str, Number)) for text in texts):
        raise fail(
            "generate", "prompts", "text or numbers", "sequences of token numbers (encode text first)", error=TypeError
        )
    return texts


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    try:
        first = operator.index(seed)  # type: ignore[arg-type]
        return [first, *((first + i) % 2**64 for i in range(1, count))][:count]
    except TypeError:
        pass
    if not isinstance(seed, Iterable):
        raise fail("generate", "seed", repr(seed), "an integer, or one for each prompt", error=TypeError)
    seeds = list(seed)
    if len(seeds) != count:
        raise fail("generate", "seed", f"{len(seeds)} seeds", f"one, or {count}: one for each prompt")
    return seeds


def _each(constraint: Constraint | Sequence[Constraint | None] | None, count: int) -> list[Constraint | None]:
    if constraint is None or callable(constraint):
        return [constraint] * count
    if not isinstance(constraint, Sequence) or not all(own is None or callable(own) for own in constraint):
        got = type(constraint).__name__
        raise fail("generate", "constraint", got, "a function of tokens, or one for each prompt", error=TypeError)
    if len(constraint) != count:
        raise fail("generate", "constraint", f"{len(constraint)} of them", f"one, or {count}: one for each prompt")
    return list(constraint)
