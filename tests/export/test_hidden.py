"""A file that promises integers holds integers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from changed_students import FAST, linears, make_student, quantize_linears
from torch import nn

from compresskit.errors import RunFailedError
from compresskit.export import OnnxExport
from compresskit.export import onnx as exporter
from compresskit.export.folder import MODEL_FILE
from compresskit.export.hidden import doubled_floats, refuse_hidden_floats, rounded_floats
from compresskit.layers.quant_linear import QuantLinear
from compresskit.student import Student

LAYER = "encoder.layer.0.intermediate.dense"


@pytest.fixture
def student() -> Student:
    student = make_student("feature-extraction")
    quantize_linears(student, linears(student), bits=4, group_size=16)
    return student


def _initializer(graph: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.graph.register_initializer(value)
    return value


def _weight(student: Student) -> np.ndarray:
    layer = student.model.get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    return layer.dequantize().numpy()


def _product(graph: ir.Model) -> ir.Node:
    return next(n for n in graph.graph if n.op_type == "MatMulNBits" and str(n.inputs[1].name).startswith(LAYER))  # type: ignore[union-attr]


def _simulate(graph: ir.Model, student: Student) -> None:
    """The layer as tools that simulate quantisation write it: its float weight, rounded at every call."""
    node = _product(graph)
    weight = _initializer(graph, f"{LAYER}.weight", _weight(student))
    grid = [_initializer(graph, "step", np.float32(0.01)), _initializer(graph, "middle", np.int8(0))]
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
    codes = ir.node("QuantizeLinear", [turned.outputs[0], *grid])
    again = ir.node("DequantizeLinear", [codes.outputs[0], *grid])
    product = ir.node("MatMul", [node.inputs[0], again.outputs[0]])
    for new in (turned, codes, again, product):
        graph.graph.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(product.outputs[0])
    graph.graph.remove(node, safe=True)


def _double(graph: ir.Model, student: Student) -> None:
    """The layer multiplies by a float copy of its weight, turned, under a name that says nothing."""
    node = _product(graph)
    weight = _initializer(graph, "val_77", np.ascontiguousarray(_weight(student).T))
    product = ir.node("MatMul", [node.inputs[0], weight])
    graph.graph.insert_before(node, product)
    node.outputs[0].replace_all_uses_with(product.outputs[0])


PLANTED: dict[str, tuple[Callable[[ir.Model, Student], None], str]] = {
    "simulated": (_simulate, rf"{LAYER}\.weight is stored as float and rounded by QuantizeLinear alone: 8,192 bytes"),
    "doubled": (_double, rf"val_77 is the float weight of {LAYER}, which the student holds as integers: 8,192 bytes"),
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_float_weight_is_fatal_names_its_layer_and_leaves_no_file(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    plant, message = PLANTED[how]
    trace = exporter.trace

    def planted(*args: Any, **options: Any) -> ir.Model:
        graph = trace(*args, **options)
        plant(graph, student)
        return graph

    monkeypatch.setattr(exporter, "trace", planted)
    with pytest.raises(RunFailedError, match=message) as error:
        OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    assert error.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["ort", "standard"])
def test_a_files_own_float_weights_are_no_fault(student: Student, tmp_path: Path, target: str) -> None:
    """Integers beside float layers of the same shape; an embedding in float; blocks that are decoded when read."""
    fresh = make_student("feature-extraction")
    quantize_linears(fresh, linears(fresh)[:1], bits=8, group_size=16)
    for index, one in enumerate((student, fresh)):
        OnnxExport(**FAST | {"target": target}).write(one, tmp_path / str(index))  # type: ignore[arg-type]
        graph = ir.load(tmp_path / str(index) / MODEL_FILE)
        assert rounded_floats(graph) == doubled_floats(graph, one.model) == {}


def test_a_float_weight_that_the_student_holds_too_is_no_fault(student: Student, tmp_path: Path) -> None:
    """A table in float, say, whose untied head alone is in integers."""
    OnnxExport(**FAST).write(student, tmp_path / "onnx")  # type: ignore[arg-type]
    graph = ir.load(tmp_path / "onnx" / MODEL_FILE)
    weight = _weight(student)
    _initializer(graph, "table", weight)
    with pytest.raises(RunFailedError, match=f"table is the float weight of {LAYER}"):
        refuse_hidden_floats(graph, student.model, where="onnx")
    student.model.register_parameter("table", nn.Parameter(torch.from_numpy(weight)))
    refuse_hidden_floats(graph, student.model, where="onnx")
