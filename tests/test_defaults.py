"""Results do not depend on torch's settings of the whole process: its default dtype and device, autocast."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import outputs, run, same_bits

import metate
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
