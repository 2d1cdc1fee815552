"""`linear_kl` as an operator of torch, opaque to `torch.compile`, with the gradients made in its forward pass.

An operator takes tensors and numbers only, so a `Problem` is taken apart before it and put together inside.
"""

from typing import Any

import torch
from torch import Tensor

from compresskit.kernels.buckets import TopK
from compresskit.kernels.choice import choose_slab_loss
from compresskit.kernels.divergence import Divergence, working_dtype
from compresskit.kernels.gradients import kept_dtype, register_scalar_loss
from compresskit.kernels.linear_kl.chunked import Wants, chunked_linear_kl
from compresskit.kernels.linear_kl.head import Head, TiledWeight
from compresskit.kernels.linear_kl.problem import Problem, Projected, Teacher


@torch.library.custom_op("compresskit::linear_kl", mutates_args=())
def _linear_kl(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_indices: Tensor | None,
    token_weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    handles: list[int],
    readouts: list[float],
    kind: str,
    weight_rule: str,
    numbers: list[float],
    vocabulary: int,
    impl: str,
    memory_mb: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients of hidden, weight and bias (`kept_dtype`); an empty tensor where one is not wanted."""
    ours = _head(weight, bias, handles[0], readouts[:2])
    theirs: Teacher = teacher
    if teacher_indices is not None:
        theirs = TopK(teacher, teacher_indices)
    elif teacher_weight is not None or handles[1]:
        theirs = Projected(teacher, _head(teacher_weight, teacher_bias, handles[1], readouts[2:]))
    divergence = Divergence(kind, numbers[0], numbers[1], weight_rule)  # type: ignore[arg-type]
    problem = Problem(hidden, ours, theirs, token_weight, labels, label_weight, divergence, vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):  # the caller has cast; float32 sums must stay so
        loss, gradients = chunked_linear_kl(problem, Wants(*wants), memory_mb, choose_slab_loss(impl))
    found = (gradients.hidden, gradients.weight, gradients.bias)
    hidden_grad, weight_grad, bias_grad = (hidden.new_empty(0) if one is None else one for one in found)
    return loss, hidden_grad, weight_grad, bias_grad


def _head(weight: Tensor | None, bias: Tensor | None, handle: int, readout: list[float]) -> Head:
    used = TiledWeight.of(handle) if weight is None else weight
    return Head(used, bias, scale=readout[0], softcap=readout[1] or None)


@_linear_kl.register_fake
def _(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wants = rest[-1]
    return (
        hidden.new_empty((), dtype=working_dtype(hidden.dtype)),
        _empty(hidden) if wants[0] else hidden.new_empty(0),
        _empty(weight.contiguous()) if wants[1] and weight is not None else hidden.new_empty(0),
        _empty(bias) if wants[2] and bias is not None else hidden.new_empty(0),
    )


def _empty(one: Tensor) -> Tensor:
    return torch.empty_like(one, dtype=kept_dtype(one.dtype))


register_scalar_loss(_linear_kl)


def fused_linear_kl(problem: Problem, impl: str, memory_mb: int) -> Tensor:
    """As `linear_kl`, by the operator."""
    head, teacher = problem.head, problem.teacher
    weight, handle = _tensor_or_handle(head)
    theirs = teacher.head if isinstance(teacher, Projected) else None
    teacher_weight, teacher_handle = (None, 0) if theirs is None else _tensor_or_handle(theirs)
    grad = torch.is_grad_enabled()
    wants = [grad and one is not None and one.requires_grad for one in (problem.hidden, weight, head.bias)]
    readouts = [head.scale, head.softcap or 0.0]
    readouts += [1.0, 0.0] if theirs is None else [theirs.scale, theirs.softcap or 0.0]
    loss, *_ = _linear_kl(
        problem.hidden,
        weight,
        head.bias,
        _rows(teacher),
        teacher_weight,
        None if theirs is None else theirs.bias,
        teacher.indices if isinstance(teacher, TopK) else None,
        problem.weight,
        problem.labels,
        problem.label_weight,
        [handle, teacher_handle],
        readouts,
        problem.divergence.kind,
        problem.divergence.weight_rule,
        [problem.divergence.mix, problem.divergence.temperature],
        problem.vocabulary,
        impl,
        memory_mb,
        wants,
    )
    return loss


def _tensor_or_handle(head: Head) -> tuple[Tensor | None, int]:
    weight = head.weight
    return (None, weight.handle) if isinstance(weight, TiledWeight) else (weight, 0)


def _rows(teacher: Teacher) -> Tensor:
    if isinstance(teacher, Projected):
        return teacher.hidden
    return teacher.log_probs if isinstance(teacher, TopK) else teacher
