"""Float weights that a file holds where integers are promised.

    W (float32) → QuantizeLinear → DequantizeLinear → MatMul      rounded as if small, stored whole; refused
    codes → MatMulNBits, and W beside it                          one layer twice; refused

Tools that simulate quantisation write such files, and folding of constants can make them: the answers are right, and
nothing else is.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compresskit.errors import RunFailedError
from compresskit.export.folder import integer_layers

#: Scales, biases and norms are smaller, or do not matter.
_LEAST_ELEMENTS = 1024
_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
#: What only looks at a weight in another way.
_VIEWS = frozenset({"Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze"})
# Rounding to 3 bits moves a weight by a fifth of its norm, another layer's weight differs by more than the norm.
_SAME_WEIGHT = 0.5


def _float_weight(value: ir.Value | None) -> ir.Value | None:
    """The large float initializer that `value` is or is a view of."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _VIEWS:
            return None
        value = node.inputs[0]
    if value is None or value.const_value is None or value.dtype is None:
        return None
    return value if value.dtype.is_floating_point() and value.const_value.size >= _LEAST_ELEMENTS else None


def rounded_floats(graph: ir.Model) -> dict[str, str]:
    """Names of float weights that the graph rounds when it runs, and the operator that does."""
    found: dict[str, str] = {}
    for node in graph.graph.all_nodes():
        weight = _float_weight(node.inputs[0]) if node.op_type in _ROUNDING else None
        if weight is not None:
            found[str(weight.name)] = node.op_type
    return found


def _as(shape: torch.Size, array: np.ndarray) -> Iterator[Tensor]:
    """An array as it is and turned, where that has the shape."""
    for one in (array, array.T):
        if one.shape == tuple(shape):
            yield torch.from_numpy(np.array(one))  # what a file holds is read only


def doubled_floats(graph: ir.Model, model: nn.Module) -> dict[str, str]:
    """Names of float weights in the file that stand for the weight of an integer layer, and the layer's name.

    Those that the student holds as float too (a table whose untied head alone is in integers) are none of them.

    Args:
        graph: of `model`.
        model: the student.
    """
    coded: Mapping[str, nn.Module] = {name: model.get_submodule(name) for name in integer_layers(model)}
    by_size: dict[int, list[str]] = {}
    for name, layer in coded.items():
        sides = (
            ("out_features", "in_features") if hasattr(layer, "out_features") else ("num_embeddings", "embedding_dim")
        )
        by_size.setdefault(int(np.prod([getattr(layer, side) for side in sides])), []).append(name)
    found: dict[str, str] = {}
    for value in graph.graph.initializers.values():
        if _float_weight(value) is None or value.const_value is None or value.const_value.size not in by_size:
            continue
        array = value.const_value.numpy()
        own = (p for p in model.parameters() if p.numel() == array.size)
        if any(torch.equal(p, view) for p in own for view in _as(p.shape, array)):
            continue
        for name in by_size[array.size]:
            weight = coded[name].dequantize()  # pyright: ignore[reportCallIssue]
            if any((view - weight).norm() < _SAME_WEIGHT * weight.norm() for view in _as(weight.shape, array)):
                found[str(value.name)] = name
    return found


def refuse_hidden_floats(graph: ir.Model, model: nn.Module, *, where: str) -> None:
    """Accept a graph whose integer weights are stored as integers alone.

    Raises:
        RunFailedError: a float weight that is only rounded when it is read, or that lies beside its own integers.
    """
    wrong = {name: f"{name} is stored as float and rounded by {by} alone" for name, by in rounded_floats(graph).items()}
    for name, layer in doubled_floats(graph, model).items():
        wrong.setdefault(name, f"{name} is the float weight of {layer}, which the student holds as integers")
    if wrong:
        values = (graph.graph.initializers[name].const_value for name in wrong)
        count = sum(value.nbytes for value in values if value is not None)
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RunFailedError(
            f"{next(iter(wrong.values()))}{more}: {count:,} bytes that a file of integers must not hold",
            where=where,
            fix="try 'fuse: false', or another opset; else report it together with the recipe",
        )
