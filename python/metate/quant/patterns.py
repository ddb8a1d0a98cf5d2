"""Regular expressions out of files, matched in bounded time: sets of positions instead of backtracking.

The subset that module names need: literals, . \\d \\w \\s classes, groups, |, * + ? {m,n}, ^ $ and lookahead.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable

from metate.quant.settings import complain

_STEPS = 200_000  # of all matches against one name: milliseconds
_LENGTH = 2000  # characters of a pattern or a name
_TOTAL = 1 << 18  # characters of all patterns
_DEPTH = 50
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD, "s": frozenset(string.whitespace)}
_COUNT = 1000

Ends = Callable[["_Text", frozenset[int]], frozenset[int]]  # where matches end that begin at these positions


class _Text:
    """A name to match, and the steps that are left for it, whatever the number of patterns."""

    def __init__(self, text: str) -> None:
        self.text, self.left = text, _STEPS

    def spend(self, pattern: str, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise complain("pattern", repr(pattern), "one that matches in fewer steps")


class Patterns:
    """Patterns in order, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._compiled: list[tuple[str, str, Ends]] = []
        total = 0
        for pattern in patterns:
            total += len(pattern)
            if len(pattern) > _LENGTH or total > _TOTAL:
                raise complain("patterns", f"{total} characters", f"at most {_LENGTH} each and {_TOTAL} in all")
            self._compiled.append((pattern, _literal(pattern), _Parser(pattern).parse()))

    def first(self, name: str) -> int | None:
        """Which pattern is the first that matches at the beginning of the name, as `re.match` has it."""
        if len(name) > _LENGTH:
            raise complain("name", f"{len(name)} characters", f"at most {_LENGTH} to match patterns")
        text = _Text(name)
        for place, (pattern, literal, ends) in enumerate(self._compiled):
            if name.startswith(literal):
                text.spend(pattern, 1)
                if ends(text, frozenset([0])):
                    return place
        return None


def _literal(pattern: str) -> str:
    """How every match begins, as far as that is seen at a glance."""
    found, at = "", 0
    while at < len(pattern) and "|" not in pattern:
        character = pattern[at]
        at += 1
        if character == "\\" and at < len(pattern) and pattern[at] not in _WORD:
            character = pattern[at]
            at += 1
        elif character in "\\.^$[]()*+?{":
            break
        if pattern[at : at + 1] and pattern[at] in "*+?{":
            break
        found += character
    return found


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def parse(self) -> Ends:
        ends = self.alternatives()
        if self.at < len(self.pattern):
            raise self.error()
        return ends

    def alternatives(self) -> Ends:
        self.depth += 1
        if self.depth > _DEPTH:
            raise self.error()
        choices = [self.sequence()]
        while self.accept("|"):
            choices.append(self.sequence())
        self.depth -= 1
        return lambda text, starts: frozenset().union(*(choice(text, starts) for choice in choices))

    def sequence(self) -> Ends:
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.repeated(self.atom()))

        def ends(text: _Text, starts: frozenset[int]) -> frozenset[int]:
            for part in parts:
                if not starts:
                    break
                starts = part(text, starts)
            return starts

        return ends

    def repeated(self, atom: Ends) -> Ends:
        if self.accept("*"):
            least, most = 0, None
        elif self.accept("+"):
            least, most = 1, None
        elif self.accept("?"):
            least, most = 0, 1
        elif self.pattern[self.at : self.at + 1] == "{":
            least, most = self.counts()
        else:
            return atom
        self.accept("?")  # lazy or greedy: whether there is a match does not depend on it

        def ends(text: _Text, starts: frozenset[int]) -> frozenset[int]:
            found, reached = starts if least == 0 else frozenset[int](), starts
            for count in range(1, (least + len(text.text) + 1 if most is None else most) + 1):
                before, reached = reached, atom(text, reached)
                if count >= least:
                    if reached <= found:
                        break
                    found |= reached
                elif reached == before:  # the remaining rounds change nothing
                    return reached
            return found

        return ends

    def counts(self) -> tuple[int, int | None]:
        close = self.pattern.find("}", self.at)
        first, comma, last = self.pattern[self.at + 1 : close].partition(",")
        numbers = [n for n in (first, last) if n]
        if close < 0 or not first or not all(n.isascii() and n.isdigit() and len(n) <= 4 for n in numbers):
            raise self.error()
        self.at = close + 1
        least = int(first)
        most = int(last) if last else (None if comma else least)
        if max(least, most or 0) > _COUNT or (most is not None and most < least):
            raise self.error()
        return least, most

    def atom(self) -> Ends:
        character = self.next()
        if character == "(":
            return self.group()
        if character == "^":
            return lambda text, starts: starts & {0}
        if character == "$":
            return lambda text, starts: starts & {len(text.text)}
        if character == "[":
            return self.consume(*self.set())
        if character == ".":
            return self.consume(frozenset("\n"), True)
        if character == "\\":
            return self.consume(*self.escape())
        if character in "*+?{":
            raise self.error()
        return self.consume(frozenset(character), False)

    def group(self) -> Ends:
        ahead = None
        if self.accept("?"):
            kind = self.next()
            if kind not in ":=!":
                raise self.error()
            ahead = None if kind == ":" else kind == "="
        inner = self.alternatives()
        if not self.accept(")"):
            raise self.error()
        if ahead is None:
            return inner
        return lambda text, starts: frozenset(s for s in starts if bool(inner(text, frozenset([s]))) == ahead)

    def set(self) -> tuple[frozenset[str], bool]:
        negated = self.accept("^")
        members: set[str] = set()
        while (character := self.next()) != "]" or not members:
            if character == "\\":
                found, outside = self.escape()
                if outside:
                    raise self.error()
                members |= found
            elif self.pattern[self.at : self.at + 1] == "-" and self.pattern[self.at + 1 : self.at + 2] not in (
                "",
                "]",
            ):
                self.next()
                last = self.next()
                if last == "\\" or not ord(character) <= ord(last) < 128:
                    raise self.error()
                members |= {chr(code) for code in range(ord(character), ord(last) + 1)}
            else:
                members.add(character)
        return frozenset(members), negated

    def escape(self) -> tuple[frozenset[str], bool]:
        character = self.next()
        if character.lower() in _CLASSES:
            return _CLASSES[character.lower()], character.isupper()
        if character in _WORD:  # back references, boundaries, code points
            raise self.error()
        return frozenset(character), False

    def consume(self, members: frozenset[str], negated: bool) -> Ends:
        """One character in the set (or not in it)."""

        def ends(text: _Text, starts: frozenset[int]) -> frozenset[int]:
            text.spend(self.pattern, len(starts) + 1)
            return frozenset(s + 1 for s in starts if s < len(text.text) and (text.text[s] in members) != negated)

        return ends

    def next(self) -> str:
        if self.at >= len(self.pattern):
            raise self.error()
        self.at += 1
        return self.pattern[self.at - 1]

    def accept(self, character: str) -> bool:
        found = self.pattern[self.at : self.at + 1] == character
        self.at += found
        return found

    def error(self) -> Exception:
        return complain("pattern", f"{self.pattern!r}, wrong at {self.at}", "a plain regular expression")
