"""Low-bit linear layers: what the declaration of the operators cannot say."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, same_bits
from torch import Tensor

import metate
from metate import QuantizedWeight, library
from metate.low_bit import pack_codes
from metate.ops.quant_linear.declaration import int8_op, linear_op, matmul_op

LINEAR = [(device, backend) for op, device, backend in (p.values for p in BACKENDS) if op.name == "quant_linear"]
everywhere = pytest.mark.parametrize("device,backend", LINEAR, ids=lambda value: value)


def random(*shape: int, seed: int = 0, backend: str = "cpu") -> Tensor:
    """In a dtype that the backend takes: tensor cores have no float32."""
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(N: int = 40, K: int = 200, bits: int = 4, group: int = 64, form: str = "codebook") -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    shape = (N, -(-K // group))
    named = {"codebook": random(2**bits).sort().values} if form == "codebook" else {}
    if form == "zeros":
        named = {"zeros": torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)}
    if form == "far":  # zero points beyond the codes, which some rows have further away than a signed byte reaches
        named = {"zeros": torch.randint(0, 256, shape, generator=generator).to(torch.uint8)}
        named["zeros"][: N // 2] %= 129
    if form == "shifted":
        named = {"offsets": 0.01 * random(*shape, seed=2)}
    if form == "whole":
        named = {"codebook": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])}
    return QuantizedWeight((N, K), bits, group, pack_codes(codes, bits), 0.01 * (1 + random(*shape).abs()), **named)


def error(got: Tensor, x: Tensor, w: QuantizedWeight) -> float:
    truth = x.double() @ metate.dequantize(w, torch.float64).T
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [linear_op, int8_op], ids=lambda op: op.name)
@pytest.mark.parametrize("form", ["codebook", "zeros"])
def test_long_rows_round_no_more_than_torch(form, op, dtype):
    args = op.example({**op.domain.sweep[0], "M": 2, "N": 64, "K": 14336, "form": form}, dtype)
    op.assert_close(op(*args), args)


@everywhere
@pytest.mark.parametrize("form", ["codebook", "zeros"])
def test_equals_the_dense_product(device, backend, form):
    w = weight(form=form)
    x = random(2, 3, 200, backend=backend)
    with metate.use(backend):
        out = metate.quant_linear(x.to(device), w.to(device)).cpu()
        single = metate.quant_linear(x[0, 0].to(device), w.to(device)).cpu()
    assert out.shape == (2, 3, 40) and single.shape == (40,)
    assert error(out.flatten(0, 1), x.flatten(0, 1), w) < (1e-6 if x.dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(single, out[0, 0])


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form,bits,group",
    [("codebook", 4, 64), ("zeros", 4, 128), ("zeros", 3, 20), ("zeros", 8, 32), ("far", 4, 32), ("far", 4, 36)],
)
def test_a_row_does_not_depend_on_their_number(activation, dtype, form, bits, group):
    """Matrix-vector and matrix-matrix kernels add in one order."""
    w = weight(N=100, K=391, bits=bits, group=group, form=form)
    x = random(70, 391).to(dtype)
    whole = metate.quant_linear(x, w, activation=activation)
    for rows in (*range(1, 18), 33, 64):
        assert same_bits(metate.quant_linear(x[:rows], w, activation=activation), whole[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "form,bits,group", [("zeros", 4, 128), ("symmetric", 4, 72), ("shifted", 4, 64), ("whole", 4, 64), ("zeros", 8, 40)]
)
def test_rows_with_outliers_do_not_depend_on_their_number(dtype, form, bits, group):
    """Some need all digits of whole numbers, and some have no finite number of them."""
    w = weight(N=75, K=1391, bits=bits, group=group, form=form)
    w = dataclasses.replace(w, permutation=torch.randperm(1391, generator=torch.Generator().manual_seed(2)).int())
    x = random(70, 1391)
    x[::3, 5::90] *= 100
    x[40, 7], x[41, 9], x[42, 700:702] = math.inf, math.nan, math.inf
    x = x.to(dtype)
    whole = metate.quant_linear(x, w)
    finite = torch.cat([whole[:40], whole[43:]])
    assert error(finite, torch.cat([x[:40], x[43:]]), w) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert same_bits(metate.quant_linear(x[:23], w), whole[:23])
    for row in (0, 1, *range(39, 44), 69):
        assert same_bits(metate.quant_linear(x[row : row + 1], w), whole[row : row + 1]), row


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form,bits,group",
    [("codebook", 4, 64), ("codebook", 4, 32), ("symmetric", 4, 32), ("zeros", 4, 128), ("zeros", 8, 32)],
)
def test_one_long_row_is_that_of_many(activation, dtype, form, bits, group):
    """It takes the rows of W in turn, whole chunks of them, in strips that end before such rows do."""
    w = weight(N=51, K=4288, bits=bits, group=group, form=form)
    x = random(13, 4288).to(dtype)
    whole = metate.quant_linear(x, w, activation=activation)
    assert activation or error(whole, x, w) < (1e-6 if dtype == torch.float32 else 5e-3)
    for row in (0, 12):
        assert same_bits(metate.quant_linear(x[row : row + 1], w, activation=activation), whole[row : row + 1])


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize(
    "form,group", [("whole", 64), ("symmetric", 32), ("zeros", 128), ("far", 64), ("far", 4096), ("shifted", 96)]
)
def test_rows_of_whole_chunks_do_not_depend_on_their_number(form, group, in_tiles):
    """In 8 bits few rows look codes up as they are multiplied, and many find those of a span looked up."""
    w = weight(N=80, K=1184, group=group, form=form)
    w = w.in_tiles() if in_tiles else w
    x = random(300, 1184).bfloat16()
    whole = metate.quant_linear(x, w, activation="int8")
    assert error(whole, x, w) < 2e-2
    for rows in (*range(1, 10), 16, 17, 24, 65, 257):
        assert same_bits(metate.quant_linear(x[:rows], w, activation="int8"), whole[:rows]), rows


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form,group,K", [("codebook", 64, 1472), ("zeros", 128, 1408), ("zeros", 32, 391)])
def test_a_row_does_not_depend_on_who_packs_it(activation, dtype, form, group, K):
    """One worker for all where W is small beside their number, otherwise every worker for itself."""
    w = weight(N=600, K=K, group=group, form=form)
    x = random(20, K).to(dtype)
    whole = metate.quant_linear(x, w, activation=activation)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 40):
            torch.set_num_threads(n)
            for M in (1, 2, 3, 4, 7, 8, 13, 16):
                assert same_bits(metate.quant_linear(x[:M], w, activation=activation), whole[:M]), (n, M)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("columns", [1, 3, 15])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("device,backend", LINEAR, ids=lambda value: value)
def test_codes_that_are_their_zero_points_count_for_nothing_in_short_rows(device, backend, rows, columns):
    """Where sums were corrected, what was taken from them would not be what was added."""
    w = weight(K=columns, group=500, form="zeros")
    codes = w.zeros.expand(-1, columns) if w.zeros is not None else w.codes
    w = dataclasses.replace(w, codes=pack_codes(codes.contiguous(), 4)).to(device)
    with metate.use(backend):
        y = metate.quant_linear(random(rows, columns, seed=3, backend=backend).to(device), w)
    assert not y.any()


def test_no_columns_give_the_bias():
    bias = random(40)
    for rows in (1, 3):
        assert same_bits(metate.quant_linear(torch.empty(rows, 0), weight(K=0), bias), bias.expand(rows, -1))


@everywhere
def test_what_fills_the_last_byte_does_not_count(device, backend):
    w = weight(N=33, K=65)
    codes = w.codes.clone()
    codes[:, -1] |= 0xF0
    filled = dataclasses.replace(w, codes=codes).to(device)
    x = random(3, 65, backend=backend).to(device)
    with metate.use(backend):
        assert same_bits(metate.quant_linear(x, filled), metate.quant_linear(x, w.to(device)))


@everywhere
def test_nan_stays_in_its_row(device, backend):
    x = random(3, 200, backend=backend)
    x[1, 7] = math.nan
    with metate.use(backend):
        out = metate.quant_linear(x.to(device), weight().to(device))
        clean = metate.quant_linear(x.nan_to_num().to(device), weight().to(device))
    assert out[1].isnan().all() and same_bits(out[::2], clean[::2])


def test_int8_activations_err_little_and_take_no_gradient():
    w = weight(N=64, K=512, group=128, form="zeros")
    x = random(8, 512)
    x[:, 5] *= 8
    assert 1e-3 < error(metate.quant_linear(x, w, activation="int8"), x, w) < 1.2e-2
    with pytest.raises(NotImplementedError, match=r"metate.quant_linear: no gradient"):
        metate.quant_linear(x.requires_grad_(), w, activation="int8").sum().backward()


def test_int8_activations_give_one_result_on_every_instruction_set(tmp_path):
    """Their sums are exact whole numbers; only `baseline` lacks fused multiply-adds for the scales."""
    calls = []
    for bits, group, form in ((4, 32, "zeros"), (4, 128, "symmetric"), (3, 20, "symmetric"), (6, 16, "zeros"),
                              (8, 50, "zeros"), (8, 64, "symmetric")):  # fmt: skip
        w = weight(N=70, K=391, bits=bits, group=group, form=form)
        for rows, dtype in ((1, torch.bfloat16), (3, torch.float32), (7, torch.bfloat16)):
            calls.append((w.tensors, w.shape, bits, group, random(rows, 391).to(dtype)))
    torch.save(calls, tmp_path / "calls")
    code = f"""
import torch, metate
torch.save([
    metate.quant_linear(x, metate.QuantizedWeight(shape, bits, group, **tensors), activation="int8")
    for tensors, shape, bits, group, x in torch.load({str(tmp_path / "calls")!r})
], {str(tmp_path / "out")!r})
"""
    expected = tuple(
        metate.quant_linear(x, metate.QuantizedWeight(shape, bits, group, **tensors), activation="int8")
        for tensors, shape, bits, group, x in calls
    )
    for isa in library.isas()[1:]:
        if isa == "baseline":
            continue
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "METATE_ISA": isa}, check=True)
        assert same_bits(tuple(torch.load(tmp_path / "out")), expected), isa


@pytest.mark.parametrize("form", ["zeros", "symmetric", "codebook", "offsets"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_numbers_beyond_all_steps_stay_beyond(bad, form):
    """An infinite activation counts as one infinite step: the sign of its weight decides, and NaN stays NaN."""
    w = weight(N=40, K=200, group=64, form=form)
    x = random(3, 200).bfloat16()
    x[1, 130] = bad
    out, column = metate.quant_linear(x, w)[1], metate.dequantize(w)[:, 130]
    expected = torch.where(column == 0, math.nan, bad * column.sign())
    if form == "zeros" and library.isas()[:1] in (["baseline"], ["avx2"], ["avx512"], ["avx512bf16"]):
        # Zero points are subtracted from sums of floats, where inf - inf has no sign: NaN then, as documented.
        expected = expected.where(~out.isnan(), math.nan)
    torch.testing.assert_close(out.float(), expected, equal_nan=True)
    x[1, 131] = bad  # may cancel the other
    other = metate.dequantize(w)[:, 131]
    cancels = (bad * column.sign() != bad * other.sign()) | (column == 0) | (other == 0)
    both = metate.quant_linear(x, w)[1]
    assert not both.isfinite().any() and both[cancels].isnan().all()


@pytest.mark.parametrize("form", ["codebook", "zeros"])
def test_gradients_reach_x_bias_and_what_else_learns(form):
    """Like those of a dense linear layer whose weight is computed from learned scales."""
    w = weight(form=form)
    x, bias = random(6, 200).requires_grad_(), random(40, seed=2).requires_grad_()
    scales = w.scales.clone().requires_grad_()
    metate.quant_linear(x, dataclasses.replace(w, scales=scales), bias).square().sum().backward()
    x_dense, bias_dense, scales_dense = (t.detach().clone().requires_grad_() for t in (x, bias, scales))
    ones = dataclasses.replace(w, scales=torch.ones_like(w.scales)).dequantize()
    dense = ones * scales_dense.repeat_interleave(64, 1)[:, :200]
    torch.nn.functional.linear(x_dense, dense, bias_dense).square().sum().backward()
    for a, b in ((x, x_dense), (bias, bias_dense), (scales, scales_dense)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "N,K,bits,group,flags",
    [
        (2093, 200, 4, 64, {"form": "codebook"}),
        (2080, 416, 4, 32, {"form": "zeros", "tiles": True, "scales": "float16"}),
        (1345, 330, 4, 48, {"form": "offsets", "super_groups": 3}),
        (1100, 330, 4, 36, {"form": "zeros", "permuted": True}),
        (1041, 90, 4, 5000, {"form": "symmetric"}),
        (1029, 150, 3, 50, {"form": "zeros"}),
        (1037, 300, 8, 128, {"form": "codebook"}),
    ],
)
def test_gradients_through_tall_weights_round_no_more_than_torch(N, K, bits, group, flags, dtype):
    """And a row of them does not depend on how many there are."""
    args = matmul_op.example(dict(M=19, N=N, K=K, bits=bits, group=group, **flags), dtype)
    out = matmul_op(*args)
    matmul_op.assert_close(out, args)
    for rows in (1, 2, 5, 18):
        assert same_bits(matmul_op(args[0][:rows], *args[1:]), out[:rows]), rows


def test_no_dense_weight_is_ever_made():
    """Forward and backward of a layer whose float32 weight takes 256 MiB."""
    code = """
import resource, torch, metate
from metate import QuantizedWeight
n = 8192
codes, scales = torch.zeros(n, n // 2, dtype=torch.uint8), torch.ones(n, n // 64)
w = QuantizedWeight((n, n), 4, 64, codes, scales, zero=8)
small = QuantizedWeight((64, 64), 4, 64, codes[:64, :32], scales[:64, :1], zero=8)
metate.quant_linear(torch.ones(1, 64, requires_grad=True), small).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
metate.quant_linear(torch.ones(16, n, requires_grad=True), w).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    if metate.explain(metate.quant_linear, random(1, 200), weight()).backend != "cpu":
        pytest.skip("no compiled CPU kernels")
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 16 << 10, f"{int(grown) >> 10} MiB"


X = torch.zeros(2, 200)
WRONG = [
    (TypeError, "x is list, expected a torch.Tensor", dict(x=[1])),
    (TypeError, "weight is Tensor, expected a metate.QuantizedWeight", dict(weight=X)),
    (ValueError, r"x is of shape \(2, 199\), expected \(…, 200\)", dict(x=X[:, 1:])),
    (TypeError, "x is int32, expected float32 or bfloat16", dict(x=X.int())),
    (ValueError, r"bias is of shape \(3,\).* out_features = 40", dict(bias=torch.zeros(3))),
    (TypeError, "bias is float64, expected float32", dict(bias=torch.zeros(40).double())),
    (ValueError, "activation is 'int4', expected None or 'int8'", dict(activation="int4")),
    (ValueError, "backend is 'gpu'", dict(backend="gpu")),
]


@pytest.mark.parametrize("kind,message,wrong", WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_wrong_arguments_are_named(kind, message, wrong):
    with pytest.raises(kind, match=message):
        metate.quant_linear(**{**dict(x=X, weight=weight()), **wrong})


def test_wrong_permutations_are_named():
    from metate.ops.quant_linear.declaration import linear_op

    *tensors, _ = weight().arguments
    order = torch.arange(200, dtype=torch.int32)
    linear_op(X, *tensors, order, None, *weight().scalars)
    order[3] = 4
    with pytest.raises(ValueError, match=r"metate.quant_linear: permutation is not one, expected every number"):
        linear_op(X, *tensors, order, None, *weight().scalars)


# Low-rank updates.

LORA = [(device, backend) for op, device, backend in (p.values for p in BACKENDS) if op.name == "lora_linear"]
adapted = pytest.mark.parametrize("device,backend", LORA, ids=lambda value: value)


def pair(adapters: int = 3, rank: int = 20, N: int = 40, K: int = 200) -> tuple[Tensor, Tensor]:
    return random(adapters, rank, K, seed=3), 0.05 * random(adapters, N, rank, seed=4)


@pytest.mark.parametrize("device,backend", [at for at in LORA if at[1] in ("cpu", "cuda")], ids=lambda value: value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_row_depends_on_no_other(dtype, device, backend):
    """Neither on how many there are nor on which adapters they have."""
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores have no float32")
    w = weight(K=1200).to(device)
    (A, B), x = (tuple(t.to(device) for t in pair(K=1200))), random(70, 1200).to(device, dtype)
    ids = torch.randint(-1, 3, (70,), generator=torch.Generator().manual_seed(5)).to(device)
    with metate.use(backend):
        whole = metate.lora_linear(x, w, A, B, adapter_ids=ids)
        for rows in (1, 2, 5, 8, 9, 16, 17, 33, 64) if backend == "cpu" else (8, 33):
            assert same_bits(metate.lora_linear(x[:rows], w, A, B, adapter_ids=ids[:rows]), whole[:rows]), rows
        for row in range(0, 70, 9):
            a, beside = int(ids[row]), x[row : row + 1]
            alone = metate.quant_linear(beside, w) if a < 0 else metate.lora_linear(beside, w, A[a], B[a])
            assert same_bits(alone, whole[row : row + 1])


@adapted
def test_nan_stays_in_its_row_and_adapter(device, backend):
    w, (A, B), x = weight().to(device), pair(), random(6, 200, backend=backend)
    A, B = A.to(x.dtype), B.to(x.dtype)
    ids = torch.tensor([0, 1, -1, 2, 1, 0], dtype=torch.int32)
    broken, broken_A, broken_B = x.clone(), A.clone(), B.clone()
    broken[2:4] = math.nan
    broken_A[2], broken_B[2] = math.nan, math.inf
    gradients, outs = [], []
    for inputs in ((x, A, B), (broken, broken_A, broken_B)):
        leaves = [t.to(device).detach().clone().requires_grad_() for t in inputs]
        with metate.use(backend):
            out = metate.lora_linear(leaves[0], w, *leaves[1:], adapter_ids=ids.to(device))
            outs.append(out.detach())
            out.backward(torch.ones_like(out))
        gradients.append([leaf.grad for leaf in leaves])
    kept = [0, 1, 4, 5]
    assert outs[1][2:4].isnan().all() and same_bits(outs[0][kept], outs[1][kept])
    for (clean, broken_one), places in zip(zip(*gradients, strict=True), (kept, [0, 1], [0, 1]), strict=True):
        assert same_bits(clean[places], broken_one[places])


def test_scaling_counts_and_adapters_without_rows_get_zeros():
    w, (A, B), x = weight(), pair(), random(2, 4, 200)
    leaves = [t.clone().requires_grad_() for t in (A, B, torch.tensor([0.5, 2.0, 3.0]))]
    ids = torch.tensor([[2, 2, -1, 0], [0, 2, 2, 2]])
    out = metate.lora_linear(x, w, leaves[0], leaves[1], scaling=leaves[2], adapter_ids=ids)
    dense = [metate.dequantize(w) + s * (b @ a) for a, b, s in zip(A, B, leaves[2].detach(), strict=True)]
    dense.append(metate.dequantize(w))
    truth = torch.stack([row @ dense[i].T for row, i in zip(x.flatten(0, 1), ids.flatten(), strict=True)])
    torch.testing.assert_close(out.flatten(0, 1), truth, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad[0].any() and not leaf.grad[1].any() and leaf.grad[2].any()


@pytest.mark.parametrize(
    "kind,message,wrong",
    [
        (ValueError, "adapter_ids is None, expected an adapter for every row of x: there are 3", {}),
        (ValueError, "adapter_ids is 3 for a row, expected 0 to 2, or -1", dict(adapter_ids=torch.tensor([0, 2**40]))),
        (ValueError, r"B is of shape \(3, 39, 20\).* out_features = 40", dict(B=torch.zeros(3, 39, 20))),
        (ValueError, r"A is of shape \(0, 20, 200\), expected one adapter", dict(A=X[:0].new_zeros(0, 20, 200))),
        (TypeError, "A is bfloat16, expected float32", dict(A=torch.zeros(3, 20, 200, dtype=torch.bfloat16))),
        (TypeError, "B is NoneType, expected a torch.Tensor", dict(B=None)),
        (TypeError, "weight is Tensor", dict(weight=X)),
    ],
)
def test_wrong_adapters_are_named(kind, message, wrong):
    A, B = pair()
    if "A" in wrong and not wrong["A"].shape[0]:
        B = B[:0]
    with pytest.raises(kind, match=rf"metate.lora_linear: {message}"):
        metate.lora_linear(**{**dict(x=X, weight=weight(), A=A, B=B), **wrong})


@pytest.mark.parametrize("form", ["codebook", "zeros"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_int8_activations_take_chunks_that_are_almost_zero(backend: str, form: str) -> None:
    """127 / largest is infinite below 4e-37, where a SiLU of -90 is: the chunk counts as 0, and the others as ever."""
    x = random(2, 200)
    x[:, 32:64] = 1e-40
    zero = x.clone()
    zero[:, 32:64] = 0
    y, expected = (metate.quant_linear(z, weight(form=form), activation="int8", backend=backend) for z in (x, zero))
    assert torch.equal(y, expected)


# Dequantised.

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def swapped(w: QuantizedWeight) -> QuantizedWeight:
    """The same codes, the first of two in the high half of a byte, as bitsandbytes has them."""
    order = torch.arange(w.in_features, dtype=torch.int32, device=w.device) ^ 1
    return dataclasses.replace(w, permutation=order)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return same_bits(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@everywhere
def test_dequantised_bits_are_those_of_the_formula(device, backend, dtype):
    if (device, backend, dtype) == ("cpu", "triton", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    made = [weight(5, 200, bits, group, form).to(device) for bits, group, form in (
        (4, 64, "codebook"), (4, 32, "shifted"), (4, 7, "zeros"), (3, 40, "zeros"), (6, 16, "plain"), (8, 500, "plain"),
        (8, 64, "codebook"), (2, 64, "codebook"), (1, 1, "shifted"),
    )]  # fmt: skip
    made += [swapped(made[0]), dataclasses.replace(made[0], permutation=torch.randperm(200).int().to(device))]
    made += [
        dataclasses.replace(made[6], codebook=E4M3.to(device)),
        dataclasses.replace(made[0], scales=-made[0].scales),
    ]
    for w in made:
        assert same_numbers(metate.dequantize(w, dtype, backend=backend), w._formula().to(dtype)), w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_go_past_the_caches(dtype):
    room = torch.empty(2048 * 2112 + 1, dtype=dtype)
    for bits, form in ((4, "codebook"), (8, "zeros"), (3, "plain")):
        w = weight(2048, 2112, bits, 64, form)
        for each in (w, swapped(w)) if bits == 4 else (w,):
            expected = each._formula().to(dtype)
            assert same_bits(each.dequantize(dtype), expected)
            for out in (room[1:].view(2048, 2112), room[:-1].view(2112, 2048).T):  # on no line, and across all
                assert each.dequantize(out=out.fill_(math.nan)) is out and same_bits(out, expected)


def test_gradients_reach_what_makes_a_dequantised_weight():
    w = weight(5, 200)
    w = dataclasses.replace(w, scales=w.scales.clone().requires_grad_())
    w.dequantize().sum().backward()
    ones = dataclasses.replace(w, scales=torch.ones_like(w.scales)).dequantize()
    sums = torch.nn.functional.pad(ones, (0, 56)).view(5, 4, 64).sum(2)
    torch.testing.assert_close(w.scales.grad, sums)
    with pytest.raises(NotImplementedError, match=r"metate\.dequantize: no gradient"):
        w.dequantize(out=torch.empty(5, 200))
    assert metate.dequantize(w.to("meta")).device.type == "meta"
    assert metate.explain(metate.dequantize, weight()).op == "dequantize"
