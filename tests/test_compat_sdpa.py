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
    """How often metate computed a forward or a backward."""
    calls = {"forward": 0, "backward": 0}

    def count(name):
        original = getattr(sdpa, f"_{name}")

        def counting(*args):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(sdpa, f"_{name}", counting)

    count("forward")
    count("backward")
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
    assert served == {"forward": 0, "backward": 0}
    with sdpa.activated():
        got = attend(*tensors, **options)
    assert served == {"forward": 1, "backward": 1}
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


@pytest.mark.parametrize(
    ("value", "options"),
    [
        pytest.param(draw(2, 4, 70, 40), {}, id="value dim of its own"),
        pytest.param(draw(2, 4, 70, 24), {"dropout_p": 0.5}, id="dropout"),
        pytest.param(draw(2, 4, 70, 24), {"attn_mask": draw(33, 70).requires_grad_()}, id="mask gradient"),
    ],
)
def test_falls_through(value, options, served):
    def call():
        torch.manual_seed(0)
        return attend(draw(*SHAPES["q"]), draw(*SHAPES["k"]), value, **options)

    want = call()
    with sdpa.activated():
        got = call()
    assert served == {"forward": 0, "backward": 0}
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


def test_kernel_falls_through_where_metate_refuses(served):
    q = draw(1, 1, 3, 520)
    want = attend(q, q, q)
    with sdpa.activated():
        got = attend(q, q, q)
    assert served == {"forward": 0, "backward": 0}
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


def test_forward_and_backward_may_run_on_different_kernels(served):
    tensors, options = case("causal, more keys", torch.float32)
    want = attend(*tensors, **options)
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    with sdpa.activated():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad(out, (q, k, v), torch.arange(out.numel()).view(out.shape).sin())
    assert served == {"forward": 1, "backward": 0}
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
    assert served == {"forward": 2, "backward": 2}
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
