"""Results do not depend on torch's settings of the whole process: its default dtype and device, autocast."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import outputs, run, same_bits

import metate
from metate import quant
from metate.compat import faiss
from metate.models import Llama, LlamaConfig
from metate.nn import MoE, ProductQuantizer
from metate.op import REGISTRY
from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex

X = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)


@contextlib.contextmanager
def default(**setting):
    """As other code sets it for itself; "meta" stands for a device that this machine may lack."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(setting.get("dtype", dtype))
    torch.set_default_device(setting.get("device"))
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


SETTINGS = {
    "float64": lambda: default(dtype=torch.float64),
    "bfloat16": lambda: default(dtype=torch.bfloat16),
    "meta": lambda: default(device="meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.mark.parametrize("setting", [SETTINGS[name] for name in SETTINGS if name != "autocast"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_operators(op, backend, setting):
    if backend not in op.implementations("cpu"):
        pytest.skip("not built")
    for case in op.domain.cases[1:4]:
        args = op.example(case, torch.float32)
        expected = run(op, backend, args)
        with setting():
            op.forget_plans()  # checks anew
            got = run(op, backend, args)
        assert [x.device for x in outputs(got)] == [x.device for x in outputs(expected)] and same_bits(got, expected)


INDEXES = {
    "flat": (lambda: FlatIndex(16), {}),
    "sq8, cosine": (lambda: FlatIndex(16, "cosine", storage="sq8"), {}),
    "product, rotated, refined": (lambda: PQIndex(16, 4, 4, opq=True, refine="sq8"), {}),
    "lists": (lambda: IVFFlatIndex(16, 4), {"nprobe": 2}),
    "codes in lists": (lambda: IVFPQIndex(16, 4, 4, 4, opq=True, refine="float16"), {"nprobe": 2}),
}


def use_index(name):
    make, options = INDEXES[name]
    index = make()
    index.train(X)
    index.add(X)
    index.add_with_ids(X[:9] + 1, np.arange(1000, 1009))
    index.remove_ids([3, 4])
    found = [index.search(X[:5] + 0.1, 7, **options), index.range_search(X[:2], 9.0), index.search(X[:0], 3, **options)]
    tensors = index.search(torch.from_numpy(X[:5]), 3, **options)
    return [*(a for part in found for a in part), index.reconstruct([5, 1003]), *(t.numpy() for t in tensors)]


@setting
@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name, setting):
    expected = use_index(name)
    with setting():
        got = use_index(name)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def use_faiss(description):
    index = faiss.index_factory(16, description)
    index.train(X)
    index.add(X)
    index.remove_ids(np.arange(3))
    return index.search(X[:5], 7)


@setting
@pytest.mark.parametrize("description", ["OPQ4_8,IVF4,PQ4x4", "IVF4,SQ8", "PQ4x4fs"])
def test_faiss(description, setting):
    expected = use_faiss(description)
    with setting():
        got = use_faiss(description)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@setting
def test_generation(setting):
    model = Llama(LlamaConfig(256, 32, 64, 2, 4, 2, 8)).initialize(torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=50, draft="ngram", cache_dtype="int8")

    def only_even(tokens):
        return (torch.arange(256, device="cpu") % 2 == 0) if len(tokens) % 2 else None

    with torch.no_grad(), setting():
        got = metate.generate(model, [[1, 2, 1, 2], [7]], constraint=only_even, **options)
    assert all(len(text.tokens) == 9 and all(token % 2 == 0 for token in text.tokens[1::2]) for text in got)
    if setting is not SETTINGS["autocast"]:
        expected = metate.generate(model, [[1, 2, 1, 2], [7]], constraint=only_even, **options)
        assert [text.tokens for text in got] == [text.tokens for text in expected]


@setting
def test_layers(setting):
    x = torch.from_numpy(X[:20])
    with setting():
        moe = MoE(16, 8, 4, 2, correction=True, device="cpu", dtype=torch.float32)
        quantizer = ProductQuantizer(16, 4, 4, device="cpu")
        out = moe(x)
        moe.update_bias()
        out.float().sum().backward()
        quantizer.fit(x)
        codes = quantizer.encode(x)
    assert moe.correction_bias.dtype == quantizer.codebooks.dtype == torch.float32
    assert moe.router.weight.grad is not None
    again = ProductQuantizer(16, 4, 4)
    again.fit(x)
    assert torch.equal(again.encode(x), codes)


QUANTISERS = {
    "nf4": (lambda w, c: quant.quantize_nf4(w), "bitsandbytes"),
    "fp4, nested": (lambda w, c: quant.quantize_fp4(w, nested=True), "bitsandbytes"),
    "rtn": (lambda w, c: quant.quantize_rtn(w, 4, 16, symmetric=False), "gptq"),
    "hqq": (lambda w, c: quant.quantize_hqq(w, 4, 16), "metate"),
    "fp8": (lambda w, c: quant.quantize_fp8(w, (16, 16)), "metate"),
    "gptq": (lambda w, c: quant.quantize_gptq(w, c, 4, 16, act_order=True, static_groups=True), "gptq"),
    "awq": (lambda w, c: quant.quantize_awq(w, c, 4, 16)[0], "awq"),
}


def use_quantiser(name, folder):
    """A weight to low bits, to a file and back; both as dense ones."""
    quantise, method = QUANTISERS[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float32, device="cpu")
    inputs = torch.randn(40, 64, generator=generator, dtype=torch.float32, device="cpu")
    found = quantise(weight, quant.Calibration(64).add(inputs))
    quant.save_quantized(folder, {"a": found}, method)
    read = quant.load_quantized(folder)["a"]
    return [found.dequantize(), read.dequantize(), metate.quant_linear(inputs, read)]


@setting
@pytest.mark.parametrize("name", QUANTISERS)
def test_quantisers(name, setting, tmp_path):
    with setting():
        got = use_quantiser(name, tmp_path)
    expected = use_quantiser(name, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))
    if setting is not SETTINGS["autocast"]:
        assert torch.equal(got[2], expected[2])


def test_codebooks_are_those_of_any_caller(tmp_path):
    """Whatever is set where they are first wanted: they are kept."""
    with default(device="meta"), torch.inference_mode():
        for name in ("nf4", "fp4, nested", "fp8"):
            QUANTISERS[name][0](torch.randn(16, 64, device="cpu"), None)
    x = torch.randn(3, 64, requires_grad=True)
    for name in ("nf4", "fp4, nested", "fp8"):
        metate.quant_linear(x, QUANTISERS[name][0](torch.randn(16, 64), None)).sum().backward()
    assert x.grad.isfinite().all()
