"""Autograd for operators that make their gradients in the forward pass."""

from typing import Any

import torch
from torch import Tensor


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
        pairs = zip(ctx.saved_tensors, ctx.wants, strict=True)
        gradients = [_scaled(gradient, factor) if wanted else None for gradient, wanted in pairs]
        return (*gradients, *(None for _ in range(ctx.arguments - len(gradients))))

    operator.register_autograd(scale, setup_context=keep)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a scalar; the gradient itself where that is 1, so that no second one of its size is made."""
    if not torch.compiler.is_compiling() and factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient * factor.to(gradient.dtype)
