"""Scores of columns against their definitions; one-by-one removal against brute force."""

import itertools

import pytest
import torch

from compresskit.layerwise.moments import Moments
from compresskit.layerwise.objective import shrunk_weight
from compresskit.layerwise.output_pca import OutputMetric
from compresskit.layerwise.scores import (
    add_up,
    choose_groups,
    fluctuation_scores,
    leverage_scores,
    magnitude_scores,
    remove_one_by_one,
    taylor_scores,
    top_indices,
    wanda_scores,
)

INPUTS, OUTPUTS, TOKENS = 8, 5, 60


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    """Correlated inputs x (tokens, in) off zero, a weight, and moments of a target that is not quite W x."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(TOKENS, INPUTS, **like) @ torch.randn(INPUTS, INPUTS, **like) + torch.arange(INPUTS)
    weight = torch.randn(OUTPUTS, INPUTS, **like)
    moments = Moments.zeros(INPUTS, OUTPUTS)
    moments.update(x, x @ weight.T + 0.3 * torch.randn(TOKENS, OUTPUTS, **like))
    return x, weight, moments


def metric_of(matrix: torch.Tensor) -> OutputMetric:
    return OutputMetric(None, matrix, 1.0)


def random_metric() -> torch.Tensor:
    root = torch.randn(OUTPUTS, OUTPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(OUTPUTS, dtype=torch.float64)


def test_each_column_score_is_what_its_name_says():
    x, weight, moments = draw()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(magnitude_scores(weight), weight.square().sum(0), **close)
    wanda = weight.abs().sum(0) * x.square().mean(0).sqrt()
    for centred in (True, False):
        torch.testing.assert_close(wanda_scores(weight, moments.mean(centred=centred)), wanda, **close)
    flap = x.var(0, unbiased=False) * weight.square().sum(0)
    torch.testing.assert_close(fluctuation_scores(weight, moments.mean(centred=True)), flap, **close)


def test_leverage_is_the_diagonal_of_the_ridge_projection():
    x, _, moments = draw()
    C = (x - x.mean(0)).T @ (x - x.mean(0)) / TOKENS
    for ridge in (1e-3, 1.0):
        shifted = C + ridge * C.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
        truth = (C @ torch.linalg.inv(shifted)).diagonal()
        torch.testing.assert_close(leverage_scores(moments.mean(centred=True), ridge=ridge), truth)


def test_leverage_of_inputs_that_never_move_is_zero():
    moments = Moments.zeros(3, 2)
    moments.update(torch.ones(4, 3), torch.ones(4, 2))
    assert leverage_scores(moments.mean(centred=True)).tolist() == [0.0] * 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_taylor_is_the_mean_square_of_input_times_gradient_where_they_are_independent(size):
    x, weight, moments = draw()
    gradients = torch.randn(40, OUTPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = torch.arange(INPUTS).view(-1, size)
    # Every input with every gradient: independent by construction.
    product = (x[:, None] * (gradients @ weight)[None])[..., groups].sum(-1)
    truth = product.square().mean((0, 1))
    metric = metric_of(gradients.T @ gradients / len(gradients))
    for centred in (True, False):
        found = taylor_scores(weight, moments.mean(centred=centred), metric, groups)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def penalised_optimum(weight, mean, kept, shrinkage, F):
    """The least of error + pull when only the columns `kept` may be used, by solving for them afresh."""
    ridge = shrinkage * mean.C.diagonal().mean()
    H, R = mean.C + ridge * torch.eye(INPUTS, dtype=torch.float64), mean.T + ridge * weight
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = torch.linalg.solve(H[kept][:, kept], R[:, kept].T).T
    return float((F @ (fitted @ H @ fitted.T - 2 * R @ fitted.T)).trace())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_one_by_one_removal_takes_what_brute_force_takes_and_foretells_its_cost(size, with_metric, centred):
    _, weight, moments = draw(seed=size)
    mean, groups = moments.mean(centred=centred), torch.arange(INPUTS).view(-1, size)
    F = random_metric() if with_metric else torch.eye(OUTPUTS, dtype=torch.float64)
    count = len(groups) - 1
    found = remove_one_by_one(weight, mean, groups, count, shrinkage=0.05, metric=metric_of(F) if with_metric else None)
    left = list(range(len(groups)))
    now = penalised_optimum(weight, mean, groups[left].flatten(), 0.05, F)
    for chosen, rise in zip(found.order.tolist(), found.rises.tolist(), strict=True):
        costs = {
            g: penalised_optimum(weight, mean, groups[[one for one in left if one != g]].flatten(), 0.05, F) - now
            for g in left
        }
        assert chosen == min(costs, key=costs.__getitem__)
        assert rise == pytest.approx(costs[chosen], rel=1e-6)
        left.remove(chosen)
        now += costs[chosen]


def test_one_by_one_removal_starts_at_the_optimum_that_is_pulled_towards_the_weight():
    _, weight, moments = draw()
    mean = moments.mean(centred=True)
    best = shrunk_weight(weight, mean, 0.05)
    columns = torch.arange(INPUTS)
    whole = penalised_optimum(weight, mean, columns, 0.05, torch.eye(OUTPUTS, dtype=torch.float64))
    ridge = 0.05 * mean.C.diagonal().mean()
    H, R = mean.C + ridge * torch.eye(INPUTS, dtype=torch.float64), mean.T + ridge * weight
    assert whole == pytest.approx(float((best @ H @ best.T - 2 * R @ best.T).trace()))


def test_copies_of_a_column_are_removed_for_nothing():
    x, weight, _ = draw()
    doubled, weights = torch.cat([x, x[:, :3]], 1), torch.cat([weight, weight[:, :3]], 1)
    moments = Moments.zeros(INPUTS + 3, OUTPUTS)
    moments.update(doubled, doubled @ weights.T)
    mean = moments.mean(centred=True)
    found = remove_one_by_one(weights, mean, torch.arange(INPUTS + 3)[:, None], 3, shrinkage=1e-9)
    assert {index if index < 3 else index - INPUTS for index in found.order.tolist()} == {0, 1, 2}
    assert float(found.rises.sum()) < 1e-6 * mean.target_power


def test_no_removal_may_leave_nothing():
    _, weight, moments = draw()
    with pytest.raises(ValueError, match="8 of 8 groups"):
        remove_one_by_one(weight, moments.mean(centred=True), torch.arange(INPUTS)[:, None], 8, shrinkage=0.1)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "flap", "leverage", "taylor", "random", "obs"])
@pytest.mark.parametrize("size", [1, 2])
def test_every_score_keeps_the_asked_number_and_drops_dead_groups_first(score, size):
    x, weight, _ = draw()
    groups, dead = torch.arange(INPUTS).view(-1, size), 1
    x[:, groups[dead]], weight[:, groups[dead]] = 0, 0
    moments = Moments.zeros(INPUTS, OUTPUTS)
    moments.update(x, x @ weight.T)
    for count, centred in itertools.product((1, len(groups) - 1), (True, False)):
        generator = torch.Generator().manual_seed(0)
        options = {"centred": centred, "metric": metric_of(random_metric()), "generator": generator}
        kept = choose_groups(score, weight, moments, groups, count, **options).tolist()
        assert len(kept) == count
        assert kept == sorted(set(kept))
        assert score == "random" or dead not in kept


def test_scores_of_a_group_add_up_and_ties_go_to_the_lower_index():
    scores = torch.tensor([1.0, 3.0, 1.0, 1.0])
    assert top_indices(scores, 3).tolist() == [0, 1, 2]
    assert add_up(scores, torch.tensor([[0, 1], [2, 3]])).tolist() == [4.0, 2.0]
