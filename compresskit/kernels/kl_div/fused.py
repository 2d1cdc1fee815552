"""`divergence_loss` with the gradient made during the forward pass, as an operator of torch.

Autograd would keep several (T, V) tensors until backward. The gradient of a scalar loss needs nothing from later: a few
tokens at a time are copied into a slab, which their loss turns into their gradient.
"""

import torch
from torch import Tensor

from compresskit.kernels.choice import choose_slab_loss
from compresskit.kernels.divergence import Divergence, working_dtype
from compresskit.kernels.gradients import kept_dtype, register_scalar_loss
from compresskit.kernels.slab import TILE_ELEMENTS, Readout, TokenTerms, tile_elements

# T tokens, V vocabulary
_PLAIN = (Readout(), Readout())


@torch.library.custom_op("compresskit::divergence_loss", mutates_args=())
def _divergence_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    kind: str,
    weight_rule: str,
    numbers: list[float],
    impl: str,
    memory_mb: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient (`kept_dtype`), an empty tensor where it is not wanted."""
    divergence = Divergence(kind, numbers[0], numbers[1], weight_rule)  # type: ignore[arg-type]
    dtype, width = working_dtype(student.dtype), min(student.shape[1], teacher.shape[1])
    slab_loss, rows = choose_slab_loss(impl), weight.nonzero().flatten()
    grad = torch.zeros_like(student, dtype=kept_dtype(student.dtype)) if wants[0] else student.new_empty(0)
    loss = torch.zeros((), dtype=dtype, device=student.device)
    tile = tile_elements(memory_mb * 2**20 // 2, student.dtype)
    for part in rows.split(_tokens_per_slab(student, teacher, width, impl, memory_mb)):
        ours, theirs = student[part, :width].to(kept_dtype(student.dtype)), teacher[part, :width]
        tokens = TokenTerms(weight[part].to(dtype))
        loss += slab_loss(ours.T, theirs.T, tokens, divergence, _PLAIN, wants_grad=wants[0], tile=tile)
        if wants[0]:
            grad[part, :width] = ours
    return loss, grad


def _token_bytes(student: Tensor, teacher: Tensor, width: int) -> int:
    return width * (kept_dtype(student.dtype).itemsize + teacher.element_size())


def least_memory_mb(student: Tensor, teacher: Tensor) -> int:
    """The smallest budget in MiB that holds a slab of one token."""
    return max(1, -(-_token_bytes(student, teacher, min(student.shape[1], teacher.shape[1])) // 2**19))


def _tokens_per_slab(student: Tensor, teacher: Tensor, width: int, impl: str, memory_mb: int) -> int:
    """As many as half the budget holds; on a CPU no more than stay in its cache."""
    most = memory_mb * 2**19 // _token_bytes(student, teacher, width)
    return max(1, most if impl == "triton" else min(most, TILE_ELEMENTS // width))


@_divergence_loss.register_fake
def _(student: Tensor, teacher: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    wants = rest[-1]
    assert isinstance(wants, list)
    loss = student.new_empty((), dtype=working_dtype(student.dtype))
    return loss, torch.empty_like(student, dtype=kept_dtype(student.dtype)) if wants[0] else student.new_empty(0)


register_scalar_loss(_divergence_loss)


def fused_divergence(
    student: Tensor, teacher: Tensor, weight: Tensor, divergence: Divergence, impl: str, memory_mb: int
) -> Tensor:
    """As `divergence_loss`, by the operator, in its implementation `chunked` or `triton`."""
    wants = [torch.is_grad_enabled() and student.requires_grad]
    numbers = [divergence.mix, divergence.temperature]
    loss, _ = _divergence_loss(
        student, teacher, weight, divergence.kind, divergence.weight_rule, numbers, impl, memory_mb, wants
    )
    return loss
