"""Builds the kernels with CMake, the bindings on top with torch.utils.cpp_extension, and says what came of it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from setuptools import Extension, find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: the module runs on every later torch
GIGABYTES_PER_JOB = 1.0
CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]

NO_PYBIND11 = """
metate: no pybind11 headers in this torch ({folder}), and none installed.
Install them beside torch, `pip install pybind11` or `conda install pybind11`, and run this again.
"""
NO_COMPILER = """
metate: no C++ compiler works here ({problem}).
metate compiles its kernels for this machine; it needs g++ 11 or clang 14, or newer.
Install one, e.g. `apt-get install g++`, `dnf install gcc-c++` or `conda install gxx_linux-64`, and run this again.
"""


NO_TOOLS = """
metate: {names} not found here.
--no-build-isolation builds with what is installed: `pip install {names}`, or leave the option out,
and run this again.
"""


def missing_tools() -> list[str]:
    """What pip brings where it isolates the build."""
    return [name for name in ("cmake", "ninja") if not shutil.which(name)] + ["torch"] * (find_spec("torch") is None)


def compiler_problem() -> str | None:
    """Why no C++20 program can be compiled, or None."""
    command = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-xc++", "-fsyntax-only", "-"]
    try:
        subprocess.run(command, input=b"#include <source_location>\n", capture_output=True, check=True)
    except FileNotFoundError:
        return f"{command[0]} not found"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode().strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{command[0]} cannot compile C++20: {lines[0]}"
    return None


def available_gigabytes() -> float:
    """What this process may still take: free memory, or what its control group leaves."""
    limits, meminfo = [], Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in control_groups():
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                limits.append(int((folder / limit).read_text()) - int((folder / usage).read_text()))
            except (OSError, ValueError):
                continue  # no such control group, or no limit
    return min(limits, default=4 << 30) / 2**30


def control_groups() -> set[Path]:
    """Where limits of this process' memory may stand: its own group and those around it; in a container the root."""
    roots = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}
    folders, own = set(roots.values()), Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        for name in roots.keys() & controllers.split(","):
            folder = roots[name] / path.lstrip("/")
            folders |= {folder, *(parent for parent in folder.parents if parent.is_relative_to(roots[name]))}
    return folders


def jobs() -> int:
    """As many compilers as there are cores and memory for."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(available_gigabytes() / GIGABYTES_PER_JOB)))


def one_at_a_time() -> IO[str]:
    """Waits for other builds of this tree, until closed: the object files are shared between environments."""
    BUILD.mkdir(exist_ok=True)
    lock = open(BUILD / ".lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def find_nvcc() -> str | None:
    wheels = [str(Path(path) / "nvidia" / "cu13" / "bin") for path in sys.path]
    home = [str(Path(os.environ[name]) / "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc", path=os.pathsep.join([*home, os.environ["PATH"], "/usr/local/cuda/bin", *wheels]))


def archs() -> str:
    return os.environ.get("METATE_ARCHS", "80;90a")


class Kernels:
    """The static libraries CMake makes."""

    folder = BUILD / "kernels"

    def configure(self, nvcc: str | None) -> None:
        options = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "METATE_ARCHS": archs() if nvcc else "",
            "METATE_NVCC": nvcc or "",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", self.folder, "-G", "Ninja", *defines], check=True)

    def build(self, target: str) -> str:
        subprocess.run(["cmake", "--build", self.folder, "--target", target, f"-j{jobs()}"], check=True)
        return str(self.folder / f"lib{target}.a")

    def cached(self, name: str) -> str:
        for line in (self.folder / "CMakeCache.txt").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition("=")[2]
        raise KeyError(name)

    def cuda(self, nvcc: str | None) -> tuple[str | None, str]:
        """The CUDA library, and why there is none. An architecture that was asked for by name must compile."""
        if not archs():
            return None, "METATE_ARCHS was empty: reinstall without it"
        if not nvcc:
            return None, "no nvcc: install the CUDA toolkit, or `pip install nvidia-cuda-nvcc`, then reinstall"
        try:
            return self.build("metate_cuda"), ""
        except subprocess.CalledProcessError:
            if "METATE_ARCHS" in os.environ:
                raise
            return None, f"{nvcc} failed, see above; set METATE_ARCHS to make this an error"


def binding(name: str, library: str, flags: list[str], link: list[str]) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    compile_args = [*CXX_FLAGS, *flags]
    compile_args += [f"-DMETATE_MODULE={name}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    compile_args += [f"-isystem{path}" for path in include_paths()]
    link_args = [library, *link, "-Wl,--exclude-libs,ALL", *(f"-L{path}" for path in library_paths())]
    # Python loads torch with local symbols: the module finds them only in libraries it names itself.
    link_args += ["-Wl,--no-as-needed", "-ltorch"]
    return Extension(
        f"metate.{name}",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "torch").rglob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )


def pybind11_headers() -> str:
    """Torch's own copy, which fits every Python that this torch runs on; an installed one where torch has none."""
    from torch.utils.cpp_extension import include_paths

    folder = include_paths()[0]
    if (Path(folder) / "pybind11" / "pybind11.h").exists():
        return folder
    try:
        import pybind11
    except ImportError:
        sys.exit(NO_PYBIND11.format(folder=folder).strip())
    return str(pybind11.get_include())


def runtime() -> Extension:
    """metate._runtime: host objects without tensors, for this Python only (pybind11 has no limited API)."""
    return Extension(
        "metate._runtime",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "runtime").glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-isystem{pybind11_headers()}"]},
    )


def build_kernels() -> tuple[list[Extension], dict[str, str]]:
    """The binding modules to compile against the kernels, and a report of what there is and what not."""
    import torch

    kernels, nvcc = Kernels(), find_nvcc()
    kernels.configure(nvcc)
    extensions = [runtime(), binding("_cpu", kernels.build("metate_cpu"), [], [])]
    report = {"torch": torch.__version__, "machine": platform.machine(), "archs": "", "cuda": ""}
    library, report["cuda"] = kernels.cuda(nvcc)
    if library:
        root = Path(kernels.cached("METATE_CUDA_ROOT"))
        include = [root / "include", root / "targets" / f"{platform.machine()}-linux" / "include"]
        flags = ["-DMETATE_CUDA", *(f"-isystem{path}" for path in include if path.exists())]
        extensions.append(binding("_cuda", library, flags, [kernels.cached("METATE_CUDART"), "-ldl", "-lrt"]))
        report["archs"] = kernels.cached("METATE_ARCHS_BUILT")
    return extensions, report


def build_command(report: dict[str, str]):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            # Both bindings compile the same sources, each into its own folder, which outlives pip's temporary ones.
            self.build_temp = str(BUILD / "bindings" / ext.name)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            super().build_extension(ext)

        def run(self):
            super().run()
            package = ROOT / "python" / "metate" if self.inplace else Path(self.build_lib) / "metate"
            built = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
            for stale in set(package.glob("_c*.so")) - {package / name for name in built}:
                stale.unlink()  # of an earlier build in place
            (package / "build.json").write_text(json.dumps(report, indent=1) + "\n")
            line = f"metate: built CPU kernels ({report['machine']})"
            line += f", CUDA kernels (sm_{report['archs'].replace(';', ', sm_')})" if report["archs"] else ""
            line += f"; not CUDA kernels ({report['cuda']})" if report["cuda"] else ""
            tell(f"{line}; against torch {report['torch']}")

    return Build


def tell(line: str) -> None:
    """To the build log, and past it: pip shows no log of a build that succeeds."""
    print(line, flush=True)
    if sys.stdout.isatty():
        return
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{line}\n")
    except OSError:
        pass  # nobody is watching


def main() -> None:
    commands, extensions = {}, []
    # Metadata and source archives need no compiler and no torch.
    if {"build_ext", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        problem = compiler_problem()
        if problem:
            sys.exit(NO_COMPILER.format(problem=problem).strip())
        if missing := missing_tools():
            sys.exit(NO_TOOLS.format(names=" ".join(missing)).strip())
        lock = one_at_a_time()
        shutil.rmtree(BUILD / "lib", ignore_errors=True)  # setuptools would ship what an earlier build left there
        os.environ["MAX_JOBS"] = str(jobs())
        extensions, report = build_kernels()
        commands = {"build_ext": build_command(report)}
    packages = find_namespace_packages("python", exclude=["*__pycache__"])
    kernels = [f"metate.kernels.{name}" for name in find_namespace_packages("kernels", exclude=["*__pycache__"])]
    setup(
        packages=[*packages, "metate.kernels", *kernels, "metate.bench"],
        package_dir={"": "python", "metate.kernels": "kernels", "metate.bench": "bench"},
        package_data={"metate": ["py.typed", "_runtime.pyi"]},
        ext_modules=extensions,
        cmdclass=commands,
        options={"build": {"build_lib": str(BUILD / "lib")}},
    )
    if extensions:
        lock.close()


main()
