"""Constants of a graph: read, added once by name, and dropped."""

import numpy as np
import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """An initializer, or the one that has this name already (a tied weight is written once).

    Raises:
        ValueError: that one holds something else.
    """
    dtype = ir.DataType.from_numpy(array.dtype) if dtype is None else dtype
    if name in graph.initializers:
        found = graph.initializers[name]
        if found.dtype != dtype or not np.array_equal(read_constant(found)[1], array):
            raise ValueError(f"the graph has another constant {name!r}, {found.dtype} {found.shape}")
        return found
    value = ir.Value(name=name, const_value=ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name))
    value.dtype, value.shape = dtype, ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def read_constant(value: ir.Value | None) -> tuple[str, np.ndarray]:
    """The initializer behind a value and its name, read through a tied head's view and a row's repeated scale."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Reshape", "Expand", "Mul"):
        (name, array), (_, other) = (read_constant(one) for one in node.inputs[:2])
        if node.op_type == "Reshape":
            return name, array.reshape(other)
        return name, np.broadcast_to(array, other) if node.op_type == "Expand" else array * other
    if value is None or value.const_value is None:
        raise ValueError("expected a constant")
    return str(value.name), value.const_value.numpy()


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove what no node reads any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
