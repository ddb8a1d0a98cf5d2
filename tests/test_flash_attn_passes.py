"""flash-attn's forward and backward apart, as ring and context parallel attention call them."""

import inspect

import pytest
import torch

from metate.compat import flash_attn as fa
from metate.compat.flash_attn import extension
from metate.compat.flash_attn import flash_attn_interface as passes

SCALE = 0.3
LENGTHS = torch.tensor([0, 9, 9, 30], dtype=torch.int32)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(function, inputs, dout, *args, **options):
    """Output and gradients by autograd."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, *args, softmax_scale=SCALE, **options)
    return out, *torch.autograd.grad(out, leaves, dout)


def test_signatures():
    """The parameters of flash-attn 2.8, in its order."""
    scores = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    grads = "dout q k v out softmax_lse dq dk dv"
    expected = {
        "_flash_attn_forward": f"q k v {scores} return_softmax",
        "_flash_attn_varlen_forward": f"q k v {lengths} {scores} return_softmax block_table leftpad_k seqused_k "
        "zero_tensors num_splits",
        "_flash_attn_backward": f"{grads} {scores} deterministic rng_state",
        "_flash_attn_varlen_backward": f"{grads} {lengths} {scores} deterministic rng_state zero_tensors",
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(passes, name)).parameters) == parameters.split()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_the_keys_give_the_whole(dtype, softcap):
    """A ring of three: the second part is causal, the first whole, the third unseen by every query."""
    q, dout = draw(2, 12, 4, 16).to(dtype), draw(2, 12, 4, 24).to(dtype)
    k, v = draw(2, 36, 2, 16).to(dtype), draw(2, 36, 2, 24).to(dtype)
    rest = (-1, -1, softcap, None)
    parts = [(k[:, :12], v[:, :12], False), (k[:, 12:24], v[:, 12:24], True)]
    forward = [passes._flash_attn_forward(q, *kv, 0.0, SCALE, causal, *rest, False) for *kv, causal in parts]
    lse = torch.logsumexp(torch.stack([part[1] for part in forward]), 0)
    out = sum(part[0].float() * torch.exp(part[1] - lse).transpose(1, 2)[..., None] for part in forward).to(dtype)
    dq, dk, dv = torch.zeros(q.shape), torch.zeros(k[:, :24].shape), torch.zeros(v[:, :24].shape)
    for i, (*kv, causal) in enumerate(parts):
        found = [torch.full_like(x, float("nan")) for x in (q, *kv)]
        softmax_d = passes._flash_attn_backward(
            dout, q, *kv, out, lse, *found, 0.0, SCALE, causal, *rest, deterministic=True
        )
        dq += found[0]
        dk[:, 12 * i : 12 * i + 12], dv[:, 12 * i : 12 * i + 12] = found[1:]
    assert torch.allclose(softmax_d, (out.float() * dout.float()).sum(-1).transpose(1, 2), atol=1e-5)
    want = whole(fa.flash_attn_func, (q, k[:, :24], v[:, :24]), dout, causal=True, softcap=softcap)
    bound = 2e-5 if dtype == torch.float32 else 0.06
    for got, expected in zip((out, dq, dk, dv), want, strict=True):
        assert torch.allclose(got.float(), expected.float(), atol=bound, rtol=bound)


@pytest.mark.parametrize("options", [{}, {"window_size": (4, 2)}, {"alibi_slopes": draw(3, 4).abs()}], ids=str)
def test_packed(options):
    q, k, v, dout = draw(30, 4, 16), draw(30, 2, 16), draw(30, 2, 16), draw(30, 4, 16)
    lengths = (LENGTHS, LENGTHS, 21, 21)
    want = whole(fa.flash_attn_varlen_func, (q, k, v), dout, *lengths, causal=True, **options)
    slopes = options.get("alibi_slopes")
    scores = (0.0, SCALE, True, *options.get("window_size", (-1, -1)), 0.0, slopes)
    out, lse, dmask, rng_state = passes._flash_attn_varlen_forward(q, k, v, *lengths, *scores)
    assert (lse.shape, dmask.numel(), rng_state.shape, rng_state.dtype) == ((4, 30), 0, (2,), torch.int64)
    found = [torch.empty_like(x) for x in (q, k, v)]
    passes._flash_attn_varlen_backward(dout, q, k, v, out, lse, *found, *lengths, *scores, False)
    for got, expected in zip((out, *found), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_dropout_of_the_backward_is_that_of_rng_state(packed):
    shape = (30, 4, 16) if packed else (2, 30, 4, 16)
    q, k, v, dout = draw(*shape), draw(*shape) + 1, draw(*shape) + 2, draw(*shape) + 3
    function, forward, backward, lengths = (
        (fa.flash_attn_varlen_func, passes._flash_attn_varlen_forward, passes._flash_attn_varlen_backward,
         (LENGTHS, LENGTHS, 21, 21)) if packed else
        (fa.flash_attn_func, passes._flash_attn_forward, passes._flash_attn_backward, ())
    )  # fmt: skip
    torch.manual_seed(3)
    want = whole(function, (q, k, v), dout, *lengths, dropout_p=0.4)
    torch.manual_seed(3)
    scores = (0.4, SCALE, False, -1, -1, 0.0, None)
    out, lse, dmask, rng_state = forward(q, k, v, *lengths, *scores, True)
    assert dmask.shape == ((3, 4, 21, 21) if packed else (2, 4, 30, 30))
    found = [torch.empty_like(x) for x in (q, k, v)]
    given = (dout, q, k, v, out, lse, *found, *lengths, *scores, False)
    backward(*given, rng_state)
    for got, expected in zip((out, *found), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match="rng_state is None"):
        backward(*given)


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
def test_keys_in_use(paged):
    """Those from leftpad_k to seqused_k; the others may hold anything."""
    q, k, v = draw(5, 4, 16), draw(30, 2, 16), draw(30, 2, 16)
    cu_q, left, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [1, 0, 3], [7, 0, 16]))
    table = torch.randperm(15, generator=torch.Generator().manual_seed(1))[:8].expand(3, 8).to(torch.int32)
    positions = torch.arange(16)
    rows = [table[b].long()[positions // 2] * 2 + positions % 2 if paged else LENGTHS[b] + positions for b in range(3)]
    rows = [rows[b][left[b] : used[b]] for b in range(3)]
    unused = torch.ones(30, dtype=torch.bool).index_fill(0, torch.cat(rows), False)
    k[unused], v[unused] = torch.nan, torch.nan
    given = (k.view(15, 2, 2, 16), v.view(15, 2, 2, 16)) if paged else (k, v)
    out, lse, dmask, _ = passes._flash_attn_varlen_forward(
        q, *given, cu_q, LENGTHS, 3, 21, 0.0, SCALE, True, block_table=table if paged else None, leftpad_k=left,
        seqused_k=used,
    )  # fmt: skip
    assert dmask.numel() == 0
    for b in range(3):
        part = slice(cu_q[b], cu_q[b + 1])
        want, want_lse, _ = fa.flash_attn_func(
            q[None, part], k[None, rows[b]], v[None, rows[b]], 0.0, SCALE, True, return_attn_probs=True
        )
        assert torch.allclose(out[part], want[0], atol=1e-5)
        assert torch.allclose(lse[:, part], want_lse[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"num_splits": 2}, RuntimeError, "num_splits > 1 is not supported"),
     ({"dropout_p": 0.5, "seqused_k": LENGTHS[1:]}, NotImplementedError, "dropout_p is 0.5, expected 0 beside")],
    ids=["splits", "dropout"],
)  # fmt: skip
def test_refusals(options, error, message):
    given = {"dropout_p": 0.0, "softmax_scale": SCALE, "causal": False, **options}
    with pytest.raises(error, match=message):
        passes._flash_attn_varlen_forward(draw(30, 2, 8), *[draw(30, 2, 8)] * 2, LENGTHS, LENGTHS, 21, 21, **given)


def test_extension_is_the_passes():
    """The positional arguments of the compiled extension: results returned and written where room is given."""
    q, k, v, dout = draw(2, 12, 4, 16), draw(2, 15, 2, 16), draw(2, 15, 2, 24), draw(2, 12, 4, 24)
    rest = (0.0, SCALE, True, 5, 0, 2.0)
    out, grads = torch.empty_like(dout), [torch.full_like(x, float("nan")) for x in (q, k, v)]
    lse = extension.fwd(q, k, v, out, None, *rest, False, None)[1]
    given = extension.bwd(dout, q, k, v, out, lse, *grads, None, *rest, True, None, None)
    made = extension.bwd(dout, q, k, v, out, lse, None, None, None, None, *rest, True)
    expected = whole(fa.flash_attn_func, (q, k, v), dout, causal=True, window_size=(5, 0), softcap=2.0)
    assert all(a is b for a, b in zip(given, grads, strict=False))
    for name, a, b, c in zip(("dq", "dk", "dv"), given, made, expected[1:], strict=False):
        assert torch.equal(a, b) and torch.equal(a, c), name
    assert torch.equal(out, expected[0])


def test_extension_over_packed_sequences():
    q, k, v, dout = draw(30, 4, 16), draw(30, 2, 16), draw(30, 2, 24), draw(30, 4, 24)
    rest = (30, 30, 0.0, SCALE, False, True, -1, -1, 0.0)
    out, lse, *_ = extension.varlen_fwd(q, k, v, None, LENGTHS, LENGTHS, None, None, None, None, *rest, False, None, 0)
    dq, dk, dv, _ = extension.varlen_bwd(
        dout, q, k, v, out, lse, None, None, None, LENGTHS, LENGTHS, None, *rest, True, None, None
    )
    expected = whole(fa.flash_attn_varlen_func, (q, k, v), dout, LENGTHS, LENGTHS, 30, 30, causal=True)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), expected, strict=True):
        assert torch.equal(a, b), name


def test_extension_takes_no_generator():
    q = draw(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported, got a Generator"):
        extension.fwd(q, q, q, None, None, 0.0, SCALE, True, -1, -1, 0.0, False, torch.Generator())
