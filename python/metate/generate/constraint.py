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
    mask = torch.as_tensor(given).detach().cpu().reshape(-1)
    words = -(-vocab_size // 32)
    if mask.dtype == torch.int32 and len(mask) >= words:  # model and grammar may round the vocabulary up differently
        mask = (mask[:words, None] >> torch.arange(32, dtype=torch.int32) & 1).flatten()[:vocab_size].bool()
    if mask.dtype != torch.bool or len(mask) != vocab_size:
        got = f"{mask.dtype} of {len(mask)} elements"
        raise fail("generate", "the mask of constraint", got, f"bool of {vocab_size}, or int32 of {words} words")
    return mask


class MatcherConstraint:
    """A constraint from a matcher that walks along with the text, such as `xgrammar.GrammarMatcher`.

    Args:
        matcher: has `accept_token(token)`, `rollback(count)` and `fill_next_token_bitmask(bitmask)`, which writes
            int32 words (1, ceil(vocab / 32)); `is_terminated()` where it can end.
        vocab_size: of the bitmask that it fills.

    Speculation asks about texts that are not kept: the matcher goes back to where a text leaves the one before it, so
    it must allow as many steps back as tokens are speculated. One matcher serves one request.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.text = matcher, []  # type: tuple[Any, list[int]]
        self.bitmask = torch.full((1, -(-vocab_size // 32)), -1, dtype=torch.int32)

    def __call__(self, tokens: Sequence[int]) -> Tensor | None:
        same = len(self.text)
        if list(tokens[:same]) != self.text:
            same = next((i for i, (a, b) in enumerate(zip(self.text, tokens, strict=False)) if a != b), len(tokens))
        if same < len(self.text):
            self.matcher.rollback(len(self.text) - same)
        self.text = list(tokens[:same])
        for token in tokens[same:]:
            if not self.matcher.accept_token(token):
                raise ValueError(f"metate.MatcherConstraint: the matcher refuses token {token} after {self.text}")
            self.text.append(token)
        if getattr(self.matcher, "is_terminated", lambda: False)():
            return torch.zeros_like(self.bitmask[0])
        self.bitmask.fill_(-1)
        self.matcher.fill_next_token_bitmask(self.bitmask)
        return self.bitmask[0].clone()
