"""Rewrites of an exported graph into the operators that ONNX Runtime runs fastest on a CPU. None changes an integer.

    reshapes      (b, s, h·d) → (b, s, h, d) → (b, s, h·d)                  becomes   nothing
    residuals     LayerNormalization(Add(x, y))                             becomes   LayerNormalization(Sum(x, y))
    products      MatMulNBits(x, A), MatMulNBits(x, B)                      becomes   Split(MatMulNBits(x, [A, B]))
    roundings     two DynamicQuantizeLinear(x)                              becomes   one
    tied tables   a second, transposed or reshaped copy of a weight         becomes   Transpose or Reshape of the first

Each MatMulNBits rounds its input for itself and wakes the threads, so one for queries, keys and values is faster than
three. The residuals are no taste: ONNX Runtime turns an Add before a LayerNormalization into SkipLayerNormalization,
whose CPU kernel takes about three times as long for one short text as the two nodes do. It leaves a Sum alone.
"""

import ast
from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)

from compresskit.export.constants import add_initializer, read_constant

#: Where MatMulNBits takes the order of its columns, counted from its weight.
_ORDER = 3
#: Where torch's exporter says which module emitted a node: a list of names, outermost first, the operator's last.
_SCOPES = "pkg.torch.onnx.name_scopes"
#: Between the name of a layer and which run of it a product is.
_AGAIN = "#"
# Smaller constants are not worth a node.
_SHARED_ELEMENTS = 1024


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _replace_node(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `node`, whose first output it takes over."""
    old, out = node.outputs[0], new.outputs[0]
    out.shape, out.type = old.shape, old.type
    graph.insert_before(node, new)
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        out.name = name


def drop_reshape_pairs(model: ir.Model) -> None:
    """Reshapes that lead back to the shape they started from are read past."""
    for node in _nodes(model, "Reshape"):
        first = node.inputs[0].producer() if node.inputs[0] is not None else None
        if first is None or first.op_type != "Reshape":
            continue
        source, end = first.inputs[0], node.outputs[0]
        if source is None or source.shape is None or source.shape != end.shape or end.is_graph_output():
            continue
        end.replace_all_uses_with(source)
    RemoveUnusedNodesPass()(model)


def join_sums(model: ir.Model) -> None:
    """LayerNormalization reads a Sum where it read an Add (or Adds of Adds, in their order)."""
    for norm in _nodes(model, "LayerNormalization"):
        add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if add is None or add.op_type != "Add" or add.domain:
            continue
        terms = list(add.inputs)
        while (inner := terms[0].producer() if terms[0] is not None else None) is not None:
            if inner.op_type != "Add" or inner.domain or not _only_use(inner.outputs[0]):
                break
            terms[:1] = inner.inputs
        _replace_node(model.graph, add, ir.node("Sum", terms))
    RemoveUnusedNodesPass()(model)


def split_skip_norms(model: ir.Model) -> None:
    """SkipLayerNormalization becomes the Sum and LayerNormalization that it fused, where only its result is read."""
    for node in _nodes(model, "SkipLayerNormalization"):
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            continue
        x, skip, gamma, *rest = node.inputs
        beta, bias = [*rest, None, None][:2]
        total = ir.node("Sum", [x, skip] if bias is None else [x, bias, skip])
        total.outputs[0].shape, total.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, total)
        epsilon = node.attributes.get_float("epsilon", 1e-12)
        norm = ir.node("LayerNormalization", [total.outputs[0], gamma, beta], {"axis": -1, "epsilon": epsilon})
        _replace_node(model.graph, node, norm)


def set_accuracy(model: ir.Model, level: int) -> int:
    """Give every MatMulNBits this accuracy level, and say how many there are."""
    nodes = _nodes(model, "MatMulNBits")
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return len(nodes)


def join_products(model: ir.Model) -> None:
    """Products of one input with integers of one form become one, whose result is split.

    The names of its codes, scales, zeros and bias are those of its parts, with + between them. A product that shares a
    weight, computes one (scales that a node expands) or orders its columns (g_idx) stays as it is.
    """
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in _nodes(model, "MatMulNBits"):
        form = tuple(sorted((name, one.value) for name, one in node.attributes.items() if name != "N"))
        weights = node.inputs[1:]
        own = all(one is None or (one.is_initializer() and _only_use(one)) for one in weights)
        orders = len(weights) > _ORDER and weights[_ORDER] is not None
        if own and not orders and not node.outputs[0].is_graph_output():
            kinds = tuple(None if one is None else (one.dtype, tuple(one.shape or ())[1:]) for one in weights)
            groups.setdefault((id(node.inputs[0]), form, kinds), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _join(model.graph, nodes)


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    widths = [node.attributes["N"].as_int() for node in nodes]
    inputs = [nodes[0].inputs[0]]
    for slot in range(1, len(nodes[0].inputs)):
        parts = [value for node in nodes if (value := node.inputs[slot]) is not None]
        name = "+".join(str(value.name) for value in parts)
        inputs.append(
            add_initializer(graph, name, np.concatenate([read_constant(one)[1] for one in parts])) if parts else None
        )
    attributes = [one for name, one in nodes[0].attributes.items() if name != "N"]
    product = ir.Node(
        nodes[0].domain, "MatMulNBits", inputs, [*attributes, ir.AttrInt64("N", sum(widths))], name=nodes[0].name
    )
    sizes = add_initializer(graph, f"{product.name}.widths", np.array(widths, np.int64))
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(nodes[0], [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.shape, part.type = old.shape, old.type
        old.replace_all_uses_with(part)
        constants = [value for value in node.inputs[1:] if value is not None]
        graph.remove(node, safe=True)
        for value in constants:
            del graph.initializers[str(value.name)]


def share_tables(model: ir.Model) -> None:
    """A weight that is another one, transposed or in another shape, becomes a node that reads the other.

    The exporters fold such views of tied weights into copies. ONNX Runtime folds them again when it loads the file.
    """
    graph = model.graph
    groups: dict[tuple[ir.DataType | None, int, int], list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is not None and value.const_value.size >= _SHARED_ELEMENTS:
            groups.setdefault((value.dtype, value.const_value.size, _bit_sum(read_constant(value)[1])), []).append(
                value
            )
    for values in groups.values():
        # What is looked up row by row stays as it is; products can read a view.
        values.sort(key=lambda value: not any("Gather" in user.op_type for user, _ in value.uses()))
        for index, value in enumerate(values):
            node = next((view for first in values[:index] if (view := _view(graph, first, value)) is not None), None)
            if node is not None:
                graph.insert_before(graph[0], node)
                value.replace_all_uses_with(node.outputs[0])
                del graph.initializers[str(value.name)]


def _bit_sum(array: np.ndarray) -> int:
    """The sum of the elements' bit patterns: equal for the same elements in any order, seldom for others."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return int(bits.sum(dtype=np.uint64))


def _view(graph: ir.Graph, first: ir.Value, second: ir.Value) -> ir.Node | None:
    """The node that makes `second` of `first`, if one Transpose or Reshape does."""
    if str(first.name) not in graph.initializers:
        return None
    source, wanted = read_constant(first)[1], read_constant(second)[1]
    if source.ndim == wanted.ndim == 2 and np.array_equal(source.T, wanted):
        node = ir.node("Transpose", [first], {"perm": [1, 0]})
    elif np.array_equal(source.reshape(-1), wanted.reshape(-1)):
        shape = add_initializer(graph, f"{second.name}.shape", np.array(wanted.shape, np.int64))
        node = ir.node("Reshape", [first, shape])
    else:
        return None
    node.outputs[0].shape, node.outputs[0].type = second.shape, second.type
    node.outputs[0].name = f"{second.name}.view"
    return node


def name_products(model: ir.Model) -> None:
    """Each integer product is called as the layer that emitted it, which its codes no longer tell once they are shared.

    A layer that runs several times has a number behind its name from the second time on: names of nodes are unique.
    """
    seen: Counter[str] = Counter()
    for node in _nodes(model, "MatMulIntegerToFloat"):
        *_, layer, _ = ast.literal_eval(node.metadata_props[_SCOPES])
        seen[layer] += 1
        node.name = layer if seen[layer] == 1 else f"{layer}{_AGAIN}{seen[layer]}"


def rounding_points(model: ir.Model) -> dict[str, str]:
    """For each layer that rounds its input to 8 bits, the name of the float value that the layer reads.

    Layers are told apart by the names of their products (`name_products`).
    """
    points: dict[str, str] = {}
    for node in (*_nodes(model, "DynamicQuantizeLinear"), *_nodes(model, "QuantizeLinear")):
        source = node.inputs[0]
        for user, slot in node.outputs[0].uses():
            if source is None or slot != 0:
                raise ValueError(f"{user.op_type} reads rounded values in an unexpected place")
            points[str(user.name).partition(_AGAIN)[0]] = str(_before_smoothing(source).name)
    return points


def _before_smoothing(value: ir.Value) -> ir.Value:
    """What a layer multiplied by its factors to get `value`; without factors `value` itself."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or len(node.inputs) != 2:
        return value
    source, factors = node.inputs
    return source if source is not None and str(getattr(factors, "name", "")).endswith(".smooth") else value


def join_integers(model: ir.Model) -> None:
    """Layers of one input share a product of integers, or the rounding of their activations."""
    join_products(model)
    if _nodes(model, "DynamicQuantizeLinear") or _nodes(model, "QuantizeLinear"):
        join_roundings(model)


def join_roundings(model: ir.Model) -> None:
    """Layers that read one input round it alike, each for itself, until equal constants and nodes are joined."""
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)


def fuse_encoder(model: ir.Model) -> None:
    """All rewrites for an encoder whose attention is one node."""
    join_roundings(model)
    drop_reshape_pairs(model)
    join_sums(model)


def prefer_sums(model: ir.Model) -> None:
    """The rewrites of residuals, after transformers' own fusions."""
    split_skip_norms(model)
    join_sums(model)
