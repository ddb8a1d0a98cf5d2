"""What functions of every family take, numbers of numpy for Python's, and what they refuse by name."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import metate
from metate.generate import Sampling
from metate.masks import AttentionMask
from metate.nn import LoraLinear, MoE
from metate.op import REGISTRY
from metate.quant import quantize_fp8, quantize_rtn
from metate.search import IVFPQIndex

KINDS = {int: np.int64, float: np.float64, bool: np.bool_}


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_operators(op):
    args = op.example(op.domain.cases[1], torch.float32)
    ours = tuple(KINDS[type(a)](a) if type(a) in KINDS else a for a in args)
    expected, got = ((r if isinstance(r, tuple) else (r,)) for r in (op.trial(args), op.trial(ours)))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_attention():
    q = torch.randn(1, 9, 2, 8)
    options = dict(window=(3, 2), scale=0.25, softcap=5.0, dropout_p=0.5, seed=7, offset=2, causal=True, top_left=True)
    expected = metate.attention(q, q, q, **options)
    changed = dict(
        window=(np.int64(3), np.int8(2)), scale=np.float32(0.25), softcap=Fraction(5), dropout_p=np.float16(0.5),
        seed=np.uint64(7), offset=np.uint8(2), causal=np.bool_(True), top_left=np.bool_(True),
    )  # fmt: skip
    assert torch.equal(metate.attention(q, q, q, **changed), expected)
    with pytest.raises(TypeError, match=r"scale is '1', expected a number"):
        metate.attention(q, q, q, scale="1")
    with pytest.raises(TypeError, match="window"):
        metate.attention(q, q, q, window=(np.float32(3), 2))


def test_routing_and_clustering():
    logits = torch.randn(9, 6)
    for policy in ("topk", "expert_choice", "sinkhorn"):
        plain = metate.moe_route(logits, 2, policy=policy, scaling=2.0, capacity_factor=1.5)
        given = dict(scaling=np.float32(2), capacity_factor=np.float64(1.5))
        route = metate.moe_route(logits, np.int32(2), policy=policy, **given)
        assert torch.equal(route.experts, plain.experts) and torch.equal(route.weights, plain.weights)
    x = torch.randn(50, 4)
    expected = metate.kmeans(x, 3, iterations=4, seed=5)
    got = metate.kmeans(x, np.int64(3), iterations=np.int16(4), seed=np.uint32(5))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    with pytest.raises(ValueError, match="k is True"):
        metate.kmeans(x, True)


def test_weights_and_layers():
    w = torch.randn(8, 64)
    a, b = quantize_rtn(w, 4, 32), quantize_rtn(w, np.int64(4), np.int32(32))
    assert torch.equal(a.dequantize(), b.dequantize()) and a.scalars == b.scalars and type(b.bits) is int
    assert torch.equal(quantize_fp8(w, (8, 32)).codes, quantize_fp8(w, (np.int64(8), np.int64(32))).codes)
    layer = LoraLinear(torch.nn.Linear(8, 4), np.int64(2), adapters=np.int64(3))
    assert layer(torch.randn(2, 8), np.int64(1)).shape == (2, 4)
    assert MoE(np.int64(8), np.int64(4), np.int64(3), np.int64(2))(torch.randn(2, 8)).shape == (2, 8)
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.float32(0.25), np.uint64(9)).top_k == 3
    assert AttentionMask.block_sparse(torch.ones(2, 2), (np.int64(4), np.int64(4))).block_size == (4, 4)


def test_indexes(tmp_path):
    x = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    results = []
    for i in (int, np.int64):
        index = IVFPQIndex(i(8), i(4), i(2), i(4), seed=i(3))
        index.train(x)
        index.add(x)
        index.save(tmp_path / i.__name__)
        results.append(index.search(x[:5], i(3), nprobe=i(2), refine_factor=i(2)))
        index.nprobe = i(2)
        results.append(index.search(x[:5], i(3)))
        assert type(index.range_search(x[:2], np.float32(1))[1]) is np.ndarray
    for distances, ids in results[1:]:
        assert np.array_equal(distances, results[0][0]) and np.array_equal(ids, results[0][1])


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_refused(layout):
    """Those of the old layout have no shape to ask for."""

    def nested(*shape):
        return torch.nested.nested_tensor([torch.randn(5, *shape), torch.randn(9, *shape)], layout=layout)

    x, rows, q = nested(4, 8), nested(8), torch.randn(2, 9, 4, 8)
    starts, weight = torch.tensor([0, 9], dtype=torch.int32), quantize_rtn(torch.randn(3, 8), 4, 8)
    route = metate.moe_route(torch.randn(14, 4), 2)
    for call in (
        lambda: metate.attention(x, x, x),
        lambda: metate.attention(q, x, q),
        lambda: metate.attention(q, q, q, bias=x),
        lambda: metate.attention_varlen(x, x, x, starts, starts),
        lambda: metate.paged_attention(x, x, x, starts, starts),
        lambda: metate.quant_linear(rows, weight),
        lambda: metate.lora_linear(rows, weight, torch.randn(2, 8), torch.randn(3, 2)),
        lambda: metate.gated_activation(rows),
        lambda: metate.moe_route(rows, 2),
        lambda: metate.moe_mlp(rows, route, torch.randn(4, 6, 8), torch.randn(4, 8, 3)),
        lambda: metate.topk_distances(rows, torch.randn(4, 8), 2, metric="cosine"),
        lambda: metate.kmeans(rows, 2),
    ):
        with pytest.raises(TypeError, match="a nested tensor, expected a dense one"):
            call()


WRONG = {
    "backend": (lambda x: metate.topk_distances(x, x, 2, backend="gpu"), "topk_distances: backend is 'gpu', expected"),
    "metric": (lambda x: metate.topk_distances(x, x, 2, metric=["l2"]), "topk_distances: metric is"),
    "M": (lambda x: metate.pq_interleave(x.to(torch.uint8), None, 4), "pq_interleave: M is None"),
    "seed": (lambda x: metate.kmeans(x, 2, seed=1.5), "kmeans: seed is 1.5"),
    "meta": (lambda x: metate.kmeans(x.to("meta"), 2), "kmeans: x is a meta tensor"),
    "iterations": (lambda x: metate.kmeans(x, 2, iterations=2**70), "kmeans: iterations is"),
    "logits": (lambda x: metate.moe_route(x.long(), 2, policy="sinkhorn"), "moe_route: logits is int64"),
    "noise": (lambda x: metate.moe_route(x, 2, noise=x.to("meta")), "moe_route: noise is"),
    "capacity": (lambda x: metate.moe_route(x, 2, capacity_factor=2**70), "moe_route: capacity_factor is"),
    "top_k": (lambda x: metate.moe_route(x, torch.tensor([1, 2])), "moe_route: top_k is tensor"),
    "routing's backend": (lambda x: metate.moe_route(x, 2, backend="gpu"), "moe_route: backend is 'gpu', expected"),
    "sequences": (
        lambda x: metate.moe_route(x, 2).load_balance_loss(sequences="2"),
        "load_balance_loss: sequences is '2', expected a divisor",
    ),
    "counts": (
        lambda x: metate.moe_route(x, 2).load_balance_loss(counts=torch.ones(8).to_sparse()),
        "load_balance_loss: counts is torch.sparse_coo, expected a dense",
    ),
    "lora": (
        lambda x: metate.grouped_linear(
            x, x[None], torch.tensor([0, 8], dtype=torch.int32), lora=(torch.ones(1, 2, 8), torch.ones(1, 1, 2))
        ),
        r"grouped_linear: lora\[1\] is of shape \(1, 1, 2\), expected \(1, 8, 2\) beside w",
    ),
    "bias of a layer": (
        lambda x: metate.moe_mlp(
            x, metate.moe_route(x, 2), torch.ones(8, 6, 8), torch.ones(8, 8, 3), bias_gate_up=torch.ones(8, 5)
        ),
        r"moe_mlp: bias_gate_up is of shape \(8, 5\), expected \(num_experts, out_features\) with out_features = 6",
    ),
    "rows of low-bit experts": (
        lambda x: metate.grouped_linear(x, metate.QuantizedExperts.quantize(x[None], quantize_rtn), x[0]),
        "grouped_linear: offsets is float32, expected int32",
    ),
    "flag": (
        lambda x: metate.paged_attention(x[None], *[x[None, None]] * 2, x[:1].int(), x[0, :1].int(), return_lse="no"),
        "paged_attention: return_lse is 'no', expected True or False",
    ),
    "rate": (lambda x: metate.update_bias(x[0], x[0], rate=1j), "update_bias: rate is 1j"),
    "dtype": (lambda x: metate.dequantize(quantize_rtn(x), "float16"), "dequantize: dtype is 'float16'"),
    "out": (lambda x: metate.dequantize(quantize_rtn(x), out=x.numpy()), "dequantize: out is ndarray"),
    "skip": (lambda x: metate.quantize_model(torch.nn.Linear(4, 4), skip=None), "quantize_model: skip is None"),
    "function": (lambda x: metate.explain(None), "explain: function is None"),
    "another's function": (lambda x: metate.explain(torch.reshape, x, (3,)), "function is reshape, which raised"),
    "no function of ours": (lambda x: metate.explain(abs, x), "explain: function is abs, expected a public operator"),
    "mask": (
        lambda x: metate.attention(*[x[None, :, None]] * 3, mask=AttentionMask.documents(torch.zeros(99))),
        "attention: mask.intervals is of shape",
    ),
    "dim": (lambda x: IVFPQIndex(2**70, 4, 2, 4), "IVFPQIndex: dim is"),
}


@pytest.mark.parametrize("call,match", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, match):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=match):
        call(torch.randn(8, 8))


def test_kmeans_takes_weights_that_learn():
    x, weights = torch.randn(20, 3), torch.rand(20)
    expected = metate.kmeans(x, 2, weights=weights)[0]
    assert torch.equal(metate.kmeans(x, 2, weights=weights.requires_grad_())[0], expected)
