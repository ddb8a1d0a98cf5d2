"""The compiled kernels: loads them and says which are missing and why. Nothing else in Python reads METATE_* variables.

`metate._cpu` and `metate._cuda` register their kernels with torch as they are imported; the schemas must be defined
before.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the modules: they link against the libraries that torch has loaded
from torch.autograd import forward_ad
from torch.nn import Parameter

TARGET = (2, 10)


@dataclass(frozen=True)
class Module:
    """A compiled module, or why there is none."""

    module: ModuleType | None
    missing: str = ""


# What may stand between the caller and the kernels; any that says true wants the call to go through torch's dispatcher:
# a dispatch mode and a profiler, and where there are tensors (csrc/torch/pq/arrays.cpp has none) a functorch transform,
# autocast, torch.jit.trace, forward-mode gradients.
_GUARDS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._is_any_autocast_enabled,
    torch._C._is_tracing,
    lambda: forward_ad._current_level >= 0,
)


def dispatcher_is_wanted() -> bool:
    return any(guard() for guard in _GUARDS)


@dataclass(frozen=True)
class Direct:
    """The short way to a compiled operator, around torch's dispatcher (csrc/torch/direct.h)."""

    entry: Any  # the same operator by way of the dispatcher, if it is one
    call: Callable[[tuple[Any, ...], bool], Any]  # arguments, only the first result? -> results, or NotImplemented
    admit: Callable[[tuple[Any, ...]], None]  # calls like this one need no further check
    forget: Callable[[], None]  # all that was admitted


def direct(name: str, entry: Any) -> tuple[Direct, ...]:
    """The short way to a binding of the CPU, or none where this torch offers no C interface to its tensors."""
    module = load()["cpu"].module
    return (Direct(entry, *module.direct(name)),) if module and _starts(module) else ()


def direct_calls() -> int:
    """How many calls of this thread went the short way; 0 where there is none."""
    module = load()["cpu"].module
    return module.direct_calls() if module else 0


def prepared_search(args: tuple[Any, ...]) -> Callable[..., bool] | None:
    """The short way to a search of lists with numpy arrays, the rest stays the same (csrc/torch/pq/arrays.cpp)."""
    module = load()["cpu"].module
    return module.prepare_search(*args) if module and _starts(module) else None


def prepared_add(args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The short way to add numpy arrays to the columns of an index, which stay the same."""
    module = load()["cpu"].module
    return module.prepare_add(*args) if module and _starts(module) else None


def copy_lists(args: tuple[Any, ...]) -> bool:
    """Copies (target, source, to, from, count) rows of a column to another; False where it has not."""
    module = load()["cpu"].module
    return bool(module and _starts(module) and module.copy_lists(*args))


def row_bias(decoded: Any, centroids: Any, bias: Any) -> bool:
    """Writes Σ r (r + 2 c) of rows of arrays, as `prepared_add` does; False where that is not compiled."""
    module = load()["cpu"].module
    if module:
        module.row_bias(decoded, centroids, bias)
    return bool(module)


def add_to_clusters(x: Any, numbers: Any, sums: Any, period: int) -> bool:
    """Adds rows of x (n, d) to those of sums (k, d) that numbers (n) say, all arrays; False where that is not compiled.
    The numbers of rows that are not a multiple of `period` apart differ."""
    module = load()["cpu"].module
    if module:
        module.add_to_clusters(x, numbers, sums, period)
    return bool(module)


@cache
def _starts(module: ModuleType) -> bool:
    started: bool = module.start(torch.Tensor, Parameter, _GUARDS)
    return started


@cache
def report() -> dict[str, str]:
    """What the build wrote down: torch, machine, archs, and why there is no CUDA module."""
    try:
        text = (Path(__file__).parent / "build.json").read_text()
    except FileNotFoundError:
        return {}
    answer: dict[str, str] = json.loads(text)
    return answer


@cache
def refused_gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU of this machine."""
    if torch.version.cuda is None:
        return "not a GPU of NVIDIA"
    oldest = min((int(arch.rstrip("af")) for arch in report().get("archs", "").split(";") if arch), default=80)
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor >= oldest:
        return None
    return f"a GPU of compute capability {major}.{minor}: {oldest // 10}.{oldest % 10} or later"


@cache
def load() -> dict[str, Module]:
    """Imports every compiled module there is: backend name -> module or the reason for its absence."""
    return {backend: _load(backend) for backend in ("cpu", "cuda")}


def missing(device: str) -> str:
    """Why there are no compiled kernels for tensors of a device type; "" where there are, or never were any."""
    return load()[device].missing if device in load() else ""


def unavailable(backend: str, device: str) -> str:
    """Why a backend has nothing for tensors of a device type."""
    why = missing(device) if backend == device else ""
    return why or f"not available for {device} tensors here; `metate info` says why"


def _load(backend: str) -> Module:
    name = f"metate._{backend}"
    if importlib.util.find_spec(name) is None:
        return Module(None, report().get(backend) or "not built: run `pip install .` in metate's source")
    if _version(torch.__version__) < TARGET:
        return Module(None, f"torch {torch.__version__} is older than {TARGET[0]}.{TARGET[1]}: upgrade torch")
    try:
        return Module(importlib.import_module(name))
    except ImportError as error:
        built = report().get("torch", "an unknown torch")
        return Module(
            None, f"built against torch {built}, does not load on {torch.__version__}: {error}; reinstall metate"
        )


def runtime() -> ModuleType:
    """`metate._runtime`, the host objects without tensors."""
    try:
        return importlib.import_module("metate._runtime")
    except ImportError as error:
        raise ImportError(
            f"metate.generate needs metate._runtime, which is not here ({error}): it is built for one Python; "
            "run `pip install .` in metate's source with this one"
        ) from error


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def isas() -> list[str]:
    """Instruction sets of this machine that CPU kernels were compiled for, the one in use (METATE_ISA) first."""
    module = load()["cpu"].module
    return list(module.isas()[0]) if module else []


def refused_isa() -> str | None:
    """What METATE_ISA asks for, where this machine does not have it."""
    module = load()["cpu"].module
    return os.environ["METATE_ISA"] if module and module.isas()[1] else None


def requested_backend() -> str | None:
    """The one backend that METATE_BACKEND allows, or None."""
    return os.environ.get("METATE_BACKEND") or None
