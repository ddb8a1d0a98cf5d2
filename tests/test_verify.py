"""The engine of `metate verify`: what it draws it draws again, and it sees what is wrong."""

import shlex
from collections import Counter
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from metate import verify
from metate.cli import app
from metate.op import REGISTRY
from metate.verify import Check

MERGE = REGISTRY["merge_attention_states"]
HERE = [("cpu", "reference")]


def reference(*args):
    return MERGE.fallback(*(a.contiguous() for a in args))


def wrong(*args):
    out, lse = reference(*args)
    return out * 1.001, lse


def reads_between(*args):
    """Like a kernel that takes its inputs to be contiguous."""
    return MERGE.fallback(*(torch.as_strided(a, a.shape, torch.empty(a.shape).stride()) for a in args))


def rounds_by_layout(*args):
    out, lse = reference(*args)
    return (out if args[0].is_contiguous() else torch.nextafter(out, out + 1)), lse


@pytest.fixture
def backend(monkeypatch):
    """Gives the CPU backend of merge_attention_states another body for one test."""

    def install(function):
        MERGE.implementations("cpu")
        monkeypatch.setitem(MERGE._implementations["cpu"], "cpu", function)
        MERGE.forget_plans()

    yield install
    MERGE.forget_plans()


def test_every_case_and_dtype_is_checked():
    checks = list(verify.parity(REGISTRY.values(), [torch.float32, torch.float64], HERE))
    times = Counter((check.op, check.dtype) for check in checks)
    assert all(count == len(op.domain.cases) for (op, _), count in times.items())
    assert {op for op, dtype in times if dtype == torch.float32} == set(REGISTRY.values())
    assert {dtype for op, dtype in times if op is MERGE} == {torch.float32, torch.float64}


def test_fuzz_gives_every_operator_as_many_configurations_as_asked_for():
    checks = list(verify.fuzz(REGISTRY.values(), [torch.float32, torch.bfloat16], HERE, 9, 100))
    assert len(checks) == 9 * len(REGISTRY)
    assert {check.number for check in checks if check.op is MERGE} == set(range(100, 109))


def test_a_seed_draws_the_same_call_again():
    def inputs(seed):
        check = Check(REGISTRY["attention"], "cpu", "reference", torch.float32, seed, drawn=True)
        tensors = [a for a in check.inputs() if isinstance(a, torch.Tensor)]
        return [(a.shape, a.stride(), a.storage_offset(), a.sum().item()) for a in tensors]

    for seed in range(20):
        assert str(inputs(seed)) == str(inputs(seed))
    assert len({str(inputs(seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("seed", range(30))
def test_scattered_tensors_keep_their_values_and_hide_nan(seed):
    x = torch.randn(3, 4, 5)
    y = verify.scatter(x, Random(seed))
    assert torch.equal(x, y)
    gaps = y.untyped_storage().nbytes() // 4 - x.numel()
    storage = torch.empty(0).set_(y.untyped_storage())
    assert storage.isnan().sum() == gaps
    whole = verify.scatter(torch.arange(6, dtype=torch.int32).view(2, 3), Random(seed))
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert verify.scatter(torch.ones(2, 0), Random(seed)).shape == (2, 0)


def test_the_right_kernel_passes(backend):
    backend(reference)
    for seed in range(5):
        assert verify.run(Check(MERGE, "cpu", "cpu", torch.float32, seed, drawn=True)).status == "passed"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(wrong, "out, lse are off by"), (reads_between, "finite where|off by"), (rounds_by_layout, "differs in|off by")],
)
def test_a_wrong_kernel_is_found_and_its_reproduction_reproduces(backend, kernel, message):
    backend(kernel)
    results = [verify.run(Check(MERGE, "cpu", "cpu", torch.float32, seed, drawn=True)) for seed in range(12)]
    failed = next(result for result in results if result.status == "failed")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failed.detail)
    command = shlex.split(failed.check.reproduction)
    assert command[0] == "metate"
    again = CliRunner().invoke(app, command[1:])
    assert again.exit_code == 1, again.output
    assert failed.check.reproduction in again.output.replace("\n", " ")
    backend(reference)
    assert CliRunner().invoke(app, command[1:]).exit_code == 0


def test_an_exception_is_a_failure(backend):
    def breaks(*args):
        raise RuntimeError("no memory")

    backend(breaks)
    result = verify.run(Check(MERGE, "cpu", "cpu", torch.float32, 1, drawn=False))
    assert (result.status, result.detail) == ("failed", "RuntimeError: no memory")


def test_a_refusal_is_not_a_failure(backend, monkeypatch):
    backend(wrong)
    monkeypatch.setitem(MERGE.__dict__, "refuses", {"cpu": lambda *args: "not today"})
    result = verify.run(Check(MERGE, "cpu", "cpu", torch.float32, 1, drawn=False))
    assert (result.status, result.detail) == ("refused", "not today")
