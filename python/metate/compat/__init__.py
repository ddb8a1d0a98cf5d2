"""Other libraries' interfaces over metate: drop-in packages by `install`, and hooks into torch and transformers.

`install("flash_attn")` lets code that says `import flash_attn` run unchanged; `metate.compat.sdpa` and
`metate.compat.transformers` hook into those libraries' own registries, `metate.compat.peft` into what PEFT adapts.
Nothing here is imported by `import metate`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install", "uninstall"]

# What `install` knows: name to import -> name of its distribution.
PACKAGES = {"flash_attn": "flash-attn", "bitsandbytes": "bitsandbytes", "faiss": "faiss-cpu"}
# Their compiled extensions, which some code imports too: name to import -> module of ours.
EXTENSIONS = {"flash_attn_2_cuda": "flash_attn.extension"}
_CHOSEN = {"metate.compat.faiss.contrib.torch_utils"}  # modules whose import changes something: their users import them
_installed: dict[str, _Alias] = {}


def install(name: str, *, force: bool = False) -> ModuleType:
    """Puts `metate.compat.<name>` and its submodules into sys.modules under `name`; the installed package.

    Installing again changes nothing. `importlib.metadata` finds it too, as libraries look versions up there; those that
    were imported before (transformers among them) may have remembered that the package is absent, so install first.

    Args:
        name: "flash_attn", "bitsandbytes" or "faiss".
        force: shadow a package of that name that is really installed, until `uninstall`.

    Raises:
        ImportError: a package of that name is installed and `force` is not given.
    """
    if name not in PACKAGES:
        raise ValueError(f"metate.compat.install: name is {name!r}, expected {' or '.join(map(repr, PACKAGES))}")
    if name not in _installed:
        if not force and (found := _origin(name)):
            raise ImportError(f"metate.compat.install: {name} is installed at {found}; force=True shadows it")
        _installed[name] = _Alias(name, PACKAGES[name])
    return sys.modules[name]


def uninstall(name: str) -> None:
    """Takes back what `install` did; modules that stood under the name before stand there again."""
    if name not in _installed:
        raise ValueError(f"metate.compat.uninstall: name is {name!r}, which is not installed by metate")
    _installed.pop(name).remove()


@contextlib.contextmanager
def switched_on(
    active: Callable[[], bool], activate: Callable[[], None], restore: Callable[[], None]
) -> Iterator[None]:
    """`activate` for a block: what was active before stays so after it."""
    before = active()
    activate()
    try:
        yield
    finally:
        if not before:
            restore()


def _origin(name: str) -> str | None:
    if name in sys.modules:
        return str(getattr(sys.modules[name], "__file__", None) or name)
    spec = importlib.util.find_spec(name)
    return None if spec is None else str(spec.origin or name)


class _Alias(importlib.metadata.DistributionFinder):
    """The modules of metate.compat.<name> under <name>, and metadata of a distribution that provides them."""

    def __init__(self, name: str, distribution: str) -> None:
        self.name, self.distribution = name, distribution
        source = f"{__name__}.{name}"
        package = importlib.import_module(source)
        within = {info.name for info in pkgutil.walk_packages(package.__path__, source + ".")}
        names = [source, *sorted(within - _CHOSEN)]
        modules = {name + inner.removeprefix(source): importlib.import_module(inner) for inner in names}
        for extension, inner in EXTENSIONS.items():
            if _within(inner, name):
                modules[extension] = importlib.import_module(f"{__name__}.{inner}")
        self.before = {key: sys.modules.pop(key) for key in list(sys.modules) if key in modules or _within(key, name)}
        self.names = set(modules)
        sys.modules.update(modules)
        self.version = str(package.__version__)
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        sys.meta_path.remove(self)
        for key in [key for key in sys.modules if key in self.names or _within(key, self.name)]:
            del sys.modules[key]
        sys.modules.update(self.before)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return None  # every module is in sys.modules already

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Iterable[Any]:  # noqa: B008
        if context.name is None or context.name.lower().replace("_", "-") == self.distribution:
            yield _Distribution(self)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, alias: _Alias) -> None:
        self.alias = alias

    def read_text(self, filename: str) -> str | None:
        header = Message()
        header["Metadata-Version"], header["Name"] = "2.1", self.alias.distribution
        header["Version"] = self.alias.version
        return {"METADATA": header.as_string(), "top_level.txt": self.alias.name}.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
