"""Constants of a graph."""

import numpy as np
import onnx_ir as ir
import pytest

from compresskit.export.constants import add_initializer, drop_unused_initializers, read_constant


@pytest.fixture
def graph():
    return ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="empty")


def test_a_constant_is_added_once(graph):
    widths = np.array([32, 32])
    added = add_initializer(graph, "widths", widths)
    assert add_initializer(graph, "widths", widths.copy()) is added
    name, array = read_constant(added)
    assert name == "widths"
    np.testing.assert_array_equal(array, widths)


@pytest.mark.parametrize("other", [np.array([16, 48]), np.array([32]), np.array([32, 32], np.float32)])
def test_a_name_that_another_constant_has_is_refused(graph, other):
    add_initializer(graph, "widths", np.array([32, 32]))
    with pytest.raises(ValueError, match="the graph has another constant 'widths'"):
        add_initializer(graph, "widths", other)


def test_a_single_number_stays_one(graph):
    value = add_initializer(graph, "scale", np.array(0.5, np.float32))
    assert value.shape == ir.Shape([])
    assert read_constant(value)[1].shape == ()


def test_what_no_node_reads_goes(graph):
    kept = add_initializer(graph, "kept", np.ones(2, np.float32))
    add_initializer(graph, "idle", np.zeros(2, np.float32))
    graph.append(ir.node("Relu", [kept]))
    drop_unused_initializers(graph)
    assert list(graph.initializers) == ["kept"]
