"""Moments and the layer-wise problem, against direct computation in float64."""

import math

import pytest
import torch

from compresskit.layerwise.moments import Moments
from compresskit.layerwise.objective import SHRINKAGES, choose_shrinkage, fit_weight, folded_bias, shrunk_weight


def sample(tokens: int = 400, inputs: int = 12, outputs: int = 7, *, seed: int = 0, rank: int | None = None):
    """Correlated inputs with a mean, targets with noise: x (N, I), t (N, O), W (O, I)."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or inputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, rank or inputs, generator=draw, dtype=torch.float64) @ mix + 2
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    t = x @ weight.T + 0.5 * torch.randn(tokens, outputs, generator=draw, dtype=torch.float64) + 1
    return x, t, weight


def moments_of(x: torch.Tensor, t: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], t.shape[1])
    moments.update(x, t)
    return moments


@pytest.mark.parametrize("centred", [True, False])
def test_closed_form_error_is_the_mean_squared_error(centred):
    x, t, weight = sample()
    mean = moments_of(x, t).mean(centred=centred)
    bias = folded_bias(weight, mean)
    direct = (t - x @ weight.T - bias).square().sum(1).mean()
    assert mean.error(weight) == pytest.approx(float(direct), rel=1e-10)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    x, t, _ = sample()
    parts, whole = moments_of(x[:100], t[:100]) + moments_of(x[100:], t[100:]), moments_of(x, t)
    for name in ("x", "t", "xx", "tx"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert parts.count == whole.count
    assert parts.tt == pytest.approx(whole.tt, rel=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_targets_follow_from_the_inputs_alone(with_bias):
    x, _, weight = sample()
    bias = torch.arange(7, dtype=torch.float64) if with_bias else None
    t = x @ weight.T + (bias if bias is not None else 0)
    seen = Moments.zeros(12, 7)
    seen.update_input(x)
    derived, direct = seen.with_linear_target(weight, bias), moments_of(x, t)
    torch.testing.assert_close(derived.tx, direct.tx, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(derived.t, direct.t, rtol=1e-10, atol=1e-8)
    assert derived.tt == pytest.approx(direct.tt, rel=1e-10)


def test_no_shrinkage_is_least_squares_and_infinite_shrinkage_is_the_old_weight():
    x, t, weight = sample()
    mean = moments_of(x, t).mean(centred=True)
    expected = torch.linalg.lstsq(x - x.mean(0), t - t.mean(0)).solution.T
    torch.testing.assert_close(shrunk_weight(torch.zeros_like(weight), mean, 1e-12), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(shrunk_weight(weight, mean, math.inf), weight)


def test_singular_moments_are_solved():
    x, t, weight = sample(tokens=5)
    mean = moments_of(x, t).mean(centred=True)
    answer = shrunk_weight(weight, mean, 1e-3)
    assert torch.isfinite(answer).all()
    assert mean.error(answer) < mean.error(weight)


def test_error_on_the_fitted_tokens_falls_with_shrinkage():
    x, t, weight = sample(tokens=30)
    mean = moments_of(x, t).mean(centred=True)
    errors = [mean.error(shrunk_weight(weight * 0.5, mean, s)) for s in (math.inf, 10, 1, 0.1, 1e-3)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_shrinkage_has_the_least_held_out_error_of_the_grid(seed):
    x, t, weight = sample(seed=seed, tokens=60)
    fit, held = (moments_of(a, b).mean(centred=True) for a, b in ((x[:45], t[:45]), (x[45:], t[45:])))
    errors = {s: held.error(shrunk_weight(weight * 0.8, fit, s)) for s in SHRINKAGES}
    chosen = choose_shrinkage(weight * 0.8, fit, held)
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-9)


def test_pure_noise_is_answered_by_the_old_weight():
    x, _, weight = sample(tokens=40)
    draw = torch.Generator().manual_seed(9)
    noise = 50 * torch.randn(40, 7, generator=draw, dtype=torch.float64)
    t = x @ weight.T + noise
    fit, held = moments_of(x[:30], t[:30]), moments_of(x[30:], t[30:])
    assert choose_shrinkage(weight, fit.mean(centred=True), held.mean(centred=True)) >= 1


@pytest.mark.parametrize("seed", range(3))
def test_refit_error_is_at_most_the_bias_repair_which_is_at_most_no_repair(seed):
    x, t, weight = sample(seed=seed, tokens=80)
    columns = torch.tensor([0, 2, 3, 7, 8, 11])
    refit, mean, _ = fit_weight(
        weight, moments_of(x[:60], t[:60]), moments_of(x[60:], t[60:]), centred=True, columns=columns
    )
    kept = weight[:, columns]
    bias_only = mean.error(kept)
    no_repair = float((t - x[:, columns] @ kept.T - 1).square().sum(1).mean())
    assert mean.error(refit) <= bias_only * (1 + 1e-12)
    assert bias_only <= no_repair * (1 + 1e-12)


def test_keeping_every_column_of_an_exact_layer_gives_the_weight_back():
    x, _, weight = sample()
    t = x @ weight.T
    refit, _, _ = fit_weight(
        weight, moments_of(x[:300], t[:300]), moments_of(x[300:], t[300:]), centred=True, columns=torch.arange(12)
    )
    torch.testing.assert_close(refit, weight, rtol=1e-9, atol=1e-9)


def test_moments_of_no_token_are_an_error():
    with pytest.raises(ValueError, match="no token"):
        Moments.zeros(3, 2).mean(centred=True)
