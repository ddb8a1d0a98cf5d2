"""What the generated matrix cannot say of the Triton kernels: they compile for GPUs that this machine does not have,
dropout does not depend on the tile shape, and NaN stays where it may be seen. Run as a script, this file compiles for
one compute capability."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metate.ops.attention import reference

triton = pytest.importorskip("triton")


class Launcher:
    def __init__(self, *args: Any) -> None: ...

    def __call__(self, *args: Any) -> None: ...


class Driver:
    """What Triton needs to believe in a GPU: launching compiles, and nothing runs."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launcher_cls, self.utils = capability, Launcher, self

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        memory = {80: 163, 90: 227}[self.capability] * 1024
        return {"max_shared_mem": memory, "max_num_regs": 65536, "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        stack, local = (int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL"))
        print(json.dumps({"kernel": name, "shared": shared, "spilled": stack + local}), flush=True)
        return 0, 0, 0, 0, 1024

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: (call(), [1.0] * 3)[1]


def compile_attention(capability: int, everything: bool) -> None:
    """Launches every kernel of the family once, with the first tile shape of its class."""
    import metate.kernels.attention as kernels

    triton.runtime.driver.set_active(Driver(capability))
    for kernel in vars(kernels).values():
        if isinstance(kernel, triton.runtime.autotuner.Autotuner):
            kernel.early_config_prune = lambda *args, fitting=kernel.early_config_prune, **named: fitting(
                *args, **named
            )[:1]

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = torch.float16 if everything else torch.bfloat16
    batch, tokens, heads, dim = 2, 256, 4, 40 if everything else 64
    q, k, lse = (
        tensor(batch, tokens, heads, dim, dtype=dtype),
        tensor(batch, tokens, 2, dim, dtype=dtype),
        tensor(batch, heads, tokens),
    )
    terms: list[Any] = [None] * 2
    masks: list[Any] = [None] * 5
    if everything:
        terms = [tensor(1, heads, tokens, tokens), tensor(heads)]
        words = tensor(1, 1, tokens, tokens // 32, dtype=torch.int32)
        masks = [
            tensor(batch, 1, tokens, 2, dtype=torch.int32),
            tensor(1, 1, 2, 2, dtype=torch.uint8),
            words,
            None,
            None,
        ]
    scores = (dim**-0.5, -1, 0, False, 30.0 if everything else 0.0)
    noise = (0.1 if everything else 0.0, 1, 2)
    kernels.attention(q, k, k, *terms, tensor(heads) if everything else None, *masks, *scores, *noise, 128, 128)
    kernels.attention_backward(q, q, k, k, lse, lse, *terms, *masks, *scores, *noise, 128, 128, everything, everything)
    kernels.attention_column_sums(q, k, lse, *terms, *masks, *scores, 128, 128)
    kernels.merge_attention_states(tensor(3, *q.shape, dtype=dtype), tensor(3, *lse.shape))


@pytest.mark.parametrize("capability,everything", [(80, True), (90, False)], ids=["sm_80-everything", "sm_90-plain"])
def test_compiles_without_a_gpu(capability, everything, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), str(int(everything))]
    result = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    built = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    names = {"forward_kernel", "keys_kernel", "queries_kernel", "columns_kernel", "merge_kernel"}
    names |= {"bias_kernel", "slopes_kernel"} if everything else set()
    assert {kernel["kernel"] for kernel in built} == names
    if not everything:
        assert not [kernel for kernel in built if kernel["spilled"]]


@pytest.fixture
def kernels():
    """The kernels, where something runs them: a GPU, or the interpreter."""
    from metate.kernels import attention
    from metate.kernels.attention.configs import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not set")
    return attention


def causal_problem(dropout_p: float) -> tuple[list[Tensor], list[Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 70, 1, 16, generator=generator).to(device) for _ in range(4))
    return [q, k, v, grad], [*[None] * 5, 0.25, -1, 0, False, 0.0, dropout_p, 3, 4, 1, 1]


def forward_and_backward(kernels: Any, dropout_p: float, spoil: int | None = None) -> list[Tensor]:
    (q, k, v, grad), rest = causal_problem(dropout_p)
    if spoil is not None:
        for x in (q, k, v, grad):
            x[:, spoil] = torch.nan
    out, lse = kernels.attention(q, k, v, None, None, None, *rest)
    delta = (out * grad).sum(-1).transpose(1, 2)
    return [out, *kernels.attention_backward(grad, q, k, v, lse, delta, None, None, *rest, False, False)[:3]]


def test_dropout_does_not_depend_on_the_tile(kernels, monkeypatch):
    """Tiles of 64 keys share a Philox call among four keys, narrower ones do not."""
    wide = forward_and_backward(kernels, 0.4)
    for kernel in (kernels.forward_kernel, kernels.keys_kernel, kernels.queries_kernel):
        monkeypatch.setattr(kernel, "configs", [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4)])
    for a, b in zip(wide, forward_and_backward(kernels, 0.4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_reaches_only_who_may_see_it(kernels):
    clean, spoilt = forward_and_backward(kernels, 0.0), forward_and_backward(kernels, 0.0, spoil=40)
    for name, a, b in zip(("out", "dq"), clean[:2], spoilt[:2], strict=True):
        assert torch.equal(a[:, :40], b[:, :40]), f"{name}: a masked NaN came through"
        assert b[:, 40:].isnan().all(), f"{name}: NaN was hidden"
    for name, gradient in zip(("dk", "dv"), spoilt[2:], strict=True):
        assert gradient[:, :41].isnan().all(), f"{name}: NaN was hidden"


def row_by_row(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """out, dq, dk, dv of causal attention with the lse and delta between: each row alone with the keys that it sees."""
    total = [torch.zeros_like(x) for x in (v, q, k, v)]
    lse, delta = torch.empty(2, 1, 1, q.shape[1])
    rest = [*[None] * 7, 0.25, -1, -1, False, 0.0, 0.0, 0, 0, 1, 1]
    for i in range(q.shape[1]):
        row, seen = slice(i, i + 1), slice(i + 1)
        out, lse[..., row] = reference.attention(q[:, row], k[:, seen], v[:, seen], None, *rest)
        delta[..., row] = (out * grad[:, row]).sum(-1).transpose(1, 2)
        gradients = reference.attention_backward(
            grad[:, row], q[:, row], k[:, seen], v[:, seen], lse[..., row], delta[..., row], *rest, False, False
        )
        for whole, part, at in zip(total, (out, *gradients[:3]), (row, row, seen, seen), strict=True):
            whole[:, at] += part
    return total, lse, delta


@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad"])
def test_one_element_spoils_what_it_is_multiplied_with(kernels, spoilt):
    """Tiles that a mask cuts through hold the same infinities and NaN as a sum over the visible pairs alone."""
    (q, k, v, grad), rest = causal_problem(0.0)
    tensor = dict(q=q, k=k, v=v, grad=grad)[spoilt]
    tensor[0, 40, 0, 3], tensor[0, 50, 0, 3], tensor[0, 60, 0, 5] = torch.inf, -torch.inf, torch.nan
    expected, lse, delta = row_by_row(*(x.cpu() for x in (q, k, v, grad)))
    out, _ = kernels.attention(q, k, v, None, None, None, *rest)
    saved = (x.to(q.device) for x in (lse, delta))
    got = [out, *kernels.attention_backward(grad, q, k, v, *saved, None, None, *rest, False, False)[:3]]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(
            a.cpu(), b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


if __name__ == "__main__":
    compile_attention(int(sys.argv[1]), bool(int(sys.argv[2])))
