"""GPTQ against rounding to nearest, brute force, and a target that earlier layers have moved."""

import itertools
from itertools import product

import pytest
import torch
from torch import Tensor

from compresskit.layers.grid import Codes, decode, find_scales, quantize_weight
from compresskit.layerwise.gptq import DAMPING, Compensation, improve, plan_compensation, round_with
from compresskit.layerwise.moments import Moments, ridged
from compresskit.layerwise.objective import shrunk_weight

GRIDS = [(3, 16, None), (4, 16, None), (4, 32, True), (4, 0, None), (8, 16, None), (8, 0, False)]


def _problem(seed: int, rows: int = 24, columns: int = 48, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and the moment of inputs that are correlated and unevenly large."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    mix = torch.eye(columns, dtype=torch.float64) + 0.5 * mix
    x = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ mix
    x *= torch.rand(columns, generator=draw, dtype=torch.float64) * 3 + 0.1
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), x.T @ x / tokens


def _quantized(
    target: Tensor, plan: Compensation, *, bits: int, group_size: int, symmetric: bool | None = None
) -> Codes:
    """M rounded by GPTQ, on the grid that a quantised layer gets."""
    grid: dict[str, int] = {"bits": bits, "group_size": group_size}
    scales, zeros = find_scales(target, symmetric=symmetric, column_weight=plan.moment.diagonal(), **grid)
    return Codes(round_with(plan, target, scales, zeros, **grid), scales, zeros)


def _error(weight: Tensor, codes: Codes, moment: Tensor, bits: int, size: int) -> float:
    gap = weight - decode(codes.codes, codes.scales, codes.zeros, bits=bits, group_size=size).double()
    return float(((gap @ moment) * gap).sum())


@pytest.mark.parametrize(("bits", "size", "symmetric"), GRIDS)
def test_where_inputs_are_uncorrelated_gptq_is_rounding_to_nearest(bits, size, symmetric):
    weight, _ = _problem(0)
    moment = torch.diag(torch.rand(48, dtype=torch.float64) + 0.01)
    grid = {"bits": bits, "group_size": size, "symmetric": symmetric}
    ours = _quantized(weight, plan_compensation(moment), **grid)
    nearest = quantize_weight(weight, column_weight=ridged(moment, DAMPING).diagonal(), **grid)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scales, nearest.scales)
    assert (ours.zeros is None) == (nearest.zeros is None)


@pytest.mark.parametrize(("bits", "size", "symmetric"), GRIDS)
def test_errors_under_the_moment_are_less_than_those_of_rounding_to_nearest(bits, size, symmetric):
    """In every one of 20 random problems (it is no theorem: each column's choice is greedy)."""
    for seed in range(20):
        weight, moment = _problem(seed)
        grid = {"bits": bits, "group_size": size, "symmetric": symmetric}
        plan = plan_compensation(moment)
        ours = _quantized(weight, plan, **grid)
        nearest = quantize_weight(weight, column_weight=plan.moment.diagonal(), **grid)
        assert _error(weight, ours, moment, bits, size) < _error(weight, nearest, moment, bits, size)


def test_on_tiny_problems_it_mostly_finds_the_best_of_all_roundings():
    """Four columns of 3 bits: all 4096 codes of a row are tried. The best in 16 of 20; rounding to nearest, in 10."""
    optimal = nearest_optimal = 0
    for seed in range(20):
        weight, moment = _problem(seed, rows=1, columns=4)
        plan = plan_compensation(moment, damping=1e-6)
        codes = _quantized(weight, plan, bits=3, group_size=0)
        nearest = quantize_weight(weight, bits=3, group_size=0, column_weight=plan.moment.diagonal())
        assert codes.zeros is not None
        every = torch.tensor(list(product(range(8), repeat=4)), dtype=torch.float64)
        gaps = weight - (every - codes.zeros.double()) * codes.scales.double()
        best = float(((gaps @ moment) * gaps).sum(-1).min())
        found = _error(weight, codes, moment, 3, 0)
        assert found >= best * (1 - 1e-4)
        optimal += found <= best * (1 + 1e-4)
        nearest_optimal += _error(weight, nearest, moment, 3, 0) <= best * (1 + 1e-4)
    assert optimal >= 15
    assert nearest_optimal < optimal


def test_blocks_of_columns_change_nothing(monkeypatch):
    weight, moment = _problem(3, columns=96)
    plan = plan_compensation(moment)
    at_once = _quantized(weight, plan, bits=4, group_size=32)
    monkeypatch.setattr("compresskit.layerwise.gptq._BLOCK", 7)
    assert torch.equal(_quantized(weight, plan, bits=4, group_size=32).codes, at_once.codes)


def test_scales_belong_to_neighbouring_columns_whatever_the_order():
    weight, moment = _problem(5)
    plan = plan_compensation(moment)
    codes = _quantized(weight, plan, bits=4, group_size=16)
    assert not torch.equal(plan.order, torch.arange(48))
    nearest = quantize_weight(weight, bits=4, group_size=16, column_weight=plan.moment.diagonal())
    assert torch.equal(codes.scales, nearest.scales)
    assert torch.equal(codes.zeros, nearest.zeros)


def test_a_short_last_group_and_dead_or_constant_inputs_are_no_obstacle():
    weight, moment = _problem(6, columns=40)
    moment[7], moment[:, 7] = 0, 0
    weight[3] = 0.25
    weight[4] = 0
    codes = _quantized(weight, plan_compensation(moment), bits=4, group_size=16)
    assert codes.scales.shape == (24, 3)
    restored = decode(codes.codes, codes.scales, codes.zeros, bits=4, group_size=16).double()
    step = codes.scales.double().repeat_interleave(16, 1)[:, 7]
    # No error flows into a dead column, and a clipped range may cut it.
    assert ((restored - weight)[:, 7].abs() <= step * 8).all()
    assert torch.equal(restored[4], torch.zeros(40, dtype=torch.float64))
    assert torch.isfinite(restored).all()


def test_without_any_signal_it_rounds_to_nearest():
    weight, _ = _problem(7)
    codes = _quantized(weight, plan_compensation(torch.zeros(48, 48)), bits=4, group_size=16)
    assert torch.equal(codes.codes, quantize_weight(weight, bits=4, group_size=16).codes)


def test_a_singular_moment_is_damped():
    weight, _ = _problem(8)
    x = torch.randn(5, 48, dtype=torch.float64)
    H = ridged(x.T @ x, DAMPING)
    assert torch.linalg.eigvalsh(H).min() == pytest.approx(DAMPING * float((x.T @ x).diagonal().mean()), rel=1e-6)
    assert _quantized(weight, plan_compensation(x.T @ x), bits=4, group_size=16).codes.shape == weight.shape


def test_rounding_the_anchored_target_is_nearer_to_what_the_layer_should_give():
    """Inputs x' that an earlier layer has moved: ‖W x − Q x'‖ falls when M, not W, is rounded."""
    draw = torch.Generator().manual_seed(9)
    weight, _ = _problem(9)
    x = torch.randn(600, 48, generator=draw, dtype=torch.float64) @ torch.randn(48, 48, generator=draw).double()
    moved = x + 0.3 * x.roll(1, 1)
    sums = Moments.zeros(48, 24)
    sums.update(moved, x @ weight.T)
    mean = sums.mean(centred=False)
    plan = plan_compensation(mean.C)

    def lost(target: Tensor) -> float:
        codes = _quantized(target, plan, bits=4, group_size=16)
        Q = decode(codes.codes, codes.scales, codes.zeros, bits=4, group_size=16).double()
        return float((x @ weight.T - moved @ Q.T).norm())

    assert lost(shrunk_weight(weight, mean, 1e-3)) < 0.5 * lost(weight)


@pytest.mark.parametrize(("bits", "size", "symmetric"), [*GRIDS, (4, 64, None), (3, 32, True)])
def test_no_turn_of_scales_and_codes_raises_the_error_and_integers_stay_legal(bits, size, symmetric):
    for seed in range(5):
        weight, moment = _problem(seed)
        grid = {"bits": bits, "group_size": size}
        plan = plan_compensation(moment)
        codes = _quantized(weight, plan, symmetric=symmetric, **grid)
        errors = [_error(weight, codes, plan.moment, bits, size)]
        for _ in range(3):
            codes = improve(plan, weight, codes, sweeps=1, **grid)
            errors.append(_error(weight, codes, plan.moment, bits, size))
            assert int(codes.codes.max()) < 2**bits
            assert int(codes.codes.min()) >= (bits == 8 and codes.zeros is None)
        # Scales are stored in float32, which may cost their rounding.
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < errors[0]


def test_scales_are_found_again_where_the_codes_give_the_weight():
    """A weight on a grid, its codes known and its scales wrong by up to a third: least squares finds them."""
    weight, moment = _problem(3)
    exact = quantize_weight(weight, bits=4, group_size=16)
    target = decode(exact.codes, exact.scales, exact.zeros, bits=4, group_size=16)
    wrong = exact.scales * (0.7 + 0.6 * torch.rand(exact.scales.shape, generator=torch.Generator().manual_seed(0)))
    values = Codes(exact.codes, wrong, exact.zeros)
    found = improve(plan_compensation(moment), target, values, bits=4, group_size=16, sweeps=1)
    torch.testing.assert_close(found.scales, exact.scales, rtol=1e-4, atol=0)
    assert torch.equal(found.codes, exact.codes)


def test_best_codes_stay_and_single_wrong_ones_are_mended():
    weight, moment = _problem(4)
    plan, exact = plan_compensation(moment), quantize_weight(weight, bits=4, group_size=16)
    target = decode(exact.codes, exact.scales, exact.zeros, bits=4, group_size=16)
    wrong = exact.codes.clone()
    wrong[:, 7] = 15 - wrong[:, 7]
    mended = improve(plan, target, Codes(wrong, exact.scales, exact.zeros), bits=4, group_size=16, sweeps=4)
    before = _error(target.double(), Codes(wrong, exact.scales, exact.zeros), plan.moment, 4, 16)
    assert _error(target.double(), mended, plan.moment, 4, 16) < 0.05 * before
    kept = improve(plan, target, exact, bits=4, group_size=16)
    assert torch.equal(kept.codes, exact.codes)
    torch.testing.assert_close(kept.scales, exact.scales, rtol=1e-5, atol=0)


def test_rows_in_parts_change_nothing(monkeypatch):
    weight, moment = _problem(6)
    plan = plan_compensation(moment)
    codes = _quantized(weight, plan, bits=4, group_size=16)
    whole = improve(plan, weight, codes, bits=4, group_size=16)
    monkeypatch.setattr("compresskit.layerwise.gptq._NUMBERS", 5 * 48)
    parts = improve(plan, weight, codes, bits=4, group_size=16)
    assert torch.equal(whole.codes, parts.codes)
    torch.testing.assert_close(whole.scales, parts.scales)


def test_groups_without_a_code_dead_inputs_and_rows_of_zeros_keep_their_scales():
    weight, moment = _problem(5)
    weight[3], weight[:, 16:32], moment[5], moment[:, 5] = 0, 0, 0, 0
    plan = plan_compensation(moment)
    codes = _quantized(weight, plan, bits=4, group_size=16)
    better = improve(plan, weight, codes, bits=4, group_size=16)
    assert torch.isfinite(better.scales).all()
    assert torch.equal(better.scales[3], codes.scales[3])
    assert torch.equal(better.scales[:, 1], codes.scales[:, 1])
    rounded = decode(better.codes, better.scales, better.zeros, bits=4, group_size=16)
    assert (rounded[3] == 0).all()
    assert (rounded[:, 16:32] == 0).all()
