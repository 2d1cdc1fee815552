"""Students are stored in their original's float type, load in it as the original does, and are what was measured."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_models import RESNET
from families import answer, random_examples, random_model, student_of, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, PreTrainedModel

import compresskit
from compresskit.data import ModelInputs
from compresskit.engine import prove_reloads
from compresskit.evaluate import state_dict_bytes
from compresskit.float_types import FloatTypes, note_float_types
from compresskit.job import prepare, take_prints
from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear
from compresskit.layers.corrected_linear import CorrectedLinear
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layers.factored_conv import FactoredConv
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.low_rank_embedding import LowRankEmbedding
from compresskit.layers.pivoted_linear import PivotedLinear
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layers.stand_in import TypedLayer
from compresskit.layers.stored import round_weights
from compresskit.layers.tensor_train import TensorTrainEmbedding
from compresskit.models import TASKS, find_float_types, find_model, load_empty, load_model
from compresskit.passes import PASSES, Quantize
from compresskit.recipe import Recipe, parse_recipe
from compresskit.student import Student, needs_plugin, save_student

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = {"bits": 4, "group_size": 16}


def original_in(dtype: torch.dtype, model: PreTrainedModel, loaded: torch.dtype | None = None) -> PreTrainedModel:
    """The model with weights of `dtype`, float32 in memory, as one read from such files."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()
    note_float_types(model, FloatTypes(dtype, loaded or dtype))
    return model


def changed(dtype: torch.dtype, family: str, *passes: dict[str, Any]) -> Student:
    """What a run makes of the family's model, stored in `dtype`."""
    model = random_model(AutoModelForImageClassification, RESNET) if family == "resnet" else tiny(family)
    student = student_of(original_in(dtype, model))
    for said in passes:
        PASSES.parse(said).apply(student, generator=torch.Generator().manual_seed(0))
        student.round_to_stored()
    student.model.eval()
    return student


def answer_in(model: PreTrainedModel) -> torch.Tensor:
    """As `answer`, images in the type of the model."""
    inputs = random_examples(model, 8, seed=3)
    if isinstance(inputs, ModelInputs):
        inputs = ModelInputs({name: value.to(model.dtype) for name, value in inputs.tensors.items()})
    return answer(model, inputs)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


#: family, passes, the layer that they insert
KINDS: dict[str, tuple[str, list[dict[str, Any]], type[nn.Module]]] = {
    "grouped": ("llama", [{"kind": "quantize", **GROUPS}], QuantLinear),
    "table": ("llama", [{"kind": "quantize", "bits": 8, "group_size": 16, "targets": "*q_proj"}], QuantEmbedding),
    "rows": ("gemma3", [{"kind": "quantize", "bits": 8, "group_size": "channel", "embeddings": 4}], QuantEmbedding),
    "int8": ("bert", [{"kind": "quantize", "bits": 8, "group_size": "channel", "act": "int8"}], Int8Linear),
    "int8 static": (
        "bert",
        [{"kind": "quantize", "bits": 8, "group_size": "channel", "act": "int8_static"}],
        Int8Linear,
    ),
    "int8 of 4": ("bert", [{"kind": "quantize", "bits": 4, "group_size": 16, "act": "int8"}], Int8Linear),
    "t5": ("t5", [{"kind": "quantize", **GROUPS}], QuantLinear),
    "t5 int8": ("t5", [{"kind": "quantize", "bits": 8, "group_size": "channel", "act": "int8"}], Int8Linear),
    "pivoted": ("llama", [{"kind": "low_rank", "keep": 0.7, "round_to": 4}], PivotedLinear),
    "shared": (
        "bert",
        [{"kind": "low_rank", "keep": 0.6, "round_to": 4, "pivot": False, "share": True}],
        LowRankLinear,
    ),
    "t5 low rank": ("t5", [{"kind": "low_rank", "keep": 0.7, "round_to": 4}], LowRankLinear),
    "corrected": (
        "llama",
        [{"kind": "quantize", **GROUPS}, {"kind": "low_rank_correction", "rank": 4}],
        CorrectedLinear,
    ),
    "low-rank table": ("llama", [{"kind": "tensor", "keep": 0.5}], LowRankEmbedding),
    "train": ("llama", [{"kind": "tensor", "keep": 0.5, "embeddings": "tensor_train"}], TensorTrainEmbedding),
    "conv": ("resnet", [{"kind": "tensor", "keep": 0.5}], FactoredConv),
    "no ffn": ("t5", [{"kind": "prune_depth", "unit": "ffn", "blocks": [1]}], EmptyLinear),
    "nf4": (
        "bert",
        [
            {"kind": "low_rank", "rank": 8, "targets": "*key*", "pivot": False, "allocation": "uniform"},
            {"kind": "bitsandbytes", "on_misfit": "keep", "double_quant": True},
        ],
        Bnb4Linear,
    ),
    "llm.int8": (
        "bert",
        [
            {"kind": "low_rank", "rank": 8, "targets": "*key*", "pivot": False, "allocation": "uniform"},
            {"kind": "bitsandbytes", "format": "int8", "threshold": 1.0},
        ],
        Bnb8Linear,
    ),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_runs_in_the_float_type_that_the_original_loads_in(kind: str, half: str, tmp_path: Path) -> None:
    family, passes, layer = KINDS[kind]
    dtype = HALVES[half]
    student = changed(dtype, family, *passes)
    truth = answer(student.model)
    assert any(isinstance(module, layer) for module in student.model.modules())
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    size_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert size_bytes == state_dict_bytes(student.model, dtype) < state_dict_bytes(student.model)
    loaded = TASKS[student.task].from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    beside = {name for name, module in loaded.named_modules() if isinstance(module, TypedLayer)}
    for name in beside:
        for own, buffer in loaded.get_submodule(name).named_buffers(recurse=False):
            assert torch.equal(buffer, student.model.get_submodule(name).get_buffer(own)), "no scale is rounded"
    found = answer_in(loaded)
    assert found.dtype == dtype
    # Where activations are rounded to 8 bits, those near the middle of two steps go the other way.
    assert 0 < apart(found, truth) < (0.003 if dtype == torch.float16 and layer is not Int8Linear else 0.03)
    wide = TASKS[student.task].from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(answer(wide), truth)


@pytest.mark.parametrize("kind", ["grouped", "rows", "int8", "pivoted"])
def test_a_student_in_float32_loads_in_bfloat16_too(kind: str, tmp_path: Path) -> None:
    family, passes, _ = KINDS[kind]
    student = changed(torch.float32, family, *passes)
    save_student(student, tmp_path)
    auto = TASKS[student.task]
    assert auto.from_pretrained(tmp_path).dtype == torch.float32
    found = answer(auto.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert apart(found, answer(student.model)) < 0.03


@pytest.mark.parametrize("kind", ["grouped", "rows", "int8", "int8 static", "nf4", "llm.int8"])
def test_a_student_can_be_cast_scales_and_all(kind: str) -> None:
    family, passes, _ = KINDS[kind]
    model = changed(torch.float32, family, *passes).model
    truth = answer(model)
    nn.Module.to(model, torch.bfloat16)
    found = answer(model)
    assert found.dtype == torch.bfloat16
    assert apart(found, truth) < 0.06


def test_without_types_to_follow_a_student_is_float32(tmp_path: Path) -> None:
    student = changed(torch.float32, "llama", {"kind": "prune_width", "keep": 0.5})
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    assert student.round_to_stored() == []
    save_student(student, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in stored.items())


def test_tied_weights_stay_tied_and_every_weight_is_a_bfloat16() -> None:
    student = changed(torch.bfloat16, "llama")
    model: Any = student.model
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert student.round_to_stored() == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, student.original.get_parameter("lm_head.weight"))
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())


def test_what_the_original_holds_in_more_digits_keeps_them(tmp_path: Path) -> None:
    """A file of mixed types: after a block is gone, its weight is found under another number."""
    model = original_in(torch.bfloat16, tiny("llama"))
    finer = "model.layers.{}.mlp.up_proj.weight"
    draw = torch.Generator().manual_seed(5)
    kept: Any = model.get_parameter(finer.format(1))
    kept.data = torch.randn(kept.shape, generator=draw)
    student = student_of(model)
    PASSES.parse({"kind": "prune_depth", "blocks": [1]}).apply(student, generator=torch.Generator())
    assert student.round_to_stored() == []
    assert torch.equal(student.model.get_parameter(finer.format(0)), kept)
    moved = student.model.get_parameter(finer.format(0))
    trained = moved.detach() * 1.01
    moved.data = trained.clone()
    assert student.round_to_stored() == []
    assert torch.equal(moved, trained)
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name, value in stored.items() if value.dtype == torch.float32] == [finer.format(0)]
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.bfloat16}
    assert state_dict_bytes(student.model, torch.bfloat16) == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_weights_that_float16_cannot_hold_stay_float32(factor: float, tmp_path: Path) -> None:
    student = changed(torch.float16, "llama")
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        student.model.get_parameter(name).mul_(factor / 3)
    before = student.model.get_parameter(name).clone()
    assert student.round_to_stored() == [name]
    assert torch.equal(student.model.get_parameter(name), before)
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [own for own, value in stored.items() if value.dtype == torch.float32] == [name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == (torch.float32 if factor > 1 else torch.float16), "past its range it would be infinite"
    assert answer(loaded).isfinite().all()


def test_rounding_leaves_what_is_not_finite_for_the_engine_to_refuse() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[torch.nan, 0.1]])
    assert round_weights(layer, torch.bfloat16, finer=lambda _: False) == ["weight"]
    assert layer.weight.isnan().any()


def _saved_in(folder: Path, dtype: torch.dtype, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


@pytest.mark.parametrize("said", ["float32", None, "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_student_loads_as_its_original_whose_config_may_differ_from_its_files(
    stored: torch.dtype, said: str | None, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = _saved_in(tiny_llama_folder, stored, tmp_path / "original")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | ({"dtype": said} if said else {})))
    usual = AutoModelForCausalLM.from_pretrained(folder)
    assert find_float_types(find_model(folder)) == FloatTypes(stored, usual.dtype)
    model = load_empty(find_model(folder), "text-generation")
    assert model.dtype == torch.float32, "planned as it will lie in memory"
    student = student_of(load_model(find_model(folder), "text-generation"))
    save_student(student, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded.dtype == usual.dtype
    assert torch.equal(answer(loaded), answer(usual))
    assert {one.dtype for one in load_file(tmp_path / "student" / "model.safetensors").values()} == {stored}


_STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("compresskit") for name in sys.modules)
logits = model(torch.tensor([[5, 6, 7]])).logits
assert logits.dtype == model.dtype and logits.isfinite().all()
print(model.dtype)
"""
PASSES_OF_A_RUN = [
    {"kind": "prune_width", "keep": 0.75},
    {"kind": "distill", "steps": 2, "batch_size": 4},
    {"kind": "low_rank", "rank": 16, "allocation": "uniform", "targets": "*self_attn*", "on_misfit": "keep"},
    {"kind": "quantize", "bits": 4, "group_size": 16},
]


@pytest.mark.parametrize("half", HALVES)
def test_a_run_predicts_records_and_writes_the_same_bytes(
    half: str, tiny_llama_folder: Path, tiny_data: dict[str, object], tmp_path: Path
) -> None:
    folder = _saved_in(tiny_llama_folder, HALVES[half], tmp_path / "original")
    out = tmp_path / "out"

    def recipe(passes: list[dict[str, Any]], **said: Any) -> Recipe:
        given = {"model": str(folder), "data": tiny_data, "evaluate": "never", "passes": passes}
        return parse_recipe(given | said)

    compresskit.run(recipe(PASSES_OF_A_RUN[:1]), out)
    first = out / "student" / "model.safetensors"
    assert first.stat().st_size < (folder / "model.safetensors").stat().st_size
    assert not needs_plugin(first.parent)
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, str(first.parent)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"torch.{half}", done.stderr[-2000:]

    whole = recipe(PASSES_OF_A_RUN, export=[{"kind": "onnx", "baselines": False, "rounds": 3, "texts": 8}])
    report = compresskit.run(whole, out)
    forecast = prepare(whole).forecast
    files = [folder, *(path / "student" for path in sorted((out / "steps").glob("*")) if (path / "student").is_dir())]
    actual = [(path / "model.safetensors").stat().st_size for path in files]
    assert len(actual) == 5
    assert [entry["size_bytes"] for entry in report["passes"]] == actual
    assert [step.size_bytes for step in forecast.steps] == actual
    assert all(step.memory_bytes > 1.5 * step.size_bytes for step in forecast.steps[:4])
    (export,) = report["export"]
    assert export["size_bytes"] == pytest.approx(export["predicted_bytes"], abs=40_000)
    figures = compresskit.measure(out)
    assert [figures[name]["size_bytes"] for name in ("original", "student")] == [actual[0], actual[-1]]
    model, _ = compresskit.load(out)
    assert model.dtype == torch.float32

    compresskit.run(recipe(PASSES_OF_A_RUN), tmp_path / "at once")
    resumed, at_once = (load_file(path / "student" / "model.safetensors") for path in (out, tmp_path / "at once"))
    assert resumed.keys() == at_once.keys()
    assert all(torch.equal(resumed[name], at_once[name]) for name in resumed)


def test_steps_of_an_original_in_bfloat16_are_not_those_that_were_stored_in_float32(
    tiny_llama_folder: Path, tiny_data: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _saved_in(tiny_llama_folder, torch.bfloat16, tmp_path / "original")
    job = prepare(parse_recipe({"model": str(folder), "data": tiny_data, "passes": PASSES_OF_A_RUN[:1]}))
    prints = take_prints(job)
    monkeypatch.setattr("compresskit.job.find_float_types", lambda _: FloatTypes())
    before = take_prints(job)
    assert before.steps[0] == prints.steps[0], "the original's own figures are what they were"
    assert before.identity == prints.identity
    assert before.steps[1] != prints.steps[1]
    assert before.result != prints.result


def test_a_budget_in_bytes_counts_what_stays_float_as_it_is_stored(tmp_path: Path) -> None:
    """So many bytes that 8 bits fit where the rest is bfloat16, and not where it is float32."""
    student = changed(torch.bfloat16, "llama")
    eight = changed(torch.bfloat16, "llama", {"kind": "quantize", "bits": 8, "group_size": 16, "embeddings": None})
    budget = state_dict_bytes(eight.model, torch.bfloat16) + 3000
    assert budget < state_dict_bytes(eight.model)
    one = Quantize(bits="auto", budget_bytes=budget, group_size=16, embeddings=None)
    assert {edit.bits for edit in one.plan(student.model)} == {8}  # type: ignore[attr-defined]
    one.apply(student, generator=torch.Generator())
    student.round_to_stored()
    save_student(student, tmp_path)
    assert 0.9 * budget < (tmp_path / "model.safetensors").stat().st_size <= budget


def test_scales_beside_integers_do_not_outvote_the_weights_of_a_student(tmp_path: Path) -> None:
    student = changed(torch.bfloat16, "llama", {"kind": "quantize", **GROUPS, "embeddings": 4})
    save_student(student, tmp_path)
    held = Counter(one.dtype for one in load_file(tmp_path / "model.safetensors").values() for _ in range(one.numel()))
    assert held[torch.float32] > held[torch.bfloat16] > 0
    assert find_float_types(find_model(tmp_path)).stored == torch.bfloat16
