"""Bytes of exported files are known from shapes alone; a file of another size is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from changed_students import FAST, factorise, linears, make_student, quantize_linears, quantize_table
from families import FAMILIES, OTHERS, tiny, tiny_student

import compresskit
from compresskit.errors import RunFailedError
from compresskit.export import OnnxExport
from compresskit.export import onnx as exporter
from compresskit.export.folder import MODEL_FILE
from compresskit.export.predict import TOLERANCE, Prediction, judge_bytes, on_meta, predict_bytes
from compresskit.forecast import foretell
from compresskit.models import find_model
from compresskit.recipe import parse_recipe
from compresskit.student import Student
from compresskit.surgery.cuts import PruneNeurons

#: Positions, shapes and masks that tracing makes constants of, and biases of none.
CONSTANTS = 1500


def _table(student: Student, bits: int) -> None:
    if student.task == "feature-extraction":
        quantize_table(student, "embeddings.word_embeddings", bits=bits)
    else:
        quantize_table(student, "model.embed_tokens", bits=bits, head="lm_head")


def _low_rank(student: Student) -> None:
    names = [
        name for name in linears(student) if name.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj"))
    ]
    factorise(student, [tuple(names)], rank=8)


def _width(student: Student) -> None:
    if student.task == "feature-extraction":
        inputs, output = ("encoder.layer.0.intermediate.dense",), "encoder.layer.0.output.dense"
    else:
        block = "model.layers.0.mlp"
        inputs, output = (f"{block}.gate_proj", f"{block}.up_proj"), f"{block}.down_proj"
    student.edit(PruneNeurons(inputs=inputs, output=output, keep="0-31"))


CHANGES: dict[str, Callable[[Student], None]] = {
    "float": lambda _: None,
    "low_rank": _low_rank,
    "width": _width,
    "weights8": lambda student: quantize_linears(student, linears(student), bits=8, group_size=16),
    "weights4_rows": lambda student: quantize_linears(student, linears(student), bits=4, group_size=0),
    "weights3": lambda student: quantize_linears(student, linears(student), bits=3, group_size=16),
    "integers": lambda student: quantize_linears(student, linears(student), bits=8, group_size=0, act="int8"),
    "static integers": lambda student: quantize_linears(
        student, linears(student), bits=8, group_size=0, act="int8_static"
    ),
    "integers4": lambda student: quantize_linears(student, linears(student), bits=4, group_size=16, act="int8"),
    "table8": lambda student: _table(student, 8),
    "table4": lambda student: _table(student, 4),
}


def _weights(path: Path) -> int:
    return sum(v.const_value.nbytes for v in ir.load(path).graph.initializers.values() if v.const_value is not None)


def _assert_predicted(student: Student, folder: Path, **options: Any) -> None:
    export = OnnxExport(**FAST | {"texts": 8} | options)  # type: ignore[arg-type]
    found = predict_bytes(student.model, student.task)
    assert predict_bytes(on_meta(student.model), student.task) == found
    entry = export.write(student, folder)
    assert entry["predicted_bytes"] == found.size_bytes
    # Of a small table of positions, a file of one length holds the rows that it reads.
    places = 64 * 32 * 4 if export.length else 0
    assert abs(_weights(folder / MODEL_FILE) - found.weights) <= TOLERANCE * found.weights + CONSTANTS + places
    assert abs(entry["size_bytes"] - found.size_bytes) <= found.allowance()


@pytest.mark.parametrize("task", ["feature-extraction", "text-generation"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_tensors_of_every_kind_of_layer_are_foretold(tmp_path: Path, task: str, change: str) -> None:
    student = make_student(task)
    CHANGES[change](student)
    _assert_predicted(student, tmp_path / "onnx")


@pytest.mark.parametrize("family", sorted({*FAMILIES, *OTHERS} - {"bert", "llama"}))
def test_the_tensors_of_every_family_are_foretold(tmp_path: Path, family: str) -> None:
    _assert_predicted(tiny_student(family), tmp_path / "onnx")


@pytest.mark.parametrize("options", [{"target": "standard"}, {"batch": 1, "length": 16}, {"length": 8}])
def test_other_forms_of_the_file_are_foretold(tmp_path: Path, options: dict[str, Any]) -> None:
    student = make_student("feature-extraction")
    quantize_linears(student, linears(student), bits=4, group_size=16)
    _assert_predicted(student, tmp_path / "onnx", **options)


def test_a_pooler_that_no_answer_needs_does_not_count() -> None:
    bert = tiny("bert")
    pooler = sum(p.numel() for p in bert.pooler.parameters()) * 4  # type: ignore[union-attr]
    whole = predict_bytes(bert, "feature-extraction").weights
    bert.pooler = None  # type: ignore[assignment]
    assert predict_bytes(bert, "feature-extraction").weights == whole
    assert pooler == 4 * 32 * 33


def test_predicting_leaves_the_model_as_it_was_and_copies_no_weight() -> None:
    student = make_student("text-generation")
    _table(student, 8)
    before = {name: tensor.data_ptr() for name, tensor in student.model.state_dict().items()}
    twin = on_meta(student.model)
    assert {tensor.device.type for tensor in twin.state_dict().values()} == {"meta"}
    predict_bytes(student.model, student.task)
    assert {name: tensor.data_ptr() for name, tensor in student.model.state_dict().items()} == before
    assert not any(module._forward_hooks for module in student.model.modules())
    assert torch.is_grad_enabled()


def test_a_file_that_is_three_per_cent_off_is_refused_by_name() -> None:
    prediction = Prediction(weights=100_000_000, graph=100_000)
    judge_bytes(prediction, 102_900_000, tolerance=TOLERANCE, where="onnx")
    with pytest.raises(RunFailedError, match="4,900,000 larger than the student's shapes say") as error:
        judge_bytes(prediction, 105_000_000, tolerance=TOLERANCE, where="onnx")
    assert "max_size_error" in str(error.value.fix)
    judge_bytes(prediction, 105_000_000, tolerance=0.06, where="onnx")
    with pytest.raises(RunFailedError, match="smaller"):
        judge_bytes(prediction, 95_000_000, tolerance=TOLERANCE, where="onnx")


def test_an_export_with_a_stowaway_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, trace = make_student("feature-extraction"), exporter.trace

    def with_stowaway(*args: Any, **options: Any) -> ir.Model:
        graph = trace(*args, **options)
        extra = ir.Value(name="extra", const_value=ir.tensor(torch.zeros(200, 300).numpy(), name="extra"))
        graph.graph.register_initializer(extra)
        return graph

    monkeypatch.setattr(exporter, "trace", with_stowaway)
    with pytest.raises(RunFailedError, match="larger than the student's shapes say"):
        OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_check_foretells_the_bytes_that_the_report_repeats(
    tiny_bert_folder: Path, tiny_data: dict[str, object], tmp_path: Path
) -> None:
    said: dict[str, Any] = {
        "model": str(tiny_bert_folder),
        "task": "feature-extraction",
        "data": tiny_data,
        "evaluate": "never",
        "passes": [{"kind": "prune_width", "keep": {"ffn": 0.5}}, {"kind": "quantize", "bits": 8, "group_size": 16}],
        "export": [{"kind": "onnx", "baselines": False, "rounds": 3, "threads": 1, "texts": 8}],
    }
    recipe = parse_recipe(said)
    (foretold,) = foretell(recipe, find_model(tiny_bert_folder), "feature-extraction").export_bytes
    (entry,) = compresskit.run(recipe, tmp_path / "out")["export"]
    assert entry["predicted_bytes"] == foretold
    model, _ = compresskit.load(tmp_path / "out")
    assert OnnxExport().predict_bytes(model, "feature-extraction") == foretold
