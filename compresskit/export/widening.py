"""4-bit weights of integer products, spelt out in ONNX's own operators.

    WidenCodes(codes, factors, zeros)   →   Transpose(Reshape(Cast((codes − zeros) · factors, int8)))

All of it hangs on constants, so ONNX Runtime computes it once, when it loads the file: on the disk a weight has 4 bits,
in memory 8, and the product is that of any 8-bit layer. Where its optimisations are off it is computed at every call.
Needs operator set 21, which brought 4-bit numbers to Cast.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from compresskit.errors import CompressKitError
from compresskit.export.constants import add_initializer, drop_unused_initializers, read_constant
from compresskit.export.standard import IR_VERSION, OPSET
from compresskit.layers import grid
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.operators import WIDENING

# O rows, G groups of a row, S columns of a group


def least_opset(model: nn.Module) -> int | None:
    """The operator set that a model's 4-bit integer products need; None where it has none."""
    narrow = (isinstance(layer, Int8Linear) and layer.bits == 4 for layer in model.modules())
    return OPSET if any(narrow) else None


def refuse_opset(model: nn.Module, opset: int | None) -> None:
    """Refuse an operator set that cannot hold a model's 4-bit integer products.

    Raises:
        CompressKitError: it is older than theirs.
    """
    least = least_opset(model)
    if opset and least and opset < least:
        what = f"4-bit weights under int8 activations need opset {least} or later, not {opset}"
        raise CompressKitError(what, where="opset", fix=f"leave opset out, or say opset: {least}")


def spell_out_codes(model: ir.Model) -> None:
    """Every WidenCodes becomes what it stands for, in place; the same numbers are held in ONNX's 4-bit type."""
    found = [node for node in model.graph if (node.domain, node.op_type) == WIDENING]
    if not found:
        return
    for node in found:
        _spell_out(model.graph, node)
    RemoveUnusedNodesPass()(model)
    drop_unused_initializers(model.graph)
    del model.opset_imports[WIDENING[0]]
    model.ir_version = max(model.ir_version or 0, IR_VERSION)


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    packed, factors, zeros = [*node.inputs, None][:3]
    columns, size = (node.attributes.get_int(name, 0) for name in ("columns", "group_size"))
    rows, groups, _ = read_constant(packed)[1].shape
    old = node.outputs[0]
    nodes: list[ir.Node] = []

    def emit(op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes or None))
        return nodes[-1].outputs[0]

    def decoded(source: ir.Value | None, count: int, per_group: int) -> ir.Value:
        """Packed numbers of each row, or of each group, as float (O, G, `per_group`)."""
        own, array = read_constant(source)
        numbers = grid.unpack(torch.from_numpy(array.copy()), count, bits=4).numpy().astype(ml_dtypes.uint4)
        shape = (rows, groups, per_group)  # equal bytes may be shared by layers of other shapes
        name = f"{own}.{'x'.join(map(str, shape))}"
        held = add_initializer(graph, name, numbers.reshape(shape), ir.DataType.UINT4)
        return emit("Cast", held, to=ir.DataType.FLOAT)

    def constant(what: str, *values: int, dtype: type = np.int64) -> ir.Value:
        array = np.array(values, dtype)
        return add_initializer(graph, f"{old.name}.{what}", array)

    middle = constant("middle", 8, dtype=np.float32) if zeros is None else decoded(zeros, groups, 1)
    steps = emit("Mul", emit("Sub", decoded(packed, size, size), middle), decoded(factors, groups, 1))
    whole = emit("Reshape", emit("Cast", steps, to=ir.DataType.INT8), constant("shape", rows, groups * size))
    if groups * size > columns:
        whole = emit(
            "Slice", whole, *(constant(what, at) for what, at in (("first", 0), ("last", columns), ("axis", 1)))
        )
    matrix = emit("Transpose", whole, perm=[1, 0])
    graph.insert_before(node, nodes)
    matrix.shape, matrix.type, matrix.name = old.shape, old.type, f"{old.name}.int8"
    old.replace_all_uses_with(matrix)
    graph.remove(node, safe=True)
