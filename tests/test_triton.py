"""What the generated matrix cannot say of the Triton kernels: they compile for GPUs that this machine does not have,
dropout does not depend on the tile shape nor a sum on the number of rows, and NaN stays where it may be seen. Run as a
script, this file compiles for one compute capability."""

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


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def take_first_shape(kernels: Any) -> Any:
    """A family whose kernels are compiled once, with the first tile shape of their class."""
    for kernel in vars(kernels).values():
        if isinstance(kernel, triton.runtime.autotuner.Autotuner):
            kernel.early_config_prune = lambda *args, fitting=kernel.early_config_prune, **named: fitting(
                *args, **named
            )[:1]
    return kernels


def compile_attention(everything: bool) -> None:
    from metate.kernels import attention

    kernels = take_first_shape(attention)
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
    sinks = tensor(heads) if everything else None
    kernels.attention(q, k, k, *terms, sinks, *masks, *scores, *noise, 128, 128)
    kernels.attention_delta(q, q, lse if everything else None)
    gradients = *terms, sinks, *masks, *scores, *noise, 128, 128, False, everything, everything
    kernels.attention_backward(q, q, k, k, lse, lse, *gradients)
    kernels.attention_column_sums(q, k, lse, *terms, sinks, *masks, *scores, 128, 128)
    kernels.merge_attention_states(tensor(3, *q.shape, dtype=dtype), tensor(3, *lse.shape))


def compile_quant_linear(everything: bool) -> None:
    from metate.kernels import quant_linear

    kernels = take_first_shape(quant_linear)

    def weight(
        N: int, K: int, bits: int, group: int, form: str, two_level: bool = False
    ) -> tuple[list[Any], list[int]]:
        groups = -(-K // group)
        level = tensor(N, groups, dtype=torch.int8 if two_level else torch.float32)
        coarse = tensor(N, -(-groups // 8)) if two_level else None
        zeros = tensor(N, groups, dtype=torch.uint8) if form == "zeros" else None
        offsets = (level, coarse) if form == "offsets" else (None, None)
        codebook = tensor(2**bits) if form == "codebook" else None
        codes = tensor(N, -(-K * bits // 8), dtype=torch.uint8)
        return [codes, level, coarse, zeros, *offsets, codebook], [bits, group, 8 if two_level else 0, 0]

    if not everything:
        for rows in (1, 512):
            for form in (weight(4096, 4096, 4, 64, "codebook"), weight(4096, 4096, 4, 128, "zeros")):
                x = tensor(rows, 4096, dtype=torch.bfloat16)
                kernels.quant_linear(x, *form[0], None, None, *form[1])
                kernels.quant_matmul(x, *form[0], None, *form[1], 4096)
        return
    order = tensor(1000, dtype=torch.int32)
    for rows, form in ((1, weight(3000, 1000, 4, 32, "offsets", True)), (200, weight(3000, 1000, 3, 128, "zeros"))):
        half, single = (tensor(rows, 1000, dtype=dtype) for dtype in (torch.float16, torch.float32))
        kernels.quant_linear(half, *form[0], order, tensor(3000), *form[1])
        kernels.quant_linear_int8(single, *form[0], order, tensor(3000), *form[1])
        kernels.quant_matmul(tensor(rows, 3000, dtype=torch.float16), *form[0], order, *form[1], 1000)


def compile_paged_attention(everything: bool) -> None:
    from metate.kernels import paged_attention

    take_first_shape(paged_attention.attend)
    batch, pages, page_size, kv_heads = 4, 64, 16, 2
    int32 = {"dtype": torch.int32}
    table, lens, slots = tensor(batch, pages, **int32), tensor(batch, **int32), tensor(30, dtype=torch.int64)
    half = torch.float16 if everything else torch.bfloat16
    kinds = [torch.int8, torch.float8_e4m3fn] if everything else [half, torch.uint8]
    for dim, tokens in ((40, 30),) if everything else ((64, 1), (128, 32)):
        for kind in kinds:
            cache = tensor(99, page_size, kv_heads, dim // 2 if kind == torch.uint8 else dim, dtype=kind)
            scale = None if kind == half else tensor(99, page_size, kv_heads)
            terms: list[Any] = [None] * 6
            scores: list[Any] = [0.1, -1, 0, 0.0, False]
            q = tensor(batch, tokens, 8, dim, dtype=half)
            if everything:
                q = tensor(1, tokens, 8, dim, dtype=half)
                terms = [tensor(batch + 1, **int32), lens, tensor(batch, 8), tensor(1, 8, tokens)]
                terms += [tensor(1, tokens, 1, **int32), tensor(1, tokens, **int32)]
                scores = [0.1, 100, 0, 30.0, True]
            paged_attention.paged_attention(q, cache, cache, table, lens, scale, scale, *terms, *scores)
            k, angles = tensor(30, kv_heads, dim, dtype=half), tensor(100, dim // 2)
            rotation = [angles, angles, slots, True] if everything else [None, None, None, False]
            paged_attention.append_kv(k, k, cache, cache, slots, scale, scale, *rotation)


def compile_moe(everything: bool) -> None:
    from metate.kernels import moe

    take_first_shape(moe)
    half = torch.float16 if everything else torch.bfloat16
    int32 = {"dtype": torch.int32}
    tokens, k, experts, width = 64, 4, 32, 1000 if everything else 1024
    offsets, order, numbers = tensor(experts + 1, **int32), tensor(tokens * k, **int32), tensor(tokens, k, **int32)
    x, rows = tensor(tokens, width, dtype=half), tensor(tokens * k, width, dtype=half)
    score = (2, 4, 2, 1, True, 2.5) if everything else (0, 1, 1, 0, False, 1.0)
    logits, weights = tensor(tokens, experts), tensor(tokens, k)
    moe.moe_topk(logits, tensor(experts) if everything else None, k, *score)
    moe.moe_topk_backward(weights, logits, numbers, score[0], *score[-2:])
    moe.moe_sort(numbers, experts)
    moe.moe_permute(x, order, k)
    moe.moe_unpermute(rows, numbers, weights)
    moe.moe_unpermute_backward(x, rows, numbers, weights)
    activation = (2, 2, 7.0, 1.702, 1.0) if everything else (0, 0, float("inf"), 1.0, 0.0)
    moe.gated_activation(rows, *activation)
    moe.gated_activation_backward(rows[:, : width // 2], rows, *activation)
    w, bias = tensor(experts, 512, width, dtype=half), tensor(experts, 512)
    moe.grouped_linear(x, w, offsets, bias, order, k)
    moe.grouped_outer(tensor(tokens * k, 512, dtype=half), x, offsets, order, k)
    codes, levels = tensor(experts, 512, width // 2, dtype=torch.uint8), tensor(experts, 512, -(-width // 64))
    weight: list[Any] = [codes, levels, None, None, None, None, tensor(16)]
    permutation = tensor(experts, width, **int32) if everything else None
    moe.quant_grouped_linear(x, *weight, permutation, None, offsets, order, 4, 64, 0, 0, k)
    moe.quant_grouped_linear_int8(x, *weight, None, None, offsets, order, 4, 64, 0, 0, k)
    moe.quant_grouped_matmul(tensor(tokens * k, 512, dtype=half), *weight, permutation, offsets, 4, 64, 0, 0, width)


def compile_pq(everything: bool) -> None:
    from metate.kernels import pq

    int64, uint8 = {"dtype": torch.int64}, {"dtype": torch.uint8}
    n, Q, M, bits, k = (3001, 33, 7, 6, 100) if everything else (100000, 64, 16, 8, 10)
    books = tensor(M, 2**bits, 8)
    pq.pq_distance_tables(tensor(Q, M * 8), books, int(everything))
    codes = pq.pq_encode(tensor(n, M * 8), books)
    pq.pq_decode(books, codes)
    terms: list[Any] = [None] * 5
    scale, dtype = None, torch.bfloat16
    if everything:
        pq.TOGETHER = 64  # so that results take two passes
        terms = [tensor(Q, 5, 2, **int64), tensor(Q, 5), tensor(n), tensor(n, **int64), tensor(-(-n // 8), **uint8)]
        scale, dtype = tensor(100), torch.int8
    blocks = codes if everything else tensor(-(-n // 32), M, 4 * bits, **uint8)
    pq.pq_scan(tensor(Q, M, 2**bits), blocks, *terms, n, k, everything)
    base = tensor(n, 100, dtype=dtype)
    for metric in (1, 4) if everything else (0,):
        pq.topk_distances(tensor(Q, 100), base, terms[0], scale, scale, *terms[3:], k, metric, everything)


@pytest.mark.parametrize("capability,everything", [(80, True), (90, False)], ids=["sm_80-everything", "sm_90-plain"])
def test_compiles_without_a_gpu(capability, everything, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), str(int(everything))]
    result = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    built = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    names = {
        "product_kernel",
        "add_kernel",
        "forward_kernel",
        "delta_kernel",
        "keys_kernel",
        "queries_kernel",
        "rows_kernel",
        "columns_kernel",
        "merge_kernel",
        "attend_kernel",
        "append_kernel",
        "topk_kernel",
        "topk_backward_kernel",
        "sort_kernel",
        "permute_kernel",
        "unpermute_kernel",
        "place_kernel",
        "unpermute_backward_kernel",
        "linear_kernel",
        "round_kernel",
        "outer_kernel",
        "backward_kernel",
        "tables_kernel",
        "encode_kernel",
        "pack_kernel",
        "decode_kernel",
        "scan_kernel",
        "exact_kernel",
    }
    names |= {"bias_kernel", "slopes_kernel", "sums_kernel"} if everything else {"bounds_kernel"}
    assert {kernel["kernel"] for kernel in built} == names
    if not everything:
        assert not [kernel for kernel in built if kernel["spilled"]]


def test_a_call_that_needs_more_memory_than_the_tuner_knew_takes_what_fits():
    from metate.kernels import shared

    class Kernel(triton.runtime.autotuner.Autotuner):
        arg_names = ("x",)

        def __init__(self, fits: int) -> None:
            self.configs = [triton.Config({"BLOCK": block}) for block in (64, 32, 16)]
            self.early_config_prune = lambda configs, named, **_: configs
            self.fn, self.fits, self.ran = self, fits, []

        def __getitem__(self, grid: Any) -> Any:
            return self.take

        def take(self, x: int, BLOCK: int = 128, **_: Any) -> None:
            if self.fits < BLOCK:
                raise triton.runtime.errors.OutOfResources(BLOCK, self.fits, "shared memory")
            self.ran.append((x, BLOCK))

    for fits, block in ((200, 128), (100, 64), (20, 16)):
        kernel = Kernel(fits)
        shared.launch(kernel, (1,), {"x": 7, "y": 8}, torch.empty(0))
        assert kernel.ran == [(7, block)]
    with pytest.raises(triton.runtime.errors.OutOfResources):
        shared.launch(Kernel(8), (1,), {"x": 7}, torch.empty(0))


@pytest.fixture
def runs():
    """Something runs the kernels: a GPU, or the interpreter."""
    from metate.kernels.shared import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not set")


@pytest.fixture
def kernels(runs):
    from metate.kernels import attention

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
    saved = lse, delta, None, None, None
    return [out, *kernels.attention_backward(grad, q, k, v, *saved, *rest, False, False, False)[:3]]


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
            grad[:, row], q[:, row], k[:, seen], v[:, seen], lse[..., row], delta[..., row], None, *rest,
            False, False, False,
        )  # fmt: skip
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
    got = [out, *kernels.attention_backward(grad, q, k, v, *saved, None, None, None, *rest, False, False, False)[:3]]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(
            a.cpu(), b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def paged(keys: int, page_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """k and v (keys, 2, 32), caches that hold them in pages in another order, and the pages."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(keys, 2, 32, generator=generator).to(dtype) for _ in range(2))
    pages = -(-keys // page_size)
    order = torch.randperm(pages, generator=generator)
    caches = []
    for rows in (k, v):
        cache = torch.full((pages * page_size, 2, 32), torch.nan, dtype=dtype)
        cache[:keys] = rows
        caches.append(cache.view(pages, page_size, 2, 32)[order.argsort()])
    return tuple(x.to(device) for x in (k, v, *caches, order.to(torch.int32)[None]))


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: list[int], *terms: Any, right: int = 0) -> Any:
    from metate.kernels.paged_attention import paged_attention

    given = [*terms, *[None] * (6 - len(terms))]
    device = q.device
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    return paged_attention(q, k, v, table, lengths, None, None, *given, 0.2, -1, right, 0.0, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_results_depend_on_nothing_but_their_sequence(runs, dtype):
    """Not on the page size, nor on neighbours that make a packed batch long: splits lie at fixed keys."""
    _, _, k, v, table = paged(530, 16, dtype)
    q = torch.randn(1, 21, 4, 32, generator=torch.Generator().manual_seed(1)).to(k)
    alone = attend(q[:, :2], k, v, table, [530])
    _, _, *other = paged(530, 3, dtype)
    assert all(torch.equal(a, b) for a, b in zip(attend(q[:, :2], *other, [530]), alone, strict=True))
    ends = torch.tensor([0, 2, 21], dtype=torch.int32, device=q.device)
    both = attend(q, k, v, table.expand(2, -1), [530, 500], ends)
    short = attend(q[:, :2], k, v, table, [530], ends[:2])
    assert torch.equal(both[0][:, :2], short[0]) and torch.equal(both[1][..., :2], short[1])


def test_paged_nan_reaches_only_who_may_see_it(runs):
    """A tree mask hides the key of the second query from the others; NaN there is seen by that one alone."""
    _, _, k, v, table = paged(300, 16, torch.float32)
    q = torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(1)).to(k)
    bits = torch.tensor([[[1], [3], [5], [8]]], dtype=torch.int32, device=q.device)
    terms = (None, None, None, None, bits)
    clean = attend(q, k, v, table, [300], *terms, right=-1)
    page, row = table[0, 297 // 16], 297 % 16
    k[page, row], v[page, row, :, 5] = torch.nan, torch.inf
    spoilt = attend(q, k, v, table, [300], *terms, right=-1)
    seen = torch.tensor([False, True, False, False])
    assert torch.equal(spoilt[0][:, ~seen], clean[0][:, ~seen])
    assert spoilt[0][:, seen].isnan().all()


def low_bit(N: int, K: int) -> tuple[list[Tensor | None], list[int]]:
    """A 4-bit codebook weight as the operators take it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0x11, 0x100, (N, -(-K // 2)), generator=generator, dtype=torch.uint8)
    codes |= 0x11  # no code is 0
    scales, codebook = torch.rand(N, -(-K // 64), generator=generator), torch.randn(16, generator=generator)
    tensors = [codes, scales, None, None, None, None, codebook]
    return [None if tensor is None else tensor.to(device) for tensor in tensors], [4, 64, 0, 0]


def test_a_sum_does_not_depend_on_the_number_of_rows(runs):
    """Slices of their own programs and slices one after another add up in one order: what a slice adds is exact here,
    whatever multiplies the tiles, and what all of them add is not."""
    from metate.kernels.quant_linear import _slices, quant_linear

    tensors, scalars = low_bit(70, 1100)
    tensors[1].fill_(1.0)
    tensors[6].mul_(4).round_()
    assert _slices(70, 1100) == (3, 384)
    x = torch.randint(-3, 4, (130, 1100), generator=torch.Generator().manual_seed(1)).float()
    x *= torch.tensor([2.0**20, 1.0, -(2.0**20)]).repeat_interleave(384)[:1100]
    x = x.to(tensors[0].device)
    whole = quant_linear(x, *tensors, None, None, *scalars)
    for rows in (1, 5, 33, 64, 65):
        assert torch.equal(quant_linear(x[:rows], *tensors, None, None, *scalars), whole[:rows]), rows


def test_tiles_past_the_end_hold_zeros(runs):
    """A NaN that no code of the weight means is not summed where tiles reach past its rows or columns."""
    from metate.kernels.quant_linear import quant_linear, quant_matmul

    tensors, scalars = low_bit(33, 65)
    tensors[6][0] = torch.nan
    device = tensors[0].device
    assert quant_linear(torch.ones(3, 65, device=device), *tensors, None, None, *scalars).isfinite().all()
    assert quant_matmul(torch.ones(3, 33, device=device), *tensors, None, *scalars, 65).isfinite().all()


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    compile_attention(bool(int(sys.argv[2])))
    compile_quant_linear(bool(int(sys.argv[2])))
    compile_paged_attention(bool(int(sys.argv[2])))
    compile_moe(bool(int(sys.argv[2])))
    compile_pq(bool(int(sys.argv[2])))
