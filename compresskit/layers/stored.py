"""Which tensors of a model are stored in its original's float type, and when.

    memory  float32  ──  round_weights  ──  float32, values that bfloat16 holds  ──  file  bfloat16  ──  the same values

Weights are; what layers keep beside their integers (scales) is not: it stays float32, as operators read it.
A tensor that the type cannot hold, because a value is past its range or all are near its smallest (float16), stays
float32, and so does each that the original itself holds in more digits (a router in float32 in a bfloat16 file).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compresskit.layers.stand_in import TypedLayer

_LARGEST_STEP = torch.finfo(torch.bfloat16).eps


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The float32 tensors of the state dict that are weights, by all their names: no scales."""
    beside = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TypedLayer)
        for name, _ in module.named_buffers(recurse=False)
    }
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if value.dtype == torch.float32 and name not in beside}


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether `dtype` holds every value of a float32 tensor; of one on the meta device, yes."""
    return tensor.is_meta or dtype == tensor.dtype or torch.equal(tensor.to(dtype).float(), tensor)


def stored_form(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is stored: in `dtype` where that holds it, else as it is."""
    return tensor.to(dtype) if holds(dtype, tensor) else tensor


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype, *, finer: Callable[[str], bool]) -> list[str]:
    """Round the weights of a float32 model, in place, to values that `dtype` holds; what shares memory goes on to.

    Args:
        model: float32.
        dtype: what its weights are stored in.
        finer: of a weight's name, whether more digits than `dtype` has are to stay.

    Returns:
        The weights that stay as they are because `dtype` cannot hold them: rounding would move a value by more than
        1/128 of the tensor's largest, which is bfloat16's step.
    """
    if dtype == torch.float32:
        return []
    kept: list[str] = []
    for name, weight in weights_of(model).items():
        if not weight.numel() or holds(dtype, weight) or finer(name):
            continue
        rounded = weight.to(dtype).float()
        if (rounded - weight).abs().max() <= _LARGEST_STEP * weight.abs().max():
            weight.copy_(rounded)
        else:
            kept.append(name)
    return kept
