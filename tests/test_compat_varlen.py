"""torch.nn.attention.varlen on CPU tensors through metate, against metate's own functions and float64 attention."""

import inspect

import pytest
import torch

pytest.importorskip("torch.nn.attention.varlen")

from torch.nn.attention import varlen

import metate
from metate.compat import varlen as route

pytestmark = pytest.mark.skipif(
    "seqused_k" not in inspect.signature(varlen.varlen_attn).parameters, reason="this torch's varlen_attn knows less"
)
LENGTHS_Q, LENGTHS_K = [5, 1, 0, 17], [9, 30, 4, 17]


@pytest.fixture(autouse=True)
def _active():
    with route.activated():
        yield


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(LENGTHS_Q), 4, 16), (sum(LENGTHS_K), 2, 16), (sum(LENGTHS_K), 2, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def truth(q, k, v, window):
    out = []
    for i in range(len(LENGTHS_Q)):
        (a, b), (c, d) = (starts(lengths)[i : i + 2] for lengths in (LENGTHS_Q, LENGTHS_K))
        with metate.use("reference"):
            out.append(metate.attention(q[None, a:b], k[None, c:d], v[None, c:d], window=window)[0])
    return torch.cat(out)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0), (3, 2)])
def test_forward_and_gradients(window):
    q, k, v = (x.double().requires_grad_() for x in draw())
    want = truth(q, k, v, window)
    want_grads = torch.autograd.grad(want.cos().sum(), (q, k, v))
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    out = varlen.varlen_attn(q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), 17, 30, window_size=window, enable_gqa=True)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    for got, expected in zip(torch.autograd.grad(out.cos().sum(), (q, k, v)), want_grads, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("page_size", [None, 1, 8])
def test_keys_in_use_and_pages(page_size):
    q, k, v = draw()
    used = torch.tensor([6, 30, 0, 17], dtype=torch.int32)
    cu_q, cu_k = starts(LENGTHS_Q), starts(LENGTHS_K)
    aux = varlen.AuxRequest(lse=True)
    options = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": used, "return_aux": aux}
    kept = torch.cat([torch.arange(a, a + n) for a, n in zip(cu_k[:-1].tolist(), used.tolist(), strict=True)])
    cu_used = torch.nn.functional.pad(used.cumsum(0), (1, 0)).int()
    want, lse = metate.attention_varlen(q, k[kept], v[kept], cu_q, cu_used, causal=True, return_lse=True)
    if page_size:
        pages = -(-30 // page_size)
        caches = [torch.full((4, pages * page_size, 2, 16), torch.nan) for _ in range(2)]
        for i, (a, n) in enumerate(zip(cu_k[:-1].tolist(), used.tolist(), strict=True)):
            for cache, x in zip(caches, (k, v), strict=True):
                cache[i, :n] = x[a : a + n]
        k, v = (cache.reshape(4 * pages, page_size, 2, 16) for cache in caches)
        options["block_table"], cu_k = torch.arange(4 * pages, dtype=torch.int32).view(4, pages), None
    with torch.no_grad():
        out, got_lse = varlen.varlen_attn(q, k, v, cu_q, cu_k, 17, 30, **options)
        into = torch.empty_like(q)
        varlen.varlen_attn_out(into, q, k, v, cu_q, cu_k, 17, 30, **options)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=0)
    torch.testing.assert_close(got_lse, lse.masked_fill(lse == -torch.inf, torch.inf))
    assert torch.equal(into, out)


def test_bfloat16_compiles():
    q, k, v = draw(dtype=torch.bfloat16)

    def call(q, k, v):
        return varlen.varlen_attn(q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), 17, 30, enable_gqa=True)

    assert torch.equal(torch.compile(call, backend="aot_eager")(q, k, v), call(q, k, v))


def test_restore():
    q, k, v = draw()
    route.restore()
    assert not route.active()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen.varlen_attn(q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), 17, 30, enable_gqa=True)
