"""The definition of `kl_div` in plain torch; truth for the other implementations (run it in float64)."""

import torch
from torch import Tensor


def working_dtype(logits: Tensor) -> torch.dtype:
    """The dtype in which divergences are computed: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reference_kl_div(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """As `kl_div`, with autograd's own gradient. Cost: about six tensors of (T, V)."""
    dtype, width = working_dtype(student), min(student.shape[1], teacher.shape[1])
    rows = weight.nonzero().flatten()
    log_q = (student[rows, :width].to(dtype) / temperature).log_softmax(-1)
    log_p = (teacher[rows, :width].to(dtype) / temperature).log_softmax(-1)
    p = log_p.exp()
    per_token = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
    return temperature**2 * (weight[rows].to(dtype) * per_token).sum()
