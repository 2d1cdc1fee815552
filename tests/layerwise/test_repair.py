"""Repairs of a cut layer: each is at least as good as the one before it, and what they fold is the mean."""

import pytest
import torch

from compresskit.layerwise.moments import Moments, SiteMoments
from compresskit.layerwise.repair import relative_error, repair_columns

REPAIRS = ("none", "bias", "least_squares")


def site(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, SiteMoments, torch.Tensor, torch.Tensor]:
    """W, b, the moments of two sets of tokens, and all tokens' inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(48, 8, **like) @ torch.randn(8, 8, **like) + 2 * torch.randn(8, **like)
    weight, bias = torch.randn(5, 8, **like), torch.randn(5, **like)
    t = x @ weight.T + bias + noise * torch.randn(48, 5, **like)
    parts = []
    for rows in (slice(0, 36), slice(36, 48)):
        parts.append(Moments.zeros(8, 5))
        parts[-1].update(x[rows], t[rows])
    return weight, bias, SiteMoments(*parts), x, t


@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_errors_fall_from_none_to_bias_to_least_squares_and_are_what_is_measured(seed, noise):
    weight, bias, moments, x, t = site(seed, noise)
    columns = torch.tensor([0, 2, 3, 6])
    errors = []
    for repair in REPAIRS:
        found = repair_columns(weight, bias, moments, columns, repair)
        used = bias if found.bias is None else found.bias
        errors.append(relative_error(found.weight, used, moments, columns))
        measured = (t - x[:, columns] @ found.weight.T - used).square().sum(1).mean()
        spread = (t - t.mean(0)).square().sum(1).mean()
        assert errors[-1] == pytest.approx(float((measured / spread).sqrt()), rel=1e-9)
    assert errors[2] <= errors[1] * (1 + 1e-12)
    assert errors[1] < errors[0]


def test_the_folded_bias_is_the_old_one_and_the_mean_of_what_is_cut():
    weight, bias, moments, x, _ = site(0, 0.0)
    columns, cut = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5, 7])
    found = repair_columns(weight, bias, moments, columns, "bias")
    torch.testing.assert_close(found.weight, weight[:, columns], rtol=0, atol=0)
    torch.testing.assert_close(found.bias, bias + weight[:, cut] @ x.mean(0)[cut])


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_layer_without_a_bias_gets_none(repair):
    weight, bias, moments, _, _ = site(0, 0.5)
    moments = moments.without_bias(bias)
    found = repair_columns(weight, None, moments, torch.tensor([0, 2, 3, 6]), repair)
    assert found.bias is None
    unrepaired = relative_error(weight[:, [0, 2, 3, 6]], None, moments, torch.tensor([0, 2, 3, 6]))
    error = relative_error(found.weight, None, moments, torch.tensor([0, 2, 3, 6]))
    assert error < unrepaired if repair == "least_squares" else error == unrepaired


@pytest.mark.parametrize("repair", REPAIRS)
def test_all_columns_of_a_layer_that_gives_its_target_stay_as_they_are(repair):
    weight, bias, moments, _, _ = site(0, 0.0)
    moments = moments.with_linear_target(weight, bias)
    found = repair_columns(weight, bias, moments, torch.arange(8), repair)
    torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-9)


def test_a_constant_target_has_no_error():
    moments = Moments.zeros(2, 1)
    moments.update(torch.ones(4, 2), torch.full((4, 1), 3.0))
    found = repair_columns(torch.ones(1, 2), torch.ones(1), SiteMoments(moments, moments), torch.tensor([0]), "bias")
    assert relative_error(found.weight, found.bias, SiteMoments(moments, moments), torch.tensor([0])) == 0.0
