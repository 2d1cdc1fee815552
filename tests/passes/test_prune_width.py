"""Width pruning: scores, counts, refit and stock checkpoints."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from families import DECODERS, ENCODER_SHAPE, FAMILIES, answer, student_of, tiny, tiny_student
from pydantic import ValidationError
from transformers import AlbertConfig, AutoModel

from compresskit.errors import CompressKitError
from compresskit.layerwise import width_survey
from compresskit.layerwise.scores import Score
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import load_student_model, save_student
from compresskit.surgery.parts import heads_of
from compresskit.surgery.sites import find_anatomy


def prune(**options: object) -> PruneWidth:
    return PruneWidth.model_validate(options)


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


def test_each_repair_errs_less_than_the_one_before_it_in_the_student():
    errors = []
    for repair in ("none", "bias", "least_squares"):
        notes = prune(keep={"ffn": 0.5, "heads": 0.5}, repair=repair).apply(
            tiny_student("bert"), generator=torch.Generator()
        )
        errors.append(next(layer["relative_error"] for layer in notes["layers"].values()))  # all see the same inputs
    assert errors[2] < errors[1] < errors[0]


def test_every_score_is_a_choice_of_its_own():
    kept = []
    for score in get_args(Score):
        student = tiny_student("bert")
        prune(keep=0.5, score=score).apply(student, generator=torch.Generator().manual_seed(1))
        kept.append(tuple(edit.keep for edit in student.edits))
    assert len(set(kept)) == len(kept) == 7


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
    student = student_of(original)
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
    student = student_of(original)
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


@pytest.mark.parametrize("score", ["magnitude", "wanda", "flap", "leverage", "taylor", "obs"])
@pytest.mark.parametrize("family", ["bert", "qwen3", "gpt2"])
def test_every_score_but_chance_drops_what_does_nothing(family, score):
    original = tiny(family)
    anatomy = find_anatomy(original)
    with torch.no_grad():
        for ffn in anatomy.feed_forwards:
            output = original.get_submodule(ffn.output)
            columns = output.weight if family == "gpt2" else output.weight.T
            columns[8:40] = 0
            for name in ffn.inputs:
                layer = original.get_submodule(name)
                rows = layer.weight.T if family == "gpt2" else layer.weight
                rows[8:40] = 0
                if layer.bias is not None:
                    layer.bias[8:40] = 0
    student = student_of(original)
    prune(keep=0.5, score=score).apply(student, generator=torch.Generator())
    assert [edit.keep for edit in student.edits] == ["0-7,40-63"] * 2
    torch.testing.assert_close(answer(student.model), answer(original), atol=1e-4, rtol=1e-4)


def test_a_random_choice_follows_the_generator():
    keeps = []
    for seed in (1, 1, 2):
        student = tiny_student("bert")
        prune(keep=0.5, score="random").apply(student, generator=torch.Generator().manual_seed(seed))
        keeps.append([edit.keep for edit in student.edits])
    assert keeps[0] == keeps[1] != keeps[2]
    assert keeps[0][0] != keeps[0][1], "blocks draw on their own"


@pytest.mark.parametrize("repair", ["bias", "least_squares"])
def test_a_bias_is_added_where_there_is_none_and_takes_the_mean(repair):
    student = tiny_student("llama")
    notes = prune(keep=0.5, repair=repair, bias=True, anchor=0).apply(student, generator=torch.Generator())
    assert [edit.kind for edit in student.edits] == ["add_bias", "prune_neurons"] * 2
    for ffn in find_anatomy(student.model).feed_forwards:
        bias = student.model.get_submodule(ffn.output).bias
        assert bias.abs().max() > 0
        assert all(student.model.get_submodule(name).bias is None for name in ffn.inputs)
    assert all(one["relative_error"] < one["relative_error_unrepaired"] for one in notes["layers"].values())


def lopsided(family="bert", **changes):
    """A model whose first FFN hardly says anything."""
    original = tiny(family, **changes)
    with torch.no_grad():
        original.get_submodule(find_anatomy(original).feed_forwards[0].output).weight.mul_(1e-3)
    return original


def weights_of(model):
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("keep", [{"ffn": 0.5}, {"ffn": 0.5, "heads": 0.5}])
def test_per_layer_keeps_more_where_more_is_lost_in_no_more_weights(family, keep):
    even, uneven = (student_of(lopsided(family)) for _ in range(2))
    prune(keep=keep).apply(even, generator=torch.Generator())
    notes = prune(keep=keep, allocation="per_layer").apply(uneven, generator=torch.Generator())
    first, second = (ffn.neurons for ffn in find_anatomy(uneven.model).feed_forwards)
    assert first < 32 < second or "heads" in keep
    assert first % 8 == second % 8 == 0
    assert 0.9 * weights_of(even.model) < weights_of(uneven.model) <= weights_of(even.model)
    said = notes["allocation"]
    assert said["weights_kept"] <= said["weights_even"]
    assert weights_of(even.model) - weights_of(uneven.model) == said["weights_even"] - said["weights_kept"]
    assert said["predicted_loss"] < said["predicted_loss_even"]
    for edit in uneven.edits:
        assert edit.kind in ("prune_neurons", "prune_heads")


def test_widths_by_trials_are_multiples_that_a_quantiser_can_group():
    original = lopsided("bert", intermediate_size=72)
    student = student_of(original)
    step = prune(keep={"ffn": 0.5, "heads": 0.5}, allocation="per_layer", round_to=16)
    step.apply(student, generator=torch.Generator())
    anatomy = find_anatomy(student.model)
    neurons, heads = {f.neurons for f in anatomy.feed_forwards}, {a.heads for a in anatomy.attentions}
    assert len(neurons | heads) > 2, "not even"
    assert all(count % 16 == 0 for count in neurons)
    assert all(count * 8 % 16 == 0 for count in heads)
    Quantize(bits=4, group_size=16).apply(student, generator=torch.Generator())


def test_the_survey_of_widths_is_taken_once_and_serves_every_keep(monkeypatch):
    taken = []
    measure = width_survey._try_widths
    monkeypatch.setattr(width_survey, "_try_widths", lambda *args: taken.append(1) or measure(*args))
    original, shapes = lopsided(), []
    for keep, seed in ((0.5, 3), (0.5, 3), (0.75, 3), (0.5, 4)):
        student = student_of(copy.deepcopy(original))
        generator = torch.Generator().manual_seed(seed)
        prune(keep=keep, allocation="per_layer", score="random").apply(student, generator=generator)
        shapes.append([edit.keep for edit in student.edits])
    assert len(taken) == 2, "one for each seed"
    assert shapes[0] == shapes[1], "a cached survey draws nothing"


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_no_block_goes_below_the_floor(floor):
    student = student_of(lopsided())
    prune(keep=0.5, allocation="per_layer", floor=floor).apply(student, generator=torch.Generator())
    widths = [ffn.neurons for ffn in find_anatomy(student.model).feed_forwards]
    assert min(widths) == 32 * floor


def test_a_bias_that_nothing_fills_is_refused():
    with pytest.raises(ValidationError, match="repair: bias"):
        prune(keep=0.5, repair="none", bias=True)


def test_an_anchor_that_nothing_reads_is_refused():
    with pytest.raises(ValidationError, match="anchor has no effect"):
        prune(keep=0.5, repair="none", anchor=0.5)
    assert prune(keep=0.5, repair="none", score="obs", anchor=0.5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tied_tables_stay_tied(family, tmp_path):
    student = student_of(tiny(family, tie_word_embeddings=True))
    prune(keep={"ffn": 0.5, "heads": 0.5}).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    for model in (student.model, load_student_model(tmp_path, student.task)[0]):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_mean_without_a_bias_to_go_into_is_refused():
    with pytest.raises(CompressKitError, match="has none") as caught:
        prune(keep=0.5, repair="bias").plan(tiny("llama"))
    assert caught.value.where == "repair"
    assert "bias: true" in str(caught.value.fix)
    assert prune(keep=0.5, repair="bias").plan(tiny("bert"))


def test_quantised_layers_are_refused_before_anything_is_cut():
    student = tiny_student("bert")
    Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    before = list(student.edits)
    for keep in ({"ffn": 0.5}, {"heads": 0.5}):
        with pytest.raises(CompressKitError, match="held in integers") as caught:
            prune(keep=keep).apply(student, generator=torch.Generator())
        assert caught.value.fix == "prune before quantising"
    assert student.edits == before


def test_heads_that_the_key_value_heads_do_not_divide_are_refused():
    model = tiny("llama")
    attention = replace(find_anatomy(model).attentions[0], heads=4, kv_heads=3)
    with pytest.raises(CompressKitError, match="4 heads cannot share 3 key/value heads evenly"):
        heads_of(attention, model)


def test_blocks_that_are_shared_are_refused():
    config = AlbertConfig(**ENCODER_SHAPE, embedding_size=16)
    with pytest.raises(CompressKitError, match="runs more than once"):
        prune(keep=0.5).plan(AutoModel.from_config(config))


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers.0.mlp.up_proj.weight", "nan"), ("layers.1.input_layernorm.weight", "inf"), ("norm.weight", "nan")],
)
@pytest.mark.parametrize("score", ["leverage", "taylor"])
def test_numbers_that_are_not_finite_are_refused_by_name_before_anything_is_cut(name, value, score):
    student = tiny_student("llama")
    student.model.model.get_parameter(name).data[1] = float(value)
    with pytest.raises(CompressKitError, match=f"1 tensors have values that are NaN or infinite:\n    model.{name}: "):
        prune(keep=0.5, score=score).apply(student, generator=torch.Generator())
    assert student.edits == []
