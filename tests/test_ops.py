"""Every op, every backend, every case: values and what torch asks of an operator, all from the declarations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import BACKENDS, DEVICES, DTYPES, OPS, SIMULATED, examples, outputs, run, same_bits
from torch import Tensor

import metate
from metate import cli, library, verify
from metate.op import REGISTRY, Op

# Configurations an op and backend, the seed of the first, and seconds after which no more are drawn: see `make long`.
FUZZ = int(os.environ.get("METATE_TEST_FUZZ", "40"))
SEED = int(os.environ.get("METATE_TEST_SEED", "0"))
SECONDS = float(os.environ.get("METATE_TEST_SECONDS", "inf"))


def has_dtype(args: tuple[Any, ...], dtype: torch.dtype) -> bool:
    return any(isinstance(a, Tensor) and a.dtype == dtype for a in args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op,device,backend", BACKENDS)
def test_parity(op, device, backend, dtype):
    if dtype != torch.float32 and not has_dtype(op.example(op.domain.cases[1], dtype, device), dtype):
        pytest.skip(f"takes no {dtype}: its inputs are those of float32")
    if (device, backend) == ("cpu", "triton") and dtype in (torch.bfloat16, torch.float16) and FUZZ <= 40:
        pytest.skip("Triton's interpreter is slow: test_fuzz draws these dtypes, the long target runs all cases")
    ran = 0
    for _, args in examples(op, backend, device, [dtype]):
        op.assert_close(run(op, backend, args), args)
        ran += 1
    if not ran:
        assert op.refusal(backend, op.example(op.domain.cases[0], dtype, device)), "no case reaches this backend"
        pytest.skip(f"{backend} refuses {dtype}")


@pytest.mark.parametrize("isa", library.isas()[1:])
def test_parity_of_lesser_instruction_sets(isa):
    """All that test_parity calls of the CPU's kernels, once more; a process reads METATE_ISA once."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**alone, "METATE_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metate", "verify", "--backend", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "none wrong" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("op,device,backend", BACKENDS)
def test_fuzz(op, device, backend, request):
    """What `metate verify --fuzz` draws, on backends too that only the tests simulate."""
    failures, end = [], time.monotonic() + SECONDS
    count = -(-FUZZ // 6) if (device, backend) in SIMULATED else FUZZ
    for check in verify.fuzz([op], cli.DTYPES.values(), [(device, backend)], count, SEED):
        result = verify.run(check)
        if result.status == "failed":
            again = f'METATE_TEST_FUZZ=1 METATE_TEST_SEED={check.number} python -m pytest "{request.node.nodeid}"'
            failures.append(f"{again}\n  {check.dtype}, {check.case()}: {result.detail}")
        if time.monotonic() > end:
            break
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("op", OPS)
def test_declaration_is_complete(op):
    """What the dataclass cannot demand: rules registered with torch, and cases that reach the edges."""
    name = f"metate::{op.name}"
    for key in ("AutocastCPU", "AutocastCUDA", "FuncTorchBatched", "Autograd", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{op.name} has no {key} rule"
    for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):  # where there is no kernel, the reference
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), f"{op.name} does not run on {key}"
    cases = op.domain.cases
    assert any(0 in case.values() for case in cases), "no case of size zero"
    assert any(isinstance(v, int) and v > 1 and v % 2 for case in cases for v in case.values()), "no odd size"
    assert op.domain.sweep and all(op.flops(case) > 0 for case in op.domain.sweep), "no cost"
    assert op.sharding(op, op.example(cases[1], torch.float32)), "no sharding rule"
    told = " ".join(map(op.shape_of, op.axes))
    assert not re.search(r"\b([A-LN-Z]|[A-Z][a-z]{1,2})\b", told), f"errors would tell of letters: {told}"  # M: of PQ


@pytest.mark.parametrize("op", OPS)
def test_cost_of_a_call_is_that_of_its_case(op):
    """What FlopCounterMode counts. Cases say neither how long paged sequences are nor which choices no expert takes."""
    for case in op.domain.sweep[:1] if op.name == "paged_attention" else op.domain.cases:
        if case.get("skew") != "none" or op.family != "moe":
            assert op.cost(op.example(case, torch.float32)) == round(op.flops(case)), case


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    """Everything, with gradients, in as few cases as it takes to give each argument that may have one its turn."""
    calls = [op.example(case, torch.float32) for case in op.domain.cases]
    # torch does not compare float8
    calls = [args for args in calls if not has_dtype(args, torch.float8_e4m3fn)]
    left = set().union(*(traceable(op, args) for args in calls))
    while left:
        widest = max(range(len(calls)), key=lambda i: len(traceable(op, calls[i]) & left))
        args = calls.pop(widest)
        left -= traceable(op, args)
        torch.library.opcheck(op.torch_op, args if op.gradient else differentiable(args))
    for args in calls:
        torch.library.opcheck(op.torch_op, args, test_utils=("test_schema", "test_faketensor"))


def traceable(op: Op, args: tuple[Any, ...]) -> set[str]:
    """The floating-point arguments of a call that has elements."""
    tensors = {name: a for name, a in zip(op.parameters, args, strict=True) if isinstance(a, Tensor)}
    if any(not a.numel() for a in tensors.values()):
        return set()
    return {name for name, a in tensors.items() if a.is_floating_point()}


def differentiable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def finite(op: Op, args: tuple[Any, ...]) -> Any:
    """The finite entries of every output: -inf of an empty row has no finite difference."""
    results = tuple(r for r in outputs(op.torch_op(*args)) if r.numel())
    return tuple(torch.where(r.isfinite(), r, 0).clone(memory_format=torch.contiguous_format) for r in results)


GRADIENTS = [pytest.param(op, id=op.name) for op in REGISTRY.values() if op.gradient is None]


@pytest.mark.parametrize("op", GRADIENTS)
def test_gradcheck(op):
    for case in op.domain.cases:
        args = differentiable(op.example(case, torch.float64))
        if any(a.numel() for a in args if isinstance(a, Tensor)):
            tensors = args[: op.arity]
            with metate.use("reference"):
                torch.autograd.gradcheck(
                    lambda *a, rest=args[op.arity :]: finite(op, (*a, *rest)), tensors, fast_mode=True
                )


@pytest.mark.parametrize("op", GRADIENTS)
def test_gradgradcheck(op):
    for case in op.domain.cases[1:10]:
        if 0 in case.values():
            continue
        args = differentiable(op.example(case, torch.float64))
        with metate.use("reference"):
            torch.autograd.gradgradcheck(
                lambda *a, rest=args[op.arity :]: finite(op, (*a, *rest)), args[: op.arity], fast_mode=True, atol=1e-4
            )


def transformable(op: Op) -> tuple[Any, list[Tensor]]:
    """A loss of the floating-point arguments of a call, and these."""
    args = op.example(op.domain.cases[1], torch.float64)
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]

    def loss(*leaves: Tensor) -> Tensor:
        given = dict(zip(at, leaves, strict=True))
        results = outputs(op(*(given.get(i, a) for i, a in enumerate(args))))
        results = [r.where(r.isfinite(), 0) for r in results if r.is_floating_point()]
        return sum((r * r.detach().cos()).sum() for r in results)  # type: ignore[return-value]

    return loss, [args[i].clone() for i in at]


def gradients(loss: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("op", GRADIENTS)
def test_transformed_gradients_equal_those_of_autograd(op):
    loss, leaves = transformable(op)
    expected = gradients(loss, leaves)
    grad = torch.func.grad(loss, tuple(range(len(leaves))))
    torch.testing.assert_close(grad(*leaves), expected)
    stacked = [torch.stack([x, x]) for x in leaves]
    torch.testing.assert_close(torch.vmap(grad)(*stacked), tuple(torch.stack([x, x]) for x in expected))


@pytest.mark.parametrize("op", GRADIENTS)
def test_second_transformed_gradients_equal_those_of_autograd(op):
    """A level of torch.func's transforms on another: what the inner records, the outer must see."""
    loss, leaves = transformable(op)
    at = tuple(range(len(leaves)))

    def along(gradient: tuple[Tensor, ...], leaves: Any) -> Tensor:
        return sum((g * x).sum() for g, x in zip(gradient, leaves, strict=True))  # type: ignore[return-value]

    def outer(*leaves: Tensor) -> Tensor:
        options = dict(create_graph=True, allow_unused=True, materialize_grads=True)
        return along(torch.autograd.grad(loss(*leaves), leaves, **options), leaves)

    got = torch.func.grad(lambda *leaves: along(torch.func.grad(loss, at)(*leaves), leaves), at)(*leaves)
    torch.testing.assert_close(got, gradients(outer, leaves))


def has_numbers(op: Op) -> bool:
    """Torch itself never asks for a gradient of outputs that are all whole numbers."""
    return any(isinstance(kind, str) or kind.is_floating_point for kind in op.outputs.values())


REFUSED = [pytest.param(op, id=op.name) for op in REGISTRY.values() if op.gradient and has_numbers(op)]


@pytest.mark.parametrize("op", REFUSED)
def test_refused_gradient_raises(op):
    args = op.example(op.domain.cases[1], torch.float32)
    with pytest.raises(NotImplementedError, match=f"metate.{op.public}: no gradient"):
        outputs(op.torch_op(*differentiable(args)))[0].sum().backward()
    if op.writes:
        with torch.no_grad():
            assert same_bits(op.trial(differentiable(args)), op.trial(args))


def resized(op: Op, case: dict[str, Any], by: int) -> dict[str, Any]:
    return {name: value + by if name in op.domain.dynamic else value for name, value in case.items()}


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph_for_all_sizes(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    scalars = op.example(op.domain.cases[1], torch.float32)[op.arity :]
    compiled = torch.compile(lambda *tensors: op(*tensors, *scalars), backend=counter, fullgraph=True, dynamic=True)
    first = None
    for by in range(10):
        args = op.example(resized(op, op.domain.cases[1], 3 + by), torch.float32, seed=by)
        expected = op.trial(args)
        got = compiled(*args[: op.arity])
        assert same_bits(tuple(op.written(args)) if op.writes else got, expected)
        first = first or counter.frame_count
    assert counter.frame_count == first, f"{counter.frame_count - first} recompilations for 10 sizes"


@pytest.mark.parametrize("op", OPS)
def test_the_backend_of_a_compiled_call(op, monkeypatch):
    torch._dynamo.reset()
    args = op.example(op.domain.cases[1], torch.float32)
    with metate.use("reference"):
        expected = op.trial(args)
    ran, reference = [], op.implementations("cpu")["reference"]
    monkeypatch.setitem(op.implementations("cpu"), "reference", lambda *args: (ran.append(0), reference(*args))[1])
    op.forget_plans()

    def on_reference(*tensors):
        with metate.use("reference"):
            return op(*tensors, *args[op.arity :])

    got = torch.compile(on_reference, backend="eager", fullgraph=True)(*args[: op.arity])
    op.forget_plans()
    assert ran and same_bits(tuple(op.written(args)) if op.writes else got, expected)


FIRST = [p for p in GRADIENTS if not p.id.endswith("_backward")]  # second derivatives do not compile in torch


@pytest.mark.parametrize("op", FIRST)
def test_compiled_gradients_equal_eager(op):
    torch._dynamo.reset()

    def loss(*args: Any) -> Tensor:
        return sum((r.float() * r.float().detach().cos()).sum() for r in outputs(op(*args)))  # type: ignore[return-value]

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        args = op.example(op.domain.cases[1], torch.float32)
        leaves = tuple(
            a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        function(*leaves).backward()
        gradients.append(tuple(a.grad for a in leaves if isinstance(a, Tensor) and a.grad is not None))
    assert gradients[0] and same_bits(*gradients)


@pytest.mark.parametrize("op", FIRST)
def test_compiled_transforms_equal_autograd(op):
    torch._dynamo.reset()
    loss, leaves = transformable(op)
    grad = torch.func.grad(loss, tuple(range(len(leaves))))
    got = torch.compile(grad, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, gradients(loss, leaves))


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    """They have no contents to look at: what a model would take is found out with them."""
    for case in op.domain.cases[:3]:
        args = op.example(case, torch.float32)
        results = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        if not op.writes:
            for result, shape in zip(outputs(results), op.shapes(*args), strict=True):
                assert result.device.type == "meta" and result.shape == torch.Size(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_autocast_is_a_cast_of_the_activations(op, dtype):
    args = op.example(op.domain.cases[1], torch.float32)
    stored = dict(zip(op.parameters, args, strict=True)).get(op.storage)
    to = dtype if stored is None or not stored.is_floating_point() else stored.dtype
    cast = tuple(
        a.to(to) if name in op.autocast and isinstance(a, Tensor) else a
        for name, a in zip(op.parameters, args, strict=True)
    )
    with torch.autocast("cpu", dtype):
        got = op.trial(args)
    assert same_bits(got, op.trial(cast))


@pytest.mark.parametrize("op", OPS)
def test_vmap_equals_a_loop(op):
    if op.writes:
        args = op.example(op.domain.cases[1], torch.float32)
        with pytest.raises(NotImplementedError, match=f"metate.{op.name}: no vmap: "):
            torch.vmap(lambda x: op.torch_op(x, *args[1:]))(args[0][None])
        return
    for case in op.domain.cases[1:12]:
        calls = [op.example(case, torch.float64, seed=seed) for seed in range(3)]
        floats = [isinstance(a, Tensor) and a.is_floating_point() for a in calls[0]]
        mapped = floats if any(floats) else [isinstance(a, Tensor) for a in calls[0]]
        stacked = [torch.stack([c[i] for c in calls]) if m else calls[0][i] for i, m in enumerate(mapped)]
        calls = [tuple(c[i] if m else calls[0][i] for i, m in enumerate(mapped)) for c in calls]
        got = torch.vmap(op.torch_op, in_dims=tuple(0 if m else None for m in mapped), randomness="different")(*stacked)
        for g, *rows in zip(outputs(got), *(outputs(op(*c)) for c in calls), strict=True):
            torch.testing.assert_close(g, torch.stack(rows), rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_shards_without_communication(op, gloo):
    """DTensor splits the op as its rule says and gets what one process gets."""
    from metate.parallel import distribute

    args = op.example(op.domain.cases[1], torch.float32)
    for _, inputs in op.sharding(op, args):
        shared = distribute(op, args, inputs, gloo)
        expected = op.trial(args)
        got = op.torch_op(*shared)
        for g, e in zip(op.written(shared) if op.writes else outputs(got), outputs(expected), strict=True):
            torch.testing.assert_close(g.full_tensor(), e)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_public_errors_name_the_argument(op, device):
    args = list(op.example(op.domain.cases[1], torch.float32, device))
    first = op.parameters[0]
    for wrong, error in ((3, TypeError), (args[0].to(torch.int8), TypeError), (args[0][0], ValueError)):
        with pytest.raises(error, match=rf"metate.{op.public}: {first} is .*expected"):
            op(wrong, *args[1:])


@pytest.mark.parametrize("cuda,capability", [("13.0", (7, 5)), (None, (9, 4)), ("13.0", (8, 0)), ("13.0", (12, 0))])
def test_cuda_kernels_refuse_gpus_for_which_there_are_none(cuda, capability, monkeypatch):
    monkeypatch.setattr(library, "report", lambda: {"archs": "80;90a"})
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = library.refused_gpu.__wrapped__(0)
    assert (reason is None) == (cuda is not None and capability >= (8, 0)), reason


def test_explain_says_why():
    q = torch.randn(1, 4, 2, 8)
    assert metate.supports(metate.attention, q, q, q)
    assert not metate.supports(metate.attention, q, q, q[..., :0])
    assert not metate.supports(torch.reshape, q, (3,)), "an error that is not ours"
    explanation = metate.explain(metate.attention, q, q, q)
    assert explanation.backend and set(explanation.refusals) < {"cpu", "cuda", "triton", "reference"}
    with metate.use("reference"):
        assert metate.explain(metate.attention, q, q, q).backend == "reference"


def test_explain_says_what_is_not_built(monkeypatch):
    op, q = REGISTRY["attention"], torch.randn(1, 4, 2, 8)
    monkeypatch.setattr(op, "_implementations", {"cpu": {"reference": op.fallback}})
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.setattr(op, "_direct", ())
    monkeypatch.setattr(library, "load", lambda: {"cpu": library.Module(None, "not built: run `pip install .`")})
    explanation = metate.explain(metate.attention, q, q, q)
    assert explanation.backend == "reference" and explanation.refusals["cpu"] == "not built: run `pip install .`"
    assert "not available for cpu tensors" in explanation.refusals["triton"]
    with pytest.raises(NotImplementedError, match=r"runs this call .cpu: not built: run `pip install"):
        metate.attention(q, q, q, backend="cpu")


def test_use_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"metate.use: backend is 'gpu', expected 'cpu'"), metate.use("gpu"):
        pass
