"""What stock code asks of any linear layer, answered by those that hold no plain weight."""

from itertools import chain

import torch
from torch import Tensor, nn


class LinearStandIn(nn.Module):
    """A layer in the place of an `nn.Linear`, whose matrix is stored in another form."""

    @property
    def weight(self) -> Tensor:
        """No values, shape (0,), in the dtype and on the device that the layer computes in.

        Models ask a linear's weight for these two: T5 what to cast its FFN's neurons to, Mamba its head.
        """
        held = chain(self.parameters(), self.buffers())
        like = next((tensor for tensor in held if tensor.is_floating_point()), torch.empty(0))
        return torch.empty(0, dtype=like.dtype, device=like.device)
