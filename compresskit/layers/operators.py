"""ONNX Runtime's integer operators, as layers emit them while a model is traced for ONNX.

Outside a trace these functions must not be called: they stand for a node of the file and compute nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Domain and name of the node that `widened_codes` emits.
WIDENING = ("compresskit", "WidenCodes")

_EMITTING: ContextVar[bool] = ContextVar("emitting", default=False)


@contextmanager
def emit_operators() -> Iterator[None]:
    """Layers traced inside emit operators (`torch.onnx.is_in_onnx_export` is false while transformers traces)."""
    token = _EMITTING.set(True)
    try:
        yield
    finally:
        _EMITTING.reset(token)


def emitting() -> bool:
    """Whether a layer's forward should emit operators instead of computing."""
    return _EMITTING.get() or torch.onnx.is_in_onnx_export()


def check_group_size(columns: int, group_size: int, *, pad: bool = False) -> None:
    """Accept 0 and the block sizes of ONNX Runtime that divide `columns`, or any of them where a row may be padded.

    Raises:
        ValueError: any other group size.
    """
    if group_size and (group_size not in BLOCK_SIZES or (columns % group_size and not pad)):
        sizes = [size for size in BLOCK_SIZES if pad or columns % size == 0]
        raise ValueError(f"group size {group_size} does not fit {columns} columns; use 0 (the row) or one of {sizes}")


def row_block(columns: int) -> int:
    """The block in which `MatMulNBits` gets a row with one scale: the largest that divides `columns`, else 16."""
    return max((size for size in BLOCK_SIZES if columns % size == 0), default=BLOCK_SIZES[0])


def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    in_features: int,
) -> Tensor:
    """x · dequantised(codes)ᵀ + bias, shape (…, out).

    Args:
        x: (…, in) float32.
        codes: (out, blocks, block · bits / 8) uint8; ONNX Runtime knows 4 and 8 bits (and 2), not 3.
        scales: (out, blocks), or (out, 1) where the whole row has one.
        zeros: packed, (out, ⌈blocks · bits / 8⌉) uint8, or (out, 1).
        bias: (out,).
    """
    out_features, blocks, blob = codes.shape
    if scales.shape[1] != blocks:
        scales = scales.expand(out_features, blocks)
        if zeros is not None:  # a 4-bit zero in both halves of each byte
            zeros = (zeros * 17 if bits == 4 else zeros).expand(out_features, (blocks * bits + 7) // 8)
    inputs = [x, codes, scales, zeros, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        inputs,
        {
            "K": in_features,
            "N": out_features,
            "bits": bits,
            "block_size": blob * 8 // bits,
            "accuracy_level": 0,  # multiply in float32, as the layer does; an export may choose 4
        },
        dtype=torch.float32,
        shape=(*x.shape[:-1], out_features),
        version=1,
    )


def matmul_bnb4(x: Tensor, codes: Tensor, absmax: Tensor, *, form: str, block: int, out_features: int) -> Tensor:
    """x · (T[codes] · absmax)ᵀ, shape (…, out).

    Args:
        x: (…, in) float32.
        codes: (out · in / 2,) uint8, row after row, the first of two weights in the high half.
        absmax: (out · in / block,) float32.
        form: nf4 or fp4, which says T.
        block: weights that share an absmax.
        out_features: rows of the weight.
    """
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulBnb4",
        [x, codes, absmax],
        {"K": x.shape[-1], "N": out_features, "block_size": block, "quant_type": {"fp4": 0, "nf4": 1}[form]},
        dtype=torch.float32,
        shape=(*x.shape[:-1], out_features),
        version=1,
    )


def gather_block_quantized(
    codes: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, columns: int
) -> Tensor:
    """The dequantised rows `indices` of a packed table, shape (*indices, columns).

    Args:
        codes: (rows, columns · bits / 8) uint8.
        indices: any shape, int64.
        scales: (rows, groups).
        zeros: packed, (rows, ⌈groups · bits / 8⌉) uint8.
    """
    groups = scales.shape[1]
    block = columns // groups
    if groups == 1:  # a block may reach past the row
        block = max(BLOCK_SIZES[0], 1 << (columns - 1).bit_length())
    return torch.onnx.ops.symbolic(
        "com.microsoft::GatherBlockQuantized",
        [codes, indices, scales] if zeros is None else [codes, indices, scales, zeros],
        {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        dtype=torch.float32,
        shape=(*indices.shape, columns),
        version=1,
    )


def widened_codes(codes: Tensor, factors: Tensor, zeros: Tensor | None, *, columns: int, group_size: int) -> Tensor:
    """4-bit codes as the int8 matrix (columns, out) that they stand for, (code − zero) · factor.

    The node is of no runtime: an export spells it out (`compresskit.export.widening`).

    Args:
        codes: packed, (out, groups, ⌈group_size / 2⌉) uint8; the last group may reach past `columns`.
        factors, zeros: packed, (out, ⌈groups / 2⌉) uint8; no zeros is the middle code.
    """
    return torch.onnx.ops.symbolic(
        f"{WIDENING[0]}::{WIDENING[1]}",
        [codes, factors] if zeros is None else [codes, factors, zeros],
        {"columns": columns, "group_size": group_size},
        dtype=torch.int8,
        shape=(columns, codes.shape[0]),
        version=1,
    )


def dynamic_matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x rounded to uint8 with one scale for the whole tensor, times int8 codes, as float32 (…, out).

    Args:
        x: (…, in) float32.
        codes: (in, out) int8, symmetric.
        scales: (out,) float32.
        bias: (out,) float32.
    """
    quantized, scale, zero = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear",
        [x],
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
    )
    return _integer_product(quantized, scale, zero, codes, scales, bias)


def static_matmul(x: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x rounded to uint8 on a grid that is given, times int8 codes, as float32 (…, out).

    One product of 384 × 1536 by ONNX Runtime 1.31: 0.9 to 1 times the dynamic form's time; QuantizeLinear and
    DequantizeLinear around a MatMul 1 to 1.2 times; QuantizeLinear with a scale a column, which would make factors
    before it needless, 3 to 10 times.

    Args:
        x: (…, in) float32.
        scale, zero: scalars, float32 and uint8.
        codes, scales, bias: as in `dynamic_matmul`.
    """
    quantized = torch.onnx.ops.symbolic(
        "QuantizeLinear", [x, scale, zero], dtype=torch.uint8, shape=x.shape, version=None
    )
    return _integer_product(quantized, scale, zero, codes, scales, bias)


def _integer_product(
    quantized: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    inputs = [quantized, codes, scale, scales, zero, None, bias]
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulIntegerToFloat",
        inputs if bias is not None else inputs[:5],
        dtype=torch.float32,
        shape=(*quantized.shape[:-1], codes.shape[1]),
        version=1,
    )
