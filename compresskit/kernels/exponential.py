"""eˣ by way of 2ˣ, which torch computes several times as fast on some processors.

torch.exp of float32 goes through Intel's vector library, torch.exp2 through torch's own vector code. On an AMD EPYC the
first takes four times as long (torch 2.13).
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp_(x: Tensor) -> Tensor:
    """eˣ in place, 0 of −∞; on a CPU, float32 is right to (2 + 1.25 |x|) 2⁻²⁴ of itself."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.mul_(LOG2_E).exp2_()
    return x.exp_()


def exp(x: Tensor) -> Tensor:
    """eˣ as `exp_` makes it, in a new tensor; where autograd may follow, torch's own."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
        return torch.mul(x, LOG2_E).exp2_()
    return x.exp()
