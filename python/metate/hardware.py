"""What this machine is: processor, caches, memory, threads, GPUs, versions, and what about it makes kernels slow."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from metate import library

PACKAGES = (
    *("torch", "triton", "numpy", "matplotlib"),
    *("transformers", "onnxruntime", "openvino", "flash-attn", "bitsandbytes", "faiss-cpu"),
)
_CPU0 = Path("/sys/devices/system/cpu/cpu0")


def machine() -> dict[str, Any]:
    """Everything a measurement depends on that does not change while it runs."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "affinity": affinity(),
        "cpu_quota": cpu_quota(),
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": _read(_CPU0 / "cpufreq" / "scaling_governor"),
        "isa": library.isas(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus(),
    }


def affinity() -> list[int]:
    """The cores that this process may use: all, on systems that bind none."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """As the processor calls itself; virtual machines often hide the number, so then with its family and model."""
    facts: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), " ".join(value.split()))
    called = facts.get("model name") or facts.get("Model") or platform.processor() or platform.machine()
    numbered = any(letter.isdigit() for letter in called.partition("@")[0])  # beyond it stands the clock
    if numbered or not {"cpu family", "model"} <= facts.keys():
        return called
    return f"{called} (family {facts['cpu family']}, model {facts['model']})"


def caches() -> dict[str, int]:
    """Bytes of the data caches that the first core sees: {"L1": 32768, …}."""
    found = {}
    for index in sorted((_CPU0 / "cache").glob("index*")):
        size = _read(index / "size")
        if _read(index / "type") in ("Data", "Unified") and size and size.endswith("K"):
            found[f"L{_read(index / 'level')}"] = int(size[:-1]) * 1024
    return found


def cpu_quota() -> float | None:
    """How many cores' time the control group grants, None without a limit."""
    quota, _, period = (_read(Path("/sys/fs/cgroup/cpu.max")) or "").partition(" ")
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    folder = Path("/sys/fs/cgroup/cpu")
    quota, period = _read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_bytes": properties.total_memory,
                "processors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
            }
        )
    return found


def gpu_state(index: int = 0) -> dict[str, Any]:
    """Clocks, power, temperature and why the clocks are lowered, now; empty without nvidia-ml-py."""
    if importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "lowered_by": [name for name, bit in _clock_event_reasons(pynvml).items() if reasons & bit],
        }
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    finally:
        pynvml.nvmlShutdown()


def _clock_event_reasons(pynvml: Any) -> dict[str, int]:
    prefix = "nvmlClocksEventReason"
    names = [name for name in dir(pynvml) if name.startswith(prefix) and not name.endswith(("All", "None"))]
    return {name.removeprefix(prefix): getattr(pynvml, name) for name in names}


def versions() -> dict[str, str]:
    """Python, and those of our packages and peers that are installed."""
    found = {"python": platform.python_version()}
    for package in ("metate", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def backends() -> dict[str, str]:
    """Every backend -> "" where it runs on this machine's tensors, else what is missing and how to get it."""
    loaded = library.load()
    return {
        "cpu": loaded["cpu"].missing,
        "cuda": loaded["cuda"].missing or ("" if torch.cuda.is_available() else _no_gpu()),
        "triton": _no_triton(),
        "reference": "",
    }


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"built, but torch {torch.__version__} has no CUDA: on a machine with a GPU, install a torch with CUDA"
    return "built, but torch sees no GPU: check the driver with nvidia-smi"


def _no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    import triton

    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return ""
    return "needs a GPU; TRITON_INTERPRET=1 runs it, slowly, on the CPU"


def warnings() -> list[str]:
    """What keeps kernels from running fast here, or at all, and can be changed."""
    found = []
    threads, available = torch.get_num_threads(), float(len(affinity()))
    quota = cpu_quota()
    limit = min(available, quota) if quota else available
    if threads > limit:
        fewer = max(1, int(limit))
        found.append(f"{threads} threads on {limit:g} cores' time: torch.set_num_threads({fewer}) or OMP_NUM_THREADS")
    if library.refused_isa():
        isas = library.isas()
        found.append(f"METATE_ISA={library.refused_isa()} is none of {', '.join(isas)}; {isas[0]} is in use")
    requested, known = library.requested_backend(), backends()
    if requested and requested not in known:
        found.append(f"METATE_BACKEND={requested} is no backend, so that nothing runs; it may be {', '.join(known)}")
    if _read(_CPU0 / "cpufreq" / "scaling_governor") == "powersave":
        found.append("the CPU governor is powersave: `cpupower frequency-set -g performance`")
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
