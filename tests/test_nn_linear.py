"""Linear: few rows without gradients as one expert's, everything else as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import metate
from metate.nn import Linear, QuantLinear


def layer(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return Linear(72, 40, bias).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(72,), (1, 72), (2, 3, 72), (64, 72), (65, 72), (0, 72)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_torch_s_linear_layer(dtype, shape, bias):
    linear, x = layer(dtype, bias), torch.randn(shape).to(dtype)
    truth = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.no_grad():
        got = linear(x)
        theirs = F.linear(x, linear.weight, linear.bias)
    assert got.dtype == dtype and got.shape == truth.shape
    assert (got.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + 1e-7 * truth.norm()


def test_a_row_depends_on_no_other():
    linear, x = layer(torch.bfloat16), torch.randn(64, 72).bfloat16()
    with torch.inference_mode():
        together = linear(x)
        for rows in (1, 5, 17):
            assert torch.equal(linear(x[:rows]), together[:rows])


def test_few_rows_take_the_kernel_and_many_or_those_with_gradients_do_not(monkeypatch):
    calls = []
    from metate.nn import linear as module

    kernel = module.grouped_linear
    monkeypatch.setattr(module, "grouped_linear", lambda *args: calls.append(args) or kernel(*args))
    linear = layer()
    with torch.no_grad():
        linear(torch.randn(64, 72))
        assert len(calls) == 1
        linear(torch.randn(65, 72))
        layer(torch.float64)(torch.randn(2, 72).double())
    x = torch.randn(2, 72, requires_grad=True)
    linear(x).sum().backward()
    assert len(calls) == 1
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(2, -1), atol=1e-6)


def test_wrong_inputs_are_refused():
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="72"):
        layer()(torch.randn(100, 7))


def test_compiles_once_for_all_numbers_of_rows():
    torch._dynamo.reset()
    linear, counter = layer(), CompileCounter()
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 5, 7, 11, 13, 17, 31, 63, 64, 65, 200):
            x = torch.randn(rows, 72)
            assert torch.allclose(compiled(x), linear(x), atol=1e-6)
    assert counter.frame_count <= 2, "a graph of one number, and one of any"


def test_is_quantised():
    model = metate.quantize_model(torch.nn.Sequential(layer()), "nf4")
    assert type(model[0]) is QuantLinear
