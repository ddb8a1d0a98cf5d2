"""How every refusal reads: the operator, the argument, what came, what was expected."""

from __future__ import annotations


class FormatError(ValueError):
    """A file or a serialised state that does not hold what its format promises."""


def fail(op: str, argument: str, got: object, expected: str, *, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise: `metate.attention: q is float8, expected float32, bfloat16 or float16`."""
    return error(f"metate.{op}: {argument} is {got}, expected {expected}")
