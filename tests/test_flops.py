"""torch's FlopCounterMode counts operators by what they declare."""

import subprocess
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import metate
from metate.quant import quantize_nf4


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(name).removeprefix("metate."): n for name, n in counter.get_flop_counts()["Global"].items()}


def test_attention_and_its_backward():
    q, k, v = (torch.randn(2, 100, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    found = counted(lambda: metate.attention(q, k, v, causal=True).sum().backward())
    pairs = 2 * 4 * (100 * 101 // 2)
    assert found["attention"] == pairs * 2 * (16 + 16)
    assert found["attention_backward"] == pairs * 2 * (3 * 16 + 2 * 16)


def test_a_window_and_packed_sequences_count_what_is_visible():
    q = torch.randn(30, 2, 8)
    starts = torch.tensor([0, 10, 30], dtype=torch.int32)
    found = counted(lambda: metate.attention_varlen(q, q, q, starts, starts, window=(3, 2)))
    pairs = sum(1 for n in (10, 20) for i in range(n) for j in range(n) if -3 <= j - i <= 2)
    assert found == {"attention": 2 * pairs * 2 * 16}


def test_low_bit_products_and_experts():
    weight = quantize_nf4(torch.randn(24, 64))
    x = torch.randn(5, 64, requires_grad=True)
    found = counted(lambda: metate.quant_linear(x, weight).sum().backward())
    assert found["quant_linear"] == found["quant_matmul"] == 2 * 5 * 24 * 64
    route = metate.moe_route(torch.randn(7, 4), 2)
    found = counted(lambda: metate.moe_mlp(torch.randn(7, 8), route, torch.randn(4, 12, 8), torch.randn(4, 8, 6)))
    assert found["grouped_linear"] == 2 * 7 * 2 * (8 * 12 + 6 * 8)


def test_tensors_without_contents_count_too():
    with FakeTensorMode():
        q, starts = torch.randn(30, 2, 8), torch.tensor([0, 10, 30], dtype=torch.int32)
        assert counted(lambda: metate.attention_varlen(q, q, q, starts, starts)) == {"attention": 2 * 30 * 30 * 2 * 16}
    q = torch.randn(1, 30, 2, 8, device="meta")
    assert counted(lambda: metate.attention(q, q, q)) == {"attention": 2 * 30 * 30 * 2 * 16}


def test_the_counter_is_left_to_those_who_want_it():
    """It takes Triton along, which is slow to import."""
    script = """
import sys, torch, metate
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.ones(1, 3, 1, 4)
with FlopCounterMode(display=False) as counter:
    metate.attention(q, q, q)
assert counter.get_total_flops() == 9 * 2 * 8, counter.get_flop_counts()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
