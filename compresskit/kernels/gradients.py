"""Autograd for operators that make their gradients in the forward pass."""

from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the gradient of something of `dtype` waits for backward.

    float32 for float16: what the loss is scaled with, so that small gradients are not lost, arrives only then. Autograd
    rounds the product.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def register_scalar_loss(operator: Any) -> None:
    """Let autograd use the gradients that `operator` returns beside its loss.

    Args:
        operator: from `torch.library.custom_op`; returns a scalar and the gradients of its first n arguments, and takes
            as its last argument n flags: which of them are wanted.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wants, ctx.arguments = inputs[-1], len(inputs)
        ctx.set_materialize_grads(False)  # else zeros as large as every gradient are made
        ctx.save_for_backward(*output[1:])

    def scale(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this loss has no second derivative: its gradient is made in the forward pass; "
                "use impl='reference' where create_graph=True is needed"
            )
        factor = grad_outputs[0]
        if factor is None:
            return (None,) * ctx.arguments
        traced = torch.compiler.is_compiling() or type(factor) is not Tensor  # there a factor has no number
        multiply = _times if traced or _get_current_graph_task_keep_graph() else _times_
        pairs = zip(ctx.saved_tensors, ctx.wants, strict=True)
        gradients = [multiply(gradient, factor) if wanted else None for gradient, wanted in pairs]
        return (*gradients, *(None for _ in range(ctx.arguments - len(gradients))))

    operator.register_autograd(scale, setup_context=keep)


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a scalar, rounded once, where it is needed again: by another backward pass of this graph."""
    return (gradient * factor.reshape(1)).to(gradient.dtype)


def _times_(gradient: Tensor, factor: Tensor) -> Tensor:
    """As `_times`, in the gradient's own memory: a gradient of a head is as large as the head."""
    if factor.device.type != "cpu":
        return gradient.mul_(factor.reshape(1))  # one without dimensions would be rounded to the gradient's dtype
    number = factor.item()
    return gradient if number == 1 else gradient.mul_(number)
