"""Reading and writing the linear map of a layer, whatever form it has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import CompressKitError
from compresskit.layers.linear import layer_widths
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.pivoted_linear import PivotedLinear, pivot_columns
from compresskit.layers.quant_linear import QuantLinear


def dense_weight(layer: nn.Module) -> Tensor:
    """W (O, I) of a linear, a transposed or pivoted one, B A of a low-rank one, or what integers stand for.

    No copy where none is needed.

    Raises:
        TypeError: a layer that is no product with a weight alone.
    """
    if isinstance(layer, LowRankLinear):
        return dense_weight(layer.expand) @ dense_weight(layer.factor_in)
    if isinstance(layer, PivotedLinear):
        return layer.weight_from(dense_weight(layer.rest))
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if isinstance(layer, Conv1D):
        return layer.weight.detach().T
    if isinstance(layer, QuantLinear):
        return layer.dequantize()
    raise TypeError(f"{type(layer).__name__} has no weight of its own")


def layer_bias(layer: nn.Module) -> Tensor | None:
    """The bias (O,), or None."""
    linear = layer.expand if isinstance(layer, LowRankLinear) else layer
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def stacked_weight(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weights of layers that read the same input, one below the other, and biases; zeros where one has none."""
    biases = [layer_bias(layer) for layer in layers]
    weights = [dense_weight(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(weights), torch.cat(filled)


def row_indices(layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The rows of a stacked weight that belong to each layer."""
    sizes = [layer_widths(layer)[0] for layer in layers]
    return torch.arange(sum(sizes)).split(sizes)


@torch.no_grad()
def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Write W (O, I) into a layer of that shape.

    A low-rank layer keeps its B and takes A = B⁺ W, the best A for that B; `dense_weight` then says what it became.
    """
    if isinstance(layer, LowRankLinear):
        B = dense_weight(layer.expand).double()
        set_factors([layer], B, torch.linalg.lstsq(B, weight.double()).solution)
    else:
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)  # type: ignore[union-attr,operator]


@torch.no_grad()
def set_factors(layers: Sequence[LowRankLinear], B: Tensor, A: Tensor) -> None:
    """Write B (O, rank) and A (rank, I) into layers that share A: each takes its rows of B.

    A pivoted first factor takes A = G P and B takes G, which is the same map.
    """
    first = layers[0].factor_in
    if isinstance(first, PivotedLinear):
        order, rest, pivots = pivot_columns(A)
        first.set_columns(order, rest)
        B = B.double() @ pivots
    else:
        first.weight.copy_(A)  # type: ignore[union-attr,operator]
    for layer, rows in zip(layers, B.split([layer.out_features for layer in layers]), strict=True):
        layer.expand.weight.copy_(rows)  # type: ignore[union-attr,operator]


@torch.no_grad()
def set_bias(layer: nn.Module, bias: Tensor) -> None:
    """Write the bias (O,) of a layer that has one."""
    linear = layer.expand if isinstance(layer, LowRankLinear) else layer
    linear.bias.copy_(bias)  # type: ignore[union-attr,operator]


def require_finite(model: nn.Module) -> None:
    """Refuse numbers that nothing can be fitted to, before anything is changed: one pass over the model.

    Raises:
        CompressKitError: NaN or infinity in a float parameter, or NaN in a float buffer (in a mask infinity may be
            meant); all are listed.
    """
    broken = []
    for name, values in model.named_parameters():
        if count := int((~torch.isfinite(values)).sum()):
            broken.append(f"{name}: {count} of {values.numel()}")
    for name, values in model.named_buffers():
        if count := int(torch.isnan(values).sum()):
            broken.append(f"{name}: {count} of {values.numel()}")
    if broken:
        listed = "\n    ".join(broken)
        what = f"{len(broken)} tensors have values that are NaN or infinite:\n    {listed}"
        raise CompressKitError(what, fix="use intact weights")
