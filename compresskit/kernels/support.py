"""Whether the Triton kernels can run, and if not, why."""

import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(*tensors: Tensor) -> str | None:
    """The reason why the Triton kernels cannot take these logits, or what makes them; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'compresskit[gpu]')"
    for tensor in tensors:
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"a tensor is on {tensor.device}, not on a CUDA device"
        if tensor.dtype not in _DTYPES:
            return f"a tensor is {tensor.dtype}; the kernels compute in float32"
    return None
