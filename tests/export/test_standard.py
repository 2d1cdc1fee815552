"""The same integers in both forms of file, for every width, symmetry and group size."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from changed_students import quantised_student
from families import tiny
from onnx import numpy_helper

from compresskit.errors import CompressKitError
from compresskit.export import OnnxExport
from compresskit.export.folder import MODEL_FILE
from compresskit.export.standard import use_standard_operators
from compresskit.layers.grid import quantize_weight, unpack
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.passes.bitsandbytes import BitsAndBytes
from compresskit.passes.low_rank_correction import LowRankCorrection
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.edits import replay

Exported = tuple[Student, str, Path, dict[str, Any]]
FAST: dict[str, Any] = {"baselines": False, "rounds": 3, "threads": 1, "texts": 16}
#: Every width and group size, one for each of the nine linears of a block and a half.
OVERRIDES = {
    "*.0.*query": {"bits": 3, "group_size": 16},
    "*.0.*key": {"bits": 3, "group_size": 32},
    "*.0.*value": {"bits": 3, "group_size": "channel"},
    "*.0.attention.output*": {"bits": 4, "group_size": 16},
    "*.0.intermediate*": {"bits": 4, "group_size": 32},
    "*.0.output*": {"bits": 4, "group_size": "channel"},
    "*.1.*query": {"bits": 8, "group_size": 16},
    "*.1.*key": {"bits": 8, "group_size": 32},
    "*.1.*value": {"bits": 8, "group_size": "channel"},
}


@pytest.fixture(scope="module", params=[(s, t) for s in (False, True) for t in ("ort", "standard")], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A BERT of every grid, symmetric or not, in one form of file; read only."""
    symmetric, target = request.param
    student = quantised_student("bert", symmetric=symmetric, group_size=16, overrides=OVERRIDES)
    folder = tmp_path_factory.mktemp("grids") / "onnx"
    return student, target, folder, OnnxExport(target=target, accuracy_level=0, **FAST).write(student, folder)


def _nodes(folder: Path, *kinds: str) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    graph = onnx.load(str(folder / MODEL_FILE)).graph
    return [node for node in graph.node if node.op_type in kinds], {one.name: one for one in graph.initializer}


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(one.i for one in node.attribute if one.name == name)


def _weights_of_ort(folder: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Integers (code − middle, or code), scales and zeros of every layer; one product may stand for several."""
    nodes, stored = _nodes(folder, "MatMulNBits")
    splits = {node.input[0]: numpy_helper.to_array(stored[node.input[1]]) for node in _nodes(folder, "Split")[0]}
    found = []
    for node in nodes:
        bits, columns = _attribute(node, "bits"), _attribute(node, "K")
        codes, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        codes = unpack(torch.from_numpy(codes.copy()).flatten(1), columns, bits=bits).numpy().astype(int)
        zeros = None
        if len(node.input) > 3 and node.input[3]:
            packed = torch.from_numpy(numpy_helper.to_array(stored[node.input[3]]).copy())
            zeros = unpack(packed, scales.shape[1], bits=bits).numpy().astype(int)
        ends = np.cumsum(splits.get(node.output[0], [len(codes)]))[:-1]
        parts = [np.split(one, ends) for one in (codes, scales)]
        joined = [None] * (len(ends) + 1) if zeros is None else np.split(zeros, ends)
        for own, scale, zero in zip(*parts, joined, strict=True):
            found.append((own if zero is not None else own - 2 ** (bits - 1), scale, zero))
    return found


def _weights_of_standard(folder: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    nodes, stored = _nodes(folder, "DequantizeLinear")
    found = []
    for node in nodes:
        if node.input[0] in stored and _attribute(node, "axis") == 0:
            arrays = [numpy_helper.to_array(stored[name]).T for name in node.input]
            found.append((arrays[0].astype(int), arrays[1], arrays[2].astype(int) if len(arrays) > 2 else None))
    return found


def _assert_equal(student: Student, found: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> None:
    """Every integer layer of the student is in the file, bit for bit; channel scales may be repeated in blocks."""
    layers = [layer for name, layer in student.model.named_modules() if isinstance(layer, QuantLinear)]
    layers = [layer for layer in layers if layer is not getattr(getattr(student.model, "pooler", None), "dense", None)]
    assert len(layers) == len(found) > 0
    for layer in layers:
        values = layer.values()
        codes = values.codes.numpy().astype(int)
        if values.zeros is None:
            codes = codes - 2 ** (layer.bits - 1)
        same = [one for one in found if one[0].shape == codes.shape and np.array_equal(one[0], codes)]
        assert same, layer
        _, scales, zeros = same[0]
        blocks = scales.shape[1] // layer.groups
        assert np.array_equal(scales, values.scales.numpy().repeat(blocks, 1))
        assert (zeros is None) == (values.zeros is None)
        if zeros is not None and values.zeros is not None:
            assert np.array_equal(zeros, values.zeros.numpy().astype(int).repeat(blocks, 1))


def test_integers_scales_and_zeros_of_the_file_are_the_students(exported: Exported) -> None:
    student, target, folder, entry = exported
    assert entry["parity"]["relative_error"] <= 1e-5
    _assert_equal(student, _weights_of_ort(folder) if target == "ort" else _weights_of_standard(folder))


def test_tracing_leaves_3_bit_layers_as_they_are(exported: Exported) -> None:
    layers = [layer for layer in exported[0].model.modules() if isinstance(layer, QuantLinear)]
    assert sum(layer.bits == 3 for layer in layers) == 3


def test_a_standard_file_has_no_operator_but_onnxs_own(exported: Exported) -> None:
    _, target, folder, entry = exported
    if target == "ort":
        assert "com.microsoft::MatMulNBits" in entry["operators"]
        return
    assert not [name for name in entry["operators"] if "::" in name]
    opsets = onnx.load(str(folder / MODEL_FILE)).opset_import
    assert [one.domain for one in opsets] == [""]
    assert opsets[0].version >= 21


def test_a_file_holds_as_many_bytes_as_its_codes_scales_and_zeros(exported: Exported) -> None:
    """3-bit codes take up 4 bits; ONNX Runtime's form ends a row of zeros with a whole byte."""
    student, target, folder, _ = exported
    expected = 0.0
    for name, layer in student.model.named_modules():
        if isinstance(layer, QuantLinear) and "pooler" not in name:
            bits = max(layer.bits, 4)
            zeros = layer.groups * bits / 8
            expected += layer.out_features * (layer.in_features * bits / 8 + 4 * layer.groups)
            expected += 0 if layer.symmetric else layer.out_features * (math.ceil(zeros) if target == "ort" else zeros)
    stored = [one for one in onnx.load(str(folder / MODEL_FILE)).graph.initializer if one.name.startswith("encoder.")]
    assert sum(_bytes(one) for one in stored if {"codes", "scales", "zeros"} & set(one.name.split("."))) == expected


def _bytes(tensor: onnx.TensorProto) -> float:
    halved = tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
    return numpy_helper.to_array(tensor).size * 0.5 if halved else numpy_helper.to_array(tensor).nbytes


@pytest.mark.parametrize(
    ("family", "bits", "symmetric"), [("llama", 4, None), ("llama", 8, None), ("qwen3", 4, True), ("qwen3", 8, False)]
)
def test_tables_and_heads_of_a_standard_file_are_the_students(family, bits, symmetric, tmp_path):
    student = quantised_student(family, bits=bits, symmetric=symmetric, group_size=16, embeddings=bits)
    entry = OnnxExport(target="standard", **FAST).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] <= 1e-5
    assert not [name for name in entry["operators"] if "::" in name]
    table = student.model.get_input_embeddings()
    assert isinstance(table, QuantEmbedding)
    stored = [numpy_helper.to_array(one) for one in onnx.load(str(tmp_path / "onnx" / MODEL_FILE)).graph.initializer]
    codes = unpack(table.codes, table.embedding_dim, bits=bits).numpy().astype(int)
    wanted = codes if table.zeros is not None else codes - 2 ** (bits - 1)
    integers = [one.astype(int) for one in stored if one.dtype not in (np.float32, np.int64)]
    # A tied head reads the table: its integers are in the file once.
    assert sum(one.shape == wanted.shape and np.array_equal(one, wanted) for one in integers) == 1


def test_columns_that_are_padded_are_padded_nowhere_in_the_file(tmp_path):
    student = quantised_student("bert", bits=4, group_size=64, on_misfit="pad")
    assert 32 in {layer.in_features for layer in student.model.modules() if isinstance(layer, QuantLinear)}
    for target in ("ort", "standard"):
        entry = OnnxExport(target=target, accuracy_level=0, **FAST).write(student, tmp_path / target)
        assert entry["parity"]["relative_error"] <= 1e-5
    _assert_equal(student, _weights_of_ort(tmp_path / "ort"))
    _assert_equal(student, _weights_of_standard(tmp_path / "standard"))


def test_a_standard_file_is_proven_exactly_and_told_as_sessions_run_it(tmp_path):
    student = quantised_student("bert", bits=8, group_size=16)
    entry = OnnxExport(target="standard", **FAST).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] <= 1e-5 < entry["parity"]["shipped"]["relative_error"]


@pytest.mark.parametrize("act", ["int8", "int8_static"])
def test_integer_activations_and_old_operator_sets_have_no_standard_form(tmp_path, act):
    student = quantised_student("bert", bits=8, group_size="channel", act=act)
    with pytest.raises(CompressKitError, match=r"MatMulIntegerToFloat \(.*\) belong to ONNX Runtime"):
        OnnxExport(target="standard", **FAST).write(student, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    for cache, least in ((True, 23), (False, 21)):
        with pytest.raises(ValueError, match=f"needs opset 21 or later.*; leave opset out, or say opset: {least}"):
            OnnxExport(target="standard", opset=20, cache=cache)
        OnnxExport(target="standard", opset=least, cache=cache)


@pytest.mark.parametrize(
    ("step", "operator"),
    [
        (Quantize(bits=8, group_size="channel", act="int8"), "MatMulIntegerToFloat"),
        (BitsAndBytes(on_misfit="keep"), "MatMulBnb4"),
    ],
)
def test_check_refuses_layers_without_a_standard_form_before_anything_is_computed(step, operator):
    planned = tiny("bert").to("meta")
    replay(step.plan(planned), planned)
    OnnxExport().check(planned, "feature-extraction")
    with pytest.raises(CompressKitError, match=f"{operator} .* belong to ONNX Runtime") as caught:
        OnnxExport(target="standard").check(planned, "feature-extraction")
    assert caught.value.where == "target"
    assert "encoder.layer.0." in str(caught.value)


def test_llm_int8_and_corrected_layers_have_a_standard_form():
    for steps in ([BitsAndBytes(format="int8")], [Quantize(bits=4, group_size=16), LowRankCorrection(rank=2)]):
        planned = tiny("bert").to("meta")
        for step in steps:
            edits = step.plan(planned)
            assert edits
            replay(edits, planned)
        OnnxExport(target="standard").check(planned, "feature-extraction")


def test_a_graph_with_an_operator_of_onnx_runtime_is_refused():
    """The same rule, of what no layer of ours brought."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=floats, shape=ir.Shape(["n", 4]))
    node = ir.node("Gelu", [x], domain="com.microsoft")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21, "com.microsoft": 1})
    with pytest.raises(CompressKitError, match=r"com\.microsoft::Gelu belong to ONNX Runtime"):
        use_standard_operators(ir.Model(graph, ir_version=10))


def test_scales_of_rows_are_read_where_the_exporter_left_them_to_be_repeated():
    """Of large layers it folds no constants: Mul and Expand stand before the product."""
    layer = QuantLinear(48, 24, bits=4, group_size=0, bias=False)
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    layer.set_codes(quantize_weight(weight, bits=4, group_size=0))
    codes, scales, zeros = (one.numpy() for one in layer.tensors() if one is not None)
    constants = {"codes": codes, "scales": scales, "zeros": zeros, "twice": np.array([17], np.uint8)}
    constants |= {"blocks": np.array([24, 3]), "pairs": np.array([24, 2])}
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    product = {"K": 48, "N": 24, "bits": 4, "block_size": 16, "accuracy_level": 0, "domain": "com.microsoft"}
    nodes = [
        helper.make_node("Expand", ["scales", "blocks"], ["s"]),
        helper.make_node("Mul", ["zeros", "twice"], ["both"]),
        helper.make_node("Expand", ["both", "pairs"], ["z"]),
        helper.make_node("MatMulNBits", ["x", "codes", "s", "z"], ["y"], **product),
    ]
    ends = [helper.make_tensor_value_info(name, floats, ["n", width]) for name, width in (("x", 48), ("y", 24))]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    use_standard_operators(model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], layer(x).numpy(), atol=1e-5)
    assert {node.op_type for node in model.graph} == {"DequantizeLinear", "MatMul"}
