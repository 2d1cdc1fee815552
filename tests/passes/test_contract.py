"""Every registered pass keeps the contract: replayable, reproducible, reloadable, original untouched."""

import copy

import pytest
import torch
import yaml
from deep_models import RESNET
from families import answer, random_model, student_of, tiny
from transformers import AutoModelForImageClassification, PreTrainedModel

from compresskit.models import find_model, load_empty
from compresskit.passes import PASSES, Pass, Quantize
from compresskit.recipe import Recipe, dump_recipe, parse_recipe
from compresskit.student import Student, load_student_model, save_student
from compresskit.surgery.edits import replay

EXAMPLES: dict[str, list[dict[str, object]]] = {
    "low_rank": [
        {"keep": 0.6, "round_to": 16, "on_misfit": "keep", "allocation": "uniform", "share": True},
        {"rank": 8, "anchor": 0.5, "share": False, "pivot": False, "metric": "output"},
    ],
    "prune_width": [
        {"keep": {"ffn": 0.5, "heads": 0.5}},
        {"keep": 0.75, "anchor": 1.0, "round_to": 16},
        {"keep": {"ffn": 0.5, "heads": 0.5}, "score": "obs", "repair": "bias", "bias": True, "anchor": 0.0},
        {"keep": 0.5, "score": "taylor", "repair": "none"},
        {"keep": {"heads": 0.5}, "score": "random"},
    ],
    "prune_depth": [{"keep": 0.5}, {"unit": "ffn", "blocks": [1]}],
    "prune_vocab": [{"keep": 0.5}, {"keep": 0.75, "round_to": 16}],
    "prune_filters": [{"keep": 0.5}, {"keep": 0.75, "importance": "taylor", "round_to": 4}],
    "quantize": [
        {"bits": 8, "group_size": 16},
        {"bits": 4, "group_size": 16, "anchor": 0.5},
        {"bits": 3, "group_size": 32, "method": "gptq", "symmetric": True},
        {"bits": 8, "group_size": "channel", "symmetric": False, "overrides": {"*0*": {"bits": 4, "group_size": 16}}},
        {"bits": 8, "group_size": "channel", "act": "int8"},
        {"bits": 8, "group_size": "channel", "act": "int8_static", "smooth": 0.25},
        {"bits": 4, "group_size": 16, "act": "int8", "overrides": {"*0*": {"bits": 8}, "*1*": {"act": "none"}}},
    ],
    "tensor": [{"keep": 0.5}, {"keep": 0.5, "embeddings": "tensor_train"}],
    "low_rank_correction": [{"rank": 4}, {"rank": 2, "anchor": 0.5, "targets": "*0*"}],
    "distill": [{"steps": 2, "batch_size": 4}],
    "bitsandbytes": [
        {"format": "int8"},
        {"format": "int8", "threshold": 0, "targets": "*0*"},
        {"on_misfit": "keep"},
        {"format": "fp4", "double_quant": True, "on_misfit": "keep"},
    ],
}
#: What a pass builds on.
BEFORE: dict[str, list[Pass]] = {"low_rank_correction": [Quantize(bits=4, group_size=16)]}
#: What a pass is tried on: by default an encoder, a decoder, and T5's encoder, whose code asks linears for their dtype.
FAMILIES = {"prune_filters": ("resnet",)} | dict.fromkeys(
    ("prune_width", "prune_vocab", "bitsandbytes"), ("bert", "llama")
)
# Gemma's writers are normalised before they join the stream.
FAMILIES["low_rank_correction"] = ("bert", "llama", "t5", "gemma3")
CASES = [
    (kind, options, family)
    for kind, many in EXAMPLES.items()
    for options in many
    for family in FAMILIES.get(kind, ("bert", "llama", "t5"))
]


def original_of(family: str) -> PreTrainedModel:
    return random_model(AutoModelForImageClassification, RESNET) if family == "resnet" else tiny(family)


def make(kind: str, options: dict[str, object]) -> Pass:
    return PASSES.parse({"kind": kind, **options})


def prepared(kind: str, original: PreTrainedModel) -> Student:
    """A student that the passes went over which this kind builds on."""
    student = student_of(original)
    for before in BEFORE.get(kind, []):
        before.apply(student, generator=torch.Generator().manual_seed(6))
    return student


def test_every_registered_pass_has_an_example():
    assert set(EXAMPLES) == set(PASSES)


@pytest.mark.parametrize("kind", sorted(PASSES))
def test_every_registered_pass_says_which_text_it_needs_and_whether_it_learns(kind):
    assert PASSES[kind].needs
    assert PASSES[kind].learns == ("teacher" in PASSES[kind].model_fields)


@pytest.mark.parametrize(("kind", "options", "family"), CASES)
def test_a_pass_keeps_the_contract(kind, options, family, tmp_path):
    step = make(kind, options)
    original = original_of(family)
    before = copy.deepcopy(original.state_dict())
    students = []
    for _ in range(2):
        student = prepared(kind, original)
        foreseen = copy.deepcopy(student.model)
        planned = step.plan(student.model)
        notes = step.apply(student, generator=torch.Generator().manual_seed(7))
        students.append(student)
        assert isinstance(notes, dict)
    first, second = (student.model.state_dict() for student in students)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "the same seed gives the same weights"
    assert all(torch.equal(before[name], t) for name, t in original.state_dict().items()), "the original is untouched"
    replay(planned, foreseen)
    shapes = {name: tuple(tensor.shape) for name, tensor in foreseen.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in first.items()}, "plan foretells the shapes"
    assert torch.isfinite(answer(student.model, student.corpus.evaluation)).all()
    assert not student.model.training


@pytest.mark.parametrize(("kind", "options", "family"), CASES)
def test_a_student_reloads_bit_for_bit_with_the_same_edits(kind, options, family, tmp_path):
    student = prepared(kind, original_of(family))
    make(kind, options).apply(student, generator=torch.Generator().manual_seed(7))
    save_student(student, tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    text = student.corpus.evaluation
    assert torch.equal(answer(model, text), answer(student.model, text))
    assert type(model) is type(student.model)


@pytest.mark.parametrize("kind", list(PASSES))
def test_options_survive_the_recipe_and_have_a_source(kind, tmp_path):
    step = make(kind, EXAMPLES[kind][0])
    recipe = Recipe.model_validate({"model": "m", "passes": [step]})
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))).passes == (step,)
    assert type(step).__doc__
    assert step.version >= 1


@pytest.mark.parametrize("kind", list(PASSES))
def test_planning_on_the_meta_device_changes_nothing_and_agrees(kind, tiny_bert_folder, tmp_path):
    if FAMILIES.get(kind) == ("resnet",):
        original_of("resnet").save_pretrained(tmp_path)
        empty = load_empty(find_model(tmp_path), "image-classification")
    else:
        empty = load_empty(find_model(tiny_bert_folder), "feature-extraction")
    for before in BEFORE.get(kind, []):
        replay(before.plan(empty), empty)
    names = {name: tuple(t.shape) for name, t in empty.state_dict().items()}
    make(kind, EXAMPLES[kind][0]).plan(empty)
    assert names == {name: tuple(t.shape) for name, t in empty.state_dict().items()}
