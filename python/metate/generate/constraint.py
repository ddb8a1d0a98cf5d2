"""Which tokens may come next: masks as libraries for grammars give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metate.errors import fail

# What may follow the tokens that were generated so far: bool (vocab), or int32 (ceil(vocab / 32)) with token t at bit
# t % 32 of word t // 32, a torch tensor or whatever torch.as_tensor takes; None: anything.
Constraint = Callable[[Sequence[int]], Any]


def allowed(constraint: Constraint, tokens: Sequence[int], vocab_size: int) -> Tensor | None:
    """bool (vocab_size) on the CPU: what may follow, or None where anything may."""
    given = constraint(tokens)
    if given is None:
        return None
    mask = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    mask = mask.detach().cpu().reshape(-1)
    words = -(-vocab_size // 32)
    if mask.dtype == torch.int32 and len(mask) >= words:  # model and grammar may round the vocabulary up differently
        places = torch.arange(32, dtype=torch.int32, device="cpu")
        mask = (mask[:words, None] >> places & 1).flatten()[:vocab_size].bool()
    if mask.dtype != torch.bool or len(mask) != vocab_size:
        got = f"{mask.dtype} of {len(mask)} elements"
        raise fail("generate", "the mask of constraint", got, f"bool of {vocab_size}, or int32 of {words} words")
    return mask


class MatcherConstraint:
    """A constraint from a matcher that walks along with the text: `xgrammar.GrammarMatcher`, `llguidance.LLMatcher`.

    Args:
        matcher: has `rollback(count)`, `accept_token(token)` or `consume_token(token)`, and
            `fill_next_token_bitmask(bitmask)` for int32 words (1, ceil(vocab / 32)) or `compute_bitmask()` that returns
            their bytes; and `is_terminated()` or `is_stopped()` if it can end.
        vocab_size: of the bitmask.

    Speculation asks about texts that are not kept: the matcher goes back to where a text leaves the one before it, so
    it must allow as many steps back as tokens are speculated. One matcher serves one request.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher = matcher
        self.text: list[int] = []
        self.accept: Callable[[int], bool] = _method(matcher, "accept_token", "consume_token")
        self.ended: Callable[[], bool] = _method(matcher, "is_terminated", "is_stopped", default=lambda: False)
        self.fill = getattr(matcher, "fill_next_token_bitmask", None)
        self.words = -(-vocab_size // 32)

    def __call__(self, tokens: Sequence[int]) -> Tensor | None:
        same = len(self.text)
        if list(tokens[:same]) != self.text:
            same = next((i for i, (a, b) in enumerate(zip(self.text, tokens, strict=False)) if a != b), len(tokens))
        if same < len(self.text):
            self.matcher.rollback(len(self.text) - same)
        self.text = list(tokens[:same])
        for token in tokens[same:]:
            if not self.accept(token):
                raise ValueError(f"metate.MatcherConstraint: the matcher refuses token {token} after {self.text}")
            self.text.append(token)
        if self.ended():
            return torch.zeros(self.words, dtype=torch.int32, device="cpu")
        if self.fill is None:
            return torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)
        # What it leaves untouched is allowed.
        bitmask = torch.full((1, self.words), -1, dtype=torch.int32, device="cpu")
        self.fill(bitmask)
        return bitmask[0]


def _method(matcher: Any, *names: str, default: Any = None) -> Any:
    found = next((getattr(matcher, name) for name in names if hasattr(matcher, name)), default)
    if found is None:
        raise fail("MatcherConstraint", "matcher", type(matcher).__name__, f"one that has {' or '.join(names)}")
    return found
