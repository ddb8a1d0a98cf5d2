"""nn.ProductQuantizer: what it returns, what its gradients reach, and that both ways of assigning learn."""

import pytest
import torch

from metate.nn import ProductQuantizer
from metate.search import PQIndex

D, M = 8, 4


def made(**how):
    torch.manual_seed(0)
    return ProductQuantizer(D, M, 4, **how), torch.randn(3, 20, D, requires_grad=True)


def test_straight_through():
    quantizer, x = made()
    out = quantizer(x)
    assert torch.equal(out, quantizer.decode(quantizer.encode(x)))
    grad = torch.randn_like(x)
    out.backward(grad)
    assert torch.equal(x.grad, grad)
    parts = x.detach().view(-1, M, 1, D // M)
    chosen = (parts - quantizer.codebooks).square().sum(3).argmin(2)  # (60, M)
    expected = torch.zeros_like(quantizer.codebooks)
    for row, g in zip(chosen, grad.view(-1, M, D // M), strict=True):
        for m in range(M):
            expected[m, row[m]] += g[m]
    torch.testing.assert_close(quantizer.codebooks.grad, expected)


@pytest.mark.parametrize("assignment", ["straight-through", "soft"])
def test_no_vectors(assignment):
    quantizer, x = made(assignment=assignment)
    none = x[:, :0]
    assert quantizer(none).shape == none.shape and quantizer.encode(none).shape == (3, 0, 2)
    assert quantizer.decode(quantizer.encode(none)).shape == none.shape


def test_soft_assignment():
    quantizer, x = made(assignment="soft", temperature=0.5)
    books = quantizer.codebooks
    parts = x.view(-1, M, 1, D // M)
    weights = torch.softmax(-(parts - books).square().sum(3) / 0.5, 2)
    expected = torch.einsum("nml,mld->nmd", weights, books).reshape(x.shape)
    grads = torch.autograd.grad(expected.square().sum(), (x, books), retain_graph=True)
    out = quantizer(x)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.square().sum(), (x, books)), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    quantizer.temperature = 1e-4
    torch.testing.assert_close(quantizer(x), quantizer.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("assignment", ["straight-through", "soft"])
def test_learns_end_to_end(assignment):
    """Through a linear layer before it, by the error of what comes out."""
    torch.manual_seed(0)
    x = torch.randn(256, 4) @ torch.randn(4, D)
    quantizer, before = ProductQuantizer(D, M, 4, assignment=assignment, temperature=0.3), torch.nn.Linear(D, D)
    optimizer = torch.optim.Adam([*quantizer.parameters(), *before.parameters()], 0.02)
    errors = []
    for _ in range(60):
        y = before(x)
        error = (quantizer(y) - x).square().mean()
        loss = error + quantizer.loss(y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.4 * errors[0]


def test_shares_its_codebooks_with_an_index():
    quantizer, x = made()
    rows = x.detach().view(-1, D)
    worst = quantizer.loss(rows)
    quantizer.fit(rows, iterations=8)
    assert quantizer.loss(rows) < 0.5 * worst
    index = PQIndex(D, M, 4)
    index.set_trained({"codebooks": quantizer.codebooks})
    index.add(rows)
    assert torch.equal(index.reconstruct(torch.arange(60)), quantizer(rows))
    again = ProductQuantizer(D, M, 4)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.encode(x), quantizer.encode(x)) and again.encode(x).shape == (3, 20, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductQuantizer(D, 3), "M is 3, expected a divisor of dim, 8"),
        (lambda: ProductQuantizer(D, M, 0), "bits is 0"),
        (lambda: ProductQuantizer(D, M, 17), "bits is 17"),
        (lambda: ProductQuantizer(D, M, assignment="hard"), "assignment is 'hard'"),
        (lambda: ProductQuantizer(D, M, temperature=0.0), "temperature is 0.0"),
        (lambda: ProductQuantizer(D, M, 4)(torch.zeros(3, 5)), r"x is of shape \(3, 5\)"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("assignment", ["straight-through", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_compute_in_float32(dtype, assignment):
    """A model moved to 16 bits takes its codebooks along."""
    quantizer, x = made(assignment=assignment)
    quantizer, x = quantizer.to(dtype), x.detach().to(dtype)
    out = quantizer(x)
    (out.float().square().mean() + quantizer.loss(x)).backward()
    assert out.dtype == dtype and quantizer.codebooks.grad.dtype == dtype and quantizer.codebooks.grad.abs().sum() > 0
    quantizer.fit(x)
    assert quantizer.eval()(x).shape == x.shape


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"M is True, expected a divisor of dim"):
        ProductQuantizer(8, True)
    with pytest.raises(TypeError, match=r"x is list, expected a torch.Tensor"):
        made()[0]([[0.0] * D])
