"""The greedy choice under one budget, against all choices there are."""

import itertools
import random

import pytest

from compresskit.layerwise.allocation import Option, allocate, greedy_path, lower_hull


def total(items, choice):
    chosen = [options[index] for options, index in zip(items, choice, strict=True)]
    return sum(o.cost for o in chosen), sum(o.loss for o in chosen)


def draw(seed: int, *, items: int = 4, options: int = 4):
    source = random.Random(seed)
    return [[Option(source.randint(1, 20), source.random()) for _ in range(options)] for _ in range(items)]


def best_loss(items, budget):
    every = (total(items, choice) for choice in itertools.product(*(range(len(options)) for options in items)))
    return min(loss for cost, loss in every if cost <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_every_corner_of_the_walk_is_the_optimum_of_its_budget(seed):
    items = draw(seed)
    for choice in greedy_path(items):
        cost, loss = total(items, choice)
        assert loss == pytest.approx(best_loss(items, cost))
        assert total(items, allocate(items, cost)) == (cost, loss)


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_keeps_to_the_budget_and_nothing_better_is_left_to_buy(seed):
    items = draw(seed)
    budget = 40
    choice = allocate(items, budget)
    cost, loss = total(items, choice)
    assert cost <= budget
    for item, options in enumerate(items):
        for index, option in enumerate(options):
            changed = [*choice[:item], index, *choice[item + 1 :]]
            assert total(items, changed)[0] > budget or option.loss >= options[choice[item]].loss
    dearest_step = max(option.loss for options in items for option in options)
    assert best_loss(items, budget) <= loss <= best_loss(items, budget) + dearest_step


def test_a_budget_for_everything_buys_the_least_loss_of_each():
    items = draw(1)
    choice = allocate(items, 10_000)
    assert [options[index].loss for options, index in zip(items, choice, strict=True)] == [
        min(option.loss for option in options) for options in items
    ]


def test_more_budget_never_loses_more_along_the_corners():
    losses = [total(draw(3), choice)[1] for choice in greedy_path(draw(3))]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) > 3


def test_a_budget_below_the_cheapest_options_is_refused():
    items = [[Option(5, 1.0), Option(9, 0.0)], [Option(7, 1.0)]]
    assert allocate(items, 12) == [0, 0]
    with pytest.raises(ValueError, match="the cheapest options cost 12, the budget is 11"):
        allocate(items, 11)


def test_the_hull_leaves_out_what_is_dominated_or_above_a_line():
    options = [Option(1, 10), Option(2, 9), Option(3, 2), Option(4, 3), Option(5, 0), Option(1, 12)]
    assert lower_hull(options) == [0, 2, 4]
