"""What counts as a linear layer, and how wide it is, whatever form its matrix is stored in."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.quant_linear import QuantLinear

#: GPT-2's Conv1D is a linear layer that stores its weight transposed, (in, out).
LinearLike = nn.Linear | Conv1D | LowRankLinear | QuantLinear | Int8Linear | Bnb4Linear | Bnb8Linear


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer.

    Raises:
        TypeError: a layer of another kind.
    """
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    if isinstance(layer, LinearLike):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    raise TypeError(f"{type(layer).__name__} is no linear layer")
