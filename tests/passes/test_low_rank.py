"""Low rank: output PCA, its exact error, and the pass around it."""

import copy

import pytest
import torch
from families import FAMILIES, answer, tiny, tiny_student
from pydantic import ValidationError

from compresskit.errors import CompressKitError
from compresskit.layerwise.output_pca import solve_output_pca
from compresskit.layerwise.ranks import break_even_rank, rank_for
from compresskit.layerwise.weights import dense_weight
from compresskit.passes.low_rank import LowRank
from compresskit.surgery.sites import find_anatomy


def problem(outputs: int, inputs: int, *, rank: int | None = None, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(300, rank or inputs, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(rank or inputs, inputs, generator=draw, dtype=torch.float64)
    return weight, x, x.T @ x / len(x)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_predicted_error_is_the_measured_one(outputs, inputs, rank):
    weight, x, moment = problem(outputs, inputs)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(rank), float(pca.tail[rank])
    measured = float((x @ (weight - B @ A).T).square().sum(1).mean())
    assert predicted == pytest.approx(measured, rel=1e-6)
    torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=B.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12)])
def test_full_rank_is_the_dense_layer(outputs, inputs):
    weight, x, moment = problem(outputs, inputs)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(12), float(pca.tail[12])
    torch.testing.assert_close(x @ (B @ A).T, x @ weight.T, atol=1e-10, rtol=1e-10)
    assert predicted == pytest.approx(0, abs=1e-9)


def test_error_equals_that_of_whitening_with_the_cholesky_factor():
    weight, _, moment = problem(14, 10)
    L = torch.linalg.cholesky(moment)
    U, S, V = torch.linalg.svd(weight @ L, full_matrices=False)
    whitened = U[:, :4] * S[:4] @ V[:4] @ torch.linalg.inv(L)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(4), float(pca.tail[4])
    torch.testing.assert_close(B @ A, whitened, atol=1e-8, rtol=1e-8)
    assert predicted == pytest.approx(float(S[4:].square().sum()), rel=1e-9)


def test_singular_moments_and_dead_inputs_work():
    weight, x, moment = problem(8, 10, rank=3)
    B, A = solve_output_pca(weight, moment=moment).factors(3)
    torch.testing.assert_close(x @ (B @ A).T, x @ weight.T, atol=1e-8, rtol=1e-8)
    B, A = solve_output_pca(weight, moment=torch.zeros(10, 10, dtype=torch.float64)).factors(3)
    assert torch.isfinite(B @ A).all()


def test_ranks_out_of_range_and_foreign_moments_are_refused():
    weight, _, moment = problem(8, 10)
    with pytest.raises(ValueError, match="rank 9 is not in"):
        solve_output_pca(weight, moment=moment).factors(9)
    with pytest.raises(ValueError, match="has 10 inputs"):
        solve_output_pca(weight, moment=moment[:4, :4])


@pytest.mark.parametrize(("outputs", "inputs", "limit"), [(384, 384, 192), (384, 1536, 307), (1152, 384, 288)])
def test_break_even_is_where_factors_stop_saving(outputs, inputs, limit):
    found = break_even_rank(outputs, inputs)
    assert found in (limit, limit - 1)
    assert found * (outputs + inputs) < outputs * inputs <= (found + 1) * (outputs + inputs)


@pytest.mark.parametrize(("keep", "expected"), [(0.8, 224), (0.5, 128), (0.4, 112), (0.01, 8)])
def test_ranks_are_multiples_that_later_groups_divide(keep, expected):
    rank = rank_for(keep, 1152, 384)
    assert rank == expected
    assert rank % (32 if rank >= 128 else 8) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_share_one_factor_and_more_rank_loses_less(family):
    original = tiny(family)
    lost = []
    for keep in (0.3, 0.6, 0.9):
        student = tiny_student(family, original=original)
        LowRank(keep=keep, round_to=2, share=True, allocation="uniform").apply(student, generator=torch.Generator())
        lost.append(float((answer(student.model) - answer(original)).norm()))
    assert 0 < lost[2] < lost[1] < lost[0]
    attention = find_anatomy(student.model).attentions[0]
    layers = [student.model.get_submodule(name) for name in (attention.query, attention.key, attention.value)]
    assert len({id(layer.factor_in) for layer in layers}) == 1
    owned = [layer for layer in layers if layer.reduce is not None]
    assert len(owned) == 1


def test_one_layer_at_full_keep_minus_a_little_is_nearly_exact_on_its_inputs():
    student = tiny_student("bert")
    notes = LowRank(rank=15, targets="*attention.output*").apply(student, generator=torch.Generator())
    assert all(0 <= layer["relative_error"] < 0.2 for layer in notes["layers"].values())


def test_keep_one_changes_nothing():
    student = tiny_student("bert")
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    LowRank(keep=1.0).apply(student, generator=torch.Generator())
    after = student.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bias_false_adds_none():
    student = tiny_student("llama")
    LowRank(keep=0.5, round_to=4, bias=False).apply(student, generator=torch.Generator())
    assert not any(name.endswith("bias") for name in student.model.state_dict())


def test_a_rank_above_break_even_lists_every_layer():
    with pytest.raises(CompressKitError, match="saves nothing above 15") as caught:
        LowRank(rank=31, pivot=False).plan(tiny("bert"))
    message = str(caught.value)
    assert "encoder.layer.1.attention.output.dense (32x32)" in message
    assert "on_misfit: keep" in message


def test_misfits_stay_dense_and_are_listed_on_request():
    student = tiny_student("bert")
    notes = LowRank(rank=20, on_misfit="keep", pivot=False).apply(student, generator=torch.Generator())
    assert "encoder.layer.0.attention.output.dense" in notes["kept_dense"]
    assert isinstance(student.model.get_submodule("encoder.layer.0.attention.output.dense"), torch.nn.Linear)


def test_either_keep_or_rank_must_be_said():
    with pytest.raises(ValidationError, match="either keep or rank"):
        LowRank()
    with pytest.raises(ValidationError, match="either keep or rank"):
        LowRank(keep=0.5, rank=8)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(CompressKitError, match="match no module"):
        LowRank(keep=0.5, targets="*attn*").plan(tiny("bert"))


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_the_original_is_never_touched(anchor):
    original = tiny("llama")
    before = copy.deepcopy(original.state_dict())
    student = tiny_student("llama", original=original)
    LowRank(keep=0.6, round_to=4, anchor=anchor).apply(student, generator=torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())


def test_dense_weight_of_a_factorised_layer_is_the_product():
    student = tiny_student("bert")
    LowRank(keep=0.5, round_to=4).apply(student, generator=torch.Generator())
    layer = student.model.get_submodule("encoder.layer.0.output.dense")
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).T + layer.expand.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_anchoring_a_little_changes_little(bias):
    def lost(anchor):
        original = tiny("bert")
        student = tiny_student("bert", original=original)
        LowRank(keep=0.95, round_to=4, bias=bias, anchor=anchor).apply(student, generator=torch.Generator())
        return float((answer(student.model) - answer(original)).norm() / answer(original).norm())

    assert lost(1e-6) == pytest.approx(lost(0.0), rel=0.05)
