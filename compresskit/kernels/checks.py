"""Checks of what the loss kernels are given; each message says what was seen and what was expected."""

import torch
from torch import Tensor

from compresskit.kernels.buckets import TopK

# T tokens, V vocabulary, K entries of a cache
#: How far above 1 cached probabilities may sum: those of a cache kept in 16 bits are rounded.
_ROUNDED = 0.01


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


def check_matrix(name: str, tensor: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Refuse what is not (rows, columns); any number of them where None is given."""
    wanted = (rows, columns)
    if tensor.ndim != 2 or any(one not in (None, seen) for one, seen in zip(wanted, tensor.shape, strict=True)):
        said = ", ".join("any" if one is None else str(one) for one in wanted)
        raise ValueError(f"{name} must be ({said}), got {tuple(tensor.shape)}")


def check_vocabulary(size: int) -> None:
    """Refuse a vocabulary of nothing: there is no distribution over it."""
    if size < 1:
        raise ValueError("the vocabulary must have at least 1 entry, got 0")


def check_memory(memory_mb: int, least: int) -> None:
    """Refuse a budget that is no whole number of MiB, or does not hold the logits of one token."""
    if not isinstance(memory_mb, int):
        raise ValueError(f"memory_mb must be a whole number, got {memory_mb!r}")
    if memory_mb < least:
        raise ValueError(f"memory_mb={memory_mb} does not hold the logits of one token; at least {least} are needed")


def check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    """Refuse what is not (length,)."""
    if tensor is not None and tensor.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(tensor.shape)}")


def check_weights(tokens: int, **weights: Tensor | None) -> None:
    """Refuse weights of tokens that are not (T,), negative, infinite or no number."""
    check_constant(**weights)
    for name, weight in weights.items():
        check_vector(name, weight, tokens)
        if weight is None or not _readable(weight):
            continue
        wrong = ~((weight >= 0) & weight.isfinite())
        if bool(wrong.any()):
            raise ValueError(f"{name} must be finite and at least 0 everywhere, got {weight[wrong][0].item()}")


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


def check_top_k(cache: TopK, counts: Tensor, compared: Tensor, vocabulary: int) -> None:
    """Refuse a cache of other shapes, and one that is no part of a distribution over the vocabulary.

    Args:
        cache: (T, K).
        counts: whether each token counts for anything, (T,) bool; any number may stand where none does.
        compared: whether its divergence does, (T,) bool: of a label alone no probability is read.
        vocabulary: V.
    """
    check_matrix("teacher_topk.log_probs", cache.log_probs, len(counts))
    entries = cache.log_probs.shape[1]
    check_matrix("teacher_topk.indices", cache.indices, len(counts), entries)
    if cache.indices.dtype != torch.int64:
        raise ValueError(f"teacher_topk.indices must be int64, got {cache.indices.dtype}")
    if not 1 <= entries <= vocabulary:
        raise ValueError(f"teacher_topk keeps {entries} entries; expected 1 to the vocabulary's {vocabulary}")
    if not _readable(cache.indices) or not bool(counts.any()):
        return
    indices, log_probs = cache.indices[counts].sort().values, cache.log_probs[compared]
    low, high = indices[:, 0].min().item(), indices[:, -1].max().item()
    if low < 0 or high >= vocabulary:
        raise ValueError(f"teacher_topk.indices must lie in 0…{vocabulary - 1}, got {low if low < 0 else high}")
    twice = indices[:, 1:][indices[:, 1:] == indices[:, :-1]]
    if len(twice):
        raise ValueError(f"teacher_topk.indices must name an entry once in a token, got {twice[0].item()} twice")
    wrong = log_probs[~(log_probs <= 0)]
    if len(wrong):
        raise ValueError(f"teacher_topk.log_probs must be at most 0, got {wrong[0].item()}")
    total = log_probs.exp().sum(-1, dtype=torch.float32).amax().item() if len(log_probs) else 0.0
    if total > 1 + _ROUNDED:
        raise ValueError(f"the probabilities of teacher_topk.log_probs must sum to at most 1, got {total:.4g}")


def _readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: a compiler knows only shapes, and a GPU would have to be waited for."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
