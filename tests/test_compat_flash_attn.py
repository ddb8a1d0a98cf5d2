"""flash-attn's functions over metate: signatures, semantics, and the names that code imports from there."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import types

import pytest
import torch

from metate import compat
from metate.compat import flash_attn as fa
from metate.compat.flash_attn import bert_padding
from metate.compat.flash_attn.flash_attn_interface import _get_block_size_n
from metate.compat.flash_attn.layers import rotary


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def truth(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None):
    """flash-attn's documented formula in float64: output and lse."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    i, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    if alibi_slopes is not None:
        s = s - alibi_slopes.double().expand(q.shape[0], -1)[..., None, None] * (i - j).abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    hidden |= (j < i - left) if left >= 0 else False
    hidden |= (j > i + right) if right >= 0 else False
    s = s.masked_fill(hidden, -torch.inf)
    lse = s.logsumexp(-1)
    lse = lse.masked_fill(hidden.all(-1), torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.exp(s - lse[..., None]), v), lse


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "window, causal": {"window_size": (5, 9), "causal": True, "softmax_scale": 0.2},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.3, 0.2, 0.7]), "causal": True},
    "alibi per batch": {"alibi_slopes": torch.tensor([[0.1, 0.3, 0.2, 0.7], [0.5, 0.1, 0.2, 0.9]])},
}


@pytest.mark.parametrize("swap", [False, True], ids=["more keys", "more queries"])
@pytest.mark.parametrize("name", CASES)
def test_dense(name, swap):
    rows, columns = (29, 13) if swap else (13, 29)
    q, k, v = draw(2, rows, 4, 24), draw(2, columns, 2, 24), draw(2, columns, 2, 24)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse, dmask = fa.flash_attn_func(*leaves, **CASES[name], return_attn_probs=True)
    want, want_lse = truth(*exact, **CASES[name])
    assert torch.allclose(out.double(), want, atol=3e-6)
    assert torch.allclose(lse.double(), want_lse, atol=1e-5), "natural logarithm, +inf without a key"
    assert dmask.numel() == 0
    weights = draw(*out.shape)
    got = torch.autograd.grad(out, leaves, weights)
    for g, w in zip(got, torch.autograd.grad(want.nan_to_num(), exact, weights.double()), strict=True):
        assert torch.allclose(g.double(), w.nan_to_num(), atol=2e-5)


def test_packed_arguments():
    qkv, kv, q = draw(2, 9, 3, 4, 8), draw(2, 11, 2, 2, 8), draw(2, 9, 4, 8)
    options = (0.0, 0.3, True, (4, 0), 2.0)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, *options), fa.flash_attn_func(*qkv.unbind(2), *options))
    assert torch.equal(fa.flash_attn_kvpacked_func(q, kv, *options), fa.flash_attn_func(q, *kv.unbind(2), *options))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    want = fa.flash_attn_varlen_func(*qkv[0].unbind(1), cu, cu, 5, 5, *options)
    assert torch.equal(fa.flash_attn_varlen_qkvpacked_func(qkv[0], cu, 5, *options), want)
    cu_k = torch.tensor([0, 8, 11], dtype=torch.int32)
    want = fa.flash_attn_varlen_func(q[0], *kv[0].unbind(1), cu, cu_k, 5, 8, *options)
    assert torch.equal(fa.flash_attn_varlen_kvpacked_func(q[0], kv[0], cu, cu_k, 5, 8, *options), want)


@pytest.mark.parametrize("name", CASES)
def test_varlen(name):
    cu_q, cu_k = torch.tensor([0, 7, 12], dtype=torch.int32), torch.tensor([0, 5, 14], dtype=torch.int32)
    q, k, v = draw(12, 4, 24), draw(14, 2, 24), draw(14, 2, 24)
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9, **CASES[name], return_attn_probs=True)
    for b in range(2):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        options = dict(CASES[name])
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"].expand(2, 4)[b : b + 1]
        want, want_lse = truth(q[None, rows], k[None, keys], v[None, keys], **options)
        assert torch.allclose(out[rows].double(), want[0], atol=3e-6)
        assert torch.allclose(lse[:, rows].double(), want_lse[0], atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_dropout_is_what_s_dmask_shows(packed):
    cu_q, cu_k = torch.tensor([0, 40, 73], dtype=torch.int32), torch.tensor([0, 61, 90], dtype=torch.int32)
    options = {"dropout_p": 0.3, "causal": True, "alibi_slopes": draw(2, 4).abs(), "return_attn_probs": True}
    torch.manual_seed(5)
    if packed:
        q, k, v = draw(73, 4, 16), draw(90, 2, 16), draw(90, 2, 16)
        out, _, dmask = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 40, 61, **options)
        parts = [
            (q[cu_q[b] : cu_q[b + 1]], v[cu_k[b] : cu_k[b + 1]], out[cu_q[b] : cu_q[b + 1]], dmask[b]) for b in range(2)
        ]
    else:
        q, k, v = draw(2, 40, 4, 16), draw(2, 61, 2, 16), draw(2, 61, 2, 16)
        out, _, dmask = fa.flash_attn_func(q, k, v, **options)
        parts = list(zip(q, v, out, dmask, strict=True))
    assert dmask.shape == (2, 4, 40, 61)
    for q_b, v_b, out_b, shown in parts:
        shown = shown[:, : q_b.shape[0], : v_b.shape[0]]
        top = shown.abs().amax(-1)
        assert torch.allclose(top[top > 0], torch.ones(())), "scaled by the largest score of its row"
        p = shown / shown.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        want = torch.einsum("hij,jhd->ihd", p.clamp(min=0) / 0.7, v_b.repeat_interleave(2, 1))
        assert torch.allclose(out_b, want, atol=1e-5)
        seen = shown != 0
        assert abs((shown < 0).sum() / seen.sum() - 0.3) < 0.03


def test_dropout_follows_the_seed():
    q = draw(1, 30, 2, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fa.flash_attn_func(q, q, q, 0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_window_may_be_a_tensor_and_softcap_negative():
    q = draw(1, 30, 2, 8)
    want = fa.flash_attn_func(q, q, q, window_size=(3, 1))
    assert torch.equal(fa.flash_attn_func(q, q, q, window_size=torch.tensor([3, 1]), softcap=-1.0), want)


def test_signatures():
    """The parameters of flash-attn 2, in its order, for calls by position."""
    after = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    expected = {
        "flash_attn_func": f"q k v {after}",
        "flash_attn_kvpacked_func": f"q kv {after}",
        "flash_attn_qkvpacked_func": f"qkv {after}",
        "flash_attn_varlen_func": f"q k v {lengths} {after} block_table",
        "flash_attn_varlen_kvpacked_func": f"q kv {lengths} {after}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {after}",
        "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
        "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
        "return_softmax_lse",
    }
    assert set(expected) == set(fa.__all__)
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(fa, name)).parameters) == parameters.split()
    assert _get_block_size_n("cpu", 64, True, False) >= 2**20


# The cache.


@pytest.mark.parametrize("batch_idx", [None, torch.tensor([2, 0], dtype=torch.int32)], ids=["in order", "indexed"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["plain", "window, causal", "softcap", "alibi", "alibi per batch"])
def test_kvcache(name, rotate, batch_idx):
    options = CASES[name]
    q, k, v = draw(2, 5, 4, 16), draw(2, 5, 2, 16), draw(2, 5, 2, 16)
    caches = draw(3, 40, 2, 16), draw(3, 40, 2, 16) + 1
    before = [c.clone() for c in caches]
    lengths, pad = torch.tensor([17, 30], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    angles = draw(64, 4)
    turn = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": False} if rotate else {}
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, cache_batch_idx=batch_idx, cache_leftpad=pad, **turn, **options,
        return_softmax_lse=True,
    )  # fmt: skip
    for b, entry in enumerate([0, 1] if batch_idx is None else batch_idx.tolist()):
        used, first = int(lengths[b]), int(pad[b])
        new_k, new_q = k[b : b + 1], q[b : b + 1]
        if rotate:
            new_k = rotary.apply_rotary_emb(new_k, angles.cos(), angles.sin(), seqlen_offsets=used)
            moves = options.get("causal") or "window_size" in options
            steps = torch.arange(5) + used if moves else torch.full((5,), used)
            new_q = rotary.apply_rotary_emb_torch(new_q, angles[steps].cos(), angles[steps].sin())
        keys = torch.cat([before[0][entry, first:used], new_k[0]])[None]
        values = torch.cat([before[1][entry, first:used], v[b]])[None]
        b_options = dict(options)
        if "alibi_slopes" in options:
            b_options["alibi_slopes"] = options["alibi_slopes"].expand(2, 4)[b : b + 1]
        want, want_lse = truth(new_q, keys, values, **b_options)
        assert torch.allclose(out[b].double(), want[0], atol=5e-6)
        assert torch.allclose(lse[b].double(), want_lse[0], atol=1e-5)
        torch.testing.assert_close(caches[0][entry, used : used + 5], new_k[0])  # written in place
        assert torch.equal(caches[1][entry, used : used + 5], v[b])
        assert torch.equal(caches[0][entry, used + 5 :], before[0][entry, used + 5 :])


def test_kvcache_reads_only():
    q, cache = draw(2, 1, 4, 16), draw(2, 40, 4, 16)
    out = fa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=9)
    assert torch.allclose(out, fa.flash_attn_func(q, cache[:, :9], cache[:, :9]), atol=1e-6)
    assert torch.allclose(fa.flash_attn_with_kvcache(q, cache, cache), fa.flash_attn_func(q, cache, cache), atol=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"k"}, "v is None, expected a tensor beside k"),
        ({"v"}, "k is None, expected a tensor beside v"),
        ({"k", "v", "rotary_cos"}, "rotary_sin is None, expected a tensor beside rotary_cos"),
        ({"k", "v", "rotary_sin"}, "rotary_cos is None, expected a tensor beside rotary_sin"),
        ({"k", "v", "rotary_cos", "rotary_sin"}, "rotary_cos is of 9 positions, expected at least 10"),
    ],
)
def test_kvcache_refuses_half_of_a_pair(given, message):
    q, cache = draw(2, 1, 4, 16), draw(2, 40, 2, 16)
    every = {"k": draw(2, 1, 2, 16), "v": draw(2, 1, 2, 16), "rotary_cos": draw(9, 4), "rotary_sin": draw(9, 4)}
    before = cache.clone()
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"):
        fa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=9, **{name: every[name] for name in given})
    assert torch.equal(cache, before)


def in_pages(cache, page_size):
    """A contiguous cache as shuffled pages, unused rows NaN, and its block_table."""
    batch, length = cache.shape[:2]
    count = -(-length // page_size)
    padded = torch.full((batch, count * page_size, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
    padded[:, :length] = cache
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(3))
    table = order.argsort().view(batch, count).to(torch.int32)
    return padded.unflatten(1, (count, page_size)).flatten(0, 1)[order], table


@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("name", ["plain", "window, causal", "softcap", "alibi per batch"])
def test_kvcache_in_pages_is_the_contiguous_one(name, page_size):
    q, k, v = draw(2, 3, 4, 16), draw(2, 3, 2, 16), draw(2, 3, 2, 16)
    caches, angles = (draw(2, 40, 2, 16), draw(2, 40, 2, 16)), draw(64, 4)
    pages, (table, _) = zip(*(in_pages(cache, page_size) for cache in caches), strict=True)
    options = {
        "cache_seqlens": torch.tensor([17, 36], dtype=torch.int32), "cache_leftpad": torch.tensor([0, 4]).int(),
        "rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "return_softmax_lse": True, **CASES[name],
    }  # fmt: skip
    want = fa.flash_attn_with_kvcache(q, *caches, k, v, **options)
    got = fa.flash_attn_with_kvcache(q, *pages, k, v, block_table=table, **options)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    for cache, paged in zip(caches, pages, strict=True):
        assert torch.equal(paged[table.long()].flatten(1, 2)[:, :40], cache), "the same keys are written"


@pytest.mark.parametrize("name", ["plain", "causal", "window, causal", "softcap", "alibi"])
def test_varlen_in_pages(name):
    lengths_q, lengths_k = [3, 1, 0, 20], [30, 5, 9, 40]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, keys = draw(24, 4, 16), [draw(1, length, 2, 16) for length in lengths_k]
    packed = torch.cat(keys, 1)[0]
    cache = torch.zeros(4, 40, 2, 16)
    for row, part in zip(cache, keys, strict=True):
        row[: part.shape[1]] = part[0]
    pages, table = in_pages(cache, 8)
    want = fa.flash_attn_varlen_func(q, packed, packed, cu_q, cu_k, 20, 40, return_attn_probs=True, **CASES[name])
    got = fa.flash_attn_varlen_func(
        q, pages, pages, cu_q, cu_k, 20, 40, return_attn_probs=True, block_table=table, **CASES[name]
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_table": torch.tensor([[-1, 1], [2, 3]], dtype=torch.int32)}, r"block_table\[0, 0\] is -1"),
        ({"cache_seqlens": torch.tensor([5, -1], dtype=torch.int32)}, "cache_seqlens is -1, expected at least 0"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes"),
        ({"window_size": (-5, 0)}, "window"),
        ({"window_size": (1.5, 0)}, "window_size"),
        ({"softmax_scale": float("nan")}, "scale is nan"),
        ({"cache_leftpad": torch.tensor([-3, 0], dtype=torch.int32)}, "left_pad is -3"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_kvcache_call_that_fails_writes_nothing(wrong, message):
    caches, new = draw(2, 6, 4, 2, 16).unbind(), draw(2, 1, 2, 16)
    before = [cache.clone() for cache in caches]
    right = {"cache_seqlens": 5, "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)}
    for _ in range(2):  # behind a call that is right, too
        with pytest.raises((TypeError, ValueError), match=message):
            fa.flash_attn_with_kvcache(draw(2, 1, 4, 16), *caches, new, new, **{**right, **wrong})
        assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
        fa.flash_attn_with_kvcache(draw(2, 1, 4, 16), *[cache.clone() for cache in caches], new, new, **right)


def test_refusals():
    q, cache = draw(2, 1, 4, 16), draw(2, 40, 4, 16)
    table, cu = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_batch_idx"):
        fa.flash_attn_with_kvcache(q, cache, cache, block_table=table, cache_batch_idx=table[:, 0])
    with pytest.raises(ValueError, match="block_table"):
        fa.flash_attn_with_kvcache(q, cache, cache, block_table=table + 2)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        fa.flash_attn_varlen_func(q[0], cache, cache, cu, cu, 1, 1, dropout_p=0.1, block_table=table[:1])
    with pytest.raises(ValueError, match="expected at most the 40 positions"):
        fa.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=40)
    for kind in (ValueError, RuntimeError):  # the latter is flash-attn's
        for new, length in ((q, 40), (None, 41)):
            with pytest.raises(kind, match="at most the 40 positions of the pages in block_table"):
                fa.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=length, block_table=table)
    with pytest.raises(ValueError, match="new keys"):
        fa.flash_attn_with_kvcache(q, cache, cache, rotary_cos=draw(64, 4), rotary_sin=draw(64, 4), cache_seqlens=9)
    with pytest.raises(ValueError, match="dropout_p"):
        fa.flash_attn_func(q, q, q, 1.5)


# Padding.


def test_unpad_and_pad():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    x = draw(3, 4, 2, 5).requires_grad_()
    tokens, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert (cu.tolist(), cu.dtype, longest, used.tolist()) == ([0, 3, 4, 4], torch.int32, 3, [3, 1, 0])
    back = bert_padding.pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, mask[..., None, None].expand_as(x).float())
    _, _, cu, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (cu.tolist(), longest, used.tolist()) == ([0, 4, 6, 6], 4, [3, 1, 0])


def test_unpad_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = draw(2, 6, 5)
    tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1]]))
    assert (indices.tolist(), cu.tolist(), longest) == ([*range(5), *range(6, 12)], [0, 2, 5, 11], 6)


def test_index_first_axis():
    x, indices = draw(5, 2, 3).requires_grad_(), torch.tensor([4, 0, 4])
    assert torch.equal(bert_padding.index_first_axis(x, indices), x[indices])
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    (gradient,) = torch.autograd.grad(rows.sum() + residual.sum(), x)
    assert gradient[:, 0, 0].tolist() == [2, 1, 1, 1, 3]


# Rotary embeddings.


def turned(x, angles, interleaved):
    """Rotation as a product of complex numbers, in float64."""
    half = angles.shape[-1]
    x = x.double()
    pair = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pair = pair if interleaved else pair.transpose(-1, -2)
    z = torch.view_as_complex(pair.contiguous()) * torch.polar(torch.ones(()).double(), angles.double())[..., None, :]
    pair = torch.view_as_real(z)
    pair = pair.flatten(-2) if interleaved else pair.transpose(-1, -2).flatten(-2)
    return torch.cat([pair, x[..., 2 * half :]], -1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([5, 0])], ids=["none", "one", "each"])
def test_rotary(offsets, interleaved, inplace):
    angles = draw(20, 4)
    x = draw(2, 7, 3, 10).requires_grad_()
    steps = torch.arange(7) + (offsets[:, None] if isinstance(offsets, torch.Tensor) else offsets)
    exact = x.detach().double().requires_grad_()
    want = turned(exact, angles[steps], interleaved)
    out = rotary.apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, inplace, offsets)
    assert torch.allclose(out.double(), want, atol=1e-6)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    weights = draw(*out.shape)
    (got,) = torch.autograd.grad(out, x, weights)
    (want_gradient,) = torch.autograd.grad(want, exact, weights.double())
    assert torch.allclose(got.double(), want_gradient, atol=1e-6)
    plain = rotary.apply_rotary_emb_torch(
        exact, angles[steps].cos().double(), angles[steps].sin().double(), interleaved
    )
    assert torch.allclose(plain, want, atol=1e-6)


def test_rotary_of_packed_sequences():
    angles, x, cu = draw(20, 4), draw(9, 3, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    offsets = torch.tensor([2, 7])
    steps = torch.tensor([2, 3, 4, 5, 7, 8, 9, 10, 11])
    out = rotary.apply_rotary_emb(x, angles.cos(), angles.sin(), seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=5)
    assert torch.allclose(out.double(), turned(x, angles[steps], False), atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_rotary_of_qkv(grouped):
    angles, angles_k = draw(20, 4), draw(20, 4) * 2
    shape, heads = ((2, 7, 8, 8), (4, 2)) if grouped else ((2, 7, 3, 4, 8), (4, 4))
    leaf = draw(*shape).requires_grad_()
    out = rotary.apply_rotary_emb_qkv_(
        leaf.clone(), angles.cos(), angles.sin(), angles_k.cos(), angles_k.sin(), True,
        num_heads_q=4 if grouped else None,
    )  # fmt: skip
    q, k, v = leaf.split([heads[0], heads[1], heads[1]], 2) if grouped else leaf.unbind(2)
    parts = [turned(q, angles[:7], True), turned(k, angles_k[:7], True), v.double()]
    want = torch.cat(parts, 2) if grouped else torch.stack(parts, 2)
    assert torch.allclose(out.double(), want, atol=1e-6)
    weights = draw(*shape)
    (got,) = torch.autograd.grad(out, leaf, weights)
    (want_gradient,) = torch.autograd.grad(want, leaf, weights.double())
    assert torch.allclose(got, want_gradient, atol=1e-6)


@pytest.mark.parametrize("scale_base", [None, 512])
def test_rotary_embedding(scale_base):
    module = rotary.RotaryEmbedding(8, scale_base=scale_base)
    angles = torch.arange(12.0)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    q, kv = draw(2, 9, 3, 8), draw(2, 9, 2, 3, 8)
    turned_q, turned_kv = module(q.clone(), kv.clone(), seqlen_offset=3)
    growth = 1.0
    if scale_base:
        power = (torch.arange(12.0) - 6)[3:, None] / scale_base
        growth = (((torch.arange(0, 8, 2) + 3.2) / 11.2) ** power).repeat(1, 2)[:, None]
    assert torch.allclose(turned_q.double(), turned(q, angles[3:], False) * growth, atol=2e-6)
    assert torch.allclose(turned_kv[:, :, 0].double(), turned(kv[:, :, 0], angles[3:], False) / growth, atol=2e-6)
    assert torch.equal(turned_kv[:, :, 1], kv[:, :, 1])
    both = module(torch.stack([q, *kv.unbind(2)], 2), seqlen_offset=3)
    assert torch.allclose(both, torch.stack([turned_q, *turned_kv.unbind(2)], 2))


# Under the name flash_attn.


@pytest.fixture
def absent(monkeypatch):
    """No flash_attn before and after."""
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")
    yield
    if "flash_attn" in compat._installed:
        compat.uninstall("flash_attn")
    assert importlib.util.find_spec("flash_attn") is None


def test_install(absent):
    assert compat.install("flash_attn") is fa
    assert compat.install("flash_attn") is fa
    for name in ("flash_attn_interface", "bert_padding", "layers", "layers.rotary"):
        assert importlib.import_module(f"flash_attn.{name}") is sys.modules[f"metate.compat.flash_attn.{name}"]
    scope = {}
    exec("from flash_attn.layers.rotary import apply_rotary_emb\nimport flash_attn.bert_padding as b", scope)
    assert scope["apply_rotary_emb"] is rotary.apply_rotary_emb
    assert scope["b"].pad_input is bert_padding.pad_input
    assert importlib.import_module("flash_attn_2_cuda") is sys.modules["metate.compat.flash_attn.extension"]
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == fa.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.losses")
    compat.uninstall("flash_attn")
    for name in ("flash_attn", "flash_attn_2_cuda"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_install_shadows_only_by_force(absent, monkeypatch):
    real = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    with pytest.raises(ImportError, match="force=True"):
        compat.install("flash_attn")
    assert compat.install("flash_attn", force=True) is fa
    compat.uninstall("flash_attn")
    assert sys.modules["flash_attn"] is real
    monkeypatch.undo()


def test_install_knows_its_names():
    with pytest.raises(ValueError, match="flash_attn"):
        compat.install("flash_attention")
    with pytest.raises(ValueError, match="not installed"):
        compat.uninstall("flash_attn")


def test_metate_imports_none_of_this():
    code = "import sys, metate; print([m for m in sys.modules if m.startswith('metate.compat')])"
    code += "; import metate.compat.sdpa, metate.compat.transformers, metate.compat.flash_attn"
    code += "; print([m for m in sys.modules if m in ('transformers', 'flash_attn')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


@pytest.mark.parametrize(
    "message,call",
    [
        ("flash_attn: window_size is 3", lambda q: fa.flash_attn_func(q, q, q, window_size=3)),
        (r"kv is of shape \(2, 5, 4, 8\), expected \(batch, seqlen, 2", lambda q: fa.flash_attn_kvpacked_func(q, q)),
        (r"qkv is of shape .*, expected \(batch, seqlen, 3", fa.flash_attn_qkvpacked_func),
        (r"cache_seqlens is of shape \(3,\)", lambda q: fa.flash_attn_with_kvcache(q, q, q, cache_seqlens=[1, 2, 3])),
        ("metate.attention: q is NoneType", lambda q: fa.flash_attn_func(None, q, q)),
    ],
)
def test_wrong_arguments_are_named(message, call):
    with pytest.raises((TypeError, ValueError), match=message):
        call(draw(2, 5, 4, 8))


KVCACHE = dict(q=draw(2, 1, 4, 8), k_cache=draw(3, 9, 2, 8), v_cache=draw(3, 9, 2, 8), cache_seqlens=3)
NEW = dict(k=draw(2, 1, 2, 8), v=draw(2, 1, 2, 8))
ANGLES = dict(rotary_cos=draw(20, 4), rotary_sin=draw(20, 4))


@pytest.mark.parametrize(
    "message,wrong",
    [
        ("q is NoneType, expected a dense torch.Tensor", dict(q=None)),
        ("q is torch.int8", dict(q=torch.zeros(2, 1, 4, 8, dtype=torch.int8))),
        (r"k_cache is of shape \(9, 2, 8\)", dict(k_cache=draw(9, 2, 8))),
        ("k_cache is on meta, expected cpu like q", dict(k_cache=draw(3, 9, 2, 8).to("meta"))),
        (r"k is of shape \(1, 1, 2, 8\), .* with batch = 2", dict(NEW, k=draw(1, 1, 2, 8))),
        ("v is list", dict(NEW, v=[1])),
        ("v is torch.sparse_coo", dict(NEW, v=NEW["v"].to_sparse())),
        (r"rotary_sin is .* of shape \(20, 3\)", dict(NEW, **dict(ANGLES, rotary_sin=draw(20, 3)))),
        ("rotary_cos is .* at most 8 / 2 columns", dict(NEW, rotary_cos=draw(20, 5), rotary_sin=draw(20, 5))),
        ("cache_seqlens is 'many'", dict(cache_seqlens="many")),
        ("cache_seqlens is torch.float32", dict(cache_seqlens=torch.tensor([1.5, 2.0]))),
        ("cache_seqlens is -2, expected at least 0", dict(NEW, **ANGLES, cache_seqlens=-2)),
        ("at most the 9 positions", dict(cache_seqlens=2**62)),
        ("cache_batch_idx is torch.float32", dict(cache_batch_idx=torch.ones(2))),
        (r"block_table is of shape \(1, 2\)", dict(block_table=torch.zeros(1, 2, dtype=torch.int32))),
        ("flash_attn: softcap is None, expected a number", dict(softcap=None)),
    ],
)
def test_wrong_arguments_of_a_cache_are_named(message, wrong):
    with pytest.raises((TypeError, ValueError), match=message):
        fa.flash_attn_with_kvcache(**{**KVCACHE, **wrong})


@pytest.mark.parametrize("name,wrong", [("max_seqlen_q", 3), ("max_seqlen_k", -1), ("max_seqlen_q", 4.0)])
def test_lengths_that_cannot_be_are_named(name, wrong):
    x, starts = draw(6, 2, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
    options = dict(max_seqlen_q=4, max_seqlen_k=4, dropout_p=0.5, return_attn_probs=True)
    assert fa.flash_attn_varlen_func(x, x, x, starts, starts, **options)[2].shape == (2, 2, 4, 4)
    with pytest.raises((TypeError, ValueError), match=f"flash_attn: {name} is {wrong}"):
        fa.flash_attn_varlen_func(x, x, x, starts, starts, **{**options, name: wrong})
