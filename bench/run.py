"""Times operators beside their rivals: the same fresh inputs, in alternating rounds, and never without the error.

A family's file (attention.py) lists its workloads. Every contender of a case is built first; then each is timed in
turn, several rounds, so that a drift of the machine touches all alike. On a CPU a repetition counts only if our threads
hardly waited for a core meanwhile; where that cannot be had, the row says how disturbed it was.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import os
import pkgutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import metate
import metate.bench
from metate import hardware, library
from metate.bench import machine
from metate.op import Args, Case, Op

Run = Callable[[int], Any]  # the i-th call, which takes the i-th set of inputs in rotation and returns the outputs
Repetition: TypeAlias = "tuple[float, float]"  # the share of it that threads waited for a core, and its seconds

ROUNDS = 3
WARM_UP = 0.05  # seconds before each block: caches, clocks, and other libraries' spinning threads
REPETITION = 4e-3  # seconds at least; several calls where one is shorter
QUIET = 0.02  # share of a repetition that our threads may wait for a core
PATIENCE = 4  # how many times its length a block may take to find quiet repetitions
LARGE = 4e9  # operations: above, correctness looks at the first and the last part that the sharding rules give
DIFFERING = 1e-4  # share of whole numbers, codes and ids of near ties, that may not be those of the truth
RECALL_SLACK = 0.01  # by how much our recall may lie below a rival's, in the mean of some trainings
ONE_TRAINING_SLACK = 0.03  # and of a single one: three standard deviations of the difference between two, 0.01
RIVAL_SLACK = 10  # how much more error a rival may have than ours before its speed is not shown


@dataclass(frozen=True)
class Approximate:
    """A run whose results are not exact, which share of the right ones it finds, in each of some samples, and what
    finding out has told already: how long a call takes, or repetitions in turns with the rivals'."""

    run: Run
    recalls: tuple[float, ...]
    seconds: float | None = None
    repetitions: tuple[Repetition, ...] = ()

    def __call__(self, i: int) -> Any:
        return self.run(i)


class Skip(Exception):
    """A contender cannot do this case; the text says why."""


@dataclass(frozen=True)
class Setup:
    """One case as every contender gets it: several sets of inputs, so that no cache serves the next call."""

    op: Op
    case: Case
    dtype: torch.dtype
    device: str
    sets: Sequence[Args]
    shared: dict[str, Any] = field(default_factory=dict)  # what rivals make of the inputs once for all of them

    @cached_property
    def named(self) -> list[dict[str, Any]]:
        return [dict(zip(self.op.parameters, args, strict=True)) for args in self.sets]


@dataclass(frozen=True)
class Workload:
    """An operator's cases, what a call costs, and who else can do it."""

    name: str
    op: Op  # its arguments are the inputs, its reference the truth
    cases: Sequence[Case]
    rivals: Mapping[str, Callable[[Setup], Run]]
    ours: Callable[[Setup, str], Run]  # of a backend
    flops: Callable[[Case], float]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    label: Callable[[Case], str] = str
    checked: int | None = None  # how many outputs are compared; None: all
    inputs: Callable[[Case], Args] | None = None  # instead of the op's examples, for contenders that are Approximate
    moved: Callable[[Setup], float] | None = None  # bytes a call cannot do without; None: all inputs and outputs once
    placed: Callable[[Args], Args] = lambda args: args  # examples, in memory as users' inputs are
    sets: int = 2  # of inputs
    call: bool = False  # what takes time is the call, not its work: no limit of the machine is near


@dataclass
class Contender:
    """Who runs a case, and what came of it."""

    name: str
    ours: bool
    run: Run | None = None
    status: str = "ok"  # ok, wrong, skipped or failed
    detail: str = ""
    error: float | None = None
    budget: float | None = None
    recall: float | None = None
    gap: tuple[float, float] | None = None  # to the best rival's recall, and its standard error over samples
    estimate: float = 0.0
    calls: int = 0
    times: list[float] = field(default_factory=list)
    disturbed: float = 0.0
    memory: list[float] = field(default_factory=list)  # bytes a second that a CPU's memory gave beside its blocks


@dataclass(frozen=True)
class Effort:
    """How much time a benchmark takes."""

    seconds: float = 2.0  # of timed calls, for a contender and case, about
    repetitions: int = 9
    largest: float = math.inf  # operations of the largest case
    compile: bool = True  # rivals that torch.compile has to build first


QUICK = Effort(seconds=0.6, repetitions=9, largest=1.2e10, compile=False)


def families() -> dict[str, Any]:
    """The modules beside this one that list workloads, by name."""
    names = [module.name for module in pkgutil.iter_modules(metate.bench.__path__)]
    modules = {name: importlib.import_module(f"metate.bench.{name}") for name in names if name != "run"}
    return {name: module for name, module in modules.items() if hasattr(module, "workloads")}


def cases(family: str, effort: Effort) -> list[tuple[Workload, Case, torch.dtype, str]]:
    """What there is to measure on this machine: on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        (workload, case, dtype, device)
        for workload in families()[family].workloads(effort.compile)
        for case in workload.cases
        for dtype in workload.dtypes
        if workload.flops(case) <= effort.largest
    ]


def measure(
    workload: Workload, case: Case, dtype: torch.dtype, device: str, effort: Effort, ceilings: machine.Ceilings
) -> list[dict[str, Any]]:
    """The rows of one case: ours on every compiled backend, then the rivals."""
    seed = int.from_bytes(os.urandom(4), "little")
    count = workload.sets if workload.flops(case) < 5e11 else 1
    if workload.inputs:
        sets = [workload.inputs(case)]
    else:
        sets = [workload.placed(workload.op.example(case, dtype, device, seed + i)) for i in range(count)]
    setup = Setup(workload.op, case, dtype, device, sets)
    contenders = [*_ours(workload, setup), *_rivals(workload, setup)]
    truths = [] if workload.inputs else _truth(workload, setup)
    for contender in contenders:
        _first_calls(contender, workload, setup, truths)
    _judge_recall(contenders)
    live = [contender for contender in contenders if contender.run is not None]
    for contender in live:
        if not contender.times and contender.estimate > effort.seconds:  # too slow to be called again
            contender.times.append(contender.estimate)
    live = [contender for contender in live if not contender.times]
    for _ in range(ROUNDS):
        for contender in live:
            _block(contender, device, effort)
            if device == "cpu":
                contender.memory.append(machine.memory_speed())
    rows = [_row(contender, workload, setup, ceilings) for contender in contenders]
    speeds = [row["p50"] for row in rows if row["status"] == "ok" and not row["ours"]]
    for row in rows:
        row["seed"] = seed
        if row["status"] == "ok" and speeds:
            row["times_best_rival"] = min(speeds) / row["p50"]
    live.clear()
    gc.collect()
    return rows


# Contenders.


def timed_backends(op: Op, device: str) -> list[str]:
    """Compiled backends; not the reference, a test's truth, and not what is simulated on a CPU."""
    return [name for name in op.implementations(device) if name != "reference" and (device == "cuda" or name == "cpu")]


def _ours(workload: Workload, setup: Setup) -> Iterator[Contender]:
    """Every compiled backend that does not refuse."""
    for backend in timed_backends(workload.op, setup.device):
        contender = Contender(f"metate {backend}", ours=True)
        reason = workload.op.refusal(backend, setup.sets[0])
        yield _build(contender, lambda b=backend: workload.ours(setup, b), reason)


def _rivals(workload: Workload, setup: Setup) -> Iterator[Contender]:
    for name, prepare in workload.rivals.items():
        yield _build(Contender(name, ours=False), lambda p=prepare: p(setup), None)


def _build(contender: Contender, prepare: Callable[[], Run], refusal: str | None) -> Contender:
    try:
        if refusal:
            raise Skip(refusal)
        contender.run = prepare()
    except Skip as reason:
        contender.status, contender.detail = "skipped", str(reason)
    except Exception as error:
        _failed(contender, error)
    return contender


def _failed(contender: Contender, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    contender.run, contender.status = None, "failed"
    contender.detail = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def call_op(setup: Setup, backend: str) -> Run:
    """The operator itself, on one backend: as users call it, where that is the first choice."""

    def run(i: int) -> Any:
        return setup.op(*setup.sets[i % len(setup.sets)])

    def run_on(i: int) -> Any:
        with metate.use(backend):
            return run(i)

    return run if backend == next(iter(setup.op.implementations(setup.device))) else run_on


# Correctness.

Truth = tuple[Callable[[Tensor, str], Tensor], tuple[Any, ...], tuple[Any, ...]]


def _truth(workload: Workload, setup: Setup) -> list[Truth]:
    """Of each part looked at: how to cut it from an output, the float64 truth, and plain torch at the dtype."""
    op, args = setup.op, setup.sets[0]
    whole: list[tuple[Callable[[Tensor, str], Tensor], Args]] = [(lambda x, name: x, args)]
    parts = whole if workload.flops(setup.case) <= LARGE else _parts(op, args)
    return [(cut, op.compute(torch.float64, part), op.compute(setup.dtype, part)) for cut, part in parts]


def _parts(op: Op, args: Args) -> list[tuple[Callable[[Tensor, str], Tensor], Args]]:
    """The first and the last of the equal parts that need no communication, along the dimension with most of them."""
    named = dict(zip(op.parameters, args, strict=True))

    def count(rule: Any) -> int:
        return math.gcd(*(named[name].shape[dim] for name, dim in rule[1].items()))

    outputs, inputs = max(op.sharding(op, args), key=count)
    number = count((outputs, inputs))

    def piece(x: Tensor, dim: int, at: int) -> Tensor:
        size = x.shape[dim] // number
        return x.narrow(dim, at * size, size)

    found = []
    for at in sorted({0, number - 1}):
        part = tuple(piece(x, inputs[name], at) if name in inputs else x for name, x in named.items())

        def cut(x: Tensor, name: str, at: int = at) -> Tensor:
            return piece(x, outputs[name], at) if name in outputs else x

        found.append((cut, part))
    return found


def _judge(contender: Contender, workload: Workload, got: Any, truths: list[Truth]) -> None:
    """Error relative to the largest true value, against twice that of plain torch and one unit in the last place; of
    whole numbers, the share that differs."""
    results = got if isinstance(got, tuple) else (got,)
    results = results[: workload.checked]
    contender.error = contender.budget = 0.0
    for cut, truth, plain in truths:
        for name, whole, t, p in zip(workload.op.outputs, results, truth, plain, strict=False):
            g = cut(whole, name).double()
            if g.shape != t.shape:
                raise ValueError(f"{name} has shape {tuple(g.shape)}, expected {tuple(t.shape)}")
            if not t.numel():
                continue
            if whole.dtype.is_floating_point:
                error, allowed = _distance(g, t), 2 * _distance(p.double(), t) + torch.finfo(whole.dtype).eps
            else:
                error, allowed = float((g != t).double().mean()), DIFFERING
            if not error / allowed <= contender.error / (contender.budget or 1):
                contender.error, contender.budget = error, allowed
    slack = 1 if contender.ours else RIVAL_SLACK
    if not contender.error <= slack * contender.budget:
        contender.status = "wrong"
        contender.detail = f"error {contender.error:.1e}, allowed {slack * contender.budget:.1e}"


def _judge_recall(contenders: list[Contender]) -> None:
    """Ours are wrong where a rival finds more."""
    recalls = {c.name: c.run.recalls for c in contenders if isinstance(c.run, Approximate)}
    for contender in contenders:
        if contender.name in recalls:
            contender.recall = statistics.fmean(recalls[contender.name])
    rivals = [c for c in contenders if c.recall is not None and not c.ours]
    if not rivals:
        return
    best = max(rivals, key=lambda c: c.recall or 0.0)
    for contender in contenders:
        if not contender.ours or contender.recall is None:
            continue
        gaps = [a - b for a, b in zip(recalls[contender.name], recalls[best.name], strict=True)]
        if len(gaps) > 1:
            contender.gap = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        if statistics.fmean(gaps) < -(RECALL_SLACK if len(gaps) > 1 else ONE_TRAINING_SLACK):
            contender.run, contender.status = None, "wrong"
            contender.detail = f"recall {contender.recall:.3f}, a rival's {best.recall:.3f}"


def _distance(x: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true value; infinite where only one of both is finite."""
    finite = truth.isfinite()
    if not torch.equal(finite, x.isfinite()):
        return math.inf
    return float((x - truth).where(finite, 0).abs().max()) / (float(truth.where(finite, 0).abs().max()) or 1.0)


# Time.


def _first_calls(contender: Contender, workload: Workload, setup: Setup, truths: list[Truth]) -> None:
    """The result of the first call, and how long a later one takes."""
    if contender.run is None:
        return
    try:
        if isinstance(contender.run, Approximate) and (contender.run.seconds or contender.run.repetitions):
            contender.estimate = contender.run.seconds or 0.0
            contender.times = [seconds for _, seconds in contender.run.repetitions]
            contender.disturbed = max((share for share, _ in contender.run.repetitions), default=0.0)
            return
        got = contender.run(0)
        if not isinstance(contender.run, Approximate):
            _judge(contender, workload, got, truths)
        _synchronize(setup.device)
        began = time.perf_counter()
        contender.run(1)
        _synchronize(setup.device)
        contender.estimate, contender.calls = time.perf_counter() - began, 2
    except Exception as error:
        _failed(contender, error)
    if contender.status == "wrong":
        contender.run = None


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _block(contender: Contender, device: str, effort: Effort) -> None:
    """One contender's repetitions of one round."""
    assert contender.run is not None
    one = max(contender.estimate, 1e-7)
    wanted = max(1, min(math.ceil(effort.repetitions / ROUNDS), int(effort.seconds / ROUNDS / one)))
    inner = max(1, math.ceil(REPETITION / one)) if device == "cpu" else 1
    time.sleep(0.02)
    until = time.perf_counter() + WARM_UP
    while one < 10 * WARM_UP:
        _call(contender, 1)
        _synchronize(device)  # else minutes of a GPU's work would queue up here
        if time.perf_counter() > until:
            break
    repeat = _repetition_cuda if device == "cuda" else _repetition_cpu
    found: list[Repetition] = []
    give_up = time.perf_counter() + PATIENCE * max(wanted * inner * one, 0.05)
    while sum(share <= QUIET for share, _ in found) < wanted:
        found.append(repeat(contender, inner))
        if len(found) >= wanted and time.perf_counter() > give_up:
            break
    best = sorted(found, key=lambda pair: max(pair[0], QUIET))[:wanted]
    contender.times += [seconds for _, seconds in best]
    contender.disturbed = max(contender.disturbed, *(share for share, _ in best))
    contender.estimate = min(contender.estimate, *(seconds for _, seconds in best))


def _call(contender: Contender, count: int) -> None:
    assert contender.run is not None
    for _ in range(count):
        contender.run(contender.calls)
        contender.calls += 1


def _repetition_cpu(contender: Contender, inner: int) -> Repetition:
    share, seconds = timed(lambda: _call(contender, inner))
    return share, seconds / inner


def timed(call: Callable[[], Any]) -> Repetition:
    waited, began = _waited(), time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    return (_waited() - waited) / seconds, seconds


def _waited() -> float:
    """Seconds that threads of this process were runnable and got no core, so far."""
    total = 0
    for record in Path("/proc/self/task").glob("*/schedstat"):  # none on systems without /proc
        try:
            total += int(record.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has ended, or the kernel keeps no such record
    return total * 1e-9


def _repetition_cuda(contender: Contender, inner: int) -> Repetition:
    """One call between events, the second-level cache emptied before."""
    torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    _call(contender, inner)
    end.record()
    end.synchronize()
    return 0.0, start.elapsed_time(end) / 1000 / inner


# Records.


def _row(contender: Contender, workload: Workload, setup: Setup, ceilings: machine.Ceilings) -> dict[str, Any]:
    dtype = str(setup.dtype).removeprefix("torch.")
    row: dict[str, Any] = {
        "workload": workload.name,
        "op": setup.op.name,
        "case": setup.case,
        "label": workload.label(setup.case),
        "dtype": dtype,
        "device": setup.device,
        "contender": contender.name,
        "ours": contender.ours,
        "status": contender.status,
        "detail": contender.detail,
        "error": contender.error,
        "allowed": contender.budget,
        "recall": contender.recall,
        "recall_gap": contender.gap,
        "call": workload.call,
    }
    if not contender.times:
        return row
    fifths = statistics.quantiles(contender.times, n=5, method="inclusive") if len(contender.times) > 1 else None
    median = statistics.median(contender.times)
    flops = workload.flops(setup.case)
    size = workload.moved(setup) if workload.moved else setup.op.bytes(setup.sets[0])
    ceiling = ceilings["all"]
    memory = statistics.median(contender.memory or [ceiling["memory"]])
    bounds = {dtype: flops / machine.peak(ceiling, dtype), "memory": size / memory}
    bound = max(bounds, key=lambda name: bounds[name])
    row.update(
        p20=fifths[0] if fifths else median,
        p50=median,
        p80=fifths[3] if fifths else median,
        n=len(contender.times),
        flops=flops,
        bytes=size,
        flops_per_second=flops / median,
        bytes_per_second=size / median,
        memory=memory,
        bound=bound,
        of_limit=bounds[bound] / median,
        disturbed=round(contender.disturbed, 3) if contender.disturbed > QUIET else 0,
    )
    return row


def record(
    command: str, ceilings: machine.Ceilings, rows: list[dict[str, Any]], before: dict[str, Any]
) -> dict[str, Any]:
    """Everything a number needs to be a result."""
    from metate.bench import ggml

    return {
        "schema": 1,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git(),
        "machine": hardware.machine(),
        "build": library.report(),
        "versions": hardware.versions() | ggml.versions(),
        "protocol": {
            "rounds": ROUNDS, "quiet": QUIET, "rival_slack": RIVAL_SLACK, "freed_memory": "kept by the process",
            "inputs": "fresh, normal", "time": "CUDA events, cold L2" if torch.cuda.is_available() else "wall clock",
        },
        "conditions": {"before": before, "after": machine.conditions()},
        "ceilings": ceilings,
        "rows": rows,
    }  # fmt: skip


def _git() -> dict[str, Any]:
    root = os.path.dirname(metate.bench.__path__[0])
    if not os.path.exists(os.path.join(root, ".git")):  # installed: a repository around it is another project's
        return {}
    try:
        sha = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"sha": sha.stdout.strip(), "dirty": bool(dirty.stdout.strip())}


def keep_freed_memory() -> None:
    """Page faults on outputs that a library allocates anew would cost more than its kernels; this spares all alike."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 0x7FFFFFFF)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc
