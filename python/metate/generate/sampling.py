"""How the next token is drawn: temperature, top-k, top-p, min-p, and the acceptance of speculated tokens.

Every draw is a function of the probabilities, the request's seed and the place in its text: neither other requests of
the batch nor a pause of its own change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metate.errors import fail
from metate.philox import philox
from metate.scalars import plain

TEXT, DRAFT = 0, 1  # streams of random numbers: those of the text, those of a draft model
_CHUNK = 64  # places whose random numbers are drawn at once


@dataclass(frozen=True)
class Sampling:
    """What is drawn from: softmax(logits / temperature), cut by top_k, then top_p, then min_p.

    Attributes:
        temperature: 0: always the most likely token (the first of equal ones), and nothing below matters.
        top_k: only the k most likely tokens; 0: all.
        top_p: of those the fewest most likely that have at least this share of the probability (Holtzman et al. 2020).
        min_p: only tokens at least this many times as likely as the likeliest (Nguyen et al. 2024).
        seed: 0 … 2^64-1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), (int, float)):
                raise fail("generate", name, repr(getattr(self, name)), "a number", error=TypeError)
        for name, right, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number ≥ 0"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer ≥ 0 (0: all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**64, "an integer from 0 to 2^64 - 1"),
        ):
            if not right:
                raise fail("generate", name, repr(getattr(self, name)), expected)


class Uniforms:
    """Two random numbers in [0, 1) for every place of a request's text, the same whenever they are asked for."""

    def __init__(self, seed: int, stream: int) -> None:
        self.seed, self.stream = seed, stream
        self.chunk, self.numbers = -1, ([0.0], [0.0])

    def at(self, place: int) -> tuple[float, float]:
        """One to draw with, one to accept with."""
        chunk, i = divmod(place, _CHUNK)
        if chunk != self.chunk:
            places = torch.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, device="cpu")
            zero = torch.zeros_like(places)
            words = philox((places, zero, zero, zero + self.stream), self.seed)
            first, second = (((a >> 5 << 26) + (b >> 6)).double() * 2.0**-53 for a, b in (words[:2], words[2:]))
            self.chunk, self.numbers = chunk, (first.tolist(), second.tolist())
        return self.numbers[0][i], self.numbers[1][i]


def probabilities(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """(rows, vocab) float32: what each row of logits is drawn from. A logit of -inf is never drawn."""

    def column(name: str) -> Tensor:
        values = [getattr(setting, name) for setting in settings]
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    temperature = column("temperature")
    logits = logits.float()
    best, which = logits.max(-1, keepdim=True)
    p = torch.softmax((logits - best) / torch.where(temperature > 0, temperature, 1.0), -1)
    if any(setting.top_k or setting.top_p < 1 for setting in settings):
        p = _cut(p, column("top_k"), column("top_p"))
    if any(setting.min_p for setting in settings):
        p = p.masked_fill(p < column("min_p") * p.amax(-1, keepdim=True), 0.0)
    if any(not setting.temperature for setting in settings):
        p = torch.where(temperature > 0, p, torch.zeros_like(p).scatter_(-1, which, 1.0))
    return p / p.sum(-1, keepdim=True)


def _cut(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    ordered, which = p.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    ordered = ordered.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    sums = ordered.cumsum(-1, dtype=torch.float64)
    # The likeliest token stays; another while those before it are not enough.
    enough = (sums - ordered >= top_p * sums[:, -1:]) & (rank > 0) & (top_p < 1)
    return torch.zeros_like(p).scatter_(-1, which, ordered.masked_fill(enough, 0.0))


def draw(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """A token for each row of non-negative weights (rows, vocab), by inversion of their running sum."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    u = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None]
    found = torch.searchsorted(sums, u * sums[:, -1:], right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())  # where rounding has made u · sum the sum itself
    tokens: list[int] = torch.minimum(found, last)[:, 0].tolist()
    return tokens


@dataclass(frozen=True)
class Speculated:
    """A token that was proposed, and the distribution (vocab) it was drawn from; None: it was certain."""

    token: int
    weights: Tensor | None = None


def choose(
    p: Tensor, drafts: Sequence[Sequence[Speculated]], uniforms: Sequence[tuple[float, float]]
) -> list[list[int]]:
    """The tokens that follow, for each request: accepted drafts and one token more, exactly as if drawn one by one.

    A certain proposal x is taken where drawing from p gives x, so that the text is the one without speculation. One
    that was drawn from q is taken with probability min(1, p(x) / q(x)); where it is not, the next token is drawn from
    max(0, p - q): speculative sampling, Leviathan et al. 2023, section 2.3 and appendix A.1.

    Args:
        p: (rows, vocab), the rows of a request one after another: one for each of its drafts and one more.
        drafts: of each request. uniforms: of each row.
    """
    drawn = draw(p, [u for u, _ in uniforms])
    first, begins = 0, []
    for proposals in drafts:
        begins.append(first)
        first += len(proposals) + 1
    guesses = [
        (begin + i, guess)
        for begin, proposals in zip(begins, drafts, strict=True)
        for i, guess in enumerate(proposals)
        if guess.weights is not None
    ]
    accepted: dict[int, bool] = {}
    if guesses:
        rows = [row for row, _ in guesses]
        q = torch.stack([guess.weights for _, guess in guesses if guess.weights is not None])
        tokens = torch.tensor([[guess.token] for _, guess in guesses], device=p.device)
        u = torch.tensor([[uniforms[row][1]] for row in rows], dtype=torch.float64, device=p.device)
        taken = u * q.gather(1, tokens) < p[rows].gather(1, tokens)
        accepted = dict(zip(rows, taken[:, 0].tolist(), strict=True))
        rest = (p[rows] - q).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[rows])  # equal within rounding
        others = draw(rest, [uniforms[row][0] for row in rows])
        for (row, guess), other in zip(guesses, others, strict=True):
            drawn[row] = guess.token if accepted[row] else other
    texts = []
    for begin, proposals in zip(begins, drafts, strict=True):
        text = [drawn[begin]]
        for i, guess in enumerate(proposals):
            if not accepted.get(begin + i, drawn[begin + i] == guess.token):
                break
            text.append(drawn[begin + i + 1])
        texts.append(text)
    return texts
