"""The exponential by way of 2ˣ: as exact as its docstring says, and torch's own where autograd follows."""

import pytest
import torch

from compresskit.kernels.exponential import exp, exp_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_that_of_rounding(dtype):
    x = torch.cat([torch.linspace(-80, 80, 4001, dtype=dtype), torch.tensor([0.0, 1e-6, -1e-6], dtype=dtype)])
    truth = x.double().exp()
    bound = (2 + x.double().abs()) * torch.finfo(dtype).eps * truth
    with torch.no_grad():
        assert ((exp(x).double() - truth).abs() <= bound).all()
    assert ((exp_(x.clone()).double() - truth).abs() <= bound).all()


def test_what_is_absent_gives_nothing():
    x = torch.tensor([float("-inf"), -1e30, 0.0])
    with torch.no_grad():
        assert exp(x).tolist() == [0, 0, 1]
    assert exp_(x).tolist() == [0, 0, 1]


def test_autograd_passes_through():
    x = torch.tensor([-3.0, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(exp(x).sum(), x)
    assert torch.equal(grad, x.detach().exp())
