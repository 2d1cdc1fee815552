"""`kl_div` in chunks of tokens, with the gradient written during the forward pass.

Autograd would keep several (T, V) tensors until backward. The gradient of a scalar loss needs nothing from later, so it
is computed chunk by chunk while the chunk's logits are at hand, and backward only scales it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compresskit.kernels.kl_div.reference import working_dtype

#: Tensors of (rows, V) in working precision that one chunk holds at its peak.
_BUFFERS = 5


def rows_per_chunk(width: int, item_bytes: int, memory_mb: int) -> int:
    """How many tokens of `width` logits fit into `memory_mb` MiB of working memory; at least one."""
    return max(1, memory_mb * 2**20 // (_BUFFERS * width * item_bytes))


def _chunk(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of a few rows, and τ w (q − p) for them; all in `weight`'s dtype, (R, V), (R, V), (R,)."""
    log_q = student.to(weight.dtype).div(temperature).log_softmax(-1)
    log_p = teacher.to(weight.dtype).div(temperature).log_softmax(-1)
    p = log_p.exp()
    gap = log_p.sub_(log_q).masked_fill_(p == 0, 0)
    loss = temperature**2 * (weight * torch.einsum("tv,tv->t", p, gap)).sum()
    return loss, log_q.exp_().sub_(p).mul_(temperature * weight[:, None])


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, memory_mb: int, wants_grad: bool
    ) -> Tensor:
        dtype, width = working_dtype(student), min(student.shape[1], teacher.shape[1])
        rows = weight.nonzero().flatten()
        grad = torch.zeros_like(student) if wants_grad else None
        loss = torch.zeros((), dtype=dtype, device=student.device)
        for part in rows.split(rows_per_chunk(width, dtype.itemsize, memory_mb)):
            part_loss, part_grad = _chunk(
                student[part, :width], teacher[part, :width], weight[part].to(dtype), temperature
            )
            loss += part_loss
            if grad is not None:
                grad[part, :width] = part_grad.to(grad.dtype)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad if grad is None else grad * grad_outputs[0].to(grad.dtype)), None, None, None, None, None


def chunked_kl_div(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, memory_mb: int) -> Tensor:
    """As `kl_div`, within `memory_mb` MiB beside the gradient.

    Raises:
        ValueError: memory_mb below 1.
    """
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")
    wants_grad = student.requires_grad and torch.is_grad_enabled()  # inside forward neither says so
    result: Tensor = _ChunkedKL.apply(student, teacher, weight, temperature, memory_mb, wants_grad)  # type: ignore[assignment]
    return result
