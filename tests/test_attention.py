"""Attention: what the declaration of the operators cannot say."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, same_bits
from torch import Tensor

import metate
from metate import AttentionMask
from metate.ops.attention import reference, rules
from metate.ops.attention.declaration import CASES, backward_op

ATTENTION = [(device, backend) for op, device, backend in (p.values for p in BACKENDS) if op.name == "attention"]
everywhere = pytest.mark.parametrize("device,backend", ATTENTION, ids=lambda value: value)


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-2) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance)


@everywhere
def test_packed_equals_one_by_one(device, backend):
    lengths_q, lengths_k = [5, 0, 64, 33], [9, 4, 64, 70]
    q, k, v = (
        random(102, 4, 32, device=device),
        random(147, 2, 32, device=device),
        random(147, 2, 32, device=device, seed=2),
    )
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (lengths_q, lengths_k))
    with metate.use(backend):
        out, lse = metate.attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        expected = [metate.attention(a[None], b[None], c[None], causal=True, return_lse=True) for a, b, c in parts]
    close(out, torch.cat([o[0] for o, _ in expected]))
    close(lse, torch.cat([s[0] for _, s in expected], -1))


@everywhere
def test_padding_may_hold_nan(device, backend):
    """Keys that a mask hides and tokens outside every sequence change no bit, whatever they hold."""
    q, k, v = (
        random(2, 40, 2, 64, device=device),
        random(2, 70, 2, 64, device=device),
        random(2, 70, 2, 64, device=device, seed=1),
    )
    lengths = torch.tensor([51, 33], device=device)
    mask = AttentionMask.lengths(lengths, 40)
    hidden = (torch.arange(70, device=device) >= lengths[:, None])[..., None, None]
    with metate.use(backend):
        clean = metate.attention(q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), mask=mask, return_lse=True)
        dirty = metate.attention(
            q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan), mask=mask, return_lse=True
        )
        assert same_bits(clean, dirty)
        cu = torch.tensor([3, 20, 60], dtype=torch.int32, device=device)
        outside = (torch.arange(70, device=device) < 3) | (torch.arange(70, device=device) >= 60)
        packed = [x[0, :, :, :].masked_fill(outside[:, None, None], math.nan) for x in (k, v)]
        out, lse = metate.attention_varlen(packed[0], *packed, cu, cu, causal=True, return_lse=True)
    assert out.isfinite().all() and (out[outside] == 0).all() and (lse[:, outside] == -math.inf).all()


@pytest.mark.parametrize("backend", [backend for device, backend in ATTENTION if device == "cpu" and backend == "cpu"])
def test_nan_in_a_later_token_does_not_reach_earlier_ones(backend):
    """Inside a tile too: a causal mask hides the last keys from the first rows of the same tile."""
    q, k, v = (random(1, 32, 2, 32, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))
    out = metate.attention(q, k, v, causal=True)
    poisoned = v.detach().clone()
    poisoned[:, 20] = math.nan
    dirty = metate.attention(q, k, poisoned, causal=True)
    assert same_bits(dirty[:, :20], out[:, :20]) and dirty[:, 20:].isnan().all()


@everywhere
def test_rows_without_a_key_are_zero_and_silent(device, backend):
    q, k, v = (random(1, n, 2, 16, device=device, seed=n).requires_grad_() for n in (40, 20, 20))
    with metate.use(backend):
        out, lse = metate.attention(q, k, v, causal=True, return_lse=True)  # rows 0 to 19 see nothing
        out.float().sum().backward()
    assert (out[:, :20] == 0).all() and (lse[..., :20] == -math.inf).all() and lse[..., 20:].isfinite().all()
    assert (q.grad[:, :20] == 0).all() and all(x.grad.isfinite().all() for x in (q, k, v))


# One key a row, in several ways; ALiBi and caps change the logits, but not that there is one.
SINGLE_KEYS = {
    "one": (1, {}),
    "diagonal": (150, {"window": (0, 0)}),
    "alibi": (1, {"alibi_slopes": torch.tensor([0.3, 0.1, 0.7, 0.2])}),
    "softcap": (1, {"softcap": 5.0}),
    "dropout": (1, {"dropout_p": 0.5, "seed": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SINGLE_KEYS)
def test_a_single_key_has_the_whole_probability(name, dtype):
    """dv is then a sum of grad_out, which here is exact before it is rounded, and often a tie."""
    keys, options = SINGLE_KEYS[name]
    q = 4 * random(2, 150, 4, 48, dtype=dtype)
    k, v = (random(2, keys, 2, 48, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    grad = (random(2, 150, 4, 48, dtype=torch.float32, seed=3) * 128).round() / 128
    with metate.use("cpu"):
        kept = metate.attention(q, k, torch.ones_like(v), **options).detach().float()  # 1, with dropout 0 or 2
        metate.attention(q, k, v, **options).backward(grad.to(dtype))
    sums = (grad.to(dtype).double() * kept).unflatten(2, (2, 2)).sum(3)
    assert torch.equal(v.grad, (sums if keys > 1 else sums.sum(1, keepdim=True)).to(dtype))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_second_derivatives_take_a_few_queries_at_a_time(case, monkeypatch):
    """They are those that the whole formula gives; nothing of the size of all scores is made."""
    args = list(backward_op.example(CASES[case], torch.float64))
    leaves = [x.detach().requires_grad_() for x in args[:9] if x is not None]
    rest = iter(leaves)
    outs = backward_op(*(next(rest) if x is not None else None for x in args[:9]), *args[9:])
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in outs]
    sizes = []
    scores = reference._Scores.__init__
    monkeypatch.setattr(
        reference._Scores, "__init__", lambda self, *a: (scores(self, *a), sizes.append(self.s.shape[2]))[0]
    )

    def second() -> list[Tensor]:
        return list(torch.autograd.grad(outs, leaves, weights, retain_graph=True, allow_unused=True))

    whole = second()
    monkeypatch.setattr(rules, "SCORES_AT_ONCE", 1)
    sizes.clear()
    for a, b in zip(second(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert max(sizes, default=0) <= 16


def test_masks_agree_with_dense_ones():
    q, k, v = (random(1, 64, 2, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    ids = torch.tensor([0] * 20 + [1] * 30 + [2] * 14)
    i = torch.arange(64)
    pairs = [
        (AttentionMask.documents(ids), ids[:, None] == ids),
        (AttentionMask.block_sparse(torch.eye(4, dtype=torch.bool), (16, 16)), i[:, None] // 16 == i // 16),
        (AttentionMask.lengths(torch.tensor([40]), 64, torch.tensor([5])), ((i >= 5) & (i < 40)).expand(64, 64)),
    ]
    for mask, visible in pairs:
        close(metate.attention(q, k, v, mask=mask), metate.attention(q, k, v, mask=visible), 1e-6)
        assert torch.equal(
            metate.attention(q, k, v, mask=mask, causal=True), metate.attention(q, k, v, mask=mask, window=(-1, 0))
        )


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("size", [(128, 128), (64, 32), (16, 24), (1, 40), (100, 7), (500, 500)], ids=str)
def test_block_masks_are_dense_ones(size: tuple[int, int], heads: int) -> None:
    """Gradients too, with a window beside them; blocks end within tiles, tiles within blocks, heads share keys."""
    S = 290
    q, k, v = (random(1, S, H, 32, dtype=torch.float32, seed=H + i) for i, H in enumerate((4, 2, 2)))
    counts = [-(-S // n) for n in size]
    visible = torch.rand(1, heads, *counts, generator=torch.Generator().manual_seed(0)) < 0.4
    dense = visible.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :S, :S]
    grad = random(1, S, 4, 32, dtype=torch.float32, seed=9)

    def gradients(mask: AttentionMask | Tensor, **window: tuple[int, int]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = metate.attention(*leaves, mask=mask, **window)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    for window in ({}, {"window": (150, 20)}):
        blocks, bits = (gradients(mask, **window) for mask in (AttentionMask.block_sparse(visible, size), dense))
        for x, y in zip(blocks, bits, strict=True):
            close(x, y, 1e-5)


def test_tiles_of_heads_with_masks_of_their_own_do_not_follow_the_threads() -> None:
    """Their queries are cut by the number of threads, and end within a tile."""
    q, k = random(1, 290, 8, 32), random(1, 290, 2, 32)
    visible = torch.rand(1, 8, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    mask, threads = AttentionMask.block_sparse(visible, (32, 32)), torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            outs.append(metate.attention(q, k, k, mask=mask))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(outs[0], outs[1]) and same_bits(outs[0], outs[2])


@pytest.mark.parametrize("shape", [(1, 1, 33, 70), (2, 3, 5, 64), (1, 2, 7, 1), (2, 1, 0, 40), (1, 1, 4, 0)], ids=str)
def test_dense_masks_are_packed_bit_by_bit(shape: tuple[int, ...]) -> None:
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for given in (visible, visible.mT.contiguous().mT, visible.flip(-1)[..., 1:], visible[..., 1:, ::2]):
        bits = AttentionMask.dense(given).bits
        assert bits is not None and bits.shape == (*given.shape[:3], -(-given.shape[3] // 32))
        j = torch.arange(32 * bits.shape[3])
        unpacked = (bits[..., j // 32] >> j % 32 & 1).bool()
        assert torch.equal(unpacked[..., : given.shape[3]], given) and not unpacked[..., given.shape[3] :].any()


def test_tree_mask_is_a_set_of_paths():
    """Every node of a draft tree computes what it would as the end of its own path."""
    parents, prefix = [-1, 0, 0, 1, 2, 2], 7
    q, k, v = (random(1, n, 2, 16, dtype=torch.float32, seed=n) for n in (6, 13, 14))
    v = v[:, :13]
    out = metate.attention(q, k, v, mask=AttentionMask.tree(parents, prefix))
    for node, _ in enumerate(parents):
        path, at = [], node
        while at >= 0:
            path.append(prefix + at)
            at = parents[at]
        keys = [*range(prefix), *reversed(path)]
        close(out[:, node : node + 1], metate.attention(q[:, node : node + 1], k[:, keys], v[:, keys]), 1e-6)
    with pytest.raises(ValueError, match=r"metate.AttentionMask.tree: parents\[1\] is 5"):
        AttentionMask.tree([-1, 5])


@everywhere
def test_parts_merge_to_the_whole(device, backend):
    q, k, v = (random(2, 64, 4, 32, device=device, seed=seed) for seed in range(3))
    with metate.use(backend):
        whole = metate.attention(q, k, v, return_lse=True)
        parts = [metate.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 17), slice(17, 64))]
        merged = metate.merge_attention_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    for got, expected in zip(merged, whole, strict=True):
        close(got, expected)


@everywhere
@pytest.mark.parametrize("scale", [1e9, 1e20])
def test_huge_logits_pick_one_key(device, backend, scale):
    q, k, v = (random(1, 70, 2, 64, device=device, seed=i) for i in range(3))
    with metate.use(backend):
        out, lse = metate.attention(q, k, v, scale=scale, return_lse=True)
    logits = scale * torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    top, key = logits.max(-1)
    chosen = v.transpose(1, 2).take_along_dim(key[..., None], 2).transpose(1, 2)
    torch.testing.assert_close(out, chosen, rtol=0, atol=0)
    torch.testing.assert_close(lse.double(), top, rtol=1e-6, atol=0)


@everywhere
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e9, 1e20])
def test_equal_keys_share_a_row_however_large_their_logits(device, backend, scale):
    """Where the log-sum-exp has few digits left to tell among how many, or none."""
    q, v = random(1, 5, 2, 32, device=device), random(1, 40, 2, 16, device=device)
    k = torch.full((1, 40, 2, 32), -7, dtype=q.dtype, device=device)
    with metate.use(backend):
        out, sums = metate.attention(q, k, v, scale=scale, return_column_sums=True)
        parts = torch.full((3, 1, 2, 1), scale, device=device)
        merged, _ = metate.merge_attention_states(v[0, :3, None, None], parts)
    close(out, v.float().mean(1, keepdim=True).expand_as(out), 1e-2)
    close(sums, torch.full_like(sums, 5 / 40), 1e-6)
    close(merged, v[0, :3].float().mean(0)[None, None], 1e-2)


@everywhere
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e9, 1e20])
def test_equal_keys_share_a_gradient_however_large_their_logits(device, backend, scale):
    """Each would get all of it where a rounded log-sum-exp has lost among how many."""
    keys = 40
    q, v = random(1, 5, 4, 32, device=device), random(1, keys, 2, 16, device=device, seed=1)
    k = torch.full((1, keys, 2, 32), -7, dtype=q.dtype, device=device)
    sinks = torch.tensor([1.0, -math.inf, 1.0, 1e3], device=device)
    grad_out = random(1, 5, 4, 16, device=device, seed=2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with metate.use(backend):
        metate.attention(*leaves, scale=scale, sinks=sinks).backward(grad_out)
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    logit = scale * (q * k[:, :1]).sum(-1).transpose(1, 2)  # of all keys
    top = torch.maximum(logit, sinks.double()[None, :, None])
    p = ((logit - top).exp() / (keys * (logit - top).exp() + (sinks.double()[:, None] - top).exp()))[..., None]
    dp = torch.einsum("bihd,bjhd->bhij", grad_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, q)
    dv = torch.einsum("bhij,bihd->bjhd", p.expand_as(dp), grad_out)
    got = [x.grad.double() for x in leaves]
    torch.testing.assert_close(got[1], dk.unflatten(2, (2, 2)).sum(3), rtol=0, atol=1e-2 * scale)
    torch.testing.assert_close(got[2], dv.unflatten(2, (2, 2)).sum(3), rtol=0, atol=1e-2)
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, k)  # 0 but for sinks, and for what rounding took of `out`
    torch.testing.assert_close(got[0], dq, rtol=0, atol=4e-2 * scale)


@everywhere
def test_column_sums_add_up_to_the_number_of_queries(device, backend):
    q, k = random(2, 40, 4, 32, device=device), random(2, 70, 2, 32, device=device)
    with metate.use(backend):
        _, _, sums = metate.attention(q, k, k, causal=True, return_lse=True, return_column_sums=True)
    assert sums.shape == (2, 4, 70)
    close(sums.sum(-1), torch.full((2, 4), 40.0, device=device), 1e-2)


@everywhere
def test_dropout_keeps_the_expected_share(device, backend):
    v = torch.ones(1, 256, 2, 16, device=device, dtype=torch.bfloat16)
    q = torch.zeros_like(v)
    with metate.use(backend):
        out = metate.attention(q, q, v, dropout_p=0.25, seed=1)
        assert same_bits(out, metate.attention(q, q, v, dropout_p=0.25, seed=1))
        assert not torch.equal(out, metate.attention(q, q, v, dropout_p=0.25, seed=2))
        assert not torch.equal(out, metate.attention(q, q, v, dropout_p=0.25, seed=1, offset=1))
    assert abs(out.float().mean().item() - 1) < 0.02


def test_dropout_compiles_without_a_seed():
    q = torch.randn(1, 8, 2, 16)
    dropped = torch.compile(lambda q: metate.attention(q, q, q, dropout_p=0.3), fullgraph=True)
    assert not torch.equal(dropped(q), dropped(q))


def test_memory_is_linear_in_the_sequence_length():
    """Forward and backward at 8192 tokens: the score matrix alone would take 256 MiB a head."""
    code = """
import resource, torch, metate
q, k, v = (torch.randn(1, 8192, 1, 64, requires_grad=True) for _ in range(3))
metate.attention(q[:, :64], k[:, :64], v[:, :64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
metate.attention(q, k, v, causal=True).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    if metate.explain(metate.attention, *[torch.zeros(1, 1, 1, 1)] * 3).backend != "cpu":
        pytest.skip("no compiled CPU kernels")
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 64 << 10, f"{int(grown) >> 10} MiB"


def test_compiles_with_cu_seqlens_on_the_device():
    compiled = torch.compile(metate.attention_varlen, backend="aot_eager", fullgraph=True)
    q, cu = random(10, 2, 8, dtype=torch.float32), torch.tensor([0, 4, 10], dtype=torch.int32)
    assert same_bits(compiled(q, q, q, cu, cu, causal=True), metate.attention_varlen(q, q, q, cu, cu, causal=True))


Q = torch.zeros(2, 5, 4, 8)
K = torch.zeros(2, 7, 2, 8)
K3, WIDE = torch.zeros(2, 7, 3, 8), torch.zeros(1, 1, 1, 513)
WRONG = [
    (TypeError, "q is list, expected a torch.Tensor", dict(q=[1])),
    (TypeError, "q is int32, expected float32 or bfloat16 or float16 or float64", dict(q=Q.int())),
    (TypeError, "k is bfloat16, expected float32", dict(k=K.bfloat16())),
    (ValueError, r"q is of shape \(5, 4, 8\), expected \(batch, seqlen_q, heads, head_dim\)", dict(q=Q[0])),
    (ValueError, "k is on meta, expected cpu", dict(k=K.to("meta"))),
    (ValueError, r"k is of shape \(2, 7, 2, 9\).* head_dim = 8", dict(k=torch.zeros(2, 7, 2, 9))),
    (ValueError, r"v is of shape \(2, 6, 2, 8\).* seqlen_k = 7", dict(v=K[:, :6])),
    (ValueError, r"v is of shape \(1, 7, 2, 8\).* batch = 2", dict(v=K[:1])),
    (ValueError, r"k has 3 heads, q has 4; .* multiple of k heads; axes are \(…, heads, head_dim\)", dict(k=K3, v=K3)),
    (ValueError, "head_dim is 0, expected 1 to 512", dict(q=Q[..., :0], k=K[..., :0])),
    (ValueError, "head_dim is 513, expected 1 to 512", dict(q=WIDE, k=WIDE, v=WIDE)),
    (ValueError, "scale is nan, expected a finite number", dict(scale=math.nan)),
    (TypeError, "scale is '1', expected a number", dict(scale="1")),
    (ValueError, r"window\[0\] is -3, expected -1", dict(window=(-3, 0))),
    (TypeError, "window is 5, expected two integers", dict(window=5)),
    (TypeError, "window is 'ab', expected two integers", dict(window="ab")),
    (TypeError, r"window is \(0.5, 1.0\), expected two integers", dict(window=(0.5, 1.0))),
    (TypeError, "causal is Tensor, expected True or False", dict(causal=torch.tensor([True, False]))),
    (ValueError, "seed is 18446744073709551616, expected a 64-bit integer", dict(dropout_p=0.5, seed=2**64)),
    (ValueError, "softcap is -1.0, expected 0", dict(softcap=-1.0)),
    (ValueError, r"dropout_p is 1.0, expected a probability in \[0, 1\)", dict(dropout_p=1.0, seed=0)),
    (ValueError, "dropout_p is nan", dict(dropout_p=math.nan, seed=0)),
    (ValueError, r"sinks is of shape \(3,\).* heads = 4", dict(sinks=torch.zeros(3))),
    (ValueError, "bias is of shape .* seqlen_k = 7", dict(bias=torch.zeros(1, 1, 1, 6))),
    (ValueError, "alibi_slopes is of shape", dict(alibi_slopes=torch.zeros(3, 4))),
    (TypeError, "bias is bool, expected numbers, .* as mask", dict(bias=torch.ones(5, 7, dtype=torch.bool))),
    (TypeError, "mask is float32, expected a bool tensor", dict(mask=torch.zeros(5, 7))),
    (ValueError, "mask is of shape .*, expected broadcastable to", dict(mask=torch.ones(1, 2, 4, 5, 7) > 0)),
    (ValueError, r"block_size\[0\] is 0", dict(mask=AttentionMask.block_sparse(torch.ones(5, 1), (0, 8)))),
    (ValueError, "backend is 'gpu', expected 'cpu'", dict(backend="gpu")),
    (TypeError, "q is NoneType, expected a torch.Tensor", dict(q=None, bias=torch.zeros(5, 7))),
]  # fmt: skip


@pytest.mark.parametrize(
    "error,message,wrong", WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None
)
def test_wrong_arguments_are_named(error, message, wrong):
    with pytest.raises(error, match=message):
        metate.attention(**{**dict(q=Q, k=K, v=K), **wrong})


@pytest.mark.parametrize(
    "message,cu_q,cu_k",
    [
        (r"cu_seqlens_q is \[0, 4, 3\], expected non-decreasing", [0, 4, 3], [0, 1, 2]),
        ("cu_seqlens_k is 0 to 9, expected offsets within 0 to 7 tokens", [0, 1, 2], [0, 1, 9]),
        ("cu_seqlens_q is -1 to 5", [-1, 5], [0, 7]),
        (r"cu_seqlens_k is of shape \(3,\)", [0, 5], [0, 1, 7]),
    ],
)
def test_wrong_cu_seqlens_are_named(message, cu_q, cu_k):
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k))
    with pytest.raises(ValueError, match=message):
        metate.attention_varlen(Q[0], K[0], K[0], cu_q, cu_k)


def test_a_sparse_tensor_is_refused_after_a_dense_one() -> None:
    metate.attention(Q, Q, Q, softcap=3.0)
    with pytest.raises(TypeError, match=r"q is torch.sparse_coo, expected a dense tensor"):
        metate.attention(Q.to_sparse(), Q, Q, softcap=3.0)


def test_forward_mode_is_refused() -> None:
    """torch runs a custom operator without its tangents: the derivative would be 0 without a word."""
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(NotImplementedError, match="q has a tangent"):
        torch.func.jvp(lambda q: metate.attention(q, q, q), (q,), (q,))
    _, tangent = torch.func.jvp(lambda s: s * metate.attention(q, q, q), (q,), (q,))
    assert tangent.abs().sum() > 0


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (7,), (), (5, 7), (5, 1), (4, 5, 7), (2, 4, 5, 7)], ids=str)
def test_bool_masks_and_biases_broadcast(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(2, 7, 4, 8)
    mask, bias = torch.rand(shape) < 0.7, torch.randn(shape)
    whole = (2, 4, 5, 7)
    out = metate.attention(q, k, v, mask=mask, bias=bias)
    assert torch.equal(out, metate.attention(q, k, v, mask=mask.expand(whole), bias=bias.expand(whole)))


@pytest.mark.parametrize("shape", [(5, 6), (5, 20), (4, 7), (1, 1, 5, 32)], ids=str)
def test_masks_of_other_lengths_are_refused(shape: tuple[int, ...]) -> None:
    """Packed to bits, 6 or 20 columns take the same word as the 7 of the keys."""
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 7, 2, 8)
    with pytest.raises(ValueError, match="mask"):
        metate.attention(q, k, k, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "message,wrong",
    [
        (r"k is of shape \(7, 2, 9\), expected \(tokens_k, kv_heads, head_dim\) with head_dim = 8",
         dict(k=torch.zeros(7, 2, 9))),
        (r"v is of shape \(6, 2, 8\), expected .* with tokens_k = 7", dict(v=K[0, :6])),
        (r"q is of shape \(1, 5, 4, 8\), expected \(tokens, heads, head_dim\)", dict(q=Q[:1])),
        ("k is bfloat16, expected float32", dict(k=K[0].bfloat16())),
        ("k has 3 heads, q has 4", dict(k=K3[0], v=K3[0])),
        (r"cu_seqlens_k is of shape \(2,\), expected \(sequences \+ 1\)",
         dict(cu_seqlens_k=torch.tensor([0, 7], dtype=torch.int32))),
        ("cu_seqlens_q is int64, expected int32", dict(cu_seqlens_q=torch.tensor([0, 2, 5]))),
        ("dropout_p is 1.0", dict(dropout_p=1.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sums", [False, True])
def test_wrong_packed_arguments_are_named_as_they_came(message, wrong, sums) -> None:
    q_starts, k_starts = (torch.tensor([0, 2, n], dtype=torch.int32) for n in (5, 7))
    good = dict(q=Q[0], k=K[0], v=K[0], cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, return_column_sums=sums)
    with pytest.raises((TypeError, ValueError), match=f"^metate.attention_varlen: {message}"):
        metate.attention_varlen(**{**good, **wrong})


def test_varlen_wants_starts_and_an_attention_mask() -> None:
    x, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(TypeError, match="cu_seqlens_q is NoneType"):
        metate.attention_varlen(x, x, x, None, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask is Tensor"):
        metate.attention_varlen(x, x, x, starts, starts, mask=torch.ones(5, 5, dtype=torch.bool))  # type: ignore[arg-type]


SEQLENS = torch.tensor([3, 4])


@pytest.mark.parametrize(
    "error,message,make",
    [
        (TypeError, "lengths: seqlens_k is list", lambda: AttentionMask.lengths([3], 4)),
        (ValueError, "lengths: seqlens_k is float32", lambda: AttentionMask.lengths(torch.tensor([3.5]), 4)),
        (ValueError, "lengths: starts is of shape", lambda: AttentionMask.lengths(SEQLENS, 4, SEQLENS[:1])),
        (TypeError, "documents: document_ids is list", lambda: AttentionMask.documents([0, 1])),
        (ValueError, r"documents: document_ids is of shape \(\)", lambda: AttentionMask.documents(torch.tensor(1))),
        (TypeError, "dense: visible is list", lambda: AttentionMask.dense([True])),
        (ValueError, "dense: visible is of shape", lambda: AttentionMask.dense(torch.ones(1, 1, 1, 1, 1).bool())),
        (TypeError, "block_sparse: blocks is list", lambda: AttentionMask.block_sparse([1])),
        (TypeError, ": block_size is 4, expected two", lambda: AttentionMask.block_sparse(torch.ones(2, 2), 4)),
        (TypeError, r"tree: parents is \[-1.0, 0.0\], expected", lambda: AttentionMask.tree([-1.0, 0.0])),
        (ValueError, "tree: prefix is -1", lambda: AttentionMask.tree([-1], -1)),
        (TypeError, "tree: prefix is None", lambda: AttentionMask.tree([-1], None)),
        (TypeError, "lengths: seqlens_k is NoneType", lambda: AttentionMask.lengths(None, 4)),
        (TypeError, "lengths: seqlen_q is 1.5", lambda: AttentionMask.lengths(SEQLENS, 1.5)),
        (ValueError, "lengths: seqlen_q is -2", lambda: AttentionMask.lengths(SEQLENS, -2)),
        (TypeError, "documents: document_ids is torch.sparse", lambda: AttentionMask.documents(SEQLENS.to_sparse())),
    ],
)
def test_wrong_arguments_of_masks_are_named(error, message, make) -> None:
    with pytest.raises(error, match=f"metate.AttentionMask.?{message}"):
        make()


def test_any_number_but_0_makes_a_block_visible() -> None:
    """Cast to bytes, 0.5 and 256 would hide theirs."""
    x = torch.randn(1, 4, 2, 8)
    numbers = torch.tensor([[0.5, 0], [256, -1]])
    masks = (AttentionMask.block_sparse(given, (2, 2)) for given in (numbers, numbers != 0))
    assert same_bits(*(metate.attention(x, x, x, mask=mask) for mask in masks))


def test_seeds_are_64_bits_signed_or_not() -> None:
    """torch's generators are seeded by 0 to 2**64 - 1."""
    x = torch.randn(1, 40, 2, 8)
    signed, unsigned, other = (metate.attention(x, x, x, dropout_p=0.5, seed=s) for s in (-1, 2**64 - 1, 2**63))
    assert same_bits(signed, unsigned) and not same_bits(unsigned, other)


def test_gradients_of_few_scores_are_exact_on_a_cpu() -> None:
    """A row with one key has no gradient but what is left when sums of 100 and of 90 products cancel."""
    case = next(case for case in CASES if case["D"] == 100) | {"Sq": 33, "Sk": 1, "Hkv": 1, "Dv": 90}
    args = backward_op.example(case, torch.float32)
    backward_op.assert_close(backward_op(*args), args)
