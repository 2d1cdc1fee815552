"""Checks of what the loss kernels are given; each message says what was seen and what was expected."""

import torch
from torch import Tensor

from compresskit.kernels.buckets import TopK

# T tokens, V vocabulary, K entries of a cache


def check_impl(impl: str, known: tuple[str, ...], reason: str | None) -> None:
    """Refuse an unknown implementation, and Triton where `reason` says that it cannot run."""
    if impl not in known:
        raise ValueError(f"impl {impl!r} is none of {', '.join(known)}")
    if impl == "triton" and reason:
        raise ValueError(f"impl='triton' cannot run here: {reason}")


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not floating point, and tensors on different devices."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    check_devices(**given)


def check_devices(**tensors: Tensor | None) -> None:
    """Refuse tensors on different devices."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        seen = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {seen}")


def check_constant(**tensors: Tensor | None) -> None:
    """Refuse a teacher, or weights, that require grad: no gradient is computed for them."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, and only the student learns; detach it or use torch.no_grad()")


def check_matrix(name: str, tensor: Tensor, rows: int, columns: int | None = None) -> None:
    """Refuse what is not (rows, columns); any number of columns where None is given."""
    if tensor.ndim != 2 or tensor.shape[0] != rows or columns not in (None, tensor.shape[1]):
        wanted = f"({rows}, {'any' if columns is None else columns})"
        raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")


def check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    """Refuse what is not (length,)."""
    if tensor is not None and tensor.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(tensor.shape)}")


def check_weights(tokens: int, **weights: Tensor | None) -> None:
    """Refuse weights of tokens that are not (T,), negative or no number."""
    check_constant(**weights)
    for name, weight in weights.items():
        check_vector(name, weight, tokens)
        if weight is not None and _readable(weight) and not bool((weight >= 0).all()):
            raise ValueError(f"{name} must be at least 0 everywhere, got {weight[~(weight >= 0)][0].item()}")


def check_labels(labels: Tensor | None, label_weight: Tensor | None, tokens: int, vocabulary: int) -> None:
    """Refuse one of both without the other, labels that are not int64, and labels that count beyond the vocabulary."""
    if labels is None and label_weight is None:
        return
    if labels is None or label_weight is None:
        missing = "labels" if labels is None else "label_weight"
        raise ValueError(f"labels and label_weight belong together, and {missing} is missing")
    check_vector("labels", labels, tokens)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if _readable(labels):
        wrong = labels[(label_weight != 0) & ((labels < 0) | (labels >= vocabulary))]
        if len(wrong):
            raise ValueError(f"labels must lie in 0…{vocabulary - 1} where they count, got {wrong[0].item()}")


def check_top_k(cache: TopK, tokens: int, vocabulary: int) -> None:
    """Refuse a cache of other shapes, of more entries than the vocabulary has, or whose entries lie beyond it."""
    check_matrix("teacher_topk.log_probs", cache.log_probs, tokens)
    entries = cache.log_probs.shape[1]
    check_matrix("teacher_topk.indices", cache.indices, tokens, entries)
    if cache.indices.dtype != torch.int64:
        raise ValueError(f"teacher_topk.indices must be int64, got {cache.indices.dtype}")
    if not 1 <= entries <= vocabulary:
        raise ValueError(f"teacher_topk keeps {entries} entries; expected 1 to the vocabulary's {vocabulary}")
    if tokens and _readable(cache.indices):
        low, high = cache.indices.min().item(), cache.indices.max().item()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"teacher_topk.indices must lie in 0…{vocabulary - 1}, got {low if low < 0 else high}")
        if cache.log_probs.max() > 0:
            raise ValueError(f"teacher_topk.log_probs must be at most 0, got {cache.log_probs.max().item()}")


def _readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: a compiler knows only shapes, and a GPU would have to be waited for."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
