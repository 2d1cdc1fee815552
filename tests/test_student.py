"""Saving: tied tensors once, edits in config.json, stock where a stock config can say the shapes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, answer, tiny_student
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from compresskit.errors import CompressKitError
from compresskit.models import find_model, guess_task, load_empty, load_model
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.plugin import EditsConfig


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_neurons_everywhere_are_a_stock_checkpoint(family, tmp_path):
    student = tiny_student(family)
    PruneWidth.model_validate({"keep": 0.5}).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    assert not needs_plugin(tmp_path)
    auto = AutoModelForCausalLM if student.task == "text-generation" else AutoModel
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(answer(model.eval()), answer(student.model))
    assert load_student_model(tmp_path, student.task)[1] == student.edits


@pytest.mark.parametrize(("family", "plugin"), [("bert", True), ("llama", False), ("qwen3", False)])
def test_fewer_heads_are_stock_only_where_the_config_has_head_dim(family, plugin, tmp_path):
    student = tiny_student(family)
    PruneWidth.model_validate({"keep": {"heads": 0.5}}).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path) == plugin
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))


def test_tied_tensors_are_stored_once(tmp_path):
    student = tiny_student("llama")
    save_student(student, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_shared_factors_are_stored_once(tmp_path):
    student = tiny_student("bert")
    LowRank(keep=0.6, round_to=4, targets="*attention.self*", share=True, pivot=False).apply(
        student, generator=torch.Generator()
    )
    save_student(student, tmp_path)
    factors = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("reduce.weight")]
    assert len(factors) == 2, "one for each of two blocks"


def test_passes_cannot_start_from_a_student_of_the_plugin(tmp_path):
    student = tiny_student("bert")
    LowRank(keep=0.6, round_to=4).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    source = find_model(tmp_path)
    with pytest.raises(CompressKitError, match="is a student that compresskit made") as caught:
        load_empty(source, guess_task(source))
    assert caught.value.fix == "compress its original, with all passes in one recipe"
    assert torch.equal(answer(load_model(source, guess_task(source))), answer(student.model)), "it loads"


def test_passes_can_start_from_a_stock_student(tmp_path):
    student = tiny_student("bert")
    PruneWidth.model_validate({"keep": 0.5}).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    empty = load_empty(find_model(tmp_path), student.task)
    shapes = {name: tensor.shape for name, tensor in student.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes


def test_a_student_has_one_fingerprint_before_it_is_stored_and_after_and_another_when_it_changes(tmp_path):
    student = tiny_student("bert")
    whole = student.fingerprint()
    PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}}).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    assert model.config.to_dict() != student.model.config.to_dict()
    assert replace(student, model=model).fingerprint() == student.fingerprint() != whole
    original = copy.deepcopy(student.original)
    original.config.layer_norm_eps = 0.5
    assert replace(student, original=original).fingerprint() != student.fingerprint()


@pytest.mark.parametrize("edits", [5, [{"kind": "nope"}], [{"kind": "prune_neurons", "keep": "0-99999999999"}]])
def test_a_damaged_record_of_edits_is_named(edits, tmp_path):
    student = tiny_student("bert")
    save_student(student, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "compresskit_edits": edits}))
    with pytest.raises(CompressKitError) as caught:
        load_student_model(tmp_path, student.task)
    assert caught.value.fix


def test_edits_of_a_newer_schema_are_refused():
    with pytest.raises(ValueError, match="need a newer compresskit"):
        EditsConfig(edits=[], schema=99)


@pytest.mark.parametrize(
    "edit",
    [
        {"kind": "low_rank", "targets": ["../../outside"], "rank": 2, "bias": False},
        {"kind": "low_rank", "targets": ["encoder.layer.9.output.dense"], "rank": 2, "bias": False},
    ],
)
def test_an_edits_list_cannot_name_what_is_not_in_the_model(edit, tmp_path):
    student = tiny_student("bert")
    Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["edits"] = [edit]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressKitError, match=r"is not a module name|has no module"):
        load_student_model(tmp_path, student.task)
