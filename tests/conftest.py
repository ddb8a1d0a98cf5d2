"""What every test shares: names of operators and backends, and inputs in awkward memory."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Without a GPU its kernels still run: Triton's in its interpreter, which must be asked for before triton is imported,
# CUDA's in the emulator that `make native` builds.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import metate
from metate.op import REGISTRY, Op

# The processes of pytest-xdist share the cores: threads for which there is none spin and wait.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))

if not torch.cuda.is_available():
    for emulated in (Path(__file__).parent.parent / "build" / "kernels").glob("emulated*.so"):
        torch.ops.load_library(emulated)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = [pytest.param(op, id=op.name) for op in REGISTRY.values()]
BACKENDS = [
    pytest.param(op, device, backend, id=f"{op.name}-{device}-{backend}")
    for op in REGISTRY.values() for device in DEVICES for backend in op.implementations(device)
]  # fmt: skip
COMPILED = [
    pytest.param(op, device, backend, id=f"{op.name}-{device}-{backend}")
    for op in REGISTRY.values() for device in DEVICES for backend in op.implementations(device)
    if backend == device
]  # fmt: skip
SIMULATED = {("cpu", "triton"), ("cpu", "cuda")}  # an interpreter or an emulator: slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: one that begins last keeps a single processor busy."""
    first = "test_compiles_without_a_gpu", "test_threads_search_add_and_remove", "test_parity_of_lesser"
    items.sort(key=lambda item: not item.name.startswith(first))


@pytest.fixture(autouse=True)
def leave_a_broken_gpu() -> Iterator[None]:
    """After a fault of a kernel nothing runs in a process any more: pytest-xdist blames the test and starts another."""
    yield
    if processes and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{os.environ['PYTEST_CURRENT_TEST']}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same_bits(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)) for x, y in zip(outputs(a), outputs(b), strict=True)
    )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def examples(op: Op, backend: str, device: str, dtypes: list[torch.dtype], first: int = 0) -> Iterator[tuple[Any, ...]]:
    """(case, arguments) of every case and dtype the backend accepts."""
    for case in op.domain.cases[first:]:
        for dtype in dtypes:
            args = op.example(case, dtype, device)
            if op.refusal(backend, args) is None:
                yield case, args


def example(op: Op, backend: str, device: str) -> tuple[Any, ...]:
    """Arguments of an ordinary case: in float32, or where the backend has none of it (tensor cores) in bfloat16."""
    return next(args for _, args in examples(op, backend, device, [torch.float32, torch.bfloat16], first=1))


def run(op: Op, backend: str, args: tuple[Any, ...]) -> Any:
    with metate.use(backend):
        return op.trial(args)


@pytest.fixture(scope="session")
def gloo():
    """A device mesh of one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def damaged(data: bytes, random: np.random.Generator, head: int) -> bytes:
    """A file with bytes changed, another number or word, a stretch twice or missing, or an end cut off: more often than
    elsewhere in its first `head` bytes, which say what the others are."""
    at, what, found = (
        int(random.integers(head if random.random() < 0.6 else len(data))),
        random.random(),
        bytearray(data),
    )
    length = int(random.choice([1, 2, 4, 8]))
    if what < 0.4:
        for place in [at, *random.integers(len(data), size=int(random.integers(3))).tolist()]:
            found[place] ^= int(random.integers(1, 256))
    elif what < 0.6:
        number = int(random.choice([0, 1, 2**31, 2**62, 2**63 - 1])) >> int(random.integers(3))
        found[at : at + length] = number.to_bytes(8, "little")[:length]
    elif what < 0.7:
        found[at : at + 1] = str(random.choice(["-1", "0", str(2**62), str(2**64), "1e9", "[", "}", '"'])).encode()
    elif what < 0.8:
        found[at:at] = found[at : at + length]
    elif what < 0.9:
        del found[at : at + length]
    else:
        del found[at:]
    return bytes(found)


SLOW = 1.0  # seconds of a processor that a hostile file may take
ROOM = 64 << 20  # bytes that reading it may take beside twice its size


def survives(read: Callable[[], Any], what: Any) -> Any:
    """What is read, None where a FormatError refuses it; whatever else happens fails the test."""
    start = time.process_time()  # other processes may hold this one up
    try:
        return read()
    except metate.FormatError:
        return None
    except Exception as error:
        raise AssertionError(what) from error
    finally:
        assert time.process_time() - start < SLOW, what


@contextlib.contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """The peak of what is resident must not grow by more than ROOM and twice the size of the file."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before <= ROOM + 2 * size


def resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def overwrite(file: Path, data: bytes) -> None:
    """Without cutting to nothing first, at which file systems write out what was there."""
    with open(file, "r+b") as opened:
        opened.write(data)
        opened.truncate()
