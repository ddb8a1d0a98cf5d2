"""What the declarations of the paged cache cannot say: equal answers by other ways, and calls that must not write."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

import metate
from metate.ops.paged_attention import reference, rules
from metate.ops.paged_attention.declaration import _case, append_op, paged_attention_op

PAGED = [p.values[1:] for p in BACKENDS if p.values[0] is paged_attention_op]


def paged(lens: list[int], page_size: int, *heads: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Caches of random numbers with these heads and dims ((heads, dim) of k, of v), shuffled pages, NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-n // page_size) for n in lens]
    table = torch.full((len(lens), max(pages)), -1, dtype=torch.int32)
    order = torch.randperm(sum(pages) + 1, generator=generator).to(torch.int32)
    heads_k, dim_k, dim_v = heads
    caches = [torch.full((len(order), page_size, heads_k, dim), float("nan")) for dim in (dim_k, dim_v)]
    for b, n in enumerate(lens):
        start = sum(pages[:b])
        table[b, : pages[b]] = order[start : start + pages[b]]
        rows = torch.arange(n)
        for cache in caches:
            cache[table[b].long()[rows // page_size], rows % page_size] = torch.randn(
                n, heads_k, cache.shape[3], generator=generator
            )
    return *caches, table, torch.tensor(lens, dtype=torch.int32)


def dense(cache: Tensor, table: Tensor, n: int) -> Tensor:
    return cache[table.clamp(min=0).long()].flatten(0, 1)[None, :n]


@pytest.mark.parametrize("queries", [1, 3])
def test_paged_equals_dense(queries):
    k_cache, v_cache, table, lens = paged([5, 33, 64], 16, 2, 24, 16)
    q = torch.randn(3, queries, 4, 24)
    out, lse = metate.paged_attention(q, k_cache, v_cache, table, lens, return_lse=True)
    for b, n in enumerate(lens.tolist()):
        k, v = dense(k_cache, table[b], n), dense(v_cache, table[b], n)
        expected, expected_lse = metate.attention(q[b : b + 1], k, v, causal=True, return_lse=True)
        torch.testing.assert_close(out[b : b + 1], expected)
        torch.testing.assert_close(lse[b : b + 1], expected_lse)


@pytest.mark.parametrize("device,backend", PAGED, ids=lambda value: value)
@pytest.mark.parametrize("scale", [300.0, 2.0**62])
def test_equal_keys_share_a_row_however_large_their_logits(device, backend, scale):
    """Where the log-sum-exp has few digits left to tell among how many, or none."""
    k_cache, v_cache, table, lens = (x.to(device) for x in paged([16], 16, 1, 32, 16))
    q = torch.randn(1, 3, 2, 32, generator=torch.Generator().manual_seed(1)).to(device)
    k_cache, v_cache = torch.full_like(k_cache, -7).bfloat16(), v_cache.bfloat16()
    with metate.use(backend):
        out, sums = metate.paged_attention(
            q.bfloat16(), k_cache, v_cache, table, lens, scale=scale, causal=False, return_column_sums=True
        )
    v = v_cache[table.long().flatten()].flatten(0, 1).float()
    torch.testing.assert_close(out.float(), v.mean(0).expand(1, 3, 2, 16), rtol=0, atol=1e-2)
    torch.testing.assert_close(sums, torch.full_like(sums, 3 / 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device,backend", PAGED, ids=lambda value: value)
@pytest.mark.parametrize("width", [64, 512])
def test_huge_logits_pick_one_key(device, backend, width):
    """What rounding leaves of a logit beside the largest is no exponent."""
    k_cache, v_cache, table, lens = (x.to(device) for x in paged([70], 16, 1, width, 64))
    q = torch.randn(1, 1, 2, width, generator=torch.Generator().manual_seed(1)).to(device)
    q, k_cache, v_cache = (x.bfloat16() for x in (q, k_cache, v_cache))
    with metate.use(backend):
        out = metate.paged_attention(q, k_cache, v_cache, table, lens, scale=1e9)
    key = (q[0, 0].double() @ dense(k_cache, table[0], 70)[0, :, 0].double().T).argmax(1)
    assert torch.equal(out[0, 0], dense(v_cache, table[0], 70)[0, key, 0])


def cascade_case(cu=None):
    """Three sequences in two groups: a cascade's prefixes, groups and own keys, and the same as whole sequences."""
    k_cache, v_cache, table, lens = paged([32, 48, 9, 21, 30], 16, 2, 24, 24)
    prefix = table[:2], lens[:2], torch.tensor([0, 1, 3], dtype=torch.int32)
    whole = torch.full((3, 6), -1, dtype=torch.int32)
    for b, group in enumerate([0, 1, 1]):
        pages = int(lens[group]) // 16
        whole[b, : pages + 2] = torch.cat([table[group, :pages], table[2 + b, :2]])
    return k_cache, v_cache, prefix, (table[2:], lens[2:]), (whole, lens[2:] + lens[[0, 1, 1]])


TREE = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
CASCADES = [
    {},
    dict(causal=False),
    dict(window=(25, 0)),
    dict(window=(3, 1)),
    dict(window=(-1, 2), softcap=3.0),
    dict(alibi_slopes=torch.tensor([0.1, 0.02, 0.4, 0.3])),
    dict(window=(40, 0), alibi_slopes=torch.tensor([0.1, 0.02, 0.4, 0.3]), sinks=torch.tensor([0.3, -1.0, 2.0, 5.0])),
    dict(alibi_slopes=torch.linspace(0.02, 0.5, 12).view(3, 4), left_pad=torch.tensor([5, 40], dtype=torch.int32)),
    dict(tree_mask=TREE, causal=False, window=(44, -1)),
    dict(left_pad=torch.tensor([5, 40], dtype=torch.int32)),
    dict(left_pad=torch.tensor([34, 50], dtype=torch.int32), sinks=torch.tensor([0.3, -1.0, 2.0, 5.0])),
    dict(left_pad=torch.tensor([5, 0, 52], dtype=torch.int32), window=(40, 0)),
    dict(left_pad=torch.tensor([33, 47, 3], dtype=torch.int32), alibi_slopes=torch.linspace(0.02, 0.5, 12).view(3, 4)),
]


@pytest.mark.parametrize("device,backend", PAGED, ids=lambda value: value)
@pytest.mark.parametrize("form", ["one", "some", "packed"])
@pytest.mark.parametrize("options", CASCADES, ids=lambda options: " ".join(options) or "plain")
def test_cascade_equals_whole_sequences(device, backend, form, options):
    k_cache, v_cache, prefix, own, whole = cascade_case()
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    cu = torch.tensor([0, 2, 3, 7], dtype=torch.int32) if form == "packed" else None
    shape = {"one": (3,), "some": (3, 4), "packed": (7,)}[form]
    q = torch.randn(*shape, 4, 24, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    options = dict(options)
    if "tree_mask" in options and form != "some":
        tree = torch.cat([TREE[0, :2], TREE[1, :1], TREE[2]]) if cu is not None else TREE[:, :1, :1]
        options["tree_mask"] = tree
    place = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
    options = {name: place(x) for name, x in options.items()}
    caches = k_cache.to(device, dtype), v_cache.to(device, dtype)
    more = dict(cu_seqlens_q=place(cu), return_lse=True, return_column_sums=True)
    with metate.use(backend):
        got = metate.cascade_attention(q, *caches, *map(place, (*prefix, *own)), **options, **more)
        plain = metate.cascade_attention(q, *caches, *map(place, (*prefix, *own)), cu_seqlens_q=place(cu), **options)
    if "left_pad" in options and len(options["left_pad"]) == 2:  # of groups
        options["left_pad"] = options["left_pad"][[0, 1, 1]]
    with metate.use("reference"):
        wide = [x.double() for x in (q, *caches)]
        options = {name: x.double() if name in ("sinks", "alibi_slopes") else x for name, x in options.items()}
        out, lse, sums = metate.paged_attention(*wide, *map(place, whole), **options, **more)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    for mine in (plain, got[0]):
        torch.testing.assert_close(mine.double(), out, **tolerance)
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-5)
    prefix_sums = torch.zeros_like(got[2], dtype=torch.float64)
    own_sums = torch.zeros_like(got[3], dtype=torch.float64)
    for b, (group, keys) in enumerate(zip([0, 1, 1], prefix[1][[0, 1, 1]].tolist(), strict=True)):
        prefix_sums[group, :, :keys] += sums[b, :, :keys]
        own_sums[b] = sums[b, :, keys : keys + own_sums.shape[2]]
    torch.testing.assert_close(got[2].double(), prefix_sums, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got[3].double(), own_sums, rtol=1e-3, atol=1e-5)


def test_packed_equals_one_by_one():
    k_cache, v_cache, table, lens = paged([5, 33, 64], 16, 2, 24, 16)
    starts = [0, 2, 2, 9]
    q = torch.randn(11, 4, 24)
    cu = torch.tensor(starts, dtype=torch.int32)
    out, lse = metate.paged_attention(q, k_cache, v_cache, table, lens, cu_seqlens_q=cu, return_lse=True)
    for b, (start, end) in enumerate(pairwise(starts)):
        one = slice(b, b + 1)
        expected = metate.paged_attention(q[None, start:end], k_cache, v_cache, table[one], lens[one])
        torch.testing.assert_close(out[None, start:end], expected)
    assert not out[9:].any() and (lse[:, 9:] == float("-inf")).all()


def test_keys_alone_are_appended_and_read_as_values():
    """Multi-head latent attention: values are the first columns of the keys."""
    cache = torch.full((4, 4, 1, 24), float("nan"))
    k = torch.randn(6, 1, 24)
    metate.append_kv(k, None, cache, None, torch.tensor([8, 9, 10, 11, 0, 1]))
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    q = torch.randn(1, 5, 24)
    got = metate.paged_attention(q, cache, cache[..., :16], table, torch.tensor([6], dtype=torch.int32))
    expected = metate.attention(q[None], k[None], k[None, ..., :16])
    torch.testing.assert_close(got[None], expected)


def test_a_tree_shows_ancestors_and_everything_older():
    k_cache, v_cache, table, lens = paged([37], 16, 2, 24, 16)
    parents = [-1, 0, 0, 1, 2]
    mask = metate.AttentionMask.tree(parents, prefix=32)
    visible = torch.zeros(5, 5, dtype=torch.bool)
    for i, parent in enumerate(parents):
        visible[i, i] = True
        if parent >= 0:
            visible[i] |= visible[parent]
    q = torch.randn(1, 5, 4, 24)
    got = metate.paged_attention(q, k_cache, v_cache, table, lens, tree_mask=visible)
    expected = metate.attention(q, dense(k_cache, table[0], 37), dense(v_cache, table[0], 37), mask=mask)
    torch.testing.assert_close(got, expected)


def test_a_tree_of_too_few_tokens_is_refused():
    """Bits do not tell how many there were."""
    k_cache, v_cache, table, lens = paged([20, 33], 16, 2, 24, 16)
    q, starts = torch.randn(2, 5, 4, 24), torch.tensor([0, 3, 10], dtype=torch.int32)
    for columns in (4, 6):
        with pytest.raises(ValueError, match=rf"tree_mask is of shape .*{columns}\), expected 5 columns"):
            metate.paged_attention(q, k_cache, v_cache, table, lens, tree_mask=torch.ones(5, columns) > 0)
    with pytest.raises(ValueError, match=r"tree_mask is of shape \(10, 6\), expected 7 columns or more"):
        metate.paged_attention(
            q.flatten(0, 1), k_cache, v_cache, table, lens, cu_seqlens_q=starts, tree_mask=torch.ones(10, 6) > 0
        )


def test_quantised_rows_are_the_nearest_codes():
    x = torch.randn(50, 3, 64) * torch.logspace(-20, 20, 50)[:, None, None]
    for dtype, levels in ((torch.int8, 127), (torch.uint8, 7)):
        codes, scale = reference.quantise(x, dtype, True)
        back = reference.decode(codes, scale, torch.float64)
        assert ((back - x).abs() <= scale[..., None].double() * 0.5001).all()
        torch.testing.assert_close(scale, x.abs().amax(-1) / levels)
    assert torch.equal(reference.quantise(x, torch.float8_e4m3fn, False)[0].float().abs().amax(), torch.tensor(448.0))


CALL = append_op.example(append_op.domain.cases[4], torch.float32)
ROTATED = append_op.example(append_op.domain.cases[2], torch.float32)


def changed(args, **values):
    return tuple(values.get(name, a) for name, a in zip(append_op.parameters, args, strict=True))


SLOTS, WIDE = torch.arange(33), torch.ones(50, 65)
MALFORMED = {
    "slot behind the cache": (changed(CALL, slot_mapping=SLOTS + 40), "slot_mapping is 40 to 72, expected -1"),
    "slot below -1": (changed(CALL, slot_mapping=SLOTS - 2), "slot_mapping is -2 to 30"),
    "slot twice": (changed(CALL, slot_mapping=SLOTS.clamp(max=31)), "slot_mapping is 31 twice"),
    "other dtype": (changed(CALL, v_cache=CALL[3].to(torch.uint8)), "v_cache is"),
    "no scale": (changed(CALL, k_scale=None), "k_scale is None, expected .*float32 beside a cache of int8"),
    "expanded": (changed(CALL, v_cache=CALL[3][:1].expand_as(CALL[3])), "v_cache is expanded"),
    "position": (changed(ROTATED, positions=ROTATED[9] + 30), "positions is .*expected 0 to 49"),
    "angles without positions": (changed(ROTATED, positions=None), "rotary_cos is given without"),
    "values alone": (changed(CALL, v_cache=None), "v is given, expected v and v_cache, or neither"),
    "no values": (changed(CALL, v=None), "v_cache is given, expected v and v_cache, or neither"),
    "scales of no values": (changed(CALL, v=None, v_cache=None), "v_scale is given"),
    "wide angles": (changed(ROTATED, rotary_cos=WIDE, rotary_sin=WIDE), "rotary_cos is of 65 columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_append_writes_nothing(name):
    args, message = MALFORMED[name]
    before = [x.clone() for x in append_op.written(args)]
    with pytest.raises((TypeError, ValueError), match=f"metate.append_kv: {message}"):
        append_op(*args)
    assert all(torch.equal(a, b) for a, b in zip(append_op.written(args), before, strict=True))


READ = paged_attention_op.example(paged_attention_op.domain.cases[3], torch.float32)


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(seq_lens=torch.tensor([-1, 3], dtype=torch.int32)), r"seq_lens is -1 to 3, expected 0 to 384"),
        (dict(seq_lens=torch.tensor([1, 385], dtype=torch.int32)), r"seq_lens is 1 to 385"),
        (dict(block_table=torch.full((2, 3), 8, dtype=torch.int32)), r"block_table\[0, 0\] is 8, expected .* 0 to 7"),
        (dict(left_pad=torch.tensor([-1, 3], dtype=torch.int32)), "left_pad is -1"),
        (dict(k_cache=READ[1][..., :64]), r"k_cache is of shape .*, expected a last dimension of 128 columns"),
        (dict(k_scale=torch.ones(8, 128, 1), v_scale=torch.ones(8, 128, 1)), "k_scale is given, expected None"),
        (dict(k_cache=READ[1].to(torch.int8)), "k_scale is None"),
        (dict(cu_seqlens_q=torch.tensor([0, 1, 1], dtype=torch.int32)), "q is of shape"),
    ],
)
def test_a_malformed_read_is_refused(values, message):
    args = tuple(values.get(name, a) for name, a in zip(paged_attention_op.parameters, READ, strict=True))
    with pytest.raises((TypeError, ValueError), match=f"metate.paged_attention: {message}"):
        paged_attention_op(*args)


def test_contents_are_looked_at_in_every_call():
    k_cache, v_cache, table, lens = paged([5, 33], 16, 2, 24, 16)
    q = torch.randn(2, 4, 24)
    expected = metate.paged_attention(q, k_cache, v_cache, table, lens)
    for x, at, bad in ((table, (1, 2), len(k_cache)), (table, (0, 0), -1), (lens, 1, 49), (lens, 0, -1)):
        good = int(x[at])
        x[at] = bad
        with pytest.raises(ValueError, match=f"is .*{bad}"):
            metate.paged_attention(q, k_cache, v_cache, table, lens)
        x[at] = good
        assert torch.equal(metate.paged_attention(q, k_cache, v_cache, table, lens), expected)


def test_what_contents_forbid_is_not_supported():
    """`explain` raises what the call would."""
    k_cache, v_cache, table, lens = paged([5, 33], 16, 2, 24, 16)
    q = torch.randn(2, 4, 24)
    assert metate.supports(metate.paged_attention, q, k_cache, v_cache, table, lens)
    assert not metate.supports(metate.paged_attention, q, k_cache, v_cache, table, lens + 16)
    with pytest.raises(ValueError, match="seq_lens is 21 to 49"):
        metate.explain(metate.paged_attention, q, k_cache, v_cache, table, lens + 16)


def test_gradients_are_refused_before_anything_is_written():
    args = append_op.example(append_op.domain.cases[1], torch.float32)
    before = args[2].clone()
    with pytest.raises(NotImplementedError, match=r"metate\.append_kv: no gradient"):
        metate.append_kv(args[0].requires_grad_(), *args[1:5])
    assert torch.equal(args[2], before)
    version = args[2]._version
    metate.append_kv(args[0].detach(), *args[1:5])
    assert args[2]._version > version and not torch.equal(args[2], before)


def repaged(k_cache: Tensor, v_cache: Tensor, table: Tensor, lens: Tensor, page_size: int, seed: int):
    """The same sequences in pages of another size and order, beside NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-int(lens.max()) // page_size)
    order = torch.randperm(len(lens) * pages + 1, generator=generator)[: len(lens) * pages].view(len(lens), pages)
    caches = []
    for cache in (k_cache, v_cache):
        moved = cache.new_full((order.numel() + 1, page_size, *cache.shape[2:]), float("nan"))
        for b, n in enumerate(lens.tolist()):
            at = torch.arange(n)
            moved[order[b][at // page_size], at % page_size] = dense(cache, table[b], n)[0]
        caches.append(moved)
    return *caches, order.to(torch.int32), lens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 7, 60])
def test_bits_do_not_depend_on_pages_batch_or_threads(queries, dtype):
    k_cache, v_cache, table, lens = paged([1, 1500, 64, 513, 700], 16, 2, 40, 24)
    k_cache, v_cache, q = k_cache.to(dtype), v_cache.to(dtype), torch.randn(5, queries, 8, 40).to(dtype)
    expected = metate.paged_attention(q, k_cache, v_cache, table, lens)
    assert expected.isfinite().all()
    for page_size in (1, 3, 16, 128, 2048):
        other = repaged(k_cache, v_cache, table, lens, page_size, page_size)
        assert torch.equal(metate.paged_attention(q, *other), expected)
    for b in range(5):
        one = slice(b, b + 1)
        assert torch.equal(metate.paged_attention(q[one], k_cache, v_cache, table[one], lens[one]), expected[one])
    many = [x.repeat(13, *[1] * (x.dim() - 1)) for x in (q, table, lens)]
    assert torch.equal(metate.paged_attention(many[0], k_cache, v_cache, *many[1:])[:5], expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(metate.paged_attention(q, k_cache, v_cache, table, lens), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_bits_do_not_depend_on_how_much_a_batch_reads(group, dtype):
    """Rows of many heads are read in their order, those of small and of large batches in steps of their own."""
    k_cache, v_cache, table, lens = paged([1500, 64, 700, 3], 16, 8, 128, 128)
    k_cache, v_cache, q = k_cache.to(dtype), v_cache.to(dtype), torch.randn(4, 1, 8 * group, 128).to(dtype)
    expected = metate.paged_attention(q, k_cache, v_cache, table, lens)
    many = [x.repeat(9, *[1] * (x.dim() - 1)) for x in (q, table, lens)]
    assert int(many[2].sum()) * 8 * 256 * 2 > 64 << 20
    assert torch.equal(metate.paged_attention(many[0], k_cache, v_cache, *many[1:]).view(9, *q.shape)[8], expected)
    other = repaged(k_cache, v_cache, table, lens, 3, 1)
    assert torch.equal(metate.paged_attention(q, *other), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [torch.int8, torch.float8_e4m3fn])
def test_bits_over_codes_do_not_depend_on_pages_or_batch(store, dtype):
    """Rows of many heads, which are read in their order, beside NaN scales."""
    k_cache, v_cache, table, lens = paged([700, 64, 37, 3], 16, 8, 128, 128)
    unused = k_cache.isnan().any(-1)
    (k, k_scale), (v, v_scale) = (reference.quantise(x.nan_to_num(), store, True) for x in (k_cache, v_cache))
    scales = [x.masked_fill(unused, float("nan")) for x in (k_scale, v_scale)]
    q = torch.randn(4, 1, 32, 128).to(dtype)

    def attend(q, table, lens, k=k, v=v, scales=scales):
        return metate.paged_attention(q, k, v, table, lens, k_scale=scales[0], v_scale=scales[1])

    expected = attend(q, table, lens)
    assert expected.isfinite().all()
    many = [x.repeat(42, *[1] * (x.dim() - 1)) for x in (q, table, lens)]
    assert int(many[2].sum()) * 8 * 256 > 64 << 20
    assert torch.equal(attend(*many).view(42, *q.shape)[41], expected)
    for b in range(4):
        one = slice(b, b + 1)
        assert torch.equal(attend(q[one], table[one], lens[one]), expected[one])
    for page_size in (1, 3, 128):
        *codes, other, lens = repaged(k.float(), v.float(), table, lens, page_size, page_size)
        moved = repaged(*scales, table, lens, page_size, page_size)[:2]
        assert torch.equal(attend(q, other, lens, *(x.nan_to_num().to(store) for x in codes), moved), expected)


@pytest.mark.parametrize("kibibytes,width", [(99, 256), (99, 576), (163, 576), (227, 576)])
def test_wide_heads_need_a_gpu_with_much_shared_memory(kibibytes, width, monkeypatch):
    gpu = SimpleNamespace(shared_memory_per_block_optin=kibibytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    q = SimpleNamespace(dtype=torch.bfloat16, shape=(1, 1, 1, width), is_cuda=True, device=torch.device("cuda", 0))
    reason = rules.refused_by_cuda(q, torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert (reason is None) == (kibibytes > 99 or width <= 256), reason


@pytest.mark.skipif("cuda" not in paged_attention_op.implementations("cpu"), reason="the emulator is not built")
@pytest.mark.parametrize("queries", [1, 3])
def test_bits_of_latent_attention_depend_on_a_sequence_alone(queries):
    """16 and 48 rows: each number has a kernel of its own, packed beside sequences of other numbers too."""
    k_cache, _, table, lens = paged([90, 700, 5], 16, 1, 576, 8)
    k_cache, q = k_cache.bfloat16(), torch.randn(3, queries, 16, 576).bfloat16()
    with metate.use("cuda"):
        expected = metate.paged_attention(q, k_cache, k_cache[..., :512], table, lens)
        copied = k_cache[..., :512].clone()
        assert torch.equal(metate.paged_attention(q, k_cache, copied, table, lens), expected)
        other, _, *rest = repaged(k_cache, k_cache, table, lens, 24, 24)
        assert torch.equal(metate.paged_attention(q, other, other[..., :512], *rest), expected)
        for b in range(3):
            one = slice(b, b + 1)
            got = metate.paged_attention(q[one], k_cache, k_cache[..., :512], table[one], lens[one])
            assert torch.equal(got, expected[one])
        packed = torch.cat([torch.randn(4 - queries, 16, 576).bfloat16(), q[1]])
        starts = torch.tensor([0, 4 - queries, 4, 4], dtype=torch.int32)
        got = metate.paged_attention(packed, k_cache, k_cache[..., :512], table, lens, cu_seqlens_q=starts)
        assert torch.equal(got[4 - queries :], expected[1])


@pytest.mark.parametrize("cache", [None, "int8", "int4", "fp8", "scaled fp8"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
def test_long_ragged_sequences(page_size, cache):
    pages = -(-8192 // page_size)
    case = dict(B=5, Sq=1, max_pages=pages, page_size=page_size, Hq=4, Hkv=1, D=34, Dv=18, cache=cache, full=True)
    lens = torch.tensor([8192, 0, 1, 63, 4097], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        args = paged_attention_op.example(case, dtype)
        args = (*args[:4], lens, *args[5:])
        paged_attention_op.assert_close(paged_attention_op(*args), args)


def test_cascade_names_its_own_arguments():
    """`seq_lens` and `block_table` of the errors within would be those of the suffixes."""
    k_cache, v_cache, table, lens = paged([20, 33], 16, 2, 24, 16)
    q, groups = torch.randn(2, 4, 24), torch.tensor([0, 2], dtype=torch.int32)
    for prefix_table, length, message in (
        (table, 16, "prefix_table is of shape"),
        (table[:1, :1], 17, "prefix_lens is"),
    ):
        prefix = prefix_table, torch.tensor([length], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"metate.cascade_attention: {message} .*expected"):
            metate.cascade_attention(q, k_cache, v_cache, *prefix, groups, table, lens)
    right = dict(q=q, k_cache=k_cache, v_cache=v_cache, prefix_table=table[:1, :1], cu_groups=groups, block_table=table,
                 prefix_lens=torch.tensor([16], dtype=torch.int32), seq_lens=lens)  # fmt: skip
    metate.cascade_attention(**right)
    for name, wrong in dict(
        q=q[0], k_cache=k_cache.double(), prefix_table=table[:1, :1] + 99, prefix_lens=lens[:1].to("meta"),
        block_table=table + 99, seq_lens=torch.cat([lens, lens]), alibi_slopes="steep", sinks=[1.0], left_pad=3,
        return_lse="no",
    ).items():  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"metate.cascade_attention: {name}.* is .*expected"):
            metate.cascade_attention(**{**right, name: wrong})


@pytest.mark.parametrize("name,shape", [("alibi_slopes", (3, 4)), ("alibi_slopes", (1, 2, 4)), ("sinks", (2, 4))])
def test_cascade_refuses_slopes_and_sinks_of_others(name, shape):
    k_cache, v_cache, table, lens = paged([20, 33], 16, 2, 24, 16)
    prefix = table[:1, :1], torch.tensor([16], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"metate\.cascade_attention: {name} is of shape .*expected \(heads\)"):
        metate.cascade_attention(
            torch.randn(2, 4, 24), k_cache, v_cache, *prefix, table, lens, **{name: torch.rand(shape)}
        )


def test_cascade_refuses_padding_of_others():
    k_cache, v_cache, table, lens = paged([20, 33], 16, 2, 24, 16)
    prefix = table[:1, :1], torch.tensor([16], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    pads = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"metate\.cascade_attention: left_pad is of shape \(3,\).*\(1,\) or \(2,\)"):
        metate.cascade_attention(torch.randn(2, 4, 24), k_cache, v_cache, *prefix, table, lens, left_pad=pads)


@pytest.mark.parametrize("groups", [[0, 1], [0, 3], [1, 2], [0, 2, 1], None, [0.0, 2.0]])
def test_cascade_refuses_groups_that_are_not_the_batch(groups):
    k_cache, v_cache, table, lens = paged([20, 33], 16, 2, 24, 16)
    prefixes = len(groups) - 1 if groups else 1
    prefix = table[:1, :1].expand(prefixes, 1), torch.full((prefixes,), 16, dtype=torch.int32)
    cu = groups and torch.tensor(groups, dtype=torch.int32 if isinstance(groups[0], int) else None)
    with pytest.raises((TypeError, ValueError), match=r"metate\.cascade_attention: cu_groups is .*expected"):
        metate.cascade_attention(torch.randn(2, 4, 24), k_cache, v_cache, *prefix, cu, table, lens)


def test_column_sums_are_those_of_probabilities():
    k_cache, v_cache, table, lens = paged([600, 33], 16, 2, 24, 16)
    q = torch.randn(2, 5, 4, 24)
    out, sums = metate.paged_attention(q, k_cache, v_cache, table, lens, return_column_sums=True)
    for b, n in enumerate(lens.tolist()):
        k, v = dense(k_cache, table[b], n), dense(v_cache, table[b], n)
        expected = metate.attention(q[b : b + 1], k, v, causal=True, return_column_sums=True)
        torch.testing.assert_close(out[b : b + 1], expected[0])
        torch.testing.assert_close(sums[b, :, :n], expected[1][0])
        assert not sums[b, :, n:].any()


@pytest.mark.parametrize("scale", [1.0, 2.0**62])
def test_column_sums_of_large_scores_add_up(scale):
    """Found from an lse that was rounded to base e and back, they were infinite at the larger scale."""
    k_cache, v_cache, table, lens = paged([60, 33], 16, 2, 24, 16)
    q = 30 * torch.randn(2, 1, 4, 24)
    _, sums = metate.paged_attention(q, k_cache, v_cache, table, lens, scale=scale, return_column_sums=True)
    torch.testing.assert_close(sums.sum(-1), torch.ones(2, 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_not_finite_stays_with_those_who_see_it(cache, bad):
    """Keys 40 and 41 of 70: only queries behind them may show it, whoever is computed beside them."""
    k, v, table, lens = paged([70], 16, 2, 24, 16)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    scales = {}
    if cache == torch.int8:
        (k, k_scale), (v, v_scale) = (reference.quantise(x, cache, True) for x in (k, v))
        v_scale[table[0, 2], 8:10] = bad
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    else:
        k, v = k.to(cache), v.to(cache)
        v[table[0, 2], 8:10] = bad
    q = torch.randn(1, 70, 4, 24).to(torch.bfloat16 if cache == torch.bfloat16 else torch.float32)
    out = metate.paged_attention(q, k, v, table, lens, **scales)
    assert out[:, :40].isfinite().all() and not out[:, 40:].isfinite().any()
    with metate.use("reference"):
        expected = metate.paged_attention(q, k, v, table, lens, **scales)
    assert torch.equal(expected.isfinite(), out.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [torch.int8, torch.uint8])
def test_a_scale_that_is_not_finite_stays_with_those_who_see_it(store, dtype):
    """Few queries at 66 … 69, the scale of value 68; and of two heads one."""
    k, v, table, lens = paged([70], 16, 2, 24, 16)
    (k, k_scale), (v, v_scale) = (reference.quantise(x.nan_to_num(0), store, True) for x in (k, v))
    q = torch.randn(1, 4, 4, 24).to(dtype)
    clean = metate.paged_attention(q, k, v, table, lens, k_scale=k_scale, v_scale=v_scale)
    v_scale[table[0, 4], 4, 1] = float("nan")
    out = metate.paged_attention(q, k, v, table, lens, k_scale=k_scale, v_scale=v_scale)
    assert torch.equal(out[:, :, :2], clean[:, :, :2])
    torch.testing.assert_close(out[:, :2], clean[:, :2])
    assert out[:, 2:, 2:].isnan().all()


def test_append_refuses_values_over_keys():
    cache, k = torch.zeros(4, 3, 2, 16), torch.randn(2, 2, 16)
    for keys, values in ((cache, cache), (cache, cache[..., :8]), (cache[:3], cache[1:]), (cache[:, :2], cache[:, 1:])):
        with pytest.raises(ValueError, match="v_cache is the memory of k_cache, expected"):
            metate.append_kv(k, k[..., : values.shape[3]], keys, values, torch.tensor([1, 2]))
    assert not cache.any()
    pair = torch.zeros(4, 2, 3, 2, 2, 32)
    for keys, values in (
        pair[:, 0].unbind(3),
        pair[:, :, :, 0].unbind(1),
        pair[:, 0, :, :, 0].split(16, 3),
        (pair[:2, 0, ..., 0, :], pair[2:, 0, ..., 0, :]),
    ):
        k = torch.randn(2, 2, keys.shape[3])
        metate.append_kv(k, -k, keys, values, torch.tensor([1, 2]))
        assert torch.equal(keys[0, 1:3], k) and torch.equal(values[0, 1:3], -k)


@pytest.mark.parametrize("heads", [1, 64])  # many rows of queries for each head of the cache, and few
def test_every_code_of_e4m3_counts(heads):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = torch.where(codes.float().isfinite(), codes.float(), 0).to(codes.dtype)
    k_cache, v_cache = (x.view(torch.uint8).expand(1, 1, heads, 256).view(codes.dtype) for x in (finite, codes))
    q = torch.eye(256, dtype=torch.bfloat16).view(1, 1, 256, 256)  # each head looks at one column of the key
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out, lse = metate.paged_attention(q, k_cache, v_cache, table, lens, scale=1.0, return_lse=True)
    torch.testing.assert_close(lse.flatten(), finite.float(), rtol=1e-6, atol=1e-7)
    expected = codes.to(torch.bfloat16).expand(256, 256)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache", ["int8", "int4", "fp8", "scaled fp8"])
@pytest.mark.parametrize("dim", [24, 72, 96])
def test_many_queries_over_quantised_caches(cache, dim):
    case = _case(2, 40, 9, 16, 8, 2, dim, dim, cache=cache, window=(-1, 0))
    args = paged_attention_op.example(case, torch.bfloat16)
    got = paged_attention_op(*args)[0].double()
    truth = paged_attention_op.compute(torch.float64, args)[0]
    plain = paged_attention_op.compute(torch.bfloat16, args)[0].double()
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2**-8 * truth.abs().max()
