"""What stock code asks of any layer, answered by those that hold no plain weight: a float type and a device.

A model in bfloat16 hands bfloat16 on from layer to layer. Integers say nothing of that, and the scales beside them are
float32 in every model: so these layers note the type that they were built in, and follow `model.to(dtype)`.
"""

from collections.abc import Callable
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn


class TypedLayer(nn.Module):
    """A layer that knows its model's float type, and whose buffers (codes, scales) say how weights are held.

    Attributes:
        dtype: the float type of the model around it: torch's default where the layer is built, which `from_pretrained`
            sets, and from then on what the model is cast to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class LinearStandIn(TypedLayer):
    """A layer in the place of an `nn.Linear`, whose matrix is stored in another form."""

    @property
    def weight(self) -> Tensor:
        """No values, shape (0,), in the dtype and on the device that the layer computes in.

        Models ask a linear's weight for these two: T5 what to cast its FFN's neurons to, Mamba its head.
        """
        floats = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        devices = (tensor.device for tensor in chain(self.parameters(), self.buffers()))
        return torch.empty(0, dtype=next(floats, self.dtype), device=next(devices, None))
