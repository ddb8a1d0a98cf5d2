"""Tells torch's FlopCounterMode what operators cost, once somebody imports it: it takes triton along, which is slow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def declare(operator: Any, formula: Callable[..., int]) -> None:
    """`formula(*args, out_val=None, **kwargs)` is the number of flops of a call of torch.ops.<namespace>.<operator>."""
    _formulas[operator] = formula
    register = getattr(sys.modules.get(_COUNTER), "register_flop_formula", None)
    if register is not None:
        register(operator, get_raw=True)(formula)


class _Waiting(MetaPathFinder):
    """Finds the counter as it would be found anyway, and registers every formula when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            for operator, formula in _formulas.items():
                module.register_flop_formula(operator, get_raw=True)(formula)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Waiting())
