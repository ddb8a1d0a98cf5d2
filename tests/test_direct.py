"""The short way around torch's dispatcher: equal to the long one, and taken only where nothing waits on that."""

from contextlib import ExitStack

import pytest
import torch
from conftest import outputs
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import metate
from metate import library
from metate.op import REGISTRY

MERGE = REGISTRY["merge_attention_states"]
WITH_KERNEL = [op for op in REGISTRY.values() if "cpu" in op.implementations("cpu")]
pytestmark = pytest.mark.skipif(
    not any(op._direct for op in WITH_KERNEL), reason="this torch has no C interface for exchanging tensors"
)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def states(*shape):
    return torch.randn(2, *shape, 3, 2, 8), torch.randn(2, *shape, 2, 3)


def direct(*args):
    return MERGE._direct[0].call(args, False)


@pytest.mark.parametrize("op", WITH_KERNEL, ids=lambda op: op.name)
def test_both_ways_give_the_same_bits(op):
    """Every case that runs on the CPU's kernels without a look at its values comes directly the second time."""
    looks = [
        any(args[i] is not None for i in op._contents)
        for args in (op.example(c, torch.float32) for c in op.domain.cases)
    ]
    taken = 0
    for case in op.domain.cases:
        args = op.example(case, torch.float32)
        if op.plan(args)[0] != "cpu":
            continue
        first, before = op.trial(args), library.direct_calls()
        result = op.trial(args)
        if library.direct_calls() == before:
            continue
        taken += 1
        for a, b in zip(outputs(first), outputs(result), strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), case
        if isinstance(result, tuple) and not op.writes:
            alone = op._direct[0].call(args, True)
            torch.testing.assert_close(alone, result[0], rtol=0, atol=0, equal_nan=True)
    assert taken or all(looks)


def test_a_call_comes_directly_once_one_like_it_was_checked():
    MERGE.forget_plans()
    args = states(4)
    assert direct(*args) is NotImplemented
    metate.merge_attention_states(*args)
    assert direct(*args) is not NotImplemented
    assert direct(*(Parameter(a, requires_grad=False) for a in args)) is not NotImplemented
    assert direct(*(a.transpose(1, 2).contiguous().transpose(1, 2) for a in args)) is not NotImplemented
    assert direct(*states(5)) is NotImplemented
    assert direct(args[0].half(), args[1]) is NotImplemented
    assert direct(args[0], None) is NotImplemented
    assert direct(*args, 1) is NotImplemented
    MERGE.forget_plans()
    assert direct(*args) is NotImplemented


@pytest.mark.parametrize(
    "context",
    [
        Nothing,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        forward_ad.dual_level,
    ],
    ids=["mode", "autocast", "profiler", "forward-mode"],
)
def test_whatever_waits_at_the_dispatcher_sees_the_call(context):
    args = states(4)
    metate.merge_attention_states(*args)
    with context():
        assert direct(*args) is NotImplemented
    assert direct(*args) is not NotImplemented


def test_a_transform_sees_the_call():
    outs, lses = torch.randn(5, 2, 4, 3, 2, 8), torch.randn(5, 2, 4, 2, 3)
    seen = []

    def one(outs, lses):
        seen.append(direct(outs, lses))
        return metate.merge_attention_states(outs, lses)

    batched = torch.vmap(one)(outs, lses)
    assert seen == [NotImplemented]
    for i in range(5):
        torch.testing.assert_close([x[i] for x in batched], list(metate.merge_attention_states(outs[i], lses[i])))


def test_a_trace_holds_the_call():
    """torch.jit.trace would take what comes directly for a constant."""
    calls = [
        (lambda q, k: metate.attention(q, k, k, causal=True), [torch.randn(2, n, h, 16) for h in (4, 2) for n in (9,)]),
        (lambda outs, lses: metate.merge_attention_states(outs, lses)[0], states(4)),
    ]
    for function, args in calls:
        function(*args)
        traced = torch.jit.trace(function, tuple(args))
        others = [torch.randn_like(x) for x in args]
        assert torch.equal(traced(*others), function(*others))


def test_a_gradient_is_asked_of_the_dispatcher():
    outs, lses = states(4)
    metate.merge_attention_states(outs, lses)
    outs.requires_grad_()
    assert direct(outs, lses) is NotImplemented
    assert metate.merge_attention_states(outs, lses)[0].grad_fn is not None
    with ExitStack() as off:
        off.enter_context(torch.no_grad())
        assert direct(outs, lses) is not NotImplemented


def test_a_lazily_negated_tensor_is_not_read_as_it_lies_in_memory():
    outs, lses = states(4)
    expected = metate.merge_attention_states(-outs, lses)
    metate.merge_attention_states(outs, lses)
    negated = torch.view_as_complex(torch.stack([torch.zeros_like(outs), outs], -1)).conj().imag
    assert negated.is_neg()
    assert direct(negated, lses) is NotImplemented
    torch.testing.assert_close(metate.merge_attention_states(negated, lses), expected)


def test_the_first_result_alone():
    args = states(4)
    out, _ = MERGE.call(args)
    for _ in range(2):
        assert torch.equal(MERGE.call(args, first_only=True), out)
    with metate.use("reference"):
        torch.testing.assert_close(MERGE.call(args, first_only=True), out)


def few(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


WEIGHT = metate.quant.quantize_rtn(torch.randn(24, 32), bits=4, group_size=16)
CACHE, TABLE, LENGTHS = torch.randn(3, 8, 2, 16), few(2, 0, 1, 2).view(2, 2), few(9, 12)
A, B = torch.randn(2, 4, 32), torch.randn(2, 24, 4)
BASE, BOOKS = torch.randn(40, 16), torch.randn(4, 16, 4)
EXTENTS, ENDS = torch.tensor([[0, 20], [20, 40]]), few(0, 2, 5)


def both(q, **options):
    return metate.attention(q, q, q, return_lse=True, return_column_sums=True, **options)


WHOLE = {  # calls of what the operators are not given as it is: of other dimensions, or to be computed first
    "attention and column sums": (both, (2, 5, 4, 16)),
    "column sums, causal": (lambda q: both(q, causal=True, scale=2)[::2], (1, 3, 4, 16)),
    "packed column sums": (
        lambda q: metate.attention_varlen(
            q, q, q, few(0, 2, 5), few(0, 2, 5), return_lse=True, return_column_sums=True
        ),
        (5, 4, 16),
    ),
    "one adapter": (lambda x: metate.lora_linear(x, WEIGHT, A[0], B[0], scaling=0.3), (2, 3, 32)),
    "an adapter a row": (lambda x: metate.lora_linear(x, WEIGHT, A, B, scaling=2, adapter_ids=few(1, -1, 0)), (3, 32)),
    "nearest by cosine": (lambda x: metate.topk_distances(x, BASE, 3, metric="cosine"), (6, 16)),
    "tables of cosines": (lambda x: metate.pq_distance_tables(x, BOOKS, metric="cosine"), (6, 16)),
    "lists by cosine": (lambda x: metate.ivf_search(x, BASE[:2], EXTENTS, BASE, 3, metric="cosine"), (6, 16)),
    "quant_linear": (lambda x: metate.quant_linear(x, WEIGHT), (2, 3, 32)),
    "quant_linear, one row": (lambda x: metate.quant_linear(x, WEIGHT), (32,)),
    "gated_activation": (metate.gated_activation, (2, 1, 3, 8)),
    "one query": (lambda q: metate.paged_attention(q, CACHE, CACHE, TABLE, LENGTHS, return_lse=True), (2, 4, 16)),
    "packed queries": (
        lambda q: metate.paged_attention(q, CACHE, CACHE, TABLE, LENGTHS, cu_seqlens_q=few(0, 2, 5), return_lse=True),
        (5, 4, 16),
    ),
    "packed sequences": (
        lambda q: metate.attention_varlen(q, q, q, few(0, 2, 5), few(0, 2, 5), causal=True, return_lse=True),
        (5, 4, 16),
    ),
}


@pytest.mark.parametrize("call,shape", WHOLE.values(), ids=WHOLE)
def test_whole_functions_come_directly_too(call, shape):
    x = torch.randn(shape)
    with metate.use("cpu"):
        expected = outputs(call(x))
    for x_ in (x, x.new_empty(*shape[::-1]).permute(*range(len(shape))[::-1]).copy_(x), x, x):
        before = library.direct_calls()
        for a, b in zip(outputs(call(x_)), expected, strict=True):
            assert a.shape == b.shape and a.is_contiguous() and torch.equal(a, b)
    assert library.direct_calls() == before + 1


def test_adapters_that_there_are_not_are_refused_in_every_call():
    x, numbers = torch.randn(3, 32), few(1, -1, 0)
    for _ in range(3):
        metate.lora_linear(x, WEIGHT, A, B, adapter_ids=numbers)
    for wrong in (few(1, 2, 0), few(1, -2, 0)):
        with pytest.raises(ValueError, match="lora_linear: adapter_ids is"):
            metate.lora_linear(x, WEIGHT, A, B, adapter_ids=wrong)
    for same in (numbers.long(), numbers[:, None].expand(3, 2)[:, 0]):
        expected = metate.lora_linear(x, WEIGHT, A, B, adapter_ids=numbers)
        for _ in range(3):
            assert torch.equal(metate.lora_linear(x, WEIGHT, A, B, adapter_ids=same), expected)


def test_a_cache_that_was_written_has_another_version():
    cache = torch.zeros(2, 4, 1, 8)
    for slot in (3, 5):
        before = cache._version, library.direct_calls()
        metate.append_kv(torch.ones(1, 1, 8), None, cache, None, few(slot))
        assert cache._version > before[0] and cache.flatten(0, 1)[slot].eq(1).all()
    assert library.direct_calls() > before[1]
    for wrong in (few(8), few(-2)):
        with pytest.raises(ValueError, match="slot_mapping"):
            metate.append_kv(torch.ones(1, 1, 8), None, cache, None, wrong)
    keys = torch.ones(2, 1, 8)
    for _ in range(2):
        metate.append_kv(keys, None, cache, None, few(1, 2))
    with pytest.raises(ValueError, match="slot_mapping is 2 twice"):
        metate.append_kv(keys, None, cache, None, few(2, 2))


def test_a_result_beyond_all_memory_is_refused():
    one = torch.zeros(1)
    for queries in (2**40, 2**60):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                metate.merge_attention_states(one.expand(2, 1, queries, 2, 2**10), one.expand(2, 1, 2, queries))


def test_results_are_ordinary_tensors():
    args = states(4)
    metate.merge_attention_states(*args)
    out, lse = direct(*args)
    assert not out.requires_grad and out.is_contiguous() and out._version == 0
    out.add_(1)
    (out.requires_grad_() * lse[0, 0, 0]).sum().backward()
    with torch.inference_mode():
        assert direct(*args)[0].is_inference()
