"""Reading and writing the linear map of a layer, whatever form it has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compresskit.layers.low_rank import LowRankLinear


def dense_weight(layer: nn.Module) -> Tensor:
    """W (O, I) of a float linear, or B A of a low-rank one; not a copy where none is needed.

    Raises:
        TypeError: a layer without a float weight.
    """
    if isinstance(layer, LowRankLinear):
        return dense_weight(layer.expand) @ dense_weight(layer.factor_in)
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    raise TypeError(f"{type(layer).__name__} has no float weight")


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


@torch.no_grad()
def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Write W (O, I) into a layer of that shape.

    A low-rank layer keeps its B and takes A = B⁺ W, the best A for that B; `dense_weight` then says what it became.
    """
    if isinstance(layer, LowRankLinear):
        B = layer.expand.weight.double()
        layer.factor_in.weight.copy_(torch.linalg.lstsq(B, weight.double()).solution)  # type: ignore[union-attr,operator]
    else:
        layer.weight.copy_(weight)  # type: ignore[union-attr,operator]


@torch.no_grad()
def set_bias(layer: nn.Module, bias: Tensor) -> None:
    """Write the bias (O,) of a layer that has one."""
    linear = layer.expand if isinstance(layer, LowRankLinear) else layer
    linear.bias.copy_(bias)  # type: ignore[union-attr,operator]
