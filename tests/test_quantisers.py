"""Quantisers: each does what its paper says, GPTQ and AWQ beat rounding to nearest, and wrong arguments are named."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from metate.quant import (
    Calibration,
    bitsandbytes,
    fold_scale,
    quantize_awq,
    quantize_fp8,
    quantize_gptq,
    quantize_hqq,
    quantize_int8,
    quantize_nf4,
    quantize_rtn,
    requantize,
    search_awq_scale,
)
from metate.quant.gguf_blocks import TYPES, lower
from metate.quant.grid import Grid


@pytest.fixture(scope="module")
def layer():
    """A weight and inputs as layers see them: few strong directions, channels of very different size, one unused."""
    g = torch.Generator().manual_seed(0)
    columns = 192
    channels = torch.linspace(0, 4, columns).exp()[torch.randperm(columns, generator=g)]
    x = torch.randn(2048, 48, generator=g) @ (torch.randn(48, columns, generator=g) * channels) / 8
    x += torch.randn(2048, columns, generator=g) * 0.1
    x[:, 7] = 0
    return torch.randn(80, columns, generator=g) * 0.05, x


@pytest.fixture(scope="module")
def calibration(layer):
    gathered = Calibration(layer[1].shape[1])
    for batch in layer[1].split(500):
        gathered.add(batch.view(4, -1, batch.shape[1]))
    return gathered


def output_error(layer, made, scale=1.0):
    weight, x = layer
    truth = x.double() @ weight.double().t()
    got = (x / scale).double() @ made.dequantize().double().t()
    return float((got - truth).square().mean() / truth.square().mean())


def test_calibration_is_the_moments_of_all_inputs(layer, calibration):
    x = layer[1].double()
    assert calibration.count == len(x)
    assert torch.allclose(calibration.hessian.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(calibration.mean_magnitude.double(), x.abs().mean(0), rtol=1e-5)
    difference = torch.randn(3, x.shape[1])
    truth = float((x @ difference.double().t()).square().sum(1).mean())
    assert calibration.output_error(difference) == pytest.approx(truth, rel=1e-4)


# Round to nearest.


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [1, 32, 50, 500, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_the_nearest_step_of_the_range(layer, bits, group_size, symmetric):
    weight = layer[0]
    assert quantize_rtn(weight, bits, group_size).scales.dtype == torch.float16
    made = quantize_rtn(weight, bits, group_size, symmetric=symmetric, scale_dtype=torch.float32)
    size = min(made.shape[1] if group_size == -1 else group_size, made.shape[1])
    assert made.group_size == size
    for group, start in enumerate(range(0, made.shape[1], size)):
        values = weight[:, start : start + size].numpy()
        scale = made.scales[:, group].float().numpy()[:, None]
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        span = 2 * np.maximum(-low, high) if symmetric else high - low
        assert np.allclose(scale[:, 0], span / (2**bits - 1), rtol=1e-6)
        steps = (made.dequantize()[:, start : start + size].numpy() - values) / scale
        assert np.abs(steps).max() <= 0.5 + 1e-4


def test_rtn_by_least_error_beats_the_whole_range(layer):
    for bits in (2, 3, 4):
        whole, least = (quantize_rtn(layer[0], bits, 64, mse=mse).dequantize() - layer[0] for mse in (False, True))
        assert least.square().sum() < whole.square().sum()


def test_rtn_of_constants_and_extremes():
    weight = torch.tensor([[0.0] * 32, [1e-30] * 32, [3.0] * 32, [-60000.0] * 32])
    for symmetric in (True, False):
        found = quantize_rtn(weight, 8, 32, symmetric=symmetric).dequantize()
        assert torch.isfinite(found).all() and torch.allclose(found, weight, rtol=5e-3, atol=1e-7)


# GPTQ.


def optimal_brain_quantisation(weight, hessian, bits, group_size, early, damp=0.01):
    """GPTQ as its derivation has it, in float64: every column updates the rest by the inverse Hessian of the rest.

    early: ranges of groups are those of the weights as they were when the block of (about) 128 columns began.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    w[:, h.diagonal() == 0] = 0
    mean = h.diagonal().mean()
    h.diagonal()[h.diagonal() == 0] = mean
    h.diagonal().add_(damp * mean)
    grid = Grid(bits, True)
    result = torch.empty_like(w)
    for column in range(w.shape[1]):
        if column % max(group_size, 128 // group_size * group_size) == 0:
            begun = w.clone()
        if column % group_size == 0:
            scale, zero = grid.fit((begun if early else w)[:, column : column + group_size].float())
        result[:, column] = grid.round_trip(w[:, column].float(), scale, zero).double()
        inverse = torch.linalg.inv(h[column:, column:])
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [32, 100, 192])
def test_gptq_follows_its_derivation(layer, calibration, bits, group_size):
    """Every row is that of the better of two choices of ranges."""
    hessian = calibration.hessian.double()
    rows = [optimal_brain_quantisation(layer[0], hessian, bits, group_size, early) for early in (False, True)]
    errors = [((row - layer[0]) @ hessian * (row - layer[0])).sum(1) for row in rows]
    truth = torch.where((errors[1] < errors[0])[:, None], rows[1], rows[0])
    found = quantize_gptq(layer[0], calibration, bits, group_size).dequantize()
    left = ((found - truth).abs() > 1e-6).any(1).double().mean()
    assert left < 0.05, f"{left:.0%} of the rows left the path, more than where float32 rounds a tie the other way"


def test_gptq_without_correlation_is_rounding():
    weight, gathered = torch.randn(16, 96), Calibration(96).add(torch.eye(96))
    for options in ({}, {"act_order": True}, {"symmetric": False}, {"mse": True}):
        plain = {key: value for key, value in options.items() if key == "symmetric"}
        found = quantize_gptq(weight, gathered, 4, 32, **options).dequantize()
        rounded = [quantize_rtn(weight, 4, 32, mse=mse, **plain).dequantize() for mse in {False, "mse" in options}]
        error = torch.stack([(other - weight).square().sum(1) for other in rounded]).argmin(0)
        truth = torch.stack(rounded)[error, torch.arange(16)]
        assert torch.equal(found, truth), options


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}], ids=str)
def test_gptq_shrinks_ranges_where_that_lessens_the_output_error(layer, calibration, bits, symmetric, order):
    def errors(mse):
        made = quantize_gptq(layer[0], calibration, bits, 64, symmetric=symmetric, mse=mse, **order)
        delta = (made.dequantize() - layer[0]).double()
        return ((delta @ calibration.hessian.double()) * delta).sum(1)

    whole, least = errors(False), errors(True)
    assert (least <= whole * 1.001).all() and least.sum() < 0.97 * whole.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 100, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding(layer, calibration, bits, group_size, symmetric):
    rounded = output_error(layer, quantize_rtn(layer[0], bits, group_size, symmetric=symmetric))
    plain = output_error(layer, quantize_gptq(layer[0], calibration, bits, group_size, symmetric=symmetric))
    assert plain < rounded
    if group_size == 100:
        return
    errors = []
    for options in ({"mse": True}, {"static_groups": True}, {"static_groups": True, "mse": True}):
        made = quantize_gptq(layer[0], calibration, bits, group_size, symmetric=symmetric, act_order=True, **options)
        assert (made.permutation is None) == ("static_groups" in options or group_size == -1)
        assert output_error(layer, made) < 0.5 * plain, options  # the large inputs first
        errors.append(output_error(layer, made))
    if group_size > 0:
        assert errors[0] < errors[2], "groups of like inputs are better than groups of neighbours"


def test_gptq_needs_inputs(layer):
    weight = layer[0]
    few = Calibration(weight.shape[1]).add(layer[1][:3])  # far fewer than columns: damping makes up for it
    assert output_error((weight, layer[1][:3]), quantize_gptq(weight, few)) < 1e-2
    for gathered, message in (
        (Calibration(weight.shape[1]), "empty"),
        (Calibration(5).add(torch.ones(1, 5)), "weight is"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_gptq(weight, gathered)
    with pytest.raises(ValueError, match="not finite"):
        quantize_gptq(weight, Calibration(weight.shape[1]).add(torch.full((1, weight.shape[1]), torch.nan)))


# AWQ.


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_beats_rounding(layer, calibration, bits, group_size, symmetric):
    rounded = output_error(layer, quantize_rtn(layer[0], bits, group_size, symmetric=symmetric))
    made, scale = quantize_awq(layer[0], calibration, bits, group_size, symmetric=symmetric, clip=False)
    scaled = output_error(layer, made, scale)
    assert scaled < 0.9 * rounded
    ones = torch.ones_like(scale)
    cut, _ = quantize_awq(layer[0], calibration, bits, group_size, symmetric=symmetric, scale=ones)
    assert output_error(layer, cut) < rounded * (1.0 if bits < 4 else 1.05)


def test_awq_takes_the_best_of_its_grid(layer, calibration):
    """No scale of the grid, made by hand, does better; layers of the same inputs are judged together."""
    weights = [layer[0], layer[0].flip(0) * 3]
    best = search_awq_scale(weights, calibration, 3, 64, clip=False)

    def loss(scale, clip=False):
        made = [quantize_awq(weight, calibration, 3, 64, scale=scale, clip=clip)[0] for weight in weights]
        return sum(calibration.output_error(m.dequantize() / scale - w) for m, w in zip(made, weights, strict=True))

    stacked = torch.cat(weights).abs().unflatten(1, (-1, 64))
    share = (stacked / (stacked.amax(2, keepdim=True) + 1e-6)).flatten(1).mean(0)
    magnitude = calibration.mean_magnitude.clamp(min=1e-4)
    for ratio in (0, 0.25, 0.5, 0.75, 0.95):
        tried = (magnitude**ratio / (share ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        for found in (tried, magnitude**ratio):
            assert loss(best) <= loss(found / (found.max() * found.min()).sqrt()) * 1.0001
    assert loss(best) < loss(torch.ones_like(best))
    judged = loss(search_awq_scale(weights, calibration, 3, 64), clip=True)
    assert judged <= min(loss(best, clip=True), loss(torch.ones_like(best), clip=True)) * 1.0001


@pytest.mark.parametrize(
    "previous", [nn.LayerNorm(192), nn.Linear(40, 192), nn.RMSNorm(192)], ids=lambda m: type(m).__name__
)
def test_awq_scales_fold_into_the_operation_before(layer, calibration, previous):
    for parameter in previous.parameters():
        nn.init.normal_(parameter)
    scale = search_awq_scale([layer[0]], calibration)
    x = torch.randn(5, 40 if isinstance(previous, nn.Linear) else 192)
    with torch.no_grad():
        before = previous(x) @ layer[0].t()
        fold_scale(previous, scale)
        after = previous(x) @ (layer[0] * scale).t()
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    with pytest.raises(ValueError, match="192 channels"):
        fold_scale(nn.Linear(3, 4), scale)


# HQQ.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 100, -1])
def test_hqq_beats_rounding_in_its_norm(bits, group_size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 192, generator=generator)
    weight = weight * (1 + 9 * (torch.rand(64, 192, generator=generator) < 0.01))  # with outliers
    made, rounded = quantize_hqq(weight, bits, group_size), quantize_rtn(weight, bits, group_size, symmetric=False)
    error, before = ((m.dequantize() - weight).abs().pow(0.7).sum() for m in (made, rounded))
    assert error < before
    assert made.offsets is not None and made.zeros is None
    start = quantize_hqq(weight, bits, group_size, iterations=0)
    assert error <= (start.dequantize() - weight).abs().pow(0.7).sum()


# Memory and arguments.


def test_long_weights_are_done_in_pieces(layer):
    """Pieces of a million weights give what the rows give alone."""
    weight = torch.randn(700, 2048)
    for quantize in (quantize_rtn, quantize_nf4, quantize_hqq, lambda w: quantize_fp8(w, (1, 128))):
        whole = quantize(weight).dequantize()
        for row in (0, 511, 512, 699):
            assert torch.equal(whole[row : row + 1], quantize(weight[row : row + 1]).dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes_and_strides(layer, dtype):
    weight = layer[0].to(dtype)
    for quantize in (quantize_rtn, quantize_nf4, quantize_hqq, quantize_fp8):
        assert torch.equal(quantize(weight).dequantize(), quantize(weight.float()).dequantize())
        assert torch.equal(quantize(weight.t()).dequantize(), quantize(weight.t().contiguous()).dequantize())


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda w, c: quantize_rtn(w[0]), "quantize_rtn: weight is shape"),
        (lambda w, c: quantize_rtn(w, 1), "bits is 1"),
        (lambda w, c: quantize_rtn(w, 9), "bits is 9"),
        (lambda w, c: quantize_rtn(w, 4, 0), "group_size is 0"),
        (lambda w, c: quantize_rtn(w, scale_dtype=torch.int8), "scale_dtype is"),
        (lambda w, c: quantize_rtn(w.int()), "weight is int32"),
        (lambda w, c: quantize_rtn(w[:0]), "neither of them 0"),
        (lambda w, c: quantize_nf4(w, 48), "quantize_nf4: block_size is 48"),
        (lambda w, c: quantize_nf4(w.double()), "weight is float64"),
        (lambda w, c: quantize_nf4(w[:, :0]), "neither of them 0"),
        (lambda w, c: quantize_int8(w[0]), "quantize_int8: weight is shape"),
        (lambda w, c: quantize_fp8(w, (0, 1)), r"block is \(0, 1\)"),
        (lambda w, c: quantize_fp8(w, 128), r"quantize_fp8: block is 128, expected \(rows, columns\)"),
        (lambda w, c: quantize_rtn(w / 0), "quantize_rtn: weight is not finite"),
        (lambda w, c: quantize_gptq(w.where(w < 0, torch.nan), c), "quantize_gptq: weight is not finite"),
        (lambda w, c: quantize_awq(w / 0, c), "quantize_awq: weight is not finite"),
        (lambda w, c: quantize_rtn(w.sign() * 1e6), r"weight is 1e\+06 at most, expected up to 4.91e"),
        (lambda w, c: quantize_hqq(w, 4, -2), "group_size is -2"),
        (lambda w, c: quantize_gptq(w, c, damp=0), "damp is 0"),
        (lambda w, c: quantize_gptq(w, None), "quantize_gptq: calibration is NoneType, expected a metate.quant.Calib"),
        (lambda w, c: quantize_awq(w, w), "quantize_awq: calibration is Tensor"),
        (lambda w, c: search_awq_scale([], c), "search_awq_scale: weights is list, expected .* one or more"),
        (lambda w, c: quantize_awq(w, c, scale=torch.ones(3)), "scale is shape"),
        (lambda w, c: quantize_awq(w, c, scale=1.0), "scale is float"),
        (lambda w, c: quantize_awq(w, c, scale=torch.zeros(192)), "all positive"),
        (lambda w, c: Calibration(None), "Calibration: in_features is None"),
        (lambda w, c: Calibration(4).add(torch.ones(2, 3)), "x is shape"),
        (lambda w, c: Calibration(4).add(torch.ones(2, 4).int()), "x is int32"),
    ],
)
def test_wrong_arguments_are_named(layer, calibration, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(layer[0], calibration)


# Other values in the same format.

FORMATS = {
    "nf4": quantize_nf4,
    "nf4 in rows of odd length": lambda w: quantize_nf4(w[:, :99]),
    "4 bits": lambda w: quantize_rtn(w, 4, 32),
    "4 bits with zeros": lambda w: quantize_rtn(w, 4, 50, symmetric=False),
    "3 bits": lambda w: quantize_rtn(w, 3, -1),
    "int8": lambda w: bitsandbytes.lower_int8(bitsandbytes.quantize_int8(w)),
    "hqq": lambda w: quantize_hqq(w, 4, 50),
    "fp8": lambda w: quantize_fp8(w, (32, 64)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_values_in_the_same_format(name, layer):
    quantise = FORMATS[name]
    weight = quantise(layer[0])
    dense = weight.dequantize()
    assert torch.equal(requantize(weight, dense).dequantize(), dense), "what a weight holds it goes on holding"
    other = dense + 0.4 * dense.std() * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    other[3] *= 2  # beyond the range
    made = requantize(weight, other)
    for field, tensor in weight.tensors.items():
        assert made.tensors[field].shape == tensor.shape and made.tensors[field].dtype == tensor.dtype
    best = quantise(other).dequantize()
    assert (made.dequantize() - other).norm() < 1.05 * (best - other).norm()
    assert (made.dequantize()[3] - other[3]).norm() < 1.05 * (best[3] - other[3]).norm()


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: TYPES[kind].name)
def test_other_values_in_gguf_blocks(kind):
    block, g = TYPES[kind], torch.Generator().manual_seed(kind)
    weight = lower(block, torch.randint(0, 256, (24, 2, block.size), generator=g, dtype=torch.uint8))
    sane = {name: torch.rand_like(t) + 0.5 for name, t in weight.tensors.items()
            if name != "codebook" and t.is_floating_point()}  # fmt: skip
    weight = dataclasses.replace(weight, **sane)
    dense = weight.dequantize()
    assert torch.equal(requantize(weight, dense).dequantize(), dense)
    other = dense + 0.3 * dense.std() * torch.randn_like(dense)
    made = requantize(weight, other)
    assert made.nbytes == weight.nbytes and (made.dequantize() - other).norm() < (dense - other).norm()


def test_other_values_keep_the_order_of_columns(layer, calibration):
    weight = quantize_gptq(layer[0], calibration, 4, 32, act_order=True)
    made = requantize(weight, layer[0])
    assert made.permutation is weight.permutation
    assert (made.dequantize() - layer[0]).norm() < 0.12 * layer[0].norm()
    rows = quantize_rtn(layer[0], 4, 32)
    assert torch.equal(requantize(rows.in_tiles(), layer[0]).codes, requantize(rows, layer[0]).codes)


def test_other_values_that_do_not_fit_are_refused(layer):
    weight = quantize_nf4(layer[0])
    for values, message in ((layer[0][:3], "values is shape"), (layer[0] * torch.nan, "not finite")):
        with pytest.raises(ValueError, match=message):
            requantize(weight, values)
    with pytest.raises(TypeError, match="weight is Tensor"):
        requantize(layer[0], layer[0])
