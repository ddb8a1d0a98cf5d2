"""Many requests through one model at once: continuous batching (Yu et al. 2022, Orca), chunked prefill (Agrawal et al.
2024, Sarathi-Serve), preemption by recomputation (Kwon et al. 2023, section 4.5)."""

from __future__ import annotations

import bisect
import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metate import library
from metate.errors import fail, require_flag
from metate.generate.cache import Model, PagedKVCache, Part, positive, require_model
from metate.generate.constraint import Constraint, allowed
from metate.generate.draft import Draft, Wish, draft_of
from metate.generate.sampling import TEXT, Sampling, Speculated, Uniforms, choose, probabilities
from metate.scalars import is_whole, plain

_KEPT = ("layers", "kv_heads", "head_dim", "value_dim", "dtype")  # of each token, as cache and model must agree


@dataclass(frozen=True)
class Event:
    """A token of a request, or its end.

    Attributes:
        request: the number that `add` returned.
        index: of the token among those generated, from 0.
        token: None where the request ended without one.
        logprob: natural logarithm of the token's probability under the model at temperature 1, among the tokens that
            the constraint allows; None unless asked for.
        finished: None, or why this is the last event: "eos", "stop", "length" (max_new_tokens), or "constraint" (it
            allows no token).
    """

    request: int
    index: int
    token: int | None
    logprob: float | None = None
    finished: str | None = None


@dataclass(eq=False)
class _Request:
    number: int
    tokens: list[int]
    prompt: int
    limit: int
    sampling: Sampling
    uniforms: Uniforms
    eos: frozenset[int]
    stop: list[list[int]]
    constraint: Constraint | None
    logprobs: bool
    computed: int = 0  # tokens whose keys and values are in the cache
    guesses: int = 4  # to ask for next
    masked: int = -1  # generated tokens when the mask was asked for
    mask: Tensor | None = None  # of the next token

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    def __lt__(self, other: _Request) -> bool:
        return self.number < other.number


@dataclass
class _Work:
    """What a request does in a step."""

    request: _Request
    part: Part
    drafts: list[Speculated] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)  # of each wanted row
    ends: bool = False  # nothing may follow the last guess
    admitted: bool = False


@dataclass
class Totals:
    """What a scheduler has done: forward passes, tokens that went through them, tokens that came out, preemptions,
    prompt tokens found in the cache, guesses and how many were right, tokens that a constraint left no choice about."""

    steps: int = 0
    computed: int = 0
    generated: int = 0
    preempted: int = 0
    found: int = 0
    guessed: int = 0
    right: int = 0
    forced: int = 0


def _numbers(name: str, tokens: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise fail("generate", name, repr(tokens)[:60], "a sequence of token numbers", error=TypeError) from None


def _ends(eos: int | Iterable[int]) -> frozenset[int]:
    """The tokens that end a text; those of a tensor are numbers too, which no token would be equal to as they are."""
    try:
        return frozenset([operator.index(eos)])  # type: ignore[arg-type]
    except TypeError:
        pass
    if isinstance(eos, str) or not isinstance(eos, Iterable):
        raise fail("generate", "eos", repr(eos), "a token number, or several; () for none", error=TypeError)
    return frozenset(_numbers("eos", list(eos)))


class Scheduler:
    """Serves requests with one model and one cache, a step at a time; a library class for one thread, not a server.

    First come, first served: the tokens of a step and the blocks go to requests in the order in which they were added;
    where blocks run out the youngest request gives up its own, waits, and computes them again later (most of them it
    finds in the prefix cache). So the oldest always goes on, and nobody starves. In a step every running request gets
    at least one token; prompts fill the rest of `token_budget` piece by piece.

    The text of a request depends on its prompt, its settings and its seed: on who else is in the batch only as far as
    the model's own rounding does (a matrix product of one row and of many rows may differ in the last bit).

    Args:
        model: see `metate.generate.Model`. cache: for that model; the scheduler's sequences are its request numbers.
        max_sequences: requests that run at once. token_budget: tokens of a step, at least max_sequences.
        seed: request number n that has no seed of its own gets seed + n.
        draft: None, "ngram", a smaller model, or a Draft: guesses are checked many at a time, and the text keeps the
            model's distribution exactly (greedy and n-gram: it stays the same text).

    >>> scheduler = Scheduler(model, PagedKVCache(model.cache_layout, 1000))
    >>> first = scheduler.add([1, 2, 3], max_new_tokens=20)
    >>> for event in scheduler:  # `add` and `cancel` may be called meanwhile
    ...     print(event.request, event.token)

    A step that raises (a constraint, the model) leaves every request as it was before it.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        *,
        max_sequences: int = 64,
        token_budget: int = 512,
        seed: int = 0,
        draft: Draft | Model | str | None = None,
    ) -> None:
        if not isinstance(cache, PagedKVCache):
            raise fail("Scheduler", "cache", type(cache).__name__, "a metate.generate.PagedKVCache", error=TypeError)
        require_model("Scheduler", model)
        if not is_whole(seed := plain(seed), 0, 2**64 - 1):
            raise fail("Scheduler", "seed", repr(seed)[:60], "an integer from 0 to 2^64 - 1")
        if any(getattr(cache.layout, name) != getattr(model.cache_layout, name) for name in _KEPT):
            expected = f"one of the model's cache_layout, {model.cache_layout}"
            raise fail("Scheduler", "cache", f"one of {cache.layout}", expected)
        max_sequences = positive("Scheduler", "max_sequences", max_sequences)
        token_budget = positive("Scheduler", "token_budget", token_budget)
        if token_budget < max_sequences:
            raise fail("Scheduler", "token_budget", token_budget, f"at least max_sequences, {max_sequences}")
        self.model, self.cache, self.draft, self.seed = model, cache, draft_of(draft), seed
        self.max_sequences, self.token_budget = max_sequences, token_budget
        self.waiting: list[_Request] = []  # both in the order of their numbers
        self.running: list[_Request] = []
        self.added, self.totals = 0, Totals()
        self._events: deque[Event] = deque()  # not given out yet; they outlive a step that raises
        self._full = library.runtime().CacheFull
        if self.draft:
            self.draft.begin(model, cache)

    def add(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        eos: int | Iterable[int] = (),
        stop: Iterable[Sequence[int]] = (),
        constraint: Constraint | None = None,
        return_logprobs: bool = False,
    ) -> int:
        """Queues a request and returns its number; settings as in `metate.generate`.

        Raises:
            ValueError: naming the setting; or the prompt and max_new_tokens are more than the cache can ever hold.
        """
        tokens = _numbers("prompt", prompt)
        name, most = f"prompt {self.added}", self.cache.capacity + 1  # the last token is never cached
        wrong = next((token for token in tokens if not 0 <= token < self.model.vocab_size), None)
        if not tokens or wrong is not None:
            got = "empty" if wrong is None else f"with token {wrong}"
            raise fail("generate", name, got, f"at least one token, each 0 to {self.model.vocab_size - 1}")
        max_new_tokens = positive("generate", "max_new_tokens", max_new_tokens)
        if len(tokens) + max_new_tokens > most:
            got = f"{len(tokens)} tokens long, max_new_tokens {max_new_tokens}"
            raise fail("generate", name, got, f"together at most {most}: the cache has {most - 1} places")
        if not isinstance(stop, Iterable):
            raise fail("generate", "stop", repr(stop), "sequences of token numbers; () for none", error=TypeError)
        stops = [_numbers("stop", each) for each in stop]
        if not all(stops):
            raise fail("generate", "stop", "an empty sequence", "sequences of at least one token")
        if constraint is not None and not callable(constraint):
            raise fail("generate", "constraint", repr(constraint)[:60], "a function of tokens", error=TypeError)
        return_logprobs = require_flag("generate", "return_logprobs", return_logprobs)
        seed = (self.seed + self.added) % 2**64 if seed is None else seed
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        request = _Request(
            self.added, tokens, len(tokens), max_new_tokens, sampling, Uniforms(seed, TEXT), _ends(eos), stops,
            constraint, return_logprobs,
        )  # fmt: skip
        self.added += 1
        self.waiting.append(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """Ends a request and frees its blocks, no event of it comes any more; False where it had ended already.

        Raises:
            ValueError, TypeError: `add` has returned no such number.
        """
        try:
            number = operator.index(number)
        except TypeError:
            raise fail("Scheduler.cancel", "number", repr(number), "one that add returned", error=TypeError) from None
        for requests in (self.waiting, self.running):
            for request in requests:
                if request.number == number:
                    requests.remove(request)
                    self._release(request, requests is self.running)
                    self._events = deque(event for event in self._events if event.request != number)
                    return True
        if not 0 <= number < self.added:
            raise fail("Scheduler.cancel", "number", number, "one that add returned")
        return False

    def _release(self, request: _Request, holds: bool) -> None:
        if holds:
            self.cache.manager.free(request.number)
        if self.draft:
            self.draft.forget(request.number)

    def __iter__(self) -> Iterator[Event]:
        """Steps until nothing is left to do. Who breaks off may go on later with another loop."""
        while self._events or self.waiting or self.running:
            if not self._events:
                self._step()
            while self._events:
                yield self._events.popleft()

    def step(self) -> list[Event]:
        """One forward pass at most; the tokens that came of it."""
        self._step()
        events = list(self._events)
        self._events.clear()
        return events

    @torch.inference_mode()
    def _step(self) -> None:
        for request in list(self.running):
            self._force(request)
        works: list[_Work] = []
        try:
            self._plan(works)
            if works:
                logits = self.model.forward_paged(self.cache.batch([work.part for work in works]))
                texts, logprobs = self._choose(works, logits)
        except BaseException:
            self._undo(works)
            raise
        if works:
            self.totals.steps += 1
            for work, text, scores in zip(works, texts, logprobs, strict=True):
                self._take(work, text, scores)

    # What to compute.

    def _plan(self, works: list[_Work]) -> None:
        """The works of a step, in the order of the requests, with slots for all of them."""
        guesses = self._guesses()
        budget, preempted = self.token_budget, self.totals.preempted
        for i, request in enumerate(list(self.running)):
            if request not in self.running:
                break  # preempted meanwhile, as are all behind it
            room = budget - (len(self.running) - 1 - i)  # those behind it keep a token each
            work = self._fit(request, room, guesses.get(request.number, []))
            if work:
                works.append(work)
                budget -= len(work.part.tokens)
        if self.totals.preempted == preempted:
            owed = sum(self._owed(request) for request in self.running)
            while budget > 0 and self.waiting and len(self.running) < self.max_sequences and self._fits(owed):
                work = self._admit(budget)
                if work:
                    works.append(work)
                    budget -= len(work.part.tokens)
                    owed += self._owed(work.request)
        if not works and not self.running and self.waiting:
            number, room = self.waiting[0].number, self.cache.manager.available()
            raise self._full(
                f"metate.Scheduler: request {number} does not fit into the {room} blocks that are free although no "
                "other request runs: sequences of somebody else hold the cache; free them"
            )

    def _fit(self, request: _Request, room: int, drafts: list[Speculated]) -> _Work | None:
        """A request's work and slots for it, at the cost of guesses, then of younger requests, then of its own turn."""
        work = self._work(request, room, drafts)
        while request in self.running:
            try:
                return self._append(work)
            except self._full:
                if work.drafts:
                    work = self._work(request, room, [])
                else:
                    self._preempt(self.running[-1])
                    self.totals.preempted += 1
        return None

    def _append(self, work: _Work) -> _Work:
        slots = self.cache.append(work.request.number, work.part.tokens)
        work.part = Part(work.request.number, work.part.tokens, slots, work.part.wanted)
        return work

    def _guesses(self) -> dict[int, list[Speculated]]:
        if self.draft is None:
            return {}
        wishes = [
            Wish(r.number, r.tokens, r.prompt, count, r.sampling)
            for r in self.running
            if r.computed == len(r.tokens) - 1
            and (count := min(r.guesses, self.draft.tokens, r.limit - r.generated - 1)) > 0
        ]
        return {number: list(guesses) for number, guesses in self.draft.propose(wishes).items()}

    def _work(self, request: _Request, room: int, drafts: list[Speculated]) -> _Work:
        """As much of a request's next tokens as there is room for; guesses only behind all of them."""
        tokens = request.tokens[request.computed : request.computed + room]
        if request.computed + len(tokens) < len(request.tokens):
            return _Work(request, Part(request.number, tokens, [], 0))
        work = _Work(request, Part(request.number, tokens, [], 1), list(drafts[: room - len(tokens)]), [request.mask])
        if request.constraint:
            self._constrain(work)
        else:
            work.masks += [None] * len(work.drafts)
        tokens = tokens + [guess.token for guess in work.drafts]
        work.part = Part(request.number, tokens, [], len(work.masks))
        return work

    def _constrain(self, work: _Work) -> None:
        """Keeps guesses up to the first that is not allowed, that one included: it must be seen to be refused."""
        guesses, work.drafts = work.drafts, []
        text = work.request.tokens[work.request.prompt :]
        for guess in guesses:
            mask = work.masks[-1]
            only = _only(mask)
            guess = guess if only is None else Speculated(only)
            work.drafts.append(guess)
            if mask is not None and not mask[guess.token]:
                work.masks.append(None)  # of a row that is never drawn from
                return
            text.append(guess.token)
            work.masks.append(self._ask(work.request, text))
            if _none(work.masks[-1]):
                work.masks[-1], work.ends = None, True
                return

    def _owed(self, request: _Request) -> int:
        """Blocks that a running request needs for the tokens it has, and one more to grow; guesses may hold more."""
        size = self.cache.page_size
        return max(-(-len(request.tokens) // size) - -(-self.cache.manager.length(request.number) // size), 0) + 1

    def _fits(self, owed: int) -> bool:
        """Whether there is room for the first who waits beside what is owed to those who run."""
        return self.cache.manager.missing(self.waiting[0].tokens) + owed <= self.cache.manager.available()

    def _admit(self, budget: int) -> _Work | None:
        """Lets the first who waits run; None where it ended at once, or grew too long by tokens without a choice."""
        request = self.waiting[0]
        request.computed = self.cache.manager.allocate(request.number, request.tokens)  # may be somebody else's number
        self.waiting.pop(0)
        bisect.insort(self.running, request)
        try:
            self._force(request)
            if request not in self.running:
                return None
            work = self._append(self._work(request, budget, []))
        except self._full:
            self._preempt(request)
            return None
        except BaseException:
            self._preempt(request)
            raise
        self.totals.found += request.computed
        work.admitted = True
        return work

    def _preempt(self, request: _Request) -> None:
        self.running.remove(request)
        self.cache.manager.free(request.number)
        request.computed = 0
        bisect.insort(self.waiting, request)

    def _undo(self, works: list[_Work]) -> None:
        """Takes back what was not computed; nobody may find it in the cache."""
        for work in works:
            self.cache.manager.truncate(work.request.number, work.request.computed)
        for work in works:
            if work.admitted:  # it may have found what the others were to compute
                self._preempt(work.request)

    # What comes next.

    def _ask(self, request: _Request, text: Sequence[int]) -> Tensor | None:
        assert request.constraint is not None
        try:
            return allowed(request.constraint, text, self.model.vocab_size)
        except Exception as error:
            message = f"metate.Scheduler: the constraint of request {request.number} failed: {error}"
            raise RuntimeError(message) from error

    def _force(self, request: _Request) -> None:
        """Takes tokens while the constraint leaves only one; no forward pass is needed to know them."""
        while request.constraint and request in self.running and request.masked != request.generated:
            request.mask = self._ask(request, request.tokens[request.prompt :])
            request.masked = request.generated
            only = _only(request.mask)
            if only is not None:
                self.totals.forced += 1
                self._emit(request, only, 0.0)
            elif _none(request.mask):
                self.running.remove(request)
                self._release(request, True)
                self._events.append(Event(request.number, request.generated, None, None, "constraint"))

    def _choose(self, works: list[_Work], logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """The new tokens of each work, and their log-probabilities where asked for."""
        wanted = [work for work in works if work.part.wanted]
        if not wanted:
            return [[] for _ in works], [[] for _ in works]
        logits = logits.float()
        masks = [mask for work in wanted for mask in work.masks]
        if any(mask is not None for mask in masks):
            anything = torch.ones(logits.shape[1], dtype=torch.bool, device="cpu")
            legal = torch.stack([anything if mask is None else mask for mask in masks])
            logits = logits.masked_fill(~legal.to(logits.device), -math.inf)
        best, first = logits.max(-1)
        if not torch.isfinite(best).all():
            number = next(w.request.number for w, row in _rows(wanted) if not torch.isfinite(best[row]).all())
            raise fail("Scheduler", "logits", "not finite", f"finite numbers from the model for request {number}")
        if all(not work.request.sampling.temperature for work in wanted):
            chosen = _follow(wanted, first.tolist())
        else:
            settings = [work.request.sampling for work in wanted for _ in work.masks]
            p = probabilities(logits, settings)
            places = [(work.request, work.request.generated + i) for work in wanted for i in range(len(work.masks))]
            chosen = choose(p, [work.drafts for work in wanted], [r.uniforms.at(place) for r, place in places])
        scores = self._scores(wanted, logits, chosen)
        by_work = {work.request.number: (text, score) for work, text, score in zip(wanted, chosen, scores, strict=True)}
        found = [by_work.get(work.request.number, ([], [])) for work in works]
        return [text for text, _ in found], [score for _, score in found]

    def _scores(self, wanted: list[_Work], logits: Tensor, chosen: list[list[int]]) -> list[list[float]]:
        if not any(work.request.logprobs for work in wanted):
            return [[] for _ in wanted]
        scores = torch.log_softmax(logits, -1)
        return [
            scores[rows][: len(text)].gather(1, torch.tensor(text, device=scores.device)[:, None])[:, 0].tolist()
            for (_, rows), text in zip(_rows(wanted), chosen, strict=True)
        ]

    def _take(self, work: _Work, text: list[int], scores: list[float]) -> None:
        """The text goes on by the chosen tokens; wrong guesses leave the cache."""
        request, guesses = work.request, len(work.drafts)
        right = next((i for i, guess in enumerate(work.drafts) if text[i] != guess.token), guesses)
        text = text[:right] if work.ends and right == guesses else text
        self.totals.computed += len(work.part.tokens)
        self.totals.guessed += guesses
        self.totals.right += right
        request.computed += len(work.part.tokens) - guesses + right
        if guesses:
            request.guesses = min(2 * request.guesses, 64) if right == guesses else right + 1
        if right < guesses:
            self.cache.manager.truncate(request.number, request.computed)
        for i, token in enumerate(text):
            self._emit(request, token, scores[i] if request.logprobs else None)
            if request not in self.running:
                break

    def _emit(self, request: _Request, token: int, logprob: float | None) -> None:
        request.tokens.append(token)
        self.totals.generated += 1
        finished = _finished(request)
        logprob = logprob if request.logprobs else None
        self._events.append(Event(request.number, request.generated - 1, token, logprob, finished))
        if finished:
            self.running.remove(request)
            self._release(request, True)


def _none(mask: Tensor | None) -> bool:
    return mask is not None and not mask.any()


def _only(mask: Tensor | None) -> int | None:
    """The one token that a mask allows."""
    return int(mask.nonzero()[0]) if mask is not None and int(mask.sum()) == 1 else None


def _rows(works: list[_Work]) -> Iterator[tuple[_Work, slice]]:
    """The rows of the logits that belong to each work."""
    begin = 0
    for work in works:
        yield work, slice(begin, begin + work.part.wanted)
        begin += work.part.wanted


def _follow(works: list[_Work], best: list[int]) -> list[list[int]]:
    """The most likely tokens, as long as they are the ones that were guessed, and one more."""
    chosen = []
    for work, rows in _rows(works):
        tokens, right = best[rows], 0
        while right < len(work.drafts) and work.drafts[right].token == tokens[right]:
            right += 1
        chosen.append(tokens[: right + 1])
    return chosen


def _finished(request: _Request) -> str | None:
    if request.tokens[-1] in request.eos:
        return "eos"
    if any(request.generated >= len(stop) and request.tokens[-len(stop) :] == stop for stop in request.stop):
        return "stop"
    return "length" if request.generated >= request.limit else None
