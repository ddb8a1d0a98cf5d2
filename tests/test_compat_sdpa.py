"""F.scaled_dot_product_attention with metate under it against torch's own kernels."""

import threading

import pytest
import torch
import torch.nn.functional as F

from metate.compat import sdpa

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "restore_flash_attention_impl"), reason="torch's registry came with 2.11"
)
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attend(q, k, v, **options):
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, **options)
    weights = torch.arange(out.numel()).view(out.shape).sin().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


@pytest.fixture
def served(monkeypatch):
    """How often metate computed a forward, a backward or a whole call, from fresh compilations on."""
    torch.compiler.reset()
    calls = {"forward": 0, "backward": 0, "attend": 0}

    def count(name):
        original = getattr(sdpa, f"_{name}")

        def counting(*args):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(sdpa, f"_{name}", counting)

    count("forward")
    count("backward")
    count("attend")
    return calls


def visible(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 1, :] = False  # a query without a key
    return mask


SHAPES = {"q": (2, 4, 33, 24), "k": (2, 4, 70, 24)}
CASES = {
    "plain": {},
    "causal, more keys": {"is_causal": True},
    "causal, more queries": {"is_causal": True, "swap": True},
    "bool mask of two dimensions": {"attn_mask": visible(33, 70)},
    "bool mask per batch": {"attn_mask": visible(2, 1, 33, 70)},
    "additive mask": {"attn_mask": draw(2, 4, 33, 70), "scale": 0.3},
    "grouped heads": {"kv_heads": 2, "enable_gqa": True, "is_causal": True},
    "grouped heads, mask": {"kv_heads": 1, "enable_gqa": True, "attn_mask": visible(2, 1, 33, 70)},
}


def case(name, dtype):
    options = dict(CASES[name])
    q, k = draw(*SHAPES["q"], dtype=dtype), draw(*SHAPES["k"], dtype=dtype)
    heads = options.pop("kv_heads", 4)
    q, k = (k, q) if options.pop("swap", False) else (q, k[:, :heads])
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    return (q, k, k.flip(-1)), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients(name, dtype, served):
    tensors, options = case(name, dtype)
    want = attend(*tensors, **options)
    assert served == {"forward": 0, "backward": 0, "attend": 0}
    with sdpa.activated():
        got = attend(*tensors, **options)
    assert served == {"forward": 1, "backward": 1, "attend": 0}
    for w, g in zip(want, got, strict=True):
        assert w.dtype == g.dtype
        assert w.stride() == g.stride(), "compiled graphs rely on torch's strides"
        assert (w.double() - g.double()).abs().max() <= DTYPES[dtype] * max(w.abs().max().item(), 1)


def test_strides_follow_the_queries(served):
    q = draw(2, 33, 4, 24).transpose(1, 2)
    with sdpa.activated():
        out = F.scaled_dot_product_attention(q, q, q)
    assert served["forward"] == 1
    assert out.stride() == q.stride()


FORMULA = {
    "value dim of its own": ((2, 4, 33, 24), (2, 4, 70, 24), 40, {}),
    "value dim of its own, grouped heads": (
        (2, 4, 33, 24),
        (2, 2, 70, 24),
        40,
        {"enable_gqa": True, "is_causal": True},
    ),
    "value dim of its own, bool mask": ((2, 4, 33, 24), (2, 4, 70, 24), 8, {"attn_mask": visible(2, 1, 33, 70)}),
    "three dimensions": ((4, 33, 24), (4, 70, 24), 24, {"scale": 0.3, "is_causal": True}),
    "three dimensions, bool mask": ((4, 33, 24), (4, 70, 24), 24, {"attn_mask": visible(33, 70)}),
    "mask gradient": ((2, 4, 33, 24), (2, 4, 70, 24), 24, {"attn_mask": draw(33, 70).requires_grad_()}),
    "mask gradient, by head": ((2, 4, 33, 24), (2, 4, 70, 24), 24, {"attn_mask": draw(4, 1, 70).requires_grad_()}),
    "mask gradient, three dimensions": ((4, 33, 24), (4, 70, 24), 9, {"attn_mask": draw(4, 33, 70).requires_grad_()}),
}


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", FORMULA)
def test_what_torch_has_no_kernel_for(name, compiles, served):
    q_shape, k_shape, value_dim, options = FORMULA[name]
    leaves = [draw(*shape).requires_grad_() for shape in (q_shape, k_shape, (*k_shape[:-1], value_dim))]
    mask = options.get("attn_mask")
    leaves += [mask] if mask is not None and mask.requires_grad else []

    def attend_all(function):
        out = function(*leaves[:3], **options)
        return out.detach(), *torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).sin()).sum(), leaves)

    function = F.scaled_dot_product_attention
    want = attend_all(function)
    with sdpa.activated():
        got = attend_all(torch.compile(function, backend="aot_eager", fullgraph=True) if compiles else function)
    assert served["attend"], "tracing calls it more than once"
    for w, g in zip(want, got, strict=True):
        assert w.shape == g.shape
        assert (w - g).abs().max() <= 2e-6 * max(w.abs().max().item(), 1)


def test_dropout():
    """Weights are kept or dropped as torch's seed says, and grow so that the mean stays."""
    q, k = draw(2, 4, 33, 24), draw(2, 4, 70, 24)
    ones = torch.ones(2, 4, 70, 24, requires_grad=True)
    with sdpa.activated():
        torch.manual_seed(0)
        out = F.scaled_dot_product_attention(q, k, ones, dropout_p=0.25)
        torch.manual_seed(0)
        again, other = (F.scaled_dot_product_attention(q, k, ones, dropout_p=0.25) for _ in range(2))
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert out.std() > 0.02
    assert abs(out.mean().item() - 1) < 0.02
    (gradient,) = torch.autograd.grad(out.sum(), ones)
    assert gradient.sum().item() == pytest.approx(out.sum().item(), rel=1e-5), "linear in v, with the same mask"


def test_dropout_leaves_compiled_graphs_whole(served):
    q = draw(2, 4, 33, 24)
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    with sdpa.activated():
        first, second = (compiled(q, q, q, dropout_p=0.5) for _ in range(2))
    assert served["attend"] == 0
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("q", "k", "options"),
    [
        pytest.param(draw(2, 4, 33, 24), draw(1, 4, 70, 24), {"dropout_p": 0.5}, id="broadcast"),
        pytest.param(draw(2, 4, 33, 24), draw(2, 4, 70, 24), {"dropout_p": 1.0}, id="all dropped"),
        pytest.param(draw(2, 3, 4, 33, 24), draw(2, 3, 4, 70, 24), {}, id="five dimensions"),
    ],
)
def test_falls_through(q, k, options, served):
    def call():
        torch.manual_seed(0)
        return attend(q, k, k, **options)

    want = call()
    with sdpa.activated():
        got = call()
    assert served == {"forward": 0, "backward": 0, "attend": 0}
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


def test_the_formula_is_there_for_those_who_ask(served):
    q, v = draw(1, 2, 5, 8), draw(1, 2, 5, 9)
    with sdpa.activated(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, v)
        F.scaled_dot_product_attention(q, q, q)
    assert served == {"forward": 0, "backward": 0, "attend": 0}
    with sdpa.activated():
        _, tangent = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, v), (q,), (q,))
        mapped = torch.vmap(lambda v: F.scaled_dot_product_attention(q, q, v))(torch.stack((v, v + 1)))
        with torch.inference_mode():
            out = F.scaled_dot_product_attention(q.clone(), q.clone(), v.clone())
    assert served["attend"] == 1
    assert tangent.shape == out.shape
    assert torch.allclose(mapped[0], out, atol=1e-6)


def test_kernel_falls_through_where_metate_refuses(served):
    q = draw(1, 1, 3, 520)
    want = attend(q, q, q)
    with sdpa.activated():
        got = attend(q, q, q)
    assert served == {"forward": 0, "backward": 0, "attend": 0}
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


def test_forward_and_backward_may_run_on_different_kernels(served):
    tensors, options = case("causal, more keys", torch.float32)
    want = attend(*tensors, **options)
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    with sdpa.activated():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad(out, (q, k, v), torch.arange(out.numel()).view(out.shape).sin())
    assert served == {"forward": 1, "backward": 0, "attend": 0}
    for w, g in zip(want, (out, *gradients), strict=True):
        assert torch.allclose(w, g, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_transformer_encoder(causal, served):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2)
    x = draw(3, 17, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(17) if causal else None
    padding = None if causal else torch.arange(17) >= torch.tensor([[17], [9], [3]])

    def run():
        model.zero_grad()
        out = model(x, mask=mask, src_key_padding_mask=padding, is_causal=causal)
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    want = run()
    with sdpa.activated():
        got = run()
    assert served == {"forward": 2, "backward": 2, "attend": 0}
    for w, g in zip(want, got, strict=True):
        assert torch.allclose(w, g, rtol=1e-4, atol=2e-5)


def test_multihead_attention(served):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    q, k = draw(2, 9, 32), draw(2, 13, 32)
    want, _ = module(q, k, k, need_weights=False)
    with sdpa.activated():
        got, _ = module(q, k, k, need_weights=False)
    assert served["forward"] == 1
    assert torch.allclose(want, got, atol=1e-6)


def test_compiled(served):
    tensors, options = case("causal, more keys", torch.float32)
    compiled = torch.compile(lambda *x: F.scaled_dot_product_attention(*x, **options), backend="aot_eager")
    want = F.scaled_dot_product_attention(*tensors, **options)
    with sdpa.activated():
        got = compiled(*tensors)
    assert served["forward"] == 1
    assert torch.allclose(want, got, atol=2e-6)


def test_activates_once_and_restores(served):
    q = draw(1, 2, 5, 8)
    sdpa.restore()
    assert not sdpa.active()
    sdpa.activate()
    sdpa.activate()
    with sdpa.activated():
        pass
    assert sdpa.active(), "the block found it active"
    assert torch.nn.attention.current_flash_attention_impl() == "metate"
    thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
    thread.start()
    thread.join()
    assert served["forward"] == 1
    sdpa.restore()
    F.scaled_dot_product_attention(q, q, q)
    assert served["forward"] == 1
    assert torch.nn.attention.current_flash_attention_impl() is None
    with pytest.raises(RuntimeError, match="stop"), sdpa.activated():
        raise RuntimeError("stop")
    assert not sdpa.active()


def test_torch_without_a_registry_is_named(monkeypatch):
    """2.10 has none: asking is no error, and serving says what to do."""
    for name in ("restore_flash_attention_impl", "current_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name)
    assert not sdpa.active()
    sdpa.restore()
    with (
        pytest.raises(NotImplementedError, match=r"no registry of attention kernels; upgrade to 2\.11"),
        sdpa.activated(),
    ):
        pass
