"""Codes in tiles: the results are those of rows, bit for bit, and no second copy of a weight stays behind."""

import copy
import gc
import io
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch

import metate
from metate import library
from metate.low_bit import TILES, pack_codes, rows_of, tiles_of
from metate.nn import QuantLinear
from metate.ops.quant_linear.declaration import inputs, weight_case

FORMS = [
    ("codebook", 64, {}),
    ("codebook", 32, {"super_groups": 3}),
    ("codebook", 4096, {"permuted": True}),
    ("symmetric", 96, {"scales": "bfloat16"}),
    ("zeros", 128, {"scales": "float16"}),
    ("zeros", 32, {"permuted": True}),
    ("offsets", 32, {"super_groups": 8}),
]  # GGUF's two levels, GPTQ's and AWQ's zeros, NF4's codebook
SIZES = [(16, 32), (48, 96), (80, 416), (32, 1056), (272, 1184)]  # panels, blocks and spans that end early
ROWS = (1, 2, 4, 7, 9, 16, 17, 40)


def weight(N, K, form, group, **flags):
    given = inputs(weight_case(1, N, K, 4, group, form, **flags), torch.float32, torch.Generator().manual_seed(N + K))
    names = ("scales", "super_scales", "super_groups", "zero", "zeros", "offsets", "super_offsets", "codebook")
    return metate.QuantizedWeight(
        (N, K), 4, group, given["codes"], permutation=given["permutation"], **{name: given[name] for name in names}
    )


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def products(w, dtype):
    """Of few and many rows, with activations as they are and in 8 bits; the gradient, and W itself."""
    x = torch.randn(max(ROWS), w.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [metate.quant_linear(x[:M], w) for M in ROWS]
    if dtype != torch.float64:
        found += [metate.quant_linear(x[:M], w, activation="int8") for M in ROWS]
        found.append(w.dequantize(dtype))
    leaf = x[:7].clone().requires_grad_()
    metate.quant_linear(leaf, w).sum().backward()
    return [*found, leaf.grad]


def check_everything():
    for i, (form, group, flags) in enumerate(FORMS * 2):
        N, K = SIZES[i % len(SIZES)]
        w = weight(N, K, form, group, **flags)
        tiled = w.in_tiles()
        assert tiled.codes.dtype == TILES
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for number, (got, expected) in enumerate(zip(products(tiled, dtype), products(w, dtype), strict=True)):
                assert same_bits(got, expected), (N, K, form, group, flags, dtype, number)


@pytest.mark.parametrize("isa", library.isas())
def test_results_are_those_of_rows_bit_for_bit(isa):
    code = "from test_quant_tiles import check_everything; check_everything()"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "METATE_ISA": isa, "PYTHONPATH": paths}, check=True)


@pytest.mark.parametrize("form,group,flags", FORMS)
def test_results_do_not_depend_on_threads_or_on_who_packs_x(form, group, flags):
    w = weight(608, 1184, form, group, **flags).in_tiles()
    x = torch.randn(20, 1184).bfloat16()
    whole, threads = metate.quant_linear(x, w), torch.get_num_threads()
    try:
        for n in (1, 2, 40):
            torch.set_num_threads(n)
            for M in (1, 2, 3, 4, 7, 8, 13, 16):
                assert same_bits(metate.quant_linear(x[:M], w), whole[:M]), (n, M)
    finally:
        torch.set_num_threads(threads)


def test_tiles_are_the_bytes_of_rows_in_another_order():
    codes = pack_codes(torch.randint(0, 16, (48, 96), dtype=torch.uint8), 4)
    tiles, words = tiles_of(codes), codes.view(TILES)
    for row, j in ((0, 0), (17, 5), (47, 11)):
        t, r = divmod(row, 16)
        assert tiles[16 * t : 16 * t + 16].flatten()[16 * j + r] == words[row, j]
    assert torch.equal(rows_of(tiles), codes)
    assert torch.equal(rows_of(tiles_of(codes[:16])), codes[:16])
    stacked = torch.stack([codes, codes.flip(0)])
    assert torch.equal(rows_of(tiles_of(stacked)), stacked)


def test_experts_and_adapters_read_tiles_too():
    weights = [weight(48, 416, "zeros", 32) for _ in range(3)]
    rows = metate.QuantizedExperts.stack(weights)
    tiles = rows.in_tiles()
    assert tiles.codes.dtype == TILES
    assert same_bits(tiles[2].dequantize(), weights[2].dequantize())
    offsets = torch.tensor([0, 1, 5, 30], dtype=torch.int32)
    for dtype, rounded in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x = torch.randn(30, 416).to(dtype)
        got, expected = (
            metate.grouped_linear(x, w, offsets, int8_activations=rounded, order=None) for w in (tiles, rows)
        )
        assert same_bits(got, expected)
    assert torch.equal(metate.QuantizedExperts.stack([weights[0].in_tiles()] * 2).in_rows().codes[1], weights[0].codes)
    x, A, B = torch.randn(5, 416), torch.randn(4, 416), torch.randn(48, 4)
    assert same_bits(*(metate.lora_linear(x, w, A, B) for w in (weights[0].in_tiles(), weights[0])))


@pytest.mark.parametrize(
    "N,K,bits,group", [(24, 64, 4, 32), (32, 40, 4, 8), (32, 96, 4, 48), (32, 64, 8, 32), (0, 64, 4, 32)]
)
def test_what_does_not_fit_stays_in_rows(N, K, bits, group):
    given = inputs(weight_case(1, N, K, bits, group, "symmetric"), torch.float32, torch.Generator().manual_seed(0))
    w = metate.QuantizedWeight((N, K), bits, group, given["codes"], given["scales"], zero=given["zero"])
    assert w.in_tiles() is w
    with pytest.raises(metate.FormatError, match="codes is int32, expected uint8; int32 is for 4 bits"):
        metate.QuantizedWeight((N, K), bits, group, torch.zeros(N, K // 8, dtype=TILES), w.scales)


def test_malformed_tiles_are_refused():
    w = weight(32, 64, "symmetric", 32).in_tiles()
    with pytest.raises(metate.FormatError, match=r"codes is shape \(32, 7\), expected \(32, 8\)"):
        metate.QuantizedWeight(w.shape, 4, 32, w.codes[:, :7], w.scales)
    with pytest.raises(ValueError, match="codes is int32 for 32 × 40 weights"):
        torch.ops.metate.quant_linear(torch.randn(1, 40), w.codes, *w.arguments[1:], None, *w.scalars)
    with metate.use("triton"), pytest.raises(NotImplementedError, match="codes in tiles: in rows"):
        metate.quant_linear(torch.randn(1, 64), w)


def test_strided_tiles_are_read_as_they_are_meant():
    w = weight(32, 96, "zeros", 32).in_tiles()
    wide = torch.zeros(32, 15, dtype=TILES)
    wide[:, :12] = w.codes
    gaps = metate.QuantizedWeight(w.shape, 4, 32, wide[:, :12], w.scales, zero=w.zero, zeros=w.zeros)
    x = torch.randn(3, 96)
    assert same_bits(metate.quant_linear(x, gaps), metate.quant_linear(x, w))


def test_a_layer_keeps_one_copy():
    w = weight(512, 1024, "codebook", 64)
    rows = weakref.ref(w.codes)
    layer = QuantLinear(w)
    x = torch.randn(2, 1024)
    expected, codes, size = layer(x), w.codes.clone(), w.nbytes
    del w
    gc.collect()
    assert rows() is None, "the rows are still there"
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
    assert sum(held.values()) < size + 200
    assert torch.equal(layer.state_dict()["codes"], codes), "a state has rows"
    assert layer.codes.dtype == TILES
    assert same_bits(layer(x), expected)


def test_layers_come_back_from_states_copies_and_devices():
    layer, other = (QuantLinear(weight(32, 96, "zeros", 32)) for _ in range(2))
    other.codes.zero_()
    x = torch.randn(2, 96)
    expected, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert same_bits(other(x), expected)
        assert other.codes.dtype == TILES
        other.codes.zero_()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert same_bits(again(x), expected)
    moved = copy.deepcopy(layer).to("meta")
    assert moved.codes.dtype == torch.uint8
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(state)
    assert moved.codes.dtype == TILES
    assert same_bits(moved(x), expected)
    assert same_bits(torch.func.functional_call(layer, state, (x,)), expected)
    assert same_bits(torch.compile(layer, backend="aot_eager")(x), expected)
    assert same_bits(torch.vmap(lambda row: metate.quant_linear(row[None], layer.weight)[0])(x), expected)
