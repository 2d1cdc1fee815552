"""The exponential by way of 2ˣ: as exact as its docstring says, and torch's own where autograd follows."""

import torch

from compresskit.kernels.exponential import exp, exp_


def test_the_error_is_the_one_told():
    x = torch.cat([torch.linspace(-87, 80, 100_001), torch.tensor([0.0, 1e-6, -1e-6])])
    truth = x.double().exp()
    bound = (2 + 1.25 * x.double().abs()) * 2**-24 * truth
    with torch.no_grad():
        assert ((exp(x).double() - truth).abs() <= bound).all()
    assert ((exp_(x.clone()).double() - truth).abs() <= bound).all()


def test_float64_is_torchs_own():
    x = torch.linspace(-700, 700, 101, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(exp(x), x.exp())
    assert torch.equal(exp_(x.clone()), x.exp())


def test_what_is_absent_gives_nothing():
    x = torch.tensor([float("-inf"), -1e30, 0.0])
    with torch.no_grad():
        assert exp(x).tolist() == [0, 0, 1]
    assert exp_(x).tolist() == [0, 0, 1]


def test_autograd_passes_through():
    x = torch.tensor([-3.0, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(exp(x).sum(), x)
    assert torch.equal(grad, x.detach().exp())
