"""Widths under one budget: losses between trials, and where the weights go."""

import pytest

from compresskit.layerwise.width_survey import tried_counts
from compresskit.layerwise.widths import WidthCurve, allocate_widths


def test_the_loss_is_as_tried_and_grows_with_every_cut():
    curve = WidthCurve(64, 10, ((54, 0.1), (42, 0.4), (26, 2.0)))
    for kept, loss in curve.trials:
        assert curve.loss(kept) == pytest.approx(loss)
    losses = [curve.loss(kept) for kept in range(1, 65)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_a_trial_that_lost_less_than_a_milder_one_counts_as_that():
    curve = WidthCurve(64, 10, ((54, 0.3), (42, 0.1), (26, 2.0)))
    assert curve.loss(42) == pytest.approx(0.3)
    assert curve.loss(48) == pytest.approx(0.3)


def test_one_trial_is_continued_by_the_square():
    curve = WidthCurve(4, 10, ((2, 0.4),))
    assert curve.loss(3) == pytest.approx(0.1)


def test_a_trial_that_lost_nothing_gives_a_finite_curve():
    curve = WidthCurve(8, 10, ((6, 0.0), (3, 0.5)))
    assert 0 < curve.loss(7) < 1e-6
    assert curve.loss(3) == pytest.approx(0.5)


def test_weights_go_where_they_lose_most_within_the_even_budget():
    light, heavy = WidthCurve(64, 10, ((48, 0.01), (24, 0.05))), WidthCurve(64, 10, ((48, 1.0), (24, 5.0)))
    chosen = allocate_widths([light, heavy], [32, 32], floor=0.25, steps=[8, 8])
    assert chosen[0] < 32 < chosen[1]
    assert 10 * sum(chosen) <= 10 * 64
    assert all(count % 8 == 0 for count in chosen)
    lost = light.loss(chosen[0]) + heavy.loss(chosen[1])
    assert lost <= light.loss(32) + heavy.loss(32)


def test_equal_parts_stay_equal_and_the_floor_holds():
    curve = WidthCurve(64, 10, ((48, 0.1), (24, 1.0)))
    assert allocate_widths([curve] * 3, [32] * 3, floor=0.25, steps=[8] * 3) == [32] * 3
    free = WidthCurve(64, 10, ((48, 0.0), (24, 0.0)))
    chosen = allocate_widths([free, curve], [32, 32], floor=0.5, steps=[8, 8])
    assert chosen == [16, 48]


def test_parts_of_other_weights_share_the_budget_in_weights():
    neurons, heads = WidthCurve(64, 10, ((48, 0.5), (24, 3.0))), WidthCurve(3, 200, ((2, 0.001), (1, 0.01)))
    chosen = allocate_widths([neurons, heads], [32, 2], floor=0.25, steps=[8, 1])
    assert chosen[1] == 1
    assert chosen[0] == 48
    assert chosen[0] * 10 + chosen[1] * 200 <= 32 * 10 + 2 * 200


def test_tried_counts_are_distinct_and_leave_something_and_cut_something():
    assert tried_counts(100) == [85, 65, 40]
    assert tried_counts(3) == [2, 1]
    assert tried_counts(2) == [1]
