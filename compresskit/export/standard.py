"""A graph of ONNX's own operators only: integer weights as blocked `DequantizeLinear`, which any runtime may read.

    MatMulNBits(x, codes, scales, zeros)       →  MatMul(x, DequantizeLinear(codesᵀ, scalesᵀ, zerosᵀ)) + bias
    GatherBlockQuantized(codes, ids, scales)   →  DequantizeLinear(Gather(codes, ids), Gather(scales, ids))     8 bit
                                                  Gather(DequantizeLinear(codes, scales, zeros), ids)           4 bit

The integers stay the same: unsigned with zero points, or, where the grid is symmetric, signed without (code − middle).
ONNX Runtime turns the first form back into MatMulNBits by itself when it loads the file, at accuracy level 4 unless the
session says `session.qdq_matmulnbits_accuracy_level` = 0. Its Gather takes no 4-bit numbers: such a table is decoded
whole at every call, which costs time that 8 bits do not. Needs operator set 21.
"""

# O rows (outputs, or tokens of a table), I columns, G groups of a row

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from compresskit.errors import CompressKitError, first_of
from compresskit.export.constants import add_initializer, drop_unused_initializers, read_constant
from compresskit.layers import grid
from compresskit.layers.bitsandbytes_linear import Bnb4Linear
from compresskit.layers.int8_linear import Int8Linear

#: The operator set that brought blocks to DequantizeLinear, and the file format that has 4-bit numbers.
OPSET, IR_VERSION = 21, 10
_DTYPES = {
    (4, True): (ir.DataType.UINT4, ml_dtypes.uint4),
    (4, False): (ir.DataType.INT4, ml_dtypes.int4),
    (8, True): (ir.DataType.UINT8, np.uint8),
    (8, False): (ir.DataType.INT8, np.int8),
}


#: Layers that no standard operator stands for, and the operator of ONNX Runtime that does.
_WITHOUT_FORM = {Int8Linear: "MatMulIntegerToFloat", Bnb4Linear: "MatMulBnb4"}


def refuse_layers(model: nn.Module) -> None:
    """Refuse a model with layers that have no standard form, from their kinds alone.

    Raises:
        CompressKitError: it names the operators, and the first layer and number of each.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if operator := _WITHOUT_FORM.get(type(module)):
            found.setdefault(operator, []).append(name)
    if found:
        said = [f"com.microsoft::{operator} ({first_of(names)})" for operator, names in found.items()]
        raise _foreign_error(", ".join(said))


def _foreign_error(operators: str) -> CompressKitError:
    return CompressKitError(
        f"{operators} belong to ONNX Runtime, and the target is standard ONNX",
        where="target",
        fix="say target: ort; integer activations (act: int8) and bitsandbytes' 4 bits have no standard form here",
    )


def use_standard_operators(model: ir.Model) -> None:
    """Rewrite every integer weight in place.

    Raises:
        CompressKitError: an operator that no standard one stands for.
    """
    rewrite = {"MatMulNBits": _rewrite_product, "GatherBlockQuantized": _rewrite_lookup}
    for node in list(model.graph):
        if node.op_type in rewrite:
            new = rewrite[node.op_type](model.graph, node)
            new.shape, new.type = node.outputs[0].shape, node.outputs[0].type
            name, is_output = node.outputs[0].name, node.outputs[0].is_graph_output()
            node.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            if is_output:
                new.name = name
    RemoveUnusedNodesPass()(model)
    drop_unused_initializers(model.graph)
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain})
    if foreign:
        raise _foreign_error(", ".join(foreign))
    for domain in [domain for domain in model.opset_imports if domain]:
        del model.opset_imports[domain]
    model.ir_version = max(model.ir_version or 0, IR_VERSION)


def has_blocks(model: ir.Model) -> bool:
    """Whether any weight is decoded in blocks, which sessions may then multiply in more ways than one."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _integers(packed: np.ndarray, columns: int, bits: int, *, unsigned: bool) -> np.ndarray:
    """Codes or zero points (O, columns), unpacked, in the type in which the file holds them."""
    codes = grid.unpack(torch.from_numpy(packed.copy()).flatten(1), columns, bits=bits).numpy()
    wanted = _DTYPES[bits, unsigned][1]
    return codes.astype(wanted) if unsigned else (codes.astype(np.int16) - 2 ** (bits - 1)).astype(wanted)


def _weight(
    graph: ir.Graph, node: ir.Node, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, *, transpose: bool
) -> tuple[list[ir.Value], int]:
    """Codes, scales and perhaps zeros as initializers, (O, I) and (O, G) or transposed, and the block size."""
    bits, unsigned = node.attributes.get_int("bits", 4), zeros is not None
    (name, packed), (scale_name, steps) = read_constant(codes), read_constant(scales)
    block = node.attributes.get_int("block_size", 0)
    columns = node.attributes.get_int("K", 0) or packed.shape[-1] * 8 // bits
    if steps.shape[1] == 1:
        block = columns
    arrays = [(name, _integers(packed, columns, bits, unsigned=unsigned)), (scale_name, steps)]
    if zeros is not None:
        zero_name, packed_zeros = read_constant(zeros)
        arrays.append((zero_name, _integers(packed_zeros, steps.shape[1], bits, unsigned=True)))
    dtypes = [_DTYPES[bits, unsigned][0], ir.DataType.FLOAT, _DTYPES[bits, True][0]]
    suffix = ".columns" if transpose else ".rows"
    return [
        add_initializer(graph, name + suffix, array.T if transpose else array, dtype)
        for (name, array), dtype in zip(arrays, dtypes, strict=False)
    ], block


def _insert(graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes or None)
    graph.insert_before(before, node)
    return node.outputs[0]


def _rewrite_product(graph: ir.Graph, node: ir.Node) -> ir.Value:
    x, codes, scales = node.inputs[:3]
    assert x is not None
    assert codes is not None
    assert scales is not None
    zeros, bias = _input(node, 3), _input(node, 5)
    # A tied head reads the rows that its table stores; a weight of its own lies as the product wants it.
    tied = codes.producer() is not None
    parts, block = _weight(graph, node, codes, scales, zeros, transpose=not tied)
    weight = _insert(graph, node, "DequantizeLinear", parts, axis=1 if tied else 0, block_size=block)
    if tied:
        weight = _insert(graph, node, "Transpose", [weight])
    product = _insert(graph, node, "MatMul", [x, weight])
    return product if bias is None else _insert(graph, node, "Add", [product, bias])


def _rewrite_lookup(graph: ir.Graph, node: ir.Node) -> ir.Value:
    codes, ids, scales = node.inputs[:3]
    assert codes is not None
    assert ids is not None
    assert scales is not None
    parts, block = _weight(graph, node, codes, scales, _input(node, 3), transpose=False)
    if node.attributes.get_int("bits", 4) == 4:
        table = _insert(graph, node, "DequantizeLinear", parts, axis=1, block_size=block)
        return _insert(graph, node, "Gather", [table, ids], axis=0)
    rows = [_insert(graph, node, "Gather", [part, ids], axis=0) for part in parts]
    return _insert(graph, node, "DequantizeLinear", rows, axis=-1, block_size=block)
