"""Where speculated tokens come from: repetitions of the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from metate import library
from metate.errors import fail
from metate.generate.cache import Model, PagedKVCache, Part, positive, require_cache_dtype, require_model
from metate.generate.sampling import DRAFT, Sampling, Speculated, Uniforms, draw, probabilities


@dataclass(frozen=True)
class Wish:
    """A request that could use `count` guesses of what follows `tokens`, the first `prompt` of them its prompt."""

    request: int
    tokens: Sequence[int]
    prompt: int
    count: int
    sampling: Sampling


class Draft(Protocol):
    """What guesses; stateful, for one scheduler."""

    tokens: int  # guesses of one request at a time, at most

    def begin(self, model: Model, cache: PagedKVCache) -> None:
        """Once, with the model that checks the guesses and its cache."""
        ...

    def propose(self, wishes: Sequence[Wish]) -> Mapping[int, list[Speculated]]:
        """Guesses for some of the requests, `count` each at most."""
        ...

    def forget(self, request: int) -> None:
        """A request has ended."""
        ...


class NgramDraft:
    """What followed the last time the text had the same end (prompt lookup decoding, Saxena 2023).

    Args:
        tokens: guesses at a time, at most. longest, shortest: lengths of the ends that are looked for, longest first.
    """

    def __init__(self, tokens: int = 8, longest: int = 5, shortest: int = 2) -> None:
        shortest, longest = positive("NgramDraft", "shortest", shortest), positive("NgramDraft", "longest", longest)
        if shortest > longest:
            raise fail("NgramDraft", "shortest", shortest, f"1 to longest, {longest}")
        self.tokens, self.lengths = positive("NgramDraft", "tokens", tokens), range(longest, shortest - 1, -1)
        self.seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def begin(self, model: Model, cache: PagedKVCache) -> None:
        self.seen.clear()

    def propose(self, wishes: Sequence[Wish]) -> Mapping[int, list[Speculated]]:
        return {wish.request: [Speculated(token) for token in self._lookup(wish)] for wish in wishes}

    def _lookup(self, wish: Wish) -> Sequence[int]:
        """Each place of the text is indexed once, when a token follows it."""
        text = wish.tokens
        begin, places = self.seen.get(wish.request, (1, {}))
        for end in range(begin, len(text)):
            for length in self.lengths:
                if length <= end:
                    places[tuple(text[end - length : end])] = end
        self.seen[wish.request] = (len(text), places)
        for length in self.lengths:
            place = places.get(tuple(text[len(text) - length :]))
            if place is not None and length <= len(text):
                return text[place : place + wish.count]
        return ()

    def forget(self, request: int) -> None:
        self.seen.pop(request, None)


@dataclass
class _Fed:
    """What the draft model's cache holds of a request: its tokens as they were, then guesses."""

    tokens: list[int] = field(default_factory=list)
    uniforms: Uniforms = field(default_factory=lambda: Uniforms(0, DRAFT))


class ModelDraft:
    """A smaller model with the same vocabulary guesses (Leviathan et al. 2023), with a cache of as many blocks.

    Args:
        model: the smaller model. tokens: guesses at a time, at most. dtype: of its cache, as in `PagedKVCache`.

    A prompt runs through it in one piece. A request for which its cache has no room gets no guesses.
    """

    def __init__(self, model: Model, tokens: int = 4, dtype: str | None = None) -> None:
        require_model("ModelDraft", model)
        require_cache_dtype("ModelDraft", dtype)
        self.model, self.tokens, self.dtype = model, positive("ModelDraft", "tokens", tokens), dtype
        self.fed: dict[int, _Fed] = {}

    def begin(self, model: Model, cache: PagedKVCache) -> None:
        if model.vocab_size != self.model.vocab_size:
            raise fail("ModelDraft", "vocab_size", self.model.vocab_size, f"that of the model, {model.vocab_size}")
        blocks = cache.manager.statistics()["blocks"]
        self.cache = PagedKVCache(self.model.cache_layout, blocks, cache.page_size, dtype=self.dtype)
        self.fed.clear()

    def propose(self, wishes: Sequence[Wish]) -> Mapping[int, list[Speculated]]:
        guesses: dict[int, list[Speculated]] = {wish.request: [] for wish in wishes}
        full = library.runtime().CacheFull
        for place in range(max((wish.count for wish in wishes), default=0)):
            parts, asked = [], []
            for wish in wishes:
                if place >= wish.count or len(guesses[wish.request]) < place:
                    continue
                try:
                    parts.append(self._feed(wish, [guess.token for guess in guesses[wish.request]]))
                    asked.append(wish)
                except full:
                    self.forget(wish.request)
            if not asked:
                break
            for wish, guess in zip(asked, self._guess(parts, asked), strict=True):
                guesses[wish.request].append(guess)
        return guesses

    def _feed(self, wish: Wish, guesses: list[int]) -> Part:
        """What the cache lacks of the text and of its guesses; guesses that were wrong leave it."""
        fed = self.fed.get(wish.request)
        if fed is None:
            fed = self.fed[wish.request] = _Fed(uniforms=Uniforms(wish.sampling.seed, DRAFT))
            hits = self.cache.manager.allocate(wish.request, wish.tokens)
            fed.tokens = list(wish.tokens[:hits])
        text = [*wish.tokens, *guesses]
        # The text only grows: where the cache's tokens leave it, a guess was wrong.
        same = min(len(fed.tokens), len(text) - 1)
        while fed.tokens[:same] != text[:same]:
            same -= 1
        if same < len(fed.tokens):
            self.cache.manager.truncate(wish.request, same)
        fed.tokens = text[:same]
        slots = self.cache.append(wish.request, text[same:])
        fed.tokens = text
        return Part(wish.request, text[same:], slots, 1)

    def _guess(self, parts: list[Part], wishes: list[Wish]) -> list[Speculated]:
        try:
            logits = self.model.forward_paged(self.cache.batch(parts))
        except BaseException:
            for part in parts:  # nobody may find what was not written
                self.cache.manager.truncate(part.sequence, 0)
                self.forget(part.sequence)
            raise
        if all(not wish.sampling.temperature for wish in wishes):
            return [Speculated(token) for token in logits.argmax(-1).tolist()]
        q = probabilities(logits, [wish.sampling for wish in wishes])
        places = [len(self.fed[wish.request].tokens) - wish.prompt for wish in wishes]
        uniforms = [self.fed[w.request].uniforms.at(place)[0] for w, place in zip(wishes, places, strict=True)]
        return [
            Speculated(token, weights if wish.sampling.temperature else None)
            for token, weights, wish in zip(draw(q, uniforms), q, wishes, strict=True)
        ]

    def forget(self, request: int) -> None:
        if self.fed.pop(request, None):
            self.cache.manager.free(request)


def draft_of(given: Draft | Model | str | None) -> Draft | None:
    """The draft that a caller means: "ngram", a model, or a draft itself."""
    if given is None or hasattr(given, "propose"):
        return given  # type: ignore[return-value]
    if isinstance(given, str) and given == "ngram":
        return NgramDraft()
    if hasattr(given, "forward_paged"):
        return ModelDraft(given)  # type: ignore[arg-type]
    raise fail("generate", "draft", repr(given)[:60], 'None, "ngram", a model, or a Draft')
