"""Mixtures of experts: what the declarations of the operators cannot say."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

import metate
from metate import FormatError, QuantizedExperts, library
from metate.quant.rtn import quantize_rtn

ROUTERS = {
    "mixtral": ("MixtralTopKRouter", dict(renormalise=True)),
    "deepseek_v2": ("DeepseekV2TopkRouter", dict(groups=4, top_groups=2, scaling=3.0)),
    "deepseek_v3": (
        "DeepseekV3TopkRouter",
        dict(score="sigmoid", groups=4, top_groups=2, group_rule="sum", renormalise=True, scaling=2.5),
    ),
    "gpt_oss": ("GptOssTopKRouter", dict(score="softmax_topk")),
}
LINEAR = [p.values[1:] for p in BACKENDS if p.values[0].name == "grouped_linear"]
ROUTE = [p.values[1:] for p in BACKENDS if p.values[0].name == "moe_topk"]
ACTIVATION = [p.values[1:] for p in BACKENDS if p.values[0].name == "gated_activation"]
SORT = [p.values[1:] for p in BACKENDS if p.values[0].name == "moe_sort"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(route: metate.Route, number: int) -> Tensor:
    """(tokens, experts) weights."""
    dense = torch.zeros(route.experts.shape[0], number + 1, dtype=route.weights.dtype)
    return dense.scatter_add(1, route.experts.long(), route.weights)[:, :number]


@pytest.mark.parametrize("family", ROUTERS)
def test_routes_as_transformers_does(family):
    import importlib

    name, options = ROUTERS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        num_experts_per_tok=3, num_local_experts=16, num_experts=16, hidden_size=24, routed_scaling_factor=3.0,
        n_group=4, topk_group=2, norm_topk_prob=options.get("renormalise", False), topk_method="group_limited_greedy",
    )  # fmt: skip
    config.routed_scaling_factor = options.get("scaling", 1.0)
    router = getattr(module, name)(config)
    for i, tensor in enumerate([*router.parameters(), *router.buffers()]):
        tensor.data.copy_(0.3 * random(*tensor.shape, seed=i))
    logits, weights, experts = router(random(50, 24, seed=9))
    bias = getattr(router, "e_score_correction_bias", None)
    route = metate.moe_route(logits, 3, bias=bias, **options)
    expected = torch.zeros(50, 16).scatter_add(1, experts, weights)
    torch.testing.assert_close(chosen(route, 16), expected, rtol=1e-5, atol=1e-6)


def test_of_equal_experts_the_first_is_chosen():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-math.inf, 1.0, -math.inf, 1.0]])
    for score in ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus"):
        experts = metate.moe_route(logits, 3, score=score).experts
        assert experts.tolist() == [[1, 2, 3], [0, 1, 2], [1, 3, 0]]
    grouped = metate.moe_route(torch.zeros(1, 6), 2, score="sigmoid", groups=3, top_groups=1, group_rule="sum")
    assert grouped.experts.tolist() == [[0, 1]]


@pytest.mark.parametrize("device,backend", SORT, ids=lambda value: value)
def test_sorts_exactly(device, backend):
    experts = torch.randint(-1, 8, (300, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with metate.use(backend):
        order, inverse, offsets = (x.cpu() for x in metate.moe_sort(experts.to(device), 7))
    flat = experts.flatten().tolist()
    expected = sorted((e, slot) for slot, e in enumerate(flat) if 0 <= e < 7)
    assert order[: len(expected)].tolist() == [slot for _, slot in expected]
    assert (order[len(expected) :] == -1).all()
    assert offsets.tolist() == [sum(e < limit for e, _ in expected) for limit in range(8)]
    rows = {slot: row for row, (_, slot) in enumerate(expected)}
    assert inverse.flatten().tolist() == [rows.get(slot, -1) for slot in range(len(flat))]


def test_capacity_drops_by_position_and_by_probability():
    logits = torch.tensor([[0.0, 3.0, 0.1], [0.0, 5.0, 0.2], [4.0, 0.0, 0.3], [0.0, 4.0, 0.4]])
    route = metate.moe_route(logits, 1, policy="switch", capacity_factor=1.0)  # two of each expert
    assert route.experts.flatten().tolist() == [1, 1, 0, 3] and route.weights[3] == 0
    assert route.counts().tolist() == [1, 3, 0]
    route = metate.moe_route(logits, 1, policy="switch", capacity_factor=1.0, drop="probability")
    assert route.experts.flatten().tolist() == [3, 1, 0, 1]
    both = metate.moe_route(logits, 2, capacity_factor=0.75)  # two of each; first choices go before second ones
    assert both.experts.tolist() == [[1, 2], [1, 2], [0, 3], [3, 3]]
    assert (both.weights[both.experts == 3] == 0).all()


def test_gshard_keeps_the_second_by_chance():
    logits = random(4000, 8)
    route = metate.moe_route(logits, 2, policy="gshard", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metate.moe_route(logits, 2, renormalise=True).experts, route.chosen)
    second = metate.moe_route(logits, 2, renormalise=True).weights[:, 1]
    kept = (route.experts[:, 1] < 8).float()
    assert abs(float(kept.mean() - (2 * second).clamp(max=1).mean())) < 0.03
    assert (route.experts[:, 0] < 8).all()


def test_experts_choose_their_tokens():
    logits = random(40, 5)
    route = metate.moe_route(logits, 2, policy="expert_choice")
    scores = torch.softmax(logits, -1)
    dense = chosen(route, 5)
    for expert in range(5):
        best = scores[:, expert].topk(16).indices
        assert dense[:, expert].nonzero().flatten().tolist() == sorted(best.tolist())
        torch.testing.assert_close(dense[best, expert], scores[best, expert])
    assert route.rows == 80 and int((route.experts < 5).sum()) == 80


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"])
def test_a_choice_can_be_given(score):
    """Replayed, it gives the weights and gradients of the call that chose; from a table, hash layers."""
    rule = dict(score=score, renormalise=score != "softmax_topk", scaling=2.5)
    logits = random(5, 7, 12).requires_grad_()
    first = metate.moe_route(logits, 3, bias=random(12, seed=1), groups=4, top_groups=2, **rule)
    replayed = metate.moe_route(logits, 3, experts=first.chosen.view(5, 7, 3).long(), **rule)
    assert torch.equal(replayed.experts, first.experts) and replayed.experts.dtype == torch.int32
    torch.testing.assert_close(replayed.weights, first.weights)
    compiled = torch.compile(lambda z, e: metate.moe_route(z, 3, experts=e, **rule), backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, first.chosen).weights, replayed.weights)
    grad = random(35, 3, seed=2)
    wanted, found = (torch.autograd.grad(route.weights, logits, grad)[0] for route in (first, replayed))
    torch.testing.assert_close(found, wanted)

    table = torch.arange(50)[:, None] % 12
    hashed = metate.moe_route(random(5, 12), 1, experts=table[[4, 4, 4, 7, 49]], capacity_factor=4.0)
    assert hashed.chosen.flatten().tolist() == [4, 4, 4, 7, 1]
    assert hashed.experts.flatten().tolist() == [4, 4, 12, 7, 1]  # an expert takes ⌈4 · 5 / 12⌉


def test_a_given_choice_is_checked():
    logits, experts = random(6, 4), torch.zeros(6, 2, dtype=torch.int32)
    for wrong, error in (
        ([[0, 1]], r"TypeError.*experts is list, expected a torch.Tensor"),
        (experts.float(), r"TypeError.*experts is float32, expected integers"),
        (experts[:5], r"ValueError.*experts is of shape \(5, 2\), expected \(…, 2\) for the 6 tokens of logits"),
        (experts + 4, r"ValueError.*experts is 4, expected 0 to 3"),
        (experts - 1, r"ValueError.*experts is -1, expected 0 to 3"),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            metate.moe_route(logits, 2, experts=wrong)
        assert re.search(error, f"{raised.type.__name__}: {raised.value}")
    for name, value in dict(bias=torch.zeros(4), groups=2, policy="gshard").items():
        with pytest.raises(ValueError, match=rf"metate.moe_route: {name} is .*a choice that is given does not look at"):
            metate.moe_route(logits, 2, experts=experts, **{name: value})


def test_sinkhorn_balances():
    logits = random(600, 6) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    greedy, even = (metate.moe_route(logits, 1, policy=policy).counts() for policy in ("topk", "sinkhorn"))
    assert greedy.max() > 400 and even.max() < 180
    route = metate.moe_route(logits, 2, policy="sinkhorn", score="sigmoid")
    torch.testing.assert_close(route.weights, torch.sigmoid(logits).gather(1, route.experts.long()))


def test_mixture_of_depths_takes_the_best_of_each_sequence():
    logits = random(3, 16, 1)
    route = metate.moe_route(logits, 1, policy="mixture_of_depths", capacity_factor=0.25)
    assert (route.experts.view(3, 16) == 0).sum(1).tolist() == [4, 4, 4]
    x, w = random(3, 16, 8), random(1, 8, 8, seed=1)
    out = metate.moe_mlp(x, route, w, torch.eye(8)[None], gating="none", activation="relu")
    expected = (x @ w[0].T).relu() * torch.sigmoid(logits)
    best = logits.squeeze(2).topk(4, 1).indices
    taken = torch.zeros(3, 16, 1).scatter(1, best[..., None], 1.0)
    torch.testing.assert_close(out, expected * taken, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_generator():
    logits, std = random(30, 4), random(30, 4, seed=1).abs()
    route = metate.moe_route(logits, 2, noise=std, generator=torch.Generator().manual_seed(3))
    noisy = logits + std * torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(route.experts, metate.moe_route(noisy, 2).experts)


def test_losses_are_their_formulas():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = random(60, 7).requires_grad_()
    route = metate.moe_route(logits, 3)
    torch.testing.assert_close(3 * route.load_balance_loss(), load_balancing_loss_func((logits,), 7, 3))
    first = torch.softmax(logits, -1).argmax(-1).bincount(minlength=7) / 60
    torch.testing.assert_close(route.load_balance_loss("gshard"), 7 * (first * torch.softmax(logits, -1).mean(0)).sum())
    nothing = metate.moe_route(logits[:0], 3)
    for loss in (nothing.load_balance_loss(), nothing.load_balance_loss(sequences=2), nothing.z_loss(),
                 nothing.load_balance_loss(counts=route.counts()), nothing.importance_loss()):  # fmt: skip
        assert loss.requires_grad and float(loss) == 0, "a process without tokens adds nothing"
    double = logits.detach().double()
    shares = metate.moe_route(double, 3).counts().double() / 180
    exact = 7 * (shares * torch.softmax(double, -1).mean(0)).sum()
    torch.testing.assert_close(metate.moe_route(double, 3).load_balance_loss(), exact, rtol=1e-14, atol=0)
    halves = [metate.moe_route(half, 3).load_balance_loss() for half in logits.chunk(2)]
    torch.testing.assert_close(route.load_balance_loss(sequences=2), sum(halves) / 2)
    torch.testing.assert_close(route.load_balance_loss(counts=route.counts()), route.load_balance_loss())
    torch.testing.assert_close(route.z_loss(), torch.logsumexp(logits, -1).square().mean())
    loads = torch.zeros(7).index_add(0, route.experts.flatten().long(), route.weights.flatten())
    torch.testing.assert_close(route.importance_loss(), loads.var(correction=0) / loads.mean() ** 2)
    route.load_balance_loss().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    scores = torch.sigmoid(logits)
    probabilities = metate.moe_route(logits, 3, score="sigmoid").probabilities()
    torch.testing.assert_close(probabilities, scores / scores.sum(-1, keepdim=True))
    bias = torch.zeros(3)
    metate.update_bias(bias, torch.tensor([9, 3, 6]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0]


def expected_layer(x: Tensor, route: metate.Route, w1: Tensor, w2: Tensor) -> Tensor:
    """Every expert on every token, and of that what was chosen."""
    gate, up = torch.einsum("td,end->ten", x, w1).chunk(2, -1)
    y = torch.einsum("ten,edn->ted", torch.nn.functional.silu(gate) * up, w2)
    return (chosen(route, w1.shape[0])[..., None] * y).sum(1)


def test_layer_and_its_gradients_equal_every_expert_on_every_token():
    leaves = [random(40, 24), random(40, 5, seed=1), 0.2 * random(5, 36, 24, seed=2), 0.2 * random(5, 24, 18, seed=3)]
    gradients = []
    for layer in (metate.moe_mlp, expected_layer):
        x, logits, w1, w2 = mine = [leaf.clone().requires_grad_() for leaf in leaves]
        route = metate.moe_route(logits, 2, capacity_factor=1.0, renormalise=True)
        out = layer(x, route, w1, w2)
        out.square().sum().backward()
        gradients.append([out, *(leaf.grad for leaf in mine)])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_shared_experts_take_every_token(biased):
    x, w1, w2 = random(9, 8), random(4, 12, 8, seed=1), random(4, 8, 6, seed=2)
    shared = [0.3 * random(2, 20, 8, seed=3), 0.3 * random(2, 8, 10, seed=4)]
    if biased:
        shared += [random(2, 20, seed=5), random(2, 8, seed=6)]
    leaves = [t.requires_grad_() for t in (x, *shared)]
    route = metate.moe_route(random(9, 4, seed=7), 2)
    out = metate.moe_mlp(x, route, w1, w2, gating="up_gate", shared=tuple(shared))
    expected = metate.moe_mlp(x, route, w1, w2, gating="up_gate")
    for w in zip(*shared, strict=True):
        up, gate = torch.nn.functional.linear(x, w[0], w[2] if biased else None).chunk(2, -1)
        expected = expected + torch.nn.functional.linear(
            torch.nn.functional.silu(gate) * up, w[1], w[3] if biased else None
        )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for got, want in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_shared_experts_that_do_not_fit_are_refused():
    x, route = random(9, 8), metate.moe_route(random(9, 4), 2)
    weights = random(4, 12, 8), random(4, 8, 6)
    with pytest.raises(ValueError, match=r"moe_mlp: shared is 1 of them, expected a tuple: w_gate_up, w_down and"):
        metate.moe_mlp(x, route, *weights, shared=weights[:1])
    with pytest.raises(ValueError, match=r"moe_mlp: shared\[1\] is of shape \(1, 7, 6\)"):
        metate.moe_mlp(x, route, *weights, shared=(random(1, 12, 8), random(1, 7, 6)))
    with pytest.raises(TypeError, match=r"moe_mlp: shared\[0\] is list, expected a torch.Tensor or"):
        metate.moe_mlp(x, route, *weights, shared=([], random(1, 8, 6)))


def in_one_call(call):
    """The result of the third call alike, if it took one direct call."""
    call(), call()
    before = library.direct_calls()
    out = call()
    return out if library.direct_calls() == before + 1 else None


@pytest.mark.skipif(not library.direct("moe_sort", None), reason="this torch has no C interface for exchanging tensors")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "float64", "quantised", "mixed"])
def test_a_layer_of_few_tokens_is_one_call_with_the_bits_of_its_operators(form):
    dtype = getattr(torch, form, torch.float32)
    x, w1, w2 = random(2, 3, 64).to(dtype), random(4, 128, 64, seed=1).to(dtype), random(4, 64, 64, seed=2).to(dtype)
    if form in ("quantised", "mixed"):
        w1 = QuantizedExperts.quantize(w1, lambda w: quantize_rtn(w, 4, group_size=32))
    if form == "quantised":
        w2 = QuantizedExperts.quantize(w2, lambda w: quantize_rtn(w, 4, group_size=32))
    route = metate.moe_route(random(6, 4, seed=3).to(dtype), 2)
    options = dict(limit=3.0, alpha=1.7, shift=1, gating="interleaved", bias_down=random(4, 64, seed=4).to(dtype))
    with torch.no_grad():
        out = in_one_call(lambda: metate.moe_mlp(x, route, w1, w2, **options))
        assert (out is None) == (form == "float64")  # whose products are the reference's
        order, inverse, offsets = metate.moe_sort(route.experts, 4)
        options.pop("bias_down"), options.pop("gating")
        h = metate.grouped_linear(x.view(6, 64), w1, offsets, order=order, k=2)
        h = metate.gated_activation(h, gating="interleaved", **options)
        y = metate.grouped_linear(h, w2, offsets, random(4, 64, seed=4).to(dtype))
        expected = metate.moe_unpermute(y, inverse, route.weights)
    if out is not None:
        assert out.shape == x.shape and torch.equal(out.view(6, 64), expected)


def test_int8_activations_of_experts_are_those_of_quant_linear():
    """Bit for bit, in one call or five; a little off the exact layer, without gradients, of low-bit weights alone."""
    x, dense = random(6, 128), [random(4, n, k, seed=n) / k**0.5 for n, k in ((256, 128), (128, 128))]
    w1, w2 = (QuantizedExperts.quantize(w, lambda one: quantize_rtn(one, 4, group_size=32)) for w in dense)
    route = metate.moe_route(random(6, 4, seed=3), 2)
    exact, rounded = (metate.moe_mlp(x, route, w1, w2, int8_activations=rounds) for rounds in (False, True))
    assert 1e-3 < float((rounded - exact).abs().max() / exact.abs().max()) < 3e-2
    assert torch.equal(metate.moe_mlp(x, route, w1, w2, int8_activations=True), rounded)
    expected = torch.zeros_like(x)
    for t in range(6):
        for e, weight in zip(route.experts[t].tolist(), route.weights[t], strict=True):
            hidden = metate.quant_linear(x[t : t + 1], w1[e], activation="int8")
            y = metate.quant_linear(metate.gated_activation(hidden), w2[e], activation="int8")
            expected[t] = torch.addcmul(expected[t], weight, y[0])
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"metate.grouped_linear: no gradient: .*int8_activations"):
        metate.moe_mlp(x.requires_grad_(), route, w1, w2, int8_activations=True).sum().backward()
    with pytest.raises(ValueError, match=r"moe_mlp: int8_activations is True, expected False beside a dense w"):
        metate.moe_mlp(x.detach(), route, *dense, int8_activations=True)


@pytest.mark.skipif(not library.direct("moe_sort", None), reason="this torch has no C interface for exchanging tensors")
def test_a_layer_is_not_one_call_where_its_operators_must_be_seen():
    x, w1, w2 = random(6, 8), random(4, 16, 8, seed=1), random(4, 8, 8, seed=2)
    route = metate.moe_route(random(6, 4, seed=3), 2)
    call = lambda: metate.moe_mlp(x, route, w1, w2)  # noqa: E731
    assert in_one_call(call) is not None
    with metate.use("reference"):
        assert in_one_call(call) is None
    assert metate.explain(metate.moe_mlp, x, route, w1, w2).op == "moe_sort"
    dropped = metate.moe_route(random(6, 4, seed=3), 2, policy="expert_choice")
    assert in_one_call(lambda: metate.moe_mlp(x, dropped, w1, w2)) is None
    w1.requires_grad_()
    assert call().grad_fn is not None
    with pytest.raises(ValueError, match="w_down"):
        metate.moe_mlp(x, route, w1, w2[:, :7])


@pytest.mark.parametrize("device,backend", LINEAR, ids=lambda value: value)
def test_rows_of_no_expert_are_zeros_and_never_read(device, backend):
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    x, w = random(20, 40).to(dtype), random(3, 24, 40, seed=1).to(dtype)
    offsets = torch.tensor([2, 9, 9, 15], dtype=torch.int32)
    clean = x.clone()
    x[:2] = x[15:] = math.nan
    with metate.use(backend):
        out = metate.grouped_linear(x.to(device), w.to(device), offsets.to(device)).cpu()
        few = metate.grouped_linear(x[:3].to(device), w.to(device), (offsets.clamp(max=3)).to(device)).cpu()
    assert (out[:2] == 0).all() and (out[15:] == 0).all()
    if backend != "reference" and (device, backend) != ("cpu", "triton"):  # its interpreter multiplies with BLAS
        assert torch.equal(out[2], few[2]), "a row's bits depend on its neighbours"
    expected = torch.cat([clean[2:9] @ w[0].T, clean[9:15] @ w[2].T])
    torch.testing.assert_close(out[2:15], expected, rtol=2e-2 if backend == "cuda" else 1e-4, atol=1e-1)


@pytest.mark.parametrize("columns", [301, 192, 512, 768, 2304, 3584])  # from 512 on: lanes of chains
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_the_same_bits_however_many_and_however_the_weight_lies(dtype, columns):
    x, w = random(210, columns).to(dtype), random(2, 150, columns, seed=1).to(dtype)
    for weight in (w, w.mT.contiguous().mT):
        many = metate.grouped_linear(x, weight, torch.tensor([0, 210, 210], dtype=torch.int32))
        for rows in range(1, 210) if columns == 301 else (1, 2, 3, 4, 5, 13, 48, 72, 97, 104):
            few = metate.grouped_linear(x[:rows], weight, torch.tensor([0, rows, rows], dtype=torch.int32))
            assert torch.equal(few, many[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weight_gradients_are_written_past_the_caches(dtype):
    rows, N, K = 5, 1024, 2064  # beyond 8 MB; the last columns are no whole tile
    x, w = random(rows, K).to(dtype), random(3, N, K, seed=1).to(dtype).requires_grad_()
    grad = random(rows, N, seed=2).to(dtype)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    metate.grouped_linear(x, w, offsets).backward(grad)
    for expert, part in enumerate((slice(0, 2), slice(2, 2), slice(2, 5))):
        truth = grad[part].double().T @ x[part].double()
        error = (w.grad[expert].double() - truth).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1), expert


def test_offsets_and_orders_that_are_wrong_are_refused():
    x, w = random(6, 8), random(2, 4, 8)
    low = QuantizedExperts.quantize(w, lambda one: quantize_rtn(one, bits=4, group_size=8))
    good, rows = torch.tensor([0, 3, 6], dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    for weight in (w, low):
        metate.grouped_linear(x, weight, good)  # calls like an earlier one take a shorter way
        metate.grouped_linear(x, weight, good, order=rows)
        for offsets in ([0, 4, 3], [-1, 2, 6], [0, 3, 7]):
            with pytest.raises(ValueError, match=r"grouped_linear: offsets is .*non-decreasing"):
                metate.grouped_linear(x, weight, torch.tensor(offsets, dtype=torch.int32))
        for order, problem in (([0, 1, 2, 3, 4, 6], "order is 6"), ([0, 1, 1, 2, 3, 4], "1 twice")):
            with pytest.raises(ValueError, match=problem):
                metate.grouped_linear(x, weight, good, order=torch.tensor(order, dtype=torch.int32))
    inverse = rows.view(3, 2)
    metate.moe_unpermute(x, inverse)
    with pytest.raises(ValueError, match="inverse is 6"):
        metate.moe_unpermute(x, inverse + 1)
    metate.moe_permute(x, rows)
    with pytest.raises(ValueError, match="order is -2"):
        metate.moe_permute(x, rows - 2)


def test_quantised_experts_multiply_as_their_dense_weights():
    dense = random(4, 12, 64)
    experts = QuantizedExperts.quantize(dense, lambda w: quantize_rtn(w, bits=4, group_size=32))
    assert len(experts) == 4 and experts.shape == (4, 12, 64)
    torch.testing.assert_close(experts.dequantize()[2], metate.dequantize(experts[2]))
    x = random(10, 64, seed=1).requires_grad_()
    order, _, offsets = metate.moe_sort(torch.tensor([[i % 3, 3] for i in range(10)], dtype=torch.int32), 4)
    lora = 0.1 * random(4, 3, 64, seed=2), 0.1 * random(4, 12, 3, seed=3)
    arguments = dict(order=order, k=2, lora=lora, scaling=0.5)
    out = metate.grouped_linear(x, experts, offsets, **arguments)
    other = x.detach().clone().requires_grad_()
    expected = metate.grouped_linear(other, experts.dequantize(), offsets, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.cos().sum().backward()
    expected.cos().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_experts_that_differ_are_not_stacked():
    a, b = (quantize_rtn(random(8, 64), bits=bits, group_size=32) for bits in (4, 3))
    with pytest.raises(FormatError, match=r"weights\[1\] .* bits differs"):
        QuantizedExperts.stack([a, b])
    with pytest.raises(FormatError, match="a QuantizedWeight for each expert"):
        QuantizedExperts.stack([])


def test_gpt_oss_activation():
    x = 8 * random(9, 20)
    gate, up = x[:, ::2].clamp(max=7), x[:, 1::2].clamp(-7, 7)
    out = metate.gated_activation(x, gating="interleaved", limit=7.0, alpha=1.702, shift=1.0)
    torch.testing.assert_close(out, gate * torch.sigmoid(1.702 * gate) * (up + 1))


@pytest.mark.parametrize("policy", ["sinkhorn", "expert_choice", "mixture_of_depths"])
def test_what_a_policy_does_not_look_at_is_refused(policy):
    """Where it was ignored, DeepSeek's groups or a bias gave the routes of another model."""
    logits = random(2, 6, 1 if policy == "mixture_of_depths" else 4)
    for name, value in dict(bias=torch.zeros(logits.shape[-1]), groups=2, group_rule="sum").items():
        with pytest.raises(ValueError, match=rf"metate.moe_route: {name} is .*policy '{policy}' does not look at it"):
            metate.moe_route(logits, 1, policy=policy, **{name: value})
    if policy != "mixture_of_depths":
        with pytest.raises(ValueError, match=r"metate.moe_route: top_k is 5, expected 1 to 4"):
            metate.moe_route(logits, 5, policy=policy)


def test_errors_name_what_users_call():
    logits, x = random(6, 4), random(6, 8)
    route = metate.moe_route(logits, 2)
    with pytest.raises(ValueError, match=r"metate.moe_route: top_k is 9, expected 1 to 4"):
        metate.moe_route(logits, 9)
    with pytest.raises(TypeError, match=r"metate.moe_route: noise is int, expected a torch.Tensor"):
        metate.moe_route(logits, 2, noise=1)
    for up, down, message in (
        ((4, 12, 8), (4, 9, 6), r"w_down is of shape \(4, 9, 6\), expected \(4, 8, 6\) beside w_gate_up"),
        ((4, 8, 12), (4, 6, 8), r"w_gate_up is of shape \(4, 8, 12\), expected \(4, 2 · width, 8\)"),
        ((3, 12, 8), (3, 8, 6), r"w_gate_up is of shape \(3, 12, 8\), expected \(4, 2 · width, 8\)"),
        ((4, 11, 8), (4, 8, 6), r"w_gate_up is of shape \(4, 11, 8\), expected \(4, 2 · width, 8\)"),
        ((12, 8), (8, 6), r"w_gate_up is of shape \(12, 8\), expected \(4, 2 · width, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"metate.moe_mlp: {message}"):
            metate.moe_mlp(x, route, random(*up), random(*down))
    with pytest.raises(TypeError, match=r"metate.moe_mlp: w_gate_up is ndarray, expected a torch.Tensor or metate.Qua"):
        metate.moe_mlp(x, route, random(4, 12, 8).numpy(), random(4, 8, 6))
    with pytest.raises(TypeError, match=r"metate.gated_activation: alpha is 'a', expected a number"):
        metate.gated_activation(x, alpha="a")
    with pytest.raises(ValueError, match=r"metate.update_bias: counts is of shape \(3,\), expected \(4,\) like bias"):
        metate.update_bias(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"load_balance_loss: counts is .* of shape \(3,\)"):
        route.load_balance_loss(counts=torch.zeros(3))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 0), (0, 8), (2, 0, 8)], ids=str)
def test_activations_take_any_dimensions(shape):
    x = random(*shape)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(metate.gated_activation(x), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("device", "backend"), [place for place in ACTIVATION if place[1] != "reference"])
def test_gelu_keeps_its_digits_below_zero(device, backend):
    x = torch.linspace(-5, -0.1, 1001, device=device)[:, None]
    out = metate.gated_activation(x, "gelu", gating="none", backend=backend).double()
    torch.testing.assert_close(out, torch.nn.functional.gelu(x.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device,backend", ROUTE)
def test_silu_takes_infinite_numbers(device, backend):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38]).repeat(9)[:, None]
    with metate.use(backend):
        out = metate.gated_activation(x.to(device), gating="none")
    torch.testing.assert_close(out.cpu(), torch.nn.functional.silu(x), equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("device,backend", ACTIVATION)
def test_far_from_zero_slopes_are_zero_and_one(device, backend, activation):
    """torch's are NaN at infinity, and that of GELU (tanh) wherever the cube overflows. Of NaN they are NaN."""
    size = torch.tensor([math.inf, 3e38, 1e30, 1e13, 1e10, 1e5, 1000, 999]).repeat(5)
    x = torch.cat([size, -size, torch.tensor([math.nan])])[:, None].to(device).requires_grad_()
    metate.gated_activation(x, activation, gating="none", backend=backend).sum().backward()
    slopes = x.grad.flatten().cpu()
    if activation != "relu":
        assert slopes[-1].isnan()
    torch.testing.assert_close(slopes[:-1], (x.flatten()[:-1] > 0).float().cpu(), rtol=0, atol=1e-37)


@pytest.mark.parametrize("device,backend", ROUTE)
def test_a_logit_of_minus_infinity_has_no_share(device, backend):
    logits = random(7, 40).masked_fill(torch.arange(40) % 3 == 0, -math.inf)
    for score in ("softmax", "softmax_topk", "sigmoid", "sqrt_softplus"):
        with metate.use(backend):
            route = metate.moe_route(logits.to(device), 4, score=score)
        with metate.use("reference"):
            expected = metate.moe_route(logits.to(device), 4, score=score)
        torch.testing.assert_close(route.weights, expected.weights)
        assert torch.equal(route.experts, expected.experts)


def test_what_is_far_below_zero_is_gated_to_zero():
    """A sigmoid that ends at its smallest number would be multiplied by as much as alpha is."""
    x = torch.tensor([[1.5]], requires_grad=True)
    out = metate.gated_activation(x, gating="none", alpha=-(2.0**63))
    assert out.item() == 0 and torch.autograd.grad(out.sum(), x)[0].item() == 0
