"""The tree keeps its shape: who may import whom, how long a file is, and that a family stands on every floor."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "metate"
LAYERS = [
    {
        "errors", "scalars", "flops", "accuracy", "axes", "philox", "masks", "low_bit", "memory", "library", "hardware",
        "backends",
    },
    {"op"},
    {"shortcut", "explanation"},
    {"ops"},
    {"nn", "quant", "search"},
    {"models", "generate", "parallel"},
    {"compat", "verify", "bench", "demo", "cli", "__init__", "__main__"},
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
SHOUTED = re.compile(r"METATE_(?!ISA\b|BACKEND\b|ARCHS\b)[A-Z_]+")


def sources(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if "__pycache__" not in path.parts)
    assert found, patterns
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Absolute names of the modules and members a file imports anywhere."""
    roots = {PACKAGE: ("metate",), ROOT / "kernels": ("metate", "kernels")}
    package = next((name + path.relative_to(r).parent.parts for r, name in roots.items() if path.is_relative_to(r)), ())
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def component(name: str) -> str | None:
    """`op` of metate.op.Op; None for what is not a module of metate."""
    parts = name.split(".")
    return parts[1] if parts[0] == "metate" and len(parts) > 1 and parts[1] in RANK else None


def own_component(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("python/metate/**/*.py"), ids=name_of)
def test_python_imports_downwards(path):
    own = own_component(path)
    assert own in RANK, f"give {own} a layer in {__file__}"
    for name in imports(path):
        other = component(name)
        if other and other != own:
            assert RANK[other] <= RANK[own], f"{own} may not import {name}"


def test_python_has_no_circle():
    edges = {name: set() for name in RANK}
    for path in sources("python/metate/**/*.py"):
        own = own_component(path)
        edges[own] |= {other for name in imports(path) if (other := component(name)) and other != own}
    while edges:
        free = {name for name, others in edges.items() if not others}
        assert free, f"these import each other in a circle: {sorted(edges)}"
        edges = {name: others - free for name, others in edges.items() if name not in free}


@pytest.mark.parametrize("path", sources("python/metate/ops/**/*.py"), ids=name_of)
def test_ops_never_import_ops(path):
    family = path.relative_to(PACKAGE / "ops").parts[0].removesuffix(".py")
    others = {name.split(".")[2] for name in imports(path) if name.startswith("metate.ops.")}
    assert others <= {family} or family == "__init__"


@pytest.mark.parametrize("path", sources("kernels/**/*.py"), ids=name_of)
def test_triton_kernels_stand_alone(path):
    allowed = {
        "torch",
        "triton",
        "metate.kernels",
        "__future__",
        "typing",
        "dataclasses",
        "functools",
        "collections",
        "math",
        "threading",
        "types",
    }
    for name in imports(path):
        module = "metate.kernels" if name.startswith("metate.kernels") else name.split(".")[0]
        assert module in allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", sources("tests/**/*.py"), ids=name_of)
def test_tests_never_import_bench(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "bench"}


@pytest.mark.parametrize("path", sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu"), ids=name_of)
def test_cpp_includes(path):
    """csrc/<family>.h ← csrc/cpu, csrc/cuda ← csrc/torch; only csrc/torch knows torch; ISA files only C headers."""
    folder = path.relative_to(ROOT / "csrc").parts[0]
    floors = {"cpu": {"cpu"}, "cuda": {"cuda"}, "torch": {"torch", "cpu"}, "runtime": {"runtime"}}.get(folder, set())
    text = path.read_text()
    for quoted in re.findall(r'#include "(.*)"', text):
        target = next(t for base in (path.parent, ROOT / "csrc") if (t := (base / quoted).resolve()).exists())
        parts = target.relative_to(ROOT / "csrc").parts
        assert len(parts) == 1 or parts[0] in floors, f"{name_of(path)} includes {quoted}"
    for system in re.findall(r"#include <(.*)>", text):
        if folder != "torch":
            ours = r"pybind11/" if name_of(path) == "csrc/runtime/module.cpp" else r"$"
            foreign = re.match(r"(torch|ATen|c10|Python|pybind11)", system)
            assert not foreign or re.match(ours, system), f"{name_of(path)} includes {system}"
        if folder in ("cpu", "metate.h") or len(path.relative_to(ROOT / "csrc").parts) == 1:
            assert re.fullmatch(r"[a-z0-9_]+\.h", system), f"{system}: C++ headers put templates into ISA objects"


@pytest.mark.parametrize("header", [p for p in sources("csrc/*.h") if p.name != "metate.h"], ids=name_of)
def test_family_stands_on_every_floor(header):
    family = header.stem
    floors = {
        "python/metate/ops": ".py", "csrc/cpu": ".cpp", "csrc/cuda": ".cu", "csrc/torch": ".cpp", "kernels": ".py",
        "tests": ".py",
    }  # fmt: skip
    for floor, suffix in floors.items():
        name = f"test_{family}" if floor == "tests" else family
        folder = ROOT / floor
        assert (folder / f"{name}{suffix}").exists() or (folder / family).is_dir(), f"{floor} lacks {family}"


@pytest.mark.parametrize(
    "path",
    sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "python/**/*.py", "kernels/**/*.py", "tests/**/*.py",
            "tests/native/*", "bench/**/*.py", "*.py"),
    ids=name_of,
)  # fmt: skip
def test_files_and_functions_are_short(path):
    lines = path.read_text().count("\n")
    assert lines <= 700, f"{lines} lines; a family that outgrows one file becomes a folder of its name"
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{node.name} has {length} lines"


def test_few_flags():
    """Four environment names; the library reads them in two files, the build in one."""
    readers = set()
    for path in sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "python/**/*.py", "kernels/**/*.py", "*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"environ[.\[]|getenv\(", line) and "METATE_" in line:
                readers.add(name_of(path))
                assert not SHOUTED.search(line), line
    assert readers <= {"python/metate/library.py", "csrc/cpu/isa.cpp", "setup.py"}
