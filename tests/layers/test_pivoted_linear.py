"""A pivoted matrix is the same map with fewer weights, and stays it when layers around it change."""

import pytest
import torch
from families import answer, tiny_student
from torch import nn

from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.pivoted_linear import PivotedLinear, pivot_columns
from compresskit.layerwise.weights import dense_weight, set_factors, set_weight
from compresskit.passes.low_rank import LowRank
from compresskit.passes.quantize import Quantize
from compresskit.surgery.cuts import keep_inputs, keep_outputs


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [5, 3, 1, 0])
def test_pivot_columns_give_back_the_matrix_whatever_its_rank(rank):
    A = random(5, rank) @ random(rank, 12, seed=1)
    order, rest, pivots = pivot_columns(A)
    assert sorted(order.tolist()) == list(range(12))
    again = pivots @ torch.cat([torch.eye(5, dtype=A.dtype), rest], dim=1)
    torch.testing.assert_close(again, A[:, order], atol=1e-12, rtol=1e-10)


def test_a_pivoted_layer_computes_its_dense_weight():
    layer = PivotedLinear(12, 5, dtype=torch.float64)
    order, rest, _ = pivot_columns(random(5, 12))
    layer.set_columns(order, rest)
    x = random(2, 3, 12, seed=1)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).T)
    assert sum(p.numel() for p in layer.parameters()) == 5 * 7


@pytest.mark.parametrize("outputs", [0, 12, 13])
def test_as_many_pivots_as_inputs_are_refused(outputs):
    with pytest.raises(ValueError, match=f"{outputs} pivots of 12 inputs"):
        PivotedLinear(12, outputs)


def low_rank(inputs: int, outputs: int, rank: int) -> LowRankLinear:
    layer = LowRankLinear(inputs, outputs, rank, bias=True, pivot=True, dtype=torch.float64)
    set_factors([layer], random(outputs, rank), random(rank, inputs, seed=1))
    return layer


def test_factors_that_share_a_pivoted_one_are_the_factors_that_were_given():
    first = low_rank(12, 4, 5)
    second = LowRankLinear(12, 6, 5, bias=False, shares=first, dtype=torch.float64)
    B, A = random(10, 5), random(5, 12, seed=1)
    set_factors([first, second], B, A)
    both = torch.cat([dense_weight(first), dense_weight(second)])
    torch.testing.assert_close(both, B @ A)


@pytest.mark.parametrize("kept", [8, 6, 5, 3])
def test_cutting_inputs_cuts_the_columns_of_the_map_even_below_its_rank(kept):
    holder = nn.Module()
    holder.layer = low_rank(12, 7, 5)
    before, bias = dense_weight(holder.layer), holder.layer.expand.bias
    keep = torch.tensor(range(12))[-kept:]
    keep_inputs(holder, "layer", keep)
    torch.testing.assert_close(dense_weight(holder.layer), before[:, keep])
    assert isinstance(holder.layer, LowRankLinear) == (kept > 5)
    assert bias is (holder.layer.expand if kept > 5 else holder.layer).bias


def test_cutting_outputs_cuts_the_rows_of_the_map():
    layer = low_rank(12, 7, 5)
    before = dense_weight(layer)
    keep_outputs(layer, torch.tensor([0, 2, 6]))
    torch.testing.assert_close(dense_weight(layer), before[[0, 2, 6]])


def test_a_weight_within_reach_of_the_factors_is_set_exactly():
    layer = low_rank(12, 7, 5)
    B = dense_weight(layer.expand)
    weight = B @ random(5, 12, seed=3)
    set_weight(layer, weight)
    torch.testing.assert_close(dense_weight(layer), weight)


def test_a_pivoted_factor_that_queries_keys_and_values_share_is_rounded_once():
    student = tiny_student("llama")
    step = LowRank(keep=0.5, round_to=8, share=True, allocation="uniform", on_misfit="keep")
    step.apply(student, generator=torch.Generator())
    notes = Quantize(bits=8, group_size=16, on_misfit="keep").apply(student, generator=torch.Generator())
    rounded = [name for name in notes["layers"] if name.endswith("reduce.rest")]
    assert any("q_proj" in name for name in rounded)
    assert not any("k_proj" in name for name in rounded)
    assert torch.isfinite(answer(student.model)).all()
