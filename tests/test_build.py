"""The build keeps its promises: nothing reaches a machine that lacks the instructions, and torch's ABI stays closed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import metate
from metate import library

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "kernels" / "CMakeFiles"
CPU_OBJECTS = sorted(OBJECTS.glob("kernels_*.dir/**/*.o"))
BASELINE_OBJECTS = [
    *OBJECTS.glob("isa_objects.dir/**/*.o"),
    *OBJECTS.glob("kernels_baseline.dir/**/*.o"),
    *(ROOT / "build" / "bindings").glob("**/*.o"),
]
PTXAS_LOGS = sorted((ROOT / "build" / "kernels" / "cuda").glob("*.log"))
VECTOR = re.compile(r"%[yz]mm|\t(v[a-z0-9]+) .*%xmm|%k[1-7]\b")


def run(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_files() -> list[Path]:
    return [Path(m.module.__file__) for m in library.load().values() if m.module]


@pytest.fixture
def tree():
    if not CPU_OBJECTS:
        pytest.skip("no build tree: metate was not built here")


def test_there_is_something_to_check():
    """The other tests look at object files, which exist wherever metate was built from this tree."""
    installed_from_here = Path(metate.__file__).is_relative_to(ROOT)
    assert CPU_OBJECTS or not installed_from_here
    assert library.load()["cpu"].module, library.load()["cpu"].missing


@pytest.mark.parametrize("path", CPU_OBJECTS, ids=name_of)
def test_kernel_objects_hold_nothing_the_linker_may_share(path):
    """A weak symbol of an AVX-512 object may be picked for every machine; a static initialiser runs on each."""
    shared = [
        line for line in run("nm", "--demangle", "--defined-only", path).splitlines() if re.search(r" [WVu] ", line)
    ]
    assert not shared, shared
    assert not re.search(r"\.(init_array|ctors)", run("objdump", "--section-headers", path))


@pytest.mark.parametrize("path", BASELINE_OBJECTS, ids=name_of)
def test_baseline_objects_run_everywhere(path):
    """Code that is entered before cpuid is asked holds no AVX."""
    for line in run("objdump", "--disassemble", "--no-show-raw-insn", path).splitlines():
        assert not VECTOR.search(line), line


def test_isa_objects_do_use_their_instructions(tree):
    """The check above would see AVX if it were there."""
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        paths = [path for path in CPU_OBJECTS if f"kernels_{isa}.dir" in path.parts]
        if not paths:
            pytest.skip("this processor has one instruction set")
        assert any(register in run("objdump", "--disassemble", path) for path in paths)


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.name)
def test_modules_need_only_the_stable_abi(path):
    allowed = re.compile(
        r"(aoti_torch_|torch_|_?Py|__?[a-z]|[a-z]|_ZSt|_ZNK?[RO]?S|_ZTVS|_ZTIS|_ZTVN10__cxxabiv1|_Zn|_Zd|_ITM|_Unwind)"
    )
    for line in run("nm", "--dynamic", "--undefined-only", path).splitlines():
        symbol = line.split()[-1]
        assert allowed.match(symbol), symbol
        assert not re.match(r"_ZNK?[RO]?(3c10|2at|5torch)", symbol), symbol
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "--private-headers", path))
    foreign = [
        name for name in needed if not re.match(r"lib(torch|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so|ld-linux", name)
    ]
    assert not foreign, "no second OpenMP, no libcudart, no libtorch_python"


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.name)
def test_modules_export_only_their_entry(path):
    exported = [line.split()[-1] for line in run("nm", "--dynamic", "--defined-only", path).splitlines()]
    ours = [name for name in exported if "metate" in name or name.startswith("cuda")]
    assert not ours, ours
    assert f"PyInit_{path.name.split('.')[0]}" in exported


def test_no_flag_ties_the_build_to_its_machine():
    files = [
        ROOT / "CMakeLists.txt",
        ROOT / "setup.py",
        ROOT / "Makefile",
        *ROOT.glob("csrc/**/*"),
        *ROOT.glob("build_backend/*"),
    ]
    for path in files:
        if path.is_file() and path.suffix != ".pyc":
            for line in path.read_text().splitlines():
                code = line.split("#")[0].split("//")[0]
                assert not re.search(r"-march=native|-mtune=native|-ffast-math|-Ofast", code), f"{path}: {line}"


def test_cuda_objects_do_not_depend_on_where_cmake_lies(tree):
    """pip's lies in another folder every time: what names it would be compiled again, for minutes."""
    commands = re.findall(r"^  COMMAND = (.* -gencode .*)", (OBJECTS.parent / "build.ninja").read_text(), re.MULTILINE)
    assert not [command for command in commands if "cmake_transform_depfile" in command]


@pytest.mark.parametrize("log", PTXAS_LOGS, ids=name_of)
def test_gpu_kernels_do_not_spill(log):
    """Up to head_dim 128; beyond, a few bytes outside the inner loop are the price of the wider tile."""
    text = log.read_text()
    kernels = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", text)  # none where a file only launches
    for (name, arch), spills in zip(
        kernels, re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text), strict=True
    ):
        narrow = all(int(width) <= 128 for width in re.findall(r"Li(\d+)E", name))  # head dimensions, tile sizes
        assert not narrow or spills == ("0", "0"), f"{name} on {arch} spills {spills}"


@pytest.mark.parametrize("log", PTXAS_LOGS, ids=name_of)
def test_gpu_kernels_multiply_what_they_copy(log):
    """No emulator sees what nvcc leaves out: a kernel that fills tiles asynchronously has tensor-core products."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel in run(tool, "--dump-sass", log.with_suffix("")).split("Function : ")[1:]:
        assert "LDGSTS" not in kernel or "HMMA" in kernel, kernel.split()[0]


def test_gpu_kernels_are_few():
    """At most 60 kernels of a family per architecture are compiled ahead of time."""
    if not PTXAS_LOGS:
        pytest.skip("no CUDA kernels were built: " + library.load()["cuda"].missing)
    families = [header.stem for header in ROOT.glob("csrc/*.h")]
    kernels: Counter[tuple[str, str]] = Counter()
    for log in PTXAS_LOGS:
        family = next(name for name in families if log.name.startswith(name))
        kernels.update((family, arch) for arch in re.findall(r"entry function '\S+' for '(\S+)'", log.read_text()))
    assert kernels and max(kernels.values()) <= 60, kernels


@pytest.mark.parametrize(
    "compiler,first",
    [("no-such-compiler", "no C++ compiler works here (no-such-compiler not found)."), ("/bin/true", "")],
)
def test_what_a_build_lacks_is_said_in_three_lines(compiler, first):
    environment = {**os.environ, "CXX": compiler, "PATH": "/nowhere"}
    command = [sys.executable, ROOT / "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 3, done.stderr
    assert lines[0] == "metate: " + (first or "cmake ninja not found here.")
    assert "install" in lines[1] + lines[2]


def test_wheel(tmp_path, tree):
    """A wheel serves this Python and every torch from 2.10, and holds kernels, types and nothing else."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # another ninja would compile everything again
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--quiet",
            "--wheel-dir",
            tmp_path,
            ROOT,
        ],
        check=True,
        env={
            **os.environ,
            "METATE_ARCHS": "",
            "PATH": tools,
        },  # the CUDA kernels would be compiled once more, for minutes
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"metate-[0-9.]+-(cp3\d+)-\1t?-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"metate/_cpu.abi3.so", "metate/build.json", "metate/py.typed", "metate/kernels/__init__.py"} <= set(names)
    assert any(re.fullmatch(r"metate/_runtime\.cpython-3\S+\.so", name) for name in names)
    extra = [name for name in names if not re.match(r"metate(-[0-9.]+\.dist-info)?/", name) or "__pycache__" in name]
    assert not extra, extra
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "import metate, metate.library as l; assert l.load()['cpu'].module, l.load(); print(metate.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.startswith(str(tmp_path))
