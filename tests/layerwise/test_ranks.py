"""Weights and losses of a site's factors, shared or not, and the ranks that fit a budget."""

import pytest

from compresskit.layerwise.ranks import (
    SiteCurve,
    allocate_ranks,
    break_even_rank,
    even_ranks,
    factor_weights,
    rank_for,
    rank_step,
    site_options,
)

NAMES = ("q", "k")


def falling(power: float, ranks: int, rate: float) -> tuple[float, ...]:
    return (*(power * rate**k for k in range(ranks)), 0.0)


def curve(shared: float = 0.9, separate: float = 0.9, **more) -> SiteCurve:
    """Two layers of 32 outputs and 32 inputs; spectra that fall by these rates."""
    alone = falling(1.0, 32, separate)
    return SiteCurve(NAMES, (32, 32), 32, falling(2.0, 32, shared), (alone, alone), **more)


@pytest.mark.parametrize(("outputs", "inputs", "limit"), [(384, 384, 192), (384, 1536, 307), (1152, 384, 288)])
def test_break_even_is_where_factors_stop_saving(outputs, inputs, limit):
    found = break_even_rank(outputs, inputs)
    assert found in (limit, limit - 1)
    assert factor_weights(outputs, inputs, found, pivot=False) < outputs * inputs
    assert factor_weights(outputs, inputs, found + 1, pivot=False) >= outputs * inputs


@pytest.mark.parametrize(("outputs", "inputs"), [(384, 384), (384, 1536), (1152, 384)])
def test_pivoted_factors_save_at_every_rank_below_full(outputs, inputs):
    full = min(outputs, inputs)
    assert break_even_rank(outputs, inputs, pivot=True) == full - 1
    assert all(factor_weights(outputs, inputs, k, pivot=True) < outputs * inputs for k in range(1, full))
    assert factor_weights(outputs, inputs, full, pivot=True) == outputs * inputs


@pytest.mark.parametrize(("keep", "expected"), [(0.8, 224), (0.5, 128), (0.4, 112), (0.01, 8)])
def test_ranks_are_multiples_that_later_groups_divide(keep, expected):
    rank = rank_for(keep, 1152, 384)
    assert rank == expected
    assert rank % (32 if rank >= 128 else 8) == 0


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_the_rank_of_a_share_holds_that_share(keep, pivot):
    rank = rank_for(keep, 1152, 384, round_to=1, pivot=pivot)
    apart = abs(factor_weights(1152, 384, rank, pivot=pivot) - keep * 1152 * 384)
    assert apart <= (1152 + 384) / 2


@pytest.mark.parametrize(
    ("outputs", "inputs", "round_to", "step"), [(576, 192, None, 32), (96, 64, None, 8), (9, 9, 5, 5)]
)
def test_the_step_of_ranks_follows_the_thinner_side(outputs, inputs, round_to, step):
    assert rank_step(outputs, inputs, round_to) == step


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("share", [None, True, False])
def test_every_option_weighs_what_its_ranks_do_and_saves(share, pivot):
    options = site_options(curve(), share=share, pivot=pivot, round_to=4, floor=0.0)
    assert options[0].ranks == ()
    assert options[0].cost == 2 * 32 * 32
    for option in options:
        dense = set(NAMES) - {name for group, _ in option.ranks for name in group}
        weights = sum(factor_weights(32 * len(group), 32, k, pivot=pivot) for group, k in option.ranks)
        assert option.cost == weights + 32 * 32 * len(dense) <= 2 * 32 * 32
        assert all(k % 4 == 0 for _, k in option.ranks)
        shared = any(len(group) == 2 for group, _ in option.ranks)
        assert not (shared and share is False)
        assert shared or share is not True or not option.ranks


def test_no_option_lies_below_the_floor():
    options = site_options(curve(), share=None, pivot=True, round_to=1, floor=0.5)
    assert min(option.cost for option in options) >= 0.5 * 2 * 32 * 32
    assert len(options) > 10


@pytest.mark.parametrize(("shared", "separate", "groups"), [(0.7, 0.95, 1), (0.95, 0.7, 2)])
def test_layers_share_where_that_loses_less_at_the_same_weights(shared, separate, groups):
    chosen = even_ranks(curve(shared, separate), 12, share=None, pivot=True, round_to=2)
    assert len(chosen) == groups
    weights = sum(factor_weights(32 * len(group), 32, k, pivot=True) for group, k in chosen)
    assert weights <= factor_weights(64, 32, 12, pivot=True)


def test_a_site_that_loses_more_gets_more_of_the_budget():
    steep, flat = curve(0.6, 0.6), curve(0.97, 0.97)
    options = [site_options(one, share=True, pivot=True, round_to=1, floor=0.0) for one in (steep, flat)]
    budget = int(0.6 * (steep.dense_weights + flat.dense_weights))
    first, second = allocate_ranks(options, budget)
    kept = [sum(factor_weights(64, 32, k, pivot=True) for _, k in ranks) or 64 * 32 for ranks in (first, second)]
    assert kept[0] < kept[1]
    assert sum(kept) <= budget


def test_trials_scale_predictions_and_meet_the_measured_losses():
    plain, tried = curve(), curve(trials=((0.5, 2.0), (0.1, 0.05)))
    assert plain.loss(0.3) == 0.3
    assert tried.loss(0.5) == pytest.approx(2.0)
    assert tried.loss(0.1) == pytest.approx(0.05)
    assert 0.05 < tried.loss(0.2) < 2.0
    assert tried.loss(1.0) == pytest.approx(4.0), "beyond the trials the nearest ratio holds"
    assert tried.loss(0.0) == 0


def test_trials_are_of_the_whole_site_so_they_never_decide_between_sharing_and_not():
    """Whatever bend the trials have, equal predicted errors cost the same, shared or apart."""
    for trials in (((1.0, 1.0), (0.1, 0.03)), ((1.0, 1.0), (0.1, 0.3))):
        one = curve(trials=trials)
        for option in site_options(one, share=False, pivot=True, round_to=4, floor=0.0):
            apart = sum(one.separate[NAMES.index(group[0])][k] for group, k in option.ranks)
            assert option.loss == pytest.approx(one.loss(apart))


def test_a_site_that_trials_do_not_feel_costs_next_to_nothing():
    unfelt = curve(trials=((0.3, 0.0), (0.1, 0.0)))
    assert 0 < unfelt.loss(0.1) < unfelt.loss(0.3) < 1e-6
