"""Whether the Triton kernel can run, and if not, why."""

import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(student_logits: Tensor, teacher_logits: Tensor) -> str | None:
    """The reason why the Triton kernel cannot take these tensors; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'compresskit[gpu]')"
    devices = {student_logits.device, teacher_logits.device}
    if len(devices) > 1:
        return f"the logits are on different devices ({student_logits.device} and {teacher_logits.device})"
    if student_logits.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits are on {student_logits.device}, not on a CUDA device"
    for who, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if logits.dtype not in _DTYPES:
            return f"the {who}'s logits are {logits.dtype}; the kernel computes in float32"
    return None
