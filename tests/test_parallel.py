"""Experts over 2 and 4 processes against one: values, gradients, no tokens, low-bit weights, adapters."""

import multiprocessing
import tempfile
import time

import pytest
import torch
from torch import nn

import metate
from metate.nn import LoraGroupedLinear, MoE

EXPERTS, HIDDEN = 7, 16
TOKENS = {2: (9, 0), 4: (5, 0, 1, 8)}
KINDS = ("dense", "nf4 with adapters", "shared, none to the last")


def mixture(kind):
    torch.manual_seed(0)
    shared = kind.startswith("shared")
    moe = MoE(HIDDEN, 24, EXPERTS, 3, bias=True, shared_size=8 * shared, shared_gate=shared, router_bias=shared)
    if shared:  # a process that no row comes to
        with torch.no_grad():
            moe.router.bias[-2:] = -1e9
    if kind.startswith("nf4"):
        metate.quantize_model(moe, "nf4")
        for name in ("gate_up", "down"):
            adapted = LoraGroupedLinear(getattr(moe.experts, name), 4)
            nn.init.normal_(adapted.lora_B)
            setattr(moe.experts, name, adapted)
    return moe


def tokens(size):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, HIDDEN, generator=generator) for count in TOKENS[size]]


def step(moe, x):
    """Output, gradient of the input, gradients of the parameters."""
    x = x.clone().requires_grad_()
    y = moe(x)
    (y * torch.linspace(-1, 1, HIDDEN)).square().sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in moe.named_parameters() if p.grad is not None}


def work(rank, folder):
    """Of one of 4 processes: all of them together, then two pairs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from metate.parallel import ExpertParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "pair"))
    whole = init_device_mesh("cpu", (4,))
    found = {}
    for kind in KINDS:
        for size, group in ((4, whole), (2, mesh["pair"])):
            moe = parallelize_module(mixture(kind), group, ExpertParallel())
            y, dx, grads = step(moe, tokens(size)[group.get_local_rank()])
            found[kind, size] = y, dx, grads, moe.experts.bounds
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metate.parallel"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=work, args=(rank, folder)) for rank in range(4)]
        deadline = time.monotonic() + 120
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * 4
        yield [torch.load(f"{folder}/{rank}") for rank in range(4)]


@pytest.mark.parametrize("size", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(results, kind, size):
    truth = mixture(kind)
    parts = tokens(size)
    y, dx, grads = step(truth, torch.cat(parts))
    got = [found[kind, size] for found in results[:size]]
    torch.testing.assert_close(torch.cat([g[0] for g in got]), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([g[1] for g in got]), dx, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        if name.startswith("experts."):
            parallel = torch.cat([g[2][name] for g in got])
        else:
            parallel = sum(g[2][name] for g in got if name in g[2])
        torch.testing.assert_close(parallel, grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
