"""The ceilings of this machine, measured: operations a second per data type, bytes a second per level of memory.

On the CPU by chains of instructions and by plain loads (csrc/cpu/peak.cpp), on the GPU by the vendor's matrix product
and by copies. Samples are short and the best one counts: a ceiling is what the machine can do, not what it did.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from metate import hardware

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}  # as in csrc/cpu/peak.h
READ = 3
SAMPLE = 3e-3  # seconds: undisturbed more often than a longer one
SAMPLES = 24
BEYOND_CACHE = 256 << 20

Ceilings = dict[str, Any]


def ceilings(device: str, tell: Callable[[str], None] = lambda text: None) -> Ceilings:
    """Operations a second by dtype and bytes a second by memory level; on a CPU for one thread and for all."""
    if device == "cuda":
        tell("peaks of the GPU")
        return {"all": _gpu()}
    threads = torch.get_num_threads()
    found = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        tell(f"peaks of {count} thread{'s' if count > 1 else ''}")
        found[str(count)] = _cpu(count)
    torch.set_num_threads(threads)
    every, one = found[str(threads)], found["1"]
    return {**found, "all": {name: max(speed, one[name]) for name, speed in every.items()}}


def peak(ceiling: Ceilings, dtype: str) -> float:
    """Operations a second at a data type. Without an instruction of its own a type is computed as float32."""
    return float(ceiling.get(dtype) or ceiling["float32"])


def _cpu(threads: int) -> Ceilings:
    found: Ceilings = {name: speed for name, kind in KINDS.items() if (speed := _best(kind, torch.ones(1)))}
    caches = hardware.caches()
    buffer = _beyond_caches()
    for level, size in caches.items():
        private = threads if level != "L3" else 1
        found[level] = _best(READ, buffer[: size * private // 2 // 4])
    found["memory"] = memory_speed()
    target = torch.empty_like(buffer)
    seconds = min(_seconds(lambda: target.copy_(buffer)) for _ in range(5))
    found["copy"] = 2 * buffer.numel() * 4 / seconds
    return found


def memory_speed() -> float:
    """Bytes a second from a CPU's memory at this moment: other machines share it, and it may halve within seconds."""
    return _best(READ, *_beyond_caches().chunk(8))  # each part has left the caches when its turn comes again


@functools.cache
def _beyond_caches() -> torch.Tensor:
    return torch.ones(max(BEYOND_CACHE, 3 * max(hardware.caches().values(), default=0)) // 4)


def _best(kind: int, *buffers: torch.Tensor) -> float:
    """Work a second in the best of many samples; 0 where the instruction set lacks the kind.

    A lone buffer is worked on again and again, several in turn and once each: a second time would find it in a cache.
    """
    threads, repeats, turn = torch.get_num_threads(), 1, itertools.cycle(buffers)
    call = lambda: torch.ops.metate_C.peak(next(turn), kind, repeats)  # noqa: E731
    torch.set_num_threads(1)  # a lone thread measures how much work a sample takes more reliably
    while len(buffers) == 1 and call().any() and (seconds := min(_seconds(call) for _ in range(5))) < SAMPLE / 2:
        repeats *= 2 if seconds > SAMPLE / 20 else 10
    torch.set_num_threads(threads)
    if kind == READ and len(buffers) == 1:
        repeats *= threads  # each reads its part
    return float(call().sum()) / min(_seconds(call) for _ in range(SAMPLES))


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gpu() -> Ceilings:
    size, found = 8192, {}
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / _gpu_seconds(lambda a=a, b=b: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found["memory"] = found["copy"] = 2 * source.numel() * 4 / _gpu_seconds(lambda: target.copy_(source))
    return found


def _gpu_seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[3:])


def conditions() -> dict[str, Any]:
    """What may change while a benchmark runs, looked at before and after it."""
    state: dict[str, Any] = {"load": os.getloadavg()[0]}
    if torch.cuda.is_available():
        state["gpu"] = hardware.gpu_state()
    return state
