"""What holds for every compiled op whatever values it computes: bits, memory, threads, processes, malformed calls."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import BACKENDS, COMPILED, OPS, example, examples, outputs, run, same_bits
from torch import Tensor

import metate
from metate import library
from metate.op import REGISTRY, Op

RERUNS = int(os.environ.get("METATE_TEST_RERUNS", "100"))
MALFORMED = int(os.environ.get("METATE_TEST_MALFORMED", "2000"))  # a million in the long target


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_bits_do_not_depend_on_threads_or_reruns(op, device, backend):
    for _, args in examples(op, backend, device, [torch.float32, torch.bfloat16]):
        first = run(op, backend, args)
        for n in (1, 2, 4):
            with threads(n):
                for _ in range(RERUNS // 30 + 1):
                    assert same_bits(run(op, backend, args), first)
    args = example(op, backend, device)
    first = run(op, backend, args)
    assert all(same_bits(run(op, backend, args), first) for _ in range(RERUNS))


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_bits_do_not_depend_on_batch_neighbours(op, device, backend):
    axis = op.domain.batch
    options = {name: [option.split() for option in text.split(" or ")] for name, text in op.axes.items()}
    for case, args in examples(op, backend, device, [torch.float32, torch.bfloat16]):
        if (
            case[axis] < 2
            or case.get("dropout_p")
            or case.get("alibi") == 2
            or "lengths" in case
            or (case.get("tiles") and axis == "N")  # of whose rows 16 stand together
            or any(name.startswith("need_d") for name in op.parameters)
            or op.writes
        ):
            continue
        whole = outputs(run(op, backend, args))
        for entry in range(case[axis]):
            alone = [
                a.narrow(d, entry, 1)
                if isinstance(a, Tensor) and (d := batch_dim(options.get(name, []), axis, a)) is not None
                else a
                for name, a in zip(op.parameters, args, strict=True)
            ]
            for w, g in zip(whole, outputs(run(op, backend, tuple(alone))), strict=True):
                if not w.numel():
                    continue
                d = w.shape.index(case[axis]) if w.shape[0] != case[axis] else 0
                assert same_bits(w.narrow(d, entry, 1), g), case


def batch_dim(options: list[list[str]], axis: str, tensor: Tensor) -> int | None:
    for d, name in enumerate(next((dims for dims in options if len(dims) == tensor.dim()), ())):
        if name.rstrip("?") == axis and tensor.shape[d] != 1:
            return d
    return None


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in awkward memory."""
    transposed = x.movedim(-1, 0).contiguous().movedim(0, -1)
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 77, dtype=x.dtype, device=x.device)
    padded[..., 1::2] = x
    shifted = torch.full((x.numel() + 3,), 77, dtype=x.dtype, device=x.device)[3:].view(x.shape)
    shifted.copy_(x)
    return [transposed, padded[..., 1::2], shifted]


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_bits_do_not_depend_on_strides(op, device, backend):
    for _, args in examples(op, backend, device, [torch.float32, torch.bfloat16]):
        expected = run(op, backend, args)
        for layout in range(3):
            awkward = tuple(layouts(a)[layout] if isinstance(a, Tensor) and a.dim() else a for a in args)
            assert same_bits(run(op, backend, awkward), expected)
    args = example(op, backend, device)
    repeated = tuple(
        a[:1].expand(a.shape)
        if isinstance(a, Tensor) and a.is_floating_point() and not (op.writes and name in op.outputs)
        else a
        for name, a in zip(op.parameters, args, strict=True)
    )
    copied = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in repeated)
    assert same_bits(run(op, backend, repeated), run(op, backend, copied))


_MAP_NORESERVE = 0x4000  # Linux has it, Python does not name it


def far(x: Tensor, d: int) -> Tensor:
    """The same values, the last of an axis 2^31 elements or more behind the first; memory between them takes none."""
    if not x.dim() or x.shape[d] < 2:
        return x
    x = x.movedim(d, 0).contiguous()
    stride = max(-(-(1 << 31) // (len(x) - 1)), x[0].numel())
    size = (stride * (len(x) - 1) + x[0].numel()) * x.element_size()
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    wide = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (stride, *x[0].stride()))
    return wide.copy_(x).movedim(0, d)


@pytest.mark.parametrize("d", [0, -1])
@pytest.mark.parametrize(
    "op,device,backend", [p for p in BACKENDS if p.values[1] == "cpu" and p.values[2] != "reference"]
)
def test_offsets_beyond_31_bits(op, device, backend, d):
    args = example(op, backend, device)
    wide = tuple(
        far(a, d) if isinstance(a, Tensor) and not (op.writes and name in op.outputs) else a
        for name, a in zip(op.parameters, args, strict=True)
    )
    assert same_bits(run(op, backend, wide), run(op, backend, args))


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_poisoned_outputs_and_scratch_change_nothing(op, device, backend):
    module = library.load()["cpu"].module
    for _, args in examples(op, backend, device, [torch.float32, torch.bfloat16]):
        expected = run(op, backend, args)
        torch.use_deterministic_algorithms(True)  # fills what torch allocates with NaN
        module.poison_scratch(True)
        try:
            assert same_bits(run(op, backend, args), expected)
        finally:
            module.poison_scratch(False)
            torch.use_deterministic_algorithms(False)


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor, left: bool) -> Tensor:
    """A copy flush against a page that faults, behind it or before it."""
    x = x.contiguous()
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    inner = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (address, address + page + inner):
        assert _libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    if not size:
        return x
    offset = page if left else page + inner - size
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


def run_guarded() -> None:
    """Every op and case between guard pages; the last line printed names the case that dies."""
    for op in REGISTRY.values():
        if "cpu" not in op.implementations("cpu"):
            continue
        for case, args in examples(op, "cpu", "cpu", [torch.float32, torch.bfloat16, torch.float64]):
            for left in (False, True):
                print(op.name, args[0].dtype, "left" if left else "right", case, flush=True)
                with metate.use("cpu"):
                    op(*(guarded(a, left) if isinstance(a, Tensor) else a for a in args))


def run_forked() -> None:
    """After parallel work in the parent, a forked child still computes every op, and the same bits."""
    ops = [op for op in REGISTRY.values() if "cpu" in op.implementations("cpu")]
    calls = [(op, op.example(op.domain.cases[1], torch.float32)) for op in ops]
    expected = [op.trial(args) for op, args in calls]
    child = os.fork()
    if child == 0:
        equal = (
            same_bits(run(op, "cpu", args), e) and same_bits(op.trial(args), e)
            for (op, args), e in zip(calls, expected, strict=True)
        )
        os._exit(0 if all(equal) else 1)
    assert os.waitpid(child, 0)[1] == 0


def run_out_of_memory() -> None:
    """Every allocation of every op fails once, in calls that come for the first time and in calls like others."""
    allocator = ctypes.CDLL(os.environ["LD_PRELOAD"])
    allocator.waits.restype = ctypes.c_bool
    for op in REGISTRY.values():
        if "cpu" not in op.implementations("cpu"):
            continue
        args = op.example(op.domain.cases[1], torch.float32)
        expected = op.trial(args)
        for first in (True, False):
            for n in range(1, 1000):
                print(op.name, "first" if first else "next", n, flush=True)
                if first:
                    op.forget_plans()
                if not fails_once(allocator, n, op, args):
                    break
                assert same_bits(op.trial(args), expected)


def fails_once(allocator: ctypes.CDLL, n: int, op: Op, args: tuple[Any, ...]) -> bool:
    """Whether a call, in a thread without memory of its own, came to its nth allocation, and ended in a MemoryError."""
    raised: list[Exception] = []

    def call() -> None:
        allocator.fail_allocation(ctypes.c_long(n))
        try:
            op.trial(args)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    failed = not allocator.waits()
    allocator.fail_allocation(ctypes.c_long(0))
    assert [type(error) for error in raised] == [MemoryError] * failed, raised
    return failed


def in_process(function: str, timeout: float, **variables: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_runtime; test_runtime.{function}()"
    )
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER_COUNT"} | variables
    return subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, timeout=timeout)


needs_compiled = pytest.mark.skipif(not any(p.values[1] == "cpu" for p in COMPILED), reason="no compiled CPU kernels")


@needs_compiled
def test_no_byte_outside_the_tensors_is_read():
    done = in_process("run_guarded", 600)
    assert done.returncode == 0, f"died at: {done.stdout.splitlines()[-1:]} {done.stderr[-500:]}"


@needs_compiled
def test_runs_after_fork():
    done = in_process("run_forked", 60)
    assert done.returncode == 0, done.stderr


@needs_compiled
def test_no_allocation_that_fails_ends_the_process(tmp_path):
    library = tmp_path / "failing_allocator.so"
    source = Path(__file__).parent / "failing_allocator.cpp"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    done = in_process("run_out_of_memory", 600, LD_PRELOAD=str(library))
    assert done.returncode == 0, f"died at: {done.stdout.splitlines()[-1:]} {done.stderr[-500:]}"


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_sixteen_threads_at_once(op, device, backend):
    """As users call it, directly where that goes, and by the dispatcher; what was admitted is forgotten meanwhile."""
    args = example(op, backend, device)
    expected, wrong = run(op, backend, args), []

    def work() -> None:
        for i in range(20):
            if not (same_bits(op.trial(args), expected) and same_bits(run(op, backend, args), expected)):
                wrong.append(1)
            if i % 7 == 6:
                op.forget_plans()

    workers = [threading.Thread(target=work) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


def malform(rng: Random, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """One to three arguments replaced by something a careless caller might pass."""
    args = list(args)
    for i in rng.sample(range(len(args)), rng.randint(1, min(3, len(args)))):
        old = args[i]
        if isinstance(old, Tensor):
            choices = [
                None, 3, "text", old.to(torch.int8), old.to(torch.complex64), old[None], old.flatten(), old[..., :-1],
                old[:0], old.new_empty(0), old.to("meta"), torch.cat([old, old]), old.double(),
                old.float().to_sparse() if old.dim() and old.device.type == "cpu" else old, torch.full_like(old, -7),
                torch.full_like(old, 99), old.flip(0), old.mT if old.dim() > 1 else old,
            ]  # fmt: skip
        else:
            choices = [
                None,
                -1,
                -2,
                0,
                2**62,
                -(2**63),
                1.5,
                float("nan"),
                float("inf"),
                True,
                "text",
                torch.ones(2),
                [],
                10**30,
            ]
        args[i] = rng.choice(choices)
    return tuple(args)


@pytest.mark.parametrize("op", OPS)
def test_malformed_calls_end_in_an_exception_or_a_right_answer(op):
    rng = Random(5)
    small = [case for case in op.domain.cases if all(v <= 130 for v in case.values() if isinstance(v, int))]
    calls = [op.example(case, dtype) for case in small for dtype in (torch.float32, torch.bfloat16)]
    for attempt in range(MALFORMED // len(REGISTRY)):
        try:
            args = malform(rng, op, rng.choice(calls))
            result = op.trial(args)
        except (TypeError, ValueError, NotImplementedError):
            continue
        except RuntimeError as error:  # torch's own words for what is no argument of any operator
            assert "metate" not in str(error) or "expected" in str(error), (args, error)
            continue
        # An lse of other scores makes probabilities of any size, of which no precision has a right sum.
        if isinstance(args[0], Tensor) and args[0].device.type == "cpu" and attempt % 5 == 0 and "lse" not in op.axes:
            op.assert_close(result, args)


def test_what_equals_a_number_is_still_checked():
    op = REGISTRY["lora_outer"]
    x, low = torch.ones(2, 8), torch.ones(2, 4)
    assert op(x, low, None, 1).shape == (1, 4, 8)
    for wrong in (True, 1.0):
        with pytest.raises(TypeError, match=r"metate.lora_outer: adapters is"):
            op(x, low, None, wrong)


def test_an_operator_without_kernels_warns_once(caplog, monkeypatch):
    """In a process of its own all would be so; here one is told that it has none."""
    op = REGISTRY["merge_attention_states"]
    monkeypatch.setattr(library, "load", lambda: {"cpu": library.Module(None, "not built: run `pip install .`")})
    monkeypatch.setitem(op._implementations, "cpu", {"reference": op.fallback})
    monkeypatch.setattr(op, "_direct", ())
    op.forget_plans()
    for case in op.domain.cases[1:4]:
        op(*op.example(case, torch.float32))
    op.forget_plans()
    (warned,) = caplog.messages
    assert warned == (
        "metate.merge_attention_states runs on its slow reference: cpu: not built: run `pip install .`; "
        "see `metate info`"
    )
    with metate.use("reference"):
        op(*op.example(op.domain.cases[1], torch.float32))
    assert len(caplog.messages) == 1, "who asks for it knows"


@pytest.mark.parametrize("op,device,backend", COMPILED)
def test_memory_is_given_back(op, device, backend):
    args = example(op, backend, device)

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * mmap.PAGESIZE

    for _ in range(200):
        run(op, backend, args)
    before = resident()
    for _ in range(3000):
        run(op, backend, args)
    assert resident() - before < 2 << 20


def test_importing_metate_imports_no_compiler():
    """Dynamo takes longer to import than metate and its kernels together; kernels hide from it when a graph is made."""
    program = """
import sys, torch, metate
assert "torch._dynamo" not in sys.modules
q = torch.randn(1, 4, 2, 8)
metate.attention(q, q, q)
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(lambda q: metate.attention(q, q, q), backend="eager", fullgraph=True)
assert torch.equal(compiled(q), metate.attention(q, q, q))
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
"""
    subprocess.run([sys.executable, "-c", program], check=True)
