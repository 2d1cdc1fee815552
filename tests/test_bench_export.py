"""The bench of exported files: what stands beside them, and what it says where a peer is not installed."""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tool_modules import loaded_tool


@pytest.fixture(scope="module")
def peers():
    with loaded_tool("methods_openvino") as module:
        yield module


@pytest.fixture(scope="module")
def bench(peers):
    with loaded_tool("bench_export") as module:
        yield module


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return bench.Run(bench.quick_run(folder), folder / "baselines")


def asked(**options):
    given = {"threads": 1, "rounds": 3, "openvino": True, "operators": False, "spin": False}
    return argparse.Namespace(**given | options)


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(bench, run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = list(bench.measure(run, asked()))
    assert [row["method"] for row in rows] == ["float", "stock-int8", "student", "openvino-int8", "openvino-int4"]
    for row in rows[:3]:
        assert row["size_bytes"] > 0
        assert row["peak_rss_bytes"] > row["size_bytes"]
        assert "refused" not in row
    for row in rows[3:]:
        assert row["refused"] == "not installed: openvino, nncf"


@pytest.mark.filterwarnings("default")
def test_openvino_reads_the_original_in_integers(bench, run):
    pytest.importorskip("nncf")
    rows = {row["method"]: row for row in bench.measure(run, asked(spin=True))}
    assert list(rows) == ["float", "stock-int8", "student", "openvino-int8", "openvino-int4"]
    for method in ("openvino-int8", "openvino-int4"):
        assert rows[method]["size_bytes"] < 0.5 * rows["float"]["size_bytes"]
        assert rows[method]["perplexity"] == pytest.approx(rows["float"]["perplexity"], rel=0.1)
        assert rows[method]["latency"].keys() == rows["float"]["latency"].keys()


def test_operators_are_timed_by_shape(bench, run):
    rows = {row["method"]: row for row in bench.measure(run, asked(openvino=False, operators=True))}
    held = {
        "float": {"MatMul"},
        "stock-int8": {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"},
        "student": {"MatMulNBits"},
    }
    for method, products in held.items():
        assert rows[method]["operators_ms"].keys() == rows[method]["latency"].keys()
        for taken in rows[method]["operators_ms"].values():
            assert products & taken.keys()
            assert all(0 < ms < 1e4 for ms in taken.values())


def test_openvinos_operators_are_timed(peers, bench, tmp_path):
    openvino = pytest.importorskip("openvino")
    write_product(tmp_path / "product.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "product.onnx"), tmp_path / "product.xml")
    taken = bench.operator_ms(tmp_path / "product.xml", {"x": np.ones((2, 4), np.float32)}, 1, 3, spin=False)
    assert any("FullyConnected" in name or "MatMul" in name for name in taken)


def test_encoders_are_compared_with_static_int8_alone(peers):
    assert peers.openvino_methods("feature-extraction") == (peers.INT8,)
    assert peers.openvino_methods("text-generation") == (peers.INT8, peers.INT4)


def write_product(path: Path) -> None:
    """y = x W with a free first axis."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_an_openvino_model_is_asked_as_a_session_is(peers, tmp_path):
    openvino = pytest.importorskip("openvino")
    write_product(tmp_path / "product.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "product.onnx"), tmp_path / "product.xml")
    ours = peers.OpenVinoSession(tmp_path / "product.xml", threads=1)
    theirs = ort.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in ours.get_inputs()] == ["x"]
    assert ours.get_inputs()[0].shape == [None, 4]
    for rows in (2, 5):
        feed = {"x": np.ones((rows, 4), np.float32)}
        (got,), (expected,) = ours.run(["y"], feed), theirs.run(["y"], feed)
        np.testing.assert_allclose(got, expected, rtol=1e-2)  # the file holds the weight in float16
        assert ours.run(None, feed)[0].shape == (rows, 3)
    size = peers.openvino_bytes(tmp_path / "product.xml")
    assert size == sum((tmp_path / f"product.{suffix}").stat().st_size for suffix in ("xml", "bin"))
