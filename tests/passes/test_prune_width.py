"""Width pruning: scores, counts, refit and stock checkpoints."""

import pytest
import torch
from families import DECODERS, FAMILIES, answer, tiny, tiny_student
from pydantic import ValidationError

from compresskit.errors import CompressKitError
from compresskit.layerwise.moments import Moments
from compresskit.layerwise.scores import fluctuation_scores, top_indices
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.surgery.sites import find_anatomy


def prune(**options: object) -> PruneWidth:
    return PruneWidth.model_validate(options)


def test_scores_are_the_variance_times_the_squared_column_norm():
    x = torch.randn(50, 6, dtype=torch.float64) * torch.arange(6) + 3
    weight = torch.randn(4, 6, dtype=torch.float64)
    moments = Moments.zeros(6, 4)
    moments.update(x, x @ weight.T)
    scores = fluctuation_scores(weight, moments.mean(centred=True))
    torch.testing.assert_close(scores, x.var(0, unbiased=False) * weight.square().sum(0), rtol=1e-9, atol=1e-9)


def test_ties_go_to_the_lower_index():
    assert top_indices(torch.tensor([1.0, 3.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_equally_wide_afterwards(family):
    student = tiny_student(family)
    prune(keep={"ffn": 0.5, "heads": 0.5}).apply(student, generator=torch.Generator())
    anatomy = find_anatomy(student.model)
    assert {f.neurons for f in anatomy.feed_forwards} == {32}
    assert {a.heads for a in anatomy.attentions} == {2}
    assert torch.isfinite(answer(student.model)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_is_better_than_no_repair_on_the_calibration_text(family):
    student = tiny_student(family)
    notes = prune(keep={"ffn": 0.5, "heads": 0.5}).apply(student, generator=torch.Generator())
    assert len(notes["layers"]) == 4
    for layer in notes["layers"].values():
        assert layer["relative_error"] <= layer["relative_error_unrepaired"] + 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_changes_nothing_bit_for_bit(family):
    student = tiny_student(family)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    prune(keep={"ffn": 1.0, "heads": 1.0}).apply(student, generator=torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.state_dict().items())
    assert not student.edits


def test_dead_neurons_go_first_and_cost_nothing():
    original = tiny("bert")
    with torch.no_grad():
        for layer in original.encoder.layer:
            layer.intermediate.dense.weight[10:30] = 0
            layer.intermediate.dense.bias[10:30] = 0.7
    student = tiny_student("bert", original=original)
    prune(keep=44 / 64, round_to=4).apply(student, generator=torch.Generator())
    assert find_anatomy(student.model).feed_forwards[0].neurons == 44
    torch.testing.assert_close(answer(student.model), answer(original), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_grouped_queries_stay_with_their_keys(family):
    student = tiny_student(family)
    prune(keep={"heads": 0.5}).apply(student, generator=torch.Generator())
    for attention in find_anatomy(student.model).attentions:
        assert (attention.heads, attention.kv_heads) == (2, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dead", [0, 1])
def test_of_groups_the_dead_one_goes_with_its_own_queries_and_costs_nothing(family, dead):
    original = tiny(family)
    for attention in find_anatomy(original).attentions:
        size, per_group = attention.head_dim, attention.heads // attention.kv_heads
        values = original.get_submodule(attention.value)
        with torch.no_grad():
            values.weight[dead * size : (dead + 1) * size] = 0
    student = tiny_student(family, original=original)
    prune(keep={"heads": 0.5}, anchor=0).apply(student, generator=torch.Generator())
    kept = range((1 - dead) * per_group, (2 - dead) * per_group)
    for edit in student.edits:
        assert edit.keep == f"{kept[0]}-{kept[-1]}"
        assert edit.keep_kv == str(1 - dead)
    torch.testing.assert_close(answer(student.model), answer(original), atol=1e-4, rtol=1e-4)


def test_heads_of_low_rank_attention_are_cut_in_its_factors():
    student = tiny_student("bert")
    LowRank(keep=0.8, round_to=4, targets="*attention*").apply(student, generator=torch.Generator())
    prune(keep={"heads": 0.5, "ffn": 0.5}).apply(student, generator=torch.Generator())
    attention = find_anatomy(student.model).attentions[0]
    assert attention.heads == 2
    query = student.model.get_submodule(attention.query)
    assert (query.out_features, query.expand.out_features) == (16, 16)
    assert torch.isfinite(answer(student.model)).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": {"heads": 0.1}}, "leaves none"),
        ({"keep": {"ffn": 0.01}, "round_to": 32}, "leaves none"),
    ],
)
def test_widths_that_leave_nothing_are_refused(options, match):
    with pytest.raises(CompressKitError, match=match):
        prune(**options).plan(tiny("bert"))


@pytest.mark.parametrize("keep", [0, 1.5, {"ffn": 0}, {"head": 0.5}, "half", True])
def test_keep_must_be_a_fraction_of_something_known(keep):
    with pytest.raises(ValidationError):
        prune(keep=keep)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"keep": {"ffn": 0.95}, "round_to": 32}, "neurons.*cuts none"), ({"keep": {"heads": 0.9}}, "cuts none")],
)
def test_a_cut_that_cuts_nothing_is_refused(options, match):
    with pytest.raises(CompressKitError, match=match):
        PruneWidth.model_validate(options).plan(tiny("bert"))


def test_heads_alone_can_be_cut_whatever_the_ffn_is_a_multiple_of():
    edits = PruneWidth.model_validate({"keep": {"heads": 0.5}, "round_to": 48}).plan(tiny("bert"))
    assert len(edits) == 2
