"""`kl_div` as one Triton program per token.

First read of the row: running maximum and sum of exponentials of student and teacher. Second read: the divergence and
the gradient τ w (q − p), written where autograd will look for it. Numbers are float32 in registers, whatever the
logits are.
"""

# Pyright takes `import triton` for this very file; Python, with absolute imports, does not.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Columns in a tile; 32 k columns at once spill registers.
_MAX_BLOCK = 4096


@triton.jit
def _add_tile(logits, old_max, old_sum):
    """Running log-sum-exp: the new maximum and the sum of exponentials relative to it; −∞ tiles are safe."""
    new_max = tl.maximum(old_max, tl.max(logits, 0))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, old_sum * tl.exp(old_max - shift) + tl.sum(tl.exp(logits - shift), 0)


@triton.jit
def kl_rows(
    student, teacher, weight, rows, loss, grad,
    student_stride, teacher_stride, grad_stride, width, inverse_temperature, temperature,
    WANTS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss[i] = τ² w KL(p‖q) of token rows[i]; grad[rows[i], :] = τ w (q − p)."""
    i = tl.program_id(0)
    row = tl.load(rows + i).to(tl.int64)
    w = tl.load(weight + row).to(tl.float32)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s, max_t = float("-inf"), float("-inf")
    sum_s, sum_t = 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        a = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        b = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        max_s, sum_s = _add_tile(a, max_s, sum_s)
        max_t, sum_t = _add_tile(b, max_t, sum_t)
    log_sum_s, log_sum_t = tl.log(sum_s), tl.log(sum_t)
    divergence = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        a = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        b = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        log_q = (a - max_s) - log_sum_s
        log_p = (b - max_t) - log_sum_t
        p = tl.exp(log_p)
        divergence += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)  # pyright: ignore[reportOperatorIssue] # triton types a float argument as anything
        if WANTS_GRAD:
            slope = temperature * w * (tl.exp(log_q) - p)
            tl.store(grad + row * grad_stride + columns, slope.to(grad.dtype.element_ty), mask=inside)
    tl.store(loss + i, temperature * temperature * w * divergence)


def block_columns(width: int) -> int:
    """Columns in a tile for rows of `width` logits: a power of two."""
    return min(_MAX_BLOCK, triton.next_power_of_2(width))


class _TritonKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, wants_grad: bool
    ) -> Tensor:
        student, teacher, weight = student.contiguous(), teacher.contiguous(), weight.contiguous()
        width = min(student.shape[1], teacher.shape[1])
        rows = weight.nonzero().flatten()
        grad = torch.zeros_like(student) if wants_grad else student
        loss = torch.zeros(len(rows), dtype=torch.float32, device=student.device)
        if len(rows):
            kl_rows[(len(rows),)](
                student, teacher, weight, rows, loss, grad,
                student.stride(0), teacher.stride(0), grad.stride(0), width, 1 / temperature, temperature,
                WANTS_GRAD=wants_grad, BLOCK=block_columns(width), num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(grad if wants_grad else None)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad if grad is None else grad * grad_outputs[0].to(grad.dtype)), None, None, None, None


def triton_kl_div(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """As `kl_div`, on a CUDA device or under TRITON_INTERPRET=1; working memory is one float per token."""
    wants_grad = student.requires_grad and torch.is_grad_enabled()  # inside forward neither says so
    result: Tensor = _TritonKL.apply(student, teacher, weight, temperature, wants_grad)  # type: ignore[assignment]
    return result
